//! The daemon's REST API: its requests and their responses.

mod console;
mod daemon;
mod guest;
mod images;
mod networks;
mod openapi;
mod request;
mod router;
mod sharers;
mod templates;
mod vms;

pub use router::{all, read_only};
