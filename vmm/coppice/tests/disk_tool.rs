//! `coppice disk` as a user runs it.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

use std::io::Read;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn coppice(folder: &Path, arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_coppice"))
        .arg("disk")
        .args(arguments.split_whitespace())
        .current_dir(folder)
        .output()
        .unwrap()
}

/// The answer, in JSON, of a command that succeeds.
fn json(folder: &Path, arguments: &str) -> Value {
    let output = coppice(folder, &format!("{arguments} --json"));
    assert_eq!(
        output.status.code(),
        Some(0),
        "{arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.stderr.is_empty(), "{arguments}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The one line that says why a command fails, and its exit code.
fn refusal(folder: &Path, arguments: &str) -> (i32, String) {
    let output = coppice(folder, arguments);
    let printed = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{arguments}");
    assert!(
        printed.starts_with("coppice: ") && printed.lines().count() == 1,
        "{arguments}: {printed}"
    );
    (output.status.code().unwrap(), printed)
}

fn qemu_io(folder: &Path, format: &str, file: &str, command: &str) {
    let output = Command::new("qemu-io")
        .args(["-f", format, "-c", command, file])
        .current_dir(folder)
        .output()
        .expect("qemu-io: run resources/setup.sh");
    assert!(output.status.success());
}

#[test]
fn the_life_of_a_family_of_disks() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let made = json(folder, "create --size 64M --block-size 1M base.vhdx");
    assert_eq!(
        (&made["size"], &made["kind"], &made["block_size"]),
        (&(64 << 20).into(), &"dynamic".into(), &(1 << 20).into())
    );
    qemu_io(folder, "vhdx", "base.vhdx", "write -P 1 0 4M");
    let child = json(folder, "create --parent base.vhdx child.vhdx");
    assert_eq!(child["kind"], "differencing");
    // What qemu cannot write, a conversion makes: the child gets something to say by a snapshot of a converted disk.
    let info = json(folder, "info --backing child.vhdx");
    assert_eq!(info["layers"].as_array().unwrap().len(), 2);
    assert_eq!(info["problem"], Value::Null);
    assert_eq!(
        info["layers"][0]["parent"]["linkage"],
        info["layers"][1]["data_write_guid"]
    );
    let map = json(folder, "map --backing child.vhdx");
    let extents = map["extents"].as_array().unwrap();
    assert_eq!(extents[0]["state"], "mapped");
    assert_eq!(extents[0]["layer"], 1);
    assert_eq!(extents[0]["length"], 4 << 20);
    assert_eq!(extents[1]["state"], "transparent");

    json(folder, "resize child.vhdx 128M");
    let (code, printed) = refusal(folder, "resize child.vhdx 64M");
    assert_eq!(code, 1);
    assert!(printed.contains("--shrink"), "{printed}");
    json(folder, "resize --shrink child.vhdx 64M");

    let hash =
        |file: &str| json(folder, &format!("check --hash --backing {file}"))["content"].clone();
    assert_eq!(hash("child.vhdx"), hash("base.vhdx"));
    let snapshot = json(folder, "snapshot child.vhdx next.vhdx");
    let since = snapshot["data_write_guid"].as_str().unwrap().to_owned();
    let changed = json(folder, &format!("diff --since {since} next.vhdx"));
    assert_eq!(changed["extents"], Value::Array(Vec::new()));
    let same = json(folder, "diff --backing next.vhdx base.vhdx");
    assert_eq!(same["differences"], Value::Array(Vec::new()));

    json(folder, "commit --delete next.vhdx");
    assert!(!folder.join("next.vhdx").exists());
    json(folder, "create --parent base.vhdx other.vhdx");
    let (code, printed) = refusal(folder, "commit child.vhdx");
    assert_eq!(code, 1);
    assert!(
        printed.contains("other.vhdx") && printed.contains("--force"),
        "{printed}"
    );
    json(folder, "commit --force child.vhdx");
    let (_, printed) = refusal(folder, "map --backing other.vhdx");
    assert!(
        printed.contains("has changed since") && printed.contains("rebase --force"),
        "{printed}"
    );
    let (_, printed) = refusal(folder, "rebase --parent base.vhdx other.vhdx");
    assert!(printed.contains("has changed since"), "{printed}");
    json(folder, "rebase --force --parent base.vhdx other.vhdx");
    json(folder, "map --backing other.vhdx");
    json(folder, "compact --find-zeros base.vhdx");
    json(folder, "check base.vhdx");
}

#[test]
fn conversions_name_their_formats() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    std::fs::write(folder.join("a.raw"), vec![7; 3 << 20]).unwrap();
    let done = json(folder, "convert a.raw a.vhdx");
    assert_eq!(
        (&done["source_format"], &done["size"]),
        (&"raw".into(), &(3 << 20).into())
    );
    let done = json(folder, "convert --to raw a.vhdx b.raw");
    assert_eq!(done["source_format"], "vhdx");
    assert_eq!(
        std::fs::read(folder.join("a.raw")).unwrap(),
        std::fs::read(folder.join("b.raw")).unwrap()
    );
    let (code, printed) = refusal(folder, "convert --to raw a.vhdx b.raw");
    assert_eq!(code, 1);
    assert!(printed.contains("--overwrite"), "{printed}");
    json(folder, "convert --overwrite --to raw a.vhdx b.raw");
    let differs = coppice(folder, "diff a.raw a.vhdx");
    assert_eq!(differs.status.code(), Some(0));
    qemu_io(folder, "raw", "b.raw", "write -P 9 1M 4k");
    let differs = coppice(folder, "diff a.raw b.raw");
    assert_eq!(differs.status.code(), Some(1));
    let printed = String::from_utf8(differs.stdout).unwrap();
    assert!(
        printed.contains("0x100000") && printed.contains("4 KiB in 1 ranges"),
        "{printed}"
    );
}

