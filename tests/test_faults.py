"""Faults that public cases, hostile peers and failing machines found (issue 12), by the numbers of its list."""

import asyncio
import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from demo import Transmit

import medplum_agent
from medplum_agent import AgentSettings, ChannelPlan, ChannelRow, Hl7Settings, Message, Policy, Queue, StreamSettings
from tests.instruments import ACK, ENQ, EOT, NAK, Instrument, body_of, frames_of, of, rows
from tests.support import (
    AGENT_ID,
    ROOT,
    AgentProcess,
    Device,
    Receiver,
    SandboxThread,
    Site,
    accepts,
    acknowledgment,
    bot,
    control_id,
    eventually,
    log_lines,
    message,
    setting,
    site,
)

ASTM = "tcp://127.0.0.1:{port}?mode=astm"
RAW = "tcp://127.0.0.1:{port}?startChar=%02&endChar=%03&bodyEncoding=utf-8"
CALM = "PING"
RESULT = ("H|\\^&|||ABC", "P|1", "O|1|S1|GLU", "R|1|^^^GLU|5.4|mg/dL", "L|1|N")
SHORT_TIMES = "m.UNREAD_SECS = 0.5; m.UNFINISHED_BYTES = 6 * m.MIB; m.BIND_RETRY_SECS = 0.1"


def changed(agent: AgentProcess, code: str) -> None:
    """Run the agent with its module changed by `code`, in which it is called `m`: other limits, slower parts."""
    if os.environ.get("MEDPLUM_AGENT_BINARY"):
        pytest.skip("an executable cannot be changed")
    whole = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import medplum_agent as m\n{code}\nsys.exit(m.main())"
    agent.COMMAND = [sys.executable, "-c", whole]


def said(here: Site, *words: str, level: str = "", since: int = 0) -> list[str]:
    """The texts of the main log's lines that hold all these words."""
    lines = [line for line in log_lines(here.agent.main_log()[since:]) if level in ("", line["level"])]
    return [line["msg"] for line in lines if all(word in line["msg"] for word in words)]


def mark(here: Site) -> int:
    """Where the main log ends now."""
    return len(here.agent.main_log())


def says(here: Site, *words: str, level: str = "WARN", since: int = 0, timeout: float = 10) -> str:
    """The one line of the main log that holds all these words, once it is there."""

    def found() -> list[str]:
        return said(here, *words, level=level, since=since)

    eventually(found, timeout, f"{level} with {words} in {here.agent.main_log()[since:].decode()[-3000:]}")
    (text,) = found()
    return text


def name_of(device: Device) -> str:
    """How the log names its connection."""
    host, port = device.socket.getsockname()[:2]
    return f"{host}:{port}"


def silent_for(device: Device, seconds: float = 0.4) -> bytes:
    """What comes within the time, raw."""
    device.socket.settimeout(seconds)
    with contextlib.suppress(TimeoutError):
        return device.socket.recv(65536)
    return b""


def raw_message(control: bytes, text: bytes, *, patient: str = "PAT-1", charset: bytes = b"") -> bytes:
    """A message in bytes; `charset` is MSH-18."""
    head = b"MSH|^~\\&|ADT1|WARD|AGENT|SITE|20260101120000||ADT^A01|" + control + b"|P|2.5.1"
    head += b"||||||" + charset if charset else b""
    return head + b"\rPID|1||%b^^^HOSP^MR||" % patient.encode() + text + b"\r"


def body_with(here: Site, text: str, timeout: float = 10) -> Transmit:
    """The transmit whose body holds this text, once it is there."""

    def found() -> Transmit | None:
        return next((transmit for _, transmit in here.sandbox.seen if text in transmit.body), None)

    transmit = here.sandbox.wait_for(found, timeout, f"a transmit with {text!r}")
    assert transmit is not None
    return transmit


