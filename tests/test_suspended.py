"""Machines that are suspended, and clocks that jump: what came meanwhile counts as if it had come in time."""

import asyncio
import contextlib
import email.utils
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import medplum_agent as ma
from medplum_agent import ASTM_TYPE, DICOM_TYPE
from tests.dicom_peers import Destination, imaging_site, keep, made
from tests.instruments import ACK, ENQ, EOT, Instrument, body_of, frames_of, of
from tests.support import (
    AGENT_ID,
    ROOT,
    AgentProcess,
    Receiver,
    Site,
    accepts,
    changed,
    eventually,
    message,
    setting,
    site,
)

SECS = 1.5  # every time-out of these tests
STOPPED_SECS = 2.0
RECORDS = "H|\\^&|||ABC", "P|1", "O|1|S1|GLU", "R|1|^^^GLU|5.4|mg/dL", "L|1|N"


@contextlib.contextmanager
def suspended(here: Site) -> Iterator[None]:
    """The agent stands still, for longer than its time-outs."""
    assert here.agent.process is not None
    here.agent.process.send_signal(signal.SIGSTOP)
    try:
        yield
        time.sleep(STOPPED_SECS)  # not to wait for anything: so long it is suspended
    finally:
        here.agent.process.send_signal(signal.SIGCONT)


class Gate(threading.Event):
    """Tells when somebody waits at it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.asked.set()
        return super().wait(timeout)


def states(here: Site) -> list[str]:
    with contextlib.closing(here.agent.database()) as db:
        return [state for (state,) in db.execute("SELECT state FROM queue ORDER BY id")]


def test_what_devices_took_meanwhile_is_not_sent_again(tmp_path: Path) -> None:
    """The time-out won against the acknowledgment that lay there: the order and the image went twice."""
    channels = {
        "PACS": "dicom://127.0.0.1:{port}",
        "LAB": f"tcp://127.0.0.1:{{port}}?mode=astm&replyTimeoutSecs={SECS}",
    }
    with (
        imaging_site(tmp_path, channels) as here, Receiver(lambda link, text: None) as pump, here.caller() as caller,
        Destination() as archive, Instrument.at(here.ports["LAB"]) as device,
    ):  # fmt: skip
        archive.gate = gate = Gate()
        to, order = f"dicom://{archive.address}", message("ORDER")
        caller.store(f"{to}?ackTimeoutSecs={SECS}", *keep(here, made(40_000)), contentType=DICOM_TYPE)
        assert gate.asked.wait(10)
        caller.store("channel://LAB", body_of("L|1|N"), contentType=ASTM_TYPE)
        assert device.take(1) == ENQ
        device.write(ACK)
        device.frame()
        caller.store(pump.url(f"?ackTimeoutSecs={SECS}"), order)
        pump.wait_ids("ORDER")
        with suspended(here):
            pump.links[0].ack("AA", "ORDER")
            gate.set()
            device.write(ACK)
        assert device.take(1) == EOT
        here.agent.wait_state("ORDER", "processed")
        eventually(lambda: states(here) == ["processed"] * 3, what="all are processed")
        assert pump.ids() == ["ORDER"] and len(archive.arrivals) == 1


def test_what_nobody_waits_for_any_more_is_not_pushed(tmp_path: Path) -> None:
    """The caller had heard of a time-out long before the order went to the pump."""
    with site(tmp_path, {"A": ""}, start=False) as here, Receiver() as pump, here.caller() as caller:
        changed(here.agent, f"m.PUSH_WAIT_SECS = {SECS}")
        here.agent.start()
        push = {"type": "push", "remote": pump.url(), "contentType": ma.HL7_TYPE, "body": message("LATE")}
        with suspended(here):
            answer = asyncio.run_coroutine_threadsafe(here.sandbox.sandbox.ask(AGENT_ID, push), here.sandbox.loop)
        assert "the agent stood still" in answer.result(10)["body"]
        eventually(lambda: caller.push(pump.url(), message("NEXT")).status == 200)
        assert pump.ids() == ["NEXT"]


def test_a_session_goes_on(tmp_path: Path) -> None:
    """Its records were a dead letter: `the instrument was silent`."""
    with site(tmp_path, {"LAB": f"tcp://127.0.0.1:{{port}}?mode=astm&receiveTimeoutSecs={SECS}"}) as here:
        eventually(lambda: accepts(("127.0.0.1", here.ports["LAB"])))
        with Instrument.at(here.ports["LAB"]) as device:
            assert device.ask(ENQ) == ACK
            first, *others = frames_of(*RECORDS)
            assert device.ask(first) == ACK
            with suspended(here):
                device.write(others[0])
            assert device.take(1) == ACK
            for frame in others[1:]:
                assert device.ask(frame) == ACK
            device.write(EOT)
            here.sandbox.wait_for(lambda: of(here, "LAB"))
            assert [t.body for t in of(here, "LAB")] == [body_of(*RECORDS)]


CLOCKS = """
import os, sys, time
wall, steady = time.time_ns, time.monotonic
def hours(which):
    return int(open(os.environ["HOURS"]).read().split()[which])
