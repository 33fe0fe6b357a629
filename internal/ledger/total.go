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
	Time      uint64                      // nanoseconds of CLOCK_BOOTTIME
	TickHz    uint64                      // ticks per second of every duration that the kernel measured
	Counted   uint64                      // nanoseconds in which exits were counted, by all collectors
	Processes map[snapshot.Process]*Total // InProc
	Totals    Totals
}

// Total holds the counts of one process: since it was first counted, or
// between two views.
type Total struct {
	Process snapshot.Process // as the collector knows it
	Comm    string           // the process's name
	Since   uint64           // counting began: nanoseconds of CLOCK_BOOTTIME
	Seen    uint64           // it was last counted: the same; negative, that is, wrapped around, before the host booted
	Wall    uint64           // the nanoseconds that the counts cover
	Span    uint64           // of Wall, those observed: exits were counted
	Live    bool             // it has slots in use
	Level   snapshot.Level   // the highest of those; Off when there are none
	Exits   uint64
	Times   snapshot.Times // of all vCPUs
	VCPUs   []VCPU         // by number
	Rows    []Row          // one for each reason, by order of first appearance
}

// VCPU holds the counts of one vCPU, whichever threads ran it.
type VCPU struct {
	ID    int // KVM's number
	TID   int // the thread that ran it last
	Exits uint64
	// Times never go back, although the present stretch of time may turn out to
	// be another one than it seemed: what it seemed to be then stands still until
	// it is overtaken, and the sum is that much too high.
	Times snapshot.Times
	since uint64         // of TID's slot
	sum   snapshot.Times // of all slots, as each was last seen
}

// Row holds the exits of one process for one reason.
type Row struct {
	ISA exitreason.ISA
	snapshot.Row
}

// find returns the index of the row that counts the same reason, or -1.
func find(rows []Row, isa exitreason.ISA, row *snapshot.Row) int {
	for i := range rows {
		r := &rows[i]
		if r.ISA == isa && r.Other == row.Other && (r.Code == row.Code || r.Other) {
			return i
		}
	}
	return -1
}

func (t *Total) vcpu(id int) (i int, ok bool) {
	return slices.BinarySearchFunc(t.VCPUs, id, func(v VCPU, id int) int { return cmp.Compare(v.ID, id) })
}

// Find returns the total's row for the reason of r, or nil.
func (t *Total) Find(r *Row) *Row {
	if i := find(t.Rows, r.ISA, &r.Row); i >= 0 {
		return &t.Rows[i]
	}
	return nil
}

// next returns a copy to be changed by advance.
func (t *Total) next() *Total {
	n := *t
	n.Live, n.Level = false, snapshot.Off
	n.VCPUs = slices.Clone(t.VCPUs)
	n.Rows = slices.Clone(t.Rows)
	return &n
}

// advance enters what a slot has counted since it was old, which is nil for a new
// one. t is the next of last, and shares its histograms until they change.
func (t *Total) advance(last *Total, old, s *snapshot.Slot) {
	i, ok := t.vcpu(s.VCPU)
	if !ok {
		t.VCPUs = slices.Insert(t.VCPUs, i, VCPU{ID: s.VCPU, TID: s.TID, since: s.Since})
	}
	v := &t.VCPUs[i]
	if s.Since > v.since {
		v.TID, v.since = s.TID, s.Since
	}
	t.Process, t.Comm = s.Process, s.Comm
	t.Since = min(t.Since, s.Since)
	if !s.Retired {
		t.Live = true
		t.Level = max(t.Level, s.Level)
	}
	v.sum = v.sum.Add(s.Times)
	if old != nil {
		v.sum = v.sum.Sub(old.Times)
	}
	var none snapshot.Row
	for i := range s.Rows {
		r, was := &s.Rows[i], &none
		if old != nil && i < len(old.Rows) {
			was = &old.Rows[i]
		}
		if r.Same(was) {
			continue // as for most reasons in most seconds
		}
		t.Exits += r.Count - was.Count
		v.Exits += r.Count - was.Count
		j := find(t.Rows, s.ISA, r)
		if j < 0 {
			j = len(t.Rows)
			t.Rows = append(t.Rows, Row{s.ISA, snapshot.Row{Code: r.Code, Other: r.Other}})
		}
		have := &t.Rows[j].Row
		have.Advance(was, r, j < len(last.Rows) && have.Hist.Same(last.Rows[j].Hist))
	}
}

// sumTimes keeps the times of vCPUs from going back, and adds them up.
func (t *Total) sumTimes() {
	t.Times = snapshot.Times{}
	for i := range t.VCPUs {
		v := &t.VCPUs[i]
		v.Times = v.Times.Max(v.sum)
		t.Times = t.Times.Add(v.Times)
	}
}

// Sub returns what was counted after old, an earlier total of the same process
// or nil. vCPUs that did not run stay, reasons that did not occur are left out.
func (t *Total) Sub(old *Total) *Total {
	d := *t
	if old == nil {
		return &d
	}
	d.Wall -= old.Wall
	d.Span -= old.Span
	d.Exits -= old.Exits
	d.Times = d.Times.Sub(old.Times)
	d.VCPUs = slices.Clone(t.VCPUs)
	for i := range d.VCPUs {
		v := &d.VCPUs[i]
		if j, ok := old.vcpu(v.ID); ok {
			o := &old.VCPUs[j]
			v.Exits -= o.Exits
			v.Times = v.Times.Sub(o.Times)
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
