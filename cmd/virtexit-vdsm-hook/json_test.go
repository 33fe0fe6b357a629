// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		objects    int
		list       bool
		wantErr    string
	}{
		{name: "object", text: ` {"a": 1}` + "\n", objects: 1},
		{name: "empty object", text: `{}`, objects: 1},
		{name: "list", text: `[{"a": 1}, 2, [{}], {}]`, objects: 2, list: true},
		{name: "empty list", text: "[\t]", list: true},
		{name: "of Python alone", text: `[{"a": NaN, "b": [Infinity, -Infinity]}]`, objects: 1, list: true},
		{name: "numbers", text: `[0, -0, 1.50, 1e5, 1E+5, 1.0e-05, 123456789012345678901234567890]`, list: true},
		{name: "strings", text: `["", "\"\\\/\b\f\n\r\t", "\ud83d", "\uABcd", "é", "` + "\x7f\xff" + `"]`, list: true},
		{name: "brackets in strings", text: `[{"}": "]"}, {"\"{": ","}]`, objects: 2, list: true},
		{name: "deep", text: strings.Repeat("[", maxDepth) + strings.Repeat("]", maxDepth), list: true},

		{name: "empty", wantErr: "bad JSON at byte 0: neither object nor list"},
		{name: "string", text: `"a"`, wantErr: "bad JSON at byte 0: neither object nor list"},
		{name: "byte order mark", text: "\ufeff{}", wantErr: "bad JSON at byte 0: neither object nor list"},
		{name: "torn", text: `[{"a": 1`, wantErr: "bad JSON at byte 8: no comma"},
		{name: "torn string", text: `{"a`, wantErr: "bad JSON at byte 3: control character or end in a string"},
		{name: "torn escape", text: `["\`, wantErr: "bad JSON at byte 3: unknown escape"},
		{name: "two values", text: `{} {}`, wantErr: "bad JSON at byte 3: more than one value"},
		{name: "comma at the end", text: `[1,]`, wantErr: "bad JSON at byte 3: no value"},
		{name: "comma at the end of an object", text: `{"a": 1,}`, wantErr: "bad JSON at byte 8: no string"},
		{name: "no colon", text: `{"a" 1}`, wantErr: "bad JSON at byte 5: no colon"},
		{name: "no key", text: `{1: 1}`, wantErr: "bad JSON at byte 1: no string"},
		{name: "wrong bracket", text: `[{]`, wantErr: "bad JSON at byte 2: no string"},
		{name: "leading zero", text: `[01]`, wantErr: "bad JSON at byte 2: no comma"},
		{name: "plus", text: `[+1]`, wantErr: "bad JSON at byte 1: no value"},
		{name: "no digits", text: `[1.]`, wantErr: "bad JSON at byte 3: no digit"},
		{name: "no exponent", text: `[1e+]`, wantErr: "bad JSON at byte 4: no digit"},
		{name: "minus NaN", text: `[-NaN]`, wantErr: "bad JSON at byte 2: no value"},
		{name: "another case", text: `[nan]`, wantErr: "bad JSON at byte 1: no value"},
		{name: "newline in a string", text: "[\"\n\"]", wantErr: "bad JSON at byte 2: control character or end in a string"},
		{name: "unknown escape", text: `["\x41"]`, wantErr: "bad JSON at byte 3: unknown escape"},
		{name: "short escape", text: `["\u12g4"]`, wantErr: "bad JSON at byte 6: unknown escape"},
		{name: "zero", text: "[\x00]", wantErr: "bad JSON at byte 1: no value"},
		{name: "too deep", text: strings.Repeat("[", maxDepth+1), wantErr: "bad JSON at byte 500: too deep"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			objects, list, err := parse([]byte(tt.text))
			if got := fmt.Sprint(err); err != nil && got != tt.wantErr || err == nil && tt.wantErr != "" {
				t.Fatalf("error %v, want %s", err, tt.wantErr)
			}
			if len(objects) != tt.objects || list != tt.list {
				t.Errorf("%d objects, list %t, want %d, %t", len(objects), list, tt.objects, tt.list)
			}
		})
	}
}

func TestSet(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"last", `{"a": 1}`, `{"a": 1, "k": [2]}`},
		{"empty", `{}`, `{"k": [2]}`},
		{"empty with space", "{ \n}", "{ \n\"k\": [2]}"},
		{"space stays", "{\n  \"a\" :1 \t}\n", "{\n  \"a\" :1, \"k\": [2] \t}\n"},
		{"each", `[{"a": {}}, {"a": "}"}]`, `[{"a": {}, "k": [2]}, {"a": "}", "k": [2]}]`},
		{"none", `[1, [{}], "{}"]`, `[1, [{}], "{}"]`},
		{"its own", `{"k": {"old": true}, "a": 1}`, `{"k": [2], "a": 1}`},
		{"its own, spelt otherwise", `{"\u006b": null}`, `{"\u006b": [2]}`},
		{"the latter of its own", `{"k": 1, "k": 1 }`, `{"k": 1, "k": [2] }`},
		{"another's", `{"a": {"k": 1}}`, `{"a": {"k": 1}, "k": [2]}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for text, i := tt.text, 0; i < 2; text, i = tt.want, i+1 { // its own result stays the same
				if got := setAll(t, []byte(text), "k", "[2]"); string(got) != tt.want {
					t.Errorf("%s\ngot  %s\nwant %s", text, got, tt.want)
				}
			}
		})
	}
}

