// SPDX-License-Identifier: Apache-2.0

package prom

import (
	"encoding/xml"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.yaml.in/yaml/v3"
	"golang.org/x/crypto/bcrypt"

	"virtexit/internal/ledger"
	"virtexit/internal/snapshot"
	"virtexit/test/lab"
	"virtexit/vmmap"
)

const docs = "../../docs/"

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// promtool runs it in a directory; it must succeed.
func promtool(t *testing.T, dir string, args ...string) string {
	t.Helper()
	lab.Require(t, "promtool")
	cmd := exec.Command("promtool", args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("promtool %q: %v\n%s", args, err, out)
	}
	return string(out)
}

var described = regexp.MustCompile(`^Desc\{fqName: ("[^"]*"), help: ("(?:[^"\\]|\\.)*"), unit: "", constLabels: \{\}, variableLabels: \{(.*)\}\}$`)

// table is what the collector describes, as the document shows it.
func table(t *testing.T) (rows []string) {
	t.Helper()
	h := usual()
	c := New(h, h.config())
	types := map[string]string{}
	for _, f := range gather(t, c) {
		types[f.GetName()] = strings.ToLower(f.GetType().String())
	}
	descs := make(chan *prometheus.Desc, 100)
	c.Describe(descs)
	close(descs)
	for d := range descs {
		m := described.FindStringSubmatch(d.String())
		if m == nil {
			t.Fatalf("not understood: %s", d)
		}
		name, _ := strconv.Unquote(m[1])
		help, err := strconv.Unquote(m[2])
		if err != nil || types[name] == "" {
			t.Fatalf("%s, of type %q, is never exported, or: %v", name, types[name], err)
		}
		var labels []string
		for _, l := range strings.Split(m[3], ",") {
			if l != "" {
				labels = append(labels, "`"+l+"`")
			}
		}
		rows = append(rows, fmt.Sprintf("| `%s` | %s | %s | %s |", name, types[name], strings.Join(labels, ", "), help))
	}
	return rows
}

func TestTable(t *testing.T) {
	got := regexp.MustCompile("(?m)^\\| `virtexit_.*$").FindAllString(read(t, docs+"PROMETHEUS.md"), -1)
	if diff := cmp.Diff(table(t), got); diff != "" {
		t.Errorf("docs/PROMETHEUS.md (-collector +document)\n%s", diff)
	}
}

// series is how many a scrape has, as Prometheus counts them.
func series(families []*dto.MetricFamily) (n int) {
	for _, f := range families {
		for _, m := range f.Metric {
			if m.Histogram == nil {
				n++
			} else {
				n += len(m.Histogram.Bucket) + 3
			}
		}
	}
	return n
}

// How many series a domain and a vCPU have is what the document says.
func TestSeries(t *testing.T) {
	count := func(vcpus int, each bool, domains int) int {
		h := large(domains)
		config := h.config()
		config.Reasons, config.VCPUs = 16, each
		for _, d := range h.domains {
			for code := range uint32(20) {
				d.Rows = append(d.Rows, row(code, 1, 1, 1))
			}
			d.Total.VCPUs = d.Total.VCPUs[:vcpus]
		}
		return series(gather(t, New(h, config)))
	}
	for what, got := range map[string]int{
		"at most %d series for a domain": count(8, false, 3) - count(8, false, 2),
		"%d more for each vCPU":          count(8, true, 1) - count(7, true, 1),
	} {
		if want := fmt.Sprintf(what, got); !strings.Contains(read(t, docs+"PROMETHEUS.md"), want) {
			t.Errorf("docs/PROMETHEUS.md does not say %q", want)
		}
	}
}

