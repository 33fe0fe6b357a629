// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mattn/go-runewidth"
	"golang.org/x/sys/unix"
)

// pty is a terminal that the test looks at and types into.
type pty struct {
	t    *testing.T
	main *os.File // the test's end
	tty  *os.File // the program's

	mu     sync.Mutex
	output bytes.Buffer
	screen screen // of what shown has seen
	seen   int
}

func newPTY(t *testing.T, columns, lines uint16) *pty {
	t.Helper()
	main, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { main.Close() })
	conn, err := main.SyscallConn() // Fd would make it block
	if err != nil {
		t.Fatal(err)
	}
	p := &pty{t: t, main: main, screen: screen{cursor: true, lines: []string{""}}}
	var number uint32
	conn.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
			number, err = unix.IoctlGetUint32(int(fd), unix.TIOCGPTN)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if p.tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.tty.Close() })
	p.resize(columns, lines)
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := main.Read(buf)
			p.mu.Lock()
			p.output.Write(buf[:n])
			p.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return p
}

func (p *pty) resize(columns, lines uint16) {
	p.t.Helper()
	if err := unix.IoctlSetWinsize(int(p.tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: lines}); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pty) write(s string) {
	p.t.Helper()
	if _, err := io.WriteString(p.main, s); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pty) raw() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.output.String()
}

// show is what is on the screen.
func (p *pty) show() *screen {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.screen.write(string(p.output.Bytes()[p.seen:]))
	p.seen = p.output.Len()
	s := p.screen
	s.lines = slices.Clone(s.lines)
	return &s
}

// state is what stty would show.
func (p *pty) state() unix.Termios {
	p.t.Helper()
	state, err := unix.IoctlGetTermios(int(p.tty.Fd()), unix.TCGETS)
	if err != nil {
		p.t.Fatal(err)
	}
	return *state
}

// until waits for what the terminal shows, and returns it.
func (p *pty) until(what string, is func(*screen) bool) *screen {
	p.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		s := p.show()
		if s.err != nil {
			p.t.Fatal(s.err)
		}
		if is(s) {
			return s
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("waiting for %s, the terminal shows\n%s", what, s)
		}
	}
}

func (p *pty) shows(text string) *screen {
	p.t.Helper()
	return p.until(text, func(s *screen) bool { return strings.Contains(s.String(), text) })
}

// says waits for what is written to the terminal, in whatever way.
func (p *pty) says(text string) {
	p.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(p.raw(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("waiting for %q: %q", text, p.raw())
		}
	}
}

// start runs virtexit, or what else is on the PATH, on the terminal.
func (p *pty) start(name string, args ...string) *exec.Cmd {
	p.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = p.tty, p.tty, p.tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { cmd.Process.Kill() })
	return cmd
}

// screen is what a terminal shows of what was written to it. It knows what watch
// writes, and nothing else.
type screen struct {
	lines  []string
	row    int
	other  bool // screen
	cursor bool
	before []string // of the first screen
	rest   string   // of a sequence
	err    error
}

var sequence = regexp.MustCompile(`^\x1b\[(\?25[hl]|\?1049[hl]|H|2J|2K)`)

// write shows more.
func (s *screen) write(more string) {
	output := s.rest + more
	s.rest = ""
	for output != "" && s.err == nil {
		if m := sequence.FindStringSubmatch(output); m != nil {
			output = output[len(m[0]):]
			switch m[1] {
			case "?25h", "?25l":
				s.cursor = m[1] == "?25h"
			case "?1049h":
				if !s.other {
					s.before, s.lines, s.other = s.lines, []string{""}, true
				}
			case "?1049l":
				if s.other {
					s.lines, s.other = s.before, false
				}
				s.row = len(s.lines) - 1
			case "H":
				s.row = 0
			case "2J":
				s.lines, s.row = []string{""}, 0
			case "2K":
				s.lines[s.row] = ""
			}
			continue
		}
		n := strings.IndexAny(output, "\x1b\r\n")
		switch {
		case n < 0:
			n = len(output)
			s.lines[s.row] += output
		case n > 0:
			s.lines[s.row] += output[:n]
		case output[0] == '\x1b' && len(output) < 8: // more is to come
			s.rest = output
			return
		case output[0] == '\x1b':
			s.err = fmt.Errorf("unknown sequence %.10q", output)
		case output[0] == '\n':
			if s.row++; s.row == len(s.lines) {
				s.lines = append(s.lines, "")
			}
		}
		output = output[max(n, 1):]
	}
}

func (s *screen) String() string { return strings.Join(s.lines, "\n") }

// fits tells whether nothing is beyond the edges.
func (s *screen) fits(columns, lines int) error {
	if len(s.lines) > lines {
		return fmt.Errorf("%d lines on %d", len(s.lines), lines)
	}
	for _, line := range s.lines {
		if n := runewidth.StringWidth(line); n > columns {
			return fmt.Errorf("%d columns on %d: %s", n, columns, line)
		}
	}
	return nil
}

// onPath puts virtexit on the PATH: this program, see TestMain.
func onPath(t *testing.T) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	if err := os.Symlink(self, filepath.Join(bin, "virtexit")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
}

// What a goroutine panics with can be read on the terminal.
func TestPanic(t *testing.T) {
	p := newPTY(t, 80, 24)
	before := p.state()
	term := newTerminal(p.tty, p.tty)
	if err := term.enter(); err != nil {
		t.Fatal(err)
	}
	if p.state() == before {
		t.Error("the terminal is as before")
	}
	func() {
		defer func() {
			if got := recover(); got != "oops" {
				t.Errorf("panic with %v", got)
			}
		}()
		defer term.guard()
		panic("oops")
	}()
	if p.state() != before {
		t.Error("the terminal is not as before")
	}
	p.until("the first screen", func(s *screen) bool { return !s.other && s.cursor && strings.Contains(p.raw(), firstScreen) })
}
