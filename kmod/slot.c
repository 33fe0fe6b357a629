// SPDX-License-Identifier: GPL-2.0-only
/*
 * Slots: a pool with memory taken beforehand, for a probe cannot allocate; the
 * lookup of a thread's slot; and a slot's way from FREE through LIVE and
 * RETIRED back to FREE.
 *
 * struct vx_slot is never freed before the module goes. So the per-CPU cache
 * may point to a slot that has long been retired: its task is NULL then and
 * the pointer is of no consequence.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/gfp.h>
#include <linux/hash.h>
#include <linux/jiffies.h>
#include <linux/module.h>
#include <linux/rculist.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/timekeeping.h>
#include <linux/vmalloc.h>
#include <asm/msr.h>
#include <asm/tsc.h>

#include "compat.h"
#include "vx.h"

#define VX_SLOTS_LIMIT 65536
#define VX_HASH_BITS 10

/*
 * Slots of one thread, which are walked with preemption off and retire with
 * interrupts off. One that runs more vCPUs would take the slots of others.
 */
#define VX_PER_THREAD 64

static unsigned int slots = 8192;
module_param(slots, uint, 0444);
MODULE_PARM_DESC(slots, "vCPU threads that can be counted at a time (16 KiB each, taken when needed)");

static unsigned int pool = 128;
module_param(pool, uint, 0444);
MODULE_PARM_DESC(pool, "free slots that are kept ready for new vCPU threads");

static_assert(sizeof(struct virtexit_row) == 256);
static_assert(sizeof(struct virtexit_slot) == 16384);
static_assert(sizeof(struct virtexit_cpu) == 64);
static_assert(sizeof(struct virtexit_header) == 96);
static_assert(sizeof(struct virtexit_exit) == 32);
static_assert(offsetof(struct virtexit_slot, generation) == 0);
static_assert(offsetof(struct virtexit_slot, tsc) == 128);
static_assert(offsetof(struct virtexit_slot, index) == 512);
static_assert(offsetof(struct virtexit_slot, rows) == 1024);
static_assert(sizeof(struct virtexit_slot) % PAGE_SIZE == 0);
static_assert(sizeof_field(struct virtexit_slot, comm) == TASK_COMM_LEN);
static_assert(sizeof(struct virtexit_slot) <= U16_MAX);
/* So that one index serves both. */
static_assert(sizeof(struct virtexit_recent) == sizeof(struct virtexit_slot));

/* Finds nothing, so that no probe has to ask whether its CPU has a slot. */
static struct vx_slot vx_no_slot;
DEFINE_PER_CPU(struct vx_slot *, vx_cache);

static struct virtexit_header *vx_header;
static struct virtexit_cpu *vx_cpus;

static struct vx_slot *vx_slots;
static u32 vx_nr_slots;

/* Guards all below, and each slot's membership in lists and hash. */
static DEFINE_RAW_SPINLOCK(vx_slot_lock);
static struct hlist_head vx_hash[1 << VX_HASH_BITS];
static LIST_HEAD(vx_free);
static LIST_HEAD(vx_retired);
static LIST_HEAD(vx_released);
static LIST_HEAD(vx_events);
static u32 vx_nr_free;
static u32 vx_nr_live;
static u32 vx_nr_retired;
static u32 vx_nr_open;

/* The level of new slots. */
static u32 vx_take_level;
/* The level that the probes' fast path is for; OFF: none. */
static u32 vx_fast_level;

/* Exits of each slot on which the cost of the fast path is measured. */
#define VX_MEASURE 16

/* There was no memory for another slot; not to be asked for before then. */
static unsigned long vx_refill_after;

static struct hlist_head *vx_bucket(const struct task_struct *task)
{
	return &vx_hash[hash_ptr(task, VX_HASH_BITS)];
}

/*
 * With preemption off or vx_slot_lock held. A slot of the calling thread
 * cannot come or go meanwhile. Others in its bucket can, but they are not
 * reused before a grace period has passed.
 */
