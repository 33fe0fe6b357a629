// SPDX-License-Identifier: Apache-2.0

//go:build lab

package kernel

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/internal/snapshot"
	"virtexit/internal/source"
	"virtexit/internal/source/kmod"
	"virtexit/test/lab/guest"
	"virtexit/test/lab/inside"
)

// slotOf is the live slot of a thread.
func slotOf(t testing.TB, s source.Source, tid int) snapshot.Slot {
	t.Helper()
	sn := snap(t, s)
	i := slices.IndexFunc(sn.Slots, func(slot snapshot.Slot) bool { return slot.TID == tid && !slot.Retired })
	if i < 0 {
		t.Fatalf("thread %d has no slot", tid)
	}
	return sn.Slots[i]
}

// timed is the number of exits in a slot's histograms.
func timed(slot *snapshot.Slot) (n uint64) {
	for i := range slot.Rows {
		for _, h := range slot.Rows[i].Hist {
			n += h
		}
	}
	return n
}

func startGuest(t testing.TB, vcpus int) *inside.Guest {
	t.Helper()
	g, err := inside.StartGuest(vcpus)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

func exit(t testing.TB, g *inside.Guest, program string) {
	t.Helper()
	if err := g.Run(0, program); err != nil {
		t.Fatal(err)
	}
}

func setLevel(t testing.TB, s source.Source, level snapshot.Level) {
	t.Helper()
	if err := s.SetLevel(level); err != nil {
		t.Fatal(err)
	}
}

func setProcessLevel(t testing.TB, s source.Source, p snapshot.Process, level snapshot.Level) {
	t.Helper()
	if err := s.SetProcessLevel(p, &level); err != nil {
		t.Fatalf("level %v: %v", level, err)
	}
}

// The levels of one process change while it and another one run: neither loses an exit, and the other's level stays.
func TestProcessLevelUnderLoad(t *testing.T) {
	inside.Load(t, "")
	inside.QuietLog(t)
	truth := inside.CountExits(t)
	s := open(t, snapshot.Count)
	one, other := startGuest(t, 1), startGuest(t, 1)
	for _, g := range []*inside.Guest{one, other} {
		exit(t, g, "cpuid:1")
	}
	process := slotOf(t, s, one.TID(0)).Process
	n := scale(t, 20_000)
	done := make(chan error, 2)
	for _, g := range []*inside.Guest{one, other} {
		go func() { done <- g.Run(0, fmt.Sprintf("cpuid:%d,out:0x80:%d", n, n/10)) }()
	}
	changes := 0
	for running := 2; running > 0; changes++ {
		level := snapshot.Count + snapshot.Level(rand.IntN(3))
		setProcessLevel(t, s, process, level)
		if changes%10 == 9 {
			if err := s.SetProcessLevel(process, nil); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running--
		case <-time.After(10 * time.Millisecond):
		}
	}
	t.Logf("%d changes of level", changes)
	sn := snap(t, s)
	exits := truth()
	for _, g := range []*inside.Guest{one, other} {
		got := counts(sn, g.TID(0))
		if total(got) != exits[g.TID(0)] || got[inside.Host(t).Codes["cpuid"]] != uint64(n+1) {
			t.Errorf("%v exits, want %d by CPUID, and %d in all", got, n+1, exits[g.TID(0)])
		}
	}
	mixed, plain := slotOf(t, s, one.TID(0)), slotOf(t, s, other.TID(0))
	if timed(&mixed) == 0 || timed(&mixed) >= mixed.Exits() {
		t.Errorf("%d of %d exits of the one process were timed", timed(&mixed), mixed.Exits())
	}
	if timed(&plain) != 0 || plain.Level != snapshot.Count || plain.Times != (snapshot.Times{}) {
		t.Errorf("the other process is at level %v, with %d exits timed, %+v", plain.Level, timed(&plain), plain.Times)
	}
}

// Which level a process is counted at, of two leases' wishes.
func TestProcessLevels(t *testing.T) {
	inside.Load(t, "")
	inside.QuietLog(t)
	a, b := open(t, snapshot.Time), open(t, snapshot.Count)
	g := startGuest(t, 1)
	exit(t, g, "cpuid:1")
	process := slotOf(t, a, g.TID(0)).Process
	wish := func(level snapshot.Level) *snapshot.Level { return &level }
	for _, step := range []struct {
		name string
		do   func() error
		want snapshot.Level
	}{
		{"nothing", func() error { return nil }, snapshot.Time},
		{"the other lease wishes more of it", func() error { return b.SetProcessLevel(process, wish(snapshot.Recent)) }, snapshot.Recent},
		{"and less", func() error { return b.SetProcessLevel(process, wish(snapshot.Pause)) }, snapshot.Time},
		{"so does the first", func() error { return a.SetProcessLevel(process, wish(snapshot.Pause)) }, snapshot.Pause},
		{"which then counts", func() error { return a.SetProcessLevel(process, wish(snapshot.Count)) }, snapshot.Count},
		{"and has more of all others", func() error { return a.SetLevel(snapshot.Recent) }, snapshot.Count},
		{"and takes its wish back", func() error { return a.SetProcessLevel(process, nil) }, snapshot.Recent},
		{"and is off", func() error { return a.SetLevel(snapshot.Off) }, snapshot.Pause},
		{"the other takes its wish back", func() error { return b.SetProcessLevel(process, nil) }, snapshot.Count},
		{"the first is on again, without a wish", func() error { return a.SetLevel(snapshot.Time) }, snapshot.Time},
		{"it wishes for another process", func() error {
			return a.SetProcessLevel(snapshot.Process{TGID: process.TGID, Start: process.Start + 1}, wish(snapshot.Pause))
		}, snapshot.Time},
	} {
		before := slotOf(t, a, g.TID(0))
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		exit(t, g, "cpuid:100")
		slot := slotOf(t, a, g.TID(0))
		counted, recent := slot.Exits()-before.Exits(), slot.Recent-before.Recent
		if step.want == snapshot.Pause {
			if counted != 0 {
				t.Errorf("%s: %d exits counted", step.name, counted)
			}
			continue // the level of the slot changes with the next exit that is counted
		}
		if slot.Level != step.want || counted < 101 || timed(&slot)-timed(&before) > 1 != (step.want >= snapshot.Time) || recent > 0 != (step.want == snapshot.Recent) {
			t.Errorf("%s: level %v, %d exits, %d timed, %d recent; want level %v and 101 exits", step.name, slot.Level, counted, timed(&slot)-timed(&before), recent, step.want)
		}
	}
	for name, err := range map[string]error{
		"off":     a.SetProcessLevel(process, wish(snapshot.Off)),
		"unknown": a.SetProcessLevel(process, wish(snapshot.Recent+1)),
	} {
		if err == nil {
			t.Errorf("level %s was accepted", name)
		}
	}
	setLevel(t, a, snapshot.Off)
	if err := a.SetProcessLevel(process, wish(snapshot.Count)); err == nil {
		t.Error("a wish for a process was accepted without a lease")
	}
}

// A pause keeps the slots, counts nothing and is no time observed.
func TestPause(t *testing.T) {
	inside.Load(t, "")
	inside.QuietLog(t)
	s := open(t, snapshot.Time)
	vm, dying := newVM(t, 1), newVM(t, 1)
	v := vm.VCPUs[0]
	for _, v := range []*guest.VCPU{v, dying.VCPUs[0]} {
		run(t, v, "cpuid:100")
	}
	setLevel(t, s, snapshot.Pause)
	info, err := s.Info()
	if err != nil {
		t.Fatal(err)
	}
	if info.Level != snapshot.Pause || info.Hook != "none" || info.SlotsLive != 2 || info.SlotsRetired != 0 {
		t.Errorf("paused: %+v", info)
	}
	before := snap(t, s)
	run(t, v, "cpuid:100")
	run(t, newVM(t, 1).VCPUs[0], "cpuid:100")
	time.Sleep(200 * time.Millisecond)
	after := snap(t, s)
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("changed in a pause (-before +after):\n%s", diff)
	}
	tid := dying.VCPUs[0].TID()
	if err := dying.Close(); err != nil {
		t.Fatal(err)
	}
	inside.Eventually(t, "a thread that dies in a pause retires", 5*time.Second, func() bool {
		for _, slot := range snap(t, s).Slots {
			if slot.TID == tid {
				return slot.Retired
			}
		}
		return false
	})
	id := slotOf(t, s, v.TID()).ID
	setLevel(t, s, snapshot.Time)
	run(t, v, "cpuid:10")
	slot := slotOf(t, s, v.TID())
	if got := counts(snap(t, s), v.TID())[inside.Host(t).Codes["cpuid"]]; got != 110 || slot.ID != id {
		t.Errorf("after the pause: %d CPUID exits in slot %v, want 110 in %v", got, slot.ID, id)
	}
}

