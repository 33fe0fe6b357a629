// SPDX-License-Identifier: Apache-2.0

package inside

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// emulated matches what the kernel says of a machine that is emulated, and slow; what KVM says where a VM has the
// numbers of one that has not quite gone; and what busybox's modprobe has the kernel say of a compressed module.
var emulated = regexp.MustCompile(`guest TSC will not be reliable|hrtimer: interrupt took|clocksource: |KVM: debugfs: duplicate directory|Invalid ELF header magic`)

// QuietLog fails the test when, from now to its end, the kernel logs anything of virtexit's or a warning of anyone's.
func QuietLog(t testing.TB) {
	t.Helper()
	log, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Seek(log, 0, unix.SEEK_END); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer unix.Close(log)
		buf := make([]byte, 8192)
		for {
			n, err := unix.Read(log, buf) // one message, "level and facility,number,time,flags;text"
			if errors.Is(err, unix.EAGAIN) {
				return
			}
			if err != nil {
				t.Errorf("/dev/kmsg: %v", err)
				return
			}
			head, text, _ := strings.Cut(string(buf[:n]), ";")
			level, _, _ := strings.Cut(head, ",")
			const warning = 4
			if emulated.MatchString(text) {
				continue
			}
			if number, err := strconv.Atoi(level); err != nil || number&7 <= warning || strings.Contains(text, "virtexit") {
				t.Errorf("the kernel says %q", buf[:n])
			}
		}
	})
}

// CountExits has the kernel count the exits of each thread, by a histogram of ftrace's on KVM's tracepoint, until the test
// ends or KVM is unloaded. The function returned reads it.
func CountExits(t testing.TB) func() map[int]uint64 {
	t.Helper()
	const event = "/sys/kernel/tracing/events/kvm/kvm_exit"
	const trigger = "hist:keys=common_pid:size=8192"
	file := filepath.Join(event, "trigger")
	if err := os.WriteFile(file, []byte(trigger), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(file, []byte("!"+trigger), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	})
	return func() map[int]uint64 {
		t.Helper()
		hist, err := os.ReadFile(filepath.Join(event, "hist"))
		if err != nil {
			t.Fatal(err)
		}
		text := string(hist)
		if !strings.Contains(text, "Dropped: 0\n") {
			t.Fatalf("the histogram is not complete: %s", text[max(0, len(text)-200):])
		}
		counts := map[int]uint64{}
		for _, match := range histLine.FindAllStringSubmatch(text, -1) {
			tid, err := strconv.Atoi(match[1])
			n, err2 := strconv.ParseUint(match[2], 10, 64)
			if err := errors.Join(err, err2); err != nil {
				t.Fatal(err)
			}
			counts[tid] += n
		}
		return counts
	}
}

var histLine = regexp.MustCompile(`common_pid: +(\d+) } hitcount: +(\d+)`)

// KernelPages is how many bytes of memory are in use that the kernel accounts to nothing: neither to programs and caches nor
// to its own slabs and vmalloc. A module's pages are among them.
func KernelPages(t testing.TB) int {
	t.Helper()
	unix.Sync()
	// The second has the CPUs add up what each has counted.
	for _, file := range []string{"drop_caches", "stat_refresh"} {
		if err := os.WriteFile("/proc/sys/vm/"+file, []byte("3"), 0); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	zones, err := os.ReadFile("/proc/zoneinfo")
	if err != nil {
		t.Fatal(err)
	}
	kib := 0
	for _, match := range cpuPages.FindAllSubmatch(zones, -1) { // free, but on lists of the CPUs
		n, err := strconv.Atoi(string(match[1]))
		if err != nil {
			t.Fatal(err)
		}
		kib -= n * os.Getpagesize() >> 10
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		n, err := strconv.Atoi(fields[1])
		if err != nil {
			t.Fatal(err)
		}
		switch fields[0] {
		case "MemTotal:":
			kib += n
		case "MemFree:", "Buffers:", "Cached:", "AnonPages:", "Slab:", "KernelStack:", "PageTables:", "VmallocUsed:", "Percpu:":
			kib -= n
		}
	}
	return kib << 10
}

var cpuPages = regexp.MustCompile(`\n +count: +(\d+)`)

// ModuleMemory is what vmalloc holds for virtexit.ko, one line for each piece, without addresses.
func ModuleMemory(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile("/proc/vmallocinfo")
	if err != nil {
		t.Fatal(err)
	}
	var lines strings.Builder
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "[virtexit]") {
			_, rest, _ := strings.Cut(line, " ")
			lines.WriteString(rest)
		}
	}
	return lines.String()
}

// Schedstat tells of a thread of this machine how long it has run and how long it has waited for a CPU, in nanoseconds.
func Schedstat(t testing.TB, tid int) (ran, waited uint64) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", tid))
	if err == nil {
		_, err = fmt.Sscan(string(text), &ran, &waited)
	}
	if err != nil {
		t.Fatal(err)
	}
	return ran, waited
}
