"""Faults that a laboratory would suffer from, found by foreign instruments over real sockets and pseudo-terminals.

Clauses are of ASTM E1381 / CLSI LIS01-A2 (line) and E1394 / LIS02-A2 (records).
"""

import contextlib
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from medplum_agent import ASTM_TYPE, Astm, Session, StreamSettings, astm_frame
from tests.instruments import ACK, ENQ, EOT, ETB, ETX, NAK, STX, Cable, Instrument, bad, body_of, frames_of, of, rows
from tests.support import ROOT, Site, ack_text, changed, eventually, free_ports, message, setting, site
from tests.test_laboratory import (
    ASTM,
    FRAMED,
    ORDER,
    ORDER_RECORDS,
    came,
    dead,
    listening,
    lone_site,
    opened,
    opened_since,
    opens,
    partials,
    silent_bot,
)

RESULT = ("H|\\^&|||XN-1000", "P|1", "O|1|S1", "R|1|^^^WBC|5.4|10*3/uL", "L|1|N")
NEXT = ("H|\\^&|||XN-1000", "P|1", "O|1|S2", "R|1|^^^WBC|6.0|10*3/uL", "L|1|N")
QUERY = ("H|\\^&|||COBAS", "Q|1|^S1||ALL", "L|1|N")
needs_socat = pytest.mark.skipif(not shutil.which("socat"), reason="socat is not installed")


def started(here: Site, times: int = 1) -> None:
    """Start the agent, for the `times`th time, and wait until its channels are there."""
    here.agent.start(ready=False)
    word = b"Medplum service started"
    eventually(lambda: here.agent.main_log().count(word) == times, 20, "the start")
    here.agent.wait_connected()


def bodies(here: Site, channel: str) -> list[str]:
    return [transmit.body for transmit in of(here, channel)]


# --- results up ---

# close() of a serial port lasts until its UART has sent everything: here until the new channel has looked for frames
DRAINING = """
import threading, serialx.descriptor_transport as t
close, frames, looked, times = t._safe_close, m.Store.frames, threading.Event(), []
async def look(store, row):
    found = await frames(store, row)
    times.append(1)
    if len(times) == 2:  # the first time is the start
        looked.set()
    return found
m.Store.frames = look
t._safe_close = lambda fd: (looked.wait(2), close(fd))
"""


@contextlib.contextmanager
def draining(folder):
    """A serial channel whose port closes slowly, and its instrument."""
    with lone_site(folder, "serial") as (here, cable):
        assert cable is not None
        changed(here.agent, DRAINING)
        here.sandbox.bot = silent_bot
        started(here)
        with opened(here, cable) as device:
            yield here, cable, device


@needs_socat
def test_a_reload_of_a_serial_port_delivers_the_session_under_way_once(tmp_path):
    """Somebody corrects the speed while the L frame is acknowledged and EOT is still to come (9600 baud: 1 ms each).

    LIS02-A2 14: with its L record the message is complete, so it is delivered when the line closes. The new channel
    finds the same frames on disk and delivers them, too: the Bot files each result twice.
    """
    with draining(tmp_path) as (here, cable, device):
        device.session(*RESULT, eot=False)
        here.endpoint("ASTM")["address"] = cable.address(ASTM).replace("19200", "9600")
        assert here.sandbox.reload()["type"] != "agent:error"
        eventually(functools.partial(opened_since, here, "ASTM", 1), what="the port is open again")
        device.session(*NEXT)
        came(here, "ASTM", body_of(*NEXT))
        eventually(lambda: partials(here) == 0)
        assert bodies(here, "ASTM") == [body_of(*RESULT), body_of(*NEXT)]


