# SPDX-License-Identifier: Apache-2.0
#
#	make demo	virtexit at work, in an emulated machine with real guests
#	make test	every test, those in the lab included
#	make test-packages	the packages with a module that DKMS builds in the lab: ten minutes or so, not in "make test"
#	make bench-cost	what watching an exit costs, virtexit and others; build/bench-cost.json
#	make lab	a root shell in that machine
#	make build	bin/virtexitd, bin/virtexit; build/completion, for shells
#	make generate	what is generated and kept: internal/abi, BPF programs, docs/man
#	make kmod	build/kmod/$(KVER)/virtexit.ko
#	make kmods	the same for every kernel that Debian 12 offers, with every warning
#	make kvm-patch	build/kvm-patch/$(KVER)/: KVM with an exit hook, see kvm-patch/README.md
#	make lab-debug	the module's tests on a kernel with KASAN, lockdep and the like: half an hour, not in "make test"
#	make install	onto this host: PREFIX, DESTDIR
#	make deb rpm	packages, in build/packages/deb and rpm

VERSION := $(shell sed -n 's/^\#define VX_VERSION "\(.*\)"/\1/p' kmod/vx.h)
KVER    ?= $(shell uname -r)
PREFIX  ?= /usr
DESTDIR ?=
GO      ?= go
TAGS    := libvirt_dlopen

# What a fresh Debian 12 with make and Go lacks.
PACKAGES_build := gcc libc6-dev pkg-config libvirt-dev
PACKAGES_kmod  := gcc-12 libelf1 xz-utils kmod patch pahole
PACKAGES_bpf   := clang-14 llvm-14 libbpf-dev
PACKAGES_docs  := man-db groff-base mandoc bash-completion zsh fish
PACKAGES_lab   := $(PACKAGES_build) $(PACKAGES_kmod) qemu-system-x86 qemu-system-arm seabios libvirt-daemon-system libvirt-clients \
	busybox-static cpio zstd curl linux-perf bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso \
	bsdutils procps iproute2 sparse python3 prometheus mmdebstrap $(PACKAGES_docs) $(PACKAGES_bpf)
PACKAGES_debug := flex bison bc libelf-dev

LAB := build/lab/bin/lab
# What KVM is patched for, and what virtexit.ko is built for: every flavour that Debian 12 offers.
SERIES   := 6.1 6.12
FLAVOURS := $(foreach series,$(SERIES),$(series) $(series)-cloud $(series)-rt)
release  = $$($(LAB) kernel --kernel $(1) | cut -d' ' -f1)

.PHONY: build kmod kmods kvm-patch kvm-patches kvm-others demo bench-cost lab lab-debug lab-debug-kernel test generate install \
	install-virtexit install-virtexit-dkms install-vdsm-hook-virtexit uninstall deb rpm staged test-packages clean distclean $(LAB)

build: packages-build
	$(GO) build -trimpath -buildmode=pie -tags $(TAGS) -ldflags '-X main.version=$(VERSION)' -o bin/ ./cmd/virtexit ./cmd/virtexitd
	@# VDSM's hosts are not Debian's.
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/ ./cmd/virtexit-vdsm-hook
	@mkdir -p build/completion
	@set -e; for shell in bash zsh fish; do bin/virtexit completion $$shell >build/completion/$$shell; done

