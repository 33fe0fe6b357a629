// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// maxDepth is how deep values may lie in each other; Python reads some thousand.
const maxDepth = 500

var errDepth = errors.New("too deep")

// span is a part of a text.
type span struct{ from, to int }

// object is a JSON object in a text: the values of its members, of a name that
// comes twice the latter, as in Python.
type object struct {
	values map[string]span
	end    int // where another member can be written
}

// parse finds the objects in a text of Python's JSON, which knows NaN, Infinity
// and -Infinity too: the one that the text is, or those that are the elements
// of the list that it is. It decodes no value.
func parse(text []byte) (objects []object, list bool, err error) {
	s := scanner{text: text}
	s.space()
	switch list = s.peek() == '['; {
	case list:
		err = s.array(func() error {
			if s.peek() != '{' {
				return s.value()
			}
			o, err := s.members()
			objects = append(objects, o)
			return err
		})
	case s.peek() == '{':
		objects = make([]object, 1)
		objects[0], err = s.members()
	default:
		err = s.bad("neither object nor list")
	}
	if err != nil {
		return nil, false, err
	}
	if s.space(); s.pos < len(text) {
		return nil, false, s.bad("more than one value")
	}
	return objects, list, nil
}

// edit puts a text in the place of a span.
type edit struct {
	span
	text []byte
}

// set gives an object a member, in the place of the one of that name if there is one.
func (o *object) set(name string, value []byte) edit {
	if old, ok := o.values[name]; ok {
		return edit{old, value}
	}
	text := fmt.Appendf(nil, "%q: %s", name, value)
	if len(o.values) > 0 {
		text = append([]byte(", "), text...)
	}
	return edit{span{o.end, o.end}, text}
}

// apply makes edits, which are in order. What they leave alone stays as it is.
func apply(text []byte, edits []edit) []byte {
	var out bytes.Buffer
	from := 0
	for _, e := range edits {
		out.Write(text[from:e.from])
		out.Write(e.text)
		from = e.to
	}
	out.Write(text[from:])
	return out.Bytes()
}

// unquote returns what a string of JSON says.
func unquote(quoted []byte) (string, error) {
	if bytes.IndexByte(quoted, '\\') < 0 {
		return string(quoted[1 : len(quoted)-1]), nil
	}
	var s string
	err := json.Unmarshal(quoted, &s)
	return s, err
}

// scanner goes through a text, value by value.
type scanner struct {
	text       []byte
	pos, depth int
}

func (s *scanner) bad(what string) error {
	return fmt.Errorf("bad JSON at byte %d: %s", s.pos, what)
}

// peek is the byte to come; 0, which JSON has nowhere, at the end of the text.
func (s *scanner) peek() byte {
	if s.pos == len(s.text) {
		return 0
	}
	return s.text[s.pos]
}

// skip goes past the byte to come if it is c.
func (s *scanner) skip(c byte) bool {
	if s.peek() != c {
		return false
	}
	s.pos++
	return true
}

func (s *scanner) space() {
	for {
		switch s.peek() {
		case ' ', '\t', '\n', '\r':
			s.pos++
		default:
			return
		}
	}
}

// value goes past a value.
func (s *scanner) value() error {
	switch s.peek() {
	case '{':
		return s.object(func(span) error { return s.value() })
	case '[':
		return s.array(s.value)
	case '"':
		return s.string()
	}
	for _, word := range []string{"true", "false", "null", "NaN", "Infinity", "-Infinity"} {
		if bytes.HasPrefix(s.text[s.pos:], []byte(word)) {
			s.pos += len(word)
			return nil
		}
	}
	return s.number()
}

// members goes past an object and tells what is in it.
func (s *scanner) members() (object, error) {
	o := object{values: make(map[string]span)}
	err := s.object(func(key span) error {
		from := s.pos
		if err := s.value(); err != nil {
			return err
		}
		name, err := unquote(s.text[key.from:key.to])
		o.values[name], o.end = span{from, s.pos}, s.pos
		return err
	})
	if len(o.values) == 0 {
		o.end = s.pos - 1
	}
	return o, err
}

// object goes past an object. member goes past the value behind each key.
func (s *scanner) object(member func(key span) error) error {
	return s.sequence('}', func() error {
		from := s.pos
		if err := s.string(); err != nil {
			return err
		}
		key := span{from, s.pos}
		s.space()
		if !s.skip(':') {
			return s.bad("no colon")
		}
		s.space()
		return member(key)
	})
}

// array goes past a list, element by element.
func (s *scanner) array(element func() error) error { return s.sequence(']', element) }

// sequence goes past what commas separate, and the brackets around it.
func (s *scanner) sequence(closing byte, item func() error) error {
	if s.depth++; s.depth > maxDepth {
		return fmt.Errorf("bad JSON at byte %d: %w", s.pos, errDepth)
	}
	defer func() { s.depth-- }()
	s.pos++
	s.space()
	if s.skip(closing) {
		return nil
	}
	for {
		if err := item(); err != nil {
			return err
		}
		s.space()
		if s.skip(closing) {
			return nil
		}
		if !s.skip(',') {
			return s.bad("no comma")
		}
		s.space()
	}
}

func (s *scanner) string() error {
	if !s.skip('"') {
		return s.bad("no string")
	}
	for {
		switch c := s.peek(); {
		case c == '"':
			s.pos++
			return nil
		case c < ' ': // or the end
			return s.bad("control character or end in a string")
		case c == '\\':
			s.pos++
			if bytes.IndexByte([]byte(`"\/bfnrtu`), s.peek()) < 0 {
				return s.bad("unknown escape")
			}
			if s.skip('u') {
				for range 4 {
					if !isHex(s.peek()) {
						return s.bad("unknown escape")
					}
					s.pos++
				}
				continue
			}
		}
		s.pos++
	}
}

func isHex(c byte) bool { return isDigit(c) || 'a' <= c|0x20 && c|0x20 <= 'f' }

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func (s *scanner) number() error {
	s.skip('-')
	if !s.skip('0') {
		if err := s.digits("no value"); err != nil {
			return err
		}
	}
	if s.skip('.') {
		if err := s.digits("no digit"); err != nil {
			return err
		}
	}
	if s.skip('e') || s.skip('E') {
		if !s.skip('+') {
			s.skip('-')
		}
		return s.digits("no digit")
	}
	return nil
}

// digits goes past at least one.
func (s *scanner) digits(otherwise string) error {
	if !isDigit(s.peek()) {
		return s.bad(otherwise)
	}
	for isDigit(s.peek()) {
		s.pos++
	}
	return nil
}
