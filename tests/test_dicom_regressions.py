"""Defects of imaging that a review found, one test each: none may come back."""

import array
import asyncio
import contextlib
import fcntl
import io
import json
import os
import socket
import sqlite3
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from medplum_agent import DICOM_PUSHES, HL7_TYPE, JSON_TYPE, TRANSFERS
from tests.dicom_peers import (
    CT,
    EXPLICIT,
    IMPLICIT,
    OUT_OF_RESOURCES,
    P_DATA,
    ROOT_UID,
    SECONDARY,
    SUCCESS,
    UNABLE,
    VERIFICATION,
    Aborted,
    Bot,
    Destination,
    Instance,
    Rejected,
    Scu,
    Tls,
    assert_arrived,
    assert_no_spool,
    assert_works,
    command_set,
    encoded,
    forget_strays,
    imaging_site,
    keep,
    made,
    made_dataset,
    new_uid,
    spooled,
    start,
    store,
    transmits,
)
from tests.support import ROOT, Site, control_id, eventually, free_ports, message, setting, site

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom.*")

FIND, MOVE, GET = (f"1.2.840.10008.5.1.4.1.2.2.{n}" for n in (1, 2, 3))
MPPS, COMMITMENT, COMMITMENT_INSTANCE = "1.2.840.10008.3.1.2.3.3", "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
FIND_RQ, GET_RQ, MOVE_RQ, REPORT_RQ, ACTION_RQ, CREATE_RQ = 0x0020, 0x0010, 0x0021, 0x0100, 0x0130, 0x0140
PENDING, WARNING, NOT_UNDERSTOOD, RESOURCE_LIMITATION, PROCESSING_FAILURE = 0xFF00, 0xB000, 0xC000, 0x0213, 0x0110
ALL_COMMITTED, NOT_ALL_COMMITTED = 1, 2
LOCAL = "dicom://127.0.0.1:{port}?"
QUICK = "autoRetryBaseDelayMs=20&autoRetryMaxDelayMs=100"
FAST = f"{QUICK}&autoRetryMaxAttempts=0&deadLetterAfterHours=0"
QUICK_RECONNECTS = "m.RECONNECT_BASE_SECS, m.RECONNECT_MAX_SECS = 0.01, 0.05"


def confirming(question: dict[str, Any]) -> Any:
    """A Bot's word that all is safe."""
    return {"committed": [item["00081155"]["Value"][0] for item in question["dataset"]["00081199"]["Value"]]}


# --- the other side ---


def element(group: int, number: int, value: bytes) -> bytes:
    """Implicit little endian; nothing is checked."""
    return struct.pack("<HHI", group, number, len(value)) + value


def ui(text: str) -> bytes:
    return text.encode() + b"\0" * (len(text) % 2)


def commitment_request(transaction: str, *objects: str) -> bytes:
    items = (element(8, 0x1150, ui(CT)) + element(8, 0x1155, ui(uid)) for uid in objects)
    sequence = b"".join(element(0xFFFE, 0xE000, item) for item in items)
    return element(8, 0x1195, ui(transaction)) + element(8, 0x1199, sequence)


def number(raw: bytes) -> int:
    return int(struct.unpack("<H", raw)[0])


