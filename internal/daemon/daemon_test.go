// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/internal/exitreason"
	"virtexit/internal/ledger"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
	"virtexit/internal/source/replay"
	"virtexit/vmmap"
)

// host is a kernel and what runs on it. Its module outlives the sources that
// are opened on it.
type host struct {
	mu        sync.Mutex
	loaded    bool
	named     map[snapshot.Process]string
	boot      time.Time
	level     snapshot.Level                      // of the lease
	levels    map[snapshot.Process]snapshot.Level // of its processes
	on        time.Time                           // since when something is counted; zero: nothing is
	snap      snapshot.Snapshot
	recent    map[snapshot.SlotID][]snapshot.Exit
	processes map[int]vmmap.Domain // /proc
	learnt    map[snapshot.Process]vmmap.Domain
	refuse    bool          // levels of processes
	slow      time.Duration // what a refresh takes
	open      *handle
}

type handle struct {
	host   *host
	gone   bool
	events chan source.Event
}

const (
	tickHz = 2_000_000_000
	ring   = 4 // exits that a slot keeps
)

func newHost() *host {
	return &host{
		loaded:    true,
		named:     make(map[snapshot.Process]string),
		boot:      time.Now(),
		levels:    make(map[snapshot.Process]snapshot.Level),
		snap:      snapshot.Snapshot{TickHz: tickHz},
		recent:    make(map[snapshot.SlotID][]snapshot.Exit),
		processes: make(map[int]vmmap.Domain),
		learnt:    make(map[snapshot.Process]vmmap.Domain),
	}
}

func (h *host) now() time.Duration { return time.Since(h.boot) }

func (h *host) Open() (source.Source, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.loaded {
		return nil, fmt.Errorf("%w: virtexit.ko is not loaded", source.ErrUnavailable)
	}
	h.open = &handle{host: h, events: make(chan source.Event, 1000)}
	return h.open, nil
}

// unload removes the module with all it counted.
func (h *host) unload() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.loaded = false
	h.open.gone = true
	h.level, h.on = snapshot.Off, time.Time{}
	clear(h.levels)
	h.snap = snapshot.Snapshot{TickHz: tickHz}
}

// account is called before and after a level changes.
func (h *host) account() {
	if !h.on.IsZero() {
		h.snap.Counted += uint64(time.Since(h.on))
		h.on = time.Time{}
	}
	if h.highest() >= snapshot.Count {
		h.on = time.Now()
	}
}

func (h *host) highest() snapshot.Level {
	highest := h.level
	for _, l := range h.levels {
		highest = max(highest, l)
	}
	return highest
}

// levelOf is the level at which a process is counted.
func (h *host) levelOf(p snapshot.Process) snapshot.Level {
	if l, ok := h.levels[p]; ok {
		return l
	}
	return h.level
}

func (h *handle) Info() (source.Info, error) {
	h.host.mu.Lock()
	defer h.host.mu.Unlock()
	if h.gone {
		return source.Info{}, source.ErrGone
	}
	return source.Info{Collector: "kmod", Version: "1", Hook: "tracepoint", Level: h.host.highest(), ISA: exitreason.SVM, KVM: true, SlotsMax: 9, ExitCost: 70, EntryCost: 50}, nil
}

func (h *handle) SetLevel(l snapshot.Level) error {
	h.host.mu.Lock()
	defer h.host.mu.Unlock()
	if h.gone {
		return source.ErrGone
	}
	h.host.level = l
	if l == snapshot.Off {
		clear(h.host.levels)
	}
	h.host.account()
	if l == snapshot.Off {
		for i := range h.host.snap.Slots {
			h.host.snap.Slots[i].Retired = true
		}
	}
	return nil
}

func (h *handle) SetProcessLevel(p snapshot.Process, l *snapshot.Level) error {
	h.host.mu.Lock()
	defer h.host.mu.Unlock()
	switch {
	case h.gone:
		return source.ErrGone
	case h.host.level == snapshot.Off:
		return errors.New("the socket holds no lease")
	case l == nil:
		delete(h.host.levels, p)
	case h.host.refuse:
		return errors.New("too many processes have a level of their own")
	default:
		h.host.levels[p] = *l
	}
	h.host.account()
	return nil
}

func (h *handle) Recent(id snapshot.SlotID, from uint64) ([]snapshot.Exit, error) {
	h.host.mu.Lock()
	defer h.host.mu.Unlock()
	i := slices.IndexFunc(h.host.snap.Slots, func(s snapshot.Slot) bool { return s.ID == id })
	switch {
	case h.gone:
		return nil, source.ErrGone
	case i < 0:
		return nil, source.ErrStale
	}
	var exits []snapshot.Exit
	all := h.host.recent[id]
	for i := len(all) - 1; i >= max(0, len(all)-ring) && all[i].Number >= from; i-- {
		exits = append(exits, all[i])
	}
	return exits, nil
}

