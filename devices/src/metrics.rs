//! What a device has done, in numbers that whoever prints them need not know the device for.
//!
//! A [`Metric`] has the names under which it is printed: that of a family of Prometheus (without the prefix of the program; base units, the unit behind
//! the name) and the field in the device's object of a line of the metrics file, where it has one. The device's own label comes from its
//! [`MetricsGroup`](crate::lifecycle::MetricsGroup).

use std::sync::atomic::{AtomicU64, Ordering};

use crate::latency::{Latencies, LatencyReading};

/// In what a value is counted, where it is no number of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Pages of 4 KiB.
    Pages,
    /// Seconds.
    Seconds,
}

/// A value at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// It only grows.
    Counter(u64),
    /// It goes up and down.
    Gauge(u64),
    /// How long requests took.
    Latencies(Box<LatencyReading>),
}

/// A value and how it is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metric {
    /// The family.
    pub name: &'static str,
    /// The unit, which is printed behind the name.
    pub unit: Option<Unit>,
    /// What it is, in words. The same for each of a family.
    pub help: &'static str,
    /// What tells it from the others of its family, beside the device.
    pub label: Option<(&'static str, &'static str)>,
    /// The value.
    pub value: Value,
    /// Its field in the metrics file; `None` where that has none.
    pub field: Option<&'static str>,
}

impl Metric {
    fn new(name: &'static str, help: &'static str, value: Value) -> Self {
        Self {
            name,
            unit: None,
            help,
            label: None,
            value,
            field: None,
        }
    }

    /// What only grows.
    pub fn counter(name: &'static str, help: &'static str, counter: &AtomicU64) -> Self {
        Self::new(name, help, Value::Counter(get(counter)))
    }

    /// What goes up and down.
    pub fn gauge(name: &'static str, help: &'static str, value: u64) -> Self {
        Self::new(name, help, Value::Gauge(value))
    }

    /// How long requests took.
    pub fn latencies(name: &'static str, help: &'static str, latencies: &Latencies) -> Self {
        let reading = Value::Latencies(Box::new(latencies.read()));
        Self::new(name, help, reading).unit(Unit::Seconds)
    }

    /// In a unit.
    #[must_use]
    pub fn unit(self, unit: Unit) -> Self {
        let unit = Some(unit);
        Self { unit, ..self }
    }

    /// With a label beside the device's.
    #[must_use]
    pub fn label(self, name: &'static str, value: &'static str) -> Self {
        let label = Some((name, value));
        Self { label, ..self }
    }

    /// With a field in the metrics file.
    #[must_use]
    pub fn field(self, name: &'static str) -> Self {
        let field = Some(name);
        Self { field, ..self }
    }
}

/// Adds to a counter. Counters are independent of each other: nothing is ordered by them.
pub(crate) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
