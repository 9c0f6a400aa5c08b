//! Small crates, each written for one test, and the result of the check of their modules.

use std::path::Path;

use tree::circles;
use tree::imports;
use tree::source;

/// Writes a crate of these files, and returns its circles: for each its members, and its uses as `user -> definer
/// item:line`.
fn circles_of(files: &[(&str, &str)]) -> Vec<(Vec<String>, Vec<String>)> {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, text) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("to make it");
        std::fs::write(&path, text).expect("to write");
    }
    let modules = source::read(&folder.path().join("lib.rs")).expect("Rust");
    let describe = |circle: circles::Circle| {
        let members = circle
            .members
            .iter()
            .map(|member| modules[*member].name())
            .collect();
        let edges = circle.edges.iter().map(|edge| {
            let (from, to) = (modules[edge.from].name(), modules[edge.to].name());
            format!("{from} -> {to} {}:{}", edge.item, edge.line)
        });
        (members, edges.collect())
    };
    circles::find(&modules, &imports::edges(&modules))
        .into_iter()
        .map(describe)
        .collect()
}

#[test]
fn two_modules_that_import_each_other_are_a_circle() {
    let found = circles_of(&[
        ("lib.rs", "mod a;\nmod b;\nmod c;\n"),
        ("a.rs", "use crate::b::B;\npub struct A(B);\n"),
        (
            "b.rs",
            "pub struct B;\n\nimpl B {\n    fn of(_: &super::a::A) {}\n}\n",
        ),
        (
            "c.rs",
            "use crate::a::A;\nuse crate::b::B;\nstruct C(A, B);\n",
        ),
    ]);
    let members = vec!["crate::a".to_owned(), "crate::b".to_owned()];
    let edges = vec![
        "crate::a -> crate::b B:1".to_owned(),
        "crate::b -> crate::a A:4".to_owned(),
    ];
    assert_eq!(found, [(members, edges)]);
}

#[test]
fn a_circle_over_three_modules_is_found() {
    let found = circles_of(&[
        ("lib.rs", "mod a;\nmod b;\nmod c;\n"),
        ("a.rs", "pub const A: u8 = crate::b::B;\n"),
        ("b.rs", "pub const B: u8 = crate::c::C;\n"),
        ("c.rs", "pub const C: u8 = crate::a::A;\n"),
    ]);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].0, ["crate::a", "crate::b", "crate::c"]);
}

#[test]
fn modules_that_use_each_other_one_way_are_no_circle() {
    let found = circles_of(&[
        (
            "lib.rs",
            "mod a;\nmod b;\nmod c;\npub use a::A;\npub fn run() { c::c(A) }\n",
        ),
        ("a.rs", "pub struct A;\n"),
        ("b.rs", "use crate::a::A;\npub fn b(_: A) {}\n"),
        (
            "c.rs",
            "use crate::{a::A, b};\npub fn c(a: A) { b::b(a) }\n",
        ),
    ]);
    assert_eq!(found, []);
}

#[test]
fn re_export_leads_to_the_module_that_defines() {
    // `Error` is taken from the parent, which has it from `error`: no own item of the parent is used.
    let facade = [
        (
            "lib.rs",
            "mod disk;\nmod error;\npub use disk::Disk;\npub use error::Error;\npub fn open() -> Disk { disk::open() }\n",
        ),
        (
            "disk.rs",
            "use crate::Error;\npub struct Disk;\npub fn open() -> Disk { Disk }\nfn f() -> Error { Error }\n",
        ),
        ("error.rs", "pub struct Error;\n"),
    ];
    assert_eq!(circles_of(&facade), []);
}

#[test]
fn child_that_uses_its_parents_own_item_is_a_circle_if_the_parent_uses_the_child() {
    let child = "use super::Error;\npub struct Disk;\npub fn open() -> Error { Error }\n";
    let used = "mod disk;\npub struct Error;\npub fn open() -> Error { disk::open() }\n";
    let found = circles_of(&[("lib.rs", used), ("disk.rs", child)]);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].0, ["crate", "crate::disk"]);

    let only_shown = "mod disk;\npub use disk::Disk;\npub struct Error;\n";
    assert_eq!(
        circles_of(&[("lib.rs", only_shown), ("disk.rs", child)]),
        []
    );

    let shown_and_named = "mod disk;\npub use disk::Disk;\npub struct Error;\nfn f(_: Disk) {}\n";
    assert_eq!(
        circles_of(&[("lib.rs", shown_and_named), ("disk.rs", child)]).len(),
        1
    );
}

