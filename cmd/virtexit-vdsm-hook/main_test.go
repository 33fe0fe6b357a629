// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/internal/server"
	"virtexit/test/stranger"
	"virtexit/test/vdsm"
)

var update = flag.Bool("update", false, "write the golden files")

// vdsmID is the number of VDSM's user, and here of its group.
const vdsmID = 36

// startup is what a process takes until the time it is limited to begins, on a
// machine with much else to do.
const startup = time.Second

// built is the hook, installed where the repository's script puts it.
var built struct {
	root string
	err  error
}

func TestMain(m *testing.M) {
	os.Exit(func() int {
		flag.Parse()
		dir, err := os.MkdirTemp("", "")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		os.Chmod(dir, 0o755) // to a user of VDSM
		built.root = filepath.Join(dir, "root")
		binary := filepath.Join(dir, "hook")
		for _, command := range []*exec.Cmd{
			exec.Command("go", "build", "-o", binary, "."),
			exec.Command("../../configs/vdsm/install", binary, built.root),
		} {
			command.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := command.CombinedOutput(); err != nil && built.err == nil {
				built.err = fmt.Errorf("%q: %w\n%s", command.Args, err, out)
			}
		}
		return m.Run()
	}())
}

// host is a VDSM that has the hook.
func host(t *testing.T, socket string) *vdsm.Host {
	t.Helper()
	if built.err != nil {
		t.Fatal(built.err)
	}
	h := &vdsm.Host{
		Hooks: filepath.Join(built.root, "usr/libexec/vdsm/hooks"),
		Tmp:   t.TempDir(),
		Env:   []string{"VIRTEXIT_SOCKET=" + socket},
	}
	if os.Getuid() == 0 {
		h.User = &syscall.Credential{Uid: vdsmID, Gid: vdsmID}
		// Of a test's folder, only the upper part is closed to others.
		for _, dir := range []string{h.Tmp, filepath.Dir(h.Tmp)} {
			if err := os.Chmod(dir, 0o777|fs.ModeSticky); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chown(socket, vdsmID, vdsmID); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if left, err := os.ReadDir(h.Tmp); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	})
	return h
}

// backend answers from memory. What it is not asked for here panics.
type backend struct {
	server.Backend
	status  api.Status
	domains []api.Domain
	mu      sync.Mutex
	unknown int               // so often a domain whose level is set is not known
	set     map[string]string // levels by name
}

func (b *backend) Status() api.Status   { return b.status }
func (b *backend) Domains() api.Domains { return api.Domains{Domains: b.domains} }

func (b *backend) SetDomainLevel(name string, level *string) (api.DomainLevel, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.unknown--; b.unknown >= 0 {
		if b.unknown%2 == 0 {
			return api.DomainLevel{}, &api.ConflictError{Reason: "its past run is not running"}
		}
		return api.DomainLevel{}, &api.NotFoundError{Domain: name}
	}
	if _, err := api.Find(b.domains, name); err != nil {
		return api.DomainLevel{}, err
	}
	b.set[name] = *level
	return api.DomainLevel{Domain: name, Level: level}, nil
}

// serve answers from b and returns the socket.
func serve(t *testing.T, b *backend, o server.Options) string {
	t.Helper()
	dir := t.TempDir()
	os.Chmod(filepath.Dir(dir), 0o755)
	path := filepath.Join(dir, "sock")
	l, err := server.Listen(path, "", 0o660)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- server.New(b, o).Serve(ctx, l) }()
	t.Cleanup(func() { cancel(); <-served })
	return path
}

func ptr[T any](v T) *T { return &v }

const uuid = "11111111-2222-4333-8444-555555555555" // of testdata/vmstats.json

