"""Sentences of the contract that the agent once did not keep, one test each."""

import contextlib
import socket
import threading
import time

import pytest

from medplum_agent import HL7_TYPE, astm_frame
from tests.instruments import ACK, ENQ, EOT, ETX, Instrument
from tests.support import Device, Receiver, ack_text, changed, control_id, message, setting, site

RAW = "tcp://0.0.0.0:{port}?startChar=%02&endChar=%03"
ASTM = "tcp://0.0.0.0:{port}?mode=astm"


def instrument(here, channel: str) -> Instrument:
    here.agent.logged("Medplum service started successfully.")
    here.agent.wait_connected()
    return Instrument.at(here.ports[channel])


def bytes_within(line: Instrument, seconds: float) -> bytes:
    """What comes in this time; an end of the connection is `<EOF>`."""
    assert isinstance(line.line, socket.socket)
    line.line.settimeout(seconds)
    try:
        return line.line.recv(1000) or b"<EOF>"
    except TimeoutError:
        return b""
    except ConnectionError:
        return b"<EOF>"


def test_the_answer_to_a_push_survives_a_reconnect(tmp_path):
    """uplink 3.5: transmit responses of pushes go through the outgoing FIFO, which drains when live again."""

    cut, acknowledged = threading.Event(), threading.Event()

    def slow(link, text):
        cut.wait(10)
        link.ack("AA", control_id(text))
        acknowledged.set()

    config = "heartbeatSecs = 0.2\n"
    with site(tmp_path, {"A": ""}, config=config, start=False) as here, Receiver(slow) as device:
        changed(here.agent, "m.RECONNECT_BASE_SECS, m.RECONNECT_MAX_SECS = 0.01, 0.05")
        here.agent.start()
        here.agent.wait_connected()
        answer = []
        push = {"remote": device.url(), "contentType": HL7_TYPE, "body": message("P1")}

        def ask():
            with contextlib.suppress(TimeoutError):
                answer.append(here.sandbox.ask("agent:transmit:request", **push))

        caller = threading.Thread(target=ask, daemon=True)
        caller.start()
        device.wait_ids("P1")
        here.sandbox.faults.never_connect = True
        here.sandbox.cut()
        here.agent.logged("Reconnecting")
        cut.set()
        acknowledged.wait(10)
        here.sandbox.faults.never_connect = False
        caller.join(8)
        assert answer and answer[0]["statusCode"] == 200


@pytest.mark.parametrize("kind", ["raw", "astm"])
def test_a_setting_of_delivery_leaves_connections_of_instruments_open(tmp_path, kind):
    """channels 11: parameters are re-applied to open connections without dropping them; 10: only a mode change aborts
    the session."""
    with site(tmp_path, {"B": RAW if kind == "raw" else ASTM}) as here, instrument(here, "B") as line:
        if kind == "astm":
            line.write(ENQ)
            assert bytes_within(line, 2) == ACK
            line.write(astm_frame(1, b"H|\\^&\r", ETX[0]))
            assert bytes_within(line, 2) == ACK
        else:
            line.write(b"\x02x\x03")
            here.sandbox.wait_for(lambda: here.sandbox.seen, 3)
        seen = len(here.sandbox.seen)
        here.sandbox.resource("Agent/agent-1")["setting"] = [setting("alarmAgeSecs", 800)]
        assert here.sandbox.reload()["type"] == "agent:reloadconfig:response"
        assert bytes_within(line, 1) == b""
        if kind == "astm":
            line.write(astm_frame(2, b"L|1\r", ETX[0]))
            assert bytes_within(line, 2) == ACK
            line.write(EOT)
        else:
            line.write(b"\x02a\x03")
        here.sandbox.wait_for(lambda: len(here.sandbox.seen) > seen, 3)


def test_a_space_in_a_pattern(tmp_path):
    """channels 1 and 9: `+` and %20 are a space; patterns are any bytes up to 0xFF."""
    with site(tmp_path, {"B": RAW + "&autoRespond=%20:%06"}) as here, instrument(here, "B") as line:
        line.write(b" ")
        assert bytes_within(line, 1) == ACK


