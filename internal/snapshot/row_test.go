// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"math"
	"math/big"
	"math/bits"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// row counts exits that lasted so long, as the kernel does.
func row(durations ...uint64) Row {
	var r Row
	var hist [NumHist]uint64
	for _, d := range durations {
		r.Count++
		r.Time += d
		r.User += d / 3
		r.Max = max(r.Max, d)
		hist[bucketOf(d)]++
	}
	r.Hist = NewHist(hist[:])
	return r
}

// bucketOf follows the ABI's prose: bucket i holds [2^(HistShift+i), 2^(HistShift+i+1)).
func bucketOf(d uint64) int {
	return min(max(bits.Len64(d)-1-HistShift, 0), NumHist-1)
}

// durations of any magnitude, the lower ones more often.
func durations(r *rand.Rand) []uint64 {
	d := make([]uint64, r.IntN(40))
	for i := range d {
		d[i] = r.Uint64() >> (r.IntN(38) + 26)
		if r.IntN(50) == 0 {
			d[i] = r.Uint64() >> r.IntN(4)
		}
	}
	return d
}

func TestBucket(t *testing.T) {
	tests := []struct {
		name         string
		i            int
		lower, upper uint64
	}{
		{"first", 0, 0, 511},
		{"second", 1, 512, 1023},
		{"last but one", NumHist - 2, 1 << 32, 1<<33 - 1},
		{"last", NumHist - 1, 1 << 33, math.MaxUint64},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if lower, upper := bucket(tt.i); lower != tt.lower || upper != tt.upper {
				t.Errorf("bucket(%d) = %d, %d, want %d, %d", tt.i, lower, upper, tt.lower, tt.upper)
			}
		})
	}
	for i := range NumHist {
		lower, upper := bucket(i)
		if bucketOf(lower) != i || bucketOf(upper) != i {
			t.Errorf("bucket(%d) = %d, %d, which are in %d, %d", i, lower, upper, bucketOf(lower), bucketOf(upper))
		}
	}
}

func TestSub(t *testing.T) {
	tests := []struct {
		name     string
		old, new []uint64 // durations before and since
		max      uint64   // of the difference
	}{
		{"nothing", []uint64{600}, nil, 0},
		{"first", nil, []uint64{600}, 600},
		{"longer than ever", []uint64{600}, []uint64{700, 20}, 700},
		{"shorter", []uint64{5000}, []uint64{600, 700}, 1023},
		{"same bucket as the maximum", []uint64{1000}, []uint64{600}, 1000},
		{"as long as the longest", []uint64{600}, []uint64{600}, 600},
		{"last bucket", []uint64{1 << 40}, []uint64{1 << 39}, 1 << 40},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			want := row(tt.new...)
			want.Max = tt.max
			got := row(slices.Concat(tt.old, tt.new)...).Sub(row(tt.old...))
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("difference (-want +got):\n%s", diff)
			}
		})
	}

	t.Run("untimed", func(t *testing.T) {
		got := Row{Code: 10, Count: 5}.Sub(Row{Code: 10, Count: 3})
		if diff := cmp.Diff(Row{Code: 10, Count: 2}, got); diff != "" {
			t.Errorf("difference (-want +got):\n%s", diff)
		}
	})
}

func TestAddSub(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		before, since := durations(r), durations(r)
		old, part, all := row(before...), row(since...), row(slices.Concat(before, since)...)
		old.Code, part.Code, all.Code = 48, 48, 48

		sum := old
		sum.Add(part)
		if diff := cmp.Diff(all, sum); diff != "" {
			t.Fatalf("%v Add %v (-want +got):\n%s", before, since, diff)
		}

		delta := all.Sub(old)
		if delta.Max < part.Max || delta.Max > all.Max ||
			delta.Max > 511 && bucketOf(delta.Max) < NumHist-1 && delta.Max >= 2*part.Max {
			t.Fatalf("%v Sub %v: maximum %d, the true one is %d", all, before, delta.Max, part.Max)
		}
		if part.Max > old.Max && delta.Max != part.Max {
			t.Fatalf("%v Sub %v: maximum %d grew to %d", all, before, part.Max, delta.Max)
		}
		advanced := row(70, 1<<20)
		base := advanced
		advanced.Add(old)
		advanced.Advance(&old, &all, false)
		base.Add(all)
		if diff := cmp.Diff(base, advanced); diff != "" {
			t.Fatalf("%v Advance by %v (-want +got):\n%s", before, since, diff)
		}

		back := old
		back.Add(delta)
		if diff := cmp.Diff(all, back); diff != "" {
			t.Fatalf("%v Add of its Sub (-want +got):\n%s", before, diff)
		}
		delta.Max = part.Max
		if diff := cmp.Diff(part, delta); diff != "" {
			t.Fatalf("%v Sub %v (-want +got):\n%s", all, before, diff)
		}
	}
}

func TestQuantile(t *testing.T) {
	tests := []struct {
		name string
		row  Row
		q    float64
		want uint64
		ok   bool
	}{
		{"no exit", row(), 0.5, 0, false},
		{"no timed exit", Row{Count: 5}, 0.5, 0, false},
		{"one exit", row(700), 0.5, 700, true},
		{"half of a bucket", row(520, 600, 700, 9000), 0.25, 512 + 511/3, true},
		{"all of a bucket", row(520, 600, 700, 9000), 0.75, 1023, true},
		{"the longest", row(520, 600, 700, 9000), 0.99, 9000, true},
		{"one", row(520, 600, 700, 9000), 1, 9000, true},
		{"more than one", row(520, 600, 700, 9000), 2, 9000, true},
		{"zero", row(520, 9000), 0, 1023, true},
		{"negative", row(520, 9000), -1, 1023, true},
		{"not a number", row(520, 9000), math.NaN(), 9000, true},
		{"last bucket", row(1<<40, 1<<41), 0.5, 1<<33 + (1<<41-1<<33)/2, true},
		{"counts beyond float64", Row{Max: 300, Hist: Hist{math.MaxUint64}}, 1, 300, true},
		{"maximum not yet stored", Row{Max: 300, Hist: Hist{0, 1}}, 0.5, 300, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got, ok := tt.row.Quantile(tt.q); got != tt.want || ok != tt.ok {
				t.Errorf("Quantile(%v) = %d, %t, want %d, %t", tt.q, got, ok, tt.want, tt.ok)
			}
		})
	}
}

