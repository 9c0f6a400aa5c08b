//! The same counters for Prometheus, as `OpenMetrics` text.
//!
//! Names follow Prometheus: base units, the unit behind the name, `_total` behind what only grows. A label is what can
//! be summed over.

mod families;
mod known;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use memshare::PAGE_SIZE;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::{ApiMetrics, get};
use host::procfs::Usage;
use machine::{MachineMetrics, SharingReport};

pub use known::{Family, FamilyKind, families};

/// What the text is, as HTTP says it.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All that is known at one moment. What is absent is left out of the text.
#[derive(Debug)]
pub struct Scrape {
    /// Requests to the REST socket.
    pub api: Arc<ApiMetrics>,
    /// Memory of the process.
    pub process: Option<Usage>,
    /// What of guest RAM is shared; only of a started guest.
    pub sharing: Option<SharingReport>,
    /// Counters of devices; only of a started guest.
    pub devices: Option<MachineMetrics>,
    /// How long it took to boot, where the guest has reported that it has booted.
    pub boot: Option<Duration>,
    /// How long it took to go on from a snapshot, where it did.
    pub restore: Option<Duration>,
}

impl Scrape {
    /// The text.
    ///
    /// # Errors
    /// Where the encoder refuses a value.
    pub fn encode(self) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("coppice");
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// One value of a metric that has several, and its label.
type Sample<'a, V> = ((&'static str, &'a str), V);

/// Name, unit and explanation of a metric.
type About<'a> = (&'a str, Option<&'a Unit>, &'a str);

/// Writes one metric after the other.
struct Writer<'a>(DescriptorEncoder<'a>);

fn pages() -> Unit {
    Unit::Other("pages".to_owned())
}

/// As a base unit.
#[allow(clippy::cast_precision_loss, reason = "to a second in 285 years")]
fn seconds(microseconds: u64) -> f64 {
    microseconds as f64 / 1e6
}

