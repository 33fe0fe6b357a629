// SPDX-License-Identifier: GPL-2.0-only
/*
 * The hook. A patched KVM has one for us; another has its tracepoints kvm_exit
 * and kvm_entry. They are found when KVM's modules come, which can come and go as
 * they like, and carry our functions only while a lease is held.
 */
#include <linux/jump_label.h>
#include <linux/kvm.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/tracepoint.h>
#include <asm/msr.h>

#include "compat.h"
#include "kvm_exit_hook.h"
#include "reason.h"
#include "vx.h"

/* How exits come to us. A constant wherever it is passed on. */
enum vx_via {
	VX_VIA_SVM,	/* the tracepoint, with kvm_amd */
	VX_VIA_VMX,	/* the tracepoint, with kvm_intel */
	VX_VIA_PATCH,
};

enum vx_tp {
	VX_TP_EXIT,
	VX_TP_ENTRY,
	VX_TP_USER,
	VX_TP_WAKEUP,
	VX_TP_THREAD_EXIT,
	VX_TP_EXEC,
	VX_NR_TPS,
};

static const char *const vx_tp_names[VX_NR_TPS] = {
	[VX_TP_EXIT] = "kvm_exit",
	[VX_TP_ENTRY] = "kvm_entry",
	[VX_TP_USER] = "kvm_userspace_exit",
	[VX_TP_WAKEUP] = "kvm_vcpu_wakeup",
	[VX_TP_THREAD_EXIT] = "sched_process_exit",
	[VX_TP_EXEC] = "sched_process_exec",
};

/* Under vx_mutex. */
static struct tracepoint *vx_tps[VX_NR_TPS];
static struct vx_hook_stat vx_now;
static struct vx_hook_stat vx_announced;

/* Functions of kvm.ko. Changed with vx_mutex held and no probe attached. */
static struct kvm_vcpu *(*vx_running_vcpu)(void);
static int (*vx_patch_register)(const struct kvm_exit_hook *hook);
static void (*vx_patch_unregister)(const struct kvm_exit_hook *hook);

/* Exits are timed. */
static DEFINE_STATIC_KEY_FALSE(vx_timed);

/*
 * The tracepoint kvm_exit fires late; so a probe has found, and the key follows
 * when the worker has run. Exits until then are stamped late.
 */
static DEFINE_STATIC_KEY_FALSE(vx_late);
static bool vx_late_seen;

/* A probe found that it does not read what KVM reads. */
static bool vx_mismatch;

/*
 * Most kernels fire kvm_exit right behind the hardware's exit, with interrupts
 * off. SVM up to 6.1 fires it when interrupts have been on, and handled, whose
 * time would pass for the guest's; but the guest's TSC at the exit has been
 * kept. It is of use while TSCs are not scaled.
 */
static __always_inline void vx_stamp(struct virtexit_slot *pub,
				     struct virtexit_row *row,
				     struct kvm_vcpu *vcpu, enum vx_via via)
{
	u64 now = rdtsc();
	s64 cycles = now - pub->tsc;

	if (via == VX_VIA_SVM && static_branch_unlikely(&vx_late) &&
	    vcpu->arch.l1_tsc_scaling_ratio == SVM_TSC_RATIO_DEFAULT) {
		u64 tsc = vcpu->arch.last_guest_tsc -
			  vcpu->arch.l1_tsc_offset;
		u64 guest = tsc - pub->tsc;

		/* Not before the entry, nor in the future. */
		if (guest < (u64)cycles) {
			now = tsc;
			cycles = guest;
		}
	}
	/* Not so without an entry, or where CPUs' TSCs differ. */
	if (likely(cycles > 0))
		pub->guest_time += cycles;
	pub->open = (void *)row - (void *)pub;
	vx_stretch_from(pub, now);
}

static __always_inline u32 vx_code(struct kvm_vcpu *vcpu, enum vx_via via,
				   u32 given)
{
	switch (via) {
	case VX_VIA_SVM:
		return vx_reason_svm(vcpu);
	case VX_VIA_VMX:
		return vx_reason_vmx();
	default:
		return given;
	}
}

