//! Puts the devices of a machine together.
//!
//! Each module here adds the devices of one kind, with what is behind them on the host. [`VIRTIO`] names them all: to
//! add a kind of device to machines is to write its module, and a line there.

mod balloon;
mod drives;
mod entropy;
mod events;
mod generation;
mod legacy;
mod pmem;
mod vsock;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use devices::bus::{Bus, BusDevice};
use devices::device_list::DeviceList;
use devices::legacy::{BootMark, SerialConsole};
use devices::lifecycle::Device;
use devices::lock;
use devices::virtio::VirtioDevice;
use devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use event_manager::MutEventSubscriber;
use vmm_sys_util::eventfd::EventFd;

use super::error::StartError;
use super::sharing::Plan;
use super::surroundings::Subscriber;
use crate::pmem::Pmem;
use config::VmConfig;
use kvm::boot::MmioDevice;
use kvm::layout;
use kvm::vm::{Buses, Vm};

pub(super) use balloon::ID as BALLOON;
pub(super) use pmem::map as map_pmem;
pub use vsock::VsockHost;

/// Adds the devices of a kind that a configuration asks for, if it asks for any.
type Attach = fn(&mut Builder<'_>, &VmConfig) -> Result<(), StartError>;

/// The virtio devices, in the order in which the guest finds them.
const VIRTIO: [Attach; 5] = [
    drives::attach,
    pmem::attach,
    entropy::attach,
    vsock::attach,
    // The last: one that nobody has asked for is left out where there is no interrupt line for it.
    balloon::attach,
];

/// What is behind a device on the host, and goes with the machine: dropped where it does not start.
pub(super) trait Backing: Send {
    /// Ends it in good order. The device was reset, so no request of it is in flight. What fails is logged, since the
    /// guest has ended and nobody waits for an answer.
    fn close(&self);
}

/// The ends of the guest's serial console on the host.
pub(super) struct SerialEnds {
    /// Where it writes.
    pub(super) out: OwnedFd,
    /// Becomes readable when the guest has read all input.
    pub(super) drained: EventFd,
}

/// The devices of a machine while it is put together.
pub(super) struct Builder<'a> {
    pub(super) vm: &'a Vm,
    pub(super) plan: &'a Plan,
    /// The pmem devices, whose disks are mapped already.
    pub(super) pmem: &'a [(String, Arc<Pmem>)],
    pub(super) vsock: VsockHost,
    pub(super) attached: Attached,
}

/// The devices of a machine.
pub(super) struct Attached {
    pub(super) buses: Buses,
    /// Where the guest finds the virtio devices.
    pub(super) virtio: Vec<MmioDevice>,
    /// All devices, each virtio device before its transport.
    pub(super) list: DeviceList,
    /// The virtio devices, which may write to guest memory at any time.
    pub(super) devices: Vec<Arc<Mutex<dyn VirtioDevice>>>,
    /// What the event loop is to serve.
    pub(super) subscribers: Vec<Subscriber>,
    /// What is behind the devices.
    pub(super) backings: Vec<Box<dyn Backing>>,
    /// Whether a device connects to sockets of the host once the guest runs.
    pub(super) connects: bool,
    /// Whether the guest is to report its free pages.
    pub(super) reports_free_pages: bool,
}

/// What the host uses of the devices of a PC.
pub(super) struct Pc {
    pub(super) console: SerialConsole,
    pub(super) boot_mark: BootMark,
}

impl<'a> Builder<'a> {
    pub(super) fn new(
        vm: &'a Vm,
        plan: &'a Plan,
        pmem: &'a [(String, Arc<Pmem>)],
        vsock: VsockHost,
    ) -> Self {
        let attached = Attached {
            buses: Buses {
                pio: Bus::new(),
                mmio: Bus::new(),
            },
            virtio: Vec::new(),
            list: DeviceList::default(),
            devices: Vec::new(),
            subscribers: Vec::new(),
            backings: Vec::new(),
            connects: false,
            reports_free_pages: false,
        };
        Self {
            vm,
            plan,
            pmem,
            vsock,
            attached,
        }
    }

    /// Adds the virtio devices that `config` asks for, and the generation ID, where the tables of the guest say that it is.
    pub(super) fn add_configured(&mut self, config: &VmConfig) -> Result<(), StartError> {
        for attach in VIRTIO {
            attach(self, config)?;
        }
        generation::attach(self)
    }

    /// Whether there is an interrupt line for another virtio device.
    fn has_room(&self) -> bool {
        self.attached.virtio.len() < layout::VIRTIO_GSIS.len()
    }

    /// Puts a virtio device on the next free interrupt line, registers its eventfds, and has the event loop serve it.
    fn add_virtio<D: VirtioDevice + MutEventSubscriber + 'static>(
        &mut self,
        id: &str,
        device: Arc<Mutex<D>>,
    ) -> Result<(), StartError> {
        let attached = &mut self.attached;
        let index = attached.virtio.len();
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
        attached.list.add(id, device.clone());
        attached.list.add(id, transport.clone());
        attached.subscribers.push(device.clone());
        attached.devices.push(device);
        attached
            .buses
            .mmio
            .insert(base, MmioTransport::SIZE, transport)?;
        // The window lies in the hole below 4 GiB.
        attached.virtio.push(MmioDevice {
            base: base as u32,
            size: MmioTransport::SIZE as u32,
            gsi,
        });
        Ok(())
    }

    fn add_port(
        &mut self,
        (port, count): (u16, u64),
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), StartError> {
        Ok(self.attached.buses.pio.insert(port.into(), count, device)?)
    }

    /// Adds a device of a PC at its ports.
    fn add_port_device<D: Device + BusDevice + 'static>(
        &mut self,
        ports: (u16, u64),
        device: D,
    ) -> Result<(), StartError> {
        let device = Arc::new(Mutex::new(device));
        self.add_port(ports, device.clone())?;
        self.attached.list.add("", device);
        Ok(())
    }
}
