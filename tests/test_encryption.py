"""The queue encrypted at rest: nothing of a message in any file, keys that are missing or wrong, conversion, damage."""

import contextlib
import errno
import itertools
import json
import os
import random
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import medplum_agent as ma
from tests.dicom_peers import (
    EXPLICIT,
    SECONDARY,
    SUCCESS,
    Aborted,
    Instance,
    Scu,
    Storescp,
    announced,
    assert_arrived,
    assert_no_spool,
    assert_works,
    encoded,
    imaging_site,
    made,
    made_dataset,
    part10,
    spooled,
    start,
    store,
)
from tests.support import AgentProcess, Site, changed, eventually, message, site

KEY = "0123456789abcdef" * 4
SECRETS = ("TESTPERSON", "PAULA", "PATIENT-4711", "CONTROL-", "POTASSIUM")
ONCE = "?enhanced=true"


@pytest.fixture(autouse=True)
def limits_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay: tests that run in it later start agents that may write core files."""
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "store.key"
    path.write_text(f"{KEY}\n")
    return path


def encrypted(folder: Path, key_file: Path, cipher: str = "aegis", **options: Any) -> Any:
    return site(folder, {"ADT": ONCE}, config=f"storeKey = 'file:{key_file}'\nstoreCipher = '{cipher}'", **options)


def send(here: Site, *names: str) -> None:
    with here.device("ADT") as device:
        for name in names:
            text = message(f"CONTROL-{name}", "PATIENT-4711", text="POTASSIUM 9.9")
            device.send(text)
            while device.ack() != ("CA", f"CONTROL-{name}"):
                pass


def found_in(folder: Path) -> set[tuple[str, str]]:
    """What of the messages stands in clear in the files, and where."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return {
        (word, path.name) for path in files for word in SECRETS if word in path.read_bytes().decode("latin-1").upper()
    }


def command(here: Site, *arguments: str) -> "subprocess.CompletedProcess[str]":
    line = [*AgentProcess.COMMAND, *arguments, "--state-dir", str(here.agent.state_dir), "--config", str(config(here))]
    names = ("BASE_URL", "CLIENT_ID", "CLIENT_SECRET", "AGENT_ID")
    env = os.environ | {f"MEDPLUM_{name}": "http://localhost" for name in names} | {"MEDPLUM_AGENT_ID": "1"}
    return subprocess.run(line, capture_output=True, text=True, timeout=30, env=env)


def config(here: Site) -> Path:
    return here.agent.state_dir.with_name("state-agent.toml")


@pytest.mark.parametrize("cipher", ["aegis", "sqlcipher"])
def test_no_byte_of_a_message_is_in_clear_and_all_of_them_arrive(tmp_path: Path, key_file: Path, cipher: str) -> None:
    with encrypted(tmp_path, key_file, cipher) as here:
        send(here, "BEFORE")
        here.sandbox.wait_ids("CONTROL-BEFORE")
        here.sandbox.stop()
        send(here, *map(str, range(200)))
        here.agent.kill()
        assert found_in(here.agent.state_dir) == set()
        assert not ma.is_plain(here.agent.queue_path)
        here.sandbox.start()
        here.agent.start()
        here.sandbox.wait_ids(*(f"CONTROL-{n}" for n in range(200)))
        shown = command(here, "queue", "find", "CONTROL-7")
        assert shown.returncode == 0 and "answered with status 200" in shown.stdout, shown.stderr
        here.agent.terminate()
        assert found_in(here.agent.state_dir) == set()


