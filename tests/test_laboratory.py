"""Laboratory instruments over real sockets and serial lines: raw byte streams and ASTM (channel contract 9 and 10)."""

import contextlib
import functools
import itertools
import re
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import trustme
from demo import Transmit

from medplum_agent import ASTM_TYPE, BYTES_TYPE, astm_frame
from tests.instruments import ACK, ENQ, EOT, ETB, ETX, NAK, Cable, Instrument, bad, body_of, frames_of, of, rows
from tests.support import Site, accepts, eventually, site

FRAMED = "tcp://127.0.0.1:{port}?startChar=%02&endChar=%03"
ASTM = "tcp://127.0.0.1:{port}?mode=astm"
SERIAL = "-SERIAL"
QUICK = "&replyTimeoutSecs=1&nakDelaySecs=0.2&contentionTimeoutSecs=0.3"
CHANNELS = {
    "HEX": FRAMED,
    "TEXT": f"{FRAMED}&bodyEncoding=utf-8",
    "REPLY": f"{FRAMED}&autoRespond=%05:%06,%03:%06",
    "STRIP": f"{FRAMED}&bodyEncoding=utf-8&stripSequence=%1B%5B,JUNK&stripControlChars=true&keepControlChars=%0D",
    "IGNORE": f"{FRAMED}&ignoreResponse=true",
    "LONG-MARKS": "tcp://127.0.0.1:{port}?startChar=%0B%0B&endChar=%1C%0D",
    "SMALL": f"{FRAMED}&maxMessageBytes=1024&autoRespond=%03:%06",
    "ASTM": ASTM + QUICK,
    "SHORT": f"{ASTM}&maxFrame=10{QUICK}",
    "EOT": f"{ASTM}&ackEot=true",
    "SILENT": f"{ASTM}&receiveTimeoutSecs=0.3",
    "CLIENT": f"{ASTM}&role=client{QUICK}",
    "RAW-CLIENT": f"{FRAMED}&role=client&bodyEncoding=utf-8",
    "HASTY": f"{ASTM}&replyTimeoutSecs=0.4&nakDelaySecs=0.1",
    "MANY": ASTM,
}
CLIENTS = ("CLIENT", "RAW-CLIENT", "MANY")  # channels without a twin on a serial port
CABLES: dict[str, Cable] = {}  # by channel
LISTENING: dict[str, socket.socket] = {}  # instruments that the agent dials, by channel: there before it asks
_names = itertools.count(1)


def result(name: str = "") -> tuple[str, ...]:
    """The records of a result; `name` tells it from others."""
    name = name or f"S{next(_names)}"
    return "H|\\^&|||ABC", "P|1", f"O|1|{name}|GLU", "R|1|^^^GLU|5.4|mg/dL", "L|1|N"


def came(here: Site, channel: str, body: str) -> Transmit:
    """The one transmit of a channel with this body, once it is there."""

    def found() -> list[Transmit]:
        return [transmit for transmit in of(here, channel) if transmit.body == body]

    here.sandbox.wait_for(found, what=f"{body!r} from {channel}; got {of(here, channel)[-5:]}")
    (transmit,) = found()
    return transmit


def settled_all(here: Site, channel: str) -> bool:
    """Whether no message of a channel waits; pushes are in the channel `push <url>`."""
    return not any(found["state"] in ("queued", "inflight") for found in rows(here, channel))


def row(here: Site, channel: str, original: bytes) -> dict[str, Any] | None:
    return next((found for found in rows(here, channel) if found["original"] == original), None)


def settled(here: Site, channel: str, original: bytes) -> dict[str, Any]:
    """The row of a message once it is processed."""

    def found() -> dict[str, Any] | None:
        one = row(here, channel, original)
        return one if one and one["state"] not in ("queued", "inflight") else None

    found_row = eventually(found, what=f"{original!r} settled in {channel}")
    assert found_row is not None
    return found_row


def partials(here: Site) -> int:
    with contextlib.closing(here.agent.database()) as db:
        return int(db.execute("SELECT count(*) FROM partial").fetchone()[0])


def silent_bot(transmit: Transmit) -> tuple[int, Any]:
    return 200, ""


@contextlib.contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.settimeout(15)
        yield listener


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory):
    """One agent with each channel on a TCP port and, where there is socat, on a serial port with parity and all."""
    folder = tmp_path_factory.mktemp("laboratory")
    channels = dict(CHANNELS)
    with contextlib.ExitStack() as stack:
        for name in [name for name in CHANNELS if name not in CLIENTS and shutil.which("socat")]:
            (folder / name).mkdir()
            cable = CABLES[name + SERIAL] = stack.enter_context(Cable(folder / name))
            channels[name + SERIAL] = cable.address(CHANNELS[name])
        stack.callback(CABLES.clear)
        running = stack.enter_context(site(folder, channels, start=False))
        for name in ("CLIENT", "RAW-CLIENT"):
            LISTENING[name] = stack.enter_context(listening(running.ports[name]))
        running.sandbox.bot = silent_bot
        running.agent.start(ready=False)
        running.agent.logged("Medplum service started")
        for name in CABLES:
            running.agent.logged(f"'{name}': serial://")
        running.agent.wait_connected()
        yield running


@pytest.fixture(params=["", SERIAL], ids=["tcp", "serial"])
def over(request, shared_site):
    """The suffix of the channels' names: the same test over TCP and over a serial port."""
    if request.param and not CABLES:
        pytest.skip("socat is not installed: SERIAL PORTS ARE NOT TESTED (apt-get install socat)")
    return request.param


