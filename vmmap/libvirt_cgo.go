// SPDX-License-Identifier: Apache-2.0

//go:build cgo

package vmmap

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"libvirt.org/go/libvirt"
)

// A connection that was silent for keepAlive seconds is probed, and given up
// when keepAliveProbes in a row have no answer: a daemon may hang.
const (
	keepAlive       = 5
	keepAliveProbes = 2
)

// startEvents starts libvirt's event loop, of which a process has one. It must
// be there before the first connection, and it never ends.
var startEvents = sync.OnceValue(func() error {
	if err := libvirt.EventRegisterDefaultImpl(); err != nil {
		return err
	}
	go func() {
		for {
			if err := libvirt.EventRunDefaultImpl(); err != nil {
				time.Sleep(time.Second) // it failed to poll; go on without a busy loop
			}
		}
	}()
	return nil
})

// client is a conn to a real libvirt.
type client struct {
	conn     *libvirt.Connect
	events   []int // ids of the callbacks
	change   chan struct{}
	closing  chan error
	metadata map[string]*Metadata // by uuid, as last asked for; list's own

	mu    sync.Mutex
	stale map[string]bool // uuids whose metadata may have changed since
}

// dial opens a read-only connection, which can change nothing.
func dial(uri string) (conn, error) {
	if err := startEvents(); err != nil {
		return nil, message(err)
	}
	c, err := libvirt.NewConnectReadOnly(uri)
	if err != nil {
		return nil, message(err)
	}
	l := &client{conn: c, change: make(chan struct{}, 1), closing: make(chan error, 1), stale: make(map[string]bool)}
	if err := l.subscribe(); err != nil {
		l.close()
		return nil, message(err)
	}
	return l, nil
}

// subscribe asks for news before the first list, so that none falls between.
// The callbacks run in the event loop and must not call libvirt.
func (l *client) subscribe() error {
	err := l.conn.RegisterCloseCallback(func(_ *libvirt.Connect, reason libvirt.ConnectCloseReason) {
		select {
		case l.closing <- closeError(reason):
		default:
		}
	})
	if err != nil && !unsupported(err) {
		return err
	}
	if err := l.conn.SetKeepAlive(keepAlive, keepAliveProbes); err != nil && !unsupported(err) {
		return err
	}
	id, err := l.conn.DomainEventLifecycleRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, _ *libvirt.DomainEventLifecycle) { l.news(d) })
	if err != nil {
		return err
	}
	l.events = append(l.events, id)
	id, err = l.conn.DomainEventMetadataChangeRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, _ *libvirt.DomainEventMetadataChange) { l.news(d) })
	if err != nil {
		if unsupported(err) {
			return nil
		}
		return err
	}
	l.events = append(l.events, id)
	return nil
}

// news is that something about a domain has changed. Its uuid is at hand: that
// is no call of libvirt's daemon.
func (l *client) news(d *libvirt.Domain) {
	if uuid, err := d.GetUUIDString(); err == nil {
		l.mu.Lock()
		l.stale[uuid] = true
		l.mu.Unlock()
	}
	select {
	case l.change <- struct{}{}:
	default: // one is pending, and its list will show this change too
	}
}

func (l *client) changed() <-chan struct{} { return l.change }
func (l *client) lost() <-chan error       { return l.closing }

// close gives everything back. On a connection that is lost its calls fail,
// which changes nothing about that.
func (l *client) close() {
	for _, id := range l.events {
		_ = l.conn.DomainEventDeregister(id)
	}
	_ = l.conn.UnregisterCloseCallback()
	_, _ = l.conn.Close()
}

// list asks for all domains at once, then for those in each common state: the
// number of calls does not grow with the number of domains. Only metadata is
// asked for one by one, when a domain is new or has changed.
func (l *client) list() ([]record, error) {
	l.mu.Lock()
	stale := l.stale
	l.stale = make(map[string]bool) // what changes from now on is for the next list
	l.mu.Unlock()
	metadata := make(map[string]*Metadata)
	all, err := l.conn.ListAllDomains(0)
	defer free(all)
	if err != nil {
		return nil, message(err)
	}
	states := make(map[string]State, len(all))
	for _, s := range []struct {
		flag  libvirt.ConnectListAllDomainsFlags
		state State
	}{
		{libvirt.CONNECT_LIST_DOMAINS_RUNNING, Running},
		{libvirt.CONNECT_LIST_DOMAINS_PAUSED, Paused},
		{libvirt.CONNECT_LIST_DOMAINS_SHUTOFF, ShutOff},
	} {
		uuids, err := l.uuids(s.flag)
		if err != nil {
			return nil, err
		}
		for uuid := range uuids {
			states[uuid] = s.state
		}
	}
	persistent, err := l.uuids(libvirt.CONNECT_LIST_DOMAINS_PERSISTENT)
	if err != nil {
		return nil, err
	}
	records := make([]record, 0, len(all))
	for i := range all {
		d := &all[i]
		var r record
		if r.name, err = d.GetName(); err != nil {
			return nil, message(err)
		}
		if r.uuid, err = d.GetUUIDString(); err != nil {
			return nil, message(err)
		}
		if id, err := d.GetID(); err == nil { // the error is that of a domain that does not run
			n := int(id)
			r.id = &n
		}
		var known bool
		if r.state, known = states[r.uuid]; !known {
			if r.state, err = state(d); err != nil {
				continue // undefined since it was listed
			}
		}
		r.persistent = persistent[r.uuid]
		if r.metadata = l.metadata[r.uuid]; r.metadata == nil || stale[r.uuid] {
			r.metadata = describe(d)
		}
		metadata[r.uuid] = r.metadata
		records = append(records, r)
	}
	l.metadata = metadata
	return records, nil
}

