//! What every process of Coppice uses of its host: signals, heap and stack, the terminal, listening sockets, inherited
//! descriptors, files that it appends to, `/proc`, exit codes, and the reporter of errors.
//!
//! The reporter of errors is a crate below this one, and can be had from here, as all that writes to a person is here.
//!
//! The modules know nothing of devices or KVM, and do not use each other.

pub mod exit;
pub mod heap;
pub mod inherited;
pub mod output;
pub mod printable;
pub mod procfs;
pub mod program;
pub mod shared_folder;
pub mod signals;
pub mod socket;
pub mod stack;
pub mod terminal;
pub mod text_table;

pub use report;
