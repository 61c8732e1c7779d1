"""What the reference agent's own tests and guides promise, and this one once did not keep, one test each."""

import json

from tests.instruments import ACK, ENQ, Instrument
from tests.support import SandboxThread, Site, message, site

RAW = "tcp://0.0.0.0:{port}?startChar=%02&endChar=%03"


def bodies(sandbox: SandboxThread, count: int) -> list[str]:
    sandbox.wait_for(lambda: len(sandbox.seen) >= count, what=f"{count} messages")
    return [transmit.body for _, transmit in sandbox.seen]


def instrument(here: Site, channel: str) -> Instrument:
    here.agent.logged("Medplum service started successfully.")
    return Instrument.at(here.ports[channel])


def test_one_bad_entry_of_a_list_is_left_out_and_the_others_count(tmp_path):
    """Its parsers drop each entry that is wrong, with a warning; an instrument waits for the ACK of its ENQ."""
    query = "&autoRespond=%05:%06,%03,%04:%E9&stripSequence=%0D,%E9&bodyEncoding=utf-8"
    with site(tmp_path, {"A": RAW + query}) as here, instrument(here, "A") as line:
        assert line.ask(ENQ) == ACK
        line.write(b"\x02a\rb\x03")
        assert bodies(here.sandbox, 1) == ["\x02ab\x03"]
        for wrong in ("autoRespond '\\u0003' needs the form", "autoRespond '\\u0004:", "stripSequence '\ufffd'"):
            assert here.agent.logged(wrong)


def test_an_astm_channel_may_say_that_its_bodies_are_hex(tmp_path):
    """Text is only the default of `mode=astm`: a Bot that was written for hex decodes what it gets, and answers so."""
    with site(tmp_path, {"A": "tcp://0.0.0.0:{port}?mode=astm&bodyEncoding=hex"}, start=False) as here:
        here.sandbox.bot = lambda transmit: (200, bytes.fromhex(transmit.body).replace(b"GLU", b"Gl\xc3\xbc").hex())
        here.agent.start()
        with instrument(here, "A") as line:
            line.session("H|\\^&", "R|1|GLU|95", "L|1|N")
            assert line.accept() == [b"H|\\^&\r", b"R|1|Gl\xfc|95\r", b"L|1|N\r"]
        assert bodies(here.sandbox, 1) == [b"H|\\^&\nR|1|GLU|95\nL|1|N\n".hex()]
        here.sandbox.stop()
        with instrument(here, "A") as line:
            line.session("H|\\^&", "R|1|NA|140", "L|1|N")
        here.agent.kill()
        here.sandbox.start()
        here.agent.start()
        assert bodies(here.sandbox, 2)[1] == b"H|\\^&\nR|1|NA|140\nL|1|N\n".hex()


def test_stats_count_every_state_of_the_reference(tmp_path):
    """A dashboard adds them up: one that is not there makes the sum no number."""
    with site(tmp_path, {"A": ""}) as here:
        here.agent.wait_connected()
        counts = here.sandbox.stats()["durableQueue"]["countsByState"]
        assert counts == dict.fromkeys("queued delayed claimed inflight processed rejected failed nacked".split(), 0)


def test_a_server_that_does_not_know_a_type_says_nothing_of_a_message(tmp_path):
    """While servers are renewed one by one, the one we are connected to may not know what another has asked for."""
    with site(tmp_path, {"A": ""}) as here:
        here.agent.wait_connected()
        here.sandbox.faults.delay = lambda: 0.5
        error = {"type": "agent:error", "body": "Unknown message type: agent:stats:response"}
        with here.device("A") as device:
            device.send(message("M1"))
            here.sandbox.wait_ids("M1")
            here.sandbox.tell(json.dumps(error).encode())
            assert device.ack() == ("AA", "M1")
        assert here.sandbox.ids() == ["M1"]
