// SPDX-License-Identifier: Apache-2.0

// Package sourcetest is what each live source must pass, with real guests.
package sourcetest

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
)

// Kind is what a guest does to exit.
type Kind int

// The kinds, each of which has an exit reason of its own.
const (
	CPUID     Kind = iota // CPUID; arm64: a read of a system register
	IO                    // IN or OUT; arm64: a write to memory that is not there
	HLT                   // HLT; arm64: WFI
	Hypercall             // VMCALL or VMMCALL; arm64: HVC
	MSR                   // RDMSR; arm64: SMC
)

func (k Kind) String() string { return [...]string{"cpuid", "io", "hlt", "hypercall", "msr"}[k] }

// codes are the exit codes by which the hardware tells the kinds.
var codes = map[exitreason.ISA][]uint32{
	exitreason.VMX:   {CPUID: 10, IO: 30, HLT: 12, Hypercall: 18, MSR: 31},
	exitreason.SVM:   {CPUID: 0x72, IO: 0x7b, HLT: 0x78, Hypercall: 0x81, MSR: 0x7c},
	exitreason.ARM64: {CPUID: 0x18, IO: 0x24, HLT: 0x01, Hypercall: 0x16, MSR: 0x17},
}

// Generator makes guests.
type Generator interface {
	// Exits is how many exits of a kind a test asks for: as many as this machine
	// makes in a second or so, at least 10.
	Exits() int
	// Guest starts a process of its own whose vCPUs, numbered from 0, have a
	// thread each and have not run yet.
	Guest(vcpus int) (Guest, error)
}

// Guest is one guest. Exit is called for several vCPUs at a time.
type Guest interface {
	TGID() int
	TID(vcpu int) int
	// Exit runs the vCPU until it has exited n times for this kind's reason, no
	// more and no less, what it does to come back included. It may exit for
	// other reasons besides. When Exit returns the vCPU does not run.
	Exit(vcpu int, kind Kind, n int) error
	// Close ends the process and returns when it is gone. It may be called again.
	Close() error
}

// patience is how long the kernel may take for what it does in its own time, on a machine that is busy with something else.
const patience = time.Minute

// Run tests a source. Nothing else on the machine may run a guest or hold a
// lease meanwhile. Each call of open makes a new source, which Run closes.
func Run(t *testing.T, open func() (source.Source, error), gen Generator) {
	s := suite{open, gen}
	t.Run("Info", s.info)
	t.Run("Exact", s.exact)
	t.Run("Count", s.count)
	t.Run("Off", s.off)
	t.Run("Pause", s.pause)
	t.Run("Times", s.times)
	t.Run("Recent", s.recent)
	t.Run("ProcessLevel", s.processLevel)
	t.Run("Separate", s.separate)
	t.Run("Conservation", s.conservation)
	t.Run("Release", s.release)
	t.Run("Events", s.events)
	t.Run("Lease", s.lease)
}

type suite struct {
	open func() (source.Source, error)
	gen  Generator
}

// source opens a source at a level, with no slot left from before.
func (s *suite) source(t *testing.T, level snapshot.Level) source.Source {
	t.Helper()
	src := s.another(t)
	await(t, "leases of others to end", func() bool {
		i := info(t, src)
		return i.Leases == 0 && i.Level == snapshot.Off && i.SlotsLive == 0
	})
	release(t, src, retired(snap(t, src)))
	if n := len(snap(t, src).Slots); n != 0 {
		t.Fatalf("%d slots are in use without a lease", n)
	}
	if level != snapshot.Off {
		setLevel(t, src, level)
	}
	return src
}

// another opens a source.
func (s *suite) another(t *testing.T) source.Source {
	t.Helper()
	src, err := s.open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := src.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return src
}

func (s *suite) guest(t *testing.T, vcpus int) Guest {
	t.Helper()
	g, err := s.gen.Guest(vcpus)
	if err != nil {
		t.Fatal(err)
	}
	// A test may have closed it.
	t.Cleanup(func() { g.Close() })
	return g
}

