"""The ASTM core against the standard (E1381, LIS01-A2), both roles, with a simulated clock: no test waits."""

import dataclasses
import heapq
import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medplum_agent import (
    DOUBT_SECS,
    FRAME_TEXT_BYTES,
    INTERRUPT_SECS,
    TAIL_SECS,
    TURN_SECS,
    WAITING_BYTES,
    Astm,
    AstmEvent,
    FrameAccepted,
    LineWarning,
    Link,
    Sent,
    Session,
    StreamSettings,
    Write,
    astm_frame,
    astm_frames,
    records_text,
    text_records,
)

USUAL = StreamSettings()
STX, ETX, EOT, ENQ, ACK, NAK, ETB = b"\x02", b"\x03", b"\x04", b"\x05", b"\x06", b"\x15", b"\x17"
RECORDS = (b"H|\\^&|||ABC\r", b"P|1\r", b"O|1|E42|DB$\r", b"R|1|^^^GLU|5.4|mg/dL\r", b"L|1|N\r")
ACKED, NAKED, ASKED, ENDED = Write(ACK), Write(NAK), Write(ENQ), Write(EOT)


class Line:
    """An Astm whose frames are committed at once; collects everything it says."""

    def __init__(self, options: StreamSettings = USUAL, **changes):
        self.core = Astm(dataclasses.replace(options, **changes))
        self.now = 100.0
        self.frames: list[FrameAccepted] = []

    def committing(self, events: list) -> list:
        said = []
        while events:
            said += [event for event in events if not isinstance(event, FrameAccepted)]
            self.frames += (frames := [event for event in events if isinstance(event, FrameAccepted)])
            events = self.core.committed(self.now) if frames else []
        return said

    def hear(self, *chunks: bytes) -> list:
        return [event for chunk in chunks for event in self.committing(self.core.receive(chunk, self.now))]

    def say(self, *records: bytes) -> list:
        return self.core.send(records, self.now)

    def wait(self, seconds: float) -> list:
        """Time passes, and every deadline in it is kept to the millisecond."""
        end, said = self.now + seconds, []
        while (due := self.core.deadline()) is not None and due <= end:
            self.now = max(self.now, due)
            said += self.committing(self.core.expired(self.now))
        self.now = end
        return said


def frame(number: int, text: bytes, end: int = ETX[0]) -> bytes:
    return astm_frame(number, text, end)


def session(*records: bytes, size: int = 240) -> bytes:
    return ENQ + b"".join(astm_frames(records, size)) + EOT


def one_by_one(stream: bytes) -> list[bytes]:
    return [stream[i : i + 1] for i in range(len(stream))]


def warnings(events: list) -> list[str]:
    return [event.text for event in events if isinstance(event, LineWarning)]


def without_warnings(events: list) -> list:
    return [event for event in events if not isinstance(event, LineWarning)]


# --- receiver ---

A, B, L = frame(1, b"H|a\r"), frame(2, b"R|b\r"), frame(3, b"L|1\r")
TABLE = {
    "a session": (ENQ + A + B + EOT, [ACKED] * 3 + [Session((b"H|a\r", b"R|b\r"))]),
    "an empty session is answered and not delivered": (ENQ + EOT + ENQ + EOT, [ACKED, ACKED]),
    "a record in several frames": (
        ENQ + frame(1, b"H|", 0x17) + frame(2, b"a\r", 0x17) + frame(3, b"b\r") + EOT,
        [ACKED] * 4 + [Session((b"H|a\rb\r",))],
    ),
    "EOT after ETB": (
        ENQ + A + frame(2, b"R|", 0x17) + EOT,
        [ACKED] * 3 + [Session((b"H|a\r", b"R|"), "EOT came in the middle of a record")],
    ),
    "bad checksum": (ENQ + A[:-4] + b"00\r\n" + A + EOT, [ACKED, NAKED, ACKED, Session((b"H|a\r",))]),
    "lower-case checksum": (ENQ + frame(1, b"\xaa").lower() + EOT, [ACKED, ACKED, Session((b"\xaa",))]),
    "a repeated frame": (ENQ + A + A + B + B + EOT, [ACKED] * 5 + [Session((b"H|a\r", b"R|b\r"))]),
    "no CR LF": (ENQ + A[:-2] + B[:-2] + EOT, [ACKED] * 3 + [Session((b"H|a\r", b"R|b\r"))]),
    "padding": (
        b"\0\0" + ENQ + b"\0" + A + b"\0\0\r\n" + B + b"\0" + EOT + b"\0",
        [ACKED] * 3 + [Session((b"H|a\r", b"R|b\r"))],
    ),
    "ENQ twice": (ENQ + ENQ + A + EOT, [ACKED] * 2 + [Session((b"H|a\r",))]),
    "ENQ after L": (ENQ + A + L + ENQ + EOT, [ACKED] * 3 + [Session((b"H|a\r", b"L|1\r")), ACKED]),
    "ENQ before L": (
        ENQ + A + ENQ + EOT,
        [ACKED] * 2 + [Session((b"H|a\r",), "the instrument began a new session before EOT"), ACKED],
    ),
    "a flipped CR is no ENQ": (ENQ + A[:-2] + ENQ + b"\n" + B + EOT, [ACKED] * 3 + [Session((b"H|a\r", b"R|b\r"))]),
    "EOT in a text is judged by the checksum": (ENQ + frame(1, b"a\4b") + EOT, [ACKED] * 2 + [Session((b"a\4b",))]),
    "EOT and ENQ in a frame": (
        ENQ + A + B[:4] + EOT + ENQ + EOT,
        [ACKED] * 2 + [Session((b"H|a\r",), "the instrument gave up after a frame that was not accepted")] + [ACKED],
    ),
    "noise between frames": (
        ENQ + b"garbage" + A + b"x\4y\5z" + B + EOT,
        [ACKED] * 3 + [Session((b"H|a\r", b"R|b\r"))],
    ),
    "EOT outside": (EOT + EOT, []),
}


