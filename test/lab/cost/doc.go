// SPDX-License-Identifier: Apache-2.0

// Package cost measures what virtexit.ko adds to an exit, in instructions. Its
// tests run inside the lab on a CPU that counts them: with QEMU's -icount
// shift=0 the time stamp counter moves by one for each instruction executed.
package cost
