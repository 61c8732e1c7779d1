"""Make this system's packages: `packages.py PROGRAM_FOLDER DIST`, run by `build.py package`.

All of them carry the compiled folder, which is never unpacked at start.

    Linux     .deb (/usr/lib/medplum-agent) and .rpm (/usr/libexec/medplum-agent, which SELinux lets a service execute):
              a link in /usr/bin, systemd units; settings in /etc/medplum-agent, state in /var/lib/medplum-agent, logs
              in /var/log/medplum-agent
    macOS     .pkg: /usr/local/lib/medplum-agent, a launchd job
    Windows   installer .exe with makensis; SHAWL names the service wrapper, which the release fetches by its hash
    each      .tar.gz, from which an installed agent upgrades itself once upgrades.py has signed it
"""

import gzip
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from binary import commit_time, needed_glibc

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LINUX, MACOS, WINDOWS = HERE / "linux", HERE / "macos", HERE / "windows"
DEBIAN_MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}
MAINTAINER = "Medplum Agent maintainers <medplum-agent@users.noreply.github.com>"


class PackageError(Exception):
    """Text for the person who builds."""


# --- what they share ---


def run(*command: str | Path) -> str:
    environment = {**os.environ, "SOURCE_DATE_EPOCH": commit_time()}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise PackageError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def version() -> str:
    match = re.search(r'^__version__ = "(.+)"', (ROOT / "medplum_agent.py").read_text("utf-8"), re.MULTILINE)
    if not match:
        raise PackageError("medplum_agent.py has no __version__")
    return match[1]


def put(source: Path, target: Path, mode: int = 0o644) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def squeeze(text: bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(text, 9, mtime=0))
    target.chmod(0o644)


# --- Linux ---


def linux_tree(program: Path, tree: Path, place: str, zsh: str) -> None:
    """What the .deb and the .rpm have in common; `place`, below /usr: the program's; `zsh`: of its completions."""
    library, documents = tree / "usr" / place / "medplum-agent", tree / "usr/share/doc/medplum-agent"
    shutil.copytree(program, library, ignore=shutil.ignore_patterns("LICENSES.txt"))
    for path in library.rglob("*"):
        path.chmod(0o755 if path.is_dir() or path.name == "medplum-agent" else 0o644)
    (tree / "usr/bin").mkdir()
    (tree / "usr/bin/medplum-agent").symlink_to(f"../{place}/medplum-agent/medplum-agent")
    (library / "versions").mkdir()  # of which root unpacks others
    for unit in ("medplum-agent.service", "medplum-agent-upgrade.path", "medplum-agent-upgrade.service"):
        put(LINUX / unit, tree / "usr/lib/systemd/system" / unit)
    put(ROOT / "README.md", documents / "README.md")
    squeeze((program / "LICENSES.txt").read_bytes(), documents / "LICENSES.txt.gz")
    for path in (HERE / "monitoring").iterdir():
        put(path, documents / "monitoring" / path.name)
    import docs  # needs the agent's libraries, which nobody has who only releases

    made = tree.with_name("docs")
    docs.main(made)
    share = tree / "usr/share"
    put(made / "medplum-agent.bash", share / "bash-completion/completions/medplum-agent")
    put(made / "medplum-agent.fish", share / "fish/vendor_completions.d/medplum-agent.fish")
    put(made / "_medplum-agent", share / "zsh" / zsh / "_medplum-agent")
    squeeze((made / "medplum-agent.1").read_bytes(), share / "man/man1/medplum-agent.1.gz")