@pytest.fixture
def here(shared_site):
    yield shared_site
    eventually(lambda: partials(shared_site) == 0, what="the end of all sessions")
    for channel in CABLES:  # the next test finds the line as this one leaves it
        eventually(functools.partial(settled_all, shared_site, channel), what=f"{channel} at rest")
    faults, fresh = shared_site.sandbox.faults, type(shared_site.sandbox.faults)()
    for name in vars(fresh):
        setattr(faults, name, getattr(fresh, name))
    shared_site.sandbox.bot = silent_bot


def instrument(here: Site, channel: str) -> Instrument:
    return CABLES[channel].open() if channel in CABLES else Instrument.at(here.ports[channel])


# --- raw ---


def test_raw_body_is_hex_with_its_framing_and_without_what_came_before(here, over):
    with instrument(here, "HEX" + over) as device:
        device.write(b"\r\n\x02A\xffB\x03\r\n\x02C\x03")
        transmit = came(here, "HEX" + over, "0241ff4203")
        assert transmit.content_type == BYTES_TYPE == "application/octet-stream"
        remote = str(CABLES["HEX" + over].agent) if over else r"127\.0\.0\.1:\d+"
        assert re.fullmatch(remote, transmit.remote)
        came(here, "HEX" + over, "024303")
    assert row(here, "HEX" + over, b"\x02A\xffB\x03")


def test_raw_body_as_text(here, over):
    with instrument(here, "TEXT" + over) as device:
        device.write("\x02Grüße\x03".encode())
        came(here, "TEXT" + over, "\x02Grüße\x03")


def test_marks_of_several_bytes_cut_between_them(here, over):
    with instrument(here, "LONG-MARKS" + over) as device:
        for byte in b"\x0b\x0bM\x0bN\x1cO\x1c\r":
            device.write(bytes((byte,)))
        came(here, "LONG-MARKS" + over, b"\x0b\x0bM\x0bN\x1cO\x1c\r".hex())


def test_strip_options(here, over):
    with instrument(here, "STRIP" + over) as device:
        device.write(b"\x02A\x1b[B\rC\nJUNKD\x03")
        came(here, "STRIP" + over, "AB\rCD")


def test_auto_answers_come_when_the_message_is_in_the_queue_file(here, over):
    with instrument(here, "REPLY" + over) as device:
        assert device.ask(ENQ) == ACK
        for number in range(50):
            content = b"\x02%d\x03" % number
            assert device.ask(content) == ACK
            assert row(here, "REPLY" + over, content)
        assert device.quiet() == b""


def test_a_message_that_is_too_large_is_not_acknowledged_and_the_next_is_taken(here, over):
    with instrument(here, "SMALL" + over) as device:
        device.write(b"\x02" + b"x" * 2000 + b"\x03")
        assert device.quiet() == b""
        assert device.ask(b"\x02good\x03") == ACK
    came(here, "SMALL" + over, b"\x02good\x03".hex())
    assert len(of(here, "SMALL" + over)) == 1


@pytest.mark.parametrize(
    ("channel", "answer", "written"), [("HEX", "02414b03", b"\x02AK\x03"), ("TEXT", "Grüße", "Grüße".encode())]
)
def test_the_bots_answer_is_written_back(here, over, channel, answer, written):
    here.sandbox.bot = lambda transmit: (200, answer)
    with instrument(here, channel + over) as device:
        device.write(b"\x02answer me\x03")
        assert device.take(len(written)) == written
        assert device.quiet() == b""
    assert settled(here, channel + over, b"\x02answer me\x03")["ack_outcome"] == "delivered"


def test_an_answer_that_is_no_hex_is_complained_about(here, over):
    here.sandbox.bot = lambda transmit: (200, "no hex")
    with instrument(here, "HEX" + over) as device:
        device.write(b"\x02wrong\x03")
        assert settled(here, "HEX" + over, b"\x02wrong\x03")["state"] == "processed"
        assert device.quiet() == b""
    here.agent.logged("not hexadecimal")


@pytest.mark.parametrize(("channel", "answer"), [("HEX", ""), ("TEXT", ""), ("IGNORE", "024103")])
def test_what_is_not_written(here, over, channel, answer):
    """The logs of a Bot that returned nothing; and anything with ignoreResponse."""
    here.sandbox.bot = lambda transmit: (200, answer)
    with instrument(here, channel + over) as device:
        device.write(b"\x02hush\x03")
        assert settled(here, channel + over, b"\x02hush\x03")["state"] == "processed"
        assert device.quiet() == b""


def test_a_device_that_vanishes_does_no_harm(here):
    here.sandbox.bot = lambda transmit: (200, "06")
    here.sandbox.faults.delay = lambda: 0.2
    device = instrument(here, "HEX")
    device.write(b"\x02before the reset\x03")
    eventually(lambda: row(here, "HEX", b"\x02before the reset\x03"))
    device.reset()
    half = instrument(here, "HEX")
    half.write(b"\x02half")
    half.reset()
    assert settled(here, "HEX", b"\x02before the reset\x03")["ack_outcome"] == "undelivered"
    with instrument(here, "HEX") as device:
        device.write(b"\x02after the reset\x03")
        assert device.take(1) == ACK
    assert not row(here, "HEX", b"\x02half")


def test_messages_of_one_device_stay_in_order(here, over):
    here.sandbox.faults.delay = lambda: 0.002
    wanted = [b"\x02order %d\x03".replace(b"%d", b"%d" % n) for n in range(60)]
    with instrument(here, "HEX" + over) as device:
        device.write(b"".join(wanted))

        def bodies() -> list[str]:
            return [b for t in of(here, "HEX" + over) if (b := t.body).startswith(b"\x02order".hex())]

        here.sandbox.wait_for(lambda: len(bodies()) >= 60)
        assert bodies() == [content.hex() for content in wanted]


