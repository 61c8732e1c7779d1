#!/usr/bin/env bash
# Boot a Debian root (see try_upgrade.sh), and make a service of the one file there, twice, and remove it:
#     try_service.sh ROOT dist/medplum-agent-linux       (root only; needs systemd-nspawn)
set -euo pipefail
root=$1 file=$(realpath "$2") work=$(mktemp -d) leader=
state='/etc/medplum-agent/agent.toml /var/lib/medplum-agent /var/log/medplum-agent'

fail() {
    echo "FAILED: $*" >&2
    inside journalctl --no-pager --lines 40 >&2 || true
    exit 1
}
inside() { nsenter --target "$leader" --all /usr/bin/env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C "$@"; }
must() { inside sh -ec "$1" || fail "$1"; }
within() { # SECONDS COMMAND: succeeds as soon as the command does
    local left=$(($1 * 5))
    until inside sh -ec "$2" >/dev/null 2>&1; do
        [ "$((left -= 1))" -ge 0 ] || fail "$2"
        sleep 0.2
    done
}
finish() {
    [ -z "$leader" ] || inside systemctl poweroff || true
    wait || true
    rm -rf "$work"
}
trap finish EXIT

systemd-nspawn --quiet --directory="$root" --boot --register=no --keep-unit --private-network \
    --bind-ro="$file:/mnt/medplum-agent-linux" </dev/null >"$work/console" 2>&1 &
nspawn=$!
for _ in $(seq 100); do
    leader=$(pgrep --parent $nspawn || true)
    [ -n "$leader" ] && inside systemctl is-system-running --wait 2>/dev/null | grep -Eq 'running|degraded' && break
    kill -0 $nspawn 2>/dev/null || { cat "$work/console" >&2; leader=; exit 1; }
    sleep 0.2
done

! inside /mnt/medplum-agent-linux service install || fail "installed without settings"
must '/mnt/medplum-agent-linux service install http://127.0.0.1:9/ c1 "s\"1" a1'
must 'test $(stat -c %a:%U /etc/medplum-agent/agent.toml) = 600:medplum-agent'
must 'test "$(find /usr/local/libexec ! -user root)" = ""'
within 20 'journalctl -u medplum-agent | grep -q "starts for http://127.0.0.1:9/"'
must 'systemctl is-enabled medplum-agent medplum-agent-upgrade.path && systemctl is-active medplum-agent-upgrade.path'
must 'medplum-agent service status | grep -q "active (running)"'
must 'test $(stat -c %U /proc/$(systemctl show --property MainPID --value medplum-agent)) = medplum-agent'
before=$(inside systemctl show --property MainPID --value medplum-agent)
must '/mnt/medplum-agent-linux service install && grep -q a1 /etc/medplum-agent/agent.toml'
[ "$before" != "$(inside systemctl show --property MainPID --value medplum-agent)" ] || fail "the old program runs on"
must 'medplum-agent service stop && ! systemctl is-active medplum-agent'
must 'medplum-agent service start && systemctl is-active medplum-agent'
must 'medplum-agent service uninstall'
must "ls $state >/dev/null && ! ls /usr/local/bin/medplum-agent /usr/local/libexec/medplum-agent /etc/systemd/system/medplum-agent* 2>/dev/null"
must "! systemctl is-active medplum-agent && rm -r $state /etc/medplum-agent && userdel medplum-agent"
echo "a service was made, replaced and removed"