time.time_ns = lambda: wall() + hours(0) * 3_600_000_000_000
time.time = lambda: time.time_ns() / 1e9
time.monotonic = lambda: steady() + hours(1) * 3600
import medplum_agent as m
sys.exit(m.main())
"""


@contextlib.contextmanager
def clocked(
    folder: Path, monkeypatch: Any, settings: list[ma.Json], start: int = 0
) -> Iterator[tuple[Site, Callable[..., None]]]:
    """A Site with channel A, whose agent has clocks that jump: `jump(wall, steady)`, hours from now."""
    file = folder / "hours"

    def jump(wall: int, steady: int = 0) -> None:
        new = folder / "new"
        new.write_text(f"{wall} {steady}")
        new.rename(file)

    jump(start)
    monkeypatch.setattr(AgentProcess, "COMMAND", [sys.executable, "-c", CLOCKS])
    environment = {"PYTHONPATH": str(ROOT), "HOURS": str(file)}
    with site(folder, {"A": ""}, settings, env=environment) as here:
        here.sandbox.sandbox.faults.token_lifetime = 1e9
        here.sandbox.faults.date = f"Date: {email.utils.formatdate(usegmt=True)}\r\n"
        yield here, jump


def test_a_weekend_of_suspension_is_no_time_of_failed_tries(tmp_path: Path, monkeypatch: Any) -> None:
    """After 72 hours of them a message is a dead letter: so was what had failed a few times before."""
    retries = [setting("channelAutoRetryBaseDelayMs", 100), setting("channelAutoRetryMaxDelayMs", 200)]
    with clocked(tmp_path, monkeypatch, retries) as (here, jump), here.caller() as caller, Receiver() as pump:
        pump.stop()
        caller.store(pump.url(), message("ORDER"))

        def tries() -> int:
            return int(sum(row["attempts"] for row in here.agent.rows("ORDER")))

        eventually(lambda: tries() >= 3)
        jump(100, 100)
        before = tries()
        eventually(lambda: tries() >= before + 2)
        assert here.agent.rows("ORDER")[0]["state"] == "queued"
        pump.start()
        here.agent.wait_state("ORDER", "processed")


def test_messages_go_in_their_time_after_a_start_with_a_wrong_clock(tmp_path: Path, monkeypatch: Any) -> None:
    """What began in 1970 lived there until the next start: nothing was ever old enough to be deleted."""
    settings, days = [setting("queueSweepIntervalSecs", 1), setting("queueRetentionDays", 1)], 24
    with clocked(tmp_path, monkeypatch, settings, start=-10 * days) as (here, jump):
        with here.device("A") as device:
            device.ask(message("OLD"))
            here.agent.wait_state("OLD", "processed")
            assert here.sandbox.reload()["statusCode"] == 200  # which brings the server's date
            jump(0)
            eventually(lambda: not here.agent.rows("OLD"))
            device.ask(message("NEW"))
            here.agent.wait_state("NEW", "processed")
        jump(10 * days)
        future = (time.time() + 86_400) * 1000
        eventually(lambda: here.sandbox.stats()["durableQueue"]["lastSweepAt"] > future)
        assert here.agent.rows("NEW")
