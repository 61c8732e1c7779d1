"""Batches of HL7 (FHS, BHS, BTS, FTS) that are taken in pieces."""

import pytest

from tests.support import changed, message, site

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
