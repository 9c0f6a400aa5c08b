//! The counters of guests' processes, written anew for the daemon's metrics.
//!
//! A guest may have taken over its process, and whoever reads the daemon's metrics cannot tell who wrote a line. So a
//! sample is taken apart: its metric has to be one that a guest's process has (`control::metrics::families`), and so
//! have its labels; the values are numbers. The line is then made here, with the name of the guest as its first label.
//! Names, kinds and explanations are never from a process. What has another form, or is there twice, or too much, is
//! left out and counted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::Method;

use super::proxy;
use super::vm::Vm;
use control::metrics::{Family, FamilyKind, families};

/// How long a guest's process may take to give its counters.
const PATIENCE: Duration = Duration::from_secs(1);
/// Most bytes that are read of one guest. A guest with 24 drives has a third of that.
const LONGEST: usize = 512 << 10;
/// Most samples that are taken of one guest.
const SERIES: usize = 4096;
/// Longest value of a label in bytes.
const LABEL: usize = 64;

/// The counters of a guest's process; `None` where it does not answer in time.
pub async fn of_guest(vm: Arc<Vm>) -> Option<(String, String)> {
    let asked = proxy::ask_for(
        &vm,
        Method::GET,
        "/metrics",
        Bytes::new(),
        PATIENCE,
        LONGEST,
    )
    .await;
    let response = asked.ok().filter(|response| response.status.is_success())?;
    let text = String::from_utf8(response.body.to_vec()).ok()?;
    Some((vm.id.clone(), text))
}

/// The counters of guests, one metric after the other, with a label for each guest.
pub struct Joined {
    families: Vec<Family>,
    /// The samples of each, by its place in `families`.
    samples: BTreeMap<usize, String>,
}

impl Default for Joined {
    fn default() -> Self {
        Self {
            families: families(),
            samples: BTreeMap::new(),
        }
    }
}

/// A sample, as a process has written it.
struct Sample<'a> {
    name: &'a str,
    labels: Vec<(&'a str, &'a str)>,
    value: &'a str,
}

/// Takes a line apart; `None` where it has another form.
fn parse(line: &str) -> Option<Sample<'_>> {
    let (series, value) = line.rsplit_once(' ')?;
    let Some((name, labels)) = series.split_once('{') else {
        return Some(Sample {
            name: series,
            labels: Vec::new(),
            value,
        });
    };
    let labels = labels.strip_suffix('}')?;
    // Values of labels are words, so none has a comma.
    let labels = labels.split(',').map(|label| {
        let (name, value) = label.split_once('=')?;
        Some((name, value.strip_prefix('"')?.strip_suffix('"')?))
    });
    Some(Sample {
        name,
        labels: labels.collect::<Option<_>>()?,
        value,
    })
}

/// A number that is not negative, as it is written here; `None` where it is none.
fn number(text: &str) -> Option<String> {
    if let Ok(number) = text.parse::<u64>() {
        return Some(number.to_string());
    }
    // What the parser takes beside numbers has letters.
    let is_number = text
        .bytes()
        .all(|c| matches!(c, b'0'..=b'9' | b'.' | b'e' | b'-' | b'+'));
    let number = text.parse::<f64>().ok().filter(|_| is_number)?;
    (number.is_finite() && number >= 0.0).then(|| number.to_string())
}

/// The value of a label, where it is a word.
fn word(text: &str) -> Option<&str> {
    let is_word = |c: u8| c == b'_' || c == b'-' || c.is_ascii_alphanumeric();
    ((1..=LABEL).contains(&text.len()) && text.bytes().all(is_word)).then_some(text)
}

/// The bound of a bucket.
fn bound(text: &str) -> Option<String> {
    if text == "+Inf" {
        return Some(text.to_owned());
    }
    number(text)
}

/// Whether a sample of this name is of the family; what stands behind its name.
fn suffix(family: &Family, name: &str) -> Option<&'static str> {
    let rest = name.strip_prefix(family.name)?;
    let mut suffixes = family.kind.suffixes().iter();
    suffixes.find(|suffix| **suffix == rest).copied()
}