func (h *handle) Snapshot() (*snapshot.Snapshot, error) {
	h.host.mu.Lock()
	defer h.host.mu.Unlock()
	if h.gone {
		return nil, source.ErrGone
	}
	h.host.account()
	for i := range h.host.snap.Slots {
		if s := &h.host.snap.Slots[i]; !s.Retired {
			s.Level = h.host.levelOf(s.Process)
		}
	}
	return clone(h.host.snap), nil
}

func clone(s snapshot.Snapshot) *snapshot.Snapshot {
	s.Slots = slices.Clone(s.Slots)
	for i := range s.Slots {
		s.Slots[i].Rows = slices.Clone(s.Slots[i].Rows)
	}
	return &s
}

func (h *handle) Release(ids []snapshot.SlotID) error {
	h.host.mu.Lock()
	defer h.host.mu.Unlock()
	if h.gone {
		return source.ErrGone
	}
	h.host.snap.Slots = slices.DeleteFunc(h.host.snap.Slots, func(s snapshot.Slot) bool {
		if s.Retired && slices.Contains(ids, s.ID) {
			h.host.snap.Released += s.Exits()
			return true
		}
		return false
	})
	return nil
}

func (h *handle) Events() <-chan source.Event { return h.events }

func (h *handle) Close() error {
	if !h.gone {
		return h.SetLevel(snapshot.Off)
	}
	return nil
}

// exits makes a vCPU of a process take n exits of 1000 ticks each, after
// which it spent as long in the guest.
func (h *host) exits(tgid, vcpu int, code uint32, n uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := snapshot.Process{TGID: tgid, Start: uint64(tgid)*uint64(10*time.Millisecond) + 7}
	level := h.levelOf(p)
	if level < snapshot.Count {
		return
	}
	i := slices.IndexFunc(h.snap.Slots, func(s snapshot.Slot) bool {
		return s.Process.TGID == tgid && s.VCPU == vcpu && !s.Retired
	})
	if i < 0 {
		i = len(h.snap.Slots)
		s := snapshot.Slot{
			ID:      snapshot.SlotID{Index: uint32(tgid*10 + vcpu), Generation: uint32(h.now()) + 1},
			Process: p,
			Comm:    "qemu",
			TID:     tgid*10 + vcpu,
			VCPU:    vcpu,
			ISA:     exitreason.SVM,
			Since:   uint64(h.now()),
			Level:   level,
		}
		h.snap.Slots = append(h.snap.Slots, s)
		h.open.events <- source.Event{Kind: source.VCPUNew, Slot: s.ID, Process: tgid, TID: s.TID, VCPU: vcpu}
	}
	s := &h.snap.Slots[i]
	row := snapshot.Row{Code: code, Count: n}
	if level >= snapshot.Time {
		row.Time, row.Max, row.Hist = n*1000, 1000, snapshot.Hist{0, n}
		s.Times.KVM += n * 1000
		s.Times.Guest += n * 1000
	}
	if level == snapshot.Recent {
		for range n {
			h.recent[s.ID] = append(h.recent[s.ID], snapshot.Exit{Number: s.Recent, Time: uint64(h.now()), Duration: 1000, Code: code, RIP: 0xfff0})
			s.Recent++
		}
	}
	for j := range s.Rows {
		if s.Rows[j].Code == code {
			s.Rows[j].Add(row)
			return
		}
	}
	s.Rows = append(s.Rows, row)
}

// start makes a process that libvirt knows; die ends it.
func (h *host) start(tgid int, name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	uuid := fmt.Sprintf("00000000-0000-0000-0000-%012d", tgid)
	h.processes[tgid] = vmmap.Domain{ID: &tgid, Name: name, UUID: uuid, TGID: tgid, Start: uint64(tgid) * uint64(10*time.Millisecond), State: vmmap.Running, Source: "libvirt"}
}

func (h *host) die(tgid int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.processes, tgid)
	for i := range h.snap.Slots {
		if s := &h.snap.Slots[i]; s.Process.TGID == tgid {
			s.Retired = true
			h.open.events <- source.Event{Kind: source.VCPURetired, Slot: s.ID, Process: tgid, TID: s.TID, VCPU: s.VCPU}
		}
	}
}

// The host's identities: as vmmap's, with one source.

func (h *host) Learn(tgid int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d, ok := h.processes[tgid]; ok {
		h.learnt[snapshot.Process{TGID: tgid, Start: d.Start}] = d
	}
}

func (h *host) Refresh() error {
	time.Sleep(h.slow)
	h.mu.Lock()
	defer h.mu.Unlock()
	for p, d := range h.learnt {
		if _, ok := h.processes[p.TGID]; !ok {
			d.ID, d.TGID, d.State = nil, 0, vmmap.ShutOff
			h.learnt[p] = d
		}
	}
	for tgid, d := range h.processes {
		h.learnt[snapshot.Process{TGID: tgid, Start: d.Start}] = d
	}
	return nil
}

