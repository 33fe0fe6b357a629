// SPDX-License-Identifier: Apache-2.0

//go:build lab

package kernel

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/test/lab/inside"
)

// TestOtherISA is a KVM that is neither Intel's nor AMD's. Its exits are counted under the ISA that it tells, by number.
func TestOtherISA(t *testing.T) {
	if inside.Host(t).ISA != exitreason.SVM {
		t.Skip("machine: the KVM of another ISA needs SVM")
	}
	inside.Load(t, "")
	inside.ExchangeKVM(t, inside.Stock, inside.Other)

	module := open(t, snapshot.Time)
	info, err := module.Info()
	if err != nil {
		t.Fatal(err)
	}
	if !info.KVM || info.Level != snapshot.Off || !strings.HasPrefix(info.Refused, "no vendor module is loaded whose exits are known") {
		t.Errorf("the module: %+v", info)
	}

	s, err := inside.NewEBPF(t).Open()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.SetLevel(snapshot.Count); err != nil {
		t.Fatal(err)
	}
	if info, err = s.Info(); err != nil || info.Refused != "" || info.Hook != "tracepoint" || info.ISA != exitreason.None {
		t.Fatalf("before the first exit: %+v, %v", info, err)
	}
	vm := newVM(t, 2)
	codes := inside.Host(t).Codes
	want := map[uint32]uint64{}
	for _, level := range []snapshot.Level{snapshot.Count, snapshot.Time} {
		if err := s.SetLevel(level); err != nil {
			t.Fatal(err)
		}
		const n = 5000
		run(t, vm.VCPUs[0], fmt.Sprintf("cpuid:%d,rdmsr:0x1b:%d,hlt:%d", n, n/10, n/50))
		run(t, vm.VCPUs[1], fmt.Sprintf("cpuid:%d", n/100))
		want[codes["cpuid"]] += n
		want[codes["rdmsr"]] += n / 10
		snap := snap(t, s)
		if snap.Refused != 0 || snap.Unattributed != 0 {
			t.Errorf("level %v: %d exits refused, %d unattributed", level, snap.Refused, snap.Unattributed)
		}
		stats, err := vm.VCPUs[0].Stats()
		if err != nil {
			t.Fatal(err)
		}
		got := counts(snap, vm.VCPUs[0].TID())
		if total(got) != stats["exits"] {
			t.Errorf("level %v: %d exits, KVM says %d", level, total(got), stats["exits"])
		}
		for code, n := range want {
			if got[code] != n {
				t.Errorf("level %v: %d exits of code %#x, want %d", level, got[code], code, n)
			}
		}
		var slots []string
		for _, slot := range snap.Slots {
			slots = append(slots, fmt.Sprintf("vcpu %d, %v", slot.VCPU, slot.ISA))
		}
		if diff := cmp.Diff([]string{"vcpu 0, isa77", "vcpu 1, isa77"}, slots); diff != "" {
			t.Errorf("level %v: slots (-want +got):\n%s", level, diff)
		}
	}
	for _, slot := range snap(t, s).Slots {
		if slot.VCPU != 0 {
			continue
		}
		for _, r := range slot.Rows {
			if name := exitreason.Name(slot.ISA, r.Code); name != fmt.Sprintf("%#x", r.Code) {
				t.Errorf("code %#x is called %q", r.Code, name)
			}
			if r.Code == codes["cpuid"] && (r.Timed() != 5000 || r.Time == 0 || r.Max == 0) {
				t.Errorf("by CPUID %+v, want 5000 that are timed", r)
			}
		}
		if slot.Times.Guest == 0 || slot.Times.KVM == 0 || slot.Times.Halted+slot.Times.Poll == 0 {
			t.Errorf("times %+v", slot.Times)
		}
	}
	if info, err = s.Info(); err != nil || info.ISA != inside.OtherISA {
		t.Errorf("after: %+v, %v", info, err)
	}
}
