"""The store in a real folder: on disk before released, repetitions, numbers, limits, disks that fail and recover."""

import asyncio
import contextlib
import io
import os
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import pytest

import medplum_agent as ma

DAY = 86_400_000
CONSOLE = io.StringIO()
Scenario = Callable[[], Coroutine[Any, Any, None]]


@pytest.fixture(autouse=True, params=["thread", "loop"])
def _fast_and_quiet(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything twice: written by the writer's thread, and in the loop's where that may be."""
    if request.param == "loop":
        monkeypatch.setattr(ma, "QUICK_COMMITS", 0)
        monkeypatch.setattr(ma, "QUICK_SECS", 60)
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
            return "same"
        return "stored"


def new(row: ma.ChannelRow, control_id: str, body: bytes = b"", **members: Any) -> ma.Message:
    message = ma.Message(row, "10.0.0.1:5", body or f"MSH|^~\\&|{control_id}\r".encode())
    message.text = (message.original or b"").decode(errors="replace")
    message.control_id, message.checked = control_id, ma.message_hash(message.original or b"") if control_id else None
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


@contextlib.asynccontextmanager
async def held(store: ma.Store) -> AsyncIterator[None]:
    """The writer is held up: what is asked for inside is its next batch."""
    entered, go = threading.Event(), threading.Event()

    def hold(_: ma.Database) -> None:
        entered.set()
        go.wait(10)

    holding = store.call(hold)
    await asyncio.to_thread(entered.wait, 10)
    try:
        yield
    finally:
        go.set()
        await holding


async def in_one_batch(store: ma.Store, *messages: ma.Message) -> list[str]:
    async with held(store):
        waiting = asyncio.ensure_future(put(store, *messages))
        await asyncio.sleep(0)  # `put` runs up to its first wait
        assert len(store._inbox) >= len(messages)
    return await waiting


async def settled(store: ma.Store, message: ma.Message, state: int = ma.PROCESSED, **members: Any) -> None:
    message.state = state
    message.settled_at = ma.now_ms()
    for name, value in members.items():
        setattr(message, name, value)
    done = asyncio.get_running_loop().create_future()
    store.update(message, then=lambda: done.set_result(None))
    await done


async def states(store: ma.Store) -> dict[str, int]:
    """Messages by state, without those that have none."""
    return {state: count for state, count in (await store.counts()).items() if count}


async def healthy(store: ma.Store) -> None:
    while not store.healthy:  # noqa: ASYNC110 (it is the writer thread that mends it)
        await asyncio.sleep(0.005)


def database(path: Path) -> ma.Database:
    path.touch()
    return ma.Database(path)


def noting(statements: list[str]) -> Callable[..., bool]:
    def note(_: object, sql: str, values: object) -> bool:
        statements.append(sql)
        return True

    return note


def rows(path: Path, sql: str = "SELECT control_id FROM message ORDER BY id") -> list[Any]:
    """What another process sees."""
    with contextlib.closing(database(path)) as db:
        found = db.execute(sql).fetchall()
    return [row[0] if len(row) == 1 else row for row in found]


# --- on disk before released ---


def test_a_message_is_committed_before_it_is_released(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            seen: list[list[str]] = []
            released = asyncio.Event()
            message = new(row, "1")

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
            found = await store.call(lambda db: [db.one(f"PRAGMA {p}") for p in pragmas])
            assert found == [2, "wal", ma.APPLICATION_ID, ma.SCHEMA_VERSION]

    run(scenario)


def test_what_is_stored(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            await put(store, new(row, "1", b"MSH|\xff\0", type="ADT^A01", key="123^HOSP"))
            ((message, original),) = await store.queued(row, 0, 10)
            assert (message.id, message.control_id, message.type, message.key) == (1, "1", "ADT^A01", "123^HOSP")
            assert (message.remote, message.encoding, message.state) == ("10.0.0.1:5", "utf-8", ma.QUEUED)
            assert (original, message.finalized, message.size) == (b"MSH|\xff\0", None, 6)
            assert await store.bodies([1, 99]) == {1: (b"MSH|\xff\0", None)}
            assert await store.message(99) is None

    run(scenario)


def test_many_messages_share_few_commits(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            statements: list[str] = []
            await store.call(lambda db: db.set_exec_trace(noting(statements)))
            assert set(await in_one_batch(store, *(new(row, str(n)) for n in range(3000)))) == {"stored"}
            assert 1 <= sum(statement.startswith("COMMIT") for statement in statements) <= 3
            await store.call(lambda db: db.set_exec_trace(None))
            assert rows(path) == [str(n) for n in range(3000)]
            assert not store.congested and store._uncommitted == store._uncommitted_bytes == 0

    run(scenario)


def test_on_a_slow_disk_devices_share_each_commit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not take turns, each with every other commit, because the first is quicker than the others."""
    commits, execute = [0], ma.Database.execute

    def slow(db: ma.Database, sql: str, *values: Any) -> Any:
        if sql == "COMMIT":
            commits[0] += 1
            time.sleep(0.05)
        return execute(db, sql, *values)

    monkeypatch.setattr(ma, "QUICK_SECS", 0.002)  # the writer's thread writes, in both runs
    monkeypatch.setattr(ma, "QUICK_COMMITS", 1000)

    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("A")

            async def device(number: int) -> None:
                for n in range(10):
                    await asyncio.sleep(0.001 * (number % 2))  # it is farther away
                    assert await put(store, new(row, f"{number}-{n}")) == ["stored"]

            monkeypatch.setattr(ma.Database, "execute", slow)
            await asyncio.gather(*map(device, range(8)))

    run(scenario)
    assert commits[0] < 16, "20 where they take turns"


def test_who_holds_the_file_does_not_hold_up_the_loop(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            await put(store, new(row, "1"))
            other = database(path)
            other.execute("BEGIN IMMEDIATE")
            waiting, beats = asyncio.ensure_future(put(store, new(row, "2"))), 0
            while beats < 20:
                before = asyncio.get_running_loop().time()
                await asyncio.sleep(0.01)
                assert asyncio.get_running_loop().time() - before < 2  # a transaction waits for 5 s
                beats += 1
            assert not waiting.done()
            other.close()
            assert await waiting == ["stored"]

    run(scenario)


def test_one_commit_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ma, "COMMIT_MESSAGES", 10)

    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            statements: list[str] = []
            await store.call(lambda db: db.set_exec_trace(noting(statements)))
            await in_one_batch(store, *(new(row, str(n)) for n in range(95)))
            assert sum(statement.startswith("COMMIT") for statement in statements) >= 10
            assert len(rows(path)) == 95

    run(scenario)


def test_messages_without_control_id_are_never_repetitions(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            assert await in_one_batch(store, *(new(row, "") for _ in range(3))) == ["stored"] * 3

    run(scenario)


def test_congestion_ends_with_one_call(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ma, "UNCOMMITTED_MESSAGES", 5)

    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            resumed: list[bool] = []
            done = []
            for n in range(20):
                message = new(row, str(n))
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
            await put(store, new(store.channel("ADT"), "1"))
            assert {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {
                "queue.sqlite": 0o600, "queue.sqlite-wal": 0o600, "queue.sqlite-shm": 0o600, "queue.sqlite.lock": 0o600,
                "queue.sqlite.high": 0o600,
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
        row = store.channel("ADT")
        await put(store, new(row, "1"))
        await store.queued(row, 0, 5)
        await store.close()
        links = [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
        assert [link for link in links if link.startswith(str(path))] == []
        assert sorted(file.name for file in path.parent.iterdir()) == ["queue.sqlite", "queue.sqlite.high"]

    run(scenario)


# --- channels ---


def test_a_channel_keeps_its_row_and_counts_its_epochs(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            one = store.channel("ADT")
            other = store.channel("ORU")
            await put(store, new(one, "1"), new(one, "2"), new(other, "1"))
        async with opened(path) as store:
            again = store.channel("ADT")
            assert (again.name, again.key_spec, again.id, again.epoch) == ("ADT", "", one.id, one.epoch)
            assert [(found.name, found.waiting) for found in await store.backlog()] == [("ADT", 2), ("ORU", 1)]
            changed = store.channel("ADT", "PID-3")
            assert (changed.id, changed.epoch) == (one.id, one.epoch + 1)
            assert store.channel("ADT", "PID-3").epoch == changed.epoch
            assert store.channel("ORU").epoch == other.epoch
        async with opened(path) as store:
            assert store.channel("ADT", "PID-3").epoch == one.epoch + 1
            back = store.channel("ADT")
            assert (back.id, back.epoch) == (one.id, one.epoch + 2)

    run(scenario)


@pytest.mark.parametrize("assign", [False, True])
def test_a_channel_and_its_first_messages_share_a_batch(path: Path, assign: bool) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            async with held(store):
                row = store.channel("ADT", "PID-3")
                assert (row.id, row.epoch) == (1, 0)
                waiting = asyncio.ensure_future(put(store, *(new(row, str(n), assign=assign) for n in range(2))))
                await asyncio.sleep(0)
            assert await waiting == ["stored", "stored"]
            assert rows(path, "SELECT id, name, key_spec, epoch FROM channel") == [(1, "ADT", "PID-3", 0)]
            assert rows(path, "SELECT channel, seq_no FROM message") == [
                (1, 0 if assign else None),
                (1, 1 if assign else None),
            ]

    run(scenario)


def test_messages_always_have_a_channel(path: Path) -> None:
    """Whatever kept the row from being written: no message may lie in the file where no channel looks for it."""

    async def scenario() -> None:
        async with opened(path) as store:
            async with held(store):
                failed = store.call(failing(apsw.IOError("disk I/O error")))
                row = store.channel("ADT")
            with pytest.raises(ma.StorageError):
                await failed
            stored = (await put(store, new(row, "1"))) == ["stored"]
            if not stored:  # refused is as good: the device keeps it
                return
            assert rows(path, "SELECT c.name FROM message m LEFT JOIN channel c ON c.id = m.channel") == ["ADT"]
        async with opened(path) as store:
            assert len(await store.queued(store.channel("ADT"), 0, 9)) == 1

    run(scenario)


def test_queued_gives_the_unsettled_in_order_and_by_pages(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            messages = [new(row, str(n)) for n in range(6)]
            await put(store, *messages)
            await settled(store, messages[2])
            await settled(store, messages[3], ma.SENT)
            found = [message.control_id for message, _ in await store.queued(row, 0, 3)]
            assert found == ["0", "1", "3"]
            assert [message.control_id for message, _ in await store.queued(row, messages[3].id, 9)] == ["4", "5"]

    run(scenario)


def test_an_interrupted_message_is_recovered_as_its_queue_says(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            again, never = store.channel("ADT"), store.channel("ORU")
            messages = [new(row, str(n)) for row in (again, never) for n in range(2)]
            await put(store, *messages)
            for message in messages[::2]:
                await settled(store, message, ma.SENT)
            assert await store.recover(again, ma.QUEUED, None, None) == 1
            assert await store.recover(never, ma.FAILED, "interrupted", "the agent stopped") == 1
            assert await store.recover(never, ma.FAILED, "interrupted", "the agent stopped") == 0
            assert rows(path, "SELECT state, outcome, error_code, last_error FROM message ORDER BY id") == [
                (ma.QUEUED, ma.PENDING, None, None), (ma.QUEUED, ma.PENDING, None, None),
                (ma.FAILED, ma.NOT_OWED, "interrupted", "the agent stopped"), (ma.QUEUED, ma.PENDING, None, None),
            ]  # fmt: skip

    run(scenario)


def test_a_commitment_waits_for_its_images_and_is_reported_until_it_is_taken(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row, other = store.channel("PACS"), store.channel("OTHER")
            images = [new(row, uid, type="C-STORE") for uid in ("1.1", "1.2")]
            request = new(row, "", type=ma.COMMITMENT, received_at=1000)
            later, elsewhere = new(row, "1.3", type="C-STORE"), new(other, "1.4", type="C-STORE")
            await put(store, *images, request, later, elsewhere)
            await settled(store, images[0])
            assert not await store.waits_for(row, request.id, ["1.1", "1.3", "1.4", "9"])
            assert await store.waits_for(row, request.id, ["1.1", "1.2"])

            assert await store.undelivered(row, ma.COMMITMENT, 0) == []
            await settled(store, request, outcome=ma.UNDELIVERED, response="{}")
            await settled(store, images[1], outcome=ma.UNDELIVERED)
            (found,) = await store.undelivered(row, ma.COMMITMENT, request.settled_at - 1)
            assert (found.id, found.response, found.remote) == (request.id, "{}", request.remote)
            assert await store.undelivered(row, ma.COMMITMENT, request.settled_at) == []
            assert await store.undelivered(other, ma.COMMITMENT, 0) == []
            await settled(store, request, outcome=ma.DELIVERED)
            assert await store.undelivered(row, ma.COMMITMENT, 0) == []

    run(scenario)


def test_frames_are_kept_until_a_message_takes_their_place(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row, other = store.channel("LAB"), store.channel("OTHER")
            for number, frame in enumerate((b"H|", b"\0\xff", b"L|1")):
                await store.keep_frame(row, "session", number, "10.0.0.1:5", frame)
                assert rows(path, "SELECT count(*) FROM partial") == [number + 1]
            await store.keep_frame(row, "second", 0, "10.0.0.2:6", b"H|2")
            await store.keep_frame(other, "third", 0, "10.0.0.3:7", b"H|3")
        async with opened(path) as store:
            row = store.channel("LAB")
            assert sorted(await store.frames(row)) == [
                ("second", "10.0.0.2:6", b"H|2"), ("session", "10.0.0.1:5", b"H|\0\xffL|1"),
            ]  # fmt: skip
            store.drop_frames("second")
            assert [session for session, _, _ in await store.frames(row)] == ["session"]
            assert await put(store, new(row, "", session="session")) == ["stored"]
            assert await store.frames(row) == []
            assert rows(path, "SELECT session FROM partial") == ["third"]
            store.trouble = "storage error"
            with pytest.raises(ma.StorageError):
                await store.keep_frame(row, "fourth", 0, "", b"")

    run(scenario)


def test_large_bodies_stay_on_disk(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            body = b"MSH|" + b"x" * 100_000
            await put(store, new(row, "1", body))
            ((message, original),) = await store.queued(row, 0, 3)
            assert original is None and message.size == len(body)
            assert (await store.bodies([message.id]))[message.id][0] == body

    run(scenario)


# --- repetitions (channel contract 5.3) ---


@pytest.mark.parametrize("response", [None, "MSA|AA|BIG\r", "x" * 57, "x" * 58, "x" * 700])
def test_to_settle_a_large_message_does_not_write_it_again(path: Path, response: str | None) -> None:
    """SQLite leaves the body where it is while its row keeps its length, through tries and outcomes."""

    async def scenario() -> None:
        async with opened(path) as store:
            message = new(store.channel("ADT"), "BIG", os.urandom(1 << 20))
            await put(store, message)
            log = path.with_name(f"{path.name}-wal")
            before = log.stat().st_size
            message.failures = message.attempts = 200
            await settled(store, message, ma.QUEUED, failing_ms=1 << 33, sent_at=ma.now_ms(), error_code="server-error")
            await settled(store, message, response=response, status_code=200, error_code=None)
            assert log.stat().st_size - before < 100_000

    run(scenario)


def test_a_file_of_an_older_version_takes_large_messages(path: Path) -> None:
    """Its rows have no length to keep."""

    async def scenario() -> None:
        async with opened(path):
            pass
        with contextlib.closing(apsw.Connection(str(path))) as db:
            db.execute("ALTER TABLE message DROP COLUMN pad")
        async with opened(path) as store:
            message = new(store.channel("ADT"), "BIG", os.urandom(1 << 20))
            await put(store, message)
            await settled(store, message)
            assert await states(store) == {"processed": 1}

    run(scenario)


def test_repetitions_within_one_batch(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            repetition = new(row, "1")
            found = await in_one_batch(
                store,
                new(row, "1"),
                repetition,
                new(row, "1", b"MSH|other"),
                new(row, "2"),
                new(ma.ChannelRow("x", "", 99), "1"),
            )
            assert found == ["stored", "same", "stored", "stored", "stored"]
            assert repetition.earlier is not None and repetition.earlier.id == 1
            assert rows(path) == ["1", "1", "2", "1"]
            assert await states(store) == {"queued": 4}

    run(scenario)


def test_repetitions_across_a_restart_and_after_the_end(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            first = new(row, "1")
            await put(store, first, new(row, "2"))
            await settled(store, first, ma.PROCESSED, response="MSH|answer", outcome=ma.DELIVERED, status_code=200)
        async with opened(path) as store:
            again = new(row, "1")
            assert await put(store, again, new(row, "2"), new(row, "2", b"MSH|x")) == ["same", "same", "stored"]
            assert again.earlier is not None
            earlier = again.earlier
            assert (earlier.state, earlier.response, earlier.outcome) == (ma.PROCESSED, "MSH|answer", ma.DELIVERED)

    run(scenario)


def test_a_repetition_outside_its_window_is_none_also_when_the_clock_was_set_back(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row, found = store.channel("ADT"), list[str]()
            for day in (30, 30.5, 2):
                message = new(row, "1")
                message.received_at, message.window_ms = round(day * 86_400_000), 86_400_000
                found += await put(store, message)
            assert found == ["stored", "same", "stored"]

    run(scenario)


@pytest.mark.parametrize("kept", ["", "copy"])
def test_no_number_is_given_twice_and_what_waits_keeps_its_name(path: Path, kept: str) -> None:
    """Over a restart after repetitions, which take numbers and leave no row, and over a copy that was put back."""
    numbers: set[int] = set()
    names: set[str] = set()

    async def scenario() -> None:
        for _ in range(2):
            async with opened(path) as store:
                row = store.channel("ADT")
                messages = [new(row, "1"), new(row, "1"), *(new(row, uuid.uuid4().hex) for _ in range(5))]
                assert (await put(store, *messages))[2:] == ["stored"] * 5
                assert not numbers & {message.id for message in messages}
                numbers.update(message.id for message in messages)
                names.add(store.uuid)
                if kept and not (path.parent / kept).exists():
                    with contextlib.closing(database(path)) as db:
                        db.execute("VACUUM INTO ?", (str(path.parent / kept),))
            if kept:
                shutil.copy(path.parent / kept, path)
        assert len(names) == 1

    run(scenario)


def test_what_was_nacked_is_no_earlier_message(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            audit = new(row, "1", state=ma.NACKED, outcome=ma.NOT_OWED, error_code="duplicate-rejected")
            audit.checked = False
            assert await put(store, audit, new(row, "1")) == ["stored", "stored"]
            assert await states(store) == {"queued": 1, "nacked": 1}

    run(scenario)


# --- numbers (channel contract 5.3: a failed insert burns no number) ---


def test_numbers_have_no_gaps(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            batch = [new(row, control, assign=True) for control in ("a", "a", "b", "", "b", "c")]
            found = await in_one_batch(store, *batch)
            assert found == ["stored", "same", "stored", "stored", "same", "stored"]
            assert [message.seq_no for message in batch if not message.earlier] == [0, 1, 2, 3]
        async with opened(path) as store:
            later = new(row, "d", assign=True)
            assert await put(store, new(row, "a", assign=True), later) == ["same", "stored"]
            assert later.seq_no == 4 and ma.Header(later.text or "").fields[12] == "4"
            finalized = rows(path, "SELECT finalized FROM message ORDER BY id")
            assert [ma.Header(text).fields[12] for text in finalized] == ["0", "1", "2", "3", "4"]

    run(scenario)


def test_a_failed_batch_burns_no_number(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            await store.call(lambda db: None)  # the row of the channel is there
            first = new(row, "first", assign=True)
            assert await put(store, first) == ["stored"]
            execute_many = ma._execute_many

            def fail_after_it(db: ma.Database, template: str, values: Sequence[tuple[Any, ...]]) -> None:
                execute_many(db, template, values)
                if template == ma._UPDATE:  # the step after the insertion of a batch
                    number = db.one("SELECT next_seq FROM channel")
                    taken.append(number)
                    raise apsw.IOError("disk I/O error")

            taken: list[int] = []
            monkeypatch.setattr(ma, "_execute_many", fail_after_it)
            (refusal,) = await put(store, new(row, "a", assign=True))
            assert refusal.startswith("storage error")
            assert taken[0] == 2, "it failed before the number was taken"
            monkeypatch.setattr(ma, "_execute_many", execute_many)
            message = new(row, "a", assign=True)
            assert await put(store, message) == ["stored"]
            assert (first.seq_no, message.seq_no) == (0, 1)

    run(scenario)


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


def test_ids_are_never_used_twice(path: Path) -> None:
    """The id makes the callback by which the server recognises a repetition: it must not come back after a sweep."""

    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            message = new(row, "1")
            await put(store, message)
            await settled(store, message, outcome=ma.DELIVERED, settled_at=1)
            assert await store.sweep(ma.AgentSettings()) == (1, 0)
            used = message.id
        async with opened(path) as store:
            message = new(row, "2")
            await put(store, message)
            assert message.id > used

    run(scenario)


# --- counts, limits, retention ---


def test_counts_follow_the_states_and_survive(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            messages = [new(row, str(n)) for n in range(7)]
            await put(store, *messages, new(row, "0"))
            await settled(store, messages[0], ma.SENT)
            await settled(store, messages[0], ma.PROCESSED)
            await settled(store, messages[1], ma.FAILED)
            await settled(store, messages[2], ma.REJECTED)
            await settled(store, messages[3], ma.SENT)
            await put(store, new(row, "", state=ma.NACKED, outcome=ma.NOT_OWED))
            expected = {"queued": 3, "inflight": 1, "processed": 1, "rejected": 1, "failed": 1, "nacked": 1}
            assert await store.counts() == expected
            store.put(new(row, "last"))  # what was asked for before is counted
            assert await store.counts() == expected | {"queued": 4}
        async with opened(path) as store:
            assert await store.counts() == expected | {"queued": 4}
            counted = dict(rows(path, "SELECT state, count(*) FROM message GROUP BY state"))
            assert {ma.STATES[state]: count for state, count in counted.items()} == expected | {"queued": 4}

    run(scenario)


def test_backlog_names_who_waits_how_many_and_since_when(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            one, other, done = store.channel("ADT"), store.channel("ORU"), store.channel("DONE")
            assert await store.backlog() == []
            messages = [new(one, str(n), received_at=1000 + n) for n in range(4)]
            finished = new(done, "1")
            await put(store, *messages, new(other, "1", received_at=7), finished, new(one, "", state=ma.NACKED))
            await settled(store, messages[0])
            await settled(store, messages[1], ma.SENT)
            await settled(store, messages[3], ma.FAILED)
            await settled(store, finished)
            assert await store.backlog() == [("ADT", 2, 1001), ("ORU", 1, 7)]

    run(scenario)


def test_the_queue_refuses_above_its_limit_and_goes_on_below(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ma, "LAZY_SECS", 0)  # the size is measured after each commit

    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            store.max_bytes = store.size_bytes + ma.MIB
            found = [(await put(store, new(row, str(n), b"x" * 100_000)))[0] for n in range(15)]
            assert found[:8] == ["stored"] * 8
            assert "storage error: the queue has reached its limit" in found[-1]
            assert found.count("stored") == len(rows(path)) < 12
            store.max_bytes = 0
            assert await put(store, new(row, "more")) == ["stored"]

    run(scenario)


async def aged(
    store: ma.Store, row: ma.ChannelRow, count: int, state: int, days: float, outcome: int, size: int = 10
) -> None:
    messages = [new(row, "", b"x" * size) for _ in range(count)]
    await put(store, *messages)
    for message in messages:
        await settled(store, message, state, outcome=outcome, settled_at=int(ma.now_ms() - days * DAY))


def test_retention_by_age(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            await aged(store, row, 3, ma.PROCESSED, 8, ma.DELIVERED)
            await aged(store, row, 2, ma.PROCESSED, 6, ma.DELIVERED)
            await aged(store, row, 2, ma.PROCESSED, 8, ma.UNDELIVERED)
            await aged(store, row, 2, ma.FAILED, 200, ma.NOT_OWED)
            await put(store, new(row, "waiting"))
            assert await store.sweep(ma.AgentSettings()) == (3, 0)
            assert await states(store) == {"queued": 1, "processed": 4, "failed": 2}
            assert await store.sweep(ma.AgentSettings()) == (0, 0)
            assert len(rows(path)) == 7

    run(scenario)


def test_retention_by_size_spares_dead_letters_until_their_floor(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            await aged(store, row, 20, ma.PROCESSED, 0, ma.DELIVERED, 50_000)
            await aged(store, row, 10, ma.FAILED, 89, ma.NOT_OWED, 50_000)
            await aged(store, row, 10, ma.REJECTED, 91, ma.NOT_OWED, 50_000)
            await aged(store, row, 10, ma.PROCESSED, 91, ma.UNDELIVERED, 50_000)
            waiting = [new(row, "", b"x" * 50_000, received_at=1) for _ in range(10)]
            await put(store, *waiting)
            assert await store.sweep(ma.AgentSettings()) == (0, 0)
            assert store.size_bytes > 2 * ma.MIB
            assert await store.sweep(ma.AgentSettings(queueRetentionMaxMb=1)) == (20, 20)
            assert await states(store) == {"queued": 10, "failed": 10}

    run(scenario)


def test_retention_by_size_deletes_the_oldest_first_and_no_more_than_needed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ma, "SWEEP_ROWS", 4)

    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            await aged(store, row, 40, ma.PROCESSED, 0, ma.DELIVERED, 50_000)
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
            row = store.channel("ADT")
            message = new(row, "1")
            await put(store, message)
            await settled(store, message, outcome=ma.DELIVERED, settled_at=1)
            await store.sweep(ma.AgentSettings())
            assert await put(store, new(row, "1")) == ["stored"]

    run(scenario)


# --- files that cannot be used: refused with a reason, and recovered when mended ---


def junk(path: Path) -> None:
    path.write_bytes(b"this is not a database, " * 1000)


def foreign(path: Path) -> None:
    with contextlib.closing(database(path)) as db:
        db.execute("CREATE TABLE precious (x)")
        db.execute("INSERT INTO precious VALUES (1)")


def from_the_future(path: Path) -> None:
    with contextlib.closing(database(path)) as db:
        db.execute(f"CREATE TABLE x (y); PRAGMA application_id={ma.APPLICATION_ID}; PRAGMA user_version=99;")


def test_a_queue_of_another_program_or_version_is_named(path: Path) -> None:
    path.parent.mkdir()
    from_the_future(path)
    with pytest.raises(ma.StorageError, match=f"the queue {path} cannot be read: .* version"):
        ma.read_queue(path, ma.backlog_of)


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
            assert await put(store, new(ma.ChannelRow("x", "", 1), "1")) == [store.trouble]
            mended(path)
            await healthy(store)
            row = store.channel("ADT")
            assert await put(store, new(row, "1")) == ["stored"]
            assert len(await store.queued(row, 0, 5)) == 1
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
            row = store.channel("ADT")
            assert row.id == 0, "the file knows better what id a name has"
            waiting = store.call(lambda db: db.execute("SELECT name FROM channel").fetchall())
            path.rmdir()
            assert await waiting == [("ADT",)]
            assert row.id == 1
            assert await put(store, new(row, "1")) == ["stored"]
            assert [(found.name, found.waiting) for found in await store.backlog()] == [("ADT", 1)]

    run(scenario)


def test_a_damaged_file_is_refused_and_its_good_copy_taken(path: Path) -> None:
    async def first() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            await put(store, *(new(row, str(n), b"MSH|first") for n in range(50)))

    run(first)
    good = path.read_bytes()
    path.write_bytes(good[: ma.PAGE_BYTES] + os.urandom(len(good) - ma.PAGE_BYTES))

    async def second() -> None:
        async with opened(path) as store:
            assert (
                store.trouble == "storage error: the queue file of the agent is damaged, or encrypted with another key"
            )
            assert ".recover" in CONSOLE.getvalue()
            path.with_name("good").write_bytes(good)
            path.with_name("good").replace(path)
            await healthy(store)
            row = store.channel("ADT")
            assert (await states(store))["queued"] == len(await store.queued(row, 0, 99)) == 50
            assert [(found.name, found.waiting) for found in await store.backlog()] == [("ADT", 50)]
            assert await put(store, new(row, "1"), new(row, "50")) == ["stored", "stored"]

    run(second)


def test_an_empty_file_after_a_damaged_one_counts_from_nothing(path: Path) -> None:
    """A person moves the file away while the agent runs: what is counted is what is in the new one."""

    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            await put(store, new(row, "1"), new(row, "2"))
            await store.queued(row, 0, 5)
            await store.call(lambda db: db.execute("DROP TABLE message"))
            mended(path)
            (refusal,) = await put(store, new(row, "3"))
            assert refusal.startswith("storage error")
            row = store.channel("ADT")
            assert await put(store, new(row, "4")) == ["stored"]
            assert rows(path) == ["4"]
            assert await states(store) == {"queued": 1}
            assert [message.control_id for message, _ in await store.queued(row, 0, 9)] == ["4"], "the old file"

    run(scenario)


def test_the_folder_vanishes_and_comes_back(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            await put(store, new(row, "1"))
            shutil.rmtree(path.parent)
            (refusal,) = await put(store, new(row, "2"))
            assert refusal.startswith("storage error")
            row = store.channel("ADT")
            assert await put(store, new(row, "3")) == ["stored"]
            assert rows(path) == ["3"]

    run(scenario)


def test_a_message_is_never_acknowledged_into_a_deleted_file(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            await put(store, new(store.channel("ADT"), "1"))
            for file in path.parent.iterdir():
                file.unlink()
            (outcome,) = await put(store, new(ma.ChannelRow("x", "", 1), "2"))
            assert outcome.startswith("storage error") or rows(path) == ["2"]

    run(scenario)


@pytest.mark.parametrize(
    "error", [RuntimeError("odd"), apsw.ConstraintError("no"), OverflowError("big"), OSError(5, "x")], ids=repr
)
def test_a_call_that_fails_fails_alone(path: Path, error: Exception) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            with pytest.raises((ma.StorageError, type(error))):
                await store.call(failing(error))
            assert await put(store, new(row, "1")) == ["stored"]
            assert await states(store) == {"queued": 1}

    run(scenario)


def test_what_cannot_be_read_is_a_storage_error(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            await put(store, new(row, "1"))
            with pytest.raises(ma.StorageError):
                await store.read(lambda db: db.execute("SELECT nothing FROM nowhere").fetchall())
            with pytest.raises(ma.StorageError):
                await store.read(lambda db: db.execute("DELETE FROM message"))
            assert len(await store.queued(row, 0, 5)) == 1

    run(scenario)


def test_a_message_that_cannot_be_written_is_refused_and_the_writer_lives(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            (refusal,) = await put(store, new(row, "1", remote="\ud800"))
            assert refusal.startswith("storage error")
            assert await put(store, new(row, "1")) == ["stored"]

    run(scenario)


def test_a_failing_table_refuses_and_recovers(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            message = new(row, "1")
            await put(store, message)
            await store.call(lambda db: db.execute("ALTER TABLE message RENAME TO gone"))
            message.state, done = ma.PROCESSED, asyncio.get_running_loop().create_future()
            store.update(message, then=lambda: done.set_result(None))
            (refusal,) = await put(store, new(row, "2"))
            assert refusal.startswith("storage error") and "message" not in refusal
            assert not done.done()
            with contextlib.closing(database(path)) as db:
                db.execute("ALTER TABLE gone RENAME TO message")
            await done
            assert rows(path, "SELECT control_id, state FROM message") == [("1", ma.PROCESSED)]
            assert await states(store) == {"processed": 1}
            assert await put(store, new(row, "2")) == ["stored"]

    run(scenario)


# --- files of older versions ---


def test_a_file_with_a_tally_keeps_its_messages_and_loses_the_tally(path: Path) -> None:
    """Version 2 counted its messages by state in a table of its own."""

    async def first() -> None:
        async with opened(path) as store:
            row = store.channel("ADT", "PID-3")
            await store.call(lambda db: None)  # the row of the channel is there
            messages = [new(row, str(n), assign=True) for n in range(5)]
            assert await put(store, *messages) == ["stored"] * 5
            await settled(store, messages[0])
            await settled(store, messages[1], ma.FAILED)

    run(first)
    everything = "SELECT * FROM message ORDER BY id"
    before = rows(path, everything)
    with contextlib.closing(database(path)) as db:
        db.execute(
            "CREATE TABLE tally (state INTEGER PRIMARY KEY, n INTEGER NOT NULL);"
            "INSERT INTO tally VALUES (0, 3), (1, 0), (2, 1), (3, 0), (4, 1), (5, 0); PRAGMA user_version = 2;"
            "ALTER TABLE message RENAME COLUMN failing_ms TO first_failed_at;"
        )

    async def second() -> None:
        async with opened(path) as store:
            assert store.healthy
            assert rows(path, everything) == before
            assert rows(path, "SELECT count(*) FROM sqlite_master WHERE name = 'tally'") == [0]
            assert rows(path, "PRAGMA user_version") == [ma.SCHEMA_VERSION]
            assert await states(store) == {"queued": 3, "processed": 1, "failed": 1}
            row = store.channel("ADT", "PID-3")
            message = new(row, "5", assign=True)
            assert await put(store, message, new(row, "3", assign=True)) == ["stored", "same"]
            assert (row.epoch, message.seq_no) == (0, 5)
        async with opened(path) as store:
            assert await states(store) == {"queued": 4, "processed": 1, "failed": 1}

    run(second)


def test_a_file_of_the_first_version_goes_through_every_migration(path: Path) -> None:
    async def first() -> None:
        async with opened(path) as store:
            await put(store, new(store.channel("ADT"), "1"))

    run(first)
    with contextlib.closing(database(path)) as db:
        db.execute(
            "DROP INDEX spooled; ALTER TABLE message DROP COLUMN spool;"
            "CREATE TABLE tally (state INTEGER PRIMARY KEY, n INTEGER NOT NULL);"
            "ALTER TABLE message RENAME COLUMN failing_ms TO first_failed_at; PRAGMA user_version = 1;"
        )

    async def second() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            assert await put(store, new(row, "2", spool="file")) == ["stored"]
            assert [message.spool for message, _ in await store.queued(row, 0, 9)] == [None, "file"]
            assert rows(path, "SELECT count(*) FROM sqlite_master WHERE name = 'tally'") == [0]

    run(second)


# --- the disk is full ---


def test_a_nearly_full_disk_refuses_messages_and_keeps_settling(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ma, "LAZY_SECS", 0)  # the disk is looked at before each commit
    usage = shutil.disk_usage(path.parent.parent)

    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            message = new(row, "1")
            await put(store, message)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=10**12, free=ma.MIB))
            full = "storage error: the disk of the agent is full"
            done = asyncio.get_running_loop().create_future()
            message.state = ma.PROCESSED
            store.update(message, then=lambda: done.set_result(None))
            assert await in_one_batch(store, new(row, "2"), new(row, "3")) == [full, full]
            await done
            assert rows(path, "SELECT control_id, state FROM message") == [("1", ma.PROCESSED)]
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=10**12, free=10**11))
            assert await put(store, new(row, "2")) == ["stored"]
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


def test_a_disk_that_is_unmounted_takes_no_messages_until_it_is_back(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is below the mount point is another disk: nobody would ever read a queue there."""
    monkeypatch.setattr(ma, "STORE_REOPEN_SECS", 0.01)
    monkeypatch.setattr(ma, "DISK_RESERVE_BYTES", 0)
    place = tmp_path / "place"
    place.mkdir()
    bind, path = ["mount", "--bind", str(small_disk), str(place)], place / "state/queue.sqlite"
    subprocess.run(bind, check=True)

    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            assert await put(store, new(row, "before")) == ["stored"]
            await asyncio.to_thread(subprocess.run, ["umount", "-l", str(place)], check=True)
            for n in range(20):
                assert (await put(store, new(row, f"gone-{n}")))[0].startswith("storage error")
                await asyncio.sleep(0.01)
            assert store.trouble == "storage error: the disk of the agent is gone" and not path.exists()
            await asyncio.to_thread(subprocess.run, bind, check=True)
            for _ in range(500):
                if await put(store, new(row, "back")) == ["stored"]:
                    break
                await asyncio.sleep(0.01)

    try:
        run(scenario)
        assert rows(path) == ["before", "back"]
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def test_a_really_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ma, "DISK_RESERVE_BYTES", 0)
    ballast, path = small_disk / "ballast", small_disk / "queue.sqlite"
    ballast.write_bytes(b"x" * 2_500_000)

    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            stored, outcome = [], ""
            for n in range(200):
                message = new(row, str(n), b"x" * 50_000)
                (outcome,) = await put(store, message)
                if outcome != "stored":
                    break
                stored.append(message)
            assert outcome == "storage error: the disk of the agent is full"
            assert len(stored) > 5
            settling = [asyncio.ensure_future(settled(store, message, response="y" * 500)) for message in stored]
            assert (await put(store, new(row, "refused", b"x" * 50_000)))[0].startswith("storage error")
            ballast.unlink()
            await asyncio.gather(*settling)
            assert await put(store, new(row, "again")) == ["stored"]
            expected = [(message.control_id, ma.PROCESSED) for message in stored]
            assert rows(path, "SELECT control_id, state FROM message ORDER BY id") == [*expected, ("again", ma.QUEUED)]

    run(scenario)


def test_close_writes_what_waits(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path) as store:
            row = store.channel("ADT")
            message = new(row, "1")
            await put(store, message)
            message.state = ma.FAILED
            store.update(message)
            for n in range(100):
                store.put(new(row, f"last {n}"))
        assert len(rows(path)) == 101
        assert rows(path, f"SELECT count(*) FROM message WHERE state = {ma.FAILED}") == [1]

    run(scenario)


def test_an_empty_file_in_the_place_of_a_queue_is_said(path: Path) -> None:
    """What a failed repair leaves: nobody shall take it for a queue without messages."""

    async def scenario() -> None:
        async with opened(path) as store:
            await put(store, new(store.channel("A"), "1"))
        assert "new and empty" not in CONSOLE.getvalue()
        path.write_bytes(b"")
        path.with_name(path.name + ".rewriting").write_bytes(b"SQLite format 3 of a rewriting that was killed")
        async with opened(path):
            assert "new and empty" in CONSOLE.getvalue()
            assert not path.with_name(path.name + ".rewriting").exists()

    run(scenario)


def test_two_agents_on_one_queue_are_told_apart(path: Path) -> None:
    async def scenario() -> None:
        async with opened(path), opened(path) as second:
            assert "another agent uses" in second.trouble and "Move" not in CONSOLE.getvalue()

    run(scenario)
