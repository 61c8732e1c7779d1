"""From the cloud to the device: $push over HTTP through the stand-in server, to real sockets and foreign receivers."""

import asyncio
import contextlib
import os
import random
import socket
import ssl
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import trustme
from hl7.mllp import start_hl7_server

import medplum_agent
from medplum_agent import BYTES_TYPE, Devices, Parts, Push, parse_target
from tests.support import (
    AGENT_ID,
    Receiver,
    accepts_all,
    ack_text,
    acknowledgment,
    changed,
    control_id,
    eventually,
    free_ports,
    message,
    setting,
    site,
)

FAST = (setting("channelAutoRetryBaseDelayMs", 20), setting("channelAutoRetryMaxDelayMs", 100))
TRIES = 3


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with site(tmp_path_factory.mktemp("push"), {"LAB": "", "Two words": "?enhanced=true"}) as running:
        yield running


@pytest.fixture(scope="module")
def retrying(tmp_path_factory):
    """An agent that tries again soon, and three times."""
    settings = (*FAST, setting("channelAutoRetryMaxAttempts", TRIES))
    with site(tmp_path_factory.mktemp("retrying"), {"LAB": ""}, settings) as running:
        yield running


@pytest.fixture
def caller(here):
    with here.caller() as running:
        yield running


@pytest.fixture
def storing(retrying):
    with retrying.caller() as running:
        yield running


def assert_works(caller, receiver, query="", **members):
    """The next push is unharmed."""
    receiver.behaviour = accepts_all
    control = f"NEXT-{time.monotonic_ns()}"
    answer = caller.push(receiver.url(query), message(control), **members)
    assert (answer.status, acknowledgment(answer.text)) == (200, ("AA", control)), answer


# --- foreign receivers ---


