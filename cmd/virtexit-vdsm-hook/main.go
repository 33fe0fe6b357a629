// SPDX-License-Identifier: Apache-2.0

// Command virtexit-vdsm-hook is a hook of VDSM, oVirt's agent on a host. It
// adds the exits of each VM to the statistics that VDSM reports, tells in the
// host's capabilities how they are collected, and sets the level of a VM that
// has the custom property virtexit. It asks virtexitd.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"virtexit/api"
	"virtexit/api/client"
)

// version is set by the linker.
var version = "dev"

const (
	// A statistics hook holds one of VDSM's eight workers.
	statsLimit = 300 * time.Millisecond
	// virtexitd may not know yet of a VM that has just begun to run.
	levelLimit = 800 * time.Millisecond
	// margin is what is left of a limit for all but asking virtexitd.
	margin = 50 * time.Millisecond
	// pause is for how long virtexitd is left alone before it is asked again.
	pause = 20 * time.Millisecond
)

const usage = `Usage: %s [-t]

A hook of VDSM: put a link to it into the folder of each hook point, of which it
serves
  after_get_vm_stats, after_get_all_vm_stats   adds kvmExits to each VM
  after_get_caps                               adds kvmExits to the host
  after_vm_start, after_vm_migrate_destination, after_vm_cont, after_vm_dehibernate
                 sets the VM's level to its custom property virtexit, if it has
                 one: off, count, time or recent

  -t  test it: run it as VDSM's user
  -V  print the version

Environment:
  VIRTEXIT_SOCKET  where virtexitd listens
`

func main() {
	os.Exit(run(os.Args, os.LookupEnv, os.Stdout, os.Stderr))
}

// run is the program. As a hook it succeeds whatever happens, since a failing
// one can make VDSM refuse what it was asked for; what VDSM is to log goes to
// stderr.
func run(args []string, env func(string) (string, bool), stdout, stderr io.Writer) int {
	socket, _ := env("VIRTEXIT_SOCKET")
	if socket == "" {
		socket = api.DefaultSocket
	}
	h := hook{client.New(socket), env}
	if len(args) == 2 {
		switch args[1] {
		case "-t":
			return h.test(stdout)
		case "-h", "--help":
			fmt.Fprintf(stdout, usage, args[0])
			return 0
		case "-V", "--version":
			fmt.Fprintln(stdout, "virtexit-vdsm-hook", version)
			return 0
		}
	}
	if err := h.serve(args[0]); err != nil {
		fmt.Fprintf(stderr, "virtexit: %s\n", strings.Join(strings.Fields(err.Error()), " "))
	}
	return 0
}

// hook is one run.
type hook struct {
	client *client.Client
	env    func(string) (string, bool)
}

// serve does what belongs to the hook point in whose folder the program was
// called: there is no other sign of it.
func (h *hook) serve(program string) error {
	path, err := filepath.Abs(program)
	if err != nil {
		return err
	}
	switch point := filepath.Base(filepath.Dir(path)); point {
	case "after_get_vm_stats", "after_get_all_vm_stats":
		return h.edit(h.stats)
	case "after_get_caps":
		return h.edit(h.caps)
	case "after_vm_start", "after_vm_migrate_destination", "after_vm_cont", "after_vm_dehibernate":
		return h.level()
	}
	return fmt.Errorf("%s does not lie in the folder of a hook point that is served: -h tells which are", path)
}

// edit adds to the file that VDSM reads again when the hook has ended. A file
// that it fails on stays as it is.
func (h *hook) edit(add func(ctx context.Context, text []byte) ([]edit, error)) error {
	path, ok := h.env("_hook_json")
	if !ok {
		return errors.New("_hook_json is not in the environment")
	}
	var f file
	edits, err := within(statsLimit, func(ctx context.Context) (edits []edit, err error) {
		if f, err = read(path); err != nil {
			return nil, err
		}
		return add(ctx, f.text)
	})
	if err == nil && len(edits) > 0 {
		err = f.replace(apply(f.text, edits))
	}
	if err != nil {
		return fmt.Errorf("nothing is added: %w", err)
	}
	return nil
}

// level sets the VM's level to the custom property, if it has one.
func (h *hook) level() error {
	level, ok := h.env("virtexit")
	if !ok {
		return nil
	}
	id, ok := h.env("vmId")
	if !ok {
		return errors.New("vmId is not in the environment")
	}
	switch level {
	case "off", "count", "time", "recent":
	default:
		return fmt.Errorf("VM %s: custom property virtexit is %q, must be off, count, time or recent", id, level)
	}
	_, err := within(levelLimit, func(ctx context.Context) (api.DomainLevel, error) {
		for {
			answer, err := h.client.SetDomainLevel(ctx, id, &level)
			if !unknown(err) {
				return answer, err
			}
			select {
			case <-ctx.Done():
				return answer, err
			case <-time.After(pause):
			}
		}
	})
	if err != nil {
		return fmt.Errorf("VM %s: level %s is not set: %w", id, level, err)
	}
	return nil
}

// unknown tells whether virtexitd knows of no such domain, or of one that ran.
func unknown(err error) bool {
	var notFound *api.NotFoundError
	var status *client.StatusError
	return errors.As(err, &notFound) || errors.As(err, &status) && status.Status == http.StatusConflict
}

// within does work that must end within a limit, and before that by itself.
// Work that does not is left alone: the process is about to end.
func within[T any](limit time.Duration, work func(context.Context) (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	ctx, cancel := context.WithTimeout(context.Background(), limit-margin)
	defer cancel()
	late := time.After(limit)
	go func() {
		value, err := work(ctx)
		if err != nil && ctx.Err() != nil {
			err = fmt.Errorf("not done within %v: %w", limit-margin, err)
		}
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-late:
		var none T
		return none, fmt.Errorf("not done within %v", limit)
	}
}