/// The labels and the value of a sample, as they are written here; `None` where they are not the family's.
fn written(family: &Family, suffix: &str, sample: &Sample<'_>) -> Option<(String, String)> {
    let is_bucket = suffix == "_bucket";
    if sample.labels.len() != family.labels.len() + usize::from(is_bucket) {
        return None;
    }
    let value_of = |wanted: &str| {
        let mut found = sample.labels.iter().filter(|(name, _)| *name == wanted);
        found.next().map(|(_, value)| *value)
    };
    let mut labels = String::new();
    for name in &family.labels {
        // Writing to a string does not fail.
        let _ = write!(labels, ",{name}=\"{}\"", word(value_of(name)?)?);
    }
    if is_bucket {
        let _ = write!(labels, ",le=\"{}\"", bound(value_of("le")?)?);
    }
    let value = number(sample.value)?;
    // Only sums of seconds have fractions; what is counted has none.
    let is_whole = value.bytes().all(|c| c.is_ascii_digit());
    let is_count = family.kind == FamilyKind::Histogram && suffix != "_sum";
    (is_whole || !is_count).then_some((labels, value))
}

impl Joined {
    /// Adds the counters of a guest's process, and gives how many lines were left out.
    pub fn add(&mut self, vm: &str, text: &str) -> usize {
        let (mut seen, mut left_out) = (BTreeSet::new(), 0);
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if seen.len() == SERIES || !self.add_line(vm, line, &mut seen) {
                left_out += 1;
            }
        }
        left_out
    }

    /// Adds a sample, unless it has another form or is among those that were seen of this guest.
    fn add_line(&mut self, vm: &str, line: &str, seen: &mut BTreeSet<String>) -> bool {
        let Some(sample) = parse(line) else {
            return false;
        };
        let mut families = self.families.iter().enumerate();
        let found = families.find_map(|(at, family)| Some((at, suffix(family, sample.name)?)));
        let Some((at, suffix)) = found else {
            return false;
        };
        let Some(family) = self.families.get(at) else {
            return false;
        };
        let Some((labels, value)) = written(family, suffix, &sample) else {
            return false;
        };
        let series = format!("{}{suffix}{{vm=\"{vm}\"{labels}}}", family.name);
        if seen.contains(&series) {
            return false;
        }
        let samples = self.samples.entry(at).or_default();
        let _ = writeln!(samples, "{series} {value}");
        seen.insert(series);
        true
    }

    /// The daemon's own metrics, with these behind.
    pub fn after(self, own: &str) -> String {
        let mut text = own.trim_end().trim_end_matches("# EOF").to_owned();
        for (at, samples) in self.samples {
            let Some(family) = self.families.get(at) else {
                continue;
            };
            let (name, kind) = (family.name, family.kind.name());
            let _ = writeln!(text, "# HELP {name} {}\n# TYPE {name} {kind}", family.help);
            if let Some(unit) = family.unit() {
                let _ = writeln!(text, "# UNIT {name} {unit}");
            }
            text.push_str(&samples);
        }
        text.push_str("# EOF\n");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(texts: &[(&str, &str)]) -> (String, usize) {
        let mut joined = Joined::default();
        let left_out = texts.iter().map(|(vm, text)| joined.add(vm, text)).sum();
        (joined.after("own 1\n# EOF\n"), left_out)
    }

    #[test]
    fn guests_are_told_apart_by_a_label_and_metrics_stay_together() {
        let guest = |n: u8| {
            format!(
                "# HELP coppice_block_reads Help\n# TYPE coppice_block_reads counter\n\
                 coppice_block_reads_total{{drive=\"x\"}} {n}\ncoppice_sharing_runs {n}\n\
                 coppice_sharing_held_seconds_total 0.5\n# EOF\n"
            )
        };
        let (text, left_out) = joined(&[("one", &guest(1)), ("two", &guest(2))]);
        let expected = "own 1\n\
            # HELP coppice_sharing_runs Runs of pages that are mapped from files\n\
            # TYPE coppice_sharing_runs gauge\n\
            coppice_sharing_runs{vm=\"one\"} 1\ncoppice_sharing_runs{vm=\"two\"} 2\n\
            # HELP coppice_sharing_held_seconds How long the guest was held\n\
            # TYPE coppice_sharing_held_seconds counter\n\
            # UNIT coppice_sharing_held_seconds seconds\n\
            coppice_sharing_held_seconds_total{vm=\"one\"} 0.5\n\
            coppice_sharing_held_seconds_total{vm=\"two\"} 0.5\n\
            # HELP coppice_block_reads Reads that succeeded\n\
            # TYPE coppice_block_reads counter\n\
            coppice_block_reads_total{vm=\"one\",drive=\"x\"} 1\n\
            coppice_block_reads_total{vm=\"two\",drive=\"x\"} 2\n# EOF\n";
        assert_eq!((text.as_str(), left_out), (expected, 0));
    }

    #[test]
    fn a_process_that_lies_speaks_for_itself_alone() {
        let lies = [
            // Another guest's, or the daemon's.
            "coppice_sharing_runs{vm=\"other\"} 1",
            "coppice_block_reads_total{drive=\"x\",vm=\"other\"} 1",
            "coppice_block_reads_total{drive=\"x\"} 1\",vm=\"other\"} 2",
            "coppice_block_reads_total{drive=\"x\\\",vm=\\\"other\"} 1",
            "coppice_vms{state=\"running\"} 99",
            "coppice_vms{vm=\"a\"} 99",
            "coppice_daemon_requests_total{method=\"GET\",code=\"200\"} 9",
            "up 0",
            // Metrics that there are not, or not so.
            "coppice_sharing_runs_total 1",
            "coppice_block_reads 1",
            "coppice_block_reads_total 1",
            "coppice_block_reads_total{} 1",
            "coppice_block_reads_total{drive=\"\"} 1",
            "coppice_block_reads_total{drive=\"a b\"} 1",
            "coppice_block_reads_total{drive=\"\u{202e}\"} 1",
            "coppice_block_reads_total{pmem=\"x\"} 1",
            "coppice_block_reads_total{drive=\"x\",drive=\"y\"} 1",
            "coppice_block_request_duration_seconds_bucket{drive=\"x\",operation=\"read\"} 1",
            "coppice_block_request_duration_seconds_bucket{drive=\"x\",operation=\"read\",le=\"NaN\"} 1",
            "coppice_block_request_duration_seconds_count{drive=\"x\",operation=\"read\"} 1.5",
            // No numbers, or more than one.
            "coppice_sharing_runs NaN",
            "coppice_sharing_runs inf",
            "coppice_sharing_runs -1",
            "coppice_sharing_runs 1e999",
            "coppice_sharing_runs 0x1",
            "coppice_sharing_runs 1 1700000000",
            "coppice_sharing_runs 1 # {trace_id=\"x\"} 1",
            "coppice_sharing_runs  1",
            "coppice_sharing_runs\t1",
            "coppice_sharing_runs 1\x1b[2J",
        ];
        for lie in lies {
            let (text, left_out) = joined(&[("a", lie)]);
            assert_eq!((text.as_str(), left_out), ("own 1\n# EOF\n", 1), "{lie}");
        }
        let long = format!(
            "coppice_block_reads_total{{drive=\"{}\"}} 1",
            "x".repeat(65)
        );
        assert_eq!(joined(&[("a", &long)]).1, 1);
        let (text, left_out) = joined(&[("a", "# EOF\n# TYPE coppice_sharing_runs counter\n")]);
        assert_eq!((text.as_str(), left_out), ("own 1\n# EOF\n", 0));
    }

    #[test]
    fn a_bucket_has_its_bound_behind_its_other_labels() {
        let bucket = |bound: &str| {
            let name = "coppice_block_request_duration_seconds_bucket";
            format!("{name}{{le=\"{bound}\",drive=\"x\",operation=\"read\"}} 3\n")
        };
        let (text, left_out) = joined(&[("a", &(bucket("0.00001") + &bucket("+Inf")))]);
        assert_eq!(left_out, 0, "{text}");
        for bound in ["0.00001", "+Inf"] {
            let line = format!("{{vm=\"a\",drive=\"x\",operation=\"read\",le=\"{bound}\"}} 3\n");
            assert!(text.contains(&line), "{text}");
        }
    }

    #[test]
    fn samples_are_there_once_and_not_too_many_of_a_guest() {
        let mut text = String::new();
        for drive in 0..2 * SERIES {
            writeln!(text, "coppice_block_reads_total{{drive=\"d{drive}\"}} 1").unwrap();
        }
        let (shown, left_out) = joined(&[("a", &text), ("b", "coppice_sharing_runs 1\n")]);
        assert_eq!(left_out, SERIES);
        assert_eq!(shown.matches("vm=\"a\"").count(), SERIES);
        assert!(shown.contains("coppice_sharing_runs{vm=\"b\"} 1\n"));
        let twice = "coppice_sharing_runs 1\ncoppice_sharing_runs 2\n";
        let (shown, left_out) = joined(&[("a", twice)]);
        assert_eq!((shown.matches("vm=\"a\"").count(), left_out), (1, 1));
    }
}
