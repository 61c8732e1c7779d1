"""The command `doctor`, run as a process against real faults: what it finds, what it advises, and that it ends."""

import contextlib
import datetime
import email.utils
import http.server
import json
import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme
from demo import sandbox_resources

from tests.support import AGENT_ID, AgentProcess, ConnectProxy, SandboxThread, eventually, free_ports

FINE, DOUBTFUL, WRONG = range(3)
SECRET, CLIENT = "sandbox-secret", "sandbox-client"
LONGEST_SECS = 20.0  # of any run, whatever hangs
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


class Found(NamedTuple):
    """What one run of `doctor` said."""

    code: int
    checks: dict[str, list[dict[str, Any]]]  # by name
    outbound: list[list[str]]
    inbound: list[list[str]]
    output: str
    seconds: float

    @property
    def troubles(self) -> list[dict[str, Any]]:
        return [check for checks in self.checks.values() for check in checks if check["level"]]


class Bench:
    """A server, an agent's configuration, and the command line to examine it: a fault changes any of them."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        self.folder, self.stack = folder, stack
        self.state = folder / "state"
        self.port = free_ports(1)[0]
        self.ca = trustme.CA(organization_name="Ward 9 Inspection")
        self.secret, self.agent_id, self.url = SECRET, AGENT_ID, ""
        self.sandbox: SandboxThread
        self.environment: dict[str, str] = {}
        self.wrapper: list[str] = []
        self.secrets = {SECRET}  # nothing of these may be shown
        self.channel(f"mllp://127.0.0.1:{self.port}?enhanced=true")

    def channel(self, address: str) -> None:
        """The server has an Agent with this one channel."""
        resources = sandbox_resources(AGENT_ID, {"ADT": address.format(port=self.port)})
        self.serve(resources=resources | {"Bot/1": {"resourceType": "Bot", "id": "1", "name": "ADT Bot"}})

    def serve(
        self, context: ssl.SSLContext | None = None, resources: dict[str, Any] | None = None
    ) -> SandboxThread:  # fmt: skip
        """Another server, perhaps with TLS; with the same resources where there are no others."""
        known = self.sandbox.sandbox.resources if resources is None else resources
        self.sandbox = self.stack.enter_context(SandboxThread(known, context))
        self.url = self.sandbox.url
        return self.sandbox

    def tls(self, *, host: str = "127.0.0.1", ca: trustme.CA | None = None, **issued: Any) -> None:
        """The server has a certificate of our own authority, which nobody knows."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        (ca or self.ca).issue_cert(host, **issued).configure_cert(context)
        self.serve(context)

    def trust(self) -> None:
        """Our authority is known by caFile."""
        path = self.folder / "ca.pem"
        self.ca.cert_pem.write_to_path(str(path))
        self.environment["MEDPLUM_CA_FILE"] = str(path)

    def resource(self, reference: str) -> Any:
        return self.sandbox.resource(reference)

    def agent(self, name: str = "state") -> AgentProcess:
        """A running agent, with this state folder."""
        agent = AgentProcess(self.sandbox, self.folder / name)
        self.stack.callback(agent.discard)
        return agent.start()

    def mount(self, *options: str) -> Path:
        """A small file system in memory."""
        place = self.folder / "mount"
        place.mkdir()
        if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", place], check=False).returncode:
            pytest.skip("a file system can be mounted here by root only")
        self.stack.callback(lambda: subprocess.run(["umount", place], check=True))
        return place

    def command(self, *options: str) -> list[str]:
        given = ["doctor", self.url, CLIENT, self.secret, self.agent_id, "--state-dir", str(self.state)]
        return [*self.wrapper, *AgentProcess.COMMAND, *given, *options]

    def run(self, *options: str) -> tuple["subprocess.CompletedProcess[str]", float]:
        environment = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
        began = time.monotonic()
        done = subprocess.run(
            self.command(*options), capture_output=True, text=True, timeout=LONGEST_SECS + 5, cwd=self.folder,
            env=environment | self.environment, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        took = time.monotonic() - began
        assert "Traceback" not in done.stderr, done.stderr[-2000:]
        for secret in {self.secret, *self.secrets}:
            assert secret not in done.stdout + done.stderr, "a secret is shown"
        assert took < LONGEST_SECS, f"{took:.1f} s: {done.stdout}"
        return done, took

    def examine(self, *options: str) -> Found:
        done, took = self.run("--json", *options)
        assert done.stdout, done.stderr
        shown = json.loads(done.stdout)
        assert done.returncode == shown["level"] == max(check["level"] for check in shown["checks"])
        checks: dict[str, list[dict[str, Any]]] = {}
        for check in shown["checks"]:
            checks.setdefault(check["name"], []).append(check)
        return Found(done.returncode, checks, shown["outbound"], shown["inbound"], done.stdout, took)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        yield Bench(tmp_path, stack)


# --- what faults are made of ---


class Front:
    """Something before the server that knows no WebSockets: it has a clock of its own, or a page for everybody."""

    def __init__(self, sandbox: SandboxThread, ahead: float = 0, page: int = 0):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def date_time_string(self, timestamp: float | None = None) -> str:
                return email.utils.formatdate(time.time() + ahead, usegmt=True)

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, kind, answer = page, "text/html", b"<html>Welcome to the guest network</html>"
                if not page:
                    work = sandbox.sandbox._respond(self.command, self.path, self.headers, body)  # type: ignore[arg-type] # it only calls get()
                    status, found = sandbox.call(work)
                    kind, answer = "application/fhir+json", json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_POST = do_GET

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "Front":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class Answering:
    """A server that takes connections and answers the first words on each with these; none at all when empty."""

    def __init__(self, words: bytes):
        self._words = words
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._held: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> "Answering":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        for one in (self._listener, *self._held):
            one.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self._listener.accept()
                self._held.append(accepted)
                if self._words and select.select([accepted], [], [], 5)[0]:
                    if not accepted.recv(65536):  # who only looked whether there is something
                        continue
                    accepted.sendall(self._words)
                    accepted.shutdown(socket.SHUT_WR)


def answering(bench: Bench, words: bytes) -> int:
    return bench.stack.enter_context(Answering(words)).port


def closed_port() -> int:
    return free_ports(1)[0]


def full_queue(bench: Bench) -> int:
    """A port whose queue of connections is full: what is sent there is dropped, as by a firewall."""
    listener = bench.stack.enter_context(socket.socket())
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    for _ in range(4):  # how many fit is the system's affair
        one = bench.stack.enter_context(socket.socket())
        one.setblocking(False)
        one.connect_ex(listener.getsockname())
    port: int = listener.getsockname()[1]
    with socket.socket() as probe:  # what fitted is connected by now, and this one does not fit
        probe.settimeout(0.2)
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    return port


def needs(command: str) -> None:
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed")


# --- the faults: each changes a bench on which everything is well ---


def wrong_secret(bench: Bench) -> None:
    bench.secret = "another-secret-4711"


def secret_with_a_dash(bench: Bench) -> None:
    bench.secret = "-another-secret-4711"


def forbidden(reference: str, status: int = 403) -> Callable[[Bench], None]:
    return lambda bench: bench.sandbox.faults.read_failures.update({reference: status})


def missing(reference: str) -> Callable[[Bench], None]:
    return lambda bench: bench.sandbox.sandbox.resources.__delitem__(reference)


def another_agent_id(bench: Bench) -> None:
    bench.agent_id = "agent-9"


def no_base_url(bench: Bench) -> None:
    bench.url = "medplum.example"


def doubled_dot(bench: Bench) -> None:
    bench.url = "https://api..medplum.invalid/"


def fhir_url(bench: Bench) -> None:
    bench.url += "fhir/R4"


def server_trouble(bench: Bench) -> None:
    bench.sandbox.faults.token_failures, bench.sandbox.faults.token_status = 10, 429


def page(status: int) -> Callable[[Bench], None]:
    def arrange(bench: Bench) -> None:
        bench.url = bench.stack.enter_context(Front(bench.sandbox, page=status)).url

    return arrange


def clock(ahead: float) -> Callable[[Bench], None]:
    def arrange(bench: Bench) -> None:
        bench.url = bench.stack.enter_context(Front(bench.sandbox, ahead)).url

    return arrange


def own_clock(bench: Bench) -> None:
    """This machine's is wrong, and tokens look as if they had ended; that does not matter."""
    needs("faketime")
    bench.sandbox.faults.jwt = True
    bench.wrapper = ["faketime", "-f", "+2h"]
    clock(0)(bench)


def clock_before_certificate(bench: Bench) -> None:
    needs("faketime")
    bench.trust()
    bench.tls(not_before=NOW - DAY, not_after=NOW + 99 * DAY)
    bench.wrapper = ["faketime", "-f", "-30d"]


def no_websocket(bench: Bench) -> None:
    clock(0)(bench)


def unknown_host(bench: Bench) -> None:
    bench.url = "https://something.invalid/"


def refused(bench: Bench) -> None:
    bench.url = f"https://127.0.0.1:{closed_port()}/"


def dropped(bench: Bench) -> None:
    bench.url = f"https://127.0.0.1:{full_queue(bench)}/"


def silent(bench: Bench) -> None:
    bench.url = f"https://127.0.0.1:{answering(bench, b'')}/"


def silent_login(bench: Bench) -> None:
    bench.sandbox.faults.hold = "/oauth2"
    bench.stack.callback(setattr, bench.sandbox.faults, "hold", "")


def silent_reads(bench: Bench) -> None:
    bench.sandbox.faults.hold = "/fhir"
    bench.stack.callback(setattr, bench.sandbox.faults, "hold", "")


def plain_port(bench: Bench) -> None:
    bench.url = bench.url.replace("http:", "https:")


def inspected(bench: Bench) -> None:
    bench.tls()


def wrong_ca_file(bench: Bench) -> None:
    other = trustme.CA()
    bench.trust()
    bench.tls(ca=other)


def ca_file_without_certificate(bench: Bench) -> None:
    inspected(bench)
    path = bench.folder / "ca.pem"
    path.write_text("no certificate")
    bench.environment["MEDPLUM_CA_FILE"] = str(path)


def incomplete_chain(bench: Bench) -> None:
    """The server keeps its intermediate certificate to itself."""
    bench.trust()
    leaf = trustme.CA(bench.ca, organization_name="Public Intermediate R3").issue_cert("127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    path = bench.folder / "leaf.pem"
    path.write_bytes(leaf.private_key_pem.bytes() + leaf.cert_chain_pems[0].bytes())
    context.load_cert_chain(path)
    bench.serve(context)


def expired(bench: Bench) -> None:
    bench.trust()
    bench.tls(not_before=NOW - 99 * DAY, not_after=NOW - 3 * DAY)


def not_yet_valid(bench: Bench) -> None:
    bench.trust()
    bench.tls(not_before=NOW + 3 * DAY, not_after=NOW + 99 * DAY)


def ends_soon(bench: Bench) -> None:
    bench.trust()
    bench.tls(not_before=NOW - 99 * DAY, not_after=NOW + 5 * DAY)


def other_host(bench: Bench) -> None:
    bench.trust()
    bench.tls(host="medplum.example")


def closed_proxy(bench: Bench) -> None:
    inspected(bench)
    bench.secrets.add("proxy-word-4711")
    bench.environment["HTTPS_PROXY"] = f"http://ward:proxy-word-4711@127.0.0.1:{closed_port()}"


def unknown_proxy(bench: Bench) -> None:
    inspected(bench)
    bench.environment["HTTPS_PROXY"] = "http://proxy.invalid:3128"


def socks_proxy(bench: Bench) -> None:
    inspected(bench)
    bench.secrets.add("proxy-word-4711")
    bench.environment["HTTPS_PROXY"] = "socks5://ward:proxy-word-4711@127.0.0.1:1080"


def refusing_proxy(status: str) -> Callable[[Bench], None]:
    def arrange(bench: Bench) -> None:
        bench.trust()
        bench.tls()
        bench.secrets.add("proxy-word-4711")
        port = answering(bench, f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        bench.environment["HTTPS_PROXY"] = f"http://ward:proxy-word-4711@127.0.0.1:{port}"

    return arrange


def inspecting_proxy(bench: Bench) -> None:
    inspected(bench)
    bench.environment["HTTPS_PROXY"] = f"http://127.0.0.1:{bench.stack.enter_context(ConnectProxy()).port}"


def occupied(bench: Bench) -> None:
    bench.stack.enter_context(socket.create_server(("", bench.port)))


def privileged(bench: Bench) -> None:
    """A port that takes a right which this process lacks."""
    needs("setpriv")
    if os.geteuid() == 0:
        bench.wrapper = ["setpriv", "--bounding-set", "-net_bind_service", "--inh-caps", "-net_bind_service"]
    bench.port = 881
    bench.channel("mllp://127.0.0.1:{port}?enhanced=true")


def state_below_a_file(bench: Bench) -> None:
    (bench.folder / "file").write_text("")
    bench.state = bench.folder / "file" / "state"


def read_only_disk(bench: Bench) -> None:
    bench.state = bench.mount("-o", "ro")


def small_disk(size: str) -> Callable[[Bench], None]:
    def arrange(bench: Bench) -> None:
        bench.state = bench.mount("-o", f"size={size}")

    return arrange


def full_disk(bench: Bench) -> None:
    bench.state = bench.mount("-o", "size=1m")
    with contextlib.suppress(OSError), open(bench.state / "large", "wb", buffering=0) as file:
        while file.write(bytes(65536)):
            pass


def damaged_queue(bench: Bench) -> None:
    bench.state.mkdir()
    (bench.state / "medplum-agent-queue.sqlite").write_bytes(b"no database" * 1000)


def missing_certificate(bench: Bench) -> None:
    bench.channel("mllps://127.0.0.1:{port}?enhanced=true&certFile=/nowhere/own.pem")


def certificate(**issued: Any) -> Callable[[Bench], None]:
    """Our own, of a channel that listens with TLS."""

    def arrange(bench: Bench) -> None:
        own, path = bench.ca.issue_cert("127.0.0.1", **issued), bench.folder / "own.pem"
        path.write_bytes(own.private_key_pem.bytes() + own.cert_chain_pems[0].bytes())
        bench.channel(f"mllps://127.0.0.1:{{port}}?enhanced=true&certFile={path}")

    return arrange


def channel(address: str) -> Callable[[Bench], None]:
    return lambda bench: bench.channel(address)


def no_bot(bench: Bench) -> None:
    del bench.resource(f"Agent/{AGENT_ID}")["channel"][0]["targetReference"]


def agent_off(bench: Bench) -> None:
    bench.resource(f"Agent/{AGENT_ID}")["status"] = "off"


def another_agent(bench: Bench) -> None:
    bench.agent("another")


def unconnected_agent(bench: Bench) -> None:
    bench.sandbox.faults.never_connect = True
    agent = AgentProcess(bench.sandbox, bench.state)
    bench.stack.callback(agent.discard)
    agent.start(ready=False)
    agent.wait_listening()


def stopped_agent(bench: Bench) -> None:
    """It runs, and answers nobody."""
    process = bench.agent().process
    assert process is not None
    bench.stack.callback(process.send_signal, signal.SIGCONT)
    process.send_signal(signal.SIGSTOP)


def few_files(bench: Bench) -> None:
    bench.wrapper = ["sh", "-c", 'ulimit -n 256; exec "$0" "$@"']


class Fault(NamedTuple):
    """What is arranged, and what is to be found: a check, words of its text and its remedy (patterns).

    `others`: checks that may find something, too; any other may not.
    """

    arrange: Callable[[Bench], None]
    check: str
    level: int
    text: str
    remedy: str
    others: Sequence[str] = ()


SERIAL = "serial:///dev/nonexistent0?startChar=%02&endChar=%03"
FAULTS = {
    # the settings
    "no URL": Fault(no_base_url, "settings", WRONG, "medplum.example", "."),
    "fhir/R4": Fault(fhir_url, "settings", DOUBTFUL, "fhir/R4", "before fhir/R4"),
    "caFile without certificate": Fault(ca_file_without_certificate, "settings", WRONG, "caFile.*ca.pem", "."),
    "SOCKS": Fault(socks_proxy, "settings", WRONG, "socks5://127.0.0.1:1080.*http://host:port", "."),
    # the way
    "unknown host": Fault(unknown_host, "name", WRONG, "something.invalid", "spelling.*name servers"),
    "two dots": Fault(doubled_dot, "name", WRONG, r"api\.\.medplum", "spelling"),
    "closed port": Fault(refused, "tcp", WRONG, "refused", "baseUrl"),
    "dropped": Fault(dropped, "tcp", WRONG, "does not answer", "firewall.*HTTPS_PROXY"),
    "closed proxy": Fault(closed_proxy, "tcp", WRONG, "refused", "HTTPS_PROXY"),
    "unknown proxy": Fault(unknown_proxy, "name", WRONG, "proxy.invalid of the proxy", "HTTPS_PROXY"),
    "proxy wants a password": Fault(
        refusing_proxy("407 Authentication Required"), "login|tls", WRONG, "407", "proxy|HTTPS_PROXY"
    ),
    "proxy forbids": Fault(refusing_proxy("403 Forbidden"), "login|tls", WRONG, "403", "proxy"),
    # TLS
    "no TLS answer": Fault(silent, "tls", WRONG, "no answer", "HTTPS"),
    "plain port": Fault(plain_port, "tls", WRONG, ".", "HTTPS port"),
    "inspected": Fault(inspected, "tls", WRONG, "Ward 9 Inspection", "caFile"),
    "inspected by the proxy": Fault(inspecting_proxy, "tls", WRONG, "Ward 9 Inspection", "caFile"),
    "wrong caFile": Fault(wrong_ca_file, "tls", WRONG, "trustme", "caFile"),
    "no intermediate": Fault(incomplete_chain, "tls", WRONG, "Public Intermediate R3", "intermediate"),
    "expired": Fault(expired, "tls", WRONG, "127.0.0.1 ended 3 d", "renewed.*clock"),
    "not yet valid": Fault(not_yet_valid, "tls", WRONG, "not yet valid", "clock"),
    "clock before certificate": Fault(clock_before_certificate, "tls", WRONG, "not yet valid", "clock"),
    "ends soon": Fault(ends_soon, "tls", DOUBTFUL, "ends in [45] d", "renewed"),
    "another host": Fault(other_host, "tls", WRONG, "127.0.0.1", "as the certificate names it"),
    # the server
    "wrong secret": Fault(wrong_secret, "login", WRONG, "Invalid secret", "clientSecret"),
    "secret with a dash": Fault(secret_with_a_dash, "login", WRONG, "Invalid secret", "clientSecret"),
    "too many requests": Fault(server_trouble, "login", WRONG, "Injected failure", "again|later|server"),
    "guest network": Fault(page(200), "login", WRONG, ".", "baseUrl"),
    "not the API": Fault(page(405), "login", WRONG, "405", "baseUrl"),
    "clock ahead": Fault(clock(-7200), "clock", WRONG, "2 h|1 h 59 min", "NTP", ["websocket"]),
    "clock behind": Fault(clock(7200), "clock", WRONG, "2 h|1 h 59 min", "NTP", ["websocket"]),
    "own clock": Fault(own_clock, "clock", WRONG, "2 h|1 h 59 min", "NTP", ["websocket"]),
    "another Agent": Fault(another_agent_id, "agent", WRONG, "Agent/agent-9: Not found", "agentId"),
    "Agent forbidden": Fault(forbidden(f"Agent/{AGENT_ID}"), "agent", WRONG, "Forbidden", "access policy"),
    "no Endpoint": Fault(missing("Endpoint/1"), "access", WRONG, "Endpoint/1: Not found", "reference"),
    "Endpoint forbidden": Fault(forbidden("Endpoint/1"), "access", WRONG, "Endpoint/1: Forbidden", "access policy"),
    "no Bot": Fault(missing("Bot/1"), "access", WRONG, "Bot/1: Not found", "reference"),
    "Bot forbidden": Fault(forbidden("Bot/1"), "access", WRONG, "Bot/1: Forbidden", "access policy"),
    "no WebSocket": Fault(no_websocket, "websocket", WRONG, "/ws/agent", "proxy or firewall.*WebSocket"),
    "another agent": Fault(another_agent, "other agents", DOUBTFUL, "connected", "Stop the other", ["port"]),
    # channels
    "bad address": Fault(channel("ftp://127.0.0.1:1"), "channels", WRONG, "unsupported.*ftp", "Endpoint"),
    "ignored parameter": Fault(channel("mllp://127.0.0.1:{port}?enhanced=perhaps"), "channels", DOUBTFUL, ".", "Mend"),
    "no targetReference": Fault(no_bot, "channels", DOUBTFUL, "targetReference", "Agent"),
    "Agent off": Fault(agent_off, "channels", DOUBTFUL, "status is off", "Agent"),
    "certFile missing": Fault(missing_certificate, "channels", WRONG, "/nowhere/own.pem", "readable|file"),
    "certFile expired": Fault(
        certificate(not_before=NOW - 9 * DAY, not_after=NOW - 3 * DAY), "certificate", WRONG, "ended 3 d", "renewed"
    ),
    "certFile ends soon": Fault(
        certificate(not_after=NOW + 5 * DAY), "certificate", DOUBTFUL, "ends in 4 d", "renewed"
    ),
    # this machine
    "occupied port": Fault(occupied, "port", WRONG, "'ADT'.* in use", "ss -ltnp"),
    "privileged port": Fault(privileged, "port", WRONG, "881.*[Pp]ermi", "1024|CAP_NET_BIND_SERVICE"),
    "no serial port": Fault(channel(SERIAL), "serial port", WRONG, "/dev/nonexistent0.*missing", "Plug"),
    "state below a file": Fault(state_below_a_file, "state", WRONG, "directory", "writable|another", ["queue", "logs"]),
    "read-only disk": Fault(read_only_disk, "state", WRONG, "[Rr]ead-only", "writable", ["queue", "logs"]),
    "full disk": Fault(full_disk, "state", WRONG, "No space|0 MiB free", "Free space", ["queue", "logs"]),
    "almost full": Fault(small_disk("20m"), "state", WRONG, "[12][0-9] MiB free", "Free space", ["queue", "logs"]),
    "getting full": Fault(small_disk("200m"), "state", DOUBTFUL, "MiB free", "Free space", ["queue", "logs"]),
    "damaged queue": Fault(damaged_queue, "queue", WRONG, "not a database", "recover"),
    "few files": Fault(few_files, "files", DOUBTFUL, "256", "LimitNOFILE=1200"),
    # the running agent
    "agent not connected": Fault(unconnected_agent, "websocket", WRONG, "not connected", "main log"),
    "agent hangs": Fault(
        stopped_agent, "running agent", WRONG, "does not answer", "[Rr]estart", ["port", "other agents"]
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_nothing_else(bench, name):
    fault = FAULTS[name]
    fault.arrange(bench)
    found = bench.examine()
    mine = [check for check in found.troubles if re.fullmatch(fault.check, check["name"])]
    assert mine, f"{fault.check} finds nothing: {found.troubles}"
    assert any(
        check["level"] == fault.level
        and re.search(fault.text, check["text"])
        and re.search(fault.remedy, check["remedy"])
        for check in mine
    ), mine
    strange = [one for one in found.troubles if one not in mine and one["name"] not in fault.others]
    assert not strange, f"the one fault is reported as something else, too: {strange}"
    assert all(check["remedy"] for check in found.troubles)
    assert fault.level == WRONG or fault.others or found.code == fault.level


# --- whatever hangs ---


@pytest.mark.parametrize(("hang", "what"), [(silent_login, "login"), (silent_reads, "agent|Agent")])
def test_a_server_that_never_answers(bench, hang, what):
    hang(bench)
    found = bench.examine()
    assert found.code == WRONG and "state" in found.checks, found.output
    assert any(re.search(what, check["name"] + check["text"]) for check in found.troubles), found.troubles


def test_name_servers_that_never_answer(bench):
    resolv = bench.folder / "resolv.conf"
    resolv.write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:5\n")
    silent_name_server = bench.stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
    try:
        silent_name_server.bind(("127.0.0.1", 53))
        mounted = f'mount --bind {resolv} "$(readlink -f /etc/resolv.conf)"'
        subprocess.run(["unshare", "-m", "sh", "-c", mounted], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"name servers cannot be replaced here: {error}")
    bench.wrapper = ["unshare", "-m", "sh", "-c", f'{mounted}; exec "$0" "$@"']
    bench.url = "https://medplum.example/"
    found = bench.examine()
    assert found.checks["name"][0]["level"] == WRONG and "state" in found.checks


# --- where everything is well ---


def test_all_is_well_without_an_agent(bench):
    found = bench.examine()
    assert found.code == FINE, found.troubles
    assert {"settings", "name", "tcp", "login", "agent", "access", "websocket", "port", "state", "files"} <= {
        *found.checks
    }
    assert found.inbound == [[f"127.0.0.1:{bench.port}", "HL7, channel 'ADT'"]]
    assert found.outbound[0][0] == f"127.0.0.1:{bench.sandbox.sandbox.port}"
    assert not bench.state.exists()  # it would belong to whoever looked


def test_all_is_well_beside_a_running_agent(bench):
    bench.agent()
    before = sorted(bench.state.iterdir())
    found = bench.examine()
    assert found.code == FINE, found.troubles
    assert found.checks["port"][0]["text"].endswith("is open")
    assert found.checks["websocket"][0]["text"] == "connected"
    assert sorted(bench.state.iterdir()) == before


def test_all_is_well_after_a_kill(bench):
    bench.agent().kill()
    eventually(lambda: not bench.sandbox.connected)
    found = bench.examine()
    assert found.code == FINE, found.troubles


def test_all_is_well_with_an_authority_of_ones_own(bench):
    bench.trust()
    bench.tls()
    found = bench.examine()
    assert found.code == FINE, found.troubles
    assert "Ward 9 Inspection" in found.checks["tls"][0]["text"]


def test_all_is_well_through_a_proxy(bench):
    bench.trust()
    bench.tls()
    proxy = bench.stack.enter_context(ConnectProxy())
    bench.secrets.add("proxy-word-4711")
    bench.environment["HTTPS_PROXY"] = f"http://ward:proxy-word-4711@127.0.0.1:{proxy.port}"
    found = bench.examine()
    assert found.code == FINE, found.troubles
    assert proxy.targets and f"127.0.0.1:{proxy.port}" in found.checks["proxy"][0]["text"]
    assert f"127.0.0.1:{proxy.port}" in [where for where, _ in found.outbound]  # what the firewall has to allow


def test_all_is_well_on_a_new_machine(bench):
    """The agent makes its folder, and those above it."""
    bench.state = bench.folder / "lib/medplum-agent/agent-1"
    found = bench.examine()
    assert found.code == FINE, found.troubles


def test_a_port_of_another_address_is_not_ours(bench):
    bench.stack.enter_context(socket.create_server(("127.0.0.2", bench.port)))
    found = bench.examine()
    assert found.code == FINE, found.troubles


def test_the_limit_of_a_running_agent_counts_not_that_of_the_shell(bench):
    bench.agent()
    few_files(bench)
    found = bench.examine()
    assert found.code == FINE, found.troubles


def test_a_serial_port_that_is_there(bench):
    ours, theirs = os.openpty()
    bench.stack.callback(os.close, ours)
    bench.stack.callback(os.close, theirs)
    bench.channel(f"serial://{os.ttyname(theirs)}?startChar=%02&endChar=%03")
    found = bench.examine()
    assert found.code == FINE, found.troubles
    assert "is there" in found.checks["serial port"][0]["text"]
    assert not any("/dev/" in where for where, _ in found.outbound)  # nothing for a firewall


def test_a_channel_that_is_off_needs_no_port(bench):
    bench.resource("Endpoint/1")["status"] = "off"
    bench.stack.enter_context(socket.create_server(("", bench.port)))
    found = bench.examine()
    assert found.code == FINE and found.inbound == [], found.troubles


def test_a_firewall_must_let_the_objects_of_moves_through(bench):
    bench.channel("dicom://127.0.0.1:{port}?moveDestinations=PACS@192.0.2.7:11112")
    assert ["192.0.2.7:11112", "PACS, of moveDestinations"] in list(map(list, bench.examine().outbound))


def test_what_was_saved_is_examined_when_the_server_is_away(bench):
    bench.agent().terminate()
    bench.sandbox.stop()
    found = bench.examine()
    assert found.checks["tcp"][0]["level"] == WRONG
    assert found.checks["port"][0]["level"] == FINE and found.inbound[0][0] == f"127.0.0.1:{bench.port}"


# --- what a person sees ---


def test_the_screen(bench):
    occupied(bench)
    fhir_url(bench)
    bench.environment["MEDPLUM_LOG_LEVEL"] = "DEBUG"
    done, _ = bench.run()
    lines = done.stdout.splitlines()
    assert done.returncode == WRONG and not done.stderr
    assert re.match(r"ok +settings: baseUrl http://127\.0\.0\.1.*\(from the command line\)", lines[0])
    assert "clientSecret is set" in lines[0] and "logLevel DEBUG (from the environment)" in lines[0]
    warned = next(at for at, line in enumerate(lines) if line.startswith("WARN"))
    assert "fhir/R4" in lines[warned] and lines[warned + 1].strip().startswith("-> ")
    failed = next(at for at, line in enumerate(lines) if line.startswith("FAIL"))
    assert f"{bench.port}" in lines[failed] and "ss -ltnp" in lines[failed + 1]
    assert re.search(rf"Inbound.*\n +127\.0\.0\.1:{bench.port} +HL7, channel 'ADT'", done.stdout)
    assert re.search(rf"Outbound.*\n +127\.0\.0\.1:{bench.sandbox.sandbox.port} +", done.stdout)


def test_nothing_is_given(bench):
    line = [*AgentProcess.COMMAND, "doctor", "--state-dir", str(bench.state)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEDPLUM_")}
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=25, cwd=bench.folder, env=environment, check=False
    )
    assert done.returncode == WRONG and done.stdout.count("FAIL  settings: ") == 4, done.stdout + done.stderr
