//! Checks that the workspace is a tree, that it holds to the rule for errors, and what `rustfmt` does not check of its
//! comments.
//!
//! [`crates`] holds which crate may use which. Within a crate, [`source`] reads the modules, [`imports`] follows every
//! path to the module that defines what it names, and [`circles`] finds modules that use each other in a circle.
//!
//! Each [`module::Module`] also says where errors are shown without their sources. [`comments`] keeps comments narrow
//! enough to be read.

pub mod circles;
pub mod comments;
pub mod crates;
mod errors;
pub mod imports;
pub mod module;
mod paths;
pub mod source;
