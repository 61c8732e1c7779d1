"""What imaging devices ask, and what the cloud asks of them: C-FIND, C-MOVE, C-GET, MPPS, commitment, push."""

import array
import contextlib
import copy
import io
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pydicom
import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.association import Association

from tests.dicom_peers import (
    BIG_ENDIAN,
    CANCEL,
    COMMITMENT,
    COMMITMENT_INSTANCE,
    CT,
    EXPLICIT,
    FAST,
    IMPLICIT,
    JPEGS,
    MPPS,
    PATIENT_FIND,
    PATIENT_GET,
    PATIENT_MOVE,
    QUIET,
    SECONDARY,
    STUDY_FIND,
    STUDY_GET,
    STUDY_MOVE,
    SUCCESS,
    VERIFICATION,
    WORKLIST,
    Bot,
    Destination,
    Instance,
    Orthanc,
    Receiving,
    Rejected,
    Reports,
    Scu,
    Storescp,
    Tls,
    announced,
    assert_arrived,
    assert_no_spool,
    assert_same_elements,
    assert_works,
    associated,
    cancel_of,
    commit,
    counts,
    data_set,
    dcmtk,
    encoded,
    forget_strays,
    imaging_site,
    keep,
    made,
    made_dataset,
    needs_dcmtk,
    needs_orthanc,
    new_uid,
    part10,
    pydicom_files,
    read_instance,
    split_part10,
    start,
    store,
    transmits,
    uids_of,
)
from tests.support import ROOT, Pushed, changed, eventually, free_ports, site

pytestmark = QUIET

UNABLE, UNKNOWN_DESTINATION, PROCESSING_FAILURE = 0xC001, 0xA801, 0x0110
PENDING = (0xFF00, 0xFF01)
OUTCOME = '{"resourceType":"OperationOutcome"}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("query")


@pytest.fixture(scope="module")
def dest():
    with Destination() as running:
        yield running


@pytest.fixture(scope="module")
def orthanc(folder, dest):
    with Orthanc(folder / "orthanc", {"dest": (dest.title, dest.port)}) as running:
        yield running


@pytest.fixture(scope="module")
def ports():
    """Of things that may not be running: Orthanc knows its own, so the agent cannot."""
    return free_ports(2)


@pytest.fixture(scope="module")
def storescp(folder):
    with Storescp(folder / "storescp") as running:
        yield running


def addresses(request: pytest.FixtureRequest) -> str:
    """moveDestinations: of what is installed, and some that do not work."""
    known = [request.getfixturevalue("dest").address, "NOWHERE@127.0.0.1:1"]
    known.append(f"NAMELESS@127.0.0.1:{request.getfixturevalue('dest').port}")
    known += [request.getfixturevalue(name).address for name in ("storescp", "orthanc") if installed(name)]
    return ",".join(known)


def installed(name: str) -> bool:
    mark = {"storescp": needs_dcmtk, "orthanc": needs_orthanc}[name]
    return not mark.args[0]


@pytest.fixture(scope="module")
def shared_site(request, folder):
    query = f"moveDestinations={addresses(request)}&responseTimeoutSecs=1.2&answerWaitSecs=0.5&{FAST}"
    with imaging_site(folder, {"PACS": f"dicom://127.0.0.1:{{port}}?{query}"}) as running:
        yield running


@pytest.fixture
def here(shared_site, dest):
    forget_strays(shared_site)
    yield shared_site
    faults, fresh = shared_site.sandbox.faults, type(shared_site.sandbox.faults)()
    for name in vars(fresh):
        setattr(faults, name, getattr(fresh, name))
    dest.gate.set()
    dest.statuses.clear()


@pytest.fixture
def bot(here):
    here.sandbox.bot = bot = Bot()
    return bot


def ui(*uids: str) -> dict[str, Any]:
    return {"vr": "UI", "Value": list(uids)}


def statuses(answers: Any) -> list[tuple[int, Any]]:
    return [(status.get("Status"), identifier) for status, identifier in answers]


# --- C-FIND ---

STUDIES = [
    {"0020000D": ui(f"1.2.3.{n}"), "00100010": {"vr": "PN", "Value": [{"Alphabetic": f"Müller^{n}"}]}} for n in range(3)
]
ITEM = {
    "00100010": {"vr": "PN", "Value": [{"Alphabetic": "Testperson^Paula"}]},
    "00100020": {"vr": "LO", "Value": ["PAT-1"]},
    "00400100": {"vr": "SQ", "Value": [{"00080060": {"vr": "CS", "Value": ["CT"]},
                                        "00400002": {"vr": "DA", "Value": ["20260102"]}}]},
}  # fmt: skip


def answered_files(folder: Path) -> list[Dataset]:
    return [pydicom.dcmread(path) for path in sorted(folder.glob("rsp*.dcm"))]


@needs_dcmtk
def test_findscu_study_root(here, bot, tmp_path):
    bot.replies["C-FIND"] = STUDIES
    keys = ["-k", "QueryRetrieveLevel=STUDY", "-k", "PatientName=M*", "-k", "StudyInstanceUID", "-k", "StudyDate"]
    address = "-aet", "FINDER", "-aec", "AGENT", "127.0.0.1", here.ports["PACS"]
    ran = dcmtk("findscu", "-v", "-S", "-X", "-od", tmp_path, *keys, *address)
    assert ran.code == 0 and "Received Final Find Response (Success)" in ran.output, ran.output
    assert bot.question() == {
        "association": {"callingAeTitle": "FINDER", "calledAeTitle": "AGENT"},
        "command": "C-FIND",
        "sopClassUid": STUDY_FIND,
        "level": "STUDY",
        "dataset": {
            "00080020": {"vr": "DA"},
            "00080052": {"vr": "CS", "Value": ["STUDY"]},
            "00100010": {"vr": "PN", "Value": [{"Alphabetic": "M*"}]},
            "0020000D": {"vr": "UI"},
        },
    }
    found = answered_files(tmp_path)
    assert [str(match.PatientName) for match in found] == [f"Müller^{n}" for n in range(3)]
    assert {match.QueryRetrieveLevel for match in found} == {"STUDY"}
    assert {match.SpecificCharacterSet for match in found} == {"ISO_IR 192"}


@needs_dcmtk
def test_findscu_worklist(here, bot, tmp_path):
    bot.replies["C-FIND"] = [ITEM]
    keys = ["-k", "PatientName", "-k", "ScheduledProcedureStepSequence[0].Modality=CT"]
    ran = dcmtk("findscu", "-v", "-W", "-X", "-od", tmp_path, *keys, "127.0.0.1", here.ports["PACS"])
    assert ran.code == 0, ran.output
    question = bot.question()
    assert (question["level"], question["sopClassUid"]) == ("WORKLIST", WORKLIST)
    assert question["dataset"]["00400100"]["Value"] == [{"00080060": {"vr": "CS", "Value": ["CT"]}}]
    (item,) = answered_files(tmp_path)
    assert item.ScheduledProcedureStepSequence[0].ScheduledProcedureStepStartDate == "20260102"
    assert "QueryRetrieveLevel" not in item


@needs_dcmtk
def test_findscu_cancels(here, bot, tmp_path):
    bot.replies["C-FIND"] = [ITEM] * 1500
    address = "127.0.0.1", here.ports["PACS"]
    ran = dcmtk("findscu", "-v", "-W", "--cancel", 3, "-k", "PatientName", *address)
    assert "Cancel" in ran.output and ran.output.count("(Pending)") < 1500, ran.output[-3000:]
    assert_works(here)


