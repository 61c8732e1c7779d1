"""DICOM peers that the project had not met: destinations that end associations as they like, and answer oddly."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest

import medplum_agent as ma
from tests.dicom_peers import (
    ABORT,
    FAST,
    P_DATA,
    QUIET,
    RELEASE_RQ,
    STUDY_MOVE,
    SUCCESS,
    Bot,
    Instance,
    RawPeer,
    _item,
    acceptance,
    associated,
    command_set,
    counts,
    data_set,
    imaging_site,
    keep,
    made,
    part10,
)
from tests.support import Site, eventually

pytestmark = QUIET


class Stranger(RawPeer):
    """A destination of C-STORE in raw bytes, which takes the last syntax of each context; `stored` holds how many bytes
    of each data set came.

    `after` is called with the connection behind each answer. `limit`: where it hangs up, in bytes. `user`: its user
    information items.
    """

    def __init__(self, after: Callable[[socket.socket], object] = id, limit: int = 0, user: bytes | None = None):
        self.after, self.limit = after, limit
        self.user = _item(0x51, struct.pack(">I", 16_384)) if user is None else user
        self.associations, self.stored = 0, list[int]()
        super().__init__("STRANGER")

    def serve(self, connection: socket.socket) -> None:
        size, last = 0, b""
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as reading:
            while head := reading.read(6):
                kind, length = struct.unpack(">BxI", head)
                content = reading.read(length)
                if kind == 1:
                    self.associations += 1
                    self._send(connection, 2, acceptance(content, self.user))
                elif kind == RELEASE_RQ:
                    self._send(connection, 6, bytes(4))
                elif kind == ABORT:
                    return
                while kind == P_DATA and content:
                    length, context, flags = struct.unpack_from(">IBB", content)
                    size, last = (0, last) if flags & 1 else (size + length - 2, last)
                    if self.limit and size > self.limit:
                        return
                    if flags == 2:
                        self.stored.append(size)
                        self._answer(connection, context, len(self.stored))
                    content = content[4 + length :]

    def _answer(self, connection: socket.socket, context: int, number: int) -> None:
        command = command_set({0x0100: 0x8001, 0x0120: 1, 0x0800: 0x0101, 0x0900: SUCCESS})
        self._send(connection, P_DATA, struct.pack(">IBB", len(command) + 2, context, 3) + command)
        self.after(connection)

    @staticmethod
    def _send(connection: socket.socket, kind: int, content: bytes) -> None:
        connection.sendall(struct.pack(">BxI", kind, len(content)) + content)


@contextlib.contextmanager
def moving(folder, stranger: Stranger) -> Iterator[tuple[Site, Bot]]:
    address = f"dicom://127.0.0.1:{{port}}?{FAST}&moveDestinations={stranger.address}"
    with imaging_site(folder, {"PACS": address}) as here:
        here.agent.wait_connected()
        here.sandbox.bot = bot = Bot()
        yield here, bot


def moved(here: Site, bot: Bot, *objects: Instance) -> tuple[int | None, ...]:
    """Completed, failed and warned about."""
    bot.replies["C-MOVE"] = keep(here, *objects)
    study = data_set(QueryRetrieveLevel="STUDY", StudyInstanceUID="1.2.3")
    with associated(here, STUDY_MOVE) as scu:
        (last, _) = list(scu.send_c_move(study, "STRANGER", STUDY_MOVE))[-1]
    return counts(last)[1:]


def test_a_destination_that_hangs_up_in_an_object_keeps_no_thread(tmp_path):
    """Each object that broke off left a thread behind that waited for ever, and with it the connection."""
    with Stranger(limit=1_000_000) as stranger, moving(tmp_path, stranger) as (here, bot):

        def threads() -> int:
            return len(list(here.agent._proc("task").iterdir()))

        large = made(20_000_000)
        assert moved(here, bot, large, large, large) == (0, 3, 0)
        before = threads()
        for _ in range(3):
            assert moved(here, bot, large, large, large) == (0, 3, 0)
        eventually(lambda: threads() < before + 6, 5, f"{before} threads, not {threads()}")


def aborting(connection: socket.socket) -> None:
    Stranger._send(connection, ABORT, bytes(4))
    connection.shutdown(socket.SHUT_RDWR)


def closing(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


def releasing(connection: socket.socket) -> None:
    Stranger._send(connection, RELEASE_RQ, bytes(4))


@pytest.mark.parametrize("after", [aborting, closing, releasing])
def test_a_destination_that_ends_the_association_behind_each_object(tmp_path, after):
    """The next object was already on its way: it failed, or was waited for 30 s and the rest of the study given up."""
    with Stranger(after) as stranger, moving(tmp_path, stranger) as (here, bot):
        assert moved(here, bot, *(made(100) for _ in range(5))) == (5, 0, 0)
        assert len(stranger.stored) >= 5


@pytest.mark.parametrize("user", [b"", _item(0x51, b"\0\1"), _item(0x99, b"new") + _item(0x53, b"")])
def test_a_destination_that_says_little_or_odd_things_of_itself(tmp_path, user):
    """Without a maximum length it was an internal error, with unknown items it `cannot be reached`. It answers each
    object as message 1, whatever the number of the request; one association is enough for all."""
    with Stranger(user=user) as stranger, moving(tmp_path, stranger) as (here, bot):
        assert moved(here, bot, *(made(300_000) for _ in range(3))) == (3, 0, 0)
        assert (stranger.associations, len(stranger.stored)) == (1, 3)


class Words:
    """A main log that nobody reads."""

    def warn(self, text: str) -> None:
        """Nothing."""


async def sent(stranger: Stranger, folder, instance: Instance) -> ma.Json:
    """The answer to an object that is in the spool."""
    ma.imaging()
    sender = ma.Sender("ME", ma.parse_target(f"dicom://{stranger.address}", str), cast(ma.Log, Words()), (5, 5, 20))
    with ma.SpoolFile(ma.Spool(folder, lambda size: "")) as file:
        file.write(part10(instance))
        try:
            return await sender.send(file, ma.meta_of(file))
        except asyncio.CancelledError:
            sender.abort()
            raise
        finally:
            await sender.release()


def test_an_object_that_is_sent_gives_way_to_messages(tmp_path, monkeypatch):
    """Beside one C-MOVE at full speed a message waited 32 ms at the median for its acknowledgment, and 1 ms without."""
    monkeypatch.setattr(ma, "GIVE_WAY_SECS", 1.0)

    async def run() -> float:
        monkeypatch.setattr(ma.Line, "heard_at", begun := asyncio.get_running_loop().time())
        await sent(stranger, tmp_path, made(1_000_000))
        return asyncio.get_running_loop().time() - begun

    with Stranger() as stranger:
        assert asyncio.run(run()) >= 1
        assert stranger.stored[0] > 1_000_000


@pytest.mark.parametrize("turns", range(4))
def test_a_send_that_is_cancelled_while_the_line_takes_more_again_ends(turns):
    """In Python 3.11 it went on, without any limit of time, where both came in one turn of the event loop or two."""

    async def run() -> bool:
        line = ma.DicomCall(cast(ma.Sender, SimpleNamespace(answer_secs=9.0, store=None)))
        line._transport = cast(asyncio.Transport, SimpleNamespace(is_closing=lambda: True, get_write_buffer_size=int))
        line.pause_writing()
        writing = asyncio.create_task(line.write(b"x"))
        await asyncio.sleep(0.01)
        line.resume_writing()
        for _ in range(turns):
            await asyncio.sleep(0)
        asked = writing.cancel()
        await asyncio.wait([writing])
        return writing.cancelled() or not asked

    assert asyncio.run(run())


def test_a_file_of_which_an_object_broke_off_is_closed(tmp_path):
    """It stayed open with the error that was remembered: its room on the disk (Windows: itself) until a collection."""
    with Stranger(limit=1_000_000) as stranger, moving(tmp_path, stranger) as (here, bot):
        large = made(20_000_000)
        assert moved(here, bot, large, large, large) == (0, 3, 0)
        files = [one.readlink() for one in here.agent._proc("fd").iterdir()]
        assert not [one for one in files if ".part" in str(one)]


def test_a_file_without_a_data_set_is_not_sent(tmp_path):
    """A data set was announced and none came: the destination was waited for, and the rest of the study given up."""
    with Stranger() as stranger, moving(tmp_path, stranger) as (here, bot):
        assert moved(here, bot, made(100), made(100)._replace(content=b""), made(100)) == (2, 1, 0)
        here.agent.logged("it has no data set")
        assert len(stranger.stored) == 2


def test_a_line_that_is_given_up_while_it_empties_ends_in_silence(tmp_path):
    """`Exception in callback Line.abort() (AttributeError)` in the main log, a second after: it had closed itself."""
    failures: list[object] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(context))
        sending = asyncio.create_task(sent(stranger, tmp_path, made(20_000_000)))
        assert await asyncio.to_thread(busy.wait, 10)
        await asyncio.sleep(0.2)  # what the system and the transport hold is full
        sending.cancel()
        await asyncio.wait([sending])
        free.set()
        await asyncio.sleep(ma.HANG_UP_SECS + 0.5)

    busy, free = threading.Event(), threading.Event()

    class Slow(Stranger):
        @staticmethod
        def _send(connection: socket.socket, kind: int, content: bytes) -> None:
            Stranger._send(connection, kind, content)
            busy.set()
            free.wait(10)

    with Slow() as stranger:
        asyncio.run(run())
    assert failures == []
