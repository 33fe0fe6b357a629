// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/test/lab/inside"
)

// noise are the reasons that no program asks for: the host's interrupts and
// the first touch of a page.
var noise = []string{"interrupt", "npf"}

// asked are the counts without noise.
func asked(m map[string]uint64) map[string]uint64 {
	m = maps.Clone(m)
	for _, reason := range noise {
		delete(m, reason)
	}
	return m
}

// TestDomains has three domains and one guest without libvirt at once.
func TestDomains(t *testing.T) {
	inside.Load(t, "")
	d := start(t, options{})
	domains := []struct {
		domain
		program string
		want    map[string]uint64
	}{
		{domain{name: "alpha", uuid: "aaaaaaaa-1111-4111-8111-000000000001"},
			"cpuid:10000,out:0x80:500,in:0x81:30,hypercall:1234,rdmsr:0x1b:777",
			map[string]uint64{"cpuid": 10000, "io": 530, "hypercall": 1234, "msr": 777, "hlt": 1}},
		{domain{name: "beta, with spaces", uuid: "aaaaaaaa-1111-4111-8111-000000000002"},
			"cpuid:321,out:0x80:2500,hypercall:1,rdmsr:0x1b:12",
			map[string]uint64{"cpuid": 321, "io": 2500, "hypercall": 1, "msr": 12, "hlt": 1}},
		// Its second vCPU is never woken.
		{domain{name: "gamma", uuid: "aaaaaaaa-1111-4111-8111-000000000003", vcpus: 2},
			"cpuid:7,hypercall:2000",
			map[string]uint64{"cpuid": 7, "hypercall": 2000, "hlt": 1}},
	}
	for _, x := range domains {
		x.os = rom(t, x.program, false)
		create(t, x.domain)
	}
	plain := newGuest(t, 2)
	done := make(chan error)
	go func() { done <- plain.Run(0, "cpuid:1500,hlt:20") }()
	go func() { done <- plain.Run(1, "cpuid:400,rdmsr:0x1b:60") }()
	for range 2 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	for _, x := range domains {
		inside.Eventually(t, x.name+" is done and has its id", 60*time.Second, func() bool {
			got := d.find(x.name)
			return got.ID != nil && counts(got)["hlt"] == 1
		})
	}

	t.Run("exact", func(t *testing.T) {
		for _, x := range domains {
			id := virsh(t, "domid", x.name)
			for _, ref := range []string{x.name, id, x.uuid, strings.ToUpper(strings.ReplaceAll(x.uuid, "-", ""))} {
				got := d.total(ref)
				if got.Name != x.name || got.UUID == nil || *got.UUID != x.uuid || got.ID == nil || strconv.Itoa(*got.ID) != id {
					t.Errorf("%s: %+v", ref, got)
				}
				if diff := cmp.Diff(x.want, asked(counts(got))); diff != "" {
					t.Errorf("%s (-want +got):\n%s", ref, diff)
				}
				if len(got.VCPUs) != max(x.vcpus, 1) || got.VCPUs[0].Exits != got.Count {
					t.Errorf("%s: vCPUs %+v of %d exits", ref, got.VCPUs, got.Count)
				}
			}
		}
		got := d.total(nameOf(t, plain))
		if got.ID != nil || got.UUID != nil || got.TGID != plain.TGID() || got.Source != "process" {
			t.Errorf("without libvirt: %+v", got)
		}
		if diff := cmp.Diff(map[string]uint64{"cpuid": 1900, "hlt": 20, "msr": 60, "io": 2}, asked(counts(got))); diff != "" {
			t.Errorf("without libvirt (-want +got):\n%s", diff)
		}
		if len(got.VCPUs) != 2 || got.VCPUs[0].TID != plain.TID(0) || got.VCPUs[1].TID != plain.TID(1) ||
			got.VCPUs[0].Exits < 1521 || got.VCPUs[1].Exits < 461 || got.VCPUs[0].Exits+got.VCPUs[1].Exits != got.Count {
			t.Errorf("vCPUs %+v", got.VCPUs)
		}
	})
	t.Run("conservation", func(t *testing.T) {
		if s := d.conserve(); s.Unattributed != 0 || s.Missed != 0 {
			t.Errorf("%+v", s)
		}
	})
	t.Run("formats", func(t *testing.T) {
		for _, args := range [][]string{{"list"}, {"report", "--total"}, {"report", "--total", "--limit", "1"}, {"report", "--total", "--by", "vcpu"}} {
			table := d.ok(args...)
			rows := records(t, d.ok(append(args, "--format", "csv")...))
			var names []string
			for _, x := range domains {
				names = append(names, x.name)
			}
			names = append(names, nameOf(t, plain))
			for _, name := range names {
				if !strings.Contains(table, name) {
					t.Errorf("%q: no %s in\n%s", args, name, table)
				}
				if !slices.ContainsFunc(rows, func(row map[string]string) bool { return row["name"] == name }) {
					t.Errorf("%q: no %s in %v", args, name, rows)
				}
			}
		}
		for _, row := range records(t, d.ok("report", "--total", "--format", "csv", "alpha")) {
			if want, ok := domains[0].want[row["reason"]]; ok && row["count"] != strconv.FormatUint(want, 10) {
				t.Errorf("%v, want %d", row, want)
			}
		}
		rows := records(t, d.ok("report", "--total", "--by", "vcpu", "--format", "csv", nameOf(t, plain)))
		if len(rows) != 2 || rows[1]["vcpu"] != "1" || rows[1]["tid"] != strconv.Itoa(plain.TID(1)) || rows[1]["id"] != "" {
			t.Errorf("%v", rows)
		}
	})
	t.Run("interval", func(t *testing.T) {
		for interval := 3 * time.Second; interval < 30*time.Second; interval *= 2 {
			done := make(chan result)
			go func() {
				done <- d.run("report", "--interval", interval.String(), "--format", "json", nameOf(t, plain))
			}()
			time.Sleep(interval / 3)
			began := time.Now()
			run(t, plain, 0, "hypercall:123")
			ended := time.Now()
			text := (<-done).stdout
			r := decode[api.Report](t, text)
			if from := r.Time.Add(-time.Duration(r.IntervalNS)); began.Before(from) || ended.After(r.Time) {
				continue // too busy a machine to do it within the interval
			}
			if got := reportOf(t, text); asked(got)["hypercall"] != 123 || got["cpuid"] != 0 {
				t.Error(text)
			}
			return
		}
		t.Error("the guest never ran within the interval")
	})
	t.Run("errors", func(t *testing.T) {
		for _, tc := range []struct {
			name   string
			args   []string
			status int
			stderr string
		}{
			{"unknown domain", []string{"report", "x"}, 1, "error: failed to get domain 'x'\n"},
			{"unknown domain among others", []string{"report", "--total", "alpha", "x"}, 1, "error: failed to get domain 'x'\n"},
			{"part of a name", []string{"report", "alph"}, 1, "error: failed to get domain 'alph'\n"},
			{"unknown flag", []string{"list", "--x"}, 2, "error: unknown flag: --x\n"},
			{"unknown command", []string{"x"}, 2, "error: unknown command \"x\""},
			{"bad format", []string{"list", "--format", "xml"}, 2, "error: "},
			{"interval and total", []string{"report", "--total", "--interval", "1s"}, 2, "error: --interval and --total exclude each other\n"},
			{"socket", []string{"list", "--socket", "/nonexistent"}, 1, "error: "},
		} {
			t.Run(tc.name, func(t *testing.T) {
				if r := d.run(tc.args...); r.status != tc.status || !strings.HasPrefix(r.stderr, tc.stderr) || r.stdout != "" {
					t.Errorf("%+v, want %d and %q", r, tc.status, tc.stderr)
				}
			})
		}
	})
	t.Run("http", func(t *testing.T) { testHTTP(t, d, domains[0].uuid, nameOf(t, plain)) })
	t.Run("garbage", func(t *testing.T) { testGarbage(t, d) })
	t.Run("after all that", func(t *testing.T) {
		if diff := cmp.Diff(domains[0].want, asked(counts(d.total("alpha")))); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		d.conserve()
	})
}

