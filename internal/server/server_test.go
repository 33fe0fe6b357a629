// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/api/client"
)

// fakeBackend answers from memory.
type fakeBackend struct {
	status  api.Status
	domains []api.Domain
	set     atomic.Pointer[api.Collection]
	setErr  error
	entered chan struct{} // if not nil, a report over an interval says here that it waits
	left    atomic.Int32  // reports and logs that were cut short

	level atomic.Pointer[api.DomainLevel] // that was set
	query atomic.Pointer[api.LogQuery]
	lines chan []api.LogLine // followed, until it is closed
}

func (b *fakeBackend) DomainLevel(domain string) (api.DomainLevel, error) {
	d, err := api.Find(b.domains, domain)
	if err != nil {
		return api.DomainLevel{}, err
	}
	if !d.Running() {
		return api.DomainLevel{}, &api.ConflictError{Reason: "not running"}
	}
	if l := b.level.Load(); l != nil {
		return *l, nil
	}
	return api.DomainLevel{Domain: d.Name, Level: ptr("time"), Default: true}, nil
}

func (b *fakeBackend) SetDomainLevel(domain string, level *string) (api.DomainLevel, error) {
	b.level.Store(&api.DomainLevel{Domain: domain, Level: level, Default: level == nil})
	return b.DomainLevel(domain)
}

func (b *fakeBackend) Log(domain string, q api.LogQuery) (api.Log, error) {
	b.query.Store(&q)
	_, err := b.DomainLevel(domain)
	return api.Log{Domain: domain, Logged: 5, Overrun: 2}, err
}

func (b *fakeBackend) Follow(ctx context.Context, domain string, q api.LogQuery, write func([]api.LogLine) error) error {
	b.query.Store(&q)
	if _, err := b.DomainLevel(domain); err != nil {
		return err
	}
	lines := []api.LogLine{{Domain: domain}}
	for open := true; open; {
		if err := write(lines); err != nil {
			b.left.Add(1)
			return err
		}
		select {
		case <-ctx.Done():
			b.left.Add(1)
			return ctx.Err()
		case lines, open = <-b.lines:
		}
	}
	return b.setErr
}

func (b *fakeBackend) Status() api.Status   { return b.status }
func (b *fakeBackend) Domains() api.Domains { return api.Domains{Domains: b.domains} }

func (b *fakeBackend) Report(ctx context.Context, domains []string, interval time.Duration) (api.Report, error) {
	r := api.Report{Total: interval == 0, IntervalNS: int64(interval)}
	for _, name := range domains {
		d, err := api.Find(b.domains, name)
		if err != nil {
			return api.Report{}, fmt.Errorf("report: %w", err)
		}
		r.Domains = append(r.Domains, *d)
	}
	if len(domains) == 0 {
		r.Domains = b.domains
	}
	if interval > 0 {
		if b.entered != nil {
			b.entered <- struct{}{}
		}
		select {
		case <-time.After(interval):
		case <-ctx.Done():
			b.left.Add(1)
			return api.Report{}, ctx.Err()
		}
	}
	return r, nil
}

func (b *fakeBackend) Watch(ctx context.Context, domains []string, interval time.Duration, each func(api.Report) error) error {
	for seq := uint64(1); seq <= 3; seq++ {
		r, err := b.Report(ctx, domains, interval)
		if err != nil {
			return err
		}
		r.Seq = seq
		if err := each(r); err != nil {
			return err
		}
	}
	return b.setErr
}

func (b *fakeBackend) SetCollection(c api.Collection) (api.Status, error) {
	b.set.Store(&c)
	return b.status, b.setErr
}

func ptr[T any](v T) *T { return &v }

var uglyNames = []string{"a/b", "//", "..", "spa ce", "50%", "%2F", "?x=1&y#z", "ünïcödé 虚拟机", "comma,\"quote\"", "new\nline\x01", "<&>", ":@;+", ".", "a,,b", "-x", "\\", "e\u0301 שלום 🦊", strings.Repeat("n", 200), "lost\ufffd"}

func newBackend() *fakeBackend {
	b := &fakeBackend{
		status: api.Status{Version: "1", Collection: "on", Level: "time", Collector: ptr("kmod"), Since: time.Unix(1e9, 5).UTC()},
		domains: []api.Domain{
			{Name: "zeta", State: "shut off"},
			{Name: "alpha", State: "shut off"},
			{ID: ptr(10), Name: "ten", UUID: ptr("4dea22b3-1d52-d8f3-2516-782e98ab3fa0"), TGID: 10},
			{ID: ptr(2), Name: "two", TGID: 2, Exits: []api.Exit{{ISA: "svm", Code: 120, Reason: "hlt", Count: math.MaxUint64, P50NS: ptr(uint64(0))}}},
			{Name: "twin", TGID: 3},
			{Name: "twin", TGID: 4},
		},
	}
	for i, name := range uglyNames {
		b.domains = append(b.domains, api.Domain{ID: ptr(100 + i), Name: name, TGID: 100 + i})
	}
	return b
}

