"""The contract towards devices as a stranger reads it: what differed from it once, one test each."""

import shutil
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.dicom_peers import IMPLICIT, MPPS, STUDY_FIND, VERIFICATION, WORKLIST, Scu
from tests.instruments import Cable, Instrument, rows
from tests.support import Receiver, ack_text, acknowledgment, control_id, eventually, message, setting, site

HL7 = "x-application/hl7-v2+er7"


# --- acknowledgments ---


def test_a_refusal_of_msh_without_a_field_separator_has_one(tmp_path):
    """The device heard fields that ended in carriage returns: MSH, ^~\\&, ... each a segment of its own."""
    with site(tmp_path, {"A": ""}) as here, here.device("A") as device:
        device.send("MSH\rPID|1||PAT-1^^^HOSP^MR")
        assert acknowledgment(device.receive()) == ("AR", "")


# --- pushes ---


@pytest.mark.parametrize("kind", [f"{HL7}; charset=utf-8", HL7.upper()])
def test_a_content_type_is_read_as_mime_has_it(tmp_path, kind):
    """RFC 2045 5.1: parameters and case do not make another type. An MLLP device got HL7 without frames, and the caller
    heard that this was done; a device at a channel was refused it."""
    with site(tmp_path, {"A": ""}) as here, here.device("A") as device, here.caller() as caller, Receiver() as receiver:
        assert "MSA|AA|TCP" in caller.push(receiver.url(scheme="tcp"), message("TCP"), contentType=kind).text
        with ThreadPoolExecutor(1) as pool:
            push = pool.submit(caller.push, "channel://A", message("CHANNEL"), contentType=kind)
            assert control_id(device.receive()) == "CHANNEL", push.result()
            device.send(ack_text("AA", "CHANNEL"))
            assert "MSA|AA|CHANNEL" in push.result().text


# The default address listens for IPv4 and IPv6 with one socket, to which IPv4 devices are ::ffff:127.0.0.1
@pytest.mark.parametrize(("host", "name"), [("127.0.0.1", "127.0.0.1"), ("::1", "[0:0:0:0:0:0:0:1]")])
def test_a_stored_push_to_a_device_by_its_address(tmp_path, host, name):
    """It goes when the device connects, and not up to a minute later; its late acknowledgment ends it, so that it does
    not go twice; and there is more than one way to write an address."""
    settings = [setting("channelAutoRetryBaseDelayMs", 60_000)]
    with site(tmp_path, {"A": "mllp://0.0.0.0:{port}"}, settings) as here, here.caller() as caller:
        caller.store(f"channel://A/{name}?ackTimeoutSecs=1", message("STORED"))
        eventually(lambda: any(row["error_code"] for row in here.agent.rows("STORED")))
        with here.device("A", host=host) as device:
            assert control_id(device.receive()) == "STORED"
            eventually(lambda: here.agent.rows("STORED")[0]["attempts"] == 2)
            eventually(lambda: here.agent.rows("STORED")[0]["error_code"] == "device-silent")
            device.send(ack_text("AA", "STORED"))
            here.agent.wait_state("STORED", "processed")


@pytest.mark.skipif(not shutil.which("socat"), reason="socat is not installed")
def test_a_stored_order_goes_when_its_serial_port_is_there(tmp_path):
    """As one does that names the channel, and not up to a minute later."""
    (cable := Cable(tmp_path)).unplug()
    channels = {"LAB": cable.address("?mode=astm"), "A": ""}
    with site(tmp_path, channels, [setting("channelAutoRetryBaseDelayMs", 60_000)]) as here, here.caller() as caller:
        caller.store(f"serial://{cable.agent}", "H|\\^&\nL|1|N\n", contentType="x-application/astm-e1394")
        eventually(lambda: any(row["error_code"] for row in rows(here, f"push serial://{cable.agent}")))
        with cable:
            cable.plug()
            here.agent.logged(f"{cable.agent} is open")
            with cable.open() as device:
                assert device.accept(8) == [b"H|\\^&\r", b"L|1|N\r"]


@pytest.mark.parametrize(("query", "encoding"), [("", "latin-1"), ("&encoding=utf-8", "utf-8")])
def test_records_for_an_instrument_that_listens_are_latin_1(tmp_path, query, encoding):
    """As E1394 has it, and one at a channel gets them (contract 10): a name on a label had two letters for one."""
    records = ["H|\\^&", "P|1||||Gr\u00fcnwald^J\u00f6rg", "L|1|N"]
    with site(tmp_path, {"A": ""}) as here, here.caller() as caller, socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"tcp://127.0.0.1:{listener.getsockname()[1]}?mode=astm{query}"
        caller.store(url, "\n".join(records), contentType="x-application/astm-e1394")
        with Instrument(listener.accept()[0]) as device:
            assert device.accept() == [f"{record}\r".encode(encoding) for record in records]


# --- imaging ---


def test_a_query_in_a_presentation_context_of_another_class_is_refused(tmp_path):
    """PS3.7 9.1.2.1.6: SOP class not supported. The Bot was asked for patients of the verification class."""
    with site(tmp_path, {"A": "", "DICOM": "dicom://127.0.0.1:{port}"}, start=False) as here:
        here.agent.start()
        here.agent.logged("started successfully")
        with Scu(here.ports["DICOM"], [(uid, (IMPLICIT,)) for uid in (VERIFICATION, STUDY_FIND, MPPS)]) as scu:
            for uid, command in (VERIFICATION, 0x20), (MPPS, 0x20), (STUDY_FIND, 0x10), (WORKLIST, 0x20):
                context = scu.accepted.get((uid, IMPLICIT), 1)
                scu.request(context, {2: uid, 0x0100: command}, b"")
                assert scu.status() == 0x0122, uid
        assert here.sandbox.seen == []