// reportOf are the counts of a report of one domain.
func reportOf(t *testing.T, text string) map[string]uint64 {
	t.Helper()
	r := decode[struct {
		Domains []struct {
			Exits []struct {
				Reason string
				Count  uint64
			}
		}
	}](t, text)
	if len(r.Domains) != 1 {
		t.Fatalf("%d domains in\n%s", len(r.Domains), text)
	}
	m := map[string]uint64{}
	for _, e := range r.Domains[0].Exits {
		m[e.Reason] = e.Count
	}
	return m
}

// records reads CSV with a header.
func records(t *testing.T, text string) (rows []map[string]string) {
	t.Helper()
	lines, err := csv.NewReader(strings.NewReader(text)).ReadAll()
	if err != nil || len(lines) < 1 {
		t.Fatalf("%v in\n%s", err, text)
	}
	for _, line := range lines[1:] {
		row := map[string]string{}
		for i, field := range line {
			row[lines[0][i]] = field
		}
		rows = append(rows, row)
	}
	return rows
}

// The contract's fields, each with a value of its type.
var (
	number  any = 0.0
	text    any = ""
	null    any = nil
	times       = map[string]any{"guest_ns": number, "kvm_ns": number, "user_ns": number, "poll_ns": number, "halted_ns": number, "wait_ns": number, "outside_ns": number}
	vcpu        = map[string]any{"id": number, "tid": number, "exits": number, "time": times, "guest_ns": number}
	exit        = map[string]any{"isa": text, "code": number, "reason": text, "count": number, "time_ns": number, "user_ns": number, "max_ns": number, "p50_ns": number, "p99_ns": number}
	managed     = map[string]any{"id": number, "name": text, "uuid": text, "tgid": number, "state": text, "level": text, "since": text, "wall_ns": number, "span_ns": number, "time": times, "vcpus": []any{vcpu}, "exits": []any{exit}}
	alone       = map[string]any{"id": null, "name": text, "uuid": null, "tgid": number, "state": text, "level": text, "since": text, "wall_ns": number, "span_ns": number, "time": times, "vcpus": []any{vcpu}, "exits": []any{exit}}
)

