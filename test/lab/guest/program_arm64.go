// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"fmt"
)

const (
	kindSys  Kind = "sys"
	kindHVC  Kind = "hvc"
	kindSMC  Kind = "smc"
	kindWFI  Kind = "wfi"
	kindMMIO Kind = "mmio"
	kindSpin Kind = "spin"
)

// Sys reads a system register that KVM always intercepts, ID_AA64PFR0_EL1.
func Sys(n uint32) Op { return Op{Kind: kindSys, N: n} }

// HVC makes a hypercall. KVM answers a function that it does not know with an error, which the program ignores.
func HVC(function, n uint32) Op { return Op{Kind: kindHVC, Arg: function, N: n} }

// SMC calls firmware that is not there.
func SMC(n uint32) Op { return Op{Kind: kindSMC, N: n} }

// WFI halts n times, with interrupts off. What ends each halt is a signal.
func WFI(n uint32) Op { return Op{Kind: kindWFI, N: n} }

// MMIO writes a byte to a guest-physical address other than EndAddr, where a VM of this package has no memory.
func MMIO(addr, n uint32) Op { return Op{Kind: kindMMIO, Arg: addr, N: n} }

// Spin counts down from n, which causes no exit.
func Spin(n uint32) Op { return Op{Kind: kindSpin, N: n} }

// operands tells for each kind whether Parse wants an argument: never, optionally (0 where absent), always.
var operands = map[Kind]struct{ min, max int }{
	kindHVC: {0, 1}, kindMMIO: {1, 1},
	kindSys: {}, kindSMC: {}, kindWFI: {}, kindSpin: {},
}

// EndAddr is written to when a program of a VM ends: one more MMIO exit.
const EndAddr = 0x5ff000

// A64 instructions.
const (
	nop    = 0xd503201f
	branch = 0x14000000 // to itself
)

// assemble makes code that runs at any address and needs no memory but its own. X19 counts, X20 is an address; calls may
// change X0 to X3.
func (p Program) assemble() ([]byte, error) {
	code := []uint32{nop} // skipped in place of the write that has ended another program
	for _, op := range p.Ops {
		body, err := op.instructions()
		if err != nil {
			return nil, fmt.Errorf("%s:%#x:%d: %w", op.Kind, op.Arg, op.N, err)
		}
		if op.N == 0 {
			continue
		}
		code = append(code, load(20, op.Arg)...)
		code = append(code, load(19, op.N)...)
		code = append(code, body...)
		back := uint32(-(len(body) + 1))
		code = append(code, 0xf1000673, 0x54000001|back&0x7ffff<<5) // subs x19, x19, #1; b.ne body
	}
	if p.Forever {
		back := uint32(-len(code))
		code = append(code, branch|back&0x3ffffff)
	} else {
		code = append(code, load(20, EndAddr)...)
		code = append(code, 0x39000280, branch) // strb w0, [x20]
	}
	var b []byte
	for _, word := range code {
		b = binary.LittleEndian.AppendUint32(b, word)
	}
	return b, nil
}

// instructions gives what an op executes N times.
func (op Op) instructions() ([]uint32, error) {
	switch op.Kind {
	case kindSys:
		return []uint32{0xd5380400}, nil // mrs x0, id_aa64pfr0_el1
	case kindHVC:
		return []uint32{0xaa1403e0, 0xd4000002}, nil // mov x0, x20; hvc #0
	case kindSMC:
		return []uint32{0xd4000003}, nil // smc #0
	case kindWFI:
		return []uint32{0xd503207f}, nil
	case kindMMIO:
		if op.Arg < memoryAddr+memorySize || op.Arg == EndAddr {
			return nil, fmt.Errorf("address below %#x, or %#x", memoryAddr+memorySize, EndAddr)
		}
		return []uint32{0x39000280}, nil // strb w0, [x20]
	case kindSpin:
		return nil, nil
	}
	return nil, fmt.Errorf("no such instruction")
}

// load puts a number into a register: movz, movk.
func load(register, n uint32) []uint32 {
	return []uint32{0xd2800000 | n&0xffff<<5 | register, 0xf2a00000 | n>>16<<5 | register}
}
