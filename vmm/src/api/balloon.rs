//! Requests below `/balloon`.

use serde::Deserialize;

use super::Context;
use super::routes::{Answer, Fault, control, parse, tell};
use crate::config::HintingStart;

/// The body of `PATCH /balloon/hinting/stop`, where there is one.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HintingStop {}

/// Whether a `PATCH` can do without a body, as in Firecracker.
pub(super) fn needs_no_body(path: &[&str]) -> bool {
    matches!(path, ["balloon", "hinting", "start" | "stop"])
}

pub(super) fn get(
    context: &Context,
    path: &[&str],
    unknown: impl Fn() -> Fault,
) -> Result<Answer, Fault> {
    match *path {
        [] => tell(control(context).balloon()?),
        ["statistics"] => tell(control(context).balloon_statistics()?),
        ["hinting", "status"] => tell(control(context).hinting()?),
        _ => Err(unknown()),
    }
}

pub(super) fn patch(
    context: &Context,
    path: &[&str],
    body: &[u8],
    unknown: impl Fn() -> Fault,
) -> Result<(), Fault> {
    match *path {
        [] => {
            let update = parse(body)?;
            control(context).update_balloon(update)?;
        }
        ["statistics"] => {
            let update = parse(body)?;
            control(context).update_balloon_statistics(update)?;
        }
        ["hinting", "start"] => {
            let start = if body.is_empty() {
                HintingStart::default()
            } else {
                parse(body)?
            };
            control(context).start_hinting(start)?;
        }
        ["hinting", "stop"] => {
            if !body.is_empty() {
                let HintingStop {} = parse(body)?;
            }
            control(context).stop_hinting()?;
        }
        _ => return Err(unknown()),
    }
    Ok(())
}
