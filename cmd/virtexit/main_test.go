// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/internal/server"
)

var update = flag.Bool("update", false, "write the golden files")

// fakeBackend answers from memory.
type fakeBackend struct {
	status  api.Status
	domains []api.Domain
	waits   chan struct{} // if not nil, reports say here that they wait, and do so for ever
	set     atomic.Pointer[api.Collection]

	exits     []api.LoggedExit
	level     *string
	query     api.LogQuery
	followErr error
	pace      time.Duration // of Watch; the interval is what it says
}

func (b *fakeBackend) Status() api.Status   { return b.status }
func (b *fakeBackend) Domains() api.Domains { return api.Domains{Domains: b.domains} }

func (b *fakeBackend) Watch(ctx context.Context, domains []string, interval time.Duration, each func(api.Report) error) error {
	for seq := uint64(1); ; seq++ {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(b.pace):
		}
		r, err := b.Report(ctx, domains, interval)
		if err != nil {
			return err
		}
		r.Seq = seq
		if err := each(r); err != nil {
			return err
		}
	}
}

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

func (b *fakeBackend) DomainLevel(domain string) (api.DomainLevel, error) {
	d, err := api.Find(b.domains, domain)
	switch {
	case err != nil:
		return api.DomainLevel{}, err
	case !d.Running():
		return api.DomainLevel{}, &api.ConflictError{Reason: "domain '" + d.Name + "' is not running"}
	case b.level != nil:
		return api.DomainLevel{Domain: d.Name, Level: b.level}, nil
	}
	return api.DomainLevel{Domain: d.Name, Level: ptr("time"), Default: true}, nil
}

func (b *fakeBackend) SetDomainLevel(domain string, level *string) (api.DomainLevel, error) {
	b.level = level
	return b.DomainLevel(domain)
}

func (b *fakeBackend) Log(domain string, q api.LogQuery) (api.Log, error) {
	b.query = q
	if _, err := b.DomainLevel(domain); err != nil {
		return api.Log{}, err
	}
	return api.Log{Domain: domain, Exits: b.exits, Logged: 1234, Overrun: 722}, nil
}

