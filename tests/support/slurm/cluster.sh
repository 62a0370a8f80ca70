#!/usr/bin/env bash
# A temporary Slurm cluster on one machine; lab.py starts it.
#
#   cluster.sh up DIR NODES     PID 1 of new namespaces: network, munged, slurmctld and one slurmd per node. Prints "up",
#                               then waits for the end of its standard input: when its parent has ended, however it did,
#                               it exits and the kernel kills everything in the PID namespace.
#   cluster.sh node DIR NAME    start the slurmd of one node (again)
#
# The controller is host ctl (10.77.0.254) on a bridge; node nI is a network namespace of its own with address 10.77.0.I and
# its own host name, so that rendezvous addresses, host lists and lost connections behave as on a real cluster.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
what=$1 dir=$2
export SLURM_CONF=$dir/slurm.conf

node() {
    # not `ip netns exec`: that mounts a new /sys, without the cgroups that slurmd needs
    nsenter --net="/run/netns/$1" unshare --uts bash -c "hostname $1; exec slurmd -f $SLURM_CONF -N $1" \
        </dev/null >>"$dir/log/$1.out" 2>&1
}

network() {
    mount --make-rprivate /
    mount -t tmpfs tmpfs /run # for the named network namespaces, not visible outside
    mount --bind "$dir/hosts" /etc/hosts
    if [ -e /etc/resolv.conf ]; then mount --bind /dev/null /etc/resolv.conf; fi # no timeouts of a name server
    hostname ctl
    ip link set lo up
    ip link add br0 type bridge
    ip addr add 10.77.0.254/24 dev br0
    ip link set br0 up
    for ((i = 1; i <= $1; i++)); do
        ip netns add "n$i"
        ip link add "veth-n$i" type veth peer name eth0 netns "n$i"
        ip link set "veth-n$i" master br0 up
        ip -n "n$i" link set lo up
        ip -n "n$i" addr add "10.77.0.$i/24" dev eth0
        ip -n "n$i" link set eth0 up
    done
}

all_idle() { # a node is listed once per partition, so names are counted, not lines
    [ "$(sinfo --noheader --Node --format='%N %T' 2>/dev/null | sort -u | grep -c ' idle$')" = "$1" ]
}

up() {
    network "$1"
    local munge=$dir/munge
    munged --force --key-file="$munge/key" --socket="$munge/socket" --pid-file="$munge/pid" --log-file="$munge/log" \
        --seed-file="$munge/seed" --num-threads=4
    slurmctld -i -f "$SLURM_CONF" >>"$dir/log/slurmctld.out" 2>&1 # -i: there is no saved state yet
    for ((i = 1; i <= $1; i++)); do node "n$i"; done
    for ((t = 0; t < 6000; t++)); do
        if all_idle "$1"; then
            echo up
            cat >/dev/null
            return
        fi
        sleep 0.1
    done
    echo "the nodes did not become idle within 600 s: $(sinfo 2>&1 | tr '\n' ';')"
}

case $what in
    up) up "$3" ;;
    node) node "$3" ;;
    *) exit 2 ;;
esac
