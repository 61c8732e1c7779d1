"""Measure the agent: python3 build.py bench [--quick] [--case NAME] [--backlog N] [--json FILE] [--against CMD]
[--dir DIR].

The agent runs as a process of its own, as at a site: medplum_agent.py, or the program in MEDPLUM_AGENT_BINARY. This
process plays the devices; peers.py plays the server, and a bare echo that shows what the same traffic could reach at
most on this machine. Nothing is asserted: read the ratios, and repeat what looks odd. Linux only (/proc).
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import random
import re
import selectors
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FROM_SOURCE = [sys.executable, "-m", "medplum_agent"]  # as a script it keeps its syntax tree: 23 MB, and 250 ms
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
PEERS = Path(__file__).with_name("peers.py")
AGENT_ID = "bench-agent"
KIB, MIB = 1024, 1024 * 1024
END = b"\x1c\r"
STALL_SECS = (
    60.0  # no answer for so long ends the run: the agent should never be silent, but may wait 10 s to reconnect
)
START_SECS = 30.0  # from the start of a process to its first sign of life
PREBUILT_BYTES = 128 * MIB  # frames made before the clock starts; more of them are made on the way
PATIENTS = 5000  # enough that order by patient never holds a message back


class BenchError(Exception):
    """The measurement cannot go on; the text says what was seen."""


# --- Traffic ---------------------------------------------------------------------------------------------------------

ADT = (
    b"\x0bMSH|^~\\&|ADT1|WARD|AGENT|SITE|20260101120000||ADT^A08^ADT_A01|B%09d|P|2.5.1\r"
    b"EVN|A08|20260101120000|||1042^MILLER^JOHN^^^DR\r"
    b"PID|1||%09d^^^HOSP^MR||EXAMPLE^ANNA^MARIA||19700101|F|||12 LONG STREET^^SPRINGFIELD^IL^62701^USA||(217)555-0143\r"
    b"NK1|1|EXAMPLE^PETER|SPO^Spouse|12 LONG STREET^^SPRINGFIELD^IL^62701^USA|(217)555-0144\r"
    b"PV1|1|I|WARD3^12^2^HOSP||||1042^MILLER^JOHN^^^DR|2077^SMITH^EVE^^^DR||MED||||7|||||V0012345^^^HOSP^VN\r"
)
SCAN = b"OBX|1|ED|11526-1^Study report^LN||^application^pdf^Base64^%b||||||F\r"


def template(size: int) -> bytes:
    """A frame of about `size` bytes with places for the control id and the patient."""
    room = size - len(ADT % (0, 0))
    return ADT + (SCAN % (b"JVBERi0x" * (room // 8)) if room > len(SCAN) else b"") + END


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What the devices do. `window`: messages that one connection leaves unanswered; 1 is lockstep. `pace`: messages a
    second of all of them; 0 is as fast as they can."""

    name: str
    connections: int
    window: int
    size: int
    messages: int  # in a full run; a quick one sends a fifth
    channel: str = "enhanced"
    counted: str = "CA"  # the acknowledgment that answers a message
    server: bool = False  # is there
    patients: int = PATIENTS
    pace: int = 0

    def frames(self, first: int, count: int) -> Iterator[bytes]:
        """Messages with control ids of their own, from many patients."""
        form = template(self.size)
        made = (form % (number, number % self.patients) for number in range(first, first + count))
        return iter(list(made)) if count * self.size * self.connections <= PREBUILT_BYTES else made

    @property
    def echo(self) -> str:
        """The echo that answers as many frames as the agent does."""
        return "CA+AA" if self.server and self.channel == "enhanced" else "AA" if self.channel != "enhanced" else "CA"


