// SPDX-License-Identifier: Apache-2.0

package vmmap

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/internal/snapshot"
)

// The recorded guests.
const (
	uuid1     = "11111111-2222-4333-8444-000000000001"
	uuid10    = "11111111-2222-4333-8444-00000000000a"
	uuidWeb   = "11111111-2222-4333-8444-0000000000cc"
	uuidIdle  = "11111111-2222-4333-8444-0000000000dd"
	uuidOld   = "99999999-2222-4333-8444-000000000009"
	web       = `web, "db" é 1`
	vm1Start  = 2226 * tick
	vm10Start = 2968 * tick
	webStart  = 3540 * tick
)

var vm1 = snapshot.Process{TGID: 201, Start: vm1Start + 1234567} // as the kernel tells it: finer than /proc

func id(n int) *int { return &n }

// titled is what all guests of libvirt were.
var titled = Metadata{Title: "A title"}

// what libvirt listed when the host was recorded.
var records = []record{
	{id(1), "vm1", uuid1, Running, true, &titled},
	{id(2), "vm10", uuid10, Paused, true, &titled},
	{id(3), web, uuidWeb, Running, false, &titled},
	{nil, "idle", uuidIdle, ShutOff, true, nil},
}

// host is the recorded system in a directory where it can change.
type host struct {
	*Map
	t    *testing.T
	root string
	time time.Time
}

func newHost(t *testing.T, l *Libvirt) *host {
	h := &host{t: t, root: t.TempDir(), time: time.Unix(1000, 0)}
	if err := os.CopyFS(h.root, os.DirFS("testdata/host")); err != nil {
		t.Fatal(err)
	}
	h.Map = New(Config{Root: h.root, Libvirt: l, Now: func() time.Time { return h.time }})
	return h
}

func (h *host) path(p string) string { return filepath.Join(h.root, p) }

func (h *host) remove(paths ...string) {
	h.t.Helper()
	for _, p := range paths {
		if err := os.RemoveAll(h.path(p)); err != nil {
			h.t.Fatal(err)
		}
	}
}

// replace edits a file as libvirt does: by renaming another over it.
func (h *host) replace(path, old, new string) {
	h.t.Helper()
	b := read(h.t, h.path(path))
	if !bytes.Contains(b, []byte(old)) {
		h.t.Fatalf("%s: no %q", path, old)
	}
	b = bytes.ReplaceAll(b, []byte(old), []byte(new))
	if err := os.WriteFile(h.path(path+".new"), b, 0o600); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Rename(h.path(path+".new"), h.path(path)); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) refresh() {
	h.t.Helper()
	if err := h.Refresh(); err != nil {
		h.t.Fatal(err)
	}
}

// expect looks a process up and compares all but the time and the user.
func (h *host) expect(p snapshot.Process, comm string, want Domain, known bool) {
	h.t.Helper()
	got, ok := h.Lookup(p, comm)
	got.Seen, got.UID, want.UID = time.Time{}, nil, nil
	if diff := cmp.Diff(want, got); diff != "" || ok != known {
		h.t.Errorf("Lookup(%v) known %v, want %v (-want +got)\n%s", p, ok, known, diff)
	}
}

// said returns a Libvirt that has listed records and is as err tells.
func said(err error, r ...record) *Libvirt {
	l := NewLibvirt("test:", uptime)
	l.listing.Store(&listing{records: r, at: time.Unix(500, 0), err: err})
	return l
}