@pytest.mark.parametrize(
    ("model", "level"),
    [(PATIENT_FIND, "PATIENT"), (PATIENT_FIND, "IMAGE"), (STUDY_FIND, "SERIES"), (STUDY_FIND, "STUDY"), (WORKLIST, "")],
)
@pytest.mark.parametrize("matches", [[], [STUDIES[0], ITEM]], ids=["none", "two"])
@pytest.mark.parametrize("written", [lambda matches: matches, json.dumps], ids=["object", "string"])
def test_find(here, bot, model, level, matches, written):
    bot.replies["C-FIND"] = written(matches)
    with associated(here, model) as scu:
        key = data_set(PatientName="", **({"QueryRetrieveLevel": level} if level else {}))
        answers = statuses(scu.send_c_find(key, model))
    assert [status for status, _ in answers] == [0xFF00] * len(matches) + [SUCCESS]
    assert bot.question()["level"] == (level or "WORKLIST")
    for (_, found), match in zip(answers, matches, strict=False):
        expected = Dataset.from_json(match)
        assert found.PatientName == expected.PatientName
        assert found.get("QueryRetrieveLevel", "") == level


def test_find_several_times_on_one_association(here, bot):
    bot.replies["C-FIND"] = lambda question: [ITEM] * (50 * len(bot.asked))
    with associated(here, STUDY_FIND, WORKLIST) as scu:
        for count in range(1, 6):
            assert len(statuses(scu.send_c_find(data_set(PatientName=""), WORKLIST))) == 50 * count + 1
        answers = statuses(scu.send_c_find(data_set(QueryRetrieveLevel="STUDY"), STUDY_FIND))
        assert len(answers) == 301


def test_find_is_cancelled_between_matches(here, bot):
    bot.replies["C-FIND"] = [ITEM | {"00104000": {"vr": "LT", "Value": ["x" * 400]}}] * 1200
    with associated(here, WORKLIST) as scu:
        found = []
        for status, _ in scu.send_c_find(data_set(PatientName=""), WORKLIST, msg_id=7):
            found.append(status.Status)
            if len(found) == 3:
                scu.send_c_cancel(7, query_model=WORKLIST)
        assert found[-1] == CANCEL and len(found) < 1200
        bot.replies["C-FIND"] = [ITEM]
        assert statuses(scu.send_c_find(data_set(PatientName=""), WORKLIST))[-1][0] == SUCCESS


def test_find_is_cancelled_while_the_bot_thinks(here, bot):
    here.sandbox.faults.delay = lambda: 1.0
    bot.replies["C-FIND"] = [ITEM]
    with Scu(here.ports["PACS"], [(WORKLIST, (IMPLICIT,))]) as scu:
        before = len(transmits(here))
        scu.request(1, {2: WORKLIST, 0x0100: 0x0020}, b"\x10\x00\x10\x00\x00\x00\x00\x00")
        here.sandbox.wait_for(lambda: len(transmits(here)) > before, what="the question")
        begin = time.monotonic()
        scu.fragments(1, 1, cancel_of(1))
        assert scu.status() == CANCEL
        assert time.monotonic() - begin < 0.8
    here.sandbox.wait_for(lambda: bot.asked, what="the Bot's turn, which no other test shall see")


FAILURES = [
    ({"status": "0xA700", "comment": "too busy"}, 0xA700, "too busy"),
    ({"status": 49154}, 0xC002, ""),
    ({"status": "nonsense"}, UNABLE, ""),
    ((400, OUTCOME), UNABLE, "400"),
    ((500, OUTCOME), UNABLE, "500"),
    ("", UNABLE, "nothing"),
    ("no JSON", UNABLE, "JSON"),
    ({"some": "thing"}, UNABLE, ""),
    ([1], UNABLE, ""),
    ([{"0010": "x"}], UNABLE, ""),
]


@pytest.mark.parametrize(
    ("command", "reply", "status", "comment"),
    [("C-FIND", *failure) for failure in FAILURES]
    + [(command, *FAILURES[n]) for command in ("C-MOVE", "C-GET") for n in (0, 3, 5, 7)],
    ids=str,
)
def test_a_bot_that_does_not_answer_the_question(here, bot, command, reply, status, comment):
    bot.replies[command] = reply
    key = data_set(QueryRetrieveLevel="STUDY", PatientName="Xyzzyname^Plugh")
    with associated(here, STUDY_FIND, STUDY_MOVE, STUDY_GET, storage=[(CT, EXPLICIT)]) as scu:
        answers = ask(scu, command, key)
        ((found, _),) = statuses(answers)
        assert hex(found) == hex(status)
        if command == "C-FIND":
            assert comment in str(answers[-1][0].get("ErrorComment"))
        bot.replies["C-FIND"] = []
        assert statuses(scu.send_c_find(key, STUDY_FIND)) == [(SUCCESS, None)]
    assert b"Xyzzy" not in here.agent.main_log()


def ask(scu: Association, command: str, key: Dataset, destination: str = "DEST") -> list[Any]:
    if command == "C-FIND":
        return list(scu.send_c_find(key, STUDY_FIND))
    if command == "C-GET":
        return list(scu.send_c_get(key, STUDY_GET))
    return list(scu.send_c_move(key, destination, STUDY_MOVE))


@pytest.mark.parametrize("command", ["C-FIND", "C-MOVE"])
def test_no_answer_in_time(here, bot, command):
    here.sandbox.faults.silent = True
    begin = time.monotonic()
    with associated(here, STUDY_FIND, STUDY_MOVE, STUDY_GET, storage=[(CT, EXPLICIT)]) as scu:
        assert [status for status, _ in statuses(ask(scu, command, data_set(QueryRetrieveLevel="STUDY")))] == [UNABLE]
    assert 0.9 < time.monotonic() - begin < 4


def test_no_server(here, bot):
    """Failure at once, not after the time-out; and the next question is answered when the server is back."""
    bot.replies["C-FIND"] = [ITEM]
    here.sandbox.stop()
    with associated(here, WORKLIST) as scu:
        eventually(lambda: not here.sandbox.connected)
        begin = time.monotonic()
        ((status, _),) = statuses(scu.send_c_find(data_set(PatientName=""), WORKLIST))
        assert status == UNABLE and time.monotonic() - begin < 1
        here.sandbox.start()
        here.agent.wait_connected()
        assert [status for status, _ in statuses(scu.send_c_find(data_set(PatientName=""), WORKLIST))] == [0xFF00, 0]


# --- C-MOVE ---

STUDY = data_set(QueryRetrieveLevel="STUDY", StudyInstanceUID="1.2.3.4")


@needs_dcmtk
def test_movescu(here, bot, storescp):
    files = pydicom_files()
    instances = [read_instance(files[name]) for name in ("CT_small.dcm", "SC_rgb_jpeg_dcmtk.dcm", "MR_small_RLE.dcm")]
    bot.replies["C-MOVE"] = keep(here, *instances)
    keys = ["-k", "QueryRetrieveLevel=STUDY", "-k", "StudyInstanceUID=1.2.3.4"]
    address = "-aet", "MOVER", "-aem", "STORESCP", "127.0.0.1", here.ports["PACS"]
    ran = dcmtk("movescu", "-d", "-S", *keys, *address)
    assert ran.code == 0, ran.output
    assert re.search(r"Completed Suboperations *: 3", ran.output), ran.output
    assert bot.question() == {
        "association": {"callingAeTitle": "MOVER", "calledAeTitle": "ANY-SCP"},
        "command": "C-MOVE",
        "sopClassUid": STUDY_MOVE,
        "level": "STUDY",
        "destination": "STORESCP",
        "dataset": {"00080052": {"vr": "CS", "Value": ["STUDY"]}, "0020000D": ui("1.2.3.4")},
    }
    got = storescp.instances()
    assert [got[instance.uid] == instance.content for instance in instances] == [True] * 3
    assert_no_spool(here)