def test_a_plain_queue_is_converted_with_what_waits_in_it(tmp_path: Path, key_file: Path) -> None:
    with site(tmp_path, {"ADT": ONCE}) as here:
        here.sandbox.stop()
        send(here, "WAITS")
        here.agent.kill()  # its log still holds what was stored
        assert any(name.startswith("medplum-agent-queue") for _, name in found_in(here.agent.state_dir))
        for log in here.agent.state_dir.glob("*channels*"):
            log.unlink()
        config(here).write_text(f"storeKey = 'file:{key_file}'")
        here.agent._options = [*here.agent._options, "--config", str(config(here))]
        here.sandbox.start()
        here.agent.start()
        here.sandbox.wait_ids("CONTROL-WAITS")
        assert b"is encrypted from now on" in here.agent.main_log()
        here.agent.terminate()
        assert found_in(here.agent.state_dir) == set()


@pytest.mark.parametrize("wrong", ["missing", "another key", "another cipher"])
def test_without_its_key_the_agent_does_not_start_and_touches_nothing(
    tmp_path: Path, key_file: Path, wrong: str
) -> None:
    with encrypted(tmp_path, key_file) as here:
        here.sandbox.stop()
        send(here, "KEPT")
        here.agent.kill()
        files = [here.agent.queue_path, here.agent.queue_path.with_name(f"{here.agent.queue_path.name}-wal")]
        before = [path.read_bytes() for path in files]
        settings = config(here)
        good = settings.read_text()
        if wrong == "missing":
            settings.write_text("\n".join(line for line in good.splitlines() if "storeKey" not in line))
        elif wrong == "another key":
            key_file.write_text("f" * 64)
        else:
            settings.write_text(good.replace("'aegis'", "'sqlcipher'"))
        here.agent.start(ready=False)
        process = here.agent.process
        assert process is not None and process.wait(20) == 78
        assert "storeKey" in here.agent.output() and "Traceback" not in here.agent.output()
        assert [path.read_bytes() for path in files] == before
        settings.write_text(good)
        key_file.write_text(KEY)
        here.sandbox.start()
        here.agent.start()
        here.sandbox.wait_ids("CONTROL-KEPT")


def test_a_copy_of_the_key_opens_the_queue_elsewhere(tmp_path: Path, key_file: Path) -> None:
    copy = tmp_path / "copy.key"
    with encrypted(tmp_path, key_file) as here:
        here.sandbox.stop()
        send(here, "KEPT")
        settings = config(here)
        settings.write_text(settings.read_text().replace(f"file:{key_file}", f"command:cat {key_file}"))
        done = command(here, "queue", "export-key", str(copy))
        assert (done.returncode, KEY in done.stdout + done.stderr) == (0, False)
        assert copy.stat().st_mode & 0o777 == 0o600
        assert command(here, "queue", "export-key", str(copy)).returncode == 1  # it is there
        here.agent.kill()
        settings.write_text(settings.read_text().replace(f"command:cat {key_file}", f"file:{copy}"))
        assert "waiting" in command(here, "queue", "list").stdout
        settings.write_text("\n".join(line for line in settings.read_text().splitlines() if "storeKey" not in line))
        assert "no key" in command(here, "queue", "export-key", str(tmp_path / "none")).stderr


def test_the_key_changes_and_goes(tmp_path: Path, key_file: Path) -> None:
    other = tmp_path / "other.key"
    other.write_text("e" * 64)
    with encrypted(tmp_path, key_file) as here:
        here.sandbox.stop()
        send(here, "KEPT")
        busy = command(here, "queue", "rekey", "--to", f"file:{other}")
        assert busy.returncode == 1 and "another agent" in busy.stderr
        here.agent.terminate()
        assert command(here, "queue", "rekey", "--to", f"file:{other}").returncode == 0
        assert command(here, "queue", "list").returncode == 1  # the settings still name the old one
        settings = config(here)
        settings.write_text(settings.read_text().replace(str(key_file), str(other)))
        assert "waiting" in command(here, "queue", "list").stdout
        assert command(here, "queue", "rekey", "--to", "plain").returncode == 0
        assert ma.is_plain(here.agent.queue_path)
        settings.write_text("\n".join(line for line in settings.read_text().splitlines() if "storeKey" not in line))
        here.sandbox.start()
        here.agent.start()
        here.sandbox.wait_ids("CONTROL-KEPT")


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """An encrypted file with a table and an index of some pages."""
    path, key = tmp_path / "queue", ma.store_key(f"command:echo {KEY}", "aegis")
    path.touch()
    with contextlib.closing(ma.Database(path, key)) as db:
        db.execute(f"PRAGMA application_id={ma.APPLICATION_ID}; PRAGMA user_version={ma.SCHEMA_VERSION}")
        db.execute(f"PRAGMA page_size={ma.PAGE_BYTES}; CREATE TABLE t (x UNIQUE, y)")
        db.executemany("INSERT INTO t VALUES (?, ?)", [(f"{n:09}", "y" * 3000) for n in range(200)])
    yield path, key


