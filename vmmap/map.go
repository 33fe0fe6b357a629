// SPDX-License-Identifier: Apache-2.0

package vmmap

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"virtexit/internal/snapshot"
)

// linger is how long a process that died is kept when nobody ever looked it
// up: its last exits may still be on their way.
const linger = time.Minute

// Config holds what a Map depends on. The zero value is this host, without
// its libvirt daemon.
type Config struct {
	Root    string           // where proc, run and sys are; "/" when empty
	Libvirt *Libvirt         // names and lists domains; may be nil
	Now     func() time.Time // time.Now when nil
}

// Map knows which domain a process is. Its methods may be called from any
// goroutine; none of them waits for libvirt.
type Map struct {
	libvirt *Libvirt
	now     func() time.Time
	proc    proc
	debugfs debugfs
	kvm     string // a directory that is there while KVM is loaded

	scanning sync.Mutex // one scan at a time; held while files are read
	runDirs  runDirs

	mu      sync.Mutex // never held while files are read
	guests  map[key]*guest
	others  []Domain // what libvirt lists and no process is
	blind   bool     // there is no run directory of libvirt's
	dirty   bool     // join again: guests have changed,
	heard   *listing // or this is not what libvirt says now,
	serving bool     // or it began or ceased to answer
}

// key identifies a process as /proc does.
type key struct {
	tgid  int
	start uint64 // ticks
}

// guest is a process that runs a guest, or ran one.
type guest struct {
	name   string // made of the process, for want of a better one
	args   args
	where  *Container
	cloud  *Cloud  // as KubeVirt started it
	uid    int     // of its user
	run    *status // nil when no run directory told of it
	vcpus  map[int]int
	ended  map[int]int
	seen   time.Time // alive
	read   bool      // from /proc; otherwise it was only looked up
	named  bool      // libvirt once knew it,
	id     *int      // by this id; nil when it was restored
	wanted bool      // it was looked up, so it waits for Forget
	dead   bool
	domain Domain // who it is; the last word once it is dead
}

// New returns an empty Map.
func New(c Config) *Map {
	root := cmp.Or(c.Root, "/")
	m := &Map{
		libvirt: c.Libvirt,
		now:     c.Now,
		proc:    proc{filepath.Join(root, "proc")},
		debugfs: debugfs{filepath.Join(root, "sys/kernel/debug/kvm")},
		kvm:     filepath.Join(root, "sys/module/kvm"),
		runDirs: runDirs{run: filepath.Join(root, "run")},
		guests:  make(map[key]*guest),
	}
	if m.now == nil {
		m.now = time.Now
	}
	return m
}

// Refresh rereads the run directories, debugfs and /proc, and learns the
// processes that were looked up in vain. It reads local files only, but many:
// keep it off request paths. What could be read counts even when it returns
// an error.
func (m *Map) Refresh() error {
	m.scanning.Lock()
	defer m.scanning.Unlock()

	var errs []error
	run, there, err := m.runDirs.scan()
	if err != nil {
		errs = append(errs, err)
	}
	vms, err := m.vms()
	if err != nil {
		errs = append(errs, err)
	}
	pids := make(map[int]bool)
	for pid := range run {
		pids[pid] = true
	}
	for pid := range vms {
		pids[pid] = true
	}
	before := make(map[key]bool)
	m.mu.Lock()
	for k, g := range m.guests {
		if !g.dead {
			before[k], pids[k.tgid] = true, true
		}
	}
	m.mu.Unlock()

	found := make(map[key]guest, len(pids))
	unread := make(map[int]bool)
	for pid := range pids {
		k, g, err := m.read(pid)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("process %d: %w", pid, err))
			unread[pid] = true // which does not mean that it died
			continue
		}
		// The files of a guest outlive it when libvirt is dead, and its
		// process id may be another's by now.
		for _, s := range run[pid] {
			if s.tells(&g) {
				g.run, g.vcpus = s, s.vcpus
				break
			}
		}
		names, hasVM := vms[pid]
		if g.run == nil && !before[k] {
			if !hasVM {
				continue
			}
			// The thread that made a machine may be gone, and its id another's.
			if has, err := m.proc.hasVM(pid); err == nil && !has {
				continue
			}
		}
		if g.vcpus == nil {
			g.vcpus = m.debugfs.vcpus(names)
		}
		found[k] = g
	}

	m.mu.Lock()
	defer m.mu.Unlock()
	m.hear()
	m.blind = !there
	for k, g := range m.guests {
		if _, alive := found[k]; !alive && (g.dead || before[k] && !unread[k.tgid]) {
			m.bury(k, g)
		}
	}
	for k, g := range found {
		m.add(k, g)
	}
	return errors.Join(errs...)
}

