#!/usr/bin/env bash
# Install, install again and uninstall silently under wine: try_installer.sh (needs makensis and Debian's wine64).
# Stand-ins take the place of the compiled program and of shawl: this tries the installer, not the service.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
export WINEPREFIX=$work/wine WINEDEBUG=-all DISPLAY=
wine=$(command -v wine64 || echo /usr/lib/wine/wine64)
trap 'wineserver --kill --wait 2>/dev/null || true; rm -rf "$work"' EXIT

say() { echo "== $*"; }
must() { "$@" || { echo "FAILED: $*" >&2; exit 1; }; }
windows() { timeout 100 "$wine" "$@"; }
gone() { for path in "$@"; do test ! -e "$path" || return 1; done; }
registered() { windows reg query "HKLM\\$1" >/dev/null 2>&1; }
service='SYSTEM\CurrentControlSet\Services\MedplumAgent'
entry='Software\Microsoft\Windows\CurrentVersion\Uninstall\MedplumAgent'

mkdir "$work/medplum-agent"
echo stand-in >"$work/medplum-agent/medplum-agent.exe"
cat >"$work/shawl.nsi" <<STUB
Unicode true
Target amd64-unicode
SilentInstall silent
RequestExecutionLevel user
OutFile "$work/shawl.exe"
Section
  nsExec::Exec 'sc create MedplumAgent binPath= "C:\shawl.exe run"'
  Pop \$0
  SetErrorLevel \$0
SectionEnd
STUB
makensis -V1 "$work/shawl.nsi"
makensis -V1 -WX -DVERSION=9.9.9 "-DFOLDER=$work/medplum-agent" "-DSHAWL=$work/shawl.exe" "-DREADME=$here/installer.nsi" \
    "-DOUTPUT=$work/installer.exe" "$here/installer.nsi"
windows wineboot --init >/dev/null 2>&1
installed="$WINEPREFIX/drive_c/Program Files/Medplum Agent" state=$WINEPREFIX/drive_c/ProgramData/MedplumAgent

say "without values it refuses"
code=0
windows "$work/installer.exe" /S || code=$?
must test "$code" = 2
must gone "$installed"

say "values on the command line"
must windows "$work/installer.exe" /S /BASE_URL=https://x.example/y/ '/CLIENT_SECRET=s3=c/r et' /CLIENT_ID=c1 /AGENT_ID=a1
expected=$(printf 'baseUrl=https://x.example/y/\r\nclientId=c1\r\nclientSecret=s3=c/r et\r\nagentId=a1\r')
must test "$(cat "$installed/agent.properties")" = "$expected"
must test -f "$installed/program/medplum-agent.exe" -a -f "$installed/shawl.exe" -a -d "$state"
must registered "$service"
must registered "$entry"

say "installing again keeps the settings"
must windows "$work/installer.exe" /S
must test "$(cat "$installed/agent.properties")" = "$expected"
must registered "$service"

uninstall() {
    windows 'C:\Program Files\Medplum Agent\uninstall.exe' /S "$@"
    for _ in $(seq 50); do gone "$installed/program" "$installed/uninstall.exe" && return; sleep 0.2; done # it goes on in a copy of itself
}

say "uninstalling keeps settings and waiting messages"
touch "$state/queue"
uninstall
must gone "$installed/program" "$installed/shawl.exe" "$installed/uninstall.exe"
must test -e "$state/queue" -a -f "$installed/agent.properties"
if registered "$service" || registered "$entry"; then must false; fi

say "values from a file; purging deletes all"
printf 'clientId=from-file\r\n' >"$WINEPREFIX/drive_c/given.properties"
must windows "$work/installer.exe" /S '/CONFIG=C:\given.properties'
must grep -q from-file "$installed/agent.properties"
uninstall /PURGE
sleep 1
must gone "$installed" "$state"
say "all as it should be"
