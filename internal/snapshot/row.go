// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"math"
	"math/bits"
)

// Add adds o, the exits of another thread or another time for the same reason.
// Code and Other stay as they are.
func (r *Row) Add(o Row) {
	r.Count += o.Count
	r.Time += o.Time
	r.User += o.User
	r.Max = max(r.Max, o.Max)
	r.Hist = r.Hist.grow(len(o.Hist))
	for i, n := range o.Hist {
		r.Hist[i] += n
	}
}

// Advance adds to r what was added to an addend of it, from old to now. Unless
// shared is set it may change r.Hist in place: nobody else has that.
func (r *Row) Advance(old, now *Row, shared bool) {
	r.Count += now.Count - old.Count
	r.Time += now.Time - old.Time
	r.User += now.User - old.User
	r.Max = max(r.Max, now.Max)
	if old.Hist.Same(now.Hist) {
		return
	}
	if n := max(len(old.Hist), len(now.Hist)); shared || n > len(r.Hist) {
		r.Hist = r.Hist.grow(n)
	}
	for i, n := range now.Hist {
		r.Hist[i] += n
	}
	for i, n := range old.Hist {
		r.Hist[i] -= n
	}
}

// NewHist copies buckets.
func NewHist(buckets []uint64) Hist { return Hist(buckets).trim().grow(0) }

// trim leaves out the empty buckets at the end.
func (h Hist) trim() Hist {
	n := len(h)
	for n > 0 && h[n-1] == 0 {
		n--
	}
	if n == 0 {
		return nil
	}
	return h[:n]
}

// grow returns a copy that has n buckets or more.
func (h Hist) grow(n int) Hist {
	if n = max(n, len(h)); n == 0 {
		return nil
	}
	c := make(Hist, n)
	copy(c, h)
	return c
}

// Same tells whether both, of one reason, are known to be alike.
func (r *Row) Same(o *Row) bool {
	return r.Count == o.Count && r.Time == o.Time && r.User == o.User && r.Max == o.Max && r.Hist.Same(o.Hist)
}

// Same tells whether both are the same memory.
func (h Hist) Same(o Hist) bool {
	return len(h) == len(o) && (len(h) == 0 || &h[0] == &o[0])
}

// Sub is what was added to r since it was old.
//
// Its Max is exact when a longer exit than ever before was among that. When
// not, all that is known is the histogram's highest bucket in use: Max is then
// that bucket's upper bound, or r.Max when this is less. So it is never below
// the true maximum, and below twice of it, but in the last bucket.
func (r Row) Sub(old Row) Row {
	r.Count -= old.Count
	r.Time -= old.Time
	r.User -= old.User
	if r.Hist.Same(old.Hist) {
		r.Hist = nil
	} else {
		hist := r.Hist.grow(len(old.Hist))
		for i, n := range old.Hist {
			hist[i] -= n
		}
		r.Hist = hist.trim()
	}
	if r.Max == old.Max {
		if len(r.Hist) == 0 {
			r.Max = 0
		} else {
			_, upper := bucket(len(r.Hist) - 1)
			r.Max = min(r.Max, upper)
		}
	}
	return r
}

// Timed is the number of exits whose duration is known.
func (r *Row) Timed() uint64 {
	var sum uint64
	for _, n := range r.Hist {
		sum += n
	}
	return sum
}

// Quantile is the duration, in ticks, that the fraction q of the timed exits did
// not exceed. ok is false when there were none.
//
// The true value lies in the same bucket of the histogram; within it, exits are
// taken to be spread evenly, and none lasted longer than Max. So the result
// errs by less than a factor of two: in bucket 0, by less than
// 1<<(HistShift+1) ticks; in the last bucket it lies between the bucket's lower
// bound and Max. Quantile(1) is Max.
func (r *Row) Quantile(q float64) (ticks uint64, ok bool) {
	timed := r.Timed()
	if timed == 0 {
		return 0, false
	}
	// The rank-th shortest exit is wanted, 1 to timed.
	rank := timed
	if f := math.Ceil(q * float64(timed)); f < float64(timed) {
		rank = max(1, uint64(max(0, f)))
	}
	for i, n := range r.Hist {
		if rank > n {
			rank -= n
			continue
		}
		lower, upper := bucket(i)
		upper = max(lower, min(upper, r.Max))
		// Fits: rank <= n.
		hi, lo := bits.Mul64(upper-lower, rank)
		part, _ := bits.Div64(hi, lo, n)
		return min(lower+part, r.Max), true
	}
	panic("unreachable: rank is at most the sum")
}

// Below estimates how many exits were shorter than ticks: those of a bucket are
// taken to be spread evenly. As exits are added it does not fall, nor as ticks
// grow.
func (h Hist) Below(ticks uint64) uint64 {
	var sum uint64
	for i, n := range h {
		lower, upper := bucket(i)
		if ticks > upper {
			sum += n
			continue
		}
		if ticks > lower {
			// Fits: less than all of the bucket is below.
			hi, lo := bits.Mul64(n, ticks-lower)
			part, _ := bits.Div64(hi, lo, upper-lower+1)
			sum += part
		}
		break
	}
	return sum
}

// bucket is the range of durations, both included, that bucket i counts.
func bucket(i int) (lower, upper uint64) {
	if i > 0 {
		lower = 1 << (HistShift + i)
	}
	if i == NumHist-1 {
		return lower, math.MaxUint64
	}
	return lower, 1<<(HistShift+i+1) - 1
}

// NS converts ticks of a clock that runs at hz to nanoseconds: the whole
// nanoseconds that have passed. 584 years and more are math.MaxUint64.
func NS(ticks, hz uint64) uint64 { return convert(ticks, hz, 1e9) }

// convert converts ticks of one clock to those of another.
func convert(ticks, from, to uint64) uint64 {
	hi, lo := bits.Mul64(ticks, to)
	if hi >= from {
		return math.MaxUint64
	}
	n, _ := bits.Div64(hi, lo, from)
	return n
}