func (h *host) Lookup(p snapshot.Process, comm string) (vmmap.Domain, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d, ok := h.learnt[p.InProc()]; ok {
		return d, true
	}
	if _, ok := h.named[p.InProc()]; !ok { // the first word of it stays
		h.named[p.InProc()] = fmt.Sprintf("%s-%d", comm, p.TGID)
	}
	return vmmap.Domain{Name: h.named[p.InProc()], TGID: p.TGID, State: vmmap.Running, Source: "process"}, false
}

func (h *host) Forget(p snapshot.Process) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.learnt, p.InProc())
	delete(h.named, p.InProc())
}

func (h *host) Restore(p snapshot.Process, d vmmap.Domain) {
	h.mu.Lock()
	defer h.mu.Unlock()
	d.ID, d.TGID, d.State = nil, 0, vmmap.ShutOff
	h.learnt[p.InProc()] = d
}

func (h *host) Domains() []vmmap.Domain {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []vmmap.Domain
	for _, d := range h.learnt {
		if d.TGID != 0 {
			all = append(all, d)
		}
	}
	return append(all, vmmap.Domain{Name: "defined", UUID: "11111111-0000-0000-0000-000000000000", State: vmmap.ShutOff, Source: "libvirt"})
}

// hung is a libvirt that never answers.
type hung struct{}

func (hung) Run(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
func (hung) Status() vmmap.LibvirtStatus {
	return vmmap.LibvirtStatus{URI: "qemu:///system", Error: "no answer"}
}

// run tests a daemon on a host, in a bubble where time is the test's.
func run(t *testing.T, change func(*Config), test func(*testing.T, *host, *Daemon)) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost()
		time.Sleep(time.Hour) // since boot
		c := Config{
			Open:       h.Open,
			Identities: h,
			Libvirt:    hung{},
			On:         true,
			Level:      snapshot.Time,
			Interval:   time.Second,
			Retention:  ledger.Retention{Age: time.Minute, Count: 10},
			BootTime:   h.now,
			CPUTime:    func() time.Duration { return h.now() / 50 },
			Kernel:     "6.1",
			Version:    "test",
			Log:        slog.New(slog.NewTextHandler(io.Discard, nil)),
		}
		if change != nil {
			change(&c)
		}
		d := New(c)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			d.Run(ctx)
		}()
		synctest.Wait()
		test(t, h, d)
		cancel()
		<-done
		if h.loaded && h.level != snapshot.Off {
			t.Errorf("the daemon has ended and the kernel still counts")
		}
	})
}

