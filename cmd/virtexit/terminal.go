// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/term"
)

// terminal returns stdout when that is a terminal, else nil.
func (a *app) terminal() *os.File {
	if f, ok := a.stdout.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return f
	}
	return nil
}

// width is that of the lines of stdout: the terminal's; elsewhere what COLUMNS
// says, or 0: without limit, so that a program or a file gets whole names.
func (a *app) width() int {
	columns := 0
	if n, err := strconv.Atoi(os.Getenv("COLUMNS")); err == nil && n > 0 {
		columns = n
	}
	if f := a.terminal(); f != nil {
		columns, _ = size(f)
	}
	return columns
}

// size is 80 by 24 for a terminal that does not know, as on a serial line.
func size(f *os.File) (columns, lines int) {
	columns, lines, err := term.GetSize(int(f.Fd()))
	if err != nil || columns <= 0 || lines <= 0 {
		return 80, 24
	}
	return columns, lines
}

// terminal is one that is drawn on. leave gives it back as it was.
type terminal struct {
	in, out *os.File
	mu      sync.Mutex
	within  bool
	before  *term.State // of in; nil when that is no terminal
}

func newTerminal(in, out *os.File) *terminal { return &terminal{in: in, out: out} }

// The control sequences of every terminal since the VT100; the other screen is
// xterm's.
const (
	otherScreen = "\x1b[?1049h\x1b[?25l\x1b[2J" // without a cursor, cleared
	firstScreen = "\x1b[?25h\x1b[?1049l"        // and the cursor
	home        = "\x1b[H"
	clearLine   = "\x1b[2K"
)

// enter takes the terminal, or takes it again.
func (t *terminal) enter() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if fd := int(t.in.Fd()); term.IsTerminal(fd) {
		before, err := term.MakeRaw(fd)
		if err != nil {
			return err
		}
		if !t.within {
			t.before = before
		}
	}
	t.within = true
	_, err := t.out.WriteString(otherScreen)
	return err
}

func (t *terminal) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.within {
		return
	}
	t.within = false
	t.out.WriteString(firstScreen) // if it is gone there is nothing to give back
	if t.before != nil {
		term.Restore(int(t.in.Fd()), t.before)
	}
}

// guard is deferred by goroutines: what they panic with is to be read.
func (t *terminal) guard() {
	if p := recover(); p != nil {
		t.leave()
		panic(p)
	}
}

// keys gives the keys that are pressed, without those that send a sequence, and
// ends with the terminal. Where in is no terminal there are none.
func (t *terminal) keys() <-chan byte {
	if t.before == nil {
		return nil
	}
	keys := make(chan byte)
	go func() {
		defer t.guard()
		defer close(keys)
		buf := make([]byte, 64)
		for {
			n, err := t.in.Read(buf)
			if err != nil || n == 0 {
				return
			}
			if buf[0] == '\x1b' {
				continue
			}
			for _, key := range buf[:n] {
				keys <- key
			}
		}
	}()
	return keys
}

// ctrl is what a terminal sends for a letter with Ctrl.
func ctrl(letter byte) byte { return letter & 0x1f }

// draw shows lines that fill the screen.
func (t *terminal) draw(lines func(columns, lines int) []string) error {
	var b strings.Builder
	b.WriteString(home)
	for i, line := range lines(size(t.out)) {
		if i > 0 {
			b.WriteString("\r\n")
		}
		// First, since behind the last column the cursor stays on it.
		b.WriteString(clearLine + line)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.within {
		return nil
	}
	_, err := t.out.WriteString(b.String())
	return err
}
