// SPDX-License-Identifier: Apache-2.0

package report

import (
	"cmp"
	"slices"
	"time"

	"virtexit/api"
)

// Sum adds up reports, each over an interval. What several say of a domain is
// one domain in the sum, also when it was started anew between them. Percentiles
// can't be added up: an exit that several have has none.
type Sum struct {
	Reports    uint64
	Begin, End time.Time
	interval   time.Duration
	domains    map[domainKey]*domainSum
	inOrder    []*domainSum
}

type domainKey struct {
	uuid, name string // the run where there is no uuid
	tgid       int
}

type domainSum struct {
	api.Domain
	vcpus map[int]*api.VCPU
	exits map[exitKey]*exitSum
}

type exitSum struct {
	api.Exit
	timed uint64 // exits
}

type exitKey struct {
	isa    string
	code   uint32
	reason string
}

// Add adds a report. It keeps nothing of it that can change.
func (s *Sum) Add(r api.Report) {
	begin := r.Time.Add(-time.Duration(r.IntervalNS))
	if s.Reports == 0 || begin.Before(s.Begin) {
		s.Begin = begin
	}
	if r.Time.After(s.End) {
		s.End = r.Time
	}
	s.Reports++
	s.interval += time.Duration(r.IntervalNS)
	if s.domains == nil {
		s.domains = map[domainKey]*domainSum{}
	}
	for i := range r.Domains {
		d := &r.Domains[i]
		key := domainKey{name: d.Name, tgid: d.TGID}
		switch {
		case d.UUID != nil:
			key = domainKey{uuid: *d.UUID}
		case d.Run != nil:
			key = domainKey{uuid: *d.Run}
		}
		sum := s.domains[key]
		if sum == nil {
			sum = &domainSum{vcpus: map[int]*api.VCPU{}, exits: map[exitKey]*exitSum{}}
			s.domains[key] = sum
			s.inOrder = append(s.inOrder, sum)
		}
		sum.add(d)
	}
}

func (s *domainSum) add(d *api.Domain) {
	sum := *d // who it is, as the latest says
	sum.Since = s.Since
	if sum.Since == nil {
		sum.Since = d.Since
	}
	sum.WallNS += s.WallNS
	sum.SpanNS += s.SpanNS
	sum.Count += s.Count
	sum.Time = add(s.Time, d.Time)
	s.Domain = sum
	for _, v := range d.VCPUs {
		if before := s.vcpus[v.ID]; before != nil {
			v.Exits += before.Exits
			v.Time = add(before.Time, v.Time)
		}
		s.vcpus[v.ID] = &v
	}
	for _, e := range d.Exits {
		key := exitKey{e.ISA, e.Code, e.Reason}
		sum := exitSum{e, timedOf(e)}
		if before := s.exits[key]; before != nil {
			sum.Count += before.Count
			sum.timed += before.timed
			sum.TimeNS += before.TimeNS
			sum.UserNS += before.UserNS
			sum.P50NS, sum.P99NS = nil, nil
			if e.MaxNS == nil || before.MaxNS != nil && *before.MaxNS > *e.MaxNS {
				sum.MaxNS = before.MaxNS
			}
		}
		s.exits[key] = &sum
	}
}

// timedOf is how many exits a mean is of.
func timedOf(e api.Exit) uint64 {
	switch {
	case e.MeanNS == nil:
		return 0
	case *e.MeanNS == 0:
		return e.Count
	}
	return min(e.TimeNS / *e.MeanNS, e.Count)
}

// Report is the sum.
func (s *Sum) Report() api.Report {
	r := api.Report{Schema: api.Schema, Time: s.End, IntervalNS: int64(s.interval), Domains: []api.Domain{}}
	for _, d := range s.inOrder {
		r.Domains = append(r.Domains, d.report())
	}
	return r
}

func (s *domainSum) report() api.Domain {
	d := s.Domain
	d.Rate, d.RateNS = perSecond(d.Count, d.SpanNS), d.SpanNS
	d.TimePct = d.Time.Pct()
	d.GuestNS, d.GuestPct = d.Time.GuestNS, d.TimePct.Guest
	d.VCPUs = []api.VCPU{}
	for _, v := range s.vcpus {
		v := *v
		v.Rate = perSecond(v.Exits, d.SpanNS)
		v.GuestNS, v.GuestPct = v.Time.GuestNS, v.Time.Pct().Guest
		d.VCPUs = append(d.VCPUs, v)
	}
	slices.SortFunc(d.VCPUs, func(a, b api.VCPU) int { return cmp.Compare(a.ID, b.ID) })
	d.Exits = []api.Exit{}
	for _, sum := range s.exits {
		e := sum.Exit
		e.Rate = perSecond(e.Count, d.SpanNS)
		if d.Count > 0 {
			e.Share = float64(e.Count) / float64(d.Count)
		}
		if sum.timed > 0 {
			mean := e.TimeNS / sum.timed
			e.MeanNS = &mean
		}
		d.Exits = append(d.Exits, e)
	}
	slices.SortFunc(d.Exits, func(a, b api.Exit) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.ISA, b.ISA), cmp.Compare(a.Code, b.Code), cmp.Compare(a.Reason, b.Reason))
	})
	return d
}

func perSecond(n uint64, span int64) float64 {
	if span <= 0 {
		return 0
	}
	return float64(n) / (float64(span) / 1e9)
}

func add(a, b api.Times) api.Times {
	return api.Times{
		GuestNS:   a.GuestNS + b.GuestNS,
		KVMNS:     a.KVMNS + b.KVMNS,
		UserNS:    a.UserNS + b.UserNS,
		PollNS:    a.PollNS + b.PollNS,
		HaltedNS:  a.HaltedNS + b.HaltedNS,
		WaitNS:    a.WaitNS + b.WaitNS,
		OutsideNS: a.OutsideNS + b.OutsideNS,
	}
}