// start serves s on a socket until the test ends or stop is called.
func start(t *testing.T, s *Server) (path string, stop func() error) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "sock")
	l, err := Listen(path, "", 0o660)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l); close(served) }()
	stop = func() error { cancel(); return <-served }
	t.Cleanup(func() { stop() })
	return path, stop
}

func TestRoundTrip(t *testing.T) {
	b := newBackend()
	path, _ := start(t, New(b, Options{}))
	c := client.New(path)
	ctx := t.Context()

	t.Run("status", func(t *testing.T) {
		got, err := c.Status(ctx)
		want := b.status
		want.Schema = api.Schema
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%v (-want +got)\n%s", err, diff)
		}
	})
	t.Run("domains are in order", func(t *testing.T) {
		got, err := c.Domains(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, d := range got.Domains {
			names = append(names, d.Name)
		}
		want := append(append([]string{"two", "ten"}, uglyNames...), "alpha", "twin", "twin", "zeta")
		if diff := cmp.Diff(want, names); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
		if diff := cmp.Diff(b.domains[3].Exits, got.Domains[0].Exits); diff != "" {
			t.Errorf("exits (-want +got)\n%s", diff)
		}
		if b.domains[0].Name != "zeta" {
			t.Error("the server changed the backend's list")
		}
	})
	t.Run("every name leads to its domain", func(t *testing.T) {
		for i, name := range uglyNames {
			d, err := c.Domain(ctx, name)
			if err != nil {
				t.Errorf("%q: %v", name, err)
			} else if d.Name != name || *d.ID != 100+i || d.Schema != api.Schema {
				t.Errorf("%q: got %+v", name, d)
			}
			r, err := c.Report(ctx, []string{"ten", name}, 0)
			if err != nil {
				t.Errorf("%q: %v", name, err)
			} else if len(r.Domains) != 2 || r.Domains[1].Name != name {
				t.Errorf("%q: report of %+v", name, r.Domains)
			}
		}
	})
	t.Run("every name leads to its level and log", func(t *testing.T) {
		for _, name := range append([]string{"a/level", "log", "level/log", "x/log/level"}, uglyNames...) {
			b := newBackend()
			b.domains = append(b.domains, api.Domain{Name: name, TGID: 5000})
			if slices.Contains(uglyNames, name) {
				b.domains = newBackend().domains
			}
			path, stop := start(t, New(b, Options{}))
			c := client.New(path)
			if l, err := c.DomainLevel(ctx, name); err != nil || l.Domain != name || l.Schema != api.Schema || *l.Level != "time" || !l.Default {
				t.Errorf("%q: level %+v, %v", name, l, err)
			}
			if l, err := c.Log(ctx, name, api.LogQuery{}); err != nil || l.Domain != name || l.Schema != api.Schema || l.Exits == nil || l.Overrun != 2 {
				t.Errorf("%q: log %+v, %v", name, l, err)
			}
			if d, err := c.Domain(ctx, name); err != nil || d.Name != name {
				t.Errorf("%q: %v, %v", name, d.Name, err)
			}
			stop()
		}
	})
	t.Run("id and uuid", func(t *testing.T) {
		for _, name := range []string{"10", "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"} {
			if d, err := c.Domain(ctx, name); err != nil || d.Name != "ten" {
				t.Errorf("%s: %v, %v", name, d.Name, err)
			}
		}
	})
	t.Run("errors about a domain survive", func(t *testing.T) {
		for _, name := range append([]string{""}, "no\tne", "x'/..", "99") {
			var notFound *api.NotFoundError
			if _, err := c.Domain(ctx, name); !errors.As(err, &notFound) || notFound.Domain != name {
				t.Errorf("domain %q: %v", name, err)
			}
			if _, err := c.Report(ctx, []string{"ten", name}, time.Second); !errors.As(err, &notFound) || notFound.Domain != name {
				t.Errorf("report %q: %v", name, err)
			}
		}
		var ambiguous *api.AmbiguousError
		if _, err := c.Domain(ctx, "twin"); !errors.As(err, &ambiguous) || ambiguous.Domain != "twin" {
			t.Errorf("domain: %v", err)
		}
		if _, err := c.Report(ctx, []string{"twin"}, 0); !errors.As(err, &ambiguous) || ambiguous.Domain != "twin" {
			t.Errorf("report: %v", err)
		}
	})
	t.Run("report", func(t *testing.T) {
		r, err := c.Report(ctx, nil, 100*time.Millisecond)
		if err != nil || r.Total || r.IntervalNS != 1e8 || len(r.Domains) != len(b.domains) || r.Domains[0].Name != "two" {
			t.Errorf("interval: %v, %+v", err, r)
		}
		r, err = c.Report(ctx, []string{"ten", "two"}, 0)
		if err != nil || !r.Total || r.IntervalNS != 0 || len(r.Domains) != 2 || r.Domains[0].Name != "ten" {
			t.Errorf("total, in the order asked: %v, %+v", err, r)
		}
	})
	t.Run("some of the domains, and of what is in them", func(t *testing.T) {
		b := newBackend()
		d := &b.domains[2]
		d.Exits = []api.Exit{{ISA: "svm", Code: 0x72, Reason: "cpuid"}, {ISA: "svm", Code: 0x7b, Reason: "io"}, {ISA: "svm", Code: 0x78, Reason: "hlt"}}
		d.VCPUs = []api.VCPU{{ID: 0}, {ID: 1}, {ID: 2}}
		path, _ := start(t, New(b, Options{}))
		for query, want := range map[string]string{
			"domain=ten&reason=CPUID&reason=0x7b":     "ten cpuid io 0 1 2",
			"domain=ten&vcpu=2&vcpu=0":                "ten cpuid io hlt 0 2",
			"domain=ten&domain=two&reason=msr&vcpu=1": "ten 1 two",
			"domain=two&domain=10&vcpu=7&reason=hlt":  "two hlt ten hlt",
		} {
			for _, target := range []string{"/v1/domains?", "/v1/report?total&", "/v1/watch?interval=100ms&"} {
				resp := raw(t, path, "GET "+target+query+" HTTP/1.1\r\nHost: x\r\n\r\n")
				var body struct {
					Domains []api.Domain `json:"domains"`
				}
				if err := json.NewDecoder(resp.Body).Decode(&body); err != nil {
					t.Fatal(err)
				}
				var got []string
				for _, d := range body.Domains {
					got = append(got, d.Name)
					for _, e := range d.Exits {
						got = append(got, e.Reason)
					}
					for _, v := range d.VCPUs {
						got = append(got, fmt.Sprint(v.ID))
					}
				}
				if strings.Join(got, " ") != want {
					t.Errorf("%s: %v, want %s", target+query, got, want)
				}
			}
		}
		if len(d.Exits) != 3 || len(d.VCPUs) != 3 {
			t.Error("the server changed the backend's domain")
		}
	})
	t.Run("watch", func(t *testing.T) {
		var got []uint64
		collect := func(r api.Report) error {
			if r.Schema != api.Schema || len(r.Domains) != 1 || r.Domains[0].Name != "ten" || r.IntervalNS != 1e8 {
				t.Errorf("%+v", r)
			}
			got = append(got, r.Seq)
			return nil
		}
		if err := c.Watch(ctx, []string{"ten"}, 100*time.Millisecond, collect); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff([]uint64{1, 2, 3}, got); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
		enough := errors.New("enough")
		if err := c.Watch(ctx, []string{"ten"}, 100*time.Millisecond, func(api.Report) error { return enough }); err != enough {
			t.Errorf("error %v", err)
		}
		var notFound *api.NotFoundError
		if err := c.Watch(ctx, []string{"none"}, 100*time.Millisecond, collect); !errors.As(err, &notFound) || notFound.Domain != "none" {
			t.Errorf("error %v", err)
		}
		b.setErr = errors.New("the collector is gone")
		defer func() { b.setErr = nil }()
		got = nil
		if err := c.Watch(ctx, []string{"ten"}, 100*time.Millisecond, collect); err == nil || err.Error() != "the collector is gone" || len(got) != 3 {
			t.Errorf("error %v after %v", err, got)
		}
	})
	t.Run("a thousand domains", func(t *testing.T) {
		var domains []string
		for range 1000 {
			domains = append(domains, "4dea22b3-1d52-d8f3-2516-782e98ab3fa0")
		}
		if r, err := c.Report(ctx, domains, 0); err != nil || len(r.Domains) != 1000 {
			t.Errorf("%v, %d domains", err, len(r.Domains))
		}
	})
}

