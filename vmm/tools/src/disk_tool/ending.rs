//! The form of a new disk, by the ending of its file's name.

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

/// The form that the ending of a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NamedForm {
    Form(Form),
    /// A form that Coppice does not write, by its name.
    Other(&'static str),
    Unknown,
}

fn named_form(path: &Path) -> NamedForm {
    let ending = path.extension().and_then(|ending| ending.to_str());
    match ending.map(str::to_ascii_lowercase).as_deref() {
        Some("vhdx" | "avhdx") => NamedForm::Form(Form::Vhdx),
        Some("raw" | "img" | "dd" | "iso") => NamedForm::Form(Form::Raw),
        Some("qcow2" | "qcow") => NamedForm::Other("qcow2"),
        Some("vmdk") => NamedForm::Other("VMDK"),
        Some("vhd" | "vpc") => NamedForm::Other("VHD"),
        Some("vdi") => NamedForm::Other("VDI"),
        Some("qed") => NamedForm::Other("QED"),
        Some("gz" | "xz" | "zst" | "bz2" | "lz4" | "zip" | "7z") => NamedForm::Other("compressed"),
        Some(_) | None => NamedForm::Unknown,
    }
}

/// The form of a new file: the requested one, otherwise that of its name, otherwise a VHDX.
///
/// # Errors
/// Where the name stands for another form.
pub(super) fn form(path: &Path, wanted: Option<Form>) -> Result<Form, ToolError> {
    let refused = |why: String| Err(ToolError::Refused(format!("{}: {why}", path.display())));
    match (named_form(path), wanted) {
        (NamedForm::Other(name), _) => refused(format!(
            "the name is that of a {name} file, which is not written here: a VHDX or a raw disk is"
        )),
        (NamedForm::Form(named), Some(wanted)) if named != wanted => refused(format!(
            "the name is that of {}, and the file would be {}",
            named.name(),
            wanted.name()
        )),
        (NamedForm::Form(form), _) | (NamedForm::Unknown, Some(form)) => Ok(form),
        (NamedForm::Unknown, None) => Ok(Form::Vhdx),
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
