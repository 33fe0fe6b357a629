// SPDX-License-Identifier: Apache-2.0

package vmmap

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// script is a conn whose answers the test chooses.
type script struct {
	lists   chan []record // list waits for one; closed, it fails
	changes chan struct{}
	end     chan error
	closed  bool
	reads   chan chan map[Run]map[int]uint64 // each call of exits waits for its answer; nil, it fails
}

var errList, errExits = errors.New("list failed"), errors.New("exits failed")

func newScript() *script {
	return &script{lists: make(chan []record, 9), changes: make(chan struct{}), end: make(chan error), reads: make(chan chan map[Run]map[int]uint64, 9)}
}

func (s *script) list() ([]record, error) {
	r, ok := <-s.lists
	if !ok {
		return nil, errList
	}
	return r, nil
}
func (s *script) exits() (map[Run]map[int]uint64, error) {
	answer := make(chan map[Run]map[int]uint64)
	s.reads <- answer
	if r := <-answer; r != nil {
		return r, nil
	}
	return nil, errExits
}
func (s *script) changed() <-chan struct{} { return s.changes }
func (s *script) lost() <-chan error       { return s.end }
func (s *script) close()                   { s.closed = true }

// uptime is that of a machine that booted with the epoch.
func uptime() time.Duration { return time.Duration(time.Now().UnixNano()) }

// run runs a Libvirt until the test ends.
func run(t *testing.T, dial func(string) (conn, error)) *Libvirt {
	l := NewLibvirt("test:", uptime)
	l.dial = dial
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	})
	synctest.Wait()
	return l
}

func expectStatus(t *testing.T, l *Libvirt, want string) {
	t.Helper()
	synctest.Wait()
	diff := cmp.Diff(LibvirtStatus{Connected: want == "", URI: "test:", Error: want}, l.Status())
	if diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func expectNames(t *testing.T, l *Libvirt, want ...string) {
	t.Helper()
	synctest.Wait()
	var got []string
	for _, r := range l.listing.Load().records {
		got = append(got, r.name)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestLibvirtRelists(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := newScript(), newScript()
		conns := []conn{first, second}
		l := run(t, func(string) (conn, error) {
			if len(conns) == 0 {
				return nil, errors.New("no more")
			}
			c := conns[0]
			conns = conns[1:]
			return c, nil
		})
		first.lists <- []record{{name: "a"}}
		expectNames(t, l, "a")
		expectStatus(t, l, "")

		first.lists <- []record{{name: "a"}, {name: "b"}}
		first.changes <- struct{}{}
		expectNames(t, l, "a", "b")

		first.end <- errors.New("died")
		expectStatus(t, l, "died")
		expectNames(t, l, "a", "b") // what it said last stays known
		if !first.closed {
			t.Error("connection left open")
		}

		second.lists <- []record{{name: "c"}}
		time.Sleep(firstRetry)
		expectNames(t, l, "c")
		expectStatus(t, l, "")

		close(second.lists)
		second.changes <- struct{}{}
		expectStatus(t, l, "list failed")
		time.Sleep(firstRetry) // no longer: it had been connected
		expectStatus(t, l, "no more")
	})
}

func TestLibvirtRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var at []time.Duration
		l := run(t, func(string) (conn, error) {
			at = append(at, time.Since(start))
			return nil, errors.New("absent")
		})
		time.Sleep(15 * time.Second)
		expectStatus(t, l, "absent")
		ms := time.Millisecond
		want := []time.Duration{0, 250 * ms, 750 * ms, 1750 * ms, 3750 * ms, 7750 * ms, 12750 * ms}
		if diff := cmp.Diff(want, at); diff != "" {
			t.Errorf("attempts (-want +got)\n%s", diff)
		}
	})
}

