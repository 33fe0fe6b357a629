// SPDX-License-Identifier: Apache-2.0

package cost

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
)

// bpfClock has programs that read the clock, which is the least that can time an exit.
func bpfClock(int) (func() (int, error), error) {
	clock := asm.Instructions{asm.FnKtimeGetNs.Call(), asm.Mov.Imm(asm.R0, 0), asm.Return()}
	stop, err := start(ebpf.RawTracepoint, clock, clock, attachRaw)
	if err != nil {
		return nil, err
	}
	return func() (int, error) { return 0, stop() }, nil
}

func attachRaw(event string, p *ebpf.Program) (io.Closer, error) {
	return link.AttachRawTracepoint(link.RawTracepointOptions{Name: event, Program: p})
}

// start attaches a program to each exit and one to each entry, until stop.
func start(kind ebpf.ProgramType, exit, entry asm.Instructions, attach func(event string, p *ebpf.Program) (io.Closer, error)) (
	stop func() error, err error) {
	var open []io.Closer
	stop = func() error {
		var errs []error
		for _, c := range open {
			errs = append(errs, c.Close())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, stop())
		}
	}()
	for _, probe := range []struct {
		event string
		code  asm.Instructions
	}{{"kvm_entry", entry}, {"kvm_exit", exit}} {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: kind, Instructions: probe.code, License: "GPL"})
		if err != nil {
			return nil, fmt.Errorf("%s: %w", probe.event, err)
		}
		open = append(open, p)
		l, err := attach(probe.event, p)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", probe.event, err)
		}
		open = append([]io.Closer{l}, open...)
	}
	return stop, nil
}

// bpfTracepoint counts and times exits by thread and reason as bpftrace does with tracepoint:kvm:kvm_exit and kvm_entry, but
// for bpftrace's dearer way to store a time: here values are changed in place. The reason is a field of the event.
func bpfTracepoint(tid int) (func() (int, error), error) {
	format, err := os.ReadFile(filepath.Join(tracefs, "events/kvm/kvm_exit/format"))
	if err != nil {
		return nil, err
	}
	offset, err := number(`exit_reason;\s+offset:(\d+);`, format)
	if err != nil {
		return nil, err
	}
	reason := asm.Instructions{asm.LoadMem(asm.R1, asm.R6, int16(offset), asm.Word)}
	return bpf(tid, ebpf.TracePoint, reason, func(event string, p *ebpf.Program) (io.Closer, error) {
		return link.Tracepoint("kvm", event, p, nil)
	})
}

// bpfRaw is the same with raw tracepoints, which cost less, but have only the vCPU: the reason is read in its VMCB.
func bpfRaw(tid int) (func() (int, error), error) {
	spec, err := btf.LoadKernelModuleSpec("kvm_amd")
	if err != nil {
		return nil, err
	}
	var svm *btf.Struct
	if err := spec.TypeByName("vcpu_svm", &svm); err != nil {
		return nil, err
	}
	vmcb := -1
	for _, member := range svm.Members {
		if member.Name == "vmcb" {
			vmcb = int(member.Offset.Bytes())
		}
	}
	if vmcb < 0 {
		return nil, errors.New("no vmcb in struct vcpu_svm")
	}
	const exitCode = 0x70 // AMD64 Architecture Programmer's Manual, volume 2, appendix B
	reason := asm.Instructions{
		asm.LoadMem(asm.R3, asm.R6, 0, asm.DWord),
		asm.Add.Imm(asm.R3, int32(vmcb)),
		asm.Mov.Reg(asm.R1, asm.RFP),
		asm.Add.Imm(asm.R1, -32),
		asm.Mov.Imm(asm.R2, 8),
		asm.FnProbeReadKernel.Call(),
		asm.LoadMem(asm.R3, asm.RFP, -32, asm.DWord),
		asm.Add.Imm(asm.R3, exitCode),
		asm.Mov.Reg(asm.R1, asm.RFP),
		asm.Add.Imm(asm.R1, -32),
		asm.Mov.Imm(asm.R2, 4),
		asm.FnProbeReadKernel.Call(),
		asm.LoadMem(asm.R1, asm.RFP, -32, asm.Word),
	}
	return bpf(tid, ebpf.RawTracepoint, reason, attachRaw)
}

