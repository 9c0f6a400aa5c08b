//! Whole networks, each in a network namespace of its own, where descriptors of taps play the guests and the outside.

mod clones;
mod frames;
mod isolation;
mod lifecycle;
mod reach;
mod world;
