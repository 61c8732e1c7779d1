"""Faults that public cases, hostile peers and failing machines found (issue 12), by the numbers of its list."""

import asyncio
import contextlib
import functools
import io
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from demo import Transmit

import medplum_agent
from medplum_agent import AgentSettings, ChannelPlan, ChannelRow, Hl7Settings, Message, Policy, Queue
from tests.dicom_peers import made, store
from tests.instruments import ACK, ENQ, EOT, NAK, Instrument, body_of, frames_of, of, rows
from tests.support import (
    AGENT_ID,
    AgentProcess,
    Device,
    Receiver,
    SandboxThread,
    Site,
    accepts,
    acknowledgment,
    bot,
    changed,
    control_id,
    eventually,
    log_lines,
    message,
    setting,
    site,
)

ASTM = "tcp://127.0.0.1:{port}?mode=astm"
RAW = "tcp://127.0.0.1:{port}?startChar=%02&endChar=%03&bodyEncoding=utf-8"
RESULT = ("H|\\^&|||ABC", "P|1", "O|1|S1|GLU", "R|1|^^^GLU|5.4|mg/dL", "L|1|N")
SHORT_TIMES = "m.UNREAD_SECS = 0.5; m.UNFINISHED_BYTES = 6 * m.MIB; m.BIND_RETRY_SECS = 0.1"


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
    usual = device.socket.gettimeout()
    device.socket.settimeout(seconds)
    try:
        return device.socket.recv(65536)
    except TimeoutError:
        return b""
    finally:
        device.socket.settimeout(usual)


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


def open_again(here: Site) -> None:
    """Start the agent, and wait for the ports of all its channels."""
    here.agent.start()
    eventually(lambda: all(accepts(("127.0.0.1", port)) for port in here.ports.values()))


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
        running.sandbox.bot = usual
        open_again(running)
        yield running


def usual(transmit: Transmit) -> tuple[int, Any]:
    """Instruments get no answer."""
    return bot("AA")(transmit) if transmit.body.startswith("MSH") else (200, "")


@pytest.fixture
def here(shared_site: Site) -> Iterator[Site]:
    """The running site with a well-behaved server again after each test."""
    yield shared_site
    faults, fresh = shared_site.sandbox.faults, type(shared_site.sandbox.faults)()
    for name in vars(fresh):
        setattr(faults, name, getattr(fresh, name))
    shared_site.sandbox.bot = usual


# --- A. lost, wrong, or the whole agent stands still ------------------------------------------------------------------


def fill(here: Site, channel: str) -> None:
    """Bring the queue above its limit, which is then 1 MiB."""
    with here.device(channel) as device:
        for n in range(6):
            assert device.ask(message(f"FILL-{n}", patient=f"F{n}", size=250_000))[0] == "CA"
        here.sandbox.resource(f"Agent/{AGENT_ID}")["setting"] = [setting("queueMaxMb", 1)]
        assert here.sandbox.reload()["statusCode"] == 200
        assert device.ask(message("FILLED"))[0] == "CE"


def test_a1_a_full_queue_refuses_a_session_before_it_acknowledges_it(tmp_path):
    channels = {"A": "?enhanced=true", "ASTM": ASTM, "REPLY": f"{RAW}&autoRespond=%05:%06,%03:%06"}
    with site(tmp_path, channels, start=False) as here:
        open_again(here)
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
            assert said(here, "REPLY", "limit", level="WARN")
            # what was acknowledged becomes a message, without any limit
            assert [begun.ask(frame) for frame in frames[2:]] == [ACK] * 3
            begun.write(EOT)
            body_with(here, body_of(*RESULT))
            pieces.write(b"whole\x03")
            body_with(here, "half\x05whole")
        here.agent.kill()
        here.sandbox.faults.silent = False
        open_again(here)
        eventually(lambda: [r["state"] for name in ("ASTM", "REPLY") for r in rows(here, name)] == ["processed"] * 2)


@pytest.mark.parametrize("failures", [1, 3])
def test_a1_a_write_error_at_eot_loses_no_session(tmp_path, failures):
    with site(tmp_path, {"ASTM": ASTM, "A": ""}, start=False) as here:
        changed(
            here.agent,
            "import apsw; m.MUST_SECS = 0.1; insert, left = m.Store._insert, ['x'] * "
            f"{failures}\n"
            "def fail(self, db, messages):\n"
            "    if left and any(message.session for message in messages):\n"
            "        left.pop(); raise apsw.IOError('disk I/O error')\n"
            "    return insert(self, db, messages)\n"
            "m.Store._insert = fail",
        )
        open_again(here)
        with Instrument.at(here.ports["ASTM"]) as instrument:
            instrument.session(*RESULT)
            body_with(here, body_of(*RESULT))
        assert len(of(here, "ASTM")) == 1
        with here.device("A") as device:
            assert device.ask(message("AFTER-ERROR")) == ("AA", "AFTER-ERROR")


def test_a1_a_kill_between_the_last_ack_and_eot_delivers_the_session(tmp_path):
    with site(tmp_path, {"ASTM": ASTM}, start=False) as here:
        open_again(here)
        half = Instrument.at(here.ports["ASTM"])
        with Instrument.at(here.ports["ASTM"]) as whole, half:
            whole.session(*RESULT, eot=False)
            half.session(*RESULT[:3], eot=False)
            here.agent.kill()
        open_again(here)
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


def was_tried(here: Site, control: str) -> bool:
    return bool(here.agent.rows(control)[0]["attempts"] > 0)


HUGE = (9223372036854775808, 2**70, -(2**63) - 1, 1e308, '"200"', "[200]", "true", "null", "{}")


def test_a3_no_number_from_the_server_stops_the_intake(here):
    here.sandbox.faults.silent, callback = True, ""
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
            eventually(functools.partial(was_tried, here, f"HUGE-{number}"))
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
            answers.add(str(here.sandbox.reload()["body"]).replace(path, "FILE"))
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
        odd_answers = [(502, {"issue": ["x"]}), (502, {"issue": {"details": "x"}})]
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
    """A store with one row; `failing` is what was written of its time of failing."""

    released = 1 << 62

    def __init__(self, *messages: Message) -> None:
        self.messages = list(messages)
        self.failing: list[int] = []
        self.known: dict[int, Queue] = {}
        self.known_bytes = self.late_bytes = 0

    def update(self, message: Message, then: Callable[[], None] | None = None) -> None:
        self.failing.append(message.failing_ms)

    async def recover(self, *arguments: object) -> int:
        return 0

    async def queued(self, *arguments: object) -> list[Any]:
        found, self.messages = self.messages, []
        return [(message, b"text") for message in found]


class Way:
    """A way and owner that takes everything and answers nothing."""

    is_open = True

    def ready(self) -> bool:
        return True

    def transmit(self, queue: Queue, message: Message) -> None:
        pass

    def is_leaving(self, message: Message) -> bool:
        return False

    async def prepare(self, queue: Queue, message: Message) -> None:
        raise AssertionError("nothing has to be prepared")

    def text_of(self, message: Message, original: bytes) -> str:
        return original.decode()

    def answer(self, message: Message, body: object, error: str) -> bool:
        return True


def queue_of(clock: Clock, message: Message) -> tuple[Queue, Rows]:
    plan = ChannelPlan("A", "mllp://h:1", "HL7", "", 1, True, Hl7Settings(enhanced="true"), frozenset())
    log: Any = medplum_agent.Log("main", medplum_agent.LoggerSettings(logLevel="NONE"), None, None)
    store: Any = Rows(message)
    way: Any = Way()
    queue = Queue(ChannelRow("A", "", 1), plan.policy, store, way, way, log)
    queue._loop = clock  # type: ignore[assignment]
    queue.pump()
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
        message = stored_message(1)
        queue, store = queue_of(clock, message)
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
        message = stored_message(1)
        message.failing_ms, message.attempts = round(71.5 * HOUR * 1000), 30  # as it was read from disk
        queue, _ = queue_of(clock, message)
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
        message = stored_message(1)
        queue, _ = queue_of(clock, message)
        for _ in range(3):
            await fails(queue, message)
            clock.ahead += 1
        now = medplum_agent.now_ms() + jump_days * 86_400_000
        monkeypatch.setattr(medplum_agent, "now_ms", lambda: now)
        await fails(queue, message)
        assert message.state == medplum_agent.QUEUED

    asyncio.run(run())


