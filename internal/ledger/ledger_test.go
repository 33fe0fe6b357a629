// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
)

const second = uint64(time.Second)

var forever = Retention{Age: math.MaxInt64, Count: math.MaxInt}

// slot makes a slot of process 100*index with vCPU index, whose only row is
// that of CPUID.
func slot(index, generation uint32, count uint64) snapshot.Slot {
	return snapshot.Slot{
		ID:      snapshot.SlotID{Index: index, Generation: generation},
		Process: snapshot.Process{TGID: 100 * int(index), Start: 1e7},
		Comm:    "qemu",
		TID:     int(100*index + generation),
		VCPU:    int(index),
		ISA:     exitreason.SVM,
		Since:   uint64(generation) * second,
		Level:   snapshot.Time,
		Times:   snapshot.Times{Guest: 1000 * count, KVM: 10 * count},
		Rows:    []snapshot.Row{row(0x72, count)},
	}
}

func row(code uint32, count uint64) snapshot.Row {
	r := snapshot.Row{Code: code, Count: count, Time: 10 * count, Max: min(count, 1) * 10}
	r.Hist = snapshot.NewHist([]uint64{count})
	return r
}

func retired(s snapshot.Slot) snapshot.Slot {
	s.Retired = true
	return s
}

func apply(t *testing.T, l *Ledger, now uint64, s snapshot.Snapshot) []snapshot.SlotID {
	t.Helper()
	release, err := l.Apply(&s, now)
	if err != nil {
		t.Fatal(err)
	}
	return release
}

func TestTotals(t *testing.T) {
	l := New(forever)
	two := slot(1, 2, 5)
	two.TID, two.VCPU, two.Level = 103, 7, snapshot.Recent
	two.Rows = append(two.Rows, row(0x7b, 3), snapshot.Row{Code: 9, Other: true, Count: 1})
	three := retired(slot(1, 3, 4)) // vCPU 1 again, another thread: it was unplugged and came back
	three.ISA = math.MaxUint32
	apply(t, l, 10*second, snapshot.Snapshot{Counted: 7 * second, Slots: []snapshot.Slot{slot(1, 1, 2), two}})
	release := apply(t, l, 11*second, snapshot.Snapshot{Counted: 8 * second, Slots: []snapshot.Slot{retired(slot(1, 1, 20)), two, three}})
	if diff := cmp.Diff([]snapshot.SlotID{{Index: 1, Generation: 1}, {Index: 1, Generation: 3}}, release); diff != "" {
		t.Errorf("release (-want +got)\n%s", diff)
	}
	p := snapshot.Process{TGID: 100, Start: 1e7}
	other := snapshot.Row{Code: 9, Other: true, Count: 1}
	want := &Total{
		Process: p, Comm: "qemu", Since: 1 * second, Seen: 11 * second, Wall: 10 * second, Span: 8 * second, Live: true, Level: snapshot.Recent, Exits: 33,
		Times: snapshot.Times{Guest: 29000, KVM: 290},
		VCPUs: []VCPU{
			{ID: 1, TID: 103, Exits: 24, Times: snapshot.Times{Guest: 24000, KVM: 240}},
			{ID: 7, TID: 103, Exits: 9, Times: snapshot.Times{Guest: 5000, KVM: 50}},
		},
		Rows: []Row{
			{exitreason.SVM, row(0x72, 25)},
			{exitreason.SVM, row(0x7b, 3)},
			{exitreason.SVM, other},
			{math.MaxUint32, row(0x72, 4)},
		},
	}
	opts := cmp.Options{cmpopts.IgnoreUnexported(VCPU{}), cmpopts.SortSlices(func(a, b Row) bool {
		return fmt.Sprint(a.ISA, a.Other, a.Code) < fmt.Sprint(b.ISA, b.Other, b.Code)
	})}
	got := l.View().Processes[p]
	if diff := cmp.Diff(want, got, opts); diff != "" {
		t.Errorf("total (-want +got)\n%s", diff)
	}

	old := l.View()
	two.Rows = []snapshot.Row{two.Rows[0], row(0x7b, 4), other}
	two.Times = snapshot.Times{Guest: 4990, KVM: 60, User: 7} // the present stretch was not in the guest
	apply(t, l, 13*second, snapshot.Snapshot{Counted: 9 * second, Released: 24, Slots: []snapshot.Slot{two}})
	want = &Total{
		Process: p, Comm: "qemu", Since: 1 * second, Seen: 13 * second, Wall: 2 * second, Span: 1 * second, Live: true, Level: snapshot.Recent, Exits: 1,
		Times: snapshot.Times{KVM: 10, User: 7},
		VCPUs: []VCPU{{ID: 1, TID: 103}, {ID: 7, TID: 103, Exits: 1, Times: snapshot.Times{KVM: 10, User: 7}}},
		Rows:  []Row{{exitreason.SVM, row(0x7b, 1)}},
	}
	if diff := cmp.Diff(want, l.View().Processes[p].Sub(old.Processes[p]), opts); diff != "" {
		t.Errorf("difference (-want +got)\n%s", diff)
	}
	if diff := cmp.Diff(got, old.Processes[p], opts); diff != "" {
		t.Errorf("the old view has changed (-want +got)\n%s", diff)
	}
}

