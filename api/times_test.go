// SPDX-License-Identifier: Apache-2.0

package api

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPct(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   Times
		want TimePct
	}{
		{"nothing timed", Times{}, TimePct{}},
		{"each", Times{GuestNS: 400, KVMNS: 200, UserNS: 100, PollNS: 50, HaltedNS: 30, WaitNS: 12, OutsideNS: 8},
			TimePct{Guest: 50, KVM: 25, User: 12.5, Poll: 6.25, Halted: 3.75, Wait: 1.5, Outside: 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, tt.in.Pct()); diff != "" {
				t.Errorf("shares (-want +got)\n%s", diff)
			}
		})
	}
}
