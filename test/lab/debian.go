// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// systemPackages is what a Debian host of guests has, and what virtexit's packages depend on: the lab has no network.
var systemPackages = []string{"systemd-sysv", "udev", "dkms", "libvirt-daemon-system", "libvirt-clients", "qemu-system-x86", "seabios"}

// FindSystem returns the root of a pristine Debian 12 with libvirt, DKMS and the headers of a kernel. Unless a former call
// has, it is made with mmdebstrap below build/lab.
func FindSystem(release string) (string, error) {
	cache, unlock, err := lockedCache("systems")
	if err != nil {
		return "", err
	}
	defer unlock()
	dir := filepath.Join(cache, release)
	if exists(dir) {
		return dir, nil
	}
	tmp, err := os.MkdirTemp(cache, "make-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	root := filepath.Join(tmp, "root")
	include := strings.Join(append(systemPackages, "linux-headers-"+release), ",")
	if err := run(cache, "mmdebstrap", "--quiet", "--variant=apt", "--aptopt=APT::Install-Recommends false", "--include="+include,
		"bookworm", root); err != nil {
		return "", fmt.Errorf("make a Debian system for kernel %s: %w", release, err)
	}
	// One that is there and empty is no first boot, which asks questions.
	if err := os.Truncate(filepath.Join(root, "etc/machine-id"), 0); err != nil {
		return "", err
	}
	return dir, os.Rename(root, dir)
}
