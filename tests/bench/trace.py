"""Show what one message passes in medplum_agent.py: python3 build.py bench --trace [--list] [--json FILE].

One HL7 message in enhanced mode (until the device has CA and the Bot's AA), one ASTM session, one image (association,
C-STORE, upload, announcement) and one push (until the server has the device's answer) go through an agent that is warm
and has nothing else to do. For each: how many functions ran, of how many classes, in how many sections and threads, and
how often a call crossed the border between two sections. The caller is the nearest function of the module on the stack;
what the event loop, a library's thread or a task calls first has none. A coroutine that goes on after an await counts
as a function that ran, not as a call. `idle` is a time in which nothing comes, and should be 0: what is found there
belongs into HOUSEKEEPING.

This process plays the devices; the stand-in server and the agent are processes of their own. The agent is used through
`resolve_process`, `Agent`, `started` and `run` alone, so this outlives a rewrite of what is inside.
"""

import argparse
import asyncio
import collections
import contextlib
import functools
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = map(str, (ROOT, ROOT / "packaging"))  # not this folder, in which we would hide Python's own `trace`

from build import BuildError, Section, sections  # noqa: E402 - a script finds the modules beside it only now
from tests.bench import bench  # noqa: E402

# What runs now and then whether a message comes or not, by qualified name; with all that it calls it is left out
HOUSEKEEPING = {"Agent._keep_house", "Channel._watch", "Log.flush"}
COMPREHENSIONS = {"<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>"}  # parts of a function; from 3.12 on inlined
WARM_UPS = 2  # of each kind, unrecorded: caches fill, connections and files open
REPEATS = 3  # the recording with the fewest functions counts: chance only adds
IDLE_SECS = 2.0
SETTLE_SECS = 0.05  # after the last answer, for what the agent does behind it
PAUSE_SECS = 0.3  # between two messages: what is written lazily belongs to none of them
WAIT_SECS = 20.0  # for an answer


# --- Recording, in the agent's process -------------------------------------------------------------------------------


class Call(NamedTuple):
    """`resumed`: no call, but a coroutine or generator that goes on."""

    function: types.CodeType
    caller: types.CodeType | None
    thread: str
    resumed: bool


class Recorder:
    """Notes every call of a function of one file while `calls` is a list."""

    def __init__(self, path: str):
        self.path = path
        self.calls: list[Call] | None = None

    def profile(self, frame: types.FrameType, event: str, _: object) -> None:
        """What sys.setprofile and threading.setprofile want."""
        calls, function = self.calls, frame.f_code
        if calls is None or event != "call" or function.co_filename != self.path or function.co_name in COMPREHENSIONS:
            return
        stack = [code for code in codes(frame) if code.co_filename == self.path]
        if HOUSEKEEPING.isdisjoint(code.co_qualname for code in stack):
            caller = stack[1] if len(stack) > 1 else None
            resumed = function.co_code[frame.f_lasti + 1] & 3 != 0  # operand of RESUME: 0 where a function begins
            calls.append(Call(function, caller, threading.current_thread().name, resumed))


def codes(frame: types.FrameType | None) -> Iterator[types.CodeType]:
    """The stack, innermost first."""
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def report(calls: list[Call], path: str) -> dict[str, Any]:
    """What `--json` writes of a recording; functions come in the order of their first call."""
    found = sections(Path(path).read_text("utf-8"))
    counted: collections.Counter[types.CodeType] = collections.Counter()
    crossed: collections.Counter[str] = collections.Counter()
    for function, caller, _, resumed in calls:
        counted[function] += not resumed
        there, here = (section_of(code, found) if code else "" for code in (caller, function))
        if there not in ("", here) and not resumed:
            crossed[f"{there} > {here}"] += 1
    functions = [(section_of(code, found), code.co_qualname, count) for code, count in counted.items()]
    return {
        "functions": len(functions),
        "classes": len({class_of(name) for _, name, _ in functions} - {""}),
        "sections": len({section for section, _, _ in functions}),
        "borders": crossed.total(),
        "threads": len({call.thread for call in calls}),
        "thread_names": sorted({call.thread for call in calls}),
        "crossed": dict(crossed.most_common()),
        "called": functions,
    }


