//! The sharing domain of a guest: it shares pages with the guests of its own domain alone.
//!
//! The files that are made of kernels and initrds lie in a folder of the cache for each domain, so that domains have
//! different ones. A disk is one file for all domains, and belongs to the one that opens it first, see
//! [`storage::Domain`]: guests of any other domain read it as if they did not share.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use config::SharingConfig;

/// The domain of a guest.
pub(crate) struct SharingDomain {
    name: String,
    domain: storage::Domain,
    /// Files that belong to other domains.
    foreign: Mutex<Vec<Weak<File>>>,
}

impl SharingDomain {
    /// The domain that is configured. Guests without one are in a domain together.
    pub(crate) fn of(config: &SharingConfig) -> Self {
        let name = config.domain.clone().unwrap_or_default();
        let digest = Sha256::digest(&name);
        let digest = u64::from_be_bytes(*digest.first_chunk().unwrap_or(&[0; 8]));
        Self {
            name,
            domain: storage::Domain::new(digest),
            foreign: Mutex::default(),
        }
    }

    /// Whether the guest may share a file, which is open and locked for reading. Once it may, guests of other domains
    /// may not. A file that is refused stays refused until it is opened again.
    pub(crate) fn admits(&self, file: &Arc<File>) -> bool {
        let mut foreign = self.foreign.lock();
        // A weak reference keeps the address from being used again.
        if foreign
            .iter()
            .any(|known| known.as_ptr() == Arc::as_ptr(file))
        {
            return false;
        }
        let why = match self.domain.join(file) {
            Ok(true) => return true,
            Ok(false) => "guests of another sharing domain have it".to_owned(),
            Err(error) => format!("it {}", host::report::chain(&error)),
        };
        let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        tracing::warn!(
            file = %path.unwrap_or_default().display(),
            domain = %self.name,
            why,
            "the guest has a copy of its own of what it reads of a file"
        );
        foreign.retain(|known| known.strong_count() > 0);
        foreign.push(Arc::downgrade(file));
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(name: Option<&str>) -> SharingDomain {
        SharingDomain::of(&SharingConfig {
            domain: name.map(str::to_owned),
            ..SharingConfig::default()
        })
    }

    #[test]
    fn a_disk_goes_to_the_domain_that_has_it_first_and_having_no_name_is_one() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let open = || Arc::new(File::open(named.path()).unwrap());
        let (first, second) = (domain(None), domain(None));
        let (tenant, other) = (domain(Some("a")), domain(Some("b")));
        let files = [open(), open(), open(), open()];
        assert!(first.admits(&files[0]) && second.admits(&files[1]));
        for _ in 0..2 {
            assert!(!tenant.admits(&files[2]) && !other.admits(&files[3]));
        }
        let refused = files.into_iter().nth(2).unwrap();
        assert!(!tenant.admits(&refused), "until it is opened again");
        let again = open();
        assert!(tenant.admits(&again) && domain(Some("a")).admits(&open()));
        assert!(!first.admits(&open()) && !other.admits(&open()));
    }
}
