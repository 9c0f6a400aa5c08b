//! One request of a guest: HTTP/1.1 (RFC 9112), `GET` of metadata or `PUT` for a token, and the connection is closed
//! after the response.

use std::fmt::Write;
use std::sync::Arc;

use devices::service::Session;
use serde_json::{Map, Value};

use super::metadata::Mmds;
use super::token::{LIFETIME, Tokens};
use host::report::chain;

/// Longest head of a request in bytes, and most header fields in it.
const LONGEST_HEAD: usize = 4096;
const MAX_FIELDS: usize = 32;

/// Where a token is asked for.
const TOKEN_PATH: &str = "/latest/api/token";
/// Fields of requests, Firecracker's and those of IMDS.
const TOKEN: [&str; 2] = ["x-metadata-token", "x-aws-ec2-metadata-token"];
const TOKEN_LIFETIME: [&str; 2] = [
    "x-metadata-token-ttl-seconds",
    "x-aws-ec2-metadata-token-ttl-seconds",
];
/// What proxies add: a request for a token that came through one is not the guest's own.
const FORWARDED: &str = "x-forwarded-for";

/// How requests are answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Protocol {
    /// The format is that of IMDS alone, whatever the guest accepts.
    pub imds_compat: bool,
    /// A request has to show a token (version 2).
    pub needs_token: bool,
}

/// A request that is being read, and then its response.
pub(super) struct Request {
    metadata: Arc<Mmds>,
    tokens: Arc<Tokens>,
    protocol: Protocol,
    stage: Stage,
}

enum Stage {
    Reading(Vec<u8>),
    Sending { response: Vec<u8>, sent: usize },
}

/// A response: its status, the media type of its body, and the body.
struct Response {
    status: &'static str,
    kind: &'static str,
    /// Seconds that the token in the body lasts.
    lifetime: Option<u64>,
    body: String,
}

impl Response {
    fn text(status: &'static str, body: impl Into<String>) -> Self {
        Self {
            status,
            kind: "text/plain",
            lifetime: None,
            body: body.into(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let Self {
            status,
            kind,
            lifetime,
            body,
        } = self;
        let mut more = String::new();
        if status.starts_with("405") {
            more += "Allow: GET, PUT\r\n";
        }
        for name in lifetime.iter().flat_map(|_| TOKEN_LIFETIME) {
            let seconds = lifetime.unwrap_or_default();
            // Writing to a string fails never.
            let _ = write!(more, "{name}: {seconds}\r\n");
        }
        let len = body.len();
        format!(
            "HTTP/1.1 {status}\r\nServer: Coppice MMDS\r\n{more}Content-Type: {kind}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n{body}"
        )
        .into_bytes()
    }
}

/// The value of the first field that has one of these names.
fn field<'f>(
    fields: &[httparse::Header<'f>],
    names: impl IntoIterator<Item = &'static str>,
) -> Option<&'f [u8]> {
    let find = |name: &str| {
        fields
            .iter()
            .find(|field| field.name.eq_ignore_ascii_case(name))
    };
    names.into_iter().find_map(find).map(|field| field.value)
}

/// What a path names.
fn find<'v>(value: &'v Map<String, Value>, path: &str) -> Option<Found<'v>> {
    let mut found = Found::All(value);
    for part in path.split('/').filter(|part| !part.is_empty()) {
        let next = match found {
            Found::All(object) | Found::Part(Value::Object(object)) => object.get(part),
            Found::Part(Value::Array(array)) => array.get(part.parse::<usize>().ok()?),
            Found::Part(Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) => None,
        };
        found = Found::Part(next?);
    }
    Some(found)
}

#[derive(Clone, Copy)]
enum Found<'v> {
    All(&'v Map<String, Value>),
    Part(&'v Value),
}

/// As IMDS lists an object: its names, those of objects with a slash behind.
fn listing(object: &Map<String, Value>) -> String {
    let names = object.iter().map(|(name, value)| {
        let slash = if value.is_object() { "/" } else { "" };
        format!("{name}{slash}")
    });
    names.collect::<Vec<_>>().join("\n")
}

/// The path of a target, which a client may send with the host in front (RFC 9112, 3.2.2).
fn path_of(target: &str) -> Option<&str> {
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    };
    path.starts_with('/').then_some(path)
}

impl Request {
    pub(super) fn new(metadata: Arc<Mmds>, tokens: Arc<Tokens>, protocol: Protocol) -> Self {
        Self {
            metadata,
            tokens,
            protocol,
            stage: Stage::Reading(Vec::new()),
        }
    }

