// SPDX-License-Identifier: GPL-2.0-only
/*
 * Exits counted by BPF programs on the stock tracepoints of KVM, as virtexit.ko
 * counts them: see kmod/hook.c and kmod/time.c for the why of what is alike here.
 *
 * There is no TSC to be had, so that time is CLOCK_MONOTONIC's nanoseconds.
 */
#include <stddef.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#include "../../../../kmod/uapi/virtexit.h"
#include "kernel.h"
#include "collector.h"

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s64 s64;

char LICENSE[] SEC("license") = "GPL";

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* Later than any time. */
#define NEVER 0x7fffffffffffffffLL
/* More context switches than there can be. */
#define LOOK (~0ULL)

_Static_assert(sizeof(struct vx_own) <= sizeof(((struct virtexit_slot *)0)->reserved2), "");
_Static_assert(sizeof(struct virtexit_slot) == 16384, "");

/* Of the KVM that the programs are loaded for. */
const volatile u32 vx_isa;
const volatile u32 vx_given;	/* kvm_exit has the reason among its arguments */

/* Set by the process. */
volatile u32 vx_timed;		/* slots at TIME are timed */
volatile u32 vx_take_level;	/* of new slots */
volatile u32 vx_tsc_now;	/* which of vx_tscs is in force */
volatile struct vx_tsc vx_tscs[2];

/* Nanoseconds that the programs took, the least of some; 0: not measured. */
volatile u32 vx_exit_cost;
volatile u32 vx_entry_cost;

/* kvm_exit fires when interrupts have been on; as is found out. */
volatile u32 vx_late;

/* Events that found no room. */
volatile u64 vx_events_lost;

/* The slot that each CPU has seen last, a cache line each. */
struct {
	u32 slot;
	u32 pad[15];
} vx_cache[VX_CACHES];

struct chunk {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, VX_CHUNK);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(struct virtexit_slot));
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);	/* set by the process; and so below */
	__type(key, u32);
	__array(values, struct chunk);
} chunks SEC(".maps");

struct ring {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(struct virtexit_recent));
};

/* The recent exits of each slot that has any. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, u32);
	__array(values, struct ring);
} rings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct virtexit_cpu);
} cpus SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, 1);
	__type(value, u32);
} free_slots SEC(".maps");

/* tid to the latest of its slots. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u32);
} threads SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 16);
} events SEC(".maps");

/* So that the process has their types. */
const struct vx_event *vx_type_event __attribute__((unused));
const struct vx_own *vx_type_own __attribute__((unused));

static __always_inline struct virtexit_slot *slot_at(u32 index)
{
	u32 chunk = index / VX_CHUNK, at = index % VX_CHUNK;
	void *inner = bpf_map_lookup_elem(&chunks, &chunk);

	return inner ? bpf_map_lookup_elem(inner, &at) : NULL;
}

static __always_inline struct virtexit_recent *ring_of(u32 slot)
{
	void *inner = bpf_map_lookup_elem(&rings, &slot);
	u32 zero = 0;

	return inner ? bpf_map_lookup_elem(inner, &zero) : NULL;
}

static __always_inline struct vx_own *own_of(struct virtexit_slot *pub)
{
	return (struct vx_own *)pub->reserved2;
}

static __always_inline u32 *cache(void)
{
	return &vx_cache[bpf_get_smp_processor_id() % VX_CACHES].slot;
}

/* Kernel memory at an address that is no more than a number to the verifier. */
#define READ(type, address, member) \
	BPF_CORE_READ((struct type *)(address), member)

static __always_inline u64 switches(void)
{
	struct task_struct *task = bpf_get_current_task_btf();

	return task->nvcsw + task->nivcsw;
}

static __always_inline u64 run_delay(u64 task)
{
	struct task_struct *t = (void *)task;

	if (!bpf_core_field_exists(t->sched_info.run_delay))
		return 0;
	return BPF_CORE_READ(t, sched_info.run_delay);
}

