// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

// moment is a flag that takes a time.
type moment struct {
	word string
	time time.Time // zero: not given
}

const momentHelp = `A TIME is a duration ago (10m, 36h), a time of the day, the latest such (15:04
or 15:04:05), a local one with its date (2026-01-02, 2026-01-02 15:04:05), or as
in RFC 3339 (2026-01-02T15:04:05Z).`

func (m *moment) String() string { return m.word }
func (m *moment) Type() string   { return "TIME" }

func (m *moment) Set(s string) (err error) {
	m.word = s
	m.time, err = parseMoment(s, time.Now())
	return err
}

func (m *moment) flag(cmd *cobra.Command, name, usage string) {
	cmd.Flags().Var(m, name, usage)
	noFiles(cmd, name)
}

// parseMoment reads a time as momentHelp tells.
func parseMoment(s string, now time.Time) (time.Time, error) {
	if ago, err := time.ParseDuration(s); err == nil {
		if ago < 0 {
			return time.Time{}, fmt.Errorf("%s is in the future", s)
		}
		return now.Add(-ago), nil
	}
	for _, layout := range []string{"15:04:05", "15:04"} {
		if t, err := time.Parse(layout, s); err == nil {
			at := func(day int) time.Time {
				return time.Date(now.Year(), now.Month(), day, t.Hour(), t.Minute(), t.Second(), 0, now.Location())
			}
			if today := at(now.Day()); !today.After(now) {
				return today, nil
			}
			return at(now.Day() - 1), nil
		}
	}
	for _, layout := range []string{time.RFC3339, time.DateTime, "2006-01-02 15:04", time.DateOnly} {
		if t, err := time.ParseInLocation(layout, s, now.Location()); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q is no time: write 10m, 15:04, 2006-01-02 15:04:05 or 2006-01-02T15:04:05Z", s)
}
