# The two commands of README.md are `make demo` and `make test`; both set up what they need.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
export PATH := $(HOME)/.cargo/bin:$(PATH):/sbin:/usr/sbin
.PHONY: help setup guest guest-update emulator build install deb demo docs docs-check reference test lint unit api web fuzz power-cuts lab bench bench-density clean

# Static: one file runs on any host, and in the lab, whose host has no libraries.
TARGET := x86_64-unknown-linux-gnu
export COPPICE := target/$(TARGET)/release/coppice
export LAB := target/$(TARGET)/release/lab

help:
	@echo "make demo          boot four guests from one disk: natively where KVM can, else in the lab"
	@echo "make test          set up, and run all tests: fmt, licences, module tree, clippy, docs, unit and interop, api, web, fuzz, lab"
	@echo "make build         the release binary, $(COPPICE)"
	@echo "make lint unit api web fuzz lab   the parts of make test"
	@echo "make docs          the documentation as a book, in target/book"
	@echo "make reference     writes what of docs/reference is made from the code"
	@echo "make web           the daemon's page in headless Chromium; a picture in target/web.png"
	@echo "make install       into PREFIX (/usr/local), below DESTDIR: program, man pages, completions, systemd units"
	@echo "make deb           the same as a Debian package, target/coppice.deb"
	@echo "make bench         figures of the lab, and the benchmarks of the disk engine"
	@echo "make bench-density memory of many guests in the lab, beside QEMU's; results in target/lab/out/density"
	@echo "make fuzz          fuzz what others write, each target for FUZZ_SECONDS (60)"
	@echo "make power-cuts    a million power cuts: POWER_CUTS and POWER_SEED say how many and which"
	@echo "make guest         kernel, initrd and root file systems in target/guest"
	@echo "make emulator      the emulator of the lab's host in target/emulator"
	@echo "make guest-update  pin the Debian packages of today"
	@echo "make clean         remove target"

setup:
	resources/setup.sh

guest: setup
	resources/guest/build.sh

emulator: setup
	resources/emulator.sh

guest-update:
	resources/guest/update.sh

build: setup
	RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --target $(TARGET) -p coppice -p lab

# What is installed are the static binaries of make build, which have to be there.
PREFIX ?= /usr/local
install:
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(COPPICE) $(COPPICE)-tools
	# For clients of Firecracker that are told to use it: its folder is in no PATH.
	mkdir -p $(DESTDIR)$(PREFIX)/lib/coppice/firecracker
	ln -sf ../../../bin/coppice $(DESTDIR)$(PREFIX)/lib/coppice/firecracker/firecracker
	mkdir -p $(DESTDIR)$(PREFIX)/share/man/man1
	$(COPPICE) man $(DESTDIR)$(PREFIX)/share/man/man1
	mkdir -p $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/site-functions \
		$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	$(COPPICE) completions bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/coppice
	$(COPPICE) completions zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_coppice
	$(COPPICE) completions fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/coppice.fish
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/systemd/system resources/systemd/*.service
	sed -i 's|/usr/bin/coppice|$(PREFIX)/bin/coppice|' $(DESTDIR)$(PREFIX)/lib/systemd/system/coppice.service

deb: build
	resources/deb.sh

demo: build guest emulator
	resources/demo.sh

# The fuzzers of snapshots and records take many minutes to compile.
test: export FUZZ := disks
test:
	resources/phases.sh setup lint unit api web fuzz lab

# Each step says how long it took.
STEP := resources/step.sh

lint: setup
	$(STEP) format cargo fmt --all --check
	$(STEP) dependencies resources/deny.sh
	$(STEP) tree cargo run --quiet -p tree
	$(STEP) clippy cargo clippy --workspace --all-targets --features storage/fuzzing,machine/fuzzing,daemon/fuzzing -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(STEP) documentation cargo doc --workspace --no-deps --document-private-items --quiet

# Interop tests call qemu-img and qemu-io; native tests use /dev/kvm. Where either is missing they fail. Tests that
# cannot run for want of a right are named at the end.
unit: setup
	resources/unit.sh

# Property tests of the daemon's API from its own OpenAPI document. EXAMPLES and SEED say how many and which.
api: setup
	cargo build -p coppice
	resources/schemathesis/run.sh

# The daemon's page in headless Chromium, which is large: so it is installed here and not by setup.
web: setup
	command -v chromium >/dev/null || sudo apt-get install -q -y --no-install-recommends chromium || apt-get install -q -y --no-install-recommends chromium
	cargo build -p coppice
	resources/web/check.sh target/web.png

# The documentation: links lead somewhere, every page is in the book, and what is made from the code is current. Its tests compare pages of
# docs/reference with the code, and write them when they are told to.
lint: docs-check
REFERENCE := cargo nextest run --workspace --lib --bins -E 'test(/reference.*is_current/)'
docs-check: setup
	$(STEP) links resources/docs.sh check
	$(STEP) reference $(REFERENCE)

reference: setup
	UPDATE_EXPECT=1 $(REFERENCE)

# mdBook is compiled for this, and so not by setup.
docs: setup
	resources/docs.sh build

# FUZZ_SECONDS for each target, 60 if not said.
fuzz: setup
	resources/fuzz.sh

# The test of the unit tests, with more cuts and a seed of its own, which is printed.
power-cuts: setup
	POWER_CUTS=$${POWER_CUTS:-1000000} POWER_SEED=$${POWER_SEED:-$$RANDOM} \
		cargo test --release -p storage --lib a_power_cut_at_any_operation -- --nocapture

lab: build guest emulator
	$(LAB) run --json target/lab/results.json

bench: build guest emulator
	command -v fio >/dev/null || sudo apt-get install -q -y --no-install-recommends fio || apt-get install -q -y --no-install-recommends fio
	$(LAB) run bench disk_bench --json target/lab/bench.json
	$(COPPICE) disk bench target --peer
	cargo bench -p storage -p devices

# Long: two workloads and six guests of each configuration, one after the other, under emulation.
bench-density: build guest emulator
	$(LAB) run density --json target/lab/density.json

clean:
	cargo clean
