//! `coppice top`: all guests of a user, and what each of them takes of the host.
//!
//! ```text
//! guest ──> reading ──┬─ column ── screen ── live   a terminal, again and again
//! (/proc)  (+ REST)   └─ column, text_table         once, as text or JSON
//! ```
//!
//! Guests are found by their processes, so that no daemon has to run, and no guest has to be registered. All figures
//! are the host kernel's, except for those that only a guest's VMM knows, which are read from its REST socket where it
//! has one.

mod arguments;
mod column;
mod error;
mod guest;
mod live;
mod options;
mod reading;
mod screen;

use std::io::{self, IsTerminal, Write};

use serde_json::json;

pub use arguments::{HELP, TopArguments};
pub use column::Column;
pub use error::TopError;
pub use options::Options;
pub use reading::{FileRow, GuestRow, Reading};

use column::Table;
use host::printable::printable_lines;
use host::text_table::columns;
use reading::Reader;

/// Shows the guests: on a terminal until the user quits, and otherwise once. Returns the signal that ended it, if one
/// did.
///
/// # Errors
/// [`TopError`]. The terminal is restored then.
pub fn run(options: &Options) -> Result<Option<u8>, TopError> {
    let on_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    if on_terminal && !options.once && !options.json {
        return live::show(options);
    }
    let mut reading = Reader::default().read()?;
    column::sort(&mut reading.guests, options.sort, false);
    let mut out = io::stdout().lock();
    if options.json {
        let mut value = json!({"guests": reading.guests, "totals": reading.totals});
        if options.files {
            value["files"] = serde_json::to_value(&reading.files)?;
        }
        let text = serde_json::to_string_pretty(&value)?;
        writeln!(out, "{}", printable_lines(&text))?;
        return Ok(None);
    }
    let table = if options.files {
        Table::of_files(&reading.files)
    } else {
        Table::of_guests(&reading)
    };
    write!(out, "{}", columns(&table.into_rows()))?;
    Ok(None)
}