func TestDomains(t *testing.T) {
	now, listed := time.Unix(1000, 0), time.Unix(500, 0)
	byHand := []Domain{
		{Name: "old style", UUID: uuidOld, TGID: 250, Start: 4380 * tick, UID: id(0), State: Running, Source: "proc", VCPUs: map[int]int{253: 0}, Seen: now},
		{Name: "plain", TGID: 241, Start: 4273 * tick, UID: id(0), State: Running, Source: "proc", VCPUs: map[int]int{244: 0}, Seen: now},
	}
	guests := func(source string, paused State) []Domain {
		return []Domain{
			{ID: id(1), Name: "vm1", UUID: uuid1, TGID: 201, Start: vm1Start, UID: id(0), State: Running, Source: source, VCPUs: map[int]int{206: 0, 207: 1}, Seen: now, Metadata: titled},
			{ID: id(2), Name: "vm10", UUID: uuid10, TGID: 214, Start: vm10Start, UID: id(0), State: paused, Source: source, VCPUs: map[int]int{219: 0}, Seen: now, Metadata: titled},
			{ID: id(3), Name: web, UUID: uuidWeb, TGID: 224, Start: webStart, UID: id(0), State: Running, Source: source, VCPUs: map[int]int{229: 0}, Seen: now, Metadata: titled},
		}
	}
	anonymous := func() []Domain {
		ds := guests("proc", Running)
		for i := range ds {
			ds[i].ID, ds[i].Metadata = nil, Metadata{}
		}
		return ds
	}
	noVCPUs := func(lists ...[]Domain) []Domain {
		var ds []Domain
		for _, l := range lists {
			for _, d := range l {
				d.VCPUs = nil
				ds = append(ds, d)
			}
		}
		return ds
	}
	join := func(lists ...[]Domain) (ds []Domain) {
		for _, l := range lists {
			ds = append(ds, l...)
		}
		return ds
	}
	idle := []Domain{{Name: "idle", UUID: uuidIdle, State: ShutOff, Source: "libvirt", Seen: listed}}
	unpaused := append([]record{records[0], {id(2), "vm10", uuid10, Running, true, &titled}}, records[2:]...)
	down := errors.New("down")

	for _, test := range []struct {
		name    string
		libvirt *Libvirt
		remove  []string
		want    []Domain
	}{
		{"no libvirt", nil, nil, join(byHand, guests("rundir", Paused))},
		{"not connected yet", NewLibvirt("test:", uptime), nil, join(byHand, guests("rundir", Paused))},
		{"libvirt", said(nil, records...), nil, join(idle, byHand, guests("libvirt", Paused))},
		{"libvirt's state before the file's", said(nil, unpaused...), nil, join(idle, byHand, guests("libvirt", Running))},
		{"unless it does not answer", said(down, unpaused...), nil, join(idle, byHand, guests("libvirt", Paused))},
		{"libvirt, no run directory", said(nil, records...), []string{"run"}, join(idle, byHand, guests("libvirt", Paused))},
		{"arguments only", nil, []string{"run"}, join(byHand, anonymous())},
		{"no debugfs", nil, []string{"run", "sys/kernel"}, noVCPUs(byHand, anonymous())},
		{"no KVM", nil, []string{"sys"}, guests("rundir", Paused)},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHost(t, test.libvirt)
			h.remove(test.remove...)
			h.refresh()
			if diff := cmp.Diff(test.want, h.Domains()); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

// session moves a file to the run directory of a user's libvirt.
func (h *host) session(path string, uid int) {
	h.t.Helper()
	dir := h.path(fmt.Sprintf("run/user/%d/libvirt/qemu/run", uid))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Rename(h.path(path), filepath.Join(dir, "x.xml")); err != nil {
		h.t.Fatal(err)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	if err := os.WriteFile(to, read(t, from), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestSession has files in a run directory that is a user's.
func TestSession(t *testing.T) {
	const file = "run/libvirt/qemu/vm1.xml"
	for _, test := range []struct {
		name   string
		change func(*host)
		source string
		called string
		id     *int
		err    string // part of it
	}{
		{"of the one who runs it", func(h *host) {
			h.replace("proc/201/status", "Uid:\t0", "Uid:\t1000")
			h.session(file, 1000)
		}, "rundir", "vm1", nil, ""},
		{"of another", func(h *host) { h.session(file, 1000) }, "proc", "vm1", nil, ""},
		{"of another, besides the host's", func(h *host) {
			copyFile(h.t, h.path(file), h.path("copy"))
			h.replace("copy", ">vm1<", ">mine<")
			h.session("copy", 1000)
		}, "rundir", "vm1", id(1), ""},
		{"of the one who runs it, besides another's", func(h *host) {
			h.replace("proc/201/status", "Uid:\t0", "Uid:\t1001")
			copyFile(h.t, h.path(file), h.path("copy"))
			h.replace("copy", ">vm1<", ">mine<")
			h.session("copy", 1000)
			h.session(file, 1001)
		}, "rundir", "vm1", nil, ""},
		{"of the one who runs it, besides the host's", func(h *host) {
			h.replace("proc/201/status", "Uid:\t0", "Uid:\t1000")
			copyFile(h.t, h.path(file), h.path("copy"))
			h.replace("copy", ">vm1<", ">mine<")
			h.session("copy", 1000)
		}, "rundir", "vm1", id(1), ""},
		{"of nobody", func(h *host) {
			h.session(file, 0)
			if err := os.Rename(h.path("run/user/0"), h.path("run/user/0x0")); err != nil {
				h.t.Fatal(err)
			}
		}, "proc", "vm1", nil, ""},
		{"a pipe", func(h *host) {
			if err := errors.Join(os.Mkdir(h.path("dir"), 0o700), syscall.Mkfifo(h.path("dir/x.xml"), 0o600)); err != nil {
				h.t.Fatal(err)
			}
			h.session("dir/x.xml", 1000)
		}, "rundir", "vm1", id(1), "x.xml: not a regular file"},
		{"a link", func(h *host) {
			if err := os.Symlink("/dev/zero", h.path("link")); err != nil {
				h.t.Fatal(err)
			}
			h.session("link", 1000)
		}, "rundir", "vm1", id(1), "x.xml: open"},
		{"without end", func(h *host) {
			f, err := os.Create(h.path("long"))
			if err != nil {
				h.t.Fatal(err)
			}
			defer f.Close()
			if err := f.Truncate(1 << 40); err != nil {
				h.t.Fatal(err)
			}
			h.session("long", 1000)
		}, "rundir", "vm1", id(1), "x.xml: "},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHost(t, nil)
			test.change(h)
			err := h.Refresh()
			if (err != nil) != (test.err != "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Errorf("error %v, want %q", err, test.err)
			}
			got, _ := h.Lookup(vm1, "")
			if got.Name != test.called || got.Source != test.source || !cmp.Equal(got.ID, test.id) {
				t.Errorf("%+v, want %q by %q, id %v", got, test.called, test.source, test.id)
			}
		})
	}
}

// A name goes to one process only, and to the right one.
func TestJoin(t *testing.T) {
	const file = "run/libvirt/qemu/vm1.xml"
	vm1Record := record{id(1), "vm1", uuid1, Paused, true, nil}
	for _, test := range []struct {
		name    string
		records []record
		change  func(*host)
		want    string // source of vm1
		others  int    // domains of libvirt that have no process
	}{
		{"equal", []record{vm1Record}, nil, "libvirt", 0},
		{"another uuid", []record{{id(1), "vm1", uuid10, Running, true, nil}}, nil, "rundir", 1},
		{"longer name", []record{{id(1), "vm10", uuid1, Running, true, nil}}, nil, "rundir", 1},
		{"shorter name", []record{{id(1), "vm", uuid1, Running, true, nil}}, nil, "rundir", 1},
		{"an earlier run", []record{{id(9), "vm1", uuid1, Running, true, nil}}, nil, "rundir", 0},
		{"not running", []record{{nil, "vm1", uuid1, ShutOff, true, nil}}, nil, "rundir", 0},
		{"no file", []record{vm1Record}, func(h *host) { h.remove(file) }, "proc", 0},
		{"no run directory", []record{vm1Record}, func(h *host) { h.remove("run") }, "libvirt", 0},
		{"copied arguments", []record{vm1Record}, func(h *host) {
			h.replace("proc/250/cmdline", uuidOld, uuid1)
			h.replace("proc/250/cmdline", "old style", "vm1")
		}, "libvirt", 0},
		{"copied arguments, no run directory", []record{vm1Record}, func(h *host) {
			h.remove("run")
			h.replace("proc/250/cmdline", uuidOld, uuid1)
			h.replace("proc/250/cmdline", "old style", "vm1")
		}, "proc", 0},
		{"file of another guest", []record{vm1Record}, func(h *host) {
			h.remove("run/libvirt/qemu/vm10.xml")
			h.replace(file, "pid='201'", "pid='214'")
		}, "proc", 0},
		{"file of a session", []record{vm1Record}, func(h *host) { h.session(file, 0) }, "rundir", 0},
		{"the same in a session", []record{vm1Record}, func(h *host) {
			h.replace("proc/250/cmdline", uuidOld, uuid1)
			h.replace("proc/250/status", "Uid:\t0", "Uid:\t1000")
			copyFile(h.t, h.path(file), h.path("copy"))
			h.replace("copy", "pid='201'", "pid='250'")
			h.session("copy", 1000)
		}, "libvirt", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHost(t, said(nil, test.records...))
			if test.change != nil {
				test.change(h)
			}
			h.refresh()
			got, _ := h.Lookup(vm1, "")
			if got.Name != "vm1" || got.UUID != uuid1 || got.Source != test.want {
				t.Errorf("%+v, want source %q", got, test.want)
			}
			others := 0
			for _, d := range h.Domains() {
				if d.TGID == 0 {
					others++
				}
				if d.TGID != 201 && d.Source == "libvirt" && d.TGID != 0 {
					t.Errorf("libvirt's name went to %+v", d)
				}
			}
			if others != test.others {
				t.Errorf("%d domains without a process, want %d: %+v", others, test.others, h.Domains())
			}
		})
	}
}

// A domain goes from one libvirt to another on this host: for a while two
// processes are the same domain, and one of them is that of our libvirt.
func TestMigration(t *testing.T) {
	const file = "run/libvirt/qemu/vm1.xml"
	other := snapshot.Process{TGID: 250, Start: 4380 * tick}
	stranger := Domain{Name: "vm1", UUID: uuid1, TGID: 250, Start: other.Start, State: Running, Source: "proc", VCPUs: map[int]int{253: 0}}
	ours := Domain{ID: id(1), Name: "vm1", UUID: uuid1, TGID: 201, Start: vm1Start, State: Running, Source: "libvirt", VCPUs: map[int]int{206: 0, 207: 1}}
	vm1Record := func(id *int, s State) *listing {
		return &listing{records: []record{{id, "vm1", uuid1, s, true, &Metadata{}}}}
	}
	both := func(t *testing.T) (*host, *Libvirt) {
		l := NewLibvirt("test:", uptime)
		h := newHost(t, l)
		h.replace("proc/250/cmdline", uuidOld, uuid1)
		h.replace("proc/250/cmdline", "old style", "vm1")
		return h, l
	}
	past := func(d Domain) Domain {
		d.ID, d.TGID, d.Start, d.State = nil, 0, 0, ShutOff
		return d
	}

	t.Run("away", func(t *testing.T) {
		h, l := both(t)
		l.listing.Store(vm1Record(id(1), Running))
		h.refresh()
		h.expect(vm1, "", ours, true)
		h.expect(other, "", stranger, true)
		// The process ends before libvirt says so.
		h.remove("proc/201", file, "sys/kernel/debug/kvm/201-9")
		h.refresh()
		h.expect(vm1, "", past(ours), true)
		h.expect(other, "", stranger, true)
		l.listing.Store(vm1Record(nil, ShutOff))
		h.expect(vm1, "", past(ours), true)
		h.expect(other, "", stranger, true)
	})
	t.Run("here", func(t *testing.T) {
		h, l := both(t)
		text := read(t, h.path(file))
		h.remove(file)
		h.Learn(250)
		// libvirt lists it before there is a process, or before that is known.
		l.listing.Store(vm1Record(id(1), Paused))
		h.expect(other, "", func() Domain { d := stranger; d.VCPUs = nil; return d }(), true)
		dir := h.path("proc/201")
		if err := os.Rename(dir, dir+".hidden"); err != nil {
			t.Fatal(err)
		}
		h.refresh()
		h.expect(other, "", stranger, true)
		if err := errors.Join(os.Rename(dir+".hidden", dir), os.WriteFile(h.path(file), text, 0o600)); err != nil {
			t.Fatal(err)
		}
		h.refresh()
		paused := ours
		paused.State = Paused
		h.expect(vm1, "", paused, true)
		h.expect(other, "", stranger, true)
		l.listing.Store(vm1Record(id(1), Running))
		h.remove("proc/250", "sys/kernel/debug/kvm/250-10")
		h.refresh()
		h.expect(vm1, "", ours, true)
		h.expect(other, "", past(stranger), true)
	})
}

func TestRenamedInPlace(t *testing.T) {
	l := NewLibvirt("test:", uptime)
	h := newHost(t, l)
	h.remove("run")
	want := Domain{Name: "qemu-201", TGID: 201, Start: vm1Start, State: Running, Source: "process"}
	h.expect(vm1, "qemu", want, false)
	h.Learn(201)
	want.Name, want.UUID, want.Source = "vm1", uuid1, "proc"
	h.expect(vm1, "qemu", want, true)
	h.refresh()
	want.VCPUs = map[int]int{206: 0, 207: 1}
	h.expect(vm1, "qemu", want, true)
	l.listing.Store(&listing{records: records})
	want.ID, want.Source, want.Metadata = id(1), "libvirt", titled
	h.expect(vm1, "qemu", want, true)
	l.listing.Store(&listing{records: records, err: errors.New("down")})
	h.expect(vm1, "qemu", want, true)
}

func TestDeath(t *testing.T) {
	h := newHost(t, said(nil, records...))
	h.refresh()
	h.Lookup(vm1, "")
	h.remove("proc/201", "proc/214", "sys/kernel/debug/kvm/201-9", "sys/kernel/debug/kvm/214-9")
	h.refresh()
	last := Domain{Name: "vm1", UUID: uuid1, State: ShutOff, Source: "libvirt", VCPUs: map[int]int{206: 0, 207: 1}, Metadata: titled}
	h.expect(vm1, "", last, true)
	for _, d := range h.Domains() {
		if d.TGID == 201 || d.TGID == 214 {
			t.Errorf("dead, but listed: %+v", d)
		}
	}

	h.time = h.time.Add(time.Hour)
	h.refresh()
	h.expect(vm1, "", last, true)
	vm10 := snapshot.Process{TGID: 214, Start: vm10Start}
	h.expect(vm10, "qemu", Domain{Name: "qemu-214", TGID: 214, Start: vm10Start, State: Running, Source: "process"}, false)
	h.Forget(vm1)
	h.Forget(vm10)
	h.expect(vm1, "qemu", Domain{Name: "qemu-201", TGID: 201, Start: vm1Start, State: Running, Source: "process"}, false)
}

// Who a process was outlives the Map that knew it.
func TestRestore(t *testing.T) {
	old := newHost(t, said(nil, records...))
	old.refresh()
	was, _ := old.Lookup(vm1, "")
	gone := snapshot.Process{TGID: 4711, Start: vm1Start}
	h := newHost(t, said(nil, records...))
	h.Restore(vm1, was)
	h.Restore(gone, was)
	last := Domain{Name: "vm1", UUID: uuid1, State: ShutOff, Source: "libvirt", VCPUs: was.VCPUs, Metadata: was.Metadata}
	h.expect(vm1, "qemu", last, true)
	h.time = h.time.Add(time.Hour)
	h.refresh()
	h.refresh()
	was.Seen = time.Time{}
	h.expect(vm1, "qemu", was, true) // it lives
	h.expect(gone, "qemu", last, true)
	h.Restore(vm1, last)
	h.expect(vm1, "qemu", was, true)
	h.libvirt.listing.Store(&listing{records: []record{{nil, "renamed", uuid1, ShutOff, true, nil}}})
	last.Name = "renamed"
	h.expect(gone, "qemu", last, true)
	h.Forget(gone)
	h.expect(gone, "qemu", Domain{Name: "qemu-4711", TGID: 4711, Start: vm1Start, State: Running, Source: "process"}, false)
}

// A guest dies and libvirt still lists it, as it does not answer or did not get
// round to tell.
func TestDeathUnheard(t *testing.T) {
	for name, down := range map[string]error{"down": errors.New("down"), "late": nil} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, said(down, records...))
			h.refresh()
			h.remove("proc/201", "proc/224")
			h.refresh()
			list := func() map[string]Domain {
				got := make(map[string]Domain)
				for _, d := range h.Domains() {
					got[d.Name] = d
				}
				return got
			}
			if d := list()["vm1"]; d.State != ShutOff || d.ID != nil || d.Source != "libvirt" {
				t.Errorf("persistent: %+v", d)
			}
			if d, ok := list()[web]; ok {
				t.Errorf("transient: %+v", d)
			}
			// It was started again, and no process of it has been seen yet.
			h.libvirt.listing.Store(&listing{records: []record{{id(7), "vm1", uuid1, Running, true, nil}}})
			if d := list()["vm1"]; d.State != Running || d.ID == nil || *d.ID != 7 || d.TGID != 0 {
				t.Errorf("started again: %+v", d)
			}
		})
	}
}

