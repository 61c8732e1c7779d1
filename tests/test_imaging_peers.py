"""Imaging with peers, and under conditions, that no other test has: gateways, archives and devices of other makers."""

import ssl
from typing import Any

import pytest

from tests.dicom_peers import FAST, QUIET, SUCCESS, Tls, made, silent_bot, start, store
from tests.support import site

pytestmark = QUIET


# --- the server ---


@pytest.mark.parametrize("secure", [False, True])
def test_a_gateway_that_refuses_an_object_before_it_has_read_it(tmp_path, secure):
    """413 at once, and the connection is closed, as nginx and others do: the object was sent for 72 hours, its study
    behind it, and its reason was `the connection was lost each time it was sent`.

    Over TLS the line broke with an error that urllib3 does not take for one behind which an answer waits.
    """
    tls = Tls(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.agent_file)
    trusting: dict[str, Any] = {"context": context, "config": f'caFile = "{tls.ca_file}"\n'} if secure else {}
    address = f"dicom://127.0.0.1:{{port}}?{FAST}&storage=dicomweb"
    with site(tmp_path, {"PACS": address}, start=False, **trusting) as here:
        here.sandbox.bot = silent_bot
        here.sandbox.faults.stow_cuts = ["413"] * 1000
        start(here)
        instance = made(20_000_000)
        assert store(here.ports["PACS"], instance) == [SUCCESS]
        assert here.agent.wait_state(instance.uid, "rejected")["error_code"] == "file-too-large"