// raw sends bytes and returns the whole answer.
func raw(t *testing.T, path, request string) *http.Response {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	go io.WriteString(c, request) // not all of it may be taken
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatalf("no answer to %.60q: %v", request, err)
	}
	return resp
}

func TestRawRequests(t *testing.T) {
	b := newBackend()
	b.domains[2].Name = "a<b"
	path, _ := start(t, New(b, Options{}))
	put := func(body string) string {
		return fmt.Sprintf("PUT /v1/collection HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
	get := func(target string) string { return "GET " + target + " HTTP/1.1\r\nHost: x\r\n\r\n" }
	for _, tt := range []struct {
		name, request string
		status        int
		error         string // prefix; empty: none
		allow         string
	}{
		{name: "status", request: get("/v1/status"), status: 200},
		{name: "HTTP/1.0", request: "GET /v1/status HTTP/1.0\r\n\r\n", status: 200},
		{name: "absolute target", request: get("http://virtexit/v1/status"), status: 200},
		{name: "total without value", request: get("/v1/report?total"), status: 200},
		{name: "root", request: get("/"), status: 404, error: `no such path: "/"`},
		{name: "unknown path", request: get("/v1/stat%75s/"), status: 404, error: `no such path: "/v1/status/"`},
		{name: "later version", request: get("/v2/status"), status: 404, error: `no such path: "/v2/status"`},
		{name: "unknown domain", request: get("/v1/domains/x%20y"), status: 404, error: "failed to get domain 'x y'"},
		{name: "ambiguous", request: get("/v1/domains/twin"), status: 409, error: "more than one domain is called 'twin'"},
		{name: "post", request: "POST /v1/status HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", status: 405, error: "method POST is not allowed on /v1/status", allow: "GET, HEAD"},
		{name: "get collection", request: get("/v1/collection"), status: 405, error: "method GET is not allowed on /v1/collection", allow: "PUT"},
		{name: "odd method", request: "FROB /v1/domains/x HTTP/1.1\r\nHost: x\r\n\r\n", status: 405, error: "method FROB", allow: "GET, HEAD"},
		{name: "options *", request: "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", status: 404, error: `no such path: "*"`},
		{name: "get with body", request: "GET /v1/status HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi", status: 400, error: "method GET takes no body"},
		{name: "parameter where there is none", request: get("/v1/status?x=1"), status: 400, error: `/v1/status takes no parameters: "x=1"`},
		{name: "unknown parameter", request: get("/v1/report?x=1"), status: 400, error: `unknown parameter "x"`},
		{name: "bad duration", request: get("/v1/report?interval=1"), status: 400, error: `parameter interval="1"`},
		{name: "both", request: get("/v1/report?interval=1s&total"), status: 400, error: "parameters interval and total"},
		{name: "empty body", request: put(""), status: 400, error: "bad body: EOF"},
		{name: "bad JSON", request: put("{"), status: 400, error: "bad body: unexpected EOF"},
		{name: "unknown key", request: put(`{"x":1}`), status: 400, error: `bad body: json: unknown field "x"`},
		{name: "level", request: get("/v1/domains/two/level"), status: 200},
		{name: "level of who does not run", request: get("/v1/domains/alpha/level"), status: 409, error: "not running"},
		{name: "level of nobody", request: get("/v1/domains/nobody/level"), status: 404, error: "failed to get domain 'nobody'"},
		{name: "level of nothing", request: get("/v1/domains//level"), status: 404, error: "failed to get domain ''"},
		{name: "log", request: get("/v1/domains/two/log?limit=3&vcpu=0&reason=hlt"), status: 200},
		{name: "log with a bad limit", request: get("/v1/domains/ten/log?limit=0"), status: 400, error: `parameter limit="0"`},
		{name: "log of who does not run, followed", request: get("/v1/domains/alpha/log?follow"), status: 409, error: "not running"},
		{name: "post to a level", request: "POST /v1/domains/ten/level HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", status: 405, error: "method POST is not allowed on /v1/domains/ten/level", allow: "GET, HEAD, PUT"},
		{name: "put to a log", request: "PUT /v1/domains/ten/log HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", status: 405, error: "method PUT is not allowed on /v1/domains/ten/log", allow: "GET, HEAD"},
		{name: "put of a bad level", request: "PUT /v1/domains/ten/level HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n{\"level\":\"loud\"}", status: 400, error: `level is "loud"`},
		{name: "huge body", request: put(`{"collection":"` + strings.Repeat("x", 1<<20)), status: 413, error: "body is longer than 4096 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if strings.HasPrefix(tt.request, "PUT") {
				needRoot(t)
			}
			resp := raw(t, path, tt.request)
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			var e api.Error
			if err := json.Unmarshal(body, &e); err != nil {
				t.Fatalf("%v in %s", err, body)
			}
			if resp.StatusCode != tt.status || !strings.HasPrefix(e.Message, tt.error) || (e.Message == "") != (tt.error == "") {
				t.Errorf("status %d, error %q; want %d, %q", resp.StatusCode, e.Message, tt.status, tt.error)
			}
			if e.Schema != api.Schema {
				t.Errorf("schema %q", e.Schema)
			}
			if got := resp.Header.Get("Allow"); got != tt.allow {
				t.Errorf("Allow: %q, want %q", got, tt.allow)
			}
			if got := resp.Header.Get("Content-Type"); got != "application/json" {
				t.Errorf("Content-Type: %q", got)
			}
		})
	}
	if b.set.Load() != nil {
		t.Errorf("a bad request reached the backend: %+v", *b.set.Load())
	}
	t.Run("lists are lists and text is plain", func(t *testing.T) {
		resp := raw(t, path, get("/v1/domains/10"))
		body, _ := io.ReadAll(resp.Body)
		for _, want := range []string{`"vcpus":[]`, `"exits":[]`, `"since":null`, `"name":"a<b"`, `"schema":"virtexit/v1"`} {
			if !strings.Contains(string(body), want) {
				t.Errorf("no %s in %s", want, body)
			}
		}
	})
	t.Run("head", func(t *testing.T) {
		resp := raw(t, path, "HEAD /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
		if resp.StatusCode != 200 || resp.ContentLength <= 0 {
			t.Errorf("status %d, length %d", resp.StatusCode, resp.ContentLength)
		}
	})
}

// What is not HTTP/1 is refused, mostly by net/http before it becomes a request.
func TestGarbage(t *testing.T) {
	path, _ := start(t, New(newBackend(), Options{}))
	for _, tt := range []struct {
		name, request string
		status        int
	}{
		{"binary", "\x00\x01\x02\xff\xfe\r\n\r\n", 400},
		{"TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400},
		{"no version", "GET /v1/status\r\n\r\n", 400},
		{"bad escape", "GET /v1/domains/%zz HTTP/1.1\r\nHost: x\r\n\r\n", 400},
		{"two lengths", "PUT /v1/collection HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404},
		{"huge header", "GET /v1/status HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("y", 1<<20) + "\r\n\r\n", 431},
		{"huge line", "GET /v1/report?domain=" + strings.Repeat("y", 1<<20) + " HTTP/1.1\r\nHost: x\r\n\r\n", 431},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := raw(t, path, tt.request).StatusCode; got != tt.status {
				t.Errorf("status %d, want %d", got, tt.status)
			}
		})
	}
	if _, err := client.New(path).Status(t.Context()); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestBackendErrors(t *testing.T) {
	b := newBackend()
	b.setErr = errors.New("netlink: no such family")
	path, _ := start(t, New(b, Options{AdminGroup: fmt.Sprint(os.Getgid())}))
	c := client.New(path)
	var refused *client.StatusError
	_, err := c.SetCollection(t.Context(), api.Collection{Collection: "on", Level: "count"})
	if !errors.As(err, &refused) || refused.Status != 500 || refused.Message != "netlink: no such family" {
		t.Errorf("got %v", err)
	}
	if got := b.set.Load(); got == nil || *got != (api.Collection{Collection: "on", Level: "count"}) {
		t.Errorf("the backend got %+v", got)
	}
	if l, err := c.SetDomainLevel(t.Context(), "ten", ptr("recent")); err != nil || l.Schema != api.Schema || *l.Level != "recent" {
		t.Errorf("level %+v, %v", l, err)
	}
	if l, err := c.SetDomainLevel(t.Context(), "ten", nil); err != nil || !l.Default {
		t.Errorf("level taken back: %+v, %v", l, err)
	}
	if _, err := c.SetDomainLevel(t.Context(), "ten", ptr("loud")); !errors.As(err, &refused) || refused.Status != 400 {
		t.Errorf("unknown level: %v", err)
	}
	b.domains = []api.Domain{{Name: "nan", Rate: math.NaN()}}
	if _, err = c.Domains(t.Context()); !errors.As(err, &refused) || refused.Status != 500 {
		t.Errorf("NaN: %v", err)
	}
}

// as dials with the credentials of somebody else. These belong to a thread,
// which ends with the goroutine that is locked to it.
func as(uid, gid int, groups []uint32, path string) (net.Conn, error) {
	type result struct {
		c   net.Conn
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread()
		set := func(nr uintptr, args ...uintptr) error {
			if _, _, errno := syscall.RawSyscall(nr, args[0], args[1], args[2]); errno != 0 {
				return errno
			}
			return nil
		}
		err := errors.Join(
			set(syscall.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(unsafe.SliceData(groups))), 0),
			set(syscall.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)),
			set(syscall.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)),
		)
		if err != nil {
			done <- result{nil, err}
			return
		}
		c, err := net.Dial("unix", path)
		done <- result{c, err}
	}()
	r := <-done
	return r.c, r.err
}

