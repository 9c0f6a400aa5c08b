//! What guests do to disks, and what other programs find there.

use std::fs;
use std::path::Path;

use rustix::process::Signal;
use serde_json::json;

use crate::guest::{Guest, Start, script_word};
use crate::host::disk::{fsck_after_replay, fsck_clean, md5_of, to_raw};
use crate::result::{Failure, Figures};

const DISK: &str = "disk.vhdx";

/// A copy of the base, in the folder that is brought out.
fn own_disk(out: &Path) -> Result<String, Failure> {
    let disk = out.join(DISK);
    fs::copy("guest/root.vhdx", &disk).map_err(Failure::io("copy root.vhdx"))?;
    Ok(disk.display().to_string())
}

fn md5(guest: &Guest) -> Result<String, Failure> {
    let line = guest.line("MD5 ")?;
    Ok(line.split(' ').next().unwrap_or_default().to_owned())
}

/// Writes through ext4, syncs, and powers off.
pub fn ext4_write(out: &Path) -> Result<Figures, Failure> {
    let script = "mount /dev/vda /mnt && dd if=/dev/urandom of=/mnt/file bs=64k count=160 2>/dev/null && sync \
                  && echo MD5 $(md5sum /mnt/file) && umount /mnt";
    let mut guest = Start::new()
        .args(&["--disk", &own_disk(out)?])
        .script(script)
        .spawn()?;
    guest.expect_exit(0)?;
    Ok(Figures::from([("md5".into(), json!(md5(&guest)?))]))
}

/// QEMU, e2fsck and debugfs agree with what the guest says it wrote.
pub fn check_ext4_write(out: &Path, figures: &Figures) -> Result<(), Failure> {
    let raw = to_raw(&out.join(DISK))?;
    fsck_clean(&raw)?;
    let found = json!(md5_of(&raw, "/file")?);
    if figures.get("md5") == Some(&found) {
        Ok(())
    } else {
        Failure::claim(format!(
            "the guest wrote {:?}, the disk holds {found}",
            figures.get("md5")
        ))
    }
}

/// Bytes that the host holds for a file.
fn allocated(path: &str) -> Result<u64, Failure> {
    let metadata = fs::metadata(path).map_err(Failure::io("stat the disk"))?;
    Ok(std::os::unix::fs::MetadataExt::blocks(&metadata) * 512)
}

/// Deletes a file and trims; another file stays what it was.
pub fn discard(out: &Path) -> Result<Figures, Failure> {
    let script = "mount /dev/vda /mnt && dd if=/dev/urandom of=/mnt/file bs=64k count=64 2>/dev/null \
                  && dd if=/dev/urandom of=/mnt/gone bs=64k count=256 2>/dev/null && sync && echo WRITTEN && read go \
                  && rm /mnt/gone && sync && fstrim -v /mnt && echo TRIMMED && echo MD5 $(md5sum /mnt/file) && umount /mnt";
    let disk = own_disk(out)?;
    let mut guest = Start::new()
        .args(&["--disk", &disk])
        .script(script)
        .spawn()?;
    guest.wait_for("WRITTEN")?;
    let before = allocated(&disk)?;
    guest.type_in("\n")?;
    guest.expect_exit(0)?;
    guest.line("TRIMMED")?;
    let after = allocated(&disk)?;
    // The file that was deleted took 16 MiB.
    if after + (12 << 20) > before {
        return Failure::claim(format!(
            "{before} bytes were allocated before the trim, {after} after it"
        ));
    }
    Ok(Figures::from([
        ("md5".into(), json!(md5(&guest)?)),
        ("allocated_bytes_before".into(), json!(before)),
        ("allocated_bytes_after".into(), json!(after)),
    ]))
}

/// The file that was not deleted is whole.
pub fn check_discard(out: &Path, figures: &Figures) -> Result<(), Failure> {
    check_ext4_write(out, figures)
}

/// The guest is told, and its writes fail.
pub fn read_only(_: &Path) -> Result<Figures, Failure> {
    let script = "echo RO $(cat /sys/block/vda/ro); mount /dev/vda /mnt; touch /mnt/x && echo WROTE; \
                  dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync && echo WROTE; echo DONE";
    let mut guest = Start::new()
        .args(&["--disk", "guest/root.vhdx,ro"])
        .script(script)
        .spawn()?;
    guest.expect_exit(0)?;
    guest.line("DONE")?;
    if guest.line("RO ")? == "1" && guest.line("WROTE").is_err() {
        Ok(Figures::new())
    } else {
        Failure::claim("the guest could write")
    }
}

