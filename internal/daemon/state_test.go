// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/internal/ledger"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
	"virtexit/vmmap"
)

// machine is a host on which one daemon follows another.
type machine struct {
	*host
	t    *testing.T
	dir  string
	name int // of the boot
	d    *Daemon
	log  bytes.Buffer
	end  func()
}

func onMachine(t *testing.T, test func(*testing.T, *machine)) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{host: newHost(), t: t, dir: t.TempDir()}
		time.Sleep(time.Hour)
		test(t, m)
		if m.end != nil {
			m.stop()
		}
	})
}

// begin starts a daemon.
func (m *machine) begin() {
	m.log.Reset()
	m.d = New(Config{
		Open: m.Open, Identities: m.host, On: true, Level: snapshot.Time, Interval: time.Second,
		Retention: ledger.Retention{Age: time.Hour, Count: 10},
		StateDir:  m.dir, StateInterval: 30 * time.Second, Boot: fmt.Sprint(m.name), Machine: "m",
		BootTime: m.now, CPUTime: m.now, Log: slog.New(slog.NewTextHandler(&m.log, nil)),
	})
	ctx, cancel := context.WithCancel(m.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.d.Run(ctx)
	}()
	m.end = func() { cancel(); <-done; m.end = nil }
	synctest.Wait()
}

// stop ends the daemon as systemd does.
func (m *machine) stop() {
	m.end()
	clear(m.learnt)
}

// kill ends it at once: what it does yet has no effect.
func (m *machine) kill() {
	m.t.Helper()
	synctest.Wait()
	before, err := os.ReadFile(m.file())
	if err != nil {
		m.t.Fatal(err)
	}
	m.open.SetLevel(snapshot.Off) // by its socket
	m.mu.Lock()
	m.open.gone = true
	m.mu.Unlock()
	m.stop()
	if err := os.WriteFile(m.file(), before, 0o600); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) file() string { return filepath.Join(m.dir, stateName) }

// reload loads the module again.
func (m *machine) reload() {
	m.unload()
	m.loaded = true
	m.snap.Loaded = uint64(m.now())
}

// reboot boots the host again.
func (m *machine) reboot() {
	m.name++
	m.boot = time.Now()
	clear(m.processes)
	time.Sleep(10 * time.Second)
	m.reload()
}

// accounted checks that each exit is in one place, and how many there are.
func (m *machine) accounted(exits, missed uint64) api.Status {
	m.t.Helper()
	s := m.d.Status()
	sum := s.Unattributed + s.Missed
	for _, dom := range m.d.Domains().Domains {
		sum += dom.Count
	}
	if s.Exits != exits || s.Missed != missed || sum != exits {
		m.t.Errorf("%d exits, %d missed, %d accounted for; want %d, %d missed", s.Exits, s.Missed, sum, exits, missed)
	}
	return s
}

func (m *machine) counts() map[string]uint64 {
	counts := make(map[string]uint64)
	for _, dom := range m.d.Domains().Domains {
		if dom.Count > 0 {
			counts[dom.Name+" "+dom.State] += dom.Count
		}
	}
	return counts
}

func (m *machine) expect(want map[string]uint64) {
	m.t.Helper()
	if diff := cmp.Diff(want, m.counts()); diff != "" {
		m.t.Errorf("domains (-want +got)\n%s", diff)
	}
}