def test_python_hl7_receiver(here, caller):
    heard = []

    async def serve(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                received = await reader.readmessage()
                heard.append(str(received))
                writer.writemessage(received.create_ack())
                await writer.drain()
        writer.close()

    (port,) = free_ports(1)
    server = here.sandbox.call(start_hl7_server(serve, "127.0.0.1", port, encoding="utf-8"))
    try:
        for n in range(3):
            text = message(f"PY-{n}", text="Grüße")
            answer = caller.push(f"mllp://127.0.0.1:{port}", text)
            assert (answer.status, answer.content_type) == (200, f"{medplum_agent.HL7_TYPE}; charset=utf-8")
            assert acknowledgment(answer.text) == ("AA", f"PY-{n}")
            assert heard[n] == text
        texts = [message(f"PY-S{n}") for n in range(3)]
        caller.store(f"mllp://127.0.0.1:{port}", *texts)
        here.agent.wait_state("PY-S2", "processed")
        assert heard[3:] == texts
    finally:
        here.sandbox.loop.call_soon_threadsafe(server.close)


def test_medplum_hl7_listen(here, caller, tmp_path):
    command = os.environ.get("MEDPLUM_CLI", "")
    if not command:
        pytest.skip("NO @medplum/cli: set MEDPLUM_CLI (build.py test does) to push to Medplum's own receiver")
    (port,) = free_ports(1)
    printed = tmp_path / "printed.txt"
    with open(printed, "wb") as output:
        listener = subprocess.Popen([command, "hl7", "listen", str(port)], cwd=tmp_path, stdout=output, stderr=output)
    try:
        eventually(lambda: b"Listening" in printed.read_bytes(), 20, "medplum hl7 listen")
        for n in range(3):
            answer = caller.push(f"mllp://127.0.0.1:{port}", message(f"CLI-{n}", text="Ärztin"))
            assert (answer.status, acknowledgment(answer.text)) == (200, ("AA", f"CLI-{n}"))
        caller.store(f"mllp://127.0.0.1:{port}", *(message(f"CLI-S{n}") for n in range(3)))
        assert acknowledgment(here.agent.wait_state("CLI-S2", "processed")["response"]) == ("AA", "CLI-S2")
        eventually(lambda: b"CLI-S2" in printed.read_bytes())
        text = printed.read_text()
        assert text.count("Ärztin") == 3 and text.index("CLI-S0") < text.index("CLI-S1") < text.index("CLI-S2")
    finally:
        listener.terminate()
        listener.wait(10)


# --- which answer completes a push ---


def ca_then_aa(link, text):
    link.ack("CA", control_id(text))
    link.ack("AA", control_id(text))


@pytest.mark.parametrize(
    ("query", "members", "code"),
    [
        ("", {}, "CA"),
        ("", {"returnAck": "first"}, "CA"),
        ("", {"returnAck": "application"}, "AA"),
        ("", {"returnAck": "APPLICATION"}, "AA"),
        ("?defaultReturnAck=application", {}, "AA"),
        ("?defaultReturnAck=Application", {}, "AA"),
        ("?defaultReturnAck=application", {"returnAck": "First"}, "CA"),
        ("?defaultReturnAck=first", {"returnAck": "application"}, "AA"),
        ("?defaultReturnAck=sometimes", {}, "CA"),
    ],
)
def test_accept_then_application_ack(caller, query, members, code):
    with Receiver(ca_then_aa) as device:
        for n in range(3):  # what is left over of one push does not answer the next
            answer = caller.push(device.url(query), message(f"RA-{n}"), **members)
            assert (answer.status, acknowledgment(answer.text)) == (200, (code, f"RA-{n}"))
            assert answer.content_type.startswith(medplum_agent.HL7_TYPE)
        assert_works(caller, device, query, **members)


def test_unknown_return_ack_is_refused_before_the_device_hears_it(caller):
    with Receiver() as device:
        answer = caller.push(device.url(), message("RA-BAD"), returnAck="sometimes")
        assert answer.status == 400 and "sometimes" in answer.text and "application" in answer.text
        assert_works(caller, device)
        assert "RA-BAD" not in device.ids()


@pytest.mark.parametrize("mode", ["first", "application"])
@pytest.mark.parametrize("code", ["AA", "AE", "AR", "CE", "CR"])
def test_the_device_s_own_answer_comes_back(caller, code, mode):
    with Receiver(lambda link, text: link.ack(code, control_id(text), "because")) as device:
        answer = caller.push(device.url(), message("OWN-1"), returnAck=mode)
        assert (answer.status, answer.text) == (200, ack_text(code, "OWN-1", "because"))
        assert_works(caller, device)


def in_pieces(link, text):
    for byte in b"\x0b" + ack_text("AA", control_id(text)).encode() + b"\x1c\r":
        link.send_raw(bytes([byte]))


def slowly(link, text):
    time.sleep(1)
    accepts_all(link, text)


def twice(link, text):
    accepts_all(link, text)
    accepts_all(link, text)


def after_noise(link, text):
    link.send_raw(b"\r\n\x00hello\x1c\r")
    link.send("MSH|^~\\&|no acknowledgment at all")
    link.send(message("A-QUESTION"))
    link.ack("AA", "of-somebody-else")
    accepts_all(link, text)


@pytest.mark.parametrize("behaviour", [in_pieces, slowly, twice, after_noise])
def test_strange_ways_to_say_yes(caller, behaviour):
    with Receiver(behaviour) as device:
        for n in range(2):
            answer = caller.push(device.url(), message(f"YES-{n}"))
            assert (answer.status, acknowledgment(answer.text)) == (200, ("AA", f"YES-{n}"))
        assert_works(caller, device)


# --- faults: the caller hears which device and why ---


def hangs_up(link, text):
    link.close()


def resets(link, text):
    link.reset()


def hangs_up_inside_its_answer(link, text):
    link.send_raw(b"\x0b" + ack_text("AA", control_id(text)).encode()[:30])
    link.close()


def assert_failed(answer, device, *reasons):
    assert (answer.status, answer.content_type) == (400, "application/fhir+json"), answer
    assert device in answer.text, answer
    assert any(reason in answer.text.lower() for reason in reasons), answer


@pytest.mark.parametrize("behaviour", [hangs_up, resets, hangs_up_inside_its_answer])
def test_hanging_up(caller, behaviour):
    with Receiver(behaviour) as device:
        answer = caller.push(device.url(), message("HANG-1"))
        assert_failed(answer, device.url(), "closed")
        assert answer.seconds < 3
        assert_works(caller, device)
        assert device.ids().count("HANG-1") == 1, "a push that somebody waits for is tried once"


def test_refused_connection(here, caller):
    (port,) = free_ports(1)
    answer = caller.push(f"mllp://127.0.0.1:{port}", message("REFUSED-1"))
    assert_failed(answer, f"mllp://127.0.0.1:{port}", "refused")
    assert answer.seconds < 3
    raw = here.sandbox.ask(
        "agent:transmit:request", remote=f"mllp://127.0.0.1:{port}", body=message("REFUSED-2"),
        contentType=medplum_agent.HL7_TYPE,
    )  # fmt: skip
    assert (raw["type"], raw["statusCode"], raw["contentType"]) == ("agent:transmit:response", 400, "text/plain")
    assert raw["remote"] == f"mllp://127.0.0.1:{port}" and "channel" not in raw
    with Receiver(port=port) as device:
        assert_works(caller, device)
        assert len(device.heard) == 1, "a push that somebody waits for is tried once"


def test_ipv6(caller):
    (port,) = free_ports(1)
    assert_failed(caller.push(f"mllp://[::1]:{port}", message("SIX-1")), f"mllp://[::1]:{port}", "refused")
    with Receiver(port=port, host="::1") as device:
        assert caller.push(f"mllp://[::1]:{port}", message("SIX-2")).status == 200
        caller.store(f"mllp://[::1]:{port}", message("SIX-3"))
        device.wait_ids("SIX-2", "SIX-3")


def test_large_message(caller):
    text = message("LARGE-1", size=900_000)
    with Receiver() as device:
        assert caller.push(device.url(), text).status == 200
        caller.store(device.url(), text)
        device.wait_for(lambda: device.heard == [text, text])


def no_answer(link, text):
    pass


def garbage(link, text):
    link.send_raw(bytes(range(0x1C)) + b"\xff" * 5000 + b"\x0b\x00\xff\xfe\x1c\r\x1c\r\x0b\x1c\r")


def no_ack(link, text):
    link.send(message(control_id(text)))


def wrong_id(link, text):
    link.ack("AA", control_id(text) + "x")


def half(link, text):
    link.send_raw(b"\x0b" + ack_text("AA", control_id(text)).encode())


def no_id(link, text):
    link.send("MSH|^~\\&|PUMP|||||ACK|1|P|2.5.1\rMSA|AA\r")


def blank_id(link, text):
    link.send(f"\ufeffMSH|^~\\&|PUMP|||||ACK|1|P|2.5.1\rMSA| aa | {control_id(text)} |\r")


def ca_only(link, text):
    link.ack("CA", control_id(text))


def no_hl7(link, text):
    link.send("OK")


def unframed(link, text):
    link.send_raw(ack_text("AA", control_id(text)).encode())


@pytest.mark.parametrize("behaviour", [no_id, blank_id])
def test_an_acknowledgment_with_blanks_with_a_bom_or_without_msa_2(caller, behaviour):
    """The device's own words when MSA-2 is empty and one message is in flight."""
    with Receiver(behaviour) as device:
        for n in range(2):
            answer = caller.push(device.url(), message(f"OWN-{n}"))
            assert answer.status == 200 and "MSA|" in answer.text, answer


@pytest.mark.parametrize(
    ("behaviour", "query", "said"),
    [
        (no_answer, "", "within 0.3 s"), (half, "", "not ended by 0x1C 0x0D"),
        (wrong_id, "", "acknowledges another message"),
        (ca_only, "&defaultReturnAck=application", "only its accept acknowledgment (CA) came"),
        (no_hl7, "", "no HL7 acknowledgment"), (unframed, "", "in no MLLP frame"),
    ],
)  # fmt: skip
def test_the_error_says_what_came_instead(caller, behaviour, query, said):
    with Receiver(behaviour) as device:
        answer = caller.push(device.url(f"?ackTimeoutSecs=0.3{query}"), message("CAME-1"))
        assert_failed(answer, device.url(), "no ack")
        assert said in answer.text and "CAME-1" not in answer.text


def unaccepting():
    """A port where connecting takes for ever: its queue of connections is full; what must be kept open."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    waiting = []
    for _ in range(4):
        waiting.append(socket.socket())
        waiting[-1].setblocking(False)
        waiting[-1].connect_ex(listener.getsockname())
    return listener, waiting


def test_silence_is_answered_before_the_caller_gives_up_and_idle_connections_close(here, caller):
    """All at once, as each takes 9 s; idle connections close after 10 s in the meantime."""
    behaviours = [no_answer, garbage, no_ack, wrong_id, half]
    with contextlib.ExitStack() as stack:
        idle = stack.enter_context(Receiver())
        assert_works(caller, idle)
        since = time.monotonic()
        devices = [stack.enter_context(Receiver(behaviour)) for behaviour in behaviours]
        listener, waiting = unaccepting()
        for sock in (listener, *waiting):
            stack.enter_context(sock)
        urls = [device.url() for device in devices] + [f"mllp://127.0.0.1:{listener.getsockname()[1]}"]
        urls += [devices[0].url("?ackTimeoutSecs=0.3")]
        callers = [stack.enter_context(here.caller()) for _ in urls]
        with ThreadPoolExecutor(len(urls)) as pool:
            answers = list(pool.map(lambda c, u: c.push(u, message("SILENT-1")), callers, urls))
        for behaviour, device, answer in zip(behaviours, devices, answers, strict=False):
            assert_failed(answer, device.url(), "no ack")
            assert 8 < answer.seconds < 9.9, behaviour
        assert_failed(answers[-2], urls[-2], "timed out", "time-out", "within 5 s", "could not be made")
        assert 4 < answers[-2].seconds < 6
        assert_failed(answers[-1], devices[0].url(), "no ack")
        assert answers[-1].seconds < 2
        for device in devices:
            if device.behaviour is not half:
                assert_works(caller, device)
        idle.wait_for(lambda: not idle.open, 8, "the idle connection to be closed")
        assert 9 < time.monotonic() - since < 14


def test_after_half_an_answer_the_next_push_gets_its_own(caller):
    with Receiver(half) as device:
        assert_failed(caller.push(device.url("?ackTimeoutSecs=0.3"), message("HALF-1")), device.url(), "no ack")
        assert_works(caller, device, "?ackTimeoutSecs=3")


def test_late_answer_is_logged_and_answers_nobody_else(here, caller):
    links = []
    with Receiver(lambda link, text: links.append(link)) as device, here.caller() as other:
        assert caller.push(device.url("?ackTimeoutSecs=0.3"), message("LATE-1")).status == 400
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(other.push, device.url(), message("LATE-2"))
            device.wait_ids("LATE-1", "LATE-2")
            links[0].ack("AA", "LATE-1", "late")
            links[1].ack("AA", "LATE-2", "in time")
            assert "in time" in second.result().text
        here.agent.logged("no push waits for")
        late = "LATE-1|late"

        def logged():
            logs = here.agent.state_dir.glob("medplum-agent-channels-*")
            return any(late in path.read_text() for path in logs)

        eventually(logged, what="the late answer in the channel log")
        assert late.encode() not in here.agent.main_log()


def test_answer_on_a_newer_connection(here, caller):
    with Receiver(no_answer) as device, here.caller() as other, ThreadPoolExecutor(2) as pool:
        first = pool.submit(caller.push, device.url(), message("CROSS-1"))
        device.wait_ids("CROSS-1")
        second = pool.submit(other.push, device.url(), message("CROSS-2"))
        device.wait_ids("CROSS-1", "CROSS-2")
        newer = device.links[1]
        newer.ack("AA", "CROSS-1", "one")
        newer.ack("AA", "CROSS-2", "two")
        assert first.result().text == ack_text("AA", "CROSS-1", "one")
        assert second.result().text == ack_text("AA", "CROSS-2", "two")
        assert_works(caller, device)


def test_same_control_id_twice_in_flight(here, caller):
    with Receiver(no_answer) as device, here.caller() as other, ThreadPoolExecutor(2) as pool:
        pushes = [pool.submit(c.push, device.url(), message("SAME-1", text=str(c is other))) for c in (caller, other)]
        device.wait_for(lambda: len(device.heard) == 2)
        for link in device.links:
            link.ack("AA", "SAME-1", f"on {link.number}")
        answers = [push.result() for push in pushes]
        assert {answer.text for answer in answers} == {ack_text("AA", "SAME-1", f"on {n}") for n in range(2)}
        assert all(answer.seconds < 5 for answer in answers)
        assert_works(caller, device)


def test_connection_that_the_device_closed_is_not_used_again(caller):
    with Receiver() as device:
        for n in range(5):
            assert_works(caller, device)
            device.links[n].close()
            device.wait_for(lambda: not device.open)


# --- encoding ---


def test_an_acknowledgment_names_its_encoding_in_msh_18(caller):
    """As a device's message does, where the address names none."""

    def refuses(link, text):
        answer = f"MSH|^~\\&|P|W|C|S|2026||ACK|A1|P|2.5||||||8859/1\rMSA|AE|{control_id(text)}|Größe\r"
        link.send_raw(b"\x0b" + answer.encode("latin-1") + b"\x1c\r")

    with Receiver(refuses) as device:
        assert "Größe" in caller.push(device.url(), message("NAMED-1")).text


def test_encoding(caller):
    def answers(link, text):
        link.send(ack_text("AA", control_id(text), "Schöne Grüße"), "latin-1")

    with Receiver(answers, encoding="latin-1") as device:
        text = message("LATIN-1", text="Ärztin für Öl")
        answer = caller.push(device.url("?encoding=latin1"), text)
        assert (answer.status, answer.text) == (200, ack_text("AA", "LATIN-1", "Schöne Grüße"))
        assert device.heard == [text]
        caller.store(device.url("?encoding=latin1"), message("LATIN-2", text="Übung"))
        device.wait_ids("LATIN-1", "LATIN-2")
        assert device.heard[1] == message("LATIN-2", text="Übung")
        assert caller.push(device.url("?encoding=klingon"), message("LATIN-3")).status == 400
        assert device.ids() == ["LATIN-1", "LATIN-2"]


def test_line_ends_become_carriage_returns(caller):
    with Receiver() as device:
        assert caller.push(device.url(), message("LF-1").replace("\r", "\r\n")).status == 200
        assert device.heard == [message("LF-1")]


# --- TLS ---


class Tls:
    """A CA, another, and a client certificate, as files and as contexts for devices."""

    def __init__(self, folder):
        self.ca = trustme.CA()
        self.ca_file, self.foreign_file, self.client_file = (folder / f"{name}.pem" for name in ("ca", "other", "own"))
        self.query = f"?caFile={self.ca_file}"
        self.ca.cert_pem.write_to_path(self.ca_file)
        trustme.CA().cert_pem.write_to_path(self.foreign_file)
        self.ca.issue_cert("agent@example.test").private_key_and_cert_chain_pem.write_to_path(self.client_file)

    def context(self, *names, ask=False):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca.issue_cert(*(names or ["127.0.0.1"])).configure_cert(context)
        if ask:
            context.verify_mode = ssl.CERT_REQUIRED
            self.ca.configure_trust(context)
        return context


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return Tls(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize(("scheme", "more"), [("mllps", ""), ("mllp", "&tls=true")])
def test_tls_with_our_authority(caller, tls, scheme, more):
    with Receiver(context=tls.context()) as device:
        url = device.url(tls.query + more, scheme)
        for n in range(2):
            answer = caller.push(url, message(f"TLS-{n}"))
            assert (answer.status, acknowledgment(answer.text)) == (200, ("AA", f"TLS-{n}")), answer
        caller.store(url, message("TLS-S"))
        device.wait_ids("TLS-0", "TLS-1", "TLS-S")


def test_tls_with_a_foreign_authority_is_refused(caller, tls):
    with Receiver(context=tls.context()) as device:
        for query in ("", f"?caFile={tls.foreign_file}"):
            answer = caller.push(device.url(query, "mllps"), message("TLS-FOREIGN"))
            assert_failed(answer, device.url(scheme="mllps"), "certificate")
        assert not device.heard


def test_tls_checks_the_host(caller, tls):
    with Receiver(context=tls.context("pump.example.test")) as device:
        answer = caller.push(device.url(tls.query, "mllps"), message("TLS-HOST"))
        assert_failed(answer, device.url(scheme="mllps"), "certificate")
        answer = caller.push(device.url(f"{tls.query}&checkHost=false", "mllps"), message("TLS-ANY-HOST"))
        assert answer.status == 200
        assert device.ids() == ["TLS-ANY-HOST"]


def test_tls_with_a_client_certificate(caller, tls):
    with Receiver(context=tls.context(ask=True)) as device:
        answer = caller.push(device.url(tls.query, "mllps"), message("TLS-NAMELESS"))
        assert_failed(answer, device.url(scheme="mllps"), "certificate", "closed", "reset")
        answer = caller.push(device.url(f"{tls.query}&certFile={tls.client_file}", "mllps"), message("TLS-NAMED"))
        assert answer.status == 200, answer
        assert device.ids() == ["TLS-NAMED"]


def test_raw_bytes_that_a_device_did_not_take_are_an_error(here, caller, tls):
    """With TLS 1.3 it refuses our certificate after its handshake; a busy one resets at once."""
    with Receiver(context=tls.context(ask=True)) as device:
        answer = caller.push(device.url(tls.query, "tcp") + "&tls=true", "0241", contentType=BYTES_TYPE)
        assert_failed(answer, device.url(scheme="tcp"), "certificate", "closed", "reset")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        reset = struct.pack("ii", 1, 0)

        def turn_away() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted, _ = busy.accept()
                    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                    accepted.close()

        threading.Thread(target=turn_away, daemon=True).start()
        url = f"tcp://127.0.0.1:{busy.getsockname()[1]}"
        for _ in range(5):
            assert_failed(caller.push(url, "0241", contentType=BYTES_TYPE), url, "reset", "broken pipe")
        busy.shutdown(socket.SHUT_RDWR)


def test_pushes_use_certificates_as_they_are_at_the_last_reload(here, caller, tls, tmp_path):
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(tls.foreign_file.read_bytes())
    with Receiver(context=tls.context()) as device:
        url = device.url(f"?caFile={trusted}", "mllps")
        assert_failed(caller.push(url, message("OLD-CA")), device.url(scheme="mllps"), "certificate")
        trusted.write_bytes(tls.ca_file.read_bytes())
        assert here.sandbox.reload()["statusCode"] == 200
        assert caller.push(url, message("NEW-CA")).status == 200


def test_the_next_address_of_a_name_is_tried_when_one_is_silent(tmp_path):
    """A listener whose backlog is full answers no SYN."""
    with site(tmp_path, {"A": ""}, start=False) as here, Receiver() as device, contextlib.ExitStack() as stack:
        hole = stack.enter_context(socket.socket())
        hole.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        hole.bind(("127.0.0.2", device.port))
        hole.listen(0)
        for _ in range(4):
            filling = stack.enter_context(socket.socket())
            filling.setblocking(False)
            filling.connect_ex(hole.getsockname())
        both = "lambda host, port, *a, **k: [x for h in hosts(host) for x in found(h, port, *a, **k)]"
        hosts = "hosts = lambda host: ['127.0.0.2', '127.0.0.1'] if host == 'pump.example' else [host]"
        changed(here.agent, f"{hosts}\nfound = m.socket.getaddrinfo\nm.socket.getaddrinfo = {both}")
        here.agent.start()
        with here.caller() as caller:
            answer = caller.push(f"mllp://pump.example:{device.port}?connectTimeoutSecs=2", message("NEXT"))
            assert answer.status == 200, answer


def test_acknowledgments_of_pushes_have_no_rate(tmp_path):
    with site(tmp_path, {"A": "?messagesPerMin=6"}) as here, here.device("A") as device, here.caller() as caller:
        assert device.ask(message("RATE"))[0] == "AA"
        for n in range(2):
            answering = threading.Thread(target=lambda: device.send(ack_text("AA", control_id(device.receive()))))
            answering.start()
            assert caller.push("channel://A", message(f"RATE-{n}")).status == 200
            answering.join()


def test_a_line_on_which_a_push_waits_is_not_idle(tmp_path):
    def slow(link, text):
        assert not link.drain(2.5)
        link.send(ack_text("AA", control_id(text)))

    with site(tmp_path, {"A": "?idleTimeoutSecs=1"}) as here, here.device("A") as device, here.caller() as caller:
        assert device.ask(message("IDLE"))[0] == "AA"
        answering = threading.Thread(target=lambda: slow(device, device.receive()))
        answering.start()
        assert caller.push("channel://A", message("SLOW")).status == 200
        answering.join()


def test_tls_with_a_file_that_is_not_there(here, caller, tls):
    """The cloud is not told what files there are."""
    with Receiver(context=tls.context()) as device:
        for query in ("?caFile=/nowhere/ca.pem", f"{tls.query}&certFile=/nowhere/cert.pem"):
            answer = caller.push(device.url(query, "mllps"), message("TLS-NOFILE"))
            assert_failed(answer, device.url(scheme="mllps"), "our main log says why")
        here.agent.logged("No such file")


def test_tls_to_a_device_without_tls(caller):
    with Receiver() as device:
        answer = caller.push(device.url("?connectTimeoutSecs=1", "mllps"), message("TLS-PLAIN"))
        assert_failed(answer, device.url(scheme="mllps"), "tls", "ssl", "closed", "reset", "within", "time")
        assert answer.seconds < 5


def test_connection_made_under_other_rules_is_not_used(caller, tls):
    """A connection that was opened with one authority does not serve a push that trusts another only."""
    with Receiver(context=tls.context()) as device:
        assert caller.push(device.url(tls.query, "mllps"), message("RULE-1")).status == 200
        assert caller.push(device.url(f"?caFile={tls.foreign_file}", "mllps"), message("RULE-2")).status == 400
        assert device.ids() == ["RULE-1"]
    with Receiver() as plain:
        assert caller.push(plain.url(), message("RULE-3")).status == 200
        assert caller.push(plain.url("?tls=true&connectTimeoutSecs=1"), message("RULE-4")).status == 400
        assert plain.ids() == ["RULE-3"], "what must be encrypted went over a plain connection"


# --- raw bytes ---


class RawDevice(Receiver):
    """A device that reads bytes; `behaviour` gets what came in one read, as latin-1."""

    raw = b""

    def _read(self, link):
        while chunk := link.socket.recv(65536):
            with self.changed:
                self.raw += chunk
                self.changed.notify_all()
            self.behaviour(link, chunk.decode("latin-1"))


@pytest.mark.parametrize(
    ("query", "body", "expected"),
    [
        ("", "024142c403", b"\x02AB\xc4\x03"),
        ("", "02 41 42 03", b"\x02AB\x03"),
        ("", "Order 7", b"Order 7"),
        ("?bodyEncoding=utf-8", "4142", b"4142"),
        ("?bodyEncoding=utf-8", "Grüße", "Grüße".encode()),
        ("?bodyEncoding=utf-8&encoding=latin1", "Grüße", "Grüße".encode("latin-1")),
    ],
)
def test_raw_bytes(caller, query, body, expected):
    with RawDevice(no_answer) as device:
        answer = caller.push(device.url(query, "tcp"), body, contentType="application/octet-stream")
        assert (answer.status, answer.text) == (200, ""), answer
        assert answer.content_type.startswith("application/octet-stream")
        device.wait_for(lambda: device.raw == expected, what=f"{expected!r}")
        caller.store(device.url(query, "tcp"), body, contentType="application/octet-stream")
        device.wait_for(lambda: device.raw == expected * 2, what=f"{expected!r}")


@pytest.mark.parametrize(
    ("query", "reply", "text"),
    [
        ("?endChar=%03", b"\x06OK\x03", "064f4b03"),
        ("?endChar=%0D%0A", b"OK\r\n", "4f4b0d0a"),
        ("?endChar=%03&bodyEncoding=utf-8", "Öl\x03".encode(), "Öl\x03"),
        ("?endChar=%03&bodyEncoding=utf-8&encoding=latin1", "Öl\x03".encode("latin-1"), "Öl\x03"),
        ("?endChar=%03", b"x" * 200_000 + b"\x03", "78" * 200_000 + "03"),
    ],
)
def test_raw_answer(caller, query, reply, text):
    def answers(link, text):
        link.send_raw(reply[:2])
        link.send_raw(reply[2:])

    with RawDevice(answers) as device:
        answer = caller.push(device.url(query, "tcp"), "51", contentType="application/octet-stream")
        assert (answer.status, answer.text[:100]) == (200, text[:100]), answer.text[:200]
        assert answer.text == text


def test_raw_faults(caller):
    with RawDevice(hangs_up) as device:
        answer = caller.push(device.url("?endChar=%03", "tcp"), "51")
        assert_failed(answer, device.url(scheme="tcp"), "closed")
        device.behaviour = resets
        assert_failed(caller.push(device.url("?endChar=%03", "tcp"), "51"), device.url(scheme="tcp"), "closed", "reset")
        device.behaviour = no_answer
        answer = caller.push(device.url("?endChar=%03&ackTimeoutSecs=0.3", "tcp"), "51")
        assert_failed(answer, device.url(scheme="tcp"), "no answer")
        device.behaviour = lambda link, text: link.send_raw(b"\x03")
        assert caller.push(device.url("?endChar=%03", "tcp"), "51").text == "03"
    assert_failed(caller.push(device.url(scheme="tcp"), "51"), device.url(scheme="tcp"), "refused")


# --- devices that connected to us ---


@contextlib.contextmanager
def connected(here, channel):
    """A device whose connection the agent has taken: it got an answer."""
    with here.device(channel) as device:
        control = f"HELLO-{time.monotonic_ns()}"
        assert device.ask(message(control))[1] == control
        if channel != "LAB":
            device.ack()
        yield device


def assert_not_forwarded(here, device, *controls):
    """What came before a message that arrived at the server has not."""
    control = f"PROBE-{time.monotonic_ns()}"
    device.send(message(control))
    here.sandbox.wait_ids(control)
    bodies = [transmit.body for _, transmit in here.sandbox.seen]
    assert not [body for body in bodies for wanted in controls if f"|{wanted}" in body]


@pytest.mark.parametrize(("channel", "name"), [("LAB", "LAB"), ("LAB", "LAB/127.0.0.1"), ("Two words", "Two%20words")])
def test_push_to_a_connected_device(here, caller, channel, name):
    with connected(here, channel) as device, ThreadPoolExecutor(1) as pool:
        for n, code in enumerate(["AA", "AE", "AR"]):
            push = pool.submit(caller.push, f"channel://{name}", message(f"CH-{n}"))
            assert device.receive() == message(f"CH-{n}")
            device.send(ack_text(code, f"CH-{n}", "by the channel"))
            assert (push.result().status, push.result().text) == (200, ack_text(code, f"CH-{n}", "by the channel"))
        assert_not_forwarded(here, device, "CH-", "A-CH-")


def test_connected_device_answers_ca_then_aa(here, caller):
    with connected(here, "LAB") as device, ThreadPoolExecutor(1) as pool:
        for mode, code in (("application", "AA"), ("first", "CA")):
            push = pool.submit(caller.push, "channel://LAB", message(f"CHCA-{mode}"), returnAck=mode)
            device.receive()
            device.send(ack_text("CA", f"CHCA-{mode}"))
            if mode == "first":
                push.result()  # and its AA comes later
            device.send(ack_text("AA", f"CHCA-{mode}"))
            assert acknowledgment(push.result().text) == (code, f"CHCA-{mode}")
        assert_not_forwarded(here, device, "CHCA-")


def test_connected_device_answers_twice_or_late(here, caller):
    with connected(here, "LAB") as device, ThreadPoolExecutor(1) as pool:
        push = pool.submit(caller.push, "channel://LAB", message("CH-TWICE"))
        device.receive()
        device.send(ack_text("AA", "CH-TWICE"))
        assert push.result().status == 200
        device.send(ack_text("AA", "CH-TWICE"))
        answer = caller.push("channel://LAB?ackTimeoutSecs=0.3", message("CH-LATE"))
        assert_failed(answer, "LAB", "no ack")
        device.receive()
        device.send(ack_text("AA", "CH-LATE"))
        assert_not_forwarded(here, device, "CH-TWICE", "CH-LATE")


def test_same_control_id_twice_to_a_connected_device(here, caller):
    with connected(here, "LAB") as device, here.caller() as other, ThreadPoolExecutor(2) as pool:
        pushes = [pool.submit(c.push, "channel://LAB?ackTimeoutSecs=2", message("CH-SAME")) for c in (caller, other)]
        for _ in pushes:
            device.receive()
        device.send(ack_text("AA", "CH-SAME"), ack_text("AA", "CH-SAME"))
        assert [push.result().status for push in pushes] == [200, 200]
        assert_not_forwarded(here, device, "CH-SAME")


def test_connected_device_hangs_up(here, caller):
    with ThreadPoolExecutor(1) as pool:
        with connected(here, "LAB") as device:
            push = pool.submit(caller.push, "channel://LAB", message("CH-HANG"))
            device.receive()
        assert_failed(push.result(), "LAB", "closed", "hung up", "disconnected", "no ack")
        assert push.result().seconds < 3, "the agent knows at once that no answer can come"


def test_which_connected_device(here, caller):
    assert_failed(caller.push("channel://LAB", message("CH-NONE")), "LAB", "no device")
    assert_failed(caller.push("channel://NOWHERE", message("CH-NOWHERE")), "NOWHERE", "no running")
    with connected(here, "LAB") as device:
        assert_failed(caller.push("channel://LAB/127.0.0.9", message("CH-OTHER")), "127.0.0.9", "no device")
        with connected(here, "LAB"):
            assert_failed(caller.push("channel://LAB", message("CH-TWO")), "LAB", "2 devices")
        device.send(message("CH-PROBE"))
        assert acknowledgment(device.receive()) == ("AA", "CH-PROBE"), "none of these pushes reached it"


def test_push_without_wait_to_a_device_that_connects_later(retrying, storing):
    storing.store("channel://LAB", *(message(f"CH-S{n}") for n in range(3)))
    assert retrying.agent.wait_state("CH-S0", "queued")["channel_name"] == "push channel://LAB"
    with retrying.device("LAB") as device:  # the pushes may come before an answer to anything that it asks
        for n in range(3):
            assert device.receive() == message(f"CH-S{n}")
            device.send(ack_text("AA", f"CH-S{n}"))
        retrying.agent.wait_state("CH-S2", "processed")
        assert_not_forwarded(retrying, device, "CH-S", "A-CH-S")


# --- requests that cannot be done ---

BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no remote": ({"remote": None}, "agent:error", "missing remote address"),
    "empty remote": ({"remote": ""}, "agent:error", "missing remote address"),
    "no url": ({"remote": "ward 7"}, "agent:error", "ward 7"),
    "unknown scheme": ({"remote": "ftp://127.0.0.1:21"}, "agent:error", "ftp"),
    "no port": ({"remote": "mllp://127.0.0.1"}, "agent:error", "port"),
    "port too high": ({"remote": "mllp://127.0.0.1:70000"}, "agent:error", "port"),
    "no host": ({"remote": "mllp://:2575"}, "agent:error", "host"),
    "not closed": ({"remote": "mllp://[::1:2575"}, "agent:error", "mllp://[::1:2575"),
    "empty label": ({"remote": "mllp://ward..example:2575"}, "", "ward..example"),
    "label too long": ({"remote": f"mllp://{'w' * 70}.example:2575"}, "", "w" * 70),
    "null in the host": ({"remote": "mllp://127.0.0.1\0:2575"}, "", "127.0.0.1"),
    "no body": ({"body": ""}, "agent:error", "body"),
    "no HL7": ({"body": "PID|1||7"}, "agent:error", "msh"),
    "no MSH-10": ({"body": "MSH|^~\\&|A|B|C|D|2026||ADT^A01||P|2.5.1\r"}, "agent:transmit:response", "msh.10"),
    "short MSH": ({"body": "MSH|^~\\&|A"}, "agent:transmit:response", "msh.10"),
    "unknown returnAck": ({"returnAck": "later"}, "agent:transmit:response", "later"),
    "unknown encoding": ({"remote": "mllp://127.0.0.1:1?encoding=klingon"}, "agent:error", "klingon"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_request(here, caller, name):
    change, kind, said = BAD[name]
    before = len(here.agent.main_log())
    with Receiver() as device:
        request = {"remote": device.url(), "body": message("BAD-1"), "contentType": medplum_agent.HL7_TYPE} | change
        answer = here.sandbox.ask("agent:transmit:request", **request)
        assert kind in ("", answer["type"]), answer
        assert answer["type"] == "agent:error" or (answer["statusCode"], answer["contentType"]) == (400, "text/plain")
        assert said in answer["body"].lower() and "internal" not in answer["body"], answer
        push = {"type": "agent:transmit:request"} | request
        here.sandbox.loop.call_soon_threadsafe(lambda: here.sandbox.sandbox.agents[AGENT_ID].send(push))
        caller.store(device.url(), message("GOOD-1"))  # nobody waits: still no harm
        device.wait_ids("GOOD-1")
        assert_works(caller, device)
    assert b"Internal error" not in here.agent.main_log()[before:]


def test_callers_own_errors(caller):
    assert caller.call(destination="Device/none", contentType=medplum_agent.HL7_TYPE, body="MSH|").status == 400
    assert caller.call(destination=caller.device(""), contentType=medplum_agent.HL7_TYPE, body="MSH|").status == 400


def test_status_off(here, caller):
    agent = here.sandbox.resource(f"Agent/{AGENT_ID}")
    with Receiver() as device:
        agent["status"] = "off"
        try:
            assert here.sandbox.reload()["statusCode"] == 200
            answer = caller.push(device.url(), message("OFF-1"))
            assert (answer.status, answer.text) == (400, "Agent.status is currently set to off")
            assert caller.ping("127.0.0.1").text == "Agent.status is currently set to off"
        finally:
            agent["status"] = "active"
            assert here.sandbox.reload()["statusCode"] == 200
        assert_works(caller, device)
        assert "OFF-1" not in device.ids()


# --- connections ---


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ((), 5),
        ((setting("keepAlive", True),), 1),
        ((setting("maxClientsPerRemote", 3),), 3),
        ((setting("keepAlive", True), setting("maxClientsPerRemote", 2)), 2),
    ],
)
def test_two_hundred_pushes_to_one_slow_device(here, settings, limit):
    """Never more connections than allowed, one message in flight on each, and no answer mixed up."""
    count, keep_alive = 200, any(entry["name"] == "keepAlive" for entry in settings)
    busy, most = set(), []

    def slow(link, text):
        with link.receiver.changed:
            assert link not in busy
            busy.add(link)
            most.append(len(busy))
        time.sleep(0.01)
        with link.receiver.changed:
            busy.discard(link)
        link.ack("AA", control_id(text), f"answer to {control_id(text)}")

    agent = here.sandbox.resource(f"Agent/{AGENT_ID}")
    agent["setting"] = list(settings)
    assert here.sandbox.reload()["statusCode"] == 200
    gate = threading.Barrier(count)

    def one(n):
        with here.caller() as caller:
            gate.wait()
            return caller.push(device.url(), message(f"M-{n}"))

    try:
        with Receiver(slow) as device, ThreadPoolExecutor(count) as pool:
            answers = list(pool.map(one, range(count)))
            for n, answer in enumerate(answers):
                assert (answer.status, answer.text) == (200, ack_text("AA", f"M-{n}", f"answer to M-{n}")), answer
            assert sorted(device.ids()) == sorted(f"M-{n}" for n in range(count))
            assert device.most == limit, "connections"
            assert len(device.links) == (limit if keep_alive else count), "without keepAlive nothing is reused"
            assert max(most) <= limit
    finally:
        agent["setting"] = []
        assert here.sandbox.reload()["statusCode"] == 200


def test_reload_leaves_pushes_alone(here, caller):
    with Receiver(no_answer) as device, ThreadPoolExecutor(1) as pool:
        push = pool.submit(caller.push, device.url(), message("RELOAD-1"))
        device.wait_ids("RELOAD-1")
        agent = here.sandbox.resource(f"Agent/{AGENT_ID}")
        for keep in (True, False):
            agent["setting"] = [setting("keepAlive", keep)]
            assert here.sandbox.reload()["statusCode"] == 200
        device.links[0].ack("AA", "RELOAD-1")
        assert push.result().status == 200
        assert len(device.links) == 1
        assert_works(caller, device)


class Quiet:
    """A log that nobody reads."""

    def info(self, text, **members):
        pass

    warn = error = debug = info


NOT_THERE: Any = None


def settled_devices(keep, limit=None):
    """Devices without an agent around them."""
    entries = [{"name": "keepAlive", "valueBoolean": keep}]
    entries += [{"name": "maxClientsPerRemote", "valueInteger": limit}] if limit else []
    quiet: Any = Quiet()
    devices = Devices(Parts(NOT_THERE, NOT_THERE, NOT_THERE, quiet, quiet), {})
    devices.configure(medplum_agent.build_plan({"status": "active", "setting": entries}, {})[0])
    return devices


def asking(devices, url, control, seconds=5):
    target = parse_target(url)
    push = Push(target, message(control), control, "first", medplum_agent.HL7_TYPE)
    return asyncio.ensure_future(devices.device(target.key).ask(push, seconds))


@pytest.mark.parametrize("keep", [False, True])
def test_only_with_keep_alive_a_connection_is_used_again(monkeypatch, keep):
    monkeypatch.setattr(medplum_agent, "DEVICE_IDLE_SECS", 0)

    async def main(receiver):
        devices = settled_devices(keep)
        for n in range(3):
            assert acknowledgment(await asking(devices, receiver.url(), f"KEEP-{n}")) == ("AA", f"KEEP-{n}")
            assert receiver.most == 1
            if n:  # after the first it is there for a while, and then in the way
                devices.tidy()
                await asyncio.to_thread(receiver.wait_for, lambda: len(receiver.open) == keep)
        assert len(receiver.links) == (1 if keep else 3)
        devices.close()
        await asyncio.to_thread(eventually, lambda: not any(devices.shown().values()))

    with Receiver() as receiver:
        asyncio.run(main(receiver))


@pytest.mark.parametrize("keep", [False, True])
def test_after_a_push_without_its_acknowledgment_the_connection_is_closed(monkeypatch, keep):
    monkeypatch.setattr(medplum_agent, "LATE_ACK_SECS", 0.05)

    async def main(receiver):
        devices = settled_devices(keep)
        for n in range(2):
            with pytest.raises(medplum_agent.DeviceError, match="no acknowledgment"):
                await asking(devices, receiver.url(), f"LOST-{n}", 1)
            await asyncio.to_thread(receiver.wait_for, lambda: not receiver.open)
        receiver.behaviour = accepts_all
        assert acknowledgment(await asking(devices, receiver.url(), "LOST-2")) == ("AA", "LOST-2")
        assert [link.frames for link in receiver.links] == [1, 1, 1]
        devices.close()
        await asyncio.to_thread(eventually, lambda: not any(devices.shown().values()))

    with Receiver(no_answer) as receiver:
        asyncio.run(main(receiver))


def closes_when_asked_again(tries):
    """Answers the first frame of a connection and closes at the next ones, `tries` times."""
    left = [tries]

    def behave(link, text):
        if link.frames > 1 and left[0]:
            left[0] -= 1
            link.close()
        else:
            accepts_all(link, text)

    return behave


def test_a_used_connection_that_ends_before_an_answer_is_replaced_at_once_and_once():
    async def main(receiver):
        devices = settled_devices(True)
        for n in range(3):
            assert acknowledgment(await asking(devices, receiver.url(), f"AGAIN-{n}")) == ("AA", f"AGAIN-{n}")
        assert receiver.ids() == ["AGAIN-0", "AGAIN-1", "AGAIN-1", "AGAIN-2"] and len(receiver.links) == 2
        receiver.behaviour = hangs_up
        with pytest.raises(medplum_agent.DeviceError, match="closed"):
            await asking(devices, receiver.url(), "AGAIN-3")
        assert receiver.ids()[4:] == ["AGAIN-3", "AGAIN-3"] and len(receiver.links) == 3
        receiver.behaviour = accepts_all
        await asking(devices, receiver.url(), "AGAIN-4")
        receiver.behaviour = hangs_up_inside_its_answer
        with pytest.raises(medplum_agent.DeviceError, match="closed"):
            await asking(devices, receiver.url(), "AGAIN-5")
        assert receiver.ids().count("AGAIN-5") == 1, "an answer had begun: the device has the message"
        devices.close()
        await asyncio.to_thread(eventually, lambda: not any(devices.shown().values()))

    with Receiver(closes_when_asked_again(1)) as receiver:
        asyncio.run(main(receiver))


def test_a_turn_that_is_given_up_goes_to_the_next():
    """Of three pushes the first holds the only connection, the second gives up waiting, the third gets its turn."""

    async def main(receiver):
        devices = settled_devices(True)
        first = asking(devices, receiver.url(), "T-1")
        await asyncio.to_thread(receiver.wait_ids, "T-1")
        second = asking(devices, receiver.url(), "T-2", 0.05)
        third = asking(devices, receiver.url(), "T-3")
        with pytest.raises(medplum_agent.DeviceError, match="busy"):
            await second
        receiver.behaviour = accepts_all
        receiver.links[0].ack("AA", "T-1")
        assert acknowledgment(await first) == ("AA", "T-1")
        assert acknowledgment(await third) == ("AA", "T-3")
        device = devices.device(receiver.url())
        assert device.users == 0 and not device.asked
        devices.close()
        await asyncio.to_thread(eventually, lambda: not any(devices.shown().values()))

    with Receiver(no_answer) as receiver:
        asyncio.run(main(receiver))


def test_a_connection_that_could_not_be_made_in_time_frees_its_place():
    """The push that waits behind one that gives up while it connects is tried at once."""
    listener, waiting = unaccepting()
    url = f"mllp://127.0.0.1:{listener.getsockname()[1]}"

    async def main():
        devices = settled_devices(True)
        first, second = asking(devices, url, "P-1", 0.2), asking(devices, url, "P-2", 3)
        with pytest.raises(medplum_agent.DeviceError):
            await first
        for sock in (*waiting, listener):
            sock.close()  # now the port refuses
        with pytest.raises(medplum_agent.DeviceError, match="refused"):
            await second

    asyncio.run(main())


# --- pushes that nobody waits for: stored, then sent in order ---


def test_stored_before_it_is_sent(retrying, storing):
    (port,) = free_ports(1)
    url = f"mllp://127.0.0.1:{port}"
    storing.store(f"{url}?encoding=utf-8", *(message(f"ST-{n}", f"P{n}") for n in range(5)))
    row = retrying.agent.wait_state("ST-4", "queued")
    assert row["channel_name"] == f"push {url}" and row["remote"] == f"{url}?encoding=utf-8"
    assert row["original"].decode() == message("ST-4", "P4")
    with Receiver(port=port) as device:
        device.wait_ids(*(f"ST-{n}" for n in range(5)))
        row = retrying.agent.wait_state("ST-4", "processed")
        assert row["response"] == ack_text("AA", "ST-4") and row["ack_outcome"] == "delivered"


def test_device_that_is_down_for_long_is_no_failed_try(retrying, storing):
    (port,) = free_ports(1)
    storing.store(f"mllp://127.0.0.1:{port}", message("DOWN-1"))

    def tried():
        rows = retrying.agent.rows("DOWN-1")
        return rows and rows[0]["attempts"] > 3 * TRIES and rows[0]

    row = eventually(tried, 10, "more tries than the limit")
    assert (row["state"], row["error_code"]) == ("queued", "device-unreachable")
    with Receiver(port=port) as device:
        device.wait_ids("DOWN-1")
        retrying.agent.wait_state("DOWN-1", "processed")


def first_tries(codes):
    """Answers the tries of each message with these codes in turn, then AA; "" is silence, "!" hangs up."""
    tries: dict[str, int] = {}

    def behave(link, text):
        control = control_id(text)
        tries[control] = tries.get(control, 0) + 1
        code = codes[tries[control] - 1] if tries[control] <= len(codes) else "AA"
        if code == "!":
            link.close()
        elif code:
            link.ack(code, control)

    return behave


@pytest.mark.parametrize(
    ("codes", "state", "error", "tries"),
    [
        (["AE"], "processed", None, 2),
        (["CE", "AE"], "processed", None, 3),
        (["AE"] * 3, "failed", "device-error", 3),
        (["AR"], "rejected", "device-rejected", 1),
        (["CR"], "rejected", "device-rejected", 1),
        (["", ""], "processed", None, 3),
        (["", "", ""], "failed", "device-silent", 3),
        (["!", "!"], "processed", None, 3),
        (["!", "AE", ""], "failed", "device-silent", 3),
        (["AE", "AR"], "rejected", "device-rejected", 2),
    ],
)
def test_tries_and_dead_letters(retrying, storing, codes, state, error, tries):
    control = f"DL-{'-'.join(codes).replace('!', 'H')}"
    with Receiver(first_tries(codes)) as device:
        url = device.url("?ackTimeoutSecs=0.2")
        storing.store(url, message(control), message(f"{control}-2"))
        row = retrying.agent.wait_state(control, state)
        assert (row["attempts"], row["error_code"] if error else None) == (tries, error)
        retrying.agent.wait_state(f"{control}-2", state)
        assert device.ids() == [control] * tries + [f"{control}-2"] * tries, "the next waits until the first is done"
        if state == "rejected":
            assert acknowledgment(row["response"]) == (codes[-1], control)
        if error:
            retrying.agent.logged(f"message {row['id']} is a dead letter")
            assert row["last_error"] and row["original"].decode() == message(control)
        assert_works(storing, device)


def test_accept_then_application_ack_of_a_stored_push(retrying, storing):
    with Receiver(ca_then_aa) as device:
        storing.store(device.url(), message("SCA-1"), returnAck="application")
        row = retrying.agent.wait_state("SCA-1", "processed")
        assert acknowledgment(row["response"]) == ("AA", "SCA-1")
        storing.store(device.url(), message("SCA-2"))
        row = retrying.agent.wait_state("SCA-2", "processed")  # CA; or AA, when both come at once
        assert acknowledgment(row["response"]) in [("CA", "SCA-2"), ("AA", "SCA-2")] and row["attempts"] == 1
        device.behaviour = first_tries(["CA", "CA", "CA"])  # only its commit accept: that is no answer
        storing.store(device.url("?ackTimeoutSecs=0.2&defaultReturnAck=application"), message("SCA-3"))
        assert retrying.agent.wait_state("SCA-3", "failed")["error_code"] == "device-silent"


def test_late_answer_settles_a_stored_push(here, caller):
    """It comes after the time-out, while the next try (in 1 s) is still to come."""
    with Receiver(no_answer) as device:
        caller.store(device.url("?ackTimeoutSecs=0.2"), message("SLATE-1"), message("SLATE-2"))
        eventually(lambda: (rows := here.agent.rows("SLATE-1")) and rows[0]["error_code"] == "device-silent")
        device.behaviour = accepts_all
        device.links[0].ack("AA", "SLATE-1", "late")
        here.agent.wait_state("SLATE-2", "processed")
        assert here.agent.rows("SLATE-1")[0]["state"] == "processed"
        assert device.ids() == ["SLATE-1", "SLATE-2"]


def test_strict_order_with_one_in_flight(retrying, storing):
    count = 60
    waiting: list[str] = []
    tries = set()

    def slow(link, text):
        with link.receiver.changed:
            assert not waiting, f"{control_id(text)} came before {waiting} was answered"
            waiting.append(control_id(text))
        time.sleep(0.002)
        with link.receiver.changed:
            waiting.clear()
        again = control_id(text) not in tries and int(control_id(text)[2:]) % 10 == 5
        tries.add(control_id(text))
        link.ack("AE" if again else "AA", control_id(text))

    with Receiver(slow) as device:
        storing.store(device.url(), *(message(f"O-{n}", f"P{n}") for n in range(count)))
        retrying.agent.wait_state(f"O-{count - 1}", "processed")
        expected = [f"O-{n}" for n in range(count) for _ in range(1 + (n % 10 == 5))]
        assert device.ids() == expected


def test_devices_do_not_wait_for_each_other(retrying, storing):
    (port,) = free_ports(1)
    with Receiver(no_answer) as silent, Receiver() as device:
        for url in (f"mllp://127.0.0.1:{port}", silent.url("?ackTimeoutSecs=30"), device.url()):
            storing.store(url, message(f"ALONE-{url[-5:]}"))
        device.wait_for(lambda: device.heard)
        assert_works(storing, silent)


def test_explicit_limit_sends_patients_in_parallel(tmp_path):
    settings = (*FAST, setting("maxClientsPerRemote", 3))
    with site(tmp_path, {"LAB": ""}, settings) as here, here.caller() as caller, Receiver(no_answer) as device:
        patients = ["A", "A", "B", "C", "D"]
        caller.store(device.url(), *(message(f"PAR-{n}", patient) for n, patient in enumerate(patients)))
        device.wait_for(lambda: len(device.heard) == 3)
        assert sorted(device.ids()) == ["PAR-0", "PAR-2", "PAR-3"]
        device.behaviour = accepts_all
        for link in list(device.links):
            link.ack("AA", control_id(link.last))
        here.agent.wait_state("PAR-1", "processed")
        here.agent.wait_state("PAR-4", "processed")
        assert device.most == 3 and sorted(device.ids()) == [f"PAR-{n}" for n in range(5)]


def test_kill_and_clean_stop_keep_what_was_stored(tmp_path):
    with site(tmp_path, {"LAB": ""}, FAST) as here, here.caller() as caller, Receiver(no_answer) as device:
        caller.store(device.url(), *(message(f"K-{n}") for n in range(20)))
        device.wait_ids("K-0")
        here.agent.wait_state("K-19", "queued")
        here.agent.kill()
        device.wait_for(lambda: not device.open)
        eventually(lambda: not here.sandbox.connected)
        here.agent.start()
        device.wait_ids("K-0", "K-0")
        code, seconds = here.agent.terminate()  # with a push under way
        assert code == 0 and seconds < 10
        device.wait_for(lambda: not device.open)
        eventually(lambda: not here.sandbox.connected)
        device.behaviour = accepts_all
        here.agent.start()
        here.agent.wait_state("K-19", "processed")
        assert device.ids() == ["K-0", "K-0", *(f"K-{n}" for n in range(20))]
        assert "never retrieved" not in here.agent.output() and "Traceback" not in here.agent.output()


def test_stopping_tells_the_caller_that_waits(tmp_path):
    with (
        site(tmp_path, {"LAB": ""}) as here,
        here.caller() as caller,
        Receiver(no_answer) as device,
        ThreadPoolExecutor(1) as pool,
    ):
        push = pool.submit(caller.push, device.url(), message("STOP-1"))
        device.wait_ids("STOP-1")
        code, _ = here.agent.terminate()
        assert code == 0
        answer = push.result()
        assert answer.status == 400 and answer.text != "Timeout", answer
        assert answer.seconds < 9.9


def stored_ids(agent):
    """Control ids of all stored pushes in order, and of those whose answer was stored."""
    with contextlib.closing(agent.database()) as db:
        rows = db.execute("SELECT control_id, state FROM queue WHERE control_id LIKE 'B-%' ORDER BY id").fetchall()
    return [control for control, _ in rows], {control for control, state in rows if state == "processed"}


def test_thousands_of_pushes_and_ten_kills(tmp_path):
    """Each arrives, in order, and none whose acknowledgment was stored is sent again."""
    count, kills = 4000, 10
    texts = [message(f"B-{n:05d}", f"P{n % 50}") for n in range(count)]
    moments = random.Random(7)
    settled = []  # at each kill: where the device stood, and what was acknowledged on disk
    with (
        site(tmp_path, {"LAB": ""}, (*FAST, setting("channelAutoRetryMaxAttempts", 0))) as here,
        Receiver() as device,
        here.caller() as caller,
    ):
        stored = 0
        started = time.monotonic()
        for kill in range(kills):
            if kill == 2:
                device.stop()
            if kill == 5:
                device.start()
            here.sandbox.sandbox.resources["Device/feed"] = {"resourceType": "Device", "url": device.url()}
            for text in texts[stored : stored + moments.randrange(200, 400)]:
                caller.call(destination="Device/feed", contentType=medplum_agent.HL7_TYPE, body=text)
            here.agent.kill()
            device.wait_for(lambda: not device.open)
            eventually(lambda: not here.sandbox.connected)
            ids, processed = stored_ids(here.agent)
            stored = len(ids)  # what the agent had not yet stored is pushed again
            assert ids == [control_id(text) for text in texts[:stored]]
            settled.append((len(device.heard), processed))
            here.agent.start()
        for text in texts[stored:]:
            caller.call(destination="Device/feed", contentType=medplum_agent.HL7_TYPE, body=text)
        last = f"B-{count - 1:05d}"
        device.wait_for(lambda: last in map(control_id, device.heard[-3:]), 120, "the last push")
        here.agent.wait_state(f"B-{count - 1:05d}", "processed")
        spent = time.monotonic() - started
        heard = device.ids()
    assert list(dict.fromkeys(heard)) == [control_id(text) for text in texts], "all, and in order"
    for position, processed in settled:
        assert not processed & set(heard[position:]), "sent again after its acknowledgment was stored"
    assert len(settled[-1][1]) > 10
    print(f"\n{count} pushes in {spent:.1f} s, {len(heard) - count} repeated, {kills} kills")


# --- when the agent itself is in trouble ---


def test_store_that_failed_once_does_not_shut_a_device_out(tmp_path):
    """The first push to a device meets a full queue and is tried once; the second is stored."""
    with site(tmp_path, {"LAB": ""}, [*FAST, setting("queueMaxMb", 1)]) as here, here.caller() as caller:
        (port,) = free_ports(1)
        filler = f"mllp://127.0.0.1:{port}"
        caller.store(filler, *(message(f"FILL-{n}", size=90_000) for n in range(13)))
        here.agent.logged("cannot be stored")
        with Receiver() as device:
            caller.store(device.url(), message("FULL-1"))
            device.wait_ids("FULL-1")
            here.sandbox.resource(f"Agent/{AGENT_ID}")["setting"] = list(FAST)
            assert here.sandbox.reload()["statusCode"] == 200
            caller.store(device.url(), message("FULL-2"))
            here.agent.wait_state("FULL-2", "processed")


def test_push_without_wait_while_the_queue_cannot_be_used(tmp_path):
    with site(tmp_path, {"LAB": ""}, FAST, start=False) as here, Receiver() as device:
        here.agent.queue_path.mkdir(parents=True)  # no database: it cannot be opened
        here.agent.start()
        here.agent.logged("cannot be")
        with here.caller() as caller:
            caller.store(device.url(), message("NOQUEUE-1"))
            assert_works(caller, device)
            here.agent.queue_path.rmdir()
            device.wait_for(lambda: "NOQUEUE-1" in device.ids(), 12, "the push, at once or when there is a queue")
            caller.store(device.url(), message("NOQUEUE-2"))
            here.agent.wait_state("NOQUEUE-2", "processed", 12)


def test_push_while_the_agent_starts(tmp_path, monkeypatch):
    """The connection is there before the configuration: a push that comes between is kept, or its caller hears why."""
    with site(tmp_path, {"LAB": ""}, FAST, start=False) as here, Receiver() as device:
        server, released = here.sandbox.sandbox, threading.Event()
        respond = server._respond

        async def slowly(method, target, *rest):
            if target.endswith(f"/Agent/{AGENT_ID}"):
                await asyncio.to_thread(released.wait, 20)
            return await respond(method, target, *rest)

        monkeypatch.setattr(server, "_respond", slowly)
        here.agent.start(ready=False)
        here.agent.wait_connected()
        with here.caller() as caller, here.caller() as other, ThreadPoolExecutor(1) as pool:
            texts = [message(f"EARLY-{n}") for n in range(2000)]
            caller.store(device.url(), texts[0])
            waiting = pool.submit(other.push, device.url(), message("WAITS-1"))

            async def flood():  # over the moment when the agent is ready
                for n, text in enumerate(texts[1:]):
                    request = {"type": "agent:transmit:request", "remote": device.url(), "body": text}
                    server.agents[AGENT_ID].send(request | {"contentType": medplum_agent.HL7_TYPE})
                    if n == 200:
                        released.set()
                    if n % 10 == 0:
                        await asyncio.sleep(0.0005)

            here.sandbox.call(flood())
            device.wait_for(lambda: len(device.heard) >= len(texts), 60, "the pushes that came early")
            answer = waiting.result()
            assert answer.status == 200 or "start" in answer.text, answer
            here.agent.wait_state("EARLY-1999", "processed")
            stored = [control for control in device.ids() if control != "WAITS-1"]
            assert stored == [control_id(text) for text in texts]


# --- statistics ---


def test_stats(tmp_path):
    with (
        site(tmp_path, {"LAB": ""}) as here,
        here.caller() as caller,
        Receiver() as device,
        Receiver(no_answer, encoding="latin-1") as latin,
        ThreadPoolExecutor(1) as pool,
    ):
        assert here.sandbox.stats()["hl7ClientCount"] == 0
        for n in range(3):
            assert caller.push(device.url(), message(f"STAT-{n}")).status == 200
        with here.caller() as other:
            waiting = pool.submit(other.push, latin.url("?encoding=latin1"), message("STAT-L"))
            latin.wait_ids("STAT-L")
            stats = here.sandbox.stats()
            latin.links[0].ack("AA", "STAT-L")
            assert waiting.result().status == 200
        assert stats["hl7ClientCount"] == 2
        rtt = stats["clientStats"][device.url("?encoding=utf-8")]["rtt"]
        assert rtt["count"] == 3 and rtt["pendingCount"] == 0
        assert 0 <= rtt["min"] <= rtt["p50"] <= rtt["p95"] <= rtt["max"] < 5000
        assert set(rtt) == {"count", "min", "max", "average", "p50", "p95", "p99", "pendingCount"}
        assert stats["clientStats"][latin.url("?encoding=latin1")]["rtt"]["pendingCount"] == 1
        device.stop()
        latin.stop()
        eventually(lambda: here.sandbox.stats()["hl7ClientCount"] == 0)
