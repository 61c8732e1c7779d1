"""Programs and recordings of others that came to this project late: what they showed, in messages of our own."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from demo import accepting_bot

from medplum_agent import astm_frame
from tests.instruments import ACK, ENQ, EOT, ETB, Instrument
from tests.support import Receiver, message, setting, site


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    channels = {"HL7": "", "LAB": "tcp://127.0.0.1:{port}?mode=astm"}
    with site(tmp_path_factory.mktemp("strangers"), channels, [setting("channelAutoRetryBaseDelayMs", 100)]) as running:
        yield running


@pytest.fixture(autouse=True)
def bot(here):
    here.sandbox.bot = accepting_bot


# --- MLLP release 2 ---


def test_a_negative_commit_acknowledgment_ends_a_push_at_once(here):
    """It was waited for until the time was over, and the log said that a message came that is no acknowledgment."""
    said = [b"\x15", b"\x06", b"\x15", b"\x06"]

    def behave(link, text):
        link.send_raw(b"\x0b" + (commit := said.pop(0)) + b"\x1c\r")
        if commit == b"\x06":
            link.ack("AA", text.split("|")[9])

    with here.caller() as caller, Receiver(behave) as device:
        answer = caller.push(device.url("?ackTimeoutSecs=9"), message("COMMIT-1"))
        assert answer.status == 400 and "did not commit the message" in answer.text and answer.seconds < 6, answer
        assert caller.push(device.url(), message("COMMIT-1")).status == 200
        caller.store(device.url("?ackTimeoutSecs=60"), message("COMMIT-2"))
        assert here.agent.wait_state("COMMIT-2", "processed")["attempts"] == 2
    assert b"that is no acknowledgment" not in here.agent.main_log()


def test_a_negative_commit_acknowledgment_of_a_connected_device(here):
    with here.caller() as caller, here.device("HL7") as device, ThreadPoolExecutor(1) as pool:
        device.ask(message("COMMIT-3"))
        push = pool.submit(caller.push, "channel://HL7?ackTimeoutSecs=9", message("COMMIT-4"))
        device.receive()
        device.send(b"\x15")
        assert "did not commit the message" in push.result().text and push.result().seconds < 6


# --- batches ---


@pytest.mark.parametrize("trailer", ["BTS|3\rFTS|1\r", "FTS|1", "FTS|1|end of the night\r\n"])
def test_a_batch_whose_segments_have_frames_of_their_own(here, trailer):
    """The count that a trailer begins with was MSH-2 of the answer, which no parser then took."""
    with here.device("HL7") as device:
        device.send("FHS|^~\\&|LAB|WARD\rBHS|^~\\&|LAB|WARD\r", message(f"FRAMED-{trailer[:9]}"), trailer)
        answers = [device.receive() for _ in range(3)]
    assert [answer[:9] for answer in answers] == ["MSH|^~\\&|"] * 3
    assert [answer.split("\rMSA|")[1][:2] for answer in answers] == ["AA"] * 3


# --- encodings ---


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_message_in_utf_16_is_named(here, encoding):
    """Its sender heard that it does not start with MSH, which on its screen it did."""
    with here.device("HL7") as device:
        device.send(message("WIDE").encode(encoding))
        assert "it is UTF-16, which MLLP cannot frame" in device.receive()


@pytest.mark.parametrize(
    ("encoding", "named", "facility"),
    [
        ("big5", "BIG-5", "臺大醫院"), ("big5", "BIG5", "院院院"), ("cp932", "SHIFT_JIS", "ポート"),
        ("gb18030", "GB 18030-2000", b"\xc0\x7c\xb0\xa2".decode("gb18030")),
    ],
)  # fmt: skip
def test_a_character_that_ends_like_a_separator_does_not_hide_msh_18(here, encoding, named, facility):
    """In Big5 the last byte of "hospital" is 0x7C: the Bot got it as U+FFFD, and the answer named no message."""
    text = (
        f"MSH|^~\\&|HIS|{facility}|LAB|{facility}|20260101||ORU^R01|B5-{named}|P|2.5||||||{named}\rPID|1||{facility}\r"
    )
    assert b"|" in facility.encode(encoding)
    with here.device("HL7") as device:
        device.send(text.encode(encoding))
        answer = device.receive_bytes().decode(encoding)
    assert answer.split("\rMSA|")[1].startswith(f"AA|B5-{named}|")
    assert here.sandbox.of(f"B5-{named}")[0].body == text


def test_a_repetition_from_a_hospital_whose_name_ends_like_a_separator(here):
    """With another MSH-7 it was taken as a new message, and the Bot got it twice."""
    for when in ("20260101", "20260102"):
        with here.device("HL7") as device:
            device.send(f"MSH|^~\\&|HIS|醫院|LAB|X|{when}||ORU^R01|B5-AGAIN|P|2.5||||||BIG5\rPID|1||7\r".encode("big5"))
            device.receive_bytes()
    assert len(here.sandbox.of("B5-AGAIN")) == 1


# --- instruments ---


def test_an_instrument_that_ends_each_record_with_etb(here):
    """Its L record says that nothing follows, whatever ends the frame: each of its results was a dead letter."""
    records = [b"H|\\^&|||ETB^1\r", b"P|1\r", b"R|1|^^^GLU|5.4\r", b"L|1|N\r"]
    with Instrument.at(here.ports["LAB"]) as device:
        assert device.ask(ENQ) == ACK
        for number, record in enumerate(records, 1):
            assert device.ask(astm_frame(number, record, ETB[0])) == ACK
        device.write(EOT)
        text = b"".join(records).decode().replace("\r", "\n")
        here.sandbox.wait_for(lambda: [t for _, t in here.sandbox.seen if t.body == text])
