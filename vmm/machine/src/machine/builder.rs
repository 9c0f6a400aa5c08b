//! Puts the devices of a machine together.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use devices::bus::{Bus, BusDevice};
use devices::device_list::DeviceList;
use devices::legacy::{
    AcpiPm, BootMark, BootTimer, CmosRtc, I8042, PowerSink, Pvpanic, SerialConsole, SerialInput,
    SerialPort,
};
use devices::lifecycle::Device;
use devices::lock;
use devices::virtio::VirtioDevice;
use devices::virtio::balloon::VirtioBalloon;
use devices::virtio::block::{BlockConfig, VirtioBlock};
use devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use devices::virtio::rng::VirtioRng;
use devices::vmgenid::VmGenId;
use event_manager::MutEventSubscriber;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::balloon;
use super::domain::SharingDomain;
use super::error::{StartError, host};
use super::events::{event, new_interrupt};
use super::sharing::Plan;
use super::surroundings::Subscriber;
use super::vsock::{Vsock, VsockHost};
use crate::disk::open_disk;
use crate::pmem::{MapBudget, Pmem};
use config::{BalloonConfig, DriveConfig, VmConfig};
use kvm::boot::MmioDevice;
use kvm::layout;
use kvm::vm::{Buses, Vm};

/// Long enough that a guest does not wait for a free entry with the engine's ring full.
const BLOCK_QUEUE_SIZE: u16 = 128;

/// A balloon, and whether the guest is to report its free pages there.
pub(super) struct Balloon {
    pub(super) device: Arc<Mutex<VirtioBalloon>>,
    pub(super) reports: bool,
}

/// What the host uses of the devices of a PC.
pub(super) struct Legacy {
    pub(super) keyboard: Arc<Mutex<I8042>>,
    pub(super) boot_mark: BootMark,
}

/// The devices of a machine while it is put together.
pub(super) struct Builder<'a> {
    pub(super) vm: &'a Vm,
    pub(super) buses: Buses,
    pub(super) virtio: Vec<MmioDevice>,
    /// All devices, each virtio device before its transport.
    pub(super) list: DeviceList,
    /// The virtio devices, which may write to guest memory at any time.
    pub(super) devices: Vec<Arc<Mutex<dyn VirtioDevice>>>,
    /// What the event loop is to serve.
    pub(super) subscribers: Vec<Subscriber>,
}

impl<'a> Builder<'a> {
    pub(super) fn new(vm: &'a Vm) -> Self {
        Self {
            vm,
            buses: Buses {
                pio: Bus::new(),
                mmio: Bus::new(),
            },
            virtio: Vec::new(),
            list: DeviceList::default(),
            devices: Vec::new(),
            subscribers: Vec::new(),
        }
    }

    /// Adds the drives, the root device first: a guest names its disks in the order it finds them.
    pub(super) fn add_drives(
        &mut self,
        configs: &[DriveConfig],
        plan: &Plan,
    ) -> Result<BTreeMap<String, Arc<Mutex<VirtioBlock>>>, StartError> {
        let root = configs.iter().filter(|drive| drive.is_root_device);
        let others = configs.iter().filter(|drive| !drive.is_root_device);
        let mut drives = BTreeMap::new();
        for drive in root.chain(others) {
            let mut block = new_block(drive)?;
            block.share(plan.of_drive(drive));
            let lost_pages = plan.lost_pages().clone();
            block.on_fault(Arc::new(move || lost_pages.request_failed()));
            let device = Arc::new(Mutex::new(block));
            self.add_virtio(&drive.drive_id, device.clone())?;
            drives.insert(drive.drive_id.clone(), device);
        }
        Ok(drives)
    }

    pub(super) fn add_entropy(&mut self) -> Result<(), StartError> {
        let interrupt = new_interrupt("entropy device")?;
        let rng = VirtioRng::new(interrupt).map_err(host("entropy device"))?;
        self.add_virtio("entropy", Arc::new(Mutex::new(rng)))
    }

