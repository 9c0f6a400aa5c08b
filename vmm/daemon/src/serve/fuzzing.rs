//! What the fuzzers in `fuzz/` reach the daemon's records through: a file of any bytes is read as each of the records
//! that a daemon finds in its state folder, and as what the process of a guest hands over.
//!
//! What must hold: nothing panics, a record that is read can be written, and means the same when it is read again; and
//! what is shown of a process has no control characters, and is about its own guest.

#![allow(
    clippy::missing_panics_doc,
    reason = "a fuzzer ends where a property fails"
)]

use std::fs;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::end_reason;
use super::guest_metrics::Joined;
use super::images::Images;
use super::process::{self, Exit};
use super::record::{PidFile, Record};
use super::record_key::SealedRecord;
use super::store;
use super::templates::{Template, Templates};
use super::vm::Vm;
use config::VmConfig;

/// The guest that the files are of.
const ID: &str = "a";

/// Reads a file as each of the records.
pub fn records(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let file = folder.join("file");
    fs::write(&file, bytes).expect("room for a file");
    let config = again::<VmConfig>(&file);
    let mut templates = Templates::default();
    if let Some(template) = unsealed(&file).or_else(|| again::<Template>(&file)) {
        template_record(folder, &template);
        templates.insert(template);
    }
    if let Some(record) = again::<Record>(&file) {
        guest_record(folder, record, &config.unwrap_or_default(), &templates);
    }
    let _ = again::<Images>(&file).map(|images| images.list());
    if let Some(pid) = again::<PidFile>(&file) {
        pid_file(folder, &pid);
    }
    end_report(folder, &file);
    metrics(bytes);
}

/// The record of a template behind its authentication code, which is taken for right.
fn unsealed(file: &Path) -> Option<Template> {
    let sealed = store::read::<SealedRecord>(file).ok()??;
    let inner = file.with_extension("unsealed");
    let template = sealed.unchecked::<Template>().ok()?;
    store::write(&inner, &template, false).expect("what was read can be written");
    again(&inner)
}

/// Reads a record, writes it, and reads that.
fn again<T: DeserializeOwned + Serialize>(file: &Path) -> Option<T> {
    let record = store::read::<T>(file).ok()??;
    let written = file.with_extension("again");
    store::write(&written, &record, false).expect("what was read can be written");
    let read = store::read::<T>(&written).expect("what was written can be read");
    let shown = |record: &T| serde_json::to_value(record).expect("what was read has a form");
    assert_eq!(shown(&record), shown(&read.expect("there is a file")));
    Some(record)
}

fn template_record(folder: &Path, template: &Template) {
    let config = template.config_of(folder);
    let _ = config.validate();
    let snapshot = template.snapshot((folder, Vec::new()), folder, true, Some(3));
    assert_eq!(snapshot.snapshot_path, folder.join("state"));
}

fn guest_record(folder: &Path, record: Record, config: &VmConfig, templates: &Templates) {
    let _ = config.validate();
    let shown = serde_json::to_value(&record).expect("what was read has a form");
    let _ = record.spec.named(&record.later, templates, folder);
    let vm = Vm::new(ID.to_owned(), folder.to_owned(), record, config);
    assert_eq!(serde_json::to_value(vm.record()).ok(), Some(shown));
    let _ = (vm.load(), vm.api_socket());
    serde_json::to_value(vm.status(true, true)).expect("a guest can be shown");
    for (drive, disk) in &vm.now().disks {
        templates.parent_of(&vm, drive, disk);
    }
}

/// The process that the file names is looked for, as if it was of this boot.
fn pid_file(folder: &Path, file: &PidFile) {
    let file = PidFile {
        boot_id: store::boot_id().expect("this boot"),
        ..file.clone()
    };
    store::write(&folder.join("pid.json"), &file, false).expect("room for a file");
    process::find(folder).expect("a process, or none");
}

fn end_report(folder: &Path, file: &Path) {
    fs::rename(file, folder.join("end.json")).expect("a name");
    let report = end_reason::reason(folder, Exit::Unseen, None);
    assert!(!report.text.chars().any(char::is_control), "{report:?}");
    assert!(report.text.len() < 64 << 10);
}

/// Samples that are taken are taken again in the form in which they were written.
fn metrics(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let mut joined = Joined::default();
    joined.add(ID, text);
    let first = joined.after("# EOF\n");
    let of_guest = format!("{{vm=\"{ID}\"");
    let mut by_process = String::new();
    for line in first.lines().filter(|line| !line.starts_with('#')) {
        assert!(!line.chars().any(char::is_control), "{line:?}");
        let (name, rest) = line.split_once(&of_guest).expect("a sample of the guest");
        let rest = rest.strip_prefix('}').map_or_else(
            || format!("{{{}", rest.strip_prefix(',').expect("a label")),
            ToOwned::to_owned,
        );
        by_process.extend([name, &rest, "\n"]);
    }
    let mut joined = Joined::default();
    assert_eq!(joined.add(ID, &by_process), 0, "{by_process}");
    assert_eq!(joined.after("# EOF\n"), first);
}