func (s *suite) info(t *testing.T) {
	src := s.source(t, snapshot.Off)
	off := info(t, src)
	if off.Collector == "" || off.Version == "" {
		t.Errorf("collector is %q, version is %q", off.Collector, off.Version)
	}
	if !off.KVM || off.Refused != "" {
		t.Errorf("kvm: %t, refused: %q", off.KVM, off.Refused)
	}
	if off.Hook != "none" || off.SlotsLive != 0 || off.SlotsRetired != 0 {
		t.Errorf("off: hook %q, %d live slots, %d retired", off.Hook, off.SlotsLive, off.SlotsRetired)
	}

	setLevel(t, src, snapshot.Time)
	on := info(t, src)
	if on.Hook == "none" || on.ISA == exitreason.None || on.Leases != 1 {
		t.Errorf("on: hook %q, isa %v, %d leases", on.Hook, on.ISA, on.Leases)
	}
	g := s.guest(t, 2)
	exit(t, g, 0, CPUID, 1)
	exit(t, g, 1, CPUID, 1)
	if n := info(t, src).SlotsLive; n != 2 {
		t.Errorf("%d live slots, want 2", n)
	}
	closeGuest(t, g)
	await(t, "two retired slots", func() bool {
		i := info(t, src)
		return i.SlotsLive == 0 && i.SlotsRetired == 2
	})
	exit(t, s.guest(t, 1), 0, CPUID, 20*s.gen.Exits())
	// On arm64 there are no cycles to tell it in.
	if i := info(t, src); on.ISA != exitreason.ARM64 && (i.ExitCost <= 0 || i.EntryCost <= 0 || i.ExitCost > 1e6 || i.EntryCost > 1e6) {
		t.Errorf("the hook takes %d cycles at an exit, %d at an entry", i.ExitCost, i.EntryCost)
	}
	if i := info(t, src); i.SlotsBacked < 2 || i.SlotsMax < i.SlotsBacked {
		t.Errorf("%d slots have memory, of %d", i.SlotsBacked, i.SlotsMax)
	}
}

// exact is level Time: each exit is counted and timed.
func (s *suite) exact(t *testing.T) {
	src := s.source(t, snapshot.Time)
	g := s.guest(t, 1)
	n := s.gen.Exits()
	var last snapshot.Slot
	for kind := CPUID; kind <= MSR; kind++ {
		t.Run(kind.String(), func(t *testing.T) {
			var before snapshot.Row
			if last.Rows != nil {
				before = row(&last, kind)
			}
			exit(t, g, 0, kind, n)
			slot := find(t, snap(t, src), g, 0)
			r := row(&slot, kind)
			if got := r.Count - before.Count; got != uint64(n) {
				t.Errorf("%d exits, want %d", got, n)
			}
			delta := r.Sub(before)
			if delta.Time == 0 || delta.Max == 0 || r.Max > r.Time {
				t.Errorf("time %d, maximum %d; in all %d, %d", delta.Time, delta.Max, r.Time, r.Max)
			}
			p50, ok := r.Quantile(0.5)
			p99, _ := r.Quantile(0.99)
			if !ok || p50 == 0 || p50 > p99 || p99 > r.Max {
				t.Errorf("p50 %d, p99 %d, maximum %d", p50, p99, r.Max)
			}
			// All but the last exit have been followed by an entry.
			if timed := timed(&slot); slot.Exits()-timed > 1 {
				t.Errorf("%d of %d exits are timed", timed, slot.Exits())
			}
			if slot.Times.Guest <= last.Times.Guest {
				t.Errorf("guest time went from %d to %d", last.Times.Guest, slot.Times.Guest)
			}
			if last.Rows != nil && slot.ID != last.ID {
				t.Errorf("slot changed from %v to %v", last.ID, slot.ID)
			}
			last = slot
		})
	}
	if last.Retired || last.Start < last.Process.Start || last.Since < last.Start || last.Process.Start == 0 || last.Comm == "" {
		t.Errorf("retired: %t, process %q started at %d, thread at %d, counted since %d",
			last.Retired, last.Comm, last.Process.Start, last.Start, last.Since)
	}
}

// count is level Count: no times, until the level rises.
func (s *suite) count(t *testing.T) {
	src := s.source(t, snapshot.Count)
	g := s.guest(t, 1)
	n := s.gen.Exits()
	exit(t, g, 0, CPUID, n)
	slot := find(t, snap(t, src), g, 0)
	if got := row(&slot, CPUID).Count; got != uint64(n) {
		t.Errorf("%d exits, want %d", got, n)
	}
	if slot.Times != (snapshot.Times{}) || slot.Level != snapshot.Count {
		t.Errorf("level is %v, times are %+v", slot.Level, slot.Times)
	}
	for _, r := range slot.Rows {
		if r.Time != 0 || r.Max != 0 || len(r.Hist) != 0 {
			t.Errorf("code %#x is timed: %+v", r.Code, r)
		}
	}

	setLevel(t, src, snapshot.Time)
	exit(t, g, 0, CPUID, n)
	after := find(t, snap(t, src), g, 0)
	if got := row(&after, CPUID).Count; got != uint64(2*n) {
		t.Errorf("%d exits after the level has risen, want %d", got, 2*n)
	}
	if got := timed(&after); after.ID != slot.ID || after.Exits()-slot.Exits()-got > 1 {
		t.Errorf("slot %v became %v; %d of %d exits since are timed", slot.ID, after.ID, got, after.Exits()-slot.Exits())
	}
}

