// SPDX-License-Identifier: Apache-2.0

package replay

import (
	"bytes"
	"compress/gzip"
	"errors"
	"flag"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
)

var update = flag.Bool("update", false, "write the golden files")

func at(second int) time.Time { return time.Date(2026, 1, 2, 3, 4, second, 6, time.UTC) }

// frames are those of a guest that works, dies and is released.
func frames() []Frame {
	slot := func(retired bool, count uint64) snapshot.Slot {
		return snapshot.Slot{
			ID: snapshot.SlotID{Index: 3, Generation: 7}, Retired: retired,
			Process: snapshot.Process{TGID: 100, Start: 1000}, Comm: "qemu <system>", TID: 101, Start: 1001,
			VCPU: 1, ISA: exitreason.SVM, Since: 2000,
			Level: snapshot.Recent, Times: snapshot.Times{Guest: 1, KVM: 2, User: 3, Poll: 4, Halted: 5, Wait: 6, Outside: 7}, Recent: 8,
			Rows: []snapshot.Row{
				{Code: 0x72, Count: count, Time: 700, User: 90, Max: 600, Hist: snapshot.Hist{0, 1}},
				{Other: true, Count: 1, Hist: snapshot.Hist{snapshot.NumHist - 1: math.MaxUint64}},
			},
		}
	}
	counting := source.Info{
		Collector: "kmod", Version: "0.1.0", Hook: "tracepoint", Level: snapshot.Time, ISA: exitreason.SVM, KVM: true,
		SlotsMax: 8192, SlotsLive: 1, SlotsRetired: 2, SlotsBacked: 64, Leases: 1,
	}
	refused := source.Info{Collector: "kmod", Hook: "none", KVM: true, Refused: "not known"}
	other := snapshot.Slot{ID: snapshot.SlotID{Index: 4}, ISA: 77}
	return []Frame{
		{Time: at(1), Info: &counting},
		{Time: at(1), Snapshot: &snapshot.Snapshot{TickHz: 2e9, Loaded: 7, Counted: 1e9, Slots: []snapshot.Slot{slot(false, 5)}, Unattributed: 1, Refused: 2}},
		{Time: at(2), Snapshot: &snapshot.Snapshot{TickHz: 2e9, Counted: 2e9, Slots: []snapshot.Slot{slot(true, 9), other}, Unattributed: 1, Refused: 2}},
		{Time: at(3), Info: &refused},
		{Time: at(3), Snapshot: &snapshot.Snapshot{TickHz: 2e9, Counted: 3e9, Slots: []snapshot.Slot{slot(true, 9)}, Unattributed: 1, Refused: 2}},
		{Time: at(4), Snapshot: &snapshot.Snapshot{TickHz: 2e9, Counted: 3e9, Released: 10, Unattributed: 1, Refused: 2}},
	}
}

