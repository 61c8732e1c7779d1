#!/bin/sh
# Install, upgrade, remove and purge the package in a Debian root: try_deb.sh ROOT PACKAGE.deb (root only).
# ROOT is made by: debootstrap --variant=minbase --include=adduser trixie ROOT
set -eu
root=$1 package=$2

say() { echo "== $*"; }
inside() { chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive LC_ALL=C "$@"; }
must() { inside sh -ec "$1" || { echo "FAILED: $1" >&2; exit 1; }; }

mount -t proc proc "$root/proc"
trap 'umount "$root/proc"' EXIT
cp "$package" "$root/tmp/agent.deb"

say install without a network
mkdir -p "$root/tmp/no-mirror" # no list of packages and no network, as in a closed hospital network
unshare --net chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive LC_ALL=C \
    apt-get -qq -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts=/tmp/no-mirror install --yes /tmp/agent.deb
must 'test "$(stat -c %a:%U:%G /etc/medplum-agent/agent.toml)" = 600:medplum-agent:medplum-agent'
must 'test "$(stat -c %a:%U /var/lib/medplum-agent)" = 700:medplum-agent'
must 'test "$(stat -c %a:%U /var/log/medplum-agent)" = 700:medplum-agent'
must 'test -L /etc/systemd/system/multi-user.target.wants/medplum-agent.service'
must 'medplum-agent --version'
must 'cd / && setpriv --reuid=medplum-agent --regid=medplum-agent --clear-groups --inh-caps=-all medplum-agent demo --once | tail -1'

say an upgrade keeps settings, queue and logs
must 'echo "agentId = \"site-7\"" > /etc/medplum-agent/agent.toml; echo queue > /var/lib/medplum-agent/queue'
mkdir -p "$root/tmp/next" && dpkg-deb -R "$package" "$root/tmp/next" && sed -i 's/^Version: .*/&+next/' "$root/tmp/next/DEBIAN/control"
dpkg-deb --root-owner-group -Znone --build "$root/tmp/next" "$root/tmp/next.deb" >/dev/null
inside dpkg -i /tmp/next.deb
must 'grep -q site-7 /etc/medplum-agent/agent.toml && test -e /var/lib/medplum-agent/queue'
must 'test "$(stat -c %a:%U:%G /etc/medplum-agent/agent.toml)" = 600:medplum-agent:medplum-agent'

say removing keeps them
inside dpkg -r medplum-agent
must 'test -e /etc/medplum-agent/agent.toml && test -e /var/lib/medplum-agent/queue && test ! -e /usr/lib/medplum-agent'

say purging does not
inside dpkg -P medplum-agent
must 'test ! -e /etc/medplum-agent && test ! -e /var/lib/medplum-agent && test ! -e /var/log/medplum-agent'
must '! find /etc/systemd /usr/lib/medplum-agent /usr/share/medplum-agent /usr/share/doc/medplum-agent 2>/dev/null | grep medplum'
must '! getent passwd medplum-agent && ! dpkg -s medplum-agent >/dev/null 2>&1'
rm -rf "$root/tmp/no-mirror" "$root/tmp/next" "$root/tmp/next.deb" "$root/tmp/agent.deb"
say "all as it should be"
