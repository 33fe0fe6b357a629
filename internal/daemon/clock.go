// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"sync"
	"time"
)

// wasSet is how far the wall clock must have moved against the boot time for it
// to have been set: nothing else moves it.
const wasSet = 100 * time.Millisecond

// clock tells when the machine booted, by the wall clock. Two answers are the
// same to the nanosecond unless that was set in between: who compares a
// domain's since with an earlier one wants to know whether it starts anew.
type clock struct {
	now    func() time.Time
	uptime func() time.Duration // CLOCK_BOOTTIME

	mu   sync.Mutex
	boot time.Time // zero before it is first asked for
}

func (c *clock) booted() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	boot, late := c.read()
	if moved := boot.Sub(c.boot); moved > wasSet+late || moved < -wasSet {
		for range 10 { // the best of them is kept for long
			if again, l := c.read(); l < late {
				boot, late = again, l
			}
		}
		c.boot = boot
	}
	return c.boot
}

// read reads both clocks one after the other, which makes boot up to late too
// late.
func (c *clock) read() (boot time.Time, late time.Duration) {
	up := c.uptime()
	boot = c.now().Round(0).Add(-up)
	return boot, c.uptime() - up
}
