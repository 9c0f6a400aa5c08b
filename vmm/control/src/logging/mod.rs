//! The log: lines of text or JSON, to standard error or a file, and changes of that while it runs.
//!
//! An event is one line, in which nothing is a command to a terminal, whatever names and texts of others are in it. A
//! line that cannot be written, since the disk or the pipe is full, is left out, and the next one that can be written
//! says how many were: the program does not wait for its log. The daemon's guests log to a pipe that it drains at a
//! rate.

mod events;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{self, Writer};
use tracing_subscriber::fmt::{self, FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::reload;

use self::events::Events;
use config::{LogLevel, LoggerConfig};
use host::output::open_output;
use host::printable::printable;
use host::terminal;
use jail::seccomp;

/// How lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// An object a line, for programs.
    Json,
}

/// What is logged: a level, or levels by module, such as `info` or `error,control::api=debug`. Modules that are not
/// named log at the level that stands alone, or else at `warn`.
#[derive(Clone, Debug)]
pub struct LogFilter(Targets);

impl Default for LogFilter {
    /// What may be wrong, and what went wrong.
    fn default() -> Self {
        Self(Targets::new().with_default(LevelFilter::WARN))
    }
}

impl FromStr for LogFilter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        let mut targets = Self::default().0;
        for part in text.split(',') {
            let (module, level) = match part.split_once('=') {
                Some((module, level)) => (Some(module), level),
                None => (None, part),
            };
            let bad = || FilterError(part.to_owned());
            // The parser takes numbers and nothing at all for levels, too.
            if !level.starts_with(|c: char| c.is_ascii_alphabetic()) || module == Some("") {
                return Err(bad());
            }
            let level = LevelFilter::from_str(level).map_err(|_| bad())?;
            targets = match module {
                Some(module) => targets.with_target(module, level),
                None => targets.with_default(level),
            };
        }
        Ok(Self(targets))
    }
}

/// Not a filter of the log.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not off, error, warn, info, debug or trace, nor MODULE=LEVEL")]
pub struct FilterError(String);

/// The log cannot be changed as asked.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file cannot be opened.
    #[error("logger.log_path: cannot open {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The subscriber of the log is gone.
    #[error("the log cannot be changed")]
    Reload(#[from] reload::Error),
}

/// What can be changed while the log is in use.
#[derive(Debug)]
struct Settings {
    show_level: AtomicBool,
    show_origin: AtomicBool,
    /// Standard error where there is none.
    file: Mutex<Option<Arc<File>>>,
    /// Lines that could not be written since one was. Nothing else is ordered by it.
    left_out: AtomicU64,
}

/// The way to change the log.
#[derive(Clone, Debug)]
pub struct Log {
    settings: Arc<Settings>,
    filter: reload::Handle<Targets, Events>,
}

impl Log {
    /// A log to standard error, and the subscriber that writes it.
    pub fn new(filter: LogFilter, format: LogFormat) -> (Self, impl Subscriber + Send + Sync) {
        let settings = Arc::new(Settings {
            show_level: AtomicBool::new(true),
            show_origin: AtomicBool::new(false),
            file: Mutex::new(None),
            left_out: AtomicU64::new(0),
        });
        let (filter, handle) = reload::Layer::new(filter.0);
        let lines = Lines {
            settings: settings.clone(),
            format,
        };
        // The formatter of fields has to be JSON's for its formatter of events to be of use.
        let output = Output {
            settings: settings.clone(),
            format,
        };
        let layer = match format {
            LogFormat::Text => fmt::layer()
                .with_ansi(false)
                .event_format(lines)
                .with_writer(output)
                .boxed(),
            LogFormat::Json => fmt::layer()
                .with_ansi(false)
                .fmt_fields(format::JsonFields::new())
                .event_format(lines)
                .with_writer(output)
                .boxed(),
        };
        let subscriber = Events.with(filter).with(layer);
        (
            Self {
                settings,
                filter: handle,
            },
            subscriber,
        )
    }

