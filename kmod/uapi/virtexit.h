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
 *	header.recent_offset		header.nr_slots x struct virtexit_recent
 *
 * The header has its final values from the moment the device can be opened,
 * but for those from exit_cost to counted_since. A program
 * maps the header first, checks magic and abi, and then maps
 * recent_offset + nr_slots * recent_size bytes. Slots below slots_backed have
 * memory and may be read; touching one beyond raises SIGBUS. slots_backed
 * never shrinks while the device is open. The recent exits of a slot whose
 * has_recent is set have memory too, as long as the device is open.
 *
 * A slot holds the counters of one vCPU thread, that is of one (thread,
 * vcpu_id) pair; a thread has 64 at most. Its state is
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
 * was when the level fell to COUNT, nor any taken at that level. An exit's
 * duration is the time that it was being handled, by KVM or by user space; see
 * below for what is left out. hist[0] counts durations below
 * 2^(HIST_SHIFT + 1) cycles, hist[i] those in [2^(HIST_SHIFT + i),
 * 2^(HIST_SHIFT + i + 1)), the last one all that are longer.
 * When a thread has used all rows but one, further new reasons share the last
 * row, which carries VIRTEXIT_ROW_OTHER.
 *
 * At level TIME, each cycle since the first exit is in one of these sums:
 *
 *	guest_time	in the guest
 *	poll_time	polling in KVM for the end of a halt
 *	halted_time	halted: blocked in KVM, or in user space after KVM_EXIT_HLT
 *	wait_time	runnable, waiting for a CPU; also at the end of a halt
 *			(0 on a kernel without CONFIG_SCHED_INFO)
 *	outside_time	out of KVM_RUN with no exit to handle, as after a signal
 *	rows' user_time	out of KVM_RUN to handle an exit: from KVM_RUN's return
 *			to the entry, so with its way back into the guest
 *	rows' time - user_time
 *			the rest between exit and entry: handling by KVM
 *
 * but those of the present stretch, which is added to one of them when it
 * ends. It began at tsc, and is in the guest when open is 0; else
 * the row at that offset of the slot is that of the exit in progress, and doing
 * says what the thread is at. There is none while tsc lies in the future. What a
 * thread does inside KVM_RUN is not seen before it ends: a thread that has halted
 * is VIRTEXIT_IN_KVM, with the row of its HLT; or, when it was out of KVM_RUN
 * since that exit, it still is what it was there. A vCPU that waits to
 * be started (INIT, SIPI) tells nobody, and is counted as either. Of two vCPUs
 * that one thread runs in turn, each has the time of the other as user_time.
 *
 * At level RECENT, and from when has_recent is set, recent_head counts the exits
 * that have been written to the slot's recent exits, exit i to exits[i % NR_RECENT]. The latest has cycles =
 * VIRTEXIT_PRESENT until the next entry, or until the thread dies or its level
 * falls. A reader loads recent_head (acquire),
 * copies, and loads it again: those from the second value - NR_RECENT + 1 on
 * are whole.
 *
 * What could not be charged to a slot is counted in struct virtexit_cpu, and
 * nowhere else. So at any moment
 *
 *	sum of count over the rows of all slots that are not FREE
 *	+ header.released + sum of unattributed and refused over all CPUs
 *
 * is the number of exits that the module has counted since it was loaded. A
 * reader sees it so when header.seq is even, and the same afterwards.
 *
 * header.counted is the time in which exits were counted, in nanoseconds; while
 * they are, header.counted_since is not 0, and the time since then,
 * by CLOCK_BOOTTIME, is to be added. seq covers both.
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
 * probes are then detached and all slots retire. At PAUSE they do not retire,
 * and nothing is attached to KVM. A level can be wished for
 * while KVM is not loaded: collection begins when it comes.
 *
 * LEVEL (CAP_NET_ADMIN) with TGID, START_TIME (tgid_start_time of its slots)
 * and LEVEL is the wish of the sending socket, which must hold a lease, for
 * the threads of one process, instead of the lease's own level; without LEVEL
 * it takes that back. Each thread is counted at the highest level that any
 * lease wishes for it. A change takes effect at the thread's next exit, which
 * is not lost. New threads begin at the highest of the leases' own levels.
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
	VIRTEXIT_NR_RECENT = 512,
};

enum virtexit_level {
	VIRTEXIT_LEVEL_OFF,	/* no probe is attached */
	VIRTEXIT_LEVEL_PAUSE,	/* slots are kept, nothing is counted */
	VIRTEXIT_LEVEL_COUNT,	/* exits by reason */
	VIRTEXIT_LEVEL_TIME,	/* and their time, and where the thread's time goes */
	VIRTEXIT_LEVEL_RECENT,	/* and each of the latest exits */
};

/* What a thread is at between an exit and the next entry. */
enum virtexit_doing {
	VIRTEXIT_IN_KVM,	/* inside KVM_RUN */
	VIRTEXIT_IN_USER,	/* out of it, to handle the exit */
	VIRTEXIT_HALTED,	/* out of it after KVM_EXIT_HLT */
	VIRTEXIT_OUTSIDE,	/* out of it for another reason */
};

enum virtexit_hook {
	VIRTEXIT_HOOK_NONE,		/* nothing attached */
	VIRTEXIT_HOOK_TRACEPOINT,	/* the stock events kvm_exit and kvm_entry */
	VIRTEXIT_HOOK_PATCH,		/* the hook of a patched KVM */
};

