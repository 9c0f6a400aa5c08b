//! A host without file descriptors: the error that a user sees has to end with `EMFILE`. It is a program of its own, as
//! the limit is the process's.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

use std::error::Error;
use std::io;
use std::sync::Arc;

use devices::virtio::Interrupt;
use devices::virtio::block::{BlockConfig, BlockError, VirtioBlock};
use devices::vmgenid::{VmGenId, VmGenIdError};
use rustix::process::{Resource, getrlimit, setrlimit};
use storage::io::EngineKind;
use storage::{Format, OpenOptions};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// The error of the host at the end of a chain, of which no text is repeated by the one above it.
fn errno(error: &dyn Error) -> Option<i32> {
    let source = error.source()?;
    assert!(!error.to_string().contains(&source.to_string()), "{error}");
    match source.downcast_ref::<io::Error>() {
        Some(source) => source.raw_os_error(),
        None => errno(source),
    }
}

#[test]
fn a_device_that_the_host_has_no_descriptors_for_is_refused_with_the_error() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 16).unwrap();
    let options = OpenOptions {
        format: Some(Format::Raw),
        ..OpenOptions::default()
    };
    let config = BlockConfig {
        disk: storage::open(file.path(), &options).unwrap(),
        serial: "disk".into(),
        queues: 1,
        queue_size: 16,
        engine: EngineKind::Worker,
    };
    let interrupt = || Arc::new(Interrupt::new(EventFd::new(0).unwrap()));
    let (first, second) = (interrupt(), interrupt());
    let free =
        rustix::fs::open("/", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
    let used = u64::try_from(std::os::fd::AsRawFd::as_raw_fd(&free)).unwrap();
    drop(free);
    let limit = |extra: u64| {
        let mut limit = getrlimit(Resource::Nofile);
        limit.current = Some(used + extra);
        setrlimit(Resource::Nofile, limit).unwrap();
    };
    limit(0);
    let generation = VmGenId::new(GuestAddress(0x1000)).unwrap_err();
    assert!(matches!(generation, VmGenIdError::Event(_)));
    assert_eq!(errno(&generation), Some(libc::EMFILE));
    let block = VirtioBlock::new(config.clone(), first.clone())
        .err()
        .unwrap();
    assert!(matches!(block, BlockError::Event(_)));
    assert_eq!(errno(&block), Some(libc::EMFILE));
    // Enough for the event of the queue, and for none of the engine.
    limit(1);
    let block = VirtioBlock::new(config, second).err().unwrap();
    assert!(matches!(block, BlockError::Engine(_)));
    assert_eq!(errno(&block), Some(libc::EMFILE));
}
