/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _VX_REASON_H
#define _VX_REASON_H

#include <linux/kvm_host.h>
#include <asm/svm.h>
#include <asm/vmx.h>

/* struct vcpu_svm begins with the vcpu, and then its VMCB. */
static __always_inline struct vmcb **vx_vmcb(struct kvm_vcpu *vcpu)
{
	return (struct vmcb **)(vcpu + 1);
}

static __always_inline u32 vx_reason_svm(struct kvm_vcpu *vcpu)
{
	return (*vx_vmcb(vcpu))->control.exit_code;
}

/* kvm_exit fires while the vCPU's VMCS is loaded. */
static __always_inline u32 vx_reason_vmx(void)
{
	unsigned long value = 0;

	asm volatile("vmread %1, %0"
		     : "+r" (value)
		     : "r" ((unsigned long)VM_EXIT_REASON)
		     : "cc");
	return value;
}

#endif /* _VX_REASON_H */