func TestSpan(t *testing.T) {
	off := snapshot.Snapshot{Released: 1}
	snap := func(counted uint64, slots ...snapshot.Slot) snapshot.Snapshot {
		return snapshot.Snapshot{Counted: counted * second, Slots: slots}
	}
	again := func(counted uint64, slots ...snapshot.Slot) snapshot.Snapshot {
		s := snap(counted, slots...)
		s.Released = 1
		return s
	}
	off.Counted = 5 * second
	level := func(l snapshot.Level) snapshot.Slot {
		s := slot(1, 1, 1)
		s.Level = l
		return s
	}
	type step struct {
		now, wall, span uint64 // seconds
		snap            snapshot.Snapshot
		reopen          bool
	}
	for _, tc := range []struct {
		name  string
		steps []step
	}{
		{"off and on again", []step{
			{now: 3, wall: 2, span: 2, snap: snap(2, slot(1, 1, 1))},
			{now: 4, wall: 3, span: 3, snap: snap(3, slot(1, 1, 1))},
			{now: 6, wall: 5, span: 5, snap: snap(5, retired(slot(1, 1, 1)))},
			{now: 20, wall: 5, span: 5, snap: off},
			{now: 22, wall: 7, span: 6, snap: again(6, slot(1, 20, 1))},
			{now: 23, wall: 8, span: 7, snap: again(7, slot(1, 20, 1))},
		}},
		{"paused now and then", []step{
			{now: 3, wall: 2, span: 1, snap: snap(1, slot(1, 1, 1))},
			{now: 5, wall: 4, span: 1, snap: snap(1, slot(1, 1, 1))},
			{now: 9, wall: 8, span: 4, snap: snap(4, slot(1, 1, 1))},
			{now: 10, wall: 9, span: 4, snap: snap(4, retired(slot(1, 1, 1)))},
		}},
		{"one process paused", []step{
			{now: 3, wall: 2, span: 2, snap: snap(2, level(snapshot.Count))},
			{now: 5, wall: 4, span: 2, snap: snap(4, level(snapshot.Pause))},
			{now: 6, wall: 5, span: 2, snap: snap(5, level(snapshot.Pause))},
			{now: 8, wall: 7, span: 4, snap: snap(7, level(snapshot.Recent))},
		}},
		{"one vCPU paused", []step{
			{now: 3, wall: 2, span: 2, snap: snap(2, level(snapshot.Pause), slot(1, 2, 1))},
			{now: 5, wall: 4, span: 4, snap: snap(4, level(snapshot.Pause), slot(1, 2, 1))},
		}},
		{"paused, with a retired vCPU not yet released", []step{
			{now: 3, wall: 2, span: 2, snap: snap(2, level(snapshot.Pause), retired(slot(1, 2, 1)))},
			{now: 5, wall: 4, span: 2, snap: snap(4, level(snapshot.Pause), retired(slot(1, 2, 1)))},
		}},
		{"counted for long before", []step{
			{now: 100, wall: 99, span: 99, snap: snap(5000, slot(1, 1, 1))},
		}},
		{"taken into use while the snapshot was", []step{
			{now: 1, wall: 0, span: 0, snap: snap(1, slot(1, 2, 1))},
			{now: 3, wall: 2, span: 2, snap: snap(3, slot(1, 2, 1))},
		}},
		{"retired and not yet released", []step{
			{now: 3, wall: 2, span: 2, snap: snap(2, retired(slot(1, 1, 1)))},
			{now: 5, wall: 2, span: 2, snap: snap(4, retired(slot(1, 1, 1)))},
		}},
		{"a new collector", []step{
			{now: 3, wall: 2, span: 2, snap: snap(2, slot(1, 1, 1))},
			{now: 9, wall: 8, span: 3, snap: snap(1, slot(1, 8, 1)), reopen: true},
			{now: 10, wall: 9, span: 4, snap: snap(2, slot(1, 8, 1))},
		}},
		{"the same collector, opened again", []step{
			{now: 3, wall: 2, span: 2, snap: snap(2, slot(1, 1, 1))},
			{now: 5, wall: 4, span: 4, snap: snap(4, slot(1, 1, 1)), reopen: true},
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := New(forever)
			for _, s := range tc.steps {
				if s.reopen {
					l.Reopen()
				}
				apply(t, l, s.now*second, s.snap)
				got := l.View().Processes[snapshot.Process{TGID: 100, Start: 1e7}]
				if got.Wall != s.wall*second || got.Span != s.span*second {
					t.Errorf("at %d s: observed %v of %v, want %d s of %d s", s.now, time.Duration(got.Span), time.Duration(got.Wall), s.span, s.wall)
				}
			}
		})
	}
}

