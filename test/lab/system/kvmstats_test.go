// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"virtexit/api"
	"virtexit/test/lab/inside"
)

// TestStatistics is a host where neither the module nor eBPF may count: KVM's own
// statistics are taken from libvirt, until the module is loaded after all.
func TestStatistics(t *testing.T) {
	inside.LoadKVM(t)
	inside.Remove(t, "virtexit")
	t.Cleanup(func() { inside.Remove(t, "virtexit") })
	create(t, domain{name: "early", os: rom(t, "cpuid:20,spin:3000000", true)})
	virsh(t, "suspend", "early")
	last := kvmExits(t, system, "early", 0)
	// run lets it run until it has exited 20 times, and tells how often it has.
	run := func() (exits uint64) {
		t.Helper()
		virsh(t, "resume", "early")
		if !eventually(func() bool { return kvmExits(t, system, "early", 0) >= last+20 }) {
			t.Fatal("early hardly runs")
		}
		virsh(t, "suspend", "early")
		now := kvmExits(t, system, "early", 0)
		exits, last = now-last, now
		return exits
	}

	d := start(t, options{more: "collector: auto\n", interval: "200ms", wrapper: having("+chown,+net_admin,+dac_read_search,+sys_ptrace")})
	inside.Eventually(t, "collection", 20*time.Second, func() bool { return d.status().Level == "count" })
	s := d.status()
	if s.Collector == nil || *s.Collector != "kvmstats" || s.Hook != "none" || s.ISA != "none" || s.Problem != "" {
		t.Errorf("%+v", s)
	}
	if len(s.Tried) != 2 || !strings.Contains(s.Tried[0].Refused, "virtexit.ko is not loaded") || !strings.Contains(s.Tried[1].Refused, "needs CAP_BPF") {
		t.Errorf("tried: %+v", s.Tried)
	}
	is := func(name string, want ...uint64) {
		t.Helper()
		var got []uint64
		if !eventually(func() bool {
			got = nil
			for _, v := range d.total(name).VCPUs {
				got = append(got, v.Exits)
			}
			return slices.Equal(want, got)
		}) {
			t.Errorf("%s: %d exits by vCPU, want %d", name, got, want)
		}
	}

	// reading waits for two: the second was begun after the first had ended.
	reading := func() {
		t.Helper()
		for range 2 {
			before := d.status().ObservedNS
			if !eventually(func() bool { return d.status().ObservedNS > before }) {
				t.Fatal("no reading")
			}
		}
	}

	// Who ran before is counted from now on, who begins to run is counted whole.
	create(t, domain{name: "late", vcpus: 2, os: rom(t, "cpuid:500", false)})
	inside.Eventually(t, "late is done", 20*time.Second, func() bool { return d.find("late").Count >= 500 })
	virsh(t, "suspend", "late")
	late := []uint64{kvmExits(t, system, "late", 0), kvmExits(t, system, "late", 1)}
	is("late", late...)
	is("early", 0)
	counted := run()
	is("early", counted)
	x := d.total("early")
	if len(x.Exits) != 1 || x.Exits[0].Reason != "unknown" || x.Exits[0].ISA != "none" || x.Exits[0].MaxNS != nil || x.Time != (api.Times{}) || x.SpanNS <= 0 {
		t.Errorf("%+v", x)
	}
	d.conserve()
	if out := d.ok("report", "--total", "early"); !regexp.MustCompile(`(?m)^ unknown +\d+ +\d+\.\d +100%( +-){6}$`).MatchString(out) {
		t.Errorf("a report says\n%s", out)
	}

	// Off and on.
	d.ok("off")
	run()
	is("early", counted)
	d.ok("on")
	reading()
	counted += run()
	is("early", counted)

	d.ok("level", "early", "recent")
	if r := d.run("log", "early"); r.status == 0 || !strings.Contains(r.stderr, "collector kvmstats counts exits") {
		t.Errorf("a log: %+v", r)
	}
	d.ok("level", "early", "default")

	// A guest that hangs does not hold up the others' counts, nor libvirt a list.
	qemu, pid := d.find("late").TGID, libvirtd(t)
	t.Cleanup(func() { signal(t, qemu, syscall.SIGCONT); ensureLibvirtd(t, pid) })
	signal(t, qemu, syscall.SIGSTOP)
	if held := regexp.MustCompile(`^occupied \([1-9]`); !eventually(func() bool { return held.MatchString(virsh(t, "domcontrol", "late")) }) {
		t.Fatal("late is not being asked")
	}
	counted += run()
	is("early", counted)
	is("late", late...)
	signal(t, qemu, syscall.SIGCONT)
	signal(t, pid, syscall.SIGSTOP)
	began := time.Now()
	if out := d.ok("list"); !strings.Contains(out, "early") || time.Since(began) > 5*time.Second {
		t.Errorf("a list took %v:\n%s", time.Since(began), out)
	}
	signal(t, pid, syscall.SIGCONT)

	for _, name := range []string{"early", "late"} {
		text, err := os.ReadFile("/var/log/libvirt/qemu/" + name + ".log")
		if err != nil || strings.Contains(string(text), "tainted") {
			t.Errorf("%s: %v\n%s", name, err, text)
		}
	}
	virsh(t, "destroy", "late")
	inside.Eventually(t, "its end is known", 20*time.Second, func() bool { x := d.find("late"); return x.State == "shut off" && x.Level == "off" })
	is("late", late...)
	s = d.conserve()

	// The module takes over, and the counts go on.
	inside.Insert(t, "")
	inside.Eventually(t, "the module counts", 20*time.Second, func() bool {
		s := d.status()
		return s.Collector != nil && *s.Collector == "kmod" && s.Level == "time"
	})
	before := d.total("early")
	run()
	after := d.total("early")
	if n := counts(before)["unknown"]; n != counted || n != counts(after)["unknown"] || before.Count != n || counts(after)["cpuid"] == 0 || after.Count <= n {
		t.Errorf("from %+v to %+v", before, after)
	}
	if end := d.conserve(); end.Exits <= s.Exits || end.Missed != 0 {
		t.Errorf("from %+v to %+v", s, end)
	}
}

// eventually tells whether something comes true within a time that is long enough,
// also on a machine that is busy with something else.
func eventually(ok func() bool) bool {
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}
