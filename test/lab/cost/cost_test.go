// SPDX-License-Identifier: Apache-2.0

//go:build lab

package cost

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"virtexit/internal/source"
	"virtexit/internal/source/kmod"
	"virtexit/test/lab/guest"
)

// perExit is the least number of instructions, host's and guest's, that a
// CPUID exit and the entry after it take: the guest reads the counter around
// each of many, most of which no interrupt falls into.
func perExit(t *testing.T, v *guest.VCPU) int {
	t.Helper()
	op := guest.CPUID(0, 3000)
	op.Timed = true
	if err := v.Run(guest.Program{Ops: []guest.Op{op}}); err != nil {
		t.Fatal(err)
	}
	least, err := v.Least()
	if err != nil {
		t.Fatal(err)
	}
	return int(least)
}

func modprobe(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("modprobe", args...).CombinedOutput(); err != nil {
		t.Fatalf("modprobe %q: %v\n%s", args, err, out)
	}
}

// TestCost holds the module to the budgets of its design.
func TestCost(t *testing.T) {
	modprobe(t, "kvm_amd")
	vm, err := guest.NewVM(1)
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	v := vm.VCPUs[0]
	nothing := perExit(t, v)
	t.Logf("nothing attached: %d instructions per CPUID exit", nothing)
	if again := perExit(t, v); again != nothing {
		t.Fatalf("the measure is not repeatable: %d, then %d", nothing, again)
	}

	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	ko, err := os.Open(filepath.Join("../../../build/kmod", unix.ByteSliceToString(u.Release[:]), "virtexit.ko"))
	if err != nil {
		t.Fatal(err)
	}
	defer ko.Close()
	if err := unix.FinitModule(int(ko.Fd()), "", 0); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.DeleteModule("virtexit", 0); err != nil {
			t.Error(err)
		}
	}()
	if off := perExit(t, v); off != nothing {
		t.Errorf("loaded and off: %+d instructions, want none", off-nothing)
	}

	s, err := kmod.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, step := range []struct {
		level  source.Level
		budget int
	}{{source.Count, 44}, {source.Time, 120}, {source.Off, 0}} {
		if err := s.SetLevel(step.level); err != nil {
			t.Fatal(err)
		}
		added := perExit(t, v) - nothing
		t.Logf("level %d: %+d instructions, budget %d", step.level, added, step.budget)
		if added > step.budget {
			t.Errorf("level %d: %+d instructions per exit, budget %d", step.level, added, step.budget)
		}
	}
}
