use std::path::Path;
use std::sync::Mutex;

use devices::device_list::DeviceList;
use devices::rate_limiter::{BucketUpdate, LimitsUpdate};
use devices::virtio::Interrupt;
use devices::virtio::balloon::{BalloonError, VirtioBalloon};
use serde_json::{Value, json};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::logging::{LogFilter, LogFormat};
use config::{
    BalloonConfig, BalloonStatisticsUpdate, BalloonUpdate, DriveConfig, EntropyConfig,
    HintingStart, HugePageConfig, LoggerConfig, MachineConfig, NetworkInterfaceUpdate, PmemConfig,
    PmemMode, SerialConfig,
};
use machine::snapshot::SnapshotError;
use machine::{
    DriveError, DriveParent, DriveTask, JobState, JobStatus, MachineError, MachineMetrics,
    StartError,
};

/// What was asked of a [`Double`], in order.
pub(crate) type Calls = Arc<Mutex<Vec<String>>>;

/// A guest that does nothing but remember; its balloon has no driver.
pub(crate) struct Double {
    calls: Calls,
    balloon: Option<Arc<Mutex<VirtioBalloon>>>,
}

impl Double {
    fn call(&self, what: impl Into<String>) {
        self.calls.lock().unwrap().push(what.into());
    }
}

/// Bytes and operations.
fn described(LimitsUpdate { bandwidth, ops }: LimitsUpdate) -> String {
    let described = |update: BucketUpdate| match update {
        BucketUpdate::Keep => "kept".to_owned(),
        BucketUpdate::Remove => "free".to_owned(),
        BucketUpdate::Replace(limits) => limits.size().to_string(),
    };
    format!("{} {}", described(bandwidth), described(ops))
}

impl Guest for Double {
    fn pause(&mut self) {
        self.call("pause");
    }

    fn resume(&mut self) {
        self.call("resume");
    }

    fn send_ctrl_alt_del(&mut self) -> Result<(), MachineError> {
        self.call("ctrl-alt-del");
        Err(MachineError::KeyboardBusy)
    }

    fn limit_interface(&mut self, update: &NetworkInterfaceUpdate) -> Result<(), MachineError> {
        self.call(format!("limit {}", update.iface_id));
        Ok(())
    }

    fn replace_drive(&mut self, drive: &DriveConfig) -> Result<(), MachineError> {
        self.call(format!("replace {}", drive.drive_id));
        if drive.drive_id == "broken" {
            Err(MachineError::NoDrive("broken".to_owned()))
        } else {
            Ok(())
        }
    }

    fn limit_drive(&self, id: &str, update: LimitsUpdate) -> Result<(), MachineError> {
        self.call(format!("limit {id} {}", described(update)));
        if id == "broken" {
            return Err(MachineError::Limits {
                device: id.to_owned(),
                source: std::io::ErrorKind::OutOfMemory.into(),
            });
        }
        Ok(())
    }

    fn limit_pmem(&self, id: &str, update: LimitsUpdate) -> Result<(), MachineError> {
        self.call(format!("limit pmem {id} {}", described(update)));
        Ok(())
    }

    fn snapshot_drive(&mut self, id: &str, path: &Path, new: &Path) -> Result<(), MachineError> {
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        self.call(format!("snapshot {id} {} {}", name(path), name(new)));
        Ok(())
    }

    fn snapshot_pmem(&mut self, id: &str, path: &Path, new: &Path) -> Result<(), MachineError> {
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        self.call(format!("snapshot pmem {id} {} {}", name(path), name(new)));
        Ok(())
    }

    fn resize_drive(&mut self, id: &str, size: u64) -> Result<(), MachineError> {
        self.call(format!("resize {id} {size}"));
        Ok(())
    }

    fn drive_parent(&self, id: &str, path: &Path) -> Result<DriveParent, MachineError> {
        self.call(format!("parent {id} {}", path.display()));
        Ok(DriveParent {
            path_on_host: "/base".into(),
        })
    }

    fn start_job(&mut self, id: &str, task: DriveTask) -> Result<(), MachineError> {
        match task {
            DriveTask::Compact { find_zeros } => self.call(format!("compact {id} {find_zeros}")),
            DriveTask::Commit { .. } => self.call(format!("commit {id}")),
        }
        Ok(())
    }

