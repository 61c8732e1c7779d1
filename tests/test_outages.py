"""Clocks that are set, and outages of everything that the agent stands on."""

import contextlib
import re
import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest

import medplum_agent as ma
from tests.instruments import Instrument
from tests.support import Site, accepts, changed, eventually, free_ports, message, site

YEAR = 365 * 86_400


class Clock:
    """The wall clock of an agent, which a test sets; its monotonic clock goes on."""

    def __init__(self, path: Path):
        self._path = path
        self.set(0)

    def set(self, seconds: int) -> None:
        """So far from the real one."""
        new = self._path.with_suffix(".new")
        new.write_text(f"{seconds}")
        new.replace(self._path)

    @property
    def code(self) -> str:
        """For `changed`."""
        return f"""
wall = m.time.time_ns
m.time.time_ns = lambda: wall() + int(open({str(self._path)!r}).read()) * 10**9
m.time.time = lambda: m.time.time_ns() / 1e9
"""


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path / "clock")


def status(here: Site) -> Any:
    found = ma.ask_agent(here.agent.state_dir, {"command": "status"})
    assert found
    return found


# --- clocks ---


@pytest.mark.parametrize("most", [1, 3])
def test_a_clock_that_was_set_back_costs_no_line_of_the_log(tmp_path: Path, monkeypatch, most: int) -> None:
    """Files of days to come were taken for newer ones: each new line's file was removed, or grew without limit."""
    monkeypatch.setattr(ma, "MIB", 1000)
    for number in ("", ".1", ".2")[:most]:
        (tmp_path / f"medplum-agent-main-2999-01-01.log{number}").touch()
    log = ma.Log("main", ma.LoggerSettings(maxFileSizeMb=1, filesToKeep=most), tmp_path, None)
    for n in range(40):
        log.info(f"{n:02} {'x' * 100}")
        assert ma.read_log_page(tmp_path, "main", 1, None).entries[0]["msg"].startswith(f"{n:02} ")
    log.close_file()
    assert len([*tmp_path.iterdir()]) == most
    assert all(path.stat().st_size < 1300 for path in tmp_path.iterdir())


def test_an_old_log_that_cannot_be_deleted_costs_no_line(tmp_path: Path) -> None:
    """On Windows a file that somebody reads stays; all lines were lost for as long."""
    (tmp_path / "medplum-agent-main-2000-01-01.log").mkdir()
    log = ma.Log("main", ma.LoggerSettings(filesToKeep=1), tmp_path, None)
    log.info("kept")
    log.close_file()
    assert not log.trouble
    (path,) = (path for path in tmp_path.iterdir() if path.is_file())
    assert b'"kept"' in path.read_bytes()


@pytest.mark.parametrize("jump", [-YEAR, YEAR])
def test_a_clock_that_is_set_neither_raises_nor_hides_the_alarm_of_a_silent_channel(tmp_path, clock, jump) -> None:
    """A machine without a clock of its own starts in the past, and in the future when its battery is empty."""
    channels = {"LIVE": "?enhanced=aa&expectEverySecs=3600", "DEAD": "?enhanced=aa&expectEverySecs=1"}
    with site(tmp_path, channels, start=False) as here:
        changed(here.agent, f"m.LOOK_SECS = 0.2{clock.code}")
        clock.set(-jump)
        here.agent.start()
        for channel in channels:
            with here.device(channel) as device:
                assert device.ask(message("BEFORE"))[0] == "AA"
        clock.set(0)
        eventually(lambda: {one["subject"] for one in status(here)["alarms"] if one["kind"] == "silent"} == {"DEAD"})
        here.agent.logged("channel 'DEAD' has been silent")
        assert b"'LIVE' has been silent" not in here.agent.main_log()


# --- the server ---


