// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"virtexit/internal/source"
	"virtexit/test/lab"
)

// TestGenerated holds that the programs in the repository are those of the source.
func TestGenerated(t *testing.T) {
	lab.Require(t, "clang-14", "llvm-strip-14", "/usr/include/bpf/bpf_helpers.h")
	files := []string{"collector_bpfel.go", "collector_bpfel.o"}
	kept := make(map[string][]byte)
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		kept[f] = text
	}
	dir := t.TempDir()
	// The very command of generate.go, with another folder for what it writes.
	text, err := os.ReadFile("generate.go")
	if err != nil {
		t.Fatal(err)
	}
	_, command, ok := strings.Cut(string(text), "//go:generate go tool bpf2go ")
	if !ok {
		t.Fatal("generate.go does not call bpf2go")
	}
	cmd := exec.Command("sh", "-c", "exec go tool bpf2go -output-dir "+dir+" "+command)
	cmd.Env = append(os.Environ(), "GOPACKAGE=ebpf", "GOFILE=generate.go")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, f := range files {
		made, err := os.ReadFile(filepath.Join(dir, f))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(made, kept[f]) {
			t.Errorf("%s is stale: go generate ./internal/source/ebpf", f)
		}
	}
}

func TestAble(t *testing.T) {
	const all, bpf, perfmon = "000001ffffffffff", "0000008000000000", "0000004000000000"
	tests := []struct {
		name       string
		caps       string
		lockdown   string // empty: the kernel has none
		btf        bool
		text       string // of the error; empty: none
		permission bool
	}{
		{"root", all, "", true, "", false},
		{"both", "000000c000000000", "none integrity confidentiality", true, "", false},
		{"sysadmin", "0000000000200000", "", true, "", false},
		{"integrity", all, "none [integrity] confidentiality", true, "", false},
		{"confidentiality", all, "none integrity [confidentiality]", true, "locked down for confidentiality", false},
		{"no types", all, "", false, "CONFIG_DEBUG_INFO_BTF", false},
		{"bpf alone", bpf, "", true, "needs CAP_PERFMON:", true},
		{"perfmon alone", perfmon, "", true, "needs CAP_BPF:", true},
		{"nobody", "0000000000000000", "", true, "needs CAP_BPF and CAP_PERFMON:", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			write := func(path, text string) {
				t.Helper()
				path = filepath.Join(root, path)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
					t.Fatal(err)
				}
			}
			write("proc/self/status", "Name:\tvirtexitd\nCapEff:\t"+tt.caps+"\nCapBnd:\t0\n")
			if tt.lockdown != "" {
				write("sys/kernel/security/lockdown", tt.lockdown+"\n")
			}
			if tt.btf {
				write("sys/kernel/btf/vmlinux", "")
			}
			err := able(root)
			switch {
			case tt.text == "" && err != nil:
				t.Error(err)
			case tt.text != "" && (err == nil || !strings.Contains(err.Error(), tt.text)):
				t.Errorf("error is %v, want one with %q", err, tt.text)
			case tt.text != "" && !errors.Is(err, source.ErrUnavailable):
				t.Errorf("error is %v, want %v", err, source.ErrUnavailable)
			case tt.permission != errors.Is(err, os.ErrPermission):
				t.Errorf("error is %v: of permission: %t, want %t", err, !tt.permission, tt.permission)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	tests := []struct {
		name string
		err  error
		text string // empty: no error
	}{
		{"loaded", nil, ""},
		{"no such helper", fmt.Errorf("probe: %w", &ebpf.VerifierError{Cause: unix.EINVAL}), "locked down for confidentiality"},
		{"seccomp", fmt.Errorf("probe: %w", unix.EPERM), "seccomp"},
		{"security module", fmt.Errorf("probe: %w", unix.EACCES), "security module"},
		{"no such call", fmt.Errorf("probe: %w", unix.ENOSYS), "system call bpf"},
		{"other", unix.ENOMEM, "cannot allocate memory"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := refused(tt.err)
			if tt.text == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.Is(err, source.ErrUnavailable) || !errors.Is(err, tt.err) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error is %v, want %v and %v with %q", err, source.ErrUnavailable, tt.err, tt.text)
			}
		})
	}
}

