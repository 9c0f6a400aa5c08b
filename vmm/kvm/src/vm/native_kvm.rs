//! Tiny bare-metal guests on the machine's own `/dev/kvm`: exits, memory slots, eventfds, pause and resume.
//!
//! They run on any KVM, slow or fast. Where there is none they fail, because nothing else can test this module.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use devices::bus::{Bus, BusDevice};
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use super::*;

mod clock;
mod cpu;
mod huge_pages;

const CODE: u64 = 0x1000;
const PORT: u64 = 0x10;
const MMIO: u64 = MMIO_BASE;
const MMIO_BASE: u64 = crate::layout::VIRTIO_MMIO_START;

#[derive(Debug, PartialEq, Eq)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

/// A device that sends each access to the test; reads return 0x5a.
struct Probe(std::sync::mpsc::Sender<Access>);

impl BusDevice for Probe {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0x5a);
        self.0.send(Access::Read(offset, data.len())).unwrap();
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.send(Access::Write(offset, data.to_vec())).unwrap();
    }
}

fn vm(vcpus: u8, memory_bytes: u64) -> Vm {
    Vm::new(VmSettings {
        memory_bytes,
        vcpus,
        smt: false,
        cpu: GuestCpu::Host,
        is_saved: false,
        huge_pages: HugePages::Never,
        confine_vcpu: || Ok(()),
    })
    .unwrap_or_else(|error| panic!("this test needs a working /dev/kvm: {error}"))
}

/// The processor mode that the code of a test runs in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// 16 bits.
    Real,
    /// 32 bits, flat, without paging.
    Protected,
    /// 64 bits; the second 2 MiB of addresses are at [`HIGH`].
    Long,
}

/// Where the second page of the long mode's page tables lies: beyond 4 GiB.
const HIGH: u64 = (4 << 30) + (32 << 20);
const PAGE_TABLES: u64 = 0x9000;

struct Running {
    vcpus: Vcpus,
    accesses: Receiver<Access>,
    exits: Receiver<VcpuExit>,
}

/// A [`Probe`] at `PORT` and at `MMIO`, and what it sends.
fn probed_buses() -> (Buses, Receiver<Access>) {
    let (sender, accesses) = channel();
    let probe: Arc<Mutex<dyn BusDevice>> = Arc::new(Mutex::new(Probe(sender)));
    let mut buses = Buses {
        pio: Bus::new(),
        mmio: Bus::new(),
    };
    buses.pio.insert(PORT, 8, probe.clone()).unwrap();
    buses.mmio.insert(MMIO, 0x1000, probe).unwrap();
    (buses, accesses)
}

/// Runs `code` at `CODE`, with a [`Probe`] at `PORT` and at `MMIO`.
fn run(vm: Vm, code: &[u8], mode: Mode) -> Running {
    vm.memory().write_slice(code, GuestAddress(CODE)).unwrap();
    let (buses, accesses) = probed_buses();
    let (sender, exits) = channel();
    let sender = Mutex::new(sender);
    let regs = kvm_regs {
        rip: CODE,
        rflags: 2,
        ..Default::default()
    };
    if mode == Mode::Long {
        let present_writable = 0b11;
        let large = 1 << 7;
        for (at, entry) in [
            (PAGE_TABLES, (PAGE_TABLES + 0x1000) | present_writable),
            (
                PAGE_TABLES + 0x1000,
                (PAGE_TABLES + 0x2000) | present_writable,
            ),
            (PAGE_TABLES + 0x2000, present_writable | large),
            (PAGE_TABLES + 0x2008, HIGH | present_writable | large),
        ] {
            vm.memory().write_obj(entry, GuestAddress(at)).unwrap();
        }
    }
    let set_sregs = |sregs: &mut kvm_sregs| {
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        let (long, flat) = match mode {
            Mode::Real => return,
            Mode::Protected => (0, 1),
            Mode::Long => (1, 0),
        };
        sregs.cr0 |= 1;
        sregs.idt.limit = 0;
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            (segment.base, segment.limit, segment.g) = (0, u32::MAX, 1);
            (segment.l, segment.db) = (0, 1);
        }
        (sregs.cs.l, sregs.cs.db) = (long, flat);
        if long == 1 {
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 = 1 << 5; // PAE
            sregs.efer = (1 << 8) | (1 << 10); // LME, LMA
            sregs.cr0 |= 1 << 31; // PG
        }
    };
    let on_exit = move |exit| sender.lock().unwrap().send(exit).unwrap();
    let vcpus = vm.start(buses, &regs, set_sregs, on_exit).unwrap();
    Running {
        vcpus,
        accesses,
        exits,
    }
}

