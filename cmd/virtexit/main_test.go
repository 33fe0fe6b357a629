// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/internal/api"
	"virtexit/internal/api/server"
)

var update = flag.Bool("update", false, "write the golden files")

// fakeBackend answers from memory.
type fakeBackend struct {
	status  api.Status
	domains []api.Domain
	waits   chan struct{} // if not nil, reports say here that they wait, and do so for ever
	set     atomic.Pointer[api.Collection]
}

func (b *fakeBackend) Status() api.Status   { return b.status }
func (b *fakeBackend) Domains() api.Domains { return api.Domains{Domains: b.domains} }

func (b *fakeBackend) Report(ctx context.Context, domains []string, interval time.Duration) (api.Report, error) {
	if b.waits != nil {
		b.waits <- struct{}{}
		<-ctx.Done()
		return api.Report{}, ctx.Err()
	}
	r := api.Report{Total: interval == 0, IntervalNS: int64(interval), Time: time.Unix(1e9, 0).UTC()}
	for _, d := range b.domains {
		if len(domains) == 0 && d.Running() {
			r.Domains = append(r.Domains, d)
		}
	}
	for _, name := range domains {
		d, err := api.Find(b.domains, name)
		if err != nil {
			return api.Report{}, err
		}
		r.Domains = append(r.Domains, *d)
	}
	return r, nil
}

func (b *fakeBackend) SetCollection(c api.Collection) (api.Status, error) {
	if b.status.Kernel == "broken" {
		return api.Status{}, errors.New("netlink: \x1b[31mno such family")
	}
	b.set.Store(&c)
	s := b.status
	s.Collection, s.Level = c.Collection, c.Level
	if c.Collection == "off" {
		s.Level = "off"
	} else if c.Level == "" {
		s.Level = "time"
	}
	return s, nil
}

func ptr[T any](v T) *T { return &v }

func newBackend() *fakeBackend {
	exit := func(code uint32, reason string, count, mean uint64) api.Exit {
		return api.Exit{ISA: "svm", Code: code, Reason: reason, Count: count, Rate: float64(count), Share: float64(count) / 1000,
			TimeNS: count * mean, MeanNS: &mean, P50NS: ptr(mean / 2), P99NS: ptr(mean * 9), MaxNS: ptr(mean * 99)}
	}
	since := time.Unix(1e9, 0).UTC()
	domain := func(id, tgid int, name string) api.Domain {
		return api.Domain{
			ID: &id, Name: name, UUID: ptr("4dea22b3-1d52-d8f3-2516-782e98ab3fa" + string(rune('0'+id))), TGID: tgid, State: "running", Source: "libvirt",
			Since: &since, SpanNS: 1e9, Count: 1000, Rate: 1000, GuestNS: 9e8, GuestPct: 90,
			VCPUs: []api.VCPU{{ID: 0, TID: tgid + 1, Exits: 1000, Rate: 1000, TimeNS: 1e8, GuestNS: 9e8, GuestPct: 90}},
			Exits: []api.Exit{exit(0x78, "hlt", 600, 5000), exit(0x7b, "io", 300, 20000), exit(0x72, "cpuid", 90, 1500), exit(0x400, "npf", 10, 2500)},
		}
	}
	paused := domain(2, 200, "db 02")
	paused.State = "paused"
	return &fakeBackend{
		status: api.Status{Version: "0.1.0", Collection: "on", Level: "time", Collector: ptr("kmod"), Module: "0.1.0", Hook: "tracepoint",
			Kernel: "6.1.0", ISA: "svm", Slots: api.Slots{Live: 2, Backed: 64, Max: 4096}, Exits: 2000,
			Libvirt: api.Libvirt{Connected: true, URI: "qemu:///system"}, Since: since},
		domains: []api.Domain{
			{Name: "archive", UUID: ptr("11111111-2222-3333-4444-555555555555"), State: "shut off", Source: "libvirt"},
			paused, domain(1, 100, "web01"),
			{Name: "twin", State: "shut off"}, {Name: "twin", State: "shut off"},
		},
	}
}

func serve(t *testing.T, b *fakeBackend) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sock")
	l, err := server.Listen(path, "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- server.New(b, server.Options{}).Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return path
}

