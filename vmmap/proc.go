// SPDX-License-Identifier: Apache-2.0

package vmmap

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// tick is the precision of a start time in /proc: nanoseconds of USER_HZ,
// which is 100 wherever KVM runs.
const tick = 1e9 / 100

// stat is what /proc/<pid>/stat tells.
type stat struct {
	comm    string
	state   byte
	parent  int
	threads int
	start   uint64 // ticks of CLOCK_BOOTTIME
}

// dead tells of a process that waits for its parent: nothing of it runs.
func (s *stat) dead() bool { return (s.state == 'Z' || s.state == 'X') && s.threads <= 1 }

// parseStat reads /proc/<pid>/stat. The name may hold anything, also spaces
// and parentheses; it ends at the last of these.
func parseStat(b []byte) (stat, error) {
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return stat{}, fmt.Errorf("stat: no name in %q", b)
	}
	f := strings.Fields(string(b[end+1:])) // from field 3, the state
	if len(f) < 20 || len(f[0]) != 1 {
		return stat{}, fmt.Errorf("stat: %d fields after the name in %q", len(f), b)
	}
	parent, err := strconv.Atoi(f[1])
	if err != nil {
		return stat{}, fmt.Errorf("stat: parent: %w", err)
	}
	threads, err := strconv.Atoi(f[17])
	if err != nil {
		return stat{}, fmt.Errorf("stat: number of threads: %w", err)
	}
	start, err := strconv.ParseUint(f[19], 10, 64)
	if err != nil {
		return stat{}, fmt.Errorf("stat: start time: %w", err)
	}
	return stat{comm: string(b[open+1 : end]), state: f[0][0], parent: parent, threads: threads, start: start}, nil
}

// args is who a process says it is: a hint, for whoever starts it chooses.
type args struct {
	name string
	uuid string
}

// parseCmdline reads /proc/<pid>/cmdline as the program does that it is of. One
// that is not known is taken for QEMU.
func parseCmdline(b []byte) args {
	argv := split(b)
	switch program := filepath.Base(argv[0]); {
	case strings.HasPrefix(program, "firecracker"): // and its version
		return args{name: option(argv, "--id")}
	case strings.HasPrefix(program, "cloud-hypervisor"):
		return args{name: socketName(option(argv, "--api-socket"))}
	}
	return parseQEMU(argv)
}

func split(cmdline []byte) []string {
	return strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
}

// parseLauncher reads /proc/<pid>/cmdline of the first process in a pod, which
// is the parent of its QEMU. It returns nil when it is not KubeVirt's.
func parseLauncher(b []byte) *Cloud {
	argv := split(b)
	if !strings.HasPrefix(filepath.Base(argv[0]), "virt-launcher") { // or virt-launcher-monitor
		return nil
	}
	return &Cloud{
		System:       "kubevirt",
		Name:         text(option(argv, "--name")),
		Namespace:    text(option(argv, "--namespace")),
		InstanceUUID: parseUUID(option(argv, "--uid")),
	}
}

// option returns the value of a long option, in either spelling.
func option(argv []string, name string) string {
	for i, arg := range argv {
		if arg == name && i+1 < len(argv) {
			return argv[i+1]
		}
		if value, ok := strings.CutPrefix(arg, name+"="); ok {
			return value
		}
	}
	return ""
}

// socketName names a guest of Cloud Hypervisor, which has no name of its own,
// after its socket: "PATH" or "path=PATH". Where the socket is called "api" or
// "clh-api", as Kata does, the directory tells whose it is.
func socketName(s string) string {
	path := strings.TrimPrefix(s, "path=")
	if !strings.Contains(path, "/") {
		return "" // a file descriptor, say
	}
	name := strings.TrimSuffix(filepath.Base(path), filepath.Ext(path))
	if strings.HasSuffix(name, "api") {
		name = filepath.Base(filepath.Dir(path))
	}
	return strings.Trim(name, "/")
}

// parseQEMU reads the options -name and -uuid: one or two dashes, the last one
// wins. The kernel arguments in -append may be those of a tenant and are passed
// over.
func parseQEMU(argv []string) args {
	var a args
	for i := 1; i+1 < len(argv); i++ {
		option, ok := strings.CutPrefix(argv[i], "-")
		if !ok {
			continue
		}
		switch strings.TrimPrefix(option, "-") {
		case "append":
			i++
		case "name":
			i++
			if name := parseName(argv[i]); name != "" {
				a.name = text(name)
			}
		case "uuid":
			i++
			if uuid := parseUUID(argv[i]); uuid != "" {
				a.uuid = uuid
			}
		}
	}
	return a
}

