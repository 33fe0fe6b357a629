// SPDX-License-Identifier: Apache-2.0

package rules

import (
	"bytes"
	"fmt"
	"go/format"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "virtexit/"

// arrows tells which of our packages each package may import, its tests aside.
// Data flows from exit to report; clients know nothing but the API. What is
// below test/ sees all and is seen by tests alone.
var arrows = map[string][]string{
	"api":                        {},
	"api/client":                 {"api"},
	"cmd/virtexit":               {"api", "api/client", "internal/report"},
	"cmd/virtexit-vdsm-hook":     {"api", "api/client"},
	"cmd/virtexitd":              {"api", "internal/daemon", "internal/ledger", "internal/prom", "internal/server", "internal/snapshot", "internal/source", "internal/source/ebpf", "internal/source/kmod", "internal/source/kvmstats", "internal/source/replay", "vmmap"},
	"internal/abi":               {},
	"internal/daemon":            {"api", "internal/exitreason", "internal/ledger", "internal/snapshot", "internal/source", "vmmap"},
	"internal/exitreason":        {},
	"internal/ledger":            {"internal/exitreason", "internal/snapshot"},
	"internal/prom":              {"api", "internal/exitreason", "internal/ledger", "internal/snapshot", "vmmap"},
	"internal/report":            {"api"},
	"internal/rules":             {},
	"internal/server":            {"api", "internal/exitreason"},
	"internal/slots":             {"internal/abi", "internal/exitreason", "internal/snapshot", "internal/source"},
	"internal/snapshot":          {"internal/exitreason"},
	"internal/source":            {"internal/exitreason", "internal/snapshot"},
	"internal/source/ebpf":       {"internal/abi", "internal/exitreason", "internal/slots", "internal/snapshot", "internal/source"},
	"internal/source/kmod":       {"internal/abi", "internal/exitreason", "internal/slots", "internal/snapshot", "internal/source"},
	"internal/source/kvmstats":   {"internal/snapshot", "internal/source", "vmmap"},
	"internal/source/replay":     {"internal/exitreason", "internal/snapshot", "internal/source"},
	"internal/source/sourcetest": {"internal/exitreason", "internal/snapshot", "internal/source"},
	"vmmap":                      {"internal/snapshot"},
}

// closed holds the packages whose tests, too, import nothing of ours.
var closed = []string{"internal/abi", "internal/exitreason"}

// imports reads the sources and asks no build, so that it sees every build tag.
func imports(t tree) (problems []string) {
	for _, file := range t.files(goFile) {
		if strings.HasPrefix(file, "test/") {
			continue
		}
		pkg := path.Dir(file)
		allowed, known := arrows[pkg]
		if !known {
			problems = append(problems, fmt.Sprintf("%s: package %s has no arrows", file, pkg))
			continue
		}
		if strings.HasSuffix(file, "_test.go") && !slices.Contains(closed, pkg) {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, t[file], parser.ImportsOnly)
		if err != nil {
			problems = append(problems, err.Error())
			continue
		}
		for _, spec := range parsed.Imports {
			name, _ := strconv.Unquote(spec.Path.Value) // the parser has checked it
			if ours, ok := strings.CutPrefix(name, module); ok && !slices.Contains(allowed, ours) {
				problems = append(problems, fmt.Sprintf("%s: may not import %s", file, ours))
			}
		}
	}
	return problems
}

// mayHang matches what asks a libvirt daemon, in the one file that does so; beside
// it matches what runs beside all else.
var (
	mayHang = regexp.MustCompile(`\bl\.dial\(|\b(c|conn)\.(list|exits|close)\b`)
	beside  = regexp.MustCompile(`\bl\.call\(|^\s*go `)
)

// libvirt holds that libvirt, which may hang, is called through one file, and
// that by goroutines which nothing else waits for: no request can.
func libvirt(t tree) (problems []string) {
	const calls, waits = "vmmap/libvirt_cgo.go", "vmmap/libvirt.go"
	imports := func(file string) bool { return strings.Contains(t[file], "\"libvirt.org/go/libvirt\"") }
	for _, file := range t.files(func(file string) bool {
		return goFile(file) && !strings.HasSuffix(file, "_test.go") && file != calls && imports(file)
	}) {
		problems = append(problems, file+": only "+calls+" may import libvirt")
	}
	if !imports(calls) {
		problems = append(problems, calls+": does not import libvirt")
	}
	for line := range strings.Lines(t[waits]) {
		if mayHang.MatchString(line) && !beside.MatchString(line) {
			problems = append(problems, waits+": neither in l.call nor beside: "+strings.TrimSpace(line))
		}
	}
	for _, file := range t.files(func(file string) bool {
		return path.Dir(file) == "vmmap" && !strings.HasSuffix(file, "_test.go") && file != waits
	}) {
		if strings.Contains(t[file], ".dial(") || strings.Contains(t[file], ".call(") {
			problems = append(problems, file+": only "+waits+" may ask libvirt")
		}
	}
	return problems
}

// licences goes by folder, the longest name first.
var licences = []struct{ folder, licence string }{
	{"kmod/uapi/", "GPL-2.0-only WITH Linux-syscall-note"},
	{"kmod/", "GPL-2.0-only"},
	{"kvm-patch/", "GPL-2.0-only"},
	{"internal/source/ebpf/bpf/", "GPL-2.0-only"},
	{"", "Apache-2.0"},
}

// unmarked matches files that carry no licence of their own: data, what bpf2go
// makes, and formats without comments.
var unmarked = regexp.MustCompile(`(^|/)testdata/|_bpfel\.(go|o)$|^LICENSES/|\.(json|patch|sum)$`)

var licenceTag = regexp.MustCompile(`^\W*SPDX-License-Identifier: (.*?)( \*/| -->)?$`)

func spdx(t tree) (problems []string) {
	for _, file := range t.files(func(file string) bool { return !unmarked.MatchString(file) }) {
		first, rest, _ := strings.Cut(t[file], "\n")
		if strings.HasPrefix(first, "#!") {
			first, _, _ = strings.Cut(rest, "\n")
		}
		want := ""
		for _, l := range licences {
			if strings.HasPrefix(file, l.folder) {
				want = l.licence
				break
			}
		}
		got := ""
		if m := licenceTag.FindStringSubmatch(first); m != nil {
			got = m[1]
		}
		if got != want {
			problems = append(problems, fmt.Sprintf("%s: licence %q, want %q in the first line, or behind #!", file, got, want))
		}
	}
	for _, l := range licences {
		for id := range strings.SplitSeq(l.licence, " WITH ") {
			if t["LICENSES/"+id+".txt"] == "" {
				problems = append(problems, "LICENSES/"+id+".txt: missing")
			}
		}
	}
	return problems
}

var kernelVersion = regexp.MustCompile(`LINUX_VERSION_\w+|KERNEL_VERSION|RHEL_RELEASE_\w+|UTS_RELEASE|(linux|generated)/(version|utsrelease)\.h`)

func kernelVersions(t tree) (problems []string) {
	for _, file := range t.files(func(file string) bool { return strings.HasPrefix(file, "kmod/") && file != "kmod/compat.h" }) {
		if found := kernelVersion.FindString(t[file]); found != "" {
			problems = append(problems, fmt.Sprintf("%s: %s outside compat.h", file, found))
		}
	}
	return problems
}

func versions(t tree) (problems []string) {
	want := t.find("kmod/vx.h", `^#define VX_VERSION "(.*)"$`)
	if want == "" {
		problems = append(problems, "kmod/vx.h: no VX_VERSION")
	}
	for file, expression := range map[string]string{
		"kmod/dkms.conf": `^PACKAGE_VERSION="(.*)"$`,
		"CHANGELOG.md":   `^## \[(.*?)\]`,
	} {
		if got := t.find(file, expression); got != want {
			problems = append(problems, fmt.Sprintf("%s: version %q, kmod/vx.h has %q", file, got, want))
		}
	}
	return problems
}

// kernels holds that DKMS builds for the kernels that were tested and no other
// series.
func kernels(t tree) (problems []string) {
	series, err := regexp.Compile(t.find("kmod/dkms.conf", `^BUILD_EXCLUSIVE_KERNEL="(.*)"$`))
	if err != nil {
		return []string{"kmod/dkms.conf: " + err.Error()}
	}
	tested := regexp.MustCompile(`(?m)^\| (\d+\.\d+\S*) \|`).FindAllStringSubmatch(t["docs/KERNELS.md"], -1)
	if len(tested) == 0 {
		problems = append(problems, "docs/KERNELS.md: lists no kernel")
	}
	for _, release := range tested {
		if !series.MatchString(release[1]) {
			problems = append(problems, fmt.Sprintf("kmod/dkms.conf: does not build for %s, which docs/KERNELS.md lists", release[1]))
		}
	}
	for _, release := range []string{"5.6.1.0", "6.0.19", "6.10.9", "6.11.0", "6.13.0", "6.120.1", "16.1.0"} {
		if series.MatchString(release) {
			problems = append(problems, "kmod/dkms.conf: builds for "+release)
		}
	}
	return problems
}

func readme(t tree) (problems []string) {
	for _, name := range []string{"make demo", "make test", "docs/KERNELS.md"} {
		if !strings.Contains(t["README.md"], name) {
			problems = append(problems, "README.md: does not name "+name)
		}
	}
	return problems
}

var link = regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)

