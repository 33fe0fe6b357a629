// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
)

var update = flag.Bool("update", false, "write the golden files")

// lineWidth is that of the golden files.
const lineWidth = 80

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got)\n%s", path, diff)
	}
}

func ptr[T any](v T) *T { return &v }

var since = time.Date(2025, 11, 22, 10, 48, 0, 5e8, time.UTC)

// exit makes one that took mean nanoseconds each; 0: it was not timed.
func exit(isa string, code uint32, reason string, count, of, mean uint64) api.Exit {
	e := api.Exit{ISA: isa, Code: code, Reason: reason, Count: count, Rate: float64(count), Share: float64(count) / float64(of)}
	if mean > 0 {
		e.TimeNS, e.UserNS = count*mean, count*mean/3
		e.MeanNS, e.P50NS, e.P99NS, e.MaxNS = &mean, ptr(mean/2), ptr(mean*20), ptr(mean*1000)
	}
	return e
}

func web() api.Domain {
	d := api.Domain{
		ID: ptr(3), Name: "web01", UUID: ptr("4dea22b3-1d52-d8f3-2516-782e98ab3fa0"), Run: ptr("4711-90210"), TGID: 4711, State: "running", Source: "libvirt", Level: "time",
		Since: &since, WallNS: 1000123456, SpanNS: 1000123456, Count: 20000, Rate: 19997.531,
		VCPUs: []api.VCPU{
			vcpu(0, 4715, 12000, api.Times{GuestNS: 880000000, KVMNS: 90345678, UserNS: 20000000, PollNS: 2000000, HaltedNS: 7777778, WaitNS: 9, OutsideNS: 0}),
			vcpu(1, 4716, 8000, api.Times{GuestNS: 860000000, KVMNS: 30345678, UserNS: 86345678, PollNS: 1000, HaltedNS: 23308644, WaitNS: 100456, OutsideNS: 22000}),
		},
		Exits: []api.Exit{
			exit("svm", 0x78, "hlt", 12000, 20000, 104999), exit("svm", 0x7b, "io", 7000, 20000, 12345),
			exit("svm", 0x400, "npf", 950, 20000, 999), exit("svm", 0x72, "cpuid", 49, 20000, 2), exit("svm", 0x41, "write_dr15", 1, 20000, 999600),
		},
	}
	timed(&d)
	return d
}

func vcpu(id, tid int, exits uint64, t api.Times) api.VCPU {
	return api.VCPU{ID: id, TID: tid, Exits: exits, Rate: float64(exits), Time: t, GuestNS: t.GuestNS, GuestPct: t.Pct().Guest}
}

// timed sums up the times of the vCPUs.
func timed(d *api.Domain) {
	d.Time = api.Times{}
	for _, v := range d.VCPUs {
		d.Time.GuestNS += v.Time.GuestNS
		d.Time.KVMNS += v.Time.KVMNS
		d.Time.UserNS += v.Time.UserNS
		d.Time.PollNS += v.Time.PollNS
		d.Time.HaltedNS += v.Time.HaltedNS
		d.Time.WaitNS += v.Time.WaitNS
		d.Time.OutsideNS += v.Time.OutsideNS
	}
	d.TimePct = d.Time.Pct()
	d.GuestNS, d.GuestPct = d.Time.GuestNS, d.TimePct.Guest
}

func intel() api.Domain {
	d := api.Domain{
		ID: ptr(12), Name: "instance-0000001a", UUID: ptr("c7a5fdbd-edaf-9455-926a-d65c16db1809"), TGID: 5000, State: "running", Source: "rundir", Level: "recent",
		Since: &since, WallNS: 937840e9, SpanNS: 93784e9, Count: 18446744073, Rate: 196693.5,
		VCPUs: []api.VCPU{vcpu(0, 5001, 18446744073, api.Times{GuestNS: 11639e9, KVMNS: 60763e9, UserNS: 21382e9})},
		Exits: []api.Exit{
			rated(127954.02, exit("vmx", 1, "EXTERNAL_INTERRUPT", 12000000000, 18446744073, 1500)),
			rated(68739.48, exit("vmx", 30, "IO_INSTRUCTION", 6446744073, 18446744073, 9950)),
		},
	}
	timed(&d)
	return d
}

