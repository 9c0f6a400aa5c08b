//! Scenarios of the daemon's networks: Linux guests get addresses, and reach what their network says, and so do clones.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Instant;

use serde_json::{Value, json};

use super::network::{LEASED, host};
use super::serve::Daemon;
use crate::result::{Failure, Figures};

/// Where the lab's host has its disk: the daemon starts nft(8) in a folder of its own.
const HERE: &str = "/mnt";
/// Two networks, whose servers of names nobody asks.
const NETWORKS: [&str; 4] = [
    "--network",
    "lan=10.1.0.0/16,v6=fd00:1::/48,dns=198.51.100.7",
    "--network",
    "closed=10.2.0.0/24,isolated",
];
/// The guest asks for its address, serves a file with its name, and then executes the lines that are typed on its
/// console.
const SCRIPT: &str = "ip link set lo up; ip link set eth0 up; \
    udhcpc -n -q -i eth0 -O mtu -O hostname -s /tmp/leased >/tmp/lease 2>&1 </dev/null; \
    mkdir /tmp/www; hostname >/tmp/www/id; httpd -h /tmp/www; \
    echo READY; while read line; do eval \"$line\"; done";

/// What a program of the lab's host prints.
fn output(line: &str) -> Result<String, Failure> {
    let mut words = line.split_whitespace();
    let program = words.next().unwrap_or_default();
    let output = Command::new(program).args(words).output();
    let output = output.map_err(Failure::io("run a program"))?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if output.status.success() {
        Ok(text)
    } else {
        let said = String::from_utf8_lossy(&output.stderr);
        Failure::claim(format!("{line}: {}: {said}", output.status))
    }
}

fn expect(what: &str, found: &str, expected: &str) -> Result<(), Failure> {
    if found == expected {
        Ok(())
    } else {
        Failure::claim(format!("{what}: {found:?}, and not {expected:?}"))
    }
}

/// The kernel's modules, and nft(8), which has brought its libraries.
fn prepare() -> Result<(), Failure> {
    let order = fs::read_to_string("guest/modules/order").map_err(Failure::io("read the order"))?;
    for module in order.split_whitespace() {
        host(&format!("insmod guest/modules/{module}.ko"))?;
    }
    let wrapper = format!(
        "#!/bin/sh\nexec {HERE}/nft/lib/ld-linux-x86-64.so.2 --library-path {HERE}/nft/lib {HERE}/nft/nft \"$@\"\n"
    );
    fs::write("/bin/nft", wrapper).map_err(Failure::io("write nft"))?;
    fs::set_permissions("/bin/nft", fs::Permissions::from_mode(0o755))
        .map_err(Failure::io("make nft a program"))
}

/// Another host, which the lab's host reaches by its default route, and that serves a file.
struct Outside(Child);

impl Outside {
    fn start(out: &Path) -> Result<Self, Failure> {
        let mut sleeping = Command::new("unshare");
        let sleeping = sleeping.args(["-n", "sleep", "100000"]).spawn();
        let outside = Self(sleeping.map_err(Failure::io("make a network namespace"))?);
        // Its pair is veth0.
        host("ip link add out0 type veth")?;
        host("ip addr add 198.51.100.1/24 dev out0")?;
        host("ip link set out0 up")?;
        // The namespace is there a moment after the process is.
        let begun = Instant::now();
        let own = fs::read_link("/proc/self/ns/net").map_err(Failure::io("find the namespace"))?;
        let place = format!("/proc/{}/ns/net", outside.0.id());
        while fs::read_link(&place).is_ok_and(|other| other == own) {
            if begun.elapsed().as_secs() > 10 {
                return Failure::claim("unshare has made no network namespace");
            }
            std::thread::yield_now();
        }
        host(&format!("ip link set veth0 netns {}", outside.0.id()))?;
        let www = out.join("www");
        fs::create_dir_all(&www).map_err(Failure::io("make a folder"))?;
        fs::write(www.join("file"), "outside\n").map_err(Failure::io("write a file"))?;
        for line in [
            "ip link set lo up",
            "ip addr add 198.51.100.7/24 dev veth0",
            "ip link set veth0 up",
            // So that only the rules keep it from the guests.
            "ip route add 10.1.0.0/16 via 198.51.100.1",
            &format!("httpd -p 8080 -h {}", www.display()),
        ] {
            outside.run(line)?;
        }
        host("ip route add default via 198.51.100.7")?;
        Ok(outside)
    }

    /// What a program prints that runs there.
    fn run(&self, line: &str) -> Result<String, Failure> {
        output(&format!("nsenter -t {} -n {line}", self.0.id()))
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // The server in it goes on, until the host ends.
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = host("ip link del out0");
    }
}