func TestNear(t *testing.T) {
	log := []string{
		"; u32 id = READ(kvm_vcpu, vcpu, vcpu_id);", "0: (79) r6 = *(u64 *)(r1 +0)", "; return READ(kvm_vcpu, vcpu, stat.generic.halt_wait_ns);", "1: (b7) r1 = 0",
		"; instruction poisoned by CO-RE", "2: (85) call unknown#195896080", "invalid func unknown#195896080", "processed 3 insns (limit 1000000)",
	}
	for _, tt := range []struct {
		name string
		err  error
		want string
	}{
		{"no member", fmt.Errorf("program: %w", &ebpf.VerifierError{Cause: unix.EINVAL, Log: log}), ` near "return READ(kvm_vcpu, vcpu, stat.generic.halt_wait_ns);"`},
		{"no source", &ebpf.VerifierError{Cause: unix.EINVAL, Log: log[3:]}, ""},
		{"other", unix.EINVAL, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := near(tt.err); got != tt.want {
				t.Errorf("near is %q, want %q", got, tt.want)
			}
		})
	}
}

func TestForbidden(t *testing.T) {
	for _, tt := range []struct {
		name  string
		err   error
		blame bool // of perf_event_paranoid
	}{
		{"none", nil, false},
		{"perf", fmt.Errorf("open perf event: %w", unix.EACCES), true},
		{"tracefs", fmt.Errorf("read trace event ID: %w", &fs.PathError{Op: "open", Path: "/sys/kernel/tracing/events/kvm/kvm_exit/id", Err: unix.EACCES}), false},
		{"other", unix.ENOENT, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := forbidden(tt.err)
			if !errors.Is(err, tt.err) || (err != nil && strings.Contains(err.Error(), "perf_event_paranoid")) != tt.blame {
				t.Errorf("error is %v, which blames perf_event_paranoid: want %t, of %v", err, tt.blame, tt.err)
			}
		})
	}
}

func TestFindKVM(t *testing.T) {
	type states map[string]string
	for _, tt := range []struct {
		name   string
		dirs   []string // below /sys
		states states   // of modules that are not built in
		vendor int
		is     string // what tells one loading of the vendor from another
	}{
		{"nothing", nil, nil, noVendor, ""},
		{"kvm alone", []string{"module/kvm"}, nil, noVendor, ""},
		{"AMD", []string{"module/kvm", "module/kvm_amd", "class/misc/kvm"}, states{"kvm_amd": "live"}, 0, "module/kvm_amd"},
		{"Intel", []string{"module/kvm", "module/kvm_intel", "class/misc/kvm"}, states{"kvm_intel": "live"}, 1, "module/kvm_intel"},
		{"built in", []string{"module/kvm", "module/kvm_intel", "class/misc/kvm"}, nil, 1, "module/kvm_intel"},
		{"another", []string{"module/kvm", "module/kvm_pvm", "class/misc/kvm"}, states{"kvm_pvm": "live"}, otherVendor, "class/misc/kvm"},
		{"AMD, being loaded", []string{"module/kvm", "module/kvm_amd", "class/misc/kvm"}, states{"kvm_amd": "coming"}, noVendor, ""},
		{"Intel, while AMD is tried", []string{"module/kvm", "module/kvm_amd", "module/kvm_intel", "class/misc/kvm"},
			states{"kvm_amd": "coming", "kvm_intel": "live"}, 1, "module/kvm_intel"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			for _, dir := range tt.dirs {
				if err := os.MkdirAll(filepath.Join(root, "sys", dir), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			for module, state := range tt.states {
				if err := os.WriteFile(filepath.Join(root, "sys/module", module, "initstate"), []byte(state+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			var want loading
			if tt.dirs != nil {
				want.kvm = inode(filepath.Join(root, "sys/module/kvm"))
			}
			if tt.is != "" {
				want.vendor = inode(filepath.Join(root, "sys", tt.is))
			}
			if got, vendor := findKVM(root); got != want || vendor != tt.vendor {
				t.Errorf("findKVM = %+v, %d, want %+v, %d", got, vendor, want, tt.vendor)
			}
		})
	}
}
