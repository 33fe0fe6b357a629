// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"time"

	"virtexit/internal/api"
	"virtexit/internal/exitreason"
	"virtexit/internal/ledger"
	"virtexit/internal/source"
)

// Status tells how collection goes.
func (d *Daemon) Status() api.Status {
	d.sample() // a failure is the status's problem
	d.mu.Lock()
	src, problem, level, totals := d.source, d.problem, d.level, d.view.Totals
	d.mu.Unlock()
	s := api.Status{
		Version:      d.config.Version,
		Collection:   "on",
		Level:        levelName(source.Off),
		Hook:         "none",
		Kernel:       d.config.Kernel,
		ISA:          exitreason.None.String(),
		Exits:        totals.Exits,
		Unattributed: totals.Unattributed,
		Missed:       totals.Missed,
		Since:        d.started,
	}
	if level == source.Off {
		s.Collection = "off"
	}
	if l := d.config.Libvirt; l != nil {
		status := l.Status()
		s.Libvirt = api.Libvirt{Connected: status.Connected, URI: status.URI, Error: status.Error}
	}
	if src != nil {
		info, err := src.Info()
		switch {
		case err != nil:
			problem = fmt.Errorf("collector: %w", err)
		case problem != nil:
		case info.Refused != "":
			problem = fmt.Errorf("KVM is not counted: %s", info.Refused)
		case !info.KVM && level != source.Off:
			problem = errNoKVM
		}
		if err == nil {
			s.Collector = &info.Collector
			s.Module = info.Version
			s.Hook = info.Hook
			s.ISA = info.ISA.String()
			s.Level = levelName(info.Level)
			s.Slots = api.Slots{Live: info.SlotsLive, Retired: info.SlotsRetired, Backed: info.SlotsBacked, Max: info.SlotsMax}
		}
	}
	if problem != nil {
		s.Problem = problem.Error()
	}
	return s
}

// Domains lists all domains, at once: totals are those of the latest snapshot,
// rates those over the latest full period.
func (d *Daemon) Domains() api.Domains {
	d.mu.Lock()
	view, period := d.view, d.period
	d.mu.Unlock()
	return api.Domains{Domains: d.list(view, func(total *ledger.Total) (counts, rates *ledger.Total) {
		end := period[1].Processes[total.Process]
		if end == nil {
			return total, total // new: it has rates since its start
		}
		return total, end.Sub(period[0].Processes[total.Process])
	})}
}

// Report tells what the named domains, or all that run, did in an interval
// that begins now, or all that is known of them when interval is 0.
func (d *Daemon) Report(ctx context.Context, names []string, interval time.Duration) (api.Report, error) {
	if err := d.sample(); err != nil && interval > 0 {
		return api.Report{}, err
	}
	end := d.latest()
	sinceStart := func(total *ledger.Total) (counts, rates *ledger.Total) { return total, total }
	if interval == 0 {
		domains, err := choose(d.list(end, sinceStart), names)
		return api.Report{Total: true, Time: d.wall(end.Time), Domains: domains}, err
	}
	begin := end
	if _, err := choose(d.list(begin, sinceStart), names); err != nil {
		return api.Report{}, err // now rather than after the interval
	}
	wait(ctx, interval)
	if err := ctx.Err(); err != nil {
		return api.Report{}, err
	}
	if err := d.sample(); err != nil {
		return api.Report{}, err
	}
	end = d.latest()
	domains, err := choose(d.list(end, func(total *ledger.Total) (counts, rates *ledger.Total) {
		diff := total.Sub(begin.Processes[total.Process])
		return diff, diff
	}), names)
	return api.Report{Time: d.wall(end.Time), IntervalNS: int64(end.Time - begin.Time), Domains: domains}, err
}

// SetCollection switches collection on or off. The wish stays when the
// collector is absent or fails.
func (d *Daemon) SetCollection(c api.Collection) (api.Status, error) {
	level, err := d.wish(c)
	if err != nil {
		return api.Status{}, err
	}
	if err := d.setLevel(level); err != nil {
		return api.Status{}, err
	}
	return d.Status(), nil
}

func (d *Daemon) wish(c api.Collection) (source.Level, error) {
	if c.Collection == "off" {
		return source.Off, nil
	}
	if c.Level == "" {
		return d.config.Level, nil
	}
	return ParseLevel(c.Level)
}

func (d *Daemon) setLevel(level source.Level) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.level = level
	d.config.Log.Info("collection switched", "level", levelName(level))
	if d.source == nil {
		return nil
	}
	if err := d.source.SetLevel(level); err != nil {
		return fmt.Errorf("setting the level: %w", err)
	}
	d.sampleLocked() // what is switched off is counted to its end; a failure is the status's problem
	return nil
}

func (d *Daemon) latest() *ledger.View {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.view
}

// wall converts the ledger's time to the wall clock's.
func (d *Daemon) wall(t uint64) time.Time {
	return time.Now().Add(time.Duration(t) - d.config.BootTime()).Round(time.Millisecond)
}

var levels = [...]string{source.Off: "off", source.Count: "count", source.Time: "time"}

func levelName(l source.Level) string {
	if int(l) < len(levels) {
		return levels[l]
	}
	return fmt.Sprintf("level(%d)", uint32(l))
}

// ParseLevel returns the level that a word means: "count" or "time".
func ParseLevel(word string) (source.Level, error) {
	for l := source.Count; int(l) < len(levels); l++ {
		if levels[l] == word {
			return l, nil
		}
	}
	return source.Off, fmt.Errorf("level %q is unknown: count and time are allowed", word)
}
