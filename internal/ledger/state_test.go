// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"encoding/json"
	"errors"
	"io"
	"iter"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"virtexit/internal/snapshot"
)

// stored is what a file holds of a state: a record a line.
func stored(t *testing.T, s *State) []string {
	t.Helper()
	var lines []string
	for r := range s.Records() {
		text, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, string(text))
	}
	return lines
}

func records(lines []string) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		for _, line := range lines {
			var r Record
			err := json.Unmarshal([]byte(line), &r)
			if !yield(r, err) {
				return
			}
		}
	}
}

// restored is the ledger that a program finds which is started anew.
func restored(t *testing.T, keep Retention, s *State) *Ledger {
	t.Helper()
	l, err := Restore(keep, records(stored(t, s)))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

var anyOrder = cmp.Options{cmp.AllowUnexported(VCPU{}), cmpopts.EquateEmpty(), cmpopts.SortSlices(func(a, b Row) bool {
	return a.ISA < b.ISA || a.ISA == b.ISA && a.Code < b.Code
})}

func TestRestore(t *testing.T) {
	l := New(forever)
	last := retired(slot(2, 2, 1))
	last.ISA = math.MaxUint32
	apply(t, l, 10*second, snapshot.Snapshot{TickHz: 2e9, Loaded: 1, Counted: 5 * second, Unattributed: 3, Slots: []snapshot.Slot{slot(1, 1, 5), slot(2, 1, 7), last}})
	one := l.View()
	l = restored(t, forever, l.State())
	if diff := cmp.Diff(one, l.View(), anyOrder); diff != "" {
		t.Errorf("restored (-want +got)\n%s", diff)
	}
	// It died for a minute. The slots have retired meanwhile, and one has been
	// released, as it had been asked to.
	release := apply(t, l, 70*second, snapshot.Snapshot{
		TickHz: 2e9, Loaded: 1, Counted: 6 * second, Unattributed: 4, Released: 1, Slots: []snapshot.Slot{retired(slot(1, 1, 50)), retired(slot(2, 1, 7))},
	})
	if len(release) != 2 {
		t.Errorf("releases %v", release)
	}
	if diff := cmp.Diff(Totals{Exits: 62, Attributed: 58, Unattributed: 4}, l.Totals()); diff != "" {
		t.Errorf("totals (-want +got)\n%s", diff)
	}
	got := l.View().Processes[snapshot.Process{TGID: 100, Start: 1e7}]
	if got.Exits != 50 || got.Live || got.Wall != 69*second || got.Span != 6*second {
		t.Errorf("%d exits, live: %t, observed %d of %d ns", got.Exits, got.Live, got.Span, got.Wall)
	}
}

// What another reader takes while nobody keeps the ledger is missed, as much of
// it as had not been seen.
func TestRestoreMissed(t *testing.T) {
	l := New(forever)
	apply(t, l, 10*second, snapshot.Snapshot{TickHz: 2e9, Loaded: 1, Slots: []snapshot.Slot{slot(1, 1, 5)}})
	l = restored(t, forever, l.State())
	apply(t, l, 20*second, snapshot.Snapshot{TickHz: 2e9, Loaded: 1, Released: 30, Slots: []snapshot.Slot{slot(1, 3, 2)}})
	if diff := cmp.Diff(Totals{Exits: 32, Attributed: 7, Missed: 25}, l.Totals()); diff != "" {
		t.Errorf("totals (-want +got)\n%s", diff)
	}
}

// A collector that was loaded anew is another one, although its counts could
// follow the earlier ones.
func TestRestoreReloaded(t *testing.T) {
	l := New(forever)
	apply(t, l, 10*second, snapshot.Snapshot{TickHz: 2e9, Loaded: 1, Slots: []snapshot.Slot{slot(1, 1, 5)}})
	l = restored(t, forever, l.State())
	apply(t, l, 20*second, snapshot.Snapshot{TickHz: 2e9, Loaded: 2, Released: 30, Slots: []snapshot.Slot{slot(1, 3, 2)}})
	if diff := cmp.Diff(Totals{Exits: 37, Attributed: 7, Missed: 30}, l.Totals()); diff != "" {
		t.Errorf("totals (-want +got)\n%s", diff)
	}
}

// After a boot nothing of before goes on, even if it looks the same, and it is
// forgotten when its time has come.
func TestReboot(t *testing.T) {
	keep := Retention{Age: time.Minute, Count: 10}
	l := New(keep)
	dead := func(snapshot.Process) bool { return false }
	apply(t, l, 100*second, snapshot.Snapshot{TickHz: 2e9, Loaded: 1, Slots: []snapshot.Slot{slot(1, 1, 5), retired(slot(2, 1, 6))}})
	apply(t, l, 120*second, snapshot.Snapshot{TickHz: 2e9, Loaded: 1, Slots: []snapshot.Slot{slot(1, 1, 5), retired(slot(2, 1, 6))}})
	l = restored(t, keep, l.State())
	at := 10 * second
	at -= 30 * second // it is 30 s later, 10 s after the boot
	l.Reboot(at)
	if n := len(l.Expire(dead)); n != 0 {
		t.Errorf("%d processes are forgotten at once", n)
	}
	apply(t, l, 11*second, snapshot.Snapshot{TickHz: 2e9, Loaded: 1, Slots: []snapshot.Slot{slot(1, 1, 2)}})
	if diff := cmp.Diff(Totals{Exits: 13, Attributed: 13}, l.Totals()); diff != "" {
		t.Errorf("totals (-want +got)\n%s", diff)
	}
	var counts []uint64
	for p, total := range l.View().Processes {
		counts = append(counts, total.Exits)
		if live := p.Start == 1e7; total.Process.InProc() != p || total.Live != live || live != (total.Exits == 2) {
			t.Errorf("%v: %+v", p, total)
		}
		if since := int64(total.Since); total.Live != (since == int64(second)) || !total.Live && since != -139*int64(second) {
			t.Errorf("%v: since %d", p, since)
		}
	}
	slices.Sort(counts)
	if diff := cmp.Diff([]uint64{2, 5, 6}, counts); diff != "" {
		t.Errorf("exits of processes (-want +got)\n%s", diff)
	}
	// One was last seen 40 s before the boot, the other 20 s.
	apply(t, l, 30*second, snapshot.Snapshot{TickHz: 2e9, Loaded: 1, Slots: []snapshot.Slot{slot(1, 1, 2)}})
	if forgotten := l.Expire(dead); len(forgotten) != 1 || forgotten[0].TGID != 200 {
		t.Errorf("at 30 s: forgets %v", forgotten)
	}
	apply(t, l, 41*second, snapshot.Snapshot{TickHz: 2e9, Loaded: 1, Slots: []snapshot.Slot{slot(1, 1, 2)}})
	if forgotten := l.Expire(dead); len(forgotten) != 1 || forgotten[0].TGID != 100 {
		t.Errorf("at 41 s: forgets %v", forgotten)
	}
	if diff := cmp.Diff(Totals{Exits: 13, Attributed: 13}, l.Totals()); diff != "" {
		t.Errorf("totals (-want +got)\n%s", diff)
	}
}

// What does not fit together is refused.
func TestRestoreRefuses(t *testing.T) {
	l := New(forever)
	apply(t, l, 10*second, snapshot.Snapshot{TickHz: 2e9, Slots: []snapshot.Slot{slot(1, 1, 5), retired(slot(1, 2, 6))}})
	good := stored(t, l.State())
	if _, err := Restore(forever, records(good)); err != nil {
		t.Fatal(err)
	}
	index := func(part string) int {
		return slices.IndexFunc(good, func(line string) bool { return strings.Contains(line, part) })
	}
	process, live := index(`"process":`), index(`"exits":5`)
	edit := func(i int, old, new string) []string {
		t.Helper()
		if !strings.Contains(good[i], old) {
			t.Fatalf("no %s in %s", old, good[i])
		}
		lines := slices.Clone(good)
		lines[i] = strings.Replace(good[i], old, new, 1)
		return lines
	}
	for name, lines := range map[string][]string{
		"nothing":                    nil,
		"no head":                    good[1:],
		"two heads":                  append([]string{good[0]}, good...),
		"an empty record":            append(slices.Clone(good), "{}"),
		"a record of two things":     append(slices.Clone(good), strings.TrimSuffix(good[0], "}")+","+good[1][1:]),
		"a process twice":            append(slices.Clone(good), good[process]),
		"a slot twice":               append(slices.Clone(good), good[live]),
		"a slot of nobody":           edit(live, `"tgid":100`, `"tgid":101`),
		"a process is missing":       slices.Delete(slices.Clone(good), process, process+1),
		"exits of a slot":            edit(live, `"exits":5`, `"exits":6`),
		"exits of a reason":          edit(live, `[2,0,114,5,`, `[2,0,114,6,`),
		"exits of a process":         edit(process, `[2,0,114,11,`, `[2,0,114,12,`),
		"no row":                     edit(live, `[2,0,114,5,`, `[2,0,`),
		"a code of 33 bits":          edit(live, `[2,0,114,5,`, `[2,0,4294967296,5,`),
		"more buckets than there be": edit(live, `[2,0,114,5,`, `[2,0,114,5,`+strings.Repeat("0,", 30)),
		"a reason twice":             edit(process, `"rows":[`, `"rows":[[2,0,114,0,0,0,0],`),
		"vCPUs in disorder":          edit(process, `"vcpus":[`, `"vcpus":[[9,0,0,0,0,0,0,0,0,0,0],`),
		"half a vCPU":                edit(process, `"vcpus":[`, `"vcpus":[[0,0],`),
		"half of the times":          edit(live, `"times":[`, `"times":[0,`),
		"no clock":                   edit(0, `"tick_hz":2000000000`, `"tick_hz":0`),
		"more gone than released":    edit(0, `"gone":0`, `"gone":1`),
		"unattributed":               edit(0, `"earlier":[0,0,0,0]`, `"earlier":[0,0,1,0]`),
	} {
		if _, err := Restore(forever, records(lines)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	_, err := Restore(forever, func(yield func(Record, error) bool) { yield(Record{}, io.ErrUnexpectedEOF) })
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("error %v", err)
	}
}
