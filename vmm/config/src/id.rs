//! Names of guests and of templates.

/// Whether `text` can be the name of a guest or of a template: 1 to 63 lower case letters, digits and dashes, because
/// it is used as the name of a folder and in URLs.
pub fn is_guest_id(text: &str) -> bool {
    let word = |c: u8| c == b'-' || c.is_ascii_digit() || c.is_ascii_lowercase();
    (1..=63).contains(&text.len()) && text.bytes().all(word)
}