// busy is a domain with many reasons.
func busy(uuid string, reasons int) api.Domain {
	since := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	d := api.Domain{
		ID: ptr(7), Name: "shop-db", UUID: &uuid, TGID: 4711, State: "running", Source: "libvirt", Level: "time", Since: &since,
		WallNS: 9e9, SpanNS: 8e9, Rate: 1234.5, RateNS: 1e9,
		Time: api.Times{GuestNS: 5e9, KVMNS: 1e9, UserNS: 5e8, PollNS: 2e8, HaltedNS: 3e9, WaitNS: 1e8, OutsideNS: 2e8},
	}
	d.TimePct = d.Time.Pct()
	for i := range reasons {
		n := uint64(1000 - i)
		d.Exits = append(d.Exits, api.Exit{ISA: "svm", Code: uint32(i), Reason: fmt.Sprintf("reason-%d", i), Count: n, Rate: float64(n) / 8, TimeNS: n * 2000,
			MeanNS: ptr(uint64(2000)), P50NS: ptr(uint64(1500)), P99NS: ptr(uint64(9000)), MaxNS: ptr(uint64(20000))})
		d.Count += n
	}
	for i := range 8 {
		d.VCPUs = append(d.VCPUs, api.VCPU{ID: i, TID: 4712 + i, Exits: d.Count / 8, Time: d.Time, GuestNS: d.Time.GuestNS})
	}
	return d
}