// The level of a process is the highest of its live slots.
func TestLevel(t *testing.T) {
	at := func(generation uint32, l snapshot.Level) snapshot.Slot {
		s := slot(1, generation, 1)
		s.Level = l
		return s
	}
	for _, tc := range []struct {
		name  string
		slots []snapshot.Slot
		want  snapshot.Level
	}{
		{"one", []snapshot.Slot{at(1, snapshot.Count)}, snapshot.Count},
		{"the first", []snapshot.Slot{at(1, snapshot.Recent), at(2, snapshot.Pause)}, snapshot.Recent},
		{"the last", []snapshot.Slot{at(1, snapshot.Pause), at(2, snapshot.Time)}, snapshot.Time},
		{"not of a retired one", []snapshot.Slot{retired(at(1, snapshot.Recent)), at(2, snapshot.Time)}, snapshot.Time},
		{"none live", []snapshot.Slot{retired(at(1, snapshot.Recent))}, snapshot.Off},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := New(forever)
			apply(t, l, 10*second, snapshot.Snapshot{Slots: tc.slots})
			if got := l.View().Processes[snapshot.Process{TGID: 100, Start: 1e7}].Level; got != tc.want {
				t.Errorf("level %v, want %v", got, tc.want)
			}
		})
	}
}

// The present stretch of time is one thing now and another one later: no time
// goes back, and once all has ended they are right again, if they can be.
func TestTimes(t *testing.T) {
	l := New(forever)
	for i, step := range []struct {
		name       string
		slots      []snapshot.Slot
		vcpu1, sum snapshot.Times
	}{
		{"in KVM, it seems", []snapshot.Slot{timed(1, snapshot.Times{Guest: 10, KVM: 90}), timed(2, snapshot.Times{Guest: 5})},
			snapshot.Times{Guest: 10, KVM: 90}, snapshot.Times{Guest: 15, KVM: 90}},
		{"it was halted", []snapshot.Slot{timed(1, snapshot.Times{Guest: 10, KVM: 5, Halted: 100}), timed(2, snapshot.Times{Guest: 6})},
			snapshot.Times{Guest: 10, KVM: 90, Halted: 100}, snapshot.Times{Guest: 16, KVM: 90, Halted: 100}},
		{"overtaken", []snapshot.Slot{timed(1, snapshot.Times{Guest: 10, KVM: 95, Halted: 100}), timed(2, snapshot.Times{Guest: 6})},
			snapshot.Times{Guest: 10, KVM: 95, Halted: 100}, snapshot.Times{Guest: 16, KVM: 95, Halted: 100}},
		{"waiting, it seems", []snapshot.Slot{timed(1, snapshot.Times{Guest: 10, KVM: 95, Halted: 100, Wait: 7}), timed(2, snapshot.Times{Guest: 6})},
			snapshot.Times{Guest: 10, KVM: 95, Halted: 100, Wait: 7}, snapshot.Times{Guest: 16, KVM: 95, Halted: 100, Wait: 7}},
		{"one has ended, and polled", []snapshot.Slot{retired(timed(1, snapshot.Times{Guest: 10, KVM: 95, Halted: 100, Poll: 7})), timed(2, snapshot.Times{Guest: 6})},
			snapshot.Times{Guest: 10, KVM: 95, Halted: 100, Wait: 7, Poll: 7}, snapshot.Times{Guest: 16, KVM: 95, Halted: 100, Wait: 7, Poll: 7}},
		{"the other has, too", []snapshot.Slot{
			retired(timed(1, snapshot.Times{Guest: 10, KVM: 95, Halted: 100, Poll: 7})), retired(timed(2, snapshot.Times{Guest: 7, User: 1, Outside: 2}))},
			snapshot.Times{Guest: 10, KVM: 95, Halted: 100, Wait: 7, Poll: 7},
			snapshot.Times{Guest: 17, KVM: 95, User: 1, Halted: 100, Wait: 7, Poll: 7, Outside: 2}},
	} {
		apply(t, l, uint64(i+10)*second, snapshot.Snapshot{Slots: step.slots})
		got := l.View().Processes[snapshot.Process{TGID: 100, Start: 1e7}]
		if diff := cmp.Diff(step.vcpu1, got.VCPUs[0].Times); diff != "" {
			t.Errorf("%s: vCPU 1 (-want +got)\n%s", step.name, diff)
		}
		if diff := cmp.Diff(step.sum, got.Times); diff != "" {
			t.Errorf("%s: all vCPUs (-want +got)\n%s", step.name, diff)
		}
	}
}

// timed makes a slot of a vCPU of process 100.
func timed(vcpu int, times snapshot.Times) snapshot.Slot {
	s := slot(1, uint32(vcpu), 1)
	s.VCPU, s.Times = vcpu, times
	return s
}

