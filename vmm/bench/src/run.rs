//! Runs the benchmark: starts the guests of each configuration, and takes the readings.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use super::command::{CMDLINE, coppice};
use super::guest::{Guest, Times};
use super::host::{self, HostMemory};
use super::interrupt::Interrupt;
use super::kernel_map::{self, Part};
use super::ksm::Ksm;
use super::page_use::{self, Ram};
use super::pagemap;
use super::process::{self, ProcessMemory};
use super::{
    BenchError, Configuration, Explanation, GuestFigures, KsmFigures, Options, Point, Report, Run,
    Second, Workload, explain,
};
use ::host::procfs;
use kvm::boot::{self, LoadSegment};

const RESULT: &str = "result.json";

/// Measures every configuration with every workload, and writes the result to the folder that the options name. It is
/// written after each run, so that a failing run does not lose earlier ones.
///
/// # Errors
/// See [`BenchError`]: the first guest that ends, hangs or prints a wrong checksum ends the benchmark. All guests have
/// ended then, and the host's settings are restored.
pub fn density(options: &Options) -> Result<Report, BenchError> {
    let bench = Bench::new(options)?;
    let mut report = Report {
        coppice: env!("CARGO_PKG_VERSION").to_owned(),
        host: host::describe()?,
        runs: Vec::new(),
    };
    for workload in &options.workloads {
        for configuration in options.chosen() {
            report.runs.push(bench.run(configuration, *workload)?);
            if let Some(out) = &options.out {
                report.to_file(&out.join(RESULT))?;
            }
        }
    }
    if report.runs.is_empty() {
        return Err(BenchError::Refused(
            "no configuration applies to this host".to_owned(),
        ));
    }
    if let Some(out) = &options.out {
        write_report(&report, out)?;
    }
    Ok(report)
}

/// Joins the results of earlier benchmarks into one, and writes that to `out`.
///
/// # Errors
/// See [`BenchError`].
pub fn plot(results: &[PathBuf], out: &Path) -> Result<Report, BenchError> {
    let mut joined: Option<Report> = None;
    for result in results {
        let report = Report::from_file(result)?;
        match &mut joined {
            Some(joined) => joined.runs.extend(report.runs),
            None => joined = Some(report),
        }
    }
    let report = joined.ok_or_else(|| BenchError::Refused("no result to plot".to_owned()))?;
    make_folder(out)?;
    write_report(&report, out)?;
    Ok(report)
}

fn make_folder(folder: &Path) -> Result<(), BenchError> {
    fs::create_dir_all(folder).map_err(BenchError::io(format!("make {}", folder.display())))
}

fn write_report(report: &Report, out: &Path) -> Result<(), BenchError> {
    report.to_file(&out.join(RESULT))?;
    let table = out.join("table.txt");
    fs::write(&table, format!("{report}\n"))
        .map_err(BenchError::io(format!("write {}", table.display())))?;
    super::plot::draw(report, out)
}

/// Explains for one guest of each of Coppice's configurations where its RAM is, and what the guest uses it for.
///
/// # Errors
/// Those of [`density`].
pub fn explanations(options: &Options) -> Result<Vec<Explanation>, BenchError> {
    let bench = Bench::new(options)?;
    let mut explanations = Vec::new();
    for workload in &options.workloads {
        for configuration in options.chosen() {
            if configuration.is_coppice() {
                explanations.push(bench.explain(configuration, *workload)?);
            }
        }
    }
    if let Some(out) = &options.out {
        let path = out.join("explain.json");
        let json = serde_json::to_vec_pretty(&explanations).map_err(|error| BenchError::Json {
            path: path.clone(),
            error,
        })?;
        fs::write(&path, json).map_err(BenchError::io(format!("write {}", path.display())))?;
    }
    Ok(explanations)
}

/// What all runs have in common.
struct Bench<'a> {
    options: &'a Options,
    interrupt: Interrupt,
    /// The unpacked kernel. The peer reads it through this descriptor, so that it needs no access to the cache.
    kernel: File,
    segments: Vec<LoadSegment>,
}

/// A guest that has done its work, and idles.
struct IdleGuest {
    guest: Guest,
    times: Times,
    checksum: String,
}

impl<'a> Bench<'a> {
    fn new(options: &'a Options) -> Result<Self, BenchError> {
        let interrupt = Interrupt::new().map_err(BenchError::io("watch for signals"))?;
        options.check()?;
        if let Some(out) = &options.out {
            make_folder(out)?;
        }
        // The kernel is unpacked here, because otherwise the first guest's time would include that.
        let (kernel, segments) = boot::unpacked(&options.inputs.kernel)?;
        Ok(Self {
            options,
            interrupt,
            kernel,
            segments,
        })
    }