def test_a_reload_that_moves_a_port_while_a_frame_is_on_its_way_to_disk_delivers_the_session_once(tmp_path):
    """The same over TCP where the disk takes its time: the old line still waits for its frame."""
    begun, go = tmp_path / "begun", tmp_path / "go"
    slow = f"""
m.QUICK_COMMITS = 10**9  # the disk has a thread of its own, and does not hold up the event loop
keep_frame, begun, go = m.Store.keep_frame, m.Path({str(begun)!r}), m.Path({str(go)!r})
def wait(db):
    begun.touch()
    while not go.exists():
        m.time.sleep(0.01)
async def late(store, *frame):
    while not begun.exists():
        await m.asyncio.sleep(0.01)
    await keep_frame(store, *frame)
def keep(store, *frame):
    if not frame[-1].startswith(b"L"):
        return keep_frame(store, *frame)
    store.call(wait)
    return m.spawn(late(store, *frame))
m.Store.keep_frame = keep
"""
    with site(tmp_path, {"LAB": ASTM}, start=False) as here:
        changed(here.agent, slow)
        here.sandbox.bot = silent_bot
        started(here)
        with Instrument.at(here.ports["LAB"]) as device:
            *first, last = frames_of(*RESULT)
            assert [device.ask(raw) for raw in (ENQ, *first)] == [ACK] * 5
            (port,) = free_ports(1)
            here.endpoint("LAB")["address"] = ASTM.format(port=port)
            device.write(last)
            eventually(begun.exists)
            assert here.sandbox.reload()["type"] != "agent:error"
            go.touch()
            assert device.take(1) == ACK
            assert device.ended()
        with Instrument.at(port) as device:
            device.session(*NEXT)
            came(here, "LAB", body_of(*NEXT))
        eventually(lambda: partials(here) == 0)
        assert bodies(here, "LAB") == [body_of(*RESULT), body_of(*NEXT)]


@needs_socat
def test_a_reload_of_a_serial_port_keeps_half_a_session_once(tmp_path):
    """As above before the L record: two dead letters with the same records, for the person who merges them by hand."""
    with draining(tmp_path) as (here, cable, device):
        device.session(*RESULT[:-1], eot=False)
        here.endpoint("ASTM")["address"] = cable.address(ASTM).replace("19200", "9600")
        assert here.sandbox.reload()["type"] != "agent:error"
        eventually(functools.partial(opened_since, here, "ASTM", 1), what="the port is open again")
        dead(here, "ASTM", body_of(*RESULT[:-1]))
        device.session(*NEXT)
        came(here, "ASTM", body_of(*NEXT))
        assert [row["state"] for row in rows(here, "ASTM")].count("failed") == 1


def test_kill_keeps_the_records_of_an_instrument_that_ends_them_with_the_frame(tmp_path):
    """Many an instrument sends `STX 1 H|... ETX`, one record a frame and no CR in it; the agent takes that
    (test_real_instruments_deviate, "no CR after a record").

    Every frame of a whole message, L too, is acknowledged when the process dies. After the start all records are one
    line: no L record is seen, the result is a dead letter, and `queue retry` would send `...|10*3/uLL|1|N`.
    """
    with site(tmp_path, {"LAB": ASTM}, start=False) as here:
        here.sandbox.bot = silent_bot
        started(here)
        with Instrument.at(here.ports["LAB"]) as device:
            assert device.ask(ENQ) == ACK
            for number, record in enumerate(RESULT, 1):
                assert device.ask(astm_frame(number, record.encode(), ETX[0])) == ACK
            here.agent.kill()
        started(here, 2)
        (kept,) = eventually(lambda: rows(here, "LAB"), what="the session")
        assert kept["original"].decode() == body_of(*RESULT), kept["last_error"]
        came(here, "LAB", body_of(*RESULT))


def test_a_sender_that_gives_up_for_want_of_our_ack_did_not_end_its_message() -> None:
    """LIS01-A2 6.5.2: a sender whose frame nothing answers for 15 s sends EOT, and its message again later.

    Our ACK of R|1 is lost on the cable: R|2 and L never come. EOT 15 s after our last ACK is the sender's time-out, and
    what it cuts off is no result ("never delivered as a result"): without requireTerminator the Bot gets half of the
    blood count as a whole one, and then all of it. (A core has no clock: 15 s pass at once.)
    """
    line = Astm(StreamSettings(mode="astm"))
    line.receive(ENQ, 0.0)
    for frame in frames_of("H|\\^&|||XN-1000", "P|1", "O|1|S1", "R|1|^^^WBC|5.4"):
        line.receive(frame, 0.1)
        line.committed(0.1)
    [session] = line.receive(EOT, 15.1)
    assert isinstance(session, Session) and session.reason


def test_an_instrument_without_frame_numbers_may_split_a_record_before_a_digit(tmp_path):
    """The comment above the table: "Where the first frame of a session has none, all of them are text from STX on."

    A record is cut at 240 characters (6.3.1.2) wherever that is: before a digit it is NAK for ever, six times, and
    then the instrument drops the whole message.
    """

    def bare(text: bytes, end: bytes) -> bytes:
        return STX + text + end + b"%02X\r\n" % (sum(text + end) % 256)

    with site(tmp_path, {"LAB": ASTM}, start=False) as here:
        here.sandbox.bot = silent_bot
        started(here)
        with Instrument.at(here.ports["LAB"]) as device:
            assert device.ask(ENQ) == ACK
            pieces = ((b"H|\\^&\r", ETX), (b"R|1|^^^GLU|", ETB), (b"5.4|mg/dL\r", ETX), (b"L|1|N\r", ETX))
            assert [device.ask(bare(*piece)) for piece in pieces] == [ACK] * 4
            device.write(EOT)
            came(here, "LAB", body_of("H|\\^&", "R|1|^^^GLU|5.4|mg/dL", "L|1|N"))


