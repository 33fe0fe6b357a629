// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// RunTests builds the tests of a package, named as for go test, runs them in one machine and gives each test and subtest
// its counterpart below t, with its output. Tests that never reported fail. A test that skips fails as well, unless what
// it says begins with "machine:": then it lacks something that this machine cannot have.
//
// A package whose tests run on the host as well keeps those for the lab behind a build tag: pass "-tags=TAG". Command, Dir
// and Output are not the caller's to set. The list of tests is asked on the host, which runs the package's TestMain.
func RunTests(t *testing.T, c Config, pkg string, buildFlags ...string) {
	t.Helper()
	c.Require(t)
	bin, err := buildDir("bin")
	if err != nil {
		t.Fatal(err)
	}
	bin, err = os.MkdirTemp(bin, "")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(bin)
	binary := filepath.Join(bin, "tests")
	if c.Name == "" {
		c.Name = strings.ReplaceAll(t.Name(), "/", "_")
	}
	c.Command = []string{binary}
	c, err = c.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	env := os.Environ()
	if c.Emulator != QEMU {
		env = append(env, "CGO_ENABLED=0") // there are no shared libraries
	}
	listed := binary
	if c.Emulator == ARM64 { // this host runs another build of the same tests
		listed = filepath.Join(bin, "listed")
		if _, err := buildTests(listed, pkg, buildFlags, env); err != nil {
			t.Fatal(err)
		}
		env = append(env, "GOARCH=arm64")
	}
	if c.Dir, err = buildTests(binary, pkg, buildFlags, env); err != nil {
		t.Fatal(err)
	}
	want, err := listTests(listed, c.Dir)
	if err != nil {
		t.Fatal(err)
	}

	// The tests' own time limit comes first, since it tells what hangs. Where instructions are time, idle time is skipped.
	limit := c.Timeout * 3 / 4
	if c.Icount {
		limit = 0
	}
	c.Command = append(c.Command, "-test.v=test2json", "-test.timeout="+limit.String())
	c.Files = append(slices.Clone(c.Files), binary)
	var output bytes.Buffer
	c.Output = &output
	result, runErr := Run(t.Context(), c)
	t.Logf("boot %.1f s, tests %.1f s, console %s", result.Boot.Seconds(), result.Command.Seconds(), result.Console)
	root, err := parseTests(output.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	root.reportSubtests(t)

	var got []string
	for _, test := range root.subtests {
		if test.verdict != "" {
			got = append(got, test.name)
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("verdicts of %d tests, want %d\ngot:  %s\nwant: %s", len(got), len(want), got, want)
	}
	if runErr != nil {
		t.Errorf("%v\n%s", runErr, root.output.String())
	}
	if result.Complaint != "" {
		t.Errorf("the kernel complains, see %s:\n  %s", result.Console, result.Complaint)
	}
}

// buildTests returns the package's directory, where its tests expect to run.
func buildTests(binary, pkg string, flags, env []string) (dir string, err error) {
	build := exec.Command("go", append(append([]string{"test", "-c", "-o", binary}, flags...), pkg)...)
	build.Env = env
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build tests of %s: %w\n%s", pkg, err, out)
	}
	if _, err := os.Stat(binary); err != nil {
		return "", fmt.Errorf("build tests of %s: there are none", pkg)
	}
	list := exec.Command("go", append(append([]string{"list", "-f", "{{.Dir}}"}, flags...), pkg)...)
	list.Env = env
	out, err := list.Output()
	if err != nil {
		return "", fmt.Errorf("directory of %s: %w", pkg, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// listTests names what a test binary runs when it is not asked for benchmarks.
func listTests(binary, dir string) ([]string, error) {
	cmd := exec.Command(binary, "-test.list=^(Test|Fuzz|Example)")
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("list tests: %w\n%s", err, out)
	}
	names := strings.Fields(string(out))
	if len(names) == 0 {
		return nil, fmt.Errorf("%s holds no tests", binary)
	}
	return names, nil
}

// testRun is what a test inside the machine reported.
type testRun struct {
	name     string // within its parent
	verdict  string // pass, fail, skip; empty where none came
	output   strings.Builder
	subtests []*testRun // in the order in which they started
}

// parseTests reads the output of -test.v=test2json. Its result stands for the whole binary.
func parseTests(output []byte) (*testRun, error) {
	cmd := exec.Command("go", "tool", "test2json")
	cmd.Stdin = bytes.NewReader(output)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stream, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("test2json: %w: %s", err, stderr.Bytes())
	}
	root := &testRun{}
	all := map[string]*testRun{"": root}
	for events := json.NewDecoder(bytes.NewReader(stream)); ; {
		var event struct{ Action, Test, Output string }
		if err := events.Decode(&event); err == io.EOF {
			return root, nil
		} else if err != nil {
			return nil, fmt.Errorf("test2json: %w", err)
		}
		test := all[event.Test]
		if test == nil {
			parent := event.Test
			for all[parent] == nil { // a subtest's own name may hold slashes
				parent = parent[:max(0, strings.LastIndexByte(parent, '/'))]
			}
			test = &testRun{name: strings.TrimPrefix(event.Test[len(parent):], "/")}
			all[parent].subtests = append(all[parent].subtests, test)
			all[event.Test] = test
		}
		switch event.Action {
		case "output":
			test.output.WriteString(event.Output)
		case "pass", "fail", "skip":
			test.verdict = event.Action
		}
	}
}

// skipMachine matches a skip for want of something that the machine cannot have.
var skipMachine = regexp.MustCompile(`(?m)^\s+\S+\.go:\d+: machine:`)

func (r *testRun) reportSubtests(t *testing.T) {
	for _, sub := range r.subtests {
		t.Run(sub.name, sub.report)
	}
}

func (r *testRun) report(t *testing.T) {
	r.reportSubtests(t)
	if output := strings.TrimRight(r.output.String(), "\n"); output != "" {
		t.Log("inside:\n" + output)
	}
	switch r.verdict {
	case "pass":
	case "fail":
		t.Fail()
	case "skip":
		if !skipMachine.MatchString(r.output.String()) {
			t.Error("skipped in the lab")
		} else if !t.Failed() {
			t.SkipNow()
		}
	default:
		t.Error("no verdict: the machine or the test binary ended first")
	}
}