func report(t *testing.T, d *Daemon, interval time.Duration, names ...string) api.Report {
	t.Helper()
	r, err := d.Report(t.Context(), names, interval)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// pass lets time pass, and what has to happen until then.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func ptr[T any](v T) *T { return &v }

func TestReport(t *testing.T) {
	run(t, nil, func(t *testing.T, h *host, d *Daemon) {
		h.start(1, "web")
		h.start(2, "db")
		h.exits(1, 0, 0x72, 50)
		h.exits(2, 0, 0x72, 1)
		pass(10 * time.Second)
		go func() {
			time.Sleep(time.Second)
			h.exits(1, 0, 0x72, 100)
			h.exits(1, 1, 0x7b, 300)
		}()
		got := report(t, d, 2*time.Second, "web", "1")
		since := h.boot.Add(time.Hour).Round(time.Millisecond)
		us := ptr(uint64(500)) // 1000 ticks
		want := api.Report{
			Time:       time.Now().Round(time.Millisecond),
			IntervalNS: 2e9,
			Domains: []api.Domain{{
				ID: ptr(1), Name: "web", UUID: ptr("00000000-0000-0000-0000-000000000001"), Run: ptr("1-1"), TGID: 1, State: "running", Source: "libvirt",
				Level: "time", Since: &since, WallNS: 2e9, SpanNS: 2e9, Count: 400, Rate: 200, RateNS: 2e9,
				Time: half(400_000), TimePct: api.TimePct{Guest: 50, KVM: 50}, GuestNS: 200_000, GuestPct: 50,
				VCPUs: []api.VCPU{
					{ID: 0, TID: 10, Exits: 100, Rate: 50, Time: half(100_000), GuestNS: 50_000, GuestPct: 50},
					{ID: 1, TID: 11, Exits: 300, Rate: 150, Time: half(300_000), GuestNS: 150_000, GuestPct: 50},
				},
				Exits: []api.Exit{
					{ISA: "svm", Code: 0x7b, Reason: "io", Count: 300, Rate: 150, Share: 0.75, TimeNS: 150_000, MeanNS: us, MaxNS: us},
					{ISA: "svm", Code: 0x72, Reason: "cpuid", Count: 100, Rate: 50, Share: 0.25, TimeNS: 50_000, MeanNS: us, MaxNS: us},
				},
			}},
		}
		// The percentiles are within the bucket, [512, 1000] ticks.
		for i := range got.Domains[0].Exits {
			e := &got.Domains[0].Exits[i]
			if *e.P50NS < 256 || *e.P50NS > *e.P99NS || *e.P99NS > 500 {
				t.Errorf("%s: p50 %d ns, p99 %d ns", e.Reason, *e.P50NS, *e.P99NS)
			}
			e.P50NS, e.P99NS = nil, nil
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("report (-want +got)\n%s", diff)
		}

		total := report(t, d, 0, "web").Domains[0]
		if total.Count != 450 || total.SpanNS != 12e9 || total.Rate != 37.5 {
			t.Errorf("total: %d exits in %d ns, rate %v", total.Count, total.SpanNS, total.Rate)
		}
		if all := report(t, d, 0); len(all.Domains) != 2 {
			t.Errorf("%d domains run, want 2", len(all.Domains))
		}
	})
}

// half is a time of which the host's guests spend half in the guest.
func half(ns uint64) api.Times { return api.Times{GuestNS: ns / 2, KVMNS: ns / 2} }

func TestReportNames(t *testing.T) {
	run(t, nil, func(t *testing.T, h *host, d *Daemon) {
		begin := time.Now()
		_, err := d.Report(t.Context(), []string{"nobody"}, time.Minute)
		var unknown *api.NotFoundError
		if !errors.As(err, &unknown) || unknown.Domain != "nobody" {
			t.Errorf("error %v", err)
		}
		if time.Since(begin) != 0 {
			t.Errorf("that took %v", time.Since(begin))
		}
		if r := report(t, d, 0, "defined"); r.Domains[0].Since != nil || r.Domains[0].Count != 0 {
			t.Errorf("a domain that never ran: %+v", r.Domains[0])
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := d.Report(ctx, nil, time.Minute); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
	})
}

// Each exit is in one interval, whoever took it, however slow the reader is, and
// whoever else asks.
func TestWatch(t *testing.T) {
	run(t, nil, func(t *testing.T, h *host, d *Daemon) {
		h.start(1, "web")
		h.start(2, "db")
		pass(10 * time.Second)
		h.exits(1, 0, 0x72, 1000) // before
		watch := func(read time.Duration, intervals int, names ...string) []api.Report {
			var got []api.Report
			enough := errors.New("enough")
			err := d.Watch(t.Context(), names, 2*time.Second, func(r api.Report) error {
				got = append(got, r)
				time.Sleep(read)
				if len(got) == intervals {
					return enough
				}
				return nil
			})
			if err != enough {
				t.Errorf("error %v", err)
			}
			return got
		}
		go func() {
			time.Sleep(time.Second / 10)
			for i := range 12 {
				time.Sleep(time.Second / 2)
				h.exits(1, 0, 0x72, 10)
				if i == 5 {
					h.exits(2, 0, 0x7b, 7)
					h.die(2)
				}
				report(t, d, 0)
			}
		}()
		type line struct {
			seq      uint64
			interval time.Duration
			exits    map[string]uint64
		}
		lines := func(reports []api.Report) (lines []line) {
			for i, r := range reports {
				l := line{r.Seq, time.Duration(r.IntervalNS), make(map[string]uint64)}
				for _, d := range r.Domains {
					l.exits[d.Name] = d.Count
				}
				if i > 0 && r.Time.Sub(reports[i-1].Time) != l.interval {
					t.Errorf("line %d: %v after the one before, of %v", r.Seq, r.Time.Sub(reports[i-1].Time), l.interval)
				}
				lines = append(lines, l)
			}
			return lines
		}
		want := []line{
			{1, 2 * time.Second, map[string]uint64{"web": 30, "db": 0}},
			{2, 5 * time.Second, map[string]uint64{"web": 90, "db": 7}}, // it has ended meanwhile
			{3, 5 * time.Second, map[string]uint64{"web": 0}},
		}
		if diff := cmp.Diff(want, lines(watch(5*time.Second, 3)), cmp.AllowUnexported(line{})); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}

		// A named domain may end, be forgotten, and come again.
		go func() {
			time.Sleep(3 * time.Second)
			h.exits(1, 0, 0x72, 5)
			h.die(1)
			time.Sleep(2 * time.Hour)
			h.start(3, "web")
			h.exits(3, 0, 0x72, 6)
		}()
		seen := make(map[uint64]int)
		for _, r := range watch(0, 3700, "web") {
			for _, d := range r.Domains {
				seen[d.Count]++
			}
		}
		if seen[5] != 1 || seen[6] != 1 || seen[0] == 0 || seen[0] > 3000 {
			t.Errorf("counts, how often: %v", seen)
		}
		var unknown *api.NotFoundError
		if err := d.Watch(t.Context(), []string{"nobody"}, time.Second, nil); !errors.As(err, &unknown) {
			t.Errorf("error %v", err)
		}
	})
}

// A poller that sees each number has seen each period.
func TestSeq(t *testing.T) {
	run(t, nil, func(t *testing.T, h *host, d *Daemon) {
		h.start(1, "web")
		pass(10 * time.Second)
		first := d.Domains()
		if again := d.Domains(); again.Seq != first.Seq {
			t.Errorf("%d at once after %d", again.Seq, first.Seq)
		}
		for i := range uint64(5) {
			h.exits(1, 0, 0x72, i+1)
			pass(d.config.Interval)
			got := d.Domains()
			if rate := got.Domains[slices.IndexFunc(got.Domains, func(d api.Domain) bool { return d.Name == "web" })].Rate; got.Seq != first.Seq+i+1 || rate != float64(i+1)/d.config.Interval.Seconds() {
				t.Errorf("period %d after %d: rate %v", got.Seq, first.Seq, rate)
			}
		}
		if got := d.Domains(); !got.DaemonSince.Equal(d.started) || got.Time.After(time.Now()) || time.Since(got.Time) > 2*time.Second {
			t.Errorf("%+v", got)
		}
	})
}

func TestLevelCount(t *testing.T) {
	run(t, func(c *Config) { c.Level = snapshot.Count }, func(t *testing.T, h *host, d *Daemon) {
		h.exits(1, 0, 0x72, 50)
		e := report(t, d, 0, "qemu-1").Domains[0].Exits[0]
		want := api.Exit{ISA: "svm", Code: 0x72, Reason: "cpuid", Count: 50, Share: 1}
		if diff := cmp.Diff(want, e); diff != "" {
			t.Errorf("exit (-want +got)\n%s", diff)
		}
	})
}

// A guest that comes, works and goes between two snapshots keeps its name and
// its last exit, until the retention ends.
func TestShortLived(t *testing.T) {
	run(t, func(c *Config) { c.Interval = time.Minute }, func(t *testing.T, h *host, d *Daemon) {
		pass(32500 * time.Millisecond) // no refresh of identities is near
		h.start(7, "brief")
		h.exits(7, 0, 0x72, 123)
		synctest.Wait() // for the event to be seen, not for a snapshot
		h.exits(7, 0, 0x78, 1)
		h.die(7)
		pass(2 * settle)
		if len(h.snap.Slots) != 0 || h.snap.Released != 124 {
			t.Errorf("slot not released: %+v", h.snap)
		}
		got := report(t, d, 0, "brief").Domains[0]
		if got.Count != 124 || got.TGID != 0 || got.State != "shut off" || got.ID != nil {
			t.Errorf("got %+v", got)
		}
		if s := d.Status(); s.Exits != 124 || s.Missed != 0 {
			t.Errorf("status %+v", s)
		}
		pass(3 * time.Minute)
		if _, err := d.Report(t.Context(), []string{"brief"}, 0); err == nil {
			t.Error("it is remembered for ever")
		}
		if s := d.Status(); s.Exits != 124 || s.Missed != 0 {
			t.Errorf("later: status %+v", s)
		}
		if len(h.learnt) != 0 {
			t.Errorf("its identity is remembered for ever: %v", h.learnt)
		}
	})
}

// A guest that is gone before anything but the kernel could tell of it, and whom nobody asks for until a period ends.
func TestUnknown(t *testing.T) {
	run(t, nil, func(t *testing.T, h *host, d *Daemon) {
		h.exits(7, 0, 0x72, 123)
		h.die(7)
		pass(2 * time.Second)
		if got := report(t, d, 0, "qemu-7").Domains[0]; got.Count != 123 || got.TGID != 0 || got.State != "shut off" {
			t.Errorf("got %+v", got)
		}
	})
}

func TestDomains(t *testing.T) {
	run(t, nil, func(t *testing.T, h *host, d *Daemon) {
		h.start(1, "web")
		h.start(2, "idle")
		h.exits(1, 0, 0x72, 1000)
		pass(5500 * time.Millisecond) // the identities are fresh, and so is a period
		h.exits(1, 0, 0x72, 30)
		pass(time.Second)
		type row struct {
			Name, State string
			Count       uint64
			Rate        float64
		}
		list := func() (rows []row) {
			for _, dom := range d.Domains().Domains {
				rows = append(rows, row{dom.Name, dom.State, dom.Count, dom.Rate})
			}
			slices.SortFunc(rows, func(a, b row) int { return bytes.Compare([]byte(a.Name), []byte(b.Name)) })
			return rows
		}
		want := []row{{"defined", "shut off", 0, 0}, {"idle", "running", 0, 0}, {"web", "running", 1030, 30}}
		if diff := cmp.Diff(want, list()); diff != "" {
			t.Errorf("domains (-want +got)\n%s", diff)
		}
		pass(time.Second)
		want[2].Rate = 0
		if diff := cmp.Diff(want, list()); diff != "" {
			t.Errorf("a second later: domains (-want +got)\n%s", diff)
		}
	})
}

func TestVCPUNumbers(t *testing.T) {
	run(t, nil, func(t *testing.T, h *host, d *Daemon) {
		h.start(1, "web")
		dom := h.processes[1]
		dom.VCPUs = map[int]int{10: 0, 14: 1, 99: 2} // libvirt counts vCPUs where KVM has APIC ids
		h.processes[1] = dom
		h.exits(1, 0, 0x72, 5)
		h.exits(1, 4, 0x72, 6)
		h.exits(1, 6, 0x72, 7) // plugged in, libvirt's word is not yet here
		pass(time.Second)
		var got []api.VCPU
		for _, v := range report(t, d, 0, "web").Domains[0].VCPUs {
			got = append(got, api.VCPU{ID: v.ID, TID: v.TID, Exits: v.Exits})
		}
		want := []api.VCPU{{ID: 0, TID: 10, Exits: 5}, {ID: 1, TID: 14, Exits: 6}, {ID: 2, TID: 99}, {ID: 6, TID: 16, Exits: 7}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("vcpus (-want +got)\n%s", diff)
		}
	})
}

func TestCollection(t *testing.T) {
	run(t, func(c *Config) { c.On = false }, func(t *testing.T, h *host, d *Daemon) {
		expect := func(s api.Status, err error, collection, level string, exits uint64) {
			t.Helper()
			if err != nil || s.Problem != "" || s.Collection != collection || s.Level != level || s.Exits != exits {
				t.Errorf("error %v, status %+v, want %s, %s, %d exits", err, s, collection, level, exits)
			}
		}
		set := func(collection, level string, exits uint64, inForce string) {
			t.Helper()
			s, err := d.SetCollection(api.Collection{Collection: collection, Level: level})
			expect(s, err, collection, inForce, exits)
		}
		expect(d.Status(), nil, "off", "off", 0)
		set("on", "count", 0, "count")
		h.exits(1, 0, 0x72, 5)
		set("on", "", 5, "time")
		h.exits(1, 0, 0x72, 6)
		set("off", "", 11, "off")
		h.exits(1, 0, 0x72, 7) // unseen
		pass(5 * time.Second)
		set("on", "", 11, "time")
		h.exits(1, 0, 0x72, 1)
		expect(d.Status(), nil, "on", "time", 12)
		if got := report(t, d, 0, "qemu-1").Domains[0].Count; got != 12 {
			t.Errorf("%d exits, want 12", got)
		}
	})
}

// A process that lives is not forgotten, however long collection is off.
func TestOffForLong(t *testing.T) {
	run(t, nil, func(t *testing.T, h *host, d *Daemon) {
		h.start(1, "web")
		h.exits(1, 0, 0x72, 5)
		if _, err := d.SetCollection(api.Collection{Collection: "off"}); err != nil {
			t.Fatal(err)
		}
		pass(time.Hour)
		got := report(t, d, 0, "web").Domains[0]
		if got.Count != 5 || got.State != "running" || time.Duration(got.SpanNS) > time.Second {
			t.Errorf("got %+v", got)
		}
	})
}

func TestModuleComesAndGoes(t *testing.T) {
	loaded := func(h *host, yes bool) func() (source.Source, error) {
		h.loaded = yes
		return h.Open
	}
	var h *host
	run(t, func(c *Config) { h = c.Identities.(*host); c.Open = loaded(h, false) }, func(t *testing.T, h *host, d *Daemon) {
		pass(time.Minute)
		s := d.Status()
		if s.Collector != nil || s.Collection != "on" || s.Level != "off" || s.Problem != "collector not available: virtexit.ko is not loaded" {
			t.Errorf("without the module: status %+v", s)
		}
		if _, err := d.Report(t.Context(), nil, time.Second); !errors.Is(err, source.ErrUnavailable) {
			t.Errorf("without the module: error %v", err)
		}
		if _, err := d.Report(t.Context(), nil, 0); err != nil {
			t.Errorf("without the module: totals: %v", err)
		}
		var before uint64
		for round := range uint64(3) {
			h.mu.Lock()
			h.loaded = true
			h.mu.Unlock()
			pass(retryEvery)
			if s := d.Status(); s.Problem != "" || s.Level != "time" || *s.Collector != "kmod" {
				t.Fatalf("round %d: status %+v", round, s)
			}
			h.exits(1, 0, 0x72, 10)
			pass(2 * time.Second)
			h.unload()
			pass(2 * time.Second)
			s := d.Status()
			if s.Problem == "" || s.Exits != before+10 || s.Missed != 0 {
				t.Errorf("round %d, unloaded: status %+v", round, s)
			}
			before = s.Exits
		}
		if got := report(t, d, 0, "qemu-1").Domains[0].Count; got != 30 {
			t.Errorf("%d exits, want 30", got)
		}
	})
}

// A better collector is gone over to when it comes, and nothing is lost.
func TestBetter(t *testing.T) {
	var h *host
	var came atomic.Bool
	var opened atomic.Int32
	run(t, func(c *Config) {
		h = c.Identities.(*host)
		c.Interval = 1500 * time.Millisecond // none ends when a better one is looked for
		c.Better = func() bool { return came.Load() }
		c.Open = func() (source.Source, error) {
			opened.Add(1)
			if came.Swap(false) {
				h.mu.Lock()
				if h.level != snapshot.Off {
					t.Errorf("the one before still collects, at level %v", h.level)
				}
				h.snap = snapshot.Snapshot{TickHz: tickHz}
				h.mu.Unlock()
			}
			return h.Open()
		}
	}, func(t *testing.T, h *host, d *Daemon) {
		h.exits(1, 0, 0x72, 3)
		pass(betterEvery - 100*time.Millisecond)
		h.exits(1, 0, 0x72, 10) // after the last period before
		came.Store(true)
		pass(100 * time.Millisecond)
		if s := d.Status(); s.Problem != "" || s.Level != "time" || s.Exits != 13 || opened.Load() != 2 {
			t.Errorf("opened %d times: %+v", opened.Load(), s)
		}
		h.exits(1, 0, 0x72, 5)
		pass(3 * betterEvery)
		if s := d.Status(); s.Problem != "" || s.Level != "time" || s.Exits != 18 || s.Missed != 0 || opened.Load() != 2 {
			t.Errorf("opened %d times: %+v", opened.Load(), s)
		}
	})
}

// What is wished for while a collector is left is for the next one.
func TestEnd(t *testing.T) {
	duty := api.Duty{OnNS: int64(time.Minute), EveryNS: int64(time.Hour)}
	for _, tt := range []struct {
		name string
		do   func(d *Daemon)
		want snapshot.Level // of the next one
	}{
		{"nothing", func(*Daemon) {}, snapshot.Time},
		{"off", func(d *Daemon) { d.setCollection(snapshot.Off, duty) }, snapshot.Off},
		{"off and on", func(d *Daemon) { d.setCollection(snapshot.Off, duty); d.setCollection(snapshot.Count, duty) }, snapshot.Count},
		{"a pause begins", func(d *Daemon) {
			if got := d.turn(true); got != 59*time.Minute {
				t.Errorf("a pause of %v", got)
			}
		}, snapshot.Pause},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, func(c *Config) { c.Duty = duty }, func(t *testing.T, h *host, d *Daemon) {
				h.exits(1, 0, 0x72, 3)
				d.end()
				tt.do(d)
				level := func() snapshot.Level {
					h.mu.Lock()
					defer h.mu.Unlock()
					return h.level
				}
				if got := level(); got != snapshot.Off || d.view.Totals.Exits != 3 {
					t.Errorf("the one that ended is at level %v, with %d exits", got, d.view.Totals.Exits)
				}
				next, err := h.Open()
				if err == nil {
					err = d.attach(next)
				}
				if got := level(); err != nil || got != tt.want {
					t.Errorf("the next one is at level %v, want %v: %v", got, tt.want, err)
				}
			})
		})
	}
}