// libvirt forgets a guest, in its files and its list, before the process dies.
func TestSlowDeath(t *testing.T) {
	l := said(nil, records...)
	h := newHost(t, l)
	h.refresh()
	h.Lookup(vm1, "")
	h.remove("run")
	l.listing.Store(&listing{})
	h.refresh()
	h.expect(vm1, "", Domain{ID: id(1), Name: "vm1", UUID: uuid1, TGID: 201, Start: vm1Start, State: Running, Source: "libvirt", VCPUs: map[int]int{206: 0, 207: 1}, Metadata: titled}, true)
}

// libvirt's state counts until it owes an answer for too long.
func TestStateWhenHung(t *testing.T) {
	l := said(nil, record{id(2), "vm10", uuid10, Running, true, nil})
	h := newHost(t, l)
	h.refresh()
	vm10 := snapshot.Process{TGID: 214, Start: vm10Start}
	if d, _ := h.Lookup(vm10, ""); d.State != Running {
		t.Errorf("%+v", d)
	}
	since := time.Now().Add(-patience)
	l.waiting.Store(&since)
	if d, _ := h.Lookup(vm10, ""); d.State != Paused || d.Source != "libvirt" {
		t.Errorf("%+v", d)
	}
}

// The kernel says that a process is a guest; nothing else does.
func TestLookedUpOnly(t *testing.T) {
	h := newHost(t, nil)
	p := snapshot.Process{TGID: 133, Start: 488 * tick}
	want := Domain{Name: "x-133", TGID: 133, Start: 488 * tick, State: Running, Source: "process"}
	h.expect(p, "x", want, false)
	h.refresh()
	want.Name = "libvirtd-133"
	h.expect(p, "x", want, true)
}

