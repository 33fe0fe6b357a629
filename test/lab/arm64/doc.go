// SPDX-License-Identifier: Apache-2.0

// Package arm64 holds the tests of the eBPF collector that run in the lab's arm64 machine.
package arm64
