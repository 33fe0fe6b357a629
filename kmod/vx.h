/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the files of virtexit.ko share.
 *
 *	main.c		load and unload; the worker
 *	hook.c		the hook: when it is attached, what a hit does
 *	time.c		where the time of a vCPU thread goes
 *	reason.c	the exit reason of a vCPU, and whether KVM agrees
 *	slot.c		slots: pool, lookup, retirement, release
 *	device.c	/dev/virtexit
 *	netlink.c	leases, requests, events
 *
 * Locks, outermost first: vx_mutex (what is attached), tracepoint and kprobe
 * locks of the kernel, vx_slot_lock (raw, taken in the probes).
 */
#ifndef _VX_H
#define _VX_H

#include <linux/kvm_host.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/types.h>

#include "uapi/virtexit.h"

#define VX_VERSION "0.1.0"

/* Later than any TSC, so that no time has passed since. */
#define VX_NEVER S64_MAX

/* More context switches than there can be. */
#define VX_LOOK U64_MAX

/**
 * struct vx_slot - what the module knows of a slot beyond its counters
 * @fast: @task while the slot's level is the one that the probes are made for,
 *	so that nothing more need be asked; else NULL
 * @vcpu_id: vCPU being counted
 * @index: of the slot
 * @pub: its counters, mapped by readers; NULL when it has no memory
 * @switches: the thread's context switches up to the last entry; VX_LOOK when
 *	there is something that the next entry has to look at
 * @task: thread being counted; NULL unless LIVE. It is written by that thread
 *	and, with no probe attached, by the detaching one: so a thread that finds
 *	itself in it may use the slot. With vx_slot_lock held it may be followed.
 * @handled: cycles of handling of the exit in progress, in stretches that ended
 * @run_delay: the thread's, when a stretch last ended
 * @poll_ns: the vCPU's, when a halt last ended
 * @halt_ns: the vCPU's, when a halt last ended
 * @recent: its recent exits, mapped by readers; NULL when they have no memory
 * @level: at which the thread is counted; written by that thread and, with no
 *	probe attached that a higher level needs, by the detaching one
 * @want: at which it is to be counted
 * @look: @want or what it takes has changed
 * @remeasure: the cost of the fast path is to be measured on the slot's exits
 * @measure: on so many more of them; written by the thread alone
 * @round: of wishes when @want was set
 * @generation: of its next or present use; survives the loss of its memory
 * @hash: in vx_hash while LIVE
 * @list: on the list of free or retired slots
 * @event: on the list of slots whose state is to be announced
 */
struct vx_slot {
	struct task_struct *fast;
	u32 vcpu_id;
	u32 index;
	struct virtexit_slot *pub;
	u64 switches;
	struct task_struct *task;
	u64 handled;
	u64 run_delay;
	u64 poll_ns;
	u64 halt_ns;
	struct virtexit_recent *recent;
	u32 level;
	u32 want;
	bool look;
	bool remeasure;
	u8 measure;
	u32 round;
	u32 generation;

	struct hlist_node hash;
	struct list_head list;
	struct list_head event;
} ____cacheline_aligned;

/**
 * struct vx_slot_stat - how many slots there are of each kind
 * @max: that there can be
 * @backed: that have memory
 * @live: in use
 * @retired: waiting to be released
 */
struct vx_slot_stat {
	u32 max;
	u32 backed;
	u32 live;
	u32 retired;
};

/**
 * struct vx_slot_ref - one use of one slot, as events announce it
 */
struct vx_slot_ref {
	u32 index;
	u32 generation;
	u32 state;
	u32 tid;
	u32 tgid;
	u32 vcpu_id;
};

/**
 * struct vx_hook_stat - what is attached
 * @level: in force
 * @hook: enum virtexit_hook
 * @isa: enum virtexit_isa
 * @kvm: KVM's tracepoints are there
 * @refused: why KVM is not counted although it is there; or NULL
 */
struct vx_hook_stat {
	u32 level;
	u32 hook;
	u32 isa;
	bool kvm;
	const char *refused;
};

/* main.c */
extern struct mutex vx_mutex;
void vx_kick(void);
void vx_kick_atomic(void);

/* hook.c */
int vx_hook_init(void);
void vx_hook_exit(void);
void vx_hook_update(void);
void vx_hook_stat(struct vx_hook_stat *stat);

