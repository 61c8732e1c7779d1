"""Images over real associations: stored by dcmtk, Orthanc's kin and bare sockets, uploaded, announced (contract 8)."""

import base64
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from medplum_agent import HL7_TYPE
from tests.dicom_peers import (
    CT,
    DEFLATED,
    EXPLICIT,
    FAST,
    IMPLICIT,
    MISMATCH,
    NOT_UNDERSTOOD,
    OUT_OF_RESOURCES,
    SECONDARY,
    SUCCESS,
    VERIFICATION,
    Aborted,
    Instance,
    Rejected,
    Scu,
    Tls,
    announced,
    assert_arrived,
    assert_no_spool,
    assert_same_elements,
    assert_works,
    command_set,
    dcmtk,
    encoded,
    forget_strays,
    imaging_site,
    made,
    made_dataset,
    needs_dcmtk,
    new_uid,
    pydicom_files,
    read_instance,
    silent_bot,
    split_part10,
    spooled,
    start,
    store,
    transmits,
    uid_of,
    uploaded,
    write,
)
from tests.support import Site, control_id, eventually, message, setting, tmpfs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom.*")

LOCAL = "dicom://127.0.0.1:{port}?"
FILES = pydicom_files()
KILLS = int(os.environ.get("DICOM_KILLS", "5"))
BIG_MB = int(os.environ.get("DICOM_BIG_MB", "300"))  # 1024 shows the whole promise


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return Tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory, tls):
    secure = f"dicoms://127.0.0.1:{{port}}?certFile={tls.agent_file}&handshakeTimeoutSecs=1"
    channels = {
        "PACS": LOCAL,
        "LOCKED": f"{LOCAL}calledAeTitle=AGENT&callingAeTitles=CT1,MR 2",
        "PEERS": f"{LOCAL}peers=127.0.0.2,10.0.0.0/8",
        "FEW": f"{LOCAL}maxConnections=2",
        "IMPATIENT": f"{LOCAL}idleTimeoutSecs=1&frameTimeoutSecs=0.5&associationTimeoutSecs=0.5",
        "SMALL": f"{LOCAL}maxMessageBytes=100000",
        "PDU": f"{LOCAL}maxPdu=16384",
        "TLS": secure,
        "MUTUAL": f"{secure}&clientCa={tls.ca_file}",
        "FEED": "?enhanced=true",
    }
    with imaging_site(tmp_path_factory.mktemp("imaging"), channels) as running:
        yield running


@pytest.fixture
def here(shared_site):
    forget_strays(shared_site)
    yield shared_site
    faults, fresh = shared_site.sandbox.faults, type(shared_site.sandbox.faults)()
    for name in vars(fresh):
        setattr(faults, name, getattr(fresh, name))
    shared_site.sandbox.bot = silent_bot


# --- dcmtk ---


def results(output: str) -> list[str]:
    """What storescu -v heard for each object: `Success`, or the words for another status."""
    return re.findall(r"Received Store Response \((.*?)\)", output)


@needs_dcmtk
def test_echoscu(here):
    ran = dcmtk("echoscu", "-v", "-aec", "ANY", "127.0.0.1", here.ports["PACS"])
    assert ran.code == 0 and "Received Echo Response (Success)" in ran.output, ran.output


@needs_dcmtk
@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("-xe", "CT_small.dcm"),
        ("-xi", "rtplan.dcm"),
        ("-xs", "SC_rgb_jpeg_gdcm.dcm"),
        ("-xy", "SC_rgb_jpeg_dcmtk.dcm"),
        ("-xx", "JPGExtended.dcm"),
        ("-xt", "MR_small_jpeg_ls_lossless.dcm"),
        ("-xu", "JPEGLSNearLossless_16.dcm"),
        ("-xv", "MR_small_jp2klossless.dcm"),
        ("-xw", "JPEG2000.dcm"),
        ("-xr", "MR_small_RLE.dcm"),
        ("-xb", "MR_small_bigendian.dcm"),
    ],
)
def test_storescu(here, tmp_path, option, name):
    """Plain and compressed: what dcmtk sends is what the file has, and that is uploaded."""
    title = f"SCU{option}"
    ran = dcmtk("storescu", "-v", option, "-aet", title, "127.0.0.1", here.ports["PACS"], FILES[name])
    assert results(ran.output) == ["Success"], ran.output
    body = announced(here, f'"callingAeTitle":"{title}"')
    assert body["association"] == {"callingAeTitle": title, "calledAeTitle": "ANY-SCP"}
    meta, content = uploaded(here, body)
    original = read_instance(FILES[name])
    assert uid_of(meta[0x10]) == original.syntax
    assert_same_elements(original, content)


@needs_dcmtk
def test_storescu_deflated(here):
    ran = dcmtk("storescu", "-v", "-xd", "-aet", "DEFLATED", "127.0.0.1", here.ports["PACS"], FILES["image_dfl.dcm"])
    assert results(ran.output) == ["Success"], ran.output
    body = announced(here, '"callingAeTitle":"DEFLATED"')
    assert uid_of(uploaded(here, body)[0][0x10]) == DEFLATED
    assert body["dataset"]["00080060"] == {"vr": "CS", "Value": ["OT"]}


@needs_dcmtk
def test_storescu_over_tls(here, tls, tmp_path):
    instance = made(5000)
    (path,) = write(tmp_path, instance)
    ran = dcmtk("storescu", "-v", "+tla", "+cf", tls.ca_file, "127.0.0.1", here.ports["TLS"], path)
    assert results(ran.output) == ["Success"], ran.output
    assert_arrived(here, instance)


@needs_dcmtk
@pytest.mark.parametrize(
    ("identity", "taken"),
    [(("+tla",), False), (("+tls", "key", "cert"), True), (("+tls", "foreign", "foreign"), False)],
)
def test_storescu_over_tls_with_a_client_certificate(here, tls, tmp_path, identity, taken):
    instance = made(5000)
    (path,) = write(tmp_path, instance)
    names = {"key": tls.key_file, "cert": tls.cert_file, "foreign": tls.foreign_file}
    options = [names.get(word, word) for word in identity]
    ran = dcmtk("storescu", "-v", *options, "+cf", tls.ca_file, "127.0.0.1", here.ports["MUTUAL"], path)
    if taken:
        assert results(ran.output) == ["Success"], ran.output
        assert_arrived(here, instance)
    else:
        assert ran.code != 0 and not results(ran.output), ran.output
    assert_works(here, "MUTUAL", context=tls.context(tls.cert_file, tls.key_file))