    /// Adds the vsock device that is asked for, if one is.
    pub(super) fn add_vsock(
        &mut self,
        config: &VmConfig,
        host: VsockHost,
    ) -> Result<Option<Vsock>, StartError> {
        let vsock = Vsock::new(config, host)?;
        if let Some(vsock) = &vsock {
            self.add_virtio("vsock", vsock.device.clone())?;
        }
        Ok(vsock)
    }

    /// Adds the balloon that is asked for, or, where all is to be shared, one that has the guest tell of what it frees:
    /// that is the better part of what a guest need not hold.
    pub(super) fn add_balloon(
        &mut self,
        config: Option<BalloonConfig>,
        plan: &Plan,
    ) -> Result<Option<Balloon>, StartError> {
        let has_room = self.virtio.len() < layout::VIRTIO_GSIS.len();
        let unasked = (plan.is_all() && has_room).then(BalloonConfig::reporting);
        let Some(config) = config.or(unasked) else {
            return Ok(None);
        };
        let device = balloon::device(config, plan.memory().clone())?;
        self.add_virtio("balloon", device.clone())?;
        Ok(Some(Balloon {
            device,
            reports: config.free_page_reporting,
        }))
    }

    /// Puts a virtio device on the next free interrupt line, registers its eventfds, and has the event loop serve it.
    pub(super) fn add_virtio<D: VirtioDevice + MutEventSubscriber + 'static>(
        &mut self,
        id: &str,
        device: Arc<Mutex<D>>,
    ) -> Result<(), StartError> {
        let index = self.virtio.len();
        let gsi = *layout::VIRTIO_GSIS
            .get(index)
            .ok_or(StartError::TooManyDevices)?;
        let base = layout::VIRTIO_MMIO_START + index as u64 * layout::VIRTIO_MMIO_SIZE;
        {
            let device = lock(&device);
            self.vm.register_irqfd(device.interrupt().irqfd(), gsi)?;
            for (queue, kick) in (0..).zip(device.kicks()) {
                if !device.is_synchronous(queue as usize) {
                    self.vm.register_ioevent(kick, base + QUEUE_NOTIFY, queue)?;
                }
            }
        }
        let transport = MmioTransport::new(device.clone(), self.vm.memory().clone());
        let transport = Arc::new(Mutex::new(transport));
        self.list.add(id, device.clone());
        self.list.add(id, transport.clone());
        self.subscribers.push(device.clone());
        self.devices.push(device);
        self.buses
            .mmio
            .insert(base, MmioTransport::SIZE, transport)?;
        // The window lies in the hole below 4 GiB.
        self.virtio.push(MmioDevice {
            base: base as u32,
            size: MmioTransport::SIZE as u32,
            gsi,
        });
        Ok(())
    }

    /// Puts a pmem device behind a transport, and a guard where the guest must not write.
    pub(super) fn add_pmem(&mut self, id: &str, pmem: &Pmem) -> Result<(), StartError> {
        if let Some(guard) = pmem.guard() {
            let writes = guard.writes.clone();
            self.buses.mmio.insert(guard.address, guard.len, writes)?;
        }
        self.add_virtio(id, pmem.device().clone())
    }

    /// The generation ID, where the tables of the guest say that it is.
    pub(super) fn add_generation(&mut self) -> Result<Arc<Mutex<VmGenId>>, StartError> {
        let generation = VmGenId::new(GuestAddress(layout::VM_GENERATION_ID))?;
        self.vm
            .register_irqfd(generation.irqfd(), layout::GENERATION_GSI)?;
        let generation = Arc::new(Mutex::new(generation));
        self.list.add("generation", generation.clone());
        Ok(generation)
    }

    fn add_port(
        &mut self,
        port: u16,
        count: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), StartError> {
        Ok(self.buses.pio.insert(port.into(), count, device)?)
    }

    /// Adds a device of a PC at its ports.
    fn add_legacy_device<D: Device + BusDevice + 'static>(
        &mut self,
        (port, count): (u16, u64),
        device: D,
    ) -> Result<Arc<Mutex<D>>, StartError> {
        let device = Arc::new(Mutex::new(device));
        self.add_port(port, count, device.clone())?;
        self.list.add("", device.clone());
        Ok(device)
    }

    pub(super) fn add_serial(
        &mut self,
        out: OwnedFd,
        drained: EventFd,
    ) -> Result<SerialConsole, StartError> {
        let irqfd = event("serial port")?;
        self.vm.register_irqfd(&irqfd, layout::SERIAL_GSI)?;
        let (port, console) =
            SerialPort::new(out, SerialInput { irqfd, drained }).map_err(host("serial port"))?;
        self.add_port(
            layout::SERIAL_PORT,
            SerialPort::PORTS,
            Arc::new(Mutex::new(port)),
        )?;
        self.list.add("", Arc::new(Mutex::new(console.clone())));
        Ok(console)
    }

    pub(super) fn add_legacy(&mut self, power: &PowerSink) -> Result<Legacy, StartError> {
        let irqfd = event("keyboard controller")?;
        self.vm.register_irqfd(&irqfd, layout::I8042_GSI)?;
        let timer = BootTimer::default();
        let boot_mark = timer.mark();
        // Port 0x61 between its two ports is the PIT's, where there is one.
        let keyboard = I8042::new(power.clone(), irqfd);
        let keyboard = self.add_legacy_device((layout::I8042_PORT, I8042::PORTS), keyboard)?;
        self.add_legacy_device((layout::RTC_PORT, CmosRtc::PORTS), CmosRtc::new())?;
        self.add_legacy_device((layout::PVPANIC_PORT, 1), Pvpanic::new(power.clone()))?;
        let pm = AcpiPm::new(power.clone());
        self.add_legacy_device((layout::ACPI_PM_PORT, AcpiPm::PORTS), pm)?;
        self.add_legacy_device((layout::BOOT_TIMER_PORT, 1), timer)?;
        Ok(Legacy {
            keyboard,
            boot_mark,
        })
    }
}

