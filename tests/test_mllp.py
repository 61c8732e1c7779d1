"""The MLLP core against its table, and against itself: one piece, byte by byte and every cut give the same events."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import medplum_agent as ma

LIMIT = 24
TOO_LARGE = f"PeerError: the message is larger than {LIMIT} bytes (maxMessageBytes)"
CUT_OFF = "PeerError: the message was cut off by the start of the next one"
BIG = b"MSH" + b"x" * LIMIT


def shown(events: list[bytes | ma.FrameError]) -> list[bytes | str]:
    return [event if isinstance(event, bytes) else f"PeerError: {event}" for event in events]


def fed(*chunks: bytes, limit: int = LIMIT) -> tuple[list[bytes | str], ma.Mllp]:
    core = ma.Mllp(limit)
    return [event for chunk in chunks for event in shown(core.receive(chunk))], core


def one_by_one(stream: bytes) -> list[bytes]:
    return [stream[i : i + 1] for i in range(len(stream))]


TABLE = {
    "nothing": (b"", []),
    "one frame": (b"\x0bMSH|1\x1c\r", [b"MSH|1"]),
    "frames back to back": (b"\x0bMSH|1\x1c\r\x0bMSH|2\x1c\r\x0bMSH|3\x1c\r", [b"MSH|1", b"MSH|2", b"MSH|3"]),
    "empty frame": (b"\x0b\x1c\r", [b""]),
    "garbage before, between and after": (b"hello\x0bMSH|1\x1c\r\r\n\0\x0bMSH|2\x1c\r\xff", [b"MSH|1", b"MSH|2"]),
    "end marks outside of frames": (b"\x1c\r\x1c\r\x0bMSH|1\x1c\r\x1c\r", [b"MSH|1"]),
    "unfinished": (b"\x0bMSH|1", []),
    "only half an end mark": (b"\x0bMSH|1\x1c", []),
    "0x1C and CR inside the content": (b"\x0bMSH\r|\x1c|1\r\x1c\r", [b"MSH\r|\x1c|1\r"]),
    "0x1C before the end mark": (b"\x0bMSH|1\x1c\x1c\r", [b"MSH|1\x1c"]),
    "0x0B that starts no message is content": (b"\x0bMSH|\x0b|1\x1c\r", [b"MSH|\x0b|1"]),
    "cut off, then a good one": (b"\x0bMSH|1\x0bMSH|2\x1c\r", [CUT_OFF, b"MSH|2"]),
    "cut off twice": (b"\x0bMSH|1\x0bMSH|2\x0bMSH|3\x1c\r", [CUT_OFF, CUT_OFF, b"MSH|3"]),
    "a lone 0x1C ends a frame when the next begins": (b"\x0bMSH|1\x1c\x0bMSH|2\x1c\r", [b"MSH|1", b"MSH|2"]),
    "not HL7, but a frame": (b"\x0bhello\x1c\r", [b"hello"]),
    "as large as allowed": (b"\x0b" + BIG[:LIMIT] + b"\x1c\r", [BIG[:LIMIT]]),
    "one byte too large": (b"\x0b" + BIG[: LIMIT + 1] + b"\x1c\r", [TOO_LARGE]),
    "too large, then good": (b"\x0b" + BIG * 3 + b"\x1c\r\x0bMSH|2\x1c\r", [TOO_LARGE, b"MSH|2"]),
    "too large, cut off, then good": (b"\x0b" + BIG + b"\x0bMSH|2\x1c\r", [TOO_LARGE, b"MSH|2"]),
    "too large and unfinished": (b"\x0b" + BIG * 3, [TOO_LARGE]),
    "as large as allowed, ended by a lone 0x1C": (
        b"\x0b" + BIG[:LIMIT] + b"\x1c\x0bMSH|2\x1c\r",
        [BIG[:LIMIT], b"MSH|2"],
    ),
}


@pytest.mark.parametrize(("stream", "expected"), TABLE.values(), ids=TABLE)
def test_table(stream: bytes, expected: list[bytes | str]) -> None:
    assert fed(stream)[0] == expected
    assert fed(*one_by_one(stream))[0] == expected
    for cut in range(len(stream)):
        assert fed(stream[:cut], stream[cut:])[0] == expected


def test_bytes_between_frames_are_counted() -> None:
    _, core = fed(b"ab\x0bMSH|1\x1c\r\r\n", b"cd", b"\x0bMSH|2\x1c\r")
    assert core.skipped == 4, "but for line ends"


def test_inside_tells_whether_the_sender_owes_bytes() -> None:
    core = ma.Mllp(LIMIT)
    seen = []
    for byte in one_by_one(b"x\x0bM\x1c\rx"):
        core.receive(byte)
        seen.append(core.inside)
    assert seen == [False, True, True, True, False, False]


def test_frame_and_core_are_inverse() -> None:
    assert fed(ma.mllp_frame(b"MSH|1"))[0] == [b"MSH|1"]


def test_a_limit_lowered_in_the_middle_of_a_frame_holds_for_it() -> None:
    core = ma.Mllp(LIMIT)
    assert core.receive(b"\x0b" + b"x" * LIMIT) == []
    core.limit = 4
    assert shown(core.receive(b"yyy\x1c\r\x0bok\x1c\r")) == [
        "PeerError: the message is larger than 4 bytes (maxMessageBytes)",
        b"ok",
    ]


# --- properties ---

CONTENT = st.text("MSH|^\rx", max_size=LIMIT).map(str.encode)
PIECES = st.one_of(
    CONTENT.map(ma.mllp_frame),
    CONTENT.map(lambda content: b"\x0bMSH" + content + b"\x1c\r"),
    st.sampled_from([b"\x0b", b"\x1c", b"\r", b"\x1c\r", b"\x0bMSH", b"\x0bMS", b"M", b"MSH", b"\x1c\x0bMSH"]),
    st.integers(LIMIT - 6, LIMIT + 8).map(lambda size: b"\x0b" + b"z" * size),
    st.integers(LIMIT - 6, LIMIT + 8).map(lambda size: b"\x0bMSH" + b"z" * (size - 3) + b"\x1c\r"),
    st.binary(max_size=6),
)
STREAMS = st.lists(PIECES, max_size=8).map(b"".join)


@given(STREAMS)
@settings(max_examples=300, deadline=None)
def test_every_cut_gives_the_same_events(stream: bytes) -> None:
    whole, core = fed(stream)
    singly, single_core = fed(*one_by_one(stream))
    assert singly == whole
    assert (single_core.inside, single_core.skipped) == (core.inside, core.skipped)
    for cut in range(1, len(stream)):
        assert fed(stream[:cut], stream[cut:])[0] == whole


@given(STREAMS, st.data())
@settings(max_examples=150, deadline=None)
def test_any_chunks_give_the_same_events(stream: bytes, draw: st.DataObject) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    bounds = [0, *cuts, len(stream)]
    chunks = [stream[a:b] for a, b in itertools.pairwise(bounds)]
    assert fed(*chunks)[0] == fed(stream)[0]


@given(st.lists(st.tuples(st.binary(max_size=8), st.binary(max_size=LIMIT)), max_size=8))
@settings(max_examples=150, deadline=None)
def test_good_frames_survive_any_garbage_between_them(pairs: list[tuple[bytes, bytes]]) -> None:
    clean = [
        (gap.translate(None, b"\x0b\r\n"), text.replace(b"\x1c", b"").replace(b"\x0b", b"")) for gap, text in pairs
    ]
    stream = b"".join(gap + ma.mllp_frame(content) for gap, content in clean)
    events, core = fed(stream)
    assert events == [content for _, content in clean]
    assert core.skipped == sum(len(gap) for gap, _ in clean)


@given(st.binary(max_size=400), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_arbitrary_bytes_give_events_only_and_bounded_memory(stream: bytes, step: int) -> None:
    core = ma.Mllp(LIMIT)
    for at in range(0, len(stream), step):
        for event in core.receive(stream[at : at + step]):
            assert isinstance(event, ma.PeerError) or len(event) <= LIMIT
        assert len(core._buffer) <= LIMIT + len(ma.RESTART)


def test_a_frame_without_end_takes_no_memory() -> None:
    core = ma.Mllp(LIMIT)
    assert shown(core.receive(b"\x0b" + b"x" * 100_000)) == [TOO_LARGE]
    for _ in range(100):
        assert core.receive(b"x" * 1000) == []
        assert len(core._buffer) < 10
    assert core.receive(b"\x1c\r\x0bMSH|1\x1c\r") == [b"MSH|1"]


def test_a_flood_of_starts_is_scanned_once() -> None:
    """A start mark may not make the core look for the end of the whole chunk again: that would be quadratic."""

    class Counting(bytes):
        looked_at = 0

        def find(self, sub, start=0, end=None):
            found = super().find(sub, start, end)
            stop = len(self) if end is None else end
            Counting.looked_at += (stop if found < 0 else found) - start
            return found

    flood = Counting(ma.RESTART * 4000)
    assert len(ma.Mllp(LIMIT).receive(flood)) == 3999
    assert Counting.looked_at < 20 * len(flood)
