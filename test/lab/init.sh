#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# First process of the lab's machine. /lab/config sets, all of them by the host:
#   release, tree   the kernel's release, and its module tree on the host
#   modules         modules to insert, in this order
#   port            device of the second serial port
#   share           yes: the host's root file system is the tag "root" on 9p; no: the initramfs is all there is
#   system          on the host, the root of a Debian system that is to boot in place of the host's; or empty
#   tty             yes: the command gets the second serial port as its terminal
# /lab/command is the command. Its output goes to the second serial port and nothing else does, but for lines that open
# with a record separator: one when it starts and, last of all, one with its exit status. Failing here, or dying, means
# that the last one is never written.

set -eu
trap 'poweroff -f' EXIT
. /lab/config

mount -t devtmpfs dev /dev
exec 3<>/dev/$port
stty raw -echo <&3

for module in $modules; do
	insmod "$module"
done

root=
if [ "$share" = yes ]; then
	root=/root
	mkdir -p /share /memory /root
	mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose root /share
	mount -t tmpfs memory /memory
	mkdir /memory/upper /memory/work
	mount -t overlay -o "lowerdir=/share$system,upperdir=/memory/upper,workdir=/memory/work" root /root
	mount -t tmpfs -o mode=755 run /root/run
	mount -t devtmpfs dev /root/dev
	if [ -n "$system" ]; then
		mkdir -p /root/host /root/run/lab /root/run/systemd/system/default.target.wants /memory/modules /memory/depmod "/root/lib/modules/$release"
		mount -t overlay -o "lowerdir=/share$tree:/share$system/lib/modules/$release,upperdir=/memory/modules,workdir=/memory/depmod" \
			modules "/root/lib/modules/$release"
		mount -o move /share /root/host
		cp /lab/command /lab/system.sh /root/run/lab
		cp /lab/system.service /root/run/systemd/system/lab.service
		ln -s ../lab.service /root/run/systemd/system/default.target.wants
		exec 3>&-
		exec switch_root /root /sbin/init
	fi
	mkdir -p "/root/lib/modules/$release"
	mount -o bind "/root$tree" "/root/lib/modules/$release"
fi
mkdir -p $root/proc $root/sys $root/dev/pts $root/dev/shm $root/run/lock $root/run/lab $root/tmp
mount -t proc proc $root/proc
mount -t sysfs sys $root/sys
mount -t devpts -o gid=5,mode=620,ptmxmode=666 pts $root/dev/pts
mount -t tmpfs -o mode=1777 shm $root/dev/shm
mount -t cgroup2 cgroup $root/sys/fs/cgroup
mount -t debugfs debug $root/sys/kernel/debug
mount -t tracefs trace $root/sys/kernel/tracing
ln -s /proc/self/fd $root/dev/fd
hostname lab
ip link set lo up
cp /lab/command $root/run/lab/command
cd "$root/"
if [ "$share" = yes ]; then
	mount -o move . / # who enters a mount namespace lands in what is mounted on /
fi

printf '\036lab: started\n' >&3
status=0
if [ "$tty" = yes ]; then
	stty sane <&3
	setsid -c chroot . /bin/sh /run/lab/command <&3 >&3 2>&3 3>&- || status=$?
	exec 3<>/dev/$port # the session's end has hung up the terminal
	stty raw -echo <&3
else
	setsid chroot . /bin/sh /run/lab/command </dev/null >&3 2>&3 3>&- || status=$?
fi
printf '\036lab: exit status %d\n' $status >&3
stty raw <&3 # returns when everything written has left the machine
