//! The host daemon: many guests by one socket ([`serve`]), and the process that theirs are copies of ([`zygote`]).

pub mod serve;
pub mod zygote;
