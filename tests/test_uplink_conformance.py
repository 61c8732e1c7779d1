"""The uplink contract against a server that knows nothing of the agent: written from the contract, on bare sockets."""

import base64
import contextlib
import gzip
import hashlib
import itertools
import json
import socket
import struct
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support import AGENT_ID, AgentProcess, Device, SandboxThread, control_id, eventually, free_ports

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
HL7 = "x-application/hl7-v2+er7"
Json = dict[str, Any]


def frame(opcode: int, payload: bytes, *, fin: bool = True, compressed: bool = False) -> bytes:
    """An unmasked frame (RFC 6455 5.2)."""
    size = len(payload)
    head = bytes([fin << 7 | compressed << 6 | opcode])
    if size < 126:
        return head + bytes([size]) + payload
    return head + (struct.pack("!BH", 126, size) if size < 65536 else struct.pack("!BQ", 127, size)) + payload


def jwt(**claims: Any) -> str:
    """An unsigned token."""
    parts = ({"alg": "none"}, claims)
    return ".".join(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts) + ".c2ln"


class Request:
    """An HTTP request as it came; `headers` by lower-case name."""

    def __init__(self, line: str, headers: Mapping[str, str], body: bytes, link: "Link"):
        self.method, self.target, self.version = line.split(" ")
        self.headers, self.body, self.link = headers, body, link


