// SPDX-License-Identifier: Apache-2.0

// Package prom shows the daemon's totals to Prometheus: see docs/PROMETHEUS.md.
package prom

import (
	"iter"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/types/known/timestamppb"

	"virtexit/api"
	"virtexit/internal/exitreason"
	"virtexit/internal/ledger"
	"virtexit/internal/snapshot"
	"virtexit/vmmap"
)

// Source is where the totals are. Its methods are called from several
// goroutines at once, and wait for nobody.
type Source interface {
	// Status tells how collection goes, after a new snapshot.
	Status() api.Status
	// StateKept tells whether totals are kept for the next start of the daemon.
	StateKept() bool
	// Counts returns the latest totals and, with the total of each, all
	// domains; that of a domain which was never counted is nil.
	Counts() (*ledger.View, iter.Seq2[vmmap.Domain, *ledger.Total])
}

// Config is what an administrator can set, and the clocks.
type Config struct {
	Reasons  int  // of a domain that have series of their own; the rest share those of "other"
	VCPUs    bool // series for each vCPU
	Now      func() time.Time
	BootTime func() time.Duration // CLOCK_BOOTTIME
}

// bounds are those of the buckets of exit durations, in seconds: the same on all
// hosts, whatever their ticks, so that histograms of several hosts can be added.
var bounds = [...]float64{3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1}

// Collector is a prometheus.Collector. A scrape takes at most one snapshot.
type Collector struct {
	source Source
	config Config
	all    []*prometheus.Desc

	up, collection, collector, build, libvirt, state           *prometheus.Desc
	hookCycles, slotsLive, slotsRetired, slotsBacked, slotsMax *prometheus.Desc
	observed, counted, unattributed, missed, scraped           *prometheus.Desc
	info, start, exits, exitSeconds, durations, vcpuSeconds    *prometheus.Desc
	eachVCPUExits, eachVCPUSeconds                             *prometheus.Desc

	mu   sync.Mutex
	runs map[snapshot.Process]run // those of the latest scrape
}

// New returns a Collector.
func New(source Source, config Config) *Collector {
	c := &Collector{source: source, config: config}
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		d := prometheus.NewDesc("virtexit_"+name, help, labels, nil)
		c.all = append(c.all, d)
		return d
	}
	c.info = desc("domain_info", "Who a domain is; always 1.", "domain", "uuid", "source", "state", "title", "pod_uid",
		"cloud_system", "cloud_name", "cloud_instance_uuid", "cloud_namespace", "cloud_project", "cloud_project_id", "cloud_user", "cloud_user_id", "cloud_flavor")
	c.start = desc("domain_start_time_seconds", "Unix time at which the domain's counts began.", "domain", "uuid")
	c.exits = desc("exits_total", "VM exits by reason.", "domain", "uuid", "reason")
	c.exitSeconds = desc("exit_seconds_total", "Time that KVM and user space spent handling exits. Absent at level count.", "domain", "uuid", "reason")
	c.durations = desc("exit_duration_seconds", "How long the handling of an exit took. Absent at level count.", "domain", "uuid")
	c.vcpuSeconds = desc("vcpu_seconds_total", "Where the wall time of the domain's vCPU threads went. Absent at level count.", "domain", "uuid", "state")
	if config.VCPUs {
		c.eachVCPUExits = desc("vcpu_exits_total", "VM exits by vCPU, in KVM's numbers. Where metrics_vcpus is on.", "domain", "uuid", "vcpu")
		c.eachVCPUSeconds = desc("vcpu_state_seconds_total", "Where the wall time of each vCPU thread went. Where metrics_vcpus is on; absent at level count.", "domain", "uuid", "vcpu", "state")
	}
	c.counted = desc("counted_exits_total", "All exits that the kernel has counted: those of all domains, past ones too, the unattributed and the missed.")
	c.unattributed = desc("unattributed_exits_total", "Of these, exits that no vCPU could be charged with.")
	c.missed = desc("missed_exits_total", "Of these, exits that nobody can tell any more.")
	c.observed = desc("observed_seconds_total", "Time in which exits were counted. It stands still while collection is off or pauses.")
	c.up = desc("up", "1 when exits are counted, or could be; 0 when there is a problem, which \"virtexit status\" tells.")
	c.collection = desc("collection_enabled", "1 when collection is switched on.")
	c.collector = desc("collector_info", "What counts, and how; always 1.", "collector", "version", "hook", "isa", "level", "kernel")
	c.build = desc("build_info", "The daemon's version; always 1.", "version")
	c.libvirt = desc("libvirt_connected", "1 when libvirt names the domains.")
	c.state = desc("state_kept", "1 when totals are kept for the next start of the daemon, or need not be; 0 when they can't be saved.")
	c.hookCycles = desc("hook_cycles", "What the hook takes of an exit and the entry after it, in cycles of the TSC; 0 when unknown.")
	c.slotsLive = desc("slots_live", "Slots of the collector in use by vCPU threads.")
	c.slotsRetired = desc("slots_retired", "Slots of vCPU threads that have ended, not yet released.")
	c.slotsBacked = desc("slots_backed", "Slots that have memory.")
	c.slotsMax = desc("slots_max", "Slots that there can be; 0: as many as there are vCPUs.")
	c.scraped = desc("scrape_duration_seconds", "How long it took to collect these metrics.")
	return c
}