// A guest's last exits may be heard of after it died.
func TestDeathBeforeLookup(t *testing.T) {
	h := newHost(t, nil)
	h.refresh()
	h.remove("proc/201", "run/libvirt/qemu/vm1.xml")
	h.refresh()
	h.time = h.time.Add(linger / 2)
	h.refresh()
	h.expect(vm1, "", Domain{Name: "vm1", UUID: uuid1, State: ShutOff, Source: "rundir", VCPUs: map[int]int{206: 0, 207: 1}, Metadata: titled}, true)
}

// The kernel cuts a process's name after 15 bytes.
func TestCutName(t *testing.T) {
	h := newHost(t, nil)
	if d, _ := h.Lookup(snapshot.Process{TGID: 300, Start: 5 * tick}, "虚拟机虚\xe6\x8b"); d.Name != "虚拟机虚\ufffd-300" {
		t.Errorf("%q", d.Name)
	}
}

func TestTooBrief(t *testing.T) {
	h := newHost(t, nil)
	brief := snapshot.Process{TGID: 300, Start: 5 * tick}
	h.Learn(300)
	h.expect(brief, "guest) x", Domain{Name: "guest) x-300", TGID: 300, Start: 5 * tick, State: Running, Source: "process"}, false)
	h.refresh()
	h.expect(brief, "", Domain{Name: "guest) x-300", State: ShutOff, Source: "process"}, true)
}

