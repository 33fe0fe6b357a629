// SPDX-License-Identifier: Apache-2.0

package exitreason

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestName(t *testing.T) {
	tests := []struct {
		name string
		isa  ISA
		code uint32
		want string
	}{
		{"vmx first", VMX, 0, "EXCEPTION_NMI"},
		{"vmx", VMX, 10, "CPUID"},
		{"vmx unknown", VMX, 0x1f3, "0x1f3"},
		{"vmx failed entry", VMX, 1<<31 | 33, "INVALID_STATE FAILED_VMENTRY"},
		{"vmx other flag", VMX, 1<<27 | 10, "CPUID 0x8000000"},
		{"vmx all flags", VMX, 0xffff<<16 | 41, "MCE_DURING_VMENTRY FAILED_VMENTRY 0x7fff0000"},
		{"vmx unknown with flag", VMX, 1<<31 | 0x1f3, "0x1f3 FAILED_VMENTRY"},
		{"svm first", SVM, 0, "read_cr0"},
		{"svm", SVM, 0x72, "cpuid"},
		{"svm exception", SVM, 0x4e, "PF excp"},
		{"svm sparse", SVM, 0x400, "npf"},
		{"svm software", SVM, 0x80000001, "vmgexit_mmio_read"},
		{"svm minus one", SVM, 0xffffffff, "invalid_guest_state"},
		{"svm unknown", SVM, 0x1f3, "0x1f3"},
		{"arm64 first", ARM64, 0, "UNKNOWN"},
		{"arm64", ARM64, 0x16, "HVC64"},
		{"arm64 class unknown", ARM64, 0x3f, "0x3f"},
		{"arm64 no class", ARM64, 0x40, "IRQ"},
		{"arm64 hypervisor gone", ARM64, 0xbadca51, "HYP_GONE"},
		{"arm64 error pending", ARM64, 1<<31 | 0x24, "DABT_LOW WITH_SERROR"},
		{"none", None, 10, "unknown"},
		{"pvm exception", PVM, 14, "PF excp"},
		{"pvm", PVM, 2 << 16, "HYPERCALL"},
		{"pvm unknown", PVM, 0x72, "0x72"},
		{"unknown isa", 7, 0, "0x0"},
		{"unknown isa, svm's code", 77, 0x72, "0x72"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := Name(tt.isa, tt.code); got != tt.want {
				t.Errorf("Name(%v, %#x) = %q, want %q", tt.isa, tt.code, got, tt.want)
			}
		})
	}
}

func TestHalts(t *testing.T) {
	for _, tt := range []struct {
		name string
		isa  ISA
		code uint32
		want bool
	}{
		{"vmx", VMX, 12, true},
		{"vmx with a flag", VMX, 1<<27 | 12, true},
		{"vmx mwait", VMX, 36, false},
		{"svm", SVM, 0x78, true},
		{"svm, vmx's code", SVM, 12, false},
		{"arm64", ARM64, 1, true},
		{"arm64 serror", ARM64, 0x41, false},
		{"none", None, 12, false},
		{"pvm, vmx's code", PVM, 12, false},
		{"unknown isa, svm's code", 77, 0x78, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := Halts(tt.isa, tt.code); got != tt.want {
				t.Errorf("Halts(%v, %#x) = %t, want %t", tt.isa, tt.code, got, tt.want)
			}
		})
	}
}

func TestKnown(t *testing.T) {
	for _, tt := range []struct {
		isa  ISA
		word string
		want bool
	}{
		{VMX, "CPUID", true}, {VMX, "cpuid", true}, {SVM, "CPUID", true}, {SVM, "PF excp", true},
		{VMX, "npf", false}, {SVM, "EPT_VIOLATION", false}, {SVM, "", false}, {VMX, "HLTT", false},
		{ARM64, "hvc64", true}, {ARM64, "IRQ", true}, {ARM64, "cpuid", false}, {ARM64, "31", true}, {None, "cpuid", false},
		{SVM, "0x1f3", true}, {VMX, "31", true}, {VMX, "0x100000000", false}, {VMX, "-1", false},
		{PVM, "hypercall", true}, {PVM, "cpuid", false}, {77, "cpuid", false}, {77, "0x72", true}, {None, "HLT", false},
	} {
		if got := Known(tt.isa, tt.word); got != tt.want {
			t.Errorf("Known(%v, %q) = %t, want %t", tt.isa, tt.word, got, tt.want)
		}
	}
	for word, want := range map[string]bool{"npf": true, "ept_violation": true, "ERETU": true, "0x1f3": true, "HLTT": false, "": false} {
		if got := KnownToAny(word); got != want {
			t.Errorf("KnownToAny(%q) = %t, want %t", word, got, want)
		}
	}
}

