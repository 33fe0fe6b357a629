// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"virtexit/api"
	"virtexit/internal/report"
)

// pace is how often reports are taken, and how many.
type pace struct {
	delay      delay
	iterations int
}

func (p *pace) flags(cmd *cobra.Command) {
	p.delay = delay(api.DefaultInterval)
	cmd.Flags().VarP(&p.delay, "delay", "d", "`time` between reports, as 500ms, or in seconds; with a duty cycle, by default its period")
	cmd.Flags().IntVarP(&p.iterations, "iterations", "n", 0, "end after `N` reports (0: never)")
	noFiles(cmd, "delay", "iterations")
}

func (p *pace) check() error {
	if p.iterations < 0 {
		return fmt.Errorf("--iterations %d is negative", p.iterations)
	}
	return nil
}

// interval is the time from one report to the next.
func (p *pace) interval(cmd *cobra.Command, status api.Status) time.Duration {
	return wholePeriod(status, time.Duration(p.delay), cmd.Flags().Changed("delay"))
}

// delay is a flag that takes a duration, or a number of seconds as virt-top does.
type delay time.Duration

func (d *delay) String() string { return time.Duration(*d).String() }
func (d *delay) Type() string   { return "time" }

func (d *delay) Set(s string) error {
	v, err := time.ParseDuration(s)
	if err != nil {
		var seconds float64
		if seconds, err = strconv.ParseFloat(s, 64); err != nil {
			return fmt.Errorf("%q is neither a duration nor a number of seconds", s)
		}
		v, _ = time.ParseDuration(strconv.FormatFloat(seconds, 'f', 9, 64) + "s") // 0 for what is no time
	}
	if v < api.MinInterval || v > api.MaxInterval {
		return fmt.Errorf("%s is not between %v and %v", s, api.MinInterval, api.MaxInterval)
	}
	*d = delay(v)
	return nil
}

func (a *app) watch() *cobra.Command {
	var (
		p       pace
		batch   bool
		reverse bool
		sort    = choice{"exits", report.Keys()}
	)
	cmd := &cobra.Command{
		Use:   "watch [DOMAIN...]",
		Short: "Show domains with their exits as time goes on",
		Long: `Show domains with their exits and where their time goes, as 'virtexit list'
does, of one interval after the other, on one screen. DOMAIN is an id, a uuid or
a name; without it, all that run are shown.

Keys sort: e by exits a second, n name, i id, g guest, k KVM, u user space,
d idle, w wait for a CPU; r reverses the order. q ends, Ctrl-Z suspends, Ctrl-L
draws anew.

With --batch, and where stdout is no terminal, lists are printed one after the
other; as CSV they have the time in the first column, as JSON each is a report
on one line. When virtexitd goes away, a line says so, and it goes on when it is
back.`,
		Example: `  virtexit watch
  virtexit watch --sort wait --delay 5
  virtexit watch --batch --iterations 10 web01
  virtexit watch --format csv >exits.csv`,
		PreRunE: func(*cobra.Command, []string) error { return p.check() },
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(func(ctx context.Context, domains []string) error {
				status, err := a.client().Status(ctx)
				if err != nil {
					return err
				}
				o := report.WatchOptions{Format: report.Format(a.format.value), Sort: report.Key(sort.value), Reverse: reverse}
				interval := p.interval(cmd, status)
				if out := a.terminal(); out != nil && !batch && o.Format == report.Table && os.Getenv("TERM") != "dumb" {
					return a.screen(ctx, out, domains, interval, p.iterations, o)
				}
				a.remark(status)
				return a.batch(ctx, domains, interval, p.iterations, o)
			})(cmd, args)
		},
		ValidArgsFunction: a.complete,
	}
	p.flags(cmd)
	cmd.Flags().BoolVarP(&batch, "batch", "b", false, "print one list after the other")
	sort.flagP(cmd, cmd.Flags(), "sort", "o", "sort by this `key`: exits, name, id, guest, kvm, user, idle or wait")
	cmd.Flags().BoolVarP(&reverse, "reverse", "r", false, "reverse the order")
	return cmd
}

func (a *app) batch(ctx context.Context, domains []string, interval time.Duration, n int, o report.WatchOptions) error {
	o.Header, o.Width = true, a.width()
	return a.follow(ctx, domains, interval, n, func(r api.Report) error {
		if !o.Header && o.Format == report.Table {
			fmt.Fprintln(a.stdout)
		}
		err := report.Watch(a.stdout, r, o)
		o.Header = false
		return err
	}, a.say)
}

