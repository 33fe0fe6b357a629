/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * virtexit: which vCPU thread of this host takes which VM exits
 *
 * This header is the whole interface between virtexit.ko and user space. All
 * integers are in the host's byte order; all times are raw TSC cycles, which
 * virtexit_header.tsc_khz converts.
 *
 * READING: /dev/virtexit
 *
 * The device is opened and mapped read-only, MAP_SHARED. The mapping holds
 *
 *	offset 0			struct virtexit_header
 *	header.cpu_offset		header.nr_cpus x struct virtexit_cpu
 *	header.slot_offset		header.nr_slots x struct virtexit_slot
 *
 * The header has its final values from the moment the device can be opened,
 * but for slots_backed, seq, released and released_slots. A program
 * maps the header first, checks magic and abi, and then maps
 * slot_offset + nr_slots * slot_size bytes. Slots below slots_backed have
 * memory and may be read; touching one beyond raises SIGBUS. slots_backed
 * never shrinks while the device is open.
 *
 * A slot holds the counters of one vCPU thread, that is of one (thread,
 * vcpu_id) pair. Its state is
 *
 *	FREE	nothing of interest
 *	LIVE	counting; that thread alone writes it
 *	RETIRED	the thread has died, or the last lease has ended; the counters
 *		are final and stay until RELEASE returns the slot
 *
 * generation changes when a slot has become FREE, and before its counters are
 * cleared. A reader loads generation, then state (both acquire), copies, and
 * loads generation again: when it differs the copy is of no use and is made
 * anew. Counters are written by plain
 * 64-bit stores while they are read: each is exact and none goes backwards,
 * but one may be a step ahead of another. For a RETIRED slot all agree.
 *
 * The rows [0, nr_rows) are in use, one for each exit reason that the thread
 * has taken, in order of first appearance. A row's count is the number of
 * exits; its histogram holds those whose handling
 * has ended and was timed: not the one that is being handled, nor the one that
 * was when the level fell to COUNT, nor any taken at that level. Time is that between the exit and the
 * next entry into the guest. hist[0] counts durations below
 * 2^(HIST_SHIFT + 1) cycles, hist[i] those in [2^(HIST_SHIFT + i),
 * 2^(HIST_SHIFT + i + 1)), the last one all that are longer.
 * When a thread has used all rows but one, further new reasons share the last
 * row, which carries VIRTEXIT_ROW_OTHER.
 *
 * What could not be charged to a slot is counted in struct virtexit_cpu, and
 * nowhere else. So at any moment
 *
 *	sum of count over the rows of all slots that are not FREE
 *	+ header.released + sum of unattributed and refused over all CPUs
 *
 * is the number of exits that the module has seen since it was loaded. A
 * reader sees it so when header.seq is even, and the same afterwards.
 *
 * CONTROL: generic netlink family "virtexit", version 1
 *
 * GET (anyone) answers with VERSION, ABI, LEVEL, HOOK, ISA, REFUSED (a
 * sentence; present only when KVM is there but is not counted as wished), KVM
 * (flag: the kvm module is loaded), SLOTS_MAX, SLOTS_LIVE, SLOTS_RETIRED,
 * SLOTS_BACKED, LEASES.
 *
 * LEASE (CAP_NET_ADMIN) with LEVEL makes the sending socket wish for that level;
 * level OFF gives the lease up, as does closing the socket. The kernel collects
 * at the highest level wished for, and not at all when there is no lease: its
 * probes are then detached and all slots retire. A level can be wished for
 * while KVM is not loaded: collection begins when it comes.
 *
 * RELEASE (CAP_NET_ADMIN) with one or more SLOT_REF: each holds SLOT and
 * GENERATION of a retired slot whose counts have been read. The slot becomes
 * FREE and its sum of counts moves to header.released. A reference to a slot
 * that is not retired or has another generation ends the request with ESTALE;
 * references before it have been carried out.
 *
 * EVENTS: multicast group "events" (CAP_NET_ADMIN)
 *
 * VCPU_EVENT	SLOT, GENERATION, STATE, TID, TGID, VCPU_ID: a slot came into use
 *		or retired. A thread that was quicker than the event is announced
 *		once, as retired.
 * KVM_EVENT	the attributes of GET: KVM came or went, was refused, or the level
 *		in force changed.
 *
 * Errors carry a text in NLMSGERR_ATTR_MSG. Events can be lost (ENOBUFS); the
 * slots then still say all.
 */
