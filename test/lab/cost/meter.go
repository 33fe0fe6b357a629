// SPDX-License-Identifier: Apache-2.0

package cost

import (
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"virtexit/test/lab/guest"
)

// Exit is a kind of exit that a Meter can cause.
type Exit string

// The kinds of exits.
const (
	CPUID     Exit = "cpuid"      // leaf 0
	IO        Exit = "io"         // a write to a port that KVM handles itself: an ioeventfd, as of a virtio device
	IOUser    Exit = "io-user"    // a write to a port that KVM hands to user space
	MSR       Exit = "msr"        // a read of IA32_APIC_BASE
	PageFault Exit = "page-fault" // the first touch of a page that the host has and KVM has not mapped
)

// Exits holds all kinds.
var Exits = []Exit{CPUID, IO, IOUser, MSR, PageFault}

// eventPort is that of IO.
const eventPort = 0x5f0

// A kind is measured in rounds; an interrupt of the host falls into few of a round's exits. The first round, which finds
// caches and pools empty, does not count.
const (
	rounds = 4
	many   = 3000
)

// Meter has a guest that takes exits and counts instructions.
type Meter struct {
	vm    *guest.VM
	event *os.File
}

// NewMeter makes the guest. KVM must be loaded.
func NewMeter() (*Meter, error) {
	vm, err := guest.NewVM(1)
	if err != nil {
		return nil, err
	}
	event, err := vm.EventPort(eventPort)
	if err != nil {
		return nil, errors.Join(err, vm.Close())
	}
	return &Meter{vm, event}, nil
}

// Close ends the guest.
func (m *Meter) Close() error { return errors.Join(m.vm.Close(), m.event.Close()) }

// TID is the thread that takes the exits.
func (m *Meter) TID() int { return m.vm.VCPUs[0].TID() }

// Cost is what exits of one kind take, each with the entry that follows it.
type Cost struct {
	// Least is the least number of instructions, host's and guest's, of an exit among Exits: the guest reads the counter
	// before and after each. It leaves out the host's interrupts, and whatever else happens not at every exit.
	Least int
	// Mean is all that the machine executed meanwhile, other processes included, by exit. It varies a little.
	Mean float64
	// Exits is how many there were.
	Exits int
}

// Cost takes many exits of a kind.
func (m *Meter) Cost(kind Exit) (Cost, error) {
	var op guest.Op
	switch kind {
	case CPUID:
		op = guest.CPUID(0, many)
	case IO:
		op = guest.Out(eventPort, many)
	case IOUser:
		op = guest.Out(0x80, many)
	case MSR:
		op = guest.RDMSR(0x1b, many)
	case PageFault:
		op = guest.Touch(0, guest.FreshPages)
	default:
		return Cost{}, fmt.Errorf("unknown exit %q", kind)
	}
	op.Timed = true
	p := guest.Program{Ops: []guest.Op{op}}
	v := m.vm.VCPUs[0]
	cost := Cost{Least: math.MaxInt}
	var all time.Duration
	for round := range 1 + rounds {
		if kind == PageFault {
			if err := m.vm.Fresh(); err != nil {
				return Cost{}, err
			}
		}
		start := time.Now()
		if err := v.Run(p); err != nil {
			return Cost{}, err
		}
		took := time.Since(start)
		least, err := v.Least()
		if err != nil {
			return Cost{}, err
		}
		if round > 0 {
			cost.Least = min(cost.Least, int(least))
			cost.Exits += int(op.N)
			all += took
		}
	}
	cost.Mean = float64(all.Nanoseconds()) / float64(cost.Exits) // one instruction takes one
	return cost, nil
}
