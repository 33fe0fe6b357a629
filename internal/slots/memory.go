// SPDX-License-Identifier: Apache-2.0

package slots

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"virtexit/internal/abi"
	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
)

const (
	headerSize = int(unsafe.Sizeof(abi.Header{}))
	cpuSize    = int(unsafe.Sizeof(abi.CPU{}))
	slotSize   = int(unsafe.Sizeof(abi.Slot{}))
	rowSize    = int(unsafe.Sizeof(abi.Row{}))
	recentSize = int(unsafe.Sizeof(abi.Recent{}))
	rowsOffset = int(unsafe.Offsetof(abi.Slot{}.Rows))
)

// attempts bounds how often something is read again because it changed
// meanwhile. A change is a thread's birth or a reader's request, so that it
// seldom hits once.
const attempts = 100

// tries bounds how often a slot is copied because its thread exited or entered
// the guest meanwhile. That may happen each time; the last copy is then used,
// whose times may be off by one stretch.
const tries = 4

// Memory is a mapping of counters. The kernel writes it while it is read, so
// whatever changes is loaded by atomic operations.
type Memory struct {
	header *abi.Header
	cpus   []abi.CPU
	slots  []abi.Slot   // those not backed must not be touched
	recent []abi.Recent // of each slot; without has_recent it must not be touched
	clock  Clock
	last   []copied // of each slot that has been read
	rows   int      // of the latest snapshot, in all
}

// copied are the rows of the latest copy of a slot, which the next may share.
type copied struct {
	generation uint32
	rows       []snapshot.Row // nil: none, as they may change without their sums
	open       int            // the one that may, as its exit is in progress; -1: none
}

// Size checks a header and tells how long the whole mapping is.
func Size(page []byte) (int, error) {
	if len(page) < headerSize {
		return 0, fmt.Errorf("%d bytes, want a header of %d", len(page), headerSize)
	}
	if uintptr(unsafe.Pointer(&page[0]))%unsafe.Alignof(abi.Header{}) != 0 {
		return 0, errors.New("memory is not aligned")
	}
	h := (*abi.Header)(unsafe.Pointer(&page[0]))
	const align = int(unsafe.Alignof(abi.Slot{}))
	cpus, slots, recent := int(h.CPUOffset), int(h.SlotOffset), int(h.RecentOffset)
	switch {
	case h.Magic != abi.Magic:
		return 0, fmt.Errorf("magic number is %#x, want %#x", h.Magic, uint32(abi.Magic))
	case h.ABI != abi.ABI:
		return 0, abiError(h.ABI)
	case int(h.SlotSize) != slotSize:
		return 0, fmt.Errorf("slot size is %d, want %d", h.SlotSize, slotSize)
	case int(h.RecentSize) != recentSize:
		return 0, fmt.Errorf("size of recent exits is %d, want %d", h.RecentSize, recentSize)
	case h.TSCKHz == 0:
		return 0, errors.New("rate of the clock is 0")
	case cpus < headerSize || cpus%align != 0:
		return 0, fmt.Errorf("cpu offset is %d", cpus)
	case slots < cpus+int(h.NumCPUs)*cpuSize || slots%align != 0:
		return 0, fmt.Errorf("slot offset is %d, with %d cpus at %d", slots, h.NumCPUs, cpus)
	case recent < slots+int(h.NumSlots)*slotSize || recent%align != 0:
		return 0, fmt.Errorf("offset of recent exits is %d, with %d slots at %d", recent, h.NumSlots, slots)
	}
	return recent + int(h.NumSlots)*recentSize, nil
}

func abiError(got uint32) error {
	return fmt.Errorf("the abi is %d, this program's is %d", got, abi.ABI)
}

// New checks the mapping's header and finds its parts. mem must stay as
// long as the result is used.
func New(mem []byte, clock Clock) (*Memory, error) {
	size, err := Size(mem)
	if err != nil {
		return nil, err
	}
	if len(mem) < size {
		return nil, fmt.Errorf("%d bytes, want %d", len(mem), size)
	}
	base := unsafe.Pointer(&mem[0])
	h := (*abi.Header)(base)
	return &Memory{
		header: h,
		cpus:   unsafe.Slice((*abi.CPU)(unsafe.Add(base, h.CPUOffset)), h.NumCPUs),
		slots:  unsafe.Slice((*abi.Slot)(unsafe.Add(base, h.SlotOffset)), h.NumSlots),
		recent: unsafe.Slice((*abi.Recent)(unsafe.Add(base, h.RecentOffset)), h.NumSlots),
		clock:  clock,
	}, nil
}

