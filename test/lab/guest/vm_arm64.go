// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"slices"
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

func (v *VCPU) assemble(p Program) ([]byte, error) { return p.assemble() }

func (v *VCPU) room() int { return v.size }

// reset has the vCPU begin its program. No caches are kept in step with the program's text, for the lab's CPU has none.
func (v *VCPU) reset() error {
	pc := uint64(memoryAddr + v.base)
	reg := struct{ id, addr uint64 }{regPC, uint64(uintptr(unsafe.Pointer(&pc)))}
	return ioctlPtr(v.fd, "KVM_SET_ONE_REG", kvmSetOneReg, unsafe.Pointer(&reg))
}

// atEnd tells whether the program has come to its end.
func (v *VCPU) atEnd(reason uint32) bool {
	return reason == exitMMIO && binary.NativeEndian.Uint64(v.run[runMMIOAddr:]) == EndAddr
}

// rouse ends the halts of a program until stop is called. A signal that comes at another moment does nothing.
func (v *VCPU) rouse(p Program) (stop func()) {
	if v.vm.halting || !slices.ContainsFunc(p.Ops, func(op Op) bool { return op.Kind == kindWFI }) {
		return func() {}
	}
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