func setAll(t *testing.T, text []byte, name, value string) []byte {
	t.Helper()
	objects, _, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	var edits []edit
	for i := range objects {
		edits = append(edits, objects[i].set(name, []byte(value)))
	}
	return apply(text, edits)
}

func FuzzParse(f *testing.F) {
	for _, text := range []string{`{}`, `[{"vmId": "x", "a": NaN}]`, sampleBegin + sampleEnd, `[{"kvmExits": {"a": []}}, 1, "\u00e9\\", {"a": -1.5e+3}]`, "{\"a\"\t:\r\n[-Infinity ]}", `[tru`, `[1,]`, `{"\ud800": 1}`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		objects, list, err := parse(text)
		trimmed := bytes.TrimLeft(text, " \t\r\n")
		open := len(trimmed) > 0 && (trimmed[0] == '{' || trimmed[0] == '[')
		switch {
		case errors.Is(err, errDepth):
			return
		case err != nil && open && json.Valid(text):
			t.Fatalf("JSON is refused: %v", err)
		case err == nil && !json.Valid(text) && !bytes.Contains(text, []byte("NaN")) && !bytes.Contains(text, []byte("Infinity")):
			t.Fatal("what is no JSON is accepted")
		case err != nil:
			return
		}
		const value = `{"new": 0}`
		var edits []edit
		for i := range objects {
			edits = append(edits, objects[i].set(key, []byte(value)))
		}
		after := apply(text, edits)
		again, listAgain, err := parse(after)
		if err != nil || listAgain != list || len(again) != len(objects) {
			t.Fatalf("%s: %d objects, %v", after, len(again), err)
		}
		for i, o := range again {
			v, ok := o.values[key]
			if !ok || string(after[v.from:v.to]) != value {
				t.Fatalf("%s: object %d has not what was set", after, i)
			}
			if _, had := objects[i].values[key]; !had != (len(o.values) == len(objects[i].values)+1) {
				t.Fatalf("%s: object %d has %d members, had %d", after, i, len(o.values), len(objects[i].values))
			}
		}
		if twice := setAll(t, after, key, value); !bytes.Equal(twice, after) {
			t.Fatalf("set twice\n%s\n%s", after, twice)
		}
		// Edit by edit undone, all is as it was.
		for _, e := range edits {
			rest, same := bytes.CutPrefix(after, slices.Concat(text[:e.from], e.text))
			if !same {
				t.Fatalf("%s\nbegins to differ before byte %d of\n%s", after, e.from, text)
			}
			after = slices.Concat(text[:e.to], rest)
		}
		if !bytes.Equal(after, text) {
			t.Fatalf("%s\nhas become\n%s", text, after)
		}
	})
}
