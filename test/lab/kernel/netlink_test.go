// SPDX-License-Identifier: Apache-2.0

//go:build lab

package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/mdlayher/genetlink"
	"golang.org/x/sys/unix"

	"virtexit/internal/abi"
	"virtexit/internal/snapshot"
	"virtexit/test/lab/guest"
	"virtexit/test/lab/inside"
)

// rawSocket speaks generic netlink byte by byte.
type rawSocket struct {
	t      *testing.T
	fd     int
	family uint16
	seq    uint32
}

func newRawSocket(t *testing.T) *rawSocket {
	t.Helper()
	c, err := genetlink.Dial(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	family, err := c.GetFamily(abi.GenlName)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_GENERIC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		t.Fatal(err)
	}
	return &rawSocket{t: t, fd: fd, family: family.ID}
}

// message is one to the family with a right header; its payload begins with
// generic netlink's.
func (r *rawSocket) message(flags uint16, payload []byte) []byte {
	r.seq++
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(payload)))
	b = binary.NativeEndian.AppendUint16(b, r.family)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|flags)
	b = binary.NativeEndian.AppendUint32(b, r.seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	return append(b, payload...)
}

func (r *rawSocket) send(message []byte) {
	r.t.Helper()
	if err := unix.Sendto(r.fd, message, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		r.t.Fatalf("send of % x: %v", message, err)
	}
}

// answer waits for the answer to the latest message, past those to earlier
// ones: an error number, 0 for success. It reports false when none comes.
func (r *rawSocket) answer() (unix.Errno, bool) {
	r.t.Helper()
	buf := make([]byte, 1<<17)
	for {
		n, _, err := unix.Recvfrom(r.fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) {
			return 0, false
		}
		if err != nil {
			r.t.Fatal(err)
		}
		if n < unix.NLMSG_HDRLEN+4 || binary.NativeEndian.Uint32(buf[8:]) != r.seq {
			continue
		}
		if binary.NativeEndian.Uint16(buf[4:]) != unix.NLMSG_ERROR {
			return 0, true // the answer to GET
		}
		return unix.Errno(-int32(binary.NativeEndian.Uint32(buf[unix.NLMSG_HDRLEN:]))), true
	}
}

func genl(command uint8, attrs ...[]byte) []byte {
	return append([]byte{command, abi.GenlVersion, 0, 0}, bytes.Join(attrs, nil)...)
}

// attr is an attribute with the length as given in its header, which may lie.
func attr(length, kind uint16, data []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, length)
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, data...)
	return append(b, make([]byte, -len(b)&3)...)
}

func u32(kind uint16, v uint32) []byte {
	return attr(8, kind, binary.NativeEndian.AppendUint32(nil, v))
}

func level(tgid uint32, start uint64, level uint32) []byte {
	return genl(abi.CmdLevel, u32(abi.AttrTGID, tgid),
		attr(12, abi.AttrStartTime, binary.NativeEndian.AppendUint64(nil, start)), u32(abi.AttrLevel, level))
}

func nest(kind uint16, attrs ...[]byte) []byte {
	data := bytes.Join(attrs, nil)
	return attr(uint16(4+len(data)), kind|unix.NLA_F_NESTED, data)
}

func ref(slot, generation uint32) []byte {
	return nest(abi.AttrSlotRef, u32(abi.AttrSlot, slot), u32(abi.AttrGeneration, generation))
}

