// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"io"
	"regexp"
	"strconv"
	"time"
)

// port reads the machine's second serial port: the command's output, which it passes on unchanged, and between it the
// lines of init.sh, which open with a record separator.
type port struct {
	out     io.Writer
	err     error  // first failure of out; the machine goes on
	pending []byte // a record separator and what has come since, as long as it may be a line of ours

	started, ended time.Time
	status         int
}

const separator = '\x1e'

var ours = regexp.MustCompile(`^\x1elab: (?:started|exit status (\d+))\n`)

func (p *port) Write(b []byte) (int, error) {
	p.pending = append(p.pending, b...)
	for len(p.pending) > 0 {
		plain := bytes.IndexByte(p.pending, separator)
		if plain < 0 {
			plain = len(p.pending)
		}
		if plain == 0 {
			line := bytes.IndexByte(p.pending, '\n')
			if line < 0 && len(p.pending) < 64 {
				break
			}
			if match := ours.FindSubmatch(p.pending); match != nil {
				p.note(match[1])
				p.pending = p.pending[line+1:]
				continue
			}
			plain = 1
		}
		if _, err := p.out.Write(p.pending[:plain]); err != nil && p.err == nil {
			p.err = err
		}
		p.pending = p.pending[plain:]
	}
	return len(b), nil
}

func (p *port) note(status []byte) {
	if status == nil {
		p.started = time.Now()
		return
	}
	p.ended = time.Now()
	p.status, _ = strconv.Atoi(string(status))
}
