//! From a configuration to a guest that runs.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use devices::device_list::DeviceList;
use devices::legacy::{BootMark, I8042, PowerEvent, PowerSink, SerialConsole};
use devices::lock;
use devices::virtio::VirtioDevice;
use devices::virtio::balloon::VirtioBalloon;
use devices::virtio::block::VirtioBlock;
use devices::vmgenid::VmGenId;
use event_manager::SubscriberOps;
use vmm_sys_util::eventfd::EventFd;

use super::Machine;
use super::builder::{Builder, Legacy, attach_pmem};
use super::cmdline::{self, Lean, LinuxOptions};
use super::error::{StartError, host};
use super::lost_pages::LostPages;
use super::sharing::{MappedFrom, Plan, Reference};
use super::surroundings::{OnEnd, Subscriber, Surroundings};
use super::vsock::{Vsock, VsockHost};
use crate::pmem::Pmem;
use crate::reference::Size;
use crate::snapshot::{DiskOf, Loading, SnapshotError};
use config::VmConfig;
use host::exit::GuestEnd;
use kvm::boot::{self, BootSource, Loaded, MmioDevice, Protocol};
use kvm::vm::{Buses, Vcpus, Vm, VmError, VmSettings};

/// Passes on the first call alone: a guest that panics and then resets has panicked.
fn only_first(on_end: OnEnd) -> OnEnd {
    let told = AtomicBool::new(false);
    Arc::new(move |end| {
        if !told.swap(true, Ordering::SeqCst) {
            on_end(end);
        }
    })
}

fn power_sink(on_end: OnEnd) -> PowerSink {
    Arc::new(move |event| {
        on_end(match event {
            PowerEvent::PowerOff => GuestEnd::PowerOff,
            PowerEvent::Reset => GuestEnd::Reset,
            PowerEvent::Panic => GuestEnd::Panic,
        });
    })
}

/// The devices of a guest that is being put together.
struct Assembled {
    plan: Plan,
    list: DeviceList,
    keyboard: Arc<Mutex<I8042>>,
    boot_mark: BootMark,
    console: SerialConsole,
    generation: Arc<Mutex<VmGenId>>,
    drives: BTreeMap<String, Arc<Mutex<VirtioBlock>>>,
    pmem: Vec<(String, Pmem)>,
    balloon: Option<Arc<Mutex<VirtioBalloon>>>,
    vsock: Option<Vsock>,
    /// Whether the guest is to report its free pages.
    reporting: bool,
    buses: Buses,
    virtio: Vec<MmioDevice>,
    devices: Vec<Arc<Mutex<dyn VirtioDevice>>>,
    subscribers: Vec<Subscriber>,
}

impl Assembled {
    fn new(
        config: &VmConfig,
        vm: &mut Vm,
        (serial, vsock): ((OwnedFd, EventFd), VsockHost),
        on_end: OnEnd,
        boots: bool,
    ) -> Result<Self, StartError> {
        let pmem = attach_pmem(config, vm)?;
        let mut builder = Builder::new(vm);
        let Legacy {
            keyboard,
            boot_mark,
        } = builder.add_legacy(&power_sink(on_end.clone()))?;
        let plan = Plan::new(vm, config, &pmem, on_end, boots)?;
        let (out, drained) = serial;
        let console = builder.add_serial(out, drained)?;
        let drives = builder.add_drives(&config.drives, &plan)?;
        for (id, pmem) in &pmem {
            builder.add_pmem(id, pmem)?;
        }
        if config.entropy.is_some() {
            builder.add_entropy()?;
        }
        // Before the balloon that nobody has asked for, which does without where there is no room.
        let vsock = builder.add_vsock(config, vsock)?;
        let balloon = builder.add_balloon(config.balloon, &plan)?;
        let generation = builder.add_generation()?;
        let Builder {
            buses,
            virtio,
            list,
            devices,
            subscribers,
            ..
        } = builder;
        Ok(Self {
            plan,
            list,
            keyboard,
            boot_mark,
            console,
            generation,
            drives,
            pmem,
            reporting: balloon.as_ref().is_some_and(|balloon| balloon.reports),
            balloon: balloon.map(|balloon| balloon.device),
            vsock,
            buses,
            virtio,
            devices,
            subscribers,
        })
    }

    /// Adds the devices to the event loop, has `start` start the vCPUs, and begins to share.
    fn start(
        self,
        ops: &mut dyn SubscriberOps<Subscriber = Subscriber>,
        start: impl FnOnce(Buses, Arc<LostPages>) -> Result<Vcpus, VmError>,
        kernel: Option<(Range<u64>, Option<Reference>)>,
    ) -> Result<Machine, StartError> {
        // From here on a guest may have taken over whoever serves it.
        jail::seccomp::started(self.vsock.is_some()).map_err(host("seccomp filter"))?;
        let lost_pages = self.plan.lost_pages().clone();
        let ids: Vec<_> = self
            .subscribers
            .into_iter()
            .map(|subscriber| ops.add_subscriber(subscriber))
            .collect();
        let (plan, devices) = (self.plan, self.devices);
        let started = start(self.buses, lost_pages)
            .map_err(StartError::from)
            .and_then(|vcpus| {
                let sharing = plan.start(vcpus.holder(), devices, kernel)?;
                Ok((sharing, vcpus))
            });
        match started {
            Ok((sharing, vcpus)) => Ok(Machine {
                vcpus,
                devices: self.list,
                drives: self.drives,
                jobs: BTreeMap::new(),
                pmem: self.pmem.into_iter().collect(),
                balloon: self.balloon,
                _vsock_socket: self.vsock.map(|vsock| vsock.socket),
                keyboard: self.keyboard,
                boot_mark: self.boot_mark,
                console: self.console,
                sharing,
                served: None,
                base: None,
            }),
            Err(error) => {
                for id in ids {
                    // The subscriber was added a moment ago.
                    let _ = ops.remove_subscriber(id);
                }
                Err(error)
            }
        }
    }
}

