// SPDX-License-Identifier: Apache-2.0

package api

import "time"

// LogQuery holds the parameters of GET /v1/domains/{id|name|uuid|run}/log.
type LogQuery struct {
	VCPU   *int   // this one alone
	Reason string // this one alone, by its name, in whatever case
	Limit  int    // the latest of these; 0: all, or none when followed
}

// Log is the answer to GET /v1/domains/{id|name|uuid|run}/log: the exits that are
// kept, some hundred for each vCPU.
type Log struct {
	Schema  string       `json:"schema"`
	Domain  string       `json:"domain"`  // its name
	Exits   []LoggedExit `json:"exits"`   // latest first
	Logged  uint64       `json:"logged"`  // exits of all vCPUs since the level is "recent"
	Overrun uint64       `json:"overrun"` // of these, overwritten by later ones
}

// LoggedExit is one exit.
type LoggedExit struct {
	Time       time.Time `json:"time"`
	VCPU       int       `json:"vcpu"`
	ISA        string    `json:"isa"`
	Code       uint32    `json:"code"`
	Reason     string    `json:"reason"`      // the kernel's own name
	DurationNS *uint64   `json:"duration_ns"` // to the next entry, halts and all; null when none has followed
	RIP        string    `json:"rip"`         // the guest's, hexadecimal; "0x0" where it is hidden from the host
}

// LogLine is one line of the answer when the log is followed: NDJSON, oldest
// first. The first line has Schema and Domain. Each line after that is either an
// exit that has ended, or tells of exits that were overwritten before they were
// read, because there were too many or the client was too slow, or is the last
// and says why there are no more. Without such a line the domain has ended.
type LogLine struct {
	Schema string `json:"schema,omitempty"`
	Domain string `json:"domain,omitempty"`
	*LoggedExit
	Overrun uint64 `json:"overrun,omitempty"`
	Error   string `json:"error,omitempty"`
}
