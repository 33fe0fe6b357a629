// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"

	"virtexit/api"
	"virtexit/internal/report"
)

func TestParseMoment(t *testing.T) {
	zone := time.FixedZone("", 2*3600)
	now := time.Date(2026, 3, 1, 12, 30, 15, 5e8, zone)
	for _, tt := range []struct {
		s    string
		want string // RFC 3339; else the error
	}{
		{"10m", "2026-03-01T12:20:15.5+02:00"},
		{"0s", "2026-03-01T12:30:15.5+02:00"},
		{"36h", "2026-02-28T00:30:15.5+02:00"},
		{"12:30", "2026-03-01T12:30:00+02:00"},
		{"12:30:15", "2026-03-01T12:30:15+02:00"},
		{"12:30:16", "2026-02-28T12:30:16+02:00"},
		{"23:59", "2026-02-28T23:59:00+02:00"},
		{"2026-01-02", "2026-01-02T00:00:00+02:00"},
		{"2026-01-02 15:04", "2026-01-02T15:04:00+02:00"},
		{"2026-01-02 15:04:05", "2026-01-02T15:04:05+02:00"},
		{"2026-01-02T15:04:05Z", "2026-01-02T15:04:05Z"},
		{"2026-01-02T15:04:05.678-07:00", "2026-01-02T15:04:05.678-07:00"},
		{"-10m", "-10m is in the future"},
		{"", `"" is no time`},
		{"yesterday", `"yesterday" is no time`},
		{"25:00", `"25:00" is no time`},
		{"10", `"10" is no time`},
	} {
		got, err := parseMoment(tt.s, now)
		if err != nil {
			if !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("%q: %v, want %s", tt.s, err, tt.want)
			}
			continue
		}
		if s := got.Format(time.RFC3339Nano); s != tt.want {
			t.Errorf("%q: %s, want %s", tt.s, s, tt.want)
		}
	}
}

func TestDelay(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"1s": time.Second, "2": 2 * time.Second, "0.5": 500 * time.Millisecond, "1h": time.Hour, "3600": time.Hour, "100ms": 100 * time.Millisecond,
		"0": 0, "-1": 0, "3601": 0, "nan": 0, "inf": 0, "1e300": 0, "99ms": 0, "": 0, "soon": 0,
	} {
		var d delay
		if err := d.Set(s); (err != nil) != (want == 0) || time.Duration(d) != want {
			t.Errorf("%q: %v, %v", s, time.Duration(d), err)
		}
	}
}

// Whatever is in a file, it is shown or refused.
func FuzzReplay(f *testing.F) {
	f.Add([]byte(`{"schema":"virtexit/v1","time":"2026-01-02T15:04:02Z","interval_ns":1000000000,"domains":[{"id":1,"name":"a","uuid":"u","tgid":5,` +
		`"since":"2026-01-02T15:04:02Z","wall_ns":1,"span_ns":1,"count":3,"vcpus":[{"id":0,"exits":3}],"exits":[{"reason":"hlt","count":3,"mean_ns":0,"max_ns":1}]}]}`))
	f.Add([]byte("{}\n\n{"))
	f.Fuzz(func(t *testing.T, file []byte) {
		var sum report.Sum
		all, bad, err := read(t.Context(), "file", bytes.NewReader(file), func(r api.Report) error {
			sum.Add(r)
			return report.Watch(io.Discard, r, report.WatchOptions{Format: report.Table, Sort: "exits", Width: 80})
		})
		if err == nil && all.reports+bad.n != uint64(bytes.Count(append(file, '\n'), []byte("\n"))) && len(file) > 0 && file[len(file)-1] != '\n' {
			t.Errorf("%d reports and %d other lines", all.reports, bad.n)
		}
		for _, format := range []report.Format{report.Table, report.CSV, report.JSON} {
			if err := report.Report(io.Discard, sum.Report(), report.Options{Format: format, By: report.ByReason, Width: 80}); err != nil && format != report.JSON {
				t.Error(err)
			}
		}
	})
}
