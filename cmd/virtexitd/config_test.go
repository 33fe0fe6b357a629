// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	"virtexit/api"
	"virtexit/internal/ledger"
	"virtexit/internal/snapshot"
)

// builtIn is what the daemon does when nothing is configured.
var builtIn = config{
	on:            true,
	level:         snapshot.Time,
	duty:          api.Duty{OnNS: 1e9, EveryNS: 1e9},
	interval:      time.Second,
	retention:     ledger.Retention{Age: time.Hour, Count: 1000},
	stateDir:      "/var/lib/virtexit",
	stateInterval: 30 * time.Second,
	socket:        listening{"/run/virtexit/virtexit.sock", "libvirt", 0o660},
	readOnly:      listening{"", "libvirt", 0o660},
	libvirtURI:    "qemu:///system",
	collector:     "auto",
	logLevel:      slog.LevelInfo,
	metrics:       metrics{reasons: 16},
}

func testFlags(t *testing.T, args ...string) *pflag.FlagSet {
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.String("socket", defaults["socket"], "")
	flags.String("log-level", defaults["log_level"], "")
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	return flags
}

func write(t *testing.T, text string) string {
	file := filepath.Join(t.TempDir(), "virtexitd.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestLoad(t *testing.T) {
	with := func(change func(*config)) config {
		c := builtIn
		change(&c)
		return c
	}
	for _, tc := range []struct {
		name string
		file string
		env  map[string]string
		args []string
		want config
		err  string // part of it
	}{
		{name: "empty", want: builtIn},
		{name: "only comments", file: "# nothing\n", want: builtIn},
		{name: "key without value", file: "group:\n", want: builtIn},
		{name: "off", file: "collection: off", want: with(func(c *config) { c.on = false })},
		{name: "file", file: "level: count\ninterval: 250ms\nretention: 5m\nretention_count: 3\nadmin_group: wheel\ngroup: \"\"\ncollector: replay:/tmp/x:y\n",
			want: with(func(c *config) {
				c.level, c.interval, c.socket.group, c.adminGroup = snapshot.Count, 250*time.Millisecond, "", "wheel"
				c.collector, c.replay = "", "/tmp/x:y"
				c.retention = ledger.Retention{Age: 5 * time.Minute, Count: 3}
			})},
		{name: "eBPF", file: "collector: ebpf", want: with(func(c *config) { c.collector = "ebpf" })},
		{name: "statistics", file: "collector: kvmstats", want: with(func(c *config) { c.collector = "kvmstats" })},
		{name: "no state", file: `state_dir: ""`, want: with(func(c *config) { c.stateDir = "" })},
		{name: "state elsewhere", file: "state_dir: /x\nstate_interval: 1h", want: with(func(c *config) { c.stateDir, c.stateInterval = "/x", time.Hour })},
		{name: "level recent, at times", file: "level: recent\nduty: 1s/10s", want: with(func(c *config) { c.level, c.duty = snapshot.Recent, api.Duty{OnNS: 1e9, EveryNS: 1e10} })},
		{name: "group given by number", file: "group: 0", want: with(func(c *config) { c.socket.group = "0" })},
		{name: "environment before file", file: "interval: 5s\nlevel: count", env: map[string]string{"VIRTEXIT_INTERVAL": "7s", "VIRTEXIT_RETENTION_COUNT": "9"},
			want: with(func(c *config) { c.interval, c.level, c.retention.Count = 7*time.Second, snapshot.Count, 9 })},
		{name: "flag before environment", file: "socket: /1\nlog_level: warn", env: map[string]string{"VIRTEXIT_SOCKET": "/2", "VIRTEXIT_LOG_LEVEL": "debug"}, args: []string{"--socket=/3"},
			want: with(func(c *config) { c.socket.path, c.logLevel = "/3", slog.LevelDebug })},
		{name: "metrics", file: "metrics_listen: '[::1]:9177'\nmetrics_web_config: /x.yml\nmetrics_reasons: 5\nmetrics_vcpus: true",
			want: with(func(c *config) { c.metrics = metrics{"[::1]:9177", "/x.yml", 5, true} })},
		{name: "empty libvirt_uri", file: `libvirt_uri: ""`, want: builtIn},

		{name: "unknown key", file: "levels: count", err: `unknown key "levels"`},
		{name: "unknown key without value", file: "levels:", err: `unknown key "levels"`},
		{name: "unknown key with keys", file: "levels: {}", err: `unknown key "levels"`},
		{name: "key in capitals", file: "Level: count", err: `unknown key "Level"`},
		{name: "key twice", file: "level: count\nlevel: time", err: `"level" already defined`},
		{name: "not yaml", file: "level: [", err: "yaml"},
		{name: "not keys", file: "level", err: "yaml"},
		{name: "list", file: "level: [count]", err: "level: [count] is not valid"},
		{name: "keys below a key", file: "socket: {path: /x}", err: "socket: map[path:/x] is not valid"},
		{name: "collection", file: "collection: true", err: `collection: "true" is not valid: on and off are allowed`},
		{name: "level", file: "level: detail", err: `virtexitd.yaml: level: "detail" is not valid: count, time and recent are allowed`},
		{name: "level off", file: "level: off", err: `level: "off" is not valid`},
		{name: "duty", file: "duty: 1/10", err: `duty: "1/10" is not valid: two durations are wanted, such as 1s/10s, or always`},
		{name: "duty with keys", file: "duty: {on: 1s, every: 10s}", err: "duty: map[every:10s on:1s] is not valid"},
		{name: "half a duty", file: "duty: 1s", err: `duty: "1s" is not valid: two durations are wanted`},
		{name: "duty that does not fit", file: "duty: 10s/1s", err: "10s of collection does not fit in every 1s"},
		{name: "short duty", file: "duty: 1ms/10s", err: "1ms of collection is shorter than 100ms"},
		{name: "short pause", file: "duty: 10s/10001ms", err: "a pause of 1ms is shorter than 100ms"},
		{name: "long duty", file: "duty: 1s/2h", err: "a period of 2h0m0s is longer than 1h0m0s"},
		{name: "interval without unit", file: "interval: 5", err: `interval: "5" is not valid: a duration from 100ms to 1h is allowed`},
		{name: "interval too short", file: "interval: 99ms", err: `interval: "99ms" is not valid`},
		{name: "interval too long", file: "interval: 61m", err: `interval: "61m" is not valid`},
		{name: "retention", file: "retention: -1s", err: `retention: "-1s" is not valid`},
		{name: "retention_count", file: "retention_count: many", err: `retention_count: "many" is not valid`},
		{name: "retention_count below zero", file: "retention_count: -1", err: `retention_count: "-1" is not valid`},
		{name: "relative state_dir", file: "state_dir: x", err: `state_dir: "x" is not valid: an absolute path is allowed, or nothing`},
		{name: "state_interval", file: "state_interval: 10ms", err: `state_interval: "10ms" is not valid: a duration from 5s to 1h is allowed`},
		{name: "collector", file: "collector: perf", err: `collector: "perf" is not valid: auto, kmod, ebpf, kvmstats and replay:FILE are allowed`},
		{name: "replay of nothing", file: "collector: 'replay:'", err: `collector: "replay:" is not valid`},
		{name: "relative socket", file: "socket: x.sock", err: `socket: "x.sock" is not valid`},
		{name: "read-only socket", file: "read_only_socket: /ro\nread_only_group: monitor\nread_only_mode: \"600\"\nsocket_mode: \"0600\"",
			want: with(func(c *config) {
				c.readOnly, c.socket.mode = listening{"/ro", "monitor", 0o600}, 0o600
			})},
		{name: "relative read-only socket", file: "read_only_socket: x.sock", err: `read_only_socket: "x.sock" is not valid: an absolute path of at most 107 bytes is allowed, or nothing`},
		{name: "a socket for all", file: "socket_mode: \"0666\"", err: `socket_mode: "0666" is not valid: 0600 and 0660 are allowed, in quotes`},
		{name: "a mode that YAML takes for octal", file: "read_only_mode: 0660", err: `read_only_mode: "432" is not valid: 0600 and 0660 are allowed, in quotes`},
		{name: "no mode", file: "socket_mode: rw", err: `socket_mode: "rw" is not valid`},
		{name: "long socket", file: "socket: /" + strings.Repeat("x", 107), err: "at most 107 bytes"},
		{name: "log_level", file: "log_level: loud", err: `log_level: "loud" is not valid: debug, info, warn and error are allowed`},
		{name: "metrics_listen without port", file: "metrics_listen: localhost", err: `metrics_listen: "localhost" is not valid: a host and a port`},
		{name: "metrics_listen with an empty port", file: "metrics_listen: 'localhost:'", err: `metrics_listen: "localhost:" is not valid`},
		{name: "relative metrics_web_config", file: "metrics_web_config: x", err: `metrics_web_config: "x" is not valid`},
		{name: "no metrics_reasons", file: "metrics_reasons: 0", err: `metrics_reasons: "0" is not valid: a number from 1 to 100`},
		{name: "metrics_vcpus", file: "metrics_vcpus: some", err: `metrics_vcpus: "some" is not valid: true and false`},
		{name: "environment", env: map[string]string{"VIRTEXIT_LEVEL": "x"}, err: `VIRTEXIT_LEVEL: level: "x" is not valid`},
		{name: "flag", args: []string{"--log-level=x"}, err: `--log-level: log_level: "x" is not valid`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for key, value := range tc.env {
				t.Setenv(key, value)
			}
			got, err := load(write(t, tc.file), true, testFlags(t, tc.args...))
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("error %v, want %s", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(config{}, listening{}, metrics{})); diff != "" {
				t.Errorf("config (-want +got)\n%s", diff)
			}
		})
	}
}