def test_missing_start_char_is_refused_with_the_contracts_words(tmp_path):
    with site(tmp_path, {"BAD": "tcp://127.0.0.1:{port}?endChar=%03"}, start=False) as lone:
        lone.agent.start(ready=False)
        lone.agent.logged("Failed to parse startChar and/or endChar query param(s)")


# --- ASTM up ---


def test_a_session_is_one_transmit(here, over):
    records = result()
    with instrument(here, "ASTM" + over) as device:
        device.session(*records)
        transmit = came(here, "ASTM" + over, body_of(*records))
        assert transmit.content_type == ASTM_TYPE == "x-application/astm-e1394"
        assert device.quiet() == b""
    eventually(lambda: partials(here) == 0)


def test_a_long_record_in_several_frames_and_a_frame_of_26000(here, over):
    records = ("H|\\^&|||" + "x" * 900, "R|1|" + "y" * 26_000, "L|1|N")
    with instrument(here, "ASTM" + over) as device:
        device.session(*records, size=240)
        device.session(*records, size=26_004)

        def both() -> bool:
            return sum(transmit.body == body_of(*records) for transmit in of(here, "ASTM" + over)) == 2

        here.sandbox.wait_for(both)


def test_nak_on_a_bad_checksum_then_good(here, over):
    records = result()
    frames = frames_of(*records)
    with instrument(here, "ASTM" + over) as device:
        assert device.ask(ENQ) == ACK
        for frame in frames:
            assert device.ask(bad(frame)) == NAK
            assert device.ask(frame) == ACK
            assert device.ask(frame) == ACK  # the same again: taken once
        device.write(EOT)
        came(here, "ASTM" + over, body_of(*records))


def test_records_in_latin_1_and_eot_answered_for_those_who_want_it(here, over):
    records = ("H@\\^&", "P@1@@@Müller", "L@1@N")
    with instrument(here, "EOT" + over) as device:
        device.session(*records)
        assert device.take(1) == ACK
        came(here, "EOT" + over, body_of(*records))


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_bytes_that_the_encoding_lacks_stay_in_the_queue_as_they_came(tmp_path, encoding):
    raw = f"{FRAMED}&bodyEncoding=utf-8"
    with site(tmp_path, {"LOSSY": f"{ASTM}&encoding={encoding}", "RAW": raw}) as here:
        eventually(lambda: all(accepts(("127.0.0.1", port)) for port in here.ports.values()), 10, "its ports")
        for _ in range(2):
            with instrument(here, "LOSSY") as device:
                device.session("H|\\^&|||A", "P|1|||M\xffller^Zo\xff", "L|1|N")
        (first, *_) = eventually(lambda: here.sandbox.seen[1:], 10, "both sessions")
        assert first[1].body == "H|\\^&|||A\nP|1|||M\ufffdller^Zo\ufffd\nL|1|N\n"
        with contextlib.closing(here.agent.database()) as db:
            kept = eventually(lambda: db.execute("SELECT original FROM message").fetchall(), 5, "rows")
        assert [bytes(original) for (original,) in kept] == 2 * [b"H|\\^&|||A\nP|1|||M\xffller^Zo\xff\nL|1|N\n"]
        with instrument(here, "RAW") as device:
            device.write(b"\x025 \xb5g\x03")
        eventually(lambda: here.sandbox.seen[2:], 10, "the raw message")
        assert here.agent.main_log().count(b"goes to the server as U+FFFD") == 3  # one for each connection


@pytest.mark.parametrize("channel", ["HEX", "ASTM"])
@pytest.mark.parametrize("much", [True, False])
def test_what_is_part_of_no_message_is_said(here, channel, much):
    """Such as at another speed; also while the line stays open."""
    before = here.agent.main_log().count(b"bytes came and no message")
    with instrument(here, channel) as device:
        device.write(b"\x0bMSH|^~" * (60 if much else 1))
        if much:
            eventually(lambda: here.agent.main_log().count(b"bytes came and no message") > before, 5, "the warning")
    eventually(lambda: here.agent.main_log().count(b"bytes came and no message") == before + 1, 5, "the warning")


def test_an_empty_session_is_answered_and_not_delivered(here, over):
    before = len(rows(here, "EOT" + over))
    records = result()
    with instrument(here, "EOT" + over) as device:
        assert device.ask(ENQ) == ACK
        assert device.ask(EOT) == ACK
        device.session(*records)
        assert device.take(1) == ACK
        came(here, "EOT" + over, body_of(*records))
    assert len(rows(here, "EOT" + over)) == before + 1


BIG = ("H|\\^&|||" + "x" * 900, "R|1|" + "y" * 26_000, "L|1|N")
AT = ("H@\\^&", "P@1", "R@1@^^^GLU@5.4", "L@1@N")
USUAL = ("H|\\^&|||ABC", "P|1", "R|1|^^^GLU|5.4|mg/dL", "L|1|N")
DEVIATIONS = {
    "frames of 26,000 characters": (BIG, frames_of(*BIG, size=26_004)),
    "@ as delimiter": (AT, frames_of(*AT)),
    "no CR LF": (USUAL, [frame[:-2] for frame in frames_of(*USUAL)]),
    "NULs before and after": (USUAL, [b"\0\0" + frame + b"\0\0\0" for frame in frames_of(*USUAL)]),
    "the same number with new content": (USUAL, [astm_frame(1, f"{record}\r".encode(), ETX[0]) for record in USUAL]),
    "numbers from 0": (USUAL, [astm_frame(n, f"{record}\r".encode(), ETX[0]) for n, record in enumerate(USUAL)]),
    "all records in one frame": (USUAL, [astm_frame(1, "".join(f"{r}\r" for r in USUAL).encode(), ETX[0])]),
    "no CR after a record": (USUAL, [astm_frame(n, r.encode(), ETX[0]) for n, r in enumerate(USUAL, 1)]),
    "no L record": (USUAL[:-1], frames_of(*USUAL[:-1])),
    "lower-case checksums": (USUAL, [f[:-4] + f[-4:].lower() for f in frames_of(*USUAL)]),
}