class Workstation(Scu):
    """A client that also answers: it takes reports, and objects of the class that it `provides` for."""

    def __init__(self, port: int, *classes: str, provides: str = "", **options: Any):
        self._provides = provides
        storage = [(SECONDARY, (EXPLICIT,))]
        super().__init__(port, [*((uid, (IMPLICIT,)) for uid in classes), *storage], **options)

    def pdu(self, kind: int, content: bytes = bytes(4)) -> None:
        if kind == 1 and self._provides:  # the user information at the end gets a role selection (PS3.7 D.3.3.4)
            name = self._provides.encode()
            role = struct.pack(">BxHH", 0x54, len(name) + 4, len(name)) + name + b"\0\1"
            size = 12 + len(ROOT_UID)
            user = content[-size:] + role
            content = content[: -size - 4] + struct.pack(">BxH", 0x50, len(user)) + user
        super().pdu(kind, content)

    def ask(self, sop_class: str, command: int, content: bytes, **more: int | str) -> None:
        """A request with a data set; `more` by element, such as `x1000`."""
        elements: dict[int, int | str] = {3 if command == ACTION_RQ else 2: sop_class, 0x0100: command}
        elements |= {int(name[1:], 16): value for name, value in more.items()}
        self.request(self.accepted[sop_class, IMPLICIT], elements, content)

    def commit(self, *objects: str, transaction: str = "") -> int:
        content = commitment_request(transaction or new_uid(), *objects)
        self.ask(COMMITMENT, ACTION_RQ, content, x1001=COMMITMENT_INSTANCE, x1008=1)
        return self.status()

    def data(self) -> bytes:
        """The data set after a command set."""
        collected, flags = b"", 0
        while not flags & 2:
            kind, content = self.read_pdu()
            assert kind == P_DATA
            while content:
                size, _, flags = struct.unpack_from(">IBB", content)
                assert not flags & 1
                collected += content[6 : 4 + size]
                content = content[4 + size :]
        return collected

    def report(self) -> tuple[int, Dataset, int]:
        """Event type and data set of the report that comes next, and its message id; it is not answered yet."""
        command = self.response()
        assert number(command[0x0100]) == REPORT_RQ
        return number(command[0x1002]), read_dataset(io.BytesIO(self.data()), True, True), number(command[0x0110])

    def answer(self, context: int, command: int, message_id: int, sop_class: str, **more: int | str) -> None:
        elements: dict[int, int | str] = {2: sop_class, 0x0100: command, 0x0120: message_id, 0x0800: 0x0101, 0x0900: 0}
        self.fragments(context, 1, command_set(elements | {int(name[1:], 16): value for name, value in more.items()}))

    def take_report(self, message_id: int, kind: int) -> None:
        context = self.accepted[COMMITMENT, IMPLICIT]
        self.answer(context, 0x8100, message_id, COMMITMENT, x1000=COMMITMENT_INSTANCE, x1002=kind)

    def reported(self) -> tuple[int, Dataset]:
        kind, report, message_id = self.report()
        self.take_report(message_id, kind)
        return kind, report

    def take_object(self) -> bytes:
        """The data set of the C-STORE request that comes next."""
        command = self.response()
        assert number(command[0x0100]) == 1
        content, uid = self.data(), command[0x1000].rstrip(b"\0").decode()
        context = self.accepted[self._provides, EXPLICIT]
        self.answer(context, 0x8001, number(command[0x0110]), self._provides, x1000=uid)
        return content

    def outcome(self) -> tuple[int, ...]:
        """Status, completed, failed and warnings of a C-MOVE or C-GET, at its end."""
        while number((found := self.response())[0x0900]) == PENDING:
            pass
        return tuple(number(found.get(e, b"\0\0")) for e in (0x0900, 0x1021, 0x1022, 0x1023))


STUDY = element(8, 0x52, b"STUDY ") + element(0x20, 0xD, b"1.2.3\0")


@contextlib.contextmanager
def held_uploads(here: Site) -> Iterator[list[str]]:
    """Uploads wait at the server to the end of the block; those that wait."""
    server, gate, waiting = here.sandbox.sandbox, asyncio.Event(), list[str]()
    respond = server._respond

    async def responding(method: str, target: str, *rest: Any) -> Any:
        if method == "POST" and "/Binary" in target:
            waiting.append(target)
            await gate.wait()
        return await respond(method, target, *rest)

    with mock.patch.object(server, "_respond", responding):
        try:
            yield waiting
        finally:
            here.sandbox.loop.call_soon_threadsafe(gate.set)


class Longer(bytes):
    """Bytes that are fewer than they say."""

    def __len__(self) -> int:
        return super().__len__() + 5000


@contextlib.contextmanager
def cut_downloads(here: Site, reference: str, *, at_once: bool) -> Iterator[None]:
    """Downloads of this Binary end before all is sent: at once, or with the block."""
    server, cut = here.sandbox.sandbox, list[asyncio.Task[Any]]()
    file = server._file

    def cutting(path: str, *rest: Any) -> tuple[str, bytes] | None:
        found = file(path, *rest)
        if not path.endswith(reference) or found is None:
            return found
        task = asyncio.current_task()
        assert task is not None
        (task.cancel if at_once else lambda: cut.append(task))()  # which closes the connection
        return found[0], Longer(found[1])

    with mock.patch.object(server, "_file", cutting):
        try:
            yield
        finally:
            here.sandbox.loop.call_soon_threadsafe(lambda: [task.cancel() for task in cut])


def change_address(here: Site, channel: str, old: str, new: str) -> None:
    endpoint = here.endpoint(channel)
    assert old in endpoint["address"]
    endpoint["address"] = endpoint["address"].replace(old, new)
    assert here.sandbox.reload()["type"] == "agent:reloadconfig:response"


