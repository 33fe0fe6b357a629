// SPDX-License-Identifier: Apache-2.0

// Package lockdown holds tests on a kernel that is locked down, as with Secure
// Boot. It can be locked down further while it runs and never less, so that the
// tests have a machine of their own.
package lockdown