@pytest.mark.parametrize(("records", "frames"), DEVIATIONS.values(), ids=DEVIATIONS)
def test_real_instruments_deviate(here, over, records, frames):
    """Each asks as soon as it is connected, and each goes on as usual afterwards."""
    channel = "ASTM" + over

    def count() -> int:
        return sum(transmit.body == body_of(*records) for transmit in of(here, channel))

    before = count()
    with instrument(here, channel) as device:
        assert device.ask(ENQ) == ACK
        for frame in frames:
            assert device.ask(frame) == ACK
        device.write(EOT)
        here.sandbox.wait_for(lambda: count() == before + 1, what=f"{records}; got {of(here, channel)[-2:]}")
        after = result()
        device.session(*after)
        came(here, channel, body_of(*after))
    assert count() == before + 1


def test_a_session_of_blank_records_leaves_nothing_behind(here):
    before = len(rows(here, "EOT"))
    with instrument(here, "EOT") as device:
        assert device.ask(ENQ) == ACK
        assert device.ask(astm_frame(1, b" \r\0", ETX[0])) == ACK
        assert device.ask(EOT) == ACK
    eventually(lambda: partials(here) == 0, 3, "no frame of it is left on disk")
    assert len(rows(here, "EOT")) == before


def dead(here: Site, channel: str, original: str) -> dict[str, Any]:
    found = eventually(lambda: row(here, channel, original.encode()), what=f"{original!r}: {rows(here, channel)}")
    assert found is not None
    assert (found["state"], found["error_code"]) == ("failed", "interrupted-session")
    return found


def test_an_interrupted_session_is_a_dead_letter_with_its_records(here):
    name = f"INT{next(_names)}"
    with instrument(here, "ASTM") as device:
        assert device.ask(ENQ) == ACK
        assert device.ask(astm_frame(1, b"H|\\^&|||ABC\r", ETX[0])) == ACK
        assert device.ask(astm_frame(2, b"R|1|" + name.encode(), ETB[0])) == ACK
    found = dead(here, "ASTM", body_of("H|\\^&|||ABC", f"R|1|{name}"))
    assert "closed" in found["last_error"]
    records = result()
    with instrument(here, "ASTM") as device:
        device.session(*records)
        came(here, "ASTM", body_of(*records))
    assert not any(name in transmit.body for transmit in of(here, "ASTM"))
    eventually(lambda: partials(here) == 0)


def test_silence_in_a_session_interrupts_it_and_the_line_goes_on(here, over):
    with instrument(here, "SILENT" + over) as device:
        device.session("H|\\^&|||SILENT", eot=False)
        assert "silent" in dead(here, "SILENT" + over, body_of("H|\\^&|||SILENT"))["last_error"]
        records = result()
        device.session(*records)
        came(here, "SILENT" + over, body_of(*records))


def test_reset_in_a_session_keeps_what_was_acknowledged(here):
    device = instrument(here, "ASTM")
    device.session("H|\\^&|||RESET", eot=False)
    device.reset()
    dead(here, "ASTM", body_of("H|\\^&|||RESET"))


def test_instruments_of_one_channel_keep_their_order_and_do_not_wait_for_each_other(here):
    """Four at four addresses send at the same time; with no answer from the server each has one on its way."""
    hosts = [f"127.0.0.{number}" for number in range(2, 6)]
    here.sandbox.faults.silent = True

    def send(host: str) -> None:
        with Instrument.at(here.ports["MANY"], host) as device:
            for number in range(10):
                device.session(*result(f"{host}-{number}"))

    def seen() -> list[str]:
        return [transmit.body.split("O|1|")[1].split("|")[0] for transmit in of(here, "MANY")]

    senders = [threading.Thread(target=send, args=(host,)) for host in hosts]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(20)
    eventually(lambda: len(rows(here, "MANY")) == 40, what="everything stored")
    here.sandbox.wait_for(lambda: len(seen()) >= 4)
    assert sorted(seen()) == [f"{host}-0" for host in hosts]
    here.sandbox.faults.silent = False
    here.sandbox.cut()  # what was not answered is sent again
    eventually(lambda: settled_all(here, "MANY"), what="everything processed")
    for host in hosts:
        mine = [name for name in seen()[4:] if name.startswith(f"{host}-")]
        assert mine == [f"{host}-{number}" for number in range(10)]


# --- ASTM down ---


def test_a_host_query_is_answered_by_an_order(here, over):
    order = ("H|\\^&|||HOST", "P|1", "O|1|E77||^^^GLU|R", "L|1|N")
    query = ("H|\\^&|||ABC", "Q|1|^E77||ALL", "L|1|N")
    here.sandbox.bot = lambda transmit: (200, body_of(*order)) if "\nQ|" in transmit.body else (200, "")
    with instrument(here, "ASTM" + over) as device:
        device.session(*query)
        assert device.accept() == [f"{record}\r".encode() for record in order]
        assert device.quiet() == b""
        device.session(*result())  # the line is free again