#[test]
fn a_damaged_file_is_reported_and_repaired() {
    use std::os::unix::fs::FileExt;
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    json(folder, "create --size 64M --block-size 1M a.vhdx");
    qemu_io(folder, "vhdx", "a.vhdx", "write -P 1 0 2M");
    let file = std::fs::File::options()
        .write(true)
        .open(folder.join("a.vhdx"))
        .unwrap();
    // One header, one region table, and the entry of the second block, in the BAT at 3 MiB.
    file.write_all_at(&[0xFF; 64], 64 << 10).unwrap();
    file.write_all_at(&[0xFF; 64], 192 << 10).unwrap();
    file.write_all_at(&((900_u64 << 20) | 6).to_le_bytes(), (3 << 20) + 8)
        .unwrap();
    drop(file);
    let output = coppice(folder, "check --json a.vhdx");
    assert_eq!(output.status.code(), Some(1));
    let checked: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        checked["problems"].as_array().unwrap().len(),
        3,
        "{checked}"
    );
    assert_eq!(checked["repairable"], true);
    refusal(folder, "map a.vhdx");
    let lost = serde_json::json!([{"offset": 1 << 20, "length": 1 << 20}]);
    assert_eq!(checked["lost"], lost);
    let repaired = with_loss(folder, "repair a.vhdx");
    assert_eq!(repaired["repaired"].as_array().unwrap().len(), 3);
    assert_eq!(
        (&repaired["lost"], &repaired["sound"]),
        (&lost, &true.into())
    );
    assert_eq!(repaired["backup"], "a.vhdx.bat-backup");
    json(folder, "check a.vhdx");
    qemu_io(folder, "vhdx", "a.vhdx", "read -P 1 0 1M");
    qemu_io(folder, "vhdx", "a.vhdx", "read -P 0 1M 1M");
}

