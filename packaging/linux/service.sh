#!/bin/sh
# The service of a program that no package has installed, such as the one file:
#     service.sh install PROGRAM [< agent.toml] | uninstall | start | stop | status
# It is the same service as the packages', with the same user and folders; the program goes to /usr/local.
set -eu
here=$(dirname "$0") home=/usr/local/libexec/medplum-agent units=/etc/systemd/system # SELinux: libexec is bin_t
settings=/etc/medplum-agent/agent.toml

if [ ! -d /run/systemd/system ]; then
    echo "medplum-agent: systemd does not run here; in a container use the image" >&2
    exit 1
fi
case $1 in
install | uninstall)
    if [ "$(id -u)" != 0 ]; then
        echo "medplum-agent: only root may do that: use sudo" >&2
        exit 1
    fi
    for folder in /usr/lib /lib; do
        if [ -e $folder/systemd/system/medplum-agent.service ]; then
            echo "medplum-agent: a package has installed the service, and its manager removes it" >&2
            exit 1
        fi
    done
    ;;
*) exec systemctl --no-pager "$1" medplum-agent.service ;;
esac

if [ "$1" = uninstall ]; then
    systemctl disable --now medplum-agent.service medplum-agent-upgrade.path || true
    rm -rf $units/medplum-agent.service $units/medplum-agent-upgrade.* /usr/local/bin/medplum-agent $home
    systemctl daemon-reload
    echo "Settings, queue and logs stay: /etc/medplum-agent, /var/lib/medplum-agent, /var/log/medplum-agent."
    exit 0
fi

if ! getent passwd medplum-agent >/dev/null; then
    useradd --system --user-group --no-create-home --home-dir /var/lib/medplum-agent --shell /usr/sbin/nologin medplum-agent
fi
if getent group dialout >/dev/null; then # serial ports
    usermod --append --groups dialout medplum-agent
fi
install -d -m 0755 /etc/medplum-agent /usr/local/bin $home $home/versions
umask 077
cat >$settings.new
if [ -s $settings.new ]; then
    chown medplum-agent:medplum-agent $settings.new
    mv $settings.new $settings
fi
rm -f $settings.new
umask 022

folder=$(dirname "$(readlink -f "$2")")
if [ "$folder" != $home ]; then # else it is installed already, and gets other settings
    rm -rf $home/new
    if [ "$(readlink -f "$here")" = "$folder/packaging/linux" ]; then # the folder of the packages
        cp -R "$folder" $home/new
        rm -rf $home/new/versions
    else
        install -D -m 0755 "$2" $home/new/medplum-agent
    fi
    find $home -mindepth 1 -maxdepth 1 ! -name new ! -name versions -exec rm -rf {} +
    mv $home/new/* $home
fi
rm -rf $home/new $home/versions/current $home/versions/answer # what is installed runs, not what was chosen before
ln -sf $home/medplum-agent /usr/local/bin/medplum-agent
for unit in "$here"/medplum-agent.service "$here"/medplum-agent-upgrade.service "$here"/medplum-agent-upgrade.path; do
    sed "s#/usr/bin/medplum-agent#/usr/local/bin/medplum-agent#; s#/usr/lib\(exec\)\{0,1\}\**/medplum-agent#$home#g" \
        "$unit" >"$units/$(basename "$unit")"
done
systemctl daemon-reload
systemctl --quiet enable medplum-agent.service medplum-agent-upgrade.path
systemctl restart medplum-agent.service medplum-agent-upgrade.path
echo "The service runs, and starts with the machine: medplum-agent service status; sudo medplum-agent doctor."
