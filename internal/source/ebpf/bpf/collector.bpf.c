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
_Static_assert(offsetof(struct vx_own, look) % 8 == 0 &&
	       offsetof(struct vx_own, slow) == offsetof(struct vx_own, look) + 4, "");

/* Of the KVM that the programs are loaded for. */
const volatile u32 vx_isa;	/* 0: whatever each exit is of */
const volatile u32 vx_given;	/* the reason comes with the exit */
const volatile u32 vx_direct;	/* the kernel has bpf_rdonly_cast() */

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

/* Where a slot is. */
struct place {
	u32 chunk;
	u32 at;
};

/* The slot that each CPU has seen last, a cache line each. */
struct {
	struct place last;
	u32 pad[14];
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

struct recent_chunk {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, VX_CHUNK);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(struct virtexit_recent));
};

/* The recent exits of the slots of each chunk that has one that logs them. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, u32);
	__array(values, struct recent_chunk);
} recent SEC(".maps");

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

static __always_inline struct virtexit_slot *slot_in(const struct place *p)
{
	void *inner = bpf_map_lookup_elem(&chunks, &p->chunk);

	return inner ? bpf_map_lookup_elem(inner, &p->at) : NULL;
}

static __always_inline struct place place(u32 slot)
{
	return (struct place){ slot / VX_CHUNK, slot % VX_CHUNK };
}

static __always_inline struct virtexit_slot *slot_at(u32 index)
{
	struct place p = place(index);

	return slot_in(&p);
}

static __always_inline struct virtexit_recent *ring_of(u32 slot)
{
	struct place p = place(slot);
	void *inner = bpf_map_lookup_elem(&recent, &p.chunk);

	return inner ? bpf_map_lookup_elem(inner, &p.at) : NULL;
}

static __always_inline struct vx_own *own_of(struct virtexit_slot *pub)
{
	return (struct vx_own *)pub->reserved2;
}

static __always_inline struct place *cache(void)
{
	return &vx_cache[bpf_get_smp_processor_id() % VX_CACHES].last;
}

/* Since 6.2: what is at the address has that type, and is read without a call. */
extern void *bpf_rdonly_cast(const void *address, u32 type) __ksym __weak;

static __always_inline u64 peek(u64 address, u32 size)
{
	/* Any type of the kernel's that begins with a number serves. */
	const volatile struct timespec64 *p =
		bpf_rdonly_cast((void *)address,
				bpf_core_type_id_kernel(struct timespec64));

	switch (size) {
	case 1:
		return *(const volatile u8 *)p;
	case 4:
		return *(const volatile u32 *)p;
	default:
		return *(const volatile u64 *)p;
	}
}

/*
 * Kernel memory at an address that is no more than a number to the verifier; 0
 * where there is none. A call to read it takes as long as a hundred instructions.
 */
static __always_inline u64 load(u64 address, u32 size)
{
	u64 value = 0;

	if (vx_direct)
		return peek(address, size);
	bpf_probe_read_kernel(&value, size, (void *)address);
	return value;
}

#define OFFSET(type, member) ((u32)bpf_core_field_offset(struct type, member))
#define READ(type, address, member) \
	load((address) + OFFSET(type, member), \
	     sizeof(((struct type *)0)->member))

/* What lies near to each other is read by one call: so many numbers at most. */
#define NEAR 4

struct pair {
	u64 first;
	u64 second;
};

/* Two numbers at these offsets from an address. */
static __always_inline struct pair load_pair(u64 address, u32 first, u32 second)
{
	u32 span = second - first;
	u64 at[NEAR];

	/* Also where they are in the other order. */
	if (vx_direct || span >= sizeof(at))
		return (struct pair){ load(address + first, 8),
				      load(address + second, 8) };
	bpf_probe_read_kernel(at, span + 8, (void *)(address + first));
	return (struct pair){ at[0], at[span / 8] };
}

#define READ_PAIR(type, address, one, other) \
	load_pair(address, OFFSET(type, one), OFFSET(type, other))

static __always_inline u64 switches(const struct task_struct *task)
{
	return task->nvcsw + task->nivcsw;
}

static __always_inline u64 run_delay(u64 task)
{
	struct task_struct *t = (void *)task;

	if (!bpf_core_field_exists(t->sched_info.run_delay))
		return 0;
	return READ(task_struct, task, sched_info.run_delay);
}

