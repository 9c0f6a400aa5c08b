//! A guest's process that leaves anything in the place of any file in its folder, before each thing that the daemon
//! does with the guest. Nothing outside of the folder changes by that, and the daemon goes on.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::serve::daemon::Daemon;
use crate::serve::liar::{Answer, Liar};
use crate::serve::outside::{Canaries, Outside};
use crate::serve::plant::Plant;
use crate::serve::traces::{make_disk, source};

/// What the daemon's memory may grow by.
const ROOM_KIB: u64 = 32 << 10;

/// Files of a guest's folder that root or the guest's process makes, opens, reads or removes there: those that may keep
/// a guest from its start by themselves, and the others together.
const FILES: [&[&str]; 8] = [
    &["api.sock"],
    &["console.sock"],
    &["vsock.sock"],
    &["log.pipe"],
    &["end.json"],
    &["disk.vhdx"],
    &["end.json.new", "log.new", "state", "memory"],
    &[
        "vm.json.new",
        "config.json.new",
        "pid.json.new",
        "metadata.json.new",
    ],
];

/// The daemon, its canaries, and guests that are attacked by way of their folders.
struct Attacked {
    daemon: Daemon,
    canaries: Arc<Canaries>,
    neighbour: Value,
    peak_kib: u64,
}

impl Attacked {
    fn new() -> Self {
        let daemon = Daemon::start(&[]);
        make_disk(daemon.folder());
        let (status, neighbour) = daemon.post("/vms", &daemon.spec("neighbour"));
        assert_eq!(status, 201, "{neighbour}");
        Self {
            canaries: Arc::new(Canaries::new()),
            peak_kib: daemon.peak_kib(),
            neighbour,
            daemon,
        }
    }

    fn outside(&self, guests: &[String]) -> Outside {
        let mut without: Vec<PathBuf> = guests.iter().map(|id| self.daemon.vm_folder(id)).collect();
        let disks = guests.iter().map(|id| format!("{id}.vhdx"));
        without.extend(disks.map(|disk| self.daemon.folder().join(disk)));
        Outside::of(&self.canaries, &self.daemon, &without)
    }

    /// A guest that has run, with a disk in its own folder.
    fn create(&self, id: &str) {
        let folder = self.folder(id);
        let base = self.daemon.folder().join(format!("{id}.vhdx"));
        fs::copy(self.daemon.folder().join("a.vhdx"), &base).unwrap();
        fs::set_permissions(&base, fs::Permissions::from_mode(0o666)).unwrap();
        let mut spec = self.daemon.spec(id);
        let devices = json!({
            "drives": [{"drive_id": "root", "path_on_host": base, "is_root_device": false}],
            "vsock": {},
        });
        for (device, config) in devices.as_object().unwrap() {
            spec["config"][device] = config.clone();
        }
        let (status, answer) = self.daemon.post("/vms", &spec);
        assert_eq!(status, 201, "{answer}");
        let child = json!({"path_on_host": folder.join("disk.vhdx")});
        let path = format!("/vms/{id}/drives/root/snapshot");
        let (status, answer) = self.daemon.call("PUT", &path, Some(&child));
        assert_eq!(status, 204, "{answer}");
        let (status, answer) = self
            .daemon
            .post(&format!("/vms/{id}/stop"), &json!({"timeout_s": 0}));
        assert_eq!(status, 200, "{answer}");
    }

    /// The folder of a guest, by its own name.
    fn folder(&self, id: &str) -> PathBuf {
        self.daemon.vm_folder("").canonicalize().unwrap().join(id)
    }

    fn plant(&self, plant: Plant, id: &str, names: &[&str]) {
        let uid = self.daemon.get(&format!("/vms/{id}"))["guest_uid"].as_u64();
        let uid = u32::try_from(uid.unwrap()).unwrap();
        for name in names {
            plant.at(&self.folder(id).join(name), &self.canaries, uid);
        }
    }