def test_a_space_as_start(tmp_path):
    with site(tmp_path, {"B": "tcp://0.0.0.0:{port}?startChar=%20&endChar=%03"}, start=False) as here:
        here.agent.start(ready=False)
        with instrument(here, "B") as line:
            line.write(b" a\x03")
            here.sandbox.wait_for(lambda: here.sandbox.seen, 3)


MIXED = "MSH|^~\\&|S|F|R|RF|2026||ADT^A01|{}|P|2.5\rPID|||1\nPV1|1\n\nNK1|1\r"


def test_line_feeds_become_carriage_returns(tmp_path):
    """channels 4.2: segments are split on one or more CR/LF characters and re-joined with a single CR."""
    with site(tmp_path, {"A": ""}) as here, Device(here.ports["A"]) as device:
        device.ask(MIXED.format("U1"))
        assert here.sandbox.of("U1")[0].body == "MSH|^~\\&|S|F|R|RF|2026||ADT^A01|U1|P|2.5\rPID|||1\rPV1|1\rNK1|1\r"


def test_line_feeds_in_a_push_become_carriage_returns(tmp_path):
    heard = []

    def device(link, text):
        heard.append(text)
        link.ack("AA", "D1")

    with site(tmp_path, {"A": ""}) as here, Receiver(device) as receiver, here.caller() as caller:
        here.agent.wait_connected()
        assert caller.push(receiver.url(), MIXED.format("D1")).status == 200
        assert "\n" not in heard[0]


def test_pushes_to_a_device_that_never_closes_its_side(tmp_path):
    """channels 7: while fewer than the limit exist a new connection is made; unused ones are closed after 10 s."""

    with site(tmp_path, {"A": ""}) as here, socket.create_server(("127.0.0.1", 0)) as server, here.caller() as caller:
        kept = []

        def serve(sock):
            kept.append(sock)
            while data := sock.recv(65536):
                text = data[1:-2].decode()
                sock.sendall(b"\x0b" + ack_text("AA", control_id(text)).encode() + b"\x1c\r")

        def listen():
            while True:
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=listen, daemon=True).start()
        here.agent.wait_connected()
        url = f"mllp://127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        assert [caller.push(url, message(f"P{n}")).status for n in range(7)] == [200] * 7
        assert time.monotonic() - began < 4  # a second once, not each time


def test_hl7_for_a_tcp_address_is_framed(tmp_path):
    """channels 7: the scheme is not checked: a tcp:// remote is dialled as MLLP, too."""
    with site(tmp_path, {"A": ""}) as here, Receiver() as receiver, here.caller() as caller:
        here.agent.wait_connected()
        answer = caller.push(receiver.url().replace("mllp:", "tcp:"), message("T1"))
        assert "MSA|AA|T1" in answer.text


def test_a_raw_push_is_no_internal_error(tmp_path):
    with site(tmp_path, {"A": ""}) as here, Receiver() as receiver, here.caller() as caller:
        here.agent.wait_connected()
        caller.push(receiver.url().replace("mllp:", "tcp:"), "0241", contentType="application/octet-stream")
        here.sandbox.stats()
        assert b"Exception in callback" not in here.agent.main_log()


def test_workers_are_clamped(tmp_path):
    """channels 3: channelMaxWorkers is clamped to 1..500."""
    with site(tmp_path, {"A": "?enhanced=true"}, [setting("channelMaxWorkers", 0)]) as here:
        here.sandbox.faults.silent = True
        with Device(here.ports["A"]) as device:
            device.send(*(message(f"W{n}", f"PAT-{n}") for n in range(4)))
            here.agent.wait_state("W3", "queued")
            here.sandbox.wait_ids("W0")
            here.sandbox.stats()
            assert here.sandbox.ids() == ["W0"]


def test_only_mllp_counts_as_hl7_connection(tmp_path):
    """operations 8: hl7ConnectionsOpen: inbound MLLP connections; channelStats: HL7 only."""
    with site(tmp_path, {"B": RAW}) as here, instrument(here, "B") as line:
        line.write(b"\x02x\x03")
        here.sandbox.wait_for(lambda: here.sandbox.seen, 3)
        assert here.sandbox.stats()["hl7ConnectionsOpen"] == 0
