// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"bufio"
	"encoding/json"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"virtexit/api"
	"virtexit/test/lab/inside"
)

// followed is a log that is being followed: all that has come.
type followed struct {
	exits, overrun uint64
	last           api.LoggedExit
}

// follow runs "virtexit log --follow". add adds what comes until so many exits are followed or lost, and what else there is.
func follow(t *testing.T, d *virtexitd, name string) (add func(f *followed, until uint64), wait func() error) {
	t.Helper()
	cmd := exec.Command(filepath.Join(bin, "virtexit"), "--socket", d.socket, "log", name, "--follow", "--format", "json")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	lines := make(chan api.LogLine, 1<<16)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			var l api.LogLine
			if err := json.Unmarshal(s.Bytes(), &l); err != nil {
				t.Errorf("%v in %s", err, s.Bytes())
				return
			}
			lines <- l
		}
	}()
	select {
	case first := <-lines:
		if first.Schema != api.Schema || first.Domain != name {
			t.Fatalf("first line: %+v", first)
		}
	case <-time.After(time.Minute):
		t.Fatal("the log does not begin")
	}
	add = func(f *followed, until uint64) {
		for {
			quiet := time.Minute
			if f.exits+f.overrun >= until {
				quiet = 2 * time.Second
			}
			select {
			case l, open := <-lines:
				if !open {
					return
				}
				f.overrun += l.Overrun
				if l.LoggedExit != nil {
					f.exits++
					f.last = *l.LoggedExit
				}
			case <-time.After(quiet):
				return
			}
		}
	}
	return add, cmd.Wait
}

// TestLevelAndLog sets a domain's level and reads its exits one by one.
func TestLevelAndLog(t *testing.T) {
	inside.Load(t, "")
	d := start(t, options{})
	g, other := newGuest(t, 2), newGuest(t, 1)
	name := nameOf(t, g)
	run(t, g, 0, "cpuid:10")
	run(t, other, 0, "cpuid:10")
	if r := d.run("log", name); r.status != 1 || !strings.Contains(r.stderr, "not logged at its level, time: 'virtexit level "+name+" recent'") {
		t.Errorf("%+v", r)
	}
	if out := d.ok("level", name); out != "level of domain '"+name+"' is time, the default\n" {
		t.Errorf("%q", out)
	}
	if out := d.ok("level", name, "recent"); out != "level of domain '"+name+"' is recent\n" {
		t.Errorf("%q", out)
	}
	log := func(args ...string) api.Log {
		t.Helper()
		return decode[api.Log](t, d.ok(append([]string{"log", name, "--format", "json"}, args...)...))
	}
	// Memory comes when a vCPU is first to be logged.
	for vcpu, flag := range []string{"0", "1"} {
		inside.Eventually(t, "exits are logged", 10*time.Second, func() bool {
			run(t, g, vcpu, "cpuid:1")
			return log("--vcpu", flag).Logged > 0
		})
	}

	before := log("--vcpu", "1", "--reason", "cpuid")
	begin := time.Now()
	run(t, g, 1, "cpuid:30")
	end := time.Now()
	after := log("--vcpu", "1", "--reason", "cpuid")
	if n := len(after.Exits) - len(before.Exits); n != 30 || after.Overrun != 0 {
		t.Errorf("%d exits by cpuid are logged, want 30; %d are lost", n, after.Overrun)
	}
	for i, e := range after.Exits[:30] {
		// The wall clock is read once for all.
		if e.VCPU != 1 || e.DurationNS == nil || e.RIP == "0x0" || e.Time.Before(begin.Add(-time.Millisecond)) || e.Time.After(end.Add(time.Millisecond)) ||
			i > 0 && e.Time.After(after.Exits[i-1].Time) {
			t.Errorf("exit %d: %+v", i, e)
		}
	}
	if out := d.ok("log", name, "--limit", "3"); strings.Count(out, "\n") != 3+3 || !strings.Contains(out, " exits logged") {
		t.Errorf("log:\n%s", out)
	}

	d.conserve()

	// Followed, every exit is told or counted as lost.
	var got followed
	add, wait := follow(t, d, name)
	count := func() uint64 { return d.total(name).Count }
	from := count()
	run(t, g, 0, "cpuid:200")
	run(t, g, 1, "cpuid:100")
	want := count() - from
	add(&got, want)
	if got.exits+got.overrun != want {
		t.Errorf("%d exits and %d lost, want %d", got.exits, got.overrun, want)
	}
	run(t, g, 0, "cpuid:20000")
	want = count() - from
	add(&got, want)
	if got.exits+got.overrun != want {
		t.Errorf("%d exits and %d lost, want %d", got.exits, got.overrun, want)
	}
	t.Logf("%d exits followed, %d lost", got.exits, got.overrun)
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	exits := got.exits
	add(&got, want+2)
	// Those that were in progress: the last ones of the two vCPUs, which their threads' death ended.
	if got.exits != exits+2 || got.last.Reason != "io" || got.last.DurationNS == nil {
		t.Errorf("%d exits at the end, the last one %+v", got.exits-exits, got.last)
	}
	if err := wait(); err != nil {
		t.Errorf("the end of a domain is the end of its log: %v", err)
	}
	if r := d.run("level", name, "recent"); r.status != 1 || !strings.Contains(r.stderr, "domain '"+name+"' is not running") {
		t.Errorf("%+v", r)
	}

	d.conserve()

	// The other one was at another level all the time, and is switched off.
	name = nameOf(t, other)
	if x := d.find(name); x.Level != "time" {
		t.Errorf("level is %s", x.Level)
	}
	d.ok("level", name, "off")
	run(t, other, 0, "cpuid:1000")
	d.conserve()
	d.ok("level", name, "default")
	run(t, other, 0, "cpuid:5")
	if n := counts(d.total(name))["cpuid"]; n != 15 {
		t.Errorf("%d CPUID exits, want 15", n)
	}
	d.conserve()
}

