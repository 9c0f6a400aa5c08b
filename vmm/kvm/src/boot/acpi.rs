//! Hardware-reduced ACPI tables (ACPI 6.5, 4.1): how a stock kernel finds its CPUs and devices.
//!
//! All tables lie in [`layout::ACPI_START`]..[`layout::ACPI_END`], the RSDP first, where kernels that are not
//! told its address look for it (ACPI 6.5, 5.2.5.1).

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, ONE,
    Package, Path, ResourceTemplate, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use devices::GuestMemory;
use devices::legacy::{CmosRtc, RESET_VALUE, S5_SLEEP_TYPE, SerialPort};
use devices::vmclock::VmClock;
use vm_memory::{Bytes, GuestAddress};

use super::error::BootError;
use super::mmio_device::MmioDevice;
use crate::layout;

const OEM_ID: [u8; 6] = *b"COPPIC";
const OEM_TABLE_ID: [u8; 8] = *b"COPPICVM";
const OEM_REVISION: u32 = 1;

/// `IAPC_BOOT_ARCH` (ACPI 6.5, table 5.11): the guest has an i8042, and no VGA. It has an RTC, so the bit "CMOS RTC not
/// present" stays clear.
const IAPC_8042: u16 = 1 << 1;
const IAPC_NO_VGA: u16 = 1 << 2;
/// Register of the CMOS RTC that holds the century.
const RTC_CENTURY: u8 = 0x32;

/// The value of the notification that the generation ID, or the vmclock page, has changed.
const CHANGED: u8 = 0x80;

/// Size in bytes of the header that every table but the RSDP starts with.
const HEADER_LEN: u32 = 36;
/// Revision of the DSDT: 64-bit integers.
const DSDT_REVISION: u8 = 2;

/// Writes the tables of a guest with `vcpus` CPUs and the devices `virtio`; returns where the RSDP is.
///
/// # Errors
/// `AcpiTooLarge` where the devices do not fit.
pub(super) fn build(
    memory: &GuestMemory,
    vcpus: u8,
    virtio: &[MmioDevice],
) -> Result<GuestAddress, BootError> {
    let mut writer = Writer {
        memory,
        next: layout::ACPI_START + Rsdp::len() as u64,
    };
    let mut table = Sdt::new(
        *b"DSDT",
        HEADER_LEN,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(&dsdt(virtio));
    let dsdt_address = writer.put(&table)?;

    let fadt_address = writer.put(&fadt(dsdt_address).finalize())?;

    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(layout::LOCAL_APIC),
    );
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    let madt_address = writer.put(&madt)?;

    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt_address);
    xsdt.add_entry(madt_address);
    let xsdt_address = writer.put(&xsdt)?;

    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt_address).to_aml_bytes(&mut rsdp);
    let address = GuestAddress(layout::ACPI_START);
    memory
        .write_slice(&rsdp, address)
        .map_err(BootError::memory("RSDP"))?;
    Ok(address)
}

/// Writes tables to guest memory, one after the other.
struct Writer<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Writer<'_> {
    fn put(&mut self, table: &dyn Aml) -> Result<u64, BootError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let address = self.next.next_multiple_of(16);
        let end = address + bytes.len() as u64;
        if end > layout::VM_CLOCK {
            return Err(BootError::AcpiTooLarge {
                room: layout::VM_CLOCK - layout::ACPI_START,
            });
        }
        self.memory
            .write_slice(&bytes, GuestAddress(address))
            .map_err(BootError::memory("ACPI table"))?;
        self.next = end;
        Ok(address)
    }
}

fn fadt(dsdt: u64) -> FADTBuilder {
    let register = |offset: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(layout::ACPI_PM_PORT + offset),
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        // The guest has no power button and no sleep button: the set bits mean "not fixed hardware".
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Wbinvd);
    fadt.iapc_boot_arch = (IAPC_8042 | IAPC_NO_VGA).into();
    fadt.century = RTC_CENTURY;
    fadt.sleep_control_reg = register(0);
    fadt.sleep_status_reg = register(1);
    fadt.reset_reg = register(2);
    fadt.reset_value = RESET_VALUE;
    fadt
}

/// An ISA-like device: its name, hardware ID, ports and interrupt.
struct IsaDevice {
    name: &'static str,
    id: &'static str,
    ports: &'static [(u16, u8)],
    gsi: Option<u32>,
}

const ISA_DEVICES: [IsaDevice; 3] = [
    IsaDevice {
        name: "COM1",
        id: "PNP0501",
        ports: &[(layout::SERIAL_PORT, SerialPort::PORTS as u8)],
        gsi: Some(layout::SERIAL_GSI),
    },
    IsaDevice {
        name: "PS2K",
        id: "PNP0303",
        ports: &[(layout::I8042_PORT, 1), (layout::I8042_PORT + 4, 1)],
        gsi: Some(layout::I8042_GSI),
    },
    // The RTC has no interrupt, because it only reports the time.
    IsaDevice {
        name: "RTC_",
        id: "PNP0B00",
        ports: &[(layout::RTC_PORT, CmosRtc::PORTS as u8)],
        gsi: None,
    },
];

/// The body of the DSDT.
fn dsdt(virtio: &[MmioDevice]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&S5_SLEEP_TYPE, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(&mut bytes);
    for device in &ISA_DEVICES {
        isa_device(device, &mut bytes);
    }
    pvpanic(&mut bytes);
    clock(&mut bytes);
    generation_id(&mut bytes);
    for (uid, device) in virtio.iter().enumerate() {
        virtio_mmio(uid, device, &mut bytes);
    }
    bytes
}

