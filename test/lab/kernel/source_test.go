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
	sourcetest.Run(t, func() (source.Source, error) { return kmod.Open() }, inside.Generator{N: exits, Program: program})
}

// program has a guest make exits of a kind.
func program(kind sourcetest.Kind, n int) string {
	const end = 1 // the I/O exit that a program ends with
	switch kind {
	case sourcetest.CPUID:
		return fmt.Sprintf("cpuid:%d", n)
	case sourcetest.IO:
		return fmt.Sprintf("out:0x80:%d", n-end)
	case sourcetest.HLT:
		return fmt.Sprintf("hlt:%d", n)
	case sourcetest.Hypercall:
		return fmt.Sprintf("hypercall:%d", n)
	case sourcetest.MSR:
		return fmt.Sprintf("rdmsr:0x1b:%d", n)
	}
	return ""
}