def test_a_dead_letter_says_that_the_checksum_was_wrong(tmp_path):
    """One frame of each message is refused six times (6.5.1.2), because the instrument sums up another way, such as
    over characters above 0x7F. "A frame that was not accepted" does not tell whom to call: no NAK for a checksum is
    in the log as long as the session has one good frame."""
    with site(tmp_path, {"LAB": ASTM}, start=False) as here:
        here.sandbox.bot = silent_bot
        started(here)
        with Instrument.at(here.ports["LAB"]) as device:
            header, patient, *_ = frames_of(*RESULT)
            assert [device.ask(raw) for raw in (ENQ, header, *[bad(patient)] * 6)] == [ACK, ACK, *[NAK] * 6]
            device.write(EOT)
            assert "checksum" in dead(here, "LAB", body_of(RESULT[0]))["last_error"]


@needs_socat
def test_noise_is_told_of_also_on_a_line_that_once_worked(tmp_path):
    """After a service visit the analyzer sends at another speed. On a serial port, or over a terminal server, the line
    is the same, and nothing is said for ever, as a message came over it last week (_tell_skipped)."""
    with Cable(tmp_path) as cable, site(tmp_path, {"LAB": cable.address(ASTM)}, start=False) as here:
        here.sandbox.bot = silent_bot
        started(here)
        eventually(lambda: opens(here, "LAB") == 1)
        with cable.open() as device:
            device.session(*RESULT)
            came(here, "LAB", body_of(*RESULT))
            device.write(bytes(range(0x80, 0xF8)) * 10)
            here.agent.logged("bytes came and no message", 5)


# --- answers down ---


@needs_socat
@pytest.mark.parametrize("name", ["plain", "pci-0000:00:14.0-usb-0:2:1.0-port0"])
def test_an_answer_waits_for_a_serial_port_whose_name_has_colons(tmp_path, name):
    """`/dev/serial/by-path/pci-0000:00:14.0-usb-0:2:1.0-port0` is the name to use for adapters without a serial number.

    Pulled out while the order is offered, and plugged in again: the answer is never offered, and dropped after
    answerWaitMins, because the host of a remote is taken to end before its last colon.
    """
    (folder := tmp_path / name).mkdir()
    with Cable(folder) as cable, site(tmp_path, {"LAB": cable.address(ASTM)}, start=False) as here:
        here.sandbox.bot = lambda transmit: (200, ORDER)
        started(here)
        eventually(lambda: opens(here, "LAB") == 1)
        with cable.open() as device:
            device.session(*QUERY)
            assert device.take(1) == ENQ
            cable.unplug()
        here.agent.logged("its answer waits 10 minutes")
        cable.plug()
        with cable.open() as device:
            eventually(lambda: opens(here, "LAB") == 2)
            assert device.accept(5) == ORDER_RECORDS


def test_an_answer_that_waits_for_its_instrument_outlives_a_restart(tmp_path):
    """The log says that it waits 10 minutes, and an upgrade or a reload passes it on (Upgrades.leave_lines). A restart
    drops it without a word; `queue retry` takes no message that is processed."""
    with site(tmp_path, {"LAB": ASTM}, start=False) as here:
        here.sandbox.bot = lambda transmit: (200, ORDER)
        here.sandbox.faults.delay = lambda: 0.3
        started(here)
        with Instrument.at(here.ports["LAB"]) as device:  # it closes after each session, as many do
            device.session(*QUERY)
        here.agent.logged("its answer waits 10 minutes")
        here.agent.terminate()
        started(here, 2)
        with Instrument.at(here.ports["LAB"]) as device:
            assert device.accept(5) == ORDER_RECORDS