# --- the site of most tests ---


@pytest.fixture(scope="module")
def dest():
    with Destination() as running:
        yield running


@pytest.fixture(scope="module")
def late_port():
    """Of a device that is not there before a test lets it listen."""
    return free_ports(1)[0]


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    return [Tls(tmp_path_factory.mktemp(name)) for name in ("first", "second")]


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory, dest, late_port, authorities):
    known = f"{dest.address},LATE@127.0.0.1:{late_port}"
    first = authorities[0]
    channels = {
        "PACS": f"{LOCAL}moveDestinations={known}&answerWaitSecs=1&{FAST}",
        "REPORTS": f"{LOCAL}{FAST}",
        "NORMAL": f"{LOCAL}retryMode=normal&{QUICK}",
        "NONE": f"{LOCAL}retryMode=none&{QUICK}",
        "TWICE": f"{LOCAL}autoRetryMaxAttempts=2&{QUICK}",
        "TWO": f"{LOCAL}maxWorkers=2&{FAST}",
        "FEW": f"{LOCAL}maxConnections=2",
        "SECURE": f"dicoms://127.0.0.1:{{port}}?certFile={first.agent_file}&clientCa={first.ca_file}",
        "FEED": "?enhanced=true",
    }
    with site(tmp_path_factory.mktemp("imaging"), channels, start=False) as running:
        if not os.environ.get("MEDPLUM_AGENT_BINARY"):
            code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import medplum_agent as m\n{QUICK_RECONNECTS}"
            running.agent.COMMAND = [sys.executable, "-c", f"{code}\nsys.exit(m.main())"]
        running.sandbox.bot = Bot()
        start(running)
        yield running


@pytest.fixture
def here(shared_site):
    forget_strays(shared_site)
    shared_site.sandbox.bot = Bot()
    shared_site.agent.wait_connected()
    yield shared_site
    faults, fresh = shared_site.sandbox.faults, type(shared_site.sandbox.faults)()
    for name in vars(fresh):
        setattr(faults, name, getattr(fresh, name))


@pytest.fixture
def bot(here):
    return here.sandbox.bot


def connects(here: Site) -> int:
    return here.sandbox.sandbox.requests.count("GET /ws/agent")


def reconnect(here: Site) -> None:
    before = connects(here)
    here.sandbox.cut()
    eventually(lambda: connects(here) > before, what="another connection")
    here.agent.wait_connected()


def errors(here: Site) -> list[str]:
    """What is on the console besides the log."""
    return [line for line in here.agent.output().splitlines() if not line.startswith("{")]


# --- storage commitment ---


@pytest.mark.parametrize("count", [0, 9000], ids=["none", "too many"])
def test_a_commitment_without_its_list_is_refused(here, bot, count):
    """It was reported as: all committed."""
    bot.replies["N-ACTION"] = {"committed": []}
    with Workstation(here.ports["PACS"], COMMITMENT) as scu:
        assert hex(scu.commit(*(f"{ROOT_UID}.1.{n}" for n in range(count)))) == hex(RESOURCE_LIMITATION)
        assert scu.commit(f"{ROOT_UID}.2") == SUCCESS
        kind, report = scu.reported()
    assert kind == NOT_ALL_COMMITTED and [i.ReferencedSOPInstanceUID for i in report.FailedSOPSequence]
    assert len(bot.questions("N-ACTION")) == 1


def test_a_silent_bot_commits_nothing(here):
    objects = [new_uid(), new_uid()]
    with Workstation(here.ports["PACS"], COMMITMENT) as scu:
        assert scu.commit(*objects) == SUCCESS
        kind, report = scu.reported()
    assert kind == NOT_ALL_COMMITTED and "ReferencedSOPSequence" not in report
    failed = [(item.ReferencedSOPInstanceUID, item.FailureReason) for item in report.FailedSOPSequence]
    assert failed == [(uid, PROCESSING_FAILURE) for uid in objects]  # not 0x0112: nobody said that they do not exist


def tried_again(here: Site, instance: Instance) -> None:
    """Wait for some more tries from now on."""
    before = len(transmits(here, instance.uid))
    here.sandbox.wait_for(lambda: len(transmits(here, instance.uid)) > before + 2, 5, "more tries")


