//! `coppice serve --network`: what guests get of networks, and that nothing is on the host that no record tells of.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

#[path = "serve/mod.rs"]
mod serve;

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use serve::daemon::{Daemon, coppice, until};
use serve::host_network::{in_namespace, ip, nft, state, taps_of};
use serve::steps::{Killer, Victim};
use serve::traces::{no_processes_but, pid};

const LAN: &str = "lan=10.1.0.0/16,v6=fd00:1::/48,dns=9.9.9.9";
const ARGUMENTS: [&str; 4] = ["--network", LAN, "--network", "b=10.2.0.0/29,isolated"];

/// The request for a guest with an interface in a network.
#[allow(
    clippy::needless_pass_by_value,
    reason = "it is written where it is passed"
)]
fn spec(daemon: &Daemon, id: &str, fields: Value) -> Value {
    let mut interface = json!({"iface_id": "eth0", "network": "lan"});
    let all = interface.as_object_mut().unwrap();
    all.extend(fields.as_object().unwrap().clone());
    let mut spec = daemon.spec(id);
    spec["config"]["network-interfaces"] = json!([interface]);
    spec
}

fn create(daemon: &Daemon, id: &str, fields: Value) -> Value {
    let (status, vm) = daemon.post("/vms", &spec(daemon, id, fields));
    assert_eq!((status, &vm["state"]), (201, &json!("running")), "{vm}");
    vm
}

fn delete(daemon: &Daemon, id: &str) {
    let (status, answer) = daemon.call("DELETE", &format!("/vms/{id}"), None);
    assert_eq!(status, 204, "{answer}");
}

fn used(daemon: &Daemon) -> u64 {
    daemon.get("/networks")["networks"][0]["addresses_used"]
        .as_u64()
        .unwrap()
}

#[test]
fn a_guest_has_a_tap_that_its_process_holds_and_leaves_nothing_when_it_is_deleted() {
    in_namespace(|| {
        let daemon = Daemon::start(&ARGUMENTS);
        let clean = state();
        let vm = create(
            &daemon,
            "a",
            json!({"publish": ["8080:80", "192.0.2.1:53:53/udp"]}),
        );
        let own = &vm["networks"][0];
        assert_eq!(
            (&own["ipv4"], &own["tap"]),
            (&json!("10.1.0.2"), &json!("cop-0a010002"))
        );
        assert_eq!(own["ipv6"], "fd00:1:0:2::/64");
        assert_eq!(own["guest_mac"], "02:00:0a:01:00:02");
        assert_eq!(taps_of(pid(&vm)), ["cop-0a010002"]);
        let made = state();
        for part in [
            "10.1.0.2 dev cop-0a010002",
            "lladdr 02:00:0a:01:00:02",
            "tcp . 8080 : 10.1.0.2 . 80",
        ] {
            assert!(made.contains(part), "{part}: {made}");
        }
        let config = daemon.get("/vms/a/vm/config");
        let lease = &config["network-interfaces"][0]["lease"];
        assert_eq!(lease["ipv4"], "10.1.0.2/16");
        assert_eq!(
            (&lease["host_name"], &lease["dns"]),
            (&json!("a"), &json!(["9.9.9.9"]))
        );
        // A stopped guest keeps its addresses, and has nothing on the host.
        daemon.post("/vms/a/stop", &json!({"timeout_s": 0}));
        assert_eq!(state(), clean);
        create(&daemon, "b", json!({}));
        assert_eq!(daemon.post("/vms/a/start", &json!(null)).0, 200);
        assert_eq!(daemon.get("/vms/a")["networks"][0]["ipv4"], "10.1.0.2");
        let networks = &daemon.get("/networks")["networks"];
        assert_eq!(
            (
                &networks[0]["addresses_used"],
                &networks[1]["addresses_used"]
            ),
            (&json!(2), &json!(0))
        );
        assert_eq!(networks[0]["guests"][1]["vm"], "b");
        assert!(
            networks[0]["guests"][0]["counters"]["sent_bytes"].is_u64(),
            "{networks}"
        );
        let metrics = daemon.call("GET", "/metrics", None).1;
        let metrics = metrics.as_str().unwrap();
        assert!(
            metrics.contains("coppice_network_addresses_used{network=\"lan\"} 2"),
            "{metrics}"
        );
        assert!(
            metrics.contains("coppice_vm_network_sent_bytes_total{vm=\"a\",interface=\"eth0\"}"),
            "{metrics}"
        );
        delete(&daemon, "a");
        delete(&daemon, "b");
        assert_eq!((state(), used(&daemon)), (clean, 0));
    });
}

