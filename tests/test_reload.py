"""Reloads of the configuration while traffic runs: nothing is lost, doubled, or answered in a wrong way."""

import contextlib
import itertools
import json
import socket

import pytest
from demo import Transmit

from tests.dicom_peers import Tls
from tests.instruments import Instrument
from tests.support import Receiver, Site, accepts, eventually, message, site

HL7, RAW, ASTM, DICOM = "mllp", "tcp?startChar=%02&endChar=%03&bodyEncoding=utf-8", "tcp?mode=astm", "dicom"
ANSWERS = {
    HL7: "MSH|^~\\&|BOT|S|||20260101||ACK|B1|P|2.5.1\rMSA|AA|OLD", RAW: "\x02ORDER\x03",
    ASTM: "H|\\^&\nO|1|X\nL|1|N\n",
}  # fmt: skip


def address(kind: str, port: int) -> str:
    scheme, mark, query = kind.partition("?")
    return f"{scheme}://127.0.0.1:{port}{mark}{query}"


@contextlib.contextmanager
def lone(folder, kind: str):
    """A site with one channel, LAB, of any protocol."""
    with site(folder, {"LAB": address(kind, 0).replace(":0", ":{port}")}, start=False) as here:
        here.agent.start(ready=False)
        eventually(lambda: accepts(("127.0.0.1", here.ports["LAB"])), 20)
        here.agent.wait_connected()
        yield here


def reload(here: Site) -> None:
    assert (answer := here.sandbox.reload())["type"] == "agent:reloadconfig:response", answer


def answer(here: Site, asked: Transmit, body: str) -> None:
    """The Bot's late answer, and the agent has read it."""
    kind = "agent:transmit:response"
    words = {"type": kind, "callback": asked.callback, "remote": asked.remote, "statusCode": 200, "body": body}
    here.sandbox.tell(json.dumps(words).encode())
    here.sandbox.stats()


def outcomes(here: Site) -> list[str]:
    with contextlib.closing(here.agent.database()) as db:
        return [outcome for (outcome,) in db.execute("SELECT ack_outcome FROM queue ORDER BY id")]


@pytest.mark.parametrize("narrowed", ["peers=10.0.0.0/8", "tls=true"])
def test_who_is_shut_out_by_a_reload_is_disconnected(tmp_path, narrowed):
    """An open connection went on, in clear text, for as long as the device kept it."""
    certificate = f"certFile={Tls(tmp_path).agent_file}" if narrowed == "tls=true" else ""
    with (
        site(tmp_path, {"A": "?enhanced=aa", "B": "?enhanced=aa"}) as here,
        here.device("A") as out,
        here.device("B") as stays,
    ):
        for device in (out, stays):
            assert device.ask(message("1"))[0] == "AA"
        here.endpoint("A")["address"] += f"&{narrowed}&{certificate}"
        here.endpoint("B")["address"] += "&peers=127.0.0.0/8"
        reload(here)
        assert out.closed_by_peer() and stays.ask(message("2"))[0] == "AA"
        here.agent.logged("tls is on now" if certificate else "not among peers any more")


@pytest.mark.parametrize("kinds", [(HL7, ASTM, RAW, HL7, DICOM), (HL7, RAW, ASTM, HL7)])
def test_an_answer_owed_by_another_protocol_goes_to_nobody(tmp_path, kinds):
    """The same port and the same host, but another device: it would take the answer for one to its own message."""
    with lone(tmp_path, HL7) as here:
        here.sandbox.faults.silent = True
        for number, (kind, then) in enumerate(itertools.pairwise(kinds)):
            with Instrument.at(here.ports["LAB"]) as device:
                if kind == ASTM:
                    device.session("H|\\^&|||OLD", "Q|1|^1", "L|1|N")
                else:
                    device.write(
                        b"\x02OLD\x03" if kind == RAW else b"\x0b" + message(f"OLD-{number}").encode() + b"\x1c\r"
                    )
                (_, asked), *_ = here.sandbox.wait_for(lambda before=number: here.sandbox.seen[before:])
                here.endpoint("LAB")["address"] = address(then, here.ports["LAB"])
                reload(here)
            with Instrument.at(here.ports["LAB"]) as device:
                eventually(lambda: here.sandbox.stats())
                answer(here, asked, ANSWERS[kind])
                assert device.quiet(0.05) == b"", (kind, then)
                eventually(lambda: outcomes(here)[-1] == "undelivered", what=f"{kind} {then}")


CHANGES = {
    "off": lambda agent, endpoint: endpoint.update(status="off"),
    "removed": lambda agent, endpoint: agent.update(channel=[]),
    "renamed": lambda agent, endpoint: agent["channel"][0].update(name="B"),
    "another protocol": lambda agent, endpoint: endpoint.update(
        address=endpoint["address"].replace("mllps", "tcp").replace("enhanced=aa", "tls=true&mode=astm")
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_handshake_that_outlasts_its_channel_leads_nowhere(tmp_path, change):
    """A device that was connecting is not acknowledged for a channel that is gone, where its messages would wait."""
    tls = Tls(tmp_path)
    query = f"enhanced=aa&certFile={tls.agent_file}"
    with site(tmp_path, {"A": f"mllps://127.0.0.1:{{port}}?{query}"}) as here:
        with socket.create_connection(("127.0.0.1", here.ports["A"]), timeout=5) as plain:
            here.sandbox.stats()  # by now it is accepted
            CHANGES[change](here.sandbox.resource("Agent/agent-1"), here.endpoint("A"))
            reload(here)
            with contextlib.suppress(OSError), tls.context().wrap_socket(plain, server_hostname="127.0.0.1") as device:
                device.sendall(b"\x0b" + message("LOST").encode() + b"\x1c\r")
                assert device.recv(1) == b""
        here.sandbox.stats()
        assert not here.agent.rows("LOST")


@pytest.mark.parametrize("value", ["1e305", "9" * 20])
def test_a_number_beyond_all_reason_is_ignored(tmp_path, value):
    """As hours, minutes or days in ms it is none that Python or SQLite has: no device could connect any more."""
    names = "duplicateWindowHours autoRetryBaseDelayMs autoRetryMaxDelayMs responseTimeoutSecs maxMessageBytes".split()
    with lone(tmp_path, HL7) as here:
        here.endpoint("LAB")["address"] += "?enhanced=aa&" + "&".join(f"{name}={value}" for name in names)
        reload(here)
        with here.device("LAB") as device:
            assert device.ask(message("BEYOND")) == ("AA", "BEYOND")
        for name in names:
            here.agent.logged(f"{name} '{value}'")


def test_what_is_ignored_of_a_device_url_is_said(tmp_path):
    """Channel contract 7: a wrong value is warned about; a push would quietly wait for another time, or another ACK."""
    with lone(tmp_path, HL7) as here, here.caller() as caller, Receiver() as device:
        wrong = "?ackTimeoutSec=30&defaultReturnAck=sometimes&connectTimeoutSecs=soon"
        assert caller.push(device.url(wrong), message("URL")).status == 200
        for words in ("unknown parameter 'ackTimeoutSec'", "defaultReturnAck 'sometimes'", "connectTimeoutSecs 'soon'"):
            line = here.agent.logged(words)
            assert f"mllp://127.0.0.1:{device.port}: " in line and "WARN" in line