// A daemon that is started again goes on where the last one was, however that
// ended, with the names of those who have died.
func TestRestart(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(*machine)
	}{
		{"stopped", (*machine).stop},
		{"killed", (*machine).kill},
	} {
		t.Run(tc.name, func(t *testing.T) {
			onMachine(t, func(t *testing.T, m *machine) {
				m.begin()
				began := time.Now()
				m.start(1, "web")
				m.start(2, "brief")
				m.exits(1, 0, 0x72, 50)
				m.exits(2, 0, 0x72, 7)
				pass(10 * time.Second)
				m.die(2)
				pass(35 * time.Second)
				if n := len(m.snap.Slots); n != 1 {
					t.Errorf("%d slots, of one process that lives", n)
				}
				m.exits(1, 1, 0x7b, 3) // not saved, not even seen
				tc.end(m)
				if m.level != snapshot.Off {
					t.Error("the kernel still counts")
				}
				m.exits(1, 0, 0x72, 1000) // seen by nobody
				time.Sleep(time.Minute)
				m.begin()
				s := m.accounted(60, 0)
				if !s.TotalsSince.Equal(began) || !s.Since.After(began) || time.Duration(s.ObservedNS) > 46*time.Second {
					t.Errorf("totals since %v, daemon since %v, observed for %v", s.TotalsSince, s.Since, time.Duration(s.ObservedNS))
				}
				m.expect(map[string]uint64{"web running": 53, "brief shut off": 7})
				m.exits(1, 0, 0x72, 5)
				pass(2 * time.Second)
				m.accounted(65, 0)
				m.expect(map[string]uint64{"web running": 58, "brief shut off": 7})
				if !m.d.StateKept() {
					t.Error("it says that the state is not kept")
				}
				web := report(t, m.d, 0, "web").Domains[0]
				if span := time.Duration(web.SpanNS); span < 46*time.Second || span > 48*time.Second {
					t.Errorf("observed for %v", span)
				}
				if len(web.VCPUs) != 2 || web.VCPUs[0].Exits != 55 || web.VCPUs[1].Exits != 3 || *web.UUID == "" {
					t.Errorf("web: %+v", web)
				}
				if strings.Contains(m.log.String(), "WARN") {
					t.Errorf("log\n%s", &m.log)
				}
			})
		})
	}
}

// The module is another one, and so are all slots, although the first have the
// numbers that those before them had.
func TestRestartReloaded(t *testing.T) {
	onMachine(t, func(t *testing.T, m *machine) {
		m.begin()
		m.start(1, "web")
		m.exits(1, 0, 0x72, 50)
		pass(2 * time.Second)
		m.stop()
		m.reload()
		m.begin()
		m.accounted(50, 0)
		m.exits(1, 0, 0x72, 60)
		pass(2 * time.Second)
		m.accounted(110, 0)
		m.expect(map[string]uint64{"web running": 110})

		// What it counts for others, and they release, nobody here will ever see.
		m.kill()
		m.reload()
		m.snap.Released = 1000
		m.begin()
		if s := m.d.Status(); s.Missed != 1000 || s.Exits > 1110 || s.Exits < 1050 {
			t.Errorf("status %+v", s)
		}
	})
}

func TestRestartRebooted(t *testing.T) {
	onMachine(t, func(t *testing.T, m *machine) {
		m.begin()
		m.start(1, "web")
		m.start(2, "db")
		m.exits(1, 0, 0x72, 50)
		pass(10 * time.Second)
		since := sinceOf(m)["web"]
		m.stop()
		m.reboot()
		m.begin()
		m.accounted(50, 0)
		m.expect(map[string]uint64{"web shut off": 50})
		if got := sinceOf(m)["web"]; got.Sub(since).Abs() > time.Second {
			t.Errorf("counted since %v, then %v", since, got)
		}
		// The same number, the same start, but another boot.
		m.start(1, "web")
		m.exits(1, 0, 0x72, 4)
		pass(10 * time.Second)
		m.accounted(54, 0)
		m.expect(map[string]uint64{"web running": 4, "web shut off": 50})
		pass(time.Hour)
		if s := m.d.Status(); s.Exits != 54 || s.Missed != 0 {
			t.Errorf("status %+v", s)
		}
		m.expect(map[string]uint64{"web running": 4})
	})
}

// A clock that is wrong after the boot does not move what was before it into it.
func TestRestartClock(t *testing.T) {
	onMachine(t, func(t *testing.T, m *machine) {
		m.begin()
		m.exits(1, 0, 0x72, 50)
		pass(10 * time.Second)
		m.stop()
		m.name++
		m.boot = time.Now().Add(-10 * time.Hour)
		m.reload()
		m.begin()
		m.accounted(50, 0)
		for p := range m.d.latest().Processes {
			if int64(p.Start) >= 0 {
				t.Errorf("%v seems to have started in this boot", p)
			}
		}
	})
}

// Who lived all the time, with nobody to count it, is not forgotten.
func TestRestartLate(t *testing.T) {
	onMachine(t, func(t *testing.T, m *machine) {
		m.begin()
		m.start(1, "web")
		m.exits(1, 0, 0x72, 50)
		pass(10 * time.Second)
		m.stop()
		time.Sleep(24 * time.Hour)
		m.slow = 3 * time.Second
		m.begin()
		pass(20 * time.Second)
		m.expect(map[string]uint64{"web running": 50})
	})
}