#[test]
fn a_jailed_guest_has_its_tap_and_an_empty_network_namespace() {
    in_namespace(|| {
        let mut arguments = ARGUMENTS.to_vec();
        arguments.push("--jail");
        let daemon = Daemon::start(&arguments);
        let vm = create(&daemon, "a", json!({}));
        let pid = pid(&vm);
        assert_eq!(taps_of(pid), ["cop-0a010002"]);
        let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        assert_ne!(namespace(pid), namespace(daemon.pid()));
        let seen = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
        assert!(!seen.contains("cop-") && !seen.contains("out0"), "{seen}");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
        assert!(daemon.echoes("a"));
    });
}

#[test]
fn guests_go_on_without_the_daemon_and_the_next_one_knows_their_taps() {
    in_namespace(|| {
        let mut daemon = Daemon::start(&ARGUMENTS);
        let clean = state();
        let vm = create(&daemon, "a", json!({"publish": ["8080:80"]}));
        let made = state();
        daemon.kill();
        assert_eq!(state(), made);
        daemon.restart();
        assert_eq!(state(), made);
        assert_eq!(taps_of(pid(&vm)), ["cop-0a010002"]);
        assert_eq!(
            create(&daemon, "b", json!({}))["networks"][0]["ipv4"],
            "10.1.0.3"
        );
        // Without the daemon, one of them ends.
        daemon.kill();
        Command::new("kill")
            .args(["-9", &pid(&vm).to_string()])
            .status()
            .unwrap();
        daemon.restart();
        daemon.until_state("a", "failed");
        until("its rules are gone", || !state().contains("10.1.0.2"));
        delete(&daemon, "a");
        delete(&daemon, "b");
        assert_eq!(state(), clean);
        // In good order, the same; and rules that somebody takes away come back.
        daemon.terminate();
        assert_eq!(state(), clean);
        daemon.restart();
        nft("flush ruleset");
        until("the rules are back", || state() == clean);
        assert!(daemon.log().contains("put back"));
    });
}

#[test]
fn a_daemon_that_is_killed_at_any_step_leaves_nothing_that_no_record_tells_of() {
    in_namespace(|| {
        let mut daemon = Daemon::start(&ARGUMENTS);
        let clean = state();
        let (mut killed, mut is_over) = (0, [false; 2]);
        for step in 1.. {
            // Killed while a guest is made, and while one is deleted.
            for (over, is_deletion) in is_over.iter_mut().zip([false, true]) {
                if *over {
                    continue;
                }
                let request = spec(&daemon, "g", json!({"publish": ["8080:80"]}));
                if is_deletion {
                    assert_eq!(daemon.post("/vms", &request).0, 201);
                }
                let killer = Killer::new(daemon.pid(), Victim::Itself, step);
                let answer = if is_deletion {
                    daemon.try_call("DELETE", "/vms/g", None)
                } else {
                    daemon.try_call("POST", "/vms", Some(&request))
                };
                let died = killer.end(|| drop(daemon.try_call("GET", "/healthz", None)));
                if died.is_some() {
                    killed += 1;
                    daemon.kill_and_restart();
                } else {
                    assert!(answer.is_some());
                    *over = true;
                }
                let why = format!("step {step}, {died:?}");
                if daemon.call("GET", "/vms/g", None).0 == 200 {
                    assert_eq!(used(&daemon), 1, "{why}");
                    delete(&daemon, "g");
                }
                no_processes_but(&daemon, &[]);
                assert_eq!((used(&daemon), state()), (0, clean.clone()), "{why}");
            }
            if is_over == [true; 2] {
                break;
            }
        }
        eprintln!("killed at {killed} steps");
        assert!(killed > 20, "{killed}");
    });
}

