// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtexit/api"
	"virtexit/internal/report"
)

// watching has domains of which each is first by some key.
func watching() *fakeBackend {
	b := newBackend()
	b.pace = 100 * time.Millisecond
	for i, d := range []struct {
		name string
		rate float64
		time api.Times
	}{
		{"cherry", 9000, api.Times{GuestNS: 7e8, KVMNS: 3e8}},
		{"apple", 100, api.Times{HaltedNS: 9e8, WaitNS: 1e8}},
		{"banana", 0, api.Times{HaltedNS: 1e9}},
	} {
		domain := running(10-i, d.name, "")
		domain.Since, domain.WallNS, domain.SpanNS = ptr(time.Unix(1e9, 0)), 1e9, 1e9
		domain.Rate, domain.Time, domain.TimePct = d.rate, d.time, d.time.Pct()
		b.domains = append(b.domains, domain)
	}
	b.domains = b.domains[len(b.domains)-3:]
	return b
}

// order is that of the domains on the screen.
func order(s *screen) string {
	var names []string
	for _, line := range s.lines {
		for _, name := range []string{"apple", "banana", "cherry"} {
			if strings.Contains(line, name) {
				names = append(names, name[:1])
			}
		}
	}
	return strings.Join(names, "")
}

func ended(t *testing.T, cmd *exec.Cmd, code int) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("it does not end")
	}
	if got := cmd.ProcessState.ExitCode(); got != code {
		t.Errorf("%v, want exit code %d", cmd.ProcessState, code)
	}
}

func TestScreen(t *testing.T) {
	onPath(t)
	t.Setenv("VIRTEXIT_SOCKET", serve(t, watching()))
	t.Setenv("TERM", "vt100")
	p := newPTY(t, 80, 24)
	p.write("x")
	before := p.state()
	cmd := p.start("virtexit", "watch")
	s := p.shows("3 domains, 9100 exits/s, by exits")
	if !s.other || s.cursor || p.state() == before {
		t.Errorf("it does not have the terminal for itself")
	}
	if len(s.lines) != 24 || s.lines[23] != shortcutHelp {
		t.Errorf("no keys in the last line:\n%s", s)
	}
	for _, tt := range []struct{ key, by, order string }{
		{"n", "by name ", "abc"},
		{"r", "by name, reversed ", "cba"},
		{"i", "by id ", "bac"},
		{"e", "by exits ", "cab"},
		{"g", "by guest ", "cab"},
		{"k", "by kvm ", "cab"},
		{"d", "by idle ", "bac"},
		{"w", "by wait ", "abc"},
		{"u", "by user ", "abc"},
		{"\x1b[A?\x00é\x0c", "by user ", "abc"}, // an arrow, and what is no key
	} {
		p.write(tt.key)
		s := p.until(tt.by, func(s *screen) bool { return strings.Contains(s.lines[0]+" ", tt.by) })
		if got := order(s); got != tt.order {
			t.Errorf("key %q: order %s, want %s", tt.key, got, tt.order)
		}
		if err := s.fits(80, 24); err != nil {
			t.Error(err)
		}
	}
	for _, size := range [][2]uint16{{60, 10}, {30, 7}, {10, 3}, {1, 1}, {200, 50}} {
		p.resize(size[0], size[1])
		p.until("a smaller screen", func(s *screen) bool { return len(s.lines) == int(size[1]) && s.fits(int(size[0]), int(size[1])) == nil })
	}
	p.resize(80, 7)
	p.shows(" (2 more)")
	p.write("q")
	ended(t, cmd, 0)
	given(t, p, before)
}

// given tells whether the terminal was given back.
func given(t *testing.T, p *pty, before unix.Termios) {
	t.Helper()
	p.until("the first screen", func(s *screen) bool { return !s.other && s.cursor })
	if p.state() != before {
		t.Error("the terminal's settings are not as before")
	}
}

// However it ends, the terminal is as it was.
func TestScreenEnds(t *testing.T) {
	// What nohup has us ignore, those that we start would.
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT)
	defer signal.Stop(caught)
	onPath(t)
	t.Setenv("TERM", "xterm")
	for _, tt := range []struct {
		name string
		args []string
		end  func(p *pty, cmd *exec.Cmd)
		code int
		says string
	}{
		{name: "Ctrl-C", end: func(p *pty, _ *exec.Cmd) { p.write("\x03") }},
		{name: "iterations", args: []string{"-n", "3"}},
		{name: "SIGINT", end: func(_ *pty, cmd *exec.Cmd) { cmd.Process.Signal(unix.SIGINT) }, code: exitInterrupted},
		{name: "SIGTERM", end: func(_ *pty, cmd *exec.Cmd) { cmd.Process.Signal(unix.SIGTERM) }, code: exitInterrupted},
		{name: "SIGHUP", end: func(_ *pty, cmd *exec.Cmd) { cmd.Process.Signal(unix.SIGHUP) }, code: exitInterrupted},
		{name: "SIGQUIT", end: func(_ *pty, cmd *exec.Cmd) { cmd.Process.Signal(unix.SIGQUIT) }, code: 2, says: "goroutine 1"},
		{name: "error", args: []string{"nobody"}, code: 1, says: "error: failed to get domain 'nobody'"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("VIRTEXIT_SOCKET", serve(t, watching()))
			p := newPTY(t, 80, 24)
			before := p.state()
			cmd := p.start("virtexit", append([]string{"watch"}, tt.args...)...)
			if tt.end != nil {
				p.shows("9100 exits/s")
				tt.end(p, cmd)
			}
			ended(t, cmd, tt.code)
			given(t, p, before)
			if tt.says != "" {
				p.shows(tt.says)
			}
		})
	}
}

