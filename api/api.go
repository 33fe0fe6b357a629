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
	Schema           string  `json:"schema"`
	Version          string  `json:"version"`           // of the daemon
	Collection       string  `json:"collection"`        // "on", "off"
	Level            string  `json:"level"`             // in force: "off", "pause", "count", "time", "recent"; some domains may have one of their own
	Collector        *string `json:"collector"`         // "kmod", "ebpf", "kvmstats", "replay"; null when there is none
	Tried            []Tried `json:"tried,omitempty"`   // collectors that were tried and not taken, the best first
	Problem          string  `json:"problem,omitempty"` // why nothing is collected, in a sentence
	CollectorVersion string  `json:"collector_version,omitempty"`
	Hook             string  `json:"hook"`   // "none", "tracepoint", "patch"
	Kernel           string  `json:"kernel"` // release
	ISA              string  `json:"isa"`    // "vmx", "svm", "arm64", "pvm", "none"; "isa" and KVM's number of another
	// HookCycles is the estimate of what the hook takes an exit and the entry
	// after it, in TSC cycles; 0: unknown.
	HookCycles int   `json:"hook_cycles"`
	Duty       *Duty `json:"duty"` // null: always
	Slots      Slots `json:"slots"`
	// Exits = those of all domains, present and past, + Unattributed + Missed.
	Exits        uint64    `json:"exits"`        // that the kernel has counted; also by a collector that was since unloaded
	Unattributed uint64    `json:"unattributed"` // of these, charged to no vCPU
	Missed       uint64    `json:"missed"`       // of these, released by another reader, or when the daemon's state was lost
	TotalsSince  time.Time `json:"totals_since"` // all totals began then; by a daemon before this one, if its state was kept
	ObservedNS   int64     `json:"observed_ns"`  // of the time since then, that in which exits were counted
	Libvirt      Libvirt   `json:"libvirt"`
	Since        time.Time `json:"since"` // the daemon's start
	CPU          CPU       `json:"cpu"`
}

// Tried is a collector that was not taken.
type Tried struct {
	Collector string `json:"collector"` // "kmod", "ebpf", "kvmstats"
	Refused   string `json:"refused"`   // why, in a sentence
	Gain      string `json:"gain"`      // what it has that those tried after it have not
}

// Slots tells how much of the kernel's memory for counters is used.
type Slots struct {
	Live    int `json:"live"`
	Retired int `json:"retired"`
	Backed  int `json:"backed"`
	Max     int `json:"max"` // 0: as many as there are vCPUs
}

// CPU is the daemon's processor time, in percent of one CPU.
type CPU struct {
	TotalPct  float64 `json:"total_pct"`  // since its start
	LatestPct float64 `json:"latest_pct"` // over the latest sampling period
}

// Libvirt tells how the connection that names domains is.
type Libvirt struct {
	Connected bool   `json:"connected"`
	URI       string `json:"uri"`
	Error     string `json:"error,omitempty"`
}

// Domains is the answer to GET /v1/domains. Counts and times are totals; rates
// and percentages are those over the daemon's latest sampling period in which
// it counted. A domain is there once for each of its runs, that is processes,
// that is known, and once where none is: see Latest.
type Domains struct {
	Schema string `json:"schema"`
	// Seq is the number of that period. It grows by one with each, and begins
	// anew with the daemon.
	Seq         uint64    `json:"seq"`
	DaemonSince time.Time `json:"daemon_since"` // as Status.Since
	Time        time.Time `json:"time"`         // of the totals
	Domains     []Domain  `json:"domains"`
}

// OneDomain is the answer to GET /v1/domains/{id|name|uuid|run}.
type OneDomain struct {
	Schema string `json:"schema"`
	Domain
}

// Report is the answer to GET /v1/report, and a line of that to GET /v1/watch.
type Report struct {
	Schema     string    `json:"schema"`
	Seq        uint64    `json:"seq,omitempty"` // number of the line; an interval begins where the one before it ended
	Total      bool      `json:"total"`         // counted since each domain's Since, otherwise over the interval
	Time       time.Time `json:"time"`          // the end of the interval
	IntervalNS int64     `json:"interval_ns"`   // 0 when Total
	Domains    []Domain  `json:"domains"`
}

// Domain is one guest with the counts of one run.
type Domain struct {
	ID     *int       `json:"id"` // libvirt's; null when the host's libvirt does not run it
	Name   string     `json:"name"`
	UUID   *string    `json:"uuid"`          // null when unknown
	Run    *string    `json:"run"`           // its process, among all that ever were; null when none is known
	TGID   int        `json:"tgid"`          // 0 when not running
	UID    *int       `json:"uid,omitempty"` // of the user that runs its process; absent when unknown
	State  string     `json:"state"`
	Source string     `json:"source"` // what named it: "libvirt", "rundir", "proc", "process"
	Level  string     `json:"level"`  // in force: "off", also while paused; "count", "time", "recent"
	Since  *time.Time `json:"since"`  // counting began, at 0: another one than before tells of another run; null when nothing was counted
	// Title, Description and Cloud are what libvirt's XML of the domain says.
	Title       string `json:"title,omitempty"`
	Description string `json:"description,omitempty"`
	Cloud       *Cloud `json:"cloud,omitempty"` // absent when no known cloud manages the domain
	// WallNS is the time that the counts cover. SpanNS is the part of it that
	// was observed, all of it unless collection paused; rate = count / span.
	WallNS   int64   `json:"wall_ns"`
	SpanNS   int64   `json:"span_ns"`
	Count    uint64  `json:"count"`     // exits, all reasons
	Rate     float64 `json:"rate"`      // exits a second
	RateNS   int64   `json:"rate_ns"`   // the time observed that Rate and TimePct, and those of vCPUs and reasons, are of
	Time     Times   `json:"time"`      // of all vCPUs
	TimePct  TimePct `json:"time_pct"`  // its shares, over what Rate covers
	GuestNS  uint64  `json:"guest_ns"`  // of Time
	GuestPct float64 `json:"guest_pct"` // of TimePct
	VCPUs    []VCPU  `json:"vcpus"`
	Exits    []Exit  `json:"exits"` // most frequent first

	Container *Container `json:"container,omitempty"` // where its process lives; absent when on the host itself
}

