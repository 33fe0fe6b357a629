// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"virtexit/api"
	"virtexit/test/lab/inside"
)

// obliging is a guest that does what its host asks for: it powers off at the
// button, uses each CPU that is plugged in, and tells which it has.
const obliging = `exec >/dev/ttyS1 2>&1 </dev/null
echo 1 >/proc/sys/kernel/sysrq
mkdir -p /etc/acpi/PWRF
printf '#!/bin/sh\necho button; poweroff -f\n' >/etc/acpi/PWRF/00000080
chmod +x /etc/acpi/PWRF/00000080
acpid -d &
echo booted
cpus=
while :; do
	for online in /sys/devices/system/cpu/cpu*/online; do
		[ "$(cat $online)" = 1 ] || echo 1 >$online
	done
	now=$(cat /sys/devices/system/cpu/online)
	[ "$now" = "$cpus" ] || echo "cpus $now"
	cpus=$now
	sleep 0.2
done
`

// asking does things to a domain that plays along.
type asking struct {
	t       *testing.T
	d       *virtexitd
	name    string
	console string
	was     api.Domain // after the latest step
}

// said tells how often the guest has said something.
func (a *asking) said(what string) int {
	text, err := os.ReadFile(a.console)
	if err != nil && !os.IsNotExist(err) {
		a.t.Fatal(err)
	}
	return strings.Count(string(text), what)
}

// step does something to the domain and looks at its counts while it pauses.
// goesOn tells whether its process and counts stay, as they must where it ends.
func (a *asking) step(what string, goesOn bool, state string, do func()) api.Domain {
	a.t.Helper()
	began := time.Now()
	do()
	inside.Eventually(a.t, what, 30*time.Second, func() bool { return a.d.find(a.name).State == state })
	took := time.Since(began)
	if state == "running" {
		virsh(a.t, "suspend", a.name)
		defer virsh(a.t, "resume", a.name)
		inside.Eventually(a.t, what+", paused", 10*time.Second, func() bool { return a.d.find(a.name).State == "paused" })
	}
	if s := a.d.conserve(); s.Unattributed != 0 || s.Missed != 0 {
		a.t.Errorf("%s: %+v", what, s)
	}
	got := a.d.find(a.name)
	vcpus := ""
	for _, v := range got.VCPUs {
		vcpus += fmt.Sprintf("  %d: tid %d, %d exits", v.ID, v.TID, v.Exits)
	}
	a.t.Logf("%-28s %4.1fs %-8s id %-3s tgid %-5d exits %7d%s", what, took.Seconds(), got.State, id(got), got.TGID, got.Count, vcpus)
	if (got.TGID != 0) != (state == "running") || (got.ID != nil) != (state == "running") {
		a.t.Errorf("%s: %+v", what, got)
	}
	switch before := a.was; {
	case before.Run == nil:
	case goesOn != (*got.Run == *before.Run) || goesOn != got.Since.Equal(*before.Since):
		a.t.Errorf("%s: run %s since %v after %s since %v", what, *got.Run, got.Since, *before.Run, before.Since)
	case goesOn && (got.Count < before.Count || got.Time.Sum() < before.Time.Sum()):
		a.t.Errorf("%s: %+v after %+v", what, got, before)
	case goesOn:
		for _, v := range before.VCPUs {
			if now := vcpuOf(got, v.ID); now.Exits < v.Exits || now.Time.Sum() < v.Time.Sum() {
				a.t.Errorf("%s: vCPU %d: %+v after %+v", what, v.ID, now, v)
			}
		}
	}
	a.was = got
	return got
}

func vcpuOf(d api.Domain, id int) api.VCPU {
	for _, v := range d.VCPUs {
		if v.ID == id {
			return v
		}
	}
	return api.VCPU{}
}

