"""What the end-to-end tests share: a stand-in server in a thread, the agent as a process, blocking MLLP devices."""

import asyncio
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import select
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import pytest
from demo import BotResult, Faults, Sandbox, Transmit, accepting_bot, sandbox_resources

import medplum_agent

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT.parent / "shared/corpora/hl7"
AGENT_ID = "agent-1"
T = TypeVar("T")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a run in the background, whose children would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Below the range that the system gives to clients; each of several test processes has a part of it.
_WORKER, _WORKERS = (int(os.environ.get(name, default)[-1]) for name, default in (
    ("PYTEST_XDIST_WORKER", "0"), ("PYTEST_XDIST_WORKER_COUNT", "1")))  # fmt: skip
_SHARE = 13_000 // _WORKERS
_FIRST = 18_000 + _SHARE * _WORKER
_ports = itertools.count(random.randrange(_SHARE))


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, and that no outgoing connection is given by the system."""
    found: list[int] = []
    while len(found) < count:
        port = _FIRST + next(_ports) % _SHARE
        with (
            contextlib.suppress(OSError),
            socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True),
        ):
            found.append(port)
    return found


def eventually(predicate: Callable[[], T], timeout: float = 10, what: str = "") -> T:
    """The first true value of `predicate`, asked again and again until the time is up."""
    until = time.monotonic() + timeout
    while not (value := predicate()):
        assert time.monotonic() < until, f"not within {timeout} s: {what or predicate}"
        time.sleep(0.01)
    return value


# --- HL7 ---


def message(
    control_id: str, patient: str = "PAT-1", kind: str = "ADT^A01", *, merge: str = "", text: str = "", size: int = 0
) -> str:
    """An HL7 message with CR after each segment; `merge` adds an MRG segment, `size` pads to about so many bytes."""
    segments = [f"MSH|^~\\&|ADT1|WARD|AGENT|SITE|20260101120000||{kind}|{control_id}|P|2.5.1"]
    segments += [f"PID|1||{patient}^^^HOSP^MR||Testperson^Paula"] if patient else []
    segments += [f"MRG|{merge}^^^HOSP^MR"] if merge else []
    segments += [f"NTE|1||{text}"] if text else []
    whole = "\r".join(segments) + "\r"
    return whole + (f"OBX|1|TX|PAD||{'x' * (size - len(whole))}\r" if size > len(whole) else "")


def control_id(body: str) -> str:
    """MSH-10 of a message; of anything else an empty string."""
    fields = body.split("|", 10)
    return fields[9] if len(fields) > 9 else ""


def bot(code: str, text: str = "bot") -> Callable[[Transmit], BotResult]:
    """A Bot that answers each message with this MSA-1."""
    return lambda transmit: (
        200,
        f"MSH|^~\\&|BOT|S|||20260101||ACK|B1|P|2.5.1\rMSA|{code}|{control_id(transmit.body)}|{text}",
    )


def acknowledgment(frame: str) -> tuple[str, str]:
    """MSA-1 and MSA-2."""
    fields = frame.split("\rMSA|", 1)[1].split("\r")[0].split("|")
    return fields[0], fields[1]


class Device:
    """An HL7 device: a blocking socket that speaks MLLP."""

    def __init__(self, port: int, host: str = "127.0.0.1", timeout: float = 10, receive_buffer: int = 0):
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(timeout)
        try:
            self.socket.connect((host, port))
        except OSError:
            self.socket.close()
            raise
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, *messages: str | bytes) -> None:
        """Any number of frames in one write."""
        contents = (m.encode() if isinstance(m, str) else m for m in messages)
        self.socket.sendall(b"".join(b"\x0b" + content + b"\x1c\r" for content in contents))

    def send_raw(self, raw: bytes) -> None:
        self.socket.sendall(raw)

    def receive_bytes(self) -> bytes:
        """The content of one frame; EOFError when the agent closed, TimeoutError when nothing came."""
        while b"\x1c\r" not in self._buffer:
            chunk = self.socket.recv(65536)
            if not chunk:
                raise EOFError("the agent closed the connection")
            self._buffer += chunk
        frame, self._buffer = self._buffer.split(b"\x1c\r", 1)
        assert frame.startswith(b"\x0b"), f"bytes outside of a frame: {frame!r}"
        return frame[1:]

    def receive(self) -> str:
        return self.receive_bytes().decode()

    def ack(self) -> tuple[str, str]:
        """MSA-1 and MSA-2 of the next frame."""
        return acknowledgment(self.receive())

    def ask(self, text: str | bytes) -> tuple[str, str]:
        """Send, and return MSA-1 and MSA-2 of the next frame."""
        self.send(text)
        return self.ack()

    def heard(self, count: int) -> list[tuple[str, str]]:
        """The next `count` acknowledgments, and whatever more comes at once."""
        return [self.ack() for _ in range(count)] + self.drain(0.1)

    def drain(self, quiet: float = 0.25) -> list[tuple[str, str]]:
        """All acknowledgments until nothing came for `quiet` seconds."""
        found = []
        while b"\x1c\r" in self._buffer or select.select([self.socket], [], [], quiet)[0]:
            found.append(self.ack())
        return found

    def closed_by_peer(self, timeout: float = 5) -> bool:
        """Whether the agent closes within the time, saying nothing more."""
        self.socket.settimeout(timeout)
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def half_close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Vanish with a RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


# --- the server ---


class SandboxThread:
    """The stand-in server in an event loop of its own thread.

    `seen` and `answered` hold (time.monotonic(), Transmit) in the order of arrival and of the Bot's answer.
    """

    def __init__(self, resources: Mapping[str, medplum_agent.Json], context: ssl.SSLContext | None = None):
        self.sandbox = Sandbox(resources)
        self.sandbox.on_transmit = self._arrived
        self.sandbox.bot = self._answer
        self.bot: Callable[[Transmit], BotResult] = accepting_bot
        self.seen: list[tuple[float, Transmit]] = []
        self.answered: list[tuple[float, Transmit]] = []
        self.changed = threading.Condition()
        self.loop = asyncio.new_event_loop()
        self._context = context
        self._thread = threading.Thread(target=self.loop.run_forever, name="sandbox", daemon=True)
        self._thread.start()
        self.start()

    def __enter__(self) -> "SandboxThread":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.call(asyncio.sleep(0.05))  # transports close in the next turns of the loop
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()

    def _arrived(self, transmit: Transmit) -> None:
        with self.changed:
            self.seen.append((time.monotonic(), transmit))
            self.changed.notify_all()

    def _answer(self, transmit: Transmit) -> BotResult:
        with self.changed:
            self.answered.append((time.monotonic(), transmit))
            self.changed.notify_all()
        return self.bot(transmit)

    def call(self, work: Coroutine[Any, Any, T], timeout: float = 15) -> T:
        """Run a coroutine in the sandbox's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def start(self) -> None:
        """Listen; after `stop()` on the same port as before."""
        self.call(self.sandbox.start(self.sandbox.port or free_ports(1)[0], self._context))

    def stop(self) -> None:
        """Refuse new connections and cut the open ones."""
        self.call(self.sandbox.stop())

    @property
    def faults(self) -> Faults:
        return self.sandbox.faults

    @property
    def url(self) -> str:
        scheme = "https" if self._context else "http"
        return f"{scheme}://127.0.0.1:{self.sandbox.port}/"

    @property
    def connected(self) -> bool:
        return AGENT_ID in self.sandbox.agents

    def wait_for(self, predicate: Callable[[], T], timeout: float = 10, what: str = "") -> T:
        """The first true value of `predicate`, asked on each arrival and answer, and now and then."""
        until = time.monotonic() + timeout
        with self.changed:
            while not (value := predicate()):
                assert time.monotonic() < until, f"not within {timeout} s: {what or predicate}"
                self.changed.wait(0.02)
        return value

    def ids(self) -> list[str]:
        """Control ids in the order of arrival."""
        with self.changed:
            return [control_id(transmit.body) for _, transmit in self.seen]

    def wait_ids(self, *wanted: str, timeout: float = 10) -> None:
        """Wait until these control ids have arrived."""
        self.wait_for(lambda: set(wanted) <= set(self.ids()), timeout, f"arrival of {wanted}; got {self.ids()[-20:]}")

    def of(self, wanted: str) -> list[Transmit]:
        """All transmits of a control id."""
        with self.changed:
            return [transmit for _, transmit in self.seen if control_id(transmit.body) == wanted]

    def ask(self, kind: str, **members: Any) -> medplum_agent.Json:
        """Send `kind` with a callback to the agent; its answer."""
        return self.call(self.sandbox.ask(AGENT_ID, {"type": kind, **members}))

    def tell(self, raw: bytes) -> None:
        """Send any text to the agent."""
        self.loop.call_soon_threadsafe(lambda: self.sandbox.agents[AGENT_ID].send_raw(raw))

    def reload(self) -> medplum_agent.Json:
        """The answer to a reload request, once the agent has started."""
        until = time.monotonic() + 10
        while "still starting" in str((answer := self.ask("agent:reloadconfig:request")).get("body")):
            assert time.monotonic() < until, answer
        return answer

    def stats(self) -> Any:
        return self.ask("agent:stats:request")["stats"]

    def cut(self) -> None:
        """Close the agent's connection once; the server stays up."""
        self.loop.call_soon_threadsafe(lambda: self.sandbox.agents[AGENT_ID].close())

    def resource(self, reference: str) -> Any:
        """A resource that may be changed."""
        return self.sandbox.resources[reference]


