//! The arguments of `coppice serve`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use rustix::process::geteuid;

use super::serve_jail::ServeJailArgument;
use super::serve_network::ServeNetworkArgument;
use super::values::with_sources;
use config::Mebibytes;
use control::logging::{LogFilter, LogFormat};
use daemon::serve::{
    Allowed, JailPolicy, Limits, NetworkPolicy, Options, ShareDomains, WebOptions, host_memory_kib,
};
use network::{Networks, SpecError};

/// The variable that names the socket.
pub const SOCKET_VARIABLE: &str = "COPPICE_SOCKET";

/// The arguments of `coppice serve`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub struct ServeArguments {
    /// Listen on this Unix socket [default: `$COPPICE_SOCKET`, or /run/coppice/coppice.sock for root, or
    /// `$XDG_RUNTIME_DIR/coppice.sock`].
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Mode of the socket, in octal [default: 600; 660 with --socket-group, 666 with --allow-uid].
    ///
    /// Whoever can open the socket is looked at all the same: root, the user of the daemon, and who is named here may
    /// call. Who may call can have guests read and write every file that the daemon can.
    #[arg(long, value_name = "MODE", value_parser = mode)]
    pub socket_mode: Option<u32>,
    /// Group of the socket, by name or number: its members may call.
    #[arg(long, value_name = "GROUP", value_parser = group)]
    pub socket_group: Option<u32>,
    /// A user, by number, who may call. Can be repeated.
    #[arg(long, value_name = "UID")]
    pub allow_uid: Vec<u32>,
    /// Where the state is: guests outlive the daemon, and the next one finds them there [default: /var/lib/coppice for
    /// root, else `$XDG_STATE_HOME/coppice` or ~/.local/state/coppice].
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Show a page with the guests on this TCP address, to anybody, for reading alone: 127.0.0.1:8080.
    ///
    /// It answers to localhost, to its own address, and to the names of --web-host, so that a page from elsewhere
    /// cannot read it in a browser (DNS rebinding).
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub web: Option<SocketAddr>,
    /// A further name or address by which the address of --web is called, such as that of a proxy. Can be repeated.
    #[arg(long, value_name = "NAME", requires = "web", value_parser = web_host)]
    pub web_host: Vec<String>,
    /// Serve all that only reads on the address of --web: the configurations and labels of guests, metrics, health.
    #[arg(long, requires = "web")]
    pub web_all: bool,
    /// How far the host's memory may be promised beyond what guests hold: see below.
    #[arg(long, value_name = "R", default_value = "1.5", value_parser = ratio)]
    pub memory_ratio: f64,
    /// Most guests.
    #[arg(long, value_name = "NUMBER")]
    pub max_vms: Option<usize>,
    /// Most guests that one user has made.
    #[arg(long, value_name = "NUMBER")]
    pub max_vms_per_user: Option<usize>,
    /// Most vCPUs of all guests that have a process.
    #[arg(long, value_name = "NUMBER")]
    pub max_vcpus: Option<u64>,
    /// Most RAM of all guests that have a process: 64G.
    #[arg(long, value_name = "SIZE")]
    pub max_memory: Option<Mebibytes>,
    /// How each guest is jailed, by options behind commas: uids=FIRST-LAST, cgroup=NAME, cpu=PERCENT, pids=N,
    /// allow=PATH, require=all; or off.
    ///
    /// As by `coppice run --jail`, with as many layers as the host allows. Each guest also is the first process of a
    /// namespace of processes, and, where the daemon is root's, a user of its own. Its disks, kernel and initrd have to
    /// be open to that user, as they are not made so: `guest_uid` of GET /vms/ID tells which it is, and so does the
    /// refusal of a guest that cannot open one. Options:
    /// uids: the users, by number, of which each guest gets one, and the group of that number [default:
    /// 1900000000-1900065535 for root];
    /// cgroup: the control group (v2), below the root of the hierarchy, in which each guest has one of its own that is
    /// made, limited to the guest's RAM and a margin, and removed by the daemon;
    /// cpu, pids: further limits of each: percent of a core; processes and threads;
    /// allow: a file or folder that all guests may open, and write to as far as their users may, for what the REST API
    /// names later. Can be repeated;
    /// require=all: a guest that lacks a layer does not start.
    #[arg(
        long,
        value_name = "off|OPTION[,OPTION...]",
        num_args = 0..=1,
        default_missing_value = "",
        verbatim_doc_comment
    )]
    pub jail: Option<ServeJailArgument>,
    /// A network for guests: its name, its range of IPv4 addresses, and options behind commas: v6=PREFIX, isolated,
    /// peers=allow, host=allow, metadata=allow, allow=DESTINATION, dns=ADDRESS, mtu=BYTES. Can be repeated.
    ///
    /// A guest is in it by `--net network=NAME` of `coppice vm create`, and gets an address, a MAC and a tap from the
    /// daemon. Guests reach other hosts under the address of this one (NAT), and neither each other, nor this host, nor
    /// the addresses at which a cloud tells of it. This takes root or `CAP_NET_ADMIN`, nft (package nftables), and
    /// /dev/net/tun. Options:
    /// v6: the prefix of IPv6 addresses, of which each guest has a /64: a /48 for a range of /16;
    /// isolated: no packet leaves this host, but answers by a published port;
    /// peers, host, metadata: guests reach each other; the addresses of this host; those at which a cloud tells of it;
    /// allow: the only destinations outside: a range or a domain name, and a port or ports behind a colon
    /// (`192.0.2.0/24:443`, `crates.io:443`, `[2001:db8::]/32:8000-8999`). Can be repeated;
    /// dns: a server of names that guests are told and may ask [default: those of this host]. Can be repeated;
    /// mtu: the longest packet [default: 1500].
    #[arg(
        long,
        value_name = "NAME=RANGE[,OPTION...]",
        verbatim_doc_comment,
        value_parser = with_sources::<ServeNetworkArgument>
    )]
    pub network: Vec<ServeNetworkArgument>,
    /// Take all of the networks away when the daemon ends: rules, routes, addresses, and the taps of guests that run on
    /// [default: they stay, as guests do].
    ///
    /// A daemon of the same state folder that is started without --network takes them away at its start.
    #[arg(long, requires = "network")]
    pub remove_networks: bool,
    /// Which guests share pages with each other, where their configuration names no domain: those of one owner, or all.
    ///
    /// The owner is the user who made the guest, or the one whom its label `owner` names. Guests that share can learn
    /// by timing which pages others use.
    #[arg(long, value_name = "WHICH", value_enum, default_value_t)]
    pub share_domains: ShareDomains,
    /// Stop all guests when the daemon ends, and give them so many seconds to shut down [default: they go on].
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "10")]
    pub stop_guests: Option<u64>,
    /// Execute the program for each guest, so that addresses differ from one guest's process to the next: they are
    /// copies of one process otherwise, share what the program has put right in its memory when it was loaded, and
    /// begin sooner.
    #[arg(long)]
    pub own_layout: bool,
    /// What to log: off, error, warn, info, debug or trace, also by module [default: info].
    #[arg(
        long,
        value_name = "LEVEL|FILTER",
        default_value = "info",
        hide_default_value = true
    )]
    pub log: LogFilter,
    /// How log lines look.
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,
}

fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        Ok(_) | Err(_) => Err("not an octal mode, such as 660".to_owned()),
    }
}

/// A name or an address, as requests are compared with it.
fn web_host(text: &str) -> Result<String, String> {
    let host = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(address.to_string());
    }
    let is_name = |label: &str| {
        (1..64).contains(&label.len())
            && label
                .bytes()
                .all(|c| c == b'-' || c == b'_' || c.is_ascii_alphanumeric())
    };
    if host.len() < 254 && host.split('.').all(is_name) {
        return Ok(host);
    }
    Err("not a name or an address, without a port".to_owned())
}

fn ratio(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(ratio) if (1.0..=1000.0).contains(&ratio) => Ok(ratio),
        Ok(_) | Err(_) => Err("not a number from 1 to 1000".to_owned()),
    }
}

/// Parses a group: its number, or its name in /etc/group.
fn group(text: &str) -> Result<u32, String> {
    if let Ok(gid) = text.parse() {
        return Ok(gid);
    }
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let mut lines = groups.lines().map(|line| line.split(':'));
    lines
        .find_map(|mut words| {
            let name = words.next()?;
            let gid = words.nth(1)?.parse().ok()?;
            (name == text).then_some(gid)
        })
        .ok_or_else(|| "no group of that name in /etc/group".to_owned())
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

fn default_state() -> PathBuf {
    if geteuid().is_root() {
        return "/var/lib/coppice".into();
    }
    let home = || variable("HOME").unwrap_or_default().join(".local/state");
    variable("XDG_STATE_HOME")
        .unwrap_or_else(home)
        .join("coppice")
}

/// The default socket.
pub fn default_socket() -> PathBuf {
    if let Some(path) = variable(SOCKET_VARIABLE) {
        return path;
    }
    if geteuid().is_root() {
        return "/run/coppice/coppice.sock".into();
    }
    match variable("XDG_RUNTIME_DIR") {
        Some(folder) => folder.join("coppice.sock"),
        None => default_state().join("coppice.sock"),
    }
}

/// Why the arguments of `coppice serve` stand for no options.
#[derive(Debug, thiserror::Error)]
pub enum ServeOptionsError {
    /// The networks cannot be together.
    #[error("--network")]
    Networks(#[from] SpecError),
    /// The host does not report how much memory it has.
    #[error("the memory of the host")]
    Memory(#[from] std::io::Error),
}

impl ServeArguments {
    /// The options that the arguments stand for.
    ///
    /// # Errors
    /// [`ServeOptionsError`].
    pub fn into_options(self) -> Result<Options, ServeOptionsError> {
        let networks = self.network.into_iter().map(Into::into).collect();
        let default_mode = match (self.allow_uid.as_slice(), self.socket_group) {
            ([_, ..], _) => 0o666,
            ([], Some(_)) => 0o660,
            ([], None) => 0o600,
        };
        Ok(Options {
            socket: self.socket.unwrap_or_else(default_socket),
            socket_mode: self.socket_mode.unwrap_or(default_mode),
            allowed: Allowed {
                uids: self.allow_uid,
                gid: self.socket_group,
            },
            state: self.state.unwrap_or_else(default_state),
            web: self.web.map(|address| WebOptions {
                address,
                hosts: self.web_host,
                all: self.web_all,
            }),
            limits: Limits {
                ratio: self.memory_ratio,
                vms: self.max_vms,
                vms_per_user: self.max_vms_per_user,
                vcpus: self.max_vcpus,
                memory_mib: self.max_memory.map(|size| u64::from(size.0)),
                host_kib: host_memory_kib()?,
            },
            jail: self
                .jail
                .map_or_else(|| Some(JailPolicy::default()), Into::into),
            networks: NetworkPolicy {
                networks: Networks::new(networks)?,
                remove: self.remove_networks,
            },
            stop_guests: self.stop_guests.map(Duration::from_secs),
            share_domains: self.share_domains,
            own_layout: self.own_layout,
        })
    }
}