func rated(rate float64, e api.Exit) api.Exit {
	e.Rate = rate
	return e
}

// idle halts.
func idle() api.Domain {
	d := web()
	d.ID, d.Name, d.Count, d.Rate = ptr(4), "idle", 21, 20.9974
	d.VCPUs = []api.VCPU{vcpu(0, 4801, 21, api.Times{GuestNS: 420000, KVMNS: 80000, PollNS: 4e6, HaltedNS: 995.6e6})}
	d.Exits = []api.Exit{exit("vmx", 12, "HLT", 20, 21, 3500), exit("vmx", 1, "EXTERNAL_INTERRUPT", 1, 21, 9000)}
	timed(&d)
	return d
}

// counted is at level count: nothing is timed.
func counted() api.Domain {
	d := web()
	d.ID, d.Name, d.UUID, d.Level = nil, "qemu-system-x86_64 (4711)", nil, "count"
	d.VCPUs = []api.VCPU{vcpu(0, 4715, 12000, api.Times{}), vcpu(1, 4716, 8000, api.Times{})}
	timed(&d)
	d.Exits = []api.Exit{exit("svm", 0x78, "hlt", 20000, 20000, 0)}
	return d
}

// paused has been counted, and is not during the interval.
func paused() api.Domain {
	return api.Domain{
		ID: ptr(7), Name: "batch", UUID: ptr("11111111-2222-3333-4444-666666666666"), TGID: 6000, State: "running", Source: "libvirt", Level: "off",
		Since: &since, WallNS: 3e9, VCPUs: []api.VCPU{vcpu(0, 6001, 0, api.Times{})}, Exits: []api.Exit{},
	}
}

func off() api.Domain {
	return api.Domain{Name: "archive", UUID: ptr("11111111-2222-3333-4444-555555555555"), State: "shut off", Source: "libvirt", Level: "off", VCPUs: []api.VCPU{}, Exits: []api.Exit{}}
}

func named(names ...string) []api.Domain {
	var domains []api.Domain
	for i, name := range names {
		d := web()
		d.ID, d.Name = ptr(i), name
		domains = append(domains, d)
	}
	return domains
}

var ugly = named("虚拟机一号", "naïve café", "comma, \"quote\" 'n' tick", "line\nbreak\ttab\x1b[31mred", "=1+1", " lead and trail ",
	"\u202egnp.evil", "e\u0301clair", "🦊 fox", "bad\xffutf8", "", strings.Repeat("a-very-long-name-", 10), strings.Repeat("虚", 40))

// uglier adds what looks like an id or a uuid, and what terminals may disagree on.
var uglier = append(ugly, named("12", "c7a5fdbd-edaf-9455-926a-d65c16db1809", "-x", "vm1", "vm10", "שלום עולם", "خادم-1", "👩\u200d💻",
	"e\u0323"+strings.Repeat("\u0301", 30), "\u0301", "ｆｕｌｌ", strings.Repeat("n", 200), strings.Repeat("🦊", 200), "a,,b", "\r\n", `"`, "'", "$(reboot)")...)

// clouds are domains that somebody owns.
func clouds() []api.Domain {
	domains := named("instance-0000001a", "mail-01", "team-a_fedora-vm.1", "by hand", "batch", "=cmd", "rtl")
	for i, cloud := range []*api.Cloud{
		{System: "nova", Name: "web 01, \"blue\" & 绿", InstanceUUID: "4dea22b3-1d52-d8f3-2516-782e98ab3fa0",
			Project: "shop", ProjectID: "9e8d7c6b5a4f43218765fedcba098765", User: "alice", UserID: "2b0d6c8f4e1a4975a3c1d0e9f8b7a695", Flavor: "m1.large"},
		{System: "ovirt", Name: "mail-01", InstanceUUID: "ccd945c8-8069-4f31-8471-bbb58e9dd600"},
		{System: "kubevirt", Namespace: "team-a", Name: "fedora-vm.1", InstanceUUID: "f4686d2c-6e8d-4335-b8fd-81bee22f0000"},
		nil,
		{System: "nova", ProjectID: "9e8d7c6b5a4f43218765fedcba098765", UserID: "2b0d6c8f4e1a4975a3c1d0e9f8b7a695"},
		nil,
		{System: "nova", Name: "שרת", Project: "חנות", User: "דנה"},
	} {
		d := &domains[i]
		d.Cloud, d.VCPUs, d.Exits = cloud, d.VCPUs[:1], d.Exits[:1]
	}
	domains[1].Title = "The mail server of the whole house, and its spam"
	domains[3].Title, domains[3].Description = "Title\n\x1b[31m, \"quoted\"", "two\nlines"
	domains[6].Title = "שרת הדואר"
	return domains
}

