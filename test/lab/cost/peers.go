// SPDX-License-Identifier: Apache-2.0

package cost

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
)

const tracefs = "/sys/kernel/tracing"

// allPeers are the other ways to count exits.
func allPeers() []observer {
	return []observer{
		{name: "perf stat", start: perfStat},
		{name: "ftrace histogram", start: histogram},
		{name: "BPF, raw tracepoint", start: bpfRaw},
		{name: "BPF, tracepoint", start: bpfTracepoint},
		{name: "perf kvm stat record", start: perfRecord},
	}
}

// perfStat counts all exits of the host: perf stat -a -e kvm:kvm_exit.
func perfStat(int) (func() (int, error), error) {
	stop, err := perf("stat", "-x", ",", "-a", "-e", "kvm:kvm_exit")
	if err != nil {
		return nil, err
	}
	return func() (int, error) {
		out, err := stop()
		if err != nil {
			return 0, err
		}
		return number(`(?m)^(\d+),,kvm:kvm_exit,`, out)
	}, nil
}

// perfRecord records exits and entries of the host, and what else perf kvm stat wants, for a report.
func perfRecord(int) (func() (int, error), error) {
	dir, err := os.MkdirTemp("", "cost-")
	if err != nil {
		return nil, err
	}
	data := filepath.Join(dir, "perf.data")
	stop, err := perf("kvm", "stat", "record", "-a", "-o", data)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return func() (int, error) {
		defer os.RemoveAll(dir)
		if _, err := stop(); err != nil {
			return 0, err
		}
		out, err := exec.Command("perf", "kvm", "-i", data, "stat", "report", "--event=vmexit").CombinedOutput()
		if err != nil {
			return 0, fmt.Errorf("perf kvm stat report: %w: %s", err, out)
		}
		return number(`Total Samples:(\d+)`, out)
	}, nil
}

// perf starts perf around a command that lasts until stop, which returns what perf wrote to its standard error.
func perf(args ...string) (stop func() ([]byte, error), err error) {
	cmd := exec.Command("perf", append(args, "--", "sh", "-c", "echo ready; exec cat")...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop = func() ([]byte, error) {
		err := in.Close()
		if err := errors.Join(err, cmd.Wait()); err != nil {
			return nil, fmt.Errorf("%q: %w: %s", cmd.Args, err, stderr.Bytes())
		}
		return stderr.Bytes(), nil
	}
	// perf takes its time before it runs the command, but by then it counts.
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		_, stopErr := stop()
		return nil, errors.Join(err, stopErr)
	}
	return stop, nil
}

// histogram is ftrace's, by thread and reason.
func histogram(tid int) (func() (int, error), error) {
	const trigger = "hist:keys=common_pid,exit_reason"
	event := filepath.Join(tracefs, "events/kvm/kvm_exit")
	write := func(text string) error { return os.WriteFile(filepath.Join(event, "trigger"), []byte(text), 0) }
	if err := write(trigger); err != nil {
		return nil, err
	}
	return func() (int, error) {
		text, err := os.ReadFile(filepath.Join(event, "hist"))
		if err := errors.Join(err, write("!"+trigger)); err != nil {
			return 0, err
		}
		return number(fmt.Sprintf(`common_pid: +%d, .* hitcount: +(\d+)`, tid), text)
	}, nil
}

// number is the sum of the numbers that the expression captures.
func number(expression string, text []byte) (int, error) {
	matches := regexp.MustCompile(expression).FindAllSubmatch(text, -1)
	if matches == nil {
		return 0, fmt.Errorf("no match for %s in: %s", expression, text)
	}
	sum := 0
	for _, match := range matches {
		n, err := strconv.Atoi(string(match[1]))
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}
