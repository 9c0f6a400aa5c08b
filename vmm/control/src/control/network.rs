//! The network interfaces of a guest.

use super::{Control, ControlError};
use config::{ConfiguredDevice, NetworkInterfaceConfig, NetworkInterfaceUpdate, VmConfig};

/// The interface that an update is about, with the update.
pub(crate) fn updated_interface(
    config: &VmConfig,
    update: &NetworkInterfaceUpdate,
) -> Result<NetworkInterfaceConfig, ControlError> {
    let id = &update.iface_id;
    let mut interfaces = config.network_interfaces.iter();
    let present = interfaces.find(|interface| interface.iface_id == *id);
    let present = present.ok_or_else(|| ControlError::NoInterface(id.clone()))?;
    Ok(update.applied_to(present))
}

impl Control {
    /// `PATCH /network-interfaces/{id}`: changes the limits of an interface of a started guest.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `NoInterface`, `Machine`.
    pub fn update_interface(
        &mut self,
        update: &NetworkInterfaceUpdate,
    ) -> Result<(), ControlError> {
        self.guest()?;
        let interface = updated_interface(&self.config, update)?;
        self.guest()?.0.limit_interface(update)?;
        interface.store(&mut self.config);
        Ok(())
    }
}
