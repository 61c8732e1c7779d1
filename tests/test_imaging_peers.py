"""Imaging with peers, and under conditions, that no other test has: gateways, archives and devices of other makers."""

import asyncio
import contextlib
import sqlite3
import ssl
import threading
import time
from typing import Any

import pytest
from pynetdicom import evt

from tests.dicom_peers import (
    COMMITMENT,
    FAST,
    QUIET,
    STUDY_FIND,
    STUDY_MOVE,
    SUCCESS,
    Bot,
    Destination,
    Tls,
    announced,
    associated,
    commit,
    counts,
    data_set,
    imaging_site,
    made,
    new_uid,
    part10,
    silent_bot,
    start,
    store,
)
from tests.support import changed, eventually, site, tmpfs

pytestmark = QUIET


# --- the server ---


@pytest.mark.parametrize("secure", [False, True])
def test_a_gateway_that_refuses_an_object_before_it_has_read_it(tmp_path, secure):
    """413 at once, and the connection is closed, as nginx and others do: the object was sent for 72 hours, its study
    behind it, and its reason was `the connection was lost each time it was sent`.

    Over TLS the line broke with an error that urllib3 does not take for one behind which an answer waits.
    """
    tls = Tls(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.agent_file)
    trusting: dict[str, Any] = {"context": context, "config": f'caFile = "{tls.ca_file}"\n'} if secure else {}
    address = f"dicom://127.0.0.1:{{port}}?{FAST}&storage=dicomweb"
    with site(tmp_path, {"PACS": address}, start=False, **trusting) as here:
        here.sandbox.bot = silent_bot
        here.sandbox.faults.stow_cuts = ["413"] * 1000
        start(here)
        instance = made(20_000_000)
        assert store(here.ports["PACS"], instance) == [SUCCESS]
        assert here.agent.wait_state(instance.uid, "rejected")["error_code"] == "file-too-large"


def test_an_upload_may_stand_still_for_longer_than_a_connection_may_take(tmp_path):
    """256 KB had to pass within the 8 s for connecting: large objects never went over a line of less than 32 KB/s for
    each of four, nor over one that stood still for a moment; the limit is 120 s of silence."""
    tls = Tls(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.agent_file)
    channels, config = {"PACS": f"dicom://127.0.0.1:{{port}}?{FAST}&storage=dicomweb"}, f'caFile = "{tls.ca_file}"\n'
    with site(tmp_path, channels, start=False, context=context, config=config) as here:
        changed(here.agent, "m.CONNECT_TIMEOUT_SECS = 0.7")
        here.sandbox.bot, read = silent_bot, here.sandbox.sandbox._body

        async def late(reader, headers):
            if int(headers.get("Content-Length", 0)) > 10**6:
                reader._transport.pause_reading()
                await asyncio.sleep(1.5)  # this is the line
                reader._transport.resume_reading()
            return await read(reader, headers)

        here.sandbox.sandbox._body = late  # type: ignore[method-assign]
        start(here)
        objects = [made(12_000_000) for _ in range(4)]  # some of them on new connections
        assert store(here.ports["PACS"], *objects) == [SUCCESS] * 4
        for instance in objects:
            announced(here, instance.uid)
        assert sum("studies" in request for request in here.sandbox.sandbox.requests) == 4


def test_an_object_whose_connection_breaks_each_time_is_sent_ever_more_rarely(tmp_path):
    """It was sent again after half of autoRetryBaseDelayMs, however often: 500 MB without a pause, until it went."""
    address = "dicom://127.0.0.1:{port}?autoRetryBaseDelayMs=20&storage=dicomweb"
    with imaging_site(tmp_path, {"PACS": address}) as here:
        here.sandbox.faults.stow_cuts = [""] * 6
        instance, began = made(1000), time.monotonic()
        assert store(here.ports["PACS"], instance) == [SUCCESS]
        here.agent.wait_state(instance.uid, "processed")
        assert time.monotonic() - began > sum(20 * 2**n / 2 for n in range(6)) / 1000


def test_an_object_whose_connection_breaks_for_72_hours_is_a_dead_letter(tmp_path):
    """It was tried for ever, and the rest of its study waited behind it."""
    address = "dicom://127.0.0.1:{port}?autoRetryBaseDelayMs=20&storage=dicomweb"
    with imaging_site(tmp_path, {"PACS": address}) as here:
        here.sandbox.faults.hold = "/dicomweb"
        instance = made(1000)
        assert store(here.ports["PACS"], instance) == [SUCCESS]
        here.agent.kill()
        with contextlib.closing(sqlite3.connect(here.agent.queue_path)) as queue, queue:
            queue.execute("UPDATE message SET failing_ms = 73 * 3600000")
        here.sandbox.faults.hold, here.sandbox.faults.stow_cuts = "", [""] * 1000
        start(here)
        assert here.agent.wait_state(instance.uid, "failed")["error_code"] == "connection-lost"


