// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"encoding/binary"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
)

func newSpec(t *testing.T, types ...btf.Type) *btf.Spec {
	t.Helper()
	b, err := btf.NewBuilder(types, nil)
	if err != nil {
		t.Fatal(err)
	}
	spec, err := b.Spec()
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

var (
	u32  = &btf.Int{Name: "unsigned int", Size: 4}
	u64  = &btf.Int{Name: "unsigned long", Size: 8}
	vcpu = &btf.Struct{Name: "kvm_vcpu", Size: 8000}
)

func TestPrototype(t *testing.T) {
	probe := &btf.Pointer{Target: &btf.Void{}}
	event := func(args ...btf.Type) btf.Type {
		params := []btf.FuncParam{{Type: probe}}
		for _, a := range args {
			params = append(params, btf.FuncParam{Type: a})
		}
		return &btf.Typedef{Name: "btf_trace_kvm_exit", Type: &btf.Pointer{Target: &btf.FuncProto{Return: &btf.Void{}, Params: params}}}
	}
	for _, tt := range []struct {
		name string
		typ  btf.Type
		want string
		err  string
	}{
		{"since 5.16", event(&btf.Pointer{Target: vcpu}, u32), "vcpu other", ""},
		{"before 5.16", event(u32, &btf.Pointer{Target: vcpu}, u32), "other vcpu other", ""},
		{"forward", event(&btf.Pointer{Target: &btf.Fwd{Name: "kvm_vcpu"}}, u32), "vcpu other", ""},
		{"named", event(&btf.Typedef{Name: "vcpu_t", Type: &btf.Pointer{Target: &btf.Const{Type: vcpu}}}), "vcpu", ""},
		{"arm64", event(&btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}, u32, u64), "other other other", ""},
		{"another structure", event(&btf.Pointer{Target: &btf.Struct{Name: "kvm", Size: 8}}), "other", ""},
		{"none", event(), "", ""},
		{"no event", u32, "", "does not describe an event kvm_exit (CONFIG_DEBUG_INFO_BTF_MODULES)"},
		{"no function", &btf.Typedef{Name: "btf_trace_kvm_exit", Type: u32}, "", "is no function"},
		{"no arguments", &btf.Typedef{Name: "btf_trace_kvm_exit", Type: &btf.Pointer{Target: &btf.FuncProto{Return: &btf.Void{}}}}, "", "is no function"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := prototype(newSpec(t, tt.typ), "kvm_exit")
			if got != tt.want || (err != nil) != (tt.err != "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("prototype is %q, %v; want %q, %q", got, err, tt.want, tt.err)
			}
		})
	}
}

// TestVMXReason has the program find the reason where each kernel keeps it.
func TestVMXReason(t *testing.T) {
	reason := &btf.Union{Name: "vmx_exit_reason", Size: 4, Members: []btf.Member{{Name: "full", Type: u32}}}
	vmx := func(m btf.Member) btf.Type {
		m.Offset = 8 * 8064
		return &btf.Struct{Name: "vcpu_vmx", Size: 9000, Members: []btf.Member{{Name: "vcpu", Type: vcpu}, m}}
	}
	for _, tt := range []struct {
		name string
		typ  btf.Type
		want []string
	}{
		{"before 6.16", vmx(btf.Member{Name: "exit_reason", Type: reason}),
			[]string{"byte_off=0->8064", "byte_off=poison", "field_exists=1->0"}},
		{"since 6.16", vmx(btf.Member{Name: "vt", Type: &btf.Struct{Name: "vcpu_vt", Size: 128, Members: []btf.Member{{Name: "exit_reason", Type: reason, Offset: 8 * 16}}}}),
			[]string{"byte_off=0->8080", "byte_off=poison", "field_exists=1->1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			spec, err := loadCollector()
			if err != nil {
				t.Fatal(err)
			}
			var relocations []*btf.CORERelocation
			insns := spec.Programs[collectorProgKvmExit].Instructions
			for i := range insns {
				if r := btf.CORERelocationMetadata(&insns[i]); r != nil && strings.Contains(r.String(), `"vcpu_vmx`) {
					relocations = append(relocations, r)
				}
			}
			fixups, err := btf.CORERelocate(relocations, []*btf.Spec{newSpec(t, tt.typ)}, binary.LittleEndian, nil)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, f := range fixups {
				got = append(got, f.String())
			}
			slices.Sort(got)
			if diff := cmp.Diff(tt.want, slices.Compact(got)); diff != "" {
				t.Errorf("of %d relocations (-want +got):\n%s", len(relocations), diff)
			}
		})
	}
}
