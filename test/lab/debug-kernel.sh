#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# debug-kernel.sh SERIES: the lab's kernel SERIES-debug, from Debian's linux-source with configs/lab-debug.config.

set -eu
series=${1:?usage: debug-kernel.sh SERIES}
cd "$(dirname "$0")/../.."
lab=${LAB:-build/lab/bin/lab}
kernels=$PWD/build/lab/kernels
out=$PWD/build/lab/debug/$series
config=$PWD/configs/lab-debug.config

source=$("$lab" source -whole "$("$lab" release "$series")")
kbuild() { make -s -C "$source" O="$out" "$@"; }

mkdir -p "$out" "$kernels"
kbuild KCONFIG_ALLCONFIG="$config" allnoconfig >/dev/null
# What lacks something else is dropped without a word, and a check with it.
if grep ^CONFIG_ "$config" | grep -vxF -f "$out/.config"; then
	echo "debug-kernel: the options above need others that $config lacks" >&2
	exit 1
fi
kbuild -j"$(nproc)" bzImage modules

release=$(kbuild kernelrelease)
rm -rf "$out/root" "$kernels/$series".*-debug
kbuild INSTALL_MOD_PATH="$out/root" modules_install
mkdir "$out/root/boot"
cp "$(kbuild image_name | sed "s,^,$out/,")" "$out/root/boot/vmlinuz-$release"
mv "$out/root" "$kernels/$release"
