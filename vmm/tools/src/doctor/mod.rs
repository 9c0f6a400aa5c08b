//! Examines the host: whether guests can run here, how fast, and what is missing or set too low.
//!
//! ```text
//! kvm, and speed where KVM opens ─────────────────┐
//! kernel: io_uring, cgroup v2, Landlock, seccomp ─┼─> Report
//! limits: mappings, files, memory ────────────────┘
//! ```
//!
//! Nothing on the host is changed. One tiny guest runs for a second at most.

use std::fmt;

use serde::Serialize;

mod check;
mod kernel;
mod kvm;
mod limits;
mod speed;
mod syscall;

pub use check::{Check, Status};

/// The checks of the host. As JSON: `{"can_run_guests": bool, "checks": [{"name", "status", "found", "advice"}]}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    can_run_guests: bool,
    checks: Vec<Check>,
}

impl Report {
    fn of(checks: Vec<Check>) -> Self {
        let can_run_guests = checks.iter().all(|check| check.status != Status::Fail);
        Self {
            can_run_guests,
            checks,
        }
    }

    /// Whether guests with stock kernels run here: no check failed.
    pub fn can_run_guests(&self) -> bool {
        self.can_run_guests
    }

    /// The checks, in the order in which they were made.
    pub fn checks(&self) -> &[Check] {
        &self.checks
    }
}

/// Examines the host.
pub fn examine() -> Report {
    let mut checks = kvm::checks();
    checks.extend(kernel::checks());
    checks.extend(limits::checks());
    Report::of(checks)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|check| check.name.len()).max();
        let width = width.unwrap_or(0);
        for check in &self.checks {
            let status = match check.status {
                Status::Ok => "ok",
                Status::Warn => "warn",
                Status::Fail => "FAIL",
            };
            writeln!(f, "{status:<4}  {:<width$}  {}", check.name, check.found)?;
            if let Some(advice) = &check.advice {
                writeln!(f, "{:6}{:width$}  -> {advice}", "", "")?;
            }
        }
        f.write_str(if self.can_run_guests {
            "Guests can run on this host."
        } else {
            "Guests cannot run on this host."
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_lets_guests_run_and_a_failure_does_not() {
        let ok = Check::ok("a", "fine");
        let warn = Check::warn("b", "low", "raise it");
        let fail = Check::fail("c", "missing", "get one");
        assert!(Report::of(vec![ok.clone(), warn.clone()]).can_run_guests());
        assert!(!Report::of(vec![ok, fail, warn]).can_run_guests());
    }

    #[test]
    fn the_json_has_the_documented_shape() {
        let report = Report::of(vec![
            Check::ok("a", "fine"),
            Check::fail("b", "missing", "get one"),
        ]);
        assert_eq!(
            serde_json::to_value(report).unwrap(),
            serde_json::json!({
                "can_run_guests": false,
                "checks": [
                    { "name": "a", "status": "ok", "found": "fine", "advice": null },
                    { "name": "b", "status": "fail", "found": "missing", "advice": "get one" },
                ],
            })
        );
    }

    #[test]
    fn people_see_aligned_lines_with_the_advice_below() {
        let report = Report::of(vec![
            Check::ok("a", "fine"),
            Check::warn("long", "low", "raise it"),
        ]);
        assert_eq!(
            report.to_string(),
            "ok    a     fine\nwarn  long  low\n            -> raise it\nGuests can run on this host."
        );
    }
    #[test]
    fn this_host_is_examined_and_each_check_has_a_name_of_its_own() {
        let report = examine();
        println!("{report}");
        let mut names: Vec<_> = report.checks().iter().map(|check| check.name).collect();
        assert_eq!(names.first(), Some(&"kvm"));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), report.checks().len());
        for check in report.checks() {
            assert_eq!(check.advice.is_none(), check.status == Status::Ok);
            assert!(!check.found.is_empty() && !check.found.contains('\n'));
        }
    }
}
