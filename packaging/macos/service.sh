#!/bin/sh
# The service of a program that no package has installed:
#     service.sh install PROGRAM [< agent.toml] | uninstall | start | stop | status
# It is the same service as the package's, with the same user and folders.
set -eu
here=$(dirname "$0") home=/usr/local/lib/medplum-agent plist=/Library/LaunchDaemons/medplum-agent.plist
support="/Library/Application Support/MedplumAgent"

if [ "$1" != status ] && [ "$(id -u)" != 0 ]; then
    echo "medplum-agent: only root may do that: use sudo" >&2
    exit 1
fi
case $1 in
start) exec launchctl bootstrap system $plist ;;
stop) exec launchctl bootout system/medplum-agent ;;
status) exec launchctl print system/medplum-agent ;;
uninstall)
    sh "$here/uninstall.sh"
    echo "Settings, queue and logs stay: $support, /Library/Logs/MedplumAgent."
    exit 0
    ;;
esac

launchctl bootout system/medplum-agent 2>/dev/null || true
install -d -m 0755 "$support" $home /usr/local/bin
rm -rf $home/new
if [ -e "$(dirname "$2")/LICENSES.txt" ]; then # the folder of the package
    cp -R "$(dirname "$2")" $home/new
else
    mkdir $home/new
    install -m 0755 "$2" $home/new/medplum-agent
fi
install -m 0755 "$here/uninstall.sh" $home/new/uninstall.sh
find $home -mindepth 1 -maxdepth 1 ! -name new -exec rm -rf {} +
mv $home/new/* $home
rmdir $home/new
umask 077
cat >"$support/agent.toml.new"
if [ -s "$support/agent.toml.new" ]; then
    mv "$support/agent.toml.new" "$support/agent.toml"
fi
rm -f "$support/agent.toml.new"
install -m 0644 "$here/medplum-agent.plist" $plist
ln -sf $home/medplum-agent /usr/local/bin/medplum-agent
sh "$here/scripts/postinstall"
chown _medplumagent:_medplumagent "$support/agent.toml"
echo "The service runs, and starts with the machine: sudo medplum-agent doctor."
