"""Workflows of imaging devices on networks that are slow, silent or half gone: retrieval, commitment, pushes."""

import contextlib
import json
import socket
import sys
import threading
import time
from typing import Any

import pytest
from pynetdicom import AE, evt

from medplum_agent import DICOM_PUSHES, JSON_TYPE
from tests.dicom_peers import (
    COMMITMENT,
    COMMITMENT_INSTANCE,
    EXPLICIT,
    FAST,
    IMPLICIT,
    MPPS,
    QUIET,
    SECONDARY,
    STUDY_FIND,
    STUDY_GET,
    STUDY_MOVE,
    SUCCESS,
    WORKLIST,
    Bot,
    Destination,
    Instance,
    Receiving,
    Rejected,
    Scu,
    assert_no_spool,
    associated,
    commit,
    counts,
    data_set,
    encoded,
    keep,
    made,
    new_uid,
    spooled,
    start,
)
from tests.support import changed, eventually, free_ports, site

pytestmark = QUIET
STUDY = data_set(QueryRetrieveLevel="STUDY", StudyInstanceUID="1.2.3.4")
ECHO = json.dumps({"command": "C-ECHO"})


@contextlib.contextmanager
def imaging(folder, query="", code=""):
    with site(folder, {"PACS": f"dicom://127.0.0.1:{{port}}?{query}&{FAST}"}, start=False) as here:
        if code:
            changed(here.agent, code)
        here.sandbox.bot = Bot()
        start(here)
        here.agent.wait_connected()
        yield here


class SlowLine:
    """A line to `port` that is slow but never silent: one piece of 64 KB every 20 ms in each direction, 3 MB/s."""

    def __init__(self, port, cut=sys.maxsize):
        """It breaks after `cut` bytes in one direction."""
        self.target, self.cut = port, cut
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                one, _ = self.listener.accept()
                other = socket.socket()
                other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                other.connect(("127.0.0.1", self.target))
                for pair in ((one, other), (other, one)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source, sink):
        carried = 0
        with contextlib.suppress(OSError):
            while carried < self.cut and (piece := source.recv(65536)):
                carried += len(piece)
                sink.sendall(piece)
                time.sleep(0.02)  # this is the line
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                if carried >= self.cut:
                    end.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()


# --- retrieval by a device ---


def test_a_device_that_stops_reading_its_matches_gives_its_association_back(tmp_path):
    """A C-FIND SCU that hangs keeps its place among maxConnections for ever (its TCP still answers keep-alives).

    Clause: README `maxConnections`; C-GET does it already (test of test_dicom_query:
    a_device_that_stops_reading_gives_its_association_back).
    """
    with imaging(tmp_path, "maxConnections=1", "m.DIMSE_SECS = m.UNREAD_SECS = 1") as here:
        bot = here.sandbox.bot
        bot.replies["C-FIND"] = [{"00104000": {"vr": "LT", "Value": ["x" * 9000]}}] * 1500
        stuck = Scu(here.ports["PACS"], [(WORKLIST, (IMPLICIT,))])
        with contextlib.closing(stuck.socket):
            stuck.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            key = encoded(data_set(PatientName=""), IMPLICIT)
            stuck.request(1, {2: WORKLIST, 0x0100: 0x0020}, key)
            here.sandbox.wait_for(lambda: bot.asked)

            def served():
                with contextlib.suppress(Rejected), Scu(here.ports["PACS"]) as other:
                    return other.echo() == SUCCESS
                return False

            assert not served()
            eventually(served, 12)


def test_a_destination_that_says_nothing_is_said_to_say_nothing(tmp_path):
    """The log lies: `status 0x0110` for one that said nothing, or aborted.

    Clause: PS3.7 C.5 (0110 is an answer); README: the log says why.
    """
    with Destination() as dest, imaging(tmp_path, f"moveDestinations={dest.address}", "m.DIMSE_SECS = 1") as here:
        here.sandbox.bot.replies["C-MOVE"] = keep(here, made(100))
        dest.gate.clear()
        with associated(here, STUDY_MOVE) as scu:
            (last, _) = list(scu.send_c_move(STUDY, "DEST", STUDY_MOVE))[-1]
        dest.gate.set()
        assert last.Status == 0xA702
        log = here.agent.main_log().decode()
        assert "cannot be sent: no answer came" in log and "cannot be sent: status" not in log, log[-600:]


