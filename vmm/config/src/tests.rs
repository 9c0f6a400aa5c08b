use serde_json::json;

use super::*;

fn parse(value: Value) -> Result<VmConfig, String> {
    let config: VmConfig = serde_json::from_value(value).map_err(|error| error.to_string())?;
    config.validate().map_err(|error| error.to_string())?;
    Ok(config)
}

fn drive(id: &str) -> Value {
    json!({"drive_id": id, "path_on_host": "/disk", "is_root_device": false})
}

#[test]
fn a_configuration_of_firecracker_is_taken_as_it_is() {
    let config = parse(json!({
        "boot-source": {"kernel_image_path": "vmlinux.bin", "boot_args": "console=ttyS0 reboot=k", "initrd_path": null},
        "drives": [{
            "drive_id": "rootfs", "partuuid": null, "is_root_device": true, "cache_type": "Unsafe",
            "is_read_only": false, "path_on_host": "rootfs.ext4", "io_engine": "Sync", "rate_limiter": {
                "bandwidth": {"size": 1000, "one_time_burst": 10, "refill_time": 100},
                "ops": {"size": 5, "refill_time": 10}
            },
            "socket": null
        }],
        "machine-config": {
            "vcpu_count": 2, "mem_size_mib": 1024, "smt": false, "track_dirty_pages": false, "huge_pages": "Transparent",
            "cpu_template": "None"
        },
        "logger": {"log_path": "/log", "level": "Warning", "show_level": true, "show_log_origin": false},
        "metrics": {"metrics_path": "/metrics"},
        "balloon": {"amount_mib": 1024, "deflate_on_oom": true, "stats_polling_interval_s": 1},
        "entropy": {"rate_limiter": {"bandwidth": null, "ops": null}},
        "serial": {"serial_out_path": null, "rate_limiter": {"size": 1, "one_time_burst": null, "refill_time": 1}},
        "vsock": {"vsock_id": "1", "guest_cid": 3, "uds_path": "./v.sock"},
        "network-interfaces": [
            {"iface_id": "1", "guest_mac": "06:00:00:00:00:01", "host_dev_name": "tap0", "rx_rate_limiter": null}
        ],
        "mmds-config": {"version": "V2", "network_interfaces": ["1"], "ipv4_address": "169.254.170.2", "imds_compat": true}
    }))
    .unwrap();
    assert_eq!(config.machine_config.mem_size_mib, 1024);
    assert_eq!(config.drives[0].io_engine, IoEngine::Sync);
    assert_eq!(config.vsock.as_ref().unwrap().cid(), 3);
    assert_eq!(MmdsConfig::port_of(config.mmds_config.as_ref()), 80);
    let balloon = BalloonConfig {
        amount_mib: 1024,
        deflate_on_oom: true,
        stats_polling_interval_s: 1,
        ..BalloonConfig::default()
    };
    assert_eq!(config.balloon, Some(balloon));
    assert_eq!(config.logger.as_ref().unwrap().level, Some(LogLevel::Warn));
    assert_eq!(
        parse(serde_json::to_value(&config).unwrap()).unwrap(),
        config
    );
}

#[test]
fn an_empty_configuration_is_128_mib_and_one_vcpu() {
    let config = parse(json!({})).unwrap();
    assert_eq!(
        (
            config.machine_config.mem_size_mib,
            config.machine_config.vcpu_count
        ),
        (128, 1)
    );
    assert_eq!(config, VmConfig::default());
}

