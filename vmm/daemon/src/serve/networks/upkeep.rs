//! What the networks need while the daemon runs: names of allow-lists are looked up again and again, the rules are put
//! back where somebody else has taken them away, and a default route is followed to another interface.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use network::{DomainName, public_addresses};
use tokio::net::lookup_host;
use tokio::time::{sleep, timeout};

use super::state::GuestNetworks;
use crate::serve::task::blocking;
use host::report::chain;

/// Between two looks at the rules and the routes.
const RULES: Duration = Duration::from_secs(10);
/// Between two lookups of a name, about: names are often served with such times to live, and not all daemons of a site
/// are to ask at once.
const NAMES: Duration = Duration::from_secs(30);
const JITTER_MS: u64 = 10_000;
/// How long a lookup may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// For how long an address is kept that a name has no more. A name of many addresses answers with some of them each
/// time, and a guest may use an answer for a while.
const KEPT: Duration = Duration::from_mins(10);

/// The addresses that names had in their last answers, with the time of the last answer that had each.
#[derive(Debug, Default)]
struct Answers(BTreeMap<DomainName, BTreeMap<IpAddr, Instant>>);

impl Answers {
    /// Takes an answer in, which is empty where there was none. Gives the addresses of the name.
    fn take(&mut self, name: &DomainName, answer: Vec<IpAddr>, now: Instant) -> Vec<IpAddr> {
        let known = self.0.entry(name.clone()).or_default();
        if !answer.is_empty() {
            known.retain(|_, seen| now.saturating_duration_since(*seen) < KEPT);
        }
        known.extend(answer.into_iter().map(|address| (address, now)));
        known.keys().copied().collect()
    }
}

/// A time between the lookups that differs from one to the next.
fn pause() -> Duration {
    let mut bytes = [0u8; 8];
    // The kernel's generator does not fail where it is asked for up to 256 bytes (getrandom(2)).
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    NAMES + Duration::from_millis(u64::from_ne_bytes(bytes) % JITTER_MS)
}

impl GuestNetworks {
    fn names(&self) -> Vec<DomainName> {
        let names = |host: &parking_lot::Mutex<network::HostNetworks>| {
            host.lock().names().cloned().collect()
        };
        self.host.as_ref().map(names).unwrap_or_default()
    }

    fn set_name(&self, name: &DomainName, addresses: &[IpAddr]) {
        let set = self
            .host
            .as_ref()
            .map(|host| host.lock().set_name(name, addresses));
        if let Some(Err(error)) = set {
            tracing::error!(%name, error = %chain(&error), "the addresses of a name cannot be allowed");
        }
    }

    /// Puts the rules back where they are not there, and follows the routes to the outside.
    fn repair(&self) {
        let Some(host) = &self.host else { return };
        let mut host = host.lock();
        if let Err(error) = host.follow_default_routes() {
            tracing::error!(error = %chain(&error), "the way out of the networks cannot be followed");
        }
        let repaired = match host.has_rules() {
            Ok(true) => return,
            Ok(false) => host.load_rules(),
            Err(error) => Err(error),
        };
        match repaired {
            Ok(()) => {
                self.repairs.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(
                    "the rules of the networks were taken away by somebody, and are put back"
                );
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "the rules of the networks are not there, and cannot be put back");
            }
        }
    }
}

impl GuestNetworks {
    /// Starts what the networks need while the daemon runs.
    pub fn keep(self: &Arc<Self>) {
        if self.host.is_none() {
            return;
        }
        let networks = self.clone();
        tokio::spawn(async move {
            loop {
                sleep(RULES).await;
                let networks = networks.clone();
                let _ = blocking(move || networks.repair()).await;
            }
        });
        tokio::spawn(self.clone().look_names_up());
    }

    async fn look_names_up(self: Arc<Self>) {
        let names = self.names();
        if names.is_empty() {
            return;
        }
        let mut answers = Answers::default();
        loop {
            let mut unresolved = Vec::new();
            for name in &names {
                let answer = timeout(PATIENCE, lookup_host((name.as_str(), 0))).await;
                let answer = match answer {
                    Ok(Ok(answer)) => public_addresses(answer),
                    Ok(Err(_)) | Err(_) => Vec::new(),
                };
                let addresses = answers.take(name, answer, Instant::now());
                if addresses.is_empty() {
                    unresolved.push(name.to_string());
                }
                let (networks, name) = (self.clone(), name.clone());
                let _ = blocking(move || networks.set_name(&name, &addresses)).await;
            }
            let before = std::mem::replace(&mut *self.unresolved.lock(), unresolved.clone());
            if unresolved != before && !unresolved.is_empty() {
                tracing::warn!(names = ?unresolved, "names of allow= have no address: guests reach nothing by them");
            }
            sleep(pause()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_kept_for_a_while_after_the_last_answer_that_had_it() {
        let (mut answers, begun) = (Answers::default(), Instant::now());
        let name: DomainName = "a.b".parse().unwrap();
        let [one, two] = ["192.0.2.1", "192.0.2.2"].map(|text| text.parse::<IpAddr>().unwrap());
        assert!(answers.take(&name, Vec::new(), begun).is_empty());
        assert_eq!(answers.take(&name, vec![one], begun), [one]);
        assert_eq!(answers.take(&name, vec![two], begun + KEPT / 2), [one, two]);
        // Without an answer, nothing is known to have changed.
        let later = begun + KEPT * 3;
        assert_eq!(answers.take(&name, Vec::new(), later), [one, two]);
        assert_eq!(answers.take(&name, vec![two], later), [two]);
    }

    #[test]
    fn lookups_are_not_all_at_the_same_time() {
        let pauses: std::collections::BTreeSet<_> = (0..20).map(|_| pause()).collect();
        assert!(pauses.len() > 1);
        let most = NAMES + Duration::from_millis(JITTER_MS);
        assert!(pauses.iter().all(|pause| (NAMES..most).contains(pause)));
    }
}
