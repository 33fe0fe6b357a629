// SPDX-License-Identifier: Apache-2.0

package report

import (
	"encoding/csv"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"virtexit/api"
)

// values turns the fields of a row into text: nil pointers are empty, floats
// have all their digits and no exponent.
func values(fields ...any) []string {
	row := make([]string, len(fields))
	for i, f := range fields {
		switch f := f.(type) {
		case *int:
			if f != nil {
				row[i] = strconv.Itoa(*f)
			}
		case *uint64:
			if f != nil {
				row[i] = strconv.FormatUint(*f, 10)
			}
		case *string:
			if f != nil {
				row[i] = *f
			}
		case *time.Time:
			if f != nil {
				row[i] = f.Format(time.RFC3339Nano)
			}
		case float64:
			row[i] = strconv.FormatFloat(f, 'f', -1, 64)
		default:
			row[i] = fmt.Sprint(f)
		}
	}
	return row
}

var timesHeader = []string{"guest_ns", "kvm_ns", "user_ns", "poll_ns", "halted_ns", "wait_ns", "outside_ns"}

func timesValues(t api.Times) []string {
	return values(t.GuestNS, t.KVMNS, t.UserNS, t.PollNS, t.HaltedNS, t.WaitNS, t.OutsideNS)
}

// listRows has a header and one row for each domain.
func listRows(domains []api.Domain, o ListOptions) [][]string {
	var title, owner []string
	if o.Title {
		title = []string{"title", "description"}
	}
	if o.Owner {
		owner = []string{"cloud", "cloud_name", "instance_uuid", "namespace", "project", "project_id", "user", "user_id", "flavor"}
	}
	rows := [][]string{slices.Concat(
		[]string{"id", "name", "uuid", "run", "tgid", "state", "source", "level", "since", "vcpus", "wall_ns", "span_ns", "count", "rate"}, timesHeader,
		[]string{"guest_pct", "kvm_pct", "user_pct", "poll_pct", "halted_pct", "wait_pct", "outside_pct", "top_reasons"}, title, owner)}
	for i := range domains {
		d := &domains[i]
		top := ""
		if len(d.Exits) > 0 {
			top = topReasons(d)
		}
		if o.Title {
			title = []string{d.Title, d.Description}
		}
		if o.Owner {
			c := api.Cloud{}
			if d.Cloud != nil {
				c = *d.Cloud
			}
			owner = []string{c.System, c.Name, c.InstanceUUID, c.Namespace, c.Project, c.ProjectID, c.User, c.UserID, c.Flavor}
		}
		p := d.TimePct
		rows = append(rows, slices.Concat(
			values(d.ID, d.Name, d.UUID, d.Run, d.TGID, d.State, d.Source, d.Level, d.Since, len(d.VCPUs), d.WallNS, d.SpanNS, d.Count, d.Rate),
			timesValues(d.Time), values(p.Guest, p.KVM, p.User, p.Poll, p.Halted, p.Wait, p.Outside, top), title, owner))
	}
	return rows
}

func reasonsCSV(w io.Writer, r api.Report, limit int) error {
	rows := [][]string{{"id", "name", "uuid", "run", "wall_ns", "span_ns", "isa", "code", "reason", "count", "rate", "share", "time_ns", "user_ns", "mean_ns", "p50_ns", "p99_ns", "max_ns"}}
	for i := range r.Domains {
		d := &r.Domains[i]
		for _, e := range top(d.Exits, limit) {
			var code any = e.Code
			if e.ISA == "" { // the sum of several
				code = ""
			}
			rows = append(rows, values(d.ID, d.Name, d.UUID, d.Run, d.WallNS, d.SpanNS, e.ISA, code, e.Reason, e.Count, e.Rate, e.Share,
				e.TimeNS, e.UserNS, e.MeanNS, e.P50NS, e.P99NS, e.MaxNS))
		}
	}
	return csv.NewWriter(w).WriteAll(rows)
}

func vcpusCSV(w io.Writer, r api.Report) error {
	rows := [][]string{slices.Concat([]string{"id", "name", "uuid", "run", "wall_ns", "span_ns", "vcpu", "tid", "exits", "rate"}, timesHeader, []string{"guest_pct"})}
	for i := range r.Domains {
		d := &r.Domains[i]
		for _, v := range d.VCPUs {
			rows = append(rows, slices.Concat(
				values(d.ID, d.Name, d.UUID, d.Run, d.WallNS, d.SpanNS, v.ID, v.TID, v.Exits, v.Rate), timesValues(v.Time), values(v.GuestPct)))
		}
	}
	return csv.NewWriter(w).WriteAll(rows)
}

func statusCSV(w io.Writer, s api.Status) error {
	var on, every any = "", ""
	if s.Duty != nil {
		on, every = s.Duty.OnNS, s.Duty.EveryNS
	}
	var tried []string
	for _, t := range s.Tried {
		tried = append(tried, t.Collector+": "+t.Refused)
	}
	return csv.NewWriter(w).WriteAll([][]string{
		{"collection", "level", "duty_on_ns", "duty_every_ns", "collector", "tried", "problem", "collector_version", "hook", "hook_cycles", "kernel", "isa",
			"slots_live", "slots_retired", "slots_backed", "slots_max", "exits", "unattributed", "missed", "totals_since", "observed_ns",
			"libvirt_connected", "libvirt_uri", "libvirt_error", "version", "since", "cpu_total_pct", "cpu_latest_pct"},
		values(s.Collection, s.Level, on, every, s.Collector, strings.Join(tried, "; "), s.Problem, s.CollectorVersion, s.Hook, s.HookCycles, s.Kernel, s.ISA,
			s.Slots.Live, s.Slots.Retired, s.Slots.Backed, s.Slots.Max, s.Exits, s.Unattributed, s.Missed, &s.TotalsSince, s.ObservedNS,
			s.Libvirt.Connected, s.Libvirt.URI, s.Libvirt.Error, s.Version, &s.Since, s.CPU.TotalPct, s.CPU.LatestPct),
	})
}
