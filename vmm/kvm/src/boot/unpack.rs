//! Compressed kernels: unpacked once on the host, into a cache that all guests of a user share.
//!
//! No guest spends time and memory on decompression, and every guest of one kernel reads the same pages of one file. A
//! cached kernel is found by the identity of its source (device, inode, size, modification and change time): a source
//! that is replaced or written to has another identity, and the lookup takes one `stat`, not a hash of the file. When
//! several guests start at once, one unpacks and the others wait for it; the kernel appears by rename, so it is always
//! complete.
//!
//! Pages of zeros (a kernel's `.bss` is in its file) become holes, which are not read into guest memory.
//!
//! The cache also has copies of files that are not compressed, where guests are to share them: a file that is mapped
//! into a guest must not change, and nobody but this user writes to the cache. It also has the [files of
//! initrds](mod@super::initrd_files).

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use host::report::chain;
use rustix::fs::{FlockOperation, MemfdFlags, flock, memfd_create};

use super::compression::Compression;
use super::initrd_files::write as write_files;
use super::page_writer::PageWriter;
use super::{BootError, elf};

/// The version of the files in the cache, which is part of their names. It changes when what is stored changes.
const CACHE_VERSION: u32 = 1;
/// The name of a kernel that is not complete yet begins so.
const TEMPORARY_PREFIX: &str = ".unpacking-";
/// What the cache holds of a file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Form {
    /// The unpacked kernel.
    Kernel(Compression),
    /// A copy.
    Plain,
    /// The files of an initrd, each of which begins at a page.
    Files,
}

/// The part of a file that is to be unpacked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packed<'a> {
    pub(super) path: &'a Path,
    pub(super) file: &'a File,
    pub(super) form: Form,
    /// First byte.
    pub(super) offset: u64,
    /// Length in bytes.
    pub(super) len: u64,
}

/// An unpacked kernel.
pub(super) enum Unpacked {
    /// The kernel is in the cache, for all guests of this user, and is immutable.
    Cached(File),
    /// The kernel is in memory until it is closed, because the cache cannot be used.
    Uncached(File),
}

/// Unpacks the kernel, or takes it from `cache` where it is unpacked already.
pub(super) fn unpack(packed: Packed<'_>, cache: &Path) -> Result<Unpacked, BootError> {
    match cached(&packed, cache) {
        Ok(file) => Ok(Unpacked::Cached(file)),
        // Either the cache or the kernel is at fault. If the kernel is, it cannot be unpacked into memory either.
        Err(unusable) => {
            let memory = memfd_create("kernel", MemfdFlags::CLOEXEC);
            let file = memory
                .map_err(io::Error::from)
                .and_then(|memory| unpack_to(&packed, memory.into()))
                .map_err(|source| BootError::Unpack {
                    path: packed.path.to_owned(),
                    compression: match packed.form {
                        Form::Kernel(compression) => compression.name(),
                        Form::Plain | Form::Files => "no",
                    },
                    source,
                })?;
            tracing::warn!(dir = %cache.display(), error = %unusable, "the kernel cache cannot be used; each guest unpacks its kernel");
            Ok(Unpacked::Uncached(file))
        }
    }
}

/// A copy of a file in the cache; `None` where the cache cannot be used.
pub(super) fn cache_copy(path: &Path, file: &File, len: u64, cache: &Path) -> Option<File> {
    cache_form(path, file, len, Form::Plain, cache)
        .inspect_err(|error| {
            tracing::warn!(dir = %cache.display(), file = %path.display(), error = %chain(&error), "the cache cannot be used; each guest has a copy");
        })
        .ok()
}

/// The files of an initrd in the cache; `None` where the cache cannot be used, or Linux could not unpack the initrd.
pub(super) fn cache_initrd_files(path: &Path, file: &File, len: u64, cache: &Path) -> Option<File> {
    cache_form(path, file, len, Form::Files, cache)
        .inspect_err(|error| {
            tracing::warn!(file = %path.display(), error = %chain(&error), "what guests unpack of the initrd is not shared");
        })
        .ok()
}

fn cache_form(path: &Path, file: &File, len: u64, form: Form, cache: &Path) -> io::Result<File> {
    let packed = Packed {
        path,
        file,
        form,
        offset: 0,
        len,
    };
    cached(&packed, cache)
}

