//! The compressions of kernels: recognised by their first bytes, and unpacked as a stream.

use std::io::{self, BufRead, Read, Write};

/// The block size of the LZ4 legacy frame (LZ4 frame format, "Legacy frame").
const LZ4_LEGACY_BLOCK: usize = 8 << 20;
/// Memory that an XZ stream may need: twice as much as those of `xz -9`.
const XZ_MEMORY: u64 = 128 << 20;
/// Window of a zstd frame, as a power of two: that of `zstd -22 --ultra`, which kernels are built with.
const ZSTD_WINDOW_LOG: u32 = 27;

/// How a kernel is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Xz,
    /// The legacy frame, which the kernel's build uses.
    Lz4Legacy,
    /// The frame of current tools.
    Lz4,
    Zstd,
}

impl Compression {
    /// Recognises the compression by the first bytes.
    pub(super) fn of(start: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Compression); 5] = [
            (b"\x1f\x8b", Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            (b"\x02\x21\x4c\x18", Compression::Lz4Legacy),
            (b"\x04\x22\x4d\x18", Compression::Lz4),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        ];
        MAGICS
            .iter()
            .find(|(magic, _)| start.starts_with(magic))
            .map(|(_, compression)| *compression)
    }

    /// The name of a compression that kernels can have, and that cannot be unpacked here.
    pub(super) fn unsupported(start: &[u8]) -> Option<&'static str> {
        const MAGICS: [(&[u8], &str); 3] = [
            (b"BZh", "bzip2"),
            (b"\x5d\0\0", "lzma"),
            (b"\x89LZO\0\r\n\x1a\n", "lzo"),
        ];
        MAGICS
            .iter()
            .find(|(magic, _)| start.starts_with(magic))
            .map(|(_, name)| *name)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lz4Legacy | Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// Unpacks the one stream that `packed` starts with. Four bytes may follow it, the length of the kernel, as in the
    /// payload of a bzImage.
    pub(super) fn decode(self, packed: impl BufRead, out: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Gzip => copy(flate2::bufread::GzDecoder::new(packed), out),
            Self::Xz => {
                let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, 0)
                    .map_err(io::Error::other)?;
                copy(liblzma::bufread::XzDecoder::new_stream(packed, stream), out)
            }
            Self::Lz4Legacy => decode_lz4_legacy(packed, out),
            Self::Lz4 => copy(lz4_flex::frame::FrameDecoder::new(packed), out),
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(packed)?.single_frame();
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                copy(decoder, out)
            }
        }
    }
}

fn copy(mut decoder: impl Read, out: &mut impl Write) -> io::Result<()> {
    io::copy(&mut decoder, out).map(drop)
}

/// Unpacks a legacy frame: a magic number, then blocks, each after its compressed length.
fn decode_lz4_legacy(mut packed: impl BufRead, out: &mut impl Write) -> io::Result<()> {
    let mut word = [0; 4];
    packed.read_exact(&mut word)?;
    let mut unpacked = vec![0; LZ4_LEGACY_BLOCK];
    let mut block = Vec::new();
    while !packed.fill_buf()?.is_empty() {
        packed.read_exact(&mut word)?;
        if packed.fill_buf()?.is_empty() {
            // This is the length of the kernel, after which no block follows.
            break;
        }
        let len = u32::from_le_bytes(word) as usize;
        if len > lz4_flex::block::get_maximum_output_size(LZ4_LEGACY_BLOCK) {
            let error = format!("a block of {len} bytes is longer than any of 8 MiB becomes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        block.resize(len, 0);
        packed.read_exact(&mut block)?;
        let len =
            lz4_flex::block::decompress_into(&block, &mut unpacked).map_err(io::Error::other)?;
        out.write_all(unpacked.get(..len).unwrap_or_default())?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in crate::boot) fn lz4_legacy(bytes: &[u8]) -> Vec<u8> {
        let mut packed = b"\x02\x21\x4c\x18".to_vec();
        for block in bytes.chunks(LZ4_LEGACY_BLOCK) {
            let block = lz4_flex::block::compress(block);
            packed.extend((block.len() as u32).to_le_bytes());
            packed.extend(block);
        }
        packed
    }

    /// `bytes` in every compression.
    pub(in crate::boot) fn packed(bytes: &[u8]) -> Vec<(Compression, Vec<u8>)> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(bytes).unwrap();
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(bytes).unwrap();
        let mut lz4 = lz4_flex::frame::FrameEncoder::new(Vec::new());
        lz4.write_all(bytes).unwrap();
        vec![
            (Compression::Gzip, gzip.finish().unwrap()),
            (Compression::Xz, xz.finish().unwrap()),
            (Compression::Lz4Legacy, lz4_legacy(bytes)),
            (Compression::Lz4, lz4.finish().unwrap()),
            (Compression::Zstd, zstd::encode_all(bytes, 1).unwrap()),
        ]
    }

    fn content() -> Vec<u8> {
        (0..50_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect()
    }

    fn decode(compression: Compression, packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        compression.decode(packed, &mut out).map(|()| out)
    }

    #[test]
    fn every_compression_is_recognised_and_unpacked() {
        for (compression, bytes) in packed(&content()) {
            assert_eq!(Compression::of(&bytes), Some(compression));
            assert_eq!(decode(compression, &bytes).unwrap(), content());
        }
    }

    #[test]
    fn the_length_behind_a_payload_is_no_part_of_it() {
        for (compression, mut bytes) in packed(&content()) {
            bytes.extend((content().len() as u32).to_le_bytes());
            assert_eq!(
                decode(compression, &bytes).unwrap(),
                content(),
                "{compression:?}"
            );
        }
    }

    #[test]
    fn a_stream_that_ends_early_is_an_error() {
        for (compression, bytes) in packed(&content()) {
            for part in [2, 3] {
                let cut = &bytes[..bytes.len() / part];
                assert!(decode(compression, cut).is_err(), "{compression:?}");
            }
        }
    }

    #[test]
    fn the_window_of_the_highest_zstd_level_is_taken() {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(ZSTD_WINDOW_LOG).unwrap();
        encoder.write_all(&content()).unwrap();
        let bytes = encoder.finish().unwrap();
        assert_eq!(decode(Compression::Zstd, &bytes).unwrap(), content());
    }

    proptest! {
        #[test]
        fn damaged_streams_never_panic(which in 0..5usize, at in 0..1000usize, value: u8) {
            let (compression, mut bytes) = packed(&content()[..4096]).swap_remove(which);
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = decode(compression, &bytes);
        }
    }
}