// Collection that is on for a part of the time, while a guest runs.
func TestPauseUnderLoad(t *testing.T) {
	inside.Load(t, "")
	inside.QuietLog(t)
	s := open(t, snapshot.Time)
	v := begun(t, s, newVM(t, 1))
	old := slotOf(t, s, v.TID())
	setLevel(t, s, snapshot.Pause)
	first := snap(t, s)
	var least, most time.Duration // a change takes its time
	v.during(t, "cpuid:100,spin:10000", func() {
		for range 10 {
			ask := bootTime()
			setLevel(t, s, snapshot.Time)
			on := bootTime()
			time.Sleep(100 * time.Millisecond)
			least += bootTime() - on
			setLevel(t, s, snapshot.Pause)
			most += bootTime() - ask
			time.Sleep(30 * time.Millisecond)
		}
	})
	sn := snap(t, s)
	slot := slotOf(t, s, v.TID())
	counted := time.Duration(sn.Counted - first.Counted)
	times := duration(slot.Times.Total()-old.Times.Total(), sn)
	t.Logf("counted for %v, of which %v are known; on for %v to %v", counted, times, least, most)
	if counted < least || counted > most {
		t.Errorf("exits were counted for %v, want %v to %v", counted, least, most)
	}
	if times < least*9/10 || times > counted+counted/100 {
		t.Errorf("%v of time, want %v to %v", times, least, counted)
	}
	if slot.ID != old.ID || slot.Exits() <= old.Exits() || slot.Exits() >= kvmExits(t, v.VCPU) {
		t.Errorf("%d exits in slot %v, after %d in %v; KVM's are %d", slot.Exits(), slot.ID, old.Exits(), old.ID, kvmExits(t, v.VCPU))
	}
}

