// SPDX-License-Identifier: Apache-2.0

// Package kernel holds the tests of virtexit.ko that run inside the lab, on
// any of its kernels and CPUs, with guests of their own and nothing else.
package kernel
