//! The arguments of `coppice run`, and the options that follow from them together with a configuration file, or with
//! the launch specification of the host daemon.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use clap::Args;
use memshare::ShareMode;

use super::balloon::BalloonArgument;
use super::disk::DiskArgument;
use super::jail::JailArgument;
use super::net::NetArgument;
use super::pmem::PmemArgument;
use super::rate::{RATE, parse_rate};
use super::restore::RestoreArgument;
use super::run_options::RunOptions;
use super::usage_error::UsageError;
use super::values::{guest_id, utf8_path, with_sources};
use super::vsock::VsockArgument;
use config::{
    BootSourceConfig, HugePageConfig, Mebibytes, MetricsConfig, TokenBucketConfig, VmConfig,
};
use control::PayloadLimits;
use control::launch_spec::{CONFIG, LaunchSpec, Purpose};
use control::logging::{LogFilter, LogFormat};
use jail::{Confinement, SeccompMode};

/// Sets what is given of the serial console.
fn set_serial(config: &mut VmConfig, path: Option<PathBuf>, rate: Option<u64>) {
    if path.is_none() && rate.is_none() {
        return;
    }
    let serial = config.serial.get_or_insert_default();
    if path.is_some() {
        serial.serial_out_path = path;
    }
    if let Some(rate) = rate {
        serial.rate_limiter = Some(TokenBucketConfig::per_second(rate));
    }
}

fn serial_rate(text: &str) -> Result<u64, String> {
    parse_rate(text).ok_or_else(|| format!("not {RATE}"))
}