// needRoot skips a test of another user, and fails it in CI.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	const want = "needs root: to switch, or to connect as others"
	if os.Getenv("CI") == "true" {
		t.Fatal(want)
	}
	t.Skip(want)
}

func TestAdmin(t *testing.T) {
	needRoot(t)
	many := make([]uint32, 1000)
	for i := range many {
		many[i] = uint32(50000 + i)
	}
	for _, tt := range []struct {
		name, adminGroup string
		uid, gid         int
		groups           []uint32
		status           int
		error            string
	}{
		{name: "root", status: 200},
		{name: "root, group unknown", adminGroup: "no-such-group", status: 200},
		{name: "nobody, no group", uid: 65534, gid: 65534, status: 403, error: "switching collection needs root: admin_group names no group in virtexitd.yaml"},
		{name: "nobody, group unknown", adminGroup: "no-such-group", uid: 65534, gid: 65534, status: 403, error: "switching collection needs root: group 'no-such-group': group: unknown group no-such-group"},
		{name: "not a member", adminGroup: "4321", uid: 65534, gid: 65534, groups: []uint32{4320, 4322}, status: 403, error: "switching collection needs root or membership of group '4321'"},
		{name: "root's group is not root", uid: 65534, gid: 0, status: 403, error: "switching collection needs root: admin_group names no group in virtexitd.yaml"},
		{name: "main group", adminGroup: "4321", uid: 65534, gid: 4321, status: 200},
		{name: "other group", adminGroup: "4321", uid: 65534, gid: 65534, groups: []uint32{1, 4321}, status: 200},
		{name: "last of many groups", adminGroup: "50999", uid: 65534, gid: 65534, groups: many, status: 200},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBackend()
			path, _ := start(t, New(b, Options{AdminGroup: tt.adminGroup}))
			for _, f := range []struct {
				path string
				mode os.FileMode
			}{{path, 0o666}, {filepath.Dir(path), 0o755}, {filepath.Dir(filepath.Dir(path)), 0o755}} {
				if err := os.Chmod(f.path, f.mode); err != nil {
					t.Fatal(err)
				}
			}
			for _, step := range []struct {
				request string
				status  int
				error   string
			}{
				{"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n", 200, ""},
				{"GET /v1/domains/ten/level HTTP/1.1\r\nHost: x\r\n\r\n", 200, ""},
				{"PUT /v1/domains/ten/level HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n{\"level\":\"off\"}", tt.status, tt.error},
				{"PUT /v1/collection HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{\"collection\":\"off\"}", tt.status, tt.error},
			} {
				c, err := as(tt.uid, tt.gid, tt.groups, path)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if _, err := io.WriteString(c, step.request); err != nil {
					t.Fatal(err)
				}
				resp, err := http.ReadResponse(bufio.NewReader(c), nil)
				if err != nil {
					t.Fatal(err)
				}
				var e api.Error
				if err := json.NewDecoder(resp.Body).Decode(&e); err != nil {
					t.Fatal(err)
				}
				if resp.StatusCode != step.status || e.Message != step.error {
					t.Errorf("%.10s: status %d, error %q; want %d, %q", step.request, resp.StatusCode, e.Message, step.status, step.error)
				}
			}
			if set := b.level.Load() != nil; set != (tt.status == 200) {
				t.Errorf("level set: %v", set)
			}
			if switched := b.set.Load() != nil; switched != (tt.status == 200) {
				t.Errorf("switched: %v", switched)
			}
		})
	}
}

