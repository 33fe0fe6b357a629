// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/mattn/go-runewidth"
)

// none stands for what is not known.
const none = "-"

// column is one column of a table.
type column struct {
	title string
	right bool // aligned; a column of numbers
	wide  int  // at the least, whatever the rows are; for rows that come one by one
	least int  // width down to which it may be cut; 0: never cut
	list  bool // of items, of which those go first that do not fit
	spare int  // left out when the line is too long even then, the highest first; 0: never
}

// table prints as virsh does: a leading space, a header, a dashed rule. What is
// too long for a line is cut down to a column's least width, the last column
// first. Then columns are left out, then texts cut further. Numbers never are.
type table struct {
	columns []column
	rows    [][]string
}

// stump is the width down to which a text is cut when nothing else helps.
const stump = 6

func (t *table) add(cells ...string) {
	for i := range cells {
		cells[i] = Clean(cells[i])
	}
	t.rows = append(t.rows, cells)
}

const (
	gap       = "  "
	separator = ", " // of the items of a list
)

// write prints the table on lines of a width; 0: as long as they are.
func (t *table) write(w io.Writer, width int) error {
	return t.print(w, width, true, true)
}

// print prints the header, the rows or both.
func (t *table) print(w io.Writer, limit int, header, rows bool) error {
	widths, line := t.fit(limit)
	var b strings.Builder
	writeLine := func(cell func(int) string) {
		var text strings.Builder
		for i, c := range t.columns {
			s := cell(i)
			if c.list {
				s = items(s, widths[i])
			}
			s = cut(s, widths[i])
			pad := strings.Repeat(" ", widths[i]-width(s))
			if i > 0 {
				text.WriteString(gap)
			}
			if c.right {
				s = pad + s
			} else {
				s += pad
			}
			text.WriteString(s)
		}
		b.WriteString(strings.TrimRight(" "+text.String(), " ") + "\n")
	}
	if header {
		writeLine(func(i int) string { return t.columns[i].title })
		b.WriteString(strings.Repeat("-", line) + "\n")
	}
	if rows {
		for _, row := range t.rows {
			writeLine(func(i int) string { return row[i] })
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// fit chooses the columns and their widths, and tells that of the line.
func (t *table) fit(limit int) (widths []int, line int) {
	for {
		widths, line = t.measure()
		if limit <= 0 || t.cut(widths, &line, limit, false) {
			return widths, line
		}
		spare := 0
		for i, c := range t.columns {
			if c.spare > t.columns[spare].spare {
				spare = i
			}
		}
		if t.columns[spare].spare == 0 {
			t.cut(widths, &line, limit, true)
			return widths, line
		}
		t.remove(spare)
	}
}

func (t *table) measure() (widths []int, line int) {
	widths = make([]int, len(t.columns))
	line = 1 - len(gap)
	for i, c := range t.columns {
		widths[i] = max(width(c.title), c.wide)
		for _, row := range t.rows {
			widths[i] = max(widths[i], width(row[i]))
		}
		line += len(gap) + widths[i]
	}
	return widths, line
}

// cut narrows the columns of text, and tells whether the line is short enough.
func (t *table) cut(widths []int, line *int, limit int, further bool) bool {
	for i, c := range slices.Backward(t.columns) {
		least := c.least
		if further {
			least = min(least, stump)
		}
		if cut := min(*line-limit, widths[i]-least); c.least > 0 && cut > 0 {
			widths[i] -= cut
			*line -= cut
		}
	}
	return *line <= limit
}

func (t *table) remove(column int) {
	t.columns = slices.Delete(t.columns, column, column+1)
	for i, row := range t.rows {
		t.rows[i] = slices.Delete(row, column, column+1)
	}
}

// terminal gives widths that do not depend on the locale.
func terminal() *runewidth.Condition {
	return &runewidth.Condition{StrictEmojiNeutral: true}
}

func width(s string) int { return terminal().StringWidth(s) }

// cut shortens s to at most n columns.
func cut(s string, n int) string { return terminal().Truncate(s, n, "…") }

// items leaves items out until n columns are enough or one item is left.
func items(s string, n int) string {
	for width(s) > n {
		last := strings.LastIndex(s, separator)
		if last < 0 {
			break
		}
		s = s[:last]
	}
	return s
}

// Clean makes text from outside safe to print on one line of a terminal: what
// cannot be printed appears as an escape.
func Clean(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); {
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			quoted := strconv.QuoteRune(r)
			b.WriteString(quoted[1 : len(quoted)-1])
		}
		i += size
	}
	return b.String()
}

// duration prints nanoseconds with three significant digits, and from a day on
// as people say it: the time of many vCPUs adds up.
func duration(ns uint64) string {
	if ns < 1000 {
		return fmt.Sprintf("%dns", ns)
	}
	v := float64(ns)
	for _, unit := range []string{"us", "ms", "s"} {
		v /= 1000
		switch {
		case v < 9.995:
			return fmt.Sprintf("%.2f%s", v, unit)
		case v < 99.95:
			return fmt.Sprintf("%.1f%s", v, unit)
		case v < 999.5 || unit == "s" && v < 99999.5:
			return fmt.Sprintf("%.0f%s", v, unit)
		}
	}
	if h := v / 3600; h < 9999.5 {
		return fmt.Sprintf("%.0fh", h)
	}
	return fmt.Sprintf("%.0fd", v/86400)
}

func durationOrNone(ns *uint64) string {
	if ns == nil {
		return none
	}
	return duration(*ns)
}

func count(n uint64) string { return strconv.FormatUint(n, 10) }

func rate(r float64) string { return strconv.FormatFloat(r, 'f', 1, 64) }

// brief prints a rate with a decimal only where it is small.
func brief(r float64) string {
	if r < 99.95 {
		return rate(r)
	}
	return strconv.FormatFloat(r, 'f', 0, 64)
}

// percent prints one decimal, and 100 without it: that saves a column.
func percent(p float64) string {
	s := strconv.FormatFloat(p, 'f', 1, 64)
	if s == "100.0" {
		s = "100"
	}
	return s + "%"
}

// whole prints a whole number of percent.
func whole(p float64) string {
	if p > 0 && p < 0.5 {
		return "<1%"
	}
	return strconv.FormatFloat(p, 'f', 0, 64) + "%"
}
