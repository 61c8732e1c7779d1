"""Power cuts: a run is recorded by strace, and the state directory rebuilt as a disk may hold it at any moment of it.

What a disk holds: writes that an fsync of their file followed are there; each later one is dropped, torn at a sector,
or there. A name (made, changed, removed) is certain once its folder was synced, and else there or not. POINTS: moments.
"""

import asyncio
import io
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from demo import accepting_bot

import medplum_agent as ma
from tests.dicom_peers import SUCCESS, made, spooled, start, store
from tests.instruments import ACK, Instrument, frames_of
from tests.support import INLINE, ROOT, AgentProcess, Receiver, Site, eventually, message, site

POINTS = int(os.environ.get("POINTS", "20"))
SECTOR = 512
CHANNELS = {"FEED": "?enhanced=true", "LAB": "tcp://127.0.0.1:{port}?mode=astm", "PACS": "dicom://127.0.0.1:{port}?"}
FILES = "openat write writev pwrite64 ftruncate lseek fsync fdatasync rename unlink mkdir".split()
SENDS = "sendto sendmsg".split()
UNHEARD = """creat pwritev pwritev2 truncate fallocate copy_file_range sendfile renameat renameat2 unlinkat mkdirat
  rmdir link linkat symlink symlinkat dup dup2 dup3""".split()  # what the rebuild cannot do, and the agent must not
# A checkpoint after 20 pages instead of 2000: in a short run the log is copied into the file again and again.
FEW_PAGES = "import sys, medplum_agent as m; m.CHECKPOINT_PAGES = 20; {}; sys.exit(m.main())"

pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="NO STRACE: power cuts were not tried")


class Call(NamedTuple):
    """A system call that succeeded: until the line `begin` nothing of it was done, after the line `end` all."""

    begin: int
    end: int
    name: str
    arguments: str
    result: int

    @property
    def file(self) -> str:
        """What its first argument, a descriptor, stands for."""
        found = re.match(r"\d+<((?:\\x\w\w)+|TCP:\[[^]]+\])", self.arguments)
        return unhex(found[1]).decode() if found else ""

    @property
    def strings(self) -> list[bytes]:
        assert '"...' not in self.arguments, "strace did not record all of it"
        return [unhex(text) for text in re.findall(r'"([^"]*)"', self.arguments)]


def unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", "")) if text.startswith("\\x") else text.encode()


def calls_of(trace: Path) -> Iterator[Call]:
    """In the order of their ends; those that failed are left out."""
    pending: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(trace.read_text("ascii").splitlines()):
        thread, text = line.split(maxsplit=1)
        begin = number
        if text.endswith("<unfinished ...>"):
            pending[thread] = number, text.removesuffix("<unfinished ...>").rstrip()
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>", text):
            begin, first = pending.pop(thread)
            text = first + text[resumed.end() :]
        if found := re.match(r"(\w+)\((.*)\) += (\d+)(?:<.*)?$", text):
            yield Call(begin, number, found[1], found[2], int(found[3]))


class Node:
    """A file or folder: what was asked of it, and what of that a cut leaves."""

    def __init__(self, folder: bool = False):
        self.folder, self.size = folder, 0
        self.changes: list[tuple[int, int, int, Any]] = []  # begin, end, and at a place bytes, its end (None), or names
        self.syncs: list[tuple[int, int]] = []

    def write(self, call: Call, at: int, content: bytes | None) -> int:
        self.changes.append((call.begin, call.end, at, content))
        end = at + len(content or b"")
        self.size = end if content is None else max(self.size, end)
        return end

    def rebuild(self, path: Path, cut: int, dice: random.Random) -> None:
        certain = max((begin for begin, end in self.syncs if end < cut), default=-1)
        names, held = dict[str, Node | None](), bytearray()
        for begin, end, at, content in self.changes:
            share = 1 if end < certain else dice.choice((0, dice.random(), 1)) if begin < cut else 0
            if isinstance(content, dict):
                names |= content if share >= 0.5 else {}
            elif content is None:
                held[at:] = bytes(max(0, at - len(held))) if share >= 0.5 else held[at:]
            else:
                torn = int(at + share * len(content)) // SECTOR * SECTOR - at
                if (size := len(content) if share == 1 else torn) > 0:
                    held += bytes(max(0, at - len(held)))
                    held[at : at + size] = content[:size]
        path.mkdir() if self.folder else path.write_bytes(held)
        for name, node in names.items():
            if node is not None and not name.endswith("-shm"):  # shared memory, which SQLite makes anew
                node.rebuild(path / name, cut, dice)


