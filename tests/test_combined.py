"""Faults that only two things together brought to light, one test each: none may come back."""

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.instruments import ACK, ENQ, Instrument
from tests.support import Receiver, accepts, ack_text, acknowledgment, changed, eventually, free_ports, message, site

ANALYZER = "tcp://127.0.0.1:{port}?mode=astm"
ORDER = "H|\\^&\nO|1|X\nL|1|N\n"


def framed(text: str) -> bytes:
    return b"\x0b" + text.encode() + b"\x1c\r"


def half_closed(port: int, text: str) -> list[tuple[str, str]]:
    """A message and the end of the stream at once, as `nc -N` sends them; what is heard until the agent closes."""
    heard = b""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        if hasattr(socket, "TCP_CORK"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        sock.sendall(framed(text))
        sock.shutdown(socket.SHUT_WR)
        while chunk := sock.recv(65536):
            heard += chunk
    return [acknowledgment(part[1:].decode()) for part in heard.split(b"\x1c\r") if part]


@pytest.mark.parametrize(
    ("query", "answers"), [("?enhanced=aa", 1), ("?enhanced=true&appLevelAck=NE", 1), ("?enhanced=true", 2), ("", 1)]
)
def test_who_ends_the_stream_behind_a_message_hears_its_acknowledgment(tmp_path, query, answers):
    with site(tmp_path, {"A": query}) as here:
        with here.device("A") as device:  # until the disk is known to be quick, and is written to at once
            for number in range(100):
                device.send(message(f"W-{number}", f"P{number}"))
                for _ in range(answers):
                    device.ack()
        heard = [half_closed(here.ports["A"], message(f"H-{number}", f"P{number}")) for number in range(50)]
        assert [len(one) for one in heard] == [answers] * 50


@pytest.mark.parametrize("query", ["?enhanced=aa", "?enhanced=true", "", "?enhanced=true&duplicateBehavior=reject"])
def test_who_ends_the_stream_behind_a_repetition_hears_its_answer(tmp_path, query):
    with site(tmp_path, {"A": query}) as here, here.device("A") as device:
        device.send(message("R-1"))
        assert device.drain(0.5)
        assert half_closed(here.ports["A"], message("R-1"))


@pytest.mark.parametrize("stored", [False, True])
def test_the_answer_of_one_device_is_not_taken_for_another_s(tmp_path, stored):
    """One message to two connected devices: one hangs, the other answers CA and AA."""
    text = message("BROADCAST")
    with (
        site(tmp_path, {"LAB": ""}) as here, here.caller() as one, here.caller() as other,
        ThreadPoolExecutor(2) as pool,
        socket.create_connection(("127.0.0.1", here.ports["LAB"]), 5, ("127.0.0.2", 0)) as hung,
        socket.create_connection(("127.0.0.1", here.ports["LAB"]), 5, ("127.0.0.3", 0)) as good,
    ):  # fmt: skip
        eventually(lambda: here.sandbox.stats()["hl7ConnectionsOpen"] == 2)
        silent = "channel://LAB/127.0.0.2?ackTimeoutSecs=2"
        first = pool.submit(one.store if stored else one.push, silent, text)
        hung.recv(65536)
        second = pool.submit(other.push, "channel://LAB/127.0.0.3?ackTimeoutSecs=5", text)
        good.recv(65536)
        good.sendall(framed(ack_text("CA", "BROADCAST")))
        assert second.result().status == 200
        good.sendall(framed(ack_text("AA", "BROADCAST")) + framed(message("LATER")))
        assert b"LATER" in good.recv(65536)  # so that the one before it was read
        if stored:
            rows = [row for row in here.agent.rows("BROADCAST") if "127.0.0.2" in row["remote"]]
            assert [row["state"] for row in rows] == ["queued"], rows
        else:
            answer = first.result()
            assert answer and answer.status == 400


def test_a_slow_disk_does_not_make_two_queues_of_one_device(tmp_path):
    """A device closes its idle connection while the next push to it is being stored."""
    slow = (
        "i = m.Store._insert\nm.Store._insert = lambda s, db, found: (m.time.sleep(0.4 * bool(found)), i(s, db, found))"
    )
    with site(tmp_path, {"LAB": ""}, start=False) as here, Receiver() as device:
        changed(here.agent, slow)
        here.agent.start()
        with here.caller() as caller:
            caller.store(device.url(), message("T-0"))
            here.agent.wait_state("T-0", "processed")
            device.behaviour = lambda link, text: None  # it takes its time
            caller.store(device.url(), message("T-1"))
            device.links[0].close()  # it was idle for long
            device.wait_ids("T-0", "T-1")
            caller.store(device.url(), message("T-2"))
            here.agent.wait_state("T-2", "queued")
            here.sandbox.stats()
            assert device.ids() == ["T-0", "T-1"]


@pytest.mark.parametrize("kind", ["tcp", "ping", "astm"])
def test_a_stop_tells_every_caller_that_waits(tmp_path, kind):
    with (
        site(tmp_path, {"LAB": ""}) as here, here.caller() as caller, Receiver(lambda link, text: None) as device,
        ThreadPoolExecutor(1) as pool,
    ):  # fmt: skip
        if kind == "tcp":
            url, binary = device.url("?endChar=%03", "tcp"), "application/octet-stream"
            push = pool.submit(caller.push, url, "51", contentType=binary)
        elif kind == "astm":
            url, records = device.url("?mode=astm", "tcp"), "x-application/astm-e1394"
            push = pool.submit(caller.push, url, "H|\\^&\nL|1|N\n", contentType=records)
        else:
            push = pool.submit(caller.ping, "127.0.0.9", "PING 20")
        eventually(lambda: here.sandbox.sandbox._waiting if kind == "ping" else device.links)
        here.sandbox.stats()  # what the server sent before it was read
        code, _ = here.agent.terminate()
        assert (code, push.result().text) == (0, "the agent is stopping")


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_an_answer_that_the_instrument_has_not_taken_is_undelivered(tmp_path, how):
    with site(tmp_path, {"LAB": ANALYZER}, start=False) as here:
        here.agent.start(ready=False)
        eventually(lambda: accepts(("127.0.0.1", here.ports["LAB"])), 20)
        here.agent.wait_connected()
        here.sandbox.bot = lambda transmit: (200, ORDER)

        def rows() -> list[tuple[str, str]]:
            with contextlib.closing(here.agent.database()) as db:
                return list(db.execute("SELECT state, ack_outcome FROM queue WHERE state = 'processed'"))

        with Instrument.at(here.ports["LAB"]) as device:
            device.session("H|\\^&|||ABC", "Q|1|^1", "L|1|N")
            assert device.take(1) == ENQ
            device.write(ACK)
            device.frame()  # never acknowledged
            eventually(rows)
            getattr(here.agent, how)()
        assert rows() == [("processed", "undelivered")]


def test_an_answer_that_waits_for_its_instrument_outlives_a_reload(tmp_path):
    with site(tmp_path, {"LAB": ANALYZER}, start=False) as here:
        here.agent.start(ready=False)
        eventually(lambda: accepts(("127.0.0.1", here.ports["LAB"])), 20)
        here.agent.wait_connected()
        here.sandbox.bot = lambda transmit: (200, ORDER)
        here.sandbox.faults.delay = lambda: 0.5
        with Instrument.at(here.ports["LAB"]) as device:
            device.session("H|\\^&|||ABC", "Q|1|^1", "L|1|N")
        here.agent.logged("its answer waits 10 minutes")
        (port,) = free_ports(1)
        here.endpoint("LAB")["address"] = ANALYZER.format(port=port)
        assert here.sandbox.reload()["type"].endswith("response")
        with Instrument.at(port) as device:
            assert device.accept(5)
