// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"virtexit/api"
	"virtexit/internal/snapshot"
)

// wish is what we want the collector to do. It outlives the collector.
type wish struct {
	level     snapshot.Level // Off: nothing, and the rest waits
	duty      api.Duty
	paused    bool                                // by the duty
	processes map[snapshot.Process]snapshot.Level // levels of their own; start times are in the precision of /proc
}

// always tells whether there is no duty cycle.
func (w *wish) always() bool { return w.duty.Always() }

// now is the level for all processes that have none of their own.
func (w *wish) now() snapshot.Level {
	if w.paused && w.level > snapshot.Pause {
		return snapshot.Pause
	}
	return w.level
}

// of is the level of a process, pauses aside, and whether it is that of all.
func (w *wish) of(p snapshot.Process) (level snapshot.Level, byDefault bool) {
	if level, ok := w.processes[p.InProc()]; ok {
		return level, false
	}
	return w.level, true
}

// command makes the open collector do what is wished for.
func (d *Daemon) command() error {
	if d.source == nil || d.ended {
		return nil
	}
	if err := d.source.SetLevel(d.wish.now()); err != nil {
		return fmt.Errorf("setting the level: %w", err)
	}
	if d.wish.level == snapshot.Off {
		clear(d.given) // with the lease
	}
	return d.commandProcesses()
}

// commandProcesses does so for the levels of processes. The collector wants
// their exact start times, so that it is told when they have been seen counting.
func (d *Daemon) commandProcesses() error {
	if d.source == nil || d.ended || d.wish.level == snapshot.Off {
		return nil
	}
	var errs []error
	// In a pause too: the higher level of a process would be in force. One that
	// is not counted at all stays so, lest it be counted when the pause ends.
	for p, level := range d.given {
		if _, wished := d.wish.processes[p.InProc()]; !wished || d.wish.paused && level > snapshot.Pause {
			delete(d.given, p)
			errs = append(errs, d.source.SetProcessLevel(p, nil))
		}
	}
	if d.wish.paused || len(d.wish.processes) == 0 {
		return errors.Join(errs...)
	}
	for id, total := range d.view.Processes {
		p := total.Process
		level, wished := d.wish.processes[id]
		if given, ok := d.given[p]; !wished || !total.Live || ok && given == level {
			continue
		}
		if err := d.source.SetProcessLevel(p, &level); err != nil {
			errs = append(errs, err)
			continue
		}
		d.given[p] = level
	}
	return errors.Join(errs...)
}

// alive tells whether a process runs, as far as is known.
func (d *Daemon) alive(p snapshot.Process) bool {
	if identity, known := d.config.Identities.Lookup(p, ""); known {
		return identity.TGID != 0
	}
	for q, total := range d.view.Processes {
		if total.Live && q == p.InProc() {
			return true
		}
	}
	return false
}

// find returns a running domain and its process, whose start time is in the
// precision of /proc.
func (d *Daemon) find(name string) (api.Domain, snapshot.Process, error) {
	d.sample() // who has just begun to run; a failure is the status's problem
	view := d.latest()
	domain, err := api.Find(d.list(view, sinceStart), name)
	if err != nil {
		return api.Domain{}, snapshot.Process{}, err
	}
	if !domain.Running() {
		return api.Domain{}, snapshot.Process{}, &api.ConflictError{Reason: fmt.Sprintf("domain '%s' is not running", domain.Name)}
	}
	// The latest process of that number, as numbers are used again.
	p := snapshot.Process{TGID: domain.TGID}
	for q := range view.Processes {
		if q.TGID == p.TGID {
			p.Start = max(p.Start, q.Start)
		}
	}
	for _, identity := range d.config.Identities.Domains() {
		if identity.TGID == p.TGID {
			p.Start = max(p.Start, identity.Start)
		}
	}
	return *domain, p.InProc(), nil
}