def test_a6_a_policy_counts_failing_time_and_tries():
    policy = Policy("x", Hl7Settings(autoRetryMaxAttempts=20, deadLetterAfterHours=72), "enhanced", 1, 60)
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
        now = medplum_agent.now_ms()
        later = now + 366 * 86_400_000
        monkeypatch.setattr(medplum_agent, "now_ms", lambda: later)
        assert (await store.sweep(settings, now))[1] == 0
        await store.close()

    asyncio.run(run())


# A7: the write-ahead log


def filled_wal(here: Site) -> Path:
    """A queue whose newest messages are in the WAL alone, of an agent that was killed."""
    here.sandbox.faults.silent = True
    here.agent.start()
    with here.device("A") as device:
        for n in range(12):
            assert device.ask(message(f"WAL-{n}", patient=f"W{n}", size=9000))[0] == "CA"
    here.agent.kill()
    here.sandbox.faults.silent = False
    wal = here.agent.queue_path.with_name(here.agent.queue_path.name + "-wal")
    assert wal.stat().st_size > 32 + 10 * (24 + medplum_agent.PAGE_BYTES)
    return wal


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes((byte[0] ^ 1,)))


FRAME = 24 + medplum_agent.PAGE_BYTES


@pytest.mark.parametrize(
    "at",
    [32 + 2 * FRAME + 24 + 4000, 32 + FRAME + 3, 32 + 2 * FRAME + 9, 32 + FRAME + 20, 11, 17, 25],
    ids=["page", "page number", "salt", "checksum", "header size", "header salt", "header checksum"],
)
def test_a7_a_flipped_bit_in_the_wal_is_said_and_both_files_are_kept(tmp_path, at):
    with site(tmp_path, {"A": "?enhanced=true"}, start=False) as here:
        wal = filled_wal(here)
        flip(wal, at)
        damaged, main = wal.read_bytes(), here.agent.queue_path.read_bytes()
        before = mark(here)
        here.agent.start()
        eventually(lambda: said(here, "lost", level="ERROR", since=before), what="ERROR that names the loss")
        copies = {path.read_bytes() for path in here.agent.state_dir.glob("*damaged*")}
        assert copies == {damaged, main}
        with here.device("A") as device:
            device.send(message("AFTER-WAL", patient="NEW"))
            while device.ack() != ("CA", "AFTER-WAL"):  # answers to earlier messages come between
                pass
        here.agent.wait_state("AFTER-WAL", "processed")


@pytest.mark.parametrize("torn", [1, 100, FRAME - 10, "flip"])
def test_a7_a_torn_last_frame_is_what_a_power_cut_leaves(tmp_path, torn):
    with site(tmp_path, {"A": "?enhanced=true"}, start=False) as here:
        wal = filled_wal(here)
        if isinstance(torn, int):
            os.truncate(wal, wal.stat().st_size - torn)
        else:
            flip(wal, wal.stat().st_size - 100)
        before = mark(here)
        here.agent.start()
        with here.device("A") as device:
            device.send(message("AFTER-WAL", patient="NEW"))
            while device.ack() != ("CA", "AFTER-WAL"):  # answers to earlier messages come between
                pass
        here.sandbox.wait_ids("WAL-0", "WAL-9", "AFTER-WAL")
        assert not said(here, level="ERROR", since=before)
        assert not [*here.agent.state_dir.glob("*damaged*")]


# A8: text that the encoding does not hold


@pytest.mark.parametrize(
    ("channel", "codec", "text"),
    [
        ("SJIS", "cp932", "髙﨑^①"),
        ("SJIS", "cp932", "ソ表～"),
        ("GB", "gb18030", "镕^喆"),
        ("KR", "cp949", "똠방^각하"),
        ("HK", "big5hkscs", "鰂^咗"),
        ("CP1252", "cp1252", "Müller^€"),
        ("LATIN", "latin-1", "Müller^\x85"),
    ],
)
def test_a8_a_name_of_an_encoding_means_what_devices_send(here, channel, codec, text):
    control = f"CODEC-{channel}-{len(text)}-{ord(text[0])}"
    here.sandbox.bot = lambda transmit: (200, bot("AA", text)(transmit)[1])
    with here.device(channel) as device:
        device.send(raw_message(control.encode(), text.encode(codec)))
        answer = device.receive_bytes().decode(codec)
    assert f"||{text}\r" in body_with(here, control).body
    assert f"MSA|AA|{control}|{text}" in answer


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("win1252", "cp1252"), ("windows1252", "cp1252"), ("Windows-1252", "cp1252"), ("iso88591", "latin-1"),
        ("latin1", "latin-1"), ("ISO-8859-1", "latin-1"), ("8859/1", "latin-1"), ("iso8859-15", "iso8859-15"),
        ("koi8r", "koi8_r"), ("usascii", "us_ascii"), ("binary", "latin-1"), ("shiftjis", "cp932"),  # iconv's spellings
        ("windows31j", "cp932"), ("koi8u", "koi8-u"), ("euckr", "cp949"), ("cp874", "cp874"), ("tis620", "cp874"),
        ("utf8", "utf-8"), ("UTF-8", "utf-8"), ("shift-jis", "cp932"), ("Shift_JIS", "cp932"), ("sjis", "cp932"),
        ("ms932", "cp932"), ("windows-31j", "cp932"), ("euc-kr", "cp949"), ("ks_c_5601-1987", "cp949"),
        ("gb2312", "gb18030"), ("big5", "big5hkscs"), ("koi8-r", "koi8-r"), ("cp1251", "cp1251"),
    ],
)  # fmt: skip
def test_a8_all_usual_spellings(name, codec):
    medplum_agent.check_encoding(name)
    samples = {"cp932": "髙①", "gb18030": "镕", "cp949": "똠", "big5hkscs": "鰂"}
    samples |= {"koi8-r": "ж", "koi8_r": "ж", "koi8-u": "ї", "cp1251": "ж", "us_ascii": "e", "cp874": "ไ"}
    text = samples.get(codec, "é")
    assert text.encode(codec).decode(medplum_agent.codec_of(name)) == text
    if name.lower().replace("-", "").replace("_", "") in ("iso88591", "latin1"):
        assert bytes(range(128, 160)).decode(medplum_agent.codec_of(name)).encode("latin-1")[5] == 0x85


def test_a8_bytes_that_cannot_be_decoded_are_named_once_and_kept(here):
    before, content = mark(here), b""
    with here.device("ORIGINAL") as device:
        for n in range(3):
            content = raw_message(b"BYTES-%d" % n, b"M\xfcller")
            device.send(content)
            assert device.ack() == ("AA", f"BYTES-{n}")
        text = says(here, name_of(device), "0xFC", "PID-5", "encoding=", since=before)
        assert "ller" not in text
    assert here.agent.rows("BYTES-2")[0]["original"] == content


@pytest.mark.parametrize(
    ("charset", "codec"), [(b"8859/1", "latin-1"), (b"8859/2", "iso8859-2"), (b"GB 18030-2000", "gb18030")]
)
def test_a8_msh_18_counts_where_the_address_names_no_encoding(here, charset, codec):
    control, before = f"MSH18-{codec}", mark(here)
    text = "漢" if codec == "gb18030" else "Mü"
    here.sandbox.bot = lambda transmit: (200, bot("AA", text)(transmit)[1])
    with here.device("ORIGINAL") as device, here.device("SJIS") as other:
        device.send(raw_message(control.encode(), text.encode(codec), charset=charset))
        assert text in device.receive_bytes().decode(codec)
        other.send(raw_message(f"{control}-SJIS".encode(), "髙".encode("cp932"), charset=charset))
        other.receive_bytes()
    assert f"||{text}\r" in body_with(here, f"|{control}|").body
    assert "||髙\r" in body_with(here, f"|{control}-SJIS|").body
    assert not said(here, "U+FFFD", since=before)


