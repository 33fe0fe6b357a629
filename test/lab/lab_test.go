// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestRun(t *testing.T) {
	Config{}.Require(t)
	Config{Emulator: ARM64}.Require(t)
	release := func(version string) string {
		k, err := FindKernel(version)
		if err != nil {
			t.Fatal(err)
		}
		return k.Release
	}
	tests := []struct {
		name   string
		config Config
		want   string // output
		check  func(error) bool
	}{
		{
			name:   "6.1",
			config: Config{Kernel: "6.1", Command: []string{"uname", "-r"}},
			want:   release("6.1") + "\n",
			check:  func(err error) bool { return err == nil },
		},
		{
			name:   "6.12",
			config: Config{Kernel: "6.12", Command: []string{"uname", "-r"}},
			want:   release("6.12") + "\n",
			check:  func(err error) bool { return err == nil },
		},
		{
			name:   "arm64",
			config: Config{Emulator: ARM64, Kernel: "6.1-arm64", Command: []string{"sh", "-c", "uname -m; exit 7"}},
			want:   "aarch64\n",
			check: func(err error) bool {
				var exit *ExitError
				return errors.As(err, &exit) && exit.Status == 7
			},
		},
		{
			name:   "output is untouched",
			config: Config{Command: []string{"printf", `a\tb\r\n\036lab: \036no newline`}},
			want:   "a\tb\r\n\036lab: \036no newline",
			check:  func(err error) bool { return err == nil },
		},
		{
			name:   "exit status",
			config: Config{Command: []string{"sh", "-c", `echo "$1" >&2; exit 7`, "sh", "it's"}},
			want:   "it's\n",
			check: func(err error) bool {
				var exit *ExitError
				return errors.As(err, &exit) && exit.Status == 7
			},
		},
		{
			name:   "panic",
			config: Config{Command: []string{"sh", "-c", "echo c >/proc/sysrq-trigger"}},
			check: func(err error) bool {
				return err != nil && strings.Contains(err.Error(), "went down without an exit status") &&
					strings.Contains(err.Error(), "Kernel panic - not syncing: sysrq triggered crash")
			},
		},
		{
			name:   "arm64 panic",
			config: Config{Emulator: ARM64, Kernel: "6.1-arm64", Command: []string{"sh", "-c", "echo c >/proc/sysrq-trigger"}},
			check: func(err error) bool {
				return err != nil && strings.Contains(err.Error(), "went down without an exit status") &&
					strings.Contains(err.Error(), "Kernel panic - not syncing: sysrq triggered crash")
			},
		},
		{
			name:   "timeout",
			config: Config{Command: []string{"sleep", "1000"}, Timeout: 20 * time.Second},
			check:  func(err error) bool { return errors.Is(err, context.DeadlineExceeded) },
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var output bytes.Buffer
			test.config.Name = filepath.Base(t.Name())
			test.config.Output = &output
			result, err := Run(t.Context(), test.config)
			t.Logf("boot %.1f s, command %.1f s", result.Boot.Seconds(), result.Command.Seconds())
			if !test.check(err) {
				t.Errorf("error: %v", err)
			}
			if diff := cmp.Diff(test.want, output.String()); diff != "" {
				t.Errorf("output (-want +got):\n%s", diff)
			}
		})
	}
}

func TestMissing(t *testing.T) {
	Require(t, "apt-cache")
	for _, test := range []struct {
		name string
		find func() error
		want string // part of the error
	}{
		{"series", func() error { _, err := Release("6.99-rt"); return err }, "no kernel 6.99-rt"},
		{"series of arm64", func() error { _, err := Release("6.99-arm64"); return err }, "no kernel 6.99-arm64"},
		{"debug kernel", func() error { _, err := FindKernel("6.99-debug"); return err }, "make lab-debug-kernel"},
		{"headers", func() error { _, err := FindHeaders("6.1.0-1-rt-amd64"); return err }, "no package linux-headers-6.1.0-1-rt-amd64"},
		{"source of a kernel without headers", func() error { _, err := FindSource("6.1.0-1-amd64", false); return err }, "no package linux-headers-6.1.0-1-amd64"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := test.find(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want one with %q", err, test.want)
			}
		})
	}
}

// verdictsVar makes TestVerdicts run the tests that fail, in a process of its own.
const verdictsVar = "VIRTEXIT_LAB_TEST_VERDICTS"

func TestVerdicts(t *testing.T) {
	Config{}.Require(t)
	if os.Getenv(verdictsVar) != "" {
		RunTests(t, Config{}, "./testdata/verdicts")
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestVerdicts$", "-test.v")
	cmd.Env = append(os.Environ(), verdictsVar+"=1")
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Error("failures in the machine went unnoticed")
	}
	var got []string
	for _, match := range regexp.MustCompile(`(?m)^ *--- (\w+: TestVerdicts\S*)`).FindAllSubmatch(out, -1) {
		got = append(got, string(match[1]))
	}
	want := []string{
		"FAIL: TestVerdicts",
		"PASS: TestVerdicts/TestPass",
		"PASS: TestVerdicts/TestPass/with/slash",
		"FAIL: TestVerdicts/TestFail",
		"FAIL: TestVerdicts/TestFail/sub",
		"SKIP: TestVerdicts/TestSkipMachine",
		"FAIL: TestVerdicts/TestSkip",
		"FAIL: TestVerdicts/TestExit",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("verdicts (-want +got):\n%s", diff)
	}
	for _, text := range []string{"said inside", "verdicts of 4 tests, want 6", "exit status 3 in the lab"} {
		if !bytes.Contains(out, []byte(text)) {
			t.Errorf("no %q", text)
		}
	}
	if t.Failed() {
		t.Logf("%s", out)
	}
}

func TestPortInPieces(t *testing.T) {
	const text = "\x1elab: started\none\x1etwo\x1elab: exit\n\x1elab: exit status 12\n"
	for size := 1; size <= len(text); size++ {
		var out bytes.Buffer
		p := &port{out: &out}
		for rest := []byte(text); len(rest) > 0; rest = rest[min(size, len(rest)):] {
			if _, err := p.Write(rest[:min(size, len(rest))]); err != nil {
				t.Fatal(err)
			}
		}
		if diff := cmp.Diff("one\x1etwo\x1elab: exit\n", out.String()); diff != "" {
			t.Errorf("output in pieces of %d (-want +got):\n%s", size, diff)
		}
		if p.started.IsZero() || p.ended.IsZero() || p.status != 12 {
			t.Errorf("in pieces of %d: started %v, ended %v, status %d", size, p.started, p.ended, p.status)
		}
	}
}
