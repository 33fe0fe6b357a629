// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/internal/snapshot"
	"virtexit/test/lab"
	"virtexit/test/lab/inside"
)

// by is a thread and an exit code.
type by struct {
	TID  int
	Code uint32
}

// histogram counts exits in the kernel from now until the test's end, without
// us: with a trigger of ftrace on the event kvm_exit. It returns what reads it.
func histogram(t *testing.T) func() map[by]uint64 {
	t.Helper()
	const event = "/sys/kernel/tracing/events/kvm/kvm_exit"
	set := func(trigger string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(event, "trigger"), []byte(trigger), 0); err != nil {
			t.Fatal(err)
		}
	}
	const trigger = "hist:keys=common_pid,exit_reason"
	set(trigger)
	t.Cleanup(func() { set("!" + trigger) })
	line := regexp.MustCompile(`common_pid: +(\d+), exit_reason: +(\d+) } hitcount: +(\d+)`)
	return func() map[by]uint64 {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(event, "hist"))
		if err != nil {
			t.Fatal(err)
		}
		m := map[by]uint64{}
		for _, match := range line.FindAllStringSubmatch(string(text), -1) {
			var n [3]int
			for i := range n {
				n[i], _ = strconv.Atoi(match[i+1])
			}
			m[by{n[0], uint32(n[1])}] = uint64(n[2])
		}
		if dropped := regexp.MustCompile(`Dropped: (\d+)`).FindStringSubmatch(string(text)); dropped == nil || dropped[1] != "0" {
			t.Fatalf("the histogram dropped exits: %q", dropped)
		}
		return m
	}
}

// perf records exits as people do without us, until stop is called, which
// returns how many it saw.
func perf(t *testing.T) (stop func() int) {
	t.Helper()
	dir := t.TempDir()
	file, ready := filepath.Join(dir, "perf.data"), filepath.Join(dir, "ready")
	var messages strings.Builder
	cmd := exec.Command("perf", "kvm", "stat", "record", "-a", "-o", file, "--", "sh", "-c", "touch "+ready+"; exec sleep 1000")
	cmd.Stdout, cmd.Stderr = &messages, &messages
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	// It starts its command when all events are enabled.
	inside.Eventually(t, "perf records", time.Minute, func() bool {
		_, err := os.Stat(ready)
		return err == nil
	})
	return func() int {
		t.Helper()
		cmd.Process.Signal(syscall.SIGINT)
		var exit *exec.ExitError
		if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		out, err := exec.Command("perf", "kvm", "-i", file, "stat", "report", "--event=vmexit").CombinedOutput()
		total := regexp.MustCompile(`Total Samples:(\d+)`).FindSubmatch(out)
		if err != nil || total == nil {
			t.Fatalf("perf: %v\n%s\n%s", err, &messages, out)
		}
		n, _ := strconv.Atoi(string(total[1]))
		return n
	}
}

// debian is a domain with this machine's own kernel, which executes a script. Early
// in its boot it would search for an AGP bridge, by tens of thousands of exits.
func debian(t *testing.T, script string, modules ...string) domain {
	t.Helper()
	kernel, err := lab.FindKernel(inside.Release(t))
	if err != nil {
		t.Fatal(err)
	}
	image, err := os.ReadFile(kernel.Image())
	if err != nil {
		t.Fatal(err)
	}
	vmlinuz, initrd := filepath.Join(images, "vmlinuz"), filepath.Join(images, "initrd")
	if err := os.WriteFile(vmlinuz, image, 0o644); err != nil {
		t.Fatal(err)
	}
	files, err := kernel.Closure(modules)
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.WriteGuest(initrd, script, files...); err != nil {
		t.Fatal(err)
	}
	return domain{name: "debian", memory: 192,
		os: fmt.Sprintf("<kernel>%s</kernel><initrd>%s</initrd><cmdline>quiet mitigations=off pci=noearly</cmdline>", vmlinuz, initrd)}
}