def test_a8_a_control_id_is_compared_and_echoed_byte_for_byte(here):
    with here.device("ENHANCED") as device:
        for control in (b"ID-\xe9", b"ID-\xe8", b"ID-\xe9\xff"):
            device.send(raw_message(control, b"x"))
            answers = [device.receive_bytes(), device.receive_bytes()]
            assert b"MSA|CA|" + control + b"|" in answers[0], answers
    with contextlib.closing(here.agent.database()) as db:
        assert db.execute("SELECT count(*) FROM queue WHERE control_id LIKE 'ID-%'").fetchone() == (3,)


@pytest.mark.parametrize(
    "answers", [lambda transmit: (200, ""), lambda transmit: (400, ""), bot("AA")], ids=["silent", "fails", "echoes"]
)
def test_a8_the_answer_in_original_mode_echoes_the_control_id_too(here, request, answers):
    here.sandbox.bot = answers
    with here.device("ORIGINAL") as device:
        for control in (b"%b-\xe9" % request.node.callspec.id.encode(), b"%b-\xe8" % request.node.callspec.id.encode()):
            device.send(raw_message(control, b"x"))
            assert b"|" + control + b"|" in device.receive_bytes()


@pytest.mark.parametrize(
    ("scheme", "query", "body", "kind"),
    [
        ("mllp", "?encoding=latin1", message("LACKS-1", text="5 €"), medplum_agent.HL7_TYPE),
        ("mllp", "?encoding=shift_jis", message("LACKS-2", text="5 €"), medplum_agent.HL7_TYPE),
        ("tcp", "?bodyEncoding=utf-8&encoding=latin1", "5 €", medplum_agent.BYTES_TYPE),
        ("tcp", "?mode=astm&encoding=latin1", "H|\\^&\nP|1||5 €\nL|1|N\n", medplum_agent.ASTM_TYPE),
    ],
)
def test_a8_a_push_that_its_device_cannot_hold_is_refused(here, scheme, query, body, kind):
    with socket.create_server(("127.0.0.1", 0)) as listener, here.caller() as caller:
        url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}{query}"
        answer = caller.push(url, body, contentType=kind)
        assert answer.status == 400 and "€" in answer.text, answer
        assert answer.seconds < 5
        caller.store(url, body, contentType=kind)
        with contextlib.closing(here.agent.database()) as db:

            def letters() -> list[Any]:
                sql = (
                    "SELECT state, last_error FROM queue WHERE channel_name LIKE ? AND state IN ('rejected', 'failed')"
                )
                return db.execute(sql, (f"push %{listener.getsockname()[1]}%",)).fetchall()

            eventually(letters, what="a dead letter")


def test_a8_a_bots_answer_that_its_device_cannot_hold_goes_out_with_a_warning(here):
    before = mark(here)
    here.sandbox.bot = bot("AA", "5 €")
    with here.device("LATIN") as device:
        device.send(message("LACKS-3"))
        assert "|5 ?" in device.receive_bytes().decode("latin-1")
        says(here, name_of(device), "20AC", since=before)
    here.sandbox.bot = lambda transmit: (200, "H|\\^&\nP|1||5 €\nL|1|N\n")
    with Instrument.at(here.ports["ASTM-7"]) as instrument:
        instrument.session(*RESULT)
        assert b"P|1||5 ?\r" in instrument.accept()
        says(here, "ASTM-7", "20AC", since=before)


@pytest.mark.parametrize(
    ("held", "sent"),
    [("a\x1c\rb", "a\\X1C\\\\X0D\\b"), ("a\x0bb", "a\\X0B\\b"), ("a\x1cb", "a\\X1C\\b"), ("\x0bMSH|x", "\\X0B\\MSH|x")],
)
def test_a8_what_would_end_a_frame_is_escaped(here, held, sent):
    control = f"FRAME-{abs(hash(held))}"
    here.sandbox.bot = bot("AA", held)
    with here.device("ORIGINAL") as device:
        device.send(message(control))
        assert f"MSA|AA|{control}|{sent}" in device.receive()
    with Receiver() as receiver, here.caller() as caller:
        assert caller.push(receiver.url(), message(control, text=held)).status == 200
        receiver.wait_ids(control)
        assert f"NTE|1||{sent}\r" in receiver.heard[0]


# A9: poison

POISON = "POISON"


def refuses_poison(transmit: Transmit) -> tuple[int, Any]:
    if POISON in transmit.body:
        return 400, {"resourceType": "OperationOutcome", "issue": [{"code": "exception"}]}
    return (200, "") if transmit.channel in ("ASTM", "RAW") else bot("AA")(transmit)


def test_a9_poison_gives_way_within_ten_seconds(tmp_path):
    """Real times, on all kinds of channel at once."""
    fast = "autoRetryBaseDelayMs=5&autoRetryMaxDelayMs=10"
    channels = {
        "ENHANCED": "?enhanced=true",
        "AA": "?enhanced=aa",
        "SINGLE": "?enhanced=aa&maxWorkers=1",
        "WRITTEN": f"?enhanced=aa&autoRetryMaxAttempts=6&{fast}",
        "ASTM": ASTM,
        "RAW": RAW,
    }
    with site(tmp_path, channels, start=False) as here:
        open_again(here)
        here.sandbox.bot = refuses_poison
        started = time.monotonic()
        devices = {name: here.device(name) for name in channels if name not in ("ASTM", "RAW")}
        instruments = {name: Instrument.at(here.ports[name]) for name in ("ASTM", "RAW")}
        with contextlib.ExitStack() as stack:
            lines: list[Any] = [*devices.values(), *instruments.values()]
            for line in lines:
                stack.enter_context(line)
            for name, device in devices.items():
                device.send(message(f"{POISON}-{name}", "A"))
                others = [message(f"{name}-1", ""), message(f"{name}-2", "A"), message(f"{name}-3", "C")]
                device.send(*others, message(f"{name}-4", ""))
            instruments["ASTM"].session("H|\\^&", f"R|1|{POISON}", "L|1")
            instruments["ASTM"].session("H|\\^&", "R|1|ASTM-1", "L|1")
            instruments["RAW"].write(f"\x02{POISON}\x03\x02RAW-1\x03".encode())
            for name in devices:
                here.sandbox.wait_ids(*(f"{name}-{n}" for n in range(1, 5)), timeout=12)
            body_with(here, "ASTM-1", 12)
            body_with(here, "RAW-1", 12)
            assert time.monotonic() - started < 12
            for name in ("ENHANCED", "AA", "SINGLE", "WRITTEN"):
                row = here.agent.wait_state(f"{POISON}-{name}", "rejected")
                assert row["attempts"] == (6 if name == "WRITTEN" else 3)
            for name in ("ASTM", "RAW"):
                assert len(dead(here, name, "server-rejected")) == 1
            for name in ("ENHANCED", "AA", "SINGLE", "ASTM", "RAW"):
                told = [*said(here, f"'{name}'", level="WARN"), *said(here, f"'{name}'", level="ERROR")]
                assert 1 <= len(told) <= 3, told


def test_a9_while_all_fail_no_message_uses_up_its_tries(tmp_path):
    """What is tried alone has twenty; where somebody wrote how many, they count as they are."""
    fast = "enhanced=aa&autoRetryBaseDelayMs=2&autoRetryMaxDelayMs=4"
    written, single = f"?{fast}&autoRetryMaxAttempts=20", f"?{fast}&maxWorkers=1"
    with site(tmp_path, {"A": f"?{fast}", "WRITTEN": written, "SINGLE": single}) as here:
        tries: Counter[str] = Counter()

        def out_of_order(transmit):
            control = transmit.body.split("|")[9]
            tries[control] += 1
            return (503, "") if tries[control] < 60 or control == "ALONE" else bot("AA")(transmit)

        here.sandbox.bot = out_of_order
        for name in ("A", "WRITTEN", "SINGLE"):
            with here.device(name) as device:
                assert [device.ask(message(f"{name}-{n}", str(n)))[0] for n in range(4)] == ["AA"] * 4
        for n in range(4):
            assert here.agent.wait_state(f"A-{n}", "processed")["attempts"] == 60
            for name in ("WRITTEN", "SINGLE"):
                assert here.agent.wait_state(f"{name}-{n}", "failed")["attempts"] == 20
        with here.device("A") as device:
            assert device.ask(message("ALONE", "A"))[0] == "AA"
        assert here.agent.wait_state("ALONE", "failed")["attempts"] == 20


