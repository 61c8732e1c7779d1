"""What is inside the binary, from Nuitka's report and the metadata of the installed distributions.

The bill of materials (CycloneDX 1.6, JSON) and the texts of the licences.
"""

import dataclasses
import importlib.metadata
import json
import platform
import re
import sqlite3
import ssl
import subprocess
import sys
import sysconfig
import uuid
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LICENSE_FILE = re.compile(r"(licen[cs]e|copying|notice|copyright)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Part:
    """A library inside: `purl` names it for scanners of vulnerabilities, `license` is what it says of itself."""

    name: str
    version: str
    purl: str
    license: str
    texts: tuple[tuple[str, str], ...] = ()  # file name and text


def read_report(path: Path) -> ElementTree.Element:
    return ElementTree.parse(path).getroot()


def parts(report: ElementTree.Element) -> list[Part]:
    """Python, Nuitka's run time, every distribution and every shared library of the system that went in."""
    found = [python_part(), nuitka_part()]
    found += [distribution_part(str(element.get("name"))) for element in report.iter("distribution")]
    libraries = [Path(str(element.get("source_path"))) for element in report.iter("included_dll")]
    return found + list(system_parts(libraries))


# --- Python and its libraries ---


def python_part() -> Part:
    version = platform.python_version()
    places = (Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", Path(sys.base_prefix) / "LICENSE.txt")
    texts = tuple(("LICENSE.txt", read(place)) for place in places if place.is_file())[:1]
    return Part("CPython", version, f"pkg:generic/cpython@{version}", "PSF-2.0", texts)


def nuitka_part() -> Part:
    """Parts of Nuitka are in every program that it makes, under an exception to its licence."""
    part = distribution_part("nuitka")
    return dataclasses.replace(part, license="AGPL-3.0-only WITH Nuitka Runtime Library Exception")


def distribution_part(name: str) -> Part:
    distribution = importlib.metadata.distribution(name)
    meta: Any = distribution.metadata  # an email.message.Message, which its type does not tell
    classifiers = [c.rpartition(" :: ")[2] for c in meta.get_all("Classifier") or () if c.startswith("License")]
    declared = meta.get("License") or ""
    said = meta.get("License-Expression") or (declared if 0 < len(declared) < 60 else ", ".join(classifiers))
    files = [file for file in distribution.files or () if ".dist-info" in str(file) and LICENSE_FILE.search(file.name)]
    texts = tuple((file.name, read(Path(str(file.locate())))) for file in files)
    version = distribution.version
    return Part(meta["Name"], version, f"pkg:pypi/{meta['Name'].lower()}@{version}", said or "unknown", texts)


# --- the system's shared libraries ---


def system_parts(libraries: Iterable[Path]) -> Iterator[Part]:
    """From Debian's and Ubuntu's records where there are any, else what Python itself says of them."""
    owners: dict[str, Part] = {}
    for library in libraries:
        if (part := debian_part(library)) is not None:
            owners[part.name] = part
    yield from owners.values() or known_parts()


def debian_part(library: Path) -> Part | None:
    try:
        owner = asked("dpkg-query", "-S", str(library.resolve())) or asked("dpkg-query", "-S", f"*/{library.name}")
        package = owner.split(": ")[0].splitlines()[0].split(",")[0]
        name, version, source = asked(
            "dpkg-query", "-W", "-f=${Package}\n${Version}\n${source:Package}", package
        ).splitlines()
    except (OSError, ValueError, IndexError):
        return None
    text = Path("/usr/share/doc", name, "copyright")
    texts = (("copyright", read(text)),) if text.is_file() else ()
    system = platform.freedesktop_os_release()["ID"]
    return Part(name, version, f"pkg:deb/{system}/{source}@{version}", "see the text", texts)


def asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def known_parts() -> list[Part]:
    openssl = ssl.OPENSSL_VERSION.split()[1]
    return [
        Part("OpenSSL", openssl, f"pkg:generic/openssl@{openssl}", "Apache-2.0"),
        Part("SQLite", sqlite3.sqlite_version, f"pkg:generic/sqlite@{sqlite3.sqlite_version}", "blessing"),
        Part("zlib", zlib.ZLIB_RUNTIME_VERSION, f"pkg:generic/zlib@{zlib.ZLIB_RUNTIME_VERSION}", "Zlib"),
    ]


def read(path: Path) -> str:
    return path.read_text("utf-8", "replace").strip()


# --- the two documents ---


def cyclonedx(found: Iterable[Part], version: str) -> str:
    """The same parts give the same document, serial number included."""
    components = [
        {
            "type": "library", "bom-ref": part.purl, "name": part.name, "version": part.version, "purl": part.purl,
            "licenses": [{"license": {"name": part.license}}],
        }
        for part in sorted(found, key=lambda part: part.purl)
    ]  # fmt: skip
    agent = {
        "type": "application", "bom-ref": "medplum-agent", "name": "medplum-agent", "version": version,
        "licenses": [{"license": {"id": "Apache-2.0"}}],
    }  # fmt: skip
    depends = [{"ref": "medplum-agent", "dependsOn": [str(component["purl"]) for component in components]}]
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([agent, components]))
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json", "bomFormat": "CycloneDX", "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}", "version": 1, "metadata": {"component": agent},
        "components": components, "dependencies": depends,
    }  # fmt: skip
    return json.dumps(document, indent=2) + "\n"


def license_texts(found: Iterable[Part], own: Path) -> str:
    """Every text once, under the names of those it stands for."""
    holders: dict[str, list[str]] = {read(own): ["Medplum Agent (Apache-2.0)"]}
    silent = []
    for part in found:
        title = f"{part.name} {part.version} ({part.license})"
        for name, text in part.texts:
            holders.setdefault(text, []).append(f"{title}: {name}")
        silent += [] if part.texts else [title]
    rule = "=" * 100
    chapters = [f"{rule}\n" + "\n".join(titles) + f"\n{rule}\n\n{text}\n" for text, titles in holders.items()]
    chapters += [f"{rule}\nWithout a text of their own:\n" + "\n".join(silent) + "\n"] if silent else []
    return "\n".join(chapters)
