//! The entropy device of a machine.

use std::sync::{Arc, Mutex};

use devices::virtio::rng::VirtioRng;

use super::builder::Builder;
use super::events::new_interrupt;
use crate::machine::error::{StartError, host};
use config::VmConfig;

const NAME: &str = "entropy device";

pub(super) fn attach(builder: &mut Builder<'_>, config: &VmConfig) -> Result<(), StartError> {
    let Some(config) = config.entropy else {
        return Ok(());
    };
    let mut rng = VirtioRng::new(new_interrupt(NAME)?).map_err(host(NAME))?;
    rng.update_limits(config.rate_limiter.unwrap_or_default().limits().into())
        .map_err(host(NAME))?;
    builder.add_virtio("entropy", Arc::new(Mutex::new(rng)))
}