func TestApply(t *testing.T) {
	type step struct {
		snap    snapshot.Snapshot
		reopen  bool
		err     error
		totals  Totals
		release int
	}
	for _, tc := range []struct {
		name  string
		steps []step
	}{
		{"release fails twice", []step{
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{slot(1, 1, 5)}}, totals: Totals{Exits: 5, Attributed: 5}},
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{retired(slot(1, 1, 7))}}, totals: Totals{Exits: 7, Attributed: 7}, release: 1},
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{retired(slot(1, 1, 7))}}, totals: Totals{Exits: 7, Attributed: 7}, release: 1},
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{retired(slot(1, 1, 7))}}, totals: Totals{Exits: 7, Attributed: 7}, release: 1},
			{snap: snapshot.Snapshot{Released: 7}, totals: Totals{Exits: 7, Attributed: 7}},
		}},
		{"slot used again between two snapshots", []step{
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{retired(slot(1, 1, 7))}}, totals: Totals{Exits: 7, Attributed: 7}, release: 1},
			{snap: snapshot.Snapshot{Released: 7, Slots: []snapshot.Slot{slot(1, 2, 3)}}, totals: Totals{Exits: 10, Attributed: 10}},
		}},
		{"released before this ledger began", []step{
			{snap: snapshot.Snapshot{Released: 100, Slots: []snapshot.Slot{slot(1, 9, 3)}}, totals: Totals{Exits: 103, Attributed: 3, Missed: 100}},
		}},
		{"released by another reader", []step{
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{slot(1, 1, 5)}}, totals: Totals{Exits: 5, Attributed: 5}},
			{snap: snapshot.Snapshot{Released: 8}, totals: Totals{Exits: 8, Attributed: 5, Missed: 3}},
			{snap: snapshot.Snapshot{Released: 18}, totals: Totals{Exits: 18, Attributed: 5, Missed: 13}},
		}},
		{"unattributed and refused", []step{
			{snap: snapshot.Snapshot{Unattributed: 4, Refused: 2, Slots: []snapshot.Slot{slot(1, 1, 5)}}, totals: Totals{Exits: 11, Attributed: 5, Unattributed: 6}},
		}},
		{"opened again, the same collector", []step{
			{snap: snapshot.Snapshot{Released: 1, Slots: []snapshot.Slot{slot(1, 1, 5), slot(2, 1, 1)}}, totals: Totals{Exits: 7, Attributed: 6, Missed: 1}},
			{snap: snapshot.Snapshot{Released: 1, Slots: []snapshot.Slot{retired(slot(1, 1, 6)), retired(slot(2, 1, 1))}}, reopen: true,
				totals: Totals{Exits: 8, Attributed: 7, Missed: 1}, release: 2},
		}},
		{"opened again, a new collector", []step{
			{snap: snapshot.Snapshot{Released: 1, Unattributed: 2, Slots: []snapshot.Slot{slot(1, 1, 5), retired(slot(2, 1, 1))}},
				totals: Totals{Exits: 9, Attributed: 6, Unattributed: 2, Missed: 1}, release: 1},
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{{ID: snapshot.SlotID{Index: 1, Generation: 1}, Since: 99, Rows: []snapshot.Row{row(1, 50)}}}}, reopen: true,
				totals: Totals{Exits: 59, Attributed: 56, Unattributed: 2, Missed: 1}},
		}},
		{"a new collector without a word", []step{
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{slot(1, 1, 5)}}, totals: Totals{Exits: 5, Attributed: 5}},
			{err: ErrInconsistent, totals: Totals{Exits: 5, Attributed: 5}},
			{reopen: true, totals: Totals{Exits: 5, Attributed: 5}},
		}},
		{"a slot goes back", []step{
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{slot(1, 1, 5)}}, totals: Totals{Exits: 5, Attributed: 5}},
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{slot(1, 1, 4)}}, err: ErrInconsistent, totals: Totals{Exits: 5, Attributed: 5}},
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{slot(1, 1, 6)}}, totals: Totals{Exits: 6, Attributed: 6}},
		}},
		{"final counts change", []step{
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{retired(slot(1, 1, 5))}}, totals: Totals{Exits: 5, Attributed: 5}, release: 1},
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{retired(slot(1, 1, 6))}}, err: ErrInconsistent, totals: Totals{Exits: 5, Attributed: 5}},
		}},
		{"the dead live", []step{
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{retired(slot(1, 1, 5))}}, totals: Totals{Exits: 5, Attributed: 5}, release: 1},
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{slot(1, 1, 5)}}, err: ErrInconsistent, totals: Totals{Exits: 5, Attributed: 5}},
		}},
		{"a slot appears twice", []step{
			{snap: snapshot.Snapshot{Slots: []snapshot.Slot{slot(1, 1, 5), slot(1, 1, 5)}}, err: ErrInconsistent},
		}},
		{"unattributed goes back", []step{
			{snap: snapshot.Snapshot{Unattributed: 4}, totals: Totals{Exits: 4, Unattributed: 4}},
			{snap: snapshot.Snapshot{Unattributed: 3}, err: ErrInconsistent, totals: Totals{Exits: 4, Unattributed: 4}},
		}},
		{"counted time goes back", []step{
			{snap: snapshot.Snapshot{Counted: 4}},
			{snap: snapshot.Snapshot{Counted: 3}, err: ErrInconsistent},
			{snap: snapshot.Snapshot{Counted: 3}, reopen: true},
		}},
		{"refused goes back", []step{
			{snap: snapshot.Snapshot{Refused: 4}, totals: Totals{Exits: 4, Unattributed: 4}},
			{snap: snapshot.Snapshot{Refused: 3}, err: ErrInconsistent, totals: Totals{Exits: 4, Unattributed: 4}},
		}},
		{"released goes back", []step{
			{snap: snapshot.Snapshot{Released: 4}, totals: Totals{Exits: 4, Missed: 4}},
			{snap: snapshot.Snapshot{Released: 3}, err: ErrInconsistent, totals: Totals{Exits: 4, Missed: 4}},
		}},
		{"lost from released", []step{
			{snap: snapshot.Snapshot{Released: 4, Slots: []snapshot.Slot{slot(1, 1, 5)}}, totals: Totals{Exits: 9, Attributed: 5, Missed: 4}},
			{snap: snapshot.Snapshot{Released: 8}, err: ErrInconsistent, totals: Totals{Exits: 9, Attributed: 5, Missed: 4}},
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := New(forever)
			for i, s := range tc.steps {
				if s.reopen {
					l.Reopen()
				}
				release, err := l.Apply(&s.snap, uint64(i+1)*second)
				if !errors.Is(err, s.err) {
					t.Fatalf("step %d: error %v, want %v", i, err, s.err)
				}
				if diff := cmp.Diff(s.totals, l.Totals()); diff != "" {
					t.Errorf("step %d: totals (-want +got)\n%s", i, diff)
				}
				if len(release) != s.release {
					t.Errorf("step %d: releases %v, want %d", i, release, s.release)
				}
			}
		})
	}
}

