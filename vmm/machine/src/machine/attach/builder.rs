//! The devices of a machine while it is put together: their addresses, interrupt lines, and what serves them.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use devices::bus::{Bus, BusDevice};
use devices::device_list::DeviceList;
use devices::legacy::{BootMark, SerialConsole};
use devices::lifecycle::Device;
use devices::lock;
use devices::rate_limiter::BucketLimits;
use devices::virtio::VirtioDevice;
use devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use event_manager::MutEventSubscriber;
use vmm_sys_util::eventfd::EventFd;

use crate::machine::error::StartError;
use crate::machine::sharing::Plan;
use crate::machine::surroundings::{NetworkHost, Subscriber, VsockHost};
use crate::pmem::Pmem;
use kvm::boot::MmioDevice;
use kvm::layout;
use kvm::vm::{Buses, Vm};

/// What is behind a device on the host, and goes with the machine: dropped where it does not start.
pub(in crate::machine) trait HostPart: Send {
    /// Ends it in good order. The device was reset, so no request of it is in flight. What fails is logged, since the
    /// guest has ended and nobody waits for an answer.
    fn close(&self);
}

/// The ends of the guest's serial console on the host.
pub(in crate::machine) struct SerialEnds {
    /// Where it writes.
    pub(in crate::machine) out: OwnedFd,
    /// How much it writes at most; what goes beyond is dropped.
    pub(in crate::machine) limit: Option<BucketLimits>,
    /// Becomes readable when the guest has read all input.
    pub(in crate::machine) drained: EventFd,
}

/// The devices of a machine while it is put together.
pub(in crate::machine) struct Builder<'a> {
    pub(in crate::machine) vm: &'a Vm,
    pub(in crate::machine) plan: &'a Plan,
    /// The pmem devices, whose disks are mapped already.
    pub(in crate::machine) pmem: &'a [(String, Arc<Pmem>)],
    pub(in crate::machine) vsock: VsockHost,
    pub(super) network: NetworkHost,
    pub(in crate::machine) attached: Attached,
}

/// The devices of a machine.
pub(in crate::machine) struct Attached {
    pub(in crate::machine) buses: Buses,
    /// Where the guest finds the virtio devices.
    pub(in crate::machine) virtio: Vec<MmioDevice>,
    /// All devices, each virtio device before its transport.
    pub(in crate::machine) list: DeviceList,
    /// The virtio devices, which may write to guest memory at any time.
    pub(in crate::machine) devices: Vec<Arc<Mutex<dyn VirtioDevice>>>,
    /// What the event loop is to serve.
    pub(in crate::machine) subscribers: Vec<Subscriber>,
    /// What is behind the devices.
    pub(in crate::machine) host_parts: Vec<Box<dyn HostPart>>,
    /// Whether a device connects to sockets of the host once the guest runs.
    pub(in crate::machine) connects: bool,
    /// Whether the guest is to report its free pages.
    pub(in crate::machine) reports_free_pages: bool,
}

/// What the host uses of the devices of a PC.
pub(in crate::machine) struct Pc {
    pub(in crate::machine) console: SerialConsole,
    pub(in crate::machine) boot_mark: BootMark,
}

impl<'a> Builder<'a> {
    pub(in crate::machine) fn new(
        vm: &'a Vm,
        plan: &'a Plan,
        pmem: &'a [(String, Arc<Pmem>)],
        vsock: VsockHost,
        network: NetworkHost,
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
            host_parts: Vec::new(),
            connects: false,
            reports_free_pages: false,
        };
        Self {
            vm,
            plan,
            pmem,
            vsock,
            network,
            attached,
        }
    }

    /// Whether there is an interrupt line for another virtio device.
    pub(super) fn has_room(&self) -> bool {
        self.attached.virtio.len() < layout::VIRTIO_GSIS.len()
    }

    /// Puts a virtio device on the next free interrupt line, registers its eventfds, and has the event loop serve it.
    pub(super) fn add_virtio<D: VirtioDevice + MutEventSubscriber + 'static>(
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

    pub(super) fn add_port(
        &mut self,
        (port, count): (u16, u64),
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), StartError> {
        Ok(self.attached.buses.pio.insert(port.into(), count, device)?)
    }

    /// Adds a device of a PC at its ports.
    pub(super) fn add_port_device<D: Device + BusDevice + 'static>(
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
