// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"errors"
	"fmt"
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

// ofUnit are the capabilities of the daemon's unit.
const ofUnit = "+bpf,+perfmon,+net_admin,+dac_read_search,+sys_ptrace,+chown"

// TestEBPF is a host without virtexit.ko: the daemon falls back to eBPF, with the capabilities of its unit.
func TestEBPF(t *testing.T) {
	inside.LoadKVM(t)
	inside.Remove(t, "virtexit")
	d := start(t, options{more: "collector: auto\n", wrapper: having(ofUnit)})
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

// TestOtherISA is a KVM that the module does not know: eBPF counts it, until it is exchanged for one that the module knows.
func TestOtherISA(t *testing.T) {
	inside.Remove(t, "virtexit")
	inside.ExchangeKVM(t, inside.Stock, inside.Other)
	t.Cleanup(func() { inside.LoadKVM(t) })
	const paranoid = "/proc/sys/kernel/perf_event_paranoid"
	was, err := os.ReadFile(paranoid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.WriteFile(paranoid, was, 0) })
	d := start(t, options{more: "collector: auto\n", wrapper: having(ofUnit)})
	collector := func(name string) {
		t.Helper()
		inside.Eventually(t, "collection by "+name, 20*time.Second, func() bool {
			s := d.status()
			return s.Collector != nil && *s.Collector == name && s.Level == "time"
		})
	}

	// Debian's kernel keeps perf's events from whoever is not capable of everything.
	inside.Eventually(t, "eBPF's refusal", 20*time.Second, func() bool {
		s := d.status() // KVM's statistics may do meanwhile
		return strings.Contains(fmt.Sprint(s.Problem, s.Tried), "needs CAP_SYS_ADMIN where sysctl kernel.perf_event_paranoid is above 2")
	})
	if err := os.WriteFile(paranoid, []byte("2"), 0); err != nil {
		t.Fatal(err)
	}
	collector("ebpf")
	inside.Load(t, "")
	inside.Eventually(t, "the module's refusal", 20*time.Second, func() bool {
		tried := d.status().Tried
		return len(tried) == 1 && tried[0].Collector == "kmod" && strings.HasPrefix(tried[0].Refused, "KVM is not counted: no vendor module is loaded whose exits are known")
	})
	collector("ebpf") // still
	g := newGuest(t, 1)
	run(t, g, 0, "cpuid:1025,rdmsr:0x1b:7")
	name := nameOf(t, g)
	total := d.total(name)
	codes := inside.Host(t).Codes
	for _, e := range total.Exits {
		if e.ISA != "isa77" || e.Reason != fmt.Sprintf("%#x", e.Code) || e.Code == codes["cpuid"] && e.TimeNS == 0 {
			t.Errorf("%+v", e)
		}
	}
	if got := counts(total); got[fmt.Sprintf("%#x", codes["cpuid"])] != 1025 || got[fmt.Sprintf("%#x", codes["rdmsr"])] != 7 {
		t.Errorf("%v, want 1025 by CPUID and 7 by RDMSR", got)
	}
	if s := d.conserve(); s.ISA != "isa77" || s.Problem != "" {
		t.Errorf("%+v", s)
	}
	d.ok("level", name, "recent")
	run(t, g, 0, "cpuid:5")
	if out := d.ok("log", "--reason", "0x72", name); strings.Count(out, "0x72") < 5 {
		t.Errorf("virtexit log says\n%s", out)
	}
	if r := d.run("log", "--reason", "cpuid", name); r.status == 0 || !strings.Contains(r.stderr, "no exit of isa77 is called 'cpuid'") {
		t.Errorf("%+v", r)
	}
	total = d.total(name)
	g.Close()

	inside.Remove(t, "kvm_other")
	inside.LoadKVM(t)
	collector("kmod")
	g = newGuest(t, 1)
	run(t, g, 0, "cpuid:500")
	if got := counts(d.total(nameOf(t, g))); got["cpuid"] != 500 {
		t.Errorf("%v, want 500 by CPUID", got)
	}
	if got := d.total(name); got.Count != total.Count {
		t.Errorf("the guest before has %d exits, had %d", got.Count, total.Count)
	}
	g.Close()

	inside.Remove(t, "kvm_amd")
	inside.LoadVendor(t, inside.Other)
	collector("ebpf")
	d.conserve()
	d.end(syscall.SIGTERM) // before the modules
}
