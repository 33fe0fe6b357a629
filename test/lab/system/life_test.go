// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/internal/snapshot"
	"virtexit/test/lab/inside"
)

// TestShortLives has guests that live and die without the daemon being asked,
// and without a period ending.
func TestShortLives(t *testing.T) {
	inside.Load(t, "")
	d := start(t, options{interval: "1h"})
	watch := module(t)

	create(t, domain{name: "brief", os: rom(t, "cpuid:3000,out:0x80:70", false)})
	// Seen by the module alone: to ask the daemon would make it look.
	hlt := inside.Host(t).Codes["hlt"]
	inside.Eventually(t, "brief is done", 30*time.Second, func() bool {
		snap, err := watch.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		for _, slot := range snap.Slots {
			for _, r := range slot.Rows {
				if r.Code == hlt && r.Count == 1 {
					return true
				}
			}
		}
		return false
	})
	virsh(t, "destroy", "brief")

	began := time.Now()
	g := newGuest(t, 1)
	name := nameOf(t, g)
	run(t, g, 0, "cpuid:2000,hypercall:55")
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	t.Logf("a process of %v", time.Since(began))

	inside.Eventually(t, "the slots of the dead are retired", 5*time.Second, func() bool { return info(t, watch).SlotsLive == 0 })
	for name, want := range map[string]map[string]uint64{
		"brief": {"cpuid": 3000, "io": 70, "hlt": 1},
		name:    {"cpuid": 2000, "hypercall": 55, "io": 1},
	} {
		inside.Eventually(t, name+" is known to be dead", 5*time.Second, func() bool { return d.find(name).TGID == 0 })
		got := d.total(name)
		if got.State != "shut off" || got.ID != nil {
			t.Errorf("%s: %+v", name, got)
		}
		if diff := cmp.Diff(want, asked(counts(got))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if out := d.ok("list", "--all"); !strings.Contains(out, name) {
			t.Errorf("no %s in\n%s", name, out)
		}
		if out := d.ok("list"); strings.Contains(out, name) {
			t.Errorf("%s is listed as if it ran:\n%s", name, out)
		}
	}
	d.conserve()
	inside.Eventually(t, "retired slots are released", 5*time.Second, func() bool { return info(t, watch).SlotsRetired == 0 })
}

// TestDaemonKilled kills the daemon while a domain runs and another guest
// pauses.
func TestDaemonKilled(t *testing.T) {
	inside.Load(t, "")
	watch := module(t)
	create(t, domain{name: "on", os: rom(t, "cpuid:10,out:0x80:5,spin:200000", true)})
	g := newGuest(t, 1)
	first := start(t, options{})
	run(t, g, 0, "cpuid:1000")
	inside.Eventually(t, "both are counted", 30*time.Second, func() bool {
		return first.find("on").Count > 100 && first.find(nameOf(t, g)).Count > 1000
	})
	if i := info(t, watch); i.Level != snapshot.Time || i.Hook == "none" || i.SlotsLive != 2 {
		t.Errorf("while the daemon runs: %+v", i)
	}
	before := first.total("on")

	first.end(syscall.SIGKILL)
	off := inside.Eventually(t, "the hooks are off", time.Second, func() bool {
		i := info(t, watch)
		return i.Level == snapshot.Off && i.Hook == "none" && i.Leases == 0
	})
	t.Logf("hooks off %v after the daemon's death", off)
	if off > time.Second {
		t.Error("more than a second")
	}
	i := info(t, watch)
	if i.SlotsLive != 0 || i.SlotsRetired != 2 {
		t.Errorf("after the daemon's death: %+v", i)
	}
	left, err := watch.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	run(t, g, 0, "cpuid:500") // seen by nobody

	second := start(t, options{})
	run(t, g, 0, "cpuid:300")
	if got := asked(counts(second.total(nameOf(t, g)))); got["cpuid"] != 1300 || got["io"] != 2 {
		t.Errorf("1000 exits, 500 without daemon, 300: %v", got)
	}
	at := second.total("on").Count
	if at < before.Count {
		t.Errorf("%d exits before, %d after", before.Count, at)
	}
	inside.Eventually(t, "counting goes on", 30*time.Second, func() bool { return second.total("on").Count > at+100 })
	if i := info(t, watch); i.SlotsRetired != 0 || i.SlotsLive != 2 || i.Leases != 1 {
		t.Errorf("after the restart: %+v", i)
	}
	virsh(t, "suspend", "on")
	s := second.conserve()
	if s.Exits <= left.Exits() {
		t.Errorf("%d exits in all, %d when the first daemon died", s.Exits, left.Exits())
	}
	if s.Missed >= left.Exits() {
		t.Errorf("%d of %d exits of the first daemon's time are missed", s.Missed, left.Exits())
	}
}

// TestOnAndOff switches collection while nothing else changes.
func TestOnAndOff(t *testing.T) {
	inside.Load(t, "")
	watch := module(t)
	d := start(t, options{})
	g := newGuest(t, 1)
	name := nameOf(t, g)
	check := func(step string, cpuid uint64, level snapshot.Level) api.Domain {
		t.Helper()
		if i := info(t, watch); i.Level != level || (i.Hook == "none") != (level == snapshot.Off) {
			t.Errorf("%s: %+v", step, i)
		}
		got := d.total(name)
		if n := counts(got)["cpuid"]; n != cpuid {
			t.Errorf("%s: %d CPUID exits, want %d", step, n, cpuid)
		}
		d.conserve()
		return got
	}
	run(t, g, 0, "cpuid:1000")
	timed := check("on", 1000, snapshot.Time)
	if timed.GuestNS == 0 || timed.Exits[0].TimeNS == 0 || timed.Exits[0].MaxNS == nil {
		t.Errorf("no times: %+v", timed)
	}

	if out := d.ok("off"); out != "collection is off\n" {
		t.Errorf("%q", out)
	}
	run(t, g, 0, "cpuid:200")
	off := check("off", 1000, snapshot.Off)
	if r := d.run("list"); r.status != 0 || !strings.Contains(r.stderr, "collection is off") || !strings.Contains(r.stdout, name) {
		t.Errorf("%+v", r)
	}
	if s := decode[api.Status](t, d.ok("status", "--format", "json")); s.Collection != "off" || s.Level != "off" || s.Hook != "none" {
		t.Errorf("%+v", s)
	}

	if out := d.ok("on", "--level", "count"); out != "collection is on, level count\n" {
		t.Errorf("%q", out)
	}
	run(t, g, 0, "cpuid:30")
	counted := check("count", 1030, snapshot.Count)
	if counted.GuestNS != off.GuestNS {
		t.Errorf("guest time went from %d to %d at level count", off.GuestNS, counted.GuestNS)
	}
	for _, e := range counted.Exits {
		for _, o := range off.Exits {
			if e.Code == o.Code && e.TimeNS != o.TimeNS {
				t.Errorf("%s: time went from %d to %d at level count", e.Reason, o.TimeNS, e.TimeNS)
			}
		}
	}

	if out := d.ok("on"); out != "collection is on, level time\n" {
		t.Errorf("%q", out)
	}
	run(t, g, 0, "cpuid:4")
	if again := check("on again", 1034, snapshot.Time); again.GuestNS <= counted.GuestNS || !again.Since.Equal(*timed.Since) {
		t.Errorf("guest time %d after %d, since %v after %v", again.GuestNS, counted.GuestNS, again.Since, timed.Since)
	}
}

// TestWithoutModule starts the daemon on a host without virtexit.ko.
func TestWithoutModule(t *testing.T) {
	inside.LoadKVM(t)
	inside.Remove(t, "virtexit")
	d := start(t, options{})
	g := newGuest(t, 1)
	run(t, g, 0, "cpuid:10")
	s := d.status()
	if s.Collector != nil || s.Collection != "on" || s.Level != "off" || !strings.Contains(s.Problem, "virtexit.ko is not loaded") {
		t.Errorf("%+v", s)
	}
	if out := d.ok("status"); !strings.Contains(out, "virtexit.ko is not loaded") {
		t.Errorf("status says\n%s", out)
	}
	inside.Eventually(t, "the guest is known all the same", 10*time.Second, func() bool { return d.find(nameOf(t, g)).TGID == g.TGID() })
	if r := d.run("list"); r.status != 0 || !strings.Contains(r.stderr, "virtexit.ko is not loaded") {
		t.Errorf("%+v", r)
	}
	if r := d.run("report", nameOf(t, g)); r.status != 1 || !strings.Contains(r.stderr, "virtexit.ko is not loaded") {
		t.Errorf("%+v", r)
	}

	inside.Load(t, "")
	t.Cleanup(func() { d.end(syscall.SIGTERM) }) // before the module can go
	t.Log("picked up after ", inside.Eventually(t, "the module is picked up", 10*time.Second, func() bool {
		s := d.status()
		return s.Collector != nil && *s.Collector == "kmod" && s.Level == "time" && s.Problem == ""
	}))
	run(t, g, 0, "cpuid:25")
	if got := counts(d.total(nameOf(t, g)))["cpuid"]; got != 25 {
		t.Errorf("%d CPUID exits, want 25", got)
	}
	d.conserve()
}

// libvirtd is the process of libvirt's daemon.
func libvirtd(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile("/run/libvirtd.pid")
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func signal(t *testing.T, pid int, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, s); err != nil && !errors.Is(err, syscall.ESRCH) {
		t.Fatal(err)
	}
}