fn interrupt(gsi: u32) -> Interrupt {
    // The interrupt is a consumer's, edge-triggered, active high and exclusive, as KVM's irqfd raises it.
    Interrupt::new(true, true, false, false, gsi)
}

fn isa_device(device: &IsaDevice, sink: &mut Vec<u8>) {
    let ports: Vec<IO> = device
        .ports
        .iter()
        .map(|(base, len)| IO::new(*base, *base, 1, *len))
        .collect();
    let line = device.gsi.map(interrupt);
    let mut resources: Vec<&dyn Aml> = ports.iter().map(|p| p as &dyn Aml).collect();
    resources.extend(line.iter().map(|l| l as &dyn Aml));
    let (id, resources) = (EISAName::new(device.id), ResourceTemplate::new(resources));
    let (hid, crs) = (
        Name::new("_HID".into(), &id),
        Name::new("_CRS".into(), &resources),
    );
    let uid = Name::new("_UID".into(), &ZERO);
    Device::new(Path::new(device.name), vec![&hid, &uid, &crs]).to_aml_bytes(sink);
}

fn pvpanic(sink: &mut Vec<u8>) {
    Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_UID".into(), &ZERO),
            // Present, enabled, shown, working.
            &Name::new("_STA".into(), &0xfu8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(
                    layout::PVPANIC_PORT,
                    layout::PVPANIC_PORT,
                    1,
                    1,
                )]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

/// The vmclock page, with the IDs that the drivers of Linux and the device of QEMU have.
fn clock(sink: &mut Vec<u8>) {
    // The page lies below 4 GiB.
    let page = Memory32Fixed::new(false, layout::VM_CLOCK as u32, VmClock::SIZE as u32);
    Device::new(
        "VCLK".into(),
        vec![
            &Name::new("_HID".into(), &"AMZNC10C"),
            &Name::new("_CID".into(), &"VMCLOCK"),
            &Name::new("_DDN".into(), &"VMCLOCK"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&page])),
        ],
    )
    .to_aml_bytes(sink);
}

/// The generation ID of the VM (Microsoft, Virtual Machine Generation ID), with the names of QEMU's device, and the
/// event device that notifies of a new ID (ACPI 6.5, 5.6.9). The vmclock page changes whenever the ID does.
fn generation_id(sink: &mut Vec<u8>) {
    // Microsoft's name for the device; drivers look for it in either case.
    let name = "VM_Gen_Counter";
    let address = layout::VM_GENERATION_ID as u32;
    Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"QEMUVGID"),
            &Name::new("_CID".into(), &name),
            &Name::new("_DDN".into(), &name),
            // The lower and the upper half of the address.
            &Name::new("ADDR".into(), &Package::new(vec![&address, &ZERO])),
        ],
    )
    .to_aml_bytes(sink);
    let gsi = layout::GENERATION_GSI;
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt(gsi)])),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&If::new(
                    &Equal::new(&Arg(0), &gsi),
                    vec![
                        &Notify::new(&Path::new("VGEN"), &CHANGED),
                        &Notify::new(&Path::new("VCLK"), &CHANGED),
                    ],
                )],
            ),
        ],
    )
    .to_aml_bytes(sink);
}

/// A virtio-mmio device (ACPI ID `LNRO0005`, as the `virtio_mmio` driver of Linux knows it).
fn virtio_mmio(uid: usize, device: &MmioDevice, sink: &mut Vec<u8>) {
    Device::new(
        Path::new(&format!("V{uid:03X}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &uid),
            // Accesses of the device are coherent with the CPUs' caches.
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, device.base, device.size),
                    &interrupt(device.gsi),
                ]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap()
    }

    fn table(memory: &GuestMemory, address: u64) -> Vec<u8> {
        let len: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let mut bytes = vec![0; len as usize];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(
            sum,
            0,
            "checksum of {}",
            String::from_utf8_lossy(&bytes[..4])
        );
        bytes
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_with_a_right_checksum() {
        let memory = memory();
        let devices = [MmioDevice {
            base: 0xc000_1000,
            size: 0x1000,
            gsi: 5,
        }];
        let rsdp = build(&memory, 3, &devices).unwrap();
        let mut bytes = [0; 36];
        memory.read_slice(&mut bytes, rsdp).unwrap();
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!(
            bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
        let xsdt = table(&memory, u64_at(&bytes, 24));
        let tables: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|entry| table(&memory, u64_at(entry, 0)))
            .collect();
        assert_eq!(
            tables.iter().map(|t| &t[..4]).collect::<Vec<_>>(),
            [b"FACP", b"APIC"]
        );
        let dsdt = table(&memory, u64_at(&tables[0], 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        for id in [b"LNRO0005", b"AMZNC10C", b"QEMUVGID"] {
            assert!(dsdt.windows(8).any(|w| w == id), "{id:?}");
        }
        assert_eq!(
            tables[1].len(),
            44 + 3 * 8 + 12,
            "three local APICs and an I/O APIC"
        );
        let flags = u32::from_le_bytes(tables[0][112..116].try_into().unwrap());
        assert_eq!(
            flags & ((1 << 20) | (1 << 10)),
            (1 << 20) | (1 << 10),
            "hardware-reduced, with a reset register"
        );
    }

    #[test]
    fn devices_that_do_not_fit_are_refused() {
        let devices = vec![
            MmioDevice {
                base: 0xc000_1000,
                size: 0x1000,
                gsi: 5
            };
            999 * 3
        ];
        assert!(matches!(
            build(&memory(), 1, &devices),
            Err(BootError::AcpiTooLarge { .. })
        ));
    }
}
