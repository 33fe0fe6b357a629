// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"virtexit/test/lab/cost"
)

func TestTable(t *testing.T) {
	var rows []cost.Row
	for _, r := range []cost.Row{
		{Hook: "tracepoint", Observer: cost.Nothing, Instructions: 2000},
		{Hook: "tracepoint", Observer: cost.Virtexit, Level: "time", Instructions: 2100, Added: 100},
		{Hook: "tracepoint", Observer: "another", Instructions: 2450, Added: 450},
		{Hook: "patch", Observer: cost.Nothing, Instructions: 2005, Added: 5},
	} {
		for i, exit := range cost.Exits {
			r.Kernel, r.Exit = "6.1.0-1-amd64", exit
			r.Instructions += i
			rows = append(rows, r)
		}
	}
	const want = `
6.1.0-1-amd64: instructions of an exit and the entry after it

KVM      OBSERVER  LEVEL  CPUID        IO          IO-USER        MSR         PAGE-FAULT  
stock    nothing   -      2000         2001        2003           2006        2010        
stock    virtexit  time   +100   1.0x  +100  1.0x  +100     1.0x  +100  1.0x  +100        1.0x
stock    another   -      +450   4.5x  +450  4.5x  +450     4.5x  +450  4.5x  +450        4.5x
patched  nothing   -      +5     0.1x  +5    0.1x  +5       0.1x  +5    0.1x  +5          0.1x
`
	var got strings.Builder
	if err := table(&got, rows); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if err := table(&got, nil); err == nil {
		t.Error("no error without rows")
	}
}
