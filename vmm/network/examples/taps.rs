//! Measures what guests' networks cost the host: `cargo run -p network --example taps -- [GUESTS]`, as root.
//!
//! It runs in a network namespace of its own. The memory is what the kernel counts as slab that cannot be reclaimed,
//! as memory of each CPU and as `vmalloc`, of the whole host: let nothing else run beside it.

use std::error::Error;
use std::net::Ipv4Addr;
use std::time::Instant;

use network::{Attachment, HostNetworks, Network, Networks, mac_of};
use rustix::thread::{UnshareFlags, unshare_unsafe};

fn main() -> Result<(), Box<dyn Error>> {
    let count: u32 = match std::env::args().nth(1) {
        Some(count) => count.parse()?,
        None => 1000,
    };
    // SAFETY: the process has one thread, and no descriptor of the network that it leaves.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    for (what, prefix) in [
        ("IPv4", None),
        ("IPv4 and IPv6", Some("fd00:1::/40".parse()?)),
    ] {
        let mut lan = Network::new("lan", "10.0.0.0/12".parse()?);
        lan.prefix = prefix;
        measure(what, &lan, count)?;
    }
    Ok(())
}

fn measure(what: &str, lan: &Network, count: u32) -> Result<(), Box<dyn Error>> {
    let first = lan.range.network().to_bits() + 2;
    let guest = |number: u32| {
        let v4 = Ipv4Addr::from_bits(first + number);
        let (mac, addresses) = (mac_of(v4), lan.addresses_of(v4));
        Attachment {
            network: lan.name.clone(),
            outer: addresses,
            inner: addresses,
            mac,
            published: Vec::new(),
        }
    };
    let guests: Vec<_> = (0..count).map(guest).collect();
    let mut host = HostNetworks::rebuild(Networks::new(vec![lan.clone()])?, Vec::new())?;
    let before = kernel_memory()?;
    let start = Instant::now();
    let taps = host.attach(&guests)?;
    let attached = start.elapsed();
    let each = kernel_memory()?.saturating_sub(before) / u64::from(count);
    println!(
        "{what}: {count} guests: {each} KiB of kernel memory each, attached in {attached:.2?}"
    );
    let one = [guest(count)];
    let start = Instant::now();
    let tap = host.attach(&one)?;
    let attached = start.elapsed();
    let start = Instant::now();
    host.detach(&[one[0].outer.v4])?;
    println!(
        "{what}: one more: attached in {attached:.2?}, detached in {:.2?}",
        start.elapsed()
    );
    drop(tap);
    let start = Instant::now();
    let mut host = HostNetworks::rebuild(host.networks().clone(), guests.clone())?;
    println!("{what}: rebuilt in {:.2?}", start.elapsed());
    let start = Instant::now();
    let addresses: Vec<_> = guests.iter().map(|guest| guest.outer.v4).collect();
    host.detach(&addresses)?;
    println!("{what}: all detached in {:.2?}", start.elapsed());
    let start = Instant::now();
    drop(taps);
    println!("{what}: descriptors closed in {:.2?}", start.elapsed());
    network::remove_all()?;
    Ok(())
}

/// KiB.
fn kernel_memory() -> Result<u64, Box<dyn Error>> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let is_counted = |line: &&str| {
        ["SUnreclaim:", "Percpu:", "VmallocUsed:"]
            .iter()
            .any(|name| line.starts_with(name))
    };
    let value = |line: &str| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok();
    Ok(text.lines().filter(is_counted).filter_map(value).sum())
}
