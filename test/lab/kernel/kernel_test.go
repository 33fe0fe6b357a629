// SPDX-License-Identifier: Apache-2.0

//go:build lab

package kernel

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
	"virtexit/internal/source/kmod"
	"virtexit/test/lab/guest"
	"virtexit/test/lab/inside"
)

func TestMain(m *testing.M) { inside.Main(m) }

func open(t testing.TB, level snapshot.Level) *kmod.Source {
	t.Helper()
	s, err := kmod.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if err := s.SetLevel(level); err != nil {
		t.Fatal(err)
	}
	return s
}

func newVM(t testing.TB, vcpus int) *guest.VM {
	t.Helper()
	vm, err := guest.NewVM(vcpus)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { vm.Close() })
	return vm
}

func run(t testing.TB, v *guest.VCPU, program string) {
	t.Helper()
	p, err := guest.Parse(program)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Run(p); err != nil {
		t.Fatal(err)
	}
}

func snap(t testing.TB, s source.Source) *snapshot.Snapshot {
	t.Helper()
	got, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// counts adds up the rows of a thread, live and retired.
func counts(s *snapshot.Snapshot, tid int) map[uint32]uint64 {
	got := map[uint32]uint64{}
	for i := range s.Slots {
		if s.Slots[i].TID == tid {
			for _, r := range s.Slots[i].Rows {
				got[r.Code] += r.Count
			}
		}
	}
	return got
}

func total(m map[uint32]uint64) (n uint64) {
	for _, c := range m {
		n += c
	}
	return n
}

// scale lowers counts where the emulated CPU is slow.
func scale(t testing.TB, n int) int {
	if inside.Host(t).ISA == exitreason.VMX {
		return n / 10
	}
	return n
}

func TestExactCounts(t *testing.T) {
	inside.Load(t, "")
	codes := inside.Host(t).Codes
	for _, level := range []snapshot.Level{snapshot.Count, snapshot.Time} {
		t.Run(fmt.Sprint("level ", level), func(t *testing.T) {
			s := open(t, level)
			vm := newVM(t, 1)
			n := scale(t, 10000)
			run(t, vm.VCPUs[0], fmt.Sprintf("cpuid:%d,out:0x80:%d,in:0x81:%d,hlt:%d,hypercall:%d,rdmsr:0x1b:%d,mmio:0xa0000:%d",
				n, n/20, n/25, n/50, n/8, n/9, n/200))
			sn := snap(t, s)
			got := counts(sn, vm.VCPUs[0].TID())
			for _, want := range []struct {
				op string
				n  int
			}{{"cpuid", n}, {"io", n/20 + n/25 + 1}, {"hlt", n / 50}, {"hypercall", n / 8}, {"rdmsr", n / 9}, {"mmio", n/200 + 1}} {
				if want.op == "mmio" && inside.Host(t).ISA == exitreason.VMX {
					// Without an entry for MMIO, EPT reports a violation first and a misconfiguration then.
					if c := got[48] + got[49]; c < uint64(want.n) {
						t.Errorf("mmio: %d exits, want at least %d", c, want.n)
					}
					continue
				}
				if c := got[codes[want.op]]; c != uint64(want.n) {
					t.Errorf("%s: %d exits, want %d", want.op, c, want.n)
				}
			}
			stats, err := vm.VCPUs[0].Stats()
			if err != nil {
				t.Fatal(err)
			}
			if stats["exits"] != total(got) {
				t.Errorf("KVM's own statistic says %d exits, counted %d: %v", stats["exits"], total(got), got)
			}
			if sn.Unattributed != 0 || sn.Refused != 0 {
				t.Errorf("unattributed %d, refused %d, want none", sn.Unattributed, sn.Refused)
			}
			for _, slot := range sn.Slots {
				if slot.TID != vm.VCPUs[0].TID() {
					continue
				}
				if slot.Process.TGID != os.Getpid() || slot.VCPU != 0 || slot.ISA != inside.Host(t).ISA {
					t.Errorf("slot of %d vcpu %d isa %v, want %d, 0, %v", slot.Process.TGID, slot.VCPU, slot.ISA, os.Getpid(), inside.Host(t).ISA)
				}
				timed := uint64(0)
				for _, r := range slot.Rows {
					for _, h := range r.Hist {
						timed += h
					}
					if level == snapshot.Time && r.Count > 1 && (r.Time == 0 || r.Max == 0 || r.Max > r.Time) {
						t.Errorf("row %#x: count %d, time %d, max %d", r.Code, r.Count, r.Time, r.Max)
					}
				}
				switch {
				case level == snapshot.Count && (timed != 0 || slot.Times.Guest != 0):
					t.Errorf("timed %d, guest time %d at level count", timed, slot.Times.Guest)
				case level == snapshot.Time && timed+1 != slot.Exits():
					// The last exit ended the program and had no entry after it.
					t.Errorf("timed %d of %d exits, want all but the last", timed, slot.Exits())
				case level == snapshot.Time && slot.Times.Guest == 0:
					t.Error("no guest time at level time")
				}
			}
		})
	}
}

func TestNeverMixed(t *testing.T) {
	inside.Load(t, "")
	s := open(t, snapshot.Time)
	a, b := newVM(t, 2), newVM(t, 2)
	want := map[int]int{}
	for i, v := range []*guest.VCPU{a.VCPUs[0], a.VCPUs[1], b.VCPUs[0], b.VCPUs[1]} {
		n := scale(t, 1000) * (i + 1)
		want[v.TID()] = n
		p, err := guest.Parse(fmt.Sprintf("cpuid:%d", n))
		if err != nil {
			t.Fatal(err)
		}
		v.Start(p)
	}
	for _, vm := range []*guest.VM{a, b} {
		for _, v := range vm.VCPUs {
			if err := v.Wait(); err != nil {
				t.Fatal(err)
			}
		}
	}
	sn := snap(t, s)
	for tid, n := range want {
		if got := counts(sn, tid)[inside.Host(t).Codes["cpuid"]]; got != uint64(n) {
			t.Errorf("thread %d: %d CPUID exits, want %d", tid, got, n)
		}
	}
}

func TestLevelsLoseNothing(t *testing.T) {
	inside.Load(t, "")
	s := open(t, snapshot.Count)
	vm := newVM(t, 1)
	const n = 40000
	p, err := guest.Parse(fmt.Sprintf("cpuid:%d", n))
	if err != nil {
		t.Fatal(err)
	}
	vm.VCPUs[0].Start(p)
	done := make(chan error)
	go func() { done <- vm.VCPUs[0].Wait() }()
	changes := 0
	for running := true; running; changes++ {
		if err := s.SetLevel(snapshot.Count + snapshot.Level(changes%3)); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		case <-time.After(20 * time.Millisecond):
		}
	}
	if changes < 4 {
		t.Errorf("only %d changes of level while the guest ran", changes)
	}
	sn := snap(t, s)
	if got := counts(sn, vm.VCPUs[0].TID())[inside.Host(t).Codes["cpuid"]]; got != uint64(n) {
		t.Errorf("%d CPUID exits over %d changes of level, want %d", got, changes, n)
	}
	for _, slot := range sn.Slots {
		for _, r := range slot.Rows {
			if seconds := r.Max / sn.TickHz; seconds > 60 {
				t.Errorf("row %#x: longest exit %d s", r.Code, seconds)
			}
		}
	}
}

