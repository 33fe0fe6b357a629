// SPDX-License-Identifier: Apache-2.0

package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
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

// decodeCollection reads the body of PUT /v1/collection.
func decodeCollection(r io.Reader) (api.Collection, error) {
	var c api.Collection
	dec := json.NewDecoder(r)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return api.Collection{}, fmt.Errorf("bad body: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		if err == nil {
			err = errors.New("more than one JSON value")
		}
		return api.Collection{}, fmt.Errorf("bad body: %w", err)
	}
	switch c.Collection {
	case "on", "off":
	default:
		return api.Collection{}, fmt.Errorf(`collection is %q, must be "on" or "off"`, c.Collection)
	}
	switch c.Level {
	case "":
	case "count", "time":
		if c.Collection == "off" {
			return api.Collection{}, errors.New(`level goes with collection "on" alone`)
		}
	default:
		return api.Collection{}, fmt.Errorf(`level is %q, must be "count" or "time"`, c.Level)
	}
	return c, nil
}
