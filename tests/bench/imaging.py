"""Measure imaging: python3 tests/bench/imaging.py [--quick] [--json FILE] [--dir DIR].

Objects of 512 KB and 20 MB over one and four associations: MB/s until each is answered 0x0000, with the server away
(intake) and there (delivered: until all are announced), beside dcmtk's storescp and Orthanc with the same senders.
Then the time to an HL7 accept acknowledgment while images come at full speed, beside its value without. Senders,
server and agent are processes that share this machine's cores. Nothing is asserted. Linux only (/proc).
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "packaging")]

from tests.bench import bench  # noqa: E402 - a script finds the module beside it only now
from tests.bench.peers import stdin_line, tell  # noqa: E402
from tests.dicom_peers import SUCCESS, Instance, Orthanc, Scu, Storescp, made  # noqa: E402

SIZES = {"512 KB": 512 * bench.KIB, "20 MB": 20 * bench.MIB}
TOTAL_MIB = {"512 KB": 200, "20 MB": 800}  # sent in all in a full run; a quick one sends a quarter
HL7_MESSAGES = 3000  # a quick run sends a third
WAIT_SECS = 120.0


# --- Roles of processes of their own ---------------------------------------------------------------------------------


def numbered(instance: Instance, sender: int, number: int) -> Instance:
    """The same object under another UID of the same length."""
    uid = f"{sender}{number:06}".rjust(9, "7")
    changed = instance.uid[:-9] + uid
    head = instance.content[:4096].replace(instance.uid.encode(), changed.encode())
    return instance._replace(uid=changed, content=head + instance.content[4096:])


def send(port: int, sender: int, size: int, count: int) -> None:
    """`count` objects (0: until standard input ends) in one association, each after the answer to the one before.

    Prints a line when ready, begins at a line of standard input, and prints the seconds that it took.
    """
    original = made(size, SOPInstanceUID="1.2.826.0.1.3680043.8.498.77.777777777")
    with Scu.for_instances(port, original, timeout=WAIT_SECS) as scu:
        tell("ready")
        sys.stdin.readline()
        stop = asyncio.Event() if count else None
        begin, number = time.perf_counter(), 0
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(sys.stdin.fileno(), bool(count))
            while number < count or (stop is None and not sys.stdin.readline()):
                number += 1
                status = scu.store(numbered(original, sender, number))
                assert status == SUCCESS, f"status 0x{status:04X}"
        tell([time.perf_counter() - begin, number])


async def serve(port: int, addresses: dict[str, str]) -> None:
    """The stand-in server, which throws images away; see peers.py. `count` tells how many were announced."""
    from demo import Sandbox, sandbox_resources

    class Discarding(Sandbox):
        @staticmethod
        async def _stream(reader: asyncio.StreamReader, length: int, path: Path) -> Path:
            while length and (block := await reader.read(min(length, bench.MIB))):
                length -= len(block)
            return path

    announced = 0

    def bot(transmit: Any) -> tuple[int, str]:
        nonlocal announced
        announced += transmit.content_type == "application/json"
        return 200, ""

    sandbox = Discarding(sandbox_resources(bench.AGENT_ID, addresses))
    sandbox.keep_transmits, sandbox.binary_dir, sandbox.bot = False, Path("unused"), bot
    await sandbox.start(port)
    tell(sandbox.url)
    while command := (await stdin_line()).strip():
        if command == "away":
            await sandbox.stop()
        elif command == "back":
            await sandbox.start(port)
        tell(announced if command == "count" else bool(sandbox.agents))


class Role(bench.Peer):
    """A process with a role of this module."""

    def __init__(self, directory: Path, *arguments: object):
        command = (sys.executable, __file__, *map(str, arguments))
        bench.Process.__init__(self, command, directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.listening = self._line()

    def line(self) -> Any:
        return self._line()

    def say(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write("go\n")
        self.child.stdin.flush()

    def value(self, command: str) -> Any:
        assert self.child.stdin is not None
        self.child.stdin.write(command + "\n")
        self.child.stdin.flush()
        return self._line()


# --- Receivers -------------------------------------------------------------------------------------------------------


class Site:
    """An agent with a DICOM and an HL7 channel, an empty queue, and its server."""

    def __init__(self, directory: Path):
        self.port, self.hl7 = bench.free_port(), bench.free_port()
        addresses = {
            "PACS": f"dicom://127.0.0.1:{self.port}",
            "FEED": f"mllp://127.0.0.1:{self.hl7}?enhanced=true&appLevelAck=NE",
        }
        self.server = Role(directory, "server", bench.free_port(), json.dumps(addresses))
        binary = os.environ.get("MEDPLUM_AGENT_BINARY")
        program = [binary] if binary else bench.FROM_SOURCE
        arguments = [self.server.listening, "sandbox-client", "sandbox-secret", bench.AGENT_ID, "--state-dir", "state"]
        with (directory / "agent.out").open("wb") as said:
            self.agent = bench.Process([*program, *arguments], directory, stdout=said, stderr=said)
        for port in (self.port, self.hl7):
            wait(functools.partial(accepts, port), "the agent does not listen")
        wait(lambda: self.server.value("live"), "the agent does not connect")

    def stop(self) -> None:
        self.agent.stop()
        self.server.stop()


def accepts(port: int) -> bool:
    import socket

    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def wait(predicate: Callable[[], object], what: str) -> None:
    until = time.perf_counter() + WAIT_SECS
    while not predicate():
        if time.perf_counter() > until:
            raise bench.BenchError(what)
        time.sleep(0.005)


@contextlib.contextmanager
def new_site(parent: str | None) -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="medplum-agent-bench-", dir=parent) as directory:
        site = Site(Path(directory))
        try:
            yield site
        finally:
            site.stop()


# --- Cases -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """MB/s; None where it was not measured. `cpu_ms`: of the agent per MB, taken and delivered."""

    case: str
    intake: float
    delivered: float
    storescp: float | None = None
    orthanc: float | None = None
    cpu_ms: float | None = None
    rss_mib: float | None = None

    def __str__(self) -> str:
        cells = (self.intake, self.delivered, self.storescp, self.orthanc, self.cpu_ms, self.rss_mib)
        return f"{self.case:14}" + "".join(f"{'-':>11}" if c is None else f"{c:11,.1f}" for c in cells)


COLUMNS = ("intake", "delivered", "storescp", "Orthanc", "CPU ms/MB", "RSS MB")
HEAD = f"{'case':14}" + "".join(f"{name:>11}" for name in COLUMNS)


@contextlib.contextmanager
def new_senders(port: int, associations: int, size: int, count: int) -> Iterator[list[Role]]:
    """Processes that have associated, and wait for the word."""
    with tempfile.TemporaryDirectory() as directory:
        senders = [Role(Path(directory), "send", port, n + 1, size, count) for n in range(associations)]
        try:
            yield senders
        finally:
            for sender in senders:
                sender.stop()


def rate(port: int, associations: int, size: int, count: int, done: Callable[[], None] = lambda: None) -> float:
    """MB/s of so many associations with `count` objects each, until the last answer and what `done` waits for."""
    with new_senders(port, associations, size, count) as senders:
        begin = time.perf_counter()
        for sender in senders:
            sender.say()
        for sender in senders:
            sender.line()
        done()
        return associations * count * size / bench.MIB / (time.perf_counter() - begin)


def measure(name: str, associations: int, mib: int, parent: str | None) -> Row:
    size = SIZES[name]
    count = max(2, mib * bench.MIB // size // associations)
    total = associations * count
    with new_site(parent) as site:
        site.server.ask("away")
        intake = rate(site.port, associations, size, count)
    with new_site(parent) as site:
        cpu = site.agent.cpu()
        all_announced = functools.partial(
            wait, lambda: site.server.value("count") >= total, "not all objects were announced"
        )
        delivered = rate(site.port, associations, size, count, all_announced)
        cpu, peak = site.agent.cpu() - cpu, site.agent.memory("VmHWM")
    sent = total * size / bench.MIB
    row = Row(f"{name} x{associations}", intake, delivered, cpu_ms=cpu * 1000 / sent, rss_mib=peak)
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        if shutil.which("storescp"):
            with Storescp(Path(directory) / "storescp", "--fork") as storescp:
                row.storescp = rate(storescp.port, associations, size, count)
        if shutil.which("Orthanc"):
            with Orthanc(Path(directory) / "orthanc") as orthanc:
                row.orthanc = rate(orthanc.port, associations, size, count)
    return row


def measure_hl7(
    associations: int, size: int, messages: int, parent: str | None, *, elsewhere: bool = False
) -> dict[str, float | None]:
    """Time to the accept acknowledgment in ms, one message at a time, beside so many senders of images.

    `elsewhere`: the images go to dcmtk's storescp, which costs the same machine about as much but not the agent.
    """
    traffic = bench.Traffic("CA", 1, 1, bench.SMALL, messages)
    with contextlib.ExitStack() as stack:
        site = stack.enter_context(new_site(parent))
        port = site.port
        if elsewhere:
            directory = stack.enter_context(tempfile.TemporaryDirectory(dir=parent))
            port = stack.enter_context(Storescp(Path(directory) / "storescp", "--fork", "--ignore")).port
        senders = stack.enter_context(new_senders(port, associations, size, 0))
        for sender in senders:
            sender.say()
        with contextlib.closing(bench.Load(traffic, site.hl7, messages)) as load:
            measured = load.run("CA")
        images = 0.0
        for sender in senders:
            seconds, count = sender.value("stop")
            images += count * size / bench.MIB / seconds
    ordered = sorted(measured.latencies)
    figures = {f"p{part}": measured.latency_ms(part) for part in (50, 99)}
    return figures | {"max": ordered[-1] * 1000, "messages_per_s": measured.rate(), "image_mb_per_s": images}


NOTES = """\
MB/s. intake: answered 0x0000 (on disk, synced) with the server away; delivered: uploaded, announced and answered by
the Bot as well. storescp (--fork, bit preserving) and Orthanc answer before anything is synced. CPU ms/MB and RSS: of
the agent while it delivers; RSS is its peak. HL7 beside images that go to storescp shows what the machine's load alone
costs (storescp syncs nothing); with --dir on a RAM disk nobody waits for a disk.
"""


def run(options: argparse.Namespace) -> dict[str, Any]:
    program, cores = os.environ.get("MEDPLUM_AGENT_BINARY") or "medplum_agent.py", len(os.sched_getaffinity(0))
    print(f"{program}, Python {platform.python_version()}, {cores} cores, load {os.getloadavg()[0]:.1f}\n\n{HEAD}")
    part = 4 if options.quick else 1
    rows = []
    for name in SIZES:
        for associations in (1, 4):
            rows.append(measure(name, associations, TOTAL_MIB[name] // part, options.dir))
            print(rows[-1], flush=True)
    print(f"\n{NOTES}\nHL7: ms to the accept acknowledgment, one message at a time")
    hl7 = {}
    messages = HL7_MESSAGES // (3 if options.quick else 1)
    cases: list[tuple[str, int, int, bool]] = [("alone", 0, 0, False)]
    cases += [(f"beside {name} x4", 4, size, False) for name, size in SIZES.items()]
    if shutil.which("storescp"):
        cases += [(f"{name} to storescp", 4, size, True) for name, size in SIZES.items()]
    for title, associations, size, elsewhere in cases:
        found = hl7[title] = measure_hl7(associations, size, messages, options.dir, elsewhere=elsewhere)
        figures = "".join(f"{n} {v or 0:8.2f}  " for n, v in found.items() if n in ("p50", "p99", "max"))
        print(f"{title:20}{figures}{found['messages_per_s']:7,.0f}/s  images {found['image_mb_per_s']:6,.0f} MB/s")
    return {"program": program, "cores": cores, "rows": [dataclasses.asdict(row) for row in rows], "hl7": hl7}


def main() -> None:
    if sys.argv[1:2] == ["send"]:
        port, sender, size, count = map(int, sys.argv[2:])
        return send(port, sender, size, count)
    if sys.argv[1:2] == ["server"]:
        return asyncio.run(serve(int(sys.argv[2]), json.loads(sys.argv[3])))
    parser = argparse.ArgumentParser(prog="imaging.py", description="Measure imaging on this machine.")
    parser.add_argument("--quick", action="store_true", help="a quarter of the objects")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--dir", metavar="DIR", help="where queues are made; default: the system's temporary folder")
    options = parser.parse_args()
    try:
        found = run(options)
    except (bench.BenchError, OSError) as error:
        sys.exit(f"imaging: {error}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
