// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"math"
	"time"

	"virtexit/internal/slots"
	"virtexit/internal/snapshot"
)

// relation is how the TSC and the programs' clock go together. An exit that is
// told of late has left the TSC at which it occurred.
type relation struct {
	tsc, ns uint64  // a while ago
	age     int     // in ticks
	turn    uint32  // which of the programs' two is in force
	rate    float64 // nanoseconds per cycle
}

const (
	window = 16 // ticks over which the rate is taken
	shift  = 28 // of the rate
	// moment is what the first rate is taken over.
	moment = 20 * time.Millisecond
)

func (c *Collector) pair() (tsc, ns uint64) { return slots.Pair(slots.ReadTSC, c.clock.Ticks) }

// relateSoon relates the clocks again whenever twice the time has passed that the
// rate was taken over: what it may err by then is no more than that of a pair.
func (c *Collector) relateSoon() {
	for after := moment; after < tick; after *= 2 {
		select {
		case <-c.done:
			return
		case <-time.After(after):
		}
		c.mu.Lock()
		if !c.closed && c.attached >= snapshot.Time {
			c.relate()
		}
		c.mu.Unlock()
	}
}

// relate tells the programs the relation.
func (c *Collector) relate() error {
	if slots.ReadTSC() == 0 {
		return nil // there is none
	}
	r := &c.relation
	if r.tsc == 0 {
		r.tsc, r.ns = c.pair()
		time.Sleep(moment)
		c.workers.Go(c.relateSoon)
	}
	tsc, ns := c.pair()
	if tsc <= r.tsc || ns <= r.ns {
		c.relation = relation{turn: r.turn}
		return nil // no TSC to speak of, or it began anew
	}
	r.rate = float64(ns-r.ns) / float64(tsc-r.tsc)
	at := collectorVxTsc{Tsc: tsc, Ns: ns, Mult: uint64(r.rate * (1 << shift))}
	r.turn = 1 - r.turn
	var both [2]collectorVxTsc
	v := c.programs.Variables[collectorVarVxTscs]
	if err := v.Get(&both); err != nil {
		return err
	}
	both[r.turn] = at
	if err := v.Set(&both); err != nil {
		return err
	}
	if r.age++; r.age >= window {
		r.tsc, r.ns, r.age = tsc, ns, 0
	}
	return c.set(collectorVarVxTscNow, r.turn)
}

// cycles converts a variable in nanoseconds, 0 when the rate is not known.
func (c *Collector) cycles(name string) int {
	if c.relation.rate == 0 {
		return 0
	}
	return int(math.Ceil(float64(c.get(name)) / c.relation.rate))
}
