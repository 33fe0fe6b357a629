// SPDX-License-Identifier: Apache-2.0

// Package server answers virtexit's API: HTTP/1.1 with JSON on a unix socket.
//
// Whoever can open the socket can read. Switching collection needs more: see
// Options.
package server

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"virtexit/internal/api"
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
	// SetCollection switches collection; its argument is valid. An empty
	// Level means the configured one.
	SetCollection(api.Collection) (api.Status, error)
}

// Options configure a Server. The zero value is usable.
type Options struct {
	AdminGroup string // name or number; its members, beside root, may switch collection
	MaxClients int    // requests served at once; 0: 64
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
			w.Header().Set("Allow", strings.Join(methods(r.URL.Path), ", "))
		}
		enc.Encode(e) // into memory, of strings: cannot fail
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	// A client that does not read its answer must not hold us.
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(s.writeTimeout))
	w.WriteHeader(status)
	w.Write(body.Bytes()) // the client may be gone: nobody to tell
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
		status    *statusError
	)
	switch {
	case errors.As(err, &notFound):
		e.Domain = &notFound.Domain
		return http.StatusNotFound, e
	case errors.As(err, &ambiguous):
		e.Domain = &ambiguous.Domain
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

const domainPath = "/v1/domains/"

// methods tells what a path can be asked for; nil when there is no such path.
func methods(path string) []string {
	switch {
	case path == "/v1/status", path == "/v1/domains", path == "/v1/report", strings.HasPrefix(path, domainPath):
		return []string{http.MethodGet, http.MethodHead}
	case path == "/v1/collection":
		return []string{http.MethodPut}
	}
	return nil
}

func (s *Server) answer(w http.ResponseWriter, r *http.Request) (any, error) {
	select {
	case s.busy <- struct{}{}:
		defer func() { <-s.busy }()
	default:
		return nil, fail(http.StatusServiceUnavailable, "too many clients: %d requests are under way", s.options.MaxClients)
	}
	allowed := methods(r.URL.Path)
	switch {
	case allowed == nil:
		return nil, fail(http.StatusNotFound, "no such path: %q", r.URL.Path)
	case !slices.Contains(allowed, r.Method):
		return nil, fail(http.StatusMethodNotAllowed, "method %s is not allowed on %s", r.Method, r.URL.Path)
	case r.Method != http.MethodPut && r.ContentLength != 0:
		return nil, fail(http.StatusBadRequest, "method %s takes no body", r.Method)
	}
	if r.URL.Path == "/v1/report" {
		return s.report(w, r)
	}
	if r.URL.RawQuery != "" {
		return nil, fail(http.StatusBadRequest, "%s takes no parameters: %q", r.URL.Path, r.URL.RawQuery)
	}
	switch r.URL.Path {
	case "/v1/status":
		return withSchema(s.backend.Status()), nil
	case "/v1/domains":
		return api.Domains{Schema: api.Schema, Domains: tidy(s.backend.Domains().Domains, true)}, nil
	case "/v1/collection":
		return s.collection(w, r)
	}
	// What follows is the name, whatever it contains: the path is decoded.
	d, err := api.Find(s.backend.Domains().Domains, strings.TrimPrefix(r.URL.Path, domainPath))
	if err != nil {
		return nil, err
	}
	return api.OneDomain{Schema: api.Schema, Domain: tidy([]api.Domain{*d}, false)[0]}, nil
}

func (s *Server) report(w http.ResponseWriter, r *http.Request) (any, error) {
	q, err := parseReport(r.URL.RawQuery)
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
	report.Domains = tidy(report.Domains, len(q.domains) == 0)
	return report, nil
}

func (s *Server) collection(w http.ResponseWriter, r *http.Request) (any, error) {
	if err := s.mayAdmin(r.Context()); err != nil {
		return nil, fail(http.StatusForbidden, "%w", err)
	}
	c, err := decodeCollection(http.MaxBytesReader(w, r.Body, maxBody))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return nil, fail(http.StatusRequestEntityTooLarge, "body is longer than %d bytes", tooLarge.Limit)
	}
	if err != nil {
		return nil, fail(http.StatusBadRequest, "%w", err)
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

// tidy copies the domains, puts them in order if sort is set, and makes lists
// that are empty lists in JSON too.
func tidy(domains []api.Domain, sort bool) []api.Domain {
	domains = append([]api.Domain{}, domains...)
	for i := range domains {
		d := &domains[i]
		if d.VCPUs == nil {
			d.VCPUs = []api.VCPU{}
		}
		if d.Exits == nil {
			d.Exits = []api.Exit{}
		}
	}
	if sort {
		slices.SortStableFunc(domains, func(a, b api.Domain) int {
			return cmp.Or(byID(a.ID, b.ID), cmp.Compare(a.Name, b.Name))
		})
	}
	return domains
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