func (b *fakeBackend) Follow(ctx context.Context, domain string, q api.LogQuery, write func([]api.LogLine) error) error {
	b.query = q
	if _, err := b.DomainLevel(domain); err != nil {
		return err
	}
	lines := []api.LogLine{{Domain: domain}}
	for i := range b.exits {
		lines = append(lines, api.LogLine{LoggedExit: &b.exits[i]})
	}
	lines = append(lines, api.LogLine{Overrun: 5})
	if err := write(lines); err != nil {
		return err
	}
	if b.waits != nil {
		b.waits <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	return b.followErr
}

func ptr[T any](v T) *T { return &v }

func newBackend() *fakeBackend {
	exit := func(code uint32, reason string, count, mean uint64) api.Exit {
		return api.Exit{ISA: "svm", Code: code, Reason: reason, Count: count, Rate: float64(count), Share: float64(count) / 1000,
			TimeNS: count * mean, UserNS: count * mean / 4, MeanNS: &mean, P50NS: ptr(mean / 2), P99NS: ptr(mean * 9), MaxNS: ptr(mean * 99)}
	}
	since := time.Unix(1e9, 0).UTC()
	domain := func(id, tgid int, name string) api.Domain {
		times := api.Times{GuestNS: 9e8, KVMNS: 4e7, UserNS: 1e7, PollNS: 2e6, HaltedNS: 4e7, WaitNS: 8e6}
		return api.Domain{
			ID: &id, Name: name, Run: ptr(fmt.Sprintf("%d-%d", tgid, 6000+id)), UUID: ptr("4dea22b3-1d52-d8f3-2516-782e98ab3fa" + string(rune('0'+id))), TGID: tgid, State: "running", Source: "libvirt", Level: "time",
			Since: &since, WallNS: 1e10, SpanNS: 1e9, Count: 1000, Rate: 1000, Time: times, TimePct: times.Pct(), GuestNS: 9e8, GuestPct: 90,
			VCPUs: []api.VCPU{{ID: 0, TID: tgid + 1, Exits: 1000, Rate: 1000, Time: times, GuestNS: 9e8, GuestPct: 90}},
			Exits: []api.Exit{exit(0x78, "hlt", 600, 5000), exit(0x7b, "io", 300, 20000), exit(0x72, "cpuid", 90, 1500), exit(0x400, "npf", 10, 2500)},
		}
	}
	paused := domain(2, 200, "db 02")
	paused.State, paused.Title = "paused", "The database"
	owned := domain(1, 100, "web01")
	owned.Cloud = &api.Cloud{System: "nova", Name: "web", InstanceUUID: *owned.UUID, Project: "shop", ProjectID: "p1", User: "alice", UserID: "u1", Flavor: "m1.large"}
	past := func(run string, hours int, d api.Domain) api.Domain {
		d.ID, d.TGID, d.State, d.Level, d.Run = nil, 0, "shut off", "off", &run
		d.Since = ptr(since.Add(time.Duration(hours-9) * time.Hour))
		return d
	}
	at := time.Date(2026, 1, 2, 15, 4, 5, 678901234, time.UTC)
	return &fakeBackend{
		exits: []api.LoggedExit{
			{Time: at, VCPU: 0, ISA: "svm", Code: 0x72, Reason: "cpuid", DurationNS: ptr(uint64(1234)), RIP: "0xffffffff81000abc"},
			{Time: at.Add(-time.Microsecond), VCPU: 11, ISA: "svm", Code: 0x78, Reason: "hlt", RIP: "0x0"},
		},
		status: api.Status{Version: "0.1.0", Collection: "on", Level: "time", Collector: ptr("kmod"), CollectorVersion: "0.1.0", Hook: "tracepoint",
			Kernel: "6.1.0", ISA: "svm", Slots: api.Slots{Live: 2, Backed: 64, Max: 4096}, Exits: 2000,
			Libvirt: api.Libvirt{Connected: true, URI: "qemu:///system"}, TotalsSince: since.Add(-time.Hour), ObservedNS: 36e11, Since: since},
		domains: []api.Domain{
			{Name: "archive", UUID: ptr("11111111-2222-3333-4444-555555555555"), State: "shut off", Source: "libvirt"},
			paused, owned,
			past("80-4000", 1, owned), past("90-5000", 2, owned),
			{Name: "twin", UUID: ptr("11111111-2222-3333-4444-666666666666"), State: "shut off"}, {Name: "twin", State: "shut off"},
			{Name: "by hand", State: "shut off", Run: ptr("70-3000"), Since: ptr(since.Add(-time.Minute)), Count: 7},
			{Name: "by hand", State: "shut off", Run: ptr("71-3100"), Since: ptr(since.Add(-time.Second)), Count: 8},
		},
	}
}

func serve(t *testing.T, b *fakeBackend) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sock")
	serveAt(t, b, path)
	return path
}

