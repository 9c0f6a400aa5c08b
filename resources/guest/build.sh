#!/usr/bin/env bash
# Turns Debian packages into guests, without root: a kernel, an initrd, and root file systems as VHDX, in target/guest/.
#
#   vmlinuz              Debian's cloud kernel
#   initrd.cpio.gz       modules, busybox and `init` (resources/guest/init)
#   host-initrd.cpio.gz  the same for the lab's host: KVM and PCI modules, `host-init`
#   modules/             what nft(8) needs of the kernel, and veth, for a scenario that loads them itself
#   root.raw, root.vhdx  ext4 with busybox
#   full.vhdx            ext4 with bash, coreutils and python3
#   bench.vhdx           ext4 with busybox, and 40 MiB to read that do not compress
#   machine.raw          ext4 with systemd and dpkg: the lab's host on which Coppice's package is installed
#
# Versions are pinned in packages.lock, and those of machine.raw in machine.lock. A version that the mirror no longer has is replaced by the newest, which is said.
set -euo pipefail
export LC_ALL=C SOURCE_DATE_EPOCH=1700000000
PATH=$PATH:/sbin:/usr/sbin

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/../../target/guest}
mkdir -p "$out/packages"
out=$(cd "$out" && pwd)

# Everything is made anew when the recipe changes, and nothing when it does not.
stamp=$(cat "$here"/{build.sh,packages.lock,machine.lock,init,host-init,lab.service,booted.S,stress.py} | sha256sum | cut -d' ' -f1)
if [ "$(cat "$out/stamp" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi
rm -f "$out/stamp"
work=$(mktemp -d "$out/.build-XXXXXX")
trap 'rm -rf "$work"' EXIT

# download PACKAGE[=VERSION]: puts the .deb into the working folder; apt-get checks it against the signed lists of the mirror.
download() {
    (cd "$work" && apt-get download -q "$1" >/dev/null 2>"$work/error")
}

# refresh: fetches the mirror's lists, once, for they may be older than what the mirror has.
refresh() {
    [ ! -e "$work/refreshed" ] || return 0
    touch "$work/refreshed"
    local sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo -n)
    "${sudo[@]}" apt-get update -q >/dev/null 2>&1 || true
}

# fetch PACKAGE VERSION: prints the path of its .deb.
fetch() {
    local name=$1 version=$2 deb
    deb=$out/packages/${name}_${version//:/%3a}_amd64.deb
    if [ ! -f "$deb" ]; then
        if ! download "$name=$version" && ! { refresh && download "$name=$version"; }; then
            # A kernel's package is named after its ABI: its successor has another name.
            [[ $name != linux-image-* ]] ||
                name=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
            download "$name" || {
                echo "guest: cannot download $1 $version, and $name neither; is this machine offline?" >&2
                cat "$work/error" >&2
                return 1
            }
            echo "guest: $1 $version is not on the mirror any more; took the newest, $(cd "$work" && echo "$name"_*.deb)" \
                "(make guest-update pins it)" >&2
        fi
        mv "$work/${name}"_*.deb "$deb"
    fi
    echo "$deb"
}

echo "guest: building in $out"
mkdir "$work"/{kernel,busybox,full}
while read -r name version; do
    case $name in
        '' | '#'*) continue ;;
        linux-image-*) tree=kernel ;;
        busybox-static) tree=busybox ;;
        *) tree=full ;;
    esac
    deb=$(fetch "$name" "$version")
    dpkg-deb -x "$deb" "$work/$tree"
done <"$here/packages.lock"

