//! Metrics for Prometheus: the daemon's counters, and figures of its guests that it knows. The guests' own counters are
//! in `guest_metrics`.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use axum::http::Method;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::networks::NetworkStatus;
use super::record::State;
use super::status::{InterfaceStatus, NetworkCounters, VmStatus};
use host::procfs::Usage;

type Origin = [(&'static str, &'static str); 1];
type Labels = [(&'static str, String); 2];

/// The daemon's counters.
pub struct DaemonMetrics {
    requests: Family<Labels, Counter>,
    latency: Histogram,
    starts: Histogram,
    made: Family<Origin, Histogram, fn() -> Histogram>,
    restarts: Counter,
    refused: Counter,
    samples_left_out: Counter,
}

/// What a guest was made of.
const ORIGINS: [Origin; 2] = [[("origin", "kernel")], [("origin", "template")]];

fn starts() -> Histogram {
    Histogram::new([
        0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0,
    ])
}

impl Default for DaemonMetrics {
    fn default() -> Self {
        let latency = [
            0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0,
        ];
        let made = Family::new_with_constructor(starts as fn() -> Histogram);
        // Both are shown from the beginning: Prometheus computes no rate for a counter that first appears as 1.
        for origin in ORIGINS {
            drop(made.get_or_create(&origin));
        }
        Self {
            requests: Family::default(),
            latency: Histogram::new(latency),
            starts: starts(),
            made,
            restarts: Counter::default(),
            refused: Counter::default(),
            samples_left_out: Counter::default(),
        }
    }
}

impl DaemonMetrics {
    /// A request was answered.
    pub fn answered(&self, method: &Method, code: u16, took: Duration) {
        let known = [
            Method::GET,
            Method::PUT,
            Method::POST,
            Method::PATCH,
            Method::DELETE,
        ];
        // Unknown methods share one label, as a caller could make up any number of them.
        let method = if known.contains(method) {
            method.as_str()
        } else {
            "other"
        };
        let labels = [("method", method.to_owned()), ("code", code.to_string())];
        self.requests.get_or_create(&labels).inc();
        self.latency.observe(took.as_secs_f64());
    }

    /// A guest was started.
    pub fn started(&self, took: Duration) {
        self.starts.observe(took.as_secs_f64());
    }

    /// A guest was made, and runs.
    pub fn made(&self, is_clone: bool, took: Duration) {
        let [kernel, template] = &ORIGINS;
        let origin = if is_clone { template } else { kernel };
        self.made.get_or_create(origin).observe(took.as_secs_f64());
    }

    /// A guest was started again.
    pub fn restarted(&self) {
        self.restarts.inc();
    }

    /// A caller was turned away.
    pub fn turned_away(&self) {
        self.refused.inc();
    }

    /// Lines of guests' processes were not samples as they have to be.
    pub fn samples_left_out(&self, lines: usize) {
        self.samples_left_out.inc_by(lines as u64);
    }

    /// All metrics, as text.
    ///
    /// # Errors
    /// Where the encoder refuses a value.
    pub fn encode(
        &self,
        guests: Vec<VmStatus>,
        networks: NetworkFigures,
        process: Option<Usage>,
    ) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("coppice");
        registry.register(
            "daemon_requests",
            "Requests to the daemon",
            self.requests.clone(),
        );
        registry.register_with_unit(
            "daemon_request_duration",
            "Time from a request to its answer",
            Unit::Seconds,
            self.latency.clone(),
        );
        registry.register_with_unit(
            "vm_start_duration",
            "Time from the start of a guest's process to the guest's first instruction",
            Unit::Seconds,
            self.starts.clone(),
        );
        registry.register_with_unit(
            "vm_create_duration",
            "Time from the request for a guest to one that runs, made of a kernel or of a template",
            Unit::Seconds,
            self.made.clone(),
        );
        registry.register(
            "vm_failure_restarts",
            "Guests that were started again after they had failed, or had ended and are always to run",
            self.restarts.clone(),
        );
        registry.register(
            "daemon_callers_refused",
            "Connections of users who may not call",
            self.refused.clone(),
        );
        registry.register(
            "daemon_samples_left_out",
            "Lines of guests' processes that were asked for counters and gave something else, or too much",
            self.samples_left_out.clone(),
        );
        registry.register_collector(Box::new(OfNetworks {
            figures: networks,
            interfaces: guests.iter().flat_map(interfaces_of).collect(),
        }));
        registry.register_collector(Box::new(Guests { guests, process }));
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// What the daemon knows of its networks at one moment.
#[derive(Debug, Default)]
pub struct NetworkFigures {
    /// All of them.
    pub networks: Vec<NetworkStatus>,
    /// How often their rules were put back.
    pub repairs: u64,
}

/// An interface, with the name of its guest.
fn interfaces_of(vm: &VmStatus) -> impl Iterator<Item = (String, InterfaceStatus)> {
    let own = vm.networks.iter();
    own.map(|interface| (vm.id.clone(), interface.clone()))
}

#[derive(Debug)]
struct OfNetworks {
    figures: NetworkFigures,
    interfaces: Vec<(String, InterfaceStatus)>,
}

/// A figure of a network: its name, its meaning, and its value.
type OfNetwork = (&'static str, &'static str, fn(&NetworkStatus) -> u64);
/// A counter of an interface.
type OfInterface = (
    &'static str,
    Option<Unit>,
    &'static str,
    fn(&NetworkCounters) -> u64,
);

const OF_NETWORK: [OfNetwork; 4] = [
    (
        "network_addresses_used",
        "IPv4 addresses of a network that guests have",
        |network| network.addresses_used,
    ),
    (
        "network_addresses_free",
        "IPv4 addresses of a network that are left for guests",
        |network| network.addresses_free,
    ),
    (
        "network_guests",
        "Interfaces of guests in a network",
        |network| network.guests.len() as u64,
    ),
    (
        "network_unresolved_names",
        "Names in the allow-list of a network that have no address",
        |network| network.unresolved.len() as u64,
    ),
];

const OF_INTERFACE: [OfInterface; 5] = [
    (
        "vm_network_received",
        Some(Unit::Bytes),
        "What a guest has received from its network since its process began",
        |counters| counters.received_bytes,
    ),
    (
        "vm_network_received_packets",
        None,
        "Frames that a guest has received from its network",
        |counters| counters.received_packets,
    ),
    (
        "vm_network_received_dropped",
        None,
        "Frames that were lost as a guest did not take them in time",
        |counters| counters.received_dropped,
    ),
    (
        "vm_network_sent",
        Some(Unit::Bytes),
        "What a guest has sent to its network since its process began",
        |counters| counters.sent_bytes,
    ),
    (
        "vm_network_sent_packets",
        None,
        "Frames that a guest has sent to its network",
        |counters| counters.sent_packets,
    ),
];

impl Collector for OfNetworks {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let networks = &self.figures.networks;
        if networks.is_empty() {
            return Ok(());
        }
        for (name, help, figure) in OF_NETWORK {
            let kind = ConstGauge::new(0u64).metric_type();
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for network in networks {
                let labels = [("network", network.name.as_str())];
                ConstGauge::new(figure(network)).encode(family.encode_family(&labels)?)?;
            }
        }
        let repairs = ConstCounter::new(self.figures.repairs);
        let help =
            "Times that the rules of the networks were put back, as somebody had taken them away";
        let kind = repairs.metric_type();
        repairs.encode(encoder.encode_descriptor("network_rule_repairs", help, None, kind)?)?;
        let counted = self.interfaces.iter();
        let counted = counted.filter_map(|(vm, own)| Some((vm, own, own.counters?)));
        let counted: Vec<_> = counted.collect();
        if counted.is_empty() {
            return Ok(());
        }
        for (name, unit, help, figure) in OF_INTERFACE {
            let kind = ConstCounter::new(0u64).metric_type();
            let mut family = encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
            for (vm, own, counters) in &counted {
                let labels = [("vm", vm.as_str()), ("interface", own.iface_id.as_str())];
                ConstCounter::new(figure(counters)).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// What the daemon knows of its guests at one moment.
#[derive(Debug)]
struct Guests {
    guests: Vec<VmStatus>,
    process: Option<Usage>,
}

impl Guests {
    fn each<M: EncodeMetric>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        (name, unit, help): (&str, Option<&Unit>, &str),
        value: impl Fn(&VmStatus) -> Option<M>,
    ) -> fmt::Result {
        let mut samples = self
            .guests
            .iter()
            .filter_map(|vm| Some((vm, value(vm)?)))
            .peekable();
        let Some((_, first)) = samples.peek() else {
            return Ok(());
        };
        let mut family = encoder.encode_descriptor(name, help, unit, first.metric_type())?;
        for (vm, value) in samples {
            value.encode(family.encode_family(&[("vm", vm.id.as_str())])?)?;
        }
        Ok(())
    }
}

impl Collector for Guests {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let encoder = &mut encoder;
        let mut counts = BTreeMap::from(State::ALL.map(|state| (state, 0u64)));
        for vm in &self.guests {
            *counts.entry(vm.state).or_default() += 1;
        }
        let first = ConstGauge::new(0u64);
        let mut family =
            encoder.encode_descriptor("vms", "Guests by state", None, first.metric_type())?;
        for (state, count) in counts {
            let value = ConstGauge::new(count);
            value.encode(family.encode_family(&[("state", state.name())])?)?;
        }
        let bytes = Some(&Unit::Bytes);
        let gauge = |kib: Option<u64>| kib.map(|kib| ConstGauge::new(kib << 10));
        let about = (
            "vm_memory_private",
            bytes,
            "Memory of a guest's process that is nobody else's",
        );
        self.each(encoder, about, |vm| gauge(vm.memory.map(|m| m.private_kib)))?;
        let about = (
            "vm_memory_shared",
            bytes,
            "Memory of a guest's process that others map as well",
        );
        self.each(encoder, about, |vm| gauge(vm.memory.map(|m| m.shared_kib)))?;
        let about = (
            "vm_memory_proportional",
            bytes,
            "Memory of a guest's process, what is shared divided by those that map it",
        );
        self.each(encoder, about, |vm| {
            gauge(vm.memory.map(|m| m.proportional_kib))
        })?;
        let about = ("vm_ram", bytes, "RAM that a guest was promised");
        self.each(encoder, about, |vm| {
            gauge(Some(u64::from(vm.mem_size_mib) << 10))
        })?;
        let about = (
            "vm_cpu",
            Some(&Unit::Seconds),
            "CPU time of a guest's process",
        );
        self.each(encoder, about, |vm| vm.cpu_s.map(ConstCounter::new))?;
        let about = ("vm_restarts", None, "Times that a guest was started again");
        self.each(encoder, about, |vm| {
            Some(ConstCounter::new(u64::from(vm.restarts)))
        })?;
        if let Some(process) = self.process {
            let value = ConstGauge::new(process.private << 10);
            let help = "Memory of the daemon that is nobody else's";
            let kind = value.metric_type();
            value.encode(encoder.encode_descriptor(
                "daemon_memory_private",
                help,
                bytes,
                kind,
            )?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use std::net::Ipv4Addr;

    use expect_test::expect_file;
    use network::{Addresses, Attachment, Network, mac_of};

    use super::super::record::RestartPolicy;
    use super::super::status::MemorySplit;
    use super::*;

    #[test]
    fn what_the_daemon_has_done_is_counted() {
        let own = DaemonMetrics::default();
        own.answered(&Method::GET, 200, Duration::from_millis(2));
        own.made(true, Duration::from_millis(20));
        own.samples_left_out(3);
        let text = own
            .encode(Vec::new(), NetworkFigures::default(), None)
            .unwrap();
        assert!(
            text.contains("coppice_daemon_requests_total{method=\"GET\",code=\"200\"} 1"),
            "{text}"
        );
        for (origin, count) in [("kernel", 0), ("template", 1)] {
            let made = format!(
                "coppice_vm_create_duration_seconds_count{{origin=\"{origin}\"}} {count}\n"
            );
            assert!(text.contains(&made), "{text}");
        }
        assert!(text.contains("coppice_vms{state=\"running\"} 0"), "{text}");
        assert!(text.contains("coppice_daemon_samples_left_out_total 3"));
        assert_eq!(text.matches("# EOF").count(), 1);
    }

    #[test]
    fn no_metric_of_a_guest_has_the_name_of_one_of_the_daemons() {
        let own = DaemonMetrics::default();
        let text = own
            .encode(vec![guest()], networks(), Some(Usage::default()))
            .unwrap();
        let own: Vec<_> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE "))
            .collect();
        for family in control::metrics::families() {
            let is_own = |line: &&str| line.split(' ').next() == Some(family.name);
            assert!(!own.iter().any(is_own), "{}", family.name);
        }
    }

    /// A guest of which all is known.
    fn guest() -> VmStatus {
        VmStatus {
            id: "web".to_owned(),
            state: State::Running,
            pid: Some(1),
            vcpus: 1,
            mem_size_mib: 128,
            created_ms: 0,
            uid: 0,
            uptime_s: Some(1),
            start_ms: Some(1),
            restart: RestartPolicy::Never,
            restarts: 0,
            labels: BTreeMap::new(),
            end: None,
            memory: Some(MemorySplit {
                private_kib: 1,
                shared_kib: 1,
                proportional_kib: 1,
            }),
            cpu_s: Some(0.5),
            template: None,
            template_job: None,
            vsock: None,
            guest_uid: None,
            unreadable: None,
            networks: vec![interface()],
            config: None,
        }
    }

    fn interface() -> InterfaceStatus {
        let v4 = Ipv4Addr::new(10, 1, 0, 2);
        let addresses = Addresses { v4, v6: None };
        let attachment = Attachment {
            network: "lan".to_owned(),
            outer: addresses,
            inner: addresses,
            mac: mac_of(v4),
            published: Vec::new(),
        };
        InterfaceStatus {
            counters: Some(NetworkCounters::default()),
            ..InterfaceStatus::new("eth0", &attachment)
        }
    }

    fn networks() -> NetworkFigures {
        let lan = Network::new("lan", "10.1.0.0/16".parse().unwrap());
        NetworkFigures {
            networks: vec![NetworkStatus::new(&lan, (1, 2), Vec::new(), Vec::new())],
            repairs: 1,
        }
    }

    /// Names, kinds and meanings, for readers: a line of a table for each metric of `text`.
    fn table(text: &str) -> String {
        let mut table = "| metric | kind | labels | |\n|---|---|---|---|\n".to_owned();
        for metric in text.split("# HELP ").skip(1) {
            let (about, rest) = metric.split_once('\n').unwrap();
            let (name, help) = about.split_once(' ').unwrap();
            let kind = rest.lines().next().and_then(|line| line.rsplit(' ').next());
            let kind = kind.unwrap();
            let suffix = if kind == "counter" { "_total" } else { "" };
            let sample = rest.lines().find_map(|line| line.split(['{', '}']).nth(1));
            let labels = sample.unwrap_or_default().split(',');
            let labels = labels.filter_map(|label| label.split_once('='));
            let labels = labels.filter(|(label, _)| *label != "le");
            let labels = labels.map(|(label, _)| format!("`{label}`"));
            let labels = labels.collect::<Vec<_>>().join(", ");
            writeln!(table, "| `{name}{suffix}` | {kind} | {labels} | {help} |").unwrap();
        }
        table
    }

    #[test]
    fn the_reference_of_the_daemons_metrics_is_current() {
        let own = DaemonMetrics::default();
        own.answered(&Method::GET, 200, Duration::from_millis(2));
        let text = own
            .encode(vec![guest()], networks(), Some(Usage::default()))
            .unwrap();
        let head = "# Metrics of the daemon\n\nWritten here by `make reference`; do not edit. [Metrics](metrics.md) says how they are asked for.\n\n";
        let page = format!("{head}{}", table(&text));
        expect_file!["../../../../docs/reference/metrics-daemon.md"].assert_eq(&page);
    }
}
