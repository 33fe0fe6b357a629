// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// VM is a virtual machine of KVM: 64 KiB of memory for its programs, and vCPUs.
type VM struct {
	VCPUs []*VCPU

	platform // what differs between architectures
	fd       *os.File
	memory   []byte
}

// VCPU is a virtual CPU with an operating system thread of its own, which lives from NewVM to Close, be a program
// running or not.
type VCPU struct {
	// Handle, where it is set, is called on the thread each time that a program leaves KVM_RUN, but when it has come to its
	// end. The program goes on when it returns nil. It is not to be changed while a program runs.
	Handle func(Return) error

	vm    *VM
	base  int // of its programs in the VM's memory
	size  int
	fd    *os.File
	stats *os.File
	run   []byte // struct kvm_run, shared with the kernel
	tid   int

	start chan func() error
	ended chan error
	dead  chan struct{}
	stop  atomic.Bool
}

// Return is why KVM_RUN has returned.
type Return uint32

const (
	IO     Return = exitIO
	Halt   Return = exitHLT // of a VM without interrupt controller
	Access Return = exitMMIO
	Signal Return = exitIntr // of Signal; Go's runtime sends some as well
)

// From linux/kvm.h.
const (
	kvmCreateVM            = 0xae01
	kvmGetVCPUMmapSize     = 0xae04
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmRun                 = 0xae80
	kvmGetStatsFD          = 0xaece

	exitIO   = 2
	exitHLT  = 5
	exitMMIO = 6
	exitIntr = 10

	runImmediateExit = 1 // offsets in struct kvm_run
	runExitReason    = 8
	runUnion         = 32
)

// memorySize is that of the memory for programs.
const memorySize = 0x10000

type memoryRegion struct {
	slot, flags                 uint32
	guestAddr, size, memoryAddr uint64
}

// newVM makes a VM whose vCPU threads wait for programs.
func (p platform) newVM(vcpus int) (*VM, error) {
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer kvm.Close()
	vm := &VM{platform: p}
	if err := vm.init(kvm, vcpus); err != nil {
		return nil, errors.Join(err, vm.Close())
	}
	return vm, nil
}