    /// Changes what `config` sets.
    ///
    /// # Errors
    /// [`LogError`]; then nothing has changed.
    pub fn configure(&self, config: &LoggerConfig) -> Result<(), LogError> {
        let file = match &config.log_path {
            Some(path) => Some(open_output(path).map_err(|source| LogError::File {
                path: path.clone(),
                source,
            })?),
            None => None,
        };
        if config.level.is_some() || config.module.is_some() {
            // Firecracker's level where none is given.
            let level = filter_of(config.level.unwrap_or(LogLevel::Info));
            self.filter.reload(match &config.module {
                Some(module) => Targets::new().with_target(module, level),
                None => Targets::new().with_default(level),
            })?;
        }
        if let Some(file) = file {
            seccomp::log_to(file.as_raw_fd());
            *self.settings.file.lock() = Some(Arc::new(file));
        }
        if let Some(show) = config.show_level {
            self.settings.show_level.store(show, Ordering::Relaxed);
        }
        if let Some(show) = config.show_log_origin {
            self.settings.show_origin.store(show, Ordering::Relaxed);
        }
        Ok(())
    }
}

fn filter_of(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Off => LevelFilter::OFF,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}

struct Lines {
    settings: Arc<Settings>,
    format: LogFormat,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'lookup> LookupSpan<'lookup>,
    N: for<'writer> FormatFields<'writer> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let origin = self.settings.show_origin.load(Ordering::Relaxed);
        let format = format::format()
            .with_level(self.settings.show_level.load(Ordering::Relaxed))
            .with_file(origin)
            .with_line_number(origin);
        match self.format {
            LogFormat::Text => format.format_event(context, writer, event),
            LogFormat::Json => format.json().format_event(context, writer, event),
        }
    }
}

struct Output {
    settings: Arc<Settings>,
    format: LogFormat,
}

impl<'a> MakeWriter<'a> for Output {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line {
            settings: &self.settings,
            file: self.settings.file.lock().clone(),
            format: self.format,
        }
    }
}

/// Writes a line, which comes in one piece.
struct Line<'a> {
    settings: &'a Settings,
    file: Option<Arc<File>>,
    format: LogFormat,
}

