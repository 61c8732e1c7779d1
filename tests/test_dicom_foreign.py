"""Faults that odd objects, hasty devices and careless Bots brought to light, one test each: none may come back."""

import contextlib
import json
import socket
import struct
import time
import zlib

import pytest

from tests.dicom_peers import (
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    NOT_UNDERSTOOD,
    QUIET,
    RELEASE_RQ,
    SECONDARY,
    STUDY_FIND,
    STUDY_GET,
    STUDY_MOVE,
    SUCCESS,
    WORKLIST,
    Aborted,
    Bot,
    Destination,
    Instance,
    Receiving,
    Scu,
    announced,
    associated,
    command_set,
    counts,
    data_set,
    element,
    encoded,
    forget_strays,
    imaging_site,
    made,
    made_dataset,
    new_uid,
    part10,
    store,
)  # fmt: skip
from tests.support import eventually

pytestmark = QUIET
LOCAL = "dicom://127.0.0.1:{port}?"


@pytest.fixture(scope="module")
def dest():
    with Destination() as running:
        yield running


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory, dest):
    channels = {"PACS": f"{LOCAL}moveDestinations={dest.address}", "SHORT": f"{LOCAL}associationTimeoutSecs=1"}
    with imaging_site(tmp_path_factory.mktemp("hunt"), channels) as running:
        yield running


@pytest.fixture
def here(shared_site):
    forget_strays(shared_site)
    shared_site.sandbox.bot = Bot()
    return shared_site


@pytest.fixture
def bot(here):
    return here.sandbox.bot


def warned(here, since: int, words: str) -> None:
    """The main log says so, in what came behind `since`."""
    eventually(lambda: words.encode() in here.agent.main_log()[since:], 10, words)


def keep(here, *files: bytes) -> list[str]:
    references = [f"Binary/{new_uid()}" for _ in files]
    here.sandbox.sandbox.binaries |= zip(references, files, strict=True)
    return references


STUDY = data_set(QueryRetrieveLevel="STUDY", StudyInstanceUID="1.2.3")


# --- 1: values of 512 KB and more are read, decoded and converted, whatever defer_size says ---


def grown(here, instance: Instance, content=None) -> int:
    """MB by which the agent grows while it takes an object."""
    before = here.agent.memory_kb("VmRSS")
    here.agent.forget_peak()
    with Scu.for_instances(here.ports["PACS"], instance, timeout=120) as scu:
        assert scu.store(instance, content) == SUCCESS
    announced(here, instance.uid, 60)
    return (here.agent.memory_kb("VmHWM") - before) // 1024


@pytest.mark.parametrize(("tag", "vr"), [(0x00420011, b"OB"), (0x00091010, b"UN"), (0x00400031, b"UT")])
def test_large_values_that_are_no_pixels_are_not_in_memory(here, tag, vr):
    """Encapsulated PDF or STL, private raw data, long text."""
    whole = made_dataset()
    for found in [one.tag for one in whole if one.tag > tag]:
        del whole[found]

    def content():
        yield encoded(whole) + struct.pack("<HH2s2xI", tag >> 16, tag & 0xFFFF, vr, 200 * 2**20)
        for _ in range(200):
            yield b"x" * 2**20

    assert grown(here, Instance(SECONDARY, whole.SOPInstanceUID, EXPLICIT, b""), content()) < 50


def test_many_numbers_in_one_value_do_not_fill_the_memory(here):
    whole, size = made_dataset(), 4 * 2**20
    value = struct.pack("<HHI", 0x3004, 0x0058, size) + b"1.5\\" * (size // 4 - 1) + b"1.5 "  # DVH Data, DS
    instance = Instance(SECONDARY, whole.SOPInstanceUID, IMPLICIT, encoded(whole, IMPLICIT) + value)
    assert grown(here, instance) < 50


def test_large_values_in_sequences_are_not_in_memory(here):
    """A waveform (sleep EEG)."""
    whole, size = made_dataset(), 200 * 2**20
    item, end = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF), struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    head = struct.pack("<HH2s2xI", 0x5400, 0x1010, b"OW", size)
    length = len(item + head + end) + size

    def content():
        yield encoded(whole) + struct.pack("<HH2s2xI", 0x5400, 0x0100, b"SQ", length) + item + head
        for _ in range(200):
            yield bytes(2**20)
        yield end

    assert grown(here, Instance(SECONDARY, whole.SOPInstanceUID, EXPLICIT, b""), content()) < 50


# --- 2: C-FIND goes on after a final answer ---

GOOD = {"00100020": {"vr": "LO", "Value": ["GOOD"]}}
UNWRITABLE = {
    "an object as text": {"00100020": {"vr": "LO", "Value": [{"id": "4711"}]}},
    "a number as UID": {"0020000D": {"vr": "UI", "Value": [1.2]}},
    "too large": {"00280010": {"vr": "US", "Value": [70000]}},
}


