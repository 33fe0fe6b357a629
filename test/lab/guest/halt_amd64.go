// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"errors"
	"unsafe"
)

// From linux/kvm.h.
const (
	kvmCreateIRQChip = 0xae60
	kvmGetLAPIC      = 0x8400ae8e
	kvmSetLAPIC      = 0x4400ae8f
	kvmSetMPState    = 0x4004ae99
	kvmSignalMSI     = 0x4020aea5
)

// NewHaltingVM makes a VM with one vCPU whose HLT lasts until Wake: with an interrupt controller in KVM, which therefore
// handles HLT itself.
func NewHaltingVM() (*VM, error) {
	vm, err := makeVM(1, true)
	if err != nil {
		return nil, err
	}
	// To write a local APIC's state, be it unchanged, is what makes KVM route messages to it.
	fd, state := vm.VCPUs[0].fd, make([]byte, 1024)
	err = ioctlPtr(fd, "KVM_GET_LAPIC", kvmGetLAPIC, unsafe.Pointer(&state[0]))
	if err == nil {
		err = ioctlPtr(fd, "KVM_SET_LAPIC", kvmSetLAPIC, unsafe.Pointer(&state[0]))
	}
	if err != nil {
		return nil, errors.Join(err, vm.Close())
	}
	return vm, nil
}

// Wake ends the halt of a vCPU of NewHaltingVM. One that is not in a halt is interrupted, and its next halt lasts.
func (v *VCPU) Wake() error {
	const addr, nmi = 0xfee00000, 4 << 8
	msi := struct {
		AddrLo, AddrHi, Data, Flags, Device uint32
		_                                   [12]byte
	}{AddrLo: addr, Data: nmi}
	return ioctlPtr(v.vm.fd, "KVM_SIGNAL_MSI", kvmSignalMSI, unsafe.Pointer(&msi))
}

// RunOn is Run on the thread of another vCPU, which runs no program meanwhile. Stop does not reach it.
func (v *VCPU) RunOn(other *VCPU, p Program) error {
	v.stop.Store(false)
	v.run[runImmediateExit] = 0
	return other.Do(func() error { return v.execute(p) })
}

// What a wake-up needs, an NMI: a vector, a stack, and a handler that only returns. It is behind the program.
const (
	wakeSize  = 256
	wakeIDT   = wakeSize
	wakeStack = 16 // grows down, towards the vectors
	wakeIRET  = 1
)

// acceptWake prepares for wake-ups a vCPU that does not run.
func (v *VCPU) acceptWake(s *sregs) error {
	end := v.base + v.size
	v.vm.memory[end-wakeIRET] = 0xcf
	const vector = 2
	idt := v.vm.memory[end-wakeIDT:]
	binary.LittleEndian.PutUint16(idt[4*vector:], uint16(end-wakeIRET))
	binary.LittleEndian.PutUint16(idt[4*vector+2:], romSegment)
	s.idt.base, s.idt.limit = uint64(romAddr+end-wakeIDT), 4*vector+3
	s.ss.base, s.ss.selector = romAddr, romSegment
	// One that was stopped in a halt is in it still.
	var runnable uint32
	return ioctlPtr(v.fd, "KVM_SET_MP_STATE", kvmSetMPState, unsafe.Pointer(&runnable))
}

// stack is where the vCPU's stack begins, within romSegment.
func (v *VCPU) stack() uint64 { return uint64(v.base + v.size - wakeStack) }