/* What KVM knows of the vCPU's halts. */
struct halts {
	u64 poll_ns;
	u64 halt_ns;
};

static __always_inline struct halts halts(u64 vcpu)
{
	u32 good = OFFSET(kvm_vcpu, stat.generic.halt_poll_success_ns);
	u32 fail = OFFSET(kvm_vcpu, stat.generic.halt_poll_fail_ns);
	u32 wait = OFFSET(kvm_vcpu, stat.generic.halt_wait_ns);
	u64 at[NEAR];

	if (vx_direct || fail - good >= sizeof(at) || wait - good >= sizeof(at))
		return (struct halts){
			load(vcpu + good, 8) + load(vcpu + fail, 8),
			load(vcpu + wait, 8),
		};
	bpf_probe_read_kernel(at, sizeof(at), (void *)(vcpu + good));
	return (struct halts){ at[0] + at[(fail - good) / 8],
			       at[(wait - good) / 8] };
}

static __always_inline u32 reason(u64 vcpu, u32 given)
{
	struct vcpu_vmx___vt *vt = NULL;

	if (vx_given)
		return given;
	if (vx_isa == VIRTEXIT_ISA_SVM)
		/* That of a guest of the guest has a VMCB of its own. */
		return READ(vmcb, READ(vcpu_svm, vcpu, vmcb),
			    control.exit_code);
	if (bpf_core_field_exists(vt->vt))
		return READ(vcpu_vmx___vt, vcpu, vt.exit_reason.full);
	return READ(vcpu_vmx, vcpu, exit_reason.full);
}

/* Is it that of the exit that halts a guest? */
static __always_inline bool is_halt(u32 code)
{
	switch (vx_isa) {
	case VIRTEXIT_ISA_SVM:
		return code == SVM_EXIT_HLT;
	case VIRTEXIT_ISA_VMX:
		return code == EXIT_REASON_HLT;
	case VIRTEXIT_ISA_ARM64:
		return code == ESR_ELx_EC_WFx;
	default:
		return 0;
	}
}

/* ---- rows ---- */

/* The row at an offset of the slot, as in virtexit_slot.open; or NULL. */
static __always_inline struct virtexit_row *row_at(struct virtexit_slot *pub,
						   u64 offset)
{
	offset -= offsetof(struct virtexit_slot, rows);
	/* The very register that is compared is used. */
	asm volatile("" : "+r"(offset));
	if (offset > (VIRTEXIT_NR_ROWS - 1) * sizeof(struct virtexit_row))
		return NULL;
	return (void *)pub->rows + offset;
}

static __always_inline u32 row_offset(u32 i)
{
	return offsetof(struct virtexit_slot, rows) +
	       i * sizeof(struct virtexit_row);
}

/*
 * Where the row of a code is, which is taken into use if need be; the last one if
 * there is none.
 *
 * This function and others that are not static are verified once and not
 * wherever they are called, which would take long.
 */
__noinline u32 find_row(struct virtexit_slot *pub, u32 code)
{
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
			return row_offset(i);
	}
	if (n >= VIRTEXIT_NR_ROWS)
		return row_offset(VIRTEXIT_NR_ROWS - 1);
	row = row_at(pub, row_offset(n));
	if (!row)
		return 0;
	if (n == VIRTEXIT_NR_ROWS - 1) {
		row->flags = VIRTEXIT_ROW_OTHER;
	} else {
		row->code = code;
		if (!pub->index[(u8)code])
			pub->index[(u8)code] = row_offset(n);
	}
	/* Whoever sees the row sees what it is for. */
	__sync_lock_test_and_set(&pub->nr_rows, n + 1);
	return row_offset(n);
}

