// SPDX-License-Identifier: Apache-2.0

package inside

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"virtexit/internal/exitreason"
)

// Build says which modules of KVM are meant.
type Build string

// The builds of KVM.
const (
	Stock   Build = "stock"   // the distribution's
	Patched Build = "patched" // those in build/kvm-patch, with the exit hook
	Other   Build = "other"   // a vendor module in build/lab/kvm whose exits are of OtherISA
)

// OtherISA is a code space that nobody uses; its codes are those of SVM.
const OtherISA exitreason.ISA = 77

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
		Remove(t, "kvm_other")
		Remove(t, Host(t).Module)
		Remove(t, "kvm")
	}
	remove()
	t.Cleanup(remove)
	loadKVM(t, "kvm", kvm)
	loadKVM(t, Host(t).Module, vendor)
}

// LoadVendor has a vendor module loaded onto the kvm.ko that is there.
func LoadVendor(t testing.TB, vendor Build) {
	t.Helper()
	loadKVM(t, Host(t).Module, vendor)
}

// built is where a module has been built for this kernel.
func built(t testing.TB, module string, build Build) string {
	t.Helper()
	release := Release(t)
	if strings.Contains(release, "-rt-") || strings.HasSuffix(release, "-debug") {
		t.Skipf("machine: no %s KVM can be built for kernel %s", build, release)
	}
	if build == Other {
		return filepath.Join("../../../build/lab/kvm", release, "kvm-other.ko")
	}
	return filepath.Join("../../../build/kvm-patch", release, strings.ReplaceAll(module, "_", "-")+".ko")
}

func loadKVM(t testing.TB, module string, build Build) {
	t.Helper()
	names := []string{module}
	path := ""
	if build == Patched || build == Other {
		names, path = Host(t).Needs, built(t, module, build)
	}
	if out, err := exec.Command("modprobe", append([]string{"-a"}, names...)...).CombinedOutput(); err != nil {
		t.Fatalf("modprobe %s: %v\n%s", names, err, out)
	}
	if path != "" {
		insert(t, path, "")
	}
}
