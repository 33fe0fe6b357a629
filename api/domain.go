// SPDX-License-Identifier: Apache-2.0

package api

import (
	"fmt"
	"strconv"
	"strings"
)

// NotFoundError says that no domain has this id, uuid, name or run. It survives
// the way from the daemon to the client.
type NotFoundError struct{ Domain string }

func (e *NotFoundError) Error() string {
	return fmt.Sprintf("failed to get domain '%s'", e.Domain)
}

// AmbiguousError says that several domains have this name. It survives the way
// from the daemon to the client.
type AmbiguousError struct{ Domain string }

func (e *AmbiguousError) Error() string {
	return fmt.Sprintf("more than one domain is called '%s': use the id, the uuid or the run", e.Domain)
}

// Find returns the one of the domains that a user means by an id, a uuid, a name
// or a run. As virsh does, it takes
//
//  1. the running domain whose libvirt id is this number,
//  2. or else the domain that has this uuid; case and dashes do not matter,
//  3. or else the one that is called so, in all letters;
//
// and, what virsh does not know,
//
//  4. or else the run.
//
// So a domain that is called "7" gives way to the one with id 7, and one that
// is called as another's uuid is, to that other. In each step a domain that
// libvirt runs goes before a process that says it is that domain, which anybody
// can start; this before one that does not run; and of several runs of one
// domain the latest is meant. What has ended without a uuid is taken for one
// domain where the name is the same. The error is a *NotFoundError or an
// *AmbiguousError.
func Find(domains []Domain, domain string) (*Domain, error) {
	id, notID := strconv.Atoi(domain)
	uuid := plainUUID(domain)
	for _, is := range []func(*Domain) bool{
		func(d *Domain) bool { return notID == nil && d.ID != nil && *d.ID == id },
		func(d *Domain) bool { return uuid != "" && d.uuid() == uuid },
		func(d *Domain) bool { return d.Name == domain },
		func(d *Domain) bool { return d.Run != nil && *d.Run == domain },
	} {
		var found *Domain
		ambiguous := false
		for i := range domains {
			d := &domains[i]
			switch {
			case !is(d):
			case found == nil || d.rank() > found.rank():
				found, ambiguous = d, false
			case d.rank() < found.rank():
			case d.uuid() != found.uuid() || d.uuid() == "" && d.Running():
				ambiguous = true
			case d.later(found):
				found = d
			}
		}
		if ambiguous {
			return nil, &AmbiguousError{domain}
		}
		if found != nil {
			return found, nil
		}
	}
	return nil, &NotFoundError{domain}
}

// Latest returns each domain once, as virsh lists it: all that run, and of a
// domain that does not its latest run. A domain is told by its uuid and name.
func Latest(domains []Domain) []Domain {
	type identity struct{ uuid, name string }
	latest := make(map[identity]*Domain)
	for i := range domains {
		d := &domains[i]
		is := identity{d.uuid(), d.Name}
		if other := latest[is]; other == nil || d.rank() > other.rank() || d.rank() == other.rank() && d.later(other) {
			latest[is] = d
		}
	}
	list := make([]Domain, 0, len(latest))
	for i := range domains {
		if d := &domains[i]; d.Running() || d == latest[identity{d.uuid(), d.Name}] {
			list = append(list, *d)
		}
	}
	return list
}

// later tells whether d began to count after other; either may never have.
func (d *Domain) later(other *Domain) bool {
	return d.Since != nil && (other.Since == nil || d.Since.After(*other.Since))
}

// uuid is the domain's in plain letters, or nothing.
func (d *Domain) uuid() string {
	if d.UUID == nil {
		return ""
	}
	return plainUUID(*d.UUID)
}

func (d *Domain) rank() int {
	switch {
	case d.ID != nil:
		return 2
	case d.Running():
		return 1
	}
	return 0
}

// Running tells whether the domain has a process, whatever its State: a paused
// domain has one.
func (d *Domain) Running() bool { return d.TGID != 0 }

// plainUUID returns a uuid as 32 lower-case letters, or nothing when s has not
// the length of one.
func plainUUID(s string) string {
	if s = strings.ReplaceAll(s, "-", ""); len(s) != 32 {
		return ""
	}
	return strings.ToLower(s)
}
