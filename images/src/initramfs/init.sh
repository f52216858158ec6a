#!/bin/busybox sh
# The guest's first process: makes the file systems, loads the drivers of the channel and hands over to the guest agent.
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin
chmod 755 /

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing

while read -r module; do
    insmod "/lib/modules/$module.ko" || echo "init: can't load $module"
done </etc/modules
ip link set lo up

/bin/guest-agent
echo "init: the guest agent has ended ($?)"
poweroff -f
