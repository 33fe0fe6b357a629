// SPDX-License-Identifier: Apache-2.0

//go:build lab

package system

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/test/lab"
	"virtexit/test/lab/inside"
)

const (
	scraped = "localhost:9177"  // the daemon
	queried = "localhost:19090" // Prometheus
)

// TestMetrics has Prometheus itself scrape the daemon, and asks it.
func TestMetrics(t *testing.T) {
	lab.Require(t, "prometheus", "promtool")
	inside.Load(t, "")
	d := start(t, options{more: "metrics_reasons: 2\nmetrics_vcpus: true\nmetrics_listen: " + scraped + "\n"})
	prometheus(t)
	const alpha, gone = "aaaaaaaa-1111-4111-8111-000000000001", "aaaaaaaa-1111-4111-8111-000000000002"
	create(t, domain{name: "alpha", uuid: alpha, os: rom(t, "cpuid:10000,out:0x80:500,rdmsr:0x1b:777", false)})
	create(t, domain{name: "gone", uuid: gone, os: rom(t, "cpuid:321,hypercall:1234", false)})
	plain := newGuest(t, 1)
	run(t, plain, 0, "cpuid:1500")
	for _, name := range []string{"alpha", "gone"} {
		inside.Eventually(t, name+" is done and has its id", 60*time.Second, func() bool {
			got := d.find(name)
			return got.ID != nil && counts(got)["hlt"] == 1
		})
	}
	virsh(t, "destroy", "gone")
	inside.Eventually(t, "gone has ended", 20*time.Second, func() bool { return d.find("gone").TGID == 0 })

	// What the command line tells.
	totals := map[string]api.Domain{}
	want := map[string]uint64{} // exits
	for _, name := range []string{"alpha", "gone", nameOf(t, plain)} {
		x := d.total(name)
		totals[name] = x
		want[name] = x.Count
	}

	t.Run("socket", func(t *testing.T) {
		answer, err := httpClient(d).Get("http://localhost/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		check := exec.Command("promtool", "check", "metrics")
		check.Stdin = answer.Body
		if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("promtool check metrics: %v\n%s", err, out)
		}
	})
	t.Run("exits", func(t *testing.T) {
		inside.Eventually(t, "Prometheus has all exits", 60*time.Second, func() bool {
			return cmp.Diff(want, exits(query(t, "sum by (domain) (virtexit_exits_total)"), "domain")) == ""
		})
		// Two reasons of their own at the most, and the rest.
		for name, x := range totals {
			got := exits(query(t, fmt.Sprintf("virtexit_exits_total{domain=%q}", name)), "reason")
			all := counts(x)
			rest := x.Count
			for reason, n := range got {
				if reason != "other" {
					rest -= n
					if all[reason] != n {
						t.Errorf("%s: %d exits by %s, want %d", name, n, reason, all[reason])
					}
				}
			}
			if got["other"] != rest || len(got) > 3 || len(all) > 2 && len(got) < 3 {
				t.Errorf("%s: %v of %v", name, got, all)
			}
		}
		if diff := cmp.Diff(want, exits(query(t, "sum by (domain) (virtexit_vcpu_exits_total)"), "domain")); diff != "" {
			t.Errorf("by vCPU (-want +got)\n%s", diff)
		}
		s := d.conserve()
		if got := query(t, "virtexit_counted_exits_total")[0].value; got != float64(s.Exits) {
			t.Errorf("%v exits counted, want %d", got, s.Exits)
		}
		if got := query(t, "virtexit_unattributed_exits_total + virtexit_missed_exits_total")[0].value; got != float64(s.Unattributed+s.Missed) {
			t.Errorf("%v exits of nobody, want %d", got, s.Unattributed+s.Missed)
		}
	})
	t.Run("time", func(t *testing.T) {
		x := d.total("gone") // whose counts are final
		var handling uint64
		for _, e := range x.Exits {
			handling += e.TimeNS
		}
		for expr, want := range map[string]float64{
			`sum(virtexit_exit_seconds_total{domain="gone"})`:                 float64(handling) / 1e9,
			`virtexit_exit_duration_seconds_sum{domain="gone"}`:               float64(handling) / 1e9,
			`virtexit_exit_duration_seconds_count{domain="gone"}`:             float64(x.Count - 1), // after the last there was no entry
			`sum(virtexit_vcpu_seconds_total{domain="gone"})`:                 float64(x.Time.Sum()) / 1e9,
			`virtexit_vcpu_seconds_total{domain="gone", state="guest"}`:       float64(x.Time.GuestNS) / 1e9,
			`virtexit_vcpu_seconds_total{domain="gone", state="halted"}`:      float64(x.Time.HaltedNS) / 1e9,
			`sum(virtexit_vcpu_state_seconds_total{domain="gone", vcpu="0"})`: float64(x.Time.Sum()) / 1e9,
			`virtexit_domain_start_time_seconds{domain="gone"}`:               float64(x.Since.UnixMilli()) / 1e3,
		} {
			got := query(t, expr)
			// Nanoseconds are cut off in each part of a sum; a start is told in the clock of today.
			tolerance := 1e-6
			if strings.Contains(expr, "start_time") {
				tolerance = 1
			}
			if len(got) != 1 || got[0].value < want-tolerance || got[0].value > want+tolerance {
				t.Errorf("%s: %v, want %v", expr, got, want)
			}
		}
	})
	t.Run("identity", func(t *testing.T) {
		for expr, want := range map[string]map[string]string{
			`virtexit_domain_info{domain="alpha"}`:   {"uuid": alpha, "source": "libvirt", "state": "running"},
			`virtexit_domain_info{domain="gone"}`:    {"uuid": gone, "source": "libvirt", "state": "shut off"},
			`virtexit_domain_info{source="process"}`: {"domain": nameOf(t, plain), "uuid": "", "state": "running"},
			`virtexit_collector_info`:                {"collector": "kmod", "isa": "svm", "level": "time"},
			`virtexit_up == 1`:                       {"job": "virtexit", "instance": scraped},
		} {
			got := query(t, expr)
			if len(got) != 1 {
				t.Errorf("%s: %v", expr, got)
				continue
			}
			for label, value := range want {
				if got[0].labels[label] != value {
					t.Errorf("%s: %s is %q, want %q", expr, label, got[0].labels[label], value)
				}
			}
		}
	})
	t.Run("rules", func(t *testing.T) {
		run(t, plain, 0, "cpuid:5000") // more than Prometheus knows
		inside.Eventually(t, "the recording rules have recorded", 30*time.Second, func() bool {
			return len(query(t, fmt.Sprintf("domain:virtexit_exits:rate5m{domain=%q} > 0", nameOf(t, plain)))) == 1 &&
				len(query(t, `domain_state:virtexit_vcpu_seconds:ratio_rate5m{domain="alpha", state="halted"}`)) == 1
		})
		for _, a := range query(t, `ALERTS{alertname=~"Virtexit.*"}`) {
			t.Errorf("alert %v", a.labels)
		}
	})
}