func testdata(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// added takes out of a text what hooks put into it.
func added(t *testing.T, text []byte) (rest []byte, values []json.RawMessage) {
	t.Helper()
	objects, _, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	var edits []edit
	for _, o := range objects {
		v, ok := o.values[key]
		if !ok {
			values = append(values, nil)
			continue
		}
		values = append(values, json.RawMessage(bytes.Clone(text[v.from:v.to])))
		edits = append(edits, edit{span: span{v.from - len(`, "kvmExits": `), v.to}})
	}
	return apply(text, edits), values
}

// late is what the hook says when virtexitd did not answer in time.
const late = "not done within"

// tooBusy tells whether the machine may be too busy for the hook's limit, which
// is not what most tests are about.
func tooBusy(runs []vdsm.Run) bool { return len(runs) == 1 && strings.Contains(runs[0].Stderr, late) }

// change has the hooks of a point edit a text. They have nothing to say.
func change(t *testing.T, h *vdsm.Host, point string, text []byte) []byte {
	t.Helper()
	for range 20 {
		after, runs, err := h.Edit(point, text)
		switch {
		case err != nil:
			t.Fatal(err)
		case len(runs) == 1 && runs[0].Status == 0 && runs[0].Stderr == "":
			return after
		case !tooBusy(runs):
			t.Fatalf("%+v", runs)
		}
	}
	t.Fatal("not done within its limit, again and again")
	return nil
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(filepath.Join("testdata", name), got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if diff := gocmp.Diff(string(testdata(t, name)), string(got)); diff != "" {
		t.Errorf("%s (-want +got)\n%s", name, diff)
	}
}

func indented(t *testing.T, value []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := json.Indent(&out, value, "", "  "); err != nil {
		t.Fatal(err)
	}
	return append(out.Bytes(), '\n')
}

func TestVMStats(t *testing.T) {
	other := busy("99999999-2222-4333-8444-555555555555", 3)
	past := busy(uuid, 1)
	past.TGID, past.ID, past.State = 0, nil, "shut off"
	h := host(t, serve(t, &backend{domains: []api.Domain{other, past, busy(uuid, maxReasons+2)}}, server.Options{}))
	for _, point := range []string{"after_get_vm_stats", "after_get_all_vm_stats"} {
		t.Run(point, func(t *testing.T) {
			text := testdata(t, "vmstats.json")
			after := change(t, h, point, text)
			rest, values := added(t, after)
			if !bytes.Equal(rest, text) {
				t.Errorf("beside what is added, this has changed (-want +got)\n%s", gocmp.Diff(string(text), string(rest)))
			}
			golden(t, "vmstats-added.json", indented(t, values[0]))
			if again := change(t, h, point, after); !bytes.Equal(again, after) {
				t.Errorf("a second time it changes\n%s\nto\n%s", after, again)
			}
		})
	}
}

func TestCaps(t *testing.T) {
	b := &backend{status: api.Status{Version: "0.1.0", Collection: "on", Level: "time", Collector: ptr("kmod"), Hook: "patch", ISA: "svm"}}
	h := host(t, serve(t, b, server.Options{}))
	text := testdata(t, "caps.json")
	rest, values := added(t, change(t, h, "after_get_caps", text))
	if !bytes.Equal(rest, text) {
		t.Errorf("beside what is added, this has changed (-want +got)\n%s", gocmp.Diff(string(text), string(rest)))
	}
	golden(t, "caps-added.json", indented(t, values[0]))

	b.status.Collector, b.status.Problem = nil, "virtexit.ko is not loaded"
	_, values = added(t, change(t, h, "after_get_caps", []byte(`{"a": 1}`)))
	if got := string(values[0]); !strings.Contains(got, `"collector":null`) || !strings.Contains(got, `"problem":"virtexit.ko is not loaded"`) {
		t.Error(got)
	}
}

// crowd is the statistics of n VMs, each with a uuid and an order of members of
// its own, and their domains.
func crowd(t *testing.T, n int) (text []byte, domains []api.Domain) {
	one := bytes.TrimSpace(testdata(t, "vmstats.json"))
	one = one[1 : len(one)-1]
	random := rand.New(rand.NewPCG(1, 2))
	text = []byte("[")
	for i := range n {
		id := fmt.Sprintf("abcdef01-2222-4333-8444-%012x", i)
		domains = append(domains, busy(id, 5+i%20))
		domains[i].Name, domains[i].Count = fmt.Sprint("vm", i), uint64(i)
		if i%10 == 0 { // spelt otherwise
			id = strings.ToUpper(strings.ReplaceAll(id, "-", ""))
		}
		vm := bytes.ReplaceAll(one, []byte(uuid), []byte(id))
		vm = bytes.ReplaceAll(vm, []byte("shop-db"), fmt.Appendf(nil, "vm%d", i))
		if i > 0 {
			text = append(text, ", "...)
		}
		text = append(text, vm...)
	}
	random.Shuffle(n, func(i, j int) { domains[i], domains[j] = domains[j], domains[i] })
	return append(text, ']'), domains
}

// A host with 200 VMs, of which virtexitd does not know one.
func TestAllVMStats(t *testing.T) {
	const n = 200
	text, domains := crowd(t, n)
	unknown := slices.IndexFunc(domains, func(d api.Domain) bool { return d.Name == "vm13" })
	// Made beforehand, since the server is slow where races are looked for.
	answer := record(t, serve(t, &backend{domains: slices.Delete(domains, unknown, unknown+1)}, server.Options{}))
	h := host(t, stranger.Answer(t, answer))
	after := change(t, h, "after_get_all_vm_stats", text)
	rest, values := added(t, after)
	if !bytes.Equal(rest, text) {
		t.Error("more has changed than was added")
	}
	if len(values) != n {
		t.Fatalf("%d VMs", len(values))
	}
	for i, value := range values {
		var v vmExits
		if i == 13 {
			if value != nil {
				t.Errorf("VM %d is unknown, but has %s", i, value)
			}
			continue
		}
		if err := json.Unmarshal(value, &v); err != nil || v.Total != uint64(i) {
			t.Errorf("VM %d: %d exits, %v", i, v.Total, err)
		}
	}
}

// record asks a server for all domains and returns its answer as it came.
func record(t *testing.T, socket string) string {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "GET /v1/domains HTTP/1.1\r\nHost: x\r\n\r\n")
	answer, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(answer)
}

// What the hook cannot do leaves the file as it is, and VDSM untroubled.
func TestLeftAsItIs(t *testing.T) {
	good := string(testdata(t, "vmstats.json"))
	const past = "22222222-2222-4333-8444-555555555555"
	b := &backend{domains: []api.Domain{busy(uuid, 3), busy(past, 3)}}
	b.domains[1].TGID, b.domains[1].ID = 0, nil
	up := serve(t, b, server.Options{})
	deaf := filepath.Join(t.TempDir(), "sock") // its queue is full
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	os.Chmod(filepath.Dir(filepath.Dir(deaf)), 0o755)
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: deaf}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	first, err := net.Dial("unix", deaf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { first.Close() })

	for _, tt := range []struct{ name, point, socket, text, want string }{
		{"no daemon", "after_get_vm_stats", "/nonexistent/sock", good, "cannot connect to virtexitd at '/nonexistent/sock': no such file: is the daemon running?"},
		{"no daemon, capabilities", "after_get_caps", "/nonexistent/sock", `{}`, "is the daemon running?"},
		{"silent", "after_get_vm_stats", stranger.Answer(t, ""), good, late},
		{"half an answer", "after_get_all_vm_stats", stranger.Answer(t, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"), good + " ", late},
		{"deaf", "after_get_vm_stats", deaf, good, ""}, // refused or waited for, as the kernel likes
		{"another", "after_get_vm_stats", stranger.Answer(t, "220 mail ESMTP\r\n"), good, "no answer from virtexitd"},
		{"bad JSON", "after_get_vm_stats", up, good[:len(good)-9], "bad JSON at byte"},
		{"nothing", "after_get_vm_stats", up, "", "bad JSON at byte 0"},
		{"no list", "after_get_vm_stats", up, `{"vmId": "` + uuid + `"}`, "statistics are no list"},
		{"a list of capabilities", "after_get_caps", up, `[{}]`, "capabilities are a list"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := host(t, tt.socket)
			after, runs, err := h.Edit(tt.point, []byte(tt.text))
			for i := 0; i < 20 && err == nil && tooBusy(runs) && tt.want != late; i++ {
				after, runs, err = h.Edit(tt.point, []byte(tt.text))
			}
			if err != nil {
				t.Fatal(err)
			}
			if string(after) != tt.text {
				t.Errorf("the file is now\n%s", after)
			}
			if len(runs) != 1 || runs[0].Status != 0 || strings.Count(runs[0].Stderr, "\n") != 1 ||
				!strings.HasPrefix(runs[0].Stderr, "virtexit: nothing is added: ") || !strings.Contains(runs[0].Stderr, tt.want) {
				t.Errorf("%+v, want %q", runs, tt.want)
			}
			if runs[0].Took > statsLimit+startup {
				t.Errorf("took %v", runs[0].Took)
			}
		})
	}
	for _, tt := range []struct{ name, text string }{
		{"no VM", `[ ]`},
		{"VMs that are unknown", `[{"vmId": "3"}, {"vmId": "shop-db"}, {"vmId": "7"}, {"vmId": ""}]`},
		{"a VM that is unknown", `[{"vmId": "7"}]`},
		{"a VM that has ended", `[{"vmId": "` + past + `"}]`},
		{"VMs that have ended", `[{"vmId": "` + past + `"}, {"vmId": "` + past + `"}]`},
		{"no ids", `[{"vmId": 7}, {"vmid": "` + uuid + `"}, {}, 1]`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if after := change(t, host(t, up), "after_get_all_vm_stats", []byte(tt.text)); string(after) != tt.text {
				t.Errorf("the file is now\n%s", after)
			}
		})
	}
}