static struct vx_slot *vx_lookup(const struct task_struct *task, u32 vcpu_id)
{
	struct vx_slot *s;

	hlist_for_each_entry_rcu(s, vx_bucket(task), hash,
				 rcu_read_lock_sched_held() ||
				 lockdep_is_held(&vx_slot_lock))
		if (READ_ONCE(s->task) == task && s->vcpu_id == vcpu_id)
			return s;
	return NULL;
}

/**
 * vx_slot_find - the slot of the calling thread and vCPU, or NULL
 * @vcpu: that the thread runs
 *
 * Remembers it for this CPU. Preemption is off, and this is no interrupt.
 */
struct vx_slot *vx_slot_find(struct kvm_vcpu *vcpu)
{
	struct vx_slot *s = __this_cpu_read(vx_cache);

	if (READ_ONCE(s->task) == current && s->vcpu_id == vcpu->vcpu_id)
		return s;
	s = vx_lookup(current, vcpu->vcpu_id);
	if (s)
		__this_cpu_write(vx_cache, s);
	return s;
}

/**
 * vx_slot_find_left - the timed slot of the vCPU that the calling thread ran last
 *
 * Preemption is off, and this is no interrupt.
 *
 * Return: NULL when there is none.
 */
struct vx_slot *vx_slot_find_left(void)
{
	struct vx_slot *s, *last = NULL;

	hlist_for_each_entry_rcu(s, vx_bucket(current), hash,
				 rcu_read_lock_sched_held())
		if (READ_ONCE(s->task) == current &&
		    s->level >= VIRTEXIT_LEVEL_TIME &&
		    (!last || s->pub->tsc > last->pub->tsc))
			last = s;
	return last;
}

/* The calling thread has all slots that it may have; preemption is off. */
static bool vx_thread_full(void)
{
	unsigned int n = 0;
	struct vx_slot *s;

	hlist_for_each_entry_rcu(s, vx_bucket(current), hash,
				 rcu_read_lock_sched_held())
		if (READ_ONCE(s->task) == current)
			n++;
	return n >= VX_PER_THREAD;
}

/* A slot begins at a level that collects nothing, and adopts another. */
static void vx_slot_fill(struct vx_slot *s, struct kvm_vcpu *vcpu, u32 isa)
{
	struct task_struct *leader = current->group_leader;
	struct virtexit_slot *pub = s->pub;

	pub->tid = current->pid;
	pub->tgid = current->tgid;
	pub->start_time = current->start_boottime;
	pub->tgid_start_time = leader->start_boottime;
	pub->vcpu_id = vcpu->vcpu_id;
	pub->isa = isa;
	/* Unlocked: a rename meanwhile may tear the name, not unbound it. */
	memcpy(pub->comm, leader->comm, sizeof(pub->comm) - 1);
	pub->since = ktime_get_boot_fast_ns();
	pub->level = vx_take_level;
	pub->tsc = VX_NEVER;
	pub->has_recent = s->recent != NULL;
	memset16(pub->index, offsetof(struct virtexit_slot, rows),
		 VIRTEXIT_NR_INDEX);

	s->vcpu_id = vcpu->vcpu_id;
	s->level = VIRTEXIT_LEVEL_PAUSE;
	s->want = vx_take_level;
	s->measure = 0;
	s->remeasure = true;
	s->look = true;
	s->round = 0;
	WRITE_ONCE(s->task, current);
	/* Whoever sees the state sees whose slot it is. */
	smp_store_release(&pub->state, VIRTEXIT_LIVE);
}

/**
 * vx_slot_take - a slot for the calling thread; preemption is off
 * @vcpu: that the thread runs
 * @isa: of the vCPU's exits
 *
 * Return: NULL when none is free, or the thread has as many as it may.
 */
struct vx_slot *vx_slot_take(struct kvm_vcpu *vcpu, u32 isa)
{
	struct vx_slot *s = NULL;
	unsigned long flags;

