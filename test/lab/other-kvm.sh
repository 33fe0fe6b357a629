#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# other-kvm.sh RELEASE: build/lab/kvm/RELEASE/kvm-other.ko, which is that kernel's kvm-amd.ko but for its name and for the
# ISA that it says its exits are of. It works with the distribution's own kvm.ko. What is there stays when it is made from
# the same.

set -eu
release=${1:?usage: other-kvm.sh RELEASE}
cd "$(dirname "$0")/../.."
lab=${LAB:-build/lab/bin/lab}
out=$PWD/build/lab/kvm/$release
kvm=$out/tree/arch/x86/kvm

source=$("$lab" source "$release")
headers=$("$lab" headers "$release")
origin=$(echo "$headers $source"; cksum test/lab/other-kvm.sh)
[ "$origin" != "$(cat "$out/origin" 2>/dev/null)" ] || exit 0
rm -rf "$out"
mkdir -p "$out/tree/include/trace" # trace.h is found relative to it
cp -r "$source/arch" "$source/virt" "$out/tree"
sed -i 's/trace_kvm_exit(vcpu, KVM_ISA_SVM)/trace_kvm_exit(vcpu, 77)/; s/svm_get_exit_info/other_get_exit_info/' "$kvm/svm/svm.c"
grep -q 'trace_kvm_exit(vcpu, 77)' "$kvm/svm/svm.c"
# The kernel's own tree is that of the headers, which lacks KVM.
sed -i 's,\$(srctree)/,$(src)/../../../,; s/^obj-.*//; s/^kvm-amd-/kvm-other-/' "$kvm/Makefile"
cat >>"$kvm/Makefile" <<'END'
	ccflags-y += -I $(src)/../../../include/trace
	obj-m += kvm-other.o
END
echo "# building a KVM of another ISA for $release"
make -C "$headers" M="$kvm" -j"$(nproc)" CONFIG_KVM_WERROR= modules >"$out/log" 2>&1 || {
	cat "$out/log" >&2
	exit 1
}
objcopy --strip-debug "$kvm/kvm-other.ko" "$out/kvm-other.ko"
rm -r "$out/tree" "$out/log"
echo "$origin" >"$out/origin"
