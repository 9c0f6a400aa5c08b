//! What each request of a drive pays for being in the histograms: two looks at the clock and a record. Unit: time a request.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use devices::latency::Latencies;

fn latencies(criterion: &mut Criterion) {
    let latencies = Latencies::default();
    let mut group = criterion.benchmark_group("latency of a request");
    group.bench_function("two looks at the clock", |bencher| {
        bencher.iter(|| black_box(Instant::now()).elapsed());
    });
    group.bench_function("a record", |bencher| {
        bencher.iter(|| latencies.record(black_box(Duration::from_micros(70))));
    });
    group.bench_function("all of it", |bencher| {
        bencher.iter(|| {
            let begun = black_box(Instant::now());
            latencies.record(begun.elapsed());
        });
    });
    group.finish();
    black_box(latencies.read());
}

criterion_group!(benches, latencies);
criterion_main!(benches);
