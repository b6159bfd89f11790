#!/bin/sh
# The first process of a node: gives its mount namespace the parts of a machine, then reaps.
#
#   unshare --mount --pid --uts --cgroup --fork sh node.sh NODE STATE DATA PAUSE
#
# Runs in the node's network namespace and at the root of its cgroups. STATE/etc lies over the
# machine's /etc; DATA becomes /var/lib. What is written anywhere else here goes with the node.
# SPDX-License-Identifier: Apache-2.0
set -eu
node=$1 state=$2 data=$3 pause=$4

hostname "$node"
mount -t proc proc /proc

# /sys shows the network namespace and cgroup namespace that it was mounted in.
sys=$state/sys
mkdir -p "$sys"
mount -t sysfs sysfs "$sys"
mount -t bpf bpf "$sys/fs/bpf"
# Of a version 1 mount's options those that say which hierarchy it is: "cpu,cpuacct", "name=x".
hierarchy() {
    echo "rw,$1" | tr , '\n' | grep -vxE 'ro|nosuid|nodev|noexec|relatime|xattr|nsdelegate|memory_.*|release_agent=.*' | sort -u | paste -sd,
}
if [ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ]; then
    mount -t cgroup2 cgroup2 "$sys/fs/cgroup"
else
    mount -t tmpfs -o mode=755 cgroup "$sys/fs/cgroup"
    while read -r _ at type options _; do
        case $type:$at in cgroup*:/sys/fs/cgroup/*) ;; *) continue ;; esac
        place=$sys/fs/cgroup/${at##*/}
        [ ! -e "$place" ] || continue
        mkdir "$place"
        mount -t "$type" -o "$(hierarchy "$options")" "$type" "$place"
    done </proc/mounts
fi
mount --move "$sys" /sys

# The kubelet sets these for the whole kernel; it finds them set and leaves the machine alone.
tunables=$state/tunables
mkdir -p "$tunables"
tunable() {
    [ -e "/proc/sys/$1" ] || return 0
    echo "$2" >"$tunables/$(basename "$1")"
    mount --bind "$tunables/$(basename "$1")" "/proc/sys/$1"
}
tunable vm/overcommit_memory 1
tunable vm/panic_on_oom 0
tunable kernel/panic 10
tunable kernel/panic_on_oops 1
tunable kernel/keys/root_maxkeys 1000000
tunable kernel/keys/root_maxbytes 25000000

# A /run, /opt and /var/log of its own, and an /etc in which one can write.
own=$state/own
mkdir -p "$own"
mount -t tmpfs -o mode=755 node "$own"
mkdir "$own/run" "$own/opt" "$own/log" "$own/etc" "$own/work"
mount -t overlay -o "lowerdir=$state/etc:/etc,upperdir=$own/etc,workdir=$own/work" etc /etc
mount --bind "$own/log" /var/log
mount --bind "$data" /var/lib
mount --bind "$own/opt" /opt
mkdir -p /opt/cni/bin /etc/cni/net.d "$own/run/lockgate"
cp /usr/lib/cni/* /opt/cni/bin/
mount --bind "$own/run" /run # hides STATE

# Kubelet and containerd hand mounts on to their containers.
mount --make-rshared /
exec "$pause"
