// SPDX-License-Identifier: Apache-2.0

#include "textflag.h"

// func ReadTSC() uint64
//
// Fenced on both sides: RDTSC alone may run ahead of loads before it, and loads
// behind it ahead of it.
TEXT ·ReadTSC(SB), NOSPLIT, $0-8
	LFENCE
	RDTSC
	LFENCE
	SHLQ $32, DX
	ORQ  DX, AX
	MOVQ AX, ret+0(FP)
	RET
