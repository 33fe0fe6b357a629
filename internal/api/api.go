// SPDX-License-Identifier: Apache-2.0

// Package api holds the types that travel between virtexitd and its clients
// as JSON over a unix socket. Times that end in _ns are nanoseconds.
package api

import "time"

// Schema is carried by every answer.
const Schema = "virtexit/v1"

// DefaultSocket is where the daemon listens.
const DefaultSocket = "/run/virtexit/virtexit.sock"

// The interval of a report.
const (
	DefaultInterval = time.Second
	MinInterval     = 100 * time.Millisecond
	MaxInterval     = time.Hour
)

// Status is the answer to GET /v1/status and PUT /v1/collection.
type Status struct {
	Schema     string  `json:"schema"`
	Version    string  `json:"version"`           // of the daemon
	Collection string  `json:"collection"`        // "on", "off"
	Level      string  `json:"level"`             // in force: "off", "count", "time"
	Collector  *string `json:"collector"`         // "kmod", "replay"; null when there is none
	Problem    string  `json:"problem,omitempty"` // why nothing is collected, in a sentence
	Module     string  `json:"module,omitempty"`  // version of the collector
	Hook       string  `json:"hook"`              // "none", "tracepoint", "patch"
	Kernel     string  `json:"kernel"`            // release
	ISA        string  `json:"isa"`               // "vmx", "svm", "none"
	Slots      Slots   `json:"slots"`
	// Exits = those of all domains, present and past, + Unattributed + Missed.
	Exits        uint64    `json:"exits"`        // that the kernel has counted; also by a collector that was since unloaded
	Unattributed uint64    `json:"unattributed"` // of these, charged to no vCPU
	Missed       uint64    `json:"missed"`       // of these, taken by another reader or before this daemon started
	Libvirt      Libvirt   `json:"libvirt"`
	Since        time.Time `json:"since"` // the daemon's start
}

// Slots tells how much of the kernel's memory for counters is used.
type Slots struct {
	Live    int `json:"live"`
	Retired int `json:"retired"`
	Backed  int `json:"backed"`
	Max     int `json:"max"`
}

// Libvirt tells how the connection that names domains is.
type Libvirt struct {
	Connected bool   `json:"connected"`
	URI       string `json:"uri"`
	Error     string `json:"error,omitempty"`
}

// Domains is the answer to GET /v1/domains. Counts are totals; rates and
// guest_pct are those over the daemon's latest sampling period.
type Domains struct {
	Schema  string   `json:"schema"`
	Domains []Domain `json:"domains"`
}

// OneDomain is the answer to GET /v1/domains/{id|name|uuid}.
type OneDomain struct {
	Schema string `json:"schema"`
	Domain
}

// Report is the answer to GET /v1/report.
type Report struct {
	Schema     string    `json:"schema"`
	Total      bool      `json:"total"`       // counted since each domain's Since, otherwise over the interval
	Time       time.Time `json:"time"`        // the end of the interval
	IntervalNS int64     `json:"interval_ns"` // 0 when Total
	Domains    []Domain  `json:"domains"`
}

// Domain is one guest with its counts.
type Domain struct {
	ID     *int       `json:"id"` // libvirt's; null when not running under libvirt
	Name   string     `json:"name"`
	UUID   *string    `json:"uuid"` // null when unknown
	TGID   int        `json:"tgid"` // 0 when not running
	State  string     `json:"state"`
	Source string     `json:"source"` // what named it: "libvirt", "rundir", "proc", "process"
	Since  *time.Time `json:"since"`  // counting began; null when nothing was counted
	// SpanNS is the time that the counts cover; rate = count / span.
	SpanNS   int64   `json:"span_ns"`
	Count    uint64  `json:"count"`     // exits, all reasons
	Rate     float64 `json:"rate"`      // exits a second
	GuestNS  uint64  `json:"guest_ns"`  // time in the guest, all vCPUs
	GuestPct float64 `json:"guest_pct"` // of SpanNS x vCPUs
	VCPUs    []VCPU  `json:"vcpus"`
	Exits    []Exit  `json:"exits"` // most frequent first
}

// VCPU is one virtual CPU.
type VCPU struct {
	ID       int     `json:"id"`
	TID      int     `json:"tid"` // the thread that ran it last
	Exits    uint64  `json:"exits"`
	Rate     float64 `json:"rate"`
	TimeNS   uint64  `json:"time_ns"` // from exit to entry
	GuestNS  uint64  `json:"guest_ns"`
	GuestPct float64 `json:"guest_pct"`
}

// Exit is one reason's share of a domain's exits. The times are those from an
// exit to the next entry; percentiles are interpolated in a log2 distribution.
// They are null when no exit was timed.
type Exit struct {
	ISA    string  `json:"isa"`
	Code   uint32  `json:"code"`
	Reason string  `json:"reason"` // the kernel's own name
	Count  uint64  `json:"count"`
	Rate   float64 `json:"rate"`
	Share  float64 `json:"share"` // of the domain's exits, 0..1
	TimeNS uint64  `json:"time_ns"`
	MeanNS *uint64 `json:"mean_ns"`
	P50NS  *uint64 `json:"p50_ns"`
	P99NS  *uint64 `json:"p99_ns"`
	MaxNS  *uint64 `json:"max_ns"` // over an interval: exact for the longest so far, else at most twice too high
}

// Collection is the body of PUT /v1/collection.
type Collection struct {
	Collection string `json:"collection"`      // "on", "off"
	Level      string `json:"level,omitempty"` // with "on": "count", "time"; the configured one when absent
}

// Error is the body of every answer that is not a success. With Domain, the
// HTTP status 404 stands for a NotFoundError and 409 for an AmbiguousError.
type Error struct {
	Schema  string  `json:"schema"`
	Message string  `json:"error"`
	Domain  *string `json:"domain,omitempty"` // the one asked for, where it is at fault
}