// serveAt serves until the test or stop ends it.
func serveAt(t *testing.T, b *fakeBackend, path string) (stop func()) {
	t.Helper()
	l, err := server.Listen(path, "", 0o660)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- server.New(b, server.Options{}).Serve(ctx, l) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func TestRun(t *testing.T) {
	off := func(b *fakeBackend) { b.status.Collection, b.status.Level = "off", "off" }
	noModule := func(b *fakeBackend) {
		b.status.Level, b.status.Collector, b.status.Problem = "off", nil, "the kernel module\nis not loaded"
	}
	const (
		noFile = "Completion ended with directive: ShellCompDirectiveNoFileComp\n"
		torn   = "testdata/recorded.ndjson: left out 2 lines that cannot be read as a report; the first is line 5: invalid character 'o' in literal null (expecting 'u')\n"
	)
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
		{name: "list runs", args: "list --runs", golden: "list-runs.txt"},
		{name: "list runs and titles", args: "list --runs --title", golden: "list-runs-title.txt"},
		{name: "list runs csv", args: "list --runs --format csv", golden: "list-runs.csv"},
		{name: "list csv", args: "list --format csv", golden: "list.csv"},
		{name: "list json", args: "list --format=json", golden: "list.json"},
		{name: "list title and owner", args: "list --all --title --owner", golden: "list-owner.txt"},
		{name: "list title and owner csv", args: "list --title --owner --format csv", golden: "list-owner.csv"},
		{name: "list help", args: "list --help", golden: "help-list.txt"},
		{name: "list while off", args: "list", with: off, stderr: offRemark, golden: "list-off.txt"},
		{name: "list at times", args: "list", with: func(b *fakeBackend) { b.status.Duty = &api.Duty{OnNS: 1e9, EveryNS: 1e10} },
			stderr: "collection runs for 1s in every 10s: rates are those of the time observed\n", golden: "list.txt"},
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
		{name: "on for a part of the time", args: "on --duty 1s/10s", golden: "on.txt"},
		{name: "level", args: "level web01", golden: "level.txt"},
		{name: "level json", args: "level web01 --format json", golden: "level.json"},
		{name: "level csv", args: "level web01 count --format csv", golden: "level.csv"},
		{name: "level is set", args: "level web01 recent", golden: "level-set.txt"},
		{name: "level is taken back", args: "level web01 default", with: func(b *fakeBackend) { b.level = ptr("recent") }, golden: "level.txt"},
		{name: "level while off", args: "level web01 recent", with: off, stderr: offRemark, golden: "level-set.txt"},
		{name: "log", args: "log web01", golden: "log.txt"},
		{name: "log without exits", args: "log web01", with: func(b *fakeBackend) { b.exits = nil }, golden: "log-none.txt"},
		{name: "log json", args: "log web01 --format json", golden: "log.json"},
		{name: "log csv", args: "log web01 --format csv", golden: "log.csv"},
		{name: "log followed", args: "log web01 --follow", golden: "log-follow.txt", stderr: "5 exits were overwritten before they were read\n"},
		{name: "log followed json", args: "log web01 -f --format json", golden: "log-follow.json"},
		{name: "log followed csv", args: "log web01 -f --format csv", golden: "log.csv", stderr: "5 exits were overwritten before they were read\n"},
		{name: "log help", args: "log --help", golden: "help-log.txt"},
		{name: "level help", args: "level --help", golden: "help-level.txt"},
		{name: "on help", args: "on --help", golden: "help-on.txt"},
		{name: "completion of a level", args: "__complete level web01 ", golden: "complete-level.txt", stderr: "Completion ended with directive: ShellCompDirectiveNoFileComp\n"},
		{name: "completion of one domain", args: "__complete log web01 ", golden: "complete-none.txt", stderr: "Completion ended with directive: ShellCompDirectiveNoFileComp\n"},
		{name: "watch", args: "watch -b -n 2 --sort name", golden: "watch.txt"},
		{name: "watch one, reversed", args: "watch web01 -b -n 1 --reverse", golden: "watch-one.txt"},
		{name: "watch csv", args: "watch --format csv -n 2 -d 0.5", golden: "watch.csv"},
		{name: "watch json", args: "watch --format json -n 1 -d 2", golden: "watch.json"},
		{name: "watch while off", args: "watch -bn1", with: func(b *fakeBackend) {
			off(b)
			for i := range b.domains {
				b.domains[i].SpanNS = 0
			}
		}, stderr: offRemark, golden: "watch-off.txt"},
		{name: "watch when nothing runs", args: "watch -bn1", with: func(b *fakeBackend) { b.domains = nil }, golden: "watch-none.txt"},
		{name: "watch help", args: "watch --help", golden: "help-watch.txt"},
		{name: "record", args: "record - web01 -n 1", golden: "record.json", stderr: "1 report recorded\n"},
		{name: "record help", args: "record --help", golden: "help-record.txt"},
		{name: "replay", args: "replay testdata/recorded.ndjson", golden: "replay.txt", stderr: torn},
		{name: "replay json", args: "replay testdata/recorded.ndjson web01 --format json", golden: "replay.json", stderr: torn},
		{name: "replay csv", args: "replay testdata/recorded.ndjson --format csv --limit 1", golden: "replay.csv", stderr: torn},
		{name: "replay by vcpu", args: "replay testdata/recorded.ndjson 1 --by vcpu", golden: "replay-vcpu.txt", stderr: torn},
		{name: "replay some", args: "replay testdata/recorded.ndjson web01 --since 2026-01-02T15:04:03Z --until 2026-01-02T16:04:04.5+01:00", golden: "replay-one.txt", stderr: torn},
		{name: "replay each", args: "replay testdata/recorded.ndjson --each --sort idle --since 2026-01-02T15:10:00Z", golden: "replay-each.txt", stderr: torn},
		{name: "replay each csv", args: "replay testdata/recorded.ndjson web01 --each --format csv", golden: "replay-each.csv", stderr: torn},
		{name: "replay help", args: "replay --help", golden: "help-replay.txt"},
		{name: "log since", args: "log web01 --since 2026-01-02T15:04:05.678901Z", golden: "log-since.txt"},
		{name: "completion help", args: "completion --help", golden: "help-completion.txt"},
		{name: "completion of a key", args: "__complete watch --sort ", golden: "complete-sort.txt", stderr: noFile},
		{name: "completion of a reason", args: "__complete log web01 --reason ", golden: "complete-reason.txt", stderr: noFile},
		{name: "completion of any reason", args: "__complete log --reason ", golden: "complete-reason.txt", stderr: noFile},
		{name: "completion of a file", args: "__complete record ", golden: "complete-file.txt", stderr: "Completion ended with directive: ShellCompDirectiveDefault\n"},
		{name: "completion of what is recorded", args: "__complete record f ", golden: "complete.txt", stderr: noFile},
		{name: "completion of a shell", args: "__complete completion ", golden: "complete-shell.txt", stderr: noFile},
		{name: "completion of a number", args: "__complete watch -n ", golden: "complete-none.txt", stderr: noFile},
		{name: "version", args: "--version", golden: "version.txt"},
		{name: "help", args: "--help", golden: "help.txt"},
		{name: "report help", args: "report --help", golden: "help-report.txt"},
		{name: "completion", args: "__complete report ", golden: "complete.txt", stderr: "Completion ended with directive: ShellCompDirectiveNoFileComp\n"},
		{name: "completion goes on", args: "__complete report web01 ", golden: "complete-second.txt", stderr: "Completion ended with directive: ShellCompDirectiveNoFileComp\n"},
		{name: "completion of a flag", args: "__complete list --format ", golden: "complete-format.txt", stderr: "Completion ended with directive: ShellCompDirectiveNoFileComp\n"},

		{name: "unknown domain", args: "report web99", code: 1, stderr: "error: failed to get domain 'web99'\n"},
		{name: "ugly unknown domain", args: "report \x1b[31m\n", code: 1, stderr: `error: failed to get domain '\x1b[31m\n'` + "\n"},
		{name: "ambiguous", args: "report twin", code: 1, stderr: "error: more than one domain is called 'twin': use the id, the uuid or the run\n"},
		{name: "report of the latest run", args: "report --total by_hand", golden: "report-latest.txt"},
		{name: "report of a past run", args: "report --total 80-4000", golden: "report-past.txt"},
		{name: "report of runs csv", args: "report --total 80-4000 90-5000 --format csv", golden: "report-runs.csv"},
		{name: "backend error", args: "off", with: func(b *fakeBackend) { b.status.Kernel = "broken" }, code: 1, stderr: `error: netlink: \x1b[31mno such family` + "\n"},
		{name: "no daemon", args: "--socket /no/sock status", code: 1, stderr: "error: cannot connect to virtexitd at '/no/sock': no such file: is the daemon running?\n"},
		{name: "completion without daemon", args: "__complete --socket /no/sock report ", golden: "complete-none.txt", stderr: "Completion ended with directive: ShellCompDirectiveNoFileComp\n"},

		{name: "level of a domain that is off", args: "level archive recent", code: 1, stderr: "error: domain 'archive' is not running\n"},
		{name: "log of an unknown domain", args: "log web99 -f", code: 1, stderr: "error: failed to get domain 'web99'\n"},
		{name: "log breaks off", args: "log web01 -f --format json", with: func(b *fakeBackend) { b.followErr = errors.New("collector gone") }, code: 1, golden: "log-follow.json", stderr: "error: collector gone\n"},

		{name: "watch of an unknown domain", args: "watch web99 -b", code: 1, stderr: "error: failed to get domain 'web99'\n"},
		{name: "watch without daemon", args: "--socket /no/sock watch -b", code: 1, stderr: "error: cannot connect to virtexitd at '/no/sock': no such file: is the daemon running?\n"},
		{name: "record of an unknown domain", args: "record - web99", code: 1, stderr: "error: failed to get domain 'web99'\n"},
		{name: "replay of no file", args: "replay testdata/nothing", code: 1, stderr: "error: open testdata/nothing: no such file or directory\n"},
		{name: "replay of something else", args: "replay testdata/on.txt", code: 1, stderr: "testdata/on.txt: left out 1 line that cannot be read as a report; the first is line 1: invalid character 'c' looking for beginning of value\n" +
			"error: testdata/on.txt: no report of virtexit is in it\n"},
		{name: "replay of nothing", args: "replay /dev/null", code: 1, stderr: "error: /dev/null: no report of virtexit is in it\n"},
		{name: "replay of a total", args: "replay testdata/total.ndjson", code: 1, stderr: "testdata/total.ndjson: left out 3 lines that cannot be read as a report; the first is line 1: it is a total and not of an interval\n" +
			"error: testdata/total.ndjson: no report of virtexit is in it\n"},
		{name: "replay of an unknown domain", args: "replay testdata/recorded.ndjson web99", code: 1, stderr: torn + "error: failed to get domain 'web99'\n"},
		{name: "replay of another time", args: "replay testdata/recorded.ndjson --since 2026-02-01", code: 1,
			stderr: torn + "error: testdata/recorded.ndjson: no report is of that time; the first ends 2026-01-02 16:04:02, the last 2026-01-02 16:10:12\n"},

		{name: "unknown command", args: "frobnicate", code: 2, stderr: "error: unknown command \"frobnicate\" for \"virtexit\"\nTry 'virtexit --help'.\n"},
		{name: "unknown flag", args: "list --bogus", code: 2, stderr: "error: unknown flag: --bogus\nTry 'virtexit list --help'.\n"},
		{name: "argument too many", args: "status x", code: 2, stderr: "error: unknown command \"x\" for \"virtexit status\"\nTry 'virtexit status --help'.\n"},
		{name: "bad format", args: "list --format xml", code: 2, stderr: "error: invalid argument \"xml\" for \"--format\" flag: must be table, json or csv\nTry 'virtexit list --help'.\n"},
		{name: "bad by", args: "report --by exit", code: 2, stderr: "error: invalid argument \"exit\" for \"--by\" flag: must be reason or vcpu\nTry 'virtexit report --help'.\n"},
		{name: "bad level", args: "on --level off", code: 2, stderr: "error: invalid argument \"off\" for \"--level\" flag: must be count, time or recent\nTry 'virtexit on --help'.\n"},
		{name: "bad duty", args: "on --duty 10s/1s", code: 2, stderr: "error: invalid argument \"10s/1s\" for \"--duty\" flag: duty: 10s of collection does not fit in every 1s\nTry 'virtexit on --help'.\n"},
		{name: "bad level of a domain", args: "level web01 loud", code: 2, stderr: "error: invalid level \"loud\": must be off, count, time, recent or default\nTry 'virtexit level --help'.\n"},
		{name: "level of nothing", args: "level", code: 2, stderr: "error: accepts between 1 and 2 arg(s), received 0\nTry 'virtexit level --help'.\n"},
		{name: "log of two", args: "log a b", code: 2, stderr: "error: accepts 1 arg(s), received 2\nTry 'virtexit log --help'.\n"},
		{name: "log of a negative vcpu", args: "log web01 --vcpu -1", code: 2, stderr: "error: --vcpu -1 is negative\nTry 'virtexit log --help'.\n"},
		{name: "log of no reason", args: "log web01 --reason=", code: 2, stderr: "error: --reason is empty\nTry 'virtexit log --help'.\n"},
		{name: "log of a negative limit", args: "log web01 --limit -1", code: 2, stderr: "error: --limit -1 is negative\nTry 'virtexit log --help'.\n"},
		{name: "bad delay", args: "watch -d soon", code: 2, stderr: "error: invalid argument \"soon\" for \"-d, --delay\" flag: \"soon\" is neither a duration nor a number of seconds\nTry 'virtexit watch --help'.\n"},
		{name: "short delay", args: "watch -d 0.01", code: 2, stderr: "error: invalid argument \"0.01\" for \"-d, --delay\" flag: 0.01 is not between 100ms and 1h0m0s\nTry 'virtexit watch --help'.\n"},
		{name: "endless delay", args: "watch -d inf", code: 2, stderr: "error: invalid argument \"inf\" for \"-d, --delay\" flag: inf is not between 100ms and 1h0m0s\nTry 'virtexit watch --help'.\n"},
		{name: "negative iterations", args: "watch -n -1", code: 2, stderr: "error: --iterations -1 is negative\nTry 'virtexit watch --help'.\n"},
		{name: "bad key", args: "watch --sort size", code: 2, stderr: "error: invalid argument \"size\" for \"-o, --sort\" flag: must be exits, name, id, guest, kvm, user, idle or wait\nTry 'virtexit watch --help'.\n"},
		{name: "record nowhere", args: "record", code: 2, stderr: "error: requires at least 1 arg(s), only received 0\nTry 'virtexit record --help'.\n"},
		{name: "replay nothing", args: "replay", code: 2, stderr: "error: requires at least 1 arg(s), only received 0\nTry 'virtexit replay --help'.\n"},
		{name: "replay each by vcpu", args: "replay f --each --by vcpu", code: 2, stderr: "error: --by and --limit are about the sum and cannot go with --each\nTry 'virtexit replay --help'.\n"},
		{name: "replay sorted sum", args: "replay f --sort name", code: 2, stderr: "error: --sort goes with --each\nTry 'virtexit replay --help'.\n"},
		{name: "replay backwards", args: "replay f --since 2026-01-02 --until 2026-01-01", code: 2, stderr: "error: --until 2026-01-01 is not after --since 2026-01-02\nTry 'virtexit replay --help'.\n"},
		{name: "bad since", args: "replay f --since soon", code: 2, stderr: "error: invalid argument \"soon\" for \"--since\" flag: \"soon\" is no time: write 10m, 15:04, 2006-01-02 15:04:05 or 2006-01-02T15:04:05Z\nTry 'virtexit replay --help'.\n"},
		{name: "log since and follow", args: "log web01 -f --since 1m", code: 2, stderr: "error: --since and --follow exclude each other\nTry 'virtexit log --help'.\n"},
		{name: "bad shell", args: "completion csh", code: 2, stderr: "error: invalid shell \"csh\": must be bash, zsh or fish\nTry 'virtexit completion --help'.\n"},
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
			if strings.HasPrefix(tt.golden, "help") { // a usual path, as lines are broken
				t.Setenv("VIRTEXIT_SOCKET", api.DefaultSocket)
			}
			t.Setenv("COLUMNS", "80")
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
			for line := range strings.Lines(stdout.String()) {
				if strings.HasPrefix(tt.golden, "help") && len(line) > 81 {
					t.Errorf("longer than 80: %s", line)
				}
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
		{"on --duty 1s/10s", api.Collection{Collection: "on", Duty: &api.Duty{OnNS: 1e9, EveryNS: 1e10}}},
		{"on --duty always", api.Collection{Collection: "on", Duty: &api.Duty{OnNS: 1e9, EveryNS: 1e9}}},
		{"off", api.Collection{Collection: "off"}},
	} {
		b := newBackend()
		var stdout, stderr bytes.Buffer
		args := append([]string{"--socket", serve(t, b)}, strings.Split(tt.args, " ")...)
		if code := run(t.Context(), args, &stdout, &stderr); code != 0 {
			t.Errorf("%s: exit code %d, %s", tt.args, code, &stderr)
		}
		if diff := cmp.Diff(&tt.want, b.set.Load()); diff != "" {
			t.Errorf("%s: the daemon got (-want +got)\n%s", tt.args, diff)
		}
	}
}

func TestLogQuery(t *testing.T) {
	for _, tt := range []struct {
		args string
		want api.LogQuery
	}{
		{"log web01", api.LogQuery{}},
		{"log web01 --vcpu 0 --reason hlt --limit 7", api.LogQuery{VCPU: ptr(0), Reason: "hlt", Limit: 7}},
		{"log web01 --follow --vcpu 3", api.LogQuery{VCPU: ptr(3)}},
	} {
		b := newBackend()
		var stdout, stderr bytes.Buffer
		args := append([]string{"--socket", serve(t, b)}, strings.Split(tt.args, " ")...)
		if code := run(t.Context(), args, &stdout, &stderr); code != 0 {
			t.Errorf("%s: exit code %d, %s", tt.args, code, &stderr)
		}
		if diff := cmp.Diff(tt.want, b.query); diff != "" {
			t.Errorf("%s: query (-want +got)\n%s", tt.args, diff)
		}
	}
}

// With a duty cycle a report covers a whole period, if no other time is wished.
func TestReportWithDuty(t *testing.T) {
	for _, tt := range []struct {
		args string
		want time.Duration
	}{
		{"report", 3 * time.Second},
		{"report --interval 200ms", 200 * time.Millisecond},
		{"report --total", 0},
	} {
		b := newBackend()
		b.status.Duty = &api.Duty{OnNS: 1e9, EveryNS: 3e9}
		var stdout, stderr bytes.Buffer
		args := append([]string{"--format", "json", "--socket", serve(t, b)}, strings.Split(tt.args, " ")...)
		if code := run(t.Context(), args, &stdout, &stderr); code != 0 {
			t.Errorf("%s: exit code %d, %s", tt.args, code, &stderr)
		}
		var r api.Report
		if err := json.Unmarshal(stdout.Bytes(), &r); err != nil || time.Duration(r.IntervalNS) != tt.want {
			t.Errorf("%s: interval is %v, want %v (%v)", tt.args, time.Duration(r.IntervalNS), tt.want, err)
		}
	}
}

func TestInterruptFollow(t *testing.T) {
	b := newBackend()
	b.waits = make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(t.Context())
	var stderr bytes.Buffer
	code := run(ctx, []string{"--socket", serve(t, b), "log", "web01", "--follow"}, hook(cancel), &stderr)
	if code != exitInterrupted || strings.Contains(stderr.String(), "error") {
		t.Errorf("exit code %d, stderr %q", code, &stderr)
	}
}

// hook is called with each write.
type hook func()

func (h hook) Write(b []byte) (int, error) { h(); return len(b), nil }

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
	for _, command := range []string{"list", "report", "status", "on", "off", "level web01", "log web01", "log web01 -f", "watch -b", "record -", "replay testdata/recorded.ndjson --each", "completion zsh"} {
		var stderr bytes.Buffer
		if code := run(t.Context(), append([]string{"--socket", path}, strings.Split(command, " ")...), fullDisk{}, &stderr); code != 1 || stderr.String() != "error: no space left\n" {
			t.Errorf("%s: exit code %d, %s", command, code, &stderr)
		}
	}
}
