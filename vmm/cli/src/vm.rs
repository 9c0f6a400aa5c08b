//! The arguments of `coppice vm` and `coppice console`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf, absolute};

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::run::RunArguments;
use super::serve::default_socket;
use super::usage_error::UsageError;
use super::values::with_sources;
use config::{Published, VmConfig};
use control::mmds::Mmds;
use daemon::remote::GuestCommand;

/// The daemon to connect to, and the form of the output.
#[derive(Clone, Debug, Args)]
pub struct Connection {
    /// The socket of the daemon [default: `$COPPICE_SOCKET`, or /run/coppice/coppice.sock for root, or
    /// `$XDG_RUNTIME_DIR/coppice.sock`].
    #[arg(long, value_name = "PATH", global = true)]
    pub socket: Option<PathBuf>,
    /// Write JSON.
    #[arg(long, global = true)]
    pub json: bool,
}

impl Connection {
    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(default_socket)
    }
}

/// The arguments of `coppice vm`.
#[derive(Debug, Args)]
pub struct VmArguments {
    /// The daemon.
    #[command(flatten)]
    pub connection: Connection,
    /// What to do.
    #[command(subcommand)]
    pub command: VmCommand,
}

/// The commands of `coppice vm`.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Make a guest, of the arguments of `coppice run`, and start it. Made twice in the same way, it is there once.
    ///
    /// Files may be images of the daemon: image:NAME.
    #[command(next_line_help = true)]
    Create(Box<CreateArguments>),
    /// All that is done with guests that were made.
    #[command(flatten)]
    Existing(GuestCommand),
}

/// The arguments of `coppice vm create`.
#[derive(Debug, Args)]
pub struct CreateArguments {
    /// When a guest that has ended is started again: never; on-failure; or always, unless it was stopped by request, so
    /// also after a start of the host.
    #[arg(long, value_name = "WHEN", default_value = "never", value_parser = ["never", "on-failure", "always"])]
    pub restart: String,
    /// Make the guest a clone of a template: it goes on from the saved state, with disks of its own. With --name,
    /// --label, --metadata, --publish, --restart and --no-start alone.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["kernel", "config"])]
    pub template: Option<String>,
    /// A port of the host that leads to the clone, by its interface: eth0=8080:80, eth0=192.0.2.1:53:53/udp. A guest
    /// that is no clone has it in --net. Can be repeated.
    #[arg(long, value_name = "INTERFACE=[IP:]PORT:GUEST-PORT[/udp]", requires = "template", value_parser = published)]
    pub publish: Vec<(String, Published)>,
    /// A word to find it by: NAME=VALUE. Can be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = label)]
    pub label: Vec<(String, String)>,
    /// The guest.
    #[command(flatten)]
    pub run: RunArguments,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("not NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn published(text: &str) -> Result<(String, Published), String> {
    let (interface, port) = text
        .split_once('=')
        .ok_or("not INTERFACE=PORT:GUEST-PORT")?;
    Ok((interface.to_owned(), with_sources(port)?))
}

/// Makes a path absolute, because the daemon has another working directory.
fn from_here(path: &mut PathBuf) {
    let image = path.to_str().is_some_and(|path| path.starts_with("image:"));
    if !image && let Ok(whole) = absolute(Path::new(path)) {
        *path = whole;
    }
}

fn all_from_here(config: &mut VmConfig) {
    if let Some(source) = &mut config.boot_source {
        from_here(&mut source.kernel_image_path);
        source.initrd_path.as_mut().map(from_here);
    }
    for drive in &mut config.drives {
        from_here(&mut drive.path_on_host);
        drive.parents.as_mut().map(from_here);
    }
    for pmem in &mut config.pmem {
        from_here(&mut pmem.path_on_host);
        pmem.parents.as_mut().map(from_here);
    }
    if let Some(serial) = &mut config.serial {
        serial.serial_out_path.as_mut().map(from_here);
    }
    if let Some(metrics) = &mut config.metrics {
        from_here(&mut metrics.metrics_path);
    }
    if let Some(logger) = &mut config.logger {
        logger.log_path.as_mut().map(from_here);
    }
}

impl CreateArguments {
    /// The body of `POST /vms`.
    ///
    /// # Errors
    /// [`UsageError`].
    pub fn into_body(self) -> Result<Value, UsageError> {
        let run = &self.run;
        let daemons = [
            (run.api_sock.is_some(), "--api-sock"),
            (run.console_sock.is_some(), "--console-sock"),
            (run.end_file.is_some(), "--end-file"),
            (run.held, "--held"),
            (run.restore.is_some(), "--restore"),
            (run.log.is_some(), "--log"),
        ];
        if let Some((_, flag)) = daemons.into_iter().find(|(given, _)| *given) {
            return Err(UsageError::DaemonsOwn(flag));
        }
        let mut body = Map::new();
        if let Some(id) = &run.id {
            body.insert("id".to_owned(), json!(id));
        }
        body.insert("start".to_owned(), json!(!run.no_start));
        body.insert("restart".to_owned(), json!(self.restart));
        let labels: Map<_, _> = self
            .label
            .into_iter()
            .map(|(name, value)| (name, value.into()))
            .collect();
        body.insert("labels".to_owned(), labels.into());
        if !self.publish.is_empty() {
            let mut ports = BTreeMap::<_, Vec<_>>::new();
            for (interface, port) in self.publish {
                ports.entry(interface).or_default().push(port);
            }
            body.insert("publish".to_owned(), json!(ports));
        }
        if let Some(path) = &run.metadata {
            let metadata = Mmds::default();
            metadata.read(path)?;
            body.insert("metadata".to_owned(), metadata.get());
        }
        let mut config = self.run.into_config()?;
        match (self.template, config.of_a_guest()) {
            (Some(_), Some(field)) => return Err(UsageError::TemplatesOwn(field)),
            (Some(template), None) => {
                body.insert("template".to_owned(), json!(template));
            }
            (None, _) => {
                all_from_here(&mut config);
                body.insert("config".to_owned(), json!(config));
            }
        }
        Ok(body.into())
    }
}