// Cost is, in cycles, what the hook takes at an exit and at an entry.
func (m *Memory) Cost() (exit, entry int) {
	return int(atomic.LoadUint32(&m.header.ExitCost)), int(atomic.LoadUint32(&m.header.EntryCost))
}

// Snapshot reads everything.
func (m *Memory) Snapshot() (*snapshot.Snapshot, error) {
	// A release in between would have its counts appear twice, in the slot and
	// in the header's sum, or not at all.
	for i := range attempts {
		before := atomic.LoadUint32(&m.header.Seq)
		if before%2 != 0 {
			// A few stores, and it is over; but who makes them may wait for a CPU.
			time.Sleep(time.Duration(i) * 20 * time.Microsecond)
			continue
		}
		s, err := m.readAll()
		if err != nil {
			return nil, err
		}
		if atomic.LoadUint32(&m.header.Seq) == before {
			return s, nil
		}
	}
	return nil, fmt.Errorf("slots were released at each of %d attempts to read", attempts)
}

func (m *Memory) tickHz() uint64 { return uint64(m.header.TSCKHz) * 1000 }

func (m *Memory) readAll() (*snapshot.Snapshot, error) {
	s := &snapshot.Snapshot{
		TickHz:   m.tickHz(),
		Loaded:   atomic.LoadUint64(&m.header.Loaded),
		Counted:  atomic.LoadUint64(&m.header.Counted),
		Released: atomic.LoadUint64(&m.header.Released),
	}
	if since, now := atomic.LoadUint64(&m.header.CountedSince), m.clock.Boot(); since != 0 && now > since {
		s.Counted += now - since
	}
	backed, err := m.backed()
	if err != nil {
		return nil, err
	}
	if more := len(backed) - len(m.last); more > 0 {
		m.last = append(m.last, make([]copied, more)...)
	}
	// One piece of memory for the rows of all slots, with some to spare.
	rows := make([]snapshot.Row, m.rows+m.rows/16)
	m.rows = 0
	var slot snapshot.Slot
	for i := range backed {
		slot.Rows = rows[:0:len(rows)]
		used, err := m.readSlot(&backed[i], &slot, &m.last[i])
		if err != nil {
			return nil, fmt.Errorf("slot %d: %w", i, err)
		}
		if used {
			if s.Slots == nil {
				s.Slots = make([]snapshot.Slot, 0, len(backed)-i)
			}
			slot.ID.Index = uint32(i)
			s.Slots = append(s.Slots, slot)
			m.rows += len(slot.Rows)
			rows = rows[min(len(rows), len(slot.Rows)):]
		}
	}
	for i := range m.cpus {
		s.Unattributed += atomic.LoadUint64(&m.cpus[i].Unattributed)
		s.Refused += atomic.LoadUint64(&m.cpus[i].Refused)
	}
	return s, nil
}

// backed are the slots that have memory.
func (m *Memory) backed() ([]abi.Slot, error) {
	n := int(atomic.LoadUint32(&m.header.SlotsBacked))
	if n > len(m.slots) {
		return nil, fmt.Errorf("%d slots have memory, of %d", n, len(m.slots))
	}
	return m.slots[:n], nil
}

// readSlot copies one use of a slot, all but its index, to s. A slot that is
// free is not used. last is what the latest copy left, and then what this one does.
func (m *Memory) readSlot(p *abi.Slot, s *snapshot.Slot, last *copied) (used bool, err error) {
	for range attempts {
		generation := atomic.LoadUint32(&p.Generation)
		state := atomic.LoadUint32(&p.State)
		if state == abi.Free {
			*last = copied{}
			return false, nil
		}
		if state != abi.Live || last.generation != generation {
			*last = copied{} // final counts are read whole
		}
		next, err := m.copySlot(p, s, *last)
		if atomic.LoadUint32(&p.Generation) != generation {
			continue // the copy is of two uses, and so may be the error
		}
		if err != nil {
			return false, err
		}
		switch state {
		case abi.Live:
		case abi.Retired:
			s.Retired = true
		default:
			return false, fmt.Errorf("state is %d", state)
		}
		s.ID.Generation = generation
		next.generation = generation
		*last = next
		return true, nil
	}
	return false, fmt.Errorf("it was reused at each of %d attempts to read", attempts)
}

