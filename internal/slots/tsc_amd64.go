// SPDX-License-Identifier: Apache-2.0

package slots

// ReadTSC reads this CPU's time stamp counter.
func ReadTSC() uint64
