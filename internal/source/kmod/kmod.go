// SPDX-License-Identifier: Apache-2.0

// Package kmod gets exit counts from the kernel module: it controls the module
// by generic netlink and reads its counters in memory shared with it. The
// protocol is described in kmod/uapi/virtexit.h.
package kmod

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"virtexit/internal/abi"
	"virtexit/internal/slots"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
)

const device = "/dev/" + abi.Device

// Source is the kernel module of this host.
type Source struct {
	family  genetlink.Family
	command *genetlink.Conn // carries the lease
	group   *genetlink.Conn
	events  chan source.Event
	done    chan struct{} // closed by Close
	reader  sync.WaitGroup

	// mu keeps a snapshot apart from a release and from Close.
	mu      sync.Mutex
	closed  bool
	mapping []byte
	memory  *slots.Memory
}

var _ source.Source = (*Source)(nil)

// Open finds the module. The error is source.ErrUnavailable when it is not
// loaded and os.ErrPermission for a caller without CAP_NET_ADMIN.
func Open() (*Source, error) {
	s := &Source{events: make(chan source.Event, 64), done: make(chan struct{})}
	if err := s.open(); err != nil {
		s.release()
		return nil, fmt.Errorf("open virtexit.ko: %w", err)
	}
	s.reader.Go(s.listen)
	return s, nil
}

func (s *Source) open() error {
	// Asked for a family that there is not, the kernel starts a modprobe.
	if _, err := os.Stat("/sys/module/virtexit"); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: no module virtexit", source.ErrUnavailable)
	}
	var err error
	if s.command, err = dial(); err != nil {
		return err
	}
	if s.family, err = s.command.GetFamily(abi.GenlName); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%w: no generic netlink family %q", source.ErrUnavailable, abi.GenlName)
		}
		return refusal(err)
	}
	// The layout of all that follows depends on the ABI.
	if _, err := s.info(); err != nil {
		if errors.Is(err, source.ErrGone) {
			return fmt.Errorf("%w: %w", source.ErrUnavailable, err)
		}
		return err
	}
	if s.mapping, s.memory, err = mapDevice(device); err != nil {
		return err
	}

	if s.group, err = dial(); err != nil {
		return err
	}
	for _, g := range s.family.Groups {
		if g.Name == abi.GenlGroup {
			if err := s.group.JoinGroup(g.ID); err != nil {
				return fmt.Errorf("join multicast group %q: %w", g.Name, refusal(err))
			}
			return nil
		}
	}
	return fmt.Errorf("no multicast group %q", abi.GenlGroup)
}

func dial() (*genetlink.Conn, error) {
	c, err := genetlink.Dial(nil)
	if err != nil {
		if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT) {
			return nil, fmt.Errorf("%w: no generic netlink: %w", source.ErrUnavailable, err)
		}
		return nil, fmt.Errorf("generic netlink: %w", err)
	}
	if err := c.SetOption(netlink.ExtendedAcknowledge, true); err != nil {
		return nil, errors.Join(fmt.Errorf("generic netlink: %w", err), c.Close())
	}
	return c, nil
}

// mapDevice maps the counters. The mapping outlives the descriptor.
func mapDevice(path string) (mapping []byte, m *slots.Memory, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", path, err)
		}
	}()
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return nil, nil, fmt.Errorf("%w: %w", source.ErrUnavailable, err)
	case err != nil:
		return nil, nil, err
	}
	defer unix.Close(fd)

	page, err := unix.Mmap(fd, 0, os.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, fmt.Errorf("map: %w", err)
	}
	size, err := slots.Size(page)
	if err := errors.Join(err, unix.Munmap(page)); err != nil {
		return nil, nil, err
	}
	mapping, err = unix.Mmap(fd, 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, fmt.Errorf("map %d bytes: %w", size, err)
	}
	if m, err = slots.New(mapping, slots.TSC()); err != nil {
		return nil, nil, errors.Join(err, unix.Munmap(mapping))
	}
	return mapping, m, nil
}

// Info asks the module.
func (s *Source) Info() (source.Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return source.Info{}, os.ErrClosed
	}
	return s.info()
}