def test_a9_many_refused_before_a_barrier_hold_it_up_no_longer_than_their_tries(tmp_path):
    with site(tmp_path, {"A": "?enhanced=aa&autoRetryBaseDelayMs=2&autoRetryMaxDelayMs=4"}) as here:
        here.sandbox.bot = refuses_poison
        with here.device("A") as device:
            for n in range(4):
                assert device.ask(message(f"{POISON}-{n}", str(n)))[0] == "AA"
            for control, patient in (("BEAT", ""), ("GOOD", "G")):
                assert device.ask(message(control, patient))[0] == "AA"
        here.sandbox.wait_ids("BEAT", "GOOD")


def test_a9_two_poisons_before_a_barrier_hold_up_nobody_either(tmp_path):
    """The channel has passed others before, and others pass on the other channel."""
    with site(tmp_path, {"A": "?enhanced=true", "B": "?enhanced=true"}, start=False) as here:
        changed(here.agent, "m.POISON_DELAY_MS = 300")
        here.agent.start()
        here.sandbox.bot = refuses_poison
        with here.device("A") as device, here.device("B") as other:
            assert device.ask(message("BEFORE"))[0] == "CA"
            here.agent.wait_state("BEFORE", "processed")
            device.send(message(f"{POISON}-1", "A"), message(f"{POISON}-2", "B"), message("BARRIER", ""))
            other.send(message("PASSES"))
            here.sandbox.wait_ids("PASSES", "BARRIER", timeout=10)


def test_a9_an_outage_keeps_the_long_schedule(tmp_path):
    """The Bot refuses everybody: nothing but the first becomes a dead letter soon."""
    with site(tmp_path, {"A": "?enhanced=true", "B": "?enhanced=aa"}, start=False) as here:
        changed(here.agent, "m.POISON_DELAY_MS = 50")
        here.agent.start()
        here.sandbox.bot = lambda transmit: (400, "") if transmit.channel == "A" else (503, "")
        with here.device("A") as device, here.device("B") as other:
            for n in range(8):
                assert device.ask(message(f"OUT-{n}", f"P{n}"))[0] == "CA"
                assert other.ask(message(f"DOWN-{n}", f"P{n}"))[0] == "AA"
            here.sandbox.wait_for(lambda: len(here.sandbox.of("OUT-7")) >= 3, 15)
            states = [here.agent.rows(f"OUT-{n}")[0]["state"] for n in range(8)]
            assert states.count("rejected") <= 1, states
            assert {here.agent.rows(f"DOWN-{n}")[0]["state"] for n in range(8)} == {"queued"}
            here.sandbox.bot = bot("AA")
            here.sandbox.wait_for(lambda: here.agent.rows("OUT-7")[0]["state"] == "processed", 25)


# --- B. feeds that stop -----------------------------------------------------------------------------------------------


def test_b10_sender_and_control_id_name_a_message(here):
    """Further cases: test_end_to_end's test_a_control_id_with_other_content_is_a_new_message and its neighbours."""
    before = mark(here)
    first = message("SAME-1", "S1")
    with here.device("ENHANCED") as device, here.device("ENHANCED") as other:
        for text in (first, first.replace("|ADT1|", "|ADT2|"), first.replace("|WARD|", "|LAB|")):
            device.send(text)
            assert device.heard(2) == [("CA", "SAME-1"), ("AA", "SAME-1")]
        assert not said(here, "other content", since=before)
        other.send(first.replace("20260101120000", "20260101120001"))
        assert {other.ack(), *other.drain(0.1)} <= {("CA", "SAME-1"), ("AA", "SAME-1")}
        assert len(here.sandbox.of("SAME-1")) == 3
        says(here, "came again", name_of(other), level="INFO", since=before)
        for n in range(3):
            device.send(first.replace("Paula", f"Paula{n}"))
            assert device.heard(2) == [("CA", "SAME-1"), ("AA", "SAME-1")]
        says(here, name_of(device), "other content", since=before)
        assert len(here.sandbox.of("SAME-1")) == 6


def passed(until: float) -> bool:
    return time.time() > until


def test_b10_a_repetition_after_the_window_is_new(here):
    with here.device("WINDOW") as device:
        for count in (1, 2, 3):
            assert device.ask(message("WINDOW-1")) == ("AA", "WINDOW-1")
            assert len(here.sandbox.of("WINDOW-1")) == count
            until = time.time() + 0.01
            eventually(functools.partial(passed, until))


@pytest.mark.parametrize("channel", ["ORIGINAL", "ENHANCED", "AA"])
def test_b11_acknowledgments_are_not_acknowledged(here, channel):
    before, text = len(here.sandbox.seen), ""
    with here.device(channel) as device:
        device.send(*[b"\x06", b"\x15"] * 20)
        assert silent_for(device) == b""
    with here.device(channel) as device:
        for kind in ("ACK", "ACK^A01", "ACK^A01^ACK"):
            text = f"MSH|^~\\&|A|B|C|D|20260101||{kind}|ACK-{channel}-{len(kind)}|P|2.5.1\rMSA|CA|X\r"
            device.send(text, text, text.replace("|20260101|", "|20260102|"))
            here.sandbox.wait_ids(f"ACK-{channel}-{len(kind)}")
        assert silent_for(device) == b""
        here.agent.wait_state(f"ACK-{channel}-3", "processed")
        device.send(text)  # a repetition of what is processed
        assert silent_for(device) == b""
        assert device.ask(message(f"AFTER-ACK-{channel}"))[1] == f"AFTER-ACK-{channel}"
    here.agent.wait_state(f"AFTER-ACK-{channel}", "processed")
    assert len(here.sandbox.seen) == before + 4


def test_b11_a_refused_acknowledgment_is_not_acknowledged(here):
    with here.device("SMALL") as device:
        device.send("MSH|^~\\&|A|B|C|D|20260101||ACK|BIG-ACK|P|2.5.1\rMSA|AA|X|" + "x" * 3000)
        assert silent_for(device) == b""


def test_b11_junk_gets_one_refusal_a_second_at_most(here):
    with here.device("ORIGINAL") as device:
        started, answers = time.monotonic(), 0
        device.send(*[b"junk"] * 500, message("AFTER-JUNK"))
        while device.ack() != ("AA", "AFTER-JUNK"):
            answers += 1
        assert answers <= 1 + int(time.monotonic() - started)


PROXY_V2 = b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x0a\x00\x0b\x01\x0a\x0b\x00\x02\x0b\x0b\x09\xf7"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: b"\x0b\x0b" + m + b"\x1c\r\x1c\r",
        lambda m: b"\x0b\x0b\x0b" + m + b"\x1c\r",
        lambda m: PROXY_V2 + b"\x0b" + m + b"\x1c\r",
        lambda m: PROXY_V2[:18] + b"\x0b" + m + b"\x1c\r",
        lambda m: b"\x0bjunk\x0b" + m + b"\x1c\r",
        lambda m: b"\x0b\xef\xbb\xbf\r\n" + m + b"\x1c\r",
        lambda m: b"\x0b\r\n \r" + m + b"\x1c\r",
        lambda m: b"\x0b" + m + b"\x1c\n",
        lambda m: b"\x0b" + m + b"\x1c\r\n",
        lambda m: b"\x0b" + m + b"\x1c",
        lambda m: b"\x0b" + m.rstrip(b"\r") + b"\x1c\r",
    ],
    ids="framed-twice three-VT proxy-v2 proxy-v2-short junk BOM blank-lines FS-LF FS-CR-LF lone-FS no-CR".split(),
)
def test_b12_only_the_message_is_answered_and_every_end_is_an_end(here, request, wrap):
    control = f"END-{request.node.callspec.id}"
    with here.device("ORIGINAL") as device:
        device.send_raw(wrap(message(control).encode()))
        assert device.ack() == ("AA", control)
        assert silent_for(device, 0.15) == b""
        assert device.ask(message(f"{control}-2")) == ("AA", f"{control}-2")
    assert len(here.sandbox.of(control)) == 1


