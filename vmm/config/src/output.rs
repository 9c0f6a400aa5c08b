//! Where the serial console, the log and the metrics are written.

use std::path::PathBuf;

use devices::rate_limiter::BucketLimits;
use serde::{Deserialize, Deserializer, Serialize};

use super::error::check_path;
use super::{ConfigError, TokenBucketConfig};

/// Firecracker's `serial`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// A file or named pipe that gets the output of the guest's serial console, instead of standard output.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub serial_out_path: Option<PathBuf>,
    /// Limits the bytes of the output. What goes beyond is dropped, and counted by `uart.rate_limiter_dropped_bytes` of
    /// the metrics. No limit where absent.
    #[serde(default, deserialize_with = "crate::object::optional")]
    pub rate_limiter: Option<TokenBucketConfig>,
}

impl SerialConfig {
    /// How much of the output there is at most; `None` where that is not limited.
    pub fn limit(&self) -> Option<BucketLimits> {
        self.rate_limiter.and_then(|bucket| bucket.limits())
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        match &self.serial_out_path {
            Some(path) => check_path("serial.serial_out_path", path),
            None => Ok(()),
        }
    }
}

/// Firecracker's `logger`. Fields that are absent stay as they were.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoggerConfig {
    /// A file or named pipe that gets the log, instead of standard error.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub log_path: Option<PathBuf>,
    /// The least severe level that is logged.
    #[serde(default)]
    pub level: Option<LogLevel>,
    /// Whether lines name their level.
    #[serde(default)]
    pub show_level: Option<bool>,
    /// Whether lines name file and line of the code.
    #[serde(default)]
    pub show_log_origin: Option<bool>,
    /// Logs only messages of this module and those below it.
    #[serde(default)]
    pub module: Option<String>,
}

/// A level of the log. As with Firecracker, any case is accepted, and `Warning` for `Warn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// Errors.
    Error,
    /// Errors, and what may be wrong.
    Warn,
    /// What happens.
    Info,
    /// How it happens.
    Debug,
    /// Everything.
    Trace,
}

impl<'de> Deserialize<'de> for LogLevel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.to_ascii_lowercase().as_str() {
            "off" => Ok(Self::Off),
            "error" => Ok(Self::Error),
            "warn" | "warning" => Ok(Self::Warn),
            "info" => Ok(Self::Info),
            "debug" => Ok(Self::Debug),
            "trace" => Ok(Self::Trace),
            _ => Err(serde::de::Error::custom(format_args!(
                "level: {text:.80?} is not Off, Error, Warn, Info, Debug or Trace"
            ))),
        }
    }
}

impl LoggerConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if let Some(module) = &self.module
            && !module
                .chars()
                .all(|c| c == ':' || c == '_' || c.is_ascii_alphanumeric())
        {
            return Err(ConfigError::invalid(
                "logger.module",
                &format_args!("{module:.80?}"),
                "the path of a module",
            ));
        }
        match &self.log_path {
            Some(path) => check_path("logger.log_path", path),
            None => Ok(()),
        }
    }
}

/// Firecracker's `metrics`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MetricsConfig {
    /// A file or named pipe that gets a line of JSON at `FlushMetrics` and at the end.
    #[schema(value_type = String)]
    pub metrics_path: PathBuf,
}

impl MetricsConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        check_path("metrics.metrics_path", &self.metrics_path)
    }
}
