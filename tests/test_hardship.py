"""Hardship of disk and network that lasts, and faults that come together."""

import array
import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

import medplum_agent as ma
from tests.instruments import Instrument
from tests.support import accepts, changed, eventually, free_ports, message, site, tmpfs

# --- the queue ---


@pytest.mark.parametrize("how", ["replaced", "moved away"])
def test_the_log_of_a_queue_that_was_replaced_is_not_written_into_the_next(tmp_path: Path, how: str) -> None:
    """A copy of yesterday was put in the place of the running queue: SQLite wrote today's log into it, which damaged
    it with what was accepted since; of one that was moved away it deleted the log."""
    with site(tmp_path, {"FEED": "?enhanced=aa"}, start=False) as here:
        changed(here.agent, "m.CHECKPOINT_PAGES = 40")
        here.agent.start()
        queue, copy = here.agent.queue_path, tmp_path / "yesterday"
        with here.device("FEED") as device:
            for n in range(30):
                assert device.ask(message(f"OLD-{n}"))[0] == "AA"
            with contextlib.closing(here.agent.database()) as db, contextlib.closing(sqlite3.connect(copy)) as other:
                db.backup(other)
            here.sandbox.faults.silent = True
            for n in range(120):
                assert device.ask(message(f"TODAY-{n}", f"P{n % 9}", size=9000))[0] == "AA"
            if how == "replaced":
                copy.rename(queue)
            else:
                queue.rename(tmp_path / "away")
            refused = [n for n in range(100) if device.ask(message(f"NEW-{n}", f"P{n % 9}"))[0] != "AA"]
            assert len(refused) < 50
        here.sandbox.faults.silent = False
        here.agent.kill()
        here.agent.start()
        here.sandbox.wait_ids(*(f"NEW-{n}" for n in range(100) if n not in refused), timeout=15)
        with contextlib.closing(here.agent.database()) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        here.agent.logged("belongs to the queue file that was moved or replaced")
        (log,) = here.agent.state_dir.glob("*-wal.replaced-*")
        if how == "moved away":
            shutil.copy(log, tmp_path / "away-wal")
            with contextlib.closing(sqlite3.connect(tmp_path / "away")) as db:
                assert db.execute("SELECT count(*) FROM message WHERE control_id LIKE 'TODAY%'").fetchone() == (120,)


_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int fdatasync(int fd) {
    static int (*real)(int);
    char link[64], path[512] = {0};
    if (!real) real = dlsym(RTLD_NEXT, "fdatasync");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (!access(getenv("BAD_DISK"), F_OK) && readlink(link, path, 500) > 0 && strstr(path, "-wal")) {
        errno = EIO;
        return -1;
    }
    return real(fd);
}
"""


@pytest.mark.skipif(not (shutil.which("gcc") and sys.platform == "linux"), reason="NO GCC: no bad disk was tried")
def test_a_disk_that_errs_for_long_is_not_called_well_while_it_refuses_everything(tmp_path: Path) -> None:
    """What was to try the disk changed nothing, so that SQLite wrote nothing: it was called well each time that
    somebody asked, without an alarm, and its error a matter of permissions."""
    source, shim, bad = (tmp_path / name for name in ("shim.c", "shim.so", "bad"))
    source.write_text(_SHIM)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    with site(
        tmp_path, {"FEED": "?enhanced=aa"}, start=False, env={"LD_PRELOAD": str(shim), "BAD_DISK": str(bad)}
    ) as here:
        changed(here.agent, "m.LOOK_SECS, m.LAZY_SECS = 0.1, 0.05")
        here.agent.start()
        with here.device("FEED") as device:
            assert device.ask(message("GOOD"))[0] == "AA"
            bad.touch()
            device.send(message("BAD"))
            assert "MSA|AE|BAD|storage error: the disk of the agent has errors" in device.receive()
            for _ in range(10):
                found = ma.ask_agent(here.agent.state_dir, {"command": "status"})
                assert found and "has errors" in found["store"]["trouble"]
            here.agent.logged("Alarm: storage error: the disk of the agent has errors")
            assert b"written again" not in here.agent.main_log()
            bad.unlink()
            here.agent.logged("written again")
            assert device.ask(message("BAD"))[0] == "AA"
        here.sandbox.wait_ids("GOOD", "BAD")


# --- who reads what the agent says ---


@pytest.mark.skipif(os.name != "posix", reason="needs a pipe of a known size")
def test_a_console_that_nobody_reads_holds_up_no_device(tmp_path: Path) -> None:
    """A journal, a container's log or a pager that hangs: the agent stood still as soon as the pipe was full."""
    with site(tmp_path, {"FEED": "?enhanced=aa"}, start=False, level="DEBUG") as here:
        os.mkfifo(fifo := tmp_path / "console")
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        here.agent._wrapper = ["sh", "-c", f'exec "$@" >{fifo} 2>&1', "sh"]
        here.agent.start()
        for n in range(400):  # two lines for each connection
            with here.device("FEED") as device:
                assert device.ask(message(f"M-{n}"))[0] == "AA"
        here.sandbox.wait_ids("M-399")
        assert (held := os.read(reader, 2**20)).count(b"connected.") > 100
        assert len(held) < 2**20
        with here.device("FEED") as device:
            assert device.ask(message("LAST"))[0] == "AA"
        assert select.select([reader], [], [], 5)[0]  # whoever comes back hears what is said from now on
        os.close(reader)