/// The arguments of `coppice run`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "flags of a command line are independent"
)]
pub struct RunArguments {
    /// The kernel: an ELF vmlinux, or a bzImage.
    #[arg(long, value_name = "FILE", value_parser = utf8_path)]
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk.
    #[arg(long, value_name = "FILE", value_parser = utf8_path)]
    pub initrd: Option<PathBuf>,
    /// The kernel command line [default: console=ttyS0 reboot=k panic=-1].
    ///
    /// Only root= (with ro or rw) is added to it, where a disk is marked as root, and what a balloon with reporting
    /// needs (see --balloon).
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// A disk: a file, and options behind commas: ro, root, format=vhdx|raw, serial=S, id=ID, queues=N, parents=DIR,
    /// keep-space, share=off|read, rate=SIZE, ops=N. Can be repeated.
    ///
    /// The guest finds the disks as vda, vdb and so on in this order, after those of the configuration file. Options:
    /// ro: the guest cannot write, and the file can be shared;
    /// root: the guest mounts this disk as its root (it becomes vda, and root= is added to the command line);
    /// format: found by its signature if not given, but give format=raw for a raw disk that the guest may write;
    /// serial: up to 20 characters, the ID if not given; id: the name in the REST API, disk0 and so on if not given;
    /// queues: request queues, 1 to 32, 1 if not given;
    /// parents: the folder that the parents of a differencing disk have to lie in, or below; anywhere if not given;
    /// keep-space: what the guest trims stays with the file, for its next blocks, rather than go back to the host.
    /// share: whether its pages are shared with other guests, as --share says if not given;
    /// rate: bytes that are read and written in a second, at most: 100M;
    /// ops: requests in a second, at most. What comes beyond these limits waits.
    /// A comma in a file name is written twice.
    #[arg(long, value_name = "FILE[,OPTION...]", verbatim_doc_comment)]
    pub disk: Vec<DiskArgument>,
    /// A balloon: memory that the guest gives back, and options behind commas: deflate-on-oom, stats=SECONDS, hinting,
    /// reporting.
    ///
    /// The amount, with a binary suffix, is what the guest is to do without: 64M; 0 if not given. Without any value,
    /// there is a balloon of 0 for the REST API. It takes the place of the one in the configuration file. Options:
    /// deflate-on-oom: the guest takes memory out of the balloon rather than run out of it;
    /// stats=SECONDS: the guest says every so often how its memory is used;
    /// hinting: the guest gives back its free memory when the REST API says so;
    /// reporting: the guest gives back its free memory all the time. Linux would report only free blocks of 2 MiB and
    /// more, so `page_reporting.page_reporting_order=0` is added to the kernel command line, unless that says
    /// `page_reporting_order`. Linux before 6.2 forgets it; write 0 to
    /// `/sys/module/page_reporting/parameters/page_reporting_order` there.
    #[arg(
        long,
        value_name = "[AMOUNT][,OPTION...]",
        num_args = 0..=1,
        default_missing_value = "",
        verbatim_doc_comment
    )]
    pub balloon: Option<BalloonArgument>,
    /// A network interface (virtio-net): tap=NAME or fd=N, and options behind commas: id=ID, mac=MAC, mtu=BYTES,
    /// rate=SIZE, ops=N, queues=N, ip=ADDRESS/LENGTH, gw=ADDRESS, dns=ADDRESS, host=NAME. Can be repeated.
    ///
    /// tap: a tap of the host, which `ip tuntap add dev NAME mode tap` makes, or a macvtap;
    /// fd: a tap that this process was started with, by its descriptor; one for each pair of queues, with : between;
    /// mac: the address of the guest's interface [default: made of the names of the tap and of the interface];
    /// mtu: the MTU that the guest is given;
    /// rate, ops: most bytes and frames a second, each way;
    /// queues: pairs of queues, for guests of several vCPUs, of a tap made with `multi_queue` [default: 1];
    /// ip, gw, dns, host: what a DHCP client of the guest is given: its address with the length of its network's
    /// prefix, its router, its servers of names (up to 3), its name. With an IPv6 network of 64 bits, ip can be given
    /// once more: the guest takes its addresses of it. Its own process answers the guest, and nothing of that goes to
    /// the tap. Without ip, the network has to answer;
    /// network, publish: for a guest of the daemon (`coppice vm create`), instead of a tap: the network of the daemon
    /// that it is in, which gives it its addresses; a port of the host that leads to one of the guest, as
    /// IP:PORT:GUEST-PORT/udp, of which IP: and /udp can be left out. Can be repeated.
    #[arg(long, value_name = "tap=NAME|fd=N|network=NAME[,OPTION...]", verbatim_doc_comment, value_parser = with_sources::<NetArgument>)]
    pub net: Vec<NetArgument>,
    /// A socket device (virtio-vsock): the guest's context identifier, 3 if not given, and path=SOCKET behind a comma.
    ///
    /// Programs of the host connect to the socket (mode 0600), say `CONNECT PORT`, and are answered `OK`; port N of the
    /// host, for the guest, is what listens at `SOCKET_N`. At port 80 the guest finds its metadata (`PUT /mmds`). The
    /// device takes the place of the one in the configuration file. A guest of the daemon has its socket in its folder:
    /// there, no path is given, and the identifier is made up.
    #[arg(
        long,
        value_name = "[CID][,path=SOCKET]",
        num_args = 0..=1,
        default_missing_value = "",
        verbatim_doc_comment
    )]
    pub vsock: Option<VsockArgument>,
    /// The guest's metadata, which it reads over vsock: a file with an object of JSON, as `PUT /mmds` takes it.
    #[arg(long, value_name = "FILE", value_parser = utf8_path)]
    pub metadata: Option<PathBuf>,
    /// A disk as memory (virtio-pmem): a file, and options behind commas: ro, cow, rw, root, id=ID, format=vhdx|raw,
    /// parents=DIR, rate=SIZE, ops=N. Can be repeated.
    ///
    /// The guest finds them as pmem0, pmem1 and so on in this order, after those of the configuration file, and mounts
    /// them with -o dax. Options:
    /// ro: what the guest writes is dropped, and the file can be shared (the default);
    /// cow: what the guest writes is its own, and forgotten at its end; the file can be shared;
    /// rw: what the guest has flushed is on the disk;
    /// root: the guest mounts this one as its root (it becomes pmem0, and root= with rootflags=dax is added to the
    /// command line);
    /// id, format, parents: as for --disk; the ID is pmem0 and so on if not given;
    /// rate, ops: bytes that flushes write in a second, and flushes in a second, at most.
    #[arg(long, value_name = "FILE[,OPTION...]", verbatim_doc_comment)]
    pub pmem: Vec<PmemArgument>,
    /// RAM of the guest, with a binary suffix: 128M, 1G [default: 128M].
    #[arg(long, value_name = "SIZE")]
    pub mem: Option<Mebibytes>,
    /// vCPUs of the guest, 1 to 32 [default: 1].
    #[arg(long, value_name = "NUMBER")]
    pub cpus: Option<u8>,
    /// Which pages of files the guest shares with other guests: off, boot, read or all [default: all].
    ///
    /// boot: the kernel and the initrd; read: also what the guest reads from disks that do not change (read-only disks,
    /// and the parents of differencing disks); all: also what the kernel makes of memory while it boots, what the guest
    /// unpacks of its initrd, and what it frees goes back to the host.
    #[arg(long, value_name = "MODE")]
    pub share: Option<ShareMode>,
    /// Share with guests of the domain NAME alone: letters, digits and underscores [default: with guests without a
    /// domain].
    ///
    /// The kernel and the initrd are kept for each domain. The pages of a disk are shared by the domain that has it
    /// first, and copied for guests of any other, which the log reports.
    #[arg(long, value_name = "NAME")]
    pub share_domain: Option<String>,
    /// Most of a core that finding shared pages may take in the long run, in percent [default: 5].
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub share_cpu: Option<u8>,
    /// Put reads of at least so many KiB in one piece in place without a copy, instead of merging them later.
    #[arg(long, value_name = "KIB")]
    pub share_place: Option<u32>,
    /// Have Linux do without its trace file system: 8 MiB less for each guest, with kernels before 6.6
    /// [default: with `--share all`, unless the command line sets up tracing].
    ///
    /// `initcall_blacklist=event_trace_init,tracer_init_tracefs` is added to the kernel command line, unless that has
    /// an `initcall_blacklist`.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub lean: Option<bool>,
    /// Let the host back guest RAM with transparent huge pages: faster, and more memory for each guest [default: 4 KiB
    /// pages].
    #[arg(long)]
    pub huge_pages: bool,
    /// Go on from a snapshot: its state file, and options behind commas: memory=FILE, uffd=SOCKET, below=FILE,
    /// disk.ID=FILE, clone.ID=FILE, tap.ID=NAME, vsock=SOCKET, cid=N, clock=kept, trust, paused.
    ///
    /// The guest is as it was saved, with its configuration, and only --log, --serial, --metrics and the sockets are
    /// given beside it. Options:
    /// memory: the memory file, where it is not where it was written;
    /// uffd: have a page-fault handler that listens on this socket give the memory, as Firecracker's do, instead of
    /// mapping the file;
    /// below: a memory file that this one is a difference to, where it is not where it was; given for each of them, the
    /// lowest first;
    /// disk.ID: the disk of that drive or pmem device, where it is not where it was;
    /// clone.ID: make this file, a child of that disk, which nobody may write to any more: so one snapshot becomes many
    /// guests;
    /// tap.ID: the tap of that network interface, where it is to be another: a name, or fd:N for a descriptor;
    /// vsock: the socket of the vsock device, where it is to be another;
    /// cid: the guest's context identifier, where it is to be another: the guest asks for it again;
    /// clock=kept: the guest's clocks go on where they were saved, and not as if it had run since;
    /// trust: do not compare the checksums of all memory before the guest runs;
    /// paused: the guest waits for `PATCH /vm`.
    /// With --jail, the state is read in the jail: of the files that it names, the guest has those that are named here,
    /// too, and those below allow=.
    #[arg(long, value_name = "STATE[,OPTION...]", verbatim_doc_comment, conflicts_with_all = ["kernel", "initrd", "cmdline", "disk", "pmem", "mem", "cpus", "balloon", "net", "vsock", "config"])]
    pub restore: Option<RestoreArgument>,
    /// Listen for REST requests (Firecracker's API) on this Unix socket.
    ///
    /// The socket is for this user alone (mode 0600). Without a kernel, the guest waits to be configured and started
    /// there.
    #[arg(long, value_name = "PATH", value_parser = utf8_path)]
    pub api_sock: Option<PathBuf>,
    /// The name of the guest, as GET / returns it: 1 to 63 lower case letters, digits and dashes [default:
    /// anonymous-instance].
    #[arg(long, visible_alias = "name", value_name = "ID", value_parser = guest_id)]
    pub id: Option<String>,
    /// Serve the guest's serial console on this Unix socket, to any number of clients.
    ///
    /// A client is shown the last 32 KiB, and then what comes; what it writes goes to the guest. One that reads too
    /// slowly loses output. The socket is for this user alone (mode 0600). Nothing is shown on standard output then; a
    /// file (--serial) gets its copy.
    #[arg(long, value_name = "PATH", value_parser = utf8_path)]
    pub console_sock: Option<PathBuf>,
    /// At the end, write why the guest ended to this file, as JSON: kind, text, code.
    #[arg(long, value_name = "FILE", value_parser = utf8_path)]
    pub end_file: Option<PathBuf>,
    /// Do not start the guest before the REST API says so (`InstanceStart`), even where it has a kernel.
    #[arg(long)]
    pub no_start: bool,
    /// Start a session, and wait for a line of JSON on standard input, the launch specification. End if there is none.
    ///
    /// Whoever starts the process records its number before it writes that line, so that a process without a record has
    /// ended.
    #[arg(long, hide = true, requires = "api_sock", conflicts_with_all = ["kernel", "initrd", "cmdline", "disk", "pmem", "mem", "cpus", "balloon", "net", "vsock", "metadata", "config", "restore", "no_start", "jail"])]
    pub held: bool,
    /// Read the guest's configuration from a file (Firecracker's JSON).
    ///
    /// --mem, --cpus, --balloon, --vsock, --log, --serial and --metrics win over the file, and --disk, --pmem and --net
    /// add to its devices. Where --kernel, --initrd or --cmdline and the file both say the same thing, that is an
    /// error.
    #[arg(long, value_name = "FILE", value_parser = utf8_path)]
    pub config: Option<PathBuf>,
    /// What to log: off, error, warn, info, debug or trace, also by module [default: warn].
    ///
    /// By module, separated by commas: `warn,control::api=debug`.
    #[arg(long, value_name = "LEVEL|FILTER")]
    pub log: Option<LogFilter>,
    /// How log lines look.
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Append a line of JSON with all counters to this file at the end, and when the REST API says so.
    #[arg(long, value_name = "FILE", value_parser = utf8_path)]
    pub metrics: Option<PathBuf>,
    /// Append the output of the guest's serial console to this file, instead of showing it.
    #[arg(long, value_name = "FILE", value_parser = utf8_path)]
    pub serial: Option<PathBuf>,
    /// Drop output of the guest's serial console beyond so many bytes a second: 64K.
    #[arg(long, value_name = "SIZE", value_parser = serial_rate)]
    pub serial_rate: Option<u64>,
    /// Run the guest in a jail, with options behind commas: uid=N, gid=N, cgroup=NAME, memory=SIZE, cpu=PERCENT,
    /// pids=N, io=WEIGHT, allow=PATH, require=all.
    ///
    /// The process keeps the rights that its guest needs and gives up the rest: it has namespaces and a root folder of
    /// its own, no capabilities, and Landlock limits it to its files. Without privileges there are fewer layers; the
    /// log (--log info) and GET /vm/jail list them. Options:
    /// uid, gid: the user and group that the process becomes, by number; the guest's files have to be theirs;
    /// cgroup: the control group (v2) that the process joins, below the root of the hierarchy; it is made if it is not
    /// there;
    /// memory, cpu, pids, io: limits of that group: a size; percent of a core; processes and threads; weight of its
    /// I/O, 1 to 10000;
    /// allow: a file or folder that the process may go on opening and writing to, for disks and snapshots that the REST
    /// API names later. Can be repeated;
    /// require=all: a layer that cannot be entered is an error.
    #[arg(
        long,
        value_name = "OPTION[,OPTION...]",
        num_args = 0..=1,
        default_missing_value = "",
        value_parser = with_sources::<JailArgument>,
        verbatim_doc_comment
    )]
    pub jail: Option<JailArgument>,
    /// What happens at a system call that a guest process does not need.
    ///
    /// kill: it ends the process, and the log names it; log: the kernel's log names it, and it is done; off: it is
    /// done.
    #[arg(long, value_name = "MODE", value_enum, default_value_t = SeccompMode::Kill)]
    pub seccomp: SeccompMode,
}

