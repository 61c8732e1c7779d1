"""Foreign DICOM peers of the agent as a requestor: what a push or a move meets that no library's SCP does."""

import contextlib
import json
import queue
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from medplum_agent import JSON_TYPE
from tests.dicom_peers import (
    ABORT,
    FAST,
    P_DATA,
    QUIET,
    RELEASE_RP,
    RELEASE_RQ,
    STUDY_MOVE,
    SUCCESS,
    VERIFICATION,
    Bot,
    Instance,
    RawPeer,
    Storescp,
    _item,
    acceptance,
    associated,
    command_set,
    counts,
    data_set,
    imaging_site,
    keep,
    made,
    needs_dcmtk,
    new_uid,
    part10,
)
from tests.support import Caller, Site, changed, site

pytestmark = QUIET
FIND = json.dumps({"command": "C-FIND", "level": "STUDY", "dataset": {"0020000D": {"vr": "UI"}}})


class Talk:
    """One association that the agent opened, in raw bytes."""

    def __init__(self, connection: socket.socket, user: bytes):
        self.socket, self.reading, self.user = connection, connection.makefile("rb"), user
        self.pdus: list[int] = []  # what came behind the association request
        self.odd = 0  # fragments of an odd length, which must not be (PS3.8 annex E.1)

    def send(self, kind: int, content: bytes = bytes(4)) -> None:
        self.socket.sendall(struct.pack(">BxI", kind, len(content)) + content)

    def pdu(self) -> tuple[int, bytes]:
        kind, length = struct.unpack(">BxI", self.reading.read(6) or bytes(6))
        return kind, self.reading.read(length)

    def associate(self) -> None:
        _, content = self.pdu()
        self.send(2, acceptance(content, self.user))

    def heard(self, enough: int = 2**40) -> tuple[int, int, bytes]:
        """The context, the command field and the data set of the next message; of so many bytes, or what there is."""
        command, data, fields = bytearray(), bytearray(), dict[int, int]()
        while True:
            kind, content = self.pdu()
            self.pdus.append(kind)
            if kind == RELEASE_RQ:
                self.send(RELEASE_RP)
            if kind != P_DATA:
                raise EOFError
            while content:
                size, context, flags = struct.unpack_from(">IBB", content)
                (command if flags & 1 else data).extend(content[6 : 4 + size])
                self.odd += size % 2
                content = content[4 + size :]
                if flags & 1 and flags & 2:
                    fields = dict(self._elements(bytes(command)))
                if len(data) > enough or (flags & 2 and (not flags & 1 or fields[0x0800] == 0x0101)):
                    return context, fields[0x0100], bytes(data)

    @staticmethod
    def _elements(command: bytes) -> Iterator[tuple[int, int]]:
        while command:
            _, number, size = struct.unpack_from("<HHI", command)
            yield number, int.from_bytes(command[8 : 8 + size], "little")
            command = command[8 + size :]

    def answer(self, context: int, field: int, status: int, data: bytes | None = None, **more: Any) -> None:
        fields = {0x0100: field | 0x8000, 0x0120: 1, 0x0800: 0x0101 if data is None else 1, 0x0900: status}
        command = command_set(fields | {int(name[1:], 16): value for name, value in more.items()})
        self.send(P_DATA, struct.pack(">IBB", len(command) + 2, context, 3) + command)
        if data is not None:
            self.send(P_DATA, struct.pack(">IBB", len(data) + 2, context, 2) + data)


class Peer(RawPeer):
    """An application entity that behaves as `behave` says, which gets each association when it is established."""

    def __init__(self, behave: Callable[[Talk], object], max_pdu: int = 16_384):
        self.behave, self.talks = behave, list[Talk]()
        self._user = _item(0x51, struct.pack(">I", max_pdu))
        super().__init__("PEER")

    def serve(self, connection: socket.socket) -> None:
        self.talks.append(talk := Talk(connection, self._user))
        with contextlib.suppress(OSError, EOFError), connection, talk.reading:
            talk.associate()
            self.behave(talk)
            while True:
                talk.heard()


def storing(talk: Talk) -> None:
    """Answers each object with success."""
    while True:
        context, field, _ = talk.heard()
        talk.answer(context, field, SUCCESS)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Iterator[Site]:
    with imaging_site(tmp_path_factory.mktemp("callers"), {"PACS": f"dicom://127.0.0.1:{{port}}?{FAST}"}) as running:
        running.agent.wait_connected()
        yield running


@pytest.fixture(scope="module")
def caller(here) -> Iterator[Caller]:
    with here.caller() as calling:
        yield calling


