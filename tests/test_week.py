"""A week without the server, in half a minute: the agent's clocks go forward an hour at each byte of a file."""

import sys
import time
from pathlib import Path

from demo import accepting_bot

import medplum_agent as ma
from tests.dicom_peers import SUCCESS, Instance, assert_arrived, assert_no_spool, made, spooled, start, store, transmits
from tests.instruments import Instrument
from tests.support import ROOT, AgentProcess, Site, eventually, message, setting, site
from tests.test_dicomweb import assert_stowed

CLOCKS = """
import os, sys, time
wall, steady = time.time_ns, time.monotonic
hours = lambda: os.stat(os.environ["HOURS"]).st_size
time.time_ns = lambda: wall() + hours() * 3_600_000_000_000
time.time = lambda: time.time_ns() / 1e9
time.monotonic = lambda: steady() + hours() * 3600
import medplum_agent
medplum_agent.STOOD_STILL_SECS = float("inf")  # hours that the agent runs, not that it is suspended
sys.exit(medplum_agent.main())
"""
CHANNELS = {
    "FEED": "?enhanced=true",
    "LAB": "tcp://127.0.0.1:{port}?mode=astm",
    "BINARY": "dicom://127.0.0.1:{port}?storage=binary",
    "DICOMWEB": "dicom://127.0.0.1:{port}?storage=dicomweb",
}
DAYS = 8  # more than finished messages are kept, and than three days of failed tries
SWEEPS = [setting("queueSweepIntervalSecs", 60), setting("queueRetentionDays", 0), setting("queueRetentionMaxMb", 1)]


def pass_hours(here: Site, clock: Path, count: int) -> None:
    """Timers of an hour's time run at each; the agent is alive throughout."""
    for _ in range(count):
        with clock.open("ab") as file:
            file.write(b"h")
        time.sleep(0.02)  # not to wait for anything: so long an hour lasts
    eventually(lambda: here.agent.process and here.agent.process.poll() is None)


def test_all_that_was_acknowledged_in_a_week_without_the_server_arrives(tmp_path, monkeypatch):
    clock = tmp_path / "hours"
    clock.touch()
    monkeypatch.setattr(AgentProcess, "COMMAND", [sys.executable, "-c", CLOCKS])
    environment = {"PYTHONPATH": str(ROOT), "HOURS": str(clock)}
    with site(tmp_path, CHANNELS, SWEEPS, start=False, env=environment) as here:
        here.sandbox.bot = lambda got: accepting_bot(got) if got.content_type == ma.HL7_TYPE else (200, "")
        here.sandbox.sandbox.faults.token_lifetime = 1e9  # its clock does not go forward
        start(here)
        here.agent.wait_connected()
        here.sandbox.stop()
        texts, sessions = [], []
        stored: dict[str, list[Instance]] = {"BINARY": [], "DICOMWEB": []}
        for day in range(DAYS):
            with here.device("FEED") as device:
                for n in range(20):
                    texts.append(f"WEEK-{day}-{n}")
                    assert device.ask(message(texts[-1], f"P{n}", size=20_000)) == ("CA", texts[-1])
            with Instrument.at(here.ports["LAB"]) as instrument:
                sessions.append(f"H|\\^&|||DAY-{day}")
                instrument.session(sessions[-1], "R|1|^^^GLU|5.4|mg/dL", "L|1|N")
            for channel, instances in stored.items():
                instances += (batch := [made(40_000) for _ in range(3)])
                assert store(here.ports[channel], *batch) == [SUCCESS] * 3
            if day == DAYS // 2:
                here.agent.kill()
                start(here)
            pass_hours(here, clock, 24)
        assert len(spooled(here)) == DAYS * 6
        here.sandbox.start()
        for control in texts:
            here.agent.wait_state(control, "processed", 60)
        for text in sessions:
            here.sandbox.wait_for(lambda text=text: transmits(here, text), 30, text)  # type: ignore[misc]
        for instance in stored["BINARY"]:
            assert_arrived(here, instance)
        for instance in stored["DICOMWEB"]:
            assert_stowed(here, instance)
        assert_no_spool(here)
        assert b"dead letter" not in here.agent.main_log()