func links(t tree) (problems []string) {
	for _, file := range t.files(func(file string) bool { return path.Ext(file) == ".md" }) {
		for _, m := range link.FindAllStringSubmatch(t[file], -1) {
			target := path.Join(path.Dir(file), m[1])
			if len(t.files(func(file string) bool { return file == target || strings.HasPrefix(file, target+"/") })) == 0 {
				problems = append(problems, fmt.Sprintf("%s: link to %s leads nowhere", file, m[1]))
			}
		}
	}
	return problems
}

var yamlKey = regexp.MustCompile(`^(\w+):`)

// configKeys: keys that belong together may share what is said of them. That
// every key is in the file, the daemon's own tests hold.
func configKeys(t tree) (problems []string) {
	const file = "configs/virtexitd.yaml"
	before := ""
	for line := range strings.Lines(t[file]) {
		if m := yamlKey.FindStringSubmatch(line); m != nil && strings.TrimSpace(before) == "" {
			problems = append(problems, file+": nothing says what "+m[1]+" is")
		}
		before = line
	}
	return problems
}

func gofmt(t tree) (problems []string) {
	for _, file := range t.files(goFile) {
		text := []byte(t[file])
		formatted, err := format.Source(text)
		if err != nil {
			problems = append(problems, file+": "+err.Error())
		} else if !bytes.Equal(text, formatted) {
			problems = append(problems, file+": gofmt would change it")
		}
	}
	return problems
}

