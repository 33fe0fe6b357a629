// SPDX-License-Identifier: Apache-2.0

// Package rules holds the tests of what the whole repository keeps to and no
// compiler sees: who may import whom, licences, where the kernel's version may
// be asked for, one version everywhere.
package rules
