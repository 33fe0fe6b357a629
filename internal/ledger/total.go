// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"cmp"
	"slices"

	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
)

// View is the ledger at one moment. It is not changed once made.
type View struct {
	Time      uint64 // nanoseconds of CLOCK_BOOTTIME
	TickHz    uint64 // ticks per second of every duration that the kernel measured
	Processes map[snapshot.Process]*Total
	Totals    Totals
}

// Total holds the counts of one process: since it was first counted, or
// between two views.
type Total struct {
	Process   snapshot.Process
	Comm      string // the process's name
	Since     uint64 // counting began: nanoseconds of CLOCK_BOOTTIME
	Span      uint64 // the nanoseconds that the counts cover
	Live      bool   // it is being counted
	Exits     uint64
	GuestTime uint64 // ticks in the guest, all vCPUs
	VCPUs     []VCPU // by number
	Rows      []Row  // one for each reason, in no order
}

// VCPU holds the counts of one vCPU, whichever threads ran it.
type VCPU struct {
	ID        int // KVM's number
	TID       int // the thread that ran it last
	Exits     uint64
	Time      uint64 // ticks from exit to entry
	GuestTime uint64 // ticks in the guest
	since     uint64 // of TID's slot
}

// Row holds the exits of one process for one reason.
type Row struct {
	ISA exitreason.ISA
	snapshot.Row
}

// find returns the row that counts the same reason, or nil.
func find(rows []Row, isa exitreason.ISA, row *snapshot.Row) *Row {
	for i := range rows {
		r := &rows[i]
		if r.ISA == isa && r.Other == row.Other && (r.Code == row.Code || r.Other) {
			return r
		}
	}
	return nil
}

// Find returns the total's row for the reason of r, or nil.
func (t *Total) Find(r *Row) *Row { return find(t.Rows, r.ISA, &r.Row) }

func (t *Total) clone() *Total {
	c := *t
	c.VCPUs = slices.Clone(t.VCPUs)
	c.Rows = slices.Clone(t.Rows)
	return &c
}

// add enters a slot's counts.
func (t *Total) add(s *snapshot.Slot) {
	i, ok := slices.BinarySearchFunc(t.VCPUs, s.VCPU, func(v VCPU, id int) int { return cmp.Compare(v.ID, id) })
	if !ok {
		t.VCPUs = slices.Insert(t.VCPUs, i, VCPU{ID: s.VCPU, TID: s.TID, since: s.Since})
	}
	v := &t.VCPUs[i]
	if s.Since > v.since {
		v.TID, v.since = s.TID, s.Since
	}
	t.Comm = s.Comm
	t.Since = min(t.Since, s.Since)
	t.GuestTime += s.GuestTime
	v.GuestTime += s.GuestTime
	for i := range s.Rows {
		r := &s.Rows[i]
		t.Exits += r.Count
		v.Exits += r.Count
		v.Time += r.Time
		if have := find(t.Rows, s.ISA, r); have != nil {
			have.Add(*r)
		} else {
			t.Rows = append(t.Rows, Row{s.ISA, *r})
		}
	}
}

// Sub returns what was counted after old, an earlier total of the same process
// or nil. vCPUs that did not run stay, reasons that did not occur are left out.
func (t *Total) Sub(old *Total) *Total {
	d := *t
	if old == nil {
		return &d
	}
	d.Span -= old.Span
	d.Exits -= old.Exits
	d.GuestTime -= old.GuestTime
	d.VCPUs = slices.Clone(t.VCPUs)
	for i := range d.VCPUs {
		v := &d.VCPUs[i]
		if j, ok := slices.BinarySearchFunc(old.VCPUs, v.ID, func(v VCPU, id int) int { return cmp.Compare(v.ID, id) }); ok {
			o := &old.VCPUs[j]
			v.Exits -= o.Exits
			v.Time -= o.Time
			v.GuestTime -= o.GuestTime
		}
	}
	d.Rows = make([]Row, 0, len(t.Rows))
	for i := range t.Rows {
		r := t.Rows[i]
		if o := old.Find(&r); o != nil {
			r.Row = r.Row.Sub(o.Row)
		}
		// An exit that was being handled at the start has time but no count.
		if r.Count > 0 || r.Time > 0 {
			d.Rows = append(d.Rows, r)
		}
	}
	return &d
}
