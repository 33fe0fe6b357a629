// SPDX-License-Identifier: Apache-2.0

// Package server answers virtexit's API: HTTP/1.1 with JSON on a unix socket.
//
// Whoever can open the socket can read. Switching collection and setting levels
// needs more: see Options.
package server

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"virtexit/api"
)

// Backend is what the server asks. Its methods are called from several
// goroutines at once. It need not set Schema in its answers.
type Backend interface {
	Status() api.Status
	// Domains returns all domains, also those that do not run.
	Domains() api.Domains
	// Report returns what the domains named by id, uuid or name (see
	// api.Find) did during an interval that starts now, or their totals when
	// interval is 0. Without names it returns all running domains.
	// Unknown and ambiguous names give *api.NotFoundError and
	// *api.AmbiguousError. It returns early when ctx ends.
	Report(ctx context.Context, domains []string, interval time.Duration) (api.Report, error)
	// Watch hands over such a report for one interval after the other, until
	// ctx ends or each fails. It hands over none when it fails at once.
	Watch(ctx context.Context, domains []string, interval time.Duration, each func(api.Report) error) error
	// SetCollection switches collection; its argument is valid. An empty
	// Level and an empty Duty mean the configured ones.
	SetCollection(api.Collection) (api.Status, error)
	// DomainLevel tells the level of a running domain; for others it gives
	// *api.ConflictError, as do the methods that follow.
	DomainLevel(domain string) (api.DomainLevel, error)
	// SetDomainLevel sets it; the level is valid. nil is the default.
	SetDomainLevel(domain string, level *string) (api.DomainLevel, error)
	// Log returns the latest exits of a running domain.
	Log(domain string, q api.LogQuery) (api.Log, error)
	// Follow writes them as they come, the line with the domain's name first,
	// until the domain or ctx ends or write fails. It writes nothing when it
	// fails at once, and keeps no line for longer than a write.
	Follow(ctx context.Context, domain string, q api.LogQuery, write func([]api.LogLine) error) error
}

// Options configure a Server. The zero value is usable.
type Options struct {
	AdminGroup string       // name or number; its members, beside root, may switch collection
	ReadOnly   bool         // nobody may
	MaxClients int          // requests served at once, half of them streams; 0: 64
	Metrics    http.Handler // answers /metrics; nil: there is no such path
}

// Limits of what a client may take from the daemon.
const (
	maxHeader     = 64 << 10 // bytes, the domains of a report included
	maxBody       = 4 << 10  // bytes
	shutdownGrace = 2 * time.Second
)

// Server answers clients.
type Server struct {
	backend Backend
	options Options
	busy    chan struct{} // one element for each request under way
	streams chan struct{} // one for each that streams

	readTimeout  time.Duration // for a request to arrive
	writeTimeout time.Duration // for its answer to be read
}

// New returns a server that answers from backend.
func New(backend Backend, options Options) *Server {
	if options.MaxClients <= 0 {
		options.MaxClients = 64
	}
	return &Server{
		backend:      backend,
		options:      options,
		busy:         make(chan struct{}, options.MaxClients),
		streams:      make(chan struct{}, max(1, options.MaxClients/2)),
		readTimeout:  5 * time.Second,
		writeTimeout: 10 * time.Second,
	}
}

