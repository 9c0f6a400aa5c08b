//! A guest: its VM, its devices, and their life from start to end.
//!
//! ```text
//! Machine::start ──> running <── pause / resume ──> paused ── shutdown ──> disks closed
//!                       └── GuestEnd, told once through `Surroundings::on_end`
//! ```
//!
//! The vCPUs run on threads of their own; all devices are served by the event loop that `start` adds them to. A machine itself is called
//! by one thread at a time.

mod cmdline;
mod drive_job;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::bus::{Bus, BusRangeError};
use devices::legacy::{
    AcpiPm, CmosRtc, I8042, PowerEvent, PowerSink, Pvpanic, SerialConsole, SerialInput, SerialPort,
};
use devices::virtio::block::{BlockConfig, BlockError, BlockMetrics, VirtioBlock};
use devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use devices::virtio::rng::{RngMetrics, VirtioRng};
use devices::virtio::{Interrupt, VirtioDevice};
use event_manager::{MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{self, BootError, BootSource, MmioDevice, Protocol};
use crate::config::{DriveConfig, VmConfig};
use crate::layout;
use crate::pmem::{MapBudget, Pmem, PmemCounters, PmemError};
pub use drive_job::{DriveError, DriveJob, DriveTask, JobState, JobStatus};

use crate::vm::{Buses, VcpuExit, Vcpus, Vm, VmError, VmSettings};

/// What the event loop serves.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// How a guest came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It powered off.
    PowerOff,
    /// It asked for a reset.
    Reset,
    /// Its kernel panicked, and told so by pvpanic.
    Panic,
    /// A triple fault.
    TripleFault,
    /// It cannot go on, for a reason that is not its own decision.
    Failed(String),
}

impl From<VcpuExit> for GuestEnd {
    fn from(exit: VcpuExit) -> Self {
        match exit {
            VcpuExit::Shutdown => Self::PowerOff,
            VcpuExit::Reset => Self::Reset,
            VcpuExit::Crash => Self::Panic,
            VcpuExit::TripleFault => Self::TripleFault,
            VcpuExit::Failed(error) => Self::Failed(error.to_string()),
        }
    }
}

/// What a machine is given by the program that runs it.
pub struct Surroundings {
    /// Where the guest's serial console writes.
    pub serial_out: OwnedFd,
    /// Becomes readable when the guest has read all input of its console.
    pub serial_drained: EventFd,
    /// Told once how the guest ended, on a thread that must not be held up.
    pub on_end: Arc<dyn Fn(GuestEnd) + Send + Sync>,
}

/// Why a guest cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No kernel is configured.
    #[error("no kernel is configured: set boot-source")]
    NoKernel,
    /// The VM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The kernel or the initrd.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A drive's file.
    #[error("drive {drive}: {source}")]
    Drive {
        /// `drive_id`.
        drive: String,
        /// What is wrong with its file.
        source: storage::OpenError,
    },
    /// A drive's device.
    #[error("drive {drive}: {source}")]
    Block {
        /// `drive_id`.
        drive: String,
        /// What is wrong with its settings.
        source: BlockError,
    },
    /// A pmem device.
    #[error("pmem {pmem}: {source}")]
    Pmem {
        /// `id`.
        pmem: String,
        /// Why it cannot be.
        source: Box<PmemError>,
    },
    /// More devices than interrupt lines.
    #[error("a guest has at most {} virtio devices", layout::VIRTIO_GSIS.len())]
    TooManyDevices,
    /// Two devices want the same addresses.
    #[error(transparent)]
    Bus(#[from] BusRangeError),
    /// The host has no more of something.
    #[error("cannot make the {device}: {source}")]
    Host {
        /// The device.
        device: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
}

/// Why a running guest refuses a request.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// There is no drive of that name.
    #[error("there is no drive {0}")]
    NoDrive(String),
    /// The new file of a drive cannot be used.
    #[error("drive {drive}: {source}")]
    Drive {
        /// `drive_id`.
        drive: String,
        /// What is wrong with its file.
        source: storage::OpenError,
    },
    /// The new file differs in what the guest has been promised.
    #[error("drive {drive}: {source}")]
    Replacement {
        /// `drive_id`.
        drive: String,
        /// In what it differs.
        source: BlockError,
    },
    /// The disk of a drive cannot be changed as was asked for.
    #[error("drive {drive}: {source}")]
    Change {
        /// `drive_id`.
        drive: String,
        /// Why not.
        source: DriveError,
    },
    /// The guest has not read the keys typed before.
    #[error("the guest has not taken the last Ctrl-Alt-Del yet")]
    KeyboardBusy,
}