    /// Sends a request, which is answered in time.
    fn ask(&self, method: &str, path: &str, body: &Value) -> u16 {
        let body = Some(body).filter(|body| !body.is_null());
        let answer = self.daemon.try_call(method, path, body);
        let (status, answer) = answer.unwrap_or_else(|| panic!("{method} {path} is not answered"));
        assert!((200..600).contains(&status), "{method} {path}: {answer}");
        status
    }

    /// What is outside is as `before`, and no process of these guests has any of it open.
    fn check(&self, guests: &[String], before: &Outside, what: &str) {
        self.outside(guests).expect(before, what);
        for id in guests {
            let vm = self.daemon.call("GET", &format!("/vms/{id}"), None).1;
            if let Some(pid) = vm["pid"].as_u64() {
                let open = before.open_files_of(u32::try_from(pid).unwrap());
                assert!(open.is_empty(), "{what}: {id} has {open:?} open");
            }
        }
        let grown = self.daemon.peak_kib().saturating_sub(self.peak_kib);
        assert!(grown < ROOM_KIB, "{what}: {grown} KiB");
    }

    fn end(&self) {
        let neighbour = self.daemon.get("/vms/neighbour");
        assert_eq!(neighbour["pid"], self.neighbour["pid"]);
        assert!(self.daemon.echoes("neighbour"));
    }
}

/// Puts each thing in the place of each file before each thing that the daemon does with a guest.
fn attack(plants: &[Plant]) {
    if !skip::unless_root() {
        return;
    }
    let mut attacked = Attacked::new();
    let guests: Vec<_> = (0..FILES.len())
        .map(|number| format!("g{number}"))
        .collect();
    let before = attacked.outside(&guests);
    for &plant in plants {
        let files = || guests.iter().zip(FILES);
        for (id, names) in files() {
            attacked.create(id);
            attacked.plant(plant, id, names);
            attacked.ask("POST", &format!("/vms/{id}/start"), &Value::Null);
        }
        attacked.check(&guests, &before, &format!("{plant:?} before a start"));
        for (id, names) in files() {
            attacked.plant(plant, id, names);
            attacked.ask("GET", &format!("/vms/{id}?stats=true"), &Value::Null);
            if names.contains(&"state") {
                let folder = attacked.folder(id);
                let body = json!({"snapshot_path": folder.join("state"), "mem_file_path": folder.join("memory")});
                attacked.ask("POST", &format!("/vms/{id}/pause"), &json!({}));
                attacked.ask("PUT", &format!("/vms/{id}/snapshot/create"), &body);
                attacked.plant(plant, id, names);
            }
        }
        attacked.check(&guests, &before, &format!("{plant:?} while it runs"));
        attacked.daemon.kill_and_restart();
        attacked.peak_kib = attacked.daemon.peak_kib();
        attacked.check(&guests, &before, &format!("{plant:?} before a restart"));
        for (id, names) in files() {
            attacked.ask("POST", &format!("/vms/{id}/stop"), &json!({"timeout_s": 0}));
            attacked.plant(plant, id, names);
            let status = attacked.ask("DELETE", &format!("/vms/{id}"), &Value::Null);
            assert!(status < 300, "{plant:?} for {names:?}: {status}");
        }
        attacked.check(&guests, &before, &format!("{plant:?} before a deletion"));
    }
    attacked.end();
}

#[test]
fn no_link_in_the_place_of_a_file_leads_a_start_a_snapshot_a_restart_or_a_deletion_elsewhere() {
    attack(&Plant::LINKS);
}

#[test]
fn no_special_file_in_the_place_of_a_file_is_waited_for_or_taken_for_it() {
    attack(&Plant::SPECIAL);
}

#[test]
fn no_folder_and_no_other_file_in_the_place_of_a_file_stops_the_daemon() {
    attack(&Plant::PLAIN);
}

#[test]
fn folders_in_each_other_in_the_place_of_a_file_do_not_stop_the_daemon() {
    attack(&Plant::DEEP);
}