/*
 * All that an exit costs. Another thread may be changing the task of a slot
 * that is not ours; from no value to another that is ours. A slot is written by
 * its thread alone and nothing that interrupts it does, so plain stores suffice.
 *
 * Return: false when the slot or the row is not at hand; nothing is counted.
 */
static __always_inline bool vx_exit(struct kvm_vcpu *vcpu, enum vx_via via,
				    u32 given)
{
	struct vx_slot *s = this_cpu_read(vx_cache);
	struct virtexit_slot *pub;
	struct virtexit_row *row;
	u32 code;

	if (unlikely(data_race(s->fast) != current ||
		     s->vcpu_id != vcpu->vcpu_id))
		return false;
	code = vx_code(vcpu, via, given);
	pub = s->pub;
	row = vx_row_guess(pub, code);
	if (unlikely(row->code != code))
		return false;
	row->count++;
	if (static_branch_unlikely(&vx_timed))
		vx_stamp(pub, row, vcpu, via);
	return true;
}

/*
 * All that an entry costs after an exit that KVM handled at once.
 *
 * Return: false when there is more to it; nothing is done.
 */
static __always_inline bool vx_entry(struct kvm_vcpu *vcpu)
{
	struct vx_slot *s = this_cpu_read(vx_cache);
	struct virtexit_slot *pub;
	struct virtexit_row *row;
	u64 now, cycles;
	u32 offset;

	if (unlikely(data_race(s->fast) != current ||
		     s->vcpu_id != vcpu->vcpu_id))
		return false;
	pub = s->pub;
	offset = pub->open;
	if (unlikely(!offset || s->switches != vx_switches(current)))
		return false;
	now = rdtsc();
	row = vx_row_at(pub, offset);
	cycles = now - pub->tsc;
	if (unlikely(cycles > row->max)) {
		/* CPUs whose TSCs differ: too little rather than 584 years. */
		if (unlikely((s64)cycles < 0))
			cycles = 0;
		else
			row->max = cycles;
	}
	row->time += cycles;
	vx_row_handled(row, cycles);
	pub->open = 0;
	vx_stretch_from(pub, now);
	return true;
}

static void vx_log(struct vx_slot *s, struct kvm_vcpu *vcpu, u32 code)
{
	struct virtexit_slot *pub = s->pub;
	u64 head = pub->recent_head;
	struct virtexit_exit *e = &s->recent->exits[head % VIRTEXIT_NR_RECENT];

	e->tsc = pub->tsc;
	e->cycles = VIRTEXIT_PRESENT;
	e->code = code;
	if (vcpu->arch.guest_state_protected)
		e->rip = 0;
	else if (pub->isa == VIRTEXIT_ISA_VMX)
		e->rip = vx_rip_vmx();
	else
		e->rip = vcpu->arch.regs[VCPU_REGS_RIP];
	/* Whoever sees the number sees the exit. */
	smp_store_release(&pub->recent_head, head + 1);
}

/*
 * What the probes take, measured on real exits of a slot that is about to take
 * the fast path. Interrupts may fall in between; the least is kept.
 */
static __always_inline bool vx_exit_measured(struct vx_slot *s,
					     struct kvm_vcpu *vcpu,
					     enum vx_via via, u32 given)
{
	u64 start, begin, end;
	bool done;

	s->fast = current;
	start = rdtsc_ordered();
	begin = rdtsc_ordered();
	done = vx_exit(vcpu, via, given);
	end = rdtsc_ordered();
	s->fast = NULL;
	if (done) {
		vx_header_cost(end - begin - (begin - start), 0);
		if (!--s->measure)
			s->look = true;
	}
	return done;
}

static __always_inline bool vx_entry_measured(struct vx_slot *s,
					      struct kvm_vcpu *vcpu)
{
	u64 start, begin, end;
	bool done;