// Container tells of the container that a domain's process lives in.
type Container struct {
	ID  *string `json:"id"`  // the runtime's; null when unknown
	Pod *string `json:"pod"` // Kubernetes' uid of the pod; null when it is none
	PID int     `json:"pid"` // of the process in its own pid namespace
}

// Cloud is who a domain is in the system that manages it, as that system wrote
// it into the domain's metadata. What it did not write is absent.
type Cloud struct {
	System       string `json:"system"`                  // "ovirt", "nova", "kubevirt"
	Name         string `json:"name,omitempty"`          // the system's name of the guest
	InstanceUUID string `json:"instance_uuid,omitempty"` // its id of it: oVirt's VM, Nova's instance, KubeVirt's VirtualMachineInstance
	Namespace    string `json:"namespace,omitempty"`     // KubeVirt's
	Project      string `json:"project,omitempty"`       // Nova's, by name
	ProjectID    string `json:"project_id,omitempty"`
	User         string `json:"user,omitempty"` // Nova's, by name: who made it
	UserID       string `json:"user_id,omitempty"`
	Flavor       string `json:"flavor,omitempty"` // Nova's
}

// VCPU is one virtual CPU.
type VCPU struct {
	ID       int     `json:"id"`
	TID      int     `json:"tid"` // the thread that runs it; 0 when none does, as after it was unplugged
	Exits    uint64  `json:"exits"`
	Rate     float64 `json:"rate"`
	Time     Times   `json:"time"`
	GuestNS  uint64  `json:"guest_ns"`  // of Time
	GuestPct float64 `json:"guest_pct"` // of the sum of Time
}

// Times says where the observed wall time of vCPU threads went. Their sum is
// that time; it is 0 where no times are measured, as at level count.
type Times struct {
	GuestNS   uint64 `json:"guest_ns"`
	KVMNS     uint64 `json:"kvm_ns"`  // KVM handled an exit
	UserNS    uint64 `json:"user_ns"` // user space (QEMU) handled an exit
	PollNS    uint64 `json:"poll_ns"` // KVM polled for the end of a halt
	HaltedNS  uint64 `json:"halted_ns"`
	WaitNS    uint64 `json:"wait_ns"`    // waiting for a CPU
	OutsideNS uint64 `json:"outside_ns"` // out of KVM with no exit to handle
}

// Sum is the wall time of the vCPU threads.
func (t Times) Sum() uint64 {
	return t.GuestNS + t.KVMNS + t.UserNS + t.PollNS + t.HaltedNS + t.WaitNS + t.OutsideNS
}

// TimePct is how many percent of a sum each of the Times is. All are 0 where
// that is 0.
type TimePct struct {
	Guest   float64 `json:"guest"`
	KVM     float64 `json:"kvm"`
	User    float64 `json:"user"`
	Poll    float64 `json:"poll"`
	Halted  float64 `json:"halted"`
	Wait    float64 `json:"wait"`
	Outside float64 `json:"outside"`
}

// Pct returns the shares of the sum.
func (t Times) Pct() TimePct {
	sum := t.Sum()
	pct := func(part uint64) float64 {
		if sum == 0 {
			return 0
		}
		return 100 * float64(part) / float64(sum)
	}
	return TimePct{
		Guest:   pct(t.GuestNS),
		KVM:     pct(t.KVMNS),
		User:    pct(t.UserNS),
		Poll:    pct(t.PollNS),
		Halted:  pct(t.HaltedNS),
		Wait:    pct(t.WaitNS),
		Outside: pct(t.OutsideNS),
	}
}

// Exit is one reason's share of a domain's exits. The times are those of
// handling, by KVM and by user space: not those of a halt or of waiting for a
// CPU. Percentiles are interpolated in a log2 distribution. Those that can be
// null are when no exit was timed.
type Exit struct {
	ISA    string  `json:"isa"`
	Code   uint32  `json:"code"`
	Reason string  `json:"reason"` // the kernel's own name
	Count  uint64  `json:"count"`
	Rate   float64 `json:"rate"`
	Share  float64 `json:"share"` // of the domain's exits, 0..1
	TimeNS uint64  `json:"time_ns"`
	UserNS uint64  `json:"user_ns"` // of TimeNS, by user space (QEMU)
	MeanNS *uint64 `json:"mean_ns"`
	P50NS  *uint64 `json:"p50_ns"`
	P99NS  *uint64 `json:"p99_ns"`
	MaxNS  *uint64 `json:"max_ns"` // over an interval: exact for the longest so far, else at most twice too high
}

// Collection is the body of PUT /v1/collection.
type Collection struct {
	Collection string `json:"collection"`      // "on", "off"
	Level      string `json:"level,omitempty"` // with "on": "count", "time", "recent"; the configured one when absent
	Duty       *Duty  `json:"duty,omitempty"`  // with "on"; the configured one when absent
}

// Error is the body of every answer that is not a success, and the last line of
// a stream that fails. With Domain, the HTTP status 404 stands for a
// NotFoundError and 409 for an AmbiguousError.
type Error struct {
	Schema  string  `json:"schema"`
	Message string  `json:"error"`
	Domain  *string `json:"domain,omitempty"` // the one asked for, where it is at fault
}
