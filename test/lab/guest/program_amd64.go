// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

const (
	kindCPUID     Kind = "cpuid"
	kindOut       Kind = "out"
	kindIn        Kind = "in"
	kindHLT       Kind = "hlt"
	kindHypercall Kind = "hypercall"
	kindRDMSR     Kind = "rdmsr"
	kindMMIO      Kind = "mmio"
	kindTouch     Kind = "touch"
	kindReadCR0   Kind = "cr0"
	kindSpin      Kind = "spin"
)

// CPUID executes CPUID for a leaf.
func CPUID(leaf, n uint32) Op { return Op{Kind: kindCPUID, Arg: leaf, N: n} }

// Out writes a byte to an I/O port other than EndPort.
func Out(port uint16, n uint32) Op { return Op{Kind: kindOut, Arg: uint32(port), N: n} }

// In reads a byte from an I/O port.
func In(port uint16, n uint32) Op { return Op{Kind: kindIn, Arg: uint32(port), N: n} }

// HLT halts with interrupts off. A VM of this package goes on at once; under QEMU the vCPU sleeps for ever.
func HLT(n uint32) Op { return Op{Kind: kindHLT, N: n} }

// Hypercall makes a hypercall by the vendor's own instruction. KVM answers a number that it does not know with an error,
// which the program ignores.
func Hypercall(number, n uint32) Op { return Op{Kind: kindHypercall, Arg: number, N: n} }

// RDMSR reads a model-specific register. It exits where KVM intercepts the register: 0x1b (APIC base) always.
func RDMSR(msr, n uint32) Op { return Op{Kind: kindRDMSR, Arg: msr, N: n} }

// MMIO writes a byte to a guest-physical address below 0xf0000. A VM of this package has no memory there.
func MMIO(addr, n uint32) Op { return Op{Kind: kindMMIO, Arg: addr, N: n} }

// Touch writes a byte to each of n pages of 4 KiB, from a guest-physical address below 0xf0000 on. KVM maps a page when it
// is touched first, see VM.Fresh.
func Touch(addr, n uint32) Op { return Op{Kind: kindTouch, Arg: addr, N: n} }

// ReadCR0 reads the control register, which AMD's CPUs intercept for KVM, with exit code 0.
func ReadCR0(n uint32) Op { return Op{Kind: kindReadCR0, N: n} }

// Spin counts down from n, which causes no exit.
func Spin(n uint32) Op { return Op{Kind: kindSpin, N: n} }

// operands tells for each kind whether Parse wants an argument: never, optionally (0 where absent), always.
var operands = map[Kind]struct{ min, max int }{
	kindCPUID: {0, 1}, kindHypercall: {0, 1},
	kindOut: {1, 1}, kindIn: {1, 1}, kindRDMSR: {1, 1}, kindMMIO: {1, 1}, kindTouch: {1, 1},
	kindHLT: {}, kindReadCR0: {}, kindSpin: {},
}

// EndPort is written to when a program of a VM ends: one more I/O exit.
const EndPort = 0x5ff

// Ways to end: tell the VM, or halt for ever.
var (
	endOut = []byte{0xba, EndPort & 0xff, EndPort >> 8, 0xee} // mov dx, EndPort; out dx, al
	endHLT = []byte{0xfa, 0xf4, 0xeb, 0xfc}                   // cli; hlt; jmp to cli
)

// assemble makes 16-bit code that runs at any address and needs no memory but its own.
func (p Program) assemble(vendor Vendor, end []byte) ([]byte, error) {
	code := []byte{0xfa, 0x66, 0xbd, 0xff, 0xff, 0xff, 0xff} // cli; mov ebp, -1
	for _, op := range p.Ops {
		before, body, err := op.instructions(vendor)
		if err != nil {
			return nil, fmt.Errorf("%s:%#x:%d: %w", op.Kind, op.Arg, op.N, err)
		}
		if op.N == 0 {
			continue
		}
		if op.Timed {
			body = join(
				[]byte{0x0f, 0x31, 0x66, 0x89, 0xc7}, // rdtsc; mov edi, eax
				body,
				[]byte{0x0f, 0x31, 0x66, 0x29, 0xf8}, // rdtsc; sub eax, edi
				[]byte{0x66, 0x39, 0xe8, 0x73, 3, 0x66, 0x89, 0xc5}) // cmp eax, ebp; jae over; mov ebp, eax
		}
		code = append(code, before...)
		code = append(code, 0x66, 0xbe) // mov esi, N
		code = binary.LittleEndian.AppendUint32(code, op.N)
		code = append(code, body...)
		code = append(code, 0x66, 0x4e)                   // dec esi
		code = append(code, 0x75, byte(-(len(body) + 4))) // jnz body
	}
	if p.Forever {
		code = append(code, 0xe9) // jmp to the start
		return binary.LittleEndian.AppendUint16(code, uint16(-(len(code) + 2))), nil
	}
	return append(code, end...), nil
}