// text replaces what is not UTF-8, as that of a name cut short by the kernel: a
// name is shown as JSON, and asked for as it is shown.
func text(s string) string { return strings.ToValidUTF8(s, "\ufffd") }

// parseName reads the value of -name: "guest=NAME,key=value..." or the older
// "NAME,key=value...". A comma within a value is doubled.
func parseName(s string) string {
	var name string
	for first := true; s != ""; first = false {
		key := "guest" // what the first value means when it has no key
		if i := strings.IndexAny(s, "=,"); i >= 0 && s[i] == '=' {
			key, s = s[:i], s[i+1:]
		} else if !first {
			key = ""
		}
		var value string
		if value, s = cutValue(s); key == "guest" {
			name = value
		}
	}
	return name
}

// cutValue returns the value that s begins with and what follows its comma.
func cutValue(s string) (value, rest string) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == ',' {
			if i+1 == len(s) || s[i+1] != ',' {
				return b.String(), s[i+1:]
			}
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String(), ""
}

// parseUUID returns a uuid in lower case with dashes, or nothing when s is none.
func parseUUID(s string) string {
	h := strings.ToLower(strings.ReplaceAll(s, "-", ""))
	if b, err := hex.DecodeString(h); err != nil || len(b) != 16 {
		return ""
	}
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// proc reads /proc, which lies at root.
type proc struct{ root string }

func (p proc) path(pid int, name string) string {
	return filepath.Join(p.root, strconv.Itoa(pid), name)
}

// stat reads the state of a process. The error wraps fs.ErrNotExist when there
// is none.
func (p proc) stat(pid int) (stat, error) {
	b, err := os.ReadFile(p.path(pid, "stat"))
	if err != nil {
		return stat{}, gone(err)
	}
	s, err := parseStat(b)
	if err == nil && s.dead() {
		err = fmt.Errorf("process %d is dead: %w", pid, fs.ErrNotExist)
	}
	return s, err
}

// cmdline reads the arguments of a process: who it says it is.
func (p proc) cmdline(pid int) ([]byte, error) {
	b, err := os.ReadFile(p.path(pid, "cmdline"))
	if err != nil {
		return nil, gone(err)
	}
	return b, nil
}

// tgid tells which process a thread belongs to.
func (p proc) tgid(tid int) (int, error) {
	b, err := os.ReadFile(p.path(tid, "status"))
	if err != nil {
		return 0, gone(err)
	}
	tgid, err := strconv.Atoi(field(b, "Tgid"))
	if err != nil {
		return 0, fmt.Errorf("status of %d: Tgid: %w", tid, err)
	}
	return tgid, nil
}

// uid tells whose a process is.
func (p proc) uid(pid int) (int, error) {
	b, err := os.ReadFile(p.path(pid, "status"))
	if err != nil {
		return 0, gone(err)
	}
	real, _, _ := strings.Cut(field(b, "Uid"), "\t") // effective, saved and of the file system
	uid, err := strconv.Atoi(real)
	if err != nil {
		return 0, fmt.Errorf("status of %d: Uid: %w", pid, err)
	}
	return uid, nil
}

// field returns what /proc/<pid>/status tells by that name; empty when nothing.
func field(status []byte, name string) string {
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// kvmUsers looks for the processes that hold a virtual machine open, whatever
// program they run. It reads every link of every process.
func (p proc) kvmUsers() ([]int, error) {
	entries, err := os.ReadDir(p.root)
	if err != nil {
		return nil, err
	}
	var users []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if has, err := p.hasVM(pid); has && err == nil { // or it died, or is not ours to see
			users = append(users, pid)
		}
	}
	return users, nil
}

func (p proc) hasVM(pid int) (bool, error) {
	fds, err := os.ReadDir(p.path(pid, "fd"))
	if err != nil {
		return false, gone(err)
	}
	for _, fd := range fds {
		link, err := os.Readlink(p.path(pid, "fd/"+fd.Name()))
		if err == nil && link == "anon_inode:kvm-vm" {
			return true, nil
		}
	}
	return false, nil
}

// gone turns the error of a process that died while it was read into that of
// one that was dead before.
func gone(err error) error {
	if errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("%w (%w)", fs.ErrNotExist, err)
	}
	return err
}
