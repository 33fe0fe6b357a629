// SPDX-License-Identifier: Apache-2.0

package kmod

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"
	"unsafe"

	"virtexit/internal/abi"
	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
)

const (
	headerSize = int(unsafe.Sizeof(abi.Header{}))
	cpuSize    = int(unsafe.Sizeof(abi.CPU{}))
	slotSize   = int(unsafe.Sizeof(abi.Slot{}))
)

// attempts bounds how often something is read again because it changed
// meanwhile. A change is a thread's birth or a reader's request, so that it
// seldom hits once.
const attempts = 100

// memory is the device's mapping. The kernel writes it while it is read, so
// whatever changes is loaded by atomic operations.
type memory struct {
	header *abi.Header
	cpus   []abi.CPU
	slots  []abi.Slot // those not backed must not be touched
}

// mappingSize checks a header and tells how long the whole mapping is.
func mappingSize(page []byte) (int, error) {
	if len(page) < headerSize {
		return 0, fmt.Errorf("%d bytes, want a header of %d", len(page), headerSize)
	}
	if uintptr(unsafe.Pointer(&page[0]))%unsafe.Alignof(abi.Header{}) != 0 {
		return 0, errors.New("memory is not aligned")
	}
	h := (*abi.Header)(unsafe.Pointer(&page[0]))
	const align = int(unsafe.Alignof(abi.Slot{}))
	cpus, slots := int(h.CPUOffset), int(h.SlotOffset)
	switch {
	case h.Magic != abi.Magic:
		return 0, fmt.Errorf("magic number is %#x, want %#x", h.Magic, uint32(abi.Magic))
	case h.ABI != abi.ABI:
		return 0, abiError(h.ABI)
	case int(h.SlotSize) != slotSize:
		return 0, fmt.Errorf("slot size is %d, want %d", h.SlotSize, slotSize)
	case h.TSCKHz == 0:
		return 0, errors.New("rate of the clock is 0")
	case cpus < headerSize || cpus%align != 0:
		return 0, fmt.Errorf("cpu offset is %d", cpus)
	// Slots come last: what lies behind the first one may have no memory.
	case slots < cpus+int(h.NumCPUs)*cpuSize || slots%align != 0:
		return 0, fmt.Errorf("slot offset is %d, with %d cpus at %d", slots, h.NumCPUs, cpus)
	}
	return slots + int(h.NumSlots)*slotSize, nil
}

func abiError(got uint32) error {
	return fmt.Errorf("the module's abi is %d, this program's is %d", got, abi.ABI)
}

// newMemory checks the mapping's header and finds its parts. mem must stay as
// long as the result is used.
func newMemory(mem []byte) (*memory, error) {
	size, err := mappingSize(mem)
	if err != nil {
		return nil, err
	}
	if len(mem) < size {
		return nil, fmt.Errorf("%d bytes, want %d", len(mem), size)
	}
	base := unsafe.Pointer(&mem[0])
	h := (*abi.Header)(base)
	return &memory{
		header: h,
		cpus:   unsafe.Slice((*abi.CPU)(unsafe.Add(base, h.CPUOffset)), h.NumCPUs),
		slots:  unsafe.Slice((*abi.Slot)(unsafe.Add(base, h.SlotOffset)), h.NumSlots),
	}, nil
}

// snapshot reads everything.
func (m *memory) snapshot() (*snapshot.Snapshot, error) {
	// A release in between would have its counts appear twice, in the slot and
	// in the header's sum, or not at all.
	for range attempts {
		before := atomic.LoadUint32(&m.header.Seq)
		if before%2 != 0 {
			runtime.Gosched() // a few stores, and it is over
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

func (m *memory) readAll() (*snapshot.Snapshot, error) {
	s := &snapshot.Snapshot{
		TickHz:   uint64(m.header.TSCKHz) * 1000,
		Released: atomic.LoadUint64(&m.header.Released),
	}
	backed := int(atomic.LoadUint32(&m.header.SlotsBacked))
	if backed > len(m.slots) {
		return nil, fmt.Errorf("%d slots have memory, of %d", backed, len(m.slots))
	}
	for i := range m.slots[:backed] {
		slot, err := readSlot(&m.slots[i])
		if err != nil {
			return nil, fmt.Errorf("slot %d: %w", i, err)
		}
		if slot != nil {
			slot.ID.Index = uint32(i)
			s.Slots = append(s.Slots, *slot)
		}
	}
	for i := range m.cpus {
		s.Unattributed += atomic.LoadUint64(&m.cpus[i].Unattributed)
		s.Refused += atomic.LoadUint64(&m.cpus[i].Refused)
	}
	return s, nil
}

// readSlot copies one use of a slot, all but its index; nil when it is free.
func readSlot(p *abi.Slot) (*snapshot.Slot, error) {
	for range attempts {
		generation := atomic.LoadUint32(&p.Generation)
		state := atomic.LoadUint32(&p.State)
		if state == abi.Free {
			return nil, nil
		}
		s, err := copySlot(p)
		if atomic.LoadUint32(&p.Generation) != generation {
			continue // the copy is of two uses, and so may be the error
		}
		if err != nil {
			return nil, err
		}
		switch state {
		case abi.Live:
		case abi.Retired:
			s.Retired = true
		default:
			return nil, fmt.Errorf("state is %d", state)
		}
		s.ID.Generation = generation
		return s, nil
	}
	return nil, fmt.Errorf("it was reused at each of %d attempts to read", attempts)
}

func copySlot(p *abi.Slot) (*snapshot.Slot, error) {
	isa := exitreason.ISA(atomic.LoadUint32(&p.ISA))
	rows := atomic.LoadUint32(&p.NumRows)
	switch {
	case isa > exitreason.SVM:
		return nil, fmt.Errorf("isa is %d", uint32(isa))
	case rows > abi.NumRows:
		return nil, fmt.Errorf("%d rows, of %d", rows, abi.NumRows)
	}
	s := &snapshot.Slot{
		Process: snapshot.Process{
			TGID:  int(atomic.LoadUint32(&p.TGID)),
			Start: atomic.LoadUint64(&p.TGIDStartTime),
		},
		Comm:      text(p.Comm),
		TID:       int(atomic.LoadUint32(&p.TID)),
		Start:     atomic.LoadUint64(&p.StartTime),
		VCPU:      int(atomic.LoadUint32(&p.VCPUID)),
		ISA:       isa,
		Since:     atomic.LoadUint64(&p.Since),
		GuestTime: atomic.LoadUint64(&p.GuestTime),
		Rows:      make([]snapshot.Row, rows),
	}
	for i := range s.Rows {
		from, to := &p.Rows[i], &s.Rows[i]
		to.Code = atomic.LoadUint32(&from.Code)
		to.Other = atomic.LoadUint32(&from.Flags)&abi.RowOther != 0
		to.Count = atomic.LoadUint64(&from.Count)
		to.Time = atomic.LoadUint64(&from.Time)
		to.Max = atomic.LoadUint64(&from.Max)
		for j := range to.Hist {
			to.Hist[j] = atomic.LoadUint64(&from.Hist[j])
		}
	}
	return s, nil
}

// text is a process's name, which may hold any bytes.
func text(comm [abi.CommLen]byte) string {
	name, _, _ := bytes.Cut(comm[:], []byte{0})
	return strings.ToValidUTF8(string(name), "\uFFFD")
}

// The two views of a histogram are one.
var _ [snapshot.NumHist]uint64 = [abi.NumHist]uint64{}
var _ = [1]struct{}{}[snapshot.HistShift-abi.HistShift]
