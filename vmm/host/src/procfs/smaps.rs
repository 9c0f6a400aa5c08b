//! A process's mappings, by `/proc/PID/smaps`, and which of them are guest RAM.

use std::ops::Range;

/// Memory of some mappings in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// In the process's page tables.
    pub resident: u64,
    /// The process's share of that: pages that others map, too, are divided by the number of processes (Pss).
    pub proportional: u64,
    /// Mapped by no other process.
    pub private: u64,
    /// Mapped by other processes, too.
    pub shared: u64,
    /// Of no file (anonymous memory).
    pub anonymous: u64,
}

impl Usage {
    /// Adds a line of `smaps` or `smaps_rollup`.
    fn add_line(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next(), words.next());
        let kib = value.and_then(|value| value.parse::<u64>().ok());
        let (Some(name), Some(kib)) = (name, kib) else {
            return;
        };
        match name {
            "Rss:" => self.resident += kib,
            "Pss:" => self.proportional += kib,
            "Private_Clean:" | "Private_Dirty:" => self.private += kib,
            "Shared_Clean:" | "Shared_Dirty:" => self.shared += kib,
            "Anonymous:" => self.anonymous += kib,
            _ => {}
        }
    }

    fn add(&mut self, other: &Self) {
        self.resident += other.resident;
        self.proportional += other.proportional;
        self.private += other.private;
        self.shared += other.shared;
        self.anonymous += other.anonymous;
    }

    /// The sum of a whole `smaps_rollup`.
    pub fn of_rollup(text: &str) -> Self {
        let mut usage = Self::default();
        text.lines().for_each(|line| usage.add_line(line));
        usage
    }
}

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Addresses in the process.
    pub range: Range<u64>,
    /// Whether it is readable, writable, not executable and private, as guest RAM is.
    is_data: bool,
    /// Whether it is not accounted as committed memory (`nr` of `VmFlags`, `MAP_NORESERVE`). Coppice maps guest RAM so,
    /// and nothing else.
    is_unreserved: bool,
    /// The memory that it takes.
    pub usage: Usage,
}

/// The range and permissions of a mapping's first line: `7f0000000000-7f0008000000 rw-p 00000000 00:00 0  name`.
fn head(line: &str) -> Option<(Range<u64>, &str)> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    Some((address(start)?..address(end)?, words.next()?))
}

/// The mappings of `/proc/PID/smaps`, by address.
pub fn parse(text: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        if let Some((range, permissions)) = head(line) {
            mappings.push(Mapping {
                range,
                is_data: permissions == "rw-p",
                is_unreserved: false,
                usage: Usage::default(),
            });
        } else if let Some(mapping) = mappings.last_mut() {
            match line.strip_prefix("VmFlags:") {
                Some(flags) => {
                    mapping.is_unreserved = flags.split_whitespace().any(|flag| flag == "nr");
                }
                None => mapping.usage.add_line(line),
            }
        }
    }
    mappings
}

/// Finds guest RAM of `bytes` bytes: a run of adjacent mappings of the same kind, which have this size together.
/// Sharing cuts guest RAM into many mappings, anonymous ones and ones of files, and other mappings may be adjacent to
/// it. Of several such runs, guest RAM is the one that is used most.
pub fn guest_ram(mappings: &[Mapping], bytes: u64) -> Option<Range<u64>> {
    let run = |first: usize| {
        let rest = mappings.get(first..)?;
        let start = rest.first()?;
        let (mut end, mut resident) = (start.range.start, 0);
        for mapping in rest {
            let continues = mapping.range.start == end
                && mapping.is_data
                && mapping.is_unreserved == start.is_unreserved;
            if !continues {
                return None;
            }
            end = mapping.range.end;
            resident += mapping.usage.resident;
            let size = end - start.range.start;
            if size >= bytes {
                return (size == bytes).then_some((resident, start.range.start..end));
            }
        }
        None
    };
    (0..mappings.len())
        .filter_map(run)
        .max_by_key(|(resident, _)| *resident)
        .map(|(_, range)| range)
}

