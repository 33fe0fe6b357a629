// SPDX-License-Identifier: Apache-2.0

package server

import (
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/internal/api"
)

func TestParseReport(t *testing.T) {
	for _, tt := range []struct {
		name, query string
		want        reportQuery
		wantErr     string
	}{
		{name: "nothing", want: reportQuery{interval: time.Second}},
		{name: "domains", query: "domain=a%2Fb+c&domain=%25", want: reportQuery{[]string{"a/b c", "%"}, time.Second}},
		{name: "interval", query: "interval=500ms", want: reportQuery{interval: time.Second / 2}},
		{name: "shortest", query: "interval=100ms", want: reportQuery{interval: 100 * time.Millisecond}},
		{name: "longest", query: "interval=1h", want: reportQuery{interval: time.Hour}},
		{name: "bare total", query: "total", want: reportQuery{}},
		{name: "total 1", query: "total=1", want: reportQuery{}},
		{name: "total true", query: "domain=x&total=true", want: reportQuery{domains: []string{"x"}}},
		{name: "too short", query: "interval=99ms", wantErr: `parameter interval="99ms": not between 100ms and 1h0m0s`},
		{name: "too long", query: "interval=61m", wantErr: `parameter interval="61m": not between 100ms and 1h0m0s`},
		{name: "negative", query: "interval=-1s", wantErr: `parameter interval="-1s": not between 100ms and 1h0m0s`},
		{name: "no unit", query: "interval=1", wantErr: `parameter interval="1": not a duration such as 1s or 500ms`},
		{name: "empty interval", query: "interval=", wantErr: `parameter interval="": not a duration such as 1s or 500ms`},
		{name: "both", query: "interval=1s&total", wantErr: "parameters interval and total exclude each other"},
		{name: "total false", query: "total=false", wantErr: `parameter total="false": it is given as total, total=1 or total=true, or not at all`},
		{name: "twice", query: "interval=1s&interval=2s", wantErr: `parameter "interval" is given 2 times`},
		{name: "unknown", query: "domian=x", wantErr: `unknown parameter "domian": known are domain, interval, total`},
		{name: "bad escape", query: "domain=%zz", wantErr: `bad query "domain=%zz": invalid URL escape "%zz"`},
		{name: "semicolon", query: "total;x", wantErr: `bad query "total;x": invalid semicolon separator in query`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseReport(tt.query)
			if text(err) != tt.wantErr {
				t.Fatalf("error %q, want %q", text(err), tt.wantErr)
			}
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(reportQuery{})); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestDecodeCollection(t *testing.T) {
	for _, tt := range []struct {
		name, body string
		want       api.Collection
		wantErr    string
	}{
		{name: "on", body: `{"collection":"on"}`, want: api.Collection{Collection: "on"}},
		{name: "on count", body: `{"collection":"on","level":"count"}` + "\n", want: api.Collection{Collection: "on", Level: "count"}},
		{name: "on time", body: `{"level":"time","collection":"on"}`, want: api.Collection{Collection: "on", Level: "time"}},
		{name: "off", body: `{"collection":"off"}`, want: api.Collection{Collection: "off"}},
		{name: "off with level", body: `{"collection":"off","level":"time"}`, wantErr: `level goes with collection "on" alone`},
		{name: "empty", body: "", wantErr: "bad body: EOF"},
		{name: "null", body: "null", wantErr: `collection is "", must be "on" or "off"`},
		{name: "missing", body: `{"level":"time"}`, wantErr: `collection is "", must be "on" or "off"`},
		{name: "bad collection", body: `{"collection":"yes"}`, wantErr: `collection is "yes", must be "on" or "off"`},
		{name: "bad level", body: `{"collection":"on","level":"off"}`, wantErr: `level is "off", must be "count" or "time"`},
		{name: "unknown key", body: `{"collection":"on","lvl":"time"}`, wantErr: `bad body: json: unknown field "lvl"`},
		{name: "wrong type", body: `{"collection":true}`, wantErr: "bad body: json: cannot unmarshal bool into Go struct field Collection.collection of type string"},
		{name: "two values", body: `{"collection":"on"}{}`, wantErr: "bad body: more than one JSON value"},
		{name: "garbage after", body: `{"collection":"on"}x`, wantErr: "bad body: invalid character 'x' looking for beginning of value"},
		{name: "garbage", body: "collection=on", wantErr: "bad body: invalid character 'c' looking for beginning of value"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := decodeCollection(strings.NewReader(tt.body))
			if text(err) != tt.wantErr {
				t.Fatalf("error %q, want %q", text(err), tt.wantErr)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func FuzzParseReport(f *testing.F) {
	for _, s := range []string{"", "domain=a&domain=b%2F", "interval=1s", "total", "total=1&interval=2s", "x=%zz", "a;b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, query string) {
		q, err := parseReport(query)
		if err != nil {
			if diff := cmp.Diff(reportQuery{}, q, cmp.AllowUnexported(reportQuery{})); diff != "" {
				t.Errorf("error %v and a result\n%s", err, diff)
			}
			return
		}
		if q.interval != 0 && (q.interval < api.MinInterval || q.interval > api.MaxInterval) {
			t.Errorf("interval %v", q.interval)
		}
		// What was understood, written again, means the same.
		again := url.Values{"domain": q.domains}
		if q.interval == 0 {
			again.Set("total", "1")
		} else {
			again.Set("interval", q.interval.String())
		}
		q2, err := parseReport(again.Encode())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(q, q2, cmp.AllowUnexported(reportQuery{})); diff != "" {
			t.Errorf("(-first +again)\n%s", diff)
		}
	})
}

func FuzzDecodeCollection(f *testing.F) {
	for _, s := range []string{`{"collection":"on","level":"time"}`, `{"collection":"off"}`, `null`, `{}{}`, `{"x":1}`, "\x00"} {
		f.Add(s)
	}
	valid := map[api.Collection]bool{
		{Collection: "off"}:                true,
		{Collection: "on"}:                 true,
		{Collection: "on", Level: "count"}: true,
		{Collection: "on", Level: "time"}:  true,
	}
	f.Fuzz(func(t *testing.T, body string) {
		c, err := decodeCollection(strings.NewReader(body))
		if err == nil && !valid[c] {
			t.Errorf("accepted %+v", c)
		}
		if err != nil && c != (api.Collection{}) {
			t.Errorf("error %v and %+v", err, c)
		}
	})
}
