"""The store in a real folder: on disk before released, repetitions, numbers, limits, disks that fail and recover."""

import asyncio
import contextlib
import io
import os
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import medplum_agent as ma

DAY = 86_400_000
CONSOLE = io.StringIO()
Scenario = Callable[[], Coroutine[Any, Any, None]]


@pytest.fixture(autouse=True)
def _fast_and_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ma, "STORE_REOPEN_SECS", 0.02)
    monkeypatch.setattr(ma, "LAZY_SECS", 0.01)
    monkeypatch.setitem(globals(), "CONSOLE", io.StringIO())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "queue.sqlite"


def run(scenario: Scenario) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(bounded())


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[ma.Store]:
    store = ma.Store(path, ma.Log("main", ma.LoggerSettings(), None, CONSOLE))
    await store.open()
    try:
        yield store
    finally:
        await store.close()
        assert not store._writer.is_alive(), "the writer did not end"
        store._read_connection = None


class Kept(NamedTuple):
    """What became of a message."""

    message: ma.Message

    @property
    def outcome(self) -> str:
        if self.message.refusal:
            return self.message.refusal
        if self.message.earlier:
            return "same" if self.message.earlier.same else "different"
        return "stored"


def new(channel: int, control_id: str, body: bytes = b"", **members: Any) -> ma.Message:
    message = ma.Message(channel, "10.0.0.1:5", body or f"MSH|^~\\&|{control_id}\r".encode(), "utf-8")
    message.text = (message.original or b"").decode(errors="replace")
    message.control_id, message.checked = control_id, bool(control_id)
    for name, value in members.items():
        setattr(message, name, value)
    return message


async def put(store: ma.Store, *messages: ma.Message) -> list[str]:
    loop, done = asyncio.get_running_loop(), []
    for message in messages:
        future: asyncio.Future[ma.Message] = loop.create_future()
        message.source = future.set_result
        done.append(future)
        store.put(message)
    return [Kept(await future).outcome for future in done]


async def in_one_batch(store: ma.Store, *messages: ma.Message) -> list[str]:
    """The writer is held up until all of them wait."""
    entered, go = threading.Event(), threading.Event()

    def hold(_: sqlite3.Connection) -> None:
        entered.set()
        go.wait(10)

    holding = store.call(hold)
    await asyncio.to_thread(entered.wait, 10)
    waiting = asyncio.ensure_future(put(store, *messages))
    await asyncio.sleep(0)  # `put` runs up to its first wait
    assert len(store._inbox) >= len(messages)
    go.set()
    await holding
    return await waiting


async def settled(store: ma.Store, message: ma.Message, state: int = ma.PROCESSED, **members: Any) -> None:
    before, message.state = message.state, state
    message.settled_at = ma.now_ms()
    for name, value in members.items():
        setattr(message, name, value)
    done = asyncio.get_running_loop().create_future()
    store.update(message, before, then=lambda: done.set_result(None))
    await done


async def healthy(store: ma.Store) -> None:
    while not store.healthy:  # noqa: ASYNC110 (it is the writer thread that mends it)
        await asyncio.sleep(0.005)


