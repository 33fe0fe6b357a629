// SPDX-License-Identifier: Apache-2.0

package vmmap

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

var private = cmp.AllowUnexported(stat{}, args{}, status{}, record{})

// recorded adds the recorded files that match to a fuzz target's corpus.
func recorded(f *testing.F, pattern string) {
	files, err := filepath.Glob(filepath.Join("testdata/host", pattern))
	if err != nil || len(files) == 0 {
		f.Fatalf("no %s: %v", pattern, err)
	}
	for _, file := range files {
		f.Add(read(f, file))
	}
}

func read(t testing.TB, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParseStat(t *testing.T) {
	// The 18 fields between name and start, with the fields for state and threads.
	line := func(comm, state, threads, start string) string {
		return "7 (" + comm + ") " + state + strings.Repeat(" 1", 16) + " " + threads + " 0 " + start + " 99 99\n"
	}
	for _, test := range []struct {
		name, in string
		want     stat
		dead, ok bool
	}{
		{"recorded", string(read(t, "testdata/host/proc/201/stat")), stat{"qemu-system-x86", 'S', 1, 5, 2226}, false, true},
		{"spaces", line("a b", "R", "2", "8"), stat{"a b", 'R', 1, 2, 8}, false, true},
		{"parentheses", line(") R 1 (", "R", "2", "8"), stat{") R 1 (", 'R', 1, 2, 8}, false, true},
		{"newline", line("a\nb", "R", "2", "8"), stat{"a\nb", 'R', 1, 2, 8}, false, true},
		{"zombie", line("z", "Z", "1", "8"), stat{"z", 'Z', 1, 1, 8}, true, true},
		{"first thread ended", line("z", "Z", "3", "8"), stat{"z", 'Z', 1, 3, 8}, false, true},
		{"empty", "", stat{}, false, false},
		{"no name", "7 S 1", stat{}, false, false},
		{"name the wrong way round", "7 )a( S 1", stat{}, false, false},
		{"cut", line("a", "R", "2", "8")[:30], stat{}, false, false},
		{"start not a number", line("a", "R", "2", "x"), stat{}, false, false},
		{"parent not a number", strings.Replace(line("a", "R", "2", "8"), "R 1", "R x", 1), stat{}, false, false},
		{"threads not a number", line("a", "R", "x", "8"), stat{}, false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := parseStat([]byte(test.in))
			if diff := cmp.Diff(test.want, got, private); diff != "" || (err == nil) != test.ok {
				t.Errorf("error %v (-want +got)\n%s", err, diff)
			}
			if got.dead() != test.dead {
				t.Errorf("dead() = %v", got.dead())
			}
		})
	}
}

func FuzzStat(f *testing.F) {
	recorded(f, "proc/*/stat")
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseStat(b); err == nil && !strings.Contains(string(b), "("+s.comm+")") {
			t.Errorf("name %q", s.comm)
		}
	})
}