def test_a_flipped_bit_is_found_in_every_page(queue: tuple[Path, str]) -> None:
    path, key = queue
    good, dice = path.read_bytes(), random.Random(1)
    assert len(good) > 20 * ma.PAGE_BYTES
    for page in range(len(good) // ma.PAGE_BYTES):
        bad = bytearray(good)
        bad[page * ma.PAGE_BYTES + dice.randrange(ma.PAGE_BYTES)] ^= 1 << dice.randrange(8)
        path.write_bytes(bad)
        with contextlib.closing(ma.Database(path, key)) as db, contextlib.suppress(apsw.CorruptError, apsw.NotADBError):
            assert db.one("PRAGMA integrity_check") != "ok", page  # there are no free pages here: each is read


def test_a_reader_keeps_the_queue_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log would stand beside the new file, and be taken for that file's own."""
    monkeypatch.setattr(ma, "BUSY_MS", 100)
    path, key = tmp_path / "queue", ma.store_key(f"command:echo {KEY}", "aegis")
    path.touch()
    writer = ma.Database(path)
    writer.rows(
        f"PRAGMA journal_mode=WAL; PRAGMA application_id={ma.APPLICATION_ID}; PRAGMA user_version={ma.SCHEMA_VERSION};"
        "CREATE TABLE t (x); INSERT INTO t VALUES (1)"
    )
    with contextlib.closing(ma.Database(path)) as reader:
        reader.execute("BEGIN; SELECT * FROM t")
        with pytest.raises(apsw.BusyError):
            ma.rewrite_queue(path, "", key)
        assert ma.is_plain(path) and writer.one("SELECT x FROM t") == 1
    writer.close()
    ma.rewrite_queue(path, "", key)
    assert not path.with_name("queue-wal").exists()
    with contextlib.closing(ma.Database(path, key)) as db:
        assert db.one("SELECT x FROM t") == 1


def test_a_file_that_is_not_ours_is_not_encrypted(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    path.touch()
    with contextlib.closing(ma.Database(path)) as db:
        db.execute("CREATE TABLE precious (x)")
    with pytest.raises(ma.StorageError, match="foreign"):
        ma.rewrite_queue(path, "", ma.store_key(f"command:echo {KEY}", "aegis"))
    assert ma.is_plain(path)


def test_the_key_is_in_no_error_text(queue: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, key = queue

    def missing(path: str | Path, *rest: Any) -> int:
        return os.dup(1)  # the target is not made, and its folder can take no file

    monkeypatch.setattr(os, "open", missing)
    monkeypatch.setattr(Path, "with_name", lambda self, name: Path("/does/not/exist", name))
    with pytest.raises(Exception) as caught:
        ma.rewrite_queue(path, key, key)
    assert key.rpartition(":")[2] not in str(caught.value)


def test_a_link_to_the_queue_stays_a_link(tmp_path: Path, queue: tuple[Path, str]) -> None:
    path, key = queue
    link = tmp_path / "link"
    link.symlink_to(path)
    ma.rewrite_queue(link, key, "")
    assert link.is_symlink() and ma.is_plain(path)


STEPS = {"unlink": Path, "replace": Path, "open": os, "replace_file": ma, "sync": ma, "sync_folder": ma}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_a_kill_at_each_step_of_a_new_key_leaves_the_queue_to_one_of_both(
    queue: tuple[Path, str], before: bool
) -> None:
    """One of the two keys reads it, and the agent with that key starts; trying again ends well."""
    path, key = queue
    whole, other, killed = path.read_bytes(), ma.store_key(f"command:echo {KEY[::-1]}", "aegis"), 0
    ended = 1
    for step in range(100):
        path.write_bytes(whole)
        ma.mark_key(path, key)
        if (child := os.fork()) == 0:
            count = itertools.count()

            def dying(work: Any) -> Any:
                def run(*given: Any, **named: Any) -> Any:
                    mine = next(count) == step  # noqa: B023
                    if mine and before:
                        os.kill(os.getpid(), signal.SIGKILL)
                    found = work(*given, **named)
                    if mine:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return found

                return run

            for name, owner in STEPS.items():
                setattr(owner, name, dying(getattr(owner, name)))
            ma.rewrite_queue(path, key, other)
            ma.mark_key(path, other)
            os._exit(0)
        ended = os.waitpid(child, 0)[1]
        readable = []
        for one in (key, other):
            with contextlib.suppress(ma.ConfigError, apsw.NotADBError):
                ma.check_key(path, one)
                with contextlib.closing(ma.Database(path, one)) as db:
                    readable += [one] * (db.one("SELECT count(*) FROM t") == 200)
        assert len(readable) == 1, (step, readable)
        if readable == [key]:
            ma.rewrite_queue(path, key, other)
        ma.mark_key(path, other)
        ma.check_key(path, other)
        if ended == 0:
            break
        killed += 1
    assert ended == 0 and killed >= 8


def test_a_disk_that_fills_up_while_converting_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue: tuple[Path, str]
) -> None:
    path, key = queue
    ma.rewrite_queue(path, key, "")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ma, "sync", full)
    with pytest.raises(OSError):
        ma.rewrite_queue(path, "", key)
    assert path.read_bytes() == before and not list(path.parent.glob("*.rewriting*"))
    monkeypatch.undo()
    ma.rewrite_queue(path, "", key)
    assert not ma.is_plain(path)
    with contextlib.closing(ma.Database(path, key)) as db:
        assert db.one("SELECT count(*) FROM t") == 200


def test_where_keys_come_from(tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ma.store_key(f"file:{key_file}", "aegis")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert ma.store_key("systemd:store.key", "aegis") == one == ma.store_key(f"command:cat {key_file}", "aegis")
    assert KEY not in one and ma.store_key("", "aegis") == ""
    key_file.write_text("short")
    for source in (
        f"file:{key_file}",
        "command:true",
        "file:/does/not/exist",
        "command:/does/not/exist",
        "command:'",
        f"command:sh -c 'echo {KEY}; exit 1'",
        "nonsense",
    ):
        with pytest.raises(ma.ConfigError, match="storeKey"):
            ma.store_key(source, "aegis")
    with pytest.raises(ma.ConfigError, match="only Windows has it") as refused:  # test_windows.py reads one there
        ma.store_key(f"dpapi:{key_file}", "aegis")
    assert refused.value.exit_code == 78
    with pytest.raises(ValueError, match="needs the form"):
        ma.key_source("plain text")


def test_a_copy_that_lost_the_mark_of_its_key_is_not_called_damaged_only(tmp_path: Path, key_file: Path) -> None:
    with encrypted(tmp_path, key_file) as here:
        here.agent.terminate()
        here.agent.queue_path.with_name(f"{here.agent.queue_path.name}.key").unlink()
        key_file.write_text("d" * 64)
        here.agent.start(ready=False)
        eventually(lambda: b"If it is encrypted, check storeKey" in here.agent.main_log(), timeout=20)
        key_file.write_text(KEY)
        here.agent.kill()
        here.agent.start()


# --- images: each a file of its own beside the queue, with a key of its own ---


def scan() -> Instance:
    """An object of many blocks that names its patient, in each of them."""
    dataset = made_dataset(PatientName="TESTPERSON^PAULA", PatientID="PATIENT-4711")
    dataset.add_new(0x7FE00010, "OW", b"TESTPERSON PAULA" * 200_000)
    return Instance(SECONDARY, dataset.SOPInstanceUID, EXPLICIT, encoded(dataset))


def imaging(folder: Path, key_file: Path | None, cipher: str = "aegis", address: str = "") -> Any:
    config = f"storeKey = 'file:{key_file}'\nstoreCipher = '{cipher}'" if key_file else "logLevel = 'INFO'"
    return imaging_site(folder, {"PACS": f"dicom://127.0.0.1:{{port}}{address}"}, config=config)


def clear(here: Site) -> set[tuple[str, str]]:
    return {(word, name) for word, name in found_in(here.agent.state_dir) if word in ("TESTPERSON", "PAULA")}


@pytest.mark.parametrize("cipher", ["aegis", "sqlcipher"])
@pytest.mark.parametrize("storage", ["binary", "dicomweb"])
def test_images_on_their_way_are_encrypted_and_arrive_whole(
    tmp_path: Path, key_file: Path, cipher: str, storage: str
) -> None:
    with imaging(tmp_path, key_file, cipher, f"?storage={storage}") as here:
        here.sandbox.stop()
        instances = [scan(), made(1000, PatientName="TESTPERSON^PAULA")]
        assert store(here.ports["PACS"], *instances) == [SUCCESS, SUCCESS]
        assert len(spooled(here)) == 2 and clear(here) == set()
        late = scan()

        def half() -> Iterator[bytes]:
            yield late.content[:2_000_000]
            eventually(lambda: len(spooled(here)) == 3)
            here.agent.kill()

        with pytest.raises((Aborted, OSError)), Scu.for_instances(here.ports["PACS"], late) as scu:
            scu.store(late, half())
        assert clear(here) == set()
        here.sandbox.start()
        start(here)
        for instance in instances:
            if storage == "binary":
                assert_arrived(here, instance)
            else:
                announced(here, instance.uid)
                found = here.sandbox.sandbox.binaries.values()
                assert any(instance.content in (raw if isinstance(raw, bytes) else raw.read_bytes()) for raw in found)
        assert_no_spool(here)


@pytest.mark.parametrize("kill", ["", "keep", "tidy"])
def test_images_that_wait_are_converted_with_their_queue(tmp_path: Path, key_file: Path, kill: str) -> None:
    """And back; a kill between the new file and the queue, or before the plain one is gone, leaves one of both."""
    with imaging(tmp_path, None) as here:
        here.sandbox.stop()
        instances = [scan(), made(1000)]
        assert store(here.ports["PACS"], *instances) == [SUCCESS, SUCCESS]
        here.agent.terminate()
        for log in here.agent.state_dir.glob("*channels*"):
            log.unlink()
        assert clear(here) != set()
        config(here).write_text(f"storeKey = 'file:{key_file}'")
        usual = here.agent.COMMAND
        if kill:
            owner = {"keep": "SpoolFile", "tidy": "Spool"}[kill]
            die = (
                f"w = m.{owner}.{kill}\ndef die(*a):\n w(*a) if {kill == 'keep'} else 0\n m.os.kill(m.os.getpid(), 9)\n"
            )
            changed(here.agent, f"{die}m.{owner}.{kill} = die")
            here.agent.start(ready=False)
            assert here.agent.wait_exit() == -9
            here.agent.COMMAND = usual
        start(here)
        assert clear(here) == set() and len(spooled(here)) == 2
        here.agent.terminate()
        assert command(here, "queue", "rekey", "--to", "plain").returncode == 0
        config(here).write_text("logLevel = 'INFO'")
        here.sandbox.start()
        start(here)
        for instance in instances:
            assert_arrived(here, instance)
        assert_no_spool(here)


def test_a_damaged_image_is_not_sent_and_the_log_says_why(tmp_path: Path, key_file: Path) -> None:
    with imaging(tmp_path, key_file) as here:
        here.sandbox.stop()
        assert store(here.ports["PACS"], scan()) == [SUCCESS]
        (path,) = spooled(here)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        here.sandbox.start()
        here.agent.logged("its file in the spool folder beside the queue cannot be read", 20)
        assert not here.sandbox.sandbox.binaries
        assert_works(here)


def test_an_image_that_is_pushed_to_a_device_is_on_no_disk_in_clear(tmp_path: Path, key_file: Path) -> None:
    """Its file is there until the device has it, or the agent is killed."""
    with imaging(tmp_path, key_file) as here, Storescp(tmp_path / "device") as device, here.caller() as caller:
        instance = scan()
        here.sandbox.sandbox.binaries["Binary/scan"] = part10(instance)
        request = json.dumps({"command": "C-STORE", "binary": {"reference": "Binary/scan"}})
        answer = caller.push(f"dicom://{device.address}", request, contentType="application/json")
        assert json.loads(answer.text)["status"] == 0, answer
        assert device.instances() == {instance.uid: instance.content}
        changed(here.agent, "m.Sender.send = lambda *_, **__: m.os.kill(m.os.getpid(), 9)")
        here.agent.terminate()
        start(here)
        here.agent.wait_connected()
        caller.store(f"dicom://{device.address}", request, contentType="application/json")
        assert here.agent.wait_exit() == -9
        assert spooled(here) and clear(here) == set()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(min_size=0, max_size=200_000), max_size=6), st.data())
