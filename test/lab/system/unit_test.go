// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"virtexit/api"
	"virtexit/api/client"
	"virtexit/test/lab/inside"
)

const unitFile = "../../../configs/systemd/virtexitd.service"

// systemctl commands the manager of newManager.
func systemctl(args ...string) (string, error) {
	cmd := exec.Command("systemctl", append([]string{"--user"}, args...)...)
	cmd.Env = managerEnv
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// As a user's manager has its directories, they are where the host's has them.
var managerEnv = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_IGNORE_CHROOT=1",
	"XDG_RUNTIME_DIR=/run", "XDG_CONFIG_HOME=/var/lib", "XDG_STATE_HOME=/var/lib", "HOME=/root"}

// newManager starts systemd. It is not the first process, so it thinks that it
// is that of a user; that user being root, it confines a service all the same.
func newManager(t *testing.T) {
	t.Helper()
	must := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
	}
	must("mkdir", "-p", "/run/systemd/system", "/sys/fs/cgroup/manager")
	must("mount", "--make-shared", "/run") // as systemd has it on a host
	cgroup, err := os.Open("/sys/fs/cgroup/manager")
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.Close()
	cmd := exec.Command("/lib/systemd/systemd", "--user", "--unit=basic.target")
	cmd.Env = managerEnv
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		must("mount", "--make-private", "/run")
		must("rm", "-r", "/run/systemd")
	})
	inside.Eventually(t, "systemd answers", 30*time.Second, func() bool {
		out, _ := systemctl("is-active", "basic.target")
		return out == "active"
	})
}

// capabilities are those that the unit leaves to virtexitd.
func capabilities(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile(unitFile)
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`(?m)^CapabilityBoundingSet=(.*)$`).FindAllStringSubmatch(string(text), -1)
	if len(found) != 1 {
		t.Fatalf("%d lines of capabilities", len(found))
	}
	return strings.Fields(found[0][1])
}

