// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"virtexit/api"
	"virtexit/test/lab/inside"
)

// pace is how long each question takes, at best.
type pace map[string]time.Duration

// pace asks all that can be asked without waiting for guests, again and again.
// Where the usual pace is given, libvirt must not slow it down: at best by less
// than 100 ms, and never so much that it could be libvirt that was waited for.
func (d *virtexitd) pace(what, name string, usual pace) pace {
	d.t.Helper()
	got := pace{}
	var line strings.Builder
	for _, question := range []struct {
		name string
		ask  func(context.Context) error
	}{
		{"status", func(ctx context.Context) error { _, err := d.api.Status(ctx); return err }},
		{"domains", func(ctx context.Context) error { _, err := d.api.Domains(ctx); return err }},
		{"one domain", func(ctx context.Context) error { _, err := d.api.Domain(ctx, name); return err }},
		{"report", func(ctx context.Context) error { _, err := d.api.Report(ctx, nil, 0); return err }},
		{"level", func(ctx context.Context) error { _, err := d.api.DomainLevel(ctx, name); return err }},
	} {
		best, worst := time.Hour, time.Duration(0)
		for range 10 {
			began := time.Now()
			err := question.ask(d.t.Context())
			took := time.Since(began)
			best, worst = min(best, took), max(worst, took)
			if err != nil {
				d.t.Errorf("%s, while libvirt %s: %v", question.name, what, err)
			}
		}
		if usually, known := usual[question.name]; known && (best-usually > 100*time.Millisecond || worst > 5*time.Second) {
			d.t.Errorf("%s, while libvirt %s: %v to %v, usually from %v", question.name, what, best, worst, usually)
		}
		got[question.name] = best
		fmt.Fprintf(&line, "  %s %.1f to %.1f", question.name, 1e3*best.Seconds(), 1e3*worst.Seconds())
	}
	d.t.Logf("milliseconds while libvirt %s:%s", what, &line)
	d.list(what)
	return got
}

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

