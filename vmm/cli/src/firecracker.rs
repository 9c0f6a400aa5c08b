//! The arguments of `firecracker`, for which `coppice` is taken where it is called by that name.

use std::path::PathBuf;

use clap::Parser;
use serde_json::Value;

use super::run_options::RunOptions;
use super::usage_error::UsageError;
use super::values::utf8_path;
use config::limits::MAX_BODY;
use config::{ConfigError, LogLevel, LoggerConfig, MetricsConfig, VmConfig};
use control::PayloadLimits;
use host::exit;
use jail::{Confinement, SeccompMode};

/// The version of Firecracker whose command line and API these are. Clients read it off `--version`.
const VERSION: &str = "v1.17.0";
/// Longest name of a guest, in bytes.
const MAX_ID: usize = 64;

/// Firecracker's exit code for a configuration that is wrong (`FcExitCode::BadConfiguration`).
const BAD_CONFIGURATION: u8 = 152;
/// Firecracker's exit code for arguments that are wrong (`FcExitCode::ArgParsing`).
pub const BAD_ARGUMENTS: u8 = 153;

/// Coppice, called by the name firecracker: one guest, with Firecracker's options.
#[derive(Debug, Parser)]
#[command(name = "firecracker", display_name = "Firecracker", version = VERSION)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "flags of a command line are independent"
)]
pub struct FirecrackerArguments {
    /// Listen for REST requests on this Unix socket. Not used with --no-api.
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket", value_parser = utf8_path)]
    pub api_sock: PathBuf,
    /// The name of the guest: 1 to 64 letters, digits and dashes.
    #[arg(long, value_name = "ID", default_value = "anonymous-instance", value_parser = instance_id)]
    pub id: String,
    /// Refused: the filter of system calls is part of the program. Leave it out, or say --no-seccomp.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "no_seccomp",
        value_parser = utf8_path
    )]
    pub seccomp_filter: Option<PathBuf>,
    /// Run the guest without a filter of system calls.
    #[arg(long)]
    pub no_seccomp: bool,
    /// When the process was started, by whoever did. Not used: no metric of Coppice tells it.
    #[arg(long, value_name = "MICROSECONDS")]
    pub start_time_us: Option<u64>,
    /// The same in CPU time. Not used.
    #[arg(long, value_name = "MICROSECONDS")]
    pub start_time_cpu_us: Option<u64>,
    /// CPU time of whoever started the process. Not used.
    #[arg(long, value_name = "MICROSECONDS")]
    pub parent_cpu_time_us: Option<u64>,
    /// Read the guest's configuration from this file, and start it.
    #[arg(long, value_name = "FILE", value_parser = utf8_path)]
    pub config_file: Option<PathBuf>,
    /// The guest's metadata (MMDS): a file with an object of JSON.
    #[arg(long, value_name = "FILE", value_parser = utf8_path)]
    pub metadata: Option<PathBuf>,
    /// Have no REST socket.
    #[arg(long, requires = "config_file")]
    pub no_api: bool,
    /// Log to this file or named pipe, and not to standard error.
    #[arg(long, value_name = "PATH", value_parser = utf8_path)]
    pub log_path: Option<PathBuf>,
    /// The least severe level that is logged: Off, Error, Warn, Info, Debug or Trace [default: Info].
    #[arg(long, value_name = "LEVEL")]
    pub level: Option<String>,
    /// Log only messages of this module of Coppice, and those below it.
    #[arg(long, value_name = "MODULE")]
    pub module: Option<String>,
    /// Lines of the log name their level.
    #[arg(long)]
    pub show_level: bool,
    /// Lines of the log name file and line of the code.
    #[arg(long)]
    pub show_log_origin: bool,
    /// Append a line of JSON with all counters to this file or named pipe at the end, and at `FlushMetrics`.
    #[arg(long, value_name = "PATH", value_parser = utf8_path)]
    pub metrics_path: Option<PathBuf>,
    /// Have a boot timer. There is one in any case, at port 0x3f0; metrics tell the time.
    #[arg(long)]
    pub boot_timer: bool,
    /// Print the version of the format of snapshots, which is Coppice's own.
    #[arg(long)]
    pub snapshot_version: bool,
    /// Print the version of a snapshot's state file.
    #[arg(long, value_name = "FILE", value_parser = utf8_path)]
    pub describe_snapshot: Option<PathBuf>,
    /// The longest body of a REST request, in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = MAX_BODY)]
    pub http_api_max_payload_size: usize,
    /// The most metadata (MMDS), in bytes [default: that of --http-api-max-payload-size].
    #[arg(long, value_name = "BYTES")]
    pub mmds_size_limit: Option<usize>,
    /// Refused: Coppice has no PCI. Its devices are on virtio-mmio, Firecracker's default.
    #[arg(long)]
    pub enable_pci: bool,
}