def test_b12_a_lone_end_before_the_next_start_is_an_end(here):
    with here.device("ORIGINAL") as device:
        device.send_raw(b"".join(b"\x0b%b\x1c" % message(f"LONE-{n}").encode() for n in range(3)))
        assert [device.ack() for _ in range(3)] == [("AA", f"LONE-{n}") for n in range(3)]


def test_b12_a_refusal_of_a_frame_names_the_message_and_its_sender(here):
    with here.device("SMALL") as device:
        device.send(message("TOO-LARGE", size=3000))
        large = device.receive()
        assert acknowledgment(large) == ("AR", "TOO-LARGE")
        assert large.split("|")[2:6] == ["AGENT", "SITE", "ADT1", "WARD"]
        device.send_raw(b"\x0b" + message("CUT-OFF").encode()[:-10])
        device.send(message("AFTER-CUT"))
        cut = device.receive()
        assert acknowledgment(cut) == ("AR", "CUT-OFF")
        assert cut.split("|")[2:6] == ["AGENT", "SITE", "ADT1", "WARD"]
        assert device.ack() == ("AA", "AFTER-CUT")


@pytest.mark.parametrize(
    ("control", "text", "body"),
    [
        ("LF-1", "NTE|1||first\nsecond\rNTE|2||x\r", "NTE|1||first\nsecond\rNTE|2||x\r"),
        ("LF-2", "OBX|1|TX|X||a\n\nb\nMSH is no header\n\r", "OBX|1|TX|X||a\n\nb\nMSH is no header\n\r"),
        ("LF-3", "OBX|1|TX|X||a\nMSH|^~\\&|not one\r", "OBX|1|TX|X||a\nMSH|^~\\&|not one\r"),
    ],
)
def test_b13_a_line_feed_in_a_field_is_text(here, control, text, body):
    with here.device("ORIGINAL") as device:
        assert device.ask(message(control) + text) == ("AA", control)
        assert silent_for(device, 0.1) == b""
    assert here.sandbox.of(control)[0].body in (
        message(control) + body,
        (message(control) + body).replace("\n\r", "\r"),
    )


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_b13_other_separators_become_carriage_returns(here, end):
    control = f"LINES-{len(end)}"
    with here.device("ORIGINAL") as device:
        assert device.ask(message(control, text="x").replace("\r", end)) == ("AA", control)
    assert here.sandbox.of(control)[0].body == message(control, text="x")


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_b13_several_messages_in_a_frame_are_each_stored_and_acknowledged(here, end, wrapped):
    ids = [f"BATCH-{len(end)}{ord(end[0])}-{wrapped}-{n}" for n in range(3)]
    whole = "".join(map(message, ids))
    if wrapped:
        whole = f"FHS|^~\\&|FILE-{ids[0]}\rBHS|^~\\&|B\r{whole}BTS|3\rFTS|1\r"
    with here.device("ENHANCED") as device:
        device.send(whole.replace("\r", end))
        heard = device.heard(6)
    assert [control for code, control in heard if code == "CA"] == ids
    assert sorted(control for code, control in heard if code == "AA") == ids
    assert [transmit.body for control in ids for transmit in here.sandbox.of(control)] == list(map(message, ids))
    if wrapped:

        def channel_log() -> bytes:
            return b"".join(path.read_bytes() for path in here.agent.state_dir.glob("medplum-agent-channels-*"))

        eventually(lambda: all(mark in channel_log() for mark in (f"FILE-{ids[0]}".encode(), b"BTS|3", b"FTS|1")))


@pytest.mark.parametrize("ending", ["", "\r"])
def test_b14_answers_and_pushes_end_with_their_carriage_return(here, ending):
    control = f"FINAL-{len(ending)}"
    here.sandbox.bot = lambda transmit: (200, str(bot("AA")(transmit)[1]) + ending)
    with here.device("ORIGINAL") as device:
        device.send(message(control))
        answer = device.receive()
        assert answer.endswith("|bot\r")
        device.send(b"junk")
        assert device.receive().endswith("\r")
    with Receiver() as receiver, here.caller() as caller:
        assert caller.push(receiver.url(), message(control).rstrip("\r") + ending).status == 200
        assert receiver.heard == [message(control)]


@pytest.mark.parametrize("channel", ["ORIGINAL", "RAW"])
def test_b15_unfinished_bytes_have_one_budget(here, channel):
    """6 MiB here: the largest goes, the small one is finished."""
    before, begun = mark(here), b"\x0bMSH|^~\\&|" if channel == "ORIGINAL" else b"\x02"
    with contextlib.ExitStack() as stack:
        small = stack.enter_context(here.device("ORIGINAL"))
        small.send_raw(b"\x0b" + message("UNFINISHED").encode()[:60])
        large = [stack.enter_context(here.device(channel)) for _ in range(10)]
        for device in large:
            with contextlib.suppress(OSError):
                device.send_raw(begun + bytes(2**20))
        eventually(lambda: said(here, "unfinished", level="WARN", since=before), what="WARN")
        eventually(lambda: sum(device.closed_by_peer(0.05) for device in large) >= 4)
        assert any(not device.closed_by_peer(0.05) for device in large)
        small.send_raw(message("UNFINISHED").encode()[60:] + b"\x1c\r")
        assert small.ack() == ("AA", "UNFINISHED")


def test_b15_sessions_of_analyzers_count_too(here):
    """What was acknowledged of the one that has to go is a dead letter with its records."""
    before, texts = mark(here), frames_of("H|\\^&", *(f"R|{n}|{'x' * 60_000}" for n in range(9)), size=62_000)
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(Instrument.at(here.ports["ASTM"])) for _ in range(20)]
        with contextlib.suppress(OSError, EOFError, AssertionError):
            for frame in (ENQ, *texts):
                for line in lines:
                    assert line.ask(frame) == ACK
        eventually(lambda: said(here, "unfinished", level="WARN", since=before), what="WARN")
        eventually(lambda: [row for row in rows(here, "ASTM") if row["error_code"] == "interrupted-session"])


@pytest.mark.parametrize("talks", [False, True])
def test_b15_one_host_does_not_take_all_places(here, talks):
    """`talks`: its connections have brought messages."""
    with contextlib.ExitStack() as stack:
        for n in range(9 if talks else 30):
            device = stack.enter_context(here.device("TEN"))
            if talks:
                assert device.ask(message(f"PLACE-{n}", f"P{n}"))[0] == "AA"
        for n, host in enumerate(("127.0.0.2", "127.0.0.3") if talks else ("127.0.0.1", "127.0.0.2")):
            with Instrument.at(here.ports["TEN"], host) as other:
                other.write(b"\x0b" + message(f"OTHER-{talks}-{n}").encode() + b"\x1c\r")
                assert other.more(5) and b"MSA|AA|OTHER" in other.buffer


def test_b15_a_byte_now_and_then_does_not_defeat_the_frame_time_out(here):
    with here.device("TEN") as device:
        device.send_raw(b"\x0bMSH|")
        started = time.monotonic()
        while not device.closed_by_peer(0.1):
            assert time.monotonic() - started < 6
            with contextlib.suppress(OSError):
                device.send_raw(b"x")


@pytest.mark.parametrize("channel", ["SHUT", "RAW-SHUT"])
def test_b15_peers_says_who_may_connect(here, channel):
    with contextlib.suppress(ConnectionError), here.device(channel) as device:
        assert device.closed_by_peer()
    assert said(here, channel, "peers", level="WARN")
    if channel == "SHUT":
        with Instrument.at(here.ports[channel], "127.0.0.2") as friend:
            friend.write(b"\x0b" + message("FRIEND").encode() + b"\x1c\r")
            assert friend.more(5) and b"MSA|AA|FRIEND" in friend.buffer


def outcome_is(here: Site, channel: str, outcome: str) -> bool:
    return bool(rows(here, channel)[-1]["ack_outcome"] == outcome)


ORDER = "H|\\^&\nO|1|T1\nL|1|N\n"


