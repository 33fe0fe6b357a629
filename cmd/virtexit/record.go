// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"virtexit/api"
	"virtexit/internal/report"
)

func (a *app) record() *cobra.Command {
	var p pace
	cmd := &cobra.Command{
		Use:   "record FILE [DOMAIN...]",
		Short: "Record what domains do in a file",
		Long: `Record what domains do in a file, for 'virtexit replay': at the end of each
interval a report is appended, as JSON on a line of its own. DOMAIN is an id, a
uuid, a name or a run; without it, all that run are recorded. FILE "-" is
stdout. A new file is readable by its owner alone: exits tell about what guests
do.

It ends with Ctrl-C, or after --iterations. When virtexitd goes away, a line
says so, and it goes on when it is back; that time is missing in the file.`,
		Example: `  virtexit record /var/tmp/exits.ndjson --delay 10s
  virtexit record web01.ndjson web01 --iterations 60
  virtexit record - | gzip >exits.ndjson.gz`,
		Args:    cobra.MinimumNArgs(1),
		PreRunE: func(*cobra.Command, []string) error { return p.check() },
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.do(func(ctx context.Context, args []string) error {
				status, err := a.client().Status(ctx)
				if err != nil {
					return err
				}
				to, err := a.recording(args[0])
				if err != nil {
					return err
				}
				defer to.close()
				a.remark(status)
				n := uint64(0)
				err = a.follow(ctx, args[1:], p.interval(cmd, status), p.iterations, func(r api.Report) error {
					n++
					return to.append(r)
				}, a.say)
				if err != nil && ctx.Err() == nil {
					return err
				}
				a.say(report.Plural(n, "report") + " recorded")
				return nil // it is how one ends it
			})(cmd, args)
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, part string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return nil, cobra.ShellCompDirectiveDefault
			}
			return a.complete(cmd, args[1:], part)
		},
	}
	p.flags(cmd)
	return cmd
}

// recording is a file of reports, one a line.
type recording struct {
	io.Writer
	file *os.File // nil when it is stdout
	size int64    // of what is whole; below 0: not to be cut
}

// begins is what each report begins with, as the api encodes it.
const begins = `{"schema":"` + api.Schema + `"`

func (a *app) recording(path string) (*recording, error) {
	if path == "-" {
		return &recording{Writer: a.stdout, size: -1}, nil
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	r := &recording{Writer: f, file: f, size: -1}
	if err := r.open(); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// open makes sure that the file is ours alone and holds nothing but reports. A
// line that was cut short, as by a full disk when the host crashed, is ended.
func (r *recording) open() error {
	info, err := r.file.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return err
	}
	if err := unix.Flock(int(r.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return errors.New("another virtexit records in it")
		}
		return err
	}
	if info, err = r.file.Stat(); err != nil {
		return err
	}
	if r.size = info.Size(); r.size == 0 {
		return nil
	}
	head, last := make([]byte, min(r.size, int64(len(begins)))), make([]byte, 1)
	if _, err := r.file.ReadAt(head, 0); err != nil {
		return err
	}
	if !bytes.HasPrefix([]byte(begins), head) {
		return errors.New("it is there and holds something else than reports of virtexit")
	}
	if _, err := r.file.ReadAt(last, r.size-1); err != nil {
		return err
	}
	if last[0] == '\n' {
		return nil
	}
	return r.write([]byte("\n"))
}

func (r *recording) append(what api.Report) error {
	var line bytes.Buffer
	enc := json.NewEncoder(&line)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(what); err != nil {
		return err
	}
	return r.write(line.Bytes())
}

// write writes all or, where a file can be cut, nothing.
func (r *recording) write(b []byte) error {
	n, err := r.Write(b)
	if r.size < 0 {
		return err
	}
	if err != nil {
		return errors.Join(err, r.file.Truncate(r.size))
	}
	r.size += int64(n)
	return nil
}

func (r *recording) close() {
	if r.file != nil {
		r.file.Close() // each line has been written
	}
}

// wholePeriod is a time that was not asked for, but long enough that it is not
// just a pause of a duty cycle.
func wholePeriod(status api.Status, interval time.Duration, given bool) time.Duration {
	if status.Duty != nil && !given {
		return max(interval, time.Duration(status.Duty.EveryNS))
	}
	return interval
}