// Describe is a method of prometheus.Collector.
func (c *Collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range c.all {
		out <- d
	}
}

// Collect is a method of prometheus.Collector.
func (c *Collector) Collect(out chan<- prometheus.Metric) {
	begun := c.config.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	status := c.source.Status()
	view, counts := c.source.Counts()
	c.host(out, &status, view)
	s := scrape{c, out, float64(view.TickHz), make(map[reason]*dto.LabelPair)}
	domains := c.choose(counts)
	for i := range domains {
		s.domain(&domains[i])
	}
	out <- gauge(c.scraped, c.config.Now().Sub(begun).Seconds())
}

// host is what there is but once.
func (c *Collector) host(out chan<- prometheus.Metric, s *api.Status, view *ledger.View) {
	collector := ""
	if s.Collector != nil {
		collector = *s.Collector
	}
	for _, m := range []prometheus.Metric{
		gauge(c.up, float64(truth(s.Problem == ""))),
		gauge(c.collection, float64(truth(s.Collection == "on"))),
		gauge(c.collector, 1, pair("collector", collector), pair("hook", s.Hook), pair("isa", s.ISA), pair("kernel", s.Kernel), pair("level", s.Level), pair("version", s.CollectorVersion)),
		gauge(c.build, 1, pair("version", s.Version)),
		gauge(c.libvirt, float64(truth(s.Libvirt.Connected))),
		gauge(c.state, float64(truth(c.source.StateKept()))),
		gauge(c.hookCycles, float64(s.HookCycles)),
		gauge(c.slotsLive, float64(s.Slots.Live)),
		gauge(c.slotsRetired, float64(s.Slots.Retired)),
		gauge(c.slotsBacked, float64(s.Slots.Backed)),
		gauge(c.slotsMax, float64(s.Slots.Max)),
		counter(c.observed, float64(view.Counted)/1e9, nil),
		counter(c.counted, float64(view.Totals.Exits), nil),
		counter(c.unattributed, float64(view.Totals.Unattributed), nil),
		counter(c.missed, float64(view.Totals.Missed), nil),
	} {
		out <- m
	}
}

// scrape is one collection of the domains' metrics.
type scrape struct {
	*Collector
	out     chan<- prometheus.Metric
	hz      float64 // ticks per second
	reasons map[reason]*dto.LabelPair
}

type reason struct {
	isa  exitreason.ISA
	code uint32
}

func (s *scrape) domain(d *domain) {
	name, uuid := pair("domain", d.label), pair("uuid", d.uuid)
	s.out <- gauge(s.info, 1, d.info(name, uuid)...)
	t := d.total
	if t == nil {
		return
	}
	created := timestamppb.New(d.created)
	s.out <- gauge(s.start, float64(d.created.UnixMilli())/1e3, name, uuid)
	for _, x := range s.tally(t) {
		s.out <- counter(s.exits, float64(x.count), created, name, x.reason, uuid)
		if x.time > 0 {
			s.out <- counter(s.exitSeconds, float64(x.time)/s.hz, created, name, x.reason, uuid)
		}
	}
	if m := s.histogram(t, created, name, uuid); m != nil {
		s.out <- m
	}
	if t.Times.Total() > 0 {
		for state, ticks := range states(t.Times) {
			s.out <- counter(s.vcpuSeconds, float64(ticks)/s.hz, created, name, stateLabels[state], uuid)
		}
	}
	if !s.config.VCPUs {
		return
	}
	for i := range t.VCPUs {
		v := &t.VCPUs[i]
		number := pair("vcpu", strconv.Itoa(v.ID))
		s.out <- counter(s.eachVCPUExits, float64(v.Exits), created, name, uuid, number)
		if v.Times.Total() > 0 {
			for state, ticks := range states(v.Times) {
				s.out <- counter(s.eachVCPUSeconds, float64(ticks)/s.hz, created, name, stateLabels[state], uuid, number)
			}
		}
	}
}