func TestSlowClients(t *testing.T) {
	b := newBackend()
	for len(b.domains) < 20000 { // some MB: more than a socket's buffer
		b.domains = append(b.domains, api.Domain{Name: strings.Repeat("x", 100)})
	}
	s := New(b, Options{MaxClients: 1})
	s.readTimeout, s.writeTimeout = 100*time.Millisecond, 100*time.Millisecond
	path, _ := start(t, s)
	for _, tt := range []struct{ name, request string }{
		{"silent", ""},
		{"half a header", "GET /v1/status HTTP/1.1\r\nHo"},
		{"half a body", "PUT /v1/collection HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{\"coll"},
		{"does not read", "GET /v1/domains HTTP/1.1\r\nHost: x\r\n\r\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			io.WriteString(c, tt.request)
			time.Sleep(400 * time.Millisecond)
			// By now the server has hung up: what it sent comes to an end.
			c.SetReadDeadline(time.Now().Add(20 * time.Second))
			if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the server still waits")
			}
			if _, err := client.New(path).Status(t.Context()); err != nil {
				t.Errorf("others: %v", err)
			}
		})
	}
	t.Run("a report may take longer", func(t *testing.T) {
		if _, err := client.New(path).Report(t.Context(), []string{"ten"}, 300*time.Millisecond); err != nil {
			t.Error(err)
		}
	})
}