/// Files of the folder that a template is made in, and that folder and the guest's next disk themselves.
const OF_TEMPLATE: [&str; 8] = [
    "template-t",
    "template-t/state",
    "template-t/memory",
    "template-t/disk-root",
    "template-t/template.json",
    "template-t/template.json.new",
    "template-t/other",
    "disk-root-after-t.vhdx",
];

/// Puts something in the place of a file, once.
type PlantLater = Arc<Mutex<Option<Box<dyn Fn() + Send>>>>;

/// Makes a file where there is nothing.
fn make(path: &Path, content: &[u8]) {
    if let Ok(mut file) = File::create_new(path) {
        file.write_all(content).unwrap();
    }
}

/// Takes the place of the process of `a`, which makes a template, and puts something else in the place of a file while
/// it does: at first what is in `planted`.
fn make_templates_of_plants(attacked: &Attacked, planted: PlantLater) -> Liar {
    let folder = attacked.daemon.vm_folder("a");
    let made = folder.clone();
    Liar::take_over(&folder, move |request| {
        match request {
            "PUT /snapshot/create" => {
                make(&made.join("template-t/state"), &[0xff; 8 << 10]);
                make(&made.join("template-t/memory"), &[0xff; 8 << 10]);
            }
            "PUT /drives/root/snapshot" => make(&made.join("disk-root-after-t.vhdx"), b"vhdxfile"),
            _ => return Answer::Honest,
        }
        if let Some(plant) = planted.lock().unwrap().take() {
            plant();
        }
        Answer::new(204, b"")
    })
}

#[test]
fn nothing_in_the_place_of_a_file_of_a_template_leads_the_daemon_or_a_clone_elsewhere() {
    if !skip::unless_root() {
        return;
    }
    let mut attacked = Attacked::new();
    source(&attacked.daemon, 16);
    let guests = ["a".to_owned(), "b".to_owned()];
    let before = attacked.outside(&guests);
    let uid = attacked.daemon.get("/vms/a")["guest_uid"].as_u64().unwrap();
    let uid = u32::try_from(uid).unwrap();
    let mut made = 0;
    let links_and_special = Plant::LINKS.into_iter().chain(Plant::SPECIAL);
    for plant in links_and_special.chain(Plant::PLAIN).chain(Plant::DEEP) {
        let planted = PlantLater::default();
        let liar = make_templates_of_plants(&attacked, planted.clone());
        for name in OF_TEMPLATE {
            let path = attacked.daemon.vm_folder("a").join(name);
            let (at, canaries) = (path.clone(), attacked.canaries.clone());
            *planted.lock().unwrap() = Some(Box::new(move || plant.at(&at, &canaries, uid)));
            if !name.contains('/') {
                plant.at(&path, &attacked.canaries, uid);
            }
            let status = attacked.ask("POST", "/templates", &json!({"id": "t", "vm": "a"}));
            if status == 201 {
                made += 1;
                check_template(&attacked.daemon);
                attacked.ask("POST", "/vms", &json!({"id": "b", "template": "t"}));
                attacked.ask("DELETE", "/vms/b", &Value::Null);
            }
            attacked.ask("DELETE", "/templates/t", &Value::Null);
            attacked.check(&guests, &before, &format!("{plant:?} for {name}"));
        }
        drop(liar);
        let planted = attacked.daemon.vm_folder("a").join("template-t");
        plant.at(&planted, &attacked.canaries, uid);
        attacked.daemon.kill_and_restart();
        attacked.peak_kib = attacked.daemon.peak_kib();
        assert!(attacked.ask("DELETE", "/vms/a", &Value::Null) < 300);
        attacked.check(&guests, &before, &format!("{plant:?} before a restart"));
        source(&attacked.daemon, 16);
    }
    assert!(made > 0);
    attacked.end();
}

/// A template has regular files alone, which are the daemon's.
fn check_template(daemon: &Daemon) {
    let folder = daemon.folder().join("state/templates/t");
    for entry in fs::read_dir(&folder).unwrap().flatten() {
        let file = entry.path().symlink_metadata().unwrap();
        assert!(
            file.is_file() && file.uid() == 0,
            "{}",
            entry.path().display()
        );
    }
}
