// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"cmp"
	"fmt"
	"iter"
	"slices"
	"time"

	"virtexit/api"
	"virtexit/internal/exitreason"
	"virtexit/internal/ledger"
	"virtexit/internal/snapshot"
	"virtexit/vmmap"
)

// list makes the domains of all processes in the view, and of those that took
// no exit. pick chooses, from a process's total, what its counts are and what
// its rates are made of.
func (d *Daemon) list(view *ledger.View, pick func(*ledger.Total) (counts, rates *ledger.Total)) []api.Domain {
	domains := make([]api.Domain, 0, len(view.Processes))
	for identity, total := range d.each(view) {
		var counts, rates *ledger.Total
		if total != nil {
			counts, rates = pick(total)
		}
		domains = append(domains, d.domain(view, identity, counts, rates))
	}
	return domains
}

// Counts returns the latest totals and, with the total of each, all domains;
// that of a domain which was never counted is nil.
func (d *Daemon) Counts() (*ledger.View, iter.Seq2[vmmap.Domain, *ledger.Total]) {
	view := d.latest()
	return view, d.each(view)
}

// each tells who the processes in the view are, and then of the domains that
// took no exit.
func (d *Daemon) each(view *ledger.View) iter.Seq2[vmmap.Domain, *ledger.Total] {
	return func(yield func(vmmap.Domain, *ledger.Total) bool) {
		processes := make(map[snapshot.Process]bool)
		uuids := make(map[string]bool)
		for p, total := range view.Processes {
			identity, known := d.config.Identities.Lookup(p, total.Comm)
			if !known && !total.Live {
				identity.TGID, identity.State = 0, vmmap.ShutOff
			}
			if !yield(identity, total) {
				return
			}
			processes[p] = true
			if identity.UUID != "" {
				uuids[identity.UUID] = true
			}
		}
		for _, identity := range d.config.Identities.Domains() {
			switch {
			case identity.TGID != 0 && processes[snapshot.Process{TGID: identity.TGID, Start: identity.Start}.InProc()]:
			case identity.TGID == 0 && identity.ID == nil && uuids[identity.UUID]: // the counts of its last run are known
			default:
				if !yield(identity, nil) {
					return
				}
			}
		}
	}
}

// runOf names a process. What ended before the host booted began before that,
// which the ledger keeps modulo 2^64.
func runOf(p snapshot.Process) string {
	return fmt.Sprintf("%d-%d", p.TGID, int64(p.Start)/int64(10*time.Millisecond))
}

// running tells of the domains that are reported when none is named.
func running(d *api.Domain) bool { return d.Running() }

// ran does so for an interval that the counts are of, in which one may have ended.
func ran(d *api.Domain) bool { return d.Running() || d.Count > 0 }

// choose returns the domains that the names mean, each once; without names, all
// that unnamed picks.
func choose(domains []api.Domain, names []string, unnamed func(*api.Domain) bool) ([]api.Domain, error) {
	var chosen []api.Domain
	if len(names) == 0 {
		for i := range domains {
			if unnamed(&domains[i]) {
				chosen = append(chosen, domains[i])
			}
		}
		return chosen, nil
	}
	taken := make(map[*api.Domain]bool)
	for _, name := range names {
		d, err := api.Find(domains, name)
		if err != nil {
			return nil, err
		}
		if !taken[d] {
			taken[d] = true
			chosen = append(chosen, *d)
		}
	}
	return chosen, nil
}

// domain makes the API's domain. counts and rates are nil for a domain that
// was never counted.
func (d *Daemon) domain(view *ledger.View, identity vmmap.Domain, counts, rates *ledger.Total) api.Domain {
	out := api.Domain{
		ID:     identity.ID,
		Name:   identity.Name,
		TGID:   identity.TGID,
		UID:    identity.UID,
		State:  string(identity.State),
		Source: identity.Source,
		Level:  snapshot.Off.String(),
	}
	out.Title, out.Description, out.Cloud = identity.Title, identity.Description, (*api.Cloud)(identity.Cloud)
	if identity.UUID != "" {
		out.UUID = &identity.UUID
	}
	if c := identity.Container; c != nil {
		out.Container = &api.Container{PID: c.PID}
		if c.ID != "" {
			out.Container.ID = &c.ID
		}
		if c.Pod != "" {
			out.Container.Pod = &c.Pod
		}
	}
	p := snapshot.Process{TGID: identity.TGID, Start: identity.Start}
	if counts != nil {
		p = counts.Process
	}
	if p.TGID != 0 {
		run := runOf(p)
		out.Run = &run
	}
	if counts != nil {
		since := d.wall(counts.Since)
		out.Since = &since
		out.WallNS, out.SpanNS = int64(counts.Wall), int64(counts.Span)
		out.Count = counts.Exits
		out.Rate, out.RateNS = perSecond(rates.Exits, rates.Span), int64(rates.Span)
		out.Time = times(counts.Times, view.TickHz)
		out.TimePct = times(rates.Times, view.TickHz).Pct()
		out.GuestNS, out.GuestPct = out.Time.GuestNS, out.TimePct.Guest
		if counts.Level > snapshot.Pause {
			out.Level = counts.Level.String()
		}
		out.Exits = exits(view, counts, rates)
	}
	out.VCPUs = vcpus(view, &identity, counts, rates)
	return out
}