func cases() map[string][]api.Domain {
	return map[string][]api.Domain{
		"usual": {web(), intel(), counted(), paused(), off()},
		"ugly":  ugly,
		"short": {web(), idle()},
		"none":  {},
	}
}

var formats = map[Format]string{Table: "txt", CSV: "csv", JSON: "json"}

func TestGolden(t *testing.T) {
	check := func(name string, f Format, print func(w *bytes.Buffer) error) {
		t.Run(name+"."+formats[f], func(t *testing.T) {
			var out bytes.Buffer
			if err := print(&out); err != nil {
				t.Fatal(err)
			}
			golden(t, name+"."+formats[f], out.Bytes())
			switch f {
			case CSV:
				if _, err := csv.NewReader(&out).ReadAll(); err != nil {
					t.Error(err)
				}
			case JSON:
				if !json.Valid(out.Bytes()) {
					t.Error("not valid")
				}
			case Table:
				for line := range strings.Lines(out.String()) {
					line = strings.TrimSuffix(line, "\n")
					if strings.HasPrefix(line, "Domain '") { // names are whole there
						continue
					}
					if n := width(line); n > lineWidth {
						t.Errorf("%d columns: %s", n, line)
					}
					if Clean(line) != line {
						t.Errorf("%q can break a terminal", line)
					}
				}
			}
		})
	}
	for f := range formats {
		for name, domains := range cases() {
			report := api.Report{Schema: api.Schema, Time: since, IntervalNS: 1e9, Domains: domains}
			check("list-"+name, f, func(w *bytes.Buffer) error {
				return List(w, api.Domains{Schema: api.Schema, Domains: domains}, ListOptions{Format: f, Collecting: true, Width: lineWidth})
			})
			check("reasons-"+name, f, func(w *bytes.Buffer) error {
				return Report(w, report, Options{Format: f, By: ByReason, Width: lineWidth})
			})
			check("vcpus-"+name, f, func(w *bytes.Buffer) error {
				return Report(w, report, Options{Format: f, By: ByVCPU, Width: lineWidth})
			})
		}
		check("list-standing-still", f, func(w *bytes.Buffer) error {
			return List(w, api.Domains{Schema: api.Schema, Domains: cases()["usual"]}, ListOptions{Format: f, Width: lineWidth})
		})
		for name, o := range map[string]ListOptions{"title": {Title: true}, "owner": {Owner: true}, "title-owner": {Title: true, Owner: true}} {
			if f == JSON && name != "title-owner" {
				continue // there it is the same
			}
			o.Format, o.Collecting, o.Width = f, true, lineWidth
			check("list-"+name, f, func(w *bytes.Buffer) error {
				return List(w, api.Domains{Schema: api.Schema, Domains: clouds()}, o)
			})
		}
		check("reasons-limit", f, func(w *bytes.Buffer) error {
			return Report(w, api.Report{Schema: api.Schema, Total: true, Time: since, Domains: []api.Domain{web(), intel()}}, Options{Format: f, By: ByReason, Limit: 2, Width: lineWidth})
		})
		good := api.Status{
			Schema: api.Schema, Version: "0.1.0", Collection: "on", Level: "time", Collector: ptr("kmod"), CollectorVersion: "0.1.0", Hook: "tracepoint",
			Kernel: "6.1.0-56-amd64", ISA: "svm", Slots: api.Slots{Live: 4, Retired: 1, Backed: 64, Max: 4096}, Exits: 1<<64 - 1, Unattributed: 3, Missed: 2,
			TotalsSince: since.Add(-time.Hour), ObservedNS: 3.5e12, Libvirt: api.Libvirt{Connected: true, URI: "qemu:///system"}, Since: since,
			HookCycles: 234, Duty: &api.Duty{OnNS: 5e8, EveryNS: 1e10}, CPU: api.CPU{TotalPct: 0.512, LatestPct: 1.25},
		}
		bad := api.Status{
			Schema: api.Schema, Version: "0.1.0", Collection: "on", Level: "off", Problem: "kmod: the module virtexit is not loaded", Hook: "none",
			Tried:  []api.Tried{{Collector: "kmod", Refused: "the module virtexit is not loaded", Gain: "less cost"}},
			Kernel: "6.1.0-56-amd64", ISA: "none", Libvirt: api.Libvirt{URI: "qemu:///system", Error: "no route,\nto \"host\""}, TotalsSince: since, Since: since,
		}
		second := good
		second.Collector, second.Tried = ptr("ebpf"), []api.Tried{{Collector: "kmod", Refused: "virtexit.ko is not loaded: modprobe virtexit", Gain: "less cost"}}
		check("status-second", f, func(w *bytes.Buffer) error { return Status(w, second, f, lineWidth) })
		check("status-good", f, func(w *bytes.Buffer) error { return Status(w, good, f, lineWidth) })
		check("status-bad", f, func(w *bytes.Buffer) error { return Status(w, bad, f, lineWidth) })
	}
}

