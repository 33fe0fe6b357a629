// SPDX-License-Identifier: Apache-2.0

// Package replay records what a source tells and plays it back, for tests and
// to carry the data of a problem report.
//
// A recording is text: one JSON object a line, so that two of them can be
// compared; compressed by gzip when the file's name ends in .gz. The first line
// is the header,
//
//	{"virtexit_recording": 2}
//
// whose number is the format's version. Each further line is a frame: a time
// and what was learnt then, either the source's state or a snapshot.
//
//	{"time": "2026-01-02T15:04:05.000000006Z", "info": {"collector": "kmod", "hook": "tracepoint", "level": 3, ...}}
//	{"time": "2026-01-02T15:04:05.000000007Z", "snapshot": {"tick_hz": 2000000000, "released": 7, "slots": [
//		{"index": 0, "generation": 1, "tgid": 100, "isa": "svm", "rows": [{"code": 114, "count": 5, "hist": [0, 5]}, ...], ...}]}}
//
// Fields mean what those of source.Info and package snapshot mean. One that is
// zero is left out, as are the zeros that end a histogram. Numbers may need all
// of 64 bits, more than some JSON parsers keep.
package replay

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
)

const version = 2

// maxLine bounds the memory that a foreign file can take. A slot takes about 1 KiB
// with ten rows in use.
const maxLine = 1 << 28

// Frame is one thing that a source told. Either Info or Snapshot is set.
type Frame struct {
	Time     time.Time
	Info     *source.Info
	Snapshot *snapshot.Snapshot
}

type header struct {
	Version *int `json:"virtexit_recording"`
}

type frame struct {
	Time     time.Time `json:"time"`
	Info     *info     `json:"info,omitempty"`
	Snapshot *snap     `json:"snapshot,omitempty"`
}

type info struct {
	Collector    string `json:"collector"`
	Version      string `json:"version,omitempty"`
	Hook         string `json:"hook"`
	Level        uint32 `json:"level,omitempty"`
	ISA          string `json:"isa"`
	KVM          bool   `json:"kvm,omitempty"`
	Refused      string `json:"refused,omitempty"`
	SlotsMax     int    `json:"slots_max,omitempty"`
	SlotsLive    int    `json:"slots_live,omitempty"`
	SlotsRetired int    `json:"slots_retired,omitempty"`
	SlotsBacked  int    `json:"slots_backed,omitempty"`
	Leases       int    `json:"leases,omitempty"`
}

type snap struct {
	TickHz       uint64 `json:"tick_hz"`
	Loaded       uint64 `json:"loaded,omitempty"`
	Counted      uint64 `json:"counted,omitempty"`
	Released     uint64 `json:"released,omitempty"`
	Unattributed uint64 `json:"unattributed,omitempty"`
	Refused      uint64 `json:"refused,omitempty"`
	Slots        []slot `json:"slots,omitempty"`
}

type slot struct {
	Index      uint32 `json:"index"`
	Generation uint32 `json:"generation"`
	Retired    bool   `json:"retired,omitempty"`
	TGID       int    `json:"tgid"`
	TGIDStart  uint64 `json:"tgid_start"`
	Comm       string `json:"comm"`
	TID        int    `json:"tid"`
	Start      uint64 `json:"start"`
	VCPU       int    `json:"vcpu"`
	ISA        string `json:"isa"`
	Since      uint64 `json:"since"`
	Level      uint32 `json:"level,omitempty"`
	Recent     uint64 `json:"recent,omitempty"`
	Times      *times `json:"times,omitempty"`
	Rows       []row  `json:"rows,omitempty"`
}

type times struct {
	Guest   uint64 `json:"guest,omitempty"`
	KVM     uint64 `json:"kvm,omitempty"`
	User    uint64 `json:"user,omitempty"`
	Poll    uint64 `json:"poll,omitempty"`
	Halted  uint64 `json:"halted,omitempty"`
	Wait    uint64 `json:"wait,omitempty"`
	Outside uint64 `json:"outside,omitempty"`
}

type row struct {
	Code  uint32   `json:"code"`
	Other bool     `json:"other,omitempty"`
	Count uint64   `json:"count"`
	Time  uint64   `json:"time,omitempty"`
	User  uint64   `json:"user,omitempty"`
	Max   uint64   `json:"max,omitempty"`
	Hist  []uint64 `json:"hist,omitempty"`
}

// Writer writes a recording.
type Writer struct {
	enc *json.Encoder
}

// NewWriter begins a recording.
func NewWriter(w io.Writer) (*Writer, error) {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	v := version
	return &Writer{enc}, enc.Encode(header{&v})
}

// Write appends a frame.
func (w *Writer) Write(f Frame) error {
	if (f.Info == nil) == (f.Snapshot == nil) {
		return errors.New("a frame holds either info or a snapshot")
	}
	out := frame{Time: f.Time.UTC()}
	if i := f.Info; i != nil {
		out.Info = &info{
			i.Collector, i.Version, i.Hook, uint32(i.Level), i.ISA.String(), i.KVM, i.Refused,
			i.SlotsMax, i.SlotsLive, i.SlotsRetired, i.SlotsBacked, i.Leases,
		}
	}
	if s := f.Snapshot; s != nil {
		out.Snapshot = &snap{TickHz: s.TickHz, Loaded: s.Loaded, Counted: s.Counted, Released: s.Released, Unattributed: s.Unattributed, Refused: s.Refused}
		for i := range s.Slots {
			out.Snapshot.Slots = append(out.Snapshot.Slots, fromSlot(&s.Slots[i]))
		}
	}
	return w.enc.Encode(out)
}

