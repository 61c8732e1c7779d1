"""Make the Debian and the RPM package: `package.py PROGRAM_FOLDER DIST`, run by `build.py package`.

Both hold the same tree: the program in /usr/lib/medplum-agent (never unpacked at start), a link in /usr/bin, a systemd
unit. Settings are in /etc/medplum-agent, state in /var/lib/medplum-agent, logs in /var/log/medplum-agent.
"""

import gzip
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEBIAN_MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}


class PackageError(Exception):
    """Text for the person who builds."""


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "SOURCE_DATE_EPOCH": epoch()})
    if done.returncode:
        raise PackageError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def epoch() -> str:
    """The time of the commit: the same sources give the same package."""
    command = ["git", "log", "-1", "--format=%ct"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "0"


def version() -> str:
    match = re.search(r'^__version__ = "(.+)"', (ROOT / "medplum_agent.py").read_text("utf-8"), re.MULTILINE)
    if not match:
        raise PackageError("medplum_agent.py has no __version__")
    return match[1]


def needed_glibc(folder: Path) -> str:
    """The newest glibc that a file in the folder asks for."""
    binaries = (path.read_bytes() for path in folder.rglob("*") if path.is_file())
    asked = {int(number) for raw in binaries if raw[:4] == b"\x7fELF" for number in re.findall(rb"GLIBC_2\.(\d+)", raw)}
    return f"2.{max(asked, default=17)}"


def put(source: Path, target: Path, mode: int = 0o644) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def squeeze(text: bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(text, 9, mtime=0))


def common_tree(program: Path, tree: Path) -> None:
    """What both packages hold."""
    library, documents = tree / "usr/lib/medplum-agent", tree / "usr/share/doc/medplum-agent"
    shutil.copytree(program, library, ignore=shutil.ignore_patterns("LICENSES.txt"))
    for path in library.rglob("*"):
        path.chmod(0o755 if path.is_dir() or path.name == "medplum-agent" else 0o644)
    (tree / "usr/bin").mkdir()
    (tree / "usr/bin/medplum-agent").symlink_to("../lib/medplum-agent/medplum-agent")
    put(HERE / "medplum-agent.service", tree / "usr/lib/systemd/system/medplum-agent.service")
    put(ROOT / "README.md", documents / "README.md")
    squeeze((program / "LICENSES.txt").read_bytes(), documents / "LICENSES.txt.gz")


def open_up(tree: Path) -> None:
    """Folders are readable by all, whatever the umask."""
    for path in (tree, *tree.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


def debian(program: Path, dist: Path, work: Path) -> Path:
    tree, machine = work / "deb", DEBIAN_MACHINE[platform.machine()]
    common_tree(program, tree)
    (tree / "usr/lib/systemd").rename(tree / "systemd")  # Debian's units are in /lib until releases merge it into /usr
    (tree / "lib").mkdir()
    (tree / "systemd").rename(tree / "lib/systemd")
    put(HERE / "agent.toml", tree / "usr/share/medplum-agent/agent.toml")
    put(HERE / "deb/copyright", tree / "usr/share/doc/medplum-agent/copyright")
    put(HERE / "deb/lintian-overrides", tree / "usr/share/lintian/overrides/medplum-agent")
    date = run("date", "--utc", "--rfc-email", f"--date=@{epoch()}").strip()
    sign = "Medplum Agent maintainers <medplum-agent@users.noreply.github.com>"
    changes = (
        f"medplum-agent ({version()}) unstable; urgency=medium\n\n  * See the releases page.\n\n -- {sign}  {date}\n"
    )
    squeeze(changes.encode(), tree / "usr/share/doc/medplum-agent/changelog.gz")
    for script in ("postinst", "prerm", "postrm"):
        put(HERE / "deb" / script, tree / "DEBIAN" / script, 0o755)
    kilobytes = sum(path.lstat().st_size for path in tree.rglob("*") if not path.is_dir()) // 1024
    facts = {"version": version(), "architecture": machine, "kilobytes": kilobytes, "glibc": needed_glibc(program)}
    (tree / "DEBIAN/control").write_text((HERE / "deb/control").read_text("utf-8").format(**facts), "utf-8")
    open_up(tree)
    target = dist / f"medplum-agent_{version()}_{machine}.deb"
    run("dpkg-deb", "--root-owner-group", "-Zxz", "--build", tree, target)
    return target


def rpm(program: Path, dist: Path, work: Path) -> Path:
    tree = work / "tree"
    common_tree(program, tree)
    put(HERE / "agent.toml", tree / "etc/medplum-agent/agent.toml", 0o600)
    for state in ("var/lib/medplum-agent", "var/log/medplum-agent"):
        (tree / state).mkdir(parents=True)
    open_up(tree)
    defines = {
        "_topdir": work / "rpm", "_rpmdir": work / "made", "_rpmfilename": "%{NAME}-%{VERSION}-%{RELEASE}.%{ARCH}.rpm",
        "_dbpath": work / "rpmdb", "agent_version": version(), "agent_glibc": needed_glibc(program), "agent_tree": tree,
        "_binary_payload": "w6.xzdio", "use_source_date_epoch_as_buildtime": 1, "_buildhost": "localhost",
        "clamp_mtime_to_source_date_epoch": 1,
    }  # fmt: skip
    options = [word for name, value in defines.items() for word in ("--define", f"{name} {value}")]
    run("rpmbuild", "-bb", "--target", platform.machine(), *options, HERE / "medplum-agent.spec")
    made = next((work / "made").glob("*.rpm"))
    return Path(shutil.move(made, dist / made.name))


def main(program: Path, dist: Path) -> int:
    makers = {"dpkg-deb": debian, "rpmbuild": rpm}
    failed = False
    for tool, make in makers.items():
        if shutil.which(tool) is None:
            print(f"package.py: WARNING: no {tool} here, so that package is not made", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory(prefix="medplum-agent-package-") as work:
            try:
                target = make(program, dist, Path(work))
            except PackageError as error:
                print(f"package.py: {error}", file=sys.stderr)
                failed = True
            else:
                print(f"{target.name}: {target.stat().st_size / 1e6:.1f} MB")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*(Path(argument).resolve() for argument in sys.argv[1:3])))
