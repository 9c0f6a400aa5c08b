//! Numbers of figures.

#[allow(
    clippy::cast_precision_loss,
    reason = "memory in KiB and counts of guests are far below 2^52"
)]
pub(super) fn float(value: u64) -> f64 {
    value as f64
}

/// The mean of a figure.
pub(super) fn mean<T>(items: &[T], figure: impl Fn(&T) -> f64) -> f64 {
    // No items have the mean 0, and the sum of none is -0.
    items.iter().map(figure).fold(0.0, |sum, item| sum + item) / float(items.len().max(1) as u64)
}