def test_commitments_that_wait_leave_the_workers_to_their_objects(here, bot):
    bot.replies = {"N-ACTION": confirming, "C-STORE": lambda question: (500, "")}
    objects = [made(100), made(100)]
    assert store(here.ports["TWO"], *objects) == [SUCCESS] * 2
    with contextlib.ExitStack() as stack:
        devices = [stack.enter_context(Workstation(here.ports["TWO"], COMMITMENT)) for _ in objects]
        for scu, instance in zip(devices, objects, strict=True):
            assert scu.commit(instance.uid) == SUCCESS
        for instance in objects:
            tried_again(here, instance)
        assert not bot.asked
        bot.replies["C-STORE"] = ""
        for scu in devices:
            assert scu.reported()[0] == ALL_COMMITTED
    assert_works(here, "TWO")


def test_reports_on_one_association_do_not_mix(here, bot):
    """Each is whole before the next begins (PS3.8 annex E), and waits for its own answer."""
    bot.replies["N-ACTION"] = confirming
    here.sandbox.faults.delay = lambda: 0.3  # so that the Bot's words come at once
    wanted = {new_uid(): new_uid() for _ in range(8)}
    before = len(here.agent.rows(COMMITMENT_INSTANCE))

    def outcomes() -> list[str]:
        return [row["ack_outcome"] for row in here.agent.rows(COMMITMENT_INSTANCE)[before:]]

    with Workstation(here.ports["REPORTS"], COMMITMENT) as scu:
        for transaction, uid in wanted.items():
            assert scu.commit(uid, transaction=transaction) == SUCCESS
        while wanted:
            kind, report = scu.reported()
            (item,) = report.ReferencedSOPSequence
            assert (kind, item.ReferencedSOPInstanceUID) == (ALL_COMMITTED, wanted.pop(report.TransactionUID))
        eventually(lambda: outcomes() == ["delivered"] * 8, 5, "all reports are known to be taken")


def test_a_report_that_crosses_an_object(here, bot):
    """On one association: the device sends its next object before it answers; both get their answers."""
    bot.replies["N-ACTION"] = confirming
    instance = made(200_000)
    before = len(here.agent.rows(COMMITMENT_INSTANCE))
    with Workstation(here.ports["PACS"], COMMITMENT) as scu:
        assert scu.commit(new_uid()) == SUCCESS
        kind, _, message_id = scu.report()
        scu.send_store(instance)
        scu.take_report(message_id, kind)
        assert scu.status() == SUCCESS
    assert_arrived(here, instance)
    eventually(lambda: [r["ack_outcome"] for r in here.agent.rows(COMMITMENT_INSTANCE)][before:] == ["delivered"])


def test_a_report_that_nobody_took_is_sent_after_a_restart(here, bot, late_port):
    bot.replies["N-ACTION"] = confirming
    transaction, wanted = new_uid(), new_uid()
    with Workstation(here.ports["PACS"], COMMITMENT, calling="LATE") as scu:
        assert scu.commit(wanted, transaction=transaction) == SUCCESS
    here.agent.logged("report was not taken")
    eventually(lambda: here.agent.rows(COMMITMENT_INSTANCE)[-1]["state"] == "processed")
    here.agent.kill()
    with Destination("LATE", port=late_port) as late:
        start(here)
        eventually(lambda: late.reports, 5, "the report")
        ((kind, report),) = late.reports
        assert (kind, report.TransactionUID) == (ALL_COMMITTED, transaction)
        assert [item.ReferencedSOPInstanceUID for item in report.ReferencedSOPSequence] == [wanted]
        eventually(lambda: here.agent.rows(COMMITMENT_INSTANCE)[-1]["ack_outcome"] == "delivered")
    assert len(bot.asked) == 1


# --- uploads ---


@pytest.mark.parametrize("status", [200, 201])
def test_an_upload_that_made_no_binary_is_tried_again(here, status):
    create = here.sandbox.sandbox._create
    others = {"message": "hello from a proxy"}, {"message": "maintenance", "id": "6f1d"}, {"resourceType": "Binary"}
    answers = iter([(status, other) for other in others])
    with mock.patch.object(here.sandbox.sandbox, "_create", lambda *what: next(answers, None) or create(*what)):
        instance = made(1000)
        assert store(here.ports["PACS"], instance) == [SUCCESS]
        assert_arrived(here, instance)
    assert not list(answers)
    assert not transmits(here, "Binary/None") and not transmits(here, "Binary/6f1d")