def answer(value: object, status: str = "200 OK", **headers: str) -> bytes:
    """A whole HTTP answer with a JSON body."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    fields |= {name.replace("_", "-"): text for name, text in headers.items()}
    return (
        f"HTTP/1.1 {status}\r\n".encode()
        + b"".join(f"{k}: {v}\r\n".encode() for k, v in fields.items())
        + b"\r\n"
        + body
    )


class Link:
    """A connection of the agent: HTTP first, then perhaps WebSocket. `heard` holds its messages."""

    def __init__(self, cloud: "Cloud", accepted: socket.socket):
        self.cloud, self.socket = cloud, accepted
        self.heard: list[Json] = []
        self.frames: list[tuple[int, bytes]] = []
        self.live = False
        self.over = False
        self._file = accepted.makefile("rb")
        self._inflate = zlib.decompressobj(-15)

    def raw(self, content: bytes) -> None:
        with contextlib.suppress(OSError):
            self.socket.sendall(content)

    def say(self, *messages: Json) -> None:
        """Each as a text frame, in one write."""
        self.raw(b"".join(frame(TEXT, json.dumps(one).encode()) for one in messages))

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self, code: int) -> None:
        self.raw(frame(CLOSE, struct.pack("!H", code)))

    def of(self, kind: str) -> list[Json]:
        return [one for one in self.heard if one["type"] == kind]

    def run(self) -> None:
        with contextlib.suppress(OSError, ValueError, EOFError, struct.error), self.socket, self._file:
            while request := self._request():
                self.cloud.requests.append(request)
                if request.headers.get("upgrade", "").lower() == "websocket":
                    self._serve(request)
                    break
                if (content := self.cloud.http(request)) is None:
                    break
                self.raw(content)
                if content.startswith(b"HTTP/1.0") or b"connection: close" in content.lower():
                    break
        self.over = True

    def _request(self) -> Request | None:
        line = self._file.readline().decode().strip()
        if not line:
            return None
        headers: dict[str, str] = {}
        while field := self._file.readline().decode().strip():
            name, _, value = field.partition(":")
            headers[name.lower()] = value.strip()
        return Request(line, headers, self._file.read(int(headers.get("content-length", 0))), self)

    def _serve(self, request: Request) -> None:
        digest = hashlib.sha1(request.headers["sec-websocket-key"].encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11")
        accept = base64.b64encode(digest.digest()).decode()
        content = self.cloud.upgrade(request, accept)
        self.raw(content)
        if b" 101 " not in content:
            return
        self.cloud.links.append(self)
        while True:
            first, second = self._file.read(2)
            size = second & 127
            if size > 125:
                size = int.from_bytes(self._file.read(2 if size == 126 else 8), "big")
            mask = self._file.read(4)
            payload = bytes(a ^ b for a, b in zip(self._file.read(size), itertools.cycle(mask)))
            self.frames.append((first, payload))
            if first & 64:
                payload = self._inflate.decompress(payload + b"\0\0\xff\xff")
            if first & 15 == CLOSE:
                self.raw(frame(CLOSE, payload[:2]))
                return
            if first & 15 == TEXT:
                self.heard.append(json.loads(payload))
                self.cloud.reply(self, self.heard[-1])


class Cloud:
    """The server of the contract. `http`, `upgrade` and `reply` may be replaced."""

    def __init__(self, channels: Mapping[str, str], **agent: Any):
        self.port = free_ports(1)[0]
        entries = [
            {"name": name, "endpoint": {"reference": f"Endpoint/{n}"}, "targetReference": {"reference": "Bot/1"}}
            for n, name in enumerate(channels, 1)]  # fmt: skip
        self.resources: dict[str, Any] = {
            f"Agent/{AGENT_ID}": {
                "resourceType": "Agent",
                "id": AGENT_ID,
                "name": "x",
                "status": "active",
                "channel": entries,
            }
            | agent
        }
        for n, address in enumerate(channels.values(), 1):
            self.resources[f"Endpoint/{n}"] = {
                "resourceType": "Endpoint", "id": str(n), "status": "active", "address": address}  # fmt: skip
        self.requests: list[Request] = []
        self.links: list[Link] = []
        self.grants: Iterator[Json] = (
            {"token_type": "Bearer", "expires_in": 3600, "access_token": f"opaque-{n}"} for n in itertools.count(1)
        )
        self.http: Callable[[Request], bytes | None] = self.serve
        self.upgrade: Callable[[Request, str], bytes] = self.accept
        self.reply: Callable[[Link, Json], None] = self.converse
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self._listener.accept()
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=Link(self, accepted).run, daemon=True).start()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for link in self.links:
            link.end()

    def serve(self, request: Request) -> bytes | None:
        """What the contract has for a request."""
        path = request.target.partition("?")[0]
        if path == "/oauth2/token":
            return answer(next(self.grants))
        if path == "/auth/me":
            return answer({"profile": {"resourceType": "ClientApplication", "id": "x"}, "project": {}})
        if path == "/fhir/R4/Binary":
            return answer({"resourceType": "Binary", "id": "b-1"}, "201 Created")
        if found := self.resources.get(path.removeprefix("/fhir/R4/")):
            return answer(found)
        outcome = {"resourceType": "OperationOutcome", "id": "not-found", "issue": [
            {"severity": "error", "code": "not-found", "details": {"text": "Not found"}}]}  # fmt: skip
        return answer(outcome, "404 Not Found")

    def accept(self, request: Request, key: str) -> bytes:
        return (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {key}\r\n\r\n"
        ).encode()

    def converse(self, link: Link, heard: Json) -> None:
        if heard["type"] == "agent:connect:request":
            link.live = True
            link.say({"type": "agent:connect:response"})
        elif heard["type"] == "agent:heartbeat:request":
            link.say({"type": "agent:heartbeat:response", "version": "5.0.10-abc1234"})
        elif heard["type"] == "agent:transmit:request":
            link.say(self.result(heard))

    def result(self, heard: Json, **members: Any) -> Json:
        """The answer of a Bot that accepts."""
        ack = f"MSH|^~\\&|B|S|||2026||ACK|B1|P|2.5.1\rMSA|AA|{control_id(heard['body'])}|OK"
        same = {name: heard[name] for name in ("channel", "remote", "contentType", "callback")}
        return {"type": "agent:transmit:response", "statusCode": 200, "body": ack} | same | members

    # --- what was seen ---

    @property
    def link(self) -> Link:
        """The connection that is live."""
        return eventually(lambda: [one for one in self.links if one.live and not one.over], 20, "a connection")[-1]

    def of(self, kind: str) -> list[Json]:
        return [one for link in list(self.links) for one in link.of(kind)]

    def asked(self, path: str) -> list[Request]:
        return [one for one in list(self.requests) if one.target.partition("?")[0] == path]

    def ask(self, *messages: Json, timeout: float = 10) -> list[Json]:
        """Send these in one write, each with a callback unless it has one; their answers in that order."""
        whole = [{"callback": f"agent:cb:host:{uuid.uuid4()}"} | one for one in messages]
        link = self.link
        link.say(*whole)
        found = lambda one: [x for x in list(link.heard) if x.get("callback") == one["callback"]]  # noqa: E731
        eventually(lambda: all(map(found, whole)), timeout, f"answers to {whole}, got {link.heard[-5:]}")
        assert [len(found(one)) for one in whole] == [1] * len(whole)
        return [found(one)[0] for one in whole]


class Place:
    """A Cloud and an agent."""

    def __init__(self, cloud: Cloud, agent: AgentProcess, ports: Mapping[str, int]):
        self.cloud, self.agent, self.ports = cloud, agent, ports

    def device(self, channel: str = "A", **options: Any) -> Device:
        return Device(self.ports[channel], **options)

    def works(self, control: str) -> None:
        with self.device(timeout=20) as device:
            assert device.ask(text(control)) == ("AA", control)


def text(control: str, patient: str = "P1") -> str:
    return f"MSH|^~\\&|ADT1|W|A|S|2026||ADT^A01|{control}|P|2.5.1\rPID|||{patient}\r"


@contextlib.contextmanager
def place(
    folder: Path, wanted: Mapping[str, str] = {"A": ""}, *, path: str = "/", ready: bool = True,
    before: Callable[[Cloud], None] = lambda _: None, agent: Json | None = None, **options: Any,
) -> Iterator[Place]:  # fmt: skip
    """A running agent with its Cloud; `before` changes that first."""
    ports = dict(zip(wanted, free_ports(len(wanted)), strict=True))
    addresses = {name: f"mllp://0.0.0.0:{ports[name]}{query}" for name, query in wanted.items()}
    cloud = Cloud(addresses, **(agent or {}))
    before(cloud)
    url = f"http://127.0.0.1:{cloud.port}{path}"
    process = AgentProcess(cast(SandboxThread, None), folder / "state", url=url, **options)
    try:
        process.start(ready=False)
        if ready:
            assert cloud.link
            process.logged("started successfully")
        yield Place(cloud, process, ports)
        assert b"Internal error" not in process.main_log(), process.main_log().decode()[-3000:]
    finally:
        process.discard()
        cloud.stop()


# --- HTTP (uplink contract 1 and 2) ---


def chunks(body: bytes) -> bytes:
    parts = [body[at : at + 9] for at in range(0, len(body), 9)]
    return b"".join(b"%x;name=value\r\n%b\r\n" % (len(part), part) for part in [*parts, b""])


CHUNKED = b"\r\nTransfer-Encoding: chunked\r\n\r\n"
PASSED_ON: dict[str, Callable[[bytes, bytes], bytes]] = {  # head without a length, body
    "gzip": lambda head, body: head + b"\r\nContent-Encoding: gzip" + CHUNKED + chunks(gzip.compress(body)),
    "gzip until it closes": lambda head, body: head.replace(b"HTTP/1.1", b"HTTP/1.0")
    + b"\r\ncontent-encoding: GZIP\r\n\r\n" + gzip.compress(body),
    "HTTP/1.0": lambda head, body: head.replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r\n\r\n" + body,
}  # fmt: skip


def test_answers_as_gateways_pass_them_on(tmp_path: Path) -> None:
    """A gateway that compresses all the same was taken for a portal."""

    def passing(cloud: Cloud, form: Callable[[bytes, bytes], bytes]) -> Callable[[Request], bytes]:
        def http(request: Request) -> bytes:
            head, _, body = (cloud.serve(request) or b"").partition(b"\r\n\r\n")
            return form(b"\r\n".join(line for line in head.split(b"\r\n") if b"Content-Length" not in line), body)

        return http

    def before(cloud: Cloud) -> None:
        cloud.http = passing(cloud, PASSED_ON["gzip"])

    with place(tmp_path, before=before) as here:
        for form in PASSED_ON.values():
            here.cloud.http = passing(here.cloud, form)
            for _ in range(2):
                (reloaded,) = here.cloud.ask({"type": "agent:reloadconfig:request"}, timeout=20)
                assert reloaded.items() >= {"type": "agent:reloadconfig:response", "statusCode": 200}.items()


# --- errors that name no message (uplink contract 4.14 and 5) ---


def refusing(cloud: Cloud, body: str, when: Callable[[Json], bool]) -> None:
    """Transmits are answered with an agent:error without callback as long as `when` says so."""

    def reply(link: Link, heard: Json) -> None:
        if heard["type"] == "agent:transmit:request" and when(heard):
            link.say({"type": "agent:error", "body": body})
        else:
            cloud.converse(link, heard)

    cloud.reply = reply


@pytest.mark.parametrize("query", ["", "?enhanced=aa&retryMode=none&maxWorkers=4"])
def test_a_token_that_was_revoked_costs_a_moment(tmp_path: Path, query: str) -> None:
    """What was refused with it waited for its time-out of 60 s; without repetitions it was a dead letter."""
    with place(tmp_path, {"A": query, "B": ""}) as here:
        if not query:
            here.works("BEFORE-1")
        refusing(here.cloud, "Invalid access token", lambda heard: heard["accessToken"] == "opaque-1")
        with here.device("A") as first, here.device("B") as second:
            first.send(*(text(f"A-{n}", f"P{n}") for n in range(4)))
            assert second.ask(text("B-1")) == ("AA", "B-1")
            for n in range(4):
                here.agent.wait_state(f"A-{n}", "processed")
                assert here.agent.rows(f"A-{n}")[0]["attempts"] <= 2
        assert len(here.cloud.asked("/oauth2/token")) == 2 and len(here.cloud.links) == 1


@pytest.mark.parametrize("body", ["Not found", "Channel not found", "Unexpected"])
def test_a_refusal_that_names_no_message_is_an_answer(tmp_path: Path, body: str) -> None:
    """Its device was told after 60 s and more. What others sent meanwhile is with its Bot, and not refused."""
    with place(tmp_path, {"A": "", "B": "?enhanced=true", "SLOW": ""}) as here:
        held: list[tuple[Link, Json]] = []
        refusing(here.cloud, body, lambda heard: heard["channel"] in "AB")
        reply = here.cloud.reply

        def slow(link: Link, heard: Json) -> None:
            if heard.get("channel") == "SLOW" and not held:
                held.append((link, heard))
            else:
                reply(link, heard)

        here.cloud.reply = slow
        with here.device("A") as first, here.device("B") as second, here.device("SLOW") as third:
            third.send(text("SLOW-1"))
            eventually(lambda: held, 10, "the slow message")
            first.send(text("A-1"))
            eventually(lambda: here.cloud.of("agent:transmit:request")[-1]["channel"] == "A", 10, "the refused one")
            link, heard = held[0]
            link.say(here.cloud.result(heard))
            assert third.ack() == ("AA", "SLOW-1")
            assert first.ack() == ("AE", "A-1")
            assert second.ask(text("B-1")) == ("CA", "B-1")
            eventually(lambda: here.agent.rows("B-1")[0]["error_code"] == "server-rejected", 10, "the refusal")
            assert here.agent.rows("B-1")[0]["state"] == "queued"
        assert body == "Unexpected" or (body in here.agent.rows("B-1")[0]["last_error"]) or body.startswith("Channel")


def test_what_a_forgotten_connection_refused_goes_on_the_next_one(tmp_path: Path) -> None:
    """Its device heard AE, and it was a dead letter."""
    with place(tmp_path) as here:
        refusing(here.cloud, "Not connected", lambda heard: len(here.cloud.links) == 1)
        here.works("A-1")


def test_an_error_may_be_about_what_nobody_waits_for_any_more(tmp_path: Path) -> None:
    """Another message was blamed, and the Bot's answer to it ignored: it was delivered, and a dead letter."""
    with place(tmp_path, {"A": "?retryMode=none&responseTimeoutSecs=0.5", "B": ""}) as here:
        held: list[Json] = []
        reply = here.cloud.reply
        here.cloud.reply = lambda link, heard: held.append(heard) if "body" in heard else reply(link, heard)
        with here.device("A") as first, here.device("B") as second:
            assert first.ask(text("A-1")) == ("AE", "A-1")
            second.send(text("B-1"))
            eventually(lambda: len(held) == 2, 10, "both messages")
            here.cloud.link.say({"type": "agent:error", "body": "Unexpected"}, here.cloud.result(held[1]))
            assert second.ack() == ("AA", "B-1")
            second.send(text("B-2"))
            eventually(lambda: len(held) == 3, 10, "the third")
            here.cloud.link.say({"type": "agent:error", "body": "One too many"})
            assert second.ack() == ("AE", "B-2")
            here.cloud.link.say(here.cloud.result(held[2]))
            here.agent.wait_state("B-2", "processed")
