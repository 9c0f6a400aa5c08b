//! Scenario of clocks: the time of guests that are loaded a while after they were saved.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use super::snapshot::{Vm, booted, create, empty, files, load_body};
use crate::result::{Failure, Figures};

/// How long the guest is saved before it is loaded.
const SAVED_FOR: Duration = Duration::from_secs(13);
/// How far a clock may be off, beside the time that it takes to read it.
const TOLERANCE: f64 = 0.5;
/// A sleep that ends while the guest is saved.
const SLEEP: Duration = Duration::from_secs(10);
/// How long a guest that was just loaded gets to notice that its sleep is over.
const NOTICED: Duration = Duration::from_mins(1);

/// What a guest says of its clocks.
#[derive(Clone, Copy, Debug)]
struct Reading {
    /// Seconds that its wall clock is ahead of the host's.
    skew: f64,
    /// By how much that may be wrong, because reading takes time.
    doubt: f64,
    /// `CLOCK_BOOTTIME` in seconds.
    uptime: f64,
    /// When it was read, by the host's clock.
    at: f64,
    /// `disruption_marker` of its vmclock page. It is read directly, because the lab's kernel has no driver for it.
    disruptions: u32,
    /// Messages of its kernel about stalls, lockups and unstable clocks.
    complaints: u32,
}

fn now() -> Result<f64, Failure> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map(|since| since.as_secs_f64())
        .map_err(|_| Failure::Claim("the host's clock is before 1970".into()))
}

/// Reads the clocks of a guest. Busybox's `adjtimex` shows microseconds, which its `date` does not.
fn read(vm: &mut Vm, mark: &str) -> Result<Reading, Failure> {
    let time = "$(adjtimex | awk '/time.tv_sec/{s=$2} /time.tv_usec/{u=$2} END{printf \"%d.%06d\", s, u}')";
    let disruptions = "$(($(devmem 0xfe010 64)))";
    let complaints = "$(dmesg | grep -c -i -e stall -e lockup -e unstable)";
    let line = format!(
        "echo TIME{mark} {time} $(cut -d' ' -f1 /proc/uptime) {disruptions} {complaints}; echo O''VERTIME{mark}"
    );
    let before = now()?;
    vm.run_line(&line, &format!("OVERTIME{mark}"))?;
    let after = now()?;
    let text = vm.guest.line(&format!("TIME{mark} "))?;
    let at = f64::midpoint(before, after);
    let parsed = || {
        let mut words = text.split(' ');
        let (time, uptime): (f64, f64) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(Reading {
            skew: time - at,
            doubt: (after - before) / 2.0,
            uptime,
            at,
            disruptions: words.next()?.parse().ok()?,
            complaints: words.next()?.parse().ok()?,
        })
    };
    let Some(reading) = parsed() else {
        return Failure::claim(format!("the clocks of {mark} read {text:?}"));
    };
    println!("lab: {mark}: {reading:?}");
    Ok(reading)
}

/// Loads the snapshot as a clone with a disk of its own; the answer of the load says that it runs.
fn clone(out: &Path, name: &str, more: &Value) -> Result<Vm, Failure> {
    let vm = empty(out, name)?;
    let mut body = load_body(out, "saved");
    let disk = out.join(format!("{name}.vhdx"));
    body["drives"] = json!([{"drive_id": "disk0", "clone": true, "path_on_host": disk}]);
    if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
        body.extend(more.clone());
    }
    vm.put("/snapshot/load", &body)?;
    Ok(vm)
}

fn wakings(vm: &Vm) -> usize {
    vm.guest.console().matches("WOKE").count()
}

/// Waits until the guest's sleep is over, or for so long.
fn woke_within(vm: &Vm, patience: Duration) -> bool {
    let begun = Instant::now();
    while wakings(vm) == 0 && begun.elapsed() < patience {
        std::thread::sleep(Duration::from_millis(50));
    }
    wakings(vm) > 0
}

/// A guest is saved, and loaded a while later by two clones, one after the other. One has the right time, and finds a
/// sleep over that ended meanwhile; the other, whose clock is to be kept, is late by the time that it was saved.
pub fn follows(out: &Path) -> Result<Figures, Failure> {
    let mut source = booted(out, &["--cpus", "2"])?;
    let before = read(&mut source, "SOURCE")?;
    let sleep = format!("( sleep {}; echo WO''KE ) & echo A''SLEEP", SLEEP.as_secs());
    source.run_line(&sleep, "ASLEEP")?;
    source.pause()?;
    let saving = Instant::now();
    create(&source, out, "saved", "Full")?;
    let saved = Instant::now();
    if wakings(&source) > 0 {
        return Failure::claim("the sleep was over before the guest was saved");
    }
    source.stop()?;
    std::thread::sleep(SAVED_FOR.saturating_sub(saved.elapsed()));

    let mut following = clone(out, "following", &json!({}))?;
    if !woke_within(&following, NOTICED) {
        return Failure::claim("a sleep that was due meanwhile goes on");
    }
    let after = read(&mut following, "FOLLOWING")?;
    if wakings(&following) != 1 {
        return Failure::claim("a sleep that was due meanwhile ended twice");
    }
    following.stop()?;
    let shortest = saved.elapsed().as_secs_f64();
    let mut kept = clone(out, "kept", &json!({"clock_realtime": false}))?;
    let longest = saving.elapsed().as_secs_f64();
    let late = read(&mut kept, "KEPT")?;
    // Of the sleep there is more left than it takes to read the clocks.
    if late.uptime - before.uptime < SLEEP.as_secs_f64() && wakings(&kept) > 0 {
        return Failure::claim("a sleep is over although the clock was kept");
    }
    kept.stop()?;
    fs::remove_file(files(out, "saved").1).map_err(Failure::io("remove"))?;

    if (before.disruptions, after.disruptions, late.disruptions) != (0, 1, 1) {
        return Failure::claim("the vmclock page does not count the loads");
    }
    // The clock of a guest is set from the RTC at its boot, to within a second of the host's.
    let moved = after.skew - before.skew;
    let allowed = TOLERANCE + before.doubt + after.doubt;
    if moved.abs() > allowed {
        return Failure::claim(format!(
            "the wall clock is {moved:.3} s off, and {allowed:.3} s are allowed"
        ));
    }
    let lateness = before.skew - late.skew;
    let allowed_late = TOLERANCE + before.doubt + late.doubt;
    if !(shortest - allowed_late..longest + allowed_late).contains(&lateness) {
        return Failure::claim(format!(
            "a kept clock is {lateness:.3} s late after {shortest:.3} to {longest:.3} s"
        ));
    }
    let run = (after.uptime - before.uptime) - (after.at - before.at);
    if run.abs() > allowed {
        return Failure::claim(format!(
            "CLOCK_BOOTTIME has run {run:.3} s longer than the host"
        ));
    }
    Ok(BTreeMap::from([
        ("saved_for_seconds".into(), json!(shortest)),
        ("wall_clock_off_seconds".into(), json!(moved)),
        (
            "wall_clock_doubt_seconds".into(),
            json!(before.doubt + after.doubt),
        ),
        ("kept_clock_late_seconds".into(), json!(lateness)),
        ("boottime_off_seconds".into(), json!(run)),
        ("kernel_complaints".into(), json!(after.complaints)),
    ]))
}
