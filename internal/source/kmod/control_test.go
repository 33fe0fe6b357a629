// SPDX-License-Identifier: Apache-2.0

package kmod

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"virtexit/internal/abi"
	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
)

// encode makes attributes as the module does.
func encode(t testing.TB, fill func(*netlink.AttributeEncoder)) []byte {
	ae := netlink.NewAttributeEncoder()
	fill(ae)
	b, err := ae.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParseInfo(t *testing.T) {
	u32 := func(pairs ...uint32) func(*netlink.AttributeEncoder) {
		return func(ae *netlink.AttributeEncoder) {
			for p := range slices.Chunk(pairs, 2) {
				ae.Uint32(uint16(p[0]), p[1])
			}
		}
	}
	tests := []struct {
		name string
		fill func(*netlink.AttributeEncoder)
		want source.Info
		err  string
	}{
		{
			name: "counting",
			fill: func(ae *netlink.AttributeEncoder) {
				ae.String(abi.AttrVersion, "0.1.0")
				u32(abi.AttrABI, abi.ABI, abi.AttrLevel, abi.LevelTime, abi.AttrHook, abi.HookTracepoint, abi.AttrISA, abi.ISASVM,
					abi.AttrSlotsMax, 8192, abi.AttrSlotsLive, 3, abi.AttrSlotsRetired, 2, abi.AttrSlotsBacked, 64, abi.AttrLeases, 1)(ae)
				ae.Flag(abi.AttrKVM, true)
			},
			want: source.Info{
				Collector: "kmod", Version: "0.1.0", Hook: "tracepoint", Level: snapshot.Time, ISA: exitreason.SVM, KVM: true,
				SlotsMax: 8192, SlotsLive: 3, SlotsRetired: 2, SlotsBacked: 64, Leases: 1,
			},
		},
		{
			name: "without kvm",
			fill: u32(abi.AttrABI, abi.ABI),
			want: source.Info{Collector: "kmod", Hook: "none"},
		},
		{
			name: "refused",
			fill: func(ae *netlink.AttributeEncoder) {
				u32(abi.AttrABI, abi.ABI)(ae)
				ae.Flag(abi.AttrKVM, true)
				ae.String(abi.AttrRefused, "not \xff known")
			},
			want: source.Info{Collector: "kmod", Hook: "none", KVM: true, Refused: "not \uFFFD known"},
		},
		{
			name: "attribute of a newer module",
			fill: u32(abi.AttrABI, abi.ABI, 999, 5),
			want: source.Info{Collector: "kmod", Hook: "none"},
		},
		{name: "nothing", fill: u32(), err: "the module's abi is 0, this program's is 1"},
		{name: "other abi", fill: u32(abi.AttrABI, 2), err: "the module's abi is 2, this program's is 1"},
		{name: "level", fill: u32(abi.AttrABI, abi.ABI, abi.AttrLevel, 9), err: "level is 9"},
		{name: "hook", fill: u32(abi.AttrABI, abi.ABI, abi.AttrHook, 1<<31), err: "hook is 2147483648"},
		{name: "isa", fill: u32(abi.AttrABI, abi.ABI, abi.AttrISA, 9), err: "isa is 9"},
		{
			name: "number of another size",
			fill: func(ae *netlink.AttributeEncoder) { ae.Uint8(abi.AttrABI, abi.ABI) },
			err:  "uint32",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseInfo(encode(t, tt.fill))
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("error is %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("info (-want +got):\n%s", diff)
			}
		})
	}
	if _, err := parseInfo([]byte{1, 0, 0, 0, 0}); err == nil {
		t.Error("no error for an attribute of no length")
	}
}