class Device:
    """One connection that keeps up to `window` messages unanswered."""

    def __init__(self, port: int, frames: Iterator[bytes], window: int, pace: float):
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self._frames, self._window, self._pace = frames, window, pace
        self._begin, self._given = time.perf_counter(), 0
        self._unsent = memoryview(b"")
        self._sent_at: collections.deque[float] = collections.deque()  # of unanswered messages
        self._rest = b""  # of an answer that is not complete

    def write(self) -> bool:
        """Send what the window allows; True when the socket would not take it all."""
        if not self._unsent and len(self._sent_at) < self._window:
            room = self._window - len(self._sent_at)
            if self._pace:
                room = min(room, int((time.perf_counter() - self._begin) * self._pace) - self._given)
            batch = list(itertools.islice(self._frames, max(0, room)))
            self._given += len(batch)
            self._unsent = memoryview(b"".join(batch))
            self._sent_at.extend([time.perf_counter()] * len(batch))
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
        return bool(self._unsent)

    def read(self, code: str, latencies: list[float]) -> int:
        """The number of acknowledgments with this code that came; the n-th one is taken to answer the n-th message."""
        received = self._rest + self.sock.recv(256 * KIB)
        if len(received) == len(self._rest):
            raise BenchError("the agent closed a connection")
        cut = received.rfind(END) + len(END) if END in received else 0
        whole, self._rest = received[:cut], received[cut:]
        found = {name: whole.count(b"\rMSA|%b|" % name.encode()) for name in ("CA", "AA")}
        if sum(found.values()) != whole.count(END):
            bad = next(frame for frame in whole.split(END) if b"MSA|CA|" not in frame and b"MSA|AA|" not in frame)
            raise BenchError(f"an answer other than CA or AA: {bad.decode()!r}")
        now = time.perf_counter()
        answered = min(found[code], len(self._sent_at))
        latencies.extend(now - self._sent_at.popleft() for _ in range(answered))
        return found[code]


class Load:
    """The devices of one run. `marks` holds (seconds since the first byte, answers so far)."""

    def __init__(self, traffic: Traffic, port: int, messages: int):
        self.each = messages // traffic.connections
        self.messages = self.each * traffic.connections
        self._selector, self._paced = selectors.DefaultSelector(), traffic.pace > 0
        self._devices = [
            Device(
                port, traffic.frames(number * self.each, self.each), traffic.window, traffic.pace / traffic.connections
            )
            for number in range(traffic.connections)
        ]
        for device in self._devices:
            self._selector.register(device.sock, selectors.EVENT_READ, device)

    def run(self, code: str) -> "Measured":
        """Until as many acknowledgments with this code came as there are messages."""
        answers, marks, latencies = 0, [(0.0, 0)], list[float]()
        heard = time.perf_counter()
        cpu, begin = time.process_time(), time.perf_counter()
        for device in self._devices:
            self._write(device)
        while answers < self.messages:
            events = self._selector.select(0.001 if self._paced else STALL_SECS)
            if not events and time.perf_counter() - heard > STALL_SECS - 1:
                raise BenchError(f"silent for {STALL_SECS:.0f} s after {answers} of {self.messages} {code}")
            heard = time.perf_counter() if events else heard
            for device in self._devices if self._paced else ():
                self._write(device)
            for key, mask in events:
                if mask & selectors.EVENT_READ:
                    answers += key.data.read(code, latencies)
                self._write(key.data)
            marks.append((time.perf_counter() - begin, answers))
        return Measured(marks, latencies, time.process_time() - cpu)

    def _write(self, device: Device) -> None:
        more = selectors.EVENT_WRITE if device.write() else 0
        if self._selector.get_key(device.sock).events != selectors.EVENT_READ | more:
            self._selector.modify(device.sock, selectors.EVENT_READ | more, device)

    def close(self) -> None:
        for device in self._devices:
            device.sock.close()
        self._selector.close()


@dataclasses.dataclass
class Measured:
    marks: list[tuple[float, int]]
    latencies: list[float]
    cpu: float  # seconds of this process

    def rate(self, begin: float = 0.0, end: float = 1.0) -> float:
        """Messages a second in a part of the run, by number of messages."""
        total = self.marks[-1][1]
        (t0, n0), (t1, n1) = (next(m for m in self.marks if m[1] >= total * part) for part in (begin, end))
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    def latency_ms(self, percentile: int) -> float | None:
        ordered = sorted(self.latencies)
        return ordered[len(ordered) * percentile // 100] * 1000 if ordered else None


# --- Processes -------------------------------------------------------------------------------------------------------


class Process:
    """A child and its own children (the one-file program has one)."""

    def __init__(self, command: Sequence[str], directory: Path, **options: Any):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "packaging")))}
        self.child = subprocess.Popen(command, cwd=directory, env=env, **options)

    def _pids(self) -> list[int]:
        pids = [self.child.pid]
        for pid in pids:
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return pids

    def cpu(self) -> float:
        """Seconds of all threads."""
        ticks = 0
        for pid in self._pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # proc(5): utime, stime
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self, row: str) -> float:
        """MiB: VmRSS now, VmHWM at its peak."""
        kib = 0
        for pid in self._pids():
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                kib += int(line.split()[1]) if line.startswith(row + ":") else 0
        return kib / KIB

    def stop(self) -> None:
        self.child.send_signal(signal.SIGTERM)
        try:
            self.child.wait(15)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()


