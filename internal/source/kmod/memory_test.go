// SPDX-License-Identifier: Apache-2.0

package kmod

import (
	"encoding/binary"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"

	"virtexit/internal/abi"
	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
)

// image is memory as the module lays it out: two CPUs and some slots.
type image struct {
	bytes  []byte
	header *abi.Header
	cpus   []abi.CPU
	slots  []abi.Slot
}

func newImage(slots int) *image {
	const cpus, cpuOffset, slotOffset = 2, 64, 4096
	im := &image{bytes: aligned(make([]byte, slotOffset+slots*slotSize))}
	base := unsafe.Pointer(&im.bytes[0])
	im.header = (*abi.Header)(base)
	im.cpus = unsafe.Slice((*abi.CPU)(unsafe.Add(base, cpuOffset)), cpus)
	im.slots = unsafe.Slice((*abi.Slot)(unsafe.Add(base, slotOffset)), slots)
	*im.header = abi.Header{
		Magic: abi.Magic, ABI: abi.ABI,
		CPUOffset: cpuOffset, NumCPUs: cpus,
		SlotOffset: slotOffset, SlotSize: uint32(slotSize), NumSlots: uint32(slots),
		TSCKHz: 2_000_000, SlotsBacked: uint32(slots),
	}
	return im
}

// aligned copies bytes to where a header may be.
func aligned(b []byte) []byte {
	words := make([]uint64, len(b)/8+1)
	mem := unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), len(words)*8)[:len(b)]
	copy(mem, b)
	return mem
}