	if (vx_thread_full())
		return NULL;
	/* Not to fight for the lock when there is nothing to be had. */
	if (!list_empty_careful(&vx_free)) {
		raw_spin_lock_irqsave(&vx_slot_lock, flags);
		s = list_first_entry_or_null(&vx_free, struct vx_slot, list);
		if (s) {
			list_del_init(&s->list);
			vx_nr_free--;
			vx_slot_fill(s, vcpu, isa);
			hlist_add_head_rcu(&s->hash, vx_bucket(current));
			vx_nr_live++;
			list_add_tail(&s->event, &vx_events);
			__this_cpu_write(vx_cache, s);
		}
		raw_spin_unlock_irqrestore(&vx_slot_lock, flags);
	}
	if (s || (READ_ONCE(vx_header->slots_backed) < vx_nr_slots &&
		  time_after_eq(jiffies, READ_ONCE(vx_refill_after))))
		vx_kick_atomic();
	return s;
}

/**
 * vx_row - the row of a code, taken into use if need be
 * @pub: the slot
 * @code: of the exit
 *
 * The calling thread owns the slot.
 */
struct virtexit_row *vx_row(struct virtexit_slot *pub, u32 code)
{
	struct virtexit_row *row = vx_row_guess(pub, code);
	u32 i, n = pub->nr_rows;

	if (likely(n && row->code == code))
		return row;
	for (i = 0; i < n; i++) {
		row = &pub->rows[i];
		if (row->code == code && !(row->flags & VIRTEXIT_ROW_OTHER))
			return row;
	}
	if (n == VIRTEXIT_NR_ROWS)
		return &pub->rows[n - 1];

	row = &pub->rows[n];
	if (n == VIRTEXIT_NR_ROWS - 1) {
		row->flags = VIRTEXIT_ROW_OTHER;
	} else {
		row->code = code;
		/* Who comes first has the place; row 0 has its own already. */
		if (vx_row_guess(pub, code) == pub->rows &&
		    (u8)code != (u8)pub->rows[0].code)
			pub->index[(u8)code] = (void *)row - (void *)pub;
	}
	/* Whoever sees the row sees what it is for. */
	smp_store_release(&pub->nr_rows, n + 1);
	return row;
}

/*
 * With vx_slot_lock held. The thread is the caller; or the level falls, and no
 * probe is attached that the higher one needs, and then there is no vcpu.
 */
static void vx_slot_set_level(struct vx_slot *s, u32 level,
			      struct kvm_vcpu *vcpu, u64 now)
{
	bool was_timed = s->level >= VIRTEXIT_LEVEL_TIME;
	bool timed = level >= VIRTEXIT_LEVEL_TIME;

	if (was_timed && !timed)
		vx_time_end(s, now);
	else if (timed && !was_timed)
		vx_time_begin(s, vcpu);
	WRITE_ONCE(s->level, level);
}

/* With vx_slot_lock held: the thread is to look at its next exit. */
static void vx_slot_look(struct vx_slot *s)
{
	WRITE_ONCE(s->fast, NULL);
	WRITE_ONCE(s->look, true);
}

/**
 * vx_slot_adopt - do as is wished, from the exit on that is at hand
 * @s: slot of the calling thread, which is not preempted
 * @vcpu: that the thread runs
 */
void vx_slot_adopt(struct vx_slot *s, struct kvm_vcpu *vcpu)
{
	unsigned long flags;
	u32 level;

	raw_spin_lock_irqsave(&vx_slot_lock, flags);
	level = s->want;
	if (level == VIRTEXIT_LEVEL_RECENT && !s->recent)
		level = VIRTEXIT_LEVEL_TIME;
	if (level != s->level)
		vx_slot_set_level(s, level, vcpu, rdtsc());
	if (level != vx_fast_level)
		s->measure = 0;
	else if (s->remeasure)
		s->measure = VX_MEASURE;
	s->remeasure = false;
	WRITE_ONCE(s->look, false);
	WRITE_ONCE(s->fast, level == vx_fast_level && !s->measure ? s->task :
								    NULL);
	raw_spin_unlock_irqrestore(&vx_slot_lock, flags);
}