// sinceOf tells since when domains are counted.
func sinceOf(m *machine) map[string]time.Time {
	since := make(map[string]time.Time)
	for _, dom := range m.d.Domains().Domains {
		if dom.Since != nil {
			since[dom.Name] = *dom.Since
		}
	}
	return since
}

// A file that is not what was saved is set aside, and the daemon begins anew.
func TestStateSetAside(t *testing.T) {
	var good []byte
	onMachine(t, func(t *testing.T, m *machine) {
		m.begin()
		m.start(1, "web")
		m.exits(1, 0, 0x72, 50)
		pass(2 * time.Second)
		m.stop()
		var err error
		if good, err = os.ReadFile(m.file()); err != nil {
			t.Fatal(err)
		}
	})
	write := func(text string) func(t *testing.T, file string) {
		return func(t *testing.T, file string) {
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	replace := func(old, new string) func(t *testing.T, file string) {
		if !bytes.Contains(good, []byte(old)) {
			t.Fatalf("no %s in\n%s", old, good)
		}
		return write(strings.Replace(string(good), old, new, 1))
	}
	lines := strings.SplitAfter(string(good), "\n")
	for _, tc := range []struct {
		name, problem string
		make          func(t *testing.T, file string)
	}{
		{"empty", "unexpected EOF", write("")},
		{"torn", "unexpected end of JSON", write(string(good[:len(good)/2]))},
		{"without its end", "unexpected EOF", write(strings.Join(lines[:len(lines)-2], ""))},
		{"without a line", "inconsistent", write(strings.Join(slices.Delete(slices.Clone(lines), 2, 3), ""))},
		{"with more", "follows its end", write(string(good) + "{}\n")},
		{"a bit has changed", "checksum", replace(`"comm":"qemu"`, `"comm":"qemv"`)},
		{"another version", "its version is 2, this program's is 1", replace(`"version":1`, `"version":2`)},
		{"of another program", "not a state of virtexitd", write("{}\n")},
		{"binary", "not a state of virtexitd", write("\x7fELF\x00\x00")},
		{"of another host", "another host's", func(t *testing.T, file string) {
			replace(`"machine":"m"`, `"machine":"x"`)(t, file)
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			write(string(sealed(text)))(t, file)
		}},
		{"zeros", "not a state of virtexitd", write(strings.Repeat("\x00", 5000))},
		{"writable by others", "others could write", func(t *testing.T, file string) {
			write(string(good))(t, file)
			if err := os.Chmod(file, 0o622); err != nil {
				t.Fatal(err)
			}
		}},
		{"a link", "too many levels", func(t *testing.T, file string) {
			write(string(good))(t, file+".x")
			if err := os.Symlink(file+".x", file); err != nil {
				t.Fatal(err)
			}
		}},
		{"a directory", "not a regular file", func(t *testing.T, file string) {
			if err := os.Mkdir(file, 0o700); err != nil {
				t.Fatal(err)
			}
		}},
		{"a pipe", "not a regular file", func(t *testing.T, file string) {
			if err := syscall.Mkfifo(file, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"from the future", "saved", func(*testing.T, string) {}}, // by the host that follows, whose boot was not long ago
	} {
		t.Run(tc.name, func(t *testing.T) {
			onMachine(t, func(t *testing.T, m *machine) {
				tc.make(t, m.file())
				if tc.name == "from the future" {
					write(string(good))(t, m.file())
					m.boot = time.Now()
				}
				before, _ := os.Lstat(m.file())
				m.begin()
				if !strings.Contains(m.log.String(), tc.problem) || !strings.Contains(m.log.String(), "WARN") {
					t.Errorf("want %q in\n%s", tc.problem, &m.log)
				}
				if after, err := os.Lstat(m.file() + ".bad"); err != nil || !os.SameFile(before, after) {
					t.Errorf("set aside: %v", err)
				}
				m.accounted(0, 0)
				m.exits(1, 0, 0x72, 9)
				pass(2 * time.Second)
				m.accounted(9, 0)
				m.stop()
				m.begin()
				m.accounted(9, 0)
				if strings.Contains(m.log.String(), "WARN") {
					t.Errorf("again:\n%s", &m.log)
				}
			})
		})
	}
}

// Without a place for its state the daemon works all the same.
func TestStateNowhere(t *testing.T) {
	for _, tc := range []struct {
		name, problem string
		make          func(t *testing.T, m *machine)
	}{
		{"no directory", "no such file", func(t *testing.T, m *machine) { m.dir += "/none" }},
		{"another daemon's", "another virtexitd has it", func(t *testing.T, m *machine) {
			other, err := openStore(m.dir)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { other.close() })
		}},
		{"can't be set aside", "can't be read or set aside", func(t *testing.T, m *machine) {
			for _, dir := range []string{m.file() + ".bad/x", m.file()} {
				if err := os.MkdirAll(dir, 0o700); err != nil {
					t.Fatal(err)
				}
			}
		}},
		{"can't be written", "saving the state", func(t *testing.T, m *machine) {
			if err := os.MkdirAll(m.file()+".new/x", 0o700); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			onMachine(t, func(t *testing.T, m *machine) {
				tc.make(t, m)
				m.begin()
				m.exits(1, 0, 0x72, 9)
				pass(2 * time.Second)
				m.die(1)
				pass(10 * time.Second)
				m.accounted(9, 0)
				if len(m.snap.Slots) != 0 {
					t.Error("slots are not released")
				}
				if n := strings.Count(m.log.String(), "WARN"); n != 1 || !strings.Contains(m.log.String(), tc.problem) {
					t.Errorf("%d warnings, want one of %q in\n%s", n, tc.problem, &m.log)
				}
				if m.d.StateKept() {
					t.Error("it says that the state is kept")
				}
			})
		})
	}
}

// No slot is released before its counts are on the disk.
func TestSavedBeforeReleased(t *testing.T) {
	onMachine(t, func(t *testing.T, m *machine) {
		m.begin()
		released := 0
		m.d.mu.Lock()
		m.d.source = &watched{m.d.source, func(ids []snapshot.SlotID) {
			f, err := os.Open(m.file())
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			s, err := readState(f, ledger.Retention{})
			if err != nil {
				t.Fatal(err)
			}
			saved := s.ledger.View()
			for _, slot := range m.snap.Slots {
				if slices.Contains(ids, slot.ID) {
					released++
					if total := saved.Processes[slot.Process.InProc()]; total == nil || total.Live || total.Exits != slot.Exits() {
						t.Errorf("slot %v of %d exits is released, saved is %+v", slot.ID, slot.Exits(), total)
					}
				}
			}
		}}
		m.d.mu.Unlock()
		for tgid := 1; tgid <= 20; tgid++ {
			m.exits(tgid, 0, 0x72, uint64(tgid))
			pass(300 * time.Millisecond)
			m.exits(tgid, 0, 0x72, uint64(tgid))
			m.die(tgid)
			pass(time.Duration(tgid) * 100 * time.Millisecond)
		}
		pass(10 * time.Second)
		if released != 20 {
			t.Errorf("%d slots have been released, of 20", released)
		}
	})
}

type watched struct {
	source.Source
	release func([]snapshot.SlotID)
}

func (w *watched) Release(ids []snapshot.SlotID) error {
	w.release(ids)
	return w.Source.Release(ids)
}

// However often and whenever the daemon ends, no exit is lost or counted twice.
func TestRestartAtRandom(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			onMachine(t, func(t *testing.T, m *machine) {
				rng := rand.New(rand.NewPCG(seed, 3))
				m.begin()
				want := make(map[string]uint64)
				for range 150 {
					switch rng.IntN(8) {
					case 0:
						m.die(1 + rng.IntN(4))
					case 1:
						m.stop()
						time.Sleep(time.Duration(rng.IntN(20)) * time.Second)
						if rng.IntN(2) == 0 {
							m.reload()
						}
						m.begin()
					case 2:
						m.kill()
						time.Sleep(time.Duration(rng.IntN(20)) * time.Second)
						m.begin()
					case 3:
						pass(time.Duration(rng.IntN(40)) * time.Second)
					default:
						tgid, n := 1+rng.IntN(4), rng.Uint64N(100)
						m.exits(tgid, rng.IntN(3), rng.Uint32N(4), n)
						want[fmt.Sprint("qemu-", tgid)] += n
					}
					if rng.IntN(3) == 0 {
						pass(time.Duration(rng.IntN(3000)) * time.Millisecond)
					}
				}
				var sum uint64
				for _, n := range want {
					sum += n
				}
				m.accounted(sum, 0)
				got := make(map[string]uint64)
				for _, dom := range m.d.Domains().Domains {
					if dom.Count > 0 {
						got[dom.Name] += dom.Count
					}
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("domains (-want +got)\n%s", diff)
				}
			})
		})
	}
}

