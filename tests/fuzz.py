"""Fuzzing: python tests/fuzz.py [target ...] [--seconds N] [--seed N]. Targets are functions of some bytes.

A target may raise nothing but what its parser documents (PeerError, ConfigError, ValueError), and checks what must
hold of the result. With atheris the bytes are guided by coverage (one target a run); without it seeds are mutated at
random. The first input that breaks a target is printed as hex, and the exit code is 1:

    python tests/fuzz.py hl7 --input 4d53487c
    python tests/fuzz.py live --secs 600  # a running agent instead, all protocols and its uplink at once
"""

import argparse
import collections
import contextlib
import importlib.util
import json
import os
import random
import re
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "packaging"))

from demo import accepting_bot

import medplum_agent as ma
from tests import dicom_peers as peers
from tests import support
from tests.instruments import Instrument

MESSAGE = b"MSH|^~\\&|LAB|HOSP|EHR|CLINIC|20260101||ADT^A01^ADT_A01|MSG1|P|2.5.1\rPID|1||123^^^HOSP^MR\rMRG|1\r"
ACK = b"MSH|^~\\&|BOT|S|||20260101||ACK|1|P|2.5.1\rMSA|AA|MSG1|OK\r"
SESSION = b"\x05" + b"".join(ma.astm_frames((b"H|\\^&|||A\r", b"R|1|^^^GLU|5.4\r", b"L|1|N\r"), 12)) + b"\x04"
LIMIT = 64  # bytes of an MLLP frame or a raw message
STREAMS = tuple(
    ma.StreamSettings(maxMessageBytes=LIMIT, **options)
    for options in (
        {"startChar": "\x02", "endChar": "\x03", "autoRespond": "\x05:\x06,\x03:\x06,b\x03:B,x\x02:S"},
        {"startChar": "\x0b", "endChar": "\x1c\r", "bodyEncoding": "utf-8", "stripSequence": "ab,abc,\x0b"},
        {"startChar": "==", "endChar": "==", "stripControlChars": True},
        {"startChar": "\x05", "endChar": "\x04", "autoRespond": "\x05:\x06,\x17:\x06"},
    )
)
PAUSE = b"\xfe"
ASTM_SETTINGS = tuple(
    ma.StreamSettings(mode="astm", **options)
    for options in (
        {},
        {"strictFrameNumbers": True, "requireTerminator": True, "ackEot": True},
        {"checksum": "off"},
        {"maxMessageBytes": 150, "maxFrame": 3},
    )
)
INPUT_SECS = 0.5  # processor time for one input of at most 4 kB; more is an endless loop or a quadratic one


def mllp(content: bytes) -> None:
    """Whole and byte by byte give the same events, and nothing is raised."""
    whole, single = ma.Mllp(LIMIT), ma.Mllp(LIMIT)
    expected = [str(event) for event in whole.receive(content)]
    found = [str(event) for at in range(len(content)) for event in single.receive(content[at : at + 1])]
    assert found == expected, f"{found} != {expected}"
    assert (single.inside, single.skipped) == (whole.inside, whole.skipped)
    assert max(len(whole._buffer), len(single._buffer)) <= LIMIT + len(ma.RESTART)


def bytestream(content: bytes) -> None:
    """The first byte chooses the settings; whole and byte by byte give the same events, in bounded memory."""
    settings, stream = STREAMS[content[0] % len(STREAMS) if content else 0], content[1:]
    whole, single = ma.ByteStream(settings), ma.ByteStream(settings)
    expected, found = [repr(event) for event in whole.receive(stream)], []
    for at in range(len(stream)):
        found += [repr(event) for event in single.receive(stream[at : at + 1])]
        assert len(single._kept) <= LIMIT
    assert found == expected, f"{found} != {expected}"
    assert (single.inside, single.skipped) == (whole.inside, whole.skipped)
    for message in re.findall(rb"\x02[^\x02\x03]*\x03", stream):
        ma.stream_body(message, settings)
        with contextlib.suppress(ma.PeerError):
            ma.stream_answer(message.decode("latin-1"), settings)


def astm(content: bytes) -> None:
    """The first byte chooses the settings; whole, byte by byte, and with late commits the events are the same.

    A byte PAUSE stands for silence until the next time-out.
    """
    kind, stream = (content[0], content[1:]) if content else (0, b"")
    pieces = stream.split(PAUSE)
    ways = (
        ("whole", [[piece] for piece in pieces], False),
        ("single", [_singly(piece) for piece in pieces], False),
        ("late", [_singly(piece) for piece in pieces], True),
    )
    expected = None
    for name, chunks, late in ways:
        found = _astm_events(kind, chunks, late)
        expected = expected or found
        assert found == expected, f"{name}: {found} != {expected}"


def _singly(piece: bytes) -> list[bytes]:
    return [piece[at : at + 1] for at in range(len(piece))]


