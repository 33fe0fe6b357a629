// SPDX-License-Identifier: GPL-2.0-only
/*
 * The hook: KVM's own tracepoints kvm_exit and kvm_entry. They are found when
 * the kvm module brings them, so that it can come and go as it likes, and
 * carry our probes only while a lease is held.
 */
#include <linux/jump_label.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/tracepoint.h>
#include <asm/msr.h>

#include "compat.h"
#include "reason.h"
#include "vx.h"

/* Under vx_mutex. */
static struct tracepoint *vx_tp_exit;
static struct tracepoint *vx_tp_entry;
static struct tracepoint *vx_tp_thread_exit;
static struct tracepoint *vx_tp_exec;
static struct vx_hook_stat vx_now;
static struct vx_hook_stat vx_announced;

/* Exits are timed. */
static DEFINE_STATIC_KEY_FALSE(vx_timed);

/* A probe found that it does not read what KVM reads. */
static bool vx_mismatch;

/*
 * When the hardware exit was. Most kernels fire kvm_exit right behind it, with
 * interrupts off. SVM up to 6.1 fires it when interrupts have been on, and
 * handled, whose time would pass for the guest's; but the guest's TSC at the exit
 * has been kept. It is of use while TSCs are not scaled.
 */
static __always_inline u64 vx_exit_tsc(struct kvm_vcpu *vcpu,
				       struct vx_slot *s, u32 isa)
{
	u64 now = rdtsc();
	u64 tsc;

	if (isa != VIRTEXIT_ISA_SVM || irqs_disabled() ||
	    vcpu->arch.l1_tsc_scaling_ratio != SVM_TSC_RATIO_DEFAULT)
		return now;
	tsc = vcpu->arch.last_guest_tsc - vcpu->arch.l1_tsc_offset;
	/* Not before the entry, nor in the future. */
	return now - tsc < now - s->entry_tsc ? tsc : now;
}

/*
 * The slot is written by its thread alone and nothing that interrupts it does,
 * so plain stores suffice.
 */
static __always_inline void vx_count(struct vx_slot *s,
				     struct virtexit_slot *pub,
				     struct virtexit_row *row,
				     struct kvm_vcpu *vcpu, u32 isa)
{
	row->count++;
	if (static_branch_unlikely(&vx_timed)) {
		u64 now = vx_exit_tsc(vcpu, s, isa);
		s64 cycles = now - s->entry_tsc;

		/* Not so without an entry, or where CPUs' TSCs differ. */
		if (likely(cycles > 0))
			pub->guest_time += cycles;
		s->exit_tsc = now;
		s->row = row;
		s->entry_tsc = VX_NOT_ENTERED;
	}
}

static __always_inline u32 vx_reason(struct kvm_vcpu *vcpu, u32 isa)
{
	return isa == VIRTEXIT_ISA_SVM ? vx_reason_svm(vcpu) : vx_reason_vmx();
}

/*
 * The slot is not at hand, for instance because the thread has moved to
 * another CPU or has taken its first exit; or the row is not.
 */
static __always_inline void vx_exit_slow(struct kvm_vcpu *vcpu, u32 seen,
					 u32 isa)
{
	struct vx_slot *s;
	u32 code;

	preempt_disable_notrace();
	s = vx_slot_find(vcpu);
	if (unlikely(!s)) {
		if (READ_ONCE(vx_mismatch) || seen != isa ||
		    vx_reason_check(vcpu, isa, &code)) {
			vx_count_refused();
			if (!xchg(&vx_mismatch, true))
				vx_kick_atomic();
			goto out;
		}
		s = vx_slot_take(vcpu, isa, code);
		if (!s) {
			vx_count_unattributed();
			goto out;
		}
	}
	vx_count(s, s->pub, vx_row(s->pub, vx_reason(vcpu, isa)), vcpu, isa);
out:
	preempt_enable_notrace();
}

/* The same arguments as the probes, so that these are reached by a jump. */
static noinline void vx_exit_slow_svm(void *data, struct kvm_vcpu *vcpu,
				      u32 seen)
{
	vx_exit_slow(vcpu, seen, VIRTEXIT_ISA_SVM);
}

static noinline void vx_exit_slow_vmx(void *data, struct kvm_vcpu *vcpu,
				      u32 seen)
{
	vx_exit_slow(vcpu, seen, VIRTEXIT_ISA_VMX);
}

