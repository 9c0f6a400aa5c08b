//! Scenarios of the boot: kernels, CPUs and memory.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::guest::{Guest, KERNEL_CACHE, Start, script_word};
use crate::result::{Failure, Figures};

/// Boots to the shell of the root file system and powers off from there.
fn to_a_shell(disk: &str) -> Result<Figures, Failure> {
    let mut guest = Start::new()
        .args(&["--disk", disk])
        .cmdline("root=/dev/vda")
        .spawn()?;
    guest.wait_for("COPPICE-ROOT")?;
    guest.type_in("echo typed-$((6*7))\n")?;
    guest.wait_for("typed-42")?;
    guest.type_in("poweroff -f\n")?;
    guest.expect_exit(0)?;
    Ok(Figures::from([(
        "guest_seconds_at_init".into(),
        json!(uptime(&guest)?),
    )]))
}

/// The uptime in seconds at the first line of the guest's first process.
pub fn uptime(guest: &Guest) -> Result<f64, Failure> {
    let line = guest.line("COPPICE-INIT uptime=")?;
    line.parse()
        .or_else(|_| Failure::claim(format!("uptime {line:?}")))
}

/// Boots from a VHDX.
pub fn userspace_from_vhdx(_: &Path) -> Result<Figures, Failure> {
    to_a_shell("guest/root.vhdx,ro")
}

/// Boots from a raw file, read-write.
pub fn userspace_from_raw(out: &Path) -> Result<Figures, Failure> {
    let disk = out.join("root.raw");
    fs::copy("guest/root.raw", &disk).map_err(Failure::io("copy root.raw"))?;
    let figures = to_a_shell(&format!("{},format=raw", disk.display()));
    fs::remove_file(&disk).map_err(Failure::io("remove root.raw"))?;
    figures
}

/// Boots by the PVH, 64-bit and bzImage entries. The ELF is the kernel that the first boot has unpacked.
pub fn every_protocol(out: &Path) -> Result<Figures, Failure> {
    let mut figures = Figures::new();
    for (kernel, protocol) in [
        (PathBuf::from("guest/vmlinuz"), "Auto"),
        (PathBuf::from("guest/vmlinuz"), "Linux64"),
        (PathBuf::from("guest/vmlinuz"), "BzImage"),
        (unpacked()?, "Pvh"),
        (unpacked()?, "Linux64"),
    ] {
        let config = out.join("config.json");
        let boot_args = format!(
            "console=ttyS0 reboot=k panic=-1 quiet {}",
            script_word("echo up")
        );
        let json = json!({
            "boot-source": {
                "kernel_image_path": kernel,
                "initrd_path": "guest/initrd.cpio.gz",
                "boot_args": boot_args,
                "boot_protocol": protocol,
            },
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 256},
        });
        fs::write(&config, json.to_string()).map_err(Failure::io("write config.json"))?;
        let mut guest = Start::bare(&["--config", &config.to_string_lossy()]).spawn()?;
        guest.expect_exit(0)?;
        let form = if kernel.extension().is_some() {
            "elf"
        } else {
            "bzimage"
        };
        figures.insert(
            format!("{form}_{protocol}_guest_seconds_at_init"),
            json!(uptime(&guest)?),
        );
    }
    Ok(figures)
}

/// The kernel that a boot has unpacked into the cache.
pub fn unpacked() -> Result<PathBuf, Failure> {
    let cache = fs::read_dir(Path::new(KERNEL_CACHE).join("coppice/kernels"))
        .map_err(Failure::io("read the kernel cache"))?;
    let mut kernels = cache.filter_map(Result::ok).map(|entry| entry.path());
    kernels
        .find(|path| path.extension().is_some_and(|extension| extension == "elf"))
        .ok_or_else(|| Failure::Claim("the kernel cache holds no kernel".into()))
}

/// The guest has as many CPUs as configured.
pub fn cpus(_: &Path) -> Result<Figures, Failure> {
    for cpus in ["1", "2", "4"] {
        let script = "echo CPUS $(nproc) $(grep -c ^processor /proc/cpuinfo) $(cat /sys/devices/system/cpu/online)";
        let mut guest = Start::new()
            .args(&["--cpus", cpus])
            .script(script)
            .spawn()?;
        guest.expect_exit(0)?;
        let last = cpus.parse::<u32>().unwrap_or(1) - 1;
        let online = if last == 0 {
            "0".to_owned()
        } else {
            format!("0-{last}")
        };
        let seen = guest.line("CPUS ")?;
        if seen != format!("{cpus} {cpus} {online}") {
            return Failure::claim(format!("{cpus} CPUs given, the guest sees {seen}"));
        }
    }
    Ok(Figures::new())
}

/// The guest has RAM on both sides of the hole.
pub fn memory_beyond_4_gib(_: &Path) -> Result<Figures, Failure> {
    let script = "grep MemTotal /proc/meminfo; grep 'System RAM' /proc/iomem | tail -1";
    let mut guest = Start::new().args(&["--mem", "5G"]).script(script).spawn()?;
    guest.expect_exit(0)?;
    let total = guest.line("MemTotal:")?;
    let kib: u64 = total.trim_end_matches(" kB").parse().unwrap_or(0);
    if !guest.console().contains("100000000-17fffffff : System RAM") {
        return Failure::claim("no RAM from 4 GiB to 6 GiB");
    }
    if !((4_800 << 10)..(5 << 20)).contains(&kib) {
        return Failure::claim(format!("of 5 GiB the guest sees {total}"));
    }
    Ok(Figures::from([("mem_total_kib".into(), json!(kib))]))
}

/// Eight guests run at the same time on one disk file.
pub fn eight_guests(_: &Path) -> Result<Figures, Failure> {
    let script = "mount -o ro /dev/vda /mnt && md5sum /mnt/bin/busybox && echo DONE && sleep 3";
    let guests: Result<Vec<_>, _> = (0..8)
        .map(|_| {
            Start::new()
                .args(&["--disk", "guest/root.vhdx,ro"])
                .script(script)
                .spawn()
        })
        .collect();
    let mut guests = guests?;
    let mut sums = Vec::new();
    for guest in &mut guests {
        guest.wait_for("DONE")?;
    }
    for guest in &mut guests {
        guest.expect_exit(0)?;
        let console = guest.console();
        let sum = console
            .lines()
            .find(|line| line.ends_with("/mnt/bin/busybox"))
            .map(str::to_owned);
        sums.push(sum);
    }
    if sums[0].is_none() || sums.iter().any(|sum| *sum != sums[0]) {
        return Failure::claim(format!("the guests read different files: {sums:?}"));
    }
    Ok(Figures::new())
}
