// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

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

	taken string // the one that open returned
	mu    sync.Mutex
	tried []api.Tried
}

// choice is a collector that may be taken.
type choice struct {
	name, gain string // over those after it
	open       func() (source.Source, error)
}

// choices are those that the configuration allows, the best first.
func (c *collectors) choices() []choice {
	all := []choice{
		{"kmod", "an exit costs a fraction of what it costs with others, and counts outlive virtexitd", openModule},
		{"ebpf", "exits by reason, and where the time goes", c.openBPF},
		{"kvmstats", "how many exits each vCPU takes", c.openStatistics},
	}
	return slices.DeleteFunc(all, func(o choice) bool { return c.config.collector != "auto" && c.config.collector != o.name })
}

// usable opens a collector, unless it would not count the KVM that is loaded.
func (o choice) usable() (source.Source, error) {
	src, err := o.open()
	if err != nil {
		return nil, err
	}
	err = src.SetLevel(snapshot.Pause) // at which it looks at KVM
	info, err2 := src.Info()
	if err = errors.Join(err, err2, src.SetLevel(snapshot.Off)); err == nil && info.Refused != "" {
		err = fmt.Errorf("KVM is not counted: %s", info.Refused)
	}
	if err != nil {
		return nil, errors.Join(err, src.Close())
	}
	return src, nil
}

// first opens the best collector that is usable, if any, and tells what was wrong
// with those before.
func (c *collectors) first() (o choice, src source.Source, tried []api.Tried) {
	for _, o := range c.choices() {
		src, err := o.usable()
		if err == nil {
			return o, src, tried
		}
		tried = append(tried, api.Tried{Collector: o.name, Refused: err.Error(), Gain: o.gain})
	}
	return choice{}, nil, tried
}

// open opens a collector. Where none can count the KVM that is loaded it is the
// best that is there: KVM may be exchanged.
func (c *collectors) open() (source.Source, error) {
	if c.config.replay != "" {
		return c.openReplay()
	}
	o, src, tried := c.first()
	if src != nil {
		c.take(o, tried)
		return src, nil
	}
	for i, o := range c.choices() {
		if src, err := o.open(); err == nil {
			c.take(o, slices.Delete(tried, i, i+1))
			return src, nil
		}
	}
	c.tell(tried)
	var problems []string
	for _, o := range tried {
		problems = append(problems, o.Collector+": "+o.Refused)
	}
	return nil, errors.New(strings.Join(problems, "; "))
}

func (c *collectors) take(o choice, tried []api.Tried) {
	if o.name != "ebpf" {
		c.close()
	}
	c.taken = o.name
	c.tell(tried)
}

// better tells whether open would return another collector now.
func (c *collectors) better() bool {
	if c.taken == "" || c.config.collector != "auto" {
		return false
	}
	o, src, tried := c.first()
	if src == nil {
		return false
	}
	src.Close()
	if o.name == c.taken {
		c.tell(tried)
	}
	return o.name != c.taken
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
		return nil, fmt.Errorf("virtexit.ko is not loaded: modprobe virtexit (%w)", err)
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