/*
 * All that an exit costs. Another thread may be changing the task of a slot
 * that is not ours; from no value to another that is ours.
 *
 * Return: false when the slot or the row is not at hand; nothing is counted.
 */
static __always_inline bool vx_exit(struct kvm_vcpu *vcpu, u32 isa)
{
	struct vx_slot *s = this_cpu_read(vx_cache);
	struct virtexit_slot *pub;
	struct virtexit_row *row;
	u32 code;

	if (unlikely(data_race(s->task) != current ||
		     s->vcpu_id != vcpu->vcpu_id))
		return false;
	code = vx_reason(vcpu, isa);
	pub = s->pub;
	row = vx_row_guess(pub, code);
	if (unlikely(row->code != code))
		return false;
	vx_count(s, pub, row, vcpu, isa);
	return true;
}

static void vx_probe_exit_svm(void *data, struct kvm_vcpu *vcpu, u32 seen)
{
	if (unlikely(!vx_exit(vcpu, VIRTEXIT_ISA_SVM)))
		vx_exit_slow_svm(data, vcpu, seen);
}

static void vx_probe_exit_vmx(void *data, struct kvm_vcpu *vcpu, u32 seen)
{
	if (unlikely(!vx_exit(vcpu, VIRTEXIT_ISA_VMX)))
		vx_exit_slow_vmx(data, vcpu, seen);
}