func (im *image) snapshot(t *testing.T) *snapshot.Snapshot {
	m, err := newMemory(im.bytes)
	if err != nil {
		t.Fatal(err)
	}
	s, err := m.snapshot()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// example holds one slot of each state, a row of each kind, and something in
// every counter.
func example() *image {
	im := newImage(4)
	im.header.SlotsBacked = 3
	im.header.Released, im.header.ReleasedSlots = 500, 3
	im.cpus[0] = abi.CPU{Unattributed: 1, Refused: 2}
	im.cpus[1] = abi.CPU{Unattributed: 10, Refused: 20}
	im.slots[0] = abi.Slot{
		Generation: 7, State: abi.Live,
		TID: 101, TGID: 100, StartTime: 1001, TGIDStartTime: 1000,
		VCPUID: 3, ISA: abi.ISASVM, NumRows: 2,
		Comm:      [abi.CommLen]byte{'q', 'e', 'm', 'u', 0, 'x'},
		GuestTime: 12345, Since: 2000,
	}
	im.slots[0].Rows[0] = abi.Row{Code: 0x72, Count: 9, Time: 8000, Max: 6000, Hist: [abi.NumHist]uint64{3, 4, 0, 0, 1}}
	im.slots[0].Rows[1] = abi.Row{Code: 5, Flags: abi.RowOther, Count: 1, Hist: [abi.NumHist]uint64{abi.NumHist - 1: 1}}
	im.slots[0].Rows[2] = abi.Row{Code: 0x78, Count: 1 << 40} // not in use
	im.slots[1] = abi.Slot{Generation: 8, State: abi.Free, TID: 5, NumRows: 99}
	im.slots[2] = abi.Slot{Generation: math.MaxUint32, State: abi.Retired, TID: 102, ISA: abi.ISAVMX, Comm: [abi.CommLen]byte([]byte("0123456789abcde\xff"))}
	im.slots[3] = abi.Slot{State: abi.Live, TID: 6} // has no memory
	return im
}

func exampleSnapshot() *snapshot.Snapshot {
	return &snapshot.Snapshot{
		TickHz: 2_000_000_000,
		Slots: []snapshot.Slot{{
			ID:      snapshot.SlotID{Index: 0, Generation: 7},
			Process: snapshot.Process{TGID: 100, Start: 1000},
			Comm:    "qemu", TID: 101, Start: 1001, VCPU: 3, ISA: exitreason.SVM, Since: 2000, GuestTime: 12345,
			Rows: []snapshot.Row{
				{Code: 0x72, Count: 9, Time: 8000, Max: 6000, Hist: [snapshot.NumHist]uint64{3, 4, 0, 0, 1}},
				{Code: 5, Other: true, Count: 1, Hist: [snapshot.NumHist]uint64{snapshot.NumHist - 1: 1}},
			},
		}, {
			ID:      snapshot.SlotID{Index: 2, Generation: math.MaxUint32},
			Retired: true,
			Comm:    "0123456789abcde\uFFFD", TID: 102, ISA: exitreason.VMX,
			Rows: []snapshot.Row{},
		}},
		Released: 500, Unattributed: 11, Refused: 22,
	}
}

func TestSnapshot(t *testing.T) {
	if diff := cmp.Diff(exampleSnapshot(), example().snapshot(t)); diff != "" {
		t.Errorf("snapshot (-want +got):\n%s", diff)
	}
}

func TestSnapshotAllRows(t *testing.T) {
	im := newImage(1)
	im.slots[0].State = abi.Live
	im.slots[0].NumRows = abi.NumRows
	im.slots[0].Rows[abi.NumRows-1].Count = 5
	s := im.snapshot(t)
	if n := len(s.Slots[0].Rows); n != abi.NumRows || s.Exits() != 5 {
		t.Errorf("%d rows and %d exits, want %d and 5", n, s.Exits(), abi.NumRows)
	}
}

// Slots that get memory while the device is open appear.
func TestSlotsBackedGrows(t *testing.T) {
	im := example()
	m, err := newMemory(im.bytes)
	if err != nil {
		t.Fatal(err)
	}
	for _, backed := range []uint32{0, 3, 4} {
		im.header.SlotsBacked = backed
		s, err := m.snapshot()
		if err != nil {
			t.Fatal(err)
		}
		used := map[uint32]int{0: 0, 3: 2, 4: 3}[backed]
		if len(s.Slots) != used {
			t.Errorf("%d slots with memory: %d are in use, want %d", backed, len(s.Slots), used)
		}
	}
}

func TestBadMemory(t *testing.T) {
	tests := []struct {
		name  string
		spoil func(*image)
		want  string // in the error
	}{
		{"empty", func(im *image) { im.bytes = nil }, "0 bytes"},
		{"short header", func(im *image) { im.bytes = im.bytes[:headerSize-1] }, "55 bytes"},
		{"short", func(im *image) { im.bytes = im.bytes[:len(im.bytes)-1] }, "bytes, want"},
		{"unaligned", func(im *image) { im.bytes = im.bytes[1:] }, "aligned"},
		{"magic", func(im *image) { im.header.Magic = 0x1234 }, "0x1234, want 0x54495856"},
		{"abi", func(im *image) { im.header.ABI = 77 }, "abi is 77, this program's is 1"},
		{"slot size", func(im *image) { im.header.SlotSize = 8192 }, "slot size is 8192"},
		{"clock", func(im *image) { im.header.TSCKHz = 0 }, "clock"},
		{"cpus in the header", func(im *image) { im.header.CPUOffset = 48 }, "cpu offset is 48"},
		{"cpus unaligned", func(im *image) { im.header.CPUOffset = 68 }, "cpu offset is 68"},
		{"cpus among slots", func(im *image) { im.header.NumCPUs = 64 }, "64 cpus at 64"},
		{"cpus without end", func(im *image) { im.header.NumCPUs = math.MaxUint32 }, "4294967295 cpus"},
		{"cpus beyond", func(im *image) { im.header.CPUOffset = 1 << 30 }, "slot offset is 4096"},
		{"slots unaligned", func(im *image) { im.header.SlotOffset = 4097 }, "slot offset is 4097"},
		{"slots beyond", func(im *image) { im.header.SlotOffset = 1 << 30 }, "bytes, want"},
		{"slots without end", func(im *image) { im.header.NumSlots = math.MaxUint32 }, "bytes, want"},
		{"more slots with memory than there are", func(im *image) { im.header.SlotsBacked = 5 }, "5 slots have memory, of 4"},
		{"rows", func(im *image) { im.slots[2].NumRows = 61 }, "slot 2: 61 rows"},
		{"isa", func(im *image) { im.slots[0].ISA = 3 }, "slot 0: isa is 3"},
		{"state", func(im *image) { im.slots[1].State, im.slots[1].NumRows = 3, 0 }, "slot 1: state is 3"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			im := example()
			tt.spoil(im)
			m, err := newMemory(im.bytes)
			if err == nil {
				_, err = m.snapshot()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want one with %q", err, tt.want)
			}
		})
	}
}

