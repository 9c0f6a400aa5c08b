//! What the tests of the daemon share.

#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod daemon;
pub mod kernel;
pub mod steps;
pub mod traces;
