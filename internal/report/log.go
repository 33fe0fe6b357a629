// SPDX-License-Identifier: Apache-2.0

package report

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"virtexit/internal/api"
)

// Log prints the latest exits of a domain, latest first.
func Log(w io.Writer, l api.Log, f Format) error {
	if f == JSON {
		return writeJSON(w, l)
	}
	if f == Table {
		kept := ""
		if l.Overrun > 0 {
			kept = fmt.Sprintf(", %d of them overwritten", l.Overrun)
		}
		if _, err := fmt.Fprintf(w, "Domain '%s', %d exits logged%s\n", Clean(l.Domain), l.Logged, kept); err != nil {
			return err
		}
	}
	if err := logHeader(w, f); err != nil {
		return err
	}
	for i := range l.Exits {
		if err := LogLine(w, api.LogLine{LoggedExit: &l.Exits[i]}, f); err != nil {
			return err
		}
	}
	return nil
}

// logRow has widths of its own: followed, a log is printed line by line.
const logRow = " %-26s  %4s  %-15s  %8s  %s\n"

func logHeader(w io.Writer, f Format) error {
	var err error
	switch f {
	case Table:
		_, err = fmt.Fprintf(w, logRow+"%s\n", "Time", "vCPU", "Reason", "Duration", "RIP", strings.Repeat("-", lineWidth))
	case CSV:
		err = csv.NewWriter(w).WriteAll([][]string{{"time", "vcpu", "isa", "code", "reason", "duration_ns", "rip"}})
	}
	return err
}

// LogLine prints one line of a log that is followed: as JSON all of them, else a
// header in place of the first, and the exits.
func LogLine(w io.Writer, l api.LogLine, f Format) error {
	if f == JSON {
		enc := json.NewEncoder(w)
		enc.SetEscapeHTML(false)
		return enc.Encode(l)
	}
	e := l.LoggedExit
	switch {
	case l.Schema != "":
		return logHeader(w, f)
	case e == nil:
		return nil
	}
	if f == CSV {
		return csv.NewWriter(w).WriteAll([][]string{values(&e.Time, e.VCPU, e.ISA, e.Code, e.Reason, e.DurationNS, e.RIP)})
	}
	_, err := fmt.Fprintf(w, logRow, e.Time.Local().Format("2006-01-02 15:04:05.000000"), fmt.Sprint(e.VCPU), Clean(e.Reason),
		durationOrNone(e.DurationNS), Clean(e.RIP))
	return err
}
