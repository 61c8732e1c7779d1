"""What the DICOM tests talk with: a bare DICOM client, dcmtk's programs, Orthanc, and pynetdicom as destination."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import pydicom
import pydicom.uid
import pytest
import trustme
from demo import Transmit, accepting_bot
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.presentation import build_context, build_role
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification  # type: ignore[attr-defined]

from medplum_agent import HL7_TYPE, JSON_TYPE
from tests.support import Site, accepts, eventually, free_ports, site

IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN = (
    "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2",
)  # fmt: skip
VERIFICATION, CT, SECONDARY = "1.2.840.10008.1.1", "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.7"
STUDY_FIND, STUDY_MOVE, STUDY_GET = (f"1.2.840.10008.5.1.4.1.2.2.{n}" for n in (1, 2, 3))
PATIENT_FIND, PATIENT_MOVE, PATIENT_GET = (f"1.2.840.10008.5.1.4.1.2.1.{n}" for n in (1, 2, 3))
WORKLIST, MPPS = "1.2.840.10008.5.1.4.31", "1.2.840.10008.3.1.2.3.3"
COMMITMENT, COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
SUCCESS, CANCEL, OUT_OF_RESOURCES, MISMATCH, NOT_UNDERSTOOD = 0x0000, 0xFE00, 0xA700, 0xA900, 0xC000
MOVE_UNKNOWN, UNABLE = 0xA801, 0xC001
ECHO_RQ, STORE_RQ = 0x0030, 0x0001
RJ, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = 3, 4, 5, 6, 7
FAST = "autoRetryBaseDelayMs=20&autoRetryMaxDelayMs=200&autoRetryMaxAttempts=0&deadLetterAfterHours=0"
ROOT_UID = "1.2.826.0.1.3680043.8.498.77"  # pydicom's; what tests make is below it

QUIET = pytest.mark.filterwarnings(
    "ignore::UserWarning:pydicom.*",
    "ignore::UserWarning:pynetdicom.*",
    "ignore::pytest.PytestUnraisableExceptionWarning",  # sockets that pynetdicom, here as the device, forgets
)
needs_dcmtk = pytest.mark.skipif(not shutil.which("storescu"), reason="NO DCMTK: its programs were not tried")
needs_orthanc = pytest.mark.skipif(not shutil.which("Orthanc"), reason="NO ORTHANC: it was not tried")


# --- certificates ---


class Tls:
    """An authority, its certificates for the agent and for a device, and contexts of devices."""

    def __init__(self, folder: Path):
        ca = trustme.CA()
        self.ca_file, self.agent_file, self.foreign_file = folder / "ca.pem", folder / "agent.pem", folder / "else.pem"
        self.key_file, self.cert_file = folder / "device-key.pem", folder / "device-cert.pem"
        ca.cert_pem.write_to_path(self.ca_file)
        ca.issue_cert("127.0.0.1", "localhost").private_key_and_cert_chain_pem.write_to_path(self.agent_file)
        device = ca.issue_cert("modality.example.test")
        device.private_key_pem.write_to_path(self.key_file)
        device.cert_chain_pems[0].write_to_path(self.cert_file)
        foreign = trustme.CA().issue_cert("modality.example.test")
        foreign.private_key_and_cert_chain_pem.write_to_path(self.foreign_file)

    def context(self, cert: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca_file))
        if cert is not None:
            context.load_cert_chain(cert, key)
        return context


# --- objects ---


class Instance(NamedTuple):
    """A composite object as it goes over the wire: `content` is the encoded data set."""

    sop_class: str
    uid: str
    syntax: str
    content: bytes


def split_part10(raw: bytes) -> tuple[dict[int, bytes], bytes]:
    """The File Meta elements by element number, and the data set's bytes (PS3.10 7.1)."""
    position, meta = (132 if raw[128:132] == b"DICM" else 0), {}
    while raw[position : position + 2] == b"\x02\x00":
        element, vr = struct.unpack_from("<H2s", raw, position + 2)
        long = vr in (b"OB", b"OW", b"UN", b"SQ", b"UT")
        size = struct.unpack_from("<I" if long else "<H", raw, position + (8 if long else 6))[0]
        position += 12 if long else 8
        meta[element] = raw[position : position + size]
        position += size
    return meta, raw[position:]


