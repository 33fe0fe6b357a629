// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"math"
	"slices"

	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
)

// State is all that a ledger knew at one moment. It does not change with the
// ledger.
type State struct {
	head      Head
	processes []process
	slots     map[use]known
	past      []collector
}

// Record is a part of a State, to be stored. Exactly one of its fields is set.
type Record struct {
	Ledger  *Head          `json:"ledger,omitempty"`
	Process *ProcessRecord `json:"process,omitempty"`
	Slot    *SlotRecord    `json:"slot,omitempty"`
}

// Head is the record that comes first.
type Head struct {
	Time      uint64            `json:"time"` // of the latest snapshot: nanoseconds of CLOCK_BOOTTIME
	TickHz    uint64            `json:"tick_hz"`
	Counted   uint64            `json:"counted"` // nanoseconds, by earlier collectors
	Forgotten uint64            `json:"forgotten"`
	Earlier   [4]uint64         `json:"earlier"` // the fields of Totals
	Collector CollectorRecord   `json:"collector"`
	Past      []CollectorRecord `json:"past,omitempty"` // of the earlier ones, those that may come back
}

// CollectorRecord is a collector as it was last seen, but for its slots.
type CollectorRecord struct {
	Loaded       uint64 `json:"loaded"`
	Transient    bool   `json:"transient,omitempty"`
	Counted      uint64 `json:"counted"`
	Unattributed uint64 `json:"unattributed"`
	Refused      uint64 `json:"refused"`
	Released     uint64 `json:"released"`
	Gone         uint64 `json:"gone"`
}

// ProcessRecord is a process with all that it has counted.
type ProcessRecord struct {
	TGID  int            `json:"tgid"`
	Start uint64         `json:"start"`
	Comm  string         `json:"comm"`
	Since uint64         `json:"since"`
	Seen  uint64         `json:"seen"`
	Live  bool           `json:"live,omitempty"`
	Level snapshot.Level `json:"level,omitempty"`
	Wall  uint64         `json:"wall"`
	Span  uint64         `json:"span"`
	VCPUs [][]uint64     `json:"vcpus,omitempty"` // see packVCPU
	Rows  [][]uint64     `json:"rows,omitempty"`  // see packRow
}

// SlotRecord is a slot as it was last seen: what it has counted is in its process.
// If it is retired, that is all there is to know.
type SlotRecord struct {
	Loaded     uint64     `json:"loaded,omitempty"` // of the past collector that it is of
	Index      uint32     `json:"index"`
	Generation uint32     `json:"generation"`
	Since      uint64     `json:"since"`
	Exits      uint64     `json:"exits"`
	Retired    bool       `json:"retired,omitempty"`
	TGID       int        `json:"tgid,omitempty"`
	Start      uint64     `json:"start,omitempty"` // of the process
	Times      []uint64   `json:"times,omitempty"` // see packTimes
	Rows       [][]uint64 `json:"rows,omitempty"`
}

// Process is whom the record is about.
func (r *ProcessRecord) Process() snapshot.Process {
	return snapshot.Process{TGID: r.TGID, Start: r.Start}
}

// State returns the ledger's state.
func (l *Ledger) State() *State {
	s := &State{
		head: Head{
			Time: l.now, TickHz: l.tickHz, Counted: l.counted, Forgotten: l.forgotten,
			Earlier: [4]uint64{l.earlier.Exits, l.earlier.Attributed, l.earlier.Unattributed, l.earlier.Missed},
		},
		processes: make([]process, 0, len(l.processes)),
		slots:     maps.Clone(l.slots),
		past:      slices.Clone(l.past), // whose slots do not change
	}
	s.head.Collector = l.kernel.record()
	for _, c := range l.past {
		s.head.Past = append(s.head.Past, c.kernel.record())
	}
	for _, p := range l.processes {
		s.processes = append(s.processes, process{total: p.total})
	}
	return s
}

