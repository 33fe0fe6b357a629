// SPDX-License-Identifier: Apache-2.0

package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"virtexit/api"
	"virtexit/internal/exitreason"
)

// query is what is asked about domains.
type query struct {
	domains  []string
	interval time.Duration // 0: totals
	selection
}

// selection is what is wanted of each domain.
type selection struct {
	reasons []string // none: all
	vcpus   []int    // none: all
}

// parseQuery reads the parameters of a path that tells of several domains: those
// known, of domain, interval, reason, total and vcpu. Its errors name the one that
// is wrong.
func parseQuery(rawQuery string, known ...string) (query, error) {
	values, err := url.ParseQuery(rawQuery)
	if err != nil {
		return query{}, fmt.Errorf("bad query %q: %w", rawQuery, err)
	}
	for key, v := range values {
		switch {
		case !slices.Contains(known, key):
			return query{}, fmt.Errorf("unknown parameter %q: known are %s", key, strings.Join(known, ", "))
		case len(v) > 1 && (key == "interval" || key == "total"):
			return query{}, fmt.Errorf("parameter %q is given %d times", key, len(v))
		}
	}
	q := query{domains: values["domain"], interval: api.DefaultInterval}
	for _, v := range values["reason"] {
		if !exitreason.KnownToAny(v) && v != "other" {
			return query{}, fmt.Errorf("parameter reason=%q: no exit is called so", v)
		}
		q.reasons = append(q.reasons, v)
	}
	for _, v := range values["vcpu"] {
		number, err := strconv.Atoi(v)
		if err != nil || number < 0 {
			return query{}, fmt.Errorf("parameter vcpu=%q: not the number of a vCPU", v)
		}
		q.vcpus = append(q.vcpus, number)
	}
	if values.Has("total") {
		if values.Has("interval") {
			return query{}, errors.New("parameters interval and total exclude each other")
		}
		switch v := values.Get("total"); v {
		case "", "1", "true":
			q.interval = 0
		default:
			return query{}, fmt.Errorf("parameter total=%q: it is given as total, total=1 or total=true, or not at all", v)
		}
	}
	if values.Has("interval") {
		v := values.Get("interval")
		q.interval, err = time.ParseDuration(v)
		if err != nil {
			return query{}, fmt.Errorf("parameter interval=%q: not a duration such as 1s or 500ms", v)
		}
		if q.interval < api.MinInterval || q.interval > api.MaxInterval {
			return query{}, fmt.Errorf("parameter interval=%q: not between %v and %v", v, api.MinInterval, api.MaxInterval)
		}
	}
	return q, nil
}

// of leaves of a domain what is selected. Its sums are still those of all.
func (s *selection) of(d *api.Domain) {
	if len(s.reasons) > 0 {
		d.Exits = slices.DeleteFunc(slices.Clone(d.Exits), func(e api.Exit) bool {
			return !slices.ContainsFunc(s.reasons, func(reason string) bool { return exitreason.Is(reason, e.Reason, e.Code) })
		})
	}
	if len(s.vcpus) > 0 {
		d.VCPUs = slices.DeleteFunc(slices.Clone(d.VCPUs), func(v api.VCPU) bool { return !slices.Contains(s.vcpus, v.ID) })
	}
}

// parseLog reads the parameters of /v1/domains/{d}/log.
func parseLog(rawQuery string) (q api.LogQuery, follow bool, err error) {
	none := func(format string, args ...any) (api.LogQuery, bool, error) {
		return api.LogQuery{}, false, fmt.Errorf(format, args...)
	}
	values, err := url.ParseQuery(rawQuery)
	if err != nil {
		return none("bad query %q: %w", rawQuery, err)
	}
	for key, v := range values {
		if len(v) > 1 {
			return none("parameter %q is given %d times", key, len(v))
		}
		number, err := strconv.Atoi(v[0])
		switch key {
		case "follow":
			if follow = v[0] == "" || v[0] == "1" || v[0] == "true"; !follow {
				return none("parameter follow=%q: it is given as follow, follow=1 or follow=true, or not at all", v[0])
			}
		case "limit":
			if err != nil || number < 1 {
				return none("parameter limit=%q: not a number of exits", v[0])
			}
			q.Limit = number
		case "vcpu":
			if err != nil || number < 0 {
				return none("parameter vcpu=%q: not the number of a vCPU", v[0])
			}
			q.VCPU = &number
		case "reason":
			if v[0] == "" {
				return none("parameter reason is empty")
			}
			q.Reason = v[0]
		default:
			return none("unknown parameter %q: known are follow, limit, reason, vcpu", key)
		}
	}
	return q, follow, nil
}

// decode reads a body that is one JSON value.
func decode(r io.Reader, v any) error {
	dec := json.NewDecoder(r)
	dec.DisallowUnknownFields()
	err := dec.Decode(v)
	if err == nil {
		switch _, err = dec.Token(); err {
		case io.EOF:
			return nil
		case nil:
			err = errors.New("more than one JSON value")
		}
	}
	return fmt.Errorf("bad body: %w", err)
}

// decodeCollection reads the body of PUT /v1/collection.
func decodeCollection(r io.Reader) (api.Collection, error) {
	var c api.Collection
	if err := decode(r, &c); err != nil {
		return api.Collection{}, err
	}
	switch c.Collection {
	case "on":
	case "off":
		if c.Level != "" || c.Duty != nil {
			return api.Collection{}, errors.New(`level and duty go with collection "on" alone`)
		}
	default:
		return api.Collection{}, fmt.Errorf(`collection is %q, must be "on" or "off"`, c.Collection)
	}
	switch c.Level {
	case "", "count", "time", "recent":
	default:
		return api.Collection{}, fmt.Errorf(`level is %q, must be "count", "time" or "recent"`, c.Level)
	}
	if c.Duty != nil {
		if err := c.Duty.Check(); err != nil {
			return api.Collection{}, err
		}
	}
	return c, nil
}

// decodeLevel reads the body of PUT /v1/domains/{d}/level.
func decodeLevel(r io.Reader) (*string, error) {
	var body struct {
		Level json.RawMessage `json:"level"` // tells null from nothing
	}
	if err := decode(r, &body); err != nil {
		return nil, err
	}
	if body.Level == nil {
		return nil, errors.New("level is missing: null stands for the default")
	}
	var level *string
	if err := json.Unmarshal(body.Level, &level); err != nil {
		return nil, fmt.Errorf("bad body: level: %w", err)
	}
	if level != nil {
		switch *level {
		case "off", "count", "time", "recent":
		default:
			return nil, fmt.Errorf(`level is %q, must be "off", "count", "time" or "recent", or null for the default`, *level)
		}
	}
	return level, nil
}