// A file that cannot be replaced is left whole, and nothing beside it.
func TestReplace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, []byte("old"), 0o640); err != nil {
		t.Fatal(err)
	}
	f, err := read(path)
	if err != nil || string(f.text) != "old" {
		t.Fatalf("%q, %v", f.text, err)
	}
	if err := f.replace([]byte("new")); err != nil {
		t.Fatal(err)
	}
	if text, _ := os.ReadFile(path); string(text) != "new" {
		t.Errorf("%q", text)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o640 {
		t.Errorf("%v, %v", info.Mode(), err)
	}

	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	full := limit
	full.Cur = 2
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &full); err != nil {
		t.Fatal(err)
	}
	err = f.replace([]byte("newest"))
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	if err == nil || !strings.Contains(err.Error(), "file too large") {
		t.Errorf("error %v", err)
	}
	if text, _ := os.ReadFile(path); string(text) != "new" {
		t.Errorf("%q", text)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

func TestReadErrors(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	large, err := os.Create(path("large"))
	if err != nil {
		t.Fatal(err)
	}
	large.Truncate(maxFile + 1)
	large.Close()
	syscall.Mkfifo(path("pipe"), 0o600)
	os.Symlink("large", path("link"))
	for name, want := range map[string]string{
		"none":  "no such file or directory",
		"large": "is longer than 67108864 bytes",
		"pipe":  "is not a regular file",
		"link":  "too many levels of symbolic links",
		".":     "is not a regular file",
	} {
		if _, err := read(path(name)); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: %v, want %s", name, err, want)
		}
	}
}

