#!/bin/sh
# Init of the guest. The host's files are its root, read only; what must be written is in memory, or in $SHARED on the
# host. Environment: SHARED, PYTHON, DRIVER, from the kernel's command line.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

stop() {
    echo "$1" > /mnt/outcome
    poweroff -f
}

within() { # seconds, command: until it succeeds
    tries=$(($1 * 5))
    shift
    until "$@"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || return 1
        sleep 0.2
    done
}

quorate() { corosync-quorumtool -s 2> /dev/null | grep -q 'Quorate: *Yes'; }
controlled() { dlm_tool status 2> /dev/null | grep -q 'quorate 1'; }

mount -t proc none /proc
mount -t sysfs none /sys
mount -t hostfs none /mnt -o "$SHARED"
mkdir -p /dev/shm /dev/misc
for directory in /dev/shm /run /var/lib/corosync /var/log; do
    mount -t tmpfs none $directory
done
ip link set lo up

modules=/usr/lib/uml/modules/$(uname -r)/kernel
insmod "$modules/fs/configfs/configfs.ko" && insmod "$modules/fs/dlm/dlm.ko" || stop 'cannot load the dlm module'
mount -t configfs none /sys/kernel/config
for device in dlm-control dlm-monitor dlm_plock dlm_oracle; do
    ln -s ../$device /dev/misc/$device # where libdlm looks; udev would do that
done

corosync -f -c /mnt/corosync.conf > /mnt/corosync.log 2>&1 &
within 60 quorate || stop 'corosync did not become quorate: corosync.log'
dlm_controld -D --enable_fencing 0 > /mnt/dlm_controld.log 2>&1 &
within 60 controlled || stop 'dlm_controld did not start: dlm_controld.log'

if "$PYTHON" -I "$DRIVER" /mnt/plan.jsonl /mnt/record.jsonl > /mnt/driver.log 2>&1; then
    stop done
else
    stop 'the driver failed: driver.log'
fi