def dead(here: Site, channel: str, error: str = "interrupted-session") -> list[dict[str, Any]]:
    """The dead letters of a channel with this error."""
    return [row for row in rows(here, channel) if row["state"] in ("failed", "rejected") and row["error_code"] == error]


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One agent for what needs no agent of its own."""
    channels = {
        "ORIGINAL": "",
        "ENHANCED": "?enhanced=true",
        "AA": "?enhanced=aa",
        "REJECT": "?duplicateBehavior=reject",
        "WINDOW": "?duplicateWindowHours=0.0000003",
        "SMALL": "?maxMessageBytes=1024",
        "LATIN": "?encoding=latin1",
        "SJIS": "?encoding=shift_jis",
        "GB": "?encoding=gb2312",
        "KR": "?encoding=euc-kr",
        "HK": "?encoding=big5",
        "CP1252": "?encoding=win1252",
        "TEN": "?maxConnections=10&frameTimeoutSecs=0.5",
        "SHUT": "?peers=10.0.0.0/8,127.0.0.2",
        "ASTM": ASTM,
        "ASTM-7": f"{ASTM}&encoding=ascii&answerWaitMins=10&nakDelaySecs=0.2",
        "RAW": RAW,
        "RAW-SHORT": f"{RAW}&answerWaitMins=0.005",
        "RAW-SHUT": f"{RAW}&peers=10.0.0.0/8",
    }
    with site(tmp_path_factory.mktemp("faults"), channels, start=False) as running:
        changed(running.agent, SHORT_TIMES)
        running.agent.start()
        yield running


@pytest.fixture
def here(shared_site: Site) -> Iterator[Site]:
    """The running site with a well-behaved server again after each test."""
    yield shared_site
    faults, fresh = shared_site.sandbox.faults, type(shared_site.sandbox.faults)()
    for name in vars(fresh):
        setattr(faults, name, getattr(fresh, name))
    shared_site.sandbox.bot = bot("AA")


# --- A. lost, wrong, or the whole agent stands still ------------------------------------------------------------------


def fill(here: Site, channel: str) -> None:
    """Send until the queue has reached its limit."""
    with here.device(channel) as device:
        codes = (device.ask(message(f"FILL-{n}", patient=f"F{n}", size=200_000))[0] for n in range(20))
        assert "CE" in codes


def test_a1_a_full_queue_refuses_a_session_before_it_acknowledges_it(tmp_path):
    settings = [setting("queueMaxMb", 1)]
    channels = {"A": "?enhanced=true", "ASTM": ASTM, "REPLY": f"{RAW}&autoRespond=%05:%06,%03:%06"}
    with site(tmp_path, channels, settings) as here:
        here.sandbox.faults.silent = True
        begun = Instrument.at(here.ports["ASTM"])
        pieces = Instrument.at(here.ports["REPLY"])
        with begun, pieces:
            frames = frames_of(*RESULT)
            assert begun.ask(ENQ) == begun.ask(frames[0]) == begun.ask(frames[1]) == ACK
            assert pieces.ask(b"\x02half\x05") == ACK  # a part was acknowledged
            fill(here, "A")
            # refused from the start: nothing of it was acknowledged
            with Instrument.at(here.ports["ASTM"]) as late:
                if late.ask(ENQ) == ACK:
                    assert late.ask(frames[0]) == NAK
            with Instrument.at(here.ports["REPLY"]) as late:
                late.write(b"\x02another\x05\x03")
                assert late.quiet(0.3) == b""
            says(here, "REPLY", "limit")
            # what was acknowledged becomes a message, without any limit
            assert [begun.ask(frame) for frame in frames[2:]] == [ACK] * 3
            begun.write(EOT)
            body_with(here, body_of(*RESULT))
            pieces.write(b"whole\x03")
            body_with(here, "half\x05whole")
        here.agent.kill()
        here.sandbox.faults.silent = False
        here.agent.start()
        eventually(lambda: [r["state"] for name in ("ASTM", "REPLY") for r in rows(here, name)] == ["processed"] * 2)


@pytest.mark.parametrize("failures", [1, 3])
def test_a1_a_write_error_at_eot_loses_no_session(tmp_path, failures):
    with site(tmp_path, {"ASTM": ASTM, "A": ""}, start=False) as here:
        changed(
            here.agent,
            "import sqlite3; m.MUST_SECS = 0.1; insert, left = m.Store._insert, ['x'] * "
            f"{failures}\n"
            "def fail(self, db, messages):\n"
            "    if left and any(message.session for message in messages):\n"
            "        left.pop(); raise sqlite3.OperationalError('disk I/O error')\n"
            "    return insert(self, db, messages)\n"
            "m.Store._insert = fail",
        )
        here.agent.start()
        with Instrument.at(here.ports["ASTM"]) as instrument:
            instrument.session(*RESULT)
            body_with(here, body_of(*RESULT))
        assert len(of(here, "ASTM")) == 1
        with here.device("A") as device:
            assert device.ask(message("AFTER-ERROR")) == ("AA", "AFTER-ERROR")


def test_a1_a_kill_between_the_last_ack_and_eot_delivers_the_session(tmp_path):
    with site(tmp_path, {"ASTM": ASTM}) as here:
        half = Instrument.at(here.ports["ASTM"])
        with Instrument.at(here.ports["ASTM"]) as whole, half:
            whole.session(*RESULT, eot=False)
            half.session(*RESULT[:3], eot=False)
            here.agent.kill()
        here.agent.start()
        assert body_with(here, "L|1|N").body == body_of(*RESULT)
        eventually(lambda: sorted(r["state"] for r in rows(here, "ASTM")) == ["failed", "processed"])
        (letter,) = dead(here, "ASTM")
        assert letter["original"].decode() == body_of(*RESULT[:3])
        assert len(of(here, "ASTM")) == 1


@pytest.mark.parametrize("opening", [b"", ENQ])
@pytest.mark.parametrize("records", [("R|1|^^^GLU|9.9", "L|1|N"), ("P|1", "R|1|x", "L|1")])
def test_a2_half_a_session_is_no_result(here, opening, records):
    name = f"R|7|{time.monotonic_ns()}"
    with Instrument.at(here.ports["ASTM"]) as instrument:
        if opening:
            assert instrument.ask(opening) == ACK
        for frame in frames_of(name, *records):
            assert instrument.ask(frame) == ACK
        instrument.write(EOT)

        def letters() -> list[dict[str, Any]]:
            return [row for row in dead(here, "ASTM") if name.encode() in row["original"]]

        (letter,) = eventually(letters)
        assert "H record" in letter["last_error"]
        instrument.session(*RESULT)
    assert all(name not in transmit.body for transmit in of(here, "ASTM"))


def unnumbered(*records: str) -> list[bytes]:
    """Frames as instruments send them that know no numbers."""
    found = []
    for record in records:
        body = record.encode() + b"\r\x03"
        found.append(b"\x02%b%02X\r\n" % (body, sum(body) % 256))
    return found


def test_a2_frames_without_numbers_keep_their_first_letters(here):
    before = mark(here)
    records = ("H|\\^&|||NONUMBER", "P|1", "O|1|S9|GLU", "R|1|^^^GLU|1.1", "L|1|N")
    with Instrument.at(here.ports["ASTM"]) as instrument:
        assert instrument.ask(ENQ) == ACK
        assert [instrument.ask(frame) for frame in unnumbered(*records)] == [ACK] * 5
        instrument.write(EOT)
        assert body_with(here, "NONUMBER").body == body_of(*records)
        says(here, "ASTM", "number", since=before)
        assert instrument.ask(ENQ) == ACK  # among frames with numbers it is a fault of the line
        first, *_ = frames_of(*RESULT)
        assert instrument.ask(first) == ACK
        assert instrument.ask(unnumbered("P|1")[0]) == NAK


HUGE = (9223372036854775808, 2**70, -(2**63) - 1, 1e308, '"200"', "[200]", "true", "null", "{}")


def test_a3_no_number_from_the_server_stops_the_intake(here):
    here.sandbox.faults.silent = True
    with here.device("ENHANCED") as device:
        for number, status in enumerate(HUGE):
            control = f"HUGE-{number}"
            assert device.ask(message(control, patient=control)) == ("CA", control)
            here.sandbox.wait_ids(control)
            callback = here.sandbox.of(control)[0].callback
            text = (
                f'{{"type":"agent:transmit:response","statusCode":{status},"body":"\\u0000","callback":"{callback}"}}'
            )
            here.sandbox.tell(text.encode())
        for strange in ("9" * 30, "-1", "x"):
            text = f'{{"type":"agent:transmit:response","statusCode":200,"callback":"{callback[:-1]}{strange}"}}'
            here.sandbox.tell(text.encode())
        here.sandbox.faults.silent = False
        assert device.ask(message("AFTER-HUGE", patient="AFTER-HUGE"))[0] == "CA"
        here.agent.wait_state("AFTER-HUGE", "processed")
        for number in range(len(HUGE)):
            eventually(lambda c=f"HUGE-{number}": here.agent.rows(c)[0]["attempts"] > 0, what=f"HUGE-{number}")
    here.agent.wait_state("HUGE-0", "queued")  # no status of HTTP: an error of the server, tried again


def test_a4_files_that_the_cloud_names_hold_up_nothing_and_tell_nothing(here, tmp_path):
    fifo, folder, text = tmp_path / "fifo", tmp_path / "folder", tmp_path / "text"
    os.mkfifo(fifo)
    folder.mkdir()
    text.write_text("no certificate")
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(50 * 2**20)
    before, answers = mark(here), []
    paths = ["/dev/ptmx", "/dev/zero", "/dev/stdin", str(fifo), str(folder), str(text), str(large), "/nowhere/at/all"]
    with here.caller() as caller:
        for path in paths:
            for name in ("caFile", "certFile"):
                pushed = caller.push(f"mllps://127.0.0.1:1?{name}={path}", message("FILES-1"))
                assert pushed.status == 400 and pushed.seconds < 5, (path, pushed)
                answers.append(pushed.text)
        with here.device("ORIGINAL") as device:
            assert device.ask(message("FILES-2")) == ("AA", "FILES-2")
    assert len(set(answers)) == 1, set(answers)
    assert not any(path in answers[0] for path in paths)
    eventually(lambda: said(here, "/nowhere/at/all", since=before) or said(here, "No such file", since=before))


def test_a4_files_of_a_listening_channel_hold_up_nothing_and_tell_nothing(tmp_path):
    with site(tmp_path, {"A": "", "TLS": "mllps://127.0.0.1:{port}?certFile=/nowhere"}, start=False) as here:
        here.agent.start(ready=False)
        here.agent.wait_connected()
        answers = set()
        for path in ("/nowhere", "/dev/ptmx", "/dev/zero", str(tmp_path)):
            here.endpoint("TLS")["address"] = f"mllps://127.0.0.1:{here.ports['TLS']}?certFile={path}"
            answers.add(json.dumps(here.sandbox.reload()).replace(path, "FILE"))
        (answer,) = answers
        assert "TLS" in answer
        with here.device("A") as device:
            assert device.ask(message("LISTEN-1")) == ("AA", "LISTEN-1")


SHAPES: tuple[tuple[str, Any], ...] = (
    ("channel", ["x"]),
    ("channel", {"name": "A"}),
    ("channel", [{"name": ["A"], "endpoint": "x"}]),
    ("channel", [{"name": "A", "endpoint": {"reference": ["Endpoint/1"]}}]),
    ("setting", ["x"]),
    ("setting", [{"name": {"a": 1}, "valueString": [1]}, {"name": "queueMaxMb", "valueInteger": {}}]),
    ("status", ["active"]),
)


def test_a5_json_of_another_shape_does_not_end_the_start(tmp_path, monkeypatch):
    """At a start, with a configuration saved, and at a reload."""
    with site(tmp_path, {"A": ""}, start=False) as here:
        changed(here.agent, "m.HTTP_ATTEMPTS = 1; m.RECONNECT_BASE_SECS = m.RECONNECT_MAX_SECS = 0.05")
        here.agent.start()
        here.agent.logged("started successfully")
        agent = here.sandbox.resource(f"Agent/{AGENT_ID}")
        good = dict(agent)
        for name, value in SHAPES:
            agent[name] = value
            answer = here.sandbox.ask("agent:reloadconfig:request")
            assert "internal" not in str(answer), (name, value, answer)
            assert name in ("setting", "status") or answer["type"] == "agent:error", (name, value, answer)
            agent.update(good)
        assert here.sandbox.reload()["statusCode"] == 200

        respond = here.sandbox.sandbox._respond
        answered: Any = None

        async def odd(method, target, headers, body):
            if answered is not None and method == "GET" and "/Agent/" in target:
                return answered
            return await respond(method, target, headers, body)

        monkeypatch.setattr(here.sandbox.sandbox, "_respond", odd)
        odd_answers = [(502, {"issue": ["x"]}), (502, {"issue": {"details": "x"}}), (200, {"resourceType": "Agent"})]
        odd_answers += [(404, {"issue": [{"details": ["x"]}]}), *((200, good | {k: v}) for k, v in SHAPES[:5])]
        for answered in odd_answers:  # noqa: B007 (heard by `odd`)
            here.agent.kill()
            here.agent.start(ready=False)
            here.agent.wait_listening(10)
        with here.device("A") as device:
            assert device.ask(message("SHAPE-1")) == ("AA", "SHAPE-1")


class Clock:
    """The loop of a Queue, whose clock can be moved on."""

    def __init__(self) -> None:
        self.loop, self.ahead = asyncio.get_running_loop(), 0.0

    def time(self) -> float:
        return self.loop.time() + self.ahead

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)


class Rows:
    """A store without rows; `written` are copies of what was updated."""

    def __init__(self) -> None:
        self.failing: list[int] = []

    def update(self, message: Message, then: Callable[[], None] | None = None) -> None:
        self.failing.append(message.failing_ms)

    async def recover(self, *arguments: object) -> int:
        return 0

    async def queued(self, *arguments: object) -> list[Any]:
        return []


class Way:
    """A way and owner that takes everything and answers nothing."""

    is_open = True

    def ready(self) -> bool:
        return True

    def transmit(self, queue: Queue, message: Message) -> None:
        pass

    async def prepare(self, queue: Queue, message: Message) -> None:
        raise AssertionError("nothing has to be prepared")

    def text_of(self, message: Message, original: bytes) -> str:
        return original.decode()

    def answer(self, message: Message, body: object, error: str) -> bool:
        return True


def queue_of(clock: Clock, query: str = "enhanced") -> tuple[Queue, Rows]:
    plan = ChannelPlan("A", "mllp://h:1", "HL7", "", 1, True, Hl7Settings(enhanced="true"), frozenset())
    log: Any = medplum_agent.Log("main", medplum_agent.LoggerSettings(logLevel="NONE"), None, None)
    store: Any = Rows()
    way: Any = Way()
    queue = Queue(ChannelRow("A", "", 1), plan.policy, store, way, way, log)
    queue._loop = clock  # type: ignore[assignment]
    return queue, store


def stored_message(number: int) -> Message:
    found = Message(ChannelRow("A", "", 1), "127.0.0.1:1", b"text")
    found.id, found.text, found.key = number, "text", "patient"
    return found


HOUR = 3600.0


async def fails(queue: Queue, message: Message, error: str = "server-error", *, counts: bool = True) -> None:
    """It is sent, and fails."""
    if timer := queue._parked.get(message.id):
        timer.cancel()
        queue._unpark(message)
    while message.id not in queue.inflight:
        queue.pump()
        await asyncio.sleep(0)
    queue.failed(message, error, 500, counts=counts)


def test_a6_time_without_a_connection_does_not_age_a_message():
    async def run() -> None:
        clock = Clock()
        queue, store = queue_of(clock)
        message = stored_message(1)
        queue.stored(message)
        for _ in range(3):  # the link flaps
            await fails(queue, message, "connection-lost", counts=False)
            queue.lost()
            clock.ahead += 1
        clock.ahead += 73 * HOUR
        await fails(queue, message, "connection-lost", counts=False)
        assert message.state == medplum_agent.QUEUED
        queue.lost()
        clock.ahead += 73 * HOUR
        await fails(queue, message)
        assert message.state == medplum_agent.QUEUED
        clock.ahead += 71 * HOUR  # connected, and failing
        await fails(queue, message)
        assert message.state == medplum_agent.QUEUED
        assert store.failing[-1] == pytest.approx(71 * HOUR * 1000, rel=0.01)  # so a restart does not forget it
        clock.ahead += 2 * HOUR
        await fails(queue, message)
        assert message.state == medplum_agent.FAILED

    asyncio.run(run())


def test_a6_the_time_of_failing_outlives_a_restart():
    async def run() -> None:
        clock = Clock()
        queue, _ = queue_of(clock)
        message = stored_message(1)
        message.failing_ms, message.attempts = round(71.5 * HOUR * 1000), 30  # as it was read from disk
        queue.stored(message)
        await fails(queue, message)
        assert message.state == medplum_agent.QUEUED
        clock.ahead += HOUR
        await fails(queue, message)
        assert message.state == medplum_agent.FAILED
        assert "failing_ms" in medplum_agent._CHANGED and "failing_ms" in medplum_agent._READ

    asyncio.run(run())


@pytest.mark.parametrize("jump_days", [366, -366])
def test_a6_a_clock_that_jumps_buries_nothing(monkeypatch, jump_days):
    async def run() -> None:
        clock = Clock()
        queue, _ = queue_of(clock)
        message = stored_message(1)
        queue.stored(message)
        for _ in range(3):
            await fails(queue, message)
            clock.ahead += 1
        now = medplum_agent.now_ms() + jump_days * 86_400_000
        monkeypatch.setattr(medplum_agent, "now_ms", lambda: now)
        await fails(queue, message)
        assert message.state == medplum_agent.QUEUED

    asyncio.run(run())


def test_a6_a_policy_counts_failing_time_and_tries():
    policy = Policy("x", 1, "enhanced", 60, 1000, 60_000, 2, 20, 72)
    assert not policy.spent(3, 0) and not policy.spent(19, round(72 * HOUR * 1000))
    assert policy.spent(3, round(72 * HOUR * 1000) + 1) and policy.spent(20, 0)


def test_a6_a_clock_that_jumps_lets_the_sweep_drop_no_dead_letter(tmp_path, monkeypatch):
    async def run() -> None:
        log: Any = medplum_agent.Log("main", medplum_agent.LoggerSettings(logLevel="NONE"), None, None)
        store = medplum_agent.Store(tmp_path / "queue.sqlite", log)
        await store.open()
        row = store.channel("A")
        done = asyncio.Event()
        letter = Message(row, "127.0.0.1:1", bytes(3 * 2**20))
        letter.end(medplum_agent.FAILED, medplum_agent.NOT_OWED, "server-error", "x")
        letter.source = lambda message: done.set()
        await store.call(lambda db: None)
        letter.channel = row.id
        store.put(letter)
        await done.wait()
        settings = AgentSettings(queueRetentionMaxMb=1)
        assert (await store.sweep(settings))[1] == 0
        later = medplum_agent.now_ms() + 366 * 86_400_000
        monkeypatch.setattr(medplum_agent, "now_ms", lambda: later)
        assert (await store.sweep(settings))[1] == 0
        await store.close()

    asyncio.run(run())
