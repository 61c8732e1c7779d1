"""What imaging devices of many makers send, as their habits are: what the Bot sees of it, and what the server gets."""

import contextlib
import json
import socket
import struct
from collections.abc import Callable
from typing import Any

import pydicom
import pytest
from pydicom.filebase import DicomBytesIO

from medplum_agent import MAX_OMITTED, Associate, Command, Dimse, Fragment, imaging
from tests.dicom_peers import (
    BIG_ENDIAN,
    EXPLICIT,
    IMPLICIT,
    JPEGS,
    QUIET,
    SECONDARY,
    STUDY_FIND,
    STUDY_MOVE,
    SUCCESS,
    WORKLIST,
    Bot,
    Destination,
    Instance,
    RawPeer,
    announced,
    associated,
    counts,
    data_set,
    element,
    forget_strays,
    imaging_site,
    made,
    new_uid,
    part10,
    store,
)
from tests.support import Site

pytestmark = QUIET


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory):
    channels = {"PACS": "dicom://127.0.0.1:{port}?dicomJson=standard"}
    with imaging_site(tmp_path_factory.mktemp("modalities"), channels) as running:
        yield running


@pytest.fixture
def here(shared_site):
    forget_strays(shared_site)
    shared_site.sandbox.bot = Bot()
    return shared_site


def described(here: Site, *elements: bytes, syntax: str = EXPLICIT) -> dict[str, Any]:
    """The message about an object with these elements, which are in the order of their tags."""
    uid = new_uid()
    own = element(0x00080016, b"UI", SECONDARY.encode()), element(0x00080018, b"UI", uid.encode())
    instance = Instance(SECONDARY, uid, syntax, b"".join((*own, *elements)))
    assert store(here.ports["PACS"], instance) == [SUCCESS]
    return announced(here, uid)


# --- what the Bot sees ---


@pytest.mark.parametrize(
    ("vr", "content", "values"),
    [
        (b"IS", b"12.5", [12.5]),
        (b"IS", b"1_000", ["1_000"]),
        (b"IS", b"9007199254740993", ["9007199254740993"]),
        (b"IS", rb"+0012\-3\ 7 \\1.0 ", [12, -3, 7, None, 1]),
        (b"DS", rb"NaN\-inf\1e400", ["NaN", "-inf", "1e400"]),
        (b"DS", rb"1,5\.5\5.\1E+03\1.23456789012345678901", ["1,5", 0.5, 5, 1000, 1.2345678901234567]),
        (b"DS", b"1.5\0\0\0", [1.5]),
        (b"UN", b"12.5", [12.5]),
        (b"FD", struct.pack("<4d", float("nan"), float("inf"), float("-inf"), 1), ["NaN", "Infinity", "-Infinity", 1]),
    ],
)
def test_no_number_becomes_another(here, vr, content, values):
    """An IS of 12.5 mAs was 12, and one of more than 15 digits another; what JSON has no number for was null."""
    tag = 0x00181152 if vr in (b"IS", b"UN") else 0x00180050 if vr == b"DS" else 0x00720074
    body = described(here, element(tag, vr, content))
    assert body["dataset"][f"{tag:08X}"]["Value"] == values
    assert "omitted" not in body