// TestReturn is a collector that others have counted in place of meanwhile, and
// that has kept what it counted, in slots or in the sum of those released.
func TestReturn(t *testing.T) {
	module := func(released, counted uint64, slots ...snapshot.Slot) snapshot.Snapshot {
		return snapshot.Snapshot{TickHz: 1e9, Loaded: 1, Released: released, Unattributed: 3, Refused: 2, Counted: counted, Slots: slots}
	}
	before, after := slot(1, 1, 1000), slot(2, 1, 50)
	for name, back := range map[string]snapshot.Snapshot{
		"released":     module(1007, 11*second, after),
		"not released": module(7, 11*second, retired(before), after),
	} {
		for _, stops := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, stops between: %t", name, stops), func(t *testing.T) {
				const others = maxPast + 2
				l := New(forever)
				restart := func() {
					l.Reopen()
					if stops {
						var err error
						if l, err = Restore(forever, records(stored(t, l.State()))); err != nil {
							t.Fatal(err)
						}
					}
				}
				apply(t, l, 10*second, module(7, 9*second, before)) // 7 were released before
				apply(t, l, 11*second, module(7, 10*second, retired(before)))
				for i := range uint64(others) {
					restart()
					apply(t, l, (12+i)*second, snapshot.Snapshot{TickHz: 25e8, Loaded: 2 + i, Transient: true, Counted: second, Slots: []snapshot.Slot{slot(1, uint32(2+i), 10)}})
				}
				restart()
				apply(t, l, 20*second, back)
				want := Totals{Exits: 1062 + 10*others, Attributed: 1050 + 10*others, Unattributed: 5, Missed: 7}
				if diff := cmp.Diff(want, l.Totals()); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
				v := l.View()
				if v.Counted != (11+others)*second {
					t.Errorf("%d ns counted", v.Counted)
				}
				// In ticks of the first, of which the others have 2.5.
				total := v.Processes[before.Process.InProc()]
				if got, want := total.VCPUs[0].Times, (snapshot.Times{Guest: 1_000_000 + 10*1000*others*2/5, KVM: 10_000 + 10*10*others*2/5}); got != want {
					t.Errorf("times %+v, want %+v", got, want)
				}
				// After another boot it is a new one, though it were called the same.
				l.Reopen()
				apply(t, l, 21*second, snapshot.Snapshot{TickHz: 1e9, Loaded: 9})
				remembered := maxPast
				if stops {
					remembered = 1 // that did not end with a process
				}
				if len(l.past) != remembered {
					t.Errorf("%d collectors are remembered, want %d", len(l.past), remembered)
				}
				l.Reboot(0)
				apply(t, l, 22*second, snapshot.Snapshot{TickHz: 1e9, Loaded: 50})
				l.Reopen()
				apply(t, l, 23*second, module(0, second))
				want.Exits, want.Unattributed = want.Exits+5, want.Unattributed+5
				if diff := cmp.Diff(want, l.Totals()); diff != "" {
					t.Errorf("after a boot (-want +got):\n%s", diff)
				}
			})
		}
	}
}