#[test]
fn unknown_and_unsupported_fields_are_refused_by_name() {
    let machine = |field: &str, value: Value| {
        let mut config = json!({"vcpu_count": 1, "mem_size_mib": 128});
        config[field] = value;
        json!({"machine-config": config})
    };
    let with = |field: &str, value: Value| {
        let mut one = drive("a");
        one[field] = value;
        json!({"drives": [one]})
    };
    let boot = |args: &str| json!({"boot-source": {"kernel_image_path": "k", "boot_args": args}});
    let cases = [
        (json!({"network-interfaces": [{}]}), "iface_id"),
        (machine("cpus", json!(1)), "cpus"),
        (machine("cpu_template", json!("V1N1")), "V1N1"),
        (json!({"cpu-config": "/file"}), "cpu-config"),
        (json!({"cpu-config": 7}), "CPU template"),
        (
            json!({"cpu-config": {}, "machine-config": {"vcpu_count": 1, "mem_size_mib": 128, "cpu_template": "T2"}}),
            "cpu-config",
        ),
        (
            json!({"machine-config": {"vcpu_count": 1, "mem_size_mib": 129, "huge_pages": "2M"}}),
            "machine-config.huge_pages is 2M",
        ),
        (machine("huge_pages", json!("1G")), "1G"),
        (machine("vcpu_count", json!(0)), "machine-config.vcpu_count"),
        (
            machine("vcpu_count", json!(33)),
            "machine-config.vcpu_count",
        ),
        (machine("vcpu_count", json!(256)), "256"),
        (
            machine("mem_size_mib", json!(0)),
            "machine-config.mem_size_mib",
        ),
        (machine("mem_size_mib", json!(-1)), "-1"),
        (with("rate_limiter", json!({"ops": {}})), "size"),
        (with("rate_limiter", json!({"iops": null})), "iops"),
        (with("socket", json!("/s")), "drives.socket"),
        (with("drive_id", json!("../etc")), "drives.drive_id"),
        (with("drive_id", json!("")), "drives.drive_id"),
        (with("path_on_host", json!("")), "drives.path_on_host"),
        (
            with("path_on_host", json!("a\u{0}b")),
            "drives.path_on_host",
        ),
        (with("partuuid", json!("x init=/bin/sh")), "drives.partuuid"),
        (
            with("serial", json!("123456789012345678901")),
            "drives.serial",
        ),
        (with("num_queues", json!(0)), "drives.num_queues"),
        (with("num_queues", json!(33)), "drives.num_queues"),
        (with("format", json!("qcow2")), "qcow2"),
        (boot("a\nb"), "boot-source.boot_args"),
        (boot(&"x".repeat(65536)), "boot-source.boot_args"),
        (json!({"entropy": {"rate_limiter": {"size": 1}}}), "size"),
        (
            json!({"balloon": {"amount_mib": 129, "deflate_on_oom": true}}),
            "balloon.amount_mib",
        ),
        // An array is no object, whose fields it would have in order.
        (json!({"entropy": {"rate_limiter": [null, null]}}), "map"),
        (with("rate_limiter", json!({"ops": [1, null, 100]})), "map"),
        (json!({"balloon": {"amount_mib": 1}}), "deflate_on_oom"),
        (
            json!({"balloon": {"amount_mib": 1, "deflate_on_oom": true, "free_page_poison": true}}),
            "free_page_poison",
        ),
        (
            json!({"serial": {"rate_limiter": {"bandwidth": null}}}),
            "bandwidth",
        ),
        (json!({"logger": {"level": "loud"}}), "loud"),
        (json!({"logger": {"module": "a=b,c"}}), "logger.module"),
        (json!({"metrics": {}}), "metrics_path"),
    ];
    for (config, named) in cases {
        is_refused(&config, named);
    }
}