// Neither Status nor a Map waits for a daemon that hangs, and Run can end.
func TestLibvirtHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript()
		defer close(s.lists)
		l := run(t, func(string) (conn, error) { return s, nil })
		m := New(Config{Root: t.TempDir(), Libvirt: l})
		s.lists <- []record{{name: "a"}}
		expectStatus(t, l, "")

		s.changes <- struct{}{} // and no list follows
		time.Sleep(patience - 1)
		expectStatus(t, l, "")
		time.Sleep(time.Nanosecond)
		expectStatus(t, l, "no answer for 2s")
		if d := m.Domains(); len(d) != 1 || d[0].Name != "a" {
			t.Errorf("domains: %+v", d)
		}
		s.lists <- []record{{name: "b"}}
		expectStatus(t, l, "")
		s.changes <- struct{}{} // Run ends while it hangs again
	})
}

// Exits never waits, and asks for the next reading.
func TestExits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScript()
		l := run(t, func(string) (conn, error) { return s, nil })
		expect := func(what string, exits uint64, err string) {
			t.Helper()
			synctest.Wait()
			e := l.Exits()
			synctest.Wait() // it has been asked
			var got string
			if e.Err != nil {
				got = e.Err.Error()
			}
			if e.Runs[Run{"u", 1}][0] != exits || got != err || e.Ended < e.Begun || (exits == 0) != (e.Begun == 0) {
				t.Errorf("%s: %+v, want %d exits and error %q", what, e, exits, err)
			}
		}
		answer := func(reading chan map[Run]map[int]uint64, exits uint64) {
			reading <- map[Run]map[int]uint64{{"u", 1}: {0: exits}}
		}
		tell := func(exits uint64) { answer(<-s.reads, exits) }
		expect("nothing is known of a connection that does not list yet", 0, "not connected yet")
		s.lists <- nil
		expect("nothing was read", 0, "")
		tell(5)
		expect("read", 5, "")
		synctest.Wait()
		select {
		case <-s.reads:
			t.Error("read again at once")
		default:
		}
		time.Sleep(rest)
		<-s.reads <- nil
		expect("the last reading stays when the next one fails", 5, "exits failed")
		time.Sleep(rest)
		expect("still", 5, "exits failed")
		tell(6)
		expect("read again", 6, "")

		// A reading hangs, and is passed by. Of two that overlap the one that ends
		// first stays.
		time.Sleep(rest)
		expect("late", 6, "")
		first := <-s.reads
		time.Sleep(patience)
		second := <-s.reads
		time.Sleep(time.Millisecond)
		answer(first, 8)
		expect("the one begun first", 8, "")
		time.Sleep(time.Millisecond)
		answer(second, 7)
		expect("the one begun second", 8, "")
		time.Sleep(patience)
		expect("asked", 8, "")
		first = <-s.reads
		time.Sleep(patience)
		tell(9)
		expect("the one begun second ends first", 9, "")
		time.Sleep(time.Millisecond)
		answer(first, 8)
		expect("the one begun first ends second", 9, "")
		time.Sleep(patience)
		for range readers + 2 { // one that took long is followed by a rest
			l.Exits()
			time.Sleep(rest + patience)
		}
		synctest.Wait()
		if e := l.Exits(); e.Err == nil || e.Err.Error() != "3 calls have no answer" {
			t.Errorf("all hang: %+v", e)
		}
		expectStatus(t, l, "") // names are told all the same
		s.lists <- []record{{name: "a"}}
		s.changes <- struct{}{}
		expectNames(t, l, "a")
		s.end <- errors.New("died")
		synctest.Wait()
		if s.closed {
			t.Error("closed while there are calls")
		}
		for range readers {
			tell(10)
		}
		synctest.Wait()
		if !s.closed {
			t.Error("left open")
		}
		if e := l.Exits(); e.Err == nil || e.Err.Error() != "died" {
			t.Errorf("lost: %+v", e)
		}
		s.lists <- nil
		time.Sleep(firstRetry)
		<-s.reads <- nil // which was asked for before
	})
}
