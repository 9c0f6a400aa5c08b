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
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{arguments}");
    assert!(
        said.starts_with("coppice: ") && said.lines().count() == 1,
        "{arguments}: {said}"
    );
    (output.status.code().unwrap(), said)
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
    let info = json(folder, "info child.vhdx");
    assert_eq!(info["layers"].as_array().unwrap().len(), 2);
    assert_eq!(info["problem"], Value::Null);
    assert_eq!(
        info["layers"][0]["parent"]["linkage"],
        info["layers"][1]["data_write_guid"]
    );
    let map = json(folder, "map child.vhdx");
    let extents = map["extents"].as_array().unwrap();
    assert_eq!(extents[0]["state"], "mapped");
    assert_eq!(extents[0]["layer"], 1);
    assert_eq!(extents[0]["length"], 4 << 20);
    assert_eq!(extents[1]["state"], "transparent");

    json(folder, "resize child.vhdx 128M");
    let (code, said) = refusal(folder, "resize child.vhdx 64M");
    assert_eq!(code, 1);
    assert!(said.contains("--shrink"), "{said}");
    json(folder, "resize --shrink child.vhdx 64M");

    let hash = |file: &str| json(folder, &format!("check --hash {file}"))["content"].clone();
    assert_eq!(hash("child.vhdx"), hash("base.vhdx"));
    let snapshot = json(folder, "snapshot child.vhdx next.vhdx");
    let since = snapshot["data_write_guid"].as_str().unwrap().to_owned();
    let changed = json(folder, &format!("diff --since {since} next.vhdx"));
    assert_eq!(changed["extents"], Value::Array(Vec::new()));
    let same = json(folder, "diff next.vhdx base.vhdx");
    assert_eq!(same["differences"], Value::Array(Vec::new()));

    json(folder, "commit --delete next.vhdx");
    assert!(!folder.join("next.vhdx").exists());
    json(folder, "create --parent base.vhdx other.vhdx");
    let (code, said) = refusal(folder, "commit child.vhdx");
    assert_eq!(code, 1);
    assert!(
        said.contains("other.vhdx") && said.contains("--force"),
        "{said}"
    );
    json(folder, "commit --force child.vhdx");
    let (_, said) = refusal(folder, "map other.vhdx");
    assert!(
        said.contains("has changed since") && said.contains("rebase --force"),
        "{said}"
    );
    let (_, said) = refusal(folder, "rebase --parent base.vhdx other.vhdx");
    assert!(said.contains("has changed since"), "{said}");
    json(folder, "rebase --force --parent base.vhdx other.vhdx");
    json(folder, "map other.vhdx");
    json(folder, "compact --find-zeros base.vhdx");
    json(folder, "check base.vhdx");
}

#[test]
fn conversions_are_told_by_their_formats() {
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
    let (code, said) = refusal(folder, "convert --to raw a.vhdx b.raw");
    assert_eq!(code, 1);
    assert!(said.contains("--overwrite"), "{said}");
    json(folder, "convert --overwrite --to raw a.vhdx b.raw");
    let differs = coppice(folder, "diff a.raw a.vhdx");
    assert_eq!(differs.status.code(), Some(0));
    qemu_io(folder, "raw", "b.raw", "write -P 9 1M 4k");
    let differs = coppice(folder, "diff a.raw b.raw");
    assert_eq!(differs.status.code(), Some(1));
    let said = String::from_utf8(differs.stdout).unwrap();
    assert!(
        said.contains("0x100000") && said.contains("4 KiB in 1 ranges"),
        "{said}"
    );
}

#[test]
fn a_damaged_file_is_told_and_repaired() {
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
    let repaired = json(folder, "repair a.vhdx");
    assert_eq!(repaired["repaired"].as_array().unwrap().len(), 3);
    json(folder, "check a.vhdx");
    qemu_io(folder, "vhdx", "a.vhdx", "read -P 1 0 1M");
    qemu_io(folder, "vhdx", "a.vhdx", "read -P 0 1M 1M");
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
    let mut said = String::new();
    child.stderr.unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(status.code(), Some(130), "{said}");
    assert!(said.contains("interrupted"), "{said}");
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
