"""Hardship of disk and network that lasts, and faults that come together."""

import contextlib
import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.support import changed, message, site

# --- the queue ---


@pytest.mark.parametrize("how", ["replaced", "moved away"])
def test_the_log_of_a_queue_that_was_replaced_is_not_written_into_the_next(tmp_path: Path, how: str) -> None:
    """A copy of yesterday was put in the place of the running queue: SQLite wrote today's log into it, which damaged
    it with what was accepted since; of one that was moved away it deleted the log."""
    with site(tmp_path, {"FEED": "?enhanced=aa"}, start=False) as here:
        changed(here.agent, "m.CHECKPOINT_PAGES = 40")
        here.agent.start()
        queue, copy = here.agent.queue_path, tmp_path / "yesterday"
        with here.device("FEED") as device:
            for n in range(30):
                assert device.ask(message(f"OLD-{n}"))[0] == "AA"
            with contextlib.closing(here.agent.database()) as db, contextlib.closing(sqlite3.connect(copy)) as other:
                db.backup(other)
            here.sandbox.faults.silent = True
            for n in range(200):
                assert device.ask(message(f"TODAY-{n}", f"P{n % 9}", size=9000))[0] == "AA"
            if how == "replaced":
                copy.rename(queue)
            else:
                queue.rename(tmp_path / "away")
            refused = [n for n in range(100) if device.ask(message(f"NEW-{n}", f"P{n % 9}"))[0] != "AA"]
            assert len(refused) < 50
        here.sandbox.faults.silent = False
        here.agent.kill()
        here.agent.start()
        here.sandbox.wait_ids(*(f"NEW-{n}" for n in range(100) if n not in refused), timeout=15)
        with contextlib.closing(here.agent.database()) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        here.agent.logged("belongs to the queue file that was moved or replaced")
        (log,) = here.agent.state_dir.glob("*-wal.replaced-*")
        if how == "moved away":
            shutil.copy(log, tmp_path / "away-wal")
            with contextlib.closing(sqlite3.connect(tmp_path / "away")) as db:
                assert db.execute("SELECT count(*) FROM message WHERE control_id LIKE 'TODAY%'").fetchone() == (200,)
