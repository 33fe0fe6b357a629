// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestIn(t *testing.T) {
	of := func(hz, times, longest uint64, hist ...uint64) *Snapshot {
		return &Snapshot{TickHz: hz, Counted: 7, Slots: []Slot{{
			TID: 5, Since: 3, Recent: 9,
			Times: Times{times, times, times, times, times, times, times},
			Rows:  []Row{{Code: 1, Count: 40, Time: times, User: times, Max: longest, Hist: NewHist(hist)}, {Code: 2, Count: 3}},
		}}}
	}
	s := of(1e9, 1000, 700, 10, 0, 30)
	for _, tt := range []struct {
		name string
		want *Snapshot
	}{
		{"the same", s},
		{"twice as fast", of(2e9, 2000, 1400, 0, 10, 0, 30)},
		{"half as fast", of(5e8, 500, 350, 10, 30)},
		{"8 times as slow", of(125e6, 125, 87, 40)},
		{"in between", of(15e8, 1500, 1050, 4, 6, 10, 20)}, // those above 4/3 of a bucket's least go up
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, new(Converter).In(tt.want.TickHz, s)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	if diff := cmp.Diff(of(1e9, 1000, 700, 10, 0, 30), s); diff != "" {
		t.Errorf("it has changed (-was +is):\n%s", diff)
	}
	last := make([]uint64, NumHist)
	last[NumHist-1] = 3
	if h := NewHist(last).shift(2.5); h[NumHist-1] != 3 {
		t.Errorf("the longest are in %v", h)
	}
}

// What has not changed is not converted again, wherever its slot has moved to.
func TestConverterShares(t *testing.T) {
	row := func(code uint32, count uint64) Row {
		return Row{Code: code, Count: count, Time: 9, Hist: NewHist([]uint64{count})}
	}
	first := &Snapshot{TickHz: 1e9, Slots: []Slot{
		{ID: SlotID{Index: 1, Generation: 1}, Rows: []Row{row(1, 5)}},
		{ID: SlotID{Index: 3, Generation: 1}, Rows: []Row{row(1, 5), row(2, 6)}},
		{ID: SlotID{Index: 4, Generation: 1}, Rows: []Row{row(1, 5)}},
	}}
	second := &Snapshot{TickHz: 1e9, Slots: []Slot{
		{ID: SlotID{Index: 2, Generation: 1}, Rows: []Row{row(1, 5)}},
		{ID: SlotID{Index: 3, Generation: 1}, Rows: []Row{first.Slots[1].Rows[0], row(2, 7), row(3, 1)}},
		{ID: SlotID{Index: 4, Generation: 2}, Rows: []Row{row(1, 8)}},
	}}
	for _, tickHz := range []uint64{2e9, 3e9} { // a change of clock begins anew
		var c Converter
		c.In(2e9, first)
		was := c.In(tickHz, first)
		got := c.In(tickHz, second)
		if diff := cmp.Diff(new(Converter).In(tickHz, second), got); diff != "" {
			t.Errorf("not as without the first (-want +got):\n%s", diff)
		}
		if !got.Slots[1].Rows[0].Hist.Same(was.Slots[1].Rows[0].Hist) {
			t.Error("a row that has not changed was converted again")
		}
	}
}