class Peer(Process):
    """A role of peers.py; `listening` is what it printed first."""

    def __init__(self, directory: Path, *arguments: str):
        command = (sys.executable, str(PEERS), *arguments)
        super().__init__(command, directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.listening = self._line()

    def _line(self) -> Any:
        assert self.child.stdout is not None
        if line := self.child.stdout.readline():
            return json.loads(line)
        raise BenchError(f"{PEERS.name} ended with {self.child.wait()}")

    def ask(self, command: str) -> bool:
        """Give a command to the server; True when the agent is connected to it."""
        assert self.child.stdin is not None
        self.child.stdin.write(command + "\n")
        self.child.stdin.flush()
        return bool(self._line())


class Site:
    """An agent with an empty queue and its server. `start_ms`: from the start of the process to its open ports."""

    def __init__(self, directory: Path, program: Sequence[str]):
        self.ports = {name: free_port() for name in CHANNELS}
        addresses = {name: f"mllp://127.0.0.1:{port}{CHANNELS[name]}" for name, port in self.ports.items()}
        self.server = Peer(directory, "server", str(free_port()), AGENT_ID, json.dumps(addresses))
        arguments = [self.server.listening, "sandbox-client", "sandbox-secret", AGENT_ID]
        self._said = directory / "agent.out"
        with self._said.open("wb") as said:
            self._begin = time.perf_counter()
            self.agent = Process([*program, *arguments], directory, stdout=said, stderr=said)

    def wait(self) -> None:
        """Until both ports are open."""
        for port in self.ports.values():
            while time.perf_counter() - self._begin < START_SECS and self.agent.child.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.002)
            else:
                raise BenchError(f"the agent does not listen; it said:\n{self._said.read_text()}")
        self.start_ms = (time.perf_counter() - self._begin) * 1000

    def uplink(self, there: bool) -> None:
        """Wait until the agent is connected; then, if the server is not to be there, take it away."""
        while not self.server.ask("live"):
            time.sleep(0.005)
        if not there:
            self.server.ask("away")
            time.sleep(0.2)  # for the agent to notice

    def stop(self) -> None:
        self.agent.stop()
        self.server.stop()


def ours() -> list[str]:
    binary = os.environ.get("MEDPLUM_AGENT_BINARY")
    return [*([binary] if binary else FROM_SOURCE), "--state-dir", "state"]


@contextlib.contextmanager
def new_site(parent: str | None, program: Sequence[str] = ()) -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="medplum-agent-bench-", dir=parent) as directory:
        site = Site(Path(directory), program or ours())
        try:
            site.wait()
            yield site
        finally:
            site.stop()


