// SPDX-License-Identifier: Apache-2.0

package ebpf

//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type vx_own -type vx_event -cflags "-O2 -g -fno-strict-aliasing -Wall -Wextra -Wno-unused-parameter -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu" collector bpf/collector.bpf.c