static __always_inline u64 poll_time(u64 vcpu)
{
	return READ(kvm_vcpu, vcpu, stat.generic.halt_poll_success_ns) +
	       READ(kvm_vcpu, vcpu, stat.generic.halt_poll_fail_ns);
}

static __always_inline u64 halt_time(u64 vcpu)
{
	return READ(kvm_vcpu, vcpu, stat.generic.halt_wait_ns);
}

static __always_inline u32 reason(u64 vcpu, u32 given)
{
	struct vcpu_vmx___vt *vt = (void *)vcpu;
	struct vcpu_vmx *vmx = (void *)vcpu;
	struct vcpu_svm *svm = (void *)vcpu;

	if (vx_given)
		return given;
	if (vx_isa == VIRTEXIT_ISA_SVM)
		return BPF_CORE_READ(svm, vmcb, control.exit_code);
	if (bpf_core_field_exists(vt->vt))
		return BPF_CORE_READ(vt, vt.exit_reason.full);
	return BPF_CORE_READ(vmx, exit_reason.full);
}

/* ---- rows ---- */

static __always_inline struct virtexit_row *row_at(struct virtexit_slot *pub,
						   u32 i)
{
	/* The very register that is compared is used. */
	asm volatile("" : "+r"(i));
	if (i >= VIRTEXIT_NR_ROWS)
		return NULL;
	return &pub->rows[i];
}

static __always_inline u32 row_offset(u32 i)
{
	return offsetof(struct virtexit_slot, rows) +
	       i * sizeof(struct virtexit_row);
}

static __always_inline u32 row_index(u32 offset)
{
	return (offset - offsetof(struct virtexit_slot, rows)) /
	       sizeof(struct virtexit_row);
}

/*
 * The row of a code, taken into use if need be; the last one if there is none.
 *
 * This function and others that are not static are verified once and not
 * wherever they are called, which would take long. So they have slots by number,
 * which is + 1 where they return it.
 */
__noinline u32 find_row(u32 slot, u32 code)
{
	struct virtexit_slot *pub = slot_at(slot);
	struct virtexit_row *row;
	u32 i, n;

	if (!pub)
		return 0;
	n = pub->nr_rows;
	for (i = 0; i < VIRTEXIT_NR_ROWS; i++) {
		if (i >= n)
			break;
		row = &pub->rows[i];
		if (row->code == code && !(row->flags & VIRTEXIT_ROW_OTHER))
			return i;
	}
	if (n >= VIRTEXIT_NR_ROWS)
		return VIRTEXIT_NR_ROWS - 1;
	row = row_at(pub, n);
	if (!row)
		return 0;
	if (n == VIRTEXIT_NR_ROWS - 1) {
		row->flags = VIRTEXIT_ROW_OTHER;
	} else {
		row->code = code;
		/* A place that nobody has leads to row 0. */
		if (!pub->index[(u8)code])
			pub->index[(u8)code] = n;
	}
	/* Whoever sees the row sees what it is for. */
	__sync_lock_test_and_set(&pub->nr_rows, n + 1);
	return n;
}

static __always_inline void row_handled(struct virtexit_row *row, u64 ns)
{
	u64 v = ns >> VIRTEXIT_HIST_SHIFT;
	u32 i = 0;

	if (v >> 16) {
		v >>= 16;
		i = 16;
		/* More would be of no significance. */
		if (v >> 16)
			v = 0xffff;
	}
	if (v >> 8) {
		v >>= 8;
		i += 8;
	}
	if (v >> 4) {
		v >>= 4;
		i += 4;
	}
	if (v >> 2) {
		v >>= 2;
		i += 2;
	}
	i += v >> 1;
	asm volatile("" : "+r"(i));
	if (i >= VIRTEXIT_NR_HIST)
		i = VIRTEXIT_NR_HIST - 1;
	row->hist[i]++;
}

/* ---- time: kmod/time.c ---- */

static __always_inline void move(u64 *sum, u64 ns, u64 *left)
{
	if (ns > *left)
		ns = *left;
	*sum += ns;
	*left -= ns;
}

