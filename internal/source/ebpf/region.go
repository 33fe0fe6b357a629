// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"fmt"
	"os"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"virtexit/internal/abi"
)

// region is memory laid out as that of /dev/virtexit. Maps of the programs are
// mapped into it as they are made; what has none must not be touched.
type region struct {
	bytes  []byte
	header *abi.Header
	slots  []abi.Slot
}

// newRegion reserves addresses and writes the header, all but what is counted.
func newRegion(cpus, slots int) (*region, error) {
	page := os.Getpagesize()
	align := func(n int) int { return (n + page - 1) / page * page }
	h := abi.Header{
		Magic: abi.Magic, ABI: abi.ABI,
		NumCPUs: uint32(cpus), NumSlots: uint32(slots),
		SlotSize: uint32(unsafe.Sizeof(abi.Slot{})), RecentSize: uint32(unsafe.Sizeof(abi.Recent{})),
		TSCKHz: 1_000_000, // nanoseconds
	}
	cpu := page
	slot := cpu + align(cpus*int(unsafe.Sizeof(abi.CPU{})))
	recent := slot + slots*int(h.SlotSize)
	h.CPUOffset, h.SlotOffset, h.RecentOffset = uint32(cpu), uint32(slot), uint32(recent)
	size := recent + slots*int(h.RecentSize)
	if size > 1<<32-1 {
		return nil, fmt.Errorf("%d slots are too many", slots)
	}
	bytes, err := unix.Mmap(-1, 0, size, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("reserve %d bytes: %w", size, err)
	}
	if err := unix.Mprotect(bytes[:page], unix.PROT_READ|unix.PROT_WRITE); err != nil {
		unix.Munmap(bytes)
		return nil, fmt.Errorf("header: %w", err)
	}
	base := unsafe.Pointer(&bytes[0])
	r := &region{
		bytes:  bytes,
		header: (*abi.Header)(base),
		slots:  unsafe.Slice((*abi.Slot)(unsafe.Add(base, slot)), slots),
	}
	*r.header = h
	return r, nil
}

// place maps a map of the programs.
func (r *region) place(m *ebpf.Map, offset, size int) error {
	at := unsafe.Pointer(&r.bytes[offset])
	_ = r.bytes[offset+size-1]
	if _, err := unix.MmapPtr(m.FD(), 0, at, uintptr(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED); err != nil {
		return fmt.Errorf("map %d bytes: %w", size, err)
	}
	return nil
}

func (r *region) close() error { return unix.Munmap(r.bytes) }

// own is what the programs know of a slot beyond its counters.
func (r *region) own(slot int) *collectorVxOwn {
	return (*collectorVxOwn)(unsafe.Pointer(&r.slots[slot].Reserved2))
}

var _ [unsafe.Sizeof(abi.Slot{}.Reserved2) - unsafe.Sizeof(collectorVxOwn{})]struct{}
