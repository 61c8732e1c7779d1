"""The DICOM core against PS3.7 and PS3.8 and against itself, then its line and its JSON through a running agent."""

import base64
import contextlib
import io
import itertools
import json
import re
import socket
import struct
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.filereader import read_dataset
from pydicom.uid import UID
from pynetdicom import build_context, build_role, dimse_messages, dimse_primitives, pdu_primitives
from pynetdicom.dsutils import encode
from pynetdicom.fsm import TRANSITION_TABLE
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ, P_DATA_TF

import medplum_agent as ma
from medplum_agent import Accepted, Associate, Command, Context, Dimse, Ended, Fragment, command_set, read_command
from tests import dicom_peers as peers
from tests.dicom_peers import CT, EXPLICIT, IMPLICIT, SECONDARY, SUCCESS, VERIFICATION, Instance, Scu, element
from tests.support import Site, log_lines

ma.imaging()  # commands need its dictionary

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom.*", "ignore::UserWarning:pynetdicom.*")

WORKLIST = "1.2.840.10008.5.1.4.31"
RQ, AC, RJ, DATA, RELEASE_RQ, RELEASE_RP, ABORT, UNKNOWN = PDUS = *range(1, 8), 0x99


# --- what a device sends ---


def pdu(kind: int, content: bytes = bytes(4)) -> bytes:
    return struct.pack(">BxI", kind, len(content)) + content


def item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(content)) + content


def context(number: int, abstract: str, *syntaxes: str, more: bytes = b"") -> bytes:
    names = b"".join(item(0x40, syntax.encode()) for syntax in syntaxes)
    return item(0x20, bytes((number, 0, 0, 0)) + item(0x30, abstract.encode()) + more + names)


def role(uid: bytes, scu: int = 1, scp: int = 1) -> bytes:
    return item(0x54, struct.pack(">H", len(uid)) + uid + bytes((scu, scp)))


CONTEXTS = context(1, VERIFICATION, IMPLICIT) + context(3, CT, EXPLICIT, IMPLICIT)


def request(
    contexts: bytes = CONTEXTS, calling: bytes = b"CT1", called: bytes = b"AGENT", user: bytes = b"", more: bytes = b"",
    version: int = 1, application: bytes = b"1.2.840.10008.3.1.1.1",
) -> bytes:  # fmt: skip
    """A-ASSOCIATE-RQ; titles are padded with blanks, `user` and `more` come before the known items."""
    fixed = struct.pack(">H2x", version) + called.ljust(16) + calling.ljust(16) + bytes(32)
    known = item(0x10, application) + contexts + item(0x50, user + item(0x51, struct.pack(">I", 16384)))
    return pdu(RQ, fixed + more + known)


def value(number: int, control: int, content: bytes) -> bytes:
    """A presentation data value; `control`: 1 command, 2 last (PS3.8 E.2)."""
    return struct.pack(">IBB", len(content) + 2, number, control) + content


def data(*values: bytes) -> bytes:
    return pdu(DATA, b"".join(values))


def begun(number: int, control: int, size: int = 16, whole: int = 20) -> bytes:
    """The heads of a PDU and of its first value."""
    return struct.pack(">BxIIBB", DATA, whole, size, number, control)


def aborted(reason: int, source: int = 2) -> bytes:
    return pdu(ABORT, bytes((0, 0, source, reason)))


ECHO = {"AffectedSOPClassUID": VERIFICATION, "CommandField": 0x30, "MessageID": 1, "CommandDataSetType": 0x0101}
STORE = {"CommandField": 1, "MessageID": 2, "CommandDataSetType": 1, "AffectedSOPInstanceUID": "1.2.3"}
FIND = {"AffectedSOPClassUID": WORKLIST, "CommandField": 0x20, "MessageID": 7, "CommandDataSetType": 0}
STOP = {"CommandField": 0x0FFF, "MessageIDBeingRespondedTo": 7, "CommandDataSetType": 0x0101}
ECHO_BYTES, STORE_BYTES, FIND_BYTES, STOP_BYTES = (command_set(fields) for fields in (ECHO, STORE, FIND, STOP))
ECHO_PDU, STORE_PDU = data(value(1, 3, ECHO_BYTES)), data(value(3, 3, STORE_BYTES))
NOISE = ECHO_PDU + pdu(RELEASE_RQ) + request() + pdu(UNKNOWN) + b"GET / HTTP/1.1\r\n\r\n" + pdu(ABORT)


# --- how the core is driven ---


PROPOSED = [
    Context(1, VERIFICATION, (IMPLICIT,)),
    Context(3, CT, (EXPLICIT, IMPLICIT)),
    Context(5, WORKLIST, (EXPLICIT,)),
]


def accepting(*contexts: bytes, user: bytes = item(0x51, struct.pack(">I", 16384)), more: bytes = b"") -> bytes:
    """A-ASSOCIATE-AC, with the items in `more` before the known ones."""
    items = more + item(0x10, b"1.2.840.10008.3.1.1.1") + b"".join(contexts) + (item(0x50, user) if user else b"")
    return pdu(AC, struct.pack(">H", 1) + bytes(66) + items)


def result(number: int, syntax: str, code: int = 0) -> bytes:
    return item(0x21, bytes((number, 0, code, 0)) + (item(0x40, syntax.encode()) if syntax else b""))


ACCEPTANCE = accepting(result(1, IMPLICIT), result(3, EXPLICIT), result(5, "", 3))


def core_in(state: str) -> Dimse:
    core = Dimse(16384)
    if state == "Sta2":
        return core
    if state in ("Sta5", "Sta7", "Sta11"):
        core.request("ME", "ARCHIVE", PROPOSED, {})
        if state != "Sta5":
            assert core.receive(ACCEPTANCE) == ([Accepted()], b"")
            assert core.release() == pdu(RELEASE_RQ)
        if state == "Sta11":
            assert core.receive(pdu(RELEASE_RQ)) == ([], pdu(RELEASE_RP))
        assert core.state == state and not core.established
        return core
    (asked,), _ = core.receive(request())
    assert isinstance(asked, Associate)
    if state == "Sta3":
        return core
    core.accept([(c._replace(syntaxes=c.syntaxes[:1]), 0) for c in asked.contexts], {})
    if state == "Sta13":
        core.receive(pdu(RELEASE_RQ))
    assert core.state == state and core.established == (state == "Sta6")
    return core


def heard(core: Dimse, *chunks: bytes) -> tuple[list, bytes]:
    """All events, the pieces of a data set joined, and all answers; memory stays bounded."""
    events: list[Any] = []
    answers = b""
    for chunk in chunks:
        found, answer = core.receive(chunk)
        answers += answer
        for event in found:
            if isinstance(event, Fragment) and events and isinstance(events[-1], Fragment) and not events[-1].last:
                event = Fragment(events.pop().content + event.content, event.last)
            events.append(event)
        assert len(core._held) <= max(0, core._wanted) <= ma.PDU_BYTES
        assert len(core._command) <= ma.COMMAND_BYTES + len(chunk) and not core._events and not core._out
    return events, answers


def one_by_one(stream: bytes) -> list[bytes]:
    return [stream[i : i + 1] for i in range(len(stream))]