// vms returns the directories in debugfs of each process that has a virtual
// machine. Where KVM is loaded but debugfs is not there to be read, the
// processes come from /proc.
func (m *Map) vms() (map[int][]string, error) {
	vms := make(map[int][]string)
	makers, err := m.debugfs.vms()
	if err == nil {
		for tid, names := range makers {
			if tgid, err := m.proc.tgid(tid); err == nil { // or that thread is gone
				vms[tgid] = append(vms[tgid], names...)
			}
		}
		return vms, nil
	}
	if _, err := os.Stat(m.kvm); err != nil {
		return vms, nil // without KVM nobody has one
	}
	users, err := m.proc.kvmUsers()
	for _, pid := range users {
		vms[pid] = nil
	}
	return vms, err
}

// read reads who a process says it is. It does so once in the life of a
// process, which never changes that.
func (m *Map) read(pid int) (key, guest, error) {
	s, err := m.proc.stat(pid)
	if err != nil {
		return key{}, guest{}, err
	}
	k := key{pid, s.start}
	g := guest{name: nameless(s.comm, pid), seen: m.now(), read: true}
	m.mu.Lock()
	old := m.guests[k]
	if old != nil && old.read {
		g.args, g.where, g.cloud, g.uid = old.args, old.where, old.cloud, old.uid
		m.mu.Unlock()
		return k, g, nil
	}
	m.mu.Unlock()
	cmdline, err := m.proc.cmdline(pid)
	if err != nil {
		return k, g, err
	}
	g.args = parseCmdline(cmdline)
	if g.where, err = m.proc.container(pid); err == nil && g.where != nil && g.where.Pod != "" {
		// A parent that is gone, or is not ours to see, is no reason to lose the guest.
		if launcher, err := m.proc.cmdline(s.parent); err == nil {
			g.cloud = parseLauncher(launcher)
		}
	}
	if err == nil {
		g.uid, err = m.proc.uid(pid)
	}
	return k, g, err
}

// nameless names a guest that has no name.
func nameless(comm string, tgid int) string { return fmt.Sprintf("%s-%d", text(comm), tgid) }

// add adds what was just read about a living process. What was known before
// and was not found again stays: libvirt removes its files before the process
// has died.
func (m *Map) add(k key, g guest) {
	m.dirty = true
	old := m.guests[k]
	if old == nil {
		m.guests[k] = &g
		return
	}
	old.name, old.args, old.where, old.cloud, old.uid, old.seen, old.read = g.name, g.args, g.where, g.cloud, g.uid, g.seen, true
	old.dead = false
	if g.run != nil {
		old.run = g.run
	}
	if len(g.vcpus) > 0 {
		old.ended = ended(old.ended, old.vcpus, g.vcpus)
		old.vcpus = g.vcpus
	}
}

// bury keeps the last word about a process that died.
func (m *Map) bury(k key, g *guest) {
	if !g.dead {
		g.dead = true
		g.domain.ID, g.domain.TGID, g.domain.Start, g.domain.State = nil, 0, 0, ShutOff
		m.dirty = true
	}
	if !g.wanted && m.now().Sub(g.seen) > linger {
		delete(m.guests, k)
	}
}

// Learn reads who the process is that has this id now, from /proc alone. It is
// cheap, and meant for the moment a process takes its first exit: it may die
// before the next Refresh. An unknown or dead tgid is left alone, and so is one
// that is by now of a process without a virtual machine.
func (m *Map) Learn(tgid int) {
	if has, err := m.proc.hasVM(tgid); err == nil && !has {
		return
	}
	k, g, err := m.read(tgid)
	if err != nil {
		return // Refresh will tell if it still matters
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.add(k, g)
}

// Lookup tells which domain a process is, or was: a process that died keeps
// its last known identity until Forget. It does no I/O. When nothing is known
// yet, it reports false and a domain named after comm, the kernel's name of
// the process; the next Refresh learns more, if the process still lives.
func (m *Map) Lookup(p snapshot.Process, comm string) (Domain, bool) {
	k := key{p.TGID, p.Start / tick}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hear()
	g := m.guests[k]
	if g == nil {
		g = &guest{name: nameless(comm, p.TGID), seen: m.now()}
		g.identify(k)
		m.guests[k] = g
	}
	g.wanted = true
	return g.domain, g.read || g.dead
}

// Forget drops a dead process. Call it for every process that was looked up,
// once its counts are not shown any more.
func (m *Map) Forget(p snapshot.Process) {
	k := key{p.TGID, p.Start / tick}
	m.mu.Lock()
	defer m.mu.Unlock()
	if g := m.guests[k]; g != nil {
		g.wanted = false
		if g.dead || !g.read {
			delete(m.guests, k)
		}
	}
}

// Restore tells who a process was, in the words of an earlier Lookup. It counts
// as dead, and waits for Forget, until a Refresh finds it alive.
func (m *Map) Restore(p snapshot.Process, d Domain) {
	d.ID, d.TGID, d.Start, d.State = nil, 0, 0, ShutOff
	k := key{p.TGID, p.Start / tick}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.guests[k] == nil {
		m.guests[k] = &guest{name: d.Name, seen: d.Seen, named: d.Source == "libvirt", vcpus: d.VCPUs, ended: d.Ended, wanted: true, dead: true, domain: d}
	}
}

// Domains lists the guests that run, whether they ever took an exit or not,
// and those that libvirt defines but that do not run. It does no I/O. Dead
// processes are not among them: Lookup tells these.
func (m *Map) Domains() []Domain {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hear()
	domains := slices.Clone(m.others)
	for _, g := range m.guests {
		if !g.dead {
			domains = append(domains, g.domain)
		}
	}
	slices.SortFunc(domains, func(a, b Domain) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.UUID, b.UUID), cmp.Compare(a.TGID, b.TGID))
	})
	return domains
}