// say prints a line on stderr.
func (a *app) say(line string) { fmt.Fprintln(a.stderr, line) }

// retry is how long it takes until a daemon that has gone is asked again.
const retry = time.Second

// follow hands n reports to each (0: without end), until that fails. Once there
// was one, it waits for a daemon that has gone, and says so.
func (a *app) follow(ctx context.Context, domains []string, interval time.Duration, n int, each func(api.Report) error, say func(string)) error {
	var (
		enough = errors.New("enough")
		failed error // of each
		seen   int
		gone   string
	)
	for {
		err := a.client().Watch(ctx, domains, interval, func(r api.Report) error {
			if gone != "" {
				gone = ""
				say("virtexitd is back")
			}
			if failed = each(r); failed != nil {
				return failed
			}
			if seen++; seen == n {
				return enough
			}
			return nil
		})
		switch {
		case failed != nil:
			return failed
		case errors.Is(err, enough):
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case seen == 0:
			return err
		}
		why := "virtexitd has ended"
		if err != nil {
			why = report.Clean(err.Error())
		}
		if why != gone { // once, not every second
			gone = why
			say(why + "; trying again")
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(retry):
		}
	}
}

// shortcuts are the keys that sort.
var shortcuts = map[byte]report.Key{'e': "exits", 'n': "name", 'i': "id", 'g': "guest", 'k': "kvm", 'u': "user", 'd': "idle", 'w': "wait"}

const shortcutHelp = "q quit  r reverse  e exits  n name  i id  g guest  k kvm  u user  d idle  w wait"

// screen shows the reports on the terminal, each in the place of the one before.
func (a *app) screen(ctx context.Context, out *os.File, domains []string, interval time.Duration, n int, o report.WatchOptions) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t := newTerminal(a.stdin, out)
	defer t.leave()
	if err := t.enter(); err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGWINCH, unix.SIGCONT, unix.SIGQUIT)
	defer signal.Stop(signals)

	type news struct {
		report *api.Report
		note   string // why there is none, or why counts stand still
	}
	reports, ended := make(chan news), make(chan error, 1)
	send := func(what news) {
		select {
		case reports <- what:
		case <-ctx.Done():
		}
	}
	go func() {
		defer t.guard()
		ended <- a.follow(ctx, domains, interval, n, func(r api.Report) error {
			status, err := a.client().Status(ctx)
			note := still(status)
			if err != nil {
				note = "" // the next report tells
			}
			send(news{&r, note})
			return ctx.Err()
		}, func(line string) { send(news{note: line}) })
	}()
	keys := t.keys()

	var latest *api.Report
	note := fmt.Sprintf("the first %v ...", interval)
	for {
		if err := t.draw(func(columns, lines int) []string { return frame(latest, note, o, columns, lines) }); err != nil {
			return err
		}
		select {
		case what := <-reports:
			note = what.note
			if what.report != nil {
				latest = what.report
			}
		case err := <-ended:
			return err
		case s := <-signals:
			take := t.enter        // clears it, too
			if s == unix.SIGQUIT { // has a Go program say what it is at
				t.leave()
				signal.Reset(unix.SIGQUIT)
				take = func() error { return unix.Kill(os.Getpid(), unix.SIGQUIT) }
			}
			if err := take(); err != nil {
				return err
			}
		case key, ok := <-keys:
			switch {
			case !ok || key == 'q' || key == ctrl('C'):
				return nil
			case key == ctrl('Z'):
				t.leave()
				if err := unix.Kill(0, unix.SIGTSTP); err != nil { // as the terminal would: the whole pipeline
					return err
				}
			case key == ctrl('L'):
				if err := t.enter(); err != nil {
					return err
				}
			case key == 'r':
				o.Reverse = !o.Reverse
			case shortcuts[key] != "":
				o.Sort, o.Reverse = shortcuts[key], false
			}
		}
	}
}

// frame is what the screen shows, line by line: the report, and below it what
// there is to say and the keys.
func frame(r *api.Report, note string, o report.WatchOptions, columns, lines int) []string {
	var text bytes.Buffer
	body := max(lines-2, 0)
	if r != nil {
		o.Width, o.Domains = columns, max(body-3, 1) // below the line, the titles and the rule
		report.Watch(&text, *r, o)                   // into memory: cannot fail
	}
	shown := report.Clip(text.String(), columns, body)
	for len(shown) < body {
		shown = append(shown, "")
	}
	return append(shown, report.Clip(report.Clean(note)+"\n"+shortcutHelp, columns, lines)...)
}