@pytest.mark.parametrize("bad", UNWRITABLE.values(), ids=UNWRITABLE)
def test_nothing_follows_the_final_answer_of_a_find(here, bot, bad):
    """PS3.7 9.1.2.1, PS3.4 C.4.1.2: a failure ends the query; what follows is taken for the next one's answer."""
    bot.replies["C-FIND"] = [GOOD, bad, GOOD]
    got: list[int] = []
    before = len(here.agent.main_log())
    with Scu(here.ports["PACS"], [(WORKLIST, (EXPLICIT,))], timeout=1) as scu:
        scu.request(1, {2: WORKLIST, 0x0100: 0x20}, element(0x00100020, b"LO", b""))
        with contextlib.suppress(TimeoutError):
            while True:
                got.append(struct.unpack("<H", scu.response()[0x0900])[0])
    assert all(status == 0xFF00 for status in got[:-1]), list(map(hex, got))
    warned(here, before, "0xC001")


# --- 3: C-GET sends garbage as success when the group length of the file meta is wrong ---


@pytest.mark.parametrize("wrong_by", [20, -10])
def test_a_wrong_group_length_of_the_file_meta_does_not_cut_the_data_set(here, bot, wrong_by):
    """C-MOVE of the same Binary is right; pydicom, dcmtk and Orthanc read such files."""
    instance = made(100)
    raw = bytearray(part10(instance))
    struct.pack_into("<I", raw, 140, struct.unpack_from("<I", raw, 140)[0] + wrong_by)
    bot.replies["C-GET"] = keep(here, bytes(raw))
    receiving = Receiving()
    with associated(here, STUDY_GET, storage=[(SECONDARY, EXPLICIT)], handlers=receiving.handlers) as scu:
        last = list(scu.send_c_get(STUDY, STUDY_GET))[-1][0]
    assert receiving.got == [(instance.uid, instance.content)], (hex(last.Status), counts(last))


def test_a_file_without_group_length_goes_by_c_get(here, bot):
    instance = made(100)
    raw = part10(instance)
    bot.replies["C-GET"] = keep(here, raw[:132] + raw[144:])
    receiving = Receiving()
    with associated(here, STUDY_GET, storage=[(SECONDARY, EXPLICIT)], handlers=receiving.handlers) as scu:
        list(scu.send_c_get(STUDY, STUDY_GET))
    assert receiving.got == [(instance.uid, instance.content)]


# --- 4: nothing in any log ---


def test_what_a_destination_refuses_is_logged(here, bot, dest):
    before, instance = len(here.agent.main_log()), made(100)
    bot.replies["C-MOVE"] = keep(here, part10(instance))
    dest.statuses[:] = [0xA700]
    with associated(here, STUDY_MOVE) as scu:
        last = list(scu.send_c_move(STUDY, dest.title, STUDY_MOVE))[-1][0]
    assert counts(last)[2] == 1
    warned(here, before, "0xA700")


@pytest.mark.parametrize("whole", [False, True])
def test_an_object_that_is_dropped_at_a_release_is_logged(here, whole):
    before, instance = len(here.agent.main_log()), made(100)
    with Scu.for_instances(here.ports["PACS"], instance, calling="HASTY") as scu:
        if whole:
            scu.send_store(instance)
        else:
            request: dict[int, int | str] = {
                2: SECONDARY,
                0x0100: 1,
                0x0110: 1,
                0x0700: 0,
                0x0800: 1,
                0x1000: instance.uid,
            }
            scu.fragments(1, 1, command_set(request))
            scu.fragments(1, 0, instance.content[:20], last=False)
        scu.pdu(RELEASE_RQ)
        with contextlib.suppress(Aborted):
            while True:
                scu.read_pdu()
    warned(here, before, "'HASTY' ended: with a request that was not answered")


def test_contexts_that_are_all_refused_are_logged(here):
    before = len(here.agent.main_log())
    with Scu(here.ports["PACS"], [("1.2.840.10008.5.1.1.9", (IMPLICIT,))], calling="PRINTS") as scu:
        assert not scu.accepted
    warned(here, before, "'PRINTS'")


# --- 5: objects that are no data sets ---


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.2", IMPLICIT])
def test_a_file_without_preamble_is_no_data_set(here, syntax):
    """PS3.5 7.1, PS3.10 7.1: group 0002 in the data set overrides the syntax of the file that is made of it."""
    whole = made_dataset()
    meta = element(0x00020010, b"UI", syntax.encode() + b"\0" * (len(syntax) % 2))
    bad = Instance(SECONDARY, whole.SOPInstanceUID, EXPLICIT, meta + encoded(whole))
    status = store(here.ports["PACS"], bad)[0]
    if status == SUCCESS:  # or what it says is right
        told = announced(here, bad.uid)["dataset"]
        assert told["00020010"]["Value"] == [EXPLICIT] and "00080016" in told, sorted(told)
    else:
        assert status == NOT_UNDERSTOOD


