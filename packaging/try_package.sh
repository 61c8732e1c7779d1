#!/usr/bin/env bash
# Try a release as it is shipped, on a machine that is thrown away: try_package.sh ASSETS (root; Linux or macOS).
# Install, start as a service, run the tests against what is installed and the one file, stop, uninstall.
set -euo pipefail
cd "$(dirname "$0")/.."
assets=$(cd "$1" && pwd)

say() { echo "== $*"; }
fail() {
    echo "FAILED: $*" >&2
    exit 1
}
within() { # SECONDS COMMAND...: succeeds as soon as the command does
    local left=$1
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$((left -= 1))" -ge 0 ] || fail "$*"
        sleep 1
    done
}
logged() { find "$logs" -name "medplum-agent-main-*" | grep -q .; } # it has got so far
nobody() { ! pgrep -u "$user" >/dev/null; } # neither the agent nor a process that it left

if [ "$(uname)" = Linux ]; then
    user=medplum-agent program=/usr/lib/medplum-agent/medplum-agent logs=/var/log/medplum-agent
    settings=/etc/medplum-agent/agent.toml one_file=(-linux -linux-arm64)
    install() { apt-get -qq -y install "$assets"/*.deb; }
    start() { systemctl start medplum-agent; }
    runs() { systemctl is-active --quiet medplum-agent; }
    stop() { systemctl stop medplum-agent && test "$(systemctl show --property Result --value medplum-agent)" = success; }
    remove() { apt-get -qq -y purge medplum-agent; }
else
    user=_medplumagent program=/usr/local/lib/medplum-agent/medplum-agent logs=/Library/Logs/MedplumAgent
    settings="/Library/Application Support/MedplumAgent/agent.toml" one_file=(-macos-arm64 -macos-x86_64)
    install() { installer -pkg "$assets"/*.pkg -target /; }
    start() { launchctl bootstrap system /Library/LaunchDaemons/medplum-agent.plist; }
    runs() { launchctl print system/medplum-agent | grep -q 'state = running'; }
    stop() { launchctl bootout system/medplum-agent; }
    remove() { /usr/local/lib/medplum-agent/uninstall.sh --purge; }
fi

say install
install
printf '%s\n' 'baseUrl = "http://127.0.0.1:9/"' 'clientId = "c1"' 'clientSecret = "s1"' 'agentId = "a1"' >"$settings"

say start
start
within 30 runs
within 30 logged

say test
for ending in "${one_file[@]}"; do
    for path in "$assets"/medplum-agent-*"$ending"; do
        [ ! -f "$path" ] || MEDPLUM_AGENT_ONE_FILE=$path
    done
done
chmod +x "$MEDPLUM_AGENT_ONE_FILE" # artifacts of workflows lose it
export MEDPLUM_AGENT_ONE_FILE MEDPLUM_AGENT_BINARY=$program
python3 build.py test --binary
runs || fail "the service did not last"

say stop
stop
within 20 nobody

say uninstall
remove
[ ! -e "$program" ] && [ ! -e "$logs" ] && [ ! -e "$settings" ] || fail "something is left"
say "all as it should be"