func (m *Memory) copySlot(p *abi.Slot, s *snapshot.Slot, last copied) (copied, error) {
	for range tries {
		// First of all: what has begun later began after now, and no stretch
		// is longer than it will have been when it ends.
		now := m.clock.Ticks()
		present := readStretch(p)
		if err := copyCounters(p, s, last); err != nil {
			return copied{}, err
		}
		s.Times = times(p, s)
		present.add(s, now)
		// The thread updates its sums and then this: where nothing has changed
		// the stretch is not in the sums yet.
		if readStretch(p) == present {
			return copied{rows: s.Rows, open: present.row()}, nil
		}
	}
	return copied{}, nil
}

func copyCounters(p *abi.Slot, s *snapshot.Slot, last copied) error {
	rows := atomic.LoadUint32(&p.NumRows)
	level := snapshot.Level(atomic.LoadUint32(&p.Level))
	switch {
	case rows > abi.NumRows:
		return fmt.Errorf("%d rows, of %d", rows, abi.NumRows)
	case level > snapshot.Recent:
		return fmt.Errorf("level is %d", level)
	}
	*s = snapshot.Slot{
		Process: snapshot.Process{
			TGID:  int(atomic.LoadUint32(&p.TGID)),
			Start: atomic.LoadUint64(&p.TGIDStartTime),
		},
		Comm:   text(p.Comm),
		TID:    int(atomic.LoadUint32(&p.TID)),
		Start:  atomic.LoadUint64(&p.StartTime),
		VCPU:   int(atomic.LoadUint32(&p.VCPUID)),
		ISA:    exitreason.ISA(atomic.LoadUint32(&p.ISA)),
		Since:  atomic.LoadUint64(&p.Since),
		Level:  level,
		Recent: atomic.LoadUint64(&p.RecentHead),
		Rows:   slices.Grow(s.Rows[:0], int(rows))[:rows:rows],
	}
	for i := range s.Rows {
		var was *snapshot.Row
		if i < len(last.rows) && i != last.open {
			was = &last.rows[i]
		}
		s.Rows[i] = copyRow(&p.Rows[i], was)
	}
	return nil
}

// copyRow copies a row whose last copy is given; nil: it has none. Most of a vCPU's
// reasons do not occur in a second: their histograms are neither read nor kept
// twice.
//
// An exit counts in its row before anything else, and has its duration there
// last of all. So a histogram is the same while the sums are, unless its last copy
// was made in between.
func copyRow(from *abi.Row, last *snapshot.Row) snapshot.Row {
	to := snapshot.Row{
		Code:  atomic.LoadUint32(&from.Code),
		Other: atomic.LoadUint32(&from.Flags)&abi.RowOther != 0,
		Count: atomic.LoadUint64(&from.Count),
		Time:  atomic.LoadUint64(&from.Time),
		Max:   atomic.LoadUint64(&from.Max),
	}
	to.User = min(to.Time, atomic.LoadUint64(&from.UserTime)) // one may be a step ahead
	if last != nil && to.Count == last.Count && to.Time == last.Time && to.User == last.User && to.Max == last.Max {
		to.Hist = last.Hist
	} else {
		to.Hist = copyHist(&from.Hist)
	}
	return to
}

func copyHist(from *[abi.NumHist]uint64) snapshot.Hist {
	var all [abi.NumHist]uint64
	for i := range all {
		all[i] = atomic.LoadUint64(&from[i])
	}
	return snapshot.NewHist(all[:])
}

// times are those of the stretches that have ended.
func times(p *abi.Slot, s *snapshot.Slot) snapshot.Times {
	t := snapshot.Times{
		Guest:   atomic.LoadUint64(&p.GuestTime),
		Poll:    atomic.LoadUint64(&p.PollTime),
		Halted:  atomic.LoadUint64(&p.HaltedTime),
		Wait:    atomic.LoadUint64(&p.WaitTime),
		Outside: atomic.LoadUint64(&p.OutsideTime),
	}
	for i := range s.Rows {
		r := &s.Rows[i]
		t.User += r.User
		t.KVM += r.Time - r.User
	}
	return t
}

