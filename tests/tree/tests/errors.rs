//! Which code breaks the rule for errors, and which does not.

use tree::source;

/// The breaches of a crate of one file, each as `line: what`.
fn breaches_of(text: &str) -> Vec<String> {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path().join("lib.rs");
    std::fs::write(&root, text).expect("to write");
    let modules = source::read(&root).expect("Rust");
    modules[0]
        .breaches
        .iter()
        .map(|breach| format!("{}: {}", breach.line, breach.what))
        .collect()
}

/// The breaches of an enum with this one variant, which begins in line 2.
fn breaches_of_variant(variant: &str) -> Vec<String> {
    breaches_of(&format!("enum Wrong {{\n{variant}\n}}\n"))
}

#[test]
fn text_that_repeats_its_source_is_found() {
    for (variant, name) in [
        (r#"#[error("io: {0}")] Io(#[from] io::Error)"#, "0"),
        (r#"#[error("io: {0:?}")] Io(#[source] io::Error)"#, "0"),
        (r#"#[error("io: {}", .0)] Io(#[source] Wrapped)"#, "0"),
        (
            r#"#[error("{what}: {source}")] Io { what: String, source: Wrapped }"#,
            "source",
        ),
        (
            r#"#[error("{what}: {why}", why = error.kind())] Io { what: String, #[source] error: Wrapped }"#,
            "error",
        ),
    ] {
        let expected = format!("2: the text of an error repeats its source `{name}`");
        assert_eq!(breaches_of_variant(variant), [expected], "{variant}");
    }
    let expected = "3: the text of an error repeats its source `reason`";
    let text = "#[error(\"{}: {reason}\", path.display())]\nstruct Wrong { path: PathBuf,\n#[source] reason: Why }\n";
    assert_eq!(breaches_of(text), [expected]);
}

#[test]
fn error_that_is_no_source_is_found() {
    for (variant, name) in [
        (r#"#[error("io: {0}")] Io(io::Error)"#, "0"),
        (r#"#[error("io")] Io(Box<OpenError>)"#, "0"),
        (
            r#"#[error("io: {why}")] Io { why: Box<dyn Error + Send> }"#,
            "why",
        ),
        (
            r#"#[error("{reason}")] Parent { reason: Refusal }"#,
            "reason",
        ),
        // Beside a source, an error has to be in the text.
        (
            r#"#[error("both")] Both { first: io::Error, source: io::Error }"#,
            "first",
        ),
    ] {
        let expected = format!("2: `{name}` is an error, and no source of the one that has it");
        assert_eq!(breaches_of_variant(variant), [expected], "{variant}");
    }
}

#[test]
fn text_that_leaves_its_source_to_the_chain_is_right() {
    for variant in [
        r#"#[error("io")] Io(#[from] io::Error)"#,
        r"#[error(transparent)] Io(#[from] io::Error)",
        r#"#[error("{}", path.display())] Io { path: PathBuf, source: io::Error }"#,
        r#"#[error("{{0}}: {1}")] Io(#[source] io::Error, u8)"#,
        // What to do about it is not what it says.
        r#"#[error("kvm ({advice})", advice = advice(*.0))] Open(#[source] errno::Error)"#,
        r#"#[error("{first}, and the other")] Both { first: io::Error, source: io::Error }"#,
        // A type that derives nothing of thiserror may have what it likes.
        r"Failed(io::Error)",
    ] {
        assert_eq!(breaches_of_variant(variant), [""; 0], "{variant}");
    }
}

#[test]
fn error_that_is_shown_without_its_sources_is_found() {
    for statement in [
        r#"println!("no: {error}")"#,
        r#"println!("no: {error:>9}")"#,
        r#"println!("no: {}", error)"#,
        r#"println!("no: {}", &self.source)"#,
        r#"println!("no: {why}", why = err)"#,
        r#"let text = format!("a: {}", format_args!("b: {e}"))"#,
        r#"write!(f, "{refusal}")"#,
        r#"panic!("{}: {error}", path.display())"#,
        r#"tracing::warn!(%error, "no")"#,
        r#"tracing::warn!(vm = %vm.id, error = %fault, "no")"#,
        r#"tracing::warn!(error = %self.error, "no")"#,
        // The log in JSON has no sources of it.
        r#"tracing::warn!(error, "no")"#,
        r#"debug!(error = &error as &dyn Error, "no")"#,
        "let text = error.to_string()",
        "let done = done().map_err(|e| e.to_string())",
    ] {
        let found = breaches_of(&format!("fn f() {{\n{statement};\n}}\n"));
        let expected = ["2: an error is shown without its sources"];
        assert_eq!(found, expected, "{statement}");
    }
}

#[test]
fn error_that_is_shown_with_its_sources_is_right() {
    for statement in [
        r#"println!("no: {}", chain(&error))"#,
        r#"tracing::warn!(error = %report::chain(&error), "no")"#,
        "let text = chain(&error).to_string()",
        // Its fields are not the error, nor is what tells one from another.
        r#"println!("{}: {:?}", error.path().display(), error.kind())"#,
        r#"println!("{error:?}")"#,
        "let text = error.kind().to_string()",
        r#"println!("{why}")"#,
        r#"println!("{{error}}")"#,
        r#"writeln!(err, "no")"#,
        "other!(error)",
        "fn of(error: Error) {}",
    ] {
        let found = breaches_of(&format!("fn f() {{\n{statement};\n}}\n"));
        assert_eq!(found, [""; 0], "{statement}");
    }
}

#[test]
fn code_of_tests_may_show_an_error_as_it_likes() {
    let found = breaches_of(
        "#[cfg(test)]\nmod tests {\n    fn f() { panic!(\"{error}\"); }\n}\n#[cfg(test)]\nfn g() { error.to_string(); }\n",
    );
    assert_eq!(found, [""; 0]);
}