// Thread tells the name of a thread, and when it began: nanoseconds of
// CLOCK_BOOTTIME, in /proc's precision. It reads one file.
func (m *Map) Thread(tid int) (comm string, start uint64, err error) {
	s, err := m.proc.stat(tid)
	return s.comm, s.start * tick, err
}

// hear joins again when anything has changed.
func (m *Map) hear() {
	last, serving := &listing{}, false
	if m.libvirt != nil {
		var err error
		last, err = m.libvirt.last()
		serving = err == nil
		m.dirty = m.dirty || last != m.heard || serving != m.serving
	}
	if m.dirty {
		m.dirty, m.heard, m.serving = false, last, serving
		m.join()
	}
}

// join tells each living process which domain it is. One that died bears the
// name that libvirt has since given to the domain.
func (m *Map) join() {
	type claim struct{ uuid, name string }
	claims := make(map[claim][]*guest)
	past := make(map[string][]*guest) // by uuid
	for k, g := range m.guests {
		if g.dead {
			if g.named {
				past[g.domain.UUID] = append(past[g.domain.UUID], g)
			}
			continue
		}
		g.identify(k)
		c := claim{g.domain.UUID, g.domain.Name}
		claims[c] = append(claims[c], g)
	}
	m.others = nil
	for _, r := range m.heard.records {
		d := Domain{ID: r.id, Name: r.name, UUID: r.uuid, State: r.state, Source: "libvirt", Seen: m.heard.at}
		gone := false
		for _, g := range past[r.uuid] {
			g.domain.Name = r.name
			gone = gone || r.id != nil && g.id != nil && *g.id == *r.id
		}
		if r.metadata != nil {
			d.Metadata = *r.metadata
		}
		claimants := claims[claim{r.uuid, r.name}]
		switch {
		case len(claimants) > 0:
			if g := choose(claimants, r, m.blind); g != nil {
				g.adopt(r, m.serving)
			}
		case r.id == nil || m.serving && !gone:
			m.others = append(m.others, d)
		case r.persistent:
			// Its process is gone, which libvirt did not get round to say.
			d.ID, d.State = nil, ShutOff
			m.others = append(m.others, d)
		}
	}
}

// choose tells which of the processes that claim to be a domain is the one
// that libvirt runs: the one that its run directory tells, if it does so yet.
// Others may have the same arguments, such as that of another libvirt which the
// domain is migrated from or to. To the blind, arguments must do, unless several
// processes have them.
func choose(claimants []*guest, r record, blind bool) *guest {
	var chosen []*guest
	for _, g := range claimants {
		switch {
		case r.id == nil:
		case g.run == nil && blind, g.run != nil && g.run.id != nil && *g.run.id == *r.id:
			chosen = append(chosen, g)
		}
	}
	if len(chosen) != 1 {
		return nil
	}
	return chosen[0]
}

// identify sets the domain of a living process as the process and the run
// directory tell it.
func (g *guest) identify(k key) {
	d := Domain{
		Name:   g.name,
		UUID:   g.args.uuid,
		TGID:   k.tgid,
		Start:  k.start * tick,
		State:  Running,
		Source: "process",
		VCPUs:  g.vcpus,
		Ended:  g.ended,
		Seen:   g.seen,

		Container: g.where,
		Metadata:  Metadata{Cloud: g.cloud},
	}
	if g.read {
		uid := g.uid
		d.UID = &uid
	}
	if g.args.name != "" {
		d.Name, d.Source = g.args.name, "proc"
	}
	if s := g.run; s != nil {
		d.ID, d.Name, d.UUID, d.Source, d.Metadata = s.id, s.name, s.uuid, "rundir", s.Metadata
		if s.state != "" {
			d.State = s.state
		}
	}
	if g.named {
		d.Source = "libvirt"
	}
	g.domain = d
}

// adopt adds what libvirt says of the domain. While it does not answer, the
// run directory knows the state and the metadata as well.
func (g *guest) adopt(r record, serving bool) {
	g.named, g.id = true, r.id
	g.domain.ID, g.domain.Source = r.id, "libvirt"
	if !serving && g.run != nil {
		return
	}
	g.domain.State = r.state
	if r.metadata != nil {
		g.domain.Metadata = *r.metadata
	}
}
