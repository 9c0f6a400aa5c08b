//! Prints the result as tables.

use std::fmt;

use super::number::{float, mean};
use super::report::{Report, Run};
use super::{GuestFigures, extrapolate};
use host::text_table::columns;

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

fn mib(kib: f64) -> String {
    format!("{:.1}", kib / 1024.0)
}

fn memory(runs: &[Run]) -> String {
    let mut rows = vec![row([
        "MiB a guest",
        "guests",
        "host",
        "each further",
        "fixed",
        "private",
        "shared",
        "Pss",
        "RAM private",
        "RAM shared",
    ])];
    for run in runs {
        let each =
            |figure: fn(&GuestFigures) -> u64| mib(mean(&run.guests, |guest| float(figure(guest))));
        let line = |part: fn(&super::Line) -> f64| {
            run.line
                .as_ref()
                .map_or("-".to_owned(), |line| mib(part(line)))
        };
        rows.push(vec![
            run.name(),
            run.guests.len().to_string(),
            mib(run.host_kib_per_guest),
            line(|line| line.guest_kib),
            line(|line| line.fixed_kib),
            each(|guest| guest.private_kib),
            each(|guest| guest.shared_kib),
            each(|guest| guest.pss_kib),
            each(|guest| guest.ram_private_kib),
            each(|guest| guest.ram_shared_kib),
        ]);
    }
    columns(&rows)
}

fn overhead(runs: &[Run]) -> String {
    let mut rows = vec![row([
        "KiB a guest, beside its RAM",
        "VMM private",
        "VMM shared",
        "VmPTE",
        "PageTables",
        "SecPageTables",
        "Slab",
        "KernelStack",
        "mappings of RAM",
    ])];
    for run in runs {
        let each = |figure: fn(&GuestFigures) -> u64| {
            format!("{:.0}", mean(&run.guests, |guest| float(figure(guest))))
        };
        let host =
            |figure: fn(&super::host::HostMemory) -> u64| format!("{:.0}", run.per_guest(figure));
        rows.push(vec![
            run.name(),
            each(|guest| guest.vmm_private_kib),
            each(|guest| guest.vmm_shared_kib),
            each(|guest| guest.page_tables_kib),
            host(|memory| memory.page_tables),
            host(|memory| memory.secondary_page_tables),
            host(|memory| memory.slab),
            host(|memory| memory.kernel_stack),
            each(|guest| guest.ram_mappings as u64),
        ]);
    }
    columns(&rows)
}

fn time(runs: &[Run]) -> String {
    let mut rows = vec![row([
        "seconds, mean; CPU % of a core, idle",
        "start to /init",
        "uptime at /init",
        "start to idle",
        "CPU, all guests",
        "CPU, mergers",
        "CPU, ksmd",
    ])];
    for run in runs {
        let each = |figure: fn(&GuestFigures) -> f64| format!("{:.2}", mean(&run.guests, figure));
        let cpu =
            |figure: fn(&super::Second) -> f64| format!("{:.1}", 100.0 * run.cpu_share(figure));
        rows.push(vec![
            run.name(),
            each(|guest| guest.init_seconds),
            each(|guest| guest.uptime_at_init_seconds),
            each(|guest| guest.idle_seconds),
            cpu(|second| second.guests_cpu_seconds),
            cpu(|second| second.merger_cpu_seconds),
            cpu(|second| second.ksmd_cpu_seconds),
        ]);
    }
    columns(&rows)
}

fn hosts(runs: &[Run]) -> String {
    let asked = runs.iter().find(|run| !run.extrapolation.is_empty());
    let mut head = row(["guests of a host"]);
    head.extend(asked.into_iter().flat_map(|run| {
        let sizes = run.extrapolation.iter();
        sizes.map(|host| format!("of {} GiB", host.host_gib))
    }));
    let mut rows = vec![head];
    for run in runs {
        let mut row = vec![run.name()];
        row.extend(run.extrapolation.iter().map(|host| host.guests.to_string()));
        rows.push(row);
    }
    columns(&rows)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = &self.host;
        writeln!(
            f,
            "Host: Linux {}, {} CPUs, {} MiB; transparent huge pages: {}",
            host.kernel,
            host.cpus,
            host.memory_kib >> 10,
            host.huge_pages
        )?;
        if !host.caches_dropped {
            writeln!(
                f,
                "The page cache was not dropped before readings, which needs root: what the host kept of files may be in them."
            )?;
        }
        for part in [memory, overhead, time, hosts] {
            writeln!(f, "\n{}", part(&self.runs).trim_end())?;
        }
        for run in &self.runs {
            if let Some(ksm) = &run.ksm {
                writeln!(
                    f,
                    "\n{}: KSM {} after {:.0} s: {} pages stand for {} more; {} pages every {} ms",
                    run.name(),
                    if ksm.settled {
                        "settled"
                    } else {
                        "had not settled"
                    },
                    ksm.settled_after_seconds,
                    ksm.pages_shared,
                    ksm.pages_sharing,
                    ksm.pages_to_scan,
                    ksm.sleep_millisecs
                )?;
            }
        }
        write!(f, "\n{}", extrapolate::METHOD)
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;

    #[test]
    fn a_report_shows_every_run_in_every_part_and_how_hosts_are_computed() {
        let text = report().to_string();
        println!("{text}");
        assert_eq!(text.matches("qemu-microvm, read").count(), 4);
        assert!(text.contains("is the median of") && text.contains("of 256 GiB"));
        assert!(!text.contains("needs root"));
        let mut report = report();
        report.host.caches_dropped = false;
        assert!(report.to_string().contains("needs root"));
    }
}
