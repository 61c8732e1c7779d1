"""Size: queues with many rows, many channels, long backlogs; what takes long or much there."""

import contextlib
import hashlib
import sqlite3
import time

import medplum_agent
from tests.support import changed, eventually, message, setting, site

DAY_MS = 86_400_000
PROCESSED, FAILED = medplum_agent.PROCESSED, medplum_agent.FAILED
DELIVERED, NOT_OWED = medplum_agent.DELIVERED, medplum_agent.NOT_OWED


def fill(agent, channel, count, *, state=0, outcome=0, days=0.0, size=0, kind="ADT^A01"):
    """Rows in the queue of an agent that is stopped, as if a channel had received them; their control ids."""
    with contextlib.closing(sqlite3.connect(agent.queue_path)) as db, db:
        first, row = db.execute("SELECT ifnull(max(m.id), 0) + 1, c.id FROM channel c LEFT JOIN message m WHERE "
            "c.name = ?", (channel,)).fetchone()  # fmt: skip
        at = int(time.time() * 1000 - days * DAY_MS)
        texts = [message(f"F{n}", f"P{n % 100}", size=size) for n in range(first, first + count)]
        checks = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") + 2 for text in texts]
        db.executemany(
            "INSERT INTO message (id, channel, epoch, state, outcome, remote, control_id, checked, type, key, original,"
            " encoding, received_at, settled_at) VALUES (?, ?, 0, ?, ?, '10.0.0.1:5', ?, ?, ?, ?, ?, 'utf-8', ?, ?)",
            [(n, row, state, outcome, f"F{n}", check, kind, f"P{n % 100}^HOSP", text.encode(), at, at)
             for n, text, check in zip(range(first, first + count), texts, checks, strict=True)],
        )  # fmt: skip
    return [f"F{n}" for n in range(first, first + count)]


# Each statement that has looked at many rows without an index, as SQLite itself counts them
TRACE = """
import apsw
def note(event):
    steps = event["stmt_status"]["SQLITE_STMTSTATUS_FULLSCAN_STEP"]
    if steps > 1100:
        with open({path!r}, "a") as file:
            file.write(f"{{steps}} {{' '.join(event['sql'].split())}}" + chr(10))
apsw.connection_hooks.append(lambda db: db.trace_v2(apsw.SQLITE_TRACE_PROFILE, note))
"""


def test_with_many_rows_no_statement_looks_at_all_of_them(tmp_path):
    """Each device's acknowledgment would wait for it: a start with 300 channels and a million rows took a minute."""
    (seen := tmp_path / "statements.txt").touch()
    channels = {
        "A": "?enhanced=true",
        "N": "?enhanced=true&assignSeqNo=true",
        "T": "tcp://127.0.0.1:{port}?endChar=%0A",
    }
    with site(tmp_path, channels, [setting("queueSweepIntervalSecs", 1)]) as here:
        with here.device("A") as device, here.device("N") as numbered:
            assert device.ask(message("TWICE", "P1"))[0] == numbered.ask(message("N1"))[0] == "CA"
            here.agent.wait_state("TWICE", "processed")
        here.agent.terminate()
        kept = fill(here.agent, "A", 1000, state=FAILED, outcome=NOT_OWED, days=30)
        fill(here.agent, "A", 3000, state=PROCESSED, outcome=DELIVERED, days=8)
        changed(here.agent, TRACE.format(path=str(seen)))
        here.agent.start()
        with here.device("A") as device, here.device("N") as numbered:
            assert device.ask(message("TWICE", "P1")) == ("AA", "TWICE")  # a repetition hears what the Bot said
            assert numbered.ask(message("N2"))[0] == "CA"
            assert device.ask(message("NEW"))[0] == "CA"
            eventually(lambda: here.sandbox.stats()["durableQueue"]["lastSweepDeletedProcessed"] == 0)
        states = here.sandbox.stats()["durableQueue"]["countsByState"]
        assert (states["failed"], states["processed"]) == (len(kept), 4)
    found = [line for line in seen.read_text().splitlines() if "count(*) FROM message)" not in line]  # of the stats
    assert not found
