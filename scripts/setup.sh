#!/usr/bin/env bash
# Prepares this machine for one purpose; does nothing that is already done.
#
#   scripts/setup.sh build|run|test|bench|cluster
#
# Installs missing Debian or Ubuntu packages, mounts the BPF file system, makes
# .venv from requirements.lock. Ends with one sentence when something is missing.
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "$0")/.."

purpose=${1:-build}
export DEBIAN_FRONTEND=noninteractive
apt_updated=

step() { printf '  %s\n' "$*"; }
fail() { printf 'lockgate: %s\n' "$*" >&2; exit 1; }

# quietly NAME COMMAND…: shows the command's output only when it fails.
quietly() {
    local what=$1 log
    shift
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

apt_update() {
    [ -z "$apt_updated" ] || return 0
    step "apt-get update"
    quietly update apt-get update -q ||
        fail "apt-get update failed: check that this machine has a network and that its package sources answer."
    apt_updated=1
}

known() { [ -n "$(apt-cache show --no-all-versions "$1" 2>/dev/null | head -c 1)" ]; }

# ---- what the machine must be ----------------------------------------------------

check_root() {
    [ "$(id -u)" = 0 ] || fail "this needs root (namespaces, eBPF): run it again with sudo."
}

check_system() {
    command -v apt-get >/dev/null && command -v dpkg-query >/dev/null ||
        fail "this script knows Debian and Ubuntu only (no apt-get here); the package names in it say what to install by hand."
}

check_kernel() {
    local advice="Lockgate needs a kernel from 6.6 on (Debian 13, Ubuntu 24.04, or Debian 12 with the kernel from backports); this is $(uname -r)"
    [ -r /sys/kernel/btf/vmlinux ] || fail "the kernel has no type information (CONFIG_DEBUG_INFO_BTF). $advice."
    # tcx links are the newest thing we need; ask the kernel, not its version.
    if grep -q ' bpf_prog_load$' /proc/kallsyms 2>/dev/null && ! grep -q ' tcx_link_attach$' /proc/kallsyms; then
        fail "the kernel has no tcx. $advice."
    fi
    awk '$3 == "cgroup2" { found = 1 } END { exit !found }' /proc/mounts ||
        fail "no cgroup v2 hierarchy is mounted: mount one (mount -t cgroup2 none /sys/fs/cgroup/unified) and run this again."
}

mount_bpffs() {
    awk '$2 == "/sys/fs/bpf" && $3 == "bpf" { found = 1 } END { exit !found }' /proc/mounts && return 0
    step "mounting the BPF file system on /sys/fs/bpf"
    mount -t bpf bpf /sys/fs/bpf ||
        fail "the BPF file system could not be mounted on /sys/fs/bpf: the kernel lacks it or this container may not mount."
}

# What agents and `lockgate up` ask, asked before anything is built.
check_features() {
    local said
    said=$(.venv/bin/python -c '
import sys
from lockgate.agent.needs import require
from lockgate.bpf.features import MissingFeature
try:
    require()
except MissingFeature as error:
    sys.exit(str(error))
' 2>&1) || fail "$said"
}

# ---- packages ----------------------------------------------------------------------

install_missing() {
    local missing=() name
    for name in "$@"; do
        installed "$name" || missing+=("$name")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    apt_update
    step "installing ${missing[*]}"
    quietly install apt-get install -y -q --no-install-recommends "${missing[@]}" ||
        fail "apt-get could not install ${missing[*]}: see the lines above."
}

# The newest clang that this distribution has, unless one from 16 on is there.
install_clang() {
    local version
    for version in 19 18 17 16; do
        ! command -v "clang-$version" >/dev/null || return 0
    done
    apt_update
    for version in 19 18 17 16; do
        if known "clang-$version"; then
            install_missing "clang-$version"
            return 0
        fi
    done
    fail "none of clang-19 to clang-16 is in this distribution's package sources: install one of them."
}

# ---- Python ------------------------------------------------------------------------

python_is_good() {
    "$1" -I -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

choose_python() {
    local candidate
    for candidate in python3 /usr/bin/python3; do
        if python_is_good "$candidate"; then
            echo "$candidate"
            return 0
        fi
    done
    return 1
}

make_venv() {
    local python
    if [ -x .venv/bin/python ] && cmp -s requirements.lock .venv/lockgate.lock; then
        return 0
    fi
    if ! python=$(choose_python); then
        install_missing python3 python3-venv
        python=$(choose_python) || fail "Python 3.11 or newer is needed; this distribution's is $(/usr/bin/python3 --version)."
    fi
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        step "making .venv with $($python --version)"
        rm -rf .venv
        quietly venv "$python" -m venv .venv || fail "python3 -m venv failed: see the lines above."
    fi
    step "installing the Python packages of requirements.lock"
    quietly pip .venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.lock ||
        fail "pip could not install requirements.lock: check the network; see the lines above."
    quietly pip .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e . ||
        fail "pip could not install lockgate itself into .venv: see the lines above."
    cp requirements.lock .venv/lockgate.lock
}

# ---- all together --------------------------------------------------------------------

check_root
check_system
packages=(libbpf1 libbpf-dev linux-libc-dev libc6-dev iproute2 util-linux ca-certificates)
case $purpose in
    build) ;;
    run) packages+=(curl) ;;
    test) packages+=(curl nftables) ;;
    bench) packages+=(curl nftables iperf3 iptables containernetworking-plugins) ;;
    cluster) packages+=(curl nftables containerd runc containernetworking-plugins busybox-static openssl
        netcat-openbsd bind9-dnsutils wget) ;;
    *) fail "unknown purpose '$purpose': build, run, test, bench or cluster." ;;
esac
if [ "$purpose" != build ]; then
    check_kernel
    mount_bpffs
fi
install_missing "${packages[@]}"
install_clang
make_venv
[ "$purpose" = build ] || check_features