// tally is the exits of a label reason.
type tally struct {
	reason      *dto.LabelPair
	count, time uint64
}

// tally adds up the rows of reasons that share a label. The reasons that came
// first have labels of their own, and not those that are most frequent now: so
// what a label stands for never changes, also not over a restart of the daemon,
// and no counter goes back.
func (s *scrape) tally(t *ledger.Total) []tally {
	list := make([]tally, 0, s.config.Reasons+1)
	rest := tally{reason: otherLabel}
	for i := range t.Rows {
		r := &t.Rows[i]
		to := &rest
		if !r.Other {
			label := s.reason(reason{r.ISA, r.Code})
			for j := range list {
				if list[j].reason.GetValue() == label.GetValue() {
					to = &list[j]
				}
			}
			if to == &rest && len(list) < s.config.Reasons {
				list = append(list, tally{reason: label})
				to = &list[len(list)-1]
			}
		}
		to.count += r.Count
		to.time += r.Time
	}
	if rest.count > 0 {
		list = append(list, rest)
	}
	return list
}

func (s *scrape) reason(r reason) *dto.LabelPair {
	label := s.reasons[r]
	if label == nil {
		label = pair("reason", exitreason.Name(r.isa, r.code))
		s.reasons[r] = label
	}
	return label
}

// histogram is that of all reasons; nil when no exit was timed.
func (s *scrape) histogram(t *ledger.Total, created *timestamppb.Timestamp, labels ...*dto.LabelPair) prometheus.Metric {
	var all snapshot.Row
	for i := range t.Rows {
		all.Add(t.Rows[i].Row)
	}
	timed, sum := all.Timed(), float64(all.Time)/s.hz
	if timed == 0 {
		return nil
	}
	buckets := make([]*dto.Bucket, len(bounds))
	for i := range bounds {
		below := all.Hist.Below(uint64(bounds[i] * s.hz))
		buckets[i] = &dto.Bucket{UpperBound: &bounds[i], CumulativeCount: &below}
	}
	return &metric{s.durations, dto.Metric{Label: labels, Histogram: &dto.Histogram{
		SampleCount: &timed, SampleSum: &sum, Bucket: buckets, CreatedTimestamp: created,
	}}}
}

var (
	otherLabel  = pair("reason", "other")
	stateLabels = func() (labels [7]*dto.LabelPair) {
		for i, state := range [...]string{"guest", "kvm", "user", "poll", "halted", "wait", "outside"} {
			labels[i] = pair("state", state)
		}
		return labels
	}()
)

// states lists the times in the order of stateLabels.
func states(t snapshot.Times) [7]uint64 {
	return [...]uint64{t.Guest, t.KVM, t.User, t.Poll, t.Halted, t.Wait, t.Outside}
}

// metric is a prometheus.Metric as it is sent. Those of the library copy their
// labels, which costs three times as much on a large host.
type metric struct {
	desc *prometheus.Desc
	dto.Metric
}

func (m *metric) Desc() *prometheus.Desc { return m.desc }

func (m *metric) Write(out *dto.Metric) error {
	out.Label, out.Gauge, out.Counter, out.Histogram = m.Label, m.Gauge, m.Counter, m.Histogram
	return nil
}

// gauge and counter want their labels in the order of the alphabet.
func gauge(desc *prometheus.Desc, value float64, labels ...*dto.LabelPair) prometheus.Metric {
	return &metric{desc, dto.Metric{Label: labels, Gauge: &dto.Gauge{Value: &value}}}
}

func counter(desc *prometheus.Desc, value float64, created *timestamppb.Timestamp, labels ...*dto.LabelPair) prometheus.Metric {
	return &metric{desc, dto.Metric{Label: labels, Counter: &dto.Counter{Value: &value, CreatedTimestamp: created}}}
}

func pair(name, value string) *dto.LabelPair { return &dto.LabelPair{Name: &name, Value: &value} }

func truth(b bool) int {
	if b {
		return 1
	}
	return 0
}