def _astm_events(kind: int, pieces: list[list[bytes]], late: bool) -> list[str]:
    """All that a core says; with `late` an accepted frame is on disk only when the line goes silent."""
    settings = ASTM_SETTINGS[kind % len(ASTM_SETTINGS)]
    core, now = ma.Astm(settings), 0.0
    heard: list[ma.AstmEvent] = list(core.send((b"H|\\^&\r", b"L|1\r"), now) if kind & 0x80 else [])

    def commit() -> None:
        while core.state is ma.Link.COMMIT:
            heard.extend(core.refused(now) if kind & 0x40 and not now % 2 else core.committed(now))

    for chunks in pieces:
        for chunk in chunks:
            heard.extend(core.receive(chunk, now))
            if not late:
                commit()
            assert len(core._text) <= ma.FRAME_TEXT_BYTES and core._size <= settings.maxMessageBytes
        commit()
        if (due := core.deadline()) is not None:
            now = float(int(max(now, due)) + 1)
            heard.extend(core.expired(now))
    heard.extend(core.closed())
    for event in heard:
        assert isinstance(event, ma.AstmEvent), event
        if isinstance(event, ma.Session):
            ma.text_records(ma.records_text(event.records, ma.codec_of(settings.encoding)), settings)
    return [*map(repr, heard), str(core.skipped)]


ma.imaging()  # commands need its dictionary
DIMSE_STATES = "Sta2 Sta3 Sta5 Sta6 Sta7 Sta11 Sta13".split()
DIMSE_ENDS = [[], [ma.RELEASE_RP], [ma.ASSOCIATE_RJ]]  # what may be said, and behind it an A-ABORT


def dimse(content: bytes) -> None:
    """The first byte chooses the state; whole and byte by byte give the same events and the same answer.

    Memory is bounded; after the end there are no events, and at most one A-ABORT is the last that is said.
    """
    state, stream = DIMSE_STATES[content[0] % len(DIMSE_STATES) if content else 0], content[1:]
    whole, single = _dimse_in(state), _dimse_in(state)
    expected, found = _dimse_heard(whole, [stream]), _dimse_heard(single, _singly(stream))
    assert found == expected, f"{found} != {expected}"
    assert (single.state, single.inside) == (whole.state, whole.inside)
    events, answer = expected
    assert not any(isinstance(event, ma.Ended) for event in events[:-1]), events
    said = [answer[at] for at in range(0, len(answer), 10)]
    assert len(answer) == 10 * len(said) and said[: len(said) - (said[-1:] == [ma.ABORT])] in DIMSE_ENDS, answer.hex()
    if events and isinstance(asked := events[-1], ma.Associate):
        accepted = whole.accept([ma.DicomLine._negotiated(context) for context in asked.contexts], asked.roles)
        assert accepted[0] == ma.ASSOCIATE_AC and len(accepted) == 6 + int.from_bytes(accepted[2:6], "big")
    with contextlib.suppress(ma.PeerError):
        assert "CommandField" in ma.read_command(stream)


def _dimse_in(state: str) -> ma.Dimse:
    core = ma.Dimse(16384)
    if state == "Sta2":
        return core
    if state in ("Sta5", "Sta7", "Sta11"):
        other, contexts = ma.Dimse(16384), [ma.Context(number, "1.2", (ma.IMPLICIT,)) for number in (1, 3)]
        other.receive(core.request("ME", "ARCHIVE", contexts, {}))
        if state != "Sta5":
            core.receive(other.accept([(context, 0) for context in contexts], {}))
            core.release()
        if state == "Sta11":
            core.receive(_pdu(ma.RELEASE_RQ, bytes(4)))
        assert core.state == state
        return core
    core.receive(ASSOCIATE)
    if state != "Sta3":
        core.accept([(ma.Context(number, "1.2", (ma.IMPLICIT,)), 0) for number in (1, 3)], {})
    if state == "Sta13":
        core.receive(_pdu(ma.RELEASE_RQ, bytes(4)))
    assert core.state == state
    return core


def _dimse_heard(core: ma.Dimse, chunks: list[bytes]) -> tuple[list[ma.DimseEvent], bytes]:
    """All that a core says, the pieces of a data set joined."""
    heard, said = list[ma.DimseEvent](), b""
    for chunk in chunks:
        events, answer = core.receive(chunk)
        said += answer
        for event in events:
            before = heard[-1] if heard else None
            if isinstance(event, ma.Fragment) and isinstance(before, ma.Fragment) and not before.last:
                event = ma.Fragment(before.content + event.content, event.last)
                heard.pop()
            heard.append(event)
        assert len(core._held) <= ma.PDU_BYTES and len(core._command) <= ma.COMMAND_BYTES + len(chunk)
    return heard, said