// TestDuty collects a third of the time.
func TestDuty(t *testing.T) {
	inside.Load(t, "")
	d := start(t, options{})
	create(t, domain{name: "busy", os: rom(t, "cpuid:10,spin:200000", true)})
	inside.Eventually(t, "busy is counted", 30*time.Second, func() bool { return d.find("busy").Count > 100 })

	if out := d.ok("on", "--duty", "1s/3s"); out != "collection is on, level time\n" {
		t.Errorf("%q", out)
	}
	if out := d.ok("status"); !strings.Contains(out, "1s in every 3s") {
		t.Errorf("status:\n%s", out)
	}
	r := decode[api.Report](t, d.ok("report", "busy", "--format", "json"))
	if r.IntervalNS < 3e9 || r.Domains[0].Count == 0 {
		t.Errorf("report over %d ns: %d exits", r.IntervalNS, r.Domains[0].Count)
	}
	exits, began := kvmExits(t, system, "busy", 0), time.Now()
	x := decode[api.Report](t, d.ok("report", "busy", "--interval", "9s", "--format", "json")).Domains[0]
	// In the interval, and in what it takes to ask for it, while the guest may do little or much.
	exits = kvmExits(t, system, "busy", 0) - exits
	rate := float64(exits) / time.Since(began).Seconds()
	d.conserveStopped()
	observed := float64(x.SpanNS) / float64(x.WallNS)
	// To switch takes a while on this machine, and is observed.
	if observed < 0.25 || observed > 0.6 {
		t.Errorf("observed for %d of %d ns", x.SpanNS, x.WallNS)
	}
	t.Logf("observed for %.2f of the time, %d exits of %d, %.0f a second of %.0f", observed, x.Count, exits, x.Rate, rate)
	if x.Rate < rate/2 || float64(x.Count) > float64(exits)*min(1, observed*2) {
		t.Errorf("%d exits, %v a second, when observed for %.2f of the time; KVM says %d, %v a second", x.Count, x.Rate, observed, exits, rate)
	}
	if want := float64(x.Count) / float64(x.SpanNS) * 1e9; x.Rate < want*0.99 || x.Rate > want*1.01 {
		t.Errorf("%v exits a second, want the %v of the time observed", x.Rate, want)
	}
	d.ok("on", "--duty", "always")
	x = decode[api.Report](t, d.ok("report", "busy", "--format", "json")).Domains[0]
	if x.SpanNS < x.WallNS*9/10 {
		t.Errorf("observed for %d of %d ns", x.SpanNS, x.WallNS)
	}
	if s := d.status(); s.Duty != nil || s.HookCycles <= 0 || s.CPU.TotalPct <= 0 {
		t.Errorf("status: %+v", s)
	}
	virsh(t, "suspend", "busy")
	d.conserve()
}