@pytest.mark.parametrize("form", [str, lambda name: {"reference": name}])
@pytest.mark.parametrize("model", [STUDY_MOVE, PATIENT_MOVE])
def test_move_counts(here, bot, dest, form, model):
    instances = [made(1000 * n, syntax) for n, syntax in enumerate((IMPLICIT, EXPLICIT, EXPLICIT))]
    bot.replies["C-MOVE"] = [form(name) for name in keep(here, *instances)]
    before = len(dest.arrivals)
    with associated(here, model) as scu:
        answers = list(scu.send_c_move(STUDY, "DEST", model))
    *pending, (last, _) = answers
    assert {status.Status for status, _ in pending} <= {0xFF00}
    assert [counts(status)[:2] for status, _ in pending][-2:] == [(1, 2), (0, 3)]
    assert (last.Status, counts(last)[1:]) == (SUCCESS, (3, 0, 0))
    got = dest.arrivals[before:]
    assert [(g.uid, g.syntax, g.content) for g in got] == [(i.uid, i.syntax, i.content) for i in instances]
    assert_no_spool(here)


def test_move_of_nothing(here, bot):
    bot.replies["C-MOVE"] = []
    with associated(here, STUDY_MOVE) as scu:
        (last, _) = list(scu.send_c_move(STUDY, "DEST", STUDY_MOVE))[-1]
    assert (last.Status, counts(last)[1:]) == (SUCCESS, (0, 0, 0))


@pytest.mark.parametrize(
    ("answered", "lost", "expected"),
    [
        ([0, 0xA700, 0], (), (0xB000, 2, 1, 0)),
        ([0, 0xB000, 0], (), (0xB000, 2, 0, 1)),
        ([0xA700, 0xC000, 0x0110], (), (0xA702, 0, 3, 0)),
        ([], (1,), (0xB000, 2, 1, 0)),
        ([], (0, 1, 2), (0xA702, 0, 3, 0)),
    ],
    ids=["one refused", "one warned", "all refused", "one not found", "none found"],
)
def test_move_with_trouble(here, bot, dest, answered, lost, expected):
    """PS3.4 C.4.2.1.5: 0xB000 when some failed, 0xA702 when all did; those that failed are named."""
    references = keep(here, *(made(500) for _ in range(3)))
    bot.replies["C-MOVE"] = [f"{name}-lost" if n in lost else name for n, name in enumerate(references)]
    dest.statuses[:] = answered
    with associated(here, STUDY_MOVE) as scu:
        (last, _) = list(scu.send_c_move(STUDY, "DEST", STUDY_MOVE))[-1]
    assert (hex(last.Status), *counts(last)[1:]) == (hex(expected[0]), *expected[1:])
    assert_no_spool(here)


@pytest.mark.parametrize("title", ["ELSEWHERE ", "dest"])
def test_move_to_an_unknown_destination(here, bot, title):
    """0xA801, and nobody is asked."""
    with Scu(here.ports["PACS"], [(STUDY_MOVE, (IMPLICIT,))]) as scu:
        scu.request(1, {2: STUDY_MOVE, 0x0100: 0x0021, 0x0600: title}, b"\x08\x00R\x00\x06\x00\x00\x00STUDY ")
        assert hex(scu.status()) == hex(UNKNOWN_DESTINATION)
    assert not bot.asked


@pytest.mark.parametrize("title", ["NOWHERE", "NAMELESS"])
def test_move_to_a_destination_that_is_not_there_or_knows_no_such_title(here, bot, title):
    bot.replies["C-MOVE"] = keep(here, made(100), made(100))
    with associated(here, STUDY_MOVE) as scu:
        (last, _) = list(scu.send_c_move(STUDY, title, STUDY_MOVE))[-1]
    assert last.Status >> 12 in (0xA, 0xC), hex(last.Status)
    assert_no_spool(here)


def test_move_of_what_the_destination_has_no_context_for(here, bot, dest):
    """A private transfer syntax fails; the others arrive."""
    strange, plain = made(100)._replace(syntax="1.2.3.4.5.6"), made(100)
    bot.replies["C-MOVE"] = keep(here, strange, plain)
    with associated(here, STUDY_MOVE) as scu:
        (last, _) = list(scu.send_c_move(STUDY, "DEST", STUDY_MOVE))[-1]
    assert (last.Status, *counts(last)[1:]) == (0xB000, 1, 1, 0)
    assert dest.arrivals[-1].content == plain.content


def test_move_is_cancelled(here, bot, dest):
    bot.replies["C-MOVE"] = keep(here, *(made(100) for _ in range(20)))
    dest.gate.clear()
    with associated(here, STUDY_MOVE) as scu:
        answers: list[Dataset] = []
        opening = threading.Timer(0.3, dest.gate.set)
        opening.start()
        before = len(dest.arrivals)
        for status, _ in scu.send_c_move(STUDY, "DEST", STUDY_MOVE, msg_id=9):
            if not answers:
                dest.gate.clear()
                scu.send_c_cancel(9, query_model=STUDY_MOVE)
                opening = threading.Timer(0.3, dest.gate.set)
                opening.start()
            answers.append(status)
        opening.join()
    assert answers[-1].Status == CANCEL
    remaining, completed, failed, warning = counts(answers[-1])
    assert remaining and completed and (failed or 0, warning or 0) == (0, 0)
    assert remaining + completed == 20 and len(dest.arrivals) - before == completed
    assert_no_spool(here)


def test_the_one_who_moves_goes_away(here, bot, dest):
    """The rest is not fetched, and nothing stays behind."""
    bot.replies["C-MOVE"] = keep(here, *(made(100) for _ in range(20)))
    dest.gate.clear()
    before = len(dest.arrivals)
    scu = Scu(here.ports["PACS"], [(STUDY_MOVE, (IMPLICIT,))])
    scu.request(1, {2: STUDY_MOVE, 0x0100: 0x0021, 0x0600: "DEST"}, b"\x08\x00R\x00\x06\x00\x00\x00STUDY ")
    eventually(lambda: bot.asked)
    scu.pdu(7)
    scu.socket.close()
    dest.gate.set()
    assert_no_spool(here)
    assert_works(here)
    assert len(dest.arrivals) - before <= 20


# --- C-GET ---


@needs_dcmtk
def test_getscu(here, bot, tmp_path):
    instances = [made(1000), made(50_000)]
    bot.replies["C-GET"] = keep(here, *instances)
    keys = ["-k", "QueryRetrieveLevel=STUDY", "-k", "StudyInstanceUID=1.2.3.4"]
    ran = dcmtk("getscu", "-v", "-S", "+B", *keys, "-od", tmp_path, "127.0.0.1", here.ports["PACS"])
    assert ran.code == 0, ran.output
    got = {content for _, content in (split_part10(path.read_bytes()) for path in tmp_path.iterdir())}
    assert got == {instance.content for instance in instances}
    assert "destination" not in bot.question()


@pytest.mark.parametrize("model", [STUDY_GET, PATIENT_GET])
def test_get_counts(here, bot, model):
    instances = [made(1000 * n) for n in range(4)]
    bot.replies["C-GET"] = keep(here, *instances)
    receiving = Receiving()
    with associated(here, model, storage=[(SECONDARY, EXPLICIT)], handlers=receiving.handlers) as scu:
        *pending, (last, _) = list(scu.send_c_get(STUDY, model))
    assert (last.Status, counts(last)[1:]) == (SUCCESS, (4, 0, 0))
    assert [counts(status)[:2] for status, _ in pending] == [(3, 1), (2, 2), (1, 3), (0, 4)]
    assert receiving.got == [(instance.uid, instance.content) for instance in instances]
    assert_no_spool(here)


