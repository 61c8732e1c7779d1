"""The two logs: lines, levels, rotation by size and day, disks that fail; and reading them backwards by pages."""

import ctypes
import datetime
import errno
import io
import json
import os
import re
import shutil
import sys
import threading
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import medplum_agent as ma

DAY = "2026-03-04"


class Calendar(datetime.datetime):
    """A clock that a test sets."""

    today_is = datetime.datetime(2026, 3, 4, 12, tzinfo=datetime.UTC)

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return cls.today_is.replace(tzinfo=tz)


OPEN: list[ma.Log] = []  # closed when a test ends


@pytest.fixture(autouse=True)
def _fixed_day_and_small_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Calendar, "today_is", Calendar.today_is)  # put back when the test ends
    monkeypatch.setattr(ma, "datetime", types.SimpleNamespace(datetime=Calendar, UTC=datetime.UTC))
    monkeypatch.setattr(ma, "now_ms", lambda: int(Calendar.today_is.timestamp() * 1000))
    monkeypatch.setattr(ma, "MIB", 1000)  # maxFileSizeMb counts thousands of bytes here
    yield
    while OPEN:
        OPEN.pop().close_file()


def log(directory: Path | None, name: str = "main", console: typing.TextIO | None = None, **rows: Any) -> ma.Log:
    OPEN.append(ma.Log(name, ma.LoggerSettings(**{"maxFileSizeMb": 1, **rows}), directory, console))
    return OPEN[-1]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def lines(path: Path) -> list[ma.Json]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def everything(directory: Path, name: str = "main", limit: int = 1000) -> list[str]:
    """The texts of all entries, newest first, by as many pages as it takes."""
    found: list[str] = []
    before: str | None = None
    while True:
        page = ma.read_log_page(directory, name, limit, before)
        assert len(page.entries) <= limit
        found += [entry["msg"] for entry in page.entries]
        before = page.before
        if before is None:
            return found
        assert page.entries, "a page without entries says that there is more"


# --- lines and levels (operations contract 4) ---


def test_a_line(tmp_path: Path) -> None:
    log(tmp_path).warn("a\rb", code=5)
    (line,) = lines(tmp_path / f"medplum-agent-main-{DAY}.log")
    assert list(line) == ["level", "msg", "timestamp", "code"]
    assert (line["level"], line["msg"], line["code"]) == ("WARN", "a\nb", 5)
    assert line["timestamp"] == f"{DAY}T12:00:00.000Z"


@pytest.mark.parametrize(("level", "written"), [(level, rank) for rank, level in enumerate(ma.LEVELS)])
def test_levels(tmp_path: Path, level: str, written: int) -> None:
    console = io.StringIO()
    quiet = log(tmp_path, console=console, logLevel=level)
    for one in ("error", "warn", "info", "debug"):
        getattr(quiet, one)(one)
    expected = ["ERROR", "WARN", "INFO", "DEBUG"][:written]
    assert [json.loads(line)["level"] for line in console.getvalue().splitlines()] == expected
    assert everything(tmp_path) == [one.lower() for one in reversed(expected)]


def test_a_terminal_gets_readable_lines() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    log(None, console=terminal).info("ready")
    assert terminal.getvalue() == "12:00:00 INFO  ready\n"


@pytest.mark.parametrize("ours", [True, False])
def test_the_journal_gets_words_and_their_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: bool) -> None:
    """As systemd has it: the variable names the stream that is the journal; a child's pipe is another one."""
    with (tmp_path / "journal").open("w+") as journal:
        found = os.fstat(journal.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino + (not ours)}")
        both = log(tmp_path, console=journal)
        both.warn("port 104\nis \x1b[31mtaken")
        both.info("Agent stats", stats={"live": 1})
        shown = (tmp_path / "journal").read_text().splitlines()
    if ours:
        assert shown == ["<4>port 104 is  [31mtaken", '<6>Agent stats {"stats": {"live": 1}}']
    else:
        assert [json.loads(line)["level"] for line in shown] == ["WARN", "INFO"]
    assert everything(tmp_path) == ["Agent stats", "port 104\nis \x1b[31mtaken"]