cp "$work"/kernel/boot/vmlinuz-* "$out/vmlinuz"
modules=$(echo "$work"/kernel/lib/modules/*)

# initrd NAME INIT MODULE[:WORD]...: an initrd with INIT as /init, and modules to be loaded in that order. INIT reads the word: a guest loads such a
# module only where there is a virtio device of that number, the host gives it to the module.
initrd() {
    local name=$1 init=$2 tree=$work/$1 module
    shift 2
    mkdir -p "$tree"/{bin,dev,mnt,modules,proc,root,sys,tmp}
    cp "$work/busybox/bin/busybox" "$tree/bin/"
    ln -s busybox "$tree/bin/sh"
    cp "$here/$init" "$tree/init"
    chmod 755 "$tree/init"
    # Among what the guest removes once it has run.
    [ "$init" != init ] || cc -nostdlib -static -s -Wl,-n,--build-id=none -o "$tree/modules/booted" "$here/booted.S"
    for module in "$@"; do
        cp "$(find "$modules" -name "${module%:*}.ko" | grep .)" "$tree/modules/"
        echo "${module/:/ }" >>"$tree/modules/order"
    done
    find "$tree" -exec touch -h -d @$SOURCE_DATE_EPOCH {} +
    (cd "$tree" && find . | sort | cpio -o -H newc -R 0:0 --reproducible --quiet) | gzip -9n >"$out/$name.cpio.gz"
}

initrd initrd init virtio_ring virtio virtio_mmio virtio_blk:0x0002 virtio-rng:0x0004 pvpanic pvpanic-mmio \
    virtio_balloon:0x0005 libnvdimm:0x001b nd_btt:0x001b nd_pmem:0x001b nd_virtio:0x001b virtio_pmem:0x001b \
    failover:0x0001 net_failover:0x0001 virtio_net:0x0001 \
    vsock:0x0013 vmw_vsock_virtio_transport_common:0x0013 vmw_vsock_virtio_transport:0x0013
# KVM's older MMU (tdp_mmu=N): with it guests crashed more seldom while the emulated host had two processors. With one, no guest was seen to crash
# with it; the newer one was not tried again.
initrd host-initrd host-init irqbypass kvm:tdp_mmu=N kvm-amd virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev \
    virtio_pci virtio_blk tun

rm -rf "$out/modules"
mkdir -p "$out/modules"
for module in nfnetlink libcrc32c nf_tables nf_defrag_ipv4 nf_defrag_ipv6 nf_conntrack nf_nat nft_chain_nat nft_nat nft_masq nft_ct \
    nft_fib nft_fib_ipv4 nft_fib_ipv6 nft_fib_inet nf_reject_ipv4 nf_reject_ipv6 nft_reject nft_reject_inet nft_objref veth; do
    cp "$(find "$modules" -name "$module.ko" | grep .)" "$out/modules/"
    echo "$module" >>"$out/modules/order"
done

# rootfs NAME TREE SIZE: an ext4 file system as raw file and as VHDX.
rootfs() {
    local name=$1 tree=$2 size=$3
    rm -f "$out/$name.raw" "$out/$name.vhdx"
    E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH mke2fs -q -t ext4 -b 4096 -U 6f9f0b0e-6f5c-4c52-9d2b-0c0f5e3b8a11 \
        -E root_owner=0:0,hash_seed=6f9f0b0e-6f5c-4c52-9d2b-0c0f5e3b8a11,lazy_itable_init=0 \
        -d "$tree" "$out/$name.raw" "$size" >/dev/null
    qemu-img convert -f raw -O vhdx -o subformat=dynamic "$out/$name.raw" "$out/$name.vhdx"
}

mkdir -p "$work/root"/{bin,dev,etc,mnt,proc,root,sbin,sys,tmp}
cp "$work/busybox/bin/busybox" "$work/root/bin/"
for applet in $("$work/busybox/bin/busybox" --list); do
    [ "$applet" = busybox ] || ln -sf busybox "$work/root/bin/$applet"
done
cat >"$work/root/sbin/init" <<'INIT'
#!/bin/sh
# A shell on the console; leaving it powers off.
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
echo "COPPICE-ROOT uptime=$(cut -d' ' -f1 /proc/uptime)"
setsid cttyhack sh
poweroff -f
INIT
chmod 755 "$work/root/sbin/init"
rootfs root "$work/root" 64M

mkdir -p "$work/full"/{dev,mnt,proc,root,sys,tmp,sbin}
cp "$work/busybox/bin/busybox" "$work/full/bin/"
ln -sf bash "$work/full/bin/sh"
ln -sf python3.11 "$work/full/usr/bin/python3"
cp "$work/root/sbin/init" "$work/full/sbin/init"
for applet in mount cut poweroff setsid cttyhack; do
    [ -e "$work/full/bin/$applet" ] || ln -s busybox "$work/full/bin/$applet"
done
rm -rf "$work/full/usr/share"/{doc,man,locale,info,lintian}
cp "$here/stress.py" "$work/full/"
rootfs full "$work/full" 256M
rm -f "$out/full.raw"

# Python's generator gives the same bytes for a seed in every version; `coppice bench` knows their checksum.
mkdir -p "$work/bench"/{bin,data}
cp "$work/busybox/bin/busybox" "$work/bench/bin/"
python3 -c 'import random, sys; sys.stdout.buffer.write(random.Random(1).randbytes(40 << 20))' >"$work/bench/data/40M"
rootfs bench "$work/bench" 64M
rm -f "$out/bench.raw"

# machine: a Debian of machine.lock that boots. Its packages are unpacked, and told to its dpkg as installed, but their scripts are not run, which would
# take root: what those make and this machine needs is made here.
machine() {
    local tree=$work/machine name version deb folder list
    mkdir -p "$tree"/usr/{bin,lib,lib64,sbin} "$tree"/{dev,lab,proc,run,sys,tmp} "$tree/var/lib/dpkg"/{info,updates,triggers}
    for folder in bin lib lib64 sbin; do
        ln -s "usr/$folder" "$tree/$folder"
    done
    while read -r name version; do
        [[ -n $name && $name != '#'* ]] || continue
        deb=$(fetch "$name" "$version")
        dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink --no-same-owner -C "$tree"
        { dpkg-deb -f "$deb" && echo "Status: install ok installed" && echo; } >>"$tree/var/lib/dpkg/status"
        list=$name
        [ "$(dpkg-deb -f "$deb" Multi-Arch)" != same ] || list=$name:amd64
        dpkg-deb --fsys-tarfile "$deb" | tar -t | sed 's|^\.||; s|/$||; s|^$|/.|' >"$tree/var/lib/dpkg/info/$list.list"
    done <"$here/machine.lock"
    rm -rf "$tree/usr/share"/{doc,locale,info,lintian,man,zoneinfo} "$tree"/usr/lib/x86_64-linux-gnu/gconv
    ln -s dash "$tree/usr/bin/sh" 2>/dev/null || true
    ln -s mawk "$tree/usr/bin/awk"
    printf 'root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n' >"$tree/etc/passwd"
    printf 'root:x:0:\ntty:x:5:\nkvm:x:104:\nnogroup:x:65534:\n' >"$tree/etc/group"
    echo lab >"$tree/etc/hostname"
    echo 0123456789abcdef0123456789abcdef >"$tree/etc/machine-id"
    # There is no udev, which a login on the serial line would wait for.
    mkdir -p "$tree/etc/systemd/system/multi-user.target.wants"
    ln -s /dev/null "$tree/etc/systemd/system/getty.target"
    ln -s /lib/systemd/system/multi-user.target "$tree/etc/systemd/system/default.target"
    cp "$here/lab.service" "$tree/etc/systemd/system/"
    ln -s ../lab.service "$tree/etc/systemd/system/multi-user.target.wants/"
    rootfs machine "$tree" 512M
    rm -f "$out/machine.vhdx"
}
machine

echo "$stamp" >"$out/stamp"