// listen makes a socket of libvirt's and gives its file.
func listen(t *testing.T, path string) *os.File {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	file, err := l.File()
	if err := errors.Join(err, os.Chmod(path, 0o777)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return file
}

// TestNothingWaits has a libvirt that answers late, or never, or is gone or
// another, and asks virtexitd meanwhile. In the end libvirtd is replaced by what
// answers at virtqemud's sockets, as where a host is moved to libvirt's modular
// daemons. Debian 12 has no virtqemud: it is libvirtd, which takes its sockets as
// systemd hands them over.
func TestNothingWaits(t *testing.T) {
	inside.Load(t, "")
	d := start(t, options{})
	known := func(name string, cpuid uint64) func() bool {
		return func() bool {
			x := d.find(name)
			return x.ID != nil && x.Source == "libvirt" && x.State == "running" && counts(x)["cpuid"] == cpuid && d.status().Libvirt.Connected
		}
	}
	conserve := func() {
		t.Helper()
		if s := d.conserve(); s.Unattributed != 0 || s.Missed != 0 {
			t.Errorf("%+v", s)
		}
	}
	create(t, domain{name: "stuck", os: rom(t, "cpuid:50", false)})
	create(t, domain{name: "before", os: rom(t, "cpuid:70", false)})
	inside.Eventually(t, "a domain is known", 20*time.Second, known("stuck", 50))
	inside.Eventually(t, "a domain is known", 20*time.Second, known("before", 70))
	before := d.total("before")
	usual := d.pace("answers", "stuck", nil)

	// QEMU answers libvirt no more, and a job waits for it.
	qemu := d.find("stuck").TGID
	signal(t, qemu, syscall.SIGSTOP)
	t.Cleanup(func() { signal(t, qemu, syscall.SIGCONT) })
	job := func(args ...string) (ended chan error) {
		cmd := exec.Command("virsh", append([]string{"-c", "qemu:///system"}, args...)...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended = make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		return ended
	}
	saved := job("save", "stuck", filepath.Join(images, "stuck.save"))
	time.Sleep(2 * time.Second) // it hangs by now
	d.pace("has a domain with a stuck job", "stuck", usual)
	create(t, domain{name: "free", os: rom(t, "cpuid:60", false)})
	inside.Eventually(t, "another domain is known", 20*time.Second, known("free", 60))
	if x := d.find("stuck"); x.TGID != qemu || x.ID == nil || x.Source != "libvirt" {
		t.Errorf("%+v", x)
	}
	if len(saved) > 0 {
		t.Error("the job has ended: nothing is stuck")
	}
	conserve()
	signal(t, qemu, syscall.SIGCONT)
	if err := <-saved; err != nil {
		t.Errorf("virsh save: %v", err)
	}
	inside.Eventually(t, "the domain is saved", 20*time.Second, func() bool { return d.find("stuck").TGID == 0 })
	conserve()

	pid := libvirtd(t)
	t.Cleanup(func() { ensureLibvirtd(t, pid) })
	signal(t, pid, syscall.SIGSTOP)
	d.pace("hangs", "before", usual)
	listed := job("list")
	inside.Eventually(t, "libvirtd is found to hang", 40*time.Second, func() bool { return !d.status().Libvirt.Connected })
	t.Log(d.status().Libvirt.Error)
	d.pace("is known to hang", "before", usual)
	if len(listed) > 0 {
		t.Error("libvirtd has answered virsh: it does not hang")
	}
	conserve()
	signal(t, pid, syscall.SIGCONT)
	<-listed
	inside.Eventually(t, "libvirt is connected again", 20*time.Second, known("before", 70))

	signal(t, pid, syscall.SIGTERM)
	inside.Eventually(t, "libvirtd is gone", 20*time.Second, func() bool { return syscall.Kill(pid, 0) != nil && !d.status().Libvirt.Connected })
	t.Log(d.status().Libvirt.Error)
	d.pace("is absent", "before", usual)
	conserve()

	for _, name := range []string{"libvirt-sock", "libvirt-sock-ro"} {
		if err := os.Remove(filepath.Join("/run/libvirt", name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	virtqemud := exec.Command("sh", "-c", `export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=libvirtd.socket:libvirtd-ro.socket; exec libvirtd`)
	virtqemud.ExtraFiles = []*os.File{listen(t, "/run/libvirt/virtqemud-sock"), listen(t, "/run/libvirt/virtqemud-sock-ro")}
	if err := virtqemud.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { virtqemud.Process.Signal(syscall.SIGTERM); virtqemud.Wait() })
	inside.Eventually(t, "virtqemud is connected", 40*time.Second, known("before", 70))
	if _, err := os.Stat("/run/libvirt/libvirt-sock-ro"); err == nil {
		t.Error("libvirtd's own socket is there")
	}
	create(t, domain{name: "after", os: rom(t, "cpuid:80", false)})
	inside.Eventually(t, "a new domain is known", 20*time.Second, known("after", 80))
	if x := d.total("before"); x.TGID != before.TGID || *x.ID != *before.ID || !x.Since.Equal(*before.Since) {
		t.Errorf("%+v\nbefore: %+v", x, before)
	}
	virsh(t, "destroy", "before")
	inside.Eventually(t, "an end is known", 20*time.Second, func() bool { return d.find("before").State == "shut off" })
	for name, want := range map[string]uint64{"stuck": 50, "free": 60, "before": 70, "after": 80} {
		if got := counts(d.total(name))["cpuid"]; got != want {
			t.Errorf("%s: %d CPUID exits, want %d", name, got, want)
		}
	}
	conserve()
}

// session is a user who has a libvirt.
type session struct {
	t    *testing.T
	uid  int
	home string
	run  string // XDG_RUNTIME_DIR
}

// newSession logs a user in.
func newSession(t *testing.T, uid int) *session {
	t.Helper()
	s := &session{t, uid, fmt.Sprintf("/home/user-%d", uid), fmt.Sprintf("/run/user/%d", uid)}
	for _, args := range [][]string{
		{"useradd", "--uid", strconv.Itoa(uid), "--create-home", "--home-dir", s.home, filepath.Base(s.home)},
		{"mkdir", "-p", s.run},
		{"mount", "-t", "tmpfs", "-o", fmt.Sprintf("mode=700,uid=%d,gid=%d", uid, uid), "session", s.run},
		// What libvirt has found out about QEMU need not be found out again.
		{"mkdir", "-p", s.home + "/.cache/libvirt/qemu"},
		{"cp", "-r", "/var/cache/libvirt/qemu/capabilities", s.home + "/.cache/libvirt/qemu/"},
		{"chown", "-R", strconv.Itoa(uid), s.home + "/.cache"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
	}
	t.Cleanup(func() {
		for _, name := range []string{"libvirtd", "virtlogd"} {
			text, err := os.ReadFile(filepath.Join(s.run, "libvirt", name+".pid"))
			if pid, bad := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && bad == nil {
				syscall.Kill(pid, syscall.SIGTERM)
				inside.Eventually(t, name+" has ended", 20*time.Second, func() bool { return syscall.Kill(pid, 0) != nil })
			}
		}
		for _, args := range [][]string{{"umount", s.run}, {"userdel", "--remove", filepath.Base(s.home)}} {
			if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Errorf("%q: %v\n%s", args, err, out)
			}
		}
	})
	return s
}

// command is one that the user runs.
func (s *session) command(args ...string) *exec.Cmd {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.home, "XDG_RUNTIME_DIR=" + s.run}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(s.uid), Gid: uint32(s.uid)}}
	return cmd
}

// create starts a domain of the user's libvirt, and with the first one that.
func (s *session) create(x domain) {
	s.t.Helper()
	text, err := os.ReadFile(define(s.t, x))
	if err != nil {
		s.t.Fatal(err)
	}
	file := filepath.Join(s.run, "domain.xml")
	if err := errors.Join(os.WriteFile(file, text, 0o600), os.Chown(file, s.uid, s.uid)); err != nil {
		s.t.Fatal(err)
	}
	cmd := s.command("virsh", "-c", "qemu:///session", "create", file)
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("virsh create: %v\n%s", err, out)
	}
	s.t.Cleanup(func() { s.command("virsh", "-c", "qemu:///session", "destroy", x.name).Run() })
}

