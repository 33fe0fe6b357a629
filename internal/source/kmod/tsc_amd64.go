// SPDX-License-Identifier: Apache-2.0

package kmod

// readTSC reads this CPU's time stamp counter, in which the module measures.
func readTSC() uint64