def rows(path: Path, sql: str = "SELECT control_id FROM message ORDER BY id") -> list[Any]:
    """What another process sees."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        found = db.execute(sql).fetchall()
    return [row[0] if len(row) == 1 else row for row in found]


# --- on disk before released ---


def test_a_message_is_committed_before_it_is_released(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            seen: list[list[str]] = []
            released = asyncio.Event()
            message = new(row.id, "1")

            def source(_: ma.Message) -> None:
                seen.append(rows(path))
                released.set()

            message.source = source
            store.put(message)
            await released.wait()
            assert seen == [["1"]]
            assert message.original is None and message.text == "MSH|^~\\&|1\r"

    run(scenario)


def test_a_commit_is_synced(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            pragmas = ("synchronous", "journal_mode", "application_id", "user_version")
            found = await store.call(lambda db: [db.execute(f"PRAGMA {p}").fetchone()[0] for p in pragmas])
            assert found == [2, "wal", ma.APPLICATION_ID, ma.SCHEMA_VERSION]

    run(scenario)


def test_what_is_stored(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            await put(store, new(row.id, "1", b"MSH|\xff\0", type="ADT^A01", key="123^HOSP", epoch=row.epoch))
            ((message, original, finalized),) = await store.queued(row.id, 0, 10)
            assert (message.id, message.control_id, message.type, message.key) == (1, "1", "ADT^A01", "123^HOSP")
            assert (message.remote, message.encoding, message.state) == ("10.0.0.1:5", "utf-8", ma.QUEUED)
            assert (original, finalized, message.size) == (b"MSH|\xff\0", None, 6)
            assert await store.bodies([1, 99]) == {1: (b"MSH|\xff\0", None)}
            assert await store.message(99) is None

    run(scenario)


def test_many_messages_share_few_commits(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            statements: list[str] = []
            await store.call(lambda db: db.set_trace_callback(statements.append))
            assert set(await in_one_batch(store, *(new(row.id, str(n)) for n in range(3000)))) == {"stored"}
            assert 1 <= sum(statement.startswith("COMMIT") for statement in statements) <= 3
            await store.call(lambda db: db.set_trace_callback(None))
            assert rows(path) == [str(n) for n in range(3000)]
            assert not store.congested and store._uncommitted == store._uncommitted_bytes == 0

    run(scenario)


def test_one_commit_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ma, "COMMIT_MESSAGES", 10)

    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            statements: list[str] = []
            await store.call(lambda db: db.set_trace_callback(statements.append))
            await in_one_batch(store, *(new(row.id, str(n)) for n in range(95)))
            assert sum(statement.startswith("COMMIT") for statement in statements) >= 10
            assert len(rows(path)) == 95

    run(scenario)


def test_messages_without_control_id_are_never_repetitions(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            assert await in_one_batch(store, *(new(row.id, "") for _ in range(3))) == ["stored"] * 3

    run(scenario)


def test_congestion_ends_with_one_call(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ma, "UNCOMMITTED_MESSAGES", 5)

    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            resumed: list[bool] = []
            done = []
            for n in range(20):
                message = new(row.id, str(n))
                done.append(asyncio.get_running_loop().create_future())
                message.source = done[-1].set_result
                store.put(message)
            assert store.congested
            store.on_resume.append(lambda: resumed.append(store.congested))
            await asyncio.gather(*done)
            assert resumed == [False] and not store.on_resume

    run(scenario)


def test_files_are_private(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            await put(store, new((await store.channel("ADT", "")).id, "1"))
            assert {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {
                "queue.sqlite": 0o600, "queue.sqlite-wal": 0o600, "queue.sqlite-shm": 0o600, "queue.sqlite.lock": 0o600,
            }  # fmt: skip

    old = os.umask(0o022)
    try:
        run(scenario)
    finally:
        os.umask(old)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_close_leaves_nothing_open(path: Path) -> None:
    async def scenario() -> None:
        store = ma.Store(path, ma.Log("main", ma.LoggerSettings(), None, CONSOLE))
        await store.open()
        row = await store.channel("ADT", "")
        await put(store, new(row.id, "1"))
        await store.queued(row.id, 0, 5)
        await store.close()
        links = [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
        assert [link for link in links if link.startswith(str(path))] == []
        assert [file.name for file in path.parent.iterdir()] == ["queue.sqlite"]

    run(scenario)


# --- channels ---


def test_a_channel_keeps_its_row_and_counts_its_epochs(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            one = await store.channel("ADT", "")
            other = await store.channel("ORU", "")
            await put(store, new(one.id, "1"), new(one.id, "2"), new(other.id, "1"))
        async with opened(path) as store:
            again = await store.channel("ADT", "")
            assert again == (one.id, one.epoch, 2, 2)
            changed = await store.channel("ADT", "PID-3")
            assert (changed.id, changed.epoch) == (one.id, one.epoch + 1)
            assert (await store.channel("ADT", "PID-3")).epoch == changed.epoch
            assert (await store.channel("ORU", "")).epoch == other.epoch

    run(scenario)


def test_queued_gives_the_unsettled_in_order_and_by_pages(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            messages = [new(row.id, str(n)) for n in range(6)]
            await put(store, *messages)
            await settled(store, messages[2])
            await settled(store, messages[3], ma.SENT)
            found = [message.control_id for message, _, _ in await store.queued(row.id, 0, 3)]
            assert found == ["0", "1", "3"]
            assert [message.control_id for message, _, _ in await store.queued(row.id, messages[3].id, 9)] == ["4", "5"]

    run(scenario)


def test_large_bodies_stay_on_disk(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            body = b"MSH|" + b"x" * 100_000
            await put(store, new(row.id, "1", body))
            ((message, original, _),) = await store.queued(row.id, 0, 3)
            assert original is None and message.size == len(body)
            assert (await store.bodies([message.id]))[message.id][0] == body

    run(scenario)


# --- repetitions (channel contract 5.3) ---


def test_repetitions_within_one_batch(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            repetition = new(row.id, "1")
            found = await in_one_batch(
                store, new(row.id, "1"), repetition, new(row.id, "1", b"MSH|other"), new(row.id, "2"), new(99, "1")
            )
            assert found == ["stored", "same", "different", "stored", "stored"]
            assert repetition.earlier is not None and repetition.earlier.message.id == 1
            assert rows(path) == ["1", "2", "1"]
            assert store.tally[ma.QUEUED] == 3

    run(scenario)


def test_repetitions_across_a_restart_and_after_the_end(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            first = new(row.id, "1")
            await put(store, first, new(row.id, "2"))
            await settled(store, first, ma.PROCESSED, response="MSH|answer", outcome=ma.DELIVERED, status_code=200)
        async with opened(path) as store:
            again = new(row.id, "1")
            assert await put(store, again, new(row.id, "2"), new(row.id, "2", b"MSH|x")) == [
                "same",
                "same",
                "different",
            ]
            assert again.earlier is not None
            earlier = again.earlier.message
            assert (earlier.state, earlier.response, earlier.outcome) == (ma.PROCESSED, "MSH|answer", ma.DELIVERED)

    run(scenario)


def test_what_was_nacked_is_no_earlier_message(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            audit = new(row.id, "1", state=ma.NACKED, outcome=ma.NOT_OWED, error_code="duplicate-rejected")
            audit.checked = False
            assert await put(store, audit, new(row.id, "1")) == ["stored", "stored"]
            assert store.tally[ma.NACKED] == 1

    run(scenario)


# --- numbers (channel contract 5.3: a failed insert burns no number) ---


def test_numbers_have_no_gaps(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            batch = [new(row.id, control, assign=True) for control in ("a", "a", "b", "", "b", "c")]
            found = await in_one_batch(store, *batch)
            assert found == ["stored", "same", "stored", "stored", "same", "stored"]
            assert [message.seq_no for message in batch if not message.earlier] == [0, 1, 2, 3]
        async with opened(path) as store:
            later = new(row.id, "d", assign=True)
            assert await put(store, new(row.id, "a", assign=True), later) == ["same", "stored"]
            assert later.seq_no == 4 and ma.Header(later.text or "").field(13) == "4"
            finalized = rows(path, "SELECT finalized FROM message ORDER BY id")
            assert [ma.Header(text).field(13) for text in finalized] == ["0", "1", "2", "3", "4"]

    run(scenario)


def test_a_failed_batch_burns_no_number(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            counted = store._count
            monkeypatch.setattr(store, "_count", failing(sqlite3.OperationalError("disk I/O error")))
            (refusal,) = await put(store, new(row.id, "a", assign=True))
            assert refusal.startswith("storage error")
            monkeypatch.setattr(store, "_count", counted)
            message = new(row.id, "a", assign=True)
            assert await put(store, message) == ["stored"]
            assert message.seq_no == 0

    run(scenario)


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


def test_ids_are_never_used_twice(path: Path) -> None:
    """The id makes the callback by which the server recognises a repetition: it must not come back after a sweep."""

    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            message = new(row.id, "1")
            await put(store, message)
            await settled(store, message, outcome=ma.DELIVERED, settled_at=1)
            assert await store.sweep(ma.AgentSettings()) == (1, 0)
            used = message.id
        async with opened(path) as store:
            message = new(row.id, "2")
            await put(store, message)
            assert message.id > used

    run(scenario)


# --- tally, limits, retention ---


def test_tally_follows_the_states_and_survives(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            messages = [new(row.id, str(n)) for n in range(6)]
            await put(store, *messages, new(row.id, "0"))
            await settled(store, messages[0], ma.SENT)
            await settled(store, messages[0], ma.PROCESSED)
            await settled(store, messages[1], ma.FAILED)
            await settled(store, messages[2], ma.REJECTED)
            expected = {ma.QUEUED: 3, ma.SENT: 0, ma.PROCESSED: 1, ma.REJECTED: 1, ma.FAILED: 1, ma.NACKED: 0}
            assert store.tally == expected
        async with opened(path) as store:
            assert store.tally == expected
            counted = dict(rows(path, "SELECT state, count(*) FROM message GROUP BY state"))
            assert counted == {state: count for state, count in expected.items() if count}

    run(scenario)


def test_the_queue_refuses_above_its_limit_and_goes_on_below(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ma, "LAZY_SECS", 0)  # the size is measured after each commit

    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            store.max_bytes = store.size_bytes + ma.MIB
            found = [(await put(store, new(row.id, str(n), b"x" * 100_000)))[0] for n in range(15)]
            assert found[:8] == ["stored"] * 8
            assert "storage error: the queue has reached its limit" in found[-1]
            assert found.count("stored") == len(rows(path)) < 12
            store.max_bytes = 0
            assert await put(store, new(row.id, "more")) == ["stored"]

    run(scenario)


async def aged(
    store: ma.Store, channel: int, count: int, state: int, days: float, outcome: int, size: int = 10
) -> None:
    messages = [new(channel, "", b"x" * size) for _ in range(count)]
    await put(store, *messages)
    for message in messages:
        await settled(store, message, state, outcome=outcome, settled_at=int(ma.now_ms() - days * DAY))


def test_retention_by_age(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            await aged(store, row.id, 3, ma.PROCESSED, 8, ma.DELIVERED)
            await aged(store, row.id, 2, ma.PROCESSED, 6, ma.DELIVERED)
            await aged(store, row.id, 2, ma.PROCESSED, 8, ma.UNDELIVERED)
            await aged(store, row.id, 2, ma.FAILED, 200, ma.NOT_OWED)
            await put(store, new(row.id, "waiting"))
            assert await store.sweep(ma.AgentSettings()) == (3, 0)
            assert store.tally == {0: 1, 1: 0, 2: 4, 3: 0, 4: 2, 5: 0}
            assert await store.sweep(ma.AgentSettings()) == (0, 0)
            assert len(rows(path)) == 7

    run(scenario)


def test_retention_by_size_spares_dead_letters_until_their_floor(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            await aged(store, row.id, 20, ma.PROCESSED, 0, ma.DELIVERED, 50_000)
            await aged(store, row.id, 10, ma.FAILED, 89, ma.NOT_OWED, 50_000)
            await aged(store, row.id, 10, ma.REJECTED, 91, ma.NOT_OWED, 50_000)
            await aged(store, row.id, 10, ma.PROCESSED, 91, ma.UNDELIVERED, 50_000)
            waiting = [new(row.id, "", b"x" * 50_000, received_at=1) for _ in range(10)]
            await put(store, *waiting)
            assert await store.sweep(ma.AgentSettings()) == (0, 0)
            assert store.size_bytes > 2 * ma.MIB
            assert await store.sweep(ma.AgentSettings(queueRetentionMaxMb=1)) == (20, 20)
            assert store.tally == {0: 10, 1: 0, 2: 0, 3: 0, 4: 10, 5: 0}

    run(scenario)


def test_retention_by_size_deletes_the_oldest_first_and_no_more_than_needed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ma, "SWEEP_ROWS", 4)

    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            await aged(store, row.id, 40, ma.PROCESSED, 0, ma.DELIVERED, 50_000)
            monkeypatch.setattr(ma, "LAZY_SECS", 3)  # a size measured long ago may not go on deleting
            store._measure_at = 0.0
            await store.call(lambda db: None)
            processed, _ = await store.sweep(ma.AgentSettings(queueRetentionMaxMb=1))
            monkeypatch.setattr(ma, "LAZY_SECS", 0)
            store._measure_at = 0.0
            await store.call(lambda db: None)
            assert store.size_bytes <= ma.MIB
            assert 16 <= processed <= 28
            assert rows(path, "SELECT min(id), count(*) FROM message") == [(processed + 1, 40 - processed)]
            assert path.stat().st_size < 40 * 50_000

    run(scenario)


def test_a_repetition_of_what_was_swept_is_new(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            message = new(row.id, "1")
            await put(store, message)
            await settled(store, message, outcome=ma.DELIVERED, settled_at=1)
            await store.sweep(ma.AgentSettings())
            assert await put(store, new(row.id, "1")) == ["stored"]

    run(scenario)


# --- files that cannot be used: refused with a reason, and recovered when mended ---


def junk(path: Path) -> None:
    path.write_bytes(b"this is not a database, " * 1000)


def foreign(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE precious (x)")
        db.execute("INSERT INTO precious VALUES (1)")
        db.commit()


def from_the_future(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(f"CREATE TABLE x (y); PRAGMA application_id={ma.APPLICATION_ID}; PRAGMA user_version=99;")


def directory(path: Path) -> None:
    path.mkdir()


def parent_is_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("a file")


def mended(path: Path) -> None:
    if path.parent.is_file():
        path.parent.unlink()
    elif path.is_dir():
        path.rmdir()
    else:
        path.rename(path.with_name("aside"))
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)


@pytest.mark.parametrize("obstacle", [junk, foreign, from_the_future, directory, parent_is_a_file])
def test_an_unusable_file_refuses_and_recovers(path: Path, obstacle: Callable[[Path], None]) -> None:
    path.parent.mkdir()
    obstacle(path)

    async def scenario() -> None:
        async with opened(path) as store:
            assert not store.healthy and store.trouble.startswith("storage error")
            assert await put(store, new(1, "1")) == [store.trouble]
            mended(path)
            await healthy(store)
            row = await store.channel("ADT", "")
            assert await put(store, new(row.id, "1")) == ["stored"]
            assert len(await store.queued(row.id, 0, 5)) == 1
            said = CONSOLE.getvalue()
            assert said.count("cannot be opened") == 1 and said.count("is open again") == 1
            assert str(path) in said

    run(scenario)


@pytest.mark.parametrize("obstacle", [junk, foreign, from_the_future])
def test_a_file_that_is_not_ours_is_not_changed(path: Path, obstacle: Callable[[Path], None]) -> None:
    path.parent.mkdir()
    obstacle(path)
    before = path.read_bytes()

    async def scenario() -> None:
        async with opened(path) as store:
            assert not store.healthy

    run(scenario)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_newer_file_is_not_called_damaged(path: Path) -> None:
    """After a downgrade the advice must not be to repair a file that is whole."""
    path.parent.mkdir()
    from_the_future(path)

    async def scenario() -> None:
        async with opened(path) as store:
            assert "damaged" not in store.trouble

    run(scenario)
    assert ".recover" not in CONSOLE.getvalue()


def test_calls_made_while_the_file_is_unusable_are_kept(path: Path) -> None:
    path.mkdir(parents=True)

    async def scenario() -> None:
        async with opened(path) as store:
            waiting = asyncio.ensure_future(store.channel("ADT", ""))
            await asyncio.sleep(0)
            path.rmdir()
            assert (await waiting).queued == 0

    run(scenario)


def test_a_damaged_file_is_refused_and_its_good_copy_taken(path: Path) -> None:
    async def first() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            await put(store, *(new(row.id, str(n), b"MSH|first") for n in range(50)))

    run(first)
    good = path.read_bytes()
    path.write_bytes(good[: ma.PAGE_BYTES] + os.urandom(len(good) - ma.PAGE_BYTES))

    async def second() -> None:
        async with opened(path) as store:
            assert store.trouble == "storage error: the queue file of the agent is damaged"
            assert ".recover" in CONSOLE.getvalue()
            path.with_name("good").write_bytes(good)
            path.with_name("good").replace(path)
            await healthy(store)
            row = await store.channel("ADT", "")
            assert row.queued == store.tally[ma.QUEUED] == len(await store.queued(row.id, 0, 99)) == 50
            assert await put(store, new(row.id, "1"), new(row.id, "50")) == ["different", "stored"]

    run(second)


def test_an_empty_file_after_a_damaged_one_counts_from_nothing(path: Path) -> None:
    """A person moves the file away while the agent runs: what is counted is what is in the new one."""

    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            await put(store, new(row.id, "1"), new(row.id, "2"))
            await store.queued(row.id, 0, 5)
            await store.call(lambda db: db.execute("DROP TABLE tally"))
            mended(path)
            (refusal,) = await put(store, new(row.id, "3"))
            assert refusal.startswith("storage error")
            row = await store.channel("ADT", "")
            assert await put(store, new(row.id, "4")) == ["stored"]
            assert rows(path) == ["4"]
            assert store.tally[ma.QUEUED] == 1
            assert [message.control_id for message, _, _ in await store.queued(row.id, 0, 9)] == ["4"], "the old file"

    run(scenario)


def test_the_folder_vanishes_and_comes_back(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            await put(store, new(row.id, "1"))
            shutil.rmtree(path.parent)
            (refusal,) = await put(store, new(row.id, "2"))
            assert refusal.startswith("storage error")
            row = await store.channel("ADT", "")
            assert await put(store, new(row.id, "3")) == ["stored"]
            assert rows(path) == ["3"]

    run(scenario)


def test_a_message_is_never_acknowledged_into_a_deleted_file(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            await put(store, new((await store.channel("ADT", "")).id, "1"))
            for file in path.parent.iterdir():
                file.unlink()
            (outcome,) = await put(store, new(1, "2"))
            assert outcome.startswith("storage error") or rows(path) == ["2"]

    run(scenario)


@pytest.mark.parametrize(
    "error", [RuntimeError("odd"), sqlite3.IntegrityError("no"), OverflowError("big"), OSError(5, "x")], ids=repr
)
def test_a_call_that_fails_fails_alone(path: Path, error: Exception) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            with pytest.raises((ma.StorageError, type(error))):
                await store.call(failing(error))
            assert await put(store, new(row.id, "1")) == ["stored"]
            assert store.tally[ma.QUEUED] == 1

    run(scenario)


def test_a_message_that_cannot_be_written_is_refused_and_the_writer_lives(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            (refusal,) = await put(store, new(row.id, "1", remote="\ud800"))
            assert refusal.startswith("storage error")
            assert await put(store, new(row.id, "1")) == ["stored"]

    run(scenario)


def test_a_failing_table_refuses_and_recovers(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            message = new(row.id, "1")
            await put(store, message)
            await store.call(lambda db: db.execute("ALTER TABLE message RENAME TO gone"))
            message.state, done = ma.PROCESSED, asyncio.get_running_loop().create_future()
            store.update(message, ma.QUEUED, then=lambda: done.set_result(None))
            (refusal,) = await put(store, new(row.id, "2"))
            assert refusal.startswith("storage error") and "message" not in refusal
            assert not done.done()
            with contextlib.closing(sqlite3.connect(path, timeout=10)) as db:
                db.execute("ALTER TABLE gone RENAME TO message")
                db.commit()
            await done
            assert rows(path, "SELECT control_id, state FROM message") == [("1", ma.PROCESSED)]
            assert store.tally == {0: 0, 1: 0, 2: 1, 3: 0, 4: 0, 5: 0}
            assert await put(store, new(row.id, "2")) == ["stored"]

    run(scenario)


# --- the disk is full ---


def test_a_nearly_full_disk_refuses_messages_and_keeps_settling(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ma, "LAZY_SECS", 0)  # the disk is looked at before each commit
    usage = shutil.disk_usage(path.parent.parent)

    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            message = new(row.id, "1")
            await put(store, message)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=10**12, free=ma.MIB))
            full = "storage error: the disk of the agent is full"
            done = asyncio.get_running_loop().create_future()
            message.state = ma.PROCESSED
            store.update(message, ma.QUEUED, then=lambda: done.set_result(None))
            assert await in_one_batch(store, new(row.id, "2"), new(row.id, "3")) == [full, full]
            await done
            assert rows(path, "SELECT control_id, state FROM message") == [("1", ma.PROCESSED)]
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=10**12, free=10**11))
            assert await put(store, new(row.id, "2")) == ["stored"]
            said = CONSOLE.getvalue()
            assert said.count("cannot be written") == 1 and said.count("can be written again") == 1

    run(scenario)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 5 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(mount)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("cannot mount a file system")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_really_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ma, "DISK_RESERVE_BYTES", 0)
    ballast, path = small_disk / "ballast", small_disk / "queue.sqlite"
    ballast.write_bytes(b"x" * 2_500_000)

    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            stored, outcome = [], ""
            for n in range(200):
                message = new(row.id, str(n), b"x" * 50_000)
                (outcome,) = await put(store, message)
                if outcome != "stored":
                    break
                stored.append(message)
            assert outcome == "storage error: the disk of the agent is full"
            assert len(stored) > 5
            settling = [asyncio.ensure_future(settled(store, message, response="y" * 500)) for message in stored]
            assert (await put(store, new(row.id, "refused", b"x" * 50_000)))[0].startswith("storage error")
            ballast.unlink()
            await asyncio.gather(*settling)
            assert await put(store, new(row.id, "again")) == ["stored"]
            expected = [(message.control_id, ma.PROCESSED) for message in stored]
            assert rows(path, "SELECT control_id, state FROM message ORDER BY id") == [*expected, ("again", ma.QUEUED)]

    run(scenario)


def test_close_writes_what_waits(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = await store.channel("ADT", "")
            message = new(row.id, "1")
            await put(store, message)
            message.state = ma.FAILED
            store.update(message, ma.QUEUED)
            for n in range(100):
                store.put(new(row.id, f"last {n}"))
        assert len(rows(path)) == 101
        assert rows(path, f"SELECT count(*) FROM message WHERE state = {ma.FAILED}") == [1]

    run(scenario)
