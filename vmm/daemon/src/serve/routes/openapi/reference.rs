//! The reference of the REST API for readers, made from the document: `docs/reference/rest-operations.md` has to be
//! what this gives.

use std::fmt::Write as _;

use expect_test::expect_file;
use serde_json::{Map, Value};

use super::document;
use crate::serve::guest_api::TAG as GUEST;

const HEAD: &str = "# REST operations

Made from the OpenAPI document by `make reference`; do not edit. [REST](rest.md) says what holds for all requests.
";
/// Tags in the order of the page, with their headings.
const SECTIONS: [(&str, &str); 5] = [
    (
        GUEST,
        "## The API of a guest\n\nOn a guest's own socket. The daemon serves the same below `/vms/{id}`, but for `PUT /snapshot/load`, which it refuses: on a guest's own socket, see [snapshots](../guide/snapshots.md).",
    ),
    ("guests", "## Daemon: guests"),
    ("templates", "## Daemon: templates"),
    ("images", "## Daemon: images"),
    ("daemon", "## Daemon: itself"),
];

/// Text for a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn description(of: &Value) -> String {
    cell(of["description"].as_str().unwrap_or_default())
}

fn object(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter)
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// What a schema is called; a link where it has a section of its own.
fn type_of(schema: &Value) -> String {
    if let Some(reference) = schema["$ref"].as_str() {
        let name = reference.rsplit('/').next().unwrap_or_default();
        return format!("[{name}](#{})", name.to_lowercase());
    }
    let is_null = |schema: &&Value| schema["type"] == "null";
    if let Some(inner) = list(&schema["oneOf"]).iter().find(|one| !is_null(one)) {
        return type_of(inner);
    }
    let mut names = list(&schema["type"]).iter().filter_map(Value::as_str);
    let named = schema["type"].as_str();
    match named.or_else(|| names.find(|name| *name != "null")) {
        Some("array") => format!("array of {}", type_of(&schema["items"])),
        Some("object") if schema["additionalProperties"].is_object() => {
            format!("object of {}", type_of(&schema["additionalProperties"]))
        }
        Some(name) => name.to_owned(),
        None => "any".to_owned(),
    }
}

/// The schema of a body or an answer, in whichever form it is sent.
fn content(of: &Value) -> Option<String> {
    let (_, form) = object(&of["content"]).next()?;
    Some(type_of(&form["schema"]))
}

fn operation(page: &mut String, method: &str, path: &str, operation: &Value) {
    let body = content(&operation["requestBody"]).unwrap_or_default();
    let responses = || object(&operation["responses"]);
    let done = responses().filter(|(code, _)| code.as_str() < "300");
    let answers = done.map(|(code, answer)| match content(answer) {
        Some(schema) => format!("{code} {schema}"),
        None => code.clone(),
    });
    let answers = answers.collect::<Vec<_>>().join(", ");
    let mut about = cell(operation["summary"].as_str().unwrap_or_default());
    for parameter in list(&operation["parameters"]) {
        if parameter["in"] == "query" {
            let name = parameter["name"].as_str().unwrap_or_default();
            let _ = write!(about, " `?{name}`: {}", description(parameter));
        }
    }
    if operation["tags"][0] != GUEST {
        let refused = responses().map(|(code, _)| code.as_str());
        let refused = refused.filter(|code| *code >= "400").collect::<Vec<_>>();
        if !refused.is_empty() {
            let _ = write!(about, " Refusals: {}.", refused.join(", "));
        }
    }
    let method = method.to_uppercase();
    let _ = writeln!(page, "| `{method} {path}` | {body} | {answers} | {about} |");
}

fn schema(page: &mut String, name: &str, schema: &Value) {
    let _ = writeln!(page, "\n### {name}\n\n{}", description(schema));
    let values = list(&schema["enum"]).iter().filter_map(Value::as_str);
    let values = values.map(|value| format!("`{value}`")).collect::<Vec<_>>();
    if !values.is_empty() {
        let _ = writeln!(page, "\nOne of {}.", values.join(", "));
    }
    let required = list(&schema["required"]);
    let mut fields = object(&schema["properties"]).peekable();
    if fields.peek().is_some() {
        page.push_str("\n| field | type | |\n|---|---|---|\n");
    }
    for (field, of) in fields {
        let about = match list(&of["oneOf"]).iter().find(|one| one["type"] != "null") {
            Some(inner) if of["description"].is_null() => description(inner),
            Some(_) | None => description(of),
        };
        let needed = if required.iter().any(|name| name == field) {
            "**required** "
        } else {
            ""
        };
        let _ = writeln!(page, "| `{field}` | {} | {needed}{about} |", type_of(of));
    }
}

fn page(document: &Value) -> String {
    let mut page = HEAD.to_owned();
    for (tag, heading) in SECTIONS {
        let _ = writeln!(
            page,
            "\n{heading}\n\n| request | body | answer | |\n|---|---|---|---|"
        );
        for (path, methods) in object(&document["paths"]) {
            for (method, of) in object(methods).filter(|(_, of)| of["tags"][0] == tag) {
                let own = path.strip_prefix("/vms/{id}").filter(|_| tag == GUEST);
                operation(&mut page, method, own.unwrap_or(path), of);
            }
        }
    }
    page.push_str("\n## Bodies\n");
    for (name, of) in object(&document["components"]["schemas"]) {
        schema(&mut page, name, of);
    }
    page
}

#[test]
fn the_rest_reference_is_current() {
    let document: Value = serde_json::from_str(&document().unwrap()).unwrap();
    for (path, methods) in object(&document["paths"]) {
        for (method, of) in object(methods) {
            let known = SECTIONS.iter().any(|(tag, _)| of["tags"][0] == *tag);
            assert!(known, "{method} {path} is in no section");
        }
    }
    expect_file!["../../../../../../docs/reference/rest-operations.md"].assert_eq(&page(&document));
}
