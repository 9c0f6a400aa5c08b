//! The asynchronous engine beside plain `pread` on the same file in tmpfs. Unit: bytes a second, reads of 4 and 64 KiB,
//! 1 and 32 at a time.

use std::hint::black_box;
use std::os::unix::fs::FileExt;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use storage::io::{DiskQueue, EngineKind, OwnedBuffer, Request};
use storage::{ByteRange, Format, OpenOptions};

const FILE_SIZE: usize = 64 << 20;

fn reads(criterion: &mut Criterion) {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").expect("tmpfs at /dev/shm");
    file.as_file()
        .write_all_at(&vec![7; FILE_SIZE], 0)
        .expect("fill the file");
    for len in [4 << 10, 64 << 10] {
        for depth in [1u64, 32] {
            let mut group = criterion.benchmark_group(format!("read {} KiB", len >> 10));
            group.throughput(Throughput::Bytes(len * depth));
            group.bench_function(BenchmarkId::new("pread", depth), |bencher| {
                let mut bytes = vec![0; len as usize];
                bencher.iter(|| {
                    for index in 0..depth {
                        file.as_file()
                            .read_exact_at(&mut bytes, index * len)
                            .expect("read");
                    }
                    black_box(&bytes);
                });
            });
            for (name, kind) in [
                ("io_uring", EngineKind::IoUring),
                ("worker", EngineKind::Worker),
            ] {
                let options = OpenOptions {
                    read_only: true,
                    format: Some(Format::Raw),
                    ..OpenOptions::default()
                };
                let disk = storage::open(file.path(), &options).expect("open the disk");
                let mut queue = DiskQueue::new(disk, kind).expect("engine");
                let mut buffers: Vec<_> = (0..depth)
                    .map(|_| OwnedBuffer::new(vec![0; len as usize]))
                    .collect();
                group.bench_function(BenchmarkId::new(name, depth), |bencher| {
                    bencher.iter(|| {
                        for (index, buffer) in (0..).zip(buffers.drain(..)) {
                            let range = ByteRange::new(index * len, len).expect("in the disk");
                            queue.submit(Request::Read(range), buffer);
                        }
                        queue.drain();
                        while let Some(completion) = queue.completion() {
                            completion.result.expect("read");
                            buffers.push(completion.buffer);
                        }
                    });
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, reads);
criterion_main!(benches);
