// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"virtexit/api"
	"virtexit/internal/exitreason"
	"virtexit/internal/ledger"
	"virtexit/internal/snapshot"
	"virtexit/vmmap"
)

func TestDomain(t *testing.T) {
	const second = uint64(time.Second)
	us := func(us uint64) uint64 { return us * tickHz / 1e6 }
	times := func(k uint64) snapshot.Times {
		return snapshot.Times{
			Guest: us(40 * k), KVM: us(20 * k), User: us(10 * k), Poll: us(5 * k), Halted: us(15 * k), Wait: us(7 * k), Outside: us(3 * k),
		}
	}
	apiTimes := func(k uint64) api.Times {
		return api.Times{
			GuestNS: 40_000 * k, KVMNS: 20_000 * k, UserNS: 10_000 * k, PollNS: 5_000 * k, HaltedNS: 15_000 * k, WaitNS: 7_000 * k, OutsideNS: 3_000 * k,
		}
	}
	view := &ledger.View{TickHz: tickHz}
	counted := func(level snapshot.Level) *ledger.Total {
		return &ledger.Total{
			Process: snapshot.Process{TGID: 1, Start: 71*uint64(10*time.Millisecond) - 1},
			Wall:    10 * second, Span: 2 * second, Level: level, Exits: 30, Times: times(3),
			VCPUs: []ledger.VCPU{{ID: 0, TID: 10, Exits: 10, Times: times(1)}, {ID: 4, TID: 14, Exits: 20, Times: times(2)}},
			Rows: []ledger.Row{{ISA: exitreason.SVM, Row: snapshot.Row{
				Code: 0x7b, Count: 30, Time: us(90), User: us(30), Max: us(4), Hist: snapshot.Hist{3: 30},
			}}},
		}
	}
	// In the period that rates are of, vCPU 0 was in the guest all the time.
	period := &ledger.Total{
		Wall: second, Span: second / 2, Exits: 5, Times: snapshot.Times{Guest: us(75), Halted: us(25)},
		VCPUs: []ledger.VCPU{{ID: 0, TID: 10, Exits: 5, Times: snapshot.Times{Guest: us(50)}},
			{ID: 4, TID: 14, Times: snapshot.Times{Guest: us(25), Halted: us(25)}}},
		Rows: []ledger.Row{{ISA: exitreason.SVM, Row: snapshot.Row{Code: 0x7b, Count: 5}}},
	}
	identity := vmmap.Domain{Name: "web", TGID: 1, Start: 70 * uint64(10*time.Millisecond), State: vmmap.Running, VCPUs: map[int]int{10: 0, 14: 1, 99: 2},
		Metadata: vmmap.Metadata{Title: "Web", Description: "d", Cloud: &vmmap.Cloud{System: "nova", Name: "n", InstanceUUID: "i", Namespace: "s",
			Project: "p", ProjectID: "pi", User: "u", UserID: "ui", Flavor: "f"}}}
	cloud := &api.Cloud{System: "nova", Name: "n", InstanceUUID: "i", Namespace: "s", Project: "p", ProjectID: "pi", User: "u", UserID: "ui", Flavor: "f"}
	whole := func(change func(*api.Domain)) api.Domain {
		d := api.Domain{
			Name: "web", Run: ptr("1-70"), Title: "Web", Description: "d", Cloud: cloud, TGID: 1, State: "running", Level: "time",
			WallNS: 10e9, SpanNS: 2e9, Count: 30, Rate: 10, RateNS: 5e8,
			Time: apiTimes(3), TimePct: api.TimePct{Guest: 75, Halted: 25}, GuestNS: 120_000, GuestPct: 75,
			VCPUs: []api.VCPU{
				{ID: 0, TID: 10, Exits: 10, Rate: 10, Time: apiTimes(1), GuestNS: 40_000, GuestPct: 100},
				{ID: 1, TID: 14, Exits: 20, Time: apiTimes(2), GuestNS: 80_000, GuestPct: 50},
				{ID: 2, TID: 99},
			},
			Exits: []api.Exit{{
				ISA: "svm", Code: 0x7b, Reason: "io", Count: 30, Rate: 10, Share: 1, TimeNS: 90_000, UserNS: 30_000,
				MeanNS: ptr(uint64(3000)), MaxNS: ptr(uint64(4000)),
			}},
		}
		change(&d)
		return d
	}
	ofUnknownISA := func(t *ledger.Total) *ledger.Total {
		other := *t
		other.Rows = slices.Clone(t.Rows)
		other.Rows[0].ISA = 77
		return &other
	}
	for _, tt := range []struct {
		name          string
		counts, rates *ledger.Total
		want          api.Domain
	}{
		{"counted", counted(snapshot.Time), period, whole(func(*api.Domain) {})},
		{"unknown isa", ofUnknownISA(counted(snapshot.Time)), ofUnknownISA(period), whole(func(d *api.Domain) {
			d.Exits[0].ISA, d.Exits[0].Reason = "isa77", "0x7b"
		})},
		{"recent", counted(snapshot.Recent), period, whole(func(d *api.Domain) { d.Level = "recent" })},
		{"paused", counted(snapshot.Pause), period, whole(func(d *api.Domain) { d.Level = "off" })},
		{"ended", counted(snapshot.Off), period, whole(func(d *api.Domain) { d.Level = "off" })},
		{"not observed", counted(snapshot.Time), &ledger.Total{Wall: second}, whole(func(d *api.Domain) {
			d.Rate, d.RateNS, d.TimePct, d.GuestPct = 0, 0, api.TimePct{}, 0
			for i := range d.VCPUs {
				d.VCPUs[i].Rate, d.VCPUs[i].GuestPct = 0, 0
			}
			d.Exits[0].Rate = 0
		})},
		{"never counted", nil, nil, api.Domain{
			Name: "web", Run: ptr("1-70"), Title: "Web", Description: "d", Cloud: cloud, TGID: 1, State: "running", Level: "off", VCPUs: []api.VCPU{{ID: 0, TID: 10}, {ID: 1, TID: 14}, {ID: 2, TID: 99}},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := New(Config{BootTime: func() time.Duration { return time.Hour }})
			got := d.domain(view, identity, tt.counts, tt.rates)
			if (got.Since != nil) != (tt.counts != nil) {
				t.Errorf("since %v", got.Since)
			}
			opts := cmp.Options{cmpopts.IgnoreFields(api.Domain{}, "Since"), cmpopts.IgnoreFields(api.Exit{}, "P50NS", "P99NS")}
			if diff := cmp.Diff(tt.want, got, opts); diff != "" {
				t.Errorf("domain (-want +got)\n%s", diff)
			}
		})
	}
}