// TestReuse reads a slot that another thread takes into use again and again: a
// copy is always of one use, whose number all of its counters hold.
func TestReuse(t *testing.T) {
	im := newImage(1)
	m, err := newMemory(im.bytes)
	if err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var writer sync.WaitGroup
	writer.Go(func() {
		p := &im.slots[0]
		for use := uint32(0); !stop.Load(); use++ {
			atomic.StoreUint32(&p.TID, use)
			atomic.StoreUint64(&p.GuestTime, uint64(use))
			atomic.StoreUint32(&p.NumRows, use%abi.NumRows+1)
			for i := range p.Rows[:use%abi.NumRows+1] {
				atomic.StoreUint64(&p.Rows[i].Count, uint64(use))
				atomic.StoreUint64(&p.Rows[i].Hist[abi.NumHist-1], uint64(use))
			}
			atomic.StoreUint32(&p.State, abi.Live+use%2)
			for range use % 512 { // time to be read
				stop.Load()
			}
			// In this order: with the generation first, a reader could take
			// this use for the next one.
			atomic.StoreUint32(&p.State, abi.Free)
			atomic.StoreUint32(&p.Generation, use+1)
		}
	})
	defer writer.Wait()
	defer stop.Store(true)
	for copies := 0; copies < 2000; {
		s, err := m.snapshot()
		if err != nil {
			// All attempts may fail here, where reuse never rests.
			if strings.Contains(err.Error(), "reused at each of") {
				continue
			}
			t.Fatal(err)
		}
		if len(s.Slots) == 0 {
			continue
		}
		copies++
		slot := s.Slots[0]
		use := slot.ID.Generation
		if slot.TID != int(use) || slot.GuestTime != uint64(use) || slot.Retired != (use%2 == 1) || len(slot.Rows) != int(use%abi.NumRows+1) {
			t.Fatalf("copy of use %d is mixed: %+v", use, slot)
		}
		for _, r := range slot.Rows {
			if r.Count != uint64(use) || r.Hist[abi.NumHist-1] != uint64(use) {
				t.Fatalf("copy of use %d has a row of another: %+v", use, r)
			}
		}
	}
}

// A release while everything is read would hide or double its counts.
func TestForeignRelease(t *testing.T) {
	im := newImage(64)
	const total = 64 * 1000
	for i := range im.slots {
		im.slots[i] = abi.Slot{State: abi.Retired, NumRows: 1}
		im.slots[i].Rows[0].Count = 1000
	}
	m, err := newMemory(im.bytes)
	if err != nil {
		t.Fatal(err)
	}
	var writer sync.WaitGroup
	writer.Go(func() {
		for i := range im.slots {
			p := &im.slots[len(im.slots)-1-i]
			atomic.AddUint32(&im.header.Seq, 1)
			atomic.AddUint64(&im.header.Released, 1000)
			atomic.StoreUint32(&p.State, abi.Free)
			atomic.StoreUint32(&p.Generation, 1)
			atomic.AddUint32(&im.header.Seq, 1)
			for range 500_000 {
				atomic.LoadUint32(&p.State)
			}
		}
	})
	defer writer.Wait()
	for s := (&snapshot.Snapshot{}); s.Released < total; {
		if s, err = m.snapshot(); err != nil {
			t.Fatal(err)
		}
		if n := s.Exits(); n != total {
			t.Fatalf("%d exits after the release of %d, want %d", n, s.Released/1000, total)
		}
	}
}

func TestMapDevice(t *testing.T) {
	file := filepath.Join(t.TempDir(), "virtexit")
	write := func(im *image) {
		if err := os.WriteFile(file, im.bytes, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := mapDevice(file); !errors.Is(err, source.ErrUnavailable) || !strings.Contains(err.Error(), file) {
		t.Errorf("no device: error is %v, want %v that names it", err, source.ErrUnavailable)
	}

	im := example()
	im.header.ABI = 2
	write(im)
	if _, _, err := mapDevice(file); err == nil || errors.Is(err, source.ErrUnavailable) {
		t.Errorf("another abi: error is %v, want one that is not %v", err, source.ErrUnavailable)
	}

	write(example())
	mapping, m, err := mapDevice(file)
	if err != nil {
		t.Fatal(err)
	}
	s := &Source{mapping: mapping, memory: m, events: make(chan source.Event), done: make(chan struct{})}
	got, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(exampleSnapshot(), got); diff != "" {
		t.Errorf("snapshot (-want +got):\n%s", diff)
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if _, err := s.Snapshot(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("snapshot after close: error is %v, want %v", err, os.ErrClosed)
	}
}

// FuzzMemory gives any memory to the reader, but for the numbers that say what
// it is: it answers or refuses, and touches nothing beyond.
func FuzzMemory(f *testing.F) {
	f.Add(example().bytes)
	f.Add(newImage(1).bytes)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		mem := aligned(b)
		if len(mem) >= headerSize {
			binary.NativeEndian.PutUint32(mem, abi.Magic)
			binary.NativeEndian.PutUint32(mem[4:], abi.ABI)
			binary.NativeEndian.PutUint32(mem[unsafe.Offsetof(abi.Header{}.SlotSize):], uint32(slotSize))
		}
		m, err := newMemory(mem)
		if err != nil {
			return
		}
		s, err := m.snapshot()
		if err != nil {
			return
		}
		for i := range s.Slots {
			if s.Slots[i].ID.Index >= m.header.SlotsBacked {
				t.Errorf("slot %d has no memory", s.Slots[i].ID.Index)
			}
		}
	})
}

func BenchmarkSnapshot(b *testing.B) {
	im := newImage(8000)
	for i := range im.slots {
		im.slots[i].State, im.slots[i].NumRows = abi.Live, 10
	}
	m, err := newMemory(im.bytes)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := m.snapshot(); err != nil {
			b.Fatal(err)
		}
	}
}
