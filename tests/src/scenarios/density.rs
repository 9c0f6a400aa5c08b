//! `coppice bench density` in the lab's host, for Coppice and the peer, and a check that its figures are plausible.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::guest::KERNEL_CACHE;
use crate::programs;
use crate::result::{Failure, Figures};

/// RAM in MiB of the host in which densities are measured.
pub const MEMORY: u32 = 8192;
/// The longest time of a measurement. Each guest that idles prints a line, which shows that it goes on.
pub const LIMIT: Duration = Duration::from_mins(40);

/// The command of the peer, which brings its libraries, because the lab's host has none.
const PEER: &str = "peer/lib/ld-linux-x86-64.so.2 --library-path peer/lib peer/qemu -L peer/share";
const WORKLOADS: &str = "read";
/// How long guests idle before each reading: Linux takes some seconds to report free pages.
const IDLE_SECONDS: &str = "10";
/// The beginning of the scenarios' names; the name of a configuration follows.
const PREFIX: &str = "density_";
/// The scenarios that measure a configuration each.
pub const ALL: [&str; 8] = [
    "density_share_off",
    "density_share_boot",
    "density_share_read",
    "density_share_all",
    "density_share_all_tracefs",
    "density_pmem",
    "density_qemu_microvm",
    "density_qemu_microvm_ksm",
];
/// The file that the benchmark's guests read.
const DATA: &str = "/data/40M";

/// Runs `coppice bench density`, and shows its progress. If its exit code is not 0, its output is the failure.
fn bench(arguments: &[&str]) -> Result<String, Failure> {
    let mut child = Command::new("./coppice")
        .args(["bench", "density", "--kernel", "guest/vmlinuz"])
        .args(["--initrd", "guest/initrd.cpio.gz", "--peer", PEER])
        .args(["--python-disk", "guest/full.vhdx"])
        .args(arguments)
        .env("XDG_CACHE_HOME", KERNEL_CACHE)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(Failure::io("start coppice bench"))?;
    let mut last = String::new();
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            println!("lab: {line}");
            last = line;
        }
    }
    let mut text = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout
            .read_to_string(&mut text)
            .map_err(Failure::io("read what the benchmark found"))?;
    }
    let status = child
        .wait()
        .map_err(Failure::io("wait for the benchmark"))?;
    if status.success() {
        Ok(text)
    } else {
        Failure::claim(format!("coppice bench density: {status}: {last}"))
    }
}

/// Measures one configuration, which is in the scenario's name: if a host is lost, only that one is measured again.
pub fn density(out: &Path) -> Result<Figures, Failure> {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    let configuration = name.trim_start_matches(PREFIX).replace('_', "-");
    let folder = out.to_string_lossy();
    let common = [
        "--config",
        &configuration,
        "--settle",
        IDLE_SECONDS,
        "--out",
        &folder,
        "--disk",
        "guest/bench.vhdx",
    ];
    bench(&[&common[..], &["--workload", WORKLOADS]].concat())?;
    if !configuration.starts_with("qemu") {
        let text = bench(&[&common[..], &["--workload", WORKLOADS, "--explain"]].concat())?;
        println!("{text}");
        fs::write(out.join("explain.txt"), text).map_err(Failure::io("keep the explanation"))?;
    }
    Ok(summary(&result(out)?))
}

/// `result.json` of a benchmark.
fn result(folder: &Path) -> Result<Value, Failure> {
    let path = folder.join("result.json");
    let text = fs::read(&path).map_err(Failure::io(path.display().to_string()))?;
    Ok(serde_json::from_slice(&text)?)
}

/// The MiB that each further guest takes, by workload.
fn summary(report: &Value) -> Figures {
    let runs = report["runs"].as_array().into_iter().flatten();
    let figures = runs.map(|run| {
        let mib = run["line"]["guest_kib"].as_f64().unwrap_or(f64::NAN) / 1024.0;
        let name = run["workload"].as_str().unwrap_or_default();
        let figure = json!((mib * 10.0).round() / 10.0);
        (format!("{name}_mib_each_further_guest"), figure)
    });
    figures.collect()
}

/// Draws the results of all configurations, also those of earlier runs of the lab, into `density` beside the scenario's
/// folder. This runs on this machine.
pub fn draw(folder: &Path, _: &Figures) -> Result<(), Failure> {
    let out = folder.parent().unwrap_or(folder);
    let arguments = ALL
        .iter()
        .map(|name| out.join(name).join("result.json"))
        .filter(|result| result.exists())
        .flat_map(|result| ["--plot".to_owned(), result.to_string_lossy().into_owned()]);
    let mut arguments: Vec<_> = arguments.collect();
    if arguments.is_empty() {
        return Ok(());
    }
    let density = out.join("density");
    arguments.extend(["--out".to_owned(), density.to_string_lossy().into_owned()]);
    let words = ["bench", "density"].into_iter();
    let words: Vec<_> = words.chain(arguments.iter().map(String::as_str)).collect();
    programs::coppice(&words)?;
    println!("lab: {}", density.join("table.txt").display());
    Ok(())
}