func TestParseEvent(t *testing.T) {
	vcpu := func(state uint32) []byte {
		return encode(t, func(ae *netlink.AttributeEncoder) {
			ae.Uint32(abi.AttrSlot, 5)
			ae.Uint32(abi.AttrGeneration, 6)
			ae.Uint32(abi.AttrState, state)
			ae.Uint32(abi.AttrTID, 101)
			ae.Uint32(abi.AttrTGID, 100)
			ae.Uint32(abi.AttrVCPUID, 3)
		})
	}
	event := source.Event{Slot: snapshot.SlotID{Index: 5, Generation: 6}, Process: 100, TID: 101, VCPU: 3}
	born, died := event, event
	born.Kind, died.Kind = source.VCPUNew, source.VCPURetired
	lost := source.Event{Kind: source.Lost}
	tests := []struct {
		name    string
		command uint8
		attrs   []byte
		want    source.Event
	}{
		{"new vcpu", abi.CmdVCPUEvent, vcpu(abi.Live), born},
		{"retired vcpu", abi.CmdVCPUEvent, vcpu(abi.Retired), died},
		{"kvm", abi.CmdKVMEvent, nil, source.Event{Kind: source.KVMChanged}},
		{"free slot", abi.CmdVCPUEvent, vcpu(abi.Free), lost},
		{"no attributes", abi.CmdVCPUEvent, nil, lost},
		{"cut short", abi.CmdVCPUEvent, vcpu(abi.Live)[:len(vcpu(abi.Live))-2], lost},
		{"unknown command", 99, vcpu(abi.Live), lost},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, parseEvent(tt.command, tt.attrs)); diff != "" {
				t.Errorf("event (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLeaseRequest(t *testing.T) {
	got, err := leaseRequest(snapshot.Time)
	if err != nil {
		t.Fatal(err)
	}
	want := encode(t, func(ae *netlink.AttributeEncoder) { ae.Uint32(abi.AttrLevel, abi.LevelTime) })
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
}

func TestLevelRequest(t *testing.T) {
	p := snapshot.Process{TGID: 100, Start: 1 << 40}
	of := func(ae *netlink.AttributeEncoder) {
		ae.Uint32(abi.AttrTGID, 100)
		ae.Uint64(abi.AttrStartTime, 1<<40)
	}
	level := snapshot.Recent
	for _, tt := range []struct {
		name  string
		level *snapshot.Level
		want  func(*netlink.AttributeEncoder)
	}{
		{"taken back", nil, of},
		{"wished for", &level, func(ae *netlink.AttributeEncoder) {
			of(ae)
			ae.Uint32(abi.AttrLevel, abi.LevelRecent)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := levelRequest(p, tt.level)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(encode(t, tt.want), got); diff != "" {
				t.Errorf("request (-want +got):\n%s", diff)
			}
		})
	}
}

func TestReleaseRequests(t *testing.T) {
	for _, n := range []int{0, 1, maxRefs, maxRefs + 1, 5*maxRefs + 7} {
		var want, got []snapshot.SlotID
		for i := range n {
			want = append(want, snapshot.SlotID{Index: uint32(i), Generation: uint32(i) * 3})
		}
		requests, err := releaseRequests(want)
		if err != nil {
			t.Fatal(err)
		}
		if len(requests) != (n+maxRefs-1)/maxRefs {
			t.Errorf("%d slots: %d requests", n, len(requests))
		}
		for _, attrs := range requests {
			if len(attrs) > 3000 {
				t.Errorf("%d slots: a request of %d bytes", n, len(attrs))
			}
			ad, err := netlink.NewAttributeDecoder(attrs)
			if err != nil {
				t.Fatal(err)
			}
			for ad.Next() {
				if ad.Type() != abi.AttrSlotRef || ad.TypeFlags()&netlink.Nested == 0 {
					t.Errorf("attribute %d, flags %#x", ad.Type(), ad.TypeFlags())
				}
				var id snapshot.SlotID
				ad.Nested(func(nad *netlink.AttributeDecoder) error {
					for nad.Next() {
						switch nad.Type() {
						case abi.AttrSlot:
							id.Index = nad.Uint32()
						case abi.AttrGeneration:
							id.Generation = nad.Uint32()
						}
					}
					return nil
				})
				got = append(got, id)
			}
			if err := ad.Err(); err != nil {
				t.Fatal(err)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%d slots (-want +got):\n%s", n, diff)
		}
	}
}

func TestRefusal(t *testing.T) {
	kernel := func(errno unix.Errno, text string) error {
		return &netlink.OpError{Op: "receive", Err: errno, Message: text}
	}
	tests := []struct {
		name string
		err  error
		is   error
		text string
	}{
		{"unloaded", kernel(unix.ENOENT, ""), source.ErrGone, "collector gone: no such file or directory"},
		{"stale", kernel(unix.ESTALE, "slot 5 is live"), source.ErrStale, "slot not retired: slot 5 is live (stale file handle)"},
		{"not permitted", kernel(unix.EPERM, ""), os.ErrPermission, "CAP_NET_ADMIN is needed in the initial user namespace: operation not permitted"},
		{"refused", kernel(unix.EINVAL, "no level given"), unix.EINVAL, "no level given (invalid argument)"},
		{"no lease", kernel(unix.ENOENT, "the socket holds no lease"), unix.ENOENT, "the socket holds no lease (no such file or directory)"},
		{"send", &netlink.OpError{Op: "send", Err: os.NewSyscallError("sendmsg", unix.ENOMEM)}, unix.ENOMEM, "sendmsg: cannot allocate memory"},
		{"not the kernel's", os.ErrClosed, os.ErrClosed, os.ErrClosed.Error()},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := refusal(tt.err)
			if !errors.Is(got, tt.is) || got.Error() != tt.text {
				t.Errorf("error is %q, want %q that is %q", got, tt.text, tt.is)
			}
		})
	}
}

func TestOpenUnavailable(t *testing.T) {
	if _, err := os.Stat(device); err == nil {
		t.Skipf("%s is here: sourcetest.Run covers it", device)
	}
	s, err := Open()
	if err == nil {
		s.Close()
		t.Fatal("opened a module that is not loaded")
	}
	if !errors.Is(err, source.ErrUnavailable) || errors.Is(err, source.ErrGone) {
		t.Errorf("error is %v, want %v", err, source.ErrUnavailable)
	}
	t.Log(err)
}

func FuzzAttributes(f *testing.F) {
	f.Add(uint8(abi.CmdVCPUEvent), encode(f, func(ae *netlink.AttributeEncoder) {
		ae.Uint32(abi.AttrState, abi.Live)
		ae.Uint32(abi.AttrTID, 101)
	}))
	f.Add(uint8(abi.CmdGet), encode(f, func(ae *netlink.AttributeEncoder) {
		ae.String(abi.AttrVersion, "0.1.0")
		ae.Uint32(abi.AttrABI, abi.ABI)
		ae.Flag(abi.AttrKVM, true)
	}))
	f.Fuzz(func(t *testing.T, command uint8, attrs []byte) {
		if info, err := parseInfo(attrs); err == nil && (info.Level > snapshot.Recent || info.Hook == "") {
			t.Errorf("info makes no sense: %+v", info)
		}
		if e := parseEvent(command, attrs); e.Kind < source.VCPUNew || e.Kind > source.Lost {
			t.Errorf("event makes no sense: %+v", e)
		}
	})
}