def private(count: int, value: bytes = b"") -> bytes:
    """So many small private elements."""
    return b"".join(
        element(0x00290000 + 0x20000 * (n // 0xEF00) + 0x1000 + n % 0xEF00, b"LO", value) for n in range(count)
    )


def unreadable(count: int) -> bytes:
    """An item with so many numbers of one byte."""
    content = b"".join(struct.pack("<HH2sHB", 0x11, 0x1000 + n, b"US", 1, 1) for n in range(count))
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content


@pytest.mark.parametrize("many", ["elements", "unreadable"])
def test_tags_that_are_left_out_do_not_make_a_message_too_large(here, many):
    """They were all named: the server closed the connection of all devices (1009), and the message was a dead letter.

    Nor did the Bot hear which object it was: where all others are smaller, UIDs are the largest, and went first.
    """
    connects = here.agent.main_log().count(b"Connected to")
    if many == "elements":
        body = described(here, element(0x00100020, b"LO", b"P" * 60), private(30_000, b"x" * 20))
        assert body["dataset"]["00100020"]["Value"] == ["P" * 60]
    else:
        item = unreadable(20_000)
        body = described(here, *(element(0x00290000 + n, b"SQ", item) for n in range(0x1000, 0x1006)))
    assert len(body["omitted"]) == MAX_OMITTED
    assert here.agent.main_log().count(b"Connected to") == connects


def test_sequences_that_no_message_has_room_for_are_not_kept_in_memory(here):
    """Each of a length that is read: 4.8 MB took 19 s, in which no other image was taken, and 500 MB."""
    before, content = here.agent.memory_kb("VmHWM"), private(60_000)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content
    sequences = [element(0x00290000 + n, b"SQ", item) for n in range(0x1000, 0x1010)]
    body = described(here, *sequences, element(0x00400001, b"AE", b"LAST"))
    assert body["dataset"]["00400001"]["Value"] == ["LAST"]
    assert sorted(body["omitted"]) == [f"{0x00290000 + n:08X}" for n in range(0x1000, 0x1010)]
    assert here.agent.memory_kb("VmHWM") - before < 200_000


# --- what devices hear of the Bot ---


@pytest.mark.parametrize("charset", [None, "", "ISO_IR 100", "ISO_IR 144", "ISO_IR 192", "GB18030"])
@pytest.mark.parametrize("inside", [None, "", "ISO_IR 144", "ISO_IR 192"])
def test_text_is_written_as_its_character_set_says(here, charset, inside):
    """Text of an item with a character set of its own left as `Gr??e`, and Latin-1 where it was said to be ASCII."""

    def with_text(name: str | None, tag: str) -> dict[str, Any]:
        said = {} if name is None else {"00080005": {"vr": "CS", "Value": [name]}}
        return said | {tag: {"vr": "LO", "Value": ["Größe"]}}

    here.sandbox.bot = bot = Bot()
    step = {"00400100": {"vr": "SQ", "Value": [with_text(inside, "00400007")]}}
    bot.replies["C-FIND"] = [with_text(charset, "00100020") | step]
    with associated(here, WORKLIST) as scu:
        (_, found), (last, _) = scu.send_c_find(data_set(PatientID=""), WORKLIST)
    assert last.Status == SUCCESS and found is not None
    (item,) = found.ScheduledProcedureStepSequence
    assert [found.PatientID, item.ScheduledProcedureStepDescription] == ["Größe", "Größe"]
    kept = charset in ("ISO_IR 100", "GB18030") and inside is None
    assert found.SpecificCharacterSet == (charset if kept else "ISO_IR 192")


# --- queries that the server answers ---


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("Yamada^Tarou", True), ("yamada^*", True), ("=山田^太郎", True), ("Yamada^Tarou=山田^太郎", True),
        ("山田*", True), ("Yamada^Tarou=山田^太郎=やまだ^たろう", True), ("Yamada^Tarou=山田^次郎", False),
        ("=田中*", False), ("Yamada", False), ("==やまだ*", True), ("Yamada^Tarou^^", True), ("*", True), ("^", True),
    ],
)  # fmt: skip
def test_a_name_in_several_scripts_is_found_by_each(asked, key, found):
    """A name with ideographs was found neither by its letters nor as a whole, and by ideographs alone all were."""
    query = data_set(
        QueryRetrieveLevel="STUDY", StudyInstanceUID="", PatientName=key, SpecificCharacterSet="ISO_IR 192"
    )
    with associated(asked, STUDY_FIND) as scu:
        *matches, (last, _) = scu.send_c_find(query, STUDY_FIND)
    assert last.Status == SUCCESS
    names = [str(match.PatientName) for _, match in matches if match is not None]
    assert names == ["Yamada^Tarou=山田^太郎=やまだ^たろう"] * found


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    channels = {"PACS": "dicom://127.0.0.1:{port}?answer=server"}
    with imaging_site(tmp_path_factory.mktemp("asked"), channels) as here:
        study = {"resourceType": "DicomStudy", "id": "1", "studyInstanceUid": "1.2.3"}
        here.sandbox.sandbox.resources["DicomStudy/1"] = study | {"patientName": "Yamada^Tarou=山田^太郎=やまだ^たろう"}
        yield here


# --- questions of the cloud to archives ---


@pytest.fixture(scope="module")
def archive():
    """An archive that finds three studies, and writes them as `Archive.written` says."""
    with Archive() as running:
        yield running