// instructions gives what an op executes once before, and what it executes N times. ESI is
// taken; EDI and EBP are, and EAX and EDX change before each, in a timed op.
func (op Op) instructions(vendor Vendor) (before, body []byte, err error) {
	arg16 := []byte{byte(op.Arg), byte(op.Arg >> 8)}
	arg32 := binary.LittleEndian.AppendUint32(nil, op.Arg)
	switch op.Kind {
	case kindCPUID: // mov eax, leaf; xor ecx, ecx; cpuid
		return nil, join([]byte{0x66, 0xb8}, arg32, []byte{0x66, 0x31, 0xc9, 0x0f, 0xa2}), nil
	case kindOut, kindIn: // mov dx, port; out dx, al or in al, dx
		if op.Arg > 0xffff || op.Kind == kindOut && op.Arg == EndPort {
			return nil, nil, fmt.Errorf("port not in 0 to 0xffff without %#x", EndPort)
		}
		body := []byte{0xee}
		if op.Kind == kindIn {
			body = []byte{0xec}
		}
		return nil, join([]byte{0xba}, arg16, body), nil
	case kindHLT:
		return nil, []byte{0xf4}, nil
	case kindHypercall: // mov eax, number; vmmcall or vmcall
		call := map[Vendor][]byte{AMD: {0x0f, 0x01, 0xd9}, Intel: {0x0f, 0x01, 0xc1}}[vendor]
		if call == nil {
			return nil, nil, fmt.Errorf("no hypercall instruction for CPU vendor %q", vendor)
		}
		return nil, join([]byte{0x66, 0xb8}, arg32, call), nil
	case kindRDMSR: // mov ecx, msr; rdmsr
		return join([]byte{0x66, 0xb9}, arg32), []byte{0x0f, 0x32}, nil
	case kindMMIO, kindTouch: // mov ax, segment; mov ds, ax; mov [offset], al
		const page = 0x1000
		end := uint64(op.Arg)
		if op.Kind == kindTouch && op.N > 0 {
			end += (uint64(op.N) - 1) * page
		}
		if end >= romAddr {
			return nil, nil, fmt.Errorf("address not below %#x", romAddr)
		}
		segment, offset := op.Arg>>4, op.Arg&15
		before = []byte{0xb8, byte(segment), byte(segment >> 8), 0x8e, 0xd8}
		body = []byte{0xa2, byte(offset), 0}
		if op.Kind == kindTouch { // mov ax, ds; add ax, page's segments; mov ds, ax
			body = append(body, 0x8c, 0xd8, 0x05, 0, page>>4>>8, 0x8e, 0xd8)
		}
		return before, body, nil
	case kindReadCR0:
		return nil, []byte{0x0f, 0x20, 0xc0}, nil
	case kindSpin:
		return nil, nil, nil
	}
	return nil, nil, fmt.Errorf("no such instruction")
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// A program runs at F000:0000, in 64 KiB of memory right below 1 MiB.
const (
	romAddr    = 0xf0000
	romSegment = romAddr >> 4
	romSize    = 0x10000
)

// ROM makes firmware of a program, for QEMU's -bios and libvirt's <loader type='rom'>: the guest executes the program and
// nothing else, then halts for ever. Only the first vCPU of a machine runs firmware.
func (p Program) ROM(vendor Vendor) ([]byte, error) {
	const reset = 0xfff0
	code, err := p.assemble(vendor, endHLT)
	if err != nil {
		return nil, err
	}
	if len(code) > reset {
		return nil, fmt.Errorf("program takes %d bytes, more than %d", len(code), reset)
	}
	rom := bytes.Repeat([]byte{0xf4}, romSize) // hlt
	copy(rom, code)
	copy(rom[reset:], []byte{0xea, 0, 0, romSegment & 0xff, romSegment >> 8}) // jmp F000:0000
	return rom, nil
}