func TestISA(t *testing.T) {
	for isa, want := range map[ISA]string{None: "none", VMX: "vmx", SVM: "svm", PVM: "pvm", ARM64: "arm64", 77: "isa77", math.MaxUint32: "isa4294967295"} {
		if got := isa.String(); got != want {
			t.Errorf("ISA %d is %q, want %q", isa, got, want)
		}
		if got, err := ParseISA(want); err != nil || got != isa {
			t.Errorf("ParseISA(%q) = %d, %v, want %d", want, got, err, isa)
		}
	}
	for _, bad := range []string{"", "VMX", "isa(7)", "sparc", "isa", "77", "isa077", "isa2", "isa-1", "isa4294967296", "ISA77"} {
		if got, err := ParseISA(bad); err == nil || !strings.Contains(err.Error(), strconv.Quote(bad)) {
			t.Errorf("ParseISA(%q) = %v, %v, want an error that names it", bad, got, err)
		}
	}
}

// TestKernelHeaders reads the tables of names in the headers of both kernel
// series and compares. Ours may have more names than a header, not fewer or
// other ones.
func TestKernelHeaders(t *testing.T) {
	type pair struct {
		code uint32
		name string
	}
	known := map[string]bool{} // "isa code" that some header names
	for _, series := range []string{"6.1", "6.12"} {
		t.Run(series, func(t *testing.T) {
			asm := headers(t, series)
			uapi := filepath.Join(asm, "x86/include/uapi/asm")
			vectors := numbers(t, filepath.Join(uapi, "kvm.h"))
			for _, table := range []struct {
				isa         ISA
				file, macro string
				first, last pair // of the kernel's table
			}{
				{VMX, "vmx.h", "VMX_EXIT_REASONS", pair{0, "EXCEPTION_NMI"}, pair{75, "NOTIFY"}},
				{SVM, "svm.h", "SVM_EXIT_REASONS", pair{0, "read_cr0"}, pair{0xffffffff, "invalid_guest_state"}},
			} {
				file := filepath.Join(uapi, table.file)
				defs := numbers(t, file)
				for name, n := range vectors {
					defs[name] = n
				}
				kernel := names(t, file, table.macro, defs)
				// The parser has seen the table from end to end.
				for _, end := range []pair{table.first, table.last} {
					if kernel[end.code] != end.name {
						t.Errorf("%s: %#x reads as %q, want %q", file, end.code, kernel[end.code], end.name)
					}
				}
				got := map[uint32]string{}
				for code := range kernel {
					got[code] = Name(table.isa, code)
					known[fmt.Sprint(table.isa, code)] = true
				}
				if diff := cmp.Diff(kernel, got); diff != "" {
					t.Errorf("%s: names differ (-kernel +ours):\n%s", file, diff)
				}
			}
			flags := names(t, filepath.Join(uapi, "vmx.h"), "VMX_EXIT_REASON_FLAGS", numbers(t, filepath.Join(uapi, "vmx.h")))
			if diff := cmp.Diff(map[uint32]string{vmxFailedEntry: "FAILED_VMENTRY"}, flags); diff != "" {
				t.Errorf("flags of VMX exit reasons (-ours +kernel):\n%s", diff)
			}

			kernel := arm64(t, filepath.Join(asm, "arm64/include/asm"))
			got := map[uint32]string{}
			for code := range kernel {
				got[code] = Name(ARM64, code)
				known[fmt.Sprint(ARM64, code)] = true
			}
			if diff := cmp.Diff(kernel, got); diff != "" {
				t.Errorf("arm64: names differ (-kernel +ours):\n%s", diff)
			}
		})
	}
	if t.Failed() || len(known) == 0 {
		return
	}
	for isa, table := range map[ISA]map[uint32]string{VMX: vmxNames, SVM: svmNames, ARM64: arm64Names} {
		for code, name := range table {
			if !known[fmt.Sprint(isa, code)] {
				t.Errorf("%v %#x, %q, is in no header", isa, code, name)
			}
		}
	}
}

