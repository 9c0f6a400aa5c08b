//! What a process of Coppice has of its host, whatever it is for: signals, its heap and stack, the terminal, listening sockets, files that it appends to,
//! `/proc`, and the code that it exits with.
//!
//! The modules do not know of guests, and do not use each other.

pub mod exit;
pub mod heap;
pub mod output;
pub mod printable;
pub mod procfs;
pub mod program;
pub mod report;
pub mod signals;
pub mod socket;
pub mod stack;
pub mod terminal;
pub mod text_table;