@pytest.mark.parametrize("channel", ["NORMAL", "NONE"])
def test_an_upload_that_breaks_is_tried_again(here, channel):
    """retryMode is about messages, which may have arrived: a file that broke off cannot have been announced."""
    create, broken = here.sandbox.sandbox._create, threading.Event()
    broken.set()

    def creating(*what: Any) -> Any:
        if broken.is_set():
            raise ConnectionError
        return create(*what)

    with mock.patch.object(here.sandbox.sandbox, "_create", creating):
        instance = made(1000)
        assert store(here.ports[channel], instance) == [SUCCESS]
        (row,) = eventually(lambda: [r for r in here.agent.rows(instance.uid) if r["last_error"]], what="a failure")
        assert row["state"] in ("queued", "inflight"), row
        broken.clear()
        assert_arrived(here, instance)
    here.agent.wait_state(instance.uid, "processed")


def test_an_upload_waits_for_a_login_that_is_refused(here):
    here.sandbox.faults.token_failures, here.sandbox.faults.token_status = 10**6, 401
    here.sandbox.sandbox.revoke_tokens()
    instance = made(1000)
    assert store(here.ports["NORMAL"], instance) == [SUCCESS]
    eventually(lambda: here.agent.rows(instance.uid)[0]["last_error"], what="a try")
    here.sandbox.faults.token_failures = 0
    assert_arrived(here, instance)


@pytest.mark.parametrize("channel", ["NORMAL", "NONE"])
def test_a_kill_in_an_upload_makes_no_dead_letter(here, channel):
    instance = made(1000)
    with held_uploads(here) as waiting:
        assert store(here.ports[channel], instance) == [SUCCESS]
        eventually(lambda: waiting, what="the upload")
        here.agent.kill()
    start(here)
    assert_arrived(here, instance)
    here.agent.wait_state(instance.uid, "processed")


@pytest.mark.parametrize("channel", ["NORMAL", "NONE", "TWICE"])
def test_breaks_of_the_uplink_are_no_failures_of_an_upload(here, channel):
    instance = made(1000)
    with held_uploads(here) as waiting, here.device("FEED") as device:
        assert store(here.ports[channel], instance) == [SUCCESS]
        eventually(lambda: waiting, what="the upload")
        for _ in range(6):
            control = new_uid()
            assert device.ask(message(control, patient=control)) == ("CA", control)
            assert device.ack() == ("AA", control)  # the connection works, so the upload could be to blame
            reconnect(here)
    assert_arrived(here, instance)
    row = here.agent.wait_state(instance.uid, "processed")
    assert row["error_code"] is None


# --- who may connect ---


def test_the_authority_of_devices_is_replaced_by_a_reload(here, authorities):
    first, second = authorities

    def enters(tls: Tls | None) -> bool:
        context = first.context(tls.cert_file, tls.key_file) if tls else first.context()
        with contextlib.suppress(OSError, Aborted), Scu(here.ports["SECURE"], context=context) as scu:
            return scu.echo() == SUCCESS
        return False

    assert [enters(tls) for tls in (first, second, None)] == [True, False, False]
    change_address(here, "SECURE", f"clientCa={first.ca_file}", f"clientCa={second.ca_file}")
    assert [enters(tls) for tls in (first, second, None)] == [False, True, False]
    change_address(here, "SECURE", f"&clientCa={second.ca_file}", "")
    assert [enters(tls) for tls in (first, second, None)] == [True, True, True]


def test_a_reload_does_not_forget_open_associations(here):
    def one_more() -> bool:
        with contextlib.suppress(Rejected), Scu(here.ports["FEW"]) as scu:
            return scu.echo() == SUCCESS
        return False

    with Scu(here.ports["FEW"]), Scu(here.ports["FEW"]):
        assert not one_more()
        assert here.sandbox.reload()["statusCode"] == 200
        assert not one_more()
    eventually(one_more, what="room again")


@pytest.mark.parametrize("context_id", [0, 2])
def test_an_even_context_id_ends_the_association(here, context_id):
    before = errors(here)

    class Even(Scu):
        def pdu(self, kind: int, content: bytes = bytes(4)) -> None:
            odd = struct.pack(">BxHB", 0x20, 4 + 4 + len(VERIFICATION) + 4 + len(IMPLICIT), 1)
            assert odd in content
            super().pdu(kind, content.replace(odd, odd[:-1] + bytes((context_id,))))

    with pytest.raises((Aborted, Rejected)):
        Even(here.ports["PACS"], timeout=5)
    assert_works(here)
    assert errors(here) == before