/* The present stretch, of so long, ends. The thread need not be the caller. */
__noinline int close(u32 slot, u64 left, u64 poll_ns, u64 halt_ns)
{
	struct virtexit_slot *pub = slot_at(slot);
	struct virtexit_row *row;
	u64 delay, wait_ns;
	struct vx_own *own;

	if (!pub)
		return 0;
	own = own_of(pub);
	row = row_at(pub, row_index(pub->open));
	if (!row)
		return 0;
	delay = run_delay(own->task);
	wait_ns = delay - own->run_delay;
	if ((s64)left < 0)
		left = 0;
	own->run_delay = delay;
	move(&pub->wait_time, wait_ns, &left);
	move(&pub->poll_time, poll_ns, &left);
	/* KVM counts a halt up to when the thread runs again. */
	move(&pub->halted_time, halt_ns > wait_ns ? halt_ns - wait_ns : 0,
	     &left);
	switch (pub->doing) {
	case VIRTEXIT_IN_USER:
		row->user_time += left;
		/* fall through */
	case VIRTEXIT_IN_KVM:
		row->time += left;
		own->handled += left;
		break;
	case VIRTEXIT_HALTED:
		pub->halted_time += left;
		break;
	default:
		pub->outside_time += left;
		break;
	}
	own->switches = LOOK;
	return 0;
}

/* A reader that sees that a stretch begins sees the sums of the last. */
static __always_inline void stretch_from(struct virtexit_slot *pub, u64 now)
{
	asm volatile("" ::: "memory");
	*(volatile __u64 *)&pub->tsc = now;
}

static __always_inline void log_end(struct virtexit_slot *pub, u64 now)
{
	struct virtexit_recent *ring = ring_of(own_of(pub)->index);
	struct virtexit_exit *e;

	if (!ring)
		return;
	e = &ring->exits[(pub->recent_head - 1) % VIRTEXIT_NR_RECENT];
	e->cycles = now - e->tsc;
}

static __always_inline void time_begin(struct virtexit_slot *pub, u64 vcpu)
{
	struct vx_own *own = own_of(pub);

	own->run_delay = run_delay(own->task);
	own->poll_ns = poll_time(vcpu);
	own->halt_ns = halt_time(vcpu);
	own->switches = LOOK;
	own->handled = 0;
	pub->open = 0;
	pub->doing = VIRTEXIT_IN_KVM;
	pub->tsc = NEVER;
}

/*
 * The present stretch ends, and no other begins. The thread may be dying while
 * settle() is at its slot: who takes the stretch ends it.
 */
static __always_inline void time_end(struct virtexit_slot *pub, u64 now)
{
	u64 from = __sync_lock_test_and_set(&pub->tsc, NEVER);
	struct vx_own *own = own_of(pub);
	struct virtexit_row *row;

	if (from == NEVER)
		return;
	if (pub->open) {
		row = row_at(pub, row_index(pub->open));
		/* KVM has not told of a halt that goes on. */
		if (row && pub->doing == VIRTEXIT_IN_KVM &&
		    !(row->flags & VIRTEXIT_ROW_OTHER) &&
		    row->code == (pub->isa == VIRTEXIT_ISA_SVM ?
				  SVM_EXIT_HLT : EXIT_REASON_HLT))
			pub->doing = VIRTEXIT_HALTED;
		if (own->level == VIRTEXIT_LEVEL_RECENT)
			log_end(pub, now);
		close(own->index, now - from, 0, 0);
	} else if ((s64)(now - from) > 0) {
		pub->guest_time += now - from;
	}
	pub->open = 0;
}