	s->fast = current;
	start = rdtsc_ordered();
	begin = rdtsc_ordered();
	done = vx_entry(vcpu);
	end = rdtsc_ordered();
	s->fast = NULL;
	if (done)
		vx_header_cost(0, end - begin - (begin - start));
	return done;
}

/* Of a thread that is not known yet. */
static bool vx_agreed(struct kvm_vcpu *vcpu, enum vx_via via, u32 isa)
{
	u32 expected = via == VX_VIA_SVM ? VIRTEXIT_ISA_SVM :
					   VIRTEXIT_ISA_VMX;

	if (READ_ONCE(vx_mismatch))
		return false;
	if (via == VX_VIA_PATCH)
		return isa == VIRTEXIT_ISA_SVM || isa == VIRTEXIT_ISA_VMX;
	if (!irqs_disabled() && !xchg(&vx_late_seen, true))
		vx_kick_atomic();
	return isa == expected && !vx_reason_check(vcpu, isa);
}

/*
 * The slot is not at hand, for instance because the thread has moved to
 * another CPU or has taken its first exit; or the row is not; or the slot's level
 * is not the one that the fast path is for.
 */
static __always_inline void vx_exit_slow(struct kvm_vcpu *vcpu,
					 enum vx_via via, u32 isa, u32 given)
{
	struct virtexit_slot *pub;
	struct virtexit_row *row;
	struct vx_slot *s;
	u32 code;

	preempt_disable_notrace();
	s = vx_slot_find(vcpu);
	if (unlikely(!s)) {
		if (!vx_agreed(vcpu, via, isa)) {
			vx_count_refused();
			if (!xchg(&vx_mismatch, true))
				vx_kick_atomic();
			goto out;
		}
		s = vx_slot_take(vcpu, isa);
		if (!s) {
			vx_count_unattributed();
			goto out;
		}
	}
	if (unlikely(READ_ONCE(s->look)))
		vx_slot_adopt(s, vcpu);
	/* Not before row 0 is in use, to which all codes lead at first. */
	if (s->measure && s->pub->nr_rows &&
	    vx_exit_measured(s, vcpu, via, given))
		goto out;
	if (s->level < VIRTEXIT_LEVEL_COUNT)
		goto out;
	code = vx_code(vcpu, via, given);
	pub = s->pub;
	row = vx_row(pub, code);
	row->count++;
	/* The key, too: without it nothing would end what begins here. */
	if (s->level >= VIRTEXIT_LEVEL_TIME &&
	    static_branch_unlikely(&vx_timed)) {
		vx_stamp(pub, row, vcpu, via);
		if (s->level == VIRTEXIT_LEVEL_RECENT)
			vx_log(s, vcpu, code);
	}
out:
	preempt_enable_notrace();
}

/* The same arguments as the probes, so that these are reached by a jump. */
static noinline void vx_exit_slow_svm(void *data, struct kvm_vcpu *vcpu,
				      u32 isa)
{
	vx_exit_slow(vcpu, VX_VIA_SVM, isa, 0);
}

static noinline void vx_exit_slow_vmx(void *data, struct kvm_vcpu *vcpu,
				      u32 isa)
{
	vx_exit_slow(vcpu, VX_VIA_VMX, isa, 0);
}

static noinline void vx_exit_slow_patch(struct kvm_vcpu *vcpu, u32 isa,
					u32 code)
{
	vx_exit_slow(vcpu, VX_VIA_PATCH, isa, code);
}

static notrace void vx_probe_exit_svm(void *data, struct kvm_vcpu *vcpu, u32 isa)
{
	if (unlikely(!vx_exit(vcpu, VX_VIA_SVM, 0)))
		vx_exit_slow_svm(data, vcpu, isa);
}

static notrace void vx_probe_exit_vmx(void *data, struct kvm_vcpu *vcpu, u32 isa)
{
	if (unlikely(!vx_exit(vcpu, VX_VIA_VMX, 0)))
		vx_exit_slow_vmx(data, vcpu, isa);
}