@pytest.mark.parametrize(
    ("answers", "lost", "expected"),
    [((0, 0xA700), (), (0xB000, 2, 1, 0)), ((), (0,), (0xB000, 2, 1, 0)), ((), (0, 1, 2), (0xA702, 0, 3, 0))],
)
def test_get_with_trouble(here, bot, answers, lost, expected):
    references = keep(here, *(made(100) for _ in range(3)))
    bot.replies["C-GET"] = [f"{name}-lost" if n in lost else name for n, name in enumerate(references)]
    receiving = Receiving(*answers)
    with associated(here, STUDY_GET, storage=[(SECONDARY, EXPLICIT)], handlers=receiving.handlers) as scu:
        (last, _) = list(scu.send_c_get(STUDY, STUDY_GET))[-1]
    assert (hex(last.Status), *counts(last)[1:]) == (hex(expected[0]), *expected[1:])
    assert_no_spool(here)


def test_get_without_a_context_for_it(here, bot):
    bot.replies["C-GET"] = keep(here, made(100))
    with associated(here, STUDY_GET, storage=[(CT, EXPLICIT)], handlers=Receiving().handlers) as scu:
        (last, _) = list(scu.send_c_get(STUDY, STUDY_GET))[-1]
    assert (hex(last.Status), *counts(last)[1:]) == ("0xa702", 0, 1, 0)


def test_get_is_cancelled(here, bot):
    bot.replies["C-GET"] = keep(here, *(made(200_000) for _ in range(30)))
    receiving = Receiving()
    with associated(here, STUDY_GET, storage=[(SECONDARY, EXPLICIT)], handlers=receiving.handlers) as scu:
        answers: list[Dataset] = []
        for status, _ in scu.send_c_get(STUDY, STUDY_GET, msg_id=5):
            if not answers:
                scu.send_c_cancel(5, query_model=STUDY_GET)
            answers.append(status)
    assert answers[-1].Status == CANCEL and len(receiving.got) < 30
    remaining, completed, *_ = counts(answers[-1])
    assert (remaining or 0) + (completed or 0) == 30 and completed == len(receiving.got)
    assert_no_spool(here)


@pytest.mark.parametrize("wanted", [IMPLICIT, EXPLICIT, BIG_ENDIAN])
def test_get_in_the_other_byte_order(here, bot, wanted):
    """Words of binary values are turned, in sequences too (PS3.5 7.3): an image must not come out garbled."""
    binary = {0x7FE00010: ("OW", 2), 0x00660023: ("OL", 4), 0x00720083: ("OW", 2), 0x00420011: ("OB", 1)}

    plain = made_dataset()

    def filled(order: str) -> Dataset:
        dataset, item = copy.deepcopy(plain), Dataset()
        for tag, (vr, size) in binary.items():
            for place in (dataset, item):
                place.add_new(tag, vr, b"".join(n.to_bytes(size, order) for n in (1, 2, 3, 4)))  # type: ignore[arg-type]
        dataset.Rows, dataset.SimpleFrameList, dataset.SharedFunctionalGroupsSequence = 513, [1, 2], [item]
        return dataset

    own = EXPLICIT if wanted == BIG_ENDIAN else BIG_ENDIAN
    sent = filled("big" if own == BIG_ENDIAN else "little")
    instance = Instance(SECONDARY, str(sent.SOPInstanceUID), own, encoded(sent, own))
    bot.replies["C-GET"] = keep(here, instance)
    receiving = Receiving()
    with associated(here, STUDY_GET, storage=[(SECONDARY, wanted)], handlers=receiving.handlers) as scu:
        (last, _) = list(scu.send_c_get(STUDY, STUDY_GET))[-1]
    ((_, content),) = receiving.got
    expected = filled("big" if wanted == BIG_ENDIAN else "little")
    assert last.Status == SUCCESS and content == encoded(expected, wanted)


def test_a_destination_that_is_switched_off_is_given_up(tmp_path):
    """A listener whose backlog is full answers no SYN."""
    with contextlib.ExitStack() as stack:
        hole = stack.enter_context(socket.socket())
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for _ in range(4):
            filling = stack.enter_context(socket.socket())
            filling.setblocking(False)
            filling.connect_ex(hole.getsockname())
        query = f"moveDestinations=HOLE@127.0.0.1:{hole.getsockname()[1]}&associationTimeoutSecs=1"
        here = stack.enter_context(imaging_site(tmp_path, {"PACS": f"dicom://127.0.0.1:{{port}}?{query}"}))
        here.sandbox.bot = bot = Bot()
        bot.replies["C-MOVE"] = keep(here, made(100))
        begin = time.monotonic()
        with associated(here, STUDY_MOVE) as scu:
            (last, _) = list(scu.send_c_move(STUDY, "HOLE", STUDY_MOVE))[-1]
        assert last.Status == 0xA702 and time.monotonic() - begin < 20


def test_a_device_that_stops_reading_gives_its_association_back(tmp_path):
    with site(tmp_path, {"PACS": f"dicom://127.0.0.1:{{port}}?maxConnections=1&{FAST}"}, start=False) as here:
        changed(here.agent, "m.DIMSE_SECS = 1")
        here.agent.start()
        here.sandbox.bot = bot = Bot()
        bot.replies["C-GET"] = keep(here, made(16_000_000))
        contexts = [(STUDY_GET, (IMPLICIT,)), (SECONDARY, (EXPLICIT,))]
        stuck = Scu(here.ports["PACS"], contexts)
        with contextlib.closing(stuck.socket):
            key = encoded(data_set(QueryRetrieveLevel="STUDY", StudyInstanceUID="1.2.3.4"), IMPLICIT)
            stuck.request(stuck.accepted[STUDY_GET, IMPLICIT], {2: STUDY_GET, 0x0100: 0x0010}, key)
            here.sandbox.wait_for(lambda: bot.asked)

            def served() -> bool:
                with contextlib.suppress(Rejected), Scu(here.ports["PACS"]) as other:
                    return other.echo() == SUCCESS
                return False

            assert not served()
            eventually(served, 15)


# --- procedure steps ---


def step(status: str, **more: Any) -> Dataset:
    return data_set(PerformedProcedureStepStatus=status, **more)


def create(scu: Association, uid: str, **more: Any) -> int:
    status, _ = scu.send_n_create(step("IN PROGRESS", PatientName="Testperson^Paula", **more), MPPS, uid)
    return int(status.Status)


def complete(scu: Association, uid: str) -> int:
    status, _ = scu.send_n_set(step("COMPLETED"), MPPS, uid)
    return int(status.Status)


def test_procedure_step(here, bot):
    uid = new_uid()
    with associated(here, MPPS, calling="CT1") as scu:
        assert (create(scu, uid), complete(scu, uid)) == (SUCCESS, SUCCESS)
    here.sandbox.wait_for(lambda: len(bot.asked) == 2)
    created, finished = bot.asked
    common = {"association": {"callingAeTitle": "CT1", "calledAeTitle": "AGENT"}, "sopClassUid": MPPS}
    assert created == common | {
        "command": "N-CREATE",
        "sopInstanceUid": uid,
        "dataset": {
            "00100010": {"vr": "PN", "Value": [{"Alphabetic": "Testperson^Paula"}]},
            "00400252": {"vr": "CS", "Value": ["IN PROGRESS"]},
        },
    }
    assert finished == common | {
        "command": "N-SET",
        "sopInstanceUid": uid,
        "dataset": {"00400252": {"vr": "CS", "Value": ["COMPLETED"]}},
    }
    assert [row["type"] for row in here.agent.rows(uid)] == ["N-CREATE", "N-SET"]


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        ("", SUCCESS),
        ({}, SUCCESS),
        ({"status": 0}, SUCCESS),
        ({"status": "0x0110", "comment": "no"}, PROCESSING_FAILURE),
        ({"status": 0x0111}, 0x0111),
    ],
)
def test_the_bots_word_on_a_procedure_step(here, bot, reply, status):
    bot.replies["N-CREATE"] = bot.replies["N-SET"] = reply
    uid = new_uid()
    with associated(here, MPPS) as scu:
        assert [hex(create(scu, uid)), hex(complete(scu, uid))] == [hex(status)] * 2


