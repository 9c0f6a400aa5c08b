//! The taps of a guest's network interfaces. A process that has rights to lose opens them, or is given them, before it
//! loses these.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use devices::virtio::net::{Tap, TapError};

use config::{LoadSnapshot, NetworkInterfaceConfig, VmConfig};
use host::inherited;

/// An interface cannot have its tap.
#[derive(Debug, thiserror::Error)]
#[error("network interface {interface}")]
pub struct InterfaceTapError {
    /// `iface_id`.
    pub interface: String,
    /// What is wrong with its tap.
    pub source: TapFault,
}

/// What is wrong with a tap.
#[derive(Debug, thiserror::Error)]
pub enum TapFault {
    /// The tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The process has no such descriptor.
    #[error("descriptor {number} cannot be had")]
    Descriptor {
        /// Its number.
        number: i32,
        /// Why not.
        source: std::io::Error,
    },
    /// The interface names no tap, and was given none.
    #[error("it has no tap: name one by host_dev_name")]
    None,
    /// Another number of descriptors than the interface has pairs of queues.
    #[error("{given} descriptors were given, for {pairs} pairs of queues")]
    Pairs {
        /// The descriptors.
        given: usize,
        /// The pairs.
        pairs: u16,
    },
}

/// Taps that are open, by the interface that each is for.
#[derive(Debug, Default)]
pub struct Taps(BTreeMap<String, Tap>);

fn fault(interface: &NetworkInterfaceConfig, source: impl Into<TapFault>) -> InterfaceTapError {
    InterfaceTapError {
        interface: interface.iface_id.clone(),
        source: source.into(),
    }
}

fn open(interface: &NetworkInterfaceConfig) -> Result<Tap, TapFault> {
    if let Some(numbers) = interface.descriptors() {
        let taken = numbers.into_iter().map(|number| {
            let taken = inherited::take(number);
            taken.map_err(|source| TapFault::Descriptor { number, source })
        });
        return Ok(Tap::from_descriptors(taken.collect::<Result<_, _>>()?)?);
    }
    let name = interface.host_dev_name.as_deref().ok_or(TapFault::None)?;
    Ok(Tap::open(name, interface.pairs())?)
}

impl Taps {
    /// Opens those of all interfaces that have none yet.
    ///
    /// # Errors
    /// [`InterfaceTapError`].
    pub fn open(&mut self, config: &VmConfig) -> Result<(), InterfaceTapError> {
        for interface in &config.network_interfaces {
            if !self.0.contains_key(&interface.iface_id) {
                let tap = open(interface).map_err(|source| fault(interface, source))?;
                self.0.insert(interface.iface_id.clone(), tap);
            }
        }
        Ok(())
    }

    /// Opens those that a load gives to interfaces.
    ///
    /// # Errors
    /// [`InterfaceTapError`].
    pub fn open_overrides(&mut self, load: Option<&LoadSnapshot>) -> Result<(), InterfaceTapError> {
        for other in load.into_iter().flat_map(|load| &load.network_overrides) {
            // How many pairs of queues it has is in the snapshot, which is read later: what it has is compared then.
            let interface = NetworkInterfaceConfig {
                iface_id: other.iface_id.clone(),
                host_dev_name: Some(other.host_dev_name.clone()),
                ..NetworkInterfaceConfig::default()
            };
            let tap = open(&interface).map_err(|source| fault(&interface, source))?;
            self.0.insert(other.iface_id.clone(), tap);
        }
        Ok(())
    }

    /// Takes the descriptors of a tap for an interface, one for each pair of queues.
    ///
    /// # Errors
    /// [`InterfaceTapError`].
    pub fn give(
        &mut self,
        interface: &NetworkInterfaceConfig,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), InterfaceTapError> {
        let (given, pairs) = (descriptors.len(), interface.pairs());
        if given != usize::from(pairs) {
            return Err(fault(interface, TapFault::Pairs { given, pairs }));
        }
        let tap = Tap::from_descriptors(descriptors).map_err(|source| fault(interface, source))?;
        self.0.insert(interface.iface_id.clone(), tap);
        Ok(())
    }

    /// The tap of an interface, which is opened where it is not.
    pub(super) fn take(
        &mut self,
        interface: &NetworkInterfaceConfig,
    ) -> Result<Tap, InterfaceTapError> {
        match self.0.remove(&interface.iface_id) {
            Some(tap) => Ok(tap),
            None => open(interface).map_err(|source| fault(interface, source)),
        }
    }
}