// Records returns the state's records in the order that Restore wants.
func (s *State) Records() iter.Seq[Record] {
	return func(yield func(Record) bool) {
		if !yield(Record{Ledger: &s.head}) {
			return
		}
		for i := range s.processes {
			if !yield(Record{Process: s.processes[i].record()}) {
				return
			}
		}
		for _, c := range append(s.past, collector{slots: s.slots}) {
			for u, k := range c.slots {
				r := k.record(u)
				r.Loaded = c.kernel.loaded
				if !yield(Record{Slot: r}) {
					return
				}
			}
		}
	}
}

func (k kernel) record() CollectorRecord {
	return CollectorRecord{k.loaded, k.transient, k.counted, k.unattributed, k.refused, k.released, k.gone}
}

func (c CollectorRecord) kernel() kernel {
	return kernel{
		loaded: c.Loaded, transient: c.Transient, counted: c.Counted, unattributed: c.Unattributed, refused: c.Refused, released: c.Released, gone: c.Gone,
		exits: c.Unattributed + c.Refused + c.Released,
	}
}

func (p *process) record() *ProcessRecord {
	t := p.total
	r := &ProcessRecord{
		TGID: t.Process.TGID, Start: t.Process.Start, Comm: t.Comm, Since: t.Since, Seen: t.Seen,
		Live: t.Live, Level: t.Level, Wall: t.Wall, Span: t.Span,
		VCPUs: make([][]uint64, len(t.VCPUs)), Rows: packRows(t.Rows),
	}
	for i := range t.VCPUs {
		r.VCPUs[i] = packVCPU(&t.VCPUs[i])
	}
	return r
}

func (k known) record(u use) *SlotRecord {
	s := k.slot
	r := &SlotRecord{Index: u.id.Index, Generation: u.id.Generation, Since: u.since, Exits: k.exits, Retired: s.Retired}
	if s.Retired {
		return r
	}
	rows := make([]Row, len(s.Rows))
	for i, row := range s.Rows {
		rows[i] = Row{s.ISA, row}
	}
	r.TGID, r.Start, r.Times, r.Rows = s.Process.TGID, s.Process.Start, packTimes(nil, s.Times), packRows(rows)
	return r
}

// Restore makes a ledger of what was stored. The next snapshot may come from the
// same collector or from another one. Records that don't agree with each other,
// or with what a ledger can hold, are refused.
func Restore(keep Retention, records iter.Seq2[Record, error]) (*Ledger, error) {
	l := New(keep)
	begun := false
	for r, err := range records {
		switch {
		case err != nil:
		case r.Ledger != nil && !begun && r.Process == nil && r.Slot == nil:
			begun = true
			l.restore(r.Ledger)
		case r.Process != nil && begun && r.Ledger == nil && r.Slot == nil:
			err = l.restoreProcess(r.Process)
		case r.Slot != nil && begun && r.Ledger == nil && r.Process == nil:
			err = l.restoreSlot(r.Slot)
		default:
			err = errors.New("a record out of place")
		}
		if err != nil {
			return nil, err
		}
	}
	switch {
	case !begun:
		return nil, errors.New("no ledger in it")
	case slices.ContainsFunc(append(l.past, collector{kernel: l.kernel}), func(c collector) bool { return c.kernel.gone > c.kernel.released }):
		return nil, fmt.Errorf("%w: more exits are gone than were released", ErrInconsistent)
	case l.tickHz == 0 && len(l.processes) > 0:
		return nil, errors.New("tick_hz is 0")
	}
	// These have ended with the process that stored this.
	l.past = slices.DeleteFunc(l.past, func(c collector) bool { return c.kernel.transient })
	return l, l.check()
}

func (l *Ledger) restore(h *Head) {
	l.now, l.tickHz, l.counted, l.forgotten, l.reopened = h.Time, h.TickHz, h.Counted, h.Forgotten, true
	l.earlier = Totals{h.Earlier[0], h.Earlier[1], h.Earlier[2], h.Earlier[3]}
	l.kernel = h.Collector.kernel()
	for _, c := range h.Past {
		l.past = append(l.past, collector{c.kernel(), make(map[use]known)})
	}
}

