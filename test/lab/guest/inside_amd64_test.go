// SPDX-License-Identifier: Apache-2.0

//go:build lab

package guest

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"virtexit/test/lab"
)

// Exit codes of SVM.
const (
	svmINTR    = 0x60
	svmCPUID   = 0x72
	svmHLT     = 0x78
	svmIO      = 0x7b
	svmMSR     = 0x7c
	svmVMMCALL = 0x81
	svmNPF     = 0x400
)

func TestMain(m *testing.M) {
	if lab.Inside() {
		if out, err := exec.Command("modprobe", "kvm-amd").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "modprobe kvm-amd: %v: %s\n", err, out)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// exits counts exits by thread and reason with an ftrace histogram while f runs. Host interrupts are left out.
func exits(t *testing.T, f func()) map[int]map[int]int {
	t.Helper()
	const trigger = "hist:keys=common_pid,exit_reason"
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(event, "trigger"), []byte(text), 0); err != nil {
			t.Fatal(err)
		}
	}
	write(trigger)
	defer write("!" + trigger)
	f()
	return histogram(t)
}

const event = "/sys/kernel/tracing/events/kvm/kvm_exit"

// histogram reads what exits has asked for.
func histogram(t *testing.T) map[int]map[int]int {
	t.Helper()
	hist, err := os.ReadFile(filepath.Join(event, "hist"))
	if err != nil {
		t.Fatal(err)
	}
	counts := map[int]map[int]int{}
	line := regexp.MustCompile(`common_pid: +(\d+), exit_reason: +(\d+) } hitcount: +(\d+)`)
	for _, match := range line.FindAllStringSubmatch(string(hist), -1) {
		var n [3]int
		for i := range n {
			n[i], _ = strconv.Atoi(match[i+1])
		}
		if n[1] == svmINTR {
			continue
		}
		if counts[n[0]] == nil {
			counts[n[0]] = map[int]int{}
		}
		counts[n[0]][n[1]] = n[2]
	}
	return counts
}

func newVM(t *testing.T, vcpus int) *VM {
	t.Helper()
	vm, err := NewVM(vcpus)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := vm.Close(); err != nil {
			t.Error(err)
		}
	})
	return vm
}

func run(t *testing.T, v *VCPU, p Program) {
	t.Helper()
	if err := v.Run(p); err != nil {
		t.Error(err)
	}
}

func TestOps(t *testing.T) {
	vm := newVM(t, 1)
	v := vm.VCPUs[0]
	run(t, v, Program{}) // maps the code's page
	const end = 1        // exits of the program's own
	tests := []struct {
		name string
		ops  []Op
		want map[int]int
	}{
		{"nothing", nil, map[int]int{svmIO: end}},
		{"cpuid", []Op{CPUID(0, 10_000)}, map[int]int{svmCPUID: 10_000, svmIO: end}},
		{"cpuid leaf", []Op{CPUID(0x8000_0000, 3)}, map[int]int{svmCPUID: 3, svmIO: end}},
		{"out", []Op{Out(0x80, 70_000)}, map[int]int{svmIO: 70_000 + end}},
		{"in", []Op{In(0x1234, 300)}, map[int]int{svmIO: 300 + end}},
		{"hlt", []Op{HLT(200)}, map[int]int{svmHLT: 200, svmIO: end}},
		{"hypercall", []Op{Hypercall(99, 1234)}, map[int]int{svmVMMCALL: 1234, svmIO: end}},
		{"rdmsr", []Op{RDMSR(0x1b, 777)}, map[int]int{svmMSR: 777, svmIO: end}},
		{"mmio", []Op{MMIO(0xa0008, 50)}, map[int]int{svmNPF: 50, svmIO: end}},
		{"spin", []Op{Spin(1_000_000)}, map[int]int{svmIO: end}},
		{"none of them", []Op{CPUID(0, 0), HLT(0)}, map[int]int{svmIO: end}},
		{"one after another", []Op{CPUID(0, 7), HLT(5), CPUID(0, 6), MMIO(0x10000, 1)}, map[int]int{svmCPUID: 13, svmHLT: 5, svmNPF: 1, svmIO: end}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			before := statExits(t, v)
			got := exits(t, func() { run(t, v, Program{Ops: test.ops}) })
			sum := statExits(t, v) - before
			if diff := cmp.Diff(map[int]map[int]int{v.TID(): test.want}, got); diff != "" {
				t.Errorf("exits by thread and reason (-want +got):\n%s", diff)
			}
			var want uint64
			for _, n := range test.want {
				want += uint64(n)
			}
			if sum < want { // it has the host's interrupts as well
				t.Errorf("KVM's statistics count %d exits, want at least %d", sum, want)
			}
		})
	}
}

