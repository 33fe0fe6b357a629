// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"virtexit/test/lab/inside"
)

// readOnly are the procedures of libvirt that virtexitd may call: none changes
// a thing, nor asks QEMU anything.
var readOnly = []string{
	"AuthList",
	"ConnectOpen", "ConnectClose", "ConnectSupportsFeature", "ConnectGetURI",
	"ConnectRegisterCloseCallback", "ConnectUnregisterCloseCallback",
	"ConnectDomainEventCallbackRegisterAny", "ConnectDomainEventCallbackDeregisterAny",
	"ConnectListAllDomains", "DomainGetXMLDesc", "DomainGetState",
}

// clients reads libvirtd's log: what each client called, and how often, and
// with which flags it opened its connection.
func clients(t *testing.T, file string) (calls map[string]map[string]int, opened map[string]string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	const at = `(?m)^\S+ \S+ (\d+): debug : `
	line := regexp.MustCompile(at + `(?:virNetServerHandleJob:\d+ : server=\S+ client=(\S+)` +
		`|virThreadJobSet:\d+ : Thread \d+ \(rpc-libvirtd\) is now running job remoteDispatch(\w+)` +
		`|virConnectOpenAuth:\d+ : name=.* flags=(\S+))`)
	calls, opened = map[string]map[string]int{}, map[string]string{}
	serves := map[string]string{} // thread -> client
	for _, m := range line.FindAllStringSubmatch(string(text), -1) {
		switch client := serves[m[1]]; {
		case m[2] != "":
			serves[m[1]] = m[2]
		case m[3] != "":
			if calls[client] == nil {
				calls[client] = map[string]int{}
			}
			calls[client][m[3]]++
		default:
			opened[client] = m[4]
		}
	}
	return calls, opened
}

// TestReadOnly reads libvirtd's own log of what virtexitd asks of it while
// domains come, change and go, and looks for what would taint a domain.
func TestReadOnly(t *testing.T) {
	inside.Load(t, "")
	const log, name = "/run/libvirtd.log", "pure"
	admin := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("virt-admin", append([]string{"-q", "-c", "libvirtd:///system"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("virt-admin %q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	admin("daemon-log-outputs", "1:file:"+log)
	admin("daemon-log-filters", "1:rpc.netserver 1:util.threadjob 1:libvirt")
	t.Cleanup(func() {
		admin("daemon-log-filters", "")
		admin("daemon-log-outputs", "3:stderr")
	})

	d := start(t, options{})
	inside.Eventually(t, "libvirt is connected", 20*time.Second, func() bool { return d.status().Libvirt.Connected })
	var info string
	for _, id := range regexp.MustCompile(`(?m)^ *(\d+)`).FindAllString(admin("client-list", "libvirtd"), -1) {
		info = admin("client-info", "libvirtd", strings.TrimSpace(id))
	}
	for _, want := range []string{fmt.Sprintf(`unix_process_id *: %d\n`, d.cmd.Process.Pid), `readonly *: yes\n`} {
		if !regexp.MustCompile(want).MatchString(info) {
			t.Errorf("libvirtd's last client is\n%s\nwithout %s", info, want)
		}
	}

	virsh(t, "define", define(t, domain{name: name, vcpus: 2, os: rom(t, "cpuid:90", false)}))
	t.Cleanup(func() {
		exec.Command("virsh", "-c", "qemu:///system", "destroy", name).Run()
		exec.Command("virsh", "-c", "qemu:///system", "undefine", name).Run()
	})
	virsh(t, "setvcpus", name, "1", "--config")
	virsh(t, "start", name)
	inside.Eventually(t, "the domain is done", 30*time.Second, func() bool { x := d.find(name); return x.ID != nil && counts(x)["cpuid"] == 90 })
	virsh(t, "setvcpus", name, "2", "--live")
	virsh(t, "desc", name, "--live", "--title", "A title")
	inside.Eventually(t, "vCPU and title are known", 20*time.Second, func() bool { x := d.find(name); return len(x.VCPUs) == 2 && x.Title == "A title" })
	for _, args := range [][]string{{"list", "--all", "--title", "--owner"}, {"report", "--total", name}, {"report", "--interval", "100ms"}, {"level", name, "recent"}, {"off"}, {"on"}} {
		d.ok(args...)
	}
	virsh(t, "suspend", name)
	inside.Eventually(t, "its state is known", 20*time.Second, func() bool { return d.find(name).State == "paused" })
	d.conserve()

	taint := func() (told, written bool) {
		t.Helper()
		text, err := os.ReadFile("/var/log/libvirt/qemu/" + name + ".log")
		if err != nil {
			t.Fatal(err)
		}
		status, err := os.ReadFile("/run/libvirt/qemu/" + name + ".xml")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(text), "tainted"), strings.Contains(string(status), "<taint")
	}
	if told, written := taint(); told || written {
		t.Errorf("the domain is tainted, by its log %v, by its status %v", told, written)
	}
	virsh(t, "qemu-monitor-command", name, "--hmp", "info name") // what virtexit never does
	if told, written := taint(); !told || !written {
		t.Errorf("a tainted domain is not told from others: log %v, status %v", told, written)
	}
	virsh(t, "destroy", name)
	inside.Eventually(t, "its end is known", 20*time.Second, func() bool { return d.find(name).State == "shut off" })
	d.conserve()
	d.end(syscall.SIGTERM)

	calls, opened := clients(t, log)
	var ours string
	others := map[string]int{}
	for client, procedures := range calls {
		if procedures["ConnectDomainEventCallbackRegisterAny"] == 0 { // which virsh does not
			maps.Copy(others, procedures)
			continue
		}
		if ours != "" {
			t.Errorf("clients %s and %s wait for events", ours, client)
		}
		ours = client
	}
	t.Logf("virtexitd opened with flags %s and called %v", opened[ours], calls[ours])
	if opened[ours] != "0x1" { // VIR_CONNECT_RO
		t.Errorf("connection opened with flags %s", opened[ours])
	}
	for procedure := range calls[ours] {
		if !slices.Contains(readOnly, procedure) {
			t.Errorf("virtexitd called %s", procedure)
		}
	}
	for _, procedure := range []string{"ConnectListAllDomains", "DomainGetXMLDesc"} {
		if calls[ours][procedure] == 0 {
			t.Errorf("%s was not seen", procedure)
		}
	}
	for _, procedure := range []string{"DomainCreate", "DomainSetVcpusFlags", "DomainSuspend"} {
		if others[procedure] == 0 {
			t.Errorf("%s by virsh was not seen: %v", procedure, others)
		}
	}
}
