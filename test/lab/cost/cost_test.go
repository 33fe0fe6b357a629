//go:build lab

// SPDX-License-Identifier: Apache-2.0

package cost

import (
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtexit/internal/source"
	"virtexit/internal/source/kmod"
	"virtexit/test/lab/guest"
)

// perExit is the least number of instructions, host's and guest's, that a
// CPUID exit and the entry after it take. Two lengths of a program tell the
// exits from what is around them; the least of many runs has no interrupt in it.
func perExit(t *testing.T, v *guest.VCPU) float64 {
	t.Helper()
	least := func(n uint32) uint64 {
		p := guest.Program{Ops: []guest.Op{guest.CPUID(0, n)}}
		best := uint64(math.MaxUint64)
		for range 40 {
			start := tsc()
			if err := v.Run(p); err != nil {
				t.Fatal(err)
			}
			best = min(best, tsc()-start)
		}
		return best
	}
	const short, long = 100, 600
	return float64(least(long)-least(short)) / (long - short)
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
	debug.SetGCPercent(-1)
	time.Sleep(8 * time.Second) // what starts with the system has settled

	vm, err := guest.NewVM(1)
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	v := vm.VCPUs[0]
	perExit(t, v)
	nothing := perExit(t, v)
	t.Logf("nothing attached: %.1f instructions per CPUID exit", nothing)
	if again := perExit(t, v); again != nothing {
		t.Fatalf("the measure is not repeatable: %.3f, then %.3f", nothing, again)
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
		t.Errorf("loaded and off: %+.3f instructions, want none", off-nothing)
	}

	s, err := kmod.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, step := range []struct {
		level  source.Level
		budget float64
	}{{source.Count, 44}, {source.Time, 120}, {source.Off, 0}} {
		if err := s.SetLevel(step.level); err != nil {
			t.Fatal(err)
		}
		added := perExit(t, v) - nothing
		t.Logf("level %d: %+.1f instructions, budget %.0f", step.level, added, step.budget)
		if added > step.budget {
			t.Errorf("level %d: %+.3f instructions per exit, budget %.0f", step.level, added, step.budget)
		}
	}
}
