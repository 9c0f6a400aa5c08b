//! From a configuration to a guest that runs.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use devices::device_list::DeviceStates;
use devices::legacy::{PowerEvent, PowerSink};
use devices::lock;
use devices::virtio::block::VirtioBlock;
use devices::vmclock::{self, VmClock};
use devices::vmgenid::VmGenId;
use event_manager::SubscriberOps;
use memshare::PAGE_SIZE;

use super::Machine;
use super::attach::{Attached, Builder, Pc, SerialEnds, attach_configured, map_pmem};
use super::cmdline::{self, Lean, LinuxOptions};
use super::error::{StartError, host};
use super::lost_pages::LostPages;
use super::sharing::{MappedFrom, Plan, Reference};
use super::surroundings::{OnEnd, Subscriber, Surroundings};
use crate::pmem::Pmem;
use crate::reference::{Size, Warmer};
use crate::snapshot::{DiskOf, Loading, SnapshotError};
use config::{SerialConfig, VmConfig};
use host::exit::GuestEnd;
use kvm::boot::{self, BootSource, Loaded, Protocol};
use kvm::layout::HUGETLBFS_PAGE;
use kvm::vm::{Buses, GuestCpu, Vcpus, Vm, VmError, VmSettings};

fn power_sink(on_end: OnEnd) -> PowerSink {
    Arc::new(move |event| {
        on_end(match event {
            PowerEvent::PowerOff => GuestEnd::PowerOff,
            PowerEvent::Reset => GuestEnd::Reset,
            PowerEvent::Panic => GuestEnd::Panic,
        });
    })
}

/// A guest that is being put together.
struct Assembled {
    plan: Plan,
    pmem: Vec<(String, Arc<Pmem>)>,
    attached: Attached,
    pc: Pc,
    warm: Option<Warmer>,
}

impl Assembled {
    fn new(
        config: &VmConfig,
        vm: &mut Vm,
        surroundings: Surroundings,
        saved: Option<&DeviceStates>,
    ) -> Result<Self, StartError> {
        let Surroundings {
            serial_out,
            serial_drained,
            on_end,
            warm,
            vsock,
            network,
        } = surroundings;
        let pmem = map_pmem(config, vm)?;
        let plan = Plan::new(vm, config, &pmem, on_end.clone(), saved.is_none())?;
        let mut builder = Builder::new(vm, &plan, &pmem, vsock, network);
        let serial = SerialEnds {
            out: serial_out,
            limit: config.serial.as_ref().and_then(SerialConfig::limit),
            drained: serial_drained,
        };
        let pc = builder.add_pc(serial, &power_sink(on_end))?;
        let has_clock = saved.is_none_or(|states| states.has(&vmclock::KIND));
        attach_configured(&mut builder, config, has_clock)?;
        let attached = builder.attached;
        Ok(Self {
            plan,
            pmem,
            attached,
            pc,
            warm,
        })
    }

    /// The generation ID, which each guest has.
    fn generation(&self) -> Result<Arc<Mutex<VmGenId>>, StartError> {
        self.attached
            .list
            .get("")
            .ok_or(StartError::Missing("generation ID"))
    }

    /// The vmclock page, which guests of older snapshots do not have.
    fn clock(&self) -> Option<Arc<Mutex<VmClock>>> {
        self.attached.list.get("")
    }

