// SPDX-License-Identifier: Apache-2.0

//go:build lab

package lockdown

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtexit/api"
	"virtexit/api/client"
	"virtexit/test/lab/inside"
)

func TestMain(m *testing.M) { inside.Main(m) }

const (
	security = "/sys/kernel/security"
	mode     = security + "/lockdown"
)

// start starts a daemon that chooses its collector, and without libvirt. It ends
// with the test.
func start(t *testing.T) *client.Client {
	t.Helper()
	dir := t.TempDir()
	config, socket := filepath.Join(dir, "virtexitd.yaml"), filepath.Join(dir, "virtexit.sock")
	if err := os.WriteFile(config, []byte("collector: auto\nstate_dir: \"\"\nlibvirt_uri: qemu+unix:///system?socket=/nonexistent\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command("../../../bin/virtexitd", "--config", config, "--socket", socket)
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("log of virtexitd:\n%s", &log)
		}
	})
	return client.New(socket)
}

// await waits for a status.
func await(t *testing.T, c *client.Client, what string, ok func(api.Status) bool) (s api.Status) {
	t.Helper()
	inside.Eventually(t, what, 20*time.Second, func() bool {
		var err error
		s, err = c.Status(t.Context())
		return err == nil && ok(s)
	})
	return s
}

// counts holds the daemon to the exits of a guest.
func counts(t *testing.T, c *client.Client) {
	t.Helper()
	g, err := inside.StartGuest(2)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	for vcpu, program := range []string{"cpuid:25,hypercall:7", "cpuid:1000"} {
		if err := g.Run(vcpu, program); err != nil {
			t.Fatal(err)
		}
	}
	await(t, c, "a snapshot", func(api.Status) bool { return true })
	list, err := c.Domains(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]uint64{}
	for _, d := range list.Domains {
		if d.TGID == g.TGID() {
			for _, e := range d.Exits {
				got[e.Reason] = e.Count
			}
		}
	}
	if got["cpuid"] != 1025 || got["hypercall"] != 7 {
		t.Errorf("%v, want 1025 by CPUID and 7 by hypercall", got)
	}
}

// TestLockdown has a kernel locked down for integrity since it booted, and then
// for confidentiality.
func TestLockdown(t *testing.T) {
	inside.LoadKVM(t) // by Debian's signature
	if err := unix.Mount("security", security, "securityfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(security, 0) })
	if text, err := os.ReadFile(mode); err != nil || !strings.Contains(string(text), "[integrity]") {
		t.Fatalf("lockdown is %q, %v", text, err)
	}
	ko, err := os.Open(filepath.Join("../../../build/kmod", inside.Release(t), "virtexit.ko"))
	if err != nil {
		t.Fatal(err)
	}
	defer ko.Close()
	if err := unix.FinitModule(int(ko.Fd()), "", 0); !errors.Is(err, unix.EPERM) {
		t.Fatalf("virtexit.ko is loaded: %v, want %v", err, unix.EPERM)
	}

	running := start(t)
	s := await(t, running, "collection", func(s api.Status) bool { return s.Level == "time" })
	if s.Collector == nil || *s.Collector != "ebpf" || s.Problem != "" {
		t.Errorf("%+v", s)
	}
	counts(t, running)

	if err := os.WriteFile(mode, []byte("confidentiality"), 0); err != nil {
		t.Fatal(err)
	}
	// The kernel asks when programs are loaded.
	counts(t, running)
	for _, mounted := range []bool{true, false} {
		t.Run(fmt.Sprint("securityfs mounted ", mounted), func(t *testing.T) {
			if !mounted {
				if err := unix.Unmount(security, 0); err != nil {
					t.Fatal(err)
				}
			}
			s := await(t, start(t), "a problem", func(s api.Status) bool { return s.Problem != "" && s.Problem != "starting" })
			t.Log(s.Problem)
			if s.Level != "off" || !strings.Contains(s.Problem, "locked down for confidentiality") {
				t.Errorf("level %s, problem %q; want off, for the lockdown", s.Level, s.Problem)
			}
		})
	}
}
