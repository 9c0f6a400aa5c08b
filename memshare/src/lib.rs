//! The memory manager that lets guests share one host page per file page, copied on write.
mod window;

pub use window::{PAGE_SIZE, PageKind, Window};