__noinline int time_enter(u32 slot, u64 vcpu, u64 now)
{
	struct virtexit_slot *pub = slot_at(slot);
	struct virtexit_row *row;
	struct vx_own *own;

	if (!pub)
		return 0;
	own = own_of(pub);

	/* None in progress after an entry that failed and so made no exit. */
	if (pub->open) {
		row = row_at(pub, row_index(pub->open));
		if (own->level == VIRTEXIT_LEVEL_RECENT)
			log_end(pub, now);
		close(own->index, now - pub->tsc, 0, 0);
		if (row) {
			if (own->handled > row->max)
				row->max = own->handled;
			row_handled(row, own->handled);
		}
		own->handled = 0;
		pub->doing = VIRTEXIT_IN_KVM;
		pub->open = 0;
	}
	stretch_from(pub, now);
	own->poll_ns = poll_time(vcpu);
	own->halt_ns = halt_time(vcpu);
	own->switches = switches();
	return 0;
}

/*
 * When the exit occurred that is only now told of; 0 when that is not known. Up
 * to 6.1 SVM tells of an exit when interrupts have been on, and handled.
 */
static __always_inline u64 occurred(u64 vcpu)
{
	u32 now = vx_tsc_now % 2;
	u64 tsc;

	if (vx_isa != VIRTEXIT_ISA_SVM || !vx_tscs[now].mult ||
	    READ(kvm_vcpu, vcpu, arch.l1_tsc_scaling_ratio) !=
	    SVM_TSC_RATIO_DEFAULT)
		return 0;
	tsc = READ(kvm_vcpu, vcpu, arch.last_guest_tsc) -
	      READ(kvm_vcpu, vcpu, arch.l1_tsc_offset);
	tsc -= vx_tscs[now].tsc;
	if ((s64)tsc < 0)
		return vx_tscs[now].ns - ((-tsc * vx_tscs[now].mult) >> 28);
	return vx_tscs[now].ns + ((tsc * vx_tscs[now].mult) >> 28);
}

static __always_inline void stamp(struct virtexit_slot *pub, u32 offset,
				  u64 vcpu, u64 now)
{
	u64 from = pub->tsc;
	s64 ns = now - from;

	if (vx_late) {
		s64 guest = occurred(vcpu) - from;

		/* Not before the entry, nor in the future. */
		if (guest > 0 && guest < ns) {
			ns = guest;
			now = from + guest;
		}
	}
	if (likely(ns > 0))
		pub->guest_time += ns;
	pub->open = offset;
	stretch_from(pub, now);
}

/* ---- slots ---- */

static __always_inline void announce(struct virtexit_slot *pub)
{
	struct vx_event e = {
		.slot = own_of(pub)->index,
		.generation = pub->generation,
		.state = pub->state,
		.tid = pub->tid,
		.tgid = pub->tgid,
		.vcpu_id = pub->vcpu_id,
	};

	if (bpf_ringbuf_output(&events, &e, sizeof(e), 0))
		__sync_fetch_and_add(&vx_events_lost, 1);
}

static __always_inline struct virtexit_cpu *this_cpu(void)
{
	u32 cpu = bpf_get_smp_processor_id();

	return bpf_map_lookup_elem(&cpus, &cpu);
}

/*
 * The slot of the calling thread and vCPU. That a vCPU is where another was can
 * be only after its thread has left KVM_RUN.
 */
__noinline u32 find(u64 vcpu)
{
	u64 task = bpf_get_current_task();
	u32 tid = bpf_get_current_pid_tgid();
	struct virtexit_slot *pub;
	struct vx_own *own;
	u32 id, i, *first, index;

	pub = slot_at(*cache());
	if (!pub)
		return 0;
	own = own_of(pub);
	if (own->task == task && own->vcpu == vcpu &&
	    !(own->slow & VX_SLOW_LEFT))
		return own->index + 1;
	first = bpf_map_lookup_elem(&threads, &tid);
	if (!first)
		return 0;
	id = READ(kvm_vcpu, vcpu, vcpu_id);
	index = *first;
	for (i = 0; i < VX_CHAIN; i++) {
		pub = slot_at(index);
		if (!pub)
			return 0;
		own = own_of(pub);
		if (own->task != task)
			return 0;
		if (pub->vcpu_id == id) {
			own->vcpu = vcpu;
			own->slow &= ~VX_SLOW_LEFT;
			*cache() = index;
			return index + 1;
		}
		if (!own->next)
			return 0;
		index = own->next - 1;
	}
	return 0;
}

