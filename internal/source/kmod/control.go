// SPDX-License-Identifier: Apache-2.0

package kmod

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"virtexit/internal/abi"
	"virtexit/internal/exitreason"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
)

// maxRefs bounds the slots of one RELEASE: an error's answer holds the request,
// and both should fit into a page.
const maxRefs = 128

// parseInfo reads the attributes of an answer to GET. Attributes that a newer
// module may add are ignored.
func parseInfo(attrs []byte) (source.Info, error) {
	ad, err := netlink.NewAttributeDecoder(attrs)
	if err != nil {
		return source.Info{}, err
	}
	info := source.Info{Collector: "kmod"}
	var version, level, hook, isa uint32
	for ad.Next() {
		switch ad.Type() {
		case abi.AttrVersion:
			info.Version = sentence(ad)
		case abi.AttrABI:
			version = ad.Uint32()
		case abi.AttrLevel:
			level = ad.Uint32()
		case abi.AttrHook:
			hook = ad.Uint32()
		case abi.AttrISA:
			isa = ad.Uint32()
		case abi.AttrRefused:
			info.Refused = sentence(ad)
		case abi.AttrKVM:
			info.KVM = ad.Flag()
		case abi.AttrSlotsMax:
			info.SlotsMax = int(ad.Uint32())
		case abi.AttrSlotsLive:
			info.SlotsLive = int(ad.Uint32())
		case abi.AttrSlotsRetired:
			info.SlotsRetired = int(ad.Uint32())
		case abi.AttrSlotsBacked:
			info.SlotsBacked = int(ad.Uint32())
		case abi.AttrLeases:
			info.Leases = int(ad.Uint32())
		}
	}
	if err := ad.Err(); err != nil {
		return source.Info{}, err
	}
	hooks := [...]string{abi.HookNone: "none", abi.HookTracepoint: "tracepoint", abi.HookPatch: "patch"}
	switch {
	case version != abi.ABI:
		return source.Info{}, fmt.Errorf("the module's abi is %d, this program's is %d: stop virtexitd, modprobe -r virtexit, start it again", version, abi.ABI)
	case level > abi.LevelRecent:
		return source.Info{}, fmt.Errorf("level is %d", level)
	case int(hook) >= len(hooks):
		return source.Info{}, fmt.Errorf("hook is %d", hook)
	case isa > abi.ISASVM:
		return source.Info{}, fmt.Errorf("isa is %d", isa)
	}
	info.Level = snapshot.Level(level)
	info.Hook = hooks[hook]
	info.ISA = exitreason.ISA(isa)
	return info, nil
}

func sentence(ad *netlink.AttributeDecoder) string {
	return strings.ToValidUTF8(ad.String(), "\uFFFD")
}

// parseEvent reads a multicast message. One that makes no sense is as good as
// lost.
func parseEvent(command uint8, attrs []byte) source.Event {
	lost := source.Event{Kind: source.Lost}
	switch command {
	case abi.CmdKVMEvent:
		return source.Event{Kind: source.KVMChanged}
	case abi.CmdVCPUEvent:
	default:
		return lost
	}
	ad, err := netlink.NewAttributeDecoder(attrs)
	if err != nil {
		return lost
	}
	var e source.Event
	for ad.Next() {
		switch ad.Type() {
		case abi.AttrSlot:
			e.Slot.Index = ad.Uint32()
		case abi.AttrGeneration:
			e.Slot.Generation = ad.Uint32()
		case abi.AttrState:
			switch ad.Uint32() {
			case abi.Live:
				e.Kind = source.VCPUNew
			case abi.Retired:
				e.Kind = source.VCPURetired
			}
		case abi.AttrTID:
			e.TID = int(ad.Uint32())
		case abi.AttrTGID:
			e.Process = int(ad.Uint32())
		case abi.AttrVCPUID:
			e.VCPU = int(ad.Uint32())
		}
	}
	if ad.Err() != nil || e.Kind == 0 {
		return lost
	}
	return e
}

// leaseRequest holds the attributes of LEASE.
func leaseRequest(level snapshot.Level) ([]byte, error) {
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(abi.AttrLevel, uint32(level))
	return ae.Encode()
}

// levelRequest holds the attributes of LEVEL.
func levelRequest(p snapshot.Process, level *snapshot.Level) ([]byte, error) {
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(abi.AttrTGID, uint32(p.TGID))
	ae.Uint64(abi.AttrStartTime, p.Start)
	if level != nil {
		ae.Uint32(abi.AttrLevel, uint32(*level))
	}
	return ae.Encode()
}

// releaseRequests holds the attributes of as many RELEASEs as it takes.
func releaseRequests(ids []snapshot.SlotID) ([][]byte, error) {
	var requests [][]byte
	for chunk := range slices.Chunk(ids, maxRefs) {
		ae := netlink.NewAttributeEncoder()
		for _, id := range chunk {
			ae.Nested(abi.AttrSlotRef, func(nae *netlink.AttributeEncoder) error {
				nae.Uint32(abi.AttrSlot, id.Index)
				nae.Uint32(abi.AttrGeneration, id.Generation)
				return nil
			})
		}
		attrs, err := ae.Encode()
		if err != nil {
			return nil, err
		}
		requests = append(requests, attrs)
	}
	return requests, nil
}

// refusal turns the error of a request into one that says what the caller can
// do about it, with the kernel's own words where it gave some.
func refusal(err error) error {
	var op *netlink.OpError
	explained := false // by the module, which thus is there
	if errors.As(err, &op) {
		err = op.Err
		if op.Message != "" {
			err = fmt.Errorf("%s (%w)", op.Message, err)
			explained = true
		}
	}
	switch {
	case errors.Is(err, unix.ENOENT) && !explained: // generic netlink knows no such family
		return fmt.Errorf("%w: %w", source.ErrGone, err)
	case errors.Is(err, unix.ESTALE):
		return fmt.Errorf("%w: %w", source.ErrStale, err)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("CAP_NET_ADMIN is needed in the initial user namespace: %w", err)
	}
	return err
}
