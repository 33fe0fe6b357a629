// SPDX-License-Identifier: Apache-2.0

package slots

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/bits"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtexit/api"
	"virtexit/api/client"
	"virtexit/internal/abi"
	"virtexit/internal/daemon"
	"virtexit/internal/exitreason"
	"virtexit/internal/ledger"
	"virtexit/internal/report"
	"virtexit/internal/server"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
	"virtexit/vmmap"
)

// From the module's memory to JSON, on a host of many guests. All is real but
// the kernel, which writes here, and the identities.

const (
	vcpusPerDomain = 8
	rowsPerVCPU    = 15 // reasons that a vCPU has met in its life
	activeRows     = 5  // and in any second
)

// manyGuests is a kernel that counts the exits of many vCPUs.
type manyGuests struct {
	*image
	memory *Memory
	tsc    atomic.Uint64
	total  uint64 // exits
}

func newManyGuests(tb testing.TB, vcpus int) *manyGuests {
	g := &manyGuests{}
	g.tsc.Store(1 << 40)
	var err error
	g.image = layImage(vcpus, func(size int) (mem []byte) { // the kernel's is no part of our heap either
		if mem, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON); err != nil {
			tb.Fatal(err)
		}
		return mem
	})
	tb.Cleanup(func() { unix.Munmap(g.bytes) })
	g.memory, err = New(g.bytes, Clock{Ticks: g.tsc.Load, Boot: g.boot})
	if err != nil {
		tb.Fatal(err)
	}
	for i := range g.slots {
		tgid := uint32(1000 + i/vcpusPerDomain)
		g.slots[i] = abi.Slot{
			State: abi.Live, TID: uint32(100_000 + i), TGID: tgid, StartTime: uint64(i), TGIDStartTime: uint64(tgid),
			VCPUID: uint32(i % vcpusPerDomain), ISA: abi.ISASVM, NumRows: rowsPerVCPU, Level: abi.LevelTime,
			Comm: [abi.CommLen]byte{'q', 'e', 'm', 'u'}, Since: 1, TSC: g.tsc.Load(),
		}
		for j := range rowsPerVCPU {
			g.slots[i].Rows[j].Code = uint32(0x60 + j)
			g.exits(i, j)
		}
	}
	g.header.CountedSince = 1
	return g
}

func (g *manyGuests) boot() uint64 { return g.tsc.Load() / 2 } // 2 GHz

// exits has a vCPU take some for one reason.
func (g *manyGuests) exits(vcpu, row int) {
	r := &g.slots[vcpu].Rows[row]
	for k := range uint64(6) { // in as many buckets
		cycles := uint64(700+vcpu%50) << k
		r.Count++
		g.total++
		r.Time += cycles
		r.Max = max(r.Max, cycles)
		r.Hist[bits.Len64(cycles)-1-abi.HistShift]++
	}
}

// pass is a second in which each vCPU takes exits for some of its reasons.
func (g *manyGuests) pass(rows int) {
	now := g.tsc.Add(2_000_000_000)
	for i := range g.slots {
		for j := range rows {
			g.exits(i, (i/vcpusPerDomain+4*j)%rowsPerVCPU)
		}
		g.slots[i].GuestTime += 1_900_000_000
		g.slots[i].TSC = now
	}
}

// theirs is the source that reads them.
type theirs struct {
	guests *manyGuests
	events chan source.Event
}

func (s *theirs) Info() (source.Info, error) {
	return source.Info{Collector: "kmod", Level: snapshot.Time, ISA: exitreason.SVM, KVM: true}, nil
}
func (s *theirs) SetLevel(snapshot.Level) error                           { return nil }
func (s *theirs) SetProcessLevel(snapshot.Process, *snapshot.Level) error { return nil }
func (s *theirs) Recent(snapshot.SlotID, uint64) ([]snapshot.Exit, error) { return nil, nil }
func (s *theirs) Snapshot() (*snapshot.Snapshot, error)                   { return s.guests.memory.Snapshot() }
func (s *theirs) Release([]snapshot.SlotID) error                         { return errors.New("none is retired") }
func (s *theirs) Events() <-chan source.Event                             { return s.events }
func (s *theirs) Close() error                                            { return nil }

// names knows every guest by its process.
type names map[int]vmmap.Domain

