// SPDX-License-Identifier: Apache-2.0

//go:build lab

package kernel

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	cilium "github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"virtexit/internal/abi"
	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
	"virtexit/internal/source/ebpf"
	"virtexit/internal/source/sourcetest"
	"virtexit/test/lab/inside"
)

// TestEBPF holds the eBPF collector to what all collectors share.
func TestEBPF(t *testing.T) {
	inside.LoadKVM(t)
	exits := 2000
	if inside.Host(t).ISA == exitreason.VMX {
		exits = 50
	}
	c := inside.NewEBPF(t)
	sourcetest.Run(t, func() (source.Source, error) { return c.Open() }, inside.Generator{N: exits, Program: program})
}

// TestEBPFFollowsKVM exchanges KVM's modules under a lease. As long as programs
// are attached kvm.ko cannot go; they are not when the vendor's module has gone.
func TestEBPFFollowsKVM(t *testing.T) {
	c := inside.NewEBPF(t)
	s, err := c.Open()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SetLevel(snapshot.Time); err != nil {
		t.Fatal(err)
	}
	info := func() source.Info {
		t.Helper()
		i, err := s.Info()
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
	type build struct {
		kvm    inside.Build
		rounds int
	}
	builds := []build{{inside.Stock, 2}, {inside.Patched, 1}, {inside.Stock, 1}}
	if inside.Host(t).ISA == exitreason.VMX {
		builds = builds[:1] // Bochs takes long to load anything
	}
	want := uint64(0)
	for _, tc := range builds {
		t.Run(string(tc.kvm), func(t *testing.T) {
			inside.ExchangeKVM(t, tc.kvm, tc.kvm)
			t.Setenv(inside.KVMVar, string(tc.kvm))
			if !inside.Typed("kvm") {
				inside.Eventually(t, "KVM without types to be refused", 5*time.Second, func() bool {
					i := info()
					return i.Level == snapshot.Off && strings.Contains(i.Refused, "CONFIG_DEBUG_INFO_BTF_MODULES")
				})
				return
			}
			for round := range tc.rounds {
				if round > 0 { // the vendor's module alone
					inside.Remove(t, inside.Host(t).Module)
					inside.LoadKVM(t)
				}
				inside.Eventually(t, "collection", 5*time.Second, func() bool { return info().Level == snapshot.Time })
				if i := info(); i.Refused != "" || i.ISA != inside.Host(t).ISA {
					t.Errorf("%+v", i)
				}
				vm := newVM(t, 1)
				// Until KVM has been looked after once more.
				for start := time.Now(); time.Since(start) < 1500*time.Millisecond; {
					run(t, vm.VCPUs[0], "cpuid:50,hlt:5,out:0x80:5")
				}
				want += kvmExits(t, vm.VCPUs[0])
				if got := snap(t, s).Exits(); got != want {
					t.Errorf("round %d: %d exits, want %d", round, got, want)
				}
				if err := vm.Close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestEBPFManyVCPUs: see manyVCPUs.
func TestEBPFManyVCPUs(t *testing.T) {
	inside.LoadKVM(t)
	s, err := inside.NewEBPF(t).Open()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SetLevel(snapshot.Time); err != nil {
		t.Fatal(err)
	}
	manyVCPUs(t, s, 16)
}

// TestEBPFReasonGiven runs the program for kernels before 5.16, whose kvm_exit
// has the reason among its arguments, with such arguments. The vCPU is at no address that could be read.
func TestEBPFReasonGiven(t *testing.T) {
	const object = "../../../internal/source/ebpf/collector_bpfel.o"
	if inside.Host(t).ISA == exitreason.VMX {
		t.Skip("machine: Bochs does not see the host's files")
	}
	inside.LoadKVM(t)
	inside.NewEBPF(t) // or there is no need
	spec, err := cilium.LoadCollectionSpec(object)
	if err != nil {
		t.Fatal(err)
	}
	delete(spec.Programs, "kvm_exit")
	const slots = 64
	for name, entries := range map[string]uint32{"chunks": 1, "recent": 1, "cpus": uint32(cilium.MustPossibleCPU()), "free_slots": slots, "threads": slots} {
		spec.Maps[name].MaxEntries = entries
	}
	isa := inside.Host(t).ISA
	for name, value := range map[string]uint32{"vx_isa": uint32(isa), "vx_given": 1, "vx_take_level": uint32(snapshot.Count)} {
		if err := spec.Variables[name].Set(value); err != nil {
			t.Fatal(err)
		}
	}
	var types []*btf.Spec
	for _, module := range []string{"kvm", inside.Host(t).Module} {
		spec, err := btf.LoadKernelModuleSpec(module)
		if err != nil {
			t.Fatal(err)
		}
		types = append(types, spec)
	}
	c, err := cilium.NewCollectionWithOptions(spec, cilium.CollectionOptions{Programs: cilium.ProgramOptions{ExtraRelocationTargets: types}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	chunk, err := cilium.NewMap(spec.Maps["chunks"].InnerMap)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { chunk.Close() })
	if err := errors.Join(c.Maps["chunks"].Put(uint32(0), chunk), c.Maps["free_slots"].Put(nil, uint32(0))); err != nil {
		t.Fatal(err)
	}

	runtime.LockOSThread() // the slot is this thread's
	defer runtime.UnlockOSThread()
	const reason, vcpu, times = 0x72, 8, 3
	for range times {
		if _, err := c.Programs["kvm_exit_given"].Run(&cilium.RunOptions{Context: [3]uint64{reason, vcpu, uint64(isa)}}); err != nil {
			t.Fatal(err)
		}
	}
	var slot abi.Slot
	if err := chunk.Lookup(uint32(0), unsafe.Slice((*byte)(unsafe.Pointer(&slot)), unsafe.Sizeof(slot))); err != nil {
		t.Fatal(err)
	}
	if slot.TID != uint32(unix.Gettid()) || slot.NumRows != 1 || slot.Rows[0].Code != reason || slot.Rows[0].Count != times {
		t.Errorf("slot of thread %d with %d rows, the first %d exits of code %#x; want %d, 1, %d, %#x",
			slot.TID, slot.NumRows, slot.Rows[0].Count, slot.Rows[0].Code, unix.Gettid(), times, reason)
	}
}

// TestEBPFForbidden has processes that may not call bpf(2), whatever their capabilities.
func TestEBPFForbidden(t *testing.T) {
	inside.NewEBPF(t) // or there is nothing to forbid
	for how, attr := range map[string]*syscall.SysProcAttr{
		"seccomp filter": {},
		"user namespace": {Cloneflags: unix.CLONE_NEWUSER, UidMappings: []syscall.SysProcIDMap{{HostID: 0, Size: 1}}},
	} {
		t.Run(how, func(t *testing.T) {
			cmd := exec.Command("/proc/self/exe", "-test.run=^TestWithoutBPF$")
			cmd.Env = append(os.Environ(), withoutVar+"="+how)
			cmd.SysProcAttr = attr
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), "the system call bpf is refused") {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

const withoutVar = "VIRTEXIT_TEST_WITHOUT_BPF"

// TestWithoutBPF is the other process of TestEBPFForbidden.
func TestWithoutBPF(t *testing.T) {
	switch os.Getenv(withoutVar) {
	case "":
		return
	case "seccomp filter":
		filterBPF(t)
	}
	c, err := ebpf.New(ebpf.Options{})
	if err == nil {
		c.Close()
		t.Fatal("there is a collector")
	}
	if !errors.Is(err, source.ErrUnavailable) {
		t.Errorf("%v is not %v", err, source.ErrUnavailable)
	}
	fmt.Println(err)
}

// filterBPF has the kernel refuse bpf(2) to this process from now on.
func filterBPF(t *testing.T) {
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}, // seccomp_data.nr
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_BPF, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, err := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program))); err != 0 {
		t.Fatal(err)
	}
}
