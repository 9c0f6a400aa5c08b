//! Scenarios of the balloon: memory that guests give back.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::api::{expect_ok, request};
use crate::guest::{Guest, Start};
use crate::result::{Failure, Figures};

/// How long a guest may take for work that it does when it likes, such as reporting free pages.
const PATIENCE: Duration = Duration::from_mins(2);
/// How long a guest gets to report the rest of its free pages.
const REPORTING_TIME: Duration = Duration::from_secs(10);
const MIB: u64 = 1024;

/// A script that writes 40 MiB of text to a file, and frees them after a line on the console. It prints a word after
/// each step.
const FILL_AND_FREE: &str = "mount -t tmpfs -o size=90% files /mnt; yes coppice | head -c 40m >/mnt/file; echo FILLED; \
                             read word; rm /mnt/file; echo FREED; read word; ";
/// A script that writes them again, and prints whether they read as written.
const FILL_AGAIN: &str = "sum=$(yes coppice | head -c 40m | tee /mnt/file | md5sum); \
                          [ \"$(md5sum </mnt/file)\" = \"$sum\" ] && echo SAME; sleep 1; ";

/// Anonymous memory of the VMM in KiB: guest RAM that is present, and little else.
fn anonymous(guest: &Guest) -> Result<u64, Failure> {
    let path = guest.proc().join("smaps_rollup");
    let text = fs::read_to_string(&path).map_err(Failure::io(path.display().to_string()))?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("Anonymous:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    kib.ok_or_else(|| Failure::Claim(format!("smaps_rollup: {text}")))
}

/// Calls a function repeatedly until it has a result.
fn until<T>(
    claim: &str,
    mut look: impl FnMut() -> Result<Option<T>, Failure>,
) -> Result<T, Failure> {
    let started = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if started.elapsed() > PATIENCE {
            return Failure::claim(format!("not in {PATIENCE:?}: {claim}"));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// A guest with a balloon, and its REST socket.
struct BalloonGuest {
    guest: Guest,
    socket: PathBuf,
}

impl BalloonGuest {
    fn start(name: &str, balloon: &str, script: &str) -> Result<Self, Failure> {
        let socket = PathBuf::from(format!("/tmp/{name}.sock"));
        let path = socket.to_string_lossy().into_owned();
        let args = ["--api-sock", &path, "--balloon", balloon];
        let guest = Start::new().args(&args).script(script).spawn()?;
        Ok(Self { guest, socket })
    }

    fn patch(&self, path: &str, body: &Value) -> Result<(), Failure> {
        expect_ok(&self.socket, "PATCH", path, body).map(drop)
    }

    fn statistics(&self) -> Result<Value, Failure> {
        expect_ok(&self.socket, "GET", "/balloon/statistics", &Value::Null)
    }

    /// Sets the size of the balloon in MiB, and waits until the guest has reached it.
    fn resize(&self, mib: u64) -> Result<(), Failure> {
        self.patch("/balloon", &json!({"amount_mib": mib}))?;
        until(&format!("a balloon of {mib} MiB"), || {
            let actual = self.statistics()?["actual_mib"].as_u64();
            Ok((actual == Some(mib)).then_some(()))
        })
    }

    /// Waits until the VMM has at least `mib` MiB less anonymous memory than `before`. Returns what it has, and how
    /// long that took.
    fn wait_for_return(&self, before: u64, mib: u64) -> Result<(u64, Duration), Failure> {
        let started = Instant::now();
        let mut now = before;
        let returned = until("memory goes back", || {
            now = anonymous(&self.guest)?;
            Ok((now + mib * MIB <= before).then_some(()))
        });
        match returned {
            Ok(()) => Ok((now, started.elapsed())),
            Err(failure) => Failure::claim(format!(
                "{mib} MiB of {before} KiB, of which {now} KiB are left: {}",
                report::chain(&failure)
            )),
        }
    }

    fn continue_script(&mut self) -> Result<(), Failure> {
        self.guest.type_in("go\n")
    }
}

/// Pages in the balloon are given back to the host. After the balloon is deflated, the guest uses them as before.
pub fn inflate_and_deflate(_: &Path) -> Result<Figures, Failure> {
    let keep = "head -c 4m /dev/urandom >/keep; kept=$(md5sum </keep); ";
    let check = "[ \"$(md5sum </keep)\" = \"$kept\" ] && echo KEPT";
    let script = format!("{keep}{FILL_AND_FREE}{FILL_AGAIN}{check}");
    let mut vm = BalloonGuest::start("inflate", ",stats=1", &script)?;
    vm.guest.wait_for("FILLED")?;
    vm.continue_script()?;
    vm.guest.wait_for("FREED")?;
    let before = anonymous(&vm.guest)?;
    vm.resize(40)?;
    let (inflated, _) = vm.wait_for_return(before, 30)?;
    vm.resize(0)?;
    vm.continue_script()?;
    vm.guest.wait_for("SAME")?;
    vm.guest.wait_for("KEPT")?;
    vm.guest.expect_exit(0)?;
    Ok(Figures::from([
        ("anonymous_kib_before".into(), json!(before)),
        ("anonymous_kib_inflated".into(), json!(inflated)),
    ]))
}

/// Linux reports its free pages without a request.
pub fn reporting(_: &Path) -> Result<Figures, Failure> {
    let script = format!("{FILL_AND_FREE}{FILL_AGAIN}");
    let mut vm = BalloonGuest::start("report", "reporting", &script)?;
    vm.guest.wait_for("FILLED")?;
    let filled = anonymous(&vm.guest)?;
    vm.continue_script()?;
    vm.guest.wait_for("FREED")?;
    let (freed, took) = vm.wait_for_return(filled, 38)?;
    std::thread::sleep(REPORTING_TIME);
    let later = anonymous(&vm.guest)?;
    vm.continue_script()?;
    vm.guest.wait_for("SAME")?;
    vm.guest.expect_exit(0)?;
    Ok(Figures::from([
        ("anonymous_kib_with_40_mib_written".into(), json!(filled)),
        ("anonymous_kib_after_they_were_freed".into(), json!(freed)),
        ("seconds".into(), json!(took.as_secs_f64())),
        ("anonymous_kib_10_s_later".into(), json!(later)),
    ]))
}

/// How many runs of hinting are started while the guest uses its memory.
const RUNS: u32 = 100;

/// The host starts runs of hinting while the guest uses pages that it has just reported as free, and no data are lost.
pub fn hinting(_: &Path) -> Result<Figures, Failure> {
    let script = format!("{FILL_AND_FREE}{FILL_AGAIN}");
    let mut vm = BalloonGuest::start("hint", "hinting", &script)?;
    vm.guest.wait_for("FILLED")?;
    vm.continue_script()?;
    vm.guest.wait_for("FREED")?;
    let before = anonymous(&vm.guest)?;
    let mut after = before;
    for (run, body) in [(1, Value::Null), (2, json!({"acknowledge_on_stop": true}))] {
        vm.patch("/balloon/hinting/start", &body)?;
        until(&format!("the end of run {run}"), || {
            let status = expect_ok(&vm.socket, "GET", "/balloon/hinting/status", &Value::Null)?;
            Ok((status == json!({"host_cmd": 1, "guest_cmd": 0})).then_some(()))
        })?;
        if run == 1 {
            after = vm.wait_for_return(before, 16)?.0;
        }
    }
    vm.continue_script()?;
    let mut runs = 0;
    until("the guest finds what it has written", || {
        // The number of runs is limited, because with one processor each run takes it from the guest.
        if runs < RUNS {
            vm.patch("/balloon/hinting/start", &Value::Null)?;
            runs += 1;
        }
        Ok(vm.guest.console().contains("SAME").then_some(()))
    })?;
    vm.guest.expect_exit(0)?;
    Ok(Figures::from([
        ("anonymous_kib_before".into(), json!(before)),
        ("anonymous_kib_after_a_run".into(), json!(after)),
        ("runs_meanwhile".into(), json!(runs)),
    ]))
}

/// A guest that runs out of memory takes pages out of the balloon.
pub fn deflate_on_oom(_: &Path) -> Result<Figures, Failure> {
    let script = "echo READY; read word; dd if=/dev/zero of=/dev/null bs=48M count=1 && echo SURVIVED; read word";
    let mut vm = BalloonGuest::start("oom", ",deflate-on-oom,stats=1", script)?;
    vm.guest.wait_for("READY")?;
    vm.resize(48)?;
    vm.continue_script()?;
    vm.guest.wait_for("SURVIVED")?;
    let actual = until("what is left in the balloon", || {
        let actual = vm.statistics()?["actual_mib"].as_u64();
        Ok(actual.filter(|actual| *actual < 48))
    })?;
    vm.continue_script()?;
    vm.guest.expect_exit(0)?;
    let console = vm.guest.console();
    if console.contains("Out of memory") || console.contains("oom-kill") {
        return Failure::claim("the guest killed a process");
    }
    Ok(Figures::from([(
        "mib_left_of_48_in_the_balloon".into(),
        json!(actual),
    )]))
}

/// The statistics of the guest follow its use of memory.
pub fn statistics(_: &Path) -> Result<Figures, Failure> {
    let script = format!("echo READY; read word; {FILL_AND_FREE}");
    let mut vm = BalloonGuest::start("stats", ",stats=1", &script)?;
    vm.guest.wait_for("READY")?;
    let before = until("the first statistics", || {
        let statistics = vm.statistics()?;
        Ok(statistics["total_memory"].is_u64().then_some(statistics))
    })?;
    let of = |statistics: &Value, name: &str| statistics[name].as_u64().unwrap_or_default() >> 20;
    let (total, free) = (of(&before, "total_memory"), of(&before, "available_memory"));
    if !(64..=128).contains(&total) || !(1..total).contains(&free) {
        return Failure::claim(format!("in a guest of 128 MiB: {before}"));
    }
    vm.continue_script()?;
    vm.guest.wait_for("FILLED")?;
    let interval = json!({"stats_polling_interval_s": 2});
    vm.patch("/balloon/statistics", &interval)?;
    let after = until("30 MiB less available", || {
        let statistics = vm.statistics()?;
        let fewer = of(&statistics, "available_memory") + 30 <= free;
        Ok(fewer.then_some(statistics))
    })?;
    let off = json!({"stats_polling_interval_s": 0});
    let (status, _) = request(&vm.socket, "PATCH", "/balloon/statistics", &off)?;
    if status != 400 {
        return Failure::claim(format!("to turn statistics off is answered {status}"));
    }
    vm.continue_script()?;
    vm.continue_script()?;
    vm.guest.expect_exit(0)?;
    Ok(Figures::from([
        ("before".into(), before),
        ("with_40_mib_written".into(), after),
    ]))
}