#[test]
fn port_accesses_reach_the_device_and_its_value_reaches_the_guest() {
    // in al, PORT; inc al; out PORT+1, al; hlt
    let guest = run(
        vm(1, 4 << 20),
        &[0xe4, 0x10, 0xfe, 0xc0, 0xe6, 0x11, 0xf4],
        Mode::Real,
    );
    assert_eq!(guest.accesses.recv().unwrap(), Access::Read(0, 1));
    assert_eq!(guest.accesses.recv().unwrap(), Access::Write(1, vec![0x5b]));
}

#[test]
fn a_string_access_is_one_access_for_each_element() {
    let vm = vm(1, 4 << 20);
    vm.memory()
        .write_slice(b"abcdef", GuestAddress(0x3000))
        .unwrap();
    // mov dx, PORT; mov di, 0x3100; mov cx, 3; rep insb; mov si, 0x3000; mov cx, 3; rep outsw; mov si, 0x3100; outsw;
    // hlt
    let code = [
        0xba, 0x10, 0x00, 0xbf, 0x00, 0x31, 0xb9, 0x03, 0x00, 0xf3, 0x6c, 0xbe, 0x00, 0x30, 0xb9,
        0x03, 0x00, 0xf3, 0x6f, 0xbe, 0x00, 0x31, 0x6f, 0xf4,
    ];
    let guest = run(vm, &code, Mode::Real);
    for expected in [
        Access::Read(0, 1),
        Access::Read(0, 1),
        Access::Read(0, 1),
        Access::Write(0, b"ab".to_vec()),
        Access::Write(0, b"cd".to_vec()),
        Access::Write(0, b"ef".to_vec()),
        Access::Write(0, vec![0x5a; 2]),
    ] {
        assert_eq!(guest.accesses.recv().unwrap(), expected);
    }
}

#[test]
fn an_unclaimed_port_reads_all_ones() {
    // in al, 0x80; out PORT, al; hlt
    let guest = run(vm(1, 4 << 20), &[0xe4, 0x80, 0xe6, 0x10, 0xf4], Mode::Real);
    assert_eq!(guest.accesses.recv().unwrap(), Access::Write(0, vec![0xff]));
}

#[test]
fn mmio_accesses_reach_the_device() {
    let mut code = vec![0xa1]; // mov eax, [MMIO + 4]
    code.extend((MMIO as u32 + 4).to_le_bytes());
    code.push(0xa3); // mov [MMIO + 8], eax
    code.extend((MMIO as u32 + 8).to_le_bytes());
    code.push(0xf4); // hlt
    let guest = run(vm(1, 4 << 20), &code, Mode::Protected);
    assert_eq!(guest.accesses.recv().unwrap(), Access::Read(4, 4));
    assert_eq!(
        guest.accesses.recv().unwrap(),
        Access::Write(8, vec![0x5a; 4])
    );
}

#[test]
fn an_ioevent_takes_the_write_and_leaves_other_values_to_the_device() {
    let vm = vm(1, 4 << 20);
    let event = EventFd::new(0).unwrap();
    vm.register_ioevent(&event, MMIO + 0x50, 1).unwrap();
    let mut code = Vec::new();
    for value in [1u32, 2] {
        code.extend([0xc7, 0x05]); // mov dword [MMIO + 0x50], value
        code.extend((MMIO as u32 + 0x50).to_le_bytes());
        code.extend(value.to_le_bytes());
    }
    code.push(0xf4);
    let guest = run(vm, &code, Mode::Protected);
    assert_eq!(
        guest.accesses.recv().unwrap(),
        Access::Write(0x50, vec![2, 0, 0, 0])
    );
    assert_eq!(event.read().unwrap(), 1);
}

#[test]
fn an_irqfd_interrupts_a_halted_guest() {
    const GSI: u32 = 1;
    const HANDLER: u16 = 0x2000;
    let vm = vm(1, 4 << 20);
    let event = EventFd::new(0).unwrap();
    vm.register_irqfd(&event, GSI).unwrap();
    let vector = 0x20 + u64::from(GSI);
    vm.memory()
        .write_obj(HANDLER, GuestAddress(vector * 4))
        .unwrap();
    // out PORT+1, al; mov al, 0x20; out 0x20, al (end of interrupt); iret
    let handler = [0xe6, 0x11, 0xb0, 0x20, 0xe6, 0x20, 0xcf];
    vm.memory()
        .write_slice(&handler, GuestAddress(HANDLER.into()))
        .unwrap();
    // The interrupt controller (8259): mov al, word; out port, al. Vectors from 0x20, a slave at line 2, 8086 mode,
    // none masked.
    let mut code = Vec::new();
    for (port, word) in [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 0x04),
        (0x21, 0x01),
        (0x21, 0x00),
    ] {
        code.extend([0xb0, word, 0xe6, port]);
    }
    // mov sp, 0x8000; sti; out PORT, al; l: hlt; jmp l
    code.extend([0xbc, 0x00, 0x80, 0xfb, 0xe6, 0x10, 0xf4, 0xeb, 0xfd]);
    let guest = run(vm, &code, Mode::Real);
    assert_eq!(guest.accesses.recv().unwrap(), Access::Write(0, vec![0]));
    for _ in 0..2 {
        event.write(1).unwrap();
        assert!(matches!(
            guest.accesses.recv().unwrap(),
            Access::Write(1, _)
        ));
    }
}