def _pdu(kind: int, content: bytes) -> bytes:
    return ma.Dimse._pdu(kind, content)


def _value(context: int, control: int, content: bytes) -> bytes:
    return (len(content) + 2).to_bytes(4, "big") + bytes((context, control)) + content


ASSOCIATE = _pdu(
    ma.ASSOCIATE_RQ,
    b"\0\1\0\0" + b"AGENT".ljust(16) + b"CT1".ljust(16) + bytes(32) + ma._item(0x10, b"1.2")
    + ma._item(0x20, b"\1\0\0\0" + ma._item(0x30, b"1.2") + ma._item(0x40, b"1.2.840.10008.1.2"))
    + ma._item(0x50, ma._item(0x51, b"\0\0\x40\0") + ma._item(0x54, b"\0\0031.2\1\1") + ma._item(0x58, b"\1\0")),
)  # fmt: skip
COMMAND = ma.command_set({"CommandField": 1, "MessageID": 7, "CommandDataSetType": 1})
STORED = _pdu(ma.P_DATA, _value(1, 3, COMMAND) + _value(1, 0, b"ab")) + _pdu(ma.P_DATA, _value(1, 2, b"c"))
ENDINGS = b"".join(_pdu(kind, bytes(4)) for kind in (ma.RELEASE_RQ, ma.RELEASE_RP, ma.ABORT))


def hl7(content: bytes) -> None:
    """Decoding, header, keys, acknowledgments and answers: PeerError or a result."""
    said = content.decode("utf-8", "replace")
    if ack := ma.read_ack(said):
        assert ack.code == ack.code.strip().upper() and ack.control_id == ack.control_id.strip()
        assert ma.read_ack(f"\ufeff{said}") == ack
    for encoding in ("utf-8", "latin1"):
        try:
            text = ma.decode_hl7(content, encoding)
        except ma.PeerError:
            return
        header = ma.Header(text)
        for spec in ("", "*", "PID-3.1.2,MSH-9.2,MSH-1,ZZZ-3"):
            ma.ordering_key(header, spec)
        for code in ma.ACK_TEXT:
            assert ma.build_ack(header, code, ma.clean_text(text)).count("\r") == 2
        numbered = ma.write_sequence_number(text, 7)
        assert ma.Header(numbered).fields[12] == "7"
        assert numbered.count("\r") == text.count("\r")


def settings(content: bytes) -> None:
    """An Endpoint address, whatever it is, gives a plan within its bounds or problems."""
    text = content.decode("utf-8", "replace")
    stream = f"tcp://0.0.0.0:56000?startChar=%02&endChar=%03&{text}"
    for address in (text, f"mllp://0.0.0.0:56000?{text}", f"mllp://{text}", stream):
        endpoint = {"resourceType": "Endpoint", "address": address}
        agent = {"channel": [{"name": "A", "endpoint": {"reference": "E"}}], "setting": [_agent_setting(text)]}
        plan, problems = ma.build_plan(agent, {"E": endpoint})
        assert problems or plan.channels
        assert 1 <= plan.defaults.maxWorkers <= 500 and plan.given.keys() <= ma.AGENT_ROWS.keys()
        for channel in plan.channels:
            assert 1 <= channel.settings.maxWorkers <= 500 and (channel.dials or 1 <= channel.port <= 65535)
            channel.policy.delay_ms(100)
            if isinstance(channel.settings, ma.Hl7Settings):
                ma.decode_hl7(b"MSH|\xff\x80" + content, ma.codec_of(channel.settings.encoding))
            if isinstance(channel.settings, ma.StreamSettings):
                ma.stream_body(b"\x02\xff\x80" + content + b"\x03", channel.settings)


def _agent_setting(text: str) -> ma.Json:
    """`name=value` of the text as a setting, numeric where it can be."""
    name, _, value = text.partition("&")[0].partition("=")
    kind = "Integer" if value.lstrip("-").isdecimal() and len(value) < 1000 else "String"
    return {"name": name, f"value{kind}": int(value) if kind == "Integer" else urllib.parse.unquote(value)}


def properties(content: bytes) -> None:
    """A configuration file gives settings or ConfigError; what stands as clientSecret is in no text."""
    secret = "Zebra-s3cr3t"
    lines = content.decode("utf-8", "replace").splitlines()
    hidden = all(re.match(r"\ufeff?clientSecret *=", line) for line in lines if "SECRET" in line)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("agent.properties", "agent.toml"):
            path = Path(folder) / name
            path.write_bytes(content.replace(b"SECRET", secret.encode()))
            try:
                ma.resolve_process([], {}, {}, str(path))
            except ma.ConfigError as error:
                assert error.problems and not (hidden and secret in str(error))


