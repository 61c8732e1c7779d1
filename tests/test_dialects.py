"""How real instruments and systems speak, rebuilt as peers over real sockets and pseudo-terminals."""

import base64
import contextlib
import random
import select
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from medplum_agent import ASTM_TYPE, BYTES_TYPE, StreamSettings, channel_settings
from tests.instruments import ACK, ENQ, EOT, NAK, Cable, Instrument, body_of, frames_of, of
from tests.support import Receiver, ack_text, bot, changed, control_id, eventually, message, site
from tests.test_laboratory import came, listening, opened_since
from tests.test_upgrade import Installed

RESULT = ("H|\\^&|||XN-1000", "P|1", "O|1|S1", "R|1|^^^WBC|5.4|10*3/uL", "L|1|N")
ORDER = ("H|\\^&|||HOST", "P|1", "O|1|S1||^^^WBC|R", "L|1|N")
ASTM = "tcp://127.0.0.1:{port}?mode=astm"
TWO_BYTES = "tcp://127.0.0.1:{port}?startChar=%02&endChar=%03%0D&bodyEncoding=utf-8"
LIMITS = "m.UNREAD_SECS, m.LEFT_SECS = 0.2, 1e-9"
CHANNELS = {
    "HL7": "",
    "STORED": "?enhanced=aa",
    "FEW": "?maxConnections=4",
    "TWO": TWO_BYTES,
    "UTF-8": f"{ASTM}&encoding=utf-8",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with site(tmp_path_factory.mktemp("dialects"), CHANNELS, start=False) as running:
        changed(running.agent, LIMITS)
        running.agent.start(ready=False)
        running.agent.logged("started successfully")
        running.agent.wait_connected()
        yield running


@pytest.fixture(autouse=True)
def quiet(request):
    """The Bot returns nothing unless a test says otherwise."""
    if "here" in request.fixturenames:
        request.getfixturevalue("here").sandbox.bot = lambda transmit: (200, "")


# --- orders down ---


@pytest.mark.parametrize(
    "shown", [lambda own: own[:20], str.upper, lambda own: f"{own}\0\0"], ids=["20 characters", "one case", "a buffer"]
)
def test_a_device_that_keeps_a_control_id_in_its_own_way_has_acknowledged_it(here, shown):
    """MSH-10 has room for 20 characters up to HL7 v2.5.1: a UUID came back shorter, was no ACK, and was sent again."""
    first, second = "0f8fad5b-d9cb-469f-a165-70867728950e", "7c9e6679-7425-40de-944b-e07fc1f90ae7"
    with Receiver(lambda link, text: link.ack("AA", shown(control_id(text)))) as device, here.caller() as caller:
        answer = caller.push(device.url("?ackTimeoutSecs=3"), message(first))
        assert answer.status == 200 and f"MSA|AA|{shown(first)}" in answer.text
        caller.store(device.url("?ackTimeoutSecs=1"), message(second), message("LAST"))
        device.wait_ids(first, second, "LAST")  # in order: each was taken by the one before
        assert device.ids() == [first, second, "LAST"]


def test_another_control_id_acknowledges_nothing(here):
    with Receiver(lambda link, text: link.ack("AA", control_id(text)[:9])) as device, here.caller() as caller:
        answer = caller.push(device.url("?ackTimeoutSecs=0.5"), message("0f8fad5b-d9cb-469f"))
        assert answer.status == 400 and "another message" in answer.text


@pytest.mark.parametrize("word", ["", "CA"])
def test_what_may_be_of_the_push_before_acknowledges_no_other(here, word):
    """Its late acknowledgment, or the AA behind its CA, cut to what both control ids begin with."""
    first, second = f"MEDPLUM-20261127-0001-{word}1", f"MEDPLUM-20261127-0001-{word}2"
    with here.device("HL7") as device, here.caller() as caller, ThreadPoolExecutor(1) as pool:

        def pushed(number: str, *said: str):
            asked = pool.submit(caller.push, "channel://HL7?ackTimeoutSecs=1", message(number))
            assert control_id(device.receive()) == number
            device.send(*(ack_text(code, number[:20]) for code in said if code))
            return asked.result()

        assert pushed(first, word).status == (200 if word else 400)
        assert pushed(second, "AA").status == 400
        assert pushed(second, "AA").status == 200  # a word that does not come is not waited for again
        assert pushed(first, word, "AA").status == 200


def test_an_instrument_that_is_called_and_has_a_result_of_its_own_keeps_it(here):
    """It won the contention (E1381 6.2.7), heard ACK to its ENQ, and NAK to its frames until it gave its result up."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listening(0))
        caller, pool = stack.enter_context(here.caller()), stack.enter_context(ThreadPoolExecutor(1))
        url = f"tcp://127.0.0.1:{listener.getsockname()[1]}?mode=astm"
        pushed = pool.submit(caller.push, url, body_of(*ORDER), contentType=ASTM_TYPE)
        device = stack.enter_context(Instrument(listener.accept()[0]))
        assert device.take(1) == ENQ
        device.write(ENQ)
        assert device.quiet(0.1) == b""  # it yields
        assert device.ask(ENQ) == NAK  # it is busy: the instrument asks again in 10 s
        assert device.accept() == [f"{record}\r".encode() for record in ORDER]
        assert pushed.result().status == 200


def test_an_instrument_that_connects_to_send_is_not_asked_first(here):
    """An answer that waited for it was offered at once: it heard ENQ for ACK, hung up, and brought no result for as
    long as the answer waited (python-astm does so)."""
    here.sandbox.bot = lambda transmit: (200, body_of(*ORDER) if "Q|1" in transmit.body else "")
    with Instrument.at(here.ports["UTF-8"]) as device:
        device.session("H|\\^&|||COBAS", "Q|1|^S1||ALL", "L|1|N")
    here.agent.logged("its answer waits")
    with Instrument.at(here.ports["UTF-8"]) as device:
        assert device.quiet(0.05) == b""
        device.session("H|\\^&|||COBAS", "R|1|^^^GLU|5.1", "L|1|N")
        assert device.accept() == [f"{record}\r".encode() for record in ORDER]
    came(here, "UTF-8", body_of("H|\\^&|||COBAS", "R|1|^^^GLU|5.1", "L|1|N"))


# --- results up ---


def test_records_with_a_byte_order_mark(here):
    """They were a dead letter: `its first record is no H record`."""
    with Instrument.at(here.ports["UTF-8"]) as device:
        assert device.ask(ENQ) == ACK
        for frame in frames_of("\xef\xbb\xbf" + RESULT[0], *RESULT[1:]):
            assert device.ask(frame) == ACK
        device.write(EOT)
        came(here, "UTF-8", body_of(*RESULT))


@pytest.mark.parametrize("year", ["-2000", "-2005", "-2022", ""])
def test_every_edition_of_gb_18030(here, year):
    """Table 0211 knows the one of 2000: under the later ones, which devices in China name, names were U+FFFD."""
    with here.device("HL7") as device:
        assert device.ask(said_by(f"GB{year}", "中文", f"GB 18030{year}", "gb18030"))[0] == "AA"
    assert "||中文" in here.sandbox.of(f"GB{year}")[0].body


def test_a_monitor_that_never_reads_goes_on(here):
    """MSH-15 and -16 NE, and no answer is read: when the buffers were full its feed stopped for good."""
    here.sandbox.bot = bot("AA", "x" * 50_000)
    with here.device("HL7", receive_buffer=4096) as monitor:
        monitor.send(*(message(f"WAVE-{n}", f"W{n}") for n in range(200)))
        here.agent.logged("has not read its answers")
        here.sandbox.bot = bot("AA")
        monitor.send(*(message(f"ALARM-{n}", "W0") for n in range(5)))
        here.sandbox.wait_ids(*(f"ALARM-{n}" for n in range(5)))
        monitor.socket.settimeout(10)
        heard = b""
        while b"|READS" not in heard:  # once it reads, it is answered again
            while select.select([monitor.socket], [], [], 0.1)[0]:
                heard = heard[-200:] + monitor.socket.recv(1 << 20)
            monitor.send(message(f"READS-{time.monotonic_ns()}"))


def test_a_device_that_reads_slowly_gets_all_its_answers(here):
    """A large answer over a slow network: what came after it was dropped, as for one that does not read."""
    here.sandbox.bot = bot("AA", "x" * 4_000_000)
    with here.device("HL7") as device:
        device.send(*(message(f"SLOW-{n}", f"W{n}") for n in range(8)))
        here.sandbox.wait_ids(*(f"SLOW-{n}" for n in range(8)))
        here.sandbox.bot = bot("AA")
        heard, began, sent = bytearray(), time.monotonic(), False
        while b"|AFTER" not in heard[-200:] and select.select([device.socket], [], [], 30)[0]:
            heard += device.socket.recv(1 << 16)
            if (took := time.monotonic() - began) < 3:
                time.sleep(0.01)
            if took > 2.3 and not sent:
                sent = not device.send(message("AFTER"))
        assert (sent, heard.count(b"MSA|AA")) == (True, 9), here.agent.output()[-2000:]


def test_a_device_that_does_not_read_has_not_taken_a_push(here):
    """What is sent to it is dropped: to a raw one, which says nothing, the push had succeeded."""
    here.sandbox.bot = lambda transmit: (200, "x" * 500_000)
    with here.device("TWO", receive_buffer=4096) as device, here.caller() as caller:
        device.send_raw(b"\x02long\x03\r" * 20)
        here.agent.logged(f"{device.socket.getsockname()[1]} has not read its answers")
        answer = caller.push("channel://TWO", "two", contentType=BYTES_TYPE)
        assert answer.status == 400 and "does not read" in answer.text


def test_a_sender_that_leaves_its_connections_open_is_no_end_of_the_feed(here):
    """Connect for each message and never disconnect: after maxConnections of them everybody was turned away."""
    with contextlib.ExitStack() as stack:
        for n in range(12):
            assert stack.enter_context(here.device("FEW")).ask(message(f"LEAK-{n}")) == ("AA", f"LEAK-{n}")
        with Instrument.at(here.ports["FEW"], "127.0.0.2") as other:
            other.write(b"\x0b" + message("NEIGHBOUR").encode() + b"\x1c\r")
            assert other.more(5) and b"MSA|AA|NEIGHBOUR" in other.buffer
        here.agent.logged("leaves its connections open")


def test_fewer_data_bits_than_a_character_has_are_said():
    said: list[str] = []
    for encoding in ("latin-1", "ascii", "iso-2022-jp"):
        channel_settings(StreamSettings, f"mode=astm&dataBits=7&encoding={encoding}", "LAB", {}, said)
    channel_settings(StreamSettings, "startChar=%02&endChar=%03&dataBits=7", "RAW", {}, said)
    assert said == ["LAB: dataBits=7 carries no latin-1 beyond ASCII: name encoding=ascii"]


# --- reload and upgrade ---


def test_marks_of_several_bytes_are_no_half_message(here):
    """What could begin the next mark was held: between two messages, a reload closed the connection."""
    with here.device("TWO") as device:
        device.send_raw(b"\x02one\x03\r\n")
        came(here, "TWO", "\x02one\x03\r")
        here.endpoint("TWO")["address"] = TWO_BYTES.format(port=here.ports["TWO"]) + "&autoRespond=%03%0D:%06"
        assert here.sandbox.reload()["statusCode"] == 200
        device.send_raw(b"\x02two\x03\r")
        assert device.socket.recv(1) == b"\x06"
        came(here, "TWO", "\x02two\x03\r")


@pytest.mark.skipif(not shutil.which("socat"), reason="socat is not installed")
def test_a_serial_line_and_marks_of_several_bytes_in_an_upgrade(tmp_path):
    """It waited 15 s for the end of a message that was none, and closed the connection."""
    with Cable(tmp_path) as cable:
        channels = {"SERIAL": cable.address(ASTM), "TWO": TWO_BYTES}
        with site(tmp_path, channels, start=False) as here:
            here.sandbox.bot = lambda transmit: (200, "")
            there = Installed(tmp_path, here, start=False)
            here.agent.start(ready=False)
            there.add("5.3.0")
            eventually(lambda: opened_since(here, "SERIAL", 0), what="the serial port")
            with cable.open() as analyzer, here.device("TWO") as raw, ThreadPoolExecutor(1) as pool:
                raw.send_raw(b"\x02one\x03\r")
                came(here, "TWO", "\x02one\x03\r")
                frames = frames_of(*RESULT)
                for part in (ENQ, *frames[:2]):
                    assert analyzer.ask(part) == ACK
                ran = pool.submit(there.command, "upgrade", "5.3.0")
                here.agent.logged("5.3.0 takes over")
                for frame in frames[2:]:
                    assert analyzer.ask(frame) == ACK
                analyzer.write(EOT)
                began = time.monotonic()
                here.agent.logged("Stopped.")
                assert time.monotonic() - began < 8
                assert ran.result().returncode == 0
                raw.send_raw(b"\x02two\x03\r")
                came(here, "TWO", "\x02two\x03\r")
                eventually(lambda: opened_since(here, "SERIAL", 1), what="the serial port, again")
                analyzer.session(*RESULT)
                eventually(lambda: [one.body for one in of(here, "SERIAL")] == [body_of(*RESULT)] * 2)


# --- recordings, cut anywhere ---


def said_by(number: str, text: str = "", charset: str = "", encoding: str = "utf-8") -> bytes:
    """A result of an analyzer, without the last carriage return."""
    head = f"MSH|^~\\&|BC-6800|LAB|||20260101||ORU^R01|{number}|P|2.3.1||||||{charset}"
    return f"{head}\rPID|1||P{number}||{text}\rOBX|1|ST|WBC||{text}".encode(encoding)


def recording(name: str) -> bytes:
    """Habits of engines, monitors and analyzers, one after the other on one connection."""
    number = (f"{name}-{n}" for n in range(99)).__next__
    start, end = b"\x0b", b"\x1c\r"
    report = base64.b64encode(random.Random(1).randbytes(6000))
    lines = b"\r".join(report[at : at + 76] for at in range(0, len(report), 76))
    ack = f"MSH|^~\\&|A|B|||20260101||ACK|{number()}|P|2.3.1\rMSA|AA|7"
    parts = [
        start + said_by(number()) + b"\r" + end,
        start + said_by(number()) + end + b"\n",  # no last carriage return
        b"\r\n  " + start + said_by(number()).replace(b"\r", b"\r\n") + b"\r\n" + end,
        start + said_by(number()).replace(b"\r", b"\n") + b"\n" + end,
        start + said_by(number(), "中文 测试", "GB 18030-2000", "gb18030") + b"\r" + end,
        start + said_by(number(), "漢字テスト表", "SHIFT_JIS", "cp932") + b"\r" + end,
        start + said_by(number(), "漢字^テスト", "~ISO IR87", "iso2022_jp") + b"\r" + end,
        start + said_by(number(), "Кровь", "KOI8-R", "koi8-r") + b"\r" + end,
        start + said_by(number(), "Кровь", "WINDOWS-1251", "cp1251") + b"\r" + end,
        start + b"\xef\xbb\xbf" + said_by(number(), "äöü") + b"\r" + end,
        start + end + b"   " + start + b"\r" + end,  # heartbeats
        start + b"\r".join((said_by(number()), said_by(number()), said_by(number()))) + b"\r" + end,
        start
        + b"FHS|^~\\&|D\rBHS|^~\\&|D\r"
        + said_by(number())
        + b"\r"
        + said_by(number())
        + b"\rBTS|2\rFTS|1\r"
        + end,
        start + said_by(number()) + b"\r\x1c",  # and no 0x0D
        start + said_by(number()) + b"\r\x1c\n",
        start + said_by(number()) + b"\rOBX|2|ED|PDF||^AP^^Base64^" + lines + b"\r" + end,
        start + said_by(number())[:60],  # cut off
        start + ack.encode() + b"\r" + end,
        start + b"\x06" + end,  # the commit acknowledgment of MLLP release 2
        start + said_by(number()) + b"\r" + end,
    ]
    return b"".join(parts)


def told(here, channel: str, name: str, pieces: list[bytes]) -> tuple[list[str], list[tuple[str, str]]]:
    """What the server gets and the sender hears of a recording, sent in these pieces; but for its name."""
    with here.device(channel) as device:
        for piece in pieces:
            device.send_raw(piece)
        answers = [device.ack() for _ in range(20)] + device.drain(0.05)
    here.sandbox.wait_for(lambda: len(bodies(here, channel, name)) >= 20)
    shown = sorted(body.replace(name, "X") for body in bodies(here, channel, name))
    return shown, sorted((code, own.replace(name, "X")) for code, own in answers)


def bodies(here, channel: str, name: str) -> list[str]:
    return [one.body for one in of(here, channel) if f"{name}-" in one.body]


@pytest.mark.parametrize("channel", ["HL7", "STORED"])
def test_a_recording_is_the_same_however_it_is_cut(here, channel):
    here.sandbox.bot = bot("AA")
    whole = told(here, channel, "r000", [recording("r000")])
    assert [code for code, _ in whole[1]].count("AR") == 1  # what was cut off
    assert sum("漢字" in body for body in whole[0]) == 2 and sum("Кровь" in body for body in whole[0]) == 2
    chance = random.Random(20261127)
    for run in range(1, 9):
        content = recording(name := f"r{run:03d}")
        cuts = sorted(chance.sample(range(1, len(content)), chance.choice([1, 4, 40, 400])))
        pieces = [content[at:to] for at, to in zip([0, *cuts], [*cuts, len(content)], strict=True)]
        assert told(here, channel, name, pieces) == whole, f"cut at {cuts}"