#[test]
fn a_fault_without_a_handler_ends_the_guest_once() {
    // int3, with an empty IDT
    let guest = run(vm(1, 4 << 20), &[0xcc], Mode::Protected);
    // A KVM that interprets the guest's instructions fails at the fault, and raises no triple fault.
    let exit = guest.exits.recv().unwrap();
    assert!(
        matches!(
            exit,
            VcpuExit::TripleFault | VcpuExit::Failed(VcpuError::Internal { .. })
        ),
        "{exit:?}"
    );
    drop(guest.vcpus);
    assert!(guest.exits.recv().is_err(), "told a second time");
}

#[test]
fn a_paused_guest_stands_still_and_a_resumed_one_goes_on() {
    // l: out PORT, al; jmp l
    let guest = run(vm(1, 4 << 20), &[0xe6, 0x10, 0xeb, 0xfc], Mode::Real);
    for _ in 0..3 {
        guest
            .accesses
            .recv()
            .unwrap_or_else(|_| panic!("{:?}", guest.exits.try_recv()));
        guest.vcpus.pause();
        while guest.accesses.try_recv().is_ok() {}
        guest.vcpus.pause();
        assert!(guest.accesses.try_recv().is_err(), "an access while paused");
        guest.vcpus.resume();
    }
    guest.accesses.recv().unwrap();
}

#[test]
fn a_guest_that_never_exits_can_be_paused_and_stopped() {
    // l: jmp l
    let mut guest = run(vm(1, 4 << 20), &[0xeb, 0xfe], Mode::Real);
    guest.vcpus.pause();
    guest.vcpus.resume();
    guest.vcpus.stop();
    guest.vcpus.pause();
    guest.vcpus.resume();
}

#[test]
fn vcpus_that_were_never_started_pause_and_stop() {
    let guest = run(vm(MAX_VCPUS, 4 << 20), &[0xeb, 0xfe], Mode::Real);
    guest.vcpus.pause();
    guest.vcpus.resume();
}

#[test]
fn ram_lies_on_both_sides_of_the_hole() {
    let memory_bytes = (3 << 30) + (64 << 20);
    let below_hole = vm(1, memory_bytes);
    let memory = below_hole.memory();
    assert!(
        memory.write_obj(0u8, GuestAddress(3 << 30)).is_err(),
        "the hole"
    );
    // mov al, [0xbfffffff]; out PORT, al; hlt: the last byte below the hole.
    memory
        .write_obj(0x66u8, GuestAddress((3 << 30) - 1))
        .unwrap();
    let code = [0xa0, 0xff, 0xff, 0xff, 0xbf, 0xe6, 0x10, 0xf4];
    let running = run(below_hole, &code, Mode::Protected);
    assert_eq!(
        running.accesses.recv().unwrap(),
        Access::Write(0, vec![0x66])
    );

    let beyond_hole = vm(1, memory_bytes);
    let memory = beyond_hole.memory().clone();
    memory.write_obj(0x77u8, GuestAddress(HIGH)).unwrap();
    // mov al, [0x200000]; inc al; mov [0x200001], al; out PORT, al; hlt: 0x200000 is mapped to HIGH.
    let code = [
        0x8a, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0xfe, 0xc0, 0x88, 0x04, 0x25, 0x01, 0x00, 0x20,
        0x00, 0xe6, 0x10, 0xf4,
    ];
    let running = run(beyond_hole, &code, Mode::Long);
    assert_eq!(
        running.accesses.recv().unwrap(),
        Access::Write(0, vec![0x78])
    );
    assert_eq!(memory.read_obj::<u8>(GuestAddress(HIGH + 1)).unwrap(), 0x78);
}

/// Runs a guest that reads a byte of a window and writes the next one. Returns what it read, and the bytes afterwards.
fn guest_with_window(access: WindowAccess) -> (Access, [u8; 2], PlacedWindow) {
    let window = Arc::new(Window::reserve(64 << 20).unwrap());
    let mut vm = vm(1, 4 << 20);
    let placed = vm.add_window(window.clone(), access).unwrap();
    assert_eq!(placed.address, 4 << 30);
    let at = HIGH - placed.address;
    window.write(at, &[0x77]);
    // mov al, [0x200000]; inc al; mov [0x200001], al; out PORT, al; hlt: 0x200000 is mapped to HIGH.
    let code = [
        0x8a, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0xfe, 0xc0, 0x88, 0x04, 0x25, 0x01, 0x00, 0x20,
        0x00, 0xe6, 0x10, 0xf4,
    ];
    let running = run(vm, &code, Mode::Long);
    let seen = running.accesses.recv().unwrap();
    drop(running);
    let mut bytes = [0; 2];
    window.read(at, &mut bytes);
    (seen, bytes, placed)
}