fn cached(packed: &Packed<'_>, dir: &Path) -> io::Result<File> {
    let name = cache_name(packed)?;
    let path = dir.join(&name);
    if let Some(file) = open_cached(&path) {
        return Ok(file);
    }
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let lock = File::open(dir)?;
    flock(&lock, FlockOperation::LockExclusive)?;
    if let Some(file) = open_cached(&path) {
        return Ok(file);
    }
    remove_left_over(dir)?;
    let temporary = tempfile::Builder::new()
        .prefix(TEMPORARY_PREFIX)
        .tempfile_in(dir)?;
    let file = unpack_to(packed, temporary.reopen()?)?;
    // After a power cut, the file could have its new name and not its content.
    file.sync_data()?;
    if cache_name(packed)? == name {
        temporary.persist(path)?;
    }
    Ok(file)
}

/// Removes the temporary files of processes that were killed. The caller holds the lock, so nobody else is unpacking.
fn remove_left_over(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(TEMPORARY_PREFIX.as_bytes())
        {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn unpack_to(packed: &Packed<'_>, out: File) -> io::Result<File> {
    let mut source = packed.file;
    source.seek(SeekFrom::Start(packed.offset))?;
    let mut writer = PageWriter::new(out);
    let mut bytes = BufReader::new(source.take(packed.len));
    match packed.form {
        Form::Kernel(compression) => compression.decode(bytes, &mut writer)?,
        Form::Plain => {
            io::copy(&mut bytes, &mut writer)?;
            return writer.finish();
        }
        Form::Files => {
            write_files(&mut bytes, &mut writer)?;
            return writer.finish();
        }
    }
    let file = writer.finish()?;
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0)
        .map_err(|_| io::Error::other("it holds no kernel"))?;
    if magic != elf::MAGIC {
        let error = format!("it holds no ELF kernel but a file that starts with {magic:02x?}");
        return Err(io::Error::other(error));
    }
    Ok(file)
}

fn cache_name(packed: &Packed<'_>) -> io::Result<String> {
    let source = packed.file.metadata()?;
    let kind = match packed.form {
        Form::Kernel(_) => "elf",
        Form::Plain => "plain",
        Form::Files => "files",
    };
    Ok(format!(
        "v{CACHE_VERSION}-{:x}-{:x}-{:x}-{:x}.{:09}-{:x}.{:09}.{kind}",
        source.dev(),
        source.ino(),
        source.size(),
        source.mtime(),
        source.mtime_nsec(),
        source.ctime(),
        source.ctime_nsec()
    ))
}

/// Opens a cached kernel, a [file of its own](is_own). Root's files are accepted because root's daemon
/// gives the process of a guest, which is another user, the files that it needs of root's cache.
fn open_cached(path: &Path) -> Option<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .ok()?;
    is_own(&file).then_some(file)
}

/// Whether a file is one that only this user or root can have written.
fn is_own(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| {
        metadata.is_file()
            && [rustix::process::geteuid().as_raw(), 0].contains(&metadata.uid())
            && metadata.mode() & 0o022 == 0
    })
}

/// Whether `file`, opened by `path`, is a file of `cache`.
pub(super) fn is_cached(path: &Path, file: &File, cache: &Path) -> bool {
    is_in(path, cache) && is_own(file)
}

/// Whether `path` names something that is directly in `folder`, by whatever name that is written.
pub(super) fn is_in(path: &Path, folder: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().ok();
    let (Some(parent), Some(_)) = (path.parent(), path.file_name()) else {
        return false;
    };
    real(parent).is_some_and(|parent| Some(parent) == real(folder))
}

