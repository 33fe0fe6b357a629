// SPDX-License-Identifier: Apache-2.0

// Package lab boots stock Debian kernels in emulated machines with nested virtualization and runs commands and Go tests
// there, as root, on any Linux host. QEMU's own CPU (TCG) provides AMD's SVM and arm64's EL2, Bochs provides Intel's VMX.
//
// In QEMU's amd64 machine the command sees the host's root file system under the same paths, with a layer in memory that takes what it
// writes. Where Config.System is set it sees that system, which its own init has booted, and the host's files read-only
// below /host. In the other machines it sees busybox and the files named by Config.Files.
//
// A command has succeeded only when the machine says so: its exit status arrives as the last line on a serial port that
// nothing else writes to. A machine that panics, hangs or goes silently is an error that quotes the console.
package lab

import (
	"bytes"
	"cmp"
	"context"
	"debug/elf"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// InsideVar is set to the emulator's name in the environment of commands that run inside the lab.
const InsideVar = "VIRTEXIT_LAB_INSIDE"

// AcceleratorVar names the environment variable with QEMU's -accel argument; DefaultAccelerator otherwise. The lab never
// picks /dev/kvm by itself: that it is there does not mean that guests of its guests run.
const (
	AcceleratorVar     = "VIRTEXIT_LAB_ACCEL"
	DefaultAccelerator = "tcg,thread=single" // thread=multi trips over kernel code that is patched while it runs
)

// Emulator is what runs the machine.
type Emulator string

const (
	QEMU  Emulator = "qemu"  // AMD CPU with SVM
	Bochs Emulator = "bochs" // Intel CPU with VMX; one CPU, and slow: about three minutes to boot
	ARM64 Emulator = "arm64" // QEMU's arm64 CPU with EL2; the kernel must be an arm64 one
)

// Config describes a machine and the command that it runs. Only Command is needed.
//
// QEMU 7.2 delivers an interrupt to a machine's guest twice when its CPU is kicked on behalf of another between VMRUN and
// the next exit: a guest that boots a kernel hangs now and then on a machine with more than one CPU. Guests that leave
// interrupts off, as those of package guest do, run on any number.
type Config struct {
	Name     string   // names the log directory
	Emulator Emulator // QEMU where empty
	Kernel   string   // see FindKernel
	CPUs     int      // 2 where 0; guests that take interrupts need 1, see above
	Memory   int      // MiB; 2048 where 0, 1024 on arm64, 512 in Bochs
	Accel    string   // QEMU's -accel argument; see AcceleratorVar
	Icount   bool     // one CPU whose TSC counts instructions
	Cmdline  string   // further kernel arguments

	Command []string      // run as root
	Dir     string        // the command's working directory; the caller's where empty
	Env     []string      // further environment of the command, as NAME=value
	System  string        // root of a Debian system that boots with its own init, see FindSystem; QEMU's amd64 machine alone
	Timeout time.Duration // from power-on to power-off; 5 minutes where 0, 20 in Bochs

	// Files and Modules go into a machine that does not see the host: files of the host, which keep their paths, and
	// names of kernel modules for modprobe. QEMU ignores both, since all is there.
	Files   []string
	Modules []string

	Output io.Writer // takes the command's output and errors as they come
	tty    bool      // the command talks to this process's terminal
}

// Result tells about a machine that ran.
type Result struct {
	Console string        // path of the kernel's console log
	Boot    time.Duration // from power-on to the command's start
	Command time.Duration // the command's run time

	// Complaint is what the kernel wrote to the console from where it found something wrong with itself: a warning, a
	// report of KASAN or lockdep, a panic. It is empty where the kernel is content.
	Complaint string
}

// ExitError is a command's exit status other than 0.
type ExitError struct {
	Status  int
	Console string // path of the kernel's console log
}

func (e *ExitError) Error() string {
	return fmt.Sprintf("exit status %d in the lab (console: %s)", e.Status, e.Console)
}

// Inside tells whether this process runs in a lab machine.
func Inside() bool { return os.Getenv(InsideVar) != "" }

// Run boots a machine, runs the command in it and powers it off. A command that fails is an *ExitError; any other error
// means that the machine never told how the command ended. Result is filled in as far as the machine got.
func Run(ctx context.Context, c Config) (Result, error) {
	c, err := c.withDefaults()
	if err != nil {
		return Result{}, err
	}
	kernel, err := FindKernel(c.Kernel)
	if err != nil {
		return Result{}, err
	}
	logs, err := buildDir("logs")
	if err != nil {
		return Result{}, err
	}
	dir, err := os.MkdirTemp(logs, c.Name+"-")
	if err != nil {
		return Result{}, err
	}
	m := &machine{Config: c, kernel: kernel, dir: dir}
	defer os.Remove(m.initramfs())
	if err := m.writeInitramfs(); err != nil {
		return Result{}, fmt.Errorf("initramfs: %w", err)
	}

	ctx, cancel := context.WithTimeoutCause(ctx, c.Timeout, fmt.Errorf("%w: no end after %s", context.DeadlineExceeded, c.Timeout))
	defer cancel()
	started := time.Now()
	m.port = &port{out: c.Output}
	err = m.power(ctx)
	ended := time.Now()

	complaint, end := m.complaint()
	r := Result{Console: m.console(), Complaint: complaint}
	if !m.port.started.IsZero() {
		r.Boot = m.port.started.Sub(started)
		r.Command = cmp.Or(m.port.ended, ended).Sub(m.port.started)
	}
	switch {
	case m.port.ended.IsZero():
		cause := errors.Join(context.Cause(ctx), err)
		if cause == nil {
			cause = errors.New("went down without an exit status")
		}
		return r, fmt.Errorf("lab machine %s, kernel %s: %w\nconsole log %s says:\n  %s",
			c.Name, kernel.Release, cause, r.Console, cmp.Or(complaint, end))
	case m.port.err != nil:
		return r, fmt.Errorf("output of the command: %w", m.port.err)
	case m.port.status != 0:
		return r, &ExitError{m.port.status, r.Console}
	}
	return r, nil
}

// Shell is Run with a shell on this process's terminal for a command.
func Shell(ctx context.Context, c Config) error {
	c.tty = true
	c.Command = []string{"bash", "-l"}
	stty := exec.Command("stty", "size") // prints rows and columns
	stty.Stdin = os.Stdin
	if out, err := stty.Output(); err == nil {
		if size := strings.Fields(string(out)); len(size) == 2 {
			c.Command = []string{"sh", "-c", "stty rows $0 cols $1; exec bash -l", size[0], size[1]}
		}
	}
	_, err := Run(ctx, c)
	return err
}

func (c Config) withDefaults() (Config, error) {
	if len(c.Command) == 0 {
		return c, errors.New("no command to run in the lab")
	}
	wd, err := os.Getwd()
	if err != nil {
		return c, err
	}
	c.Emulator = cmp.Or(c.Emulator, QEMU)
	c.Name = cmp.Or(c.Name, filepath.Base(c.Command[0]))
	c.Dir = cmp.Or(c.Dir, wd)
	if c.System != "" {
		c.Dir = filepath.Join("/host", c.Dir)
	}
	c.Accel = cmp.Or(c.Accel, os.Getenv(AcceleratorVar), DefaultAccelerator)
	if c.Output == nil {
		c.Output = io.Discard
	}
	if c.System != "" && (c.tty || c.Emulator != QEMU) {
		return c, errors.New("a system of its own boots in QEMU's amd64 machine alone, and has no terminal")
	}
	switch c.Emulator {
	case QEMU:
		c.CPUs = cmp.Or(c.CPUs, 2)
		c.Memory = cmp.Or(c.Memory, 2048)
		c.Timeout = cmp.Or(c.Timeout, 5*time.Minute)
		if c.Icount {
			c.CPUs, c.Accel = 1, DefaultAccelerator
		}
	case Bochs:
		c.CPUs = 1
		c.Memory = cmp.Or(c.Memory, 512)
		c.Timeout = cmp.Or(c.Timeout, 20*time.Minute)
		if c.tty || c.Icount {
			return c, errors.New("no terminal and no icount in Bochs")
		}
	case ARM64:
		c.CPUs = cmp.Or(c.CPUs, 2)
		c.Memory = cmp.Or(c.Memory, 1024)
		c.Timeout = cmp.Or(c.Timeout, 5*time.Minute)
		if c.tty || c.Icount {
			return c, errors.New("no terminal and no icount on arm64")
		}
	default:
		return c, fmt.Errorf("unknown emulator %q", c.Emulator)
	}
	return c, nil
}

// machine is one run of a Config.
type machine struct {
	Config
	kernel Kernel
	dir    string // logs, and files for the time of the run
	port   *port
}

func (m *machine) console() string   { return filepath.Join(m.dir, "console.log") }
func (m *machine) initramfs() string { return filepath.Join(m.dir, "initramfs") }

func (m *machine) power(ctx context.Context) error {
	switch m.Emulator {
	case Bochs:
		return m.bochs(ctx)
	case ARM64:
		return m.arm64(ctx)
	}
	return m.qemu(ctx)
}

var (
	//go:embed init.sh
	initScript []byte
	//go:embed system.sh
	systemScript []byte
	//go:embed system.service
	systemUnit []byte
)

// shared holds the modules that a machine needs to reach the host's files.
var shared = []string{"virtio_pci", "9pnet_virtio", "9p", "overlay"}

func (m *machine) writeInitramfs() error {
	f, err := os.Create(m.initramfs())
	if err != nil {
		return err
	}
	defer f.Close()
	a := NewArchive(f)
	busybox := tool("busybox")
	if m.Emulator == ARM64 {
		busybox = m.kernel.busybox()
	}
	if err := addBusybox(a, busybox); err != nil {
		return err
	}
	a.Mkdir("/dev")
	a.Add("/init", 0o755, initScript)

	config := map[string]string{"release": m.kernel.Release, "modules": "", "port": "ttyS1", "share": "no", "system": m.System, "tty": "no"}
	if m.Emulator == ARM64 {
		config["port"] = "ttyS0" // the console is none of them
	}
	modules := m.Modules
	if m.Emulator == QEMU {
		config["share"] = "yes"
		config["tree"] = m.kernel.Modules()
		modules = shared
	}
	if m.tty {
		config["tty"] = "yes"
	}
	if len(modules) > 0 {
		files, err := m.kernel.Closure(modules)
		if err != nil {
			return err
		}
		for i, host := range files {
			inside := strings.TrimPrefix(host, m.kernel.Dir)
			a.AddHost(inside, host)
			files[i] = inside
		}
		if m.Emulator == QEMU {
			config["modules"] = strings.Join(files, " ")
		} else {
			a.AddHost(filepath.Join("/lib/modules", m.kernel.Release, "modules.dep"), filepath.Join(m.kernel.Modules(), "modules.dep"))
		}
	}
	if m.Emulator != QEMU {
		a.Mkdir(m.Dir)
		for _, file := range m.Files {
			a.AddHost(file, file)
		}
	}
	var script strings.Builder
	for _, name := range slices.Sorted(maps.Keys(config)) {
		fmt.Fprintf(&script, "%s=%s\n", name, quote(config[name]))
	}
	a.Add("/lab/config", 0o644, []byte(script.String()))
	a.Add("/lab/command", 0o644, m.script())
	if m.System != "" {
		a.Add("/lab/system.sh", 0o644, systemScript)
		a.Add("/lab/system.service", 0o644, systemUnit)
	}
	return errors.Join(a.Close(), f.Close())
}

// addBusybox adds a static busybox with a command in /bin for each of the applets that the host's has.
func addBusybox(a *Archive, busybox string) error {
	program, err := elf.Open(busybox)
	if err != nil {
		return err
	}
	defer program.Close()
	if libraries, err := program.ImportedLibraries(); err != nil || len(libraries) > 0 {
		return fmt.Errorf("%s is not static: apt-get install busybox-static", busybox)
	}
	out, err := exec.Command(tool("busybox"), "--list").Output()
	if err != nil {
		return err
	}
	a.AddHost("/bin/busybox", busybox)
	for _, applet := range strings.Fields(string(out)) {
		if applet != "busybox" {
			a.Symlink("/bin/"+applet, "busybox")
		}
	}
	a.Symlink("/sbin", "bin") // where the kernel looks for modprobe
	return nil
}

// WriteGuest writes an initramfs with busybox and a shell script for an init, for guests of the machine that boot a kernel.
// The script finds /proc, /sys and /dev mounted, and the modules inserted whose files are given, in this order.
func WriteGuest(path, script string, modules ...string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	a := NewArchive(f)
	if err := addBusybox(a, tool("busybox")); err != nil {
		return err
	}
	init := "#!/bin/sh\nmkdir -p /proc /sys /dev\nmount -t proc p /proc\nmount -t sysfs s /sys\nmount -t devtmpfs d /dev\n"
	for _, file := range modules {
		name := "/modules/" + filepath.Base(file)
		a.AddHost(name, file)
		init += "insmod " + name + "\n"
	}
	a.Add("/init", 0o755, []byte(init+script))
	return errors.Join(a.Close(), f.Close())
}

// script is what the machine's shell runs.
func (m *machine) script() []byte {
	env := []string{"HOME=/root", InsideVar + "=" + string(m.Emulator)}
	if m.Emulator == QEMU {
		env = append(env, "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin", "TERM="+os.Getenv("TERM"))
	} else {
		env = append(env, "PATH=/bin")
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "cd %s || exit\n", quote(m.Dir))
	for _, e := range append(env, m.Env...) {
		fmt.Fprintf(&b, "export %s\n", quote(e))
	}
	b.WriteString("exec")
	for _, arg := range m.Command {
		b.WriteString(" " + quote(arg))
	}
	b.WriteString("\n")
	return b.Bytes()
}

// quote makes s one word of a shell command.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

func (m *machine) cmdline() string {
	// On a host that is busy the timer may not tick ten times while the kernel waits for that, which it takes for a broken one.
	cmdline := "console=ttyS0 panic=-1 oops=panic panic_on_warn=1 no_timer_check " + m.Config.Cmdline
	if m.Emulator != Bochs && !m.Icount {
		cmdline += " tsc=reliable" // all CPUs have the same one, however long one of them had to wait
	}
	return cmdline
}

// KVM on a real-time kernel wants a TSC of constant rate; and one that it does not trust it sets anew when a vCPU's thread
// runs again, so that a kernel whose threads are preempted right after an exit, as the debug kernel's are, cannot tell when
// that exit was. QEMU's own CPU has a constant TSC and may not say so, unless all that is asked for is forced upon it: then
// what it lacks must not be asked for.
const (
	cpu         = "EPYC,+svm,-avx,-avx2,-f16c"
	constantTSC = ",x-force-features=on,+invtsc,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,-nrip-save,-xsavec"
)

func (m *machine) wantsTSC() bool {
	return strings.Contains(m.kernel.Release, "-rt-") || strings.HasSuffix(m.kernel.Release, "-debug")
}

// knownTSC tells the kernel the frequency of its TSC, which is that of the host. Otherwise it measures how long a timer takes,
// and finds a fraction of the frequency when the host is busy with something else at that moment. With icount, nothing is.
func (m *machine) knownTSC() string {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil || m.Icount {
		return ""
	}
	match := bogoMIPS.FindSubmatch(info)
	if match == nil {
		return ""
	}
	mips, err := strconv.ParseFloat(string(match[1]), 64)
	if err != nil {
		return ""
	}
	return fmt.Sprintf(" tsc_early_khz=%.0f", mips/2*1000)
}

// bogoMIPS is, on x86, how often the TSC ticks in half a microsecond: what the host's kernel delays by.
var bogoMIPS = regexp.MustCompile(`(?m)^bogomips\s*: ([0-9.]+)$`)

func (m *machine) cpu() string {
	if m.wantsTSC() {
		return cpu + constantTSC
	}
	return cpu
}

func (m *machine) qemu(ctx context.Context) error {
	args := []string{
		"-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
		"-machine", "pc", "-cpu", m.cpu(),
		"-accel", m.Accel, "-smp", strconv.Itoa(m.CPUs), "-m", strconv.Itoa(m.Memory),
		"-kernel", m.kernel.Image(), "-initrd", m.initramfs(), "-append", m.cmdline() + m.knownTSC(),
		"-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap",
		"-serial", "file:" + m.console(),
	}
	if m.Icount {
		args = append(args, "-icount", "shift=0,sleep=off")
	}
	if m.tty {
		args = append(args, "-serial", "mon:stdio")
	} else {
		args = append(args, "-serial", "stdio")
	}
	return m.emulate(ctx, "qemu-system-x86_64", args)
}

// emulate runs QEMU, whose standard output is the machine's second serial port.
func (m *machine) emulate(ctx context.Context, qemu string, args []string) error {
	cmd := exec.CommandContext(ctx, qemu, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.Stdout = m.port
	if m.tty {
		cmd.Stdin = os.Stdin
	}
	err := runBound(cmd)
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("qemu: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	return nil
}

// runBound runs a command that dies with this process, however that ends.
func runBound(cmd *exec.Cmd) error {
	// The kernel sends the signal when the thread that started the child goes.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	return cmd.Run()
}

// bad is how a kernel begins to tell what killed it, or what it has found wrong with itself.
var bad = regexp.MustCompile(`Kernel panic|Oops:|general protection fault|\] (?:BUG|WARNING|INFO): |\[ BUG: `)

// complaint quotes the console from where the kernel complains; otherwise it is empty, and end is the console's end.
func (m *machine) complaint() (complaint, end string) {
	const most = 40
	text, err := os.ReadFile(m.console())
	if err != nil {
		return "", err.Error()
	}
	lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(text), "\r", "")), "\n")
	// What it complains about before is the machine.
	if i := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, "Run /init as init process") }); i >= 0 {
		lines = lines[i:]
	}
	if i := slices.IndexFunc(lines, bad.MatchString); i >= 0 {
		complaint = strings.Join(lines[i:min(len(lines), i+most)], "\n  ")
	}
	return complaint, strings.Join(lines[max(0, len(lines)-most):], "\n  ")
}