func TestRetireAndRelease(t *testing.T) {
	inside.Load(t, "")
	s := open(t, snapshot.Time)
	vm := newVM(t, 1)
	run(t, vm.VCPUs[0], "cpuid:321")
	tid := vm.VCPUs[0].TID()
	if err := vm.Close(); err != nil {
		t.Fatal(err)
	}
	var dead *snapshot.Slot
	inside.Eventually(t, "the slot of a dead thread is retired", 5*time.Second, func() bool {
		sn := snap(t, s)
		for i := range sn.Slots {
			if sn.Slots[i].TID == tid && sn.Slots[i].Retired {
				dead = &sn.Slots[i]
			}
		}
		return dead != nil
	})
	before := snap(t, s)
	if got := counts(before, tid)[inside.Host(t).Codes["cpuid"]]; got != 321 {
		t.Errorf("final count %d, want 321", got)
	}
	if err := s.Release([]snapshot.SlotID{dead.ID}); err != nil {
		t.Fatal(err)
	}
	after := snap(t, s)
	if got := counts(after, tid); len(got) != 0 {
		t.Errorf("released slot still there: %v", got)
	}
	if before.Exits() != after.Exits() {
		t.Errorf("the kernel's total went from %d to %d over a release", before.Exits(), after.Exits())
	}
	if err := s.Release([]snapshot.SlotID{dead.ID}); !errors.Is(err, source.ErrStale) {
		t.Errorf("released twice: %v, want %v", err, source.ErrStale)
	}
	// The memory of the slot serves again and shows nothing of the past.
	vm = newVM(t, 1)
	run(t, vm.VCPUs[0], "cpuid:7")
	if got := counts(snap(t, s), vm.VCPUs[0].TID())[inside.Host(t).Codes["cpuid"]]; got != 7 {
		t.Errorf("next guest: %d, want 7", got)
	}
}