// Serve answers on the listener until ctx ends, cuts reports under way short,
// lets other requests finish for a moment, and closes the listener, which
// unlinks its socket. It returns nil after ctx has ended.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler:                      s,
		DisableGeneralOptionsHandler: true,
		ReadTimeout:                  s.readTimeout,
		MaxHeaderBytes:               maxHeader,
		BaseContext:                  func(net.Listener) context.Context { return ctx },
		ConnContext:                  withPeer,
	}
	// On a unix socket a connection costs little: one a request, so that none
	// waits idly in the place of another.
	srv.SetKeepAlivesEnabled(false)
	served := make(chan error, 1)
	// Requests are limited to MaxClients with a clear answer to those beyond;
	// connections are limited too, so that silent ones do not eat up the
	// daemon's file descriptors.
	go func() { served <- srv.Serve(limit(l, 2*s.options.MaxClients)) }()
	select {
	case err := <-served:
		srv.Close()
		return err
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
	defer cancel()
	if srv.Shutdown(grace) != nil {
		srv.Close()
	}
	<-served
	return nil
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	answer, err := s.answer(w, r)
	if answer == nil && err == nil {
		return // it has been written
	}
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false)
	status := http.StatusOK
	if err == nil {
		err = enc.Encode(answer)
	}
	if err != nil {
		body.Reset()
		var e api.Error
		status, e = explain(err)
		if status == http.StatusMethodNotAllowed {
			w.Header().Set("Allow", strings.Join(methods(r.URL), ", "))
		}
		enc.Encode(e) // into memory, of strings: cannot fail
	}
	head(w, "application/json")
	if status == http.StatusOK && r.Method != http.MethodPut {
		// The same state makes the same bytes.
		sum := sha256.Sum256(body.Bytes())
		tag := fmt.Sprintf(`"%x"`, sum[:12])
		w.Header().Set("ETag", tag)
		w.Header().Set("Cache-Control", "no-cache") // ask again
		if sent := r.Header.Get("If-None-Match"); sent == "*" || slices.Contains(strings.FieldsFunc(sent, isListSpace), tag) {
			status = http.StatusNotModified
			body.Reset()
		}
	}
	// A client that does not read its answer must not hold us.
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(s.writeTimeout))
	w.WriteHeader(status)
	w.Write(body.Bytes()) // the client may be gone: nobody to tell
}

func isListSpace(r rune) bool { return r == ',' || r == ' ' || r == '\t' }

func head(w http.ResponseWriter, contentType string) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
}

// statusError is an error with an HTTP status of its own.
type statusError struct {
	status int
	error
}

func fail(status int, format string, args ...any) error {
	return &statusError{status, fmt.Errorf(format, args...)}
}

// explain turns an error into an answer.
func explain(err error) (int, api.Error) {
	e := api.Error{Schema: api.Schema, Message: err.Error()}
	var (
		notFound  *api.NotFoundError
		ambiguous *api.AmbiguousError
		conflict  *api.ConflictError
		status    *statusError
	)
	switch {
	case errors.As(err, &notFound):
		e.Domain = &notFound.Domain
		return http.StatusNotFound, e
	case errors.As(err, &ambiguous):
		e.Domain = &ambiguous.Domain
		return http.StatusConflict, e
	case errors.As(err, &conflict):
		return http.StatusConflict, e
	case errors.As(err, &status):
		return status.status, e
	case errors.Is(err, context.Canceled):
		e.Message = "virtexitd is stopping"
		return http.StatusServiceUnavailable, e
	case errors.Is(err, context.DeadlineExceeded):
		return http.StatusServiceUnavailable, e
	}
	return http.StatusInternalServerError, e
}

const (
	domainPath  = "/v1/domains/"
	metricsPath = "/metrics"
)

// resources are what a domain has behind its name.
var resources = []string{"/level", "/log"}

// split splits the path of a domain. A slash within its name is one that the
// client has escaped.
func split(u *url.URL) (domain, resource string) {
	domain = strings.TrimPrefix(u.Path, domainPath)
	for _, r := range resources {
		if strings.HasSuffix(u.EscapedPath(), r) && strings.HasSuffix(domain, r) {
			return strings.TrimSuffix(domain, r), r
		}
	}
	return domain, ""
}

// methods tells what a path can be asked for; nil when there is no such path.
func methods(u *url.URL) []string {
	read := []string{http.MethodGet, http.MethodHead}
	switch u.Path {
	case "/v1/watch":
		return []string{http.MethodGet}
	case metricsPath, "/v1/status", "/v1/domains", "/v1/report":
		return read
	case "/v1/collection":
		return []string{http.MethodPut}
	}
	if !strings.HasPrefix(u.Path, domainPath) {
		return nil
	}
	if _, resource := split(u); resource == "/level" {
		return append(read, http.MethodPut)
	}
	return read
}

