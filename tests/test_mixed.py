"""Everything at once: HL7, ASTM, images and stored pushes go through one agent that is killed again and again."""

import contextlib
import itertools
import json
import os
import random
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from demo import accepting_bot

from medplum_agent import HL7_TYPE
from tests.dicom_peers import EXPLICIT, SECONDARY, SUCCESS, Aborted, Rejected, Scu, assert_no_spool, made, uploaded
from tests.instruments import EOT, Instrument, body_of, of
from tests.support import AGENT_ID, Receiver, Site, accepts, control_id, eventually, message, setting, site

KILLS = int(os.environ.get("KILLS", "5"))
SEED = int(os.environ.get("SEED") or random.randrange(10**6))
CHANNELS = {
    "FEED": "?enhanced=true",
    "LAB": "tcp://127.0.0.1:{port}?mode=astm",
    "PACS": "dicom://127.0.0.1:{port}?",
    "PUSH": "",  # tells that the agent listens: pushes go to a device
}
AGAIN = {"channelAutoRetryBaseDelayMs": 20, "channelAutoRetryMaxDelayMs": 200, "channelAutoRetryMaxAttempts": 0}
IN_FLIGHT, PATIENTS = 8, 5  # of a sender: messages that wait to be acknowledged, and whom they are about


class Load:
    """A sender, which repeats what was not acknowledged. Things have the names that they arrive with, and an order."""

    def __init__(self, here: Site, stop: threading.Event, channel: str, number: int):
        self.here, self.stop, self.channel, self.number = here, stop, channel, number
        self.sent: dict[str, Any] = {}
        self.waiting: dict[str, Any] = {}

    def run(self) -> None:
        """Until all is acknowledged after `stop`. An agent that refuses, or is silent for long, is a failure."""
        while self.waiting or not self.stop.is_set():
            eventually(lambda: accepts(("127.0.0.1", self.here.ports[self.channel])), 30, f"{self.channel} listens")
            with contextlib.suppress(ConnectionError, EOFError, Aborted, Rejected):
                self.talk()

    def more(self, most: int = 1) -> list[Any]:
        """New things to send, up to so many that wait."""
        new = []
        while len(self.waiting) < most and not self.stop.is_set():
            name, thing = self.make(f"{self.channel}{self.number}-{len(self.sent)}", len(self.sent))
            self.waiting[name] = self.sent[name] = thing
            new.append(thing)
        return new

    def make(self, name: str, count: int) -> tuple[str, Any]:
        return name, message(name, self.order(name))

    def talk(self) -> None:
        """Over one connection, as long as it holds and there is something to send."""

    def name_of(self, body: str) -> str:
        return control_id(body)

    def order(self, name: str) -> str:
        """Things with the same one arrive in the order of sending."""
        return ""


class Hl7(Load):
    def order(self, name: str) -> str:
        return f"{self.number}P{int(name.split('-')[1]) % PATIENTS}"

    def talk(self) -> None:
        with self.here.device("FEED", timeout=20) as device:
            device.send(*self.waiting.values(), *self.more(IN_FLIGHT))
            while self.waiting:
                code, control = device.ack()
                assert code in ("CA", "AA"), (code, control)  # the Bot's AA alone answers a repetition
                self.waiting.pop(control, None)
                device.send(*self.more(IN_FLIGHT))


class Astm(Load):
    def name_of(self, body: str) -> str:
        return body

    def make(self, name: str, count: int) -> tuple[str, Any]:
        records = ("H|\\^&|||ABC", "P|1", *(f"R|{n}|{name}|5.4" for n in range(1, 2 + count % 5)), "L|1|N")
        return body_of(*records), records

    def talk(self) -> None:
        with Instrument.at(self.here.ports["LAB"], f"127.0.0.{10 + self.number}") as device:
            while self.more() or self.waiting:
                ((name, records),) = self.waiting.items()
                device.session(*records, eot=False)
                del self.waiting[name]
                device.write(EOT)


class Images(Load):
    def name_of(self, body: str) -> str:
        return str(json.loads(body)["dataset"]["00080018"]["Value"][0])

    def make(self, name: str, count: int) -> tuple[str, Any]:
        instance = made((1000, 20_000, 150_000)[count % 3], StudyInstanceUID=f"1.2.{self.number}")
        return instance.uid, instance

    def talk(self) -> None:
        with Scu(self.here.ports["PACS"], [(SECONDARY, (EXPLICIT,))], calling=f"CT{self.number}") as scu:
            while self.more() or self.waiting:
                ((name, instance),) = self.waiting.items()
                assert scu.store(instance) == SUCCESS
                del self.waiting[name]