    fn job(&self, id: &str) -> Result<JobStatus, MachineError> {
        // The double has done all at once.
        let calls = self.calls.lock().unwrap();
        if calls.iter().any(|call| call == &format!("commit {id}")) {
            return Ok(JobStatus {
                operation: "commit",
                state: JobState::Done,
                done: 5,
                total: 5,
                error: None,
                path_on_host: Some("/base".into()),
                base_on_host: None,
            });
        }
        Err(MachineError::Change {
            drive: id.to_owned(),
            source: DriveError::NoJob,
        })
    }

    fn cancel_job(&self, id: &str) -> Result<(), MachineError> {
        self.call(format!("cancel {id}"));
        Ok(())
    }

    fn sharing(&self) -> Result<SharingReport, MachineError> {
        self.call("sharing");
        Ok(SharingReport::default())
    }

    fn page(&self, address: Address) -> Result<PageReport, MachineError> {
        self.call("page");
        Err(MachineError::NotRam(address.0))
    }

    fn pages_of(&self, _: FilePage) -> FilePageReport {
        self.call("pages of a file");
        FilePageReport::default()
    }

    fn balloon(&self) -> Option<Arc<Mutex<VirtioBalloon>>> {
        self.balloon.clone()
    }

    fn snapshot(
        &mut self,
        request: &CreateSnapshot,
        config: &VmConfig,
    ) -> Result<(), SnapshotError> {
        assert!(config.drives.iter().all(|d| d.path_on_host.is_absolute()));
        let kind = request.snapshot_type;
        self.call(format!("{kind:?} to {}", request.snapshot_path.display()));
        Ok(())
    }

    fn metrics(&self) -> MachineMetrics {
        self.call("metrics");
        let mut devices = DeviceList::default();
        if let Some(balloon) = &self.balloon {
            devices.add("balloon", balloon.clone());
        }
        MachineMetrics {
            devices: devices.metrics(),
            exits: Vec::new(),
            booted: None,
        }
    }

    fn shutdown(self: Box<Self>) {
        self.call("shutdown");
    }
}

/// Launches a [`Double`] if there is a boot source, as a machine would.
pub(crate) fn launch(calls: &Calls, config: &VmConfig) -> Result<Box<dyn Guest>, LaunchError> {
    if config.boot_source.is_none() {
        return Err(StartError::NoKernel.into());
    }
    let balloon = config.balloon.map(|balloon| {
        let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let interrupt = Arc::new(Interrupt::new(irqfd));
        let device = VirtioBalloon::new(&balloon.into(), Arc::new(|_, _| Ok(())), interrupt);
        Mutex::new(device.unwrap())
    });
    Ok(Box::new(Double {
        calls: calls.clone(),
        balloon: balloon.map(Arc::new),
    }))
}

/// A control without a configuration.
pub(crate) fn control() -> Control {
    let (log, subscriber) = Log::new(LogFilter::default(), LogFormat::Text);
    // The log can be changed as long as there is one.
    std::mem::forget(subscriber);
    Control::new(log, Arc::default())
}

/// A file that can be a kernel or a disk as far as control looks at it.
pub(crate) fn file(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, [0; 512]).unwrap();
    path
}

fn running(folder: &Path, calls: &Calls) -> Control {
    let mut control = control();
    let kernel_image_path = file(folder, "kernel");
    control
        .set_boot_source(BootSourceConfig {
            kernel_image_path,
            ..BootSourceConfig::default()
        })
        .unwrap();
    control
        .set_device(DriveConfig::new("a", file(folder, "a")))
        .unwrap();
    control
        .set_device(DriveConfig::new("broken", file(folder, "broken")))
        .unwrap();
    control.start(|config, _| launch(calls, config)).unwrap();
    control
}

#[test]
fn a_guest_is_configured_then_started_then_paused_and_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let calls = Calls::default();
    let mut control = running(folder.path(), &calls);
    assert_eq!(control.instance_info().state, State::Running);
    for _ in 0..2 {
        control.pause().unwrap();
        assert_eq!(control.instance_info().state, State::Paused);
    }
    for _ in 0..2 {
        control.resume().unwrap();
        assert_eq!(control.instance_info().state, State::Running);
    }
    control.end();
    control.end();
    assert_eq!(
        *calls.lock().unwrap(),
        ["pause", "resume", "metrics", "shutdown"]
    );
}