func fromSlot(s *snapshot.Slot) slot {
	out := slot{
		s.ID.Index, s.ID.Generation, s.Retired, s.Process.TGID, s.Process.Start, s.Comm, s.TID, s.Start, s.VCPU,
		s.ISA.String(), s.Since, uint32(s.Level), s.Recent, nil, nil,
	}
	if t := times(s.Times); t != (times{}) {
		out.Times = &t
	}
	for i := range s.Rows {
		r := &s.Rows[i]
		out.Rows = append(out.Rows, row{r.Code, r.Other, r.Count, r.Time, r.User, r.Max, r.Hist})
	}
	return out
}

// Reader reads a recording.
type Reader struct {
	lines *bufio.Scanner
	line  int
}

// NewReader checks that a recording begins here.
func NewReader(r io.Reader) (*Reader, error) {
	reader := &Reader{lines: bufio.NewScanner(r)}
	reader.lines.Buffer(nil, maxLine)
	var h header
	err := reader.next(&h)
	switch {
	case errors.Is(err, io.EOF):
		return nil, errors.New("line 1: empty, want a recording's header")
	case err != nil:
		return nil, fmt.Errorf("not a recording: %w", err)
	case h.Version == nil:
		return nil, errors.New("line 1: not a recording: no version")
	case *h.Version != version:
		return nil, fmt.Errorf("line 1: the recording's version is %d, this program's is %d", *h.Version, version)
	}
	return reader, nil
}

// Read returns the next frame, and io.EOF after the last one. Other errors name
// the line.
func (r *Reader) Read() (Frame, error) {
	var in frame
	if err := r.next(&in); err != nil {
		return Frame{}, err
	}
	f, err := in.parse()
	if err != nil {
		return Frame{}, fmt.Errorf("line %d: %w", r.line, err)
	}
	return f, nil
}

func (r *Reader) next(v any) error {
	r.line++
	if !r.lines.Scan() {
		if err := r.lines.Err(); err != nil {
			return fmt.Errorf("line %d: %w", r.line, err)
		}
		return io.EOF
	}
	dec := json.NewDecoder(bytes.NewReader(r.lines.Bytes()))
	dec.DisallowUnknownFields()
	err := dec.Decode(v)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		// Not to be taken for the end of the recording.
		err = errors.New("cut short")
	}
	if err == nil && dec.More() {
		err = errors.New("more than one object")
	}
	if err != nil {
		return fmt.Errorf("line %d: %w", r.line, err)
	}
	return nil
}

func (in *frame) parse() (Frame, error) {
	f := Frame{Time: in.Time.UTC()}
	if year := f.Time.Year(); year < 0 || year > 9999 {
		return Frame{}, fmt.Errorf("year is %d in UTC", year)
	}
	switch {
	case in.Info != nil && in.Snapshot == nil:
		i := in.Info
		isa, err := exitreason.ParseISA(i.ISA)
		if err != nil {
			return Frame{}, err
		}
		f.Info = &source.Info{
			Collector: i.Collector, Version: i.Version, Hook: i.Hook, Level: snapshot.Level(i.Level), ISA: isa,
			KVM: i.KVM, Refused: i.Refused,
			SlotsMax: i.SlotsMax, SlotsLive: i.SlotsLive, SlotsRetired: i.SlotsRetired, SlotsBacked: i.SlotsBacked,
			Leases: i.Leases,
		}
	case in.Snapshot != nil && in.Info == nil:
		s := in.Snapshot
		if s.TickHz == 0 {
			return Frame{}, errors.New("tick_hz is 0")
		}
		f.Snapshot = &snapshot.Snapshot{
			TickHz: s.TickHz, Loaded: s.Loaded, Counted: s.Counted, Released: s.Released, Unattributed: s.Unattributed, Refused: s.Refused,
		}
		for i := range s.Slots {
			slot, err := s.Slots[i].parse()
			if err != nil {
				return Frame{}, fmt.Errorf("slot %d: %w", s.Slots[i].Index, err)
			}
			f.Snapshot.Slots = append(f.Snapshot.Slots, slot)
		}
	default:
		return Frame{}, errors.New("a frame holds either info or a snapshot")
	}
	return f, nil
}

func (s *slot) parse() (snapshot.Slot, error) {
	isa, err := exitreason.ParseISA(s.ISA)
	if err != nil {
		return snapshot.Slot{}, err
	}
	out := snapshot.Slot{
		ID:      snapshot.SlotID{Index: s.Index, Generation: s.Generation},
		Retired: s.Retired,
		Process: snapshot.Process{TGID: s.TGID, Start: s.TGIDStart},
		Comm:    s.Comm, TID: s.TID, Start: s.Start, VCPU: s.VCPU, ISA: isa, Since: s.Since,
		Level: snapshot.Level(s.Level), Recent: s.Recent,
	}
	if s.Times != nil {
		out.Times = snapshot.Times(*s.Times)
	}
	for _, r := range s.Rows {
		if len(r.Hist) > snapshot.NumHist {
			return snapshot.Slot{}, fmt.Errorf("code %d: %d buckets, of %d", r.Code, len(r.Hist), snapshot.NumHist)
		}
		to := snapshot.Row{Code: r.Code, Other: r.Other, Count: r.Count, Time: r.Time, User: r.User, Max: r.Max, Hist: snapshot.NewHist(r.Hist)}
		out.Rows = append(out.Rows, to)
	}
	return out, nil
}