static __always_inline void row_handled(struct virtexit_row *row, u64 ns)
{
	u64 v = ns >> VIRTEXIT_HIST_SHIFT;
	u32 i = 0;

	for (; unlikely(v >> 4) && i < VIRTEXIT_NR_HIST; i += 4)
		v >>= 4;
	/* The logarithms of 0 to 15, two bits each. */
	i += 0xffffaa50 >> 2 * (v & 15) & 3;
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

/*
 * The present stretch of a task, of so long, ends. It need not be the caller's, and
 * may cease to be the slot's meanwhile.
 */
__noinline int close(struct virtexit_slot *pub, u64 task, u64 left, u64 poll_ns,
		     u64 halt_ns)
{
	struct virtexit_row *row;
	u64 delay, wait_ns;
	struct vx_own *own;

	if (!pub)
		return 0;
	own = own_of(pub);
	row = row_at(pub, pub->open);
	if (!row)
		return 0;
	delay = run_delay(task);
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
	/* arm64 may have others see stores in another order. */
	if (vx_isa == VIRTEXIT_ISA_ARM64)
		__sync_lock_test_and_set(&pub->tsc, now);
	else
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

	struct halts known = halts(vcpu);

	own->run_delay = run_delay(own->task);
	own->poll_ns = known.poll_ns;
	own->halt_ns = known.halt_ns;
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
static __always_inline void time_end(struct virtexit_slot *pub, u64 task,
				     u64 now)
{
	u64 from = __sync_lock_test_and_set(&pub->tsc, NEVER);
	struct vx_own *own = own_of(pub);
	struct virtexit_row *row;

	if (from == NEVER)
		return;
	if (pub->open) {
		row = row_at(pub, pub->open);
		/* KVM has not told of a halt that goes on. */
		if (row && pub->doing == VIRTEXIT_IN_KVM &&
		    !(row->flags & VIRTEXIT_ROW_OTHER) &&
		    is_halt(row->code))
			pub->doing = VIRTEXIT_HALTED;
		if (own->level == VIRTEXIT_LEVEL_RECENT)
			log_end(pub, now);
		close(pub, task, now - from, 0, 0);
	} else if ((s64)(now - from) > 0) {
		pub->guest_time += now - from;
	}
	pub->open = 0;
}

__noinline int time_enter(struct virtexit_slot *pub, u64 vcpu, u64 now)
{
	struct virtexit_row *row;
	struct halts known;
	struct vx_own *own;

	if (!pub)
		return 0;
	own = own_of(pub);

	/* None in progress after an entry that failed and so made no exit. */
	if (pub->open) {
		row = row_at(pub, pub->open);
		if (own->level == VIRTEXIT_LEVEL_RECENT)
			log_end(pub, now);
		close(pub, own->task, now - pub->tsc, 0, 0);
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
	known = halts(vcpu);
	own->poll_ns = known.poll_ns;
	own->halt_ns = known.halt_ns;
	own->switches = switches(bpf_get_current_task_btf());
	return 0;
}

/*
 * Up to 6.1 SVM tells of an exit when interrupts have been on, and handled. When
 * it occurred can be known, if the guest's TSC runs as the host's does: which only
 * changes out of KVM_RUN.
 */
static __always_inline u32 late(u64 vcpu)
{
	return vx_isa == VIRTEXIT_ISA_SVM && vx_late &&
	       READ(kvm_vcpu, vcpu, arch.l1_tsc_scaling_ratio) ==
		       SVM_TSC_RATIO_DEFAULT;
}

/* When it occurred. No time that can be right where there is no TSC. */
static __always_inline u64 occurred(u64 vcpu)
{
	const volatile struct vx_tsc *at = &vx_tscs[vx_tsc_now % 2];
	struct pair tsc = READ_PAIR(kvm_vcpu, vcpu, arch.l1_tsc_offset,
				    arch.last_guest_tsc);
	s64 passed = tsc.second - tsc.first - at->tsc;

	return at->ns + ((passed * (s64)at->mult) >> 28);
}

static __always_inline void stamp(struct virtexit_slot *pub, u32 offset,
				  u64 vcpu, u64 now)
{
	u64 from = pub->tsc;
	s64 guest, ns = now - from;

	if (vx_isa == VIRTEXIT_ISA_SVM && own_of(pub)->late) {
		guest = occurred(vcpu) - from;
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

/*
 * The slot comes into use or retires. Whoever sees that sees all that was before.
 * The process may then free a retired one, and another thread take it: nothing is
 * read of it any more.
 */
static __always_inline void enter_state(struct virtexit_slot *pub, u32 state)
{
	struct vx_event e = {
		.slot = own_of(pub)->index,
		.generation = pub->generation,
		.state = state,
		.tid = pub->tid,
		.tgid = pub->tgid,
		.vcpu_id = pub->vcpu_id,
	};

	__sync_lock_test_and_set(&pub->state, state);
	if (bpf_ringbuf_output(&events, &e, sizeof(e), 0))
		__sync_fetch_and_add(&vx_events_lost, 1);
}

static __always_inline struct virtexit_cpu *this_cpu(void)
{
	u32 cpu = bpf_get_smp_processor_id();

	return bpf_map_lookup_elem(&cpus, &cpu);
}

/* The thread runs the vCPU in KVM_RUN. */
static __always_inline u32 use(struct vx_own *own, u64 vcpu)
{
	own->vcpu = vcpu;
	own->late = late(vcpu);
	own->slow &= ~VX_SLOW_LEFT;
	*cache() = place(own->index);
	return own->index + 1;
}

/*
 * The slot of the calling thread and vCPU, by its number, + 1. That a vCPU is
 * where another was can be only after its thread has left KVM_RUN, which is not
 * seen at PAUSE.
 */
__noinline u32 find(u64 vcpu)
{
	u64 task = bpf_get_current_task();
	u32 tid = bpf_get_current_pid_tgid();
	struct virtexit_slot *pub;
	struct vx_own *own;
	u32 id, i, *first, index;

	pub = slot_in(cache());
	if (!pub)
		return 0;
	own = own_of(pub);
	if (own->task == task && own->vcpu == vcpu && !own->look &&
	    !(own->slow & VX_SLOW_LEFT))
		return own->index + 1;
	id = READ(kvm_vcpu, vcpu, vcpu_id);
	if (own->task == task && pub->vcpu_id == id)
		return use(own, vcpu);
	first = bpf_map_lookup_elem(&threads, &tid);
	if (!first)
		return 0;
	index = *first;
	for (i = 0; i < VX_CHAIN; i++) {
		pub = slot_at(index);
		if (!pub)
			return 0;
		own = own_of(pub);
		if (own->task != task)
			return 0;
		if (pub->vcpu_id == id)
			return use(own, vcpu);
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
	struct vx_own *own;
	u64 latest = 0;

	pub = slot_in(cache());
	if (!pub)
		return 0;
	own = own_of(pub);
	/* All the others that the thread has were left when this one was used. */
	if (own->task == task && !own->look && !(own->slow & VX_SLOW_LEFT)) {
		if (leaves)
			own->slow |= VX_SLOW_LEFT;
		return own->level >= VIRTEXIT_LEVEL_TIME ? own->index + 1 : 0;
	}
	first = bpf_map_lookup_elem(&threads, &tid);
	if (!first)
		return 0;
	index = *first;
	for (i = 0; i < VX_CHAIN; i++) {
		pub = slot_at(index);
		if (!pub || own_of(pub)->task != task)
			break;
		own = own_of(pub);
		if (leaves)
			own->slow |= VX_SLOW_LEFT;
		if (own->level >= VIRTEXIT_LEVEL_TIME && pub->tsc > latest) {
			latest = pub->tsc;
			last = index;
		}
		if (!own->next)
			break;
		index = own->next - 1;
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
	u32 index, *first, next = 0, chain = 0;
	struct vx_own *own;

	first = bpf_map_lookup_elem(&threads, &tid);
	if (first) {
		struct virtexit_slot *other = slot_at(*first);

		/* Else it is of a thread that died unseen. */
		if (other && own_of(other)->task == (u64)task) {
			next = *first + 1;
			chain = own_of(other)->chain + 1;
			/* No walk along the chain would come to its end. */
			if (chain >= VX_CHAIN)
				return 0;
		}
	}
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

	own->index = index;
	own->level = VIRTEXIT_LEVEL_PAUSE;
	own->want = vx_take_level;
	own->look = 1;
	own->slow = VX_SLOW_LEVEL;
	own->measure = VX_MEASURE;
	own->next = next;
	own->chain = chain;

	if (first) {
		*first = index;
	} else if (bpf_map_update_elem(&threads, &tid, &index, BPF_ANY)) {
		bpf_map_push_elem(&free_slots, &index, 0);
		return 0;
	}
	own->task = (u64)task;
	use(own, vcpu);
	enter_state(pub, VIRTEXIT_LIVE);
	return index + 1;
}

static __always_inline void set_level(struct virtexit_slot *pub, u64 task,
				      u32 level, u64 vcpu, u64 now)
{
	struct vx_own *own = own_of(pub);
	bool was_timed = own->level >= VIRTEXIT_LEVEL_TIME;
	bool timed = level >= VIRTEXIT_LEVEL_TIME;

	if (was_timed && !timed)
		time_end(pub, task, now);
	else if (timed && !was_timed)
		time_begin(pub, vcpu);
	own->level = level;
}

/* Do as is wished, from the exit on that is at hand. */
__noinline int adopt(struct virtexit_slot *pub, u64 vcpu)
{
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
		set_level(pub, own->task, level, vcpu, bpf_ktime_get_ns());
		own->measure = VX_MEASURE;
	}
	own->slow &= VX_SLOW_LEFT;
	if (level != VIRTEXIT_LEVEL_COUNT && level != VIRTEXIT_LEVEL_TIME)
		own->slow |= VX_SLOW_LEVEL;
	else if (own->measure)
		own->slow |= VX_SLOW_MEASURE;
	return 0;
}

__noinline int retire(struct virtexit_slot *pub, u64 now)
{
	struct vx_own *own;
	u64 task;

	if (!pub)
		return 0;
	own = own_of(pub);
	task = *(volatile u64 *)&own->task;
	if (own->level >= VIRTEXIT_LEVEL_TIME)
		time_end(pub, task, now);
	/* Who takes the task retires the slot. */
	if (__sync_lock_test_and_set(&own->task, 0))
		enter_state(pub, VIRTEXIT_RETIRED);
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
		retire(pub, now);
		if (!next)
			break;
		index = next - 1;
	}
	return 0;
}

/* ---- programs ---- */

static __always_inline bool fast(const struct vx_own *own, u64 vcpu, u64 task)
{
	/* look and slow at once */
	return likely(own->task == task && own->vcpu == vcpu &&
		      !*(const volatile u64 *)&own->look);
}

/* Before anything else that takes time. */
static __always_inline u64 exit_time(void)
{
	return vx_timed ? bpf_ktime_get_ns() : 0;
}

static __always_inline void count(struct virtexit_slot *pub, u64 vcpu, u32 code,
				  u64 now)
{
	u32 offset = pub->index[(u8)code];
	struct virtexit_row *row = row_at(pub, offset);

	if (unlikely(!row || row->code != code)) {
		offset = find_row(pub, code);
		row = row_at(pub, offset);
		if (!row)
			return;
	}
	row->count++;
	if (now && own_of(pub)->level >= VIRTEXIT_LEVEL_TIME)
		stamp(pub, offset, vcpu, now);
}

static __always_inline u64 guest_pc(u64 vcpu)
{
	if (vx_isa == VIRTEXIT_ISA_ARM64)
		return READ(kvm_vcpu___arm64, vcpu, arch.ctxt.regs.pc);
	/* VMX keeps it where only VMREAD gets at it. */
	if (vx_isa != VIRTEXIT_ISA_SVM ||
	    READ(kvm_vcpu, vcpu, arch.guest_state_protected))
		return 0;
	return READ(kvm_vcpu, vcpu, arch.regs[VCPU_REGS_RIP]);
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
	e->rip = guest_pc(vcpu);
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
	u32 code, slot = vcpu ? find(vcpu) : 0;
	struct virtexit_slot *pub;
	u64 start, begin, end, guest_tsc;
	struct virtexit_cpu *cpu;
	struct vx_own *own;

	if (unlikely(!slot)) {
		cpu = this_cpu();
		if (!cpu)
			return 0;
		if (!vcpu || (vx_isa && isa != vx_isa)) {
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
		adopt(pub, vcpu);
	if (own->level < VIRTEXIT_LEVEL_COUNT)
		return 0;
	if (own->slow & VX_SLOW_MEASURE) {
		if (vx_isa == VIRTEXIT_ISA_SVM && own->guest_tsc) {
			guest_tsc = READ(kvm_vcpu, vcpu, arch.last_guest_tsc);
			if (guest_tsc != own->guest_tsc)
				vx_late = 1;
			own->late = late(vcpu);
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
	struct virtexit_slot *pub = slot_in(cache());

	if (pub && fast(own_of(pub), vcpu, bpf_get_current_task()))
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

/*
 * Where an event names no vCPU. The thread is to be told when it is preempted, on
 * behalf of the vCPU that it runs.
 */
static __always_inline u64 running_vcpu(void)
{
	u64 link = READ(task_struct, bpf_get_current_task(),
			preempt_notifiers.first);

	return link ? link - OFFSET(kvm_vcpu, preempt_notifier.link) : 0;
}

/* kvm_exit(ret, esr_ec, vcpu_pc), on arm64, when interrupts have been on */
SEC("raw_tp")
int kvm_exit_arm64(struct bpf_raw_tracepoint_args *ctx)
{
	u32 ret = ctx->args[0], class = ctx->args[1];
	u32 serror = ret & VIRTEXIT_ARM64_SERROR;
	u32 type = ret & ~VIRTEXIT_ARM64_SERROR;

	return exit(running_vcpu(), VIRTEXIT_ISA_ARM64, serror |
		    (type == ARM_EXCEPTION_TRAP ? class :
						  VIRTEXIT_ARM64_TYPE | type));
}

/*
 * The record of kvm_exit, where KVM's vendor module has put the reason. So it need
 * not be known where else that is, but KVM takes a while to fill in the record.
 */
SEC("tp")
int kvm_exit_any(struct trace_event_raw_kvm_exit *record)
{
	return exit(running_vcpu(), record->isa, record->exit_reason);
}

/* After an exit that KVM handled at once; or false, and nothing is done. */
static __always_inline bool enter(struct virtexit_slot *pub,
				  const struct task_struct *task, u64 now)
{
	struct virtexit_row *row = row_at(pub, pub->open);
	s64 ns = now - pub->tsc;

	if (!row || own_of(pub)->switches != switches(task))
		return 0;
	if (unlikely(ns < 0))
		ns = 0;
	if (unlikely((u64)ns > row->max))
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
		if (enter(pub, bpf_get_current_task_btf(), now)) {
			end = bpf_ktime_get_ns();
			least(&vx_entry_cost, start, begin, end);
			return 0;
		}
	}
	time_enter(pub, vcpu, now);
	return 0;
}

static __always_inline int entry(u64 vcpu)
{
	u64 now = bpf_ktime_get_ns();
	struct virtexit_slot *pub = slot_in(cache());
	struct task_struct *task = bpf_get_current_task_btf();

	if (pub && fast(own_of(pub), vcpu, (u64)task) && enter(pub, task, now))
		return 0;
	entry_slow(vcpu, now);
	return 0;
}

/* kvm_entry(vcpu) */
SEC("raw_tp")
int kvm_entry(struct bpf_raw_tracepoint_args *ctx)
{
	return entry(ctx->args[0]);
}

/* kvm_entry(vcpu_pc), on arm64 */
SEC("raw_tp")
int kvm_entry_arm64(struct bpf_raw_tracepoint_args *ctx)
{
	return entry(running_vcpu());
}

/* kvm_userspace_exit(reason, errno): the thread leaves KVM_RUN */
SEC("raw_tp")
int kvm_userspace_exit(struct bpf_raw_tracepoint_args *ctx)
{
	u64 now = exit_time();
	u32 why = ctx->args[0], slot = find_last(1);
	struct virtexit_slot *pub;
	int error = ctx->args[1];

	if (!slot || !now)
		return 0;
	pub = slot_at(slot - 1);
	if (!pub || !pub->open)
		return 0;
	close(pub, own_of(pub)->task, now - pub->tsc, 0, 0);
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
	u64 now = bpf_ktime_get_ns();
	struct virtexit_slot *pub;
	u32 slot = find_last(0);
	struct halts known;
	struct vx_own *own;

	if (!slot)
		return 0;
	pub = slot_at(slot - 1);
	if (!pub)
		return 0;
	own = own_of(pub);
	known = halts(own->vcpu);
	if (pub->open) {
		close(pub, own->task, now - pub->tsc,
		      since(known.poll_ns, own->poll_ns),
		      since(known.halt_ns, own->halt_ns));
		stretch_from(pub, now);
	}
	own->poll_ns = known.poll_ns;
	own->halt_ns = known.halt_ns;
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
	u64 task, now = ctx->args[2];

	if (!pub)
		return 0;
	/* Its thread may be dying; what is read of it stays until this has ended. */
	task = *(volatile u64 *)&own_of(pub)->task;
	if (!task)
		return 0;
	if (level == VIRTEXIT_LEVEL_OFF) {
		tid = pub->tid;
		bpf_map_delete_elem(&threads, &tid);
		retire(pub, now);
	} else if (own_of(pub)->level > level) {
		set_level(pub, task, level, 0, now);
	}
	return 0;
}