def test_an_answer_that_a_half_open_connection_does_not_take_goes_to_the_new_one(tmp_path):
    """The analyzer was switched off and on (or its switch port was): the old connection is dead without FIN, the new
    one is open and idle. Six ENQs into the void (150 s), then the order is given up, not offered where it could be."""
    quick = f"{ASTM}&replyTimeoutSecs=0.2&nakDelaySecs=0.1"
    with site(tmp_path, {"LAB": quick}, start=False) as here:
        here.sandbox.faults.silent = True  # the Bot is slow
        here.sandbox.bot = lambda transmit: (200, ORDER)
        started(here)
        with Instrument.at(here.ports["LAB"]) as gone:
            gone.session(*QUERY)
            here.sandbox.wait_for(lambda: bodies(here, "LAB"))
            with Instrument.at(here.ports["LAB"]) as device:
                here.sandbox.faults.silent = False
                here.sandbox.cut()  # and asked again
                assert device.accept(10) == ORDER_RECORDS


def test_a_raw_device_waits_longer_for_its_answer_than_idleTimeoutSecs(tmp_path):
    """It owes nothing: the answer does."""
    with site(tmp_path, {"RAW": f"{FRAMED}&bodyEncoding=utf-8&idleTimeoutSecs=0.5"}, start=False) as here:
        here.sandbox.bot = lambda transmit: (200, "ORDER")
        here.sandbox.faults.delay = lambda: 2.5  # the agent looks once a second
        started(here)
        with Instrument.at(here.ports["RAW"]) as device:
            device.write(b"\x02QUERY\x03")
            assert device.take(5) == b"ORDER"


def test_an_order_in_the_instrument_s_character_set_keeps_its_escape_sequences(tmp_path):
    """E1381 6.6 restricts SOH STX ETX EOT ENQ ACK DLE NAK SYN ETB LF DC1-DC4, not ESC, and ISO-2022-JP
    is made of ESC: the patient's name reaches the label as `$B;3ED(B`, and nothing says so. Up it works."""
    order = ["H|\\^&", "P|1|||\u5c71\u7530^\u592a\u90ce", "L|1|N"]
    records = [f"{record}\r".encode("iso2022_jp") for record in order]
    with site(tmp_path, {"LAB": f"{ASTM}&encoding=iso-2022-jp"}, start=False) as here:
        here.sandbox.bot = lambda transmit: (200, body_of(*order))
        started(here)
        with Instrument.at(here.ports["LAB"]) as device:
            assert device.ask(ENQ) == ACK
            for number, record in enumerate(records, 1):
                assert device.ask(astm_frame(number, record, ETX[0])) == ACK
            device.write(EOT)
            came(here, "LAB", body_of(*order))
            assert device.accept() == records


# --- pushes ---


def test_a_stored_order_for_a_slow_instrument_arrives(tmp_path):
    """LIS01-A2 6.5.2: a receiver has 15 s for each frame. A try of a stored push has 30 s for the whole session: three
    slow frames, or 28 kB at 9600 baud (3 kB at 1200), and it is cut off by EOT though every frame was accepted, begun
    anew, cut off again, 20 times: the instrument has parts of it 20 times, and the order is a dead letter."""
    with site(tmp_path, {"LAB": ASTM}, start=False) as here:
        changed(here.agent, "m.PUSH_STORED_SECS = 1.0")  # instead of 30
        here.sandbox.bot = silent_bot
        started(here)
        with Instrument.at(here.ports["LAB"]) as device, here.caller() as caller:
            device.session(*RESULT)
            came(here, "LAB", body_of(*RESULT))
            caller.store("channel://LAB", ORDER, contentType=ASTM_TYPE)
            assert device.take(1) == ENQ
            device.write(ACK)
            for record in ORDER_RECORDS:
                assert device.frame()[2:-5] == record
                assert device.quiet(0.4) == b""  # instead of 11: it writes to its own disk
                device.write(ACK)
            assert device.take(1) == EOT


@needs_socat
def test_a_stored_order_waits_for_an_instrument_that_is_switched_off(tmp_path):
    """README: "Time in which the device cannot be reached does not count as a try." An analyzer that is off behind a
    serial line (or a terminal server, which keeps its TCP connection) answers no ENQ: nothing was sent. With the
    defaults 20 such tries take about 20 minutes: all orders of the night are dead letters in the morning."""
    quick = "&replyTimeoutSecs=0.1&nakDelaySecs=0.1"
    tries = [setting("channelAutoRetryMaxAttempts", 2), setting("channelAutoRetryBaseDelayMs", 10)]
    with Cable(tmp_path) as cable, site(tmp_path, {"LAB": cable.address(ASTM) + quick}, tries, start=False) as here:
        here.sandbox.bot = silent_bot
        started(here)
        eventually(lambda: opens(here, "LAB") == 1)
        with cable.open() as device, here.caller() as caller:
            caller.store("channel://LAB", ORDER, contentType=ASTM_TYPE)
            for _ in range(12):  # two tries with six ENQs
                assert device.take(2) == ENQ + EOT
            assert device.accept(5) == ORDER_RECORDS  # switched on