#[test]
fn a_guest_that_has_not_started_takes_no_orders() {
    let mut control = control();
    let update = serde_json::from_value(json!({"drive_id": "a", "path_on_host": "/x"})).unwrap();
    assert!(matches!(control.pause(), Err(ControlError::BeforeStart)));
    assert!(matches!(control.resume(), Err(ControlError::BeforeStart)));
    assert!(matches!(
        control.send_ctrl_alt_del(),
        Err(ControlError::BeforeStart)
    ));
    assert!(matches!(
        control.flush_metrics(),
        Err(ControlError::BeforeStart)
    ));
    assert!(matches!(
        control.update_drive(&update),
        Err(ControlError::BeforeStart)
    ));
}

fn set_machine(control: &mut Control, machine: MachineConfig) -> Result<(), ControlError> {
    control.change_config(|config| {
        config.set_machine(machine);
        Ok(())
    })
}

fn update_machine(control: &mut Control, update: &Value) -> Result<(), ControlError> {
    control.change_config(|config| config.update_machine(update))
}

fn set_serial(control: &mut Control, serial: SerialConfig) -> Result<(), ControlError> {
    control.change_config(|config| {
        config.serial = Some(serial);
        Ok(())
    })
}

fn refuses_to_be_configured(
    control: &mut Control,
    folder: &Path,
    because: fn(&ControlError) -> bool,
) {
    let before = control.config().clone();
    let kernel_image_path = file(folder, "other");
    let results = [
        control.configure(VmConfig::default()),
        control.set_boot_source(BootSourceConfig {
            kernel_image_path,
            ..BootSourceConfig::default()
        }),
        control.set_device(DriveConfig::new("b", file(folder, "b"))),
        control.set_device(PmemConfig::new("b", file(folder, "b"), PmemMode::Ro)),
        set_machine(control, MachineConfig::default()),
        update_machine(control, &json!({"vcpu_count": 2})),
        control.set_device(EntropyConfig::default()),
        control.set_device(BalloonConfig::default()),
        set_serial(control, SerialConfig::default()),
        control.set_logger(&LoggerConfig::default()),
        control.set_metrics(&MetricsConfig {
            metrics_path: folder.join("metrics"),
        }),
        control.start(|_, _| panic!("never launched")),
    ];
    for (number, result) in results.into_iter().enumerate() {
        assert!(because(&result.unwrap_err()), "request {number}");
    }
    assert_eq!(*control.config(), before);
    assert!(!folder.join("metrics").exists());
}

#[test]
fn a_started_guest_cannot_be_configured_and_an_ended_one_neither() {
    let folder = tempfile::tempdir().unwrap();
    let mut control = running(folder.path(), &Calls::default());
    refuses_to_be_configured(&mut control, folder.path(), |error| {
        matches!(error, ControlError::AfterStart)
    });
    control.end();
    refuses_to_be_configured(&mut control, folder.path(), |error| {
        matches!(error, ControlError::Ended)
    });
    assert!(matches!(control.pause(), Err(ControlError::Ended)));
}

#[test]
fn what_is_refused_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut control = control();
    control
        .set_device(DriveConfig {
            is_root_device: true,
            ..DriveConfig::new("a", file(folder.path(), "a"))
        })
        .unwrap();
    control.set_device(EntropyConfig::default()).unwrap();
    let before = control.config().clone();
    let second_root = DriveConfig {
        is_root_device: true,
        ..DriveConfig::new("b", file(folder.path(), "b"))
    };
    control.set_device(second_root).unwrap_err();
    control
        .set_device(DriveConfig::new("a", folder.path().join("missing")))
        .unwrap_err();
    control
        .set_device(BalloonConfig {
            amount_mib: 129,
            ..BalloonConfig::default()
        })
        .unwrap_err();
    let machine = MachineConfig {
        vcpu_count: 0,
        ..MachineConfig::default()
    };
    set_machine(&mut control, machine).unwrap_err();
    update_machine(&mut control, &json!({"vcpu_count": 3, "smt": true})).unwrap_err();
    control
        .set_metrics(&MetricsConfig {
            metrics_path: "/nonexistent/metrics".into(),
        })
        .unwrap_err();
    let log_path = Some("/nonexistent/log".into());
    control
        .set_logger(&LoggerConfig {
            log_path,
            ..LoggerConfig::default()
        })
        .unwrap_err();
    let mut drives = vec![DriveConfig::new("c", file(folder.path(), "c"))];
    control
        .configure(VmConfig {
            drives: drives.clone(),
            metrics: Some(MetricsConfig {
                metrics_path: "/".into(),
            }),
            ..VmConfig::default()
        })
        .unwrap_err();
    drives.push(DriveConfig::new("d", folder.path().join("missing")));
    control
        .configure(VmConfig {
            drives,
            ..VmConfig::default()
        })
        .unwrap_err();
    assert_eq!(*control.config(), before);
}