func (n names) Refresh() error { return nil }
func (n names) Learn(int)      {}
func (n names) Lookup(p snapshot.Process, _ string) (vmmap.Domain, bool) {
	d, ok := n[p.TGID]
	return d, ok
}
func (n names) Forget(snapshot.Process)                {}
func (n names) Restore(snapshot.Process, vmmap.Domain) {}
func (n names) Domains() (all []vmmap.Domain) {
	for _, d := range n {
		all = append(all, d)
	}
	return all
}

// hosted is a daemon that has seen its guests.
type hosted struct {
	guests *manyGuests
	daemon *daemon.Daemon
	server *server.Server
	client *client.Client
}

func newHosted(tb testing.TB, vcpus int) *hosted {
	g := newManyGuests(tb, vcpus)
	n := make(names)
	for i := range g.slots {
		id, tgid := i/vcpusPerDomain, int(g.slots[i].TGID)
		if _, ok := n[tgid]; !ok {
			n[tgid] = vmmap.Domain{
				ID: &id, Name: fmt.Sprintf("guest-%04d", id), UUID: fmt.Sprintf("00000000-0000-4000-8000-%012d", id),
				TGID: tgid, Start: g.slots[i].TGIDStartTime, State: vmmap.Running, Source: "libvirt", VCPUs: make(map[int]int),
			}
		}
		n[tgid].VCPUs[int(g.slots[i].TID)] = i % vcpusPerDomain
	}
	d := daemon.New(daemon.Config{
		Open:       func() (source.Source, error) { return &theirs{g, make(chan source.Event)}, nil },
		Identities: n,
		On:         true, Level: snapshot.Time,
		Interval:  time.Hour, // a snapshot when it is asked for, and none else
		Retention: ledger.Retention{Age: time.Hour, Count: 100},
		BootTime:  func() time.Duration { return time.Duration(g.boot()) },
		CPUTime:   func() time.Duration { return 0 },
		Log:       slog.New(slog.DiscardHandler),
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { d.Run(ctx); close(done) }()
	tb.Cleanup(func() { cancel(); <-done })
	h := &hosted{guests: g, daemon: d, server: server.New(d, server.Options{})}
	h.client = h.dial(tb)
	for d.Status().Collector == nil {
		time.Sleep(time.Millisecond)
	}
	return h
}

// snapshot has the daemon take one.
func (h *hosted) snapshot(tb testing.TB) {
	if s := h.daemon.Status(); s.Exits != h.guests.total || s.Unattributed != 0 || s.Missed != 0 || s.Problem != "" {
		tb.Fatalf("of %d exits: %+v", h.guests.total, s)
	}
}

// json is the answer to GET /v1/domains, all but the socket.
func (h *hosted) json(tb testing.TB) []byte {
	w := httptest.NewRecorder()
	h.server.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/v1/domains", nil))
	if w.Code != http.StatusOK {
		tb.Fatalf("%d: %s", w.Code, w.Body)
	}
	return w.Body.Bytes()
}

// dial returns a client of the daemon, on a socket.
func (h *hosted) dial(tb testing.TB) *client.Client {
	path := filepath.Join(tb.TempDir(), "socket")
	l, err := server.Listen(path, "", 0o660)
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.server.Serve(ctx, l) }()
	tb.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Error(err)
		}
	})
	return client.New(path)
}

