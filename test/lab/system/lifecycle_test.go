// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"virtexit/api"
	"virtexit/test/lab/inside"
)

// life is a domain whose firmware executes CPUID boot times and halts for
// ever: what it has counted tells how often it booted.
type life struct {
	t    *testing.T
	d    *virtexitd
	name string
	boot uint64

	cpuid uint64     // what its present, or last, process should have executed
	was   api.Domain // after the latest step
}

// step does something to the domain, and has its counts as they should be.
// goesOn tells whether the process, its counts and their beginning stay, as
// they must where the domain ends.
func (l *life) step(what string, goesOn bool, state string, boots uint64, do func()) {
	l.t.Helper()
	do()
	if !goesOn {
		l.cpuid = 0
	}
	l.cpuid += boots * l.boot
	var got api.Domain
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if got = l.d.find(l.name); got.State == state && counts(got)["cpuid"] == l.cpuid && (got.Since != nil || l.cpuid == 0) && (got.TGID != 0) == (state != "shut off") {
			break
		}
	}
	l.t.Logf("%-28s %-8s id %-3s tgid %-5d cpuid %5d exits %5d", what, got.State, id(got), got.TGID, counts(got)["cpuid"], got.Count)
	if got.State != state || counts(got)["cpuid"] != l.cpuid {
		l.t.Errorf("%s: %+v, want %d CPUID exits and %s", what, got, l.cpuid, state)
	}
	if got.UUID == nil || l.was.UUID != nil && *got.UUID != *l.was.UUID {
		l.t.Errorf("%s: uuid %v", what, got.UUID)
	}
	if (got.ID != nil) != (state != "shut off") || (got.TGID != 0) != (got.ID != nil) {
		l.t.Errorf("%s: %+v", what, got)
	}
	switch {
	case l.was.TGID == 0 || got.TGID == 0:
	case goesOn != (got.TGID == l.was.TGID):
		l.t.Errorf("%s: process %d after %d", what, got.TGID, l.was.TGID)
	}
	if goesOn && l.was.Since != nil && (!got.Since.Equal(*l.was.Since) || got.Count < l.was.Count) {
		l.t.Errorf("%s: %d exits since %v after %d since %v", what, got.Count, got.Since, l.was.Count, l.was.Since)
	}
	if s := l.d.conserve(); s.Unattributed != 0 || s.Missed != 0 {
		l.t.Errorf("%s: %+v", what, s)
	}
	once := 0
	for _, x := range decode[api.Domains](l.t, l.d.ok("list", "--all", "--format", "json")).Domains {
		if x.UUID != nil && *x.UUID == *got.UUID {
			once++
			if x.Name != l.name || x.State != state || x.Count < got.Count {
				l.t.Errorf("%s: listed as %+v, not as %+v", what, x, got)
			}
		}
	}
	if once != 1 {
		l.t.Errorf("%s: listed %d times", what, once)
	}
	l.was = got
}

func id(d api.Domain) string {
	if d.ID == nil {
		return "-"
	}
	return fmt.Sprint(*d.ID)
}

// runs are the domain's processes, present and past, by the exits of each.
func (l *life) runs() (exits []uint64) {
	l.t.Helper()
	for _, x := range decode[api.Domains](l.t, l.d.ok("list", "--runs", "--format", "json")).Domains {
		if x.UUID != nil && *x.UUID == *l.was.UUID {
			if x.Name != l.name {
				l.t.Errorf("a run is called %q, want %q", x.Name, l.name)
			}
			exits = append(exits, counts(x)["cpuid"])
			if x.Run != nil {
				if one := l.d.total(*x.Run); one.Count != x.Count || !one.Since.Equal(*x.Since) || one.TGID != x.TGID {
					l.t.Errorf("run %s: %+v, listed as %+v", *x.Run, one, x)
				}
			}
		}
	}
	slices.Sort(exits)
	return exits
}