def test_a_deflated_data_set_that_breaks_off_is_refused(here):
    """As in every other syntax (BREAKS in test_dimse)."""
    whole = made_dataset(pixels=bytes(400))
    deflating = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    content = deflating.compress(encoded(whole)[:-5]) + deflating.flush()
    cut = Instance(SECONDARY, whole.SOPInstanceUID, DEFLATED, content + b"\0" * (len(content) % 2))
    assert hex(store(here.ports["PACS"], cut)[0]) == hex(NOT_UNDERSTOOD)


def test_a_deflated_data_set_is_inflated_to_its_end(here):
    """Behind the last of its input zlib may hold 258 bytes more: it "broke off". Where a byte of padding followed then,
    the only thread that decodes never came back, and no object was answered any more."""
    head = len(encoded(made_dataset(pixels=b"12"))) - 2
    for more in range(190, 210, 2):
        whole = made_dataset(pixels=bytes(2**20 - head + more))
        deflating = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
        content = deflating.compress(encoded(whole)) + deflating.flush()
        instance = Instance(SECONDARY, whole.SOPInstanceUID, DEFLATED, content + b"\0" * (len(content) % 2))
        assert store(here.ports["PACS"], instance) == [SUCCESS]


# --- 6: what devices get ---


def matched(here, bot, match):
    bot.replies["C-FIND"] = [match]
    with associated(here, STUDY_FIND) as scu:
        (_, found), *_ = scu.send_c_find(data_set(QueryRetrieveLevel="STUDY", PatientID=""), STUDY_FIND)
        return found


def test_a_match_has_no_file_meta(here, bot):
    """PS3.4 C.4.1.1.3: a Bot answers with the `dataset` of the announcement, as it was given it."""
    instance = made(100)
    assert store(here.ports["PACS"], instance) == [SUCCESS]
    match = matched(here, bot, announced(here, instance.uid)["dataset"])
    assert [f"{one.tag}" for one in match if one.tag.group < 8] == []


def test_decimals_fit_their_vr(here, bot):
    """PS3.5 6.2: 16 characters at most; 150 lb in kg."""
    match = matched(here, bot, {"00101030": {"vr": "DS", "Value": [150 / 2.2]}})
    assert len(str(match.PatientWeight)) <= 16, match.PatientWeight


def test_no_value_among_others_is_empty(here, bot):
    match = matched(here, bot, {"00280030": {"vr": "DS", "Value": [None, 2]}})
    assert list(match[0x00280030].value) == ["", 2]


def test_text_of_items_is_said_to_be_utf_8(here):
    """PS3.18 F.2: it is, and the top level says so; an item keeps the name of its old character set."""
    item = data_set(SpecificCharacterSet="ISO_IR 144", CodeMeaning="Ж")
    whole = made_dataset(SpecificCharacterSet="ISO_IR 144", ConceptNameCodeSequence=[item])
    assert store(here.ports["PACS"], Instance(SECONDARY, whole.SOPInstanceUID, EXPLICIT, encoded(whole))) == [SUCCESS]
    text = json.dumps(announced(here, whole.SOPInstanceUID)["dataset"])
    assert "ISO_IR 144" not in text


# --- 7: the time for an association request ---


def test_a_request_that_drips_is_closed(here):
    """PS3.8 9.1.5: ARTIM runs from the connection on; a byte does not start it anew."""
    with socket.create_connection(("127.0.0.1", here.ports["SHORT"])) as sock, pytest.raises(OSError):
        for byte in b"\1\0\0\0\0\xd0\0\1" + b"x" * 15:
            sock.sendall(bytes([byte]))
            time.sleep(0.3)


def test_an_object_over_a_slow_line_is_no_device_that_stopped(tmp_path):
    """frameTimeoutSecs is about a connection that stops. Over a line that brings 3 MB a minute a PDU is never whole
    when a piece ends, and an object that took longer than 60 s was cut off in the middle."""
    command = command_set({2: SECONDARY, 0x0100: 1, 0x0110: 1, 0x0700: 0, 0x0800: 1, 0x1000: "1.2.3"})
    with imaging_site(tmp_path, {"SLOW": "dicom://127.0.0.1:{port}?frameTimeoutSecs=0.5"}) as here:
        with Scu(here.ports["SLOW"], [(SECONDARY, (EXPLICIT,))]) as scu:
            (context,) = scu.accepted.values()
            pieces = [(3, command), *[(0, bytes(16_000))] * 15]
            values = [struct.pack(">IBB", len(content) + 2, context, flags) + content for flags, content in pieces]
            sent = b"".join(struct.pack(">BxI", 4, len(one)) + one for one in values)  # PS3.8 9.3.5
            for at in range(0, len(sent), 5003):  # never at the end of a PDU
                scu.socket.sendall(sent[at : at + 5003])
                time.sleep(0.05)  # the line
        assert b"middle of a message" not in here.agent.main_log()