// A name moves no column, however wide a terminal shows it.
func TestColumns(t *testing.T) {
	var out bytes.Buffer
	if err := List(&out, api.Domains{Domains: uglier}, ListOptions{Format: Table, Collecting: true, Width: lineWidth}); err != nil {
		t.Fatal(err)
	}
	want := -1
	for line := range strings.Lines(out.String()) {
		before, _, ok := strings.Cut(line, "running")
		if !ok {
			continue
		}
		if want < 0 {
			want = width(before)
		}
		if got := width(before); got != want {
			t.Errorf("the state is in column %d, want %d: %s", got, want, line)
		}
	}
	if want < 0 {
		t.Error("no rows")
	}
}

// CSV carries names through unchanged, JSON too where they are text.
func TestNames(t *testing.T) {
	var asCSV, asJSON bytes.Buffer
	if err := List(&asCSV, api.Domains{Domains: uglier}, ListOptions{Format: CSV}); err != nil {
		t.Fatal(err)
	}
	// The reader turns CR LF into LF within quotes; it is there in the file.
	rows, err := csv.NewReader(strings.NewReader(strings.ReplaceAll(asCSV.String(), "\r", "\x00"))).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	if err := List(&asJSON, api.Domains{Domains: uglier}, ListOptions{Format: JSON}); err != nil {
		t.Fatal(err)
	}
	var domains api.Domains
	if err := json.Unmarshal(asJSON.Bytes(), &domains); err != nil {
		t.Fatal(err)
	}
	for i, d := range uglier {
		if got := strings.ReplaceAll(rows[i+1][1], "\x00", "\r"); got != d.Name {
			t.Errorf("CSV: name %q, want %q", got, d.Name)
		}
		if got, want := domains.Domains[i].Name, strings.ToValidUTF8(d.Name, "\ufffd"); got != want {
			t.Errorf("JSON: name %q, want %q", got, want)
		}
	}
}

