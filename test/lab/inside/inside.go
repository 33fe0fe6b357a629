// SPDX-License-Identifier: Apache-2.0

// Package inside is what tests that run in the lab's machine share. They run
// as root in a package folder three levels below the module's root, next to
// the modules in build/kmod and build/kvm-patch.
package inside

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtexit/internal/exitreason"
	"virtexit/test/lab/guest"
)

// Vendor is what differs between CPUs.
type Vendor struct {
	Module string   // KVM's
	Needs  []string // modules that it and kvm.ko need
	ISA    exitreason.ISA
	Codes  map[string]uint32 // op of a guest program -> exit code
}

// Host is this CPU's.
func Host(t testing.TB) Vendor {
	t.Helper()
	v, err := guest.HostVendor()
	if err != nil {
		t.Fatal(err)
	}
	if v == guest.Intel {
		return Vendor{"kvm_intel", []string{"irqbypass"}, exitreason.VMX, map[string]uint32{
			"cpuid": 10, "io": 30, "hlt": 12, "hypercall": 18, "rdmsr": 31, "mmio": 48}}
	}
	return Vendor{"kvm_amd", []string{"irqbypass", "ccp"}, exitreason.SVM, map[string]uint32{
		"cpuid": 0x72, "io": 0x7b, "hlt": 0x78, "hypercall": 0x81, "rdmsr": 0x7c, "mmio": 0x400}}
}

// Release is the running kernel's.
func Release(t testing.TB) string {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	return unix.ByteSliceToString(u.Release[:])
}

// Load has virtexit.ko loaded anew with the given parameters, and KVM, until
// the test ends.
func Load(t testing.TB, params string) {
	t.Helper()
	LoadKVM(t)
	Remove(t, "virtexit")
	Insert(t, params)
	t.Cleanup(func() { Remove(t, "virtexit") })
}

// Insert loads virtexit.ko; one that is there already is left alone.
func Insert(t testing.TB, params string) {
	t.Helper()
	insert(t, filepath.Join("../../../build/kmod", Release(t), "virtexit.ko"), params)
}

func insert(t testing.TB, path, params string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), params, 0); err != nil && !errors.Is(err, unix.EEXIST) {
		t.Fatalf("load %s %s: %v", path, params, err)
	}
}

// Remove unloads a module; one that is not there is as good.
func Remove(t testing.TB, name string) {
	t.Helper()
	var err error
	// Who closed the device last may still be on its way out.
	for range 50 {
		if err = unix.DeleteModule(name, unix.O_NONBLOCK); !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		t.Fatalf("unload %s: %v", name, err)
	}
}

// Eventually waits for what happens in its own time, and tells how long it took. It gives up long after the time within which
// that happens on a machine that has its CPUs for itself: not to wait for ever.
func Eventually(t testing.TB, what string, within time.Duration, ok func() bool) time.Duration {
	t.Helper()
	within *= 6
	start := time.Now()
	for time.Since(start) < within {
		if ok() {
			return time.Since(start)
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("not within %v: %s", within, what)
	return 0
}
