#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# install.sh DIR [MODULE]: the life of the packages in DIR on a Debian host, in the lab: installed, used, upgraded,
# purged. DKMS takes minutes to build in an emulated machine: where there is a MODULE, that is installed instead.
set -eu
debs=$(realpath "$1") # apt takes a path
module=${2-}
export DEBIAN_FRONTEND=noninteractive
step=
trap 'status=$?; [ $status = 0 ] || { echo "failed at: $step"; journalctl --no-pager -n 20 -u virtexitd; tail -n 20 /var/lib/dkms/virtexit/*/build/make.log || true; }' EXIT

step() {
	step=$*
	echo "# $step ($(cut -d. -f1 /proc/uptime) s)"
}
equal() { # what it is, what it should be
	[ "$1" = "$2" ] || { printf 'is:        %s\nshould be: %s\n' "$1" "$2"; return 1; }
}
refused() { # text, command...
	text=$1
	shift
	if out=$("$@" 2>&1); then
		echo "should be refused: $*: $out"
		return 1
	fi
	case $out in *"$text"*) ;; *) echo "refused otherwise: $out"; return 1 ;; esac
}
quiet() { # prints only what fails prints
	"$@" >/run/quiet 2>&1 || { cat /run/quiet; return 1; }
}
as() { # user, command...
	user=$1
	shift
	runuser -u "$user" -- "$@"
}
exits() {
	virtexit report --total --format csv spinner | awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == "count") c = i } NR > 1 { n += $c } END { print n }'
}
eventually() {
	for i in $(seq 60); do
		if "$@" >/dev/null 2>&1; then return; fi
		sleep 0.5
	done
	"$@"
}

dkms=/lib/modules/$(uname -r)/updates/dkms
if [ -n "$module" ]; then
	step "apt-get install virtexit"
	install -D -t "$dkms" "$module"
	depmod
	quiet apt-get -qq install --no-install-recommends "$debs"/virtexit_*.deb
else
	step "apt-get install virtexit virtexit-dkms"
	quiet apt-get -qq install --no-install-recommends "$debs"/virtexit_*.deb "$debs"/virtexit-dkms_*.deb
	step "DKMS has built the module for $(uname -r)"
	equal "$(dkms status)" "virtexit/$(dpkg-query -W -f '${source:Upstream-Version}' virtexit-dkms), $(uname -r), x86_64: installed"
fi
eventually test -c /dev/virtexit
equal "$(modinfo -n virtexit)" "$dkms/virtexit.ko"
device() { equal "$(stat -c '%a %U %G' /dev/virtexit)" "440 root virtexit"; }
eventually device

step "the service runs as its own user, with its capabilities alone"
equal "$(systemctl is-active virtexitd) $(systemctl is-enabled virtexitd)" "active enabled"
pid=$(systemctl show -P MainPID virtexitd)
uid=$(id -u virtexit) gid=$(id -g virtexit)
# CHOWN 0, DAC_READ_SEARCH 2, NET_ADMIN 12, SYS_PTRACE 19, PERFMON 38, BPF 39
caps=$(printf '%016x' $((1 << 0 | 1 << 2 | 1 << 12 | 1 << 19 | 1 << 38 | 1 << 39)))
equal "$(awk '/^(Uid|Gid|Cap...|NoNewPrivs|Seccomp):/ { $1 = $1; print }' "/proc/$pid/status")" "\
Uid: $uid $uid $uid $uid
Gid: $gid $gid $gid $gid
CapInh: $caps
CapPrm: $caps
CapEff: $caps
CapBnd: $caps
CapAmb: $caps
NoNewPrivs: 1
Seccomp: 2"
equal "$(stat -c '%a %U %G' /var/lib/virtexit /etc/virtexit/virtexitd.yaml /run/virtexit/virtexit.sock)" "\
700 virtexit virtexit
644 root root
660 virtexit libvirt"
systemd-analyze verify --man=no virtexitd.service
systemd-analyze security --no-pager --threshold=27 virtexitd.service | tail -n 1