impl Line<'_> {
    fn put(&self, text: &str) -> io::Result<()> {
        // In one write, so that lines of several threads or processes do not mix.
        match &self.file {
            Some(file) => file.as_ref().write_all(format!("{text}\n").as_bytes()),
            None if terminal::is_raw() => io::stderr().write_all(format!("{text}\r\n").as_bytes()),
            None => io::stderr().write_all(format!("{text}\n").as_bytes()),
        }
    }

    fn notice(&self, left_out: u64) -> String {
        let message = "lines of the log could not be written";
        match self.format {
            LogFormat::Text => format!("coppice: {left_out} {message}"),
            LogFormat::Json => serde_json::json!({
                "level": "WARN", "fields": {"message": message, "lines": left_out},
            })
            .to_string(),
        }
    }
}

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        let text = printable(text.strip_suffix('\n').unwrap_or(&text));
        let left_out = self.settings.left_out.swap(0, Ordering::Relaxed);
        let noted = match left_out {
            0 => Ok(()),
            left_out => self.put(&self.notice(left_out)),
        };
        let still_left_out = match (noted, left_out) {
            (Err(_), left_out) => left_out + 1,
            (Ok(()), _) => u64::from(self.put(&text).is_err()),
        };
        self.settings
            .left_out
            .fetch_add(still_left_out, Ordering::Relaxed);
        // The guest goes on without the line. The error is not returned: the formatter would report it on standard
        // error, and panic where that is full, too.
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(format: LogFormat, config: LoggerConfig, log_some: impl FnOnce()) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (log, subscriber) = Log::new(LogFilter::default(), format);
        tracing::subscriber::with_default(subscriber, || {
            log.configure(&LoggerConfig {
                log_path: Some(path.clone()),
                ..config
            })
            .unwrap();
            log_some();
        });
        std::fs::read_to_string(&path).unwrap()
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted_and_the_next_one_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        let reader = open_output(&path).unwrap();
        for format in [LogFormat::Text, LogFormat::Json] {
            let (log, subscriber) = Log::new(LogFilter::default(), format);
            log.configure(&LoggerConfig {
                log_path: Some(path.clone()),
                ..LoggerConfig::default()
            })
            .unwrap();
            let (mut text, mut buffer) = (String::new(), vec![0; 1 << 20]);
            let mut read = || {
                let len = io::Read::read(&mut &reader, &mut buffer).unwrap();
                text = String::from_utf8(buffer[..len].to_vec()).unwrap();
                text.clone()
            };
            let many = 10_000;
            tracing::subscriber::with_default(subscriber, || {
                for number in 0..many {
                    tracing::warn!(
                        number,
                        "a line that is long enough to fill the pipe with some of it"
                    );
                }
                let there = read().lines().count() as u64;
                assert!(there > 100 && there < many, "{there}");
                tracing::warn!("the next");
                let next = read();
                let (notice, next) = next.trim_end().split_once('\n').unwrap();
                assert!(next.contains("the next"), "{next}");
                assert!(notice.contains(&(many - there).to_string()), "{notice}");
                assert_eq!(notice.starts_with('{'), format == LogFormat::Json);
                tracing::warn!("and one more");
                assert_eq!(read().lines().count(), 1);
            });
        }
    }

    #[test]
    fn an_event_is_one_line_without_commands_to_a_terminal() {
        let text = logged(LogFormat::Text, LoggerConfig::default(), || {
            let name = "a\nb\x1b[2J\u{9b}\u{202e}";
            tracing::warn!(error = %name, "{name}");
        });
        assert_eq!(text.lines().count(), 1, "{text}");
        let line = text.trim_end_matches('\n');
        assert_eq!(printable(line), line);
    }

    #[test]
    fn a_level_and_a_module_say_what_is_logged() {
        let some = || {
            tracing::info!(target: "control::api", "from the module");
            tracing::error!(target: "storage", "from elsewhere");
            tracing::debug!(target: "control::api", "too much");
        };
        let text = logged(LogFormat::Text, LoggerConfig::default(), some);
        assert!(
            text.contains("from elsewhere") && !text.contains("from the module"),
            "{text}"
        );
        let module = Some("control".to_owned());
        let text = logged(
            LogFormat::Text,
            LoggerConfig {
                module,
                ..LoggerConfig::default()
            },
            some,
        );
        assert!(
            !text.contains("from elsewhere")
                && text.contains("from the module")
                && !text.contains("too much"),
            "{text}"
        );
    }

    #[test]
    fn lines_show_level_and_origin_as_asked() {
        let config = |level, origin| LoggerConfig {
            show_level: Some(level),
            show_log_origin: Some(origin),
            ..LoggerConfig::default()
        };
        let some = || tracing::warn!("a line");
        let text = logged(LogFormat::Text, config(true, false), some);
        assert!(
            text.contains("WARN") && !text.contains("logging/mod.rs"),
            "{text}"
        );
        let text = logged(LogFormat::Text, config(false, true), some);
        assert!(
            !text.contains("WARN") && text.contains("logging/mod.rs"),
            "{text}"
        );
    }

    #[test]
    fn json_is_an_object_a_line() {
        let text = logged(LogFormat::Json, LoggerConfig::default(), || {
            tracing::warn!(drive = "a", "two\nlines");
        });
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["level"], "WARN");
        assert_eq!(
            line["fields"],
            serde_json::json!({"message": "two\nlines", "drive": "a"})
        );
    }

    #[test]
    fn what_a_library_logs_within_a_span_is_a_line_without_it() {
        let text = logged(LogFormat::Text, LoggerConfig::default(), || {
            let span = tracing::error_span!("a span", key = 1);
            span.in_scope(|| tracing::error!("within"));
            assert!(span.is_disabled());
        });
        assert!(
            text.ends_with("within\n") && !text.contains("a span"),
            "{text}"
        );
    }

    #[test]
    fn a_file_that_cannot_be_opened_changes_nothing() {
        let (log, subscriber) = Log::new(LogFilter::default(), LogFormat::Text);
        tracing::subscriber::with_default(subscriber, || {
            let config = LoggerConfig {
                log_path: Some("/nonexistent/log".into()),
                level: Some(LogLevel::Trace),
                ..LoggerConfig::default()
            };
            assert!(matches!(log.configure(&config), Err(LogError::File { .. })));
            assert!(!tracing::enabled!(tracing::Level::INFO));
        });
    }

    #[test]
    fn filters_are_levels_or_modules_with_levels() {
        for good in ["info", "OFF", "warn,control::api=debug", "storage=trace"] {
            LogFilter::from_str(good).expect(good);
        }
        for bad in ["", "loud", "a=b", "coppice=info=debug"] {
            LogFilter::from_str(bad).expect_err(bad);
        }
    }
}