# --- a process that stands still ---


def test_answers_that_came_while_the_agent_was_stopped_are_read_before_time_is_up(tmp_path: Path) -> None:
    """A frozen process or machine: all that was with the server was given up, before its answers were looked at."""
    channels = {"ONCE": "?enhanced=aa&retryMode=normal&responseTimeoutSecs=1&maxWorkers=100"}
    with site(tmp_path, channels) as here, here.device("ONCE") as device:
        here.sandbox.faults.delay = lambda: 0.7
        for n in range(50):
            assert device.ask(message(f"M-{n}", f"P{n}"))[0] == "AA"
        here.sandbox.wait_ids(*(f"M-{n}" for n in range(50)))
        assert here.agent.process is not None
        here.agent.process.send_signal(signal.SIGSTOP)
        here.sandbox.wait_for(lambda: len(here.sandbox.answered) == 50)
        until = time.monotonic() + 2.5
        here.sandbox.wait_for(lambda: time.monotonic() > until)
        here.agent.process.send_signal(signal.SIGCONT)
        for n in range(50):
            here.agent.wait_state(f"M-{n}", "processed")
        assert b"no answer" not in here.agent.main_log()


# --- the state directory ---


def test_a_state_directory_that_was_cleared_serves_again(tmp_path: Path) -> None:
    """Somebody, or what cleans up temporary files, removed it: the queue was made anew, but until a restart no command
    reached the agent, `health` took it for dead, and a start without the server had no configuration."""
    with site(tmp_path, {"FEED": "?enhanced=aa"}, start=False) as here:
        changed(here.agent, "m.LOOK_SECS, m.LAZY_SECS = 0.2, 0.05")
        here.agent.start()
        state = here.agent.state_dir
        with here.device("FEED") as device:
            for n in range(2):
                state.rename(tmp_path / f"removed-{n}")
                eventually(lambda: ma.ask_agent(state, {"command": "status"}), what="asked again")
                while device.ask(message(f"M-{n}"))[0] != "AA":
                    assert here.agent.process and here.agent.process.poll() is None
                # before it is removed again, also where a queue that was just missing is read again after 5 s
                here.sandbox.wait_ids(f"M-{n}", timeout=20)
        eventually(lambda: (state / ma.CONFIG_FILE).exists())
        here.sandbox.stop()
        here.agent.kill()
        here.agent.start(ready=False)
        here.agent.wait_listening()


