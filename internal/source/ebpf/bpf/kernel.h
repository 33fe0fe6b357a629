/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What is read of the kernel's own structures, and where kernels differ. Each
 * names its members alone: where these are is looked up in the BTF of the kernel
 * and of KVM's modules when the programs are loaded.
 */
#ifndef _VX_KERNEL_H
#define _VX_KERNEL_H

#include <linux/types.h>

typedef __u8 bool;

#pragma clang attribute push(__attribute__((preserve_access_index)), \
			     apply_to = record)

/* Without CONFIG_SCHED_INFO it is empty. */
struct sched_info {
	unsigned long long run_delay;
};

struct hlist_node {
	struct hlist_node *next;
};

struct hlist_head {
	struct hlist_node *first;
};

struct task_struct {
	int pid;
	int tgid;
	__u64 start_boottime;
	struct task_struct *group_leader;
	char comm[16];
	unsigned long nvcsw;
	unsigned long nivcsw;
	struct sched_info sched_info;
	struct hlist_head preempt_notifiers;
};

struct preempt_notifier {
	struct hlist_node link;
};

struct timespec64 {
	long long tv_sec;
};

struct kvm_vcpu_stat_generic {
	__u64 halt_poll_success_ns;
	__u64 halt_poll_fail_ns;
	__u64 halt_wait_ns;
};

struct kvm_vcpu_stat {
	struct kvm_vcpu_stat_generic generic;
};

struct kvm_vcpu_arch {
	unsigned long regs[17];
	__u64 last_guest_tsc;
	__u64 l1_tsc_offset;
	__u64 l1_tsc_scaling_ratio;
	bool guest_state_protected;
};

struct kvm_vcpu {
	struct preempt_notifier preempt_notifier;
	int vcpu_id;
	struct kvm_vcpu_arch arch;
	struct kvm_vcpu_stat stat;
};

struct user_pt_regs {
	__u64 pc;
};

struct kvm_cpu_context {
	struct user_pt_regs regs;
};

struct kvm_vcpu_arch___arm64 {
	struct kvm_cpu_context ctxt;
};

struct kvm_vcpu___arm64 {
	struct kvm_vcpu_arch___arm64 arch;
};

/* The record of the event kvm_exit on x86. */
struct trace_event_raw_kvm_exit {
	unsigned int exit_reason;
	__u32 isa;
};

struct vmcb_control_area {
	__u32 exit_code;
};

struct vmcb {
	struct vmcb_control_area control;
};

/* It and vcpu_vmx begin with the struct kvm_vcpu. */
struct vcpu_svm {
	struct vmcb *vmcb;
};

union vmx_exit_reason {
	__u32 full;
};

struct vcpu_vmx {
	union vmx_exit_reason exit_reason;
};

/* Since 6.16 it is shared with TDX. */
struct vcpu_vt {
	union vmx_exit_reason exit_reason;
};

struct vcpu_vmx___vt {
	struct vcpu_vt vt;
};

#pragma clang attribute pop

/* enum kvm_reg */
#define VCPU_REGS_RIP 16

/* arch/x86/kvm/svm: the ratio of a TSC that is not scaled */
#define SVM_TSC_RATIO_DEFAULT 0x0100000000ULL

/* uapi/asm/svm.h, uapi/asm/vmx.h */
#define SVM_EXIT_HLT 0x78
#define EXIT_REASON_HLT 12

/* arch/arm64: asm/kvm_asm.h, asm/esr.h */
#define ARM_EXCEPTION_TRAP 2
#define ESR_ELx_EC_WFx 0x01

/* uapi/linux/kvm.h; MEMORY_FAULT since 6.8 */
#define KVM_EXIT_HLT 5
#define KVM_EXIT_INTR 10
#define KVM_EXIT_MEMORY_FAULT 39

#endif /* _VX_KERNEL_H */
