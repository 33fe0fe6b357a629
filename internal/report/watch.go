// SPDX-License-Identifier: Apache-2.0

package report

import (
	"cmp"
	"encoding/csv"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"virtexit/api"
)

// Key is what domains are sorted by.
type Key string

// keys are those of Watch, with how two domains compare: what is most is first,
// but names and ids go up.
var keys = []struct {
	key     Key
	compare func(a, b *api.Domain) int
}{
	{"exits", func(a, b *api.Domain) int { return cmp.Compare(b.Rate, a.Rate) }},
	{"name", func(a, b *api.Domain) int { return cmp.Compare(a.Name, b.Name) }},
	{"id", func(a, b *api.Domain) int { return compareIDs(a.ID, b.ID) }},
	{"guest", byShare(func(p *api.TimePct) float64 { return p.Guest })},
	{"kvm", byShare(func(p *api.TimePct) float64 { return p.KVM })},
	{"user", byShare(func(p *api.TimePct) float64 { return p.User })},
	{"idle", byShare(func(p *api.TimePct) float64 { return p.Poll + p.Halted })},
	{"wait", byShare(func(p *api.TimePct) float64 { return p.Wait })},
}

func byShare(share func(*api.TimePct) float64) func(a, b *api.Domain) int {
	return func(a, b *api.Domain) int { return cmp.Compare(share(&b.TimePct), share(&a.TimePct)) }
}

// compareIDs puts domains without an id last.
func compareIDs(a, b *int) int {
	switch {
	case a != nil && b != nil:
		return cmp.Compare(*a, *b)
	case a != nil:
		return -1
	case b != nil:
		return 1
	}
	return 0
}

// Keys returns the keys that there are.
func Keys() []string {
	var words []string
	for _, k := range keys {
		words = append(words, string(k.key))
	}
	return words
}

// WatchOptions say how what goes on is printed.
type WatchOptions struct {
	Format  Format
	Sort    Key
	Reverse bool
	Header  bool // of CSV
	Width   int  // of the terminal; 0: nothing is cut
	Domains int  // at the most that are shown in a table; 0: all
}

// Watch prints a report as a list of domains: as a table with a line above it,
// as CSV, or as JSON on one line.
func Watch(w io.Writer, r api.Report, o WatchOptions) error {
	if o.Format == JSON {
		return writeLine(w, r)
	}
	sorted := slices.Clone(r.Domains)
	for _, k := range keys {
		if k.key == o.Sort {
			slices.SortStableFunc(sorted, func(a, b api.Domain) int {
				order := k.compare(&a, &b)
				if o.Reverse {
					order = -order
				}
				return cmp.Or(order, cmp.Compare(a.Name, b.Name), compareIDs(a.ID, b.ID), cmp.Compare(a.TGID, b.TGID))
			})
		}
	}
	if o.Format == CSV {
		rows := listRows(sorted, ListOptions{})
		rows[0] = append([]string{"time"}, rows[0]...)
		for i := range rows[1:] {
			rows[1+i] = append(values(&r.Time), rows[1+i]...)
		}
		if !o.Header {
			rows = rows[1:]
		}
		return csv.NewWriter(w).WriteAll(rows)
	}
	known := func(d *api.Domain) bool { return d.SpanNS > 0 }
	var sum float64
	for i := range sorted {
		if known(&sorted[i]) {
			sum += sorted[i].Rate
		}
	}
	line := fmt.Sprintf("%s, %s: %s, %s exits/s, by %s", r.Time.Local().Format(time.DateTime), span(r.IntervalNS),
		Plural(uint64(len(sorted)), "domain"), brief(sum), o.Sort)
	if o.Reverse {
		line += ", reversed"
	}
	more := 0
	if o.Domains > 0 && len(sorted) > o.Domains {
		more = len(sorted) - o.Domains + 1
		sorted = sorted[:o.Domains-1]
	}
	if _, err := fmt.Fprintln(w, line); err != nil {
		return err
	}
	t := domains(sorted, ListOptions{}, known)
	if err := t.write(w, o.Width); err != nil || more == 0 {
		return err
	}
	_, err := fmt.Fprintf(w, " (%d more)\n", more)
	return err
}

// Clip makes of text what fits a screen: the lines it has room for, each cut.
func Clip(text string, columns, lines int) []string {
	var clipped []string
	for line := range strings.Lines(text) {
		if len(clipped) < lines {
			clipped = append(clipped, cut(strings.TrimSuffix(line, "\n"), columns))
		}
	}
	return clipped
}