def test_a_destination_that_says_nothing_is_not_asked_for_every_object(tmp_path):
    """A C-MOVE of 500 objects to a destination that hangs takes 500 times DIMSE_SECS (8 hours), a thread all the
    while.

    Clause: PS3.4 C.4.2.3.1 (failed sub-operations are counted, A702 when none can be performed).
    """
    with Destination() as dest:
        asked: list[object] = []
        assert dest.server is not None
        dest.server.bind(evt.EVT_REQUESTED, asked.append)
        with imaging(tmp_path, f"moveDestinations={dest.address}", "m.DIMSE_SECS = 1") as here:
            here.sandbox.bot.replies["C-MOVE"] = keep(here, *(made(100) for _ in range(6)))
            dest.gate.clear()
            with associated(here, STUDY_MOVE) as scu:
                (last, _) = list(scu.send_c_move(STUDY, "DEST", STUDY_MOVE))[-1]
            dest.gate.set()
            assert (last.Status, counts(last)[1:]) == (0xA702, (0, 6, 0))
            assert len(asked) < 6, f"{len(asked)} associations, each kept for DIMSE_SECS"


def test_a_move_over_a_slow_line(tmp_path):
    """An object that takes more than 60 s to send (500 MB at 50 Mbit/s) can never be moved, though bytes flow.

    Clause: PS3.4 C.4.2.3.1, each object is sent; DIMSE_SECS is `to wait for the peer's answer`. C-GET does it
    right.
    """
    with Destination() as dest, SlowLine(dest.port) as line:
        query = f"moveDestinations=DEST@127.0.0.1:{line.port}"
        with imaging(tmp_path, query, "m.DIMSE_SECS = 2") as here:
            here.sandbox.bot.replies["C-MOVE"] = keep(here, made(24_000_000))
            with associated(here, STUDY_MOVE) as scu:
                scu.dimse_timeout = 60
                (last, _) = list(scu.send_c_move(STUDY, "DEST", STUDY_MOVE))[-1]
            assert (last.Status, counts(last)[1:]) == (SUCCESS, (1, 0, 0))


def test_the_next_objects_come_while_one_is_sent(tmp_path):
    """One at a time, each waited for its round trip to the cloud: a study of 500 objects took minutes longer."""
    with Destination() as dest, imaging(tmp_path, f"moveDestinations={dest.address}") as here:
        objects = [made(100) for _ in range(9)]
        here.sandbox.bot.replies["C-MOVE"] = [*keep(here, *objects[:4]), "Binary/missing", *keep(here, *objects[4:])]
        answers: list[Any] = []
        with associated(here, STUDY_MOVE) as scu:

            def move():
                answers.extend(status for status, _ in scu.send_c_move(STUDY, "DEST", STUDY_MOVE))

            dest.gate.clear()
            moving = threading.Thread(target=move)
            moving.start()
            eventually(lambda: len(spooled(here)) == 4)
            dest.gate.set()
            moving.join()
            assert (answers[-1].Status, counts(answers[-1])[1:]) == (0xB000, (9, 1, 0))
            assert [arrival.uid for arrival in dest.arrivals] == [one.uid for one in objects]
            assert_no_spool(here)
            scu.dimse_timeout = 2  # it does not notice its own abort
            dest.gate.clear()
            moving = threading.Thread(target=move)
            moving.start()
            eventually(lambda: len(spooled(here)) == 4)
            scu.abort()
            dest.gate.set()
        assert_no_spool(here)
        moving.join()
        assert "Internal error" not in here.agent.main_log().decode()


def test_a_move_that_the_server_keeps_waiting_holds_up_no_other(tmp_path):
    """One that fetched ahead took all there is for downloads: others, and pushes of objects, waited for its end."""
    with Destination() as dest, imaging(tmp_path, f"moveDestinations={dest.address}") as here:
        free, held = keep(here, made(100)), [f"Binary/held-{n}" for n in range(5)]
        here.sandbox.sandbox.faults.hold = "/fhir/R4/Binary/held"
        replies, seen = iter([held, free]), here.sandbox.bot.replies
        seen["C-MOVE"] = lambda _: next(replies)
        with associated(here, STUDY_MOVE) as first, associated(here, STUDY_MOVE) as second:
            waiting = threading.Thread(target=lambda: list(first.send_c_move(STUDY, "DEST", STUDY_MOVE)))
            waiting.start()
            eventually(lambda: len(spooled(here)) == 4)
            second.dimse_timeout = 10
            assert list(second.send_c_move(STUDY, "DEST", STUDY_MOVE))[-1][0].Status == SUCCESS
            here.sandbox.sandbox.faults.hold = ""
            waiting.join()