def test_a_procedure_step_with_a_data_set_in_the_answer(here, bot):
    bot.replies["N-CREATE"] = {"dataset": {"00400253": {"vr": "SH", "Value": ["STEP-7"]}}}
    with associated(here, MPPS) as scu:
        status, answer = scu.send_n_create(step("IN PROGRESS"), MPPS, new_uid())
    assert status.Status == SUCCESS and answer is not None and answer.PerformedProcedureStepID == "STEP-7"


def test_a_procedure_step_gets_its_uid_from_us(here, bot):
    """PS3.7 10.1.5.1.4: the SCP makes the SOP Instance UID if the SCU names none."""
    with Scu(here.ports["PACS"], [(MPPS, (IMPLICIT,))]) as scu:
        content = b"\x40\x00\x52\x02\x0c\x00\x00\x00IN PROGRESS "
        scu.request(1, {2: MPPS, 0x0100: 0x0140}, content)
        answer = scu.response()
    uid = answer[0x1000].rstrip(b"\0").decode()
    assert answer[0x0900] == b"\0\0" and uid.count(".") > 2
    assert bot.question()["sopInstanceUid"] == uid


def test_a_procedure_step_that_is_not_named_is_not_changed(here, bot):
    with Scu(here.ports["PACS"], [(MPPS, (IMPLICIT,))]) as scu:
        scu.request(1, {3: MPPS, 0x0100: 0x0120}, b"\x40\x00\x52\x02\x0a\x00\x00\x00COMPLETED ")
        assert scu.response()[0x0900] == (0x0110).to_bytes(2, "little")
    assert not bot.asked


@pytest.mark.parametrize("context", [VERIFICATION, STUDY_FIND, WORKLIST, SECONDARY])
def test_procedure_steps_on_another_context_are_refused(here, bot, context):
    """PS3.7 annex C: the operation is none of that SOP class."""
    with Scu(here.ports["PACS"], [(context, (IMPLICIT,))]) as scu:
        scu.request(1, {2: MPPS, 0x0100: 0x0140}, b"\x40\x00\x52\x02\x0c\x00\x00\x00IN PROGRESS ")
        assert scu.response()[0x0900] == (0x0211).to_bytes(2, "little")
    assert not bot.asked


@pytest.mark.parametrize("command", ["C-FIND", "N-CREATE"])
def test_what_a_bot_says_ends_the_request_in_words_that_dicom_can_hold(here, bot, command):
    bot.replies[command] = {"status": "0xFF00", "comment": "no\nsuch\\study"}
    with associated(here, STUDY_FIND, MPPS) as scu:
        if command == "C-FIND":
            ((status, _),) = list(scu.send_c_find(STUDY, STUDY_FIND))
        else:
            status, _ = scu.send_n_create(step("IN PROGRESS"), MPPS, new_uid())
    assert (hex(status.Status), status.ErrorComment) == ("0xc001", "no such study")


def test_procedure_steps_stay_in_order(here, bot):
    here.sandbox.faults.delay = lambda: 0.05
    uids = [new_uid() for _ in range(5)]
    with associated(here, MPPS) as scu:
        for uid in uids:
            assert (create(scu, uid), complete(scu, uid)) == (SUCCESS, SUCCESS)
    here.sandbox.wait_for(lambda: len(bot.asked) == 10)
    for uid in uids:
        assert [q["command"] for q in bot.asked if q["sopInstanceUid"] == uid] == ["N-CREATE", "N-SET"]


def test_a_bot_that_takes_its_time_over_a_procedure_step(here, bot):
    """Success is answered after answerWaitSecs, for the request is on disk."""
    here.sandbox.faults.silent = True  # until the answer is there
    begin = time.monotonic()
    with associated(here, MPPS) as scu:
        assert create(scu, new_uid()) == SUCCESS
        assert time.monotonic() - begin > 0.4
    assert not bot.asked
    here.sandbox.faults.silent = False
    here.sandbox.wait_for(lambda: bot.asked)


def test_procedure_steps_while_the_server_is_away(tmp_path):
    address = f"dicom://127.0.0.1:{{port}}?{FAST}"
    with imaging_site(tmp_path, {"PACS": address}) as here:
        here.sandbox.bot = bot = Bot()
        uid = new_uid()
        here.sandbox.stop()
        eventually(lambda: not here.sandbox.connected)
        begin = time.monotonic()
        with associated(here, MPPS) as scu:
            assert (create(scu, uid), complete(scu, uid)) == (SUCCESS, SUCCESS)
        assert time.monotonic() - begin < 3, "nobody waits for a server that is not there"
        here.agent.kill()
        start(here)
        here.sandbox.start()
        here.sandbox.wait_for(lambda: len(bot.asked) == 2, 15)
        assert [question["command"] for question in bot.asked] == ["N-CREATE", "N-SET"]


# --- storage commitment ---


@pytest.mark.parametrize("safe", [3, 1, 0])
def test_commitment_reported_on_the_same_association(here, bot, safe):
    instances = [made(100) for _ in range(3)]
    assert store(here.ports["PACS"], *instances) == [SUCCESS] * 3
    bot.replies["N-ACTION"] = {"committed": [instance.uid for instance in instances[:safe]]}
    reports, transaction = Reports(), new_uid()
    with associated(here, COMMITMENT, handlers=reports.handlers, calling="MODALITY") as scu:
        assert commit(scu, transaction, *instances) == SUCCESS
        eventually(lambda: reports.answered, what="the report")
    ((kind, report),) = reports.got
    assert kind == (1 if safe == 3 else 2) and report.TransactionUID == transaction
    assert uids_of(report.get("ReferencedSOPSequence")) == [instance.uid for instance in instances[:safe]]
    assert uids_of(report.get("FailedSOPSequence")) == [instance.uid for instance in instances[safe:]]
    assert {item.FailureReason for item in report.get("FailedSOPSequence", ())} <= {0x0112}
    question = bot.question()
    assert (question["command"], question["actionTypeId"]) == ("N-ACTION", 1)
    assert (question["sopClassUid"], question["sopInstanceUid"]) == (COMMITMENT, COMMITMENT_INSTANCE)
    assert question["dataset"]["00081195"] == ui(transaction)
    asked = [item["00081155"]["Value"][0] for item in question["dataset"]["00081199"]["Value"]]
    assert asked == [instance.uid for instance in instances]


@pytest.mark.parametrize("reply", ["", "no JSON", {"status": "0x0110"}, {"committed": 7}])
def test_commitment_that_the_bot_does_not_give(here, bot, reply):
    """Everything has failed: what is not known to be safe is not deleted."""
    bot.replies["N-ACTION"] = reply
    instances, reports = [made(100), made(100)], Reports()
    with associated(here, COMMITMENT, handlers=reports.handlers, calling="MODALITY") as scu:
        assert commit(scu, new_uid(), *instances) == SUCCESS
        eventually(lambda: reports.answered, what="the report")
    ((kind, report),) = reports.got
    assert kind == 2 and uids_of(report.FailedSOPSequence) == [instance.uid for instance in instances]
    assert "ReferencedSOPSequence" not in report


def test_commitment_refused(tmp_path):
    address = "dicom://127.0.0.1:{port}?retryMode=normal"
    with imaging_site(tmp_path, {"PACS": address}) as here:
        here.sandbox.bot = bot = Bot()
        reports = Reports()
        bot.replies["N-ACTION"] = 400, OUTCOME
        with associated(here, COMMITMENT, handlers=reports.handlers) as scu:
            assert commit(scu, new_uid(), made(100)) == SUCCESS
            eventually(lambda: reports.answered, what="the report")
        assert reports.got[0][0] == 2


