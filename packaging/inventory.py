"""What is inside the binary, from Nuitka's report and the metadata of the installed distributions.

The bill of materials (CycloneDX 1.6, JSON, with all that the NTIA's minimum elements ask for), what known
vulnerabilities of the parts mean here (VEX, the same form), and the texts of the licences. `inventory.py BILL PROGRAM`
prints the bill with the hash of the program, which signing changes.
"""

import dataclasses
import datetime
import decimal
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import pyexpat
import re
import ssl
import subprocess
import sys
import sysconfig
import tomllib
import uuid
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

HERE = Path(__file__).resolve().parent
MAINTAINERS = "Medplum Agent maintainers"
LICENSE_FILE = re.compile(r"(licen[cs]e|copying|notice|copyright)", re.IGNORECASE)
INSTALLED = Path(sys.prefix, "installed.json")  # pip's report: which archives build.py installed, with their hashes
SPDX = {  # of distributions whose metadata has no SPDX id; read from the texts that they bring
    "apsw-sqlite3mc": "Zlib", "certifi": "MPL-2.0", "h11": "MIT", "hl7": "BSD-3-Clause", "icmplib": "LGPL-3.0-or-later",
    "pydicom": "MIT", "pynetdicom": "MIT", "pywin32": "PSF-2.0", "webencodings": "BSD-3-Clause",
    "nuitka": "LicenseRef-AGPL-3.0-only-with-Nuitka-runtime-library-exception",  # SPDX lists no such exception
}  # fmt: skip
UNKNOWN_LICENSE = "LicenseRef-not-stated"


@dataclasses.dataclass(frozen=True)
class Part:
    """A library inside: `purl` and `cpe` name it for scanners of vulnerabilities, `license` is an SPDX expression.

    `version` is "" where nothing tells it; `within` is the purl of the part that brings it along, `requires` are the
    purls, without versions, of those it uses; `sha256` is that of the file that `hashed` names.
    """

    name: str
    version: str
    purl: str
    license: str
    supplier: str
    texts: tuple[tuple[str, str], ...] = ()  # file name and text
    cpe: str = ""
    within: str = ""
    requires: tuple[str, ...] = ()
    sha256: str = ""
    hashed: str = ""


class Library(NamedTuple):
    """A shared library: where it came from, and where it is now."""

    source: Path
    target: Path


def read_report(path: Path) -> ElementTree.Element:
    return ElementTree.parse(path).getroot()


def parts(report: ElementTree.Element, folder: Path) -> list[Part]:
    """Python, Nuitka's run time, every distribution and every native library that went into `folder`; each once."""
    modules = {str(element.get("name")) for element in report.iter("module")} | set(sys.builtin_module_names)
    libraries = [
        Library(Path(str(element.get("source_path"))), folder / str(element.get("dest_path")))
        for element in report.iter("included_dll")
        if element.get("ignored") != "yes"
    ]
    found = [python_part(), distribution_part("nuitka")]
    found += [distribution_part(str(element.get("name"))) for element in report.iter("distribution")]
    found += [crate for part in found for crate in crates(part)]
    found += native_parts(modules, libraries, found)
    found += [shawl_part()] if sys.platform == "win32" else []
    return list({part.purl: part for part in found}.values())


def package_url(kind: str, name: str, version: str, **qualifiers: str) -> str:
    """As the Package URL specification writes it; without a version where none is known."""
    at = f"@{quote(version, safe=':')}" if version else ""
    words = "&".join(f"{key}={quote(value, safe='')}" for key, value in sorted(qualifiers.items()) if value)
    return f"pkg:{kind}/{quote(name)}{at}" + (f"?{words}" if words else "")


