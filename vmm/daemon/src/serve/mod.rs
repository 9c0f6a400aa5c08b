//! `coppice serve`: the host daemon, one socket for many guests.
//!
//! ```text
//! server    start and end
//! listen ─ peer ──> routes ──> lifecycle, stopping, template_creation     what callers ask for
//!                     │            ├─ waiting        a guest that is configured over its own API, and its start
//!                     │            ├─ supervision    a guest's process: brought up, watched, started again
//!                     │            │      └─ process ═══> coppice run (one a guest, outlives the daemon)
//!                     │            │            └─ guest_log    drains what that logs
//!                     │            ├─ pending, commits,
//!                     │            │  later_config   operations and changes that outlive the process
//!                     │            └─ persist        the record on disk
//!                     └── proxy, console ────────────> the guest's own sockets
//! networks  what guests have of the host's network: addresses, taps, rules
//! quota, stream, web    places of connections, their deadlines, and what of this is served by TCP
//! daemon    what the daemon owns: guests (vm), templates, images, jails, events, metrics, store
//! record    what is on disk of a guest; record_key    by which the daemon knows a record of its own again
//! template_files ─ file_copy, disk_parent    the files of a template, which are new inodes
//! ```
//!
//! Each module uses those below it, and none above. `recovery` finds the guests of an earlier daemon, `admission`
//! decides whether the host has room for a guest, and `guest_api` and `routes::openapi` describe the API.
//!
//! The daemon runs on one thread, with a few more for work that waits for the disk. It starts processes, watches them
//! by pidfd, and passes bytes on. It never touches a guest's memory, and of what comes from a guest's process it reads
//! nothing but the responses of that guest's VMM, why the process ended, and its log, all with a limit on their length.
//! The status of a guest is answered from what the daemon knows, so a guest that hangs holds up the callers that ask
//! it, and no others.

mod admission;
mod commits;
mod console;
mod daemon;
mod disk_formats;
mod disk_parent;
mod end_reason;
mod events;
mod fault;
mod file_copy;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod guarded_files;
mod guest_api;
mod guest_log;
mod guest_metrics;
mod identity;
mod images;
mod jail;
mod later_config;
mod lifecycle;
mod listen;
mod metrics;
mod network_fault;
mod networks;
mod own_disks;
mod page;
mod peer;
mod pending;
mod persist;
mod process;
mod proxy;
mod quota;
mod readmit;
mod record;
mod record_key;
mod recovery;
mod removal;
mod routes;
mod server;
mod sharing_domain;
mod spec;
mod status;
mod stopping;
mod store;
mod stream;
mod supervision;
mod task;
mod template_creation;
mod template_files;
mod templates;
mod vm;
mod waiting;
mod web;

pub use admission::{HELP as ADMISSION, Limits, host_memory_kib};
pub use jail::{JailPolicy, UIDS as JAIL_UIDS};
pub use networks::NetworkPolicy;
pub use peer::Allowed;
pub use server::{Options, ServeError, run};
pub use sharing_domain::ShareDomains;
pub use web::WebOptions;