def cursor(content: bytes) -> None:
    """Any cursor and any log file give a page of entries or ValueError; paging ends."""
    before, _, lines = content.partition(b"\n")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "medplum-agent-main-2026-01-02.log").write_bytes(lines)
        cursors = [None, before.decode("latin1")]
        if before.isdigit():
            cursors.append(f"medplum-agent-main-2026-01-02.log:{int(before[:400])}")
        for one in cursors:
            try:
                pages, at = 0, one
                while True:
                    page = ma.read_log_page(Path(folder), "main", 2, at)
                    pages, at = pages + 1, page.before
                    assert len(page.entries) <= 2 and pages <= len(content) + 2
                    if at is None:
                        break
            except ValueError as error:
                assert one is not None and str(error).startswith("Invalid cursor"), error


TARGETS: dict[str, tuple[Callable[[bytes], None], tuple[bytes, ...]]] = {
    "mllp": (mllp, (b"\x0bMSH|1\x1c\r", b"\x0bMSH|1\x0bMSH|2\x1c\r", b"x\x0b" + b"y" * LIMIT + b"\x1c\x0bMSH|\x1c\r")),
    "bytestream": (
        bytestream,
        (
            b"\x00\x05\r\n\x02ab\x03x\x02c\x02d\x03", b"\x01\x0bM\x1c\r\x0b" + b"y" * LIMIT + b"\x1c\r\x0bz\x1c\r",
            b"\x02===a====b==", b"\x03\x05\x021H|a\x17\x05\x04",
        ),
    ),
    "astm": (
        astm,
        (
            b"\x00" + SESSION, b"\x01" + SESSION + SESSION.replace(b"\r\n", b""), b"\x02" + SESSION + PAUSE,
            b"\x03" + SESSION.replace(b"\x03", b"\x17"), b"\x80\x06\x06\x15\x06" + SESSION, b"\x83" + b"\x06" * 9,
            b"\x80\x05" + SESSION + PAUSE + b"\x06\x04" + PAUSE + b"\x06",
            b"\xc1\x06\x04" + SESSION + PAUSE + b"\x06\x06",
        ),
    ),
    "dimse": (
        dimse,
        (
            b"\0" + ASSOCIATE + STORED, b"\1" + ENDINGS, b"\2" + STORED + ENDINGS, b"\3" + STORED + ENDINGS,
            b"\4" + ENDINGS[10:], b"\5" + STORED + ASSOCIATE, b"\2" + STORED.replace(b"\1\3", b"\1\1"), b"\2" + COMMAND,
        ),
    ),
    "hl7": (
        hl7,
        (
            MESSAGE, ACK, ACK.replace(b"MSG1", b" MSG1 "), MESSAGE.replace(b"\r", b"\r\n"),
            b"\xef\xbb\xbfMSH#*!%$#a", b"MSH|",
        ),
    ),
    "settings": (
        settings,
        (
            b"encoding=latin1&enhanced=true&appLevelAck=NE",
            b"maxWorkers=4&logicalChannelKey=PID-3.1,MSH-4&retryMode=normal",
            b"messagesPerMin=60abc&autoRetryBackoffMultiplier=1.5", b"[::1]:56000?assignSeqNo=true", b"h:65535#x",
            b"channelMaxWorkers=70&autoRetryBaseDelayMs=100", b"queueRetentionDays=5",
        ),
    ),
    "properties": (
        properties,
        (
            b"baseUrl=https://h/\nclientId=a\nclientSecret=SECRET\nagentId=1\nlogger.main.filesToKeep=3\n",
            b'baseUrl = "https://h/"\nclientId = "a"\nclientSecret = "SECRET"\nagentId = "1"\n'
            b"[logger.main]\nfilesToKeep=3",
            b"\xef\xbb\xbf# c\r\nclientSecret=SECRET\r\nheartbeatSecs=5\r\n",
        ),
    ),
    "cursor": (
        cursor,
        (
            b'bWVkcGx1bS1hZ2VudC1tYWluLTIwMjYtMDEtMDIubG9nOjU=\n{"level":"INFO","msg":"m","timestamp":"t"}\n\n[1]\n',
            b'50\n{"level":"INFO","msg":"m","timestamp":"t"}\n{"level":"INFO","msg":"m","timestamp":"t"}',
        ),
    ),
}  # fmt: skip
TOKENS = (
    b"\x0b", b"\x1c\r", b"\x0bMSH", b"\r", b"\n", b"MSH", b"|", b"^", b"~", b"\\", b"&", b"=", b"%", b"\xff", b"\x00",
    b'""', b"-1", b"0", b"9" * 30, b"9" * 400, b"1e999", b"nan", b"utf-16", b"'", b"[", b"]", b":",
    b"\xe2\x82\xac", b"A40", b"\x02", b"\x03", b"\x04", b"\x05", b"\x06", b"\x15", b"\x17", b"\xfe",
)  # fmt: skip


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The bytes with a few cuts, repetitions, swaps and tokens."""
    work = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        at, to = sorted((draw.randint(0, len(work)), draw.randint(0, len(work))))
        match draw.randrange(5):
            case 0:
                work[at:at] = draw.choice(TOKENS)
            case 1:
                work[at:to] = draw.choice(TOKENS)
            case 2:
                del work[at : min(to, at + 8)]
            case 3:
                work[at:at] = work[at : min(to, at + 40)]
            case _ if work:
                work[at % len(work)] = draw.randrange(256)
    return bytes(work[:4000])


def broken_by(name: str, content: bytes) -> str:
    """The traceback when the target fails on these bytes, else ``."""
    try:
        with time_limit():
            TARGETS[name][0](content)
    except Exception:
        return traceback.format_exc()
    return ""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """TimeoutError after so much processor time, where the system can tell."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"it takes more than {INPUT_SECS} s of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, INPUT_SECS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def fuzz(name: str, seconds: float, seed: int) -> tuple[int, bytes | None]:
    """Mutate seeds for so long: (inputs tried, the shortest of the inputs found to break the target)."""
    draw, pool = random.Random(seed), list(TARGETS[name][1])
    until, tried = time.monotonic() + seconds, 0
    for content in pool:
        if broken_by(name, content):
            return tried, content
    while time.monotonic() < until:
        tried += 1
        content = mutated(draw.choice(pool), draw)
        if broken_by(name, content):
            return tried, shortened(name, content)
        if tried % 50 == 0:
            pool.append(content)
    return tried, None


