//! What the ending of a file's name says of its form.

use std::path::Path;

use super::error::ToolError;

/// The form of a new file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Form {
    Vhdx,
    Raw,
}

impl Form {
    fn name(self) -> &'static str {
        match self {
            Self::Vhdx => "a VHDX",
            Self::Raw => "a raw disk",
        }
    }
}

/// What a name promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Promise {
    Form(Form),
    /// A form that is not written here, by its name.
    Other(&'static str),
    Nothing,
}

fn promise(path: &Path) -> Promise {
    let ending = path.extension().and_then(|ending| ending.to_str());
    match ending.map(str::to_ascii_lowercase).as_deref() {
        Some("vhdx" | "avhdx") => Promise::Form(Form::Vhdx),
        Some("raw" | "img" | "dd" | "iso") => Promise::Form(Form::Raw),
        Some("qcow2" | "qcow") => Promise::Other("qcow2"),
        Some("vmdk") => Promise::Other("VMDK"),
        Some("vhd" | "vpc") => Promise::Other("VHD"),
        Some("vdi") => Promise::Other("VDI"),
        Some("qed") => Promise::Other("QED"),
        Some("gz" | "xz" | "zst" | "bz2" | "lz4" | "zip" | "7z") => Promise::Other("compressed"),
        Some(_) | None => Promise::Nothing,
    }
}

/// The form of a new file: what was asked for, else what its name says, else a VHDX.
///
/// # Errors
/// Where the name says something else.
pub(super) fn form(path: &Path, wanted: Option<Form>) -> Result<Form, ToolError> {
    let refused = |why: String| Err(ToolError::Refused(format!("{}: {why}", path.display())));
    match (promise(path), wanted) {
        (Promise::Other(name), _) => refused(format!(
            "the name is that of a {name} file, which is not written here: a VHDX or a raw disk is"
        )),
        (Promise::Form(named), Some(wanted)) if named != wanted => refused(format!(
            "the name is that of {}, and the file would be {}",
            named.name(),
            wanted.name()
        )),
        (Promise::Form(form), _) | (Promise::Nothing, Some(form)) => Ok(form),
        (Promise::Nothing, None) => Ok(Form::Vhdx),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_is_that_of_the_name_and_never_another() {
        use Form::{Raw, Vhdx};
        for (name, wanted, expected) in [
            ("a.vhdx", None, Some(Vhdx)),
            ("a.VHDX", Some(Vhdx), Some(Vhdx)),
            ("a.vhdx", Some(Raw), None),
            ("a.raw", None, Some(Raw)),
            ("a.b.img", None, Some(Raw)),
            ("a.img", Some(Vhdx), None),
            ("a.qcow2", None, None),
            ("a.vmdk", Some(Raw), None),
            ("a.raw.gz", None, None),
            ("a", None, Some(Vhdx)),
            ("a", Some(Raw), Some(Raw)),
            ("a.disk", None, Some(Vhdx)),
            (".raw", None, Some(Vhdx)),
        ] {
            let found = form(Path::new(name), wanted);
            assert_eq!(found.ok(), expected, "{name} {wanted:?}");
        }
    }
}