/* reason.c */
const char *vx_reason_vendor(void);
void *vx_function(const char *name);
u32 vx_reason_resolve(void);
void vx_reason_forget(void);
const char *vx_reason_unusable(u32 isa);
int vx_reason_check(struct kvm_vcpu *vcpu, u32 isa);

/* slot.c */
DECLARE_PER_CPU(struct vx_slot *, vx_cache);
int vx_slots_init(void);
void vx_slots_exit(void);
struct vx_slot *vx_slot_find(struct kvm_vcpu *vcpu);
struct vx_slot *vx_slot_find_left(void);
struct vx_slot *vx_slot_take(struct kvm_vcpu *vcpu, u32 isa);
struct virtexit_row *vx_row(struct virtexit_slot *pub, u32 code);
void vx_slot_adopt(struct vx_slot *s, struct kvm_vcpu *vcpu);
void vx_slots_no_fast(void);
void vx_slots_fast_time(void);
void vx_slots_cap(u32 level, u64 now);
void vx_slots_wish(u32 level);
void vx_slots_recent(void);
void vx_slots_retire_task(struct task_struct *task);
void vx_slots_retire_all(void);
int vx_slot_release(u32 index, u32 generation);
void vx_slots_reclaim(void);
void vx_slots_refill(void);
void vx_slots_trim(void);
bool vx_slot_next_event(struct vx_slot_ref *ref);
void vx_slot_stat(struct vx_slot_stat *stat);
void vx_header_counting(bool on);
void vx_header_cost(u64 exit, u64 entry);
void vx_count_unattributed(void);
void vx_count_refused(void);
void vx_slots_pin(void);
void vx_slots_unpin(void);
struct page *vx_page(unsigned long pgoff);
unsigned long vx_map_size(void);

/* time.c */
void vx_time_init(void);
void vx_time_begin(struct vx_slot *s, struct kvm_vcpu *vcpu);
void vx_time_end(struct vx_slot *s, u64 now);
void vx_time_wakeup(struct vx_slot *s, struct kvm_vcpu *vcpu);
void vx_time_leave(struct vx_slot *s, u32 doing);
void vx_time_enter(struct vx_slot *s, struct kvm_vcpu *vcpu);

/* device.c */
int vx_device_init(void);
void vx_device_exit(void);

/* netlink.c */
int vx_netlink_init(void);
void vx_netlink_exit(void);
void vx_leases_reap(void);
u32 vx_leases_level(void);
u32 vx_leases_default(void);
u32 vx_leases_wish(u32 tgid, u64 start_time);
bool vx_leases_changed(void);
void vx_send_vcpu_events(void);
void vx_send_kvm_event(void);

static __always_inline struct virtexit_row *
vx_row_at(struct virtexit_slot *pub, u32 offset)
{
	return (void *)pub + offset;
}

/**
 * vx_row_guess - the row that the index names for a code
 *
 * Codes that share a low byte share a place: SVM's 0x400 and up with those of
 * registers that a guest with nested paging may access freely. An unused place
 * leads to row 0, which is in use from the slot's first exit on. So the caller
 * compares the code, and asks vx_row() when it is another.
 */
static __always_inline struct virtexit_row *
vx_row_guess(struct virtexit_slot *pub, u32 code)
{
	return vx_row_at(pub, pub->index[(u8)code]);
}

/* Neither counts twice what the other does. */
static __always_inline u64 vx_switches(struct task_struct *task)
{
	return task->nvcsw + task->nivcsw;
}

/* A stretch of time begins. A reader that sees so sees the sums of the last. */
static __always_inline void vx_stretch_from(struct virtexit_slot *pub, u64 now)
{
	barrier();
	WRITE_ONCE(pub->tsc, now);
}

/* An exit has been handled for so long; its sum is the caller's. */
static __always_inline void vx_row_handled(struct virtexit_row *row, u64 cycles)
{
	unsigned int i;

	i = __fls(cycles | BIT(VIRTEXIT_HIST_SHIFT)) - VIRTEXIT_HIST_SHIFT;
	if (unlikely(i >= VIRTEXIT_NR_HIST))
		i = VIRTEXIT_NR_HIST - 1;
	row->hist[i]++;
}

#endif /* _VX_H */