// The quantile of the exits themselves lies in the same bucket as the estimate,
// which never falls as q grows.
func TestQuantileBounds(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 2000 {
		d := append(durations(r), r.Uint64())
		slices.Sort(d)
		counted := row(d...)
		var last uint64
		for q := 0.0; q <= 1; q += 1.0 / 64 {
			got, ok := counted.Quantile(q)
			exact := d[max(1, int(math.Ceil(q*float64(len(d)))))-1]
			if !ok || bucketOf(got) != bucketOf(exact) || got > counted.Max || got < last {
				t.Fatalf("Quantile(%v) of %v = %d, %t after %d: the exact value is %d", q, d, got, ok, last, exact)
			}
			last = got
		}
		if last != counted.Max {
			t.Fatalf("Quantile(1) of %v = %d, want the maximum", d, last)
		}
	}
}

func TestBelow(t *testing.T) {
	tests := []struct {
		name  string
		hist  Hist
		ticks uint64
		want  uint64
	}{
		{"no exit", nil, 1000, 0},
		{"none", Hist{7}, 0, 0},
		{"part of the first bucket", Hist{8}, 256, 4},
		{"all of the first bucket", Hist{8, 5}, 512, 8},
		{"half of the second", Hist{8, 5}, 768, 10},
		{"all", Hist{8, 5}, 1024, 13},
		{"beyond the last", Hist{8, 5}, math.MaxUint64, 13},
		{"hardly any of the last bucket", Hist{NumHist - 1: 9}, 1 << 40, 0},
		{"many", Hist{math.MaxUint64}, 511, math.MaxUint64/512*511 + 511 - 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.hist.Below(tt.ticks); got != tt.want {
				t.Errorf("%v.Below(%d) = %d, want %d", tt.hist, tt.ticks, got, tt.want)
			}
		})
	}

	// The estimate is off by exits of one bucket at the most, and never falls.
	r := rand.New(rand.NewPCG(7, 8))
	for range 2000 {
		d := durations(r)
		before, after := row(d[:len(d)/2]...), row(d...)
		var last uint64
		for ticks := uint64(1); ticks < 1<<40; ticks += ticks/3 + 1 {
			var exact, close uint64
			for _, x := range d {
				switch {
				case bucketOf(x) == bucketOf(ticks):
					close++
				case x < ticks:
					exact++
				}
			}
			got := after.Hist.Below(ticks)
			if got < last || got < exact || got > exact+close || got < before.Hist.Below(ticks) {
				t.Fatalf("%v: %d below %d after %d, the exact number is %d to %d", d, got, ticks, last, exact, exact+close)
			}
			last = got
		}
	}
}

func TestNS(t *testing.T) {
	tests := []struct {
		name            string
		ticks, hz, want uint64
	}{
		{"nothing", 0, 2_000_000_000, 0},
		{"half a nanosecond", 1, 2_000_000_000, 0},
		{"one second", 2_000_000_000, 2_000_000_000, 1_000_000_000},
		{"rounds down", 2_999, 3_000_000_000, 999},
		{"a year at 3 GHz", 3_000_000_000 * 86400 * 365, 3_000_000_000, 1_000_000_000 * 86400 * 365},
		{"all ticks at 1 GHz", math.MaxUint64, 1_000_000_000, math.MaxUint64},
		{"all ticks at 4 GHz", math.MaxUint64, 4_000_000_000, math.MaxUint64 / 4},
		{"too many", math.MaxUint64, 999_999_999, math.MaxUint64},
		{"no clock", 1, 0, math.MaxUint64},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := NS(tt.ticks, tt.hz); got != tt.want {
				t.Errorf("NS(%d, %d) = %d, want %d", tt.ticks, tt.hz, got, tt.want)
			}
		})
	}

	r := rand.New(rand.NewPCG(5, 6))
	for range 2000 {
		ticks, hz := r.Uint64(), 1+r.Uint64()>>r.IntN(63)
		want := new(big.Int).SetUint64(ticks)
		want.Mul(want, big.NewInt(1e9)).Div(want, new(big.Int).SetUint64(hz))
		got := NS(ticks, hz)
		if want.IsUint64() && got != want.Uint64() || !want.IsUint64() && got != math.MaxUint64 {
			t.Fatalf("NS(%d, %d) = %d, want %v", ticks, hz, got, want)
		}
	}
}

func TestExits(t *testing.T) {
	s := Snapshot{
		Slots: []Slot{
			{Rows: []Row{{Code: 10, Count: 5}, {Code: 12, Count: 7}}},
			{Retired: true, Rows: []Row{{Code: 10, Count: 11}}},
			{},
		},
		Released: 100, Unattributed: 1000, Refused: 10000,
	}
	if got, want := s.Slots[0].Exits(), uint64(12); got != want {
		t.Errorf("exits of the slot: %d, want %d", got, want)
	}
	if got, want := s.Exits(), uint64(11123); got != want {
		t.Errorf("exits of the snapshot: %d, want %d", got, want)
	}
}