// The rules are valid, and each has a test and is told of.
func TestRules(t *testing.T) {
	const rules = "../../configs/prometheus"
	promtool(t, rules, "check", "rules", "virtexit.rules.yml")
	promtool(t, rules, "test", "rules", "virtexit.test.yml")
	var file struct {
		Groups []struct {
			Rules []struct{ Alert, Record string }
		}
	}
	if err := yaml.Unmarshal([]byte(read(t, rules+"/virtexit.rules.yml")), &file); err != nil {
		t.Fatal(err)
	}
	tests, document := read(t, rules+"/virtexit.test.yml"), read(t, docs+"PROMETHEUS.md")
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			if !regexp.MustCompile("alertname: "+r.Alert+"\n +eval_time: \\S+\n +exp_alerts:\n").MatchString(tests) && r.Alert != "" {
				t.Errorf("no test has alert %s", r.Alert)
			}
			if !strings.Contains(tests, r.Record) {
				t.Errorf("no test has %s", r.Record)
			}
			if !strings.Contains(document, "`"+r.Alert+r.Record+"`") {
				t.Errorf("docs/PROMETHEUS.md does not tell of %s%s", r.Alert, r.Record)
			}
		}
	}
}

var block = regexp.MustCompile("(?ms)^```(\\w+)\n(.*?)^```$")

// blocks are those of a document that are in a language.
func blocks(t *testing.T, document, language string) (found []string) {
	for _, m := range block.FindAllStringSubmatch(read(t, docs+document), -1) {
		if m[1] == language {
			found = append(found, m[2])
		}
	}
	return found
}

// What the document shows is valid, and Prometheus gives the password whose hash
// the daemon is given.
func TestConfigurations(t *testing.T) {
	dir := t.TempDir()
	webConfig, _ := secure(t)
	var all struct {
		Users   map[string]string `yaml:"basic_auth_users"`
		Scrapes []struct {
			Auth struct{ Username, Password string } `yaml:"basic_auth"`
		} `yaml:"scrape_configs"`
	}
	examples := blocks(t, "PROMETHEUS.md", "yaml")
	if len(examples) != 2 {
		t.Fatalf("%d examples", len(examples))
	}
	for i, kind := range []string{"web-config", "config"} {
		file := filepath.Join(dir, kind)
		example := strings.NewReplacer("/etc/virtexit/", filepath.Dir(webConfig)+"/", "/etc/prometheus/tls", filepath.Dir(webConfig)+"/tls",
			"/etc/prometheus/virtexit.rules.yml", "/dev/null").Replace(examples[i])
		if err := os.WriteFile(file, []byte(example), 0o600); err != nil {
			t.Fatal(err)
		}
		promtool(t, dir, "check", kind, file)
		if err := yaml.Unmarshal([]byte(example), &all); err != nil {
			t.Fatal(err)
		}
	}
	auth := all.Scrapes[0].Auth
	if err := bcrypt.CompareHashAndPassword([]byte(all.Users[auth.Username]), []byte(auth.Password)); err != nil {
		t.Errorf("user %q: %v", auth.Username, err)
	}
}

// clouds is a host with the recorded domains, the n-th of which works n times as
// long as the first, with another instance of Nova's and a guest of nobody's.
func clouds(t *testing.T, minutes uint64) *host {
	t.Helper()
	files, err := filepath.Glob("../../vmmap/testdata/clouds/*.xml")
	if err != nil || len(files) == 0 {
		t.Fatalf("%v, no recorded domains", err)
	}
	files = append(files, "../../vmmap/testdata/clouds/nova.xml")
	h := newHost()
	for i, file := range files {
		text := read(t, file)
		if i == len(files)-1 {
			text = strings.NewReplacer("0000001a", "0000001b", "5f1c2e90", "5f1c2e91", "web 01", "web 02").Replace(text)
		}
		var x struct {
			ID   int    `xml:"id,attr"`
			Name string `xml:"name"`
			UUID string `xml:"uuid"`
		}
		if err := xml.Unmarshal([]byte(text), &x); err != nil {
			t.Fatal(err)
		}
		metadata, err := vmmap.ParseMetadata([]byte(text))
		if err != nil || metadata.Cloud == nil {
			t.Fatalf("%s: %v, %+v", file, err, metadata)
		}
		d := vmmap.Domain{ID: &x.ID, Name: x.Name, UUID: x.UUID, TGID: i + 1, State: vmmap.Running, Source: "libvirt", Metadata: metadata}
		if metadata.Cloud.System == "kubevirt" {
			d.ID, d.Source = nil, "proc"
		}
		h.domains = append(h.domains, counted{d, worked(i+1, uint64(i+1)*minutes)})
	}
	h.domains = append(h.domains, counted{vmmap.Domain{Name: "qemu-system-x86-9", TGID: 9, State: vmmap.Running, Source: "process"}, worked(9, minutes)})
	return h
}

