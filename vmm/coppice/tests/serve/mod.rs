//! What the tests of the daemon share.

#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod daemon;
pub mod host_network;
pub mod kernel;
pub mod liar;
pub mod lies;
pub mod outside;
pub mod plant;
pub mod steps;
pub mod traces;