/* The timed slot of the vCPU that the calling thread ran last; and leaves? */
__noinline u32 find_last(u32 leaves)
{
	u64 task = bpf_get_current_task();
	u32 tid = bpf_get_current_pid_tgid();
	struct virtexit_slot *pub;
	u32 i, *first, index, last = 0;
	u64 latest = 0;

	first = bpf_map_lookup_elem(&threads, &tid);
	if (!first)
		return 0;
	index = *first;
	for (i = 0; i < VX_CHAIN; i++) {
		pub = slot_at(index);
		if (!pub || own_of(pub)->task != task)
			break;
		if (leaves)
			own_of(pub)->slow |= VX_SLOW_LEFT;
		if (own_of(pub)->level >= VIRTEXIT_LEVEL_TIME &&
		    pub->tsc > latest) {
			latest = pub->tsc;
			last = index;
		}
		if (!own_of(pub)->next)
			break;
		index = own_of(pub)->next - 1;
	}
	return latest ? last + 1 : 0;
}

/* A slot begins at a level that collects nothing, and adopts another. */
__noinline u32 take(u64 vcpu, u32 isa)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct task_struct *leader = task->group_leader;
	u32 tid = bpf_get_current_pid_tgid();
	struct virtexit_slot *pub;
	struct vx_own *own;
	u32 index, *first;

	if (bpf_map_pop_elem(&free_slots, &index))
		return 0;
	pub = slot_at(index);
	if (!pub)
		return 0;
	own = own_of(pub);
	pub->tid = tid;
	pub->tgid = task->tgid;
	pub->start_time = task->start_boottime;
	pub->tgid_start_time = leader->start_boottime;
	pub->vcpu_id = READ(kvm_vcpu, vcpu, vcpu_id);
	pub->isa = isa;
	bpf_probe_read_kernel_str(pub->comm, sizeof(pub->comm), leader->comm);
	pub->since = bpf_ktime_get_boot_ns();
	pub->level = vx_take_level;
	pub->tsc = NEVER;

	own->vcpu = vcpu;
	own->index = index;
	own->level = VIRTEXIT_LEVEL_PAUSE;
	own->want = vx_take_level;
	own->look = 1;
	own->slow = VX_SLOW_LEVEL;
	own->measure = VX_MEASURE;

	first = bpf_map_lookup_elem(&threads, &tid);
	if (first) {
		struct virtexit_slot *other = slot_at(*first);

		/* Else it is of a thread that died unseen. */
		if (other && own_of(other)->task == (u64)task)
			own->next = *first + 1;
		*first = index;
	} else if (bpf_map_update_elem(&threads, &tid, &index, BPF_ANY)) {
		bpf_map_push_elem(&free_slots, &index, 0);
		return 0;
	}
	own->task = (u64)task;
	*cache() = index;
	/* Whoever sees the state sees whose slot it is. */
	__sync_lock_test_and_set(&pub->state, VIRTEXIT_LIVE);
	announce(pub);
	return index + 1;
}

static __always_inline void set_level(struct virtexit_slot *pub, u32 level,
				      u64 vcpu, u64 now)
{
	struct vx_own *own = own_of(pub);
	bool was_timed = own->level >= VIRTEXIT_LEVEL_TIME;
	bool timed = level >= VIRTEXIT_LEVEL_TIME;

	if (was_timed && !timed)
		time_end(pub, now);
	else if (timed && !was_timed)
		time_begin(pub, vcpu);
	own->level = level;
}