def test_a_stored_order_goes_when_its_instrument_connects(tmp_path):
    """Radiometer, GeneXpert and others connect for each transmission and close after it. The order is tried when its
    back-off is over (up to 60 s), whether the instrument is there or not, and not when it is: it may never meet."""
    with site(tmp_path, {"LAB": ASTM}, [setting("channelAutoRetryBaseDelayMs", 60_000)], start=False) as here:
        here.sandbox.bot = silent_bot
        started(here)
        with here.caller() as caller:
            caller.store("channel://LAB", ORDER, contentType=ASTM_TYPE)
        eventually(lambda: any(row["error_code"] for row in rows(here, "push channel://LAB")), what="a try")
        with Instrument.at(here.ports["LAB"]) as device:
            device.session(*RESULT)
            assert device.accept(5) == ORDER_RECORDS


def refuse_frames(device: Instrument) -> None:
    assert device.take(1) == ENQ
    device.write(ACK)
    for _ in range(6):
        device.frame()
        device.write(NAK)


def be_busy(device: Instrument) -> None:
    for _ in range(6):
        assert device.take(1) == ENQ
        device.write(NAK)


@pytest.mark.parametrize(
    ("sample", "behave", "reason"),
    [
        ("S1", be_busy, "busy"),
        ("S1", refuse_frames, "frame 1 was not accepted"),
        ("5 \u20ac", lambda device: None, "lacks the character"),
    ],
    ids=["busy", "refuses a frame", "a character that its encoding lacks"],
)
def test_the_log_says_why_an_instrument_did_not_take_a_stored_order(
    tmp_path: Path, sample: str, behave: Callable[[Instrument], None], reason: str
) -> None:
    """A caller that waits is told; of a stored push the log and the queue keep "the device did not acknowledge it" for
    all of that, and for a character that was never sent "the device rejected it; its answer is in the queue"."""
    quick = f"{ASTM}&replyTimeoutSecs=5&nakDelaySecs=0.1"
    with site(tmp_path, {"LAB": quick}, [setting("channelAutoRetryMaxAttempts", 1)], start=False) as here:
        here.sandbox.bot = silent_bot
        started(here)
        with Instrument.at(here.ports["LAB"]) as device, here.caller() as caller:
            device.session(*RESULT)
            came(here, "LAB", body_of(*RESULT))
            caller.store("channel://LAB", ORDER.replace("E1", sample), contentType=ASTM_TYPE)
            behave(device)
            word = "is a dead letter" if behave is not be_busy else "try 1 failed"  # it counts not
            assert reason in json.loads(here.agent.logged(word))["msg"]


# --- lines that we open ---


def test_a_terminal_server_that_hangs_up_at_once_does_not_fill_the_log(tmp_path):
    """A serial-to-Ethernet converter whose port another host has (Moxa: max connection 1) accepts and closes. That is
    a failure: without back-off it is dialled twice a second, with two lines in the log each time, 25 MB a day: the log
    (10 files of 10 MB) then holds nothing else."""
    with site(tmp_path, {"LAB": f"{ASTM}&role=client"}, start=False) as here:
        changed(here.agent, "m.RECONNECT_BASE_SECS = m.RECONNECT_MAX_SECS = 0.01")
        with listening(here.ports["LAB"]) as server:
            started(here)
            for _ in range(100):
                server.accept()[0].close()
            assert here.agent.main_log().count(b"tcp://127.0.0.1") < 50


@needs_socat
def test_stop_bits_that_the_system_lacks_are_named(tmp_path):
    """README: `stopBits`: "1, 1.5 or 2". Linux has no 1.5: the dialler dies with "Internal error: UnsupportedSetting in
    Channel._dial", validation and doctor say nothing, and the port is never tried again."""
    with Cable(tmp_path) as cable:
        address = cable.address(ASTM).replace("stopBits=1&", "stopBits=1.5&")
        with site(tmp_path, {"LAB": address}, start=False) as here:
            started(here)
            eventually(lambda: re.search(rb"1\.5 stop|stopBits", here.agent.main_log()), 5, "a word about them")


