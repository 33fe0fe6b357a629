// SPDX-License-Identifier: Apache-2.0

//go:build lab

package kernel

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	bpf "github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
	"virtexit/test/lab/inside"
)

// TestBoth has both collectors count the same exits of the same guests. Counts
// are the same, and times within 2 % of each part. But one collector reads the
// clock when the other's probes have run, at each event, so that times of many
// short exits differ by what these take. That is measured as they run: see bracket.
// Which collector comes first at an event decides whose probes the other measures.
func TestBoth(t *testing.T) {
	patched := os.Getenv(inside.KVMVar) == string(inside.Patched)
	for _, first := range []string{"module", "eBPF"} {
		if first == "module" && patched {
			continue // its hook is before kvm_exit and after kvm_entry: it has all probes in its times, and counts alone are compared
		}
		t.Run(first+" first", func(t *testing.T) {
			inside.Load(t, "")
			probes := newBracket(t)
			var module, other source.Source
			attach := []func(){
				func() { module = open(t, snapshot.Time) },
				func() {
					s, err := inside.NewEBPF(t).Open()
					if err != nil {
						t.Fatal(err)
					}
					if err := s.SetLevel(snapshot.Time); err != nil {
						t.Fatal(err)
					}
					other = s
				},
			}
			if first == "eBPF" {
				attach[0], attach[1] = attach[1], attach[0]
			}
			probes.attach(t, probes.begin)
			attach[0]()
			probes.attach(t, probes.end)
			attach[1]()
			probes.attach(t, probes.sum)
			// An emulated CPU that stands still between the two readings says nothing
			// of either: it does not do so each time.
			var apart []string
			for range 4 {
				if apart = compare(t, module, other, probes, first, patched); len(apart) == 0 || t.Failed() {
					return
				}
			}
			t.Error(strings.Join(apart, "; "))
		})
	}
}