// A poller that names what it has seen gets nothing twice.
func TestETag(t *testing.T) {
	b := newBackend()
	path, _ := start(t, New(b, Options{}))
	get := func(method, tags string) (status int, tag, body string) {
		t.Helper()
		resp := raw(t, path, method+" /v1/domains HTTP/1.1\r\nHost: x\r\nIf-None-Match: "+tags+"\r\n\r\n")
		bytes, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, resp.Header.Get("ETag"), string(bytes)
	}
	_, tag, _ := get("GET", `"x"`)
	for _, step := range []struct {
		name, method, tags string
		change             func()
		status             int
		same               bool
	}{
		{name: "unknown tag", method: "GET", tags: `"x"`, status: 200, same: true},
		{name: "seen", method: "GET", tags: tag, status: 304, same: true},
		{name: "one of several", method: "GET", tags: `"x", ` + tag, status: 304, same: true},
		{name: "any", method: "GET", tags: "*", status: 304, same: true},
		{name: "head", method: "HEAD", tags: tag, status: 304, same: true},
		{name: "another count", method: "GET", tags: tag, status: 200, change: func() { b.domains[0].Count++ }},
	} {
		t.Run(step.name, func(t *testing.T) {
			if step.change != nil {
				step.change()
			}
			status, got, body := get(step.method, step.tags)
			if status != step.status || (got == tag) != step.same || got == "" {
				t.Errorf("status %d, tag %s after %s", status, got, tag)
			}
			if (body == "") != (status == 304) {
				t.Errorf("status %d with %d bytes", status, len(body))
			}
		})
	}
	for _, request := range []string{"GET /v1/domains/none HTTP/1.1\r\n", "PUT /v1/collection HTTP/1.1\r\nContent-Length: 20\r\n"} {
		resp := raw(t, path, request+"Host: x\r\n\r\n{\"collection\":\"off\"}")
		if tag := resp.Header.Get("ETag"); tag != "" {
			t.Errorf("%q: tag %s", request, tag)
		}
	}
}

// Nobody changes anything over a socket that is read-only, root included.
func TestReadOnly(t *testing.T) {
	b := newBackend()
	path, _ := start(t, New(b, Options{ReadOnly: true}))
	c := client.New(path)
	_, err := c.SetCollection(t.Context(), api.Collection{Collection: "off"})
	_, err2 := c.SetDomainLevel(t.Context(), "ten", ptr("off"))
	for _, err := range []error{err, err2} {
		var refused *client.StatusError
		if !errors.As(err, &refused) || refused.Status != 403 || refused.Message != "this socket is read-only" {
			t.Errorf("error %v", err)
		}
	}
	if b.set.Load() != nil || b.level.Load() != nil {
		t.Error("changed")
	}
	if _, err := c.Status(t.Context()); err != nil {
		t.Error(err)
	}
}

