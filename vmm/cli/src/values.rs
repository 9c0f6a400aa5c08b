//! Values of arguments that several commands have.

use std::convert::Infallible;
use std::error::Error;
use std::path::PathBuf;
use std::str::FromStr;

use config::{SharingConfig, is_guest_id};
use host::report::chain;

/// Parses a path of UTF-8, because the REST socket returns paths in JSON.
#[allow(clippy::unnecessary_wraps, reason = "the shape of a value parser")]
pub(crate) fn utf8_path(text: &str) -> Result<PathBuf, Infallible> {
    Ok(PathBuf::from(text))
}

/// Parses a guest's name, which is used as the name of a folder, and in URLs.
pub(crate) fn guest_id(text: &str) -> Result<String, String> {
    if is_guest_id(text) {
        Ok(text.to_owned())
    } else {
        Err("not 1 to 63 lower case letters, digits and dashes".to_owned())
    }
}

/// Parses the name of a sharing domain, which is used as the name of a folder.
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

/// Parses a value whose errors have sources: the parser of the command line shows only the outermost error.
pub(crate) fn with_sources<T>(text: &str) -> Result<T, String>
where
    T: FromStr<Err: Error + 'static>,
{
    text.parse()
        .map_err(|error: T::Err| chain(&error).to_string())
}
