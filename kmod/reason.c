// SPDX-License-Identifier: GPL-2.0-only
/*
 * The exit reason of a vCPU. KVM exports no way to ask for it. The probes read
 * it where the hardware left it; here KVM's own function is found, to hold the
 * first exit of every vCPU thread against it.
 */
#include <linux/kprobes.h>
#include <linux/kvm_host.h>
#include <linux/uaccess.h>
#include <asm/hypervisor.h>
#include <asm/mshyperv.h>

#include "compat.h"
#include "reason.h"
#include "vx.h"

typedef void (*vx_get_exit_info_t)(struct kvm_vcpu *vcpu, u32 *reason,
				   u64 *info1, u64 *info2, u32 *intr_info,
				   u32 *error_code);

/* Changed with vx_mutex held and no probe attached. */
static vx_get_exit_info_t vx_get_exit_info;

/**
 * vx_function - where a function of KVM is, or NULL
 * @name: of the function
 *
 * A kprobe that is never armed tells it, and does not keep KVM's modules from
 * going. On a kernel with IBT it points behind the ENDBR64 that an indirect call
 * has to land on.
 */
void *vx_function(const char *name)
{
	struct kprobe kp = {
		.symbol_name = name,
		.flags = KPROBE_FLAG_DISABLED,
	};
	u32 insn;
	void *addr;

	if (register_kprobe(&kp))
		return NULL;
	addr = kp.addr;
	unregister_kprobe(&kp);
	if (!get_kernel_nofault(insn, (u32 *)(addr - 4)) && insn == 0xfa1e0ff3)
		return addr - 4;
	return IS_ENABLED(CONFIG_X86_KERNEL_IBT) ? NULL : addr;
}

/**
 * vx_reason_vendor - name of the only vendor module that this CPU can use
 */
const char *vx_reason_vendor(void)
{
	return boot_cpu_has(X86_FEATURE_SVM) ? "kvm_amd" : "kvm_intel";
}

/**
 * vx_reason_resolve - find the vendor module that is loaded
 *
 * vx_mutex held, no probe attached.
 *
 * Return: its isa, or VIRTEXIT_ISA_NONE.
 */
u32 vx_reason_resolve(void)
{
	bool svm = boot_cpu_has(X86_FEATURE_SVM);

	vx_get_exit_info = vx_function(svm ? "svm_get_exit_info" :
					     "vmx_get_exit_info");
	if (!vx_get_exit_info)
		return VIRTEXIT_ISA_NONE;
	return svm ? VIRTEXIT_ISA_SVM : VIRTEXIT_ISA_VMX;
}

/**
 * vx_reason_forget - the vendor module goes; no probe is attached
 */
void vx_reason_forget(void)
{
	vx_get_exit_info = NULL;
}

/**
 * vx_reason_unusable - why reasons of an isa cannot be read here, or NULL
 * @isa: enum virtexit_isa
 */
const char *vx_reason_unusable(u32 isa)
{
	if (isa == VIRTEXIT_ISA_VMX && !boot_cpu_has(X86_FEATURE_VMX))
		return "kvm_intel is loaded but the CPU has no VMX";
	/* With an enlightened VMCS there is nothing for VMREAD to read. */
	if (isa == VIRTEXIT_ISA_VMX && hypervisor_is_type(X86_HYPER_MS_HYPERV))
		return "VMX under Hyper-V is not supported";
	return NULL;
}

/**
 * vx_reason_check - hold the reason of the present exit against KVM's own
 * @vcpu: that has exited
 * @isa: that KVM named
 *
 * Reads with care: if struct kvm_vcpu is not what this module was built for,
 * this is where SVM shows it.
 *
 * Return: -EPROTO when the two differ or KVM cannot be asked.
 */
int vx_reason_check(struct kvm_vcpu *vcpu, u32 isa)
{
	u32 code, theirs, intr_info, error_code;
	struct vmcb *vmcb;
	u64 info1, info2;

	switch (isa) {
	case VIRTEXIT_ISA_SVM:
		if (get_kernel_nofault(vmcb, vx_vmcb(vcpu)) ||
		    get_kernel_nofault(code, (u32 *)&vmcb->control.exit_code))
			return -EPROTO;
		break;
	case VIRTEXIT_ISA_VMX:
		code = vx_reason_vmx();
		break;
	default:
		return -EPROTO;
	}
	vx_get_exit_info(vcpu, &theirs, &info1, &info2, &intr_info, &error_code);
	return theirs == code ? 0 : -EPROTO;
}
