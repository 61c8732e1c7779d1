"""HL7 in the field: what senders and receivers of others do, each one a message that was lost, cut off or misread."""

import base64
import os
import random
import socket
import time
import timeit

import pytest

import medplum_agent as ma
from tests.support import Receiver, acknowledgment, control_id, message, setting, site
from tests.test_tls import Identities, dial

RAW = "tcp://127.0.0.1:{port}?startChar=%02&endChar=%03&bodyEncoding=utf-8"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    slow = "frameTimeoutSecs=0.5"
    channels = {"ENHANCED": "?enhanced=true", "SLOW": f"?enhanced=aa&{slow}", "RAW": f"{RAW}&{slow}"}
    with site(tmp_path_factory.mktemp("peers"), channels) as running:
        yield running


# --- a document is a document ---


def document(*lines: str) -> str:
    """Base64 as many a system breaks it into lines (RFC 2045 6.8), against HL7 v2.5.1 2.7, which has no line ends."""
    others = base64.encodebytes(random.Random(1).randbytes(300)).decode().splitlines()
    return "\r\n".join([*others, *lines, *others])


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
@pytest.mark.parametrize("line", ["MSHkTmVx8", "MSH+x/AA", "FHSkTmVxMSH8"])
def test_a_line_of_a_document_begins_no_message(here, line, end):
    """The message ended where a line of its PDF began with these letters, and was acknowledged: of those with 5 MB
    every third. Behind FHS or BTS the line was left out."""
    control = f"PDF-{line}-{len(end)}{ord(end[-1])}"
    text = f"{message(control)}OBX|1|ED|PDF||^application^pdf^Base64^{document(line)}||||||F\r".replace("\r\n", "\r")
    with here.device("ENHANCED") as device:
        device.send(text.replace("\r", end))
        assert device.heard(2) == [("CA", control), ("AA", control)]
    assert [transmit.body for transmit in here.sandbox.of(control)] == [text]


def seconds(work) -> float:
    """The least of several runs: what the machine does besides does not count."""
    return min(timeit.repeat(work, number=1, repeat=5))


def report(pdf: bytes) -> bytes:
    return b"%bOBX|1|ED|PDF||^application^pdf^Base64^%b||||||F\r" % (message("PDF").encode(), pdf)


def test_a_document_holds_up_no_other_device():
    """Each megabyte of base64 holds MSH somewhere: looking whether a message begins there took 230 ms of 7 MB, while
    nobody was served, and reading the message 24."""
    content = report(base64.b64encode(random.Random(1).randbytes(3_000_000)))
    assert content.rfind(b"MSH") > 0
    assert seconds(lambda: ma.split_batch(content)) < 2 * seconds(lambda: ma.read_hl7(content, "utf-8", False))


def test_a_document_in_lines_holds_up_no_other_device():
    """Each line end was looked at by itself: of 5 MB for 100 ms, twice."""
    content = report(base64.encodebytes(random.Random(1).randbytes(3_000_000)).replace(b"\n", b"\r\n"))
    read = ma.decode_hl7(content, "utf-8").encode()
    assert read == content.replace(b"\r\n", b"\r")
    at_once = seconds(lambda: content.replace(b"\r\n", b"\r").decode())  # memory is asked for as often
    assert seconds(lambda: ma.decode_hl7(content, "utf-8")) < 8 * at_once


# --- slow lines ---


def test_a_large_message_over_a_slow_line_is_no_device_that_stopped(here):
    """frameTimeoutSecs is about a connection that stops: a report of 5 MB over half a Mbit/s takes 80 s."""
    text = message("SLOW", size=30_000)
    with here.device("SLOW") as device, here.device("RAW") as instrument:
        raw, framed = b"\x02" + text.encode() + b"\x03", b"\x0b" + text.encode() + b"\x1c\r"
        for at in range(0, len(framed), 600):
            device.send_raw(framed[at : at + 600])
            instrument.send_raw(raw[at : at + 600])
            time.sleep(0.05)  # the line
        assert acknowledgment(device.receive()) == ("AA", "SLOW")
    here.sandbox.wait_for(lambda: len(here.sandbox.of("SLOW")) == 2)


@pytest.mark.parametrize("channel", ["SLOW", "RAW"])
def test_a_large_message_that_stops_is_given_up(here, channel):
    with here.device(channel) as device:
        device.send_raw(b"\x02" * (channel == "RAW") + b"\x0bMSH|" + b"x" * 30_000)
        assert device.closed_by_peer(4)


# --- senders that close their side ---


def test_a_sender_that_closes_its_side_of_tcp_below_tls_is_let_go(tmp_path):
    """ncat --ssl and .NET's Shutdown(Send) say no close_notify, and waited 30 s for the end behind their answer."""
    identities = Identities(tmp_path)
    address = f"mllps://127.0.0.1:{{port}}?certFile={identities.server}"
    with (
        site(tmp_path, {"TLS": address}) as here,
        dial(here, "TLS", identities.client()) as device,
        socket.socket(fileno=os.dup(device.fileno())) as below,
    ):
        device.sendall(b"\x0b" + message("CLOSES").encode() + b"\x1c\r")
        below.shutdown(socket.SHUT_WR)
        assert b"MSA|AA|CLOSES" in device.recv(4096)
        assert device.recv(1) == b""  # close_notify
        below.settimeout(5)
        assert below.recv(1) == b""


# --- what the main log says ---


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"PID|1||P1^^^H||M\xfcller\r", "PID-5"),
        (b"NTE|1||Herr\nMei er: M\xfcller\r", ""),  # a line feed in a field
        (b"NTE|1||Herr\nMEIER\xfc\r", ""),
    ],
)
def test_no_text_of_a_message_is_in_the_main_log(here, content, place):
    """The line of text before the byte was taken for a segment, and its first letters for the name of that."""
    before = len(here.agent.main_log())
    control = f"BYTES-{content[:11].hex()}{len(content)}"
    with here.device("ENHANCED") as device:
        device.send(message(control, "").encode() + content)
        assert device.ack() == ("CA", control)
        here.agent.wait_state(control, "processed")
    said = here.agent.main_log()[before:].decode()
    assert f"byte 0xFC{f' in {place}' if place else ''} is not utf-8" in said
    assert "mei" not in said.lower()


def test_a_later_message_without_its_start_is_said(here):
    """It cannot be told from noise between frames, and its sender waits: not only when it disconnects."""
    with here.device("ENHANCED") as device:
        device.ask(message("START-1"))
        device.send_raw(message("START-2").encode() + b"\x1c\r")
        here.agent.logged("without 0x0B before it")


# --- devices that we push to ---


@pytest.mark.parametrize("keep", [False, True])
def test_the_aa_behind_a_ca_is_no_warning(tmp_path, keep):
    """A device in enhanced mode answers twice; with the usual returnAck=first each push was one WARN."""

    def behave(link, text):
        link.ack("CA", control_id(text))
        link.ack("AA", control_id(text))

    with site(tmp_path, {"A": ""}, [setting("keepAlive", keep)]) as here, Receiver(behave) as device:
        with here.caller() as caller:
            for number in range(5):
                assert acknowledgment(caller.push(device.url(), message(f"TWICE-{number}")).text)[0] == "CA"
            device.behaviour = lambda link, text: link.ack("AE", "TWICE-4")  # what failed after all is said
            assert caller.push(device.url("?ackTimeoutSecs=0.3"), message("LAST")).status == 400
        here.agent.logged("no push waits for")
        assert here.agent.main_log().count(b'"WARN"') == 1