/* vx_mutex held. */
static void vx_set_fast_level(u32 level)
{
	raw_spin_lock_irq(&vx_slot_lock);
	vx_fast_level = level;
	/* What the cost was on another path is of no interest. */
	vx_header->exit_cost = 0;
	vx_header->entry_cost = 0;
	raw_spin_unlock_irq(&vx_slot_lock);
}

/* vx_mutex held. */
static void vx_slots_look(void)
{
	u32 i;

	for (i = 0; i < vx_header->slots_backed; i++) {
		struct vx_slot *s = &vx_slots[i];

		raw_spin_lock_irq(&vx_slot_lock);
		if (s->task) {
			s->remeasure = true;
			vx_slot_look(s);
		}
		raw_spin_unlock_irq(&vx_slot_lock);
	}
}

/**
 * vx_slots_no_fast - no exit that follows takes the fast path; vx_mutex held
 *
 * One that has begun may still be on it.
 */
void vx_slots_no_fast(void)
{
	lockdep_assert_held(&vx_mutex);
	vx_set_fast_level(VIRTEXIT_LEVEL_OFF);
	vx_slots_look();
}

/**
 * vx_slots_fast_time - the fast path is for slots at TIME; vx_mutex held
 */
void vx_slots_fast_time(void)
{
	lockdep_assert_held(&vx_mutex);
	vx_set_fast_level(VIRTEXIT_LEVEL_TIME);
	vx_slots_look();
}

/**
 * vx_slots_cap - no slot is at a higher level than this; vx_mutex held
 * @level: PAUSE or COUNT; no probe is attached that a higher one needs
 * @now: when the probes began to go
 */
void vx_slots_cap(u32 level, u64 now)
{
	u32 i;

	lockdep_assert_held(&vx_mutex);
	vx_set_fast_level(level == VIRTEXIT_LEVEL_COUNT ? level :
							  VIRTEXIT_LEVEL_OFF);
	raw_spin_lock_irq(&vx_slot_lock);
	vx_take_level = min(vx_take_level, level);
	raw_spin_unlock_irq(&vx_slot_lock);
	for (i = 0; i < vx_header->slots_backed; i++) {
		struct vx_slot *s = &vx_slots[i];

		raw_spin_lock_irq(&vx_slot_lock);
		if (s->task) {
			s->want = min(s->want, level);
			if (s->level > level)
				vx_slot_set_level(s, level, NULL, now);
			s->remeasure = true;
			s->round = 0;
			vx_slot_look(s);
		}
		raw_spin_unlock_irq(&vx_slot_lock);
	}
}

/**
 * vx_slots_wish - have each slot adopt the level that is wished for
 * @level: the highest that is attached
 *
 * vx_mutex held.
 */
void vx_slots_wish(u32 level)
{
	static u32 round, last;
	u32 i, want;

	lockdep_assert_held(&vx_mutex);
	/* What has been asked is not asked again; 0 is that of a new slot. */
	if (vx_leases_changed() || level != last)
		if (!++round)
			round = 1;
	last = level;
	want = max_t(u32, min(vx_leases_default(), level),
		     VIRTEXIT_LEVEL_PAUSE);
	raw_spin_lock_irq(&vx_slot_lock);
	vx_take_level = want;
	raw_spin_unlock_irq(&vx_slot_lock);
	for (i = 0; i < vx_header->slots_backed; i++) {
		struct vx_slot *s = &vx_slots[i];

		/* Pairs with vx_slot_fill(). Not reused while vx_mutex is held. */
		if (smp_load_acquire(&s->pub->state) != VIRTEXIT_LIVE ||
		    READ_ONCE(s->round) == round)
			continue;
		want = vx_leases_wish(s->pub->tgid, s->pub->tgid_start_time);
		want = max_t(u32, min(want, level), VIRTEXIT_LEVEL_PAUSE);
		raw_spin_lock_irq(&vx_slot_lock);
		if (s->task && want != s->want) {
			WRITE_ONCE(s->want, want);
			vx_slot_look(s);
		}
		if (s->task && level >= VIRTEXIT_LEVEL_COUNT)
			WRITE_ONCE(s->pub->level, want);
		s->round = round;
		raw_spin_unlock_irq(&vx_slot_lock);
		cond_resched();
	}
}

