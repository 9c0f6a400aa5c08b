//! Values of arguments that several commands have.

use std::convert::Infallible;
use std::error::Error;
use std::path::PathBuf;
use std::str::FromStr;

use config::{SharingConfig, is_guest_id};
use host::report::chain;

/// The REST socket tells paths in JSON, which is UTF-8.
#[allow(clippy::unnecessary_wraps, reason = "the shape of a value parser")]
pub(crate) fn utf8_path(text: &str) -> Result<PathBuf, Infallible> {
    Ok(PathBuf::from(text))
}

/// A name becomes a folder, and a part of URLs.
pub(crate) fn guest_id(text: &str) -> Result<String, String> {
    if is_guest_id(text) {
        Ok(text.to_owned())
    } else {
        Err("not 1 to 63 lower case letters, digits and dashes".to_owned())
    }
}

/// A name becomes a folder.
pub(crate) fn domain(text: &str) -> Result<String, String> {
    let config = SharingConfig {
        domain: Some(text.to_owned()),
        ..SharingConfig::default()
    };
    match config.validate() {
        Ok(()) => Ok(text.to_owned()),
        Err(error) => Err(chain(&error).to_string()),
    }
}

/// A value whose errors have sources, which the parser of the command line would not show.
pub(crate) fn with_sources<T>(text: &str) -> Result<T, String>
where
    T: FromStr<Err: Error + 'static>,
{
    text.parse()
        .map_err(|error: T::Err| chain(&error).to_string())
}