/// The answer, in JSON, of a command that succeeds but for a part of the disk that is lost.
fn with_loss(folder: &Path, arguments: &str) -> Value {
    let output = coppice(folder, &format!("{arguments} --json"));
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{arguments}: {printed}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A disk of 64 MiB with blocks of 1 MiB, the first three of which hold data, without its last 1.5 MiB.
fn cut(folder: &Path, name: &str) {
    json(folder, &format!("create --size 64M --block-size 1M {name}"));
    qemu_io(folder, "vhdx", name, "write -P 1 0 3M");
    // Closes the file, which qemu leaves longer than it has to be.
    json(folder, &format!("compact {name}"));
    let file = std::fs::File::options().write(true).open(folder.join(name));
    let file = file.unwrap();
    let len = file.metadata().unwrap().len();
    file.set_len(len - (3 << 19)).unwrap();
}

#[test]
fn what_a_repair_gives_up_is_named_and_kept() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    cut(folder, "a.vhdx");
    let lost = serde_json::json!([{"offset": 1 << 20, "length": 2 << 20}]);
    let printed = coppice(folder, "repair a.vhdx");
    assert_eq!(printed.status.code(), Some(3));
    let printed = String::from_utf8(printed.stdout).unwrap();
    assert!(
        printed.contains("lost: 2 MiB of the disk at 0x100000")
            && printed.contains("--undo a.vhdx.bat-backup a.vhdx"),
        "{printed}"
    );
    json(folder, "check a.vhdx");
    let undone = json(folder, "repair --undo a.vhdx.bat-backup a.vhdx");
    assert_eq!((&undone["entries"], &undone["lost"]), (&2.into(), &lost));
    let (code, printed) = refusal(folder, "repair --undo a.vhdx.bat-backup a.vhdx");
    assert!(
        code == 1 && printed.contains("is not as the repair left it"),
        "{printed}"
    );
    // The first backup stays; a name that was given is not taken from another; and without any there is none.
    let repaired = with_loss(folder, "repair --backup a.vhdx");
    assert_eq!(repaired["backup"], "a.vhdx.bat-backup.2");
    cut(folder, "b.vhdx");
    let (_, printed) = refusal(folder, "repair --backup=a.vhdx.bat-backup b.vhdx");
    assert!(printed.contains("write the backup"), "{printed}");
    let files = std::fs::read_dir(folder).unwrap().count();
    let repaired = with_loss(folder, "repair --no-backup b.vhdx");
    assert_eq!(
        (&repaired["backup"], &repaired["lost"]),
        (&Value::Null, &lost)
    );
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), files);
    assert_eq!(json(folder, "repair b.vhdx")["lost_bytes"], 0);
}

#[test]
fn a_salvage_copies_what_is_there() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    cut(folder, "a.vhdx");
    refusal(folder, "convert a.vhdx b.raw");
    let done = with_loss(folder, "convert --salvage a.vhdx b.raw");
    let lost = serde_json::json!([{"offset": 1 << 20, "length": 2 << 20}]);
    assert_eq!(
        (&done["lost"], &done["lost_bytes"]),
        (&lost, &(2 << 20).into())
    );
    let copy = std::fs::read(folder.join("b.raw")).unwrap();
    assert!(copy.len() == 64 << 20 && copy[..1 << 20].iter().all(|byte| *byte == 1));
    assert!(copy[1 << 20..].iter().all(|byte| *byte == 0));
    let done = json(folder, "convert --salvage b.raw c.vhdx");
    assert_eq!(done["lost_bytes"], 0);
}

#[test]
fn a_container_is_no_disk_unless_the_format_is_given() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    for (format, name, reader) in [
        ("vdi", "VDI", "qemu-img convert"),
        ("qed", "QED", "qemu-img convert"),
    ] {
        let file = format!("disk.{format}");
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", format, &file, "8M"])
            .current_dir(folder)
            .status();
        assert!(made.unwrap().success());
        for arguments in [
            "convert FILE out.vhdx",
            "info FILE",
            "check FILE",
            "map FILE",
            "repair FILE",
        ] {
            let (code, printed) = refusal(folder, &arguments.replace("FILE", &file));
            assert!(
                code == 1 && printed.contains(name) && printed.contains(reader),
                "{printed}"
            );
        }
        json(folder, &format!("convert --from raw {file} {format}.vhdx"));
    }
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "disk", "8M"])
        .current_dir(folder)
        .status();
    assert!(made.unwrap().success());
    let (_, printed) = refusal(folder, "info disk");
    assert!(
        printed.contains("qcow2") && printed.contains("coppice disk convert"),
        "{printed}"
    );
    json(folder, "convert disk disk.vhdx");
}

