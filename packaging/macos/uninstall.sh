#!/bin/sh
# Remove the agent; with --purge its settings, waiting messages and logs, too. sudo uninstall.sh [--purge]
set -eu
launchctl bootout system/medplum-agent 2>/dev/null || true
rm -rf /Library/LaunchDaemons/medplum-agent.plist /usr/local/bin/medplum-agent /usr/local/lib/medplum-agent
pkgutil --forget medplum-agent >/dev/null 2>&1 || true
if [ "${1:-}" = --purge ]; then
    rm -rf "/Library/Application Support/MedplumAgent" /Library/Logs/MedplumAgent
    dscl . -delete /Users/_medplumagent 2>/dev/null || true
    dscl . -delete /Groups/_medplumagent 2>/dev/null || true
fi
