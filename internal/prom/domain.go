// SPDX-License-Identifier: Apache-2.0

package prom

import (
	"cmp"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"

	"virtexit/internal/ledger"
	"virtexit/internal/snapshot"
	"virtexit/vmmap"
)

// linger is how long a domain is shown that has ended, so that its last counts
// are scraped: Prometheus asks once a minute, or more often.
const linger = 5 * time.Minute

// domain is one that is shown.
type domain struct {
	vmmap.Domain
	total   *ledger.Total    // nil: it was never counted
	process snapshot.Process // in the precision of /proc
	shown   bool             // at the latest scrape, too
	run
}

// run is how a process is shown, and how long it is that does not change.
type run struct {
	name, uuid string    // what it is known as
	label      string    // its label domain: name, or one that tells it from others
	created    time.Time // when counting began; zero when it has not
}

// choose returns the domains to be shown: those that run, and those that have
// ended a moment ago. No two have the same labels domain and uuid.
//
// A domain that was started anew takes the place of its past run. Where two run
// that are called the same, that of libvirt keeps its name, else the one that was
// shown first. The other's label is NAME-TGID as long as it is shown, even if the
// name becomes free: its counts do not continue those of another process.
func (c *Collector) choose(counts iter.Seq2[vmmap.Domain, *ledger.Total]) []domain {
	now := c.config.BootTime()
	boot := c.config.Now().Add(-now)
	var domains []domain
	for d, t := range counts {
		// Ticks of an earlier boot were others than today's: in seconds, its
		// counters could go back.
		if d.TGID == 0 && (t == nil || int64(t.Seen) < 0 || now-time.Duration(t.Seen) > linger) {
			continue
		}
		x := domain{Domain: d, total: t, process: snapshot.Process{TGID: d.TGID, Start: d.Start}}
		if t != nil {
			x.process = t.Process
		}
		x.process = x.process.InProc()
		x.run, x.shown = c.runs[x.process]
		if name := strings.ToValidUTF8(d.Name, "\ufffd"); x.name != name || x.uuid != d.UUID || d.ID != nil {
			x.name, x.uuid, x.label = name, d.UUID, name
		}
		if t != nil && x.created.IsZero() {
			x.created = boot.Add(time.Duration(t.Since)).Round(time.Millisecond)
		}
		domains = append(domains, x)
	}
	slices.SortFunc(domains, precede)
	type labels struct{ domain, uuid string }
	taken := make(map[labels]bool, len(domains))
	runs := make(map[snapshot.Process]run, len(domains))
	chosen := domains[:0]
	for _, d := range domains {
		if d.TGID == 0 && d.label == d.name && taken[labels{d.label, d.uuid}] {
			continue // it was started anew
		}
		for taken[labels{d.label, d.uuid}] {
			d.label = fmt.Sprintf("%s-%d", d.label, d.process.TGID)
		}
		taken[labels{d.label, d.uuid}] = true
		runs[d.process] = d.run
		chosen = append(chosen, d)
	}
	c.runs = runs
	return chosen
}

// precede puts first who keeps the name that two have.
func precede(a, b domain) int {
	running := func(d domain) int { return cmp.Compare(d.TGID, 0) }
	libvirt := func(d domain) int { return truth(d.ID != nil) }
	shown := func(d domain) int { return truth(d.shown) }
	by := func(f func(domain) int) int { return cmp.Compare(f(b), f(a)) }
	older := cmp.Or(cmp.Compare(a.process.Start, b.process.Start), cmp.Compare(a.process.TGID, b.process.TGID))
	if a.TGID == 0 {
		older = -older // the latest run is meant
	}
	return cmp.Or(by(libvirt), by(running), by(shown), older)
}

// info is what the labels of virtexit_domain_info say. One without a value is
// left out, which to Prometheus is the same.
func (d *domain) info(labels ...*dto.LabelPair) []*dto.LabelPair {
	add := func(name, value string) {
		if value != "" {
			labels = append(labels, pair(name, strings.ToValidUTF8(value, "\ufffd")))
		}
	}
	add("source", d.Source)
	add("state", string(d.State))
	add("title", d.Title)
	if d.Container != nil {
		add("pod_uid", d.Container.Pod)
	}
	if x := d.Cloud; x != nil {
		add("cloud_system", x.System)
		add("cloud_name", x.Name)
		add("cloud_instance_uuid", x.InstanceUUID)
		add("cloud_namespace", x.Namespace)
		add("cloud_project", x.Project)
		add("cloud_project_id", x.ProjectID)
		add("cloud_user", x.User)
		add("cloud_user_id", x.UserID)
		add("cloud_flavor", x.Flavor)
	}
	slices.SortFunc(labels, func(a, b *dto.LabelPair) int { return cmp.Compare(a.GetName(), b.GetName()) })
	return labels
}