@needs_dcmtk
def test_four_storescu_at_once(here, tmp_path):
    batches = [[made(20_000) for _ in range(10)] for _ in range(4)]
    for number, batch in enumerate(batches):
        write(tmp_path / str(number), *batch)
    with ThreadPoolExecutor(4) as pool:
        send = functools.partial(dcmtk, "storescu", "-v", "+sd", "127.0.0.1", here.ports["PACS"])
        for ran in pool.map(send, [tmp_path / str(number) for number in range(4)]):
            assert results(ran.output) == ["Success"] * 10, ran.output
    for instance in (instance for batch in batches for instance in batch):
        assert_arrived(here, instance)
    assert_no_spool(here)


@needs_dcmtk
def test_storescu_that_aborts_after_its_objects(here, tmp_path):
    """What was answered 0x0000 before an A-ABORT stays stored."""
    instances = [made(5000), made(5000)]
    ran = dcmtk("storescu", "-v", "--abort", "127.0.0.1", here.ports["PACS"], *write(tmp_path, *instances))
    assert results(ran.output) == ["Success"] * 2 and "Aborting Association" in ran.output, ran.output
    for instance in instances:
        assert_arrived(here, instance)


@needs_dcmtk
def test_termscu_ends_nothing(here):
    dcmtk("termscu", "127.0.0.1", here.ports["PACS"])
    assert_works(here)


# --- every transfer syntax, SOP class and file ---

REFUSED: dict[str, tuple[int | None, str]] = {
    "MR_truncated.dcm": (NOT_UNDERSTOOD, "it breaks off inside its pixel data"),
    "rtplan_truncated.dcm": (NOT_UNDERSTOOD, "it breaks off inside a value"),
    "DICOMDIR-empty.dcm": (None, "the directory of a medium: its class is not sent over networks (PS3.4 I.4)"),
    "meta_missing_tsyntax.dcm": (NOT_UNDERSTOOD, "holds nothing but a group that no data set may have (PS3.5 7.8.1)"),
    "nested_priv_SQ.dcm": (NOT_UNDERSTOOD, "holds nothing but a group that no data set may have (PS3.5 7.8.1)"),
    "no_meta.dcm": (NOT_UNDERSTOOD, "begins in the middle of an element"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_pydicom_ships(here, name):
    """Stored in its own transfer syntax and uploaded byte for byte, or refused with the status that says why."""
    instance, title = read_instance(FILES[name]), f"F{list(FILES).index(name)}"
    status, _ = REFUSED.get(name, (SUCCESS, ""))
    with Scu.for_instances(here.ports["PACS"], instance, calling=title) as scu:
        assert bool(scu.accepted) == (status is not None)
        if status is not None:
            assert hex(scu.store(instance)) == hex(status)
    if status == SUCCESS:
        body = assert_arrived(here, instance, f'"callingAeTitle":"{title}"')
        assert body["dataset"].get("00080018", {"Value": [instance.uid]})["Value"] == [instance.uid]
        assert set(body) <= {"association", "dataset", "binary", "omitted"}
        assert_json_model(body["dataset"])
    else:
        assert_works(here)
        assert not transmits(here, f'"callingAeTitle":"{title}"')


def assert_json_model(elements: dict[str, Any]) -> None:
    """DICOM JSON (PS3.18 F.2) without artefacts of a library, and without pixels."""
    for tag, element in elements.items():
        assert re.fullmatch("[0-9A-F]{8}", tag)
        assert tag not in ("7FE00008", "7FE00009", "7FE00010")
        assert re.fullmatch("[A-Z]{2}", element["vr"])
        assert set(element) - {"vr"} in ({"Value"}, {"InlineBinary"}, set()), (tag, element)
        if "InlineBinary" in element:
            base64.b64decode(element["InlineBinary"], validate=True)
        assert ("Value" in element) <= isinstance(element.get("Value"), list)
        for item in element.get("Value", []) if element["vr"] == "SQ" else []:
            assert_json_model(item)


@pytest.mark.parametrize(
    ("sop_class", "syntax"),
    [
        ("1.2.840.10008.5.1.4.1.1.88.99", EXPLICIT),  # a standard class that does not exist
        ("1.3.12.2.1107.5.9.1", IMPLICIT),  # private: Siemens CSA Non-Image
        ("1.2.3.4.5.6.7.8", EXPLICIT),
        (SECONDARY, "1.2.840.10008.1.2.4.107"),  # HEVC
        (SECONDARY, "1.2.840.10008.1.2.4.201"),  # HTJ2K
        (SECONDARY, "1.2.3.4.5.6"),  # a private transfer syntax
    ],
)
def test_any_storage_class_and_transfer_syntax(here, sop_class, syntax):
    dataset = made_dataset(SOPClassUID=sop_class)
    instance = Instance(sop_class, dataset.SOPInstanceUID, syntax, encoded(dataset, syntax))
    assert store(here.ports["PACS"], instance) == [SUCCESS]
    assert_arrived(here, instance)


@pytest.mark.parametrize("syntaxes", [(IMPLICIT, EXPLICIT), (EXPLICIT, IMPLICIT), ("1.2.840.10008.1.2.4.70", EXPLICIT)])
def test_the_first_proposed_transfer_syntax_is_taken(here, syntaxes):
    with Scu(here.ports["PACS"], [(CT, syntaxes), (SECONDARY, syntaxes)]) as scu:
        assert scu.accepted == {(CT, syntaxes[0]): 1, (SECONDARY, syntaxes[0]): 3}


def test_echo_and_stores_in_one_association(here):
    instances = [made(n * 777, random.choice((IMPLICIT, EXPLICIT))) for n in range(20)]
    contexts = [(VERIFICATION, (IMPLICIT,)), (SECONDARY, (IMPLICIT,)), (SECONDARY, (EXPLICIT,))]
    with Scu(here.ports["PACS"], contexts) as scu:
        for instance in instances:
            assert scu.echo() == SUCCESS
            assert scu.store(instance) == SUCCESS
    for instance in instances:
        assert_arrived(here, instance)
    assert_no_spool(here)


def test_the_row_of_an_image(here):
    instance = made(1000)
    assert store(here.ports["PACS"], instance) == [SUCCESS]
    row = here.agent.wait_state(instance.uid, "processed")
    assert (row["channel_name"], row["type"], row["remote"]) == ("PACS", "C-STORE", "RAW")
    assert not spooled(here)


def test_images_of_a_study_go_in_order(here):
    here.sandbox.faults.delay = lambda: random.uniform(0, 0.05)
    instances = [made(100, StudyInstanceUID="1.2.3.4.99") for _ in range(20)]
    assert store(here.ports["PACS"], *instances) == [SUCCESS] * 20
    here.sandbox.wait_for(lambda: len(transmits(here, "1.2.3.4.99")) == 20)
    found = [json.loads(t.body)["dataset"]["00080018"]["Value"][0] for t in transmits(here, "1.2.3.4.99")]
    assert found == [instance.uid for instance in instances]


# --- what is refused ---


@pytest.mark.parametrize("size", [1000, 300_000])
@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda i: i._replace(uid=new_uid()), MISMATCH),
        (lambda i: i._replace(sop_class=CT), MISMATCH),
        (lambda i: i._replace(content=i.content[:5]), NOT_UNDERSTOOD),
        (lambda i: i._replace(content=b"\xff\xff\xff\xff" * 100), NOT_UNDERSTOOD),
        (lambda i: i._replace(content=b""), NOT_UNDERSTOOD),
        (lambda i: i._replace(syntax=DEFLATED), NOT_UNDERSTOOD),
    ],
    ids=["uid", "class", "cut", "garbage", "empty", "deflated"],
)
def test_what_does_not_fit_is_refused_and_the_association_goes_on(here, change, status, size):
    bad, good = change(made(size)), made(500)
    assert [hex(found) for found in store(here.ports["PACS"], bad, good)] == [hex(status), hex(SUCCESS)]
    assert_arrived(here, good)
    assert not transmits(here, bad.uid)
    assert_no_spool(here)