#[test]
fn a_guest_that_could_not_start_can_be_started_again() {
    let folder = tempfile::tempdir().unwrap();
    let calls = Calls::default();
    let mut control = control();
    assert!(matches!(
        control.start(|config, _| launch(&calls, config)),
        Err(ControlError::Launch(_))
    ));
    assert_eq!(control.instance_info().state, State::NotStarted);
    let kernel_image_path = file(folder.path(), "kernel");
    control
        .set_boot_source(BootSourceConfig {
            kernel_image_path,
            ..BootSourceConfig::default()
        })
        .unwrap();
    control.start(|config, _| launch(&calls, config)).unwrap();
}

#[test]
fn a_drive_of_a_running_guest_gets_another_file_or_keeps_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let calls = Calls::default();
    let mut control = running(folder.path(), &calls);
    let before = control.config().clone();
    let mut update = |id: &str, path: &Path| {
        let body = json!({"drive_id": id, "path_on_host": path});
        control.update_drive(&serde_json::from_value(body).unwrap())
    };
    let new = file(folder.path(), "new");
    assert!(matches!(update("c", &new), Err(ControlError::NoDrive(_))));
    assert!(matches!(
        update("a", &folder.path().join("missing")),
        Err(ControlError::Config(_))
    ));
    assert!(matches!(
        update("broken", &new),
        Err(ControlError::Machine(_))
    ));
    update("a", &new).unwrap();
    assert_eq!(*calls.lock().unwrap(), ["replace broken", "replace a"]);
    assert_eq!(control.config().drives[0].path_on_host, new);
    assert_eq!(control.config().drives[1], before.drives[1]);
}

#[test]
fn the_limits_of_a_running_guest_change_with_or_without_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let calls = Calls::default();
    let mut control = running(folder.path(), &calls);
    let new = file(folder.path(), "new");
    let old = control.config().drives[0].path_on_host.clone();
    let mut update = |body: Value| {
        let asked = control.update_drive(&serde_json::from_value(body).unwrap());
        let drives = &control.config().drives;
        (asked, drives.clone())
    };
    let bucket = |size| json!({"size": size, "refill_time": 100});
    let (done, drives) = update(json!({"drive_id": "a", "rate_limiter": {"ops": bucket(5)}}));
    done.unwrap();
    assert_eq!(drives[0].path_on_host, old);
    assert_eq!(drives[0].rate_limiter.unwrap().ops.unwrap().size, 5);
    let both = json!({"drive_id": "a", "path_on_host": new, "rate_limiter": {"ops": bucket(0), "bandwidth": bucket(7)}});
    let (done, drives) = update(both);
    done.unwrap();
    assert_eq!(drives[0].path_on_host, new);
    let limiter = drives[0].rate_limiter.unwrap();
    assert_eq!((limiter.bandwidth.unwrap().size, limiter.ops), (7, None));
    let (missing, same) = update(
        json!({"drive_id": "a", "path_on_host": folder.path().join("missing"), "rate_limiter": {"ops": bucket(1)}}),
    );
    assert!(matches!(missing, Err(ControlError::Config(_))));
    assert_eq!(same, drives);
    let (refused, same) = update(json!({"drive_id": "broken", "rate_limiter": {"ops": bucket(1)}}));
    assert!(matches!(refused, Err(ControlError::Machine(_))));
    assert_eq!(same, drives);
    let expected = [
        "limit a kept 5",
        "replace a",
        "limit a 7 free",
        "limit broken kept 1",
    ];
    assert_eq!(*calls.lock().unwrap(), expected);
    let pmem = json!({"id": "none", "rate_limiter": null});
    assert!(matches!(
        control.update_pmem(serde_json::from_value(pmem).unwrap()),
        Err(ControlError::Machine(MachineError::NoPmem(_)))
    ));
}