/**
 * vx_slots_recent - give memory to the slots that log exits; vx_mutex held
 *
 * Those that get none stay at TIME.
 */
void vx_slots_recent(void)
{
	u32 i;

	lockdep_assert_held(&vx_mutex);
	for (i = 0; i < vx_header->slots_backed; i++) {
		struct vx_slot *s = &vx_slots[i];
		struct virtexit_recent *recent;

		if (READ_ONCE(s->want) != VIRTEXIT_LEVEL_RECENT || s->recent)
			continue;
		recent = alloc_pages_exact(sizeof(*recent), GFP_KERNEL |
					   __GFP_ZERO | __GFP_NORETRY |
					   __GFP_NOWARN);
		if (!recent)
			return;
		raw_spin_lock_irq(&vx_slot_lock);
		/* Pairs with vx_page(). */
		smp_store_release(&s->recent, recent);
		if (s->task) {
			WRITE_ONCE(s->pub->has_recent, 1);
			vx_slot_look(s);
		}
		raw_spin_unlock_irq(&vx_slot_lock);
	}
}

/* With vx_slot_lock held. The thread is the caller, or no probe is attached. */
static void vx_slot_retire(struct vx_slot *s)
{
	if (s->level >= VIRTEXIT_LEVEL_TIME)
		vx_time_end(s, rdtsc());
	hlist_del_rcu(&s->hash);
	WRITE_ONCE(s->fast, NULL);
	WRITE_ONCE(s->task, NULL);
	s->want = VIRTEXIT_LEVEL_OFF;
	vx_nr_live--;
	/* Whoever sees the state sees the final counts. */
	smp_store_release(&s->pub->state, VIRTEXIT_RETIRED);
	list_add_tail(&s->list, &vx_retired);
	vx_nr_retired++;
	if (list_empty(&s->event))
		list_add_tail(&s->event, &vx_events);
}

/**
 * vx_slots_retire_task - retire the slots of a thread
 * @task: the thread, which is the caller and dying
 */
void vx_slots_retire_task(struct task_struct *task)
{
	struct hlist_head *bucket = vx_bucket(task);
	struct hlist_node *next;
	unsigned long flags;
	bool any = false;
	struct vx_slot *s;

	if (hlist_empty(bucket))
		return;
	raw_spin_lock_irqsave(&vx_slot_lock, flags);
	hlist_for_each_entry_safe(s, next, bucket, hash) {
		if (s->task != task)
			continue;
		vx_slot_retire(s);
		any = true;
	}
	raw_spin_unlock_irqrestore(&vx_slot_lock, flags);
	if (any)
		vx_kick_atomic();
}

/**
 * vx_slots_retire_all - retire every live slot; no probe is attached
 */
void vx_slots_retire_all(void)
{
	u32 i, backed = vx_header->slots_backed;

	for (i = 0; i < backed; i++) {
		struct vx_slot *s = &vx_slots[i];

		raw_spin_lock_irq(&vx_slot_lock);
		if (s->task)
			vx_slot_retire(s);
		raw_spin_unlock_irq(&vx_slot_lock);
	}
}

/**
 * vx_slot_release - take back a retired slot whose counts have been read
 * @index: of the slot
 * @generation: of its use
 *
 * It can be used again after vx_slots_reclaim().
 *
 * Return: -ESTALE when it is not a retired slot of this generation.
 */
