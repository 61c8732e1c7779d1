"""The contract towards devices as a stranger reads it: what differed from it once, one test each."""

import pytest

from tests.support import ack_text, control_id, eventually, message, setting, site

# --- pushes ---


# The default address listens for IPv4 and IPv6 with one socket, to which IPv4 devices are ::ffff:127.0.0.1
@pytest.mark.parametrize(("host", "name"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("::1", "0:0:0:0:0:0:0:1")])
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
