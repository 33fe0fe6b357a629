// SPDX-License-Identifier: Apache-2.0

//go:build lab

package guest

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestWake(t *testing.T) {
	vm, err := NewHaltingVM()
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	v := vm.VCPUs[0]
	const halts = 20
	n := uint64(0)
	for range 2 { // the second time after a stop in a halt
		v.Start(Program{Ops: []Op{HLT(halts)}})
		for range halts {
			n++
			awaitHalt(t, v, n)
			time.Sleep(10 * time.Millisecond)
			if err := v.Wake(); err != nil {
				t.Fatal(err)
			}
		}
		if err := v.Wait(); err != nil {
			t.Error(err)
		}
		v.Start(Program{Ops: []Op{HLT(1)}})
		n++
		awaitHalt(t, v, n)
		v.Stop()
		if err := v.Wait(); err != nil {
			t.Error(err)
		}
	}
	stats, err := v.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if waited := time.Duration(stats["halt_wait_ns"]); waited < 2*halts*10*time.Millisecond {
		t.Errorf("halted for %v", waited)
	}
}

// awaitHalt waits until KVM has put the vCPU's thread to sleep in its n-th halt.
func awaitHalt(t *testing.T, v *VCPU, n uint64) {
	t.Helper()
	for range 1000 {
		stats, err := v.Stats()
		if err != nil {
			t.Fatal(err)
		}
		if stats["halt_exits"] == n && stats["blocking"] == 1 {
			return
		}
		time.Sleep(time.Millisecond)
	}
	stats, err := v.Stats()
	t.Fatalf("the vCPU does not halt for the %d. time: %v, %v", n, stats, err)
}

func TestHandle(t *testing.T) {
	vm := newVM(t, 1)
	v := vm.VCPUs[0]
	got := map[Return]int{}
	v.Handle = func(r Return) error {
		if tid := unix.Gettid(); tid != v.TID() {
			t.Errorf("handled by thread %d, want %d", tid, v.TID())
		}
		got[r]++
		return nil
	}
	run(t, v, Program{Ops: []Op{Out(0x80, 3), HLT(4), MMIO(0xa0000, 5)}})
	if got[IO] != 3 || got[Halt] != 4 || got[Access] != 5 {
		t.Errorf("returns %v", got)
	}
	signalled := make(chan bool, 1)
	v.Handle = func(r Return) error {
		if r == Signal {
			select {
			case signalled <- true:
			default:
			}
		}
		return nil
	}
	v.Start(Program{Forever: true})
	for done := false; !done; { // a signal may come before KVM_RUN
		if err := v.Signal(); err != nil {
			t.Fatal(err)
		}
		select {
		case done = <-signalled:
		case <-time.After(10 * time.Millisecond):
		}
	}
	v.Stop()
	if err := v.Wait(); err != nil {
		t.Error(err)
	}
}

func TestRunOn(t *testing.T) {
	a, b := newVM(t, 2), newVM(t, 1)
	for _, v := range append(a.VCPUs, b.VCPUs...) {
		run(t, v, Program{})
	}
	thread := a.VCPUs[0]
	got := exits(t, func() {
		for i, v := range append(a.VCPUs, b.VCPUs...) {
			if err := v.RunOn(thread, Program{Ops: []Op{CPUID(0, uint32(100*(i+1)))}}); err != nil {
				t.Error(err)
			}
		}
	})
	if got[thread.TID()][svmCPUID] != 600 || len(got) != 1 {
		t.Errorf("exits by thread and reason: %v", got)
	}
}