def test_an_object_that_is_too_large_is_refused_and_the_next_is_taken(here):
    large, small = made(150_000), made(50_000)
    assert store(here.ports["SMALL"], large, small, large) == [OUT_OF_RESOURCES, SUCCESS, OUT_OF_RESOURCES]
    assert_arrived(here, small)
    assert not transmits(here, large.uid)
    assert_no_spool(here)


def test_a_device_that_waits_for_no_answer_does_not_take_every_descriptor(here):
    assert here.agent.process is not None
    files, most = Path(f"/proc/{here.agent.process.pid}/fd"), 0
    instances = [made(10) for _ in range(1500)]
    with Scu.for_instances(here.ports["PACS"], instances[0]) as scu:
        sending = threading.Thread(target=lambda: collections.deque(map(scu.send_store, instances), 0))
        sending.start()
        for _ in instances:
            assert scu.status() == SUCCESS
            most = max(most, len(list(files.iterdir())))
        sending.join()
    assert most < 700  # those that wait, and what was read at once with the last of them
    here.sandbox.wait_for(lambda: transmits(here, instances[-1].uid), 30)


def test_an_object_that_inflates_without_end_is_refused_in_little_memory(here):
    """Half a megabyte that stands for 500: deflated objects are read in memory."""
    head, deflating = made_dataset(), zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    begin = encoded(head) + struct.pack("<HH2s2xI", 0x7FE0, 0x0010, b"OW", 500 * 2**20)
    parts = [deflating.compress(begin), *(deflating.compress(bytes(2**20)) for _ in range(500)), deflating.flush()]
    content = b"".join(parts)
    before, good = here.agent.memory_kb("VmHWM"), made(500)
    bomb = Instance(SECONDARY, str(head.SOPInstanceUID), DEFLATED, content + b"\0" * (len(content) % 2))
    assert store(here.ports["PACS"], bomb, good) == [OUT_OF_RESOURCES, SUCCESS]
    assert here.agent.memory_kb("VmHWM") < before + 50_000
    assert_arrived(here, good)


# --- what the server is told ---


def test_numbers_that_javascript_would_round_are_texts(here):
    dataset = made_dataset()
    dataset.add_new(0x0008040C, "UV", [2**53, 2**64 - 1])
    assert store(here.ports["PACS"], Instance(SECONDARY, str(dataset.SOPInstanceUID), EXPLICIT, encoded(dataset))) == [
        0
    ]
    announced_as = announced(here, str(dataset.SOPInstanceUID))["dataset"]["0008040C"]
    assert announced_as == {"vr": "UV", "Value": [2**53, str(2**64 - 1)]}


def test_the_announcement_exactly(here):
    """Members and values, with every kind of VR; no `_rawValue`, no pixels."""
    dataset = made_dataset(
        PatientName="Müller^Jörg", SpecificCharacterSet="ISO_IR 100", InstanceNumber=7, SliceThickness="1.5",
        ImageType=["DERIVED", "PRIMARY"], PatientBirthDate="", Rows=4, Columns=4,
    )  # fmt: skip
    item = Dataset()
    item.CodeValue, item.CodeMeaning = "126000", "Schädel"
    dataset.ConceptNameCodeSequence = [item]
    dataset.FrameIncrementPointer = 0x00181063
    dataset.add_new(0x00091001, "OB", bytes(range(256)))
    dataset.BitsAllocated = 8
    dataset.add_new(0x7FE00010, "OW", bytes(4096))
    instance = Instance(SECONDARY, dataset.SOPInstanceUID, EXPLICIT, encoded(dataset))
    assert store(here.ports["PACS"], instance, calling="CT 1", called="AGENT") == [SUCCESS]
    body = assert_arrived(here, instance)
    (transmit,) = transmits(here, instance.uid)
    assert (transmit.channel, transmit.remote) == ("PACS", "CT 1")
    assert transmit.body.isascii() or "Müller" in transmit.body
    found = body.pop("dataset")
    assert set(body) == {"association", "binary"}
    assert body["association"] == {"callingAeTitle": "CT 1", "calledAeTitle": "AGENT"}
    assert re.fullmatch(r"Binary/[-0-9a-f]+", body["binary"]["reference"])
    meta = {tag: found.pop(tag) for tag in list(found) if tag.startswith("0002")}
    assert meta["00020010"] == {"vr": "UI", "Value": [EXPLICIT]}
    assert meta["00020002"] == {"vr": "UI", "Value": [SECONDARY]}
    assert meta["00020003"] == {"vr": "UI", "Value": [instance.uid]}
    assert found == {
        "00080005": {"vr": "CS", "Value": ["ISO_IR 192"]},  # a Bot that writes it back must not garble it
        "00080008": {"vr": "CS", "Value": ["DERIVED", "PRIMARY"]},
        "00080016": {"vr": "UI", "Value": [SECONDARY]},
        "00080018": {"vr": "UI", "Value": [instance.uid]},
        "00080020": {"vr": "DA", "Value": ["20260101"]},
        "00080060": {"vr": "CS", "Value": ["OT"]},
        "00091001": {"vr": "OB", "InlineBinary": base64.b64encode(bytes(range(256))).decode()},
        "00100010": {"vr": "PN", "Value": [{"Alphabetic": "Müller^Jörg"}]},
        "00100020": {"vr": "LO", "Value": ["PAT-1"]},
        "00100030": {"vr": "DA", "Value": [""]},  # as the reference writes it
        "00180050": {"vr": "DS", "Value": [1.5]},
        "0020000D": {"vr": "UI", "Value": [dataset.StudyInstanceUID]},
        "0020000E": {"vr": "UI", "Value": [dataset.SeriesInstanceUID]},
        "00200013": {"vr": "IS", "Value": [7]},
        "00280009": {"vr": "AT", "Value": ["00181063"]},
        "00280010": {"vr": "US", "Value": [4]},
        "00280011": {"vr": "US", "Value": [4]},
        "00280100": {"vr": "US", "Value": [8]},
        "0040A043": {
            "vr": "SQ",
            "Value": [{"00080100": {"vr": "SH", "Value": ["126000"]}, "00080104": {"vr": "LO", "Value": ["Schädel"]}}],
        },
    }


