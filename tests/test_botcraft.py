"""What Bot developers return and push, and what the device then sees."""

import json

import pytest
from demo import Transmit

from medplum_agent import Json
from tests.support import Site, message, site


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    channels = {
        "HL7": "", "CA": "?enhanced=true", "RAW": "tcp://127.0.0.1:{port}?startChar=%02&endChar=%03",
        "ASTM": "tcp://127.0.0.1:{port}?mode=astm",
    }  # fmt: skip
    with site(tmp_path_factory.mktemp("botcraft"), channels) as running:
        running.agent.logged("Medplum service started")
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
