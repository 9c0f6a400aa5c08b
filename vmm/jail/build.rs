//! Compiles the seccomp policies of `resources/seccomp` into tables of BPF instructions, so that no guest process
//! parses any.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

use seccompiler::{BpfMap, TargetArch, compile_from_json};
use serde_json::{Value, json};

/// The policies, each a file that holds one filter of its own name.
const POLICIES: [&str; 6] = ["main", "vcpu", "started", "unconnected", "absent", "reader"];

fn main() -> Result<(), Box<dyn Error>> {
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("../../resources/seccomp");
    println!("cargo::rerun-if-changed={}", folder.display());
    println!("cargo::rerun-if-changed=build.rs");
    let mut source = String::new();
    for name in POLICIES {
        let text = fs::read_to_string(folder.join(name).with_extension("json"))?;
        let policy: Value =
            serde_json::from_str(&text).map_err(|error| format!("{name}: {error}"))?;
        let traps = text.contains("\"trap\"");
        let variants = [("", None), ("_LOG", Some("log"))];
        for (suffix, action) in &variants[..if traps { 2 } else { 1 }] {
            let table = format!("{}{suffix}", name.to_uppercase());
            write_table(
                &mut source,
                &table,
                &compile(&with_action(policy.clone(), *action), name)?,
            )?;
        }
    }
    write_names(&mut source, &fs::read_to_string(folder.join("names.txt"))?)?;
    fs::write(Path::new(&env::var("OUT_DIR")?).join("seccomp.rs"), source)?;
    Ok(())
}

/// The policy with another action in place of `trap`.
fn with_action(mut policy: Value, action: Option<&str>) -> Value {
    let Some(action) = action else {
        return policy;
    };
    let filters = policy.as_object_mut().into_iter().flatten();
    for (_, filter) in filters {
        for field in ["mismatch_action", "match_action"] {
            if let Some(value) = filter.get_mut(field)
                && *value == json!("trap")
            {
                *value = json!(action);
            }
        }
    }
    policy
}

fn compile(policy: &Value, name: &str) -> Result<seccompiler::BpfProgram, Box<dyn Error>> {
    let text = policy.to_string();
    let mut filters: BpfMap = compile_from_json(text.as_bytes(), TargetArch::x86_64)
        .map_err(|error| format!("{name}: {error}"))?;
    let filter = filters.remove(name);
    filter.ok_or_else(|| format!("{name}.json holds no filter {name}").into())
}

fn write_table(
    source: &mut String,
    table: &str,
    program: &[seccompiler::sock_filter],
) -> std::fmt::Result {
    writeln!(
        source,
        "pub(super) static {table}: [sock_filter; {}] = [",
        program.len()
    )?;
    for instruction in program {
        writeln!(
            source,
            "sock_filter {{ code: {}, jt: {}, jf: {}, k: {} }},",
            instruction.code, instruction.jt, instruction.jf, instruction.k
        )?;
    }
    writeln!(source, "];")
}

/// Writes the names of system calls by number. A number that no system call has gets an empty name.
fn write_names(source: &mut String, text: &str) -> Result<(), Box<dyn Error>> {
    let mut names = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (number, name) = line.split_once(' ').ok_or("names.txt: NUMBER NAME")?;
        names.insert(number.parse::<usize>()?, name);
    }
    let len = names.last_key_value().map_or(0, |(number, _)| number + 1);
    writeln!(source, "pub(super) static NAMES: [&str; {len}] = [")?;
    for number in 0..len {
        writeln!(source, "{:?},", names.get(&number).unwrap_or(&""))?;
    }
    writeln!(source, "];")?;
    Ok(())
}