func TestRun(t *testing.T) {
	off := func(b *fakeBackend) { b.status.Collection, b.status.Level = "off", "off" }
	noModule := func(b *fakeBackend) {
		b.status.Level, b.status.Collector, b.status.Problem = "off", nil, "the kernel module\nis not loaded"
	}
	const offRemark = "collection is off: counts stand still until 'virtexit on'\n"
	for _, tt := range []struct {
		name   string
		args   string // "_" stands for a space within an argument
		with   func(*fakeBackend)
		code   int
		stderr string
		golden string // file with stdout; empty: none is expected
	}{
		{name: "list", args: "list", golden: "list.txt"},
		{name: "list all", args: "list --all", golden: "list-all.txt"},
		{name: "list csv", args: "list --format csv", golden: "list.csv"},
		{name: "list json", args: "list --format=json", golden: "list.json"},
		{name: "list while off", args: "list", with: off, stderr: offRemark, golden: "list-off.txt"},
		{name: "list without module", args: "list", with: noModule, stderr: `nothing is collected: the kernel module\nis not loaded` + "\n", golden: "list-off.txt"},
		{name: "report", args: "report", golden: "report.txt"},
		{name: "report of a domain by name", args: "report db_02 --interval 100ms --limit 2", golden: "report-limit.txt"},
		{name: "report by id and uuid", args: "report 2 4dea22b3-1d52-d8f3-2516-782e98ab3fa1 --by vcpu", golden: "report-vcpu.txt"},
		{name: "report by vcpu csv", args: "report web01 --by vcpu --format csv", golden: "report-vcpu.csv"},
		{name: "report total csv", args: "report --total --limit 3 --format csv", golden: "report-total.csv"},
		{name: "report json", args: "report web01 --total --format json", golden: "report.json"},
		{name: "report while off", args: "report web01 --total --limit 1 --format csv", with: off, stderr: offRemark, golden: "report-off.csv"},
		{name: "report when nothing runs", args: "report", with: func(b *fakeBackend) { b.domains = nil }, stderr: "no domain is running\n"},
		{name: "status", args: "status", golden: "status.txt"},
		{name: "status json", args: "status --format json", golden: "status.json"},
		{name: "status csv", args: "status --format csv", golden: "status.csv"},
		{name: "on", args: "on", golden: "on.txt"},
		{name: "on count json", args: "on --level count --format json", golden: "on.json"},
		{name: "on without module", args: "on", with: noModule, stderr: `nothing is collected: the kernel module\nis not loaded` + "\n", golden: "on.txt"},
		{name: "off", args: "off", golden: "off.txt"},
		{name: "version", args: "--version", golden: "version.txt"},
		{name: "help", args: "--help", golden: "help.txt"},
		{name: "report help", args: "report --help", golden: "help-report.txt"},
		{name: "completion", args: "__complete report ", golden: "complete.txt", stderr: "Completion ended with directive: ShellCompDirectiveNoFileComp\n"},
		{name: "completion goes on", args: "__complete report web01 ", golden: "complete-second.txt", stderr: "Completion ended with directive: ShellCompDirectiveNoFileComp\n"},
		{name: "completion of a flag", args: "__complete list --format ", golden: "complete-format.txt", stderr: "Completion ended with directive: ShellCompDirectiveNoFileComp\n"},

		{name: "unknown domain", args: "report web99", code: 1, stderr: "error: failed to get domain 'web99'\n"},
		{name: "ugly unknown domain", args: "report \x1b[31m\n", code: 1, stderr: `error: failed to get domain '\x1b[31m\n'` + "\n"},
		{name: "ambiguous", args: "report twin", code: 1, stderr: "error: more than one domain is called 'twin': use the id or the uuid\n"},
		{name: "backend error", args: "off", with: func(b *fakeBackend) { b.status.Kernel = "broken" }, code: 1, stderr: `error: netlink: \x1b[31mno such family` + "\n"},
		{name: "no daemon", args: "--socket /no/sock status", code: 1, stderr: "error: cannot connect to virtexitd at '/no/sock': no such file: is the daemon running?\n"},
		{name: "completion without daemon", args: "__complete --socket /no/sock report ", golden: "complete-none.txt", stderr: "Completion ended with directive: ShellCompDirectiveNoFileComp\n"},

		{name: "unknown command", args: "frobnicate", code: 2, stderr: "error: unknown command \"frobnicate\" for \"virtexit\"\nTry 'virtexit --help'.\n"},
		{name: "unknown flag", args: "list --bogus", code: 2, stderr: "error: unknown flag: --bogus\nTry 'virtexit list --help'.\n"},
		{name: "argument too many", args: "status x", code: 2, stderr: "error: unknown command \"x\" for \"virtexit status\"\nTry 'virtexit status --help'.\n"},
		{name: "bad format", args: "list --format xml", code: 2, stderr: "error: invalid argument \"xml\" for \"--format\" flag: must be table, json or csv\nTry 'virtexit list --help'.\n"},
		{name: "bad by", args: "report --by exit", code: 2, stderr: "error: invalid argument \"exit\" for \"--by\" flag: must be reason or vcpu\nTry 'virtexit report --help'.\n"},
		{name: "bad level", args: "on --level off", code: 2, stderr: "error: invalid argument \"off\" for \"--level\" flag: must be count or time\nTry 'virtexit on --help'.\n"},
		{name: "bad interval", args: "report --interval soon", code: 2, stderr: "error: invalid argument \"soon\" for \"--interval\" flag: time: invalid duration \"soon\"\nTry 'virtexit report --help'.\n"},
		{name: "short interval", args: "report --interval 1ms", code: 2, stderr: "error: --interval 1ms is not between 100ms and 1h0m0s\nTry 'virtexit report --help'.\n"},
		{name: "interval and total", args: "report --total --interval 1s", code: 2, stderr: "error: --interval and --total exclude each other\nTry 'virtexit report --help'.\n"},
		{name: "bad limit", args: "report --limit many", code: 2, stderr: "error: invalid argument \"many\" for \"--limit\" flag: strconv.ParseInt: parsing \"many\": invalid syntax\nTry 'virtexit report --help'.\n"},
		{name: "negative limit", args: "report --limit -1", code: 2, stderr: "error: --limit -1 is negative\nTry 'virtexit report --help'.\n"},
		{name: "limit of vcpus", args: "report --limit 1 --by vcpu", code: 2, stderr: "error: --limit counts reasons and cannot go with --by vcpu\nTry 'virtexit report --help'.\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBackend()
			if tt.with != nil {
				tt.with(b)
			}
			t.Setenv("VIRTEXIT_SOCKET", serve(t, b))
			args := strings.Split(tt.args, " ")
			for i := range args {
				args[i] = strings.ReplaceAll(args[i], "_", " ")
			}
			if args[0] == "  complete" {
				args[0] = "__complete"
			}
			var stdout, stderr bytes.Buffer
			if code := run(t.Context(), args, &stdout, &stderr); code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			if diff := cmp.Diff(tt.stderr, stderr.String()); diff != "" {
				t.Errorf("stderr (-want +got)\n%s", diff)
			}
			golden(t, tt.golden, strings.ReplaceAll(stdout.String(), os.Getenv("VIRTEXIT_SOCKET"), "SOCKET"))
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	want := ""
	if name != "" {
		path := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
			return
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		want = string(b)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("stdout, %s (-want +got)\n%s", name, diff)
	}
}

func TestSwitch(t *testing.T) {
	for _, tt := range []struct {
		args string
		want api.Collection
	}{
		{"on", api.Collection{Collection: "on"}},
		{"on --level count", api.Collection{Collection: "on", Level: "count"}},
		{"off", api.Collection{Collection: "off"}},
	} {
		b := newBackend()
		var stdout, stderr bytes.Buffer
		args := append([]string{"--socket", serve(t, b)}, strings.Split(tt.args, " ")...)
		if code := run(t.Context(), args, &stdout, &stderr); code != 0 {
			t.Errorf("%s: exit code %d, %s", tt.args, code, &stderr)
		}
		if got := b.set.Load(); got == nil || *got != tt.want {
			t.Errorf("%s: the daemon got %+v, want %+v", tt.args, got, tt.want)
		}
	}
}

func TestInterrupt(t *testing.T) {
	b := newBackend()
	b.waits = make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-b.waits; cancel() }()
	var stdout, stderr bytes.Buffer
	code := run(ctx, []string{"--socket", serve(t, b), "report", "--interval", "1h"}, &stdout, &stderr)
	if code != exitInterrupted || stdout.Len() > 0 || stderr.Len() > 0 {
		t.Errorf("exit code %d, stdout %q, stderr %q", code, &stdout, &stderr)
	}
}

type fullDisk struct{}

func (fullDisk) Write([]byte) (int, error) { return 0, errors.New("no space left") }

func TestWriteError(t *testing.T) {
	path := serve(t, newBackend())
	for _, command := range []string{"list", "report", "status", "on", "off"} {
		var stderr bytes.Buffer
		if code := run(t.Context(), []string{"--socket", path, command}, fullDisk{}, &stderr); code != 1 || stderr.String() != "error: no space left\n" {
			t.Errorf("%s: exit code %d, %s", command, code, &stderr)
		}
	}
}