// off counts nothing and leaves no live slot.
func (s *suite) off(t *testing.T) {
	src := s.source(t, snapshot.Off)
	g := s.guest(t, 1)
	n := s.gen.Exits()
	before := snap(t, src).Exits()
	exit(t, g, 0, CPUID, n)
	if s := snap(t, src); len(s.Slots) != 0 || s.Exits() != before {
		t.Errorf("without a lease %d slots are in use and %d exits counted", len(s.Slots), s.Exits()-before)
	}

	setLevel(t, src, snapshot.Time)
	exit(t, g, 0, CPUID, n)
	setLevel(t, src, snapshot.Off)
	var first snapshot.Slot
	await(t, "the slot to retire", func() bool {
		first = find(t, snap(t, src), g, 0)
		return first.Retired
	})
	if i := info(t, src); i.Hook != "none" || i.Leases != 0 || i.SlotsLive != 0 {
		t.Errorf("off again: hook %q, %d leases, %d live slots", i.Hook, i.Leases, i.SlotsLive)
	}
	exit(t, g, 0, CPUID, n)
	if diff := cmp.Diff(first, find(t, snap(t, src), g, 0)); diff != "" {
		t.Errorf("a retired slot changed (-before +after):\n%s", diff)
	}
	if got := row(&first, CPUID).Count; got != uint64(n) {
		t.Errorf("%d exits, want %d", got, n)
	}

	setLevel(t, src, snapshot.Time)
	exit(t, g, 0, CPUID, n)
	release(t, src, []snapshot.SlotID{first.ID})
	second := find(t, snap(t, src), g, 0)
	if got := row(&second, CPUID).Count; got != uint64(n) || second.Retired || second.ID == first.ID {
		t.Errorf("on again: %d exits, want %d; retired: %t, slot %v after %v", got, n, second.Retired, second.ID, first.ID)
	}
}

// pause keeps the slots and counts nothing.
func (s *suite) pause(t *testing.T) {
	src := s.source(t, snapshot.Time)
	g := s.guest(t, 1)
	n := s.gen.Exits()
	exit(t, g, 0, CPUID, n)
	before := find(t, snap(t, src), g, 0)

	setLevel(t, src, snapshot.Pause)
	if i := info(t, src); i.Hook != "none" || i.Leases != 1 || i.SlotsLive != 1 {
		t.Errorf("paused: hook %q, %d leases, %d live slots", i.Hook, i.Leases, i.SlotsLive)
	}
	paused := snap(t, src)
	exit(t, g, 0, CPUID, n)
	later := snap(t, src)
	slot := find(t, later, g, 0)
	if got := row(&slot, CPUID).Count; got != uint64(n) || slot.ID != before.ID || slot.Retired {
		t.Errorf("paused: %d exits, want %d; slot %v became %v, retired: %t", got, n, before.ID, slot.ID, slot.Retired)
	}
	if was := find(t, paused, g, 0); later.Counted != paused.Counted || slot.Times != was.Times {
		t.Errorf("paused: counted for %d ns more, times went from %+v to %+v", later.Counted-paused.Counted, was.Times, slot.Times)
	}

	setLevel(t, src, snapshot.Time)
	exit(t, g, 0, CPUID, n)
	after := find(t, snap(t, src), g, 0)
	if got := row(&after, CPUID).Count; got != uint64(2*n) || after.ID != before.ID {
		t.Errorf("resumed: %d exits, want %d; slot %v became %v", got, 2*n, before.ID, after.ID)
	}
}

