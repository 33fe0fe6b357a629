// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"virtexit/api"
	"virtexit/api/client"
	"virtexit/internal/source"
	"virtexit/internal/source/kmod"
	"virtexit/test/lab"
	"virtexit/test/lab/guest"
	"virtexit/test/lab/inside"
)

func TestMain(m *testing.M) {
	if lab.Inside() && !inside.IsGuest() {
		if err := host(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	inside.Main(m)
}

// images is where QEMU, which runs as a user of its own, can read firmware.
const images = "/run/virtexit-test"

// host makes the machine a host of guests.
func host() error {
	for _, args := range [][]string{
		{"modprobe", "kvm-amd"},
		{"chmod", "666", "/dev/kvm"},
		{"mkdir", images},
		{"../libvirt.sh"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%q: %w\n%s", args, err, out)
		}
	}
	return nil
}

const bin = "../../../bin"

// virtexitd is a daemon that runs.
type virtexitd struct {
	t      *testing.T
	cmd    *exec.Cmd
	socket string
	api    *client.Client
	log    bytes.Buffer
	ended  chan struct{}
}

// options of a daemon.
type options struct {
	interval string   // 1s where empty
	libvirt  string   // URI
	state    string   // directory; none where empty
	more     string   // lines of the configuration
	wrapper  []string // a command that executes the one that follows
}

// start starts a daemon and waits until it answers and, where the module is
// loaded, collects. It ends with the test.
func start(t *testing.T, o options) *virtexitd {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "virtexitd.yaml")
	text := fmt.Sprintf("log_level: debug\nstate_dir: %q\n%s", o.state, o.more)
	if !strings.Contains(text, "collector:") {
		text += "collector: kmod\n" // also when it is not there
	}
	if o.interval != "" {
		text += "interval: " + o.interval + "\n"
	}
	if o.libvirt != "" {
		text += "libvirt_uri: " + o.libvirt + "\n"
	}
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d := &virtexitd{t: t, socket: filepath.Join(dir, "virtexit.sock"), ended: make(chan struct{})}
	args := append(o.wrapper, filepath.Join(bin, "virtexitd"), "--config", config, "--socket", d.socket)
	d.cmd = exec.Command(args[0], args[1:]...)
	d.cmd.Stderr = &d.log
	d.api = client.New(d.socket)
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { d.cmd.Wait(); close(d.ended) }()
	t.Cleanup(func() {
		d.end(syscall.SIGTERM)
		if t.Failed() {
			t.Logf("log of virtexitd:\n%s", &d.log)
		}
	})
	_, err := os.Stat("/sys/module/virtexit")
	loaded := err == nil
	inside.Eventually(t, "virtexitd answers", 20*time.Second, func() bool {
		s, err := d.api.Status(t.Context())
		return err == nil && (!loaded || s.Level == "time")
	})
	return d
}

// end ends the daemon by a signal.
func (d *virtexitd) end(s syscall.Signal) {
	d.cmd.Process.Signal(s)
	select {
	case <-d.ended:
	case <-time.After(time.Minute):
		d.t.Errorf("virtexitd does not end on %v", s)
		d.cmd.Process.Kill()
		<-d.ended
	}
}

// result is what a command printed and its status.
type result struct {
	stdout, stderr string
	status         int
}

// run runs the command line.
func (d *virtexitd) run(args ...string) result {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "virtexit"), append([]string{"--socket", d.socket}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		d.t.Fatal(err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// ok runs the command line, which must succeed.
func (d *virtexitd) ok(args ...string) string {
	d.t.Helper()
	r := d.run(args...)
	if r.status != 0 {
		d.t.Fatalf("virtexit %q: status %d\n%s", args, r.status, r.stderr)
	}
	return r.stdout
}

func decode[T any](t *testing.T, text string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return v
}

// total is a domain's totals, by the command line.
func (d *virtexitd) total(name string) api.Domain {
	d.t.Helper()
	r := decode[api.Report](d.t, d.ok("report", "--total", "--format", "json", name))
	if len(r.Domains) != 1 || !r.Total {
		d.t.Fatalf("report of %s: %+v", name, r)
	}
	return r.Domains[0]
}

// find is a domain as listed, or one without name where there is none.
func (d *virtexitd) find(name string) api.Domain {
	d.t.Helper()
	list, err := d.api.Domains(d.t.Context())
	if err != nil {
		d.t.Fatal(err)
	}
	x, err := api.Find(list.Domains, name)
	if err != nil {
		return api.Domain{}
	}
	return *x
}

func (d *virtexitd) status() api.Status {
	d.t.Helper()
	s, err := d.api.Status(d.t.Context())
	if err != nil {
		d.t.Fatal(err)
	}
	return s
}

// conserve checks that every exit is in one place. No guest may run.
func (d *virtexitd) conserve() api.Status {
	d.t.Helper()
	s := d.status() // takes the snapshot that the list is of
	list, err := d.api.Domains(d.t.Context())
	if err != nil {
		d.t.Fatal(err)
	}
	var sum uint64
	for _, x := range list.Domains {
		sum += x.Count
		var reasons, vcpus uint64
		for _, e := range x.Exits {
			reasons += e.Count
		}
		for _, v := range x.VCPUs {
			vcpus += v.Exits
		}
		if reasons != x.Count || vcpus != x.Count {
			d.t.Errorf("domain %s: %d exits, %d by reason, %d by vCPU", x.Name, x.Count, reasons, vcpus)
		}
	}
	if again := d.status(); again.Exits != s.Exits {
		d.t.Errorf("a guest runs: %d exits, then %d", s.Exits, again.Exits)
	}
	if s.Exits != sum+s.Unattributed+s.Missed {
		d.t.Errorf("%d exits, but %d in domains + %d unattributed + %d missed", s.Exits, sum, s.Unattributed, s.Missed)
	}
	return s
}

// conserveStopped is conserve while guests run: their processes are stopped
// meanwhile, which asks neither them nor libvirt.
func (d *virtexitd) conserveStopped() api.Status {
	d.t.Helper()
	list, err := d.api.Domains(d.t.Context())
	if err != nil {
		d.t.Fatal(err)
	}
	for _, x := range list.Domains {
		if !x.Running() {
			continue
		}
		signal(d.t, x.TGID, syscall.SIGSTOP)
		defer signal(d.t, x.TGID, syscall.SIGCONT)
	}
	for _, x := range list.Domains {
		inside.Eventually(d.t, x.Name+" is stopped", 10*time.Second, func() bool { return !x.Running() || stopped(d.t, x.TGID) })
	}
	return d.conserve()
}

// stopped tells whether all threads of a process are.
func stopped(t *testing.T, tgid int) bool {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", tgid))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		if fields := text[bytes.LastIndexByte(text, ')')+1:]; !bytes.HasPrefix(fields, []byte(" T")) {
			return false
		}
	}
	return true
}

// counts are a domain's exits by reason.
func counts(d api.Domain) map[string]uint64 {
	m := map[string]uint64{}
	for _, e := range d.Exits {
		m[e.Reason] += e.Count
	}
	return m
}

// module watches virtexit.ko and wishes for nothing.
func module(t *testing.T) *kmod.Source {
	t.Helper()
	s, err := kmod.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func info(t *testing.T, s source.Source) source.Info {
	t.Helper()
	i, err := s.Info()
	if err != nil {
		t.Fatal(err)
	}
	return i
}

const system = "qemu:///system"

// virsh runs a command of libvirt's own.
func virsh(t *testing.T, args ...string) string {
	t.Helper()
	return virshAt(t, system, args...)
}

func virshAt(t *testing.T, uri string, args ...string) string {
	t.Helper()
	out, err := exec.Command("virsh", append([]string{"-q", "-c", uri}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("virsh %q: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// domain is a guest of libvirt.
type domain struct {
	name, uuid string
	vcpus      int    // 1 where 0
	memory     int    // MiB; 16 where 0
	os         string // elements
	more       string // elements of the domain
}

// create starts a domain, which ends with the test.
func create(t *testing.T, d domain) {
	t.Helper()
	virsh(t, "create", define(t, d))
	t.Cleanup(func() { exec.Command("virsh", "-c", "qemu:///system", "destroy", "--", cmp.Or(d.uuid, d.name)).Run() })
}

// define writes a domain down for virsh.
func define(t *testing.T, d domain) string {
	t.Helper()
	xml := fmt.Sprintf(`<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>%s</name>%s<memory unit='MiB'>%d</memory><vcpu>%d</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>%s</os><features><acpi/><apic/></features>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator><controller type='usb' model='none'/><memballoon model='none'/><serial type='null'/></devices>%s
</domain>`, html.EscapeString(d.name), tag("uuid", d.uuid), max(d.memory, 16), max(d.vcpus, 1), d.os, d.more)
	file := filepath.Join(t.TempDir(), "domain.xml")
	if err := os.WriteFile(file, []byte(xml), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func tag(name, text string) string {
	if text == "" {
		return ""
	}
	return "<" + name + ">" + text + "</" + name + ">"
}

// rom is the firmware of a domain that executes a program.
func rom(t *testing.T, program string, forever bool) string {
	t.Helper()
	return fmt.Sprintf("<loader type='rom' readonly='yes'>%s</loader>", firmware(t, program, forever))
}

// firmware is the file of a program that QEMU executes.
func firmware(t *testing.T, program string, forever bool) string {
	t.Helper()
	file, err := os.CreateTemp(images, "*.rom")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	vendor, err := guest.HostVendor()
	if err != nil {
		t.Fatal(err)
	}
	p, err := guest.Parse(program)
	if err != nil {
		t.Fatal(err)
	}
	p.Forever = forever
	code, err := p.ROM(vendor)
	if err != nil {
		t.Fatal(err)
	}
	_, err = file.Write(code)
	if err := errors.Join(err, file.Chmod(0o644)); err != nil {
		t.Fatal(err)
	}
	return file.Name()
}

// newGuest starts a guest that libvirt knows nothing of.
func newGuest(t *testing.T, vcpus int) *inside.Guest {
	t.Helper()
	g, err := inside.StartGuest(vcpus)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

func run(t *testing.T, g *inside.Guest, vcpu int, program string) {
	t.Helper()
	if err := g.Run(vcpu, program); err != nil {
		t.Fatal(err)
	}
}

// nameOf is what a guest that nobody named is called.
func nameOf(t *testing.T, g *inside.Guest) string {
	t.Helper()
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", g.TGID()))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(comm)) + "-" + strconv.Itoa(g.TGID())
}
