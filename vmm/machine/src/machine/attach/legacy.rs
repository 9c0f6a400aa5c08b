//! The devices that each PC has, at their ports.

use std::sync::{Arc, Mutex};

use devices::legacy::{
    AcpiPm, BootTimer, CmosRtc, I8042, PowerSink, Pvpanic, SerialConsole, SerialInput, SerialPort,
};

use super::builder::{Builder, Pc, SerialEnds};
use super::events::event;
use crate::machine::error::{StartError, host};
use kvm::layout;

impl Builder<'_> {
    /// Adds the devices of a PC.
    pub(in crate::machine) fn add_pc(
        &mut self,
        serial: SerialEnds,
        power: &PowerSink,
    ) -> Result<Pc, StartError> {
        let irqfd = event("keyboard controller")?;
        self.vm.register_irqfd(&irqfd, layout::I8042_GSI)?;
        let timer = BootTimer::default();
        let boot_mark = timer.mark();
        // Port 0x61 between its two ports is the PIT's, where there is one.
        let keyboard = I8042::new(power.clone(), irqfd);
        self.add_port_device((layout::I8042_PORT, I8042::PORTS), keyboard)?;
        self.add_port_device((layout::RTC_PORT, CmosRtc::PORTS), CmosRtc::new())?;
        self.add_port_device((layout::PVPANIC_PORT, 1), Pvpanic::new(power.clone()))?;
        let pm = AcpiPm::new(power.clone());
        self.add_port_device((layout::ACPI_PM_PORT, AcpiPm::PORTS), pm)?;
        self.add_port_device((layout::BOOT_TIMER_PORT, 1), timer)?;
        let console = self.add_serial(serial)?;
        Ok(Pc { console, boot_mark })
    }

    /// Adds the serial port. Its port and its console are two devices, as the console is served by the event loop.
    fn add_serial(&mut self, serial: SerialEnds) -> Result<SerialConsole, StartError> {
        let irqfd = event("serial port")?;
        self.vm.register_irqfd(&irqfd, layout::SERIAL_GSI)?;
        let SerialEnds {
            out,
            limit,
            drained,
        } = serial;
        let (port, console) = SerialPort::new(out, limit, SerialInput { irqfd, drained })
            .map_err(host("serial port"))?;
        let ports = (layout::SERIAL_PORT, SerialPort::PORTS);
        self.add_port(ports, Arc::new(Mutex::new(port)))?;
        self.attached
            .list
            .add("", Arc::new(Mutex::new(console.clone())));
        Ok(console)
    }
}
