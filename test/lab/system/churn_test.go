// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"math/rand/v2"
	"testing"
	"time"

	"virtexit/internal/snapshot"
	"virtexit/test/lab/inside"
)

// TestKilledGuests kills guests while they exit. KVM's tracepoint tells how often each did.
func TestKilledGuests(t *testing.T) {
	inside.Load(t, "")
	inside.QuietLog(t)
	d := start(t, options{})
	watch := module(t)
	truth := inside.CountExits(t)
	names := map[string][]int{} // threads of each guest
	for range 20 {
		const vcpus = 2
		g := newGuest(t, vcpus)
		name := nameOf(t, g)
		for vcpu := range vcpus {
			names[name] = append(names[name], g.TID(vcpu))
			run(t, g, vcpu, "cpuid:10") // from now on it is counted
			go g.Run(vcpu, "cpuid:1000000,out:0x80:1000000,hlt:1000000")
		}
		time.Sleep(time.Duration(rand.IntN(500)) * time.Millisecond)
		if err := g.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	inside.Eventually(t, "all slots are released", 20*time.Second, func() bool {
		i := info(t, watch)
		return i.SlotsLive == 0 && i.SlotsRetired == 0
	})
	want, all := truth(), uint64(0)
	for name, tids := range names {
		n := uint64(0)
		for _, tid := range tids {
			n += want[tid]
		}
		all += n
		if got := d.total(name).Count; got != n {
			t.Errorf("%s: %d exits, want %d", name, got, n)
		}
	}
	if s := d.conserve(); s.Exits != all || s.Unattributed != 0 || s.Missed != 0 {
		t.Errorf("%d exits, want %d: %+v", s.Exits, all, s)
	}
}

// TestKVMReload takes KVM's modules from under the daemon, again and again, with guests in between.
func TestKVMReload(t *testing.T) {
	inside.Load(t, "")
	inside.QuietLog(t)
	d := start(t, options{})
	watch := module(t)
	vendor := inside.Host(t).Module
	names := map[string]uint64{}
	for round := range 4 {
		g := newGuest(t, 1)
		name := nameOf(t, g)
		names[name] = uint64(1000 + round)
		run(t, g, 0, "cpuid:1000,hypercall:7")
		for range round {
			run(t, g, 0, "cpuid:1")
		}
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		inside.Remove(t, vendor)
		if round%2 == 0 {
			inside.Remove(t, "kvm")
		}
		if i := info(t, watch); i.Level != snapshot.Off {
			t.Errorf("round %d, without KVM: %+v", round, i)
		}
		d.conserve()
		inside.LoadKVM(t)
		inside.Eventually(t, "KVM's return is noticed", 10*time.Second, func() bool {
			return info(t, watch).Level == snapshot.Time && d.status().Level == "time"
		})
	}
	for name, want := range names {
		got := counts(d.total(name))
		if got["cpuid"] != want || got["hypercall"] != 7 {
			t.Errorf("%s: %v, want %d by cpuid, 7 by hypercall", name, got, want)
		}
	}
	d.conserve()
	inside.Eventually(t, "retired slots are released", 10*time.Second, func() bool { return info(t, watch).SlotsRetired == 0 })
}