def test_an_object_is_never_whole_in_memory(tmp_path):
    """pynetdicom cut it into PDUs and queued them all: 200 MB more than its size, for each that was on its way."""
    with Destination() as dest, imaging(tmp_path, f"moveDestinations={dest.address}") as here:
        small, large = keep(here, made(100), made(300_000_000))
        with associated(here, STUDY_MOVE) as scu:
            scu.dimse_timeout = 60
            for reference in (small, large):
                here.sandbox.bot.replies["C-MOVE"] = [reference]
                here.agent.forget_peak()
                before = here.agent.memory_kb()
                (last, _) = list(scu.send_c_move(STUDY, "DEST", STUDY_MOVE))[-1]
                assert last.Status == SUCCESS
                assert here.agent.memory_kb() < before + 60_000


def test_a_line_that_breaks_in_the_middle_of_an_object(tmp_path):
    """Whoever waits for the line hears that it is gone, and the next objects are tried, but not for ever."""
    with (
        Destination() as dest, SlowLine(dest.port, cut=3_000_000) as line,
        imaging(tmp_path, f"moveDestinations=DEST@127.0.0.1:{line.port}") as here,
    ):  # fmt: skip
        here.sandbox.bot.replies["C-MOVE"] = keep(here, made(100), *(made(9_000_000) for _ in range(4)), made(100))
        with associated(here, STUDY_MOVE) as scu:
            (last, _) = list(scu.send_c_move(STUDY, "DEST", STUDY_MOVE))[-1]
        assert (last.Status, counts(last)[1:]) == (0xB000, (1, 5, 0))
        here.agent.logged("the association ended: ")


def test_a_get_in_another_syntax_over_a_slow_line(tmp_path):
    """The device reads all the time, and is aborted: an object that is converted must be through in 60 s.

    Explicit stored and Implicit taken (or the other way round), 100 MB at 10 Mbit/s. As it is, it passes. Clause:
    PS3.4 C.4.3.3.1; DIMSE_SECS is for the peer's answer, not for the line.
    """
    with imaging(tmp_path, "", "m.DIMSE_SECS = 2") as here, SlowLine(here.ports["PACS"]) as line:
        here.sandbox.bot.replies["C-GET"] = keep(here, made(24_000_000, EXPLICIT))
        here.ports["PACS"] = line.port
        got = Receiving()
        with associated(here, STUDY_GET, storage=[(SECONDARY, IMPLICIT)], handlers=got.handlers) as scu:
            scu.dimse_timeout = scu.network_timeout = 60
            (last, _) = list(scu.send_c_get(STUDY, STUDY_GET))[-1]
        assert last.get("Status") == SUCCESS, here.agent.main_log().decode()[-600:]
        assert len(got.got) == 1


def test_commitment_reports_are_not_behind_moves_to_a_destination_that_says_nothing(tmp_path):
    """Eight C-MOVEs to a hanging workstation, and no device gets its N-EVENT-REPORT (nor others their objects).

    Clause: PS3.4 J.3.3; an archive that hangs holds up no other (test_networks).
    """
    with Destination() as hung, Destination("CT1") as modality:
        query = f"moveDestinations={hung.address},{modality.address}"
        with imaging(tmp_path, query) as here, contextlib.ExitStack() as stack:
            bot = here.sandbox.bot
            bot.replies["C-MOVE"] = keep(here, made(100))
            bot.replies["N-ACTION"] = lambda question: {"committed": ["1.2.3"]}
            hung.gate.clear()
            begun = threading.Semaphore(0)
            assert hung.server is not None
            hung.server.bind(evt.EVT_DATA_RECV, lambda event: begun.release() if event.data[0] == 4 else None)
            key = encoded(STUDY, IMPLICIT)
            for _ in range(DICOM_PUSHES):
                raw = Scu(here.ports["PACS"], [(STUDY_MOVE, (IMPLICIT,))])
                stack.callback(raw.socket.close)
                raw.request(1, {2: STUDY_MOVE, 0x0100: 0x0021, 0x0600: "DEST"}, key)
            for _ in range(DICOM_PUSHES):
                assert begun.acquire(timeout=20), "all moves are under way"
            with associated(here, COMMITMENT, calling="CT1") as scu:
                assert commit(scu, new_uid(), Instance(SECONDARY, "1.2.3", EXPLICIT, b"")) == SUCCESS
            here.sandbox.wait_for(lambda: bot.questions("N-ACTION"))
            eventually(lambda: modality.reports, 10, "the report to a device that is well")