def test_commitment_reported_on_a_new_association(here, bot, dest):
    """To the address of moveDestinations, when the device has gone."""
    instances = [made(100), made(100)]
    bot.replies["N-ACTION"] = {"committed": [instances[0].uid]}
    here.sandbox.faults.delay = lambda: 0.3
    dest.reports.clear()
    with associated(here, COMMITMENT, calling=dest.title) as scu:
        assert commit(scu, transaction := new_uid(), *instances) == SUCCESS
    eventually(lambda: dest.reports, what="the report")
    ((kind, report),) = dest.reports
    assert (kind, report.TransactionUID) == (2, transaction)
    assert uids_of(report.ReferencedSOPSequence) == [instances[0].uid]
    assert uids_of(report.FailedSOPSequence) == [instances[1].uid]


def test_commitment_waits_for_the_objects(tmp_path, dest):
    """The Bot is asked when none of them waits in the queue any more, also after a restart."""
    address = f"dicom://127.0.0.1:{{port}}?moveDestinations={dest.address}&{FAST}"
    with imaging_site(tmp_path, {"PACS": address}) as here:
        here.sandbox.bot = bot = Bot()
        instance = made(1000)
        bot.replies["N-ACTION"] = {"committed": [instance.uid]}
        here.sandbox.faults.read_failures["Binary"] = 500
        assert store(here.ports["PACS"], instance) == [SUCCESS]
        with associated(here, COMMITMENT, calling=dest.title) as scu:
            assert commit(scu, new_uid(), instance) == SUCCESS
        dest.reports.clear()
        here.agent.kill()
        start(here)
        here.agent.wait_connected()
        assert_after = made(100)
        here.sandbox.wait_for(lambda: sum("Binary" in r for r in here.sandbox.sandbox.requests) > 3)
        assert not bot.asked and not dest.reports
        here.sandbox.faults.read_failures.clear()
        assert_arrived(here, instance)
        eventually(lambda: dest.reports, what="the report")
        assert dest.reports[0][0] == 1
        assert store(here.ports["PACS"], assert_after) == [SUCCESS]


def test_commitment_report_is_tried_again(here, bot):
    """The device's address refuses at first."""
    (port,) = free_ports(1)
    endpoint = here.endpoint("PACS")
    address = endpoint["address"]
    endpoint["address"] = f"{address}&moveDestinations=LATE@127.0.0.1:{port}"
    here.sandbox.reload()
    instance = made(100)
    bot.replies["N-ACTION"] = {"committed": [instance.uid]}
    try:
        with associated(here, COMMITMENT, calling="LATE") as scu:
            assert commit(scu, new_uid(), instance) == SUCCESS
        here.agent.logged("report was not taken")
        with Destination("LATE", port=port) as late:
            eventually(lambda: late.reports, 15, "the report at a later try")
    finally:
        endpoint["address"] = address
        here.sandbox.reload()


def test_another_action_is_refused(here, bot):
    with associated(here, COMMITMENT) as scu:
        status, _ = scu.send_n_action(data_set(TransactionUID=new_uid()), 2, COMMITMENT, COMMITMENT_INSTANCE)
        assert status.Status == 0x0123
    assert not bot.asked


# --- Orthanc ---


@pytest.fixture
def modality(here, orthanc):
    """Orthanc, which knows the agent as `agent`."""
    settings = {"AET": "AGENT", "Host": "127.0.0.1", "Port": here.ports["PACS"]}
    status, answer = orthanc.call("PUT", "/modalities/agent", settings)
    assert status == 200, answer
    return orthanc


@needs_orthanc
def test_orthanc_echoes_and_stores(here, bot, modality):
    modality.post("/modalities/agent/echo")
    files = pydicom_files()
    for instance in (made(100_000), read_instance(files["MR_small_RLE.dcm"]), read_instance(files["rtplan.dcm"])):
        answer = modality.post("/modalities/agent/store", {"Resources": [modality.keep(instance)], "Synchronous": True})
        assert answer["FailedInstancesCount"] == 0, answer
        body = announced(here, instance.uid)
        assert body["association"] == {"callingAeTitle": "ORTHANC", "calledAeTitle": "AGENT"}
        raw = here.sandbox.sandbox.binaries[body["binary"]["reference"]]
        assert_same_elements(instance, split_part10(raw)[1])


@needs_orthanc
def test_orthanc_queries_us_and_has_us_move_to_it(here, bot, modality):
    instance = made(20_000)
    match = {"0020000D": ui("1.2.3.4"), "00100020": {"vr": "LO", "Value": ["PAT-1"]}}
    bot.replies |= {"C-FIND": [match], "C-MOVE": keep(here, instance)}
    query = modality.post("/modalities/agent/query", {"Level": "Study", "Query": {"PatientID": "PAT*"}})["ID"]
    found = modality.get(f"/queries/{query}/answers/0/content?simplify")
    assert (found["StudyInstanceUID"], found["PatientID"]) == ("1.2.3.4", "PAT-1")
    modality.post(f"/queries/{query}/retrieve", {"TargetAet": "ORTHANC", "Synchronous": True})
    assert modality.instances()[instance.uid] == instance.content
    asked, moved = bot.asked
    assert asked["dataset"]["00100020"]["Value"] == ["PAT*"]
    assert (moved["destination"], moved["dataset"]["0020000D"]) == ("ORTHANC", ui("1.2.3.4"))


@needs_orthanc
def test_orthanc_asks_for_the_worklist(here, bot, modality):
    bot.replies["C-FIND"] = [ITEM]
    (found,) = modality.post("/modalities/agent/find-worklist", {"PatientName": "", "PatientID": ""})
    assert found["PatientID"] == "PAT-1"
    assert bot.question()["level"] == "WORKLIST"


@needs_orthanc
@pytest.mark.parametrize("safe", [True, False])
def test_orthanc_wants_commitment(here, bot, modality, safe):
    instance = made(1000)
    bot.replies["N-ACTION"] = {"committed": [instance.uid] if safe else []}
    order = {"Resources": [modality.keep(instance)], "Synchronous": True, "StorageCommitment": True}
    transaction = modality.post("/modalities/agent/store", order)["StorageCommitmentTransactionUID"]
    assert_arrived(here, instance)

    def report() -> Any:
        answer = modality.get(f"/storage-commitment/{transaction}")
        return answer if answer["Status"] != "Pending" else None

    assert eventually(report, 15, "Orthanc has its report")["Status"] == ("Success" if safe else "Failure")


# --- pushed by the cloud ---


@pytest.fixture
def push(here):
    with here.caller() as caller:

        def pushing(url: str, body: Any, **members: Any) -> Pushed:
            text = body if isinstance(body, str) else json.dumps(body)
            kind = members.pop("contentType", "application/json")
            return caller.push(url, text, contentType=kind, **members)

        pushing.caller = caller  # type: ignore[attr-defined]
        yield pushing


def answer_of(pushed: Pushed) -> Any:
    assert pushed.status == 200, pushed
    assert pushed.content_type.startswith("application/json")
    return json.loads(pushed.text)


