// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"virtexit/api"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
	"virtexit/internal/source/ebpf"
	"virtexit/internal/source/kmod"
	"virtexit/internal/source/kvmstats"
	"virtexit/internal/source/replay"
	"virtexit/vmmap"
)

// collectors opens the configured collector, or the best that this host has.
type collectors struct {
	config     config
	libvirt    func() vmmap.LibvirtStatus
	statistics kvmstats.Options
	played     bool
	bpf        *ebpf.Collector // keeps what it has counted; nil: not needed so far

	choices []choice // that the configuration allows, the best first
	taken   string   // the one that open returned
	source  source.Source
	left    map[string]leaving // the last time of one that could not go on

	mu    sync.Mutex
	tried []api.Tried
}

// choice is a collector that may be taken.
type choice struct {
	name, gain string // over those after it
	open       func() (source.Source, error)
}

// leaving is when a collector could not go on, and why.
type leaving struct {
	at  time.Time
	why string
}

// rest is for how long a collector is not taken that could not go on: it may seem
// usable until it is to count.
const rest = time.Minute

func newCollectors(config config, libvirt func() vmmap.LibvirtStatus, statistics kvmstats.Options) *collectors {
	c := &collectors{config: config, libvirt: libvirt, statistics: statistics, left: make(map[string]leaving)}
	c.choices = []choice{
		{"kmod", "exits by reason, and where the time goes, at a fraction of the cost of ebpf; counts outlive virtexitd", openModule},
		{"ebpf", "exits by reason, and where the time goes", c.openBPF},
		{"kvmstats", "how many exits each vCPU takes", c.openStatistics},
	}
	c.choices = slices.DeleteFunc(c.choices, func(o choice) bool { return config.collector != "auto" && config.collector != o.name })
	return c
}

// refused says why, but not that the collector is not available: that it says already.
func (o choice) refused(err error) api.Tried {
	why := strings.ReplaceAll(err.Error(), source.ErrUnavailable.Error()+": ", "")
	return api.Tried{Collector: o.name, Refused: why, Gain: o.gain}
}

// usable opens a collector, unless it would not count the KVM that is loaded.
func (o choice) usable() (source.Source, error) {
	src, err := o.open()
	if err != nil {
		return nil, err
	}
	info, err := look(src)
	if err == nil && info.Refused != "" {
		err = notCounted(info)
	}
	if err != nil {
		src.Close()
		return nil, err
	}
	return src, nil
}

func notCounted(info source.Info) error { return fmt.Errorf("KVM is not counted: %s", info.Refused) }

// look has a collector look at KVM.
func look(src source.Source) (source.Info, error) {
	if err := src.SetLevel(snapshot.Pause); err != nil {
		return source.Info{}, err
	}
	info, err := src.Info()
	if err != nil {
		return source.Info{}, err
	}
	return info, src.SetLevel(snapshot.Off)
}

// open opens the best collector that is usable. Where none can count the KVM that
// is loaded it is the best that is there: KVM may be exchanged.
func (c *collectors) open() (source.Source, error) {
	if c.config.replay != "" {
		return c.openReplay()
	}
	var tried []api.Tried
	for _, o := range c.choices {
		src, err := c.try(o)
		if err == nil {
			return c.take(o, src, tried), nil
		}
		tried = append(tried, o.refused(err))
	}
	for i, o := range c.choices {
		if src, err := o.open(); err == nil {
			return c.take(o, src, slices.Delete(tried, i, i+1)), nil
		}
	}
	c.tell(tried)
	var problems []string
	for _, o := range tried {
		problems = append(problems, o.Collector+": "+o.Refused)
	}
	return nil, errors.New(strings.Join(problems, "; "))
}

// try opens a collector if it is usable.
func (c *collectors) try(o choice) (source.Source, error) {
	if left := c.left[o.name]; time.Since(left.at) < rest {
		return nil, fmt.Errorf("%s (tried again after %v)", left.why, rest) // the same text each time, lest each be logged
	}
	return o.usable()
}

func (c *collectors) take(o choice, src source.Source, tried []api.Tried) source.Source {
	if o.name == "kmod" {
		c.close()
	}
	c.taken, c.source = o.name, src
	c.tell(tried)
	return src
}

// better tells whether open would return another collector now. It does not try
// the one in use, nor, while that counts, those that come after it.
func (c *collectors) better() bool {
	var tried []api.Tried
	for _, o := range c.choices {
		if o.name == c.taken {
			info, err := c.source.Info()
			if err != nil || info.Refused == "" {
				c.tell(tried)
				return false
			}
			tried = append(tried, o.refused(notCounted(info)))
			continue
		}
		src, err := c.try(o)
		if err == nil {
			src.Close()
			if i := slices.IndexFunc(tried, func(t api.Tried) bool { return t.Collector == c.taken }); i >= 0 {
				c.left[c.taken] = leaving{time.Now(), tried[i].Refused}
			}
			return true
		}
		tried = append(tried, o.refused(err))
	}
	c.tell(slices.DeleteFunc(tried, func(t api.Tried) bool { return t.Collector == c.taken }))
	return false
}

func (c *collectors) tell(tried []api.Tried) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tried = tried
}

// refused are those that were tried the last time, and why each was not taken.
func (c *collectors) refused() []api.Tried {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tried
}

func openModule() (source.Source, error) {
	src, err := kmod.Open()
	if errors.Is(err, source.ErrUnavailable) {
		return nil, fmt.Errorf("virtexit.ko is not loaded: install virtexit-dkms, then modprobe virtexit (%w)", err)
	}
	if err != nil {
		return nil, err // not a source that is a nil pointer
	}
	return src, nil
}

func (c *collectors) openBPF() (source.Source, error) {
	if c.bpf == nil {
		var err error
		if c.bpf, err = ebpf.New(ebpf.Options{Version: version}); err != nil {
			return nil, err
		}
	}
	src, err := c.bpf.Open()
	if err != nil {
		return nil, err
	}
	return src, nil
}

func (c *collectors) openStatistics() (source.Source, error) {
	if s := c.libvirt(); !s.Connected {
		return nil, fmt.Errorf("%w: libvirt at %s: %s", source.ErrUnavailable, s.URI, s.Error)
	}
	return kvmstats.New(c.statistics), nil
}

func (c *collectors) openReplay() (source.Source, error) {
	if c.played { // a second time its exits would be counted twice
		return nil, fmt.Errorf("the recording %s has ended", c.config.replay)
	}
	src, err := replay.Open(c.config.replay)
	if err != nil {
		return nil, err
	}
	c.played = true
	return src, nil
}

// close ends what openBPF keeps.
func (c *collectors) close() error {
	if c.bpf == nil {
		return nil
	}
	bpf := c.bpf
	c.bpf = nil
	return bpf.Close()
}
