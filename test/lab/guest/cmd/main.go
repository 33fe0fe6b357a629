// SPDX-License-Identifier: Apache-2.0

// Command guest runs a program as a guest of /dev/kvm, on one vCPU or several, and tells each vCPU's thread.
//
//	guest -program "cpuid:10000,out:0x80:500,hlt:20" -vcpus 2
//	guest -program "cpuid:10000" -program "hlt:20"              # one vCPU each
//	guest -program "cpuid:10000,spin:1000000" -forever
//	guest -program "cpuid:10000" -rom rom.bin -vendor AuthenticAMD
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"virtexit/test/lab/guest"
)

func main() {
	var o options
	flag.Func("program", "`ops` of a vCPU; given more than once, each is for one more vCPU", o.addProgram)
	flag.IntVar(&o.vcpus, "vcpus", 0, "number of vCPUs that run the one program")
	flag.BoolVar(&o.forever, "forever", false, "repeat the programs until interrupted")
	flag.BoolVar(&o.hold, "hold", false, "keep the vCPUs' threads, after their programs' end, until interrupted")
	flag.StringVar(&o.rom, "rom", "", "write the program as firmware to a `file` and run nothing")
	flag.StringVar((*string)(&o.vendor), "vendor", "", "CPU `vendor` that the firmware is for: AuthenticAMD or GenuineIntel; this CPU's by default")
	flag.Parse()
	if err := o.run(); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

type options struct {
	programs      []guest.Program
	vcpus         int
	forever, hold bool
	rom           string
	vendor        guest.Vendor
}

func (o *options) addProgram(text string) error {
	p, err := guest.Parse(text)
	o.programs = append(o.programs, p)
	return err
}

func (o *options) run() error {
	for i := range o.programs {
		o.programs[i].Forever = o.forever
	}
	switch {
	case len(o.programs) == 0:
		return errors.New("no -program")
	case len(o.programs) > 1 && (o.vcpus != 0 || o.rom != ""):
		return errors.New("-vcpus and -rom want one -program")
	case o.rom != "":
		return o.writeROM()
	}
	for range o.vcpus - 1 {
		o.programs = append(o.programs, o.programs[0])
	}
	return o.runVM()
}

func (o *options) writeROM() error {
	host, err := guest.HostVendor()
	if o.vendor == "" && err != nil {
		return err
	}
	rom, err := o.programs[0].ROM(cmp.Or(o.vendor, host))
	if err != nil {
		return err
	}
	return os.WriteFile(o.rom, rom, 0o644)
}

func (o *options) runVM() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	vm, err := guest.NewVM(len(o.programs))
	if err != nil {
		return err
	}
	defer vm.Close()
	for i, v := range vm.VCPUs {
		fmt.Printf("vcpu %d tid %d\n", i, v.TID())
		v.Start(o.programs[i])
	}
	context.AfterFunc(ctx, func() {
		for _, v := range vm.VCPUs {
			v.Stop()
		}
	})
	for i, v := range vm.VCPUs {
		if err := v.Wait(); err != nil {
			return fmt.Errorf("vcpu %d: %w", i, err)
		}
		stats, err := v.Stats()
		if err != nil {
			return err
		}
		fmt.Printf("vcpu %d tid %d exits %d\n", i, v.TID(), stats["exits"])
	}
	if o.hold {
		<-ctx.Done()
	}
	return nil
}
