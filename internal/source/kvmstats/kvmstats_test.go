// SPDX-License-Identifier: Apache-2.0

package kvmstats

import (
	order "cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
	"virtexit/vmmap"
)

const uuid = "748feb9d-7a2a-465d-aa23-9813c9bfb950"

// host is one that boots when the test begins. Its readings take no time.
type host struct {
	t         *testing.T
	root      string
	booted    time.Time
	suspended time.Duration // what the clock that Go reads leaves out
	reading   vmmap.Exits
	asked     int
	domains   []vmmap.Domain
	threads   map[int]uint64 // start times
	source    *Source
}

func newHost(t *testing.T) *host {
	h := &host{t: t, root: t.TempDir(), booted: time.Now(), threads: map[int]uint64{}}
	h.sleep(100)
	for _, name := range []string{"module/kvm", "class/misc/kvm"} {
		if err := os.MkdirAll(h.sys(name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h.source = New(Options{
		Root:    h.root,
		Version: "1",
		Exits:   func() vmmap.Exits { h.asked++; return h.reading },
		Domains: func() []vmmap.Domain { return h.domains },
		Thread: func(tid int) (string, uint64, error) {
			start, ok := h.threads[tid]
			if !ok {
				return "", 0, fs.ErrNotExist
			}
			return fmt.Sprint("comm", tid), start, nil
		},
		BootTime: h.uptime,
	})
	return h
}

func (h *host) sys(name string) string { return filepath.Join(h.root, "sys", name) }

// remove unloads what makes this file.
func (h *host) remove(name string) {
	h.t.Helper()
	if err := os.Remove(h.sys(name)); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) uptime() time.Duration { return time.Since(h.booted) + h.suspended }

func (h *host) now() uint64 { return uint64(h.uptime()) }

// sleep lets seconds pass.
func (h *host) sleep(seconds int) { time.Sleep(time.Duration(seconds) * time.Second) }

func (h *host) level(l snapshot.Level) {
	h.t.Helper()
	if err := h.source.SetLevel(l); err != nil {
		h.t.Fatal(err)
	}
}

// start starts a domain, whose threads have the tids given.
func (h *host) start(id, tgid int, tids ...int) {
	d := vmmap.Domain{ID: &id, UUID: uuid, TGID: tgid, Start: h.now(), VCPUs: map[int]int{}}
	h.threads[tgid] = h.now()
	for n, tid := range tids {
		d.VCPUs[tid], h.threads[tid] = n, h.now()
	}
	h.domains = append(h.domains, d)
}

// end ends the domain that was started first.
func (h *host) end() { h.domains = h.domains[1:] }

// read reads the exits of the run with this id, by vCPU, after a second.
func (h *host) read(id int, exits ...uint64) {
	h.sleep(1)
	vcpus := map[int]uint64{}
	for n, e := range exits {
		vcpus[n] = e
	}
	h.reading = vmmap.Exits{Begun: h.uptime(), Ended: h.uptime(), Runs: map[vmmap.Run]map[int]uint64{{UUID: uuid, ID: id}: vcpus}}
}

func (h *host) snapshot() *snapshot.Snapshot {
	h.t.Helper()
	s, err := h.source.Snapshot()
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

// counts of the slots by vCPU, of which one that has retired is negated.
func counts(s *snapshot.Snapshot) (got []int) {
	for _, slot := range slices.SortedFunc(slices.Values(s.Slots), func(a, b snapshot.Slot) int {
		return order.Or(order.Compare(a.VCPU, b.VCPU), order.Compare(a.ID.Index, b.ID.Index))
	}) {
		n := int(slot.Exits())
		if slot.Retired {
			n = -n
		}
		got = append(got, n)
	}
	return got
}

func (h *host) expect(what string, want ...int) *snapshot.Snapshot {
	h.t.Helper()
	s := h.snapshot()
	if got := counts(s); !slices.Equal(want, got) {
		h.t.Errorf("%s: %d exits by slot, want %d", what, got, want)
	}
	return s
}

func (h *host) info() source.Info {
	h.t.Helper()
	i, err := h.source.Info()
	if err != nil {
		h.t.Fatal(err)
	}
	return i
}

// each runs a test on a host of its own, in a time of its own.
func each(t *testing.T, tests map[string]func(*host)) {
	for _, name := range slices.Sorted(maps.Keys(tests)) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { tests[name](newHost(t)) })
		})
	}
}

func TestSlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.level(snapshot.Time) // as is the daemon's default
		h.read(9)
		h.expect("the first reading")
		h.sleep(4)
		h.start(1, 7, 70)
		h.read(1, 40)
		want := &snapshot.Snapshot{TickHz: 1e9, Loaded: 100e9, Transient: true, Counted: 5e9, Slots: []snapshot.Slot{{
			ID: snapshot.SlotID{Index: 1}, Process: snapshot.Process{TGID: 7, Start: 105e9}, Comm: "comm7", TID: 70, Start: 105e9,
			ISA: exitreason.None, Since: 105e9, Level: snapshot.Count, Rows: []snapshot.Row{{Count: 40}},
		}}}
		if diff := cmp.Diff(want, h.snapshot()); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
		if i := h.info(); i.Level != snapshot.Count || i.Collector != "kvmstats" || i.Hook != "none" || i.SlotsLive != 1 || i.Leases != 1 {
			t.Errorf("%+v", i)
		}
		asked := h.asked
		h.snapshot()
		if h.asked == asked {
			t.Error("a snapshot asks for no reading")
		}
		if h.snapshot().Counted != 5e9 {
			t.Error("a reading was entered twice")
		}
	})
}

func TestCounts(t *testing.T) {
	each(t, map[string]func(*host){
		"ran before": func(h *host) {
			h.start(1, 7, 70)
			h.sleep(9)
			h.level(snapshot.Count)
			h.read(1, 1000)
			if s := h.expect("at first", 0); s.Slots[0].Since != 110e9 {
				h.t.Errorf("since %d", s.Slots[0].Since)
			}
			h.read(1, 1007)
			h.expect("then", 7)
		},
		"read before": func(h *host) {
			h.start(1, 7, 70)
			h.read(1, 1000)
			h.sleep(1)
			h.level(snapshot.Count)
			h.expect("of no use")
			h.read(1, 1100)
			h.expect("the first of use", 0)
		},
		"begun before": func(h *host) { // what is read may be of then or of now
			h.start(1, 7, 70)
			begun := h.uptime()
			h.sleep(1)
			h.level(snapshot.Count)
			h.read(1, 1000)
			h.reading.Begun = begun
			h.expect("of no use")
		},
		"suspended": func(h *host) { // the host was
			h.level(snapshot.Count)
			h.read(9)
			h.expect("the first reading")
			h.start(1, 7, 70)
			start := h.now()
			h.suspended = time.Hour
			h.read(1, 40)
			if s := h.expect("whole", 40); s.Slots[0].Since != start || s.Counted != 3601e9 {
				h.t.Errorf("%+v", s)
			}
		},
		"two vCPUs": func(h *host) {
			h.level(snapshot.Count)
			h.start(1, 7, 70, 71)
			h.read(1, 5, 6)
			h.expect("one", 5, 6)
		},
		"off and on": func(h *host) {
			h.level(snapshot.Count)
			h.start(1, 7, 70)
			h.read(1, 5)
			h.expect("on", 5)
			h.read(1, 8)
			h.level(snapshot.Off)
			h.read(1, 100)
			asked := h.asked
			s := h.expect("off", -8)
			if h.asked != asked {
				h.t.Error("libvirt is asked")
			}
			if i := h.info(); i.Level != snapshot.Off || i.SlotsLive != 0 || i.SlotsRetired != 1 || i.Leases != 0 {
				h.t.Errorf("%+v", i)
			}
			h.level(snapshot.Count)
			h.read(1, 110)
			h.expect("on again", -8, 0)
			h.read(1, 113)
			if later := h.expect("on", -8, 3); later.Counted != s.Counted+1e9 {
				h.t.Errorf("counted for %d after %d", later.Counted, s.Counted)
			}
		},
		"paused": func(h *host) {
			h.level(snapshot.Count)
			h.start(1, 7, 70)
			h.read(1, 4)
			h.expect("the first reading", 4)
			h.read(1, 5)
			h.level(snapshot.Pause)
			h.read(1, 50)
			if s := h.expect("paused", 5); s.Counted != 1e9 || s.Slots[0].Level != snapshot.Pause {
				h.t.Errorf("%+v", s)
			}
			h.level(snapshot.Count)
			h.read(1, 60)
			h.expect("resumed", 5)
			h.read(1, 61)
			h.expect("goes on", 6)
		},
		"paused alone": func(h *host) {
			h.level(snapshot.Count)
			h.start(1, 7, 70)
			h.read(1, 5)
			p := h.snapshot().Slots[0].Process
			h.read(1, 6)
			pause := snapshot.Pause
			if err := h.source.SetProcessLevel(p, &pause); err != nil {
				h.t.Fatal(err)
			}
			h.read(1, 50)
			if s := h.expect("paused", 6); s.Slots[0].Level != snapshot.Pause {
				h.t.Errorf("%+v", s)
			}
			h.read(1, 51)
			if err := h.source.SetProcessLevel(p, nil); err != nil {
				h.t.Fatal(err)
			}
			h.read(1, 53)
			h.expect("resumed", 8)
		},
		"more than is there is wished for": func(h *host) { // once, of another collector
			h.level(snapshot.Count)
			h.start(1, 7, 70)
			recent := snapshot.Recent
			if err := h.source.SetProcessLevel(snapshot.Process{TGID: 7, Start: h.now()}, &recent); err != nil {
				h.t.Fatal(err)
			}
			h.read(1, 5)
			if s := h.expect("counted", 5); s.Slots[0].Level != snapshot.Count {
				h.t.Errorf("%+v", s)
			}
		},
		"ended": func(h *host) {
			h.level(snapshot.Count)
			h.start(1, 7, 70)
			h.read(1, 5)
			s := h.expect("runs", 5)
			h.end()
			h.expect("ended, as all but libvirt know", -5)
			h.read(2)
			h.expect("ended", -5)
			if err := h.source.Release([]snapshot.SlotID{s.Slots[0].ID}); err != nil {
				h.t.Fatal(err)
			}
			if s := h.expect("released"); s.Released != 5 || len(h.source.told) != 0 {
				h.t.Errorf("%+v, told %v", s, h.source.told)
			}
			if err := h.source.Release([]snapshot.SlotID{s.Slots[0].ID}); !errors.Is(err, source.ErrStale) {
				h.t.Error(err)
			}
		},
		"started anew": func(h *host) { // what was read of the last run is not this one's
			h.level(snapshot.Count)
			h.start(1, 7, 70)
			h.read(1, 5)
			h.expect("first", 5)
			h.end()
			h.start(2, 8, 80)
			h.read(1, 9)
			h.expect("second, unread", -5)
			h.read(2, 3)
			h.expect("second", -5, 3)
		},
		"started anew by a new libvirtd": func(h *host) { // which counts runs from 1 again
			h.level(snapshot.Count)
			h.start(1, 7, 70)
			h.read(1, 5)
			h.sleep(1)
			h.end()
			h.start(1, 8, 80)
			h.expect("read before it began")
			h.read(1, 3)
			h.expect("second", 3)
		},
		"a vCPU is unplugged and plugged in": func(h *host) { // KVM's goes on
			h.level(snapshot.Count)
			h.start(1, 7, 70, 71)
			h.read(1, 5, 6)
			h.expect("both", 5, 6)
			delete(h.domains[0].VCPUs, 71)
			h.read(1, 8)
			h.expect("unplugged", 8, -6)
			h.domains[0].VCPUs[72], h.threads[72] = 1, h.now()
			h.read(1, 8, 10)
			if s := h.expect("plugged in", 8, -6, 4); s.Slots[2].Since != h.now() {
				h.t.Errorf("since %d", s.Slots[2].Since)
			}
			h.read(1, 8, 2)
			h.expect("went back", 8, -6, 4)
			h.read(1, 8, 5)
			h.expect("goes on", 8, -6, 7)
		},
		"nothing is told for a while": func(h *host) { // another job is busy with it
			h.level(snapshot.Count)
			h.start(1, 7, 70)
			h.read(1)
			h.expect("not yet")
			h.read(1, 5)
			h.expect("told", 5)
			h.read(1)
			h.expect("not told", 5)
			h.read(2)
			h.expect("not even the run", 5)
			h.reading.Err = errors.New("died")
			h.expect("no answer", 5)
			h.read(1, 9)
			h.expect("told again", 9)
		},
		"libvirt does not know it": func(h *host) {
			h.level(snapshot.Count)
			h.start(1, 7, 70)
			h.domains[0].ID = nil
			h.read(1, 5)
			h.expect("unknown")
		},
		"a thread that is gone": func(h *host) {
			h.level(snapshot.Count)
			h.start(1, 7, 70)
			delete(h.threads, 70)
			h.read(1, 5)
			h.expect("gone")
		},
	})
}