def heard_at_every_cut(state: str, stream: bytes) -> tuple[list, bytes]:
    """What is heard of the whole, compared with what is heard of its parts."""
    core, single = core_in(state), core_in(state)
    whole = heard(core, stream)
    assert heard(single, *one_by_one(stream)) == whole
    assert (single.state, single.inside) == (core.state, core.inside)
    for cut in range(1, len(stream), 1 + len(stream) // 200):
        assert heard(core_in(state), stream[:cut], stream[cut:]) == whole, cut
    return whole


# --- the states (PS3.8 9.2.3, table 9-10) ---

ACTIONS = """
          RQ    AC    RJ    DATA  RQ    RP     ABORT unknown
    Sta2  AE-6  AA-1  AA-1  AA-1  AA-1  AA-1   AA-2  AA-1
    Sta3  AA-8  AA-8  AA-8  AA-8  AA-8  AA-8   AA-3  AA-8
    Sta5  AA-8  AE-3  AE-4  AA-8  AA-8  AA-8   AA-3  AA-8
    Sta6  AA-8  AA-8  AA-8  DT-2  AR-2  AA-8   AA-3  AA-8
    Sta7  AA-8  AA-8  AA-8  AR-6  AR-8  AR-3   AA-3  AA-8
    Sta11 AA-8  AA-8  AA-8  AA-8  AA-8  AR-3   AA-3  AA-8
    Sta13 AA-7  AA-6  AA-6  AA-6  AA-6  AA-6   AA-2  AA-7
"""
EVENTS = (6, 3, 4, 10, 12, 13, 16, 19)
CELLS = [
    (state, *cell)
    for state, *actions in map(str.split, ACTIONS.strip().splitlines()[1:])
    for cell in zip(PDUS, EVENTS, actions, strict=True)
]


@pytest.mark.parametrize(("state", "kind", "event", "action"), CELLS)
def test_table_of_states(state: str, kind: int, event: int, action: str) -> None:
    """AR-2 goes on to AR-4 at once, AR-8 to AR-9. After an A-ABORT of ours Sta1 and Sta13 are the same.

    The A-ABORT of AA-1 is the provider's (source 2), so that its reason counts (9.3.8).
    """
    assert TRANSITION_TABLE[f"Evt{event}", state] == action, "pynetdicom reads the standard in another way"
    core = core_in(state)
    events, answer = heard(core, {RQ: request(), AC: ACCEPTANCE, DATA: ECHO_PDU}.get(kind, pdu(kind)))
    abort, released = aborted(1 if kind == UNKNOWN else 2), pdu(RELEASE_RP)
    words = f"aborted: an {'unknown' if kind == UNKNOWN else 'unexpected'} PDU of type {kind}"
    by_us, by_device = ([Ended(words)], abort, "Sta1 Sta13"), ([Ended("the device aborted it")], b"", "Sta1")
    expected: dict[str, tuple[Any, bytes, str]] = {
        "AE-6": ([USUAL], b"", "Sta3"),
        "AE-3": ([Accepted()], b"", "Sta6"),
        "AE-4": ([Ended("rejected: no reason given")], b"", "Sta1"),
        "DT-2": ([Command(1, ECHO, False)], b"", "Sta6"),
        "AR-2": ([Ended("")], released, "Sta13"),
        "AR-3": ([Ended("")], b"", "Sta1"),
        "AR-6": ([Command(1, ECHO, False)], b"", "Sta7"),
        "AR-8": ([], released, "Sta11"),
        "AA-1": by_us,
        "AA-2": by_device if state == "Sta2" else ([], b"", "Sta1"),
        "AA-3": by_device,
        "AA-6": ([], b"", "Sta13"),
        "AA-7": ([], abort, "Sta1 Sta13"),
        "AA-8": by_us,
    }
    assert (events, answer) == expected[action][:2]
    assert core.state in expected[action][2].split() and not core.inside
    assert core.established == (core.state == "Sta6")


WORDS = {
    "": (bytes(4), b"\0\0\0\5", b"\0\0\2\3", b"\0\0\2\xff", b"", bytes(9)),
    " (reason not specified)": (b"\7\7\2\0",), " (unrecognized PDU)": (b"\0\0\2\1",),
    " (unexpected PDU)": (b"\0\0\2\2",), " (unrecognized parameter)": (b"\0\0\2\4",),
    " (unexpected parameter)": (b"\0\0\2\5",), " (invalid parameter)": (b"\0\0\2\6",),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), [(one, words) for words, all_ in WORDS.items() for one in all_])
def test_an_abort_by_the_device_says_why(content: bytes, words: str) -> None:
    """PS3.8 9.3.8: the reason counts where the source is the provider."""
    assert heard_at_every_cut("Sta6", pdu(ABORT, content)) == ([Ended(f"the device aborted it{words}")], b"")


@pytest.mark.parametrize("stream", [b"", STORE_PDU + data(value(3, 2, bytes(50))), pdu(RELEASE_RQ)])
@pytest.mark.parametrize("state", ["Sta3", "Sta6"])
def test_an_abort_of_ours(state: str, stream: bytes) -> None:
    """By the user (source and reason 0); then nothing is heard any more, nor the rest of a PDU that is under way."""
    for cut in range(max(1, len(stream))):
        core = core_in(state)
        core.receive(stream[:cut])
        if core.established or not stream:
            assert core.aborting() == aborted(0, source=0)
            assert heard(core, stream[cut:] + NOISE) == ([], b"") and not core.established, cut


def test_a_rejection() -> None:
    core = core_in("Sta3")
    assert core.reject(2, 3, 2) == pdu(RJ, b"\0\2\3\2")
    assert core.state == "Sta13" and heard(core, ECHO_PDU + pdu(RELEASE_RQ)) == ([], b"")


# --- messages ---

