//! The reference of metrics for readers: `docs/reference/metrics-guest.md` has to be what is made here.

use std::fmt::Write as _;

use expect_test::expect_file;

use super::full;

/// A metric: name, kind, labels and meaning.
fn metrics(text: &str) -> Vec<[String; 4]> {
    let mut metrics = Vec::new();
    for metric in text.split("# HELP ").skip(1) {
        let (about, rest) = metric.split_once('\n').unwrap();
        let (name, help) = about.split_once(' ').unwrap();
        let kind = rest.lines().next().and_then(|line| line.rsplit(' ').next());
        let sample = rest.lines().find_map(|line| line.split(['{', '}']).nth(1));
        let labels = sample.unwrap_or_default().split(',');
        let labels = labels.filter_map(|label| Some(label.split_once('=')?.0));
        let labels: Vec<_> = labels.filter(|label| *label != "le").collect();
        metrics.push([name, kind.unwrap(), &labels.join(","), help].map(str::to_owned));
    }
    metrics
}

/// Names, kinds and meanings, for readers: a line of a table for each metric of `text`.
fn table(text: &str) -> String {
    let mut table = "| metric | kind | labels | |\n|---|---|---|---|\n".to_owned();
    for [name, kind, labels, help] in metrics(text) {
        let suffix = if kind == "counter" { "_total" } else { "" };
        let labels = labels.split(',').filter(|label| !label.is_empty());
        let labels = labels.map(|label| format!("`{label}`"));
        let labels = labels.collect::<Vec<_>>().join(", ");
        writeln!(table, "| `{name}{suffix}` | {kind} | {labels} | {help} |").unwrap();
    }
    table
}

#[test]
fn the_reference_of_metrics_is_current() {
    let head = "# Metrics of a guest\n\nWritten here by `make reference`; do not edit. [Metrics](metrics.md) says how they are asked for.\n\n";
    let page = format!("{head}{}", table(&full().encode().unwrap()));
    expect_file!["../../../../../../docs/reference/metrics-guest.md"].assert_eq(&page);
}

#[test]
fn the_reference_of_families_for_those_who_read_them_is_current() {
    let text = full().encode().unwrap();
    let mut list = String::new();
    for metric in metrics(&text) {
        writeln!(list, "{}", metric.join("\t")).unwrap();
    }
    expect_file!["../families.txt"].assert_eq(&list);
}

#[test]
fn all_that_is_written_is_known_to_those_who_read_it() {
    let families = super::super::families();
    let text = full().encode().unwrap();
    for (name, found) in super::parse(&text) {
        let known = families.iter().find(|family| family.name == name).unwrap();
        assert_eq!(known.kind.name(), found.kind);
        assert_eq!(known.unit(), found.unit.as_deref());
        assert_eq!(known.help, found.help);
    }
}
