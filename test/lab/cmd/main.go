// SPDX-License-Identifier: Apache-2.0

// Command lab runs a command, or a shell, in a lab machine.
//
//	go run ./test/lab/cmd run [flags] -- COMMAND...   its output and exit status are the command's own
//	go run ./test/lab/cmd shell [flags]               a root shell on this terminal; exit or Ctrl-A X leaves
//	go run ./test/lab/cmd kernel [flags]              prints the release that the lab boots, and where it is unpacked
//	go run ./test/lab/cmd release VERSION             prints the release that a version such as 6.1-rt means
//	go run ./test/lab/cmd headers RELEASE             prints where modules for the release can be built
//	go run ./test/lab/cmd system RELEASE              prints the root of a Debian system in which DKMS builds for the release
//	go run ./test/lab/cmd source [-whole] RELEASE     prints where the source of the release is, KVM's alone or all
//	go run ./test/lab/cmd guest SCRIPT FILE           writes an initramfs with busybox whose init is the script
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"virtexit/test/lab"
)

func main() {
	err := run(os.Args[1:])
	var exit *lab.ExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(exit.Status)
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(125)
	}
}

func run(args []string) error {
	const usage = "usage: lab run|shell|kernel|release|headers|system|source|guest [flags] [ARGUMENTS]"
	if len(args) == 0 {
		return errors.New(usage)
	}
	c := lab.Config{Name: args[0], Output: os.Stdout}
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	flags.StringVar(&c.Kernel, "kernel", "", "kernel `version`: series (6.1, 6.12, 6.1-rt, 6.1-arm64, 6.1-debug) or release; $"+lab.KernelVar+" or "+lab.DefaultKernel+" by default")
	flags.StringVar((*string)(&c.Emulator), "emulator", string(lab.QEMU), "`qemu` (AMD SVM), bochs (Intel VMX) or arm64")
	flags.IntVar(&c.CPUs, "cpus", 0, "number of CPUs")
	flags.IntVar(&c.Memory, "memory", 0, "memory in MiB")
	flags.StringVar(&c.System, "system", "", "`root` of a Debian system that is to boot with its own init; the host is at /host")
	flags.BoolVar(&c.Icount, "icount", false, "one CPU whose TSC counts instructions")
	flags.StringVar(&c.Cmdline, "cmdline", "", "further kernel arguments")
	flags.Func("file", "`file` of the host for a machine that does not see the host; repeatable", func(s string) error { c.Files = append(c.Files, s); return nil })
	flags.Func("module", "kernel `module` for such a machine; repeatable", func(s string) error { c.Modules = append(c.Modules, s); return nil })
	flags.DurationVar(&c.Timeout, "timeout", 0, "time limit, boot included")
	whole := flags.Bool("whole", false, "the whole kernel's source")
	if err := flags.Parse(args[1:]); err != nil {
		return flag.ErrHelp
	}
	c.Command = flags.Args()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch args[0] {
	case "run":
		_, err := lab.Run(ctx, c)
		return err
	case "shell":
		c.Timeout = max(c.Timeout, 24*time.Hour)
		return lab.Shell(ctx, c)
	case "kernel":
		k, err := lab.FindKernel(c.Kernel)
		if err == nil {
			fmt.Println(k.Release, k.Dir)
		}
		return err
	case "release":
		if len(c.Command) != 1 {
			return errors.New("usage: lab release VERSION")
		}
		release, err := lab.Release(c.Command[0])
		if err == nil {
			fmt.Println(release)
		}
		return err
	case "headers":
		if len(c.Command) != 1 {
			return errors.New("usage: lab headers RELEASE")
		}
		dir, err := lab.FindHeaders(c.Command[0])
		if err == nil {
			fmt.Println(dir)
		}
		return err
	case "system":
		if len(c.Command) != 1 {
			return errors.New("usage: lab system RELEASE")
		}
		dir, err := lab.FindSystem(c.Command[0])
		if err == nil {
			fmt.Println(dir)
		}
		return err
	case "source":
		if len(c.Command) != 1 {
			return errors.New("usage: lab source [-whole] RELEASE")
		}
		dir, err := lab.FindSource(c.Command[0], *whole)
		if err == nil {
			fmt.Println(dir)
		}
		return err
	case "guest":
		if len(c.Command) != 2 {
			return errors.New("usage: lab guest SCRIPT FILE")
		}
		script, err := os.ReadFile(c.Command[0])
		if err != nil {
			return err
		}
		return lab.WriteGuest(c.Command[1], string(script))
	}
	return errors.New(usage)
}
