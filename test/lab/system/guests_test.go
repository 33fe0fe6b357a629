// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/test/lab/inside"
)

// as is a guest of a program that is called and invoked like another VMM.
func as(t *testing.T, program string, args ...string) *inside.Guest {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), program)
	if err := os.Symlink(exe, link); err != nil {
		t.Fatal(err)
	}
	g, err := inside.StartGuestAs(exec.Command(link, args...), 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

// contain runs a command in a pid and a mount namespace of its own, which end
// with the test, and in a cgroup where one is given.
func contain(t *testing.T, cgroup string, args ...string) {
	t.Helper()
	cmd := exec.Command("unshare", append([]string{"-pf", "-m", "--mount-proc", "--kill-child"}, args...)...)
	cmd.Stderr = os.Stderr
	if cgroup != "" {
		path := filepath.Join("/sys/fs/cgroup", cgroup)
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		dir, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
}

// launcher is what KubeVirt's virt-launcher does in its container: start
// libvirt, and have that run the one guest. What libvirt has found out about QEMU
// is the host's.
const launcher = `
for dir in run/libvirt var/lib/libvirt var/log/libvirt; do mount -t tmpfs none /$dir; done
echo 'cgroup_controllers = [ ]' >/run/libvirt/qemu.conf
mount --bind /run/libvirt/qemu.conf /etc/libvirt/qemu.conf
virtlogd -d -p /run/libvirt/virtlogd.pid
libvirtd -d -p /run/libvirt/libvirtd.pid
until virsh -q -c qemu:///system version >/dev/null 2>&1; do sleep 0.5; done
virsh -q -c qemu:///system create "$1"
sleep infinity`

// pidInside is a process's id in its own pid namespace, as the kernel tells it.
func pidInside(t *testing.T, tgid int) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tgid))
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(status), "\nNSpid:")
	line, _, _ = strings.Cut(line, "\n")
	pids := strings.Fields(line)
	pid, err := strconv.Atoi(pids[len(pids)-1])
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// TestGuests has guests of every kind at once, of which libvirt knows one.
func TestGuests(t *testing.T) {
	const (
		podUID      = "0a1b2c3d-1111-4222-8333-44445555666f"
		containerID = "c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00"
		pod         = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0a1b2c3d_1111_4222_8333_44445555666f.slice/cri-containerd-" + containerID + ".scope"
		hostUUID    = "bbbbbbbb-1111-4111-8111-000000000001"
		podGuest    = "bbbbbbbb-1111-4111-8111-000000000002"
		uuid        = "bbbbbbbb-1111-4111-8111-000000000003"
		vmi         = "default_web" // of a host's domain as well
	)
	inside.Load(t, "")
	d := start(t, options{})

	create(t, domain{name: vmi, uuid: hostUUID, os: rom(t, "cpuid:101", false)})
	contain(t, pod, "sh", "-ec", launcher, "sh", define(t, domain{name: vmi, uuid: podGuest, os: rom(t, "cpuid:102", false)}))
	contain(t, "", "qemu-system-x86_64", "-name", "guest=boxed,debug-threads=on", "-bios", firmware(t, "cpuid:103", false),
		"-accel", "kvm", "-m", "16", "-nodefaults", "-display", "none")
	named := qemu(t, "-name", "guest=by,,hand,debug-threads=on", "-uuid", uuid, "-bios", firmware(t, "cpuid:104", false))
	nameless := qemu(t, "-bios", firmware(t, "cpuid:105", false))
	direct := newGuest(t, 1)
	fire := as(t, "firecracker", "--api-sock", "/run/x.sock", "--id", "web-1")
	anonymous := as(t, "firecracker")
	cloud := as(t, "cloud-hypervisor", "--api-socket", "/run/cloud/web-2.sock")
	kata := as(t, "cloud-hypervisor", "--api-socket", "/run/vc/vm/web-3/clh-api.sock")
	for i, g := range []*inside.Guest{direct, fire, anonymous, cloud, kata} {
		run(t, g, 0, fmt.Sprintf("cpuid:%d", 106+i))
	}

	id, uid := containerID, podUID
	type container = api.Container
	for _, tc := range []struct {
		what, find   string // by name where it is empty
		name, source string
		tgid         int // of some, the namespace hides it
		cpuid        uint64
		container    *container
	}{
		{"a host's domain", hostUUID, vmi, "libvirt", 0, 101, nil},
		{"libvirt in a pod", podGuest, vmi, "proc", 0, 102, &container{ID: &id, Pod: &uid}},
		{"QEMU in namespaces", "", "boxed", "proc", 0, 103, &container{}},
		{"QEMU by hand", uuid, "by,hand", "proc", named.Process.Pid, 104, nil},
		{"QEMU without name", "", fmt.Sprintf("qemu-system-x86-%d", nameless.Process.Pid), "process", nameless.Process.Pid, 105, nil},
		{"direct", "", nameOf(t, direct), "process", direct.TGID(), 106, nil},
		{"Firecracker", "", "web-1", "proc", fire.TGID(), 107, nil},
		{"Firecracker without id", "", fmt.Sprintf("firecracker-%d", anonymous.TGID()), "process", anonymous.TGID(), 108, nil},
		{"Cloud Hypervisor", "", "web-2", "proc", cloud.TGID(), 109, nil},
		{"Cloud Hypervisor of Kata", "", "web-3", "proc", kata.TGID(), 110, nil},
	} {
		t.Run(tc.what, func(t *testing.T) {
			if tc.find == "" {
				tc.find = tc.name
			}
			inside.Eventually(t, "it is done and named", 120*time.Second, func() bool {
				x := d.find(tc.find)
				return counts(x)["cpuid"] == tc.cpuid && x.Source == tc.source
			})
			got := d.total(tc.find)
			if got.Name != tc.name || got.State != "running" || tc.tgid != 0 && got.TGID != tc.tgid || (got.ID != nil) != (tc.source == "libvirt") {
				t.Errorf("%+v", got)
			}
			if tc.container != nil {
				tc.container.PID = pidInside(t, got.TGID)
				if tc.container.PID == got.TGID {
					t.Errorf("process %d has no namespace of its own", got.TGID)
				}
			}
			if diff := cmp.Diff(tc.container, got.Container); diff != "" {
				t.Errorf("container (-want +got):\n%s", diff)
			}
			if n := counts(got)["cpuid"]; n != tc.cpuid || len(got.VCPUs) != 1 {
				t.Errorf("%d CPUID exits, want %d; vCPUs %+v", n, tc.cpuid, got.VCPUs)
			}
		})
	}
	for _, x := range decode[api.Domains](t, d.ok("list", "--format", "json")).Domains {
		where, err := json.Marshal(x.Container)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%-22q source %-8s tgid %-5d exits %d container %s", x.Name, x.Source, x.TGID, x.Count, where)
	}
	if s := d.conserve(); s.Unattributed != 0 || s.Missed != 0 {
		t.Errorf("%+v", s)
	}
}

