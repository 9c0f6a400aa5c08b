//! Prints what keeps the workspace from being a tree, and which comments are too wide, and fails where there is
//! anything: see the library.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use tree::circles::{self, Circle};
use tree::module::Module;
use tree::{comments, crates, imports, source, uncut};

fn main() -> ExitCode {
    match check() {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            let mut text = format!("tree: {error}");
            let mut source = error.source();
            while let Some(error) = source {
                // Writing to a string cannot fail.
                let _ = write!(text, ": {error}");
                source = error.source();
            }
            eprintln!("{text}");
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
    let wants_all = std::env::args().any(|argument| argument == "--all");
    let (mut modules_seen, mut circles_seen, mut new) = (0, 0, 0);
    let mut levels = BTreeSet::new();
    for one in &crates {
        let is_checked = |kind: &String| kind == "lib" || kind == "bin";
        for target in one
            .targets
            .iter()
            .filter(|target| target.kind.iter().any(is_checked))
        {
            let modules = source::read(&target.src_path)?;
            let circles = circles::find(&modules, &imports::edges(&modules));
            modules_seen += modules.len();
            circles_seen += circles.len();
            for circle in &circles {
                let level = (one.name.as_str(), modules[circle.parent].name());
                let is_known = uncut::is_known(&level);
                new += usize::from(!is_known);
                if !is_known || wants_all {
                    print!("{}", describe(&one.name, &modules, circle));
                }
                levels.insert(level);
            }
        }
    }
    let cut = uncut::cut(&levels);
    for (name, parent) in &cut {
        println!("{parent} of {name} has no circles any more: take it off the list of uncut.rs");
    }
    println!(
        "{} crates, {} dependencies that are not allowed; {modules_seen} modules, {circles_seen} circles, \
         {} of them known (cargo run -p tree -- --all)",
        crates.len(),
        violations.len(),
        circles_seen - new,
    );
    let wide = comments::find(&root)?;
    for (file, line) in &wide {
        println!(
            "{}:{line}: a comment of more than {} columns",
            relative(file),
            comments::MAX_COLUMNS
        );
    }
    Ok(violations.len() + new + cut.len() + wide.len())
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
