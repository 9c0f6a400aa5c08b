//! Ways out of a jail, or to do harm from within, as a guest would try them that has taken over its process: by system
//! calls.

#![allow(
    clippy::cast_sign_loss,
    reason = "a system call takes words, whatever they mean"
)]

use std::ffi::{CStr, CString, c_long};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use super::host::Host;

/// What an attempt got hold of.
pub struct Got(pub String);

/// The answer, or the number of the error.
type Tried = Result<Got, i32>;

/// Something that must not come about.
pub struct Attempt {
    pub name: &'static str,
    /// Whether it is refused where no filter stops it, too.
    pub without_seccomp: bool,
    pub run: fn(&Host) -> Tried,
}

/// Refused by more than the filter.
const fn kept(name: &'static str, run: fn(&Host) -> Tried) -> Attempt {
    Attempt {
        name,
        without_seccomp: true,
        run,
    }
}

/// Refused by the filter, and harmless to others without.
const fn filtered(name: &'static str, run: fn(&Host) -> Tried) -> Attempt {
    Attempt {
        name,
        without_seccomp: false,
        run,
    }
}

fn call(number: c_long, arguments: [usize; 6]) -> Result<i64, i32> {
    let [first, second, third, fourth, fifth, sixth] = arguments;
    // SAFETY: the pointers among the arguments are to memory that the callers keep through the call, long enough for
    // what each call reads and writes, or null; no call changes a mapping that exists, and what would change the course
    // of the process is to fail.
    let result = unsafe { libc::syscall(number, first, second, third, fourth, fifth, sixth) };
    if result < 0 {
        Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    } else {
        Ok(result)
    }
}

fn try_call(number: c_long, arguments: &[usize]) -> Tried {
    let mut all = [0; 6];
    all[..arguments.len()].copy_from_slice(arguments);
    call(number, all).map(|result| Got(format!("system call {number}: {result}")))
}

fn address<T>(value: &T) -> usize {
    ptr::from_ref(value) as usize
}

fn text(text: &'static CStr) -> usize {
    text.as_ptr() as usize
}

fn at_cwd() -> usize {
    libc::AT_FDCWD as isize as usize
}

fn open(path: &Path, flags: i32) -> Tried {
    let name = CString::new(path.as_os_str().as_bytes()).unwrap();
    let arguments = [
        at_cwd(),
        name.as_ptr() as usize,
        flags as usize,
        0o600,
        0,
        0,
    ];
    call(libc::SYS_openat, arguments).map(|_| Got(path.display().to_string()))
}

fn read(path: impl AsRef<Path>) -> Tried {
    open(path.as_ref(), libc::O_RDONLY)
}

fn write(path: impl AsRef<Path>) -> Tried {
    open(path.as_ref(), libc::O_WRONLY)
}

fn two_paths(number: c_long, a: &Path, b: &Path) -> Tried {
    let a = CString::new(a.as_os_str().as_bytes()).unwrap();
    let b = CString::new(b.as_os_str().as_bytes()).unwrap();
    try_call(number, &[a.as_ptr() as usize, b.as_ptr() as usize])
}

fn one_path(number: c_long, path: &Path, argument: usize) -> Tried {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    try_call(number, &[path.as_ptr() as usize, argument])
}

fn process(host: &Host, name: &str) -> std::path::PathBuf {
    format!("/proc/{}/{name}", host.victim).into()
}

fn victim(host: &Host) -> usize {
    host.victim as usize
}

fn socket(family: i32, kind: i32) -> Result<usize, i32> {
    call(
        libc::SYS_socket,
        [family as usize, kind as usize, 0, 0, 0, 0],
    )
    .map(|fd| fd as usize)
}

fn connect(family: i32, socket_address: &[u8]) -> Tried {
    let fd = socket(family, libc::SOCK_STREAM)?;
    let mut bytes = (family as u16).to_ne_bytes().to_vec();
    bytes.extend(socket_address);
    try_call(
        libc::SYS_connect,
        &[fd, bytes.as_ptr() as usize, bytes.len()],
    )
}

fn tcp(host: &Host) -> Tried {
    let mut bytes = host.port.to_be_bytes().to_vec();
    bytes.extend([127, 0, 0, 1]);
    bytes.extend([0; 8]);
    connect(libc::AF_INET, &bytes)
}

