// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"virtexit/api"
	"virtexit/api/client"
)

const nilUUID = "00000000-0000-0000-0000-000000000000"

// sample is the statistics of a VM, up to where they end and from there on, with
// what is easily changed on the way through a JSON library.
const (
	sampleBegin = `[ {"vmId": "` + nilUUID + `", "nan": NaN, "big": 123456789012345678901234567890, "twice": 1, "twice": [-Infinity, 1.50e+01, "\u00e9\/"]`
	sampleEnd   = "\t} ]"
)

// test tells on stdout whether the hook can do its work. It changes nothing.
func (h *hook) test(stdout io.Writer) (status int) {
	report := func(verdict, format string, args ...any) {
		fmt.Fprintf(stdout, "test %s: %s\n", verdict, fmt.Sprintf(format, args...))
		if verdict == "fail" {
			status = 1
		}
	}
	mean := uint64(2000)
	value, err := json.Marshal(newVMExits(&api.Domain{Level: "time", Count: 3, Exits: []api.Exit{{Reason: "cpuid", Count: 3, TimeNS: 6000, MeanNS: &mean, P99NS: &mean}}}))
	text := []byte(sampleBegin + sampleEnd)
	vms, _, parseErr := parse(text)
	switch err := errors.Join(err, parseErr); {
	case err != nil:
		report("fail", "sample: %v", err)
	case string(apply(text, []edit{vms[0].set(key, value)})) != sampleBegin+`, "`+key+`": `+string(value)+sampleEnd:
		report("fail", "sample: something else has changed")
	default:
		report("pass", "sample: nothing is changed, and this is added: %q: %s", key, value)
	}

	ctx := context.Background()
	s, err := h.client.Status(ctx)
	switch {
	case err != nil:
		report("fail", "virtexitd: %v", err)
		return status
	case s.Problem != "":
		report("fail", "virtexitd %s: %s", s.Version, s.Problem)
	default:
		report("pass", "virtexitd %s: hook %s, level %s", s.Version, s.Hook, s.Level)
	}
	begin := time.Now()
	domains, err := h.client.Domains(ctx)
	took := time.Since(begin).Round(time.Millisecond)
	switch {
	case err != nil:
		report("fail", "domains: %v", err)
	case took > statsLimit-margin:
		report("fail", "domains: %d, in %v, of which the hook waits for %v alone", len(domains.Domains), took, statsLimit-margin)
	default:
		report("pass", "domains: %d, in %v", len(domains.Domains), took)
	}
	level := "time"
	_, err = h.client.SetDomainLevel(ctx, nilUUID, &level)
	var refused *client.StatusError
	switch {
	case unknown(err):
		report("pass", "levels: custom property virtexit can set them")
	case errors.As(err, &refused) && refused.Status == http.StatusForbidden:
		report("skip", "levels: custom property virtexit can set none: %v", err)
	default:
		report("fail", "levels: %v", err)
	}
	return status
}
