// SPDX-License-Identifier: Apache-2.0

package api

import "testing"

func TestParseDuty(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       Duty
		always     bool
		wantErr    string
	}{
		{name: "one in ten", text: "1s/10s", want: Duty{1e9, 1e10}},
		{name: "shortest", text: "100ms/200ms", want: Duty{1e8, 2e8}},
		{name: "longest", text: "1m/1h", want: Duty{6e10, 36e11}},
		{name: "always", text: "always", want: Duty{1e9, 1e9}, always: true},
		{name: "all of it", text: "5s/5s", want: Duty{5e9, 5e9}, always: true},
		{name: "empty", wantErr: "duty: two durations are wanted, such as 1s/10s, or always"},
		{name: "one", text: "1s", wantErr: "duty: two durations are wanted, such as 1s/10s, or always"},
		{name: "three", text: "1s/2s/3s", wantErr: "duty: two durations are wanted, such as 1s/10s, or always"},
		{name: "no unit", text: "1/10", wantErr: "duty: two durations are wanted, such as 1s/10s, or always"},
		{name: "more than all", text: "10s/1s", wantErr: "duty: 10s of collection does not fit in every 1s"},
		{name: "too short", text: "99ms/1s", wantErr: "duty: 99ms of collection is shorter than 100ms"},
		{name: "negative", text: "-1s/1s", wantErr: "duty: -1s of collection is shorter than 100ms"},
		{name: "pause too short", text: "1s/1050ms", wantErr: "duty: a pause of 50ms is shorter than 100ms"},
		{name: "too long", text: "1s/61m", wantErr: "duty: a period of 1h1m0s is longer than 1h0m0s"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseDuty(tt.text)
			if err != nil || tt.wantErr != "" {
				if err == nil || err.Error() != tt.wantErr {
					t.Errorf("error %v, want %s", err, tt.wantErr)
				}
				return
			}
			if again, err := ParseDuty(got.String()); err != nil || again != got && !again.Always() {
				t.Errorf("%+v is written %s and read as %+v, %v", got, got, again, err)
			}
			if got != tt.want || got.Always() != tt.always {
				t.Errorf("got %+v (always: %t), want %+v (always: %t)", got, got.Always(), tt.want, tt.always)
			}
		})
	}
}