// TestLifecycle has a domain go through all that docs/DOMAINS.md promises.
func TestLifecycle(t *testing.T) {
	inside.Load(t, "")
	d := start(t, options{})
	l := &life{t: t, d: d, name: "life", boot: 1000}
	disk := filepath.Join(images, "life.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-f", "qcow2", disk, "1M").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	file := define(t, domain{name: l.name, uuid: "cccccccc-1111-4111-8111-000000000001", vcpus: 2, os: rom(t, "cpuid:1000", false),
		more: "<devices><disk type='file'><driver name='qemu' type='qcow2'/><source file='" + disk + "'/><target dev='hda'/></disk></devices>"})
	t.Cleanup(func() {
		for _, args := range [][]string{{"destroy"}, {"undefine", "--snapshots-metadata", "--managed-save"}} {
			exec.Command("virsh", append([]string{"-c", "qemu:///system", args[0], l.name}, args[1:]...)...).Run()
		}
	})
	do := func(args ...string) func() {
		return func() {
			t.Helper()
			virsh(t, slices.Insert(args, 1, l.name)...)
		}
	}

	virsh(t, "define", file)
	virsh(t, "setvcpus", l.name, "1", "--config")
	const goesOn, anew = true, false
	l.step("define", anew, "shut off", 0, func() {})
	l.step("start", anew, "running", 1, do("start"))
	l.step("reset", goesOn, "running", 1, do("reset"))
	l.step("suspend", goesOn, "paused", 0, do("suspend"))
	l.step("reset while paused", goesOn, "paused", 0, do("reset"))
	l.step("resume", goesOn, "running", 1, do("resume"))
	l.step("title", goesOn, "running", 0, do("desc", "--live", "--title", "Another title"))
	l.step("metadata", goesOn, "running", 0, do("metadata", "--live", "--uri", "http://example.org/x", "--key", "x", "--set", "<x/>"))
	l.step("undefine: now transient", goesOn, "running", 0, do("undefine"))
	l.step("define: persistent again", goesOn, "running", 0, func() { virsh(t, "define", file) })

	l.step("snapshot-create", goesOn, "running", 0, do("snapshot-create-as", "s"))
	l.step("reset", goesOn, "running", 1, do("reset"))
	// libvirt starts a new process that reads the snapshot's memory.
	l.step("snapshot-revert", anew, "running", 0, do("snapshot-revert", "s"))
	l.step("reset", goesOn, "running", 1, do("reset"))

	tids := l.was.VCPUs
	l.step("setvcpus --live", goesOn, "running", 0, do("setvcpus", "2", "--live"))
	inside.Eventually(t, "the new vCPU is known", 10*time.Second, func() bool { l.was = d.find(l.name); return len(l.was.VCPUs) == 2 })
	if now := l.was.VCPUs; len(tids) != 1 || now[0].TID != tids[0].TID || now[0].Exits != tids[0].Exits || now[1].ID != 1 || now[1].Exits != 0 {
		t.Errorf("vCPUs %+v after %+v", now, tids)
	}

	l.step("managedsave", goesOn, "shut off", 0, do("managedsave"))
	l.step("start: restored", anew, "running", 0, do("start"))
	l.step("reset", goesOn, "running", 2, func() {
		do("reset")()
		inside.Eventually(t, "it has booted", 10*time.Second, func() bool { return counts(d.find(l.name))["cpuid"] == l.boot })
		do("reset")()
	})

	l.step("destroy", goesOn, "shut off", 0, do("destroy"))
	before := l.runs()
	l.step("domrename", goesOn, "shut off", 0, func() {
		virsh(t, "snapshot-delete", l.name, "s")
		virsh(t, "domrename", l.name, "new life")
		l.name = "new life"
	})
	if after := l.runs(); !slices.Equal(before, after) || !slices.Contains(after, 4000) {
		t.Errorf("runs %v after %v", after, before)
	}
	if r := d.run("report", "--total", "life"); r.status != 1 {
		t.Errorf("by the old name: %+v", r)
	}
	l.step("start", anew, "running", 1, do("start"))
	t.Logf("all runs, by CPUID exits: %v", l.runs())
	saved := filepath.Join(images, "life.save")
	l.step("save", goesOn, "shut off", 0, do("save", saved))
	l.step("restore", anew, "running", 0, func() { virsh(t, "restore", saved) })
	l.step("reset", goesOn, "running", 1, do("reset"))
	l.step("SIGKILL of QEMU", goesOn, "shut off", 0, func() {
		p, err := os.FindProcess(l.was.TGID)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Kill(); err != nil {
			t.Fatal(err)
		}
	})
	l.step("undefine", goesOn, "shut off", 0, do("undefine"))
}