static notrace void vx_patch_exit(struct kvm_vcpu *vcpu, u32 isa, u32 code)
{
	if (unlikely(!vx_exit(vcpu, VX_VIA_PATCH, code)))
		vx_exit_slow_patch(vcpu, isa, code);
}

static noinline void vx_entry_slow(struct kvm_vcpu *vcpu)
{
	struct vx_slot *s = vx_slot_find(vcpu);

	if (!s || s->level < VIRTEXIT_LEVEL_TIME)
		return;
	if (s->measure && vx_entry_measured(s, vcpu))
		return;
	vx_time_enter(s, vcpu);
}

static notrace void vx_patch_entry(struct kvm_vcpu *vcpu)
{
	if (unlikely(!vx_entry(vcpu)))
		vx_entry_slow(vcpu);
}

static notrace void vx_probe_entry(void *data, struct kvm_vcpu *vcpu,
			   bool force_immediate_exit)
{
	if (unlikely(!vx_entry(vcpu)))
		vx_entry_slow(vcpu);
}

/* The thread runs no vCPU any more, and tells none. */
static void vx_probe_user(void *data, u32 reason, int error)
{
	struct vx_slot *s;
	u32 doing;

	preempt_disable_notrace();
	s = vx_slot_find_left();
	if (s && s->level >= VIRTEXIT_LEVEL_TIME) {
		if ((error < 0 && reason != KVM_EXIT_MEMORY_FAULT) ||
		    reason == KVM_EXIT_INTR)
			doing = VIRTEXIT_OUTSIDE;
		else if (reason == KVM_EXIT_HLT)
			doing = VIRTEXIT_HALTED;
		else
			doing = VIRTEXIT_IN_USER;
		vx_time_leave(s, doing);
	}
	preempt_enable_notrace();
}

static void vx_probe_wakeup(void *data, u64 ns, bool waited, bool valid)
{
	struct kvm_vcpu *vcpu;
	struct vx_slot *s;

	preempt_disable_notrace();
	vcpu = vx_running_vcpu();
	s = vcpu ? vx_slot_find(vcpu) : NULL;
	if (s && s->level >= VIRTEXIT_LEVEL_TIME)
		vx_time_wakeup(s, vcpu);
	preempt_enable_notrace();
}

static void vx_probe_thread_exit(void *data, struct task_struct *task)
{
	vx_slots_retire_task(task);
}

/* A thread that executes another program is another guest, if one at all. */
static void vx_probe_exec(void *data, struct task_struct *task, pid_t old_pid,
			  struct linux_binprm *bprm)
{
	vx_slots_retire_task(task);
}

static const struct kvm_exit_hook vx_patch_count = {
	.owner = THIS_MODULE,
	.abi = KVM_EXIT_HOOK_ABI,
	.exit = vx_patch_exit,
};

static const struct kvm_exit_hook vx_patch_time = {
	.owner = THIS_MODULE,
	.abi = KVM_EXIT_HOOK_ABI,
	.exit = vx_patch_exit,
	.entry = vx_patch_entry,
};

/* The one that is registered. Under vx_mutex. */
static const struct kvm_exit_hook *vx_patch_now;

static int vx_patch_set(const struct kvm_exit_hook *hook)
{
	int err = vx_patch_register(hook);

	if (!err)
		vx_patch_now = hook;
	return err;
}

static void *vx_probe_exit(void)
{
	return vx_now.isa == VIRTEXIT_ISA_SVM ? (void *)vx_probe_exit_svm :
						(void *)vx_probe_exit_vmx;
}

