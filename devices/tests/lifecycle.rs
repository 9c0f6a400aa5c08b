//! What holds of every kind of device, by the contract of `Device`.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it should be"
)]

use std::collections::BTreeSet;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use devices::KINDS;
use devices::bus::BusDevice;
use devices::device_list::DeviceList;
use devices::legacy::{
    AcpiPm, BootTimer, CmosRtc, I8042, PowerSink, Pvpanic, SerialInput, SerialPort,
};
use devices::lifecycle::{Device, DeviceKind};
use devices::metrics::Value;
use devices::service::{Service, Session};
use devices::virtio::balloon::{BalloonConfig, VirtioBalloon};
use devices::virtio::block::{BlockConfig, VirtioBlock};
use devices::virtio::mmio::MmioTransport;
use devices::virtio::net::{Link, NetConfig, NetLimits, Offloads, VirtioNet};
use devices::virtio::pmem::{MappingFigures, PmemConfig, VirtioPmem};
use devices::virtio::rng::VirtioRng;
use devices::virtio::vsock::{VirtioVsock, VsockConfig};
use devices::virtio::{Interrupt, VirtioDevice};
use devices::vmclock::VmClock;
use devices::vmgenid::VmGenId;
use storage::io::EngineKind;
use storage::{Format, OpenOptions};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

const MEMORY: usize = 1 << 20;

fn event() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

fn interrupt() -> Arc<Interrupt> {
    Arc::new(Interrupt::new(event()))
}

fn sink() -> PowerSink {
    Arc::new(|_| {})
}

struct NoService;

impl Service for NoService {
    fn open(&self) -> Box<dyn Session> {
        unreachable!("nobody connects")
    }
}

fn serial() -> devices::legacy::SerialConsole {
    let (out, _) = UnixStream::pair().unwrap();
    let (irqfd, drained) = (event(), event());
    let input = SerialInput { irqfd, drained };
    SerialPort::new(out.into(), None, input).unwrap().1
}

fn block() -> VirtioBlock {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&vec![0; 1 << 16]).unwrap();
    let options = OpenOptions {
        format: Some(Format::Raw),
        ..OpenOptions::default()
    };
    let config = BlockConfig {
        disk: storage::open(file.path(), &options).unwrap(),
        serial: "disk".into(),
        queues: 1,
        queue_size: 16,
        engine: EngineKind::Auto,
    };
    VirtioBlock::new(config, interrupt()).unwrap()
}

fn pmem() -> VirtioPmem {
    let config = PmemConfig {
        start: 4 << 30,
        size: 2 << 20,
        backing: None,
        mapping: MappingFigures::default(),
    };
    VirtioPmem::new(config, interrupt()).unwrap()
}

fn balloon() -> VirtioBalloon {
    let config = BalloonConfig {
        target_pages: 16,
        deflate_on_oom: true,
        statistics_interval: 1,
        hinting: true,
        reporting: true,
    };
    VirtioBalloon::new(&config, Arc::new(|_, _| Ok(())), interrupt()).unwrap()
}

fn vsock() -> VirtioVsock {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vsock");
    let config = VsockConfig {
        guest_cid: 3,
        listener: UnixListener::bind(&path).unwrap(),
        path: &path,
        service: Some((1, Arc::new(NoService))),
    };
    VirtioVsock::new(config, interrupt()).unwrap()
}

/// A network on which nothing happens.
struct NoNetwork(UnixStream);

impl Link for NoNetwork {
    fn pairs(&self) -> u16 {
        1
    }

    fn queue(&self, _: u16) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }

    fn has_uso(&self) -> bool {
        true
    }

    fn use_pairs(&self, _: u16) -> std::io::Result<()> {
        Ok(())
    }

    fn set_offloads(&self, _: Offloads) -> std::io::Result<()> {
        Ok(())
    }
}

fn net() -> VirtioNet {
    let config = NetConfig {
        link: Box::new(NoNetwork(UnixStream::pair().unwrap().0)),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
        limits: NetLimits::default(),
        station: None,
    };
    VirtioNet::new(config, interrupt()).unwrap()
}

/// Adds a virtio device and its transport.
fn add(list: &mut DeviceList, id: &str, device: impl VirtioDevice + 'static) {
    let memory = devices::GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let device = Arc::new(Mutex::new(device));
    let transport = MmioTransport::new(device.clone(), memory);
    list.add(id, device);
    list.add(id, Arc::new(Mutex::new(transport)));
}

