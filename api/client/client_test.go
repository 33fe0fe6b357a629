// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/test/stranger"
)

func TestConnectError(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale")
	l, err := net.Listen("unix", stale)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	for _, tt := range []struct {
		name, socket, want string
		is                 error
	}{
		{"missing", dir + "/no", "no such file: is the daemon running?", fs.ErrNotExist},
		{"missing directory", dir + "/no/no", "no such file: is the daemon running?", fs.ErrNotExist},
		{"nobody listens", stale, "connection refused: is the daemon running?", syscall.ECONNREFUSED},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := New(tt.socket).Status(t.Context())
			want := fmt.Sprintf("cannot connect to virtexitd at '%s': %s", tt.socket, tt.want)
			if err == nil || err.Error() != want || !errors.Is(err, tt.is) {
				t.Errorf("got  %v\nwant %s", err, want)
			}
		})
	}
	t.Run("permission", func(t *testing.T) {
		group, err := user.LookupGroupId(fmt.Sprint(os.Getgid()))
		if err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
		got := (&ConnectError{stale, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.EACCES)}}).Error()
		want := fmt.Sprintf("cannot connect to virtexitd at '%s': permission denied: it takes root or membership of group '%s'", stale, group.Name)
		if got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	})
	t.Run("permission on a directory", func(t *testing.T) {
		got := (&ConnectError{dir + "/no", fs.ErrPermission}).Error()
		if want := "permission denied: it takes root"; !strings.HasSuffix(got, want) {
			t.Errorf("got %s, want suffix %s", got, want)
		}
	})
}