#[test]
fn a_changed_disk_of_a_running_guest_is_in_its_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let calls = Calls::default();
    let mut control = running(folder.path(), &calls);
    let next = folder.path().join("next");
    assert!(matches!(
        control.snapshot_drive("c", &next),
        Err(ControlError::NoDrive(_))
    ));
    let old = control.config().drives[0].path_on_host.clone();
    let old = old.file_name().unwrap().to_str().unwrap().to_owned();
    control.snapshot_drive("a", &next).unwrap();
    assert_eq!(control.config().drives[0].path_on_host, next);
    let parent = control.drive_parent("a").unwrap().path_on_host;
    assert_eq!(parent, Path::new("/base"));
    control.resize_drive("a", 4096).unwrap();
    control.compact_drive("a", true).unwrap();
    assert!(control.job("a").is_err());
    control.commit_drive("a").unwrap();
    assert_eq!(control.job("a").unwrap().state, JobState::Done);
    control.cancel_job("a").unwrap();
    assert_eq!(control.config().drives[0].path_on_host, Path::new("/base"));
    assert_eq!(
        *calls.lock().unwrap(),
        [
            format!("snapshot a {old} next"),
            format!("parent a {}", next.display()),
            "resize a 4096".into(),
            "compact a true".into(),
            "commit a".into(),
            "cancel a".into()
        ]
    );
    // A commit that is over does not replace another file in the configuration.
    let after = folder.path().join("after");
    control.snapshot_drive("a", &after).unwrap();
    assert_eq!(control.config().drives[0].path_on_host, after);
}

#[test]
fn a_balloon_is_set_up_before_the_start_and_changed_after_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut control = control();
    assert!(matches!(control.balloon(), Err(ControlError::NoBalloon)));
    let balloon = BalloonConfig {
        amount_mib: 16,
        stats_polling_interval_s: 1,
        free_page_hinting: true,
        ..BalloonConfig::default()
    };
    control.set_device(balloon).unwrap();
    let update = |amount_mib| BalloonUpdate { amount_mib };
    let interval = |stats_polling_interval_s| BalloonStatisticsUpdate {
        stats_polling_interval_s,
    };
    for refused in [
        control.update_balloon(update(8)),
        control.update_balloon_statistics(interval(2)),
        control.start_hinting(HintingStart::default()),
        control.stop_hinting(),
        control.hinting().map(drop),
        control.balloon_statistics().map(drop),
    ] {
        assert!(matches!(refused, Err(ControlError::BeforeStart)));
    }
    let kernel_image_path = file(folder.path(), "kernel");
    control
        .set_boot_source(BootSourceConfig {
            kernel_image_path,
            ..BootSourceConfig::default()
        })
        .unwrap();
    let calls = Calls::default();
    control.start(|config, _| launch(&calls, config)).unwrap();

    control.update_balloon(update(64)).unwrap();
    control.update_balloon(update(129)).unwrap_err();
    control.update_balloon_statistics(interval(9)).unwrap();
    control.update_balloon_statistics(interval(0)).unwrap_err();
    let expected = BalloonConfig {
        amount_mib: 64,
        stats_polling_interval_s: 9,
        ..balloon
    };
    assert_eq!(control.balloon().unwrap(), expected);
    assert_eq!(control.config().balloon, Some(expected));
    let sizes =
        json!({"target_pages": 16384, "actual_pages": 0, "target_mib": 64, "actual_mib": 0});
    let statistics = control.balloon_statistics().unwrap();
    assert_eq!(serde_json::to_value(statistics).unwrap(), sizes);
    let status = control.hinting().unwrap();
    assert_eq!((status.host_cmd, status.guest_cmd), (0, None));
    assert!(matches!(
        control.start_hinting(HintingStart::default()),
        Err(ControlError::Balloon(BalloonError::NoDriver))
    ));
    control.end();
    assert!(matches!(
        control.update_balloon(update(1)),
        Err(ControlError::Ended)
    ));
}