// insert is where "first" jumps to, with key and value on the stack; "out" is behind it.
func insert(m *ebpf.Map, key, value int32) asm.Instructions {
	return asm.Instructions{
		asm.LoadMapPtr(asm.R1, m.FD()).WithSymbol("first"),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, key),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, value),
		asm.Mov.Imm(asm.R4, int32(ebpf.UpdateAny)),
		asm.FnMapUpdateElem.Call(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("out"),
		asm.Return(),
	}
}

// bpf has a program at each exit, which keeps time and reason in a hash by thread, and one at each entry, which adds to count
// and time in a per-CPU hash by thread and reason. The instructions given leave the reason in R1; R6 has the program's
// context and the stack is theirs from -32 to -24.
func bpf(tid int, kind ebpf.ProgramType, reason asm.Instructions, attach func(event string, p *ebpf.Program) (io.Closer, error)) (
	_ func() (int, error), err error) {
	var maps []io.Closer
	closeMaps := func() error {
		var errs []error
		for _, m := range maps {
			errs = append(errs, m.Close())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, closeMaps())
		}
	}()

	started, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 16, MaxEntries: 10240})
	if err != nil {
		return nil, err
	}
	maps = append(maps, started)
	sums, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.PerCPUHash, KeySize: 8, ValueSize: 16, MaxEntries: 10240})
	if err != nil {
		return nil, err
	}
	maps = append(maps, sums)

	exit := asm.Instructions{ // started[tid] = {now, reason}
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.FnGetCurrentPidTgid.Call(),
		asm.StoreMem(asm.RFP, -4, asm.R0, asm.Word),
		asm.FnKtimeGetNs.Call(),
		asm.StoreMem(asm.RFP, -24, asm.R0, asm.DWord),
	}
	exit = append(exit, reason...)
	exit = append(exit,
		asm.StoreMem(asm.RFP, -16, asm.R1, asm.DWord),
		asm.LoadMapPtr(asm.R1, started.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "first"),
		asm.LoadMem(asm.R1, asm.RFP, -24, asm.DWord),
		asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.RFP, -16, asm.DWord),
		asm.StoreMem(asm.R0, 8, asm.R1, asm.DWord),
		asm.Ja.Label("out"),
	)
	exit = append(exit, insert(started, -4, -24)...)
	entry := asm.Instructions{ // sums[tid, reason] += {1, now - started[tid]}
		asm.FnGetCurrentPidTgid.Call(),
		asm.StoreMem(asm.RFP, -16, asm.R0, asm.Word),
		asm.LoadMapPtr(asm.R1, started.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -16),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R6, asm.R0, 0, asm.DWord),
		asm.LoadMem(asm.R1, asm.R0, 8, asm.DWord),
		asm.StoreMem(asm.RFP, -12, asm.R1, asm.Word),
		asm.FnKtimeGetNs.Call(),
		asm.Sub.Reg(asm.R0, asm.R6),
		asm.StoreMem(asm.RFP, -24, asm.R0, asm.DWord),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreMem(asm.RFP, -32, asm.R1, asm.DWord),
		asm.Mov.Reg(asm.R6, asm.R0),
		asm.LoadMapPtr(asm.R1, sums.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -16),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "first"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.Add.Imm(asm.R1, 1),
		asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.R0, 8, asm.DWord),
		asm.Add.Reg(asm.R1, asm.R6),
		asm.StoreMem(asm.R0, 8, asm.R1, asm.DWord),
		asm.Ja.Label("out"),
	}
	entry = append(entry, insert(sums, -16, -32)...)
	stop, err := start(kind, exit, entry, attach)
	if err != nil {
		return nil, err
	}

	return func() (int, error) {
		var key struct{ TID, Reason uint32 }
		var perCPU []struct{ Count, NS uint64 }
		counted := uint64(0)
		all := sums.Iterate()
		for all.Next(&key, &perCPU) {
			for _, sum := range perCPU {
				if key.TID == uint32(tid) {
					counted += sum.Count
				}
			}
		}
		return int(counted), errors.Join(all.Err(), stop(), closeMaps())
	}, nil
}