def free_port() -> int:
    """Below the ports that systems give to outgoing connections, so that a waiting device never meets itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def syncs_per_second(parent: str | None, seconds: float = 1.0) -> float:
    """fdatasync after each write of 8 KiB, round and round in a file of 8 MiB, as in a write-ahead log."""
    with tempfile.TemporaryFile(dir=parent) as file:
        file.write(bytes(8 * MIB))
        os.fsync(file.fileno())
        count, begin, page = 0, time.perf_counter(), os.urandom(8 * KIB)
        while (passed := time.perf_counter() - begin) < seconds:
            os.pwrite(file.fileno(), page, count % 1024 * len(page))
            os.fdatasync(file.fileno())
            count += 1
        return count / passed


# --- Cases -----------------------------------------------------------------------------------------------------------

CHANNELS = {"enhanced": "?enhanced=true", "original": "", "aa": "?enhanced=aa"}
SMALL, LARGE, HUGE = 480, 100 * KIB, 1000 * KIB
TRAFFIC = (
    *(Traffic(f"intake lockstep x{n}", n, 1, SMALL, 8000 * n) for n in (1, 4)),
    Traffic("intake lockstep x16", 16, 1, SMALL, 60_000),
    *(Traffic(f"intake pipelined x{n}", n, 500, SMALL, 150_000) for n in (1, 4, 16)),
    *(Traffic(f"intake 100 KB x{n}", n, 16, LARGE, 4000) for n in (1, 4)),
    *(Traffic(f"intake 1 MB x{n}", n, 4, HUGE, 400) for n in (1, 4)),
    Traffic("relay original x4", 4, 500, SMALL, 50_000, "original", "AA", server=True),
    Traffic("relay enhanced x4", 4, 500, SMALL, 50_000, "enhanced", "AA", server=True),
    Traffic("CA+AA lockstep x1", 1, 1, SMALL, 6000, "enhanced", "AA", server=True),
    Traffic("CA+AA lockstep x16", 16, 1, SMALL, 24_000, "enhanced", "AA", server=True),
    Traffic("original lockstep x1", 1, 1, SMALL, 6000, "original", "AA", server=True),
    Traffic("original lockstep x16", 16, 1, SMALL, 24_000, "original", "AA", server=True),
    Traffic("original 100 in flight", 1, 100, SMALL, 50_000, "original", "AA", server=True),
    Traffic("original, one patient", 1, 100, SMALL, 10_000, "original", "AA", server=True, patients=1),
    Traffic("aa lockstep x1", 1, 1, SMALL, 8000, "aa", "AA", server=True),
    Traffic("aa lockstep x16", 16, 1, SMALL, 60_000, "aa", "AA", server=True),
    Traffic("aa 100 KB lockstep", 1, 1, LARGE, 2000, "aa", "AA", server=True),
    Traffic("aa 1 MB lockstep", 1, 1, HUGE, 300, "aa", "AA", server=True),
    Traffic("aa at 5,000/s x16", 16, 100, SMALL, 50_000, "aa", "AA", server=True, pace=5000),
)


COLUMNS = {  # title: width, digits
    "msgs/s": (10, 0), "ceiling": (10, 0), "ratio": (7, 2), "p50 ms": (9, 2), "p99 ms": (9, 2),
    "CPU us": (9, 1), "others": (8, 1), "RSS MB": (8, 0),
}  # fmt: skip
HEAD = f"{'case':26}" + "".join(f"{title:>{width}}" for title, (width, _) in COLUMNS.items())


@dataclasses.dataclass
class Row:
    """One line of the table; None shows as a dash."""

    case: str
    rate: float  # messages/s
    ceiling: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    agent_us: float | None = None  # CPU microseconds per message, all threads
    others_us: float | None = None  # the same of devices and server
    rss_mib: float | None = None  # peak

    def __str__(self) -> str:
        ratio = self.rate / self.ceiling if self.ceiling else None
        times = (self.p50_ms, self.p99_ms, self.agent_us, self.others_us)
        cells = zip((self.rate, self.ceiling, ratio, *times, self.rss_mib), COLUMNS.values(), strict=True)
        shown = (f"{'-':>{w}}" if value is None else f"{value:{w},.{digits}f}" for value, (w, digits) in cells)
        return f"{self.case:26}" + "".join(shown)


def measure(traffic: Traffic, messages: int, echo: Peer, parent: str | None, program: Sequence[str]) -> Row:
    """One kind of traffic: first through a new agent, then against the echo."""
    with new_site(parent, program) as site:
        site.uplink(traffic.server)
        with contextlib.closing(Load(traffic, site.ports[traffic.channel], messages)) as load:
            agent, server = site.agent.cpu(), site.server.cpu()
            measured = load.run(traffic.counted)
            agent, server = site.agent.cpu() - agent, site.server.cpu() - server
        peak = site.agent.memory("VmHWM")
    with contextlib.closing(Load(traffic, echo.listening[traffic.echo], messages)) as load:
        ceiling = load.run(traffic.counted).rate()
    per_message = 1e6 / load.messages
    return Row(
        traffic.name, measured.rate(), ceiling, measured.latency_ms(50), measured.latency_ms(99),
        agent * per_message, (server + measured.cpu) * per_message, peak,
    )  # fmt: skip


def measure_backlog(messages: int, echo: Peer, parent: str | None) -> list[Row]:
    """Messages pile up while the server is away; then it comes and all of them drain."""
    traffic = Traffic(f"backlog {messages:,}", 4, 500, SMALL, messages)
    with contextlib.closing(Load(traffic, echo.listening["CA"], min(messages, 100_000))) as load:
        ceiling = load.run("CA").rate()
    with new_site(parent) as site:
        site.uplink(False)
        with contextlib.closing(Load(traffic, site.ports["enhanced"], messages)) as load:
            cpu = site.agent.cpu()
            stored = load.run("CA")
            cpus = [cpu, site.agent.cpu()]
            rss = site.agent.memory("VmRSS")
            site.server.ask("back")
            others = site.server.cpu()
            drained = load.run("AA")
            cpus.append(site.agent.cpu())
            others = site.server.cpu() - others + drained.cpu
        peak = site.agent.memory("VmHWM")
    first, last = drained.marks[1], drained.marks[-1]
    drain_secs = last[0] - first[0]  # not the wait for the agent's next try to connect
    per_message = 1e6 / load.messages
    return [
        Row(f"{traffic.name}: 1st tenth", stored.rate(0.0, 0.1), ceiling),
        Row(f"{traffic.name}: last", stored.rate(0.9, 1.0), ceiling, agent_us=(cpus[1] - cpus[0]) * per_message,
            others_us=stored.cpu * per_message, rss_mib=rss),
        Row(f"drained in {drain_secs:,.1f} s", (last[1] - first[1]) / drain_secs,
            agent_us=(cpus[2] - cpus[1]) * per_message, others_us=others * per_message, rss_mib=peak),
    ]  # fmt: skip


def measure_idle(parent: str | None, starts: int) -> tuple[float, float]:
    """Milliseconds until it listens, and MiB two seconds later, connected to the server: medians of several starts."""
    found = []
    for _ in range(starts):
        with new_site(parent) as site:
            site.uplink(True)
            time.sleep(2)
            found.append((site.start_ms, site.agent.memory("VmRSS")))
    return statistics.median(ms for ms, _ in found), statistics.median(mib for _, mib in found)


# --- The report ------------------------------------------------------------------------------------------------------

NOTES = """\
ceiling: a bare asyncio echo for the same traffic, in memory, same interpreter. CPU us: of the agent per message, all
threads; others: of devices and server. RSS: the agent's peak; of "last" tenth: at its end. p50 and p99: from handing
a message to the socket to its CA (original, aa, relay and CA+AA: AA; there, the n-th answer is taken for the n-th
message's).
"""


def run(options: argparse.Namespace) -> dict[str, Any]:
    program, cores = os.environ.get("MEDPLUM_AGENT_BINARY") or "medplum_agent.py", len(os.sched_getaffinity(0))
    syncs, version = round(syncs_per_second(options.dir)), platform.python_version()
    found: dict[str, Any] = {"program": program, "python": version, "cores": cores, "fdatasync_per_s": syncs}
    print(
        f"{program}, Python {version}, {cores} cores (devices and server share them with the agent), "
        f"load {os.getloadavg()[0]:.1f}, {syncs:,} fdatasync/s of 8 KiB\n\n{HEAD}"
    )
    wanted = [name.lower() for name in options.case]
    patterns = [rf"\b{re.escape(name)}\b" for name in wanted]  # whole words: x1 is not x16
    chosen = [case for case in TRAFFIC if not wanted or any(re.search(p, case.name.lower()) for p in patterns)]
    rows: list[Row] = []

    def show(*lines: Row) -> None:
        rows.extend(lines)
        print(*lines, sep="\n", flush=True)

    with tempfile.TemporaryDirectory() as directory:
        echo = Peer(Path(directory), "echo")
        for case in chosen:
            count = case.messages // (5 if options.quick else 1)
            show(measure(case, count, echo, options.dir, ours()))
            if options.against:
                try:
                    other = measure(case, count, echo, options.dir, shlex.split(options.against))
                    show(dataclasses.replace(other, case=f"  {Path(shlex.split(options.against)[-1]).name}"))
                except BenchError as error:
                    print(f"  {options.against}: {error}", flush=True)
        if not wanted or "backlog" in wanted:
            show(*measure_backlog(options.backlog or (20_000 if options.quick else 100_000), echo, options.dir))
        echo.stop()
    if not wanted or "idle" in wanted:
        start_ms, rss_mib = measure_idle(options.dir, 1 if options.quick else 3)
        found |= {"start_ms": start_ms, "idle_rss_mib": rss_mib}
        print(f"idle: listening {start_ms:.0f} ms after its start, RSS {rss_mib:.0f} MB")
    print(f"\n{NOTES}", end="")
    return found | {"rows": [dataclasses.asdict(row) for row in rows]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="build.py bench", description="Measure the agent on this machine.")
    option = parser.add_argument
    option("--quick", action="store_true", help="a fifth of the messages: about half a minute in all")
    option("--case", action="append", default=[], metavar="NAME", help="only cases with NAME in their name; repeatable")
    option("--backlog", type=int, metavar="N", help="messages stored with the server away; default 100000")
    option("--json", type=Path, metavar="FILE", help="write the figures there as well")
    option(
        "--against",
        metavar="CMD",
        help="beside each case another agent, which takes the same four arguments, in an empty working directory",
    )
    option("--dir", metavar="DIR", help="where queues are made; default: the system's temporary folder")
    options = parser.parse_args()
    try:
        found = run(options)
    except (BenchError, OSError) as error:
        sys.exit(f"bench: {error}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
