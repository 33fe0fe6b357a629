// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/cilium/ebpf/btf"

	"virtexit/internal/exitreason"
)

// kvm is what the programs must know of the KVM that is loaded.
type kvm struct {
	isa         exitreason.ISA // None: whatever each exit is of
	given       bool           // the reason comes with the exit
	exit, entry string         // programs for the events of these names
	types       []*btf.Spec    // of KVM's modules; nil when the programs are loaded
	raw         []byte         // the types of the vendor's module; nil: it has none of its own
}

// loading tells one loading of KVM's modules from another; zero: they are not there.
type loading struct{ kvm, vendor uint64 }

var vendors = []struct {
	module, structure string
	isa               exitreason.ISA
}{
	{"kvm_amd", "vcpu_svm", exitreason.SVM},
	{"kvm_intel", "vcpu_vmx", exitreason.VMX},
}

// What vendor is when there is none, or one that is not among vendors.
const (
	noVendor    = -1
	otherVendor = -2
)

// findKVM tells what is loaded. Where the modules are below /sys is root's.
func findKVM(root string) (l loading, vendor int) {
	l.kvm = inode(filepath.Join(root, "sys/module/kvm"))
	coming := false
	for i, v := range vendors {
		dir := filepath.Join(root, "sys/module", v.module)
		// Built in, it has no state. What does not find its CPU is there for a moment.
		state, err := os.ReadFile(filepath.Join(dir, "initstate"))
		if id := inode(dir); id == 0 {
			continue
		} else if err != nil || string(bytes.TrimSpace(state)) == "live" {
			l.vendor = id
			return l, i
		}
		coming = true
	}
	if coming {
		return l, noVendor
	}
	// It has brought the device, whatever it is called.
	if l.vendor = inode(filepath.Join(root, "sys/class/misc/kvm")); l.vendor != 0 {
		return l, otherVendor
	}
	return l, noVendor
}

func inode(path string) uint64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Sys().(*syscall.Stat_t).Ino
}

// rawTypes is how the module of a vendor describes its types; nil: it does not.
func rawTypes(vendor int) []byte {
	if vendor < 0 {
		return nil
	}
	raw, err := os.ReadFile(filepath.Join("/sys/kernel/btf", vendors[vendor].module))
	if err != nil {
		return nil
	}
	return raw
}

// describeKVM reads the types of KVM's modules.
func describeKVM(vendor int, cache *btf.Cache) (*kvm, error) {
	k := &kvm{raw: rawTypes(vendor)}
	events, err := k.describe("kvm", cache) // where the prototypes are
	if err != nil {
		return nil, err
	}
	var s *btf.Struct
	switch {
	case vendor >= 0:
		v := vendors[vendor]
		k.isa = v.isa
		spec, err := k.describe(v.module, cache)
		if err != nil {
			return nil, err
		}
		if err := spec.TypeByName(v.structure, &s); err != nil {
			return nil, fmt.Errorf("module %s does not describe struct %s (CONFIG_DEBUG_INFO_BTF_MODULES): %w", v.module, v.structure, err)
		}
	case events.TypeByName("kvm_vcpu_fault_info", &s) == nil: // the ESR of an exit, in arm64's KVM alone
		k.isa = exitreason.ARM64
	case vendor == noVendor:
		return nil, errors.New("kvm is loaded without a vendor module (such as kvm_amd, kvm_intel)")
	}
	exit, err := prototype(events, "kvm_exit")
	if err != nil {
		return nil, err
	}
	entry, err := prototype(events, "kvm_entry")
	if err != nil {
		return nil, err
	}
	k.exit, k.entry = collectorProgKvmExit, collectorProgKvmEntry
	arm64 := k.isa == exitreason.ARM64
	switch {
	case vendor == otherVendor && exit == "vcpu other":
		k.given, k.exit = true, collectorProgKvmExitAny
	case !arm64 && exit == "vcpu other":
	case !arm64 && exit == "other vcpu other":
		k.given, k.exit = true, collectorProgKvmExitGiven
	case arm64 && exit == "other other other":
		k.given, k.exit = true, collectorProgKvmExitArm64
	default:
		return nil, fmt.Errorf("the event kvm_exit has unknown arguments (%s)", exit)
	}
	switch {
	case !arm64 && (entry == "vcpu" || entry == "vcpu other"):
	case arm64 && entry == "other":
		k.entry = collectorProgKvmEntryArm64
	default:
		return nil, fmt.Errorf("the event kvm_entry has unknown arguments (%s)", entry)
	}
	return k, nil
}

// describe reads the types of a module, or of the kernel that has it built in.
func (k *kvm) describe(module string, cache *btf.Cache) (*btf.Spec, error) {
	spec, err := cache.Module(module)
	switch {
	case err == nil:
		k.types = append(k.types, spec)
	case errors.Is(err, os.ErrNotExist):
		if spec, err = cache.Kernel(); err != nil {
			return nil, fmt.Errorf("the kernel's types: %w", err)
		}
	default:
		return nil, fmt.Errorf("the types of module %s: %w", module, err)
	}
	return spec, nil
}

// prototype tells which arguments of an event are vCPUs.
func prototype(spec *btf.Spec, event string) (string, error) {
	var def *btf.Typedef
	if err := spec.TypeByName("btf_trace_"+event, &def); err != nil {
		return "", fmt.Errorf("KVM does not describe an event %s (CONFIG_DEBUG_INFO_BTF_MODULES): %w", event, err)
	}
	pointer, ok := btf.UnderlyingType(def.Type).(*btf.Pointer)
	if !ok {
		return "", fmt.Errorf("the event %s is no function", event)
	}
	proto, ok := pointer.Target.(*btf.FuncProto)
	if !ok || len(proto.Params) == 0 {
		return "", fmt.Errorf("the event %s is no function", event)
	}
	args := ""
	for _, p := range proto.Params[1:] { // the first is the probe's own
		kind := "other"
		if at, ok := btf.UnderlyingType(p.Type).(*btf.Pointer); ok {
			if s, ok := btf.UnderlyingType(at.Target).(*btf.Struct); ok && s.Name == "kvm_vcpu" {
				kind = "vcpu"
			} else if f, ok := btf.UnderlyingType(at.Target).(*btf.Fwd); ok && f.Name == "kvm_vcpu" {
				kind = "vcpu"
			}
		}
		if args != "" {
			args += " "
		}
		args += kind
	}
	return args, nil
}

// canCast tells 1 where programs can read the kernel's memory without a call: since 6.2.
func canCast(cache *btf.Cache) (uint32, error) {
	spec, err := cache.Kernel()
	if err != nil {
		return 0, fmt.Errorf("the kernel's types: %w", err)
	}
	var cast *btf.Func
	if err := spec.TypeByName("bpf_rdonly_cast", &cast); errors.Is(err, btf.ErrNotFound) {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	return 1, nil
}
