// SPDX-License-Identifier: Apache-2.0

// Package snapshot holds what the kernel counted at one moment. It computes;
// it reads no clock and does no I/O.
package snapshot

import "virtexit/internal/exitreason"

// NumHist is the number of buckets of a duration histogram.
const NumHist = 26

// HistShift places the histogram's buckets: bucket 0 counts durations below
// 1<<(HistShift+1) ticks, bucket i those in [1<<(HistShift+i),
// 1<<(HistShift+i+1)), the last one all longer ones.
const HistShift = 8

// SlotID names one use of a slot.
type SlotID struct {
	Index      uint32
	Generation uint32
}

// Process identifies a process for good: process ids are reused.
type Process struct {
	TGID  int    // in the initial pid namespace
	Start uint64 // nanoseconds of CLOCK_BOOTTIME
}

// Row counts the exits that one thread took for one reason. Durations, from
// exit to the next entry, are in ticks of the snapshot's clock.
type Row struct {
	Code  uint32 // of the slot's ISA
	Other bool   // exits of several reasons that found no row of their own; Code says nothing
	Count uint64
	Time  uint64 // sum of the durations in Hist
	Max   uint64
	Hist  [NumHist]uint64
}

// Slot holds the counters of one vCPU thread.
type Slot struct {
	ID        SlotID
	Retired   bool // the counts are final and wait to be released
	Process   Process
	Comm      string // the process's name
	TID       int
	Start     uint64 // of the thread: nanoseconds of CLOCK_BOOTTIME
	VCPU      int    // KVM's number of the vCPU
	ISA       exitreason.ISA
	Since     uint64 // counting began: nanoseconds of CLOCK_BOOTTIME
	GuestTime uint64 // ticks in the guest
	Rows      []Row
}

// Snapshot holds all slots in use at one moment, and what was counted outside
// of them. It is not changed once made.
type Snapshot struct {
	TickHz       uint64 // ticks per second of every duration in Slots
	Slots        []Slot
	Released     uint64 // exits in slots that were released earlier
	Unattributed uint64 // exits that found no slot
	Refused      uint64 // exits whose reason did not agree with KVM's own
}

// Exits is the number of exits in the slot.
func (s *Slot) Exits() uint64 {
	var n uint64
	for i := range s.Rows {
		n += s.Rows[i].Count
	}
	return n
}

// Exits is the number of exits that the kernel has seen since its collector
// was loaded.
func (s *Snapshot) Exits() uint64 {
	n := s.Released + s.Unattributed + s.Refused
	for i := range s.Slots {
		n += s.Slots[i].Exits()
	}
	return n
}
