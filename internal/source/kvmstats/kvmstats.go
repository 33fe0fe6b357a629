// SPDX-License-Identifier: Apache-2.0

// Package kvmstats is the last resort: KVM's own statistics, which libvirt has
// from QEMU. They tell how often each vCPU of libvirt's domains has exited, but
// neither why nor for how long. A count is that of the latest reading, so that a
// change of level takes effect at a reading, too. A slot's vCPU has libvirt's
// number, where other collectors tell KVM's.
package kvmstats

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"virtexit/internal/snapshot"
	"virtexit/internal/source"
	"virtexit/vmmap"
)

// ErrCount says why there is no log.
var ErrCount = errors.New("the collector kvmstats counts exits and knows neither their time nor the latest ones")

// Why nothing is counted.
const (
	untold   = "libvirt tells no exits of any domain: that takes QEMU 7.1 and libvirt 8.9, or later, and KVM"
	unusable = "kvm is loaded without a vendor module (such as kvm_amd, kvm_intel)"
)

// seek is how often it is asked who a run is.
const seek = time.Second

// Options are what a Source is made of.
type Options struct {
	Root     string // of the file system: /sys is there
	Version  string
	Exits    func() vmmap.Exits    // the latest reading, at once; it asks for the next one
	Domains  func() []vmmap.Domain // that run
	Thread   func(tid int) (comm string, start uint64, err error)
	BootTime func() time.Duration
}

// Source counts while it is open.
type Source struct {
	options Options
	loaded  uint64
	events  chan source.Event

	mu       sync.Mutex
	closed   bool
	level    snapshot.Level // Count at most
	wishes   map[snapshot.Process]snapshot.Level
	began    time.Duration // counting, by CLOCK_BOOTTIME; readings before that are of no use
	last     time.Duration // the latest reading; 0: none since began
	counted  time.Duration
	told     map[vcpu]uint64 // by the latest reading that told it; since began
	sought   time.Duration   // who a run is that nobody knew
	ever     bool            // libvirt told of exits
	refused  string
	slots    []*slot
	live     map[thread]*slot
	uses     uint32
	released uint64
}

var _ source.Source = (*Source)(nil)

// vcpu is what KVM keeps a statistic of. Where the vCPU is unplugged and plugged
// in again, that goes on with another thread.
type vcpu struct {
	process snapshot.Process
	number  int
}

type thread struct {
	process snapshot.Process
	tid     int
}

type slot struct {
	snapshot.Slot
	exits uint64
}

// New returns a source that counts nothing yet.
func New(o Options) *Source {
	return &Source{options: o, loaded: uint64(o.BootTime()), events: make(chan source.Event, 64), live: make(map[thread]*slot)}
}

// lock locks the source, unless it is closed.
func (s *Source) lock() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return os.ErrClosed
	}
	return nil
}

// Info tells whether libvirt does.
func (s *Source) Info() (source.Info, error) {
	if err := s.lock(); err != nil {
		return source.Info{}, err
	}
	defer s.mu.Unlock()
	i := source.Info{
		Collector: "kvmstats", Version: s.options.Version, Hook: "none", Level: s.level, KVM: s.has("module/kvm"),
		SlotsBacked: len(s.slots), SlotsLive: len(s.live), SlotsRetired: len(s.slots) - len(s.live),
	}
	if s.level == snapshot.Off {
		return i, nil
	}
	i.Leases, i.Refused = 1, s.refused
	if i.KVM && !s.has("class/misc/kvm") { // no guest may run, so libvirt tells of none
		i.Refused = unusable
	}
	return i, nil
}

func (s *Source) has(name string) bool {
	_, err := os.Stat(filepath.Join(s.options.Root, "sys", name))
	return err == nil
}

// SetLevel counts at any level above Pause: that is all there is.
func (s *Source) SetLevel(level snapshot.Level) error {
	if err := s.lock(); err != nil {
		return err
	}
	defer s.mu.Unlock()
	if level = min(level, snapshot.Count); level == s.level {
		return nil
	}
	s.read() // what was counted until now
	s.level = level
	switch level {
	case snapshot.Off:
		s.wishes = nil
		for _, slot := range s.live {
			s.retire(slot)
		}
	case snapshot.Count:
		s.began = s.options.BootTime()
		s.last = 0
		s.told = make(map[vcpu]uint64)
	}
	return nil
}

