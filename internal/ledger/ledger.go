// SPDX-License-Identifier: Apache-2.0

// Package ledger turns snapshots of slots into totals of processes that never
// go back. Who a process is, is not its concern. It reads no clock: times are
// nanoseconds of CLOCK_BOOTTIME, durations that the kernel measured are ticks.
package ledger

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"virtexit/internal/snapshot"
)

// ErrInconsistent says that a snapshot can't follow the one before: a count
// went back, or exits that were counted are no longer accounted for.
var ErrInconsistent = errors.New("counts are inconsistent")

// Retention bounds how long a process that has ended is remembered.
type Retention struct {
	Age   time.Duration // after it was last counted
	Count int           // processes; the latest are kept
}

// Ledger keeps totals. It is not safe for concurrent use.
type Ledger struct {
	keep      Retention
	processes map[snapshot.Process]*process // InProc: so do all collectors know it
	slots     map[use]known                 // of the latest snapshot
	spare     map[use]known                 // an empty one: saves an allocation at each snapshot
	before    []*snapshot.Slot              // as is said at follow; empty too
	kernel    kernel
	earlier   Totals      // of collectors that were replaced
	counted   uint64      // nanoseconds, by collectors that were replaced
	past      []collector // the latest of those, all in the two before
	forgotten uint64      // exits of processes that are no longer remembered
	reopened  bool
	now       uint64
	tickHz    uint64
	converter snapshot.Converter // of a collector that has another clock
}

// kernel is what the collector said about itself in the latest snapshot.
type kernel struct {
	loaded                                 uint64 // which collector it is; 0: unknown
	transient                              bool   // it ends with this process
	counted                                uint64 // nanoseconds
	exits, unattributed, refused, released uint64
	gone                                   uint64 // of released, those that are in the ledger
}

// maxPast is how many collectors are remembered that were replaced and can come
// back: the module as long as it stays loaded, others as long as this process runs.
const maxPast = 4

// collector is one that was replaced, as it was last seen.
type collector struct {
	kernel kernel
	slots  map[use]known
}

func (k kernel) missed() uint64 { return k.released - k.gone }

// use names one use of a slot for good. A collector that was loaded again
// begins its generations anew, but time went on.
type use struct {
	id    snapshot.SlotID
	since uint64
}

type known struct {
	slot  *snapshot.Slot // as it was last seen; all that it counted is in its process's total
	exits uint64
}

type process struct {
	total   *Total // replaced, never changed
	next    *Total // while a snapshot is entered that has slots of it: what will replace it
	counted bool   // it has slots there whose exits are counted
	fresh   bool   // it brought new slots
	since   uint64 // the earliest Since of those
}

// New returns an empty ledger.
func New(keep Retention) *Ledger {
	return &Ledger{
		keep:      keep,
		processes: make(map[snapshot.Process]*process),
		slots:     make(map[use]known),
		spare:     make(map[use]known),
	}
}

// Reopen says that the next snapshot comes from a collector that was opened
// anew. It may be the same one, which goes on counting, or one that began at
// zero, and then what was counted so far is kept.
func (l *Ledger) Reopen() { l.reopened = true }

// Apply enters a snapshot taken at time now. It returns the retired slots,
// whose counts the ledger has taken; until they are released it returns them
// every time. A snapshot that fails with ErrInconsistent has changed nothing.
func (l *Ledger) Apply(snap *snapshot.Snapshot, now uint64) (release []snapshot.SlotID, err error) {
	if l.tickHz != 0 && farFrom(snap.TickHz, l.tickHz) {
		snap = l.converter.In(l.tickHz, snap)
	}
	next, k, err := l.follow(snap)
	if err != nil && l.reopened {
		// Not a continuation: another collector.
		l.replace(snap)
		next, k, err = l.follow(snap)
	}
	if err != nil {
		return nil, err
	}
	for i := range snap.Slots {
		s := &snap.Slots[i]
		if s.Retired {
			release = append(release, s.ID)
		}
		if old := l.before[i]; old == nil || !old.Retired {
			l.process(s).enter(old, s)
		}
	}
	clear(l.slots)
	clear(l.before)
	l.slots, l.spare = next, l.slots
	passed := passed{now, sub(now, l.now), k.counted - l.kernel.counted}
	l.kernel, l.now, l.tickHz, l.reopened = k, now, snap.TickHz, false
	for _, p := range l.processes {
		p.update(passed)
	}
	return release, l.check()
}

