"""ASTM over lines that damage what they carry: the real agent, and analyzers written from the standard alone."""

import contextlib
import functools
import itertools
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from medplum_agent import ASTM_TYPE
from tests.instruments import ACK, ENQ, EOT, ETX, NAK, STX, Cable, Instrument, body_of, frames_of, of, rows
from tests.support import Site, eventually, site

EVERY = 500  # bytes for each one that is lost, or has one of its bits flipped
REPLY_SECS = 2.5  # the standard's 15; more than the second that the agent takes to believe an ENQ or EOT after noise
TRIES = 6
PARAMETERS = "mode=astm&requireTerminator=true&maxFrame=60&receiveTimeoutSecs=3&replyTimeoutSecs=0.7&nakDelaySecs=0.2"
_FRAME = re.compile(rb"\x02([0-7][^\x02\x03\x17]*[\x03\x17])([0-9A-Fa-f]{2})")
Records = tuple[str, ...]


def sound(raw: bytes) -> list[bytes]:
    """The frames in these bytes whose checksum is right, from number to checksum."""
    found = _FRAME.findall(raw)
    return [body + digits.upper() for body, digits in found if sum(body) % 256 == int(digits, 16)]


class Noise:
    """Loses a byte, or flips one of its bits, once in EVERY bytes.

    Two errors in a frame can cancel out in its sum of bytes. What the standard's checksum cannot see is not damaged.
    """

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self.hits = 0

    def carry(self, content: bytes) -> bytes:
        while not set(sound(damaged := self._damaged(content))) <= set(sound(content)):
            pass
        return damaged

    def _damaged(self, content: bytes) -> bytes:
        carried = bytearray()
        for byte in content:
            if self._random.randrange(EVERY):
                carried.append(byte)
                continue
            self.hits += 1
            if self._random.random() < 0.75:
                carried.append(byte ^ 1 << self._random.randrange(8))
        return bytes(carried)


class Analyzer:
    """A well-behaved sender and receiver (E1381 6.2 to 6.5), with the standard's time-outs cut to a sixth."""

    def __init__(self, line: Instrument, seed: int, frames: Sequence[bytes] = ()):
        self.line = line
        self.out, self.back = Noise(seed), Noise(seed + 1000)
        self._received = b""
        self._true = set(itertools.chain(*map(sound, frames)))  # what can come: a sum that fits by chance is none
        self.restarts = 0

    def __enter__(self) -> "Analyzer":
        return self

    def __exit__(self, *_: object) -> None:
        self.line.close()

    def write(self, raw: bytes) -> None:
        self.line.write(self.out.carry(raw))

    def read(self, seconds: float = REPLY_SECS) -> bytes:
        """One byte, or none in this time."""
        if not self._received:
            self.line.more(seconds)
            self._received, self.line.buffer = self.back.carry(self.line.buffer), b""
        byte, self._received = self._received[:1], self._received[1:]
        return byte

    # --- sender ---

    def send(self, records: Records) -> None:
        """Until the other side has acknowledged every frame. A message that failed is sent again, from its start."""
        *frames, last = frames_of(*records, size=60)
        while not (self.granted() and all(self.reply(f) == ACK for f in frames) and self.reply(last) in (ACK, EOT)):
            self.restarts += 1
            self.write(EOT)
        self.write(EOT)

    def granted(self) -> bool:
        self.write(ENQ)
        return self.read() == ACK

    def reply(self, frame: bytes) -> bytes:
        """ACK; EOT, which is an ACK that asks us to stop; none, which ends the session. Anything else is NAK."""
        for _ in range(TRIES):
            self.write(frame)
            reply = self.read()
            if reply in (ACK, EOT, b""):
                return reply
        return NAK

    # --- receiver ---

    def receive(self, count: int, done: Callable[[], bool]) -> list[list[bytes]]:
        """Messages that end in their L record, until there are `count` and the other side is `done`."""
        messages: list[list[bytes]] = []
        session: list[bytes] = []
        while len(messages) < count or not done():
            byte = self.read(0.2)
            if byte == STX:
                self.judge(session)
            elif byte in (ENQ, EOT):
                if session and session[-1][1:].startswith(b"L"):
                    messages.append(texts(session))
                session = []
                if byte == ENQ:
                    self.write(ACK)
            elif not byte and done() and session:
                messages.append(texts(session))  # the last EOT was lost
                session = []
        return messages

    def judge(self, session: list[bytes]) -> None:
        """The rest of a frame, up to LF; STX begins it anew."""
        raw = STX
        while not raw.endswith(b"\n"):
            byte = self.read()
            if not byte:
                return
            raw = STX if byte == STX else raw + byte
        found = sound(raw)
        if not found or found[0] not in self._true:
            self.write(NAK)
            return
        if not session or session[-1] != found[0]:
            session.append(found[0])
        self.write(ACK)


def texts(session: Sequence[bytes]) -> list[bytes]:
    """The records of frames."""
    joined = b"".join(frame[1:-3] + (b"\0" if frame[-3:-2] == ETX else b"") for frame in session)
    return joined.split(b"\0")[:-1]