// SetProcessLevel counts at any level above Pause, as SetLevel does: the wish may
// have been made of another collector.
func (s *Source) SetProcessLevel(p snapshot.Process, level *snapshot.Level) error {
	if err := s.lock(); err != nil {
		return err
	}
	defer s.mu.Unlock()
	switch {
	case s.level == snapshot.Off:
		return fmt.Errorf("level of process %d: the source holds no lease", p.TGID)
	case level == nil:
		s.read()
		delete(s.wishes, p)
	case *level < snapshot.Pause:
		return fmt.Errorf("level of process %d: %v is none", p.TGID, *level)
	default:
		s.read()
		if s.wishes == nil {
			s.wishes = make(map[snapshot.Process]snapshot.Level)
		}
		s.wishes[p] = min(*level, snapshot.Count)
	}
	return nil
}

func (s *Source) levelOf(p snapshot.Process) snapshot.Level {
	if level, ok := s.wishes[p]; ok && s.level == snapshot.Count {
		return level
	}
	return s.level
}

// Recent fails: no exit is logged.
func (s *Source) Recent(snapshot.SlotID, uint64) ([]snapshot.Exit, error) { return nil, ErrCount }

// Snapshot is of the latest reading, and asks for the next one unless it is off.
func (s *Source) Snapshot() (*snapshot.Snapshot, error) {
	if err := s.lock(); err != nil {
		return nil, err
	}
	defer s.mu.Unlock()
	if s.level != snapshot.Off {
		s.read()
	}
	snap := &snapshot.Snapshot{
		TickHz: uint64(time.Second), Loaded: s.loaded, Transient: true, Counted: uint64(s.counted), Released: s.released,
		Slots: make([]snapshot.Slot, len(s.slots)),
	}
	for i, slot := range s.slots {
		snap.Slots[i] = slot.Slot
		snap.Slots[i].Level = s.levelOf(slot.Process)
		snap.Slots[i].Rows = []snapshot.Row{{Count: slot.exits}} // of no ISA: the reasons are not known
	}
	return snap, nil
}

// read enters the latest reading, if it was made while exits are counted and has
// not been entered. Slots retire whether or not libvirt still tells anything.
func (s *Source) read() {
	e := s.options.Exits()
	s.refuse(&e)
	domains := s.options.Domains()
	if s.level == snapshot.Count && e.Begun >= s.began && e.Ended > s.last {
		s.count(&e, domains)
	}
	threads := make(map[thread]bool)
	processes := make(map[snapshot.Process]bool)
	for _, d := range domains {
		p := processOf(&d)
		processes[p] = true
		for tid := range d.VCPUs {
			threads[thread{p, tid}] = true
		}
	}
	for t, slot := range s.live {
		if !threads[t] {
			s.retire(slot)
		}
	}
	maps.DeleteFunc(s.told, func(v vcpu, _ uint64) bool { return !processes[v.process] })
}

func processOf(d *vmmap.Domain) snapshot.Process {
	return snapshot.Process{TGID: d.TGID, Start: d.Start}
}

// count adds what has been counted since the last reading.
func (s *Source) count(e *vmmap.Exits, domains []vmmap.Domain) {
	// Of the first, all that is known is where counts begin.
	if s.last != 0 {
		s.counted += e.Ended - s.last
	}
	s.last = e.Ended
	unknown := maps.Clone(e.Runs)
	for _, d := range domains {
		// A run has a number of its own, but for one that a libvirtd started anew
		// gives again: what was read before a process began is not of it.
		if d.TGID == 0 || d.ID == nil || uint64(e.Begun) < d.Start {
			continue
		}
		run := vmmap.Run{UUID: d.UUID, ID: *d.ID}
		for tid, number := range d.VCPUs {
			delete(unknown, run)
			exits, told := e.Runs[run][number]
			if !told {
				continue // it may be later
			}
			t := thread{processOf(&d), tid}
			if s.live[t] == nil && !s.take(t, number) {
				continue
			}
			s.enter(s.live[t], exits)
		}
	}
	maps.DeleteFunc(unknown, func(_ vmmap.Run, vcpus map[int]uint64) bool { return len(vcpus) == 0 })
	if len(unknown) > 0 && s.last-s.sought >= seek {
		s.sought = s.last
		s.tell(source.Event{Kind: source.Lost}) // who that is must be found out
	}
}

