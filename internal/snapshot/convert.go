// SPDX-License-Identifier: Apache-2.0

package snapshot

import "math"

// Converter turns a collector's snapshots into ticks of another clock. What has not
// gone back between two snapshots does not between the two that it returns, and
// what has not changed is shared by them.
type Converter struct {
	last, converted *Snapshot
}

// In returns the snapshot with its durations in ticks of another clock.
func (c *Converter) In(tickHz uint64, s *Snapshot) *Snapshot {
	if tickHz == s.TickHz {
		return s
	}
	if c.last == nil || c.last.TickHz != s.TickHz || c.converted.TickHz != tickHz {
		c.last, c.converted = &Snapshot{}, &Snapshot{}
	}
	from, out := s.TickHz, *s
	out.TickHz = tickHz
	out.Slots = make([]Slot, len(s.Slots))
	buckets := math.Log2(float64(tickHz) / float64(from))
	next := 0 // of the last one's slots, which mostly are in the same order
	for i, slot := range s.Slots {
		for next < len(c.last.Slots) && c.last.Slots[next].ID.Index < slot.ID.Index {
			next++
		}
		var old, known []Row
		if next < len(c.last.Slots) && c.last.Slots[next].ID == slot.ID {
			old, known = c.last.Slots[next].Rows, c.converted.Slots[next].Rows
		}
		slot.Times = slot.Times.each(func(ticks, _ uint64) uint64 { return convert(ticks, from, tickHz) }, Times{})
		rows := make([]Row, len(slot.Rows))
		for j, r := range slot.Rows {
			if j < len(old) && r.Same(&old[j]) {
				rows[j] = known[j]
				rows[j].Code, rows[j].Other = r.Code, r.Other
				continue
			}
			r.Time, r.User, r.Max = convert(r.Time, from, tickHz), convert(r.User, from, tickHz), convert(r.Max, from, tickHz)
			r.Hist = r.Hist.shift(buckets)
			rows[j] = r
		}
		slot.Rows = rows
		out.Slots[i] = slot
	}
	c.last, c.converted = s, &out
	return &out
}

// shift moves each bucket by so many. Where that is a fraction, its durations go
// into two, as if they lay evenly within it.
func (h Hist) shift(by float64) Hist {
	if len(h) == 0 {
		return nil
	}
	whole := math.Floor(by)
	upper := 2 - math.Exp2(1-(by-whole))
	var to [NumHist]uint64
	add := func(bucket int, n uint64) { to[min(max(bucket, 0), NumHist-1)] += n }
	for i, n := range h {
		up := min(uint64(float64(n)*upper), n)
		add(i+int(whole), n-up)
		add(i+int(whole)+1, up)
	}
	return NewHist(to[:])
}