// times make the time that has passed, whatever the vCPU did.
func (s *suite) times(t *testing.T) {
	src := s.source(t, snapshot.Time)
	g := s.guest(t, 1)
	exit(t, g, 0, CPUID, 1)
	type moment struct {
		slot   snapshot.Slot
		tickHz uint64
		early  time.Time
		late   time.Time
	}
	look := func() (m moment) {
		m.early = time.Now()
		all := snap(t, src)
		m.late = time.Now()
		m.slot, m.tickHz = find(t, all, g, 0), all.TickHz
		return m
	}
	first := look()
	for _, step := range []struct {
		name string
		do   func()
	}{
		{"busy", func() { exit(t, g, 0, CPUID, s.gen.Exits()) }},
		{"io", func() { exit(t, g, 0, IO, s.gen.Exits()) }},
		{"halts", func() { exit(t, g, 0, HLT, 10) }},
		{"at rest", func() { time.Sleep(200 * time.Millisecond) }},
	} {
		begin := look()
		step.do()
		end := look()
		for _, from := range []moment{first, begin} {
			sum := time.Duration(snapshot.NS(end.slot.Times.Total()-from.slot.Times.Total(), end.tickHz))
			least, most := end.early.Sub(from.late), end.late.Sub(from.early)
			if sum < least-least/100 || sum > most+most/100 {
				t.Errorf("%s: times make %v, %v to %v have passed: from %+v to %+v", step.name, sum, least, most, from.slot.Times, end.slot.Times)
			}
		}
	}
	for i := range first.slot.Rows {
		if r := &first.slot.Rows[i]; r.User > r.Time {
			t.Errorf("code %#x: %d of %d cycles in user space", r.Code, r.User, r.Time)
		}
	}
}

// recent is level Recent: each of the latest exits.
func (s *suite) recent(t *testing.T) {
	src := s.source(t, snapshot.Recent)
	g := s.guest(t, 1)
	const n = 40
	// The memory for that comes when the vCPU is known.
	var first snapshot.Slot
	await(t, "the exits to be logged", func() bool {
		exit(t, g, 0, MSR, 1)
		first = find(t, snap(t, src), g, 0)
		return first.Level == snapshot.Recent
	})
	begin := bootTime(t)
	exit(t, g, 0, CPUID, n)
	slot := find(t, snap(t, src), g, 0)
	end := bootTime(t)
	if slot.Recent-first.Recent != slot.Exits()-first.Exits() {
		t.Errorf("%d of %d exits are logged", slot.Recent-first.Recent, slot.Exits()-first.Exits())
	}
	if all := recentExits(t, src, slot.ID, 0); uint64(len(all)) != slot.Recent {
		t.Errorf("%d exits, %d are logged", len(all), slot.Recent)
	}
	all := recentExits(t, src, slot.ID, first.Recent)
	if uint64(len(all)) != slot.Recent-first.Recent {
		t.Fatalf("%d exits, %d are logged", len(all), slot.Recent-first.Recent)
	}
	// VMX keeps it where only VMREAD gets at it, and BPF has no such thing.
	hidden := info(t, src).Collector == "ebpf" && slot.ISA == exitreason.VMX
	cpuid := 0
	for i, e := range all {
		if e.Number != slot.Recent-1-uint64(i) {
			t.Fatalf("exit %d has number %d, of %d", i, e.Number, slot.Recent)
		}
		if e.Time < begin || e.Time > end || i > 0 && e.Time > all[i-1].Time {
			t.Errorf("exit %d at %d, not between %d and %d, or after the next one", e.Number, e.Time, begin, end)
		}
		if e.Present && i > 0 || !e.Present && e.Duration == 0 {
			t.Errorf("exit %d took %d, in progress: %t", e.Number, e.Duration, e.Present)
		}
		if i > 0 && e.Time+snapshot.NS(e.Duration, snap(t, src).TickHz) > all[i-1].Time+1000 {
			t.Errorf("exit %d has not ended when the next one occurs", e.Number)
		}
		if e.Code == codes[slot.ISA][CPUID] {
			cpuid++
			if (e.RIP == 0) != hidden {
				t.Errorf("exit %d: instruction pointer %#x; hidden: %t", e.Number, e.RIP, hidden)
			}
		}
	}
	if cpuid != n {
		t.Errorf("%d exits by cpuid, want %d", cpuid, n)
	}
	if some := recentExits(t, src, slot.ID, slot.Recent-5); len(some) != 5 {
		t.Errorf("%d exits, want the latest 5", len(some))
	}

	for range 1000/s.gen.Exits() + 1 { // more than are kept
		exit(t, g, 0, CPUID, s.gen.Exits())
	}
	over := find(t, snap(t, src), g, 0)
	kept := recentExits(t, src, slot.ID, 0)
	if over.Recent-slot.Recent != over.Exits()-slot.Exits() || len(kept) < 100 || uint64(len(kept)) >= over.Recent || kept[0].Number != over.Recent-1 {
		t.Fatalf("%d of %d exits are logged, %d kept", over.Recent, over.Exits(), len(kept))
	}

	// Another level keeps what there is, and adds nothing.
	setLevel(t, src, snapshot.Time)
	exit(t, g, 0, CPUID, 10)
	after := find(t, snap(t, src), g, 0)
	if after.Exits() < over.Exits()+10 || after.Recent > over.Recent+1 {
		t.Errorf("at level time: %d exits since, %d logged", after.Exits()-over.Exits(), after.Recent-over.Recent)
	}
	closeGuest(t, g)
	await(t, "the slot to retire", func() bool { return len(retired(snap(t, src))) == 1 })
	if got := recentExits(t, src, slot.ID, 0); len(got) != len(kept) {
		t.Errorf("%d exits of a retired slot, %d before", len(got), len(kept))
	}
	release(t, src, []snapshot.SlotID{slot.ID})
	if _, err := src.Recent(slot.ID, 0); !errors.Is(err, source.ErrStale) {
		t.Errorf("recent exits of a released slot: error is %v, want %v", err, source.ErrStale)
	}
}

