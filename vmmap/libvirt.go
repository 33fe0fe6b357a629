// SPDX-License-Identifier: Apache-2.0

package vmmap

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// How long Libvirt waits.
const (
	firstRetry = 250 * time.Millisecond // before the first attempt to reconnect
	lastRetry  = 5 * time.Second        // at most between two attempts; they double in between
	patience   = 2 * time.Second        // for an answer, before the daemon is said to hang
	relist     = time.Minute            // without an event, in case one was missed
	farewell   = time.Second            // for the connection to close when Run ends
)

// record is a domain as libvirt lists it.
type record struct {
	id         *int // nil when the domain does not run
	name       string
	uuid       string
	state      State
	persistent bool
	metadata   *Metadata // nil when libvirt does not tell
}

// conn is a read-only connection to a libvirt daemon. Its methods may block.
type conn interface {
	list() ([]record, error)
	changed() <-chan struct{} // a domain changed since the last list
	lost() <-chan error       // the connection ended
	close()
}

// listing is what libvirt said last. It is not changed once made.
type listing struct {
	records []record
	at      time.Time
	err     error // why the connection does not serve; nil when it does
}

var errNotYet = errors.New("not connected yet")

// Libvirt keeps what one libvirt daemon last said about its domains.
type Libvirt struct {
	uri     string
	dial    func(uri string) (conn, error)
	now     func() time.Time
	listing atomic.Pointer[listing]
	waiting atomic.Pointer[time.Time] // since when libvirt owes an answer
}

// NewLibvirt returns a Libvirt for the daemon at uri, such as
// "qemu:///system". It does nothing until Run.
func NewLibvirt(uri string) *Libvirt {
	l := &Libvirt{uri: uri, dial: dial, now: time.Now}
	l.listing.Store(&listing{err: errNotYet})
	return l
}

// Run keeps a read-only connection to the daemon and lists its domains
// whenever one of them changes, until ctx ends. A daemon that is absent, dies
// or hangs is retried for ever; what it last said stays known. The error is
// that of ctx. A goroutine that is held up inside libvirt outlives Run.
func (l *Libvirt) Run(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.serve(ctx)
	}()
	<-ctx.Done()
	select {
	case <-done:
	case <-time.After(farewell):
	}
	return ctx.Err()
}

// serve connects again and again. All calls of libvirt are made by its
// goroutine, so that nothing else hangs when libvirt does.
func (l *Libvirt) serve(ctx context.Context) {
	retry := firstRetry
	for ctx.Err() == nil {
		connected, err := l.session(ctx)
		down := *l.listing.Load()
		down.err = err
		l.listing.Store(&down)
		if connected {
			retry = firstRetry
		}
		select {
		case <-ctx.Done():
		case <-time.After(retry):
		}
		retry = min(2*retry, lastRetry)
	}
}

// session connects once and lists until the connection is lost. It tells
// whether it ever got a list.
func (l *Libvirt) session(ctx context.Context) (connected bool, err error) {
	var c conn
	l.call(func() { c, err = l.dial(l.uri) })
	if err != nil {
		return false, err
	}
	defer l.call(c.close)
	for {
		var records []record
		l.call(func() { records, err = c.list() })
		if err != nil {
			return connected, err
		}
		connected = true
		l.listing.Store(&listing{records: records, at: l.now()})
		select {
		case <-ctx.Done():
			return connected, ctx.Err()
		case err := <-c.lost():
			return connected, err
		case <-c.changed():
		case <-time.After(relist):
		}
	}
}

// call runs f, which may hang in libvirt.
func (l *Libvirt) call(f func()) {
	now := l.now()
	l.waiting.Store(&now)
	f()
	l.waiting.Store(nil)
}

// LibvirtStatus tells how the connection is.
type LibvirtStatus struct {
	Connected bool
	URI       string
	Error     string // why it is not connected; empty when it is
}

// Status tells how the connection is, at once. A daemon that does not answer
// counts as not connected.
func (l *Libvirt) Status() LibvirtStatus {
	_, err := l.last()
	if err != nil {
		return LibvirtStatus{URI: l.uri, Error: err.Error()}
	}
	return LibvirtStatus{Connected: true, URI: l.uri}
}

// last returns what libvirt said last, and why that may not hold any more.
func (l *Libvirt) last() (*listing, error) {
	if since := l.waiting.Load(); since != nil {
		if d := l.now().Sub(*since); d >= patience {
			return l.listing.Load(), fmt.Errorf("no answer for %v", d.Truncate(time.Second))
		}
	}
	last := l.listing.Load()
	return last, last.err
}
