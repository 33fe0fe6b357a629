// SPDX-License-Identifier: Apache-2.0

package inside

import (
	"os"
	"strings"
	"testing"

	"virtexit/internal/source/ebpf"
	"virtexit/internal/source/sourcetest"
)

// NewEBPF makes an eBPF collector, which ends with the test.
func NewEBPF(t testing.TB) *ebpf.Collector {
	t.Helper()
	if strings.HasSuffix(Release(t), "-debug") {
		t.Skip("machine: the debug kernel has no BPF")
	}
	// The headers of 6.1 lack what a build needs to describe its types.
	if os.Getenv(KVMVar) == string(Patched) && strings.HasPrefix(Release(t), "6.1.") && !Typed("kvm") {
		t.Skip("machine: this build of KVM does not describe its types")
	}
	c, err := ebpf.New(ebpf.Options{Version: "test"})
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

// Typed tells whether a module describes its types, or the kernel, vmlinux.
func Typed(module string) bool {
	_, err := os.Stat("/sys/kernel/btf/" + module)
	return err == nil
}

// Generator gives guests the words of sourcetest.
type Generator struct {
	N       int
	Program func(kind sourcetest.Kind, n int) string // makes n exits of that kind, the one that ends it included
}

// Exits is how many a guest is to make at a time.
func (g Generator) Exits() int { return g.N }

// Guest starts one.
func (g Generator) Guest(vcpus int) (sourcetest.Guest, error) {
	started, err := StartGuest(vcpus)
	if err != nil {
		return nil, err
	}
	return generated{started, g}, nil
}

type generated struct {
	*Guest
	generator Generator
}

func (g generated) Exit(vcpu int, kind sourcetest.Kind, n int) error {
	return g.Run(vcpu, g.generator.Program(kind, n))
}
