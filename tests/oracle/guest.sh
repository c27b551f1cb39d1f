#!/bin/sh
# Init of the guest. The host's files are its root, read only; what must be written is in memory, or in $SHARED on the
# host. Environment, from the kernel's command line: SHARED, PYTHON, DRIVER, NODE (its number) of NODES, OTHERS (the addresses of
# the nodes it plays with; `serve`: another one plays), and ADDRESS on the network between guests, if there is one.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

stop() {
    echo "$1" > /mnt/outcome.$NODE
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
controlled() { # and every node's address is known to the kernel
    dlm_tool status 2> /dev/null | grep -q 'quorate 1' &&
        [ "$(ls /sys/kernel/config/dlm/cluster/comms | wc -l)" = "$NODES" ]
}

mount -t proc none /proc
mount -t sysfs none /sys
mount -t hostfs none /mnt -o "$SHARED"
mkdir -p /dev/shm /dev/misc
for directory in /dev/shm /run /var/lib/corosync /var/log; do
    mount -t tmpfs none $directory
done
ip link set lo up
if [ -n "$ADDRESS" ]; then
    ip addr add "$ADDRESS/24" dev vec0
    ip link set vec0 up
fi

modules=/usr/lib/uml/modules/$(uname -r)/kernel
insmod "$modules/fs/configfs/configfs.ko" && insmod "$modules/fs/dlm/dlm.ko" || stop 'cannot load the dlm module'
mount -t configfs none /sys/kernel/config
for device in dlm-control dlm-monitor dlm_plock dlm_oracle; do
    ln -s ../$device /dev/misc/$device # where libdlm looks; udev would do that
done

corosync -f -c /mnt/corosync.conf > /mnt/corosync.$NODE.log 2>&1 &
within 60 quorate || stop "corosync did not become quorate: corosync.$NODE.log"
dlm_controld -D --enable_fencing 0 > /mnt/dlm_controld.$NODE.log 2>&1 &
within 60 controlled || stop "dlm_controld did not start: dlm_controld.$NODE.log"

case $OTHERS in
    serve) set -- serve - ;;
    *) set -- /mnt/plan.jsonl /mnt/record.jsonl $(echo "$OTHERS" | tr , ' ') ;;
esac
if "$PYTHON" -I "$DRIVER" "$@" > "/mnt/driver.$NODE.log" 2>&1; then
    stop done
else
    stop "the driver failed: driver.$NODE.log"
fi
