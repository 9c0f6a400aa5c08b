//! Names of guests.

/// Whether `text` can be the name of a guest.
pub fn is_guest_id(text: &str) -> bool {
    let word = |c: u8| c == b'-' || c.is_ascii_digit() || c.is_ascii_lowercase();
    (1..=63).contains(&text.len()) && text.bytes().all(word)
}
