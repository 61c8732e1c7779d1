"""Gather what the release publishes: `release.py FOLDER URL`, run by the release workflow after all systems have built.

FOLDER holds the assets; URL is the address below which they will be found. Writes there

    release-manifest.json   what an installed agent reads to upgrade: tag_name, and of each asset name,
                            browser_download_url, sha256 and size. The installer for Windows comes first and the one
                            file for Linux (x86-64) alone ends in "linux": the reference agent takes the first asset
                            whose name ends in ".exe" or "linux".
    SHA256SUMS              as sha256sum checks them
"""

import hashlib
import json
import sys
from pathlib import Path

from packages import version

OURS = ("release-manifest.json", "SHA256SUMS")


def assets(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_file() and path.name not in OURS]
    return sorted(found, key=lambda path: ("installer" not in path.name, path.name))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(found: list[Path], url: str) -> dict[str, object]:
    listed = [
        {
            "name": path.name, "browser_download_url": f"{url.rstrip('/')}/{path.name}", "sha256": sha256(path),
            "size": path.stat().st_size,
        }
        for path in found
    ]  # fmt: skip
    return {"tag_name": f"v{version()}", "assets": listed}


def main(folder: Path, url: str) -> int:
    found = assets(folder)
    text = json.dumps(manifest(found, url), indent=2) + "\n"
    (folder / "release-manifest.json").write_text(text, "utf-8", newline="\n")
    sums = "".join(f"{sha256(path)}  {path.name}\n" for path in [*found, folder / "release-manifest.json"])
    (folder / "SHA256SUMS").write_text(sums, "utf-8", newline="\n")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