// vcpus returns the vCPUs by number: libvirt's where the thread is known to
// libvirt, otherwise KVM's. As these may differ, two can have one number while a
// vCPU is too new for libvirt's to be known; they are kept apart.
func vcpus(view *ledger.View, identity *vmmap.Domain, counts, rates *ledger.Total) []api.VCPU {
	type vcpu struct {
		api.VCPU
		total, recent snapshot.Times
	}
	type number struct {
		n     int
		known bool
	}
	byNumber := make(map[number]*vcpu)
	get := func(tid, kvm int) *vcpu {
		id := number{n: kvm}
		if n, ok := identity.VCPU(tid); ok {
			id = number{n, true}
		}
		v := byNumber[id]
		if v == nil {
			v = &vcpu{VCPU: api.VCPU{ID: id.n}}
			byNumber[id] = v
		}
		if _, gone := identity.Ended[tid]; !gone && identity.TGID != 0 {
			v.TID = tid
		}
		return v
	}
	if counts != nil {
		for _, c := range counts.VCPUs {
			v := get(c.TID, c.ID)
			v.Exits += c.Exits
			v.total = v.total.Add(c.Times)
		}
		for _, r := range rates.VCPUs {
			v := get(r.TID, r.ID)
			v.Rate += perSecond(r.Exits, rates.Span)
			v.recent = v.recent.Add(r.Times)
		}
	}
	for tid, n := range identity.VCPUs { // those that took no exit
		get(tid, n)
	}
	list := make([]api.VCPU, 0, len(byNumber))
	for _, v := range byNumber {
		v.Time = times(v.total, view.TickHz)
		v.GuestNS, v.GuestPct = v.Time.GuestNS, times(v.recent, view.TickHz).Pct().Guest
		list = append(list, v.VCPU)
	}
	slices.SortFunc(list, func(a, b api.VCPU) int { return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.TID, b.TID)) })
	return list
}

func times(t snapshot.Times, hz uint64) api.Times {
	return api.Times{
		GuestNS:   snapshot.NS(t.Guest, hz),
		KVMNS:     snapshot.NS(t.KVM, hz),
		UserNS:    snapshot.NS(t.User, hz),
		PollNS:    snapshot.NS(t.Poll, hz),
		HaltedNS:  snapshot.NS(t.Halted, hz),
		WaitNS:    snapshot.NS(t.Wait, hz),
		OutsideNS: snapshot.NS(t.Outside, hz),
	}
}

// exits returns the reasons, most frequent first.
func exits(view *ledger.View, counts, rates *ledger.Total) []api.Exit {
	list := make([]api.Exit, 0, len(counts.Rows))
	for i := range counts.Rows {
		r := &counts.Rows[i]
		e := api.Exit{
			ISA:    r.ISA.String(),
			Code:   r.Code,
			Reason: exitreason.Name(r.ISA, r.Code),
			Count:  r.Count,
			TimeNS: snapshot.NS(r.Time, view.TickHz),
			UserNS: snapshot.NS(r.User, view.TickHz),
		}
		if r.Other {
			e.Code, e.Reason = 0, "other"
		}
		if counts.Exits > 0 {
			e.Share = float64(r.Count) / float64(counts.Exits)
		}
		if now := rates.Find(r); now != nil {
			e.Rate = perSecond(now.Count, rates.Span)
		}
		if timed := r.Timed(); timed > 0 {
			ns := func(ticks uint64) *uint64 {
				ns := snapshot.NS(ticks, view.TickHz)
				return &ns
			}
			quantile := func(q float64) *uint64 {
				ticks, _ := r.Quantile(q)
				return ns(ticks)
			}
			e.MeanNS, e.P50NS, e.P99NS, e.MaxNS = ns(r.Time/timed), quantile(0.5), quantile(0.99), ns(r.Max)
		}
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b api.Exit) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.ISA, b.ISA), cmp.Compare(a.Code, b.Code))
	})
	return list
}

func perSecond(n, span uint64) float64 {
	if span == 0 {
		return 0
	}
	return float64(n) * float64(time.Second) / float64(span)
}
