//! The scenarios of the lab. The name of a scenario is a claim.

mod balloon;
mod bench;
mod boot;
mod clock;
mod clone_cost;
mod control;
mod cpu;
mod density;
mod disk;
mod end;
mod jail;
mod memory;
mod network;
mod package;
mod pmem;
mod restore;
mod serve;
mod serve_jailed;
mod serve_network;
mod share;
mod snapshot;
mod soak;
mod vsock;

use std::path::Path;
use std::time::Duration;

use crate::result::{Failure, Figures};

/// RAM in MiB of the lab's host, where a scenario does not need more.
const MEMORY: u32 = 4096;
/// The longest time of a scenario. One that takes longer hangs, and its host may hang, too.
pub const LIMIT: Duration = Duration::from_mins(5);

/// When a scenario is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By default.
    Test,
    /// When it is named.
    OnDemand,
}

/// The system on the lab's host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Machine {
    /// Nothing but the agent.
    Bare,
    /// Debian with systemd, which starts the agent; Coppice's package is on the disk, and not installed.
    Systemd,
}

/// The part of a scenario that runs in the lab's host. The files that it leaves in the folder are copied to this
/// machine.
type Steps = fn(&Path) -> Result<Figures, Failure>;
/// The part of a scenario that checks the copied files and the figures on this machine.
type Check = fn(&Path, &Figures) -> Result<(), Failure>;

/// A scenario: a claim, how it is shown in the lab's host, and how this machine's programs check the results.
pub struct Scenario {
    /// The claim.
    pub name: &'static str,
    /// When it is run.
    pub kind: Kind,
    /// Shows the claim.
    pub run: Steps,
    /// Checks the results on this machine, afterwards.
    pub check: Option<Check>,
    /// RAM in MiB of the host that it runs in.
    pub memory: u32,
    /// The system on that host.
    pub machine: Machine,
    /// How long it may take.
    pub limit: Duration,
}

const fn test(name: &'static str, run: Steps) -> Scenario {
    Scenario {
        name,
        kind: Kind::Test,
        run,
        check: None,
        memory: MEMORY,
        machine: Machine::Bare,
        limit: LIMIT,
    }
}

const fn checked(name: &'static str, run: Steps, check: Check) -> Scenario {
    Scenario {
        name,
        kind: Kind::Test,
        run,
        check: Some(check),
        memory: MEMORY,
        machine: Machine::Bare,
        limit: LIMIT,
    }
}

const fn on_demand(name: &'static str, run: Steps) -> Scenario {
    Scenario {
        name,
        kind: Kind::OnDemand,
        run,
        check: None,
        memory: MEMORY,
        machine: Machine::Bare,
        limit: LIMIT,
    }
}

/// A configuration of the density benchmark, in a host of its own size and with more time.
const fn density(name: &'static str) -> Scenario {
    Scenario {
        check: Some(density::draw),
        memory: density::MEMORY,
        limit: density::LIMIT,
        ..on_demand(name, density::density)
    }
}

/// Guests of one mode of sharing, in a host with more time.
const fn soak(name: &'static str) -> Scenario {
    Scenario {
        limit: density::LIMIT,
        ..on_demand(name, soak::soak)
    }
}

