#!/usr/bin/env bash
# Boot a Debian root (see booted_root.sh), and make a service of the one file there, twice, and remove it:
#     try_service.sh ROOT dist/medplum-agent-linux       (root only; needs systemd-nspawn)
set -euo pipefail
work=$(mktemp -d)
export work # booted_root.sh removes it
. "$(dirname "$0")/booted_root.sh"
state='/etc/medplum-agent/agent.toml /var/lib/medplum-agent /var/log/medplum-agent'

boot "$1" "$(realpath "$2"):/mnt/medplum-agent-linux"

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