func TestVCPUs(t *testing.T) {
	counts := &ledger.Total{VCPUs: []ledger.VCPU{{ID: 0, TID: 10, Exits: 1}, {ID: 4, TID: 14, Exits: 2}, {ID: 5, TID: 15, Exits: 3}}}
	type vcpu struct {
		id, tid int
		exits   uint64
	}
	for _, tt := range []struct {
		name     string
		identity vmmap.Domain
		want     []vcpu
	}{
		{"nobody knows", vmmap.Domain{TGID: 1}, []vcpu{{0, 10, 1}, {4, 14, 2}, {5, 15, 3}}},
		{"libvirt's numbers", vmmap.Domain{TGID: 1, VCPUs: map[int]int{10: 0, 14: 3, 15: 4}}, []vcpu{{0, 10, 1}, {3, 14, 2}, {4, 15, 3}}},
		{"no exit yet", vmmap.Domain{TGID: 1, VCPUs: map[int]int{10: 0, 14: 3, 15: 4, 16: 5}}, []vcpu{{0, 10, 1}, {3, 14, 2}, {4, 15, 3}, {5, 16, 0}}},
		{"too new, and KVM's number is another's", vmmap.Domain{TGID: 1, VCPUs: map[int]int{10: 0, 15: 4}}, []vcpu{{0, 10, 1}, {4, 14, 2}, {4, 15, 3}}},
		{"unplugged", vmmap.Domain{TGID: 1, VCPUs: map[int]int{10: 0, 15: 4}, Ended: map[int]int{14: 3}}, []vcpu{{0, 10, 1}, {3, 0, 2}, {4, 15, 3}}},
		{"came back, no exit yet", vmmap.Domain{TGID: 1, VCPUs: map[int]int{10: 0, 15: 4, 16: 3}, Ended: map[int]int{14: 3}}, []vcpu{{0, 10, 1}, {3, 16, 2}, {4, 15, 3}}},
		{"came back", vmmap.Domain{TGID: 1, VCPUs: map[int]int{10: 0, 14: 3, 15: 4}, Ended: map[int]int{13: 3}}, []vcpu{{0, 10, 1}, {3, 14, 2}, {4, 15, 3}}},
		{"does not run", vmmap.Domain{VCPUs: map[int]int{10: 0, 15: 4}, Ended: map[int]int{14: 3}}, []vcpu{{0, 0, 1}, {3, 0, 2}, {4, 0, 3}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []vcpu
			for _, v := range vcpus(&ledger.View{TickHz: tickHz}, &tt.identity, counts, counts) {
				got = append(got, vcpu{v.ID, v.TID, v.Exits})
			}
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(vcpu{})); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}
