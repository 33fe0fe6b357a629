// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"github.com/spf13/viper"
	"go.yaml.in/yaml/v3"

	"virtexit/api"
	"virtexit/internal/daemon"
	"virtexit/internal/ledger"
	"virtexit/internal/snapshot"
)

const defaultConfig = "/etc/virtexit/virtexitd.yaml"

// config is what an administrator can set.
type config struct {
	on            bool
	level         snapshot.Level
	duty          api.Duty
	interval      time.Duration
	retention     ledger.Retention
	stateDir      string // empty: no state is kept
	stateInterval time.Duration
	socket        listening
	readOnly      listening // path empty: none
	adminGroup    string    // empty: root alone switches
	libvirtURI    string
	collector     string // "auto" or the only one; empty with replay
	replay        string // a recording to read instead of what the kernel counts
	metrics       metrics
	logLevel      slog.Level
}

// listening is a unix socket.
type listening struct {
	path  string
	group string // empty: root alone opens it
	mode  fs.FileMode
}

// metrics tells what Prometheus is shown, and where.
type metrics struct {
	listen    string // host and port; empty: on the socket alone
	webConfig string // file of exporter-toolkit's; empty: neither TLS nor users
	reasons   int
	vcpus     bool
}

// defaults holds every key with its value as one writes it.
var defaults = map[string]string{
	"collection":      "on",
	"level":           "time",
	"duty":            "always",
	"interval":        "1s",
	"retention":       "1h",
	"retention_count": "1000",
	"state_dir":       "/var/lib/virtexit",
	"state_interval":  "30s",
	"collector":       "auto",
	"socket":          api.DefaultSocket,
	"socket_mode":     "0660",
	"group":           "libvirt",
	"admin_group":     "",

	"read_only_socket": "",
	"read_only_mode":   "0660",
	"read_only_group":  "libvirt",
	"libvirt_uri":      "qemu:///system",
	"log_level":        "info",

	"metrics_listen":     "",
	"metrics_web_config": "",
	"metrics_reasons":    "16",
	"metrics_vcpus":      "false",
}

// flagKeys holds the keys that have a flag.
var flagKeys = map[string]string{"socket": "socket", "log_level": "log-level"}

// load makes the configuration out of flags, VIRTEXIT_<KEY> in the environment,
// and the file, the first of these that sets a key. A file that was not asked
// for may be missing.
func load(file string, required bool, flags *pflag.FlagSet) (config, error) {
	data, err := os.ReadFile(file)
	if err != nil && (required || !errors.Is(err, fs.ErrNotExist)) {
		return config{}, err // names the file
	}
	settings, err := parse(data)
	if err != nil {
		return config{}, fmt.Errorf("%s: %w", file, err)
	}
	v := viper.New()
	v.SetEnvPrefix("virtexit")
	for key, value := range defaults {
		v.SetDefault(key, value)
		if err := v.BindEnv(key); err != nil {
			return config{}, err
		}
	}
	for key, flag := range flagKeys {
		if err := v.BindPFlag(key, flags.Lookup(flag)); err != nil {
			return config{}, err
		}
	}
	if err := v.MergeConfigMap(settings); err != nil {
		return config{}, fmt.Errorf("%s: %w", file, err)
	}
	c, key, err := decode(v)
	if err != nil {
		return config{}, fmt.Errorf("%s: %w", origin(key, file, flags), err)
	}
	return c, nil
}

// origin tells what has set a key.
func origin(key, file string, flags *pflag.FlagSet) string {
	variable := "VIRTEXIT_" + strings.ToUpper(key)
	switch name := flagKeys[key]; {
	case name != "" && flags.Changed(name):
		return "--" + name
	case os.Getenv(variable) != "":
		return variable
	}
	return file
}

// parse reads a file's keys. viper alone would let an unknown key pass that has
// no value.
func parse(data []byte) (map[string]any, error) {
	var settings map[string]any
	if err := yaml.Unmarshal(data, &settings); err != nil {
		return nil, err
	}
	for _, key := range slices.Sorted(maps.Keys(settings)) {
		if _, ok := defaults[key]; !ok {
			return nil, fmt.Errorf("unknown key %q: known are %s", key, strings.Join(slices.Sorted(maps.Keys(defaults)), ", "))
		}
	}
	return settings, nil
}

// decode turns the settings into a config, or tells which key is not valid.
func decode(v *viper.Viper) (c config, bad string, err error) {
	for _, key := range slices.Sorted(maps.Keys(defaults)) {
		value, err := word(v.Get(key))
		if err != nil {
			return c, key, fmt.Errorf("%s: %w", key, err)
		}
		if allowed := c.set(key, value); allowed != "" {
			return c, key, fmt.Errorf("%s: %q is not valid: %s", key, value, allowed)
		}
	}
	return c, "", nil
}

