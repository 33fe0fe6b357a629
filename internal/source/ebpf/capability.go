// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"virtexit/internal/source"
)

// The bits of what a process must be capable of, or of sysAdmin, which has all.
var capabilities = []struct {
	name string
	bit  uint
}{{"CAP_BPF", 39}, {"CAP_PERFMON", 38}}

const sysAdmin = 21

// able tells what this process or the kernel lacks to run programs that trace the
// kernel; the error is source.ErrUnavailable. The files are below root.
func able(root string) error {
	var missing []string
	effective, err := effectiveCapabilities(filepath.Join(root, "proc/self/status"))
	if err != nil {
		return err
	}
	if effective&(1<<sysAdmin) == 0 {
		for _, c := range capabilities {
			if effective&(1<<c.bit) == 0 {
				missing = append(missing, c.name)
			}
		}
	}
	lockdown, err := os.ReadFile(filepath.Join(root, "sys/kernel/security/lockdown"))
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission) {
		return err
	}
	switch _, err := os.Stat(filepath.Join(root, "sys/kernel/btf/vmlinux")); {
	case strings.Contains(string(lockdown), "[confidentiality]"):
		return fmt.Errorf("%w: the kernel is locked down for confidentiality, so that BPF may not read its memory", source.ErrUnavailable)
	case err != nil:
		return fmt.Errorf("%w: the kernel does not describe its types (CONFIG_DEBUG_INFO_BTF): %w", source.ErrUnavailable, err)
	case missing != nil:
		return fmt.Errorf("%w: needs %s: %w", source.ErrUnavailable, strings.Join(missing, " and "), os.ErrPermission)
	}
	return nil
}

// probe has the kernel load a program that does no more than read its memory:
// files and capabilities do not tell all.
func probe() error {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.RawTracepoint, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, -8), asm.Mov.Imm(asm.R2, 8), asm.Mov.Imm(asm.R3, 0),
			asm.FnProbeReadKernel.Call(),
			asm.Mov.Imm(asm.R0, 0), asm.Return(),
		},
	})
	if err != nil {
		return err
	}
	return p.Close()
}

// refused says what the error of probe means; it is source.ErrUnavailable.
func refused(err error) error {
	why := "the kernel refuses BPF programs"
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EINVAL):
		why = "BPF may not read the kernel's memory, as when that is locked down for confidentiality"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES), errors.Is(err, unix.ENOSYS):
		why = "the system call bpf is refused, as by a seccomp filter, by a security module or in a user namespace"
	}
	return fmt.Errorf("%w: %s: %w", source.ErrUnavailable, why, err)
}

// forbidden says what it means that an event's record is not to be had through perf.
func forbidden(err error) error {
	var file *fs.PathError // of tracefs, where the number of the event is
	if errors.Is(err, os.ErrPermission) && !errors.As(err, &file) {
		return fmt.Errorf("needs CAP_SYS_ADMIN where sysctl kernel.perf_event_paranoid is above 2: %w", err)
	}
	return err
}

// near is the line of source up to which the verifier came that refused a program,
// or empty: where a member is read that this kernel lacks, it names the member.
func near(err error) string {
	var verifier *ebpf.VerifierError
	if errors.As(err, &verifier) {
		for _, line := range slices.Backward(verifier.Log) {
			line, ok := strings.CutPrefix(line, "; ")
			if ok && line != "instruction poisoned by CO-RE" { // the library's mark on what reads it
				return " near " + strconv.Quote(line)
			}
		}
	}
	return ""
}

func effectiveCapabilities(status string) (uint64, error) {
	text, err := os.ReadFile(status)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", status, err)
			}
			return n, nil
		}
	}
	return 0, fmt.Errorf("%s: no CapEff", status)
}
