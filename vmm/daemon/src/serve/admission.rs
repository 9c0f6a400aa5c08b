//! Admission: whether the host has room for one more guest.
//!
//! The rule: every guest counts the memory that it holds now, each shared page divided by the number of its sharers,
//! and 1/R of the RAM that it has not touched yet. A new guest has touched nothing. The sum has to be at most the
//! host's memory. With R = 1 every guest is promised all its RAM; with more, the host bets that guests do not all touch
//! the rest of theirs at the same time.
//!
//! A guest that shares holds little, and much of its RAM is touched already (what it shares counts as touched), so that
//! there is room for more of them: that is how sharing counts.

use std::io;

use super::status::MemorySplit;

/// Most memory that a process takes beside its guest's RAM.
const OVERHEAD_KIB: u64 = 1024;

/// The rule as `--help` shows it.
pub const HELP: &str = "\
Admission: a guest is refused (507) where the sum over all guests with a process would be more than the host's memory. Each counts what it
holds now (shared pages are divided by those that share them), and of the RAM that it has not touched yet the part 1/R, with R of
--memory-ratio. R = 1 promises every guest all its RAM.";

/// Limits that the daemon keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// R of the rule.
    pub ratio: f64,
    /// Guests.
    pub vms: Option<usize>,
    /// Guests of one user.
    pub vms_per_user: Option<usize>,
    /// vCPUs of all guests that have a process.
    pub vcpus: Option<u64>,
    /// RAM of all guests that have a process, in MiB.
    pub memory_mib: Option<u64>,
    /// Memory of the host, in KiB.
    pub host_kib: u64,
}

/// What a guest counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// The user who made it.
    pub uid: u32,
    /// Whether it has a process, or is getting one.
    pub live: bool,
    /// RAM.
    pub ram_mib: u32,
    /// vCPUs.
    pub vcpus: u8,
    /// Memory that its process holds, where that was measured.
    pub memory: Option<MemorySplit>,
}

/// Why a guest is not admitted.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// Too little memory.
    #[error(
        "the host's memory would be overcommitted: {guests} guests count {held_mib} MiB that they hold and {promised_mib} MiB \
         of the RAM that they may still touch (1/{ratio} of it); one more of {ram_mib} MiB counts {wanted_mib} MiB; \
         the host has {host_mib} MiB. Stop a guest, take less RAM, share more, or raise --memory-ratio"
    )]
    Memory {
        /// Guests with a process.
        guests: usize,
        /// Memory that they hold.
        held_mib: u64,
        /// The counted part of the RAM that they have not touched.
        promised_mib: u64,
        /// R.
        ratio: f64,
        /// RAM of the new one.
        ram_mib: u32,
        /// What the new one counts.
        wanted_mib: u64,
        /// Memory of the host.
        host_mib: u64,
    },
    /// A quota would be exceeded.
    #[error("{flag} is {limit}, and there would be {wanted}")]
    Quota {
        /// The option that sets it.
        flag: &'static str,
        /// The quota.
        limit: u64,
        /// What there would be with the new guest.
        wanted: u64,
    },
}

#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "memory of a host is far below 2^53 KiB, and no figure is negative"
)]
fn part(kib: u64, ratio: f64) -> u64 {
    (kib as f64 / ratio) as u64
}

/// The memory that a guest holds, and the part of the rest of its RAM that counts, in KiB.
fn counted(load: &Load, ratio: f64) -> (u64, u64) {
    let ram = u64::from(load.ram_mib) << 10;
    let memory = load.memory.unwrap_or(MemorySplit {
        private_kib: OVERHEAD_KIB,
        shared_kib: 0,
        proportional_kib: OVERHEAD_KIB,
    });
    let touched = (memory.private_kib + memory.shared_kib).saturating_sub(OVERHEAD_KIB);
    (
        memory.proportional_kib,
        part(ram.saturating_sub(touched), ratio),
    )
}

/// Memory of the host in KiB.
///
/// # Errors
/// The host's error.
pub fn host_memory_kib() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let number = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
    number.ok_or_else(|| io::Error::other("/proc/meminfo does not tell MemTotal"))
}