/// The folder of this user's unpacked kernels: `$XDG_CACHE_HOME/coppice/kernels`, by default below `~/.cache`; without
/// a home, below `/var/cache`. A sharing domain has a folder of its own in it.
pub(super) fn cache_dir(domain: Option<&str>) -> PathBuf {
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let base =
        absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    let kernels = base
        .unwrap_or_else(|| "/var/cache".into())
        .join("coppice/kernels");
    // No file in the cache has the name of a domain, because all files have dots in their names.
    domain.map_or_else(|| kernels.clone(), |domain| kernels.join(domain))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::compression::tests as compression;

    /// A kernel with a MiB of zeros inside.
    fn kernel() -> Vec<u8> {
        let mut bytes = elf::tests::kernel(16);
        bytes.resize(bytes.len() + (1 << 20), 0);
        bytes.extend((0..100_000u32).flat_map(|i| (i / 7).to_le_bytes()));
        bytes
    }

    fn open(source: &Path, compression: Compression, cache: &Path) -> Result<File, BootError> {
        let file = File::open(source).unwrap();
        let packed = Packed {
            path: source,
            file: &file,
            form: Form::Kernel(compression),
            offset: 0,
            len: file.metadata().unwrap().len(),
        };
        match unpack(packed, cache)? {
            Unpacked::Cached(file) | Unpacked::Uncached(file) => Ok(file),
        }
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn kernels_of_every_compression_come_out_whole_and_their_zeros_as_holes() {
        let dir = tempfile::tempdir().unwrap();
        for (compression, bytes) in compression::packed(&kernel()) {
            let source = dir.path().join("vmlinuz");
            fs::write(&source, bytes).unwrap();
            let file = open(&source, compression, &dir.path().join("cache")).unwrap();
            assert!(content(&file) == kernel(), "{compression:?}");
            let metadata = file.metadata().unwrap();
            assert!(
                metadata.blocks() * 512 < metadata.len() - (1 << 19),
                "{compression:?}"
            );
            fs::remove_file(source).unwrap();
        }
    }

    #[test]
    fn damage_is_an_error_that_names_file_and_compression_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let (source, cache) = (dir.path().join("vmlinuz"), dir.path().join("cache"));
        for (compression, bytes) in compression::packed(&kernel()) {
            fs::write(&source, &bytes[..bytes.len() / 2]).unwrap();
            let error = open(&source, compression, &cache).unwrap_err();
            let error = chain(&error).to_string();
            assert!(
                error.contains(compression.name()) && error.contains("vmlinuz"),
                "{error}"
            );
        }
        fs::write(&source, compression::lz4_legacy(b"no kernel")).unwrap();
        let error = open(&source, Compression::Lz4Legacy, &cache).unwrap_err();
        assert!(
            chain(&error).to_string().contains("no ELF kernel"),
            "{error}"
        );
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 0);
    }

    #[test]
    fn guests_that_start_at_once_share_one_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let (source, cache) = (dir.path().join("vmlinuz"), dir.path().join("a/b"));
        fs::write(&source, compression::lz4_legacy(&kernel())).unwrap();
        fs::create_dir_all(&cache).unwrap();
        fs::write(cache.join(".unpacking-killed"), b"half").unwrap();
        let inode = || {
            let file = open(&source, Compression::Lz4Legacy, &cache).unwrap();
            file.metadata().unwrap().ino()
        };
        let inodes: Vec<u64> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(inode)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert!(inodes.iter().all(|inode| *inode == inodes[0]));
        assert_eq!(
            fs::read_dir(&cache).unwrap().count(),
            1,
            "one kernel and no temporary file"
        );
    }

    #[test]
    fn a_file_that_is_not_compressed_is_kept_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("initrd");
        fs::write(&source, b"070701, and more").unwrap();
        let file = File::open(&source).unwrap();
        let kept = |cache| cache_copy(&source, &file, 16, cache);
        let (first, second) = (kept(dir.path()).unwrap(), kept(dir.path()).unwrap());
        assert_eq!(content(&first), b"070701, and more");
        let inode = |file: &File| file.metadata().unwrap().ino();
        assert_eq!(inode(&first), inode(&second));
        assert_ne!(inode(&first), inode(&file));
        assert!(kept(Path::new("/proc/nowhere")).is_none());
    }

    #[test]
    fn a_source_that_changed_is_unpacked_again() {
        let dir = tempfile::tempdir().unwrap();
        let (source, cache) = (dir.path().join("vmlinuz"), dir.path().join("cache"));
        fs::write(&source, compression::lz4_legacy(&kernel())).unwrap();
        open(&source, Compression::Lz4Legacy, &cache).unwrap();
        let mut other = kernel();
        other.push(1);
        fs::write(&source, compression::lz4_legacy(&other)).unwrap();
        let file = open(&source, Compression::Lz4Legacy, &cache).unwrap();
        assert!(content(&file) == other);
    }

    #[test]
    fn a_cached_file_that_others_may_write_is_not_trusted() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (source, cache) = (dir.path().join("vmlinuz"), dir.path().join("cache"));
        fs::write(&source, compression::lz4_legacy(&kernel())).unwrap();
        open(&source, Compression::Lz4Legacy, &cache).unwrap();
        let entry = fs::read_dir(&cache)
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        fs::write(&entry, b"\x7fELF, planted").unwrap();
        fs::set_permissions(&entry, fs::Permissions::from_mode(0o666)).unwrap();
        let file = open(&source, Compression::Lz4Legacy, &cache).unwrap();
        assert!(content(&file) == kernel());
    }

    #[test]
    fn without_a_cache_the_kernel_is_unpacked_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("vmlinuz");
        fs::write(&source, compression::lz4_legacy(&kernel())).unwrap();
        let file = open(&source, Compression::Lz4Legacy, Path::new("/proc/nowhere")).unwrap();
        assert!(content(&file) == kernel());
    }
}