@pytest.mark.parametrize(("stream", "expected"), TABLE.values(), ids=TABLE)
def test_table(stream: bytes, expected: list) -> None:
    assert without_warnings(Line().hear(stream)) == expected
    assert without_warnings(Line().hear(*one_by_one(stream))) == expected
    for cut in range(len(stream)):
        assert without_warnings(Line().hear(stream[:cut], stream[cut:])) == expected


def test_the_ack_waits_for_the_commit() -> None:
    core = Astm(USUAL)
    assert core.receive(ENQ + A + B + EOT, 0) == [ACKED, FrameAccepted("1", b"H|a\r", ETX[0])]
    assert core.state is Link.COMMIT and core.deadline() is None
    assert core.receive(ENQ, 1) == []
    assert core.committed(2) == [ACKED, FrameAccepted("2", b"R|b\r", ETX[0])]
    assert core.committed(3) == [ACKED, Session((b"H|a\r", b"R|b\r")), ACKED]
    assert core.committed(4) == core.refused(4) == []


@pytest.mark.parametrize("found", [A, A[:-4] + b"00\r\n"], ids=["good", "wrong checksum"])
def test_a_frame_is_answered_after_its_last_byte(found: bytes) -> None:
    """Half-duplex instruments empty their input when they have sent a frame: an answer between checksum and LF is lost,
    and 15 s later they give up."""
    line, answer = Line(), [ACKED] if found is A else [NAKED]
    assert line.hear(ENQ, *one_by_one(found[:-1])) == [ACKED]
    assert line.frames == []
    assert line.hear(found[-1:]) == answer


@pytest.mark.parametrize("checksum", ["on", "off"])
def test_a_sender_without_cr_lf_waits_a_moment_once_a_session(checksum: str) -> None:
    line = Line(checksum=checksum)
    for _ in range(2):
        assert line.hear(ENQ + A[:-2]) == [ACKED]
        assert line.wait(TAIL_SECS) == [ACKED]
        assert line.hear(B[:-2]) == [ACKED]
        assert line.hear(L[:-2], EOT) == [ACKED, Session((b"H|a\r", b"R|b\r", b"L|1\r"))]


def test_a_sender_that_pads_with_nuls_without_end_is_answered() -> None:
    line, said = Line(), []
    assert line.hear(ENQ + A[:-2]) == [ACKED]
    for _ in range(5):
        said += line.wait(TAIL_SECS / 2) + line.hear(b"\0")
    assert said == [ACKED]
    assert line.hear(B, L + EOT) == [ACKED, ACKED, Session((b"H|a\r", b"R|b\r", b"L|1\r"))]


def test_a_frame_that_cannot_be_stored_is_refused() -> None:
    line = Line()
    line.core.receive(ENQ + A, line.now)
    assert line.core.refused(line.now) == [NAKED]
    assert line.hear(A + EOT) == [ACKED, Session((b"H|a\r",))]


@pytest.mark.parametrize(
    ("meanwhile", "said"),
    [
        (EOT + ENQ, [Session((b"H|a\r",), "the instrument gave up after a frame that was not accepted"), ACKED]),
        (A, [ACKED]),
        (b"", [ACKED]),
    ],
)
def test_a_frame_that_takes_longer_to_store_than_its_sender_waits(meanwhile: bytes, said: list) -> None:
    """The sender takes an ACK for that of its ENQ, and the ENQ's for that of a frame; and its message is unfinished."""
    line = Line()
    line.core.receive(ENQ + A, line.now)
    assert line.core.receive(meanwhile, line.now + 15.1) == []
    assert line.core.committed(line.now + 20) == said