#[test]
fn a_guest_uses_a_window_as_it_may_and_what_it_writes_is_logged() {
    let seen = Access::Write(0, vec![0x78]);
    let (read, bytes, placed) = guest_with_window(WindowAccess::Read);
    assert_eq!((&read, bytes), (&seen, [0x77, 0]));
    assert!(placed.log.is_none());
    let (read, bytes, placed) = guest_with_window(WindowAccess::Write);
    assert_eq!((&read, bytes), (&seen, [0x77, 0x78]));
    assert!(placed.log.is_none());
    let (read, bytes, placed) = guest_with_window(WindowAccess::LoggedWrite);
    assert_eq!((&read, bytes), (&seen, [0x77, 0x78]));
    let log = placed.log.unwrap();
    let page = (HIGH - placed.address) as usize / 4096;
    let mut expected = vec![0; (64 << 20) / 4096 / 64];
    expected[page / 64] |= 1 << (page % 64);
    assert_eq!(log.take().unwrap(), expected);
    expected.fill(0);
    assert_eq!(log.take().unwrap(), expected, "it is forgotten");
}

#[test]
fn the_guest_starts_its_other_vcpus() {
    const STARTED_AT: u64 = 0x2000;
    let vm = vm(2, 4 << 20);
    // mov al, 7; out PORT+1, al; hlt
    vm.memory()
        .write_slice(&[0xb0, 7, 0xe6, 0x11, 0xf4], GuestAddress(STARTED_AT))
        .unwrap();
    let mut code = Vec::new();
    let command = crate::layout::LOCAL_APIC + 0x300;
    // The interrupt command register: to all but self, INIT, then SIPI with the page of the code (SDM 3A, 11.6.1).
    for value in [0xc_4500, 0xc_4600 | (STARTED_AT as u32 >> 12)] {
        code.extend([0xc7, 0x05]); // mov dword [command], value
        code.extend(command.to_le_bytes());
        code.extend(value.to_le_bytes());
    }
    code.push(0xf4);
    let guest = run(vm, &code, Mode::Protected);
    assert_eq!(guest.accesses.recv().unwrap(), Access::Write(1, vec![7]));
    guest.vcpus.pause();
}

#[test]
fn a_panic_on_a_vcpu_thread_ends_the_guest() {
    struct Panics;
    impl BusDevice for Panics {
        fn read(&mut self, _: u64, _: &mut [u8]) {}
        fn write(&mut self, _: u64, _: &[u8]) {
            panic!("as this test wants");
        }
    }
    let vm = vm(2, 4 << 20);
    // out PORT, al
    vm.memory()
        .write_slice(&[0xe6, 0x10], GuestAddress(CODE))
        .unwrap();
    let mut pio = Bus::new();
    pio.insert(PORT, 1, Arc::new(Mutex::new(Panics))).unwrap();
    let buses = Buses {
        pio,
        mmio: Bus::new(),
    };
    let regs = kvm_regs {
        rip: CODE,
        rflags: 2,
        ..Default::default()
    };
    let (sender, exits) = channel();
    let sender = Mutex::new(sender);
    let vcpus = vm
        .start(
            buses,
            &regs,
            |sregs| (sregs.cs.base, sregs.cs.selector) = (0, 0),
            move |exit| sender.lock().unwrap().send(exit).unwrap(),
        )
        .unwrap();
    assert_eq!(
        exits.recv().unwrap(),
        VcpuExit::Failed(VcpuError::Panicked { index: 0 })
    );
    vcpus.pause();
}

#[test]
fn the_error_for_a_missing_kvm_says_what_to_do() {
    for (errno, advice) in [(libc::ENOENT, "load kvm_amd"), (libc::EACCES, "group kvm")] {
        let error = VmError::Open(errno::Error::new(errno)).to_string();
        assert!(error.contains(advice) && !error.contains('\n'), "{error}");
    }
}

#[test]
fn impossible_settings_are_refused() {
    let settings = VmSettings {
        memory_bytes: 4 << 20,
        vcpus: 33,
        smt: false,
        cpu: GuestCpu::Host,
        is_saved: false,
        huge_pages: HugePages::Never,
        confine_vcpu: || Ok(()),
    };
    assert!(matches!(Vm::new(settings.clone()), Err(VmError::Vcpus(33))));
    assert!(matches!(
        Vm::new(VmSettings {
            vcpus: 0,
            ..settings
        }),
        Err(VmError::Vcpus(0))
    ));
}
