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
}

var errList = errors.New("list failed")

func newScript() *script {
	return &script{make(chan []record, 9), make(chan struct{}), make(chan error), false}
}

func (s *script) list() ([]record, error) {
	r, ok := <-s.lists
	if !ok {
		return nil, errList
	}
	return r, nil
}
func (s *script) changed() <-chan struct{} { return s.changes }
func (s *script) lost() <-chan error       { return s.end }
func (s *script) close()                   { s.closed = true }

// run runs a Libvirt until the test ends.
func run(t *testing.T, dial func(string) (conn, error)) *Libvirt {
	l := NewLibvirt("test:")
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
