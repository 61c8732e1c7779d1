#!/usr/bin/env bash
# Install, install again, fail, and uninstall silently under wine: try_installer.sh (needs makensis and Debian's wine64;
# CC names a compiler for Windows, such as x86_64-w64-mingw32-gcc, or zig: "python -m ziglang cc -target
# x86_64-windows-gnu"). With wixl (Debian's wixl) the .msi, too.
# Stand-ins take the place of the compiled program and of shawl: this tries the installer, not the agent. Wine knows no
# rights of files and no firewall: try_service.ps1 looks at these, on Windows.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
export WINEPREFIX=$work/wine WINEDEBUG=-all DISPLAY=
wine=$(command -v wine64 || echo /usr/lib/wine/wine64)
trap 'wineserver --kill --wait 2>/dev/null || true; rm -rf "$work"' EXIT

say() { echo "== $*"; }
must() {
    "$@" && return
    echo "FAILED: $*" >&2
    cat "$log" >&2 || true
    exit 1
}
windows() { timeout 100 "$wine" "$@"; }
gone() { for path in "$@"; do test ! -e "$path" || return 1; done; }
registered() { windows reg query "HKLM\\$1" >/dev/null 2>&1; }
value() { windows reg query "HKLM\\$service" /v "$1" 2>/dev/null | tr -d '\r' | sed -n "s/^ *$1 *REG_[A-Z_]* *//p"; }
logged() { iconv -f utf-16le -t utf-8 "$log" | grep -q -- "$1"; }
runs() { windows sc query MedplumAgent 2>/dev/null | grep -q RUNNING; }
code() { # of the command, in $ended
    ended=0
    "$@" || ended=$?
}
service='SYSTEM\CurrentControlSet\Services\MedplumAgent'
entry='Software\Microsoft\Windows\CurrentVersion\Uninstall\MedplumAgent'

read -ra compiler <<<"${CC:-x86_64-w64-mingw32-gcc}"
"${compiler[@]}" -O1 -o "$work/shawl.exe" "$here/stand_in_service.c" -ladvapi32
installer() { # VERSION
    mkdir -p "$work/medplum-agent"
    echo "stand-in $1" >"$work/medplum-agent/medplum-agent.exe"
    makensis -V1 -WX "-DVERSION=$1" "-DFOLDER=$work/medplum-agent" "-DSHAWL=$work/shawl.exe" \
        "-DREADME=$here/installer.nsi" "-DOUTPUT=$work/installer-$1.exe" "$here/installer.nsi"
}
installer 9.9.8
installer 9.9.9
mkdir "$WINEPREFIX"
boot() {
    wineserver --kill --wait 2>/dev/null || true
    wineserver --persistent
    windows wineboot >/dev/null 2>&1
    sleep 8
}
boot
boot # a new prefix is busy with services of its own for minutes, and starts no others; one that was there is not
installed="$WINEPREFIX/drive_c/Program Files/Medplum Agent" state=$WINEPREFIX/drive_c/ProgramData/MedplumAgent
log=$state/medplum-agent-install.log

say "without values it refuses"
code windows "$work/installer-9.9.8.exe" /S
must test "$ended" = 2
must gone "$installed" "$state"

say "values on the command line; the service runs"
must windows "$work/installer-9.9.8.exe" /S /BASE_URL=https://x.example/y/ '/CLIENT_SECRET=s3=c/r et' /CLIENT_ID=c1 /AGENT_ID=a1
expected=$(printf 'baseUrl=https://x.example/y/\r\nclientId=c1\r\nclientSecret=s3=c/r et\r\nagentId=a1\r')
must test "$(cat "$installed/agent.properties")" = "$expected"
must test -f "$installed/program/medplum-agent.exe" -a -f "$installed/shawl.exe" -a -d "$state"
must registered "$service"
must registered "$entry"
must runs
must test "$(value ObjectName)" = 'NT SERVICE\MedplumAgent'
must logged 'icacls\|closed to others'
must logged '9.9.8 is installed'
if logged s3=c; then must false; fi

