// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"virtexit/test/lab/inside"
)

// TestInside boots each machine once and runs there the tests that need one. "make test" has built what they use.
func TestInside(t *testing.T) {
	const pkg = "virtexit/test/lab/"
	patched := []string{inside.KVMVar + "=" + string(inside.Patched)}
	for _, m := range []struct {
		name   string
		pkg    string
		config Config
	}{
		// The longest first, for two run at a time. The limits are for what hangs: some four times what the tests take.
		{"kernel/6.1 VMX", pkg + "kernel", Config{Kernel: "6.1", Emulator: Bochs, Timeout: 40 * time.Minute}},
		{"kernel/6.12 VMX", pkg + "kernel", Config{Kernel: "6.12", Emulator: Bochs, Timeout: 40 * time.Minute}},
		{"system/6.1 SVM", pkg + "system", Config{Kernel: "6.1", CPUs: 1, Timeout: 60 * time.Minute}},
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
	} {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			m.config.Require(t)
			if m.config.Emulator == Bochs {
				k, err := FindKernel(m.config.Kernel)
				if err != nil {
					t.Fatal(err)
				}
				for _, file := range []string{"kmod/%s/virtexit.ko", "kvm-patch/%s/kvm.ko", "kvm-patch/%s/kvm-intel.ko"} {
					ko, err := filepath.Abs(filepath.Join("../../build", fmt.Sprintf(file, k.Release)))
					if err != nil {
						t.Fatal(err)
					}
					m.config.Files = append(m.config.Files, ko)
				}
				m.config.Modules = []string{"kvm_intel"}
			}
			RunTests(t, m.config, m.pkg, "-tags=lab,libvirt_dlopen")
		})
	}
}