def test_an_answer_in_small_frames_survives_a_nak(here, over):
    here.sandbox.bot = lambda transmit: (200, "H|\\^&|||0123456789\nL|1|N\n")
    with instrument(here, "SHORT" + over) as device:
        device.session(*result())
        assert device.take(1) == ENQ
        assert device.ask(NAK) == ENQ  # busy: asked again
        device.write(ACK)
        first = device.frame()
        assert first[2:-5] == b"H|\\^&|||01" and first[-5:-4] == ETB
        device.write(NAK)
        assert device.frame() == first
        device.write(ACK)
        second = device.frame()
        assert second[2:-5] == b"23456789\r" and second[-5:-4] == ETX
        device.write(ACK)
        assert device.frame()[2:-5] == b"L|1|N\r"
        device.write(ACK)
        assert device.take(1) == EOT


def test_contention_when_we_asked_first(here, over):
    """The instrument wins, and we ask again when its session is over, or when it never comes."""
    here.sandbox.bot = lambda transmit: (200, ORDER) if "Q|" in transmit.body else (200, "")
    records = result()
    with instrument(here, "ASTM" + over) as device:
        device.session("H|\\^&", "Q|1|^E1", "L|1|N")
        assert device.take(1) == ENQ
        contended = time.monotonic()
        device.write(ENQ)
        assert device.take(1) == ENQ
        assert time.monotonic() - contended >= 0.3  # contentionTimeoutSecs
        device.write(ENQ)
        assert device.quiet(0.1) == b""
        device.session(*records)
        assert device.accept() == ORDER_RECORDS
    came(here, "ASTM" + over, body_of(*records))


def test_contention_when_the_instrument_asked_first(here, over):
    """An order that comes in its session waits for the end, and for the instrument's next session if it has one."""
    records = result()
    with instrument(here, "ASTM" + over) as device:
        assert device.ask(ENQ) == ACK
        with here.caller() as caller:
            caller.store("channel://ASTM" + over, ORDER, contentType=ASTM_TYPE)
        eventually(lambda: not settled_all(here, "push channel://ASTM" + over))
        for frame in frames_of(*records):
            assert device.ask(frame) == ACK
        assert device.quiet(0.1) == b""
        device.write(EOT)
        device.session(*records)
        assert device.accept() == ORDER_RECORDS
    eventually(lambda: len([t for t in of(here, "ASTM" + over) if t.body == body_of(*records)]) == 2)


def test_reply_time_outs_of_ours(here, over):
    """What is not answered ends in EOT, and the message is sent anew: a late ACK must not count for another frame."""
    here.sandbox.bot = lambda transmit: (200, "H|\\^&\nL|1|N\n")
    with instrument(here, "HASTY" + over) as device:
        device.session(*result())
        assert device.take(1) == ENQ
        asked = time.monotonic()
        assert device.take(2) == EOT + ENQ
        assert time.monotonic() - asked >= 0.4  # replyTimeoutSecs
        device.write(ACK)
        first = device.frame()
        assert device.take(1) == EOT
        device.write(ACK)
        assert device.take(1) == ENQ
        device.write(ACK)
        assert device.frame() == first
        device.write(ACK)
        assert device.frame()[2:-5] == b"L|1|N\r"
        assert device.ask(ACK) == EOT


def test_an_instrument_interrupts_us_with_eot(here, over):
    """It has something more urgent: we stop, hear it, and send the whole message again."""
    here.sandbox.bot = lambda transmit: (200, ORDER) if "Q|" in transmit.body else (200, "")
    urgent = result()
    with instrument(here, "ASTM" + over) as device:
        device.session("H|\\^&", "Q|1|^E1", "L|1|N")
        assert device.take(1) == ENQ
        device.write(ACK)
        assert device.frame()[2:-5] == ORDER_RECORDS[0]
        assert device.ask(EOT) == EOT
        device.session(*urgent)
        assert device.accept() == ORDER_RECORDS
    came(here, "ASTM" + over, body_of(*urgent))


@pytest.mark.parametrize(("channel", "vanishes"), [("ASTM", True), ("ASTM", False), ("ASTM" + SERIAL, False)])
def test_an_answer_that_the_instrument_did_not_take_is_no_delivery(here, channel, vanishes):
    here.sandbox.bot = lambda transmit: (200, "H|\\^&\nL|1|N\n")
    records = result()
    with instrument(here, channel) as device:
        device.session(*records)
        assert device.take(1) == ENQ
        if not vanishes:
            device.write(ACK)
            for _ in range(6):
                device.frame()
                device.write(NAK)
            assert device.take(1) == EOT
    original = body_of(*records).encode()
    eventually(lambda: (row(here, channel, original) or {})["ack_outcome"] == "undelivered", 3)
    if vanishes:  # it waits for the instrument
        with instrument(here, channel) as device:
            assert device.accept()


def test_a_dead_letter_is_as_old_as_it_is(here):
    """Retention counts from settled_at: 0 would make the newest dead letter the first to be deleted."""
    with instrument(here, "ASTM") as device:
        device.session("H|\\^&|||AGE", eot=False)
    found = dead(here, "ASTM", body_of("H|\\^&|||AGE"))
    with contextlib.closing(here.agent.database()) as db:
        (at,) = db.execute("SELECT settled_at FROM message WHERE id = ?", (found["id"],)).fetchone()
    assert abs(at / 1000 - time.time()) < 60


# --- we connect ---


