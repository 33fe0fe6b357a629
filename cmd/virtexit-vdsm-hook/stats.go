// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	"virtexit/api"
)

// key is what is added to a VM's statistics and to the host's capabilities.
const key = "kvmExits"

// schema is carried by what is added.
const schema = "virtexit-vdsm/v1"

// maxReasons is how many reasons of a VM are told apart.
const maxReasons = 8

// vmExits is what the statistics of a VM gain. Totals are those since Since, of
// the VM's process on this host; rates and percentages those of the latest
// WindowNS of them. Times that end in _ns are nanoseconds.
type vmExits struct {
	Schema   string      `json:"schema"`
	Level    string      `json:"level"`     // "off", "count", "time", "recent"
	Since    *time.Time  `json:"since"`     // null when nothing was counted
	SpanNS   int64       `json:"span_ns"`   // of the time since then, that in which exits were counted
	WindowNS int64       `json:"window_ns"` // as SpanNS
	Total    uint64      `json:"total"`     // exits
	Rate     float64     `json:"rate"`      // exits a second
	Reasons  []vmReason  `json:"reasons"`   // those with most exits, these first
	Other    vmOther     `json:"other"`     // all others; with them the sum is Total
	Time     api.Times   `json:"time"`      // of all vCPUs
	TimePct  api.TimePct `json:"time_pct"`
}

// vmReason is one reason of a VM's exits. The times are those of handling; they
// are 0, and null, when no exit was timed.
type vmReason struct {
	Reason string  `json:"reason"` // the kernel's own name
	Count  uint64  `json:"count"`
	Rate   float64 `json:"rate"`
	TimeNS uint64  `json:"time_ns"`
	MeanNS *uint64 `json:"mean_ns"`
	P99NS  *uint64 `json:"p99_ns"`
}

// vmOther sums reasons up.
type vmOther struct {
	Count  uint64  `json:"count"`
	Rate   float64 `json:"rate"`
	TimeNS uint64  `json:"time_ns"`
}

// hostExits is what the capabilities of the host gain: how exits are collected.
type hostExits struct {
	Schema     string  `json:"schema"`
	Version    string  `json:"version"`    // virtexitd's
	Collection string  `json:"collection"` // "on", "off"
	Level      string  `json:"level"`      // in force: as api.Status.Level
	Collector  *string `json:"collector"`  // null when there is none
	Hook       string  `json:"hook"`       // "none", "tracepoint", "patch"
	ISA        string  `json:"isa"`        // as api.Status.ISA
	Problem    *string `json:"problem"`    // why nothing is collected; null when all is well
}

func newVMExits(d *api.Domain) vmExits {
	v := vmExits{
		Schema:   schema,
		Level:    d.Level,
		Since:    d.Since,
		SpanNS:   d.SpanNS,
		WindowNS: d.RateNS,
		Total:    d.Count,
		Rate:     d.Rate,
		Reasons:  []vmReason{},
		Time:     d.Time,
		TimePct:  d.TimePct,
	}
	for i, e := range d.Exits {
		if i < maxReasons {
			v.Reasons = append(v.Reasons, vmReason{e.Reason, e.Count, e.Rate, e.TimeNS, e.MeanNS, e.P99NS})
			continue
		}
		v.Other.Count += e.Count
		v.Other.Rate += e.Rate
		v.Other.TimeNS += e.TimeNS
	}
	return v
}

func newHostExits(s *api.Status) hostExits {
	h := hostExits{
		Schema:     schema,
		Version:    s.Version,
		Collection: s.Collection,
		Level:      s.Level,
		Collector:  s.Collector,
		Hook:       s.Hook,
		ISA:        s.ISA,
	}
	if s.Problem != "" {
		h.Problem = &s.Problem
	}
	return h
}

// stats adds the exits to each VM in a list of statistics. A VM that virtexitd
// does not know gains nothing.
func (h *hook) stats(ctx context.Context, text []byte) ([]edit, error) {
	vms, list, err := parse(text)
	if err != nil {
		return nil, err
	}
	if !list {
		return nil, errors.New("statistics are no list")
	}
	ids := make([]string, len(vms))
	for i := range vms {
		if id, ok := vms[i].values["vmId"]; ok && text[id.from] == '"' {
			if ids[i], err = unquote(text[id.from:id.to]); err != nil {
				return nil, err
			}
		}
	}
	find, err := h.domains(ctx, ids)
	if err != nil {
		return nil, err
	}
	var edits []edit
	for i := range vms {
		d := find(ids[i])
		if d == nil {
			continue
		}
		value, err := json.Marshal(newVMExits(d))
		if err != nil {
			return nil, err
		}
		edits = append(edits, vms[i].set(key, value))
	}
	return edits, nil
}

// domains asks for what runs and returns what finds the domain of a VM.
func (h *hook) domains(ctx context.Context, ids []string) (find func(id string) *api.Domain, err error) {
	ids = slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return id == "" })
	byUUID := make(map[string][]api.Domain)
	add := func(d api.Domain) {
		if d.UUID != nil && d.Running() {
			byUUID[plain(*d.UUID)] = append(byUUID[plain(*d.UUID)], d)
		}
	}
	switch len(ids) {
	case 0:
	case 1: // no need to be told of all
		d, err := h.client.Domain(ctx, ids[0])
		var notFound *api.NotFoundError
		if err != nil && !errors.As(err, &notFound) {
			return nil, err
		}
		add(d.Domain)
	default:
		all, err := h.client.Domains(ctx)
		if err != nil {
			return nil, err
		}
		for _, d := range all.Domains {
			add(d)
		}
	}
	return func(id string) *api.Domain {
		d, err := api.Find(byUUID[plain(id)], id)
		if err != nil {
			return nil
		}
		return d
	}, nil
}

// plain makes spellings of a uuid equal.
func plain(uuid string) string { return strings.ToLower(strings.ReplaceAll(uuid, "-", "")) }

// caps adds to the host's capabilities how exits are collected.
func (h *hook) caps(ctx context.Context, text []byte) ([]edit, error) {
	host, list, err := parse(text)
	if err != nil {
		return nil, err
	}
	if list {
		return nil, errors.New("capabilities are a list")
	}
	status, err := h.client.Status(ctx)
	if err != nil {
		return nil, err
	}
	value, err := json.Marshal(newHostExits(&status))
	if err != nil {
		return nil, err
	}
	return []edit{host[0].set(key, value)}, nil
}