def test_b16_an_answer_waits_for_an_instrument_that_comes_back(here):
    def late(transmit: Transmit) -> tuple[int, Any]:
        return 200, ORDER if transmit.channel.startswith("ASTM") else "ORDER"

    here.sandbox.bot, here.sandbox.faults.delay = late, lambda: 0.3
    with Instrument.at(here.ports["ASTM-7"]) as instrument:
        instrument.session("H|\\^&", "Q|1|B16", "L|1")
    with Instrument.at(here.ports["RAW"]) as instrument:
        instrument.write(b"\x02QUERY-B16\x03")
    body_with(here, "Q|1|B16")
    body_with(here, "QUERY-B16")
    for channel in ("ASTM-7", "RAW"):
        eventually(functools.partial(outcome_is, here, channel, "undelivered"))
    with Instrument.at(here.ports["ASTM-7"], "127.0.0.2") as stranger:
        assert stranger.quiet(0.2) == b""
    with Instrument.at(here.ports["ASTM-7"]) as instrument:
        assert b"O|1|T1\r" in instrument.accept()
    with Instrument.at(here.ports["RAW"]) as instrument:
        assert instrument.take(5) == b"ORDER"
    for channel in ("ASTM-7", "RAW"):
        eventually(functools.partial(outcome_is, here, channel, "delivered"))


def test_b16_an_answer_does_not_wait_for_ever(here):
    here.sandbox.bot, here.sandbox.faults.delay = lambda transmit: (200, "ORDER"), lambda: 0.2
    before = mark(here)
    with Instrument.at(here.ports["RAW-SHORT"]) as instrument:  # 0.3 s
        instrument.write(b"\x02QUERY-SHORT\x03")
    says(here, "RAW-SHORT", "did not come back", since=before)
    with Instrument.at(here.ports["RAW-SHORT"]) as instrument:
        assert instrument.quiet(0.2) == b""
    assert rows(here, "RAW-SHORT")[-1]["ack_outcome"] == "undelivered"


# --- C. silence where a person needs a word ---------------------------------------------------------------------------


def test_c17_what_goes_wrong_on_a_line_is_one_warning_each(here):
    before = mark(here)
    with here.device("ORIGINAL") as unfinished, here.device("ORIGINAL") as between:
        names = name_of(unfinished), name_of(between)
        unfinished.send_raw(b"\x0b" + message("C17").encode())
        assert between.ask(message("C17-1")) == ("AA", "C17-1")
        between.send_raw(b"0123456789")
        assert between.ask(message("C17-2")) == ("AA", "C17-2")
    says(here, names[0], str(len(message("C17"))), "0x1C", since=before)
    says(here, names[1], "10 bytes", since=before)
    with here.device("ORIGINAL") as bare:
        bare.send_raw(message("C17-3").encode())
        says(here, name_of(bare), "0x0B", since=before)  # while it waits
    with here.device("ORIGINAL") as unread:  # not a warning: a clean connection
        assert unread.ask(message("C17-4")) == ("AA", "C17-4")
        name = name_of(unread)
    assert not said(here, name, level="WARN", since=before)


def test_c17_an_unfinished_message_of_a_byte_stream(here):
    before = mark(here)
    with Instrument.at(here.ports["RAW"]) as instrument:
        instrument.write(b"\x02never ended")
        port = instrument.line.getsockname()[1] if isinstance(instrument.line, socket.socket) else 0
    says(here, "RAW", f":{port}", since=before, timeout=5)


def test_c17_a_sender_that_does_not_read(here):
    """UNREAD_SECS is half a second here."""
    before = mark(here)
    here.sandbox.bot = bot("AA", "x" * 50_000)
    device = Device(here.ports["ORIGINAL"], receive_buffer=4096)
    with device:
        device.send(*(message(f"UNREAD-{n}", f"U{n}") for n in range(200)))
        says(here, name_of(device), "has not read", since=before)


@pytest.mark.parametrize("body", ["Patient created", {"resourceType": "Patient"}])
def test_c17_a_bot_that_returns_no_hl7(here, body):
    before = mark(here)
    here.sandbox.bot = lambda transmit: (200, body)
    with here.device("ORIGINAL") as device:
        for n in range(3):
            control = f"NOHL7-{type(body).__name__}-{n}"
            assert device.ask(message(control)) == ("AA", control)
        says(here, name_of(device), "no HL7", since=before)


