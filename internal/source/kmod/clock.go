// SPDX-License-Identifier: Apache-2.0

package kmod

import (
	"golang.org/x/sys/unix"

	"virtexit/internal/snapshot"
)

// clock tells the time as the module does.
type clock struct {
	tsc  func() uint64 // cycles
	boot func() uint64 // nanoseconds of CLOCK_BOOTTIME
}

func hostClock() clock { return clock{tsc: readTSC, boot: bootTime} }

func bootTime() uint64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic(err) // Linux has had it since 2.6.39
	}
	return uint64(t.Nano())
}

// moment is one point of time on both clocks.
type moment struct{ tsc, boot uint64 }

// now reads both clocks. Something may come between the two readings, so the
// closest pair of some is taken.
func (c clock) now() moment {
	var best moment
	least := ^uint64(0)
	for range 4 {
		before := c.tsc()
		boot := c.boot()
		if gap := c.tsc() - before; gap < least {
			least, best = gap, moment{before + gap/2, boot}
		}
	}
	return best
}

// bootTime converts cycles, of which hz make a second.
func (m moment) bootTime(tsc, hz uint64) uint64 {
	if tsc > m.tsc {
		return m.boot + snapshot.NS(tsc-m.tsc, hz)
	}
	return m.boot - min(m.boot, snapshot.NS(m.tsc-tsc, hz))
}