#[test]
fn what_a_guest_could_have_planted_is_followed_only_when_that_is_asked_for() {
    let temporary = tempfile::tempdir().unwrap();
    let guest = temporary.path().join("guest");
    std::fs::create_dir(&guest).unwrap();
    let neighbour = temporary.path().join("neighbour.raw");
    std::fs::write(&neighbour, vec![7; 1 << 20]).unwrap();
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([&neighbour, &guest.join("disk")])
        .status();
    assert!(made.unwrap().success());
    let refused = |arguments: &str, way: &str| {
        let before = std::fs::read_dir(&guest).unwrap().count();
        let (code, printed) = refusal(&guest, arguments);
        assert!(code == 1 && printed.contains(way), "{arguments}: {printed}");
        assert_eq!(std::fs::read_dir(&guest).unwrap().count(), before);
    };
    refused("convert disk out.raw", "`--from qcow2 --backing`");
    refused("convert --salvage disk out.raw", "`--from qcow2 --backing`");
    refused("convert --from qcow2 disk out.raw", "`--backing`");
    refused(
        "convert --from qcow2 --backing disk out.raw",
        "`--backing-dir`",
    );
    for command in ["info", "check", "map", "diff disk"] {
        refused(&format!("{command} disk"), "coppice disk convert");
    }
    // Whoever asks for parents has printed that it is a VHDX.
    for command in ["info", "map", "diff disk"] {
        refused(&format!("{command} --backing disk"), "vhdxfile");
    }
    let allowed = "convert --from qcow2 --backing --backing-dir .. disk out.raw";
    assert_eq!(json(&guest, allowed)["size"], 1 << 20);
    assert!(std::fs::read(guest.join("out.raw")).unwrap() == vec![7; 1 << 20]);

    json(&guest, "create --size 8M ../parent.vhdx");
    json(&guest, "create --parent ../parent.vhdx child.vhdx");
    for command in ["check --hash", "map", "diff child.vhdx"] {
        refused(&format!("{command} child.vhdx"), "--backing opens it");
        refused(&format!("{command} --backing child.vhdx"), "--backing-dir");
        json(
            &guest,
            &format!("{command} --backing --backing-dir .. child.vhdx"),
        );
    }
    refused("convert child.vhdx out.vhdx", "`--from vhdx --backing`");
    json(
        &guest,
        "convert --from vhdx --backing --backing-dir .. child.vhdx out.vhdx",
    );
    for (arguments, layers, problem) in [
        ("", 1, "--backing opens it"),
        ("--backing", 1, "--backing-dir"),
        ("--backing --backing-dir ..", 2, ""),
    ] {
        let info = json(&guest, &format!("info {arguments} child.vhdx"));
        assert_eq!(info["layers"].as_array().unwrap().len(), layers);
        let printed = info["problem"].as_str().unwrap_or_default();
        assert!(
            printed.contains(problem) && printed.is_empty() == problem.is_empty(),
            "{printed}"
        );
    }
    // A raw disk is what its user says it is.
    for command in ["info", "check", "map"] {
        json(&guest, &format!("{command} --format raw child.vhdx"));
    }
    let to_raw = "diff --format raw --other-format vhdx disk out.vhdx";
    assert_eq!(coppice(&guest, to_raw).status.code(), Some(1));
    for arguments in [
        "convert --backing disk out",
        "convert --from qcow2 --backing-dir .. disk out",
        "map --backing-dir .. child.vhdx",
    ] {
        assert_eq!(refusal(&guest, arguments).0, 2, "{arguments}");
    }
}

#[test]
fn a_new_file_has_the_form_that_its_name_stands_for() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    json(folder, "create --size 8M a.vhdx");
    let format = |file: &str| json(folder, &format!("info {file}"))["layers"][0]["format"].clone();
    json(folder, "convert a.vhdx b.raw");
    json(folder, "convert b.raw c");
    json(folder, "convert --to raw a.vhdx d");
    assert_eq!(
        std::fs::metadata(folder.join("b.raw")).unwrap().len(),
        8 << 20
    );
    assert_eq!(["b.raw", "c", "d"].map(format), ["raw", "vhdx", "raw"]);
    let before = std::fs::read_dir(folder).unwrap().count();
    for arguments in [
        "convert --to vhdx a.vhdx e.raw",
        "convert --to raw a.vhdx e.vhdx",
        "convert a.vhdx e.qcow2",
        "create --size 8M e.img",
        "create --parent a.vhdx e.raw",
        "snapshot a.vhdx e.raw",
    ] {
        let (code, printed) = refusal(folder, arguments);
        assert!(
            code == 1 && printed.contains("the name is that of"),
            "{arguments}: {printed}"
        );
    }
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), before);
}

