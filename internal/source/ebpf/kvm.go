// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
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
	isa   exitreason.ISA
	given bool        // kvm_exit has the reason among its arguments
	types []*btf.Spec // of KVM's modules
	raw   []byte      // the types of the vendor's module; nil: it has none of its own
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

// findKVM tells what is loaded. Where the modules are below /sys is root's.
func findKVM(root string) (l loading, vendor int) {
	l.kvm = inode(filepath.Join(root, "sys/module/kvm"))
	for i, v := range vendors {
		if l.vendor = inode(filepath.Join(root, "sys/module", v.module)); l.vendor != 0 {
			return l, i
		}
	}
	return l, -1
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
func describeKVM(vendor int) (*kvm, error) {
	if vendor < 0 {
		return nil, errors.New("no vendor module is loaded whose exits are known (kvm_amd, kvm_intel)")
	}
	v := vendors[vendor]
	k := &kvm{isa: v.isa, raw: rawTypes(vendor)}
	var events *btf.Spec // where the prototypes are
	for _, module := range []string{"kvm", v.module} {
		spec, err := btf.LoadKernelModuleSpec(module)
		if errors.Is(err, os.ErrNotExist) { // built in
			if spec, err = btf.LoadKernelSpec(); err != nil {
				return nil, fmt.Errorf("the kernel's types: %w", err)
			}
		} else if err != nil {
			return nil, fmt.Errorf("the types of module %s: %w", module, err)
		} else {
			k.types = append(k.types, spec)
		}
		if events == nil {
			events = spec
		}
		if module != "kvm" {
			var s *btf.Struct
			if err := spec.TypeByName(v.structure, &s); err != nil {
				return nil, fmt.Errorf("module %s does not describe struct %s (CONFIG_DEBUG_INFO_BTF_MODULES): %w", module, v.structure, err)
			}
		}
	}
	args, err := prototype(events, "kvm_exit")
	if err != nil {
		return nil, err
	}
	switch args {
	case "vcpu other":
	case "other vcpu other":
		k.given = true
	default:
		return nil, fmt.Errorf("the event kvm_exit has unknown arguments (%s)", args)
	}
	if args, err = prototype(events, "kvm_entry"); err != nil {
		return nil, err
	}
	if args != "vcpu" && args != "vcpu other" {
		return nil, fmt.Errorf("the event kvm_entry has unknown arguments (%s)", args)
	}
	return k, nil
}

// prototype tells which arguments of an event are vCPUs.
func prototype(spec *btf.Spec, event string) (string, error) {
	var def *btf.Typedef
	if err := spec.TypeByName("btf_trace_"+event, &def); err != nil {
		return "", fmt.Errorf("the module kvm does not describe an event %s (CONFIG_DEBUG_INFO_BTF_MODULES): %w", event, err)
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
func canCast() (uint32, error) {
	spec, err := btf.LoadKernelSpec()
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