/// What `firecracker` is asked for.
#[derive(Debug)]
pub enum FirecrackerRequest {
    /// The version of the format of snapshots.
    SnapshotVersion,
    /// The version of the state of a snapshot.
    DescribeSnapshot(PathBuf),
    /// A guest.
    Run {
        /// The guest.
        options: Box<RunOptions>,
        /// The log, until the configuration file or a request says something else.
        logger: LoggerConfig,
    },
}

/// Why the arguments of `firecracker` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FirecrackerError {
    /// The level of the log.
    #[error("--level")]
    Level(#[source] serde_json::Error),
    /// The log.
    #[error("--log-path, --module")]
    Logger(#[source] ConfigError),
    /// A filter that was made for Firecracker's threads and system calls.
    #[error(
        "--seccomp-filter: the filter is part of Coppice, and no other is taken: leave it out, or give --no-seccomp"
    )]
    SeccompFilter,
    /// The devices are on no bus.
    #[error(
        "--enable-pci: Coppice has no PCI: leave it out, and the guest finds its devices by ACPI"
    )]
    Pci,
    /// The configuration file.
    #[error(transparent)]
    Usage(#[from] UsageError),
    /// A configuration file is to start a guest.
    #[error("--config-file {}: boot-source is missing, so there is nothing to start", .0.display())]
    NoBootSource(PathBuf),
}

impl FirecrackerError {
    /// Firecracker's exit code for it.
    pub fn code(&self) -> u8 {
        match self {
            Self::Level(_) => BAD_CONFIGURATION,
            Self::SeccompFilter | Self::Pci => BAD_ARGUMENTS,
            Self::Logger(_) | Self::Usage(_) | Self::NoBootSource(_) => exit::FAILURE,
        }
    }
}

fn instance_id(text: &str) -> Result<String, String> {
    let is_word = |c: char| c == '-' || c.is_alphanumeric();
    if (1..=MAX_ID).contains(&text.len()) && text.chars().all(is_word) {
        Ok(text.to_owned())
    } else {
        Err(format!("not 1 to {MAX_ID} letters, digits and dashes"))
    }
}

impl FirecrackerArguments {
    /// What is asked for.
    ///
    /// # Errors
    /// [`FirecrackerError`].
    pub fn into_request(self) -> Result<FirecrackerRequest, FirecrackerError> {
        if self.snapshot_version {
            return Ok(FirecrackerRequest::SnapshotVersion);
        }
        if let Some(path) = self.describe_snapshot {
            return Ok(FirecrackerRequest::DescribeSnapshot(path));
        }
        if self.seccomp_filter.is_some() {
            return Err(FirecrackerError::SeccompFilter);
        }
        if self.enable_pci {
            return Err(FirecrackerError::Pci);
        }
        let logger = self.logger()?;
        let config = self.config()?;
        let body = self.http_api_max_payload_size;
        Ok(FirecrackerRequest::Run {
            options: Box::new(RunOptions {
                jailed: config.clone(),
                config,
                id: Some(self.id),
                api_socket: (!self.no_api).then_some(self.api_sock),
                confinement: Confinement {
                    jail: None,
                    seccomp: if self.no_seccomp {
                        SeccompMode::Off
                    } else {
                        SeccompMode::Kill
                    },
                },
                console_socket: None,
                end_file: None,
                no_start: false,
                only_configure: false,
                held: false,
                restore: None,
                metadata: self.metadata,
                limits: PayloadLimits {
                    body,
                    metadata: self.mmds_size_limit.unwrap_or(body),
                },
                taps: Vec::new(),
            }),
            logger,
        })
    }