impl Writer<'_> {
    fn one(&mut self, (name, unit, help): About<'_>, value: &impl EncodeMetric) -> fmt::Result {
        let kind = value.metric_type();
        value.encode(self.0.encode_descriptor(name, help, unit, kind)?)
    }

    fn several<'s, M: EncodeMetric>(
        &mut self,
        (name, unit, help): About<'_>,
        kind: MetricType,
        samples: impl IntoIterator<Item = Sample<'s, M>>,
    ) -> fmt::Result {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return Ok(());
        }
        let mut encoder = self.0.encode_descriptor(name, help, unit, kind)?;
        for (label, value) in samples {
            value.encode(encoder.encode_family(&[label])?)?;
        }
        Ok(())
    }

    /// What only grows.
    fn counter(&mut self, name: &str, unit: Option<&Unit>, help: &str, value: u64) -> fmt::Result {
        self.one((name, unit, help), &ConstCounter::new(value))
    }

    fn counters<'s>(
        &mut self,
        name: &str,
        unit: Option<&Unit>,
        help: &str,
        samples: impl IntoIterator<Item = Sample<'s, u64>>,
    ) -> fmt::Result {
        let samples = samples.into_iter();
        let samples = samples.map(|(label, value)| (label, ConstCounter::new(value)));
        self.several((name, unit, help), MetricType::Counter, samples)
    }

    fn seconds(&mut self, name: &str, help: &str, microseconds: u64) -> fmt::Result {
        let value = ConstCounter::new(seconds(microseconds));
        self.one((name, Some(&Unit::Seconds), help), &value)
    }

    /// What goes up and down.
    fn gauge(&mut self, name: &str, unit: Option<&Unit>, help: &str, value: u64) -> fmt::Result {
        self.one((name, unit, help), &ConstGauge::new(value))
    }

    fn gauges<'s>(
        &mut self,
        name: &str,
        unit: Option<&Unit>,
        help: &str,
        samples: impl IntoIterator<Item = Sample<'s, u64>>,
    ) -> fmt::Result {
        let samples = samples.into_iter();
        let samples = samples.map(|(label, value)| (label, ConstGauge::new(value)));
        self.several((name, unit, help), MetricType::Gauge, samples)
    }

    fn api(&mut self, api: &ApiMetrics) -> fmt::Result {
        let method = |method, counter| (("method", method), get(counter));
        self.counters(
            "api_requests",
            None,
            "Requests to the REST socket",
            [
                method("GET", &api.get),
                method("PUT", &api.put),
                method("PATCH", &api.patch),
            ],
        )?;
        self.counter(
            "api_failures",
            None,
            "Requests that were refused or failed",
            get(&api.failures),
        )
    }

    fn process(&mut self, usage: &Usage) -> fmt::Result {
        let values = [
            (
                "process_private",
                usage.private,
                "Memory of the process that is nobody else's",
            ),
            (
                "process_shared",
                usage.shared,
                "Memory of the process that others map as well",
            ),
            (
                "process_proportional",
                usage.proportional,
                "Memory of the process, what is shared divided by those that map it",
            ),
        ];
        for (name, kib, help) in values {
            self.gauge(name, Some(&Unit::Bytes), help, kib << 10)?;
        }
        Ok(())
    }

    fn sharing(&mut self, report: &SharingReport) -> fmt::Result {
        let state = |state, pages| (("state", state), pages * PAGE_SIZE);
        self.gauges(
            "guest_memory",
            Some(&Unit::Bytes),
            "RAM of the guest: its own, pages of files, or nothing that the host holds",
            [
                state("private", report.private_pages),
                state("shared", report.shared_pages),
                state("absent", report.absent_pages),
            ],
        )?;
        self.gauge(
            "sharing_saved",
            Some(&Unit::Bytes),
            "What the guest would hold more without the shared pages",
            report.saved_bytes,
        )?;
        self.gauge(
            "sharing_candidate",
            Some(&pages()),
            "Pages that may be copies of a file's, and are to be compared",
            report.candidate_pages,
        )?;
        self.gauge(
            "sharing_runs",
            None,
            "Runs of pages that are mapped from files",
            report.runs as u64,
        )?;
        let counters = [
            ("mapped", report.mapped_pages, "Pages mapped at boot"),
            (
                "merged",
                report.merged_pages,
                "Pages that were compared and exchanged",
            ),
            (
                "placed",
                report.placed_pages,
                "Pages that a read put in place without a copy",
            ),
            (
                "zero",
                report.zero_pages,
                "Pages of zeros that were read, and that take no memory",
            ),
            (
                "copied",
                report.copied_pages,
                "Pages that were a file's until the guest wrote to them",
            ),
            (
                "noted",
                report.noted_pages,
                "Pages that were read as copies",
            ),
        ];
        for (name, value, help) in counters {
            self.counter(&format!("sharing_{name}"), Some(&pages()), help, value)?;
        }
        let refused = report.refused_pages.iter();
        self.counters(
            "sharing_refused",
            Some(&pages()),
            "Pages that were not shared",
            refused.map(|(why, pages)| (("reason", *why), *pages)),
        )?;
        self.counter(
            "sharing_given_back",
            Some(&Unit::Bytes),
            "Memory that the guest gave back",
            report.given_back_bytes,
        )?;
        self.counter(
            "sharing_holds",
            None,
            "Times that the guest was held for an exchange",
            report.holds,
        )?;
        self.seconds(
            "sharing_held",
            "How long the guest was held",
            report.held_microseconds,
        )?;
        let longest = ConstGauge::new(seconds(report.longest_hold_microseconds));
        self.one(
            (
                "sharing_longest_hold",
                Some(&Unit::Seconds),
                "How long the guest was held at once, at most",
            ),
            &longest,
        )?;
        self.seconds(
            "sharing_merger_cpu",
            "CPU time of the thread that merges pages",
            report.merger_cpu_microseconds,
        )
    }

    fn times(&mut self, boot: Option<Duration>, restore: Option<Duration>) -> fmt::Result {
        let times = [
            (
                "boot_time",
                "From the start of the process, or from InstanceStart where the guest waited for that, to the guest's word that it has booted",
                boot,
            ),
            (
                "restore_time",
                "From the start of the process, or from the request, to a guest that can go on from its snapshot",
                restore,
            ),
        ];
        for (name, help, took) in times {
            if let Some(took) = took {
                let value = ConstGauge::new(took.as_secs_f64());
                self.one((name, Some(&Unit::Seconds), help), &value)?;
            }
        }
        Ok(())
    }

    fn exits(&mut self, devices: &MachineMetrics) -> fmt::Result {
        let exits = devices.exits.iter();
        self.counters(
            "vcpu_exits",
            None,
            "Times that a vCPU left the guest for this program; what the kernel serves by itself is not among it",
            exits.map(|(kind, count)| (("kind", kind.name()), *count)),
        )
    }

    fn devices(&mut self, devices: &MachineMetrics) -> fmt::Result {
        self.exits(devices)?;
        self.of_devices(&devices.devices)
    }
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut writer = Writer(encoder);
        writer.api(&self.api)?;
        if let Some(process) = &self.process {
            writer.process(process)?;
        }
        if let Some(sharing) = &self.sharing {
            writer.sharing(sharing)?;
        }
        writer.times(self.boot, self.restore)?;
        match &self.devices {
            Some(devices) => writer.devices(devices),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