// TestGuestPlaysAlong does to a domain what wants its guest to help.
func TestGuestPlaysAlong(t *testing.T) {
	inside.Load(t, "")
	d := start(t, options{})
	a := &asking{t: t, d: d, name: "obliging", console: filepath.Join(images, "obliging.console")}
	x := debian(t, obliging, "button", "evdev")
	// KVM's number of vCPU 4 is 5, as sockets of three cores have ids for four.
	x.name, x.uuid, x.vcpus = a.name, "cccccccc-1111-4111-8111-000000000002", 6
	x.more = `<cpu><topology sockets='2' dies='1' cores='3' threads='1'/></cpu>` +
		`<devices><serial type='file'><source path='` + a.console + `'/></serial></devices>`
	t.Cleanup(func() {
		exec.Command("virsh", "-c", "qemu:///system", "destroy", a.name).Run()
		exec.Command("virsh", "-c", "qemu:///system", "undefine", a.name).Run()
		if t.Failed() {
			text, _ := os.ReadFile(a.console)
			t.Logf("the guest said:\n%s", text)
		}
	})
	virsh(t, "define", define(t, x))
	virsh(t, "setvcpus", a.name, "1", "--config")
	wait := func(what string, n int) {
		t.Helper()
		inside.Eventually(t, fmt.Sprintf("the guest says %q for the time %d", what, n), 5*time.Minute, func() bool { return a.said(what) == n })
	}
	// libvirt waits for the guest's consent, but not for long.
	unplug := func(number string) {
		exec.Command("virsh", "-c", "qemu:///system", "setvcpu", a.name, number, "--disable", "--live").Run()
		inside.Eventually(t, "the vCPU is gone", 60*time.Second, func() bool { return virsh(t, "vcpucount", a.name, "--live", "--active") == "1" })
	}
	ended := func(tid int) bool {
		_, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", a.was.TGID, tid))
		return os.IsNotExist(err)
	}
	const goesOn, anew = true, false

	a.step("start", anew, "running", func() { virsh(t, "start", a.name); wait("cpus 0\r\n", 1) })
	one := vcpuOf(a.step("setvcpu 4 --enable", goesOn, "running", func() {
		virsh(t, "setvcpu", a.name, "4", "--enable", "--live")
		wait("cpus 0-1", 1)
		inside.Eventually(t, "the new vCPU has libvirt's number", 10*time.Second, func() bool { return vcpuOf(d.find(a.name), 4).Exits > 0 })
	}), 4)
	if len(a.was.VCPUs) != 2 || one.Exits == 0 || ended(one.TID) {
		t.Errorf("plugged: %+v", a.was.VCPUs)
	}
	gone := vcpuOf(a.step("setvcpu 4 --disable", goesOn, "running", func() {
		unplug("4")
		inside.Eventually(t, "the vCPU has no thread", 10*time.Second, func() bool { return vcpuOf(d.find(a.name), 4).TID == 0 })
	}), 4)
	if len(a.was.VCPUs) != 2 || gone.Exits < one.Exits || vcpuOf(a.was, 0).TID == 0 || !ended(one.TID) {
		t.Errorf("unplugged: %+v", a.was.VCPUs)
	}
	if out := d.ok("report", "--total", "--by", "vcpu", a.name); !regexp.MustCompile(fmt.Sprintf(`(?m)^ +4 +- +%d `, gone.Exits)).MatchString(out) {
		t.Errorf("unplugged:\n%s", out)
	}
	two := vcpuOf(a.step("setvcpu 4 --enable again", goesOn, "running", func() {
		virsh(t, "setvcpu", a.name, "4", "--enable", "--live")
		wait("cpus 0-1", 2)
		inside.Eventually(t, "it runs again", 10*time.Second, func() bool { return vcpuOf(d.find(a.name), 4).Exits > gone.Exits })
	}), 4)
	if len(a.was.VCPUs) != 2 || two.TID == one.TID || ended(two.TID) {
		t.Errorf("plugged again: %+v", a.was.VCPUs)
	}
	a.step("setvcpu 4 --disable", goesOn, "running", func() { unplug("4") })

	a.step("reboot", goesOn, "running", func() { virsh(t, "reboot", a.name); wait("button", 1); wait("booted", 2) })
	a.step("the guest powers off", goesOn, "shut off", func() { virsh(t, "send-key", a.name, "KEY_LEFTALT", "KEY_SYSRQ", "KEY_O") })
	a.step("start", anew, "running", func() { virsh(t, "start", a.name); wait("booted", 1) })
	a.step("shutdown", goesOn, "shut off", func() { virsh(t, "shutdown", a.name) })
}
