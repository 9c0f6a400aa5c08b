//! Text that others have written, such as guests, their processes and users, as a terminal may be given it.
//!
//! A terminal takes control characters for commands: they move the cursor, change what is shown already, set the title,
//! and have some terminals type. Controls of direction (Unicode Standard Annex #9, 2.) show a text in another order
//! than it is in. Both are shown as `\u` and four hexadecimal digits, as JSON writes them, so JSON stays JSON.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Whether a terminal, or whoever shows text, does more with a character than show it: controls (C0, DEL, C1),
/// separators of lines and paragraphs, and controls of direction.
fn is_command(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn shown(text: &str, is_kept: impl Fn(char) -> bool) -> Cow<'_, str> {
    let is_shown_otherwise = |c: char| is_command(c) && !is_kept(c);
    if !text.contains(is_shown_otherwise) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_shown_otherwise(c) {
            // Writing to a string does not fail.
            let _ = write!(shown, "\\u{:04x}", u32::from(c));
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// A text of one line.
pub fn printable(text: &str) -> Cow<'_, str> {
    shown(text, |_| false)
}

/// A text of several lines, which may have tabs.
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    shown(text, |c| matches!(c, '\n' | '\t'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown() {
        for (text, expected) in [
            ("plain, größer, 日本", "plain, größer, 日本"),
            ("\x1b]0;title\x07", "\\u001b]0;title\\u0007"),
            ("\u{9b}2J\x7f\x08", "\\u009b2J\\u007f\\u0008"),
            ("a\u{202e}b\u{2066}c\u{2029}", "a\\u202eb\\u2066c\\u2029"),
        ] {
            assert_eq!(printable(text), expected);
            assert_eq!(printable_lines(text), expected);
        }
        assert_eq!(printable("a\n\tb\r"), "a\\u000a\\u0009b\\u000d");
        assert_eq!(printable_lines("a\n\tb\r"), "a\n\tb\\u000d");
    }

    #[test]
    fn json_means_the_same_afterwards() {
        let value = serde_json::json!({"a\u{9b}": "\x1b[2J \u{202e} \\ \n"});
        let text = serde_json::to_string_pretty(&value).unwrap();
        let shown = printable_lines(&text);
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&shown).unwrap(),
            value
        );
        assert!(!shown.contains(|c| is_command(c) && c != '\n'));
    }
}