def shortened(name: str, content: bytes) -> bytes:
    """Leave out pieces for as long as the target still breaks."""
    for size in (256, 64, 16, 4, 1):
        at = 0
        while at < len(content):
            less = content[:at] + content[at + size :]
            content, at = (less, at) if broken_by(name, less) else (content, at + size)
    return content


def guided(name: str, seconds: float) -> None:
    """Coverage-guided, by atheris; it ends the process itself."""
    import atheris

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds:.0f}"], TARGETS[name][0])
    atheris.Fuzz()


# --- live: a running agent, all protocols and its uplink at once ---

# fmt: off
LIVE_CHANNELS = {name: f"{query}&frameTimeoutSecs=2&idleTimeoutSecs=5&responseTimeoutSecs=2&autoRetryMaxAttempts=3"
                 "&autoRetryBaseDelayMs=20&autoRetryMaxDelayMs=200" for name, query in {
    "ENH": "?enhanced=true", "ORIG": "?botErrorAck=AE",
    "RAW": "tcp://127.0.0.1:{port}?startChar=%02&endChar=%03&bodyEncoding=utf-8&autoRespond=%05:%06,%03:%06",
    "ASTM": "tcp://127.0.0.1:{port}?mode=astm&replyTimeoutSecs=0.5&nakDelaySecs=0.2&contentionTimeoutSecs=0.3"
            "&receiveTimeoutSecs=1&answerWaitMins=0.02",
    "PACS": "dicom://127.0.0.1:{port}?moveDestinations=GONE@127.0.0.1:9&associationTimeoutSecs=2&answerWaitSecs=1",
}.items()}
LIVE_REST, LIVE_CHECKS = 0.02, 20  # seconds between two inputs of one sender; checks in the whole time
LIVE_LONG, LIVE_GROWTH, LIVE_FILES = 100, 1.3, 12  # in runs of so many seconds memory and descriptors are judged
LIVE_TROUBLE = re.compile(r"Internal error|Fatal|Traceback|type [a-z][a-z:]* could not be handled", re.IGNORECASE)
STRANGE: tuple[Any, ...] = (
    2**70, "\ud800", None, True, 0, -1, 1e300, "", "\0", "x" * 200_000, [], {}, [[]], [None], {"a": 1}, "MSH|", "MSA|A",
    MESSAGE.decode(), "H|\\^&\nL|1|N", [{"00100010": {"vr": "PN", "Value": [1]}}], [{"00100010": 5}], [{"": {}}])
REMOTES = (
    "mllp://127.0.0.1:9", "mllp://127.0.0.1:9?" + "a" * 9000, "mllps://127.0.0.1:9", "tcp://127.0.0.1:9",
    "tcp://127.0.0.1:9?mode=astm", "dicom://GONE@127.0.0.1:9", "mllp://127.0.0.1:-1", "mllp://[127.0.0.1:9",
    "serial:/nowhere", "127.0.0.1", "://", "mllp:127.0.0.1:9", *STRANGE[:11], [], {}, ["x"])
KINDS = ("transmit:request", "transmit:response", "logs:request", "stats:request", "upgrade:request", "error",
         "reloadconfig:request", "connect:response", "heartbeat:request", "heartbeat:response", "what")