// A log that is followed ends with the collector that has logged it, whose slots are
// given back all the same.
func TestEndFollowed(t *testing.T) {
	dir := t.TempDir()
	run(t, func(c *Config) { c.Level, c.StateDir, c.StateInterval = snapshot.Recent, dir, time.Hour }, func(t *testing.T, h *host, d *Daemon) {
		h.start(1, "one")
		h.exits(1, 0, 0x72, 3)
		pass(2 * time.Second)
		ended := make(chan error)
		go func() {
			ended <- d.Follow(t.Context(), "one", api.LogQuery{}, func([]api.LogLine) error { return nil })
		}()
		pass(time.Second)
		d.end()
		h.mu.Lock()
		if len(h.snap.Slots) > 0 {
			t.Errorf("slots that were not given back: %+v", h.snap.Slots)
		}
		h.mu.Unlock()
		d.detach()
		next, err := h.Open()
		if err == nil {
			err = d.attach(next)
		}
		if err != nil {
			t.Fatal(err)
		}
		pass(time.Second)
		select {
		case err := <-ended:
			if !errors.Is(err, source.ErrGone) {
				t.Errorf("the log ends with %v", err)
			}
		default:
			t.Error("the log goes on, of slots of another collector")
		}
	})
}

// A kernel whose counts go back is reported, and read anew.
func TestInconsistent(t *testing.T) {
	var log bytes.Buffer
	run(t, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) }, func(t *testing.T, h *host, d *Daemon) {
		h.exits(1, 0, 0x72, 10)
		pass(2 * time.Second)
		h.mu.Lock()
		h.snap.Slots[0].Rows[0].Count = 4
		h.mu.Unlock()
		if s := d.Status(); s.Problem == "" || s.Exits != 10 {
			t.Errorf("status %+v", s)
		}
		pass(3 * time.Second)
		if s := d.Status(); s.Problem != "" || s.Exits < 10 {
			t.Errorf("later: status %+v", s)
		}
	})
	if !bytes.Contains(log.Bytes(), []byte("level=ERROR")) {
		t.Errorf("nothing was said:\n%s", &log)
	}
}

