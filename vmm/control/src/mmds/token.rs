//! Session tokens of version 2: proofs that the holder asked for one, with the time at which they end.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use parking_lot::Mutex;
use rustix::rand::{GetRandomFlags, getrandom};
use rustix::time::{ClockId, clock_gettime};
use sha2::Sha256;

/// Seconds that a token may last (Firecracker's and IMDS's limits).
pub(super) const LIFETIME: std::ops::RangeInclusive<u64> = 1..=21_600;
/// Bytes of the time at which a token ends, and of its proof.
const TIME: usize = 8;
const PROOF: usize = 32;
/// Digits of a token.
const DIGITS: usize = ((TIME + PROOF) * 4).div_ceil(3);

/// Whoever made the tokens of a process. Nothing is kept of them, so a guest can ask for as many as it likes; and those
/// of another process, as of a guest that was saved, are none here.
#[derive(Debug, Default)]
pub struct Tokens {
    key: Mutex<Option<[u8; 32]>>,
}

/// The time since the host started, which goes on while it sleeps.
fn now() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

impl Tokens {
    /// The proof of a token that ends at `end`; `None` where the host has no random numbers.
    fn mac(&self, end: [u8; TIME]) -> Option<Hmac<Sha256>> {
        let mut key = self.key.lock();
        let key = match &mut *key {
            Some(key) => key,
            none => {
                let mut bytes = [0; 32];
                let got = getrandom(&mut bytes, GetRandomFlags::empty()).ok()?;
                none.insert(Some(bytes).filter(|_| got == bytes.len())?)
            }
        };
        let mut mac = Hmac::<Sha256>::new_from_slice(&key[..]).ok()?;
        mac.update(&end);
        Some(mac)
    }

    /// A token that lasts so many seconds, of [`LIFETIME`].
    pub(super) fn issue(&self, seconds: u64) -> Option<String> {
        self.issue_at(now(), seconds)
    }

    fn issue_at(&self, now: Duration, seconds: u64) -> Option<String> {
        let end = (now.as_secs() + seconds).to_be_bytes();
        let proof = self.mac(end)?.finalize().into_bytes();
        Some(URL_SAFE_NO_PAD.encode([&end[..], &proof].concat()))
    }

    /// Whether a text is a token of this process that has not ended.
    pub(super) fn is_valid(&self, text: &[u8]) -> bool {
        self.is_valid_at(now(), text)
    }

    fn is_valid_at(&self, now: Duration, text: &[u8]) -> bool {
        if text.len() != DIGITS {
            return false;
        }
        let Ok(bytes) = URL_SAFE_NO_PAD.decode(text) else {
            return false;
        };
        let Some((end, proof)) = bytes.split_first_chunk::<TIME>() else {
            return false;
        };
        let mac = self.mac(*end);
        mac.is_some_and(|mac| mac.verify_slice(proof).is_ok())
            && now.as_secs() < u64::from_be_bytes(*end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_until_it_ends_and_for_the_process_that_gave_it() {
        let (tokens, others) = (Tokens::default(), Tokens::default());
        let now = Duration::from_secs(1000);
        let token = tokens.issue_at(now, 60).unwrap();
        let at = |seconds| Duration::from_secs(seconds);
        assert!(tokens.is_valid_at(now, token.as_bytes()));
        assert!(tokens.is_valid_at(at(1059), token.as_bytes()));
        assert!(!tokens.is_valid_at(at(1060), token.as_bytes()));
        assert!(!others.is_valid_at(now, token.as_bytes()));
        assert_ne!(tokens.issue_at(now, 61).unwrap(), token);
    }

    #[test]
    fn a_token_that_is_changed_anywhere_is_none() {
        let tokens = Tokens::default();
        let token = tokens.issue(60).unwrap().into_bytes();
        assert!(tokens.is_valid(&token));
        for at in 0..token.len() - 1 {
            let mut changed = token.clone();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            assert!(!tokens.is_valid(&changed), "{at}");
            assert!(!tokens.is_valid(&token[..at]), "{at}");
        }
        for wrong in [&b""[..], b"x", &[0xff; DIGITS], &[b'A'; DIGITS + 1]] {
            assert!(!tokens.is_valid(wrong));
        }
    }
}
