#!/usr/bin/env bash
# Copy what the release publishes from dist/ to assets/: name_assets.sh TAG SYSTEM-MACHINE PROGRAM ENDING
set -euo pipefail
version=${1#v} system=$2 program=$3 ending=$4
mkdir -p assets
cp "$program" "assets/medplum-agent-$version-$ending"
python3 packaging/inventory.py dist/medplum-agent.cdx.json "$program" >"assets/medplum-agent-$version-$system.cdx.json"
cp dist/medplum-agent.vex.cdx.json "assets/medplum-agent-$version-$system.vex.cdx.json"
cp dist/LICENSES.txt "assets/medplum-agent-$version-$system-LICENSES.txt"
# Installers, packages and archives have their version and machine in their names already.
find dist -maxdepth 1 \( -name '*.deb' -o -name '*.rpm' -o -name '*.pkg' -o -name 'medplum-agent-installer-*.exe' \
    -o -name "medplum-agent-$version-*.tar.gz" \) -exec cp {} assets/ \;
if [ -e dist/image.tar.gz ]; then cp dist/image.tar.gz "assets/medplum-agent-$version-$system-image.tar.gz"; fi