say "installing again keeps settings, log-on and start" # recovery and dependencies: try_service.ps1
windows reg add "HKLM\\$service" /v ObjectName /d 'HOSPITAL\agent' /f >/dev/null 2>&1
windows reg add "HKLM\\$service" /v Start /t REG_DWORD /d 3 /f >/dev/null 2>&1
boot # the service manager reads them at its start
windows net start MedplumAgent >/dev/null 2>&1
must windows "$work/installer-9.9.9.exe" /S
must test "$(cat "$installed/agent.properties")" = "$expected"
must test "$(value ObjectName)" = 'HOSPITAL\agent'
must test "$(value Start)" = 0x3
must runs
must grep -q 9.9.9 "$installed/program/medplum-agent.exe"
must gone "$installed/program.old" "$installed/shawl.exe.old"
must logged 'settings are kept'
must logged 'HOSPITAL.agent (owner'

say "a new version whose service does not run: the old one is there again, and runs"
touch "$installed/fails"
printf 'clientId=new\r\n' >"$WINEPREFIX/drive_c/given.properties"
(sleep 12; rm -f "$installed/fails") & # the old one is no failure
code windows "$work/installer-9.9.8.exe" /S '/CONFIG=C:\given.properties'
wait $!
must test "$ended" = 2
must grep -q 9.9.9 "$installed/program/medplum-agent.exe"
must test "$(cat "$installed/agent.properties")" = "$expected"
must gone "$installed/program.old" "$installed/shawl.exe.old"
must logged 'failed: the service does not run'
windows net start MedplumAgent >/dev/null 2>&1 || true
must runs

say "/CONFIG wins over what is there, and the log says so"
printf 'clientId = "from-toml"\n' >"$WINEPREFIX/drive_c/given.toml"
must windows "$work/installer-9.9.9.exe" /S '/CONFIG=C:\given.toml'
must grep -q from-toml "$installed/agent.toml"
must gone "$installed/agent.properties"
must test "$(cat "$installed/agent.properties.old")" = "$expected"
must logged 'settings are those of C:.given.toml'
code windows "$work/installer-9.9.9.exe" /S '/CONFIG=C:\nowhere.toml'
must test "$ended" = 2
must grep -q from-toml "$installed/agent.toml"

say "the reference agent's service goes, once ours runs"
windows sc create MedplumAgent_5.0.10-abc1234 binPath= 'C:\nothing.exe' >/dev/null 2>&1
must windows "$work/installer-9.9.9.exe" /S
if registered "${service}_5.0.10-abc1234"; then must false; fi
must runs

uninstall() {
    windows 'C:\Program Files\Medplum Agent\uninstall.exe' /S "$@"
    for _ in $(seq 100); do gone "$installed/program" "$installed/uninstall.exe" && return; sleep 0.2; done # it goes on in a copy of itself
}

say "uninstalling keeps settings and waiting messages"
touch "$state/queue"
uninstall
must gone "$installed/program" "$installed/shawl.exe" "$installed/uninstall.exe"
must test -e "$state/queue" -a -f "$installed/agent.toml"
if registered "$service" || registered "$entry"; then must false; fi

say "values from a file; purging deletes all"
must windows "$work/installer-9.9.9.exe" /S '/CONFIG=C:\given.properties'
must grep -q clientId=new "$installed/agent.properties"
uninstall /PURGE
sleep 1
must gone "$installed" "$state"

if command -v wixl >/dev/null; then
    say "the .msi does the same, and leaves nothing of its own"
    package=agent.msi
    "$here/make_msi.sh" 9.9.9 "$work/installer-9.9.9.exe" "$work/$package"
    must windows msiexec /i "$work/$package" /qn 'CONFIG=C:\given.properties'
    must grep -q clientId=new "$installed/agent.properties"
    must runs
    touch "$state/queue"
    must windows msiexec /x "$work/$package" /qn
    must gone "$installed/program" "$installed/uninstall.exe" "$installed Setup"
    must test -e "$state/queue" -a -f "$installed/agent.properties"
    if registered "$service"; then must false; fi
    must windows msiexec /i "$work/$package" /qn
    must runs
    must windows msiexec /x "$work/$package" /qn PURGE=1
    sleep 1
    must gone "$installed" "$state"
    code windows msiexec /i "$work/$package" /qn # no values, nothing installed
    must test "$ended" != 0
    must gone "$installed/program" "$installed Setup"
fi

say "a first installation whose service does not run ends with 3"
mkdir -p "$installed"
touch "$installed/fails"
code windows "$work/installer-9.9.9.exe" /S '/CONFIG=C:\given.properties'
must test "$ended" = 3
must registered "$service"
rm "$installed/fails"
uninstall /PURGE
sleep 1
must gone "$installed" "$state"
say "all as it should be"