def test_a_sender_that_gives_up_is_interrupted() -> None:
    line = Line()
    bad = B[:-4] + b"00\r\n"
    assert line.hear(ENQ + A + bad * 6 + EOT) == [ACKED, ACKED, *[NAKED] * 6]
    [event] = line.wait(DOUBT_SECS)  # an EOT right after a bad frame must be believable
    gave_up = "the instrument gave up after a frame that was not accepted (a checksum was wrong)"
    assert event == Session((b"H|a\r",), gave_up)


def test_eot_in_a_frame_ends_the_session_when_nothing_follows() -> None:
    line = Line()
    assert line.hear(ENQ + A + B[:4] + EOT) == [ACKED, ACKED]
    assert line.wait(DOUBT_SECS)[0].reason
    assert line.core.state is Link.IDLE


def test_a_new_session_directly_after_a_frame_without_trailer() -> None:
    line = Line()
    assert line.hear(ENQ + A[:-2] + ENQ) == [ACKED, ACKED]
    session, answer = line.wait(DOUBT_SECS)
    assert session.reason and isinstance(answer, Write)


def test_an_eot_that_became_enq_is_answered_once_with_the_enq_behind_it() -> None:
    """One bit apart. A second ACK would be taken for that of the next frame, and a damaged frame would be missing."""
    line = Line()
    records = (b"H|a\r", b"R|b\r", b"L|1\r")
    assert line.hear(ENQ + A + B + L) == [ACKED] * 4
    assert line.hear(ENQ, b"\r\n", ENQ) == [Session(records), ACKED]
    assert line.hear(A[:-4] + b"00\r\n") == [NAKED]
    assert line.hear(A + B + L + EOT) == [ACKED] * 3 + [Session(records)]


def test_an_enq_whose_ack_was_lost_is_answered_again() -> None:
    line = Line()
    assert line.hear(ENQ) == [ACKED]
    assert line.wait(15) == []
    assert line.hear(ENQ) == []
    assert line.wait(DOUBT_SECS) == [ACKED]
    assert line.hear(A + EOT) == [ACKED, Session((b"H|a\r",))]


@pytest.mark.parametrize("strict", [False, True])
def test_surprising_numbers(strict: bool) -> None:
    line = Line(strictFrameNumbers=strict)
    events = line.hear(ENQ + A + frame(1, b"other\r") + frame(5, b"R|5\r") + EOT) + line.wait(DOUBT_SECS)
    assert len(warnings(events)) == 2
    if strict:
        gave_up = "the instrument gave up after a frame that was not accepted"
        assert without_warnings(events) == [ACKED, ACKED, NAKED, NAKED, Session((b"H|a\r",), gave_up)]
    else:
        assert without_warnings(events) == [ACKED] * 4 + [Session((b"H|a\r", b"other\r", b"R|5\r"))]


def test_an_instrument_without_frame_numbers() -> None:
    """A byte that is no digit after STX is text where the whole session is like that."""
    bodies = [b"H|\\^&\r\x03", b"R|1\r\x03", b"L|1\r\x03"]
    frames = [STX + body + b"%02X\r\n" % (sum(body) % 256) for body in bodies]
    events = Line().hear(ENQ + b"".join(frames) + EOT)
    assert without_warnings(events) == [*[ACKED] * 4, Session((b"H|\\^&\r", b"R|1\r", b"L|1\r"))]
    assert warnings(events) == ["its frames have no numbers"]


def test_equal_records_without_frame_numbers_are_all_taken() -> None:
    """Each was acknowledged; whether one is a repetition cannot be known."""
    records = [b"H|\\^&\r", b"C|1|I|X\r", b"C|1|I|X\r", b"L|1|N\r"]
    frames = [STX + body + b"%02X\r\n" % (sum(body) % 256) for body in (record + b"\x03" for record in records)]
    events = Line().hear(ENQ + b"".join(frames) + EOT)
    assert without_warnings(events) == [*[ACKED] * 5, Session(tuple(records))]
    assert [text for text in warnings(events) if "came twice" in text]


@pytest.mark.parametrize("number", [8, 9])
def test_a_digit_outside_of_the_standard_s_is_a_number_all_the_same(number: int) -> None:
    """Channel contract 10: taken as sequence number, with a warning."""
    body = b"%dH|\\^&\r\x03" % number
    events = Line().hear(ENQ + STX + body + b"%02X\r\n" % (sum(body) % 256) + EOT)
    assert without_warnings(events) == [ACKED, ACKED, Session((b"H|\\^&\r",))]
    assert len(warnings(events)) == 1


