// SPDX-License-Identifier: Apache-2.0

package abi

import (
	"bytes"
	"debug/dwarf"
	"debug/elf"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const header = "../../kmod/uapi/virtexit.h"

// TestFresh proves that zabi.go is what go generate makes of the header.
func TestFresh(t *testing.T) {
	needGCC(t)
	fresh := filepath.Join(t.TempDir(), "zabi.go")
	if out, err := exec.Command("go", "run", "gen.go", "-o", fresh).CombinedOutput(); err != nil {
		t.Fatalf("generate: %v\n%s", err, out)
	}
	want, err := os.ReadFile(fresh)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("zabi.go")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("zabi.go is stale, run go generate (-want +got):\n%s", diff)
	}
}

// field is where a member of a struct lies.
type field struct {
	Name         string // without case and underscores
	Offset, Size int64
}

// TestStructs compares each struct with the layout that gcc gives to it, as its
// debug information tells: cgo has no part in this reading.
func TestStructs(t *testing.T) {
	want := map[string][]field{}
	wantSize := map[string]int64{}
	for _, typ := range debugTypes(t) {
		s, ok := typ.(*dwarf.StructType)
		if !ok || !strings.HasPrefix(s.StructName, "virtexit_") {
			continue
		}
		name := plain(strings.TrimPrefix(s.StructName, "virtexit_"))
		wantSize[name] = s.ByteSize
		for _, f := range s.Field {
			want[name] = append(want[name], field{plain(f.Name), f.ByteOffset, f.Type.Size()})
		}
	}

	got := map[string][]field{}
	gotSize := map[string]int64{}
	for _, typ := range []reflect.Type{
		reflect.TypeFor[Header](), reflect.TypeFor[CPU](), reflect.TypeFor[Slot](), reflect.TypeFor[Row](),
		reflect.TypeFor[Recent](), reflect.TypeFor[Exit](),
	} {
		name := plain(typ.Name())
		gotSize[name] = int64(typ.Size())
		for f := range typ.Fields() {
			got[name] = append(got[name], field{plain(f.Name), int64(f.Offset), int64(f.Type.Size())})
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("layout differs (-header +Go):\n%s", diff)
	}
	if diff := cmp.Diff(wantSize, gotSize); diff != "" {
		t.Errorf("size differs (-header +Go):\n%s", diff)
	}

	// And no type of ours was left out of this comparison.
	var exported int
	scope := typecheck(t).Scope()
	for _, name := range scope.Names() {
		if _, ok := scope.Lookup(name).(*types.TypeName); ok {
			exported++
		}
	}
	if exported != len(got) {
		t.Errorf("the package has %d types, compared %d", exported, len(got))
	}
}

// TestConstants compares each constant with the enumerators in gcc's debug
// information and with the strings in the header's text. Those that begin with
// two underscores are the header's own affair.
func TestConstants(t *testing.T) {
	want := map[string]string{}
	for _, typ := range debugTypes(t) {
		e, ok := typ.(*dwarf.EnumType)
		if !ok {
			continue
		}
		for _, v := range e.Val {
			if strings.HasPrefix(v.Name, "VIRTEXIT_") {
				want[v.Name] = strconv.FormatInt(v.Val, 10)
			}
		}
	}
	if len(want) == 0 {
		t.Fatal("no enumerators in the debug information")
	}
	text, err := os.ReadFile(header)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^#define\s+(VIRTEXIT_\w+)[ \t]+(.+)$`).FindAllStringSubmatch(string(text), -1) {
		want[m[1]] = m[2]
		if m[2] == "(~0ULL)" {
			want[m[1]] = strconv.FormatUint(math.MaxUint64, 10)
		}
	}

	// types.go says which name in Go is which in C, zabi.go what it is worth.
	got := map[string]string{}
	scope := typecheck(t).Scope()
	tree, err := parser.ParseFile(token.NewFileSet(), "types.go", nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	paired := map[string]bool{}
	ast.Inspect(tree, func(n ast.Node) bool {
		if spec, ok := n.(*ast.ValueSpec); ok {
			c, ok := scope.Lookup(spec.Names[0].Name).(*types.Const)
			if !ok {
				t.Errorf("%s is in types.go, not in zabi.go", spec.Names[0].Name)
				return false
			}
			paired[c.Name()] = true
			got[spec.Values[0].(*ast.SelectorExpr).Sel.Name] = c.Val().ExactString()
		}
		return true
	})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("constants differ (-header +Go):\n%s", diff)
	}
	for _, name := range scope.Names() {
		if c, ok := scope.Lookup(name).(*types.Const); ok && !paired[c.Name()] {
			t.Errorf("%s is in zabi.go, not in types.go", name)
		}
	}
}

// plain strips a name of what C and Go spell differently.
func plain(name string) string {
	name = strings.ReplaceAll(strings.ToLower(name), "_", "")
	if rest, ok := strings.CutPrefix(name, "nr"); ok {
		name = "num" + rest
	}
	return name
}

func typecheck(t *testing.T) *types.Package {
	fset := token.NewFileSet()
	tree, err := parser.ParseFile(fset, "zabi.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	pkg, err := (&types.Config{Importer: importer.Default()}).Check("abi", fset, []*ast.File{tree}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return pkg
}

// debugTypes are the types that gcc saw in the header.
func debugTypes(t *testing.T) []dwarf.Type {
	needGCC(t)
	object := filepath.Join(t.TempDir(), "header.o")
	gcc := exec.Command("gcc", "-g", "-gdwarf-4", "-fno-eliminate-unused-debug-types", "-Wall", "-Werror",
		"-c", "-x", "c", "-o", object, "-")
	gcc.Stdin = strings.NewReader("#include \"" + header + "\"\n")
	if out, err := gcc.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", gcc, err, bytes.TrimSpace(out))
	}
	file, err := elf.Open(object)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	data, err := file.DWARF()
	if err != nil {
		t.Fatal(err)
	}
	var all []dwarf.Type
	for r := data.Reader(); ; {
		entry, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if entry == nil {
			return all
		}
		switch entry.Tag {
		case dwarf.TagStructType, dwarf.TagEnumerationType:
			typ, err := data.Type(entry.Offset)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, typ)
		}
	}
}

// needGCC skips a test where there is no gcc, and fails it in CI.
func needGCC(t *testing.T) {
	if _, err := exec.LookPath("gcc"); err != nil {
		const want = "no gcc: apt-get install gcc libc6-dev"
		if os.Getenv("CI") == "true" {
			t.Fatal(want)
		}
		t.Skip(want)
	}
}
