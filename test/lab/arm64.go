// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

func (m *machine) arm64(ctx context.Context) error {
	return m.emulate(ctx, "qemu-system-aarch64", []string{
		"-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
		"-machine", "virt,virtualization=on,gic-version=3", "-cpu", "max",
		"-accel", DefaultAccelerator, "-smp", strconv.Itoa(m.CPUs), "-m", strconv.Itoa(m.Memory),
		"-kernel", m.kernel.Image(), "-initrd", m.initramfs(),
		"-append", "console=ttyAMA0 panic=-1 oops=panic panic_on_warn=1 " + m.Config.Cmdline,
		"-serial", "file:" + m.console(),
		"-chardev", "stdio,id=output", "-device", "pci-serial,chardev=output",
	})
}

// busybox is the path of the one that came with an arm64 kernel.
func (k Kernel) busybox() string { return filepath.Join(k.Dir, "bin", "busybox") }

// arm64 tells whether a version or release is of that architecture.
func arm64(version string) bool { return strings.HasSuffix(version, "-arm64") }

// foreignApt gives the options with which apt knows arm64's packages, whatever this host's are: with lists of its own, which
// it fetches when there are none of the last day.
func foreignApt() ([]string, error) {
	dir, unlock, err := lockedCache("apt-arm64")
	if err != nil {
		return nil, err
	}
	defer unlock()
	lists, status := filepath.Join(dir, "lists"), filepath.Join(dir, "status")
	err = errors.Join(
		os.MkdirAll(filepath.Join(lists, "partial"), 0o755),
		os.MkdirAll(filepath.Join(dir, "cache", "archives", "partial"), 0o755),
		os.WriteFile(status, nil, 0o644)) // nothing is installed
	if err != nil {
		return nil, err
	}
	options := []string{
		"-o", "APT::Architecture=arm64", "-o", "APT::Architectures=arm64", "-o", "APT::Sandbox::User=root",
		"-o", "Dir::State=" + dir, "-o", "Dir::State::status=" + status, "-o", "Dir::Cache=" + filepath.Join(dir, "cache"),
	}
	updated := filepath.Join(dir, "updated")
	if info, err := os.Stat(updated); err == nil && time.Since(info.ModTime()) < 24*time.Hour {
		return options, nil
	}
	if err := run(dir, "apt-get", append([]string{"-qq", "update"}, options...)...); err != nil {
		return nil, fmt.Errorf("lists of arm64's packages: %w", err)
	}
	return options, os.WriteFile(updated, nil, 0o644)
}