int vx_slot_release(u32 index, u32 generation)
{
	struct virtexit_slot *pub;
	struct vx_slot *s;
	u64 exits = 0;
	int err = -ESTALE;
	u32 i;

	if (index >= READ_ONCE(vx_header->slots_backed))
		return -ESTALE;
	s = &vx_slots[index];
	raw_spin_lock_irq(&vx_slot_lock);
	pub = s->pub;
	if (s->generation == generation && pub->state == VIRTEXIT_RETIRED) {
		for (i = 0; i < pub->nr_rows; i++)
			exits += pub->rows[i].count;
		WRITE_ONCE(vx_header->seq, vx_header->seq + 1);
		/* Odd before anything moves. */
		smp_wmb();
		vx_header->released += exits;
		vx_header->released_slots++;
		/*
		 * FREE first, lest a reader take the old counts for those of
		 * the next generation; one that is copying will see that
		 * generation and discard.
		 */
		WRITE_ONCE(pub->state, VIRTEXIT_FREE);
		smp_store_release(&pub->generation, ++s->generation);
		/* Even when all has moved. */
		smp_store_release(&vx_header->seq, vx_header->seq + 1);
		vx_nr_retired--;
		list_del_init(&s->event);
		list_move(&s->list, &vx_released);
		err = 0;
	}
	raw_spin_unlock_irq(&vx_slot_lock);
	return err;
}

/**
 * vx_slots_reclaim - make released slots free; vx_mutex held
 */
void vx_slots_reclaim(void)
{
	LIST_HEAD(released);
	struct vx_slot *s;

	lockdep_assert_held(&vx_mutex);
	raw_spin_lock_irq(&vx_slot_lock);
	list_splice_init(&vx_released, &released);
	raw_spin_unlock_irq(&vx_slot_lock);
	if (list_empty(&released))
		return;

	/* A lookup may still stand on one of them; and the order of above. */
	synchronize_rcu();
	list_for_each_entry(s, &released, list) {
		/* All but the generation, which a reader may compare. */
		memset_after(s->pub, 0, generation);
		cond_resched();
	}
	raw_spin_lock_irq(&vx_slot_lock);
	list_for_each_entry(s, &released, list)
		vx_nr_free++;
	list_splice(&released, &vx_free);
	raw_spin_unlock_irq(&vx_slot_lock);
}

/**
 * vx_slots_refill - have the pool's number of free slots; vx_mutex held
 *
 * When memory is short there are fewer, and exits that find none are counted
 * as unattributed.
 */
void vx_slots_refill(void)
{
	u32 i;

	lockdep_assert_held(&vx_mutex);
	for (i = vx_header->slots_backed; i < vx_nr_slots; i++) {
		struct vx_slot *s = &vx_slots[i];

		if (READ_ONCE(vx_nr_free) >= pool)
			break;
		s->pub = alloc_pages_exact(sizeof(*s->pub), GFP_KERNEL |
					   __GFP_ZERO | __GFP_NORETRY |
					   __GFP_NOWARN);
		if (!s->pub) {
			WRITE_ONCE(vx_refill_after, jiffies + HZ);
			break;
		}
		s->pub->generation = s->generation;
		/* Pairs with vx_page(). */
		smp_store_release(&vx_header->slots_backed, i + 1);

		raw_spin_lock_irq(&vx_slot_lock);
		list_add_tail(&s->list, &vx_free);
		vx_nr_free++;
		raw_spin_unlock_irq(&vx_slot_lock);
	}
}

/**
 * vx_slots_trim - give the memory of free slots back
 *
 * vx_mutex held; no lease is held. It ends when the device is opened. Slots
 * stay numbered without gaps, so a slot that is in use keeps those below it.
 */
void vx_slots_trim(void)
{
	u32 i;

	lockdep_assert_held(&vx_mutex);
	for (i = vx_header->slots_backed; i > 0; i--) {
		struct vx_slot *s = &vx_slots[i - 1];
		bool free;

		raw_spin_lock_irq(&vx_slot_lock);
		free = !vx_nr_open && !list_empty(&s->list) &&
		       s->pub->state == VIRTEXIT_FREE;
		if (free) {
			list_del_init(&s->list);
			vx_nr_free--;
			WRITE_ONCE(vx_header->slots_backed, i - 1);
		}
		raw_spin_unlock_irq(&vx_slot_lock);
		if (!free)
			break;
		free_pages_exact(s->pub, sizeof(*s->pub));
		s->pub = NULL;
		if (s->recent)
			free_pages_exact(s->recent, sizeof(*s->recent));
		s->recent = NULL;
		cond_resched();
	}
}

