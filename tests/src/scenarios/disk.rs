//! Scenarios of disks: what guests write, and what other programs find.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::api::{expect_ok, request_text};
use crate::guest::{Guest, Start, script_word};
use crate::programs::{fsck_after_replay, fsck_clean, md5_of, to_raw};
use crate::result::{Failure, Figures};

const DISK: &str = "disk.vhdx";

/// Copies the base disk to the folder of results, which is checked on this machine.
fn own_disk(out: &Path) -> Result<String, Failure> {
    let disk = out.join(DISK);
    fs::copy("guest/root.vhdx", &disk).map_err(Failure::io("copy root.vhdx"))?;
    Ok(disk.display().to_string())
}

fn md5(guest: &Guest) -> Result<String, Failure> {
    let line = guest.line("MD5 ")?;
    Ok(line.split(' ').next().unwrap_or_default().to_owned())
}

/// A guest writes through ext4, syncs, and powers off.
pub fn ext4_write(out: &Path) -> Result<Figures, Failure> {
    ext4_write_as(out, &[])
}

/// As [`ext4_write`], with more arguments.
pub fn ext4_write_as(out: &Path, more: &[&str]) -> Result<Figures, Failure> {
    let script = "mount /dev/vda /mnt && dd if=/dev/urandom of=/mnt/file bs=64k count=160 2>/dev/null && sync \
                  && echo MD5 $(md5sum /mnt/file) && umount /mnt";
    let mut guest = Start::new()
        .args(&["--disk", &own_disk(out)?])
        .args(more)
        .script(script)
        .spawn()?;
    guest.expect_exit(0)?;
    Ok(Figures::from([("md5".into(), json!(md5(&guest)?))]))
}

/// QEMU, e2fsck and debugfs find the content that the guest has written.
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

/// The bytes that a file takes on the host.
fn allocated(path: &str) -> Result<u64, Failure> {
    let metadata = fs::metadata(path).map_err(Failure::io("stat the disk"))?;
    Ok(std::os::unix::fs::MetadataExt::blocks(&metadata) * 512)
}

/// A guest deletes a file and trims, and another file stays as it was.
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

/// The file that was not deleted is complete.
pub fn check_discard(out: &Path, figures: &Figures) -> Result<(), Failure> {
    check_ext4_write(out, figures)
}