def stored(here: Site, caller: Caller, address: str, *objects: Instance) -> list[tuple[int, str]]:
    """HTTP status and text of a push of each object that waits for its answer."""
    bodies = [json.dumps({"command": "C-STORE", "binary": {"reference": one}}) for one in keep(here, *objects)]
    answers = [caller.push(f"dicom://{address}", body, contentType=JSON_TYPE) for body in bodies]
    return [(answer.status, answer.text) for answer in answers]


DONE = (200, '{"command":"C-STORE","status":0}')


@needs_dcmtk
def test_fragments_are_even(here, caller, tmp_path):
    """A peer whose PDUs may have an odd length got odd fragments, and an object of an odd length (JPEG without padding,
    deflated) ended so: dcmtk aborts, and Orthanc, which is made of it, says nothing more."""
    broken = made(1000)
    broken = broken._replace(content=broken.content[:-1])
    with Peer(storing, 16_383) as peer, Storescp(tmp_path / "got") as archive:
        assert stored(here, caller, peer.address, made(100_000)) == [DONE]
        assert peer.talks[0].odd == 0
        assert stored(here, caller, archive.address, broken) == [DONE]
        assert archive.instances()[broken.uid] == broken.content + b"\0"


def asked(caller: Caller, address: str, body: str = FIND) -> tuple[int, str]:
    """HTTP status and text of a push that waits for its answer, without the address."""
    answer = caller.push(f"dicom://{address}", body, contentType=JSON_TYPE)
    return answer.status, answer.text.removeprefix(f"dicom://{address}: ")


def aborting(talk: Talk) -> None:
    talk.send(ABORT, bytes((0, 0, 2, 1)))


def hanging_up(talk: Talk) -> None:
    talk.socket.shutdown(socket.SHUT_RDWR)


def releasing(talk: Talk) -> None:
    talk.send(RELEASE_RQ)


ENDS = [
    (aborting, "the device aborted it (unrecognized PDU)"), (hanging_up, "it hangs up"), (releasing, "it was released"),
    (lambda talk: talk.send(P_DATA, bytes(2_000_000)), "aborted: a PDU of 2000000 bytes"),
    (lambda talk: talk.send(72), "aborted: an unknown PDU of type 72"),
]  # fmt: skip


@pytest.mark.parametrize(("end", "words"), ENDS)
def test_why_an_association_ended_is_said(caller, end, words):
    """`it ended the association`, also where we had aborted for what it sent, and without the reason of its own
    abort."""

    def behave(talk: Talk) -> None:
        talk.heard()
        end(talk)

    with Peer(behave) as peer:
        assert asked(caller, peer.address) == (400, f"the association ended: {words}")


@pytest.mark.parametrize("end", [aborting, hanging_up])
@pytest.mark.parametrize(
    ("status", "words"),
    [(0xA700, "status 0xA700 (NO ROOM)"), (SUCCESS, "the association ended before the request did")],
)
def test_a_refusal_before_the_end_of_an_object_is_heard(here, caller, end, status, words):
    """An archive that refuses an object before it has read it, and ends the association: `it ended the association`,
    and the object was sent again and again. What it calls a success is none, where it has not got the whole object."""

    def behave(talk: Talk) -> None:
        context, field, _ = talk.heard(100)
        talk.answer(context, field, status, x0902="NO ROOM ")
        end(talk)
        while talk.reading.read(65_536):
            pass

    with Peer(behave) as peer:
        ((code, text),) = stored(here, caller, peer.address, made(5_000_000))
        assert (code, text.removeprefix(f"dicom://{peer.address}: ")) == (400, words)


def test_a_line_that_is_lost_is_not_aborted(tmp_path):
    """`Exception in callback Line.abort() (AttributeError)`, a second after an abort that met bytes not yet sent: it
    would also end a push or a move whose release comes to it, without an answer."""

    def behave(talk: Talk) -> None:
        talk.heard(100)
        aborting(talk)
        talk.pdu()

    with site(tmp_path, {"PACS": "dicom://127.0.0.1:{port}"}, start=False) as here, Peer(behave) as peer:
        changed(here.agent, "m.HANG_UP_SECS = 0.01")
        here.agent.start()
        with here.caller() as caller:
            for _ in range(5):
                ((code, _),) = stored(here, caller, peer.address, made(5_000_000))
                assert code == 400
        assert b"Exception" not in here.agent.main_log()


