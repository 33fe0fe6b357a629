// SPDX-License-Identifier: Apache-2.0

// Package report prints what virtexitd answers: as tables for people, as CSV
// and JSON for programs.
//
// Tables show "-" for what is not known, times with three significant digits,
// and control characters in names as escapes. They fit a terminal of some width,
// or are as wide as they are. CSV is RFC 4180's with a header
// line, but with lines that end in LF as other tools here expect; its numbers
// are unrounded, its times nanoseconds, its unknown values empty. JSON is the
// api object, indented.
package report

import (
	"cmp"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"virtexit/api"
)

// Format is how an answer is printed.
type Format string

// The formats.
const (
	Table Format = "table"
	CSV   Format = "csv"
	JSON  Format = "json"
)

// By is what the rows of a report are.
type By string

// The kinds of rows.
const (
	ByReason By = "reason"
	ByVCPU   By = "vcpu"
)

// Options say how a report is printed.
type Options struct {
	Format Format
	By     By
	// Limit is the number of most frequent reasons of a domain that are
	// printed; 0: all. Tables and CSV sum up the others in one row more.
	Limit int
	Width int // of the terminal; 0: nothing is cut
}

// Report prints a report.
func Report(w io.Writer, r api.Report, o Options) error {
	if o.Format == JSON {
		r.Domains = append([]api.Domain{}, r.Domains...)
		for i := range r.Domains {
			d := &r.Domains[i]
			if o.Limit > 0 && len(d.Exits) > o.Limit {
				d.Exits = d.Exits[:o.Limit]
			}
		}
		return writeJSON(w, r)
	}
	if o.Format == CSV {
		if o.By == ByVCPU {
			return vcpusCSV(w, r)
		}
		return reasonsCSV(w, r, o.Limit)
	}
	for i := range r.Domains {
		d := &r.Domains[i]
		if i > 0 {
			fmt.Fprintln(w)
		}
		heading(w, d)
		if nothing := silence(d, r.Total); nothing != "" {
			if _, err := fmt.Fprintln(w, nothing); err != nil {
				return err
			}
			continue
		}
		exits := "no exits"
		if d.Count > 0 {
			exits = fmt.Sprintf("%s, %s/s", Plural(d.Count, "exit"), rate(d.Rate))
		}
		if _, err := fmt.Fprintf(w, "%s, %s, %s\n", observed(d), Plural(uint64(len(d.VCPUs)), "vCPU"), exits); err != nil {
			return err
		}
		var tables []*table
		if d.Time.Sum() > 0 {
			tables = append(tables, where(d))
		}
		if o.By == ByVCPU {
			tables = append(tables, vcpus(d))
		} else if len(d.Exits) > 0 {
			tables = append(tables, reasons(d, o.Limit))
		}
		for i, t := range tables {
			if i > 0 {
				fmt.Fprintln(w)
			}
			if err := t.write(w, o.Width); err != nil {
				return err
			}
		}
	}
	return nil
}

// silence says why there is nothing to show of a domain; empty: there is.
func silence(d *api.Domain, total bool) string {
	switch {
	case d.Since == nil && d.Count == 0 && d.Running():
		return "nothing was counted yet"
	case d.Since == nil && d.Count == 0:
		return "nothing was counted"
	case d.SpanNS > 0 || d.Count > 0:
		return ""
	case !d.Running() && !total:
		return "did not run; 'virtexit report --total' tells of its last run"
	}
	if d.WallNS <= 0 {
		return "nothing was observed"
	}
	return "nothing was observed in " + span(d.WallNS)
}

// heading tells which domain the table below is about.
func heading(w io.Writer, d *api.Domain) {
	fmt.Fprintf(w, "Domain '%s'", Clean(d.Name))
	if d.ID != nil {
		fmt.Fprintf(w, ", id %d", *d.ID)
	}
	if d.UUID != nil {
		fmt.Fprintf(w, ", uuid %s", Clean(*d.UUID))
	}
	switch {
	case d.Run != nil && !d.Running():
		fmt.Fprintf(w, ", past run %s", Clean(*d.Run))
	case d.State != "running" && d.State != "":
		fmt.Fprintf(w, ", %s", Clean(d.State))
	}
	fmt.Fprintln(w)
}

