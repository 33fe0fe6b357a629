/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What differs between the kernels that virtexit supports. The only place
 * where the kernel's version may be asked for.
 */
#ifndef _VX_COMPAT_H
#define _VX_COMPAT_H

#include <linux/kvm.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/version.h>

/*
 * {svm,vmx}_get_exit_info() are static functions called through a pointer, so
 * that no compiler compares their prototype: it is the same from 6.1 to 6.12.
 */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0) || \
    LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
#error "virtexit supports Linux 6.1 to 6.12"
#endif

/* vm_flags can no longer be written since 6.3, commit bc292ab00f6c. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
static inline void vx_vm_flags_mod(struct vm_area_struct *vma,
				   unsigned long set, unsigned long clear)
{
	vma->vm_flags = (vma->vm_flags | set) & ~clear;
}
#else
#define vx_vm_flags_mod vm_flags_mod
#endif

/* Since 6.8. */
#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif

/* Nanoseconds that a thread has waited for a CPU. */
static inline u64 vx_run_delay(const struct task_struct *task)
{
#ifdef CONFIG_SCHED_INFO
	return task->sched_info.run_delay;
#else
	return 0;
#endif
}

#endif /* _VX_COMPAT_H */