def test_role_client_dials_and_dials_again(here):
    listener = LISTENING["CLIENT"]
    for _ in range(2):
        with Instrument(listener.accept()[0]) as device:
            records = result()
            here.sandbox.bot = lambda transmit: (200, "H|\\^&\nO|1|E1\nL|1|N\n")
            device.session(*records)
            came(here, "CLIENT", body_of(*records))
            assert device.accept() == [b"H|\\^&\r", b"O|1|E1\r", b"L|1|N\r"]
    Instrument(listener.accept()[0]).reset()
    with Instrument(listener.accept()[0]) as device:
        records = result()
        device.session(*records)
        came(here, "CLIENT", body_of(*records))


def test_role_client_raw(here):
    here.sandbox.bot = lambda transmit: (200, "thanks")
    with Instrument(LISTENING["RAW-CLIENT"].accept()[0]) as device:
        device.write(b"\x02dialed\x03")
        came(here, "RAW-CLIENT", "\x02dialed\x03")
        assert device.take(6) == b"thanks"


# --- kill -9 ---


@pytest.mark.parametrize(("transport", "times"), [("tcp", 25), ("serial", 5)])
def test_kill_between_frames_loses_no_acknowledged_frame(tmp_path, transport, times):
    """After each restart everything acknowledged is delivered or in a dead letter, under exactly one of them."""
    with lone_site(tmp_path, transport) as (lone, cable):
        lone.sandbox.bot = silent_bot
        acked: list[str] = []
        sizes = [n % 6 for n in range(times)]
        for number, count in enumerate(sizes):
            lone.agent.start(ready=False)
            with opened(lone, cable, number) as device:
                assert device.ask(ENQ) == ACK
                name = f"K{number}"
                records = [f"H|\\^&|||{name}-H", *(f"R|{n}|{name}-{n}" for n in range(4)), f"L|1|{name}-L"]
                frames = frames_of(*records)
                for record, frame in zip(records[:count], frames, strict=False):
                    assert device.ask(frame) == ACK
                    acked.append(record)
                device.write(frames[count])  # under way
                lone.agent.kill()
                if cable is not None:  # or the next agent would hear the rest of this session
                    cable.unplug()
                    cable.plug()
        lone.agent.start(ready=False)
        lone.agent.wait_connected()

        def kept() -> str:
            # what was with the server at a kill is sent again, with the same callback but for the number of the try
            sent = {transmit.callback.partition("#")[0]: transmit.body for transmit in of(lone, "ASTM")}
            dead_letters = b"".join(r["original"] for r in rows(lone, "ASTM") if r["state"] == "failed")
            return "".join(sent.values()) + dead_letters.decode()

        eventually(lambda: all(record in kept() for record in acked), what=f"{acked} in {kept()}")
        lines = kept().splitlines()
        assert [record for record in acked if lines.count(record) != 1] == []
        eventually(lambda: partials(lone) == 0)


@contextlib.contextmanager
def lone_site(folder: Path, transport: str) -> Iterator[tuple[Site, Cable | None]]:
    """A site with the channel `ASTM`, not started, and the cable of its serial port."""
    with contextlib.ExitStack() as stack:
        cable, address = None, ASTM
        if transport == "serial":
            if shutil.which("socat") is None:
                pytest.skip("socat is not installed: SERIAL PORTS ARE NOT TESTED (apt-get install socat)")
            cable = stack.enter_context(Cable(folder))
            address = cable.address(ASTM)
        yield stack.enter_context(site(folder, {"ASTM": address}, start=False)), cable


def opened(here: Site, cable: Cable | None, times: int = 0) -> Instrument:
    """The line to an agent that has just been started, for the time after `times` times."""
    if cable is None:
        eventually(lambda: accepts(("127.0.0.1", here.ports["ASTM"])), 20)
        return instrument(here, "ASTM")
    eventually(functools.partial(opened_since, here, "ASTM", times), 20, "the serial port is open")
    return cable.open()


def opened_since(here: Site, channel: str, times: int) -> bool:
    return opens(here, channel) > times


def opens(here: Site, channel: str) -> int:
    """How often the agent opened the serial port of a channel."""
    lines = here.agent.main_log().decode().splitlines()
    return sum(f"'{channel}': serial://" in line and "is open" in line for line in lines)


@pytest.mark.parametrize("transport", ["tcp", "serial"])
def test_a_clean_stop_in_a_session_keeps_it(tmp_path, transport):
    with lone_site(tmp_path, transport) as (lone, cable):
        lone.agent.start(ready=False)
        with opened(lone, cable) as device:
            device.session("H|\\^&|||STOPPED", eot=False)
            code, seconds = lone.agent.terminate()
            assert code == 0 and seconds < 8
        lone.agent.start(ready=False)
        dead(lone, "ASTM", body_of("H|\\^&|||STOPPED"))
        assert len(rows(lone, "ASTM")) == 1


def test_a_queued_body_keeps_its_form_over_a_change_of_mode_and_a_restart(tmp_path):
    """What a device sent as raw bytes is no ASTM text, whatever the channel speaks when it is delivered."""
    with site(tmp_path, {"X": FRAMED}, start=False) as lone:
        lone.sandbox.bot = silent_bot
        lone.agent.start(ready=False)
        lone.agent.logged("Medplum service started")
        lone.agent.wait_connected()
        lone.sandbox.faults.silent = True
        with instrument(lone, "X") as device:
            device.write(b"\x02r\xffw\x03")
            eventually(lambda: row(lone, "X", b"\x02r\xffw\x03"))
        lone.agent.kill()
        lone.endpoint("X")["address"] = ASTM.format(port=lone.ports["X"])
        lone.sandbox.faults.silent = False
        lone.agent.start(ready=False)
        assert settled(lone, "X", b"\x02r\xffw\x03")["state"] == "processed"
        records = result()
        with instrument(lone, "X") as device:
            device.session(*records)
            came(lone, "X", body_of(*records))
        assert {(t.body, t.content_type) for t in of(lone, "X")} == {
            ("0272ff7703", BYTES_TYPE),
            (body_of(*records), ASTM_TYPE),
        }


