// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"testing"
	"time"
)

func TestClock(t *testing.T) {
	const hour = time.Hour
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	// asking is when the clocks are read: first with something in between.
	type asking struct {
		boot, up   time.Duration // since at; since then
		read, took time.Duration // before the wall clock is read; and until the uptime is read again
		want       time.Duration // since at
	}
	for _, tt := range []struct {
		name    string
		askings []asking
	}{
		{"jitter", []asking{
			{up: hour, read: 300, took: 600},
			{up: hour, read: 0, took: 100},
			{up: 9 * hour, read: time.Millisecond, took: 2 * time.Millisecond},
		}},
		{"held up", []asking{
			{up: hour, read: 5 * time.Second, took: 5 * time.Second},
			{boot: 7, up: 2 * hour, read: 5 * time.Second, took: 5 * time.Second},
			{up: 3 * hour, took: 5 * time.Second},
		}},
		{"set forward", []asking{
			{up: hour},
			{boot: time.Second, up: hour, read: 300, took: 300, want: time.Second},
			{boot: time.Second, up: hour, want: time.Second},
		}},
		{"set back", []asking{{up: hour}, {boot: -time.Second, up: hour, want: -time.Second}}},
		{"moved a little", []asking{
			{up: hour},
			{boot: wasSet, up: hour},
			{boot: -wasSet, up: hour},
			{boot: wasSet + 1, up: hour, want: wasSet + 1},
			{boot: 0, up: hour, want: 0},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var now asking
			reads := 0
			next := func() int { reads++; return reads }
			c := clock{
				now: func() time.Time {
					read := now.boot + now.up
					if next() == 2 {
						read += now.read
					}
					return at.Add(read)
				},
				uptime: func() time.Duration {
					switch n := next(); {
					case n == 3:
						return now.up + now.took
					case n%3 == 0:
						return now.up + time.Nanosecond
					}
					return now.up
				},
			}
			for i, a := range tt.askings {
				now, reads = a, 0
				if got := c.booted().Sub(at); got != a.want {
					t.Errorf("asking %d: booted at %v, want %v", i, got, a.want)
				}
			}
		})
	}
}