def uid_of(value: bytes | None) -> str:
    return (value or b"").rstrip(b"\0 ").decode()


def instance_of(raw: bytes) -> Instance:
    """A file's contents as storescu would send them: the data set's own UIDs, else those of the File Meta."""
    meta, content = split_part10(raw)
    found = pydicom.dcmread(DicomBytesIO(raw), force=True, stop_before_pixels=True)
    implicit, little = found.original_encoding
    guess = IMPLICIT if implicit else EXPLICIT if little else BIG_ENDIAN
    return Instance(
        str(found.get("SOPClassUID", "")) or uid_of(meta.get(2)) or CT,
        str(found.get("SOPInstanceUID", "")) or uid_of(meta.get(3)) or f"{ROOT_UID}.1",
        uid_of(meta.get(0x10)) or guess,
        content,
    )


def read_instance(path: Path) -> Instance:
    return instance_of(path.read_bytes())


def pydicom_files() -> dict[str, Path]:
    """Every .dcm file inside pydicom's package."""
    found = sorted((Path(pydicom.__file__).parent / "data").rglob("*.dcm"))
    return {path.name: path for path in found}


def assert_same_elements(original: Instance, content: bytes) -> None:
    """dcmtk may leave out group lengths and padding, and writes lengths of sequences its own way."""
    ours, theirs = (
        pydicom.dcmread(DicomBytesIO(part10(original._replace(content=raw)))) for raw in (original.content, content)
    )
    assert ours.get("PixelData") == theirs.get("PixelData")
    drop = [e.tag for e in ours if e.tag.elem == 0 or e.tag == 0xFFFCFFFC]
    for tag in drop:
        del ours[tag]
    assert [e.tag for e in ours] == [e.tag for e in theirs]
    assert all(a.value == b.value for a, b in zip(ours, theirs, strict=True) if a.VR != "SQ")


_uids = iter(range(1, 10**9))


def new_uid() -> str:
    return f"{ROOT_UID}.{time.time_ns()}.{next(_uids)}"


def element(tag: int, vr: bytes, content: bytes, order: str = "<") -> bytes:
    """One element in explicit VR, padded as its VR wants it."""
    content += b"\0" * (len(content) % 2) if vr in (b"UI", b"OB") else b" " * (len(content) % 2)
    long = vr in (b"OB", b"OW", b"OF", b"OL", b"OD", b"OV", b"UT", b"UC", b"UN", b"SQ")
    size = struct.pack(f"{order}HI", 0, len(content)) if long else struct.pack(f"{order}H", len(content))
    return struct.pack(f"{order}HH", tag >> 16, tag & 0xFFFF) + vr + size + content


def encoded(dataset: Dataset, syntax: str = EXPLICIT) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = syntax == IMPLICIT, syntax != BIG_ENDIAN
    write_dataset(buffer, dataset)
    return buffer.getvalue()


def made_dataset(pixels: bytes = b"", **elements: Any) -> Dataset:
    """A Secondary Capture with UIDs of its own; `elements` by keyword."""
    dataset = Dataset()
    values = {
        "SOPClassUID": SECONDARY, "SOPInstanceUID": new_uid(), "StudyInstanceUID": new_uid(),
        "SeriesInstanceUID": f"{ROOT_UID}.3", "Modality": "OT", "PatientName": "Testperson^Paula",
        "PatientID": "PAT-1", "StudyDate": "20260101",
    }  # fmt: skip
    for name, value in (values | elements).items():
        setattr(dataset, name, value)
    if pixels:
        dataset.BitsAllocated = 8
        dataset.add_new(0x7FE00010, "OW", pixels)
    return dataset


