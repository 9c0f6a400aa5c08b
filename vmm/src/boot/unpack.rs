//! Compressed kernels: unpacked once on the host, into a cache that all guests of a user share.
//!
//! No guest spends time and memory on decompression, and every guest of one kernel reads the same pages of one file. A cached kernel
//! is found by the identity of its source (device, inode, size, modification and change time): a source that is replaced or written to
//! has another identity, and asking for it costs one `stat`, not a hash of the file. A cached kernel appears by rename,
//! so it is whole, however many guests start at once.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{BootError, elf};

/// Larger kernels are refused: what expands further is not a kernel.
const MAX_UNPACKED: u64 = 1 << 30;
/// Changes with what is stored.
const CACHE_VERSION: u32 = 1;
/// The block size of the LZ4 legacy frame (LZ4 frame format, "Legacy frame").
const LZ4_LEGACY_BLOCK: usize = 8 << 20;
/// Memory that an XZ stream may ask for; the kernel's own limit is half of it.
const XZ_MEMORY: u64 = 128 << 20;

/// How a kernel is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Xz,
    Lz4,
    Zstd,
}

impl Compression {
    /// Tells the compression by the first bytes.
    pub(super) fn of(start: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Compression); 4] = [
            (b"\x1f\x8b", Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            (b"\x02\x21\x4c\x18", Compression::Lz4),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        ];
        MAGICS
            .iter()
            .find(|(magic, _)| start.starts_with(magic))
            .map(|(_, compression)| *compression)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    fn decode(self, packed: impl Read, out: &mut impl Write) -> io::Result<()> {
        let mut out = Bounded {
            out,
            left: MAX_UNPACKED,
        };
        match self {
            Self::Gzip => io::copy(&mut flate2::read::GzDecoder::new(packed), &mut out).map(drop),
            Self::Xz => {
                let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, 0)
                    .map_err(io::Error::other)?;
                io::copy(
                    &mut liblzma::read::XzDecoder::new_stream(packed, stream),
                    &mut out,
                )
                .map(drop)
            }
            Self::Lz4 => decode_lz4_legacy(packed, &mut out),
            Self::Zstd => {
                let mut decoder =
                    ruzstd::decoding::StreamingDecoder::new(packed).map_err(io::Error::other)?;
                io::copy(&mut decoder, &mut out).map(drop)
            }
        }
    }
}

/// Fails instead of writing more than a kernel's worth.
struct Bounded<'a, W> {
    out: &'a mut W,
    left: u64,
}

impl<W: Write> Write for Bounded<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or_else(|| {
            io::Error::other(format!("it unpacks to more than {MAX_UNPACKED} bytes"))
        })?;
        self.out.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The legacy frame that kernels are packed in: a magic number, then blocks, each behind its compressed length.
fn decode_lz4_legacy(mut packed: impl Read, out: &mut impl Write) -> io::Result<()> {
    let mut word = [0; 4];
    packed.read_exact(&mut word)?;
    let mut unpacked = vec![0; LZ4_LEGACY_BLOCK];
    let mut block = Vec::new();
    while read_word(&mut packed, &mut word)? {
        let len = u32::from_le_bytes(word) as usize;
        if len > lz4_flex::block::get_maximum_output_size(LZ4_LEGACY_BLOCK) {
            // Not a block: the length of the unpacked kernel, which the kernel's build puts behind the last one.
            break;
        }
        block.resize(len, 0);
        match packed.read_exact(&mut block) {
            Ok(()) => {}
            // A small kernel's length looks like that of a block, of which nothing follows.
            Err(error)
                if error.kind() == io::ErrorKind::UnexpectedEof && packed.read(&mut word)? == 0 =>
            {
                break;
            }
            Err(error) => return Err(error),
        }
        let len =
            lz4_flex::block::decompress_into(&block, &mut unpacked).map_err(io::Error::other)?;
        out.write_all(&unpacked[..len])?;
    }
    Ok(())
}

/// Reads four bytes; false at the end of the stream.
fn read_word(packed: &mut impl Read, word: &mut [u8; 4]) -> io::Result<bool> {
    match packed.read_exact(word) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Where the packed kernel lies in its file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packed<'a> {
    pub(super) path: &'a Path,
    pub(super) file: &'a File,
    pub(super) compression: Compression,
    /// First byte.
    pub(super) offset: u64,
    /// Length in bytes.
    pub(super) len: u64,
}

/// The unpacked kernel, from `cache` where it is there already. Without a usable cache it lies in an unlinked temporary file.
pub(super) fn unpack(packed: Packed<'_>, cache: Option<&Path>) -> Result<File, BootError> {
    let error = |source| BootError::Unpack {
        path: packed.path.to_owned(),
        compression: packed.compression.name(),
        source,
    };
    let name = cache_name(&packed).map_err(error)?;
    let Some(dir) = cache else {
        return unpack_to(&packed, tempfile::tempfile().map_err(error)?).map_err(error);
    };
    if let Some(file) = open_cached(&dir.join(&name)) {
        return Ok(file);
    }
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    match made.and_then(|()| {
        tempfile::Builder::new()
            .prefix(".unpacking-")
            .tempfile_in(dir)
    }) {
        Ok(temporary) => {
            let file = unpack_to(&packed, temporary.reopen().map_err(error)?).map_err(error)?;
            if let Err(failed) = temporary.persist(dir.join(&name)) {
                tracing::warn!(dir = %dir.display(), error = %failed.error, "the unpacked kernel is not cached");
            }
            Ok(file)
        }
        Err(failed) => {
            tracing::warn!(dir = %dir.display(), error = %failed, "the kernel cache cannot be used");
            unpack_to(&packed, tempfile::tempfile().map_err(error)?).map_err(error)
        }
    }
}