static void vx_probe_entry(void *data, struct kvm_vcpu *vcpu,
			   bool force_immediate_exit)
{
	struct vx_slot *s = this_cpu_read(vx_cache);
	struct virtexit_row *row;
	u64 now;

	if (unlikely(data_race(s->task) != current ||
		     s->vcpu_id != vcpu->vcpu_id)) {
		s = vx_slot_find(vcpu);
		if (!s)
			return;
	}
	now = rdtsc();
	row = s->row;
	/* None after an entry that failed and so made no exit. */
	if (likely(row)) {
		u64 cycles = now - s->exit_tsc;
		unsigned int i;

		/* CPUs whose TSCs differ: too little rather than 584 years. */
		if (unlikely((s64)cycles < 0))
			cycles = 0;
		row->time += cycles;
		if (cycles > row->max)
			row->max = cycles;
		i = __fls(cycles | BIT(VIRTEXIT_HIST_SHIFT)) -
		    VIRTEXIT_HIST_SHIFT;
		row->hist[min_t(unsigned int, i, VIRTEXIT_NR_HIST - 1)]++;
		s->row = NULL;
	}
	s->entry_tsc = now;
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

static void *vx_probe_exit(void)
{
	return vx_now.isa == VIRTEXIT_ISA_SVM ? (void *)vx_probe_exit_svm :
						(void *)vx_probe_exit_vmx;
}

static const char *vx_why_refused(void)
{
	if (!vx_tp_exit)
		return NULL;
	if (READ_ONCE(vx_mismatch))
		return "exit reasons differ from those that KVM reads: is kvm another build than the kernel?";
	if (!vx_tp_entry)
		return "the kvm module has no kvm_entry tracepoint";
	if (!vx_tp_thread_exit || !vx_tp_exec)
		return "the kernel lacks the tracepoint sched_process_exit or sched_process_exec";
	if (!vx_now.isa)
		return "no vendor module is loaded whose exits are known (kvm_amd, kvm_intel)";
	return vx_reason_unusable(vx_now.isa);
}

static void vx_detach_task(void)
{
	tracepoint_probe_unregister(vx_tp_exec, vx_probe_exec, NULL);
	tracepoint_probe_unregister(vx_tp_thread_exit, vx_probe_thread_exit,
				    NULL);
	tracepoint_synchronize_unregister();
}

/* So that no thread with a slot goes unnoticed, before there is any slot. */
static int vx_attach_task(void)
{
	int err;

	err = tracepoint_probe_register(vx_tp_thread_exit,
					vx_probe_thread_exit, NULL);
	if (err)
		return err;
	err = tracepoint_probe_register(vx_tp_exec, vx_probe_exec, NULL);
	if (err) {
		tracepoint_probe_unregister(vx_tp_thread_exit,
					    vx_probe_thread_exit, NULL);
		/* The module may go next, for its level is OFF. */
		tracepoint_synchronize_unregister();
	}
	return err;
}

/* From OFF to COUNT. */
static int vx_attach(void)
{
	int err;

	err = vx_attach_task();
	if (err)
		return err;
	err = tracepoint_probe_register(vx_tp_exit, vx_probe_exit(), NULL);
	if (err)
		vx_detach_task();
	return err;
}

/* From COUNT to OFF. */
static void vx_detach(void)
{
	tracepoint_probe_unregister(vx_tp_exit, vx_probe_exit(), NULL);
	tracepoint_synchronize_unregister();
	vx_slots_retire_all();
	vx_detach_task();
}

/* From COUNT to TIME. */
static int vx_time_on(void)
{
	int err;

	err = tracepoint_probe_register(vx_tp_entry, vx_probe_entry, NULL);
	if (!err)
		static_branch_enable(&vx_timed);
	return err;
}

/* From TIME to COUNT. */
static void vx_time_off(void)
{
	static_branch_disable(&vx_timed);
	tracepoint_probe_unregister(vx_tp_entry, vx_probe_entry, NULL);
	tracepoint_synchronize_unregister();
	vx_slots_untime();
}

/*
 * Step by step. COUNT and TIME share the exit probe, so that no exit is lost
 * between them.
 */
static int vx_set_level(u32 want)
{
	int err;

	while (vx_now.level < want) {
		err = vx_now.level == VIRTEXIT_LEVEL_OFF ? vx_attach() :
							   vx_time_on();
		if (err)
			return err;
		vx_now.level++;
	}
	while (vx_now.level > want) {
		if (vx_now.level == VIRTEXIT_LEVEL_TIME)
			vx_time_off();
		else
			vx_detach();
		vx_now.level--;
	}
	return 0;
}

/**
 * vx_hook_update - attach what the leases want and KVM allows; vx_mutex held
 */
void vx_hook_update(void)
{
	lockdep_assert_held(&vx_mutex);
	vx_now.kvm = vx_tp_exit;
	vx_now.refused = vx_why_refused();
	if (vx_set_level(vx_now.kvm && !vx_now.refused ? vx_leases_level() :
							 VIRTEXIT_LEVEL_OFF))
		vx_now.refused = "the kernel did not accept a probe";
	vx_now.hook = vx_now.level ? VIRTEXIT_HOOK_TRACEPOINT :
				     VIRTEXIT_HOOK_NONE;

	if (vx_now.level != vx_announced.level ||
	    vx_now.isa != vx_announced.isa ||
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
	if (!strcmp(tp->name, "kvm_exit"))
		vx_tp_exit = tp;
	else if (!strcmp(tp->name, "kvm_entry"))
		vx_tp_entry = tp;
	else if (!strcmp(tp->name, "sched_process_exit"))
		vx_tp_thread_exit = tp;
	else if (!strcmp(tp->name, "sched_process_exec"))
		vx_tp_exec = tp;
}

/* The kvm module comes, or is there already; or goes, or we do. */
static int vx_tracepoint_notify(struct notifier_block *nb, unsigned long state,
				void *data)
{
	struct tp_module *tpm = data;
	struct module *mod = tpm->mod;
	unsigned int i;

	if (strcmp(mod->name, "kvm"))
		return NOTIFY_DONE;
	mutex_lock(&vx_mutex);
	vx_set_level(VIRTEXIT_LEVEL_OFF);
	vx_tp_exit = NULL;
	vx_tp_entry = NULL;
	if (state == MODULE_STATE_COMING)
		for (i = 0; i < mod->num_tracepoints; i++)
			vx_found_tracepoint(tracepoint_ptr_deref(mod->tracepoints_ptrs + i),
					    NULL);
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
	if (state != MODULE_STATE_COMING && state != MODULE_STATE_GOING)
		return NOTIFY_DONE;

	mutex_lock(&vx_mutex);
	vx_set_level(VIRTEXIT_LEVEL_OFF);
	/* What was wrong with the last one need not be with the next. */
	vx_mismatch = false;
	vx_reason_forget();
	vx_now.isa = VIRTEXIT_ISA_NONE;
	if (state == MODULE_STATE_COMING)
		vx_now.isa = vx_reason_resolve();
	vx_hook_update();
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