func FuzzReadState(f *testing.F) {
	l := ledger.New(ledger.Retention{})
	slot := snapshot.Slot{ID: snapshot.SlotID{Index: 1}, Process: snapshot.Process{TGID: 5, Start: 6}, VCPU: 1, Since: 3, Level: snapshot.Time, Rows: []snapshot.Row{{Code: 7, Count: 8, Time: 9}}}
	dead := slot
	dead.ID.Index, dead.Retired = 2, true
	if _, err := l.Apply(&snapshot.Snapshot{TickHz: 1e9, Loaded: 1, Released: 4, Slots: []snapshot.Slot{slot, dead}}, 10); err != nil {
		f.Fatal(err)
	}
	text := func(l *ledger.Ledger, domains map[snapshot.Process]vmmap.Domain) []byte {
		var b bytes.Buffer
		s := &state{stateHeader{Version: stateVersion, Boot: "b", Saved: time.Unix(1, 0).UTC(), BootTime: 11, Since: time.Unix(0, 5).UTC()}, l.State(), domains}
		if err := s.write(&b); err != nil {
			f.Fatal(err)
		}
		return b.Bytes()
	}
	good := text(l, map[snapshot.Process]vmmap.Domain{slot.Process: {Name: "web", VCPUs: map[int]int{1: 2}}})
	f.Add(good)
	f.Add(good[:len(good)-10])
	f.Add(text(ledger.New(ledger.Retention{}), nil))
	f.Fuzz(func(t *testing.T, in []byte) {
		// So that there is more to find.
		s, err := readState(bytes.NewReader(sealed(in)), ledger.Retention{Age: 1, Count: 1})
		if err != nil {
			return
		}
		// What was accepted can be used.
		if tot := s.ledger.Totals(); tot.Exits != tot.Attributed+tot.Unattributed+tot.Missed {
			t.Errorf("totals %+v", tot)
		}
		again, err := readState(bytes.NewReader(text(s.ledger, s.domains)), ledger.Retention{})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(s.ledger.Totals(), again.ledger.Totals()); diff != "" {
			t.Errorf("written and read again (-want +got)\n%s", diff)
		}
		if _, err := s.ledger.Apply(&snapshot.Snapshot{TickHz: 1, Slots: []snapshot.Slot{slot}}, 5); err != nil && !errors.Is(err, ledger.ErrInconsistent) {
			t.Error(err)
		}
		s.ledger.Reboot(1)
		s.ledger.Expire(func(snapshot.Process) bool { return false })
	})
}

