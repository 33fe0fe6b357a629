// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/test/lab/inside"
)

const novaNS = "http://openstack.org/xmlns/libvirt/nova/1.1"

const nova = `<title>first, &quot;title&quot;</title><metadata><nova:instance xmlns:nova="` + novaNS + `"><nova:name>web 1</nova:name><nova:flavor name="m1.tiny"/>` +
	`<nova:owner><nova:user uuid="u1">alice</nova:user><nova:project uuid="p1">shop</nova:project></nova:owner></nova:instance></metadata>`

// qemuROM starts a guest by hand that executes a program.
func qemuROM(t *testing.T, program string, args ...string) int {
	t.Helper()
	_, file, _ := strings.Cut(rom(t, program, false), ">")
	file, _, _ = strings.Cut(file, "<")
	return qemu(t, append(args, "-bios", file)...).Process.Pid
}

// TestNames has domains whose names are easily mistaken, and processes that
// pretend to be one. Each executes CPUID a number of times of its own.
func TestNames(t *testing.T) {
	inside.Load(t, "")
	d := start(t, options{})
	uuid := func(n int) string { return fmt.Sprintf("aaaaaaaa-2222-4222-8222-%012d", n) }
	var domains []domain
	cpuid := func(n int) int { return 1000 + n } // of the domain n
	add := func(name, more string) domain {
		n := len(domains)
		x := domain{name: name, uuid: uuid(n), os: rom(t, fmt.Sprintf("cpuid:%d", cpuid(n)), false), more: more}
		create(t, x)
		domains = append(domains, x)
		return x
	}
	vm1 := add("vm1", "")
	vm10 := add("vm10", "")
	number := add(virsh(t, "domid", vm1.uuid), "")
	another := add(vm10.uuid, "")
	add(`comma, "quote" 'tick' & <tag>`, "")
	add("a,,b,guest=c", "")
	// libvirt 9.0 cuts names after 20 bytes for its directories, be it within a letter.
	add("虚拟机 é e\u0301", "")
	add("שלום 🦊 $(x)", "")
	add("-x", "")
	long := add(strings.Repeat("n", 200), "")
	add("renamed", "<qemu:commandline><qemu:arg value='-name'/><qemu:arg value='guest=vm10'/></qemu:commandline>")
	owned := add("instance-00000001", nova)

	const commas = "by, hand,,=x"
	byHand := qemuROM(t, "cpuid:2001", "-name", "guest="+strings.ReplaceAll(commas, ",", ",,")+",debug-threads=on")
	impostor := qemuROM(t, "cpuid:2002", "-name", "guest=vm1,debug-threads=on", "-uuid", vm1.uuid)
	swtpm := exec.Command("sh")
	swtpm.Args = []string{"swtpm", "-c", "read line", "socket", "--tpmstate", "dir=/var/lib/libvirt/swtpm/" + vm1.uuid, "-name", "guest=vm1", "-uuid", vm1.uuid}
	stdin, err := swtpm.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := swtpm.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close(); swtpm.Wait() })

	list := func() []api.Domain {
		t.Helper()
		list, err := d.api.Domains(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return list.Domains
	}
	inside.Eventually(t, "all are done and known", 2*time.Minute, func() bool {
		all, known := list(), 0
		for _, x := range all {
			if counts(x)["hlt"] == 1 && (x.ID != nil || x.TGID == byHand || x.TGID == impostor) {
				known++
			}
		}
		return len(all) == len(domains)+2 && known == len(all)
	})

	// is compares what was found with the domain n.
	is := func(t *testing.T, how string, got api.Domain, n int) {
		t.Helper()
		want := domains[n]
		if got.Name != want.name || got.UUID == nil || *got.UUID != want.uuid || got.ID == nil || got.Source != "libvirt" || counts(got)["cpuid"] != uint64(cpuid(n)) {
			t.Errorf("%s is %+v, want %q with %d times CPUID", how, got, want.name, cpuid(n))
		}
	}
	t.Run("by reference", func(t *testing.T) {
		for n, x := range domains {
			id := virsh(t, "domid", x.uuid)
			refs := []string{id, x.uuid, strings.ToUpper(x.uuid)}
			if x.name != number.name && x.name != another.name {
				refs = append(refs, x.name)
			}
			for _, ref := range refs {
				r := decode[api.Report](t, d.ok("report", "--total", "--format", "json", "--", ref))
				if len(r.Domains) != 1 {
					t.Fatalf("report of %q: %+v", ref, r)
				}
				is(t, "report of "+ref, r.Domains[0], n)
				one, err := httpClient(d).Get("http://localhost/v1/domains/" + url.PathEscape(ref))
				if err != nil {
					t.Fatal(err)
				}
				var got api.OneDomain
				err = json.NewDecoder(one.Body).Decode(&got)
				one.Body.Close()
				if err != nil {
					t.Fatal(err)
				}
				is(t, "GET of "+ref, got.Domain, n)
			}
		}
	})
	t.Run("precedence", func(t *testing.T) {
		is(t, "the number", d.total(number.name), 0)
		is(t, "the uuid as name", d.total(another.name), 1)
	})
	t.Run("by hand", func(t *testing.T) {
		got := d.total(commas)
		if got.TGID != byHand || got.ID != nil || got.UUID != nil || got.Source != "proc" || counts(got)["cpuid"] != 2001 {
			t.Errorf("%+v", got)
		}
		n := 0
		for _, x := range list() {
			switch {
			case x.UUID == nil || *x.UUID != vm1.uuid:
			case x.TGID == impostor:
				n++
				if x.ID != nil || x.Source != "proc" || counts(x)["cpuid"] != 2002 {
					t.Errorf("impostor: %+v", x)
				}
			default:
				n++
				is(t, "vm1", x, 0)
			}
			if x.TGID == swtpm.Process.Pid {
				t.Errorf("swtpm is a guest: %+v", x)
			}
		}
		if n != 2 {
			t.Errorf("%d domains with the uuid of vm1, want its own and the impostor", n)
		}
	})
	t.Run("formats", func(t *testing.T) {
		var want []string
		for _, x := range domains {
			want = append(want, x.name)
		}
		want = append(want, commas, "vm1")
		slices.Sort(want)
		for _, args := range [][]string{{"list"}, {"report", "--total", "--by", "vcpu"}} {
			var got []string
			for _, row := range records(t, d.ok(append(args, "--format", "csv")...)) {
				got = append(got, row["name"])
			}
			slices.Sort(got)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%q as CSV (-want +got)\n%s", args, diff)
			}
			got = nil
			for _, x := range decode[api.Domains](t, d.ok(append(args, "--format", "json")...)).Domains {
				got = append(got, x.Name)
			}
			slices.Sort(got)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%q as JSON (-want +got)\n%s", args, diff)
			}
		}
		table := d.ok("list")
		if lines := strings.Count(table, "\n"); lines != 2+len(want) {
			t.Errorf("%d lines in\n%s", lines, table)
		}
		t.Logf("list:\n%s", table)
		if heading := d.ok("report", "--total", long.name); !strings.HasPrefix(heading, "Domain '"+long.name+"', id ") {
			t.Errorf("report:\n%s", heading)
		}
	})
	t.Run("completion", func(t *testing.T) {
		words := strings.Split(strings.TrimSuffix(d.ok("__complete", "report", ""), "\n"), "\n")
		if last := words[len(words)-1]; last != ":4" {
			t.Errorf("directive %s", last)
		}
		var got []int
		for _, word := range words[:len(words)-1] {
			word, _, _ = strings.Cut(word, "\t")
			got = append(got, d.find(word).TGID)
		}
		var want []int
		for _, x := range list() {
			want = append(want, x.TGID)
		}
		slices.Sort(got)
		slices.Sort(want)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("processes (-want +got)\n%s\nof %q", diff, words)
		}
	})
	t.Run("title and owner", func(t *testing.T) {
		row := func() map[string]string {
			for _, row := range records(t, d.ok("list", "--title", "--owner", "--format", "csv")) {
				if row["uuid"] == owned.uuid {
					return row
				}
			}
			return nil
		}
		got := row()
		for key, want := range map[string]string{"title": `first, "title"`, "cloud": "nova", "cloud_name": "web 1", "instance_uuid": owned.uuid,
			"project": "shop", "project_id": "p1", "user": "alice", "user_id": "u1", "flavor": "m1.tiny"} {
			if got[key] != want {
				t.Errorf("%s is %q, want %q", key, got[key], want)
			}
		}
		if table := d.ok("list", "--title", "--owner"); !strings.Contains(table, `first, "title"`) || !strings.Contains(table, "nova shop (alice)") {
			t.Errorf("\n%s", table)
		} else {
			t.Logf("list:\n%s", table)
		}
		before := counts(d.find(owned.uuid))
		virsh(t, "desc", owned.uuid, "--live", "--title", "second")
		took := inside.Eventually(t, "the title has changed", 20*time.Second, func() bool { return row()["title"] == "second" })
		t.Logf("title after %v", took)
		virsh(t, "metadata", owned.uuid, "--live", "--uri", novaNS, "--key", "nova",
			"--set", "<instance><name>web 2</name><owner><project uuid='p1'>shop</project></owner></instance>")
		inside.Eventually(t, "the cloud's name has changed", 20*time.Second, func() bool { return row()["cloud_name"] == "web 2" })
		if got := row(); got["title"] != "second" || got["project"] != "shop" {
			t.Errorf("%v", got)
		}
		if diff := cmp.Diff(before, counts(d.find(owned.uuid))); diff != "" {
			t.Errorf("counts (-before +after)\n%s", diff)
		}
	})
	t.Run("conservation", func(t *testing.T) {
		if s := d.conserve(); s.Unattributed != 0 || s.Missed != 0 {
			t.Errorf("%+v", s)
		}
		var want, sum uint64
		for n := range domains {
			want += uint64(cpuid(n))
		}
		for _, x := range list() {
			sum += counts(x)["cpuid"]
		}
		if want += 2001 + 2002; sum != want {
			t.Errorf("%s times CPUID, want %d", strconv.FormatUint(sum, 10), want)
		}
	})
}