impl Limits {
    /// Checks that there is room for `new` beside `others`.
    ///
    /// # Errors
    /// `Memory`, `Quota`.
    pub fn admit(&self, others: &[Load], new: &Load) -> Result<(), Refusal> {
        let quota = |flag, limit: Option<u64>, wanted: u64| match limit {
            Some(limit) if wanted > limit => Err(Refusal::Quota {
                flag,
                limit,
                wanted,
            }),
            Some(_) | None => Ok(()),
        };
        let wide = |number: usize| number as u64;
        quota("--max-vms", self.vms.map(wide), wide(others.len()) + 1)?;
        let theirs = others.iter().filter(|load| load.uid == new.uid).count();
        let limit = self.vms_per_user.map(wide);
        quota("--max-vms-per-user", limit, wide(theirs) + 1)?;
        let live = || others.iter().filter(|load| load.live);
        let vcpus = live().map(|load| u64::from(load.vcpus)).sum::<u64>();
        quota("--max-vcpus", self.vcpus, vcpus + u64::from(new.vcpus))?;
        let ram = live().map(|load| u64::from(load.ram_mib)).sum::<u64>();
        quota(
            "--max-memory (in MiB)",
            self.memory_mib,
            ram + u64::from(new.ram_mib),
        )?;
        let (mut held, mut promised) = (0, 0);
        for load in live() {
            let counted = counted(load, self.ratio);
            held += counted.0;
            promised += counted.1;
        }
        let wanted = counted(new, self.ratio);
        let wanted = wanted.0 + wanted.1;
        if held + promised + wanted > self.host_kib {
            return Err(Refusal::Memory {
                guests: live().count(),
                held_mib: held >> 10,
                promised_mib: promised >> 10,
                ratio: self.ratio,
                ram_mib: new.ram_mib,
                wanted_mib: wanted >> 10,
                host_mib: self.host_kib >> 10,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        ratio: 2.0,
        vms: None,
        vms_per_user: None,
        vcpus: None,
        memory_mib: None,
        host_kib: 1 << 20,
    };

    fn guest(memory: Option<(u64, u64, u64)>) -> Load {
        Load {
            uid: 1,
            live: true,
            ram_mib: 128,
            vcpus: 2,
            memory: memory.map(|(private, shared, proportional)| MemorySplit {
                private_kib: private << 10,
                shared_kib: shared << 10,
                proportional_kib: proportional << 10,
            }),
        }
    }

    /// How many guests of a kind a host of 1 GiB takes.
    fn most(kind: Load) -> usize {
        let mut guests = Vec::new();
        while LIMITS.admit(&guests, &guest(None)).is_ok() {
            guests.push(kind);
        }
        guests.len()
    }

    #[test]
    fn sharing_makes_room() {
        // 64 MiB of the RAM, and 1 MiB of the process.
        assert_eq!(most(guest(None)), 15);
        // All of it touched, nothing shared.
        assert_eq!(most(guest(Some((129, 0, 129)))), 8);
        // All of it touched, nearly all shared by many.
        assert_eq!(most(guest(Some((20, 109, 25)))), 39);
    }

    #[test]
    fn guests_without_a_process_take_no_memory() {
        let stopped = Load {
            live: false,
            ..guest(None)
        };
        assert_eq!(LIMITS.admit(&[stopped; 100], &guest(None)), Ok(()));
    }

    #[test]
    fn quotas_are_kept_and_named() {
        let refused = |limits: Limits, others: &[Load]| {
            limits.admit(others, &guest(None)).unwrap_err().to_string()
        };
        let one = [guest(None)];
        for (limits, flag) in [
            (
                Limits {
                    vms: Some(1),
                    ..LIMITS
                },
                "--max-vms is 1",
            ),
            (
                Limits {
                    vms_per_user: Some(1),
                    ..LIMITS
                },
                "--max-vms-per-user",
            ),
            (
                Limits {
                    vcpus: Some(3),
                    ..LIMITS
                },
                "--max-vcpus is 3, and there would be 4",
            ),
            (
                Limits {
                    memory_mib: Some(255),
                    ..LIMITS
                },
                "--max-memory",
            ),
        ] {
            let text = refused(limits, &one);
            assert!(text.contains(flag), "{text}");
            assert_eq!(limits.admit(&[], &guest(None)), Ok(()));
        }
        let text = refused(LIMITS, &[guest(Some((1020, 0, 1020)))]);
        assert!(
            text.contains("1020 MiB") && text.contains("counts 65 MiB"),
            "{text}"
        );
    }
}