func (s *Server) answer(w http.ResponseWriter, r *http.Request) (any, error) {
	select {
	case s.busy <- struct{}{}:
		defer func() { <-s.busy }()
	default:
		return nil, fail(http.StatusServiceUnavailable, "too many clients: %d requests are under way", s.options.MaxClients)
	}
	allowed := methods(r.URL)
	switch {
	case allowed == nil || r.URL.Path == metricsPath && s.options.Metrics == nil:
		return nil, fail(http.StatusNotFound, "no such path: %q", r.URL.Path)
	case !slices.Contains(allowed, r.Method):
		return nil, fail(http.StatusMethodNotAllowed, "method %s is not allowed on %s", r.Method, r.URL.Path)
	case r.Method != http.MethodPut && r.ContentLength != 0:
		return nil, fail(http.StatusBadRequest, "method %s takes no body", r.Method)
	}
	domain, resource := split(r.URL)
	switch {
	case r.URL.Path == metricsPath:
		// As for an answer of ours: see ServeHTTP.
		http.NewResponseController(w).SetWriteDeadline(time.Now().Add(s.writeTimeout))
		s.options.Metrics.ServeHTTP(w, r)
		return nil, nil
	case r.URL.Path == "/v1/report":
		return s.report(w, r)
	case r.URL.Path == "/v1/watch":
		return s.watch(w, r)
	case r.URL.Path == "/v1/domains":
		return s.domains(r)
	case resource == "/log":
		return s.log(w, r, domain)
	}
	if r.URL.RawQuery != "" {
		return nil, fail(http.StatusBadRequest, "%s takes no parameters: %q", r.URL.Path, r.URL.RawQuery)
	}
	switch r.URL.Path {
	case "/v1/status":
		return withSchema(s.backend.Status()), nil
	case "/v1/collection":
		return s.collection(w, r)
	}
	if resource == "/level" {
		return s.level(w, r, domain)
	}
	d, err := api.Find(s.backend.Domains().Domains, domain)
	if err != nil {
		return nil, err
	}
	return api.OneDomain{Schema: api.Schema, Domain: tidy([]api.Domain{*d}, selection{}, false)[0]}, nil
}

func (s *Server) domains(r *http.Request) (any, error) {
	q, err := parseQuery(r.URL.RawQuery, "domain", "reason", "vcpu")
	if err != nil {
		return nil, fail(http.StatusBadRequest, "%w", err)
	}
	all := s.backend.Domains()
	wanted := all.Domains
	if len(q.domains) > 0 {
		wanted = nil
		for _, name := range q.domains {
			d, err := api.Find(all.Domains, name)
			if err != nil {
				return nil, err
			}
			wanted = append(wanted, *d)
		}
	}
	all.Schema = api.Schema
	all.Domains = tidy(wanted, q.selection, len(q.domains) == 0)
	return all, nil
}

func (s *Server) report(w http.ResponseWriter, r *http.Request) (any, error) {
	q, err := parseQuery(r.URL.RawQuery, "domain", "interval", "reason", "total", "vcpu")
	if err != nil {
		return nil, fail(http.StatusBadRequest, "%w", err)
	}
	// The request is complete, but the read deadline would cancel its context
	// while the interval passes.
	if err := http.NewResponseController(w).SetReadDeadline(time.Time{}); err != nil {
		return nil, err
	}
	report, err := s.backend.Report(r.Context(), q.domains, q.interval)
	if err != nil {
		return nil, err
	}
	report.Schema = api.Schema
	report.Domains = tidy(report.Domains, q.selection, len(q.domains) == 0)
	return report, nil
}

func (s *Server) watch(w http.ResponseWriter, r *http.Request) (any, error) {
	q, err := parseQuery(r.URL.RawQuery, "domain", "interval", "reason", "vcpu")
	if err != nil {
		return nil, fail(http.StatusBadRequest, "%w", err)
	}
	return nil, s.stream(w, func(write func(...any) error) error {
		return s.backend.Watch(r.Context(), q.domains, q.interval, func(report api.Report) error {
			report.Schema = api.Schema
			report.Domains = tidy(report.Domains, q.selection, len(q.domains) == 0)
			return write(report)
		})
	})
}

// stream answers with what send writes, a line for each value. An error goes into
// the answer as it does elsewhere, or, once that has begun, into the last line.
func (s *Server) stream(w http.ResponseWriter, send func(write func(lines ...any) error) error) error {
	select {
	case s.streams <- struct{}{}:
		defer func() { <-s.streams }()
	default:
		return fail(http.StatusServiceUnavailable, "too many clients: %d streams are under way", cap(s.streams))
	}
	out := http.NewResponseController(w)
	// As for a report. That the client has gone still ends the context.
	if err := out.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	begun := false
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	write := func(lines ...any) error {
		if !begun {
			begun = true
			head(w, "application/x-ndjson")
		}
		// A client that is this slow for some lines is not waited for.
		for some := range slices.Chunk(lines, 256) {
			if err := out.SetWriteDeadline(time.Now().Add(s.writeTimeout)); err != nil {
				return err
			}
			for _, line := range some {
				if err := enc.Encode(line); err != nil {
					return err
				}
			}
			if err := out.Flush(); err != nil {
				return err
			}
		}
		return nil
	}
	err := send(write)
	if !begun {
		return err
	}
	if err != nil {
		_, e := explain(err)
		write(e) // the client may be why
	}
	return nil
}

