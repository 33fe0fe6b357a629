// SPDX-License-Identifier: Apache-2.0

package slots

import (
	"golang.org/x/sys/unix"

	"virtexit/internal/snapshot"
)

// Clock tells the time as who counts does.
type Clock struct {
	Ticks func() uint64 // of which the header says how many make a second
	Boot  func() uint64 // nanoseconds of CLOCK_BOOTTIME
}

// TSC is the clock of what reads the CPU's time stamp counter.
func TSC() Clock {
	return Clock{Ticks: ReadTSC, Boot: func() uint64 { return clockTime(unix.CLOCK_BOOTTIME) }}
}

// Monotonic is the clock of what reads CLOCK_MONOTONIC, in nanoseconds.
func Monotonic() Clock {
	return Clock{
		Ticks: func() uint64 { return clockTime(unix.CLOCK_MONOTONIC) },
		Boot:  func() uint64 { return clockTime(unix.CLOCK_BOOTTIME) },
	}
}

func clockTime(id int32) uint64 {
	var t unix.Timespec
	if err := unix.ClockGettime(id, &t); err != nil {
		panic(err) // Linux has had both since 2.6.39
	}
	return uint64(t.Nano())
}

// moment is one point of time on both clocks.
type moment struct{ ticks, boot uint64 }

// now reads both clocks.
func (c Clock) now() moment {
	ticks, boot := Pair(c.Ticks, c.Boot)
	return moment{ticks, boot}
}

// Pair reads two clocks at one moment. Something may come between the two
// readings, so the closest pair of some is taken.
func Pair(a, b func() uint64) (uint64, uint64) {
	var bestA, bestB uint64
	least := ^uint64(0)
	for range 4 {
		before := a()
		at := b()
		if gap := a() - before; gap < least {
			least, bestA, bestB = gap, before+gap/2, at
		}
	}
	return bestA, bestB
}

// bootTime converts ticks, of which hz make a second.
func (m moment) bootTime(ticks, hz uint64) uint64 {
	if ticks > m.ticks {
		return m.boot + snapshot.NS(ticks-m.ticks, hz)
	}
	return m.boot - min(m.boot, snapshot.NS(m.ticks-ticks, hz))
}
