// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
)

func recent(c *Config) { c.Level = snapshot.Recent }

func TestLog(t *testing.T) {
	run(t, recent, func(t *testing.T, h *host, d *Daemon) {
		h.start(1, "web")
		h.start(2, "db")
		begin := time.Now()
		for i, code := range []uint32{0x72, 0x78, 0x72} {
			time.Sleep(time.Microsecond)
			h.exits(1, i%2, code, 1)
		}
		h.exits(2, 0, 0x72, 1)
		exit := func(i, vcpu int, code uint32, reason string) api.LoggedExit {
			return api.LoggedExit{Time: begin.Add(time.Duration(i) * time.Microsecond).Round(0), VCPU: vcpu, ISA: "svm", Code: code, Reason: reason,
				DurationNS: ptr(uint64(500)), RIP: "0xfff0"}
		}
		all := []api.LoggedExit{exit(3, 0, 0x72, "cpuid"), exit(2, 1, 0x78, "hlt"), exit(1, 0, 0x72, "cpuid")}
		for _, tt := range []struct {
			name  string
			query api.LogQuery
			want  []api.LoggedExit
			n     uint64
		}{
			{"all", api.LogQuery{}, all, 3},
			{"the latest", api.LogQuery{Limit: 2}, all[:2], 3},
			{"more than there are", api.LogQuery{Limit: 20}, all, 3},
			{"a vcpu", api.LogQuery{VCPU: ptr(1)}, all[1:2], 1},
			{"no vcpu", api.LogQuery{VCPU: ptr(7)}, nil, 0},
			{"a reason", api.LogQuery{Reason: "CPUID"}, []api.LoggedExit{all[0], all[2]}, 3},
			{"the latest for a reason", api.LogQuery{Reason: "cpuid", Limit: 1}, all[:1], 3},
			{"a code", api.LogQuery{Reason: "0x78"}, all[1:2], 3},
		} {
			got, err := d.Log("web", tt.query)
			want := api.Log{Domain: "web", Exits: tt.want, Logged: tt.n}
			if diff := cmp.Diff(want, got); err != nil || diff != "" {
				t.Errorf("%s: %v (-want +got)\n%s", tt.name, err, diff)
			}
		}

		h.exits(1, 0, 0x72, 10)
		got, err := d.Log("web", api.LogQuery{})
		if err != nil || got.Logged != 13 || got.Overrun != 13-ring-1 || len(got.Exits) != ring+1 {
			t.Errorf("overrun: %v, %d exits of %d, %d are lost", err, len(got.Exits), got.Logged, got.Overrun)
		}

		h.mu.Lock()
		slot := &h.snap.Slots[0]
		h.recent[slot.ID][slot.Recent-1].Present = true
		h.mu.Unlock()
		if got, err := d.Log("web", api.LogQuery{Limit: 1}); err != nil || got.Exits[0].DurationNS != nil {
			t.Errorf("an exit in progress: %+v, %v", got, err)
		}
	})
}

func TestLogErrors(t *testing.T) {
	run(t, nil, func(t *testing.T, h *host, d *Daemon) {
		h.start(1, "web")
		h.exits(1, 0, 0x72, 1)
		pass(time.Second)
		expect := func(name string, q api.LogQuery, want string) {
			t.Helper()
			_, err := d.Log(name, q)
			var conflict *api.ConflictError
			if !errors.As(err, &conflict) || err.Error() != want {
				t.Errorf("log: error %v, want %s", err, want)
			}
			err = d.Follow(t.Context(), name, q, func([]api.LogLine) error { t.Error("a line is written"); return nil })
			if !errors.As(err, &conflict) || err.Error() != want {
				t.Errorf("follow: error %v, want %s", err, want)
			}
		}
		expect("web", api.LogQuery{}, "the exits of domain 'web' are not logged at its level, time: 'virtexit level web recent' switches that on")
		expect("defined", api.LogQuery{}, "domain 'defined' is not running")
		if _, err := d.SetDomainLevel("web", ptr("recent")); err != nil {
			t.Fatal(err)
		}
		expect("web", api.LogQuery{Reason: "CPUDI"}, "no exit of svm is called 'CPUDI'")
		if _, err := d.SetCollection(api.Collection{Collection: "off"}); err != nil {
			t.Fatal(err)
		}
		expect("web", api.LogQuery{}, "collection is off: 'virtexit on' switches it on")
		var notFound *api.NotFoundError
		if _, err := d.Log("nobody", api.LogQuery{}); !errors.As(err, &notFound) {
			t.Errorf("error %v", err)
		}
		h.unload()
		h.mu.Lock()
		h.loaded = true
		h.mu.Unlock()
	})
}