// admin decodes the body of a request by who may change things.
func admin[T any](s *Server, w http.ResponseWriter, r *http.Request, decode func(io.Reader) (T, error)) (T, error) {
	var none T
	if err := s.mayAdmin(r.Context()); err != nil {
		return none, fail(http.StatusForbidden, "%w", err)
	}
	body, err := decode(http.MaxBytesReader(w, r.Body, maxBody))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return none, fail(http.StatusRequestEntityTooLarge, "body is longer than %d bytes", tooLarge.Limit)
	}
	if err != nil {
		return none, fail(http.StatusBadRequest, "%w", err)
	}
	return body, nil
}

func (s *Server) level(w http.ResponseWriter, r *http.Request, domain string) (any, error) {
	var answer api.DomainLevel
	var err error
	if r.Method == http.MethodPut {
		var level *string
		if level, err = admin(s, w, r, decodeLevel); err != nil {
			return nil, err
		}
		answer, err = s.backend.SetDomainLevel(domain, level)
	} else {
		answer, err = s.backend.DomainLevel(domain)
	}
	if err != nil {
		return nil, err
	}
	answer.Schema = api.Schema
	return answer, nil
}

func (s *Server) log(w http.ResponseWriter, r *http.Request, domain string) (any, error) {
	q, follow, err := parseLog(r.URL.RawQuery)
	if err != nil {
		return nil, fail(http.StatusBadRequest, "%w", err)
	}
	if !follow {
		log, err := s.backend.Log(domain, q)
		if err != nil {
			return nil, err
		}
		log.Schema = api.Schema
		if log.Exits == nil {
			log.Exits = []api.LoggedExit{}
		}
		return log, nil
	}
	if r.Method == http.MethodHead {
		return nil, fail(http.StatusBadRequest, "method HEAD cannot follow")
	}
	first := true
	return nil, s.stream(w, func(write func(...any) error) error {
		return s.backend.Follow(r.Context(), domain, q, func(lines []api.LogLine) error {
			if first {
				first = false
				lines[0].Schema = api.Schema
			}
			all := make([]any, len(lines))
			for i := range lines {
				all[i] = &lines[i]
			}
			return write(all...)
		})
	})
}

func (s *Server) collection(w http.ResponseWriter, r *http.Request) (any, error) {
	c, err := admin(s, w, r, decodeCollection)
	if err != nil {
		return nil, err
	}
	status, err := s.backend.SetCollection(c)
	if err != nil {
		return nil, err
	}
	return withSchema(status), nil
}

func withSchema(s api.Status) api.Status {
	s.Schema = api.Schema
	return s
}

// tidy copies the domains with what is selected of them, puts them in order if sort
// is set, and makes lists that are empty lists in JSON too.
func tidy(domains []api.Domain, only selection, sort bool) []api.Domain {
	domains = append([]api.Domain{}, domains...)
	for i := range domains {
		d := &domains[i]
		only.of(d)
		if d.VCPUs == nil {
			d.VCPUs = []api.VCPU{}
		}
		if d.Exits == nil {
			d.Exits = []api.Exit{}
		}
	}
	if sort {
		slices.SortStableFunc(domains, order)
	}
	return domains
}

// order is that by id, then by name; of the runs of one domain, those that go on
// come first, and the latest before the others.
func order(a, b api.Domain) int {
	return cmp.Or(
		byID(a.ID, b.ID),
		cmp.Compare(a.Name, b.Name),
		cmp.Compare(ended(a), ended(b)),
		cmp.Compare(since(b), since(a)),
		cmp.Compare(a.TGID, b.TGID),
	)
}

func ended(d api.Domain) int {
	if d.Running() {
		return 0
	}
	return 1
}

// since is when counting began; it has yet to where nothing was counted.
func since(d api.Domain) int64 {
	if d.Since == nil {
		return math.MaxInt64
	}
	return d.Since.UnixNano()
}

// byID puts those without an id last.
func byID(a, b *int) int {
	switch {
	case a == nil && b == nil:
		return 0
	case a == nil:
		return 1
	case b == nil:
		return -1
	}
	return cmp.Compare(*a, *b)
}
