// SPDX-License-Identifier: Apache-2.0

package report

import (
	"encoding/csv"
	"fmt"
	"io"
	"strconv"
	"time"

	"virtexit/internal/api"
)

// values turns the fields of a row into text: nil pointers are empty, floats
// have all their digits and no exponent.
func values(fields ...any) []string {
	row := make([]string, len(fields))
	for i, f := range fields {
		switch f := f.(type) {
		case *int:
			if f != nil {
				row[i] = strconv.Itoa(*f)
			}
		case *uint64:
			if f != nil {
				row[i] = strconv.FormatUint(*f, 10)
			}
		case *string:
			if f != nil {
				row[i] = *f
			}
		case *time.Time:
			if f != nil {
				row[i] = f.Format(time.RFC3339Nano)
			}
		case float64:
			row[i] = strconv.FormatFloat(f, 'f', -1, 64)
		default:
			row[i] = fmt.Sprint(f)
		}
	}
	return row
}

func listCSV(w io.Writer, d api.Domains) error {
	rows := [][]string{{"id", "name", "uuid", "tgid", "state", "source", "since", "vcpus", "span_ns", "count", "rate", "guest_ns", "guest_pct", "top_reasons"}}
	for i := range d.Domains {
		d := &d.Domains[i]
		top := ""
		if len(d.Exits) > 0 {
			top = topReasons(d)
		}
		rows = append(rows, values(d.ID, d.Name, d.UUID, d.TGID, d.State, d.Source, d.Since, len(d.VCPUs), d.SpanNS, d.Count, d.Rate, d.GuestNS, d.GuestPct, top))
	}
	return csv.NewWriter(w).WriteAll(rows)
}

func reasonsCSV(w io.Writer, r api.Report, limit int) error {
	rows := [][]string{{"id", "name", "uuid", "span_ns", "isa", "code", "reason", "count", "rate", "share", "time_ns", "mean_ns", "p50_ns", "p99_ns", "max_ns"}}
	for i := range r.Domains {
		d := &r.Domains[i]
		for _, e := range top(d.Exits, limit) {
			var code any = e.Code
			if e.ISA == "" { // the sum of several
				code = ""
			}
			rows = append(rows, values(d.ID, d.Name, d.UUID, d.SpanNS, e.ISA, code, e.Reason, e.Count, e.Rate, e.Share, e.TimeNS, e.MeanNS, e.P50NS, e.P99NS, e.MaxNS))
		}
	}
	return csv.NewWriter(w).WriteAll(rows)
}

func vcpusCSV(w io.Writer, r api.Report) error {
	rows := [][]string{{"id", "name", "uuid", "span_ns", "vcpu", "tid", "exits", "rate", "time_ns", "guest_ns", "guest_pct"}}
	for i := range r.Domains {
		d := &r.Domains[i]
		for _, v := range d.VCPUs {
			rows = append(rows, values(d.ID, d.Name, d.UUID, d.SpanNS, v.ID, v.TID, v.Exits, v.Rate, v.TimeNS, v.GuestNS, v.GuestPct))
		}
	}
	return csv.NewWriter(w).WriteAll(rows)
}

func statusCSV(w io.Writer, s api.Status) error {
	return csv.NewWriter(w).WriteAll([][]string{
		{"collection", "level", "collector", "problem", "module", "hook", "kernel", "isa",
			"slots_live", "slots_retired", "slots_backed", "slots_max", "exits", "unattributed", "missed",
			"libvirt_connected", "libvirt_uri", "libvirt_error", "version", "since"},
		values(s.Collection, s.Level, s.Collector, s.Problem, s.Module, s.Hook, s.Kernel, s.ISA,
			s.Slots.Live, s.Slots.Retired, s.Slots.Backed, s.Slots.Max, s.Exits, s.Unattributed, s.Missed,
			s.Libvirt.Connected, s.Libvirt.URI, s.Libvirt.Error, s.Version, &s.Since),
	})
}
