//! Where a guest's console, log and metrics go.

use super::{Control, ControlError, open_metrics};
use crate::metrics;
use config::{LoggerConfig, MetricsConfig, VmConfig};

impl Control {
    /// `PUT /logger`: takes effect at once.
    ///
    /// # Errors
    /// `AfterStart`, `Ended`, `Config`, `Log`.
    pub fn set_logger(&mut self, logger: &LoggerConfig) -> Result<(), ControlError> {
        self.not_started()?;
        let config = VmConfig {
            logger: Some(logger.clone()),
            ..self.config.clone()
        };
        config.validate()?;
        self.log.configure(logger)?;
        self.config = config;
        Ok(())
    }

    /// `PUT /metrics`.
    ///
    /// # Errors
    /// `AfterStart`, `Ended`, `Config`, `Metrics`.
    pub fn set_metrics(&mut self, metrics: &MetricsConfig) -> Result<(), ControlError> {
        self.not_started()?;
        let config = VmConfig {
            metrics: Some(metrics.clone()),
            ..self.config.clone()
        };
        config.validate()?;
        self.metrics = Some(open_metrics(metrics)?);
        self.config = config;
        Ok(())
    }

    /// `FlushMetrics`: writes a line to the file that `PUT /metrics` has named. Without one it does nothing, like
    /// Firecracker.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `Metrics`.
    pub fn flush_metrics(&mut self) -> Result<(), ControlError> {
        let devices = self.guest()?.0.metrics();
        match &mut self.metrics {
            Some(file) => file
                .write(&metrics::snapshot(&self.api, Some(&devices)))
                .map_err(ControlError::Metrics),
            None => Ok(()),
        }
    }
}