// stretch is what a thread is at.
type stretch struct {
	tsc         uint64 // when it began
	open, doing uint32
}

func readStretch(p *abi.Slot) stretch {
	return stretch{atomic.LoadUint64(&p.TSC), atomic.LoadUint32(&p.Open), atomic.LoadUint32(&p.Doing)}
}

// row is the index of the row that is open; -1 when there is none.
func (at stretch) row() int {
	if i := int(at.open) - rowsOffset; i >= 0 && i%rowSize == 0 {
		return i / rowSize
	}
	return -1
}

// add adds the stretch to one of the slot's times. Its end adds it for good, and
// may then find that a part of it belongs to others.
func (at stretch) add(s *snapshot.Slot, now uint64) {
	if now <= at.tsc {
		return // at a level that does not time, or a moment ago
	}
	length := now - at.tsc
	if at.open == 0 {
		s.Times.Guest += length
		return
	}
	row := at.row()
	if row < 0 || row >= len(s.Rows) {
		return
	}
	switch at.doing {
	case abi.InKVM:
		if r := &s.Rows[row]; !r.Other && exitreason.Halts(s.ISA, r.Code) {
			s.Times.Halted += length
		} else {
			s.Times.KVM += length
		}
	case abi.InUser:
		s.Times.User += length
	case abi.Halted:
		s.Times.Halted += length
	case abi.Outside:
		s.Times.Outside += length
	}
}

// Recent copies what the ring of one use of a slot holds, latest first,
// down to number from.
func (m *Memory) Recent(id snapshot.SlotID, from uint64) ([]snapshot.Exit, error) {
	backed, err := m.backed()
	if err != nil {
		return nil, err
	}
	if int64(id.Index) >= int64(len(backed)) {
		return nil, fmt.Errorf("%w: slot %d", source.ErrStale, id.Index)
	}
	p := &backed[id.Index]
	inUse := func() bool {
		return atomic.LoadUint32(&p.Generation) == id.Generation && atomic.LoadUint32(&p.State) != abi.Free
	}
	stale := fmt.Errorf("%w: slot %d, generation %d", source.ErrStale, id.Index, id.Generation)
	if !inUse() {
		return nil, stale
	}
	if atomic.LoadUint32(&p.HasRecent) == 0 {
		return nil, nil
	}
	ring := &m.recent[id.Index].Exits
	head := atomic.LoadUint64(&p.RecentHead)
	if head > abi.NumRecent {
		from = max(from, head-abi.NumRecent)
	}
	if from >= head {
		return nil, nil
	}
	exits := make([]snapshot.Exit, 0, head-from)
	for number := head; number > from; {
		number--
		e := &ring[number%abi.NumRecent]
		exit := snapshot.Exit{
			Number:   number,
			Time:     atomic.LoadUint64(&e.TSC),
			Duration: atomic.LoadUint64(&e.Cycles),
			Code:     atomic.LoadUint32(&e.Code),
			RIP:      atomic.LoadUint64(&e.RIP),
		}
		if exit.Duration == abi.Present {
			exit.Duration, exit.Present = 0, true
		}
		exits = append(exits, exit)
	}
	// The thread has gone on meanwhile, and may be writing one more.
	if after := atomic.LoadUint64(&p.RecentHead); after+1 > abi.NumRecent {
		whole := after + 1 - abi.NumRecent
		exits = exits[:max(0, int64(head-max(whole, from)))]
	}
	if !inUse() {
		return nil, stale
	}
	now := m.clock.now()
	for i := range exits {
		exits[i].Time = now.bootTime(exits[i].Time, m.tickHz())
	}
	return exits, nil
}

// text is a process's name, which may hold any bytes.
func text(comm [abi.CommLen]byte) string {
	name, _, _ := bytes.Cut(comm[:], []byte{0})
	return strings.ToValidUTF8(string(name), "\uFFFD")
}

// The two views of a histogram are one.
var _ = [1]struct{}{}[snapshot.NumHist-abi.NumHist]
var _ = [1]struct{}{}[snapshot.HistShift-abi.HistShift]