impl RunArguments {
    fn confinement(&self) -> Confinement {
        Confinement {
            jail: self.jail.clone().map(Into::into),
            seccomp: self.seccomp,
        }
    }

    /// Joins the arguments with the configuration file, and checks the result.
    ///
    /// # Errors
    /// [`UsageError`].
    pub fn into_options(mut self) -> Result<RunOptions, UsageError> {
        let options = RunOptions {
            config: VmConfig::default(),
            id: self.id.take(),
            api_socket: self.api_sock.take(),
            console_socket: self.console_sock.take(),
            end_file: self.end_file.take(),
            no_start: self.no_start,
            only_configure: false,
            held: false,
            restore: self.restore.take().map(|RestoreArgument(load)| load),
            metadata: self.metadata.take(),
            limits: PayloadLimits::default(),
            taps: Vec::new(),
            confinement: self.confinement(),
            jailed: VmConfig::default(),
        };
        let config = self.into_config()?;
        let has_origin = config.boot_source.is_some() || options.restore.is_some();
        if !has_origin && options.api_socket.is_none() {
            return Err(UsageError::NothingToRun);
        }
        Ok(RunOptions {
            jailed: config.clone(),
            config,
            ..options
        })
    }

    /// Joins the arguments of a process that the host daemon has started with the daemon's launch specification, and
    /// the taps that came with it, and checks the result.
    ///
    /// # Errors
    /// [`UsageError`].
    pub fn into_launched(
        mut self,
        spec: LaunchSpec,
        taps: Vec<OwnedFd>,
    ) -> Result<RunOptions, UsageError> {
        if taps.len() != spec.taps.len() {
            return Err(UsageError::Taps {
                named: spec.taps.len(),
                given: taps.len(),
            });
        }
        let (only_configure, restore) = match spec.purpose {
            Purpose::Configure => (true, None),
            Purpose::Boot => (false, None),
            Purpose::Restore(load) => (false, Some(*load)),
        };
        let known = if restore.is_some() {
            Some(VmConfig::from_file(Path::new(CONFIG))?)
        } else {
            self.config = Some(CONFIG.into());
            None
        };
        let options = RunOptions {
            id: self.id.take(),
            api_socket: self.api_sock.take(),
            console_socket: self.console_sock.take(),
            end_file: self.end_file.take(),
            no_start: false,
            only_configure,
            held: true,
            restore,
            metadata: spec.metadata,
            limits: PayloadLimits::default(),
            taps: spec.taps.into_iter().zip(taps).collect(),
            confinement: Confinement {
                jail: spec.jail,
                seccomp: self.seccomp,
            },
            jailed: VmConfig::default(),
            config: VmConfig::default(),
        };
        let config = self.into_config()?;
        Ok(RunOptions {
            jailed: known.unwrap_or_else(|| config.clone()),
            config,
            ..options
        })
    }