def test_a_server_that_swallows_is_said_once_and_asked_ever_more_rarely(tmp_path: Path) -> None:
    """A try that lasted until its time-out was taken for a connection that had held: a line for each, for days."""
    with site(tmp_path, {"A": "?enhanced=aa"}, start=False) as here:
        changed(here.agent, "m.CONNECT_TIMEOUT_SECS, m.STABLE_SECS, m.RECONNECT_MAX_SECS = 0.3, 0.2, 0.1")
        here.agent.start()
        here.sandbox.stop()
        tries: list[socket.socket] = []
        with socket.create_server(("127.0.0.1", here.sandbox.sandbox.port)) as silent:
            silent.settimeout(10)
            while len(tries) < 6:
                tries.append(silent.accept()[0])  # and nobody answers
            said = re.findall("No connection to [^:]*:[^:]*:[0-9]*/ws/agent: ([^.]*)", here.agent.main_log().decode())
            assert sorted(set(said)) == sorted(said)
            with here.device("A") as device:
                assert device.ask(message("KEPT"))[0] == "AA"
        for one in tries:
            one.close()
        here.sandbox.start()
        here.sandbox.wait_ids("KEPT", timeout=20)


def test_a_token_that_cannot_be_renewed_is_said_once(tmp_path: Path) -> None:
    """Each try was a line: thousands a day while the clock is wrong, or logins are refused."""
    with site(tmp_path, {"A": ""}, start=False, config="heartbeatSecs = 0.1\n") as here:
        changed(here.agent, "m.TOKEN_REFRESH_SPACING_SECS = m.LAZY_SECS = m.RECONNECT_MAX_SECS = 0.02")
        here.sandbox.faults.jwt, here.sandbox.faults.token_lifetime = True, 301
        here.agent.start()
        here.sandbox.faults.token_failures, here.sandbox.faults.token_status = 1000, 400
        here.agent.logged("cannot be refreshed")
        before = here.sandbox.sandbox.requests.count("POST /oauth2/token")
        here.sandbox.wait_for(lambda: here.sandbox.sandbox.requests.count("POST /oauth2/token") > before + 5)
        assert here.agent.main_log().count(b"cannot be refreshed") == 1
        with here.device("A") as device:
            assert device.ask(message("GOOD-1"))[0] == "AA"  # the old one is good still


# --- the queue ---


def test_a_queue_that_another_program_holds_is_not_well(tmp_path: Path) -> None:
    """Every message was refused, and status, alarms and `health` knew nothing of it."""
    with site(tmp_path, {"A": "?enhanced=aa"}, start=False) as here:
        changed(here.agent, "m.BUSY_MS, m.LOOK_SECS, m.LAZY_SECS = 100, 0.1, 0.2")
        here.agent.start()
        with contextlib.closing(sqlite3.connect(here.agent.queue_path)) as other, here.device("A") as device:
            other.execute("BEGIN IMMEDIATE")
            device.send(message("HELD"))
            assert "MSA|AE|HELD|storage error: another program holds the queue" in device.receive()
            assert "another program" in status(here)["store"]["trouble"]
            eventually(lambda: [one for one in status(here)["alarms"] if one["kind"] == "queue"])
            other.rollback()
            eventually(lambda: status(here)["store"]["healthy"] and not status(here)["alarms"])  # before any message
            assert device.ask(message("HELD"))[0] == "AA"
            here.agent.logged("can be written again")


def test_what_waits_for_an_instrument_outlives_a_moment_without_the_queue(tmp_path: Path) -> None:
    """After a start or a reload it was asked for once: a program that held the file just then cost the answer."""
    with site(tmp_path, {"LAB": "tcp://127.0.0.1:{port}?mode=astm"}, start=False) as here:
        changed(here.agent, "m.BUSY_MS, m.STORE_REOPEN_SECS = 50, 0.1")
        here.agent.start()
        eventually(lambda: accepts(("127.0.0.1", here.ports["LAB"])))
        here.sandbox.bot, here.sandbox.faults.delay = lambda got: (200, "H|\\^&\rO|1|T1\rL|1|N\r"), lambda: 0.3
        with Instrument.at(here.ports["LAB"]) as instrument:
            instrument.session("H|\\^&", "Q|1|ALL", "L|1|N")
        here.agent.logged("its answer waits")
        other_port = free_ports(1)[0]
        here.endpoint("LAB")["address"] = f"tcp://127.0.0.1:{other_port}?mode=astm"
        with contextlib.closing(sqlite3.connect(here.agent.queue_path)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert here.sandbox.reload()["statusCode"] == 200
            here.agent.logged("cannot be written")
        with Instrument.at(other_port) as instrument:
            assert b"O|1|T1\r" in instrument.accept()
