// SPDX-License-Identifier: Apache-2.0

// Package abi mirrors kmod/uapi/virtexit.h, the interface between virtexit.ko
// and user space. That header explains what is here.
package abi

//go:generate go run gen.go -o zabi.go
