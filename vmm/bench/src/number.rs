//! Arithmetic with figures.

#[allow(
    clippy::cast_precision_loss,
    reason = "memory in KiB and counts of guests are far below 2^52"
)]
pub(super) fn float(value: u64) -> f64 {
    value as f64
}

/// The mean of a figure.
pub(super) fn mean<T>(items: &[T], figure: impl Fn(&T) -> f64) -> f64 {
    // The mean of no items is 0. `sum` of none would be -0.
    items.iter().map(figure).fold(0.0, |sum, item| sum + item) / float(items.len().max(1) as u64)
}