func TestReusedPID(t *testing.T) {
	later := snapshot.Process{TGID: 201, Start: 9999 * tick}
	reuse := func(h *host, cmdline string) {
		h.replace("proc/201/stat", " 2226 ", " 9999 ")
		if err := os.WriteFile(h.path("proc/201/cmdline"), []byte(cmdline), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	old := Domain{Name: "vm1", UUID: uuid1, State: ShutOff, Source: "rundir", VCPUs: map[int]int{206: 0, 207: 1}, Metadata: titled}

	t.Run("by a guest", func(t *testing.T) {
		h := newHost(t, nil)
		h.refresh()
		h.Lookup(vm1, "")
		reuse(h, "qemu\x00-name\x00new\x00") // vm1.xml is still there
		h.refresh()
		h.expect(vm1, "", old, true)
		h.expect(later, "", Domain{Name: "new", TGID: 201, Start: later.Start, State: Running, Source: "proc", VCPUs: map[int]int{206: 0, 207: 1}}, true)
	})
	t.Run("by another process", func(t *testing.T) {
		h := newHost(t, nil)
		h.refresh()
		h.Lookup(vm1, "")
		h.remove("sys/kernel/debug/kvm/201-9")
		reuse(h, "sleep\x00")
		h.refresh()
		h.expect(vm1, "", old, true)
		for _, d := range h.Domains() {
			if d.TGID == 201 {
				t.Errorf("not a guest: %+v", d)
			}
		}
	})
	t.Run("one tick apart", func(t *testing.T) {
		h := newHost(t, nil)
		h.refresh()
		if d, known := h.Lookup(snapshot.Process{TGID: 201, Start: vm1Start + tick}, "x"); known || d.Name != "x-201" {
			t.Errorf("%+v known %v", d, known)
		}
	})
}

// The thread that made a virtual machine is gone, or all of the guest is, and
// the id is that of a process without one.
func TestReusedByNoGuest(t *testing.T) {
	h := newHost(t, nil)
	if err := os.MkdirAll(h.path("sys/kernel/debug/kvm/133-9/vcpu0"), 0o700); err != nil {
		t.Fatal(err)
	}
	h.Learn(133)
	h.refresh()
	for _, d := range h.Domains() {
		if d.TGID == 133 {
			t.Errorf("no guest: %+v", d)
		}
	}
}

// A domain that does not run is renamed, and its past with it.
func TestRenamedPast(t *testing.T) {
	l := said(nil, records...)
	h := newHost(t, l)
	h.replace("proc/250/cmdline", uuidOld, uuid1) // by hand: it is none of libvirt's
	h.refresh()
	byHand := snapshot.Process{TGID: 250, Start: 4380 * tick}
	h.Lookup(vm1, "")
	h.Lookup(byHand, "")
	h.remove("proc/201", "proc/250", "run/libvirt/qemu/vm1.xml", "sys/kernel/debug/kvm/201-9", "sys/kernel/debug/kvm/250-10")
	h.refresh()
	l.listing.Store(&listing{records: []record{{nil, "renamed", uuid1, ShutOff, true, nil}}})
	h.expect(vm1, "", Domain{Name: "renamed", UUID: uuid1, State: ShutOff, Source: "libvirt", VCPUs: map[int]int{206: 0, 207: 1}, Metadata: titled}, true)
	h.expect(byHand, "", Domain{Name: "old style", UUID: uuid1, State: ShutOff, Source: "proc", VCPUs: map[int]int{253: 0}}, true)
}

// swtpm has a guest's uuid in its arguments, and is none.
func TestHelper(t *testing.T) {
	for _, test := range []struct{ name, remove string }{
		{"debugfs", "none"},
		{"no debugfs", "sys/kernel"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHost(t, said(nil, records...))
			h.remove(test.remove)
			h.refresh()
			before := h.Domains()
			if err := os.CopyFS(h.path("proc/300"), os.DirFS("testdata/host/proc/133")); err != nil { // libvirtd's files
				t.Fatal(err)
			}
			h.replace("proc/300/stat", "133 (libvirtd)", "300 (swtpm)")
			cmdline := "swtpm\x00socket\x00--tpmstate\x00dir=/var/lib/libvirt/swtpm/" + uuid1 + "\x00-name\x00guest=vm1\x00-uuid\x00" + uuid1 + "\x00"
			if err := os.WriteFile(h.path("proc/300/cmdline"), []byte(cmdline), 0o600); err != nil {
				t.Fatal(err)
			}
			h.refresh()
			if diff := cmp.Diff(before, h.Domains()); diff != "" || len(before) < 5 {
				t.Errorf("(-before +after)\n%s", diff)
			}
		})
	}
}

// libvirt died first, then its guests, then their process ids were reused.
func TestStaleStatus(t *testing.T) {
	h := newHost(t, nil)
	h.remove("sys/kernel/debug/kvm/201-9")
	h.replace("proc/201/cmdline", uuid1, uuidOld)
	h.refresh()
	for _, d := range h.Domains() {
		if d.TGID == 201 {
			t.Errorf("%+v", d)
		}
	}
}

func TestHotplug(t *testing.T) {
	h := newHost(t, nil)
	const file = "run/libvirt/qemu/vm1.xml"
	written := time.Unix(900, 0) // twice within what the file system can tell
	touch := func() {
		if err := os.Chtimes(h.path(file), written, written); err != nil {
			t.Fatal(err)
		}
	}
	touch()
	h.refresh()
	for _, step := range []struct {
		old, new    string
		vcpus, gone map[int]int
	}{
		{"<vcpu id='1' pid='207'/>", "<vcpu id='1' pid='207'/><vcpu id='2' pid='299'/>", map[int]int{206: 0, 207: 1, 299: 2}, nil},
		{"<vcpu id='1' pid='207'/>", "", map[int]int{206: 0, 299: 2}, map[int]int{207: 1}},
		{"<vcpu id='2' pid='299'/>", "<vcpu id='1' pid='300'/>", map[int]int{206: 0, 300: 1}, map[int]int{207: 1, 299: 2}},
		{"<vcpu id='1' pid='300'/>", "<vcpu id='1' pid='299'/>", map[int]int{206: 0, 299: 1}, map[int]int{207: 1, 300: 1}},
	} {
		h.replace(file, step.old, step.new)
		touch()
		h.refresh()
		got, _ := h.Lookup(vm1, "")
		if diff := cmp.Diff([]map[int]int{step.vcpus, step.gone}, []map[int]int{got.VCPUs, got.Ended}); diff != "" {
			t.Errorf("%s: alive, ended (-want +got)\n%s", step.new, diff)
		}
	}
	was, _ := h.Lookup(vm1, "")
	later := newHost(t, nil) // of which the first threads are alive again
	later.Restore(vm1, was)
	later.refresh()
	got, _ := later.Lookup(vm1, "")
	if diff := cmp.Diff(map[int]int{299: 1, 300: 1}, got.Ended); diff != "" {
		t.Errorf("ended while nobody looked (-want +got)\n%s", diff)
	}
}

// A thread that is not the first may have made the virtual machine.
func TestMadeByThread(t *testing.T) {
	h := newHost(t, nil)
	h.remove("run", "sys/kernel/debug/kvm/201-9")
	if err := os.MkdirAll(h.path("sys/kernel/debug/kvm/209-9"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(h.path("proc/209"), os.DirFS(h.path("proc/201"))); err != nil {
		t.Fatal(err)
	}
	h.replace("proc/209/stat", " 2226 ", " 2300 ")
	h.refresh()
	var got []int
	for _, d := range h.Domains() {
		if d.Name == "vm1" {
			got = append(got, d.TGID)
		}
	}
	if diff := cmp.Diff([]int{201}, got); diff != "" {
		t.Errorf("tgids of vm1 (-want +got)\n%s", diff)
	}
}

// What cannot be read hides nothing else, and is no sign of death.
func TestErrors(t *testing.T) {
	h := newHost(t, nil)
	h.refresh()
	h.replace("run/libvirt/qemu/vm10.xml", "domstatus", "something")
	h.replace("proc/201/stat", "(", "<")
	err := h.Refresh()
	if err == nil || !strings.Contains(err.Error(), "vm10.xml") || !strings.Contains(err.Error(), "process 201") {
		t.Errorf("error %v names neither file nor process", err)
	}
	if n := len(h.Domains()); n != 5 {
		t.Errorf("%d domains, want 5: %+v", n, h.Domains())
	}
}

func TestEmptyRoot(t *testing.T) {
	m := New(Config{Root: t.TempDir()})
	if err := m.Refresh(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if d := m.Domains(); len(d) != 0 {
		t.Errorf("%+v", d)
	}
}
