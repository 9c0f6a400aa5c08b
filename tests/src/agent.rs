//! Runs scenarios in the lab's host, in the folder of the lab disk.

use std::fs;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use crate::guest;
use crate::result::{Failure, Figures, Outcome, Plan};
use crate::scenarios;

/// Ends the lab's host when a scenario hangs, after its kernel has printed what CPUs and blocked tasks do. Each message
/// restarts the time limit, and has its length.
fn watch() -> Sender<Duration> {
    let (alive, lives) = mpsc::channel();
    std::thread::spawn(move || {
        let mut limit = scenarios::LIMIT;
        loop {
            match lives.recv_timeout(limit) {
                Ok(next) => limit = next,
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => break,
            }
        }
        println!(
            "lab: the scenario has not ended after {limit:?}; the lab's host says why and ends"
        );
        // The keys of sysrq: all messages to the console, backtraces of the CPUs, blocked tasks, sync, power off.
        for key in ["8", "l", "w", "s", "o"] {
            let _ = fs::write("/proc/sysrq-trigger", key);
            std::thread::sleep(Duration::from_secs(3));
        }
    });
    alive
}

/// Runs the plan, and writes each result as soon as a scenario has ended.
pub fn run() -> Result<(), Failure> {
    let plan = fs::read("plan.json").map_err(Failure::io("read plan.json"))?;
    let plan: Plan = serde_json::from_slice(&plan)?;
    let alive = watch();
    for scenario in scenarios::ALL
        .iter()
        .filter(|scenario| plan.scenarios.iter().any(|name| name == scenario.name))
    {
        println!("lab: {}", scenario.name);
        // If the watching thread has ended, only its report is missing.
        let _ = alive.send(scenario.limit);
        let out = Path::new("out").join(scenario.name);
        fs::create_dir_all(&out).map_err(Failure::io("make the scenario's folder"))?;
        let started = Instant::now();
        let result = (scenario.run)(&out);
        let seconds = started.elapsed().as_secs_f64();
        let (failure, figures) = match result {
            Ok(figures) => (None, figures),
            Err(failure) => (Some(report::chain(&failure).to_string()), Figures::new()),
        };
        let log = guest::take_reports();
        let outcome = Outcome {
            name: scenario.name.to_owned(),
            seconds,
            failure,
            figures,
            log,
        };
        fs::write(out.join("outcome.json"), serde_json::to_vec(&outcome)?)
            .map_err(Failure::io("write outcome.json"))?;
        rustix::fs::sync();
    }
    Ok(())
}
