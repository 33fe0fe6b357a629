// SPDX-License-Identifier: Apache-2.0

//go:build lab

package kernel

import (
	"testing"
	"time"

	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
	"virtexit/internal/source/ebpf"
	"virtexit/test/lab/inside"
)

// TestBoth has both collectors count the same exits of the same guests: counts
// are the same, and of each vCPU's time no more than 2 % is told otherwise. Each
// has the other's probes in what it measures, so that short exits differ by more
// than that of their own time.
func TestBoth(t *testing.T) {
	inside.Load(t, "")
	one := open(t, snapshot.Time)
	two, err := newCollector(t, ebpf.Options{}).Open()
	if err != nil {
		t.Fatal(err)
	}
	if err := two.SetLevel(snapshot.Time); err != nil {
		t.Fatal(err)
	}
	exits := "5000"
	if inside.Host(t).ISA == exitreason.VMX {
		exits = "100"
	}
	g, err := inside.StartGuest(2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	programs := []string{"cpuid:" + exits + ",spin:30000000,hlt:20,out:0x80:" + exits, "rdmsr:0x1b:" + exits + ",spin:30000000,hypercall:" + exits}
	errs := make(chan error)
	for vcpu, program := range programs {
		go func() { errs <- g.Run(vcpu, program) }()
	}
	for range programs {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}

	// Final counts, in nanoseconds.
	final := func(src source.Source) map[int]snapshot.Slot {
		slots := make(map[int]snapshot.Slot)
		inside.Eventually(t, "both slots to retire", 10*time.Second, func() bool {
			s, err := src.Snapshot()
			if err != nil {
				t.Fatal(err)
			}
			retired := 0
			for _, slot := range s.Slots {
				if slot.Process.TGID != g.TGID() || !slot.Retired {
					continue
				}
				retired++
				ns := func(ticks uint64) uint64 { return snapshot.NS(ticks, s.TickHz) }
				m := &slot.Times
				for _, p := range []*uint64{&m.Guest, &m.KVM, &m.User, &m.Poll, &m.Halted, &m.Wait, &m.Outside} {
					*p = ns(*p)
				}
				for i := range slot.Rows {
					r := &slot.Rows[i]
					r.Time, r.User, r.Max = ns(r.Time), ns(r.User), ns(r.Max)
				}
				slots[slot.VCPU] = slot
			}
			return retired == 2
		})
		return slots
	}
	module, bpf := final(one), final(two)
	for vcpu := range 2 {
		a, b := module[vcpu], bpf[vcpu]
		if a.TID != b.TID || a.Start != b.Start || a.Process != b.Process || a.Comm != b.Comm || a.ISA != b.ISA {
			t.Errorf("vcpu %d: %+v and %+v are not the same thread", vcpu, a, b)
		}
		total := a.Times.Total()
		near := func(what string, a, b uint64) {
			t.Logf("vcpu %d: %-10s kmod %12d ns, ebpf %12d ns: %+.2f %%", vcpu, what, a, b, 100*(float64(b)/float64(max(a, 1))-1))
			if diff := max(a, b) - min(a, b); diff > total/50 {
				t.Errorf("vcpu %d: %s is %d ns and %d ns, more than 2 %% of %d ns apart", vcpu, what, a, b, total)
			}
		}
		near("total", total, b.Times.Total())
		for _, part := range []struct {
			name string
			a, b uint64
		}{
			{"guest", a.Times.Guest, b.Times.Guest}, {"kvm", a.Times.KVM, b.Times.KVM}, {"user", a.Times.User, b.Times.User},
			{"poll", a.Times.Poll, b.Times.Poll}, {"halted", a.Times.Halted, b.Times.Halted}, {"wait", a.Times.Wait, b.Times.Wait},
			{"outside", a.Times.Outside, b.Times.Outside},
		} {
			near(part.name, part.a, part.b)
		}
		if len(a.Rows) != len(b.Rows) {
			t.Errorf("vcpu %d: %d reasons and %d", vcpu, len(a.Rows), len(b.Rows))
			continue
		}
		for i := range a.Rows {
			if a.Rows[i].Code != b.Rows[i].Code || a.Rows[i].Count != b.Rows[i].Count {
				t.Errorf("vcpu %d: %d exits of code %#x and %d of %#x", vcpu, a.Rows[i].Count, a.Rows[i].Code, b.Rows[i].Count, b.Rows[i].Code)
			}
			near(exitreason.Name(a.ISA, a.Rows[i].Code), a.Rows[i].Time, b.Rows[i].Time)
		}
	}
}
