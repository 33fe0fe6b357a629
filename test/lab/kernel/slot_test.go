// SPDX-License-Identifier: Apache-2.0

//go:build lab

package kernel

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
	"virtexit/test/lab/guest"
	"virtexit/test/lab/inside"
)

// KVM's statistics of halts are a vCPU's, a slot is a thread's, which may run
// another vCPU of the same number whose statistics begin at 0.
func TestHaltsOfAnotherVCPU(t *testing.T) {
	inside.Load(t, "")
	setHaltPoll(t, 0)
	s := open(t, snapshot.Time)
	thread := newVM(t, 1).VCPUs[0]
	var halted []uint64
	for _, halts := range []uint32{10, 2} {
		v := newHaltingVM(t).VCPUs[0]
		done := make(chan error, 1)
		go func() { done <- v.RunOn(thread, guest.Program{Ops: []guest.Op{guest.HLT(halts)}}) }()
		for going := true; going; {
			select {
			case err := <-done:
				if err != nil {
					t.Fatal(err)
				}
				going = false
			case <-time.After(20 * time.Millisecond):
				if err := v.Wake(); err != nil {
					t.Fatal(err)
				}
			}
		}
		sn := snap(t, s)
		for _, slot := range sn.Slots {
			if slot.TID == thread.TID() {
				halted = append(halted, slot.Times.Halted)
			}
		}
	}
	if len(halted) != 2 || halted[0] == 0 || halted[1] <= halted[0] {
		t.Errorf("halted %d ticks after each vCPU, want more and more of one slot", halted)
	}
}

// The first code that a slot sees is 0, which is also what an empty row says.
func TestFirstExitOfCode0(t *testing.T) {
	if inside.Host(t).ISA == exitreason.VMX {
		t.Skip("machine: no instruction of a guest exits with code 0 on VMX")
	}
	inside.Load(t, "")
	v := newVM(t, 1).VCPUs[0]
	const program = "cr0:50,cpuid:3"
	run(t, v, program) // it has its memory from now on
	s := open(t, snapshot.Off)
	// An interrupt may come first, but not each time.
	const rounds = 20
	for range rounds {
		if err := s.SetLevel(snapshot.Count); err != nil {
			t.Fatal(err)
		}
		run(t, v, program)
		if err := s.SetLevel(snapshot.Off); err != nil {
			t.Fatal(err)
		}
	}
	got := counts(snap(t, s), v.TID())
	if cpuid := inside.Host(t).Codes["cpuid"]; got[0] != rounds*50 || got[cpuid] != rounds*3 {
		t.Errorf("counted %v, want %d of code 0 and %d of %#x", got, rounds*50, rounds*3, cpuid)
	}
}

// A halt that goes on when the level falls is no handling.
func TestHaltAtFall(t *testing.T) {
	inside.Load(t, "")
	setHaltPoll(t, 0)
	s := open(t, snapshot.Time)
	v := begun(t, s, newHaltingVM(t))
	v.during(t, "hlt:1", func() {
		time.Sleep(time.Second)
		if err := s.SetLevel(snapshot.Count); err != nil {
			t.Fatal(err)
		}
	})
	sn := snap(t, s)
	for _, slot := range sn.Slots {
		if slot.TID != v.TID() {
			continue
		}
		for _, r := range slot.Rows {
			if r.Code == inside.Host(t).Codes["hlt"] && duration(r.Time, sn) > 100*time.Millisecond {
				t.Errorf("HLT was handled for %v", duration(r.Time, sn))
			}
		}
		if halted := duration(slot.Times.Halted, sn); halted < 800*time.Millisecond {
			t.Errorf("halted for %v, want a second", halted)
		}
	}
}

// A thread leaves KVM_RUN for the vCPU that it ran last, also when the slot of
// another is not timed.
func TestLeavesTheVCPUItRan(t *testing.T) {
	inside.Load(t, "")
	s := open(t, snapshot.Time)
	vm := newVM(t, 2)
	run(t, vm.VCPUs[0], "cpuid:10")
	if err := s.SetLevel(snapshot.Count); err != nil {
		t.Fatal(err)
	}
	if err := s.SetLevel(snapshot.Time); err != nil {
		t.Fatal(err)
	}
	var took time.Duration
	vm.VCPUs[1].Handle = func(guest.Return) error { took += burn(10 * time.Millisecond); return nil }
	if err := vm.VCPUs[1].RunOn(vm.VCPUs[0], guest.Program{Ops: []guest.Op{guest.Out(0x80, 50), guest.CPUID(0, 1)}}); err != nil {
		t.Fatal(err)
	}
	sn := snap(t, s)
	for _, slot := range sn.Slots {
		if slot.TID != vm.VCPUs[0].TID() || slot.VCPU != 1 {
			continue
		}
		if user, kvm := duration(slot.Times.User+slot.Times.Wait, sn), duration(slot.Times.KVM, sn); user < took || kvm > took/2 {
			t.Errorf("user space had %v, KVM %v; user space says %v", user, kvm, took)
		}
		return
	}
	t.Error("no slot of vCPU 1")
}

func TestManyVCPUs(t *testing.T) {
	inside.Load(t, "")
	inside.QuietLog(t)
	manyVCPUs(t, open(t, snapshot.Time), 64)
}

// manyVCPUs has one thread run more vCPUs in turn than a thread has slots for:
// nothing of the others is charged to a wrong one, or lost, or takes slots.
func manyVCPUs(t *testing.T, s source.Source, slots int) {
	const rounds = 3
	before := snap(t, s).Unattributed
	vm := newVM(t, slots+4)
	want, without := map[int]uint64{}, uint64(0)
	thread := vm.VCPUs[0]
	for round := range rounds {
		for i, v := range vm.VCPUs {
			if err := v.RunOn(thread, guest.Program{Ops: []guest.Op{guest.CPUID(0, uint32(1+i+round))}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i, v := range vm.VCPUs {
		if i < slots {
			want[i] = kvmExits(t, v)
		} else {
			without += kvmExits(t, v)
		}
	}
	sn := snap(t, s)
	if diff := cmp.Diff(want, bySlot(sn, thread.TID())); diff != "" {
		t.Errorf("exits by vCPU (-want +got):\n%s", diff)
	}
	if got := sn.Unattributed - before; len(sn.Slots) != slots || got != without {
		t.Errorf("%d slots, %d exits unattributed, want %d, %d", len(sn.Slots), got, slots, without)
	}
}
