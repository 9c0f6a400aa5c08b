//! The commands of `coppice vm`, but for `create`, whose arguments are those of `coppice run`.

use clap::Subcommand;

/// What `coppice vm` can do with guests that were made.
#[derive(Debug, Subcommand)]
pub enum GuestCommand {
    /// Show all guests.
    #[command(visible_alias = "ls")]
    List,
    /// Show all that is known of a guest.
    Show {
        /// The guest.
        id: String,
    },
    /// Start a guest that waits or has ended.
    Start {
        /// The guests.
        #[arg(required = true)]
        id: Vec<String>,
    },
    /// Stop a guest: it is asked to shut down, then its process is ended. It can be started again.
    Stop {
        /// The guests.
        #[arg(required = true)]
        id: Vec<String>,
        /// For how many seconds the guest may take to shut down by itself.
        #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=3600))]
        timeout: u64,
        /// Do not ask the guest: its process closes its disks, and ends.
        #[arg(long, conflicts_with = "timeout")]
        force: bool,
    },
    /// Have the vCPUs of a guest stand still.
    Pause {
        /// The guests.
        #[arg(required = true)]
        id: Vec<String>,
    },
    /// Let the vCPUs of a guest go on.
    Resume {
        /// The guests.
        #[arg(required = true)]
        id: Vec<String>,
    },
    /// End a guest, and remove it.
    #[command(visible_alias = "rm")]
    Delete {
        /// The guests.
        #[arg(required = true)]
        id: Vec<String>,
        /// For how many seconds the guest may take to shut down by itself.
        #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=3600))]
        timeout: u64,
    },
    /// Attach this terminal to the serial console of a guest.
    Console {
        /// The guest.
        id: String,
    },
    /// Show what guests take of the host: memory and CPU time.
    Stats {
        /// The guests; all if none is named.
        id: Vec<String>,
    },
    /// Guests that others begin as: see `create --template`.
    #[command(subcommand)]
    Template(TemplateCommand),
}

/// What `coppice vm template` can do.
#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Save a guest, which stands still meanwhile and goes on.
    ///
    /// Its disks stay as they are for the clones, and it goes on with a child of each that it may write to.
    Create {
        /// The name of the template.
        id: String,
        /// The guest.
        vm: String,
    },
    /// Show all templates.
    #[command(visible_alias = "ls")]
    List,
    /// Delete templates that no guest was made of.
    #[command(visible_alias = "rm")]
    Delete {
        /// The templates.
        #[arg(required = true)]
        id: Vec<String>,
    },
}
