#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Starts libvirt inside the lab's machine, where no systemd does.
set -eu
virtlogd -d
libvirtd -d
for i in $(seq 100); do
	virsh -q -c qemu:///system version >/dev/null 2>&1 && exit 0
	sleep 0.1
done
echo "libvirtd does not answer" >&2
exit 1
