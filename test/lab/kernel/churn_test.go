// SPDX-License-Identifier: Apache-2.0

//go:build lab

package kernel

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"virtexit/internal/snapshot"
	"virtexit/internal/source/kmod"
	"virtexit/test/lab/guest"
	"virtexit/test/lab/inside"
)

// tally keeps the counts of slots that it gives back.
type tally struct {
	threads map[int]uint64 // exits by tid
	slots   int
}

// take releases all retired slots of a snapshot.
func (c *tally) take(t testing.TB, s *kmod.Source) *snapshot.Snapshot {
	t.Helper()
	sn := snap(t, s)
	var ids []snapshot.SlotID
	for i := range sn.Slots {
		if slot := &sn.Slots[i]; slot.Retired {
			c.threads[slot.TID] += slot.Exits()
			c.slots++
			ids = append(ids, slot.ID)
		}
	}
	if len(ids) > 0 {
		if err := s.Release(ids); err != nil {
			t.Fatal(err)
		}
	}
	return sn
}

// drain takes until there is no slot left.
func (c *tally) drain(t testing.TB, s *kmod.Source) {
	t.Helper()
	inside.Eventually(t, "no slot is left", 20*time.Second, func() bool { return len(c.take(t, s).Slots) == 0 })
}

func newRandom(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// TestChurn has guests end at random moments, by their own will and by that of others, while levels change and slots are
// released. KVM's tracepoint says what is true.
func TestChurn(t *testing.T) {
	inside.Load(t, "")
	inside.QuietLog(t)
	guests := 1000
	if scale(t, guests) != guests {
		guests = 20
	}
	random := newRandom(t)
	truth := inside.CountExits(t)
	s := open(t, snapshot.Time)
	got := tally{threads: map[int]uint64{}}
	killed := 0
	for ; got.slots < guests; killed++ {
		child, err := os.StartProcess("/proc/self/exe", []string{"kernel", "-test.run=^TestDieYoung$"}, &os.ProcAttr{
			Env: append(os.Environ(), "VIRTEXIT_TEST_DIE_YOUNG=1"), Files: []*os.File{nil, os.Stdout, os.Stderr}})
		if err != nil {
			t.Fatal(err)
		}
		// Not before its first guest runs.
		inside.Eventually(t, "guests of the child run", 60*time.Second, func() bool {
			for _, slot := range got.take(t, s).Slots {
				if slot.Process.TGID == child.Pid {
					return true
				}
			}
			return false
		})
		end := time.Now().Add(time.Duration(random.IntN(4000)) * time.Millisecond)
		for time.Now().Before(end) {
			if err := s.SetLevel(snapshot.Count + snapshot.Level(random.IntN(3))); err != nil {
				t.Fatal(err)
			}
			got.take(t, s)
			time.Sleep(time.Duration(random.IntN(50)) * time.Millisecond)
		}
		if err := child.Kill(); err != nil {
			t.Fatal(err)
		}
		if _, err := child.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	got.drain(t, s)
	sn := snap(t, s)
	t.Logf("%d vCPU threads, %d processes killed, %d exits", got.slots, killed, sn.Exits())
	if sn.Unattributed != 0 || sn.Refused != 0 {
		t.Errorf("unattributed %d, refused %d, want none", sn.Unattributed, sn.Refused)
	}
	want := truth()
	sum := uint64(0)
	for tid, n := range want {
		sum += n
		if got.threads[tid] != n {
			t.Errorf("thread %d: %d exits, want %d", tid, got.threads[tid], n)
		}
	}
	if sn.Exits() != sum || sn.Released != sum || len(got.threads) != len(want) {
		t.Errorf("%d exits, %d released, of %d threads; want %d of %d", sn.Exits(), sn.Released, len(got.threads), sum, len(want))
	}
}

// TestDieYoung is a child of TestChurn: it makes guests and ends them until it is killed.
func TestDieYoung(t *testing.T) {
	if os.Getenv("VIRTEXIT_TEST_DIE_YOUNG") == "" {
		return
	}
	var all sync.WaitGroup
	for range 24 {
		all.Go(func() {
			for {
				vm, err := guest.NewVM(1 + rand.IntN(2))
				if err != nil {
					t.Error(err)
					return
				}
				for _, v := range vm.VCPUs {
					p, err := guest.Parse(fmt.Sprintf("cpuid:%d,out:0x80:%d,hlt:%d,hypercall:%d,mmio:0xa0000:%d,spin:%d",
						rand.IntN(50), rand.IntN(20), rand.IntN(20), rand.IntN(20), rand.IntN(5), rand.IntN(5000)))
					if err != nil {
						t.Error(err)
						return
					}
					p.Forever = rand.IntN(2) > 0
					v.Start(p)
				}
				time.Sleep(time.Duration(rand.IntN(10)) * time.Millisecond)
				if err := vm.Close(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
}

func kvmExits(t testing.TB, v *guest.VCPU) uint64 {
	t.Helper()
	stats, err := v.Stats()
	if err != nil {
		t.Fatal(err)
	}
	return stats["exits"]
}

// bySlot tells the exits of each vCPU that a thread has run.
func bySlot(s *snapshot.Snapshot, tid int) map[int]uint64 {
	got := map[int]uint64{}
	for i := range s.Slots {
		if s.Slots[i].TID == tid {
			got[s.Slots[i].VCPU] += s.Slots[i].Exits()
		}
	}
	return got
}

// A vCPU that one thread runs, then another, then the first again, at each level.
func TestVCPUChangesThreads(t *testing.T) {
	inside.Load(t, "")
	inside.QuietLog(t)
	s := open(t, snapshot.Time)
	vm, others := newVM(t, 1), newVM(t, 3)
	moving := vm.VCPUs[0]
	want := map[int]uint64{}
	for i := range scale(t, 200) {
		if err := s.SetLevel(snapshot.Count + snapshot.Level(i/10%3)); err != nil {
			t.Fatal(err)
		}
		on := others.VCPUs[i%3]
		p, err := guest.Parse(fmt.Sprintf("cpuid:%d,hlt:%d,out:0x80:2", 1+i%7, i%3))
		if err != nil {
			t.Fatal(err)
		}
		before := kvmExits(t, moving)
		if err := moving.RunOn(on, p); err != nil {
			t.Fatal(err)
		}
		want[on.TID()] += kvmExits(t, moving) - before
	}
	sn := snap(t, s)
	for tid, n := range want {
		if got := bySlot(sn, tid); got[0] != n || len(got) != 1 {
			t.Errorf("thread %d: exits by vCPU %v, want %d of vCPU 0 alone", tid, got, n)
		}
	}
	if sn.Exits() != kvmExits(t, moving) || sn.Unattributed != 0 {
		t.Errorf("%d exits, %d unattributed; want KVM's %d, none", sn.Exits(), sn.Unattributed, kvmExits(t, moving))
	}
	timesAreWithin(t, sn)
}

// timesAreWithin holds each live slot to no more time than there has been.
func timesAreWithin(t testing.TB, sn *snapshot.Snapshot) {
	t.Helper()
	for i := range sn.Slots {
		slot := &sn.Slots[i]
		age := bootTime() - time.Duration(slot.Since)
		if got := duration(slot.Times.Total(), sn); got > age+age/100 {
			t.Errorf("thread %d, vCPU %d: %v of time in %v", slot.TID, slot.VCPU, got, age)
		}
	}
}

// A thread that runs the vCPUs of guest after guest: each comes to where a dead one was in KVM's memory.
func TestThreadOutlivesGuests(t *testing.T) {
	inside.Load(t, "")
	inside.QuietLog(t)
	s := open(t, snapshot.Time)
	thread := newVM(t, 1).VCPUs[0]
	want := map[int]uint64{}
	for i := range scale(t, 100) {
		vm := newVM(t, 1+i%3)
		id := i % len(vm.VCPUs)
		if err := vm.VCPUs[id].RunOn(thread, guest.Program{Ops: []guest.Op{guest.CPUID(0, uint32(10+i)), guest.HLT(3)}}); err != nil {
			t.Fatal(err)
		}
		want[id] += kvmExits(t, vm.VCPUs[id])
		if err := vm.Close(); err != nil {
			t.Fatal(err)
		}
	}
	sn := snap(t, s)
	if got := bySlot(sn, thread.TID()); !maps.Equal(got, want) {
		t.Errorf("exits by vCPU %v, want %v", got, want)
	}
	if len(sn.Slots) != len(want) || sn.Unattributed != 0 {
		t.Errorf("%d slots, %d exits unattributed; want %d, none", len(sn.Slots), sn.Unattributed, len(want))
	}
	timesAreWithin(t, sn)
}

// Two vCPUs that one thread runs in turn.
func TestVCPUsShareThread(t *testing.T) {
	inside.Load(t, "")
	inside.QuietLog(t)
	s := open(t, snapshot.Time)
	vm := newVM(t, 2)
	thread := vm.VCPUs[0]
	n := scale(t, 100)
	for i := range n {
		for _, v := range vm.VCPUs {
			if err := v.RunOn(thread, guest.Program{Ops: []guest.Op{guest.CPUID(0, uint32(1+i)), guest.Out(0x80, 2)}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	sn := snap(t, s)
	want := map[int]uint64{}
	for id, v := range vm.VCPUs {
		want[id] = kvmExits(t, v)
	}
	if got := bySlot(sn, thread.TID()); !maps.Equal(got, want) {
		t.Errorf("exits by vCPU %v, want %v", got, want)
	}
	timesAreWithin(t, sn)
}

// More vCPU threads than slots: what finds none is unattributed, to the last exit, until one is free again.
func TestSlotsRunOut(t *testing.T) {
	inside.Load(t, "slots=3 pool=1")
	inside.QuietLog(t)
	s := open(t, snapshot.Time)
	lucky, unlucky := newVM(t, 3), newVM(t, 4)
	attributed, rest := uint64(0), uint64(0)
	for _, v := range lucky.VCPUs {
		// The pool holds one slot at a time.
		inside.Eventually(t, "a slot is free", 5*time.Second, func() bool {
			run(t, v, "cpuid:1")
			return len(counts(snap(t, s), v.TID())) > 0
		})
	}
	first := snap(t, s)
	n := scale(t, 1000)
	for round := range 2 {
		for _, v := range append(lucky.VCPUs, unlucky.VCPUs...) {
			v.Start(guest.Program{Ops: []guest.Op{guest.CPUID(0, uint32(n)), guest.Out(0x80, 10)}})
		}
		for _, v := range append(lucky.VCPUs, unlucky.VCPUs...) {
			if err := v.Wait(); err != nil {
				t.Fatal(err)
			}
		}
		attributed, rest = 0, 0
		for _, v := range lucky.VCPUs {
			attributed += kvmExits(t, v)
		}
		for _, v := range unlucky.VCPUs {
			rest += kvmExits(t, v)
		}
		sn := snap(t, s)
		if got := sn.Unattributed - first.Unattributed; got != rest {
			t.Errorf("round %d: %d exits unattributed, want %d", round, got, rest)
		}
		if sn.Exits() != attributed+rest {
			t.Errorf("round %d: %d exits in all, want %d", round, sn.Exits(), attributed+rest)
		}
	}

	if err := lucky.Close(); err != nil {
		t.Fatal(err)
	}
	got := tally{threads: map[int]uint64{}}
	got.drain(t, s)
	before := snap(t, s)
	if before.Exits() != attributed+rest {
		t.Errorf("%d exits when all slots are released, want %d", before.Exits(), attributed+rest)
	}
	v := unlucky.VCPUs[0]
	was := kvmExits(t, v)
	inside.Eventually(t, "a slot is free again", 5*time.Second, func() bool {
		run(t, v, "cpuid:10")
		return len(counts(snap(t, s), v.TID())) > 0
	})
	after := snap(t, s)
	if got, want := after.Exits()-before.Exits(), kvmExits(t, v)-was; got != want {
		t.Errorf("%d more exits, want %d", got, want)
	}
	was, before = kvmExits(t, v), after
	run(t, v, "cpuid:100")
	after = snap(t, s)
	if got, want := total(counts(after, v.TID()))-total(counts(before, v.TID())), kvmExits(t, v)-was; got != want || after.Unattributed != before.Unattributed {
		t.Errorf("with a slot: %d exits, %d unattributed; want %d, none", got, after.Unattributed-before.Unattributed, want)
	}
}

// A burst of threads empties a small pool faster than it is filled.
func TestPoolRunsOut(t *testing.T) {
	inside.Load(t, "pool=1")
	inside.QuietLog(t)
	s := open(t, snapshot.Time)
	vm := newVM(t, min(64, scale(t, 64)+6))
	for _, v := range vm.VCPUs {
		v.Start(guest.Program{Ops: []guest.Op{guest.CPUID(0, 200)}})
	}
	want := uint64(0)
	for _, v := range vm.VCPUs {
		if err := v.Wait(); err != nil {
			t.Fatal(err)
		}
		want += kvmExits(t, v)
	}
	sn := snap(t, s)
	t.Logf("%d of %d exits unattributed", sn.Unattributed, sn.Exits())
	if sn.Exits() != want || sn.Refused != 0 {
		t.Errorf("%d exits, %d refused; want KVM's %d, none", sn.Exits(), sn.Refused, want)
	}
	inside.Eventually(t, "every thread has a slot", 10*time.Second, func() bool {
		for _, v := range vm.VCPUs {
			run(t, v, "cpuid:1")
		}
		return len(snap(t, s).Slots) == len(vm.VCPUs)
	})
}

// TestKVMReloadsLoseNothing reloads KVM between guests, again and again, under one lease.
func TestKVMReloadsLoseNothing(t *testing.T) {
	inside.Load(t, "")
	inside.QuietLog(t)
	s := open(t, snapshot.Time)
	want := uint64(0)
	for round := range 4 {
		vm := newVM(t, 2)
		for _, v := range vm.VCPUs {
			run(t, v, "cpuid:50,hlt:5,out:0x80:5")
			want += kvmExits(t, v)
		}
		if err := vm.Close(); err != nil {
			t.Fatal(err)
		}
		if round%2 == 0 {
			inside.Remove(t, inside.Host(t).Module)
		}
		if round == 2 {
			inside.Remove(t, "kvm")
		}
		inside.LoadKVM(t)
		info, err := s.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Level != snapshot.Time || info.Refused != "" || info.SlotsLive != 0 {
			t.Errorf("round %d: %+v", round, info)
		}
		if got := snap(t, s).Exits(); got != want {
			t.Errorf("round %d: %d exits, want %d", round, got, want)
		}
	}
	got := tally{threads: map[int]uint64{}}
	got.drain(t, s)
	if sn := snap(t, s); sn.Exits() != want || sn.Released != want || got.slots != 8 {
		t.Errorf("%d exits, %d released in %d slots; want %d in 8", sn.Exits(), sn.Released, got.slots, want)
	}
}

// TestMemoryComesBack repeats a lease's life and compares what the kernel holds in between.
func TestMemoryComesBack(t *testing.T) {
	if strings.HasSuffix(inside.Release(t), "-debug") {
		t.Skip("machine: KASAN keeps memory that has been freed")
	}
	inside.Load(t, "")
	inside.QuietLog(t)
	guests := scale(t, 120)
	var first int
	var module string
	const rounds = 5
	for round := range rounds {
		s, err := kmod.Open()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SetLevel(snapshot.Recent); err != nil {
			t.Fatal(err)
		}
		// All at a time, so that each has a slot of its own.
		var vms []*guest.VM
		for range guests / 4 {
			vm := newVM(t, 4)
			vms = append(vms, vm)
			for _, v := range vm.VCPUs {
				run(t, v, "cpuid:5")
			}
		}
		info, err := s.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.SlotsBacked < guests {
			t.Errorf("round %d: %d slots have memory, with %d vCPU threads", round, info.SlotsBacked, guests)
		}
		for _, vm := range vms {
			if err := vm.Close(); err != nil {
				t.Fatal(err)
			}
		}
		got := tally{threads: map[int]uint64{}}
		got.drain(t, s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		inside.Eventually(t, "no slot has memory", 20*time.Second, func() bool {
			s, err := kmod.Open()
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			info, err := s.Info()
			if err != nil {
				t.Fatal(err)
			}
			return info.SlotsBacked == 0
		})
		memory := inside.KernelPages(t)
		t.Logf("round %d: the kernel uses %d KiB", round, memory>>10)
		switch {
		case round == 0: // what is kept for good is there by the second
		case round == 1:
			first, module = memory, inside.ModuleMemory(t)
		default:
			if got := inside.ModuleMemory(t); got != module {
				t.Errorf("round %d: vmalloc holds\n%sbefore:\n%s", round, got, module)
			}
		}
		if round == rounds-1 {
			// A slot and its recent exits are 32 KiB.
			if lost := memory - first; lost > 1<<20 {
				t.Errorf("the kernel uses %d KiB more than %d rounds before", lost>>10, rounds-2)
			}
		}
	}
	if module == "" {
		t.Error("vmalloc holds nothing of the module's")
	}
	inside.Remove(t, "virtexit")
	if left := inside.ModuleMemory(t); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
}
