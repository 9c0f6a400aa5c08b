//! Scenario of CPUs: threads of a core, and a CPU template.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::guest::Start;
use crate::result::{Failure, Figures};

/// CMPXCHG16B, in leaf 1 ECX, bit 13: every processor that runs guests has it, and no kernel needs it.
const FLAG: &str = "cx16";

/// A guest whose cores have two threads finds them, and does not find a feature that its template hides.
pub fn threads_and_template(out: &Path) -> Result<Figures, Failure> {
    let bitmap = format!("0b{}0{}", "x".repeat(18), "x".repeat(13));
    let template = json!({"cpuid_modifiers": [{
        "leaf": "0x1", "subleaf": "0x0", "flags": 0,
        "modifiers": [{"register": "ecx", "bitmap": bitmap}],
    }]});
    let machine = |smt: bool| json!({"vcpu_count": 4, "mem_size_mib": 128, "smt": smt});
    let cases = [
        (
            "plain",
            json!({"machine-config": machine(false)}),
            "0 1 2 3",
            "4",
        ),
        (
            "threads",
            json!({"machine-config": machine(true), "cpu-config": template}),
            "0-1 0-1 2-3 2-3",
            "0",
        ),
    ];
    let script = format!(
        "echo SIBLINGS $(cat /sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list); \
         echo FLAG $(grep -c -w {FLAG} /proc/cpuinfo)"
    );
    for (name, config, siblings, with_flag) in cases {
        let path = out.join(format!("{name}.json"));
        fs::write(&path, config.to_string()).map_err(Failure::io("write a configuration"))?;
        let mut guest = Start::new()
            .args(&["--config", &path.display().to_string()])
            .script(&script)
            .spawn()?;
        guest.expect_exit(0)?;
        let seen = (guest.line("SIBLINGS ")?, guest.line("FLAG ")?);
        if seen != (siblings.to_owned(), with_flag.to_owned()) {
            return Failure::claim(format!("{name}: the guest sees {seen:?}"));
        }
    }
    Ok(Figures::new())
}
