// SPDX-License-Identifier: Apache-2.0

//go:build lab

package kernel

import (
	"testing"

	"virtexit/internal/exitreason"
	"virtexit/internal/source"
	"virtexit/internal/source/ebpf"
	"virtexit/internal/source/sourcetest"
	"virtexit/test/lab/inside"
)

func newCollector(t testing.TB, o ebpf.Options) *ebpf.Collector {
	t.Helper()
	o.Version = "test"
	c, err := ebpf.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// TestEBPF holds the eBPF collector to what all collectors share.
func TestEBPF(t *testing.T) {
	inside.LoadKVM(t)
	exits := 2000
	if inside.Host(t).ISA == exitreason.VMX {
		exits = 50
	}
	c := newCollector(t, ebpf.Options{})
	sourcetest.Run(t, func() (source.Source, error) { return c.Open() }, generator(exits))
}
