// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"bytes"
	"cmp"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/test/lab/inside"
)

// another is a libvirt as of another host: its name, its files and its domains
// are its own. A daemon with the wrapper is on that host too.
type another struct {
	uri     string
	run     string // directory
	wrapper []string
}

func anotherHost(t *testing.T) another {
	t.Helper()
	run := filepath.Join(images, "another")
	if err := os.Mkdir(run, 0o755); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(t.TempDir(), "libvirtd.conf")
	if err := os.WriteFile(config, []byte("host_uuid = 'bbbbbbbb-1111-4111-8111-000000000002'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := another{
		run:     run,
		uri:     "qemu+unix:///system?socket=" + run + "/libvirt-sock",
		wrapper: []string{"unshare", "-m", "sh", "-c", `mount --bind ` + run + ` /run/libvirt && exec "$@"`, "sh"},
	}
	args := append(h.wrapper, "unshare", "-u", "sh", "-c", `hostname another
for dir in /etc/libvirt /var/lib/libvirt; do mount -t tmpfs -o mode=755 none $dir || exit; done
printf '%s\n' 'stdio_handler = "file"' 'cgroup_controllers = []' > /etc/libvirt/qemu.conf
exec libvirtd --config "$@"`, "sh", config, "--pid-file", run+"/libvirtd.pid")
	cmd := exec.Command(args[0], args[1:]...)
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		if t.Failed() {
			t.Logf("log of the other libvirtd:\n%s", &log)
		}
		if err := os.RemoveAll(run); err != nil {
			t.Error(err)
		}
	})
	inside.Eventually(t, "the other libvirtd answers", 30*time.Second, func() bool { return exec.Command("virsh", "-c", h.uri, "version").Run() == nil })
	return h
}

// known tells one process's run of a domain from another's.
type known struct {
	TGID          int
	ID            bool // it has libvirt's
	State, Source string
	Counted       bool
}

// runs are all that a daemon knows of a domain, the earliest first.
func (d *virtexitd) runs(uuid string) (domains []api.Domain, runs []known) {
	d.t.Helper()
	list, err := d.api.Domains(d.t.Context())
	if err != nil {
		d.t.Fatal(err)
	}
	for _, x := range list.Domains {
		if x.UUID != nil && *x.UUID == uuid {
			domains = append(domains, x)
		}
	}
	slices.SortFunc(domains, func(a, b api.Domain) int {
		if a.Since == nil || b.Since == nil {
			return cmp.Compare(b.Count, a.Count)
		}
		return a.Since.Compare(*b.Since)
	})
	for _, x := range domains {
		runs = append(runs, known{x.TGID, x.ID != nil, x.State, x.Source, x.Since != nil})
	}
	return domains, runs
}

// pid is of a domain's process, which libvirt's run directory tells.
func pid(t *testing.T, dir, name string) (pid int) {
	t.Helper()
	inside.Eventually(t, name+" has a process", time.Minute, func() bool {
		text, err := os.ReadFile(filepath.Join(dir, "qemu", name+".pid"))
		if err == nil {
			pid, err = strconv.Atoi(string(text))
		}
		return err == nil
	})
	return pid
}

