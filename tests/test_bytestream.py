"""The byte-stream core against its table, and against itself: one piece, byte by byte and every cut are the same."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medplum_agent import (
    ByteStream,
    ConfigError,
    PeerError,
    StreamSettings,
    Write,
    auto_responses,
    stream_answer,
    stream_body,
)

LIMIT = 24
PLAIN = StreamSettings(startChar="\x02", endChar="\x03", maxMessageBytes=LIMIT)
ASTM_GUIDE = StreamSettings(startChar="\x05", endChar="\x04", autoRespond="\x05:\x06,\x03:\x06,\x17:\x06")
SAME = StreamSettings(startChar="\x1c", endChar="\x1c", maxMessageBytes=LIMIT)
LONG = StreamSettings(startChar="<<", endChar=">>!", maxMessageBytes=LIMIT)
LONG_SAME = StreamSettings(startChar="==", endChar="==", maxMessageBytes=LIMIT)
RULES = StreamSettings(
    startChar="\x02", endChar="\x03", maxMessageBytes=LIMIT, autoRespond="\x03:A,b\x03:B,\x02:S,x\x02:never,\x03:twice"
)
TOO_LARGE = f"PeerError: the message is larger than {LIMIT} bytes (maxMessageBytes)"
CUT_OFF = "PeerError: the message was cut off by the start of the next one"
BIG = b"z" * LIMIT


def message(content: bytes) -> bytes:
    return content


def fed(options: StreamSettings, *chunks: bytes) -> tuple[list, ByteStream]:
    core = ByteStream(options)
    events = [event for chunk in chunks for event in core.receive(chunk)]
    return [f"PeerError: {e}" if isinstance(e, PeerError) else e for e in events], core


def one_by_one(stream: bytes) -> list[bytes]:
    return [stream[i : i + 1] for i in range(len(stream))]


TABLE = {
    "nothing": (PLAIN, b"", []),
    "one message with its framing": (PLAIN, b"\x02abc\x03", [message(b"\x02abc\x03")]),
    "empty message": (PLAIN, b"\x02\x03", [message(b"\x02\x03")]),
    "bytes before the start are not part of it": (
        PLAIN,
        b"\x05\x02a\x03\r\n\x02b\x03\r\n",
        [message(b"\x02a\x03"), message(b"\x02b\x03")],
    ),
    "an end without start is nothing": (PLAIN, b"abc\x03\x03\x02a\x03", [message(b"\x02a\x03")]),
    "a start inside begins anew": (PLAIN, b"\x02a\x02b\x03", [CUT_OFF, message(b"\x02b\x03")]),
    "unfinished": (PLAIN, b"\x02abc", []),
    "equal start and end": (SAME, b"x\x1ca\x1cy\x1cb\x1c", [message(b"\x1ca\x1c"), message(b"\x1cb\x1c")]),
    "sequences of several bytes": (LONG, b"<a<<b>c>>d>>!<<>>!", [message(b"<<b>c>>d>>!"), message(b"<<>>!")]),
    "a byte belongs to one mark only": (LONG_SAME, b"===a====b==", [message(b"===a=="), message(b"==b==")]),
    "as large as allowed": (PLAIN, b"\x02" + BIG[2:] + b"\x03", [message(b"\x02" + BIG[2:] + b"\x03")]),
    "one byte too large": (PLAIN, b"\x02" + BIG[1:] + b"\x03\x02a\x03", [TOO_LARGE, message(b"\x02a\x03")]),
    "too large, begun anew": (PLAIN, b"\x02" + BIG * 3 + b"\x02a\x03", [TOO_LARGE, message(b"\x02a\x03")]),
    "too large and unfinished": (PLAIN, b"\x02" + BIG * 3, [TOO_LARGE]),
    "answers everywhere, in order": (
        ASTM_GUIDE,
        b"\x05\x02x\x17\x02y\x03\x04\x03",
        [*[Write(b"\x06")] * 3, message(b"\x05\x02x\x17\x02y\x03\x04"), Write(b"\x06")],
    ),
    "the answer comes after the message that ends there": (
        RULES,
        b"x\x02ab\x03",
        [Write(b"S"), message(b"\x02ab\x03"), Write(b"A"), Write(b"B")],
    ),
    "a pattern does not reach over a start": (RULES, b"xx\x02", [Write(b"S")]),
    "what is dropped is not answered": (RULES, b"\x02" + BIG + b"b\x03\x03", [Write(b"S"), TOO_LARGE, Write(b"A")]),
}


@pytest.mark.parametrize(("options", "stream", "expected"), TABLE.values(), ids=TABLE)
def test_table(options: StreamSettings, stream: bytes, expected: list) -> None:
    assert fed(options, stream)[0] == expected
    assert fed(options, *one_by_one(stream))[0] == expected
    for cut in range(len(stream)):
        assert fed(options, stream[:cut], stream[cut:])[0] == expected


def test_bytes_outside_are_counted() -> None:
    _, core = fed(PLAIN, b"ab\x02x\x03\r\n", b"cd", b"\x02y\x03")
    assert core.skipped == 6


def test_start_and_end_are_needed() -> None:
    for options in (StreamSettings(startChar="a"), StreamSettings(endChar="a")):
        with pytest.raises(ConfigError, match="startChar and endChar"):
            ByteStream(options)


@pytest.mark.parametrize("text", ["a", ":b", "é:\u0100"])
def test_bad_rules(text: str) -> None:
    with pytest.raises(ValueError):
        auto_responses(text)


def test_body() -> None:
    framed = b"\x02ab\r\nabc\x01\x03"
    assert stream_body(framed, StreamSettings()) == framed.hex()
    assert stream_body(framed, StreamSettings(bodyEncoding="utf-8")) == framed.decode()
    strip = StreamSettings(bodyEncoding="utf8", stripSequence="ab,abc,\x02")
    assert stream_body(framed, strip) == "\r\n\x01\x03"
    assert stream_body(b"aababb", StreamSettings(bodyEncoding="utf8", stripSequence="ab")) == "ab"  # no rescan
    sweep = StreamSettings(bodyEncoding="utf8", stripControlChars=True, keepControlChars="\r\n")
    assert stream_body(framed, sweep) == "ab\r\nabc"
    assert stream_body(b"\xff", StreamSettings(bodyEncoding="utf8")) == "\ufffd"


def test_answer() -> None:
    assert stream_answer("0206 0d", StreamSettings()) == b"\x02\x06\r"
    assert stream_answer("0206", StreamSettings(bodyEncoding="utf8")) == b"0206"
    assert stream_answer("\ud800é", StreamSettings(bodyEncoding="utf-8")) == b"?\xc3\xa9"
    with pytest.raises(PeerError, match="bodyEncoding"):
        stream_answer("ok", StreamSettings())


# --- properties ---

OPTIONS = st.sampled_from([PLAIN, SAME, LONG, LONG_SAME, RULES])
STREAMS = st.lists(
    st.one_of(
        st.sampled_from([b"\x02", b"\x03", b"\x1c", b"<", b"<<", b">>!", b">", b"!", b"=", b"==", b"b\x03", b"x\x02"]),
        st.integers(LIMIT - 8, LIMIT + 4).map(lambda size: b"z" * size),
        st.binary(max_size=4),
    ),
    max_size=12,
).map(b"".join)


@given(OPTIONS, STREAMS, st.data())
@settings(max_examples=400, deadline=None)
def test_every_cut_gives_the_same_events(options: StreamSettings, stream: bytes, draw: st.DataObject) -> None:
    whole, core = fed(options, stream)
    singly, single_core = fed(options, *one_by_one(stream))
    assert singly == whole
    assert single_core.inside == core.inside
    for cut in range(1, len(stream)):
        assert fed(options, stream[:cut], stream[cut:])[0] == whole
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    assert fed(options, *[stream[a:b] for a, b in itertools.pairwise([0, *cuts, len(stream)])])[0] == whole


@given(OPTIONS, st.binary(max_size=300), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_memory_is_bounded(options: StreamSettings, stream: bytes, step: int) -> None:
    core = ByteStream(options)
    for at in range(0, len(stream), step):
        core.receive(stream[at : at + step])
        assert len(core._kept) <= LIMIT


def test_a_message_without_end_takes_no_memory() -> None:
    core = ByteStream(StreamSettings(startChar="\x02", endChar="\x03"))
    core.receive(b"\x02")
    largest = 0
    for _ in range(400):
        core.receive(b"x" * 65_536)
        largest = max(largest, len(core._kept))
    assert largest <= 8 * 2**20
    assert len(core._kept) < 3