// DomainLevel tells a running domain's level.
func (d *Daemon) DomainLevel(name string) (api.DomainLevel, error) {
	domain, p, err := d.find(name)
	if err != nil {
		return api.DomainLevel{}, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.domainLevel(domain.Name, p), nil
}

func (d *Daemon) domainLevel(name string, p snapshot.Process) api.DomainLevel {
	level, byDefault := d.wish.of(p)
	word := levelWord(level)
	return api.DomainLevel{Domain: name, Level: &word, Default: byDefault}
}

// SetDomainLevel gives a running domain a level of its own; nil takes it back.
// It lasts until the domain's process ends.
func (d *Daemon) SetDomainLevel(name string, word *string) (api.DomainLevel, error) {
	var level snapshot.Level
	if word != nil {
		var err error
		if level, err = parseDomainLevel(*word); err != nil {
			return api.DomainLevel{}, err
		}
	}
	domain, p, err := d.find(name)
	if err != nil {
		return api.DomainLevel{}, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	before := maps.Clone(d.wish.processes)
	if word == nil {
		delete(d.wish.processes, p)
	} else {
		d.wish.processes[p] = level
	}
	if err := d.commandProcesses(); err != nil {
		d.wish.processes = before
		return api.DomainLevel{}, fmt.Errorf("setting the level of domain '%s': %w", domain.Name, err)
	}
	answer := d.domainLevel(domain.Name, p)
	d.config.Log.Info("level of a domain set", "domain", domain.Name, "level", *answer.Level, "default", answer.Default)
	return answer, nil
}

// SetCollection switches collection on or off. The wish stays when the
// collector is absent or fails.
func (d *Daemon) SetCollection(c api.Collection) (api.Status, error) {
	level, duty := snapshot.Off, d.config.Duty
	if c.Collection != "off" {
		level = d.config.Level
		if c.Level != "" {
			var err error
			if level, err = ParseLevel(c.Level); err != nil {
				return api.Status{}, err
			}
		}
		if c.Duty != nil {
			duty = *c.Duty
		}
	}
	if err := d.setCollection(level, duty); err != nil {
		return api.Status{}, err
	}
	return d.Status(), nil
}

func (d *Daemon) setCollection(level snapshot.Level, duty api.Duty) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sampleBefore()
	d.wish.level, d.wish.duty, d.wish.paused = level, duty, false
	d.config.Log.Info("collection switched", "level", level, "duty", duty)
	select {
	case d.switched <- struct{}{}:
	default: // told already
	}
	if err := d.command(); err != nil {
		return err
	}
	if d.source != nil {
		d.sampleLocked() // what is switched off is counted to its end; a failure is the status's problem
	}
	return nil
}

// sampleBefore takes a snapshot before levels change: a process is taken to have
// been counted, or not, for all the time before a snapshot.
func (d *Daemon) sampleBefore() {
	if d.source != nil {
		d.sampleLocked() // a failure is the status's problem
	}
}

// keepDuty pauses collection and resumes it, as the duty says.
func (d *Daemon) keepDuty(ctx context.Context) {
	for paused := false; ; {
		var end <-chan time.Time
		began := time.Now() // what it takes to switch is a part of the period
		if length := d.turn(paused); length > 0 {
			end = time.After(length - time.Since(began))
		}
		select {
		case <-ctx.Done():
			return
		case <-d.switched:
			paused = false
		case <-end:
			paused = !paused
		}
	}
}

// turn begins a pause or its opposite and tells how long it lasts; 0: for good.
func (d *Daemon) turn(paused bool) time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	duty := d.wish.duty
	if d.wish.level == snapshot.Off || duty.Always() {
		return 0
	}
	if d.wish.paused != paused {
		d.sampleBefore()
		d.wish.paused = paused
		if err := d.command(); err != nil {
			d.config.Log.Debug("duty", "error", err)
		}
	}
	if paused {
		return time.Duration(duty.EveryNS - duty.OnNS)
	}
	return time.Duration(duty.OnNS)
}

// domainOff is what a domain's level Pause is called: nothing of it is counted.
const domainOff = "off"

// levelWord is what people call the level of a domain.
func levelWord(l snapshot.Level) string {
	if l == snapshot.Pause {
		return domainOff
	}
	return l.String()
}

// ParseLevel returns the level that a word means: "count", "time" or "recent".
func ParseLevel(word string) (snapshot.Level, error) {
	for l := snapshot.Count; l <= snapshot.Recent; l++ {
		if l.String() == word {
			return l, nil
		}
	}
	return snapshot.Off, fmt.Errorf("level %q is unknown: count, time and recent are allowed", word)
}

// parseDomainLevel knows "off" too.
func parseDomainLevel(word string) (snapshot.Level, error) {
	if word == domainOff {
		return snapshot.Pause, nil
	}
	level, err := ParseLevel(word)
	if err != nil {
		err = fmt.Errorf("level %q is unknown: off, count, time and recent are allowed", word)
	}
	return level, err
}
