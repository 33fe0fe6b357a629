// SPDX-License-Identifier: Apache-2.0

package replay

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"virtexit/internal/snapshot"
	"virtexit/internal/source"
)

// Source plays a recording back: each call of Snapshot goes on to the next one
// that was recorded. It has no clock and no events.
type Source struct {
	events chan source.Event
	close  func() error

	mu       sync.Mutex
	reader   *Reader
	err      error // the recording's end
	info     source.Info
	next     Frame // a snapshot, unless err is set
	now      time.Time
	current  []snapshot.SlotID        // those retired in the latest snapshot
	released map[snapshot.SlotID]bool // by our caller
	closed   bool
}

var _ source.Source = (*Source)(nil)

// Open plays the named file.
func Open(name string) (*Source, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("open recording: %w", err)
	}
	s, err := open(file, strings.HasSuffix(name, ".gz"))
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("open recording: %s: %w", name, err)
	}
	s.close = file.Close
	return s, nil
}

func open(r io.Reader, compressed bool) (*Source, error) {
	if compressed {
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, err
		}
		r = z
	}
	reader, err := NewReader(r)
	if err != nil {
		return nil, err
	}
	return NewSource(reader)
}

// NewSource plays what a reader reads. A recording without a snapshot is an
// error.
func NewSource(r *Reader) (*Source, error) {
	s := &Source{
		events:   make(chan source.Event),
		close:    func() error { return nil },
		reader:   r,
		released: map[snapshot.SlotID]bool{},
	}
	if s.advance(); s.err != nil {
		return nil, s.err
	}
	return s, nil
}

// advance reads up to the next snapshot. What the source said of itself before
// is its state until then.
func (s *Source) advance() {
	for s.err == nil {
		s.next, s.err = s.reader.Read()
		if s.err != nil || s.next.Snapshot != nil {
			break
		}
		s.info = *s.next.Info
	}
	if errors.Is(s.err, io.EOF) {
		s.err = fmt.Errorf("%w: the recording has ended", source.ErrGone)
	}
}

// Info is what was recorded last before the snapshot that comes next.
func (s *Source) Info() (source.Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return source.Info{}, os.ErrClosed
	}
	return s.info, nil
}

// SetLevel has no effect: what was collected is past.
func (s *Source) SetLevel(snapshot.Level) error { return nil }

// SetProcessLevel has no effect either.
func (s *Source) SetProcessLevel(snapshot.Process, *snapshot.Level) error { return nil }

// Recent returns nothing: a recording does not hold the latest exits.
func (s *Source) Recent(snapshot.SlotID, uint64) ([]snapshot.Exit, error) { return nil, nil }

// Snapshot goes on to the next one. After the last one the error is
// source.ErrGone, but where the recording is broken one that names the line.
func (s *Source) Snapshot() (*snapshot.Snapshot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return nil, os.ErrClosed
	case s.err != nil:
		return nil, s.err
	}
	snap := s.next.Snapshot
	s.now = s.next.Time
	// What our caller has released is gone, although in the recording it may
	// have stayed for longer.
	s.current = nil
	snap.Slots = slices.DeleteFunc(snap.Slots, func(slot snapshot.Slot) bool {
		if s.released[slot.ID] {
			snap.Released += slot.Exits()
			return true
		}
		if slot.Retired {
			s.current = append(s.current, slot.ID)
		}
		return false
	})
	s.advance()
	return snap, nil
}

// Now is when the latest snapshot was recorded: a clock for who plays it.
func (s *Source) Now() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

// Release removes slots that are retired in the latest snapshot from those that
// follow.
func (s *Source) Release(ids []snapshot.SlotID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return os.ErrClosed
	}
	for _, id := range ids {
		if s.released[id] || !slices.Contains(s.current, id) {
			return fmt.Errorf("release: %w: slot %d, generation %d", source.ErrStale, id.Index, id.Generation)
		}
		s.released[id] = true
	}
	return nil
}

// Events returns a channel that is silent until Close.
func (s *Source) Events() <-chan source.Event { return s.events }

// Close closes the recording.
func (s *Source) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	close(s.events)
	return s.close()
}

// File is a recording being written.
type File struct {
	*Writer
	file *os.File
	zip  *gzip.Writer // nil when the name does not end in .gz
}

// Create begins a recording in a new file. An existing one is an error.
func Create(name string) (*File, error) {
	f := &File{}
	var err error
	if f.file, err = os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return nil, fmt.Errorf("create recording: %w", err)
	}
	var w io.Writer = f.file
	if strings.HasSuffix(name, ".gz") {
		f.zip = gzip.NewWriter(f.file)
		w = f.zip
	}
	if f.Writer, err = NewWriter(w); err != nil {
		return nil, errors.Join(fmt.Errorf("create recording: %w", err), f.file.Close())
	}
	return f, nil
}

// Close completes the file.
func (f *File) Close() error {
	var err error
	if f.zip != nil {
		err = f.zip.Close()
	}
	return errors.Join(err, f.file.Close())
}

// Record returns src, with what it tells written to w. An error of w's is
// returned in place of what could not be written.
func Record(src source.Source, w *Writer, now func() time.Time) source.Source {
	return &recorder{Source: src, writer: w, now: now}
}

type recorder struct {
	source.Source

	mu     sync.Mutex
	writer *Writer
	now    func() time.Time
}

func (r *recorder) Info() (source.Info, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	info, err := r.Source.Info()
	if err != nil {
		return source.Info{}, err
	}
	return info, r.record(Frame{Info: &info})
}

func (r *recorder) Snapshot() (*snapshot.Snapshot, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	snap, err := r.Source.Snapshot()
	if err != nil {
		return nil, err
	}
	return snap, r.record(Frame{Snapshot: snap})
}

func (r *recorder) record(f Frame) error {
	f.Time = r.now()
	if err := r.writer.Write(f); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	return nil
}
