//! `coppice top`.

use std::time::Duration;

use clap::Args;

use super::column::Column;
use super::options::Options;

/// Text that follows the help.
pub const HELP: &str = "Keys:
  Left, Right   sort by another column
  r             sort the other way round
  f             the files that the guests map, or the guests
  Up, Down      scroll
  q             quit

Memory is in MiB. Private: nobody else's; shared: of files that others map as well; Pss: what is shared divided by those that map it. RAM is
the guest's alone, the others are of the whole process. Saved and merged are told by guests with --api-sock.";

/// The arguments of `coppice top`.
#[derive(Debug, Args)]
pub struct TopArguments {
    /// How long to wait between two looks.
    #[arg(long, short, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    delay: Duration,
    /// The column to sort by.
    #[arg(long, short, value_name = "COLUMN", value_enum, default_value_t)]
    sort: Column,
    /// Print one table and end, as where there is no terminal. CPU is then since the start of each guest.
    #[arg(long)]
    once: bool,
    /// Print JSON and end.
    #[arg(long)]
    json: bool,
    /// Show the files that the guests map, and how many of them do.
    #[arg(long)]
    files: bool,
}

/// Parses a delay from a tenth of a second to an hour.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text
        .parse()
        .ok()
        .filter(|seconds| (0.1..=3600.0).contains(seconds));
    let seconds = seconds.ok_or("not a number of seconds from 0.1 to 3600")?;
    Ok(Duration::from_secs_f64(seconds))
}

impl TopArguments {
    /// The options that the arguments stand for.
    pub fn into_options(self) -> Options {
        Options {
            delay: self.delay,
            sort: self.sort,
            once: self.once,
            json: self.json,
            files: self.files,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_are_seconds_and_not_none() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "-1", "NaN", "inf", "4000", "1s", ""] {
            seconds(text).expect_err(text);
        }
    }
}