// newGuestAt starts a guest with the ids given of its process and, unless it is 0, of its vCPU's thread. None has them now.
func newGuestAt(t *testing.T, pid, tid int) *inside.Guest {
	t.Helper()
	// Whatever else the machine starts can be faster; it is soon gone.
	for try := 1; ; try++ {
		g, err := inside.StartGuestAt(pid, tid)
		if err == nil {
			t.Cleanup(func() { g.Close() })
			return g
		}
		if try == 100 {
			t.Fatal(err)
		}
	}
}

// TestReusedPID has guests whose process ids are those of others that died.
func TestReusedPID(t *testing.T) {
	inside.Load(t, "")
	d := start(t, options{})
	with := func(tgid int, name string) (running, past []api.Domain) {
		t.Helper()
		for _, x := range decode[api.Domains](t, d.ok("list", "--runs", "--format", "json")).Domains {
			switch {
			case x.TGID == tgid:
				running = append(running, x)
			case x.TGID == 0 && x.Name == name:
				past = append(past, x)
			}
		}
		return running, past
	}

	pid, tid := 20_000, 20_100 // far from all that there are
	first := newGuestAt(t, pid, tid)
	name := nameOf(t, first)
	want := []map[string]uint64{{"cpuid": 1000, "hypercall": 40, "io": 1}, {"cpuid": 7, "msr": 3, "io": 1}, {"cpuid": 11, "io": 1}}
	run(t, first, 0, "cpuid:1000,hypercall:40")
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second := newGuestAt(t, pid, tid) // the daemon has not been asked in between
	t.Logf("process %d, vCPU thread %d, again", second.TGID(), second.TID(0))
	run(t, second, 0, "cpuid:7,rdmsr:0x1b:3")
	check := func(alive bool) {
		t.Helper()
		running, past := with(pid, name)
		all := append(past, running...)
		if len(running) != map[bool]int{true: 1}[alive] {
			t.Errorf("process %d is %+v", pid, running)
		}
		var got []map[string]uint64
		for _, x := range all {
			got = append(got, asked(counts(x)))
		}
		for i := range got {
			for j := range got[:i] {
				if all[i].Since.Before(*all[j].Since) {
					all[i], all[j], got[i], got[j] = all[j], all[i], got[j], got[i]
				}
			}
		}
		if diff := cmp.Diff(want[:len(got)], got); diff != "" || len(got) < 2 {
			t.Errorf("%d guests (-want +got):\n%s", len(got), diff)
		}
		for _, x := range all {
			if x.Name != name || x.Source != "process" || (x.State == "running") != (x.TGID == pid) {
				t.Errorf("%+v", x)
			}
		}
		if s := d.conserve(); s.Unattributed != 0 || s.Missed != 0 {
			t.Errorf("%+v", s)
		}
	}
	inside.Eventually(t, "the first is known to be dead", 10*time.Second, func() bool { _, past := with(pid, name); return len(past) == 1 })
	check(true)
	if got := asked(counts(d.total(name))); !cmp.Equal(got, want[1]) {
		t.Errorf("by name: %v, want the one that runs: %v", got, want[1])
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	third := newGuestAt(t, pid, tid)
	run(t, third, 0, "cpuid:11")
	inside.Eventually(t, "the second is known to be dead", 10*time.Second, func() bool { _, past := with(pid, name); return len(past) == 2 })
	check(true)
	if err := third.Close(); err != nil {
		t.Fatal(err)
	}
	inside.Eventually(t, "the third is known to be dead", 10*time.Second, func() bool { _, past := with(pid, name); return len(past) == 3 })
	check(false)
	if got := asked(counts(d.total(name))); !cmp.Equal(got, want[2]) {
		t.Errorf("by name: %v, want the latest: %v", got, want[2])
	}
	if rows := strings.Count(d.ok("list", "--all"), name); rows != 1 {
		t.Errorf("the three are listed as %d", rows)
	}
	_, past := with(pid, name)
	for _, x := range past {
		if got := d.total(*x.Run); !cmp.Equal(counts(got), counts(x)) {
			t.Errorf("run %s: %v, listed with %v", *x.Run, counts(got), counts(x))
		}
	}

	// libvirt's files outlive its guest, and tell of a process that is now another.
	create(t, domain{name: "old", os: rom(t, "cpuid:500", false)})
	inside.Eventually(t, "the domain is done", 30*time.Second, func() bool { return counts(d.find("old"))["hlt"] == 1 && d.find("old").ID != nil })
	daemon := libvirtd(t)
	t.Cleanup(func() { ensureLibvirtd(t, daemon) })
	signal(t, daemon, syscall.SIGSTOP)
	pid = d.find("old").TGID
	signal(t, pid, syscall.SIGKILL)
	inside.Eventually(t, "QEMU is gone", 10*time.Second, func() bool { return syscall.Kill(pid, 0) != nil })
	impostor := newGuestAt(t, pid, 0)
	run(t, impostor, 0, "cpuid:9")
	if _, err := os.Stat("/run/libvirt/qemu/old.xml"); err != nil {
		t.Fatal(err)
	}
	inside.Eventually(t, "the domain is known to be dead", 10*time.Second, func() bool { return d.find("old").TGID == 0 })
	for name, want := range map[string]map[string]uint64{
		"old":               {"cpuid": 500, "hlt": 1},
		nameOf(t, impostor): {"cpuid": 9, "io": 1},
	} {
		got := d.total(name)
		if diff := cmp.Diff(want, asked(counts(got))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		t.Logf("%q source %s tgid %d: %v", got.Name, got.Source, got.TGID, asked(counts(got)))
	}
	if x := d.find(nameOf(t, impostor)); x.Source != "process" || x.ID != nil || x.UUID != nil || x.TGID != pid {
		t.Errorf("%+v", x)
	}
	d.conserve()
}