// sealed is a file with an end that fits.
func sealed(in []byte) []byte {
	i := bytes.LastIndex(in, []byte(`{"end":`))
	if i < 0 {
		return in
	}
	sum := newChecksum()
	sum.Write(in[:i])
	return append(in[:i:i], fmt.Sprintf(`{"end":{"records":%d,"crc32c":%d}}`, bytes.Count(in[:i], []byte{'\n'})-1, sum.Sum32())...)
}

// What it takes to keep the state of 1000 domains of 8 vCPUs: to copy it, which
// others wait for, and to write it.
func BenchmarkState(b *testing.B) {
	for _, rows := range []int{12, 30} {
		snap := &snapshot.Snapshot{TickHz: 2e9, Loaded: 1}
		for i := range uint32(8000) {
			s := snapshot.Slot{ID: snapshot.SlotID{Index: i}, Process: snapshot.Process{TGID: int(i/8) + 1, Start: 1e15}, Comm: "qemu", TID: int(i), VCPU: int(i % 8), Since: 2e15}
			for r := range uint32(rows) {
				row := snapshot.Row{Code: r, Count: 123456, Time: 1e12, User: 1e11, Max: 1e8}
				for h := range 14 {
					row.Hist[h] = 12345
				}
				s.Rows = append(s.Rows, row)
			}
			snap.Slots = append(snap.Slots, s)
		}
		l := ledger.New(ledger.Retention{})
		if _, err := l.Apply(snap, 3e15); err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("copy/rows=%d", rows), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				l.State()
			}
		})
		b.Run(fmt.Sprintf("write/rows=%d", rows), func(b *testing.B) {
			b.ReportAllocs()
			s := &state{ledger: l.State()}
			for b.Loop() {
				var out counting
				if err := s.write(&out); err != nil {
					b.Fatal(err)
				}
				b.SetBytes(int64(out))
			}
		})
	}
}

type counting int64

func (c *counting) Write(b []byte) (int, error) { *c += counting(len(b)); return len(b), nil }