func write(t testing.TB, frames ...Frame) []byte {
	var b bytes.Buffer
	w, err := NewWriter(&b)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range frames {
		if err := w.Write(f); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

func read(r io.Reader) ([]Frame, error) {
	reader, err := NewReader(r)
	if err != nil {
		return nil, err
	}
	var all []Frame
	for {
		f, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		all = append(all, f)
	}
}

func TestFormat(t *testing.T) {
	const golden = "testdata/recording.jsonl"
	got := write(t, frames()...)
	if *update {
		if err := os.WriteFile(golden, got, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("recording (-want +got):\n%s", diff)
	}
	back, err := read(bytes.NewReader(want))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(frames(), back); diff != "" {
		t.Errorf("frames (-written +read):\n%s", diff)
	}
}

func TestBadFrame(t *testing.T) {
	w, err := NewWriter(io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]Frame{
		"neither": {Time: at(1)},
		"both":    {Time: at(1), Info: &source.Info{}, Snapshot: &snapshot.Snapshot{TickHz: 1}},
	} {
		if err := w.Write(f); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestBadRecording(t *testing.T) {
	const head = `{"virtexit_recording":2}` + "\n"
	whole := string(write(t, frames()...))
	tests := []struct {
		name, text, want string
	}{
		{"empty", "", "line 1: empty"},
		{"foreign", "hello\n", "line 1: invalid character"},
		{"foreign json", `{"schema":"virtexit/v1"}`, `line 1: json: unknown field "schema"`},
		{"other json", "[]\n", "not a recording: line 1"},
		{"no version", "{}\n", "line 1: not a recording: no version"},
		{"other version", `{"virtexit_recording":1}`, "line 1: the recording's version is 1, this program's is 2"},
		{"torn header", `{"virtexit_re`, "line 1: cut short"},
		{"torn", whole[:len(whole)-20], "line 7: cut short"},
		{"empty line", head + "\n", "line 2: cut short"},
		{"garbage", head + "\x00\n", "line 2: invalid character"},
		{"garbage behind", head + `{"info":{"isa":"svm"}} {}` + "\n", "line 2: more than one object"},
		{"neither", head + `{"time":"2026-01-02T03:04:05Z"}`, "line 2: a frame holds either"},
		{"both", head + `{"info":{},"snapshot":{}}`, "line 2: a frame holds either"},
		{"unknown field", head + `{"snapshot":{"tick_hz":1,"slot":[]}}`, `line 2: json: unknown field "slot"`},
		{"time", head + `{"time":"yesterday"}`, "line 2: parsing time"},
		{"far time", head + `{"time":"9999-12-31T23:59:59-01:00"}`, "line 2: year is 10000 in UTC"},
		{"no clock", head + `{"snapshot":{}}`, "line 2: tick_hz is 0"},
		{"info's isa", head + `{"info":{"isa":"arm"}}`, `line 2: unknown isa "arm"`},
		{"slot's isa", head + `{"snapshot":{"tick_hz":1,"slots":[{"index":5,"isa":""}]}}`, `line 2: slot 5: unknown isa ""`},
		{"negative", head + `{"snapshot":{"tick_hz":-1}}`, "line 2: json: cannot unmarshal number -1"},
		{"histogram", head + `{"snapshot":{"tick_hz":1,"slots":[{"index":5,"isa":"svm","rows":[{"code":7,"hist":[` +
			strings.Repeat("1,", snapshot.NumHist) + `1]}]}]}}`, "line 2: slot 5: code 7: 27 buckets, of 26"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := read(strings.NewReader(tt.text)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want one with %q", err, tt.want)
			}
		})
	}
}

func TestSource(t *testing.T) {
	reader, err := NewReader(bytes.NewReader(write(t, frames()...)))
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSource(reader)
	if err != nil {
		t.Fatal(err)
	}
	all := frames()
	info := func(want source.Info) {
		t.Helper()
		got, err := s.Info()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("info (-want +got):\n%s", diff)
		}
	}
	snap := func(want *snapshot.Snapshot, when time.Time) {
		t.Helper()
		got, err := s.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("snapshot (-want +got):\n%s", diff)
		}
		if !s.Now().Equal(when) {
			t.Errorf("time is %v, want %v", s.Now(), when)
		}
	}
	dead := snapshot.SlotID{Index: 3, Generation: 7}

	if err := s.SetLevel(snapshot.Off); err != nil {
		t.Errorf("SetLevel: %v", err)
	}
	if err := s.SetProcessLevel(snapshot.Process{TGID: 100}, nil); err != nil {
		t.Errorf("SetProcessLevel: %v", err)
	}
	info(*all[0].Info)
	snap(all[1].Snapshot, at(1))
	if exits, err := s.Recent(dead, 0); err != nil || len(exits) > 0 {
		t.Errorf("Recent: %v, %v", exits, err)
	}
	if err := s.Release([]snapshot.SlotID{dead}); !errors.Is(err, source.ErrStale) {
		t.Errorf("release of a live slot: error is %v, want %v", err, source.ErrStale)
	}
	info(*all[0].Info)
	snap(all[2].Snapshot, at(2))
	if err := s.Release([]snapshot.SlotID{dead}); err != nil {
		t.Errorf("release of a retired slot: %v", err)
	}
	if err := s.Release([]snapshot.SlotID{dead}); !errors.Is(err, source.ErrStale) {
		t.Errorf("second release: error is %v, want %v", err, source.ErrStale)
	}
	info(*all[3].Info)
	// What we released is gone, in the recording only later.
	snap(all[5].Snapshot, at(3))
	snap(all[5].Snapshot, at(4))
	if _, err := s.Snapshot(); !errors.Is(err, source.ErrGone) {
		t.Errorf("after the last snapshot: error is %v, want %v", err, source.ErrGone)
	}
	info(*all[3].Info)

	for range 2 {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if _, open := <-s.Events(); open {
		t.Error("an event")
	}
	if _, err := s.Snapshot(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after close: error is %v, want %v", err, os.ErrClosed)
	}
}

// A torn recording plays up to where it is torn.
func TestTorn(t *testing.T) {
	whole := write(t, frames()...)
	reader, err := NewReader(bytes.NewReader(whole[:len(whole)-2]))
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSource(reader)
	if err != nil {
		t.Fatal(err)
	}
	var n int
	for err == nil {
		if _, err = s.Snapshot(); err == nil {
			n++
		}
	}
	if n != 3 || errors.Is(err, source.ErrGone) || !strings.Contains(err.Error(), "line 7") {
		t.Errorf("%d snapshots, then %v, want 3 and an error that names line 7", n, err)
	}
}

func TestFile(t *testing.T) {
	for _, name := range []string{"recording.jsonl", "recording.jsonl.gz"} {
		t.Run(name, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), name)
			f, err := Create(name)
			if err != nil {
				t.Fatal(err)
			}
			// Recording what is played records the same again.
			reader, err := NewReader(bytes.NewReader(write(t, frames()...)))
			if err != nil {
				t.Fatal(err)
			}
			played, err := NewSource(reader)
			if err != nil {
				t.Fatal(err)
			}
			src := Record(played, f.Writer, func() time.Time { return at(5) })
			var want []Frame
			for {
				info, err := src.Info()
				if err != nil {
					t.Fatal(err)
				}
				want = append(want, Frame{Time: at(5), Info: &info})
				snap, err := src.Snapshot()
				if errors.Is(err, source.ErrGone) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				want = append(want, Frame{Time: at(5), Snapshot: snap})
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := Create(name); !errors.Is(err, os.ErrExist) {
				t.Errorf("create again: error is %v, want %v", err, os.ErrExist)
			}

			s, err := Open(name)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if len(want) != 9 {
				t.Errorf("recorded %d frames, want 9", len(want))
			}
			for i := 1; i < len(want); i += 2 {
				got, err := s.Snapshot()
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want[i].Snapshot, got); diff != "" {
					t.Errorf("snapshot (-recorded +played):\n%s", diff)
				}
			}
		})
	}
}