// tree is a repository: the text of each file by its path.
type tree map[string]string

// files lists those whose path matches, in order.
func (t tree) files(matches func(string) bool) []string {
	return slices.DeleteFunc(slices.Sorted(maps.Keys(t)), func(file string) bool { return !matches(file) })
}

func goFile(file string) bool { return path.Ext(file) == ".go" }

// find returns what the expression's group matches first.
func (t tree) find(file, expression string) string {
	m := regexp.MustCompile(`(?m)` + expression).FindStringSubmatch(t[file])
	if m == nil {
		return ""
	}
	return m[1]
}

// load reads all files but git's own and those that .gitignore names.
func load(root fs.FS) (tree, error) {
	ignore, err := fs.ReadFile(root, ".gitignore")
	if err != nil {
		return nil, err
	}
	skip := []string{".git"}
	for line := range strings.Lines(string(ignore)) {
		skip = append(skip, strings.Trim(line, "/\n"))
	}
	t := tree{}
	err = fs.WalkDir(root, ".", func(name string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case slices.Contains(skip, name):
			if entry.IsDir() {
				return fs.SkipDir
			}
		case entry.Type().IsRegular():
			text, err := fs.ReadFile(root, name)
			if err != nil {
				return err
			}
			t[name] = string(text)
		}
		return nil
	})
	return t, err
}