def test_push_echo(push, dest):
    assert answer_of(push(f"dicom://{dest.address}", {"command": "C-ECHO"})) == {"command": "C-ECHO", "status": 0}


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "JPEG-lossy.dcm"])
def test_push_store(here, push, dest, name):
    """Byte for byte in its own transfer syntax, or (no such context) refused."""
    instance = read_instance(pydicom_files()[name])
    (reference,) = keep(here, instance)
    answer = push(
        f"dicom://{dest.address}?callingAeTitle=CLOUD", {"command": "C-STORE", "binary": {"reference": reference}}
    )
    if instance.syntax in (EXPLICIT, IMPLICIT, BIG_ENDIAN, *JPEGS):
        assert answer_of(answer) == {"command": "C-STORE", "status": 0}
        got = dest.arrivals[-1]
        assert (got.calling, got.uid, got.syntax) == ("CLOUD", instance.uid, instance.syntax)
        assert got.content == instance.content
    else:
        assert answer.status == 400, answer
    assert_no_spool(here)


def test_push_store_to_a_device_without_big_endian(here, push):
    """Its words are turned into the only syntax that every device has (PS3.5 10.1)."""
    instance = read_instance(pydicom_files()["MR_small_bigendian.dcm"])
    (reference,) = keep(here, instance)
    with Destination(syntaxes=[IMPLICIT]) as device:
        pushed = push(f"dicom://{device.address}", reference, contentType="application/dicom")
        assert answer_of(pushed) == {"command": "C-STORE", "status": 0}
        (got,) = device.arrivals
    turned = pydicom.dcmread(io.BytesIO(got.content), force=True)
    wanted = pydicom.dcmread(pydicom_files()["MR_small_bigendian.dcm"])
    words = array.array("H", wanted.PixelData)
    words.byteswap()
    assert got.syntax == IMPLICIT and turned.PixelData == words.tobytes()
    assert (turned.PatientName, turned.Rows) == (wanted.PatientName, wanted.Rows)


def test_push_store_by_its_reference_only(here, push, dest):
    instance = made(100_000)
    (reference,) = keep(here, instance)
    answer = push(f"dicom://{dest.address}", reference, contentType="application/dicom")
    assert answer_of(answer) == {"command": "C-STORE", "status": 0}
    assert dest.arrivals[-1].content == instance.content
    assert dest.arrivals[-1].calling == "MEDPLUM"


@needs_dcmtk
def test_push_to_storescp(here, push, storescp):
    instance = made(3_000_000)
    assert answer_of(push(f"dicom://{storescp.address}", {"command": "C-ECHO"}))["status"] == 0
    (reference,) = keep(here, instance)
    assert answer_of(push(f"dicom://{storescp.address}", reference, contentType="application/dicom"))["status"] == 0
    assert storescp.instances()[instance.uid] == instance.content


@needs_orthanc
def test_push_to_orthanc(here, push, orthanc, dest):
    url, instance = f"dicom://{orthanc.address}", made(5000, PatientID="PUSH-1", PatientName="Jörg^Müller",
                                                       SpecificCharacterSet="ISO_IR 100")  # fmt: skip
    assert answer_of(push(url, {"command": "C-ECHO"})) == {"command": "C-ECHO", "status": 0}
    (reference,) = keep(here, instance)
    answer_of(push(url, {"command": "C-STORE", "binary": {"reference": reference}}))
    assert orthanc.instances()[instance.uid] == instance.content
    key = {"00100020": {"vr": "LO", "Value": ["PUSH-1"]}, "00100010": {"vr": "PN"}, "0020000D": {"vr": "UI"}}
    for model, level in (("STUDY", "STUDY"), ("PATIENT", "PATIENT"), (None, "STUDY"), ("STUDY", "SERIES")):
        request = {"command": "C-FIND", "level": level, "dataset": key} | ({"model": model} if model else {})
        found = answer_of(push(url, request))
        assert (found["command"], found["status"], len(found["datasets"])) == ("C-FIND", 0, 1), found
        if level != "SERIES":
            assert found["datasets"][0]["00100010"]["Value"] == [{"Alphabetic": "Jörg^Müller"}]
    nothing = {"command": "C-FIND", "level": "STUDY", "dataset": {"00100020": {"vr": "LO", "Value": ["NOBODY"]}}}
    assert answer_of(push(url, nothing)) == {"command": "C-FIND", "status": 0, "datasets": []}
    move = {"command": "C-MOVE", "level": "STUDY", "dataset": {"0020000D": key_uid(instance)}, "destination": "DEST"}
    assert answer_of(push(url, move)) == {"command": "C-MOVE", "status": 0, "completed": 1, "failed": 0, "warning": 0}
    assert dest.arrivals[-1].uid == instance.uid
    elsewhere = push(url, move | {"destination": "ELSEWHERE"})
    assert elsewhere.status == 400 and "0x" in elsewhere.text.lower(), elsewhere


def key_uid(instance: Instance) -> dict[str, Any]:
    dataset = pydicom.dcmread(pydicom.filebase.DicomBytesIO(part10(instance)))
    return ui(dataset.StudyInstanceUID)


class Answering:
    """A pynetdicom SCP whose C-FIND and C-MOVE answers are given."""

    def __init__(self, *answers: tuple[int, Dataset | None]):
        self.identifiers: list[Dataset] = []
        self.answers = answers
        (self.port,) = free_ports(1)
        ae = AE("PACS")
        for uid in (STUDY_FIND, WORKLIST):
            ae.add_supported_context(uid)
        handlers: list[Any] = [(evt.EVT_C_FIND, self.find)]
        self.server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)
        self.url = f"dicom://PACS@127.0.0.1:{self.port}"

    def __enter__(self) -> "Answering":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.server is not None
        self.server.shutdown()

    def find(self, event: Any) -> Iterator[Any]:
        self.identifiers.append(event.identifier)
        yield from self.answers


def test_push_find_worklist(push):
    step_item = data_set(Modality="CT", ScheduledProcedureStepStartDate="20260102")
    item = data_set(PatientID="PAT-9", ScheduledProcedureStepSequence=[step_item])
    with Answering((0xFF00, item), (0xFF00, item)) as pacs:
        for request in ({"level": "WORKLIST"}, {"model": "WORKLIST"}):
            answer = answer_of(push(pacs.url, {"command": "C-FIND", "dataset": {"00100020": {"vr": "LO"}}} | request))
            assert [found["00100020"] for found in answer["datasets"]] == [{"vr": "LO", "Value": ["PAT-9"]}] * 2
            assert answer["datasets"][0]["00400100"]["Value"][0]["00080060"]["Value"] == ["CT"]
        assert all("QueryRetrieveLevel" not in identifier for identifier in pacs.identifiers)


def test_push_find_that_fails(push):
    with Answering((0xFF00, data_set(PatientID="1")), (0xA700, None)) as pacs:
        answer = push(pacs.url, {"command": "C-FIND", "level": "STUDY", "dataset": {}})
    assert answer.status == 400 and "a700" in answer.text.lower(), answer


@pytest.mark.parametrize("status", [0xA700, 0xA900, 0xC000, 0xB000])
def test_push_store_that_is_refused_or_warned(here, push, dest, status):
    (reference,) = keep(here, made(100))
    dest.statuses[:] = [status]
    answer = push(f"dicom://{dest.address}", reference, contentType="application/dicom")
    if status == 0xB000:
        assert answer_of(answer)["status"] == status
    else:
        assert answer.status == 400 and f"{status:04x}" in answer.text.lower(), answer


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("no JSON", ""),
        ("[]", "command"),
        ({"command": "C-DELETE"}, "C-DELETE"),
        ({"command": "C-STORE"}, "Binary"),
        ({"command": "C-STORE", "binary": {"reference": "Patient/1"}}, "Binary"),
        ({"command": "C-STORE", "binary": {"reference": "Binary/none"}}, "Binary/none"),
        ({"command": "C-FIND", "level": "STUDY", "dataset": {"0010": 1}}, ""),
        ({"command": "C-FIND", "level": "STUDY", "dataset": {}, "model": "NONE"}, "NONE"),
        ({"command": "C-MOVE", "level": "STUDY", "dataset": {}}, "destination"),
    ],
)
def test_push_of_what_makes_no_sense(push, dest, body, words):
    answer = push(f"dicom://{dest.address}", body)
    assert answer.status == 400 and words in answer.text, answer