// conforms compares the type of got, and of all that it holds, with that of
// want. It may hold more.
func conforms(t *testing.T, where string, want, got any) {
	t.Helper()
	switch want := want.(type) {
	case map[string]any:
		m, ok := got.(map[string]any)
		if !ok {
			t.Errorf("%s is %v, want an object", where, got)
		}
		for key := range want {
			if _, ok := m[key]; !ok {
				t.Errorf("%s has no %s: %v", where, key, got)
				continue
			}
			conforms(t, where+"."+key, want[key], m[key])
		}
	case []any:
		list, ok := got.([]any)
		if !ok || len(list) == 0 {
			t.Errorf("%s is %v, want a filled list", where, got)
		}
		for i := range list {
			conforms(t, where+"["+strconv.Itoa(i)+"]", want[0], list[i])
		}
	case float64:
		if _, ok := got.(float64); !ok && !(got == nil && strings.HasSuffix(where, "_ns")) {
			t.Errorf("%s is %v, want a number", where, got)
		}
	case string:
		if s, ok := got.(string); !ok || s == "" {
			t.Errorf("%s is %v, want text", where, got)
		}
	case nil:
		if got != nil {
			t.Errorf("%s is %v, want null", where, got)
		}
	}
}

// httpClient talks to the socket as curl does.
func httpClient(d *virtexitd) *http.Client {
	return &http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", d.socket)
		}},
	}
}