/// Through a ring of its own, of which no filter sees what it does.
fn ring(operation: impl FnOnce() -> io_uring::squeue::Entry) -> Tried {
    let errno = |error: std::io::Error| error.raw_os_error().unwrap_or(0);
    let mut ring = io_uring::IoUring::new(2).map_err(errno)?;
    // SAFETY: what the entry points to is static.
    unsafe { ring.submission().push(&operation()) }.unwrap();
    ring.submit_and_wait(1).map_err(errno)?;
    match ring.completion().next().unwrap().result() {
        error if error < 0 => Err(-error),
        result => Ok(Got(format!("operation of a ring: {result}"))),
    }
}

fn list_root() -> Tried {
    let names: Vec<_> = std::fs::read_dir("/")
        .map_err(|error| error.raw_os_error().unwrap_or(0))?
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let known = ["etc", "usr", "home", "var", "sys", "bin"];
    match names.iter().find(|name| known.contains(&name.as_str())) {
        Some(name) => Ok(Got(format!("/{name}"))),
        None => Err(libc::ENOENT),
    }
}

fn vector(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

fn read_memory(host: &Host) -> Tried {
    let mut bytes = [0; 8];
    let local = vector(&mut bytes);
    let remote = libc::iovec {
        // Where programs lie that are not moved about, or nothing: then the answer is EFAULT.
        iov_base: 0x40_0000 as *mut libc::c_void,
        iov_len: 8,
    };
    let arguments = [victim(host), address(&local), 1, address(&remote), 1];
    match try_call(libc::SYS_process_vm_readv, &arguments) {
        Err(libc::EFAULT) => Ok(Got("the right to read memory".to_owned())),
        tried => tried,
    }
}

fn pidfd(host: &Host) -> Result<usize, i32> {
    call(libc::SYS_pidfd_open, [victim(host), 0, 0, 0, 0, 0]).map(|fd| fd as usize)
}

const CLONE_PROCESS: usize = libc::SIGCHLD as usize;

/// A process more, which ends at once.
fn cloned(result: Result<i64, i32>) -> Tried {
    if result == Ok(0) {
        std::process::exit(0);
    }
    result.map(|pid| Got(format!("process {pid}")))
}

fn clone(flags: usize) -> Tried {
    cloned(call(libc::SYS_clone, [flags, 0, 0, 0, 0, 0]))
}

fn clone3() -> Tried {
    let mut arguments = [0u64; 11];
    // `exit_signal`.
    arguments[4] = libc::SIGCHLD as u64;
    let size = size_of_val(&arguments);
    cloned(call(
        libc::SYS_clone3,
        [address(&arguments), size, 0, 0, 0, 0],
    ))
}

fn map(protection: i32) -> Result<i64, i32> {
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
    let arguments = [0, 4096, protection as usize, flags, usize::MAX, 0];
    call(libc::SYS_mmap, arguments)
}

fn make_executable() -> Tried {
    let memory = map(libc::PROT_READ | libc::PROT_WRITE)?;
    let protection = libc::PROT_READ | libc::PROT_EXEC;
    try_call(
        libc::SYS_mprotect,
        &[memory as usize, 4096, protection as usize],
    )
}

fn become_root() -> Tried {
    try_call(libc::SYS_setresuid, &[0, 0, 0])
}

fn take_capabilities() -> Tried {
    // Version 3, this thread; then effective, permitted and inheritable, twice.
    let header = [0x2008_0522u32, 0];
    let sets = [u32::MAX, u32::MAX, 0, 0, 0, 0];
    try_call(libc::SYS_capset, &[address(&header), address(&sets)])
}

/// Has KVM carry out a request on `/dev/kvm`. What fails there has passed the filter, and would succeed with the
/// descriptor of a VM, which the process of a guest has.
fn request_of_kvm(number: usize) -> Tried {
    let arguments = [at_cwd(), text(c"/dev/kvm"), libc::O_RDWR as usize, 0, 0, 0];
    let kvm = call(libc::SYS_openat, arguments)?;
    // Room for what any of these requests reads.
    let zeros = [0u64; 16];
    match try_call(libc::SYS_ioctl, &[kvm as usize, number, address(&zeros)]) {
        Err(errno) => Ok(Got(format!("KVM's answer: {errno}"))),
        made => made,
    }
}

/// All of it.
pub static ATTEMPTS: &[Attempt] = &[
    // Files of the host.
    kept("read /etc/passwd", |_| read("/etc/passwd")),
    kept("write /etc/shadow", |_| write("/etc/shadow")),
    kept("read /etc/passwd by ..", |host| {
        read(host.folder().join("../../../../../etc/passwd"))
    }),
    kept("read /etc/passwd by /proc/self/root", |_| {
        read("/proc/self/root/etc/passwd")
    }),
    kept("read /etc/passwd by /proc/self/cwd", |_| {
        read("/proc/self/cwd/../../../../../../etc/passwd")
    }),
    kept("list the host's root folder", |_| list_root()),
    kept("read the environment of init", |_| read("/proc/1/environ")),
    kept("read kernel symbols", |_| read("/proc/kallsyms")),
    kept("write a sysctl", |_| write("/proc/sys/vm/max_map_count")),
    kept("write sysrq", |_| write("/proc/sysrq-trigger")),
    kept("open /dev/mem", |_| read("/dev/mem")),
    kept("open a disk of the host", |_| read("/dev/vda")),
    kept("open /dev/net/tun", |_| read("/dev/net/tun")),
    kept("open the program that runs for writing", |_| {
        write("/proc/self/exe")
    }),
    kept("make a file", |_| {
        open(Path::new("/new"), libc::O_CREAT | libc::O_WRONLY)
    }),
    kept("make a file beside its own", |host| {
        open(&host.folder().join("new"), libc::O_CREAT | libc::O_WRONLY)
    }),
    kept("make a folder", |_| {
        one_path(libc::SYS_mkdir, Path::new("/new"), 0o700)
    }),
    kept("make a device", |host| {
        let path = CString::new(host.folder().join("vda").as_os_str().as_bytes()).unwrap();
        let disk = libc::makedev(254, 0) as usize;
        let mode = (libc::S_IFBLK | 0o600) as usize;
        try_call(libc::SYS_mknod, &[path.as_ptr() as usize, mode, disk])
    }),
    kept("make a link to /etc/passwd", |host| {
        two_paths(
            libc::SYS_symlink,
            Path::new("/etc/passwd"),
            &host.folder().join("link"),
        )
    }),
    kept("open by a handle", |_| {
        let handle = [8u32, 1, 2, 0];
        try_call(
            libc::SYS_open_by_handle_at,
            &[at_cwd(), address(&handle), 0],
        )
    }),
    // Files of other guests.
    kept("read another guest's disk", |host| read(host.other_disk())),
    kept("write another guest's disk", |host| {
        write(host.other_disk())
    }),
    kept("remove another guest's disk", |host| {
        one_path(libc::SYS_unlink, &host.other_disk(), 0)
    }),
    kept("take another guest's disk by a link", |host| {
        two_paths(
            libc::SYS_link,
            &host.other_disk(),
            &host.folder().join("mine"),
        )
    }),
    kept("exchange another guest's disk", |host| {
        two_paths(libc::SYS_rename, &host.own_disk(), &host.other_disk())
    }),
    kept("cut another guest's disk", |host| {
        one_path(libc::SYS_truncate, &host.other_disk(), 0)
    }),
    kept("give away another guest's disk", |host| {
        one_path(libc::SYS_chmod, &host.other_disk(), 0o666)
    }),
    // Mounts.
    kept("mount a file system", |_| {
        try_call(
            libc::SYS_mount,
            &[text(c"none"), text(c"/proc"), text(c"tmpfs"), 0, 0],
        )
    }),
    kept("unmount what hides the host", |_| {
        try_call(libc::SYS_umount2, &[text(c"/"), libc::MNT_DETACH as usize])
    }),
    kept("make a file system to mount", |_| {
        try_call(libc::SYS_fsopen, &[text(c"ext4"), 0])
    }),
    kept("copy a mount", |_| {
        // OPEN_TREE_CLONE
        try_call(libc::SYS_open_tree, &[at_cwd(), text(c"/"), 1])
    }),
    kept("make mounts writable", |_| {
        let attributes = [0u64, libc::MOUNT_ATTR_RDONLY, 0, 0];
        try_call(
            libc::SYS_mount_setattr,
            &[at_cwd(), text(c"/"), 0, address(&attributes), 32],
        )
    }),
    kept("change the root folder", |_| {
        try_call(libc::SYS_chroot, &[text(c"/proc")])
    }),
    kept("exchange the root", |_| {
        try_call(libc::SYS_pivot_root, &[text(c"."), text(c".")])
    }),
    kept("enter a namespace of the host", |_| {
        let fd = call(
            libc::SYS_openat,
            [at_cwd(), text(c"/proc/1/ns/mnt"), 0, 0, 0, 0],
        )?;
        try_call(libc::SYS_setns, &[fd as usize, 0])
    }),
    filtered("make a namespace of users", |_| {
        try_call(libc::SYS_unshare, &[libc::CLONE_NEWUSER as usize])
    }),
    // Processes.
    filtered("fork", |_| clone(CLONE_PROCESS)),
    filtered("fork by clone3", |_| clone3()),
    filtered("fork by vfork", |_| {
        clone(CLONE_PROCESS | (libc::CLONE_VFORK) as usize)
    }),
    filtered("fork into namespaces", |_| {
        clone(CLONE_PROCESS | (libc::CLONE_NEWUSER | libc::CLONE_NEWPID) as usize)
    }),
    kept("execute a shell", |_| {
        try_call(libc::SYS_execve, &[text(c"/bin/sh"), 0, 0])
    }),
    filtered("execute what it has in memory", |_| {
        let fd = call(libc::SYS_memfd_create, [text(c"x"), 0, 0, 0, 0, 0])?;
        let empty = libc::AT_EMPTY_PATH as usize;
        try_call(libc::SYS_execveat, &[fd as usize, text(c""), 0, 0, empty])
    }),
    filtered("execute by x32's number", |_| {
        try_call(0x4000_0000 + 520, &[text(c"/bin/sh"), 0, 0])
    }),
    filtered("map memory to execute", |_| {
        map(libc::PROT_READ | libc::PROT_EXEC).map(|_| Got("memory".to_owned()))
    }),
    filtered("make memory executable", |_| make_executable()),
    filtered("have all that is read executable", |_| {
        try_call(libc::SYS_personality, &[0x0040_0000])
    }),
    kept("trace another guest", |host| {
        try_call(
            libc::SYS_ptrace,
            &[libc::PTRACE_SEIZE as usize, victim(host), 0, 0],
        )
    }),
    kept("read another guest's memory", read_memory),
    kept("open another guest's memory", |host| {
        read(process(host, "mem"))
    }),
    kept("read another guest's environment", |host| {
        read(process(host, "environ"))
    }),
    kept("take another guest's file", |host| {
        let fd = pidfd(host)?;
        try_call(libc::SYS_pidfd_getfd, &[fd, 2, 0])
    }),
    kept("end another guest", |host| {
        try_call(libc::SYS_kill, &[victim(host), libc::SIGKILL as usize])
    }),
    kept("end a thread of another guest", |host| {
        let victim = victim(host);
        try_call(libc::SYS_tgkill, &[victim, victim, libc::SIGKILL as usize])
    }),
    kept("end another guest by its descriptor", |host| {
        let fd = pidfd(host)?;
        try_call(
            libc::SYS_pidfd_send_signal,
            &[fd, libc::SIGKILL as usize, 0, 0],
        )
    }),
    filtered("limit another guest", |host| {
        let none = [0u64; 2];
        let files = libc::RLIMIT_NOFILE as usize;
        try_call(
            libc::SYS_prlimit64,
            &[victim(host), files, address(&none), 0],
        )
    }),
    filtered("slow another guest down", |host| {
        try_call(libc::SYS_setpriority, &[0, victim(host), 19])
    }),
    filtered("move another guest's memory", |host| {
        let nodes = 1u64;
        let nodes = address(&nodes);
        try_call(libc::SYS_migrate_pages, &[victim(host), 64, nodes, nodes])
    }),
    filtered("have a filter's listener", |_| {
        // SECCOMP_GET_NOTIF_SIZES
        let sizes = [0u16; 3];
        try_call(libc::SYS_seccomp, &[3, 0, address(&sizes)])
    }),
    // Network and sockets.
    kept("connect to the host by TCP", tcp),
    kept("send what it likes", |_| {
        socket(libc::AF_PACKET, libc::SOCK_RAW).map(|_| Got("a raw socket".to_owned()))
    }),
    filtered("talk to the kernel's network", |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW).map(|_| Got("a socket".to_owned()))
    }),
    filtered("talk to a hypervisor", |_| {
        socket(libc::AF_VSOCK, libc::SOCK_STREAM).map(|_| Got("a socket".to_owned()))
    }),
    kept("connect to another guest's REST socket", |host| {
        connect(libc::AF_UNIX, host.other_socket().as_os_str().as_bytes())
    }),
    kept("connect to a socket without a file", |host| {
        connect(
            libc::AF_UNIX,
            &[b"\0", host.abstract_name().as_bytes()].concat(),
        )
    }),
    kept("listen at a name beside its own disk", |host| {
        let fd = socket(libc::AF_UNIX, libc::SOCK_STREAM)?;
        let mut bytes = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
        bytes.extend(host.folder().join("sock").as_os_str().as_bytes());
        try_call(libc::SYS_bind, &[fd, bytes.as_ptr() as usize, bytes.len()])
    }),
    // Rings.
    kept("open a file by a ring", |_| {
        ring(|| {
            let cwd = io_uring::types::Fd(libc::AT_FDCWD);
            io_uring::opcode::OpenAt::new(cwd, c"/etc/passwd".as_ptr()).build()
        })
    }),
    filtered("make a socket by a ring", |_| {
        ring(|| io_uring::opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build())
    }),
    kept("remove a file by a ring", |_| {
        ring(|| {
            let cwd = io_uring::types::Fd(libc::AT_FDCWD);
            io_uring::opcode::UnlinkAt::new(cwd, c"/etc/hostname".as_ptr()).build()
        })
    }),
    // Terminal.
    filtered("type into the terminal", |_| {
        try_call(libc::SYS_ioctl, &[0, libc::TIOCSTI as usize, text(c"x")])
    }),
    // Machines of its own, and other memory for the one it has.
    filtered("make a VM", |_| request_of_kvm(0xae01)),
    filtered("make a vCPU", |_| request_of_kvm(0xae41)),
    filtered("give a VM other memory", |_| request_of_kvm(0x4020_ae46)),
    filtered("give a VM a capability", |_| request_of_kvm(0x4068_aea3)),
    // Privileges, and the kernel.
    kept("become root", |_| become_root()),
    kept("take capabilities", |_| take_capabilities()),
    kept("load a module", |_| {
        try_call(libc::SYS_finit_module, &[0, text(c""), 0])
    }),
    kept("load another kernel", |_| {
        try_call(libc::SYS_kexec_load, &[0, 0, 0, 0])
    }),
    kept("set the clock", |_| {
        let time = [0u64; 2];
        try_call(libc::SYS_clock_settime, &[0, address(&time)])
    }),
    kept("set the host's name", |_| {
        try_call(libc::SYS_sethostname, &[text(c"mine"), 4])
    }),
    kept("reach ports", |_| try_call(libc::SYS_iopl, &[3])),
    kept("add swap", |_| {
        try_call(libc::SYS_swapon, &[text(c"/proc/self/exe"), 0])
    }),
    kept("account for processes", |_| try_call(libc::SYS_acct, &[0])),
    filtered("read the kernel's log", |_| {
        let mut bytes = [0u8; 64];
        // SYSLOG_ACTION_READ_ALL
        try_call(
            libc::SYS_syslog,
            &[3, bytes.as_mut_ptr() as usize, bytes.len()],
        )
    }),
    filtered("load a program into the kernel", |_| {
        let attributes = [0u64; 16];
        // BPF_PROG_LOAD
        try_call(libc::SYS_bpf, &[5, address(&attributes), 128])
    }),
    filtered("count events of the processor", |_| {
        let mut attributes = [0u64; 16];
        // A software event, and the length of the structure.
        attributes[0] = 1 | (128 << 32);
        try_call(
            libc::SYS_perf_event_open,
            &[address(&attributes), 0, usize::MAX, usize::MAX, 0],
        )
    }),
    filtered("use the kernel's keys", |_| {
        // KEYCTL_GET_KEYRING_ID of the user's keyring.
        try_call(libc::SYS_keyctl, &[0, -4isize as usize, 1])
    }),
    filtered("share memory by a key", |_| {
        let make = (libc::IPC_CREAT | 0o600) as usize;
        try_call(libc::SYS_shmget, &[0x1234, 4096, make])
    }),
    filtered("watch files", |_| {
        try_call(libc::SYS_fanotify_init, &[0, 0])
    }),
];
