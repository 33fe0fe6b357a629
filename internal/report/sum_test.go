// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
)

// The sum of parts is what the whole would have been, but for the percentiles.
func TestSum(t *testing.T) {
	domain := func(id int, tid, exits uint64, since time.Time, e ...api.Exit) api.Domain {
		times := api.Times{GuestNS: 6e8, HaltedNS: 4e8}
		return api.Domain{ID: &id, Name: "a", UUID: ptr("u"), TGID: int(tid), State: "running", Level: "time", Since: &since, WallNS: 2e9, SpanNS: 1e9,
			Count: exits, Time: times, VCPUs: []api.VCPU{{ID: 0, TID: int(tid) + 1, Exits: exits, Time: times}}, Exits: e}
	}
	at := func(second int) time.Time { return time.Date(2026, 1, 2, 15, 4, second, 0, time.UTC) }
	ns := func(n uint64) *uint64 { return &n }
	var sum Sum
	sum.Add(api.Report{Time: at(10), IntervalNS: 2e9, Domains: []api.Domain{domain(1, 100, 10, at(0),
		api.Exit{ISA: "svm", Code: 1, Reason: "hlt", Count: 6, TimeNS: 600, UserNS: 60, MeanNS: ns(100), P50NS: ns(90), P99NS: ns(190), MaxNS: ns(300)},
		api.Exit{ISA: "svm", Code: 2, Reason: "io", Count: 4, TimeNS: 800, UserNS: 400, MeanNS: ns(200), P50NS: ns(180), P99NS: ns(280), MaxNS: ns(900)})}})
	// Started anew, and for a while at level count.
	sum.Add(api.Report{Time: at(20), IntervalNS: 2e9, Domains: []api.Domain{domain(2, 200, 30, at(15),
		api.Exit{ISA: "svm", Code: 1, Reason: "hlt", Count: 20, TimeNS: 3000, UserNS: 0, MeanNS: ns(300), P50NS: ns(90), P99NS: ns(190), MaxNS: ns(200)},
		api.Exit{ISA: "svm", Code: 3, Reason: "npf", Count: 10})}})
	if sum.Reports != 2 || !sum.Begin.Equal(at(8)) || !sum.End.Equal(at(20)) {
		t.Errorf("%d reports from %v to %v", sum.Reports, sum.Begin, sum.End)
	}
	id, since, times := 2, at(0), api.Times{GuestNS: 12e8, HaltedNS: 8e8}
	want := api.Report{Schema: api.Schema, Time: at(20), IntervalNS: 4e9, Domains: []api.Domain{{
		ID: &id, Name: "a", UUID: ptr("u"), TGID: 200, State: "running", Level: "time", Since: &since, WallNS: 4e9, SpanNS: 2e9,
		Count: 40, Rate: 20, RateNS: 2e9, Time: times, TimePct: times.Pct(), GuestNS: 12e8, GuestPct: 60,
		VCPUs: []api.VCPU{{ID: 0, TID: 201, Exits: 40, Rate: 20, Time: times, GuestNS: 12e8, GuestPct: 60}},
		Exits: []api.Exit{
			// 6 and 10 of them were timed.
			{ISA: "svm", Code: 1, Reason: "hlt", Count: 26, Rate: 13, Share: .65, TimeNS: 3600, UserNS: 60, MeanNS: ns(225), MaxNS: ns(300)},
			{ISA: "svm", Code: 3, Reason: "npf", Count: 10, Rate: 5, Share: .25},
			{ISA: "svm", Code: 2, Reason: "io", Count: 4, Rate: 2, Share: .1, TimeNS: 800, UserNS: 400, MeanNS: ns(200), P50NS: ns(180), P99NS: ns(280), MaxNS: ns(900)},
		},
	}}}
	if diff := cmp.Diff(want, sum.Report()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if diff := cmp.Diff(sum.Report(), sum.Report()); diff != "" {
		t.Errorf("asked twice\n%s", diff)
	}
}

// What is said of a domain that does nothing, much, or is no more.
func TestReads(t *testing.T) {
	silent := idle()
	silent.Count, silent.Rate, silent.Exits = 0, 0, nil
	dead := func(d api.Domain) api.Domain {
		d.ID, d.TGID, d.State = nil, 0, "shut off"
		return d
	}
	gone := dead(api.Domain{Name: "gone", UUID: ptr("u"), Since: &since, WallNS: 1e9, Exits: []api.Exit{}})
	suspended := idle()
	suspended.State = "paused"
	fresh := running(9, "fresh")
	for name, r := range map[string]api.Report{
		"idle":       {IntervalNS: 1e9, Domains: []api.Domain{idle(), silent, suspended, fresh}},
		"busy":       {IntervalNS: 1e9, Domains: []api.Domain{web(), intel()}},
		"dead":       {IntervalNS: 1e9, Domains: []api.Domain{gone, dead(web()), off()}},
		"dead-total": {Total: true, Domains: []api.Domain{dead(intel()), off()}},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			if err := Report(&out, r, Options{Format: Table, By: ByReason, Width: lineWidth}); err != nil {
				t.Fatal(err)
			}
			golden(t, "reads-"+name+".txt", out.Bytes())
		})
	}
}

