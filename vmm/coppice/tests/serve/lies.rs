//! Answers of a guest's process that are false in any way: bodies that have the form of the daemon's `OpenAPI` document
//! but for some of their values, bodies of another form, and what is no HTTP.

use std::path::Path;

use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Map, Value, json};

/// Deepest value that follows the document.
const DEPTH: u32 = 8;

/// The document, and what a process would like to have its daemon do.
pub struct Lies<'a> {
    document: &'a Value,
    words: Vec<String>,
}

/// An operation of the guest's own API.
#[derive(Clone, Debug)]
pub struct Operation {
    pub method: String,
    /// Its path below the guest's.
    pub path: String,
    /// What it answers, where that is JSON.
    answer: Option<Value>,
    /// What it is asked with, where that is JSON.
    body: Option<Value>,
}

/// How a response is sent.
#[derive(Clone, Copy, Debug)]
enum Framing {
    Whole,
    Chunked,
    /// Until the end of the connection.
    Endless,
    /// With a length that is not that of the body.
    Length(&'static str),
    /// With these lines in its head.
    Head(&'static str),
    /// With a head of so many bytes more.
    LongHead(usize),
    /// Cut after so many bytes.
    Cut(usize),
    /// With responses before it that are not final.
    Informational(usize),
    /// A chunk whose length is not its own.
    Chunk(&'static str),
    NoHead,
}

fn framing() -> impl Strategy<Value = Framing> {
    let lengths = [
        "0",
        "1",
        "18446744073709551615",
        "99999999999999999999",
        "-1",
        "1, 2",
        "0x10",
        "",
    ];
    let heads = [
        "Content-Length: 1\r\nContent-Length: 2\r\n",
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Upgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 0\r\n",
        "Location: http://localhost/vms/b\r\nContent-Length: 0\r\n",
        "Content-Type: text/html\r\nContent-Type: \x01\r\nContent-Length: 0\r\n",
        "no header at all\r\n",
        "Set-Cookie: a\0b\r\nContent-Length: 0\r\n",
    ];
    let chunks = [
        "0",
        "-1",
        "fffffffffffffffff",
        "ffffffffffffffff",
        "7fffffffffffffff",
        "zz",
        "",
    ];
    prop_oneof![
        6 => Just(Framing::Whole),
        1 => Just(Framing::Chunked),
        1 => Just(Framing::Endless),
        1 => select(lengths.to_vec()).prop_map(Framing::Length),
        1 => select(heads.to_vec()).prop_map(Framing::Head),
        1 => select(vec![100, 16 << 10, 1 << 20]).prop_map(Framing::LongHead),
        1 => (0usize..200).prop_map(Framing::Cut),
        1 => select(vec![1, 10_000]).prop_map(Framing::Informational),
        1 => select(chunks.to_vec()).prop_map(Framing::Chunk),
        1 => Just(Framing::NoHead),
    ]
}

fn send(status: u16, framing: Framing, body: &[u8]) -> Vec<u8> {
    let line = format!("HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\n");
    let with =
        |head: String, body: &[u8]| [line.as_bytes(), head.as_bytes(), b"\r\n", body].concat();
    let length = format!("Content-Length: {}\r\n", body.len());
    let chunked = "Transfer-Encoding: chunked\r\n".to_owned();
    match framing {
        Framing::Whole => with(length, body),
        Framing::Chunked => {
            let len = format!("{:x}\r\n", body.len());
            with(chunked, &[len.as_bytes(), body, b"\r\n0\r\n\r\n"].concat())
        }
        Framing::Endless => with(String::new(), body),
        Framing::Length(length) => with(format!("Content-Length: {length}\r\n"), body),
        Framing::Head(head) => with(head.to_owned(), body),
        Framing::LongHead(len) => with(format!("X: {}\r\n{length}", "x".repeat(len)), body),
        Framing::Cut(at) => {
            let mut whole = with(length, body);
            whole.truncate(at);
            whole
        }
        Framing::Informational(count) => {
            let before = b"HTTP/1.1 100 Continue\r\n\r\n".repeat(count);
            [before, with(length, body)].concat()
        }
        Framing::Chunk(len) => {
            let len = format!("{len}\r\n");
            with(chunked, &[len.as_bytes(), body].concat())
        }
        Framing::NoHead => body.to_vec(),
    }
}

/// The value of a body as bytes.
fn encoded(value: &Value, cut: Option<usize>) -> Vec<u8> {
    let mut bytes = value.to_string().into_bytes();
    if let Some(cut) = cut {
        bytes.truncate(cut);
    }
    bytes
}

/// A body of another form than any in the document, of at most a few MiB.
fn formless() -> impl Strategy<Value = Vec<u8>> {
    let repeated = |(text, len): (&str, usize)| text.repeat(len / text.len()).into_bytes();
    let texts = [
        "[",
        "{\"a\":",
        "\"",
        "0,",
        "[0,",
        "9",
        "\\u0000",
        " ",
        "\u{1b}[2J",
        "\0",
    ];
    let lens = [1, 200, 100_000, 4 << 20, 5 << 20];
    prop_oneof![
        (select(texts.to_vec()), select(lens.to_vec())).prop_map(repeated),
        Just([b"[0", ",0".repeat((2 << 20) - 20).as_bytes(), b"]"].concat()),
        Just(
            [
                b"{\"fault_message\":[0",
                ",0".repeat((2 << 20) - 20).as_bytes(),
                b"]}"
            ]
            .concat()
        ),
        prop::collection::vec(any::<u8>(), 0..64),
    ]
}

impl<'a> Lies<'a> {
    /// `outside` is a folder that the process would like to have.
    pub fn new(document: &'a Value, outside: &Path) -> Self {
        let at = |name: &str| outside.join(name).display().to_string();
        let named = [
            "a",
            "b",
            "root",
            "commit",
            "Done",
            "Running",
            "image:k",
            "",
            ".",
            "/",
            "../b/vm.json",
        ];
        let hostile = [
            "\u{1b}]0;owned\u{7}",
            "\u{202e}\0\r\nX: y",
            "${PATH}",
            "%s%n",
        ];
        let mut words: Vec<_> = named
            .into_iter()
            .chain(hostile)
            .map(str::to_owned)
            .collect();
        words.extend([
            at("secret"),
            at("planted"),
            format!("../../../..{}", at("secret")),
        ]);
        words.extend(["x".repeat(70_000), "/".repeat(5000)]);
        Self { document, words }
    }

    /// All operations of the guest's own API.
    pub fn operations(&self) -> Vec<Operation> {
        let paths = self.document["paths"].as_object().unwrap().iter();
        let of_guest =
            paths.filter_map(|(path, item)| Some((path.strip_prefix("/vms/{id}")?, item)));
        let operations = of_guest.flat_map(|(path, item)| {
            let methods = item.as_object().unwrap().iter();
            methods
                .filter(|(_, operation)| operation["tags"] == json!(["the guest's own API"]))
                .map(move |(method, operation)| {
                    let content =
                        |of: &Value| of["content"]["application/json"].get("schema").cloned();
                    Operation {
                        method: method.to_uppercase(),
                        path: path
                            .replace("{drive}", "root")
                            .replace("{pmem}", "p")
                            .replace("{page}", "0")
                            .replace("{address}", "0"),
                        answer: content(&operation["responses"]["200"]),
                        body: content(&operation["requestBody"]),
                    }
                })
        });
        operations.collect()
    }

    /// A body for a request, as the operator may send it.
    pub fn request(&self, operation: &Operation) -> BoxedStrategy<Value> {
        match &operation.body {
            Some(schema) => self.shaped(schema, 0, false),
            None => Just(Value::Null).boxed(),
        }
    }

    /// What a process answers to an operation: the bytes that it sends.
    pub fn answer(&self, operation: &Operation) -> BoxedStrategy<Vec<u8>> {
        let shaped = match &operation.answer {
            Some(schema) => self.shaped(schema, 0, true),
            None => self.any_value(),
        };
        let fault = self.word().prop_map(|word| json!({"fault_message": word}));
        let cut = prop_oneof![9 => Just(None), 1 => (0usize..100).prop_map(Some)];
        let value = prop_oneof![6 => shaped, 1 => self.any_value(), 1 => fault];
        let body = prop_oneof![
            8 => (value, cut).prop_map(|(value, cut)| encoded(&value, cut)),
            1 => formless(),
        ];
        let statuses = vec![
            100, 101, 199, 201, 204, 301, 304, 400, 404, 422, 500, 503, 599, 600, 999,
        ];
        let status = prop_oneof![2 => Just(200), 1 => select(statuses)];
        let sent = (status, framing(), body);
        sent.prop_map(|(status, framing, body)| send(status, framing, &body))
            .boxed()
    }

    fn word(&self) -> impl Strategy<Value = String> + use<> {
        prop_oneof![4 => select(self.words.clone()), 1 => ".{0,20}"]
    }

    fn any_value(&self) -> BoxedStrategy<Value> {
        let number = prop_oneof![
            select(vec![
                json!(0),
                json!(-1),
                json!(u64::MAX),
                json!(i64::MIN),
                json!(1e308),
                json!(0.1)
            ]),
            any::<u16>().prop_map(|number| json!(number)),
        ];
        let deep =
            (1usize..200).prop_map(|depth| (0..depth).fold(json!(0), |inner, _| json!([inner])));
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(|is| json!(is)),
            number,
            self.word().prop_map(Value::String),
            deep,
            Just(json!({"path_on_host": self.words.last()})),
        ]
        .boxed()
    }

    /// A value that has the form of a schema; where it is `hostile`, but for some of its parts.
    fn shaped(&self, schema: &Value, depth: u32, hostile: bool) -> BoxedStrategy<Value> {
        if depth > DEPTH {
            return Just(Value::Null).boxed();
        }
        let right = self.right(schema, depth, hostile);
        if hostile {
            prop_oneof![9 => right, 1 => self.any_value()].boxed()
        } else {
            right
        }
    }

    fn right(&self, schema: &Value, depth: u32, hostile: bool) -> BoxedStrategy<Value> {
        let inner = |schema: &Value| self.shaped(schema, depth + 1, hostile);
        if let Some(name) = schema["$ref"].as_str() {
            let schema = self.document.pointer(name.trim_start_matches('#'));
            return self.right(schema.unwrap(), depth + 1, hostile);
        }
        if let Some(values) = schema["enum"].as_array() {
            return select(values.clone()).boxed();
        }
        for choice in ["oneOf", "anyOf"] {
            if let Some(schemas) = schema[choice].as_array() {
                return proptest::strategy::Union::new(schemas.iter().map(inner)).boxed();
            }
        }
        if let Some(schemas) = schema["allOf"].as_array() {
            let parts: Vec<_> = schemas.iter().map(inner).collect();
            return parts.prop_map(merged).boxed();
        }
        let types = match &schema["type"] {
            Value::Array(types) => types.clone(),
            one => vec![one.clone()],
        };
        let of_type = |name: &Value| match name.as_str() {
            Some("object") => self.object(schema, depth, hostile),
            Some("array") => prop::collection::vec(inner(&schema["items"]), 0..4)
                .prop_map(Value::Array)
                .boxed(),
            Some("string") if !hostile => {
                select(vec!["x", "y"]).prop_map(|word| json!(word)).boxed()
            }
            Some("string") => self.word().prop_map(Value::String).boxed(),
            Some("integer" | "number") => any::<u16>().prop_map(|number| json!(number)).boxed(),
            Some("boolean") => any::<bool>().prop_map(|is| json!(is)).boxed(),
            Some("null") => Just(Value::Null).boxed(),
            Some(_) | None => self.any_value(),
        };
        proptest::strategy::Union::new(types.iter().map(of_type)).boxed()
    }

    fn object(&self, schema: &Value, depth: u32, hostile: bool) -> BoxedStrategy<Value> {
        let required = schema["required"].as_array().cloned().unwrap_or_default();
        let properties = schema["properties"].as_object().into_iter().flatten();
        let properties: Vec<_> = properties
            .map(|(name, schema)| {
                let is_required = required.contains(&json!(name));
                let field = (Just(name.clone()), self.shaped(schema, depth + 1, hostile));
                let there = match (is_required, hostile) {
                    (true, false) => return field.prop_map(Some).boxed(),
                    (true, true) => 0.9,
                    (false, _) => 0.5,
                };
                prop::option::weighted(there, field).boxed()
            })
            .collect();
        let others = match schema.get("additionalProperties") {
            Some(schema) if schema.is_object() => {
                let value = self.shaped(schema, depth + 1, hostile);
                prop::collection::vec((self.word(), value), 0..3).boxed()
            }
            _ if hostile => prop_oneof![
                9 => Just(Vec::new()),
                1 => (self.word(), self.any_value()).prop_map(|other| vec![other]),
            ]
            .boxed(),
            _ => Just(Vec::new()).boxed(),
        };
        let all = (properties, others).prop_map(|(properties, others)| {
            Value::Object(properties.into_iter().flatten().chain(others).collect())
        });
        all.boxed()
    }
}

fn merged(parts: Vec<Value>) -> Value {
    let fields = parts.into_iter().filter_map(|part| match part {
        Value::Object(fields) => Some(fields),
        _ => None,
    });
    Value::Object(fields.flatten().collect::<Map<_, _>>())
}