// prometheus starts a server that scrapes the daemon every two seconds, by our own
// rules. It ends with the test.
func prometheus(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	rules, err := filepath.Abs("../../../configs/prometheus/virtexit.rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "prometheus.yml")
	text := fmt.Sprintf("global: {scrape_interval: 2s, scrape_timeout: 2s, evaluation_interval: 2s}\nrule_files: [%q]\nscrape_configs: [{job_name: virtexit, static_configs: [{targets: [%q]}]}]\n", rules, scraped)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command("prometheus", "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+queried, "--log.level=warn")
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("log of prometheus:\n%s", &log)
		}
	})
	inside.Eventually(t, "Prometheus is ready", 60*time.Second, func() bool {
		answer, err := http.Get("http://" + queried + "/-/ready")
		if err != nil {
			return false
		}
		answer.Body.Close()
		return answer.StatusCode == 200
	})
}

type sample struct {
	labels map[string]string
	value  float64
}

// query asks Prometheus what an expression is now.
func query(t *testing.T, expr string) []sample {
	t.Helper()
	answer, err := http.Get("http://" + queried + "/api/v1/query?query=" + url.QueryEscape(expr))
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	var body struct {
		Error string
		Data  struct {
			Result []struct {
				Metric map[string]string
				Value  [2]any
			}
		}
	}
	if err := json.NewDecoder(answer.Body).Decode(&body); err != nil || body.Error != "" {
		t.Fatalf("%s: %v %s", expr, err, body.Error)
	}
	var samples []sample
	for _, r := range body.Data.Result {
		value, err := strconv.ParseFloat(fmt.Sprint(r.Value[1]), 64)
		if err != nil {
			t.Fatalf("%s: %v", expr, err)
		}
		samples = append(samples, sample{r.Metric, value})
	}
	return samples
}

// exits are the values by a label.
func exits(samples []sample, label string) map[string]uint64 {
	m := map[string]uint64{}
	for _, s := range samples {
		m[s.labels[label]] += uint64(s.value)
	}
	return m
}