// TestSessions has users with a libvirt each and a domain of the same name, as
// has the host's libvirt.
func TestSessions(t *testing.T) {
	const (
		uuidHost, uuidAnn, uuidBob = "dddddddd-1111-4111-8111-000000000001", "dddddddd-1111-4111-8111-000000000002", "dddddddd-1111-4111-8111-000000000003"
	)
	inside.Load(t, "")
	d := start(t, options{})
	create(t, domain{name: "web", uuid: uuidHost, os: rom(t, "cpuid:201", false)})
	ann, bob := newSession(t, 5001), newSession(t, 5002)
	ann.create(domain{name: "web", uuid: uuidAnn, os: rom(t, "cpuid:202", false)})
	bob.create(domain{name: "web", uuid: uuidBob, vcpus: 2, os: rom(t, "cpuid:203", false)})

	// Ann, whose files are read before Bob's, says that the host's domain and Bob's
	// are hers, and stops up her directory.
	for _, from := range []string{"/run/libvirt/qemu/web.xml", bob.run + "/libvirt/qemu/run/web.xml"} {
		text, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(ann.run, "libvirt/qemu/run", strings.ReplaceAll(from, "/", "_"))
		if err := os.WriteFile(to, []byte(strings.ReplaceAll(string(text), "<name>web<", "<name>hers<")), 0o666); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(to, ann.uid, ann.uid); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(ann.run, "libvirt/qemu/run/pipe.xml"), 0o600); err != nil {
		t.Fatal(err)
	}

	number := func(n int) *int { return &n }
	for _, tc := range []struct {
		what, uuid, source string
		uid                *int // nil: that of libvirt
		cpuid              uint64
		vcpus              int
	}{
		{"the host's", uuidHost, "libvirt", nil, 201, 1},
		{"Ann's", uuidAnn, "rundir", number(ann.uid), 202, 1},
		{"Bob's", uuidBob, "rundir", number(bob.uid), 203, 2},
	} {
		var x api.Domain
		inside.Eventually(t, tc.what+" is done and named", 60*time.Second, func() bool {
			x = d.find(tc.uuid)
			return x.Source == tc.source && counts(x)["cpuid"] == tc.cpuid
		})
		x = d.total(tc.uuid)
		t.Logf("%-10s %s id %s uid %d tgid %d source %s: %d CPUID exits", tc.what, x.Name, id(x), *x.UID, x.TGID, x.Source, counts(x)["cpuid"])
		if x.Name != "web" || x.State != "running" || (x.ID != nil) != (tc.uid == nil) || len(x.VCPUs) != tc.vcpus || counts(x)["cpuid"] != tc.cpuid {
			t.Errorf("%s: %+v", tc.what, x)
		}
		if tc.uid == nil && *x.UID == 0 || tc.uid != nil && *x.UID != *tc.uid {
			t.Errorf("%s is run by user %d", tc.what, *x.UID)
		}
	}
	if x := d.total("web"); *x.UUID != uuidHost {
		t.Errorf("by name: %+v", x)
	}
	if s := d.conserve(); s.Unattributed != 0 || s.Missed != 0 {
		t.Errorf("%+v", s)
	}
	t.Logf("\n%s", d.ok("list"))
	virsh(t, "destroy", uuidHost)
	inside.Eventually(t, "its end is known", 20*time.Second, func() bool { return d.find(uuidHost).TGID == 0 })
	if r := d.run("report", "--total", "web"); r.status != 1 || !strings.Contains(r.stderr, "more than one domain is called 'web'") {
		t.Errorf("by name: %+v", r)
	}
	d.conserve()
}
