// SPDX-License-Identifier: Apache-2.0

package slots

import (
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"runtime"
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
	recent []abi.Recent
}

// What the time is.
const (
	tscNow  = 1 << 40
	bootNow = 1 << 41
)

func testClock() Clock {
	return Clock{Ticks: func() uint64 { return tscNow }, Boot: func() uint64 { return bootNow }}
}

// openAt is what open holds for a row.
func openAt(row int) uint32 { return uint32(rowsOffset + row*rowSize) }

func newImage(slots int) *image {
	return layImage(slots, func(size int) []byte { return aligned(make([]byte, size)) })
}

// layImage does so in memory that is had from alloc.
func layImage(slots int, alloc func(size int) []byte) *image {
	const cpus, cpuOffset, slotOffset = 2, 128, 4096
	recentOffset := slotOffset + slots*slotSize
	im := &image{bytes: alloc(recentOffset + slots*recentSize)}
	base := unsafe.Pointer(&im.bytes[0])
	im.header = (*abi.Header)(base)
	im.cpus = unsafe.Slice((*abi.CPU)(unsafe.Add(base, cpuOffset)), cpus)
	im.slots = unsafe.Slice((*abi.Slot)(unsafe.Add(base, slotOffset)), slots)
	im.recent = unsafe.Slice((*abi.Recent)(unsafe.Add(base, recentOffset)), slots)
	*im.header = abi.Header{
		Magic: abi.Magic, ABI: abi.ABI,
		CPUOffset: cpuOffset, NumCPUs: cpus,
		SlotOffset: slotOffset, SlotSize: uint32(slotSize), NumSlots: uint32(slots),
		RecentOffset: uint32(recentOffset), RecentSize: uint32(recentSize),
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
	m, err := New(im.bytes, testClock())
	if err != nil {
		t.Fatal(err)
	}
	s, err := m.Snapshot()
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
	im.header.Loaded = 33
	im.header.Counted, im.header.CountedSince = 4_000_000, bootNow-700
	im.cpus[0] = abi.CPU{Unattributed: 1, Refused: 2}
	im.cpus[1] = abi.CPU{Unattributed: 10, Refused: 20}
	im.slots[0] = abi.Slot{
		Generation: 7, State: abi.Live,
		TID: 101, TGID: 100, StartTime: 1001, TGIDStartTime: 1000,
		VCPUID: 3, ISA: abi.ISASVM, NumRows: 2,
		Comm:  [abi.CommLen]byte{'q', 'e', 'm', 'u', 0, 'x'},
		Since: 2000, Level: abi.LevelRecent, RecentHead: 77, TSC: tscNow - 5,
		GuestTime: 12345, PollTime: 11, HaltedTime: 12, WaitTime: 13, OutsideTime: 14,
	}
	im.slots[0].Rows[0] = abi.Row{Code: 0x72, Count: 9, Time: 8000, UserTime: 500, Max: 6000, Hist: [abi.NumHist]uint64{3, 4, 0, 0, 1}}
	im.slots[0].Rows[1] = abi.Row{Code: 5, Flags: abi.RowOther, Count: 1, Hist: [abi.NumHist]uint64{abi.NumHist - 1: 1}}
	im.slots[0].Rows[2] = abi.Row{Code: 0x78, Count: 1 << 40} // not in use
	im.slots[1] = abi.Slot{Generation: 8, State: abi.Free, TID: 5, NumRows: 99}
	im.slots[2] = abi.Slot{Generation: math.MaxUint32, State: abi.Retired, TID: 102, ISA: 77, TSC: math.MaxInt64, Comm: [abi.CommLen]byte([]byte("0123456789abcde\xff"))}
	im.slots[3] = abi.Slot{State: abi.Live, TID: 6} // has no memory
	return im
}

func exampleSnapshot() *snapshot.Snapshot {
	return &snapshot.Snapshot{
		TickHz:  2_000_000_000,
		Loaded:  33,
		Counted: 4_000_700,
		Slots: []snapshot.Slot{{
			ID:      snapshot.SlotID{Index: 0, Generation: 7},
			Process: snapshot.Process{TGID: 100, Start: 1000},
			Comm:    "qemu", TID: 101, Start: 1001, VCPU: 3, ISA: exitreason.SVM, Since: 2000,
			Level: snapshot.Recent, Recent: 77,
			Times: snapshot.Times{Guest: 12350, KVM: 7500, User: 500, Poll: 11, Halted: 12, Wait: 13, Outside: 14},
			Rows: []snapshot.Row{
				{Code: 0x72, Count: 9, Time: 8000, User: 500, Max: 6000, Hist: snapshot.Hist{3, 4, 0, 0, 1}},
				{Code: 5, Other: true, Count: 1, Hist: snapshot.Hist{snapshot.NumHist - 1: 1}},
			},
		}, {
			ID:      snapshot.SlotID{Index: 2, Generation: math.MaxUint32},
			Retired: true,
			Comm:    "0123456789abcde\uFFFD", TID: 102, ISA: 77,
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
	m, err := New(im.bytes, testClock())
	if err != nil {
		t.Fatal(err)
	}
	for _, backed := range []uint32{0, 3, 4} {
		im.header.SlotsBacked = backed
		s, err := m.Snapshot()
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
		{"short header", func(im *image) { im.bytes = im.bytes[:headerSize-1] }, "bytes, want a header"},
		{"short", func(im *image) { im.bytes = im.bytes[:len(im.bytes)-1] }, "bytes, want"},
		{"unaligned", func(im *image) { im.bytes = im.bytes[1:] }, "aligned"},
		{"magic", func(im *image) { im.header.Magic = 0x1234 }, "0x1234, want 0x54495856"},
		{"abi", func(im *image) { im.header.ABI = 77 }, "abi is 77, this program's is 1"},
		{"slot size", func(im *image) { im.header.SlotSize = 8192 }, "slot size is 8192"},
		{"clock", func(im *image) { im.header.TSCKHz = 0 }, "clock"},
		{"cpus in the header", func(im *image) { im.header.CPUOffset = 48 }, "cpu offset is 48"},
		{"cpus unaligned", func(im *image) { im.header.CPUOffset = 68 }, "cpu offset is 68"},
		{"cpus among slots", func(im *image) { im.header.NumCPUs = 64 }, "64 cpus at 128"},
		{"cpus without end", func(im *image) { im.header.NumCPUs = math.MaxUint32 }, "4294967295 cpus"},
		{"cpus beyond", func(im *image) { im.header.CPUOffset = 1 << 30 }, "slot offset is 4096"},
		{"slots unaligned", func(im *image) { im.header.SlotOffset = 4097 }, "slot offset is 4097"},
		{"slots beyond", func(im *image) { im.header.SlotOffset = 1 << 30 }, "4 slots at 1073741824"},
		{"slots without end", func(im *image) { im.header.NumSlots = math.MaxUint32 }, "4294967295 slots at 4096"},
		{"size of recent exits", func(im *image) { im.header.RecentSize = 64 }, "size of recent exits is 64"},
		{"recent exits among slots", func(im *image) { im.header.RecentOffset -= 8 }, "4 slots at 4096"},
		{"recent exits unaligned", func(im *image) { im.header.RecentOffset++ }, "offset of recent exits"},
		{"recent exits beyond", func(im *image) { im.header.RecentOffset = 1 << 30 }, "bytes, want"},
		{"more slots with memory than there are", func(im *image) { im.header.SlotsBacked = 5 }, "5 slots have memory, of 4"},
		{"rows", func(im *image) { im.slots[2].NumRows = 61 }, "slot 2: 61 rows"},
		{"level", func(im *image) { im.slots[0].Level = 5 }, "slot 0: level is 5"},
		{"state", func(im *image) { im.slots[1].State, im.slots[1].NumRows = 3, 0 }, "slot 1: state is 3"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			im := example()
			tt.spoil(im)
			m, err := New(im.bytes, testClock())
			if err == nil {
				_, err = m.Snapshot()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want one with %q", err, tt.want)
			}
		})
	}
}

// The present stretch is in the one sum that it will be added to.
func TestPresentStretch(t *testing.T) {
	type times = snapshot.Times
	for _, tt := range []struct {
		name string
		slot abi.Slot // row 0 is a CPUID, row 1 a HLT, row 2 those of several reasons
		want times
	}{
		{"guest", abi.Slot{TSC: tscNow - 100}, times{Guest: 100}},
		{"guest, whatever it is said to do", abi.Slot{TSC: tscNow - 100, Doing: abi.Outside}, times{Guest: 100}},
		{"not timed", abi.Slot{TSC: math.MaxInt64}, times{}},
		{"just begun", abi.Slot{TSC: tscNow}, times{}},
		{"begun since we looked", abi.Slot{TSC: tscNow + 1, Open: openAt(0)}, times{}},
		{"kvm", abi.Slot{TSC: tscNow - 100, Open: openAt(0), Doing: abi.InKVM}, times{KVM: 100}},
		{"user", abi.Slot{TSC: tscNow - 100, Open: openAt(0), Doing: abi.InUser}, times{User: 100}},
		{"outside", abi.Slot{TSC: tscNow - 100, Open: openAt(0), Doing: abi.Outside}, times{Outside: 100}},
		{"halted in user space", abi.Slot{TSC: tscNow - 100, Open: openAt(0), Doing: abi.Halted}, times{Halted: 100}},
		{"halted in kvm", abi.Slot{TSC: tscNow - 100, Open: openAt(1), Doing: abi.InKVM}, times{Halted: 100}},
		{"halted by who knows what", abi.Slot{TSC: tscNow - 100, Open: openAt(2), Doing: abi.InKVM}, times{KVM: 100}},
		{"doing something else", abi.Slot{TSC: tscNow - 100, Open: openAt(0), Doing: 9}, times{}},
		{"no row", abi.Slot{TSC: tscNow - 100, Open: openAt(3)}, times{}},
		{"within a row", abi.Slot{TSC: tscNow - 100, Open: openAt(0) + 8}, times{}},
		{"before the rows", abi.Slot{TSC: tscNow - 100, Open: 8}, times{}},
		{"beyond the slot", abi.Slot{TSC: tscNow - 100, Open: math.MaxUint32}, times{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			im := newImage(1)
			tt.slot.State, tt.slot.ISA, tt.slot.NumRows = abi.Live, abi.ISASVM, 3
			tt.slot.Rows[0].Code, tt.slot.Rows[1].Code = 0x72, 0x78
			tt.slot.Rows[2] = abi.Row{Code: 0x78, Flags: abi.RowOther}
			im.slots[0] = tt.slot
			if diff := cmp.Diff(tt.want, im.snapshot(t).Slots[0].Times); diff != "" {
				t.Errorf("times (-want +got):\n%s", diff)
			}
		})
	}
}

// TestTimesPass reads a slot whose thread exits and enters all the time: what
// it has been at makes the time that has passed.
func TestTimesPass(t *testing.T) {
	im := newImage(1)
	var now atomic.Uint64
	now.Store(1000)
	p := &im.slots[0]
	*p = abi.Slot{State: abi.Live, NumRows: 1, TSC: 1000}
	m, err := New(im.bytes, Clock{Ticks: now.Load, Boot: testClock().Boot})
	if err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var writer sync.WaitGroup
	writer.Go(func() {
		for !stop.Load() {
			for range 1 << 14 { // stretches are longer than a copy takes, most of them
				now.Add(1)
			}
			tsc := now.Load()
			if p.Open == 0 {
				atomic.AddUint64(&p.GuestTime, tsc-p.TSC)
				atomic.StoreUint32(&p.Open, openAt(0))
			} else {
				atomic.AddUint64(&p.Rows[0].Time, tsc-p.TSC)
				atomic.StoreUint32(&p.Open, 0)
			}
			atomic.StoreUint64(&p.TSC, tsc)
		}
	})
	defer writer.Wait()
	defer stop.Store(true)
	wrong := 0
	const copies = 2000
	for range copies {
		before := now.Load()
		s, err := m.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		times := s.Slots[0].Times
		if sum := times.Guest + times.KVM + 1000; sum < before || sum > now.Load() {
			wrong++ // between two of the writer's stores
		}
	}
	if wrong > copies/100 {
		t.Errorf("%d of %d copies do not add up", wrong, copies)
	}
}

func TestRecent(t *testing.T) {
	const index, generation = 1, 5
	id := snapshot.SlotID{Index: index, Generation: generation}
	// write makes exit n, which occurred n microseconds ago and took 100 + n cycles.
	write := func(im *image, n uint64) {
		im.recent[index].Exits[n%abi.NumRecent] = abi.Exit{TSC: tscNow - 2000*n, Cycles: 100 + n, RIP: 1<<63 + n, Code: uint32(n)}
	}
	exit := func(n uint64) snapshot.Exit {
		return snapshot.Exit{Number: n, Time: bootNow - 1000*n, Duration: 100 + n, Code: uint32(n), RIP: 1<<63 + n}
	}
	for _, tt := range []struct {
		name   string
		head   uint64
		from   uint64
		change func(*image)
		id     snapshot.SlotID
		first  uint64 // latest
		n      int
		err    error
	}{
		{name: "none", id: id},
		{name: "some", head: 3, id: id, first: 2, n: 3},
		{name: "the last of some", head: 3, from: 2, id: id, first: 2, n: 1},
		{name: "none since", head: 3, from: 3, id: id},
		{name: "none since, by far", head: 3, from: 1 << 60, id: id},
		{name: "almost full", head: 511, id: id, first: 510, n: 511},
		// The thread may be writing exit 512, in the place of exit 0.
		{name: "full", head: 512, id: id, first: 511, n: 511},
		{name: "overrun", head: 20_000, id: id, first: 19_999, n: 511},
		{name: "overrun, from inside", head: 20_000, from: 19_900, id: id, first: 19_999, n: 100},
		{name: "no memory", head: 3, change: func(im *image) { im.slots[index].HasRecent = 0 }, id: id},
		{name: "retired", head: 3, change: func(im *image) { im.slots[index].State = abi.Retired }, id: id, first: 2, n: 3},
		{name: "free", head: 3, change: func(im *image) { im.slots[index].State = abi.Free }, id: id, err: source.ErrStale},
		{name: "reused", head: 3, id: snapshot.SlotID{Index: index, Generation: generation - 1}, err: source.ErrStale},
		{name: "without memory", head: 3, id: snapshot.SlotID{Index: 2, Generation: generation}, err: source.ErrStale},
		{name: "no such slot", head: 3, id: snapshot.SlotID{Index: math.MaxUint32}, err: source.ErrStale},
	} {
		t.Run(tt.name, func(t *testing.T) {
			im := newImage(3)
			im.header.SlotsBacked = 2
			im.slots[index] = abi.Slot{Generation: generation, State: abi.Live, HasRecent: 1, RecentHead: tt.head}
			for n := tt.head - min(tt.head, abi.NumRecent); n < tt.head; n++ {
				write(im, n)
			}
			if tt.change != nil {
				tt.change(im)
			}
			m, err := New(im.bytes, testClock())
			if err != nil {
				t.Fatal(err)
			}
			got, err := m.Recent(tt.id, tt.from)
			if !errors.Is(err, tt.err) {
				t.Fatalf("error is %v, want %v", err, tt.err)
			}
			var want []snapshot.Exit
			for i := range tt.n {
				want = append(want, exit(tt.first-uint64(i)))
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("exits (-want +got):\n%s", diff)
			}
		})
	}
}

func TestRecentPresent(t *testing.T) {
	im := newImage(1)
	im.slots[0] = abi.Slot{State: abi.Live, HasRecent: 1, RecentHead: 1}
	im.recent[0].Exits[0] = abi.Exit{TSC: tscNow + 2000, Cycles: abi.Present, Code: 0x72}
	m, err := New(im.bytes, testClock())
	if err != nil {
		t.Fatal(err)
	}
	got, err := m.Recent(snapshot.SlotID{}, 0)
	if err != nil {
		t.Fatal(err)
	}
	want := []snapshot.Exit{{Time: bootNow + 1000, Present: true, Code: 0x72}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("exits (-want +got):\n%s", diff)
	}
}

// TestRecentOverrun reads a ring while it is written: what is returned is whole.
func TestRecentOverrun(t *testing.T) {
	im := newImage(1)
	p := &im.slots[0]
	*p = abi.Slot{State: abi.Live, HasRecent: 1}
	m, err := New(im.bytes, testClock())
	if err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var writer sync.WaitGroup
	writer.Go(func() {
		for n := uint64(0); !stop.Load(); n++ {
			e := &im.recent[0].Exits[n%abi.NumRecent]
			atomic.StoreUint64(&e.Cycles, n)
			atomic.StoreUint64(&e.RIP, n)
			atomic.StoreUint32(&e.Code, uint32(n))
			atomic.StoreUint64(&p.RecentHead, n+1)
		}
	})
	defer writer.Wait()
	defer stop.Store(true)
	for seen := 0; seen < 10_000; {
		exits, err := m.Recent(snapshot.SlotID{}, 0)
		if err != nil {
			t.Fatal(err)
		}
		for i, e := range exits {
			if e.Number != exits[0].Number-uint64(i) || e.Duration != e.Number || e.RIP != e.Number || e.Code != uint32(e.Number) {
				t.Fatalf("exit %d of %d is mixed: %+v", i, len(exits), e)
			}
		}
		seen += len(exits)
	}
}

func TestClock(t *testing.T) {
	// Something comes between the readings of all but the third pair.
	var tsc uint64
	gaps := []uint64{900, 800, 10, 700}
	pair := 0
	c := Clock{
		Ticks: func() uint64 { return tsc },
		Boot:  func() uint64 { tsc += gaps[pair]; pair++; return uint64(pair) },
	}
	if got, want := c.now(), (moment{1705, 3}); got != want {
		t.Errorf("now is %+v, want %+v", got, want)
	}
	m := moment{ticks: 10_000, boot: 5000}
	for _, tt := range []struct{ tsc, want uint64 }{{10_000, 5000}, {8000, 4000}, {12_000, 6000}, {0, 0}} {
		if got := m.bootTime(tt.tsc, 2_000_000_000); got != tt.want {
			t.Errorf("cycle %d is at %d, want %d", tt.tsc, got, tt.want)
		}
	}
	if got := (moment{ticks: 1 << 40, boot: 5}).bootTime(0, 1_000_000_000); got != 0 {
		t.Errorf("before the boot: %d, want 0", got)
	}
}

// The host's clocks run together.
func TestHostClock(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("no TSC")
	}
	c := TSC()
	a, b := c.now(), c.now()
	if a.ticks == 0 || b.ticks <= a.ticks || a.boot == 0 || b.boot < a.boot {
		t.Errorf("%+v, then %+v", a, b)
	}
}

// TestReuse reads a slot that another thread takes into use again and again: a
// copy is always of one use, whose number all of its counters hold.
func TestReuse(t *testing.T) {
	im := newImage(1)
	m, err := New(im.bytes, testClock())
	if err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var writer sync.WaitGroup
	writer.Go(func() {
		p := &im.slots[0]
		for use := uint32(0); !stop.Load(); use++ {
			atomic.StoreUint32(&p.TID, use)
			atomic.StoreUint64(&p.Since, uint64(use))
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
		s, err := m.Snapshot()
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
		if slot.TID != int(use) || slot.Since != uint64(use) || slot.Retired != (use%2 == 1) || len(slot.Rows) != int(use%abi.NumRows+1) {
			t.Fatalf("copy of use %d is mixed: %+v", use, slot)
		}
		for _, r := range slot.Rows {
			if r.Count != uint64(use) || use != 0 && r.Hist[abi.NumHist-1] != uint64(use) {
				t.Fatalf("copy of use %d has a row of another: %+v", use, r)
			}
		}
	}
}

// Histograms of rows that have not changed are those of the snapshot before, and
// of no others.
func TestSharedHistograms(t *testing.T) {
	type slot = abi.Slot
	for _, tt := range []struct {
		name   string
		before slot        // the changes since the example, whose row 0 has a histogram
		after  func(*slot) // those since the first snapshot
		shared bool
	}{
		{"nothing happened", slot{}, func(*slot) {}, true},
		{"time passed", slot{}, func(s *slot) { s.TSC += 4 }, true},
		{"another reason", slot{}, func(s *slot) { s.Rows[1].Count++ }, true},
		{"a new reason", slot{}, func(s *slot) { s.NumRows++ }, true},
		{"an exit", slot{}, func(s *slot) { s.Rows[0].Count++ }, false},
		{"time", slot{}, func(s *slot) { s.Rows[0].Time++ }, false},
		{"time in user space", slot{}, func(s *slot) { s.Rows[0].UserTime++ }, false},
		{"maximum", slot{}, func(s *slot) { s.Rows[0].Max++ }, false},
		{"exit was in progress", slot{Open: openAt(0)}, func(*slot) {}, false},
		{"another was", slot{Open: openAt(1)}, func(*slot) {}, true},
		{"retired", slot{}, func(s *slot) { s.State = abi.Retired }, false},
		{"another use", slot{}, func(s *slot) { s.Generation++ }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			im := example()
			p := &im.slots[0]
			p.Open = tt.before.Open
			m, err := New(im.bytes, testClock())
			if err != nil {
				t.Fatal(err)
			}
			var hists [2]snapshot.Hist
			for i := range hists {
				s, err := m.Snapshot()
				if err != nil {
					t.Fatal(err)
				}
				hists[i] = s.Slots[0].Rows[0].Hist
				tt.after(p)
			}
			if diff := cmp.Diff(hists[0], hists[1]); diff != "" {
				t.Errorf("histogram (-before +after):\n%s", diff)
			}
			if got := hists[0].Same(hists[1]); got != tt.shared {
				t.Errorf("shared: %t, want %t", got, tt.shared)
			}
		})
	}
}

// TestRest reads a slot while its thread exits and enters the guest. Whenever it
// rests, a snapshot is the same as that of a reader who has never read before.
func TestRest(t *testing.T) {
	im := newImage(1)
	p := &im.slots[0]
	const rows = 3
	*p = abi.Slot{State: abi.Live, NumRows: rows, ISA: abi.ISASVM, Level: abi.LevelTime}
	m, err := New(im.bytes, testClock())
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	tsc := uint64(1)
	add := func(p *uint64, n uint64) { atomic.StoreUint64(p, *p+n) }
	stretch := func(open uint32) { // in this order: see kmod/hook.c
		atomic.StoreUint32(&p.Open, open)
		tsc++
		atomic.StoreUint64(&p.TSC, tsc)
	}
	half := func(exit bool, row int, cycles uint64) {
		r := &p.Rows[row]
		if exit {
			add(&r.Count, 1)
			add(&p.GuestTime, 5)
			stretch(openAt(row))
			return
		}
		atomic.StoreUint64(&r.Max, max(r.Max, cycles))
		add(&r.Time, cycles)
		add(&r.Hist[cycles%4], 1)
		stretch(0)
	}
	begin, end := make(chan int), make(chan bool)
	go func() {
		row, exit := 0, true
		for halves := range begin {
			for range halves {
				if exit {
					row = rng.IntN(rows)
				}
				half(exit, row, 1+rng.Uint64N(1000))
				exit = !exit
			}
			end <- true
		}
	}()
	defer close(begin)
	for rest := range 3000 {
		begin <- rest % 7 * (1 + rest%3*50)
		for resting := false; !resting; {
			if _, err := m.Snapshot(); err != nil {
				t.Fatal(err)
			}
			select {
			case resting = <-end:
			default:
			}
		}
		got, err := m.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(im.snapshot(t), got); diff != "" {
			t.Fatalf("rest %d (-new reader +reader):\n%s", rest, diff)
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
	m, err := New(im.bytes, testClock())
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
		if s, err = m.Snapshot(); err != nil {
			t.Fatal(err)
		}
		if n := s.Exits(); n != total {
			t.Fatalf("%d exits after the release of %d, want %d", n, s.Released/1000, total)
		}
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
			binary.NativeEndian.PutUint32(mem[unsafe.Offsetof(abi.Header{}.RecentSize):], uint32(recentSize))
		}
		m, err := New(mem, testClock())
		if err != nil {
			return
		}
		s, err := m.Snapshot()
		if err != nil {
			return
		}
		for i := range s.Slots {
			if s.Slots[i].ID.Index >= m.header.SlotsBacked {
				t.Errorf("slot %d has no memory", s.Slots[i].ID.Index)
			}
			exits, err := m.Recent(s.Slots[i].ID, 0)
			if err != nil || len(exits) > abi.NumRecent {
				t.Errorf("slot %d: %d recent exits, %v", s.Slots[i].ID.Index, len(exits), err)
			}
		}
	})
}

func BenchmarkSnapshot(b *testing.B) {
	im := newImage(8000)
	for i := range im.slots {
		im.slots[i].State, im.slots[i].NumRows = abi.Live, 10
	}
	m, err := New(im.bytes, TSC())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := m.Snapshot(); err != nil {
			b.Fatal(err)
		}
	}
}