# --- data sets ---


def nested(depth: int) -> bytes:
    dataset = innermost = made_dataset()
    for level in range(depth):
        item = Dataset()
        item.CodeValue = str(level)
        innermost.ConceptNameCodeSequence = [item]
        innermost = item
    return encoded(dataset)


def after(content: bytes, group: int, number: int, vr: bytes, value: bytes) -> bytes:
    return content + struct.pack("<HH2sH", group, number, vr, len(value)) + value


@pytest.mark.parametrize(
    ("content", "tag", "found"),
    [
        (lambda: after(encoded(made_dataset()), 0x28, 8, b"IS", b"9" * 30), "00280008", ["9" * 30]),
        (lambda: after(encoded(made_dataset()), 0x28, 8, b"IS", b"1-5 "), "00280008", ["1-5"]),
        (lambda: nested(100), "0040A043", None),
    ],
    ids=["large", "range", "nested"],
)
def test_what_json_cannot_hold_is_stored(here, content, tag, found):
    raw = content()
    instance = Instance(SECONDARY, read_dataset(io.BytesIO(raw), False, True).SOPInstanceUID, EXPLICIT, raw)
    assert [hex(status) for status in store(here.ports["PACS"], instance)] == ["0x0"]
    body = assert_arrived(here, instance)
    assert body.get("omitted", []) == ([] if found else [tag])
    assert body["dataset"].get(tag, {}).get("Value") == found
    assert_no_spool(here)


# --- questions ---


def test_a_question_that_is_too_large_is_refused(here, bot):
    """The server would have closed the connection, of HL7 as well."""
    before = connects(here)
    comments = b"".join(element(group, 0x4000, b"x" * 400_000) for group in (0x10, 0x20, 0x32))
    with Workstation(here.ports["PACS"], FIND) as scu:
        scu.ask(FIND, FIND_RQ, element(8, 0x52, b"STUDY ") + comments)
        assert hex(scu.status()) == hex(UNABLE)
        bot.replies["C-FIND"] = []
        scu.ask(FIND, FIND_RQ, STUDY)
        assert scu.status() == SUCCESS
    assert len(bot.asked) == 1
    assert connects(here) == before


def test_a_key_that_is_no_number_is_asked_for_as_text(here, bot):
    bot.replies["C-FIND"] = []
    with Workstation(here.ports["PACS"], FIND) as scu:
        scu.ask(FIND, FIND_RQ, STUDY + element(0x20, 0x11, b"1-5 "))
        assert scu.status() == SUCCESS
    (question,) = bot.asked
    assert question["dataset"]["00200011"] == {"vr": "IS", "Value": ["1-5"]}


BROKEN = element(0x18, 0x9087, b"four")  # Diffusion b-value, FD: 8 bytes are needed


def test_nothing_is_moved_by_a_key_that_cannot_be_read(here, bot):
    """More would be retrieved than was asked for."""
    bot.replies["C-MOVE"] = keep(here, made(100))
    with Workstation(here.ports["PACS"], MOVE) as scu:
        scu.ask(MOVE, MOVE_RQ, STUDY + BROKEN, x0600="DEST")
        assert hex(scu.status()) == hex(NOT_UNDERSTOOD)
    assert not bot.asked


def test_what_is_missing_of_a_procedure_step_is_named(here, bot):
    with Workstation(here.ports["PACS"], MPPS) as scu:
        scu.ask(MPPS, CREATE_RQ, BROKEN + element(0x40, 0x252, b"IN PROGRESS "), x1000=new_uid())
        assert scu.status() == SUCCESS
    here.sandbox.wait_for(lambda: bot.asked)
    (question,) = bot.asked
    assert (list(question["dataset"]), question["omitted"]) == (["00400252"], ["00189087"])


# --- objects from the server ---


def test_a_get_is_not_behind_the_uploads(here, bot):
    instance = made(1000)
    bot.replies["C-GET"] = keep(here, instance)
    objects = [made(100) for _ in range(2 * TRANSFERS)]
    with held_uploads(here) as waiting:
        assert store(here.ports["PACS"], *objects) == [SUCCESS] * len(objects)
        eventually(lambda: len(waiting) == TRANSFERS, what="uploads on all threads")
        with Workstation(here.ports["PACS"], GET, provides=SECONDARY, timeout=5) as scu:
            scu.ask(GET, GET_RQ, STUDY)
            assert scu.take_object() == instance.content
            assert scu.outcome() == (SUCCESS, 1, 0, 0)
        assert len(waiting) == TRANSFERS
    for instance in objects:
        assert_arrived(here, instance)


