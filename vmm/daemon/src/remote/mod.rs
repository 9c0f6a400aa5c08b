//! `coppice vm` and `coppice console`: the client of the host daemon.

mod attach;
mod client;
mod command;
mod error;

use std::fmt::Write as _;
use std::path::Path;

use hyper::Method;
use serde_json::{Value, json};

use host::printable::{printable, printable_lines};
use host::text_table::columns;

pub use attach::HELP;
pub use command::{GuestCommand, TemplateCommand};
pub use error::RemoteError;

use client::{Client, escaped};

/// Attaches the terminal to a guest's console.
///
/// # Errors
/// [`RemoteError`].
pub fn console(socket: &Path, id: &str) -> Result<(), RemoteError> {
    attach::attach(&Client::new(socket)?, id)
}

/// Makes a guest of the `body` of `POST /vms`, and shows its name, or all of it as JSON.
///
/// # Errors
/// [`RemoteError`].
pub fn create(socket: &Path, json: bool, body: &Value) -> Result<(), RemoteError> {
    let client = Client::new(socket)?;
    let mut made = client.call(Method::POST, "/vms", Some(body))?;
    if json {
        show(&made, true, list_table);
    } else {
        println!("{}", word(&made["id"].take()));
    }
    Ok(())
}

/// Carries out a command with the daemon at `socket`, and shows its result, as JSON or for people.
///
/// # Errors
/// [`RemoteError`].
pub fn run(socket: &Path, json: bool, command: GuestCommand) -> Result<(), RemoteError> {
    let client = Client::new(socket)?;
    let each = |ids: Vec<String>, work: &dyn Fn(&str) -> Result<Value, RemoteError>| {
        let done = ids.iter().map(|id| work(id));
        let done = done.collect::<Result<Vec<_>, _>>()?;
        show(&Value::Array(done), json, list_table);
        Ok::<_, RemoteError>(())
    };
    let act = |id: &str, action: &str, body: Option<&Value>| {
        client.call(
            Method::POST,
            &format!("/vms/{}/{action}", escaped(id)),
            body,
        )
    };
    match command {
        GuestCommand::List => {
            let vms = client.call(Method::GET, "/vms", None)?;
            show(&vms["vms"], json, list_table);
        }
        GuestCommand::Show { id } => {
            let mut vm = client.call(Method::GET, &format!("/vms/{}?stats", escaped(&id)), None)?;
            if !vm["pid"].is_null() {
                // Only its process knows these. A guest whose process hangs or has just ended is shown without, and is
                // not asked again after it has failed to answer once.
                for part in ["jail", "sharing"] {
                    let path = format!("/vms/{}/vm/{part}", escaped(&id));
                    let Ok(report) = client.call(Method::GET, &path, None) else {
                        vm[part] = Value::Null;
                        break;
                    };
                    vm[part] = report;
                }
            }
            show(&vm, json, details);
        }
        GuestCommand::Start { id } => each(id, &|id| act(id, "start", None))?,
        GuestCommand::Stop { id, timeout, force } => {
            let body = json!({"timeout_s": if force { 0 } else { timeout }});
            each(id, &|id| act(id, "stop", Some(&body)))?;
        }
        GuestCommand::Pause { id } => each(id, &|id| act(id, "pause", None))?,
        GuestCommand::Resume { id } => each(id, &|id| act(id, "resume", None))?,
        GuestCommand::Delete { id, timeout } => {
            for id in &id {
                let path = format!("/vms/{}?timeout_s={timeout}", escaped(id));
                client.call(Method::DELETE, &path, None)?;
            }
            if json {
                println!("{}", json!({"deleted": id}));
            }
        }
        GuestCommand::Console { id } => attach::attach(&client, &id)?,
        GuestCommand::Stats { id } => {
            let mut vms = client.call(Method::GET, "/vms?stats", None)?;
            if let (Value::Array(vms), false) = (&mut vms["vms"], id.is_empty()) {
                vms.retain(|vm| id.iter().any(|id| vm["id"] == id.as_str()));
            }
            show(&vms["vms"], json, stats_table);
        }
        GuestCommand::Template(command) => templates(&client, command, json)?,
    }
    Ok(())
}

fn templates(client: &Client, command: TemplateCommand, json: bool) -> Result<(), RemoteError> {
    match command {
        TemplateCommand::Create { id, vm } => {
            let body = json!({"id": id, "vm": vm});
            let made = client.call(Method::POST, "/templates", Some(&body))?;
            show(&Value::Array(vec![made]), json, template_table);
        }
        TemplateCommand::List => {
            let all = client.call(Method::GET, "/templates", None)?;
            show(&all, json, template_table);
        }
        TemplateCommand::Delete { id } => {
            for id in &id {
                let path = format!("/templates/{}", escaped(id));
                client.call(Method::DELETE, &path, None)?;
            }
            if json {
                println!("{}", json!({"deleted": id}));
            }
        }
    }
    Ok(())
}

fn show(value: &Value, json: bool, text: fn(&Value) -> String) {
    if json {
        // Also JSON, which may be shown by a terminal, and stays the same JSON.
        println!("{}", printable_lines(&format!("{value:#}")));
    } else {
        print!("{}", text(value));
    }
}