func TestMissingFile(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "none.yaml")
	if got, err := load(missing, false, testFlags(t)); err != nil || got != builtIn {
		t.Errorf("the default one: %+v, %v", got, err)
	}
	if _, err := load(missing, true, testFlags(t)); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("one that was asked for: %v", err)
	}
}

// The shipped file says what the defaults are.
func TestShippedFile(t *testing.T) {
	data, err := os.ReadFile("../../configs/virtexitd.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var shipped map[string]any
	if err := yaml.Unmarshal(data, &shipped); err != nil {
		t.Fatal(err)
	}
	got := make(map[string]string)
	for key, value := range shipped {
		got[key] = fmt.Sprint(value)
	}
	if diff := cmp.Diff(defaults, got); diff != "" {
		t.Errorf("configs/virtexitd.yaml (-code +file)\n%s", diff)
	}
}

func FuzzLoad(f *testing.F) {
	data, err := os.ReadFile("../../configs/virtexitd.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	for _, text := range []string{"", "level: [", "levels:", "socket: {a: b}", "interval: 1e99h", "? {a: 1}\n: b", "group: 2026-01-01", "a.b: c", "retention: .inf", "collector: &a replay:x\ngroup: *a"} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := load(write(t, string(data)), true, testFlags(t))
		if err != nil {
			return
		}
		if c.level < snapshot.Count || c.level > snapshot.Recent || c.duty.Check() != nil || c.interval < 100*time.Millisecond || c.interval > time.Hour ||
			c.retention.Age < 0 || c.retention.Count < 0 || c.stateInterval < 5*time.Second || c.stateDir != "" && !filepath.IsAbs(c.stateDir) || !filepath.IsAbs(c.socket.path) || c.socket.mode&^0o660 != 0 || c.readOnly.mode&^0o660 != 0 || c.libvirtURI == "" {
			t.Errorf("accepted %+v", c)
		}
	})
}