def test_a_download_that_is_cut_is_one_that_failed(here, bot, dest):
    instances = [made(1000), made(3_000_000), made(1000)]
    references = keep(here, *instances)
    bot.replies["C-MOVE"] = references
    with Workstation(here.ports["PACS"], MOVE) as scu, cut_downloads(here, references[1], at_once=True):
        scu.ask(MOVE, MOVE_RQ, STUDY, x0600="DEST")
        assert scu.outcome() == (WARNING, 2, 1, 0)
    assert {instances[0].uid, instances[2].uid} <= {arrival.uid for arrival in dest.arrivals}
    assert_no_spool(here)


def test_a_push_that_takes_too_long_leaves_no_file(here, dest):
    (reference,) = keep(here, made(500_000))
    with here.caller() as caller, cut_downloads(here, reference, at_once=False):
        url = f"dicom://{dest.address}?ackTimeoutSecs=1"
        answer = caller.push(url, reference, contentType="application/dicom")
        assert answer.status == 400 and "not done within 1 s" in answer.text, answer
        assert_no_spool(here)
    assert_no_spool(here)


def test_an_awaited_push_is_not_behind_stored_ones(tmp_path, dest):
    """Those wait for hosts that say nothing."""
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(DICOM_PUSHES)]
        here = stack.enter_context(imaging_site(tmp_path, {"PACS": f"{LOCAL}{FAST}"}))
        caller = stack.enter_context(here.caller())
        for listener in silent:
            url = f"dicom://SILENT@127.0.0.1:{listener.getsockname()[1]}"
            caller.store(url, '{"command":"C-ECHO"}', contentType=JSON_TYPE)
        for listener in silent:
            listener.settimeout(5)
            stack.enter_context(listener.accept()[0])
        answer = caller.push(f"dicom://{dest.address}", '{"command":"C-ECHO"}', contentType=JSON_TYPE)
        assert answer.status == 200 and json.loads(answer.text)["status"] == SUCCESS, answer
        here.agent.terminate()


@pytest.mark.parametrize(
    "url", ["dicom://ABCDEFGHIJKLMNOPQ@127.0.0.1:104", "dicom://D%C3%96@127.0.0.1:104", "dicom://A%5CB@127.0.0.1:104",
            "dicom://DEST@127.0.0.1:104?callingAeTitle=ABCDEFGHIJKLMNOPQ"],
)  # fmt: skip
def test_a_device_url_with_a_bad_title_is_said_to_have_one(here, url):
    with here.caller() as caller:
        answer = caller.push(url, '{"command":"C-ECHO"}', contentType=JSON_TYPE)
    assert answer.status == 400 and "AE title" in answer.text, answer
    assert "internal" not in answer.text.lower()


# --- a device that does not read ---


def unread(sock: socket.socket) -> int:
    waiting = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, waiting)
    return waiting[0]


@contextlib.contextmanager
def stuck(here: Site, bot: Bot) -> Iterator[None]:
    """A C-GET of an object that is larger than what all buffers hold, of a device that stops reading."""
    bot.replies["C-GET"] = keep(here, made(16_000_000))
    scu = Workstation(here.ports["PACS"], GET, provides=SECONDARY)
    with contextlib.closing(scu.socket):
        scu.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        scu.ask(GET, GET_RQ, STUDY)
        counts = [0]

        def full() -> bool:
            counts.append(unread(scu.socket))
            return counts[-1] > 0 and len(set(counts[-30:])) == 1 and len(counts) > 30

        eventually(full, what="nothing moves any more")
        yield


def test_a_device_that_does_not_read_holds_up_nobody(tmp_path):
    """Neither HL7, nor a reload that removes its channel."""
    with imaging_site(tmp_path, {"PACS": f"{LOCAL}{FAST}", "FEED": ""}) as here:
        here.sandbox.bot = bot = Bot()
        with stuck(here, bot), here.device("FEED", timeout=3) as device:
            assert device.ask(message("BESIDE-1")) == ("AA", "BESIDE-1")
            agent = here.sandbox.resource("Agent/agent-1")
            agent["channel"] = [channel for channel in agent["channel"] if channel["name"] != "PACS"]
            assert here.sandbox.reload()["statusCode"] == 200
            assert device.ask(message("BESIDE-2")) == ("AA", "BESIDE-2")


