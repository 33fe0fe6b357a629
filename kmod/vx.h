/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the files of virtexit.ko share.
 *
 *	main.c		load and unload; the worker
 *	hook.c		the tracepoints: when they are attached, what a hit does
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
#define VX_NOT_ENTERED S64_MAX

/**
 * struct vx_slot - what the module knows of a slot beyond its counters
 * @task: thread being counted; compared, never followed; NULL unless LIVE.
 *	It is written by that thread and, with no probe attached, by the
 *	detaching one: so a thread that finds itself in it may use the slot.
 * @vcpu_id: vCPU being counted
 * @index: of the slot
 * @generation: of its next or present use; survives the loss of its memory
 * @pub: its counters, mapped by readers; NULL when it has no memory
 * @row: of the exit that is being handled; NULL when there is none
 * @exit_tsc: when that exit occurred
 * @entry_tsc: when the guest was entered; VX_NOT_ENTERED when it is not running
 * @hash: in vx_hash while LIVE
 * @list: on the list of free or retired slots
 * @event: on the list of slots whose state is to be announced
 */
struct vx_slot {
	struct task_struct *task;
	u32 vcpu_id;
	u32 index;
	u32 generation;
	struct virtexit_slot *pub;
	struct virtexit_row *row;
	u64 exit_tsc;
	u64 entry_tsc;

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
u32 vx_reason_resolve(void);
void vx_reason_forget(void);
const char *vx_reason_unusable(u32 isa);
int vx_reason_check(struct kvm_vcpu *vcpu, u32 isa, u32 *code);

/* slot.c */
DECLARE_PER_CPU(struct vx_slot *, vx_cache);
int vx_slots_init(void);
void vx_slots_exit(void);
struct vx_slot *vx_slot_find(struct kvm_vcpu *vcpu);
struct vx_slot *vx_slot_take(struct kvm_vcpu *vcpu, u32 isa, u32 code);
struct virtexit_row *vx_row(struct virtexit_slot *pub, u32 code);
void vx_slots_untime(void);
void vx_slots_retire_task(struct task_struct *task);
void vx_slots_retire_all(void);
int vx_slot_release(u32 index, u32 generation);
void vx_slots_reclaim(void);
void vx_slots_refill(void);
void vx_slots_trim(void);
bool vx_slot_next_event(struct vx_slot_ref *ref);
void vx_slot_stat(struct vx_slot_stat *stat);
void vx_count_unattributed(void);
void vx_count_refused(void);
void vx_slots_pin(void);
void vx_slots_unpin(void);
struct page *vx_page(unsigned long pgoff);
unsigned long vx_map_size(void);

/* device.c */
int vx_device_init(void);
void vx_device_exit(void);

/* netlink.c */
int vx_netlink_init(void);
void vx_netlink_exit(void);
void vx_leases_reap(void);
u32 vx_leases_level(void);
void vx_send_vcpu_events(void);
void vx_send_kvm_event(void);

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
	return (void *)pub->rows + pub->index[(u8)code];
}

#endif /* _VX_H */