def sha256(path: Path) -> str:
    """ "" for a file that is not there."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def read(path: Path) -> str:
    return path.read_text("utf-8", "replace").strip()


# --- Python and its libraries ---


def python_part() -> Part:
    version = platform.python_version()
    places = (Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", Path(sys.base_prefix) / "LICENSE.txt")
    texts = tuple(("LICENSE.txt", read(place)) for place in places if place.is_file())[:1]
    program = Path(sys.executable).resolve()
    return Part(
        "CPython", version, package_url("generic", "cpython", version), "PSF-2.0", "Python Software Foundation", texts,
        cpe("python:python", version), sha256=sha256(program), hashed=f"{program.name}, which compiled the program",
    )  # fmt: skip


def distribution_part(name: str) -> Part:
    """Parts of Nuitka are in every program that it makes, under an exception to its licence."""
    distribution = importlib.metadata.distribution(name)
    meta: Any = distribution.metadata  # an email.message.Message, which its type does not tell
    files = [file for file in distribution.files or () if ".dist-info" in str(file) and LICENSE_FILE.search(file.name)]
    texts = tuple((file.name, read(Path(str(file.locate())))) for file in files)
    plain, version = normal(meta["Name"]), distribution.version
    terms = SPDX.get(plain) or meta.get("License-Expression") or UNKNOWN_LICENSE
    if "LGPL-3.0" in terms:  # its text adds to the GPL's
        texts += (("GPL-3.0", read(HERE / "licenses/GPL-3.0.txt")),)
    required = [line for line in meta.get_all("Requires-Dist") or () if "extra ==" not in line]
    archive, digest = archives().get((plain, version), ("", ""))
    return Part(
        meta["Name"], version, package_url("pypi", plain, version),
        terms, supplier(meta), texts, sha256=digest,
        requires=tuple(package_url("pypi", normal(re.split(r"[^\w.-]", line)[0]), "") for line in required),
        hashed=archive,
    )  # fmt: skip


def normal(name: str) -> str:
    """A distribution's name as PyPI's addresses and package URLs have it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def supplier(meta: Any) -> str:
    """Who the distribution says it is from, without addresses."""
    fields = ("Author", "Author-email", "Maintainer", "Maintainer-email")
    said = [str(meta.get(field)).split(" <")[0].strip('"') for field in fields if meta.get(field)]
    return next((who for who in said if not re.search("@|://", who)), f"{meta['Name']} project")


@functools.cache
def archives() -> dict[tuple[str, str], tuple[str, str]]:
    """Name and version -> file name and SHA-256 of the archive that was installed; empty where pip left no report."""
    if not INSTALLED.is_file():
        return {}
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for item in json.loads(read(INSTALLED))["install"]:
        meta, where = item["metadata"], item["download_info"]
        digest = where["archive_info"].get("hashes", {}).get("sha256", "")  # pip before 23.1 does not write it so
        found[normal(meta["name"]), meta["version"]] = (where["url"].rpartition("/")[2], digest)
    return found


def crates(part: Part) -> Iterator[Part]:
    """The Rust libraries in a distribution that brings its own bill of materials (PEP 770)."""
    pypi = part.purl.startswith("pkg:pypi/")
    files = importlib.metadata.distribution(part.name).files or () if pypi else ()
    for bill in (file for file in files if "sboms" in file.parts and file.suffix == ".json"):
        for crate in json.loads(read(Path(str(bill.locate()))))["components"]:
            name, version = crate["name"], crate["version"]
            terms: list[dict[str, str]] = crate.get("licenses") or [{}]
            digest = next((entry["content"] for entry in crate.get("hashes", ()) if entry["alg"] == "SHA-256"), "")
            who = crate.get("author", f"{name} project").split(" <")[0]
            yield Part(
                name, version, crate["purl"], terms[0].get("expression", UNKNOWN_LICENSE), who, within=part.purl,
                sha256=digest, hashed=f"{name}-{version}.crate",
            )  # fmt: skip


# --- native libraries ---


class Native(NamedTuple):
    """A library in C that a module brings along, as a shared library of its own or linked into the module."""

    name: str
    module: str
    files: str  # how its shared libraries are named, but for lib before and digits behind
    version: Callable[[Path], str]  # from the file that holds it
    product: str  # vendor and product in the NVD's CPEs; "" where none is known
    license: str
    supplier: str

    def is_in(self, library: Library) -> bool:
        return re.match(rf"(lib)?({self.files})[-.\d]*(dll|so|dylib)", library.source.name) is not None


def said_in(pattern: bytes) -> Callable[[Path], str]:
    """A version that stands in the file."""
    return lambda path: next((found.decode() for found in re.findall(pattern, path.read_bytes())), "")


def named_by_file(path: Path) -> str:
    """liblzma.so.5.4.1: xz is one of those that give the shared library the number of the release."""
    found = re.search(r"\.so\.(\d+\.\d+\.\d+)$", path.name)
    return found[1] if found else ""


def driver() -> Any:
    """The queue's; loaded late because whoever only adds a hash has none of the libraries."""
    return importlib.import_module("apsw")