def section_of(code: types.CodeType, found: list[Section]) -> str:
    return next(section.title for section in found if section.first <= code.co_firstlineno <= section.last)


def class_of(name: str) -> str:
    """The class that a function, or the one it is nested in, is a method of; an empty string for none."""
    owner = name.rpartition(".")[0]
    while owner.endswith("<locals>"):
        owner = owner.removesuffix(".<locals>").rpartition(".")[0]
    return owner


async def run_agent(url: str, state_dir: str) -> None:
    """Serve; `begin` and `end` on standard input enclose a recording, and its end ends this process."""
    from medplum_agent import Agent, resolve_process

    recorder = Recorder(str(ROOT / "medplum_agent.py"))
    threading.setprofile(recorder.profile)
    sys.setprofile(recorder.profile)
    arguments = [url, "sandbox-client", "sandbox-secret", bench.AGENT_ID]
    agent = Agent(resolve_process(arguments, {"stateDir": state_dir, "heartbeatSecs": "3600"}, {}, None), None)

    def obey() -> None:
        for command in map(str.strip, sys.stdin):
            calls, recorder.calls = recorder.calls, [] if command == "begin" else None
            tell(report(calls or [], recorder.path) if command == "end" else None)
        os._exit(0)

    serving, started = asyncio.create_task(agent.run()), asyncio.create_task(agent.started.wait())
    await asyncio.wait({serving, started}, return_when=asyncio.FIRST_COMPLETED)
    if started.done():
        tell("started")
        threading.Thread(target=obey, daemon=True).start()
    await serving


def tell(value: object) -> None:
    print(json.dumps(value), flush=True)


# --- The stand-in server, in its process -----------------------------------------------------------------------------


async def run_server(addresses: dict[str, str], device: str) -> None:
    """Serve with a Bot that answers AA to HL7 and nothing to the rest.

    Each line on standard input asks how many messages came, and whether the agent is connected.
    """
    from demo import Sandbox, Transmit, accepting_bot, sandbox_resources

    def bot(transmit: Transmit) -> tuple[int, Any]:
        return accepting_bot(transmit) if transmit.channel == "HL7" else (200, "")

    pump = {"resourceType": "Device", "id": "pump", "url": device}
    sandbox = Sandbox(sandbox_resources(bench.AGENT_ID, addresses) | {"Device/pump": pump})
    sandbox.bot, sandbox.faults.mute_heartbeats = bot, True
    await sandbox.start()
    tell(sandbox.url)
    while await asyncio.to_thread(sys.stdin.readline):
        tell((len(sandbox.transmits), bool(sandbox.agents)))


# --- Devices and the caller of a push, in this process ---------------------------------------------------------------

HL7 = (
    b"\x0bMSH|^~\\&|LAB1|LAB|AGENT|SITE|20260101120500||ORU^R01^ORU_R01|T%d|P|2.5.1\r"
    b"PID|1||12345^^^HOSP^MR||EXAMPLE^ANNA||19700101|F\rOBX|1|NM|GLU^Glucose||5.4|mmol/L\r\x1c\r"
)
RECORDS = "H|\\^&|||CHEM1", "P|1||12345", "O|1|TUBE{}||^^^GLU", "R|1|^^^GLU|5.4|mmol/L", "L|1|N"
ENQ, ACK, EOT = b"\x05", b"\x06", b"\x04"
ORDER = "MSH|^~\\&|CLOUD|SITE|PUMP|WARD|20260101121000||RDS^O13^RDS_O13|P{}|P|2.5.1\rPID|1||12345^^^HOSP^MR\r"
ORDER_ACK = b"\x0bMSH|^~\\&|PUMP|WARD|CLOUD|SITE|20260101121001||ACK^O13^ACK|A1|P|2.5.1\rMSA|AA|%b\r\x1c\r"


