// SPDX-License-Identifier: GPL-2.0-only
/*
 * Where the time of a vCPU thread goes. It passes in stretches: a new one
 * begins with each exit and entry, when a halt ends, and when the thread leaves
 * KVM_RUN. An exit that is handled at once by KVM, without a context switch, has
 * one stretch, and the probes see to it; all others come here.
 *
 * The calling thread owns the slot, whose level is TIME or above, if not said
 * otherwise. It does not migrate and is not retired meanwhile.
 */
#include <linux/math64.h>
#include <linux/sched.h>
#include <asm/msr.h>
#include <asm/svm.h>
#include <asm/tsc.h>
#include <asm/vmx.h>

#include "compat.h"
#include "vx.h"

static u64 vx_poll_ns(const struct kvm_vcpu *vcpu)
{
	return vcpu->stat.generic.halt_poll_success_ns +
	       vcpu->stat.generic.halt_poll_fail_ns;
}

static u64 vx_halt_ns(const struct kvm_vcpu *vcpu)
{
	return vcpu->stat.generic.halt_wait_ns;
}

/* Cycles per nanosecond, times 2^32. */
static u64 vx_cycles;

/**
 * vx_time_init - before there is any slot
 */
void vx_time_init(void)
{
	vx_cycles = div_u64((u64)tsc_khz << 32, 1000000);
}

/* Moves nanoseconds that others have measured, as far as there is time left. */
static void vx_move(u64 *sum, u64 ns, u64 *left)
{
	u64 cycles = min(mul_u64_u64_shr(ns, vx_cycles, 32), *left);

	*sum += cycles;
	*left -= cycles;
}

/*
 * An exit is in progress and the present stretch ends. What was spent waiting,
 * polling and halted is taken from it; the rest is what the thread was at. The
 * thread need not be the caller.
 */
static void vx_close(struct vx_slot *s, u64 now, u64 poll_ns, u64 halt_ns)
{
	struct virtexit_slot *pub = s->pub;
	struct virtexit_row *row = vx_row_at(pub, pub->open);
	u64 delay = vx_run_delay(s->task);
	u64 wait_ns = delay - s->run_delay;
	u64 left = now - pub->tsc;

	/* CPUs whose TSCs differ: too little rather than 584 years. */
	if ((s64)left < 0)
		left = 0;
	s->run_delay = delay;
	vx_move(&pub->wait_time, wait_ns, &left);
	vx_move(&pub->poll_time, poll_ns, &left);
	/* KVM counts a halt up to when the thread runs again. */
	vx_move(&pub->halted_time, halt_ns - min(halt_ns, wait_ns), &left);
	switch (pub->doing) {
	case VIRTEXIT_IN_USER:
		row->user_time += left;
		fallthrough;
	case VIRTEXIT_IN_KVM:
		row->time += left;
		s->handled += left;
		break;
	case VIRTEXIT_HALTED:
		pub->halted_time += left;
		break;
	default:
		pub->outside_time += left;
		break;
	}
	vx_stretch_from(pub, now);
	s->switches = VX_LOOK;
}

static bool vx_row_halts(const struct virtexit_slot *pub,
			 const struct virtexit_row *row)
{
	return !(row->flags & VIRTEXIT_ROW_OTHER) &&
	       row->code == (pub->isa == VIRTEXIT_ISA_SVM ? SVM_EXIT_HLT :
							    EXIT_REASON_HLT);
}

/* The exit in progress is the latest that was logged. */
static void vx_log_end(struct vx_slot *s, u64 now)
{
	u64 last = s->pub->recent_head - 1;
	struct virtexit_exit *e = &s->recent->exits[last % VIRTEXIT_NR_RECENT];

	WRITE_ONCE(e->cycles, now - e->tsc);
}

/**
 * vx_time_begin - time begins to be counted, with the exit that is at hand
 * @s: the slot, below level TIME
 * @vcpu: that the thread runs
 */
void vx_time_begin(struct vx_slot *s, struct kvm_vcpu *vcpu)
{
	struct virtexit_slot *pub = s->pub;

	s->run_delay = vx_run_delay(s->task);
	s->poll_ns = vx_poll_ns(vcpu);
	s->halt_ns = vx_halt_ns(vcpu);
	s->switches = VX_LOOK;
	s->handled = 0;
	pub->open = 0;
	pub->doing = VIRTEXIT_IN_KVM;
	pub->tsc = VX_NEVER;
}

/**
 * vx_time_end - the present stretch ends, and no other begins
 * @s: the slot, of the caller or, while no probe sees to its time, of another
 *	thread; vx_slot_lock is held
 * @now: when it ends
 */
void vx_time_end(struct vx_slot *s, u64 now)
{
	struct virtexit_slot *pub = s->pub;
	s64 cycles;

	if (pub->open) {
		/* KVM has not told of a halt that goes on. */
		if (pub->doing == VIRTEXIT_IN_KVM &&
		    vx_row_halts(pub, vx_row_at(pub, pub->open)))
			pub->doing = VIRTEXIT_HALTED;
		if (s->level == VIRTEXIT_LEVEL_RECENT)
			vx_log_end(s, now);
		vx_close(s, now, 0, 0);
	} else {
		cycles = now - pub->tsc;
		if (cycles > 0)
			pub->guest_time += cycles;
	}
	/* No exit is said to be in progress at a time that is not. */
	pub->tsc = VX_NEVER;
	pub->open = 0;
}

/**
 * vx_time_wakeup - a halt has ended
 * @s: the slot
 * @vcpu: that the thread runs
 */
void vx_time_wakeup(struct vx_slot *s, struct kvm_vcpu *vcpu)
{
	u64 poll_ns = vx_poll_ns(vcpu);
	u64 halt_ns = vx_halt_ns(vcpu);

	/* The statistics are the vCPU's, which may be another, or were reset. */
	if (s->pub->open)
		vx_close(s, rdtsc(), poll_ns - min(poll_ns, s->poll_ns),
			 halt_ns - min(halt_ns, s->halt_ns));
	s->poll_ns = poll_ns;
	s->halt_ns = halt_ns;
}

/**
 * vx_time_leave - the thread leaves KVM_RUN
 * @s: the slot
 * @doing: enum virtexit_doing: what for
 */
void vx_time_leave(struct vx_slot *s, u32 doing)
{
	if (!s->pub->open)
		return;
	vx_close(s, rdtsc(), 0, 0);
	s->pub->doing = doing;
}

/**
 * vx_time_enter - the thread enters the guest
 * @s: the slot
 * @vcpu: that the thread runs
 */
void vx_time_enter(struct vx_slot *s, struct kvm_vcpu *vcpu)
{
	struct virtexit_slot *pub = s->pub;
	u64 now = rdtsc();

	/* None in progress after an entry that failed and so made no exit. */
	if (pub->open) {
		struct virtexit_row *row = vx_row_at(pub, pub->open);

		if (s->level == VIRTEXIT_LEVEL_RECENT)
			vx_log_end(s, now);
		vx_close(s, now, 0, 0);
		row->max = max(row->max, s->handled);
		vx_row_handled(row, s->handled);
		s->handled = 0;
		pub->doing = VIRTEXIT_IN_KVM;
		pub->open = 0;
	}
	vx_stretch_from(pub, now);
	s->poll_ns = vx_poll_ns(vcpu);
	s->halt_ns = vx_halt_ns(vcpu);
	s->switches = vx_switches(current);
}