#[test]
fn clones_have_addresses_of_their_own_outside_and_those_of_their_template_inside() {
    in_namespace(|| {
        let mut daemon = Daemon::start(&ARGUMENTS);
        let clean = state();
        let source = create(&daemon, "a", json!({"publish": ["8080:80"]}));
        let (status, template) = daemon.post("/templates", &json!({"id": "t", "vm": "a"}));
        assert_eq!(status, 201, "{template}");
        let mut clones = Vec::new();
        for id in ["c1", "c2"] {
            let (status, vm) = daemon.post("/vms", &json!({"id": id, "template": "t"}));
            assert_eq!((status, &vm["state"]), (201, &json!("running")), "{vm}");
            clones.push(vm);
        }
        let own = |vm: &Value, field: &str| vm["networks"][0][field].clone();
        assert_eq!(own(&source, "inner_ipv4"), Value::Null);
        for (clone, address) in clones.iter().zip(["10.1.0.3", "10.1.0.4"]) {
            assert_eq!(
                (own(clone, "ipv4"), own(clone, "inner_ipv4")),
                (json!(address), json!("10.1.0.2"))
            );
            assert_eq!(own(clone, "guest_mac"), own(&source, "guest_mac"));
            assert_eq!(own(clone, "publish"), json!([]));
            assert_eq!(taps_of(pid(clone)), [own(clone, "tap").as_str().unwrap()]);
        }
        assert!(state().contains("10.1.0.2 dev cop-0a010003"), "{}", state());
        // A clone has ports of its own, where it asks for them.
        let publish = |id: &str, port: &str| {
            let port = format!("eth0={port}");
            daemon.cli(&[
                "vm",
                "create",
                "--name",
                id,
                "--template",
                "t",
                "--publish",
                &port,
            ])
        };
        assert_eq!(publish("c3", "9090:80").0, 0);
        assert_eq!(
            own(&daemon.get("/vms/c3"), "publish"),
            json!(["9090:80/tcp"])
        );
        let (code, _, said) = publish("c4", "8080:80");
        assert!(code != 0 && said.contains("leads to guest a"), "{said}");
        delete(&daemon, "c3");
        // A clone that boots anew has the same.
        daemon.post("/vms/c1/stop", &json!({"timeout_s": 0}));
        daemon.kill_and_restart();
        assert_eq!(daemon.post("/vms/c1/start", &json!(null)).0, 200);
        assert_eq!(own(&daemon.get("/vms/c1"), "ipv4"), "10.1.0.3");
        let config = daemon.get("/vms/c1/vm/config");
        assert_eq!(
            config["network-interfaces"][0]["lease"]["ipv4"],
            "10.1.0.2/16"
        );
        for id in ["c1", "c2", "a"] {
            delete(&daemon, id);
        }
        assert_eq!((state(), used(&daemon)), (clean, 0));
        // The network of the template is gone.
        daemon.terminate();
        daemon.change_arguments(&["--network", "other=10.9.0.0/24,isolated"]);
        daemon.restart();
        let (status, fault) = daemon.post("/vms", &json!({"id": "c3", "template": "t"}));
        let message = fault["fault_message"].as_str().unwrap();
        assert!(
            status == 400 && message.contains("there is no network \"lan\""),
            "{fault}"
        );
    });
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_left_of_it() {
    in_namespace(|| {
        let daemon = Daemon::start(&ARGUMENTS);
        create(
            &daemon,
            "a",
            json!({"publish": ["8080:80"], "guest_mac": "06:00:00:00:00:01"}),
        );
        let before = state();
        for (fields, named) in [
            (json!({"network": "none"}), "no network \"none\""),
            (json!({"network": "No"}), "network-interfaces.network"),
            (json!({"publish": ["8080:81"]}), "leads to guest a"),
            (json!({"publish": ["80"]}), "published port"),
            (json!({"guest_mac": "06:00:00:00:00:01"}), "guest a has"),
            (
                json!({"guest_mac": "01:00:00:00:00:01"}),
                "01:00:00:00:00:01",
            ),
            (json!({"mtu": 9000}), "1500 bytes"),
            (json!({"host_dev_name": "tap0"}), "beside host_dev_name"),
            (json!({"num_queue_pairs": 2}), "num_queue_pairs"),
            (json!({"lease": {}}), "leave it out"),
            (json!({"network": null}), "host_dev_name"),
            (json!({"network": null, "host_dev_name": "none0"}), "none0"),
        ] {
            let (status, fault) = daemon.post("/vms", &spec(&daemon, "x", fields));
            let message = fault["fault_message"].as_str().unwrap();
            assert!(
                matches!(status, 400 | 422) && message.contains(named),
                "{status} {fault}"
            );
            assert_eq!(daemon.call("GET", "/vms/x", None).0, 404);
        }
        assert_eq!((state(), used(&daemon)), (before, 1));
        for number in 0..5 {
            create(&daemon, &format!("b{number}"), json!({"network": "b"}));
        }
        let (status, fault) = daemon.post("/vms", &spec(&daemon, "b5", json!({"network": "b"})));
        let message = fault["fault_message"].as_str().unwrap();
        assert!(
            status == 400 && message.contains("no address of 10.2.0.0/29 is free"),
            "{fault}"
        );
        // By the command line, too.
        let (code, _, said) = daemon.cli(&[
            "vm",
            "create",
            "--name",
            "y",
            "--kernel",
            &daemon.kernel(),
            "--net",
            "network=b",
        ]);
        assert!(code != 0 && said.contains("is free"), "{said}");
        let net = "network=lan,publish=127.0.0.1:2222:22,mac=06:00:00:00:00:09";
        let made = daemon.cli(&[
            "vm",
            "create",
            "--name",
            "y",
            "--kernel",
            &daemon.kernel(),
            "--mem",
            "16M",
            "--net",
            net,
        ]);
        assert_eq!(made.0, 0, "{}", made.2);
        assert_eq!(
            daemon.get("/vms/y")["networks"][0]["publish"],
            json!(["127.0.0.1:2222:22/tcp"])
        );
    });
}

#[test]
fn a_guest_that_waits_gets_its_addresses_when_it_is_configured() {
    in_namespace(|| {
        let mut daemon = Daemon::start(&ARGUMENTS);
        let clean = state();
        daemon.create_waiting("g");
        let tell = |daemon: &Daemon, path: &str, body: Value| {
            daemon.call("PUT", &format!("/vms/g{path}"), Some(&body))
        };
        tell(
            &daemon,
            "/boot-source",
            json!({"kernel_image_path": daemon.kernel()}),
        );
        tell(&daemon, "/sharing", json!({"mode": "off"}));
        let interface = |network: &str| json!({"iface_id": "eth0", "network": network});
        let refused = tell(&daemon, "/network-interfaces/eth0", interface("none"));
        assert_eq!(refused.0, 400, "{}", refused.1);
        // A request that the process refuses changes nothing.
        let other = tell(&daemon, "/network-interfaces/eth1", interface("lan"));
        assert_eq!((other.0, used(&daemon)), (400, 0), "{}", other.1);
        assert_eq!(
            tell(&daemon, "/network-interfaces/eth0", interface("b")).0,
            204
        );
        assert_eq!(
            tell(&daemon, "/network-interfaces/eth0", interface("lan")).0,
            204
        );
        assert_eq!(daemon.get("/networks")["networks"][1]["addresses_used"], 0);
        let record: Value =
            serde_json::from_slice(&fs::read(daemon.vm_folder("g").join("vm.json")).unwrap())
                .unwrap();
        assert_eq!(
            record["interfaces"]["eth0"]["attachment"]["outer"]["v4"],
            "10.1.0.2"
        );
        assert_eq!(state(), clean, "a guest that waits has nothing on the host");
        daemon.kill_and_restart();
        assert_eq!(used(&daemon), 1);
        assert_eq!(daemon.post("/vms/g/start", &json!(null)).0, 200);
        let vm = daemon.get("/vms/g");
        assert_eq!(taps_of(pid(&vm)), ["cop-0a010002"]);
        delete(&daemon, "g");
        assert_eq!((state(), used(&daemon)), (clean, 0));
    });
}

#[test]
fn a_daemon_without_networks_takes_away_what_it_had_and_leaves_those_of_others() {
    in_namespace(|| {
        let without = state();
        let mut daemon = Daemon::start(&ARGUMENTS);
        create(&daemon, "a", json!({}));
        // There is one table of rules for all, so a second daemon has none, and takes none away.
        let (_, said) = refusal(&["--network", "c=10.3.0.0/24,isolated"]);
        assert!(
            said.contains("another daemon of this host has networks"),
            "{said}"
        );
        let made = state();
        let other = Daemon::start(&[]);
        assert_eq!(other.get("/networks"), json!({"networks": []}));
        drop(other);
        assert_eq!(state(), made);
        daemon.terminate();
        daemon.change_arguments(&[]);
        daemon.restart();
        assert_eq!(state(), without);
        assert_eq!(daemon.get("/vms/a")["state"], "running");
        daemon.post("/vms/a/stop", &json!({"timeout_s": 0}));
        let (status, fault) = daemon.post("/vms/a/start", &json!(null));
        let message = fault["fault_message"].as_str().unwrap();
        assert!(
            status == 400 && message.contains("network lan is none of this daemon's"),
            "{fault}"
        );
        // With its network, the guest starts again, under the address that it had.
        daemon.terminate();
        daemon.change_arguments(&[&ARGUMENTS[..], &["--remove-networks"]].concat());
        daemon.restart();
        assert_eq!(daemon.post("/vms/a/start", &json!(null)).0, 200);
        assert_eq!(daemon.get("/vms/a")["networks"][0]["ipv4"], "10.1.0.2");
        daemon.terminate();
        assert_eq!(state(), without);
    });
}

/// The end of a daemon that is refused: its code, and what it says.
fn refusal(arguments: &[&str]) -> (i32, String) {
    refusal_of(coppice().args(["serve"]).args(arguments))
}

fn refusal_of(command: &mut Command) -> (i32, String) {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(
        folder.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )
    .unwrap();
    let output = command
        .arg("--socket")
        .arg(folder.path().join("s"))
        .arg("--state")
        .arg(folder.path().join("state"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap(), said)
}

#[test]
fn a_daemon_that_cannot_have_its_networks_says_why_and_leaves_nothing() {
    in_namespace(|| {
        let without = state();
        for (arguments, code, named) in [
            (&["--network", "lan=10.1.0.0/33"][..], 2, "--network"),
            (&["--network", "lan=10.1.0.0/16,nat"], 2, "nat"),
            (
                &[
                    "--network",
                    "a=10.0.0.0/8,isolated",
                    "--network",
                    "b=10.1.0.0/16,isolated",
                ],
                2,
                "networks a and b: the ranges 10.0.0.0/8 and 10.1.0.0/16 overlap",
            ),
            (
                &["--network", "lan=192.0.2.0/24,isolated"],
                1,
                "192.0.2.1, which is an address of this host",
            ),
            (&["--remove-networks"], 2, "--network"),
        ] {
            let (found, said) = refusal(arguments);
            assert!(found == code && said.contains(named), "{found}: {said}");
            assert!(!said.contains("thread"), "{said}");
        }
        let program = env!("CARGO_BIN_EXE_coppice");
        // A copy of the program that anybody may start.
        let copy = tempfile::tempdir().unwrap();
        fs::set_permissions(
            copy.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
        let coppice = copy.path().join("coppice");
        fs::copy(program, &coppice).unwrap();
        let mut command = Command::new(&coppice);
        command
            .uid(65534)
            .gid(65534)
            .args(["serve", "--network", "lan=10.1.0.0/16,isolated"]);
        let (_, said) = refusal_of(&mut command);
        assert!(said.contains("root, or CAP_NET_ADMIN"), "{said}");
        assert_eq!(state(), without);
        assert!(!ip("route").contains("10.1.0.0"));
    });
}