fn boot(daemon: &Daemon, id: &str, interface: &Value) -> Result<String, Failure> {
    let config = json!({"network-interfaces": [interface]});
    daemon.boot_with(id, &format!("{LEASED}{SCRIPT}"), &config)?;
    address(daemon, id)
}

/// The address by which others reach a guest.
fn address(daemon: &Daemon, id: &str) -> Result<String, Failure> {
    let vm = daemon.expect(200, "GET", &format!("/vms/{id}"), &Value::Null)?;
    let address = vm["networks"][0]["ipv4"].as_str();
    address.map_or_else(
        || Failure::claim(format!("{vm}")),
        |text| Ok(text.to_owned()),
    )
}

fn fetches_outside(daemon: &Daemon, id: &str) -> Result<(), Failure> {
    let line = "echo GOT $(timeout 20 wget -q -O - http://198.51.100.7:8080/file) E''ND";
    daemon.console(id, line, "GOT outside END")
}

/// Guests get addresses of their network, reach a server outside and not each other, and are reached by a published
/// port; clones are reached at addresses of their own as soon as they run.
pub fn reaches(out: &Path) -> Result<Figures, Failure> {
    let mut figures = Figures::new();
    prepare()?;
    let outside = Outside::start(out)?;
    let daemon = Daemon::start(out, &[&["--memory-ratio", "4"][..], &NETWORKS].concat())?;
    let eth0 = json!({"iface_id": "eth0", "network": "lan"});
    let mut published = eth0.clone();
    published["publish"] = json!(["8080:80"]);
    expect("a's address", &boot(&daemon, "a", &published)?, "10.1.0.2")?;
    expect("b's address", &boot(&daemon, "b", &eth0)?, "10.1.0.3")?;
    let lease = "LEASE 10.1.0.2/16 10.1.0.1 198.51.100.7 a 1500 END";
    daemon.console("a", "cat /tmp/lease", lease)?;
    for id in ["a", "b"] {
        fetches_outside(&daemon, id)?;
        daemon.console(id, &format!("echo {id} >/tmp/www/id; echo DO''NE"), "DONE")?;
    }
    let reach = "timeout 5 wget -q -O - http://10.1.0.2/id && echo REA''CHED || echo RE''FUSED";
    daemon.console("b", reach, "REFUSED")?;
    let reach = "ping -c 2 -W 2 10.1.0.2 >/dev/null && echo ANS''WERED || echo SIL''ENT";
    daemon.console("b", reach, "SILENT")?;
    let by_port = outside.run("timeout 20 wget -q -O - http://198.51.100.1:8080/id")?;
    expect("the published port", &by_port, "a")?;
    if let Ok(got) = outside.run("timeout 3 wget -q -O - http://10.1.0.3/id") {
        return Failure::claim(format!(
            "a guest is reached from outside without a port: {got}"
        ));
    }
    expect(
        "b from the host",
        &output("timeout 20 wget -q -O - http://10.1.0.3/id")?,
        "b",
    )?;

    daemon.template("t", "a")?;
    for id in ["c1", "c2"] {
        let begun = Instant::now();
        daemon.clone_of("t", id)?;
        let address = address(&daemon, id)?;
        let first = output(&format!("timeout 20 wget -q -O - http://{address}/id"))?;
        figures.insert(
            format!("{id}_answers_after_seconds"),
            json!(begun.elapsed().as_secs_f64()),
        );
        expect("a clone at once", &first, "a")?;
        daemon.console(id, &format!("echo {id} >/tmp/www/id; echo DO''NE"), "DONE")?;
    }
    for id in ["c1", "c2"] {
        let address = address(&daemon, id)?;
        let own = output(&format!("timeout 20 wget -q -O - http://{address}/id"))?;
        expect("a clone", &own, id)?;
        fetches_outside(&daemon, id)?;
    }
    // The port is that of the template's guest.
    let by_port = outside.run("timeout 20 wget -q -O - http://198.51.100.1:8080/id")?;
    expect("the published port", &by_port, "a")?;
    let networks = daemon.expect(200, "GET", "/networks", &Value::Null)?;
    println!("lab: {networks}");
    for id in ["c1", "c2", "b", "a"] {
        daemon.expect(204, "DELETE", &format!("/vms/{id}"), &Value::Null)?;
    }
    let left = output("ip link show")? + &output("nft list ruleset")?;
    if left.contains("cop-0a01") {
        return Failure::claim(format!("something of a guest is left: {left}"));
    }
    Ok(figures)
}