// worked is the total of a domain that has worked for so many minutes: 125 exits
// a second of 2 us each, and of 50 s it waited as many as its tgid says.
func worked(tgid int, minutes uint64) *ledger.Total {
	t := total(tgid, 0, time.Hour, row(cpuid, 6000*minutes, 6*hz/1000*minutes, 6000*minutes), row(io_, 1500*minutes, 9*hz/1000*minutes, 0, 0, 0, 0, 1500*minutes))
	t.Times = snapshot.Times{Guest: uint64(45-tgid) * hz * minutes, KVM: 5 * hz * minutes, Wait: uint64(tgid) * hz * minutes}
	return t
}

// The queries in the document have the results that it shows.
func TestQueries(t *testing.T) {
	lab.Require(t, "promtool")
	h := clouds(t, 1)
	begin := text(t, gather(t, New(h, h.config())))
	h2 := clouds(t, 2)
	end := text(t, gather(t, New(h2, h2.config())))
	type inputSeries struct {
		Series string `yaml:"series"`
		Values string `yaml:"values"`
	}
	input := []inputSeries{{`openstack_nova_server_status{instance="openstack:9180", id="1", uuid="5f1c2e90-8a47-4d0b-9b6e-3c1d2f4a5b6c", name="web 01", availability_zone="az1", status="ACTIVE"}`, "0x60"}}
	last := values(end)
	for name, value := range values(begin) {
		scraped := strings.Replace(name, "{", `{job="virtexit", instance="compute1:9177", `, 1)
		input = append(input, inputSeries{scraped, fmt.Sprintf("%v+%vx60", value, last[name]-value)})
	}
	type sample struct {
		Labels string  `yaml:"labels"`
		Value  float64 `yaml:"value"`
	}
	type exprTest struct {
		Expr    string   `yaml:"expr"`
		At      string   `yaml:"eval_time"`
		Samples []sample `yaml:"exp_samples"`
	}
	queries, results := blocks(t, "OPENSTACK.md", "promql"), blocks(t, "OPENSTACK.md", "text")
	if len(queries) == 0 || len(queries) != len(results) {
		t.Fatalf("%d queries, %d results", len(queries), len(results))
	}
	for i, query := range queries {
		// What floating point adds to a result is no matter.
		test := exprTest{Expr: "round((" + query + ") * 1e9) / 1e9", At: "30m"}
		for line := range strings.Lines(results[i]) {
			end := strings.LastIndex(line, "} ")
			value, err := strconv.ParseFloat(strings.TrimSpace(line[end+1:]), 64)
			if end < 0 || err != nil {
				t.Fatalf("%q is no result", line)
			}
			test.Samples = append(test.Samples, sample{line[:end+1], value})
		}
		file, err := yaml.Marshal(map[string]any{"tests": []any{map[string]any{"interval": "1m", "input_series": input, "promql_expr_test": []exprTest{test}}}})
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(t.TempDir(), "test.yml")
		if err := os.WriteFile(name, file, 0o600); err != nil {
			t.Fatal(err)
		}
		if len(test.Samples) == 0 {
			t.Errorf("no result of\n%s", query)
		}
		if out, err := exec.Command("promtool", "test", "rules", name).CombinedOutput(); err != nil {
			t.Errorf("docs/OPENSTACK.md\n%s\n%s", query, out)
		}
	}
}

// values reads series and their values out of the text format.
func values(text string) map[string]float64 {
	m := map[string]float64{}
	for line := range strings.Lines(text) {
		if i := strings.LastIndexByte(line, ' '); line[0] != '#' {
			value, err := strconv.ParseFloat(strings.TrimSpace(line[i+1:]), 64)
			if err != nil {
				panic(err)
			}
			name := line[:i]
			if !strings.Contains(name, "{") {
				name += "{}"
			}
			m[name] = value
		}
	}
	return m
}
