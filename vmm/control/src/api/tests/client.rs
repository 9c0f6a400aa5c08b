use std::os::unix::net::UnixListener;

use super::*;
use crate::api::{ClientError, get};

#[test]
fn one_coppice_asks_another() {
    let bench = Bench::new();
    let machine: Value = get(&bench.path("s"), "/machine-config").unwrap();
    assert_eq!(machine["mem_size_mib"], 128);
    let refused = get::<Value>(&bench.path("s"), "/vm/sharing");
    assert!(matches!(refused, Err(ClientError::Refused(_))));
}

#[test]
fn a_guest_that_does_not_respond_holds_up_no_other_request() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    assert!(matches!(
        get::<Value>(&path, "/"),
        Err(ClientError::Socket(_))
    ));
    let _listener = UnixListener::bind(&path).unwrap();
    assert!(matches!(get::<Value>(&path, "/"), Err(ClientError::Silent)));
}