// TestMigration has a domain leave one libvirt for another while it runs. The
// two share a host, so that the daemon of each sees both its processes.
func TestMigration(t *testing.T) {
	inside.Load(t, "")
	there := anotherHost(t)
	daemons := [2]*virtexitd{start(t, options{}), start(t, options{wrapper: there.wrapper})}
	at := [2]string{"source", "destination"}
	const name, uuid, cpuid = "moves", "bbbbbbbb-1111-4111-8111-000000000001", 200_000
	// It writes memory faster than libvirt may send it: the migration goes on until it may send more.
	program := strings.Join(slices.Repeat([]string{"cpuid:250,touch:0x1000:150"}, cpuid/250), ",")

	// see checks what each daemon says of the domain's runs, and that by name and
	// uuid it takes the one that is meant.
	see := func(what string, want [2][]known, meant [2]int) (seen [2][]api.Domain) {
		t.Helper()
		var all [2][]known // of both at once: what is seen may not last
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			for i, d := range daemons {
				seen[i], all[i] = d.runs(uuid)
			}
			if slices.Equal(all[0], want[0]) && slices.Equal(all[1], want[1]) {
				break
			}
		}
		for i, d := range daemons {
			got := all[i]
			for _, x := range seen[i] {
				t.Logf("%s, at the %s: id %s tgid %d %s by %s: %v", what, at[i], id(x), x.TGID, x.State, x.Source, counts(x))
			}
			if diff := gocmp.Diff(want[i], got); diff != "" {
				t.Errorf("%s, at the %s (-want +got):\n%s", what, at[i], diff)
				continue
			}
			for _, x := range []api.Domain{d.total(name), d.find(uuid)} {
				if x.TGID == want[i][meant[i]].TGID && x.Count >= seen[i][meant[i]].Count && (x.Since != nil) == want[i][meant[i]].Counted {
					continue
				}
				if _, now := d.runs(uuid); !slices.Equal(now, want[i]) {
					t.Logf("%s, at the %s: it has moved on: %+v", what, at[i], now)
					continue
				}
				t.Errorf("%s, at the %s: it is %+v", what, at[i], x)
			}
		}
		return seen
	}

	virsh(t, "define", define(t, domain{name: name, uuid: uuid, os: rom(t, program, false)}))
	t.Cleanup(func() {
		for _, args := range [][]string{{there.uri, "destroy"}, {system, "destroy"}, {system, "undefine"}} {
			exec.Command("virsh", "-c", args[0], args[1], name).Run()
		}
	})
	virsh(t, "start", name)
	source := pid(t, "/run/libvirt", name)
	see("running", [2][]known{
		{{source, true, "running", "libvirt", true}},
		{{source, false, "running", "proc", true}},
	}, [2]int{})
	// It shall run all the while, and leave the processor to those who work.
	for _, v := range daemons[0].find(name).VCPUs {
		if err := syscall.Setpriority(syscall.PRIO_PROCESS, v.TID, 19); err != nil {
			t.Fatal(err)
		}
	}

	migrate := exec.Command("virsh", "-c", system, "migrate", "--live", "--bandwidth", "1", name, there.uri, "--migrateuri", "tcp://127.0.0.1")
	var said bytes.Buffer
	migrate.Stdout, migrate.Stderr = &said, &said
	if err := migrate.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { migrate.Process.Kill() })
	destination := pid(t, there.run, name)
	moving := see("moving", [2][]known{
		{{source, true, "running", "libvirt", true}, {destination, false, "running", "proc", false}},
		{{source, false, "running", "proc", true}, {destination, true, "paused", "libvirt", false}},
	}, [2]int{0, 1})
	virsh(t, "migrate-setspeed", name, "1000")
	if err := migrate.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, &said)
	}
	want := [2][]known{
		{{0, false, "shut off", "libvirt", true}, {destination, false, "running", "proc", true}},
		{{0, false, "shut off", "proc", true}, {destination, true, "running", "libvirt", true}},
	}
	migrated := see("migrated", want, [2]int{1, 1})
	for _, d := range daemons {
		inside.Eventually(t, "the program ends", 2*time.Minute, func() bool { return counts(d.find(name))["hlt"] == 1 })
	}
	ended := see("ended", want, [2]int{1, 1})
	if t.Failed() {
		t.FailNow()
	}
	for i, d := range daemons {
		was, past, now := moving[i][0], ended[i][0], ended[i][1]
		if diff := gocmp.Diff(counts(migrated[i][0]), counts(past)); diff != "" {
			t.Errorf("at the %s, the past run (-migrated +ended):\n%s", at[i], diff)
		}
		if n, m := counts(past), counts(now); n["cpuid"] <= counts(was)["cpuid"] || m["cpuid"] == 0 || n["cpuid"]+m["cpuid"] != cpuid || n["hlt"] != 0 {
			t.Errorf("at the %s: %v in the source after %v, and %v in the destination, of %d", at[i], n, counts(was), m, cpuid)
		}
		if n := kvmExits(t, there.uri, name, 0); now.Count != n {
			t.Errorf("at the %s: %d exits, KVM says %d", at[i], now.Count, n)
		}
		if s := d.conserve(); s.Unattributed != 0 || s.Missed != 0 || s.Exits != past.Count+now.Count {
			t.Errorf("at the %s: %+v", at[i], s)
		}
	}

	virshAt(t, there.uri, "destroy", name)
	see("destroyed", [2][]known{
		{{0, false, "shut off", "libvirt", true}, {0, false, "shut off", "proc", true}},
		{{0, false, "shut off", "proc", true}, {0, false, "shut off", "libvirt", true}},
	}, [2]int{1, 1})
	for _, d := range daemons {
		d.conserve()
	}
}
