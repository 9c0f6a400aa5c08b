//! The check of comments at its limit and beyond it.

use tree::comments::{self, MAX_COLUMNS};

/// A line of this many columns, whose characters are of two bytes each behind `start`.
fn line(start: &str, columns: usize) -> String {
    let rest = columns - start.chars().count();
    format!("{start}{}", "ä".repeat(rest))
}

#[test]
fn a_comment_may_have_as_many_characters_as_the_limit_and_no_more() {
    for start in ["// ", "/// ", "//! ", "        // "] {
        let text = [line(start, MAX_COLUMNS), line(start, MAX_COLUMNS + 1)].join("\n");
        assert_eq!(comments::wide_lines(&text), [2], "{start:?}");
    }
}

#[test]
fn a_line_of_code_is_not_a_comment_however_wide_it_is() {
    let text = line("let text = \"", 200) + "\"; // why";
    assert_eq!(comments::wide_lines(&text), [0; 0]);
}

#[test]
fn wide_comments_are_found_in_every_folder_of_the_workspace_and_not_in_what_is_built_of_it() {
    let root = tempfile::tempdir().expect("a folder");
    let wide = format!("mod a;\n{}\n", line("// ", MAX_COLUMNS + 1));
    let files = [
        ("a/src/lib.rs", &*wide),
        ("a/src/narrow.rs", "// short"),
        ("a/build.rs", &wide),
        ("a/src/notes.md", &wide),
        ("target/debug/made.rs", &wide),
        (".hidden/a.rs", &wide),
    ];
    for (name, text) in files {
        let path = root.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("to make it");
        std::fs::write(path, text).expect("to write");
    }
    let found = comments::find(root.path()).expect("files that can be read");
    let expected = ["a/build.rs", "a/src/lib.rs"].map(|name| (root.path().join(name), 2));
    assert_eq!(found, expected);
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let root = tempfile::tempdir().expect("a folder");
    std::fs::write(root.path().join("a.rs"), [0xff]).expect("to write");
    let error = comments::find(root.path()).expect_err("no UTF-8");
    assert!(error.to_string().ends_with("a.rs"), "{error}");
}
