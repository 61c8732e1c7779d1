#!/usr/bin/env bash
# The installer as an .msi, on Linux with Debian's wixl and msitools: make_msi.sh VERSION INSTALLER.exe OUTPUT.msi
set -euo pipefail
version=$1 installer=$2 output=$(realpath -m "$3")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$(dirname "$0")/medplum-agent.wxs" "$work"
cp "$installer" "$work/setup.exe" # wixl takes names from beside its source
wixl --arch x64 --define "Version=$version" --define Installer=setup.exe --output "$output" "$work/medplum-agent.wxs"
# wixl has an order of its own: the old version goes first, uninstalling needs its files, installing the new ones
for place in RemoveExistingProducts=1501 Uninstall=1801 UninstallPurge=1802 Install=4001 InstallConfig=4002; do
    msibuild "$output" -q "UPDATE \`InstallExecuteSequence\` SET \`Sequence\`=${place#*=} WHERE \`Action\`='${place%=*}'"
done
