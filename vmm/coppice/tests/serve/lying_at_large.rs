//! A guest's process that gives any answers to any requests, and goes on as an honest one in between, so that the
//! daemon believes what it can.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use proptest::strategy::{Union, ValueTree};
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

use crate::serve::daemon::Daemon;
use crate::serve::liar::{Answer, Liar};
use crate::serve::lies::{Lies, Operation};
use crate::serve::outside::{Canaries, Outside};
use crate::serve::traces::source;

/// How many requests are made of each of how many guests.
const ROUNDS: usize = 16;
const CASES: usize = 20;
/// How many answers to one request are lies at most.
const LIES: usize = 3;
/// What the daemon's memory may grow by: the longest answer of a process, several times, for one after the other.
const ROOM_KIB: u64 = 40 << 10;
/// The longest text of the daemon that tells a caller what is wrong with an answer.
const LONGEST_FAULT: usize = 32 << 10;

/// A request to the daemon, and what the process answers while that is carried out.
#[derive(Clone, Debug)]
struct Case {
    method: String,
    path: String,
    body: Value,
    answers: Vec<Vec<u8>>,
}

/// A request of the guest's own API.
fn of_guest(lies: &Lies<'_>, operation: Operation, known: Value) -> BoxedStrategy<Case> {
    let body = if known.is_null() {
        lies.request(&operation)
    } else {
        prop_oneof![1 => lies.request(&operation), 3 => Just(known)].boxed()
    };
    let answers = prop::collection::vec(lies.answer(&operation), 1..=LIES);
    let Operation { method, path, .. } = operation;
    (body, answers)
        .prop_map(move |(body, answers)| Case {
            method: method.clone(),
            path: format!("/vms/a{path}"),
            body,
            answers,
        })
        .boxed()
}

/// A request of the daemon's own that has it ask the process.
fn of_daemon(lies: &Lies<'_>, (method, path, body): (&str, &str, Value)) -> BoxedStrategy<Case> {
    let answers = lies
        .operations()
        .into_iter()
        .map(|operation| lies.answer(&operation));
    let (method, path) = (method.to_owned(), path.to_owned());
    prop::collection::vec(Union::new(answers), 1..=LIES)
        .prop_map(move |answers| Case {
            method: method.clone(),
            path: path.clone(),
            body: body.clone(),
            answers,
        })
        .boxed()
}

/// A body that the daemon passes on, for the operations that have one of their own.
fn known_body(daemon: &Daemon, operation: &Operation) -> Value {
    let in_folder = |name: &str| daemon.vm_folder("a").canonicalize().unwrap().join(name);
    match (&*operation.method, &*operation.path) {
        ("PATCH", "/vm") => json!({"state": "Paused"}),
        ("PATCH" | "PUT", "/mmds") => json!({"role": "web"}),
        ("PATCH", "/balloon") => json!({"amount_mib": 1}),
        ("PATCH", "/drives/root") => {
            json!({"drive_id": "root", "path_on_host": daemon.folder().join("a.vhdx")})
        }
        ("PUT", "/drives/root/snapshot") => json!({"path_on_host": in_folder("child.vhdx")}),
        ("PUT", "/drives/root/commit" | "/drives/root/compact") => json!({}),
        ("PUT", "/snapshot/create") => {
            json!({"snapshot_path": in_folder("state"), "mem_file_path": in_folder("memory")})
        }
        _ => Value::Null,
    }
}

fn cases(daemon: &Daemon, lies: &Lies<'_>) -> BoxedStrategy<Case> {
    let of_guest = lies.operations().into_iter().map(|operation| {
        let known = known_body(daemon, &operation);
        of_guest(lies, operation, known)
    });
    let of_daemon = [
        ("GET", "/vms/a?stats=true", Value::Null),
        ("GET", "/metrics?guests", Value::Null),
        ("POST", "/templates", json!({"id": "t", "vm": "a"})),
        ("POST", "/vms/a/pause", json!({})),
        ("POST", "/vms/a/resume", json!({})),
    ];
    let of_daemon = of_daemon.map(|request| self::of_daemon(lies, request));
    let all: Vec<_> = of_guest.chain(of_daemon).collect();
    Union::new(all).boxed()
}