    /// Adds the devices to the event loop, has `start` start the vCPUs, and begins to share.
    fn start(
        self,
        ops: &mut dyn SubscriberOps<Subscriber = Subscriber>,
        start: impl FnOnce(Buses, Arc<LostPages>) -> Result<Vcpus, VmError>,
        kernel: Option<(Range<u64>, Option<Reference>)>,
    ) -> Result<Machine, StartError> {
        let Attached {
            buses,
            list,
            devices,
            subscribers,
            host_parts,
            connects,
            ..
        } = self.attached;
        // From here on a guest may have taken over whoever serves it.
        jail::seccomp::started(connects).map_err(host("seccomp filter"))?;
        let lost_pages = self.plan.lost_pages().clone();
        let ids: Vec<_> = subscribers
            .into_iter()
            .map(|subscriber| ops.add_subscriber(subscriber))
            .collect();
        let plan = self.plan;
        let started = start(buses, lost_pages)
            .map_err(StartError::from)
            .and_then(|vcpus| {
                let sharing = plan.start(vcpus.holder(), devices, kernel)?;
                Ok((sharing, vcpus))
            });
        match started {
            Ok((sharing, vcpus)) => Ok(Machine {
                vcpus,
                devices: list,
                host_parts,
                jobs: BTreeMap::new(),
                pmem: self.pmem.into_iter().collect(),
                pc: self.pc,
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

fn cpu(config: &VmConfig) -> GuestCpu {
    match (config.custom_cpu(), config.machine_config.cpu_template) {
        (Some(custom), _) => GuestCpu::Custom(custom.clone()),
        (None, Some(template)) => GuestCpu::Static(template),
        (None, None) => GuestCpu::Host,
    }
}

/// The size in bytes of the pages that RAM is in.
fn page_size(config: &VmConfig) -> u64 {
    if config.machine_config.has_hugetlbfs() {
        HUGETLBFS_PAGE
    } else {
        PAGE_SIZE
    }
}

fn new_vm(config: &VmConfig, is_saved: bool) -> Result<Vm, StartError> {
    if !jail::seccomp::can_build() {
        let error = "a guest failed to start at its last step, and the process has given away what building one takes: start another process";
        return Err(host("seccomp filter")(std::io::Error::other(error)));
    }
    Ok(Vm::new(VmSettings {
        memory_bytes: u64::from(config.machine_config.mem_size_mib) << 20,
        vcpus: config.machine_config.vcpu_count,
        smt: config.machine_config.smt,
        cpu: cpu(config),
        is_saved,
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
        let mut vm = new_vm(config, false)?;
        let mut parts = Assembled::new(config, &mut vm, surroundings.ending_once(), None)?;
        lock(&*parts.generation()?).write(vm.memory())?;
        if let Some(clock) = parts.clock() {
            lock(&clock).write(vm.memory())?;
        }
        let boot_source = BootSource {
            kernel: PathBuf::from(&source.kernel_image_path),
            initrd: source.initrd_path.as_ref().map(PathBuf::from),
            cmdline: cmdline::complete(
                source.boot_args.as_deref(),
                cmdline::Root::of(config),
                &parts.attached.virtio,
                LinuxOptions {
                    reporting: parts.attached.reports_free_pages,
                    lean: Lean::new(source.lean, config.share_mode()),
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
            &parts.attached.virtio,
        )?;
        parts.plan.share_initrd(&boot_source);
        let size = Size::from(&config.machine_config);
        let kernel = kernel.map(|mapped| MappedFrom::new(mapped, boot_source, size));
        let kernel = parts.plan.reference(kernel, parts.warm.take());
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
        let mut vm = new_vm(config, true)?;
        let surroundings = surroundings.ending_once();
        let on_end = surroundings.on_end.clone();
        let mut parts =
            Assembled::new(config, &mut vm, surroundings, Some(&loading.state.devices))?;
        for (id, drive) in parts.attached.list.all::<VirtioBlock>() {
            loading.check_disk(DiskOf::Drive(id), lock(&drive).disk())?;
        }
        for (id, pmem) in &parts.pmem {
            loading.check_disk(DiskOf::Pmem(id), &pmem.disk())?;
        }
        // Before anything reads the memory: a thread that touches a page of a handler that has ended waits for ever.
        let on_lost = move |why| on_end(GuestEnd::Failed(why));
        let windows = parts.pmem.iter().map(|(id, pmem)| (&**id, pmem.memory()));
        let page = page_size(config);
        let served = loading.give_memory((parts.plan.memory(), page), windows, on_lost)?;
        parts.attached.list.restore(loading.state.devices.clone())?;
        // Another guest may go on from the same state.
        lock(&*parts.generation()?).renew(vm.memory())?;
        if let Some(clock) = parts.clock() {
            lock(&clock).disrupt(vm.memory())?;
        }
        vm.restore(&loading.state.vm, &loading.state.vcpus, loading.clock)
            .map_err(SnapshotError::from)?;
        let start = |buses, lost_pages: Arc<LostPages>| {
            vm.start_paused(buses, move |exit| lost_pages.vcpu_left(exit))
        };
        // Its kernel is as it was saved, and shared as that.
        let kernel = parts.plan.reference(None, parts.warm.take());
        let mut machine = parts.start(ops, start, kernel)?;
        machine.base = loading.base().cloned();
        if config.machine_config.has_hugetlbfs() {
            machine.base = None;
        }
        machine.served = served;
        loading.keep_disks();
        Ok(machine)
    }
}
