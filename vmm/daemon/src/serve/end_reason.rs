//! Why a guest's process ended.

use std::path::Path;

use super::guest_log::last_line;
use super::process::Exit;
use super::store;
use host::exit::{EndKind, EndReport};
use host::printable::printable;
use host::report::chain;
use jail::CgroupConfig;

/// Longest reason, in characters.
const LONGEST_TEXT: usize = 4096;

/// Why a process ended: by its own report, or else by what can be seen from outside.
/// `killed` is its control group, where the kernel has killed a process of that group for want of memory.
pub fn reason(folder: &Path, exit: Exit, killed: Option<&CgroupConfig>) -> EndReport {
    match store::read(&folder.join("end.json")) {
        Ok(Some(EndReport { kind, text, code })) => {
            // A guest may have taken over the process that wrote it, and it is shown to many: its length has a limit,
            // and nothing in it is a command to a terminal.
            let text: String = text.chars().take(LONGEST_TEXT).collect();
            let text = printable(&text).into_owned();
            return EndReport { kind, text, code };
        }
        Ok(None) => {}
        Err(error) => tracing::warn!(error = %chain(&error), "the reason of an end cannot be read"),
    }
    let (kind, text, code) = match (exit, killed) {
        (Exit::Signal(9) | Exit::Unseen, Some(group)) => (EndKind::Killed, group.shortage(), None),
        (Exit::Code(code), _) => {
            let text = format!("the process ended with code {code}");
            (EndKind::Failed, text, Some(code))
        }
        (Exit::Signal(9), None) => {
            let text = "the process was killed (SIGKILL): by a user, or by the kernel for want of memory, which dmesg would tell";
            (EndKind::Killed, text.to_owned(), None)
        }
        (Exit::Signal(number), _) => {
            let text = format!("the process crashed, or was killed, by signal {number}");
            (EndKind::Killed, text, None)
        }
        (Exit::Unseen, None) => {
            let text = "the process is gone, and has left no reason: it was killed, or the host was restarted";
            (EndKind::Unknown, text.to_owned(), None)
        }
    };
    let text = match last_line(folder) {
        Ok(Some(line)) => format!("{text}; its log ends with: {line:.300}"),
        Ok(None) => text,
        Err(error) => {
            tracing::warn!(error = %chain(&error), "the log of a process that has ended cannot be read");
            text
        }
    };
    EndReport { kind, text, code }
}
