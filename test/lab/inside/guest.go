// SPDX-License-Identifier: Apache-2.0

package inside

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"

	"virtexit/test/lab/guest"
)

// guestVar makes a test binary a guest with that many vCPUs; threadVar is the id that its only vCPU's thread is to have.
const (
	guestVar  = "VIRTEXIT_TEST_GUEST"
	threadVar = "VIRTEXIT_TEST_GUEST_THREAD"
)

// IsGuest tells whether this process is a Guest.
func IsGuest() bool { return os.Getenv(guestVar) != "" }

// Main is TestMain for packages that use Guest.
func Main(m *testing.M) {
	if !IsGuest() {
		os.Exit(m.Run())
	}
	if err := serve(os.Getenv(guestVar), os.Getenv(threadVar), os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

// Guest is a user of /dev/kvm, without QEMU or libvirt, in a process of its
// own: the test binary, started again. The process reads lines "VCPU PROGRAM",
// where the program is one of guest.Parse, and answers "VCPU ERROR" at its end.
type Guest struct {
	cmd     *exec.Cmd
	tids    []int
	answers []chan string
	close   func() error

	mu   sync.Mutex // one line at a time
	work io.WriteCloser
}

// StartGuest starts a process whose vCPUs wait for programs.
func StartGuest(vcpus int) (*Guest, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return StartGuestAs(exec.Command(exe), vcpus)
}

// StartGuestAs is StartGuest by a command, not yet started, that executes the
// test binary under any name and with any arguments.
func StartGuestAs(cmd *exec.Cmd, vcpus int) (g *Guest, err error) {
	g = &Guest{cmd: cmd}
	g.cmd.Env = append(g.cmd.Environ(), guestVar+"="+strconv.Itoa(vcpus))
	g.cmd.Stderr = os.Stderr
	if g.work, err = g.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := g.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := g.cmd.Start(); err != nil {
		return nil, err
	}
	g.close = sync.OnceValue(func() error { return errors.Join(g.work.Close(), g.cmd.Wait()) })
	lines := bufio.NewScanner(out)
	for i := range vcpus {
		tid := 0
		if lines.Scan() {
			tid, err = strconv.Atoi(lines.Text())
		}
		if tid == 0 {
			return nil, errors.Join(fmt.Errorf("guest: no thread for vCPU %d", i), err, g.Close())
		}
		g.tids = append(g.tids, tid)
		g.answers = append(g.answers, make(chan string, 1))
	}
	go func() {
		for lines.Scan() {
			vcpu, text, _ := strings.Cut(lines.Text(), " ")
			if i, err := strconv.Atoi(vcpu); err == nil {
				g.answers[i] <- text
			}
		}
		for _, answer := range g.answers {
			close(answer)
		}
	}()
	return g, nil
}

// StartGuestAt is StartGuest of one vCPU, of whose process and thread the ids are given, unless the thread's is 0. It fails
// where another process or thread has one of them, or was faster to get it.
func StartGuestAt(pid, tid int) (*Guest, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(exe)
	if tid != 0 {
		cmd.Env = append(os.Environ(), threadVar+"="+strconv.Itoa(tid))
	}
	if err := nextID(pid); err != nil {
		return nil, err
	}
	g, err := StartGuestAs(cmd, 1)
	if err != nil {
		return nil, err
	}
	if g.TGID() != pid {
		return nil, errors.Join(fmt.Errorf("guest: process %d, want %d", g.TGID(), pid), g.Close())
	}
	return g, nil
}

// nextID has the kernel give out an id, or the next that is free, to the process or thread that is made next.
func nextID(id int) error {
	return os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(id-1)), 0)
}

// TGID is the process.
func (g *Guest) TGID() int { return g.cmd.Process.Pid }

// TID is a vCPU's thread.
func (g *Guest) TID(vcpu int) int { return g.tids[vcpu] }

// Run runs a program on a vCPU to its end. Several vCPUs can run at a time.
func (g *Guest) Run(vcpu int, program string) error {
	g.mu.Lock()
	_, err := fmt.Fprintln(g.work, vcpu, program)
	g.mu.Unlock()
	if err != nil {
		return err
	}
	text, ok := <-g.answers[vcpu]
	if !ok {
		return errors.New("guest: the process has ended")
	}
	if text != "" {
		return fmt.Errorf("guest: vCPU %d: %s", vcpu, text)
	}
	return nil
}

// Close ends the process and returns when it is gone. It may be called again.
func (g *Guest) Close() error { return g.close() }

// Kill ends the process at once, whatever its vCPUs do, and returns when it is gone.
func (g *Guest) Kill() error {
	if err := g.cmd.Process.Kill(); err != nil {
		return err
	}
	var killed *exec.ExitError
	if err := g.Close(); err != nil && !errors.As(err, &killed) {
		return err
	}
	return nil
}

// newVM makes a VM, with one vCPU where its thread's id is given.
func newVM(vcpus, tid string) (*guest.VM, error) {
	if tid == "" {
		n, err := strconv.Atoi(vcpus)
		if err != nil {
			return nil, err
		}
		return guest.NewVM(n)
	}
	id, err := strconv.Atoi(tid)
	if err != nil {
		return nil, err
	}
	// Go takes a thread that it has for a vCPU's, which ends with the VM, and makes one when there is none left.
	for range 20 {
		vm, err := guest.NewVM(1)
		if err != nil || vm.VCPUs[0].TID() == id {
			return vm, err
		}
		if err := vm.Close(); err != nil {
			return nil, err
		}
		// KVM makes a thread of its own first.
		if err := nextID(id - 1); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("no thread gets the id %d", id)
}

// serve is the process.
func serve(vcpus, tid string, in io.Reader, out io.Writer) error {
	vm, err := newVM(vcpus, tid)
	if err != nil {
		return err
	}
	for _, v := range vm.VCPUs {
		fmt.Fprintln(out, v.TID())
	}
	var running sync.WaitGroup
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		number, text, _ := strings.Cut(lines.Text(), " ")
		i, err := strconv.Atoi(number)
		if err != nil {
			return err
		}
		running.Go(func() {
			p, err := guest.Parse(text)
			if err == nil {
				err = vm.VCPUs[i].Run(p)
			}
			if err != nil {
				fmt.Fprintln(out, i, err)
				return
			}
			fmt.Fprintf(out, "%d \n", i)
		})
	}
	running.Wait()
	return errors.Join(lines.Err(), vm.Close())
}
