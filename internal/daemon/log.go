// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"virtexit/api"
	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
)

const (
	followEvery = 50 * time.Millisecond // a vCPU's log holds some hundred exits
	keepFor     = 3 * followEvery
)

// log reads the exits of one domain. It keeps no more than one reading of them.
type log struct {
	daemon  *Daemon
	domain  string           // its name
	process snapshot.Process // in the precision of /proc
	query   api.LogQuery
	source  source.Source              // whose slots those are
	next    map[snapshot.SlotID]uint64 // the first exit that has not been read
}

// openLog finds a running domain whose exits are logged.
func (d *Daemon) openLog(name string, q api.LogQuery) (*log, error) {
	domain, p, err := d.find(name)
	if err != nil {
		return nil, err
	}
	l := &log{daemon: d, domain: domain.Name, process: p, query: q, next: make(map[snapshot.SlotID]uint64)}
	src, snap, _, err := l.look()
	if err != nil {
		return nil, err
	}
	l.source = src
	for i := range snap.Slots {
		s := &snap.Slots[i]
		if s.Process.InProc() == p && q.Reason != "" && !exitreason.Known(s.ISA, q.Reason) {
			return nil, &api.ConflictError{Reason: fmt.Sprintf("no exit of %v is called '%s'", s.ISA, q.Reason)}
		}
	}
	return l, nil
}

// look returns what there is to read, and whether the domain runs.
func (l *log) look() (src source.Source, snap *snapshot.Snapshot, alive bool, err error) {
	d := l.daemon
	d.mu.Lock()
	defer d.mu.Unlock()
	alive = d.alive(l.process)
	switch level, _ := d.wish.of(l.process); {
	case d.source == nil:
		return nil, nil, false, d.problem
	case d.ended, l.source != nil && l.source != d.source:
		return nil, nil, false, source.ErrGone
	case d.snap == nil:
		return nil, nil, false, errors.New("no snapshot yet") // unreachable: attach takes one, or fails
	case d.wish.level == snapshot.Off:
		return nil, nil, false, &api.ConflictError{Reason: "collection is off: 'virtexit on' switches it on"}
	case alive && level < snapshot.Recent: // its level is forgotten when it ends
		return nil, nil, false, &api.ConflictError{Reason: fmt.Sprintf(
			"the exits of domain '%s' are not logged at its level, %s: 'virtexit level %s recent' switches that on", l.domain, levelWord(level), l.domain)}
	}
	return d.source, d.snap, alive, nil
}

// reading is what a log held.
type reading struct {
	exits  []api.LoggedExit // oldest first
	logged uint64           // exits since the last reading, whatever was asked for
	lost   uint64           // of logged, overwritten before they were read
	ended  bool             // the domain does not run any more
}

// read returns what has been logged since it was last called. Exits in progress
// wait for their end, unless present is set.
func (l *log) read(present bool) (reading, error) {
	src, snap, alive, err := l.look()
	if err != nil {
		return reading{}, err
	}
	r := reading{ended: !alive}
	boot := l.daemon.clock.booted()
	identity, _ := l.daemon.config.Identities.Lookup(l.process, "")
	for i := range snap.Slots {
		s := &snap.Slots[i]
		if s.Process.InProc() != l.process {
			continue
		}
		vcpu := s.VCPU
		if n, ok := identity.VCPU(s.TID); ok { // libvirt's word
			vcpu = n
		}
		if l.query.VCPU != nil && *l.query.VCPU != vcpu {
			continue
		}
		next := l.next[s.ID]
		exits, err := src.Recent(s.ID, next)
		switch {
		case errors.Is(err, source.ErrStale): // released since the snapshot
			r.miss(max(s.Recent, next) - next)
			l.next[s.ID] = max(s.Recent, next)
			continue
		case err != nil:
			return reading{}, fmt.Errorf("recent exits: %w", err)
		}
		if len(exits) > 0 && exits[0].Present && !present && !s.Retired {
			exits = exits[1:]
		}
		if len(exits) == 0 {
			continue
		}
		l.next[s.ID] = exits[0].Number + 1
		r.miss(exits[len(exits)-1].Number - next)
		r.logged += uint64(len(exits))
		for _, e := range slices.Backward(exits) {
			out := api.LoggedExit{
				Time:   boot.Add(time.Duration(e.Time)),
				VCPU:   vcpu,
				ISA:    s.ISA.String(),
				Code:   e.Code,
				Reason: exitreason.Name(s.ISA, e.Code),
				RIP:    fmt.Sprintf("%#x", e.RIP),
			}
			if !e.Present {
				ns := snapshot.NS(e.Duration, snap.TickHz)
				out.DurationNS = &ns
			}
			if l.wanted(&out) {
				r.exits = append(r.exits, out)
			}
		}
	}
	slices.SortStableFunc(r.exits, func(a, b api.LoggedExit) int { return a.Time.Compare(b.Time) })
	return r, nil
}

