// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"virtexit/internal/ledger"
	"virtexit/internal/snapshot"
	"virtexit/vmmap"
)

// The state of a daemon is a file of lines of JSON: a header, the ledger's
// records with the names of the domains, and an end with a checksum.
//
// The kernel keeps the counts of a slot until it is released, and no slot is
// released before the file that has its counts is on the disk. So a daemon that
// is killed at any moment loses nothing: its successor finds each exit either in
// the file or in a slot, and knows which slots the file has.
const (
	stateVersion = 1
	stateName    = "state"
	maxState     = 1 << 30 // bytes; a slot with ten reasons takes 1 KiB
	maxStateLine = 1 << 26
	stateRest    = 5 * time.Second // from one saving to the next, at least: on a large host it takes 0.2 s
)

type stateHeader struct {
	Version  int           `json:"version"`
	Machine  string        `json:"machine"`
	Boot     string        `json:"boot"`  // of the kernel
	Saved    time.Time     `json:"saved"` // at
	BootTime time.Duration `json:"boottime_ns"`
	Since    time.Time     `json:"since"` // of the totals
}

type stateEnd struct {
	Records  int    `json:"records"`
	Checksum uint32 `json:"crc32c"` // of the lines before
}

// stateRecord is a line. The header stands alone, as does the end.
type stateRecord struct {
	Header *stateHeader `json:"virtexit_state,omitempty"`
	ledger.Record
	Domain *vmmap.Domain `json:"domain,omitempty"` // with a process
	End    *stateEnd     `json:"end,omitempty"`
}

// state is what a daemon knew at one moment.
type state struct {
	stateHeader
	ledger  *ledger.State
	domains map[snapshot.Process]vmmap.Domain
}

func newChecksum() hash.Hash32 { return crc32.New(crc32.MakeTable(crc32.Castagnoli)) }

// write writes the state's file.
func (s *state) write(w io.Writer) error {
	sum := newChecksum()
	limited := &limitedWriter{w: w, left: maxState}
	enc := json.NewEncoder(io.MultiWriter(limited, sum))
	if err := enc.Encode(stateRecord{Header: &s.stateHeader}); err != nil {
		return err
	}
	n := 0
	for r := range s.ledger.Records() {
		out := stateRecord{Record: r}
		if r.Process != nil {
			if domain, ok := s.domains[r.Process.Process()]; ok {
				out.Domain = &domain
			}
		}
		if err := enc.Encode(out); err != nil {
			return err
		}
		n++
	}
	return json.NewEncoder(limited).Encode(stateRecord{End: &stateEnd{n, sum.Sum32()}})
}

// limitedWriter refuses to write what readState would refuse to read.
type limitedWriter struct {
	w    io.Writer
	left int
}

func (l *limitedWriter) Write(b []byte) (int, error) {
	if l.left -= len(b); l.left < 0 || len(b) > maxStateLine {
		return 0, errors.New("the state is too large")
	}
	return l.w.Write(b)
}

// restored is what a file tells.
type restored struct {
	stateHeader
	ledger  *ledger.Ledger
	domains map[snapshot.Process]vmmap.Domain
}

// readState reads a state's file. It believes nothing of it unless all is there,
// is what was written, and fits together.
func readState(in io.Reader, keep ledger.Retention) (*restored, error) {
	lines := bufio.NewScanner(io.LimitReader(in, maxState))
	lines.Buffer(nil, maxStateLine+1)
	sum := newChecksum()
	number := 0
	next := func() (r stateRecord, before uint32, err error) {
		number++
		if !lines.Scan() {
			if err := lines.Err(); err != nil {
				return r, 0, fmt.Errorf("line %d: %w", number, err)
			}
			return r, 0, fmt.Errorf("line %d: %w", number, io.ErrUnexpectedEOF)
		}
		before = sum.Sum32()
		sum.Write(lines.Bytes())
		sum.Write([]byte{'\n'})
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return r, 0, fmt.Errorf("line %d: %w", number, err)
		}
		return r, before, nil
	}
	first, _, err := next()
	switch {
	case err != nil:
		return nil, fmt.Errorf("not a state of virtexitd: %w", err)
	case first.Header == nil:
		return nil, errors.New("not a state of virtexitd")
	case first.Header.Version != stateVersion:
		return nil, fmt.Errorf("its version is %d, this program's is %d", first.Header.Version, stateVersion)
	}
	s := &restored{stateHeader: *first.Header, domains: make(map[snapshot.Process]vmmap.Domain)}
	var end *stateEnd
	var want uint32
	s.ledger, err = ledger.Restore(keep, func(yield func(ledger.Record, error) bool) {
		for {
			r, before, err := next()
			if err == nil && r.End != nil {
				end, want = r.End, before
				return
			}
			if r.Domain != nil && r.Process != nil {
				s.domains[r.Process.Process()] = *r.Domain
			}
			if !yield(r.Record, err) {
				return
			}
		}
	})
	switch {
	case err != nil:
		return nil, err
	case end.Checksum != want:
		return nil, fmt.Errorf("its checksum is %08x, it says %08x", want, end.Checksum)
	case end.Records != number-2:
		return nil, fmt.Errorf("%d records, it says %d", number-2, end.Records)
	case lines.Scan():
		return nil, errors.New("something follows its end")
	}
	return s, lines.Err()
}

