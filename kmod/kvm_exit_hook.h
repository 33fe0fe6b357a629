/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * One observer of every VM exit and VM entry, registered by another module.
 */
#ifndef __KVM_X86_EXIT_HOOK_H
#define __KVM_X86_EXIT_HOOK_H

#include <linux/jump_label.h>
#include <linux/static_call.h>
#include <linux/types.h>

struct kvm_vcpu;
struct module;

/* Rises when the meaning of struct kvm_exit_hook or of its callbacks changes. */
#define KVM_EXIT_HOOK_ABI 1

/**
 * struct kvm_exit_hook - the callbacks of an observer
 * @owner: THIS_MODULE; referenced while a hook of its is registered.
 * @abi: KVM_EXIT_HOOK_ABI
 * @exit: The hardware has left the guest, be it L1 or L2, for @reason, which is
 *	the exit code of @isa as the hardware gave it: the exit reason field of
 *	the VMCS with its flags, or the low half of the VMCB's exit code. @isa is
 *	what the tracepoint kvm_exit has: 1 is VMX, 2 is SVM. Exits that KVM
 *	handles on its fast path are included, those that it makes up are not.
 * @entry: The guest is about to be entered. May be NULL.
 * @destroy: The vCPU is going away. It may never have run. May be NULL.
 *
 * @exit and @entry are called by the thread that runs the vCPU, with interrupts
 * off. A VM entry has @entry before it and @exit behind it, on the same CPU with
 * interrupts off throughout, with one exception: when VMLAUNCH or VMRESUME
 * itself fails, the hardware has not been in the guest, so there is no @exit,
 * and the next call for that vCPU is another @entry or @destroy. An entry that
 * fails because of the guest's state is an exit with a reason that says so.
 *
 * @destroy is called within an RCU read-side critical section and must not sleep.
 */
struct kvm_exit_hook {
	struct module *owner;
	u32 abi;
	void (*exit)(struct kvm_vcpu *vcpu, u32 isa, u32 reason);
	void (*entry)(struct kvm_vcpu *vcpu);
	void (*destroy)(struct kvm_vcpu *vcpu);
};

/**
 * kvm_exit_hook_register - have callbacks called, or replace one's own
 * @hook: It must stay as it is until it is unregistered or replaced.
 *
 * A vCPU may be in the guest at that moment: its first call may be @exit.
 *
 * When @hook has the owner of the registered one, it takes its place, callback
 * by callback: a callback that both have misses no call. When this returns, no
 * callback that only the former had is running, and none will.
 *
 * A module notifier may register at MODULE_STATE_LIVE of the vendor module, not
 * before: the vendor module is known when it has been initialized. It may replace
 * whenever it may unregister.
 *
 * Context: may sleep
 * Return: 0; or nothing has changed: -EINVAL for another ABI or no @exit, -EBUSY
 * when another owner's hook is registered; when none is, -EOPNOTSUPP when there
 * is no vendor module or one that calls no hooks, -ENODEV when the owner is being
 * unloaded.
 */
int kvm_exit_hook_register(const struct kvm_exit_hook *hook);

/**
 * kvm_exit_hook_unregister - the end of all calls
 * @hook: the one that is registered
 *
 * When this returns, no callback is running, and none will.
 *
 * A hook stays registered when the vendor module goes, and is called by the next
 * one if that calls hooks: unregister and register again to know. kvm.ko does not
 * wait for a hook either: an observer that looks its functions up must have
 * unregistered when it is gone. A module notifier may do so at MODULE_STATE_GOING
 * of the vendor module or of kvm.ko, whose exit function has run by then.
 *
 * Context: may sleep
 */
void kvm_exit_hook_unregister(const struct kvm_exit_hook *hook);

/* The rest is KVM's own. */

/* The vendor module, which has the sites, says so while it is loaded. */
void kvm_exit_hook_set_sites(bool present);

DECLARE_STATIC_KEY_FALSE(kvm_exit_hook_exit_enabled);
DECLARE_STATIC_KEY_FALSE(kvm_exit_hook_entry_enabled);
DECLARE_STATIC_KEY_FALSE(kvm_exit_hook_destroy_enabled);
DECLARE_STATIC_CALL(kvm_exit_hook_exit, *((struct kvm_exit_hook *)0)->exit);
DECLARE_STATIC_CALL(kvm_exit_hook_entry, *((struct kvm_exit_hook *)0)->entry);
DECLARE_STATIC_CALL(kvm_exit_hook_destroy, *((struct kvm_exit_hook *)0)->destroy);

/* A macro, so that arguments are evaluated only while there is a callback. */
#define kvm_exit_hook_call(func, ...)					\
do {									\
	if (static_branch_unlikely(&kvm_exit_hook_##func##_enabled))	\
		static_call_cond(kvm_exit_hook_##func)(__VA_ARGS__);	\
} while (0)

#endif /* __KVM_X86_EXIT_HOOK_H */