fn new_block(drive: &DriveConfig) -> Result<VirtioBlock, StartError> {
    let disk = open_disk(drive).map_err(|source| StartError::Drive {
        drive: drive.drive_id.clone(),
        source,
    })?;
    let config = BlockConfig {
        disk,
        serial: drive
            .serial
            .clone()
            .unwrap_or_else(|| drive.drive_id.clone()),
        queues: drive.num_queues,
        queue_size: BLOCK_QUEUE_SIZE,
        engine: drive.io_engine.into(),
    };
    VirtioBlock::new(config, new_interrupt("drive")?).map_err(|source| StartError::Block {
        drive: drive.drive_id.clone(),
        source,
    })
}

/// Maps the disks of all pmem devices, the root device before the others: a guest numbers them in the order it finds
/// them.
pub(super) fn attach_pmem(
    config: &VmConfig,
    vm: &mut Vm,
) -> Result<Vec<(String, Pmem)>, StartError> {
    let mut budget = MapBudget::of_host();
    let domain = SharingDomain::of(&config.sharing);
    let root = config.pmem.iter().filter(|pmem| pmem.root_device);
    let others = config.pmem.iter().filter(|pmem| !pmem.root_device);
    root.chain(others)
        .map(|pmem| {
            let interrupt = new_interrupt("pmem device")?;
            let attached = Pmem::attach(pmem, vm, interrupt, &mut budget, &|file| {
                domain.admits(file)
            });
            let attached = attached.map_err(|source| StartError::Pmem {
                pmem: pmem.id.clone(),
                source: Box::new(source),
            })?;
            Ok((pmem.id.clone(), attached))
        })
        .collect()
}
