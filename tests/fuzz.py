"""Fuzzing: python tests/fuzz.py [target ...] [--seconds N] [--seed N]. Targets are functions of some bytes.

A target may raise nothing but what its parser documents (PeerError, ConfigError, ValueError), and checks what must
hold of the result. With atheris the bytes are guided by coverage (one target a run); without it seeds are mutated at
random. The first input that breaks a target is printed as hex, and the exit code is 1:

    python tests/fuzz.py hl7 --input 4d53487c
"""

import argparse
import contextlib
import importlib.util
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import medplum_agent as ma

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
        while core.awaiting_commit:
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
        if isinstance(event, ma.Session | ma.Interrupted):
            ma.delimiters(event.records[0])
            ma.text_records(ma.records_text(event.records, settings), settings)
    return [*map(repr, heard), str(core.skipped)]


DIMSE_STATES = ("Sta2", "Sta3", "Sta6", "Sta7", "Sta10", "Sta13")
DIMSE_ENDS = (ma.RELEASE_RP, ma.ABORT)


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
    assert len(answer) == 10 * len(said) and said in ([], [ma.RELEASE_RP], [ma.ABORT], [*DIMSE_ENDS]), answer.hex()
    if events and isinstance(asked := events[-1], ma.Associate):
        accepted = whole.accept([ma.DicomLine._negotiated(context) for context in asked.contexts], asked.roles)
        assert accepted[0] == ma.ASSOCIATE_AC and len(accepted) == 6 + int.from_bytes(accepted[2:6], "big")
    with contextlib.suppress(ma.PeerError):
        assert "CommandField" in ma.read_command(stream)


def _dimse_in(state: str) -> ma.Dimse:
    core = ma.Dimse(16384)
    if state == "Sta2":
        return core
    core.receive(ASSOCIATE)
    if state != "Sta3":
        core.accept([(ma.Context(number, "1.2", (ma.IMPLICIT,)), 0) for number in (1, 3)], {})
    if state in ("Sta7", "Sta10"):
        core.release()
    if state in ("Sta10", "Sta13"):
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
            ma.ordering_key(text, header, spec)
        for code in ma.ACK_TEXT:
            assert ma.build_ack(header, code, ma.clean_text(text)).count("\r") == 2
        numbered = ma.write_sequence_number(text, 7)
        assert ma.Header(numbered).field(13) == "7"
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
                ma.decode_hl7(b"MSH|\xff\x80" + content, channel.settings.encoding)
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
            cursors.append(ma._cursor("medplum-agent-main-2026-01-02.log", int(before[:400])))
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="target", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=10, help="for each target")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--input", type=bytes.fromhex, help="try this one input")
    options = parser.parse_args(arguments)
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
