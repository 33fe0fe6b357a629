// SPDX-License-Identifier: Apache-2.0

package server

import (
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
)

func TestParseQuery(t *testing.T) {
	for _, tt := range []struct {
		name, query string
		want        query
		wantErr     string
	}{
		{name: "nothing", want: query{interval: time.Second}},
		{name: "domains", query: "domain=a%2Fb+c&domain=%25", want: query{domains: []string{"a/b c", "%"}, interval: time.Second}},
		{name: "interval", query: "interval=500ms", want: query{interval: time.Second / 2}},
		{name: "shortest", query: "interval=100ms", want: query{interval: 100 * time.Millisecond}},
		{name: "longest", query: "interval=1h", want: query{interval: time.Hour}},
		{name: "bare total", query: "total", want: query{}},
		{name: "total 1", query: "total=1", want: query{}},
		{name: "total true", query: "domain=x&total=true", want: query{domains: []string{"x"}}},
		{name: "selected", query: "reason=CPUID&reason=0x7b&vcpu=1&vcpu=0", want: query{interval: time.Second, selection: selection{[]string{"CPUID", "0x7b"}, []int{1, 0}}}},
		{name: "selected, PVM", query: "reason=eretu", want: query{interval: time.Second, selection: selection{reasons: []string{"eretu"}}}},
		{name: "what is in no row of its own", query: "reason=other", want: query{interval: time.Second, selection: selection{reasons: []string{"other"}}}},
		{name: "no reason is known", query: "reason=unknown", want: query{interval: time.Second, selection: selection{reasons: []string{"unknown"}}}},
		{name: "no such reason", query: "reason=cpud", wantErr: `parameter reason="cpud": no exit is called so`},
		{name: "empty reason", query: "reason=", wantErr: `parameter reason="": no exit is called so`},
		{name: "no vCPU", query: "vcpu=-1", wantErr: `parameter vcpu="-1": not the number of a vCPU`},
		{name: "too short", query: "interval=99ms", wantErr: `parameter interval="99ms": not between 100ms and 1h0m0s`},
		{name: "too long", query: "interval=61m", wantErr: `parameter interval="61m": not between 100ms and 1h0m0s`},
		{name: "negative", query: "interval=-1s", wantErr: `parameter interval="-1s": not between 100ms and 1h0m0s`},
		{name: "no unit", query: "interval=1", wantErr: `parameter interval="1": not a duration such as 1s or 500ms`},
		{name: "empty interval", query: "interval=", wantErr: `parameter interval="": not a duration such as 1s or 500ms`},
		{name: "both", query: "interval=1s&total", wantErr: "parameters interval and total exclude each other"},
		{name: "total false", query: "total=false", wantErr: `parameter total="false": it is given as total, total=1 or total=true, or not at all`},
		{name: "twice", query: "interval=1s&interval=2s", wantErr: `parameter "interval" is given 2 times`},
		{name: "unknown", query: "domian=x", wantErr: `unknown parameter "domian": known are domain, interval, reason, total, vcpu`},
		{name: "bad escape", query: "domain=%zz", wantErr: `bad query "domain=%zz": invalid URL escape "%zz"`},
		{name: "semicolon", query: "total;x", wantErr: `bad query "total;x": invalid semicolon separator in query`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseQuery(tt.query, "domain", "interval", "reason", "total", "vcpu")
			if text(err) != tt.wantErr {
				t.Fatalf("error %q, want %q", text(err), tt.wantErr)
			}
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(query{}, selection{})); diff != "" {
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
		{name: "on recent", body: `{"collection":"on","level":"recent"}`, want: api.Collection{Collection: "on", Level: "recent"}},
		{name: "on at times", body: `{"collection":"on","duty":{"on_ns":1000000000,"every_ns":10000000000}}`, want: api.Collection{Collection: "on", Duty: &api.Duty{OnNS: 1e9, EveryNS: 1e10}}},
		{name: "on always", body: `{"collection":"on","duty":{"on_ns":1000000000,"every_ns":1000000000}}`, want: api.Collection{Collection: "on", Duty: &api.Duty{OnNS: 1e9, EveryNS: 1e9}}},
		{name: "on as configured", body: `{"collection":"on","duty":null}`, want: api.Collection{Collection: "on"}},
		{name: "half a duty", body: `{"collection":"on","duty":{"on_ns":1000000000}}`, wantErr: "duty: 1s of collection does not fit in every 0s"},
		{name: "off at times", body: `{"collection":"off","duty":{"on_ns":1000000000,"every_ns":10000000000}}`, wantErr: `level and duty go with collection "on" alone`},
		{name: "off", body: `{"collection":"off"}`, want: api.Collection{Collection: "off"}},
		{name: "off with level", body: `{"collection":"off","level":"time"}`, wantErr: `level and duty go with collection "on" alone`},
		{name: "empty", body: "", wantErr: "bad body: EOF"},
		{name: "null", body: "null", wantErr: `collection is "", must be "on" or "off"`},
		{name: "missing", body: `{"level":"time"}`, wantErr: `collection is "", must be "on" or "off"`},
		{name: "bad collection", body: `{"collection":"yes"}`, wantErr: `collection is "yes", must be "on" or "off"`},
		{name: "bad level", body: `{"collection":"on","level":"off"}`, wantErr: `level is "off", must be "count", "time" or "recent"`},
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

func TestDecodeLevel(t *testing.T) {
	level := func(s string) *string { return &s }
	for _, tt := range []struct {
		name, body string
		want       *string
		wantErr    string
	}{
		{name: "recent", body: `{"level":"recent"}`, want: level("recent")},
		{name: "off", body: `{"level":"off"}`, want: level("off")},
		{name: "default", body: `{"level":null}`},
		{name: "nothing", body: `{}`, wantErr: "level is missing: null stands for the default"},
		{name: "unknown", body: `{"level":"pause"}`, wantErr: `level is "pause", must be "off", "count", "time" or "recent", or null for the default`},
		{name: "empty", body: `{"level":""}`, wantErr: `level is "", must be "off", "count", "time" or "recent", or null for the default`},
		{name: "number", body: `{"level":2}`, wantErr: "bad body: level: json: cannot unmarshal number into Go value of type string"},
		{name: "unknown key", body: `{"levels":"time"}`, wantErr: `bad body: json: unknown field "levels"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := decodeLevel(strings.NewReader(tt.body))
			if text(err) != tt.wantErr {
				t.Fatalf("error %q, want %q", text(err), tt.wantErr)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func TestParseLog(t *testing.T) {
	zero := 0
	for _, tt := range []struct {
		name, query string
		want        api.LogQuery
		follow      bool
		wantErr     string
	}{
		{name: "nothing"},
		{name: "all", query: "follow=true&limit=3&vcpu=0&reason=a%20b", want: api.LogQuery{VCPU: &zero, Reason: "a b", Limit: 3}, follow: true},
		{name: "bare follow", query: "follow", follow: true},
		{name: "follow 1", query: "follow=1", follow: true},
		{name: "follow false", query: "follow=false", wantErr: `parameter follow="false": it is given as follow, follow=1 or follow=true, or not at all`},
		{name: "limit", query: "limit=0", wantErr: `parameter limit="0": not a number of exits`},
		{name: "huge limit", query: "limit=99999999999999999999", wantErr: `parameter limit="99999999999999999999": not a number of exits`},
		{name: "vcpu", query: "vcpu=-1", wantErr: `parameter vcpu="-1": not the number of a vCPU`},
		{name: "vcpu by name", query: "vcpu=x", wantErr: `parameter vcpu="x": not the number of a vCPU`},
		{name: "reason", query: "reason=", wantErr: "parameter reason is empty"},
		{name: "twice", query: "limit=1&limit=2", wantErr: `parameter "limit" is given 2 times`},
		{name: "unknown", query: "folow", wantErr: `unknown parameter "folow": known are follow, limit, reason, vcpu`},
		{name: "bad escape", query: "reason=%zz", wantErr: `bad query "reason=%zz": invalid URL escape "%zz"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, follow, err := parseLog(tt.query)
			if text(err) != tt.wantErr {
				t.Fatalf("error %q, want %q", text(err), tt.wantErr)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" || follow != tt.follow {
				t.Errorf("follow %t (-want +got)\n%s", follow, diff)
			}
		})
	}
}

func FuzzParseQuery(f *testing.F) {
	for _, s := range []string{"", "domain=a&domain=b%2F", "interval=1s", "total", "total=1&interval=2s", "x=%zz", "a;b", "reason=cpuid&vcpu=1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		q, err := parseQuery(text, "domain", "interval", "reason", "total", "vcpu")
		if err != nil {
			if diff := cmp.Diff(query{}, q, cmp.AllowUnexported(query{}, selection{})); diff != "" {
				t.Errorf("error %v and a result\n%s", err, diff)
			}
			return
		}
		if q.interval != 0 && (q.interval < api.MinInterval || q.interval > api.MaxInterval) {
			t.Errorf("interval %v", q.interval)
		}
		// What was understood, written again, means the same.
		again := url.Values{"domain": q.domains, "reason": q.reasons}
		for _, v := range q.vcpus {
			again.Add("vcpu", strconv.Itoa(v))
		}
		if q.interval == 0 {
			again.Set("total", "1")
		} else {
			again.Set("interval", q.interval.String())
		}
		q2, err := parseQuery(again.Encode(), "domain", "interval", "reason", "total", "vcpu")
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(q, q2, cmp.AllowUnexported(query{}, selection{})); diff != "" {
			t.Errorf("(-first +again)\n%s", diff)
		}
	})
}

func FuzzDecodeCollection(f *testing.F) {
	for _, s := range []string{`{"collection":"on","level":"time","duty":{"on_ns":100000000,"every_ns":200000000}}`, `{"collection":"off"}`, `null`, `{}{}`, `{"x":1}`, "\x00"} {
		f.Add(s)
	}
	valid := map[api.Collection]bool{
		{Collection: "off"}:                 true,
		{Collection: "on"}:                  true,
		{Collection: "on", Level: "count"}:  true,
		{Collection: "on", Level: "time"}:   true,
		{Collection: "on", Level: "recent"}: true,
	}
	f.Fuzz(func(t *testing.T, body string) {
		c, err := decodeCollection(strings.NewReader(body))
		duty := c.Duty
		c.Duty = nil
		if err == nil && (!valid[c] || duty != nil && (duty.Check() != nil || c.Collection == "off")) {
			t.Errorf("accepted %+v, duty %+v", c, duty)
		}
		if err != nil && c != (api.Collection{}) {
			t.Errorf("error %v and %+v", err, c)
		}
	})
}