func TestLevel(t *testing.T) {
	group := fmt.Sprint(os.Getgid()) // of the hook
	if os.Getuid() == 0 {
		group = fmt.Sprint(vdsmID)
	}
	type test struct {
		name    string
		vm      string // uuid where empty
		custom  map[string]string
		unknown int
		refused bool
		want    string // level
		stderr  string
	}
	tests := map[string][]test{"after_vm_start": {
		{name: "off", custom: map[string]string{"virtexit": "off"}, want: "off"},
		{name: "count", custom: map[string]string{"virtexit": "count", "other": "1"}, want: "count"},
		{name: "time", custom: map[string]string{"virtexit": "time"}, want: "time"},
		{name: "not known at first", custom: map[string]string{"virtexit": "off"}, unknown: 5, want: "off"},
		{name: "none"},
		{name: "bad", custom: map[string]string{"virtexit": "all\nof it"}, stderr: "VM " + uuid + `: custom property virtexit is "all\nof it", must be off, count, time or recent`},
		{name: "unknown", vm: "12345678-2222-4333-8444-555555555555", custom: map[string]string{"virtexit": "off"},
			stderr: "VM 12345678-2222-4333-8444-555555555555: level off is not set: "},
		{name: "refused", custom: map[string]string{"virtexit": "off"}, refused: true, stderr: "VM " + uuid + ": level off is not set: switching collection needs root"},
	}}
	for _, point := range []string{"after_vm_migrate_destination", "after_vm_cont", "after_vm_dehibernate"} {
		tests[point] = []test{{name: "recent", custom: map[string]string{"virtexit": "recent"}, want: "recent"}}
	}
	for point, tests := range tests {
		for _, tt := range tests {
			t.Run(point+"/"+tt.name, func(t *testing.T) {
				b := &backend{domains: []api.Domain{busy(uuid, 1)}, unknown: tt.unknown, set: map[string]string{}}
				var o server.Options
				if !tt.refused {
					o.AdminGroup = group
				}
				h := host(t, serve(t, b, o))
				h.Hooks = folders(t, point)
				vm := vdsm.VM{ID: cmp.Or(tt.vm, uuid), XML: "<domain/>", Custom: tt.custom}
				runs, err := h.Tell(point, vm)
				if err != nil {
					t.Fatal(err)
				}
				said, _ := strings.CutPrefix(runs[0].Stderr, "virtexit: ")
				if len(runs) != 1 || runs[0].Status != 0 || (tt.stderr == "") != (said == "") || !strings.HasPrefix(said, tt.stderr) || strings.Count(said, "\n") > 1 {
					t.Errorf("%+v, want %q", runs, tt.stderr)
				}
				if runs[0].Took > levelLimit+startup {
					t.Errorf("took %v", runs[0].Took)
				}
				if b.set[vm.ID] != tt.want {
					t.Errorf("level %q, want %q", b.set[vm.ID], tt.want)
				}
			})
		}
	}
}

