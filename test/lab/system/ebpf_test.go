// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"virtexit/test/lab/inside"
)

// having runs the daemon as root that is capable of nothing but these.
func having(capabilities string) []string {
	return []string{"setpriv", "--bounding-set=-all," + capabilities, "--"}
}

// TestEBPF is a host without virtexit.ko: the daemon falls back to eBPF, with the capabilities of its unit.
func TestEBPF(t *testing.T) {
	inside.LoadKVM(t)
	inside.Remove(t, "virtexit")
	d := start(t, options{more: "collector: auto\n", wrapper: having("+bpf,+perfmon,+net_admin,+dac_read_search,+sys_ptrace,+chown")})
	inside.Eventually(t, "collection", 20*time.Second, func() bool { return d.status().Level == "time" })
	s := d.status()
	if s.Collector == nil || *s.Collector != "ebpf" || s.Hook != "tracepoint" || s.Problem != "" {
		t.Errorf("%+v", s)
	}
	if len(s.Tried) != 1 || s.Tried[0].Collector != "kmod" || !strings.Contains(s.Tried[0].Refused, "virtexit.ko is not loaded") {
		t.Errorf("tried: %+v", s.Tried)
	}
	if out := d.ok("status"); !strings.Contains(out, "Refused:        kmod: virtexit.ko is not loaded") {
		t.Errorf("status says\n%s", out)
	}
	g := newGuest(t, 2)
	run(t, g, 0, "cpuid:25,hypercall:7")
	run(t, g, 1, "cpuid:1000")
	name := nameOf(t, g)
	if got := counts(d.total(name)); got["cpuid"] != 1025 || got["hypercall"] != 7 {
		t.Errorf("%v, want 1025 by CPUID and 7 by hypercall", got)
	}
	d.conserve()
	if n := attached(t); n == 0 {
		t.Error("no program is loaded")
	}

	d.end(syscall.SIGKILL)
	inside.Eventually(t, "the programs go with the daemon", 10*time.Second, func() bool { return attached(t) == 0 })

	// When the module comes, totals go on.
	d = start(t, options{more: "collector: auto\n"})
	collector := func(name string) {
		t.Helper()
		inside.Eventually(t, "collection by "+name, 20*time.Second, func() bool {
			s := d.status()
			return s.Collector != nil && *s.Collector == name && s.Level == "time"
		})
	}
	collector("ebpf")
	run(t, g, 0, "cpuid:100")
	inside.Load(t, "")
	collector("kmod")
	if n := attached(t); n != 0 {
		t.Errorf("%d programs are still loaded", n)
	}
	if s := d.status(); len(s.Tried) != 0 {
		t.Errorf("tried: %+v", s.Tried)
	}
	run(t, g, 1, "cpuid:500")
	if got := counts(d.total(name)); got["cpuid"] != 600 {
		t.Errorf("%v, want 600 by CPUID", got)
	}
	d.conserve()
	d.end(syscall.SIGTERM) // before the module
}

// attached is how many of our programs the kernel holds.
func attached(t *testing.T) (n int) {
	t.Helper()
	for id := ebpf.ProgramID(0); ; {
		var err error
		if id, err = ebpf.ProgramGetNextID(id); errors.Is(err, os.ErrNotExist) {
			return n
		} else if err != nil {
			t.Fatal(err)
		}
		p, err := ebpf.NewProgramFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		info, err := p.Info()
		p.Close()
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(info.Name, "kvm_e") {
			n++
		}
	}
}

// TestEBPFRefused names what the daemon lacks.
func TestEBPFRefused(t *testing.T) {
	inside.LoadKVM(t)
	inside.Remove(t, "virtexit")
	for capabilities, want := range map[string]string{
		"+chown,+net_admin,+perfmon": "needs CAP_BPF:",
		"+chown,+net_admin":          "needs CAP_BPF and CAP_PERFMON:",
	} {
		d := start(t, options{libvirt: "qemu+unix:///system?socket=/none", more: "collector: auto\n", wrapper: having(capabilities)})
		var problem string
		inside.Eventually(t, "a problem", 10*time.Second, func() bool {
			problem = d.status().Problem
			return strings.Contains(problem, "/none") && !strings.Contains(problem, "not connected yet")
		})
		for _, want := range []string{"virtexit.ko is not loaded", want, "libvirt at "} {
			if !strings.Contains(problem, want) {
				t.Errorf("with %s the problem is %q, want one with %q", capabilities, problem, want)
			}
		}
		t.Log(problem)
	}
}
