// SPDX-License-Identifier: Apache-2.0

// Package slots reads counters in memory that the kernel writes. Its layout is
// described in kmod/uapi/virtexit.h; ebpf lays its own out alike.
package slots
