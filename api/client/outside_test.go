// SPDX-License-Identifier: Apache-2.0

package client

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// TestOutside builds the Go program in docs/API.md in a module of its own, as the
// document tells.
func TestOutside(t *testing.T) {
	doc, err := os.ReadFile("../../docs/API.md")
	if err != nil {
		t.Fatal(err)
	}
	program := regexp.MustCompile("(?ms)^```go\n(.*?)^```$").FindSubmatch(doc)
	if program == nil {
		t.Fatal("no program in docs/API.md")
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "main.go"), program[1], 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"mod", "init", "example.org/watcher"},
		{"mod", "edit", "-replace", "virtexit=" + root},
		{"get", "virtexit/api/client"},
		{"vet", "."},
		{"build", "-o", os.DevNull, "."},
	} {
		cmd := exec.Command("go", args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %q: %v\n%s", args, err, out)
		}
	}
}