func (l *Ledger) restoreProcess(r *ProcessRecord) error {
	id := r.Process()
	if l.processes[id.InProc()] != nil {
		return fmt.Errorf("process %d appears twice", id.TGID)
	}
	t := &Total{Process: id, Comm: r.Comm, Since: r.Since, Seen: r.Seen, Wall: r.Wall, Span: r.Span, Live: r.Live, Level: r.Level}
	var err error
	if t.Rows, err = unpackRows(r.Rows); err != nil {
		return fmt.Errorf("process %d: %w", id.TGID, err)
	}
	if t.VCPUs, err = unpackVCPUs(r.VCPUs); err != nil {
		return fmt.Errorf("process %d: %w", id.TGID, err)
	}
	for i := range t.Rows {
		row := &t.Rows[i]
		if find(t.Rows[:i], row.ISA, &row.Row) >= 0 {
			return fmt.Errorf("process %d: code %d appears twice", id.TGID, row.Code)
		}
		t.Exits += row.Count
	}
	var exits uint64
	for _, v := range t.VCPUs {
		exits += v.Exits
	}
	if exits != t.Exits {
		return fmt.Errorf("%w: process %d: %d exits by vCPU, %d by reason", ErrInconsistent, id.TGID, exits, t.Exits)
	}
	t.sumTimes()
	l.processes[id.InProc()] = &process{total: t}
	return nil
}

func (l *Ledger) restoreSlot(r *SlotRecord) error {
	u := use{snapshot.SlotID{Index: r.Index, Generation: r.Generation}, r.Since}
	k, slots := &l.kernel, l.slots
	if r.Loaded != 0 {
		i := slices.IndexFunc(l.past, func(c collector) bool { return c.kernel.loaded == r.Loaded })
		if i < 0 {
			return fmt.Errorf("slot %d: collector %d is not known", r.Index, r.Loaded)
		}
		k, slots = &l.past[i].kernel, l.past[i].slots
	}
	if _, ok := slots[u]; ok {
		return fmt.Errorf("slot %d appears twice", r.Index)
	}
	s, err := r.slot(u)
	if err != nil {
		return fmt.Errorf("slot %d: %w", r.Index, err)
	}
	if r.Loaded == 0 && !s.Retired && l.processes[s.Process.InProc()] == nil {
		return fmt.Errorf("slot %d: process %d is not known", r.Index, r.TGID)
	}
	slots[u] = known{s, r.Exits}
	k.exits += r.Exits
	return nil
}

func (r *SlotRecord) slot(u use) (*snapshot.Slot, error) {
	s := &snapshot.Slot{ID: u.id, Since: u.since, Retired: r.Retired}
	if r.Retired {
		return s, nil
	}
	rows, err := unpackRows(r.Rows)
	if err != nil {
		return nil, err
	}
	if s.Times, err = unpackTimes(r.Times); err != nil {
		return nil, err
	}
	s.Process = snapshot.Process{TGID: r.TGID, Start: r.Start}
	s.Rows = make([]snapshot.Row, len(rows))
	for i, row := range rows {
		s.ISA, s.Rows[i] = row.ISA, row.Row
	}
	if exits := s.Exits(); exits != r.Exits {
		return nil, fmt.Errorf("%w: %d exits, %d by reason", ErrInconsistent, r.Exits, exits)
	}
	return s, nil
}

// Reboot says that the host has booted since the ledger was stored. The snapshot
// that was the latest then was taken at time at by the clock of today, on which
// that is negative: it wraps around, as will the times of all that was before.
func (l *Ledger) Reboot(at uint64) {
	l.replace(&snapshot.Snapshot{})
	l.past = nil
	shift := at - l.now
	l.now = at
	old := l.processes
	l.processes = make(map[snapshot.Process]*process, len(old))
	for _, p := range old {
		t := p.total.next()
		t.shift(shift)
		t.sumTimes()
		l.processes[t.Process.InProc()] = &process{total: t}
	}
}

