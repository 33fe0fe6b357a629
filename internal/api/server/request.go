// SPDX-License-Identifier: Apache-2.0

package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"time"

	"virtexit/internal/api"
)

// reportQuery is what a report is asked for.
type reportQuery struct {
	domains  []string
	interval time.Duration // 0: totals
}

// parseReport reads the parameters of /v1/report. Its errors name the one that
// is wrong.
func parseReport(rawQuery string) (reportQuery, error) {
	values, err := url.ParseQuery(rawQuery)
	if err != nil {
		return reportQuery{}, fmt.Errorf("bad query %q: %w", rawQuery, err)
	}
	for key, v := range values {
		switch key {
		case "domain":
		case "interval", "total":
			if len(v) > 1 {
				return reportQuery{}, fmt.Errorf("parameter %q is given %d times", key, len(v))
			}
		default:
			return reportQuery{}, fmt.Errorf("unknown parameter %q: known are domain, interval, total", key)
		}
	}
	q := reportQuery{domains: values["domain"], interval: api.DefaultInterval}
	if values.Has("total") {
		if values.Has("interval") {
			return reportQuery{}, errors.New("parameters interval and total exclude each other")
		}
		switch v := values.Get("total"); v {
		case "", "1", "true":
			q.interval = 0
		default:
			return reportQuery{}, fmt.Errorf("parameter total=%q: it is given as total, total=1 or total=true, or not at all", v)
		}
	}
	if values.Has("interval") {
		v := values.Get("interval")
		q.interval, err = time.ParseDuration(v)
		if err != nil {
			return reportQuery{}, fmt.Errorf("parameter interval=%q: not a duration such as 1s or 500ms", v)
		}
		if q.interval < api.MinInterval || q.interval > api.MaxInterval {
			return reportQuery{}, fmt.Errorf("parameter interval=%q: not between %v and %v", v, api.MinInterval, api.MaxInterval)
		}
	}
	return q, nil
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