@contextlib.contextmanager
def meets(folder: Path, url: str, code: str = "", **options: Any) -> Iterator[AgentProcess]:
    """An agent whose base URL leads elsewhere."""
    with SandboxThread({}) as sandbox:
        agent = AgentProcess(sandbox, folder / "state", url=url, **options)
        if code:
            changed(agent, code)
        try:
            agent.start(ready=False)
            yield agent
        finally:
            if agent.process is not None:
                agent.process.kill()
            agent.discard()


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """The port of something that says this to everybody."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted, _ = listener.accept()
                    with accepted, contextlib.suppress(OSError):
                        accepted.recv(65536)
                        accepted.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def causes(agent: AgentProcess, words: str) -> list[str]:
    """What the main log says with these words."""
    return [line["msg"] for line in log_lines(agent.main_log()) if words in line["msg"]]


def test_c18_a_firewall_that_drops_packets_is_said_within_ten_seconds(tmp_path):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as stack:
        port = listener.getsockname()[1]

        def dropped() -> bool:  # the queue is full: further connects are dropped
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0.3)
            try:
                filler.connect(("127.0.0.1", port))
            except TimeoutError:
                return True
            return False

        eventually(dropped)
        assert medplum_agent.CONNECT_TIMEOUT_SECS < 9
        with meets(tmp_path, f"http://127.0.0.1:{port}/", "m.CONNECT_TIMEOUT_SECS = 1.5") as agent:
            agent.logged(f"no answer from 127.0.0.1:{port} within", 9)
            assert "firewall or proxy?" in agent.main_log().decode()
            agent.terminate()
            assert len(causes(agent, "firewall or proxy?")) == 1


@pytest.mark.parametrize("path", ["fhir/R4", "fhir/R4/"])
def test_c18_the_fhir_url_is_understood(tmp_path, path):
    with site(tmp_path, {"A": ""}, start=False) as here:
        here.agent._url = here.sandbox.url + path
        here.agent.start()
        with here.device("A") as device:
            assert device.ask(message("FHIR-URL")) == ("AA", "FHIR-URL")


def test_c18_https_on_a_plain_port(tmp_path):
    refusal = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
    with answering(refusal) as port, meets(tmp_path, f"https://127.0.0.1:{port}/") as agent:
        agent.logged("plain port")
        agent.terminate()
        assert len(causes(agent, "plain port")) == 1


def test_c18_the_secret_in_clear(tmp_path):
    with meets(tmp_path, "http://192.0.2.1:9/") as agent:
        assert '"WARN"' in agent.logged("in clear")


def test_c18_two_agents_with_one_id(tmp_path):
    with site(tmp_path, {"A": "", "B": ""}) as here:
        other = AgentProcess(here.sandbox, tmp_path / "second")
        try:
            other.start(ready=False)
            other.logged("is another agent running")
        finally:
            other.discard()


def health(agent: AgentProcess, *options: str) -> tuple[int, str]:
    """Exit code and words of `health`."""
    environment = {
        "MEDPLUM_BASE_URL": agent._url or agent.sandbox.url, "MEDPLUM_CLIENT_ID": "sandbox-client",
        "MEDPLUM_CLIENT_SECRET": "sandbox-secret", "MEDPLUM_AGENT_ID": AGENT_ID,
    }  # fmt: skip
    command = [*AgentProcess.COMMAND, "health", "--state-dir", str(agent.state_dir), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=20)
    return done.returncode, done.stdout + done.stderr


def test_c19_health_fails_with_its_reason(tmp_path):
    with site(tmp_path, {"A": "", "B": ""}, start=False) as here:
        changed(here.agent, "m.BIND_RETRY_SECS = 0.1")
        with socket.create_server(("", here.ports["B"]), family=socket.AF_INET6, dualstack_ipv6=True):
            here.agent.start(ready=False)
            here.agent.wait_connected()
            eventually(lambda: health(here.agent)[0] == 1 and str(here.ports["B"]) in health(here.agent)[1])
        here.agent.wait_listening()
        eventually(lambda: health(here.agent, "--server-secs", "1")[0] == 0, what="healthy")
        here.sandbox.stop()
        eventually(lambda: "server has been away" in health(here.agent, "--server-secs", "1")[1])
        code, words = health(here.agent, "--server-secs", "1")
        assert code == 1 and "server" in words
        assert health(here.agent)[0] == 0  # not asked for
        here.sandbox.start()


def test_c19_health_of_an_agent_that_hangs(tmp_path):
    with site(tmp_path, {"A": ""}) as here:
        assert here.agent.process is not None
        os.kill(here.agent.process.pid, signal.SIGSTOP)
        code, words = health(here.agent)
        os.kill(here.agent.process.pid, signal.SIGCONT)
        assert code == 1 and "does not answer" in words
        eventually(lambda: health(here.agent)[0] == 0)


def test_c19_health_says_that_the_login_is_retried(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    code = "m.RECONNECT_BASE_SECS = m.RECONNECT_MAX_SECS = 0.1"
    with meets(tmp_path, f"http://127.0.0.1:{port}/", code) as agent:
        eventually(lambda: "retrying the login" in health(agent)[1])
        assert health(agent)[0] == 1


# --- D. small ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_d20_a_second_signal_at_once_is_the_first(tmp_path, numbers):
    with site(tmp_path, {"A": ""}) as here, here.device("A") as device:
        here.sandbox.faults.delay = lambda: 0.5
        device.send(message("SIGNAL-1"))
        here.sandbox.wait_ids("SIGNAL-1")
        assert here.agent.process is not None
        for number in numbers:
            here.agent.process.send_signal(number)
        assert device.ack() == ("AA", "SIGNAL-1")
        assert here.agent.wait_exit() == 0


def test_d20_a_small_gzip_answer_is_no_large_one(tmp_path):
    import gzip

    bomb = gzip.compress(b'{"access_token":"' + b"x" * 300 * 2**20 + b'"}', 1)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"

    with answering(head % len(bomb) + bomb) as port, meets(tmp_path, f"http://127.0.0.1:{port}/") as agent:
        agent.logged("configuration cannot be read", 20)
        assert agent.memory_kb() < 200_000


def test_d20_slow_lookups_hold_up_nobody_else(tmp_path):
    with site(tmp_path, {"A": ""}, start=False) as here:
        changed(
            here.agent,
            "import socket, threading; look_up = socket.getaddrinfo\n"
            "def slow(host, *rest, **options):\n"
            "    if str(host).endswith('.slow.example'): threading.Event().wait(60)\n"
            "    return look_up(host, *rest, **options)\n"
            "socket.getaddrinfo = slow",
        )
        here.agent.start()
        with here.caller() as caller, Receiver() as receiver:
            for n in range(40):
                caller.store(f"mllp://d{n}.slow.example:5000", message(f"SLOW-{n}"))
            started = time.monotonic()
            assert here.sandbox.reload()["statusCode"] == 200
            assert time.monotonic() - started < 3
            with here.device("A") as device:
                assert device.ask(message("SLOW-A")) == ("AA", "SLOW-A")
            assert caller.push(receiver.url(), message("ADDRESS")).status == 200  # an address needs no lookup


def test_d20_a_lock_that_cannot_be_written_is_no_lock():
    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            raise OSError(28, "No space left on device")

    with Full(os.devnull, "r+") as file:
        assert medplum_agent.lock_file(file) is False


def test_d20_on_windows_one_far_byte_is_locked_whatever_the_file_holds(tmp_path, monkeypatch):
    """msvcrt.locking, as its documentation has it, with a stand-in: from the file's own position on."""
    taken = set[int]()

    def locking(descriptor: int, mode: int, count: int) -> None:
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        if at in taken:
            raise OSError(13, "Permission denied")
        taken.add(at)

    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    monkeypatch.setattr(sys, "platform", "win32")
    with open(tmp_path / "lock", "a+b") as first, open(tmp_path / "lock", "a+b") as second:
        assert medplum_agent.lock_file(first) and not medplum_agent.lock_file(second)
        assert (tmp_path / "lock").read_text() == str(os.getpid()) and min(taken) > 1_000_000


@pytest.mark.parametrize(
    "name", ["agent.token.new", "agent.lock", "medplum-agent-applied-config.json.new", "queue.sqlite.high.new"]
)
def test_d20_a_link_in_the_state_folder_is_not_followed(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / name).symlink_to(victim)
    with site(tmp_path, {"A": ""}, start=False) as here:
        here.agent.start(ready=False)
        assert here.agent.process is not None
        process = here.agent.process
        eventually(lambda: process.poll() is not None or said(here, "started successfully"))
        here.agent.discard()
    assert victim.read_text() == "precious"


def test_d20_a_folder_that_others_may_write_is_warned_about(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)
    with site(tmp_path, {"A": ""}) as here:
        assert len(said(here, str(tmp_path / "state"), "others", level="WARN")) == 1


def test_d20_stored_pushes_resume_when_the_queue_could_not_be_opened_at_first(tmp_path):
    with Receiver() as receiver, site(tmp_path, {"A": ""}, start=False) as here, here.caller() as caller:
        changed(here.agent, "m.STORE_REOPEN_SECS = 0.1")
        receiver.stop()
        here.agent.start()
        caller.store(receiver.url(), message("RESUME-1"))
        eventually(lambda: here.agent.rows("RESUME-1"))
        here.agent.terminate()
        away = tmp_path / "away.sqlite"
        here.agent.queue_path.rename(away)
        here.agent.queue_path.mkdir()
        receiver.start()
        here.agent.start()
        here.agent.logged("cannot be opened")
        here.agent.queue_path.rmdir()
        away.rename(here.agent.queue_path)
        receiver.wait_ids("RESUME-1")


@pytest.mark.parametrize("ends", ["stop", "kill"])
def test_d20_callbacks_never_repeat_after_a_snapshot_was_restored(tmp_path, ends):
    with site(tmp_path, {"A": "?enhanced=true"}) as here:
        with here.device("A") as device:
            assert device.ask(message("SNAP-1"))[0] == "CA"
            here.sandbox.wait_ids("SNAP-1")
            here.agent.terminate()
            copy = here.agent.queue_path.read_bytes()
        here.agent.start()
        with here.device("A") as device:
            for n in range(3):
                assert device.ask(message(f"LOST-{n}", f"L{n}"))[0] == "CA"
                assert device.ack() == ("AA", f"LOST-{n}")
            here.sandbox.wait_ids("LOST-0", "LOST-1", "LOST-2")
        here.agent.terminate() if ends == "stop" else here.agent.kill()
        for path in here.agent.state_dir.glob(f"{here.agent.queue_path.name}-*"):
            path.unlink()
        here.agent.queue_path.write_bytes(copy)
        here.agent.start()
        with here.device("A") as device:
            for n in range(3):
                device.send(message(f"AGAIN-{n}", f"A{n}"))
            here.sandbox.wait_ids("AGAIN-0", "AGAIN-1", "AGAIN-2")
        callbacks = [transmit.callback.split("#")[0] for _, transmit in here.sandbox.seen]
        assert len(set(callbacks)) == len({control_id(t.body) for _, t in here.sandbox.seen}), callbacks


def test_d20_the_name_of_the_spool_folder_is_synced(tmp_path, monkeypatch):
    synced: list[Path] = []
    monkeypatch.setattr(medplum_agent, "sync_folder", synced.append)
    spool = medplum_agent.Spool(tmp_path / "state" / "queue.spool", lambda size: "")
    file = medplum_agent.SpoolFile(spool)
    file.write(b"x")
    file.keep()
    assert synced == [tmp_path / "state", tmp_path / "state" / "queue.spool"]


def test_d20_what_the_server_sends_never_steers_a_terminal(tmp_path):
    import pty

    with site(tmp_path, {"A": ""}, start=False) as here:
        ours, theirs = pty.openpty()
        here.sandbox.sandbox.faults.refuse_connect = "\x1b[2J\x1b]0;owned\x07 \x9b2J"
        shown = b""
        arguments = [here.sandbox.url, "sandbox-client", "sandbox-secret", AGENT_ID, "--state-dir", str(tmp_path / "s")]
        process = subprocess.Popen([*AgentProcess.COMMAND, *arguments], stdout=theirs, stderr=theirs, cwd=tmp_path)
        try:
            while b"refuses this agent" not in shown or not shown.endswith(b"\n"):
                shown += os.read(ours, 65536)
        finally:
            process.kill()
            process.wait()
            os.close(ours)
            os.close(theirs)
    assert b"\x1b" not in shown and b"\x07" not in shown and "\x9b" not in shown.decode()