func TestParseCmdline(t *testing.T) {
	const uuid = "11111111-2222-4333-8444-0000000000cc"
	other := func(a ...string) string { return strings.Join(a, "\x00") + "\x00" }
	argv := func(a ...string) string { return other(append([]string{"qemu"}, a...)...) }
	for _, test := range []struct {
		name, in string
		want     args
	}{
		{"by libvirt", string(read(t, "testdata/host/proc/201/cmdline")), args{"vm1", "11111111-2222-4333-8444-000000000001"}},
		{"comma, quotes", string(read(t, "testdata/host/proc/224/cmdline")), args{`web, "db" é 1`, uuid}},
		{"by hand", string(read(t, "testdata/host/proc/241/cmdline")), args{"plain", ""}},
		{"old name", string(read(t, "testdata/host/proc/250/cmdline")), args{"old style", "99999999-2222-4333-8444-000000000009"}},
		{"libvirtd", string(read(t, "testdata/host/proc/133/cmdline")), args{}},
		{"two dashes", argv("--name", "a", "--uuid", uuid), args{"a", uuid}},
		{"upper case", argv("-uuid", strings.ToUpper(uuid)), args{"", uuid}},
		{"last wins", argv("-name", "a", "-name", "b"), args{"b", ""}},
		{"guest not first", argv("-name", "debug-threads=on,guest=a"), args{"a", ""}},
		{"no guest", argv("-name", "debug-threads=on"), args{}},
		{"flag after name", argv("-name", "a,debug-threads"), args{"a", ""}},
		{"equals sign", argv("-name", "guest=a=b"), args{"a=b", ""}},
		{"commas", argv("-name", "guest=,,a,,,,b,,,process=c"), args{",a,,b,", ""}},
		{"last comma", argv("-name", "a,"), args{"a", ""}},
		{"not UTF-8", argv("-name", "a\xffb\xe8\x99"), args{"a\ufffdb\ufffd", ""}},
		{"uuid in a value", argv("-smbios", "type=1,uuid="+uuid), args{}},
		{"uuid like swtpm", argv("--tpmstate", "dir=/x/"+uuid), args{}},
		{"kernel arguments", argv("-append", "-name", "b", "-append", "-uuid", uuid), args{}},
		{"bad uuid", argv("-uuid", "11111111-2222"), args{}},
		{"no value", argv("-name"), args{}},
		{"program called -name", "-name\x00a\x00", args{}},
		{"Firecracker", other("/usr/bin/firecracker", "--api-sock", "/run/x.sock", "--id", "web-1"), args{"web-1", ""}},
		{"Firecracker, by its version", other("/firecracker-v1.7.0-x86_64", "--id=web-1"), args{"web-1", ""}},
		{"Firecracker without id", other("firecracker", "--api-sock", "/run/x.sock"), args{}},
		{"Firecracker, no value", other("firecracker", "--id"), args{}},
		{"Cloud Hypervisor", other("cloud-hypervisor", "--api-socket", "/run/ch/web 1.sock"), args{"web 1", ""}},
		{"Cloud Hypervisor, static, path=", other("cloud-hypervisor-static", "--api-socket=path=/run/web.v2.sock"), args{"web.v2", ""}},
		{"Cloud Hypervisor of Kata", other("/opt/kata/bin/cloud-hypervisor", "--api-socket", "/run/vc/vm/0123abc/clh-api.sock"), args{"0123abc", ""}},
		{"Cloud Hypervisor, file descriptor", other("cloud-hypervisor", "--api-socket", "fd=3"), args{}},
		{"Cloud Hypervisor, root", other("cloud-hypervisor", "--api-socket", "/api.sock"), args{}},
		{"QEMU's --id is another", argv("--id", "a", "--api-socket", "/b.sock"), args{}},
		{"empty", "", args{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, parseCmdline([]byte(test.in)), private); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func FuzzCmdline(f *testing.F) {
	recorded(f, "proc/*/cmdline")
	f.Add([]byte("firecracker\x00--id\x00a\x00"))
	f.Add([]byte("cloud-hypervisor\x00--api-socket\x00path=/run/a/api.sock\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if a := parseCmdline(b); a.uuid != "" && parseUUID(a.uuid) != a.uuid || !utf8.ValidString(a.name) {
			t.Errorf("%q", a)
		}
		if name := socketName(string(b)); strings.Contains(name, "/") {
			t.Errorf("name %q of a socket", name)
		}
	})
}

// FuzzName gives a name to QEMU as libvirt would, and reads it back.
func FuzzName(f *testing.F) {
	f.Add("a")
	f.Add(`web, "db" é 1`)
	f.Add(",,a=b,")
	f.Fuzz(func(t *testing.T, name string) {
		option := "guest=" + strings.ReplaceAll(name, ",", ",,") + ",debug-threads=on"
		if got := parseName(option); got != name {
			t.Errorf("%q from %q", got, option)
		}
		parseName(name)
	})
}

func TestParseUUID(t *testing.T) {
	const want = "01234567-89ab-cdef-0123-456789abcdef"
	for in, want := range map[string]string{
		want:                               want,
		strings.ToUpper(want):              want,
		strings.ReplaceAll(want, "-", ""):  want,
		want[1:]:                           "",
		want + "0":                         "",
		strings.Replace(want, "a", "g", 1): "",
		"":                                 "",
	} {
		if got := parseUUID(in); got != want {
			t.Errorf("parseUUID(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestParseStatus(t *testing.T) {
	two := 2
	const body = `<domain id='2'><name>a</name><uuid>11111111-2222-4333-8444-00000000000a</uuid></domain></domstatus>`
	for _, test := range []struct {
		name, in string
		want     *status
	}{
		{"paused", string(read(t, "testdata/host/run/libvirt/qemu/vm10.xml")), &status{
			pid: 214, id: &two, name: "vm10", uuid: "11111111-2222-4333-8444-00000000000a", state: Paused, vcpus: map[int]int{219: 0}, Metadata: titled}},
		{"no vcpus", `<domstatus state='pmsuspended' pid='5'>` + body, &status{
			pid: 5, id: &two, name: "a", uuid: "11111111-2222-4333-8444-00000000000a", state: Suspended}},
		{"vcpu without thread", `<domstatus state='x' pid='5'><vcpus><vcpu id='0' pid='0'/></vcpus>` + body, &status{
			pid: 5, id: &two, name: "a", uuid: "11111111-2222-4333-8444-00000000000a"}},
		{"no pid", `<domstatus state='running'>` + body, nil},
		{"pid not a number", `<domstatus state='running' pid='x'>` + body, nil},
		{"no name", `<domstatus pid='5'><domain><uuid>11111111-2222-4333-8444-00000000000a</uuid></domain></domstatus>`, nil},
		{"no uuid", `<domstatus pid='5'><domain><name>a</name></domain></domstatus>`, nil},
		{"another file", `<domain><name>a</name></domain>`, nil},
		{"cut", `<domstatus state='running' pid='5'>`, nil},
		{"empty", ``, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := parseStatus([]byte(test.in))
			if diff := cmp.Diff(test.want, got, private); diff != "" || (err == nil) != (test.want != nil) {
				t.Errorf("error %v (-want +got)\n%s", err, diff)
			}
		})
	}
}

func FuzzStatus(f *testing.F) {
	recorded(f, "run/libvirt/qemu/*.xml")
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseStatus(b); err == nil && (s.pid <= 0 || s.name == "" || parseUUID(s.uuid) != s.uuid) {
			t.Errorf("%+v", s)
		}
	})
}
