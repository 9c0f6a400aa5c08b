//! Progress on a terminal, and the signals that end the work.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicU8, Ordering};

use indicatif::{ProgressBar, ProgressStyle};
use storage::Progress;

use host::signals::Signals;

/// Watches one operation.
pub(super) struct Watch {
    bar: Option<ProgressBar>,
    signals: Signals,
    /// The first signal that was received, or 0.
    signal: AtomicU8,
}

impl Watch {
    /// Blocks the signals that end a process. Shows a bar if `bar` is set and standard error is a terminal.
    pub(super) fn new(bar: bool) -> io::Result<Self> {
        let signals = Signals::block()?;
        let bar = (bar && io::stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template(
                "{percent:>3}% [{bar:40}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
            )
            .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0).with_style(style.progress_chars("=> "))
        });
        Ok(Self {
            bar,
            signals,
            signal: AtomicU8::new(0),
        })
    }

    /// The signal that ended the work, or `SIGINT` where it is not known.
    pub(super) fn signal(&self) -> u8 {
        match self.signal.load(Ordering::Relaxed) {
            0 => 2,
            signal => signal,
        }
    }

    /// Removes the bar.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Watch {
    fn advance(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        }
    }

    fn is_cancelled(&self) -> bool {
        if self.signal.load(Ordering::Relaxed) == 0
            && let Some(signal) = self.signals.next()
        {
            self.signal.store(signal, Ordering::Relaxed);
        }
        self.signal.load(Ordering::Relaxed) != 0
    }
}