func TestRefused(t *testing.T) {
	each(t, map[string]func(*host){
		"told of nothing": func(h *host) {
			h.level(snapshot.Pause)
			h.read(1)
			h.snapshot()
			if i := h.info(); i.Refused != untold {
				h.t.Errorf("%+v", i)
			}
			h.read(1, 1)
			h.snapshot()
			h.read(1)
			h.snapshot()
			if i := h.info(); i.Refused != "" {
				h.t.Errorf("busy once: %+v", i)
			}
		},
		"no domain": func(h *host) {
			h.level(snapshot.Pause)
			h.reading.Runs = map[vmmap.Run]map[int]uint64{}
			h.snapshot()
			if i := h.info(); i.Refused != "" {
				h.t.Errorf("%+v", i)
			}
		},
		"no libvirt": func(h *host) {
			h.reading.Err = errors.New("no answer for 5s")
			h.level(snapshot.Pause)
			if i := h.info(); i.Refused != "libvirt: no answer for 5s" {
				h.t.Errorf("%+v", i)
			}
			h.level(snapshot.Off)
			if i := h.info(); i.Refused != "" {
				h.t.Errorf("off: %+v", i)
			}
		},
		"no vendor module": func(h *host) {
			h.level(snapshot.Pause)
			h.remove("class/misc/kvm")
			if i := h.info(); !i.KVM || i.Refused != unusable {
				h.t.Errorf("%+v", i)
			}
			h.remove("module/kvm")
			if i := h.info(); i.KVM || i.Refused != "" {
				h.t.Errorf("no KVM: %+v", i)
			}
		},
	})
}

func TestRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.level(snapshot.Count)
		h.start(1, 7, 70, 71, 72)
		h.read(1, 1, 2, 4)
		ids := make([]snapshot.SlotID, 3) // by vCPU
		for _, slot := range h.expect("all", 1, 2, 4).Slots {
			ids[slot.VCPU] = slot.ID
		}
		delete(h.domains[0].VCPUs, 70)
		delete(h.domains[0].VCPUs, 72)
		h.expect("unplugged", -1, 2, -4)
		if err := h.source.Release(ids); !errors.Is(err, source.ErrStale) {
			t.Errorf("one lives: %v", err)
		}
		if s := h.expect("those before it", 2, -4); s.Released != 1 {
			t.Errorf("%+v", s)
		}
		if err := h.source.Release(ids[2:]); err != nil {
			t.Error(err)
		}
		if s := h.expect("the last", 2); s.Released != 5 {
			t.Errorf("%+v", s)
		}
	})
}

func TestEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t)
		h.level(snapshot.Count)
		expect := func(what string, want ...source.Event) {
			t.Helper()
			h.snapshot()
			var got []source.Event
			for len(h.source.Events()) > 0 {
				got = append(got, <-h.source.Events())
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s (-want +got)\n%s", what, diff)
			}
		}
		h.read(1)
		expect("a run without KVM")
		h.read(1, 5)
		expect("a run that nobody knows", source.Event{Kind: source.Lost})
		h.reading.Ended += seek / 2
		expect("so soon")
		h.read(1, 5)
		expect("still", source.Event{Kind: source.Lost})
		h.start(1, 7, 70)
		h.read(1, 6)
		e := source.Event{Kind: source.VCPUNew, Slot: snapshot.SlotID{Index: 1}, Process: 7, TID: 70}
		expect("known", e)
		h.end()
		e.Kind = source.VCPURetired
		expect("ended", e)
		if err := errors.Join(h.source.Close(), h.source.Close()); err != nil {
			t.Error(err)
		}
		if _, ok := <-h.source.Events(); ok {
			t.Error("the channel is open")
		}
		if _, err := h.source.Snapshot(); !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
}

func TestSetProcessLevel(t *testing.T) {
	p := snapshot.Process{TGID: 7}
	for _, tc := range []struct {
		name      string
		of, level snapshot.Level
		want      string
	}{
		{"off", snapshot.Off, snapshot.Count, "level of process 7: the source holds no lease"},
		{"count", snapshot.Count, snapshot.Count, ""},
		{"pause", snapshot.Count, snapshot.Pause, ""},
		{"none", snapshot.Count, snapshot.Off, "level of process 7: off is none"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHost(t)
				h.level(tc.of)
				err := h.source.SetProcessLevel(p, &tc.level)
				if got := fmt.Sprint(err); err == nil && tc.want != "" || err != nil && got != tc.want {
					t.Errorf("error %v, want %q", err, tc.want)
				}
				if _, err := h.source.Recent(snapshot.SlotID{}, 0); !errors.Is(err, ErrCount) {
					t.Errorf("recent: %v", err)
				}
			})
		})
	}
}
