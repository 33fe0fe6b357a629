// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/internal/snapshot"
	"virtexit/vmmap"
)

// asked is what the host's collector is asked for: a level, and those of
// processes by number.
func (h *host) asked() (snapshot.Level, map[int]snapshot.Level) {
	h.mu.Lock()
	defer h.mu.Unlock()
	levels := make(map[int]snapshot.Level)
	for p, l := range h.levels {
		levels[p.TGID] = l
	}
	return h.level, levels
}

func (h *host) expect(t *testing.T, what string, level snapshot.Level, levels map[int]snapshot.Level) {
	t.Helper()
	got, gotLevels := h.asked()
	if got != level || !maps.Equal(gotLevels, levels) {
		t.Errorf("%s: the collector is asked for %v and %v, want %v and %v", what, got, gotLevels, level, levels)
	}
}

type byProcess = map[int]snapshot.Level

func TestDomainLevel(t *testing.T) {
	run(t, nil, func(t *testing.T, h *host, d *Daemon) {
		h.start(1, "web")
		h.start(2, "db")
		h.exits(1, 0, 0x72, 1)
		pass(time.Second)
		set := func(name string, level *string, want api.DomainLevel) {
			t.Helper()
			got, err := d.SetDomainLevel(name, level)
			if diff := cmp.Diff(want, got); err != nil || diff != "" {
				t.Errorf("set: %v (-want +got)\n%s", err, diff)
			}
			got, err = d.DomainLevel(name)
			if diff := cmp.Diff(want, got); err != nil || diff != "" {
				t.Errorf("get: %v (-want +got)\n%s", err, diff)
			}
		}
		got, err := d.DomainLevel("web")
		if diff := cmp.Diff(api.DomainLevel{Domain: "web", Level: ptr("time"), Default: true}, got); err != nil || diff != "" {
			t.Errorf("by default: %v (-want +got)\n%s", err, diff)
		}
		set("1", ptr("recent"), api.DomainLevel{Domain: "web", Level: ptr("recent")})
		h.expect(t, "set", snapshot.Time, byProcess{1: snapshot.Recent})
		if s := d.Status(); s.Level != "time" {
			t.Errorf("the level of all is %s", s.Level)
		}
		set("web", ptr("off"), api.DomainLevel{Domain: "web", Level: ptr("off")})
		h.expect(t, "off", snapshot.Time, byProcess{1: snapshot.Pause})
		h.exits(1, 0, 0x72, 100) // not counted
		set("web", nil, api.DomainLevel{Domain: "web", Level: ptr("time"), Default: true})
		h.expect(t, "taken back", snapshot.Time, byProcess{})
		h.exits(1, 0, 0x72, 1)
		if got := report(t, d, 0, "web").Domains[0].Count; got != 2 {
			t.Errorf("%d exits, want 2", got)
		}

		// One that has not been counted yet: its level waits for its first exit.
		set("db", ptr("count"), api.DomainLevel{Domain: "db", Level: ptr("count")})
		h.expect(t, "not yet seen", snapshot.Time, byProcess{})
		h.exits(2, 0, 0x72, 1)
		pass(2 * settle)
		h.expect(t, "seen", snapshot.Time, byProcess{2: snapshot.Count})

		// Off and on, and with another module.
		if _, err := d.SetCollection(api.Collection{Collection: "off"}); err != nil {
			t.Fatal(err)
		}
		set("web", ptr("recent"), api.DomainLevel{Domain: "web", Level: ptr("recent")})
		h.expect(t, "collection off", snapshot.Off, byProcess{})
		if _, err := d.SetCollection(api.Collection{Collection: "on", Level: "count"}); err != nil {
			t.Fatal(err)
		}
		h.exits(1, 0, 0x72, 1)
		h.exits(2, 0, 0x72, 1)
		pass(2 * settle)
		h.expect(t, "on again", snapshot.Count, byProcess{1: snapshot.Recent, 2: snapshot.Count})
		h.unload()
		h.mu.Lock()
		h.loaded = true
		h.mu.Unlock()
		pass(3 * time.Second)
		h.exits(1, 0, 0x72, 1)
		pass(2 * settle)
		h.expect(t, "another module", snapshot.Count, byProcess{1: snapshot.Recent})

		// A level ends with its process.
		h.die(1)
		pass(10 * time.Second)
		h.expect(t, "dead", snapshot.Count, byProcess{})
		d.mu.Lock()
		defer d.mu.Unlock()
		if n := len(d.wish.processes); n != 1 {
			t.Errorf("%d processes have a level, want the other one", n)
		}
	})
}

func TestDomainLevelErrors(t *testing.T) {
	run(t, nil, func(t *testing.T, h *host, d *Daemon) {
		h.start(1, "web")
		h.exits(1, 0, 0x72, 1)
		pass(time.Second)
		var notFound *api.NotFoundError
		var conflict *api.ConflictError
		if _, err := d.SetDomainLevel("nobody", ptr("time")); !errors.As(err, &notFound) {
			t.Errorf("unknown domain: %v", err)
		}
		if _, err := d.SetDomainLevel("defined", ptr("time")); !errors.As(err, &conflict) || err.Error() != "domain 'defined' is not running" {
			t.Errorf("domain that does not run: %v", err)
		}
		if _, err := d.DomainLevel("defined"); !errors.As(err, &conflict) {
			t.Errorf("domain that does not run: %v", err)
		}
		if _, err := d.SetDomainLevel("web", ptr("pause")); err == nil || err.Error() != `level "pause" is unknown: off, count, time and recent are allowed` {
			t.Errorf("unknown level: %v", err)
		}
		h.refuse = true
		if _, err := d.SetDomainLevel("web", ptr("recent")); err == nil || !strings.Contains(err.Error(), "too many processes") {
			t.Errorf("refused: %v", err)
		}
		if l, err := d.DomainLevel("web"); err != nil || !l.Default {
			t.Errorf("after the refusal: %+v, %v", l, err)
		}
	})
}