@pytest.mark.parametrize("numbered_first", [True, False])
def test_a_frame_without_number_among_numbered_ones_is_refused(numbered_first: bool) -> None:
    body = b"R|1\r\x03"
    bare, numbered = STX + body + b"%02X\r\n" % (sum(body) % 256), astm_frame(1, b"R|1\r", 3)
    first, second = (numbered, bare) if numbered_first else (bare, numbered)
    assert without_warnings(Line().hear(ENQ + first + second)) == [ACKED, ACKED, NAKED]


def test_numbers_wrap() -> None:
    records = [b"R|%d\r" % n for n in range(20)]
    line = Line()
    assert line.hear(session(*records)) == [ACKED] * 21 + [Session(tuple(records))]
    assert [f.number for f in line.frames][6:9] == ["7", "0", "1"]


def test_frame_without_enq() -> None:
    events = Line().hear(A + B + EOT)
    assert warnings(events) == ["a frame came without ENQ"]
    assert without_warnings(events) == [ACKED, ACKED, Session((b"H|a\r", b"R|b\r"))]


def test_a_frame_that_begins_in_a_frame() -> None:
    events = Line().hear(ENQ + A[:4] + A + EOT)
    assert warnings(events) == ["a frame began inside a frame"]
    assert without_warnings(events) == [ACKED, ACKED, Session((b"H|a\r",))]


@pytest.mark.parametrize("size", [26_000, 64_000, FRAME_TEXT_BYTES])
def test_large_frames(size: int) -> None:
    text = b"R|" + b"x" * (size - 3) + b"\r"
    assert Line().hear(ENQ + frame(1, text) + EOT) == [ACKED, ACKED, Session((text,))]


def test_a_frame_over_the_limit() -> None:
    large = frame(1, b"x" * (FRAME_TEXT_BYTES + 1))
    for chunks in ([ENQ + large + A], one_by_one(ENQ + large + A)):
        line = Line()
        assert without_warnings(line.hear(*chunks)) == [ACKED, NAKED, ACKED]
        assert line.hear(EOT) == [Session((b"H|a\r",))]


def test_a_session_over_the_limit() -> None:
    line = Line(maxMessageBytes=1024)
    assert line.hear(ENQ + frame(1, b"H" * 900)) == [ACKED, ACKED]
    events = line.hear(frame(2, b"R" * 100) + EOT) + line.wait(DOUBT_SECS)
    assert "maxMessageBytes" in warnings(events)[0]
    answer, session = without_warnings(events)
    assert isinstance(answer, Write) and session.reason
    for number in range(1, 100):
        line.hear(frame(number, b""))
    assert sum(map(len, line.core._records)) + 64 * len(line.core._records) <= 1024


@pytest.mark.parametrize("tail", [b"", b"00\r\n", b"\r\n", b"A7"])
def test_without_checksum(tail: bytes) -> None:
    bare = STX + b"1H|a\r" + ETX + tail
    assert Line(checksum="off").hear(ENQ + bare + STX + b"2R\r" + ETX + tail + EOT) == [
        *[ACKED] * 3,
        Session((b"H|a\r", b"R\r")),
    ]


def test_ack_of_eot() -> None:
    line = Line(ackEot=True)
    assert line.hear(ENQ + A + EOT + EOT) == [ACKED, ACKED, Session((b"H|a\r",)), ACKED, ACKED]


def test_require_terminator() -> None:
    line = Line(requireTerminator=True)
    assert line.hear(ENQ + A + EOT)[-1].reason
    assert line.hear(session(*RECORDS))[-1] == Session(RECORDS)
    lower = (b"h|a\r", b"l|1|n\r")
    assert line.hear(session(*lower))[-1] == Session(lower)


@pytest.mark.parametrize("begun", [A, A + b"\x02", A + B[:1], A + B[:5], A + B[:-3], A + b"noise"])
def test_receive_timeout(begun: bytes) -> None:
    line = Line()
    line.hear(ENQ + begun)
    assert line.wait(29.9) == []
    assert line.wait(0.2) == [Session((b"H|a\r",), "the instrument was silent for 30 s before EOT")]
    assert line.core.state is Link.IDLE and line.core.deadline() is None


def test_a_message_with_its_terminator_is_complete_without_eot() -> None:
    stream = session(*RECORDS)[:-1]
    line = Line()
    line.hear(stream)
    assert line.wait(30) == [Session(RECORDS)]
    line = Line()
    line.hear(stream)
    assert line.core.closed() == [Session(RECORDS)]


@pytest.mark.parametrize("odd", [b"\x021H|a\r\x0300\r\n", b"\x021H|a\r\x03\r\n"])
def test_a_session_without_one_right_frame_is_complained_about(odd: bytes) -> None:
    line = Line()
    line.hear(ENQ + odd)
    events = line.hear(EOT) + line.core.closed()
    assert [event for event in events if isinstance(event, LineWarning)] == [
        LineWarning("not one frame of a session had the right checksum: does it send any? If not: checksum=off")
    ]