def test_push_of_a_binary_that_is_no_dicom_file(here, push, dest):
    here.sandbox.sandbox.binaries["Binary/pdf"] = b"%PDF-1.7 this is a report" * 100
    answer = push(f"dicom://{dest.address}", "Binary/pdf", contentType="application/dicom")
    assert answer.status == 400, answer
    assert_no_spool(here)


def silent_listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


@pytest.mark.parametrize(
    ("title", "port", "words"), [("DEST", 1, ("connect", "refused", "reach")), ("WRONG", 0, ("called AE title",))]
)
def test_push_to_who_is_not_there(push, dest, title, port, words):
    answer = push(f"dicom://{title}@127.0.0.1:{port or dest.port}", {"command": "C-ECHO"})
    assert answer.status == 400 and any(word.lower() in answer.text.lower() for word in words), answer
    assert answer.seconds < 3


def test_push_to_who_never_answers(push):
    with silent_listener() as listener:
        url = f"dicom://MUTE@127.0.0.1:{listener.getsockname()[1]}?ackTimeoutSecs=1"
        answer = push(url, {"command": "C-ECHO"})
    assert answer.status == 400 and answer.seconds < 4, answer


def test_push_over_tls(push, tmp_path):
    tls = Tls(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.agent_file)
    context.load_verify_locations(tls.ca_file)
    context.verify_mode = ssl.CERT_REQUIRED
    with Destination(context=context) as secure:
        certificate = f"certFile={tls.cert_file}&keyFile={tls.key_file}"
        good = f"dicoms://{secure.address}?caFile={tls.ca_file}&{certificate}"
        assert answer_of(push(good, {"command": "C-ECHO"}))["status"] == 0
        for query in (
            f"?{certificate}",
            f"?caFile={tls.ca_file}",
            f"?caFile={tls.ca_file}&certFile={tls.foreign_file}",
        ):
            answer = push(f"dicoms://{secure.address}{query}", {"command": "C-ECHO"})
            assert answer.status == 400, (query, answer)
        assert push(f"dicom://{secure.address}", {"command": "C-ECHO"}).status == 400
        assert answer_of(push(good, {"command": "C-ECHO"}))["status"] == 0


@pytest.mark.parametrize("right", [True, False])
def test_moves_and_reports_over_tls(tmp_path, right):
    """`dicoms://` among moveDestinations: the objects cross the hospital encrypted, or not at all."""
    tls = Tls(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.agent_file)
    with Destination(context=context) as secure:
        files = f"?caFile={tls.ca_file}" if right else f"?caFile={tls.foreign_file}"
        where = quote(f"dicoms://{secure.address}{files}", safe="")
        plain = f"moveDestinations=PLAIN@127.0.0.1:{secure.port},{where}&associationTimeoutSecs=2"
        with imaging_site(tmp_path, {"PACS": f"dicom://127.0.0.1:{{port}}?{plain}&{FAST}"}) as here:
            here.sandbox.bot = bot = Bot()
            instance = made(100)
            bot.replies["C-MOVE"] = keep(here, instance)
            bot.replies["N-ACTION"] = lambda question: {"committed": [instance.uid]}
            with associated(here, STUDY_MOVE, calling=secure.title) as scu:
                (last, _) = list(scu.send_c_move(STUDY, secure.title, STUDY_MOVE))[-1]
            with associated(here, COMMITMENT, calling=secure.title) as scu:
                assert commit(scu, new_uid(), instance) == SUCCESS
            if right:
                assert (last.Status, [one.uid for one in secure.arrivals]) == (SUCCESS, [instance.uid])
                eventually(lambda: secure.reports, 10, "the report over TLS")
            else:
                assert last.Status == 0xA702 and not secure.arrivals
                here.agent.logged("objects could not be moved to 'DEST': it cannot be reached: TLS failed")
                here.agent.logged("report was not taken")


def test_pushes_that_nobody_waits_for(here, push, dest):
    """Stored, in order, and tried again until the device takes them."""
    (port,) = free_ports(1)
    instances = [made(100) for _ in range(5)]
    url = f"dicom://LATER@127.0.0.1:{port}"
    push.caller.store(url, *keep(here, *instances), contentType="application/dicom")
    with Destination("LATER", port=port) as later:
        eventually(lambda: len(later.arrivals) == 5, 20, "all five")
        assert [arrival.uid for arrival in later.arrivals] == [instance.uid for instance in instances]
    assert_no_spool(here)


def test_pushes_at_once(here, push, dest):
    """Several callers do not wait for one another."""
    with silent_listener() as listener, here.caller() as other:
        url = f"dicom://MUTE@127.0.0.1:{listener.getsockname()[1]}?ackTimeoutSecs=1.5"
        slow = threading.Thread(
            target=other.push, args=(url, '{"command":"C-ECHO"}'), kwargs={"contentType": "application/json"}
        )
        slow.start()
        answer = push(f"dicom://{dest.address}", {"command": "C-ECHO"})
        assert answer.seconds < 1 and answer_of(answer)["status"] == 0
        slow.join(10)


def test_nothing_is_left_behind(here):
    """After all of this (keep it last): no error in the log but that the server was away."""
    errors = [line for line in here.agent.main_log().decode().splitlines() if '"ERROR"' in line]
    assert not [line for line in errors if "No connection to" not in line]


# --- README ---

STUBS = """
const pages = { ServiceRequest: [[{ id: 'order', subject: { display: 'A^B' } }], [{ id: 'more' }]],
  DocumentReference: [1, 2].map((n) => [{ context: { related: [{ reference: `Binary/${n}` }] } }]) };
const medplum = {
  searchResourcePages: async function* (type) { yield* pages[type]; },
  searchOne: async (type, query) => query.endsWith('1.2.3') ? {} : undefined,
  createResource: async (resource) => resource,
  createResourceIfNoneExist: async (resource, query) => { if (!query.endsWith('1.2.7')) throw new Error(query); },
};
const answers = [];
for (const input of QUESTIONS) answers.push(await handler(medplum, { input }) ?? null);
console.log(JSON.stringify(answers));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="NO node, which runs the Bot that README shows")
def test_the_bot_in_readme_answers_everything(tmp_path):
    (source,) = re.findall(r"```js\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    study = {"0020000D": {"vr": "UI", "Value": ["1.2"]}}
    objects = [{"00081155": {"vr": "UI", "Value": [uid]}} for uid in ("1.2.3", "1.2.4")]
    questions: list[dict[str, Any]] = [
        {"command": "C-FIND", "level": "WORKLIST", "dataset": {}},
        {"command": "C-FIND", "level": "STUDY", "dataset": {}},
        {"command": "C-MOVE", "level": "STUDY", "dataset": study},
        {"command": "N-ACTION", "dataset": {"00081199": {"vr": "SQ", "Value": objects}}},
        {"command": "N-SET", "sopInstanceUid": "1.2.9", "dataset": {}},
        {"dataset": study | {"00080018": {"vr": "UI", "Value": ["1.2.7"]}}, "binary": {"reference": "Binary/1"}},
    ]
    script = tmp_path / "bot.mjs"
    script.write_text(source + STUBS.replace("QUESTIONS", json.dumps(questions)), "utf-8")
    run = subprocess.run(["node", script], capture_output=True, text=True, check=True)
    (match, _), refusal, *others = json.loads(run.stdout)
    assert Dataset.from_json(match).PatientName == "A^B"
    assert refusal["status"] == "0xA900"
    assert others == [["Binary/1", "Binary/2"], {"committed": ["1.2.3"]}, {"status": 0}, None]