static const char *vx_why_refused(void)
{
	static const char *const missing[VX_NR_TPS] = {
		[VX_TP_ENTRY] = "the kvm module has no event kvm_entry",
		[VX_TP_USER] = "the kvm module has no event kvm_userspace_exit",
		[VX_TP_WAKEUP] = "the kvm module has no event kvm_vcpu_wakeup",
		[VX_TP_THREAD_EXIT] = "the kernel has no event sched_process_exit",
		[VX_TP_EXEC] = "the kernel has no event sched_process_exec",
	};
	unsigned int i;

	if (!vx_tps[VX_TP_EXIT])
		return NULL;
	if (READ_ONCE(vx_mismatch))
		return "exit reasons differ from those that KVM reads: is kvm another build than the kernel?";
	for (i = 0; i < VX_NR_TPS; i++)
		if (!vx_tps[i])
			return missing[i];
	if (!vx_running_vcpu)
		return "the kvm module has no function kvm_get_running_vcpu";
	if (!vx_now.isa)
		return "no vendor module is loaded whose exits are known (kvm_amd, kvm_intel)";
	return vx_reason_unusable(vx_now.isa);
}

static int vx_attach_probe(enum vx_tp tp, void *probe)
{
	return tracepoint_probe_register(vx_tps[tp], probe, NULL);
}

static void vx_detach_probe(enum vx_tp tp, void *probe)
{
	tracepoint_probe_unregister(vx_tps[tp], probe, NULL);
}

/* From PAUSE to OFF. */
static void vx_pause_off(void)
{
	vx_slots_retire_all();
	vx_detach_probe(VX_TP_EXEC, vx_probe_exec);
	vx_detach_probe(VX_TP_THREAD_EXIT, vx_probe_thread_exit);
	tracepoint_synchronize_unregister();
}

/*
 * From OFF to PAUSE: no thread with a slot goes unnoticed, before there is any
 * slot.
 */
static int vx_pause_on(void)
{
	int err;

	err = vx_attach_probe(VX_TP_THREAD_EXIT, vx_probe_thread_exit);
	if (err)
		return err;
	err = vx_attach_probe(VX_TP_EXEC, vx_probe_exec);
	if (err) {
		vx_detach_probe(VX_TP_THREAD_EXIT, vx_probe_thread_exit);
		/* The module may go next, for its level is OFF. */
		tracepoint_synchronize_unregister();
	}
	return err;
}

/* From COUNT to PAUSE. */
static void vx_count_off(void)
{
	/* Not only at the end of a grace period in which nothing is counted. */
	vx_header_counting(false);
	if (vx_now.hook == VIRTEXIT_HOOK_PATCH)
		vx_patch_unregister(vx_patch_now);
	else
		vx_detach_probe(VX_TP_EXIT, vx_probe_exit());
	tracepoint_synchronize_unregister();
	vx_now.hook = VIRTEXIT_HOOK_NONE;
	vx_slots_cap(VIRTEXIT_LEVEL_PAUSE, rdtsc());
}

/* From PAUSE to COUNT. A hook that is taken, or not whole, is as good as none. */
static int vx_count_on(void)
{
	int err;

	vx_slots_cap(VIRTEXIT_LEVEL_COUNT, rdtsc());
	if (vx_patch_register && !vx_patch_set(&vx_patch_count)) {
		vx_now.hook = VIRTEXIT_HOOK_PATCH;
		return 0;
	}
	err = vx_attach_probe(VX_TP_EXIT, vx_probe_exit());
	if (!err)
		vx_now.hook = VIRTEXIT_HOOK_TRACEPOINT;
	return err;
}

static int vx_entry_on(void)
{
	if (vx_now.hook == VIRTEXIT_HOOK_PATCH)
		return vx_patch_set(&vx_patch_time);
	return vx_attach_probe(VX_TP_ENTRY, vx_probe_entry);
}

static void vx_entry_off(void)
{
	/* Refused only when the vendor module, and so every call, is going. */
	if (vx_now.hook == VIRTEXIT_HOOK_PATCH)
		vx_patch_set(&vx_patch_count);
	else
		vx_detach_probe(VX_TP_ENTRY, vx_probe_entry);
}