def settle(tree: Path) -> None:
    """Folders are readable by all, whatever the umask; all has the time of the sources, for equal packages."""
    seconds = int(commit_time())
    for path in (tree, *tree.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    for path in (tree, *tree.rglob("*")):
        os.utime(path, (seconds, seconds), follow_symlinks=False)


def debian(program: Path, dist: Path, work: Path) -> Path:
    tree, machine = work / "deb", DEBIAN_MACHINE[platform.machine()]
    linux_tree(program, tree, "lib", "vendor-completions")
    (tree / "lib").mkdir()  # where Debian has its units until every release has merged it into /usr
    (tree / "usr/lib/systemd").rename(tree / "lib/systemd")
    put(LINUX / "agent.toml", tree / "usr/share/medplum-agent/agent.toml")
    put(LINUX / "deb/copyright", tree / "usr/share/doc/medplum-agent/copyright")
    put(LINUX / "deb/lintian-overrides", tree / "usr/share/lintian/overrides/medplum-agent")
    squeeze(debian_changes().encode(), tree / "usr/share/doc/medplum-agent/changelog.gz")
    for script in ("postinst", "prerm", "postrm"):
        put(LINUX / "deb" / script, tree / "DEBIAN" / script, 0o755)
    facts = {
        "version": version(), "architecture": machine, "glibc": needed_glibc(program), "maintainer": MAINTAINER,
        "kilobytes": sum(path.lstat().st_size for path in tree.rglob("*") if not path.is_dir()) // 1024,
    }  # fmt: skip
    (tree / "DEBIAN/control").write_text((LINUX / "deb/control").read_text("utf-8").format(**facts), "utf-8")
    settle(tree)
    target = dist / f"medplum-agent_{version()}_{machine}.deb"
    run("dpkg-deb", "--root-owner-group", "-Zxz", "--build", tree, target)
    return target


def debian_changes() -> str:
    date = run("date", "--utc", "--rfc-email", f"--date=@{commit_time()}").strip()
    return f"medplum-agent ({version()}) unstable; urgency=medium\n\n  * See README.md.\n\n -- {MAINTAINER}  {date}\n"


def rpm(program: Path, dist: Path, work: Path) -> Path:
    tree = work / "tree"
    linux_tree(program, tree, "libexec", "site-functions")
    put(LINUX / "agent.toml", tree / "etc/medplum-agent/agent.toml", 0o600)
    for state in ("var/lib/medplum-agent", "var/log/medplum-agent"):
        (tree / state).mkdir(parents=True)
    settle(tree)
    defines = {
        "_topdir": work / "rpm", "_rpmdir": work / "made", "_rpmfilename": "%{NAME}-%{VERSION}-%{RELEASE}.%{ARCH}.rpm",
        "_dbpath": work / "rpmdb", "agent_version": version(), "agent_glibc": needed_glibc(program), "agent_tree": tree,
        "agent_maintainer": MAINTAINER, "agent_date": time.strftime("%a %b %d %Y", time.gmtime(int(commit_time()))),
        "_binary_payload": "w6.xzdio", "use_source_date_epoch_as_buildtime": 1, "_buildhost": "localhost",
        "clamp_mtime_to_source_date_epoch": 1,
    }  # fmt: skip
    options = [word for name, value in defines.items() for word in ("--define", f"{name} {value}")]
    run("rpmbuild", "-bb", "--target", platform.machine(), *options, LINUX / "medplum-agent.spec")
    made = next((work / "made").glob("*.rpm"))
    return Path(shutil.move(made, dist / made.name))


# --- macOS ---


def macos_tree(program: Path, tree: Path) -> None:
    library = tree / "usr/local/lib/medplum-agent"
    shutil.copytree(program, library, symlinks=True)
    put(LINUX / "agent.toml", library / "agent.toml")
    put(MACOS / "uninstall.sh", library / "uninstall.sh", 0o755)
    put(MACOS / "medplum-agent.plist", tree / "Library/LaunchDaemons/medplum-agent.plist")
    (tree / "usr/local/bin").mkdir()
    (tree / "usr/local/bin/medplum-agent").symlink_to("../lib/medplum-agent/medplum-agent")


def macos(program: Path, dist: Path, work: Path) -> Path:
    tree, scripts = work / "tree", work / "scripts"
    macos_tree(program, tree)
    for script in ("preinstall", "postinstall"):
        put(MACOS / "scripts" / script, scripts / script, 0o755)
    target = dist / f"medplum-agent-{version()}-macos-{platform.machine()}.pkg"
    what = ("--identifier", "medplum-agent", "--version", version(), "--ownership", "recommended")
    run("pkgbuild", "--root", tree, "--scripts", scripts, *what, target)
    return target


# --- Windows ---


def makensis() -> str:
    """On Windows its installer leaves PATH alone."""
    usual = Path(os.environ.get("PROGRAMFILES(X86)", ""), "NSIS/makensis.exe")
    found = shutil.which("makensis") or (str(usual) if usual.is_file() else None)
    if found is None:
        raise PackageError("no makensis here; install NSIS 3")
    return found


def windows(program: Path, dist: Path, work: Path) -> Path:
    shawl = Path(os.environ.get("SHAWL", ""))
    if not shawl.is_file():
        raise PackageError("the environment variable SHAWL must name the service wrapper shawl.exe")
    target = dist / f"medplum-agent-installer-{version()}.exe"
    facts = {"VERSION": version(), "FOLDER": program, "SHAWL": shawl, "README": ROOT / "README.md", "OUTPUT": target}
    run(makensis(), "-V2", "-WX", *(f"-D{name}={value}" for name, value in facts.items()), WINDOWS / "installer.nsi")
    return target


# --- upgrades ---


def archive_name(version: str) -> str:
    """Of this system's; an agent knows its own by what platform.machine() says."""
    system = {"linux": "linux", "darwin": "macos", "win32": "windows"}[sys.platform]
    return f"medplum-agent-{version}-{system}-{platform.machine().lower()}.tar.gz"


def archive(program: Path, dist: Path, _: Path) -> Path:
    return pack(program, dist / archive_name(version()))


def pack(program: Path, target: Path) -> Path:
    """The folder as medplum-agent/: the same bytes whatever the clock, the owner and the umask are. No links in it."""
    seconds = int(commit_time())
    with (
        target.open("wb") as file,
        gzip.GzipFile("", "wb", 9, file, mtime=0) as squeezed,
        tarfile.open(fileobj=squeezed, mode="w") as tar,
    ):
        for path in (program, *sorted(program.rglob("*"))):
            member = tarfile.TarInfo(Path("medplum-agent", path.relative_to(program)).as_posix())
            member.mtime = seconds
            runs = path.parent == program and path.stem == "medplum-agent"
            member.mode = 0o755 if runs or path.is_dir() else 0o644
            if path.is_symlink():
                raise PackageError(f"{path} is a link, which agents would refuse to unpack")
            if path.is_dir():
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            else:
                member.size = path.stat().st_size
                with path.open("rb") as content:
                    tar.addfile(member, content)
    return target


# --- all of them ---

Maker = Callable[[Path, Path, Path], Path]
MAKERS: dict[str, tuple[tuple[str, Maker], ...]] = {  # the tool that it needs, and what it makes
    "linux": (("", archive), ("dpkg-deb", debian), ("rpmbuild", rpm)),
    "darwin": (("", archive), ("pkgbuild", macos)),
    "win32": (("", archive), ("", windows)),
}


def main(program: Path, dist: Path) -> int:
    failed = False
    for tool, make in MAKERS[sys.platform]:
        if tool and shutil.which(tool) is None:
            print(f"packages.py: WARNING: no {tool} here, so that package is not made", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory(prefix="medplum-agent-package-") as work:
            try:
                target = make(program, dist, Path(work))
            except PackageError as error:
                print(f"packages.py: {error}", file=sys.stderr)
                failed = True
            else:
                print(f"{target.name}: {target.stat().st_size / 1e6:.1f} MB")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*(Path(argument).resolve() for argument in sys.argv[1:3])))