def send_hl7(line: socket.socket, number: int) -> None:
    """One message; returns when the Bot's answer is here."""
    line.sendall(HL7 % number)
    read_until(line, b"MSA|CA|T%d" % number, b"MSA|AA|T%d" % number)


def send_astm(line: socket.socket, number: int) -> None:
    """A session with one frame for each record (LIS01-A2 6.3)."""
    texts = [b"%d%b\r\x03" % (n, record.format(number).encode()) for n, record in enumerate(RECORDS, 1)]
    for part in (ENQ, *(b"\x02%b%02X\r\n" % (text, sum(text) % 256) for text in texts)):
        line.sendall(part)
        read_until(line, ACK)
    line.sendall(EOT)


def read_until(line: socket.socket, *wanted: bytes) -> None:
    received = b""
    while not all(part in received for part in wanted):
        chunk = line.recv(65536)
        if not chunk:
            raise bench.BenchError(f"the agent closed the line after {received!r}")
        received += chunk


def send_image(port: int, number: int) -> None:
    """An association with one C-STORE: 8 KiB of pixels under a UID of its own."""
    import pydicom
    import pynetdicom

    image = pydicom.Dataset()
    image.SOPClassUID, image.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, f"2.25.{number}"
    image.StudyInstanceUID, image.PatientID, image.PatientName = "2.25.5", "12345", "EXAMPLE^ANNA"
    image.BitsAllocated = 8
    image.add_new("PixelData", "OW", bytes(8192))
    image.file_meta = pydicom.dataset.FileMetaDataset()
    image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    scanner = pynetdicom.AE("SCANNER")
    scanner.add_requested_context(image.SOPClassUID, image.file_meta.TransferSyntaxUID)
    association = scanner.associate("127.0.0.1", port, ae_title="AGENT")
    if not association.is_established or association.send_c_store(image).get("Status") != 0:
        raise bench.BenchError("the agent refused the association or the image")
    association.release()


def push(server: str, number: int) -> None:
    """What a Bot does: POST Agent/<id>/$push, and wait for the device's answer."""
    secret = {"grant_type": "client_credentials", "client_id": "sandbox-client", "client_secret": "sandbox-secret"}
    token = json.loads(post(f"{server}oauth2/token", urllib.parse.urlencode(secret)))["access_token"]
    order = {"destination": "Device/pump", "contentType": "x-application/hl7-v2+er7", "body": ORDER.format(number)}
    body = json.dumps(order | {"waitForResponse": True})
    answer = post(f"{server}fhir/R4/Agent/{bench.AGENT_ID}/$push", body, f"Bearer {token}")
    if f"MSA|AA|P{number}".encode() not in answer:
        raise bench.BenchError(f"the push was answered {answer!r}")


def post(url: str, body: str, authorization: str = "") -> bytes:
    request = urllib.request.Request(url, body.encode(), {"Authorization": authorization})
    with urllib.request.urlopen(request, timeout=WAIT_SECS) as response:
        return bytes(response.read())


def be_a_pump(listener: socket.socket) -> None:
    """Answer every message with AA, one connection after the other."""
    while True:
        line, _ = listener.accept()
        with line, contextlib.suppress(ConnectionError):
            while message := line.recv(65536):  # a small message, one at a time: it comes in one piece
                line.sendall(ORDER_ACK % message.split(b"|")[9])


# --- All kinds, one after the other ----------------------------------------------------------------------------------


