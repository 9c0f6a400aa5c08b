//! The reference of metrics for readers: `docs/reference/metrics-guest.md` has to be what is made here.

use std::fmt::Write as _;

use expect_test::expect_file;

use super::full;

/// Names, kinds and meanings, for readers: a line of a table for each metric of `text`.
fn table(text: &str) -> String {
    let mut table = "| metric | kind | labels | |\n|---|---|---|---|\n".to_owned();
    for metric in text.split("# HELP ").skip(1) {
        let (about, rest) = metric.split_once('\n').unwrap();
        let (name, help) = about.split_once(' ').unwrap();
        let kind = rest.lines().next().and_then(|line| line.rsplit(' ').next());
        let kind = kind.unwrap();
        let suffix = if kind == "counter" { "_total" } else { "" };
        let sample = rest.lines().find_map(|line| line.split(['{', '}']).nth(1));
        let labels = sample.unwrap_or_default().split(',');
        let labels = labels.filter_map(|label| label.split_once('='));
        let labels = labels.filter(|(label, _)| *label != "le");
        let labels = labels.map(|(label, _)| format!("`{label}`"));
        let labels = labels.collect::<Vec<_>>().join(", ");
        writeln!(table, "| `{name}{suffix}` | {kind} | {labels} | {help} |").unwrap();
    }
    table
}

#[test]
fn the_reference_of_metrics_is_current() {
    let head = "# Metrics of a guest\n\nWritten here by `make reference`; do not edit. [Metrics](metrics.md) says how they are asked for.\n\n";
    let page = format!("{head}{}", table(&full().encode().unwrap()));
    expect_file!["../../../../../../docs/reference/metrics-guest.md"].assert_eq(&page);
}