fn unpack_to(packed: &Packed<'_>, mut out: File) -> io::Result<File> {
    let mut source = packed.file;
    source.seek(SeekFrom::Start(packed.offset))?;
    packed
        .compression
        .decode(BufReader::new(source.take(packed.len)), &mut out)?;
    let mut magic = [0; 4];
    out.rewind()?;
    out.read_exact(&mut magic)
        .map_err(|_| io::Error::other("it holds no kernel"))?;
    if magic != elf::MAGIC {
        return Err(io::Error::other(format!(
            "it holds no ELF kernel but a file that starts with {magic:02x?}"
        )));
    }
    Ok(out)
}

fn cache_name(packed: &Packed<'_>) -> io::Result<String> {
    let source = packed.file.metadata()?;
    Ok(format!(
        "v{CACHE_VERSION}-{:x}-{:x}-{:x}-{:x}.{:09}-{:x}.{:09}.elf",
        source.dev(),
        source.ino(),
        source.size(),
        source.mtime(),
        source.mtime_nsec(),
        source.ctime(),
        source.ctime_nsec()
    ))
}

/// A cached kernel that this user, and nobody else, can have put there.
fn open_cached(path: &Path) -> Option<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .ok()?;
    let metadata = file.metadata().ok()?;
    let own = metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & 0o022 == 0;
    (metadata.is_file() && own).then_some(file)
}

/// Where this user's unpacked kernels lie: `$XDG_CACHE_HOME/coppice/kernels`, by default below `~/.cache`; without a
/// home, below `/var/cache`.
pub(super) fn cache_dir() -> PathBuf {
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let base =
        absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    base.unwrap_or_else(|| "/var/cache".into())
        .join("coppice/kernels")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel() -> Vec<u8> {
        let mut bytes = elf::tests::kernel(16);
        bytes.extend((0..100_000u32).flat_map(|i| (i / 7).to_le_bytes()));
        bytes
    }

    fn lz4_legacy(bytes: &[u8], trailer: &[u8]) -> Vec<u8> {
        let mut packed = b"\x02\x21\x4c\x18".to_vec();
        for block in bytes.chunks(LZ4_LEGACY_BLOCK) {
            let block = lz4_flex::block::compress(block);
            packed.extend((block.len() as u32).to_le_bytes());
            packed.extend(block);
        }
        packed.extend(trailer);
        packed
    }

    fn packed_kernels() -> Vec<(Compression, Vec<u8>)> {
        let bytes = kernel();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&bytes).unwrap();
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(&bytes).unwrap();
        let zstd = ruzstd::encoding::compress_to_vec(
            &bytes[..],
            ruzstd::encoding::CompressionLevel::Fastest,
        );
        vec![
            (Compression::Gzip, gzip.finish().unwrap()),
            (Compression::Xz, xz.finish().unwrap()),
            (Compression::Zstd, zstd),
            (Compression::Lz4, lz4_legacy(&bytes, &[])),
            (
                Compression::Lz4,
                lz4_legacy(&bytes, &(bytes.len() as u32).to_le_bytes()),
            ),
            (
                Compression::Lz4,
                lz4_legacy(&bytes, &u32::MAX.to_le_bytes()),
            ),
        ]
    }

    fn run(
        bytes: &[u8],
        compression: Compression,
        cache: Option<&Path>,
    ) -> Result<Vec<u8>, BootError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"head").unwrap();
        file.write_all(bytes).unwrap();
        let path = file.path().to_owned();
        let file = file.into_file();
        let packed = Packed {
            path: &path,
            file: &file,
            compression,
            offset: 4,
            len: bytes.len() as u64,
        };
        let mut unpacked = Vec::new();
        let mut out = unpack(packed, cache)?;
        out.rewind().unwrap();
        out.read_to_end(&mut unpacked).unwrap();
        Ok(unpacked)
    }

    #[test]
    fn every_compression_is_told_and_unpacked() {
        for (compression, bytes) in packed_kernels() {
            assert_eq!(Compression::of(&bytes), Some(compression));
            assert_eq!(
                run(&bytes, compression, None).unwrap(),
                kernel(),
                "{compression:?}"
            );
        }
    }

    #[test]
    fn damage_is_an_error_that_names_file_and_compression() {
        for (compression, bytes) in packed_kernels() {
            let error = run(&bytes[..bytes.len() / 2], compression, None)
                .unwrap_err()
                .to_string();
            assert!(error.contains(compression.name()), "{error}");
        }
        let error = run(&lz4_legacy(b"no kernel", &[]), Compression::Lz4, None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("no ELF kernel"), "{error}");
    }

    #[test]
    fn a_second_start_finds_the_first_ones_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("a/b");
        let source = dir.path().join("vmlinuz");
        std::fs::write(&source, lz4_legacy(&kernel(), &[])).unwrap();
        let open = || {
            let file = File::open(&source).unwrap();
            let len = file.metadata().unwrap().len();
            let packed = Packed {
                path: &source,
                file: &file,
                compression: Compression::Lz4,
                offset: 0,
                len,
            };
            unpack(packed, Some(&cache))
                .unwrap()
                .metadata()
                .unwrap()
                .ino()
        };
        assert_eq!(open(), open());
        let cached: Vec<_> = std::fs::read_dir(&cache).unwrap().collect();
        assert_eq!(cached.len(), 1, "one kernel and no temporary file");
    }

    #[test]
    fn without_a_cache_the_kernel_is_unpacked_all_the_same() {
        let bytes = lz4_legacy(&kernel(), &[]);
        let unpacked = run(&bytes, Compression::Lz4, Some(Path::new("/proc/nowhere"))).unwrap();
        assert_eq!(unpacked, kernel());
    }
}
