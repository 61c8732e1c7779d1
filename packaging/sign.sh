#!/usr/bin/env bash
# Sign with the keys that the environment names: sign.sh linux|macos|windows FILE..., upgrades PREVIOUS, renew REPOSITORY
# Where one is missing it fails, or only says so when ALLOW_UNSIGNED is "true".
#
#   linux     GPG_PRIVATE_KEY (armoured): a detached signature beside each file
#   macos     MACOS_CERTIFICATE (.p12 in base64), MACOS_CERTIFICATE_PASSWORD, MACOS_IDENTITY for programs,
#             MACOS_INSTALLER_IDENTITY for packages; with APPLE_ID, APPLE_PASSWORD, APPLE_TEAM these are notarised
#   windows   WINDOWS_CERTIFICATE (.pfx in base64), WINDOWS_CERTIFICATE_PASSWORD
#   upgrades  UPGRADE_TARGETS_KEY, UPGRADE_SNAPSHOT_KEY, UPGRADE_TIMESTAMP_KEY (.pem), MEDPLUM_AGENT_PASSPHRASE where
#             they have one: build.py release of dist/, as the next after the repository in PREVIOUS, if that is there
#   renew     UPGRADE_TIMESTAMP_KEY, MEDPLUM_AGENT_PASSPHRASE: build.py renew
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
system=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

unsigned() {
    if [ "${ALLOW_UNSIGNED:-}" != true ]; then
        echo "::error title=Not signed ($system)::$1 is not configured; only a workflow started with 'unsigned' publishes without"
        exit 1
    fi
    echo "::notice title=Not signed ($system)::$1 is not configured, so $2"
    exit 0
}

linux() {
    [ -n "${GPG_PRIVATE_KEY:-}" ] || unsigned GPG_PRIVATE_KEY "these are not signed: $*"
    export GNUPGHOME=$work
    gpg --batch --quiet --import <<<"$GPG_PRIVATE_KEY"
    for file in "$@"; do
        gpg --batch --yes --quiet --armor --detach-sign "$file"
    done
}

macos() {
    [ -n "${MACOS_CERTIFICATE:-}" ] || unsigned MACOS_CERTIFICATE "these are not signed: $*"
    local keychain=$work/signing.keychain-db
    base64 --decode <<<"$MACOS_CERTIFICATE" >"$work/certificate.p12"
    security create-keychain -p "" "$keychain"
    security unlock-keychain -p "" "$keychain"
    security import "$work/certificate.p12" -k "$keychain" -P "$MACOS_CERTIFICATE_PASSWORD" -T /usr/bin/codesign -T /usr/bin/productsign
    security set-key-partition-list -S apple-tool:,apple: -k "" "$keychain"
    security list-keychains -d user -s "$keychain" login.keychain-db
    for file in "$@"; do
        case $file in
            *.pkg)
                productsign --keychain "$keychain" --sign "$MACOS_INSTALLER_IDENTITY" "$file" "$work/signed.pkg"
                mv "$work/signed.pkg" "$file"
                notarise "$file"
                ;;
            *)
                codesign --force --timestamp --options runtime --entitlements "$here/macos/entitlements.plist" \
                    --keychain "$keychain" --sign "$MACOS_IDENTITY" "$file"
                ;;
        esac
    done
}

notarise() {
    [ -n "${APPLE_ID:-}" ] || unsigned APPLE_ID "this is not notarised: $1"
    xcrun notarytool submit "$1" --wait --apple-id "$APPLE_ID" --password "$APPLE_PASSWORD" --team-id "$APPLE_TEAM"
    xcrun stapler staple "$1"
}

windows() {
    [ -n "${WINDOWS_CERTIFICATE:-}" ] || unsigned WINDOWS_CERTIFICATE "these are not signed: $*"
    base64 --decode <<<"$WINDOWS_CERTIFICATE" >"$work/certificate.pfx"
    local signtool file
    if [ "${RUNNER_OS:-}" = Linux ]; then # where the .msi is made; Debian's osslsigncode
        printf %s "$WINDOWS_CERTIFICATE_PASSWORD" >"$work/password"
        for file in "$@"; do
            osslsigncode sign -pkcs12 "$work/certificate.pfx" -readpass "$work/password" -h sha256 \
                -ts http://timestamp.digicert.com -in "$file" -out "$work/signed"
            mv "$work/signed" "$file"
        done
        return
    fi
    signtool=$(find "/c/Program Files (x86)/Windows Kits/10/bin" -path '*/x64/signtool.exe' | sort | tail -n 1)
    MSYS2_ARG_CONV_EXCL='*' "$signtool" sign /fd SHA256 /tr http://timestamp.digicert.com /td SHA256 \
        /f "$(cygpath -w "$work/certificate.pfx")" /p "$WINDOWS_CERTIFICATE_PASSWORD" "$@"
}

upgrade_keys() {
    local role name without=$1
    shift
    [ -e "$here/upgrade-root.json" ] || unsigned packaging/upgrade-root.json "$without"
    for role in "$@"; do
        name=UPGRADE_${role^^}_KEY
        [ -n "${!name:-}" ] || unsigned "$name" "$without"
        printf '%s\n' "${!name}" >"$work/$role.pem"
    done
}

upgrades() {
    upgrade_keys "agents cannot upgrade themselves to this release" targets snapshot timestamp
    if [ -d "$1" ]; then set -- "$1"; else set --; fi
    python3 "$here/../build.py" release "$work" "$@"
}

renew() {
    upgrade_keys "the timestamp is not renewed" timestamp
    python3 "$here/../build.py" renew "$1" "$work"
}

"$system" "$@"
