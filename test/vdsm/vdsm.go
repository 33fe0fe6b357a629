// SPDX-License-Identifier: Apache-2.0

// Package vdsm runs hooks as oVirt's VDSM 4.50 does, for tests where there is
// no VDSM.
package vdsm

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Host is a host with hooks.
type Host struct {
	Hooks string              // the folder of the folders of hook points
	Tmp   string              // where files that hooks edit are
	User  *syscall.Credential // that VDSM runs as; nil: the caller
	Env   []string            // of VDSM, beside the caller's
}

// VM is a virtual machine that a hook is called for.
type VM struct {
	ID     string
	XML    string
	Custom map[string]string // its custom properties
}

// Run is what a hook did.
type Run struct {
	Script string
	Status int
	Stderr string
	Took   time.Duration
}

// Edit has the hooks of a point edit a text of JSON.
func (h *Host) Edit(point string, text []byte) (after []byte, runs []Run, err error) {
	return h.run(point, "_hook_json", text, nil)
}

// Tell has the hooks of a point told of a VM.
func (h *Host) Tell(point string, vm VM) ([]Run, error) {
	env := []string{"vmId=" + vm.ID}
	for _, name := range slices.Sorted(maps.Keys(vm.Custom)) {
		env = append(env, name+"="+vm.Custom[name])
	}
	_, runs, err := h.run(point, "_hook_domxml", []byte(vm.XML), env)
	return runs, err
}

func (h *Host) run(point, variable string, text []byte, env []string) (after []byte, runs []Run, err error) {
	scripts, err := h.scripts(point)
	if err != nil || len(scripts) == 0 {
		return text, nil, err
	}
	f, err := os.CreateTemp(h.Tmp, "tmp")
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	_, err = f.Write(text)
	if h.User != nil {
		err = errors.Join(err, f.Chown(int(h.User.Uid), int(h.User.Gid)))
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, nil, err
	}
	env = slices.Concat(os.Environ(), h.Env, env, []string{"PYTHONPATH=:/usr/lib/python3/site-packages/vdsm/hook", variable + "=" + f.Name()})
	for _, script := range scripts {
		run, err := h.execute(script, env)
		if err != nil {
			return nil, runs, err
		}
		if runs = append(runs, run); run.Status == 2 {
			break
		}
	}
	// By its name: a hook may have put another in its place.
	if after, err = os.ReadFile(f.Name()); err == nil && h.User != nil {
		err = h.owned(f.Name())
	}
	return after, runs, err
}

// owned checks that VDSM itself could read a file.
func (h *Host) owned(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if s := info.Sys().(*syscall.Stat_t); s.Uid != h.User.Uid || s.Gid != h.User.Gid || info.Mode() != 0o600 {
		return fmt.Errorf("%s: owner %d:%d, mode %v", path, s.Uid, s.Gid, info.Mode())
	}
	return nil
}

// scripts lists what VDSM executes, in its order.
func (h *Host) scripts(point string) ([]string, error) {
	all, err := filepath.Glob(filepath.Join(h.Hooks, point, "[^.]*")) // sorted
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(path string) bool {
		info, err := os.Stat(path)
		return err != nil || !info.Mode().IsRegular() || unix.Access(path, unix.X_OK) != nil
	}), nil
}

// execute runs a script at VDSM's priority, which root alone can give, and, like
// VDSM, on all CPUs by means of taskset.
func (h *Host) execute(script string, env []string) (Run, error) {
	var stderr bytes.Buffer
	cmd := exec.Command("taskset", "--cpu-list", fmt.Sprintf("0-%d", runtime.NumCPU()-1), script)
	cmd.Dir = "/"
	cmd.Env = env
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: h.User}
	started := make(chan error)
	begin := time.Now()
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its priority
		if os.Geteuid() == 0 {
			if err := unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), -20); err != nil {
				started <- err
				return
			}
		}
		started <- cmd.Start()
	}()
	if err := <-started; err != nil {
		return Run{}, err
	}
	err := cmd.Wait()
	took := time.Since(begin)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return Run{}, err
	}
	return Run{script, cmd.ProcessState.ExitCode(), stderr.String(), took}, nil
}