/// A machine with a device of each kind, not used yet.
fn one_of_each() -> DeviceList {
    let mut list = DeviceList::default();
    list.add("", Arc::new(Mutex::new(serial())));
    list.add("", Arc::new(Mutex::new(I8042::new(sink(), event()))));
    list.add("", Arc::new(Mutex::new(CmosRtc::new())));
    list.add("", Arc::new(Mutex::new(Pvpanic::new(sink()))));
    list.add("", Arc::new(Mutex::new(AcpiPm::new(sink()))));
    list.add("", Arc::new(Mutex::new(BootTimer::default())));
    let generation = VmGenId::new(GuestAddress(0x1000)).unwrap();
    list.add("", Arc::new(Mutex::new(generation)));
    let clock = VmClock::new(GuestAddress(0x2000)).unwrap();
    list.add("", Arc::new(Mutex::new(clock)));
    add(&mut list, "root", block());
    add(&mut list, "data", block());
    add(&mut list, "base", pmem());
    add(&mut list, "rng", VirtioRng::new(interrupt()).unwrap());
    add(&mut list, "balloon", balloon());
    add(&mut list, "vsock", vsock());
    add(&mut list, "eth0", net());
    list
}

#[test]
fn every_kind_of_the_table_is_tested_here_and_no_other() {
    let names = |kinds: &mut dyn Iterator<Item = &'static DeviceKind>| {
        kinds.map(|kind| kind.name).collect::<BTreeSet<_>>()
    };
    let tested = names(&mut one_of_each().iter().map(|entry| entry.kind));
    assert_eq!(tested, names(&mut KINDS.into_iter()));
}

#[test]
fn a_device_that_was_restored_is_saved_as_it_was() {
    let saved = one_of_each();
    saved.pause();
    let states = saved.save().unwrap();
    let json = serde_json::to_string(&states).unwrap();
    let restored = one_of_each();
    restored
        .restore(serde_json::from_str(&json).unwrap())
        .unwrap();
    assert_eq!(restored.save().unwrap(), states);
    restored.resume();
    restored.pause();
    assert_eq!(restored.save().unwrap(), states);
}

#[test]
fn a_state_of_another_shape_is_refused_with_the_name_of_the_device() {
    for entry in one_of_each().iter() {
        let mut device = devices::lock(&entry.device);
        let error = device.restore(&"text".into()).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("{}: its state cannot be read", entry.kind.name)
        );
    }
}

#[test]
fn a_device_that_was_reset_is_as_it_was_made() {
    let list = one_of_each();
    let fresh = list.save().unwrap();
    list.reset();
    assert_eq!(list.save().unwrap(), fresh);
    // What a guest has set in the devices that it reaches without a transport.
    let mut rtc = CmosRtc::new();
    let fresh = rtc.save().unwrap();
    rtc.write(0, &[0x0d]);
    assert_ne!(rtc.save().unwrap(), fresh);
    rtc.reset();
    assert_eq!(rtc.save().unwrap(), fresh);
    let mut keyboard = I8042::new(sink(), event());
    let fresh = keyboard.save().unwrap();
    keyboard.type_ctrl_alt_del();
    keyboard.write(4, &[0x60]);
    assert_ne!(keyboard.save().unwrap(), fresh);
    keyboard.reset();
    assert_eq!(keyboard.save().unwrap(), fresh);
    let mut console = serial();
    let fresh = console.save().unwrap();
    console.input(b"ls");
    assert_ne!(console.save().unwrap(), fresh);
    console.reset();
    assert_eq!(console.save().unwrap(), fresh);
}

#[test]
fn a_metric_has_one_meaning_and_one_value_a_device() {
    let mut about = std::collections::BTreeMap::new();
    for device in one_of_each().metrics() {
        let group = device.kind.metrics.unwrap();
        let (mut fields, mut series) = (BTreeSet::new(), BTreeSet::new());
        assert!(!device.metrics.is_empty(), "{group:?}");
        for metric in device.metrics {
            assert!(metric.name.starts_with(group.name), "{metric:?}");
            assert!(!metric.help.is_empty(), "{metric:?}");
            assert!(
                series.insert((
                    metric.name,
                    metric.unit.map(|unit| unit as u8),
                    metric.label
                )),
                "{metric:?}"
            );
            if let Some(field) = metric.field {
                assert!(fields.insert(field), "{metric:?}");
            }
            let kind = match metric.value {
                Value::Counter(_) => 0,
                Value::Gauge(_) => 1,
                Value::Latencies(_) => 2,
            };
            let family = (metric.name, metric.unit.map(|unit| unit as u8));
            let meaning = (metric.help, kind, metric.label.map(|(name, _)| name));
            let known = *about.entry(family).or_insert(meaning);
            assert_eq!(known, meaning, "{family:?}");
        }
    }
}