// Ctrl-Z gives the terminal to the shell, fg takes it again.
func TestScreenSuspended(t *testing.T) {
	onPath(t)
	t.Setenv("TERM", "dumb") // no escapes of bash's own
	t.Setenv("PS1", "ready> ")
	t.Setenv("VIRTEXIT_SOCKET", serve(t, watching()))
	p := newPTY(t, 80, 24)
	// A shell with job control, as the kernel stops nobody without one.
	cmd := p.start("bash", "--norc", "--noprofile", "-i")
	p.shows("ready> ")
	p.write("TERM=xterm virtexit watch\r")
	p.shows("9100 exits/s")
	during := p.state()
	p.write("\x1a")
	p.until("the shell", func(s *screen) bool { return !s.other && s.cursor && strings.Contains(s.String(), "Stopped") })
	p.write("fg\r")
	p.until("it again", func(s *screen) bool { return s.other && strings.Contains(s.String(), "9100 exits/s") })
	if p.state() != during {
		t.Error("the terminal's settings are not as before")
	}
	p.write("q")
	p.until("the shell", func(s *screen) bool { return !s.other && s.cursor && strings.HasSuffix(p.raw(), "ready> ") })
	p.write("exit\r")
	ended(t, cmd, 0)
}

// When the daemon goes, a line says so, and what it told last stays.
func TestScreenReconnects(t *testing.T) {
	onPath(t)
	t.Setenv("TERM", "xterm")
	path := filepath.Join(t.TempDir(), "sock")
	t.Setenv("VIRTEXIT_SOCKET", path)
	stop := serveAt(t, watching(), path)
	p := newPTY(t, 80, 24)
	cmd := p.start("virtexit", "watch")
	p.shows("9100 exits/s")
	stop()
	if s := p.shows("; trying again"); !strings.Contains(s.String(), "9100 exits/s") {
		t.Errorf("what it told is gone:\n%s", s)
	}
	off := watching()
	off.domains[0].Rate, off.status.Level = 77, "off"
	serveAt(t, off, path)
	p.shows("177 exits/s")
	p.shows("collection is off")
	p.write("q")
	ended(t, cmd, 0)
}

// Without a terminal to read from there are no keys.
func TestScreenWithoutKeys(t *testing.T) {
	onPath(t)
	t.Setenv("TERM", "xterm")
	t.Setenv("VIRTEXIT_SOCKET", serve(t, watching()))
	p := newPTY(t, 80, 24)
	before := p.state()
	cmd := p.start("sh", "-c", "virtexit watch -n 3 </dev/null")
	p.shows("9100 exits/s")
	ended(t, cmd, 0)
	given(t, p, before)
}

// Where the screen cannot be used lists follow one another.
func TestBatch(t *testing.T) {
	onPath(t)
	t.Setenv("VIRTEXIT_SOCKET", serve(t, watching()))
	for _, tt := range []struct{ name, term, args string }{
		{"asked for", "xterm", "-b"},
		{"dumb terminal", "dumb", ""},
		{"CSV", "xterm", "--format=csv"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("TERM", tt.term)
			p := newPTY(t, 80, 24)
			cmd := p.start("virtexit", strings.Fields("watch -n 2 "+tt.args)...)
			ended(t, cmd, 0)
			p.until("two lists", func(s *screen) bool { return strings.Count(s.String(), "cherry") == 2 })
			if strings.Contains(p.raw(), "\x1b") {
				t.Errorf("escapes: %q", p.raw())
			}
		})
	}
}

func TestBatchReconnects(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	stop := serveAt(t, watching(), path)
	ctx, cancel := context.WithCancel(t.Context())
	first, third := make(chan bool), make(chan bool)
	n := 0
	out := hook(func() {
		switch n++; n {
		case 1:
			close(first)
		case 3:
			close(third)
		}
	})
	var stderr bytes.Buffer
	code := make(chan int)
	go func() {
		code <- run(ctx, []string{"--socket", path, "watch", "--batch", "--format", "json"}, out, &stderr)
	}()
	<-first
	stop()
	serveAt(t, watching(), path)
	<-third
	cancel()
	if got := <-code; got != exitInterrupted {
		t.Errorf("exit code %d", got)
	}
	if !strings.Contains(stderr.String(), "; trying again\n") || !strings.HasSuffix(stderr.String(), "virtexitd is back\n") {
		t.Errorf("stderr:\n%s", &stderr)
	}
}

