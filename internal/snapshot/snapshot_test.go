// SPDX-License-Identifier: Apache-2.0

package snapshot

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTimes(t *testing.T) {
	a, b := Times{1, 20, 3, 40, 5, 60, 7}, Times{10, 2, 30, 4, 50, 6, 70}
	sum := Times{11, 22, 33, 44, 55, 66, 77}
	for _, tt := range []struct {
		name      string
		got, want Times
	}{
		{"sum", a.Add(b), sum},
		{"difference", sum.Sub(b), a},
		{"difference of what went back", a.Sub(b), Times{KVM: 18, Poll: 36, Wait: 54}},
		{"maximum", a.Max(b), Times{10, 20, 30, 40, 50, 60, 70}},
	} {
		if diff := cmp.Diff(tt.want, tt.got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
	if got, want := sum.Total(), uint64(308); got != want {
		t.Errorf("total %d, want %d", got, want)
	}
}

func TestLevel(t *testing.T) {
	for l, want := range []string{"off", "pause", "count", "time", "recent", "level(5)"} {
		if got := Level(l).String(); got != want {
			t.Errorf("level %d is %s, want %s", l, got, want)
		}
	}
}
