/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the programs share with the process that loads them, besides the layout
 * of slots, which is that of virtexit.ko: see kmod/uapi/virtexit.h.
 *
 * Slots are in arrays of CHUNK each, which the process adds when free ones run
 * short, and maps side by side. It puts the numbers of free slots into a queue,
 * from which a thread takes one at its first exit. A live slot is written by its
 * thread, by settle() and, for what is said below, by the process.
 */
#ifndef _VX_COLLECTOR_H
#define _VX_COLLECTOR_H

#include <linux/types.h>

enum {
	VX_CHUNK = 64,
	VX_CACHES = 1024,
	VX_CHAIN = 16,	/* slots of one thread, at most; its other vCPUs have none */
	VX_MEASURE = 16,
};

/* Of vx_own.slow. */
enum {
	VX_SLOW_LEVEL = 1,	/* not at COUNT or TIME */
	VX_SLOW_LEFT = 2,	/* out of KVM_RUN since vcpu was looked at */
	VX_SLOW_MEASURE = 4,
};

/**
 * struct vx_own - what is known of a slot beyond its counters; in its reserved2
 * @task: thread being counted; 0 unless LIVE
 * @vcpu: that it ran last
 * @look: @want has changed; set by the process
 * @slow: why the fast path is not for this slot
 * @switches: the thread's context switches up to the last entry; ~0 when there is
 *	something that the next entry has to look at
 * @handled: time of handling of the exit in progress, in stretches that ended
 * @run_delay: the thread's, when a stretch last ended
 * @poll_ns: the vCPU's, when a halt last ended
 * @halt_ns: the vCPU's, when a halt last ended
 * @guest_tsc: the vCPU's last_guest_tsc at the last entry; 0 where not looked at
 * @index: of the slot
 * @level: at which the thread is counted
 * @want: at which it is to be counted; set by the process
 * @measure: on so many more exits the cost of the fast path
 * @next: the slot that the thread took before, + 1
 * @chain: how many it had taken before
 * @late: when an exit occurred is to be had from the guest's TSC
 */
struct vx_own {
	__u64 task;
	__u64 vcpu;
	__u32 look;
	__u32 slow;
	__u64 switches;
	__u64 handled;
	__u64 run_delay;
	__u64 poll_ns;
	__u64 halt_ns;
	__u64 guest_tsc;
	__u32 index;
	__u32 level;
	__u32 want;
	__u32 measure;
	__u32 next;
	__u32 chain;
	__u32 late;
	__u32 pad;
};

/**
 * struct vx_event - a slot came into use or retired
 */
struct vx_event {
	__u32 slot;
	__u32 generation;
	__u32 state;
	__u32 tid;
	__u32 tgid;
	__u32 vcpu_id;
};

/**
 * struct vx_tsc - a moment on two clocks
 * @tsc: cycles
 * @ns: CLOCK_MONOTONIC
 * @mult: nanoseconds per cycle, times 2^28
 */
struct vx_tsc {
	__u64 tsc;
	__u64 ns;
	__u64 mult;
};

#endif /* _VX_COLLECTOR_H */
