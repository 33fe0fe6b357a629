// SPDX-License-Identifier: Apache-2.0

//go:build ignore

// This file is the input of gen.go: what each thing of the header is called in
// Go. A test holds it complete.
package abi

// #include "../../kmod/uapi/virtexit.h"
import "C"

const (
	Device    = C.VIRTEXIT_DEVICE
	GenlName  = C.VIRTEXIT_GENL_NAME
	GenlGroup = C.VIRTEXIT_GENL_GROUP

	Magic       = C.VIRTEXIT_MAGIC
	ABI         = C.VIRTEXIT_ABI
	GenlVersion = C.VIRTEXIT_GENL_VERSION
	NumRows     = C.VIRTEXIT_NR_ROWS
	NumHist     = C.VIRTEXIT_NR_HIST
	HistShift   = C.VIRTEXIT_HIST_SHIFT
	NumIndex    = C.VIRTEXIT_NR_INDEX
	CommLen     = C.VIRTEXIT_COMM_LEN
	NumRecent   = C.VIRTEXIT_NR_RECENT
	Present     = C.VIRTEXIT_PRESENT

	LevelOff    = C.VIRTEXIT_LEVEL_OFF
	LevelPause  = C.VIRTEXIT_LEVEL_PAUSE
	LevelCount  = C.VIRTEXIT_LEVEL_COUNT
	LevelTime   = C.VIRTEXIT_LEVEL_TIME
	LevelRecent = C.VIRTEXIT_LEVEL_RECENT

	InKVM   = C.VIRTEXIT_IN_KVM
	InUser  = C.VIRTEXIT_IN_USER
	Halted  = C.VIRTEXIT_HALTED
	Outside = C.VIRTEXIT_OUTSIDE

	HookNone       = C.VIRTEXIT_HOOK_NONE
	HookTracepoint = C.VIRTEXIT_HOOK_TRACEPOINT
	HookPatch      = C.VIRTEXIT_HOOK_PATCH

	ISANone  = C.VIRTEXIT_ISA_NONE
	ISAVMX   = C.VIRTEXIT_ISA_VMX
	ISASVM   = C.VIRTEXIT_ISA_SVM
	ISAARM64 = C.VIRTEXIT_ISA_ARM64

	ARM64Type   = C.VIRTEXIT_ARM64_TYPE
	ARM64SError = C.VIRTEXIT_ARM64_SERROR

	Free    = C.VIRTEXIT_FREE
	Live    = C.VIRTEXIT_LIVE
	Retired = C.VIRTEXIT_RETIRED

	RowOther = C.VIRTEXIT_ROW_OTHER

	CmdUnspec    = C.VIRTEXIT_CMD_UNSPEC
	CmdGet       = C.VIRTEXIT_CMD_GET
	CmdLease     = C.VIRTEXIT_CMD_LEASE
	CmdRelease   = C.VIRTEXIT_CMD_RELEASE
	CmdVCPUEvent = C.VIRTEXIT_CMD_VCPU_EVENT
	CmdKVMEvent  = C.VIRTEXIT_CMD_KVM_EVENT
	CmdLevel     = C.VIRTEXIT_CMD_LEVEL
	CmdMax       = C.VIRTEXIT_CMD_MAX

	AttrUnspec       = C.VIRTEXIT_A_UNSPEC
	AttrVersion      = C.VIRTEXIT_A_VERSION
	AttrABI          = C.VIRTEXIT_A_ABI
	AttrLevel        = C.VIRTEXIT_A_LEVEL
	AttrHook         = C.VIRTEXIT_A_HOOK
	AttrISA          = C.VIRTEXIT_A_ISA
	AttrRefused      = C.VIRTEXIT_A_REFUSED
	AttrKVM          = C.VIRTEXIT_A_KVM
	AttrSlotsMax     = C.VIRTEXIT_A_SLOTS_MAX
	AttrSlotsLive    = C.VIRTEXIT_A_SLOTS_LIVE
	AttrSlotsRetired = C.VIRTEXIT_A_SLOTS_RETIRED
	AttrSlotsBacked  = C.VIRTEXIT_A_SLOTS_BACKED
	AttrLeases       = C.VIRTEXIT_A_LEASES
	AttrSlotRef      = C.VIRTEXIT_A_SLOT_REF
	AttrSlot         = C.VIRTEXIT_A_SLOT
	AttrGeneration   = C.VIRTEXIT_A_GENERATION
	AttrState        = C.VIRTEXIT_A_STATE
	AttrTID          = C.VIRTEXIT_A_TID
	AttrTGID         = C.VIRTEXIT_A_TGID
	AttrVCPUID       = C.VIRTEXIT_A_VCPU_ID
	AttrStartTime    = C.VIRTEXIT_A_START_TIME
	AttrMax          = C.VIRTEXIT_A_MAX
)

type (
	Header C.struct_virtexit_header
	CPU    C.struct_virtexit_cpu
	Slot   C.struct_virtexit_slot
	Row    C.struct_virtexit_row
	Recent C.struct_virtexit_recent
	Exit   C.struct_virtexit_exit
)
