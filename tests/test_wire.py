"""Faults on the wire that only two states together brought to light, one test each: none may come back."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.instruments import ACK, ENQ, EOT, Instrument, body_of, frames_of, of
from tests.support import (
    Receiver,
    accepts,
    ack_text,
    bot,
    changed,
    control_id,
    eventually,
    free_ports,
    message,
    setting,
    site,
)
from tests.test_upgrade import Installed

ANALYZER = "tcp://127.0.0.1:{port}?mode=astm"
RAW = "tcp://127.0.0.1:{port}?startChar=%02&endChar=%03&bodyEncoding=utf-8"
ORDER = "H|\\^&\nO|1|X\nL|1|N\n"
QUERY = ("H|\\^&|||ABC", "Q|1|^1", "L|1|N")


@contextlib.contextmanager
def laboratory(folder, channels):
    with site(folder, channels, start=False) as here:
        here.agent.start(ready=False)
        eventually(lambda: all(accepts(("127.0.0.1", port)) for port in here.ports.values()), 20)
        here.agent.wait_connected()
        here.agent.logged("started successfully")
        yield here


# --- 1: an answer goes to another device behind the same address ---


def test_the_answer_of_an_instrument_that_left_is_not_given_to_another_behind_its_address(tmp_path):
    """Two analyzers behind one terminal server: B was connected all the time; A closes after its query."""
    with laboratory(tmp_path, {"LAB": ANALYZER}) as here:
        here.sandbox.bot = lambda transmit: (200, ORDER if "Q|" in transmit.body else "")
        here.sandbox.faults.delay = lambda: 0.7
        with Instrument.at(here.ports["LAB"]) as other:
            other.session("H|\\^&|||OTHER", "R|1|^^^GLU|5.1", "L|1|N")
            here.sandbox.wait_for(lambda: len(of(here, "LAB")) == 1)
            with Instrument.at(here.ports["LAB"]) as device:
                device.session(*QUERY)
            assert other.quiet(2.5) == b""


@pytest.mark.parametrize("mode", ["", "?enhanced=true"])
def test_the_answer_of_a_device_that_left_is_not_given_to_another_behind_its_address(tmp_path, mode):
    with site(tmp_path, {"A": mode}) as here, here.device("A") as other:
        here.sandbox.faults.delay = lambda: 0.7
        device = here.device("A")
        device.send(message("1"))
        if mode:
            assert device.ack() == ("CA", "1")
        here.sandbox.wait_ids("1")
        device.reset()
        assert other.drain(1.5) == []


# --- 3: 0x1C alone, and the end of the stream ---


def test_a_lone_0x1c_and_the_end_of_the_stream_end_a_frame(tmp_path):
    with site(tmp_path, {"A": ""}) as here, here.device("A") as device:
        device.send_raw(b"\x0b" + message("LONE").encode() + b"\x1c")
        device.half_close()
        assert device.ack() == ("AA", "LONE")


# --- 4: messagesPerMin holds back the acknowledgment of a push ---


def test_messages_that_are_held_back_do_not_hold_back_the_ack_of_a_push(tmp_path):
    with site(tmp_path, {"A": "?enhanced=aa&messagesPerMin=5"}) as here, here.device("A") as device:
        device.send(message("M1"), message("M2"))
        assert device.ack() == ("AA", "M1")
        with here.caller() as caller, ThreadPoolExecutor(1) as pool:
            push = pool.submit(caller.push, "channel://A", message("PUSHED"))
            assert control_id(device.receive()) == "PUSHED"
            device.send(ack_text("AA", "PUSHED"))
            assert push.result().status == 200, push.result()


# --- 5: a push while an older connection is half-closed ---


def test_a_push_goes_to_the_connection_that_can_answer(tmp_path):
    """The device ended one connection behind its message, waits there for the ACK, and has opened the next."""
    with site(tmp_path, {"A": ""}) as here, here.device("A") as first:
        here.sandbox.faults.delay = lambda: 3.0
        first.send(message("FIRST"))
        first.half_close()
        here.sandbox.wait_ids("FIRST")
        with here.device("A") as second, here.caller() as caller, ThreadPoolExecutor(1) as pool:
            eventually(lambda: here.sandbox.stats()["hl7ConnectionsOpen"] == 2)
            push = pool.submit(caller.push, "channel://A", message("PUSHED"))
            second.socket.settimeout(2)
            with contextlib.suppress(TimeoutError):
                assert control_id(second.receive()) == "PUSHED"
                second.send(ack_text("AA", "PUSHED"))
            assert push.result().status == 200, push.result()


# --- 6: an answer that begins to wait when its instrument is back already ---


def test_an_answer_is_offered_to_an_instrument_that_is_back_already(tmp_path):
    """It was switched off and on: the old line is found to be dead only when the answer is sent."""
    with laboratory(tmp_path, {"LAB": ANALYZER}) as here:
        here.sandbox.bot = lambda transmit: (200, ORDER)
        before = Instrument.at(here.ports["LAB"])
        before.session(*QUERY)
        assert before.take(1) == ENQ
        with Instrument.at(here.ports["LAB"]) as device:
            assert device.ask(ENQ) == ACK  # so that it is connected
            device.write(EOT)
            before.reset()
            here.agent.logged("its answer waits 10 minutes")
            assert device.accept(5)


# --- 7: an answer that is being sent while a reload moves the channel ---


def test_an_answer_that_is_being_sent_outlives_a_reload_that_moves_the_port(tmp_path):
    with laboratory(tmp_path, {"LAB": ANALYZER}) as here:
        here.sandbox.bot = lambda transmit: (200, ORDER)
        with Instrument.at(here.ports["LAB"]) as device:
            device.session(*QUERY)
            assert device.take(1) == ENQ
            (port,) = free_ports(1)
            here.endpoint("LAB")["address"] = ANALYZER.format(port=port)
            assert here.sandbox.reload()["type"].endswith("response")
            assert device.ended()
        here.agent.logged("its answer waits 10 minutes")
        with Instrument.at(port) as device:
            assert device.accept(5)


# --- 8: what is owed is miscounted ---


def test_a_repetition_of_a_dead_letter_and_the_end_of_the_stream(tmp_path):
    """The Bot failed, the device was told AE, repeats on the same connection and ends the stream."""
    with site(tmp_path, {"A": ""}) as here, here.device("A") as device:
        here.sandbox.bot = lambda transmit: (400, "")
        assert device.ask(message("AGAIN")) == ("AE", "AGAIN")
        here.sandbox.bot, here.sandbox.faults.delay = bot("AA"), lambda: 0.7
        device.send(message("AGAIN"))
        device.half_close()
        assert device.ack() == ("AA", "AGAIN")


def test_a_repetition_elsewhere_takes_nothing_from_what_is_owed(tmp_path):
    """A failed and was told; B is owed on a half-closed connection; then A is repeated on another."""
    with site(tmp_path, {"A": ""}) as here, here.device("A") as first:
        here.sandbox.bot = lambda transmit: (400, "") if control_id(transmit.body) == "FAILS" else bot("AA")(transmit)
        assert first.ask(message("FAILS", "P1")) == ("AE", "FAILS")
        here.sandbox.faults.delay = lambda: 1.5
        first.send(message("OWED", "P2"))
        first.half_close()
        here.sandbox.wait_ids("OWED")
        with here.device("A") as second:
            second.send(message("FAILS", "P1"))
            assert first.ack() == ("AA", "OWED")


def test_the_answer_of_an_earlier_connection_takes_nothing_from_what_is_owed(tmp_path):
    with site(tmp_path, {"A": "?enhanced=true"}) as here:
        delays = iter([1.0, 2.5])
        here.sandbox.faults.delay = lambda: next(delays, 0.0)
        first = here.device("A")
        assert first.ask(message("FIRST", "P1")) == ("CA", "FIRST")
        here.sandbox.wait_ids("FIRST")
        first.reset()
        with here.device("A") as second:
            assert second.ask(message("SECOND", "P2")) == ("CA", "SECOND")
            assert second.ack() == ("AA", "FIRST")
            second.half_close()
            assert second.ack() == ("AA", "SECOND")


# --- 9: a reload changes the mode while an answer is owed ---


def test_who_sent_in_original_mode_hears_the_bot_s_answer_after_a_reload_to_aa(tmp_path):
    with site(tmp_path, {"A": ""}) as here, here.device("A") as device:
        here.sandbox.faults.delay = lambda: 1.5
        device.send(message("OWED"))
        here.sandbox.wait_ids("OWED")
        here.endpoint("A")["address"] += "?enhanced=aa"
        assert here.sandbox.reload()["type"].endswith("response")
        assert device.ack() == ("AA", "OWED")


@pytest.mark.parametrize("slow", ["", "m.Queue._load = slow"], ids=["", "read back from disk"])
def test_who_was_told_aa_hears_it_once_after_a_reload_to_original_mode(tmp_path, slow):
    with site(tmp_path, {"A": "?enhanced=aa"}, start=False) as here, contextlib.ExitStack() as stack:
        late = "load = m.Queue._load\nasync def slow(queue, more):\n await m.asyncio.sleep(1)\n"
        late += " await load(queue, more)\n"
        changed(here.agent, late + slow)
        here.agent.start()
        device = stack.enter_context(here.device("A"))
        here.sandbox.faults.delay = lambda: 1.5
        assert device.ask(message("TOLD")) == ("AA", "TOLD")
        here.sandbox.wait_ids("TOLD")
        here.endpoint("A")["address"] = here.endpoint("A")["address"].partition("?")[0]
        assert here.sandbox.reload()["type"].endswith("response")
        assert device.drain(2.5) == []


# --- 10: a reload changes what concerns no line, in the middle of a message ---


@pytest.mark.parametrize("given", ["alarmAgeSecs=600", "maxConnections=20", "answerWaitMins=5"])
def test_a_reload_of_a_setting_that_concerns_no_line_leaves_a_session_alone(tmp_path, given):
    with laboratory(tmp_path, {"LAB": ANALYZER}) as here, Instrument.at(here.ports["LAB"]) as device:
        here.sandbox.bot = lambda transmit: (200, "")
        records = "H|\\^&|||ABC", "R|1|^^^GLU|5.1", "L|1|N"
        frames = frames_of(*records)
        assert device.ask(ENQ) == ACK
        assert device.ask(frames[0]) == ACK
        here.endpoint("LAB")["address"] += f"&{given}"
        assert here.sandbox.reload()["type"].endswith("response")
        for frame in frames[1:]:
            assert device.ask(frame) == ACK
        device.write(EOT)
        here.sandbox.wait_for(lambda: [t.body for t in of(here, "LAB")] == [body_of(*records)])


# --- 13: an upgrade while an answer waits ---


def test_an_answer_that_waits_for_its_instrument_outlives_an_upgrade(tmp_path):
    with site(tmp_path, {"LAB": ANALYZER}, start=False) as here:
        there = Installed(tmp_path, here)
        there.add("5.3.0")
        here.sandbox.bot = lambda transmit: (200, ORDER)
        here.sandbox.faults.delay = lambda: 0.5
        with Instrument.at(here.ports["LAB"]) as device:
            device.session(*QUERY)
        here.agent.logged("its answer waits 10 minutes")
        assert there.command("upgrade", "5.3.0").returncode == 0
        with Instrument.at(here.ports["LAB"]) as device:
            assert device.accept(5)


# --- 16: messagesPerMin is taken away ---


def test_a_reload_that_takes_the_rate_limit_away_lets_go_what_is_held_back(tmp_path):
    with site(tmp_path, {"A": "?enhanced=aa&messagesPerMin=2"}) as here, here.device("A", timeout=5) as device:
        device.send(message("M1"), message("M2"))
        assert device.ack() == ("AA", "M1")
        here.endpoint("A")["address"] = here.endpoint("A")["address"].replace("&messagesPerMin=2", "")
        assert here.sandbox.reload()["type"].endswith("response")
        assert device.ack() == ("AA", "M2")


# --- 17: a stored push that a connected device acknowledges late ---


def test_a_late_ack_of_a_connected_device_settles_a_stored_push(tmp_path):
    """As it does for a device that we called: else it gets the same order up to twenty times, then a dead letter."""
    settings = [setting("channelAutoRetryBaseDelayMs", 3000)]
    with site(tmp_path, {"A": ""}, settings) as here, here.device("A") as device, here.caller() as caller:
        caller.store("channel://A?ackTimeoutSecs=1", message("SLOW"))
        assert control_id(device.receive()) == "SLOW"
        eventually(lambda: here.agent.rows("SLOW")[0]["error_code"])
        device.send(ack_text("AA", "SLOW"))
        device.socket.settimeout(6)
        with pytest.raises(TimeoutError):
            device.receive()
        assert here.agent.rows("SLOW")[0]["state"] == "processed"


# --- 20: both acknowledgments of a push in one frame ---


def test_ca_and_aa_in_one_frame(tmp_path):
    def behave(link, text):
        link.send(ack_text("CA", control_id(text)) + ack_text("AA", control_id(text)))

    with site(tmp_path, {"A": ""}) as here, Receiver(behave) as device, here.caller() as caller:
        answer = caller.push(device.url("?ackTimeoutSecs=2"), message("P-1"), returnAck="application")
        assert "MSA|AA|P-1" in answer.text and "MSA|CA" not in answer.text


# --- 23: the refusal of what has no field separator ---


def test_a_refusal_is_hl7(tmp_path):
    with site(tmp_path, {"A": ""}) as here, here.device("A") as device:
        device.send("MSHA1 is no header")
        assert device.receive().startswith("MSH|")


# --- what messagesPerMin holds back counts from when it is heard ---


def test_a_frame_that_could_not_be_read_is_not_taken_for_one_that_stopped(tmp_path):
    """frameTimeoutSecs ran on while the connection was not read: whoever had begun its next frame was cut off."""
    with site(tmp_path, {"A": "?enhanced=aa&messagesPerMin=15&frameTimeoutSecs=2"}) as here, here.device("A") as device:
        third = b"\x0b" + message("THIRD").encode() + b"\x1c\r"
        device.send_raw(b"".join(b"\x0b" + message(one).encode() + b"\x1c\r" for one in ("ONE", "TWO")) + third[:50])
        assert [device.ack(), device.ack()] == [("AA", "ONE"), ("AA", "TWO")]  # 4 s apart
        time.sleep(1.5)  # the device takes its time; the agent looks once a second
        device.send_raw(third[50:])
        assert device.ack() == ("AA", "THIRD")
