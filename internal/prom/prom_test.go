// SPDX-License-Identifier: Apache-2.0

package prom

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"golang.org/x/sys/unix"

	"virtexit/api"
	"virtexit/internal/exitreason"
	"virtexit/internal/ledger"
	"virtexit/internal/snapshot"
	"virtexit/test/lab"
	"virtexit/vmmap"
)

var update = flag.Bool("update", false, "write the golden files")

// host is a Source.
type host struct {
	status  api.Status
	view    ledger.View
	domains []counted
	up      time.Duration // since it booted
}

type counted struct {
	vmmap.Domain
	*ledger.Total
}

var booted = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func (h *host) Status() api.Status { return h.status }

func (h *host) StateKept() bool { return true }

func (h *host) Counts() (*ledger.View, iter.Seq2[vmmap.Domain, *ledger.Total]) {
	return &h.view, func(yield func(vmmap.Domain, *ledger.Total) bool) {
		for _, d := range h.domains {
			if !yield(d.Domain, d.Total) {
				return
			}
		}
	}
}

func (h *host) config() Config {
	return Config{Reasons: 2, VCPUs: true, Now: func() time.Time { return booted.Add(h.up) }, BootTime: func() time.Duration { return h.up }}
}

const hz = 2_000_000_000 // ticks per second

func newHost(domains ...counted) *host {
	kmod := "kmod"
	return &host{
		up: time.Hour,
		status: api.Status{
			Version: "0.1.0", Collection: "on", Level: "time", Collector: &kmod, CollectorVersion: "0.1.0", Hook: "patch", Kernel: "6.1.0-56-amd64", ISA: "svm",
			HookCycles: 104, Slots: api.Slots{Live: 3, Retired: 1, Backed: 131, Max: 8192}, Libvirt: api.Libvirt{Connected: true},
		},
		view: ledger.View{
			Time: uint64(time.Hour), TickHz: hz, Counted: uint64(50 * time.Minute),
			Totals: ledger.Totals{Exits: 1010, Attributed: 1000, Unattributed: 7, Missed: 3},
		},
		domains: domains,
	}
}

func row(code uint32, count, ticks uint64, hist ...uint64) ledger.Row {
	return ledger.Row{ISA: exitreason.SVM, Row: snapshot.Row{Code: code, Count: count, Time: ticks, Hist: hist}}
}

// total is that of a process that began counting 10 s after it started.
func total(tgid int, start, seen time.Duration, rows ...ledger.Row) *ledger.Total {
	t := &ledger.Total{Process: snapshot.Process{TGID: tgid, Start: uint64(start) + 12345}, Since: uint64(start + 10*time.Second), Seen: uint64(seen), Rows: rows}
	for _, r := range rows {
		t.Exits += r.Count
	}
	return t
}

func id(n int) *int { return &n }

const (
	cpuid = 0x72
	hlt   = 0x78
	io_   = 0x7b
	msr   = 0x7c
)

// usual is a host with a domain of Nova's, one at level count, one that was
// never counted, and one that has ended.
func usual() *host {
	unknown := row(hlt, 10, 0)
	unknown.ISA = 77
	timed := total(100, 20*time.Minute, time.Hour, row(io_, 500, 4*hz, 0, 100, 300, 0, 100), row(cpuid, 300, hz/100, 300), row(hlt, 20, 20, 20), row(msr, 10, 30, 9))
	timed.Times = snapshot.Times{Guest: 60 * hz, KVM: 3 * hz, User: hz, Poll: hz / 2, Halted: 30 * hz, Wait: 5 * hz, Outside: hz / 4}
	timed.VCPUs = []ledger.VCPU{{ID: 0, Exits: 800, Times: timed.Times}, {ID: 2, Exits: 30}}
	return newHost(
		counted{vmmap.Domain{
			ID: id(7), Name: "instance-0000001a", UUID: "5f1c2e90-8a47-4d0b-9b6e-3c1d2f4a5b6c", TGID: 100, Start: uint64(20 * time.Minute), State: vmmap.Running, Source: "libvirt",
			Metadata: vmmap.Metadata{Title: "a \"title\"", Cloud: &vmmap.Cloud{System: "nova", Name: "web 01", InstanceUUID: "5f1c2e90-8a47-4d0b-9b6e-3c1d2f4a5b6c",
				Project: "shop", ProjectID: "9e8d", User: "alice", UserID: "2b0d", Flavor: "m1.large"}},
		}, timed},
		counted{vmmap.Domain{Name: "qemu-system-x86-101", TGID: 101, State: vmmap.Running, Source: "process", Container: &vmmap.Container{Pod: "pod-1"}}, total(101, 1, time.Hour, row(cpuid, 160, 0))},
		counted{vmmap.Domain{ID: id(9), Name: "quiet", UUID: "aaaaaaaa-0000-4000-8000-000000000009", TGID: 102, State: vmmap.Paused, Source: "libvirt"}, nil},
		counted{vmmap.Domain{Name: "gone", UUID: "aaaaaaaa-0000-4000-8000-00000000000a", State: vmmap.ShutOff, Source: "libvirt"}, total(103, 1, 56*time.Minute, unknown)},
	)
}