@pytest.mark.parametrize(
    ("name", "person"),
    [
        ("chrGerm.dcm", {"Alphabetic": "Äneas^Rüdiger"}),
        ("chrFren.dcm", {"Alphabetic": "Buc^Jérôme"}),
        ("chrGreek.dcm", {"Alphabetic": "Διονυσιος"}),
        ("chrRuss.dcm", {"Alphabetic": "Люкceмбypг"}),
        ("chrHbrw.dcm", {"Alphabetic": "שרון^דבורה"}),
        ("chrArab.dcm", {"Alphabetic": "قباني^لنزار"}),
        ("chrH31.dcm", {"Alphabetic": "Yamada^Tarou", "Ideographic": "山田^太郎", "Phonetic": "やまだ^たろう"}),
        ("chrH32.dcm", {"Alphabetic": "ﾔﾏﾀﾞ^ﾀﾛｳ", "Ideographic": "山田^太郎", "Phonetic": "やまだ^たろう"}),
        ("chrI2.dcm", {"Alphabetic": "Hong^Gildong", "Ideographic": "洪^吉洞", "Phonetic": "홍^길동"}),
        ("chrX1.dcm", {"Alphabetic": "Wang^XiaoDong", "Ideographic": "王^小東"}),
        ("chrX2.dcm", {"Alphabetic": "Wang^XiaoDong", "Ideographic": "王^小东"}),
    ],
)
def test_character_sets_become_utf_8(here, name, person):
    instance, title = read_instance(FILES[name]), f"C{list(FILES).index(name)}"
    assert store(here.ports["PACS"], instance, calling=title) == [SUCCESS]
    found = announced(here, f'"callingAeTitle":"{title}"')["dataset"]["00100010"]["Value"][0]
    assert {kind: text for kind, text in found.items() if text} == person


@pytest.mark.parametrize(
    ("elements", "kept", "omitted"),
    [
        ({0x00420011: ("OB", 3_000_000)}, {"00100010"}, ["00420011"]),
        ({0x00091001: ("OB", 1000), 0x00091002: ("UN", 2_000_000)}, {"00091001"}, ["00091002"]),
        ({0x0040A160: ("UT", 2_000_000), 0x00091001: ("UT", 100_000)}, {"00091001"}, ["0040A160"]),
        ({0x00091000 + n: ("UT", 150_000 - n) for n in range(16, 26)}, {"00091019"}, None),
        ({0x00091000 + n: ("OB", 60_000 - n) for n in range(16, 60)}, {"00100010"}, None),
        ({0x00091010: ("LT", 9_000, "\u0001\u0002"), 0x00091011: ("UT", 900_000, '"\\')}, {"00100010"}, None),
    ],
    ids=["pdf", "private", "text", "much text", "much binary", "escapes"],
)
def test_what_is_too_large_for_a_frame_is_left_out_largest_first(here, elements, kept, omitted):
    """The whole request stays below the 1 MiB where the server closes the connection (known limits)."""
    dataset = made_dataset()
    for tag, (vr, size, *pattern) in elements.items():
        text = (pattern[0] if pattern else "x") * (size // (len(pattern[0]) if pattern else 1))
        dataset.add_new(tag, vr, text if vr in ("UT", "LT") else bytes(size))
    instance = Instance(SECONDARY, dataset.SOPInstanceUID, EXPLICIT, encoded(dataset))
    assert store(here.ports["PACS"], instance) == [SUCCESS]
    body = assert_arrived(here, instance)
    assert set(body["dataset"]) >= kept
    left_out = {f"{tag:08X}" for tag in elements} - set(body["dataset"])
    assert left_out == set(body["omitted"])
    if omitted is not None:
        assert body["omitted"] == omitted
    (transmit,) = transmits(here, instance.uid)
    assert len(json.dumps(transmit.body, ensure_ascii=False).encode()) < 2**20 - 2000
    if left_out and len({vr for vr, *_ in elements.values()}) == 1:
        sizes = {f"{tag:08X}": size for tag, (_, size, *_) in elements.items()}
        rest = set(sizes) - left_out
        assert not rest or min(map(sizes.__getitem__, left_out)) >= max(map(sizes.__getitem__, rest))


def test_many_small_elements_deep_in_sequences_fit_as_well(here):
    dataset = made_dataset()
    items = []
    for number in range(6000):
        item = Dataset()
        item.TextValue, item.CodeMeaning = f"{number} " + "x" * 150, "y" * 60
        items.append(item)
    dataset.ContentSequence = items
    instance = Instance(SECONDARY, dataset.SOPInstanceUID, EXPLICIT, encoded(dataset))
    assert store(here.ports["PACS"], instance) == [SUCCESS]
    body = assert_arrived(here, instance)
    assert body["omitted"] == ["0040A730"]


def test_no_patient_data_in_the_main_log(here):
    secret = {"PatientName": "Xyzzyname^Plugh", "PatientID": "XYZZYID", "StudyDescription": "Xyzzystudy"}
    good, bad = made(1000, **secret), made(1000, **secret)
    cut = bad._replace(content=bad.content[:-400], uid=new_uid())
    assert store(here.ports["PACS"], good, bad._replace(uid=new_uid()), cut)[0] == SUCCESS
    here.sandbox.bot = lambda transmit: (400, '{"resourceType":"OperationOutcome"}')
    refused = made(1000, **secret)
    assert store(here.ports["PACS"], refused) == [SUCCESS]
    assert_arrived(here, good)
    here.sandbox.wait_for(lambda: transmits(here, refused.uid))
    here.agent.logged("failed")
    assert b"xyzzy" not in here.agent.main_log().lower()
    assert "xyzzy" not in here.agent.output().lower()


# --- who may come in ---


@pytest.mark.parametrize(
    ("called", "calling", "rejected"),
    [
        ("AGENT", "CT1", None),
        ("AGENT", "MR 2", None),
        ("AGENT", "CT2", (1, 1, 3)),
        ("AGENT", "ct1", (1, 1, 3)),
        ("ANY-SCP", "CT1", (1, 1, 7)),
    ],
)
def test_ae_titles(here, called, calling, rejected):
    """PS3.8 9.3.4: permanent, by the service user, called or calling AE title not recognized."""
    if rejected:
        with pytest.raises(Rejected) as raised:
            Scu(here.ports["LOCKED"], called=called, calling=calling)
        assert raised.value.args == rejected
    else:
        with Scu(here.ports["LOCKED"], called=called, calling=calling) as scu:
            assert scu.echo() == SUCCESS


def test_any_ae_title_by_default(here):
    with Scu(here.ports["PACS"], called="WHATEVER 12345 X", calling="SOMEONE") as scu:
        assert scu.echo() == SUCCESS


def test_peers(here):
    with pytest.raises((Aborted, ConnectionError)):
        Scu(here.ports["PEERS"])
    here.agent.logged("127.0.0.1")
    with Scu(here.ports["PEERS"], source="127.0.0.2") as scu:
        assert scu.echo() == SUCCESS


def test_associations_beyond_the_limit_are_rejected_for_now(here):
    """PS3.8 9.3.4: transient, by the service provider, local limit exceeded."""
    port = here.ports["FEW"]

    def admitted() -> bool:
        with contextlib.suppress(Rejected), Scu(port) as scu:
            return scu.echo() == SUCCESS
        return False

    with Scu(port), Scu(port):
        with pytest.raises(Rejected) as raised:
            Scu(port)
        assert raised.value.args == (2, 3, 2)
    eventually(admitted, what="a place is free again")
    for _ in range(5):  # those who abort give their place back too
        scu = Scu(port)
        scu.pdu(7)
        scu.socket.close()
    eventually(admitted, what="places are free after aborts")


def test_silence_ends_an_association(here):
    begin = time.monotonic()
    scu = Scu(here.ports["IMPATIENT"])
    assert scu.ended(8)
    assert 0.7 < time.monotonic() - begin < 5
    scu.socket.close()


def raw(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10)


def closes(sock: socket.socket, timeout: float = 8) -> bool:
    """Whether the agent closes, with or without an A-ABORT before."""
    sock.settimeout(timeout)
    with sock:
        try:
            while sock.recv(65536):
                pass
        except ConnectionError:
            return True
        except TimeoutError:
            return False
    return True


@pytest.mark.parametrize(
    "said", [b"", b"\x01", b"\x01\x00\x00\x00\x00\xd0\x00\x01"], ids=["nothing", "a byte", "half a request"]
)
def test_who_asks_for_no_association_is_closed(here, said):
    sock = raw(here.ports["IMPATIENT"])
    sock.sendall(said)
    assert closes(sock)
    assert_works(here, "IMPATIENT")


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x0bMSH|^~\\&|A|B|C|D|20260101||ADT^A01|1|P|2.5\r\x1c\r",
        bytes(200),
        b"\xff" * 200,
        b"\x04\x00\x00\x00\x00\x04\x00\x00\x00\x00",
        b"\x01\x00\x00\x00\x00\x04\x00\x01\x00\x00",
        b"\x01\x00\x00\x00\x00\x50" + bytes(80),
        b"\x01\x00\xff\xff\xff\xff" + bytes(80),
    ],
    ids=["http", "hl7", "zeros", "ones", "p-data", "short request", "empty request", "4 GB request"],
)
def test_garbage_instead_of_an_association_request(here, garbage):
    before = here.agent.memory_kb("VmHWM")
    sock = raw(here.ports["IMPATIENT"])
    sock.sendall(garbage)
    assert closes(sock)
    assert_works(here, "IMPATIENT")
    assert here.agent.memory_kb("VmHWM") < before + 20_000