// follower follows a log, and takes lines only while it is not blocked.
type follower struct {
	lines   []api.LogLine
	blocked chan struct{} // nil: not blocked
	err     chan error
	cancel  context.CancelFunc
}

func follow(t *testing.T, d *Daemon, name string, q api.LogQuery) *follower {
	ctx, cancel := context.WithCancel(t.Context())
	f := &follower{err: make(chan error, 1), cancel: cancel}
	go func() {
		f.err <- d.Follow(ctx, name, q, func(lines []api.LogLine) error {
			if f.blocked != nil {
				<-f.blocked
			}
			for _, l := range lines {
				if l.LoggedExit != nil {
					e := *l.LoggedExit
					l.LoggedExit = &e
				}
				f.lines = append(f.lines, l)
			}
			return nil
		})
	}()
	synctest.Wait()
	return f
}

// expect says what has come since it was last called: exits by vCPU, and how
// many were lost.
func (f *follower) expect(t *testing.T, what string, exits map[int]int, lost uint64) {
	t.Helper()
	got := make(map[int]int)
	var gotLost uint64
	for _, l := range f.lines {
		if l.LoggedExit != nil {
			got[l.VCPU]++
		}
		gotLost += l.Overrun
	}
	if diff := cmp.Diff(exits, got); diff != "" || gotLost != lost {
		t.Errorf("%s: %d are lost, want %d; exits by vCPU (-want +got)\n%s", what, gotLost, lost, diff)
	}
	f.lines = nil
}

