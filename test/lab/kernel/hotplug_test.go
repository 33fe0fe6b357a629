// SPDX-License-Identifier: Apache-2.0

//go:build lab

package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtexit/internal/snapshot"
	"virtexit/test/lab/guest"
	"virtexit/test/lab/inside"
)

// A CPU goes and comes back while vCPUs run on it, and probes are attached and detached while it is away.
func TestCPUHotplug(t *testing.T) {
	const cpu = 1
	online := fmt.Sprintf("/sys/devices/system/cpu/cpu%d/online", cpu)
	if _, err := os.Stat(online); errors.Is(err, fs.ErrNotExist) {
		t.Skip("machine: has no CPU to take offline")
	}
	set := func(state string) {
		t.Helper()
		if err := os.WriteFile(online, []byte(state), 0); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { set("1") })
	inside.Load(t, "")
	s := open(t, snapshot.Count)
	vm := newVM(t, 2)
	var on unix.CPUSet
	on.Set(cpu)

	p, err := guest.Parse("cpuid:100,out:0x80:10")
	if err != nil {
		t.Fatal(err)
	}
	p.Forever = true
	for _, v := range vm.VCPUs {
		v.Start(p)
	}
	for round := range 6 {
		for _, v := range vm.VCPUs {
			// The kernel moves it elsewhere when the CPU goes.
			if err := unix.SchedSetaffinity(v.TID(), &on); err != nil {
				t.Fatal(err)
			}
		}
		set("0")
		if err := s.SetLevel([]snapshot.Level{snapshot.Time, snapshot.Count}[round%2]); err != nil {
			t.Error(err)
		}
		for _, v := range vm.VCPUs {
			before := total(counts(snap(t, s), v.TID()))
			inside.Eventually(t, "exits are counted without the CPU", 5*time.Second, func() bool {
				return total(counts(snap(t, s), v.TID())) > before+1000
			})
		}
		set("1")
	}
	for _, v := range vm.VCPUs {
		v.Stop()
		if err := v.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	sn := snap(t, s)
	for _, v := range vm.VCPUs {
		stats, err := v.Stats()
		if err != nil {
			t.Fatal(err)
		}
		if got := total(counts(sn, v.TID())); got != stats["exits"] {
			t.Errorf("thread %d: %d exits, want KVM's %d", v.TID(), got, stats["exits"])
		}
	}
	if sn.Unattributed != 0 || sn.Refused != 0 {
		t.Errorf("unattributed %d, refused %d, want none", sn.Unattributed, sn.Refused)
	}
	for _, slot := range sn.Slots {
		for _, r := range slot.Rows {
			if seconds := r.Max / sn.TickHz; seconds > 60 {
				t.Errorf("row %#x: longest exit %d s", r.Code, seconds)
			}
		}
	}
}