/// The counters of a machine's devices.
pub struct DeviceMetrics {
    /// By `drive_id`.
    pub drives: BTreeMap<String, Arc<BlockMetrics>>,
    /// By `id`.
    pub pmem: BTreeMap<String, PmemCounters>,
    /// Of the entropy device, where there is one.
    pub entropy: Option<Arc<RngMetrics>>,
}

/// A started guest.
pub struct Machine {
    vcpus: Vcpus,
    drives: BTreeMap<String, Arc<Mutex<VirtioBlock>>>,
    /// The last job of each drive.
    jobs: BTreeMap<String, Arc<DriveJob>>,
    pmem: BTreeMap<String, Pmem>,
    entropy: Option<Arc<Mutex<VirtioRng>>>,
    keyboard: Arc<Mutex<I8042>>,
    console: SerialConsole,
}

/// How often an ending machine looks whether a job has stopped.
const JOB_POLL: std::time::Duration = std::time::Duration::from_millis(5);

/// Long enough that a guest does not wait for a free entry with the engine's ring full.
const BLOCK_QUEUE_SIZE: u16 = 128;

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn host(device: &'static str) -> impl FnOnce(std::io::Error) -> StartError {
    move |source| StartError::Host { device, source }
}

fn event(device: &'static str) -> Result<EventFd, StartError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host(device))
}

/// The devices of a machine while it is put together.
struct Builder<'a> {
    vm: &'a Vm,
    buses: Buses,
    virtio: Vec<MmioDevice>,
}

impl Builder<'_> {
    /// Puts a virtio device on the next free interrupt line and registers its eventfds.
    fn add_virtio(&mut self, device: Arc<Mutex<dyn VirtioDevice>>) -> Result<(), StartError> {
        let index = self.virtio.len();
        let gsi = *layout::VIRTIO_GSIS
            .get(index)
            .ok_or(StartError::TooManyDevices)?;
        let base = layout::VIRTIO_MMIO_START + index as u64 * layout::VIRTIO_MMIO_SIZE;
        {
            let device = lock(&device);
            self.vm.register_irqfd(device.interrupt().irqfd(), gsi)?;
            for (queue, kick) in (0..).zip(device.kicks()) {
                self.vm.register_ioevent(kick, base + QUEUE_NOTIFY, queue)?;
            }
        }
        let transport = MmioTransport::new(device, self.vm.memory().clone());
        self.buses
            .mmio
            .insert(base, MmioTransport::SIZE, Arc::new(Mutex::new(transport)))?;
        // The window lies in the hole below 4 GiB.
        self.virtio.push(MmioDevice {
            base: base as u32,
            size: MmioTransport::SIZE as u32,
            gsi,
        });
        Ok(())
    }

    /// Puts a pmem device behind a transport, and a guard where the guest must not write.
    fn add_pmem(&mut self, pmem: &Pmem) -> Result<(), StartError> {
        if let Some(guard) = pmem.guard() {
            let writes = guard.writes.clone();
            self.buses.mmio.insert(guard.address, guard.len, writes)?;
        }
        self.add_virtio(pmem.device().clone())
    }

    fn add_port(
        &mut self,
        port: u16,
        count: u64,
        device: Arc<Mutex<dyn devices::bus::BusDevice>>,
    ) -> Result<(), StartError> {
        Ok(self.buses.pio.insert(port.into(), count, device)?)
    }

    fn add_serial(&mut self, out: OwnedFd, drained: EventFd) -> Result<SerialConsole, StartError> {
        let irqfd = event("serial port")?;
        self.vm.register_irqfd(&irqfd, layout::SERIAL_GSI)?;
        let (port, console) =
            SerialPort::new(out, SerialInput { irqfd, drained }).map_err(host("serial port"))?;
        self.add_port(
            layout::SERIAL_PORT,
            SerialPort::PORTS,
            Arc::new(Mutex::new(port)),
        )?;
        Ok(console)
    }

    fn add_legacy(&mut self, power: &PowerSink) -> Result<Arc<Mutex<I8042>>, StartError> {
        let irqfd = event("keyboard controller")?;
        self.vm.register_irqfd(&irqfd, layout::I8042_GSI)?;
        let keyboard = Arc::new(Mutex::new(I8042::new(power.clone(), irqfd)));
        // Port 0x61 between its two ports is the PIT's, where there is one.
        self.add_port(layout::I8042_PORT, I8042::PORTS, keyboard.clone())?;
        self.add_port(
            layout::RTC_PORT,
            CmosRtc::PORTS,
            Arc::new(Mutex::new(CmosRtc::new())),
        )?;
        self.add_port(
            layout::PVPANIC_PORT,
            1,
            Arc::new(Mutex::new(Pvpanic::new(power.clone()))),
        )?;
        self.add_port(
            layout::ACPI_PM_PORT,
            AcpiPm::PORTS,
            Arc::new(Mutex::new(AcpiPm::new(power.clone()))),
        )?;
        Ok(keyboard)
    }
}