/// Waits until the job of a drive is over.
fn wait_for_job(socket: &Path, drive: &str) -> Result<Value, Failure> {
    let path = format!("/drives/{drive}/job");
    for _ in 0..1500 {
        let job = expect_ok(socket, "GET", &path, &Value::Null)?;
        if job["state"] != "Running" {
            return Ok(job);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Failure::claim(format!("the job of {drive} does not end"))
}

/// The disk is snapshotted, made larger, committed twice and compacted while ext4 writes to it.
pub fn online(out: &Path) -> Result<Figures, Failure> {
    let base = own_disk(out)?;
    let name = |file: &str| out.join(file).display().to_string();
    let (top, next) = (name("top.vhdx"), name("next.vhdx"));
    let made = Command::new("./coppice")
        .args(["disk", "create", "--parent", &base, &top])
        .status()
        .map_err(Failure::io("run coppice disk"))?;
    if !made.success() {
        return Failure::claim("coppice disk create fails");
    }
    let script = "mount /dev/vda /mnt; \
        (i=0; while true; do dd if=/dev/urandom of=/mnt/f$((i%4)) bs=64k count=8 2>/dev/null; sync; i=$((i+1)); \
         echo ROUND $i SIZE $(cat /sys/block/vda/size) END; done) & read go; kill $!; wait; rm /mnt/f[0-3]; \
        dd if=/dev/urandom of=/mnt/file bs=64k count=40 2>/dev/null; sync; echo MD5 $(md5sum /mnt/file); umount /mnt";
    let socket = PathBuf::from("/tmp/online.sock");
    let mut guest = Start::new()
        .args(&["--api-sock", &socket.to_string_lossy()])
        .args(&["--disk", &format!("{top},id=root")])
        .script(script)
        .spawn()?;
    let mut round = 0;
    let mut rounds = |guest: &Guest| {
        round += 3;
        while guest.console().contains(&format!("ROUND {round} ")) {
            round += 1;
        }
        guest.wait_for(&format!("ROUND {round} "))
    };
    rounds(&guest)?;
    let put =
        |what: &str, body: Value| expect_ok(&socket, "PUT", &format!("/drives/root/{what}"), &body);
    put("snapshot", json!({"path_on_host": next}))?;
    rounds(&guest)?;
    let sectors: u64 = guest
        .line("ROUND 1 SIZE ")?
        .split(' ')
        .next()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| Failure::Claim("the guest tells no size".into()))?;
    put("resize", json!({"size": (sectors << 9) + (64 << 20)}))?;
    guest.wait_for(&format!("SIZE {} END", sectors + (64 << 11)))?;
    let mut figures = Figures::new();
    for (number, left) in [(1, &top), (2, &base)] {
        put("commit", json!({}))?;
        let job = wait_for_job(&socket, "root")?;
        // The job names the parent as the child records it.
        let found = job["path_on_host"].as_str().map(Path::new);
        let same = found.is_some_and(|path| path.file_name() == Path::new(left).file_name());
        if job["state"] != "Done" || !same {
            return Failure::claim(format!("commit {number}: {job}"));
        }
        figures.insert(format!("commit_{number}_bytes"), job["total"].clone());
        rounds(&guest)?;
    }
    put("compact", json!({}))?;
    let job = wait_for_job(&socket, "root")?;
    if job["state"] != "Done" {
        return Failure::claim(format!("compaction: {job}"));
    }
    rounds(&guest)?;
    guest.type_in("\n")?;
    guest.expect_exit(0)?;
    if Path::new(&top).exists() || Path::new(&next).exists() {
        return Failure::claim("merged files are left behind");
    }
    figures.insert("md5".into(), json!(md5(&guest)?));
    Ok(figures)
}

/// All that the guest has written is on the base disk.
pub fn check_online(out: &Path, figures: &Figures) -> Result<(), Failure> {
    check_ext4_write(out, figures)
}

/// A guest with a read-only disk sees that it is read-only, and its writes fail.
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

/// Writes by the worker thread instead of `io_uring`, and on several queues.
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

/// A counter of drive `root`.
fn counter(socket: &Path, name: &str) -> Result<f64, Failure> {
    let (status, metrics) = request_text(socket, "GET", "/metrics", &Value::Null)?;
    let prefix = format!("coppice_{name}_total{{drive=\"root\"}} ");
    let mut lines = metrics.lines();
    let line = lines.find_map(|line| line.strip_prefix(&prefix));
    match line.and_then(|value| value.parse().ok()) {
        Some(value) => Ok(value),
        None => Failure::claim(format!("no {name}: {status} {metrics}")),
    }
}

/// How much a counter grows in a second, while a guest reads as fast as it may.
fn rate_of(socket: &Path, name: &str) -> Result<f64, Failure> {
    // What the buckets hold at first is spent by then.
    std::thread::sleep(Duration::from_secs(3));
    let (begun, before) = (Instant::now(), counter(socket, name)?);
    std::thread::sleep(Duration::from_secs(15));
    let (elapsed, after) = (begun.elapsed(), counter(socket, name)?);
    Ok((after - before) / elapsed.as_secs_f64())
}

/// A guest reads a disk over and over, and gets no more than its limits say, with no more wake-ups than requests.
pub fn limits(_: &Path) -> Result<Figures, Failure> {
    const BYTES: f64 = 2_097_152.0;
    const OPS: f64 = 40.0;
    let script = "(while true; do cat /dev/vda >/dev/null; echo 3 >/proc/sys/vm/drop_caches; done) & echo READING; \
                  read go; kill $!; wait";
    let socket = PathBuf::from("/tmp/limits.sock");
    let mut guest = Start::new()
        .args(&["--api-sock", &socket.to_string_lossy()])
        .args(&["--disk", "guest/root.vhdx,id=root,ro,rate=2M"])
        .script(script)
        .spawn()?;
    guest.wait_for("READING")?;
    let bytes = rate_of(&socket, "block_read_bytes")?;
    let limiter = json!({"bandwidth": {"size": 0, "refill_time": 0}, "ops": {"size": 20, "refill_time": 500}});
    let update = json!({"drive_id": "root", "rate_limiter": limiter});
    expect_ok(&socket, "PATCH", "/drives/root", &update)?;
    let reads = rate_of(&socket, "block_reads")?;
    let wake_ups = counter(&socket, "block_limiter_events")?;
    let served = counter(&socket, "block_reads")?;
    guest.type_in("\n")?;
    guest.expect_exit(0)?;
    for (name, rate, limit) in [("bytes", bytes, BYTES), ("reads", reads, OPS)] {
        // A guest of a busy host may ask for less; how much it got is among the figures.
        if rate > limit * 1.05 {
            return Failure::claim(format!("{rate} {name} a second, and the limit is {limit}"));
        }
    }
    if wake_ups > served {
        return Failure::claim(format!("{wake_ups} wake-ups for {served} reads"));
    }
    Ok(Figures::from([
        ("bytes_by_limit".into(), json!(bytes / BYTES)),
        ("reads_by_limit".into(), json!(reads / OPS)),
    ]))
}

/// The guest reads random numbers from `/dev/hwrng`.
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

/// A guest that writes files in a loop, and prints a line for each file that it has synced.
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

/// SIGTERM ends the VMM in order, while the guest writes.
pub fn sigterm(out: &Path) -> Result<Figures, Failure> {
    let mut guest = writing_guest(out)?;
    guest.signal(Signal::TERM)?;
    guest.expect_exit(128 + 15)?;
    Ok(Figures::new())
}

/// SIGKILL ends the VMM while the guest writes, so that the disk has to be recovered by its log.
pub fn sigkill(out: &Path) -> Result<Figures, Failure> {
    let mut guest = writing_guest(out)?;
    guest.signal(Signal::KILL)?;
    guest.wait()?;
    // A guest opens the disk first, and thereby replays its log.
    let mut again = Start::new()
        .args(&["--disk", &out.join(DISK).display().to_string()])
        .script("mount /dev/vda /mnt && ls /mnt/f1 && echo OPENED; umount /mnt")
        .spawn()?;
    again.expect_exit(0)?;
    again.line("OPENED")?;
    Ok(Figures::new())
}

/// QEMU opens the disk, and the file system has no errors after its journal is replayed.
pub fn check_cut_off(out: &Path, _: &Figures) -> Result<(), Failure> {
    fsck_after_replay(&to_raw(&out.join(DISK))?)
}