// gather collects as a scrape does.
func gather(t testing.TB, c *Collector) []*dto.MetricFamily {
	t.Helper()
	r := prometheus.NewRegistry()
	r.MustRegister(c)
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	return families
}

func text(t testing.TB, families []*dto.MetricFamily) string {
	t.Helper()
	var b bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

func TestMetrics(t *testing.T) {
	h := usual()
	got := text(t, gather(t, New(h, h.config())))
	const golden = "testdata/metrics.txt"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got)\n%s", golden, diff)
	}
}

// What promtool has to say about all that is exported.
func TestLint(t *testing.T) {
	lab.Require(t, "promtool")
	h := usual()
	server := httptest.NewServer(Handler(New(h, h.config()), slog.New(slog.DiscardHandler)))
	defer server.Close()
	response, err := http.Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	check := exec.Command("promtool", "check", "metrics")
	check.Stdin = response.Body
	if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// Counters begin when the domain's counts do, for those who ask for it.
func TestCreated(t *testing.T) {
	h := usual()
	want := booted.Add(20*time.Minute + 10*time.Second)
	for _, f := range gather(t, New(h, h.config())) {
		for _, m := range f.Metric {
			if label(m, "uuid") != h.domains[0].UUID {
				continue
			}
			switch f.GetName() {
			case "virtexit_exits_total", "virtexit_exit_seconds_total", "virtexit_vcpu_seconds_total", "virtexit_vcpu_exits_total":
				if got := m.Counter.CreatedTimestamp.AsTime(); !got.Equal(want) {
					t.Errorf("%s was created at %v, want %v", f.GetName(), got, want)
				}
			case "virtexit_exit_duration_seconds":
				if got := m.Histogram.CreatedTimestamp.AsTime(); !got.Equal(want) {
					t.Errorf("%s was created at %v, want %v", f.GetName(), got, want)
				}
			}
		}
	}
}

// label is a label's value.
func label(m *dto.Metric, name string) string {
	for _, l := range m.Label {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}

// shown are the labels domain and uuid that a scrape has, and the exits of each.
func shown(t *testing.T, c *Collector) map[string]float64 {
	t.Helper()
	got := map[string]float64{}
	for _, f := range gather(t, c) {
		for _, m := range f.Metric {
			name := strings.TrimSuffix(label(m, "domain")+" "+label(m, "uuid"), " ")
			switch f.GetName() {
			case "virtexit_domain_info":
				got[name] += 0
			case "virtexit_exits_total":
				got[name] += m.Counter.GetValue()
			}
		}
	}
	return got
}

func TestShown(t *testing.T) {
	const uuid = "u"
	run := func(tgid int, start time.Duration, name, uuid string, libvirt *int, exits uint64) counted {
		return counted{vmmap.Domain{ID: libvirt, Name: name, UUID: uuid, TGID: tgid, Start: uint64(start)}, total(tgid, start, time.Hour, row(hlt, exits, 0))}
	}
	past := func(c counted, seen time.Duration) counted {
		c.Domain.TGID, c.Domain.Start, c.Domain.ID = 0, 0, nil
		u := *c.Total
		u.Seen = uint64(seen)
		return counted{c.Domain, &u}
	}
	a, b, c := run(1, 1*time.Minute, "x", "", nil, 10), run(2, 2*time.Minute, "x", "", nil, 20), run(3, 3*time.Minute, "x", "", nil, 30)
	la, lb := run(1, 1*time.Minute, "x", uuid, nil, 10), run(2, 2*time.Minute, "x", uuid, id(2), 20)
	early := lb
	early.ID = nil // libvirt has not been heard yet
	type scrape struct {
		domains []counted
		want    map[string]float64
	}
	for _, tc := range []struct {
		name    string
		scrapes []scrape
	}{
		{"started anew", []scrape{
			{[]counted{a}, map[string]float64{"x": 10}},
			{[]counted{past(a, time.Hour), b}, map[string]float64{"x": 20}},
			{[]counted{past(b, time.Hour), past(a, time.Hour)}, map[string]float64{"x": 20}},
		}},
		{"ended between two scrapes, twice", []scrape{
			{[]counted{past(a, time.Hour), past(b, time.Hour)}, map[string]float64{"x": 20}},
		}},
		{"two of one name", []scrape{
			{[]counted{b, a}, map[string]float64{"x": 10, "x-2": 20}},
			{[]counted{b, past(a, time.Hour)}, map[string]float64{"x": 10, "x-2": 20}},
			{[]counted{b}, map[string]float64{"x-2": 20}},
			{[]counted{c, b}, map[string]float64{"x": 30, "x-2": 20}},
			{[]counted{c, past(b, time.Hour)}, map[string]float64{"x": 30, "x-2": 20}},
		}},
		{"the one that was shown first", []scrape{
			{[]counted{b}, map[string]float64{"x": 20}},
			{[]counted{a, b}, map[string]float64{"x": 20, "x-1": 10}},
		}},
		{"libvirt's and one that says to be it", []scrape{
			{[]counted{la}, map[string]float64{"x u": 10}},
			{[]counted{la, early}, map[string]float64{"x u": 10, "x-2 u": 20}},
			{[]counted{la, lb}, map[string]float64{"x-1 u": 10, "x u": 20}},
			{[]counted{la, past(lb, time.Hour)}, map[string]float64{"x-1 u": 10, "x u": 20}},
		}},
		{"called as another is told apart", []scrape{
			{[]counted{a, b, run(9, time.Second, "x-2", "", nil, 90)}, map[string]float64{"x": 10, "x-2": 90, "x-2-2": 20}},
		}},
		{"same name, other uuid", []scrape{
			{[]counted{a, lb}, map[string]float64{"x": 10, "x u": 20}},
		}},
		{"renamed", []scrape{
			{[]counted{run(1, 1, "qemu-1", "", nil, 10), a}, map[string]float64{"qemu-1": 10, "x": 10}},
			{[]counted{run(1, 1, "x", uuid, id(1), 11), a}, map[string]float64{"x u": 11, "x": 10}},
		}},
		{"not text", []scrape{
			{[]counted{run(1, 1, "a\xff", "", nil, 1), run(2, 2, "a\xfe", "", nil, 2)}, map[string]float64{"a\ufffd": 1, "a\ufffd-2": 2}},
		}},
		{"never counted", []scrape{
			{[]counted{{vmmap.Domain{Name: "x", TGID: 1}, nil}, {vmmap.Domain{Name: "defined"}, nil}}, map[string]float64{"x": 0}},
		}},
		{"ended a while ago", []scrape{
			{[]counted{past(a, 55*time.Minute), past(lb, 55*time.Minute-1)}, map[string]float64{"x": 10}},
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHost()
			c := New(h, h.config())
			for i, s := range tc.scrapes {
				h.domains = s.domains
				if diff := cmp.Diff(s.want, shown(t, c)); diff != "" {
					t.Errorf("scrape %d (-want +got)\n%s", i, diff)
				}
				slices.Reverse(h.domains) // the order does not matter
				if diff := cmp.Diff(s.want, shown(t, c)); diff != "" {
					t.Errorf("scrape %d again (-want +got)\n%s", i, diff)
				}
			}
		})
	}
}

// What ended before the host booted is not shown: the clock has changed its pace,
// and so the times of these would.
func TestBooted(t *testing.T) {
	h := newHost(counted{vmmap.Domain{Name: "x"}, total(1, -10*time.Minute, -time.Minute, row(hlt, 1, 0))})
	h.up = time.Minute
	if got := shown(t, New(h, h.config())); len(got) > 0 {
		t.Errorf("shown: %v", got)
	}
}

// life is a random host: domains of few names come, count for ever more reasons,
// and go.
type life struct {
	*rand.Rand
	*host
	next int
}

func (l *life) step() {
	l.up += time.Duration(l.IntN(60)) * time.Second
	for range l.IntN(3) {
		l.next++
		d := vmmap.Domain{Name: fmt.Sprint("x", l.IntN(3)), TGID: l.next, Start: uint64(l.up), State: vmmap.Running}
		if l.IntN(2) == 0 {
			d.UUID = "u"
		}
		l.domains = append(l.domains, counted{d, nil})
	}
	for i := range l.domains {
		d := &l.domains[i]
		if d.Domain.TGID == 0 {
			continue
		}
		if l.IntN(4) > 0 {
			d.Total = l.count(d)
		}
		if l.IntN(10) == 0 {
			d.Domain.TGID, d.Domain.Start = 0, 0
		}
	}
	l.Shuffle(len(l.domains), func(i, j int) { l.domains[i], l.domains[j] = l.domains[j], l.domains[i] })
}

// count adds exits to some reasons, new ones too.
func (l *life) count(d *counted) *ledger.Total {
	t := &ledger.Total{Process: snapshot.Process{TGID: d.Domain.TGID, Start: d.Domain.Start + 4321}, Since: uint64(l.up)}
	if d.Total != nil {
		*t = *d.Total
	}
	t.Seen = uint64(l.up)
	t.Rows = slices.Clone(t.Rows)
	for range l.IntN(4) {
		code := l.IntN(9)
		i := slices.IndexFunc(t.Rows, func(r ledger.Row) bool { return r.Code == uint32(code) })
		if i < 0 {
			i = len(t.Rows)
			t.Rows = append(t.Rows, row(uint32(code), 0, 0))
			t.Rows[i].Other = code == 8
		}
		r := &t.Rows[i]
		n, bucket := l.Uint64N(1000), l.IntN(snapshot.NumHist)
		r.Count += n
		r.Time += n << (bucket + snapshot.HistShift)
		hist := make(snapshot.Hist, max(len(r.Hist), bucket+1))
		copy(hist, r.Hist)
		hist[bucket] += n
		r.Hist = hist
		t.Exits += n
		t.Times.Guest += l.Uint64N(hz)
	}
	return t
}

// No counter goes back but where a domain has started anew, no exit is counted
// twice, and what each process has counted is shown while it runs.
func TestMonotone(t *testing.T) {
	for seed := range uint64(20) {
		l := &life{Rand: rand.New(rand.NewPCG(seed, 5)), host: newHost()}
		c := New(l, l.config())
		before := map[string]float64{}
		for step := range 60 {
			l.step()
			if l.IntN(20) == 0 && !slices.ContainsFunc(slices.Collect(maps.Values(c.runs)), func(r run) bool { return r.label != r.name }) {
				c = New(l, l.config()) // the daemon was started again
			}
			now, sum := map[string]float64{}, map[string]float64{}
			for _, f := range gather(t, c) {
				for _, m := range f.Metric {
					name := fmt.Sprint(f.GetName(), m.Label)
					switch {
					case m.Counter != nil && m.Counter.CreatedTimestamp != nil:
						now[name+m.Counter.CreatedTimestamp.String()] = m.Counter.GetValue()
					case m.Histogram != nil:
						name += m.Histogram.CreatedTimestamp.String()
						last := 0.0
						for _, b := range m.Histogram.Bucket {
							n := float64(b.GetCumulativeCount())
							now[fmt.Sprint(name, b.GetUpperBound())] = n
							if n < last {
								t.Fatalf("seed %d, step %d: %s falls", seed, step, name)
							}
							last = n
						}
						if n := float64(m.Histogram.GetSampleCount()); n < last {
							t.Fatalf("seed %d, step %d: %s has %v, and %v in its buckets", seed, step, name, n, last)
						}
					}
					if f.GetName() == "virtexit_exits_total" {
						sum[m.Counter.CreatedTimestamp.AsTime().String()] += m.Counter.GetValue()
					}
				}
			}
			for name, value := range now {
				if value < before[name] {
					t.Fatalf("seed %d, step %d: %s was %v and is %v", seed, step, name, before[name], value)
				}
			}
			var got, want float64
			for _, n := range sum {
				got += n
			}
			for _, r := range c.runs {
				for _, d := range l.domains {
					if d.Total != nil && r.name == d.Name && r.uuid == d.UUID && c.runs[d.Total.Process.InProc()] == r {
						want += float64(d.Exits)
					}
				}
			}
			if got != want {
				t.Fatalf("seed %d, step %d: %v exits, want %v", seed, step, got, want)
			}
			for _, d := range l.domains {
				if _, ok := c.runs[snapshot.Process{TGID: d.Domain.TGID, Start: d.Start}]; !ok && d.Domain.TGID != 0 {
					t.Fatalf("seed %d, step %d: %s-%d is not shown", seed, step, d.Name, d.Domain.TGID)
				}
			}
			before = now
		}
	}
}

// At the end, which of the reasons had a series of their own: those that came first.
func TestReasons(t *testing.T) {
	h := newHost(counted{vmmap.Domain{Name: "x", TGID: 1}, nil})
	c := New(h, h.config())
	rest := row(1, 7, 0)
	rest.Other = true
	for _, tc := range []struct {
		rows []ledger.Row
		want map[string]float64
	}{
		{[]ledger.Row{row(io_, 1, 0)}, map[string]float64{"io": 1}},
		{[]ledger.Row{row(io_, 1, 0), rest, row(msr, 1, 0)}, map[string]float64{"io": 1, "msr": 1, "other": 7}},
		{[]ledger.Row{row(io_, 1, 0), rest, row(msr, 1, 0), row(hlt, 1000, 0)}, map[string]float64{"io": 1, "msr": 1, "other": 1007}},
	} {
		h.domains[0].Total = total(1, 0, time.Hour, tc.rows...)
		got := map[string]float64{}
		for _, f := range gather(t, c) {
			for _, m := range f.Metric {
				if f.GetName() == "virtexit_exits_total" {
					got[label(m, "reason")] = m.Counter.GetValue()
				}
			}
		}
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
	}
}

// large is a host of domains with 8 vCPUs and 12 reasons each.
func large(domains int) *host {
	h := newHost()
	for i := range domains {
		var rows []ledger.Row
		for code := range 12 {
			rows = append(rows, row(uint32(0x60+code), 1000, hz, slices.Repeat([]uint64{100}, 20)...))
		}
		total := total(i+1, time.Duration(i)*time.Second, time.Hour, rows...)
		total.Times = snapshot.Times{Guest: 60 * hz, KVM: 3 * hz, Halted: 30 * hz}
		for v := range 8 {
			total.VCPUs = append(total.VCPUs, ledger.VCPU{ID: v, Exits: 1500, Times: total.Times})
		}
		h.domains = append(h.domains, counted{vmmap.Domain{
			ID: id(i), Name: fmt.Sprintf("instance-%08x", i), UUID: fmt.Sprintf("aaaaaaaa-0000-4000-8000-%012x", i), TGID: i + 1, State: vmmap.Running, Source: "libvirt",
			Metadata: vmmap.Metadata{Cloud: &vmmap.Cloud{System: "nova", Name: fmt.Sprint("web ", i), Project: "shop", ProjectID: "9e8d7c6b5a4f43218765fedcba098765"}},
		}, total})
	}
	return h
}

func BenchmarkScrape(b *testing.B) {
	for _, bc := range []struct {
		name     string
		vcpus    bool
		encoding string
	}{{"plain", false, "identity"}, {"gzip", false, "gzip"}, {"gzip, each vCPU", true, "gzip"}} {
		b.Run(bc.name, func(b *testing.B) {
			h := large(1000)
			config := h.config()
			config.Reasons, config.VCPUs = 16, bc.vcpus
			handler := Handler(New(h, config), slog.New(slog.DiscardHandler))
			request := httptest.NewRequest("GET", "/metrics", nil)
			request.Header.Set("Accept-Encoding", bc.encoding)
			b.ReportAllocs()
			begun := cpuTime(b)
			for b.Loop() {
				w := &sink{header: http.Header{}}
				handler.ServeHTTP(w, request)
				b.ReportMetric(float64(w.n), "bytes/scrape")
			}
			b.ReportMetric(float64((cpuTime(b)-begun).Milliseconds())/float64(b.N), "cpu-ms/scrape")
		})
	}
}

// cpuTime is the processor time that this process has used.
func cpuTime(t testing.TB) time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		t.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// sink counts what is written to it.
type sink struct {
	header http.Header
	n      int
}

func (s *sink) Header() http.Header { return s.header }
func (s *sink) WriteHeader(int)     {}
func (s *sink) Write(b []byte) (int, error) {
	s.n += len(b)
	return io.Discard.Write(b)
}