STORED = Command(3, STORE, True)
GOOD: dict[str, tuple[bytes, list, bytes]] = {
    "nothing": (b"", [], b""),
    "command and data set in one PDU": (
        data(value(3, 3, STORE_BYTES), value(3, 0, b"abc"), value(3, 2, b"def")), [STORED, Fragment(b"abcdef", True)],
        b"",
    ),
    "every byte a fragment": (
        b"".join(data(value(3, 1, b)) for b in one_by_one(STORE_BYTES)) + data(value(3, 3, b""), value(3, 2, b"")),
        [STORED, Fragment(b"", True)], b"",
    ),
    "reserved bits of the control header": (data(value(1, 0xFF, ECHO_BYTES)), [Command(1, ECHO, False)], b""),
    "empty fragments and PDUs": (
        data() + data(value(1, 1, b""), value(1, 3, ECHO_BYTES)) + data() + STORE_PDU + data(value(3, 0, b"")),
        [Command(1, ECHO, False), STORED], b"",
    ),
    "C-CANCEL directly behind its C-FIND": (
        data(value(3, 3, FIND_BYTES), value(3, 2, b"query")) + data(value(3, 3, STOP_BYTES)),
        [Command(3, FIND, True), Fragment(b"query", True), Command(3, STOP, False)], b"",
    ),
    "a release behind an unfinished data set": (
        STORE_PDU + data(value(3, 0, b"half")) + pdu(RELEASE_RQ) + ECHO_PDU,
        [STORED, Fragment(b"half", False), Ended("")], pdu(RELEASE_RP),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("stream", "events", "answer"), GOOD.values(), ids=GOOD)
def test_messages(stream: bytes, events: list, answer: bytes) -> None:
    assert heard_at_every_cut("Sta6", stream) == (events, answer)


LARGE = ECHO_BYTES + struct.pack("<HHI", 0, 0x5110, ma.COMMAND_BYTES) + bytes(ma.COMMAND_BYTES)
LARGE_HEAD = begun(1, 3, len(LARGE) + 2, len(LARGE) + 6)
BAD: dict[str, tuple[str, bytes, int, bytes]] = {  # state, bytes, reason of the A-ABORT, the rest of the bad PDU
    "no DICOM": ("Sta2", b"GET / ", 1, b"HTTP/1.1\r\nHost: agent\r\n\r\n"),
    "a request that is too large": ("Sta2", struct.pack(">BxI", RQ, ma.PDU_BYTES + 1), 6, bytes(500)),
    "a request that breaks off": ("Sta2", pdu(RQ, bytes(67)), 6, b""),
    "an item that breaks off": ("Sta2", request(more=b"\x99\0\xff\xff"), 6, b""),
    "half a head of an item": ("Sta2", pdu(RQ, request()[6:] + b"\x20\0"), 6, b""),
    "a context with an even number": ("Sta2", request(context(2, CT, IMPLICIT)), 6, b""),
    "a user item that breaks off": ("Sta2", request(user=b"\x58\0\x7f\xff"), 6, b""),
    "a PDU that is too large": ("Sta6", struct.pack(">BxI", DATA, ma.PDU_BYTES + 1), 6, bytes(500)),
    "a PDU without room for a fragment": ("Sta6", struct.pack(">BxI", DATA, 5), 6, bytes(5)),
    "a fragment longer than its PDU": ("Sta6", begun(1, 3, 17), 6, bytes(14)),
    "a fragment as long as 4 GB": ("Sta6", begun(1, 3, 2**32 - 1), 6, bytes(14)),
    "a fragment shorter than its head": ("Sta6", begun(1, 3, 1), 6, bytes(14)),
    "bytes behind the last fragment": ("Sta6", pdu(DATA, value(1, 3, ECHO_BYTES) + b"\1\2\3")[:-3], 6, b"\1\2\3"),
    "a context that was not accepted": ("Sta6", begun(5, 3), 6, bytes(14)),
    "a command inside of a data set": ("Sta6", STORE_PDU + ECHO_PDU[:12], 6, ECHO_PDU[12:]),
    "a data set without command": ("Sta6", begun(1, 2), 6, bytes(14)),
    "a data set behind one that is complete": ("Sta6", STORE_PDU + data(value(3, 2, b"x")) + begun(3, 2), 6, bytes(14)),
    "a data set in another context": ("Sta6", STORE_PDU + begun(1, 2), 6, bytes(14)),
    "a data set before the command is whole": ("Sta6", data(value(3, 1, STORE_BYTES)) + begun(3, 2), 6, bytes(14)),
    "a command that is too large": ("Sta6", LARGE_HEAD + LARGE[: ma.COMMAND_BYTES + 1], 6, bytes(60)),
    "a command that breaks off": ("Sta6", data(value(1, 3, ECHO_BYTES[:-1])), 6, b""),
    "a command that breaks off in a head": ("Sta6", data(value(1, 3, ECHO_BYTES + b"\0\0\0\x09\1")), 6, b""),
    "a command of another group": ("Sta6", data(value(1, 3, struct.pack("<HHI", 8, 0x100, 0))), 6, b""),
    "a command without its field": ("Sta6", data(value(1, 3, command_set({"MessageID": 1}))), 6, b""),
    "an empty command": ("Sta6", data(value(1, 3, b"")), 6, b""),
}


@pytest.mark.parametrize(("state", "stream", "reason", "rest"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_aborted(state: str, stream: bytes, reason: int, rest: bytes) -> None:
    """One A-ABORT by the provider with its reason (PS3.8 9.3.8), one event, and whatever still comes is ignored."""
    events, answer = whole = heard(core_in(state), stream)
    assert answer == aborted(reason) and type(events[-1]) is Ended and events[-1].reason.startswith("aborted: ")
    assert heard_at_every_cut(state, stream + rest + NOISE) == whole


PIECES = st.one_of(
    st.sampled_from([ECHO_PDU, STORE_PDU, data(value(3, 2, b"last")), data(value(3, 0, b"piece")), data(), request()]),
    st.sampled_from([ACCEPTANCE, *(pdu(kind) for kind in PDUS)]),
    st.builds(value, st.sampled_from([1, 3, 5]), st.integers(0, 3), st.binary(max_size=9)).map(data),
    st.lists(st.builds(value, st.just(3), st.sampled_from([0, 0, 2]), st.binary(max_size=4)), max_size=4).map(
        lambda values: STORE_PDU + data(*values)
    ),
    st.builds(struct.Struct(">BxI").pack, st.integers(0, 9), st.integers(0, 40)),
    st.binary(max_size=9),
)


@given(st.sampled_from("Sta2 Sta3 Sta5 Sta6 Sta7 Sta11 Sta13".split()), st.lists(PIECES, max_size=6).map(b"".join))
@settings(max_examples=200, deadline=None)
def test_every_cut_gives_the_same_events(state: str, stream: bytes) -> None:
    events, answer = heard_at_every_cut(state, stream)
    assert all(isinstance(event, ma.DimseEvent) for event in events)
    assert not any(isinstance(event, Ended) for event in events[:-1])
    last = answer.removeprefix(pdu(RELEASE_RP))
    assert last in (b"", *map(aborted, range(7))), answer.hex()


# --- association requests ---

USUAL = Associate("CT1", "AGENT", (Context(1, VERIFICATION, (IMPLICIT,)), Context(3, CT, (EXPLICIT, IMPLICIT))), {})
MORE_USER = b"".join(  # implementation, asynchronous operations, extended negotiations, and what nobody knows yet
    item(kind, content)
    for kind, content in (
        (0x52, b"1.2"), (0x53, bytes(4)), (0x55, b"V"), (0x56, b"\0\3CTx"), (0x57, b""), (0x5A, b"new"), (0, b""),
        (0xFF, b"x"), *((0x58, bytes((kind, 1)) + b"\0\1a\0\0") for kind in (0, 1, 2, 3, 4, 5, 6, 255)), (0x58, b""),
    )
)  # fmt: skip
LENIENT: dict[str, tuple[bytes, dict[str, Any]]] = {
    "as it should be": (request(), {}),
    "unknown items": (request(more=item(0x11, b"x") + item(0xFF, b"") + item(0x21, b"\2\0\0\0")), {}),
    "user information that we do not use": (request(user=MORE_USER), {}),
    "a largest PDU of odd length": (request(user=item(0x51, b"\1")), {}),
    "roles": (request(user=role(CT.encode(), 0, 1) + role(b"1.2\0", 9, 255)), {"roles": {CT: (0, 1), "1.2": (9, 255)}}),
    "roles that break off": (request(user=item(0x54, b"\0\x40" + CT.encode() + b"\1\1") + item(0x54, b"\0")), {}),
    "unknown sub-items of a context": (
        request(context(1, CT, EXPLICIT, more=item(0x31, b"x"))), {"contexts": (Context(1, CT, (EXPLICIT,)),)},
    ),
    "a context without syntaxes": (request(context(1, CT)), {"contexts": (Context(1, CT, ()),)}),
    "a context without anything": (request(item(0x20, b"\1\0\0\0")), {"contexts": (Context(1, "", ()),)}),
    "no contexts": (request(b""), {"contexts": ()}),
    "UIDs padded to even length": (
        request(context(1, f"{CT}\0", f"{EXPLICIT}\0", f"{IMPLICIT} ")),
        {"contexts": (Context(1, CT, (EXPLICIT, IMPLICIT)),)},
    ),
    "more versions, another application context": (request(version=0xFFFF, application=b"1.2.3"), {}),
    "titles padded by NUL": (request(calling=b"CT1".ljust(16, b"\0"), called=b"AGENT".ljust(16, b"\0")), {}),
    "titles with blanks before": (request(calling=b"   CT1", called=b" AGENT \0"), {}),
    "empty titles": (request(calling=b"", called=bytes(16)), {"calling": "", "called": ""}),
    "titles of other bytes": (request(calling=b"R\xd6 \xff", called=b"A\xc4\t"), {"calling": "RÖ ÿ", "called": "AÄ\t"}),
    "a title that ends at a NUL": (request(calling=b"CT1\0\x7f\1old"), {}),
}  # fmt: skip


@pytest.mark.parametrize(("stream", "changes"), LENIENT.values(), ids=LENIENT)
def test_what_an_association_request_may_hold(stream: bytes, changes: dict[str, Any]) -> None:
    """PS3.8 9.3.1: items that are not known are ignored; PS3.7 D.3.3: so are those of user information."""
    assert heard_at_every_cut("Sta2", stream) == ([USUAL._replace(**changes)], b"")


def test_there_are_no_more_contexts_than_numbers_for_them() -> None:
    """PS3.8 9.3.2.2: odd and unique, so 128; a request of 47,000 would hold up everything else for a second."""
    (event,), _ = heard(core_in("Sta2"), request(CONTEXTS * 500))
    assert isinstance(event, Ended) or len(event.contexts) <= 128


def test_the_association_request_of_pynetdicom() -> None:
    primitive, largest = pdu_primitives.A_ASSOCIATE(), pdu_primitives.MaximumLengthNotification()
    primitive.application_context_name = UID("1.2.840.10008.3.1.1.1")
    primitive.calling_ae_title, primitive.called_ae_title = "CT1", "AGENT"
    proposed = [build_context(VERIFICATION, IMPLICIT), build_context(CT, [EXPLICIT, IMPLICIT])]
    proposed[0].context_id, proposed[1].context_id = 1, 3
    primitive.presentation_context_definition_list = proposed
    identity, implementation = (
        pdu_primitives.UserIdentityNegotiation(), pdu_primitives.ImplementationClassUIDNotification(),
    )  # fmt: skip
    identity.user_identity_type, identity.primary_field, identity.secondary_field = 2, b"user", b"word"
    largest.maximum_length_received, implementation.implementation_class_uid = 4321, UID("1.2.3")
    primitive.user_information = [largest, implementation, identity, build_role(CT, True, True)]
    core = Dimse(16384)
    assert core.receive(A_ASSOCIATE_RQ(primitive).encode()) == ([USUAL._replace(roles={CT: (1, 1)})], b"")
    assert core.peer_pdu == 4321


ROLES = {CT: (0, 1), VERIFICATION: (1, 1)}


def test_pynetdicom_reads_our_association_request() -> None:
    asked = A_ASSOCIATE_RQ()
    asked.decode(Dimse(32768).request("ME", "ARCHIVE", PROPOSED, ROLES))
    assert (asked.calling_ae_title.strip(), asked.called_ae_title.strip()) == ("ME", "ARCHIVE")
    assert asked.application_context_name == "1.2.840.10008.3.1.1.1" and asked.protocol_version == 1
    found = [(one.context_id, one.abstract_syntax, (*one.transfer_syntax,)) for one in asked.presentation_context]
    assert found == PROPOSED
    user = asked.user_information
    assert user is not None and user.maximum_length == 32768 and user.role_selection is not None
    assert (user.implementation_class_uid, user.implementation_version_name) == ma.IMPLEMENTATION
    assert {uid: (one.scu_role, one.scp_role) for uid, one in user.role_selection.items()} == ROLES


def test_our_request_is_understood_by_the_other_side() -> None:
    ours, theirs = Dimse(16384), Dimse(4321)
    ((asked,), _) = theirs.receive(ours.request("ME", "ARCHIVE", PROPOSED, ROLES))
    assert asked == Associate("ME", "ARCHIVE", tuple(PROPOSED), ROLES)
    chosen = [(c._replace(syntaxes=c.syntaxes[-1:]), 0 if c.id < 5 else 3) for c in asked.contexts]
    assert ours.receive(theirs.accept(chosen, ROLES)) == ([Accepted()], b"")
    assert ours.contexts == {1: PROPOSED[0], 3: PROPOSED[1]._replace(syntaxes=(IMPLICIT,))}
    assert ours.peer_pdu == 4321 and theirs.peer_pdu == 16384 and ours.established and theirs.established


POOR = {
    "no user information": (accepting(result(1, IMPLICIT), user=b""), {1: IMPLICIT}),
    "no maximum length": (accepting(result(1, IMPLICIT), user=item(0x52, b"1.2")), {1: IMPLICIT}),
    "no syntax": (accepting(result(3, "")), {3: EXPLICIT}),
    "a syntax that was not proposed": (accepting(result(1, EXPLICIT), result(3, IMPLICIT)), {3: IMPLICIT}),
    "contexts that were not proposed": (accepting(result(9, IMPLICIT), result(1, IMPLICIT)), {1: IMPLICIT}),
    "nothing accepted": (accepting(*(result(number, IMPLICIT, number) for number in (1, 3))), {}),
    "nothing": (accepting(), {}),
    "unknown items": (
        accepting(item(0x77, b"new"), result(1, IMPLICIT), user=item(0x99, b"x"), more=item(0, b"")),
        {1: IMPLICIT},
    ),
}


@pytest.mark.parametrize(("stream", "accepted"), POOR.values(), ids=POOR)
def test_what_an_answer_to_our_request_may_hold(stream: bytes, accepted: dict[int, str]) -> None:
    """PS3.8 9.3.1: unknown items are passed over; what was not proposed is not there."""
    assert heard_at_every_cut("Sta5", stream) == ([Accepted()], b"")
    core = core_in("Sta5")
    core.receive(stream)
    assert {number: context.syntaxes for number, context in core.contexts.items()} == {
        number: (syntax,) for number, syntax in accepted.items()
    }


@pytest.mark.parametrize(
    "stream", [pdu(AC, bytes(67)), pdu(AC, bytes(68) + b"\x21\0\0\x09abc"), pdu(AC, bytes(68) + b"\x50")]
)
def test_an_answer_that_breaks_off_is_aborted(stream: bytes) -> None:
    (end,), answer = heard_at_every_cut("Sta5", stream)
    assert end.reason.startswith("aborted: ") and answer == aborted(6)


REJECTIONS = {
    (1, 1): "no reason given", (1, 2): "application context name not supported",
    (1, 3): "calling AE title not recognized", (1, 7): "called AE title not recognized",
    (2, 2): "protocol version not supported", (3, 1): "temporary congestion", (3, 2): "local limit exceeded",
    (0, 255): "no reason given",
}  # fmt: skip


@pytest.mark.parametrize(("codes", "words"), REJECTIONS.items())
def test_a_rejection_of_our_request_says_why(codes: tuple[int, int], words: str) -> None:
    """PS3.8 9.3.4."""
    assert heard_at_every_cut("Sta5", pdu(RJ, bytes((0, 1, *codes)))) == ([Ended(f"rejected: {words}")], b"")
    assert heard_at_every_cut("Sta5", pdu(RJ, b"")) == ([Ended("rejected: no reason given")], b"")


def test_a_title_goes_back_as_it_came() -> None:
    """A report calls the device by its own title, umlauts and all: as `R?NTGEN` it is rejected."""
    (asked, *_), _ = Dimse(16384).receive(Dimse(16384).request("RÖNTGEN", "MÜNCHEN", PROPOSED, {}))
    assert isinstance(asked, Associate) and (asked.calling, asked.called) == ("RÖNTGEN", "MÜNCHEN")


def test_another_version_of_the_protocol_is_rejected() -> None:
    """PS3.8 9.3.2: bit 0 of its versions is ours; 9.3.4: rejected for good, by the ACSE provider, protocol version."""
    core, told = Dimse(16384), pdu(3, bytes((0, 1, 2, 2)))
    assert core.receive(request(version=2)) == ([Ended("rejected: a version of the protocol that is not ours")], told)
    assert core.receive(ECHO_PDU) == ([], b""), "nothing counts any more"


def test_pynetdicom_reads_the_answer_to_an_association_request() -> None:
    """PS3.8 9.3.3, with both titles as they came."""
    core, accepted = Dimse(32768), A_ASSOCIATE_AC()
    core.receive(request(calling=b"\0R\xd6", called=b"AGENT\0"))
    first, second = USUAL.contexts
    results = [(first, 3), (second._replace(syntaxes=(EXPLICIT,)), 0), (Context(5, CT, ()), 4)]
    answer = core.accept(results, {CT: (1, 0)})
    assert answer[10:42] == b"AGENT\0".ljust(16) + b"\0R\xd6".ljust(16) and list(core.contexts) == [3]
    accepted.decode(answer[:26] + b"X" * 16 + answer[42:])
    found = [(c.context_id, c.result, str(c.transfer_syntax)) for c in accepted.presentation_context]
    assert found == [(1, 3, IMPLICIT), (3, 0, EXPLICIT), (5, 4, IMPLICIT)]
    user = accepted.user_information
    assert user is not None and user.maximum_length == 32768 and user.role_selection is not None
    assert (user.implementation_class_uid, user.implementation_version_name) == ma.IMPLEMENTATION
    assert [(r.scu_role, r.scp_role) for r in user.role_selection.values()] == [(True, False)]


def test_roles_that_fill_a_request_are_answered() -> None:
    """An item holds at most 65,535 bytes, ours as well (PS3.8 9.3.3.3)."""
    core = Dimse(16384)
    roles = b"".join(role(f"1.2.{number:05}.{'1' * 40}".encode()) for number in range(1129))
    (asked,), _ = core.receive(request(user=roles))
    assert isinstance(asked, Associate) and len(asked.roles) == 1129
    answer = core.accept([(asked.contexts[0], 0)], asked.roles)
    assert struct.unpack_from(">BxI", answer) == (AC, len(answer) - 6)


# --- commands ---

AFFECTED: dict[str, Any] = {"AffectedSOPClassUID": CT, "AffectedSOPInstanceUID": "1.2.3"}
REQUESTED: dict[str, Any] = {"RequestedSOPClassUID": CT, "RequestedSOPInstanceUID": "1.2", "MessageID": 9}
QUERY: dict[str, Any] = {"AffectedSOPClassUID": WORKLIST, "MessageID": 7, "Priority": 1}
ANSWER: dict[str, Any] = {"MessageIDBeingRespondedTo": 7, "Status": 0xB000}
COUNTS = {f"NumberOf{kind}Suboperations": n for n, kind in enumerate(("Remaining", "Completed", "Failed", "Warning"))}
COMMANDS = {
    "C_ECHO_RQ": {"AffectedSOPClassUID": VERIFICATION, "MessageID": 1},
    "C_ECHO_RSP": {"AffectedSOPClassUID": VERIFICATION} | ANSWER,
    "C_STORE_RQ": AFFECTED | {"MessageID": 65535, "Priority": 2},
    "C_STORE_RSP": AFFECTED | ANSWER | {"ErrorComment": "no room"},
    "C_FIND_RQ": QUERY,
    "C_FIND_RSP": {"AffectedSOPClassUID": WORKLIST} | ANSWER,
    "C_CANCEL_RQ": {"MessageIDBeingRespondedTo": 7},
    "C_MOVE_RQ": QUERY | {"MoveDestination": "DEST2"},
    "C_MOVE_RSP": {"AffectedSOPClassUID": WORKLIST} | ANSWER | COUNTS,
    "C_GET_RQ": QUERY,
    "N_EVENT_REPORT_RQ": AFFECTED | {"MessageID": 9, "EventTypeID": 2},
    "N_EVENT_REPORT_RSP": ANSWER | {"EventTypeID": 2},
    "N_ACTION_RQ": REQUESTED | {"ActionTypeID": 1},
    "N_CREATE_RQ": AFFECTED | {"MessageID": 9},
    "N_SET_RQ": REQUESTED,
    "N_SET_RSP": AFFECTED | ANSWER,
}


@pytest.mark.parametrize(("name", "fields"), COMMANDS.items(), ids=COMMANDS)
def test_commands_are_as_pynetdicom_writes_them(name: str, fields: dict[str, Any]) -> None:
    """PS3.7 9.3, 10.3 and E.1."""
    service, _, _ = name.rpartition("_")
    primitive, theirs = getattr(dimse_primitives, service)(), getattr(dimse_messages, name)()
    for keyword, content in fields.items():
        setattr(primitive, keyword, content)
    theirs.primitive_to_message(primitive)
    expected = encode(theirs.command_set, True, True)
    assert expected is not None
    found = read_command(expected)
    assert {keyword: found[keyword] for keyword in fields} == fields
    assert set(found) == {element.keyword for element in theirs.command_set} - {"CommandGroupLength"}
    assert ma.DIMSE_NAMES[found["CommandField"] & 0x7FFF] == service.replace("_", "-")
    assert command_set(found) == expected


@given(st.sampled_from([0, 1, 6, 7, 8, 128, 16384]), st.none() | st.binary(max_size=400), st.text("ab ^é", max_size=64))
@settings(max_examples=100, deadline=None)
def test_a_message_is_read_back(peer_pdu: int, content: bytes | None, comment: str) -> None:
    """By a second core and by pynetdicom; no PDU is longer than the device takes (PS3.8 D.1)."""
    sender, spy, done = core_in("Sta6"), dimse_messages.C_FIND_RSP(), False
    sender.peer_pdu = peer_pdu
    fields = {"CommandField": 0x8020, "MessageIDBeingRespondedTo": 7, "Status": 0xFF00, "ErrorComment": comment}
    sent = sender.message(3, fields, content)
    read = {"CommandDataSetType": 0x0101 if content is None else 1, "ErrorComment": comment.replace("é", "?").strip()}
    padded = (content or b"") + bytes(len(content or b"") % 2)  # PS3.5 A.5
    fragment = [] if content is None else [Fragment(padded, True)]
    assert heard(core_in("Sta6"), sent) == ([Command(3, fields | read, content is not None), *fragment], b"")
    while sent:
        length = struct.unpack_from(">I", sent, 2)[0]
        assert length <= max(peer_pdu or ma.SENT_PDU_BYTES, 8) and length % 2 == 0
        one = P_DATA_TF()
        one.decode(sent[: 6 + length])
        sent, done = sent[6 + length :], spy.decode_msg(one.to_primitive())
    assert done and spy.context_id == 3 and spy.command_set.Status == 0xFF00
    assert (spy.data_set.getvalue() if spy.data_set else b"") == padded


@pytest.mark.parametrize(
    ("peer_pdu", "size"), [(0, ma.SENT_PDU_BYTES - 6), (2**32 - 1, ma.SENT_PDU_BYTES - 6), (128, 122)]
)
def test_large_data_sets_in_parts(peer_pdu: int, size: int) -> None:
    core = core_in("Sta6")
    core.peer_pdu = peer_pdu
    assert core.fragments(3, bytes(size), command=False, last=False) == data(value(3, 0, bytes(size)))
    parts = core.fragments(3, bytes(size) + b"xxx", command=False, last=True)
    assert parts == data(value(3, 0, bytes(size))) + data(value(3, 2, b"xxx\0"))


def test_memory_is_bounded() -> None:
    """By a data set without end, a command that comes byte by byte, a request that is never complete (see `heard`)."""
    core, other = core_in("Sta6"), core_in("Sta2")
    core.receive(STORE_PDU)
    heard(core, *[data(value(3, 0, bytes(65_536)))] * 200)
    assert core.established
    heard(core, data(value(3, 2, b"")), *[data(value(1, 1, b"x"))] * (ma.COMMAND_BYTES + 1))
    assert not core.established
    heard(other, struct.pack(">BxI", RQ, ma.PDU_BYTES), *[bytes(65_536)] * 16, bytes(1023))
    assert other.inside and other.state == "Sta2"


# --- through a running agent ---


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    options = {
        "STANDARD": "dicomJson=standard", "REFERENCE": "", "MANY": "maxConnections=50", "FEW": "maxConnections=2",
        "STRICT": "calledAeTitle=AGENT&callingAeTitles=CT1,RAW",
    }  # fmt: skip
    channels = {name: f"dicom://127.0.0.1:{{port}}?{query}" for name, query in options.items()}
    with peers.imaging_site(tmp_path_factory.mktemp("dimse"), channels) as running:
        yield running


class Hand(Scu):
    """A device whose association request is written by hand."""

    def __init__(self, port: int, asked: bytes):
        self._asked = asked
        super().__init__(port)

    def _associate(self, *_: object) -> None:
        self.socket.sendall(self._asked)
        assert self.read_pdu()[0] == AC
        self.accepted, self.peer_pdu = {(VERIFICATION, IMPLICIT): 1, (SECONDARY, EXPLICIT): 3}, 16384


def warned(here: Site, text: str) -> list[str]:
    return [e["msg"] for e in log_lines(here.agent.main_log()) if e["level"] == "WARN" and text in e["msg"]]


def test_sixty_associations_at_once(here):
    """50 are served, and 10 are told that the limit is reached (PS3.8 9.3.4); each of these is a line in the log."""
    gate = threading.Barrier(60)

    def ask(_: int) -> Any:
        gate.wait(20)
        try:
            return Scu(here.ports["MANY"])
        except peers.Rejected as rejected:
            return rejected.args

    with ThreadPoolExecutor(60) as pool, contextlib.ExitStack() as opened:
        found = list(pool.map(ask, range(60)))
        served = [opened.enter_context(one) for one in found if isinstance(one, Scu)]
        assert [one for one in found if not isinstance(one, Scu)] == [(2, 3, 2)] * 10
        assert list(pool.map(Scu.echo, served)) == [SUCCESS] * 50
    lines = warned(here, "'MANY'")
    assert all("was rejected: 50 associations are open (maxConnections)" in line for line in lines), lines
    assert len(lines) == len({re.findall(r"127\.0\.0\.1:\d+", line)[0] for line in lines}) == 10


def test_silent_connections_make_room(here):
    """Who connects and asks nothing takes no association away, and is closed for one who connects later."""
    port = here.ports["FEW"]
    with contextlib.ExitStack() as opened:
        silent = [opened.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(20)]
        with Scu(port) as first, Scu(port) as second:
            with contextlib.suppress(ConnectionError):
                assert silent[0].recv(1) == b""
            for _ in range(40):
                opened.enter_context(socket.create_connection(("127.0.0.1", port), 10))
            with pytest.raises(peers.Rejected):
                Scu(port)
            assert first.echo() == second.echo() == SUCCESS


@pytest.mark.parametrize(
    ("associated", "said", "words"),
    [
        (True, pdu(ABORT), "the association of 'CT1' ended: the device aborted it."),
        (True, aborted(2), "the association of 'CT1' ended: the device aborted it (unexpected PDU)."),
        (True, pdu(UNKNOWN), "the association of 'CT1' ended: aborted: an unknown PDU of type 153."),
        (True, begun(5, 3), "the association of 'CT1' ended: aborted: a fragment of no accepted presentation context."),
        (True, b"", "the association of 'CT1' ended without release."),
        (False, pdu(ABORT), "the device aborted it."),
        (False, b"GET / HTTP/1.1\r\n\r\n", "aborted: an unknown PDU of type 71."),
        (False, b"\1", "sent no association request"),
        (False, request(called=b"OTHER"), "the association of 'CT1' at {} was rejected: it calls 'OTHER'"),
        (False, request(calling=b"NOBODY"), "the association of 'NOBODY' at {} was rejected: it is not among calling"),
    ],
)
def test_every_abort_and_rejection_is_one_line(here, associated, said, words):
    with contextlib.ExitStack() as opened:
        if associated:
            sock = opened.enter_context(Hand(here.ports["STRICT"], request()).socket)
        else:
            sock = opened.enter_context(socket.create_connection(("127.0.0.1", here.ports["STRICT"]), 10))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while sock.recv(65536):
                pass
    here.agent.logged(address)
    with Scu(here.ports["STRICT"]) as scu:  # what the agent had to say of the other it has said by now
        assert scu.echo() == SUCCESS
    (line,) = [entry for entry in log_lines(here.agent.main_log()) if address in entry["msg"]]
    assert line["level"] == "WARN" and words.format(address) in line["msg"]


@pytest.mark.parametrize(
    ("title", "found"), [(b"CT1\0\0\0", "CT1"), (b"", ""), (b"R\xd6 '\"\\", "RÖ '\"\\"), (b"\1\x1f\x7f", "\1\x1f\x7f")]
)
def test_odd_requests_are_accepted(here, title, found):
    contexts = context(1, VERIFICATION, IMPLICIT) + context(3, SECONDARY, EXPLICIT)
    asked = request(contexts, title, title, user=MORE_USER, more=item(0x99, b"?"))
    instance = peers.made(100)
    with Hand(here.ports["REFERENCE"], asked) as scu:
        assert scu.echo() == scu.store(instance) == SUCCESS
    assert peers.assert_arrived(here, instance)["association"] == {"callingAeTitle": found, "calledAeTitle": found}


def test_a_cancel_in_the_segment_of_its_find_cancels(here):
    bot = here.sandbox.bot = peers.Bot()
    bot.replies["C-FIND"] = [{"00100020": {"vr": "LO", "Value": [str(n)]}} for n in range(50)]
    identifier = struct.pack("<HHI", 0x0010, 0x0020, 0)
    with Scu(here.ports["REFERENCE"], [(WORKLIST, (IMPLICIT,))]) as scu:
        query = data(value(1, 3, FIND_BYTES), value(1, 2, identifier))
        scu.socket.sendall(query + data(value(1, 3, STOP_BYTES)))
        assert hex(scu.status()) == hex(peers.CANCEL)
        scu.socket.sendall(query)
        assert [hex(scu.response()[0x0900][1]) for _ in range(51)] == ["0xff"] * 50 + ["0x0"]
    here.sandbox.bot = peers.silent_bot


def test_a_question_without_end_is_aborted_once(here):
    piece = data(*[value(1, 0, bytes(4000))] * 4)
    with Scu(here.ports["STRICT"], [(WORKLIST, (IMPLICIT,))], calling="CT1") as scu:
        address = f"127.0.0.1:{scu.socket.getsockname()[1]}"
        with contextlib.suppress(ConnectionError):
            scu.socket.sendall(data(value(1, 3, FIND_BYTES)))
            for _ in range(ma.IDENTIFIER_BYTES // len(piece) + 50):
                scu.socket.sendall(piece)
        with contextlib.suppress(ConnectionError):
            assert b"".join(iter(lambda: scu.socket.recv(65536), b"")) == aborted(0, source=0)
    assert len(warned(here, address)) == 1


def test_a_cancel_with_a_data_set_harms_nobody(here):
    """C-CANCEL has none (PS3.7 9.3.2.3); a device that sends one hears at most an A-ABORT, and the agent no error."""
    with contextlib.suppress(peers.Aborted), Scu(here.ports["REFERENCE"], [(WORKLIST, (IMPLICIT,))]) as scu:
        scu.request(1, {0x0100: 0x0FFF, 0x0120: 1}, bytes(8))
    with Scu(here.ports["REFERENCE"]) as scu:
        assert scu.echo() == SUCCESS
    assert "AssertionError" not in here.agent.main_log().decode()


@pytest.mark.parametrize("left_out", [0x0002, 0x1000])
def test_an_object_without_affected_class_or_instance_is_answered(here, left_out):
    """PS3.7 9.3.1.1: both are mandatory; the answer is a failure and the association goes on."""
    instance = peers.made(100)
    elements: dict[int, int | str] = {2: instance.sop_class, 0x0100: 1, 0x1000: instance.uid}
    del elements[left_out]
    with Scu.for_instances(here.ports["REFERENCE"], instance) as scu:
        scu.request(1, elements, instance.content)
        assert scu.status() != SUCCESS
        assert scu.store(instance) == SUCCESS
    peers.assert_no_spool(here)


BREAKS = {
    "inside its last value": lambda instance: instance.content[:-3],
    "inside a head": lambda instance: instance.content + b"\x10\0\x7f",
    "a whole file": peers.part10,
    "nothing at all": lambda instance: b"",
}


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, peers.BIG_ENDIAN])
@pytest.mark.parametrize("broken", BREAKS.values(), ids=BREAKS)
def test_what_is_no_whole_data_set_is_refused_and_leaves_nothing(here, broken, syntax):
    instance, good = peers.made(1000, syntax), peers.made(1000, syntax)
    with Scu.for_instances(here.ports["REFERENCE"], instance) as scu:
        assert hex(scu.store(instance._replace(content=broken(instance)))) == hex(peers.NOT_UNDERSTOOD)
        assert here.agent.rows(instance.uid) == []
        assert scu.store(good) == SUCCESS
    peers.assert_arrived(here, good)
    peers.assert_no_spool(here)


PADDING = element(0xFFFCFFFC, b"OB", bytes(6))


def whole_parts(order: str) -> list[bytes]:
    """The elements of a data set with sequences of either length, one in the other, and compressed pixels."""
    item, end_item, end = (struct.pack(f"{order}HHI", 0xFFFE, kind, 0) for kind in (0xE000, 0xE00D, 0xE0DD))
    endless = struct.pack(f"{order}I", 0xFFFFFFFF)
    inner = element(0x00080100, b"SH", b"A", order) + element(0x00091001, b"UN", b"xyz", order)
    fixed = item[:4] + struct.pack(f"{order}I", len(inner)) + inner
    nested = element(0x00082112, b"SQ", b"", order)[:8] + endless + item[:4] + endless + inner + end_item + end
    pixels = element(0x7FE00010, b"OB", b"", order)[:8] + endless + item + fixed[:8] + bytes(len(inner)) + end
    return [
        element(0x00080016, b"UI", b"1.2", order), element(0x00081140, b"SQ", fixed + fixed, order), nested,
        element(0x0020000D, b"UI", b"1.2.3", order), element(0x00204000, b"LT", b"", order), pixels,
    ]  # fmt: skip


@pytest.mark.parametrize(("syntax", "order"), [(EXPLICIT, "<"), (peers.BIG_ENDIAN, ">")])
def test_a_data_set_is_whole_at_the_end_of_an_element_only(syntax, order):
    parts = whole_parts(order)
    content, ends = b"".join(parts), set(itertools.accumulate(map(len, parts)))
    for cut in range(1, len(content) + 1):
        tail = content[max((end for end in ends if end <= cut), default=0) : cut]
        try:
            ma.check_whole(io.BytesIO(content[:cut]), 0, syntax)
            assert len(tail) < 8 and (not tail.strip(b"\0") or tail in (b" ", b"\r\n")), f"it ends with {tail!r}"
        except ma.Refusal as refusal:
            assert cut not in ends and refusal.status == peers.NOT_UNDERSTOOD, cut


def test_a_large_data_set_that_breaks_off_is_not_taken():
    """Behind 500,000 elements nothing was looked at, and its device could delete its copy."""
    many = ma.CHECKED_ELEMENTS * element(0x00080050, b"SH", b"", "<")
    ma.check_whole(io.BytesIO(many), 0, EXPLICIT)
    with pytest.raises(ma.Refusal, match="breaks off"):
        ma.check_whole(io.BytesIO(many + element(0x00100010, b"PN", b"Doe^John", "<")[:-1]), 0, EXPLICIT)


@given(st.binary(max_size=80), st.sampled_from([EXPLICIT, IMPLICIT, peers.BIG_ENDIAN]))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_whole_or_refused(content: bytes, syntax: str) -> None:
    with contextlib.suppress(ma.Refusal):
        ma.check_whole(io.BytesIO(whole_parts("<")[2] + content), 0, syntax)


@pytest.mark.parametrize("padding", [b"\0", bytes(7), bytes(8), bytes(99), b" ", b"\r\n", PADDING, PADDING + b"\0"])
def test_trailing_padding_is_kept(here, padding):
    instance = peers.made(1000)
    instance = instance._replace(content=instance.content + padding)
    with Scu.for_instances(here.ports["STANDARD"], instance) as scu:
        assert scu.store(instance) == SUCCESS
    elements = peers.assert_arrived(here, instance)["dataset"]
    assert {key for key in elements if not "0002" < key < "7FE1"} <= {"FFFCFFFC"}


# --- the JSON, beside dcmtk's (PS3.18 F.2) ---

FILES = peers.pydicom_files()
# see tests/test_dicom.py
REFUSED = "MR_truncated rtplan_truncated no_meta DICOMDIR-empty meta_missing_tsyntax nested_priv_SQ".split()
PIXELS = {"7FE00008", "7FE00009", "7FE00010"}


def announced(here: Site, channel: str, instance: Instance) -> tuple[dict[str, Any], set[str]]:
    """The data set of the message, and what was left out of it."""
    title = f"{channel[0]}{next(_titles)}"
    with Scu.for_instances(here.ports[channel], instance, calling=title) as scu:
        assert scu.store(instance) == SUCCESS
    body = peers.announced(here, f'"callingAeTitle":"{title}"')
    return {key: e for key, e in body["dataset"].items() if key[:4] != "0002"}, set(body.get("omitted", ()))


_titles = iter(range(10**6))


def dcm2json(path: Path, instance: Instance) -> tuple[dict[str, Any], bool]:
    """dcmtk's JSON; whether its text is good. It wants no compressed pixels, and cannot convert every character set."""
    erase, latin = ["-ea", "(7fe0,0010)"], ["-m", "(0008,0005)=ISO_IR 100"]
    own = instance.syntax
    for syntax, changes in ((own, []), (own, erase), (own, latin), (own, erase + latin), (IMPLICIT, erase)):
        path.write_bytes(peers.part10(instance._replace(syntax=syntax)))
        if changes:
            peers.dcmtk("dcmodify", "-nb", "-ie", "-imt", *changes, path)
        ran = subprocess.run(["dcm2json", "-q", "-ee", "-fc", path], capture_output=True, timeout=60)
        with contextlib.suppress(ValueError):
            return json.loads(ran.stdout.decode()), changes in ([], erase)
    raise AssertionError(f"dcm2json cannot read {path}")


def is_large(element: dict[str, Any]) -> bool:
    return len(base64.b64decode(element.get("InlineBinary", ""))) > ma.INLINE_BYTES


def plain(element: dict[str, Any], text: bool, left_out: set[str]) -> Any:
    """Without what is documented to differ: formats of numbers, carets that end a name, large values; `text`: any."""
    vr, values = element["vr"], element.get("Value", [])
    if vr == "SQ":
        left_out = left_out | {"00080005"}  # ours says UTF-8, which it is
        kept = [{k: e for k, e in one.items() if k not in left_out and not is_large(e)} for one in values]
        return vr, [{k: plain(e, text, left_out) for k, e in one.items()} for one in kept]
    if "InlineBinary" in element:
        return vr, element["InlineBinary"]

    def single(one: Any) -> Any:
        if isinstance(one, dict):
            return {kind: found for kind, part in one.items() if (found := single(part.rstrip("^")))} or None
        if isinstance(one, str):
            return one if text or (one.isascii() and "\x1b" not in one) else "?"
        return one if one is None else float(f"{one:.{7 if vr == 'FL' else 12}g}")  # dcmtk's are off by the last bits

    found = [single(one) for one in values]
    return vr, [] if found == [None] else found


def in_reference_form(element: dict[str, Any]) -> dict[str, Any]:
    if element["vr"] == "SQ":
        items = [{k: in_reference_form(e) for k, e in one.items()} for one in element.get("Value", [])]
        return element | {"Value": items}
    empty = not element.keys() & {"Value", "InlineBinary"}
    return element | ({"Value": [] if element["vr"] == "PN" else [""]} if empty else {})


@peers.needs_dcmtk
@pytest.mark.parametrize("name", [name for name in FILES if Path(name).stem not in REFUSED])
def test_the_json_is_that_of_dcmtk(here, tmp_path, name):
    """Element by element, behind the pixel data as well, without group lengths (F.2.2)."""
    instance = peers.read_instance(FILES[name])
    ours, omitted = announced(here, "STANDARD", instance)
    theirs, text = dcm2json(tmp_path / "object.dcm", instance)
    padding = {"FFFCFFFC"} & set(ours)  # dcmodify drops it
    assert set(ours) | (omitted & set(theirs)) == set(theirs) - PIXELS | padding
    for key in omitted & set(theirs):
        assert len(json.dumps(theirs[key])) > ma.INLINE_BYTES, f"{key} is small, and was left out"
    for key in ours.keys() - {"00080005"} - padding:  # dcmtk says that it made UTF-8 of it
        if theirs[key]["vr"] != "UN":
            assert plain(ours[key], text, PIXELS) == plain(theirs[key], text, PIXELS | omitted), key
        elif ours[key]["vr"] in ("CS", "LO", "SH", "UI"):  # dcmtk left the VR as it was, or does not know it
            raw = base64.b64decode(theirs[key].get("InlineBinary", "")).rstrip(b"\0 ")
            assert "\\".join(ours[key].get("Value", [])).encode() == raw, key
    reference, left_out = announced(here, "REFERENCE", instance)
    assert reference == {key: in_reference_form(e) for key, e in ours.items()} and left_out == omitted


OWN = ("00080005", "00080016", "00080018")


def json_of(here: Site, *elements: bytes, syntax: str = EXPLICIT) -> dict[str, Any]:
    """The elements' values, sent as an object of their own."""
    order, uid = ">" if syntax == peers.BIG_ENDIAN else "<", peers.new_uid()
    own = (element(0x00080016, b"UI", SECONDARY.encode(), order), element(0x00080018, b"UI", uid.encode(), order))
    content = b"".join((*elements[:1], *own, *elements[1:]))
    found, _ = announced(here, "STANDARD", Instance(SECONDARY, uid, syntax, content))
    return {key: e.get("Value", e.get("InlineBinary")) for key, e in found.items() if key not in OWN}


def test_several_values_some_of_them_empty(here):
    """PS3.18 F.2.5: an empty value among others is null; F.2.2: groups of a name that are empty are left out."""
    elements = [
        element(0x00080008, b"CS", rb"A\\B\ "), element(0x00081030, b"LO", rb"\x"), element(0x00081050, b"PN", b"=C"),
        element(0x00081048, b"PN", rb"A^B\\=C"), element(0x00081150, b"UI", b"1.2\\\\1.3"),
        element(0x00181152, b"IS", rb"\2"), element(0x00189322, b"DS", rb"1.5\\2"), element(0x00200020, b"CS", b""),
    ]  # fmt: skip
    content = element(0x00080000, b"UL", bytes(4)) + b"".join(elements)
    nested = element(0x00404000, b"SQ", struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content)
    found = json_of(here, *elements, nested)
    (inner,) = found.pop("00404000")
    assert found == {
        "00080008": ["A", None, "B", None], "00081030": [None, "x"], "00081050": [{"Ideographic": "C"}],
        "00081048": [{"Alphabetic": "A^B"}, None, {"Ideographic": "C"}], "00081150": ["1.2", None, "1.3"],
        "00181152": [None, 2], "00189322": [1.5, None, 2], "00200020": None,
    }  # fmt: skip
    assert {key: e.get("Value") for key, e in inner.items()} == found


def test_binary_values_of_big_endian_objects_are_little_endian(here):
    """PS3.18 F.2.7, in a sequence as well; bytes (OB, UN) stay as they are."""

    def values(order: str) -> list[bytes]:
        kinds = "OW4H OF3f OL3I OD2d OV2Q OB4B UN4B".split()
        return [
            element(0x00091001 + n, kind[:2].encode(), struct.pack(order + kind[2:], *range(int(kind[2]))), order)
            for n, kind in enumerate(kinds)
        ]

    def nested(order: str) -> bytes:
        content = b"".join(values(order))
        head = struct.pack(f"{order}HHI", 0xFFFE, 0xE000, len(content))
        return element(0x00404000, b"SQ", head + content, order)

    character_set = [element(0x00080005, b"CS", b"ISO_IR 100", order) for order in "<>"]
    little = json_of(here, character_set[0], *values("<"), nested("<"))
    big = json_of(here, character_set[1], *values(">"), nested(">"), syntax=peers.BIG_ENDIAN)
    assert little == big
    assert base64.b64decode(big["00091001"]) == struct.pack("<4H", 0, 1, 2, 3)
    assert {e["vr"]: e["InlineBinary"] for e in big["00404000"][0].values()}["OV"] == big["00091005"]


PN, LT, LO = 0x00100010, 0x00104000, 0x00081030
ROWS = b"".join(
    b"%d.\x1b$)A\xb5\xda%s\xd0\xd0\xce\xc4\xd7\xd6\xa1\xa3\r\n" % (n, count)
    for n, count in ((1, b"\xd2\xbb"), (2, b"\xb6\xfe"), (3, b"\xc8\xfd"))
)
KOREAN = b"\x1b$)CThe first line includes \xc7\xd1\xb1\xdb.\r\n\x1b$)CThe second line includes \xc7\xd1\xb1\xdb, too."
TEXTS: dict[str, tuple[bytes, bytes, bytes, Any]] = {
    "H.3-1": (
        rb"\ISO 2022 IR 87", b"PN",
        b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B",
        {"Alphabetic": "Yamada^Tarou", "Ideographic": "山田^太郎", "Phonetic": "やまだ^たろう"},
    ),
    "H.3-2": (
        rb"ISO 2022 IR 13\ISO 2022 IR 87", b"PN",
        b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J=\x1b$B$d$^$@\x1b(J^\x1b$B$?$m$&\x1b(J",
        {"Alphabetic": "ﾔﾏﾀﾞ^ﾀﾛｳ", "Ideographic": "山田^太郎", "Phonetic": "やまだ^たろう"},
    ),
    "H, supplementary kanji": (
        rb"\ISO 2022 IR 87\ISO 2022 IR 159", b"PN", b"Mori^Ogai=\x1b$B?9\x1b(B^\x1b$(Dl?\x1b$B30\x1b(B",
        {"Alphabetic": "Mori^Ogai", "Ideographic": "森^鷗外"},
    ),
    "H, text": (rb"\ISO 2022 IR 87", b"LT", b"1 \x1b$B;3ED\x1b(B\r\n2 \x1b$BB@O:\x1b(B.", "1 山田\r\n2 太郎."),
    "I.2-1": (
        rb"\ISO 2022 IR 149", b"PN",
        b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf",
        {"Alphabetic": "Hong^Gildong", "Ideographic": "洪^吉洞", "Phonetic": "홍^길동"},
    ),
    "I.3-1": (
        rb"\ISO 2022 IR 149", b"LT", KOREAN, "The first line includes 한글.\r\nThe second line includes 한글, too.",
    ),
    "K.2-1": (
        rb"\ISO 2022 IR 58", b"PN", b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab=",
        {"Alphabetic": "Zhang^XiaoDong", "Ideographic": "张^小东"},
    ),
    "K.3-1": (rb"\ISO 2022 IR 58", b"LT", ROWS, "1.第一行文字。\r\n2.第二行文字。\r\n3.第三行文字。\r\n"),
    "K, values": (rb"\ISO 2022 IR 58", b"LO", b"\x1b$)A\xd0\xa1\xb6\xab\\\x1b$)A\xd5\xc5", None),
}  # fmt: skip


@pytest.mark.parametrize(("charset", "vr", "content", "expected"), TEXTS.values(), ids=TEXTS)
def test_code_extensions_become_clean_text(here, charset, vr, content, expected):
    """The examples of PS3.5 annexes H to K, in the data set and in an item of a sequence."""
    one = element({b"PN": PN, b"LT": LT, b"LO": LO}[vr], vr, content)
    nested = element(0x00404000, b"SQ", struct.pack("<HHI", 0xFFFE, 0xE000, len(one)) + one)
    key, inner = json_of(here, element(0x00080005, b"CS", charset), one, nested).values()
    assert key == ([expected] if expected else ["小东", "张"])
    assert [e["Value"] for e in inner[0].values()] == [key]


def test_a_number_that_cannot_be_read_is_no_other_number() -> None:
    """`US or SS` in implicit VR of which pydicom cannot say what it is: the two bytes of 12849, "12", became 12."""
    ma.imaging()
    omitted: list[str] = []
    perimeter = read_dataset(io.BytesIO(struct.pack("<HHIH", 0x0028, 0x0071, 2, 12849)), True, True)
    assert (ma.dicom_json(perimeter, omitted), omitted) == ({}, ["00280071"])


@pytest.mark.parametrize(
    ("tag", "vr", "values", "text"),
    [
        ("00100020", "LO", [12345], b"12345 "), ("00080020", "DA", [20260101], b"20260101"),
        ("00081030", "LO", [1, "a", None], b"1\\a\\"), ("00080061", "CS", [7, 8], b"7\\8 "),
        ("00104000", "LT", [5], b"5 "), ("00200032", "DS", [1.5, None, 2], b"1.5\\\\2.0"),
    ],
)  # fmt: skip
def test_a_number_where_text_belongs_is_text(tag, vr, values, text):
    """JavaScript makes a number of a patient's number; the whole worklist could not be written for it."""
    written = ma.write_dataset(ma.dataset_of({tag: {"vr": vr, "Value": values}}), IMPLICIT)
    assert written == struct.pack("<HHI", int(tag[:4], 16), int(tag[4:], 16), len(text)) + text