#[test]
fn metrics_are_written_when_asked_for_and_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics");
    let mut control = control();
    let kernel_image_path = file(folder.path(), "kernel");
    control
        .set_boot_source(BootSourceConfig {
            kernel_image_path,
            ..BootSourceConfig::default()
        })
        .unwrap();
    control
        .set_metrics(&MetricsConfig {
            metrics_path: path.clone(),
        })
        .unwrap();
    control
        .start(|config, _| launch(&Calls::default(), config))
        .unwrap();
    control.flush_metrics().unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 1);
    control.end();
    assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 2);
}

#[test]
fn a_guest_is_saved_while_it_is_paused_with_paths_that_mean_the_same_anywhere() {
    let folder = tempfile::tempdir().unwrap();
    let calls = Calls::default();
    let request: CreateSnapshot = serde_json::from_value(
        json!({"snapshot_type": "Diff", "snapshot_path": "s", "mem_file_path": "m"}),
    )
    .unwrap();
    let mut unborn = control();
    assert!(matches!(
        unborn.create_snapshot(&request),
        Err(ControlError::BeforeStart)
    ));
    let mut control = running(folder.path(), &calls);
    assert!(matches!(
        control.create_snapshot(&request),
        Err(ControlError::NotPaused)
    ));
    control.pause().unwrap();
    control.create_snapshot(&request).unwrap();
    assert_eq!(calls.lock().unwrap().last().unwrap(), "Diff to s");
    assert!(matches!(
        control.load_snapshot(&LoadSnapshot::new("s".into()), |_, _| panic!()),
        Err(ControlError::AfterStart)
    ));
}

#[test]
fn a_snapshot_is_loaded_before_a_guest_is_configured_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let missing = LoadSnapshot::new(folder.path().join("none"));
    let mut control = control();
    let error = control.load_snapshot(&missing, |_, _| panic!("never launched"));
    assert!(matches!(error, Err(ControlError::Snapshot(_))));
    // What is no guest's own may be there.
    let serial = SerialConfig {
        serial_out_path: Some(folder.path().join("out")),
        rate_limiter: None,
    };
    set_serial(&mut control, serial).unwrap();
    let error = control.load_snapshot(&missing, |_, _| panic!("never launched"));
    assert!(matches!(error, Err(ControlError::Snapshot(_))));
    control
        .set_device(DriveConfig::new("a", file(folder.path(), "a")))
        .unwrap();
    let error = control.load_snapshot(&missing, |_, _| panic!("never launched"));
    assert!(matches!(error, Err(ControlError::Configured("drives"))));
}

#[test]
fn a_load_has_the_form_of_firecrackers_and_unknown_fields_are_refused() {
    let parse = |body: Value| serde_json::from_value::<LoadSnapshot>(body);
    let load = parse(json!({
        "snapshot_path": "s", "mem_backend": {"backend_path": "m", "backend_type": "File"},
        "enable_diff_snapshots": true, "resume_vm": true, "clock_realtime": false,
    }))
    .unwrap();
    assert!(load.track_dirty_pages && load.resume_vm && load.verify_memory && !load.clock_realtime);
    let plain = parse(json!({"snapshot_path": "s"})).unwrap();
    assert!(
        plain.clock_realtime,
        "the clock follows unless it is to stay"
    );
    for (asked, expected) in [
        (json!("Snapshot"), HugePageConfig::Transparent),
        (json!("None"), HugePageConfig::None),
        (json!("2M"), HugePageConfig::Hugetlbfs2M),
    ] {
        let load = parse(json!({"snapshot_path": "s", "huge_pages": asked})).unwrap();
        assert_eq!(load.huge_pages.or(HugePageConfig::Transparent), expected);
    }
    for body in [
        json!({}),
        json!({"snapshot_path": "s", "colour": 1}),
        json!({"snapshot_path": "s", "clock_realtime": "kept"}),
        json!({"snapshot_path": "s", "huge_pages": "1G"}),
        json!({"snapshot_path": "s", "mem_backend": {"backend_path": "m", "backend_type": "Tape"}}),
    ] {
        parse(body).unwrap_err();
    }
}
