// SPDX-License-Identifier: Apache-2.0

// Package daemon makes the parts one: it keeps a collector open, enters its
// snapshots in the ledger, and answers from there. All goroutines and all
// clocks are here.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"virtexit/api"
	"virtexit/internal/ledger"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
	"virtexit/vmmap"
)

var errNoKVM = errors.New("KVM is not loaded: collection begins when it is")

const (
	retryEvery    = time.Second            // to open a collector
	betterEvery   = 5 * time.Second        // a better one than the open one is looked for
	settle        = 100 * time.Millisecond // events that follow each other share a snapshot
	identifyEvery = 5 * time.Second        // without an event
)

// Identities tells which domain a process is; see vmmap.Map.
type Identities interface {
	Refresh() error
	Learn(tgid int)
	Lookup(p snapshot.Process, comm string) (d vmmap.Domain, known bool)
	Forget(p snapshot.Process)
	Restore(p snapshot.Process, d vmmap.Domain)
	Domains() []vmmap.Domain
}

// Libvirt is a connection that names domains; see vmmap.Libvirt.
type Libvirt interface {
	Run(context.Context) error
	Status() vmmap.LibvirtStatus
}

// Config is what a Daemon is made of.
type Config struct {
	Open          func() (source.Source, error)
	Refused       func() []api.Tried // collectors that Open tried before the one that it returned; may be nil
	Better        func() bool        // one of these is there now; may be nil
	Identities    Identities
	Libvirt       Libvirt // may be nil
	On            bool    // collect from the start
	Level         snapshot.Level
	Duty          api.Duty      // the zero one: always
	Interval      time.Duration // from one snapshot to the next
	Retention     ledger.Retention
	StateDir      string               // where totals are kept from one start to the next; empty: nowhere
	StateInterval time.Duration        // how often they are, at the least
	Boot          string               // names this boot of the kernel; empty: unknown
	Machine       string               // names the host
	BootTime      func() time.Duration // CLOCK_BOOTTIME
	CPUTime       func() time.Duration // that this process has used
	Kernel        string               // release
	Version       string
	Log           *slog.Logger
}

// Daemon collects while Run runs. Its other methods may be called at any time,
// from any goroutine; none waits for libvirt.
type Daemon struct {
	config      Config
	started     time.Time
	clock       clock
	identify    chan struct{} // asks for a refresh of the identities
	switched    chan struct{} // tells that level or duty changed
	retired     chan struct{} // tells that slots wait to be saved
	store       *store        // nil: no state is kept
	totalsSince time.Time

	saving  sync.Mutex  // one at a time; taken before mu
	unsaved atomic.Bool // the latest time

	mu        sync.Mutex // guards what follows, and the order of snapshots
	source    source.Source
	ended     bool  // it is told nothing any more
	problem   error // why source is nil, or what is wrong with it
	wish      wish
	given     map[snapshot.Process]snapshot.Level // by the wish, to the open source
	ledger    *ledger.Ledger
	snap      *snapshot.Snapshot                // the latest of the open source
	view      *ledger.View                      // of snap
	period    [2]*ledger.View                   // at the beginning and the end of the latest full period
	periods   uint64                            // until then
	usage     [2]usage                          // the same for our own processor time
	followers int                               // of logs
	release   []snapshot.SlotID                 // slots of the source that are retired, once they are saved
	kept      map[snapshot.SlotID]time.Duration // slots that followers may want to read yet, since when
}

// usage is how much processor time we had used.
type usage struct{ at, cpu time.Duration }

// New returns a Daemon that collects nothing before Run.
func New(c Config) *Daemon {
	d := &Daemon{
		config:   c,
		started:  time.Now(),
		clock:    clock{now: time.Now, uptime: c.BootTime},
		identify: make(chan struct{}, 1),
		switched: make(chan struct{}, 1),
		retired:  make(chan struct{}, 1),
		wish:     wish{duty: c.Duty, processes: make(map[snapshot.Process]snapshot.Level)},
		given:    make(map[snapshot.Process]snapshot.Level),
		problem:  errors.New("starting"),
		ledger:   ledger.New(c.Retention),
	}
	if c.On {
		d.wish.level = c.Level
	}
	d.totalsSince = d.started
	if c.StateDir != "" {
		d.restore()
	}
	d.view = d.ledger.View()
	d.period = [2]*ledger.View{d.view, d.view}
	return d
}