def test_commitment_reports_do_not_come_all_at_once(tmp_path):
    """A modality that was off for a day got hundreds of associations at once when the agent started.

    Clause: PS3.8 9.3.4: a device has few associations, and rejects the others (local limit exceeded).
    """
    taken = []
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        address = f"CT1@127.0.0.1:{silent.getsockname()[1]}"
        with imaging(tmp_path, f"moveDestinations={address}") as here:
            bot = here.sandbox.bot
            bot.replies["N-ACTION"] = lambda question: {"committed": ["1.2.3"]}
            with associated(here, COMMITMENT, calling="CT1") as scu:
                for _ in range(12):
                    assert commit(scu, new_uid(), Instance(SECONDARY, "1.2.3", EXPLICIT, b"")) == SUCCESS
            here.sandbox.wait_for(lambda: len(bot.questions("N-ACTION")) == 12)
            silent.settimeout(2)
            with contextlib.suppress(TimeoutError):
                while True:
                    taken.append(silent.accept()[0])
            for one in taken:
                one.close()
    assert 1 <= len(taken) <= 4


def test_a_channel_that_moves_reports_a_commitment_once(tmp_path):
    """A reload that puts a new channel in the place of the old one makes a second N-EVENT-REPORT of the same
    transaction.

    Clause: PS3.4 J.3.3: the SCP reports once, a Transaction UID is not valid any more after its report.
    """
    (port,) = free_ports(1)
    code = "m.COMMITMENT_REPORT_SECS = (0, 2, 2, 2)"
    with imaging(tmp_path, f"moveDestinations=CT1@127.0.0.1:{port}", code) as here:
        bot = here.sandbox.bot
        bot.replies["N-ACTION"] = lambda question: {"committed": ["1.2.3"]}
        with associated(here, COMMITMENT, calling="CT1") as scu:
            assert commit(scu, new_uid(), Instance(SECONDARY, "1.2.3", EXPLICIT, b"")) == SUCCESS
        here.agent.logged("report was not taken")
        (new,) = free_ports(1)
        endpoint = here.endpoint("PACS")
        endpoint["address"] = endpoint["address"].replace(str(here.ports["PACS"]), str(new))
        assert here.sandbox.reload()["statusCode"] == 200
        eventually(lambda: here.agent.main_log().count(b"report was not taken") >= 2, 10)
        with Destination("CT1", port=port) as modality:
            eventually(lambda: modality.reports, 10)
            with pytest.raises(AssertionError, match="not within"):
                eventually(lambda: len(modality.reports) > 1, 3)  # longer than COMMITMENT_REPORT_SECS


def test_a_device_that_aborts_in_the_report_is_said_to_do_so(tmp_path):
    """`the storage commitment report was not taken: status None`.

    Clause: README, the log says why in words.
    """
    ae = AE("CT1")
    ae.add_supported_context(COMMITMENT, scu_role=True, scp_role=True)
    (port,) = free_ports(1)

    def abort(event):
        event.assoc.abort()
        return 0, None

    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, abort)])
    try:
        with imaging(tmp_path, f"moveDestinations=CT1@127.0.0.1:{port}") as here:
            here.sandbox.bot.replies["N-ACTION"] = lambda question: {"committed": ["1.2.3"]}
            with associated(here, COMMITMENT, calling="CT1") as scu:
                assert commit(scu, new_uid(), Instance(SECONDARY, "1.2.3", EXPLICIT, b"")) == SUCCESS
            here.agent.logged("report was not taken")
            assert "not taken: status None" not in here.agent.main_log().decode()
    finally:
        if server is not None:
            server.shutdown()


def action_of(*uids):
    items = [data_set(ReferencedSOPClassUID=SECONDARY, ReferencedSOPInstanceUID=uid) for uid in uids]
    return encoded(data_set(TransactionUID=new_uid(), ReferencedSOPSequence=items), IMPLICIT)


ACTION: dict[int, int | str] = {3: COMMITMENT, 0x0100: 0x0130, 0x1001: COMMITMENT_INSTANCE, 0x1008: 1}