// processLevel sets the level of one of two processes.
func (s *suite) processLevel(t *testing.T) {
	src := s.source(t, snapshot.Count)
	one, two := s.guest(t, 2), s.guest(t, 1)
	n := s.gen.Exits()
	all := func() {
		t.Helper()
		exit(t, one, 0, CPUID, n)
		exit(t, one, 1, CPUID, n)
		exit(t, two, 0, CPUID, n)
	}
	all()
	process := find(t, snap(t, src), one, 0).Process
	set := func(src source.Source, level snapshot.Level) {
		t.Helper()
		if err := src.SetProcessLevel(process, &level); err != nil {
			t.Fatal(err)
		}
	}
	// expect says how many exits there have been, at what level the first process
	// is now, and how many exits of its are logged.
	expect := func(what string, exits int, level snapshot.Level, logged uint64) {
		t.Helper()
		now := snap(t, src)
		for vcpu := range 2 {
			slot := find(t, now, one, vcpu)
			// A pause begins with the first exit that is not counted.
			if got := row(&slot, CPUID).Count; got != uint64(exits) || slot.Level != level || slot.Recent < logged || logged == 0 && slot.Recent != 0 {
				t.Errorf("%s: vcpu %d: %d exits, want %d; level %v, want %v; %d logged, want %d", what, vcpu, got, exits, slot.Level, level, slot.Recent, logged)
			}
		}
		slot := find(t, now, two, 0)
		if slot.Level != snapshot.Count || slot.Recent != 0 || slot.Times != (snapshot.Times{}) {
			t.Errorf("%s: the other process: level %v, %d logged, %+v", what, slot.Level, slot.Recent, slot.Times)
		}
	}
	expect("at first", n, snapshot.Count, 0)
	set(src, snapshot.Recent)
	all()
	expect("recent", 2*n, snapshot.Recent, uint64(n))
	if i := info(t, src); i.Level != snapshot.Recent {
		t.Errorf("the level in force is %v", i.Level)
	}
	set(src, snapshot.Pause)
	all()
	expect("paused", 2*n, snapshot.Pause, uint64(n))
	if err := src.SetProcessLevel(process, nil); err != nil {
		t.Fatal(err)
	}
	all()
	expect("taken back", 3*n, snapshot.Count, uint64(n))
	slot := find(t, snap(t, src), two, 0)
	if got := row(&slot, CPUID).Count; got != uint64(4*n) {
		t.Errorf("the other process: %d exits, want %d", got, 4*n)
	}

	// Of two wishes the higher is in force, and each ends with its source.
	other := s.another(t)
	setLevelOf := func(src source.Source, level snapshot.Level) {
		t.Helper()
		if err := src.SetLevel(level); err != nil {
			t.Fatal(err)
		}
	}
	setLevelOf(other, snapshot.Pause)
	set(other, snapshot.Time)
	all()
	expect("another's wish", 4*n, snapshot.Time, uint64(n))
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	await(t, "the wish to end", func() bool { return info(t, src).Level == snapshot.Count })
	all()
	expect("the other is gone", 5*n, snapshot.Count, uint64(n))

	for _, level := range []snapshot.Level{snapshot.Off, snapshot.Recent + 1} {
		if err := src.SetProcessLevel(process, &level); err == nil {
			t.Errorf("level %v is accepted for a process", level)
		}
	}
	if err := src.SetLevel(snapshot.Recent + 1); err == nil {
		t.Error("an unknown level is accepted")
	}
	setLevel(t, src, snapshot.Off)
	level := snapshot.Time
	if err := src.SetProcessLevel(process, &level); err == nil || errors.Is(err, source.ErrGone) {
		t.Errorf("a level for a process is accepted without one for all: %v", err)
	}
}