// Run collects until ctx ends, and then gives up its wish that the kernel
// count. A collector that is absent or goes away is tried for ever.
func (d *Daemon) Run(ctx context.Context) {
	if d.store != nil {
		defer func() {
			d.save()
			if err := d.store.close(); err != nil {
				d.config.Log.Warn("closing the state directory", "error", err)
			}
		}()
		// Who of those that are restored lives has to be known before any are
		// forgotten. If this fails so will the next one, and say so.
		d.config.Identities.Refresh()
	}
	var others sync.WaitGroup
	defer others.Wait()
	if d.store != nil {
		others.Go(func() { d.keepState(ctx) })
	}
	others.Go(func() { d.keepIdentities(ctx) })
	others.Go(func() { d.keepDuty(ctx) })
	if d.config.Libvirt != nil {
		others.Go(func() { d.config.Libvirt.Run(ctx) }) // ends with ctx and for no other reason
	}
	for ctx.Err() == nil {
		src, err := d.config.Open()
		if err == nil {
			err = d.collect(ctx, src)
		}
		if err != nil {
			d.fail(err)
			wait(ctx, retryEvery)
		}
	}
}

// collect serves one open collector until it fails or ctx ends.
func (d *Daemon) collect(ctx context.Context, src source.Source) error {
	defer func() {
		if err := src.Close(); err != nil {
			d.config.Log.Warn("closing the collector", "error", err)
		}
	}()
	if err := d.attach(src); err != nil {
		return err
	}
	defer d.detach()
	period := time.NewTicker(d.config.Interval)
	defer period.Stop()
	better := time.NewTicker(betterEvery)
	defer better.Stop()
	var settled <-chan time.Time // not nil: events have come since the last snapshot
	learnt := make(map[int]bool) // since then
	events := src.Events()
	for {
		var err error
		select {
		case <-ctx.Done():
			if d.store != nil {
				d.end()
			}
			return nil
		case e, ok := <-events:
			if !ok {
				return source.ErrGone
			}
			if e.Kind == source.VCPUNew && !learnt[e.Process] {
				// At once: the process may not live until the next refresh.
				d.config.Identities.Learn(e.Process)
				learnt[e.Process] = true
			}
			if settled == nil {
				settled = time.After(settle)
			}
			continue
		case <-settled:
			settled = nil
			clear(learnt)
			d.refresh()
			err = d.sample()
		case <-period.C:
			err = d.endPeriod()
		case <-better.C:
			if d.config.Better != nil && d.config.Better() {
				d.end()
				return nil
			}
		}
		if errors.Is(err, source.ErrGone) || errors.Is(err, ledger.ErrInconsistent) {
			return err
		}
	}
}

// attach makes src the collector.
func (d *Daemon) attach(src source.Source) error {
	info, err := src.Info()
	if err != nil {
		return fmt.Errorf("collector: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.given)
	if d.wish.level != snapshot.Off {
		if err := src.SetLevel(d.wish.now()); err != nil {
			return fmt.Errorf("collector: setting the level: %w", err)
		}
	}
	d.ledger.Reopen()
	d.source, d.ended, d.problem, d.snap, d.release = src, false, nil, nil, nil
	d.usage = [2]usage{d.used(), d.used()}
	d.config.Log.Info("collector opened", "collector", info.Collector, "version", info.Version, "isa", info.ISA)
	return d.sampleLocked()
}

// end has the collector stop, for good, and takes and saves all that it has
// counted. What is wished for meanwhile is for the next one.
func (d *Daemon) end() {
	d.mu.Lock()
	if err := d.source.SetLevel(snapshot.Off); err != nil {
		d.config.Log.Debug("ending collection", "error", err)
	}
	d.ended = true
	d.sampleLocked() // a failure has been logged
	d.mu.Unlock()
	if d.store != nil {
		d.save() // and give its slots back
	}
}

// detach lets go of the collector, before it is closed.
func (d *Daemon) detach() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.source, d.problem = nil, source.ErrGone
}

// fail remembers and logs why there is no collector.
func (d *Daemon) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.problem == nil || d.problem.Error() != err.Error() {
		d.config.Log.Warn("not collecting", "problem", err)
	}
	d.source, d.problem = nil, err
}