/// Carries a request out; the daemon answers it, and shows nothing of the process's that a terminal would obey.
fn ask(daemon: &Daemon, case: &Case) {
    let body = Some(&case.body).filter(|body| !body.is_null());
    let Case {
        method,
        path,
        answers,
        ..
    } = case;
    let shown = || {
        let answers = answers
            .iter()
            .map(|answer| answer.get(..2000).unwrap_or(answer));
        let answers: Vec<_> = answers
            .map(|answer| answer.escape_ascii().to_string())
            .collect();
        format!("{method} {path} {body:?}, answered by {answers:#?}")
    };
    let answer = daemon.try_call(method, path, body);
    let (status, answer) = answer.unwrap_or_else(|| panic!("no answer to {}", shown()));
    assert!((200..600).contains(&status), "{status}: {}", shown());
    let text = answer["fault_message"].as_str().unwrap_or_default();
    let is_own =
        !path.starts_with("/vms/a/") || path.ends_with("/pause") || path.ends_with("/resume");
    let is_safe = text.len() < LONGEST_FAULT && !text.chars().any(char::is_control);
    assert!(
        is_safe || !is_own,
        "{text:.200?} of {} bytes: {}",
        text.len(),
        shown()
    );
}

#[test]
fn no_answer_to_any_request_changes_anything_but_the_guest_that_gives_it() {
    if !skip::unless_root() {
        return;
    }
    let canaries = Canaries::new();
    let daemon = Daemon::start(&[]);
    daemon.create_running("b");
    source(&daemon, 16);
    let neighbour = daemon.get("/vms/b");
    let folder = daemon.vm_folder("a");
    let not_outside = [folder.clone(), daemon.folder().join("a.vhdx")];
    let outside = || Outside::of(&canaries, &daemon, &not_outside);
    let (before, peak) = (outside(), daemon.peak_kib());

    let document = daemon.get("/openapi.json");
    let cases = cases(&daemon, &Lies::new(&document, canaries.path()));
    let mut runner = TestRunner::default();
    let mut lied = 0;
    for _ in 0..ROUNDS {
        let lies = Arc::new(Mutex::new(VecDeque::new()));
        let left = lies.clone();
        let liar = Liar::take_over(&folder, move |_| {
            let lie = left.lock().unwrap().pop_front();
            lie.map_or(Answer::Honest, Answer::Bytes)
        });
        for _ in 0..CASES {
            let case = cases.new_tree(&mut runner).unwrap().current();
            *lies.lock().unwrap() = case.answers.clone().into();
            ask(&daemon, &case);
            lied += case.answers.len() - lies.lock().unwrap().len();
        }
        lies.lock().unwrap().clear();
        let (status, _) = daemon.call("DELETE", "/templates/t", None);
        assert!([204, 404].contains(&status));
        drop(liar);
        outside().expect(&before, "after lies");
        let now = daemon.get("/vms/b");
        for field in ["config", "pid", "state", "guest_uid"] {
            assert_eq!(now[field], neighbour[field]);
        }
        // What the operator has asked for has none of these.
        let shown = daemon.get("/vms/a")["config"].to_string();
        let is_planted =
            shown.contains(canaries.path().to_str().unwrap()) || shown.contains("owned");
        assert!(!is_planted, "{shown}");
        assert!(daemon.call("DELETE", "/vms/a", None).0 < 300);
        source(&daemon, 16);
    }
    assert!(daemon.echoes("b"));
    assert!(lied > ROUNDS * CASES / 2, "{lied}");
    let grown = daemon.peak_kib() - peak;
    assert!(grown < ROOM_KIB, "{grown} KiB");
}