func (s *Source) info() (source.Info, error) {
	// Without Acknowledge: the answer is the acknowledgement.
	answers, err := s.execute(abi.CmdGet, nil, netlink.Request)
	if err != nil {
		return source.Info{}, fmt.Errorf("get: %w", err)
	}
	if len(answers) != 1 {
		return source.Info{}, fmt.Errorf("get: %d answers, want one", len(answers))
	}
	info, err := parseInfo(answers[0].Data)
	if err != nil {
		return source.Info{}, fmt.Errorf("get: %w", err)
	}
	if s.memory != nil { // open asks before it maps
		info.ExitCost, info.EntryCost = s.memory.Cost()
	}
	return info, nil
}

// SetLevel takes, changes or gives up the lease.
func (s *Source) SetLevel(level snapshot.Level) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return os.ErrClosed
	}
	attrs, err := leaseRequest(level)
	if err != nil {
		return err
	}
	if _, err := s.execute(abi.CmdLease, attrs, netlink.Request|netlink.Acknowledge); err != nil {
		return fmt.Errorf("lease of level %d: %w", level, err)
	}
	return nil
}

// SetProcessLevel gives the lease a level for one process.
func (s *Source) SetProcessLevel(p snapshot.Process, level *snapshot.Level) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return os.ErrClosed
	}
	attrs, err := levelRequest(p, level)
	if err != nil {
		return err
	}
	if _, err := s.execute(abi.CmdLevel, attrs, netlink.Request|netlink.Acknowledge); err != nil {
		return fmt.Errorf("level of process %d: %w", p.TGID, err)
	}
	return nil
}

// Recent reads the shared memory and makes no system call.
func (s *Source) Recent(id snapshot.SlotID, from uint64) ([]snapshot.Exit, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, os.ErrClosed
	}
	exits, err := s.memory.Recent(id, from)
	if err != nil {
		return nil, fmt.Errorf("recent exits from %s: %w", device, err)
	}
	return exits, nil
}

// Snapshot reads the shared memory and makes no system call.
func (s *Source) Snapshot() (*snapshot.Snapshot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, os.ErrClosed
	}
	snap, err := s.memory.Snapshot()
	if err != nil {
		return nil, fmt.Errorf("snapshot of %s: %w", device, err)
	}
	return snap, nil
}

// Release gives slots back to the module.
func (s *Source) Release(ids []snapshot.SlotID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return os.ErrClosed
	}
	requests, err := releaseRequests(ids)
	if err != nil {
		return err
	}
	for _, attrs := range requests {
		if _, err := s.execute(abi.CmdRelease, attrs, netlink.Request|netlink.Acknowledge); err != nil {
			return fmt.Errorf("release: %w", err)
		}
	}
	return nil
}

func (s *Source) execute(command uint8, attrs []byte, flags netlink.HeaderFlags) ([]genetlink.Message, error) {
	answers, err := s.command.Execute(genetlink.Message{
		Header: genetlink.Header{Command: command, Version: abi.GenlVersion},
		Data:   attrs,
	}, s.family.ID, flags)
	if err != nil {
		return nil, refusal(err)
	}
	return answers, nil
}

// Events returns the channel of the module's events.
func (s *Source) Events() <-chan source.Event { return s.events }

// listen forwards events until Close. While nobody takes them it does not read,
// so that the kernel drops what is too much, and says so.
func (s *Source) listen() {
	defer close(s.events)
	for {
		messages, headers, err := s.group.Receive()
		var errno unix.Errno
		switch {
		case err == nil:
		case errors.As(err, &errno) && errno != unix.ENOBUFS:
			return // closed, or broken
		default: // ENOBUFS, or not a message at all
			if !s.send(source.Event{Kind: source.Lost}) {
				return
			}
		}
		for i, m := range messages {
			if headers[i].Header.Type != netlink.HeaderType(s.family.ID) {
				continue
			}
			if !s.send(parseEvent(m.Header.Command, m.Data)) {
				return
			}
		}
	}
}

func (s *Source) send(e source.Event) bool {
	select {
	case s.events <- e:
		return true
	case <-s.done:
		return false
	}
}

// Close gives up the lease, which ends with its socket, and the mapping.
func (s *Source) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	close(s.done)
	err := s.release()
	s.reader.Wait()
	return err
}

// release gives back what open got, which may be a part.
func (s *Source) release() error {
	var errs []error
	if s.command != nil {
		errs = append(errs, s.command.Close())
	}
	if s.group != nil {
		errs = append(errs, s.group.Close())
	}
	if s.mapping != nil {
		errs = append(errs, unix.Munmap(s.mapping))
	}
	return errors.Join(errs...)
}