func testHTTP(t *testing.T, d *virtexitd, uuid, plain string) {
	c := httpClient(d)
	get := func(path string, status int) map[string]any {
		t.Helper()
		r, err := c.Get("http://localhost" + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		var body map[string]any
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if r.StatusCode != status || body["schema"] != "virtexit/v1" || !strings.HasPrefix(r.Header.Get("Content-Type"), "application/json") {
			t.Errorf("%s: %s, %s, schema %v", path, r.Status, r.Header.Get("Content-Type"), body["schema"])
		}
		return body
	}
	id := virsh(t, "domid", "alpha")
	for _, ref := range []string{"alpha", uuid, id} {
		got := get("/v1/domains/"+ref, 200)
		conforms(t, ref, managed, got)
		if got["name"] != "alpha" || got["uuid"] != uuid || got["state"] != "running" {
			t.Errorf("%s: %v", ref, got)
		}
		if _, err := time.Parse(time.RFC3339Nano, got["since"].(string)); err != nil {
			t.Error(err)
		}
	}
	conforms(t, plain, alone, get("/v1/domains/"+url.PathEscape(plain), 200))
	if got := get("/v1/domains/"+url.PathEscape("beta, with spaces"), 200)["name"]; got != "beta, with spaces" {
		t.Errorf("name %v", got)
	}
	for path, want := range map[string]int{
		"/v1/domains":                                  4,
		"/v1/report?total=1":                           4,
		"/v1/report?interval=100ms":                    4,
		"/v1/report?total=1&domain=alpha":              1,
		"/v1/report?domain=alpha&interval=0.1s":        1,
		"/v1/report?total=1&domain=gamma&domain=alpha": 2,
	} {
		got, ok := get(path, 200)["domains"].([]any)
		if !ok || len(got) != want {
			t.Errorf("%s: %d domains, want %d", path, len(got), want)
		}
	}
	conforms(t, "status", map[string]any{"collection": text, "level": text, "collector": text, "hook": text, "kernel": text, "isa": text,
		"slots": map[string]any{"live": number, "retired": number, "backed": number, "max": number},
		"exits": number, "unattributed": number, "missed": number,
		"libvirt": map[string]any{"uri": text}, "since": text}, get("/v1/status", 200))
	for path, want := range map[string]int{
		"/v1/domains/x":                            404,
		"/v1/domains/..%2f":                        404,
		"/v1/report?domain=x":                      404,
		"/v1/report?interval=x":                    400,
		"/v1/report?interval=1s&total=1":           400,
		"/v1/report?unknown=1":                     400,
		"/v1/report?domain=%zz":                    400,
		"/v2/status":                               404,
		"/v1/domains/" + strings.Repeat("x", 5000): 404,
		"/v1/report?total=1&domain=" + url.QueryEscape("\x00\xff\n"): 404,
	} {
		if got, ok := get(path, want)["error"].(string); !ok || got == "" {
			t.Errorf("%s: error %q", path, got)
		}
	}
}

func testGarbage(t *testing.T, d *virtexitd) {
	before := d.status()
	for _, text := range []string{
		"\x00\x01\x02\xff\xfe",
		strings.Repeat("A", 1<<20),
		"GET / HTTP/9.9\r\n\r\n",
		"GET /v1/status HTTP/1.1\r\n\r\n", // no host
		"PUT /v1/collection HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
		"PUT /v1/collection HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
		"GET /v1/status HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X-Y: z\r\n", 200_000) + "\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
	} {
		c, err := net.Dial("unix", d.socket)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		_, writeErr := io.WriteString(c, text)
		if err := c.(*net.UnixConn).CloseWrite(); err != nil && writeErr == nil {
			t.Error(err)
		}
		answer, err := io.ReadAll(c)
		if len(answer) > 0 && !bytes.HasPrefix(answer, []byte("HTTP/1.1 4")) && !bytes.HasPrefix(answer, []byte("HTTP/1.1 5")) {
			t.Errorf("%.30q: answer %.100q, %v", text, answer, err)
		}
		c.Close()
	}
	for _, tc := range []struct {
		name, body string
	}{
		{"empty", ""},
		{"not json", "on"},
		{"cut off", `{"collection":`},
		{"list", `[]`},
		{"null", `null`},
		{"number", `{"collection": 1}`},
		{"unknown key", `{"collection": "off", "x": 1}`},
		{"unknown value", `{"collection": "maybe"}`},
		{"level", `{"collection": "on", "level": "x"}`},
		{"level with off", `{"collection": "off", "level": "time"}`},
		{"two values", `{"collection": "off"} {}`},
		{"huge", `{"collection": "` + strings.Repeat("o", 1<<20) + `"}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, err := http.NewRequestWithContext(t.Context(), "PUT", "http://localhost/v1/collection", strings.NewReader(tc.body))
			if err != nil {
				t.Fatal(err)
			}
			answer, err := httpClient(d).Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer answer.Body.Close()
			var body struct{ Schema, Error string }
			if err := json.NewDecoder(answer.Body).Decode(&body); err != nil || answer.StatusCode < 400 || answer.StatusCode > 499 || body.Error == "" {
				t.Errorf("%s, %+v, %v", answer.Status, body, err)
			}
		})
	}
	after := d.status()
	if after.Collection != "on" || after.Level != before.Level || after.Exits < before.Exits {
		t.Errorf("before %+v\nafter %+v", before, after)
	}
}