    /// The configuration of the guest, from the arguments and the configuration file.
    ///
    /// # Errors
    /// [`UsageError`].
    pub fn into_config(self) -> Result<VmConfig, UsageError> {
        let mut config = match &self.config {
            Some(path) => VmConfig::from_file(path)?,
            None => VmConfig::default(),
        };
        let file = self.config.unwrap_or_default();
        let conflict = |flag, field| UsageError::Conflict {
            flag,
            field,
            file: file.clone(),
        };
        match (self.kernel, &mut config.boot_source) {
            (Some(_), Some(_)) => return Err(conflict("--kernel", "boot-source")),
            (Some(kernel), none) => {
                *none = Some(BootSourceConfig {
                    kernel_image_path: kernel,
                    ..BootSourceConfig::default()
                });
            }
            (None, _) => {}
        }
        if let Some(initrd) = self.initrd {
            let source = config
                .boot_source
                .as_mut()
                .ok_or(UsageError::NeedsKernel("--initrd"))?;
            if source.initrd_path.replace(initrd).is_some() {
                return Err(conflict("--initrd", "boot-source.initrd_path"));
            }
        }
        if let Some(cmdline) = self.cmdline {
            let source = config
                .boot_source
                .as_mut()
                .ok_or(UsageError::NeedsKernel("--cmdline"))?;
            if source.boot_args.replace(cmdline).is_some() {
                return Err(conflict("--cmdline", "boot-source.boot_args"));
            }
        }
        if let Some(lean) = self.lean {
            let source = config
                .boot_source
                .as_mut()
                .ok_or(UsageError::NeedsKernel("--lean"))?;
            source.lean = Some(lean);
        }
        for disk in self.disk {
            let drive =
                disk.into_drive(|id| config.drives.iter().any(|drive| drive.drive_id == id));
            config.drives.push(drive);
        }
        if let Some(BalloonArgument(balloon)) = self.balloon {
            config.balloon = Some(balloon);
        }
        if let Some(VsockArgument(vsock)) = self.vsock {
            config.vsock = Some(vsock);
        }
        for net in self.net {
            let interfaces = &config.network_interfaces;
            let is_taken = |id: &str| interfaces.iter().any(|interface| interface.iface_id == id);
            let interface = net.into_interface(is_taken);
            config.network_interfaces.push(interface);
        }
        for pmem in self.pmem {
            let pmem = pmem.into_pmem(|id| config.pmem.iter().any(|pmem| pmem.id == id));
            config.pmem.push(pmem);
        }
        if let Some(Mebibytes(size)) = self.mem {
            config.machine_config.mem_size_mib = size;
        }
        if let Some(mode) = self.share {
            config.sharing.mode = mode;
        }
        if self.share_domain.is_some() {
            config.sharing.domain = self.share_domain;
        }
        if let Some(percent) = self.share_cpu {
            config.sharing.cpu_percent = percent;
        }
        if self.share_place.is_some() {
            config.sharing.place_kib = self.share_place;
        }
        if self.huge_pages {
            config.machine_config.huge_pages = HugePageConfig::Transparent;
        }
        if let Some(cpus) = self.cpus {
            config.machine_config.vcpu_count = cpus;
        }
        if let (Some(_), Some(logger)) = (self.log, &mut config.logger) {
            (logger.level, logger.module) = (None, None);
        }
        if let Some(metrics_path) = self.metrics {
            config.metrics = Some(MetricsConfig { metrics_path });
        }
        set_serial(&mut config, self.serial, self.serial_rate);
        config.validate()?;
        Ok(config)
    }
}
