// SPDX-License-Identifier: Apache-2.0

//go:build lab

package kernel

import (
	"fmt"
	"testing"

	"virtexit/internal/exitreason"
	"virtexit/internal/source"
	"virtexit/internal/source/kmod"
	"virtexit/internal/source/sourcetest"
	"virtexit/test/lab/inside"
)

// TestSource holds the module to what all collectors share.
func TestSource(t *testing.T) {
	inside.Load(t, "")
	exits := 2000
	if inside.Host(t).ISA == exitreason.VMX {
		exits = 50
	}
	sourcetest.Run(t, func() (source.Source, error) { return kmod.Open() }, generator(exits))
}

type generator int

func (g generator) Exits() int { return int(g) }

func (generator) Guest(vcpus int) (sourcetest.Guest, error) {
	g, err := inside.StartGuest(vcpus)
	if err != nil {
		return nil, err
	}
	return process{g}, nil
}

// process gives a guest the words of sourcetest.
type process struct{ *inside.Guest }

func (p process) Exit(vcpu int, kind sourcetest.Kind, n int) error {
	const end = 1 // the I/O exit that a program ends with
	program := ""
	switch kind {
	case sourcetest.CPUID:
		program = fmt.Sprintf("cpuid:%d", n)
	case sourcetest.IO:
		program = fmt.Sprintf("out:0x80:%d", n-end)
	case sourcetest.HLT:
		program = fmt.Sprintf("hlt:%d", n)
	case sourcetest.Hypercall:
		program = fmt.Sprintf("hypercall:%d", n)
	case sourcetest.MSR:
		program = fmt.Sprintf("rdmsr:0x1b:%d", n)
	}
	return p.Run(vcpu, program)
}
