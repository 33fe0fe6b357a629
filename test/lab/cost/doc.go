// SPDX-License-Identifier: Apache-2.0

// Package cost measures what watching a VM exit costs, in instructions, for virtexit.ko and for others. It runs inside the
// lab on a CPU that counts them: with QEMU's -icount shift=0 the time stamp counter moves by one for each instruction
// executed. Instructions are not time: one that misses the cache counts like any other.
package cost