class Archive(RawPeer):
    def __init__(self) -> None:
        imaging()
        self.written: Callable[[int], bytes] = lambda number: element(0x0020000D, b"UI", b"1.2.%d" % number)
        super().__init__("ARCHIVE")

    def serve(self, connection: socket.socket) -> None:
        asked: Any = None
        core = Dimse(16_384)
        with contextlib.suppress(OSError), connection:
            while received := connection.recv(65_536):
                events, answer = core.receive(received)
                for event in events:
                    if isinstance(event, Associate):
                        explicit = [context for context in event.contexts if EXPLICIT in context.syntaxes]
                        answer += core.accept([(one._replace(syntaxes=(EXPLICIT,)), 0) for one in explicit], {})
                    elif isinstance(event, Command):
                        asked = event
                    elif isinstance(event, Fragment) and event.last:
                        head = {
                            "CommandField": asked.fields["CommandField"] | 0x8000,
                            "MessageIDBeingRespondedTo": asked.fields["MessageID"],
                        }
                        for number in range(3):
                            answer += core.message(asked.context, head | {"Status": 0xFF00}, self.written(number))
                        answer += core.message(asked.context, head | {"Status": SUCCESS})
                connection.sendall(answer)


def asked_of(here: Site, address: str, **question: Any) -> tuple[int, str]:
    with here.caller() as caller:
        pushed = caller.push(f"dicom://{address}", json.dumps(question), contentType="application/json")
    return pushed.status, pushed.text


def test_a_match_that_cannot_be_read_is_not_left_out(here, archive):
    """Two of three studies were the answer, with success."""
    status, text = asked_of(here, archive.address, command="C-FIND")
    assert status == 200 and len(json.loads(text)["datasets"]) == 3
    archive.written = lambda number: (
        b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff" if number == 1 else element(0x0020000D, b"UI", b"1.2.3")
    )
    status, text = asked_of(here, archive.address, command="C-FIND")
    assert (status, text) == (400, f"dicom://{archive.address}: a match cannot be read")


@pytest.mark.parametrize(
    "question",
    [
        {"command": "C-FIND", "level": "WORKLIST"},
        {"command": "C-FIND", "model": "WORKLIST", "dataset": {}},
        {"command": "C-MOVE", "level": "WORKLIST", "destination": "X", "dataset": {"00100020": {"vr": "LO"}}},
    ],
)
def test_a_worklist_is_asked_for_something(here, archive, question):
    """The archive waited for the keys, and the caller for the archive: `not done within 9 s`."""
    status, text = asked_of(here, archive.address, **question)
    assert status == 400 and text.endswith("a worklist is asked by C-FIND, with a dataset of the keys that are wanted")


@pytest.mark.parametrize("question", [{"command": "C-FIND", "level": 7}, {"command": "C-MOVE", "destination": 7}])
def test_a_number_where_a_text_belongs_is_no_internal_error(here, archive, question):
    archive.written = lambda number: element(0x0020000D, b"UI", b"1.2.%d" % number)
    assert "internal error" not in asked_of(here, archive.address, **question)[1]


@pytest.mark.parametrize("own", [IMPLICIT, BIG_ENDIAN])
def test_an_object_goes_to_an_archive_that_takes_explicit_vr_only(here, own):
    """As gateways to a cloud do: it was offered as it is and in Implicit VR, and was not sent."""
    instance = made(syntax=own)
    here.sandbox.sandbox.binaries["Binary/explicit"] = part10(instance)
    with Destination(syntaxes=[EXPLICIT]) as dest:
        asked = asked_of(here, dest.address, command="C-STORE", binary={"reference": "Binary/explicit"})
        assert asked == (200, '{"command":"C-STORE","status":0}')
    (arrival,) = dest.arrivals
    read = pydicom.dcmread(DicomBytesIO(part10(instance._replace(syntax=EXPLICIT, content=arrival.content))))
    assert (arrival.syntax, read.SOPInstanceUID, read.PatientID) == (EXPLICIT, instance.uid, "PAT-1")


def test_a_compressed_object_that_an_archive_does_not_take_is_not_read(tmp_path):
    """A tomosynthesis of 100 MB was in memory, to find that it cannot be sent in another syntax."""
    binaries = {"Binary/1": part10(made()), "Binary/2": part10(made(100 * 2**20, JPEGS[0]))}
    memory, study = [0], data_set(QueryRetrieveLevel="STUDY", StudyInstanceUID="1.2.3")
    address = "dicom://127.0.0.1:{port}?moveDestinations="
    with Destination(syntaxes=[EXPLICIT]) as dest, imaging_site(tmp_path, {"PACS": address + dest.address}) as here:
        here.sandbox.sandbox.binaries |= binaries
        here.sandbox.bot = bot = Bot()
        for bot.replies["C-MOVE"], moved in ((["Binary/1"], (1, 0, 0)), ([*binaries], (1, 1, 0))):
            with associated(here, STUDY_MOVE) as scu:
                *_, (last, _) = scu.send_c_move(study, dest.title, STUDY_MOVE)
            assert counts(last)[1:] == moved
            memory.append(here.agent.memory_kb("VmHWM"))
    assert memory[-1] - memory[-2] < 40_000
