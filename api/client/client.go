// SPDX-License-Identifier: Apache-2.0

// Package client asks virtexitd. It is the one client of every front end.
package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/user"
	"strconv"
	"syscall"
	"time"

	"virtexit/api"
)

const (
	// maxAnswer is, in bytes, about ten times a report of 1,000 domains with
	// 8 vCPUs each.
	maxAnswer = 64 << 20
	maxLine   = 64 << 10 // of a log, in bytes: some hundred are usual
	// patience is how long the daemon may take, beyond a report's interval.
	patience = 10 * time.Second
)

// Client asks the daemon behind one socket. Its methods may be called from
// several goroutines at once.
//
// Their errors are *ConnectError when the daemon cannot be reached,
// *api.NotFoundError and *api.AmbiguousError about a domain, *StatusError when
// the daemon refuses otherwise, and the context's when that has ended.
type Client struct {
	socket   string
	http     http.Client
	patience time.Duration
}

// New returns a client; it connects when it is first asked.
func New(socketPath string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		c, err := d.DialContext(ctx, "unix", socketPath)
		if err != nil {
			return nil, &ConnectError{socketPath, err}
		}
		return c, nil
	}
	return &Client{
		socket: socketPath,
		http: http.Client{
			Transport:     &http.Transport{DialContext: dial, DisableCompression: true, DisableKeepAlives: true},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		patience: patience,
	}
}

// ConnectError says that the daemon cannot be reached, and what may help.
type ConnectError struct {
	Socket string
	Err    error
}

func (e *ConnectError) Unwrap() error { return e.Err }

func (e *ConnectError) Error() string {
	why := e.Err.Error()
	switch {
	case errors.Is(e.Err, fs.ErrNotExist):
		why = "no such file: is the daemon running?"
	case errors.Is(e.Err, syscall.ECONNREFUSED):
		why = "connection refused: is the daemon running?"
	case errors.Is(e.Err, fs.ErrPermission):
		why = "permission denied: it takes root"
		if group, err := groupOf(e.Socket); err == nil {
			why += fmt.Sprintf(" or membership of group '%s'", group)
		}
	}
	return fmt.Sprintf("cannot connect to virtexitd at '%s': %s", e.Socket, why)
}

func groupOf(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "", errors.ErrUnsupported
	}
	gid := strconv.FormatUint(uint64(stat.Gid), 10)
	if g, err := user.LookupGroupId(gid); err == nil {
		return g.Name, nil
	}
	return gid, nil
}

// StatusError is the daemon's refusal.
type StatusError struct {
	Status  int // of HTTP
	Message string
}

func (e *StatusError) Error() string { return e.Message }

// Status tells how the daemon is.
func (c *Client) Status(ctx context.Context) (api.Status, error) {
	var a api.Status
	err := c.do(ctx, http.MethodGet, "/v1/status", nil, c.patience, &a)
	return a, err
}

// Domains returns all domains.
func (c *Client) Domains(ctx context.Context) (api.Domains, error) {
	var a api.Domains
	err := c.do(ctx, http.MethodGet, "/v1/domains", nil, c.patience, &a)
	return a, err
}

// Domain returns the domain with this id, uuid, name or run.
func (c *Client) Domain(ctx context.Context, domain string) (api.OneDomain, error) {
	var a api.OneDomain
	err := c.do(ctx, http.MethodGet, domainPath(domain, ""), nil, c.patience, &a)
	return a, err
}

// Report returns what the domains, by id, uuid, name or run, do during an
// interval from now on, or their totals when interval is 0. Without names it
// is about all running domains.
func (c *Client) Report(ctx context.Context, domains []string, interval time.Duration) (api.Report, error) {
	q := url.Values{"domain": domains}
	if interval == 0 {
		q.Set("total", "1")
	} else {
		q.Set("interval", interval.String())
	}
	var a api.Report
	err := c.do(ctx, http.MethodGet, "/v1/report?"+q.Encode(), nil, interval+c.patience, &a)
	return a, err
}