def test_an_encrypted_file_reads_as_it_was_written(pieces: list[bytes], dice: st.DataObject) -> None:
    """In whatever pieces, from wherever."""
    with tempfile.TemporaryDirectory() as folder:
        spool = ma.Spool(Path(folder), lambda size: "", "aegis")
        file = ma.SpoolFile(spool)
        for piece in pieces:
            file.write(bytearray(piece))
        whole, name = b"".join(pieces), file.keep()
        assert not file.error and spool.size_bytes == spool.path(name).stat().st_size
        with spool.open(name) as reading:
            assert reading.read() == whole and ma.length_of(reading) == len(whole)
            for _ in range(4):
                start = dice.draw(st.integers(0, len(whole) + 3))
                size = dice.draw(st.integers(0, len(whole) + 3))
                assert reading.seek(start) == start
                assert reading.read(size) == whole[start : start + size]
        spool.remove(name)
        assert spool.size_bytes == 0 and not [*Path(folder).iterdir()]


@pytest.mark.parametrize("cipher", ["", "aegis"])
def test_a_file_that_nobody_wants_any_more_goes_while_it_is_written(tmp_path: Path, cipher: str) -> None:
    """A C-MOVE that was cancelled while objects came: an encrypted file stayed until the next start, all of it counted
    against the disk from then on, and a plain one was written to a descriptor that might be another file's by now."""
    spool, ends = ma.Spool(tmp_path, lambda size: "", cipher), list[str]()

    def write(file: ma.SpoolFile) -> None:
        with pytest.raises(ValueError, match="nobody wants"):
            for _ in range(300):
                file.write(bytes(ma.TRANSFER_BLOCK_BYTES))
        ends.append(file.error)

    for _ in range(20):
        file = ma.SpoolFile(spool)
        writer = threading.Thread(target=write, args=[file])
        writer.start()
        eventually(lambda: file.size)  # noqa: B023
        file.discard()
        writer.join()
    assert ends == [""] * 20 and spool.size_bytes == 0 and not [*tmp_path.iterdir()]
