//! Which dependency between crates is refused.

use tree::crates::{self, Crate, Dependency};

fn crate_of(name: &str, uses: &[(&str, Option<&str>)]) -> Crate {
    let dependency = |(name, kind): &(&str, Option<&str>)| Dependency {
        name: (*name).to_owned(),
        path: Some("here".into()),
        kind: kind.map(str::to_owned),
    };
    Crate {
        name: name.to_owned(),
        dependencies: uses.iter().map(dependency).collect(),
        targets: Vec::new(),
    }
}

#[test]
fn crate_may_use_what_lies_below_it() {
    for (user, used) in [
        ("storage", "report"),
        ("lab", "report"),
        ("devices", "storage"),
        ("devices", "memshare"),
        ("config", "storage"),
        ("kvm", "config"),
        ("daemon", "config"),
        ("tools", "daemon"),
        ("coppice", "bench"),
    ] {
        assert_eq!(
            crates::violations(&[crate_of(user, &[(used, None)])]),
            [""; 0],
            "{user} {used}"
        );
    }
}

#[test]
fn crate_may_not_use_what_lies_above_or_beside_it() {
    for (user, used) in [
        ("report", "storage"),
        ("storage", "memshare"),
        ("memshare", "storage"),
        ("storage", "devices"),
        ("devices", "config"),
        ("config", "kvm"),
        ("machine", "control"),
        ("daemon", "bench"),
        ("host", "config"),
        ("daemon", "cli"),
        ("bench", "tools"),
        ("tools", "coppice"),
        ("lab", "coppice"),
    ] {
        // The one test that looks upward is named in the table.
        let kinds = [None, Some("build"), Some("dev")];
        let is_named = crates::UPWARD.contains(&(user, used));
        for kind in kinds.into_iter().take(if is_named { 2 } else { 3 }) {
            let found = crates::violations(&[crate_of(user, &[(used, kind)])]);
            assert_eq!(found, [format!("crate {user} may not use {used}")]);
        }
    }
}

#[test]
fn only_tests_use_the_helpers_of_tests_and_what_the_table_names() {
    assert_eq!(
        crates::violations(&[crate_of("daemon", &[("cli", Some("dev"))])]),
        [""; 0]
    );
    assert_eq!(
        crates::violations(&[crate_of("storage", &[("skip", Some("dev"))])]),
        [""; 0]
    );
    assert_eq!(
        crates::violations(&[crate_of("storage", &[("skip", None)])]).len(),
        1
    );
}

#[test]
fn crate_without_a_place_is_refused() {
    let found = crates::violations(&[crate_of("new", &[])]);
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("crate new has no place"), "{found:?}");
}

#[test]
fn dependency_from_a_registry_is_left_alone() {
    let mut of_registry = crate_of("storage", &[("memshare", None)]);
    of_registry.dependencies[0].path = None;
    assert_eq!(crates::violations(&[of_registry]), [""; 0]);
}