def test_d20_fsync_means_the_disk_on_macos_too(tmp_path, monkeypatch):
    import fcntl

    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda descriptor, command: calls.append((descriptor, command)))
    monkeypatch.setattr(sys, "platform", "darwin")
    medplum_agent.sync(7)
    assert calls == [(7, 51)]
    monkeypatch.undo()
    pragmas: list[str] = []

    async def run() -> None:
        log: Any = medplum_agent.Log("main", medplum_agent.LoggerSettings(logLevel="NONE"), None, None)
        store = medplum_agent.Store(tmp_path / "queue.sqlite", log)
        await store.open()
        pragmas.extend(await store.call(lambda db: [str(db.one(f"PRAGMA {p}")) for p in names]))
        await store.close()

    names = ("fullfsync", "synchronous")
    asyncio.run(run())
    assert pragmas == ["1", "2"]


TARGETS = (
    ("mllp://127.0.0.1", True),
    ("mllp://127.0.0.0/8:{port}", True),
    ("127.0.0.1:*", True),
    ("10.0.0.0/8, 127.0.0.1:{port}-{port}", True),
    ("tcp://127.0.0.1", False),
    ("mllp://127.0.0.1:1-1023", False),
    ("10.0.0.0/8", False),
    ("[::1]:{port}", False),
)


def test_d21_push_targets_of_agent_toml_say_where_pushes_may_go(tmp_path):
    with Receiver() as receiver:
        for number, (targets, allowed) in enumerate(TARGETS):
            folder = tmp_path / str(number)
            folder.mkdir()
            config = f'pushTargets = "{targets.format(port=receiver.port)}"\n'
            with site(folder, {"A": ""}, config=config) as here, here.caller() as caller:
                agent = here.sandbox.resource(f"Agent/{AGENT_ID}")
                agent["setting"] = [setting("pushTargets", "0.0.0.0/0")]  # the cloud cannot change it
                here.sandbox.reload()
                for host in ("127.0.0.1", "localhost"):
                    answer = caller.push(f"mllp://{host}:{receiver.port}", message(f"TARGET-{number}"))
                    assert (answer.status == 200) is (allowed and host == "127.0.0.1") or host == "localhost", (
                        targets,
                        answer,
                    )
                    if not allowed:
                        assert answer.status == 400 and "pushTargets" in answer.text
                if not allowed:
                    caller.store(receiver.url(), message(f"STORED-{number}"))
                    here.agent.wait_state(f"STORED-{number}", "rejected")
        assert {name.split("-")[0] for name in receiver.ids()} == {"TARGET"}
        assert len(receiver.heard) >= sum(allowed for _, allowed in TARGETS)


def test_d21_bad_push_targets_are_said_at_the_start():
    for text in ("mllp://10.0.0.0/33", "10.1.2.3:x", "host.example", "10.1.2.3:9-5"):
        with pytest.raises(ValueError):
            medplum_agent.push_targets(text)


# --- found by reading ------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_at_the_start_is_opened_though_its_channel_comes_late(tmp_path):
    """As when the agent before lets it go a moment later, while the libraries of imaging are still being loaded."""
    slow = "async def late(load=m.load_imaging):\n    await load()\n    await m.asyncio.sleep(1)\n"
    with site(tmp_path, {"PACS": "dicom://127.0.0.1:{port}?"}, start=False) as here:
        changed(here.agent, f"{slow}m.load_imaging = late; m.BIND_RETRY_SECS = 0.1")
        with socket.create_server(("127.0.0.1", here.ports["PACS"])):
            here.agent.start(ready=False)
            here.agent.logged("cannot be opened")
        here.agent.logged("is open now")
        instance = made(10)
        assert store(here.ports["PACS"], instance) == [0]
        here.sandbox.wait_for(lambda: any(instance.uid in sent.body for sent in here.sandbox.sandbox.transmits))


# --- found by live fuzzing and by power cuts --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["", "?enhanced=true"])
def test_the_answer_of_a_half_closed_sender_goes_to_no_older_connection(tmp_path, mode):
    with site(tmp_path, {"A": mode}) as here, here.device("A") as older, here.device("A") as device:
        device.send(message("HALF"))
        device.socket.shutdown(socket.SHUT_WR)
        for code in ("CA", "AA") if mode else ("AA",):
            assert device.ack() == (code, "HALF")
        assert device.socket.recv(1) == b""  # nothing is owed any more
        assert not older.drain(0.1)


def test_a_queue_without_a_name_is_damaged_and_not_waited_for(tmp_path):
    with site(tmp_path, {"A": "?enhanced=true"}) as here:
        with here.device("A") as device:
            assert device.ask(message("NAMED"))[0] == "CA"
        here.agent.terminate()
        with contextlib.closing(sqlite3.connect(here.agent.queue_path)) as db, db:
            db.execute("DELETE FROM identity")
        here.agent.start(ready=False)
        assert "malformed" in here.agent.logged("cannot be opened")


# --- what devices and administrators take away ---


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
@pytest.mark.parametrize("silent", [False, True], ids=["connected", "silent before TLS"])
def test_connections_of_devices_leave_descriptors_for_the_server_and_for_pushes(tmp_path, silent):
    few = ["sh", "-c", 'ulimit -n 100; exec "$@"', "sh"]
    crowd = "?maxConnections=1000"
    if silent:
        trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "own.pem"))
        crowd += f"&tls=true&handshakeTimeoutSecs=60&certFile={tmp_path / 'own.pem'}"
    with site(tmp_path, {"A": "", "CROWD": crowd}, wrapper=few) as here, contextlib.ExitStack() as stack:
        kept = stack.enter_context(here.device("A"))
        assert kept.ask(message("M0"))[0] == "AA"
        assert here.agent.process is not None
        os.kill(here.agent.process.pid, signal.SIGSTOP)  # they all wait to be accepted at once
        for _ in range(150):
            stack.enter_context(socket.create_connection(("127.0.0.1", here.ports["CROWD"])))
        os.kill(here.agent.process.pid, signal.SIGCONT)
        here.agent.logged("was turned away: 100 files may be open at once")
        before = here.sandbox.sandbox.requests.count("GET /ws/agent")
        here.sandbox.cut()
        here.sandbox.wait_for(lambda: here.sandbox.sandbox.requests.count("GET /ws/agent") > before, 20)
        here.sandbox.wait_for(lambda: here.sandbox.connected, 20)
        assert kept.ask(message("M1"))[0] == "AA"
        receiver, caller = stack.enter_context(Receiver()), stack.enter_context(here.caller())
        assert caller.push(receiver.url(), message("P1")).status == 200
        assert "system resource" not in here.agent.output() and "Too many open files" not in here.agent.output()


def test_a_disk_without_room_is_critical(tmp_path):
    with site(tmp_path, {"A": ""}, start=False) as here:
        changed(here.agent, "m.LOOK_SECS, m.is_low = 0.1, lambda folder: True")
        here.agent.start()
        with here.device("A") as device:
            device.send(message("LOW"))
            assert "the disk of the agent is full" in device.receive()
        eventually(lambda: any(one["kind"] == "queue" and one["critical"] for one in here.sandbox.stats()["alarms"]))


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_log_that_is_removed_or_moved_away_is_made_anew(tmp_path, what):
    config = f"[logger.main]\nlogDir = '{tmp_path / 'logs'}'"
    with site(tmp_path, {"A": ""}, config=config) as here:
        (log,) = (tmp_path / "logs").glob("*main*")
        if what == "file":
            log.rename(log.with_name("moved"))
        else:
            shutil.rmtree(tmp_path / "logs")
        here.sandbox.tell(b"nonsense")
        eventually(lambda: log.exists() and b"not a JSON message" in log.read_bytes())
