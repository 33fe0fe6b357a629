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
	"virtexit/internal/ledger"
	"virtexit/internal/snapshot"
)

// Status tells how collection goes.
func (d *Daemon) Status() api.Status {
	d.sample() // a failure is the status's problem
	d.mu.Lock()
	src, problem, level, duty, totals, counted, usage := d.source, d.problem, d.wish.level, d.wish.duty, d.view.Totals, int64(d.view.Counted), d.usage
	forAll := snapshot.Recent // where the collector tells of a higher level, it is that of some domains alone
	if len(d.given) > 0 {
		forAll = d.wish.now()
	}
	d.mu.Unlock()
	s := api.Status{
		Version:      d.config.Version,
		Collection:   "on",
		Level:        snapshot.Off.String(),
		Hook:         "none",
		Kernel:       d.config.Kernel,
		ISA:          exitreason.None.String(),
		Exits:        totals.Exits,
		Unattributed: totals.Unattributed,
		Missed:       totals.Missed,
		TotalsSince:  d.totalsSince,
		ObservedNS:   max(0, min(counted, time.Since(d.totalsSince).Nanoseconds())),
		Since:        d.started,
		CPU: api.CPU{
			TotalPct:  share(d.config.CPUTime(), time.Since(d.started)),
			LatestPct: share(usage[1].cpu-usage[0].cpu, usage[1].at-usage[0].at),
		},
	}
	if level != snapshot.Off && !duty.Always() {
		s.Duty = &duty
	}
	if level == snapshot.Off {
		s.Collection = "off"
	}
	if d.config.Refused != nil {
		s.Tried = d.config.Refused()
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
		case !info.KVM && level != snapshot.Off:
			problem = errNoKVM
		}
		if err == nil {
			s.Collector = &info.Collector
			s.CollectorVersion = info.Version
			s.Hook = info.Hook
			s.HookCycles = info.ExitCost + info.EntryCost
			s.ISA = info.ISA.String()
			s.Level = min(info.Level, forAll).String()
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
	view, period, seq := d.view, d.period, d.periods
	d.mu.Unlock()
	return api.Domains{Seq: seq, DaemonSince: d.started, Time: d.wall(view.Time), Domains: d.list(view, func(total *ledger.Total) (counts, rates *ledger.Total) {
		end := period[1].Processes[total.Process.InProc()]
		if end == nil {
			return total, total // new: it has rates since its start
		}
		return total, end.Sub(period[0].Processes[total.Process.InProc()])
	})}
}

// Report tells what the named domains, or all that run or did, do in an interval
// that begins now, or all that is known of them when interval is 0. With a duty
// cycle an interval should be as long as its period: a shorter one may fall into
// a pause, of which nothing is known.
func (d *Daemon) Report(ctx context.Context, names []string, interval time.Duration) (api.Report, error) {
	if err := d.sample(); err != nil && interval > 0 {
		return api.Report{}, err
	}
	end := d.latest()
	if interval == 0 {
		domains, err := choose(d.list(end, sinceStart), names, running)
		return api.Report{Total: true, Time: d.wall(end.Time), Domains: domains}, err
	}
	begin := end
	if _, err := choose(d.list(begin, sinceStart), names, running); err != nil {
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
	domains, err := choose(d.between(begin, end), names, ran)
	return api.Report{Time: d.wall(end.Time), IntervalNS: int64(end.Time - begin.Time), Domains: domains}, err
}

// Watch hands a report of one interval after the other to each, until that fails
// or ctx ends. No exit is in two of them, and none is between two: when each takes
// its time, the next interval is longer. A domain that was named may end, and
// begin again, meanwhile.
func (d *Daemon) Watch(ctx context.Context, names []string, interval time.Duration, each func(api.Report) error) error {
	if err := d.sample(); err != nil {
		return err
	}
	begin := d.latest()
	if _, err := choose(d.list(begin, sinceStart), names, running); err != nil {
		return err
	}
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for seq := uint64(1); ; seq++ {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		if err := d.sample(); err != nil {
			return err
		}
		end := d.latest()
		report := api.Report{Seq: seq, Time: d.wall(end.Time), IntervalNS: int64(end.Time - begin.Time)}
		domains := d.between(begin, end)
		present := slices.DeleteFunc(slices.Clone(names), func(name string) bool {
			var notFound *api.NotFoundError
			_, err := api.Find(domains, name)
			return errors.As(err, &notFound)
		})
		if len(names) == 0 || len(present) > 0 {
			var err error
			if report.Domains, err = choose(domains, present, ran); err != nil {
				return err
			}
		}
		if err := each(report); err != nil {
			return err
		}
		begin = end
	}
}

// between tells what all domains did from one view to another.
func (d *Daemon) between(begin, end *ledger.View) []api.Domain {
	return d.list(end, func(total *ledger.Total) (counts, rates *ledger.Total) {
		diff := total.Sub(begin.Processes[total.Process.InProc()])
		return diff, diff
	})
}

// sinceStart picks what list shows of a process: all of it.
func sinceStart(total *ledger.Total) (counts, rates *ledger.Total) { return total, total }

// share is how many percent of a time a part of it is.
func share(part, of time.Duration) float64 {
	if of <= 0 {
		return 0
	}
	return 100 * part.Seconds() / of.Seconds()
}

func (d *Daemon) latest() *ledger.View {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.view
}

// wall converts the ledger's time to the wall clock's.
func (d *Daemon) wall(t uint64) time.Time {
	return d.clock.booted().Add(time.Duration(t)).Round(time.Millisecond)
}