fn is_refused(config: &Value, named: &str) {
    let error = parse(config.clone()).expect_err(&config.to_string());
    assert!(error.contains(named), "{config}: {error}");
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn a_socket_device_has_an_identifier_of_a_guest_and_metadata_an_interface_or_a_port() {
    let cases = [
        (
            json!({"vsock": {"guest_cid": 2, "uds_path": "v"}}),
            "vsock.guest_cid",
        ),
        (
            json!({"vsock": {"guest_cid": u32::MAX, "uds_path": "v"}}),
            "vsock.guest_cid",
        ),
        (
            json!({"vsock": {"guest_cid": 3, "uds_path": ""}}),
            "vsock.uds_path",
        ),
        (
            json!({"vsock": {"guest_cid": 3, "uds_path": "x".repeat(97)}}),
            "vsock.uds_path",
        ),
        (
            json!({"mmds-config": {"network_interfaces": ["eth0"]}}),
            "mmds-config.network_interfaces",
        ),
        (
            json!({"mmds-config": {"version": "V2"}}),
            "mmds-config.network_interfaces",
        ),
        (
            json!({"mmds-config": {"ipv4_address": "169.254.0.1", "vsock_port": 80}}),
            "mmds-config.ipv4_address",
        ),
        (
            json!({"mmds-config": {"vsock_port": u32::MAX}}),
            "mmds-config.vsock_port",
        ),
    ];
    for (config, named) in cases {
        is_refused(&config, named);
    }
}

#[test]
fn drives_have_names_of_their_own_one_root_and_an_interrupt_line_each() {
    let error = parse(json!({"drives": [drive("a"), drive("a")]})).unwrap_err();
    assert!(
        error.contains("drives: two devices have the id a"),
        "{error}"
    );
    let root = |id: &str| json!({"drive_id": id, "path_on_host": "/disk", "is_root_device": true});
    let error = parse(json!({"drives": [root("a"), drive("b"), root("c")]})).unwrap_err();
    assert!(
        error.contains("drives: c is to be the root device, but a is the root already"),
        "{error}"
    );
    let many = |count: usize| {
        (0..count)
            .map(|n| drive(&format!("d{n}")))
            .collect::<Vec<_>>()
    };
    let limit = limits::MAX_VIRTIO_DEVICES;
    parse(json!({"drives": many(limit)})).unwrap();
    parse(json!({"drives": many(limit + 1)})).unwrap_err();
    parse(json!({"drives": many(limit), "entropy": {}})).unwrap_err();
    let balloon = json!({"amount_mib": 0, "deflate_on_oom": false});
    parse(json!({"drives": many(limit - 1), "entropy": {}, "balloon": balloon})).unwrap_err();
    parse(json!({"drives": many(limit - 1), "entropy": {}, "vsock": {"uds_path": "v"}}))
        .unwrap_err();
}

#[test]
fn an_update_of_the_machine_changes_what_it_names() {
    let machine = MachineConfig::default();
    let updated = machine
        .updated(&json!({"mem_size_mib": 512, "smt": null}))
        .unwrap();
    assert_eq!(
        updated,
        MachineConfig {
            mem_size_mib: 512,
            ..machine.clone()
        }
    );
    for refused in [
        json!({}),
        json!({"smt": null}),
        json!([]),
        json!({"x": 1}),
        json!({"vcpu_count": 64}),
        json!({"smt": 1}),
    ] {
        machine.updated(&refused).expect_err(&refused.to_string());
    }
}

#[test]
fn an_update_of_a_drive_names_another_file_or_other_limits() {
    let bucket = |size| TokenBucketConfig::per_second(size);
    let limited = |bandwidth, ops| {
        let limiter = RateLimiterConfig { bandwidth, ops };
        (limiter != RateLimiterConfig::default()).then_some(limiter)
    };
    let drive = DriveConfig {
        rate_limiter: limited(Some(bucket(5)), None),
        ..DriveConfig::new("a", "/old")
    };
    let update = |value| {
        serde_json::from_value::<DriveUpdate>(value)
            .unwrap()
            .applied_to(&drive)
    };
    let updated = update(json!({"drive_id": "a", "path_on_host": "/new"})).unwrap();
    assert_eq!(updated.path_on_host, PathBuf::from("/new"));
    assert_eq!(updated.rate_limiter, drive.rate_limiter);
    let ops = json!({"ops": {"size": 7, "refill_time": 1000}, "bandwidth": null});
    let updated = update(json!({"drive_id": "a", "rate_limiter": ops})).unwrap();
    assert_eq!(
        updated.rate_limiter,
        limited(Some(bucket(5)), Some(bucket(7)))
    );
    assert_eq!(updated.path_on_host, drive.path_on_host);
    let none = json!({"bandwidth": {"size": 0, "refill_time": 0}});
    let both = json!({"drive_id": "a", "path_on_host": "/new", "rate_limiter": none});
    let updated = update(both).unwrap();
    assert_eq!(updated, DriveConfig::new("a", "/new"));
    let refused = |value| update(value).unwrap_err().to_string();
    assert!(refused(json!({"drive_id": "a"})).contains("empty"));
    assert!(refused(json!({"drive_id": "a", "rate_limiter": null})).contains("empty"));
    assert!(refused(json!({"drive_id": "a", "path_on_host": ""})).contains("path_on_host"));
}

#[test]
fn files_are_checked_as_they_will_be_opened() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("disk");
    std::fs::write(&file, [0; 512]).unwrap();
    let mut config = VmConfig {
        drives: vec![DriveConfig::new("a", &file)],
        ..VmConfig::default()
    };
    config.check_files().unwrap();
    config.drives[0].path_on_host = folder.path().join("missing");
    let error = config.check_files().unwrap_err().to_string();
    assert!(
        error.contains("drives.path_on_host") && error.contains("missing"),
        "{error}"
    );
    config.drives[0].path_on_host = folder.path().to_owned();
    assert!(matches!(
        config.check_files(),
        Err(ConfigError::NotAFile { .. })
    ));
    config.drives.clear();
    config.boot_source = Some(BootSourceConfig {
        kernel_image_path: "/dev/null".into(),
        ..BootSourceConfig::default()
    });
    assert!(matches!(
        config.check_files(),
        Err(ConfigError::NotAFile { .. })
    ));
}

#[test]
fn a_configuration_file_that_cannot_be_used_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.json");
    let refused = || VmConfig::from_file(&path).unwrap_err();
    assert!(matches!(refused(), ConfigError::Read { .. }));
    std::fs::write(&path, b"{\"drives\": 7}").unwrap();
    let error = refused();
    assert!(
        matches!(&error, ConfigError::Json { source, .. } if source.to_string().contains("line 1")),
        "{error}"
    );
    std::fs::write(&path, vec![b' '; MAX_FILE_SIZE as usize + 1]).unwrap();
    assert!(matches!(refused(), ConfigError::TooLong { .. }));
}