/* Do as is wished, from the exit on that is at hand. */
__noinline int adopt(u32 slot, u64 vcpu)
{
	struct virtexit_slot *pub = slot_at(slot);
	struct vx_own *own;
	u32 level;

	if (!pub)
		return 0;
	own = own_of(pub);

	/* Before the wish is read, lest the next one go unseen. */
	__sync_lock_test_and_set(&own->look, 0);
	level = *(volatile u32 *)&own->want;
	if (level == VIRTEXIT_LEVEL_RECENT && !ring_of(own->index))
		level = VIRTEXIT_LEVEL_TIME;
	/* What was measured at another level is of no interest. */
	if (level != own->level) {
		set_level(pub, level, vcpu, bpf_ktime_get_ns());
		own->measure = VX_MEASURE;
	}
	own->slow &= VX_SLOW_LEFT;
	if (level != VIRTEXIT_LEVEL_COUNT && level != VIRTEXIT_LEVEL_TIME)
		own->slow |= VX_SLOW_LEVEL;
	else if (own->measure)
		own->slow |= VX_SLOW_MEASURE;
	return 0;
}

__noinline int retire(u32 slot, u64 now)
{
	struct virtexit_slot *pub = slot_at(slot);
	struct vx_own *own;

	if (!pub)
		return 0;
	own = own_of(pub);
	if (own->level >= VIRTEXIT_LEVEL_TIME)
		time_end(pub, now);
	/* Who takes the task retires the slot. */
	if (!__sync_lock_test_and_set(&own->task, 0))
		return 0;
	/* Whoever sees the state sees the final counts. */
	__sync_lock_test_and_set(&pub->state, VIRTEXIT_RETIRED);
	announce(pub);
	return 0;
}

__noinline int retire_thread(u32 tid)
{
	u32 *first = bpf_map_lookup_elem(&threads, &tid);
	u64 now = bpf_ktime_get_ns();
	struct virtexit_slot *pub;
	u32 i, index, next;

	if (!first)
		return 0;
	index = *first;
	bpf_map_delete_elem(&threads, &tid);
	for (i = 0; i < VX_CHAIN; i++) {
		pub = slot_at(index);
		if (!pub || pub->tid != tid)
			break;
		next = own_of(pub)->next;
		retire(index, now);
		if (!next)
			break;
		index = next - 1;
	}
	return 0;
}

/* ---- programs ---- */

static __always_inline bool fast(const struct vx_own *own, u64 vcpu)
{
	return likely(own->task == bpf_get_current_task() &&
		      own->vcpu == vcpu && !(own->look | own->slow));
}

/* Before anything else that takes time. */
static __always_inline u64 exit_time(void)
{
	return vx_timed ? bpf_ktime_get_ns() : 0;
}

static __always_inline void count(struct virtexit_slot *pub, u64 vcpu, u32 code,
				  u64 now)
{
	u32 i = pub->index[(u8)code];
	struct virtexit_row *row = row_at(pub, i);

	if (unlikely(!row || row->code != code || !pub->nr_rows)) {
		i = find_row(own_of(pub)->index, code);
		row = row_at(pub, i);
		if (!row)
			return;
	}
	row->count++;
	if (own_of(pub)->level >= VIRTEXIT_LEVEL_TIME && now)
		stamp(pub, row_offset(i), vcpu, now);
}

static __always_inline void log_exit(struct virtexit_slot *pub, u64 vcpu,
				     u32 code)
{
	struct virtexit_recent *ring = ring_of(own_of(pub)->index);
	u64 head = pub->recent_head;
	struct virtexit_exit *e;

	if (!ring)
		return;
	e = &ring->exits[head % VIRTEXIT_NR_RECENT];
	e->tsc = pub->tsc;
	e->cycles = VIRTEXIT_PRESENT;
	e->code = code;
	/* VMX keeps it where only VMREAD gets at it. */
	if (vx_isa != VIRTEXIT_ISA_SVM ||
	    READ(kvm_vcpu, vcpu, arch.guest_state_protected))
		e->rip = 0;
	else
		e->rip = READ(kvm_vcpu, vcpu, arch.regs[VCPU_REGS_RIP]);
	/* Whoever sees the number sees the exit. */
	__sync_lock_test_and_set(&pub->recent_head, head + 1);
}

static __always_inline void least(volatile u32 *cost, u64 start, u64 begin,
				  u64 end)
{
	s64 ns = (end - begin) - (begin - start);

	if (ns < 1)
		ns = 1;
	if (!*cost || ns < *cost)
		*cost = ns;
}