#[test]
fn folders_that_use_each_other_are_a_circle_where_no_two_files_do() {
    let found = circles_of(&[
        ("lib.rs", "mod a;\nmod b;\n"),
        ("a/mod.rs", "pub mod low;\nmod high;\n"),
        ("a/low.rs", "pub struct Low;\n"),
        (
            "a/high.rs",
            "use crate::b::middle::Middle;\nstruct High(Middle);\n",
        ),
        ("b/mod.rs", "pub mod middle;\n"),
        (
            "b/middle.rs",
            "use crate::a::low::Low;\npub struct Middle(Low);\n",
        ),
    ]);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].0, ["crate::a", "crate::b"]);
}

#[test]
fn code_of_tests_does_not_count() {
    let found = circles_of(&[
        ("lib.rs", "mod a;\nmod b;\n#[cfg(test)]\nmod tests;\n"),
        (
            "a.rs",
            "pub struct A;\n#[cfg(test)]\nmod tests {\n    use crate::b::B;\n}\n#[cfg(test)]\nuse crate::b::C;\nimpl A {\n    #[cfg(all(test, unix))]\n    fn f(_: crate::b::B) {}\n}\n",
        ),
        (
            "b.rs",
            "use crate::a::A;\npub struct B(A);\npub struct C;\n",
        ),
    ]);
    assert_eq!(found, []);
}

#[test]
fn code_under_other_conditions_counts() {
    let found = circles_of(&[
        ("lib.rs", "mod a;\nmod b;\n"),
        (
            "a.rs",
            "pub struct A;\n#[cfg(any(test, feature = \"fuzzing\"))]\nuse crate::b::B;\n#[cfg(not(test))]\nuse crate::b::C;\n",
        ),
        (
            "b.rs",
            "use crate::a::A;\npub struct B(A);\npub struct C;\n",
        ),
    ]);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].1.len(), 3);
}

#[test]
fn path_in_a_macro_or_in_a_string_of_serde_counts() {
    for user in [
        "pub struct A;\nfn f() { println!(\"{}\", crate::b::value()); }\n",
        "pub struct A;\nstruct S {\n    #[serde(default = \"crate::b::value\")]\n    x: u8,\n}\n",
        "pub struct A;\nfn f() {\n    use super::b;\n    b::value();\n}\n",
        "pub struct A;\nuse crate::b as other;\nfn f() { other::value(); }\n",
        "pub struct A;\nuse crate::b::*;\nfn f() { value(); }\n",
    ] {
        let found = circles_of(&[
            ("lib.rs", "mod a;\nmod b;\n"),
            ("a.rs", user),
            (
                "b.rs",
                "use crate::a::A;\npub fn value() -> u8 { 0 }\nstruct B(A);\n",
            ),
        ]);
        assert_eq!(found.len(), 1, "{user}");
    }
}

#[test]
fn a_path_that_limits_visibility_does_not_count() {
    let found = circles_of(&[
        ("lib.rs", "mod a;\nstruct Root;\nfn f() { a::f(); }\n"),
        (
            "a.rs",
            "//! Of [`crate::Root`].\npub(in crate) struct A;\n/// [`crate::Root`]\npub(super) fn f() { let root = A; root.x(); }\n",
        ),
    ]);
    assert_eq!(found, []);
}

#[test]
fn module_and_function_of_one_name_are_distinguished() {
    let found = circles_of(&[
        ("lib.rs", "mod open;\nmod raw;\npub use open::open;\n"),
        (
            "open.rs",
            "pub struct Refusal;\npub fn open() { crate::raw::raw() }\n",
        ),
        (
            "raw.rs",
            "use crate::open;\npub fn raw() {}\nfn f(_: open::Other) {}\n",
        ),
    ]);
    // `open::Other`, which a macro may have made, is in the module; the import itself may be of the function.
    let edges = &found[0].1;
    assert!(
        edges.contains(&"crate::raw -> crate::open Other:3".to_owned()),
        "{edges:?}"
    );
    assert!(
        edges.iter().all(|edge| !edge.contains("open:3")),
        "{edges:?}"
    );
}

#[test]
fn module_without_a_file_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path().join("lib.rs");
    std::fs::write(&root, "mod gone;\n").expect("to write");
    let error = source::read(Path::new(&root)).expect_err("no file");
    assert!(matches!(error, source::SourceError::Missing { name, .. } if name == "gone"));
}
