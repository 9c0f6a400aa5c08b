//! With whom a guest of the daemon shares pages, where its configuration does not say.
//!
//! Guests that share a page can learn by timing whether others have used it (Flush+Reload: Yarom and Falkner, USENIX
//! Security 2014), and by mincore(2) whether it is in the page cache. So guests of different owners share nothing
//! unless the daemon is told that they may.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use config::VmConfig;

/// The label that names the owner of a guest, where the caller makes guests for others.
const OWNER: &str = "owner";

/// Which guests share pages where their configuration names no domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ShareDomains {
    /// Those of one owner: the user who made them, or, in their label `owner`, the one they were made for.
    #[default]
    Owner,
    /// All guests of the daemon.
    All,
}

/// The name of the domain of an owner. A label can be any text, and the name of a domain cannot.
fn domain_of(uid: u32, labels: &BTreeMap<String, String>) -> String {
    match labels.get(OWNER) {
        None => format!("uid_{uid}"),
        Some(owner) => {
            let digest = Sha256::digest(format!("{uid} {owner}"));
            let number = digest.first_chunk().copied().map_or(0, u128::from_be_bytes);
            format!("owner_{number:032x}")
        }
    }
}

impl ShareDomains {
    /// Gives a configuration that names no domain the one of its owner.
    pub fn assign(self, config: &mut VmConfig, uid: u32, labels: &BTreeMap<String, String>) {
        if self == Self::Owner && config.sharing.domain.is_none() {
            config.sharing.domain = Some(domain_of(uid, labels));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn domain(
        domains: ShareDomains,
        asked: Option<&str>,
        uid: u32,
        owner: Option<&str>,
    ) -> Option<String> {
        let mut config = VmConfig::default();
        config.sharing.domain = asked.map(str::to_owned);
        let labels = owner.map(|owner| (OWNER.to_owned(), owner.to_owned()));
        domains.assign(&mut config, uid, &labels.into_iter().collect());
        config.validate().unwrap();
        config.sharing.domain
    }

    #[test]
    fn owners_share_with_nobody_unless_the_daemon_or_the_configuration_says_so() {
        let own = |uid, owner| domain(ShareDomains::Owner, None, uid, owner).unwrap();
        let all = [
            own(0, None),
            own(1000, None),
            own(0, Some("")),
            own(0, Some("a")),
            own(1000, Some("a")),
            own(0, Some("\u{1b}/../a")),
            own(0, Some("uid_1000")),
        ];
        let different: BTreeSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len());
        assert_eq!(own(0, Some("a")), own(0, Some("a")));
        let asked = domain(ShareDomains::Owner, Some("team"), 1000, Some("a"));
        assert_eq!(asked, Some("team".to_owned()));
        assert_eq!(domain(ShareDomains::All, None, 1000, Some("a")), None);
    }
}
