use clap::CommandFactory;

use super::*;
use ::jail::JailConfig;
use config::{BalloonConfig, DriveConfig, LoadSnapshot, PmemConfig, PmemMode, VmConfig};
use control::launch_spec::{CONFIG, LaunchSpec, Purpose};
use host::report::chain;

fn options(arguments: &[&str]) -> Result<RunOptions, String> {
    let cli = Cli::try_parse_from(["coppice", "run"].iter().chain(arguments))
        .map_err(|error| error.to_string())?;
    match cli.command {
        Command::Run(run) => run
            .into_options()
            .map_err(|error| chain(&error).to_string()),
        _ => Err("not run".to_owned()),
    }
}

fn config_file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, text).unwrap();
    file
}

#[test]
fn the_command_line_is_well_formed() {
    Cli::command().debug_assert();
}

#[test]
fn the_help_has_keys_exit_codes_and_examples() {
    let mut command = Cli::command();
    let help = command
        .find_subcommand_mut("run")
        .unwrap()
        .render_long_help()
        .to_string();
    for part in [
        "Ctrl-A x",
        "Exit codes:",
        "128+N",
        "Examples:",
        "--disk",
        "--balloon",
        "console=ttyS0",
    ] {
        assert!(help.contains(part), "{part} in {help}");
    }
}

#[test]
fn arguments_describe_a_guest() {
    let options = options(&[
        "--kernel",
        "k",
        "--initrd",
        "i",
        "--cmdline",
        "-x console=ttyS0",
        "--disk",
        "a,ro",
        "--disk",
        "b,serial=S",
        "--mem",
        "1G",
        "--cpus",
        "4",
        "--api-sock",
        "s",
        "--serial",
        "out",
        "--metrics",
        "m",
        "--log",
        "info",
        "--log-format",
        "json",
    ])
    .unwrap();
    let config = options.config;
    let boot = config.boot_source.unwrap();
    assert_eq!(boot.kernel_image_path, PathBuf::from("k"));
    assert_eq!(boot.initrd_path, Some(PathBuf::from("i")));
    assert_eq!(boot.boot_args.as_deref(), Some("-x console=ttyS0"));
    let ids: Vec<_> = config
        .drives
        .iter()
        .map(|drive| drive.drive_id.as_str())
        .collect();
    assert_eq!(ids, ["disk0", "disk1"]);
    assert_eq!(
        (
            config.machine_config.mem_size_mib,
            config.machine_config.vcpu_count
        ),
        (1024, 4)
    );
    assert_eq!(
        config.serial.unwrap().serial_out_path,
        Some(PathBuf::from("out"))
    );
    assert_eq!(config.metrics.unwrap().metrics_path, PathBuf::from("m"));
    assert_eq!(options.api_socket, Some(PathBuf::from("s")));
}

#[test]
fn pmem_devices_add_to_those_of_a_configuration_file() {
    let file = config_file(
        r#"{"boot-source": {"kernel_image_path": "k"}, "pmem": [{"id": "pmem0", "path_on_host": "a"}]}"#,
    );
    let path = file.path().to_str().unwrap();
    let config = options(&["--config", path, "--pmem", "b", "--pmem", "c,rw"])
        .unwrap()
        .config;
    let expected = [
        PmemConfig::new("pmem1", "b", PmemMode::Ro),
        PmemConfig::new("pmem2", "c", PmemMode::Rw),
    ];
    assert_eq!(config.pmem[1..], expected);
    let error = options(&["--config", path, "--pmem", "b,id=pmem0"]).unwrap_err();
    assert!(error.contains("id pmem0"), "{error}");
}

#[test]
fn without_a_kernel_there_has_to_be_a_socket_to_configure_the_guest() {
    assert!(options(&[]).unwrap_err().contains("nothing to run"));
    assert!(
        options(&["--api-sock", "s"])
            .unwrap()
            .config
            .boot_source
            .is_none()
    );
    assert!(
        options(&["--api-sock", "s", "--initrd", "i"])
            .unwrap_err()
            .contains("--initrd needs --kernel")
    );
    assert!(
        options(&["--api-sock", "s", "--cmdline", "c"])
            .unwrap_err()
            .contains("--cmdline needs --kernel")
    );
}

#[test]
fn arguments_add_to_a_configuration_file_and_conflicts_name_both() {
    let file = config_file(
        r#"{"boot-source": {"kernel_image_path": "k", "boot_args": "quiet"},
            "drives": [{"drive_id": "disk0", "path_on_host": "a", "is_root_device": false}],
            "machine-config": {"vcpu_count": 2, "mem_size_mib": 64}}"#,
    );
    let path = file.path().to_str().unwrap();
    let config = options(&[
        "--config", path, "--disk", "b", "--mem", "256M", "--initrd", "i",
    ])
    .unwrap()
    .config;
    assert_eq!(config.drives[1], DriveConfig::new("disk1", "b"));
    assert_eq!(
        (
            config.machine_config.mem_size_mib,
            config.machine_config.vcpu_count
        ),
        (256, 2)
    );
    assert_eq!(
        config.boot_source.unwrap().initrd_path,
        Some(PathBuf::from("i"))
    );
    for (flag, field) in [
        ("--kernel", "boot-source"),
        ("--cmdline", "boot-source.boot_args"),
    ] {
        let error = options(&["--config", path, flag, "x"]).unwrap_err();
        assert!(
            error.contains(flag) && error.contains(field) && error.contains(path),
            "{error}"
        );
    }
    let error = options(&["--config", path, "--disk", "b,id=disk0"]).unwrap_err();
    assert!(
        error.contains("drives: two devices have the id disk0"),
        "{error}"
    );
}

