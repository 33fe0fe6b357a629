// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/internal/snapshot"
	"virtexit/internal/source"
)

// host is what collectors there are on a host, and what they say of its KVM. Each
// is known by its name alone.
type host map[string]*fake

type fake struct {
	absent  string // why it is not there
	refused string // why it does not count KVM; it says so where it is to
	opened  int
	level   snapshot.Level // of any of its sources
}

type fakeSource struct {
	source.Source // none of its other methods is called
	*fake
}

func (s fakeSource) Info() (source.Info, error) { return source.Info{Refused: s.refused}, nil }
func (s fakeSource) Close() error               { s.opened--; return nil }
func (s fakeSource) SetLevel(level snapshot.Level) error {
	s.level = level
	return nil
}

func (h host) collectors() *collectors {
	c := &collectors{left: make(map[string]leaving)}
	for _, name := range []string{"kmod", "ebpf", "kvmstats"} {
		f := h[name]
		c.choices = append(c.choices, choice{name, name + "'s gain", func() (source.Source, error) {
			if f.absent != "" {
				return nil, fmt.Errorf("open: %w: %s", source.ErrUnavailable, f.absent)
			}
			f.opened++
			return fakeSource{fake: f}, nil
		}})
	}
	c.config.collector = "auto"
	return c
}

func (c *collectors) said() (s []string) {
	for _, t := range c.refused() {
		s = append(s, t.Collector+": "+t.Refused)
	}
	return s
}

func TestOpen(t *testing.T) {
	const away, strange = "not loaded", "a KVM that is not known"
	for _, tt := range []struct {
		name  string
		host  host
		taken string
		tried []string
		err   string
	}{
		{"all", host{"kmod": {}, "ebpf": {}, "kvmstats": {}}, "kmod", nil, ""},
		{"no module", host{"kmod": {absent: away}, "ebpf": {}, "kvmstats": {}}, "ebpf", []string{"kmod: open: " + away}, ""},
		{"the last one", host{"kmod": {absent: away}, "ebpf": {refused: strange}, "kvmstats": {}}, "kvmstats",
			[]string{"kmod: open: " + away, "ebpf: KVM is not counted: " + strange}, ""},
		{"none for this KVM", host{"kmod": {absent: away}, "ebpf": {refused: strange}, "kvmstats": {absent: "no libvirt"}}, "ebpf",
			[]string{"kmod: open: " + away, "kvmstats: open: no libvirt"}, ""},
		{"none", host{"kmod": {absent: away}, "ebpf": {absent: "needs CAP_BPF"}, "kvmstats": {absent: "no libvirt"}}, "", []string{
			"kmod: open: " + away, "ebpf: open: needs CAP_BPF", "kvmstats: open: no libvirt",
		}, "kmod: open: not loaded; ebpf: open: needs CAP_BPF; kvmstats: open: no libvirt"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := tt.host.collectors()
			src, err := c.open()
			if got := fmt.Sprint(err); tt.err != "" && got != tt.err || tt.err == "" && err != nil {
				t.Errorf("error %q, want %q", got, tt.err)
			}
			if c.taken != tt.taken || (src != nil) != (tt.taken != "") {
				t.Errorf("%q is taken, want %q", c.taken, tt.taken)
			}
			if diff := cmp.Diff(tt.tried, c.said()); diff != "" {
				t.Errorf("tried (-want +got):\n%s", diff)
			}
			for name, f := range tt.host {
				if want := map[bool]int{true: 1}[name == tt.taken]; f.opened != want || f.level != snapshot.Off {
					t.Errorf("%s: %d sources are open at level %v, want %d", name, f.opened, f.level, want)
				}
			}
		})
	}
}

func TestBetter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := host{"kmod": {absent: "not loaded"}, "ebpf": {}, "kvmstats": {}}
		c := h.collectors()
		step := func(what string, better bool, taken string, tried ...string) {
			t.Helper()
			if got := c.better(); got != better {
				t.Errorf("%s: better: %t, want %t", what, got, better)
			}
			if better {
				c.source.Close()
				if _, err := c.open(); err != nil {
					t.Fatal(err)
				}
			}
			if got := strings.Join(c.said(), "; "); c.taken != taken || got != strings.Join(tried, "; ") {
				t.Errorf("%s: %s is taken, tried %q", what, c.taken, got)
			}
			for name, f := range h {
				if want := map[bool]int{true: 1}[name == taken]; f.opened != want {
					t.Errorf("%s: %d sources of %s are open, want %d", what, f.opened, name, want)
				}
			}
		}
		if _, err := c.open(); err != nil {
			t.Fatal(err)
		}
		h["ebpf"].level = snapshot.Time
		step("nothing new", false, "ebpf", "kmod: open: not loaded")
		if h["ebpf"].level != snapshot.Time {
			t.Error("the one in use was tried")
		}
		h["kmod"].absent, h["kmod"].refused = "", "strange"
		step("a module that does not know KVM", false, "ebpf", "kmod: KVM is not counted: strange")
		h["kmod"].refused = ""
		step("one that does", true, "kmod")
		step("nothing is better", false, "kmod")
		h["kmod"].refused = "strange"
		step("another KVM", true, "ebpf", "kmod: KVM is not counted: strange (tried again after 1m0s)")
		h["kmod"].refused = "" // or so it seems
		time.Sleep(5 * time.Second)
		step("once bitten", false, "ebpf", "kmod: KVM is not counted: strange (tried again after 1m0s)")
		time.Sleep(rest)
		step("after a rest", true, "kmod")
		h["kmod"].refused, h["ebpf"].refused, h["kvmstats"].absent = "strange", "strange", "no libvirt"
		step("all refuse", false, "kmod", "ebpf: KVM is not counted: strange", "kvmstats: open: no libvirt")
	})
}