// TestNetlinkGarbage sends what no client of ours would, while a guest is
// counted.
func TestNetlinkGarbage(t *testing.T) {
	inside.Load(t, "")
	s := open(t, snapshot.Time)
	vm := newVM(t, 1)
	n := scale(t, 30000)
	vm.VCPUs[0].Start(guest.Program{Ops: []guest.Op{guest.CPUID(0, uint32(n))}})
	r := newRawSocket(t)

	for _, tc := range []struct {
		name    string
		flags   uint16
		payload []byte
		want    unix.Errno
	}{
		{"nothing", 0, nil, unix.EINVAL},
		{"less than a header", 0, []byte{abi.CmdGet}, unix.EINVAL},
		{"command 0", 0, genl(abi.CmdUnspec), unix.EOPNOTSUPP},
		{"an event as a command", 0, genl(abi.CmdVCPUEvent), unix.EOPNOTSUPP},
		{"unknown command", 0, genl(200), unix.EOPNOTSUPP},
		{"dump", unix.NLM_F_DUMP, genl(abi.CmdGet), unix.EOPNOTSUPP},
		{"attribute of another command", 0, genl(abi.CmdGet, u32(abi.AttrLevel, abi.LevelCount)), unix.EINVAL},
		{"unknown attribute", 0, genl(abi.CmdLease, u32(abi.AttrLevel, abi.LevelCount), u32(999, 1)), unix.EINVAL},
		{"attribute longer than the message", 0, genl(abi.CmdLease, attr(400, abi.AttrLevel, []byte{2, 0, 0, 0})), unix.EINVAL},
		{"attribute shorter than its header", 0, genl(abi.CmdLease, attr(3, abi.AttrLevel, []byte{2, 0, 0, 0})), unix.EINVAL},
		{"trailing bytes", 0, append(genl(abi.CmdLease, u32(abi.AttrLevel, abi.LevelCount)), 1, 2, 3), unix.EINVAL},
		{"no level", 0, genl(abi.CmdLease), unix.EINVAL},
		{"level of one byte", 0, genl(abi.CmdLease, attr(5, abi.AttrLevel, []byte{2})), unix.EINVAL},
		{"level of eight bytes", 0, genl(abi.CmdLease, attr(12, abi.AttrLevel, make([]byte, 8))), unix.EINVAL},
		{"level too high", 0, genl(abi.CmdLease, u32(abi.AttrLevel, abi.LevelRecent+1)), unix.ERANGE},
		{"level of no process", 0, genl(abi.CmdLevel, u32(abi.AttrLevel, abi.LevelCount)), unix.EINVAL},
		{"level of a process without start", 0, genl(abi.CmdLevel, u32(abi.AttrTGID, 1), u32(abi.AttrLevel, abi.LevelCount)), unix.EINVAL},
		{"start of four bytes", 0, genl(abi.CmdLevel, u32(abi.AttrTGID, 1), u32(abi.AttrStartTime, 1)), unix.EINVAL},
		{"process's level too high", 0, level(1, 1, abi.LevelRecent+1), unix.ERANGE},
		{"process's level off", 0, level(1, 1, abi.LevelOff), unix.ERANGE},
		{"process's level without a lease", 0, level(1, 1, abi.LevelCount), unix.ENOENT},
		{"no slot", 0, genl(abi.CmdRelease), unix.EINVAL},
		{"slot not nested", 0, genl(abi.CmdRelease, u32(abi.AttrSlotRef, 0)), unix.EINVAL},
		{"empty reference", 0, genl(abi.CmdRelease, nest(abi.AttrSlotRef)), unix.EINVAL},
		{"no generation", 0, genl(abi.CmdRelease, nest(abi.AttrSlotRef, u32(abi.AttrSlot, 0))), unix.EINVAL},
		{"reference in a reference", 0, genl(abi.CmdRelease, nest(abi.AttrSlotRef, ref(0, 0))), unix.EINVAL},
		{"slot in use", 0, genl(abi.CmdRelease, ref(0, 0)), unix.ESTALE},
		{"no such slot", 0, genl(abi.CmdRelease, ref(1<<32-1, 0)), unix.ESTALE},
		{"huge", 0, genl(abi.CmdRelease, bytes.Repeat(ref(7, 7), 5000)), unix.ESTALE},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r.send(r.message(unix.NLM_F_ACK|tc.flags, tc.payload))
			if got, ok := r.answer(); !ok || got != tc.want {
				t.Errorf("%v (%d), answered: %t; want %v", got, got, ok, tc.want)
			}
		})
	}

	// After each of these the family answers a request that makes sense.
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	models := [][]byte{
		genl(abi.CmdGet),
		genl(abi.CmdLease, u32(abi.AttrLevel, abi.LevelCount)),
		level(7, 8, abi.LevelRecent),
		genl(abi.CmdRelease, ref(0, 9), ref(1, 0)),
		genl(abi.CmdRelease, nest(abi.AttrSlotRef, nest(abi.AttrSlotRef, nest(abi.AttrSlotRef)))),
		nil,
	}
	for i := range scale(t, 3000) {
		payload := slices.Clone(models[random.IntN(len(models))])
		if random.IntN(4) == 0 {
			more := make([]byte, random.IntN(200))
			for i := range more {
				more[i] = byte(random.Uint32())
			}
			payload = append(payload, more...)
		}
		for range random.IntN(4) {
			if len(payload) > 0 {
				payload[random.IntN(len(payload))] = byte(random.Uint32())
			}
		}
		payload = payload[:len(payload)-random.IntN(min(len(payload), 6)+1)]
		message := r.message(unix.NLM_F_ACK, payload)
		if random.IntN(8) == 0 { // says it is longer or shorter than it is: ignored
			binary.NativeEndian.PutUint32(message, random.Uint32N(300))
		}
		r.send(message)
		r.send(r.message(0, genl(abi.CmdGet)))
		if got, ok := r.answer(); !ok || got != 0 {
			t.Fatalf("message %d, % x: then GET gives %v, answered: %t", i, message, got, ok)
		}
	}

	if err := vm.VCPUs[0].Wait(); err != nil {
		t.Fatal(err)
	}
	sn := snap(t, s)
	if got := counts(sn, vm.VCPUs[0].TID())[inside.Host(t).Codes["cpuid"]]; got != uint64(n) {
		t.Errorf("%d CPUID exits, want %d", got, n)
	}
	if info, err := s.Info(); err != nil || info.Level < snapshot.Time || info.SlotsLive != 1 || info.SlotsRetired != 0 {
		t.Errorf("%+v, %v", info, err)
	}
	if sn.Released != 0 {
		t.Errorf("%d exits released", sn.Released)
	}
}