func TestLimitKeepsSums(t *testing.T) {
	for limit := range 7 {
		var out bytes.Buffer
		d := web()
		if err := Report(&out, api.Report{Domains: []api.Domain{d}}, Options{Format: CSV, By: ByReason, Limit: limit}); err != nil {
			t.Fatal(err)
		}
		rows, err := csv.NewReader(&out).ReadAll()
		if err != nil {
			t.Fatal(err)
		}
		want := 1 + len(d.Exits)
		if limit > 0 && limit < len(d.Exits) {
			want = 1 + limit + 1
		}
		if len(rows) != want {
			t.Errorf("limit %d: %d rows, want %d", limit, len(rows), want)
		}
		var sum uint64
		for _, row := range rows[1:] {
			n, err := strconv.ParseUint(row[9], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			sum += n
		}
		if sum != d.Count {
			t.Errorf("limit %d: counts add up to %d, want %d", limit, sum, d.Count)
		}
		if diff := cmp.Diff(web(), d); diff != "" {
			t.Errorf("limit %d changed its input\n%s", limit, diff)
		}
	}
}

func TestDuration(t *testing.T) {
	for _, tt := range []struct {
		ns   uint64
		want string
	}{
		{0, "0ns"}, {1, "1ns"}, {999, "999ns"}, {1000, "1.00us"}, {9994, "9.99us"}, {9995, "10.0us"}, {99949, "99.9us"}, {99950, "100us"},
		{999499, "999us"}, {999500, "1.00ms"}, {12345678, "12.3ms"}, {999499999, "999ms"}, {999500000, "1.00s"}, {59e9, "59.0s"},
		{123456789e3, "123s"}, {99999e9, "99999s"}, {100000e9, "28h"}, {9999 * 3600e9, "9999h"}, {10000 * 3600e9, "417d"}, {1<<64 - 1, "213504d"},
	} {
		if got := duration(tt.ns); got != tt.want {
			t.Errorf("duration(%d) = %s, want %s", tt.ns, got, tt.want)
		}
	}
}

// What does not fit is left out by plan: first the end of texts, then whole
// columns, and numbers never.
func TestFit(t *testing.T) {
	text := func(n int) string { return strings.Repeat("t", n) }
	for _, tt := range []struct {
		name             string
		id, title, top   string
		header, wantLine string
	}{
		{"all fits", "1", "web", "60% hlt, 30% io", "Id Name Number Top", "1 web 123456 60% hlt, 30% io"},
		{"an item less", "1", text(55), "60% hlt, 30% io", "Id Name Number Top", "1 " + text(55) + " 123456 60% hlt"},
		{"the name cut", "1", text(60), "60% hlt", "Id Name Number Top", "1 " + text(57) + "… 123456 60% hlt"},
		{"a column less", text(56), text(30), "60% hlt", "Id Name Number", text(56) + " " + text(12) + "… 123456"},
		{"too much", text(80), text(30), "60% hlt", "Id Name Number", text(80) + " " + text(5) + "… 123456"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table := &table{columns: []column{{title: "Id"}, {title: "Name", least: 10}, {title: "Number", right: true},
				{title: "Top", least: 7, list: true, spare: 1}}}
			table.add(tt.id, tt.title, "123456", tt.top)
			var out bytes.Buffer
			if err := table.write(&out, lineWidth); err != nil {
				t.Fatal(err)
			}
			lines := strings.Split(out.String(), "\n")
			for i, want := range map[int]string{0: tt.header, 2: tt.wantLine} {
				if got := strings.Join(strings.Fields(lines[i]), " "); got != want {
					t.Errorf("line %d is %q, want %q", i, got, want)
				}
			}
		})
	}
}

type fullDisk struct{}

func (fullDisk) Write([]byte) (int, error) { return 0, errors.New("no space left") }

func TestWriteError(t *testing.T) {
	for f := range formats {
		if err := List(fullDisk{}, api.Domains{Domains: ugly}, ListOptions{Format: f, Collecting: true}); err == nil {
			t.Errorf("list %s: no error", f)
		}
		if err := Report(fullDisk{}, api.Report{Domains: ugly}, Options{Format: f, By: ByReason}); err == nil {
			t.Errorf("report %s: no error", f)
		}
		if err := Status(fullDisk{}, api.Status{}, f, 0); err == nil {
			t.Errorf("status %s: no error", f)
		}
	}
}

func FuzzClean(f *testing.F) {
	f.Add("a\x00\x1b[31m\u202e\xff\n虚")
	f.Fuzz(func(t *testing.T, s string) {
		got := Clean(s)
		if Clean(got) != got || strings.ContainsAny(got, "\n\r\t\x1b\x00\u0085\u2028") {
			t.Errorf("Clean(%q) = %q", s, got)
		}
	})
}