// store is the directory of the state. One daemon at a time has it.
type store struct {
	dir *os.File
}

func openStore(path string) (*store, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		dir.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s: another virtexitd has it", path)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return &store{dir}, nil
}

// file is the path of the state or, with a suffix, of one beside it.
func (s *store) file(suffix string) string { return filepath.Join(s.dir.Name(), stateName+suffix) }

func (s *store) close() error { return s.dir.Close() }

// load reads the state. Without a file it is fs.ErrNotExist.
func (s *store) load(keep ledger.Retention) (*restored, error) {
	f, err := os.OpenFile(s.file(""), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.Mode().IsRegular():
		return nil, errors.New("not a regular file")
	case !ok || int(owner.Uid) != os.Geteuid() || info.Mode().Perm()&0o022 != 0:
		return nil, errors.New("others could write to it")
	}
	return readState(f, keep)
}

// setAside keeps a file that can't be used, one at the most.
func (s *store) setAside() error {
	return os.Rename(s.file(""), s.file(".bad"))
}

// save replaces the state's file. After a crash there is the old one or the new
// one.
func (s *store) save(st *state) (err error) {
	const next = ".new"
	if err := os.Remove(s.file(next)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(s.file(next), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 1<<16)
	if err := errors.Join(st.write(w), w.Flush(), f.Sync(), f.Close()); err != nil {
		return errors.Join(fmt.Errorf("%s: %w", f.Name(), err), os.Remove(f.Name()))
	}
	if err := os.Rename(f.Name(), s.file("")); err != nil {
		return err
	}
	return s.dir.Sync()
}

// restore takes up the state that an earlier daemon has left. Whatever is wrong
// with it, the daemon begins.
func (d *Daemon) restore() {
	log := d.config.Log
	store, err := openStore(d.config.StateDir)
	if err != nil {
		log.Warn("no state is kept: totals begin anew with each start", "problem", err)
		return
	}
	s, err := store.load(d.config.Retention)
	if err == nil {
		err = d.adopt(s)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		if aside := store.setAside(); aside != nil {
			log.Warn("no state is kept: there is one that can't be read or set aside", "problem", errors.Join(err, aside, store.close()))
			return
		}
		log.Warn("totals begin anew: the state can't be read and is set aside", "file", store.file(".bad"), "problem", err)
	default:
		log.Info("totals go on", "file", store.file(""), "since", s.Since, "saved", s.Saved, "exits", d.ledger.Totals().Exits)
	}
	d.store = store
}

// adopt makes what was stored the daemon's own.
func (d *Daemon) adopt(s *restored) error {
	if s.Machine != d.config.Machine {
		return errors.New("it is another host's")
	}
	now, latest := d.config.BootTime(), time.Duration(s.ledger.View().Time)
	var shift uint64
	if s.Boot != d.config.Boot || s.Boot == "" {
		// It was saved before this boot, whatever the clock says.
		at := now - max(now, time.Since(s.Saved)) - (s.BootTime - latest)
		shift = uint64(at - latest)
		s.ledger.Reboot(uint64(at))
	} else if latest > s.BootTime || s.BootTime > now {
		return fmt.Errorf("it was saved %v after the boot, which was %v ago", max(latest, s.BootTime), now)
	}
	d.ledger, d.totalsSince = s.ledger, s.Since
	for p, domain := range s.domains {
		p.Start += shift
		d.config.Identities.Restore(p, domain)
	}
	return nil
}

// StateKept tells whether the state is kept, as far as that is wanted.
func (d *Daemon) StateKept() bool {
	return d.config.StateDir == "" || d.store != nil && !d.unsaved.Load()
}

// keepState saves the state now and then, and soon when slots wait for it.
func (d *Daemon) keepState(ctx context.Context) {
	for {
		d.save()
		wait(ctx, stateRest)
		select {
		case <-ctx.Done():
			return
		case <-d.retired:
		case <-time.After(d.config.StateInterval - stateRest):
		}
	}
}

// save saves the state, and releases the slots whose counts are final in it.
func (d *Daemon) save() {
	d.saving.Lock()
	defer d.saving.Unlock()
	d.mu.Lock()
	s := &state{
		stateHeader: stateHeader{stateVersion, d.config.Machine, d.config.Boot, time.Now().Round(0), d.config.BootTime(), d.totalsSince},
		ledger:      d.ledger.State(),
		domains:     make(map[snapshot.Process]vmmap.Domain),
	}
	for _, total := range d.view.Processes {
		if domain, known := d.config.Identities.Lookup(total.Process, total.Comm); known {
			s.domains[total.Process] = domain
		}
	}
	src, release := d.source, d.release
	d.mu.Unlock()

	err := d.store.save(s)
	if err != nil && !d.unsaved.Load() {
		d.config.Log.Warn("saving the state: after another start, totals will go on from where they were last saved", "problem", err)
	}
	d.unsaved.Store(err != nil)

	// Even so: the kernel has to have slots for those who live. A source that was
	// opened meanwhile may have other slots of the same numbers.
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.source == src {
		d.releaseLocked(release) // what is left comes with the next snapshot
		released := make(map[snapshot.SlotID]bool, len(release))
		for _, id := range release {
			released[id] = true
		}
		d.release = slices.DeleteFunc(slices.Clone(d.release), func(id snapshot.SlotID) bool { return released[id] })
	}
}