// A process that is only known by its exits has a level too.
func TestProcessLevel(t *testing.T) {
	run(t, nil, func(t *testing.T, h *host, d *Daemon) {
		h.exits(5, 0, 0x72, 1)
		if _, err := d.SetDomainLevel("qemu-5", ptr("recent")); err != nil {
			t.Fatal(err)
		}
		pass(5 * time.Second)
		h.expect(t, "set", snapshot.Time, byProcess{5: snapshot.Recent})
		h.die(5)
		pass(5 * time.Second)
		h.expect(t, "dead", snapshot.Time, byProcess{})
	})
}

func TestDuty(t *testing.T) {
	run(t, func(c *Config) { c.Duty = api.Duty{OnNS: 1e9, EveryNS: 4e9} }, func(t *testing.T, h *host, d *Daemon) {
		h.start(1, "web")
		h.exits(1, 0, 0x72, 10)
		pass(2 * settle)
		if _, err := d.SetDomainLevel("web", ptr("recent")); err != nil {
			t.Fatal(err)
		}
		pass(500 * time.Millisecond) // 0.7 s since the beginning
		for range 3 {
			h.expect(t, "on", snapshot.Time, byProcess{1: snapshot.Recent})
			pass(time.Second)
			h.expect(t, "paused", snapshot.Pause, byProcess{})
			h.exits(1, 0, 0x72, 1000) // not counted
			if s := d.Status(); s.Level != "pause" || s.Collection != "on" || *s.Duty != (api.Duty{OnNS: 1e9, EveryNS: 4e9}) {
				t.Errorf("status %+v", s)
			}
			pass(3 * time.Second)
			h.exits(1, 0, 0x72, 10)
		}
		pass(2 * time.Second) // 14.7 s
		total := report(t, d, 0, "web").Domains[0]
		if total.Count != 40 || total.SpanNS != 4e9 || total.WallNS != 147e8 || total.Rate != 10 {
			t.Errorf("total: %d exits in %d of %d ns, rate %v", total.Count, total.SpanNS, total.WallNS, total.Rate)
		}

		// The rates of the list are those of the latest second that was observed.
		for _, dom := range d.Domains().Domains {
			if dom.Name == "web" && dom.Rate != 10 {
				t.Errorf("rate %v in a pause", dom.Rate)
			}
		}

		// A new wish ends the pause.
		set := func(c api.Collection) {
			t.Helper()
			if _, err := d.SetCollection(c); err != nil {
				t.Fatal(err)
			}
			pass(0)
		}
		set(api.Collection{Collection: "on", Duty: &api.Duty{OnNS: 2e9, EveryNS: 3e9}})
		h.expect(t, "another duty", snapshot.Time, byProcess{1: snapshot.Recent})
		pass(1900 * time.Millisecond)
		h.expect(t, "another duty, later", snapshot.Time, byProcess{1: snapshot.Recent})
		pass(200 * time.Millisecond)
		h.expect(t, "another duty, paused", snapshot.Pause, byProcess{})
		set(api.Collection{Collection: "on", Duty: &api.Duty{OnNS: 1e9, EveryNS: 1e9}})
		pass(time.Minute)
		h.expect(t, "always", snapshot.Time, byProcess{1: snapshot.Recent})
		if s := d.Status(); s.Duty != nil {
			t.Errorf("status %+v", s)
		}
		set(api.Collection{Collection: "off"})
		pass(time.Minute)
		h.expect(t, "off", snapshot.Off, byProcess{})
		set(api.Collection{Collection: "on"})
		pass(1100 * time.Millisecond)
		h.expect(t, "as configured", snapshot.Pause, byProcess{})

		// A collector that comes in a pause is asked for no more than that.
		h.unload()
		h.mu.Lock()
		h.loaded = true
		h.mu.Unlock()
		pass(time.Second + retryEvery/2)
		h.expect(t, "another module", snapshot.Pause, byProcess{})
	})
}

func TestStatusCost(t *testing.T) {
	run(t, nil, func(t *testing.T, h *host, d *Daemon) {
		pass(10 * time.Second)
		s := d.Status()
		want := api.CPU{TotalPct: 722, LatestPct: 2} // it had used 2 % of the hour before it began
		if diff := cmp.Diff(want, s.CPU); s.HookCycles != 120 || diff != "" {
			t.Errorf("hook: %d cycles; cpu (-want +got)\n%s", s.HookCycles, diff)
		}
	})
}

// The process of a domain is the latest with its number.
func TestFindProcess(t *testing.T) {
	run(t, nil, func(t *testing.T, h *host, d *Daemon) {
		h.start(1, "web")
		h.exits(1, 0, 0x72, 1)
		h.die(1)
		pass(time.Second)
		h.mu.Lock()
		h.processes[1] = vmmap.Domain{Name: "next", TGID: 1, Start: uint64(time.Hour), State: vmmap.Running, Source: "libvirt"}
		h.mu.Unlock()
		pass(10 * time.Second)
		_, p, err := d.find("next")
		if want := (snapshot.Process{TGID: 1, Start: uint64(time.Hour)}); err != nil || p != want {
			t.Errorf("process %+v, %v, want %+v", p, err, want)
		}
	})
}
