//! Sizes on the command line and in output.

use clap::ValueEnum;
use storage::SectorSize;

use super::error::ToolError;
use config::Bytes;

/// A sector size of the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Sector {
    /// 512 bytes.
    #[value(name = "512")]
    B512,
    /// 4096 bytes.
    #[value(name = "4096")]
    B4096,
}

impl From<Sector> for SectorSize {
    fn from(sector: Sector) -> Self {
        match sector {
            Sector::B512 => Self::B512,
            Sector::B4096 => Self::B4096,
        }
    }
}

/// A size as text, with the exact number of bytes where the text is rounded.
pub(super) fn human(bytes: u64) -> String {
    for (unit, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if bytes >= 1 << shift {
            let whole = bytes >> shift;
            if bytes.is_multiple_of(1 << shift) {
                return format!("{whole} {unit}");
            }
            #[allow(
                clippy::cast_precision_loss,
                reason = "one digit behind the point is shown"
            )]
            let part = bytes as f64 / (1_u64 << shift) as f64;
            return format!("{part:.1} {unit}");
        }
    }
    format!("{bytes} B")
}

/// A block size of the command line, which the format has to allow.
pub(super) fn block_size(size: Bytes) -> Result<u32, ToolError> {
    u32::try_from(size.0).map_err(|_| {
        ToolError::Refused(format!(
            "block size {}: expected a power of two from 1M to 256M",
            human(size.0)
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::human;

    #[test]
    fn sizes_are_shown_in_the_largest_unit_they_fill() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (4096, "4 KiB"),
            (10 << 30, "10 GiB"),
            ((10 << 30) + (512 << 20), "10.5 GiB"),
            (64 << 40, "64 TiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