def message(name: str, draw: random.Random) -> Records:
    letters = "ABCDEFTUW$0123456789^ \x7f\xe4"
    rest = ["".join(draw.choices(letters, k=draw.randrange(90))) for _ in range(draw.randrange(1, 6))]
    return f"H|\\^&|||{name}", *(f"R|{n}|{text}|" for n, text in enumerate(rest, 1)), "L|1|N"


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, dict[str, Callable[[], Instrument]]]]:
    """An agent with a channel for each transport, and how to connect to it."""
    folder = tmp_path_factory.mktemp("lossy")
    channels = {"TCP": f"tcp://127.0.0.1:{{port}}?{PARAMETERS}"}
    with contextlib.ExitStack() as stack:
        opens: dict[str, Callable[[], Instrument]] = {"TCP": lambda: Instrument.at(here.ports["TCP"])}
        if shutil.which("socat"):
            cable = stack.enter_context(Cable(folder))
            channels["SERIAL"], opens["SERIAL"] = cable.address(channels["TCP"]), cable.open
        here = stack.enter_context(site(folder, channels, start=False))
        here.sandbox.bot = lambda transmit: (200, "")
        here.agent.start(ready=False)
        for name, address in channels.items():
            here.agent.logged("Medplum service started" if "{port}" in address else f"'{name}': serial://")
        here.agent.wait_connected()
        yield here, opens


def at_once(*works: Callable[[], Any]) -> None:
    """Each in a thread of its own; the first failure is raised."""
    failures: list[BaseException] = []

    def run(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads)


def once(found: Sequence[Any]) -> list[Any]:
    """Without repetitions that follow each other."""
    return [item for item, _ in itertools.groupby(found)]


def test_sessions_arrive_exactly_as_sent(lines):
    """Three analyzers on TCP and one on a serial port at the same time, each over a line of its own that lies.

    None is altered or lost or out of its analyzer's order. One may come twice: a sender that hears nothing after its
    last frame ends the session and sends the message again (E1381 6.5.2), and only the answer may have been lost.
    """
    here, opens = lines
    sent = {
        (channel, seed): [message(f"{channel}{seed}-{n}", draw) for n in range(15)]
        for channel, seed in [("TCP", 1), ("TCP", 2), ("TCP", 3), *[("SERIAL", 4)] * ("SERIAL" in opens)]
        for draw in [random.Random(seed)]
    }
    analyzers: list[Analyzer] = []

    def bodies(channel: str, seed: int) -> list[str]:
        return [t.body for t in of(here, channel) if f"|||{channel}{seed}-" in t.body]

    def send(channel: str, seed: int) -> None:
        messages = sent[channel, seed]
        with Analyzer(opens[channel](), seed) as analyzer:
            analyzers.append(analyzer)
            for records in messages:
                analyzer.send(records)
            here.sandbox.wait_for(lambda: bodies(channel, seed)[-1:] == [body_of(*messages[-1])])

    at_once(*[functools.partial(send, *line) for line in sent])
    for (channel, seed), messages in sent.items():
        wanted = [body_of(*records) for records in messages]
        assert once(bodies(channel, seed)) == wanted
        for dead in (r["original"].decode() for r in rows(here, channel) if r["state"] == "failed"):
            if f"|||{channel}{seed}-" in dead:  # what was acknowledged of a session that was begun anew
                assert any(body.startswith(dead.removesuffix("\n")) for body in wanted)
    hits, anew = sum(a.out.hits + a.back.hits for a in analyzers), sum(a.restarts for a in analyzers)
    repeated = sum(len(bodies(*line)) for line in sent) - 15 * len(sent)
    print(f"{hits} errors, {anew} messages begun anew, {repeated} came twice")
    assert hits > 20


def test_orders_arrive_exactly_as_sent(lines):
    """Stored pushes to an analyzer on each line; one may come twice for the same reason."""
    here, opens = lines
    hits: list[int] = []

    def receive(channel: str, seed: int) -> None:
        draw = random.Random(seed)
        orders = [message(f"{channel}-{n}", draw) for n in range(8)]
        frames = [frame for records in orders for frame in frames_of(*records, size=60)]
        with Analyzer(opens[channel](), seed, frames) as analyzer:
            eventually(lambda: not unsent(here, channel))
            with here.caller() as caller:
                caller.store(f"channel://{channel}", *(body_of(*records) for records in orders), contentType=ASTM_TYPE)
            found = analyzer.receive(len(orders), lambda: not unsent(here, channel))
            assert once(found) == [[f"{r}\r".encode("latin-1") for r in records] for records in orders]
            hits.append(analyzer.out.hits + analyzer.back.hits)

    at_once(*[functools.partial(receive, channel, seed) for seed, channel in enumerate(opens, 11)])
    assert sum(hits) > 5


def unsent(here: Site, channel: str) -> int:
    return sum(r["state"] in ("queued", "inflight") for r in rows(here, f"push channel://{channel}"))
