// SPDX-License-Identifier: Apache-2.0

package inside

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Build says which modules of KVM are meant.
type Build string

// The builds of KVM.
const (
	Stock   Build = "stock"   // the distribution's
	Patched Build = "patched" // those in build/kvm-patch, with the exit hook
)

// KVMVar names the environment variable with the Build that LoadKVM loads;
// Stock where it is not set.
const KVMVar = "VIRTEXIT_LAB_KVM"

// LoadKVM has KVM loaded. One that is there already is left alone.
func LoadKVM(t testing.TB) {
	t.Helper()
	vendor := Host(t).Module
	if _, err := os.Stat("/sys/module/" + vendor); err == nil {
		return
	}
	build := Build(os.Getenv(KVMVar))
	loadKVM(t, "kvm", build)
	loadKVM(t, vendor, build)
	// libvirt's QEMU is a user of its own, and there is no udev.
	if err := os.Chmod("/dev/kvm", 0o666); err != nil {
		t.Fatal(err)
	}
}

// ExchangeKVM has KVM loaded anew, kvm.ko and the vendor module each from the
// given build, until the test ends; then there is none.
func ExchangeKVM(t testing.TB, kvm, vendor Build) {
	t.Helper()
	remove := func() {
		Remove(t, Host(t).Module)
		Remove(t, "kvm")
	}
	remove()
	t.Cleanup(remove)
	loadKVM(t, "kvm", kvm)
	loadKVM(t, Host(t).Module, vendor)
}

// patchedDir is where "make kvm-patch" leaves modules for this kernel.
func patchedDir(t testing.TB) string {
	t.Helper()
	release := Release(t)
	if strings.Contains(release, "-rt-") || strings.HasSuffix(release, "-debug") {
		t.Skip("machine: no patched KVM can be built for kernel ", release)
	}
	return filepath.Join("../../../build/kvm-patch", release)
}

func loadKVM(t testing.TB, module string, build Build) {
	t.Helper()
	names := []string{module}
	dir := ""
	if build == Patched {
		names, dir = Host(t).Needs, patchedDir(t)
	}
	if out, err := exec.Command("modprobe", append([]string{"-a"}, names...)...).CombinedOutput(); err != nil {
		t.Fatalf("modprobe %s: %v\n%s", names, err, out)
	}
	if build == Patched {
		insert(t, filepath.Join(dir, strings.ReplaceAll(module, "_", "-")+".ko"), "")
	}
}