    fn logger(&self) -> Result<LoggerConfig, FirecrackerError> {
        let level = self.level.as_ref();
        let level = level.map(|level| serde_json::from_value(Value::String(level.clone())));
        let level = level.transpose().map_err(FirecrackerError::Level)?;
        let logger = LoggerConfig {
            log_path: self.log_path.clone(),
            level: Some(level.unwrap_or(LogLevel::Info)),
            show_level: Some(self.show_level),
            show_log_origin: Some(self.show_log_origin),
            module: self.module.clone(),
        };
        let alone = VmConfig {
            logger: Some(logger.clone()),
            ..VmConfig::default()
        };
        alone.validate().map_err(FirecrackerError::Logger)?;
        Ok(logger)
    }

    fn config(&self) -> Result<VmConfig, FirecrackerError> {
        let mut config = VmConfig::default();
        if let Some(path) = &self.config_file {
            config = VmConfig::from_file(path).map_err(UsageError::from)?;
            if config.boot_source.is_none() {
                return Err(FirecrackerError::NoBootSource(path.clone()));
            }
        }
        if let Some(metrics_path) = self.metrics_path.clone() {
            let metrics = MetricsConfig { metrics_path };
            if config.metrics.replace(metrics).is_some() {
                return Err(FirecrackerError::Usage(UsageError::Conflict {
                    flag: "--metrics-path",
                    field: "metrics",
                    file: self.config_file.clone().unwrap_or_default(),
                }));
            }
            config.validate().map_err(UsageError::from)?;
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::CommandFactory;
    use clap::error::ErrorKind;
    use host::report::chain;

    use super::*;

    fn arguments(words: &[&str]) -> Result<FirecrackerArguments, clap::Error> {
        FirecrackerArguments::try_parse_from(["firecracker"].iter().chain(words))
    }

    fn request(words: &[&str]) -> Result<FirecrackerRequest, FirecrackerError> {
        arguments(words).unwrap().into_request()
    }

    fn run(words: &[&str]) -> (RunOptions, LoggerConfig) {
        match request(words).unwrap() {
            FirecrackerRequest::Run { options, logger } => (*options, logger),
            other => panic!("{other:?}"),
        }
    }

    fn config_file(text: &str) -> (tempfile::TempDir, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm.json");
        std::fs::write(&path, text).unwrap();
        let path = path.to_str().unwrap().to_owned();
        (folder, path)
    }

    const GUEST: &str = r#"{"boot-source": {"kernel_image_path": "k"}, "machine-config": {"vcpu_count": 2, "mem_size_mib": 64}}"#;

    #[test]
    fn the_command_line_is_well_formed() {
        FirecrackerArguments::command().debug_assert();
    }

    #[test]
    fn without_arguments_there_is_what_firecracker_has() {
        let (options, logger) = run(&[]);
        assert_eq!(
            options.api_socket.as_deref(),
            Some(Path::new("/run/firecracker.socket"))
        );
        assert_eq!(options.id.as_deref(), Some("anonymous-instance"));
        assert_eq!(options.config, VmConfig::default());
        assert_eq!(options.limits, PayloadLimits::default());
        assert_eq!(options.limits.body, 51200);
        assert_eq!(options.confinement.seccomp, SeccompMode::Kill);
        assert!(options.confinement.jail.is_none() && options.metadata.is_none());
        let expected = LoggerConfig {
            level: Some(LogLevel::Info),
            show_level: Some(false),
            show_log_origin: Some(false),
            ..LoggerConfig::default()
        };
        assert_eq!(logger, expected);
    }

    #[test]
    fn every_option_has_its_effect() {
        let (_folder, path) = config_file(GUEST);
        let (options, logger) = run(&[
            "--api-sock",
            "/s",
            "--id",
            "01HX-Ab",
            "--no-seccomp",
            "--start-time-us",
            "1",
            "--start-time-cpu-us",
            "2",
            "--parent-cpu-time-us",
            "3",
            "--config-file",
            &path,
            "--metadata",
            "/m",
            "--log-path",
            "/l",
            "--level",
            "Warning",
            "--module",
            "control::api",
            "--show-level",
            "--show-log-origin",
            "--metrics-path",
            "/n",
            "--boot-timer",
            "--http-api-max-payload-size",
            "100",
        ]);
        assert_eq!(options.api_socket.as_deref(), Some(Path::new("/s")));
        assert_eq!(options.id.as_deref(), Some("01HX-Ab"));
        assert_eq!(options.confinement.seccomp, SeccompMode::Off);
        assert_eq!(options.config.machine_config.vcpu_count, 2);
        assert_eq!(options.jailed, options.config);
        assert_eq!(options.metadata.as_deref(), Some(Path::new("/m")));
        let metrics = options.config.metrics.unwrap();
        assert_eq!(metrics.metrics_path, Path::new("/n"));
        let limits = options.limits;
        assert_eq!((limits.body, limits.metadata), (100, 100));
        let expected = LoggerConfig {
            log_path: Some("/l".into()),
            level: Some(LogLevel::Warn),
            show_level: Some(true),
            show_log_origin: Some(true),
            module: Some("control::api".to_owned()),
        };
        assert_eq!(logger, expected);
        let (options, _) = run(&["--no-api", "--config-file", &path]);
        assert_eq!(options.api_socket, None);
        let (options, _) = run(&["--mmds-size-limit", "7"]);
        let limits = options.limits;
        assert_eq!((limits.body, limits.metadata), (51200, 7));
    }

    #[test]
    fn versions_are_asked_for_without_a_guest() {
        let error = arguments(&["--version"]).unwrap_err();
        assert_eq!(error.to_string(), "Firecracker v1.17.0\n");
        let error = arguments(&["--no-api", "-V"]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DisplayVersion);
        for word in ["-h", "--help"] {
            assert_eq!(
                arguments(&[word]).unwrap_err().kind(),
                ErrorKind::DisplayHelp
            );
        }
        assert!(matches!(
            request(&["--snapshot-version", "--enable-pci"]),
            Ok(FirecrackerRequest::SnapshotVersion)
        ));
        assert!(matches!(
            request(&["--describe-snapshot", "/s"]),
            Ok(FirecrackerRequest::DescribeSnapshot(path)) if path == Path::new("/s")
        ));
    }

    #[test]
    fn what_firecracker_does_not_parse_is_not_parsed() {
        let long = "a".repeat(65);
        for (words, named) in [
            (&["--no-api"][..], "--config-file"),
            (
                &["--no-seccomp", "--seccomp-filter", "f"],
                "--seccomp-filter",
            ),
            (&["--id", "a_b"], "a_b"),
            (&["--id", ""], "--id"),
            (&["--id", &long], "1 to 64"),
            (&["--id", "a", "--id", "b"], "--id"),
            (&["--api-sock"], "--api-sock"),
            (&["--start-time-us", "now"], "now"),
            (&["--http-api-max-payload-size", "-1"], "-1"),
            (&["--mmds-size-limit", "1M"], "1M"),
            (&["--kernel", "k"], "--kernel"),
            (&["run"], "run"),
        ] {
            let error = arguments(words).unwrap_err().to_string();
            assert!(error.contains(named), "{words:?}: {error}");
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name_and_with_a_code() {
        let (_folder, nothing) = config_file("{}");
        let (_other, guest) =
            config_file(&GUEST.replacen('{', r#"{"metrics": {"metrics_path": "a"}, "#, 1));
        for (words, code, named) in [
            (&["--level", "loud"][..], 152, "loud"),
            (&["--seccomp-filter", "f"], 153, "--no-seccomp"),
            (&["--enable-pci"], 153, "no PCI"),
            (&["--module", "a b"], 1, "logger.module"),
            (&["--config-file", "/nonexistent"], 1, "/nonexistent"),
            (&["--config-file", &nothing], 1, "boot-source"),
            (
                &["--config-file", &guest, "--metrics-path", "b"],
                1,
                "both say it",
            ),
        ] {
            let error = request(words).unwrap_err();
            let said = chain(&error).to_string();
            assert_eq!(error.code(), code, "{words:?}: {said}");
            assert!(said.contains(named), "{words:?}: {said}");
        }
    }
}