def made(size: int = 0, syntax: str = EXPLICIT, **elements: Any) -> Instance:
    """A Secondary Capture of a new UID with so many bytes of pixels."""
    dataset = made_dataset(os.urandom(size), **elements)
    return Instance(dataset.SOPClassUID, dataset.SOPInstanceUID, syntax, encoded(dataset, syntax))


def part10(instance: Instance) -> bytes:
    """A file with the instance in it."""

    def element(number: int, text: str) -> bytes:
        value = text.encode() + b"\0" * (len(text) % 2)
        return struct.pack("<HH2sH", 2, number, b"UI", len(value)) + value

    rest = struct.pack("<HH2sHIH", 2, 1, b"OB", 0, 2, 0x0100) + b"".join(
        element(n, v) for n, v in ((2, instance.sop_class), (3, instance.uid), (16, instance.syntax), (18, ROOT_UID))
    )
    return bytes(128) + b"DICM" + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(rest)) + rest + instance.content


def write(folder: Path, *instances: Instance) -> list[Path]:
    """Part 10 files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04}.dcm" for number in range(len(instances))]
    for path, instance in zip(paths, instances, strict=True):
        path.write_bytes(part10(instance))
    return paths


# --- a client of our own: every byte is ours ---


class Rejected(Exception):
    """A-ASSOCIATE-RJ: result, source, reason (PS3.8 9.3.4)."""


class Aborted(Exception):
    """A-ABORT: source, reason; or the connection was closed."""


def _item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(content)) + content


def _items(raw: bytes) -> Iterator[tuple[int, bytes]]:
    while raw:
        kind, size = struct.unpack_from(">BxH", raw)
        yield kind, raw[4 : 4 + size]
        raw = raw[4 + size :]


def command_set(elements: Mapping[int, int | str]) -> bytes:
    """Group 0000 with its length, implicit little endian; integers are US."""
    encoded_elements = b""
    for element, value in sorted(elements.items()):
        raw = struct.pack("<H", value) if isinstance(value, int) else value.encode() + b"\0" * (len(value) % 2)
        encoded_elements += struct.pack("<HHI", 0, element, len(raw)) + raw
    return struct.pack("<HHII", 0, 0, 4, len(encoded_elements)) + encoded_elements


class Scu:
    """A DICOM client that keeps nothing in memory and may break every rule.

    `accepted` maps abstract syntax and transfer syntax to a context id, as the other side chose.
    """

    def __init__(
        self, port: int, contexts: Iterable[tuple[str, Sequence[str]]] = ((VERIFICATION, (IMPLICIT,)),), *,
        calling: str = "RAW", called: str = "AGENT", max_pdu: int = 16_384, context: ssl.SSLContext | None = None,
        timeout: float = 20, source: str = "127.0.0.1",
    ):  # fmt: skip
        self.socket = socket.create_connection(("127.0.0.1", port), timeout, (source, 0))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.accepted: dict[tuple[str, str], int] = {}
        self._message = 0
        try:
            if context is not None:
                self.socket = context.wrap_socket(self.socket, server_hostname="127.0.0.1")
            self._associate(list(contexts), calling, called, max_pdu)
        except BaseException:
            self.socket.close()
            raise

    @classmethod
    def for_instances(cls, port: int, *instances: Instance, **options: Any) -> Self:
        """Associated for these objects, one context for each SOP class and transfer syntax."""
        return cls(port, sorted({(i.sop_class, (i.syntax,)) for i in instances}), **options)

    def _associate(self, contexts: list[tuple[str, Sequence[str]]], calling: str, called: str, max_pdu: int) -> None:
        proposed = b""
        for number, (abstract, syntaxes) in enumerate(contexts):
            names = b"".join(_item(0x40, name.encode()) for name in syntaxes)
            proposed += _item(0x20, bytes((2 * number + 1, 0, 0, 0)) + _item(0x30, abstract.encode()) + names)
        user = _item(0x51, struct.pack(">I", max_pdu)) + _item(0x52, ROOT_UID.encode())
        titles = called.ljust(16).encode() + calling.ljust(16).encode()
        fixed = struct.pack(">H2x", 1) + titles + bytes(32)
        self.pdu(1, fixed + _item(0x10, b"1.2.840.10008.3.1.1.1") + proposed + _item(0x50, user))
        kind, answer = self.read_pdu()
        if kind == RJ:
            raise Rejected(*answer[1:4])
        assert kind == 2, f"PDU {kind} answers an association request"
        for item, content in _items(answer[68:]):
            if item == 0x21 and content[2] == 0:
                syntax = next(value.decode() for kind, value in _items(content[4:]) if kind == 0x40)
                self.accepted[contexts[content[0] // 2][0], syntax] = content[0]
            elif item == 0x50:
                self.peer_pdu = next(struct.unpack(">I", value)[0] for kind, value in _items(content) if kind == 0x51)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        with contextlib.suppress(OSError, Aborted):
            if failure is None:
                self.release()
        self.socket.close()

    def pdu(self, kind: int, content: bytes = bytes(4)) -> None:
        self.socket.sendall(struct.pack(">BxI", kind, len(content)) + content)

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            chunk = self.socket.recv(count - len(parts))
            if not chunk:
                raise Aborted("closed")
            parts += chunk
        return bytes(parts)

    def read_pdu(self) -> tuple[int, bytes]:
        """The next PDU; Aborted for A-ABORT and for a closed connection."""
        try:
            kind, size = struct.unpack(">BxI", self._read(6))
            content = self._read(size)
        except ConnectionError as error:
            raise Aborted("closed") from error
        if kind == ABORT:
            raise Aborted(*content[2:4])
        return kind, content

    def fragments(self, context_id: int, flags: int, content: bytes, last: bool = True) -> None:
        """P-DATA PDUs as large as the other side takes; `flags` 1 for a command set."""
        room = min(self.peer_pdu or 2**20, 2**20) - 6
        for start in range(0, max(len(content), 1), room):
            part = content[start : start + room]
            end = 2 if last and start + room >= len(content) else 0
            self.pdu(P_DATA, struct.pack(">IBB", len(part) + 2, context_id, flags | end) + part)

    def request(
        self, context_id: int, elements: Mapping[int, int | str], content: bytes | Iterable[bytes] | None = None
    ) -> None:
        """A DIMSE request; a data set may come in pieces."""
        self._message += 1
        whole = {0x0110: self._message, 0x0800: 0x0101 if content is None else 1, 0x0700: 0} | dict(elements)
        self.fragments(context_id, 1, command_set(whole))
        if isinstance(content, bytes):
            self.fragments(context_id, 0, content)
        elif content is not None:
            for part in content:
                self.fragments(context_id, 0, part, last=False)
            self.fragments(context_id, 0, b"")

    def response(self) -> dict[int, bytes]:
        """The elements of the next command set; its data set, if any, is passed over."""
        message: dict[int, bytes] = {}
        collected, flags = b"", 0
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)  # dcmtk answers in two writes
        while flags & 3 != 3:
            kind, content = self.read_pdu()
            assert kind == P_DATA, f"PDU {kind} instead of a response"
            while content:
                size, _, flags = struct.unpack_from(">IBB", content)
                collected += content[6 : 4 + size] if flags & 1 else b""
                content = content[4 + size :]
        while collected:
            _, element, size = struct.unpack_from("<HHI", collected)
            message[element] = collected[8 : 8 + size]
            collected = collected[8 + size :]
        return message

    def status(self) -> int:
        return struct.unpack("<H", self.response()[0x0900])[0]

    def echo(self) -> int:
        self.request(self.accepted[VERIFICATION, IMPLICIT], {2: VERIFICATION, 0x0100: ECHO_RQ})
        return self.status()

    def send_store(self, instance: Instance, content: Iterable[bytes] | None = None, uid: str = "") -> None:
        """A C-STORE request, its answer not yet read."""
        self.request(
            self.accepted[instance.sop_class, instance.syntax],
            {2: instance.sop_class, 0x0100: STORE_RQ, 0x1000: uid or instance.uid},
            instance.content if content is None else content,
        )

    def store(self, instance: Instance, content: Iterable[bytes] | None = None, uid: str = "") -> int:
        """The status of a C-STORE."""
        self.send_store(instance, content, uid)
        return self.status()

    def release(self) -> None:
        self.pdu(RELEASE_RQ)
        while self.read_pdu()[0] != RELEASE_RP:
            pass

    def ended(self, timeout: float = 5) -> bool:
        """Whether the other side aborts or closes within the time."""
        self.socket.settimeout(timeout)
        try:
            self.read_pdu()
        except Aborted:
            return True
        except TimeoutError:
            return False
        return False


def store(port: int, *instances: Instance, **options: Any) -> list[int]:
    """Store objects in one association; the statuses."""
    with Scu.for_instances(port, *instances, **options) as scu:
        return [scu.store(instance) for instance in instances]


def cancel_of(message: int) -> bytes:
    return command_set({0x0100: 0x0FFF, 0x0120: message, 0x0800: 0x0101})


# --- dcmtk ---


class Ran(NamedTuple):
    code: int
    output: str


def dcmtk(program: str, *arguments: object, timeout: float = 60, folder: Path | None = None) -> Ran:
    """Run one of dcmtk's programs to its end."""
    command = [program, *map(str, arguments)]
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, cwd=folder, stdin=subprocess.DEVNULL
    )
    return Ran(ended.returncode, ended.stdout.decode("utf-8", "replace"))