step "a domain of libvirt, members of group libvirt and others"
guest=$PWD/build/lab/bin/guest
"$guest" -vendor AuthenticAMD -forever -program cpuid:100,spin:3000000 -rom /var/lib/libvirt/images/spinner.rom
cat >/run/spinner.xml <<END
<domain type='kvm'>
  <name>spinner</name><memory unit='MiB'>16</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type><loader type='rom' readonly='yes'>/var/lib/libvirt/images/spinner.rom</loader></os>
  <features><acpi/><apic/></features>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator><controller type='usb' model='none'/><memballoon model='none'/></devices>
</domain>
END
virsh -q create /run/spinner.xml
useradd --groups libvirt member
useradd other

step "a member of group libvirt reads, another does not, neither switches"
counts() { as member virtexit report --total --format csv spinner | grep ,cpuid,; }
eventually counts
as member virtexit list | tee /run/list
grep -q ' spinner ' /run/list
refused "permission denied" as other virtexit list
refused "needs root" as member virtexit off
refused "" as member cat /dev/virtexit
as member virtexit status
virtexit status | grep -q '^Libvirt: *connected'

step "an upgrade keeps what is configured, and what was counted, by root too"
sed -i 's/^interval: .*/interval: 2s/' /etc/virtexit/virtexitd.yaml
cp /etc/virtexit/virtexitd.yaml /run/edited
dpkg-deb -R "$debs"/virtexit_*.deb /run/next
sed -i 's/^Version: .*/Version: 9/' /run/next/DEBIAN/control
echo "# a later one" >>/run/next/etc/virtexit/virtexitd.yaml
dpkg-deb -Znone -b /run/next /run/virtexit_9_amd64.deb >/dev/null
virsh -q destroy spinner
eventually test -s /var/lib/virtexit/state
before=$(exits)
systemctl stop virtexitd
chown -R root:root /var/lib/virtexit
systemctl start virtexitd
quiet apt-get -qq install --no-install-recommends -o Dpkg::Options::=--force-confold /run/virtexit_9_amd64.deb
equal "$(systemctl is-active virtexitd)" active
[ "$(systemctl show -P MainPID virtexitd)" != "$pid" ]
cmp /run/edited /etc/virtexit/virtexitd.yaml
equal "$(find /var/lib/virtexit ! -user virtexit)" ""
kept() { equal "$(exits)" "$before"; }
eventually kept
echo "exits of the domain: $before, then $(exits)"

step "on a kernel without the module, eBPF counts"
systemctl stop virtexitd
modprobe -r virtexit
echo "install virtexit /bin/false" >/etc/modprobe.d/none.conf
systemctl start virtexitd
collects() { virtexit status | grep '^Collector: *ebpf' && virtexit status | grep '^Level: *time'; }
eventually collects
virsh -q create /run/spinner.xml
more() { [ "$(exits)" -gt "$before" ]; }
eventually more
virtexit status
rm /etc/modprobe.d/none.conf

step "what an administrator has disabled stays disabled"
systemctl -q disable --now virtexitd
quiet apt-get -qq install --reinstall --no-install-recommends /run/virtexit_9_amd64.deb
equal "$(systemctl is-enabled virtexitd || true)" disabled

step "removed, the configuration and the state stay"
systemctl -q enable --now virtexitd
quiet apt-get -qq remove virtexit
test -e /etc/virtexit/virtexitd.yaml -a -d /var/lib/virtexit
[ ! -e /sys/module/virtexit ]

step "purged, nothing does"
if [ -n "$module" ]; then
	quiet apt-get -qq purge virtexit
	rm -r "$dkms"
else
	quiet apt-get -qq purge virtexit virtexit-dkms
fi
equal "$(find /etc /run /var/lib /usr/bin /usr/sbin /usr/src /usr/lib/systemd /usr/lib/sysusers.d /usr/lib/udev /usr/share/doc \
	/lib/modules/*/updates -maxdepth 3 -name '*virtexit*' ! -path '/run/virtexit_9_*' ! -path '/run/next/*')" ""
equal "$(getent passwd virtexit; getent group virtexit; dkms status; dpkg-query -W '*virtexit*' 2>/dev/null; ls /sys/module | grep virtexit)" ""
equal "$(systemctl show -P LoadState virtexitd)" not-found
equal "$(systemctl is-system-running)" running
step "done"