// farFrom tells whether two clocks differ by more than one that is calibrated anew
// when the host boots.
func farFrom(a, b uint64) bool { return max(a, b)-min(a, b) > b/1000 }

// passed is the time between two snapshots, in nanoseconds.
type passed struct {
	now     uint64 // at the later one
	wall    uint64
	counted uint64 // of wall, that in which exits were counted
}

// follow computes what the ledger knows after snap, or why snap can't be a
// continuation of what it knows. It changes nothing but the spare map, which
// it returns, and before: what each slot of snap was when it was last seen, nil
// for a new one.
func (l *Ledger) follow(snap *snapshot.Snapshot) (map[use]known, kernel, error) {
	next := l.spare
	clear(next)
	l.before = l.before[:0]
	k := kernel{
		loaded:       snap.Loaded,
		transient:    snap.Transient,
		counted:      snap.Counted,
		unattributed: snap.Unattributed,
		refused:      snap.Refused,
		released:     snap.Released,
		gone:         l.kernel.gone,
	}
	k.exits = k.unattributed + k.refused + k.released
	var stayed uint64 // exits, as last known, of slots that are still there
	for i := range snap.Slots {
		s := &snap.Slots[i]
		u := use{s.ID, s.Since}
		n := known{slot: s, exits: s.Exits()}
		old, ok := l.slots[u]
		if ok {
			if n.exits < old.exits || old.slot.Retired && (n.exits != old.exits || !s.Retired) {
				return nil, k, fmt.Errorf("%w: slot %d, generation %d, of process %d: %d exits after %d (final: %t)",
					ErrInconsistent, s.ID.Index, s.ID.Generation, s.Process.TGID, n.exits, old.exits, old.slot.Retired)
			}
			stayed += old.exits
		}
		l.before = append(l.before, old.slot)
		if next[u] = n; len(next) == i {
			return nil, k, fmt.Errorf("%w: slot %d, generation %d, appears twice", ErrInconsistent, s.ID.Index, s.ID.Generation)
		}
		k.exits += n.exits
	}
	var before uint64
	for _, old := range l.slots {
		before += old.exits
	}
	k.gone += before - stayed
	was := l.kernel
	switch {
	case was.loaded != 0 && k.loaded != was.loaded:
		return nil, k, fmt.Errorf("%w: the collector was loaded again", ErrInconsistent)
	case k.counted < was.counted:
		return nil, k, fmt.Errorf("%w: %d ns counted after %d", ErrInconsistent, k.counted, was.counted)
	case k.unattributed < was.unattributed:
		return nil, k, fmt.Errorf("%w: %d exits unattributed after %d", ErrInconsistent, k.unattributed, was.unattributed)
	case k.refused < was.refused:
		return nil, k, fmt.Errorf("%w: %d exits refused after %d", ErrInconsistent, k.refused, was.refused)
	case k.released < k.gone || k.missed() < was.missed():
		return nil, k, fmt.Errorf("%w: %d exits of %d in slots that are gone are not in those released (%d after %d)",
			ErrInconsistent, before-stayed, before, k.released, was.released)
	}
	return next, k, nil
}

// replace settles the collector that was: what it counted stays. That of snap began
// at zero, unless it has been replaced before: the module keeps what it has counted
// while others count.
func (l *Ledger) replace(snap *snapshot.Snapshot) {
	was := collector{l.kernel, maps.Clone(l.slots)}
	clear(l.slots)
	l.earlier = l.Totals()
	l.counted += l.kernel.counted
	l.kernel = kernel{}
	if i := slices.IndexFunc(l.past, func(c collector) bool { return c.kernel.loaded == snap.Loaded }); i >= 0 && snap.Loaded != was.kernel.loaded {
		back := l.past[i]
		l.past = slices.Delete(l.past, i, i+1)
		l.kernel = back.kernel
		maps.Copy(l.slots, back.slots)
		l.earlier.Exits -= back.kernel.exits
		l.earlier.Unattributed -= back.kernel.unattributed + back.kernel.refused
		l.earlier.Missed -= back.kernel.missed()
		l.counted -= back.kernel.counted
	}
	if was.kernel.loaded != 0 {
		l.past = append(l.past, was)
	}
	if !snap.Transient { // it is the module that is loaded, and any other is not
		l.past = slices.DeleteFunc(l.past, func(c collector) bool { return !c.kernel.transient })
	}
	if len(l.past) > maxPast { // the oldest, but not the module
		oldest := max(0, slices.IndexFunc(l.past, func(c collector) bool { return c.kernel.transient }))
		l.past = slices.Delete(l.past, oldest, oldest+1)
	}
}