func TestWidth(t *testing.T) {
	onPath(t)
	b := watching()
	long := strings.Repeat("long-", 30)
	b.domains[0].Name = long
	t.Setenv("VIRTEXIT_SOCKET", serve(t, b))
	for _, tt := range []struct {
		name          string
		columns       string
		width, height uint16
		want          int // 0: all
	}{
		{"terminal", "", 100, 24, 100},
		{"terminal's own", "60", 100, 24, 100},
		{"terminal that does not know", "", 0, 0, 80},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("COLUMNS", tt.columns)
			p := newPTY(t, tt.width, tt.height)
			ended(t, p.start("virtexit", "list"), 0)
			s := p.shows("----")
			if err := s.fits(tt.want, 24); err != nil || strings.Contains(s.String(), long) {
				t.Errorf("%v\n%s", err, s)
			}
		})
	}
	for columns, cut := range map[string]bool{"": false, "60": true, "0": false, "-1": false, "x": false} {
		t.Setenv("COLUMNS", columns)
		out, err := exec.Command("virtexit", "list").Output()
		if got := !strings.Contains(string(out), long); err != nil || got != cut {
			t.Errorf("COLUMNS=%s, to a pipe: cut %v, %v", columns, got, err)
		}
	}
}

func TestFrame(t *testing.T) {
	if lines := frame(nil, "a\nb\x1b[31m", report.WatchOptions{}, 20, 5); len(lines) != 5 || lines[3] != `a\nb\x1b[31m` {
		t.Errorf("%q", lines)
	}
}

func TestRecordErrors(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	other := write("other", "important\n")
	socket := serve(t, watching())
	for _, tt := range []struct{ name, file, want string }{
		{"no folder", dir + "/no/file", "no such file or directory"},
		{"folder", dir, "is a directory"},
		{"something else", other, "it is there and holds something else than reports of virtexit"},
		{"full disk", "/dev/full", "no space left on device"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			code := run(t.Context(), []string{"--socket", socket, "record", tt.file, "-n", "1"}, &stdout, &stderr)
			if code != 1 || !strings.HasPrefix(stderr.String(), "error: ") || !strings.Contains(stderr.String(), tt.want) {
				t.Errorf("exit code %d, %s", code, &stderr)
			}
		})
	}
	if b, _ := os.ReadFile(other); string(b) != "important\n" {
		t.Errorf("the file is now %q", b)
	}
}

func lines(t *testing.T, path string) []string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(string(b), "\n")
}

// A file is added to, also one whose last line is torn, by one process at a time,
// and is whole when it is ended.
func TestRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	socket := serve(t, watching())
	record := func(ctx context.Context, args ...string) (int, string) {
		var stdout, stderr bytes.Buffer
		code := run(ctx, append([]string{"--socket", socket, "record", path}, args...), &stdout, &stderr)
		return code, stderr.String()
	}
	if code, stderr := record(t.Context(), "-n", "2"); code != 0 || stderr != "2 reports recorded\n" {
		t.Fatalf("exit code %d, %s", code, stderr)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	whole := lines(t, path)
	if len(whole) != 3 || whole[2] != "" {
		t.Fatalf("lines %q", whole)
	}
	if err := os.Truncate(path, int64(len(whole[0])+1+len(whole[1])/2)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan int)
	go func() {
		code, _ := record(ctx, "apple")
		ended <- code
	}()
	for len(lines(t, path)) < 5 {
		time.Sleep(time.Millisecond)
	}
	if code, stderr := record(t.Context(), "-n", "1"); code != 1 || !strings.Contains(stderr, "another virtexit records in it") {
		t.Errorf("a second one: exit code %d, %s", code, stderr)
	}
	cancel()
	if code := <-ended; code != 0 {
		t.Errorf("exit code %d", code)
	}
	got := lines(t, path)
	if got[0] != whole[0] || got[1] != whole[1][:len(whole[1])/2] || got[len(got)-1] != "" {
		t.Errorf("lines %q", got)
	}
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"replay", path, "--format", "csv"}, &stdout, &stderr); code != 0 ||
		!strings.Contains(stderr.String(), "left out 1 line that cannot be read as a report; the first is line 2: unexpected end of JSON input") {
		t.Errorf("exit code %d, %s", code, &stderr)
	}
}

type shortWrite struct{ file *os.File }

func (w shortWrite) Write(b []byte) (int, error) {
	n, _ := w.file.Write(b[:len(b)/2])
	return n, errors.New("no space left")
}

// When the disk is full no half of a line is left.
func TestRecordFull(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	r, err := (&app{}).recording(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	if err := r.append(api.Report{Schema: api.Schema}); err != nil {
		t.Fatal(err)
	}
	before := lines(t, path)
	r.Writer = shortWrite{r.file}
	if err := r.append(api.Report{Schema: api.Schema}); err == nil || err.Error() != "no space left" {
		t.Errorf("error %v", err)
	}
	if after := lines(t, path); !slices.Equal(after, before) {
		t.Errorf("lines %q", after)
	}
}
