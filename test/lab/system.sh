#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# The end of init.sh for a system with an init of its own, which runs this as a service when it is up.
exec 3<>/dev/ttyS1
stty raw -echo <&3
printf '\036lab: started\n' >&3
status=0
/bin/sh /run/lab/command </dev/null >&3 2>&3 3>&- || status=$?
printf '\036lab: exit status %d\n' $status >&3
stty raw <&3 # returns when everything written has left the machine
systemctl poweroff --force --force