/* From TIME to COUNT. COUNT's own probe stays, so that no exit is lost. */
static void vx_time_off(void)
{
	/* What follows takes its time, in which no stretch is seen to end. */
	u64 now = rdtsc();

	static_branch_disable(&vx_timed);
	vx_entry_off();
	vx_detach_probe(VX_TP_WAKEUP, vx_probe_wakeup);
	vx_detach_probe(VX_TP_USER, vx_probe_user);
	tracepoint_synchronize_unregister();
	vx_slots_cap(VIRTEXIT_LEVEL_COUNT, now);
}

/* From COUNT to TIME. */
static int vx_time_on(void)
{
	int err;

	/* Slots that are at COUNT must not be timed by the fast path. */
	vx_slots_no_fast();
	synchronize_rcu();
	err = vx_attach_probe(VX_TP_USER, vx_probe_user);
	if (err)
		goto cap;
	err = vx_attach_probe(VX_TP_WAKEUP, vx_probe_wakeup);
	if (err)
		goto user;
	err = vx_entry_on();
	if (err)
		goto wakeup;
	static_branch_enable(&vx_timed);
	vx_slots_fast_time();
	return 0;

wakeup:
	vx_detach_probe(VX_TP_WAKEUP, vx_probe_wakeup);
user:
	vx_detach_probe(VX_TP_USER, vx_probe_user);
	tracepoint_synchronize_unregister();
cap:
	vx_slots_cap(VIRTEXIT_LEVEL_COUNT, rdtsc());
	return err;
}

/*
 * What leads to a level from the one below, and back. What RECENT takes, each
 * slot sees to.
 */
static const struct {
	int (*on)(void);
	void (*off)(void);
} vx_steps[] = {
	[VIRTEXIT_LEVEL_PAUSE] = { vx_pause_on, vx_pause_off },
	[VIRTEXIT_LEVEL_COUNT] = { vx_count_on, vx_count_off },
	[VIRTEXIT_LEVEL_TIME] = { vx_time_on, vx_time_off },
};

/* The level that is attached. */
static u32 vx_level;

static int vx_set_level(u32 want)
{
	u32 level = min_t(u32, want, VIRTEXIT_LEVEL_TIME);
	int err = 0;

	while (!err && vx_level < level) {
		err = vx_steps[vx_level + 1].on();
		if (!err)
			vx_level++;
	}
	while (vx_level > level)
		vx_steps[vx_level--].off();
	vx_now.level = err ? vx_level : want;
	return err;
}

/**
 * vx_hook_update - attach what the leases want and KVM allows; vx_mutex held
 */
void vx_hook_update(void)
{
	lockdep_assert_held(&vx_mutex);
	if (READ_ONCE(vx_late_seen))
		static_branch_enable(&vx_late);
	vx_now.kvm = vx_tps[VX_TP_EXIT];
	vx_now.refused = vx_why_refused();
	if (vx_set_level(vx_now.kvm && !vx_now.refused ? vx_leases_level() :
							 VIRTEXIT_LEVEL_OFF))
		vx_now.refused = "the kernel did not accept a probe";
	vx_slots_wish(vx_now.level);
	vx_header_counting(vx_now.level >= VIRTEXIT_LEVEL_COUNT);

	if (vx_now.level != vx_announced.level ||
	    vx_now.isa != vx_announced.isa ||
	    vx_now.hook != vx_announced.hook ||
	    vx_now.kvm != vx_announced.kvm ||
	    vx_now.refused != vx_announced.refused) {
		vx_announced = vx_now;
		vx_send_kvm_event();
	}
}

/**
 * vx_hook_stat - what is attached; vx_mutex held
 * @stat: where to put it
 */
void vx_hook_stat(struct vx_hook_stat *stat)
{
	*stat = vx_now;
}

static void vx_found_tracepoint(struct tracepoint *tp, void *data)
{
	unsigned int i;

	for (i = 0; i < VX_NR_TPS; i++)
		if (!strcmp(tp->name, vx_tp_names[i]))
			vx_tps[i] = tp;
}

