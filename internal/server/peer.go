// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peer is who has connected, as the kernel knows it.
type peer struct {
	uid    uint32
	groups []uint32 // all of the process's, not of the user's entry in a database
}

type peerKey struct{}

// withPeer puts the peer of a connection, if it has one, in its context.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	if l, ok := c.(*limitedConn); ok {
		c = l.Conn
	}
	if u, ok := c.(*net.UnixConn); ok {
		if p, err := peerOf(u); err == nil {
			return context.WithValue(ctx, peerKey{}, p)
		}
	}
	return ctx
}

func peerOf(c *net.UnixConn) (peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return peer{}, err
	}
	var p peer
	var sockErr error
	err = raw.Control(func(fd uintptr) { p, sockErr = peerOfFD(int(fd)) })
	return p, errors.Join(err, sockErr)
}

func peerOfFD(fd int) (peer, error) {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return peer{}, fmt.Errorf("read the peer's credentials: %w", err)
	}
	groups, err := peerGroups(fd)
	if err != nil {
		return peer{}, fmt.Errorf("read the peer's groups: %w", err)
	}
	return peer{cred.Uid, append(groups, cred.Gid)}, nil
}

// peerGroups reads the supplementary groups, for which x/sys has no function.
func peerGroups(fd int) ([]uint32, error) {
	groups := make([]uint32, 64)
	for {
		size := uint32(len(groups)) * 4
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(unsafe.SliceData(groups))), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0:
			return groups[:size/4], nil
		case errno == syscall.ERANGE && size > uint32(len(groups))*4: // size is what it takes
			groups = make([]uint32, size/4)
		default:
			return nil, errno
		}
	}
}

// mayAdmin tells whether the request's peer may switch collection.
func (s *Server) mayAdmin(ctx context.Context) error {
	if s.options.ReadOnly {
		return errors.New("this socket is read-only")
	}
	p, ok := ctx.Value(peerKey{}).(peer)
	if !ok {
		return errors.New("switching collection needs a client whose credentials can be read")
	}
	if p.uid == 0 {
		return nil
	}
	if s.options.AdminGroup == "" {
		return errors.New("switching collection needs root: admin_group names no group in virtexitd.yaml")
	}
	gid, err := lookupGroup(s.options.AdminGroup)
	if err != nil {
		return fmt.Errorf("switching collection needs root: %w", err)
	}
	if !slices.Contains(p.groups, uint32(gid)) {
		return fmt.Errorf("switching collection needs root or membership of group '%s'", s.options.AdminGroup)
	}
	return nil
}