func (l *Ledger) process(s *snapshot.Slot) *process {
	id := s.Process.InProc()
	p := l.processes[id]
	if p == nil {
		p = &process{total: &Total{Process: s.Process, Comm: s.Comm, Since: s.Since}}
		l.processes[id] = p
	}
	return p
}

// enter adds to the total what a slot has counted since it was old; nil: since it
// was taken into use.
func (p *process) enter(old, s *snapshot.Slot) {
	if old == nil && (!p.fresh || s.Since < p.since) {
		p.fresh, p.since = true, s.Since
	}
	p.counted = p.counted || s.Level >= snapshot.Count
	if p.next == nil {
		p.next = p.total.next()
	}
	p.next.advance(p.total, old, s)
}

// update replaces the total, and prepares for the next snapshot.
func (p *process) update(since passed) {
	t := p.next
	switch {
	case t == nil && !p.total.Live:
		return
	case t == nil: // its slots are gone: someone else released them
		t = p.total.next()
	}
	t.sumTimes()
	wall, counted := since.wall, since.counted
	if !p.total.Live {
		wall = 0
		if p.fresh { // it began between the snapshots
			wall = sub(since.now, p.since)
		}
		counted = min(counted, wall)
	}
	t.Wall += wall
	if p.counted {
		t.Span += counted
	}
	t.Seen = since.now
	*p = process{total: t}
}

// check proves that every exit the kernel counted is in exactly one place.
func (l *Ledger) check() error {
	if t := l.Totals(); t.Exits != t.Attributed+t.Unattributed+t.Missed {
		return fmt.Errorf("%w: the kernel counted %d, but %d attributed, %d unattributed and %d missed make %d",
			ErrInconsistent, t.Exits, t.Attributed, t.Unattributed, t.Missed, t.Attributed+t.Unattributed+t.Missed)
	}
	return nil
}

// Expire forgets the processes that have ended and are older or more than the
// retention allows, and returns them. It asks alive only about those that are
// not being counted: collection may be off.
func (l *Ledger) Expire(alive func(snapshot.Process) bool) (forgotten []snapshot.Process) {
	var ended []*process
	for id, p := range l.processes {
		if !p.total.Live && !alive(id) {
			ended = append(ended, p)
		}
	}
	slices.SortFunc(ended, func(a, b *process) int { return cmp.Compare(int64(b.total.Seen), int64(a.total.Seen)) })
	for i, p := range ended {
		if i >= l.keep.Count || sub(l.now, p.total.Seen) > uint64(l.keep.Age) {
			l.forgotten += p.total.Exits
			delete(l.processes, p.total.Process.InProc())
			forgotten = append(forgotten, p.total.Process)
		}
	}
	return forgotten
}

// Totals says where the exits are that the kernel has counted.
// Exits = Attributed + Unattributed + Missed.
type Totals struct {
	Exits        uint64 // by all collectors that were read
	Attributed   uint64 // to processes, present and past
	Unattributed uint64 // to none: no slot was free, or the reason was refused
	Missed       uint64 // released before they were read
}

// Totals returns the ledger's totals.
func (l *Ledger) Totals() Totals {
	t := Totals{
		Exits:        l.earlier.Exits + l.kernel.exits,
		Attributed:   l.forgotten,
		Unattributed: l.earlier.Unattributed + l.kernel.unattributed + l.kernel.refused,
		Missed:       l.earlier.Missed + l.kernel.missed(),
	}
	for _, p := range l.processes {
		t.Attributed += p.total.Exits
	}
	return t
}

// View returns the ledger as it is now.
func (l *Ledger) View() *View {
	v := &View{
		Time:      l.now,
		Counted:   l.counted + l.kernel.counted,
		TickHz:    l.tickHz,
		Processes: make(map[snapshot.Process]*Total, len(l.processes)),
		Totals:    l.Totals(),
	}
	for id, p := range l.processes {
		v.Processes[id] = p.total
	}
	return v
}

// sub is the time from b to a, or 0 when a is the earlier. Times before the host
// booted are negative, that is, they wrap around.
func sub(a, b uint64) uint64 { return uint64(max(0, int64(a-b))) }
