//! All counters of a guest at one moment, in whatever state it is.

use super::Control;
use crate::metrics::Scrape;
use host::procfs;
use host::report::chain;

impl Control {
    /// `GET /metrics`: all counters, as far as the guest has come.
    pub fn scrape(&mut self) -> Scrape {
        let warn = |what, error: &dyn std::error::Error| {
            tracing::warn!(error = %chain(error), "{what} is missing from the metrics");
        };
        let process = procfs::memory(std::process::id());
        let (sharing, devices) = match self.guest() {
            Ok((guest, _)) => (Some(guest.sharing()), Some(guest.metrics())),
            Err(_) => (None, None),
        };
        let booted = devices.as_ref().and_then(|devices| devices.booted);
        Scrape {
            boot: self.times.boot(booted),
            restore: self.times.restore,
            api: self.api.clone(),
            process: process
                .inspect_err(|error| warn("the process's memory", error))
                .ok(),
            sharing: sharing
                .and_then(|report| report.inspect_err(|error| warn("sharing", error)).ok()),
            devices,
        }
    }
}