#ifndef _UAPI_VIRTEXIT_H
#define _UAPI_VIRTEXIT_H

#include <linux/types.h>

#define VIRTEXIT_DEVICE		"virtexit"
#define VIRTEXIT_GENL_NAME	"virtexit"
#define VIRTEXIT_GENL_GROUP	"events"

enum {
	VIRTEXIT_MAGIC = 0x54495856,	/* "VXIT" */
	VIRTEXIT_ABI = 1,
	VIRTEXIT_GENL_VERSION = 1,
	VIRTEXIT_NR_ROWS = 60,
	VIRTEXIT_NR_HIST = 26,
	VIRTEXIT_HIST_SHIFT = 8,
	VIRTEXIT_NR_INDEX = 256,
	VIRTEXIT_COMM_LEN = 16,
};

enum virtexit_level {
	VIRTEXIT_LEVEL_OFF,	/* no probe is attached */
	VIRTEXIT_LEVEL_COUNT,	/* exits by reason */
	VIRTEXIT_LEVEL_TIME,	/* and their time, maximum and distribution, and guest time */
};

enum virtexit_hook {
	VIRTEXIT_HOOK_NONE,		/* nothing attached */
	VIRTEXIT_HOOK_TRACEPOINT,	/* the stock events kvm_exit and kvm_entry */
	VIRTEXIT_HOOK_PATCH,		/* the hook of a patched KVM */
};

/* As KVM numbers them in its kvm_exit event. */
enum virtexit_isa {
	VIRTEXIT_ISA_NONE,
	VIRTEXIT_ISA_VMX,
	VIRTEXIT_ISA_SVM,
};

enum virtexit_state {
	VIRTEXIT_FREE,
	VIRTEXIT_LIVE,
	VIRTEXIT_RETIRED,
};

enum virtexit_row_flags {
	VIRTEXIT_ROW_OTHER = 1,	/* exits of more than one reason; code says nothing */
};

/**
 * struct virtexit_row - the exits that one thread took for one reason
 * @code: the hardware's exit code; VMX: the full 32-bit exit reason
 * @flags: enum virtexit_row_flags
 * @count: exits
 * @time: cycles from exit to entry, summed over the exits in @hist
 * @max: the longest of them
 * @reserved: zero
 * @hist: exits by log2 of their cycles
 */
struct virtexit_row {
	__u32 code;
	__u32 flags;
	__u64 count;
	__u64 time;
	__u64 max;
	__u64 reserved[2];
	__u64 hist[VIRTEXIT_NR_HIST];
};

/**
 * struct virtexit_slot - the counters of one vCPU thread
 * @generation: how often this slot has been released
 * @state: enum virtexit_state
 * @tid: thread, in the initial pid namespace
 * @tgid: its process
 * @start_time: when the thread started: nanoseconds of CLOCK_BOOTTIME
 * @tgid_start_time: when its process's first thread started
 * @vcpu_id: KVM's number for the vCPU within its guest
 * @isa: enum virtexit_isa
 * @nr_rows: rows in use
 * @comm: name of the process (its first thread), NUL-terminated
 * @guest_time: cycles spent in the guest, from entry to exit; level TIME only
 * @since: when the slot was taken into use: nanoseconds of CLOCK_BOOTTIME
 * @reserved: zero
 * @index: the module's own: low byte of a code to a row's offset in @rows
 * @rows: by order of first appearance
 */