#[test]
fn sizes_have_fractions_and_long_suffixes() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    for (size, bytes) in [
        ("1.5G", 3_u64 << 29),
        ("10GiB", 10 << 30),
        ("1048576", 1 << 20),
    ] {
        let made = json(folder, &format!("create --size {size} {size}.vhdx"));
        assert_eq!(made["size"], bytes);
    }
    let resized = json(folder, "resize 1.5G.vhdx 2.5GiB");
    assert_eq!(resized["size"], 5_u64 << 29);
}

#[test]
fn what_guests_cannot_share_is_reported() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let file = std::fs::File::create(folder.join("small.raw")).unwrap();
    file.set_len(64 << 20).unwrap();
    let mke2fs = |options: &[&str]| {
        let made = Command::new("mke2fs")
            .args(options)
            .args(["-q", "-F", "small.raw"])
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .current_dir(folder)
            .status();
        assert!(made.expect("mke2fs: run resources/setup.sh").success());
    };
    mke2fs(&[]);
    json(folder, "convert small.raw small.vhdx");
    json(folder, "create --parent small.vhdx child.vhdx");
    for file in ["small.raw", "small.vhdx", "child.vhdx"] {
        for command in ["info", "check"] {
            let follow = if file == "child.vhdx" {
                "--backing"
            } else {
                ""
            };
            let printed = json(folder, &format!("{command} {follow} {file}"));
            let reason = printed["unshared"][0]["reason"].as_str().unwrap();
            assert!(
                reason.contains("ext2 with blocks of 1024 bytes"),
                "{reason}"
            );
            let text = coppice(folder, &format!("{command} {follow} {file}")).stdout;
            assert!(String::from_utf8(text).unwrap().contains(reason));
        }
    }
    mke2fs(&["-b", "4096"]);
    assert_eq!(
        json(folder, "info small.raw")["unshared"],
        Value::Array(Vec::new())
    );
}

#[test]
fn wrong_usage_is_one_line_and_2() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    for arguments in [
        "create x.vhdx",
        "create --size 1Q x.vhdx",
        "create --size 1G --sector 1024 x.vhdx",
        "create --size 1G --fixed --parent b x.vhdx",
        "resize a.vhdx",
        "nothing",
        "diff a",
    ] {
        assert_eq!(refusal(folder, arguments).0, 2, "{arguments}");
    }
    for arguments in [
        "create --size 0 x.vhdx",
        "create --size 1G --block-size 3M x.vhdx",
        "create --size 65T x.vhdx",
        "info none.vhdx",
        "create --parent none.vhdx x.vhdx",
        "diff --since nonsense none.vhdx",
    ] {
        assert_eq!(refusal(folder, arguments).0, 1, "{arguments}");
    }
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 0);
}

#[test]
fn an_interrupted_conversion_ends_in_good_order() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    // Data everywhere, so that there is something to do for a while.
    let source = std::fs::File::create(folder.join("a.raw")).unwrap();
    let piece = vec![7; 1 << 20];
    for number in 0..512 {
        std::os::unix::fs::FileExt::write_all_at(&source, &piece, number << 20).unwrap();
    }
    let mut child = Command::new(env!("CARGO_BIN_EXE_coppice"))
        .args(["disk", "convert", "a.raw", "a.vhdx"])
        .current_dir(folder)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The copy lies in a folder of its own while it is made.
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::fs::read_dir(folder).unwrap().count() < 2 {
        assert!(Instant::now() < deadline, "the conversion has not begun");
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = child.id().to_string();
    let sent = Command::new("kill").args(["-INT", &pid]).status().unwrap();
    assert!(sent.success());
    let status = child.wait().unwrap();
    let mut printed = String::new();
    child.stderr.unwrap().read_to_string(&mut printed).unwrap();
    assert_eq!(status.code(), Some(130), "{printed}");
    assert!(printed.contains("interrupted"), "{printed}");
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 1);
}

#[test]
fn a_bench_compares_with_a_raw_file_and_leaves_nothing() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let found = json(folder, "bench --size 8M --time 5");
    let cases = found["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 24);
    assert!(
        cases
            .iter()
            .all(|case| case["ratio"].as_f64().unwrap() > 0.0)
    );
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 0);
}
