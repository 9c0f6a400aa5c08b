//! Checks that the workspace is a tree, and that it holds to the rule for errors.
//!
//! [`crates`] holds which crate may use which. Within a crate, [`source`] reads the modules, [`imports`] follows every
//! path to the module that defines what it names, and [`circles`] finds modules that use each other in a circle.
//!
//! Each [`module::Module`] also says where errors are shown without their sources.

pub mod circles;
pub mod crates;
mod errors;
pub mod imports;
pub mod module;
mod paths;
pub mod source;
