//! Prints what keeps the workspace from being a tree, and which comments are too wide, and fails where there is
//! anything: see the library.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use tree::circles::{self, Circle};
use tree::module::{Breach, Module};
use tree::{comments, crates, imports, source};

fn main() -> ExitCode {
    match check() {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("tree: {}", report::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

/// Checks crates, modules and comments, and returns how much is wrong.
fn check() -> Result<usize, Box<dyn Error>> {
    let crates::Workspace { crates, root } = crates::read()?;
    let violations = crates::violations(&crates);
    for line in &violations {
        println!("{line}");
    }
    let (mut modules_seen, mut circles_seen, mut breaches) = (0, 0, 0);
    for one in &crates {
        let is_checked = |kind: &String| kind == "lib" || kind == "bin";
        for target in one
            .targets
            .iter()
            .filter(|target| target.kind.iter().any(is_checked))
        {
            let modules = source::read(&target.src_path)?;
            modules_seen += modules.len();
            for circle in circles::find(&modules, &imports::edges(&modules)) {
                circles_seen += 1;
                print!("{}", describe(&one.name, &modules, &circle));
            }
            // The reporter is where sources are looked at one by one.
            for module in modules.iter().filter(|_| one.name != crates::REPORTER) {
                breaches += module.breaches.len();
                for Breach { line, what } in &module.breaches {
                    println!("{}:{line}: {what}", relative(&module.file));
                }
            }
        }
    }
    println!(
        "{} crates, {} dependencies that are not allowed; {modules_seen} modules, {circles_seen} circles; \
         {breaches} errors without their sources",
        crates.len(),
        violations.len(),
    );
    let wide = comments::find(&root)?;
    for (file, line) in &wide {
        println!(
            "{}:{line}: a comment of more than {} columns",
            relative(file),
            comments::MAX_COLUMNS
        );
    }
    Ok(violations.len() + circles_seen + breaches + wide.len())
}

fn describe(name: &str, modules: &[Module], circle: &Circle) -> String {
    let members: Vec<_> = circle
        .members
        .iter()
        .map(|member| match modules[*member].name() {
            own if *member == circle.parent => format!("{own} itself"),
            child => child,
        })
        .collect();
    let mut text = format!("\ncircle in {name}: {}\n", members.join(", "));
    let mut pairs: BTreeMap<(usize, usize), Vec<String>> = BTreeMap::new();
    for edge in &circle.edges {
        let item = format!(
            "{} ({}:{})",
            edge.item,
            relative(&modules[edge.from].file),
            edge.line
        );
        pairs.entry((edge.from, edge.to)).or_default().push(item);
    }
    for ((from, to), items) in pairs {
        let (from, to) = (modules[from].name(), modules[to].name());
        // Writing to a string cannot fail.
        let _ = writeln!(text, "    {from} uses {to}: {}", items.join(", "));
    }
    text
}

fn relative(file: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    file.strip_prefix(&here)
        .unwrap_or(file)
        .display()
        .to_string()
}