// folders makes folders of hook points, whether installed or not, with the hook.
func folders(t *testing.T, points ...string) string {
	t.Helper()
	dir := t.TempDir()
	os.Chmod(filepath.Dir(dir), 0o755)
	for _, point := range points {
		if err := os.Mkdir(filepath.Join(dir, point), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join(built.root, "usr/libexec/virtexit-vdsm-hook"), filepath.Join(dir, point, "50_virtexit")); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func installed(t *testing.T) (points []string) {
	t.Helper()
	links, err := filepath.Glob(filepath.Join(built.root, "usr/libexec/vdsm/hooks/*/50_virtexit"))
	if err != nil || built.err != nil {
		t.Fatal(err, built.err)
	}
	for _, link := range links {
		points = append(points, filepath.Base(filepath.Dir(link)))
	}
	return points
}

// Each folder that the hook is put into is one that it serves, and all are named
// in the help.
func TestInstalled(t *testing.T) {
	want := []string{"after_get_all_vm_stats", "after_get_caps", "after_get_vm_stats", "after_vm_cont", "after_vm_migrate_destination", "after_vm_start"}
	if diff := gocmp.Diff(want, installed(t)); diff != "" {
		t.Errorf("points (-want +got)\n%s", diff)
	}
	named := regexp.MustCompile(`after_\w+`).FindAllString(usage, -1)
	slices.Sort(named)
	if diff := gocmp.Diff(slices.Sorted(slices.Values(append(want, "after_vm_dehibernate"))), named); diff != "" {
		t.Errorf("help (-want +got)\n%s", diff)
	}
}

// docs/OVIRT.md tells what is added, and how the engine is told which levels
// there are.
func TestDocs(t *testing.T) {
	text, err := os.ReadFile("../../docs/OVIRT.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, golden := range []string{"vmstats-added.json", "caps-added.json"} {
		for _, m := range regexp.MustCompile(`"(\w+)":`).FindAllSubmatch(testdata(t, golden), -1) {
			if !bytes.Contains(text, fmt.Appendf(nil, "`%s`", m[1])) {
				t.Errorf("%s of %s is missing", m[1], golden)
			}
		}
	}
	property := regexp.MustCompile(`UserDefinedVMProperties='virtexit=(.*?)' `).FindSubmatch(text)
	if property == nil {
		t.Fatal("engine-config is missing")
	}
	allowed, err := regexp.Compile(string(property[1]))
	if err != nil {
		t.Fatal(err)
	}
	for level, want := range map[string]bool{"off": true, "count": true, "time": true, "recent": true, "": false, "detail": false, "off ": false, "xoff": false} {
		if allowed.MatchString(level) != want {
			t.Errorf("%q: allowed by the engine: %t", level, !want)
		}
	}
}

// Elsewhere, and where it would make VDSM fail, it does nothing and does not fail.
func TestElsewhere(t *testing.T) {
	h := host(t, "/nonexistent")
	h.Hooks = folders(t, "before_get_vm_stats")
	after, runs, err := h.Edit("before_get_vm_stats", []byte("{}"))
	if err != nil || string(after) != "{}" || len(runs) != 1 || runs[0].Status != 0 || !strings.Contains(runs[0].Stderr, "does not lie in the folder of a hook point") {
		t.Errorf("%s, %+v, %v", after, runs, err)
	}
}

func TestCommandLine(t *testing.T) {
	good := &backend{status: api.Status{Version: "0.1.0", Collection: "on", Level: "time", Hook: "patch"}, domains: []api.Domain{busy(uuid, 1)}}
	bad := &backend{status: api.Status{Version: "0.1.0", Hook: "none", Level: "off", Problem: "virtexit.ko is not loaded"}, unknown: 1}
	for _, tt := range []struct {
		name, arg, socket string
		status            int
		want              []string
	}{
		{"help", "-h", "", 0, []string{"Usage: /x/hook [-t]", "after_get_caps"}},
		{"version", "-V", "", 0, []string{"virtexit-vdsm-hook dev"}},
		{"test", "-t", serve(t, good, server.Options{AdminGroup: fmt.Sprint(os.Getgid())}), 0, []string{
			`test pass: sample: nothing is changed, and this is added: "kvmExits": {"schema":"virtexit-vdsm/v1"`, "test pass: virtexitd 0.1.0: hook patch, level time", "test pass: domains: 1, in ", "test pass: levels"}},
		{"problem", "-t", serve(t, bad, server.Options{AdminGroup: fmt.Sprint(os.Getgid())}), 1, []string{"test fail: virtexitd 0.1.0: virtexit.ko is not loaded", "test pass: levels"}},
		{"no daemon", "-t", "/nonexistent", 1, []string{"test pass: sample", "test fail: virtexitd: cannot connect to virtexitd at '/nonexistent'"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			env := func(name string) (string, bool) { return tt.socket, name == "VIRTEXIT_SOCKET" }
			if status := run([]string{"/x/hook", tt.arg}, env, &stdout, &stderr); status != tt.status || stderr.Len() > 0 {
				t.Errorf("status %d, stderr %q", status, &stderr)
			}
			for _, want := range tt.want {
				if !strings.Contains(stdout.String(), want) {
					t.Errorf("%q is not in\n%s", want, &stdout)
				}
			}
		})
	}
}