    /// Makes the reference image, because otherwise the figures of the first guest would include that.
    fn warm(&self) -> Result<(), BenchError> {
        let status = Command::new(coppice()?)
            .args(["image", "warm", "--cmdline", CMDLINE, "--mem"])
            .arg(format!("{}M", self.options.memory))
            .arg("--kernel")
            .arg(&self.options.inputs.kernel)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .map_err(BenchError::io("run coppice image warm"))?;
        if status.success() {
            Ok(())
        } else {
            Err(BenchError::Refused(format!("coppice image warm: {status}")))
        }
    }

    fn run(&self, configuration: Configuration, workload: Workload) -> Result<Run, BenchError> {
        let options = self.options;
        if configuration.needs_reference() {
            self.warm()?;
        }
        // This is dropped after the guests, so that KSM's settings are restored whatever happens.
        let ksm = match configuration {
            Configuration::QemuMicrovmKsm => Some(Ksm::start()?),
            Configuration::ShareOff
            | Configuration::ShareBoot
            | Configuration::ShareRead
            | Configuration::ShareAll
            | Configuration::ShareAllTracefs
            | Configuration::Pmem
            | Configuration::QemuMicrovm => None,
        };
        let (mut idle, mut points) = (Vec::new(), Vec::new());
        let mut ksm_figures = self.settle(None)?;
        points.push(point(0)?);
        if options.parallel {
            let started: Result<Vec<_>, _> = (1..=options.guests)
                .map(|number| self.start(configuration, workload, number, None))
                .collect();
            for (number, guest) in (1..).zip(started?) {
                idle.push(self.wait_for_idle(guest, configuration, workload, number)?);
            }
            ksm_figures = self.settle(ksm.as_ref())?;
            points.push(point(options.guests)?);
        } else {
            for number in 1..=options.guests {
                let guest = self.start(configuration, workload, number, None)?;
                idle.push(self.wait_for_idle(guest, configuration, workload, number)?);
                ksm_figures = self.settle(ksm.as_ref())?;
                points.push(point(number)?);
            }
        }
        let mut guests = Vec::new();
        for (number, idle) in (1..).zip(&mut idle) {
            let figures = self
                .figures(idle)
                .map_err(of_guest(configuration, workload, number))?;
            guests.push(figures);
        }
        let mut run = Run {
            configuration,
            workload,
            guest_kib: u64::from(options.memory) << 10,
            parallel: options.parallel,
            settle_seconds: options.settle.as_secs_f64(),
            points,
            host_kib_per_guest: 0.0,
            line: None,
            extrapolation: Vec::new(),
            guests,
            cpu: self.watch_cpu(&idle, ksm.as_ref())?,
            ksm: ksm_figures,
        };
        for (number, idle) in (1..).zip(&mut idle) {
            idle.guest
                .check()
                .map_err(of_guest(configuration, workload, number))?;
        }
        run.conclude();
        eprintln!(
            "bench: {}: {:.1} MiB a guest",
            run.name(),
            run.host_kib_per_guest / 1024.0
        );
        Ok(run)
    }