func TestOffRetiresAll(t *testing.T) {
	inside.Load(t, "")
	s := open(t, snapshot.Time)
	vm := newVM(t, 2)
	for _, v := range vm.VCPUs {
		run(t, v, "cpuid:100")
	}
	if err := s.SetLevel(snapshot.Off); err != nil {
		t.Fatal(err)
	}
	info, err := s.Info()
	if err != nil {
		t.Fatal(err)
	}
	if info.Level != snapshot.Off || info.Hook != "none" || info.SlotsLive != 0 || info.SlotsRetired != 2 {
		t.Errorf("after off: %+v", info)
	}
	total := snap(t, s).Exits()
	for _, v := range vm.VCPUs {
		run(t, v, "cpuid:100")
	}
	if got := snap(t, s).Exits(); got != total {
		t.Errorf("counted %d exits while off", got-total)
	}
	if err := s.SetLevel(snapshot.Time); err != nil {
		t.Fatal(err)
	}
	run(t, vm.VCPUs[0], "cpuid:100")
	if got := counts(snap(t, s), vm.VCPUs[0].TID())[inside.Host(t).Codes["cpuid"]]; got != 200 {
		t.Errorf("off for 100 of 300 exits: counted %d, want 200", got)
	}
}

func TestPoolExhausted(t *testing.T) {
	inside.Load(t, "slots=1")
	s := open(t, snapshot.Time)
	vm := newVM(t, 2)
	run(t, vm.VCPUs[0], "cpuid:100")
	before := snap(t, s)
	run(t, vm.VCPUs[1], "cpuid:100")
	after := snap(t, s)
	stats, err := vm.VCPUs[1].Stats()
	if err != nil {
		t.Fatal(err)
	}
	if got := after.Unattributed - before.Unattributed; got != stats["exits"] {
		t.Errorf("%d exits unattributed, want all %d of the vCPU that found no slot", got, stats["exits"])
	}
	if after.Exits()-before.Exits() != stats["exits"] {
		t.Errorf("total grew by %d, want %d", after.Exits()-before.Exits(), stats["exits"])
	}
}

func TestUnloadUnderLoad(t *testing.T) {
	inside.Load(t, "")
	vm := newVM(t, 2)
	for _, v := range vm.VCPUs {
		p, err := guest.Parse("cpuid:100,out:0x80:10")
		if err != nil {
			t.Fatal(err)
		}
		p.Forever = true
		v.Start(p)
	}
	for range 10 {
		s, err := kmod.Open()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SetLevel(snapshot.Time); err != nil {
			t.Fatal(err)
		}
		inside.Eventually(t, "exits are counted", 5*time.Second, func() bool { return snap(t, s).Exits() > 100 })
		s.Close()
		inside.Remove(t, "virtexit")
		inside.Insert(t, "")
	}
}