# Each kernel has a copy of its own to be built in.
kmod: packages-kmod $(LAB)
	@mkdir -p build/kmod/$(KVER)
	@cp -ru kmod/* build/kmod/$(KVER)/
	$(MAKE) -C "$$($(LAB) headers $(KVER))" M=$(CURDIR)/build/kmod/$(KVER) $(KFLAGS) modules

kvm-patch: packages-kmod $(LAB)
	@LAB=$(LAB) kvm-patch/build $(KVER)

# The compiler, sparse and objtool have nothing to say, or the build fails.
kmods: packages-lab $(LAB)
	@set -e; mkdir -p build/kmod; for flavour in $(FLAVOURS); do \
		release=$$($(LAB) release $$flavour); log=build/kmod/$$release.log; \
		{ $(MAKE) --no-print-directory kmod KVER=$$release KFLAGS="W=1 C=1 CF=-Wsparse-error" >$$log 2>&1 && \
			! grep -iq warning $$log; } || { cat $$log; rm -rf build/kmod/$$release; exit 1; }; \
		printf '%-11s %-28s virtexit.ko, no warnings\n' $$flavour $$release; \
	done

kvm-patches: packages-lab $(LAB)
	@set -e; for series in $(SERIES); do $(MAKE) --no-print-directory kvm-patch KVER=$(call release,$$series); done

# KVM whose exits are of an ISA that nobody knows, for tests.
kvm-others: packages-lab $(LAB)
	@set -e; for series in $(SERIES); do LAB=$(LAB) test/lab/other-kvm.sh $(call release,$$series); done

demo: packages-lab build $(LAB)
	@echo "# unpacking Debian's kernel, building virtexit.ko for it"
	@$(MAKE) -s --no-print-directory kmod KVER=$(call release,"")
	@echo "# booting the lab"
	@set -- $$($(LAB) kernel) && $(LAB) run --cpus 1 --timeout 10m -- test/lab/demo.sh $$2/boot/vmlinuz-$$1

lab: packages-lab build $(LAB)
	@$(MAKE) -s --no-print-directory kmod KVER=$(call release,"")
	$(LAB) shell --cpus 1

# In instructions, on an emulated CPU that counts them.
bench-cost: packages-lab kvm-patches $(LAB)
	@set -e; for series in $(SERIES); do $(MAKE) -s --no-print-directory kmod KVER=$(call release,$$series); done
	@CGO_ENABLED=0 $(GO) build -o build/lab/bin/cost ./test/lab/cost/cmd
	@build/lab/bin/cost -o build/bench-cost.json $(SERIES)

# A kernel with KASAN, lockdep and the like: eight minutes on two CPUs, the first time.
lab-debug-kernel: packages-lab packages-debug $(LAB)
	@echo "# building the kernel of configs/lab-debug.config"
	@LAB=$(LAB) test/lab/debug-kernel.sh 6.1
	@$(MAKE) --no-print-directory kmod KVER=$(call release,6.1-debug)

lab-debug: lab-debug-kernel
	$(GO) test -tags lab_debug -count 1 -v -timeout 70m -run '^TestDebugKernel$$' ./test/lab

test: packages-lab deb
	@$(MAKE) --no-print-directory kmods
	@$(MAKE) --no-print-directory kvm-patches
	@$(MAKE) --no-print-directory kvm-others
	$(GO) vet -tags $(TAGS) ./...
	$(GO) vet -tags $(TAGS),lab,lab_debug ./...
	$(GO) tool staticcheck -tags $(TAGS),lab,lab_debug ./...
	$(GO) test -tags $(TAGS) -race -timeout 80m $$($(GO) list -tags $(TAGS) ./... | grep -v /test/packages)
	@# One machine more would slow the others.
	$(GO) test -tags $(TAGS) -race -timeout 30m ./test/packages

# DKMS builds in an emulated machine; "make test" installs a module that is built.
test-packages: packages-lab deb $(LAB)
	@$(MAKE) -s --no-print-directory kmod KVER=$(call release,6.1)
	VIRTEXIT_PACKAGES_DKMS=yes $(GO) test -count 1 -v -timeout 30m -run '^TestInstall$$' ./test/packages

$(LAB):
	@$(GO) build -o $@ ./test/lab/cmd
	@CGO_ENABLED=0 $(GO) build -o build/lab/bin/guest ./test/lab/guest/cmd

# Onto this host; with DESTDIR into a folder, and nothing of the host is touched. The
# two parts say what is in the packages, too.
UNIT     := $(PREFIX)/lib/systemd/system/virtexitd.service
MAN      := $(PREFIX)/share/man
BASH     := $(PREFIX)/share/bash-completion/completions/virtexit
ZSH      := $(PREFIX)/share/zsh/vendor-completions/_virtexit
FISH     := $(PREFIX)/share/fish/vendor_completions.d/virtexit.fish
SYSUSERS := $(PREFIX)/lib/sysusers.d/virtexit.conf
UDEV     := $(PREFIX)/lib/udev/rules.d/60-virtexit.rules
DOC      := $(PREFIX)/share/doc/virtexit
CONF     := /etc/virtexit/virtexitd.yaml
KMOD_SRC := /usr/src/virtexit-$(VERSION)

install-virtexit: build
	install -D -t $(DESTDIR)$(PREFIX)/bin bin/virtexit
	install -D -t $(DESTDIR)$(PREFIX)/sbin bin/virtexitd
	install -D -m 644 -t $(DESTDIR)$(MAN)/man1 docs/man/*.1
	install -D -m 644 -t $(DESTDIR)$(MAN)/man5 docs/man/*.5
	install -D -m 644 -t $(DESTDIR)$(MAN)/man8 docs/man/*.8
	install -D -m 644 build/completion/bash $(DESTDIR)$(BASH)
	install -D -m 644 build/completion/zsh $(DESTDIR)$(ZSH)
	install -D -m 644 build/completion/fish $(DESTDIR)$(FISH)
	install -D -m 644 configs/systemd/virtexitd.service $(DESTDIR)$(UNIT)
	sed -i 's,^ExecStart=/usr/sbin/,ExecStart=$(PREFIX)/sbin/,' $(DESTDIR)$(UNIT)
	install -D -m 644 configs/sysusers.d/virtexit.conf $(DESTDIR)$(SYSUSERS)
	install -D -m 644 configs/udev/60-virtexit.rules $(DESTDIR)$(UDEV)
	install -D -m 644 -t $(DESTDIR)$(DOC) README.md docs/*.md docs/*.yaml configs/prometheus/virtexit.rules.yml
	@# What an administrator has edited stays; the new one is put beside it.
	@if [ ! -e $(DESTDIR)$(CONF) ] || cmp -s configs/virtexitd.yaml $(DESTDIR)$(CONF); then \
		install -D -m 644 configs/virtexitd.yaml $(DESTDIR)$(CONF); \
	else \
		install -m 644 configs/virtexitd.yaml $(DESTDIR)$(CONF).new; \
		echo "$(CONF) differs and is kept; the new one is $(CONF).new"; \
	fi

install-virtexit-dkms:
	install -D -m 644 -t $(DESTDIR)$(KMOD_SRC) kmod/*.c kmod/*.h kmod/Kbuild kmod/Makefile kmod/dkms.conf
	install -D -m 644 -t $(DESTDIR)$(KMOD_SRC)/uapi kmod/uapi/*.h

install-vdsm-hook-virtexit: build
	configs/vdsm/install bin/virtexit-vdsm-hook $(DESTDIR)

install: install-virtexit install-virtexit-dkms
ifeq ($(DESTDIR),)
	@if command -v systemd-sysusers >/dev/null; then systemd-sysusers $(SYSUSERS); fi
	@if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
	@if ! command -v dkms >/dev/null; then \
		echo "virtexit.ko is not installed: dkms is missing. Either"; \
		echo "  apt-get install dkms linux-headers-$(KVER) && make install"; \
		echo "or, for this kernel alone,"; \
		echo "  make kmod && insmod build/kmod/$(KVER)/virtexit.ko"; \
	else \
		{ [ -n "$$(dkms status virtexit/$(VERSION))" ] || dkms add virtexit/$(VERSION); } && \
		dkms build --force virtexit/$(VERSION) -k $(KVER) && dkms install --force virtexit/$(VERSION) -k $(KVER) && \
		echo "Now: systemctl enable --now virtexitd"; \
	fi
endif

uninstall:
ifeq ($(DESTDIR),)
	@if [ -d /run/systemd/system ]; then systemctl disable --now virtexitd || true; fi
	@if command -v dkms >/dev/null && [ -n "$$(dkms status virtexit/$(VERSION))" ]; then dkms remove virtexit/$(VERSION) --all; fi
	@rmmod virtexit 2>/dev/null || true
endif
	rm -f $(DESTDIR)$(PREFIX)/bin/virtexit $(DESTDIR)$(PREFIX)/sbin/virtexitd $(addprefix $(DESTDIR),$(UNIT) $(SYSUSERS) $(UDEV) $(CONF).new)
	rm -f $(addprefix $(DESTDIR),$(BASH) $(ZSH) $(FISH)) $(patsubst docs/man/%.1,$(DESTDIR)$(MAN)/man1/%.1,$(wildcard docs/man/*.1)) \
		$(DESTDIR)$(MAN)/man5/virtexitd.yaml.5 $(DESTDIR)$(MAN)/man8/virtexitd.8
	rm -rf $(addprefix $(DESTDIR),$(DOC) $(KMOD_SRC))
	@if cmp -s configs/virtexitd.yaml $(DESTDIR)$(CONF); then rm -r $(DESTDIR)$(dir $(CONF)); \
	elif [ -e $(DESTDIR)$(CONF) ]; then echo "$(CONF) has been edited and is kept"; fi

# Packages, in $(OUT)/deb and $(OUT)/rpm. Each bears the name of who builds it.
OUT        := build/packages
SHIPPED    := virtexit virtexit-dkms vdsm-hook-virtexit
MAINTAINER ?= virtexit <root@localhost>
NFPM       := VERSION=$(VERSION) MAINTAINER="$(MAINTAINER)" $(GO) tool -modfile=configs/packages/nfpm.mod nfpm package
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || date +%s)

deb rpm: staged
	@rm -rf $(OUT)/$@; mkdir -p $(OUT)/$@
	@set -e; for p in $(SHIPPED); do $(NFPM) -f configs/packages/$$p.yaml -p $@ -t $(OUT)/$@/; done

# What "make install" installs, and what Debian wants beside.
staged: build
	@rm -rf $(OUT)/staged
	@set -e; for p in $(SHIPPED); do \
		$(MAKE) -s --no-print-directory install-$$p DESTDIR=$(CURDIR)/$(OUT)/staged/$$p PREFIX=/usr; \
		configs/packages/stage $(OUT)/staged/$$p $$p $(VERSION) "$(MAINTAINER)"; done

generate: packages-bpf
	$(GO) generate ./internal/abi ./internal/source/ebpf
	$(GO) test -tags $(TAGS) -count 1 -run '^TestMan$$' ./cmd/virtexit ./cmd/virtexitd -update

# Installs what is missing; lists of packages older than a day are renewed, since old kernels vanish from the archive.
packages-%:
	@command -v dpkg-query >/dev/null || exit 0; \
	missing=$$(for p in $(PACKAGES_$*); do \
		dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	[ -n "$$missing" ] || [ $* = lab ] || exit 0; \
	if [ -z "$$(find /var/lib/apt/lists -maxdepth 1 -name '*_Packages*' -mtime -1 2>/dev/null)" ]; then \
		echo "# apt-get update"; apt-get -qq update; fi; \
	[ -n "$$missing" ] || exit 0; \
	echo "# installing" $$missing; \
	DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$missing >/dev/null

clean:
	rm -rf bin build/packages build/completion build/kmod build/kvm-patch build/lab/bin build/lab/logs

# And the unpacked kernels.
distclean: clean
	rm -rf build