func TestFresh(t *testing.T) {
	vm := newVM(t, 1)
	v := vm.VCPUs[0]
	run(t, v, Program{})
	touch := Program{Ops: []Op{Touch(8, FreshPages)}}
	for i, want := range []int{FreshPages, 0, FreshPages} {
		if want > 0 {
			if err := vm.Fresh(); err != nil {
				t.Fatal(err)
			}
			run(t, v, Program{}) // KVM may map the code's page anew
		}
		got := exits(t, func() { run(t, v, touch) })[v.TID()][svmNPF]
		if got != want {
			t.Errorf("round %d: %d page faults, want %d", i, got, want)
		}
	}
}

func TestEventPort(t *testing.T) {
	vm := newVM(t, 1)
	event, err := vm.EventPort(0x5f0)
	if err != nil {
		t.Fatal(err)
	}
	defer event.Close()
	const want = 500
	run(t, vm.VCPUs[0], Program{Ops: []Op{Out(0x5f0, want), Out(0x5f1, 10)}})
	var got uint64
	if err := binary.Read(event, binary.NativeEndian, &got); err != nil || got != want {
		t.Errorf("%d events and error %v, want %d", got, err, want)
	}
}

func statExits(t *testing.T, v *VCPU) uint64 {
	t.Helper()
	stats, err := v.Stats()
	if err != nil {
		t.Fatal(err)
	}
	n, ok := stats["exits"]
	if !ok {
		t.Fatal("no exits in KVM's statistics")
	}
	return n
}

func TestVCPUsAndVMsApart(t *testing.T) {
	a, b := newVM(t, 2), newVM(t, 1)
	vcpus := append(slices.Clone(a.VCPUs), b.VCPUs...)
	for _, v := range vcpus {
		run(t, v, Program{})
	}
	want := map[int]map[int]int{}
	got := exits(t, func() {
		for i, v := range vcpus {
			n := 1000 * (i + 1)
			want[v.TID()] = map[int]int{svmCPUID: n, svmIO: 1}
			v.Start(Program{Ops: []Op{CPUID(0, uint32(n))}})
		}
		for _, v := range vcpus {
			if err := v.Wait(); err != nil {
				t.Error(err)
			}
		}
	})
	// Two vCPUs of one VM map a page twice when they do it at once.
	ignore := cmpopts.IgnoreMapEntries(func(reason, _ int) bool { return reason == svmNPF })
	if diff := cmp.Diff(want, got, ignore); diff != "" {
		t.Errorf("exits by thread and reason (-want +got):\n%s", diff)
	}
}

func TestStopAndThreads(t *testing.T) {
	vm, err := NewVM(1)
	if err != nil {
		t.Fatal(err)
	}
	v := vm.VCPUs[0]
	alive := func() bool {
		_, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", v.TID()))
		return err == nil
	}
	for _, p := range []Program{{Forever: true}, {Forever: true, Ops: []Op{HLT(1)}}} {
		v.Start(p)
		time.Sleep(100 * time.Millisecond)
		v.Stop()
		if err := v.Wait(); err != nil {
			t.Error(err)
		}
	}
	v.Start(Program{Forever: true})
	v.Stop() // at once
	if err := v.Wait(); err != nil {
		t.Error(err)
	}
	if !alive() {
		t.Error("thread did not outlive its program")
	}
	run(t, v, Program{Ops: []Op{CPUID(0, 1)}})
	v.Start(Program{Forever: true})
	if err := vm.Close(); err != nil {
		t.Error(err)
	}
	for range 100 {
		if !alive() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("thread outlived its VM")
}

func TestROM(t *testing.T) {
	rom, err := Program{Ops: []Op{CPUID(0, 1000), Out(0x80, 500), Hypercall(99, 123), RDMSR(0x1b, 77)}}.ROM(AMD)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "rom.bin")
	if err := os.WriteFile(path, rom, 0o644); err != nil {
		t.Fatal(err)
	}
	got := exits(t, func() {
		qemu := exec.Command("qemu-system-x86_64", "-accel", "kvm", "-nodefaults", "-display", "none", "-bios", path)
		if err := qemu.Start(); err != nil {
			t.Fatal(err)
		}
		defer qemu.Wait()
		defer qemu.Process.Kill()
		for range 300 { // the last thing that it does is to halt
			for _, reasons := range histogram(t) {
				if reasons[svmHLT] > 0 {
					return
				}
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Error("the program did not end in 30 s")
	})
	want := map[int]int{svmCPUID: 1000, svmIO: 500, svmVMMCALL: 123, svmMSR: 77, svmHLT: 1}
	for tid, reasons := range got {
		delete(reasons, svmNPF)
		if diff := cmp.Diff(want, reasons); diff != "" {
			t.Errorf("exits of thread %d (-want +got):\n%s", tid, diff)
		}
	}
	if len(got) != 1 {
		t.Errorf("%d threads took exits, want 1", len(got))
	}
}