class Storescp:
    """dcmtk's storescp, keeping what it gets bit by bit."""

    def __init__(self, folder: Path, *options: object, title: str = "STORESCP"):
        (self.port,), self.folder, self.title = free_ports(1), folder, title
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder.with_name(f"{folder.name}.log")
        command = ["storescp", "-v", "-aet", title, "+xa", "+B", "-od", str(folder), *map(str, options), str(self.port)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        eventually(lambda: accepts(("127.0.0.1", self.port)), what="storescp listens")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(10)

    @property
    def address(self) -> str:
        return f"{self.title}@127.0.0.1:{self.port}"

    def instances(self) -> dict[str, bytes]:
        """The data set bytes of every object that came, by SOP Instance UID."""
        found = {}
        for path in self.folder.iterdir():
            meta, content = split_part10(path.read_bytes())
            found[uid_of(meta.get(3))] = content
        return found


# --- Orthanc ---


class Orthanc:
    """Orthanc with its REST interface; `modalities`: name -> (AE title, port)."""

    def __init__(self, folder: Path, modalities: Mapping[str, tuple[str, int]] | None = None, title: str = "ORTHANC"):
        self.port, self._http = free_ports(2)
        self.title = title
        folder.mkdir(parents=True, exist_ok=True)
        known = {name: [aet, "127.0.0.1", port] for name, (aet, port) in (modalities or {}).items()}
        allowed = {f"DicomAlwaysAllow{name}": True for name in ("Echo", "Store", "Find", "FindWorklist", "Get", "Move")}
        settings = {
            "Name": "test", "StorageDirectory": str(folder / "storage"), "IndexDirectory": str(folder / "index"),
            "HttpPort": self._http, "DicomPort": self.port, "DicomAet": title, "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False, "DicomModalities": known, "UnknownSopClassAccepted": True,
            "OverwriteInstances": True, "Plugins": [], "DicomCheckCalledAet": False, "DicomScuTimeout": 10,
            "HttpThreadsCount": 4, "LimitFindResults": 0, "SaveJobs": False,
        }  # fmt: skip
        (folder / "orthanc.json").write_text(json.dumps(settings | allowed))
        self.log = folder / "orthanc.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                ["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        eventually(lambda: all(accepts(("127.0.0.1", port)) for port in (self.port, self._http)), 30, "Orthanc listens")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # it takes seconds over a clean stop, and nobody needs its storage
        self.process.wait(10)

    @property
    def address(self) -> str:
        return f"{self.title}@127.0.0.1:{self.port}"

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and answer, JSON where it is JSON."""
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self._http, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, raw)
            response = connection.getresponse()
            text = response.read()
        is_json = "json" in response.headers.get("Content-Type", "")
        return response.status, json.loads(text) if is_json and text else text

    def get(self, path: str) -> Any:
        status, answer = self.call("GET", path)
        assert status == 200, (path, status, answer, self.log.read_text()[-2000:])
        return answer

    def post(self, path: str, body: Any = None) -> Any:
        status, answer = self.call("POST", path, {} if body is None else body)
        assert status == 200, (path, status, answer, self.log.read_text()[-2000:])
        return answer

    def keep(self, instance: Instance) -> str:
        """Put an object into Orthanc by REST; its id there."""
        return str(self.post("/instances", part10(instance))["ID"])

    def instances(self) -> dict[str, bytes]:
        """The data set bytes of every object there, by SOP Instance UID."""
        found = {}
        for name in self.get("/instances"):
            meta, content = split_part10(self.get(f"/instances/{name}/file"))
            found[uid_of(meta.get(3))] = content
        return found


# --- pynetdicom as the other side ---


class Arrival(NamedTuple):
    """A data set that pynetdicom was sent, its bytes untouched."""

    calling: str
    uid: str
    syntax: str
    content: bytes


class Destination:
    """A pynetdicom SCP for C-STORE (also C-ECHO and storage commitment reports).

    `statuses` are answered to the next C-STOREs, then success. `gate` is waited for before each answer; `reports` holds
    (event type, data set) of each N-EVENT-REPORT.
    """

    def __init__(
        self, title: str = "DEST", *, port: int = 0, syntaxes: Sequence[str] = (), context: ssl.SSLContext | None = None
    ):
        self.title, self.arrivals, self.statuses = title, list[Arrival](), list[int]()
        self.reports: list[tuple[int, Dataset]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.port = port or free_ports(1)[0]
        ae = AE(ae_title=title)
        ae.supported_contexts = []
        ae.require_called_aet = True
        ae.add_supported_context(Verification)
        ae.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
        for sop_class in (CT, SECONDARY, "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.88.33"):
            ae.add_supported_context(sop_class, list(syntaxes) or [EXPLICIT, IMPLICIT, BIG_ENDIAN, DEFLATED, *JPEGS])
        handlers: list[Any] = [(evt.EVT_C_STORE, self._store), (evt.EVT_N_EVENT_REPORT, self._report)]
        self.server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers, ssl_context=context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        assert self.server is not None
        self.server.shutdown()

    @property
    def address(self) -> str:
        return f"{self.title}@127.0.0.1:{self.port}"

    def _store(self, event: evt.Event) -> int:
        self.gate.wait(20)
        content = event.request.DataSet.getvalue()  # type: ignore[union-attr]
        calling = event.assoc.requestor.ae_title.strip()
        uid = str(event.request.AffectedSOPInstanceUID)  # type: ignore[union-attr]
        self.arrivals.append(Arrival(calling, uid, str(event.context.transfer_syntax), content))
        return self.statuses.pop(0) if self.statuses else 0

    def _report(self, event: evt.Event) -> tuple[int, None]:
        self.reports.append((event.event_type or 0, event.event_information))
        return 0, None


JPEGS = (
    "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.5",
)  # fmt: skip


# --- pynetdicom as a device that asks ---


def data_set(**elements: Any) -> Dataset:
    """Elements by keyword."""
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


@contextlib.contextmanager
def associated(
    here: Site, *classes: str, calling: str = "WORKSTATION", storage: Sequence[tuple[str, str]] = (),
    handlers: Sequence[tuple[Any, Callable[..., Any]]] = (),
) -> Iterator[Association]:  # fmt: skip
    """A pynetdicom SCU with an association; `storage` (class, syntax) is what it takes as SCP (C-GET)."""
    ae = AE(ae_title=calling)
    ae.dimse_timeout = ae.acse_timeout = ae.network_timeout = 15
    contexts = [build_context(uid) for uid in classes] + [build_context(uid, syntax) for uid, syntax in storage]
    roles = [build_role(uid, scp_role=True) for uid in sorted({uid for uid, _ in storage})]
    association = ae.associate(
        "127.0.0.1", here.ports["PACS"], contexts, "AGENT", ext_neg=list(roles), evt_handlers=list(handlers)
    )
    assert association.is_established
    try:
        yield association
    finally:
        if association.is_established:
            association.release()


COUNTS = ("Remaining", "Completed", "Failed", "Warning")


def counts(status: Dataset) -> tuple[int | None, ...]:
    return tuple(status.get(f"NumberOf{name}Suboperations") for name in COUNTS)


class Receiving:
    """Handler of a C-GET's C-STORE requests."""

    def __init__(self, *answers: int):
        self.answers, self.got = list(answers), list[tuple[str, bytes]]()
        self.handlers = [(evt.EVT_C_STORE, self.store)]

    def store(self, event: Any) -> int:
        self.got.append((str(event.request.AffectedSOPInstanceUID), event.request.DataSet.getvalue()))
        return self.answers.pop(0) if self.answers else 0


class Reports:
    """Handler of N-EVENT-REPORT on an association of the device."""

    def __init__(self) -> None:
        self.got: list[tuple[int, Dataset]] = []
        self.answered = False  # only then may the association be released: pynetdicom does not look after itself
        self.handlers: list[tuple[Any, Callable[..., Any]]] = [
            (evt.EVT_N_EVENT_REPORT, self.report),
            (evt.EVT_PDU_SENT, self.sent),
        ]

    def report(self, event: Any) -> tuple[int, None]:
        self.got.append((event.event_type, event.event_information))
        return 0, None

    def sent(self, event: Any) -> None:
        self.answered = bool(self.got)


def commit(scu: Association, transaction: str, *instances: Instance) -> int:
    items = [data_set(ReferencedSOPClassUID=i.sop_class, ReferencedSOPInstanceUID=i.uid) for i in instances]
    request = data_set(TransactionUID=transaction, ReferencedSOPSequence=items)
    status, _ = scu.send_n_action(request, 1, COMMITMENT, COMMITMENT_INSTANCE)
    return int(status.Status)


def uids_of(sequence: Any) -> list[str]:
    return [item.ReferencedSOPInstanceUID for item in sequence or ()]


# --- the agent ---


@contextlib.contextmanager
def imaging_site(folder: Path, channels: dict[str, str], **options: Any) -> Iterator[Site]:
    """A Site whose Bot says nothing to images, its agent started."""
    with site(folder, channels, start=False, **options) as running:
        running.sandbox.bot = silent_bot
        start(running)
        yield running


def start(here: Site) -> None:
    """Start the agent, and wait until it listens; the server may be away."""
    before = here.agent.main_log().count(b"Medplum service started")
    here.agent.start(ready=False)
    eventually(lambda: here.agent.main_log().count(b"Medplum service started") > before, 20, "the agent has started")


class RawPeer:
    """Listens for associations of the agent; `serve` has each connection in a thread of its own."""

    def __init__(self, title: str):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"{title}@127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        raise NotImplementedError


def acceptance(request: bytes, user: bytes) -> bytes:
    """The content of an A-ASSOCIATE-AC that takes the last syntax of each context, with these user items."""
    answer = _item(0x10, b"1.2.840.10008.3.1.1.1")
    for kind, item in _items(request[68:]):
        if kind == 0x20:
            *_, (_, syntax) = _items(item[4:])
            answer += _item(0x21, bytes((item[0], 0, 0, 0)) + _item(0x40, syntax))
    return request[:68] + answer + _item(0x50, user)


class Bot:
    """Answers HL7, and imaging by `replies`: command (`C-STORE` for images) -> body, or (status, body), or a function
    of the question.

    What a Bot returns as an object the server sends as an object, a string of JSON as that string.
    """

    def __init__(self) -> None:
        self.replies: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []

    def __call__(self, transmit: Transmit) -> tuple[int, Any]:
        if transmit.content_type == HL7_TYPE:
            return accepting_bot(transmit)
        question = json.loads(transmit.body)
        assert transmit.content_type == JSON_TYPE
        assert transmit.remote == question["association"]["callingAeTitle"]
        command = question.get("command", "C-STORE")
        if command != "C-STORE":
            self.asked.append(question)
        reply = self.replies.get(command, "")
        if callable(reply):
            reply = reply(question)
        return reply if isinstance(reply, tuple) else (200, reply)

    def questions(self, command: str) -> list[dict[str, Any]]:
        return [question for question in list(self.asked) if question["command"] == command]

    def question(self) -> dict[str, Any]:
        """The only one."""
        (question,) = self.asked
        return question


def silent_bot(transmit: Transmit) -> tuple[int, Any]:
    return 200, ""


def transmits(here: Site, text: str = "") -> list[Transmit]:
    """What came with this text in its body, in order."""
    with here.sandbox.changed:
        return [transmit for _, transmit in here.sandbox.seen if text in transmit.body]


def announced(here: Site, text: str, timeout: float = 15) -> dict[str, Any]:
    """The body of the one image with this text (such as its UID), once it is there."""

    def images() -> list[Transmit]:
        return [transmit for transmit in transmits(here, text) if '"command":' not in transmit.body]

    here.sandbox.wait_for(images, timeout, f"{text} announced")
    (transmit,) = images()
    assert transmit.content_type == "application/json"
    return dict(json.loads(transmit.body))


def uploaded(here: Site, body: dict[str, Any]) -> tuple[dict[int, bytes], bytes]:
    """File Meta and data set of the Binary that an announcement names."""
    content = here.sandbox.sandbox.binaries[body["binary"]["reference"]]
    raw = content if isinstance(content, bytes) else content.read_bytes()
    assert raw[:132] == bytes(128) + b"DICM"
    return split_part10(raw)


def assert_arrived(here: Site, instance: Instance, text: str = "") -> dict[str, Any]:
    """The object is with the server, byte for byte in its data set; its announcement."""
    body = announced(here, text or instance.uid)
    meta, content = uploaded(here, body)
    assert content == instance.content
    assert [uid_of(meta.get(n)) for n in (2, 3, 0x10)] == [instance.sop_class, instance.uid, instance.syntax]
    length = struct.unpack("<I", meta[0])[0]
    assert length == sum(len(v) + (12 if n == 1 else 8) for n, v in meta.items() if n), "group length of the File Meta"
    return body


def assert_works(here: Site, channel: str = "PACS", **options: Any) -> None:
    """The next object is unharmed."""
    instance = made(1000)
    assert store(here.ports[channel], instance, **options) == [SUCCESS]
    assert_arrived(here, instance)


def spooled(here: Site) -> list[Path]:
    folder = here.agent.queue_path.with_suffix(".spool")
    return sorted(folder.iterdir()) if folder.exists() else []


_strays: set[Path] = set()


def forget_strays(here: Site) -> None:
    """Files that an earlier test left behind are that test's affair."""
    _strays.update(spooled(here))


def assert_no_spool(here: Site) -> None:
    def found() -> list[str]:
        return [path.name for path in spooled(here) if path not in _strays]

    eventually(lambda: not found(), 5, f"no file in the spool: {found()[:5]}")


def keep(here: Site, *instances: Instance) -> list[str]:
    """Put objects on the server as Binaries; their references."""
    references = [f"Binary/{new_uid()}" for _ in instances]
    here.sandbox.sandbox.binaries |= zip(references, map(part10, instances), strict=True)
    return references
