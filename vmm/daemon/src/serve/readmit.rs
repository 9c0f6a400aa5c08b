//! Before a guest of the registry starts: the configuration that it is started with, its place in the host's memory,
//! and its jail.

use super::admission::Load;
use super::daemon::Daemon;
use super::events::EventKind;
use super::fault::Fault;
use super::identity;
use super::record::State;
use super::spec::Resolved;
use super::vm::{Now, Vm};
use config::VmConfig;
use host::report::chain;

impl Daemon {
    /// The configuration of a guest: the one that it was made with, or a later one, with the disks that it has now.
    ///
    /// # Errors
    /// Those of [`VmSpec::resolved`](super::record::VmSpec::resolved).
    pub fn config_of(&self, vm: &Vm) -> Result<VmConfig, Fault> {
        let mut config = self.config_as_asked(vm)?;
        identity::identify(&mut config, vm.now().cid);
        for (id, disk) in &vm.now().disks {
            config.set_vhdx(id, disk);
        }
        Ok(config)
    }

    /// The configuration that the operator has asked for, with the paths of images.
    ///
    /// # Errors
    /// Those of [`VmSpec::resolved`](super::record::VmSpec::resolved).
    pub fn config_as_asked(&self, vm: &Vm) -> Result<VmConfig, Fault> {
        let later = vm.now().later.clone();
        let resolved = vm
            .spec
            .resolved(&later, &self.images(), &self.templates(), &vm.folder)?;
        let Resolved { config, .. } = resolved;
        Ok(config)
    }

    /// As [`Daemon::config_of`], with the domain in which the guest shares, and with what its networks give it.
    ///
    /// # Errors
    /// `Network`, and those of [`Daemon::config_of`].
    pub fn config_to_start(&self, vm: &Vm) -> Result<VmConfig, Fault> {
        let mut config = self.config_of(vm)?;
        let labels = &vm.spec.labels;
        self.share_domains.assign(&mut config, vm.uid, labels);
        let interfaces = vm.now().interfaces.clone();
        self.networks.complete(&vm.id, &mut config, &interfaces)?;
        Ok(config)
    }

    /// Admits a guest that is about to start, and gives the configuration that it is to be started with.
    ///
    /// # Errors
    /// `Refused`, and those of [`Daemon::config_of`].
    pub fn readmit(&self, vm: &Vm) -> Result<VmConfig, Fault> {
        let config = self.config_to_start(vm)?;
        let machine = &config.machine_config;
        self.admit_change(vm, machine.mem_size_mib, machine.vcpu_count, |now| {
            now.state = State::Starting;
        })?;
        Ok(config)
    }

    /// Admits a guest of the registry with other RAM or vCPUs, and changes it then.
    ///
    /// # Errors
    /// `Refused`.
    pub fn admit_change(
        &self,
        vm: &Vm,
        ram_mib: u32,
        vcpus: u8,
        change: impl FnOnce(&mut Now),
    ) -> Result<(), Fault> {
        let vms = self.vms();
        let others = vms.values().filter(|other| other.id != vm.id);
        let others: Vec<_> = others.map(|vm| vm.load()).collect();
        let load = Load {
            ram_mib,
            vcpus,
            live: true,
            ..vm.load()
        };
        if let Err(refusal) = self.limits.admit(&others, &load) {
            self.events.tell(
                EventKind::Refused,
                Some(&vm.id),
                Some(chain(&refusal).to_string()),
            );
            return Err(refusal.into());
        }
        vm.change(|now| {
            (now.ram_mib, now.vcpus) = (ram_mib, vcpus);
            change(now);
        });
        Ok(())
    }

    /// Gives a guest a jail that was made when the daemon had none for its guests; whether it has a new one.
    ///
    /// # Errors
    /// `NoUser`.
    pub fn rejail(&self, vm: &Vm) -> Result<bool, Fault> {
        let vms = self.vms();
        if vm.now().jail.is_some() {
            return Ok(false);
        }
        let jail = self.jail_for(&vm.id, &vms)?;
        let is_new = jail.is_some();
        vm.change(|now| now.jail = jail);
        Ok(is_new)
    }
}