#[test]
fn a_sharing_domain_is_a_name_and_absent_by_default() {
    let parsed = |sharing| parse(json!({ "sharing": sharing }));
    let domain = |sharing| parsed(sharing).unwrap().sharing.domain;
    assert_eq!(domain(json!({"mode": "boot"})), None);
    assert_eq!(domain(json!({"domain": "a_1"})), Some("a_1".to_owned()));
    for name in ["", "../a", "a b"] {
        let refused = parsed(json!({ "domain": name })).unwrap_err();
        assert!(refused.contains("sharing.domain"), "{name}: {refused}");
    }
}

#[test]
fn two_threads_a_core_are_one_vcpu_or_an_even_number() {
    for (vcpus, is_valid) in [(1, true), (2, true), (3, false), (31, false), (32, true)] {
        let machine = json!({"vcpu_count": vcpus, "mem_size_mib": 128, "smt": true});
        let parsed = parse(json!({ "machine-config": machine }));
        assert_eq!(parsed.is_ok(), is_valid, "{vcpus}");
        if let Err(error) = parsed {
            assert!(
                error.contains("vcpu_count") && error.contains("smt"),
                "{error}"
            );
        }
    }
}

#[test]
fn a_cpu_template_is_in_the_configuration_or_in_a_file_that_it_names() {
    let folder = tempfile::tempdir().unwrap();
    let (path, template) = (
        folder.path().join("vm.json"),
        folder.path().join("cpu.json"),
    );
    let msr = json!({"msr_modifiers": [{"addr": "0x10a", "bitmap": "0b1"}]});
    std::fs::write(&template, msr.to_string()).unwrap();
    let read = |cpu: Value| {
        std::fs::write(&path, json!({ "cpu-config": cpu }).to_string()).unwrap();
        VmConfig::from_file(&path)
    };
    let of_file = read(json!(template)).unwrap();
    assert_eq!(of_file, read(msr).unwrap());
    assert_eq!(of_file.custom_cpu().unwrap().msr_modifiers.len(), 1);
    assert_eq!(of_file.of_a_guest(), Some("cpu-config"));
    let again = serde_json::to_value(&of_file).unwrap();
    assert_eq!(parse(again).unwrap(), of_file);
    let missing = read(json!(folder.path().join("none"))).unwrap_err();
    assert!(missing.to_string().contains("/none"), "{missing}");
    std::fs::write(&template, "{\"msr_modifiers\": 1}").unwrap();
    let wrong = read(json!(template)).unwrap_err();
    assert!(wrong.to_string().contains("cpu.json"), "{wrong}");
}

#[test]
fn the_last_cpu_template_that_was_asked_for_counts() {
    let machine = |template: Value| {
        let fields = json!({"vcpu_count": 2, "mem_size_mib": 128, "cpu_template": template});
        serde_json::from_value::<MachineConfig>(fields).unwrap()
    };
    let seen = |config: &VmConfig| {
        config.validate().unwrap();
        let shown = serde_json::to_value(&config.machine_config).unwrap();
        (
            shown.get("cpu_template").cloned(),
            config.custom_cpu().is_some(),
        )
    };
    let mut config = VmConfig::default();
    assert_eq!(seen(&config), (None, false));
    config.set_machine(machine(json!("T2")));
    assert_eq!(seen(&config), (Some(json!("T2")), false));
    config.set_machine(machine(json!(null)));
    assert_eq!(seen(&config), (Some(json!("T2")), false), "it stays");
    config.set_cpu(CpuConfig::default());
    assert_eq!(seen(&config), (None, true));
    config.set_machine(machine(json!(null)));
    config.update_machine(&json!({"mem_size_mib": 64})).unwrap();
    assert_eq!(seen(&config), (None, true), "it stays");
    config
        .update_machine(&json!({"cpu_template": "T2A"}))
        .unwrap();
    assert_eq!(seen(&config), (Some(json!("T2A")), false));
    config.set_cpu(CpuConfig::default());
    config
        .update_machine(&json!({"cpu_template": "T9"}))
        .unwrap_err();
    assert_eq!(seen(&config), (None, true));
    config.set_machine(machine(json!("None")));
    assert_eq!(seen(&config), (None, false));
}

#[test]
fn ram_in_huge_pages_is_not_shared_whatever_is_asked_for() {
    for mode in ["off", "boot", "read", "all"] {
        let of = |huge_pages| {
            let machine = json!({"vcpu_count": 1, "mem_size_mib": 2, "huge_pages": huge_pages});
            let config = json!({"machine-config": machine, "sharing": {"mode": mode}});
            let config: VmConfig = serde_json::from_value(config).unwrap();
            config.validate().unwrap();
            (config.share_mode(), config.sharing.mode)
        };
        assert_eq!(of("2M").0, ShareMode::Off, "{mode}");
        let (effective, asked) = of("Transparent");
        assert_eq!(effective, asked, "{mode}");
    }
}