#[test]
fn a_balloon_of_the_command_line_takes_the_place_of_the_files() {
    let file = config_file(r#"{"balloon": {"amount_mib": 8, "deflate_on_oom": true}}"#);
    let path = file.path().to_str().unwrap();
    let balloon = |arguments: &[&str]| {
        let common = ["--api-sock", "s", "--config", path];
        let config = options(&[&common, arguments].concat())?.config;
        Ok::<_, String>(config.balloon.unwrap())
    };
    assert_eq!(balloon(&[]).unwrap().amount_mib, 8);
    let given = BalloonConfig {
        amount_mib: 64,
        free_page_reporting: true,
        ..BalloonConfig::default()
    };
    assert_eq!(balloon(&["--balloon", "64M,reporting"]), Ok(given));
    let bare = balloon(&["--balloon", "--mem", "64M"]);
    assert_eq!(bare, Ok(BalloonConfig::default()));
    let error = balloon(&["--balloon", "129M"]).unwrap_err();
    assert!(error.contains("balloon.amount_mib"), "{error}");
}

#[test]
fn the_log_level_of_the_command_line_wins() {
    let file = config_file(r#"{"logger": {"log_path": "/log", "level": "Error", "module": "x"}}"#);
    let logger = |arguments: &[&str]| {
        let path = ["--api-sock", "s", "--config", file.path().to_str().unwrap()];
        options(&[&path, arguments].concat())
            .unwrap()
            .config
            .logger
            .unwrap()
    };
    assert!(logger(&[]).level.is_some());
    let won = logger(&["--log", "debug"]);
    assert_eq!(
        (won.level, won.module, won.log_path),
        (None, None, Some(PathBuf::from("/log")))
    );
}

#[test]
fn invalid_values_are_usage_errors() {
    let cases: [&[&str]; 9] = [
        &["--kernel", "k", "--mem", "128"],
        &["--kernel", "k", "--cpus", "0"],
        &["--kernel", "k", "--cpus", "300"],
        &["--kernel", "k", "--disk", "d,qcow2"],
        &["--kernel", "k", "--balloon", "64"],
        &["--kernel", "k", "--pmem", "d,ro,rw"],
        &["--kernel", "k", "--log", "loud"],
        &["--kernel", "k", "--log-format", "xml"],
        &["--kernel", "k", "--config", "/nonexistent.json"],
    ];
    for arguments in cases {
        options(arguments).expect_err(&format!("{arguments:?}"));
    }
}

#[test]
fn a_sharing_domain_wins_over_the_configuration_file_and_has_to_be_a_name() {
    let file = config_file(
        r#"{"boot-source": {"kernel_image_path": "k"}, "sharing": {"mode": "read", "domain": "a"}}"#,
    );
    let path = file.path().to_str().unwrap();
    let domain = |more: &[&str]| {
        let arguments = [&["--config", path], more].concat();
        options(&arguments).map(|options| options.config.sharing.domain)
    };
    assert_eq!(domain(&[]), Ok(Some("a".to_owned())));
    assert_eq!(
        domain(&["--share-domain", "tenant_7"]),
        Ok(Some("tenant_7".to_owned()))
    );
    for name in ["", "..", "a/b", "a.b", &"x".repeat(65)] {
        let refused = domain(&["--share-domain", name]).unwrap_err();
        assert!(refused.contains("sharing.domain"), "{name}: {refused}");
    }
    let image = ["coppice", "image", "warm", "--kernel", "k"];
    let warm = |name| Cli::try_parse_from(image.iter().chain(&["--share-domain", name]));
    assert!(warm("tenant_7").is_ok() && warm("../x").is_err());
}

#[test]
fn a_process_of_the_daemon_gets_its_guest_by_the_launch_specification_alone() {
    let held = |arguments: &[&str]| {
        let words = ["coppice", "run", "--held", "--id", "a", "--api-sock", "s"];
        let cli = Cli::try_parse_from(words.iter().chain(arguments)).ok()?;
        match cli.command {
            Command::Run(run) => Some(run),
            _ => None,
        }
    };
    for given in [
        "--kernel=k",
        "--jail",
        "--restore=s",
        "--config=c",
        "--no-start",
    ] {
        assert!(held(&[given]).is_none(), "{given}");
    }
    assert!(Cli::try_parse_from(["coppice", "run", "--held"]).is_err());
    let spec = LaunchSpec {
        purpose: Purpose::Restore(Box::new(LoadSnapshot::new("a,b".into()))),
        jail: Some(JailConfig::default()),
        metadata: Some("m".into()),
        taps: Vec::new(),
    };
    // The process works in its guest's folder.
    let folder = tempfile::tempdir().unwrap();
    std::env::set_current_dir(folder.path()).unwrap();
    held(&[])
        .unwrap()
        .into_launched(spec.clone(), Vec::new())
        .unwrap_err();
    std::fs::write(
        CONFIG,
        r#"{"machine-config": {"vcpu_count": 3, "mem_size_mib": 128}}"#,
    )
    .unwrap();
    let of_a_tap = LaunchSpec {
        taps: vec!["eth0".into()],
        ..spec.clone()
    };
    let lacking = held(&[]).unwrap().into_launched(of_a_tap, Vec::new());
    assert!(matches!(lacking, Err(UsageError::Taps { .. })));
    let options = held(&[])
        .unwrap()
        .into_launched(spec.clone(), Vec::new())
        .unwrap();
    assert_eq!(options.config, VmConfig::default());
    assert_eq!(options.jailed.machine_config.vcpu_count, 3);
    assert_eq!(options.restore, Some(LoadSnapshot::new("a,b".into())));
    assert_eq!(
        (options.confinement.jail, options.metadata),
        (spec.jail, spec.metadata)
    );
    assert!(options.held && !options.only_configure);
    assert_eq!(options.api_socket, Some("s".into()));
}