// describe asks for a domain's metadata. It returns nil when it is not told,
// as of a domain that was undefined since it was listed.
func describe(d *libvirt.Domain) *Metadata {
	text, err := d.GetXMLDesc(0)
	if err != nil {
		return nil
	}
	m, err := ParseMetadata([]byte(text))
	if err != nil {
		return nil
	}
	return &m
}

// exits asks for all domains at once. libvirt asks QEMU in turn, but of a domain
// that is busy with another job it tells nothing rather than wait. QEMU 7.1 and
// libvirt 8.9 were the first to tell.
func (l *client) exits() (map[Run]map[int]uint64, error) {
	stats, err := l.conn.GetAllDomainStats(nil, libvirt.DOMAIN_STATS_VCPU,
		libvirt.CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE|libvirt.CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT)
	if err != nil {
		return nil, message(err)
	}
	runs := make(map[Run]map[int]uint64, len(stats))
	for _, s := range stats {
		// Both are at hand, and no calls of libvirt's daemon.
		uuid, err := s.Domain.GetUUIDString()
		id, err2 := s.Domain.GetID()
		_ = s.Domain.Free()
		if err != nil || err2 != nil {
			continue // it ended meanwhile
		}
		vcpus := make(map[int]uint64, len(s.Vcpu))
		for number, v := range s.Vcpu {
			for _, value := range v.Custom {
				if value.Name == "exits.sum" && value.ULong != nil {
					vcpus[number] = *value.ULong
				}
			}
		}
		runs[Run{uuid, int(id)}] = vcpus
	}
	return runs, nil
}

// uuids tells which domains a filter leaves.
func (l *client) uuids(flag libvirt.ConnectListAllDomainsFlags) (map[string]bool, error) {
	domains, err := l.conn.ListAllDomains(flag)
	defer free(domains)
	if err != nil {
		return nil, message(err)
	}
	uuids := make(map[string]bool, len(domains))
	for i := range domains {
		uuid, err := domains[i].GetUUIDString()
		if err != nil {
			return nil, message(err)
		}
		uuids[uuid] = true
	}
	return uuids, nil
}

func free(domains []libvirt.Domain) {
	for i := range domains {
		_ = domains[i].Free()
	}
}

func state(d *libvirt.Domain) (State, error) {
	s, _, err := d.GetState()
	if err != nil {
		return Unknown, err
	}
	switch s {
	case libvirt.DOMAIN_RUNNING:
		return Running, nil
	case libvirt.DOMAIN_BLOCKED:
		return Idle, nil
	case libvirt.DOMAIN_PAUSED:
		return Paused, nil
	case libvirt.DOMAIN_SHUTDOWN:
		return Shutdown, nil
	case libvirt.DOMAIN_SHUTOFF:
		return ShutOff, nil
	case libvirt.DOMAIN_CRASHED:
		return Crashed, nil
	case libvirt.DOMAIN_PMSUSPENDED:
		return Suspended, nil
	}
	return Unknown, nil
}

func closeError(reason libvirt.ConnectCloseReason) error {
	switch reason {
	case libvirt.CONNECT_CLOSE_REASON_EOF:
		return errors.New("libvirt closed the connection")
	case libvirt.CONNECT_CLOSE_REASON_KEEPALIVE:
		return errors.New("libvirt does not answer")
	case libvirt.CONNECT_CLOSE_REASON_CLIENT:
		return errors.New("connection closed")
	}
	return fmt.Errorf("connection failed (reason %d)", reason)
}

func unsupported(err error) bool { return errors.Is(err, libvirt.ERR_NO_SUPPORT) }

// message leaves an error's text alone: its numbers help nobody.
func message(err error) error {
	var e libvirt.Error
	if errors.As(err, &e) && e.Message != "" {
		return &libvirtError{e.Message, e}
	}
	return err
}

type libvirtError struct {
	text string
	err  libvirt.Error
}

func (e *libvirtError) Error() string { return e.text }
func (e *libvirtError) Unwrap() error { return e.err }