// separate runs three vCPUs of two processes at a time.
func (s *suite) separate(t *testing.T) {
	src := s.source(t, snapshot.Time)
	two, one := s.guest(t, 2), s.guest(t, 1)
	n := s.gen.Exits()
	work := []struct {
		Guest
		vcpu int
		n    map[Kind]int
	}{
		{two, 0, map[Kind]int{CPUID: n, Hypercall: n / 5}},
		{two, 1, map[Kind]int{CPUID: n/2 + 1, MSR: n / 5}},
		{one, 0, map[Kind]int{CPUID: n/3 + 2, Hypercall: 3}},
	}
	var all sync.WaitGroup
	for _, w := range work {
		all.Go(func() {
			for kind, n := range w.n {
				if err := w.Exit(w.vcpu, kind, n); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()

	snap := snap(t, src)
	if len(snap.Slots) != len(work) {
		t.Errorf("%d slots, want %d", len(snap.Slots), len(work))
	}
	var slots []snapshot.Slot
	for _, w := range work {
		slot := find(t, snap, w.Guest, w.vcpu)
		for _, kind := range []Kind{CPUID, Hypercall, MSR} {
			if got := row(&slot, kind).Count; got != uint64(w.n[kind]) {
				t.Errorf("process %d, vcpu %d: %d exits by %v, want %d", w.TGID(), w.vcpu, got, kind, w.n[kind])
			}
		}
		slots = append(slots, slot)
	}
	if slots[0].Process != slots[1].Process || slots[0].Process == slots[2].Process {
		t.Errorf("processes are %v, %v and %v, want the first two the same", slots[0].Process, slots[1].Process, slots[2].Process)
	}
}

// conservation reads while a guest runs: no count goes back, none is lost.
func (s *suite) conservation(t *testing.T) {
	src := s.source(t, snapshot.Time)
	g := s.guest(t, 1)
	begin := time.Now()
	first := snap(t, src)
	done := make(chan error, 1)
	go func() { done <- g.Exit(0, CPUID, s.gen.Exits()) }()
	last := first
	for running := true; running; {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		case <-time.After(time.Millisecond):
		}
		now := snap(t, src)
		if now.Exits() < last.Exits() {
			t.Fatalf("exits fell from %d to %d", last.Exits(), now.Exits())
		}
		for i := range last.Slots {
			was := &last.Slots[i]
			j := slices.IndexFunc(now.Slots, func(s snapshot.Slot) bool { return s.ID == was.ID })
			if j < 0 {
				t.Fatalf("slot %v is gone", was.ID)
			}
			if err := grown(was, &now.Slots[j]); err != nil {
				t.Fatal(err)
			}
		}
		last = now
	}
	if counted := time.Duration(last.Counted - first.Counted); counted <= 0 || counted > time.Since(begin) {
		t.Errorf("counted for %v in %v", counted, time.Since(begin))
	}
	if last.Unattributed != first.Unattributed || last.Refused != first.Refused {
		t.Errorf("unattributed went from %d to %d, refused from %d to %d",
			first.Unattributed, last.Unattributed, first.Refused, last.Refused)
	}
	slot := find(t, last, g, 0)
	if got := last.Exits() - first.Exits(); got != slot.Exits() || got < uint64(s.gen.Exits()) {
		t.Errorf("%d exits in all, %d in the guest's slot", got, slot.Exits())
	}
}

// grown compares two copies of a slot, but for its times: a present stretch may
// turn out to be another one than it seemed, as when an emulated CPU rests
// between the exit and the module's telling of it.
func grown(was, is *snapshot.Slot) error {
	if len(is.Rows) < len(was.Rows) {
		return errors.New("a slot has fewer rows than before")
	}
	for i := range was.Rows {
		a, b := &was.Rows[i], &is.Rows[i]
		if a.Code != b.Code || a.Other != b.Other {
			return errors.New("a row changed its code")
		}
		if b.Count < a.Count || b.Time < a.Time || b.User < a.User || b.Max < a.Max {
			return errors.New("a count went back")
		}
		for j := range a.Hist {
			if j >= len(b.Hist) || b.Hist[j] < a.Hist[j] {
				return errors.New("a bucket went back")
			}
		}
	}
	return nil
}

// release ends guests and gives their slots back.
func (s *suite) release(t *testing.T) {
	src := s.source(t, snapshot.Time)
	n := s.gen.Exits()
	alive := s.guest(t, 1)
	exit(t, alive, 0, CPUID, 1)
	live := find(t, snap(t, src), alive, 0)

	g := s.guest(t, 3)
	for vcpu := range 3 {
		exit(t, g, vcpu, CPUID, n/(vcpu+1))
	}
	before := snap(t, src)
	closeGuest(t, g)
	await(t, "the slots of a dead guest to retire", func() bool { return len(retired(snap(t, src))) == 3 })
	after := snap(t, src)
	if after.Exits() != before.Exits() {
		t.Errorf("exits went from %d to %d by the death of a guest at rest", before.Exits(), after.Exits())
	}
	var ids []snapshot.SlotID
	for vcpu := range 3 {
		slot := find(t, after, g, vcpu)
		if got := row(&slot, CPUID).Count; got != uint64(n/(vcpu+1)) || !slot.Retired {
			t.Errorf("vcpu %d: %d exits, want %d; retired: %t", vcpu, got, n/(vcpu+1), slot.Retired)
		}
		ids = append(ids, slot.ID)
	}

	next := func(id snapshot.SlotID) snapshot.SlotID { id.Generation++; return id }
	stale := func(name string, ids ...snapshot.SlotID) {
		t.Helper()
		if err := src.Release(ids); !errors.Is(err, source.ErrStale) {
			t.Errorf("release of %s: error is %v, want %v", name, err, source.ErrStale)
		}
	}
	stale("a live slot", live.ID)
	stale("another generation", next(ids[0]))
	stale("a slot that there is not", snapshot.SlotID{Index: 1 << 30})
	if diff := cmp.Diff(timeless(after), timeless(snap(t, src))); diff != "" {
		t.Errorf("stale references changed something (-before +after):\n%s", diff)
	}

	stale("the second of three", ids[0], next(ids[1]), ids[2])
	if got := retired(snap(t, src)); len(got) != 2 || slices.Contains(got, ids[0]) {
		t.Errorf("retired slots are %v after the release of %v", got, ids[0])
	}
	release(t, src, ids[1:])
	stale("a released slot", ids[1])
	end := snap(t, src)
	if len(end.Slots) != 1 || end.Slots[0].ID != live.ID {
		t.Errorf("slots in use: %+v, want %v alone", end.Slots, live.ID)
	}
	if end.Exits() != after.Exits() {
		t.Errorf("exits went from %d to %d by a release", after.Exits(), end.Exits())
	}
}

// events tells of vCPUs that come and go, and of the level.
func (s *suite) events(t *testing.T) {
	src := s.source(t, snapshot.Off)
	events := src.Events()
	event := func(want source.Event) {
		t.Helper()
		timeout := time.After(patience)
		for {
			select {
			case got, open := <-events:
				if !open {
					t.Fatalf("the channel was closed before %+v came", want)
				}
				if got == want {
					return
				}
				// Guests of tests before this one may be announced yet.
				if got.Process == want.Process && got.Kind == want.Kind && want.Process != 0 {
					t.Errorf("event %+v, want %+v", got, want)
				}
			case <-timeout:
				t.Fatalf("no event %+v within %v", want, patience)
			}
		}
	}
	setLevel(t, src, snapshot.Count)
	event(source.Event{Kind: source.KVMChanged})

	g := s.guest(t, 1)
	exit(t, g, 0, CPUID, 1)
	id := find(t, snap(t, src), g, 0).ID
	vcpu := source.Event{Kind: source.VCPUNew, Slot: id, Process: g.TGID(), TID: g.TID(0)}
	event(vcpu)
	closeGuest(t, g)
	vcpu.Kind = source.VCPURetired
	event(vcpu)

	if err := src.Close(); err != nil {
		t.Fatal(err)
	}
	timeout := time.After(patience)
	for {
		select {
		case _, open := <-events:
			if !open {
				return
			}
		case <-timeout:
			t.Fatalf("the channel is open %v after the source was closed", patience)
		}
	}
}

// lease has two sources wish for levels: the higher one is in force, until its
// source is closed.
func (s *suite) lease(t *testing.T) {
	low := s.source(t, snapshot.Count)
	high := s.another(t)
	setLevel(t, high, snapshot.Time)
	if i := info(t, low); i.Level != snapshot.Time || i.Leases != 2 {
		t.Errorf("level %d, %d leases, want %d and 2", i.Level, i.Leases, snapshot.Time)
	}
	level := func(want snapshot.Level, leases int) {
		t.Helper()
		await(t, "the level to fall", func() bool {
			i := info(t, low)
			return i.Level == want && i.Leases == leases
		})
	}
	if err := high.Close(); err != nil {
		t.Fatal(err)
	}
	level(snapshot.Count, 1)

	g := s.guest(t, 1)
	exit(t, g, 0, CPUID, 1)
	watch := s.another(t)
	if err := low.Close(); err != nil {
		t.Fatal(err)
	}
	low = watch
	level(snapshot.Off, 0)
	await(t, "the slot to retire", func() bool { return find(t, snap(t, watch), g, 0).Retired })
}

func info(t *testing.T, src source.Source) source.Info {
	t.Helper()
	i, err := src.Info()
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func snap(t *testing.T, src source.Source) *snapshot.Snapshot {
	t.Helper()
	s, err := src.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if s.TickHz == 0 {
		t.Fatal("the clock's rate is 0")
	}
	return s
}

func recentExits(t *testing.T, src source.Source, id snapshot.SlotID, from uint64) []snapshot.Exit {
	t.Helper()
	exits, err := src.Recent(id, from)
	if err != nil {
		t.Fatal(err)
	}
	return exits
}

// bootTime is CLOCK_BOOTTIME.
func bootTime(t *testing.T) uint64 {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		t.Fatal(err)
	}
	return uint64(now.Nano())
}

// setLevel asks for a level, which nobody else does, and waits for it.
func setLevel(t *testing.T, src source.Source, level snapshot.Level) {
	t.Helper()
	if err := src.SetLevel(level); err != nil {
		t.Fatal(err)
	}
	await(t, "the level", func() bool { return info(t, src).Level == level })
}

func exit(t *testing.T, g Guest, vcpu int, kind Kind, n int) {
	t.Helper()
	if err := g.Exit(vcpu, kind, n); err != nil {
		t.Fatal(err)
	}
}

// timeless leaves out what passes while nothing happens.
func timeless(s *snapshot.Snapshot) *snapshot.Snapshot {
	c := *s
	c.Counted = 0
	c.Slots = slices.Clone(s.Slots)
	for i := range c.Slots {
		if !c.Slots[i].Retired {
			c.Slots[i].Times = snapshot.Times{}
		}
	}
	return &c
}

func closeGuest(t *testing.T, g Guest) {
	t.Helper()
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}

func release(t *testing.T, src source.Source, ids []snapshot.SlotID) {
	t.Helper()
	if err := src.Release(ids); err != nil {
		t.Fatal(err)
	}
}

// retired are the slots that can be released.
func retired(s *snapshot.Snapshot) []snapshot.SlotID {
	var ids []snapshot.SlotID
	for i := range s.Slots {
		if s.Slots[i].Retired {
			ids = append(ids, s.Slots[i].ID)
		}
	}
	return ids
}

// find returns the one slot of a vCPU.
func find(t *testing.T, s *snapshot.Snapshot, g Guest, vcpu int) snapshot.Slot {
	t.Helper()
	var found []snapshot.Slot
	for _, slot := range s.Slots {
		if slot.Process.TGID == g.TGID() && slot.VCPU == vcpu {
			found = append(found, slot)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d slots for vcpu %d of process %d, want one", len(found), vcpu, g.TGID())
	}
	if found[0].TID != g.TID(vcpu) || codes[found[0].ISA] == nil {
		t.Fatalf("slot is of thread %d and isa %v, want thread %d", found[0].TID, found[0].ISA, g.TID(vcpu))
	}
	return found[0]
}

// row returns a kind's row, which is zero when there was no such exit.
func row(s *snapshot.Slot, kind Kind) snapshot.Row {
	code := codes[s.ISA][kind]
	for _, r := range s.Rows {
		if r.Code == code && !r.Other {
			return r
		}
	}
	return snapshot.Row{Code: code}
}

// timed is the number of exits that are in a histogram.
func timed(s *snapshot.Slot) uint64 {
	var n uint64
	for i := range s.Rows {
		n += s.Rows[i].Timed()
	}
	return n
}

// await polls for what the kernel does in its own time.
func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", patience, what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