func TestOpen(t *testing.T) {
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	z.Write(write(t, frames()...))
	z.Close()
	tests := []struct {
		name, file string
		content    []byte
		want       string
	}{
		{"plain as gzip", "r.gz", write(t, frames()...), "gzip: invalid header"},
		{"gzip as plain", "r.jsonl", zipped.Bytes(), "line 1"},
		{"torn gzip", "r.gz", zipped.Bytes()[:20], "line 1: unexpected EOF"},
		{"no snapshot", "r.jsonl", write(t, frames()[0]), "the recording has ended"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), tt.file)
			if err := os.WriteFile(name, tt.content, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(name); err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), name) {
				t.Errorf("error is %v, want one with %q that names the file", err, tt.want)
			}
		})
	}
	if _, err := Open(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: error is %v, want %v", err, os.ErrNotExist)
	}
}

func FuzzReader(f *testing.F) {
	f.Add(write(f, frames()...))
	f.Add([]byte(`{"virtexit_recording":2}` + "\n" + `{"snapshot":{"tick_hz":1,"slots":[{"isa":"vmx","rows":[{"hist":[0]}]}]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		want, err := read(bytes.NewReader(b))
		if err != nil {
			return
		}
		got, err := read(bytes.NewReader(write(t, want...)))
		if err != nil {
			t.Fatalf("what was read can't be read again: %v", err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("what was read reads differently (-first +second):\n%s", diff)
		}
	})
}