    fn start(
        &self,
        configuration: Configuration,
        workload: Workload,
        number: usize,
        flags: Option<&Path>,
    ) -> Result<Guest, BenchError> {
        let kernel = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            self.kernel.as_raw_fd()
        );
        let mut command =
            configuration.command(self.options, Path::new(&kernel), workload, number, flags)?;
        Guest::start(&mut command)
    }

    /// Waits until a guest idles.
    fn wait_for_idle(
        &self,
        mut guest: Guest,
        configuration: Configuration,
        workload: Workload,
        number: usize,
    ) -> Result<IdleGuest, BenchError> {
        let checksum = workload.expected(number);
        let times = guest
            .wait_until_idle(&checksum, self.options.patience, &self.interrupt)
            .map_err(of_guest(configuration, workload, number))?;
        eprintln!(
            "bench: {configuration}, {workload}: guest {number} of {} idle after {:.1} s",
            self.options.guests,
            times.idle.as_secs_f64()
        );
        Ok(IdleGuest {
            guest,
            times,
            checksum,
        })
    }

    /// Waits the time of `--settle`, and then until the page merger of the host's kernel has merged all.
    fn settle(&self, ksm: Option<&Ksm>) -> Result<Option<KsmFigures>, BenchError> {
        self.interrupt.sleep(self.options.settle)?;
        ksm.map(|ksm| ksm.wait_until_merged(&self.interrupt))
            .transpose()
    }

    fn figures(&self, idle: &mut IdleGuest) -> Result<GuestFigures, BenchError> {
        idle.guest.check()?;
        let pid = idle.guest.pid();
        let memory = ProcessMemory::of(pid, self.options.memory)?;
        Ok(GuestFigures {
            init_seconds: idle.times.init.as_secs_f64(),
            uptime_at_init_seconds: idle.times.uptime,
            idle_seconds: idle.times.idle.as_secs_f64(),
            checksum: idle.checksum.clone(),
            private_kib: memory.whole.private,
            shared_kib: memory.whole.shared,
            pss_kib: memory.whole.proportional,
            ram_private_kib: memory.ram.private,
            ram_shared_kib: memory.ram.shared,
            ram_anonymous_kib: memory.ram.anonymous,
            ram_mappings: memory.ram_mappings,
            vmm_private_kib: memory.beside.private,
            vmm_shared_kib: memory.beside.shared,
            page_tables_kib: memory.page_tables,
            merger_cpu_seconds: procfs::of_merger(pid)?.as_secs_f64(),
        })
    }

    /// Measures the CPU time of idle guests, second by second.
    fn watch_cpu(&self, idle: &[IdleGuest], ksm: Option<&Ksm>) -> Result<Vec<Second>, BenchError> {
        let read = || -> Result<[Duration; 3], BenchError> {
            let mut sums = [Duration::ZERO; 3];
            for idle in idle {
                sums[0] += procfs::of_process(idle.guest.pid())?;
                sums[1] += procfs::of_merger(idle.guest.pid())?;
            }
            if let Some(ksm) = ksm {
                sums[2] = ksm.cpu_time()?;
            }
            Ok(sums)
        };
        let (started, mut before) = (Instant::now(), read()?);
        let mut seconds = Vec::new();
        while started.elapsed() < self.options.window {
            self.interrupt.sleep(Duration::from_secs(1))?;
            let now = read()?;
            let spent = |part: usize| now[part].saturating_sub(before[part]).as_secs_f64();
            seconds.push(Second {
                at: started.elapsed().as_secs_f64(),
                guests_cpu_seconds: spent(0),
                merger_cpu_seconds: spent(1),
                ksmd_cpu_seconds: spent(2),
            });
            before = now;
        }
        Ok(seconds)
    }

    fn explain(
        &self,
        configuration: Configuration,
        workload: Workload,
    ) -> Result<Explanation, BenchError> {
        let memory = self.options.memory;
        let disk = page_use::disk(memory)?;
        let flags = disk.as_ref().map(NamedTempFile::path);
        let guest = self.start(configuration, workload, 1, flags)?;
        let idle = self.wait_for_idle(guest, configuration, workload, 1)?;
        self.settle(None)?;
        let pid = idle.guest.pid();
        let (_, ram) = process::mappings(pid, memory)?;
        let entries = pagemap::pagemap(pid, &ram)?;
        let parts = self.parts()?;
        let flags = disk.map(|disk| page_use::flags(disk.as_file(), memory));
        let uses = match flags.transpose()?.flatten() {
            Some(flags) => {
                let ram = Ram::of(pid, ram)?;
                page_use::uses(&flags, &entries, &parts, |page| ram.is_zero(page))?
            }
            None => Vec::new(),
        };
        Ok(Explanation {
            configuration,
            workload,
            areas: explain::areas(&entries, &parts),
            uses,
        })
    }

    /// What was loaded into guest memory, and where.
    fn parts(&self) -> Result<Vec<Part>, BenchError> {
        let initrd = &self.options.inputs.initrd;
        let bytes = fs::metadata(initrd)
            .map_err(BenchError::io(format!("read {}", initrd.display())))?
            .len();
        let mut parts = kernel_map::parts(&self.kernel, &self.segments);
        parts.push(explain::initrd(u64::from(self.options.memory) << 20, bytes));
        Ok(parts)
    }
}

fn point(guests: usize) -> Result<Point, BenchError> {
    Ok(Point {
        guests,
        memory: HostMemory::read()?,
    })
}

/// Adds to an error which guest it is of. A signal is no guest's.
fn of_guest(
    configuration: Configuration,
    workload: Workload,
    guest: usize,
) -> impl FnOnce(BenchError) -> BenchError {
    move |error| match error {
        BenchError::Cancelled(signal) => BenchError::Cancelled(signal),
        error => BenchError::Guest {
            configuration,
            workload,
            guest,
            error: Box::new(error),
        },
    }
}
