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

/* An exit is told of while the vCPU's VMCS is loaded. */
static __always_inline unsigned long vx_vmread(unsigned long field)
{
	unsigned long value = 0;

	asm volatile("vmread %1, %0" : "+r" (value) : "r" (field) : "cc");
	return value;
}

static __always_inline u32 vx_reason_vmx(void)
{
	return vx_vmread(VM_EXIT_REASON);
}

static __always_inline u64 vx_rip_vmx(void)
{
	return vx_vmread(GUEST_RIP);
}

#endif /* _VX_REASON_H */