// However often the module was loaded before, others that come back go on.
func TestLoadedOften(t *testing.T) {
	l := New(forever)
	exits := uint64(0)
	for i := range uint32(2 * maxPast) {
		l.Reopen()
		apply(t, l, uint64(i+1)*second, snapshot.Snapshot{TickHz: 1e9, Loaded: uint64(i + 1), Slots: []snapshot.Slot{slot(1, i+1, 7)}})
		exits += 7
	}
	ebpf := snapshot.Snapshot{TickHz: 1e9, Loaded: 100, Transient: true, Slots: []snapshot.Slot{slot(2, 100, 10)}}
	for i, snap := range []snapshot.Snapshot{ebpf, {TickHz: 1e9, Loaded: 101, Transient: true, Slots: []snapshot.Slot{slot(3, 101, 20)}}, ebpf} {
		l.Reopen()
		apply(t, l, uint64(100+i)*second, snap)
	}
	if diff := cmp.Diff(Totals{Exits: exits + 30, Attributed: exits + 30}, l.Totals()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestExpire(t *testing.T) {
	l := New(Retention{Age: 10 * time.Second, Count: 2})
	slots := make([]snapshot.Slot, 6)
	for i := range slots {
		slots[i] = slot(uint32(i+1), 1, 1)
	}
	apply(t, l, 1*second, snapshot.Snapshot{Slots: slots})
	// One more ends each second: 100 first, 500 last. 600 lives on.
	for i := range 5 {
		apply(t, l, uint64(i+2)*second, snapshot.Snapshot{Released: uint64(i + 1), Slots: slots[i+1:]})
	}
	alive := func(p snapshot.Process) bool { return p.TGID == 200 }
	expect := func(want ...int) {
		t.Helper()
		l.Expire(alive)
		var got []int
		for p := range l.View().Processes {
			got = append(got, p.TGID)
		}
		slices.Sort(got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("remembered (-want +got)\n%s", diff)
		}
		if diff := cmp.Diff(Totals{Exits: 6, Attributed: 6}, l.Totals()); diff != "" {
			t.Errorf("totals (-want +got)\n%s", diff)
		}
	}
	expect(200, 400, 500, 600)
	apply(t, l, 15*second, snapshot.Snapshot{Released: 5, Slots: slots[5:]})
	expect(200, 400, 500, 600)
	apply(t, l, 16*second, snapshot.Snapshot{Released: 5, Slots: slots[5:]})
	expect(200, 500, 600)
	apply(t, l, 17*second, snapshot.Snapshot{Released: 5, Slots: slots[5:]})
	expect(200, 600)
}

// sim is a kernel: slots that are taken, count, retire and are released.
type sim struct {
	rng        *rand.Rand
	slots      []*snapshot.Slot // nil: free
	generation []uint32
	snap       snapshot.Snapshot
	paused     bool
	now        uint64
}

func newSim(rng *rand.Rand) *sim {
	return &sim{rng: rng, slots: make([]*snapshot.Slot, 6), generation: make([]uint32, 6), snap: snapshot.Snapshot{TickHz: 2e9, Loaded: 1}}
}

func (k *sim) pass(ns uint64) {
	k.now += ns
	if k.paused {
		return
	}
	k.snap.Counted += ns
	for _, s := range k.slots {
		if s != nil && !s.Retired {
			*k.some(&s.Times) += ns / 2
		}
	}
}

// some is one of the times.
func (k *sim) some(t *snapshot.Times) *uint64 {
	all := []*uint64{&t.Guest, &t.KVM, &t.User, &t.Poll, &t.Halted, &t.Wait, &t.Outside}
	return all[k.rng.IntN(len(all))]
}

func (k *sim) reload() {
	clear(k.slots)
	clear(k.generation)
	k.snap = snapshot.Snapshot{TickHz: 2e9, Loaded: k.now}
}

func (k *sim) exits(n int) {
	if k.paused {
		return
	}
	for range n {
		i := k.rng.IntN(len(k.slots))
		s := k.slots[i]
		switch {
		case s == nil:
			k.generation[i]++
			k.slots[i] = &snapshot.Slot{
				ID:      snapshot.SlotID{Index: uint32(i), Generation: k.generation[i]},
				Process: snapshot.Process{TGID: 1 + k.rng.IntN(3), Start: 1e7},
				VCPU:    k.rng.IntN(3),
				Since:   k.now,
				ISA:     exitreason.SVM,
				Level:   snapshot.Level(k.rng.IntN(5)),
			}
		case s.Retired:
			k.snap.Unattributed++
		default:
			code := uint32(k.rng.IntN(4))
			j := slices.IndexFunc(s.Rows, func(r snapshot.Row) bool { return r.Code == code })
			if j < 0 {
				j = len(s.Rows)
				s.Rows = append(s.Rows, snapshot.Row{Code: code})
			}
			s.Rows[j].Add(row(code, 1))
		}
	}
}

func (k *sim) retire(all bool) {
	for _, s := range k.slots {
		if s != nil && (all || k.rng.IntN(3) == 0) {
			s.Retired = true
		}
	}
}

func (k *sim) release(ids []snapshot.SlotID) {
	for _, id := range ids {
		if s := k.slots[id.Index]; s != nil && s.Retired && s.ID == id {
			k.snap.Released += s.Exits()
			k.slots[id.Index] = nil
		}
	}
}

func (k *sim) snapshot() *snapshot.Snapshot {
	c := k.snap
	for _, s := range k.slots {
		if s != nil {
			s := *s
			s.Rows = slices.Clone(s.Rows)
			if !s.Retired {
				*k.some(&s.Times) += second / 16 // the present stretch, it seems
			}
			c.Slots = append(c.Slots, s)
		}
	}
	return &c
}

// FuzzApply runs a random history and holds the ledger against the simplest
// thing that can be right: remember of every use of a slot what was last seen
// of it, for ever, and add that up.
func FuzzApply(f *testing.F) {
	for seed := range uint64(300) {
		ops := make([]byte, 200)
		rng := rand.New(rand.NewPCG(seed, 2))
		for i := range ops {
			ops[i] = byte(rng.UintN(256))
		}
		f.Add(seed, ops)
	}
	type seen struct {
		process snapshot.Process
		exits   map[uint32]uint64
		times   snapshot.Times
	}
	type model struct {
		all       map[use]seen
		forgotten map[snapshot.Process]map[uint32]uint64 // what the model still counts and the ledger does not
		kernels   map[uint64]uint64                      // exits of each collector, by when it was loaded
		last      *View
	}
	copied := func(m model) model {
		m.all, m.kernels = maps.Clone(m.all), maps.Clone(m.kernels)
		m.forgotten = maps.Clone(m.forgotten)
		for p := range m.forgotten {
			m.forgotten[p] = maps.Clone(m.forgotten[p])
		}
		return m
	}
	f.Fuzz(func(t *testing.T, seed uint64, ops []byte) {
		k := newSim(rand.New(rand.NewPCG(seed, 1)))
		keep := Retention{Age: time.Second, Count: 1}
		l := New(keep)
		now := model{make(map[use]seen), make(map[snapshot.Process]map[uint32]uint64), make(map[uint64]uint64), l.View()}
		saved, savedModel := l.State(), copied(now)
		// A careful reader releases what it has saved and nothing else, and there is
		// no other: then nothing is ever missed, whatever crashes.
		careful := seed%2 == 0
		for _, op := range ops {
			all, forgotten := now.all, now.forgotten
			k.pass(second / 8)
			switch op % 16 {
			case 0:
				k.retire(false)
			case 1:
				k.retire(true) // off
			case 2:
				if careful {
					continue
				}
				for _, s := range k.slots {
					if s != nil && s.Retired && k.rng.IntN(2) == 0 {
						k.release([]snapshot.SlotID{s.ID})
					}
				}
			case 3:
				k.reload()
				l.Reopen()
				k.exits(k.rng.IntN(40))
			case 12: // to be taken up by the next one
				saved, savedModel = l.State(), copied(now)
				if careful && saved.head.Collector.Loaded == k.snap.Loaded { // generations begin anew
					var release []snapshot.SlotID
					for u, known := range saved.slots {
						if known.slot.Retired {
							release = append(release, u.id)
						}
					}
					k.release(release)
				}
			case 13: // the reader dies, and one that has what was saved takes over
				l, now = restored(t, keep, saved), copied(savedModel)
				if diff := cmp.Diff(now.last, l.View(), anyOrder); diff != "" {
					t.Fatalf("restored (-want +got)\n%s", diff)
				}
			case 4:
				l.Reopen()
			case 5:
				k.snap.Refused++
			case 11:
				k.paused = !k.paused
			case 6, 7, 8, 9:
				snap := k.snapshot()
				release, err := l.Apply(snap, k.now)
				if err != nil {
					t.Fatal(err)
				}
				if !careful && k.rng.IntN(4) > 0 {
					k.release(release)
				}
				now.kernels[snap.Loaded] = snap.Exits()
				for i := range snap.Slots {
					s := &snap.Slots[i]
					m := seen{s.Process, make(map[uint32]uint64), s.Times}
					for _, r := range s.Rows {
						m.exits[r.Code] = r.Count
					}
					all[use{s.ID, s.Since}] = m
				}
				want := make(map[snapshot.Process]map[uint32]uint64)
				times := make(map[snapshot.Process]snapshot.Times)
				var attributed uint64
				for _, m := range all {
					if want[m.process] == nil {
						want[m.process] = make(map[uint32]uint64)
					}
					times[m.process] = times[m.process].Add(m.times)
					for code, n := range m.exits {
						want[m.process][code] += n
						attributed += n
					}
				}
				v := l.View()
				for p, exits := range want {
					for code, n := range forgotten[p] {
						exits[code] -= n
					}
					got := make(map[uint32]uint64)
					var sum uint64
					if total := v.Processes[p]; total != nil {
						for _, r := range total.Rows {
							got[r.Code] = r.Count
							if r.Timed() != r.Count || r.Time != 10*r.Count || r.Max != 10 {
								t.Fatalf("%v: row %v does not agree with itself", p, r)
							}
							sum += r.Count
						}
						for _, vcpu := range total.VCPUs {
							sum -= vcpu.Exits
						}
						if sum != 0 {
							t.Fatalf("%v: vCPUs have %d exits less than rows", p, int64(sum))
						}
						if total.Span > total.Wall {
							t.Fatalf("%v: %d ns observed of %d", p, total.Span, total.Wall)
						}
						if old := now.last.Processes[p]; old != nil && forgotten[p] == nil {
							if total.Exits < old.Exits || total.Span < old.Span || total.Wall < old.Wall {
								t.Fatalf("%v: %d exits in %d of %d ns after %d in %d of %d ns", p, total.Exits, total.Span, total.Wall, old.Exits, old.Span, old.Wall)
							}
							if total.Span-old.Span > v.Counted-now.last.Counted {
								t.Fatalf("%v: %d ns observed when %d were counted", p, total.Span-old.Span, v.Counted-now.last.Counted)
							}
							for _, o := range old.VCPUs {
								if i, ok := total.vcpu(o.ID); !ok || total.VCPUs[i].Times != total.VCPUs[i].Times.Max(o.Times) {
									t.Fatalf("%v: vCPU %d: times went back from %v", p, o.ID, o.Times)
								}
							}
						}
						if forgotten[p] == nil && total.Times != total.Times.Max(times[p]) {
							t.Fatalf("%v: times are %v, of slots %v", p, total.Times, times[p])
						}
					}
					for code, n := range exits {
						if got[code] != n {
							t.Fatalf("%v: reason %d has %d exits, want %d", p, code, got[code], n)
						}
					}
				}
				tot, before := v.Totals, now.last.Totals
				var counted uint64
				for _, n := range now.kernels {
					counted += n
				}
				if tot.Exits != counted || careful && tot.Missed != 0 {
					t.Fatalf("totals %+v, the kernel counted %d", tot, counted)
				}
				if tot.Attributed != attributed || tot.Exits != tot.Attributed+tot.Unattributed+tot.Missed {
					t.Fatalf("totals %+v, want %d attributed", tot, attributed)
				}
				if tot.Exits < before.Exits || tot.Missed < before.Missed || tot.Unattributed < before.Unattributed {
					t.Fatalf("totals %+v after %+v", tot, before)
				}
				now.last = v
			case 10:
				v := l.View()
				l.Expire(func(p snapshot.Process) bool { return p.TGID == 1 })
				for p, total := range v.Processes {
					if l.processes[p] != nil {
						continue
					}
					if total.Live || p.TGID == 1 {
						t.Fatalf("%v was forgotten alive", p)
					}
					if forgotten[p] == nil {
						forgotten[p] = make(map[uint32]uint64)
					}
					for _, r := range total.Rows {
						forgotten[p][r.Code] += r.Count
					}
				}
				now.last = l.View()
			default:
				k.exits(k.rng.IntN(20))
			}
		}
	})
}

// A view shares what has not changed with those that follow, and stays as it is.
func TestViewStays(t *testing.T) {
	l := New(forever)
	still := row(0x7b, 5)
	counts := func(n uint64) snapshot.Slot {
		s := slot(1, 1, n)
		s.Rows = append(s.Rows, still)
		return s
	}
	var views []*View
	for n := uint64(1); n < 5; n++ {
		other := slot(1, 2, n) // the same process and reason
		apply(t, l, n*second, snapshot.Snapshot{Slots: []snapshot.Slot{counts(n), other}})
		views = append(views, l.View())
	}
	var last *Total
	for i, v := range views {
		n := uint64(i + 1)
		total := v.Processes[snapshot.Process{TGID: 100, Start: 1e7}]
		if diff := cmp.Diff([]Row{{exitreason.SVM, row(0x72, 2*n)}, {exitreason.SVM, row(0x7b, 5)}}, total.Rows); diff != "" {
			t.Errorf("view %d (-want +got)\n%s", i, diff)
		}
		if last != nil && (last.Rows[0].Hist.Same(total.Rows[0].Hist) || !last.Rows[1].Hist.Same(total.Rows[1].Hist)) {
			t.Errorf("view %d shares histograms that changed, or does not share others", i)
		}
		last = total
	}
}

// All rows change; BenchmarkHost of internal/slots is closer to life.
func BenchmarkApply(b *testing.B) {
	for _, rows := range []int{12, 30} {
		b.Run(fmt.Sprintf("1000x8/rows=%d", rows), func(b *testing.B) {
			var snaps []*snapshot.Snapshot
			for n := range 5 {
				snap := &snapshot.Snapshot{}
				for i := range uint32(8000) {
					s := slot(i, 1, 1)
					s.Process.TGID, s.VCPU = int(i/8), int(i%8)
					s.Rows = nil
					for r := range rows {
						s.Rows = append(s.Rows, row(uint32(r), uint64(n+1)))
					}
					snap.Slots = append(snap.Slots, s)
				}
				snaps = append(snaps, snap)
			}
			var l *Ledger
			b.ReportAllocs()
			for n := 0; b.Loop(); n++ {
				if n%len(snaps) == 0 {
					l = New(forever)
				}
				if _, err := l.Apply(snaps[n%len(snaps)], uint64(n+1)*second); err != nil {
					b.Fatal(err)
				}
				l.View()
			}
		})
	}
}

// One collector has a process's start time from the kernel, another from /proc.
func TestPrecision(t *testing.T) {
	const tick = 10 * 1e6
	for _, tc := range []struct {
		name      string
		first     uint64
		second    uint64
		continued bool
	}{
		{name: "finer", first: 5 * tick, second: 5*tick + 3, continued: true},
		{name: "coarser", first: 6*tick - 1, second: 5 * tick, continued: true},
		{name: "another process", first: 6*tick - 1, second: 6 * tick},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := New(forever)
			a, b := slot(1, 1, 5), slot(1, 1, 7)
			a.Process.Start, b.Process.Start = tc.first, tc.second
			apply(t, l, second, snapshot.Snapshot{TickHz: 1, Loaded: 1, Slots: []snapshot.Slot{a}})
			l = restored(t, forever, l.State())
			l.Reopen()
			apply(t, l, 2*second, snapshot.Snapshot{TickHz: 1, Loaded: 2, Slots: []snapshot.Slot{b}})
			got := map[snapshot.Process]uint64{}
			for _, total := range l.View().Processes {
				got[total.Process] = total.Exits
			}
			want := map[snapshot.Process]uint64{b.Process: 12}
			if !tc.continued {
				want = map[snapshot.Process]uint64{a.Process: 5, b.Process: 7}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("exits (-want +got)\n%s", diff)
			}
		})
	}
}