    /// The response to the bytes that have been read; `None` where the request goes on.
    fn respond(&self, head: &[u8]) -> Option<Response> {
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let mut request = httparse::Request::new(&mut fields);
        match request.parse(head) {
            Ok(httparse::Status::Complete(_)) => {}
            Ok(httparse::Status::Partial) if head.len() < LONGEST_HEAD => return None,
            Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
                return Some(Response::text(
                    "431 Request Header Fields Too Large",
                    "The request is too long.",
                ));
            }
            Err(error) => {
                return Some(Response::text(
                    "400 Bad Request",
                    format!("The request is no HTTP: {}.", chain(&error)),
                ));
            }
        }
        let Some(path) = request.path.and_then(path_of) else {
            return Some(Response::text("400 Bad Request", "Invalid URI."));
        };
        match request.method {
            Some("GET") => {}
            Some("PUT") => return Some(self.token(path, request.headers)),
            _ => {
                let why = "Metadata are asked for with GET, and tokens with PUT.";
                return Some(Response::text("405 Method Not Allowed", why));
            }
        }
        if self.protocol.needs_token {
            let Some(token) = field(request.headers, TOKEN) else {
                let why = "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the session token.";
                return Some(Response::text("401 Unauthorized", why));
            };
            if !self.tokens.is_valid(token) {
                return Some(Response::text("401 Unauthorized", "MMDS token not valid."));
            }
        }
        let wants_json = request.headers.iter().any(|field| {
            let accepts = |kind: &str| kind.trim().eq_ignore_ascii_case("application/json");
            let value = std::str::from_utf8(field.value).unwrap_or_default();
            field.name.eq_ignore_ascii_case("accept")
                && value
                    .split(',')
                    .filter_map(|kind| kind.split(';').next())
                    .any(accepts)
        });
        Some(self.value(path, wants_json && !self.protocol.imds_compat))
    }

    /// A token, where all of the request is as it has to be.
    fn token(&self, path: &str, fields: &[httparse::Header<'_>]) -> Response {
        if path.trim_end_matches('/') != TOKEN_PATH {
            return Response::text("404 Not Found", format!("Resource not found: {path}."));
        }
        if field(fields, [FORWARDED]).is_some() {
            let why =
                "A token cannot be asked for through a proxy: the request has `X-Forwarded-For`.";
            return Response::text("400 Bad Request", why);
        }
        let lifetime = field(fields, TOKEN_LIFETIME);
        let Some(lifetime) = lifetime else {
            let why = "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.";
            return Response::text("400 Bad Request", why);
        };
        let seconds = std::str::from_utf8(lifetime)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        let Some(seconds) = seconds.filter(|seconds| LIFETIME.contains(seconds)) else {
            let (least, most) = (LIFETIME.start(), LIFETIME.end());
            let why = format!(
                "Invalid time to live value provided for token: it is {least} to {most} seconds."
            );
            return Response::text("400 Bad Request", why);
        };
        match self.tokens.issue(seconds) {
            Some(token) => Response {
                lifetime: Some(seconds),
                ..Response::text("200 OK", token)
            },
            None => Response::text("503 Service Unavailable", "There are no random numbers."),
        }
    }

    fn value(&self, path: &str, as_json: bool) -> Response {
        let metadata = self.metadata.lock();
        let none = Map::new();
        let Some(found) = find(metadata.as_ref().unwrap_or(&none), path) else {
            return Response::text("404 Not Found", format!("Resource not found: {path}."));
        };
        if as_json {
            let text = match found {
                Found::All(object) => serde_json::to_string(object),
                Found::Part(value) => serde_json::to_string(value),
            };
            // A value of JSON always has a text.
            return Response {
                status: "200 OK",
                kind: "application/json",
                lifetime: None,
                body: text.unwrap_or_default(),
            };
        }
        match found {
            Found::All(object) | Found::Part(Value::Object(object)) => {
                Response::text("200 OK", listing(object))
            }
            Found::Part(Value::String(text)) => Response::text("200 OK", text),
            Found::Part(Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_)) => {
                Response::text(
                    "501 Not Implemented",
                    "Cannot retrieve value. The value has an unsupported type.",
                )
            }
        }
    }
}

impl Session for Request {
    fn receive(&mut self, bytes: &[u8]) {
        let Stage::Reading(head) = &mut self.stage else {
            // What comes behind a request is not read.
            return;
        };
        let room = LONGEST_HEAD - head.len().min(LONGEST_HEAD);
        head.extend(bytes.iter().take(room));
        let head = std::mem::take(head);
        self.stage = match self.respond(&head) {
            Some(response) => Stage::Sending {
                response: response.bytes(),
                sent: 0,
            },
            None => Stage::Reading(head),
        };
    }

    fn send(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let Stage::Sending { response, sent } = &mut self.stage else {
            return None;
        };
        let rest = response.get(*sent..).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        *sent += len;
        Some(len)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn metadata() -> Arc<Mmds> {
        let metadata = Mmds::default();
        let told = json!({
            "coppice": {"id": "a", "cid": 3}, "name": "x", "list": ["one", {"k": "v"}], "count": 1,
        });
        metadata.put(told).unwrap();
        Arc::new(metadata)
    }

    /// Head and body of the answer, in pieces of 7 bytes each way.
    fn ask_of(imds_compat: bool, request: &str) -> (String, String) {
        let needs_token = false;
        let protocol = Protocol {
            imds_compat,
            needs_token,
        };
        ask_with(Arc::default(), protocol, request)
    }

    fn ask_with(tokens: Arc<Tokens>, protocol: Protocol, request: &str) -> (String, String) {
        let mut session = Request::new(metadata(), tokens, protocol);
        for piece in request.as_bytes().chunks(7) {
            session.receive(piece);
        }
        let mut answer = Vec::new();
        let mut buffer = [0; 7];
        loop {
            match session.send(&mut buffer) {
                Some(0) => break,
                Some(len) => answer.extend(&buffer[..len]),
                None => panic!("no answer to {request:?}"),
            }
        }
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}", body.len())));
        (head.to_owned(), body.to_owned())
    }