func (vm *VM) init(kvm *os.File, vcpus int) error {
	var err error
	if vm.fd, err = create(kvm, "KVM_CREATE_VM", kvmCreateVM, 0); err != nil {
		return err
	}
	if err := vm.prepare(); err != nil {
		return err
	}
	vm.memory, err = unix.Mmap(-1, 0, memorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("guest memory: %w", err)
	}
	if err := vm.setMemory(0, memoryAddr, vm.memory, memorySize); err != nil {
		return err
	}
	size, err := ioctl(kvm, "KVM_GET_VCPU_MMAP_SIZE", kvmGetVCPUMmapSize, 0)
	if err != nil {
		return err
	}
	share := memorySize / vcpus &^ 15 // instructions of arm64 are aligned
	for i := range vcpus {
		v := &VCPU{
			vm:    vm,
			size:  share,
			base:  share * i,
			start: make(chan func() error),
			ended: make(chan error, 1),
			dead:  make(chan struct{}),
		}
		if v.fd, err = create(vm.fd, "KVM_CREATE_VCPU", kvmCreateVCPU, uintptr(i)); err != nil {
			return err
		}
		v.run, err = unix.Mmap(int(v.fd.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return errors.Join(fmt.Errorf("map kvm_run: %w", err), v.fd.Close())
		}
		// Now, for KVM makes one wait while the vCPU runs.
		if v.stats, err = create(v.fd, "KVM_GET_STATS_FD", kvmGetStatsFD, 0); err != nil {
			return errors.Join(err, unix.Munmap(v.run), v.fd.Close())
		}
		vm.VCPUs = append(vm.VCPUs, v)
		if err := v.prepare(); err != nil {
			return err
		}
		tid := make(chan int)
		go v.thread(tid)
		v.tid = <-tid
	}
	return nil
}

func (vm *VM) setMemory(slot uint32, addr uint64, memory []byte, size int) error {
	region := memoryRegion{slot: slot, guestAddr: addr, size: uint64(size), memoryAddr: uint64(uintptr(unsafe.Pointer(&memory[0])))}
	return ioctlPtr(vm.fd, "KVM_SET_USER_MEMORY_REGION", kvmSetUserMemoryRegion, unsafe.Pointer(&region))
}

// Close stops what runs, ends the vCPU threads and frees the VM.
func (vm *VM) Close() error {
	var errs []error
	for _, v := range vm.VCPUs {
		v.Stop()
		close(v.start)
		<-v.dead
		errs = append(errs, unix.Munmap(v.run), v.stats.Close(), v.fd.Close())
	}
	vm.VCPUs = nil
	if vm.fd != nil {
		errs = append(errs, vm.fd.Close())
	}
	if vm.memory != nil {
		errs = append(errs, unix.Munmap(vm.memory))
	}
	errs = append(errs, vm.release())
	return errors.Join(errs...)
}

// TID is the id of the vCPU's thread.
func (v *VCPU) TID() int { return v.tid }

// Start makes the vCPU's thread run a program. The program before it must have been waited for.
func (v *VCPU) Start(p Program) {
	v.stop.Store(false)
	v.run[runImmediateExit] = 0
	v.start <- func() error { return v.execute(p) }
}

// Wait waits until the program has ended or has been stopped. The thread stays.
func (v *VCPU) Wait() error { return <-v.ended }

// Run is Start and Wait.
func (v *VCPU) Run(p Program) error {
	v.Start(p)
	return v.Wait()
}

// Do runs a function on the vCPU's thread, where no program may run meanwhile.
func (v *VCPU) Do(f func() error) error {
	v.start <- f
	return v.Wait()
}

// Stop ends the vCPU's program early, if one runs. It must be waited for all the same.
func (v *VCPU) Stop() {
	v.stop.Store(true)
	v.run[runImmediateExit] = 1 // in case that the signal comes right before KVM_RUN
	// Go's runtime ignores this signal when it did not ask for it; KVM_RUN returns for any.
	unix.Tgkill(os.Getpid(), v.tid, unix.SIGURG)
}

// Signal has KVM_RUN return for no reason of the guest's.
func (v *VCPU) Signal() error { return unix.Tgkill(os.Getpid(), v.tid, unix.SIGURG) }

// Stats reads KVM's own statistics of the vCPU by name, such as "exits", whether it runs or not. Of a histogram it gives the first bucket.
func (v *VCPU) Stats() (map[string]uint64, error) {
	var header struct{ Flags, NameSize, Descs, IDAt, DescsAt, DataAt uint32 }
	if err := binary.Read(io.NewSectionReader(v.stats, 0, 24), binary.NativeEndian, &header); err != nil {
		return nil, fmt.Errorf("statistics: %w", err)
	}
	stats := map[string]uint64{}
	for i := range header.Descs {
		var desc struct {
			Flags            uint32
			Exponent         int16
			Size             uint16
			Offset, Interval uint32
		}
		name := make([]byte, header.NameSize)
		var value uint64
		size := int64(16 + header.NameSize)
		at := io.NewSectionReader(v.stats, int64(header.DescsAt)+int64(i)*size, size)
		err := errors.Join(
			binary.Read(at, binary.NativeEndian, &desc),
			binary.Read(at, binary.NativeEndian, name),
			binary.Read(io.NewSectionReader(v.stats, int64(header.DataAt+desc.Offset), 8), binary.NativeEndian, &value))
		if err != nil {
			return nil, fmt.Errorf("statistics: %w", err)
		}
		stats[string(bytes.TrimRight(name, "\x00"))] = value
	}
	return stats, nil
}

// thread runs programs until start is closed. It ends locked to its thread, which therefore ends with it.
func (v *VCPU) thread(tid chan<- int) {
	runtime.LockOSThread()
	if unix.Gettid() == os.Getpid() {
		// Go keeps the process's first thread when its goroutine ends: hold on to it, so that another one is taken.
		defer runtime.UnlockOSThread()
		var other sync.WaitGroup
		other.Go(func() { v.thread(tid) })
		other.Wait()
		return
	}
	defer close(v.dead)
	tid <- unix.Gettid()
	for work := range v.start {
		v.ended <- work()
	}
}

// load puts a program's code where it runs.
func (v *VCPU) load(code []byte, room int) error {
	if len(code) > room {
		return fmt.Errorf("program takes %d bytes, more than %d", len(code), room)
	}
	copy(v.vm.memory[v.base:], code)
	return nil
}

// loop runs the vCPU until the program has ended or is to be stopped.
func (v *VCPU) loop() error {
	for {
		reason := uint32(exitIntr)
		if _, err := ioctl(v.fd, "KVM_RUN", kvmRun, 0); err == nil {
			reason = binary.NativeEndian.Uint32(v.run[runExitReason:])
		} else if !errors.Is(err, unix.EINTR) {
			return err
		}
		if v.atEnd(reason) {
			return nil
		}
		switch reason {
		case exitIO, exitHLT, exitMMIO, exitIntr:
		default:
			return fmt.Errorf("KVM_RUN: exit reason %d, detail % x", reason, v.run[runUnion:runUnion+16])
		}
		if v.Handle != nil {
			if err := v.Handle(Return(reason)); err != nil {
				return err
			}
		}
		// Not between an exit and its end, which KVM_RUN has to come back for.
		if reason == exitIntr && v.stop.Load() {
			return nil
		}
	}
}

// create is an ioctl that returns a file. A signal can interrupt it: those of Go's runtime do.
func create(f *os.File, name string, request, arg uintptr) (*os.File, error) {
	fd, err := ioctl(f, name, request, arg)
	for errors.Is(err, unix.EINTR) {
		fd, err = ioctl(f, name, request, arg)
	}
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(int(fd))
	return os.NewFile(fd, name), nil
}

func ioctl(f *os.File, name string, request, arg uintptr) (uintptr, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, arg)
	runtime.KeepAlive(f)
	if errno != 0 {
		return 0, fmt.Errorf("%s: %w", name, errno)
	}
	return r, nil
}

func ioctlPtr(f *os.File, name string, request uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg))
	runtime.KeepAlive(f)
	if errno != 0 {
		return fmt.Errorf("%s: %w", name, errno)
	}
	return nil
}