func TestKVMReload(t *testing.T) {
	inside.Load(t, "")
	s := open(t, snapshot.Time)
	for range 3 {
		inside.Remove(t, inside.Host(t).Module)
		inside.Remove(t, "kvm")
		info, err := s.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.KVM || info.Level != snapshot.Off || info.ISA != exitreason.None {
			t.Errorf("without KVM: %+v", info)
		}
		inside.LoadKVM(t)
		vm, err := guest.NewVM(1)
		if err != nil {
			t.Fatal(err)
		}
		run(t, vm.VCPUs[0], "cpuid:50")
		if got := counts(snap(t, s), vm.VCPUs[0].TID())[inside.Host(t).Codes["cpuid"]]; got != 50 {
			t.Errorf("after reload: %d, want 50", got)
		}
		if err := vm.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// KVM refuses the module of the other vendor, which has come by then.
func TestOtherVendorRefused(t *testing.T) {
	inside.Load(t, "")
	s := open(t, snapshot.Time)
	vm := newVM(t, 1)
	run(t, vm.VCPUs[0], "cpuid:10")
	other := "kvm_intel"
	if inside.Host(t).Module == other {
		other = "kvm_amd"
	}
	// Its status says nothing: it takes some refusals for "is loaded already".
	out, err := exec.Command("modprobe", other).CombinedOutput()
	if _, stat := os.Stat("/sys/module/" + other); stat == nil {
		t.Fatalf("%s was not refused: %v %s", other, err, out)
	}
	run(t, vm.VCPUs[0], "cpuid:10")
	sn := snap(t, s)
	if got := counts(sn, vm.VCPUs[0].TID())[inside.Host(t).Codes["cpuid"]]; got != 20 {
		t.Errorf("%d CPUID exits, want 20", got)
	}
	if len(sn.Slots) != 1 {
		t.Errorf("%d slots, want the one that there was", len(sn.Slots))
	}
}

// A vCPU thread that executes another program keeps its task, but is no longer
// what it was.
func TestExecRetires(t *testing.T) {
	inside.Load(t, "")
	s := open(t, snapshot.Time)
	child, err := os.StartProcess("/proc/self/exe", []string{"kernel", "-test.run=^TestRunAndExec$"}, &os.ProcAttr{
		Env: append(os.Environ(), "VIRTEXIT_TEST_RUN_AND_EXEC=1"), Files: []*os.File{nil, os.Stdout, os.Stderr}})
	if err != nil {
		t.Fatal(err)
	}
	inside.Eventually(t, "the slot retires while its thread lives", 20*time.Second, func() bool {
		for _, slot := range snap(t, s).Slots {
			if slot.Process.TGID == child.Pid {
				return slot.Retired
			}
		}
		return false
	})
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", child.Pid))
	if err != nil || string(comm) != "sleep\n" {
		t.Errorf("the process is %q, %v; want sleep", comm, err)
	}
	if err := child.Kill(); err != nil {
		t.Error(err)
	}
	if _, err := child.Wait(); err != nil {
		t.Error(err)
	}
}

// TestRunAndExec is the other process of TestExecRetires.
func TestRunAndExec(t *testing.T) {
	if os.Getenv("VIRTEXIT_TEST_RUN_AND_EXEC") == "" {
		return
	}
	vm, err := guest.NewVM(1)
	if err != nil {
		t.Fatal(err)
	}
	run(t, vm.VCPUs[0], "cpuid:10")
	t.Fatal(vm.VCPUs[0].Do(func() error { return unix.Exec("/bin/sleep", []string{"sleep", "60"}, nil) }))
}

func TestLeaseDiesWithItsProcess(t *testing.T) {
	inside.Load(t, "")
	watch, err := kmod.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { watch.Close() })
	child, err := os.StartProcess("/proc/self/exe", []string{"kernel", "-test.run=^TestHoldLease$"}, &os.ProcAttr{
		Env: append(os.Environ(), "VIRTEXIT_TEST_HOLD_LEASE=1"), Files: []*os.File{nil, os.Stdout, os.Stderr}})
	if err != nil {
		t.Fatal(err)
	}
	level := func() snapshot.Level {
		info, err := watch.Info()
		if err != nil {
			t.Fatal(err)
		}
		return info.Level
	}
	inside.Eventually(t, "the child's lease is in force", 20*time.Second, func() bool { return level() == snapshot.Time })
	if err := child.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := child.Wait(); err != nil {
		t.Fatal(err)
	}
	off := inside.Eventually(t, "the lease ends with its process", time.Second, func() bool { return level() == snapshot.Off })
	if off > time.Second {
		t.Errorf("off after %v", off)
	}
}

// TestHoldLease is the other process of TestLeaseDiesWithItsProcess.
func TestHoldLease(t *testing.T) {
	if os.Getenv("VIRTEXIT_TEST_HOLD_LEASE") == "" {
		return
	}
	open(t, snapshot.Time)
	time.Sleep(time.Minute)
}

func TestMappingIsReadOnly(t *testing.T) {
	inside.Load(t, "slots=64")
	f, err := os.Open("/dev/virtexit")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page := os.Getpagesize()
	if _, err := unix.Mmap(int(f.Fd()), 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EPERM) {
		t.Errorf("writable mapping: %v", err)
	}
	if _, err := unix.Mmap(int(f.Fd()), 0, page, unix.PROT_READ, unix.MAP_PRIVATE); !errors.Is(err, unix.EINVAL) {
		t.Errorf("private mapping: %v", err)
	}
	if _, err := unix.Mmap(int(f.Fd()), 0, 1<<30, unix.PROT_READ, unix.MAP_SHARED); !errors.Is(err, unix.EINVAL) {
		t.Errorf("mapping beyond the end: %v", err)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, page, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)
	if err := unix.Mprotect(m, unix.PROT_READ|unix.PROT_WRITE); !errors.Is(err, unix.EACCES) {
		t.Errorf("made writable later: %v", err)
	}
	// Root may open it for writing; the mapping is refused all the same.
	w, err := os.OpenFile("/dev/virtexit", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := unix.Mmap(int(w.Fd()), 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); !errors.Is(err, unix.EPERM) {
		t.Errorf("writable mapping of a writable file: %v", err)
	}
	r, err := unix.Mmap(int(w.Fd()), 0, page, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(r)
	if err := unix.Mprotect(r, unix.PROT_READ|unix.PROT_WRITE); !errors.Is(err, unix.EACCES) {
		t.Errorf("mapping of a writable file made writable later: %v", err)
	}
}