def test_a_configuration_that_could_not_be_saved_is_saved_when_there_is_space(tmp_path: Path) -> None:
    """A reload on a full disk: it was tried once, and a later start without the server went back to the one before."""
    with tmpfs(tmp_path / "disk", 40) as disk, site(disk, {"FEED": "?enhanced=aa"}, start=False) as here:
        changed(here.agent, "m.LOOK_SECS = 0.2")
        here.agent.start()
        with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
        here.endpoint("FEED")["address"] = f"mllp://127.0.0.1:{(port := free_ports(1)[0])}?enhanced=aa"
        assert here.sandbox.reload()["statusCode"] == 200
        eventually(lambda: accepts(("127.0.0.1", port)))
        (disk / "ballast").unlink()
        saved = here.agent.state_dir / ma.CONFIG_FILE
        eventually(lambda: f":{port}?" in saved.read_text())
        here.sandbox.stop()
        here.agent.kill()
        here.agent.start(ready=False)
        eventually(lambda: accepts(("127.0.0.1", port)), 20)


def test_an_agent_starts_on_a_full_disk_and_sends_what_waits(tmp_path: Path) -> None:
    """Its lock file was empty, by an earlier try, and could not be written: that was taken for another agent's."""
    with tmpfs(tmp_path / "disk", 40) as disk, site(disk, {"FEED": "?enhanced=aa"}) as here:
        here.sandbox.faults.silent = True
        with here.device("FEED") as device:
            for n in range(20):
                assert device.ask(message(f"M-{n}", f"P{n}"))[0] == "AA"
        here.sandbox.wait_for(lambda: here.sandbox.seen)
        here.agent.kill()
        (here.agent.state_dir / "agent.lock").write_bytes(b"")
        beside = here.agent.queue_path.with_name(f"{here.agent.queue_path.name}.lock")
        beside.write_bytes(b"")
        with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
        here.sandbox.faults.silent = False
        here.sandbox.seen.clear()
        here.agent.start()
        here.sandbox.wait_ids(*(f"M-{n}" for n in range(20)))
        with here.device("FEED") as device:
            device.send(message("NEW"))
            assert "|storage error: the disk of the agent is full" in device.receive()
        (disk / "ballast").unlink()
        for n in range(20):
            here.agent.wait_state(f"M-{n}", "processed", 15)


# --- the network ---


@pytest.mark.skipif(sys.platform != "linux", reason="needs a filter on a socket")
def test_an_instrument_whose_network_forgot_the_line_is_called_again(tmp_path: Path) -> None:
    """A firewall that started anew swallows all that belongs to no line it knows: what was to be sent then kept the
    line for a quarter of an hour, as long as Linux repeats it, without results and without an alarm."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}?mode=astm&role=client"
        with site(tmp_path, {"LAB": address}, start=False) as here:
            changed(here.agent, "m.UNTAKEN_SECS = 1")
            here.sandbox.bot = lambda transmit: (200, "")
            here.agent.start()
            listener.settimeout(15)
            line, _ = listener.accept()
            with Instrument(line) as first:
                first.session("H|\\^&", "R|1|^^^GLU|5", "L|1|N")
                nothing = array.array("H", [0x06, 0, 0, 0]).tobytes()  # BPF: RET 0
                buffer = ctypes.create_string_buffer(nothing)
                program = struct.pack("HL", 1, ctypes.addressof(buffer))
                line.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER
                with here.caller() as caller:
                    caller.store("channel://LAB", "H|\\^&\rO|1|T1\rL|1|N\r", contentType=ma.ASTM_TYPE)
                    with Instrument(listener.accept()[0]) as second:
                        assert b"O|1|T1\r" in second.accept(20)
                        second.session("H|\\^&", "R|1|^^^GLU|6", "L|1|N")
            here.sandbox.wait_for(lambda: len(here.sandbox.seen) == 2)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pipe of a known size")
def test_a_line_that_its_console_took_in_part_is_not_joined_with_the_next() -> None:
    """A collector of a container's log lost both: `{"level":"INFO","msg":"xx{"level":...`."""
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as reading, open(writer, "w") as console:
        log = ma.Log("main", ma.LoggerSettings(), None, console)
        for _ in range(60):
            log.info("x" * 1500)
        held = reading.read(2**20)
        log.info("y" * 2000)
        log.info("heard")
        *_, cut, long, last = (held + reading.read(2**20)).splitlines()
    assert b'"}' not in cut and len(json.loads(long)["msg"]) == 2000 and json.loads(last)["msg"] == "heard"
