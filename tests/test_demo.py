"""The demo: it shows each hop, ends by itself or on Ctrl-C at any moment, and says what it lacks."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo import Demo, Transmit

import medplum_agent
from tests.support import ROOT, AgentProcess

END_SECS = 2  # from Ctrl-C to the end of the process
# What the demo has just said when it is interrupted: from the agent's start to the push, where a device waits.
MOMENTS = (
    "started, connected", "device   sends MSH", "Bot      ADT", "MSA|CA", "CHEM channel", "analyzer sends a query",
    "analyzer every frame", "got a query", "takes the order", "PACS channel", "stores an image", "it is on disk",
    "asks for its worklist", "WORKLIST query", "scanner  hears EXAMPLE", "caller   pushes",
)  # fmt: skip
ALONE = (
    ["unshare", "--net"] if hasattr(os, "geteuid") and os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
)


def start(folder: Path, *options: str, before: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str]:
    command = [*before, *AgentProcess.COMMAND, "demo", *options]
    env = os.environ | {"PYTHONIOENCODING": "utf-8", "TMPDIR": str(folder), "PYTHONFAULTHANDLER": "1"} | env
    out = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, encoding="utf-8", stdout=out, stderr=subprocess.STDOUT)


@contextlib.contextmanager
def staying(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The demo; the test ends it, or it is killed."""
    with start(folder, *options) as process:
        try:
            yield process
        finally:
            process.kill()


def until(process: subprocess.Popen[str], text: str) -> str:
    """What it prints until a line with this text."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if text in line:
            return printed
    raise AssertionError(f"never said {text!r}: {printed}")


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    with process:
        try:
            printed, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code, printed
    return printed


def test_shows_each_hop_and_ends(tmp_path):
    printed = finished(start(tmp_path, "--once"))
    parts = re.split(r"(?m)^(?:ADT|LAB) channel", printed)
    assert len(parts) == 3, printed
    for part, codes in zip(parts[1:], (["AA"], ["CA", "AA"]), strict=True):
        hops = ["device   sends MSH", "server   got the message", "Bot ", *(f"MSA|{code}" for code in codes)]
        assert all(hop in part for hop in hops), part
        assert part.index(hops[0]) < part.index(hops[1]) < part.index(hops[2]) < part.rindex("device   hears")
    assert not list(tmp_path.iterdir()), "the demo leaves nothing behind"


# --- Ctrl-C ---


def interrupted(process: subprocess.Popen[str], number: int = signal.SIGINT) -> None:
    """It ends at once, without a word of complaint; else where each of its threads stands is what the test says."""
    process.send_signal(number)
    assert process.stdout is not None
    try:
        code = process.wait(END_SECS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        raise AssertionError(f"no end within {END_SECS} s: {process.stdout.read()}") from None
    rest = process.stdout.read()
    assert code in (0, 130), rest
    assert not re.search("Traceback|Exception|[Ee]rror", rest), rest


def test_stays_until_interrupted(tmp_path):
    with staying(tmp_path) as demo:
        printed = until(demo, "Ctrl-C")
        interrupted(demo)
    assert "mllp_send" in printed and "hl7 send" in printed and "$stats" in printed


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_ends_it_at_any_moment(tmp_path, moment):
    with staying(tmp_path) as demo:
        until(demo, moment)
        interrupted(demo)
    assert not list(tmp_path.iterdir()), "the demo leaves nothing behind"


@pytest.mark.parametrize("moment", ["every frame", "stores an image"])
def test_sigterm_ends_it_as_well(tmp_path, moment):
    with staying(tmp_path, "--once") as demo:
        until(demo, moment)
        interrupted(demo, signal.SIGTERM)
    assert not list(tmp_path.iterdir()), "the demo leaves nothing behind"


# --- what it lacks ---


def test_says_so_when_the_analyzers_line_is_cut(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "")  # demo and agent change these two for their whole process
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    demo = Demo(tmp_path, stay=False)
    agents: list[medplum_agent.Agent] = []

    def cut(transmit: Transmit) -> None:
        for connection in agents[0].channels["CHEM"].lines.values():
            connection.abort()

    demo.sandbox.on_transmit = cut
    with pytest.raises(medplum_agent.ConfigError, match="broke off: the agent refused or closed a connection"):
        asyncio.run(asyncio.wait_for(demo.run(agents.append), 10))


def test_says_what_to_do_without_loopback(tmp_path):
    if sys.platform != "linux" or subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    printed = finished(start(tmp_path, "--once", before=tuple(ALONE)), 1)
    assert re.fullmatch(r"\S+: the demo cannot connect to 127.0.0.1, .*: ip link set lo up.*\nTry --help.\n", printed)


def test_says_what_to_do_where_127_0_0_1_is_nobodys(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr("socket.create_server", refuse)
    with pytest.raises(medplum_agent.ConfigError, match="Cannot assign requested address"):
        Demo(tmp_path, stay=False)


def test_passes_the_sites_proxy_by(tmp_path):
    nowhere = "http://127.0.0.1:9"
    assert "MSA|AA|DEMO-3" in finished(start(tmp_path, "--once", http_proxy=nowhere, HTTP_PROXY=nowhere))


def test_the_module_alone_runs_and_says_that_it_has_no_demo(tmp_path):
    """One file, nothing beside it."""
    if os.environ.get("MEDPLUM_AGENT_BINARY"):
        pytest.skip("the executable is its own file")
    (tmp_path / "medplum_agent.py").write_bytes((ROOT / "medplum_agent.py").read_bytes())
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "medplum_agent.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    assert run("--version") == (0, f"{medplum_agent.VERSION}\n")
    code, schema = run("--settings-schema")
    assert code == 0 and "maxConnections" in schema
    code, problem = run("demo", "--once")
    assert code == 1 and re.fullmatch(r"medplum_agent.py: the demo is not beside this file: .*\nTry --help.\n", problem)
