// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/internal/snapshot"
	"virtexit/test/lab/inside"
)

// TestRestart ends the daemon again and again while a domain exits all the time,
// and starts another one.
func TestRestart(t *testing.T) {
	inside.Load(t, "")
	watch := module(t)
	state := t.TempDir()
	d := start(t, options{state: state})
	create(t, domain{name: "busy", os: rom(t, "cpuid:10,out:0x80:5,spin:200000", true)})
	create(t, domain{name: "brief", os: rom(t, "cpuid:3000,out:0x80:70", false)})
	g := newGuest(t, 1)
	name := nameOf(t, g)
	began := d.status().TotalsSince
	inside.Eventually(t, "brief is done", 30*time.Second, func() bool { return counts(d.find("brief"))["hlt"] == 1 })
	virsh(t, "destroy", "brief")
	inside.Eventually(t, "its slot is saved and released", 20*time.Second, func() bool { return info(t, watch).SlotsRetired == 0 })
	brief := asked(counts(d.total("brief")))

	var ran, busy uint64
	for round, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGKILL, syscall.SIGKILL, syscall.SIGTERM} {
		run(t, g, 0, "cpuid:1000")
		ran += 1000
		switch round {
		case 1: // and has seen it
			ran += 7
			run(t, g, 0, "cpuid:7")
			d.total(name)
		case 3: // and has released slots that are in use no more
			short := newGuest(t, 1)
			run(t, short, 0, "cpuid:10")
			if err := short.Close(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(round) * 300 * time.Millisecond)
		}
		d.end(signal)
		inside.Eventually(t, "its lease has died", 10*time.Second, func() bool { return info(t, watch).Level == snapshot.Off })
		run(t, g, 0, "cpuid:500") // seen by nobody
		d = start(t, options{state: state})
		s := d.status()
		if !s.TotalsSince.Equal(began) || !s.Since.After(began) || s.Missed != 0 || s.ObservedNS <= 0 || s.ObservedNS >= time.Since(began).Nanoseconds() {
			t.Errorf("round %d: since %v: %+v", round, began, s)
		}
		if got := counts(d.total(name))["cpuid"]; got != ran {
			t.Errorf("round %d: %d CPUID exits, want %d", round, got, ran)
		}
		now := d.total("busy").Count
		if now <= busy {
			t.Errorf("round %d: the busy domain has %d exits after %d", round, now, busy)
		}
		busy = now
		if s := d.conserveStopped(); s.Missed != 0 {
			t.Errorf("round %d: %+v", round, s)
		}
		got := d.total("brief")
		if diff := cmp.Diff(brief, asked(counts(got))); diff != "" || got.State != "shut off" || got.UUID == nil || got.Source != "libvirt" {
			t.Errorf("round %d: brief is %+v (-want +got):\n%s", round, got, diff)
		}
	}
	virsh(t, "suspend", "busy")
	s := d.conserve()
	snap, err := watch.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if s.Exits != snap.Exits() {
		t.Errorf("%d exits in all, the kernel counted %d", s.Exits, snap.Exits())
	}
	if out := d.ok("status"); !strings.Contains(out, "Totals:") {
		t.Errorf("status says\n%s", out)
	}
	d.end(syscall.SIGTERM)
	if log := d.log.String(); !strings.Contains(log, "totals go on") || strings.Contains(log, "saving the state") {
		t.Error("the last daemon complains")
	}
}

// TestRestartReloaded loads the module anew while there is no daemon.
func TestRestartReloaded(t *testing.T) {
	inside.Load(t, "")
	state := t.TempDir()
	g := newGuest(t, 1)
	name := nameOf(t, g)
	d := start(t, options{state: state})
	run(t, g, 0, "cpuid:1000")
	for _, end := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		// Known, and saved: else what is killed with the module is lost.
		before := d.conserve()
		d.end(end)
		inside.Remove(t, "virtexit")
		inside.Insert(t, "")
		d = start(t, options{state: state})
		after := d.conserve()
		if end == syscall.SIGTERM && after.Exits != before.Exits || after.Exits > before.Exits {
			t.Errorf("%v: %d exits, then %d", end, before.Exits, after.Exits)
		}
		at := counts(d.total(name))["cpuid"]
		if want := uint64(1000); end == syscall.SIGTERM && at != want {
			t.Errorf("%v: %d CPUID exits, want %d", end, at, want)
		}
		run(t, g, 0, "cpuid:30")
		if got := counts(d.total(name))["cpuid"]; got != at+30 {
			t.Errorf("%v: %d CPUID exits, want %d", end, got, at+30)
		}
		d.conserve()
	}
}

// TestRestartTorn finds its state damaged.
func TestRestartTorn(t *testing.T) {
	inside.Load(t, "")
	state := t.TempDir()
	file := filepath.Join(state, "state")
	g := newGuest(t, 1)
	name := nameOf(t, g)
	d := start(t, options{state: state})
	run(t, g, 0, "cpuid:1000")
	d.conserve()
	d.end(syscall.SIGTERM)
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	if err := os.Truncate(file, info.Size()*2/3); err != nil {
		t.Fatal(err)
	}
	d = start(t, options{state: state})
	s := d.conserve()
	if s.Missed < 1000 || s.Exits < s.Missed {
		t.Errorf("what had been released is not missed: %+v", s)
	}
	if aside, err := os.Stat(file + ".bad"); err != nil || !os.SameFile(info, aside) {
		t.Errorf("the file: %v", err)
	}
	run(t, g, 0, "cpuid:40")
	if got := asked(counts(d.total(name))); !maps.Equal(got, map[string]uint64{"cpuid": 40, "io": 1}) {
		t.Errorf("counted: %v", got)
	}
	d.conserve()
	d.end(syscall.SIGTERM)
	if !strings.Contains(d.log.String(), "set aside") {
		t.Error("nothing is said of it")
	}
}