// word gives a value as one writes it, also a number or a truth value.
func word(value any) (string, error) {
	switch value.(type) {
	case nil:
		return "", nil
	case string, bool, int, int64, uint64, float64:
		return fmt.Sprint(value), nil
	}
	return "", fmt.Errorf("%v is not valid: a single value is wanted", value)
}

// set sets a key. When the value is not valid it says what is.
func (c *config) set(key, value string) (allowed string) {
	var err error
	switch key {
	case "collection":
		c.on = value == "on"
		if !c.on && value != "off" {
			return "on and off are allowed"
		}
	case "level":
		if c.level, err = daemon.ParseLevel(value); err != nil {
			return "count, time and recent are allowed"
		}
	case "duty":
		if c.duty, err = api.ParseDuty(value); err != nil {
			return strings.TrimPrefix(err.Error(), "duty: ")
		}
	case "interval":
		if c.interval, err = time.ParseDuration(value); err != nil || c.interval < 100*time.Millisecond || c.interval > time.Hour {
			return "a duration from 100ms to 1h is allowed"
		}
	case "retention":
		if c.retention.Age, err = time.ParseDuration(value); err != nil || c.retention.Age < 0 {
			return "a duration is allowed, such as 30m"
		}
	case "retention_count":
		if c.retention.Count, err = strconv.Atoi(value); err != nil || c.retention.Count < 0 {
			return "a number of domains is allowed"
		}
	case "state_dir":
		c.stateDir = value
		if value != "" && !filepath.IsAbs(value) {
			return "an absolute path is allowed, or nothing"
		}
	case "state_interval":
		if c.stateInterval, err = time.ParseDuration(value); err != nil || c.stateInterval < 5*time.Second || c.stateInterval > time.Hour {
			return "a duration from 5s to 1h is allowed"
		}
	case "collector":
		c.collector, c.replay = "", ""
		name, file, recorded := strings.Cut(value, ":")
		switch {
		case recorded && name == "replay" && file != "":
			c.replay = file
		case !slices.Contains([]string{"auto", "kmod", "ebpf", "kvmstats"}, value):
			return "auto, kmod, ebpf, kvmstats and replay:FILE are allowed"
		default:
			c.collector = value
		}
	case "socket":
		if c.socket.path = value; !isSocketPath(value) {
			return "an absolute path of at most 107 bytes is allowed"
		}
	case "read_only_socket":
		if c.readOnly.path = value; value != "" && !isSocketPath(value) {
			return "an absolute path of at most 107 bytes is allowed, or nothing"
		}
	case "socket_mode":
		return c.socket.setMode(value)
	case "read_only_mode":
		return c.readOnly.setMode(value)
	case "group":
		c.socket.group = value
	case "read_only_group":
		c.readOnly.group = value
	case "admin_group":
		c.adminGroup = value
	case "libvirt_uri":
		c.libvirtURI = cmp.Or(value, defaults[key])
	case "metrics_listen":
		c.metrics.listen = value
		if _, port, err := net.SplitHostPort(value); value != "" && (err != nil || port == "") {
			return "a host and a port is allowed, such as localhost:9177, or a port, such as :9177"
		}
	case "metrics_web_config":
		c.metrics.webConfig = value
		if value != "" && !filepath.IsAbs(value) {
			return "an absolute path is allowed, or nothing"
		}
	case "metrics_reasons":
		if c.metrics.reasons, err = strconv.Atoi(value); err != nil || c.metrics.reasons < 1 || c.metrics.reasons > 100 {
			return "a number from 1 to 100 is allowed"
		}
	case "metrics_vcpus":
		if c.metrics.vcpus, err = strconv.ParseBool(value); err != nil {
			return "true and false are allowed"
		}
	case "log_level":
		if c.logLevel, err = parseLogLevel(value); err != nil {
			return "debug, info, warn and error are allowed"
		}
	}
	return ""
}

// isSocketPath tells whether the kernel's sockaddr_un, which has room for 107 bytes
// and a NUL, can hold it.
func isSocketPath(s string) bool {
	return filepath.IsAbs(s) && len(s) <= 107 && !strings.ContainsRune(s, 0)
}

// setMode sets the mode. When it is not valid it says what is.
func (l *listening) setMode(value string) (allowed string) {
	mode, err := strconv.ParseUint(value, 8, 32)
	l.mode = fs.FileMode(mode)
	if err != nil || mode&^0o660 != 0 || mode&0o600 != 0o600 {
		return `0600 and 0660 are allowed, in quotes`
	}
	return ""
}

func parseLogLevel(word string) (slog.Level, error) {
	for _, l := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError} {
		if strings.ToLower(l.String()) == word {
			return l, nil
		}
	}
	return 0, errors.New("unknown")
}