    fn get(path: &str, fields: &str) -> (u16, String) {
        let (head, body) = ask_of(false, &format!("GET {path} HTTP/1.1\r\n{fields}\r\n"));
        (head[9..12].parse().unwrap(), body)
    }

    #[test]
    fn json_is_answered_where_it_is_accepted_and_a_listing_else() {
        let json = "Host: x\r\nAccept: text/html, application/json;q=0.9\r\n";
        assert_eq!(
            get("/coppice", json),
            (200, r#"{"cid":3,"id":"a"}"#.to_owned())
        );
        assert_eq!(get("/list/1/k", json), (200, r#""v""#.to_owned()));
        assert_eq!(get("/count/", json), (200, "1".to_owned()));
        assert_eq!(
            get("/", ""),
            (200, "coppice/\ncount\nlist\nname".to_owned())
        );
        assert_eq!(
            get("http://169.254.169.254//coppice//id", "Accept: */*\r\n"),
            (200, "a".to_owned())
        );
        for path in ["/count", "/list"] {
            assert_eq!(get(path, "").0, 501, "{path}");
        }
        for path in ["/nothing", "/name/x", "/list/2", "/list/x"] {
            assert_eq!(get(path, json).0, 404, "{path}");
        }
        let request = format!("GET /coppice HTTP/1.1\r\n{json}\r\n");
        assert_eq!(ask_of(true, &request).1, "cid\nid");
    }

    #[test]
    fn bytes_that_are_no_request_are_refused_and_not_kept() {
        let (head, _) = ask_of(false, "POST /latest/api/token HTTP/1.1\r\n\r\n");
        assert!(head.starts_with("HTTP/1.1 405") && head.contains("Allow: GET, PUT"));
        assert_eq!(get("nothing", "").0, 400);
        assert!(ask_of(false, "\0\0\0").0.starts_with("HTTP/1.1 400"));
        let long = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(10_000));
        assert!(ask_of(false, &long).0.starts_with("HTTP/1.1 431"));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(33));
        assert!(ask_of(false, &many).0.starts_with("HTTP/1.1 431"));
        let mut session = Request::new(metadata(), Arc::default(), Protocol::default());
        session.receive(b"GET / HTTP/1.1\r\n");
        assert_eq!(session.send(&mut [0; 8]), None);
    }

    #[test]
    fn with_tokens_a_request_needs_one_that_was_asked_for_as_it_has_to_be() {
        let tokens = Arc::<Tokens>::default();
        let protocol = Protocol {
            needs_token: true,
            ..Protocol::default()
        };
        let ask = |request: &str| ask_with(tokens.clone(), protocol, request);
        let put = |fields: &str| ask(&format!("PUT /latest/api/token HTTP/1.1\r\n{fields}\r\n"));
        for (fields, names) in [
            ("X-metadata-token-ttl-seconds: 60\r\n", "X-metadata-token"),
            (
                "X-aws-ec2-metadata-token-ttl-seconds: 21600\r\n",
                "x-AWS-ec2-metadata-token",
            ),
        ] {
            let (head, token) = put(fields);
            assert!(head.starts_with("HTTP/1.1 200"), "{head}");
            assert!(head.contains(fields.to_lowercase().trim()), "{head}");
            let (head, body) = ask(&format!("GET /name HTTP/1.1\r\n{names}: {token}\r\n\r\n"));
            assert!(head.starts_with("HTTP/1.1 200") && body == "x", "{head}");
            let (head, _) = ask(&format!("GET /name HTTP/1.1\r\n{names}: {token}x\r\n\r\n"));
            assert!(head.starts_with("HTTP/1.1 401"), "{head}");
        }
        assert!(
            ask("GET /name HTTP/1.1\r\n\r\n")
                .0
                .starts_with("HTTP/1.1 401")
        );
        for wrong in [
            "",
            "X-metadata-token-ttl-seconds: 0\r\n",
            "X-metadata-token-ttl-seconds: 21601\r\n",
            "X-metadata-token-ttl-seconds: x\r\n",
            "X-metadata-token-ttl-seconds: 60\r\nX-Forwarded-For: 1.2.3.4\r\n",
        ] {
            assert!(put(wrong).0.starts_with("HTTP/1.1 400"), "{wrong}");
        }
        let elsewhere = "PUT /latest/api HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n";
        assert!(ask(elsewhere).0.starts_with("HTTP/1.1 404"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, cut in 0usize..64) {
            let mut session = Request::new(metadata(), Arc::default(), Protocol::default());
            let (first, second) = bytes.split_at(cut.min(bytes.len()));
            session.receive(first);
            session.receive(second);
            let _ = session.send(&mut [0; 100]);
        }
    }
}