func BenchmarkHost(b *testing.B) {
	ctx := context.Background()
	for _, vcpus := range []int{10, 100, 1000, 8000, 10_000} {
		run := func(name string, before func(*hosted), f func(*testing.B, *hosted) error) {
			b.Run(fmt.Sprintf("%s/vcpus=%d", name, vcpus), func(b *testing.B) {
				h := newHosted(b, vcpus)
				for range 3 { // rates are those between two
					h.guests.pass(activeRows)
					h.snapshot(b)
				}
				b.ReportAllocs()
				var used time.Duration
				for b.Loop() {
					b.StopTimer()
					before(h)
					start := cpuTime(b)
					b.StartTimer()
					err := f(b, h)
					used += cpuTime(b) - start
					if err != nil {
						b.Fatal(err)
					}
				}
				perOp := float64(used.Nanoseconds()) / float64(b.N)
				b.ReportMetric(perOp, "cpu-ns/op")
				b.ReportMetric(perOp/float64(vcpus), "cpu-ns/vcpu")
			})
		}
		nothing := func(*hosted) {}
		for _, rows := range []int{0, activeRows, rowsPerVCPU} {
			run(fmt.Sprintf("snapshot/active=%d", rows), func(h *hosted) { h.guests.pass(rows) }, func(b *testing.B, h *hosted) error {
				h.snapshot(b)
				return nil
			})
		}
		run("json", nothing, func(b *testing.B, h *hosted) error {
			b.ReportMetric(float64(len(h.json(b))), "json-B")
			return nil
		})
		// What virtexit(1) does, from its request to its last line.
		run("list", nothing, func(b *testing.B, h *hosted) error {
			domains, err := h.client.Domains(ctx)
			return errors.Join(err, report.List(io.Discard, domains, report.ListOptions{Format: report.Table, Collecting: true}))
		})
		run("report", nothing, func(b *testing.B, h *hosted) error {
			r, err := h.client.Report(ctx, []string{"guest-0000"}, 0)
			return errors.Join(err, report.Report(io.Discard, r, report.Options{Format: report.Table, By: report.ByReason}))
		})
	}
}

// cpuTime is what this process has used: other than time on a clock it does not
// depend on what else the machine is doing.
func cpuTime(tb testing.TB) time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// TestHostMemory holds what a host's size costs in memory, which is exact where
// time is not.
func TestHostMemory(t *testing.T) {
	// What is in use, what the heap grows to until it is collected, and what is
	// allocated at each snapshot.
	type cost struct{ live, heap, bytes, allocs float64 }
	measure := func(vcpus, rows int) (c cost) {
		t.Run(fmt.Sprintf("vcpus=%d/active=%d", vcpus, rows), func(t *testing.T) {
			empty := reachable()
			h := newHosted(t, vcpus)
			const seconds = 4
			var before, after runtime.MemStats
			for second := range 2 * seconds {
				if second == seconds {
					runtime.ReadMemStats(&before)
				}
				h.guests.pass(rows)
				h.snapshot(t)
			}
			runtime.ReadMemStats(&after)
			var answer api.Domains
			if err := json.Unmarshal(h.json(t), &answer); err != nil {
				t.Fatal(err)
			}
			sum := uint64(0)
			for _, d := range answer.Domains {
				sum += d.Count
			}
			if len(answer.Domains) != vcpus/vcpusPerDomain || sum != h.guests.total {
				t.Errorf("%d domains have %d exits, want %d", len(answer.Domains), sum, h.guests.total)
			}
			answer = api.Domains{}
			full := reachable()
			runtime.KeepAlive(h)
			c = cost{
				live:   float64(full.HeapAlloc - empty.HeapAlloc),
				heap:   float64(full.NextGC),
				bytes:  float64(after.TotalAlloc-before.TotalAlloc) / seconds,
				allocs: float64(after.Mallocs-before.Mallocs) / seconds,
			}
			t.Logf("%.1f MiB in use, heap up to %.1f MiB; a snapshot allocates %.1f MiB: %.0f B in %.1f pieces a vCPU",
				c.live/(1<<20), c.heap/(1<<20), c.bytes/(1<<20), c.bytes/float64(vcpus), c.allocs/float64(vcpus))
		})
		return c
	}
	if c := measure(8000, rowsPerVCPU); c.heap > 100<<20 {
		t.Errorf("8,000 vCPUs take %.0f bytes, more than 100 MiB", c.heap)
	}
	few, many := measure(1000, activeRows), measure(10_000, activeRows)
	for what, c := range map[string][2]float64{
		"bytes in use":    {few.live, many.live},
		"bytes allocated": {few.bytes, many.bytes},
		"allocations":     {few.allocs, many.allocs},
	} {
		if c[1] > 10*1.05*c[0] {
			t.Errorf("%s: %.0f for 1,000 vCPUs, but %.0f for 10,000", what, c[0], c[1])
		}
	}
}

// reachable is what the heap holds.
func reachable() (m runtime.MemStats) {
	runtime.GC()
	runtime.GC() // what the first one let go of
	runtime.ReadMemStats(&m)
	return m
}
