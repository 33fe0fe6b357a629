// SPDX-License-Identifier: Apache-2.0

//go:build lab_debug

package lab

import (
	"testing"
	"time"
)

// TestDebugKernel runs the module's tests where the kernel checks itself. It takes too long to be one of the others:
// "make lab-debug" builds the kernel and runs it.
func TestDebugKernel(t *testing.T) {
	RunTests(t, Config{Kernel: "6.1-debug", Timeout: time.Hour}, "virtexit/test/lab/kernel", "-tags=lab,libvirt_dlopen")
}
