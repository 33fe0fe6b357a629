// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/test/lab/inside"
	"virtexit/test/vdsm"
)

// vmStats is what the hook adds to the statistics of a VM, of which the test
// looks at this.
type vmStats struct {
	VMID  string `json:"vmId"`
	Exits *struct {
		Level   string
		Total   uint64
		Reasons []struct {
			Reason string
			Count  uint64
			TimeNS uint64 `json:"time_ns"`
		}
		Other struct{ Count uint64 }
		Time  api.Times
	} `json:"kvmExits"`
}

func gid(t *testing.T, name string) uint32 {
	t.Helper()
	group, err := user.LookupGroup(name)
	if err != nil {
		t.Fatal(err)
	}
	number, err := strconv.ParseUint(group.Gid, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(number)
}

// TestVDSM has hooks run as VDSM does, by a user who is not root.
func TestVDSM(t *testing.T) {
	inside.Load(t, "")
	script := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
	}
	script("../../../configs/vdsm/groups")
	if _, err := user.Lookup("vdsm"); err == nil {
		t.Fatal("configs/vdsm/groups has made a user for VDSM")
	}
	script("useradd", "--system", "--uid", "36", "--gid", "kvm", "vdsm")
	script("../../../configs/vdsm/groups")
	self := &syscall.Credential{Uid: 36, Gid: gid(t, "kvm"), Groups: []uint32{gid(t, "libvirt"), gid(t, "virtexit-admin")}}
	if out, err := exec.Command("id", "-G", "vdsm").Output(); err != nil || strings.TrimSpace(string(out)) != strings.Trim(fmt.Sprint(append([]uint32{self.Gid}, self.Groups...)), "[]") {
		t.Errorf("groups of vdsm: %s, %v, want %d %d", out, err, self.Gid, self.Groups)
	}
	d := start(t, options{wrapper: []string{"env", "VIRTEXIT_GROUP=libvirt", "VIRTEXIT_ADMIN_GROUP=virtexit-admin"}})
	root := t.TempDir()
	for _, dir := range []string{root, filepath.Dir(d.socket)} {
		for _, dir := range []string{dir, filepath.Dir(dir)} {
			if err := os.Chmod(dir, 0o777|fs.ModeSticky); err != nil {
				t.Fatal(err)
			}
		}
	}
	script("../../../configs/vdsm/install", filepath.Join(bin, "virtexit-vdsm-hook"), root)
	member := func(groups ...uint32) *vdsm.Host {
		return &vdsm.Host{
			Hooks: filepath.Join(root, "usr/libexec/vdsm/hooks"),
			Tmp:   root,
			User:  &syscall.Credential{Uid: self.Uid, Gid: self.Gid, Groups: groups},
			Env:   []string{"VIRTEXIT_SOCKET=" + d.socket},
		}
	}
	host := member(self.Groups...)
	inside.Eventually(t, "the hook's own test passes", 20*time.Second, func() bool {
		out, err := exec.Command("runuser", "-u", "vdsm", "--", "env", "VIRTEXIT_SOCKET="+d.socket, filepath.Join(root, "usr/libexec/virtexit-vdsm-hook"), "-t").Output()
		return err == nil && strings.Count(string(out), "test pass: ") == 4
	})
	// The machine is emulated: the hook's limit may be too short for it.
	again := func(t *testing.T, what string, try func() ([]vdsm.Run, error)) (said string) {
		t.Helper()
		inside.Eventually(t, what, 30*time.Second, func() bool {
			runs, err := try()
			if err != nil || len(runs) != 1 || runs[0].Status != 0 {
				t.Fatalf("%s: %+v, %v", what, runs, err)
			}
			said = runs[0].Stderr
			return !strings.Contains(said, "not done within")
		})
		return said
	}
	edit := func(t *testing.T, h *vdsm.Host, point, text string) (after, said string) {
		t.Helper()
		said = again(t, point, func() ([]vdsm.Run, error) {
			out, runs, err := h.Edit(point, []byte(text))
			after = string(out)
			return runs, err
		})
		return after, said
	}
	tell := func(t *testing.T, h *vdsm.Host, point, uuid, level string) string {
		t.Helper()
		return again(t, point, func() ([]vdsm.Run, error) {
			return h.Tell(point, vdsm.VM{ID: uuid, XML: "<domain/>", Custom: map[string]string{"virtexit": level}})
		})
	}

	uuids := []string{"aaaaaaaa-3333-4333-8333-000000000001", "aaaaaaaa-3333-4333-8333-000000000002"}
	texts := []string{}
	for i, uuid := range uuids {
		n := 400 + i
		create(t, domain{name: fmt.Sprint("vdsm", i), uuid: uuid, os: rom(t, fmt.Sprintf("cpuid:%d,out:0x80:%d", n, 2*n), false)})
		inside.Eventually(t, "its exits are counted", 30*time.Second, func() bool { return counts(d.total(uuid))["io"] == uint64(2*n) })
		texts = append(texts, fmt.Sprintf(`{"nan": NaN, "vmId": %q, "big": 123456789012345678901}`, uuid))
	}
	texts = append(texts, `{"vmId": "aaaaaaaa-3333-4333-8333-000000000003"}`)
	all := "[" + strings.Join(texts, ", ") + "]"

	// check compares what was added to a text with what the command line says.
	check := func(t *testing.T, after, before string, uuids ...string) bool {
		t.Helper()
		var vms []vmStats
		if err := json.Unmarshal([]byte(strings.ReplaceAll(after, "NaN", "null")), &vms); err != nil {
			t.Fatalf("%v in %s", err, after)
		}
		for i, uuid := range uuids {
			got, want := vms[i].Exits, d.total(uuid)
			if got == nil || vms[i].VMID != uuid {
				t.Fatalf("VM %s: %+v", uuid, vms[i])
			}
			if got.Total != want.Count { // counted since the latest snapshot, which statistics are of
				return false
			}
			sum := got.Other.Count
			times := map[string]uint64{}
			for _, e := range want.Exits {
				times[e.Reason] += e.TimeNS
			}
			for _, r := range got.Reasons {
				sum += r.Count
				if r.Count != counts(want)[r.Reason] || r.TimeNS != times[r.Reason] {
					t.Errorf("VM %s: %+v, want %d in %d ns", uuid, r, counts(want)[r.Reason], times[r.Reason])
				}
			}
			if sum != want.Count || len(got.Reasons) < 2 || got.Level != want.Level || got.Time.Sum() == 0 {
				t.Errorf("VM %s: %+v, want %+v", uuid, got, want)
			}
		}
		rest := after
		for range uuids {
			begin := strings.Index(rest, `, "kvmExits": `)
			value := json.NewDecoder(strings.NewReader(rest[begin+len(`, "kvmExits": `):]))
			var skip json.RawMessage
			if err := value.Decode(&skip); err != nil {
				t.Fatal(err)
			}
			rest = rest[:begin] + rest[begin+len(`, "kvmExits": `)+len(skip):]
		}
		if rest != before {
			t.Errorf("more was changed (-before +after)\n%s", cmp.Diff(before, rest))
		}
		return true
	}
	for _, tt := range []struct {
		point, text string
		uuids       []string
	}{
		{"after_get_all_vm_stats", all, uuids},
		{"after_get_vm_stats", "[" + texts[0] + "]", uuids[:1]},
		{"after_get_vm_stats", "[" + texts[1] + "]", uuids[1:]},
		{"after_get_vm_stats", "[" + texts[2] + "]", nil},
	} {
		inside.Eventually(t, tt.point+" says what the command line does", 20*time.Second, func() bool {
			after, said := edit(t, host, tt.point, tt.text)
			return said == "" && check(t, after, tt.text, tt.uuids...)
		})
	}
	after, said := edit(t, host, "after_get_caps", `{"big": 1e400}`)
	s := d.status()
	want := fmt.Sprintf(`{"big": 1e400, "kvmExits": {"schema":"virtexit-vdsm/v1","version":%q,"collection":"on","level":"time","collector":"kmod","hook":%q,"isa":%q,"problem":null}}`, s.Version, s.Hook, s.ISA)
	if after != want || said != "" {
		t.Errorf("capabilities\ngot  %s\nwant %s\n%s", after, want, said)
	}

	level := func() string { return strings.TrimSpace(d.ok("level", uuids[0])) }
	for _, tt := range []struct{ point, level string }{{"after_vm_start", "recent"}, {"after_vm_migrate_destination", "count"}, {"after_vm_cont", "off"}} {
		said := tell(t, host, tt.point, uuids[0], tt.level)
		if got, want := level(), "level of domain 'vdsm0' is "+tt.level; got != want || said != "" {
			t.Errorf("%s: %s, want %s; %s", tt.point, got, want, said)
		}
	}
	reader, stranger := member(self.Groups[0]), member()
	if after, said := edit(t, reader, "after_get_vm_stats", "["+texts[1]+"]"); !strings.Contains(after, "kvmExits") {
		t.Errorf("a reader is told %s", said)
	}
	if after, said := edit(t, stranger, "after_get_vm_stats", "["+texts[1]+"]"); after != "["+texts[1]+"]" || !strings.Contains(said, "permission denied: it takes root or membership of group 'libvirt'") {
		t.Errorf("a stranger is told %s\n%s", said, after)
	}
	for host, want := range map[*vdsm.Host]string{
		reader:   fmt.Sprintf("virtexit: VM %s: level time is not set: switching collection needs root or membership of group 'virtexit-admin'\n", uuids[0]),
		stranger: fmt.Sprintf("virtexit: VM %s: level time is not set: cannot connect to virtexitd", uuids[0]),
	} {
		if said := tell(t, host, "after_vm_start", uuids[0], "time"); !strings.HasPrefix(said, want) {
			t.Errorf("said %q, want %q", said, want)
		}
	}
	if got := level(); got != "level of domain 'vdsm0' is off" {
		t.Error(got)
	}
}