/// A value in a table, as a terminal can be given it: guests and other users have chosen names and reasons.
fn word(value: &Value) -> String {
    let text = match value {
        Value::Null => return "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    };
    printable(&text).into_owned()
}

fn table(vms: &Value, header: &[&str], row: impl Fn(&Value) -> Vec<String>) -> String {
    let header = header.iter().map(ToString::to_string).collect();
    let rows = vms.as_array().into_iter().flatten().map(row);
    columns(&std::iter::once(header).chain(rows).collect::<Vec<_>>())
}

fn list_table(vms: &Value) -> String {
    let header = [
        "guest", "state", "vcpus", "MiB", "pid", "uptime s", "restarts",
    ];
    table(vms, &header, |vm| {
        let fields = [
            "id",
            "state",
            "vcpus",
            "mem_size_mib",
            "pid",
            "uptime_s",
            "restarts",
        ];
        fields.map(|field| word(&vm[field])).to_vec()
    })
}

fn template_table(templates: &Value) -> String {
    let header = ["template", "of", "parent", "vcpus", "RAM MiB", "file KiB"];
    table(templates, &header, |template| {
        let kib = template["memory_bytes"].as_u64().unwrap_or(0) / 1024;
        let fields = ["id", "vm", "parent", "vcpus", "mem_size_mib"];
        let words = fields.map(|field| word(&template[field])).into_iter();
        words.chain([kib.to_string()]).collect()
    })
}

fn stats_table(vms: &Value) -> String {
    let header = [
        "guest",
        "state",
        "RAM MiB",
        "private KiB",
        "shared KiB",
        "proportional KiB",
        "CPU s",
    ];
    table(vms, &header, |vm| {
        let memory = &vm["memory"];
        vec![
            word(&vm["id"]),
            word(&vm["state"]),
            word(&vm["mem_size_mib"]),
            word(&memory["private_kib"]),
            word(&memory["shared_kib"]),
            word(&memory["proportional_kib"]),
            word(&vm["cpu_s"]),
        ]
    })
}

/// The layers of a jail in a line, its user, and what is missing.
fn jail(report: &Value) -> String {
    let list = |field: &str| report[field].as_array().cloned().unwrap_or_default();
    let layers: Vec<_> = list("layers").iter().map(word).collect();
    let mut text = layers.join(" ");
    if report["jailed"] == true {
        let _ = write!(text, "; uid {}", word(&report["uid"]));
        let missing = list("missing");
        let missing: Vec<_> = missing.iter().map(|one| word(&one["layer"])).collect();
        if !missing.is_empty() {
            let _ = write!(text, "; without {}", missing.join(" "));
        }
    } else {
        text.push_str("; no jail");
    }
    text
}

/// What is shared of a guest's memory in a line, and why it is little where the layout of a disk is to blame.
fn sharing(report: &Value) -> String {
    let mut text = word(&report["mode"]);
    if report["mostly_unaligned"] == true {
        let _ = write!(
            text,
            "; reads are mostly unaligned, and not shared: see `coppice disk info` of its disks"
        );
    }
    text
}

/// One fact a line.
fn details(vm: &Value) -> String {
    let facts = vm.as_object().into_iter().flatten();
    let rows = facts.filter(|(name, _)| *name != "config");
    let mut text = String::new();
    for (name, value) in rows {
        let value = match (name.as_str(), value) {
            ("end", Value::Object(end)) => word(&end["text"]),
            ("jail", Value::Object(_)) => jail(value),
            ("sharing", Value::Object(_)) => sharing(value),
            _ => word(value),
        };
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name:<14} {value}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_a_table_and_what_is_unknown_is_a_dash() {
        let vms = json!([
            {"id": "web", "state": "running", "vcpus": 2, "mem_size_mib": 256, "pid": 12, "uptime_s": 3, "restarts": 0},
            {"id": "a", "state": "stopped", "vcpus": 1, "mem_size_mib": 128, "pid": null, "uptime_s": null, "restarts": 1},
        ]);
        let text = list_table(&vms);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[1],
            "web    running      2  256   12         3         0"
        );
        assert!(lines[2].contains('-'));
        assert!(stats_table(&vms).contains("web"));
    }

    #[test]
    fn no_text_of_a_guest_is_a_command_to_the_terminal() {
        let evil = "\x1b]0;x\x07\u{9b}2J\r\n\u{202e}";
        let vm = json!({
            "id": evil, "state": evil, "labels": {evil: evil}, "end": {"text": evil}, "template": evil,
            "jail": {"jailed": true, "layers": [evil], "uid": evil, "missing": [{"layer": evil}]},
            "sharing": {"mode": evil},
        });
        let vms = json!([vm]);
        for text in [
            list_table(&vms),
            stats_table(&vms),
            details(&vm),
            template_table(&vms),
        ] {
            assert_eq!(text, printable_lines(&text));
            assert!(
                text.contains("\\u001b]0;x\\u0007\\u009b2J\\u000d\\u000a\\u202e"),
                "{text}"
            );
        }
        assert_eq!(details(&vm).lines().count(), 7);
    }

    #[test]
    fn a_jail_is_its_layers_and_what_it_lacks() {
        let mut report = json!({
            "jailed": true, "layers": ["tree", "seccomp"], "uid": 7,
            "missing": [{"layer": "cgroup", "why": "no cgroup= was given"}],
        });
        assert_eq!(jail(&report), "tree seccomp; uid 7; without cgroup");
        report["jailed"] = json!(false);
        assert_eq!(jail(&report), "tree seccomp; no jail");
        assert!(details(&json!({"jail": report})).contains("no jail"));
    }

    #[test]
    fn a_guest_whose_reads_are_mostly_unaligned_is_reported() {
        let mut report = json!({"mode": "all", "mostly_unaligned": false});
        assert_eq!(sharing(&report), "all");
        report["mostly_unaligned"] = json!(true);
        let text = details(&json!({"sharing": report}));
        assert!(
            text.starts_with("sharing        all; reads are mostly unaligned"),
            "{text}"
        );
        assert!(text.contains("`coppice disk info`"), "{text}");
    }
}