def test_a_device_that_stops_inside_a_pdu(here):
    """The connection is closed in time, what came of the object is thrown away."""
    instance = made(50_000)
    scu = Scu.for_instances(here.ports["IMPATIENT"], instance)
    scu.fragments(1, 1, command_of(instance))
    scu.fragments(1, 0, instance.content[:10_000], last=False)
    scu.socket.sendall(b"\x04\x00\x00\x00\x40\x00" + bytes(100))
    assert scu.ended(8)
    scu.socket.close()
    assert_no_spool(here)
    assert_works(here, "IMPATIENT")


def test_a_device_that_does_not_finish_the_tls_handshake(here, tls):
    """It is closed in time, and meanwhile others come in."""
    with raw(here.ports["TLS"]) as silent:
        assert_works(here, "TLS", context=tls.context())
        assert closes(silent)
    with pytest.raises((Aborted, OSError)):
        Scu(here.ports["TLS"])


def vanish(scu: Scu) -> None:
    scu.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    scu.socket.close()


def hang_up(scu: Scu) -> None:
    scu.socket.close()


def abort(scu: Scu) -> None:
    scu.pdu(7)
    scu.socket.close()


def half(scu: Scu) -> None:
    scu.socket.sendall(b"\x04\x00\x00\x00\x40\x00" + bytes(100))
    scu.socket.close()


def babble(scu: Scu) -> None:
    scu.socket.sendall(b"\x99\x00\x00\x00\x00\x04" + bytes(4))
    assert scu.ended()
    scu.socket.close()


def another_context(scu: Scu) -> None:
    scu.fragments(99, 0, bytes(10))
    assert scu.ended()
    scu.socket.close()


@pytest.mark.parametrize("leave", [vanish, hang_up, abort, half, babble, another_context])
def test_a_device_that_goes_in_the_middle_of_an_object(here, leave):
    instance = made(200_000)
    scu = Scu.for_instances(here.ports["PACS"], instance)
    whole = command_of(instance)
    scu.fragments(1, 1, whole)
    scu.fragments(1, 0, instance.content[:100_000], last=False)
    leave(scu)
    assert_no_spool(here)
    assert not transmits(here, instance.uid)
    assert_works(here)


def command_of(instance: Instance) -> bytes:
    elements: dict[int, int | str] = {2: instance.sop_class, 0x0100: 1, 0x0110: 1, 0x0700: 0, 0x0800: 1}
    return command_set(elements | {0x1000: instance.uid})


def test_fragments_of_one_byte_and_several_in_a_pdu(here):
    """PS3.8 9.3.5.1: any division into PDVs is allowed."""
    instance = made(300)
    with Scu.for_instances(here.ports["PACS"], instance) as scu:
        values = [(1, bytes((byte,))) for byte in command_of(instance)]
        contents = [(0, bytes((byte,))) for byte in instance.content]
        for parts in (values, contents):
            pdvs = [struct.pack(">IBB", 3, 1, flags) + part for flags, part in parts]
            flags, part = parts[-1]
            pdvs[-1] = struct.pack(">IBB", 3, 1, flags | 2) + part
            for start in range(0, len(pdvs), 7):
                scu.pdu(4, b"".join(pdvs[start : start + 7]))
        assert scu.status() == SUCCESS
    assert_arrived(here, instance)