// Watch hands to each what the domains do in one interval after the other: no exit
// is in two of them, and none between two. Without names it is about all that run,
// or did. It ends when each fails, with its error, or when the daemon does.
func (c *Client) Watch(ctx context.Context, domains []string, interval time.Duration, each func(api.Report) error) error {
	q := url.Values{"domain": domains, "interval": {interval.String()}}
	type line struct {
		api.Report
		Error string `json:"error"`
	}
	patience := interval + c.patience
	return stream(ctx, c, "/v1/watch?"+q.Encode(), maxAnswer, patience, patience, func(l line) error {
		if l.Error != "" {
			return &StatusError{http.StatusOK, l.Error}
		}
		return each(l.Report)
	})
}

// stream hands the lines of an answer, each of at most size bytes, to each, as long
// as that returns nil. The first may take as long as patience says, each of those
// after it as long as pause does; 0: for ever.
func stream[T any](ctx context.Context, c *Client, path string, size int, patience, pause time.Duration, each func(T) error) error {
	limited, cancel := context.WithCancel(ctx)
	defer cancel()
	impatient := time.AfterFunc(patience, cancel)
	defer impatient.Stop()
	req, err := http.NewRequestWithContext(limited, http.MethodGet, "http://virtexitd"+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.explain(ctx, limited, patience, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return c.explain(ctx, limited, patience, decode(resp.StatusCode, resp.Body, nil))
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, size)
	first := true
	for ; lines.Scan(); first = false {
		if first {
			var head struct {
				Schema string `json:"schema"`
			}
			if err := json.Unmarshal(lines.Bytes(), &head); err == nil && head.Schema != api.Schema {
				return schemaError(head.Schema)
			}
		}
		var line T
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			if lines.Err() != nil {
				break // the line has not come to its end
			}
			return fmt.Errorf("bad answer of virtexitd: %w", err)
		}
		impatient.Stop() // each may take its time
		if err := each(line); err != nil {
			return err
		}
		if pause > 0 {
			impatient.Reset(pause)
		}
	}
	if err := lines.Err(); err != nil {
		return c.explain(ctx, limited, patience, fmt.Errorf("read virtexitd's answer: %w", err))
	}
	if first {
		return errors.New("virtexitd answers with nothing")
	}
	return nil
}

// SetCollection switches collection and tells how the daemon is after that.
func (c *Client) SetCollection(ctx context.Context, collection api.Collection) (api.Status, error) {
	body, err := json.Marshal(collection)
	if err != nil {
		return api.Status{}, err
	}
	var a api.Status
	err = c.do(ctx, http.MethodPut, "/v1/collection", body, c.patience, &a)
	return a, err
}

// DomainLevel tells the level of a running domain.
func (c *Client) DomainLevel(ctx context.Context, domain string) (api.DomainLevel, error) {
	var a api.DomainLevel
	err := c.do(ctx, http.MethodGet, domainPath(domain, "/level"), nil, c.patience, &a)
	return a, err
}

// SetDomainLevel sets it; nil is the default, that of all domains.
func (c *Client) SetDomainLevel(ctx context.Context, domain string, level *string) (api.DomainLevel, error) {
	body, err := json.Marshal(api.DomainLevel{Level: level})
	if err != nil {
		return api.DomainLevel{}, err
	}
	var a api.DomainLevel
	err = c.do(ctx, http.MethodPut, domainPath(domain, "/level"), body, c.patience, &a)
	return a, err
}

// Log returns the latest exits of a running domain.
func (c *Client) Log(ctx context.Context, domain string, q api.LogQuery) (api.Log, error) {
	var a api.Log
	err := c.do(ctx, http.MethodGet, logPath(domain, q, false), nil, c.patience, &a)
	return a, err
}

func domainPath(domain, resource string) string {
	return "/v1/domains/" + url.PathEscape(domain) + resource
}

