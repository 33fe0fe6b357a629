// SPDX-License-Identifier: Apache-2.0

package kmod

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"virtexit/internal/abi"
	"virtexit/internal/source"
)

func TestMapDevice(t *testing.T) {
	file := filepath.Join(t.TempDir(), "virtexit")
	if _, _, err := mapDevice(file); !errors.Is(err, source.ErrUnavailable) || !strings.Contains(err.Error(), file) {
		t.Errorf("no device: error is %v, want %v that names it", err, source.ErrUnavailable)
	}

	var page [4096]byte
	header := (*abi.Header)(unsafe.Pointer(&page))
	*header = abi.Header{
		Magic: abi.Magic, ABI: 2, TSCKHz: 1000, Released: 7,
		CPUOffset: 512, SlotOffset: 1024, SlotSize: uint32(unsafe.Sizeof(abi.Slot{})),
		RecentOffset: 4096, RecentSize: uint32(unsafe.Sizeof(abi.Recent{})),
	}
	write := func() {
		if err := os.WriteFile(file, page[:], 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write()
	if _, _, err := mapDevice(file); err == nil || errors.Is(err, source.ErrUnavailable) {
		t.Errorf("another abi: error is %v, want one that is not %v", err, source.ErrUnavailable)
	}

	header.ABI = abi.ABI
	write()
	mapping, m, err := mapDevice(file)
	if err != nil {
		t.Fatal(err)
	}
	s := &Source{mapping: mapping, memory: m, events: make(chan source.Event), done: make(chan struct{})}
	got, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if got.Exits() != 7 {
		t.Errorf("%d exits, want 7", got.Exits())
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if _, err := s.Snapshot(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("snapshot after close: error is %v, want %v", err, os.ErrClosed)
	}
}