// startAs is a QEMU that a user has started, who has neither shell nor libvirt.
func startAs(t *testing.T, uid int, args ...string) int {
	t.Helper()
	cmd := exec.Command("qemu-system-x86_64", append(args, "-accel", "kvm", "-m", "16", "-nodefaults", "-display", "none")...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd.Process.Pid
}

// TestUnit has systemd run virtexitd, by the unit that is shipped, but for its user,
// who a user's manager cannot be told: all that it forbids is forbidden. Then again,
// without one capability after another. The user is tested with the packages.
func TestUnit(t *testing.T) {
	const (
		uuid    = "eeeeeeee-1111-4111-8111-000000000001"
		session = 5003
	)
	inside.Load(t, "")
	newManager(t)
	for from, to := range map[string]string{unitFile: "/run/systemd/user/virtexitd.service", filepath.Join(bin, "virtexitd"): "/usr/sbin/virtexitd"} {
		if out, err := exec.Command("install", "-D", from, to).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	d := &virtexitd{t: t, socket: "/run/virtexit/virtexit.sock", api: client.New("/run/virtexit/virtexit.sock")}
	const log = "/run/virtexitd.log"
	restart := func(more string) error {
		const dir = "/run/systemd/user/virtexitd.service.d"
		err := errors.Join(os.MkdirAll(dir, 0o755),
			os.WriteFile(dir+"/test.conf", []byte("[Service]\nUser=\nRestart=no\nStandardError=append:"+log+"\n"+more+"\n"), 0o644))
		if err != nil {
			t.Fatal(err)
		}
		if out, err := systemctl("daemon-reload"); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		_, err = systemctl("restart", "virtexitd")
		return err
	}
	t.Cleanup(func() {
		systemctl("stop", "virtexitd")
		if t.Failed() {
			text, _ := os.ReadFile(log)
			t.Logf("log of virtexitd:\n%s", text)
		}
	})
	if err := restart(""); err != nil {
		out, _ := systemctl("status", "virtexitd")
		t.Fatalf("%v\n%s", err, out)
	}

	// What it must see is of other users, and is there only after it.
	virsh(t, "define", define(t, domain{name: "confined", vcpus: 2, os: rom(t, "cpuid:301", false)}))
	t.Cleanup(func() { exec.Command("virsh", "-c", "qemu:///system", "undefine", "confined").Run() })
	virsh(t, "setvcpus", "confined", "1", "--config")
	virsh(t, "start", "confined")
	t.Cleanup(func() { exec.Command("virsh", "-c", "qemu:///system", "destroy", "confined").Run() })
	startAs(t, 5004, "-name", "alien", "-bios", firmware(t, "cpuid:302", false))
	contain(t, "kubepods.slice/kubepods-pod0a1b2c3d_1111_4222_8333_444455556670.slice", "qemu-system-x86_64", "-name", "boxed",
		"-bios", firmware(t, "cpuid:303", false), "-accel", "kvm", "-m", "16", "-nodefaults", "-display", "none")
	run := fmt.Sprintf("/run/user/%d", session)
	for _, args := range [][]string{{"mkdir", "-p", run}, {"mount", "-t", "tmpfs", "-o", fmt.Sprintf("mode=700,uid=%d", session), "session", run}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
	}
	t.Cleanup(func() { exec.Command("umount", run).Run() })
	pid := startAs(t, session, "-uuid", uuid, "-bios", firmware(t, "cpuid:304", false))
	status := fmt.Sprintf("<domstatus state='running' pid='%d'><domain type='kvm' id='1'><name>of a session</name><uuid>%s</uuid></domain></domstatus>", pid, uuid)
	dir := filepath.Join(run, "libvirt/qemu/run")
	file := filepath.Join(dir, "x.xml")
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(file, []byte(status), 0o600), os.Chown(file, session, session)); err != nil {
		t.Fatal(err)
	}

	named := func(name, source string, cpuid uint64) {
		t.Helper()
		inside.Eventually(t, name+" is done and named", 60*time.Second, func() bool {
			x := d.find(name)
			return x.Source == source && counts(x)["cpuid"] == cpuid
		})
	}
	named("confined", "libvirt", 301)
	named("alien", "proc", 302)
	named("boxed", "proc", 303)
	named("of a session", "rundir", 304)
	if x := d.find("boxed"); x.Container == nil || x.Container.Pod == nil || x.Container.PID == x.TGID {
		t.Errorf("%+v", x)
	}
	virsh(t, "setvcpus", "confined", "2", "--live")
	inside.Eventually(t, "a new vCPU is known", 20*time.Second, func() bool {
		v := d.find("confined").VCPUs
		return len(v) == 2 && v[0].ID == 0 && v[1].ID == 1
	})
	d.ok("level", "confined", "recent")
	virsh(t, "reset", "confined")
	inside.Eventually(t, "exits are logged", 30*time.Second, func() bool {
		l, err := d.api.Log(t.Context(), "confined", api.LogQuery{})
		return err == nil && l.Logged > 301 && counts(d.find("confined"))["cpuid"] == 602
	})
	if s := d.conserve(); s.Problem != "" || !s.Libvirt.Connected || s.Unattributed != 0 || s.Missed != 0 {
		t.Errorf("%+v", s)
	}

	main, err := systemctl("show", "--property", "MainPID", "--value", "virtexitd")
	if err != nil {
		t.Fatal(err)
	}
	process, err := os.ReadFile("/proc/" + main + "/status")
	if err != nil {
		t.Fatal(err)
	}
	is := func(name string) string {
		_, value, _ := strings.Cut(string(process), "\n"+name+":\t")
		value, _, _ = strings.Cut(value, "\n")
		return value
	}
	mask, err := strconv.ParseUint(is("CapEff"), 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("virtexitd: CapEff %s CapBnd %s NoNewPrivs %s Seccomp %s", is("CapEff"), is("CapBnd"), is("NoNewPrivs"), is("Seccomp"))
	if is("CapBnd") != is("CapEff") || is("NoNewPrivs") != "1" || is("Seccomp") != "2" {
		t.Errorf("%s", process)
	}
	var numbers uint64
	for _, c := range capabilities(t) {
		numbers |= 1 << map[string]int{"CAP_CHOWN": 0, "CAP_DAC_READ_SEARCH": 2, "CAP_NET_ADMIN": 12, "CAP_SYS_PTRACE": 19, "CAP_PERFMON": 38, "CAP_BPF": 39}[c]
	}
	if mask != numbers {
		t.Errorf("capabilities %#x, want those of the unit, %#x", mask, numbers)
	}
	info, err := os.Stat(d.socket)
	if err != nil {
		t.Fatal(err)
	}
	group, err := user.LookupGroup("libvirt")
	if err != nil {
		t.Fatal(err)
	}
	owner, _ := info.Sys().(*syscall.Stat_t)
	if strconv.Itoa(int(owner.Gid)) != group.Gid || info.Mode().Perm() != 0o660 {
		t.Errorf("socket %v of group %d", info.Mode(), owner.Gid)
	}

	// Each is needed: without it something is amiss, and nothing else is.
	unnamed := func(name string) func(error) string {
		return func(err error) string {
			others := map[string]string{"confined": "libvirt", "boxed": "proc", "alien": "proc", "of a session": "rundir"}
			delete(others, name)
			if err != nil {
				return ""
			}
			for other, source := range others {
				inside.Eventually(t, other+" is named", 30*time.Second, func() bool { return d.find(other).Source == source })
			}
			if d.find(name).TGID != 0 { // otherwise it is known from before
				return ""
			}
			return "'" + name + "' is not known to run"
		}
	}
	refused := func(collector string) string {
		var why string
		inside.Eventually(t, collector+" is refused", 20*time.Second, func() bool {
			for _, tried := range d.status().Tried {
				if tried.Collector == collector {
					why = tried.Refused
				}
			}
			return why != ""
		})
		return why
	}
	// Without the module, as eBPF is then what counts.
	unloaded := func(err error) string {
		if err != nil {
			return ""
		}
		systemctl("stop", "virtexitd")
		inside.Remove(t, "virtexit")
		if _, err := systemctl("start", "virtexitd"); err != nil {
			t.Fatal(err)
		}
		return refused("ebpf")
	}
	needed := map[string]func(error) string{
		"CAP_NET_ADMIN": func(err error) string {
			if err != nil {
				return ""
			}
			return refused("kmod")
		},
		"CAP_BPF":     unloaded,
		"CAP_PERFMON": unloaded,
		"CAP_CHOWN": func(err error) string {
			if err == nil {
				return ""
			}
			return "it does not start"
		},
		"CAP_DAC_READ_SEARCH": unnamed("of a session"),
		"CAP_SYS_PTRACE":      unnamed("alien"),
	}
	for _, c := range capabilities(t) {
		check := needed[c]
		if check == nil {
			t.Errorf("nothing is known to need %s", c)
			continue
		}
		switch amiss := check(restart("CapabilityBoundingSet=~" + c)); amiss {
		case "":
			t.Errorf("without %s nothing is amiss", c)
		default:
			t.Logf("without %s: %s", c, amiss)
		}
	}

	// With all of them.
	if err := restart(""); err != nil {
		t.Fatal(err)
	}
	inside.Eventually(t, "eBPF collects", 20*time.Second, func() bool {
		s := d.status()
		return s.Collector != nil && *s.Collector == "ebpf" && s.Level == "time"
	})
	before := counts(d.find("confined"))["cpuid"]
	virsh(t, "reset", "confined")
	inside.Eventually(t, "eBPF has counted", 30*time.Second, func() bool { return counts(d.find("confined"))["cpuid"] == before+301 })
	d.conserve()
}