// logged runs a vCPU until its exits are logged, for which a new slot has no memory yet.
func logged(t testing.TB, s *kmod.Source, v *guest.VCPU) snapshot.Slot {
	t.Helper()
	var slot snapshot.Slot
	inside.Eventually(t, "exits are logged", 5*time.Second, func() bool {
		run(t, v, "cpuid:1")
		slot = slotOf(t, s, v.TID())
		return slot.Recent > 0
	})
	if slot.Level != snapshot.Recent {
		t.Errorf("exits are logged at level %v", slot.Level)
	}
	return slot
}

func recent(t testing.TB, s *kmod.Source, id snapshot.SlotID, from uint64) []snapshot.Exit {
	t.Helper()
	exits, err := s.Recent(id, from)
	if err != nil {
		t.Fatal(err)
	}
	return exits
}

// The latest exits of a program that is known.
func TestRecent(t *testing.T) {
	inside.Load(t, "")
	inside.QuietLog(t)
	codes := inside.Host(t).Codes
	s := open(t, snapshot.Recent)
	v := newVM(t, 1).VCPUs[0]
	old := logged(t, s, v)
	const pause = 20 * time.Millisecond
	v.Handle = func(r guest.Return) error {
		if r == guest.IO {
			sleep(pause)
		}
		return nil
	}
	began := bootTime()
	run(t, v, "cpuid:2,rdmsr:0x1b:1,out:0x80:2,hypercall:1,hlt:1,cpuid:1")
	ended := bootTime()
	slot := slotOf(t, s, v.TID())
	exits := recent(t, s, slot.ID, old.Recent)
	if uint64(len(exits)) != slot.Recent-old.Recent || slot.Recent-old.Recent != slot.Exits()-old.Exits() {
		t.Errorf("%d exits from %d to %d, of %d", len(exits), old.Recent, slot.Recent, slot.Exits()-old.Exits())
	}
	type step struct {
		code  uint32
		moved bool // on, since the last one
	}
	var got []step
	rip := uint64(0)
	slices.Reverse(exits)
	for i, e := range exits {
		if e.Number != old.Recent+uint64(i) {
			t.Errorf("exit %d has number %d", i, e.Number)
		}
		at := time.Duration(e.Time)
		took := duration(e.Duration, snap(t, s))
		if at < began-5*time.Millisecond || at+took > ended+5*time.Millisecond || i > 0 && e.Time < exits[i-1].Time {
			t.Errorf("exit %d was at %v and took %v; the program ran from %v to %v", i, at, took, began, ended)
		}
		if last := i == len(exits)-1; e.Present != last || (e.Duration == 0) != last {
			t.Errorf("exit %d of %d took %v, present: %t", i, len(exits), took, e.Present)
		}
		// The last one ends the program.
		if e.Code == codes["io"] && i < len(exits)-1 && took < pause {
			t.Errorf("exit %d took %v, want %v at least", i, took, pause)
		}
		if slices.Contains([]uint32{codes["cpuid"], codes["rdmsr"], codes["io"], codes["hypercall"], codes["hlt"]}, e.Code) {
			got = append(got, step{e.Code, e.RIP > rip})
			if e.RIP < rip {
				t.Errorf("exit %d: RIP went from %#x to %#x", i, rip, e.RIP)
			}
			rip = e.RIP
		}
	}
	want := []step{
		{codes["cpuid"], true}, {codes["cpuid"], false}, {codes["rdmsr"], true}, {codes["io"], true}, {codes["io"], false},
		{codes["hypercall"], true}, {codes["hlt"], true}, {codes["cpuid"], true}, {codes["io"], true},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(step{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := recent(t, s, slot.ID, slot.Recent); len(got) != 0 {
		t.Errorf("after the last exit: %+v", got)
	}
}

// A reader that follows misses nothing but what it is told of.
func TestRecentOverrun(t *testing.T) {
	inside.Load(t, "")
	inside.QuietLog(t)
	codes := inside.Host(t).Codes
	s := open(t, snapshot.Recent)
	vm := newVM(t, 1)
	v := vm.VCPUs[0]
	old := logged(t, s, v)
	id := old.ID
	n := scale(t, 20_000)
	p, err := guest.Parse(fmt.Sprintf("cpuid:%d", n))
	if err != nil {
		t.Fatal(err)
	}
	next, seen := old.Recent, uint64(0)
	follow := func() {
		t.Helper()
		for i, e := range slices.Backward(recent(t, s, id, next)) {
			if e.Number < next {
				t.Fatalf("%d. latest exit has number %d, from %d", i, e.Number, next)
			}
			next = e.Number + 1
			seen++
			// An interrupt may come before the first instruction, which is at 0.
			if cpuid := e.Code == inside.Host(t).Codes["cpuid"]; e.Code == 0 || cpuid && e.RIP == 0 {
				t.Fatalf("exit %+v", e)
			}
		}
	}
	v.Start(p)
	done := make(chan error)
	go func() { done <- v.Wait() }()
	for running := true; running; {
		follow()
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		default:
		}
	}
	follow()
	slot := slotOf(t, s, v.TID())
	if took, counted := slot.Recent-old.Recent, slot.Exits()-old.Exits(); next != slot.Recent || took != counted {
		t.Errorf("followed up to exit %d of %d; %d logged, %d counted", next, slot.Recent, took, counted)
	}
	t.Logf("%d of %d exits seen", seen, slot.Recent-old.Recent)

	// All at once: a whole ring, and no more.
	exits := recent(t, s, id, 0)
	const ring = 512
	if len(exits) < ring-1 || len(exits) > ring || exits[0].Number != slot.Recent-1 {
		t.Fatalf("%d exits, the latest %d of %d", len(exits), exits[0].Number, slot.Recent)
	}
	cpuid := 0
	for i, e := range exits {
		if e.Number != exits[0].Number-uint64(i) || i > 0 && e.Time > exits[i-1].Time {
			t.Errorf("%d. latest exit has number %d, at %d", i, e.Number, e.Time)
		}
		if e.Code == codes["cpuid"] {
			cpuid++
		}
	}
	if cpuid < ring/2 {
		t.Errorf("%d of the latest exits are for CPUID", cpuid)
	}

	// A thread's latest exits can be read until its slot is released.
	if err := vm.Close(); err != nil {
		t.Fatal(err)
	}
	inside.Eventually(t, "the slot is retired", 5*time.Second, func() bool {
		info, err := s.Info()
		return err == nil && info.SlotsRetired == 1
	})
	if diff := cmp.Diff(exits[0].Number, recent(t, s, id, 0)[0].Number); diff != "" {
		t.Errorf("the latest exit of a thread that has died (-want +got):\n%s", diff)
	}
	if err := s.Release([]snapshot.SlotID{id}); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Recent(id, 0); !errors.Is(err, source.ErrStale) {
		t.Errorf("of a released slot: %d exits, %v; want %v", len(got), err, source.ErrStale)
	}
}
