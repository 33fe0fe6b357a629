# SPDX-License-Identifier: Apache-2.0
#
# What a guest of the demonstration does after booting: it works and sleeps.
while :; do
	dd if=/dev/urandom bs=4k count=50 2>/dev/null | md5sum >/dev/null
	sleep 0.2
done