# --- reload ---


@pytest.mark.parametrize("transport", ["tcp", "serial"])
def test_reload_that_changes_the_mode_on_the_same_port(tmp_path, transport):
    with lone_site(tmp_path, transport) as (lone, cable):
        lone.sandbox.bot = silent_bot
        astm = lone.endpoint("ASTM")["address"]
        raw = astm.replace("mode=astm", "startChar=%02&endChar=%03")

        def reload(address: str, device: Instrument) -> None:
            before = opens(lone, "ASTM")
            lone.endpoint("ASTM")["address"] = address
            assert lone.sandbox.reload()["type"] != "agent:error"
            if cable is None:
                assert device.ended()
            else:
                eventually(lambda: opens(lone, "ASTM") > before, what="the serial port is open again")

        lone.endpoint("ASTM")["address"] = raw
        lone.agent.start(ready=False)
        lone.agent.wait_connected()
        with opened(lone, cable) as device:
            device.write(b"\x02raw\x03")
            came(lone, "ASTM", b"\x02raw\x03".hex())
            reload(astm, device)
        with opened(lone, cable) as device:
            records = result()
            device.session(*records)
            came(lone, "ASTM", body_of(*records))
            device.session("H|\\^&|||RELOADED", eot=False)
            reload(raw, device)
        dead(lone, "ASTM", body_of("H|\\^&|||RELOADED"))
        with opened(lone, cable) as device:
            device.write(b"\x02again\x03")
            came(lone, "ASTM", b"\x02again\x03".hex())
        eventually(lambda: partials(lone) == 0)


def test_reload_of_another_channel_leaves_a_session_alone(tmp_path):
    with site(tmp_path, {"X": ASTM, "Y": FRAMED}, start=False) as lone:
        lone.sandbox.bot = silent_bot
        lone.agent.start(ready=False)
        lone.agent.logged("Medplum service started")
        lone.agent.wait_connected()
        records = result()
        with instrument(lone, "X") as device:
            device.session(*records, eot=False)
            lone.endpoint("Y")["address"] += "&bodyEncoding=utf-8"
            lone.sandbox.reload()
            device.write(EOT)
            came(lone, "X", body_of(*records))


# --- pushes ---

ORDER = "H|\\^&|||HOST\nP|1\nO|1|E1||^^^GLU|R\nL|1|N\n"
ORDER_RECORDS = [f"{record}\r".encode() for record in ORDER.splitlines()]


class Waiting:
    """A call of $push in a thread: the device has to answer meanwhile."""

    def __init__(self, here: Site, url: str, body: str, kind: str = ASTM_TYPE, **members: Any):
        self.answer: Any = None

        def run() -> None:
            with here.caller() as caller:
                self.answer = caller.push(url, body, contentType=kind, **members)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(15)
        assert not self._thread.is_alive()


def test_push_to_an_instrument_that_listens(here):
    with listening(0) as listener:
        url = f"tcp://127.0.0.1:{listener.getsockname()[1]}?mode=astm"
        with Waiting(here, url, ORDER) as push, Instrument(listener.accept()[0]) as device:
            assert device.accept() == ORDER_RECORDS
        assert (push.answer.status, push.answer.text) == (200, "OK")
        with here.caller() as caller:
            caller.store(url, ORDER, contentType=ASTM_TYPE)
        with Instrument(listener.accept()[0]) as device:
            assert device.accept() == ORDER_RECORDS


def test_push_that_the_instrument_refuses(here):
    with listening(0) as listener:
        url = f"tcp://127.0.0.1:{listener.getsockname()[1]}?mode=astm"
        with Waiting(here, url, ORDER) as push, Instrument(listener.accept()[0]) as device:
            assert device.take(1) == ENQ
            device.write(ACK)
            for _ in range(6):
                device.frame()
                device.write(NAK)
            assert device.take(1) == EOT
        assert push.answer.status == 400 and "6 tries" in push.answer.text


def test_push_to_a_busy_instrument_waits_as_long_as_its_url_says(here):
    with listening(0) as listener:
        url = f"tcp://127.0.0.1:{listener.getsockname()[1]}?mode=astm&nakDelaySecs=0.2&maxFrame=7"
        with Waiting(here, url, ORDER) as push, Instrument(listener.accept()[0]) as device:
            assert device.take(1) == ENQ
            device.write(NAK)
            assert device.accept() == ORDER_RECORDS
        assert push.answer.status == 200


def test_push_with_tls_is_never_sent_without(here, tmp_path):
    authority, server = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("127.0.0.1").configure_cert(server)
    with listening(0) as listener:
        url = f"tcp://127.0.0.1:{listener.getsockname()[1]}?mode=astm&tls=true"
        with Waiting(here, f"{url}&caFile={tmp_path / 'ca.pem'}", ORDER) as push, listener.accept()[0] as line:
            secured = server.wrap_socket(line, server_side=True)
            with secured:
                for said, answer in ((ENQ, ACK), *[(frame, ACK) for frame in frames_of(*ORDER.splitlines())]):
                    assert secured.recv(4096) == said
                    secured.sendall(answer)
                assert secured.recv(4096) == EOT
        assert push.answer.text == "OK"
        with Waiting(here, url, ORDER) as push, listener.accept()[0] as line, pytest.raises(ssl.SSLError):
            server.wrap_socket(line, server_side=True)
        assert "certificate" in push.answer.text