/**
 * vx_slots_pin - a reader comes: what has memory keeps it
 */
void vx_slots_pin(void)
{
	raw_spin_lock_irq(&vx_slot_lock);
	vx_nr_open++;
	raw_spin_unlock_irq(&vx_slot_lock);
}

/**
 * vx_slots_unpin - a reader goes
 */
void vx_slots_unpin(void)
{
	raw_spin_lock_irq(&vx_slot_lock);
	vx_nr_open--;
	raw_spin_unlock_irq(&vx_slot_lock);
}

/**
 * vx_slot_next_event - take a slot whose state has changed off the list
 * @ref: where to put what is to be said of it
 *
 * Return: false when there is none.
 */
bool vx_slot_next_event(struct vx_slot_ref *ref)
{
	struct virtexit_slot *pub;
	struct vx_slot *s;

	raw_spin_lock_irq(&vx_slot_lock);
	s = list_first_entry_or_null(&vx_events, struct vx_slot, event);
	if (s) {
		list_del_init(&s->event);
		pub = s->pub;
		*ref = (struct vx_slot_ref) {
			.index = s->index,
			.generation = s->generation,
			.state = pub->state,
			.tid = pub->tid,
			.tgid = pub->tgid,
			.vcpu_id = pub->vcpu_id,
		};
	}
	raw_spin_unlock_irq(&vx_slot_lock);
	return s;
}

/**
 * vx_slot_stat - how many slots there are of each kind
 * @stat: where to put it
 */
void vx_slot_stat(struct vx_slot_stat *stat)
{
	raw_spin_lock_irq(&vx_slot_lock);
	stat->max = vx_nr_slots;
	stat->backed = vx_header->slots_backed;
	stat->live = vx_nr_live;
	stat->retired = vx_nr_retired;
	raw_spin_unlock_irq(&vx_slot_lock);
}

/**
 * vx_header_counting - exits are counted from now on, or no more; vx_mutex held
 * @on: they are
 */
void vx_header_counting(bool on)
{
	struct virtexit_header *h = vx_header;
	u64 now = ktime_get_boottime_ns();

	if (on == !!h->counted_since)
		return;
	raw_spin_lock_irq(&vx_slot_lock);
	WRITE_ONCE(h->seq, h->seq + 1);
	/* Odd before anything moves. */
	smp_wmb();
	if (!on)
		h->counted += now - h->counted_since;
	h->counted_since = on ? now : 0;
	/* Even when all has moved. */
	smp_store_release(&h->seq, h->seq + 1);
	raw_spin_unlock_irq(&vx_slot_lock);
}

static void vx_least(u32 *least, u64 cycles)
{
	/* More than one at a time may come here; either is as good. */
	if (cycles && cycles <= U32_MAX &&
	    (!READ_ONCE(*least) || cycles < READ_ONCE(*least)))
		WRITE_ONCE(*least, cycles);
}

/**
 * vx_header_cost - what the hook took this time
 * @exit: cycles at an exit; 0 when that was not measured
 * @entry: the same at an entry
 */
void vx_header_cost(u64 exit, u64 entry)
{
	vx_least(&vx_header->exit_cost, exit);
	vx_least(&vx_header->entry_cost, entry);
}

/**
 * vx_count_unattributed - count an exit that has no slot
 *
 * Preemption is off. Nothing is counted when a slot would not have, either.
 */
void vx_count_unattributed(void)
{
	if (READ_ONCE(vx_take_level) >= VIRTEXIT_LEVEL_COUNT)
		vx_cpus[smp_processor_id()].unattributed++;
}

/**
 * vx_count_refused - count an exit whose reason is in doubt; preemption is off
 */
void vx_count_refused(void)
{
	vx_cpus[smp_processor_id()].refused++;
}