// Bursts of events share snapshots.
func TestBurst(t *testing.T) {
	var counting *counter
	run(t, func(c *Config) {
		open := c.Open
		c.Interval = time.Hour
		c.Open = func() (source.Source, error) {
			src, err := open()
			counting = &counter{Source: src}
			return counting, err
		}
	}, func(t *testing.T, h *host, d *Daemon) {
		before := counting.snapshots
		for i := range 50 {
			h.exits(i+1, 0, 0x72, 1)
			pass(settle / 10)
		}
		pass(settle)
		if n := counting.snapshots - before; n < 3 || n > 6 {
			t.Errorf("%d snapshots of 50 events in %v", n, 5*settle)
		}
	})
}

type counter struct {
	source.Source
	snapshots int
}

func (c *counter) Snapshot() (*snapshot.Snapshot, error) {
	c.snapshots++
	return c.Source.Snapshot()
}

// Whatever was recorded, every exit is in one place: at each step the domains'
// counts, those attributed to none and those missed make what the kernel counted.
func TestConservation(t *testing.T) {
	for seed := range uint64(5) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			recording, steps := record(t, seed)
			run(t, func(c *Config) {
				c.Interval = time.Hour // only the test takes snapshots
				c.Retention.Count = 3
				c.Open = func() (source.Source, error) {
					if recording == nil {
						return nil, errors.New("the recording has ended")
					}
					r, err := replay.NewReader(bytes.NewReader(recording))
					recording = nil
					if err != nil {
						return nil, err
					}
					return replay.NewSource(r)
				}
			}, func(t *testing.T, h *host, d *Daemon) {
				for range steps - 1 { // the daemon took one when it opened the recording
					s := d.Status()
					if s.Problem != "" {
						t.Fatal(s.Problem)
					}
					sum := s.Unattributed + s.Missed
					for _, dom := range d.Domains().Domains {
						sum += dom.Count
						var vcpus, reasons uint64
						for _, v := range dom.VCPUs {
							vcpus += v.Exits
						}
						for _, e := range dom.Exits {
							reasons += e.Count
						}
						if vcpus != dom.Count || reasons != dom.Count {
							t.Fatalf("%s: %d exits, vCPUs have %d, reasons %d", dom.Name, dom.Count, vcpus, reasons)
						}
					}
					if s.Exits != sum {
						t.Fatalf("the kernel counted %d, but %d are accounted for", s.Exits, sum)
					}
				}
				if s := d.Status(); s.Problem == "" || s.Exits == 0 {
					t.Errorf("at the end: status %+v", s)
				}
			})
		})
	}
}

