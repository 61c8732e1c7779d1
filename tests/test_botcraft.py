"""What Bot developers return and push, and what the device then sees."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from demo import Transmit
from pydicom.dataset import Dataset

from medplum_agent import Json
from tests.dicom_peers import QUIET, WORKLIST, associated, start
from tests.instruments import Instrument, frames_of
from tests.support import Receiver, Site, eventually, message, site


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    channels = {
        "HL7": "", "CA": "?enhanced=true", "RAW": "tcp://127.0.0.1:{port}?startChar=%02&endChar=%03",
        "ASTM": "tcp://127.0.0.1:{port}?mode=astm", "PACS": "dicom://127.0.0.1:{port}",
    }  # fmt: skip
    with site(tmp_path_factory.mktemp("botcraft"), channels, start=False) as running:
        start(running)
        running.sandbox.faults.silent = True
        yield running


def says(here: Site, transmit: Transmit, body: object, status: object = 200) -> None:
    """The Bot's answer as the server sends it, whatever that is."""
    named = {"channel": transmit.channel, "remote": transmit.remote, "callback": transmit.callback}
    answer: Json = {"type": "agent:transmit:response", "statusCode": status, "body": body} | named
    here.sandbox.tell(json.dumps(answer).encode())


def test_json_that_is_nested_deeply_is_an_answer(here):
    """It was none: the message waited for its time-out, was sent again, and its device heard nothing."""
    body: object = "leaf"
    for _ in range(300):
        body = {"item": body}
    with here.device("HL7") as device:
        device.send(message("DEEP-1"))
        here.sandbox.wait_ids("DEEP-1")
        says(here, here.sandbox.of("DEEP-1")[0], body)
        assert device.ack() == ("AA", "DEEP-1")


DROPPED = {
    "a batch": ("", f"BHS|^~\\&|A\r{message('DROP-1')}BTS|1", {}, "does not start with MSH"),
    "no MSH-10": ("", "MSH|^~\\&|A|B|C|D|2026||ADT^A01||P|2.5.1\r", {}, "MSH.10 is missing"),
    "returnAck": ("", message("DROP-2"), {"returnAck": "later"}, "returnAck 'later' is unknown"),
    "address": ("?encoding=klingon", message("DROP-3"), {}, "encoding 'klingon' is unknown"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_a_push_that_is_dropped_is_in_the_log(here, name):
    """Nobody waits for it, the server said 200, and there was no trace of it anywhere."""
    query, body, members, said = DROPPED[name]
    with here.caller() as caller, Receiver() as device:
        caller.store(device.url(query), body, **members)
        line = here.agent.logged(said)
        assert "was dropped" in line and "PAT-1" not in line


def test_a_bot_that_frames_its_message_itself(here):
    """Its AE was no HL7 to us, so the device heard AA; a push of the kind was refused."""
    with here.device("HL7") as device:
        device.send(message("FRAMED-1"))
        here.sandbox.wait_ids("FRAMED-1")
        refusal = "\x0bMSH|^~\\&|BOT|S|||2026||ACK|B1|P|2.5.1\rMSA|AE|FRAMED-1\x1c\r"
        says(here, here.sandbox.of("FRAMED-1")[0], refusal)
        assert device.receive_bytes() == refusal[1:-2].encode() + b"\r"
    with here.caller() as caller, Receiver() as device:
        answer = caller.push(device.url(), f"\x0b{message('FRAMED-2')}\x1c\r")
        assert answer.status == 200 and device.heard == [message("FRAMED-2")], answer


@pytest.mark.parametrize("channel", ["RAW", "CA"])
@pytest.mark.parametrize("body", [7, {"text": "06"}, ["06"]], ids=str)
def test_what_a_bot_returns_and_no_device_can_take_is_said(here, channel, body):
    """Nothing was, of a byte stream; of HL7 it was an acknowledgment that no device in enhanced mode gets."""
    text = f"{channel} {body}"
    with here.device(channel) as device:
        device.send_raw(b"\x02" + text.encode() + b"\x03") if channel == "RAW" else device.send(message(text))
        content = f"\x02{text}\x03".encode().hex() if channel == "RAW" else text
        found = here.sandbox.wait_for(lambda: [t for _, t in here.sandbox.seen if content in t.body])
        remote = found[0].remote
        says(here, found[0], body)
        line = eventually(lambda: [one for one in here.agent.main_log().decode().splitlines() if remote in one])[0]
        assert "the Bot returned something" in line and "does not go to the device" in line and "Ack" not in line


@pytest.mark.parametrize("wrong", [False, True])
def test_a_bot_that_frames_its_records_itself(here, wrong):
    """Numbers and checksums of its frames were records to the instrument: 1H|, then 99."""
    records = "H|\\^&", f"O|1|{'x' * 500}", "L|1|N"
    answer = b"\x05" + b"".join(frames_of(*records)) + b"\x04"
    with Instrument.at(here.ports["ASTM"]) as device:
        device.session(f"H|\\^&|||{wrong}", "L|1|N")
        found = here.sandbox.wait_for(lambda: [t for _, t in here.sandbox.seen if f"|||{wrong}\n" in t.body])
        says(here, found[0], answer.replace(b"\x023", b"\x027").decode() if wrong else answer.decode())
        assert b"".join(device.accept()).decode().split("\r") == [*records, ""]


@QUIET
@pytest.mark.parametrize("status", [500, "500", 400.0])
def test_a_query_that_the_server_failed_is_no_empty_worklist(here, status):
    """By a status that is a number in another form it was: success, and no match."""
    before, keys = len(here.sandbox.seen), Dataset()
    keys.PatientName = ""
    with associated(here, WORKLIST) as association, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: [*association.send_c_find(keys, WORKLIST)])
        here.sandbox.wait_for(lambda: len(here.sandbox.seen) > before)
        says(here, here.sandbox.seen[-1][1], [], status)
        ((answer, _),) = asked.result(10)
        assert (answer.Status, "status" in answer.ErrorComment) == (0xC001, True)