// TestReboot has a guest that reboots all by itself.
func TestReboot(t *testing.T) {
	inside.Load(t, "")
	d := start(t, options{})
	// CPUID leaves 0xd in AL, which this port takes for a reset.
	create(t, domain{name: "again", os: rom(t, "cpuid:50,out:0xcf9:1", false)})
	inside.Eventually(t, "it runs", 20*time.Second, func() bool { return d.find("again").Count > 0 && d.find("again").ID != nil })
	first := d.find("again")
	inside.Eventually(t, "it has rebooted", 60*time.Second, func() bool { return counts(d.find("again"))["io"] >= 20 })
	// libvirt is busy with its reboots, and may not find the time to suspend it.
	signal(t, first.TGID, syscall.SIGSTOP)
	defer signal(t, first.TGID, syscall.SIGCONT)
	inside.Eventually(t, "it is stopped", 10*time.Second, func() bool { return stopped(t, first.TGID) })
	d.conserve()
	got := d.total("again")
	cpuid, boots := counts(got)["cpuid"], counts(got)["io"]
	t.Logf("%d boots, %d CPUID exits", boots, cpuid)
	if cpuid < 50*boots || cpuid > 50*(boots+1) {
		t.Errorf("%d boots of 50 CPUID exits make %d", boots, cpuid)
	}
	if got.TGID != first.TGID || *got.ID != *first.ID || !got.Since.Equal(*first.Since) {
		t.Errorf("%+v after %+v", got, first)
	}
}

// TestCrash has guests that report their crash, with what libvirt may do then.
func TestCrash(t *testing.T) {
	inside.Load(t, "")
	d := start(t, options{})
	const goesOn, anew = true, false
	// CPUID leaves 0xd in AL: its lowest bit says to pvpanic that the guest has crashed.
	program := rom(t, "cpuid:1000,out:0x505:1", false)
	defined := func(action string) *life {
		l := &life{t: t, d: d, name: "crash " + action, boot: 1000}
		virsh(t, "define", define(t, domain{name: l.name, os: program, more: "<on_crash>" + action + "</on_crash><devices><panic model='isa'/></devices>"}))
		t.Cleanup(func() {
			exec.Command("virsh", "-c", "qemu:///system", "destroy", l.name).Run()
			exec.Command("virsh", "-c", "qemu:///system", "undefine", l.name).Run()
		})
		return l
	}
	l := defined("destroy")
	l.step("crash, on_crash destroy", anew, "shut off", 1, func() { virsh(t, "start", l.name) })
	l = defined("preserve")
	l.step("crash, on_crash preserve", anew, "crashed", 1, func() { virsh(t, "start", l.name) })
	l.step("destroy", goesOn, "shut off", 0, func() { virsh(t, "destroy", l.name) })

	l = defined("restart")
	virsh(t, "start", l.name)
	inside.Eventually(t, "it crashes again and again", 60*time.Second, func() bool { return counts(d.find(l.name))["io"] >= 3 })
	first := d.find(l.name)
	inside.Eventually(t, "and again", 60*time.Second, func() bool { return counts(d.find(l.name))["io"] >= 6 })
	virsh(t, "destroy", l.name)
	inside.Eventually(t, "it is over", 10*time.Second, func() bool { return d.find(l.name).TGID == 0 })
	last := d.total(l.name)
	cpuid, boots := counts(last)["cpuid"], counts(last)["io"]
	t.Logf("on_crash restart: %d boots, %d CPUID exits", boots, cpuid)
	if *last.Run != *first.Run || !last.Since.Equal(*first.Since) || cpuid < 1000*boots || cpuid > 1000*(boots+1) {
		t.Errorf("%+v after %+v", last, first)
	}
	d.conserve()
}