def test_the_largest_pdu_is_told(here):
    with Scu(here.ports["PDU"]) as small, Scu(here.ports["PACS"]) as usual:
        assert (small.peer_pdu, usual.peer_pdu) == (16_384, 131_072)
    assert_works(here, "PDU")


# --- delivery ---


def test_server_away_then_restart_then_delivery(tmp_path):
    with imaging_site(tmp_path, {"PACS": f"{LOCAL}{FAST}"}) as here:
        here.sandbox.stop()
        instances = [made(10_000) for _ in range(5)]
        assert store(here.ports["PACS"], *instances) == [SUCCESS] * 5
        assert len(spooled(here)) == 5
        here.agent.terminate()
        stray = spooled(here)[0].with_name("11111111-2222-3333-4444-555555555555.part")
        stray.write_bytes(b"of an object that was never whole")
        start(here)
        assert len(spooled(here)) == 5
        here.agent.kill()
        start(here)
        late = made(10_000)
        assert store(here.ports["PACS"], late) == [SUCCESS]
        here.sandbox.start()
        for instance in (*instances, late):
            assert_arrived(here, instance)
        assert_no_spool(here)


@pytest.fixture(scope="module")
def retrying_site(tmp_path_factory):
    tries = (
        setting("channelAutoRetryBaseDelayMs", 20), setting("channelAutoRetryMaxDelayMs", 50),
        setting("channelAutoRetryMaxAttempts", 3),
    )  # fmt: skip
    channels = {"PACS": LOCAL, "PATIENT": f"{LOCAL}{FAST}"}
    with imaging_site(tmp_path_factory.mktemp("retrying"), channels, settings=tries) as running:
        yield running


@pytest.fixture
def retrying(retrying_site):
    yield retrying_site
    retrying_site.sandbox.faults.read_failures.clear()
    retrying_site.sandbox.bot = silent_bot


def uploads(here: Site) -> int:
    return sum(request.startswith("POST /fhir/R4/Binary") for request in here.sandbox.sandbox.requests)


@pytest.mark.parametrize("status", [500, 429])
def test_an_upload_that_fails_is_tried_again(retrying, status):
    retrying.sandbox.faults.read_failures["Binary"] = status
    instance, before = made(10_000), uploads(retrying)
    assert store(retrying.ports["PATIENT"], instance) == [SUCCESS]
    eventually(lambda: uploads(retrying) >= before + 2, what="a second try")
    assert not transmits(retrying, instance.uid)
    retrying.sandbox.faults.read_failures.clear()
    assert_arrived(retrying, instance)
    retrying.agent.wait_state(instance.uid, "processed")


@pytest.mark.parametrize("status", [400, 403, 413])
def test_an_upload_that_is_refused_becomes_a_dead_letter_with_its_file(retrying, status):
    before = set(spooled(retrying))
    retrying.sandbox.faults.read_failures["Binary"] = status
    instance = made(10_000)
    assert store(retrying.ports["PACS"], instance) == [SUCCESS]
    row = retrying.agent.wait_state(instance.uid, "rejected")
    assert str(status) in row["last_error"] or "file" in row["last_error"], row
    (kept,) = set(spooled(retrying)) - before
    assert split_part10(kept.read_bytes())[1] == instance.content
    assert not transmits(retrying, instance.uid)


def test_a_bot_that_refuses_leaves_the_file_for_who_looks_after_it(retrying):
    before = set(spooled(retrying))
    retrying.sandbox.bot = lambda transmit: (400, '{"resourceType":"OperationOutcome"}')
    instance = made(10_000)
    assert store(retrying.ports["PACS"], instance) == [SUCCESS]
    assert_arrived(retrying, instance)
    retrying.agent.wait_state(instance.uid, "rejected")
    assert len(set(spooled(retrying)) - before) == 1


def test_the_bots_answer_is_kept_and_goes_nowhere(retrying):
    retrying.sandbox.bot = lambda transmit: (200, '{"resourceType":"ImagingStudy"}')
    instance = made(100)
    with Scu.for_instances(retrying.ports["PACS"], instance) as scu:
        assert scu.store(instance) == SUCCESS
        row = retrying.agent.wait_state(instance.uid, "processed")
        assert "ImagingStudy" in row["response"]
        assert not scu.ended(0.2)


def test_an_upload_is_not_repeated_for_a_bot_that_is_tried_again(retrying):
    """The Binary that is there is named again."""
    answers = iter([(500, ""), (500, "")])
    retrying.sandbox.bot = lambda transmit: next(answers, (200, ""))
    before, instance = uploads(retrying), made(10_000)
    assert store(retrying.ports["PATIENT"], instance) == [SUCCESS]
    row = retrying.agent.wait_state(instance.uid, "processed")
    assert row["attempts"] == 3 and uploads(retrying) == before + 1
    assert len({json.loads(t.body)["binary"]["reference"] for t in transmits(retrying, instance.uid)}) == 1


def has_new(here: Site, seen: int, files: set[Path]) -> bool:
    return len(here.sandbox.seen) > seen or bool(set(spooled(here)) - files)


@needs_dcmtk
def test_kills_while_four_storescu_send(tmp_path):
    """Every object that storescu was answered 0x0000 for reaches the server, whole, whenever the agent is killed."""
    moments, accepted = random.Random(5), dict[str, Instance]()
    with imaging_site(tmp_path, {"PACS": f"{LOCAL}{FAST}"}) as here:
        for number in range(KILLS):
            batches = [[made(30_000, StudyInstanceUID=f"1.2.{sender}") for _ in range(40)] for sender in range(4)]
            folders = [tmp_path / f"{number}-{sender}" for sender in range(4)]
            for folder, batch in zip(folders, batches, strict=True):
                write(folder, *batch)
            send = functools.partial(dcmtk, "storescu", "-v", "-to", 5, "+sd", "127.0.0.1", here.ports["PACS"])
            before = len(here.sandbox.seen), set(spooled(here))
            with ThreadPoolExecutor(4) as pool:
                running = [pool.submit(send, folder) for folder in folders]
                here.sandbox.wait_for(functools.partial(has_new, here, *before), what="the first object of this round")
                time.sleep(moments.uniform(0, 0.4))
                here.agent.kill()
                outputs = [future.result().output for future in running]
            for batch, output in zip(batches, outputs, strict=True):
                sent = re.findall(r"Sending file: .*/(\d{4})\.dcm|Received Store Response \((Success)\)", output)
                names = [int(name) for (name, _), (_, success) in itertools.pairwise(sent) if success]
                accepted |= {batch[name].uid: batch[name] for name in names}
            if number % 2:
                here.sandbox.stop()
            start(here)
            if number % 2:
                here.sandbox.start()
        for uid, instance in accepted.items():
            here.sandbox.wait_for(functools.partial(transmits, here, uid), 30, f"{uid} of {len(accepted)}")
            for transmit in transmits(here, uid):
                assert uploaded(here, json.loads(transmit.body))[1] == instance.content
        assert_no_spool(here)
        print(f"\n{len(accepted)} objects accepted, {len(here.sandbox.seen)} announcements, {KILLS} kills")
    assert len(accepted) > 3 * KILLS