def test_a_resource_without_its_uid_is_no_match(tmp_path):
    """One study that somebody made by hand, or an OperationOutcome among what was found (FHIR R4 3.1.1.3.1): every
    C-FIND of the level was answered 0x0110, an internal error."""
    with imaging_site(tmp_path, {"PACS": "dicom://127.0.0.1:{port}?answer=server"}) as here:
        bare = {"resourceType": "DicomStudy", "id": "bare"}
        whole = bare | {"id": "whole", "studyInstanceUid": "1.2.3"}
        here.sandbox.sandbox.resources |= {"DicomStudy/bare": bare, "DicomStudy/whole": whole}
        with associated(here, STUDY_FIND) as scu:
            *matches, (last, _) = scu.send_c_find(data_set(QueryRetrieveLevel="STUDY", StudyInstanceUID=""), STUDY_FIND)
        assert [match and match.StudyInstanceUID for _, match in matches] == ["1.2.3"]
        assert last.Status == SUCCESS


@pytest.fixture
def small_disk(tmp_path):
    with tmpfs(tmp_path / "small", 24) as folder:
        yield folder


@pytest.mark.parametrize(("storage", "path"), [("binary", "/fhir/R4/Binary"), ("dicomweb", "/dicomweb/studies")])
def test_an_object_is_uploaded_once_while_the_disk_is_full(small_disk, storage, path):
    """Another program fills the disk: what became of an upload could not be written, and each object was uploaded again
    and again, with a Binary or an instance on the server each time, until there was room."""
    with site(small_disk, {"PACS": f"dicom://127.0.0.1:{{port}}?{FAST}&storage={storage}"}, start=False) as here:
        changed(here.agent, "m.COMPLAIN_SECS = 0")  # each try is logged
        here.sandbox.bot = silent_bot
        start(here)
        here.sandbox.faults.hold = path
        instance = made(1000)
        assert store(here.ports["PACS"], instance) == [SUCCESS]
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        here.sandbox.faults.hold = ""
        eventually(lambda: here.agent.main_log().count(b"cannot be read") >= 3, what="tries")
        ballast.unlink()
        announced(here, instance.uid)
        assert sum(path in request for request in here.sandbox.sandbox.requests) == 1


# --- destinations ---


SLOW_TO_SEE_AN_ABORT = """m.imaging()
from pynetdicom import AE, evt
from time import sleep
associate, heard = AE.associate, lambda event: "Abort" in type(event.primitive).__name__.title() and sleep(1)
AE.associate = lambda self, *args, evt_handlers, **options: associate(
    self, *args, evt_handlers=[*evt_handlers, (evt.EVT_ACSE_RECV, heard)], **options)"""


@pytest.mark.parametrize("slowed", ["", SLOW_TO_SEE_AN_ABORT], ids=["at once", "late"])
def test_the_objects_behind_one_that_the_destination_aborts_at_are_moved(tmp_path, slowed):
    """An archive that aborts at an object that it does not like: the rest of the study was not sent, and counted as
    failed; nor where the association is slow to see that it ended, as it is on a busy machine."""
    with Destination() as dest:
        address = f"dicom://127.0.0.1:{{port}}?moveDestinations={dest.address}"
        with site(tmp_path, {"PACS": address}, start=False) as here:
            if slowed:
                changed(here.agent, slowed)
            start(here)
            objects = [made(100) for _ in range(5)]

            def choosy(event: evt.Event) -> int:
                if str(event.request.AffectedSOPInstanceUID) == objects[1].uid:  # type: ignore[union-attr]
                    event.assoc.abort()
                return dest._store(event)

            assert dest.server is not None
            dest.server.bind(evt.EVT_C_STORE, choosy)
            references = [f"Binary/{one.uid}" for one in objects]
            here.sandbox.sandbox.binaries |= zip(references, map(part10, objects), strict=True)
            here.sandbox.bot = bot = Bot()
            bot.replies["C-MOVE"] = references
            study = data_set(QueryRetrieveLevel="STUDY", StudyInstanceUID="1.2.3")
            with associated(here, STUDY_MOVE) as scu:
                (last, _) = list(scu.send_c_move(study, "DEST", STUDY_MOVE))[-1]
            assert (last.Status, counts(last)[1:]) == (0xB000, (4, 1, 0))


def test_a_commitment_report_that_is_given_up_is_said_to_be(tmp_path):
    """The device waits for it, and the last line in the log was one of five that said `was not taken`."""
    with site(tmp_path, {"PACS": "dicom://127.0.0.1:{port}"}, start=False) as here:
        changed(here.agent, "m.COMMITMENT_REPORT_SECS = (0, 0.1)")
        here.sandbox.bot = bot = Bot()
        released = threading.Event()
        bot.replies["N-ACTION"] = lambda question: released.wait(10) and {"committed": []}
        start(here)
        with associated(here, COMMITMENT) as scu:
            assert commit(scu, new_uid(), made()) == SUCCESS
        released.set()
        here.agent.logged("its report is given up; a restart of the agent tries it again")