# --- the agent ---


class AgentProcess:
    """The agent as users run it: the module with this Python, or the executable named by MEDPLUM_AGENT_BINARY."""

    COMMAND: Sequence[str] = (
        [os.environ["MEDPLUM_AGENT_BINARY"]]
        if os.environ.get("MEDPLUM_AGENT_BINARY")
        else [sys.executable, "-m", "medplum_agent"]  # as a script it would be compiled at each start
    )

    def __init__(
        self, sandbox: SandboxThread, state_dir: Path, *, config: str = "", env: Mapping[str, str] | None = None,
        url: str = "", secret: str = "sandbox-secret", level: str = "INFO", wrapper: Sequence[str] = (),
    ):  # fmt: skip
        self.sandbox, self.state_dir = sandbox, state_dir
        self.output_path = state_dir.with_name(f"{state_dir.name}-output.txt")
        self.queue_path = state_dir / "medplum-agent-queue.sqlite"
        self.process: subprocess.Popen[bytes] | None = None
        self._url, self._secret, self._level, self._wrapper = url, secret, level, wrapper
        self._env = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY")}
        self._env.pop("PYTHONDONTWRITEBYTECODE", None)
        self._env |= {"PYTHONPATH": str(ROOT)} | dict(env or {})
        self._options = ["--state-dir", str(state_dir)]
        if config:
            path = state_dir.with_name(f"{state_dir.name}-agent.toml")
            path.write_text(config)
            self._options += ["--config", str(path)]

    def start(self, *, ready: bool = True) -> "AgentProcess":
        arguments = [
            self._url or self.sandbox.url,
            "sandbox-client",
            self._secret,
            AGENT_ID,
            *filter(None, [self._level]),
        ]
        with open(self.output_path, "ab") as output:
            self.process = subprocess.Popen(
                [*self._wrapper, *self.COMMAND, *arguments, *self._options], stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env=self._env, cwd=self.state_dir.parent,
            )  # fmt: skip
        if ready:
            self.wait_listening()
            self.wait_connected()
        return self

    def ports(self) -> list[tuple[str, int]]:
        """Host and port of the active Endpoints of the sandbox."""
        endpoints = [r for name, r in self.sandbox.sandbox.resources.items() if name.startswith("Endpoint/")]
        found = [
            re.match(r"(?:mllp|dicom)s?://([^:/]*):(\d+)", e["address"]) for e in endpoints if e["status"] != "off"
        ]
        return [("127.0.0.1" if m[1] == "0.0.0.0" else m[1], int(m[2])) for m in found if m]

    def memory_kb(self, figure: str = "VmHWM") -> int:
        """Resident memory in KiB (proc(5), status): the most there ever was, or VmRSS, which is now."""
        return int(re.findall(rf"{figure}:\s+(\d+)", self._proc("status").read_text())[0])

    def forget_peak(self) -> None:
        """The most there ever was is now (proc(5), clear_refs)."""
        self._proc("clear_refs").write_text("5")

    def _proc(self, name: str) -> Path:
        assert self.process is not None
        return Path(f"/proc/{self.process.pid}/{name}")

    def wait_listening(self, timeout: float = 20) -> None:
        eventually(
            lambda: self._alive() and all(map(accepts, self.ports())), timeout, f"ports open; {self.output()[-2000:]}"
        )

    def wait_connected(self, timeout: float = 20) -> None:
        self.sandbox.wait_for(lambda: self._alive() and self.sandbox.connected, timeout, "the agent is connected")

    def _alive(self) -> bool:
        assert self.process is not None and self.process.poll() is None, f"the agent ended: {self.output()[-3000:]}"
        return True

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def terminate(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """The exit code and the seconds that the clean stop took."""
        assert self.process is not None
        started = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(20), time.monotonic() - started

    def wait_exit(self, timeout: float = 20) -> int:
        assert self.process is not None
        return self.process.wait(timeout)

    def restart(self) -> None:
        self.terminate()
        self.start()

    def output(self) -> str:
        return self.output_path.read_text("utf-8", "replace") if self.output_path.exists() else ""

    def main_log(self) -> bytes:
        """Every byte of the main log's files."""
        return b"".join(path.read_bytes() for path in sorted(self.state_dir.glob("medplum-agent-main-*")))

    def logged(self, text: str, timeout: float = 10) -> str:
        """Wait until the main log has a line with this text; that line."""

        def line() -> str:
            return next((x for x in self.main_log().decode().splitlines() if text in x), "")

        return eventually(line, timeout, f"log line with {text!r} in {self.main_log().decode()[-3000:]}")

    def database(self) -> sqlite3.Connection:
        """The queue file, to be read."""
        return sqlite3.connect(f"{self.queue_path.as_uri()}?mode=ro", uri=True, timeout=5)

    def rows(self, control: str) -> list[dict[str, Any]]:
        """The rows of the queue for a control id, as the view `queue` shows them."""
        with contextlib.closing(self.database()) as db:
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute("SELECT * FROM queue WHERE control_id = ? ORDER BY id", (control,))]

    def wait_state(self, control: str, state: str, timeout: float = 10) -> dict[str, Any]:
        """Wait until the one row of this control id has the state; the row."""

        def found() -> list[dict[str, Any]]:
            return [row for row in self.rows(control) if row["state"] == state]

        return eventually(found, timeout, f"{control} {state}: {self.rows(control)}")[0]

    def discard(self) -> None:
        """End it in any case."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(12)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)


@contextlib.contextmanager
def tmpfs(folder: Path, mib: int) -> Iterator[Path]:
    """A disk of so many MiB, at a new folder."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"NO SMALL DISK: what happens when the disk is full was not checked: {mounted.stderr.decode()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def accepts(address: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=1):
        return True
    return False


# Whatever the disk: what waits is written in the event loop's own thread as long as it is little
INLINE = "m.QUICK_COMMITS, m.QUICK_SECS = 0, 60"


def changed(agent: AgentProcess, code: str) -> None:
    """Run the agent with its module changed by `code`, in which it is called `m`: other limits, slower parts."""
    if os.environ.get("MEDPLUM_AGENT_BINARY"):
        pytest.skip("an executable cannot be changed")
    whole = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import medplum_agent as m\n{code}\nsys.exit(m.main())"
    agent.COMMAND = [sys.executable, "-c", whole]


class Site:
    """A stand-in server, an agent and its channels."""

    def __init__(self, sandbox: SandboxThread, agent: AgentProcess, ports: Mapping[str, int]):
        self.sandbox, self.agent, self.ports = sandbox, agent, dict(ports)
        self.endpoints = {name: f"Endpoint/{number}" for number, name in enumerate(ports, 1)}

    def device(self, channel: str, **options: Any) -> Device:
        return Device(self.ports[channel], **options)

    def caller(self) -> "Caller":
        return Caller(self.sandbox)

    def endpoint(self, channel: str) -> Any:
        return self.sandbox.resource(self.endpoints[channel])


@contextlib.contextmanager
def site(
    folder: Path, channels: Mapping[str, str], settings: Sequence[medplum_agent.Json] = (), *, start: bool = True,
    context: ssl.SSLContext | None = None, **agent: Any,
) -> Iterator[Site]:  # fmt: skip
    """A running Site; `channels`: name -> query of its address (or the whole address with {port})."""
    ports = dict(zip(channels, free_ports(len(channels)), strict=True))
    addresses = {
        name: query.format(port=ports[name]) if "://" in query else f"mllp://127.0.0.1:{ports[name]}{query}"
        for name, query in channels.items()
    }
    with SandboxThread(sandbox_resources(AGENT_ID, addresses, settings), context) as sandbox:
        process = AgentProcess(sandbox, folder / "state", **agent)
        try:
            if start:
                process.start()
            yield Site(sandbox, process, ports)
            assert b"Internal error" not in process.main_log(), process.main_log().decode()[-3000:]
            assert not sandbox.sandbox.violations
        finally:
            process.discard()


def setting(name: str, value: bool | int | float | str) -> medplum_agent.Json:
    """One entry of Agent.setting[]."""
    kind = {bool: "Boolean", int: "Integer", float: "Decimal", str: "String"}[type(value)]
    return {"name": name, f"value{kind}": value}


# --- devices that are pushed to, and who pushes ---


def ack_text(code: str, control: str, text: str = "") -> str:
    """What a device answers: MSH and MSA."""
    return f"MSH|^~\\&|PUMP|WARD|CLOUD|SITE|20260101120000||ACK|A-{control}|P|2.5.1\rMSA|{code}|{control}|{text}\r"


class Link:
    """One connection that the agent made to a Receiver, as its thread and its `behaviour` see it."""

    def __init__(self, receiver: "Receiver", accepted: socket.socket, number: int):
        self.receiver, self.socket, self.number = receiver, accepted, number
        self.frames = 0  # received on this connection
        self.last = ""  # of them
        accepted.settimeout(60)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ack(self, code: str, control: str, text: str = "") -> None:
        self.send(ack_text(code, control, text))

    def send(self, text: str, encoding: str = "utf-8") -> None:
        self.send_raw(b"\x0b" + text.encode(encoding) + b"\x1c\r")

    def send_raw(self, raw: bytes) -> None:
        with contextlib.suppress(OSError):  # the agent may have gone: it was killed, or gave up
            self.socket.sendall(raw)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


Behaviour = Callable[[Link, str], None]


def accepts_all(link: Link, text: str) -> None:
    link.ack("AA", control_id(text))


class Receiver:
    """A device that is pushed to: an MLLP server in threads, one per connection.

    `behaviour(link, text)` is called for each frame and may be changed at any time. `heard` holds the frames in the
    order of arrival; `links` all connections, `open` those that are open, `most` the most that were open at once.
    """

    def __init__(
        self, behaviour: Behaviour = accepts_all, *, port: int = 0, context: ssl.SSLContext | None = None,
        encoding: str = "utf-8", host: str = "127.0.0.1",
    ):  # fmt: skip
        self.behaviour, self.port, self.encoding = behaviour, port, encoding
        self.heard: list[str] = []
        self.links: list[Link] = []
        self.open: set[Link] = set()
        self.most = 0
        self.changed = threading.Condition()
        self._context, self._host = context, host
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for thread in self._threads:
            thread.join(5)

    def start(self) -> None:
        """Listen; after `stop()` on the same port as before."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self.port = self.port or free_ports(1)[0]  # nobody is given it while this does not listen
        self._listener = socket.create_server((self._host, self.port), family=family, backlog=512)
        self._thread(self._listen, self._listener)

    def stop(self) -> None:
        """Refuse connections, and cut those that are open."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        with self.changed:
            links = list(self.open)
        for link in links:
            link.close()

    def _thread(self, run: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _listen(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = listener.accept()
                self._thread(self._serve, accepted)

    def _serve(self, accepted: socket.socket) -> None:
        try:
            if self._context is not None:
                accepted = self._context.wrap_socket(accepted, server_side=True)
        except OSError:  # the agent did not like the certificate, or we did not like its own
            accepted.close()
            return
        with self.changed:
            link = Link(self, accepted, len(self.links))
            self.links.append(link)
            self.open.add(link)
            self.most = max(self.most, len(self.open))
            self.changed.notify_all()
        with accepted:
            with contextlib.suppress(OSError, EOFError):
                self._read(link)
            with self.changed:  # before the other side can see it closed
                self.open.discard(link)
                self.changed.notify_all()

    def _read(self, link: Link) -> None:
        received = b""
        while chunk := link.socket.recv(65536):
            received += chunk
            while b"\x1c\r" in received:
                content, received = received.split(b"\x1c\r", 1)
                assert content.startswith(b"\x0b"), f"bytes outside of a frame: {content!r}"
                text = content[1:].decode(self.encoding)
                with self.changed:
                    self.heard.append(text)
                    link.frames, link.last = link.frames + 1, text
                    self.changed.notify_all()
                self.behaviour(link, text)

    def url(self, query: str = "", scheme: str = "mllp") -> str:
        return f"{scheme}://127.0.0.1:{self.port}{query}"

    def ids(self) -> list[str]:
        """Control ids in the order of arrival."""
        with self.changed:
            return [control_id(text) for text in self.heard]

    def wait_for(self, predicate: Callable[[], T], timeout: float = 10, what: str = "") -> T:
        """The first true value of `predicate`, asked whenever something arrives, and now and then."""
        until = time.monotonic() + timeout
        with self.changed:
            while not (value := predicate()):
                assert time.monotonic() < until, f"not within {timeout} s: {what or predicate}; got {self.ids()[-20:]}"
                self.changed.wait(0.02)
        return value

    def wait_ids(self, *wanted: str, timeout: float = 10) -> None:
        """Wait until exactly these control ids have arrived, in this order."""
        self.wait_for(lambda: len(self.heard) >= len(wanted), timeout, f"arrival of {wanted}")
        assert self.ids() == list(wanted)


class Pushed(NamedTuple):
    """What the caller of $push hears: `text` is the body, or that of an OperationOutcome."""

    status: int
    content_type: str
    text: str
    seconds: float


class Caller:
    """Whoever calls $push: a token and one HTTP connection to the stand-in server."""

    _devices = itertools.count(1)

    def __init__(self, sandbox: SandboxThread):
        self._sandbox = sandbox
        self._http = http.client.HTTPConnection("127.0.0.1", sandbox.sandbox.port, timeout=30)
        form = "grant_type=client_credentials&client_id=sandbox-client&client_secret=sandbox-secret"
        self._http.request("POST", "/oauth2/token", form, {"Content-Type": "application/x-www-form-urlencoded"})
        token = json.loads(self._http.getresponse().read())["access_token"]
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/fhir+json"}

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def device(self, url: str) -> str:
        """A Device resource with this url; its reference."""
        reference = f"Device/{next(self._devices)}"
        self._sandbox.sandbox.resources[reference] = {"resourceType": "Device", "url": url}
        return reference

    def call(self, **members: Any) -> Pushed:
        """POST fhir/R4/Agent/<id>/$push."""
        started = time.monotonic()
        self._http.request("POST", f"/fhir/R4/Agent/{AGENT_ID}/$push", json.dumps(members), self._headers)
        response = self._http.getresponse()
        kind, text = response.headers.get("Content-Type", ""), response.read().decode()
        if '"OperationOutcome"' in text:
            text = json.loads(text)["issue"][0]["details"]["text"]
        return Pushed(response.status, kind, text, time.monotonic() - started)

    def push(self, url: str, body: str, **members: Any) -> Pushed:
        """Push HL7 and wait for the device's answer."""
        kind = members.pop("contentType", medplum_agent.HL7_TYPE)
        return self.call(destination=self.device(url), contentType=kind, body=body, waitForResponse=True, **members)

    def store(self, url: str, *bodies: str, **members: Any) -> None:
        """Push HL7 without waiting for the device, in order."""
        kind, device = members.pop("contentType", medplum_agent.HL7_TYPE), self.device(url)
        for body in bodies:
            answer = self.call(destination=device, contentType=kind, body=body, **members)
            assert answer.status == 200, answer

    def ping(self, host: str, body: str = "PING") -> Pushed:
        return self.call(destination=host, contentType=medplum_agent.PING_TYPE, body=body, waitForResponse=True)


# --- a proxy ---


class ConnectProxy:
    """An HTTP CONNECT proxy in threads; `targets` are the host:port asked for, `authorizations` the credentials."""

    def __init__(self) -> None:
        self.targets: list[str] = []
        self.authorizations: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._listen, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> "ConnectProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), client.makefile("rb") as reader:
            if not (request := reader.readline().decode()):  # who only looked whether there is something
                return
            method, target, _ = request.split(" ", 2)
            headers = http.client.parse_headers(reader)
            assert method == "CONNECT"
            self.targets.append(target)
            self.authorizations.append(headers.get("Proxy-Authorization", ""))
            host, port = target.rsplit(":", 1)
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                self._tunnel(client, server)

    @staticmethod
    def _tunnel(client: socket.socket, server: socket.socket) -> None:
        while True:
            for source in select.select([client, server], [], [])[0]:
                chunk = source.recv(65536)
                if not chunk:
                    return
                (server if source is client else client).sendall(chunk)


def log_lines(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in raw.splitlines()]
