//! A run of free page hinting (VIRTIO 1.2, 5.5.6.5).
//!
//! ```text
//! host:   Run(n) ──────────────────────────────────────> Done
//! driver:        Run(n), blocks it has taken, ..., Stop        it frees its blocks
//! ```

/// What the host asks for in `free_page_hint_cmd_id`, and what the driver sends before and after its blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Command {
    /// `VIRTIO_BALLOON_CMD_ID_STOP`: no more hints; the driver keeps its blocks.
    #[default]
    Stop,
    /// `VIRTIO_BALLOON_CMD_ID_DONE`: the driver frees its blocks.
    Done,
    /// A run, by its number, which is at least 2.
    Run(u32),
}

impl From<u32> for Command {
    fn from(id: u32) -> Self {
        match id {
            0 => Self::Stop,
            1 => Self::Done,
            run => Self::Run(run),
        }
    }
}

impl From<Command> for u32 {
    fn from(command: Command) -> Self {
        match command {
            Command::Stop => 0,
            Command::Done => 1,
            Command::Run(run) => run,
        }
    }
}

/// Where a run is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Hinting {
    /// The last run's number.
    pub(super) last: u32,
    /// What the host wants.
    pub(super) host: Command,
    /// What the driver sent last.
    pub(super) guest: Option<Command>,
    /// Whether the driver may free its blocks as soon as it has sent all.
    pub(super) acknowledge: bool,
}

impl Hinting {
    /// The host begins a run, which ends one that is under way.
    pub(super) fn start(&mut self, acknowledge: bool) {
        self.last = self.last.checked_add(1).unwrap_or_default().max(2);
        self.host = Command::Run(self.last);
        self.acknowledge = acknowledge;
    }

    /// The driver was reset. Numbers are not used again.
    pub(super) fn reset(&mut self) {
        *self = Self {
            last: self.last,
            ..Self::default()
        };
    }

    /// The driver sent a command. True where that ends the run, so that the driver has to hear of it.
    pub(super) fn heard(&mut self, command: Command) -> bool {
        let was_in_run = self.takes_blocks();
        self.guest = Some(command);
        let has_ended = match command {
            // A driver has no reason to send `Done`.
            Command::Stop | Command::Done => was_in_run && self.acknowledge,
            Command::Run(_) => false,
        };
        if has_ended {
            self.host = Command::Done;
        }
        has_ended
    }

    /// Whether the blocks that the driver sends are of the run that the host wants. Others it may have used again.
    pub(super) fn takes_blocks(&self) -> bool {
        match self.host {
            Command::Run(_) => self.guest == Some(self.host),
            Command::Stop | Command::Done => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_takes_blocks_from_its_own_number_to_its_stop() {
        let mut run = Hinting::default();
        assert!(!run.takes_blocks());
        run.start(true);
        assert_eq!((u32::from(run.host), run.guest), (2, None));
        assert!(!run.takes_blocks());
        assert!(!run.heard(Command::Run(2)));
        assert!(run.takes_blocks());
        assert!(run.heard(Command::Stop));
        assert_eq!(run.host, Command::Done);
        assert!(!run.takes_blocks());
    }

    #[test]
    fn a_stop_that_is_not_acknowledged_leaves_the_blocks_with_the_driver() {
        let mut run = Hinting::default();
        run.start(false);
        run.heard(Command::Run(2));
        assert!(!run.heard(Command::Stop));
        assert_eq!(run.host, Command::Run(2));
        assert!(!run.takes_blocks());
    }

    #[test]
    fn the_end_of_a_run_does_not_end_the_next() {
        let mut run = Hinting::default();
        run.start(true);
        run.heard(Command::Run(2));
        run.start(true);
        assert!(!run.takes_blocks());
        assert!(!run.heard(Command::Stop));
        assert_eq!(run.host, Command::Run(3));
        run.heard(Command::Run(3));
        assert!(run.takes_blocks());
    }

    #[test]
    fn no_run_has_a_reserved_number_or_that_of_the_one_before() {
        let mut run = Hinting {
            last: u32::MAX,
            ..Hinting::default()
        };
        run.start(true);
        assert_eq!(run.host, Command::Run(2));
        run.reset();
        assert_eq!(run.host, Command::Stop);
        run.start(true);
        assert_eq!(run.host, Command::Run(3));
        for id in 0..4 {
            assert_eq!(u32::from(Command::from(id)), id);
        }
    }
}
