// SPDX-License-Identifier: Apache-2.0

// Package source is how exit counts come out of the kernel: one interface,
// one package below this one for each way.
package source

import (
	"errors"

	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
)

// ErrUnavailable says that this host cannot serve the source now, for instance
// because the kernel module is not loaded. It may come later.
var ErrUnavailable = errors.New("collector not available")

// ErrGone says that an open source has ended, for instance because the kernel
// module was unloaded. Close it and open another.
var ErrGone = errors.New("collector gone")

// ErrStale says that a slot can't be released: it is in use, or has been
// released already.
var ErrStale = errors.New("slot not retired")

// Info describes a source and its state.
type Info struct {
	Collector    string         // "kmod", "ebpf", "kvmstats", "replay"
	Version      string         // of the collector
	Hook         string         // "none", "tracepoint", "patch"
	Level        snapshot.Level // in force
	ISA          exitreason.ISA // of the exits counted; None when KVM is not there
	KVM          bool           // KVM is loaded
	Refused      string         // why KVM is there but is not counted; empty when it is
	SlotsMax     int
	SlotsLive    int
	SlotsRetired int
	SlotsBacked  int
	Leases       int
	ExitCost     int // cycles that the hook takes at an exit, at the least; 0 when unknown
	EntryCost    int // the same at an entry
}

// Event says that something about the source changed.
type Event struct {
	Kind    EventKind
	Slot    snapshot.SlotID // VCPUNew, VCPURetired
	Process int             // tgid; VCPUNew, VCPURetired
	TID     int             // VCPUNew, VCPURetired
	VCPU    int             // VCPUNew, VCPURetired
}

// EventKind tells what an Event is about.
type EventKind int

// The kinds of events.
const (
	VCPUNew     EventKind = iota + 1 // a vCPU thread took its first exit
	VCPURetired                      // its counts are final
	KVMChanged                       // KVM came or went, was refused, or the level changed
	Lost                             // events were lost: take a snapshot
)

// Source is one collector. Its methods may be called from any goroutine.
type Source interface {
	// Info tells the present state.
	Info() (Info, error)
	// SetLevel asks for a level until it is called again or the source closes.
	SetLevel(snapshot.Level) error
	// SetProcessLevel asks for another level, not Off, for one process's vCPUs;
	// nil takes that back. While SetLevel asks for Off it fails.
	SetProcessLevel(snapshot.Process, *snapshot.Level) error
	// Recent returns the latest exits of a slot, latest first, down to number
	// from. What is missing between from and the last of them has been
	// overwritten. The slot may be retired; when it has been released since,
	// the error is ErrStale.
	Recent(id snapshot.SlotID, from uint64) ([]snapshot.Exit, error)
	// Snapshot reads all counters.
	Snapshot() (*snapshot.Snapshot, error)
	// Release gives retired slots back, whose counts the caller has kept. At
	// the first that is not retired it ends with ErrStale; those before it have
	// been released.
	Release([]snapshot.SlotID) error
	// Events returns the channel of events, each time the same. It is closed
	// when the source ends.
	Events() <-chan Event
	// Close ends collection on behalf of this source.
	Close() error
}