/// Measures two guests that read a file, and expects an error for a disk without that file.
pub fn two_guests(out: &Path) -> Result<Figures, Failure> {
    let configuration = "share-off";
    let folder = out.to_string_lossy().into_owned();
    let common = [
        "--config",
        configuration,
        "--workload",
        "read",
        "--window",
        "2",
    ];
    let measured = [
        "--guests",
        "2",
        "--disk",
        "guest/bench.vhdx",
        "--out",
        &folder,
    ];
    bench(&[common, measured].concat())?;
    // Of these runs only the guests' work is checked, by the benchmark itself.
    let others = ["--workload", "idle,write", "--guests", "1", "--window", "0"];
    bench(
        &[
            &["--config", configuration, "--disk", "guest/bench.vhdx"][..],
            &others,
        ]
        .concat(),
    )?;
    match bench(&[&common[..], &["--guests", "1", "--disk", "guest/root.vhdx"]].concat()) {
        Err(Failure::Claim(words)) if words.contains("checksum") => {}
        Err(failure) => return Err(failure),
        Ok(_) => return Failure::claim("a guest without its file to read was measured"),
    }
    let report = result(out)?;
    let run = &report["runs"][0];
    Ok(Figures::from([
        (
            "mib_a_guest".into(),
            json!(number(run, "host_kib_per_guest")? / 1024.0),
        ),
        (
            "guest_seconds_at_init".into(),
            run["guests"][0]["uptime_at_init_seconds"].clone(),
        ),
    ]))
}

fn number(value: &Value, name: &str) -> Result<f64, Failure> {
    value[name]
        .as_f64()
        .ok_or_else(|| Failure::Claim(format!("no number {name} in {value}")))
}

/// Checks that a figure is between two bounds.
fn between(value: &Value, name: &str, least: f64, most: f64) -> Result<f64, Failure> {
    let found = number(value, name)?;
    if (least..=most).contains(&found) {
        Ok(found)
    } else {
        Failure::claim(format!("{name} is {found}, outside {least} to {most}"))
    }
}

fn count(value: &Value, name: &str, expected: usize) -> Result<Vec<Value>, Failure> {
    let items = value[name].as_array().cloned().unwrap_or_default();
    if items.len() == expected {
        Ok(items)
    } else {
        Failure::claim(format!("{} {name}, {expected} expected", items.len()))
    }
}

/// Checks the figures of two guests of 128 MiB that share nothing and have read a file of 40 MiB each, and computes the
/// checksum by this machine's programs.
pub fn check_two_guests(folder: &Path, _: &Figures) -> Result<(), Failure> {
    const GUEST: f64 = 128.0 * 1024.0;
    const DATA_KIB: f64 = 40.0 * 1024.0;
    let report = result(folder)?;
    if report["host"]["caches_dropped"] != json!(true) {
        return Failure::claim("the lab's host is root's, and its page cache was not dropped");
    }
    let runs = count(&report, "runs", 1)?;
    let run = &runs[0];
    let points = count(run, "points", 3)?;
    let unused: Vec<_> = points
        .iter()
        .map(|point| Ok(number(point, "available")? + number(point, "at_hand")?))
        .collect::<Result<_, Failure>>()?;
    if unused.windows(2).any(|pair| pair[0] - pair[1] < DATA_KIB) {
        return Failure::claim(format!(
            "a guest costs less than what it has read: {unused:?}"
        ));
    }
    let disk = folder.join("bench.vhdx");
    fs::copy(programs::workspace().join("target/guest/bench.vhdx"), &disk)
        .map_err(Failure::io("copy the disk"))?;
    let md5 = programs::md5_of(&programs::to_raw(&disk)?, DATA)?;
    let mut private = 0.0;
    for guest in count(run, "guests", 2)? {
        if guest["checksum"] != json!(md5) {
            return Failure::claim(format!(
                "checksum {}, and the file's is {md5}",
                guest["checksum"]
            ));
        }
        let ram = between(&guest, "ram_private_kib", DATA_KIB, GUEST)?;
        let vmm = between(&guest, "vmm_private_kib", 100.0, 4096.0)?;
        private += between(&guest, "private_kib", ram, ram + vmm + 1024.0)?;
        let uptime = between(&guest, "uptime_at_init_seconds", 0.2, 60.0)?;
        let init = between(&guest, "init_seconds", uptime / 4.0, 120.0)?;
        between(&guest, "idle_seconds", init, 180.0)?;
        between(&guest, "page_tables_kib", 100.0, 4096.0)?;
    }
    // A guest also takes page tables, of KVM and of the host's kernel.
    between(
        run,
        "host_kib_per_guest",
        0.95 * private / 2.0,
        1.25 * private / 2.0,
    )?;
    count(run, "cpu", 2)?;
    let hosts = count(run, "extrapolation", 2)?;
    between(
        &hosts[0],
        "guests",
        64.0 * 1024.0 / 128.0,
        64.0 * 1024.0 / 40.0,
    )?;
    for name in ["density.svg", "density.png", "table.txt"] {
        let len = fs::metadata(folder.join(name)).map_or(0, |metadata| metadata.len());
        if len < 1000 {
            return Failure::claim(format!("{name} has {len} bytes"));
        }
    }
    Ok(())
}
