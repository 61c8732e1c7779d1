"""One file in the places where hospitals put it; `build.py test --binary` runs this, the ordinary suite does not."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from demo import sandbox_resources

from tests.support import SandboxThread, eventually, message, site
from tests.test_upgrade import Feed, Installed

ONE_FILE = Path(os.environ.get("MEDPLUM_AGENT_ONE_FILE", "missing")).resolve()
FOLDER = Path(os.environ.get("MEDPLUM_AGENT_BINARY", "missing")).resolve().parent
MEGABYTES = 12  # the most that the one file may weigh
PATH = {"PATH": os.environ.get("PATH", "")}
SHOWN = f"mount --bind {ONE_FILE.parent} /mnt"  # mounts that follow may hide where it really is
SHOWN_PROGRAM = Path("/mnt", ONE_FILE.name)

pytestmark = [
    pytest.mark.skipif(not ONE_FILE.is_file(), reason="needs dist/, made by: python3 build.py binary"),
    pytest.mark.skipif(sys.platform != "linux", reason="the places are Linux's"),
]
as_root = pytest.mark.skipif(os.name != "nt" and os.geteuid() != 0, reason="only root may change roots and mounts")


def unpacked(folder: Path) -> list[Path]:
    return list(folder.glob("medplum-agent-??????"))


def demo(*before: str, program: Path = ONE_FILE, **how: object) -> str:
    done = subprocess.run([*before, str(program), "demo", "--once"], capture_output=True, text=True, timeout=60, **how)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MSA|AA|DEMO-3|OK" in done.stdout
    return str(done.stdout)


def with_mounts(*commands: str) -> list[str]:
    """The start of a command line that runs in mounts of its own, changed by these commands."""
    return ["unshare", "--mount", "sh", "-ec", "; ".join((*commands, 'exec "$@"')), "sh"]


def libc_root(folder: Path) -> Path:
    """A root with the C library, the program, /tmp and nothing else."""
    listed = subprocess.run(["ldd", str(FOLDER / "medplum-agent")], capture_output=True, text=True).stdout
    libraries = re.findall(r"(/\S+)", listed)
    names = {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libc.so.6", "libm.so.6", "libdl.so.2"}
    names |= {"libpthread.so.0", "librt.so.1", "libutil.so.1"}
    for library in filter(lambda path: path.name in names, map(Path, libraries)):
        target = folder / library.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library.resolve(), target)
    for beside in ("libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1"):  # parts of libc.so.6 since 2.34
        for library in Path("/lib").glob(f"*-linux-gnu/{beside}"):
            shutil.copy(library, folder / library.relative_to("/"))
    shutil.copy(ONE_FILE, folder / "medplum-agent")
    for name in ("tmp", "proc"):
        (folder / name).mkdir()
    return folder


def test_weight() -> None:
    assert ONE_FILE.stat().st_size < MEGABYTES * 1e6


def test_demo_in_an_empty_folder_leaves_nothing(tmp_path: Path) -> None:
    work, temporary = tmp_path / "work", tmp_path / "tmp"
    work.mkdir()
    temporary.mkdir()
    demo(cwd=work, env={"TMPDIR": str(temporary)})
    assert not list(work.iterdir())
    assert not list(temporary.iterdir())


@as_root
def test_demo_by_an_unprivileged_user() -> None:
    folder = Path(f"/tmp/agent-check-{os.getpid()}")  # pytest's own folders are closed to others
    folder.mkdir()
    try:
        program = shutil.copy(ONE_FILE, folder)
        os.chown(folder, 65534, 65534)
        demo(program=Path(program), cwd=folder, user=65534, group=65534, extra_groups=[], env={})
    finally:
        shutil.rmtree(folder)


@as_root
def test_demo_in_a_root_with_nothing_but_libc(tmp_path: Path) -> None:
    """And the kernel's own /proc, which tells the program where it is."""
    root = libc_root(tmp_path / "root")
    demo(*with_mounts(f"mount -t proc proc {root}/proc"), "chroot", str(root), program=Path("/medplum-agent"), env=PATH)
    assert not list((root / "tmp").iterdir())


@as_root
def test_demo_where_tmp_is_mounted_noexec() -> None:
    demo(*with_mounts(SHOWN, "mount -t tmpfs -o noexec tmpfs /tmp"), program=SHOWN_PROGRAM, env=PATH, cwd="/")


@as_root
def test_demo_where_tmp_is_full() -> None:
    demo(*with_mounts(SHOWN, "mount -t tmpfs -o size=8m tmpfs /tmp"), program=SHOWN_PROGRAM, env=PATH, cwd="/")


