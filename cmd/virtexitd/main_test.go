// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"virtexit/api/client"
)

func TestUsage(t *testing.T) {
	used, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer used.Close()
	unused := filepath.Join(t.TempDir(), "sock")
	for _, tc := range []struct {
		name           string
		args           []string
		want           int
		stdout, stderr string
	}{
		{"help", []string{"--help"}, 0, "--socket PATH", ""},
		{"version", []string{"--version"}, 0, "virtexitd dev\n", ""},
		{"unknown flag", []string{"--colour"}, 2, "", "error: unknown flag: --colour\n"},
		{"argument", []string{"start"}, 2, "", `error: unexpected argument "start"` + "\n"},
		{"missing file", []string{"--config", "/nonexistent/x.yaml"}, 2, "", "error: open /nonexistent/x.yaml: no such file or directory\n"},
		{"bad value", []string{"--config", os.DevNull, "--log-level", "x"}, 2, "", `error: --log-level: log_level: "x" is not valid`},
		{"unknown web config", []string{"--config", write(t, "metrics_listen: localhost:0\nmetrics_web_config: /nonexistent/web.yml\ngroup: ''"), "--socket", unused}, 1, "", "error: metrics_web_config: /nonexistent/web.yml: open /nonexistent/web.yml: no such file"},
		{"port in use", []string{"--config", write(t, "metrics_listen: "+used.Addr().String()+"\ngroup: ''"), "--socket", unused}, 1, "", "error: metrics_listen: listen tcp " + used.Addr().String() + ": bind: address already in use\n"},
		{"socket is a file", []string{"--config", os.DevNull, "--socket", os.DevNull}, 1, "", "error: socket " + os.DevNull},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if got := run(ctx, tc.args, &stdout, &stderr); got != tc.want {
				t.Errorf("status %d, want %d", got, tc.want)
			}
			if !strings.Contains(stdout.String(), tc.stdout) || !strings.Contains(stderr.String(), tc.stderr) {
				t.Errorf("stdout %q\nstderr %q", &stdout, &stderr)
			}
		})
	}
}

// freePort is an address that nobody listened at a moment ago.
func freePort(t *testing.T) string {
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// The daemon as systemd runs it: it says when it is ready, answers without a
// module and without libvirt, says that it stops, and leaves no socket behind.
func TestService(t *testing.T) {
	dir := t.TempDir()
	notified, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notified.Close()
	notified.SetReadDeadline(time.Now().Add(30 * time.Second))
	t.Setenv("NOTIFY_SOCKET", notified.LocalAddr().String())
	t.Setenv("WATCHDOG_USEC", "300000")
	expect := func(want string) {
		t.Helper()
		message := make([]byte, 100)
		for {
			n, err := notified.Read(message)
			if err != nil {
				t.Fatalf("waiting for %s: %v", want, err)
			}
			if string(message[:n]) == want {
				return
			}
		}
	}
	socket := filepath.Join(dir, "virtexit.sock")
	port := freePort(t)
	t.Setenv("VIRTEXIT_METRICS_LISTEN", port)
	t.Setenv("VIRTEXIT_SOCKET", socket)
	t.Setenv("VIRTEXIT_GROUP", "no-such-group")
	t.Setenv("VIRTEXIT_COLLECTOR", "replay:"+filepath.Join(dir, "none"))
	t.Setenv("VIRTEXIT_LIBVIRT_URI", "test:///nonexistent")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var stderr bytes.Buffer
	status := make(chan int)
	go func() { status <- run(ctx, []string{"--config", os.DevNull}, os.Stdout, &stderr) }()
	expect("READY=1")
	info, err := os.Stat(socket)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o660 {
		t.Errorf("socket has mode %v", info.Mode())
	}
	s, err := client.New(socket).Status(ctx)
	for i := 0; i < 1000 && err == nil && s.Problem == "starting"; i++ {
		time.Sleep(10 * time.Millisecond)
		s, err = client.New(socket).Status(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	if s.Collector != nil || !strings.Contains(s.Problem, "none: no such file") {
		t.Errorf("status %+v", s)
	}
	for from, c := range map[string]*http.Client{
		port: http.DefaultClient,
		"x": {Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}},
	} {
		answer, err := c.Get("http://" + from + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if err != nil || !strings.Contains(string(body), "\nvirtexit_up 0\n") || !strings.Contains(string(body), "\nprocess_resident_memory_bytes ") {
			t.Errorf("metrics from %s: %v, %s", from, err, body)
		}
	}
	expect("WATCHDOG=1")
	stop()
	expect("STOPPING=1")
	if got := <-status; got != 0 {
		t.Errorf("status %d", got)
	}
	if !strings.Contains(stderr.String(), "group=no-such-group") {
		t.Errorf("nothing was said about the group:\n%s", &stderr)
	}
	if !strings.Contains(stderr.String(), "metrics_web_config is empty") {
		t.Errorf("nothing was said about who can read:\n%s", &stderr)
	}
	if _, err := os.Lstat(socket); !os.IsNotExist(err) {
		t.Errorf("socket: %v", err)
	}
}
