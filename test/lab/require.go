// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	bashCompletion = "/usr/share/bash-completion/bash_completion"
	bpfHelpers     = "/usr/include/bpf/bpf_helpers.h"
)

// packages tells which Debian package holds a tool; others are named like their tool.
var packages = map[string]string{
	"qemu-system-x86_64":  "qemu-system-x86",
	"qemu-system-aarch64": "qemu-system-arm",
	"busybox":             "busybox-static",
	"apt-cache":           "apt",
	"apt-get":             "apt",
	"dpkg-deb":            "dpkg",
	"depmod":              "kmod",
	"modprobe":            "kmod",
	"script":              "bsdutils",
	"libvirtd":            "libvirt-daemon-system",
	"virtlogd":            "libvirt-daemon",
	"virsh":               "libvirt-clients",
	"perf":                "linux-perf",
	"promtool":            "prometheus",
	"llvm-strip-14":       "llvm-14",
	bpfHelpers:            "libbpf-dev",
	"man":                 "man-db",
	bashCompletion:        "bash-completion",
	bochsTerm:             "bochs-term",
	bochsBIOS:             "bochsbios",
	vgaBIOS:               "vgabios",
	isolinux:              "isolinux",
	ldlinux:               "syslinux-common",
}

// Require skips the test if a tool is missing on the host, and says how to get it. Where the environment has CI=true the
// test fails instead. A tool is a command, or a file's absolute path.
func Require(t testing.TB, tools ...string) {
	t.Helper()
	var missing []string
	for _, name := range tools {
		if path := tool(name); filepath.IsAbs(path) {
			if _, err := os.Stat(path); err == nil {
				continue
			}
		}
		pkg := packages[name]
		if pkg == "" {
			pkg = name
		}
		missing = append(missing, pkg)
	}
	if len(missing) == 0 {
		return
	}
	slices.Sort(missing)
	line := "missing on this host: apt-get install " + strings.Join(slices.Compact(missing), " ")
	if os.Getenv("CI") == "true" {
		t.Fatal(line)
	}
	t.Skip(line)
}

// Require is Require for what the machine itself needs. With -short, the test skips.
func (c Config) Require(t testing.TB) {
	t.Helper()
	if testing.Short() && os.Getenv("CI") != "true" {
		t.Skip("boots a machine: not with -short")
	}
	tools := []string{"apt-get", "apt-cache", "dpkg-deb", "depmod", "modprobe", "busybox"}
	switch c.Emulator {
	case Bochs:
		tools = append(tools, "bochs", "script", "xorriso", bochsTerm, bochsBIOS, vgaBIOS, isolinux, ldlinux)
	case ARM64:
		tools = append(tools, "qemu-system-aarch64")
	default:
		tools = append(tools, "qemu-system-x86_64")
	}
	Require(t, tools...)
}