/**
 * vx_page - the page at an offset of the mapping, or NULL
 * @pgoff: in pages, within the size of the mapping
 */
struct page *vx_page(unsigned long pgoff)
{
	unsigned long offset = pgoff << PAGE_SHIFT;
	unsigned long index;
	bool recent;
	void *mem;

	if (pgoff < vx_header->slot_offset >> PAGE_SHIFT)
		return vmalloc_to_page((void *)vx_header + offset);
	offset -= vx_header->slot_offset;
	index = offset / sizeof(struct virtexit_slot);
	offset %= sizeof(struct virtexit_slot);
	recent = index >= vx_nr_slots;
	if (recent)
		index -= vx_nr_slots;
	/* Pairs with vx_slots_refill(); the device is open, so it stays. */
	if (index >= smp_load_acquire(&vx_header->slots_backed))
		return NULL;
	/* Pairs with vx_slots_recent(). */
	mem = recent ? (void *)smp_load_acquire(&vx_slots[index].recent) :
		       vx_slots[index].pub;
	return mem ? virt_to_page(mem + offset) : NULL;
}

/**
 * vx_map_size - bytes that can be mapped
 */
unsigned long vx_map_size(void)
{
	return vx_header->recent_offset +
	       (unsigned long)vx_nr_slots * sizeof(struct virtexit_recent);
}

int vx_slots_init(void)
{
	u32 cpu_offset = ALIGN(sizeof(struct virtexit_header),
			       sizeof(struct virtexit_cpu));
	u32 slot_offset = PAGE_ALIGN(cpu_offset + nr_cpu_ids *
				     sizeof(struct virtexit_cpu));
	unsigned int cpu;
	u32 i;

	if (!slots || slots > VX_SLOTS_LIMIT) {
		pr_err("slots=%u: must be 1 to %u\n", slots, VX_SLOTS_LIMIT);
		return -EINVAL;
	}
	if (!pool) {
		pr_err("pool=0: must be at least 1\n");
		return -EINVAL;
	}
	vx_nr_slots = slots;

	vx_header = vmalloc_user(slot_offset);
	if (!vx_header)
		return -ENOMEM;
	vx_slots = kvcalloc(vx_nr_slots, sizeof(*vx_slots), GFP_KERNEL);
	if (!vx_slots) {
		vfree(vx_header);
		return -ENOMEM;
	}
	for (i = 0; i < vx_nr_slots; i++) {
		vx_slots[i].index = i;
		INIT_LIST_HEAD(&vx_slots[i].list);
		INIT_LIST_HEAD(&vx_slots[i].event);
	}
	/* Not statically: a module's per-CPU section is not relocated. */
	for_each_possible_cpu(cpu)
		per_cpu(vx_cache, cpu) = &vx_no_slot;
	vx_cpus = (void *)vx_header + cpu_offset;
	*vx_header = (struct virtexit_header) {
		.magic = VIRTEXIT_MAGIC,
		.abi = VIRTEXIT_ABI,
		.cpu_offset = cpu_offset,
		.nr_cpus = nr_cpu_ids,
		.slot_offset = slot_offset,
		.slot_size = sizeof(struct virtexit_slot),
		.nr_slots = vx_nr_slots,
		.tsc_khz = tsc_khz,
		.recent_offset = slot_offset +
				 vx_nr_slots * sizeof(struct virtexit_slot),
		.recent_size = sizeof(struct virtexit_recent),
		.loaded = ktime_get_boottime_ns(),
	};
	return 0;
}

/* Nobody maps, no probe is attached or running, and the worker is done. */
void vx_slots_exit(void)
{
	u32 i;

	for (i = 0; i < vx_header->slots_backed; i++) {
		free_pages_exact(vx_slots[i].pub, sizeof(struct virtexit_slot));
		if (vx_slots[i].recent)
			free_pages_exact(vx_slots[i].recent,
					 sizeof(struct virtexit_recent));
	}
	kvfree(vx_slots);
	vfree(vx_header);
}