func logPath(domain string, q api.LogQuery, follow bool) string {
	v := url.Values{}
	if follow {
		v.Set("follow", "1")
	}
	if q.VCPU != nil {
		v.Set("vcpu", strconv.Itoa(*q.VCPU))
	}
	if q.Reason != "" {
		v.Set("reason", q.Reason)
	}
	if q.Limit != 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	return domainPath(domain, "/log") + "?" + v.Encode()
}

// Follow hands the exits of a running domain to each as they come, line by line
// as api.LogLine tells. It returns nil when the domain has ended, and what a last
// line says as an error.
func (c *Client) Follow(ctx context.Context, domain string, q api.LogQuery, each func(api.LogLine) error) error {
	// Nothing may happen for as long as it likes, once it has begun.
	return stream(ctx, c, logPath(domain, q, true), maxLine, c.patience, 0, func(l api.LogLine) error {
		if l.Error != "" {
			return &StatusError{http.StatusOK, l.Error}
		}
		return each(l)
	})
}

func (c *Client) do(ctx context.Context, method, path string, body []byte, patience time.Duration, answer any) error {
	limited, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	req, err := http.NewRequestWithContext(limited, method, "http://virtexitd"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err == nil {
		defer resp.Body.Close()
		err = decode(resp.StatusCode, resp.Body, answer)
	}
	return c.explain(ctx, limited, patience, err)
}

// explain turns an error of a request into the client's. limited is ctx with an
// end when patience is.
func (c *Client) explain(ctx, limited context.Context, patience time.Duration, err error) error {
	var transport *url.Error
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case limited.Err() != nil:
		return fmt.Errorf("virtexitd at '%s' does not answer within %v: %w", c.socket, patience, limited.Err())
	case !errors.As(err, &transport):
		return err
	}
	var connect *ConnectError
	if errors.As(err, &connect) {
		return connect
	}
	return fmt.Errorf("no answer from virtexitd at '%s': %w", c.socket, transport.Err)
}

func schemaError(got string) error {
	return fmt.Errorf("virtexitd answers with schema %q, expected %q: client and daemon are of different versions", got, api.Schema)
}

// decode reads the body of an answer with an HTTP status.
func decode(status int, r io.Reader, answer any) error {
	body, err := io.ReadAll(io.LimitReader(r, maxAnswer+1))
	if err != nil {
		return fmt.Errorf("read virtexitd's answer: %w", err)
	}
	if len(body) > maxAnswer {
		return fmt.Errorf("virtexitd's answer is longer than %d bytes", maxAnswer)
	}
	// Ours begins so. Another has to be parsed for what is wrong with it, but
	// megabytes need not be parsed twice.
	if status != http.StatusOK || !bytes.HasPrefix(body, []byte(`{"schema":"`+api.Schema+`",`)) {
		var head struct {
			Schema string `json:"schema"`
		}
		if err := json.Unmarshal(body, &head); err != nil {
			return fmt.Errorf("not an answer of virtexitd: HTTP status %d, %w", status, err)
		}
		if head.Schema != api.Schema {
			return schemaError(head.Schema)
		}
	}
	if status == http.StatusOK {
		if err := json.Unmarshal(body, answer); err != nil {
			return fmt.Errorf("bad answer of virtexitd: %w", err)
		}
		return nil
	}
	var e api.Error
	if err := json.Unmarshal(body, &e); err != nil {
		return fmt.Errorf("bad answer of virtexitd: HTTP status %d, %w", status, err)
	}
	switch {
	case e.Domain != nil && status == http.StatusNotFound:
		return &api.NotFoundError{Domain: *e.Domain}
	case e.Domain != nil && status == http.StatusConflict:
		return &api.AmbiguousError{Domain: *e.Domain}
	case e.Message == "":
		e.Message = fmt.Sprintf("virtexitd answers with HTTP status %d and no reason", status)
	}
	return &StatusError{status, e.Message}
}
