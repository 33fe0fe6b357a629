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
	rest       = 100 * time.Millisecond // between two readings of statistics, or as long as the last one took
	readers    = 3                      // readings at a time; libvirt serves 5 calls of a client
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

// Run names one run of a domain, until libvirt's daemon is started again.
type Run struct {
	UUID string
	ID   int
}

// Exits is what KVM's own statistics say, by way of libvirt and QEMU: how often
// each vCPU has exited since it was made.
type Exits struct {
	Begun, Ended time.Duration          // of the reading, by CLOCK_BOOTTIME; 0 when there was none
	Runs         map[Run]map[int]uint64 // by libvirt's number of the vCPU; those that run, whether or not anything is told of them
	Err          error                  // why there is nothing newer; nil when there may be soon
}

// conn is a read-only connection to a libvirt daemon. Its methods may block.
type conn interface {
	list() ([]record, error)
	exits() (map[Run]map[int]uint64, error)
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
	boot    func() time.Duration
	listing atomic.Pointer[listing]
	waiting atomic.Pointer[time.Time] // since when libvirt owes an answer
	exits   atomic.Pointer[Exits]
	asked   chan struct{} // for exits
}

// NewLibvirt returns a Libvirt for the daemon at uri, such as
// "qemu:///system". It does nothing until Run. CLOCK_BOOTTIME is boot.
func NewLibvirt(uri string, boot func() time.Duration) *Libvirt {
	l := &Libvirt{uri: uri, dial: dial, now: time.Now, boot: boot, asked: make(chan struct{}, 1)}
	l.listing.Store(&listing{err: errNotYet})
	l.exits.Store(&Exits{})
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
	r := reader{Libvirt: l, conn: c, ask: l.asked, done: make(chan Exits, readers)}
	defer func() {
		if r.busy == 0 {
			l.call(c.close)
			return
		}
		go r.finish(c.close) // what hangs may do so for ever
	}()
	again := time.NewTicker(relist)
	defer again.Stop()
	for stale := true; ; {
		if stale {
			var records []record
			l.call(func() { records, err = c.list() })
			if err != nil {
				return connected, err
			}
			connected, stale = true, false
			l.listing.Store(&listing{records: records, at: l.now()})
		}
		select {
		case <-ctx.Done():
			return connected, ctx.Err()
		case err := <-c.lost():
			return connected, err
		case <-c.changed():
			stale = true
		case <-again.C:
			stale = true
		case <-r.ask:
			r.begin()
		case <-r.ready:
			r.again()
		case e := <-r.done:
			r.end(e)
		}
	}
}

// reader reads statistics beside the lists, for QEMU has to be asked. A guest
// that hangs holds up one reading, which the next ones pass by: libvirt leaves
// out who is being asked.
type reader struct {
	*Libvirt
	conn  conn
	ask   <-chan struct{}  // nil: not before it is ready
	ready <-chan time.Time // for the next one
	done  chan Exits
	busy  int
}

func (r *reader) begin() {
	r.busy++
	r.ask, r.ready = nil, time.After(patience)
	go r.read(r.boot(), r.conn.exits)
}

func (r *reader) read(begun time.Duration, exits func() (map[Run]map[int]uint64, error)) {
	runs, err := exits()
	r.done <- Exits{Begun: begun, Ended: r.boot(), Runs: runs, Err: err}
}

func (r *reader) again() {
	if r.busy < readers {
		r.ask, r.ready = r.asked, nil
		return
	}
	e := *r.exits.Load()
	e.Err = fmt.Errorf("%d calls have no answer", r.busy)
	r.exits.Store(&e)
}

// end stores a reading, unless it was begun before the last one ended: what it
// says of a domain may be older than what that one said.
func (r *reader) end(e Exits) {
	r.busy--
	r.ready = time.After(min(max(rest, e.Ended-e.Begun), patience))
	last := r.exits.Load()
	if e.Begun < last.Ended {
		return
	}
	if e.Err != nil {
		e.Begun, e.Ended, e.Runs = last.Begun, last.Ended, last.Runs
	}
	r.exits.Store(&e)
}

// finish waits for the readings that hang before it closes their connection.
func (r *reader) finish(close func()) {
	for range r.busy {
		<-r.done
	}
	close()
}

// Exits returns the latest reading at once, and asks for the next one.
func (l *Libvirt) Exits() Exits {
	select {
	case l.asked <- struct{}{}:
	default: // asked already
	}
	e := *l.exits.Load()
	if _, err := l.last(); err != nil {
		e.Err = err
	}
	return e
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