def test_errors_of_the_main_log_are_events_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for advapi32: one event for each error, the source closed again."""
    calls = list[tuple[Any, ...]]()

    class Advapi:
        def __getattr__(self, name: str) -> Any:
            def call(*values: Any) -> int:
                calls.append((name, *(list(v) if isinstance(v, ctypes.Array) else v for v in values)))
                return 1 << 40

            setattr(self, name, call)
            return call

    monkeypatch.setattr(ctypes, "windll", types.SimpleNamespace(advapi32=Advapi()), raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    main = log(tmp_path)
    main.warn("only a warning")
    log(tmp_path, "channels").error("a message, which stays in its own log")
    main.error("The queue cannot\nbe written")
    assert [call[0] for call in calls] == ["RegisterEventSourceW", "ReportEventW", "DeregisterEventSource"]
    assert calls[1][2:4] == (1, 0) and calls[1][8] == ["The queue cannot be written"]
    assert calls[2][1].value == 1 << 40


def test_a_lazy_log_writes_when_flushed_or_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = log(tmp_path, "channels")
    lazy.info("one")
    assert names(tmp_path) == []
    lazy.flush()
    assert everything(tmp_path, "channels") == ["one"]
    monkeypatch.setattr(ma, "LOG_HELD_BYTES", 200)
    lazy.info("x" * 200)
    assert len(everything(tmp_path, "channels")) == 2


def test_files_are_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        log(tmp_path).info("x")
    finally:
        os.umask(old)
    assert (tmp_path / f"medplum-agent-main-{DAY}.log").stat().st_mode & 0o777 == 0o600


def test_a_restart_goes_on_in_the_same_file(tmp_path: Path) -> None:
    for n in range(3):
        one = log(tmp_path)
        one.info(str(n))
        one.close_file()
    assert names(tmp_path) == [f"medplum-agent-main-{DAY}.log"]
    assert everything(tmp_path) == ["2", "1", "0"]


# --- rotation ---


def test_rotation_by_size(tmp_path: Path) -> None:
    rotating = log(tmp_path)
    for n in range(30):
        rotating.info(f"{n:02} " + "x" * 100)
    base = f"medplum-agent-main-{DAY}.log"
    assert names(tmp_path) == [base, *(f"{base}.{n}" for n in range(1, len(names(tmp_path))))]
    assert len(names(tmp_path)) > 3
    assert all(1000 <= (tmp_path / f"{base}{suffix}").stat().st_size < 1300 for suffix in ("", ".1", ".2"))
    assert [int(text[:2]) for text in everything(tmp_path)] == list(range(29, -1, -1))


def test_rotation_by_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rotating = log(tmp_path)
    rotating.info("yesterday")
    monkeypatch.setattr(Calendar, "today_is", Calendar.today_is + datetime.timedelta(days=1))
    rotating.info("today")
    assert names(tmp_path) == ["medplum-agent-main-2026-03-04.log", "medplum-agent-main-2026-03-05.log"]
    assert everything(tmp_path) == ["today", "yesterday"]


def test_the_newest_files_are_kept(tmp_path: Path) -> None:
    """However long it goes on within a day, the newest lines are there and the number of files is right."""
    rotating = log(tmp_path, filesToKeep=3)
    for n in range(100):
        rotating.info(f"{n:02} " + "x" * 100)
        assert everything(tmp_path)[0][:2] == f"{n:02}"
        assert len(names(tmp_path)) <= 3
    kept = [int(text[:2]) for text in everything(tmp_path)]
    assert kept == list(range(99, 99 - len(kept), -1)) and len(kept) >= 16


def test_a_restart_after_many_rotations_goes_on_in_the_newest_file(tmp_path: Path) -> None:
    for n in range(60):
        one = log(tmp_path, filesToKeep=3)
        one.info(f"{n:02} " + "x" * 100)
        one.close_file()
        assert everything(tmp_path)[0][:2] == f"{n:02}"


def test_one_file_kept(tmp_path: Path) -> None:
    rotating = log(tmp_path, filesToKeep=1)
    for n in range(50):
        rotating.info(f"{n:02} " + "x" * 100)
        assert everything(tmp_path)[0][:2] == f"{n:02}"
        assert len(names(tmp_path)) == 1


def test_the_two_logs_and_strangers_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "medplum-agent-main-notes.log").write_text("mine")
    main, channels = log(tmp_path, filesToKeep=1), log(tmp_path, "channels", filesToKeep=1)
    channels.info("kept")
    channels.flush()
    for n in range(40):
        main.info("x" * 100 + str(n))
    assert "medplum-agent-main-notes.log" in names(tmp_path)
    assert everything(tmp_path, "channels") == ["kept"]


def test_files_sort_by_number_not_by_text(tmp_path: Path) -> None:
    base = "medplum-agent-main-2026-03-04.log"
    for name in (base, f"{base}.2", f"{base}.10", "medplum-agent-main-2026-03-05.log", "medplum-agent-channels-x.log"):
        (tmp_path / name).touch()
    found = [path.name for _, path in ma.log_files(tmp_path, "main")]
    assert found == ["medplum-agent-main-2026-03-05.log", f"{base}.10", f"{base}.2", base]


# --- a disk that fails never stops the agent ---


def test_a_missing_directory(tmp_path: Path) -> None:
    """It is made, and again when somebody removes it."""
    missing = log(tmp_path / "missing")
    missing.info("first")
    assert everything(tmp_path / "missing") == ["first"]
    shutil.rmtree(tmp_path / "missing")
    missing.info("second")
    assert everything(tmp_path / "missing") == ["second"]


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    log(tmp_path / "file").info("lost")


def test_a_full_disk_and_recovery(tmp_path: Path) -> None:
    filling = log(tmp_path)
    filling.info("before")

    class Full(io.FileIO):
        def write(self, line: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    filling.close_file()
    filling._file = Full(tmp_path / f"medplum-agent-main-{DAY}.log", "a")  # type: ignore[assignment]
    filling._day = DAY
    filling.info("lost")
    filling.info("after")
    assert everything(tmp_path) == ["after", "before"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_is_full(tmp_path: Path) -> None:
    (tmp_path / f"medplum-agent-main-{DAY}.log").symlink_to("/dev/full")
    full = log(tmp_path)
    for n in range(100):
        full.info("x" * 200 + str(n))
    full.close_file()


def test_a_closed_console(tmp_path: Path) -> None:
    console = io.StringIO()
    console.close()
    log(tmp_path, console=console).info("still in the file")
    assert everything(tmp_path) == ["still in the file"]


@pytest.mark.parametrize("text", ["/tmp/\udcff", "\ud800", "\0", "\u2028"])
def test_any_text_can_be_logged(tmp_path: Path, text: str) -> None:
    log(tmp_path, console=io.StringIO()).info(f"cannot open {text}", path=text)
    assert len(everything(tmp_path)) == 1


def test_many_threads(tmp_path: Path) -> None:
    busy = log(tmp_path, filesToKeep=1000)

    def write_fifty(n: int) -> None:
        for i in range(50):
            busy.info(f"{n}-{i}")

    threads = [threading.Thread(target=write_fifty, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(everything(tmp_path)) == sorted(f"{n}-{i}" for n in range(8) for i in range(50))


# --- pages (uplink contract 4.12) ---


def entry(text: str) -> bytes:
    return json.dumps({"level": "INFO", "msg": text, "timestamp": "t", "extra": 1}).encode()


def write(directory: Path, suffix: str, *contents: bytes, day: str = DAY) -> Path:
    path = directory / f"medplum-agent-main-{day}.log{suffix}"
    path.write_bytes(b"".join(content + b"\n" for content in contents))
    return path


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_pages_over_rotated_files(tmp_path: Path, limit: int) -> None:
    write(tmp_path, "", entry("1"), entry("2"), entry("3"), day="2026-03-03")
    write(tmp_path, "", entry("4"), entry("5"))
    write(tmp_path, ".1")
    write(tmp_path, ".2", entry("6"))
    assert everything(tmp_path, limit=limit) == ["6", "5", "4", "3", "2", "1"]


def test_entries_have_three_members(tmp_path: Path) -> None:
    write(tmp_path, "", entry("1"))
    assert ma.read_log_page(tmp_path, "main", 5, None) == ([{"level": "INFO", "msg": "1", "timestamp": "t"}], None)


def test_no_files(tmp_path: Path) -> None:
    assert ma.read_log_page(tmp_path, "main", 5, None) == ([], None)


CORRUPT = [
    b"",
    b"\0" * 50,
    b"\xff\xfe",
    b"not json",
    b"[1]",
    b"5",
    b"null",
    b'{"level":"INFO"}',
    b'"text"',
    b'{"level"',
]


@pytest.mark.parametrize("limit", [1, 2, 50])
def test_unreadable_lines_are_passed_over(tmp_path: Path, limit: int) -> None:
    contents = [content for n, bad in enumerate(CORRUPT) for content in (bad, entry(str(n)), bad)]
    write(tmp_path, "", *contents)
    write(tmp_path, ".1", *CORRUPT)
    assert everything(tmp_path, limit=limit) == [str(n) for n in range(len(CORRUPT) - 1, -1, -1)]


def test_a_line_that_is_still_being_written_is_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, "", entry("1"), entry("2"))
    path.write_bytes(path.read_bytes() + entry("3")[:10])
    assert everything(tmp_path, limit=1) == ["2", "1"]


def test_a_last_line_without_its_newline_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "", entry("1"))
    path.write_bytes(path.read_bytes() + entry("2"))
    assert everything(tmp_path, limit=1) == ["2", "1"]


@given(st.lists(st.integers(0, 90), max_size=12), st.integers(1, 5), st.integers(1, 40))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_longer_than_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], limit: int, block: int
) -> None:
    monkeypatch.setattr(ma, "LOG_BLOCK_BYTES", block)
    texts = [f"{n}" + "y" * size for n, size in enumerate(sizes)]
    write(tmp_path, "", *map(entry, texts))
    assert everything(tmp_path, limit=limit) == texts[::-1]


def test_real_blocks(tmp_path: Path) -> None:
    texts = [f"{n} " + "z" * size for n, size in enumerate((10, 65_536, 200_000, 5, 65_535, 65_000, 3))]
    write(tmp_path, "", *map(entry, texts))
    assert everything(tmp_path, limit=2) == texts[::-1]


def test_a_growing_log_does_not_move_the_pages(tmp_path: Path) -> None:
    growing = log(tmp_path, filesToKeep=100)
    for n in range(40):
        growing.info(f"{n:03} " + "x" * 100)
    page = ma.read_log_page(tmp_path, "main", 7, None)
    seen = page.entries
    for n in range(40, 200):
        growing.info(f"{n:03} " + "x" * 100)
        if n % 30 == 0:
            page = ma.read_log_page(tmp_path, "main", 7, page.before)
            seen = seen + page.entries
    while page.before:
        page = ma.read_log_page(tmp_path, "main", 7, page.before)
        seen = seen + page.entries
    assert [int(one["msg"][:3]) for one in seen] == list(range(39, -1, -1))


def test_a_file_that_was_deleted_while_paging_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "", entry("1"), entry("2"))
    newest = write(tmp_path, ".1", entry("3"), entry("4"))
    page = ma.read_log_page(tmp_path, "main", 1, None)
    newest.unlink()
    assert [one["msg"] for one in ma.read_log_page(tmp_path, "main", 5, page.before).entries] == ["2", "1"]


FILE = f"medplum-agent-main-{DAY}.log"


@pytest.mark.parametrize(
    "before",
    ["", "x", "%%%", "é", "\ud800", "no colon", f"{FILE}:x", ":5", "../etc/passwd:5", f"../{FILE}:5", f"{FILE}:",
     f"{FILE}:{'9' * 30}", f"{FILE}.{'9' * 5000}:1", f"{FILE}:1\n", f"{FILE}:-1", 5, ["x"], {}],
    ids=ascii,
)  # fmt: skip
def test_a_bad_cursor_is_refused(tmp_path: Path, before: Any) -> None:
    write(tmp_path, "", entry("1"))
    with pytest.raises(ValueError, match=re.escape("Invalid cursor")):
        ma.read_log_page(tmp_path, "main", 5, before)


@pytest.mark.parametrize("offset", [-1, 0, 10**6, 10**12])
def test_a_cursor_outside_of_the_file_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    """An offset comes from the network: it may not make us read, block by block, what does not exist."""
    write(tmp_path, "", entry("1"))
    opened, reads = Path.open, iter(range(100))

    def counting(path: Path, *args: Any, **kwargs: Any) -> Any:
        file = opened(path, *args, **kwargs)

        class Counted:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def seek(self, *where: int) -> int:
                assert next(reads, None) is not None, "read more than a hundred blocks of a small file"
                return file.seek(*where)

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Counted()

    monkeypatch.setattr(Path, "open", counting)
    try:
        page = ma.read_log_page(tmp_path, "main", 5, f"{FILE}:{offset}")
    except ValueError:
        return
    assert page.before is None and len(page.entries) <= 1


@given(st.one_of(st.text(), st.from_regex(ma.LOG_FILE).map(lambda name: f"{name}:5")))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cursor_gives_a_page_or_a_value_error(tmp_path: Path, before: str) -> None:
    try:
        ma.read_log_page(tmp_path, "main", 5, before)
    except ValueError as error:
        assert str(error).startswith("Invalid cursor")


def test_lines_backwards_gives_offsets(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\ntwo\n\nthree")
    found: Iterator[tuple[int, bytes]] = ma._lines_backwards(path, path.stat().st_size)
    assert list(found) == [(14, b"three"), (8, b""), (7, b"two"), (3, b"one")]


def test_messages_are_not_logged_where_the_queue_needs_the_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    messages, main = log(tmp_path, "channels"), log(tmp_path, "main")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=10**12, free=ma.MIB))
    for n in range(3):
        messages.info(f"[Received]: {n}")
    messages.flush()
    main.info("goes on")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=10**12, free=10**11))
    messages.info("[Received]: again")
    messages.flush()
    texts = [json.loads(line)["msg"] for name in names(tmp_path) for line in (tmp_path / name).read_text().splitlines()]
    assert texts == ["3 lines lack: the disk was full", "[Received]: again", "goes on"]