// refuse knows why nothing is counted.
func (s *Source) refuse(e *vmmap.Exits) {
	for _, vcpus := range e.Runs {
		s.ever = s.ever || len(vcpus) > 0
	}
	switch {
	case e.Err != nil:
		s.refused = "libvirt: " + e.Err.Error()
	case len(e.Runs) > 0 && !s.ever:
		s.refused = untold
	default:
		s.refused = ""
	}
}

// take takes a slot for a thread, unless that is gone.
func (s *Source) take(t thread, number int) bool {
	p := t.process
	comm, _, err := s.options.Thread(p.TGID)
	_, start, err2 := s.options.Thread(t.tid)
	if err != nil || err2 != nil {
		return false
	}
	since := uint64(s.last)
	if _, known := s.told[vcpu{p, number}]; !known && s.whole(p) {
		since = start
	}
	s.uses++
	slot := &slot{Slot: snapshot.Slot{ID: snapshot.SlotID{Index: s.uses}, Process: p, Comm: comm, TID: t.tid, Start: start, VCPU: number, Since: since}}
	s.slots = append(s.slots, slot)
	s.live[t] = slot
	s.tell(source.Event{Kind: source.VCPUNew, Slot: slot.ID, Process: p.TGID, TID: t.tid, VCPU: number})
	return true
}

// whole tells whether a process has begun since exits are counted, so that all
// of its exits are.
func (s *Source) whole(p snapshot.Process) bool { return p.Start >= uint64(s.began) }

// enter adds what KVM has counted since it was last told. A count that went back
// is one to begin with: fewer exits than there were do no harm.
func (s *Source) enter(slot *slot, exits uint64) {
	v := vcpu{slot.Process, slot.VCPU}
	before, known := s.told[v]
	s.told[v] = exits
	if s.levelOf(slot.Process) == snapshot.Count && (known || s.whole(slot.Process)) && exits > before {
		slot.exits += exits - before
	}
}

func (s *Source) retire(slot *slot) {
	slot.Retired = true
	delete(s.live, thread{slot.Process, slot.TID})
	s.tell(source.Event{Kind: source.VCPURetired, Slot: slot.ID, Process: slot.Process.TGID, TID: slot.TID, VCPU: slot.VCPU})
}

// tell drops what nobody has room for: a snapshot tells as much.
func (s *Source) tell(e source.Event) {
	select {
	case s.events <- e:
	default:
	}
}

// Release forgets slots.
func (s *Source) Release(ids []snapshot.SlotID) error {
	if err := s.lock(); err != nil {
		return err
	}
	defer s.mu.Unlock()
	retired := make(map[snapshot.SlotID]*slot)
	for _, slot := range s.slots {
		if slot.Retired {
			retired[slot.ID] = slot
		}
	}
	var err error
	for _, id := range ids {
		slot := retired[id]
		if slot == nil {
			err = fmt.Errorf("release: %w: slot %d, generation %d", source.ErrStale, id.Index, id.Generation)
			break
		}
		s.released += slot.exits
		delete(retired, id)
	}
	s.slots = slices.DeleteFunc(s.slots, func(slot *slot) bool { return slot.Retired && retired[slot.ID] == nil })
	return err
}

// Events returns the channel of events.
func (s *Source) Events() <-chan source.Event { return s.events }

// Close ends the source. It may be called again.
func (s *Source) Close() error {
	if err := s.lock(); err != nil {
		return nil
	}
	defer s.mu.Unlock()
	s.closed = true
	close(s.events)
	return nil
}
