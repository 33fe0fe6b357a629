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

	taken  string // the one that open returned
	source source.Source
	mu     sync.Mutex
	tried  []api.Tried
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

func (o choice) refused(err error) api.Tried {
	return api.Tried{Collector: o.name, Refused: err.Error(), Gain: o.gain}
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

// open opens the best collector that is usable. Where none can count the KVM that
// is loaded it is the best that is there: KVM may be exchanged.
func (c *collectors) open() (source.Source, error) {
	if c.config.replay != "" {
		return c.openReplay()
	}
	var tried []api.Tried
	for _, o := range c.choices() {
		src, err := o.usable()
		if err == nil {
			return c.take(o, src, tried), nil
		}
		tried = append(tried, o.refused(err))
	}
	for i, o := range c.choices() {
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

func (c *collectors) take(o choice, src source.Source, tried []api.Tried) source.Source {
	if o.name != "ebpf" {
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
	for _, o := range c.choices() {
		if o.name == c.taken {
			if info, err := c.source.Info(); err != nil || info.Refused == "" {
				c.tell(tried)
				return false
			}
			continue
		}
		src, err := o.usable()
		if err == nil {
			src.Close()
			return true
		}
		tried = append(tried, o.refused(err))
	}
	c.tell(tried)
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