// record makes a recording of a host on which guests come and go and another
// reader interferes.
func record(t *testing.T, seed uint64) (recording []byte, snapshots int) {
	synctest.Test(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(seed, 0))
		h := newHost()
		src, _ := h.Open()
		src.SetLevel(snapshot.Time)
		var b bytes.Buffer
		w, err := replay.NewWriter(&b)
		if err != nil {
			t.Fatal(err)
		}
		recorder := replay.Record(src, w, time.Now)
		if _, err := recorder.Info(); err != nil {
			t.Fatal(err)
		}
		for range 200 {
			time.Sleep(time.Second)
			for range rng.IntN(10) {
				h.exits(1+rng.IntN(5), rng.IntN(3), uint32(rng.IntN(4)), rng.Uint64N(100))
			}
			h.snap.Unattributed += rng.Uint64N(2)
			switch rng.IntN(6) {
			case 0:
				h.die(1 + rng.IntN(5))
			case 1:
				if len(h.snap.Slots) > 0 {
					src.Release([]snapshot.SlotID{h.snap.Slots[0].ID})
				}
			}
			if _, err := recorder.Snapshot(); err != nil {
				t.Fatal(err)
			}
			snapshots++
			for len(h.open.events) > 0 {
				<-h.open.events
			}
		}
		recording = b.Bytes()
	})
	return recording, snapshots
}
