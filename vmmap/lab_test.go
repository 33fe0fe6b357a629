// SPDX-License-Identifier: Apache-2.0

//go:build lab && cgo

package vmmap

import (
	"context"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"virtexit/internal/snapshot"
)

const labURI = "qemu:///system"

// virsh runs a command in the lab's libvirt.
func virsh(t *testing.T, args ...string) {
	t.Helper()
	out, err := exec.Command("virsh", append([]string{"-c", labURI}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("virsh %q: %v\n%s", args, err, out)
	}
}

func define(t *testing.T, name, uuid string) {
	t.Helper()
	file := t.TempDir() + "/domain.xml"
	xml := "<domain type='kvm'><name>" + name + "</name><uuid>" + uuid + "</uuid><memory unit='MiB'>16</memory>" +
		"<os><type arch='x86_64'>hvm</type></os><devices><memballoon model='none'/></devices></domain>"
	if err := os.WriteFile(file, []byte(xml), 0o600); err != nil {
		t.Fatal(err)
	}
	virsh(t, "define", file)
}

// libvirtd returns the process id of the lab's daemon.
func libvirtd(t *testing.T) int {
	t.Helper()
	pid, err := strconv.Atoi(strings.TrimSpace(string(read(t, "/run/libvirtd.pid"))))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func signal(t *testing.T, pid int, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, s); err != nil {
		t.Fatal(err)
	}
}

// TestLab needs the lab's machine, and no libvirtd that runs there already.
func TestLab(t *testing.T) {
	out, err := exec.Command("sh", "-ec", "modprobe kvm_amd; chmod 666 /dev/kvm; ../test/lab/libvirt.sh").CombinedOutput()
	if err != nil {
		t.Fatalf("start libvirt: %v\n%s", err, out)
	}
	const vmA, vmB, plain = "lab", "lab1", "plain, by hand"
	l := NewLibvirt(labURI, uptime)
	m := New(Config{Libvirt: l})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { _ = l.Run(ctx); close(done) }()
	defer func() { cancel(); <-done }()

	get := func(name string) (d Domain) {
		var took time.Duration
		for range 5 { // libvirt would be slow each time
			start := time.Now()
			for _, x := range m.Domains() {
				if x.Name == name {
					d = x
				}
			}
			if took = time.Since(start); took <= 100*time.Millisecond {
				return d
			}
		}
		t.Errorf("Domains took %v", took)
		return d
	}
	within := func(limit time.Duration, what string, ok func() bool) {
		t.Helper()
		limit *= 6 // on a machine that is busy with something else
		for end := time.Now().Add(limit); ; time.Sleep(50 * time.Millisecond) {
			if err := m.Refresh(); err != nil {
				t.Error(err)
			}
			if ok() {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("not within %v: %s; status %+v, domains %+v", limit, what, l.Status(), m.Domains())
			}
		}
	}
	is := func(name string, state State, source string) func() bool {
		return func() bool {
			d := get(name)
			return d.State == state && d.Source == source && (d.TGID != 0) == (state != ShutOff) &&
				(d.ID != nil) == (source == "libvirt" && state != ShutOff)
		}
	}

	define(t, vmA, "aaaaaaaa-2222-4333-8444-000000000001")
	define(t, vmB, "aaaaaaaa-2222-4333-8444-000000000002")
	within(10*time.Second, "shut off", is(vmB, ShutOff, "libvirt"))
	virsh(t, "start", vmA)
	virsh(t, "start", vmB)
	within(10*time.Second, "started", is(vmA, Running, "libvirt"))
	within(10*time.Second, "started", is(vmB, Running, "libvirt"))
	virsh(t, "suspend", vmB)
	within(10*time.Second, "suspended", is(vmB, Paused, "libvirt"))
	a := get(vmA)
	process := snapshot.Process{TGID: a.TGID, Start: a.Start}
	if len(a.VCPUs) != 1 {
		t.Errorf("vCPUs %v", a.VCPUs)
	}
	if d, known := m.Lookup(process, ""); !known || d.Name != vmA {
		t.Errorf("%+v", d)
	}

	// It hangs: names stay, another guest appears by process, one dies.
	daemon := libvirtd(t)
	signal(t, daemon, syscall.SIGSTOP)
	qemu := exec.Command("qemu-system-x86_64", "-name", strings.ReplaceAll(plain, ",", ",,"), "-accel", "kvm", "-m", "16", "-nodefaults", "-display", "none")
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = qemu.Process.Kill(); _ = qemu.Wait() }()
	within(20*time.Second, "plain QEMU", is(plain, Running, "proc"))
	within(10*time.Second, "names kept", is(vmB, Paused, "libvirt"))
	within(30*time.Second, "found to hang", func() bool { return !l.Status().Connected })
	t.Logf("hung: %+v", l.Status())
	signal(t, process.TGID, syscall.SIGKILL)
	within(10*time.Second, "death seen without libvirt", is(vmA, ShutOff, "libvirt"))
	if d, known := m.Lookup(process, ""); !known || d.Name != vmA || d.State != ShutOff || d.TGID != 0 {
		t.Errorf("%+v", d)
	}
	signal(t, daemon, syscall.SIGCONT)
	within(30*time.Second, "reconnected", func() bool { return l.Status().Connected })

	// It dies, and guests go on without it.
	signal(t, daemon, syscall.SIGKILL)
	within(10*time.Second, "lost", func() bool { return !l.Status().Connected })
	t.Logf("dead: %+v", l.Status())
	within(10*time.Second, "names kept", is(vmB, Paused, "libvirt"))
	if out, err := exec.Command("libvirtd", "-d").CombinedOutput(); err != nil {
		t.Fatalf("libvirtd: %v\n%s", err, out)
	}
	within(30*time.Second, "reconnected", func() bool { return l.Status().Connected })
	virsh(t, "resume", vmB)
	within(10*time.Second, "resumed", is(vmB, Running, "libvirt"))
	virsh(t, "destroy", vmB)
	within(10*time.Second, "destroyed", is(vmB, ShutOff, "libvirt"))

	// A second Map that never heard libvirt knows the names as well.
	virsh(t, "start", vmB)
	within(10*time.Second, "started again", is(vmB, Running, "libvirt"))
	cold := New(Config{})
	if err := cold.Refresh(); err != nil {
		t.Error(err)
	}
	found := false
	for _, d := range cold.Domains() {
		found = found || d.Name == vmB && d.Source == "rundir" && d.ID != nil && len(d.VCPUs) == 1
	}
	if !found {
		t.Errorf("without libvirt: %+v", cold.Domains())
	}
}