TYPES = (ma.HL7_TYPE, ma.PING_TYPE, ma.BYTES_TYPE, ma.ASTM_TYPE, ma.JSON_TYPE, ma.DICOM_TYPE, None, 7)
BROKEN_FRAMES = (b"\x83\x01x", b"\x81\x02\xff\xff", b"\x89\x7e\x00\x7e", b"\x01\x01{", b"\x80\x00", b"\x82\x7f\xff")
# fmt: on


class Live:
    """A site under fuzzing. `troubles` are what must not be in its logs, with the inputs that came last."""

    def __init__(self, here: Any, seed: int):
        self.here, self.seed, self.draw = here, seed, random.Random(seed)
        self.tried, self.read = collections.Counter[str](), collections.Counter[Path]()  # `read`: bytes of logs
        self.recent, self.callbacks = collections.deque[str](maxlen=60), collections.deque([""], maxlen=50)
        self.troubles: dict[str, str] = {}
        self.recordings: dict[str, list[tuple[bytes, ...]]] = {"PACS": []}
        self.stopped, self.calm = threading.Event(), threading.Event()  # `calm`: the server is well

    def record(self) -> None:
        """What devices say when all is well, in the pieces between which they listen."""
        said = list[bytes]()

        class Recorder(peers.Scu):
            def pdu(self, kind: int, content: bytes = bytes(4)) -> None:
                said.append(_pdu(kind, content))
                super().pdu(kind, content)

        texts = [support.message(f"M{n}", f"P{n % 3}", text="\u00e4", size=n * 900) for n in range(4)]
        hl7, raw = [ma.mllp_frame(text.encode()) for text in texts], (b"\x05\x02ab\x03", b"x\x02c\x02d\x03\x02ee\x03")
        self.recordings["ENH"] = self.recordings["ORIG"] = [(hl7[1],), (hl7[3],), tuple(hl7), (b"".join(hl7),)]
        self.recordings["RAW"] = [raw, (b"".join(raw),), (b"\x02" + b"e" * 3000 + b"\x03",)]
        frames = ma.astm_frames((b"H|\\^&|||A\r", b"Q|1|^TUBE\r", b"R|1|^^^GLU|5.4\r", b"L|1|N\r"), 12)
        self.recordings["ASTM"] = [(b"\x05", *frames, b"\x04"), (SESSION, SESSION), (b"\x05\x04", b"\x06" * 9, SESSION)]
        item = peers.data_set(ReferencedSOPClassUID=peers.CT, ReferencedSOPInstanceUID="1.2")
        whole = peers.made(300, QueryRetrieveLevel="STUDY", TransactionUID="1.2.3", ReferencedSOPSequence=[item])
        for name, number in {
            whole.sop_class: 1, peers.STUDY_FIND: 0x20, peers.WORKLIST: 0x20, peers.STUDY_MOVE: 0x21,
            peers.STUDY_GET: 0x10, peers.MPPS: 0x140, peers.COMMITMENT: 0x130,
        }.items():  # fmt: skip
            said.clear()
            asked: dict[int, int | str] = {2: name, 3: name, 0x100: number, 0x600: "GONE", 0x1000: whole.uid, 0x1008: 1}
            with Recorder(self.here.ports["PACS"], [(name, [peers.EXPLICIT])]) as scu:
                scu.request(scu.accepted[name, peers.EXPLICIT], asked | {0x1001: f"{name}.1"}, whole.content)
                scu.response()
            self.recordings["PACS"].append(tuple(said))

    def sender(self, name: str, number: int) -> None:
        """A device: one connection after the other, its pieces mutated, mixed, cut or slow, ended in any way."""
        draw, pool = random.Random(f"{self.seed} {name} {number}"), self.recordings[name]
        while not self.stopped.wait(LIVE_REST):
            pieces, head = list(draw.choice(pool)), draw.choice((12, 4000))  # a DICOM PDU has its lengths in the head
            for at in draw.sample(range(len(pieces)), draw.randint(0, min(3, len(pieces)))):
                pieces[at] = mutated(pieces[at][:head], draw) + pieces[at][head:]
            if draw.random() < 0.2:
                pieces.insert(draw.randint(0, len(pieces)), draw.choice(draw.choice(pool)))
            self.tried[name] += 1
            self.recent.append(f"{time.time():.3f} {name} {' '.join(piece.hex() for piece in pieces)[:20_000]}")
            with contextlib.suppress(OSError), self.here.device(name, timeout=2) as device:
                self._send(device.socket, pieces, draw)

    def _send(self, line: socket.socket, pieces: list[bytes], draw: random.Random) -> None:
        for piece in pieces:
            cut = draw.randint(0, len(piece)) if draw.random() < 0.1 else len(piece)
            step = 1 if cut < 200 and draw.random() < 0.1 else 4096
            for at in range(0, cut, step):
                line.sendall(piece[at : min(cut, at + step)])
                time.sleep(0.003 if step == 1 else 0)
            if select.select([line], [], [], draw.choice((0, 0.02, 0.2)))[0] and not line.recv(65536):
                return
        if draw.random() < 0.3:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        elif draw.random() < 0.5:
            line.shutdown(socket.SHUT_WR)
        self.stopped.wait(draw.choice((0, draw.random())))

    def bot(self, transmit: Any) -> tuple[int, Any]:
        """Good messages are answered well, others now and then with anything that the stand-in server can encode."""
        self.callbacks.append(transmit.callback)
        if "GOOD" not in transmit.body and not self.calm.is_set() and self.draw.random() < 0.15:
            return self.draw.choice((0, -5, 200, 201, 400, 404, 503, 99999, True)), self.draw.choice(STRANGE[2:])
        if transmit.content_type == ma.HL7_TYPE:
            return accepting_bot(transmit)
        return 200, "H|\\^&\nL|1|N" if "TUBE" in transmit.body else "\x06" if transmit.channel == "RAW" else ""

    def server(self, draw: random.Random) -> None:
        """Frames now and then, in the loop of the stand-in server."""
        if not self.stopped.is_set():
            self.here.sandbox.loop.call_later(0.05, self.server, draw)
        agent, chance = self.here.sandbox.sandbox.agents.get("agent-1"), draw.random()
        if agent is None or self.calm.is_set() or agent._protocol.state.name != "OPEN":
            return
        known = draw.choice(self.callbacks).encode()
        message = {
            "type": f"agent:{draw.choice(KINDS)}", "limit": 5, "channel": draw.choice([*LIVE_CHANNELS]),
            "statusCode": 200, "body": draw.choice(STRANGE), "contentType": ma.HL7_TYPE, "returnAck":
            draw.choice(("first", "application", "", 5)), "callback": draw.choice((known, known, mutated(known, draw)))
            .decode("latin-1"),
        }  # fmt: skip
        message |= {name: draw.choice(STRANGE) for name in draw.sample([*message], draw.choice((0, 0, 1, 1, 2)))}
        message |= {"remote": draw.choice(REMOTES), "contentType": draw.choice(TYPES)} if draw.random() < 0.8 else {}
        for name in draw.sample([*message], draw.choice((0, 0, 0, 1, 3))):
            del message[name]
        text = json.dumps(message).encode() if chance > 0.02 else b"[" * draw.choice((1, 900, 100_000))
        if chance < 0.3 and "remote" not in message:  # mutated bytes must not become another host's address
            text = mutated(text, draw)
        self.tried["uplink"] += 1
        self.recent.append(f"{time.time():.3f} uplink {text[:20_000]!r}")
        if chance > 0.995:
            agent.close() if draw.random() < 0.5 else agent._protocol.send_close(draw.choice((1000, 1009, 1011, 4000)))
        elif chance > 0.99:
            agent._writer.write(draw.choice(BROKEN_FRAMES))
        elif chance > 0.85:
            agent._protocol.send_text(text[:9], fin=False)
            agent._protocol.send_continuation(text[9:], fin=True)
        else:
            (agent._protocol.send_binary if chance > 0.75 else agent._protocol.send_text)(text)
        agent._flush()

    def check(self, mark: str) -> tuple[int, int]:
        """A message passes each channel while others are fuzzed and the server is well; the figures."""
        self.calm.set()
        try:
            self._good(mark)
        except (OSError, EOFError, AssertionError):
            self.troubles[mark] = traceback.format_exc()
        self.calm.clear()
        self.look()
        return self.figures()

    def figures(self) -> tuple[int, int]:
        """Resident kB and open descriptors, where the system tells."""
        if not (folder := Path(f"/proc/{self.here.agent.process.pid}")).exists():
            return 0, 0
        resident = (folder / "status").read_text().partition("VmRSS:")[2].split()[0]
        return int(resident), len([*(folder / "fd").iterdir()])

    def _good(self, mark: str) -> None:
        here, seen = self.here, self.here.sandbox.seen
        here.sandbox.wait_for(lambda: here.sandbox.connected, 60, "the agent is connected")
        image = peers.made(1000, PatientID=f"GOOD-{mark}")
        names = [*(f"GOOD-{name}-{mark}" for name in "EORA"), image.uid]
        enhanced, original, raw, astm, _ = names
        for channel, sent, answer in (
            ("ENH", support.message(enhanced, enhanced), f"MSA|CA|{enhanced}"),
            ("ORIG", support.message(original, original), f"MSA|AA|{original}"), ("RAW", f"\x02{raw}\x03", "\x06"),
        ):  # fmt: skip
            with here.device(channel, timeout=30) as device:
                device.send_raw(sent.encode() if channel == "RAW" else ma.mllp_frame(sent.encode()))
                heard = b""
                while answer.encode() not in heard:  # among answers to devices that went away
                    heard += device.socket.recv(4096) or b"closed"
                    assert not heard.endswith(b"closed"), channel
        with Instrument.at(here.ports["ASTM"], "127.0.0.2") as instrument:  # an address that no order waits for
            instrument.session("H|\\^&", f"R|1|{astm}", "L|1|N")
        assert peers.store(here.ports["PACS"], image, calling="GOOD") == [peers.SUCCESS]
        here.sandbox.wait_for(lambda: all(any(n in t.body for _, t in seen) for n in names), 60, f"arrival of {names}")
        for kept in (seen, here.sandbox.answered, here.sandbox.sandbox.requests, here.sandbox.sandbox.binaries):
            kept.clear()

    def look(self) -> None:
        """New troubles in the logs, as soon as they are there."""
        agent = self.here.agent
        assert agent.process.poll() is None, f"the agent ended: {agent.output()[-3000:]}"
        for path in [*agent.state_dir.glob("medplum-agent-main-*"), agent.output_path]:
            with path.open("rb") as file:
                file.seek(self.read[path])
                lines = file.read().rpartition(b"\n")[0]
            self.read[path] += len(lines)
            for line in filter(LIVE_TROUBLE.search, lines.decode("utf-8", "replace").splitlines()):
                what = re.sub(r'"timestamp":"[^"]*"|message \d+', "", line)
                self.troubles.setdefault(what, "\n".join([line, *self.recent]))


