// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"time"
	"unsafe"
)

// From linux/kvm.h and asm/kvm.h.
const (
	kvmArmVCPUInit        = 0x4020aeae
	kvmArmPreferredTarget = 0x8020aeaf
	kvmSetOneReg          = 0x4010aeac

	regPC = 0x6030000000100040

	runMMIOAddr = runUnion // offset in struct kvm_run
)

type platform struct {
	halting bool // a halt lasts until Wake
}

const memoryAddr = 0

// NewVM makes a VM without interrupt controller, whose vCPU threads wait for programs.
func NewVM(vcpus int) (*VM, error) { return platform{}.newVM(vcpus) }

// NewHaltingVM makes a VM with one vCPU whose WFI lasts until Wake.
func NewHaltingVM() (*VM, error) { return platform{halting: true}.newVM(1) }

// Wake ends the halt of a vCPU of NewHaltingVM, if it is in one.
func (v *VCPU) Wake() error { return v.Signal() }

func (vm *VM) prepare() error { return nil }

func (vm *VM) release() error { return nil }

// prepare resets the vCPU: it will be at EL1, with interrupts and the MMU off.
func (v *VCPU) prepare() error {
	var init struct {
		target   uint32
		features [7]uint32
	}
	if err := ioctlPtr(v.vm.fd, "KVM_ARM_PREFERRED_TARGET", kvmArmPreferredTarget, unsafe.Pointer(&init)); err != nil {
		return err
	}
	return ioctlPtr(v.fd, "KVM_ARM_VCPU_INIT", kvmArmVCPUInit, unsafe.Pointer(&init))
}

// execute keeps no caches in step with the program's code, for the lab's CPU has none.
func (v *VCPU) execute(p Program) error {
	code, err := p.assemble()
	if err != nil {
		return err
	}
	if err := v.load(code, v.size); err != nil {
		return err
	}
	pc := uint64(memoryAddr + v.base)
	reg := struct{ id, addr uint64 }{regPC, uint64(uintptr(unsafe.Pointer(&pc)))}
	if err := ioctlPtr(v.fd, "KVM_SET_ONE_REG", kvmSetOneReg, unsafe.Pointer(&reg)); err != nil {
		return err
	}
	var halts uint64
	for _, op := range p.Ops {
		if op.Kind == kindWFI {
			halts += uint64(op.N)
		}
	}
	if halts == 0 || v.vm.halting {
		return v.loop()
	}
	before, err := v.Stats()
	if err != nil {
		return err
	}
	stop := v.rouse()
	err = v.loop()
	stop()
	if err != nil || v.stop.Load() {
		return err
	}
	after, err := v.Stats()
	if err != nil {
		return err
	}
	// WFI does nothing while an interrupt is pending, be it the host's, which the CPU is about to take.
	if had := after["wfi_exit_stat"] - before["wfi_exit_stat"]; had < halts {
		return v.execute(Program{Ops: []Op{WFI(uint32(halts - had))}})
	}
	return nil
}

// atEnd tells whether the program has come to its end.
func (v *VCPU) atEnd(reason uint32) bool {
	return reason == exitMMIO && binary.NativeEndian.Uint64(v.run[runMMIOAddr:]) == EndAddr
}

// rouse ends each halt until stop is called. A signal that comes at another moment does nothing.
func (v *VCPU) rouse() (stop func()) {
	done := make(chan struct{})
	go func() {
		t := time.NewTicker(2 * time.Millisecond)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				v.Signal()
			case <-done:
				return
			}
		}
	}()
	return func() { close(done) }
}
