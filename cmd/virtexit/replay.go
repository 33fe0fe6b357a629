// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"virtexit/api"
	"virtexit/internal/report"
)

func (a *app) replay() *cobra.Command {
	var (
		since, until moment
		each         bool
		limit        int
		by           = choice{"reason", []string{"reason", "vcpu"}}
		sort         = choice{"exits", report.Keys()}
	)
	cmd := &cobra.Command{
		Use:   "replay FILE [DOMAIN...]",
		Short: "Show what was recorded",
		Long: `Show what 'virtexit record' has recorded in FILE ("-": stdin): the sum, as
'virtexit report' shows it, or with --each one interval after the other, as
'virtexit watch --batch' does. DOMAIN is an id, a uuid, a name or a run;
without it, all are shown.

Percentiles can't be added up: the sum has none of what is in several intervals.
A domain that was started anew is one in the sum, if its uuid is known.

--since and --until choose the intervals that end after the one time and not
after the other.

` + momentHelp + `

A line that is torn, as the last one may be after a crash, is left out with a
message.`,
		Example: `  virtexit replay exits.ndjson
  virtexit replay exits.ndjson web01 --since 23:00 --until 01:30
  virtexit replay exits.ndjson --each --since 10m
  zcat exits.ndjson.gz | virtexit replay - --format csv`,
		Args: cobra.MinimumNArgs(1),
		PreRunE: func(cmd *cobra.Command, _ []string) error {
			given := cmd.Flags().Changed
			switch {
			case limit < 0:
				return fmt.Errorf("--limit %d is negative", limit)
			case limit > 0 && by.value != string(report.ByReason):
				return fmt.Errorf("--limit counts reasons and cannot go with --by %s", by.value)
			case each && (given("by") || given("limit")):
				return errors.New("--by and --limit are about the sum and cannot go with --each")
			case given("sort") && !each:
				return errors.New("--sort goes with --each")
			case given("since") && given("until") && !until.time.After(since.time):
				return fmt.Errorf("--until %s is not after --since %s", until.word, since.word)
			}
			return nil
		},
		RunE: a.do(func(ctx context.Context, args []string) error {
			in := io.Reader(a.stdin)
			if args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return err
				}
				defer f.Close()
				in = f
			}
			w := report.WatchOptions{Format: report.Format(a.format.value), Sort: report.Key(sort.value), Header: true, Width: a.width()}
			names := map[string]bool{} // those that were found
			var sum report.Sum
			all, bad, err := read(ctx, args[0], in, func(r api.Report) error {
				if !r.Time.After(since.time) || !until.time.IsZero() && r.Time.After(until.time) {
					return nil
				}
				r.Domains = pick(r.Domains, args[1:], names)
				sum.Add(r)
				if !each {
					return nil
				}
				if !w.Header && w.Format == report.Table {
					fmt.Fprintln(a.stdout)
				}
				err := report.Watch(a.stdout, r, w)
				w.Header = false
				return err
			})
			if bad.n > 0 {
				a.say(fmt.Sprintf("%s: left out %s that cannot be read as a report; the first is line %d: %s",
					report.Clean(args[0]), report.Plural(bad.n, "line"), bad.line, report.Clean(bad.err.Error())))
			}
			switch {
			case err != nil:
				return err
			case all.reports == 0:
				return fmt.Errorf("%s: no report of virtexit is in it", args[0])
			case sum.Reports == 0:
				return fmt.Errorf("%s: no report is of that time; the first ends %s, the last %s", args[0], local(all.first), local(all.last))
			}
			for _, name := range args[1:] {
				if !names[name] {
					return &api.NotFoundError{Domain: name}
				}
			}
			if each {
				return nil
			}
			o := report.Options{Format: report.Format(a.format.value), By: report.By(by.value), Limit: limit, Width: w.Width}
			total := sum.Report()
			if len(total.Domains) == 0 {
				a.say("no domain was running")
			}
			if o.Format == report.Table {
				fmt.Fprintf(a.stdout, "%s to %s, %s over %v\n\n", local(sum.Begin), local(sum.End), report.Plural(sum.Reports, "report"),
					time.Duration(total.IntervalNS).Round(10*time.Millisecond))
			}
			return report.Report(a.stdout, total, o)
		}),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return nil, cobra.ShellCompDirectiveDefault
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
	}
	since.flag(cmd, "since", "from `TIME` on")
	until.flag(cmd, "until", "up to `TIME`")
	cmd.Flags().BoolVar(&each, "each", false, "one interval after the other")
	by.flag(cmd, cmd.Flags(), "by", "a row for each reason or vcpu")
	cmd.Flags().IntVar(&limit, "limit", 0, "show `N` reasons and the sum of the rest (0: all)")
	sort.flagP(cmd, cmd.Flags(), "sort", "o", "with --each, sort by this `key`, as 'virtexit watch' does")
	noFiles(cmd, "limit")
	return cmd
}

func local(t time.Time) string { return t.Local().Format(time.DateTime) }

// pick returns the domains that the names mean, all without names, and marks the
// names that mean one. Of names that mean several none is meant.
func pick(domains []api.Domain, names []string, found map[string]bool) []api.Domain {
	if len(names) == 0 {
		return domains
	}
	var picked []api.Domain
	taken := map[*api.Domain]bool{}
	for _, name := range names {
		d, err := api.Find(domains, name)
		if err != nil {
			continue
		}
		found[name] = true
		if !taken[d] {
			taken[d] = true
			picked = append(picked, *d)
		}
	}
	return picked
}

// extent tells what was read.
type extent struct {
	reports     uint64
	first, last time.Time
}

// torn are the lines that are no reports.
type torn struct {
	n    uint64
	line int // of the first one
	err  error
}

// maxReport is as the client's, in bytes.
const maxReport = 64 << 20

// read hands over the reports of a file. It goes on after lines that are none.
func read(ctx context.Context, name string, in io.Reader, each func(api.Report) error) (all extent, bad torn, err error) {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxReport)
	line := 0
	for lines.Scan() {
		line++
		if err := ctx.Err(); err != nil {
			return all, bad, err
		}
		r, err := parseReport(lines.Bytes())
		if err != nil {
			if bad.n++; bad.n == 1 {
				bad.line, bad.err = line, err
			}
			continue
		}
		if all.reports++; all.reports == 1 {
			all.first = r.Time
		}
		all.last = r.Time
		if err := each(r); err != nil {
			return all, bad, err
		}
	}
	if err := lines.Err(); err != nil {
		return all, bad, fmt.Errorf("%s: line %d: %w", name, line+1, err)
	}
	return all, bad, nil
}

// parseReport reads a line of a file.
func parseReport(line []byte) (api.Report, error) {
	var r api.Report
	if err := json.Unmarshal(line, &r); err != nil {
		return r, err
	}
	switch {
	case r.Schema != api.Schema:
		return r, fmt.Errorf("its schema is %q, not %q", r.Schema, api.Schema)
	case r.Total:
		return r, errors.New("it is a total and not of an interval")
	case r.IntervalNS <= 0:
		return r, fmt.Errorf("its interval is %d ns", r.IntervalNS)
	}
	return r, nil
}
