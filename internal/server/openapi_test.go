// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"

	"virtexit/api"
)

// description is docs/openapi.yaml. That its schemas are those of the code is
// tested beside the types.
func description(t *testing.T) *openapi3.T {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromFile("../../docs/openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(t.Context()); err != nil {
		t.Fatal(err)
	}
	return doc
}

// TestDescribed holds the paths of the API's description to the server: their
// methods, their parameters, and what they answer.
func TestDescribed(t *testing.T) {
	doc := description(t)
	b := newBackend()
	b.lines = make(chan []api.LogLine)
	close(b.lines)
	path, _ := start(t, New(b, Options{}))
	bodies := map[string]string{
		"/v1/collection":             `{"collection":"on"}`,
		"/v1/domains/{domain}/level": `{"level":"time"}`,
	}
	values := map[string]string{"domain": "ten", "follow": "1", "interval": "100ms", "limit": "1", "reason": "cpuid", "total": "1", "vcpu": "0"}
	for name, item := range doc.Paths.Map() {
		target := strings.ReplaceAll(name, "{domain}", "ten")
		var described []string
		for method := range item.Operations() {
			described = append(described, method)
		}
		if allowed := slices.DeleteFunc(methods(&url.URL{Path: target}), func(m string) bool { return m == http.MethodHead }); !equalSets(described, allowed) {
			t.Errorf("%s: described are %v, allowed %v", name, described, allowed)
		}
		for method, operation := range item.Operations() {
			body := ""
			if method == http.MethodPut {
				body = bodies[name]
			}
			queries := []string{""}
			var names []string
			for _, p := range operation.Parameters {
				if p.Value.In == "query" {
					query := p.Value.Name + "=" + values[p.Value.Name]
					queries = append(queries, query)
					names = append(names, p.Value.Name)
					if p.Value.Schema.Value.Type.Is("array") {
						queries = append(queries, query+"&"+query)
					}
				}
			}
			for _, query := range append(queries, "undescribed=1") {
				want := http.StatusOK
				if query == "undescribed=1" {
					want = http.StatusBadRequest
				}
				interval := operation.Parameters.GetByInAndName("query", "interval") != nil
				if interval && !strings.Contains(query, "interval") && !strings.Contains(query, "total") {
					query += "&interval=100ms" // rather than the default
				}
				resp := send(t, path, method, target+"?"+query, body)
				if resp.StatusCode != want {
					t.Errorf("%s %s?%s: status %d, want %d", method, target, query, resp.StatusCode, want)
				}
				check(t, operation, method+" "+target+"?"+query, resp)
			}
			// The error names the parameters that there are.
			var e api.Error
			if err := json.NewDecoder(send(t, path, method, target+"?undescribed=1", body).Body).Decode(&e); err != nil {
				t.Fatal(err)
			}
			slices.Sort(names)
			known := "known are " + strings.Join(names, ", ")
			if len(names) == 0 {
				known = "takes no parameters"
			}
			if !strings.Contains(e.Message, known) || len(names) > 0 && !strings.HasSuffix(e.Message, known) {
				t.Errorf("%s %s: %q; described are %v", method, name, e.Message, names)
			}
		}
	}
	for _, target := range []string{"/v1/domains/none", "/v1/domains/twin"} {
		check(t, doc.Paths.Find("/v1/domains/{domain}").Get, target, send(t, path, "GET", target, ""))
	}
	// What the server knows is described.
	for _, target := range []string{"/v1/status", "/v1/collection", "/v1/domains", "/v1/domains/x", "/v1/domains/x/level", "/v1/domains/x/log", "/v1/report", "/v1/watch"} {
		if doc.Paths.Find(strings.Replace(target, "/x", "/{domain}", 1)) == nil {
			t.Errorf("%s is not described", target)
		}
	}
}

func equalSets(a, b []string) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}

func send(t *testing.T, path, method, target, body string) *http.Response {
	t.Helper()
	req, err := http.NewRequest(method, "http://x"+target, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	var request bytes.Buffer
	if err := req.Write(&request); err != nil {
		t.Fatal(err)
	}
	return raw(t, path, request.String())
}

// check holds an answer to its description.
func check(t *testing.T, operation *openapi3.Operation, request string, resp *http.Response) {
	t.Helper()
	described := operation.Responses.Status(resp.StatusCode)
	if described == nil {
		described = operation.Responses.Default()
	}
	media := described.Value.Content.Get(resp.Header.Get("Content-Type"))
	if media == nil {
		t.Errorf("%s: status %d with %q is not described", request, resp.StatusCode, resp.Header.Get("Content-Type"))
		return
	}
	lines := bufio.NewReader(resp.Body)
	for n := 0; ; n++ {
		line, err := lines.ReadBytes('\n')
		if err == io.EOF && len(line) == 0 {
			if n == 0 {
				t.Errorf("%s: status %d with nothing", request, resp.StatusCode)
			}
			return
		}
		if err != nil && err != io.EOF {
			t.Errorf("%s: %v", request, err)
			return
		}
		var value any
		if err := json.Unmarshal(line, &value); err != nil {
			t.Errorf("%s: %v", request, err)
			return
		}
		if object, _ := value.(map[string]any); n == 0 && object["schema"] != api.Schema {
			t.Errorf("%s: schema %v", request, object["schema"])
		}
		if err := media.Schema.Value.VisitJSON(value); err != nil {
			t.Errorf("%s: line %d: %v", request, n, err)
		}
	}
}
