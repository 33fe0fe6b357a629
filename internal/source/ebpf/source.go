// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"fmt"
	"os"
	"sync/atomic"

	"virtexit/internal/abi"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
)

// Source is one use of a Collector.
type Source struct {
	collector *Collector
	events    chan source.Event
	lost      bool // some events
}

var _ source.Source = (*Source)(nil)

// open returns the collector, locked, unless the source is closed.
func (s *Source) open() (*Collector, *lease, error) {
	c := s.collector
	c.mu.Lock()
	l, ok := c.sources[s]
	if !ok {
		c.mu.Unlock()
		return nil, nil, os.ErrClosed
	}
	return c, l, nil
}

// Info tells what is attached.
func (s *Source) Info() (source.Info, error) {
	c, _, err := s.open()
	if err != nil {
		return source.Info{}, err
	}
	defer c.mu.Unlock()
	found, _ := findKVM("/")
	i := source.Info{
		Collector: "ebpf", Version: c.options.Version, Hook: "none",
		Level: c.now.level, ISA: c.now.isa, KVM: found.kvm != 0, Refused: c.now.refused,
		SlotsMax: len(c.region.slots), SlotsBacked: c.backed(),
		ExitCost: c.cycles(collectorVarVxExitCost), EntryCost: c.cycles(collectorVarVxEntryCost),
	}
	if c.attached >= snapshot.Count {
		i.Hook = "tracepoint"
	}
	for slot := range c.backed() {
		switch atomic.LoadUint32(&c.region.slots[slot].State) {
		case abi.Live:
			i.SlotsLive++
		case abi.Retired:
			i.SlotsRetired++
		}
	}
	for _, l := range c.sources {
		if l.level != snapshot.Off {
			i.Leases++
		}
	}
	return i, nil
}

// SetLevel takes, changes or gives up the lease.
func (s *Source) SetLevel(level snapshot.Level) error {
	c, l, err := s.open()
	if err != nil {
		return err
	}
	defer c.mu.Unlock()
	if level > snapshot.Recent {
		return fmt.Errorf("lease of level %d: there is none above %d", level, snapshot.Recent)
	}
	l.level = level
	if level == snapshot.Off {
		l.wishes = nil
	}
	c.update()
	return nil
}

// SetProcessLevel gives the lease a level for one process.
func (s *Source) SetProcessLevel(p snapshot.Process, level *snapshot.Level) error {
	c, l, err := s.open()
	if err != nil {
		return err
	}
	defer c.mu.Unlock()
	switch {
	case l.level == snapshot.Off:
		return fmt.Errorf("level of process %d: the source holds no lease", p.TGID)
	case level == nil:
		delete(l.wishes, p)
	case *level < snapshot.Pause || *level > snapshot.Recent:
		return fmt.Errorf("level of process %d: %v is none", p.TGID, *level)
	default:
		if l.wishes == nil {
			l.wishes = make(map[snapshot.Process]snapshot.Level)
		}
		l.wishes[p] = *level
	}
	c.update()
	return nil
}

// Recent reads the shared memory.
func (s *Source) Recent(id snapshot.SlotID, from uint64) ([]snapshot.Exit, error) {
	c, _, err := s.open()
	if err != nil {
		return nil, err
	}
	defer c.mu.Unlock()
	return c.memory.Recent(id, from)
}

// Snapshot reads the shared memory. Its one system call asks for exits at which
// no program was run.
func (s *Source) Snapshot() (*snapshot.Snapshot, error) {
	c, _, err := s.open()
	if err != nil {
		return nil, err
	}
	defer c.mu.Unlock()
	c.log() // slots that have come since
	snap, err := c.memory.Snapshot()
	if err != nil {
		return nil, err
	}
	snap.Transient = true
	snap.Unattributed += c.misses()
	return snap, nil
}

// Release gives slots back.
func (s *Source) Release(ids []snapshot.SlotID) error {
	c, _, err := s.open()
	if err != nil {
		return err
	}
	defer c.mu.Unlock()
	for _, id := range ids {
		if err := c.free(id); err != nil {
			return fmt.Errorf("release: %w", err)
		}
	}
	return nil
}

// Events returns the channel of events.
func (s *Source) Events() <-chan source.Event { return s.events }

// Close gives up the lease.
func (s *Source) Close() error {
	s.collector.mu.Lock()
	defer s.collector.mu.Unlock()
	s.collector.leave(s)
	return nil
}
