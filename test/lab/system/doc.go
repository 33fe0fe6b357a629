// SPDX-License-Identifier: Apache-2.0

// Package system holds the tests that run in the lab with all that a host has:
// libvirt and its domains, virtexit.ko, virtexitd and the command line. They
// want bin/virtexitd and bin/virtexit built.
package system
