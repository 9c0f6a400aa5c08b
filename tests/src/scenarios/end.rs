//! Scenarios of the ends of guests.

use std::path::Path;

use crate::guest::Start;
use crate::result::{Failure, Figures};

/// The exit codes: 0 for power-off, 10 for a reset, 11 for a panic, 12 for a triple fault.
pub fn exit_codes(_: &Path) -> Result<Figures, Failure> {
    for (cmdline, script, code) in [
        ("", "poweroff -f", 0),
        ("", "reboot -f", 10),
        ("reboot=t", "reboot -f", 12),
        ("", "echo c > /proc/sysrq-trigger", 11),
    ] {
        let mut guest = Start::new().cmdline(cmdline).script(script).spawn()?;
        guest.expect_exit(code).map_err(|failure| {
            Failure::Claim(format!("{cmdline} {script}: {}", report::chain(&failure)))
        })?;
    }
    // Without `reboot=` on the command line, Linux resets by ACPI or the BIOS, which has to work as well.
    let cmdline = format!(
        "console=ttyS0 quiet {}",
        crate::guest::script_word("reboot -f")
    );
    let args = [
        "--kernel",
        "guest/vmlinuz",
        "--initrd",
        "guest/initrd.cpio.gz",
        "--cmdline",
        &cmdline,
    ];
    Start::bare(&args).spawn()?.expect_exit(10)?;
    Ok(Figures::new())
}