class Role(bench.Peer):
    """A process with a role of this module, which answers each line with JSON."""

    def __init__(self, directory: Path, *arguments: str):
        command = (sys.executable, __file__, *arguments)
        bench.Process.__init__(self, command, directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.listening = self._line()

    def value(self, command: str) -> Any:
        assert self.child.stdin is not None
        self.child.stdin.write(command + "\n")
        self.child.stdin.flush()
        return self._line()


class Kind(NamedTuple):
    """`send` returns with the last answer; then the server has got `announced` messages or gets them soon."""

    name: str
    send: Callable[[int], None]
    announced: int


def trace(directory: Path) -> dict[str, dict[str, Any]]:
    """A report for each kind of message."""
    ports = {name: bench.free_port() for name in ("HL7", "ASTM", "DICOM")}
    forms = {"HL7": "mllp://127.0.0.1:{}?enhanced=true", "ASTM": "tcp://127.0.0.1:{}?mode=astm",
             "DICOM": "dicom://127.0.0.1:{}"}  # fmt: skip
    addresses = {name: form.format(ports[name]) for name, form in forms.items()}
    with contextlib.ExitStack() as stack:
        pump = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=be_a_pump, args=(pump,), daemon=True).start()
        device = f"mllp://127.0.0.1:{pump.getsockname()[1]}"
        server = Role(directory, "server", json.dumps(addresses), device)
        stack.callback(server.stop)
        agent = Role(directory, "agent", server.listening, str(directory / "state"))
        stack.callback(agent.stop)
        wait_for(server, 0, "the agent does not connect")
        sender, analyzer = (
            stack.enter_context(socket.create_connection(("127.0.0.1", ports[name]), WAIT_SECS))
            for name in ("HL7", "ASTM")
        )
        kinds = (
            Kind("HL7 enhanced", functools.partial(send_hl7, sender), 1),
            Kind("ASTM session", functools.partial(send_astm, analyzer), 1),
            Kind("image", functools.partial(send_image, ports["DICOM"]), 1),
            Kind("push", functools.partial(push, server.listening), 0),
        )
        numbers = itertools.count(1)
        found = {kind.name: record(kind, numbers, agent, server) for kind in kinds}
        agent.value("begin")
        time.sleep(IDLE_SECS)
        return found | {"idle": agent.value("end")}


def record(kind: Kind, numbers: Iterator[int], agent: Role, server: Role) -> dict[str, Any]:
    """Warm up, then take the smallest of some recordings."""
    announced = server.value("")[0]
    reports = []
    for _ in range(WARM_UPS + REPEATS):
        time.sleep(PAUSE_SECS)
        announced += kind.announced
        agent.value("begin")
        kind.send(next(numbers))
        wait_for(server, announced, f"no {kind.name} reaches the server")
        time.sleep(SETTLE_SECS)
        reports.append(agent.value("end"))
    return dict(min(reports[WARM_UPS:], key=lambda found: found["functions"]))


def wait_for(server: Role, announced: int, problem: str) -> None:
    """Until the agent is connected and so many messages came in all."""
    until = time.perf_counter() + WAIT_SECS
    while server.value("")[0] < announced or not server.value("")[1]:
        if time.perf_counter() > until:
            raise bench.BenchError(problem)
        time.sleep(0.005)


COLUMNS = ("functions", "classes", "sections", "borders", "threads")


def listed(name: str, found: dict[str, Any]) -> str:
    """The functions of one kind in the order of their first call, then borders and threads."""
    lines = [f"\n{name}: calls, section, function"]
    lines += [f"{count:7} {section:<17} {function}" for section, function, count in found["called"]]
    crossed = ", ".join(f"{border} {count}" for border, count in found["crossed"].items())
    return "\n".join((*lines, f"borders: {crossed}", f"threads: {', '.join(found['thread_names'])}"))


def main() -> None:
    if sys.argv[1:2] == ["agent"]:
        return asyncio.run(run_agent(*sys.argv[2:]))
    if sys.argv[1:2] == ["server"]:
        return asyncio.run(run_server(json.loads(sys.argv[2]), sys.argv[3]))
    parser = argparse.ArgumentParser(prog="trace.py", description="Show what one message passes in medplum_agent.py.")
    parser.add_argument("--list", action="store_true", help="name the functions, borders and threads as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="medplum-agent-trace-") as directory:
            found = trace(Path(directory))
    except (bench.BenchError, BuildError, OSError) as error:
        sys.exit(f"trace: {error}")
    print(f"{'one':<16}" + "".join(f"{column:>11}" for column in COLUMNS))
    for name, figures in found.items():
        print(f"{name:<16}" + "".join(f"{figures[column]:11}" for column in COLUMNS))
    if options.list:
        print("\n".join(listed(name, figures) for name, figures in found.items()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
