#!/usr/bin/env bash
# What try_upgrade.sh and try_service.sh share: a Debian root that is booted by systemd-nspawn, and commands in it.
# ROOT is made by: debootstrap --variant=minbase --include=adduser,dbus,systemd-sysv bookworm ROOT
# To be sourced; the folder `work` goes at the end, where the root is shut down, too.
work=${work:?} leader=

fail() {
    echo "FAILED: $*" >&2
    inside journalctl --no-pager --lines 40 >&2 || true
    exit 1
}
inside() {
    nsenter --target "$leader" --all /usr/bin/env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C \
        DEBIAN_FRONTEND=noninteractive "$@"
}
must() { inside sh -ec "$1" || fail "$1"; }
within() { # SECONDS COMMAND: succeeds as soon as the command does
    local left=$(($1 * 5))
    until inside sh -ec "$2" >/dev/null 2>&1; do
        [ "$((left -= 1))" -ge 0 ] || fail "$2"
        sleep 0.2
    done
}
boot() { # ROOT MOUNT...: returns when the root is up; each MOUNT is OUTSIDE:INSIDE, read-only
    local root=$1 nspawn
    shift
    systemd-nspawn --quiet --directory="$root" --boot --register=no --keep-unit --private-network \
        "${@/#/--bind-ro=}" </dev/null >"$work/console" 2>&1 &
    nspawn=$!
    for _ in $(seq 100); do
        leader=$(pgrep --parent $nspawn || true)
        [ -n "$leader" ] && inside systemctl is-system-running --wait 2>/dev/null | grep -Eq 'running|degraded' && return
        kill -0 $nspawn 2>/dev/null || { cat "$work/console" >&2; leader=; exit 1; }
        sleep 0.2
    done
    fail "the root is not up after 20 s"
}
finish() {
    [ -z "$leader" ] || inside systemctl poweroff || true
    wait || true
    rm -rf "$work"
}
trap finish EXIT