fn new_interrupt(device: &'static str) -> Result<Arc<Interrupt>, StartError> {
    Ok(Arc::new(Interrupt::new(event(device)?)))
}

fn open_disk(drive: &DriveConfig) -> Result<Arc<dyn storage::Disk>, storage::OpenError> {
    let options = storage::OpenOptions {
        read_only: drive.is_read_only,
        format: drive.format.map(Into::into),
        parents: match &drive.parents {
            Some(folder) => storage::Parents::Within(folder.clone()),
            None => storage::Parents::Anywhere,
        },
        punch_holes: !drive.keep_space,
        ..storage::OpenOptions::default()
    };
    storage::open(&drive.path_on_host, &options)
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

/// Maps the disks of all pmem devices, the root device before the others: a guest numbers them in the order it finds them.
fn attach_pmem(config: &VmConfig, vm: &mut Vm) -> Result<Vec<(String, Pmem)>, StartError> {
    let mut budget = MapBudget::of_host();
    let root = config.pmem.iter().filter(|pmem| pmem.root_device);
    let others = config.pmem.iter().filter(|pmem| !pmem.root_device);
    root.chain(others)
        .map(|pmem| {
            let interrupt = new_interrupt("pmem device")?;
            let attached = Pmem::attach(pmem, vm, interrupt, &mut budget);
            let attached = attached.map_err(|source| StartError::Pmem {
                pmem: pmem.id.clone(),
                source: Box::new(source),
            })?;
            Ok((pmem.id.clone(), attached))
        })
        .collect()
}

/// Passes on the first call alone: a guest that panics and then resets has panicked.
fn only_first(on_end: Arc<dyn Fn(GuestEnd) + Send + Sync>) -> Arc<dyn Fn(GuestEnd) + Send + Sync> {
    let told = AtomicBool::new(false);
    Arc::new(move |end| {
        if !told.swap(true, Ordering::SeqCst) {
            on_end(end);
        }
    })
}

/// Tells of what the guest does to its power.
fn power_sink(on_end: Arc<dyn Fn(GuestEnd) + Send + Sync>) -> PowerSink {
    Arc::new(move |event| {
        on_end(match event {
            PowerEvent::PowerOff => GuestEnd::PowerOff,
            PowerEvent::Reset => GuestEnd::Reset,
            PowerEvent::Panic => GuestEnd::Panic,
        });
    })
}

fn changed(drive: &str, source: DriveError) -> MachineError {
    MachineError::Change {
        drive: drive.to_owned(),
        source,
    }
}

impl Machine {
    /// Builds the guest that `config` describes, adds its devices to the event loop, and lets it run.
    ///
    /// # Errors
    /// [`StartError`]; then nothing runs and every disk is closed again.
    pub fn start(
        config: &VmConfig,
        ops: &mut dyn SubscriberOps<Subscriber = Subscriber>,
        surroundings: Surroundings,
    ) -> Result<Self, StartError> {
        let source = config.boot_source.as_ref().ok_or(StartError::NoKernel)?;
        let settings = VmSettings {
            memory_bytes: u64::from(config.machine_config.mem_size_mib) << 20,
            vcpus: config.machine_config.vcpu_count,
            huge_pages: config.machine_config.huge_pages.into(),
        };
        let mut vm = Vm::new(settings)?;
        let pmem = attach_pmem(config, &mut vm)?;
        let Surroundings {
            serial_out,
            serial_drained,
            on_end,
        } = surroundings;
        let on_end = only_first(on_end);
        let power = power_sink(on_end.clone());
        let buses = Buses {
            pio: Bus::new(),
            mmio: Bus::new(),
        };
        let mut builder = Builder {
            vm: &vm,
            buses,
            virtio: Vec::new(),
        };
        let console = builder.add_serial(serial_out, serial_drained)?;
        let keyboard = builder.add_legacy(&power)?;
        let mut drives = BTreeMap::new();
        let mut subscribers: Vec<Subscriber> = Vec::new();
        // A guest names its disks in the order it finds them: the root device comes first.
        let root = config.drives.iter().find(|drive| drive.is_root_device);
        let others = config.drives.iter().filter(|drive| !drive.is_root_device);
        for drive in root.into_iter().chain(others) {
            let device = Arc::new(Mutex::new(new_block(drive)?));
            builder.add_virtio(device.clone())?;
            subscribers.push(device.clone());
            drives.insert(drive.drive_id.clone(), device);
        }
        for (_, pmem) in &pmem {
            builder.add_pmem(pmem)?;
            subscribers.push(pmem.device().clone());
        }
        let mut entropy = None;
        if config.entropy.is_some() {
            let rng =
                VirtioRng::new(new_interrupt("entropy device")?).map_err(host("entropy device"))?;
            let device = Arc::new(Mutex::new(rng));
            builder.add_virtio(device.clone())?;
            subscribers.push(device.clone());
            entropy = Some(device);
        }
        let Builder { buses, virtio, .. } = builder;
        let boot_source = BootSource {
            kernel: PathBuf::from(&source.kernel_image_path),
            initrd: source.initrd_path.as_ref().map(PathBuf::from),
            cmdline: cmdline::complete(
                source.boot_args.as_deref(),
                cmdline::Root::of(config),
                &virtio,
            ),
            protocol: Protocol::from(source.boot_protocol),
        };
        let state = boot::load(
            vm.memory(),
            &boot_source,
            config.machine_config.vcpu_count,
            &virtio,
        )?;
        let on_exit = move |exit| on_end(GuestEnd::from(exit));
        let ids: Vec<_> = subscribers
            .into_iter()
            .map(|subscriber| ops.add_subscriber(subscriber))
            .collect();
        let started = vm.start(
            buses,
            &state.regs(),
            |sregs| state.apply_sregs(sregs),
            on_exit,
        );
        match started {
            Ok(vcpus) => Ok(Self {
                vcpus,
                drives,
                jobs: BTreeMap::new(),
                pmem: pmem.into_iter().collect(),
                entropy,
                keyboard,
                console,
            }),
            Err(error) => {
                for id in ids {
                    // The subscriber was added a moment ago.
                    let _ = ops.remove_subscriber(id);
                }
                Err(error.into())
            }
        }
    }

    /// The host's side of the serial console.
    pub fn console(&self) -> &SerialConsole {
        &self.console
    }

    /// Takes the vCPUs out of the guest, and lets the devices finish what they have begun.
    pub fn pause(&mut self) {
        self.vcpus.pause();
        for drive in self.drives.values() {
            lock(drive).pause();
        }
        for pmem in self.pmem.values() {
            lock(pmem.device()).pause();
        }
        if let Some(entropy) = &self.entropy {
            lock(entropy).pause();
        }
    }

    /// Goes on after a pause.
    pub fn resume(&mut self) {
        for drive in self.drives.values() {
            lock(drive).resume();
        }
        for pmem in self.pmem.values() {
            lock(pmem.device()).resume();
        }
        if let Some(entropy) = &self.entropy {
            lock(entropy).resume();
        }
        self.vcpus.resume();
    }

    /// Types Ctrl-Alt-Del, at which a guest reboots as it is set up to.
    ///
    /// # Errors
    /// `KeyboardBusy`.
    pub fn send_ctrl_alt_del(&mut self) -> Result<(), MachineError> {
        if lock(&self.keyboard).type_ctrl_alt_del() {
            Ok(())
        } else {
            Err(MachineError::KeyboardBusy)
        }
    }

    /// Gives a drive another file; the guest is told of the new size.
    ///
    /// # Errors
    /// `NoDrive`, `Drive`, `Replacement`; the drive then keeps its file.
    pub fn replace_drive(&mut self, config: &DriveConfig) -> Result<(), MachineError> {
        let id = &config.drive_id;
        self.idle_drive(id)?;
        let disk = open_disk(config).map_err(|source| MachineError::Drive {
            drive: id.clone(),
            source,
        })?;
        lock(self.drive(id)?)
            .replace_disk(disk)
            .map_err(|source| MachineError::Replacement {
                drive: id.clone(),
                source,
            })
    }

    fn drive(&self, id: &str) -> Result<&Arc<Mutex<VirtioBlock>>, MachineError> {
        self.drives
            .get(id)
            .ok_or_else(|| MachineError::NoDrive(id.to_owned()))
    }

    /// A drive without a job that is not over.
    fn idle_drive(&self, id: &str) -> Result<&Arc<Mutex<VirtioBlock>>, MachineError> {
        let drive = self.drive(id)?;
        match self.jobs.get(id) {
            Some(job) if !job.is_over() => Err(changed(id, DriveError::Busy(job.name()))),
            Some(_) | None => Ok(drive),
        }
    }

    /// Lets the disk of a drive, whose file is at `path`, go on in a new file at `new`, and keeps the old one as it is.
    ///
    /// # Errors
    /// `NoDrive`, `Change`; the drive then keeps its file.
    pub fn snapshot_drive(
        &mut self,
        id: &str,
        path: &Path,
        new: &Path,
    ) -> Result<(), MachineError> {
        lock(self.idle_drive(id)?)
            .change_disk(|disk| -> Result<Arc<dyn storage::Disk>, DriveError> {
                Ok(drive_job::vhdx(disk)?.snapshot(path, new)?)
            })
            .map_err(|source| changed(id, source))
    }

    /// Makes the disk of a drive larger, and tells the guest.
    ///
    /// # Errors
    /// `NoDrive`, `Change`; the drive then has its old size.
    pub fn resize_drive(&mut self, id: &str, size: u64) -> Result<(), MachineError> {
        let drive = self.idle_drive(id)?;
        let resized = || -> Result<(), DriveError> {
            // While the device serves the guest; then it looks at the size anew.
            let disk = drive_job::vhdx(lock(drive).disk())?;
            disk.resize(size, false)?;
            lock(drive).change_disk(|disk| Ok(Arc::clone(disk)))
        };
        resized().map_err(|source| changed(id, source))
    }

    /// Starts a job on the disk of a drive.
    ///
    /// # Errors
    /// `NoDrive`, `Change`.
    pub fn start_job(&mut self, id: &str, task: DriveTask) -> Result<(), MachineError> {
        let drive = self.idle_drive(id)?;
        let started = drive_job::vhdx(lock(drive).disk())
            .and_then(|_| DriveJob::start(drive, task))
            .map_err(|source| changed(id, source))?;
        self.jobs.insert(id.to_owned(), started);
        Ok(())
    }

    /// The last job of a drive.
    ///
    /// # Errors
    /// `NoDrive`, `Change` where there was none.
    pub fn job(&self, id: &str) -> Result<Arc<DriveJob>, MachineError> {
        self.drive(id)?;
        let job = self.jobs.get(id).cloned();
        job.ok_or_else(|| changed(id, DriveError::NoJob))
    }

    /// The counters of the devices.
    pub fn metrics(&self) -> DeviceMetrics {
        DeviceMetrics {
            drives: self
                .drives
                .iter()
                .map(|(id, drive)| (id.clone(), lock(drive).metrics()))
                .collect(),
            pmem: self
                .pmem
                .iter()
                .map(|(id, pmem)| (id.clone(), pmem.counters()))
                .collect(),
            entropy: self.entropy.as_ref().map(|entropy| lock(entropy).metrics()),
        }
    }

    /// Stops the vCPUs for good and closes the disks, each complete and clean.
    pub fn shutdown(mut self) {
        self.console.hang_up();
        self.vcpus.stop();
        for job in self.jobs.values() {
            job.cancel();
        }
        while self.jobs.values().any(|job| !job.is_over()) {
            // They stop at the next block.
            std::thread::sleep(JOB_POLL);
        }
        for (id, drive) in &self.drives {
            let mut device = lock(drive);
            device.reset();
            if let Err(error) = device.disk().close() {
                tracing::error!(drive = %id, %error, "the disk could not be closed cleanly");
            }
        }
        for (id, pmem) in &self.pmem {
            lock(pmem.device()).reset();
            if let Err(error) = pmem.close() {
                tracing::error!(pmem = %id, %error, "not all that the guest wrote is on the disk");
            }
        }
    }
}
