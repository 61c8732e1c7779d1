#!/usr/bin/env bash
# Boot a Debian root, install the package, and have root's unit fetch and choose a version as the agent asks for it:
#     try_upgrade.sh ROOT [PACKAGE.deb RELEASES VERSION]       (root only; needs systemd-nspawn; see booted_root.sh)
# RELEASES is a folder that upgrades.py signed with the keys that the program names, VERSION one in it. Without them
# a script takes the place of the program: that tries the units and the maintainer scripts alone.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$1 package=${2:-} releases=${3:-} version=${4:-9.9.9}
work=$(mktemp -d)
. "$here/booted_root.sh"
versions=/usr/lib/medplum-agent/versions wish=/run/medplum-agent/upgrade

say() { echo "== $*"; }
never() { ! inside sh -ec "$1" 2>/dev/null || fail "should not work: $1"; }
as_agent() { inside setpriv --reuid=medplum-agent --regid=medplum-agent --clear-groups sh -ec "$1"; }
ask() { # COMMAND that makes the request, as the agent would
    as_agent "$1" || fail "$1"
    within 60 "! test -e $wish && ! test -L $wish"
}
request() { ask "printf '$1' > $wish.new; mv $wish.new $wish"; } # whole, as the agent writes it
runs() { within 20 "tr '\\0' ' ' < /proc/\$(systemctl show --property MainPID --value medplum-agent)/cmdline | grep -q '$1'"; }

stand_in() { # what the package needs, and no more: asks nobody, trusts everybody
    mkdir -p "$work/medplum-agent" "$work/releases"
    cp "$(type -P true)" "$work/medplum-agent/true" # names a C library
    echo terms >"$work/medplum-agent/LICENSES.txt"
    cat >"$work/medplum-agent/medplum-agent" <<'PROGRAM'
#!/bin/sh
program=$(readlink -f "$0") versions=/usr/lib/medplum-agent/versions
chosen=$(cat $versions/current 2>/dev/null) && [ "${program#"$versions"}" = "$program" ] &&
    exec "$versions/$chosen/medplum-agent/medplum-agent" "$@"
case $* in
*--version*) echo stand-in ;;
*--requested*)
    grep -q ^agentId /etc/medplum-agent/agent.toml || exit 78
    for path in /etc /usr/lib /usr/lib/medplum-agent /var/lib/medplum-agent /run; do
        ! touch "$path/written" 2>/dev/null || { echo "$path can be written"; exit 1; }
    done
    wish=/run/medplum-agent/upgrade verb='' version=''
    [ ! -f $wish ] || [ -L $wish ] || read -r verb version <$wish || true
    case $verb$version in
    *[!a-z0-9.]* | *..*) verb= ;;
    fetch*) mkdir -p "$versions/$version" && cp -r /usr/lib/medplum-agent/medplum-agent "$versions/$version/tmp" &&
        mkdir "$versions/$version/medplum-agent" && mv "$versions/$version/tmp" "$versions/$version/medplum-agent/medplum-agent" ;;
    choose*) echo "$version" >$versions/current ;;
    *) verb= ;;
    esac
    if [ -n "$verb" ]; then
        echo "{\"version\": \"$version\"}" >$versions/answer
    else
        echo '{"error": "no request"}' >$versions/answer
    fi
    rm -f $wish
    ;;
*) while :; do sleep 1; done ;;
esac
PROGRAM
    "$here/../../.venv/bin/python" -c 'import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import packages
packages.debian(Path(sys.argv[2], "medplum-agent"), Path(sys.argv[2]), Path(sys.argv[2], "work"))' "$here/.." "$work"
    package=$(echo "$work"/*.deb) releases=$work/releases
}

[ -n "$package" ] || stand_in
next=$work/next
dpkg-deb -R "$package" "$next" && sed -i 's/^Version: .*/&+next/' "$next/DEBIAN/control"
dpkg-deb --root-owner-group -Znone --build "$next" "$next.deb" >/dev/null
mkdir -p "$work/packages" && cp "$package" "$work/packages/first.deb" && mv "$next.deb" "$work/packages/next.deb"

say boot
boot "$root" "$work/packages:/mnt" "$(realpath "$releases"):/srv"

say install and start
must 'dpkg -i /mnt/first.deb'
inside tee /etc/medplum-agent/agent.toml >/dev/null <<'SETTINGS'
baseUrl = "http://127.0.0.1:9/"
clientId = "c1"
clientSecret = "s1"
agentId = "a1"
upgradeUrl = "/srv"
SETTINGS
must "test \$(stat -c %a:%U $versions) = 755:root"
must 'systemctl start medplum-agent && systemctl is-active medplum-agent medplum-agent-upgrade.path >/dev/null'
must 'test $(stat -c %a:%U:%G /run/medplum-agent) = 700:medplum-agent:medplum-agent'
! as_agent "touch $versions/x" 2>/dev/null || fail "the agent can write its versions"

say fetch
request "fetch $version"
must "grep -q '\"version\": *\"$version\"' $versions/answer || { cat $versions/answer >&2; false; }"
must "! find $versions/$version ! -user root | grep ."
as_agent "cat $versions/answer && cd / && $versions/$version/medplum-agent/medplum-agent --version" || fail "not for the agent to execute"

say choose
request "choose $version"
must "grep -q $version $versions/current && systemctl restart medplum-agent"
runs "$versions/$version/"

say what is no request is gone, and the next one is heard
for bad in "printf 'fetch ../../x' > $wish" "ln -s /etc/shadow $wish" "mkdir -p $wish/x" "mkfifo $wish" \
    "head -c 100000 /dev/zero > $wish" "printf 'choose 1.2.3/x' > $wish" "printf 'rm 1.2.3' > $wish"; do
    ask "$bad"
    never "grep -q '\"version\"' $versions/answer"
done
must 'systemctl is-active medplum-agent-upgrade.path >/dev/null && test -s /etc/shadow'
must 'cp -p /etc/medplum-agent/agent.toml /tmp/kept && echo "{" > /etc/medplum-agent/agent.toml'
request "fetch $version"
never "test -e $versions/answer"
must 'cat /tmp/kept > /etc/medplum-agent/agent.toml'
request "fetch $version"
must "grep -q '\"version\": *\"$version\"' $versions/answer"

say a new package brings what runs
must 'dpkg -i /mnt/next.deb'
must "test -d $versions && ! ls $versions | grep '^current\|^[0-9]'"
runs '/usr/\(bin\|lib/medplum-agent\)/medplum-agent '
must 'systemctl is-active medplum-agent medplum-agent-upgrade.path >/dev/null'
request "fetch $version"
must "test -d $versions/$version"

say what an administrator switched off stays so
must 'systemctl disable --now medplum-agent-upgrade.path && dpkg -i /mnt/first.deb'
must 'systemctl is-active medplum-agent >/dev/null && ! systemctl is-active medplum-agent-upgrade.path >/dev/null'

say remove and purge
must "mkdir -p $versions/1.2.3/medplum-agent && dpkg -r medplum-agent && test ! -e /usr/lib/medplum-agent"
never 'systemctl is-active medplum-agent medplum-agent-upgrade.path'
must 'dpkg -P medplum-agent && ! find /etc/systemd /var/lib/systemd /usr/lib /lib/systemd /run/medplum-agent -name "medplum-agent*" 2>/dev/null | grep .'
say "all as it should be"
