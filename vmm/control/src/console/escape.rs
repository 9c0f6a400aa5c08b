//! The keys that are meant for Coppice and not for the guest.

/// `Ctrl-A`, which begins a command.
const PREFIX: u8 = 0x01;

/// The keys as `Ctrl-A h` and `--help` show them.
pub const HELP: &str = "\
Ctrl-A x       quit: the guest is stopped at once
Ctrl-A h       this help
Ctrl-A Ctrl-A  send Ctrl-A to the guest";

/// What the user wants of Coppice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `Ctrl-A x`.
    Quit,
    /// `Ctrl-A h`.
    Help,
}

/// Tells keys for the guest from commands. Remembers a `Ctrl-A` at the end of its input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Escape {
    /// Keys go to the guest.
    #[default]
    Pass,
    /// The last key was `Ctrl-A`.
    Prefixed,
}

impl Escape {
    /// Takes what was typed, appends what is the guest's to `guest`, and returns the commands in their order. After
    /// a `Quit` the rest is dropped.
    pub fn take(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> Vec<Command> {
        let mut commands = Vec::new();
        for &key in typed {
            *self = match (*self, key) {
                (Self::Pass, PREFIX) => Self::Prefixed,
                (Self::Pass, key) => {
                    guest.push(key);
                    Self::Pass
                }
                (Self::Prefixed, b'x' | b'X') => {
                    commands.push(Command::Quit);
                    *self = Self::Pass;
                    return commands;
                }
                (Self::Prefixed, b'h' | b'H' | b'?') => {
                    commands.push(Command::Help);
                    Self::Pass
                }
                (Self::Prefixed, PREFIX) => {
                    guest.push(PREFIX);
                    Self::Pass
                }
                // No command: the keys were meant for the guest.
                (Self::Prefixed, key) => {
                    guest.extend([PREFIX, key]);
                    Self::Pass
                }
            };
        }
        commands
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn take(typed: &[u8]) -> (Vec<u8>, Vec<Command>) {
        let mut guest = Vec::new();
        let commands = Escape::default().take(typed, &mut guest);
        (guest, commands)
    }

    #[test]
    fn keys_go_to_the_guest_and_commands_do_not() {
        assert_eq!(take(b"ls\r"), (b"ls\r".to_vec(), vec![]));
        assert_eq!(take(b"a\x01hb"), (b"ab".to_vec(), vec![Command::Help]));
        assert_eq!(take(b"\x01\x01h"), (b"\x01h".to_vec(), vec![]));
        assert_eq!(take(b"a\x01xb"), (b"a".to_vec(), vec![Command::Quit]));
        assert_eq!(take(b"\x01z"), (b"\x01z".to_vec(), vec![]));
        assert_eq!(
            take(b"\x03\x1a\xff\0"),
            (b"\x03\x1a\xff\0".to_vec(), vec![])
        );
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_input_is_cut(typed: Vec<u8>, cut: prop::sample::Index) {
            let (first, second) = typed.split_at(cut.index(typed.len() + 1));
            let mut escape = Escape::default();
            let mut guest = Vec::new();
            let mut commands = escape.take(first, &mut guest);
            if !commands.contains(&Command::Quit) {
                commands.extend(escape.take(second, &mut guest));
            }
            prop_assert_eq!((guest, commands), take(&typed));
        }
    }
}