@pytest.mark.parametrize("other", [b"", b"\x021H|a"])
def test_checksums_are_blamed_for_nothing_else(other: bytes) -> None:
    line = Line()
    line.hear(ENQ + other)
    assert not [event for event in line.hear(EOT) + line.core.closed() if isinstance(event, LineWarning)]


def test_disconnect() -> None:
    line = Line()
    line.hear(ENQ + A)
    assert line.core.closed() == [Session((b"H|a\r",), "the connection was closed before EOT")]
    assert line.core.closed() == []
    line.say(b"H\r")
    line.say(b"H\r")
    assert line.core.closed() == [Sent("the connection was closed", False)] * 2


@pytest.mark.parametrize(
    "begun",
    [frame(1, b"H|\\^&\r"), frame(1, b"H|\\^&\r") + STX + b"2P|", STX + b"1" + b"x" * 70_000, STX + b"1x\x0300\r\n"],
    ids=["frame", "half a frame", "too large", "wrong checksum"],
)
def test_nothing_of_a_session_is_held_after_its_end(begun: bytes) -> None:
    """Neither counted nor kept: it is patient data."""
    line = Line()
    line.hear(ENQ, *astm_frames(RECORDS, 240), EOT)
    assert line.core.held == 0
    line.hear(ENQ, begun)
    line.wait(31)
    assert line.core.state is Link.IDLE and line.core.held == 0


def test_a_silent_session_without_frames_is_nothing() -> None:
    line = Line()
    line.hear(ENQ)
    assert line.wait(31) == [] and line.core.state is Link.IDLE


# --- single-bit errors ---

NOTE = b"3R|1|^^^GLU|5.4|BCDEFW$"  # its bytes become STX, ETX, EOT, ENQ and ETB by one bit


def answer_to(damaged: bytes) -> list[bytes]:
    """What E1381 6.3 and 6.5 say to one damaged frame, from a reading that knows nothing of the state table."""
    answers = []
    while damaged:
        found = re.match(
            rb"[^\x02]*(?:\x02(?=\x02)|\x02([^\x02][^\x02\x03\x17]*[\x03\x17])(..)|\x02)", damaged, re.DOTALL
        )
        if found is None:
            break
        if found[1]:  # STX in a frame begins it anew, so only a frame up to its checksum is answered
            answers.append(ACK if found[2].upper() == b"%02X" % (sum(found[1]) % 256) else NAK)
        damaged = damaged[found.end() :]
    return answers