// compare runs guests, and tells which of their times are too far apart.
func compare(t *testing.T, module, other source.Source, probes *bracket, first string, patched bool) (apart []string) {
	short, spin := 10_000, 60_000_000
	if inside.Host(t).ISA == exitreason.VMX {
		short, spin = 100, 1_000_000
	}
	g, err := inside.StartGuest(2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	for vcpu := range 2 {
		probes.watch(t, g.TID(vcpu))
	}
	errs := make(chan error)
	go func() { // long: in the guest, and out of KVM_RUN with its last exit
		for range 5 {
			if err := g.Run(0, fmt.Sprintf("spin:%d,hlt:5,out:0x80:5", spin)); err != nil {
				errs <- err
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		errs <- nil
	}()
	clocks := uint64(0)
	if inside.Host(t).ISA == exitreason.SVM && strings.HasPrefix(inside.Release(t), "6.1.") {
		clocks = uint64(pairing(t)) // kvm_exit is late: eBPF has the exit's time from another clock
	}
	took := make(map[string]spent) // by reason
	go func() {
		for reason, op := range map[string]string{"cpuid": "cpuid:%d", "msr": "rdmsr:0x1b:%d", "hypercall": "hypercall:%d", "io": "out:0x80:%d"} {
			before := probes.took(t, g.TID(1))
			if err := g.Run(1, fmt.Sprintf(op, short)); err != nil {
				errs <- err
				return
			}
			took[reason] = probes.took(t, g.TID(1)).since(before)
		}
		errs <- nil
	}()
	for range 2 {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	all := [2]spent{probes.took(t, g.TID(0)), probes.took(t, g.TID(1))}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}

	clock, err := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
	if err != nil {
		t.Fatal(err)
	}
	if strings.TrimSpace(string(clock)) != "tsc" {
		t.Fatalf("the kernel's clock is %s: the TSC runs apart from it", clock)
	}
	one, two := final(t, module, g.TGID()), final(t, other, g.TGID())
	for vcpu := range 2 {
		a, b := one[vcpu], two[vcpu]
		if a.TID != b.TID || a.Start != b.Start || a.Process != b.Process || a.Comm != b.Comm || a.ISA != b.ISA {
			t.Errorf("vcpu %d: %+v and %+v are not the same thread", vcpu, a, b)
		}
		if len(a.Rows) != len(b.Rows) {
			t.Errorf("vcpu %d: %d reasons and %d", vcpu, len(a.Rows), len(b.Rows))
			continue
		}
		total, exits := a.Times.Total(), a.Exits()
		// The second one's time, of so many exits, may be so much less or more.
		near := func(what string, a, b, exits, less, more uint64) {
			if patched || max(a, b) < total/100 {
				return
			}
			diff, slack := int64(b-a), max(a, b)/50
			if first == "eBPF" {
				diff = -diff
			}
			less, more = less+exits*clocks, more+exits*clocks
			percent := func(n int64) float64 { return 100 * float64(n) / float64(max(a, b)) }
			t.Logf("vcpu %d: %-10s module %12d ns, eBPF %12d ns: %+6.2f %% of %+6.2f %% to %+6.2f %%", vcpu, what, a, b,
				percent(diff), percent(-int64(slack+less)), percent(int64(slack+more)))
			if diff < -int64(slack+less) || diff > int64(slack+more) {
				apart = append(apart, fmt.Sprintf("vcpu %d: %s is %d ns and %d ns", vcpu, what, a, b))
			}
		}
		p := all[vcpu] // little where exits are few, unless an emulated CPU stood still meanwhile
		if vcpu == 1 {
			near("kvm", a.Times.KVM, b.Times.KVM, exits, p.exit, p.entry+p.leave)
		}
		near("total", total, b.Times.Total(), 0, 0, 0)
		near("guest", a.Times.Guest, b.Times.Guest, exits, p.entry, p.exit)
		near("user", a.Times.User, b.Times.User, 0, p.leave, p.entry)
		near("poll", a.Times.Poll, b.Times.Poll, 0, 0, 0)
		near("halted", a.Times.Halted, b.Times.Halted, 0, 0, 0)
		near("wait", a.Times.Wait, b.Times.Wait, 0, 0, 0)
		near("outside", a.Times.Outside, b.Times.Outside, 0, 0, 0)
		for i, row := range a.Rows {
			if row.Code != b.Rows[i].Code || row.Count != b.Rows[i].Count {
				t.Errorf("vcpu %d: %d exits of code %#x and %d of %#x", vcpu, row.Count, row.Code, b.Rows[i].Count, b.Rows[i].Code)
			}
			// The timer's interrupts come in both.
			if reason := exitreason.Name(a.ISA, row.Code); vcpu == 0 && reason == "io" {
				near(reason, row.Time, b.Rows[i].Time, row.Count, p.exit, p.entry)
			} else if p, ok := took[reason]; ok && vcpu == 1 {
				near(reason, row.Time, b.Rows[i].Time, row.Count, p.exit, p.entry)
			}
		}
	}
	return apart
}

// pairing is by how much two clocks may be apart that are said to be read at one
// moment, as slots.Pair does.
func pairing(t *testing.T) time.Duration {
	worst := time.Duration(0)
	for range 16 {
		least := time.Hour
		for range 4 {
			start := time.Now()
			var now unix.Timespec
			if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
				t.Fatal(err)
			}
			least = min(least, time.Since(start))
		}
		worst = max(worst, least)
	}
	return worst / 2
}

// final is the final counts of a process, by vCPU, in nanoseconds.
func final(t *testing.T, src source.Source, tgid int) map[int]snapshot.Slot {
	slots := make(map[int]snapshot.Slot)
	inside.Eventually(t, "both slots to retire", 10*time.Second, func() bool {
		s, err := src.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		retired := 0
		for _, slot := range s.Slots {
			if slot.Process.TGID != tgid || !slot.Retired {
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

// bracket measures what the probes take that are attached between begin and end:
// from where the first of them reads the clock to where one behind end does, since
// begin and end do little else. What that comes to is kept by sum, behind all.
type bracket struct {
	begin, end, sum map[string]*bpf.Program // by event
	sums            map[string]*bpf.Map     // by event: tid to nanoseconds
}

// spent is what the probes of each event took, in nanoseconds.
type spent struct{ exit, leave, entry uint64 }

func (s spent) since(before spent) spent {
	return spent{s.exit - before.exit, s.leave - before.leave, s.entry - before.entry}
}

func newBracket(t *testing.T) *bracket {
	t.Helper()
	newMap := func(spec bpf.MapSpec) *bpf.Map {
		m, err := bpf.NewMap(&spec)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		return m
	}
	newProgram := func(code asm.Instructions) *bpf.Program {
		code = append(code, asm.Mov.Imm(asm.R0, 0).WithSymbol("out"), asm.Return())
		p, err := bpf.NewProgram(&bpf.ProgramSpec{Type: bpf.RawTracepoint, Instructions: code, License: "GPL"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		return p
	}
	// lookup leaves in R0 where the value is whose key is on the stack.
	lookup := func(m *bpf.Map) asm.Instructions {
		return asm.Instructions{
			asm.LoadMapPtr(asm.R1, m.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "out"),
		}
	}
	b := &bracket{
		begin: make(map[string]*bpf.Program), end: make(map[string]*bpf.Program), sum: make(map[string]*bpf.Program),
		sums: make(map[string]*bpf.Map),
	}
	// Probes of an event run in a row, on one CPU.
	times := newMap(bpf.MapSpec{Type: bpf.PerCPUArray, KeySize: 4, ValueSize: 16, MaxEntries: 3})
	for i, event := range []string{"kvm_exit", "kvm_userspace_exit", "kvm_entry"} {
		here := append(asm.Instructions{asm.StoreImm(asm.RFP, -4, int64(i), asm.Word)}, lookup(times)...)
		stamp := func(offset int16) *bpf.Program {
			return newProgram(slices.Concat(here, asm.Instructions{
				asm.Mov.Reg(asm.R6, asm.R0),
				asm.FnKtimeGetNs.Call(),
				asm.StoreMem(asm.R6, offset, asm.R0, asm.DWord),
			}))
		}
		b.begin[event], b.end[event] = stamp(0), stamp(8)
		b.sums[event] = newMap(bpf.MapSpec{Type: bpf.Hash, KeySize: 4, ValueSize: 8, MaxEntries: 16})
		b.sum[event] = newProgram(slices.Concat(here, asm.Instructions{
			asm.LoadMem(asm.R6, asm.R0, 8, asm.DWord),
			asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
			asm.Sub.Reg(asm.R6, asm.R1),
			asm.FnGetCurrentPidTgid.Call(),
			asm.StoreMem(asm.RFP, -4, asm.R0, asm.Word),
		}, lookup(b.sums[event]), asm.Instructions{
			asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
			asm.Add.Reg(asm.R1, asm.R6),
			asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		}))
	}
	return b
}

// attach puts programs behind all probes that are there.
func (b *bracket) attach(t *testing.T, programs map[string]*bpf.Program) {
	t.Helper()
	for event, p := range programs {
		l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: event, Program: p})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
}

// watch has a thread be measured.
func (b *bracket) watch(t *testing.T, tid int) {
	t.Helper()
	for _, sums := range b.sums {
		if err := sums.Put(uint32(tid), uint64(0)); err != nil {
			t.Fatal(err)
		}
	}
}

// took tells what probes have taken of a thread since it is watched.
func (b *bracket) took(t *testing.T, tid int) (s spent) {
	t.Helper()
	for event, ns := range map[string]*uint64{"kvm_exit": &s.exit, "kvm_userspace_exit": &s.leave, "kvm_entry": &s.entry} {
		if err := b.sums[event].Lookup(uint32(tid), ns); err != nil {
			t.Error(err)
		}
	}
	return s
}