/// The memory of the mappings inside `ram`, and that of all others.
pub fn split(mappings: &[Mapping], ram: &Range<u64>) -> (Usage, Usage) {
    let (mut inside, mut beside) = (Usage::default(), Usage::default());
    for mapping in mappings {
        let is_inside = ram.start <= mapping.range.start && mapping.range.end <= ram.end;
        if is_inside {
            inside.add(&mapping.usage);
        } else {
            beside.add(&mapping.usage);
        }
    }
    (inside, beside)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A mapping as the kernel writes it.
    fn mapping(
        start: u64,
        end: u64,
        permissions: &str,
        name: &str,
        private: u64,
        shared: u64,
        flags: &str,
    ) -> String {
        let (size, resident) = ((end - start) / 1024, private + shared);
        let half = private + shared / 2;
        format!(
            "{start:x}-{end:x} {permissions} 00000000 00:00 0                          {name}\n\
             Size:           {size:>8} kB\nKernelPageSize:        4 kB\nMMUPageSize:           4 kB\n\
             Rss:            {resident:>8} kB\nPss:            {half:>8} kB\nPss_Dirty:             0 kB\n\
             Shared_Clean:   {shared:>8} kB\nShared_Dirty:          0 kB\nPrivate_Clean:         0 kB\n\
             Private_Dirty:  {private:>8} kB\nReferenced:            0 kB\nAnonymous:      {private:>8} kB\n\
             AnonHugePages:         0 kB\nSwap:                  0 kB\nLocked:                0 kB\n\
             THPeligible:    0\nProtectionKey:         0\nVmFlags: {flags}\n"
        )
    }

    const RAM: &str = "rd wr mr mw me nr nh sd";
    const STACK: &str = "rd wr mr mw me ac sd";
    const BASE: u64 = 0x7f12_4000_0000;

    /// Guest RAM of 128 MiB in five pieces, with a thread's stack right before it and a library right after it.
    fn shared_guest() -> String {
        let at = |mib: u64| BASE + mib * MIB;
        [
            mapping(
                0x40_0000,
                0x50_0000,
                "r-xp",
                "/coppice",
                0,
                800,
                "rd ex mr mw me sd",
            ),
            mapping(
                BASE - 2 * MIB - 4096,
                BASE - 2 * MIB,
                "---p",
                "",
                0,
                0,
                "mr mw me sd",
            ),
            mapping(BASE - 2 * MIB, BASE, "rw-p", "", 16, 0, STACK),
            mapping(at(0), at(16), "rw-p", "", 1000, 0, RAM),
            mapping(at(16), at(40), "rw-p", "/cache/kernel.elf", 200, 9000, RAM),
            mapping(at(40), at(80), "rw-p", "", 20_000, 0, RAM),
            mapping(
                at(80),
                at(126),
                "rw-p",
                "/disks/base,v1 .vhdx",
                0,
                40_000,
                RAM,
            ),
            mapping(at(126), at(128), "rw-p", "", 0, 0, RAM),
            mapping(at(128), at(129), "rw-p", "", 4, 0, STACK),
        ]
        .concat()
    }

    #[test]
    fn guest_ram_is_found_whole_in_however_many_pieces() {
        let mappings = parse(&shared_guest());
        assert_eq!(mappings.len(), 9);
        // A stack of 2 MiB and all pieces but the last have the same size together.
        let ram = guest_ram(&mappings, 128 * MIB).unwrap();
        assert_eq!(ram, BASE..BASE + 128 * MIB);
        let (inside, beside) = split(&mappings, &ram);
        assert_eq!(
            (inside.private, inside.shared, inside.anonymous),
            (21_200, 49_000, 21_200)
        );
        assert_eq!(inside.resident, 70_200);
        assert_eq!((beside.private, beside.shared), (20, 800));
        assert_eq!(beside.proportional, 20 + 400);
    }

    #[test]
    fn guest_ram_in_one_piece_is_found_beside_an_unused_one_as_large() {
        let text = [
            mapping(BASE - 256 * MIB, BASE - 128 * MIB, "rw-p", "", 0, 0, STACK),
            mapping(
                BASE,
                BASE + 128 * MIB,
                "rw-p",
                "",
                70_000,
                0,
                "rd wr mr mw me dc sd mg",
            ),
        ]
        .concat();
        let ram = guest_ram(&parse(&text), 128 * MIB);
        assert_eq!(ram, Some(BASE..BASE + 128 * MIB));
    }

    #[test]
    fn no_run_of_another_size_or_with_a_gap_or_of_another_kind_is_guest_ram() {
        let mappings = parse(&shared_guest());
        assert_eq!(guest_ram(&mappings, 100 * MIB), None);
        let gap = [
            mapping(BASE, BASE + 64 * MIB, "rw-p", "", 0, 0, RAM),
            mapping(BASE + 65 * MIB, BASE + 129 * MIB, "rw-p", "", 0, 0, RAM),
        ]
        .concat();
        assert_eq!(guest_ram(&parse(&gap), 128 * MIB), None);
        let read_only = mapping(BASE, BASE + 128 * MIB, "r--p", "", 0, 0, RAM);
        assert_eq!(guest_ram(&parse(&read_only), 128 * MIB), None);
        assert_eq!(guest_ram(&[], 128 * MIB), None);
    }

    #[test]
    fn a_rollup_is_read_as_the_sum_of_all_mappings() {
        let text = mapping(BASE, BASE + MIB, "---p", "[rollup]", 300, 20, "");
        let usage = Usage::of_rollup(&text);
        assert_eq!(
            (usage.private, usage.shared, usage.proportional),
            (300, 20, 310)
        );
    }

    #[test]
    fn the_mappings_of_this_process_add_up_to_its_rollup() {
        let read = |name| std::fs::read_to_string(format!("/proc/self/{name}")).unwrap();
        let (mappings, rollup) = (
            parse(&read("smaps")),
            Usage::of_rollup(&read("smaps_rollup")),
        );
        let (inside, beside) = split(&mappings, &(0..0));
        assert_eq!(inside, Usage::default());
        // Other tests allocate at the same time.
        assert!(beside.resident.abs_diff(rollup.resident) < 64 << 10);
    }
}
