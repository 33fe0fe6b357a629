// SPDX-License-Identifier: Apache-2.0

// Package guest runs tiny programs as guests of /dev/kvm, with nothing between the program and KVM: a program that executes
// CPUID 10,000 times causes 10,000 CPUID exits. They run in real mode on x86, where the same program can be had as firmware
// for QEMU, and at EL1 with the MMU off on arm64.
package guest

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Program is what one vCPU executes.
type Program struct {
	Ops     []Op
	Forever bool // start again after the last op; otherwise end
}

// Op is one instruction, executed N times.
type Op struct {
	Kind Kind
	Arg  uint32
	N    uint32
	// Timed has the guest read its time stamp counter before and after each execution and keep the least difference, for
	// VCPU.Least. It adds a few instructions to each.
	Timed bool
}

// Kind is an instruction that an Op repeats. Its value is the op's name in Parse.
type Kind string

// Parse reads ops from text such as "cpuid:10000,cpuid:0x1:5,out:0x80:500,hlt:20": the name, the argument if it has one,
// and how often.
func Parse(text string) (Program, error) {
	var p Program
	for word := range strings.SplitSeq(text, ",") {
		fields := strings.Split(word, ":")
		kind := Kind(fields[0])
		want, ok := operands[kind]
		if !ok {
			return Program{}, fmt.Errorf("op %q: no such instruction", word)
		}
		args := len(fields) - 2
		if args < want.min || args > want.max {
			return Program{}, fmt.Errorf("op %q: wrong number of operands", word)
		}
		op := Op{Kind: kind}
		numbers := []*uint32{&op.Arg, &op.N}[1-args:]
		for i, to := range numbers {
			n, err := strconv.ParseUint(fields[1+i], 0, 32)
			if err != nil {
				return Program{}, fmt.Errorf("op %q: %w", word, err)
			}
			*to = uint32(n)
		}
		p.Ops = append(p.Ops, op)
	}
	return p, nil
}

// Vendor of a CPU: it decides which instruction a hypercall is.
type Vendor string

const (
	AMD   Vendor = "AuthenticAMD"
	Intel Vendor = "GenuineIntel"
)

// HostVendor tells the vendor of the CPU that this process runs on.
func HostVendor() (Vendor, error) {
	const path = "/proc/cpuinfo"
	text, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "vendor_id" {
			switch v := Vendor(strings.TrimSpace(value)); v {
			case AMD, Intel:
				return v, nil
			default:
				return "", fmt.Errorf("CPU vendor %q is neither %s nor %s", v, AMD, Intel)
			}
		}
	}
	return "", fmt.Errorf("%s: no vendor_id", path)
}