def live(seconds: float, seed: int) -> dict[str, str]:
    """Fuzz a running agent for so long, print the figures, and return the troubles; AssertionError."""
    settings = {"queueRetentionMaxMb": 8, "queueErroredRetentionDays": 0, "queueSweepIntervalSecs": 5}
    entries, only = [*map(support.setting, settings, settings.values())], 'pushTargets = "127.0.0.1"'
    with tempfile.TemporaryDirectory() as at, support.site(Path(at), LIVE_CHANNELS, entries, config=only) as here:
        support.eventually(lambda: all(support.accepts(("127.0.0.1", port)) for port in here.ports.values()))
        run, sandbox = Live(here, seed), here.sandbox.sandbox
        sandbox.keep_transmits, here.sandbox.bot, answered = False, run.bot, sandbox.answered
        sandbox.answered = lambda message: isinstance(message.get("callback"), str) and answered(message)  # type: ignore[assignment,method-assign]
        run.record()
        before, long, rows = run.check("before"), seconds > LIVE_LONG, list[tuple[int, int]]()
        here.sandbox.loop.call_soon_threadsafe(run.server, random.Random(seed))
        for number, name in enumerate([*LIVE_CHANNELS] * 2):
            threading.Thread(target=run.sender, args=(name, number), daemon=True).start()
        for number in range(1, LIVE_CHECKS + 1):
            until = time.monotonic() + seconds / LIVE_CHECKS
            while time.monotonic() < until:
                time.sleep(0.1)
                run.look()
            rows.append(run.check(f"check {number}") if long or number % 5 == 0 else run.figures())
        run.stopped.set()
        with contextlib.suppress(AssertionError):
            support.eventually(lambda: run.figures()[1] <= before[1] + LIVE_FILES, 30 if long else 0)
        end = run.check("end")
        print(f"live: seed {seed}, inputs {dict(run.tried)}; kB resident and descriptors: before {before}, after 20 % "
              f"{rows[3]}, in the middle {rows[9]}, at the end {rows[-1]}, at rest {end}", flush=True)  # fmt: skip
        if long and (max(rows[-1], end)[0] > rows[3][0] * LIVE_GROWTH or end[1] > before[1] + LIVE_FILES):
            run.troubles["figures"] = f"memory grows or descriptors stay open: {rows}"
        print(*run.troubles.values(), f"live: {'BROKEN' if run.troubles else 'ok'}", sep="\n\n")
        return run.troubles


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="target", help=f"default: all of {', '.join(TARGETS)}; or live")
    parser.add_argument("--seconds", "--secs", type=float, default=10, help="for each target")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--input", type=bytes.fromhex, help="try this one input")
    options = parser.parse_args(arguments)
    if options.targets == ["live"]:
        return int(bool(live(options.seconds, options.seed)))
    names = options.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if options.input is None and len(names) == 1 and importlib.util.find_spec("atheris"):
        guided(names[0], options.seconds)
    failed = False
    for name in names:
        tried, culprit = (1, options.input) if options.input is not None else fuzz(name, options.seconds, options.seed)
        trouble = broken_by(name, culprit) if culprit is not None else ""
        print(
            f"{name}: {tried} inputs, seed {options.seed}: {'BROKEN by ' + (culprit or b'').hex() if trouble else 'ok'}"
        )
        if trouble:
            failed = True
            print(trouble, file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