@as_root
@pytest.mark.parametrize("writable", ["/dev/shm", "/run"])
def test_demo_with_a_read_only_root(writable: str) -> None:
    read_only = (SHOWN, "mount --rbind / /", "mount -o remount,bind,ro /")
    places = [f"mount -t tmpfs -o {option(place == writable)} tmpfs {place}" for place in ("/run", "/dev/shm")]
    demo(*with_mounts(*read_only, *places), program=SHOWN_PROGRAM, env=PATH, cwd="/")


def option(executable: bool) -> str:
    return "exec" if executable else "noexec"


@as_root
def test_says_what_to_do_where_it_cannot_unpack() -> None:
    nowhere = [f"mount -t tmpfs -o noexec tmpfs {place}" for place in ("/var/tmp", "/dev/shm", "/run", "/tmp")]
    command = [*with_mounts(SHOWN, *nowhere, "mount -t tmpfs -o ro tmpfs /var/lib"), str(SHOWN_PROGRAM), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=PATH, cwd="/proc")
    assert done.returncode == 1, done
    assert "Set TMPDIR" in done.stderr


# --- the boot process and the program ---


@contextlib.contextmanager
def started(folder: Path, options: Sequence[str] = ()):
    """The one file as an agent; its process, and the folder that it unpacks to."""
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    with SandboxThread(sandbox_resources("agent-1", {})) as sandbox:
        command = [str(ONE_FILE), sandbox.url, "sandbox-client", "sandbox-secret", "agent-1"]
        process = subprocess.Popen(
            [*command, "--state-dir", str(folder / "state"), *options], env={"TMPDIR": str(temporary)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            sandbox.wait_for(lambda: sandbox.connected, 20, "the agent is connected")
            yield process, temporary
        finally:
            process.kill()
            process.communicate(timeout=10)


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stops_cleanly(tmp_path: Path, number: int) -> None:
    with started(tmp_path) as (process, temporary):
        process.send_signal(number)
        assert process.wait(15) == 0
        assert not list(temporary.iterdir())


def test_ctrl_c_in_a_terminal_reaches_boot_process_and_program(tmp_path: Path) -> None:
    with subprocess.Popen(
        [str(ONE_FILE), "demo"], cwd=tmp_path, env={"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and any("every frame" in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(5) == 0
    assert not list(tmp_path.iterdir())


def test_a_killed_boot_process_takes_the_program_along_and_the_next_start_tidies_up(tmp_path: Path) -> None:
    with started(tmp_path) as (process, temporary):
        (program,) = children(process)
        process.kill()
        process.wait(5)
        eventually(lambda: not Path(f"/proc/{program}").exists(), 5, "the program has ended")
        assert len(unpacked(temporary)) == 1
    with started(tmp_path) as (process, temporary):
        (left,) = unpacked(temporary)
        process.terminate()
        assert process.wait(15) == 0
        assert not left.exists()


def test_the_next_start_leaves_one_alone_that_lives(tmp_path: Path) -> None:
    with started(tmp_path) as (_, temporary):
        (living,) = unpacked(temporary)
        subprocess.run([str(ONE_FILE), "--version"], env={"TMPDIR": str(temporary)}, check=True, capture_output=True)
        assert unpacked(temporary) == [living]


def test_names_itself_as_it_was_called(tmp_path: Path) -> None:
    said = subprocess.run([str(ONE_FILE), "--help"], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"usage: {ONE_FILE.name} ")


# --- what lies beside it ---


def test_checksums_are_those_of_the_files() -> None:
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=ONE_FILE.parent, check=True)


def test_upgrades_from_the_release_before_and_back_under_load(tmp_path: Path) -> None:
    """MEDPLUM_AGENT_PREVIOUS is the folder of that release's program; without it this one stands for both."""
    before = Path(os.environ.get("MEDPLUM_AGENT_PREVIOUS") or FOLDER)
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here, start=False)
        shutil.rmtree(there.folder)
        shutil.copytree(before, there.folder)
        shutil.copytree(FOLDER, there.folder / "versions/9.9.9/medplum-agent")
        here.agent.COMMAND = [str(there.folder / "medplum-agent")]
        here.agent.start()
        pid = there.pid
        with Feed(here) as feed:
            for wanted in ("9.9.9", "--rollback", "9.9.9"):
                done = there.command("upgrade", wanted)
                assert done.returncode == 0, done.stdout + done.stderr + here.agent.output()[-3000:]
                assert not feed.problems
            for number, device in enumerate(feed.idle):
                assert device.ask(message(f"IDLE{number}"))[0] == "CA"
        assert there.pid == pid
        here.sandbox.wait_for(lambda: set(feed.accepted) <= set(here.sandbox.ids()), 30)