@pytest.fixture
def small_disk(tmp_path):
    with tmpfs(tmp_path / "small", 12) as folder:
        yield folder


def test_a_full_disk_refuses_and_recovers(small_disk):
    with imaging_site(small_disk, {"PACS": f"{LOCAL}{FAST}"}) as here:
        huge, small = made(14 * 2**20), made(1000)
        refused, another = store(here.ports["PACS"], huge, made(10))  # the association goes on
        assert refused == OUT_OF_RESOURCES and another in (OUT_OF_RESOURCES, SUCCESS)
        eventually(lambda: store(here.ports["PACS"], small) == [SUCCESS])  # the disk is looked at ten times a second
        assert_arrived(here, small)
        assert_no_spool(here)
        here.sandbox.stop()
        accepted: list[Instance] = []
        with Scu(here.ports["PACS"], [(SECONDARY, (EXPLICIT,))]) as scu:
            while (status := scu.store(instance := made(700_000))) == SUCCESS:
                accepted.append(instance)
            assert hex(status) == hex(OUT_OF_RESOURCES) and len(accepted) > 3
            assert scu.store(made(700_000)) == OUT_OF_RESOURCES
        here.agent.kill()
        start(here)
        here.sandbox.start()
        for instance in accepted:
            assert_arrived(here, instance)
        assert_no_spool(here)
        eventually(lambda: store(here.ports["PACS"], made(700_000)) == [SUCCESS], 10, "room again")


def test_a_full_queue_refuses_and_recovers(tmp_path):
    """queueMaxMb counts the files beside the queue too."""
    with imaging_site(tmp_path, {"PACS": f"{LOCAL}{FAST}"}, settings=[setting("queueMaxMb", 4)]) as here:
        here.sandbox.stop()
        accepted: list[Instance] = []
        with Scu(here.ports["PACS"], [(SECONDARY, (EXPLICIT,))]) as scu:
            while (status := scu.store(instance := made(500_000))) == SUCCESS:
                accepted.append(instance)
                assert len(accepted) < 20
        assert hex(status) == hex(OUT_OF_RESOURCES) and len(accepted) > 2
        here.sandbox.start()
        for instance in accepted:
            assert_arrived(here, instance)
        eventually(lambda: store(here.ports["PACS"], made(500_000)) == [SUCCESS], 10, "room again")


def test_an_unusable_queue_refuses(tmp_path):
    blocked = tmp_path / "file-not-folder"
    blocked.write_text("x")
    settings = [setting("queueDbPath", str(blocked / "queue.sqlite"))]
    with imaging_site(tmp_path, {"PACS": LOCAL}, settings=settings) as here:
        assert store(here.ports["PACS"], made(1000), made(300_000)) == [OUT_OF_RESOURCES] * 2


def test_a_store_request_without_a_data_set_is_refused(here):
    """PS3.7 9.1.1: it has one; a device must not take its object for stored."""
    instance = made(10)
    with Scu.for_instances(here.ports["PACS"], instance) as scu:
        scu.request(1, {2: instance.sop_class, 0x0100: 0x0001, 0x1000: instance.uid})
        assert scu.status() == NOT_UNDERSTOOD
        assert scu.store(instance) == SUCCESS
    assert_arrived(here, instance)


@pytest.mark.parametrize("program", ["strace"])
def test_file_and_row_are_synced_before_success_is_answered(tmp_path, program):
    if not shutil.which(program):
        pytest.skip("NO STRACE: that an object reaches the disk before its success leaves was not checked")
    trace = tmp_path / "strace.txt"
    calls = "trace=openat,sendto,write,pwrite64,fdatasync,fsync,rename"
    with imaging_site(
        tmp_path, {"PACS": LOCAL}, wrapper=[program, "-D", "-f", "-y", "-e", calls, "-o", str(trace)]
    ) as here:
        instance = made(300_000)
        assert store(here.ports["PACS"], instance) == [SUCCESS]
        assert_arrived(here, instance)
        here.agent.terminate()
        eventually(lambda: "exited with" in trace.read_text().splitlines()[-1], 10, "strace to end")
    lines = trace.read_text().splitlines()

    def first(pattern: str, after: int = 0) -> int:
        return next(n for n, line in enumerate(lines) if n >= after and re.search(pattern, line))

    file = first(r"fsync\(\d+<[^>]*\.spool/")
    row = first(r"fdatasync\(\d+<[^>]*-wal>", file)
    answered = first(r'sendto\(\d+<[^>]*>, "\\4\\0', row)
    assert file < row < answered
    assert not any(re.search(r'sendto\(\d+<[^>]*>, "\\4\\0', line) for line in lines[:row])


def test_a_big_object_is_never_in_memory(tmp_path):
    """The agent grows by less than 50 MB while it takes and uploads an object of hundreds of MB (DICOM_BIG_MB)."""
    block = os.urandom(2**20)
    head = made_dataset()
    head.BitsAllocated = 8
    begin = encoded(head) + struct.pack("<HH2s2xI", 0x7FE0, 0x0010, b"OW", BIG_MB * len(block))
    digest = hashlib.sha256(begin)

    def content() -> Iterator[bytes]:
        yield begin
        for _ in range(BIG_MB):
            yield block

    for _ in range(BIG_MB):
        digest.update(block)
    with imaging_site(tmp_path, {"PACS": LOCAL}) as here:
        here.sandbox.sandbox.binary_dir = tmp_path
        for _ in range(3):
            assert_works(here)
        rss = here.agent.memory_kb("VmRSS")
        big = Instance(SECONDARY, head.SOPInstanceUID, EXPLICIT, b"")
        started = time.monotonic()
        with Scu.for_instances(here.ports["PACS"], big, timeout=120) as scu:
            assert scu.store(big, content()) == SUCCESS
            received = time.monotonic()
            body = announced(here, big.uid, 120)
        delivered, peak = time.monotonic(), here.agent.memory_kb("VmHWM")
        path = here.sandbox.sandbox.binaries[body["binary"]["reference"]]
        assert isinstance(path, Path)
        with open(path, "rb") as file:
            file.seek(path.stat().st_size - len(begin) - BIG_MB * len(block))
            assert hashlib.file_digest(file, "sha256").digest() == digest.digest()
        path.unlink()
        rates = [BIG_MB / seconds for seconds in (received - started, delivered - received)]
        print("\n{} MB: received at {:.0f} MB/s, uploaded at {:.0f} MB/s".format(BIG_MB, *rates), end="; ")
        print(f"{rss / 1024:.0f} MB of memory grew by {(peak - rss) / 1024:.1f}")
        assert peak - rss < 50_000
        assert_no_spool(here)