__noinline int exit_slow(u64 vcpu, u32 isa, u32 given, u64 now)
{
	u32 code, slot = find(vcpu);
	struct virtexit_slot *pub;
	u64 start, begin, end, guest_tsc;
	struct virtexit_cpu *cpu;
	struct vx_own *own;

	if (unlikely(!slot)) {
		cpu = this_cpu();
		if (!cpu)
			return 0;
		if (isa != vx_isa) {
			cpu->refused++;
			return 0;
		}
		slot = take(vcpu, isa);
		if (!slot) {
			if (vx_take_level >= VIRTEXIT_LEVEL_COUNT)
				cpu->unattributed++;
			return 0;
		}
	}
	pub = slot_at(slot - 1);
	if (!pub)
		return 0;
	own = own_of(pub);
	if (own->look)
		adopt(slot - 1, vcpu);
	if (own->level < VIRTEXIT_LEVEL_COUNT)
		return 0;
	if (own->slow & VX_SLOW_MEASURE) {
		if (vx_isa == VIRTEXIT_ISA_SVM && own->guest_tsc) {
			guest_tsc = READ(kvm_vcpu, vcpu, arch.last_guest_tsc);
			if (guest_tsc != own->guest_tsc)
				vx_late = 1;
			own->guest_tsc = 0;
		}
		start = bpf_ktime_get_ns();
		begin = bpf_ktime_get_ns();
		exit_time();
		count(pub, vcpu, reason(vcpu, given), now);
		end = bpf_ktime_get_ns();
		least(&vx_exit_cost, start, begin, end);
		if (!own->measure || !--own->measure)
			own->slow &= ~VX_SLOW_MEASURE;
		return 0;
	}
	code = reason(vcpu, given);
	count(pub, vcpu, code, now);
	if (own->level == VIRTEXIT_LEVEL_RECENT && now)
		log_exit(pub, vcpu, code);
	return 0;
}

static __always_inline int exit(u64 vcpu, u32 isa, u32 given)
{
	u64 now = exit_time();
	struct virtexit_slot *pub = slot_at(*cache());

	if (pub && fast(own_of(pub), vcpu))
		count(pub, vcpu, reason(vcpu, given), now);
	else
		exit_slow(vcpu, isa, given, now);
	return 0;
}

/* kvm_exit(vcpu, isa) */
SEC("raw_tp")
int kvm_exit(struct bpf_raw_tracepoint_args *ctx)
{
	return exit(ctx->args[0], ctx->args[1], 0);
}

/* kvm_exit(exit_reason, vcpu, isa), before 5.16 */
SEC("raw_tp")
int kvm_exit_given(struct bpf_raw_tracepoint_args *ctx)
{
	return exit(ctx->args[1], ctx->args[2], ctx->args[0]);
}

/* After an exit that KVM handled at once; or false, and nothing is done. */
static __always_inline bool enter(struct virtexit_slot *pub, u64 now)
{
	struct vx_own *own = own_of(pub);
	struct virtexit_row *row;
	u64 ns;

	if (!pub->open || own->switches != switches())
		return 0;
	row = row_at(pub, row_index(pub->open));
	if (!row)
		return 0;
	ns = now - pub->tsc;
	if ((s64)ns < 0)
		ns = 0;
	if (ns > row->max)
		row->max = ns;
	row->time += ns;
	row_handled(row, ns);
	pub->open = 0;
	stretch_from(pub, now);
	return 1;
}

__noinline int entry_slow(u64 vcpu, u64 now)
{
	u32 slot = find(vcpu);
	struct virtexit_slot *pub;
	u64 start, begin, end;
	struct vx_own *own;

	if (!slot)
		return 0;
	pub = slot_at(slot - 1);
	if (!pub)
		return 0;
	own = own_of(pub);
	if (own->level < VIRTEXIT_LEVEL_TIME)
		return 0;
	if (own->slow & VX_SLOW_MEASURE) {
		if (vx_isa == VIRTEXIT_ISA_SVM)
			own->guest_tsc = READ(kvm_vcpu, vcpu,
					      arch.last_guest_tsc);
		start = bpf_ktime_get_ns();
		begin = bpf_ktime_get_ns();
		bpf_ktime_get_ns();
		if (enter(pub, now)) {
			end = bpf_ktime_get_ns();
			least(&vx_entry_cost, start, begin, end);
			return 0;
		}
	}
	time_enter(own->index, vcpu, now);
	return 0;
}

