// SPDX-License-Identifier: Apache-2.0

// Package exitreason knows what the hardware's VM exit codes are called.
package exitreason

import (
	"fmt"
	"strconv"
	"strings"
)

// ISA is the code space of an exit code, numbered as KVM's kvm_exit event does on
// x86, and as virtexit's own interface does beyond.
type ISA uint32

// The known code spaces. PVM is not in Linux: its KVM comes from elsewhere.
const (
	None  ISA = 0
	VMX   ISA = 1
	SVM   ISA = 2
	PVM   ISA = 3
	ARM64 ISA = 0x100
)

var isas = []struct {
	isa   ISA
	name  string
	codes map[uint32]string
}{{None, "none", map[uint32]string{0: Unknown}}, {VMX, "vmx", vmxNames}, {SVM, "svm", svmNames}, {PVM, "pvm", pvmNames}, {ARM64, "arm64", arm64Names}}

// String gives the code space's name: "none", "vmx", "svm", "pvm", "arm64". One
// that has no name is its number: "isa77".
func (i ISA) String() string {
	for _, known := range isas {
		if i == known.isa {
			return known.name
		}
	}
	return fmt.Sprintf("isa%d", uint32(i))
}

// ParseISA is the inverse of String.
func ParseISA(s string) (ISA, error) {
	for _, known := range isas {
		if s == known.name {
			return known.isa, nil
		}
	}
	number, _ := strings.CutPrefix(s, "isa")
	if n, err := strconv.ParseUint(number, 10, 32); err == nil && ISA(n).String() == s {
		return ISA(n), nil
	}
	return None, fmt.Errorf("unknown isa %q: want none, vmx, svm, pvm, arm64 or the number of another, such as isa77", s)
}

// names are those of a code space's codes.
func (i ISA) names() map[uint32]string {
	for _, known := range isas {
		if i == known.isa {
			return known.codes
		}
	}
	return nil
}

// Unknown is the Name of whatever code without a code space: that of exits which
// were counted by no reason.
const Unknown = "unknown"

// Fields of VMX's 32-bit exit reason.
const (
	vmxBasic       = 0x0000ffff // what the guest did
	vmxFailedEntry = 0x80000000 // the guest was never entered
)

// Parts of arm64's codes: see kmod/uapi/virtexit.h.
const (
	arm64Type   = 0x40       // no exception class, but what ended the guest's run without one
	arm64SError = 0x80000000 // an SError was pending
)

// Name is the kernel's own name of an exit code: that of its uapi headers,
// which its kvm_exit event and perf print, such as "CPUID" (VMX, 10) or "npf"
// (SVM, 0x400). A code that has no name there is its number: "0x1f3"; and so is
// any of a code space that is not known.
//
// code is, for VMX, the full exit reason. The name is that of its basic reason,
// the low 16 bits; flags follow as the kernel's event prints them, those without
// a name in one number: "INVALID_STATE FAILED_VMENTRY", "CPUID 0x8000000".
// For arm64 it is the exception class's, such as "HVC64", or "IRQ" and the like
// where there is none; " WITH_SERROR" follows where an SError was pending.
func Name(isa ISA, code uint32) string {
	switch isa {
	case VMX:
		var b strings.Builder
		b.WriteString(lookup(vmxNames, code&vmxBasic))
		flags := code &^ vmxBasic
		if flags&vmxFailedEntry != 0 {
			b.WriteString(" FAILED_VMENTRY")
			flags &^= vmxFailedEntry
		}
		if flags != 0 {
			fmt.Fprintf(&b, " %#x", flags)
		}
		return b.String()
	case ARM64:
		name := lookup(arm64Names, code&^arm64SError)
		if code&arm64SError != 0 {
			name += " WITH_SERROR"
		}
		return name
	case None:
		return Unknown
	}
	return lookup(isa.names(), code)
}

// Halts tells whether a code is that of a guest's HLT; on arm64 of WFI, or of WFE,
// which waits no longer than others want the CPU.
func Halts(isa ISA, code uint32) bool {
	switch isa {
	case VMX:
		return code&vmxBasic == 12
	case SVM:
		return code == 0x78
	case ARM64:
		return code&^arm64SError == 0x01
	}
	return false
}

// Known tells whether a word can be the Name of a code, whatever its case: one
// of the kernel's names, or a number.
func Known(isa ISA, word string) bool {
	for _, name := range isa.names() {
		if strings.EqualFold(name, word) {
			return true
		}
	}
	_, err := strconv.ParseUint(word, 0, 32)
	return err == nil
}

// KnownToAny tells whether a word can be the Name of a code of any code space.
func KnownToAny(word string) bool {
	for _, known := range isas {
		if Known(known.isa, word) {
			return true
		}
	}
	return false
}

// Is tells whether a word, as people write it, means the exit of this name and
// code: the name, in whatever case, or the code.
func Is(word, name string, code uint32) bool {
	number, err := strconv.ParseUint(word, 0, 32)
	return strings.EqualFold(word, name) || err == nil && uint32(number) == code
}

func lookup(names map[uint32]string, code uint32) string {
	if name, ok := names[code]; ok {
		return name
	}
	return fmt.Sprintf("%#x", code)
}