struct virtexit_slot {
	__u32 generation;
	__u32 state;
	__u32 tid;
	__u32 tgid;
	__u64 start_time;
	__u64 tgid_start_time;
	__u32 vcpu_id;
	__u32 isa;
	__u32 nr_rows;
	__u32 pad;
	char comm[VIRTEXIT_COMM_LEN];
	__u64 guest_time;
	__u64 since;
	__u64 reserved[54];
	__u16 index[VIRTEXIT_NR_INDEX];
	struct virtexit_row rows[VIRTEXIT_NR_ROWS];
};

/**
 * struct virtexit_cpu - what could not be charged to a slot, by CPU
 * @unattributed: exits for which no slot was free
 * @refused: exits whose reason could not be had or did not agree with KVM's own
 * @reserved: zero
 */
struct virtexit_cpu {
	__u64 unattributed;
	__u64 refused;
	__u64 reserved[6];
};

/**
 * struct virtexit_header - offset 0 of the mapping
 * @magic: VIRTEXIT_MAGIC
 * @abi: VIRTEXIT_ABI; another number means another layout
 * @cpu_offset: of the first struct virtexit_cpu
 * @nr_cpus: number of struct virtexit_cpu
 * @slot_offset: of the first slot
 * @slot_size: sizeof(struct virtexit_slot)
 * @nr_slots: slots there can be
 * @tsc_khz: cycles per millisecond
 * @slots_backed: slots that have memory; grows
 * @seq: odd while a slot is being released
 * @released: exits counted in slots that have since been released
 * @released_slots: how many those were
 */
struct virtexit_header {
	__u32 magic;
	__u32 abi;
	__u32 cpu_offset;
	__u32 nr_cpus;
	__u32 slot_offset;
	__u32 slot_size;
	__u32 nr_slots;
	__u32 tsc_khz;
	__u32 slots_backed;
	__u32 seq;
	__u64 released;
	__u64 released_slots;
};

enum virtexit_cmd {
	VIRTEXIT_CMD_UNSPEC,
	VIRTEXIT_CMD_GET,
	VIRTEXIT_CMD_LEASE,
	VIRTEXIT_CMD_RELEASE,
	VIRTEXIT_CMD_VCPU_EVENT,
	VIRTEXIT_CMD_KVM_EVENT,
	__VIRTEXIT_CMD_MAX,
	VIRTEXIT_CMD_MAX = __VIRTEXIT_CMD_MAX - 1,
};

enum virtexit_attr {
	VIRTEXIT_A_UNSPEC,
	VIRTEXIT_A_VERSION,		/* string: the module's version */
	VIRTEXIT_A_ABI,			/* u32 */
	VIRTEXIT_A_LEVEL,		/* u32, enum virtexit_level: in force, or wished for */
	VIRTEXIT_A_HOOK,		/* u32, enum virtexit_hook */
	VIRTEXIT_A_ISA,			/* u32, enum virtexit_isa */
	VIRTEXIT_A_REFUSED,		/* string */
	VIRTEXIT_A_KVM,			/* flag */
	VIRTEXIT_A_SLOTS_MAX,		/* u32 */
	VIRTEXIT_A_SLOTS_LIVE,		/* u32 */
	VIRTEXIT_A_SLOTS_RETIRED,	/* u32 */
	VIRTEXIT_A_SLOTS_BACKED,	/* u32 */
	VIRTEXIT_A_LEASES,		/* u32 */
	VIRTEXIT_A_SLOT_REF,		/* nest: SLOT, GENERATION */
	VIRTEXIT_A_SLOT,		/* u32: index of a slot */
	VIRTEXIT_A_GENERATION,		/* u32 */
	VIRTEXIT_A_STATE,		/* u32, enum virtexit_state */
	VIRTEXIT_A_TID,			/* u32 */
	VIRTEXIT_A_TGID,		/* u32 */
	VIRTEXIT_A_VCPU_ID,		/* u32 */
	__VIRTEXIT_A_MAX,
	VIRTEXIT_A_MAX = __VIRTEXIT_A_MAX - 1,
};

#endif /* _UAPI_VIRTEXIT_H */
