// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"virtexit/test/lab/inside"
)

// list prints the running domains, which takes no time whatever libvirt does.
func (d *virtexitd) list(what string) string {
	d.t.Helper()
	began := time.Now()
	out := d.ok("list")
	took := time.Since(began)
	d.t.Logf("list while libvirtd %s: %v", what, took)
	if took > 5*time.Second {
		d.t.Errorf("list took %v while libvirtd %s", took, what)
	}
	return out
}

// qemu starts a guest by hand.
func qemu(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("qemu-system-x86_64", append(args, "-accel", "kvm", "-m", "16", "-nodefaults", "-display", "none")...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

// ensureLibvirtd has libvirtd answer after a test that stopped or killed it.
func ensureLibvirtd(t *testing.T, pid int) {
	t.Helper()
	signal(t, pid, syscall.SIGCONT)
	answers := func() bool { return exec.Command("virsh", "-c", "qemu:///system", "version").Run() == nil }
	if answers() {
		return
	}
	if out, err := exec.Command("libvirtd", "-d").CombinedOutput(); err != nil {
		t.Errorf("libvirtd: %v\n%s", err, out)
	}
	inside.Eventually(t, "libvirtd answers", 20*time.Second, answers)
}

// TestLibvirtAway stops libvirtd, and then kills it.
func TestLibvirtAway(t *testing.T) {
	inside.Load(t, "")
	d := start(t, options{})
	create(t, domain{name: "one", os: rom(t, "cpuid:10,spin:1000000", true)})
	create(t, domain{name: "two", os: rom(t, "cpuid:10", false)})
	known := func(name string) bool {
		x := d.find(name)
		return x.ID != nil && x.State == "running" && x.Count > 0
	}
	inside.Eventually(t, "the domains are known", 10*time.Second, func() bool {
		return known("one") && known("two") && d.status().Libvirt.Connected
	})

	pid := libvirtd(t)
	t.Cleanup(func() { ensureLibvirtd(t, pid) })
	signal(t, pid, syscall.SIGSTOP)
	named := qemu(t, "-name", "by hand,process=x")
	nameless := qemu(t)
	away := func(what string) {
		t.Helper()
		for _, name := range []string{"one", "two", "by hand"} {
			if out := d.list(what); !strings.Contains(out, name) {
				t.Errorf("no %s in\n%s", name, out)
			}
		}
		before := d.total("one").Count
		inside.Eventually(t, "counting goes on", 10*time.Second, func() bool { return d.total("one").Count > before })
		if !known("one") || !known("two") {
			t.Errorf("while libvirtd %s: %+v, %+v", what, d.find("one"), d.find("two"))
		}
		d.conserveStopped()
	}
	inside.Eventually(t, "guests appear by process", 20*time.Second, func() bool {
		x, y := d.find("by hand"), d.find(fmt.Sprintf("qemu-system-x86-%d", nameless.Process.Pid))
		return x.TGID == named.Process.Pid && x.ID == nil && x.Source == "proc" && x.Count > 0 &&
			y.TGID == nameless.Process.Pid && y.ID == nil && y.Source == "process" && y.Count > 0
	})
	away("is stopped")
	signal(t, pid, syscall.SIGKILL)
	signal(t, pid, syscall.SIGCONT)
	inside.Eventually(t, "libvirtd is found dead", 20*time.Second, func() bool { return !d.status().Libvirt.Connected })
	away("is dead")

	ensureLibvirtd(t, pid)
	inside.Eventually(t, "libvirt is connected again", 20*time.Second, func() bool { return d.status().Libvirt.Connected })
	create(t, domain{name: "three", os: rom(t, "cpuid:10", false)})
	inside.Eventually(t, "a new domain is known", 20*time.Second, func() bool { return known("three") })
	virsh(t, "suspend", "three")
	inside.Eventually(t, "its state is known", 20*time.Second, func() bool { return d.find("three").State == "paused" })
	if s := d.conserveStopped(); s.Unattributed != 0 || s.Missed != 0 {
		t.Errorf("%+v", s)
	}
}

// hidden runs a daemon that does not see libvirt's run directory.
var hidden = options{
	libvirt: "qemu+unix:///system?socket=/mnt/libvirt-sock",
	wrapper: []string{"unshare", "-m", "sh", "-c", `mount --bind /run/libvirt /mnt && mount -t tmpfs none /run/libvirt && exec "$@"`, "sh"},
}

// TestNameComesLater starts the daemon when nothing but the process is there
// to tell who a domain is, and what it says of itself is not true.
func TestNameComesLater(t *testing.T) {
	inside.Load(t, "")
	for _, tc := range []struct {
		name, more, first string
		reveal            func(t *testing.T, d *virtexitd, libvirtd int)
		source            string
	}{
		{"libvirtd answers", "", "late", func(t *testing.T, _ *virtexitd, pid int) { signal(t, pid, syscall.SIGCONT) }, "libvirt"},
		// QEMU takes the last name that it is given.
		{"the run directory appears", "<qemu:commandline><qemu:arg value='-name'/><qemu:arg value='other'/></qemu:commandline>", "other",
			func(t *testing.T, d *virtexitd, _ int) {
				out, err := exec.Command("nsenter", "-m", "-t", fmt.Sprint(d.cmd.Process.Pid), "umount", "/run/libvirt").CombinedOutput()
				if err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}, "rundir"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			create(t, domain{name: "late", os: rom(t, "cpuid:10,spin:1000000", true), more: tc.more})
			pid := libvirtd(t)
			signal(t, pid, syscall.SIGSTOP)
			t.Cleanup(func() { signal(t, pid, syscall.SIGCONT) })
			d := start(t, hidden)
			inside.Eventually(t, "it appears by process", 20*time.Second, func() bool {
				x := d.find(tc.first)
				return x.ID == nil && x.Source == "proc" && x.State == "running" && x.Count > 0
			})
			before := d.total(tc.first)
			tc.reveal(t, d, pid)
			inside.Eventually(t, "its name is known", 30*time.Second, func() bool {
				x := d.find("late")
				return x.ID != nil && x.Source == tc.source
			})
			after := d.total("late")
			if after.TGID != before.TGID || after.Count < before.Count || after.UUID == nil || *after.UUID != *before.UUID {
				t.Errorf("before %+v\nafter %+v", before, after)
			}
			d.conserveStopped()
		})
	}
}

// TestWithoutLibvirt has a host without libvirt's daemon, and one without its
// library.
func TestWithoutLibvirt(t *testing.T) {
	inside.Load(t, "")
	for _, tc := range []struct {
		name string
		options
	}{
		{"daemon", options{libvirt: "qemu+unix:///system?socket=/nonexistent"}},
		{"library", options{wrapper: []string{"unshare", "-m", "sh", "-c",
			`for lib in /usr/lib/*/libvirt.so.0; do mount --bind /dev/null "$lib" || exit; done; exec "$@"`, "sh"}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := start(t, tc.options)
			g := newGuest(t, 1)
			run(t, g, 0, "cpuid:77")
			if got := counts(d.total(nameOf(t, g)))["cpuid"]; got != 77 {
				t.Errorf("%d CPUID exits, want 77", got)
			}
			inside.Eventually(t, "why libvirt is not there", 10*time.Second, func() bool {
				s := d.status().Libvirt
				return !s.Connected && s.Error != "" && s.Error != "not connected yet"
			})
			t.Log(d.status().Libvirt.Error)
			d.conserve()
		})
	}
}