@pytest.mark.parametrize("end", [ETX[0], ETB[0]])
def test_every_single_bit_error_gives_the_answer_of_the_standard(end: int) -> None:
    whole = astm_frame(1, NOTE, end)
    tally = {ACK: 0, NAK: 0, b"": 0}
    for position, bit in itertools.product(range(len(whole)), range(8)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << bit
        line = Line()
        events = line.hear(ENQ, bytes(damaged))
        answers = [event.content for event in events if isinstance(event, Write)][1:]
        assert answers == answer_to(bytes(damaged)), (position, bit)
        tally[answers[0] if answers else b""] += 1
        assert all(f.content == NOTE for f in line.frames)  # nothing damaged was accepted
        assert line.hear(whole)[-1] == ACKED  # and the frame sent again is good
        assert [f.content for f in line.frames] == [NOTE]
        finish = b"" if end == ETX[0] else frame(2, b"")
        assert line.hear(finish + EOT)[-1] == Session((NOTE,))
    assert tally[NAK] > 150 and tally[ACK] >= 16


def test_every_cut_of_a_frame_is_silent_and_the_next_try_is_accepted() -> None:
    whole = frame(1, NOTE)
    for cut in range(len(whole) - 4):
        line = Line()
        assert line.hear(ENQ, whole[:cut]) == [ACKED]
        assert line.wait(15) == []
        assert without_warnings(line.hear(whole + EOT)) == [ACKED, Session((NOTE,))]


# --- sender ---


def sending(*records: bytes, **changes) -> Line:
    line = Line(**changes)
    assert line.say(*(records or RECORDS)) == [ASKED]
    return line


def test_a_message_is_sent() -> None:
    line = sending()
    frames = [Write(f) for f in astm_frames(RECORDS, 240)]
    assert [line.hear(ACK) for _ in frames] == [[f] for f in frames]
    assert line.hear(ACK) == [ENDED, Sent()]
    assert line.core.deadline() is None


def test_long_records_are_split() -> None:
    line = sending(b"R|" + b"x" * 500 + b"\r", b"L|1\r")
    wanted = [frame(1, b"R|" + b"x" * 238, 0x17), frame(2, b"x" * 240, 0x17), frame(3, b"x" * 22 + b"\r")]
    assert [line.hear(ACK)[0].content for _ in range(4)] == [*wanted, frame(4, b"L|1\r")]


def test_restricted_characters_never_enter_a_frame() -> None:
    [sent] = astm_frames([b"R|\x02\x03\x04\x05\x17\n1\r"], 240)
    assert sent == frame(1, b"R|1\r")


def test_no_records() -> None:
    assert Line().core.send([], 0) == [Sent("there is no record to send", True)]


def test_six_naks() -> None:
    line = sending()
    first = line.hear(ACK)
    assert [line.hear(NAK) for _ in range(5)] == [first] * 5
    assert line.hear(NAK) == [ENDED, Sent("frame 1 was not accepted in 6 tries", True)]


def test_five_naks_and_an_ack_for_every_frame() -> None:
    line = sending()
    for record in RECORDS:
        first = line.hear(ACK)
        assert record in first[0].content
        assert [line.hear(NAK) for _ in range(5)] == [first] * 5
    assert line.hear(ACK) == [ENDED, Sent()]


def test_a_frame_that_is_never_answered() -> None:
    """The message begins anew: a late ACK would be taken for that of the frame behind it."""
    line = sending()
    for _ in range(5):
        assert line.hear(ACK) == line.hear(NAK) != []
        assert line.wait(14.9) == []
        assert line.wait(0.1) == [ENDED]
        assert line.hear(ACK) == []
        assert line.wait(9.9) == []
        assert line.wait(0.1) == [ASKED]
    line.hear(ACK)
    assert line.wait(15) == [ENDED, Sent("the instrument does not answer; gave up after 6 tries", True)]


def test_any_other_character_is_a_nak_and_padding_is_nothing() -> None:
    line = sending()
    first = line.hear(ACK)
    assert line.hear(b"\0\r\n") == []
    assert line.hear(b"?") == first


def test_a_busy_instrument() -> None:
    line = sending()
    for _ in range(5):
        assert line.hear(NAK) == []
        assert line.wait(9.9) == []
        assert line.wait(0.1) == [ASKED]
    assert line.hear(NAK) == [Sent("the instrument is busy (NAK); gave up after 6 tries", False)]


def test_enq_that_is_never_answered() -> None:
    line = sending()
    for _ in range(5):
        assert line.wait(14.9) == []
        assert line.wait(0.1) == [ENDED]
        assert line.wait(9.9) == []
        assert line.wait(0.1) == [ASKED]
    assert line.wait(15) == [ENDED, Sent("the instrument does not answer; gave up after 6 tries", False)]


def test_contention_when_we_asked_first() -> None:
    line = sending()
    assert line.hear(ENQ) == []  # 6.2.1: the instrument asks again after a second
    assert line.wait(1) == []
    assert line.hear(session(*RECORDS)) == [ACKED] * 6 + [Session(RECORDS)]
    assert line.wait(TURN_SECS) == [ASKED]


def test_contention_and_then_silence() -> None:
    line = sending()
    line.hear(ENQ)
    assert line.wait(19.9) == []
    assert line.wait(0.1) == [ASKED]


def test_contention_when_the_instrument_asked_first() -> None:
    line = Line()
    assert line.hear(ENQ) == [ACKED]
    assert line.say(*RECORDS) == []
    assert line.hear(session(*RECORDS)[1:]) == [ACKED] * 5 + [Session(RECORDS)]
    assert line.wait(TURN_SECS) == [ASKED]


def test_contention_for_ever_is_given_up() -> None:
    line = sending()
    for _ in range(5):
        assert line.hear(ENQ) == []
        assert line.wait(20) == [ASKED]
    assert line.hear(ENQ)[0].failure


def test_interrupt_by_eot() -> None:
    line = sending()
    line.hear(ACK)
    assert line.hear(EOT) == [ENDED]
    assert line.hear(session(*RECORDS)) == [ACKED] * 6 + [Session(RECORDS)]
    assert line.wait(TURN_SECS) == [ASKED]
    assert line.hear(ACK) == [Write(astm_frames(RECORDS, 240)[0])]  # the whole message anew


def test_interrupt_and_then_silence() -> None:
    line = sending()
    line.hear(ACK)
    line.hear(EOT)
    assert line.wait(INTERRUPT_SECS - 0.1) == []
    assert line.wait(0.1) == [ASKED]


def test_interrupt_at_the_last_frame() -> None:
    line = sending(b"L|1\r")
    line.hear(ACK)
    assert line.hear(EOT) == [ENDED, Sent()]


def test_messages_are_sent_in_order() -> None:
    line = sending(b"H|1\r")
    assert line.say(b"H|2\r") == []
    line.hear(ACK)
    assert line.hear(ACK) == [ENDED, Sent()]
    assert line.wait(TURN_SECS) == [ASKED]
    assert line.hear(ACK) == [Write(frame(1, b"H|2\r"))]


def test_withdrawn_before_it_is_asked_for() -> None:
    line = Line()
    line.hear(ENQ)
    assert line.say(b"H|1\r") == line.say(b"H|2\r") == []
    assert line.core.withdraw(0, line.now) == []
    assert line.hear(EOT) == []
    assert line.wait(TURN_SECS) == [ASKED]
    assert line.hear(ACK) == [Write(frame(1, b"H|2\r"))]


def test_withdrawn_under_way() -> None:
    """It ends without its L record, and the next one is sent."""
    for steps in (b"", ACK, ACK + ACK):
        line = Line()
        assert line.say(*RECORDS) == [ASKED]
        line.hear(*one_by_one(steps))
        assert line.core.withdraw(0, line.now) == [ENDED]
        assert line.core.state is Link.IDLE and line.core.deadline() is None
        line.say(b"H|2\r")
        assert line.wait(TURN_SECS) == [ASKED]


# --- both, over a line that damages what it carries ---


class Noise:
    """Loses a byte, or flips one of its bits, once in `every` bytes; every=0 is a good line.

    Two errors can cancel out in a sum of bytes: what the standard's checksum cannot see is left out.
    """

    def __init__(self, seed: int, every: int):
        self.random, self.every = random.Random(seed), every
        self.hits = self.unseen = 0

    def carry(self, content: bytes) -> bytes:
        if not self.every:
            return content
        carried = bytearray()
        for byte in content:
            if self.random.randrange(self.every):
                carried.append(byte)
                continue
            self.hits += 1
            if self.random.random() < 0.75:
                carried.append(byte ^ 1 << self.random.randrange(8))
        unseen = ACK in answer_to(bytes(carried)) and content[1:-4] not in carried
        self.unseen += unseen
        return self.carry(content) if unseen else bytes(carried)


def exchanged(messages: list[tuple[bytes, ...]], noise: Noise, options: StreamSettings, seed: int) -> list:
    """What the receiver delivers of the messages, each sent again by its owner until it was accepted."""
    host, instrument = Astm(dataclasses.replace(options, maxFrame=40)), Astm(options)
    ticket = itertools.count()
    flying: list[tuple[float, int, Astm, bytes]] = []
    delivered: list[Session] = []
    todo, now, latency = list(messages), 0.0, random.Random(seed)

    def put(core: Astm, events: list) -> None:
        for event in events:
            if isinstance(event, Write):
                other = instrument if core is host else host
                arrival = now + latency.uniform(0.01, 0.012)
                heapq.heappush(flying, (arrival, next(ticket), other, noise.carry(event.content)))
            elif isinstance(event, FrameAccepted):
                put(core, core.committed(now))
            elif isinstance(event, Session):
                delivered.append(event)
            elif event == Sent():
                todo.pop(0)
        if core is host and any(isinstance(e, Sent) for e in events) and todo:
            put(host, host.send(todo[0], now))

    put(host, host.send(todo[0], now))
    while True:
        times = [(due, core) for core in (host, instrument) if (due := core.deadline()) is not None]
        due, late = min(times, key=lambda pair: pair[0]) if times else (float("inf"), host)
        if flying and flying[0][0] <= due:
            now, _, core, content = heapq.heappop(flying)
            put(core, core.receive(content, now))
        elif times:
            now = max(now, due)
            put(late, late.expired(now))
        else:
            return delivered


def messages_of(generator: random.Random, count: int) -> list[tuple[bytes, ...]]:
    letters = b"ABCDEFTUW$0123456789|^ \x7f\xe4"
    return [
        (
            b"H|\\^&|%d\r" % n,
            *(
                b"R|%d|" % r + bytes(generator.choices(letters, k=generator.randrange(70))) + b"\r"
                for r in range(generator.randrange(1, 5))
            ),
            b"L|1|N\r",
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_a_lossy_line_delivers_every_session_exactly_as_sent(seed: int, strict: bool) -> None:
    messages = messages_of(random.Random(seed), 40)
    noise = Noise(seed, 500)
    options = StreamSettings(requireTerminator=True, strictFrameNumbers=strict)
    events = exchanged(messages, noise, options, seed)
    assert noise.hits > 5
    delivered = [event.records for event in events if isinstance(event, Session) and not event.reason]
    # the same message may come twice (its sender cannot know), never damaged, never missing, never out of order
    assert [records for records, _ in itertools.groupby(delivered)] == messages


def test_a_good_line_delivers_every_session_once() -> None:
    messages = messages_of(random.Random(7), 50)
    assert exchanged(messages, Noise(0, 0), USUAL, 0) == [Session(records) for records in messages]


# --- properties ---

PIECES = st.one_of(
    st.sampled_from(
        [STX, ETX, EOT, ENQ, ACK, NAK, ETB, b"\r", b"\n", b"\0", b"1", b"x", A, B, L, A[:-2], b"\x021a\x03"]
    ),
    st.binary(max_size=4),
)
STREAMS = st.lists(PIECES, max_size=14).map(b"".join)
OPTIONS = st.builds(
    StreamSettings,
    checksum=st.sampled_from(["on", "off"]),
    strictFrameNumbers=st.booleans(),
    ackEot=st.booleans(),
    requireTerminator=st.booleans(),
    maxMessageBytes=st.sampled_from([150, 8 * 2**20]),
)


def said(options: StreamSettings, sends: bool, *chunks: bytes) -> tuple[list, Link, int]:
    line = Line(options)
    events = line.say(*RECORDS) if sends else []
    events += line.hear(*chunks)
    state, skipped = line.core.state, line.core.skipped
    return events + line.wait(40) + line.core.closed(), state, skipped


@given(OPTIONS, st.booleans(), STREAMS, st.data())
@settings(max_examples=400, deadline=None)
def test_every_cut_gives_the_same_events(options, sends, stream, draw) -> None:
    whole = said(options, sends, stream)
    assert said(options, sends, *one_by_one(stream)) == whole
    for cut in range(1, len(stream)):
        assert said(options, sends, stream[:cut], stream[cut:]) == whole
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    assert said(options, sends, *[stream[a:b] for a, b in itertools.pairwise([0, *cuts, len(stream)])]) == whole


@given(st.lists(st.tuples(st.sampled_from("rrrrcnsxwt"), STREAMS, st.floats(0, 25)), max_size=30))
@settings(max_examples=300, deadline=None)
def test_whatever_is_called_in_whatever_order_gives_events(calls) -> None:
    core, now = Astm(USUAL), 0.0
    for call, stream, seconds in calls:
        now += seconds
        match call:
            case "r":
                events = core.receive(stream, now)
            case "c":
                events = core.committed(now)
            case "n":
                events = core.refused(now)
            case "s":
                events = core.send(RECORDS, now)
            case "w":
                events = core.expired(now)
            case "t":
                events = core.withdraw(0, now) if core._queue else []
            case _:
                events = core.closed()
        assert all(isinstance(event, AstmEvent) for event in events)
        assert (due := core.deadline()) is None or isinstance(due, float)


def test_memory_is_bounded_while_a_frame_is_on_its_way_to_disk() -> None:
    core = Astm(USUAL)
    core.receive(ENQ + A, 0)
    for _ in range(100):
        core.receive(b"x" * 65_536, 0)
    assert len(core._waiting) <= WAITING_BYTES
    assert core.skipped > 0


# --- records ---


def test_body_up() -> None:
    body = records_text([b"H|\\^&\rP|1\r", b"\r", b"R|\x01\t\xe4\x17\r\n", b"L|1"], "latin-1")
    assert body == "H|\\^&\nP|1\nR|ä\nL|1\n"
    assert records_text(["R|ä\r".encode(), b"\xff"], "utf-8") == "R|ä\n\ufffd\n"
    assert records_text([], "latin-1") == ""


def test_body_down() -> None:
    assert text_records("H|\\^&\r\nO|1|ä\n\n\x02L|1\r", USUAL) == [b"H|\\^&\r", b"O|1|\xe4\r", b"L|1\r"]
    assert text_records("R|€", USUAL) == [b"R|?\r"]


def test_a_slow_disk_is_not_taken_for_a_lost_ack() -> None:
    """LIS01-A2 6.5.2: the sender had our ACK, 4 s before its EOT."""
    core = Astm(StreamSettings(mode="astm"))
    core.receive(ENQ, 0.0)
    core.receive(A, 0.1)
    core.committed(10.0)
    assert [type(event) for event in core.receive(EOT, 14.6)] == [Session]


def test_what_reached_the_instrument_is_said_of_its_own_message_only() -> None:
    core = Astm(StreamSettings(mode="astm"))
    core.send([b"H|1\r", b"L|1\r"], 0.0)
    core.receive(ACK, 0.1)
    core.withdraw(0, 0.2)
    core.send([b"H|2\r"], 1.0)
    core.send([b"H|3\r"], 1.0)
    assert core.closed() == [Sent("the connection was closed", False)] * 2
    core.send([b"H|4\r"], 2.0)
    core.send([b"H|5\r"], 2.0)
    core.receive(ACK, 2.1)
    assert [event.reached for event in core.closed() if isinstance(event, Sent)] == [True, False]