class Pushes(Load):
    """Nobody waits for the device: a push is accepted when it is in the queue file."""

    last = 0  # row of the queue that was seen

    def talk(self) -> None:
        link = eventually(lambda: self.here.sandbox.sandbox.agents.get(AGENT_ID), 30, "the agent is connected")
        self.more(IN_FLIGHT)
        with self.here.caller() as caller:
            for text in self.waiting.values():
                caller.call(destination="Device/feed", contentType=HL7_TYPE, body=text)
        eventually(lambda: self.settled(link), 30, "pushes are in the queue, or the agent is gone")

    def settled(self, link: Any) -> bool:
        gone = self.here.sandbox.sandbox.agents.get(AGENT_ID) is not link  # if so, what is not stored now is lost
        sql = "SELECT id, control_id FROM queue WHERE id > ? AND control_id LIKE 'PUSH%' ORDER BY id"
        with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(self.here.agent.database()) as db:
            for row_id, control in db.execute(sql, (self.last,)).fetchall():
                self.last = row_id
                if self.waiting.pop(control, ""):
                    self.sent[control] = self.sent.pop(control)  # to the end: the order of storing is what counts
            return gone or not self.waiting
        return False  # the agent opens the file


def counts(loads: list[Load]) -> Counter[str]:
    """How many are acknowledged, by channel."""
    return sum((Counter({load.channel: len(load.sent) - len(load.waiting)}) for load in loads), Counter[str]())


def wait_moment(loads: list[Load], running: list[Future[None]], moments: random.Random) -> None:
    """One time in four soon after the start; else until each kind went on, and one of them so far."""
    if not moments.randrange(4):
        loads[0].stop.wait(moments.uniform(0, 1.5))
        return
    before, kind, far = counts(loads), moments.choice(sorted(CHANNELS)), moments.randrange(1, 40)

    def went_on() -> bool:
        assert not [future.result() for future in running if future.done()], "a sender has ended"
        return (more := counts(loads) - before)[kind] >= far and len(more) == len(CHANNELS)

    eventually(went_on, 40, f"{far} more of {kind}")


def unsettled(here: Site) -> bool:
    with contextlib.closing(here.agent.database()) as db:
        sql = "SELECT 1 FROM queue WHERE state IN ('queued', 'inflight') UNION ALL SELECT 1 FROM partial"
        return bool(db.execute(sql).fetchone())


@pytest.mark.timeout(60 + 10 * KILLS)
def test_kills_under_four_kinds_of_load_at_once(tmp_path):
    """Nothing acknowledged is lost, whichever kind it is of; `site` looks for `Internal error`."""
    print(f"\nSEED={SEED}")
    moments, stop, started = random.Random(SEED), threading.Event(), time.monotonic()
    with site(tmp_path, CHANNELS, list(itertools.starmap(setting, AGAIN.items()))) as here, Receiver() as device:
        here.sandbox.bot = lambda transmit: accepting_bot(transmit) if transmit.content_type == HL7_TYPE else (200, "")
        here.sandbox.sandbox.binary_dir = tmp_path
        here.sandbox.sandbox.resources["Device/feed"] = {"resourceType": "Device", "url": device.url()}
        crowd = (Hl7, "FEED", 4), (Astm, "LAB", 3), (Images, "PACS", 2), (Pushes, "PUSH", 1)
        loads: list[Load] = [kind(here, stop, channel, n) for kind, channel, count in crowd for n in range(count)]
        with ThreadPoolExecutor(len(loads)) as pool, contextlib.ExitStack() as at_last:
            at_last.callback(stop.set)
            running = [pool.submit(load.run) for load in loads]
            for _ in range(KILLS):
                wait_moment(loads, running, moments)
                here.agent.kill()
                here.agent.start(ready=False)
        assert not any(future.result() for future in running)
        eventually(lambda: not unsettled(here), 120, "all settled")
        for load in loads:
            bodies = device.heard if isinstance(load, Pushes) else [t.body for t in of(here, load.channel)]
            ours = [(name, body) for body in bodies if (name := load.name_of(body)) in load.sent]
            assert not (lost := set(load.sent) - set(dict(ours))), f"{load.channel} lost {lost}"
            assert sorted(dict(ours), key=load.order) == sorted(load.sent, key=load.order), "first arrivals in order"
            for name, body in ours if isinstance(load, Images) else []:
                assert uploaded(here, json.loads(body))[1] == load.sent[name].content
        assert_no_spool(here)
    found, arrivals, seconds = counts(loads), len(here.sandbox.seen) + len(device.heard), time.monotonic() - started
    print(f"{KILLS} kills, {seconds:.0f} s, acknowledged {dict(found)}, {arrivals - found.total()} came again")
