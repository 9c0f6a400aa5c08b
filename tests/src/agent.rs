//! Runs scenarios in the lab's host, in the folder of the lab disk.

use std::fs;
use std::path::Path;
use std::time::Instant;

use crate::guest;
use crate::result::{Failure, Figures, Outcome, Plan};
use crate::scenarios;

/// Runs the plan, and writes each result as soon as it is there.
pub fn run() -> Result<(), Failure> {
    let plan = fs::read("plan.json").map_err(Failure::io("read plan.json"))?;
    let plan: Plan = serde_json::from_slice(&plan)?;
    for scenario in scenarios::ALL
        .iter()
        .filter(|scenario| plan.scenarios.iter().any(|name| name == scenario.name))
    {
        println!("lab: {}", scenario.name);
        let out = Path::new("out").join(scenario.name);
        fs::create_dir_all(&out).map_err(Failure::io("make the scenario's folder"))?;
        let started = Instant::now();
        let result = (scenario.run)(&out);
        let seconds = started.elapsed().as_secs_f64();
        let (failure, figures) = match result {
            Ok(figures) => (None, figures),
            Err(failure) => (Some(failure.to_string()), Figures::new()),
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
