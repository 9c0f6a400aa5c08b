//! `--vsock [CID][,path=SOCKET]`.

use std::path::PathBuf;
use std::str::FromStr;

use super::disk::split;
use config::VsockConfig;

/// The value of `--vsock`. A comma in a path is written twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockArgument(pub VsockConfig);

/// Why a text is not the description of a socket device.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum VsockArgumentError {
    /// The context identifier cannot be read.
    #[error("{0:?} is not a context identifier: 3 to 4294967294")]
    Cid(String),
    /// An option is unknown.
    #[error(
        "{0:?} is not an option of a socket device: path=SOCKET, behind the context identifier, if there is one (a comma in a path is written twice)"
    )]
    UnknownOption(String),
    /// An option is given twice.
    #[error("path is given twice")]
    Twice,
}

impl FromStr for VsockArgument {
    type Err = VsockArgumentError;

    fn from_str(text: &str) -> Result<Self, VsockArgumentError> {
        let mut parts = split(text).into_iter().peekable();
        let cid = parts.next_if(|part| !part.contains('='));
        let guest_cid = match cid.as_deref() {
            None | Some("") => None,
            Some(cid) => {
                let number = cid.parse();
                Some(number.map_err(|_| VsockArgumentError::Cid(cid.to_owned()))?)
            }
        };
        let mut path: Option<PathBuf> = None;
        for part in parts {
            let value = part.strip_prefix("path=").filter(|path| !path.is_empty());
            let Some(value) = value else {
                return Err(VsockArgumentError::UnknownOption(part));
            };
            if path.replace(value.into()).is_some() {
                return Err(VsockArgumentError::Twice);
            }
        }
        Ok(Self(VsockConfig {
            vsock_id: None,
            guest_cid,
            uds_path: path,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_described_by_its_identifier_and_its_socket() {
        let parse = |text: &str| text.parse::<VsockArgument>().map(|argument| argument.0);
        assert_eq!(
            parse("7,path=a,,b").unwrap(),
            VsockConfig::new(Some(7), "a,b")
        );
        assert_eq!(parse("path=v").unwrap(), VsockConfig::new(None, "v"));
        for none in ["", ","] {
            assert_eq!(parse(none).is_ok(), none.is_empty(), "{none:?}");
        }
        assert_eq!(parse("x"), Err(VsockArgumentError::Cid("x".into())));
        assert_eq!(parse("3,path=a,path=b"), Err(VsockArgumentError::Twice));
        for wrong in ["3,path=", "3,x", "3,4", "cid=3"] {
            parse(wrong).unwrap_err();
        }
    }
}