/// All scenarios, in the order in which they run.
pub const ALL: &[Scenario] = &[
    test(
        "boots_to_userspace_from_a_vhdx_made_by_qemu_img",
        boot::userspace_from_vhdx,
    ),
    test("boots_a_raw_disk", boot::userspace_from_raw),
    test(
        "boots_bzimage_and_elf_by_every_protocol",
        boot::every_protocol,
    ),
    test("runs_1_2_and_4_cpus", boot::cpus),
    test(
        "threads_share_cores_and_a_cpu_template_hides_a_feature",
        cpu::threads_and_template,
    ),
    test("sees_memory_beyond_4_gib", boot::memory_beyond_4_gib),
    test("eight_guests_share_one_read_only_base", boot::eight_guests),
    test(
        "power_off_reboot_panic_and_triple_fault_have_their_exit_codes",
        end::exit_codes,
    ),
    checked(
        "what_ext4_wrote_is_on_the_vhdx",
        disk::ext4_write,
        disk::check_ext4_write,
    ),
    checked(
        "a_disk_is_snapshotted_resized_committed_and_compacted_under_its_guest",
        disk::online,
        disk::check_online,
    ),
    checked(
        "discard_gives_space_back_and_keeps_data",
        disk::discard,
        disk::check_discard,
    ),
    test("a_read_only_disk_refuses_writes", disk::read_only),
    test("the_worker_engine_serves_disks", disk::worker_engine),
    test("the_entropy_device_gives_bytes", disk::entropy),
    test("a_limited_drive_serves_what_its_limits_say", disk::limits),
    checked(
        "sigterm_amid_writes_leaves_a_disk_that_opens",
        disk::sigterm,
        disk::check_cut_off,
    ),
    checked(
        "sigkill_amid_writes_leaves_a_disk_that_opens",
        disk::sigkill,
        disk::check_cut_off,
    ),
    test(
        "two_guests_read_one_disk_by_dax_and_hold_it_once",
        pmem::shared,
    ),
    test(
        "what_a_pmem_guest_writes_to_its_own_copy_is_forgotten",
        pmem::copy_on_write,
    ),
    checked(
        "what_a_pmem_guest_synced_is_in_the_child_after_sigkill",
        pmem::killed,
        pmem::check_killed,
    ),
    test("a_raw_file_is_memory_of_a_guest", pmem::raw),
    test("boots_from_pmem_by_dax", pmem::root),
    test("pauses_and_resumes_over_rest", control::pause_and_resume),
    test(
        "is_configured_and_started_over_rest",
        control::started_over_rest,
    ),
    test(
        "a_saved_guest_goes_on_and_no_other_files_are_taken_for_its_own",
        snapshot::goes_on,
    ),
    test(
        "a_saved_guest_goes_on_with_its_own_copy_of_a_pmem_disk",
        snapshot::with_own_copy,
    ),
    test(
        "a_saved_guest_goes_on_with_memory_from_a_page_server",
        snapshot::served,
    ),
    test("clones_of_a_guest_go_on_each_by_itself", snapshot::clones),
    test(
        "a_guest_loaded_later_has_the_right_time_and_its_timers_fire_once",
        clock::follows,
    ),
    test(
        "a_guest_and_its_host_talk_by_vsock_and_a_saved_one_goes_on_as_another",
        vsock::talks,
    ),
    test("clones_learn_by_their_metadata_who_they_are", vsock::clones),
    test(
        "a_guest_gets_its_address_and_talks_over_a_tap_and_a_saved_one_goes_on_over_another",
        network::talks,
    ),
    test(
        "guests_of_a_daemons_network_reach_what_it_says_and_clones_have_addresses_of_their_own",
        serve_network::reaches,
    ),
    test(
        "guests_of_the_daemon_are_cloned_outlive_it_and_leave_nothing",
        serve::life,
    ),
    test(
        "jailed_guests_of_the_daemon_have_users_and_limits_and_leave_nothing",
        serve_jailed::life,
    ),
    test(
        "ctrl_alt_del_over_rest_reaches_the_guest",
        control::ctrl_alt_del,
    ),
    test(
        "what_guests_read_is_shared_and_stays_what_it_was",
        share::reads,
    ),
    checked(
        "a_guest_in_the_jail_of_root_writes_its_disk",
        jail::own_disk,
        disk::check_ext4_write,
    ),
    test(
        "a_guest_in_the_jail_of_a_user_boots_from_what_it_was_given",
        jail::own_user,
    ),
    test("guests_in_jails_share_what_they_read", share::reads_jailed),
    test(
        "a_file_cut_under_its_guests_ends_those_with_a_report_and_no_other",
        share::cut_file,
    ),
    test(
        "an_inflated_balloon_takes_memory_from_the_vmm_and_a_deflated_one_gives_it_back",
        balloon::inflate_and_deflate,
    ),
    test(
        "freed_memory_goes_back_to_the_host_unasked",
        balloon::reporting,
    ),
    test("a_hinting_run_gives_free_memory_back", balloon::hinting),
    test(
        "a_guest_survives_that_needs_what_is_in_the_balloon",
        balloon::deflate_on_oom,
    ),
    test(
        "statistics_of_the_balloon_follow_the_guest",
        balloon::statistics,
    ),
    checked(
        "the_density_benchmark_measures_two_guests",
        density::two_guests,
        density::check_two_guests,
    ),
    test("no_write_is_lost_while_pages_are_merged", share::stress),
    Scenario {
        machine: Machine::Systemd,
        ..test(
            "the_package_installs_a_service_whose_guests_outlive_restarts_and_upgrades",
            package::life,
        )
    },
    Scenario {
        memory: density::MEMORY,
        limit: density::LIMIT,
        ..on_demand("sixty_four_guests_of_128_mib_live_in_8_gib", share::many)
    },
    on_demand("idle_clone_explained", clone_cost::explain),
    on_demand(
        "unjailed_idle_clone_explained",
        clone_cost::explain_unjailed,
    ),
    on_demand(
        "status_requests_cost_no_guest_anything",
        serve::status_requests,
    ),
    Scenario {
        limit: density::LIMIT,
        ..on_demand("two_hundred_idle_clones_live_at_once", serve::many)
    },
    Scenario {
        limit: density::LIMIT,
        ..on_demand(
            "a_thousand_clones_made_and_deleted_leave_the_host_as_it_was",
            serve::cycles,
        )
    },
    Scenario {
        limit: density::LIMIT,
        ..on_demand("share_read_bench", share::read_bench)
    },
    on_demand("first_write_bench", share::first_write_bench),
    soak("soak_off"),
    soak("soak_boot"),
    soak("soak_read"),
    soak("soak_all"),
    on_demand("bench", bench::bench),
    on_demand("boot_bench", bench::boots),
    on_demand("restore_bench", restore::bench),
    on_demand("disk_bench", bench::disks),
    on_demand("pmem_bench", pmem::bench),
    on_demand("demo", bench::demo),
    density(density::ALL[0]),
    density(density::ALL[1]),
    density(density::ALL[2]),
    density(density::ALL[3]),
    density(density::ALL[4]),
    density(density::ALL[5]),
    density(density::ALL[6]),
    density(density::ALL[7]),
];