SEC("raw_tp")
int kvm_entry(struct bpf_raw_tracepoint_args *ctx)
{
	u64 now = bpf_ktime_get_ns();
	struct virtexit_slot *pub = slot_at(*cache());
	u64 vcpu = ctx->args[0];

	if (pub && fast(own_of(pub), vcpu) && enter(pub, now))
		return 0;
	entry_slow(vcpu, now);
	return 0;
}

/* kvm_userspace_exit(reason, errno): the thread leaves KVM_RUN */
SEC("raw_tp")
int kvm_userspace_exit(struct bpf_raw_tracepoint_args *ctx)
{
	u64 now = bpf_ktime_get_ns();
	u32 why = ctx->args[0], slot = find_last(1);
	struct virtexit_slot *pub;
	int error = ctx->args[1];

	if (!slot)
		return 0;
	pub = slot_at(slot - 1);
	if (!pub || !pub->open)
		return 0;
	close(own_of(pub)->index, now - pub->tsc, 0, 0);
	stretch_from(pub, now);
	if ((error < 0 && why != KVM_EXIT_MEMORY_FAULT) || why == KVM_EXIT_INTR)
		pub->doing = VIRTEXIT_OUTSIDE;
	else if (why == KVM_EXIT_HLT)
		pub->doing = VIRTEXIT_HALTED;
	else
		pub->doing = VIRTEXIT_IN_USER;
	return 0;
}

static __always_inline u64 since(u64 now, u64 then)
{
	return now > then ? now - then : 0;
}

/* A halt has ended. */
SEC("raw_tp")
int kvm_vcpu_wakeup(struct bpf_raw_tracepoint_args *ctx)
{
	u64 poll_ns, halt_ns, now = bpf_ktime_get_ns();
	struct virtexit_slot *pub;
	u32 slot = find_last(0);
	struct vx_own *own;

	if (!slot)
		return 0;
	pub = slot_at(slot - 1);
	if (!pub)
		return 0;
	own = own_of(pub);
	poll_ns = poll_time(own->vcpu);
	halt_ns = halt_time(own->vcpu);
	if (pub->open) {
		close(own->index, now - pub->tsc, since(poll_ns, own->poll_ns),
		      since(halt_ns, own->halt_ns));
		stretch_from(pub, now);
	}
	own->poll_ns = poll_ns;
	own->halt_ns = halt_ns;
	return 0;
}

/* sched_process_exit(task) */
SEC("raw_tp")
int thread_exit(struct bpf_raw_tracepoint_args *ctx)
{
	return retire_thread(bpf_get_current_pid_tgid());
}

/* sched_process_exec(task, old_pid, bprm): another program is another guest */
SEC("raw_tp")
int thread_exec(struct bpf_raw_tracepoint_args *ctx)
{
	return retire_thread(ctx->args[1]);
}

/*
 * Run by the process, when no program is attached that a higher level needs: the
 * slot args[0] falls to level args[1], as of args[2].
 */
SEC("raw_tp")
int settle(struct bpf_raw_tracepoint_args *ctx)
{
	u32 index = ctx->args[0], level = ctx->args[1], tid;
	struct virtexit_slot *pub = slot_at(index);
	u64 now = ctx->args[2];

	if (!pub || !own_of(pub)->task)
		return 0;
	if (level == VIRTEXIT_LEVEL_OFF) {
		tid = pub->tid;
		bpf_map_delete_elem(&threads, &tid);
		retire(index, now);
	} else if (own_of(pub)->level > level) {
		set_level(pub, level, 0, now);
	}
	return 0;
}
