"""A disk that errs: each write, sync, rename and removal of a short run fails once, or for good from there on.

strace injects the error. What was acknowledged before, between or after such errors reaches the server in the end, and
the agent goes on by itself. EVERY=1 tries every place (a quarter of an hour); else a few of each kind are tried.
"""

import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from demo import accepting_bot

import medplum_agent as ma
from tests.dicom_peers import SUCCESS, Aborted, Rejected, made, start, store
from tests.instruments import Instrument
from tests.support import INLINE, Site, accepts, changed, eventually, message, site

CHANNELS = {"FEED": "?enhanced=true", "LAB": "tcp://127.0.0.1:{port}?mode=astm", "PACS": "dicom://127.0.0.1:{port}?"}
CALLS = "pwrite64 write fdatasync fsync ftruncate rename unlink mkdir".split()
EVERY = bool(os.environ.get("EVERY"))

pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="NO STRACE: disk errors were not tried")


class Fault(NamedTuple):
    """From the call `number` of each thread; `lasts`: for good, else once."""

    call: str
    error: str
    number: int
    lasts: bool

    def wrapper(self, trace: Path) -> list[str]:
        when = f"{self.number}+" if self.lasts else str(self.number)
        inject = f"inject={self.call}:error={self.error}:when={when}"
        return ["strace", "-D", "-f", "-qq", "-o", str(trace), "-e", f"trace={self.call}", "-e", inject]


def feed(here: Site) -> Iterator[bytes]:
    """HL7; what was acknowledged by CA."""
    with suppress(OSError, EOFError), here.device("FEED", timeout=5) as device:
        for n in range(3):
            text = message(f"HL7-{n}", f"P{n}", size=3000 * n)
            answer = device.ask(text)
            while answer[0] in ("AA", "AE"):  # the Bot's
                answer = device.ack()
            if answer == ("CA", f"HL7-{n}"):
                yield text.encode()


def analyze(here: Site) -> Iterator[bytes]:
    """An ASTM session, if every frame of it was acknowledged."""
    records = "H|\\^&|||SESSION", "P|1", f"R|1|^^^GLU|{'5' * 300}|mg/dL", "L|1|N"
    with suppress(OSError, EOFError, AssertionError), Instrument.at(here.ports["LAB"]) as instrument:
        instrument.session(*records)
        yield "\n".join(records).encode()


def scan(here: Site) -> Iterator[bytes]:
    """Images; those that were answered by 0x0000."""
    for image in (made(10), made(90_001)):
        with suppress(OSError, EOFError, Aborted, Rejected, AssertionError):
            if store(here.ports["PACS"], image) == [SUCCESS]:
                yield image.content


def arrived(here: Site) -> list[bytes]:
    """All that the server has, files and what the Bot was asked."""
    server = here.sandbox.sandbox
    files = [file if isinstance(file, bytes) else file.read_bytes() for file in list(server.binaries.values())]
    return [transmit.body.encode() for transmit in list(server.transmits)] + files


def missing(here: Site, kept: Iterable[bytes]) -> list[bytes]:
    found = arrived(here)
    return [content for content in kept if not any(content in whole for whole in found)]


def run(folder: Path, fault: Fault | None, count: str = "") -> tuple[list[bytes], list[bytes]]:
    """What was acknowledged, and what of it did not arrive after a kill and a start without faults."""
    folder.mkdir()
    trace = folder / "strace.txt"
    counting = ["strace", "-D", "-f", "-qq", "-o", str(trace), "-e", f"trace={count}"]
    with site(folder, CHANNELS, start=False, wrapper=fault.wrapper(trace) if fault else counting) as here:
        if fault and fault.number % 2:
            changed(here.agent, INLINE)
        here.sandbox.bot = lambda got: accepting_bot(got) if got.content_type == ma.HL7_TYPE else (200, "")
        here.agent.start(ready=False)
        with suppress(AssertionError):  # a disk that errs at the start may keep the doors closed
            eventually(lambda: all(accepts(("127.0.0.1", port)) for port in here.ports.values()), 6)
        kept = [*feed(here), *analyze(here), *scan(here)]
        here.agent.kill()
        here.agent._wrapper = ()
        start(here)
        with suppress(AssertionError):
            eventually(lambda: not missing(here, kept), 15)
        return kept, missing(here, kept)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How often the busiest thread makes each call in a run without faults."""
    folder = tmp_path_factory.mktemp("places") / "run"
    kept, gone = run(folder, None, ",".join(CALLS))
    assert len(kept) == 6 and not gone
    counts: dict[tuple[str, str], int] = {}
    for thread, call in re.findall(r"^(\d+) +(\w+)\(", (folder / "strace.txt").read_text(), re.MULTILINE):
        counts[thread, call] = counts.get((thread, call), 0) + 1
    return {call: max((n for (_, name), n in counts.items() if name == call), default=0) for call in CALLS}


def faults(places: dict[str, int], call: str) -> Iterator[Fault]:
    every = [
        Fault(call, error, number, lasts)
        for error in ("EIO", "ENOSPC") for lasts in (False, True) for number in range(1, places[call] + 1)
    ]  # fmt: skip
    yield from every if EVERY else random.Random(call).sample(every, min(2, len(every)))


@pytest.mark.timeout(7200 if EVERY else 300)
@pytest.mark.parametrize("call", CALLS)
def test_what_was_acknowledged_on_a_disk_that_errs_arrives(places, tmp_path, call):
    for fault in faults(places, call):
        folder = tmp_path / f"{fault.number}-{fault.error}-{fault.lasts}"
        _, gone = run(folder, fault)
        assert not gone, f"{fault}: {gone} was acknowledged and did not arrive"
        shutil.rmtree(folder)
