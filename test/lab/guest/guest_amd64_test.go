// SPDX-License-Identifier: Apache-2.0

//go:build !lab

package guest

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	p, err := Parse("cpuid:10,cpuid:0x1:5,out:0x80:500,in:96:1,hlt:20,hypercall:7,rdmsr:0x1b:2,mmio:0xa0000:3,touch:0x1000:5,spin:4294967295")
	if err != nil {
		t.Fatal(err)
	}
	want := Program{Ops: []Op{
		CPUID(0, 10), CPUID(1, 5), Out(0x80, 500), In(0x60, 1), HLT(20), Hypercall(0, 7), RDMSR(0x1b, 2), MMIO(0xa0000, 3), Touch(0x1000, 5),
		Spin(1<<32 - 1),
	}}
	if diff := cmp.Diff(want, p); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, text := range []string{"", "cpuid", "cpuid:", "cpuid:x", "cpuid:1:2:3", "cpuid:4294967296", "out:500", "hlt:1:1", "nop:1", "hlt:1,", "in:-1:1"} {
		if _, err := Parse(text); err == nil {
			t.Errorf("Parse(%q) succeeded", text)
		}
	}
}

func TestROMRefuses(t *testing.T) {
	tests := map[string]Program{
		"port out of range":     {Ops: []Op{{Kind: kindIn, Arg: 0x10000, N: 1}}},
		"the end's port":        {Ops: []Op{Out(EndPort, 1)}},
		"address in the ROM":    {Ops: []Op{MMIO(0xf0000, 1)}},
		"pages into the ROM":    {Ops: []Op{Touch(0xe0000, 17)}},
		"unknown instruction":   {Ops: []Op{{Kind: "nop", N: 1}}},
		"longer than the ROM":   {Ops: make([]Op, 0)},
		"hypercall of nobody's": {Ops: []Op{Hypercall(0, 1)}},
	}
	long := tests["longer than the ROM"]
	for range 10_000 {
		long.Ops = append(long.Ops, HLT(1))
	}
	tests["longer than the ROM"] = long
	for name, p := range tests {
		if _, err := p.ROM("NobodysCPU"); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