func TestStrangers(t *testing.T) {
	head := func(status string, n int) string {
		return fmt.Sprintf("HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n", status, n)
	}
	for _, tt := range []struct{ name, answer, want string }{
		{"silent", "", "does not answer within 200ms"},
		{"stops in the header", "HTTP/1.1 200 OK\r\nX", "does not answer within 200ms"},
		{"stops in the body", head("200 OK", 10) + "{", "does not answer within 200ms"},
		{"another protocol", "220 mail ESMTP\r\n", "no answer from virtexitd at"},
		{"web server", head("200 OK", 6) + "<html>", "not an answer of virtexitd: HTTP status 200"},
		{"redirect", "HTTP/1.1 302 Found\r\nLocation: http://example.org/\r\nContent-Length: 0\r\n\r\n", "not an answer of virtexitd: HTTP status 302"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := New(stranger.Answer(t, tt.answer))
			if strings.HasPrefix(tt.want, "does not answer") { // else it is not to be what ends
				c.patience = 200 * time.Millisecond
			}
			_, err := c.Status(t.Context())
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestFollowStrangers(t *testing.T) {
	const head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
	chunk := func(lines string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(lines), lines) }
	const first = `{"schema":"virtexit/v1","domain":"x"}` + "\n"
	const end = "0\r\n\r\n"
	for _, tt := range []struct{ name, answer, want string }{
		{"silent", "", "does not answer within 200ms"},
		{"no line", head, "does not answer within 200ms"},
		{"web server", "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n<html>\n", "bad answer of virtexitd"},
		{"older daemon", "HTTP/1.1 404 Not Found\r\nContent-Length: 62\r\n\r\n" + `{"schema":"virtexit/v1","error":"failed to get domain 'x/log'"}`, "not an answer of virtexitd"},
		{"later schema", head + chunk(`{"schema":"virtexit/v2"}`+"\n"), "client and daemon are of different versions"},
		{"nothing at all", head + end, "virtexitd answers with nothing"},
		{"last words", head + chunk(first+`{"error":"collector gone"}`+"\n"), "collector gone"},
		{"endless line", head + chunk(first+strings.Repeat("x", maxLine+1)), "token too long"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := New(stranger.Answer(t, tt.answer))
			if strings.HasPrefix(tt.want, "does not answer") { // else it is not to be what ends
				c.patience = 200 * time.Millisecond
			}
			err := c.Follow(t.Context(), "x", api.LogQuery{}, func(api.LogLine) error { return nil })
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// A daemon that dies is no end of a log.
func TestFollowCutOff(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		c.Read(make([]byte, 1000))
		first := `{"schema":"virtexit/v1","domain":"x"}` + "\n"
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n9\r\n{\"vcpu\"", len(first), first)
	}()
	err = New(path).Follow(t.Context(), "x", api.LogQuery{}, func(api.LogLine) error { return nil })
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v, want %v", err, io.ErrUnexpectedEOF)
	}
}

// Once it has begun, a log may be silent for long.
func TestFollowIsPatient(t *testing.T) {
	const first = `{"schema":"virtexit/v1","domain":"x"}` + "\n"
	c := New(stranger.Answer(t, fmt.Sprintf("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n", len(first), first)))
	c.patience = time.Second
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if err := c.Follow(ctx, "x", api.LogQuery{}, func(api.LogLine) error { return nil }); err != context.DeadlineExceeded {
		t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
	}
}

func TestCanceled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := New(stranger.Answer(t, "")).Report(ctx, nil, time.Minute); err != context.Canceled {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

func TestDecode(t *testing.T) {
	for _, tt := range []struct {
		name    string
		status  int
		body    string
		want    api.Status
		wantErr string
	}{
		{name: "answer", status: 200, body: `{"schema":"virtexit/v1","level":"time"}`, want: api.Status{Schema: api.Schema, Level: "time"}},
		{name: "fields of a later minor version", status: 200, body: `{"schema":"virtexit/v1","new":[1]}`, want: api.Status{Schema: api.Schema}},
		{name: "other schema", status: 200, body: `{"schema":"virtexit/v2"}`, wantErr: `virtexitd answers with schema "virtexit/v2", expected "virtexit/v1": client and daemon are of different versions`},
		{name: "no schema", status: 200, body: `{}`, wantErr: `virtexitd answers with schema "", expected "virtexit/v1": client and daemon are of different versions`},
		{name: "wrong type", status: 200, body: `{"schema":"virtexit/v1","exits":-1}`, wantErr: "bad answer of virtexitd: json: cannot unmarshal number -1 into Go struct field Status.exits of type uint64"},
		{name: "no JSON", status: 400, body: "400 Bad Request", wantErr: "not an answer of virtexitd: HTTP status 400, invalid character 'B' after top-level value"},
		{name: "cut short", status: 200, body: `{"schema":`, wantErr: "not an answer of virtexitd: HTTP status 200, unexpected end of JSON input"},
		{name: "refusal", status: 403, body: `{"schema":"virtexit/v1","error":"no"}`, wantErr: "no"},
		{name: "refusal without reason", status: 500, body: `{"schema":"virtexit/v1"}`, wantErr: "virtexitd answers with HTTP status 500 and no reason"},
		{name: "not found", status: 404, body: `{"schema":"virtexit/v1","error":"?","domain":"x"}`, wantErr: "failed to get domain 'x'"},
		{name: "empty name not found", status: 404, body: `{"schema":"virtexit/v1","error":"?","domain":""}`, wantErr: "failed to get domain ''"},
		{name: "path not found", status: 404, body: `{"schema":"virtexit/v1","error":"no such path"}`, wantErr: "no such path"},
		{name: "ambiguous", status: 409, body: `{"schema":"virtexit/v1","error":"?","domain":"x"}`, wantErr: "more than one domain is called 'x': use the id, the uuid or the run"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got api.Status
			err := decode(tt.status, strings.NewReader(tt.body), &got)
			if (err == nil) != (tt.wantErr == "") || err != nil && err.Error() != tt.wantErr {
				t.Fatalf("error %v\nwant  %s", err, tt.wantErr)
			}
			if err != nil {
				return
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

func TestEndlessAnswer(t *testing.T) {
	want := fmt.Sprintf("virtexitd's answer is longer than %d bytes", maxAnswer)
	if err := decode(200, endless{}, new(api.Status)); err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(200, `{"schema":"virtexit/v1","domains":[{"id":null,"name":"x","exits":[{"p50_ns":1}]}]}`)
	f.Add(404, `{"schema":"virtexit/v1","error":"x","domain":"y"}`)
	f.Add(409, `{"schema":"virtexit/v1","domain":""}`)
	f.Add(500, `{"schema":"virtexit/v1"}`)
	f.Add(200, `<html>`)
	f.Fuzz(func(t *testing.T, status int, body string) {
		var r api.Report
		err := decode(status, strings.NewReader(body), &r)
		switch {
		case err == nil && (status != http.StatusOK || r.Schema != api.Schema):
			t.Errorf("accepted status %d, schema %q", status, r.Schema)
		case err != nil && err.Error() == "":
			t.Errorf("an error without text: %T", err)
		}
	})
}