NATIVE = (
    Native("OpenSSL", "_ssl", "ssl|crypto", lambda _: ssl.OPENSSL_VERSION.split()[1], "openssl:openssl", "Apache-2.0",
           "OpenSSL project"),
    Native("zlib", "zlib", "z|zlib", lambda _: zlib.ZLIB_RUNTIME_VERSION, "zlib:zlib", "Zlib", "zlib project"),
    Native("libffi", "_ctypes", "ffi", lambda _: "", "libffi_project:libffi", "MIT", "libffi project"),
    Native("bzip2", "_bz2", "bz2", said_in(rb"(1\.\d+\.\d+), \d+-[A-Z][a-z]+-\d{4}"), "bzip:bzip2", "bzip2-1.0.6",
           "bzip2 project"),
    Native("xz", "_lzma", "lzma", named_by_file, "tukaani:xz",
           "0BSD OR LicenseRef-public-domain", "XZ Utils project"),
    Native("expat", "pyexpat", "expat", lambda _: pyexpat.EXPAT_VERSION.removeprefix("expat_"),
           "libexpat_project:libexpat", "MIT", "Expat project"),
    Native("mpdecimal", "_decimal", "mpdec", lambda _: str(getattr(decimal, "__libmpdec_version__", "")), "",
           "BSD-2-Clause", "Stefan Krah"),
    Native("SQLite", "apsw", "", lambda _: driver().sqlite_lib_version(), "sqlite:sqlite", "blessing",
           "SQLite project"),
    Native("SQLite3MultipleCiphers", "apsw", "", lambda _: driver().mc_version.split()[-1], "", "MIT", "Ulrich Telle"),
    Native("SQLite", "_sqlite3", "sqlite3", lambda _: importlib.import_module("sqlite3").sqlite_version,
           "sqlite:sqlite", "blessing", "SQLite project"),  # the queue does without it; in where Python links it in
)  # fmt: skip


def native_parts(modules: set[str], libraries: list[Library], holders: Iterable[Part]) -> Iterator[Part]:
    """Those of NATIVE whose module is inside, then the distribution's packages that other shared libraries are from."""
    ours = {part.purl.partition("@")[0]: part.purl for part in holders}
    python, queue = ours["pkg:generic/cpython"], ours.get("pkg:pypi/apsw-sqlite3mc", "")
    known: set[Library] = set()
    for row in NATIVE:
        own = [library for library in libraries if row.files and row.is_in(library)]
        known.update(own)
        if row.module in modules:
            yield native_part(row, own, queue if row.module == "apsw" else python)
    for library in libraries:
        if library not in known and (packaged := debian_part(library)) is not None:
            yield packaged


def native_part(row: Native, own: list[Library], within: str) -> Part:
    """As the system's package where it is from one: the patches that its version stands for count."""
    if own and (packaged := debian_part(own[0])) is not None:
        return dataclasses.replace(packaged, name=row.name, license=row.license, within=within)
    holder = own[0].source.resolve() if own else module_file(row.module)
    version = row.version(holder)
    place = own[0].target if own else holder
    return Part(
        row.name, version, package_url("generic", row.name.lower(), version), row.license, row.supplier,
        terms_of(row.name), within=within, sha256=sha256(place), hashed=place.name,
        cpe=cpe(row.product, version) if row.product else "",
    )  # fmt: skip


def terms_of(name: str) -> tuple[tuple[str, str], ...]:
    """The licence of a library that brings none along; OpenSSL's is the Apache License, as ours."""
    path = HERE / "licenses" / f"{name}.txt"
    return ((path.name, read(path if name != "OpenSSL" else HERE.parent / "LICENSE")),)