// rules with what breaks them: files put over the repository's own.
var rules = []struct {
	name   string
	check  func(tree) []string
	broken map[string]map[string]string
}{
	{"imports", imports, map[string]map[string]string{
		"the CLI reads snapshots":       {"cmd/virtexit/x.go": "package main\nimport _ \"virtexit/internal/snapshot\"\n"},
		"report reads snapshots":        {"internal/report/x.go": "package report\nimport _ \"virtexit/internal/snapshot\"\n"},
		"backwards, under a build tag":  {"internal/snapshot/x.go": "//go:build plan9\n\npackage snapshot\nimport _ \"virtexit/internal/ledger\"\n"},
		"abi is not alone":              {"internal/abi/x.go": "package abi\nimport _ \"virtexit/internal/exitreason\"\n"},
		"exitreason's test is not":      {"internal/exitreason/x_test.go": "package exitreason\nimport _ \"virtexit/internal/abi\"\n"},
		"the lab outside tests":         {"vmmap/x.go": "package vmmap\nimport _ \"virtexit/test/lab\"\n"},
		"a package nobody has drawn":    {"internal/new/x.go": "package new\n"},
		"an import that does not parse": {"api/x.go": "package api\nimport (\n"},
	}},
	{"libvirt", libvirt, map[string]map[string]string{
		"the daemon asks":       {"internal/daemon/x.go": "package daemon\nimport \"libvirt.org/go/libvirt\"\n"},
		"the map asks":          {"vmmap/map.go": "package vmmap\nfunc f(m *Map) { m.libvirt.dial(\"\") }\n"},
		"who asks is not known": {"vmmap/libvirt.go": "package vmmap\nfunc f() { c.list() }\n"},
		"who asks waits":        {"vmmap/libvirt.go": "package vmmap\nfunc f() {\n\tr.conn.exits()\n}\n"},
		"the file is another's": {"vmmap/libvirt_cgo.go": "package vmmap\n"},
	}},
	{"spdx", spdx, map[string]map[string]string{
		"none":                    {"api/x.go": "package api\n"},
		"too late":                {"api/x.go": "\n// SPDX-License-Identifier: Apache-2.0\n"},
		"nothing at all":          {"api/x.go": ""},
		"the module under Apache": {"kmod/x.c": "// SPDX-License-Identifier: Apache-2.0\n"},
		"uapi without the note":   {"kmod/uapi/x.h": "/* SPDX-License-Identifier: GPL-2.0-only */\n"},
		"Go under the GPL":        {"vmmap/x.go": "// SPDX-License-Identifier: GPL-2.0-only\n"},
		"wrong behind a tag":      {"vmmap/x.go": "//go:build lab\n\n// SPDX-License-Identifier: GPL-2.0-only\n"},
		"more than one line":      {"test/x.sh": "#!/bin/sh\n\n# SPDX-License-Identifier: Apache-2.0\n"},
		"a text is missing":       {"LICENSES/Linux-syscall-note.txt": ""},
	}},
	{"kernelVersions", kernelVersions, map[string]map[string]string{
		"code":    {"kmod/x.c": "#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0)\n"},
		"header":  {"kmod/x.h": "#include <linux/version.h>\n"},
		"release": {"kmod/x.c": "UTS_RELEASE\n"},
	}},
	{"versions", versions, map[string]map[string]string{
		"module":      {"kmod/vx.h": "#define VX_VERSION \"9.9.9\"\n"},
		"no version":  {"kmod/vx.h": ""},
		"dkms":        {"kmod/dkms.conf": "PACKAGE_VERSION=\"9.9.9\"\n"},
		"changelog":   {"CHANGELOG.md": "## [9.9.9] - unreleased\n## [0.1.0]\n"},
		"none at all": {"kmod/vx.h": "", "kmod/dkms.conf": "", "CHANGELOG.md": ""},
	}},
	{"kernels", kernels, map[string]map[string]string{
		"any kernel":       {"kmod/dkms.conf": ""},
		"too wide":         {"kmod/dkms.conf": "BUILD_EXCLUSIVE_KERNEL=\"^6\\.1\"\n"},
		"too narrow":       {"kmod/dkms.conf": "BUILD_EXCLUSIVE_KERNEL=\"^6\\.1\\.\"\n"},
		"no expression":    {"kmod/dkms.conf": "BUILD_EXCLUSIVE_KERNEL=\"(\"\n"},
		"nothing is known": {"docs/KERNELS.md": "# Kernels\n"},
	}},
	{"readme", readme, map[string]map[string]string{
		"says nothing": {"README.md": "# virtexit\n"},
	}},
	{"links", links, map[string]map[string]string{
		"to nowhere": {"docs/x.md": "[kernels](docs/KERNELS.md)"},
	}},
	{"configKeys", configKeys, map[string]map[string]string{
		"unsaid": {"configs/virtexitd.yaml": "# a\na: 1\n\nb: 2\n"},
	}},
	{"gofmt", gofmt, map[string]map[string]string{
		"spaces": {"api/x.go": "package api\n\nfunc  f() {}\n"},
		"no Go":  {"api/x.go": "pack age api\n"},
	}},
}

func TestRules(t *testing.T) {
	repository, err := load(os.DirFS("../.."))
	if err != nil {
		t.Fatal(err)
	}
	for _, rule := range rules {
		t.Run(rule.name, func(t *testing.T) {
			kept := rule.check(repository)
			for _, problem := range kept {
				t.Error(problem)
			}
			for name, files := range rule.broken {
				t.Run(name, func(t *testing.T) {
					broken := maps.Clone(repository)
					maps.Copy(broken, files)
					problems := rule.check(broken)
					if !slices.ContainsFunc(problems, func(problem string) bool { return !slices.Contains(kept, problem) }) {
						t.Error("the rule does not notice")
					}
				})
			}
		})
	}
}

// A package that has gone takes its rights along.
func TestArrows(t *testing.T) {
	for from, to := range arrows {
		for _, pkg := range append([]string{from}, to...) {
			if _, err := os.Stat("../../" + pkg); err != nil {
				t.Error(err)
			}
		}
	}
}