/// Without `io_uring`, and on several queues.
pub fn worker_engine(out: &Path) -> Result<Figures, Failure> {
    let script = "mount /dev/vda /mnt && for i in 1 2 3 4; do dd if=/dev/urandom of=/mnt/$i bs=64k count=32 2>/dev/null & done; \
                  wait; sync; A=$(cat /mnt/[1-4] | md5sum); umount /mnt; mount /dev/vda /mnt; \
                  [ \"$A\" = \"$(cat /mnt/[1-4] | md5sum)\" ] && echo SAME; umount /mnt; ls /sys/block/vda/mq | wc -l";
    for engine in ["Sync", "Async"] {
        let config = out.join("config.json");
        let json = json!({
            "boot-source": {
                "kernel_image_path": "guest/vmlinuz",
                "initrd_path": "guest/initrd.cpio.gz",
                "boot_args": format!("console=ttyS0 reboot=k panic=-1 quiet {}", script_word(script)),
            },
            "drives": [{
                "drive_id": "root", "path_on_host": own_disk(out)?, "is_root_device": false, "is_read_only": false,
                "io_engine": engine, "num_queues": 2,
            }],
            "machine-config": {"vcpu_count": 2, "mem_size_mib": 128},
        });
        fs::write(&config, json.to_string()).map_err(Failure::io("write config.json"))?;
        let mut guest = Start::bare(&["--config", &config.to_string_lossy()]).spawn()?;
        guest.expect_exit(0)?;
        guest.line("SAME")?;
    }
    fs::remove_file(out.join(DISK)).map_err(Failure::io("remove the disk"))?;
    Ok(Figures::new())
}

/// Through `/dev/hwrng`.
pub fn entropy(out: &Path) -> Result<Figures, Failure> {
    let script =
        "cat /sys/class/misc/hw_random/rng_current; echo BYTES $(head -c 4096 /dev/hwrng | md5sum)";
    let config = out.join("config.json");
    let json = json!({
        "boot-source": {
            "kernel_image_path": "guest/vmlinuz",
            "initrd_path": "guest/initrd.cpio.gz",
            "boot_args": format!("console=ttyS0 reboot=k panic=-1 quiet {}", script_word(script)),
        },
        "entropy": {},
    });
    fs::write(&config, json.to_string()).map_err(Failure::io("write config.json"))?;
    let mut seen = Vec::new();
    for _ in 0..2 {
        let mut guest = Start::bare(&["--config", &config.to_string_lossy()]).spawn()?;
        guest.expect_exit(0)?;
        guest.line("virtio_rng.0")?;
        seen.push(guest.line("BYTES ")?);
    }
    if seen[0] == seen[1] {
        Failure::claim("two guests got the same bytes")
    } else {
        Ok(Figures::new())
    }
}

/// A guest that writes for ever, and tells of each file it has synced.
fn writing_guest(out: &Path) -> Result<Guest, Failure> {
    let script = "mount /dev/vda /mnt; i=0; while true; do i=$((i+1)); \
                  dd if=/dev/urandom of=/mnt/f$((i%8)) bs=64k count=16 conv=fsync 2>/dev/null; echo WROTE $i; done";
    let guest = Start::new()
        .args(&["--disk", &own_disk(out)?])
        .script(script)
        .spawn()?;
    guest.wait_for("WROTE 3")?;
    Ok(guest)
}

/// A clean end of the VMM, in the middle of what the guest does.
pub fn sigterm(out: &Path) -> Result<Figures, Failure> {
    let mut guest = writing_guest(out)?;
    guest.signal(Signal::TERM)?;
    guest.expect_exit(128 + 15)?;
    Ok(Figures::new())
}

/// No end at all: the log of the disk has to do.
pub fn sigkill(out: &Path) -> Result<Figures, Failure> {
    let mut guest = writing_guest(out)?;
    guest.signal(Signal::KILL)?;
    guest.wait()?;
    // Opened by a guest first, which replays the log of the disk.
    let mut again = Start::new()
        .args(&["--disk", &out.join(DISK).display().to_string()])
        .script("mount /dev/vda /mnt && ls /mnt/f1 && echo OPENED; umount /mnt")
        .spawn()?;
    again.expect_exit(0)?;
    again.line("OPENED")?;
    Ok(Figures::new())
}

/// QEMU opens the disk, and the file system is whole after its journal's replay.
pub fn check_cut_off(out: &Path, _: &Figures) -> Result<(), Failure> {
    fsck_after_replay(&to_raw(&out.join(DISK))?)
}