fn new_vm(config: &VmConfig) -> Result<Vm, StartError> {
    if !jail::seccomp::can_build() {
        let error = "a guest failed to start at its last step, and the process has given away what building one takes: start another process";
        return Err(host("seccomp filter")(std::io::Error::other(error)));
    }
    Ok(Vm::new(VmSettings {
        memory_bytes: u64::from(config.machine_config.mem_size_mib) << 20,
        vcpus: config.machine_config.vcpu_count,
        huge_pages: config.machine_config.huge_pages.into(),
        confine_vcpu: jail::seccomp::vcpu,
    })?)
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
        let mut vm = new_vm(config)?;
        let Surroundings {
            serial_out,
            serial_drained,
            on_end,
            warm,
            vsock,
        } = surroundings;
        let host = ((serial_out, serial_drained), vsock);
        let parts = Assembled::new(config, &mut vm, host, only_first(on_end), true)?;
        lock(&parts.generation).write(vm.memory())?;
        let boot_source = BootSource {
            kernel: PathBuf::from(&source.kernel_image_path),
            initrd: source.initrd_path.as_ref().map(PathBuf::from),
            cmdline: cmdline::complete(
                source.boot_args.as_deref(),
                cmdline::Root::of(config),
                &parts.virtio,
                LinuxOptions {
                    reporting: parts.reporting,
                    lean: Lean::new(source.lean, config.sharing.mode),
                },
            ),
            protocol: Protocol::from(source.boot_protocol),
            domain: config.sharing.domain.clone(),
        };
        let Loaded { state, kernel } = boot::load(
            vm.memory(),
            parts.plan.at_boot(),
            &boot_source,
            config.machine_config.vcpu_count,
            &parts.virtio,
        )?;
        parts.plan.share_initrd(&boot_source);
        let size = Size::from(&config.machine_config);
        let kernel = kernel.map(|mapped| MappedFrom::new(mapped, boot_source, size));
        let kernel = parts.plan.reference(kernel, warm);
        let start = |buses, lost_pages: Arc<LostPages>| {
            vm.start(
                buses,
                &state.regs(),
                |sregs| state.apply_sregs(sregs),
                move |exit| lost_pages.vcpu_left(exit),
            )
        };
        parts.start(ops, start, kernel)
    }

    /// Builds a guest that goes on where that of a snapshot stood, and adds its devices to the event loop. It stands
    /// still until it is resumed.
    ///
    /// # Errors
    /// [`StartError`]; then nothing runs and every disk is closed again.
    pub fn load(
        config: &VmConfig,
        mut loading: Loading,
        ops: &mut dyn SubscriberOps<Subscriber = Subscriber>,
        surroundings: Surroundings,
    ) -> Result<Self, StartError> {
        let mut vm = new_vm(config)?;
        let Surroundings {
            serial_out,
            serial_drained,
            on_end,
            warm,
            vsock,
        } = surroundings;
        let host = ((serial_out, serial_drained), vsock);
        let on_end = only_first(on_end);
        let parts = Assembled::new(config, &mut vm, host, on_end.clone(), false)?;
        for (id, drive) in &parts.drives {
            loading.check_disk(DiskOf::Drive(id), lock(drive).disk())?;
        }
        for (id, pmem) in &parts.pmem {
            loading.check_disk(DiskOf::Pmem(id), &pmem.disk())?;
        }
        // Before anything looks at the memory: who does may wait, and sees nobody go.
        let on_lost = move |why| on_end(GuestEnd::Failed(why));
        let windows = parts.pmem.iter().map(|(id, pmem)| (&**id, pmem.memory()));
        let served = loading.give_memory(parts.plan.memory(), windows, on_lost)?;
        parts.list.restore(loading.state.devices.clone())?;
        // Another guest may go on from the same state.
        lock(&parts.generation).renew(vm.memory())?;
        vm.restore(&loading.state.vm, &loading.state.vcpus)
            .map_err(SnapshotError::from)?;
        let start = |buses, lost_pages: Arc<LostPages>| {
            vm.start_paused(buses, move |exit| lost_pages.vcpu_left(exit))
        };
        // Its kernel is as it was saved, and shared as that.
        let kernel = parts.plan.reference(None, warm);
        let mut machine = parts.start(ops, start, kernel)?;
        machine.base = loading.base().cloned();
        machine.served = served;
        loading.keep_disks();
        Ok(machine)
    }
}
