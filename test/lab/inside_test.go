// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"virtexit/test/lab/inside"
)

// TestInside boots each machine once and runs there the tests that need one. "make test" has built what they use.
func TestInside(t *testing.T) {
	const pkg = "virtexit/test/lab/"
	patched := []string{inside.KVMVar + "=" + string(inside.Patched)}
	type machine struct {
		name   string
		pkg    string
		config Config
	}
	machines := []machine{
		// The longest first. The limits are for what hangs: some four times what the tests take.
		{"system/6.1 SVM", pkg + "system", Config{Kernel: "6.1", CPUs: 1, Timeout: 60 * time.Minute}},
		{"kernel/6.1 VMX", pkg + "kernel", Config{Kernel: "6.1", Emulator: Bochs, Timeout: 40 * time.Minute}},
		{"kernel/6.12 VMX", pkg + "kernel", Config{Kernel: "6.12", Emulator: Bochs, Timeout: 40 * time.Minute}},
		{"vmmap/6.1 SVM", "virtexit/vmmap", Config{Kernel: "6.1", CPUs: 1, Timeout: 30 * time.Minute}},
		{"kernel/6.1 SVM", pkg + "kernel", Config{Kernel: "6.1", Timeout: 30 * time.Minute}},
		{"kernel/6.12 SVM", pkg + "kernel", Config{Kernel: "6.12", Timeout: 30 * time.Minute}},
		{"kernel/6.1 SVM patched", pkg + "kernel", Config{Kernel: "6.1", Env: patched, Timeout: 30 * time.Minute}},
		{"kernel/6.12 SVM patched", pkg + "kernel", Config{Kernel: "6.12", Env: patched, Timeout: 30 * time.Minute}},
		{"kernel/6.1-rt SVM", pkg + "kernel", Config{Kernel: "6.1-rt", Timeout: 30 * time.Minute}},
		{"kernel/6.12-rt SVM", pkg + "kernel", Config{Kernel: "6.12-rt", Timeout: 30 * time.Minute}},
		{"lockdown/6.1 SVM", pkg + "lockdown", Config{Kernel: "6.1", Cmdline: "lockdown=integrity", Timeout: 20 * time.Minute}},
		{"lockdown/6.12 SVM", pkg + "lockdown", Config{Kernel: "6.12", Cmdline: "lockdown=integrity", Timeout: 20 * time.Minute}},
		{"guest/6.1 SVM", pkg + "guest", Config{Kernel: "6.1", Timeout: 20 * time.Minute}},
		{"guest/6.12 SVM", pkg + "guest", Config{Kernel: "6.12", Timeout: 20 * time.Minute}},
		{"arm64/6.1 arm64", pkg + "arm64", Config{Kernel: "6.1-arm64", Emulator: ARM64, Timeout: 20 * time.Minute}},
		{"cost/6.1 SVM", pkg + "cost", Config{Kernel: "6.1", Icount: true, Timeout: 20 * time.Minute}},
		{"cost/6.12 SVM", pkg + "cost", Config{Kernel: "6.12", Icount: true, Timeout: 20 * time.Minute}},
	}
	// In this order, which t.Parallel would not keep: as many at a time as there are CPUs.
	queue := make(chan machine, len(machines))
	for _, m := range machines {
		queue <- m
	}
	close(queue)
	var workers sync.WaitGroup
	defer workers.Wait()
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for m := range queue {
				t.Run(m.name, func(t *testing.T) {
					m.config.Require(t)
					if m.config.Emulator == Bochs {
						m.config = withModules(t, m.config)
					}
					RunTests(t, m.config, m.pkg, "-tags=lab,libvirt_dlopen")
				})
			}
		})
	}
}

// withModules gives a machine that does not see this file system the modules that its tests load.
func withModules(t *testing.T, c Config) Config {
	t.Helper()
	k, err := FindKernel(c.Kernel)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"kmod/%s/virtexit.ko", "kvm-patch/%s/kvm.ko", "kvm-patch/%s/kvm-intel.ko"} {
		ko, err := filepath.Abs(filepath.Join("../../build", fmt.Sprintf(file, k.Release)))
		if err != nil {
			t.Fatal(err)
		}
		c.Files = append(c.Files, ko)
	}
	c.Modules = []string{"kvm_intel"}
	return c
}
