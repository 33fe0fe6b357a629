// SPDX-License-Identifier: Apache-2.0

// Package snapshot holds what the kernel counted at one moment. It computes;
// it reads no clock and does no I/O.
package snapshot

import (
	"fmt"
	"time"

	"virtexit/internal/exitreason"
)

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

const procTick = uint64(10 * time.Millisecond) // time passes in such steps in /proc

// InProc is the process in the precision of /proc, in which the kernel uses no
// process id twice. Who has it from elsewhere than /proc knows it better.
func (p Process) InProc() Process {
	p.Start -= p.Start % procTick
	return p
}

// Hist counts exits by duration: at most NumHist buckets, without those at the
// end that are empty. Rows share it, so that it is not changed once made.
type Hist []uint64

// Row counts the exits that one thread took for one reason. Its times, in ticks
// of the snapshot's clock, are those that the exits were being handled; not
// those of a halt, of waiting for a CPU, or outside of KVM without an exit.
type Row struct {
	Code  uint32 // of the slot's ISA
	Other bool   // exits of several reasons that found no row of their own; Code says nothing
	Count uint64
	Time  uint64 // of handling, by KVM and by user space
	User  uint64 // of Time, by user space
	Max   uint64 // the longest in Hist
	Hist  Hist   // of those that were timed
}

// Slot holds the counters of one vCPU thread.
type Slot struct {
	ID      SlotID
	Retired bool // the counts are final and wait to be released
	Process Process
	Comm    string // the process's name
	TID     int
	Start   uint64 // of the thread: nanoseconds of CLOCK_BOOTTIME
	VCPU    int    // KVM's number of the vCPU
	ISA     exitreason.ISA
	Since   uint64 // counting began: nanoseconds of CLOCK_BOOTTIME
	Level   Level  // at which it is counted
	Times   Times  // of ended and present stretches of time
	Recent  uint64 // exits logged, of which the latest can be read
	Rows    []Row  // by order of first appearance
}

// Level is how much is collected, of all vCPUs or of one.
type Level uint32

// The levels, each including those before it.
const (
	Off    Level = iota // nothing is attached
	Pause               // slots are kept, nothing is counted
	Count               // exits by reason
	Time                // and their time, and where a vCPU's time goes
	Recent              // and each of the latest exits
)

func (l Level) String() string {
	names := [...]string{Off: "off", Pause: "pause", Count: "count", Time: "time", Recent: "recent"}
	if int(l) < len(names) {
		return names[l]
	}
	return fmt.Sprintf("level(%d)", uint32(l))
}

// Times says where the time of a vCPU thread went, in ticks. Each moment at
// level Time is in one of them.
type Times struct {
	Guest   uint64 // in the guest
	KVM     uint64 // KVM handled an exit
	User    uint64 // user space handled an exit
	Poll    uint64 // KVM polled for the end of a halt
	Halted  uint64
	Wait    uint64 // waiting for a CPU
	Outside uint64 // out of KVM with no exit to handle
}

func (t Times) each(f func(a, b uint64) uint64, o Times) Times {
	return Times{
		Guest:   f(t.Guest, o.Guest),
		KVM:     f(t.KVM, o.KVM),
		User:    f(t.User, o.User),
		Poll:    f(t.Poll, o.Poll),
		Halted:  f(t.Halted, o.Halted),
		Wait:    f(t.Wait, o.Wait),
		Outside: f(t.Outside, o.Outside),
	}
}

// Add returns the sum of both.
func (t Times) Add(o Times) Times {
	return t.each(func(a, b uint64) uint64 { return a + b }, o)
}

// Sub returns what was added since old. A present stretch that has turned out
// to be something else makes one of the times go back: that is then 0.
func (t Times) Sub(old Times) Times {
	return t.each(func(a, b uint64) uint64 { return max(a, b) - b }, old)
}

// Max returns the greater of each.
func (t Times) Max(o Times) Times {
	return t.each(func(a, b uint64) uint64 { return max(a, b) }, o)
}

// Total is the sum of all: the wall time that is accounted for.
func (t Times) Total() uint64 {
	return t.Guest + t.KVM + t.User + t.Poll + t.Halted + t.Wait + t.Outside
}

// Exit is one of a vCPU's latest exits.
type Exit struct {
	Number   uint64 // of those logged, from 0
	Time     uint64 // nanoseconds of CLOCK_BOOTTIME
	Duration uint64 // ticks to the next entry, halts and all
	Present  bool   // no entry has followed; Duration is 0
	Code     uint32 // of the slot's ISA
	RIP      uint64 // of the guest
}

// Snapshot holds all slots in use at one moment, and what was counted outside
// of them. It is not changed once made.
type Snapshot struct {
	TickHz       uint64 // ticks per second of every duration in Slots
	Loaded       uint64 // names this loading of the collector until the host boots again; 0: unknown
	Transient    bool   // the collector ends with the process that reads it
	Counted      uint64 // nanoseconds in which exits were counted, since the collector was loaded
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
