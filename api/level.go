// SPDX-License-Identifier: Apache-2.0

package api

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// DomainLevel is the body of PUT /v1/domains/{id|name|uuid|run}/level, and, with
// all fields set, the answer to GET and PUT.
type DomainLevel struct {
	Schema string `json:"schema,omitempty"`
	Domain string `json:"domain,omitempty"` // its name
	// Level is "off", "count", "time" or "recent"; null: the default, that of
	// all domains. In an answer it is never null.
	Level   *string `json:"level"`
	Default bool    `json:"default,omitempty"` // Level is that of all domains
}

// ConflictError says that a request is understood but impossible as things are.
// It travels with the HTTP status 409.
type ConflictError struct{ Reason string }

func (e *ConflictError) Error() string { return e.Reason }

// The limits of a Duty: of what is on, of what is off, and of the whole.
const (
	MinDuty = 100 * time.Millisecond
	MaxDuty = time.Hour
)

// Duty says for how long in every period exits are counted.
type Duty struct {
	OnNS    int64 `json:"on_ns"`
	EveryNS int64 `json:"every_ns"` // as long as OnNS: always
}

// Always tells whether there is no pause.
func (d Duty) Always() bool { return d.OnNS == d.EveryNS }

// String is what ParseDuty reads.
func (d Duty) String() string {
	if d.Always() {
		return "always"
	}
	return fmt.Sprintf("%v/%v", time.Duration(d.OnNS), time.Duration(d.EveryNS))
}

// Check tells what is wrong with d.
func (d Duty) Check() error {
	on, every := time.Duration(d.OnNS), time.Duration(d.EveryNS)
	switch {
	case on < MinDuty:
		return fmt.Errorf("duty: %v of collection is shorter than %v", on, MinDuty)
	case every > MaxDuty:
		return fmt.Errorf("duty: a period of %v is longer than %v", every, MaxDuty)
	case on > every:
		return fmt.Errorf("duty: %v of collection does not fit in every %v", on, every)
	case on != every && every-on < MinDuty:
		return fmt.Errorf("duty: a pause of %v is shorter than %v", every-on, MinDuty)
	}
	return nil
}

// ParseDuty reads a duty as people write it: "1s/10s", one second in every ten,
// or "always".
func ParseDuty(s string) (Duty, error) {
	if s == "always" {
		return Duty{OnNS: int64(time.Second), EveryNS: int64(time.Second)}, nil
	}
	first, second, found := strings.Cut(s, "/")
	on, err1 := time.ParseDuration(first)
	every, err2 := time.ParseDuration(second)
	if !found || err1 != nil || err2 != nil {
		return Duty{}, errors.New("duty: two durations are wanted, such as 1s/10s, or always")
	}
	d := Duty{OnNS: int64(on), EveryNS: int64(every)}
	return d, d.Check()
}