@needs_socat
def test_two_channels_on_one_serial_port_are_refused(tmp_path):
    """As two channels on one TCP port are (contract 11, duplicate-port). The first to open it wins, at each start
    another; the other says once that the port is "locked by another process", which it is not."""
    with Cable(tmp_path) as cable, site(tmp_path, {"LAB": cable.address(ASTM)}, start=False) as here:
        started(here)
        eventually(lambda: opens(here, "LAB") == 1)
        here.sandbox.sandbox.resources["Endpoint/9"] = here.endpoint("LAB") | {"id": "9"}
        (first,) = here.sandbox.resource("Agent/agent-1")["channel"]
        second = first | {"name": "TWIN", "endpoint": {"reference": "Endpoint/9"}}
        here.sandbox.resource("Agent/agent-1")["channel"].append(second)
        assert here.sandbox.reload()["type"] == "agent:error"


@needs_socat
def test_a_serial_port_that_is_gone_is_an_alarm(tmp_path):
    """README, alarms: "a port that is not open, a device that cannot be reached". An adapter that is pulled out, or
    whose rights a udev rule changed, is one WARN when it happens; `status` says OK and `health` "it is alive", both
    with code 0, and no alarm is ever raised. A TCP port that cannot be opened is critical."""
    with Cable(tmp_path) as cable, site(tmp_path, {"LAB": cable.address(ASTM)}, start=False) as here:
        changed(here.agent, "m.LOOK_SECS = m.LINE_AWAY_SECS = 0.2")
        started(here)
        eventually(lambda: opens(here, "LAB") == 1)
        cable.unplug()
        here.agent.logged("the line was closed")
        assert str(cable.agent) in here.agent.logged("Alarm: ", 5)


def test_status_shows_that_a_serial_port_with_a_long_name_is_closed(tmp_path):
    """`/dev/serial/by-id` and `by-path` are the names that stay; the column is cut at 48 characters, `CLOSED` with it,
    and it is the only thing on the screen that says so."""
    name = "serial:///dev/serial/by-id/usb-FTDI_FT232R_USB_UART_A10K3XYZ-if00-port0?mode=astm"
    with site(tmp_path, {"LAB": name}, start=False) as here:
        started(here)
        here.agent.logged("No such file or directory")
        command = [*here.agent.COMMAND, "status", "--state-dir", str(here.agent.state_dir)]
        shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert "CLOSED" in next(line for line in shown.stdout.splitlines() if line.startswith("LAB"))


# --- what must not come of it ---


def test_an_instrument_that_was_heard_since_is_not_half_open(tmp_path):
    """Two analyzers behind one terminal server: the second connects, the first still sends results and then answers no
    ENQ. Its order is for nobody else, and its connection stays."""
    quick = f"{ASTM}&replyTimeoutSecs=0.1&nakDelaySecs=0.1"
    with site(tmp_path, {"LAB": quick}, start=False) as here:
        here.sandbox.faults.silent = True
        here.sandbox.bot = lambda transmit: (200, ORDER if "Q|1" in transmit.body else "")
        started(here)
        with Instrument.at(here.ports["LAB"]) as first:
            first.session(*QUERY)
            here.sandbox.wait_for(lambda: bodies(here, "LAB"))
            with Instrument.at(here.ports["LAB"]) as second:
                assert second.quiet(0.3) == b""  # it was accepted meanwhile
                first.session(*RESULT)
                here.sandbox.faults.silent = False
                here.sandbox.cut()
                for _ in range(12):  # two tries with six ENQs
                    assert first.take(2) == ENQ + EOT
                assert second.quiet(0.1) == b""
                assert first.accept(5) == ORDER_RECORDS


def test_a_connection_does_not_use_up_the_tries_of_what_a_device_refused(tmp_path):
    """A device that connects for each message, and is busy (AE): the back-off is for that."""
    delays = [setting("channelAutoRetryBaseDelayMs", 60_000)]
    with site(tmp_path, {"ADT": "?enhanced=aa"}, delays) as here, here.caller() as caller:
        with here.device("ADT") as device:
            assert device.ask(message("M0")) == ("AA", "M0")
            caller.store("channel://ADT", message("ORDER"))
            assert "ORDER" in device.receive()
            device.send(ack_text("AE", "ORDER"))
            eventually(lambda: any(row["error_code"] for row in here.agent.rows("ORDER")))
        for number in range(1, 4):
            with here.device("ADT") as device:
                assert device.ask(message(f"M{number}")) == ("AA", f"M{number}")
                assert device.drain(0.7) == []
        assert here.agent.rows("ORDER")[0]["attempts"] == 1
