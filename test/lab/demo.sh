#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# The demonstration, inside the lab's machine: three libvirt domains that behave differently, and what virtexit says of
# them. "make demo" runs it with the image of the kernel that one of them boots.
set -eu
cd "$(dirname "$0")/../.."
export PATH="$PWD/bin:$PWD/build/lab/bin:$PATH"
export COLUMNS=80 # as on a terminal
images=/var/lib/libvirt/images
kernel=$1
step=
trap 'status=$?; [ $status = 0 ] || echo "demo: failed at: $step" >&2' EXIT

begin() {
	step=$*
	printf '\n# %s\n' "$step"
}
show() {
	begin "$@"
	"$@"
}
domain() { # name, memory in MiB, elements of <os>
	cat >$images/$1.xml <<END
<domain type='kvm'>
  <name>$1</name><memory unit='MiB'>$2</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>$3</os>
  <features><acpi/><apic/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/><memballoon model='none'/>
    <serial type='file'><source path='$images/$1.console'/></serial>
  </devices>
</domain>
END
	virsh -q create $images/$1.xml
}
storm() { # name, program
	guest -vendor AuthenticAMD -forever -program $2 -rom $images/$1.rom
	domain $1 16 "<loader type='rom' readonly='yes'>$images/$1.rom</loader>"
}

begin "loading KVM and virtexit.ko, starting libvirtd and virtexitd"
modprobe kvm-amd
chmod 666 /dev/kvm
insmod "build/kmod/$(uname -r)/virtexit.ko"
test/lab/libvirt.sh
virtexitd --config configs/virtexitd.yaml 2>/run/virtexitd.log &

begin "booting domain debian: Debian's kernel, a busybox that works and sleeps"
lab guest test/lab/demo-guest.sh $images/initrd
cp "$kernel" $images/vmlinuz
domain debian 192 "<kernel>$images/vmlinuz</kernel><initrd>$images/initrd</initrd><cmdline>console=ttyS0 quiet mitigations=off</cmdline>"
# It is up when it first has nothing to do, and halts.
for i in $(seq 120); do
	virtexit report debian --total --format csv | grep -q ',hlt,' && break
	[ $i -lt 120 ] || { cat $images/debian.console; exit 1; }
	sleep 1
done

begin "starting domains portstorm, which writes to an I/O port, and cpuidloop, which executes CPUID"
storm portstorm out:0x80:1000,spin:100000
storm cpuidloop cpuid:1000,spin:300000
sleep 3

show virtexit list
for name in debian portstorm cpuidloop; do
	show virtexit report $name --interval 3s --limit 8
done
show virtexit status
show curl -sS --fail --unix-socket /run/virtexit/virtexit.sock http://localhost/v1/domains/cpuidloop
