// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"virtexit/api"
	"virtexit/test/lab/inside"
)

// example is a block of a document.
type example struct{ language, text string }

func (e example) String() string { return "```" + e.language + "\n" + e.text + "```" }

func examples(t *testing.T, file string) (all []example) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile("(?ms)^```([a-z]+)\n(.*?)^```$").FindAllStringSubmatch(string(b), -1) {
		all = append(all, example{m[1], m[2]})
	}
	return all
}

// TestAPIExamples does what docs/API.md tells to do, and has it say what that says.
func TestAPIExamples(t *testing.T) {
	inside.Load(t, "")
	d := start(t, options{interval: "30s"}) // no period ends between two requests, but for bad luck
	create(t, domain{name: "web", os: rom(t, "cpuid:10,out:0x80:5,spin:200000", true)})
	inside.Eventually(t, "web exits", 30*time.Second, func() bool { return d.find("web").Count > 0 })
	dir := t.TempDir()
	do := func(e example) string {
		t.Helper()
		name, args := "sh", []string{"-ec", strings.ReplaceAll(e.text, api.DefaultSocket, d.socket)}
		if e.language == "python" {
			name, args = "python3", []string{"-c", args[1]}
		}
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%v\n%s", err, e, out)
		}
		return string(out)
	}
	var last string
	for _, e := range examples(t, "../../../docs/API.md") {
		switch e.language {
		case "go": // built by a test of api/client
		case "json":
			if last != e.text {
				t.Errorf("got %s, the document says %s", last, e.text)
			}
		case "python":
			out := do(e)
			lines := regexp.MustCompile(`(?m)^([123]) web ([1-9][0-9]*) \[('(cpuid|io|interrupt)'(, )?)+\]$`).FindAllStringSubmatch(out, -1)
			if len(lines) != 3 || lines[0][1] != "1" || lines[2][1] != "3" {
				t.Errorf("%v\nprints\n%s", e, out)
			}
		case "sh":
			if strings.Contains(e.text, "--etag-compare") {
				if out := do(e); !strings.HasSuffix(out, "304\n") && !strings.HasSuffix(do(e), "304\n") { // a period may have ended
					t.Errorf("%v\nprints\n%s", e, out)
				}
				continue
			}
			last = do(e)
			for line := range strings.Lines(last) {
				var answer struct {
					Schema   string       `json:"schema"`
					Error    string       `json:"error"`
					Interval int64        `json:"interval_ns"`
					Domains  []api.Domain `json:"domains"`
				}
				if err := json.Unmarshal([]byte(line), &answer); err != nil || answer.Schema != api.Schema {
					t.Errorf("%v\nprints\n%s", e, last)
				}
				if asked := strings.Contains(e.text, "nobody"); (answer.Error != "") != asked {
					t.Errorf("%v\nprints\n%s", e, last)
				}
				for _, d := range answer.Domains {
					if answer.Interval > 0 && fmt.Sprint(reasons(d)) != "map[cpuid:true io:true]" {
						t.Errorf("reasons %v", reasons(d))
					}
				}
			}
		default:
			t.Errorf("nobody runs\n%v", e)
		}
	}
	if s := d.status(); s.Collection != "on" || s.Level != "time" {
		t.Errorf("status %+v", s)
	}
	virsh(t, "suspend", "web")
	inside.Eventually(t, "it is paused", 10*time.Second, func() bool { return d.find("web").State == "paused" })
	d.conserve()
}

func reasons(d api.Domain) map[string]bool {
	m := make(map[string]bool)
	for _, e := range d.Exits {
		m[e.Reason] = true
	}
	return m
}
