"""Batches of HL7 (FHS, BHS, BTS, FTS) that are taken in pieces."""

import threading

import pytest

from tests.support import ack_text, changed, control_id, message, site

IN_PIECES = """
import time
cut = m.split_batch
m.BATCH_MESSAGES = 10
def slowly(content):
    time.sleep(0.02)
    return cut(content)
m.split_batch = slowly
"""


def batch(*ids: str) -> str:
    middle = "".join(message(one, f"P-{one}") for one in ids)
    return f"FHS|^~\\&|A\rBHS|^~\\&|A\r{middle}BTS|{len(ids)}\rFTS|1\r"


@pytest.mark.parametrize("ending", ["device", "agent", "channel"])
def test_a_batch_that_was_begun_is_taken_whole(tmp_path, ending):
    """A sender may take the first acknowledgment for that of its frame, as MLLP has one for each."""
    with site(tmp_path, {"A": "?enhanced=true"}, start=False) as here:
        changed(here.agent, IN_PIECES)
        here.agent.start()
        ids = [f"B-{number}" for number in range(300)]
        with here.device("A") as device:
            device.send(batch(*ids))
            assert device.ack() == ("CA", "B-0")
            if ending == "device":
                device.reset()
            elif ending == "agent":
                here.agent.restart()
            else:
                here.endpoint("A")["status"] = "off"
                here.sandbox.reload()
                here.agent.logged("is off")
                here.endpoint("A")["status"] = "active"
                here.sandbox.reload()
            here.sandbox.wait_ids(*ids)
            assert sorted(here.sandbox.ids()) == sorted(ids)


def test_what_ends_a_batch_is_no_part_of_its_last_message(tmp_path):
    whole = {count: [f"{count}-{number}" for number in range(count)] for count in range(7, 13)}
    with site(tmp_path, {"A": "?enhanced=aa"}, start=False) as here:
        changed(here.agent, IN_PIECES)
        here.agent.start()
        with here.device("A") as device:
            for count, ids in whole.items():
                device.send(batch(*ids), message(f"BEHIND-{count}"))
                assert device.heard(count + 1) == [("AA", one) for one in (*ids, f"BEHIND-{count}")]
        here.sandbox.wait_ids(*(one for ids in whole.values() for one in ids))
        for one in (one for ids in whole.values() for one in ids):
            assert [transmit.body for transmit in here.sandbox.of(one)] == [message(one, f"P-{one}")]


def test_a_push_that_waits_makes_a_batch_no_slower(tmp_path):
    """Whether it holds the acknowledgment was looked for in all that was left, before each piece: 20 s for 14 MB."""
    (looked := tmp_path / "looked.txt").touch()
    note = f"(open({str(looked)!r}, 'a').write('.' * (len(body) > 100_000)), read(body))[1]"
    ids = [f"B-{number}" for number in range(3000)]
    with site(tmp_path, {"A": "?enhanced=aa"}, start=False) as here, here.caller() as caller:
        changed(here.agent, f"m.read_ack = lambda body, read=m.read_ack: {note}")
        here.agent.start()
        with here.device("A") as device:
            assert device.ask(message("HERE")) == ("AA", "HERE")
            push = threading.Thread(target=caller.push, args=("channel://A", message("PUSH-1")))
            push.start()
            assert control_id(device.receive()) == "PUSH-1"
            device.send(batch(*ids))
            assert device.heard(3000) == [("AA", one) for one in ids]
            device.send(ack_text("AA", "PUSH-1"))
            push.join(10)
        assert not looked.read_text()