// Plural counts things.
func Plural(n uint64, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// span prints a longer time as people say it.
func span(ns int64) string {
	if d := time.Duration(ns); d >= 100*time.Second {
		return d.Round(time.Second).String()
	}
	return duration(uint64(max(ns, 0)))
}

// observed tells how long the domain was observed, and of how long a time, when
// that is more. Of a hundredth nothing is said: clocks are read one by one.
func observed(d *api.Domain) string {
	if d.SpanNS < d.WallNS-d.WallNS/100 {
		return fmt.Sprintf("%s observed of %s", span(d.SpanNS), span(d.WallNS))
	}
	return span(d.SpanNS)
}

// where tells where the time of the domain's vCPUs went.
func where(d *api.Domain) *table {
	t := &table{columns: []column{
		{title: Plural(uint64(len(d.VCPUs)), "vCPU"), right: true}, {title: "Guest", right: true}, {title: "KVM", right: true, spare: 1},
		{title: "User", right: true, spare: 2}, {title: "Poll", right: true, spare: 5}, {title: "Halted", right: true, spare: 3},
		{title: "Wait", right: true, spare: 4}, {title: "Outside", right: true, spare: 6},
	}}
	ns, pct := d.Time, d.Time.Pct()
	t.add(duration(ns.Sum()), duration(ns.GuestNS), duration(ns.KVMNS), duration(ns.UserNS), duration(ns.PollNS),
		duration(ns.HaltedNS), duration(ns.WaitNS), duration(ns.OutsideNS))
	t.add(percent(100), percent(pct.Guest), percent(pct.KVM), percent(pct.User), percent(pct.Poll),
		percent(pct.Halted), percent(pct.Wait), percent(pct.Outside))
	return t
}

// shares are the columns that tell at a glance where time went.
var shares = []column{
	{title: "Guest", right: true, spare: 2}, {title: "KVM", right: true, spare: 3}, {title: "User", right: true, spare: 4},
	{title: "Idle", right: true, spare: 5}, {title: "Wait", right: true, spare: 6},
}

// cells are those of the shares. Where nothing was timed they are not known.
func cells(p api.TimePct) []string {
	if p == (api.TimePct{}) {
		return []string{none, none, none, none, none}
	}
	return []string{whole(p.Guest), whole(p.KVM), whole(p.User), whole(p.Poll + p.Halted), whole(p.Wait)}
}

func reasons(d *api.Domain, limit int) *table {
	t := &table{columns: []column{
		{title: "Reason", least: 10}, {title: "Count", right: true}, {title: "Rate", right: true, spare: 1}, {title: "Share", right: true, spare: 7},
		{title: "Time", right: true}, {title: "User", right: true, spare: 5}, {title: "Mean", right: true, spare: 2}, {title: "P50", right: true, spare: 6},
		{title: "P99", right: true, spare: 4}, {title: "Max", right: true, spare: 3},
	}}
	for _, e := range top(d.Exits, limit) {
		var sum *uint64
		user := none
		if e.MaxNS != nil { // some were timed
			sum = &e.TimeNS
			user = "0%"
			if e.TimeNS > 0 {
				user = whole(100 * float64(e.UserNS) / float64(e.TimeNS))
			}
		}
		t.add(e.Reason, count(e.Count), rate(e.Rate), percent(100*e.Share), durationOrNone(sum), user,
			durationOrNone(e.MeanNS), durationOrNone(e.P50NS), durationOrNone(e.P99NS), durationOrNone(e.MaxNS))
	}
	has := func(known func(*api.Exit) *uint64) bool {
		return slices.ContainsFunc(d.Exits, func(e api.Exit) bool { return known(&e) != nil })
	}
	if has(func(e *api.Exit) *uint64 { return e.MeanNS }) && !has(func(e *api.Exit) *uint64 { return e.P50NS }) {
		t.remove(8) // percentiles, which a sum of reports has not
		t.remove(7)
	}
	return t
}

// top returns the first limit exits and one that is the sum of the others. It
// has no ISA; a mean or a percentile cannot be told.
func top(exits []api.Exit, limit int) []api.Exit {
	if limit <= 0 || len(exits) <= limit {
		return exits
	}
	more := exits[limit:]
	sum := api.Exit{Reason: fmt.Sprintf("(%d more)", len(more))}
	for _, e := range more {
		sum.Count += e.Count
		sum.Rate += e.Rate
		sum.Share += e.Share
		sum.TimeNS += e.TimeNS
		sum.UserNS += e.UserNS
		if e.MaxNS != nil && (sum.MaxNS == nil || *e.MaxNS > *sum.MaxNS) {
			sum.MaxNS = e.MaxNS
		}
	}
	return append(exits[:limit:limit], sum)
}

func vcpus(d *api.Domain) *table {
	t := &table{columns: append([]column{
		{title: "vCPU", right: true}, {title: "TID", right: true, spare: 7}, {title: "Exits", right: true}, {title: "Rate", right: true, spare: 1},
		{title: "Share", right: true, spare: 8},
	}, shares...)}
	for _, v := range d.VCPUs {
		tid := none
		if v.TID != 0 {
			tid = fmt.Sprint(v.TID)
		}
		t.add(append([]string{fmt.Sprint(v.ID), tid, count(v.Exits), rate(v.Rate), share(v.Exits, d.Count)}, cells(v.Time.Pct())...)...)
	}
	return t
}

func share(part, whole uint64) string {
	if whole == 0 {
		return none
	}
	return percent(100 * float64(part) / float64(whole))
}

// ListOptions say how a list of domains is printed.
type ListOptions struct {
	Format Format
	// Collecting tells that counts move. Otherwise rates and shares of the time
	// are not known.
	Collecting bool
	// Runs has a table tell a domain's runs apart, instead of what they do now.
	Runs bool
	// Title and Owner add columns to tables and CSV; JSON has all of them.
	Title, Owner bool
	Width        int // of the terminal; 0: nothing is cut
}

// List prints domains, one a line.
func List(w io.Writer, d api.Domains, o ListOptions) error {
	switch o.Format {
	case JSON:
		return writeJSON(w, d)
	case CSV:
		return csv.NewWriter(w).WriteAll(listRows(d.Domains, o))
	}
	return domains(d.Domains, o, func(d *api.Domain) bool {
		paused := d.Since != nil && d.Level == "off"
		return o.Collecting && d.Running() && !paused
	}).write(w, o.Width)
}

// domains has one a row. Rates and shares of the time are shown where they are
// known.
func domains(domains []api.Domain, o ListOptions, known func(*api.Domain) bool) *table {
	columns := append([]column{{title: "Id"}, {title: "Name", least: 17}, {title: "State", spare: 1}, {title: "Exits/s", right: true}}, shares...)
	columns = append(columns, column{title: "Top", least: 7, list: true, spare: 7})
	if o.Runs {
		columns = append(columns[:3:3], column{title: "Run"}, column{title: "Since", spare: 2}, column{title: "Exits", right: true, spare: 3})
	}
	// They come last, where text that runs from right to left moves no number.
	if o.Title {
		columns = append(columns, column{title: "Title", least: 17})
	}
	if o.Owner {
		columns = append(columns, column{title: "Owner", least: 17})
	}
	t := &table{columns: columns}
	for i := range domains {
		d := &domains[i]
		id, exits, pct := none, none, api.TimePct{}
		if d.ID != nil {
			id = fmt.Sprint(*d.ID)
		}
		if known(d) {
			exits, pct = brief(d.Rate), d.TimePct
		}
		row := append(append([]string{id, d.Name, d.State, exits}, cells(pct)...), topReasons(d))
		if o.Runs {
			run, since, exits := none, none, none
			if d.Run != nil {
				run = *d.Run
			}
			if d.Since != nil {
				since, exits = d.Since.Local().Format(time.DateTime), count(d.Count)
			}
			row = append(row[:3], run, since, exits)
		}
		if o.Title {
			row = append(row, cmp.Or(title(d), none))
		}
		if o.Owner {
			row = append(row, cmp.Or(owner(d.Cloud), none))
		}
		t.add(row...)
	}
	return t
}

// title is the domain's, or what its cloud calls it.
func title(d *api.Domain) string {
	if d.Title == "" && d.Cloud != nil {
		return d.Cloud.Name
	}
	return d.Title
}

// owner tells which cloud manages the domain, and for whom.
func owner(c *api.Cloud) string {
	if c == nil {
		return ""
	}
	s := c.System
	if whose := cmp.Or(c.Namespace, c.Project, c.ProjectID); whose != "" {
		s += " " + whose
	}
	if user := cmp.Or(c.User, c.UserID); user != "" {
		s += " (" + user + ")"
	}
	return s
}

// topReasons names the three most frequent reasons.
func topReasons(d *api.Domain) string {
	s := ""
	for _, e := range d.Exits[:min(3, len(d.Exits))] {
		if s != "" {
			s += separator
		}
		s += whole(100*e.Share) + " " + e.Reason
	}
	if s == "" {
		return none
	}
	return s
}

// Status prints how the daemon is.
func Status(w io.Writer, s api.Status, f Format, width int) error {
	switch f {
	case JSON:
		return writeJSON(w, s)
	case CSV:
		return statusCSV(w, s)
	}
	collector := none
	if s.Collector != nil {
		collector = *s.Collector
		if s.CollectorVersion != "" {
			collector += " " + s.CollectorVersion
		}
	}
	var tried [][2]string
	for _, t := range s.Tried {
		if s.Collector == nil { // the problem tells the rest
			tried = append(tried, [2]string{"  " + t.Collector + " offers", t.Gain})
		} else {
			tried = append(tried, [2]string{"Refused", t.Collector + ": " + t.Refused}, [2]string{"  it offers", t.Gain})
		}
	}
	libvirt := "not connected to " + s.Libvirt.URI
	if s.Libvirt.Connected {
		libvirt = "connected to " + s.Libvirt.URI
	}
	if s.Libvirt.Error != "" {
		libvirt += ": " + s.Libvirt.Error
	}
	hook := s.Hook
	if s.HookCycles > 0 {
		hook += fmt.Sprintf(", takes about %d cycles an exit", s.HookCycles)
	}
	duty := ""
	if s.Duty != nil {
		duty = fmt.Sprintf("%v in every %v", time.Duration(s.Duty.OnNS), time.Duration(s.Duty.EveryNS))
	}
	lines := slices.Concat([][2]string{
		{"Collection", s.Collection},
		{"Problem", s.Problem},
		{"Level", s.Level},
		{"Duty", duty},
		{"Collector", collector},
	}, tried, [][2]string{
		{"Hook", hook},
		{"Kernel", s.Kernel},
		{"ISA", s.ISA},
		{"Slots", slots(s.Slots)},
		{"Exits", count(s.Exits)},
		{"Unattributed", count(s.Unattributed)},
		{"Missed", count(s.Missed)},
		{"Totals", fmt.Sprintf("since %s, exits counted for %s", s.TotalsSince.Format("2006-01-02 15:04:05 MST"), span(s.ObservedNS))},
		{"Libvirt", libvirt},
		{"Daemon", fmt.Sprintf("%s, since %s, %s of a CPU (now %s)", s.Version, s.Since.Format("2006-01-02 15:04:05 MST"), percent(s.CPU.TotalPct), percent(s.CPU.LatestPct))},
	})
	for _, l := range lines {
		if l[1] == "" {
			continue
		}
		if _, err := fmt.Fprintf(w, "%-*s%s\n", indent, l[0]+":", fold(Clean(l[1]), width)); err != nil {
			return err
		}
	}
	return nil
}

// indent is how wide the names of a status are.
const indent = 16

// fold breaks a line between words where the terminal ends.
func fold(s string, limit int) string {
	if limit <= 0 {
		return s
	}
	var b strings.Builder
	column := indent
	for i, word := range strings.Split(s, " ") {
		n := width(word)
		switch {
		case i == 0:
		case column+1+n > limit:
			b.WriteString("\n" + strings.Repeat(" ", indent))
			column = indent
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += n
	}
	return b.String()
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func slots(s api.Slots) string {
	text := fmt.Sprintf("%d live, %d retired, %d backed", s.Live, s.Retired, s.Backed)
	if s.Max > 0 {
		text += fmt.Sprintf(", %d at most", s.Max)
	}
	return text
}
