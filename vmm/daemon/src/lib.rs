//! The host daemon: many guests by one socket ([`serve`]), its client ([`remote`]), and the process that theirs are
//! copies of ([`zygote`]).

pub mod remote;
pub mod serve;
pub mod zygote;