// arm64 reads what the kernel calls exception classes, and exits without one.
func arm64(t *testing.T, asm string) map[uint32]string {
	table := map[uint32]string{}
	for _, part := range []struct {
		file, prefix string
		above        uint32
		not          []string
		last         string // that the parser must have seen
	}{
		{"esr.h", "ESR_ELx_EC_", 0, []string{"MAX", "SHIFT", "WIDTH"}, "BRK64"},
		{"kvm_asm.h", "ARM_EXCEPTION_", arm64Type, []string{"TRAP"}, "HYP_GONE"},
	} {
		defs := numbers(t, filepath.Join(asm, part.file))
		if part.file == "kvm_asm.h" {
			defs["ARM_EXCEPTION_HYP_GONE"] = numbers(t, filepath.Join(asm, "virt.h"))["HVC_STUB_ERR"]
		}
		seen := false
		for full, n := range defs {
			name, ok := strings.CutPrefix(full, part.prefix)
			if !ok || slices.Contains(part.not, name) {
				continue
			}
			seen = seen || name == part.last
			if was, ok := table[n|part.above]; ok {
				t.Errorf("%s: %#x is both %q and %q", part.file, n, was, name)
			}
			table[n|part.above] = name
		}
		if !seen {
			t.Errorf("%s: no %s%s", part.file, part.prefix, part.last)
		}
	}
	return table
}

// headers is the folder of a kernel series' architectures. Without it there is
// nothing to prove: locally that is a skip, in CI a failure.
func headers(t *testing.T, series string) string {
	// Installed on this host, or unpacked by "make headers".
	const dir = "usr/src/linux-headers-%s.*-common/arch"
	for _, root := range []string{"/", "../../build/lab/headers/*"} {
		found, err := filepath.Glob(filepath.Join(root, fmt.Sprintf(dir, series)))
		if err != nil {
			t.Fatal(err)
		}
		if len(found) > 0 {
			return found[len(found)-1]
		}
	}
	const want = "no headers of a %s kernel: make headers"
	if os.Getenv("CI") == "true" {
		t.Fatalf(want, series)
	}
	t.Skipf(want, series)
	return ""
}

// numbers reads the integer constants that a header defines.
func numbers(t *testing.T, file string) map[string]uint32 {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	defs := map[string]uint32{}
	for _, m := range regexp.MustCompile(`(?m)^#define\s+(\w+)\s+(?:UL)?\(?(-?\w+)\)?(?:\s*/\*.*)?\s*$`).FindAllStringSubmatch(string(text), -1) {
		if n, err := strconv.ParseInt(m[2], 0, 64); err == nil {
			defs[m[1]] = uint32(n)
		}
	}
	return defs
}

// names reads a macro that lists { code, "name" } pairs.
func names(t *testing.T, file, macro string, defs map[string]uint32) map[uint32]string {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	joined := strings.ReplaceAll(string(text), "\\\n", " ")
	body := regexp.MustCompile(`(?m)^#define\s+` + macro + `\s(.*)$`).FindStringSubmatch(joined)
	if body == nil {
		t.Fatalf("%s: no %s", file, macro)
	}
	table := map[uint32]string{}
	for _, m := range regexp.MustCompile(`\{([^,]*),\s*"([^"]*)"\s*\}`).FindAllStringSubmatch(body[1], -1) {
		var code uint32
		for term := range strings.SplitSeq(m[1], "+") {
			n, ok := defs[strings.TrimSpace(term)]
			if !ok {
				t.Fatalf("%s: %q is not a number", file, term)
			}
			code += n
		}
		if was, ok := table[code]; ok {
			t.Errorf("%s: %#x is both %q and %q", file, code, was, m[2])
		}
		table[code] = m[2]
	}
	if n := strings.Count(body[1], "{"); n != len(table) {
		t.Errorf("%s: %s lists %d names, read %d", file, macro, n, len(table))
	}
	return table
}
