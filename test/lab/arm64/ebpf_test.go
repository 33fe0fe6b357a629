// SPDX-License-Identifier: Apache-2.0

//go:build lab

package arm64

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
	"virtexit/internal/source/sourcetest"
	"virtexit/test/lab/guest"
	"virtexit/test/lab/inside"
)

func TestMain(m *testing.M) { inside.Main(m) }

// TestEBPF holds the collector to what all collectors share.
func TestEBPF(t *testing.T) {
	inside.QuietLog(t)
	c := inside.NewEBPF(t)
	sourcetest.Run(t, func() (source.Source, error) { return c.Open() }, inside.Generator{N: 200, Program: program})
}

// program has a guest make exits of a kind.
func program(kind sourcetest.Kind, n int) string {
	const end = 1 // the write that a program ends with
	switch kind {
	case sourcetest.CPUID:
		return fmt.Sprintf("sys:%d", n)
	case sourcetest.IO:
		return fmt.Sprintf("mmio:0x80000:%d", n-end)
	case sourcetest.HLT:
		return fmt.Sprintf("wfi:%d", n)
	case sourcetest.Hypercall:
		return fmt.Sprintf("hvc:%d", n)
	case sourcetest.MSR:
		return fmt.Sprintf("smc:%d", n)
	}
	return ""
}

// TestNames has each exit under the kernel's name, and as many in all as KVM itself says.
func TestNames(t *testing.T) {
	src := open(t)
	vm, err := guest.NewVM(1)
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	p, err := guest.Parse("sys:30,hvc:0x86000000:40,hvc:50,smc:60,wfi:7,mmio:0x80000:80,spin:1000000")
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.VCPUs[0].Run(p); err != nil {
		t.Fatal(err)
	}
	slot := only(t, src)
	if slot.ISA != exitreason.ARM64 || slot.VCPU != 0 || slot.TID != vm.VCPUs[0].TID() {
		t.Errorf("isa %v, vcpu %d, thread %d, want %d", slot.ISA, slot.VCPU, slot.TID, vm.VCPUs[0].TID())
	}
	got := map[string]uint64{}
	for _, r := range slot.Rows {
		name := exitreason.Name(slot.ISA, r.Code)
		t.Logf("%-10s code %#4x count %4d time %12d user %12d", name, r.Code, r.Count, r.Time, r.User)
		got[name] = r.Count
	}
	t.Logf("%+v", slot.Times)
	delete(got, "IRQ") // the host's own
	stats, err := vm.VCPUs[0].Stats()
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]uint64{"SYS64": 30, "HVC64": 90, "SMC64": 60, "WFx": 7, "DABT_LOW": 80, "IABT_LOW": 1}
	want["DABT_LOW"] += max(1, stats["mmio_exit_user"]-80) // with the program's end, or ends
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("exits (-want +got):\n%s", diff)
	}
	if slot.Exits() != stats["exits"] {
		t.Errorf("%d exits, KVM has counted %d", slot.Exits(), stats["exits"])
	}
}

// TestHalt has the time of a halt be that, while it lasts, when it has ended, and when the vCPU dies in it.
func TestHalt(t *testing.T) {
	src := open(t)
	vm, err := guest.NewHaltingVM()
	if err != nil {
		t.Fatal(err)
	}
	closed := false
	defer func() {
		if !closed {
			vm.Close()
		}
	}()
	halted := func(n int) {
		t.Helper()
		inside.Eventually(t, fmt.Sprintf("halt %d", n), 10*time.Second, func() bool {
			stats, err := vm.VCPUs[0].Stats()
			if err != nil {
				t.Fatal(err)
			}
			return stats["wfi_exit_stat"] == uint64(n) && stats["blocking"] == 1
		})
	}
	p, err := guest.Parse("wfi:1")
	if err != nil {
		t.Fatal(err)
	}
	p.Forever = true
	vm.VCPUs[0].Start(p)
	const pause = 500 * time.Millisecond
	var last uint64
	check := func(what string) {
		t.Helper()
		slot := only(t, src)
		t.Logf("%s: %+v", what, slot.Times)
		if slot.Times.Halted < last+uint64(pause*9/10) {
			t.Errorf("%s: halted for %d ns, %d before and then %v more", what, slot.Times.Halted, last, pause)
		}
		last = slot.Times.Halted
	}
	halted(1)
	time.Sleep(pause)
	check("in a halt")
	if err := vm.VCPUs[0].Wake(); err != nil {
		t.Fatal(err)
	}
	halted(2)
	if slot := only(t, src); slot.Times.Halted < last {
		t.Errorf("the halt has ended: halted for %d ns, %d before", slot.Times.Halted, last)
	}
	time.Sleep(pause)
	check("in another")
	time.Sleep(pause)
	if err := src.SetLevel(snapshot.Off); err != nil {
		t.Fatal(err)
	}
	check("retired")
	if slot := only(t, src); !slot.Retired {
		t.Error("the slot has not retired")
	}
	closed = true
	vm.VCPUs[0].Stop()
	if err := vm.VCPUs[0].Wait(); err != nil {
		t.Error(err)
	}
	if err := vm.Close(); err != nil {
		t.Error(err)
	}
}

func open(t *testing.T) source.Source {
	t.Helper()
	src, err := inside.NewEBPF(t).Open()
	if err != nil {
		t.Fatal(err)
	}
	if err := src.SetLevel(snapshot.Time); err != nil {
		t.Fatal(err)
	}
	return src
}

// only is the one slot in use.
func only(t *testing.T, src source.Source) *snapshot.Slot {
	t.Helper()
	all, err := src.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if len(all.Slots) != 1 || all.Unattributed != 0 || all.Refused != 0 {
		t.Fatalf("%d slots, %d unattributed, %d refused", len(all.Slots), all.Unattributed, all.Refused)
	}
	return &all.Slots[0]
}