@pytest.mark.parametrize("match", [bytes(60_000), b""], ids=["large", "empty"])
def test_matches_without_end(caller, match):
    """They gathered in memory until the push was given up: 1.5 GB within 9 s, and a stored push has 600 s. An answer of
    more than 1 MB reaches nobody."""

    def behave(talk: Talk) -> None:
        context, field, _ = talk.heard()
        while True:
            talk.answer(context, field, 0xFF00, match)

    with Peer(behave) as peer:
        ended = "the association ended: aborted: its answers are too large together, or too many"
        assert asked(caller, peer.address) == (400, ended)


@needs_dcmtk
def test_an_object_goes_by_its_own_uids(here, caller, tmp_path):
    """Not by those of the file's head, which who anonymizes an object often forgets: archives refuse it (0xA900)."""
    one = made(100)
    reference = keep(here, one)[0]
    here.sandbox.sandbox.binaries[reference] = part10(one._replace(uid=new_uid()))
    with Storescp(tmp_path / "own", "-B") as archive:
        body = json.dumps({"command": "C-STORE", "binary": {"reference": reference}})
        assert asked(caller, archive.address, body) == DONE
        assert list(archive.instances()) == [one.uid]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has TCP_QUICKACK")
def test_an_answer_in_two_writes_waits_for_no_delayed_ack(tmp_path):
    """As dcmtk and Orthanc write it: 45 ms an object, of which 40 went by until we acknowledged the first write."""

    def behave(talk: Talk) -> None:
        while True:
            context, field, _ = talk.heard()
            command = command_set({0x0100: field | 0x8000, 0x0120: 1, 0x0800: 0x0101, 0x0900: SUCCESS})
            whole = struct.pack(">BxIIBB", P_DATA, len(command) + 6, len(command) + 2, context, 3) + command
            talk.socket.sendall(whole[:12])
            talk.socket.sendall(whole[12:])

    with Peer(behave) as peer:
        address = f"dicom://127.0.0.1:{{port}}?{FAST}&moveDestinations={peer.address}"
        with imaging_site(tmp_path, {"PACS": address}) as here:
            here.agent.wait_connected()
            here.sandbox.bot = bot = Bot()
            bot.replies["C-MOVE"] = keep(here, *(made(100) for _ in range(250)))
            study, started = data_set(QueryRetrieveLevel="STUDY", StudyInstanceUID="1.2.3"), time.monotonic()
            with associated(here, STUDY_MOVE) as scu:
                (last, _) = list(scu.send_c_move(study, "PEER", STUDY_MOVE))[-1]
            assert counts(last)[1:] == (250, 0, 0)
            assert time.monotonic() - started < 9  # it took more than 10


def test_a_request_that_meets_our_release_is_not_answered(caller):
    """PS3.8 9.2, Sta7: nothing but A-RELEASE-RP and A-ABORT may follow our A-RELEASE-RQ."""
    rest = queue.SimpleQueue[bytes]()

    def behave(talk: Talk) -> None:
        context, field, _ = talk.heard()
        talk.answer(context, field, SUCCESS)
        assert talk.pdu()[0] == RELEASE_RQ
        echo = command_set({0x0002: VERIFICATION, 0x0100: 0x30, 0x0110: 7, 0x0800: 0x0101})
        talk.send(P_DATA, struct.pack(">IBB", len(echo) + 2, context, 3) + echo)
        talk.send(RELEASE_RP)
        rest.put(talk.reading.read())

    with Peer(behave) as peer:
        assert asked(caller, peer.address, '{"command": "C-ECHO"}')[0] == 200
        assert rest.get(timeout=10) == b""


def test_objects_that_are_refused_before_their_end_are_offered_once_each(tmp_path):
    """An archive that refuses each object at its beginning and aborts: each went twice, and behind three of them the
    rest of the study was given up as if it had said nothing."""
    offered: list[int] = []

    def refusing(talk: Talk) -> None:
        context, field, data = talk.heard(1)
        offered.append(len(data))
        talk.answer(context, field, 0xA700)
        aborting(talk)
        talk.reading.read()

    with Peer(refusing) as peer:
        address = f"dicom://127.0.0.1:{{port}}?{FAST}&moveDestinations={peer.address}"
        with imaging_site(tmp_path, {"PACS": address}) as here:
            here.agent.wait_connected()
            here.sandbox.bot = bot = Bot()
            bot.replies["C-MOVE"] = keep(here, *(made(2_000_000) for _ in range(5)))
            study = data_set(QueryRetrieveLevel="STUDY", StudyInstanceUID="1.2.3")
            with associated(here, STUDY_MOVE) as scu:
                (last, _) = list(scu.send_c_move(study, "PEER", STUDY_MOVE))[-1]
    assert (counts(last)[1:], len(offered)) == ((0, 5, 0), 5)