def test_a_device_that_does_not_read_does_not_hold_up_a_stop(tmp_path):
    with imaging_site(tmp_path, {"PACS": f"{LOCAL}{FAST}"}) as here:
        here.sandbox.bot = bot = Bot()
        with stuck(here, bot):
            code, seconds = here.agent.terminate()
        assert code == 0 and seconds < 5


# --- the queue and its files ---


def test_files_of_a_queue_that_was_moved_away_are_left_alone(tmp_path):
    with imaging_site(tmp_path, {"PACS": f"{LOCAL}{FAST}"}) as here:
        here.sandbox.faults.read_failures["Binary"] = 503
        instances = [made(1000), made(1000)]
        assert store(here.ports["PACS"], *instances) == [SUCCESS] * 2
        files = spooled(here)
        assert len(files) == 2
        here.agent.kill()
        away = tmp_path / "away"
        away.mkdir()
        queue = here.agent.queue_path
        for path in queue.parent.glob(f"{queue.name}*"):
            path.rename(away / path.name)
        start(here)
        assert spooled(here) == files
        here.agent.kill()
        for path in queue.parent.glob(f"{queue.name}*"):
            path.unlink()
        for path in away.iterdir():
            path.rename(queue.parent / path.name)
        here.sandbox.faults.read_failures.clear()
        start(here)
        for instance in instances:
            assert_arrived(here, instance)
        assert_no_spool(here)


def test_only_what_was_never_whole_is_removed_at_a_start(tmp_path):
    with site(tmp_path, {"PACS": f"{LOCAL}{FAST}"}, start=False) as here:
        here.sandbox.bot = Bot()
        folder = here.agent.queue_path.with_suffix(".spool")
        foreign = [folder / name for name in (".snapshot.d", "folder.dcm", "folder.part")]
        for path in foreign:
            path.mkdir(parents=True)
        for number in range(3):
            (folder / f"11111111-2222-3333-4444-55555555555{number}.part").write_bytes(b"never whole")
        start(here)
        assert spooled(here) == sorted(foreign)
        assert_works(here)
        assert b"cannot be opened" not in here.agent.main_log()


def size_of_spool(here: Site) -> int:
    return sum(path.stat().st_size for path in spooled(here))


def test_the_limit_of_the_queue_counts_what_is_being_received(tmp_path):
    with imaging_site(tmp_path, {"PACS": f"{LOCAL}{FAST}"}, settings=[setting("queueMaxMb", 2)]) as here:
        here.sandbox.faults.read_failures["Binary"] = 503
        half, first, second = threading.Event(), made(1_400_000), made(1_400_000)

        def parts() -> Iterator[bytes]:
            yield first.content[:1_200_000]
            eventually(lambda: size_of_spool(here) >= 1_000_000, what="most of the first object")
            assert store(here.ports["PACS"], second) == [OUT_OF_RESOURCES]
            half.set()
            yield first.content[1_200_000:]

        with Scu.for_instances(here.ports["PACS"], first) as scu:
            assert scu.store(first, parts()) == SUCCESS
        assert half.is_set()
        here.sandbox.faults.read_failures.clear()
        assert_arrived(here, first)
        eventually(lambda: store(here.ports["PACS"], second) == [SUCCESS], what="room again")


def test_a_queue_of_the_first_version_is_taken_over_with_its_messages(tmp_path):
    with imaging_site(tmp_path, {"PACS": f"{LOCAL}{FAST}", "FEED": "?enhanced=true"}) as here:
        here.sandbox.bot = Bot()
        here.sandbox.faults.silent = True
        controls = [f"OLD-{n}" for n in range(20)]
        with here.device("FEED") as device:
            assert [device.ask(message(control)) for control in controls] == [("CA", c) for c in controls]
        here.agent.kill()
        before = len(here.sandbox.seen)
        here.sandbox.faults.silent = False
        with contextlib.closing(sqlite3.connect(here.agent.queue_path)) as db:
            db.executescript("DROP INDEX spooled; ALTER TABLE message DROP COLUMN spool; PRAGMA user_version = 1")
        start(here)
        later = made(1000)
        assert store(here.ports["PACS"], later) == [SUCCESS]
        assert_arrived(here, later)
        for control in controls:
            here.agent.wait_state(control, "processed")
        with here.sandbox.changed:
            heard = [control_id(t.body) for _, t in here.sandbox.seen[before:] if t.content_type == HL7_TYPE]
        assert heard == controls