func TestFollow(t *testing.T) {
	type exits = map[int]int
	run(t, recent, func(t *testing.T, h *host, d *Daemon) {
		h.start(1, "web")
		h.exits(1, 0, 0x72, 3)
		pass(time.Second)
		f := follow(t, d, "web", api.LogQuery{})
		few := follow(t, d, "web", api.LogQuery{Limit: 2, Reason: "hlt"})
		if diff := cmp.Diff([]api.LogLine{{Domain: "web"}}, f.lines); diff != "" {
			t.Errorf("first line (-want +got)\n%s", diff)
		}
		f.expect(t, "at first", exits{}, 0)

		h.exits(1, 0, 0x72, 2)
		h.exits(1, 0, 0x78, 1)
		pass(2 * followEvery)
		f.expect(t, "new exits", exits{0: 3}, 0)
		few.expect(t, "new exits for a reason", exits{0: 1}, 0)

		h.exits(1, 3, 0x72, 2) // a new vCPU
		pass(settle + 2*followEvery)
		f.expect(t, "a new vcpu", exits{3: 2}, 0)

		h.exits(1, 0, 0x72, ring+10)
		pass(2 * followEvery)
		f.expect(t, "too many exits", exits{0: ring}, 10)

		// Who does not read loses exits, and holds nobody.
		f.blocked = make(chan struct{})
		few.lines = nil
		h.exits(1, 0, 0x78, 1)
		pass(2 * followEvery)
		h.exits(1, 0, 0x78, ring+1)
		pass(2 * followEvery)
		few.expect(t, "beside a slow one", exits{0: 1 + ring}, 1)
		if s := d.Status(); s.Problem != "" {
			t.Errorf("status %+v", s)
		}
		close(f.blocked)
		pass(2 * followEvery)
		f.expect(t, "late", exits{0: 1 + ring}, 1)

		// An exit in progress waits for its end.
		h.exits(1, 0, 0x78, 1)
		present := func(yes bool) {
			h.mu.Lock()
			defer h.mu.Unlock()
			slot := &h.snap.Slots[0]
			h.recent[slot.ID][slot.Recent-1].Present = yes
		}
		present(true)
		pass(time.Second)
		f.expect(t, "in progress", exits{}, 0)
		present(false)
		pass(2 * followEvery)
		f.expect(t, "ended", exits{0: 1}, 0)

		// A pause of the duty is no end.
		if _, err := d.SetCollection(api.Collection{Collection: "on", Duty: &api.Duty{OnNS: 1e9, EveryNS: 4e9}}); err != nil {
			t.Fatal(err)
		}
		pass(4500 * time.Millisecond)
		h.exits(1, 0, 0x72, 1)
		pass(2 * followEvery)
		f.expect(t, "after a pause", exits{0: 1}, 0)

		few.cancel()
		if err := <-few.err; err != context.Canceled {
			t.Errorf("canceled: %v", err)
		}

		// The last exits of a vCPU, and with them the log's end.
		h.exits(1, 3, 0x72, 2)
		present(true)
		h.die(1)
		pass(10 * time.Second)
		f.expect(t, "at the end", exits{3: 2}, 0)
		select {
		case err := <-f.err:
			if err != nil {
				t.Errorf("at the end: %v", err)
			}
		default:
			t.Error("the log goes on without its domain")
		}
		pass(2 * time.Second)
		if len(h.snap.Slots) != 0 || len(d.kept) != 0 {
			t.Errorf("slots are not released: %+v, %v", h.snap.Slots, d.kept)
		}
	})
}

func TestFollowEnds(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(*host, *Daemon) error
		is   error
		text string
	}{
		{"level", func(h *host, d *Daemon) error {
			_, err := d.SetDomainLevel("web", ptr("time"))
			return err
		}, nil, "the exits of domain 'web' are not logged at its level, time: 'virtexit level web recent' switches that on"},
		{"off", func(h *host, d *Daemon) error {
			_, err := d.SetCollection(api.Collection{Collection: "off"})
			return err
		}, nil, "collection is off: 'virtexit on' switches it on"},
		{"unloaded", func(h *host, d *Daemon) error { h.unload(); return nil }, source.ErrGone, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, recent, func(t *testing.T, h *host, d *Daemon) {
				h.start(1, "web")
				h.exits(1, 0, 0x72, 3)
				pass(time.Second)
				f := follow(t, d, "web", api.LogQuery{Limit: 2})
				f.expect(t, "at first", map[int]int{0: 2}, 0)
				if err := tt.end(h, d); err != nil {
					t.Fatal(err)
				}
				err := <-f.err
				if tt.is != nil && !errors.Is(err, tt.is) || tt.text != "" && err.Error() != tt.text {
					t.Errorf("error %v, want %v %s", err, tt.is, tt.text)
				}
			})
		})
	}
}

// A domain's own level is forgotten with its process, maybe before a follower
// looks again.
func TestLogOutlivesLevel(t *testing.T) {
	run(t, nil, func(t *testing.T, h *host, d *Daemon) {
		h.start(1, "web")
		h.exits(1, 0, 0x72, 3)
		pass(time.Second)
		if _, err := d.SetDomainLevel("web", ptr("recent")); err != nil {
			t.Fatal(err)
		}
		l, err := d.openLog("web", api.LogQuery{})
		if err != nil {
			t.Fatal(err)
		}
		h.die(1)
		pass(10 * time.Second)
		if len(d.wish.processes) != 0 {
			t.Fatalf("levels of processes: %v, want none", d.wish.processes)
		}
		if r, err := l.read(false); err != nil || !r.ended {
			t.Errorf("ended: %t, error %v; want the end", r.ended, err)
		}
	})
}
