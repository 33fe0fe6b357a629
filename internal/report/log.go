// SPDX-License-Identifier: Apache-2.0

package report

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"

	"virtexit/api"
)

// Log prints the latest exits of a domain, latest first, on a terminal of a
// width; 0: nothing is cut.
func Log(w io.Writer, l api.Log, f Format, width int) error {
	if f == JSON {
		return writeJSON(w, l)
	}
	if f == Table {
		kept := ""
		if l.Overrun > 0 {
			kept = fmt.Sprintf(", %d of them overwritten", l.Overrun)
		}
		if _, err := fmt.Fprintf(w, "Domain '%s', %s logged%s\n", Clean(l.Domain), Plural(l.Logged, "exit"), kept); err != nil {
			return err
		}
	}
	if err := logHeader(w, f, width); err != nil {
		return err
	}
	for i := range l.Exits {
		if err := LogLine(w, api.LogLine{LoggedExit: &l.Exits[i]}, f, width); err != nil {
			return err
		}
	}
	return nil
}

// logTable has widths of its own: followed, a log is printed line by line.
func logTable() *table {
	return &table{columns: []column{
		{title: "Time", wide: 26}, {title: "vCPU", right: true, wide: 4, spare: 1}, {title: "Reason", wide: 18, least: 10},
		{title: "Duration", right: true, wide: 8}, {title: "RIP", wide: 18, spare: 2},
	}}
}

func logHeader(w io.Writer, f Format, width int) error {
	switch f {
	case Table:
		return logTable().print(w, width, true, false)
	case CSV:
		return csv.NewWriter(w).WriteAll([][]string{{"time", "vcpu", "isa", "code", "reason", "duration_ns", "rip"}})
	}
	return nil
}

// LogLine prints one line of a log that is followed: as JSON all of them, else a
// header in place of the first, and the exits.
func LogLine(w io.Writer, l api.LogLine, f Format, width int) error {
	if f == JSON {
		return writeLine(w, l)
	}
	e := l.LoggedExit
	switch {
	case l.Schema != "":
		return logHeader(w, f, width)
	case e == nil:
		return nil
	}
	if f == CSV {
		return csv.NewWriter(w).WriteAll([][]string{values(&e.Time, e.VCPU, e.ISA, e.Code, e.Reason, e.DurationNS, e.RIP)})
	}
	t := logTable()
	t.add(e.Time.Local().Format("2006-01-02 15:04:05.000000"), fmt.Sprint(e.VCPU), e.Reason, durationOrNone(e.DurationNS), e.RIP)
	return t.print(w, width, false, true)
}

// writeLine prints JSON on one line.
func writeLine(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}
