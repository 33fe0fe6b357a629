// SPDX-License-Identifier: Apache-2.0

//go:build lab

package kernel

import (
	"fmt"
	"testing"

	"virtexit/internal/snapshot"
	"virtexit/test/lab/inside"
)

// TestHookFollowsKVM exchanges KVM's modules under a lease. A stock vendor
// module calls no hook, so it is counted by its tracepoints, whatever kvm.ko it
// is on and whatever was there before.
func TestHookFollowsKVM(t *testing.T) {
	inside.Load(t, "")
	s := open(t, snapshot.Count)
	for _, c := range []struct {
		kvm, vendor inside.Build
		hook        string
	}{
		{inside.Patched, inside.Stock, "tracepoint"},
		{inside.Patched, inside.Patched, "patch"},
		{inside.Patched, inside.Stock, "tracepoint"},
		{inside.Stock, inside.Stock, "tracepoint"},
		{inside.Patched, inside.Patched, "patch"},
	} {
		t.Run(fmt.Sprintf("%s kvm, %s vendor module", c.kvm, c.vendor), func(t *testing.T) {
			inside.ExchangeKVM(t, c.kvm, c.vendor)
			vm := newVM(t, 1)
			want := uint64(0)
			for _, level := range []snapshot.Level{snapshot.Count, snapshot.Time} {
				if err := s.SetLevel(level); err != nil {
					t.Fatal(err)
				}
				info, err := s.Info()
				if err != nil {
					t.Fatal(err)
				}
				if info.Hook != c.hook || info.Level != level || info.Refused != "" {
					t.Errorf("hook %q, level %v, refused %q; want %q, %v and no refusal", info.Hook, info.Level, info.Refused, c.hook, level)
				}
				n := scale(t, 1000)
				run(t, vm.VCPUs[0], fmt.Sprintf("cpuid:%d,rdmsr:0x1b:%d", n, n/10))
				want += uint64(n)
				stats, err := vm.VCPUs[0].Stats()
				if err != nil {
					t.Fatal(err)
				}
				got := counts(snap(t, s), vm.VCPUs[0].TID())
				if total(got) != stats["exits"] || got[inside.Host(t).Codes["cpuid"]] != want {
					t.Errorf("level %v: %v exits, want %d by CPUID, and %d in all as KVM says", level, got, want, stats["exits"])
				}
			}
		})
	}
}