static void vx_found_kvm(struct module *mod)
{
	unsigned int i;

	for (i = 0; i < mod->num_tracepoints; i++)
		vx_found_tracepoint(tracepoint_ptr_deref(mod->tracepoints_ptrs + i),
				    NULL);
	vx_running_vcpu = vx_function("kvm_get_running_vcpu");
	vx_patch_register = vx_function("kvm_exit_hook_register");
	vx_patch_unregister = vx_function("kvm_exit_hook_unregister");
	if (!vx_patch_unregister)
		vx_patch_register = NULL;
}

static void vx_forget_kvm(void)
{
	unsigned int i;

	for (i = VX_TP_EXIT; i <= VX_TP_WAKEUP; i++)
		vx_tps[i] = NULL;
	vx_running_vcpu = NULL;
	vx_patch_register = NULL;
	vx_patch_unregister = NULL;
}

/* The kvm module comes, or is there already; or goes, or we do. */
static int vx_tracepoint_notify(struct notifier_block *nb, unsigned long state,
				void *data)
{
	struct tp_module *tpm = data;

	if (strcmp(tpm->mod->name, "kvm"))
		return NOTIFY_DONE;
	mutex_lock(&vx_mutex);
	vx_set_level(VIRTEXIT_LEVEL_OFF);
	vx_forget_kvm();
	if (state == MODULE_STATE_COMING)
		vx_found_kvm(tpm->mod);
	vx_hook_update();
	mutex_unlock(&vx_mutex);
	return NOTIFY_DONE;
}

static struct notifier_block vx_tracepoint_nb = {
	.notifier_call = vx_tracepoint_notify,
};

/* A vendor module comes or goes; kvm.ko stays meanwhile. */
static int vx_module_notify(struct notifier_block *nb, unsigned long state,
			    void *data)
{
	struct module *mod = data;

	/* That of the other vendor may come too, only for KVM to refuse it. */
	if (strcmp(mod->name, vx_reason_vendor()))
		return NOTIFY_DONE;

	mutex_lock(&vx_mutex);
	switch (state) {
	case MODULE_STATE_COMING:
	case MODULE_STATE_GOING:
		vx_set_level(VIRTEXIT_LEVEL_OFF);
		/* What was wrong with the last one need not be with the next. */
		vx_mismatch = false;
		vx_reason_forget();
		vx_now.isa = VIRTEXIT_ISA_NONE;
		if (state == MODULE_STATE_COMING)
			vx_now.isa = vx_reason_resolve();
		vx_hook_update();
		break;
	case MODULE_STATE_LIVE:
		/* A patched one has told kvm.ko by now that it has the hook. */
		if (vx_patch_register) {
			vx_set_level(min_t(u32, vx_now.level,
					   VIRTEXIT_LEVEL_PAUSE));
			vx_hook_update();
		}
		break;
	}
	mutex_unlock(&vx_mutex);
	return NOTIFY_DONE;
}

static struct notifier_block vx_module_nb = {
	.notifier_call = vx_module_notify,
};

int vx_hook_init(void)
{
	int err;

	err = register_module_notifier(&vx_module_nb);
	if (err)
		return err;
	mutex_lock(&vx_mutex);
	for_each_kernel_tracepoint(vx_found_tracepoint, NULL);
	vx_now.isa = vx_reason_resolve();
	mutex_unlock(&vx_mutex);
	err = register_tracepoint_module_notifier(&vx_tracepoint_nb);
	if (err)
		unregister_module_notifier(&vx_module_nb);
	return err;
}

/* No lease is held any more, nor can be taken. */
void vx_hook_exit(void)
{
	unregister_tracepoint_module_notifier(&vx_tracepoint_nb);
	unregister_module_notifier(&vx_module_nb);
	mutex_lock(&vx_mutex);
	vx_set_level(VIRTEXIT_LEVEL_OFF);
	mutex_unlock(&vx_mutex);
}