def module_file(name: str) -> Path:
    """What holds a module that is written in C: its own file, or Python itself."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin if spec and spec.origin and spec.has_location else sys.executable).resolve()


def cpe(product: str, version: str) -> str:
    """Common Platform Enumeration, by which the NVD names what it lists."""
    return f"cpe:2.3:a:{product}:{version or '*'}:*:*:*:*:*:*:*"


def debian_part(library: Library) -> Part | None:
    """From Debian's and Ubuntu's records; None where the library is not from a package, or there are none."""
    try:
        owner = asked("dpkg-query", "-S", str(library.source.resolve())) or asked(
            "dpkg-query", "-S", f"*/{library.source.name}"
        )
        package = owner.split(": ")[0].splitlines()[0].split(",")[0]
        form = "${Package}\n${Version}\n${source:Package}\n${Architecture}"
        name, version, source, machine = asked("dpkg-query", "-W", f"-f={form}", package).splitlines()
    except (OSError, ValueError, IndexError):
        return None
    text = Path("/usr/share/doc", name, "copyright")
    system = platform.freedesktop_os_release()
    distro = f"{system['ID']}-{system.get('VERSION_ID', '')}".rstrip("-")
    where = package_url(f"deb/{system['ID']}", name, version, arch=machine, distro=distro, upstream=source)
    return Part(
        name, version, where, UNKNOWN_LICENSE, system["ID"].capitalize(),
        (("copyright", read(text)),) if text.is_file() else (), sha256=sha256(library.target),
        hashed=library.target.name,
    )  # fmt: skip


def asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def shawl_part() -> Part:
    """Runs the service on Windows; only in the installer."""
    script = read(HERE / "windows/fetch_shawl.sh")
    version, digest = (re.findall(rf"^{name}=(\S+)", script, re.MULTILINE)[0] for name in ("version", "sha256"))
    url = package_url("cargo", "shawl", version)
    return Part(
        "shawl",
        version,
        url,
        "MIT",
        "Matthew Kennerly",
        terms_of("shawl"),
        sha256=digest,
        hashed=f"shawl-v{version}-win64.zip",
    )


# --- the two documents ---


def cyclonedx(found: Iterable[Part], version: str, seconds: int) -> str:
    """The same parts and time (of the commit, in Unix seconds) give the same document, serial number included."""
    known = sorted(found, key=lambda part: part.purl)
    agent = {
        "type": "application", "bom-ref": "medplum-agent", "supplier": {"name": MAINTAINERS}, "name": "medplum-agent",
        "version": version, "licenses": [{"license": {"id": "Apache-2.0"}}],
        "purl": package_url("generic", "medplum-agent", version.partition("-")[0]),
    }  # fmt: skip
    components = [component(part) for part in known]
    stamp = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([agent, components, stamp]))
    tool = {"type": "application", "supplier": {"name": MAINTAINERS}, "name": "packaging/inventory.py"}
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json", "bomFormat": "CycloneDX", "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}", "version": 1,
        "metadata": {
            "timestamp": stamp, "lifecycles": [{"phase": "build"}],
            "tools": {"components": [{**tool, "version": version}]},
            "authors": [{"name": MAINTAINERS}], "component": agent, "supplier": {"name": MAINTAINERS},
        },
        "components": components, "dependencies": dependencies(known),
        # Nuitka's run time and wheels may hold code of others that they do not list.
        "compositions": [{"aggregate": "incomplete", "assemblies": ["medplum-agent"]}],
    }  # fmt: skip
    return json.dumps(document, indent=2) + "\n"


def component(part: Part) -> dict[str, object]:
    told = {"hash is of": part.hashed if part.sha256 else "", "version": "" if part.version else "not told by the file"}
    optional = {
        "version": part.version, "cpe": part.cpe, "hashes": [{"alg": "SHA-256", "content": part.sha256}],
        "properties": [{"name": f"medplum-agent:{name}", "value": value} for name, value in told.items() if value],
    }  # fmt: skip
    absent = {name for name, value in optional.items() if not value} | (set() if part.sha256 else {"hashes"})
    return {
        "type": "library", "bom-ref": part.purl, "supplier": {"name": part.supplier}, "name": part.name,
        "purl": part.purl, "licenses": [{"expression": part.license}],
        **{name: value for name, value in optional.items() if name not in absent},
    }  # fmt: skip


def dependencies(known: list[Part]) -> list[dict[str, object]]:
    """The agent uses what nothing else brings along; distributions use what they require and hold."""
    tree = [("medplum-agent", [part.purl for part in known if not part.within])]
    for part in known:
        uses = [p.purl for p in known if p.within == part.purl or p.purl.partition("@")[0] in part.requires]
        tree.append((part.purl, uses))
    return [{"ref": name, "dependsOn": uses} if uses else {"ref": name} for name, uses in tree]


def with_program(bill: str, program: Path) -> str:
    """The bill with the hash of the program as it is published."""
    document = json.loads(bill)
    document["metadata"]["component"]["hashes"] = [{"alg": "SHA-256", "content": sha256(program)}]
    return json.dumps(document, indent=2) + "\n"


def vex(bill: str, statements: Path) -> str:
    """What known vulnerabilities of the parts mean for the agent, from a file like vex.toml, about this bill."""
    about = json.loads(bill)
    link = f"urn:cdx:{about['serialNumber'].removeprefix('urn:uuid:')}/{about['version']}"
    refs = {part["name"]: f"{link}#{quote(part['bom-ref'], safe='')}" for part in about["components"]}
    found = [
        {
            "id": stated["id"], "source": {"url": stated["source"]},
            "analysis": {name: stated[name] for name in ("state", "justification", "detail") if name in stated},
            "affects": [{"ref": refs[stated["part"]]}],
        }
        for stated in tomllib.loads(read(statements)).get("vulnerability", ())
        if stated["part"] in refs
    ]  # fmt: skip
    members = {name: about[name] for name in ("$schema", "bomFormat", "specVersion", "metadata")}
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([link, found]))
    document = {**members, "serialNumber": f"urn:uuid:{serial}", "version": 1, "vulnerabilities": found}
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


if __name__ == "__main__":
    sys.stdout.write(with_program(read(Path(sys.argv[1])), Path(sys.argv[2])))