// sample takes a snapshot and enters it in the ledger.
func (d *Daemon) sample() error {
	asked := d.now()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.source != nil && d.view.Time > asked {
		return nil // someone else's, begun after we asked
	}
	return d.sampleLocked()
}

func (d *Daemon) sampleLocked() error {
	if d.source == nil {
		return d.problem
	}
	now := d.now()
	snap, err := d.source.Snapshot()
	if err != nil {
		return d.trouble(fmt.Errorf("snapshot: %w", err))
	}
	release, err := d.ledger.Apply(snap, now)
	if err != nil {
		return d.trouble(err)
	}
	d.problem = nil
	d.snap, d.view = snap, d.ledger.View()
	if err := d.commandProcesses(); err != nil {
		d.config.Log.Debug("setting levels of processes", "error", err)
	}
	d.release = d.keep(release)
	switch {
	case d.store == nil:
		d.releaseLocked(d.release)
	case len(d.release) > 0:
		select {
		case d.retired <- struct{}{}:
		default: // told already
		}
	}
	return nil
}

// releaseLocked releases slots of the open source. What can't be released now
// is asked for again at the next snapshot.
func (d *Daemon) releaseLocked(slots []snapshot.SlotID) {
	if d.source == nil || len(slots) == 0 {
		return
	}
	if err := d.source.Release(slots); err != nil {
		d.config.Log.Debug("releasing slots", "error", err)
	}
}

// trouble remembers and logs what is wrong with the open collector.
func (d *Daemon) trouble(err error) error {
	if d.problem == nil || d.problem.Error() != err.Error() {
		d.config.Log.Error("collecting", "problem", err)
	}
	d.problem = err
	return err
}

// endPeriod takes the snapshot that rates are made of, and tidies up.
func (d *Daemon) endPeriod() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.sampleLocked(); err != nil {
		return err
	}
	// Memory can be read when nobody writes it any more: ask whether it is.
	if _, err := d.source.Info(); err != nil {
		return d.trouble(fmt.Errorf("%w: %w", source.ErrGone, err))
	}
	forgotten := d.ledger.Expire(func(p snapshot.Process) bool {
		domain, known := d.config.Identities.Lookup(p, d.view.Processes[p].Comm)
		return known && domain.TGID != 0
	})
	for p := range d.wish.processes {
		if !d.alive(p) {
			delete(d.wish.processes, p)
		}
	}
	for _, p := range forgotten {
		d.config.Identities.Forget(p)
	}
	if len(forgotten) > 0 {
		d.view = d.ledger.View()
	}
	d.usage = [2]usage{d.usage[1], d.used()}
	// In a pause of the duty nothing is counted: the rates stay those before.
	if d.wish.level == snapshot.Off || d.wish.always() || d.view.Counted > d.period[1].Counted {
		d.period = [2]*ledger.View{d.period[1], d.view}
		d.periods++
	}
	for p, total := range d.view.Processes {
		if _, known := d.config.Identities.Lookup(p, total.Comm); !known && total.Live {
			d.refresh()
			break
		}
	}
	return nil
}

func (d *Daemon) used() usage { return usage{d.config.BootTime(), d.config.CPUTime()} }

// refresh asks keepIdentities for a refresh, and does not wait for it.
func (d *Daemon) refresh() {
	select {
	case d.identify <- struct{}{}:
	default: // asked for already
	}
}

// keepIdentities refreshes the identities when asked to, and now and then.
func (d *Daemon) keepIdentities(ctx context.Context) {
	ticker := time.NewTicker(identifyEvery)
	defer ticker.Stop()
	var last string
	for {
		var problem string
		if err := d.config.Identities.Refresh(); err != nil {
			problem = err.Error()
		}
		if problem != "" && problem != last {
			d.config.Log.Warn("identifying domains", "problem", problem)
		}
		last = problem
		select {
		case <-ctx.Done():
			return
		case <-d.identify:
		case <-ticker.C:
		}
	}
}

// now is the ledger's time.
func (d *Daemon) now() uint64 { return uint64(d.config.BootTime()) }

// wait returns when t has passed or ctx has ended.
func wait(ctx context.Context, t time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(t):
	}
}