class Disk:
    """The state directory through a recording."""

    def __init__(self, root: Path, calls: Sequence[Call]):
        self.root, self.top = root, Node(folder=True)
        self._now = {root: self.top}
        self._open: dict[int, tuple[Node, bool]] = {}  # and whether it is written at its end
        self._positions: dict[int, int] = {}
        root_in_hex = "".join(f"\\x{byte:02x}" for byte in f"{root}/".encode())
        for call in calls:
            assert call.name not in UNHEARD or root_in_hex not in call.arguments, call
            if call.name in ("openat", "rename", "unlink", "mkdir"):
                paths = [root.parent / raw.decode() for raw in call.strings]
                if paths[0].is_relative_to(root) and paths[0].suffix != ".sock":  # which bind makes, and nobody keeps
                    self._by_name(call, *paths)
            elif call.name not in SENDS and Path(call.file).is_relative_to(root):
                self._by_number(call, int(call.arguments.split("<")[0]))

    def _by_name(self, call: Call, path: Path, new: Path | None = None) -> None:
        names: dict[str, Node | None] = {}
        if call.name in ("rename", "unlink"):
            assert new is None or new.parent == path.parent
            node = self._now.pop(path)
            names = {path.name: None} | ({new.name: node} if new else {})
        elif path not in self._now:
            names = {path.name: Node(folder=call.name == "mkdir")}
        if names:
            self._now[path.parent].changes.append((call.begin, call.end, 0, names))
            self._now |= {path.with_name(name): node for name, node in names.items() if node is not None}
        if call.name == "openat":
            if "O_TRUNC" in call.arguments:
                self._now[path].write(call, 0, None)
            self._open[call.result], self._positions[call.result] = (self._now[path], "O_APPEND" in call.arguments), 0

    def _by_number(self, call: Call, number: int) -> None:
        node, append = self._open[number]
        if call.name in ("write", "writev"):
            at = node.size if append else self._positions[number]
            self._positions[number] = node.write(call, at, b"".join(call.strings)[: call.result])
        elif call.name in ("pwrite64", "ftruncate"):
            content = call.strings[0][: call.result] if call.name == "pwrite64" else None
            node.write(call, int(call.arguments.rpartition(", ")[2]), content)
        elif call.name == "lseek":
            self._positions[number] = call.result
        elif call.name in ("fsync", "fdatasync"):
            node.syncs.append((call.begin, call.end))


# --- the run ---


class Recording(NamedTuple):
    calls: list[Call]
    disk: Disk
    told: dict[str, int]  # what was acknowledged to a device, or sent to it: the line at which that began
    bodies: dict[str, bytes]  # of it, by control id or UID; of an ASTM session up to a frame, by a name of its own


def feed(here: Site, phase: str) -> dict[str, bytes]:
    """HL7, one message alone and then many at once."""
    texts = {f"HL7-{phase}-{n}": message(f"HL7-{phase}-{n}", f"P{n}", size=50 * n**3) for n in range(9)}
    with here.device("FEED") as device:
        heard = {device.ask(texts[f"HL7-{phase}-0"])}
        device.send(*list(texts.values())[1:])
        while {control for code, control in heard if code == "CA"} != set(texts):
            heard.add(device.ack())
    return {control: text.encode() for control, text in texts.items()}


def scan(here: Site, phase: str) -> dict[str, bytes]:
    images = [made(size, PatientID=phase) for size in (10, 20_000, 90_001)]
    assert store(here.ports["PACS"], *images) == [SUCCESS] * len(images)
    return {image.uid: image.content for image in images}


def analyze(here: Site, phase: str) -> dict[str, bytes]:
    """An ASTM session, and half of one; each ACK is for what had been sent until then, the first for the ENQ."""
    whole = f"H|\\^&|||{phase}", "P|1", "O|1|S1|GLU", f"R|1|^^^GLU|{'5' * 900}|mg/dL", "L|1|N"
    half = f"H|\\^&|||HALF-{phase}", "P|1"
    with Instrument.at(here.ports["LAB"]) as instrument:
        instrument.session(*whole)
        instrument.session(*half, eot=False)
    sent: dict[str, bytes] = {}
    for records in (whole, half):
        texts = [b"", *(frame[2:-5].replace(b"\r", b"\n") for frame in frames_of(*records))]
        sent |= {f"{records[0]} {n}": b"".join(texts[: n + 1]) for n in range(len(texts))}
    return sent