// Streams leave room for others.
func TestTooManyStreams(t *testing.T) {
	b := newBackend()
	b.lines = make(chan []api.LogLine)
	path, _ := start(t, New(b, Options{MaxClients: 4}))
	for range 2 {
		resp, err := http.ReadResponse(bufio.NewReader(following(t, path)), nil)
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("%v, %v", resp, err)
		}
	}
	resp, err := http.ReadResponse(bufio.NewReader(following(t, path)), nil)
	if err != nil {
		t.Fatal(err)
	}
	var e api.Error
	if err := json.NewDecoder(resp.Body).Decode(&e); err != nil || resp.StatusCode != 503 || e.Message != "too many clients: 2 streams are under way" {
		t.Errorf("status %d, %+v, %v", resp.StatusCode, e, err)
	}
	if _, err := client.New(path).Status(t.Context()); err != nil {
		t.Error(err)
	}
}

// following opens a log and returns its body once it has begun.
func following(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if _, err := io.WriteString(c, "GET /v1/domains/ten/log?follow HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestFollow(t *testing.T) {
	b := newBackend()
	b.lines = make(chan []api.LogLine)
	s := New(b, Options{})
	s.readTimeout = 100 * time.Millisecond // it is no limit to a log
	path, _ := start(t, s)
	exit := api.LoggedExit{Time: time.Unix(1e9, 7).UTC(), VCPU: 3, ISA: "svm", Code: 0x78, Reason: "hlt", RIP: "0xffffffffffffffff"}
	var many []api.LogLine
	for range 1000 {
		many = append(many, api.LogLine{LoggedExit: &exit})
	}
	go func() {
		b.lines <- []api.LogLine{{LoggedExit: &exit}, {Overrun: 9}}
		time.Sleep(300 * time.Millisecond)
		b.lines <- many
		close(b.lines)
	}()
	b.setErr = errors.New("collector gone")
	var got []api.LogLine
	query := api.LogQuery{VCPU: ptr(3), Reason: "a b", Limit: 4}
	err := client.New(path).Follow(t.Context(), "ten", query, func(l api.LogLine) error {
		got = append(got, l)
		return nil
	})
	var refused *client.StatusError
	if !errors.As(err, &refused) || refused.Message != "collector gone" {
		t.Errorf("error %v", err)
	}
	want := append([]api.LogLine{{Schema: api.Schema, Domain: "ten"}, {LoggedExit: &exit}, {Overrun: 9}}, many...)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("lines (-want +got)\n%s", diff)
	}
	if diff := cmp.Diff(&query, b.query.Load()); diff != "" {
		t.Errorf("query (-want +got)\n%s", diff)
	}
}

// The end of a domain is the end of its log, and of nothing else.
func TestFollowToTheEnd(t *testing.T) {
	b := newBackend()
	b.lines = make(chan []api.LogLine)
	close(b.lines)
	path, _ := start(t, New(b, Options{}))
	c := client.New(path)
	if err := c.Follow(t.Context(), "ten", api.LogQuery{}, func(api.LogLine) error { return nil }); err != nil {
		t.Error(err)
	}
	full := errors.New("full")
	if err := c.Follow(t.Context(), "ten", api.LogQuery{}, func(api.LogLine) error { return full }); err != full {
		t.Errorf("error %v, want %v", err, full)
	}
	var notFound *api.NotFoundError
	if err := c.Follow(t.Context(), "nobody", api.LogQuery{}, nil); !errors.As(err, &notFound) {
		t.Errorf("error %v", err)
	}
}