def test_a_commitment_in_the_context_of_another_class(tmp_path):
    """N-ACTION of a commitment in an MPPS context: 0x0000, then `Internal error: RuntimeError`, and no report until a
    restart.

    Clause: PS3.7 9.3.2 / PS3.8 annex B: an operation is on the context of its class.
    """
    with imaging(tmp_path) as here:
        here.sandbox.bot.replies["N-ACTION"] = lambda question: {"committed": ["1.2.3"]}
        with Scu(here.ports["PACS"], [(MPPS, (IMPLICIT,))]) as scu:
            scu.request(scu.accepted[MPPS, IMPLICIT], ACTION, action_of("1.2.3"))
            status = scu.status()
        assert status != SUCCESS  # or it is reported; now: "Internal error: RuntimeError", and no report


@contextlib.contextmanager
def never_released(dest):
    """A destination that takes objects, and does not answer A-RELEASE-RQ (PDU type 5) until the end of the block."""
    end = threading.Event()
    dest.server.bind(evt.EVT_DATA_RECV, lambda event: end.wait(60) if event.data[0] == 5 else None)
    try:
        yield
    finally:
        end.set()


def test_the_end_of_a_move_does_not_wait_for_the_release_by_the_destination(tmp_path):
    """All objects are stored, and the device that asked hears nothing for 30 s more: its time-out says failure.

    Clause: PS3.4 C.4.2.3.1: the final response follows the last sub-operation.
    """
    with Destination() as dest, imaging(tmp_path, f"moveDestinations={dest.address}") as here:
        here.sandbox.bot.replies["C-MOVE"] = keep(here, made(100))
        with never_released(dest), associated(here, STUDY_MOVE) as scu:
            (last, _) = list(scu.send_c_move(STUDY, "DEST", STUDY_MOVE))[-1]
        assert len(dest.arrivals) == 1
        assert last.get("Status") == SUCCESS  # within the 15 s of this device


@pytest.mark.parametrize("body", ["C-STORE", "C-ECHO"])
def test_a_push_is_done_when_the_archive_has_answered_it(tmp_path, body):
    """The archive answered 0x0000, and the caller hears `not done within 9 s`: so it pushes again.

    Clause: PS3.4 B.2.3: success is the C-STORE-RSP; README Pushes: the answer comes back within 9 s. A stored push
    is held for 60 s, and all behind it.
    """
    with Destination() as dest, imaging(tmp_path) as here:
        (reference,) = keep(here, made(100))
        text = json.dumps({"command": body, "binary": {"reference": reference}})
        with never_released(dest), here.caller() as caller:
            answer = caller.push(f"dicom://{dest.address}", text, contentType=JSON_TYPE)
        assert len(dest.arrivals) == (body == "C-STORE")
        assert answer.status == 200, answer


# --- pushes ---


@contextlib.contextmanager
def thinking(stop):
    """An archive that answers a C-FIND with a match every 100 ms until `stop`, as over many studies."""

    def find(event):
        while not stop.wait(0.1):
            yield 0xFF00, data_set(QueryRetrieveLevel="STUDY", StudyInstanceUID="1.2")
        yield 0x0000, None

    ae = AE("SLOW")
    ae.add_supported_context(STUDY_FIND, [EXPLICIT, IMPLICIT])
    ae.maximum_associations = 50
    (port,) = free_ports(1)
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_FIND, find)])
    try:
        yield f"SLOW@127.0.0.1:{port}"
    finally:
        stop.set()
        if server is not None:
            server.shutdown()


def test_an_archive_that_answers_for_long_holds_up_no_other(tmp_path):
    """Eight awaited queries or C-MOVEs to an archive at work: no awaited push to any archive is tried until it is
    through.

    Their callers heard `not done within` long ago. As test_networks' an_archive_that_hangs_holds_up_no_other, but
    with one that is well: pending answers keep dimse_timeout from ending it (C-MOVE of a large study; C-FIND
    without end, whose matches also gather in memory). Clause: README Pushes, answered within 9 s.
    """
    stop = threading.Event()
    with thinking(stop) as slow, Destination() as well, imaging(tmp_path) as here:
        find = json.dumps({"command": "C-FIND", "level": "STUDY", "dataset": {}})

        def push(url, body):
            with here.caller() as caller:
                return caller.push(f"dicom://{url}", body, contentType=JSON_TYPE)

        pushing = [threading.Thread(target=push, args=(f"{slow}?ackTimeoutSecs=1", find)) for _ in range(DICOM_PUSHES)]
        for thread in pushing:
            thread.start()
        for thread in pushing:
            thread.join()  # each has heard that it was not done within 1 s
        answers = [push(well.address, ECHO) for _ in range(2)]
        assert 200 in [answer.status for answer in answers], answers
