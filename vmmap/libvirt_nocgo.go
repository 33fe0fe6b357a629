// SPDX-License-Identifier: Apache-2.0

//go:build !cgo

package vmmap

import "errors"

func dial(string) (conn, error) { return nil, errors.New("built without libvirt") }