func running(id int, name string) api.Domain {
	return api.Domain{ID: &id, Name: name, TGID: 1000 + id, State: "running"}
}

// Every table fits a terminal, and is whole where there is none.
func TestTerminals(t *testing.T) {
	long := web()
	long.Name = strings.Repeat("long", 20)
	long.Exits = append(long.Exits, exit("svm", 0x402, "avic_unaccelerated_access", 1<<40, 1<<41, 1<<40))
	domains := append([]api.Domain{long, intel(), counted(), idle()}, clouds()...)
	r := api.Report{Time: since, IntervalNS: 1e9, Domains: domains}
	log := api.Log{Domain: "web01", Exits: []api.LoggedExit{
		{Time: since, VCPU: 1023, Reason: "avic_unaccelerated_access", DurationNS: ptr(uint64(1 << 60)), RIP: "0xffffffffffffffff"}, {Time: since, Reason: "hlt", RIP: "0x0"}}}
	status := api.Status{Problem: "the module virtexit is not loaded, and nothing can be done about it here", Libvirt: api.Libvirt{URI: "qemu:///system"}}
	tables := []struct {
		name  string
		least int // columns
		whole []string
		print func(w *bytes.Buffer, width int) error
	}{
		{"list", 33, []string{long.Name, "EXTERNAL_INTERRUPT"}, func(w *bytes.Buffer, width int) error {
			return List(w, api.Domains{Domains: domains}, ListOptions{Format: Table, Collecting: true, Width: width})
		}},
		{"list with title and owner", 45, []string{long.Name, "and its spam", "(alice)"}, func(w *bytes.Buffer, width int) error {
			return List(w, api.Domains{Domains: domains}, ListOptions{Format: Table, Collecting: true, Title: true, Owner: true, Width: width})
		}},
		{"by reason", 40, []string{"avic_unaccelerated_access"}, func(w *bytes.Buffer, width int) error {
			return Report(w, r, Options{Format: Table, By: ByReason, Width: width})
		}},
		{"by vCPU", 50, []string{"18446744073.0"}, func(w *bytes.Buffer, width int) error {
			return Report(w, r, Options{Format: Table, By: ByVCPU, Width: width})
		}},
		{"watch", 33, []string{long.Name}, func(w *bytes.Buffer, width int) error {
			return Watch(w, r, WatchOptions{Format: Table, Sort: "name", Width: width})
		}},
		{"log", 50, []string{"avic_unaccelerated_access", "0xffffffffffffffff"}, func(w *bytes.Buffer, width int) error {
			return Log(w, log, Table, width)
		}},
		{"status", 40, []string{"nothing can be done about it here\n"}, func(w *bytes.Buffer, width int) error {
			return Status(w, status, Table, width)
		}},
	}
	for _, table := range tables {
		for _, width := range []int{0, 33, 40, 50, 60, 70, 79, 80, 81, 100, 132, 300} {
			if width > 0 && width < table.least {
				continue
			}
			t.Run(fmt.Sprint(table.name, " ", width), func(t *testing.T) {
				var out bytes.Buffer
				if err := table.print(&out, width); err != nil {
					t.Fatal(err)
				}
				for line := range strings.Lines(out.String()) {
					line = strings.TrimSuffix(line, "\n")
					head := strings.HasPrefix(line, "Domain '") || strings.Contains(line, "exits") && !strings.HasPrefix(line, " ") // sentences
					if n := terminal().StringWidth(line); width > 0 && n > width && !head {
						t.Errorf("%d columns: %s", n, line)
					}
				}
				for _, text := range table.whole {
					if width == 0 && !strings.Contains(out.String(), text) {
						t.Errorf("%s is not there:\n%s", text, &out)
					}
				}
			})
		}
	}
}

// In 50 columns what matters is still there.
func TestNarrow(t *testing.T) {
	var out bytes.Buffer
	domains := []api.Domain{web(), intel()}
	if err := List(&out, api.Domains{Domains: domains}, ListOptions{Format: Table, Collecting: true, Width: 50}); err != nil {
		t.Fatal(err)
	}
	if err := Report(&out, api.Report{Domains: domains}, Options{Format: Table, By: ByReason, Width: 50}); err != nil {
		t.Fatal(err)
	}
	if err := Report(&out, api.Report{Domains: domains[:1]}, Options{Format: Table, By: ByVCPU, Width: 50}); err != nil {
		t.Fatal(err)
	}
	golden(t, "narrow.txt", out.Bytes())
}