def told(calls: Sequence[Call], ports: dict[str, int], unnamed: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """What was said on the devices' connections, and when that began; `unnamed`: answers that name no message."""
    waiting = {ports[channel]: iter(names) for channel, names in unnamed.items()}
    for call in calls:
        if call.name not in SENDS or not (ends := re.match(r"TCP:\[\S+:(\d+)->\S+:(\d+)\]", call.file)):
            continue
        own, content = int(ends[1]), b"".join(call.strings)
        if own == ports["FEED"] or int(ends[2]) == ports["PUMP"]:
            names = re.findall(rb"\rMSA\|CA\|([^|\r]+)" if own == ports["FEED"] else rb"\|(PUSH-\d)\|", content)
            yield from ((name.decode(), call.begin) for name in names)
        elif (own == ports["PACS"] and content[0] == 4) or (own == ports["LAB"] and content == ACK):
            yield next(waiting[own]), call.begin


@pytest.fixture(scope="module", params=["pass", INLINE], ids=["thread", "loop"])
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Each kind of device, first with the server and then without."""
    folder = tmp_path_factory.mktemp("power")
    trace, bodies, unnamed = folder / "strace.txt", dict[str, bytes](), dict[str, list[str]](PACS=[], LAB=[])
    wrapper = f"strace -D -f -yy -xx -s 2000000 -e trace={','.join([*FILES, *SENDS, *UNHEARD])} -o {trace}".split()
    with pytest.MonkeyPatch.context() as patch, Receiver() as pump:
        patch.setattr(AgentProcess, "COMMAND", [sys.executable, "-c", FEW_PAGES.format(request.param)])
        with site(folder, CHANNELS, start=False, wrapper=wrapper, env={"PYTHONPATH": str(ROOT)}) as here:
            here.sandbox.bot = lambda got: accepting_bot(got) if got.content_type == ma.HL7_TYPE else (200, "")
            start(here)
            here.agent.wait_connected()
            bodies |= {f"PUSH-{n}": message(f"PUSH-{n}", size=3000 * n).encode() for n in range(4)}
            with here.caller() as caller:
                caller.store(pump.url(), *(body.decode() for body in bodies.values()))
            pump.wait_ids(*bodies)
            for phase in ("SERVER", "ALONE"):
                bodies |= feed(here, phase) | (images := scan(here, phase)) | (frames := analyze(here, phase))
                unnamed = {"PACS": [*unnamed["PACS"], *images], "LAB": [*unnamed["LAB"], *frames]}
                if phase == "SERVER":
                    eventually(lambda: not spooled(here), 10, "images uploaded")
                    here.sandbox.stop()
            here.agent.terminate()
            eventually(lambda: b"exited with" in trace.read_bytes()[-200:], 10, "strace to end")
    calls = list(calls_of(trace))
    found = dict(told(calls, here.ports | {"PUMP": pump.port}, unnamed))
    assert found.keys() == bodies.keys()
    return Recording(calls, Disk(folder / "state", calls), found, bodies)


async def read(path: Path, log: ma.Log) -> tuple[list[tuple[str, bytes, str | None, bool]], list[bytes]]:
    """What the agent's own store finds: messages, and ASTM sessions that are none yet."""
    rows = f"SELECT control_id, original, spool, finalized IS NULL AND state <> {ma.PROCESSED} FROM message"
    frames = "SELECT group_concat(CAST(frame AS TEXT), '') FROM (SELECT * FROM partial ORDER BY 1, 2) GROUP BY session"
    queue = ma.Store(path, log)
    await queue.open()
    found: tuple[list[Any], list[Any]] = [], []
    if queue.healthy:
        found = await queue.read(lambda db: (db.execute(rows).fetchall(), db.execute(frames).fetchall()))
    await queue.close()
    return found[0], [text.replace("\r", "\n").encode() for (text,) in found[1]]


def losses(recording: Recording, disk: Disk, points: int, folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """The disk at so many moments, half of them just after an acknowledgment: what is missing, and what is logged."""
    told = sorted(recording.told.values())
    state, queue = folder / "state", folder / "state" / "medplum-agent-queue.sqlite"
    for seed in range(points):
        dice, said, missing = random.Random(seed), io.StringIO(), []
        line = dice.choice(told) + 1 if seed % 2 else dice.randint(disk.top.changes[0][0], recording.calls[-1].end)
        disk.top.rebuild(state, line, dice)
        rows, sessions = asyncio.run(read(queue, ma.Log("main", ma.LoggerSettings(), None, said)))
        found = {control: (body, spool, needed) for control, body, spool, needed in rows}
        sessions += [body for body, _, _ in found.values()]
        for name in (name for name, begin in recording.told.items() if begin < line):
            wanted, (body, spool, needed) = recording.bodies[name], found.get(name, (b"", None, True))
            if name.startswith("H|"):
                kept = any(text.startswith(wanted) for text in sessions)
            elif spool:  # once it is uploaded (`finalized`) its file is not needed any more
                file = queue.with_suffix(".spool") / f"{spool}.dcm"
                kept = not needed or (file.exists() and file.read_bytes().endswith(wanted))
            else:
                kept = body == wanted
            missing += [] if kept else [name]
        yield f"seed {seed}, line {line}", missing, [text for text in said.getvalue().splitlines() if "ERROR" in text]
        shutil.rmtree(state)


def test_what_was_acknowledged_survives_a_power_cut(recording, tmp_path):
    for where, missing, errors in losses(recording, recording.disk, POINTS, tmp_path):
        assert not missing and not [text for text in errors if "cannot be opened" in text], where


def test_a_power_cut_is_not_taken_for_damage(recording, tmp_path):
    assert not [(where, errors) for where, _, errors in losses(recording, recording.disk, POINTS, tmp_path) if errors]


@pytest.mark.parametrize("file", ["-wal", ".part", ".spool", "/state"])
def test_a_sync_that_is_missing_is_found(recording, tmp_path, file):
    """Without the syncs of the log, of images, or of a folder something is lost: the test above can fail."""
    calls = [c for c in recording.calls if c.name not in ("fsync", "fdatasync") or not c.file.endswith(file)]
    try:
        found = any(missing for _, missing, _ in losses(recording, Disk(recording.disk.root, calls), 60, tmp_path))
    except ma.StorageError:  # what is damaged is lost as well
        found = True
    assert found
