// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

var update = flag.Bool("update", false, "write the schemas in docs/openapi.yaml")

const (
	openAPI = "../docs/openapi.yaml"
	marker  = "  schemas: # generated: go test ./api -update\n"
)

// TestSchemas holds the schemas in the API's description to the types, with what
// these say of themselves.
func TestSchemas(t *testing.T) {
	have, err := os.ReadFile(openAPI)
	if err != nil {
		t.Fatal(err)
	}
	paths, schemas, found := bytes.Cut(have, []byte(marker))
	if !found {
		t.Fatalf("%s has no line %q", openAPI, marker)
	}
	var want bytes.Buffer
	enc := yaml.NewEncoder(&want)
	enc.SetIndent(2)
	if err := enc.Encode(&yaml.Node{Kind: yaml.MappingNode, Content: types(t)}); err != nil {
		t.Fatal(err)
	}
	indented := bytes.TrimSuffix(bytes.ReplaceAll(append([]byte("    "), want.Bytes()...), []byte("\n"), []byte("\n    ")), []byte("    "))
	if *update {
		if err := os.WriteFile(openAPI, bytes.Join([][]byte{paths, []byte(marker), indented}, nil), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(string(indented), string(schemas)); diff != "" {
		t.Errorf("schemas (-code +%s)\n%s", openAPI, diff)
	}
}

// types returns a schema for each of the package's structs that travel.
func types(t *testing.T) (schemas []*yaml.Node) {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	structs := make(map[string]*ast.StructType)
	type named struct{ name, doc string }
	var order []named
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range parsed.Decls {
			g, ok := decl.(*ast.GenDecl)
			if !ok || g.Tok != token.TYPE {
				continue
			}
			for _, spec := range g.Specs {
				spec := spec.(*ast.TypeSpec)
				if s, ok := spec.Type.(*ast.StructType); ok && travels(s) {
					structs[spec.Name.Name] = s
					order = append(order, named{spec.Name.Name, g.Doc.Text()})
				}
			}
		}
	}
	for _, n := range order {
		properties, required := fields(t, structs, structs[n.name])
		schema := mapping("type", text("object"))
		add(schema, "description", text(sentence(n.doc)))
		if len(required) > 0 {
			add(schema, "required", &yaml.Node{Kind: yaml.SequenceNode, Style: yaml.FlowStyle, Content: required})
		}
		add(schema, "properties", properties)
		schemas = append(schemas, text(n.name), schema)
	}
	return schemas
}

func travels(s *ast.StructType) bool {
	for _, f := range s.Fields.List {
		if f.Tag != nil {
			return true
		}
	}
	return false
}

func fields(t *testing.T, structs map[string]*ast.StructType, s *ast.StructType) (properties *yaml.Node, required []*yaml.Node) {
	t.Helper()
	properties = mapping()
	for _, f := range s.Fields.List {
		if len(f.Names) == 0 { // embedded
			name := strings.TrimPrefix(expr(f.Type), "*")
			p, r := fields(t, structs, structs[name])
			properties.Content = append(properties.Content, p.Content...)
			if !strings.HasPrefix(expr(f.Type), "*") {
				required = append(required, r...)
			}
			continue
		}
		tag := reflect.StructTag(strings.Trim(f.Tag.Value, "`")).Get("json")
		name, option, _ := strings.Cut(tag, ",")
		schema := schemaOf(t, structs, expr(f.Type), option == "omitempty")
		doc := sentence(f.Comment.Text())
		if more := sentence(f.Doc.Text()); more != "" {
			doc = strings.TrimPrefix(doc+". "+more, ". ")
		}
		if doc != "" {
			add(schema, "description", text(inJSON(s, doc)))
		}
		if option == "" {
			required = append(required, text(name))
		}
		add(properties, name, schema)
	}
	return properties, required
}

// inJSON calls fields in what is said of them as JSON does.
func inJSON(s *ast.StructType, doc string) string {
	for _, f := range s.Fields.List {
		if len(f.Names) == 1 {
			name, _, _ := strings.Cut(reflect.StructTag(strings.Trim(f.Tag.Value, "`")).Get("json"), ",")
			doc = regexp.MustCompile(`\b`+f.Names[0].Name+`\b`).ReplaceAllString(doc, name)
		}
	}
	return doc
}

// schemaOf is the schema of a Go type; an optional pointer is absent rather than
// null.
func schemaOf(t *testing.T, structs map[string]*ast.StructType, typ string, optional bool) *yaml.Node {
	t.Helper()
	base, pointer := strings.CutPrefix(typ, "*")
	null := pointer && !optional
	var n *yaml.Node
	switch {
	case strings.HasPrefix(base, "[]"):
		n = mapping("type", text("array"), "items", schemaOf(t, structs, base[2:], false))
	case structs[base] != nil:
		n = mapping("$ref", text("#/components/schemas/"+base))
		n = mapping("allOf", &yaml.Node{Kind: yaml.SequenceNode, Content: []*yaml.Node{n}})
	default:
		known := map[string][2]string{
			"string": {"string"}, "bool": {"boolean"}, "float64": {"number", "double"}, "time.Time": {"string", "date-time"},
			"int": {"integer"}, "int64": {"integer", "int64"}, "uint32": {"integer", "uint32"}, "uint64": {"integer", "uint64"},
		}[base]
		if known[0] == "" {
			t.Fatalf("no schema of type %s", typ)
		}
		n = mapping("type", text(known[0]))
		if known[1] != "" {
			add(n, "format", text(known[1]))
		}
	}
	if null {
		add(n, "nullable", &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!bool", Value: "true"})
	}
	return n
}

func expr(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.StarExpr:
		return "*" + expr(e.X)
	case *ast.ArrayType:
		return "[]" + expr(e.Elt)
	case *ast.SelectorExpr:
		return expr(e.X) + "." + e.Sel.Name
	}
	return fmt.Sprintf("%T", e)
}

func sentence(comment string) string { return strings.Join(strings.Fields(comment), " ") }

func text(s string) *yaml.Node {
	n := new(yaml.Node)
	n.SetString(s)
	return n
}

func mapping(pairs ...any) *yaml.Node {
	n := &yaml.Node{Kind: yaml.MappingNode}
	for i := 0; i < len(pairs); i += 2 {
		add(n, pairs[i].(string), pairs[i+1].(*yaml.Node))
	}
	return n
}

func add(n *yaml.Node, key string, value *yaml.Node) {
	n.Content = append(n.Content, text(key), value)
}