# --- settings and reload ---


def test_a_port_is_swapped_between_dicom_and_hl7(tmp_path):
    with imaging_site(tmp_path, {"PACS": LOCAL, "FEED": "?enhanced=true"}) as here:
        for _ in range(2):
            here.endpoint("PACS")["address"] = f"dicom://127.0.0.1:{here.ports['FEED']}"
            here.endpoint("FEED")["address"] = f"mllp://127.0.0.1:{here.ports['PACS']}?enhanced=true"
            here.ports["PACS"], here.ports["FEED"] = here.ports["FEED"], here.ports["PACS"]
            assert "error" not in str(here.sandbox.reload().get("type"))
            assert_works(here)
            control = f"SWAP-{time.monotonic_ns()}"
            with here.device("FEED") as device:
                assert device.ask(message(control)) == ("CA", control)


def test_changed_settings_hold_from_the_reload_on(tmp_path):
    with imaging_site(tmp_path, {"PACS": LOCAL}) as here:
        assert_works(here)
        for query, options in (("callingAeTitles=GOOD", {"calling": "GOOD"}), ("calledAeTitle=ME", {"called": "ME"})):
            here.endpoint("PACS")["address"] = f"dicom://127.0.0.1:{here.ports['PACS']}?{query}"
            here.sandbox.reload()
            assert_works(here, **options)
            with pytest.raises(Rejected):
                Scu(here.ports["PACS"])
        here.endpoint("PACS")["status"] = "off"
        here.sandbox.reload()
        with pytest.raises(ConnectionError):
            Scu(here.ports["PACS"])
        here.endpoint("PACS")["status"] = "active"
        here.sandbox.reload()
        assert_works(here, called="ME")


def test_settings_that_make_no_sense_are_said_and_open_nothing(tmp_path):
    """Above all: an access list that cannot be read lets nobody in, instead of everybody."""
    complaints = {
        "calledAeTitle=SEVENTEEN-LETTERS": "no AE title",
        "callingAeTitles=GOOD,SEVENTEEN-LETTERS": "no AE title",
        "peers=10.0.0.0/40": "peers",
        "tls=true": "certFile",
        "tls=true&certFile=/nowhere/agent.pem": "TLS cannot be set up",
        "moveDestinations=PACS": "AETITLE@host:port",
        "moveDestinations=mllp://PACS@127.0.0.1:104": "AETITLE@host:port",
        "moveDestinations=dicoms%3A%2F%2FPACS@127.0.0.1:104%3Fcafile=x": "'cafile'",
    }
    channels = {f"BAD{number}": f"{LOCAL}{query}" for number, query in enumerate(complaints)}
    with imaging_site(tmp_path, channels | {"FEED": "?enhanced=true"}) as here:
        for name, complaint in zip(channels, complaints.values(), strict=True):
            lines = [line for line in here.agent.main_log().decode().splitlines() if f"'{name}'" in line]
            assert any(complaint in line for line in lines), (complaint, lines)
            if complaint not in ("AETITLE@host:port", "'cafile'"):
                with pytest.raises((Rejected, Aborted, OSError)):
                    Scu(here.ports[name])
        with here.device("FEED") as device:
            assert device.ask(message("BESIDE-1")) == ("CA", "BESIDE-1")


def test_a_stop_ends_associations_and_loses_nothing(tmp_path):
    with imaging_site(tmp_path, {"PACS": f"{LOCAL}{FAST}"}) as here:
        accepted: list[Instance] = []

        def send() -> None:
            with contextlib.suppress(OSError, Aborted), Scu(here.ports["PACS"], [(SECONDARY, (EXPLICIT,))]) as scu:
                while True:
                    instance = made(50_000)
                    if scu.store(instance) == SUCCESS:
                        accepted.append(instance)

        threads = [threading.Thread(target=send) for _ in range(3)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(accepted) > 10)
        code, seconds = here.agent.terminate(signal.SIGTERM)
        assert code == 0 and seconds < 10
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        start(here)
        for instance in accepted:
            here.sandbox.wait_for(functools.partial(transmits, here, instance.uid))
        assert_no_spool(here)


# --- beside HL7 ---


def test_hl7_goes_on_while_images_come(here):
    """No accept acknowledgment waits for an image."""
    stop = threading.Event()

    def send() -> None:
        instance = made(500_000)
        with Scu.for_instances(here.ports["PACS"], instance) as scu:
            while not stop.is_set():
                assert scu.store(instance) == SUCCESS

    here.sandbox.bot = lambda transmit: (
        silent_bot(transmit)
        if transmit.content_type != HL7_TYPE
        else (200, f"MSH|^~\\&|BOT|S|||20260101||ACK|B1|P|2.5.1\rMSA|AA|{control_id(transmit.body)}")
    )
    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    slowest, controls = 0.0, [f"BESIDE-{n}" for n in range(100)]
    with here.device("FEED") as device:
        for control in controls:
            begin = time.monotonic()
            device.send(message(control))
            while device.ack() != ("CA", control):
                pass
            slowest = max(slowest, time.monotonic() - begin)
    stop.set()
    for thread in threads:
        thread.join(20)
    print(f"\nslowest CA of {len(controls)} beside four senders of images: {slowest * 1000:.0f} ms")
    assert slowest < 1


@pytest.mark.parametrize("abstract", ["1.2.840.10008.1.3.10", "1.2.840.10008.1.20.2"], ids=["DICOMDIR", "pull model"])
def test_classes_that_sound_like_storage_get_no_context(here, abstract):
    """What an association would not be served for is not accepted (PS3.8 7.1.1.14)."""
    with Scu(here.ports["PACS"], [(abstract, (EXPLICIT,)), (SECONDARY, (EXPLICIT,))]) as scu:
        assert set(scu.accepted) == {(SECONDARY, EXPLICIT)}
