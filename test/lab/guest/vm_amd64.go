// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From linux/kvm.h and asm/kvm.h.
const (
	kvmSetTSSAddr         = 0xae47
	kvmSetIdentityMapAddr = 0x4008ae48
	kvmIOEventFD          = 0x4040ae79
	kvmGetRegs            = 0x8090ae81
	kvmSetRegs            = 0x4090ae82
	kvmGetSregs           = 0x8138ae83
	kvmSetSregs           = 0x4138ae84

	runIOPort = runUnion + 2 // offset in struct kvm_run
)

type ioEventFD struct {
	match, addr uint64
	size        uint32
	fd          int32
	flags       uint32
	_           [36]byte
}

type segment struct {
	base     uint64
	limit    uint32
	selector uint16
	_        [10]byte
}

type sregs struct {
	cs  segment
	_   [4]segment
	ss  segment
	_   [2]segment
	_   [16]byte
	idt struct {
		base  uint64
		limit uint16
		_     [6]byte
	}
	_ [88]byte
}

type regs struct {
	rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp uint64
	r                                      [8]uint64
	rip, rflags                            uint64
}

type platform struct {
	vendor Vendor
	apic   bool
	fresh  []byte // see Fresh; nil before
}

const memoryAddr = romAddr

// NewVM makes a VM without interrupt controller, whose vCPU threads wait for programs.
func NewVM(vcpus int) (*VM, error) { return makeVM(vcpus, false) }

func makeVM(vcpus int, apic bool) (*VM, error) {
	vendor, err := HostVendor()
	if err != nil {
		return nil, err
	}
	return platform{vendor: vendor, apic: apic}.newVM(vcpus)
}

func (vm *VM) prepare() error {
	// Intel CPUs that cannot run real mode natively want three pages and one more, out of the programs' way.
	const identityMap, tss = 0xfffbc000, 0xfffbd000
	at := uint64(identityMap)
	if err := ioctlPtr(vm.fd, "KVM_SET_IDENTITY_MAP_ADDR", kvmSetIdentityMapAddr, unsafe.Pointer(&at)); err != nil {
		return err
	}
	if _, err := ioctl(vm.fd, "KVM_SET_TSS_ADDR", kvmSetTSSAddr, tss); err != nil {
		return err
	}
	if !vm.apic {
		return nil
	}
	_, err := ioctl(vm.fd, "KVM_CREATE_IRQCHIP", kvmCreateIRQChip, 0)
	return err
}

func (vm *VM) release() error {
	if vm.fresh == nil {
		return nil
	}
	return unix.Munmap(vm.fresh)
}

// FreshPages is how many pages of 4 KiB Fresh gives.
const FreshPages = 128

// Fresh gives the VM memory at address 0: pages that the host has and that KVM has not mapped, so that the first touch of
// each exits, and nothing but KVM handles it. Called again, it has KVM forget the pages. No program may be running.
func (vm *VM) Fresh() error {
	const slot, addr, size = 1, 0, FreshPages * 4096
	if vm.fresh != nil {
		if err := vm.setMemory(slot, addr, vm.fresh, 0); err != nil {
			return err
		}
		return vm.setMemory(slot, addr, vm.fresh, size)
	}
	var err error
	vm.fresh, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("guest memory: %w", err)
	}
	// The kernel would make large pages of small ones in its own time.
	for _, advice := range []int{unix.MADV_NOHUGEPAGE, unix.MADV_POPULATE_WRITE} {
		if err := unix.Madvise(vm.fresh, advice); err != nil {
			return fmt.Errorf("guest memory: %w", err)
		}
	}
	return vm.setMemory(slot, addr, vm.fresh, size)
}

// EventPort has KVM itself handle bytes written to an I/O port, as those with which a guest calls a virtio device: it adds
// 1 to the eventfd returned. That is the caller's to close.
func (vm *VM) EventPort(port uint16) (*os.File, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	event := os.NewFile(uintptr(fd), "eventfd")
	const pio = 1 << 1
	request := ioEventFD{addr: uint64(port), size: 1, fd: int32(fd), flags: pio}
	if err := ioctlPtr(vm.fd, "KVM_IOEVENTFD", kvmIOEventFD, unsafe.Pointer(&request)); err != nil {
		return nil, errors.Join(err, event.Close())
	}
	return event, nil
}

// Least is the least number of TSC ticks that an execution of a timed op took in the program that ended last. It is below
// 1<<32.
func (v *VCPU) Least() (uint32, error) {
	var r regs
	if err := ioctlPtr(v.fd, "KVM_GET_REGS", kvmGetRegs, unsafe.Pointer(&r)); err != nil {
		return 0, err
	}
	return uint32(r.rbp), nil
}

func (v *VCPU) prepare() error { return nil }

func (v *VCPU) execute(p Program) error {
	code, err := p.assemble(v.vm.vendor, endOut)
	if err != nil {
		return err
	}
	if err := v.load(code, v.size-wakeSize); err != nil {
		return err
	}
	var s sregs
	if err := ioctlPtr(v.fd, "KVM_GET_SREGS", kvmGetSregs, unsafe.Pointer(&s)); err != nil {
		return err
	}
	s.cs.base, s.cs.selector = romAddr, romSegment
	if v.vm.apic {
		if err := v.acceptWake(&s); err != nil {
			return err
		}
	}
	if err := ioctlPtr(v.fd, "KVM_SET_SREGS", kvmSetSregs, unsafe.Pointer(&s)); err != nil {
		return err
	}
	r := regs{rip: uint64(v.base), rsp: v.stack(), rflags: 2}
	if err := ioctlPtr(v.fd, "KVM_SET_REGS", kvmSetRegs, unsafe.Pointer(&r)); err != nil {
		return err
	}
	return v.loop()
}

// atEnd tells whether the program has come to its end.
func (v *VCPU) atEnd(reason uint32) bool {
	return reason == exitIO && binary.NativeEndian.Uint16(v.run[runIOPort:]) == EndPort
}