def test_push_to_an_instrument_that_is_switched_off_is_unreachable(here):
    """Not silent: a stored push waits for it, and the tries are not counted."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(3):  # a queue that is full drops a SYN, as a host does that is not there
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"tcp://127.0.0.1:{full.getsockname()[1]}?mode=astm"
        with here.caller() as caller:
            answer = caller.push(f"{url}&connectTimeoutSecs=0.2", ORDER, contentType=ASTM_TYPE)
            assert (answer.status, "no connection within 0.2 s" in answer.text) == (400, True), answer
            caller.store(f"{url}&ackTimeoutSecs=0.2", ORDER, contentType=ASTM_TYPE)
        name = f"push {url.partition('?')[0]}"
        assert eventually(lambda: [r["error_code"] for r in rows(here, name) if r["error_code"]]) == [
            "device-unreachable"
        ]


def test_push_to_a_connected_instrument(here, over):
    by_name = f"serial://{CABLES['ASTM' + over].agent}" if over else "channel://ASTM/127.0.0.1"
    with instrument(here, "ASTM" + over) as device:
        device.session(*result())
        with Waiting(here, "channel://ASTM" + over, ORDER) as push:
            assert device.accept() == ORDER_RECORDS
        assert (push.answer.status, push.answer.text) == (200, "OK")
        with here.caller() as caller:
            caller.store(by_name, ORDER, ORDER, contentType=ASTM_TYPE)
        assert device.accept() == ORDER_RECORDS
        assert device.accept() == ORDER_RECORDS


@pytest.mark.parametrize("busy", [False, True], ids=["gone", "refused first"])
def test_an_order_for_an_instrument_that_closed_at_once_waits_for_it(tmp_path, busy):
    with site(tmp_path, {"A": "tcp://127.0.0.1:{port}?mode=astm"}) as here:
        here.agent.logged("Medplum service started")
        here.sandbox.bot = lambda transmit: (200, ORDER)
        with Instrument.at(here.ports["A"]) as device:
            device.session("H|\\^&", "Q|1|^S1", "L|1|N")
            if busy:
                assert device.take(1) == ENQ
                device.write(NAK)
            here.sandbox.wait_for(lambda: here.sandbox.answered)
        here.agent.logged("its answer waits 10 minutes")
        with Instrument.at(here.ports["A"]) as device:
            assert device.accept(4)


def test_a_push_that_was_given_up_is_not_sent_later(here, over):
    """The instrument is busy with a session of its own. The caller was told; and a stored push comes once, not once
    for each of its tries."""
    with instrument(here, "ASTM" + over) as device:
        assert device.ask(ENQ) == ACK
        with here.caller() as caller:
            answer = caller.push(f"channel://ASTM{over}?ackTimeoutSecs=0.2", ORDER, contentType=ASTM_TYPE)
        assert (answer.status, "not taken within 0.2 s" in answer.text) == (400, True), answer
        for frame in frames_of(*result()):
            assert device.ask(frame) == ACK
        device.write(EOT)
        assert device.quiet(0.7) == b""  # longer than the pause before our next ENQ


@pytest.mark.parametrize(("channel", "body"), [("HEX", "02414203"), ("TEXT", "\x02AB\x03")])
def test_push_to_a_connected_raw_device(here, over, channel, body):
    with instrument(here, channel + over) as device, here.caller() as caller:
        device.write(b"\x02here\x03")
        eventually(lambda: row(here, channel + over, b"\x02here\x03"))
        answer = caller.push(f"channel://{channel}{over}", body, contentType=BYTES_TYPE)
        assert (answer.status, answer.text) == (200, "OK")
        assert device.take(4) == b"\x02AB\x03"
        caller.store(f"channel://{channel}{over}", body, body, contentType=BYTES_TYPE)
        assert device.take(8) == b"\x02AB\x03" * 2


def test_push_to_a_channel_without_a_device(here):
    with here.caller() as caller:
        answer = caller.push("channel://STRIP/127.0.0.9", "AB", contentType=BYTES_TYPE)
        assert answer.status == 400 and "connected" in answer.text
        answer = caller.push("channel://NONE", "AB", contentType=BYTES_TYPE)
        assert answer.status == 400 and "NONE" in answer.text


def test_a_push_that_the_raw_channel_cannot_carry(here, over):
    with instrument(here, "HEX" + over) as device, here.caller() as caller:
        device.write(b"\x02I am\x03")
        eventually(lambda: row(here, "HEX" + over, b"\x02I am\x03"))
        answer = caller.push("channel://HEX" + over, "no hex", contentType=BYTES_TYPE)
        assert answer.status == 400 and "hexadecimal" in answer.text
        assert device.quiet() == b""


# --- serial ---


def test_a_serial_port_that_goes_and_comes_back(here):
    channel = "ASTM" + SERIAL
    if channel not in CABLES:
        pytest.skip("socat is not installed")
    cable = CABLES[channel]
    for number in range(2):
        with cable.open() as device:
            device.session(f"H|\\^&|||PULLED{number}", eot=False)
            cable.unplug()
        dead(here, channel, body_of(f"H|\\^&|||PULLED{number}"))
        before = opens(here, channel)
        cable.plug()
        eventually(functools.partial(opened_since, here, channel, before), 15, "the port is open again")
        with cable.open() as device:
            records = result()
            device.session(*records)
            came(here, channel, body_of(*records))