// Who goes away or does not read holds nobody.
func TestFollowersLeave(t *testing.T) {
	b := newBackend()
	b.lines = make(chan []api.LogLine)
	s := New(b, Options{MaxClients: 1})
	s.writeTimeout = 100 * time.Millisecond
	path, _ := start(t, s)
	left := func(n int32) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); b.left.Load() != n; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d have left, want %d", b.left.Load(), n)
			}
		}
	}
	following(t, path).Close()
	left(1)

	// The socket's buffers fill up.
	exit := api.LoggedExit{Reason: strings.Repeat("x", 1<<20)}
	following(t, path)
	for range 1000 {
		if b.left.Load() == 2 {
			break
		}
		select {
		case b.lines <- []api.LogLine{{LoggedExit: &exit}}:
		case <-time.After(10 * time.Millisecond):
		}
	}
	left(2)
	if _, err := client.New(path).Status(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestFollowShutdown(t *testing.T) {
	b := newBackend()
	b.lines = make(chan []api.LogLine)
	path, stop := start(t, New(b, Options{}))
	done := make(chan error)
	begun := make(chan struct{})
	go func() {
		done <- client.New(path).Follow(t.Context(), "ten", api.LogQuery{}, func(api.LogLine) error { close(begun); return nil })
	}()
	<-begun
	if err := stop(); err != nil {
		t.Errorf("Serve: %v", err)
	}
	var refused *client.StatusError
	if err := <-done; !errors.As(err, &refused) || refused.Message != "virtexitd is stopping" {
		t.Errorf("log being followed: %v", err)
	}
}

func TestTooManyClients(t *testing.T) {
	b := newBackend()
	b.entered = make(chan struct{})
	path, _ := start(t, New(b, Options{MaxClients: 1}))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := client.New(path).Report(ctx, nil, time.Minute)
		done <- err
	}()
	<-b.entered
	var refused *client.StatusError
	if _, err := client.New(path).Status(t.Context()); !errors.As(err, &refused) || refused.Status != 503 ||
		refused.Message != "too many clients: 1 requests are under way" {
		t.Errorf("got %v", err)
	}
	// A client that goes away frees its place.
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("canceled report: %v", err)
	}
	for try := 0; ; try++ {
		if _, err := client.New(path).Status(t.Context()); err == nil {
			break
		} else if try == 100 {
			t.Fatalf("the place is not freed: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if got := b.left.Load(); got != 1 {
		t.Errorf("%d reports were cut short, want 1", got)
	}
}

func TestConnectionsAreLimited(t *testing.T) {
	s := New(newBackend(), Options{MaxClients: 1})
	s.readTimeout = 300 * time.Millisecond
	path, _ := start(t, s)
	for range 10 {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	// The ten are served two by two, each until it has been silent too long.
	begin := time.Now()
	if _, err := client.New(path).Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	if waited := time.Since(begin); waited < 4*s.readTimeout {
		t.Errorf("served after %v: connections are not limited", waited)
	}
}

func TestShutdown(t *testing.T) {
	b := newBackend()
	b.entered = make(chan struct{})
	path, stop := start(t, New(b, Options{}))
	done := make(chan error)
	go func() {
		_, err := client.New(path).Report(t.Context(), nil, time.Minute)
		done <- err
	}()
	<-b.entered
	idle, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	begin := time.Now()
	if err := stop(); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if took := time.Since(begin); took > shutdownGrace+time.Second {
		t.Errorf("took %v", took)
	}
	var refused *client.StatusError
	if err := <-done; !errors.As(err, &refused) || refused.Message != "virtexitd is stopping" {
		t.Errorf("report under way: %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("socket: %v", err)
	}
	var connect *client.ConnectError
	if _, err := client.New(path).Status(t.Context()); !errors.As(err, &connect) {
		t.Errorf("afterwards: %v", err)
	}
}

// Those that are alike keep their places from one list to the next, in whatever
// order the backend has them.
func TestOrder(t *testing.T) {
	at := func(minute int) *time.Time { return ptr(time.Date(2026, 1, 2, 3, minute, 0, 0, time.UTC)) }
	want := []api.Domain{
		{ID: ptr(2), Name: "moves", TGID: 30, Since: at(3)},
		{ID: ptr(10), Name: "b", TGID: 20},
		{Name: "a"},
		{Name: "moves", TGID: 41},
		{Name: "moves", TGID: 42},
		{Name: "moves", TGID: 31, Since: at(2)},
		{Name: "moves", TGID: 32, Since: at(1)},
		{Name: "moves", Since: at(5)},
		{Name: "moves", Since: at(4)},
	}
	got := slices.Clone(want)
	for range want {
		got = append(got[1:], got[0])
		sorted := slices.SortedFunc(slices.Values(got), order)
		if diff := cmp.Diff(want, sorted); diff != "" {
			t.Fatalf("(-want +got)\n%s", diff)
		}
	}
}

// The metrics are somebody else's answer, within the limits of ours.
func TestMetrics(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	path, _ := start(t, New(newBackend(), Options{MaxClients: 1, Metrics: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery == "wait" {
			entered <- struct{}{}
			<-leave
		}
		io.WriteString(w, "x 1\n")
	})}))
	without, _ := start(t, New(newBackend(), Options{}))
	for _, tc := range []struct {
		name, path, method, url string
		status                  int
		body                    string
	}{
		{"scrape", path, "GET", "/metrics", 200, "x 1\n"},
		{"head", path, "HEAD", "/metrics", 200, ""},
		{"put", path, "PUT", "/metrics", 405, `"method PUT is not allowed on /metrics"`},
		{"below", path, "GET", "/metrics/x", 404, `"no such path: \"/metrics/x\""`},
		{"not configured", without, "GET", "/metrics", 404, `"no such path: \"/metrics\""`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			status, body := request(t, tc.path, tc.method, tc.url)
			if status != tc.status || !strings.Contains(body, tc.body) {
				t.Errorf("%d %s, want %d %s", status, body, tc.status, tc.body)
			}
		})
	}
	done := make(chan struct{})
	go func() { defer close(done); request(t, path, "GET", "/metrics?wait") }()
	<-entered
	if status, body := request(t, path, "GET", "/metrics"); status != 503 || !strings.Contains(body, "too many clients") {
		t.Errorf("beside another: %d %s", status, body)
	}
	close(leave)
	<-done
}

func request(t *testing.T, socket, method, url string) (status int, body string) {
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	r, err := http.NewRequestWithContext(t.Context(), method, "http://x"+url, nil)
	if err != nil {
		t.Error(err)
		return 0, ""
	}
	answer, err := c.Do(r)
	if err != nil {
		t.Error(err)
		return 0, ""
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Error(err)
	}
	return answer.StatusCode, string(b)
}