func (r *reading) miss(n uint64) {
	r.logged += n
	r.lost += n
}

// wanted tells whether an exit has the reason that was asked for.
func (l *log) wanted(e *api.LoggedExit) bool {
	return l.query.Reason == "" || exitreason.Is(l.query.Reason, e.Reason, e.Code)
}

// Log returns the latest exits of a running domain.
func (d *Daemon) Log(name string, q api.LogQuery) (api.Log, error) {
	l, err := d.openLog(name, q)
	if err != nil {
		return api.Log{}, err
	}
	r, err := l.read(true)
	if err != nil {
		return api.Log{}, err
	}
	slices.Reverse(r.exits)
	if q.Limit > 0 && len(r.exits) > q.Limit {
		r.exits = r.exits[:q.Limit]
	}
	return api.Log{Domain: l.domain, Exits: r.exits, Logged: r.logged, Overrun: r.lost}, nil
}

// Follow writes the exits of a running domain as they come, until ctx or the
// domain ends. While write takes its time nothing is read, and what is then
// overwritten is told.
func (d *Daemon) Follow(ctx context.Context, name string, q api.LogQuery, write func([]api.LogLine) error) error {
	l, err := d.openLog(name, q)
	if err != nil {
		return err
	}
	d.follow(1)
	defer d.follow(-1)
	r, err := l.read(false)
	if err != nil {
		return err
	}
	r.lost = 0 // before we came
	r.exits = r.exits[max(0, len(r.exits)-q.Limit):]
	lines := []api.LogLine{{Domain: l.domain}}
	ticker := time.NewTicker(followEvery)
	defer ticker.Stop()
	for {
		if r.lost > 0 {
			lines = append(lines, api.LogLine{Overrun: r.lost})
		}
		for i := range r.exits {
			lines = append(lines, api.LogLine{LoggedExit: &r.exits[i]})
		}
		if len(lines) > 0 {
			if err := write(lines); err != nil {
				return err
			}
		}
		if r.ended {
			return nil
		}
		lines = lines[:0]
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		if r, err = l.read(false); err != nil {
			return err
		}
	}
}

func (d *Daemon) follow(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.followers += n
}

// keep takes those out of the slots to be released that followers may not have
// read to their end. It is asked again at the next snapshot.
func (d *Daemon) keep(release []snapshot.SlotID) (now []snapshot.SlotID) {
	if d.followers == 0 || d.ended { // then there is no next one
		d.kept = nil
		return release
	}
	kept := make(map[snapshot.SlotID]time.Duration)
	for _, id := range release {
		since, ok := d.kept[id]
		if !ok {
			since = d.config.BootTime()
		}
		if d.config.BootTime()-since < keepFor {
			kept[id] = since
		} else {
			now = append(now, id)
		}
	}
	d.kept = kept
	return now
}