// shift moves a total in time, and so its process, which is thereby none of those
// that have been started since.
func (t *Total) shift(by uint64) {
	t.Process.Start += by
	t.Since += by
	t.Seen += by
	for i := range t.VCPUs {
		t.VCPUs[i].since += by
	}
}

// packRow appends the numbers of a row: isa, 1 for Other, code, count, time, user,
// max, and the histogram.
func packRow(to []uint64, r *Row) []uint64 {
	var other uint64
	if r.Other {
		other = 1
	}
	to = append(to, uint64(r.ISA), other, uint64(r.Code), r.Count, r.Time, r.User, r.Max)
	return append(to, r.Hist...)
}

func packRows(rows []Row) [][]uint64 {
	packed := make([][]uint64, len(rows))
	all := make([]uint64, 0, len(rows)*(7+snapshot.NumHist))
	for i := range rows {
		begin := len(all)
		all = packRow(all, &rows[i])
		packed[i] = all[begin:len(all):len(all)]
	}
	return packed
}

func unpackRows(packed [][]uint64) ([]Row, error) {
	rows := make([]Row, len(packed))
	for i, p := range packed {
		if len(p) < 7 || len(p) > 7+snapshot.NumHist || p[0] > math.MaxUint32 || p[1] > 1 || p[2] > math.MaxUint32 {
			return nil, fmt.Errorf("%v is no row", p)
		}
		rows[i] = Row{exitreason.ISA(p[0]), snapshot.Row{
			Other: p[1] == 1, Code: uint32(p[2]), Count: p[3], Time: p[4], User: p[5], Max: p[6], Hist: snapshot.NewHist(p[7:]),
		}}
	}
	return rows, nil
}

// packTimes appends the numbers of times.
func packTimes(to []uint64, t snapshot.Times) []uint64 {
	return append(to, t.Guest, t.KVM, t.User, t.Poll, t.Halted, t.Wait, t.Outside)
}

const numTimes = 7

func unpackTimes(p []uint64) (snapshot.Times, error) {
	if len(p) != numTimes {
		return snapshot.Times{}, fmt.Errorf("%v are no times", p)
	}
	return snapshot.Times{Guest: p[0], KVM: p[1], User: p[2], Poll: p[3], Halted: p[4], Wait: p[5], Outside: p[6]}, nil
}

// packVCPU makes numbers of a vCPU: id, tid, since, exits, its times as shown and
// those of its slots.
func packVCPU(v *VCPU) []uint64 {
	p := []uint64{uint64(v.ID), uint64(v.TID), v.since, v.Exits}
	return packTimes(packTimes(p, v.Times), v.sum)
}

func unpackVCPU(p []uint64) (VCPU, error) {
	if len(p) != 4+2*numTimes || p[0] > math.MaxUint32 || p[1] > math.MaxUint32 {
		return VCPU{}, fmt.Errorf("%v is no vCPU", p)
	}
	times, err := unpackTimes(p[4 : 4+numTimes])
	sum, err2 := unpackTimes(p[4+numTimes:])
	return VCPU{ID: int(p[0]), TID: int(p[1]), since: p[2], Exits: p[3], Times: times, sum: sum}, errors.Join(err, err2)
}

// unpackVCPUs wants them in order, each once.
func unpackVCPUs(packed [][]uint64) ([]VCPU, error) {
	vcpus := make([]VCPU, len(packed))
	for i, p := range packed {
		var err error
		if vcpus[i], err = unpackVCPU(p); err != nil {
			return nil, err
		}
		if i > 0 && vcpus[i].ID <= vcpus[i-1].ID {
			return nil, fmt.Errorf("vCPU %d after %d", vcpus[i].ID, vcpus[i-1].ID)
		}
	}
	return vcpus, nil
}
