//! From a configuration to a guest that runs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::legacy::{PowerEvent, PowerSink};
use event_manager::SubscriberOps;

use super::builder::{Builder, attach_pmem};
use super::cmdline::{self, Wanted};
use super::sharing::{MappedFrom, Plan};
use super::{GuestEnd, Machine, StartError, Subscriber, Surroundings, host};
use crate::boot::{self, BootSource, Loaded, Protocol};
use crate::config::VmConfig;
use crate::jail;
use crate::vm::{Vm, VmSettings};

pub(super) type OnEnd = Arc<dyn Fn(GuestEnd) + Send + Sync>;

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
            warm,
        } = surroundings;
        let on_end = only_first(on_end);
        let mut builder = Builder::new(&vm);
        let keyboard = builder.add_legacy(&power_sink(on_end.clone()))?;
        let plan = Plan::new(&vm, config, &pmem, on_end)?;
        let console = builder.add_serial(serial_out, serial_drained)?;
        let drives = builder.add_drives(&config.drives, &plan)?;
        for (_, pmem) in &pmem {
            builder.add_pmem(pmem)?;
            builder.subscribers.push(pmem.device().clone());
        }
        let entropy = config.entropy.map(|_| builder.add_entropy()).transpose()?;
        let balloon = builder.add_balloon(config.balloon, &plan)?;
        let reporting = balloon.as_ref().is_some_and(|balloon| balloon.reports);
        let Builder {
            buses,
            virtio,
            devices,
            subscribers,
            ..
        } = builder;
        let boot_source = BootSource {
            kernel: PathBuf::from(&source.kernel_image_path),
            initrd: source.initrd_path.as_ref().map(PathBuf::from),
            cmdline: cmdline::complete(
                source.boot_args.as_deref(),
                cmdline::Root::of(config),
                &virtio,
                Wanted {
                    reporting,
                    lean: source.lean,
                },
            ),
            protocol: Protocol::from(source.boot_protocol),
            domain: config.sharing.domain.clone(),
        };
        let Loaded { state, kernel } = boot::load(
            vm.memory(),
            plan.at_boot(),
            &boot_source,
            config.machine_config.vcpu_count,
            &virtio,
        )?;
        let vcpus = config.machine_config.vcpu_count;
        let kernel = kernel.map(|mapped| MappedFrom::new(mapped, boot_source, vcpus));
        let kernel = plan.reference(kernel, warm);
        // From here on a guest may have taken over whoever serves it.
        jail::seccomp::started().map_err(host("seccomp filter"))?;
        let faults = plan.faults().clone();
        let on_exit = move |exit| faults.vcpu_left(exit);
        let ids: Vec<_> = subscribers
            .into_iter()
            .map(|subscriber| ops.add_subscriber(subscriber))
            .collect();
        let started = vm
            .start(
                buses,
                &state.regs(),
                |sregs| state.apply_sregs(sregs),
                on_exit,
            )
            .map_err(StartError::from)
            .and_then(|vcpus| {
                let sharing = plan.start(vcpus.brake(), devices, kernel)?;
                Ok((sharing, vcpus))
            });
        match started {
            Ok((sharing, vcpus)) => Ok(Self {
                vcpus,
                drives,
                jobs: BTreeMap::new(),
                pmem: pmem.into_iter().collect(),
                entropy,
                balloon: balloon.map(|balloon| balloon.device),
                keyboard,
                console,
                sharing,
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