/*
 * As KVM numbers them in its kvm_exit event on x86; that of arm64 has no number,
 * so it is one that x86 will not come to.
 */
enum virtexit_isa {
	VIRTEXIT_ISA_NONE,
	VIRTEXIT_ISA_VMX,
	VIRTEXIT_ISA_SVM,
	VIRTEXIT_ISA_ARM64 = 0x100,
};

/*
 * arm64's codes: the exception class (6 bits) of an exit that trapped; of another,
 * KVM's own ARM_EXCEPTION_ number in addition to TYPE. With either, SERROR where
 * an SError was pending.
 */
enum {
	VIRTEXIT_ARM64_TYPE = 0x40,
	VIRTEXIT_ARM64_SERROR = 1U << 31,
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
 * @code: the hardware's exit code; VMX: the full 32-bit exit reason;
 *	arm64: see above
 * @flags: enum virtexit_row_flags
 * @count: exits
 * @time: cycles of handling
 * @max: those of the longest exit in @hist
 * @user_time: those of @time in user space
 * @reserved: zero
 * @hist: exits by log2 of their cycles
 */
struct virtexit_row {
	__u32 code;
	__u32 flags;
	__u64 count;
	__u64 time;
	__u64 max;
	__u64 user_time;
	__u64 reserved;
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
 * @level: enum virtexit_level: wished for, or what was before all was paused
 * @comm: name of the process (its first thread), NUL-terminated
 * @since: when the slot was taken into use: nanoseconds of CLOCK_BOOTTIME
 * @recent_head: exits written to the recent exits
 * @has_recent: the recent exits have memory
 * @reserved: zero
 * @tsc: when the present stretch of time began
 * @open: offset in the slot of the row of the exit in progress; 0 in the guest
 * @doing: enum virtexit_doing; of significance when @open is not 0
 * @guest_time: cycles; and so the following
 * @poll_time: see above
 * @halted_time: see above
 * @wait_time: see above
 * @outside_time: see above
 * @reserved2: zero
 * @index: the module's own: low byte of a code to a row's offset in the slot
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
	__u32 level;
	char comm[VIRTEXIT_COMM_LEN];
	__u64 since;
	__u64 recent_head;
	__u32 has_recent;
	__u32 pad;
	__u64 reserved[5];
	__u64 tsc;
	__u32 open;
	__u32 doing;
	__u64 guest_time;
	__u64 poll_time;
	__u64 halted_time;
	__u64 wait_time;
	__u64 outside_time;
	__u64 reserved2[41];
	__u16 index[VIRTEXIT_NR_INDEX];
	struct virtexit_row rows[VIRTEXIT_NR_ROWS];
};

/* Of virtexit_exit.cycles: the exit is still in progress. */
#define VIRTEXIT_PRESENT (~0ULL)

/**
 * struct virtexit_exit - one exit
 * @tsc: when it occurred
 * @cycles: from the exit to the next entry, halts and all
 * @rip: the guest's instruction pointer; 0 where it is hidden from the host
 * @code: the hardware's exit code
 * @pad: zero
 */
struct virtexit_exit {
	__u64 tsc;
	__u64 cycles;
	__u64 rip;
	__u32 code;
	__u32 pad;
};

/**
 * struct virtexit_recent - the latest exits of one slot
 * @exits: a ring
 */
struct virtexit_recent {
	struct virtexit_exit exits[VIRTEXIT_NR_RECENT];
};

/**
 * struct virtexit_cpu - what could not be charged to a slot, by CPU
 * @unattributed: exits for which no slot was free, or not for that thread
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
 * @recent_offset: of the first slot's recent exits
 * @recent_size: sizeof(struct virtexit_recent)
 * @exit_cost: cycles that the hook takes at an exit, the least of some that were
 *	measured since it was attached; 0 when none was
 * @entry_cost: the same at an entry
 * @slots_backed: slots that have memory; grows
 * @seq: odd while a slot is being released
 * @released: exits counted in slots that have since been released
 * @released_slots: how many those were
 * @counted: nanoseconds in which exits were counted, up to @counted_since
 * @counted_since: since when they are: CLOCK_BOOTTIME; 0 while they are not
 * @loaded: when the module was loaded: nanoseconds of CLOCK_BOOTTIME. Until the
 *	host boots again it tells one loading, with all its counts, from another.
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
	__u32 recent_offset;
	__u32 recent_size;
	__u32 exit_cost;
	__u32 entry_cost;
	__u32 slots_backed;
	__u32 seq;
	__u64 released;
	__u64 released_slots;
	__u64 counted;
	__u64 counted_since;
	__u64 loaded;
};

enum virtexit_cmd {
	VIRTEXIT_CMD_UNSPEC,
	VIRTEXIT_CMD_GET,
	VIRTEXIT_CMD_LEASE,
	VIRTEXIT_CMD_RELEASE,
	VIRTEXIT_CMD_VCPU_EVENT,
	VIRTEXIT_CMD_KVM_EVENT,
	VIRTEXIT_CMD_LEVEL,
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
	VIRTEXIT_A_START_TIME,		/* u64: of a process's first thread */
	__VIRTEXIT_A_MAX,
	VIRTEXIT_A_MAX = __VIRTEXIT_A_MAX - 1,
};

#endif /* _UAPI_VIRTEXIT_H */