// TestCrossCheck compares what virtexit says of a Debian guest that boots and
// works, and of one more beside it, with what ftrace and KVM counted over the
// same span, and with what perf saw of its end.
func TestCrossCheck(t *testing.T) {
	inside.Load(t, "")
	hist := histogram(t)
	d := start(t, options{})
	storm := domain{name: "storm", os: rom(t, "out:0x80:50,cpuid:20,spin:30000000", true)}
	names := []string{"debian", "storm"}
	create(t, debian(t, "while :; do dd if=/dev/urandom bs=4k count=20 2>/dev/null | md5sum >/dev/null; sleep 0.2; done\n"))
	began := time.Now()
	inside.Eventually(t, "debian boots and sleeps", 2*time.Minute, func() bool { return counts(d.find("debian"))["hlt"] > 20 })
	t.Logf("debian sleeps after %v", time.Since(began))
	create(t, storm)
	inside.Eventually(t, "the other guest works as well", 20*time.Second, func() bool { return d.find("storm").Count > 500 })
	all := func(command string) {
		for _, name := range names {
			virsh(t, command, name)
		}
	}
	all("suspend")
	before := d.conserve()
	stop := perf(t)
	all("resume")
	time.Sleep(3 * time.Second)
	all("suspend")
	recorded := stop()
	s := d.conserve()
	ftrace := hist()

	// By thread and reason: what the module holds.
	counted := map[by]uint64{}
	snap, err := module(t).Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	process := map[int]snapshot.Process{}
	for _, slot := range snap.Slots {
		for _, r := range slot.Rows {
			counted[by{slot.TID, r.Code}] += r.Count
		}
		process[slot.TID] = slot.Process
	}
	var sum uint64
	live := map[by]uint64{}
	for key, n := range ftrace {
		sum += n
		if _, ok := process[key.TID]; ok {
			live[key] = n
		}
	}
	if s.Exits != sum || s.Unattributed != 0 || s.Missed != 0 {
		t.Errorf("ftrace counted %d exits, status %+v", sum, s)
	}
	if diff := cmp.Diff(live, counted); diff != "" {
		t.Errorf("exits by thread and reason (-ftrace +virtexit.ko):\n%s", diff)
	}

	// By domain and reason: what the command line says. By vCPU: what KVM says.
	for _, name := range names {
		got := d.total(name)
		if got.State != "paused" {
			t.Errorf("%s is %s", name, got.State)
		}
		want, codes := map[uint32]uint64{}, map[uint32]uint64{}
		for key, n := range ftrace {
			if process[key.TID].TGID == got.TGID {
				want[key.Code] += n
			}
		}
		for _, e := range got.Exits {
			codes[e.Code] = e.Count
		}
		if diff := cmp.Diff(want, codes); diff != "" {
			t.Errorf("%s: exits by code (-ftrace +virtexit):\n%s", name, diff)
		}
		for _, v := range got.VCPUs {
			if kvm := kvmExits(t, system, name, v.ID); kvm != v.Exits {
				t.Errorf("%s, vCPU %d: %d exits, KVM says %d", name, v.ID, v.Exits, kvm)
			}
		}
		t.Logf("%s: %d exits, %v", name, got.Count, counts(got))
	}
	span := int(s.Exits - before.Exits)
	t.Logf("perf kvm stat saw %d exits of the last %d: %+d", recorded, span, recorded-span)
	if recorded == 0 {
		t.Error("perf saw nothing")
	}
}

// kvmExits is KVM's own statistic, through libvirt.
func kvmExits(t *testing.T, uri, domain string, vcpu int) uint64 {
	t.Helper()
	stats := virshAt(t, uri, "domstats", "--vcpu", domain)
	key := fmt.Sprintf("vcpu.%d.exits.sum=", vcpu)
	for line := range strings.Lines(stats) {
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), key); ok {
			n, err := strconv.ParseUint(text, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %s in\n%s", key, stats)
	return 0
}
