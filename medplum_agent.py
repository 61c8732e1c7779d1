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

    Version, limits · Errors · Settings · Logs · HL7 · MLLP · Byte stream · ASTM · Store · FHIR · Uplink ·
    Delivery · Channels · Devices · DICOM · Agent · Command line
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import enum
import errno
import functools
import gc
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import sys
import threading
import time
import types
import typing
import urllib.parse
import urllib.request
import uuid
import warnings
from asyncio.sslproto import SSLProtocol
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, TypeVar

import certifi
import tomli
import truststore
import urllib3
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException
from websockets.frames import Frame, Opcode
from websockets.protocol import State as SocketState

if typing.TYPE_CHECKING:
    import icmplib
    from pydicom import Dataset
    from pynetdicom.ae import ApplicationEntity as AE
    from pynetdicom.association import Association
    from pynetdicom.events import Event
    from pynetdicom.transport import AssociationSocket

try:
    from websockets.speedups import apply_mask
except ImportError:  # pragma: no cover
    from websockets.utils import apply_mask

try:
    import orjson

    dump_json: Callable[[Any], bytes] = orjson.dumps
    load_json: Callable[[Any], Any] = orjson.loads
except ImportError:  # pragma: no cover - platforms without a wheel: slower, the same bytes on the wire

    def dump_json(value: Any) -> bytes:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()

    def load_json(text: Any) -> Any:
        return json.loads(bytes(text) if isinstance(text, memoryview) else text)


# =====================================================================================================================
# Version, limits
#
# Every bound has a name, a unit and a reason. What a site could need to change is a setting instead (next section).
# =====================================================================================================================

__version__ = "5.2.0"
BUILD = "0000000"  # the commit; stamped by `build.py binary`
VERSION: Final = f"{__version__}-{BUILD}"

KIB, MIB = 1024, 1024 * 1024
READ_BYTES = 64 * KIB  # asyncio's 256 KiB costs a memory map per read: a factor of three in lockstep traffic
RESOLVE_SECS = 2.0  # to look up the host of an Endpoint address
SOCKET_BACKLOG = 512  # connections waiting for accept(): a whole site reconnecting at once
BIND_RETRY_SECS = 0.25  # a port held by the agent that we replace is free within moments
GRACEFUL_CLOSE_SECS = 5.0  # a device connection that is closed by us may finish what is being stored
ENDED_SECS = 60.0  # a device that ended its side may wait so long for its answers
STOP_ANSWER_SECS = 3.0  # at shutdown, wait this long for answers that devices are waiting for
STOP_SECS = 9.0  # the whole clean stop; service managers kill after 10 s

COMMIT_MESSAGES = 4096  # messages in one transaction: bounds the latency of the one behind
COMMIT_BYTES = 16 * MIB  # the same for large messages
UNCOMMITTED_BYTES = 16 * MIB  # received but not yet on disk; above it devices are no longer read
UNCOMMITTED_MESSAGES = 8192  # the same for small messages
LAZY_SECS = 0.1  # finished rows are marked with the next batch, or after this time
COMMITMENT_POLL_MS = 1000  # a storage commitment looks this often whether its objects have reached the server
COMPLAIN_SECS = 5.0  # failed tries of one queue are logged at most this often
MAX_WARNINGS = 20  # warnings of one channel within that time
WINDOW_MESSAGES = 8192  # queued messages of a channel known in memory; the rest stays on disk
WINDOW_BYTES = 4 * MIB  # bodies among them that are kept in memory
INFLIGHT_BYTES = 16 * MIB  # of one channel with the server at once
REFILL_MESSAGES = 1024  # rows read from disk in one go: a few ms of the interpreter
PAGE_BYTES = 8192  # SQLite page: large messages want large pages, random control ids small ones
CHECKPOINT_PAGES = 2000  # 16 MiB of WAL: more gives stalls of 30-100 ms
STORE_REOPEN_SECS = 5.0  # a store that cannot be opened is tried again
ALIVE_SECS = 5.0  # a running agent says so this often, for `health`
DEAD_SECS = 30.0  # one that has not said so for so long hangs or is gone
STORE_REMIND_SECS = 60.0  # a store that cannot be written is an error in the log this often
DISK_RESERVE_BYTES = 64 * MIB  # kept free so that settling and logging go on when the disk fills up
SWEEP_ROWS = 1000  # rows deleted in one transaction: an ACK never waits for the sweeper

RELOAD_START_SECS = 3.0  # a reload asked for while the agent starts waits this long; the server waits 5 s
HTTP_TIMEOUT_SECS = 30.0  # one HTTP request
TRANSFER_TIMEOUT_SECS = 120.0  # of silence while a file is sent or fetched, however long it takes as a whole
TRANSFERS = 4  # files under way to or from the server at once
TRANSFER_BLOCK_BYTES = 256 * KIB  # read and written in one go
HTTP_ATTEMPTS = 3  # uplink contract 1: 429, 5xx and network errors
TOKEN_MARGIN_SECS = 300.0  # refresh this long before the token expires
TOKEN_REFRESH_SPACING_SECS = 5.0  # a server that hands out nearly expired tokens must not be asked per message
CONNECT_TIMEOUT_SECS = 10.0  # TCP, proxy, TLS and WebSocket handshake together
RECONNECT_BASE_SECS, RECONNECT_MAX_SECS = 1.0, 10.0  # full jitter between 0 and base * 2^n, capped
SUSPECT_LOSSES = 3  # connections lost in a row with messages in flight: one of these may be the cause
STABLE_SECS = 5.0  # a connection that lived this long resets the back-off
SERVER_FIRST_SECS = 5.0  # at start the server is asked for the configuration before the saved one is used
UPLINK_FRAME_BYTES = 64 * MIB  # the largest frame we accept from the server
UPLINK_BUFFER_BYTES = MIB  # unsent bytes in the socket above which no further message is handed to it
PUSH_WAIT_SECS = 9.0  # a push that a caller waits for: below the server's default of 10 s, so that it hears why
PUSH_ANSWER_BYTES = 1_000_000  # a device's answer; the server closes the connection at 1 MiB by default
PUSH_STORED_SECS = 30.0  # one try of a stored push
PUSHED_IDS = 256  # pushes to connected devices whose late ACKs are still known
DEVICE_IDLE_SECS = 10.0  # without keepAlive an unused device connection is closed after this time
DICOM_PUSH_SECS = 600.0  # one try of a stored push to an imaging device: large objects, slow archives
DICOM_PUSHES = 8  # pushes to imaging devices under way at once
DIMSE_SECS = 60.0  # to wait for the peer's answer to a DIMSE request of ours
IDLE_POLL_SECS = 0.05  # threads of an association look for time-outs this often
CANCEL_POLL_SECS = 0.1  # a device that waits for the Bot may cancel
PDU_BYTES = MIB + KIB  # a longer PDU is not read: more than maxPdu can be, and than association requests are
QUEUED_PDUS = 16  # encoded and not yet sent: 2 MiB
STORE_WAIT_SECS = 60.0  # for a message of an association to be on disk
GIVE_WAY_SECS = 0.002  # for so long after bytes from a device, threads of associations leave the interpreter to it
GIVE_WAY_MAX_SECS = 0.005  # at most so long at a time: a site that is always busy still wants its images
INLINE_BYTES = 4096  # base64 of a binary value that may be part of the JSON
LARGE_VALUE_BYTES = 512 * KIB  # a value above this is not read for the JSON
BODY_BYTES = 900_000  # of a message's JSON inside its frame; the server closes the connection at 1 MiB by default
COMMITMENT_REPORT_DAYS = 3  # a report that no device took is tried again at each start for so long
COMMITMENT_REPORT_SECS = (0.0, 5.0, 30.0, 120.0, 600.0)  # before each try to report a storage commitment
PING_SECS = 8.0  # a whole ping, whatever its count: below the server's 10 s
PING_MAX = 100  # echo requests of one ping
MAX_STATS_SAMPLES = 1000  # round trips kept per channel
LOG_HELD_BYTES = 4 * MIB  # channel log lines in memory; more than this means a slow disk, and the writer must wait
LOG_PAGE_MAX = 1000  # entries of one $fetch-logs
LOG_BLOCK_BYTES = 64 * KIB  # log files are read backwards in blocks of this size

T = TypeVar("T")
S = TypeVar("S", bound="ChannelSettings")
Json = dict[str, Any]


def now_ms() -> int:
    """Epoch milliseconds: the unit of every time in the store."""
    return time.time_ns() // 1_000_000


# =====================================================================================================================
# Errors
#
# One root. LocalError: our side (configuration, disk). PeerError: theirs, with the answer to send.
# =====================================================================================================================


class AgentError(Exception):
    """The root: its text is written for the person who must act on it and holds no patient data."""


class LocalError(AgentError):
    """Something on our side: a setting, a file, the disk."""


class ConfigError(LocalError):
    """A configuration that cannot be used; `problems` lists everything that is wrong with it."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class StorageError(LocalError):
    """The store cannot take a message; the text says why and goes to the device in MSA-3."""


class PeerError(AgentError):
    """The peer broke the rules; `code` is the kind of HL7 refusal it earns (R reject, E error)."""

    def __init__(self, text: str, code: str = "R"):
        super().__init__(text)
        self.code = code


class DeviceError(PeerError):
    """A device could not be reached or did not answer; `kind` is a key of _REASONS."""

    def __init__(self, text: str, kind: str):
        super().__init__(text, "E")
        self.kind = kind


class PingError(PeerError):
    """A ping that cannot be done or was not answered."""


class ServerError(PeerError):
    """An HTTP request that the server refused; `status` is 0 when it could not be reached."""

    def __init__(self, text: str, status: int = 0):
        super().__init__(text)
        self.status = status


# =====================================================================================================================
# Settings
#
# One setting, one row: a field of one of four frozen dataclasses. The parser, the checks, `--settings-schema` and
# README's tables come from the row. Names are the wire's own (camelCase). Precedence for a channel, field by field:
# Endpoint address, then the Agent setting named in `agent=`, then the default. May touch: files, environment.
# =====================================================================================================================

LEVELS = ("NONE", "ERROR", "WARN", "INFO", "DEBUG")
RETRY_MODES = ("none", "normal", "guaranteed")


class FieldPath(NamedTuple):
    """One part of a logical channel key; indices start at 1, 0 means the whole."""

    segment: str
    field: int
    component: int
    subcomponent: int


class Peer(NamedTuple):
    """A DICOM application entity that we may connect to."""

    host: str
    port: int


def ae_titles(text: str) -> list[str]:
    """Comma-separated AE titles; ValueError for what is none (PS3.5 6.2: 1 to 16 printable characters)."""
    titles = [part.strip() for part in text.split(",") if part.strip()]
    for title in titles:
        if len(title) > 16 or not title.isascii() or not title.isprintable() or "\\" in title:
            raise ValueError(f"'{title}' is no AE title: 1 to 16 printable ASCII characters without backslash")
    return titles


def networks(text: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Comma-separated addresses and networks; ValueError names the bad one."""
    return [ipaddress.ip_network(part.strip(), strict=False) for part in text.split(",") if part.strip()]


def destinations(text: str) -> dict[str, Peer]:
    """Comma-separated `AET@host:port` by AE title."""
    found: dict[str, Peer] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        title, at, address = part.rpartition("@")
        url = urllib.parse.urlsplit(f"//{address}")
        if not (at and ae_titles(title) and url.hostname and url.port):
            raise ValueError(f"'{part}' needs the form AETITLE@host:port")
        found[title] = Peer(url.hostname, url.port)
    return found


@functools.cache
def parse_key(spec: str) -> tuple[FieldPath, ...]:
    """`SEG-field[.component[.subcomponent]]`, comma separated; ValueError names the bad part."""
    paths = []
    for token in spec.split(","):
        match = re.fullmatch(r"([A-Z][A-Z0-9]{2})-([1-9]\d*)(?:\.([1-9]\d*))?(?:\.([1-9]\d*))?", token.strip())
        if not match:
            raise ValueError(f"'{token.strip()}' is not of the form PID-3 or PID-3.1")
        segment, *indices = match.groups()
        paths.append(FieldPath(str(segment), *(int(index or 0) for index in indices)))
    return tuple(paths)


def byte_sequence(text: str) -> bytes:
    """The bytes of a decoded parameter, one per code point; ValueError for code points above 0xFF."""
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


def encoding_problem(name: str) -> str:
    """Why text in this encoding cannot be framed by MLLP, or ``: ASCII, with the marks, must stay as it is."""
    ascii_text = "".join(map(chr, range(1, 127)))
    try:
        if ascii_text.encode(name, "replace") == ascii_text.encode():
            return ""
    except LookupError:
        return f"encoding '{name}' is unknown; use a name such as utf-8, iso-8859-1 or windows-1252"
    except (UnicodeError, ValueError):
        pass
    return f"encoding '{name}' cannot be framed by MLLP; use utf-8 or a single-byte encoding"


def check_encoding(name: str) -> None:
    """ValueError for an encoding that cannot be used."""
    if problem := encoding_problem(name):
        raise ValueError(problem)


def setting(
    default: T,
    label: str,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    agent: str = "",
    env: str = "",
    check: Callable[[str], object] | None = None,
    guard: bool = False,
) -> T:
    """One row of the table of settings: `agent` names the Agent setting a channel falls back to.

    `guard`: it keeps somebody out, so a bad value is an error and never left at its default.
    """
    row: dict[str, Any] = {
        "label": label,
        "meaning": meaning,
        "low": low,
        "high": high,
        "choices": choices,
        "agent": agent,
        "env": env,
        "guard": guard,
    }
    row["check"] = check  # raises ValueError for text that cannot be used
    return typing.cast(T, dataclasses.field(default=typing.cast(Any, default), metadata=row))


# fmt: off
@dataclasses.dataclass(frozen=True)
class LoggerSettings:
    """`logger.main.*` and `logger.channel.*`; `[logger.main]` in agent.toml."""

    logLevel: str = setting("INFO", "Level", "least severe level that is written", choices=LEVELS)
    logDir: str = setting("", "Directory", "where the log files go; default: the state directory")
    maxFileSizeMb: int = setting(10, "File size", "a file is rotated above this size (MiB)", low=1)
    filesToKeep: int = setting(10, "Files kept", "newest files kept, older ones are deleted", low=1)


@dataclasses.dataclass(frozen=True)
class ProcessSettings:
    """What one agent process needs to start: arguments, then environment, then agent.toml or agent.properties."""

    baseUrl: str = setting("", "Server", "base URL of the Medplum server", env="MEDPLUM_BASE_URL")
    clientId: str = setting("", "Client id", "id of the ClientApplication", env="MEDPLUM_CLIENT_ID")
    clientSecret: str = setting("", "Client secret", "secret of the ClientApplication", env="MEDPLUM_CLIENT_SECRET")
    agentId: str = setting("", "Agent id", "id of the Agent resource", env="MEDPLUM_AGENT_ID")
    logLevel: str = setting("", "Log level", "level of both logs", choices=LEVELS, env="MEDPLUM_LOG_LEVEL")
    clientSecretFile: str = setting("", "Secret file",
        "file that holds the client secret, instead of clientSecret", env="MEDPLUM_CLIENT_SECRET_FILE")
    caFile: str = setting("", "CA file", "PEM file of further certificate authorities to trust", env="MEDPLUM_CA_FILE")
    stateDir: str = setting("", "State directory",
        "queue, logs and last configuration; default: see below", env="MEDPLUM_STATE_DIR")
    heartbeatSecs: float = setting(10.0, "Heartbeat", "seconds between heartbeats; two unanswered reconnect", low=0.1)
    compression: bool = setting(False, "Compression", "compress the uplink (costs 30-60 % of its speed)")


@dataclasses.dataclass(frozen=True)
class AgentSettings:
    """`Agent.setting[]`: the first entry of a name counts, and only its value member of the right type."""

    keepAlive: bool = setting(False, "Keep alive", "keep outbound device connections open and reuse them")
    maxClientsPerRemote: int = setting(5, "Clients per remote",
        "outbound connections per device; 1 with keepAlive", low=1)
    logStatsFreqSecs: int = setting(-1, "Stats in the log",
        "seconds between two stats lines in the main log; -1 is off")
    durableQueue: bool = setting(True, "Durable queue", "accepted for compatibility: the queue is always on")
    queueDbPath: str = setting("", "Queue file",
        "path of the queue; default: in the state directory; read at start only")
    queueRetentionDays: int = setting(7, "Retention", "days that finished messages are kept", low=0)
    queueRetentionMaxMb: int = setting(512, "Retention size",
        "finished messages go, oldest first, above this size (MiB)", low=1)
    queueErroredRetentionDays: int = setting(90, "Dead-letter retention",
        "least days that dead letters are kept", low=0)
    queueSweepIntervalSecs: int = setting(3600, "Sweep interval", "seconds between two retention sweeps", low=1)
    queueMaxMb: int = setting(0, "Queue limit",
        "queue size (MiB) above which devices get CE/AE; 0: until the disk is nearly full", low=0)
    channelRetryMode: str = setting("", "Retry mode", "default of retryMode for all channels", choices=RETRY_MODES)
    channelAutoRetryBaseDelayMs: int = setting(1000, "Retry base delay", "first back-off (ms)", low=1)
    channelAutoRetryMaxDelayMs: int = setting(60_000, "Retry delay limit", "largest back-off (ms)", low=1)
    channelAutoRetryMaxAttempts: int = setting(20, "Retry attempts",
        "tries before a message becomes a dead letter; 0: no limit", low=0)
    channelAutoRetryBackoffMultiplier: float = setting(2.0, "Retry multiplier", "growth of the back-off", low=1)
    channelMaxWorkers: int = setting(64, "Workers", "messages of a channel in flight at once", low=1, high=500)
    channelLogicalChannelKey: str = setting("", "Ordering key", "default of logicalChannelKey for all channels",
        check=parse_key)
    deadLetterAfterHours: int = setting(72, "Dead-letter age",
        "hours of failed tries after which a message becomes a dead letter; 0: no limit", low=0)
    botErrorAck: str = setting("AE", "Answer to a Bot failure",
        "default of botErrorAck for all channels", choices=("AE", "AR", "none"))
    botEmptyAck: str = setting("AA", "Answer of a silent Bot",
        "default of botEmptyAck for all channels", choices=("AA", "AE", "none"))
    strictConfigValidation: bool = setting(False, "Strict validation", "a configuration warning rejects the reload")


@dataclasses.dataclass(frozen=True)
class ChannelSettings:
    """Query parameters of the address of any channel: delivery and connections."""

    retryMode: str = setting("", "Retry mode",
        "what is tried again; without it: as `guaranteed`, and a Bot's AE goes to the device",
        choices=RETRY_MODES, agent="channelRetryMode")
    autoRetryBaseDelayMs: int = setting(1000, "Retry base delay",
        "first back-off (ms)", low=1, agent="channelAutoRetryBaseDelayMs")
    autoRetryMaxDelayMs: int = setting(60_000, "Retry delay limit",
        "largest back-off (ms)", low=1, agent="channelAutoRetryMaxDelayMs")
    autoRetryMaxAttempts: int = setting(20, "Retry attempts",
        "tries before a message becomes a dead letter; 0: no limit", low=0, agent="channelAutoRetryMaxAttempts")
    autoRetryBackoffMultiplier: float = setting(2.0, "Retry multiplier",
        "growth of the back-off", low=1, agent="channelAutoRetryBackoffMultiplier")
    deadLetterAfterHours: int = setting(72, "Dead-letter age",
        "hours of failed tries after which a message becomes a dead letter; 0: no limit",
        low=0, agent="deadLetterAfterHours")
    maxWorkers: int = setting(64, "Workers",
        "messages in flight at once; 1 keeps the whole channel in order", low=1, high=500, agent="channelMaxWorkers")
    responseTimeoutSecs: float = setting(60.0, "Response time-out", "seconds to wait for the Bot's answer", low=0.1)
    maxMessageBytes: int = setting(16 * MIB, "Message size", "larger messages are rejected (bytes)", low=1024)
    maxConnections: int = setting(1000, "Connections", "device connections at once", low=1)
    idleTimeoutSecs: float = setting(0.0, "Idle time-out",
        "a silent connection is closed after so many seconds; 0: never", low=0)
    frameTimeoutSecs: float = setting(60.0, "Frame time-out",
        "a connection that stops inside a message is closed after so many seconds; 0: never", low=0)
    tls: bool = setting(False, "TLS", "listen with TLS; `mllps://` and `dicoms://` imply it")
    certFile: str = setting("", "Certificate", "PEM file of our certificate, for TLS")
    keyFile: str = setting("", "Key", "PEM file of its key, when it is not in certFile")
    clientCa: str = setting("", "Client CA", "PEM file of the authority that must have signed the device's certificate")
    handshakeTimeoutSecs: float = setting(10.0, "Handshake time-out", "seconds for the TLS handshake", low=0.1)


@dataclasses.dataclass(frozen=True)
class Hl7Settings(ChannelSettings):
    """Query parameters of an `mllp://` Endpoint address."""

    encoding: str = setting("utf-8", "Encoding", "character encoding of the device")
    enhanced: str = setting("", "Enhanced mode",
        "`true`: CA when stored, Bot's answer later; `aa`: AA when stored", choices=("true", "aa"))
    appLevelAck: str = setting("AL", "Application ACK",
        "which of the Bot's answers pass in enhanced mode", choices=("AL", "ER", "NE", "SU"))
    assignSeqNo: bool = setting(False, "Sequence number", "write a running number into MSH-13")
    messagesPerMin: int = setting(0, "Rate limit", "messages a minute read from one connection; 0: no limit")
    duplicateBehavior: str = setting("idempotent", "Duplicates",
        "a control id seen before: `idempotent` answers equal bytes as before and rejects others, `reject` "
        "rejects both, `accept` treats every message as new",
        choices=("idempotent", "reject", "accept"))
    logicalChannelKey: str = setting("", "Ordering key",
        "fields such as `PID-3.1,MSH-4` whose equal values stay in order; default: the patient",
        agent="channelLogicalChannelKey", check=parse_key)
    botErrorAck: str = setting("AE", "Answer to a Bot failure",
        "MSA-1 sent in original mode when the Bot failed", choices=("AE", "AR", "none"), agent="botErrorAck")
    botEmptyAck: str = setting("AA", "Answer of a silent Bot",
        "MSA-1 sent in original mode when the Bot returned nothing", choices=("AA", "AE", "none"), agent="botEmptyAck")
    ackFormat: str = setting("standard", "ACK bytes",
        "`reference` leaves the last carriage return away", choices=("standard", "reference"))


@dataclasses.dataclass(frozen=True)
class StreamSettings(ChannelSettings):
    """Query parameters of a `tcp://` or `serial:` Endpoint address; repeated list parameters are joined by commas."""

    startChar: str = setting("", "Start", "raw: byte or bytes that start a message", check=byte_sequence)
    endChar: str = setting("", "End", "raw: byte or bytes that end a message", check=byte_sequence)
    mode: str = setting("raw", "Mode", "what the device speaks", choices=("raw", "astm"))
    autoRespond: str = setting("", "Automatic answers",
        "raw: `<pattern>:<response>`, repeatable; answered wherever the pattern is received", check=auto_responses)
    stripSequence: str = setting("", "Strip sequences", "raw: byte sequences removed from the body, repeatable",
        check=byte_sequences)
    stripControlChars: bool = setting(False, "Strip control characters", "raw: remove bytes below 0x20 from the body")
    keepControlChars: str = setting("", "Keep control characters", "raw: bytes that stripControlChars leaves",
        check=byte_sequences)
    bodyEncoding: str = setting("hex", "Body", "raw: how the body is written; ASTM bodies are always text",
        choices=("hex", "utf-8", "utf8"))
    ignoreResponse: bool = setting(False, "Ignore answers", "do not write the Bot's answer to the device")
    maxMessageBytes: int = setting(8 * MIB, "Message size", "larger messages are refused (bytes)", low=1024)
    checksum: str = setting("on", "Checksum", "ASTM: `off` for instruments without one", choices=("on", "off"))
    strictFrameNumbers: bool = setting(False, "Strict frame numbers",
        "ASTM: NAK a frame out of sequence instead of accepting it with a warning")
    requireTerminator: bool = setting(False, "Require L record",
        "ASTM: a session that ends without its L record counts as interrupted; for instruments that always send one")
    ackEot: bool = setting(False, "ACK of EOT", "ASTM: acknowledge EOT, against the standard, for analyzers that wait")
    maxFrame: int = setting(240, "Frame size", "ASTM: most characters of text in a frame that we send",
        low=1, high=64_000)
    encoding: str = setting("latin-1", "Encoding", "ASTM: character encoding of the records", check=check_encoding)
    role: str = setting("server", "Role", "`client`: we connect to the device", choices=("server", "client"))
    receiveTimeoutSecs: float = setting(30.0, "Receive time-out",
        "ASTM: a session that is silent for so many seconds is interrupted", low=0.1)
    replyTimeoutSecs: float = setting(15.0, "Reply time-out", "ASTM: seconds to wait for ACK or NAK", low=0.1)
    contentionTimeoutSecs: float = setting(20.0, "Contention time-out",
        "ASTM: seconds to wait after both sides asked to send", low=0.1)
    nakDelaySecs: float = setting(10.0, "NAK delay", "ASTM: seconds to wait when the instrument is busy", low=0.1)
    baudRate: int = setting(9600, "Baud rate", "serial: bits a second", low=50)
    dataBits: int = setting(8, "Data bits", "serial: 5 to 8", low=5, high=8)
    parity: str = setting("none", "Parity", "serial", choices=("none", "even", "odd", "mark", "space"))
    stopBits: float = setting(1.0, "Stop bits", "serial: 1, 1.5 or 2", low=1, high=2)
    flow: str = setting("none", "Flow control", "serial", choices=("none", "rtscts", "xonxoff"))


@dataclasses.dataclass(frozen=True)
class DicomSettings(ChannelSettings):
    """Query parameters of a `dicom://` or `dicoms://` Endpoint address."""

    maxMessageBytes: int = setting(0, "Object size",
        "larger objects are refused (bytes); 0: as long as the disk and queueMaxMb have room", low=0)
    maxConnections: int = setting(50, "Associations", "associations at once; further ones are rejected", low=1)
    idleTimeoutSecs: float = setting(60.0, "Idle time-out",
        "a silent association is aborted after so many seconds; 0: never", low=0)
    frameTimeoutSecs: float = setting(60.0, "PDU time-out",
        "a connection that stops inside a PDU is closed after so many seconds; 0: never", low=0)
    associationTimeoutSecs: float = setting(30.0, "Association time-out",
        "seconds for the association request, and for the release", low=0.1)
    calledAeTitle: str = setting("", "Called AE title",
        "our AE title: associations that call another are rejected; default: any", check=ae_titles, guard=True)
    callingAeTitles: str = setting("", "Calling AE titles",
        "AE titles that may associate, comma separated; default: any", check=ae_titles, guard=True)
    peers: str = setting("", "Peers",
        "addresses and networks such as `10.1.0.0/16` that may connect, comma separated; default: any",
        check=networks, guard=True)
    maxPdu: int = setting(131_072, "PDU size", "largest PDU that we receive (bytes)", low=4096, high=MIB)
    moveDestinations: str = setting("", "Move destinations",
        "`AETITLE@host:port`, comma separated: where C-MOVE may send to, and storage commitment reports go",
        check=destinations)
    answerWaitSecs: float = setting(10.0, "Wait for the Bot",
        "MPPS: seconds to wait for the Bot's answer before success is reported (the request is on disk)", low=0)


@dataclasses.dataclass(frozen=True)
class DeviceSettings:
    """Query parameters of a Device.url that is pushed to."""

    encoding: str = setting("utf-8", "Encoding", "character encoding of the device")
    defaultReturnAck: str = setting("first", "ACK awaited", "`first`: any; `application`: not a CA",
        choices=("first", "application"))
    connectTimeoutSecs: float = setting(5.0, "Connect time-out", "seconds to connect", low=0.1)
    ackTimeoutSecs: float = setting(0.0, "ACK time-out",
        "seconds for a whole try; 0: 9 when a caller waits (below its default of 10), else 30", low=0)
    tls: bool = setting(False, "TLS", "connect with TLS; `mllps://` implies it")
    checkHost: bool = setting(True, "Host check", "the device's certificate must name its host")
    caFile: str = setting("", "CA file", "PEM file of further authorities for the device's certificate")
    certFile: str = setting("", "Client certificate", "PEM file of our certificate, if the device wants one")
    keyFile: str = setting("", "Client key", "PEM file of its key, when it is not in certFile")
    mode: str = setting("raw", "Mode", "`tcp://` only: `astm` sends the body's records as an ASTM session",
        choices=("raw", "astm"))
    bodyEncoding: str = setting("hex", "Body", "`tcp://` only: how body and answer are written",
        choices=("hex", "utf-8"))
    endChar: str = setting("", "End character", "`tcp://` only: wait for an answer up to this character")
    checksum: str = setting("on", "Checksum", "ASTM: `off` for instruments without one", choices=("on", "off"))
    maxFrame: int = setting(240, "Frame size", "ASTM: most characters of text in a frame", low=1, high=64_000)
    replyTimeoutSecs: float = setting(15.0, "Reply time-out", "ASTM: seconds to wait for ACK or NAK", low=0.1)
    contentionTimeoutSecs: float = setting(20.0, "Contention time-out",
        "ASTM: seconds to wait after both sides asked to send", low=0.1)
    nakDelaySecs: float = setting(10.0, "NAK delay",
        "ASTM: seconds to wait when the instrument is busy; a push that is waited for has 9 s in all", low=0.1)
    callingAeTitle: str = setting("MEDPLUM", "Calling AE title", "`dicom://` only: our AE title",
        check=ae_titles, guard=True)
# fmt: on


def rows_of(cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """The rows of a settings class by name."""
    return {row.name: row for row in dataclasses.fields(cls)}


def kind_of(row: dataclasses.Field[Any]) -> str:
    """`string`, `boolean`, `integer` or `decimal`: also the FHIR value[x] member, `value<Kind>`."""
    return {"str": "string", "bool": "boolean", "int": "integer", "float": "decimal"}[str(row.type)]


def parse_setting(row: dataclasses.Field[Any], value: Any) -> Any:
    """The checked value of a row, from text or from a typed member; ValueError says what is allowed."""
    kind, meta = kind_of(row), row.metadata
    if kind == "boolean":
        return value if isinstance(value, bool) else str(value).strip().lower() == "true"
    if kind == "string":
        if not isinstance(value, str):
            raise ValueError("must be text in quotes")
        if meta["check"] and value:
            meta["check"](value)
        return _parse_choice(value.strip(" "), meta["choices"])  # control characters may be what is meant
    number = _parse_number(kind, value)
    if meta["low"] is not None and number < meta["low"]:
        raise ValueError(f"must be at least {meta['low']:g}")
    return number


def _parse_number(kind: str, value: Any) -> float:
    try:
        number: float = float(value) if kind == "decimal" else int(str(value).strip())
        if isinstance(value, bool) or not math.isfinite(number):
            raise ValueError(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError("is not a number" if kind == "decimal" else "is not a whole number") from None
    return number


def _parse_choice(text: str, choices: tuple[str, ...]) -> str:
    match = next((choice for choice in choices if choice.lower() == text.lower()), None)
    if not choices or match:
        return match or text
    raise ValueError(f"must be one of {', '.join(choices)}")


# --- the process: arguments, environment, agent.toml, agent.properties -----------------------------------------------

ARGUMENTS = ("baseUrl", "clientId", "clientSecret", "agentId", "logLevel")


class Source(NamedTuple):
    """Where values came from, said in errors."""

    name: str
    values: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """A process that can start: checked settings of the process and its two loggers, and warnings to log."""

    settings: ProcessSettings
    main_log: LoggerSettings
    channel_log: LoggerSettings
    warnings: tuple[str, ...]

    @property
    def state_dir(self) -> Path:
        """The folder of queue, logs and saved configuration: one for each Agent."""
        if self.settings.stateDir:
            return Path(self.settings.stateDir)
        return default_state_root() / self.settings.agentId


def default_state_root() -> Path:
    """systemd's StateDirectory, else the platform's place for the state of a service or of a user."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if sys.platform == "win32":
        return Path(os.environ.get("PROGRAMDATA", r"C:\ProgramData")) / "MedplumAgent"
    if os.geteuid() == 0:
        return Path(
            "/Library/Application Support/MedplumAgent" if sys.platform == "darwin" else "/var/lib/medplum-agent"
        )
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/MedplumAgent"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "medplum-agent"


def parse_properties(text: str) -> dict[str, str]:
    """`key=value` lines; `=` may occur in a value, `#` and `!` start a comment, there are no escapes."""
    pairs = (line.split("=", 1) for line in text.lstrip("\ufeff").splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs if not key.lstrip().startswith(("#", "!"))}


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def read_config_file(path: Path) -> Source:
    """agent.toml or agent.properties, flat; ConfigError when it cannot be read or parsed."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        values = parse_properties(text) if path.suffix == ".properties" else _flatten(tomli.loads(text))
    except (OSError, ValueError) as error:  # tomli's and Unicode's errors are ValueErrors
        raise ConfigError([f"cannot read the configuration file {path}: {error}"]) from None
    return Source(str(path), values)


def installed_config_file() -> Path:
    """Where packages put the settings."""
    if sys.platform == "win32":
        return default_state_root() / "agent.toml"
    folder = "/Library/Application Support/MedplumAgent" if sys.platform == "darwin" else "/etc/medplum-agent"
    return Path(folder, "agent.toml")


def find_config_file(given: str | None) -> Source | None:
    """--config, else agent.toml, else agent.properties in the working directory, else what a package installed."""
    if given:
        return read_config_file(Path(given))
    here = next((p for n in ("agent.toml", "agent.properties") if (p := Path(n)).is_file()), None)
    if here is None and os.access(installed_config_file(), os.R_OK):  # another user's agent is not our business
        here = installed_config_file()
    return read_config_file(here) if here else None


def resolve_process(
    arguments: Sequence[str], options: Mapping[str, str], environ: Mapping[str, str], config_file: str | None
) -> ProcessConfig:
    """The settings of this process from all sources; ConfigError lists everything that is wrong or missing."""
    rows = rows_of(ProcessSettings)
    sources = [
        Source("the command line", dict(zip(ARGUMENTS, arguments, strict=False)) | dict(options)),
        Source(
            "the environment",
            {n: environ[r.metadata["env"]] for n, r in rows.items() if environ.get(r.metadata["env"])},
        ),
    ]
    if found := find_config_file(config_file):
        sources.append(found)
    problems: dict[str, str] = {}  # by the name of the setting
    sources = _read_secret_file(sources, problems)
    values = {name: value for name, row in rows.items() if (value := _first_value(row, sources, problems)) is not None}
    _check_process(values, sources, problems)
    if problems:
        raise ConfigError(list(problems.values()))
    warnings: list[str] = []
    settings = ProcessSettings(**values)
    main, channel = (_logger_settings(which, found, settings.logLevel, warnings) for which in ("main", "channel"))
    return ProcessConfig(settings, main, channel, tuple(warnings))


def _first_value(row: dataclasses.Field[Any], sources: Sequence[Source], problems: dict[str, str]) -> Any:
    for source in sources:
        if row.name not in source.values:
            continue
        try:
            return parse_setting(row, source.values[row.name])
        except ValueError as error:
            shown = "" if "ecret" in row.name else f" '{source.values[row.name]}'"
            problems[row.name] = f"{row.name}{shown} (from {source.name}) {error}"
            return None
    return None


def _read_secret_file(sources: Sequence[Source], problems: dict[str, str]) -> list[Source]:
    """The sources, with the secret from its file where the first source that knows of one names a file."""
    read = list(sources)
    for index, source in enumerate(sources):
        if "clientSecret" in source.values:
            break
        if path := source.values.get("clientSecretFile"):
            try:
                secret = Path(str(path)).read_text("utf-8-sig").strip()
                read[index] = Source(f"{path}", {**source.values, "clientSecret": secret})
            except (OSError, ValueError) as error:
                problems["clientSecret"] = f"clientSecretFile {path} (from {source.name}) cannot be read: {error}"
            break
    return read


def _is_base_url(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _check_process(values: dict[str, Any], sources: Sequence[Source], problems: dict[str, str]) -> None:
    for position, name in enumerate(ARGUMENTS[:4], 1):
        if not values.get(name) and name not in problems:
            env = rows_of(ProcessSettings)[name].metadata["env"]
            how = f"give it as argument {position}, as {env}, or as {name} in agent.toml"
            problems[name] = f"{name} is missing: {how}"
    url = values.get("baseUrl", "")
    where = next((s.name for s in sources if "baseUrl" in s.values), "")
    if url and not _is_base_url(url):
        problems["baseUrl"] = f"baseUrl '{url}' (from {where}) must start with http:// or https:// and name a host"
    if (agent_id := values.get("agentId")) and not re.fullmatch(r"[A-Za-z0-9\-.]{1,64}", agent_id):
        problems["agentId"] = f"agentId '{agent_id}' is not the id of a FHIR resource (letters, digits, - and .)"
    if (ca := values.get("caFile")) and not Path(ca).is_file():
        problems["caFile"] = f"caFile {ca} does not exist"


def _logger_settings(which: str, found: Source | None, level: str, warnings: list[str]) -> LoggerSettings:
    values: dict[str, Any] = {}
    for name, row in rows_of(LoggerSettings).items():
        key = f"logger.{which}.{name}"
        if found is None or key not in found.values:
            continue
        try:
            values[name] = parse_setting(row, found.values[key])
        except ValueError as error:
            warnings.append(f"{key} '{found.values[key]}' (from {found.name}) {error}; the default is used")
    if level:
        values["logLevel"] = level
    return LoggerSettings(**values)


# --- the Agent and its Endpoints -> a frozen plan --------------------------------------------------------------------

HL7_TYPE, PING_TYPE, BYTES_TYPE = "x-application/hl7-v2+er7", "x-application/ping", "application/octet-stream"
ASTM_TYPE = "x-application/astm-e1394"
JSON_TYPE, DICOM_TYPE = "application/json", "application/dicom"


class Protocol(NamedTuple):
    """What an address's scheme stands for: the name used in logs, and the settings of its parameters."""

    name: str
    settings: type[ChannelSettings]


PROTOCOLS = {  # by prefix of the address
    "mllp": Protocol("HL7", Hl7Settings),
    "tcp": Protocol("Byte Stream", StreamSettings),
    "serial": Protocol("Byte Stream", StreamSettings),
    "dicom": Protocol("DICOM", DicomSettings),
}
LIST_PARAMETERS = (  # repeated ones are joined by commas
    "autoRespond", "stripSequence", "keepControlChars", "callingAeTitles", "peers", "moveDestinations",
)  # fmt: skip


class Policy(NamedTuple):
    """How stored messages are delivered: to the server for a channel, to a device for pushes."""

    name: str  # of the queue, for the log
    workers: int  # messages in flight at once
    mode: str  # a key of _RETRIED
    timeout_secs: float  # to wait for an answer
    base_delay_ms: float
    max_delay_ms: float
    multiplier: float
    attempts: int  # failed tries that make a dead letter; 0: no limit
    dead_letter_hours: float  # of failed tries that make a dead letter; 0: no limit

    def delay_ms(self, failures: int) -> int:
        """Back-off after so many failures, with jitter (channel contract 5.5)."""
        try:
            delay = min(self.max_delay_ms, self.base_delay_ms * self.multiplier ** (failures - 1))
        except OverflowError:
            delay = self.max_delay_ms
        return round(random.uniform(delay / 2, delay))

    def spent(self, failures: int, first_failed_at: int, tries: int = 3) -> bool:
        """Whether a message was tried often enough, or long enough: a clock that jumps once buries nothing."""
        old = self.dead_letter_hours and now_ms() - first_failed_at > self.dead_letter_hours * 3_600_000
        return bool((old and tries >= 3) or (self.attempts and failures >= self.attempts))


@dataclasses.dataclass(frozen=True)
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

    @property
    def is_astm(self) -> bool:
        return isinstance(self.settings, StreamSettings) and self.settings.mode == "astm"

    @property
    def content_type(self) -> str:
        return ASTM_TYPE if self.is_astm else BYTES_TYPE

    @property
    def workers(self) -> int:
        """A sequence number means order, so assignSeqNo alone implies one message in flight."""
        numbered = isinstance(self.settings, Hl7Settings) and self.settings.assignSeqNo
        return 1 if numbered and "maxWorkers" not in self.given else self.settings.maxWorkers

    @property
    def key_spec(self) -> str:
        """What orders it: `*` the whole feed, `@` the device, `study`, a logical channel key, or `` the patient."""
        if self.workers == 1:
            return "*"
        if isinstance(self.settings, Hl7Settings):
            return self.settings.logicalChannelKey
        return "study" if isinstance(self.settings, DicomSettings) else "@"

    @functools.cached_property
    def policy(self) -> Policy:
        """How the channel's messages are delivered; without retryMode the mode is `original` or `enhanced`."""
        s = self.settings
        waiting = isinstance(s, Hl7Settings) and not s.enhanced  # the device still owns its message
        mode = s.retryMode or ("original" if waiting else "enhanced")
        attempts = 10 if mode == "normal" and "autoRetryMaxAttempts" not in self.given else s.autoRetryMaxAttempts
        delays = s.autoRetryBaseDelayMs, s.autoRetryMaxDelayMs, s.autoRetryBackoffMultiplier
        return Policy(
            f"Channel '{self.name}'",
            self.workers,
            mode,
            s.responseTimeoutSecs,
            *delays,
            attempts,
            s.deadLetterAfterHours,
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole configuration that can be applied, and the resources it was made from."""

    status: str
    settings: AgentSettings
    given: frozenset[str]  # the settings that the Agent names
    channels: tuple[ChannelPlan, ...]
    warnings: tuple[str, ...]
    agent: Json
    endpoints: tuple[Json, ...]


def agent_settings(agent: Json, warnings: list[str]) -> tuple[AgentSettings, frozenset[str]]:
    """`Agent.setting[]` parsed; bad values are warned about and left at their default."""
    rows, values, seen = rows_of(AgentSettings), dict[str, Any](), set[str]()
    for entry in agent.get("setting") or []:
        name = entry.get("name") if isinstance(entry, dict) else None
        row = rows.get(name) if isinstance(name, str) else None
        if row is None or row.name in seen:
            continue
        seen.add(row.name)
        value = entry.get("value" + kind_of(row).capitalize())
        if value is None and kind_of(row) == "decimal":
            value = entry.get("valueInteger")
        if value is None:
            warnings.append(f"setting {name} needs a value{kind_of(row).capitalize()}; the default is used")
            continue
        try:
            values[row.name] = _clamped(row, parse_setting(row, value), f"setting {name}", warnings.append)
        except ValueError as error:
            warnings.append(f"setting {name} '{value}' {error}; the default is used")
    return AgentSettings(**values), frozenset(values)


def _clamped(row: dataclasses.Field[Any], value: Any, what: str, warn: Callable[[str], None]) -> Any:
    high = row.metadata["high"]
    if high is None or value <= high:
        return value
    warn(f"{what} {value} is above the limit and was set to {high}")
    return high


def channel_settings(
    cls: type[S], query: str, where: str, defaults: AgentSettings, given: frozenset[str], warnings: list[str]
) -> tuple[S, frozenset[str]]:
    """The parameters of one address over the Agent's settings, as a `cls`; ConfigError for what cannot run."""
    values = read_parameters(cls, query, where, warnings.append)
    written = set(values)
    for name, row in rows_of(cls).items():
        if (fallback := row.metadata["agent"]) in given and name not in values:
            values[name] = getattr(defaults, fallback)
            written.add(name)
    _check_retries(values, where, warnings)
    _check_tls(values, where, warnings)
    _CHECKS[cls](values, where, warnings)
    return cls(**values), frozenset(written)


def _check_stream(values: dict[str, Any], where: str, warnings: list[str]) -> None:
    raw_only = ("startChar", "endChar", "autoRespond", "stripSequence", "stripControlChars", "keepControlChars")
    if values.get("mode") == "astm":
        warnings += [f"{where}: {name} is ignored in ASTM mode" for name in raw_only if values.pop(name, None)]
    elif not (values.get("startChar") and values.get("endChar")):
        text = "Failed to parse startChar and/or endChar query param(s); give both, or mode=astm"
        raise ConfigError([f"{where}: {text}"])


def _check_retries(values: dict[str, Any], where: str, warnings: list[str]) -> None:
    base, limit = values.get("autoRetryBaseDelayMs", 1000), values.get("autoRetryMaxDelayMs", 60_000)
    if limit < base:
        warnings.append(f"{where}: autoRetryMaxDelayMs {limit} is below the base delay and was set to {base}")
        values["autoRetryMaxDelayMs"] = base


def read_parameters(cls: type[Any], query: str, where: str, warn: Callable[[str], None]) -> dict[str, Any]:
    """The values that the query of an address sets; bad ones are warned about and left out."""
    pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
    parameters = dict(reversed(pairs))  # the first of a name counts
    for name in LIST_PARAMETERS:
        if name in parameters:
            parameters[name] = ",".join(text for other, text in pairs if other == name)
    rows, values = rows_of(cls), dict[str, Any]()
    for name, text in parameters.items():
        if name not in rows:
            warn(f"{where}: unknown parameter '{name}' is ignored")
            continue
        try:
            given = _leading_integer(text) if name == "messagesPerMin" else text
            values[name] = _clamped(rows[name], parse_setting(rows[name], given), f"{where}: {name}", warn)
        except ValueError as error:
            if rows[name].metadata["guard"]:
                raise ConfigError([f"{where}: {name} '{text}': {error}"]) from None
            warn(f"{where}: {name} '{text}' {error}; it is ignored")
    return values


def _leading_integer(text: str) -> str:
    match = re.match(r"\s*[+-]?\d+", text)
    return match.group() if match else text


def _check_hl7(values: dict[str, Any], where: str, warnings: list[str]) -> None:
    if problem := encoding_problem(values.get("encoding", "utf-8")):
        raise ConfigError([f"{where}: {problem}"])
    if values.get("assignSeqNo") and values.get("maxWorkers", 1) > 1:
        warnings.append(f"{where}: assignSeqNo with maxWorkers above 1: numbers may reach the server out of order")


def _check_tls(values: dict[str, Any], where: str, warnings: list[str]) -> None:
    """A channel that shall be safe does not start without its certificate."""
    if not values.get("tls"):
        if idle := [name for name in ("certFile", "keyFile", "clientCa") if values.get(name)]:
            advice = "write mllps:// or dicoms://, or tls=true"
            raise ConfigError([f"{where}: {', '.join(idle)} would do nothing without TLS: {advice}"])
        return
    if values.get("role") == "client":
        raise ConfigError([f"{where}: tls is for listening; a channel that connects to its device cannot use it"])
    if not values.get("certFile"):
        raise ConfigError([f"{where}: TLS needs certFile, a PEM file with our certificate"])
    try:
        listening_tls(values)
    except OSError as error:
        raise ConfigError([f"{where}: TLS cannot be set up: {error}"]) from None


def listening_tls(values: Mapping[str, Any]) -> ssl.SSLContext:
    """Our certificate, and who may connect, as the files say now (TLS 1.2 and later, PS3.15 B.12); OSError."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    name = f"certFile {values['certFile']}" + (f" with keyFile {values['keyFile']}" if values.get("keyFile") else "")
    try:
        context.load_cert_chain(values["certFile"], values.get("keyFile") or None)
        if values.get("clientCa"):
            name = f"clientCa {values['clientCa']}"
            context.load_verify_locations(values["clientCa"])
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        wanted = "a certificate in PEM" if name.startswith("clientCa") else "a certificate and its key in PEM"
        raise OSError(f"{name}: {error.reason or 'not usable'}; it must hold {wanted}") from None
    except OSError as error:
        raise OSError(f"{name}: {error.strerror}") from None
    return context


_CHECKS: dict[type[ChannelSettings], Callable[[dict[str, Any], str, list[str]], None]] = {
    Hl7Settings: _check_hl7, StreamSettings: _check_stream, DicomSettings: lambda *_: None,
}  # fmt: skip


def channel_plan(
    name: str, endpoint: Json, settings: AgentSettings, given: frozenset[str], warnings: list[str]
) -> ChannelPlan:
    """One `Agent.channel[]` with its Endpoint; ConfigError names the channel and what is wrong."""
    address = str(endpoint.get("address") or "").strip()
    if not address:
        raise ConfigError([f"Invalid empty endpoint address for channel '{name}'"])
    protocol = next((p for prefix, p in PROTOCOLS.items() if address.startswith(prefix)), None)
    if protocol is None:
        scheme = address.split(":")[0]
        supported = f"supported: {', '.join(PROTOCOLS)}"
        raise ConfigError([f"channel '{name}': unsupported endpoint type '{scheme}' in {address}; {supported}"])
    try:
        url = urllib.parse.urlsplit(address)
        port = 0 if url.scheme == "serial" else url.port
    except ValueError as error:
        raise ConfigError([f"channel '{name}': invalid address {address}: {error}"]) from None
    host = url.hostname or ""
    if url.scheme == "serial":
        host = url.netloc or url.path  # serial://COM3 or serial:///dev/ttyUSB0
    if not (host if port == 0 and url.scheme == "serial" else port):
        raise ConfigError([f"channel '{name}': the address {address} needs a port from 1 to 65535"])
    query = ("tls=true&" if url.scheme in ("mllps", "dicoms") else "") + url.query
    parsed, written = channel_settings(protocol.settings, query, f"channel '{name}'", settings, given, warnings)
    active = endpoint.get("status") != "off"
    return ChannelPlan(name, address, protocol.name, host, port or 0, active, parsed, written)


def build_plan(agent: Json, endpoints: Mapping[str, Json | AgentError]) -> tuple[Plan, list[str]]:
    """The plan of an Agent resource, and every problem in it. `endpoints` is keyed by reference.

    A channel with a problem is left out of the plan: a reload refuses such a plan, a first start runs the rest.
    """
    warnings: list[str] = []
    problems: list[str] = []
    settings, given = agent_settings(agent, warnings)
    status = str(agent.get("status") or "")
    channels: dict[str, ChannelPlan] = {}
    names: set[str] = set()
    for entry in (agent.get("channel") or []) if status != "off" else []:
        try:
            name, endpoint = _resolve_channel(entry, endpoints, names)
            plan = channel_plan(name, endpoint, settings, given, warnings)
            _check_port(plan, channels)
            channels[name] = plan
        except ConfigError as error:
            problems += error.problems
    if settings.strictConfigValidation:
        problems += warnings
    known = tuple({**e, "id": ref.rpartition("/")[2]} for ref, e in endpoints.items() if isinstance(e, dict))
    return Plan(status, settings, given, tuple(channels.values()), tuple(warnings), agent, known), problems


def _resolve_channel(entry: Json, endpoints: Mapping[str, Json | AgentError], names: set[str]) -> tuple[str, Json]:
    name = str(entry.get("name") or "")
    if not name:
        raise ConfigError(["a channel of the Agent has no name"])
    if name in names:
        raise ConfigError([f"two channels are named '{name}'"])
    names.add(name)
    reference = (entry.get("endpoint") or {}).get("reference") or ""
    endpoint = endpoints.get(reference)
    if not isinstance(endpoint, dict):
        raise ConfigError([f"channel '{name}': {endpoint or 'it has no Endpoint'} ({reference or 'no reference'})"])
    return name, endpoint


def _check_port(plan: ChannelPlan, channels: Mapping[str, ChannelPlan]) -> None:
    others = () if plan.dials else channels.values()
    if clash := next((other for other in others if other.port == plan.port and not other.dials), None):
        raise ConfigError(
            [
                f"Invalid agent config. Both '{clash.name}' ({clash.address}) and '{plan.name}' ({plan.address}) "
                f"declare use of port {plan.port}"
            ]
        )


def endpoint_references(agent: Json) -> list[str]:
    """The distinct Endpoint references of an Agent, in order; none when it is off."""
    entries = (agent.get("channel") or []) if agent.get("status") != "off" else []
    references = [(entry.get("endpoint") or {}).get("reference") for entry in entries]
    return list(dict.fromkeys(reference for reference in references if reference))


SETTING_GROUPS: tuple[tuple[str, str, type[Any]], ...] = (
    ("process", "Process: argument, environment or agent.toml", ProcessSettings),
    ("logger", "Logs: `logger.main.*` and `logger.channel.*`", LoggerSettings),
    ("agent", "Agent settings: `Agent.setting[]`", AgentSettings),
    ("hl7", "HL7 channels: parameters of an `mllp://` address", Hl7Settings),
    ("stream", "Byte-stream and ASTM channels: parameters of a `tcp://` or `serial:` address", StreamSettings),
    ("dicom", "DICOM channels: parameters of a `dicom://` or `dicoms://` address", DicomSettings),
    ("device", "Devices: parameters of a `Device.url` that is pushed to", DeviceSettings),
)


def settings_schema() -> Json:
    """Every setting as one JSON document: `--settings-schema`."""
    rows = [
        {
            "name": row.name,
            "type": kind_of(row),
            "label": row.metadata["label"],
            "description": row.metadata["meaning"],
            "category": category,
            "default": row.default,
            "min": row.metadata["low"],
            "max": row.metadata["high"],
            "choices": list(row.metadata["choices"]),
            "env": row.metadata["env"],
            "agentSetting": row.metadata["agent"],
        }
        for category, _, cls in SETTING_GROUPS
        for row in dataclasses.fields(cls)
    ]
    return {
        "agentVersion": VERSION,
        "settings": [{k: v for k, v in row.items() if v not in (None, "", [])} for row in rows],
    }


def settings_markdown() -> str:
    """The same as README's tables."""
    lines: list[str] = []
    common = {row.name: (row.default, row.metadata) for row in dataclasses.fields(ChannelSettings)}
    every: tuple[str, str, type[Any]] = ("", "Every channel: parameters of its address", ChannelSettings)
    for _, title, cls in (*SETTING_GROUPS[:3], every, *SETTING_GROUPS[3:]):
        lines += [f"### {title}", "", "| Name | Type | Default | Meaning |", "| --- | --- | --- | --- |"]
        for row in dataclasses.fields(cls):
            if cls is not ChannelSettings and common.get(row.name) == (row.default, row.metadata):
                continue
            choices = (
                f" ({', '.join(f'`{choice}`' for choice in row.metadata['choices'])})"
                if row.metadata["choices"]
                else ""
            )
            default = f"`{json.dumps(row.default)}`" if row.default != "" else ""
            env = f"; `{row.metadata['env']}`" if row.metadata["env"] else ""
            agent = f"; Agent setting `{row.metadata['agent']}`" if row.metadata["agent"] else ""
            lines.append(
                f"| `{row.name}` | {kind_of(row)} | {default} | {row.metadata['meaning']}{choices}{env}{agent} |"
            )
        lines.append("")
    return "\n".join(lines)


# =====================================================================================================================
# Logs
#
# Two logs as JSON lines, each a rotating file: the main log says what the agent does and never holds patient data
# (messages are named by their row number in the queue); the channel log holds the messages. On a terminal the main
# log is shown as readable lines. Lines of the channel log are gathered in memory and written off the hot path.
# =====================================================================================================================

LOG_FILE = re.compile(r"medplum-agent-(main|channels)-(\d{4}-\d\d-\d\d)\.log(?:\.(\d+))?")
SEVERITY: Final = {level: rank for rank, level in enumerate(LEVELS)}


@functools.lru_cache(maxsize=2)
def iso_second(second: int) -> str:
    """UTC to the second as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


class Log:
    """One rotating log. `console` gets every line as well; a `directory` of None means console only."""

    def __init__(
        self,
        name: str,
        settings: LoggerSettings,
        directory: Path | None,
        console: io.TextIOBase | typing.TextIO | None,
        lazy: bool = False,
    ):
        self.name, self.directory, self.lazy = name, directory, lazy
        self._settings, self._console = settings, console
        self._rank = SEVERITY[settings.logLevel]
        self._lines: list[bytes] = []
        self._bytes = 0
        self._lock, self._write_lock = threading.Lock(), threading.Lock()
        self._file: io.BufferedWriter | None = None
        self._day = ""

    def enabled(self, level: str) -> bool:
        return SEVERITY[level] <= self._rank

    def error(self, text: str, **extra: Any) -> None:
        self._write("ERROR", text, extra)

    def warn(self, text: str, **extra: Any) -> None:
        self._write("WARN", text, extra)

    def info(self, text: str, **extra: Any) -> None:
        self._write("INFO", text, extra)

    def debug(self, text: str, **extra: Any) -> None:
        self._write("DEBUG", text, extra)

    def _write(self, level: str, text: str, extra: Json) -> None:
        if SEVERITY[level] > self._rank:
            return
        second, millisecond = divmod(now_ms(), 1000)
        stamp = f"{iso_second(second)}.{millisecond:03d}Z"
        entry = {"level": level, "msg": text.replace("\r", "\n"), "timestamp": stamp, **extra}
        try:
            line = dump_json(entry) + b"\n"
        except TypeError:  # lone surrogates, as in names of files
            line = json.dumps(entry, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
        with self._lock:
            self._lines.append(line)
            self._bytes += len(line)
        if self._console is not None:
            self._show(level, stamp, text, line)
        if not self.lazy or self._bytes > LOG_HELD_BYTES:
            self.flush()

    def _show(self, level: str, stamp: str, text: str, line: bytes) -> None:
        assert self._console is not None
        with contextlib.suppress(OSError, ValueError):  # a closed terminal must not stop the agent
            shown = f"{stamp[11:19]} {level:5} {text}" if self._console.isatty() else line.decode().rstrip()
            print(shown, file=self._console, flush=True)

    def flush(self) -> None:
        """Write what is gathered. A log that cannot be written (disk full) never stops the agent."""
        with self._write_lock:
            with self._lock:
                lines, self._lines, self._bytes = self._lines, [], 0
            if not lines or self.directory is None:
                return
            try:
                self._rotate()
                assert self._file is not None
                self._file.write(b"".join(lines))
                self._file.flush()
            except OSError:
                self.close_file()

    def _rotate(self) -> None:
        today = f"{datetime.datetime.now().astimezone():%Y-%m-%d}"
        limit = self._settings.maxFileSizeMb * MIB
        if self._file is not None and self._day == today and self._file.tell() < limit:
            return
        assert self.directory is not None
        self._day = today
        self.close_file()
        newest = next(iter(log_files(self.directory, self.name)), None)
        day, suffix = _rotation(newest.name) if newest else ("", 0)
        if newest is None or day != today:
            suffix = 0
        elif newest.stat().st_size >= limit:
            suffix += 1
        path = self._path(today, suffix)
        self._file = open(path, "ab", opener=lambda p, flags: os.open(p, flags, 0o600))  # noqa: SIM115
        for old in log_files(self.directory, self.name)[self._settings.filesToKeep :]:
            old.unlink(missing_ok=True)

    def _path(self, day: str, suffix: int) -> Path:
        assert self.directory is not None
        return self.directory / (f"medplum-agent-{self.name}-{day}.log" + (f".{suffix}" if suffix else ""))

    def close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # what could not be written cannot be flushed either
                file.close()


def log_files(directory: Path, name: str) -> list[Path]:
    """The files of one log, newest first."""
    found = [
        (m[2], int(m[3] or 0), p) for p in directory.iterdir() if (m := LOG_FILE.fullmatch(p.name)) and m[1] == name
    ]
    return [path for _, _, path in sorted(found, reverse=True)]


class LogPage(NamedTuple):
    """Entries newest first, and the cursor of the next older page (None at the end)."""

    entries: list[Json]
    before: str | None


def read_log_page(directory: Path, name: str, limit: int, before: str | None) -> LogPage:
    """Up to `limit` entries older than the cursor `before`, read backwards; unreadable lines are passed over.

    Raises ValueError for a cursor that is not one of ours. Source: uplink contract 4.12.
    """
    start_file, start_offset = _parse_cursor(before)
    entries: list[Json] = []
    for path in log_files(directory, name):
        if start_file and _rotation(path.name) > _rotation(start_file):
            continue
        end = min(start_offset, path.stat().st_size) if path.name == start_file else path.stat().st_size
        for offset, line in _lines_backwards(path, end):
            entry = _log_entry(line)
            if entry is None:
                continue
            if len(entries) == limit:
                return LogPage(entries, _cursor(path.name, offset + len(line) + 1))
            entries.append(entry)
    return LogPage(entries, None)


def _rotation(name: str) -> tuple[str, int]:
    match = LOG_FILE.fullmatch(name)
    return (match[2], int(match[3] or 0)) if match else ("", 0)


def _cursor(name: str, offset: int) -> str:
    return base64.urlsafe_b64encode(f"{name}:{offset}".encode()).decode()


def _parse_cursor(text: object) -> tuple[str, int]:
    if text is None:
        return "", 0
    try:
        if not isinstance(text, str):
            raise ValueError(text)
        name, offset = base64.urlsafe_b64decode(text.encode()).decode().rsplit(":", 1)
        if not LOG_FILE.fullmatch(name) or not re.fullmatch(r"\d{1,15}", offset):
            raise ValueError(name)
        return name, int(offset)
    except ValueError:
        raise ValueError("Invalid cursor: use the nextBefore of an earlier answer") from None


def _log_entry(line: bytes) -> Json | None:
    try:
        parsed = load_json(line)
        return {member: parsed[member] for member in ("level", "msg", "timestamp")}
    except (ValueError, KeyError, TypeError):
        return None


def _lines_backwards(path: Path, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its newline) from `end` to the start of the file."""
    tail = b""
    with path.open("rb") as file:
        while end > 0:
            start = max(0, end - LOG_BLOCK_BYTES)
            file.seek(start)
            block = file.read(end - start) + tail
            first, *lines = block.split(b"\n")
            position = start + len(block)
            for line in reversed(lines):
                position -= len(line)
                if line:
                    yield position, line
                position -= 1
            tail, end = first, start
    if tail:
        yield 0, tail


# =====================================================================================================================
# HL7
#
# HL7 v2 by slicing: the MSH header, single fields by path, acknowledgments, the patient a message belongs to.
# `hl7.parse` is forty times slower and serves where speed does not matter. Text in, text out; touches nothing.
# =====================================================================================================================

BARRIER: Final = None  # the ordering key of a message that waits for all before it and holds all behind it
ACK_TEXT = {
    "AA": "OK",
    "AE": "Application Error",
    "AR": "Application Reject",
    "CA": "Commit Accept",
    "CE": "Commit Error",
    "CR": "Commit Reject",
}
# HL7 v2.5.1 chapter 3: swap, merge, move, link and unlink events name more than one patient, visit or account
MERGE_EVENTS = frozenset(
    [
        "A17",
        "A18",
        "A24",
        "A30",
        "A34",
        "A35",
        "A36",
        "A37",
        "A39",
        "A40",
        "A41",
        "A42",
        "A43",
        "A44",
        "A45",
        "A46",
        "A47",
        "A48",
        "A49",
        "A50",
        "A51",
    ]
)
_MARKS = "^~\\&"  # the usual MSH-2
_LINE_ENDS = re.compile(r"[\r\n]+")
_control_ids = itertools.count(time.time_ns() // 1000)  # 16 digits, unique in a process and across restarts


def decode_hl7(content: bytes, encoding: str) -> str:
    """The text of a frame with single carriage returns between segments (channel contract 4.2).

    Raises PeerError when it does not start with MSH and a field separator.
    """
    text = content.decode(encoding, "replace")
    if text[:1] == "\ufeff":
        text = text[1:]
    if not text.startswith("MSH") or len(text) < 4 or text[3].isalnum() or text[3] in "\r\n":
        raise PeerError("Invalid HL7 message: it does not start with MSH and a field separator")
    return _LINE_ENDS.sub("\r", text) if "\n" in text or b"\r\r" in content else text


class Header:
    """The MSH segment: `fields[n - 1]` is MSH-n (HL7 v2.5.1 2.15.9); missing fields read as empty."""

    __slots__ = ("component", "fields", "repetition", "separator")

    def __init__(self, text: str):
        end = text.find("\r")
        self.separator = text[3]
        self.fields = (text if end < 0 else text[:end]).split(self.separator)
        marks = self.fields[1] if len(self.fields) > 1 else ""
        self.component, self.repetition = marks[0:1] or "^", marks[1:2] or "~"

    def field(self, number: int) -> str:
        return self.fields[number - 1] if number <= len(self.fields) else ""

    @property
    def control_id(self) -> str:
        return self.fields[9] if len(self.fields) > 9 else ""

    @property
    def message_type(self) -> str:
        return self.fields[8] if len(self.fields) > 8 else ""


def segments_named(text: str, name: str, separator: str) -> Iterator[str]:
    """The segments of that name, in order."""
    mark = f"\r{name}{separator}"
    at = text.find(mark)
    while at >= 0:
        end = text.find("\r", at + 1)
        yield text[at + 1 :] if end < 0 else text[at + 1 : end]
        at = text.find(mark, at + 1)


def patient_key(text: str, header: Header) -> str | None:
    """PID-3.1 and PID-3.4 of the one patient of a message; BARRIER when it names none or several."""
    separator, component = header.separator, header.component
    trigger = header.message_type.split(component, 2)
    if len(trigger) > 1 and trigger[1] in MERGE_EVENTS:
        return BARRIER
    found: str | None = None
    for segment in text.split("\r"):  # one pass: a search for each name is slower in large messages
        name = segment[:4]
        if name == f"MRG{separator}":
            return BARRIER
        if name != f"PID{separator}":
            continue
        fields = segment.split(separator, 4)
        parts = fields[3].split(header.repetition, 1)[0].split(component) if len(fields) > 3 else [""]
        number = parts[0].strip()
        key = f"{number}^{parts[3].strip()}" if len(parts) > 3 else number + "^"
        if not number or number == '""' or (found is not None and key != found):
            return BARRIER
        found = key
    return found


def logical_key(text: str, header: Header, paths: Sequence[FieldPath]) -> str:
    """The values at the paths, escaped so that different values never make equal keys (channel contract 6)."""
    return "|".join(field_at(text, header, path).replace("\\", "\\\\").replace("|", "\\p") for path in paths)


def field_at(text: str, header: Header, path: FieldPath) -> str:
    """First segment of the name, first repetition; without a component the whole field text."""
    if path.segment == "MSH":
        value = header.separator if path.field == 1 else header.field(path.field)
    else:
        segment = next(segments_named(text, path.segment, header.separator), "")
        fields = segment.split(header.separator)
        value = fields[path.field] if path.field < len(fields) else ""
    if not path.component:
        return value
    value = _nth(value.split(header.repetition, 1)[0], header.component, path.component)
    subcomponent = header.field(2)[3:4] or "&"
    return _nth(value, subcomponent, path.subcomponent) if path.subcomponent else value


def _nth(text: str, separator: str, number: int) -> str:
    parts = text.split(separator)
    return parts[number - 1] if number <= len(parts) else ""


def ordering_key(text: str, header: Header, spec: str) -> str | None:
    """The key of a message under ChannelPlan.key_spec."""
    if spec == "*":
        return ""
    return logical_key(text, header, parse_key(spec)) if spec else patient_key(text, header)


@functools.lru_cache(maxsize=2)
def _second_text(second: int) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(second))


def hl7_timestamp() -> str:
    """UTC as YYYYMMDDHHMMSS.mmm (HL7 v2.5.1 2.A.75, DTM)."""
    second, millisecond = divmod(now_ms(), 1000)
    return f"{_second_text(second)}.{millisecond:03d}"


def build_ack(header: Header, code: str, text: str = "", *, closing: str = "\r") -> str:
    """MSH and MSA answering `header` (HL7 v2.5.1 2.9.2, channel contract 4.4); `text` goes to MSA-3."""
    s, c, field = header.separator, header.component, header.field
    kind = header.message_type.split(c, 2)
    ack_type = "ACK"
    if len(kind) > 1 and kind[1]:
        ack_type = f"ACK{c}{kind[1]}{c}ACK" if len(kind) > 2 and kind[2] else f"ACK{c}{kind[1]}"
    return (
        f"MSH{s}{field(2) or _MARKS}{s}{field(5)}{s}{field(6)}{s}{field(3)}{s}{field(4)}{s}{hl7_timestamp()}{s}{s}"
        f"{ack_type}{s}{next(_control_ids)}{s}{field(11) or 'P'}{s}{field(12) or '2.5.1'}\r"
        f"MSA{s}{code}{s}{header.control_id}{s}{text or ACK_TEXT[code]}{closing}"
    )


def clean_text(text: str, separators: str = "|^~\\&") -> str:
    """A reason that is safe inside an HL7 field: no separators, no line ends, at most 80 characters (MSA-3)."""
    return re.sub(f"[{re.escape(separators)}\\x00-\\x1f]+", " ", text).strip()[:80]


def write_sequence_number(text: str, number: int) -> str:
    """The message with `number` in MSH-13; missing fields before it are added empty."""
    end = text.find("\r")
    header, rest = (text, "") if end < 0 else (text[:end], text[end:])
    fields = header.split(text[3])
    fields += [""] * (13 - len(fields))
    fields[12] = str(number)
    return text[3].join(fields) + rest


class Acknowledgment(NamedTuple):
    """MSA-1 (upper case) and MSA-2 of a message that answers another."""

    code: str
    control_id: str


def read_ack(text: object) -> Acknowledgment | None:
    """The acknowledgment in a Bot's answer or a device's; None when it is not HL7 or has no MSA-1."""
    text = text.lstrip("\r\n") if isinstance(text, str) else ""
    if not text.startswith("MSH") or len(text) < 4:
        return None
    text = _LINE_ENDS.sub("\r", text) if "\n" in text else text
    segment = next(segments_named(text, "MSA", text[3]), "")
    fields = [*segment.split(text[3]), "", ""]
    code = fields[1].strip().upper()
    return Acknowledgment(code, fields[2]) if code else None


# What of the Bot's answer passes to the device, by channel contract 4.5: (enhanced, appLevelAck) -> codes let through
_PASSED = {
    ("true", "AL"): {"AA", "AE", "AR"},
    ("true", "ER"): {"AE", "AR"},
    ("true", "SU"): {"AA"},
    ("true", "NE"): set[str](),
}


def passes_filter(settings: Hl7Settings, code: str) -> bool:
    """Whether an answer with this MSA-1 goes to the device; codes other than AA, AE and AR always do."""
    if not settings.enhanced or code not in {"AA", "AE", "AR"}:
        return True
    return settings.enhanced == "true" and code in _PASSED["true", settings.appLevelAck]


# =====================================================================================================================
# MLLP
#
# The frame layer (HL7 Minimal Lower Layer Protocol, release 1): <0x0B> content <0x1C 0x0D>. Bytes in, events out.
# Whatever arrives, in one piece or byte by byte, gives the same frames and PeerErrors and never anything else.
#
# | state   | bytes                  | event                        | next    |
# | outside | up to 0x0B             | - (skipped, counted)         | inside  |
# | inside  | ... 0x1C 0x0D          | frame                        | outside |
# | inside  | ... 0x0B MSH ...       | PeerError for the part before| inside  |
# | inside  | more than the limit    | PeerError                    | too big |
# | too big | ... 0x1C 0x0D          | - (dropped)                  | outside |
# =====================================================================================================================

START, END, RESTART = b"\x0b", b"\x1c\r", b"\x0bMSH"


def mllp_frame(content: bytes) -> bytes:
    """One frame on the wire."""
    return b"\x0b%b\x1c\r" % content


def _find(source: bytes | bytearray, mark: bytes, start: int, stop: int) -> int:
    """Where `mark` lies in source[start:stop], or -1. One byte is found ten times faster than several."""
    first = mark[:1]
    at = source.find(first, start, stop)
    while at >= 0 and not source.startswith(mark, at, stop):
        at = source.find(first, at + 1, stop)
    return at


class Mllp:
    """The receiving side of one connection. `limit`: largest content in bytes."""

    __slots__ = ("_buffer", "_inside", "_oversize", "_scanned", "limit", "skipped")

    def __init__(self, limit: int):
        self.limit = limit
        self.skipped = 0  # bytes outside of frames: some senders pad, garbage is worth a warning
        self._buffer = bytearray()
        self._inside = False
        self._oversize = False
        self._scanned = 0  # bytes of the unfinished frame that were already searched for a mark

    @property
    def inside(self) -> bool:
        """True in the middle of a frame: the sender owes us bytes."""
        return self._inside

    def receive(self, chunk: bytes) -> list[bytes | PeerError]:
        """The frames (their content) and errors that these bytes complete."""
        events: list[bytes | PeerError] = []
        source: bytes | bytearray = chunk
        if self._buffer:
            self._buffer += chunk
            source = self._buffer
        position, end = 0, -2  # the next end mark: -2 not searched for, -1 there is none
        while self._inside or (position := self._enter(source, position)) >= 0:
            at = position + self._scanned
            if end == -2 or -1 < end < at:
                end = _find(source, END, at, len(source))
            restart = _find(source, RESTART, at, len(source) if end < 0 else end)
            if restart >= 0:
                self._finish(bytes(source[position:restart]), events, whole=False)
                position = restart + 1
            elif end >= 0:
                self._finish(bytes(source[position:end]), events, whole=True)
                position, self._inside = end + 2, False
            else:
                break
            self._scanned = 0
        self._keep(source, position, events)
        return events

    def _enter(self, source: bytes | bytearray, position: int) -> int:
        """The first byte of the next frame, or -1 when only bytes between frames are left."""
        start = source.find(START, position)
        self._inside = start >= 0
        self.skipped += (start if self._inside else len(source)) - position
        return start + 1 if self._inside else -1

    def _finish(self, content: bytes, events: list[bytes | PeerError], *, whole: bool) -> None:
        """A frame ended, or was cut off by the start of the next: then it counts if a lone 0x1C ended it."""
        ended = whole or content.endswith(END[:1])
        content = content if whole or not ended else content[:-1]
        if self._oversize:
            self._oversize = False
        elif len(content) > self.limit:
            events.append(self._too_large())
        elif ended:
            events.append(content)
        else:
            events.append(PeerError("the message was cut off by the start of the next one"))

    def _too_large(self) -> PeerError:
        return PeerError(f"the message is larger than {self.limit} bytes (maxMessageBytes)")

    def _keep(self, source: bytes | bytearray, position: int, events: list[bytes | PeerError]) -> None:
        """Hold back the unfinished frame; of one that is too large only what could be the first half of a mark."""
        rest = len(source) - position if self._inside else 0
        if rest > self.limit + len(RESTART) and not self._oversize:
            self._oversize = True
            events.append(self._too_large())
        if self._oversize:
            rest = min(rest, len(RESTART) - 1)
        self._scanned = max(0, rest - len(RESTART) + 1)
        if source is self._buffer:
            del self._buffer[: len(source) - rest]
        elif rest:
            self._buffer += source[len(source) - rest :]


# =====================================================================================================================
# Byte stream
#
# Messages between a start and an end sequence of one or more bytes (channel contract 9). Bytes in, events out. Every
# byte is judged when it arrives by what it completes, so cuts between reads make no difference.
#
# | state   | bytes                     | event                                   | next    |
# | outside | up to the start sequence  | - (skipped, counted)                    | inside  |
# | inside  | ... end sequence          | StreamMessage                           | outside |
# | inside  | ... start sequence        | PeerError for the part before           | inside  |
# | inside  | more than maxMessageBytes | PeerError                               | too big |
# | too big | ... end sequence          | - (dropped; nothing of it is answered)  | outside |
# | too big | ... start sequence        | -                                       | inside  |
# | any     | a pattern of autoRespond  | Reply, after a message that ends there  | same    |
#
# When start and end are equal, the end wins inside. A byte of one mark is never part of the next.
# =====================================================================================================================


@dataclasses.dataclass(frozen=True, slots=True)
class StreamMessage:
    """A message as received, with its framing."""

    content: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """An automatic answer; one that comes after a message may leave once that message is on disk."""

    content: bytes


StreamEvent = StreamMessage | Reply | PeerError


class ByteStream:
    """The receiving side of one connection in raw mode; ConfigError without start and end sequence."""

    __slots__ = ("_end", "_from", "_inside", "_kept", "_marks", "_oversize", "_reach", "_rules", "_start", "_window",
                 "limit", "skipped")  # fmt: skip

    def __init__(self, settings: StreamSettings):
        self._start, self._end = byte_sequence(settings.startChar), byte_sequence(settings.endChar)
        if not self._start or not self._end:
            raise ConfigError(["startChar and endChar are needed"])
        self._rules = auto_responses(settings.autoRespond)
        self.limit = settings.maxMessageBytes
        self.skipped = 0  # bytes outside of messages
        marks = [self._start, self._end, *self._rules]
        self._marks = re.compile(b"[%b]" % b"".join(re.escape(mark[-1:]) for mark in marks))
        self._reach = max(map(len, marks)) - 1  # bytes that can belong to a mark that is yet to be completed
        self._kept = bytearray()  # the unfinished message, or the reach
        self._from = 0  # in _kept: where the message starts, or where the last one ended
        self._window = 0  # in _kept: patterns reach back to here; a start sequence resets it
        self._inside = self._oversize = False

    @property
    def inside(self) -> bool:
        """True in the middle of a message: the sender owes us bytes."""
        return self._inside

    def receive(self, chunk: bytes) -> list[StreamEvent]:
        """What these bytes complete, in order."""
        events: list[StreamEvent] = []
        before = len(self._kept)
        self._kept += chunk
        for match in self._marks.finditer(chunk):
            self._judge(before + match.end(), events)
        self._check_size(len(self._kept), events)
        self._trim()
        return events

    def _judge(self, stop: int, events: list[StreamEvent]) -> None:
        """What is completed by the byte before `stop`."""
        self._check_size(stop, events)
        dropped = self._oversize
        fresh = self._from + (len(self._start) if self._inside and not self._oversize else 0)
        if self._inside and self._kept.endswith(self._end, fresh, stop):
            if not dropped:
                events.append(StreamMessage(bytes(self._kept[self._from : stop])))
            self._inside, self._oversize, self._from = False, False, stop
        elif self._kept.endswith(self._start, fresh, stop):
            self._begin(stop - len(self._start), events)
            dropped = False
        if not dropped:
            found = (r for pattern, r in self._rules.items() if self._kept.endswith(pattern, self._window, stop))
            events.extend(Reply(response) for response in found if response)

    def _begin(self, at: int, events: list[StreamEvent]) -> None:
        if not self._inside:
            self.skipped += at - self._from
        elif not self._oversize:
            events.append(PeerError("the message was cut off by the start of the next one"))
        self._inside, self._oversize = True, False
        self._from = self._window = at

    def _check_size(self, stop: int, events: list[StreamEvent]) -> None:
        if self._inside and not self._oversize and stop - self._from > self.limit:
            self._oversize = True
            events.append(PeerError(f"the message is larger than {self.limit} bytes (maxMessageBytes)"))

    def _trim(self) -> None:
        """Forget what no mark can reach back to."""
        whole = self._inside and not self._oversize
        cut = self._from if whole else max(0, len(self._kept) - self._reach)
        if not self._inside:
            self.skipped += max(0, cut - self._from)
        del self._kept[:cut]
        self._from, self._window = max(0, self._from - cut), max(0, self._window - cut)


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
# ASTM
#
# The link layer of laboratory instruments (ASTM E1381, CLSI LIS01-A2), both roles, and the little of the records
# (E1394, LIS02-A2) that it needs. Bytes and times in, events out. The caller commits a frame to disk between
# FrameAccepted and committed(), which gives the ACK to write; what arrives in between waits in order.
#
# The rules behind the table _LINK (clauses of E1381-02, the text that became LIS01-A2):
# - 6.2 ENQ is answered by ACK. An ENQ inside a session ends that session first.
# - 6.3 A frame is STX, number, text, ETB (more of this record follows) or ETX, checksum, CR, LF. It is answered after
#   its checksum, as some instruments leave CR LF away, and pad with NULs. STX inside a frame begins it anew.
# - 6.3.2 Numbers count 1..7, 0. A frame repeats the last one only if number and bytes are equal: then ACK, nothing
#   appended. Any other number is accepted with a warning (strictFrameNumbers: NAK).
# - 6.5.2 A sender that hears nothing for 15 s gives up. When a frame takes longer to store and something came after it,
#   its ACK is not given: the sender would take it for the answer to that.
# - 6.4 EOT ends the session and is not answered (ackEot). After ETB or after a frame that was refused, the sender gave
#   up: interrupted. So does a sender that ends without EOT (30 s of silence, 6.5.2; ENQ; disconnect) before its L
#   record: only with L is a message complete (LIS02-A2 14), and then a lost EOT does no harm.
# - A line flips bits: `D` becomes EOT, `E` and CR become ENQ. So EOT inside a text, and EOT and ENQ where noise was
#   just received, count only if nothing follows for DOUBT_SECS. A wrong ACK would acknowledge the frame after it.
#   EOT and ENQ are one bit apart: of two ENQs in a row the second is answered only if nothing follows.
# - 6.2.1 We ask with ENQ. NAK: again after 10 s. ENQ in answer to ours is contention: the instrument wins, we do not
#   answer, and ask again after 20 s or when its session ended. No answer within 15 s: EOT, and again.
# - 6.3.4 A frame that is answered by anything but ACK or EOT (6.5.1), or by nothing in 15 s, is sent again; the sixth
#   failure ends in EOT. (The standard gives up at the first silence; a receiver that waits 30 s hears the second try.)
# - 6.3.5 EOT in place of ACK asks us to stop: we say EOT, wait 15 s or until the instrument's session ended, and send
#   the whole message anew, as its second half would be no message.
# =====================================================================================================================

STX, ETX, EOT, ENQ, ACK, LF, CR, NAK, ETB = 0x02, 0x03, 0x04, 0x05, 0x06, 0x0A, 0x0D, 0x15, 0x17
FRAME_TEXT_BYTES = 65_536  # the largest frame text we take: the standard says 64,000, the contract this
FRAME_COST_BYTES = 64  # counted for each frame besides its text, so that empty frames are bounded too
WAITING_BYTES = 128 * 1024  # received while a frame is on its way to disk; more than that is no half-duplex sender
DOUBT_SECS = 1.0  # of silence that make an ENQ or EOT after noise believable: a sender's own time-out is 15
TURN_SECS = 0.5  # after EOT before our next ENQ: stray answers pass, and the instrument can ask first
INTERRUPT_SECS = 15.0  # E1381 6.3.5: no ENQ for so long after an interrupt
SEND_TRIES = 6  # E1381 6.5.1: of one frame; we ask as often with ENQ
_TEXT_END = re.compile(rb"[\x02\x03\x04\x17]")
_RESTRICTED = bytes(byte for byte in range(0x20) if byte not in (0x09, CR))  # not allowed in a text (6.6)


@dataclasses.dataclass(frozen=True, slots=True)
class Write:
    """Bytes for the instrument."""

    content: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class FrameAccepted:
    """A good frame that waits for committed() or refused(). `number` as on the wire; `end` is ETB or ETX."""

    number: str
    content: bytes
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """A complete session: its texts, each joined from frames up to an ETX, as sent (normally one record and CR)."""

    records: tuple[bytes, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Interrupted:
    """A session that must not be taken as a result; the last text may be the beginning of one."""

    records: tuple[bytes, ...]
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Sent:
    """The instrument accepted the oldest message given to send()."""


@dataclasses.dataclass(frozen=True, slots=True)
class SendFailed:
    """The oldest message given to send() was not accepted."""

    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class LineWarning:
    """The instrument deviates; no patient data in the text."""

    text: str


AstmEvent = Write | FrameAccepted | Session | Interrupted | Sent | SendFailed | LineWarning


def astm_frame(number: int, text: bytes, end: int) -> bytes:
    """One frame on the wire."""
    body = b"%d%b%c" % (number % 8, text, end)
    return b"\x02%b%02X\r\n" % (body, sum(body) % 256)


def astm_frames(records: Sequence[bytes], size: int) -> list[bytes]:
    """The frames of a message: every record begins a frame, at most `size` bytes of text in each."""
    parts: list[tuple[bytes, int]] = []
    for record in records:
        text = record.translate(None, delete=_RESTRICTED)
        cuts = [text[at : at + size] for at in range(0, len(text), size)] or [b""]
        parts += [(cut, ETB) for cut in cuts[:-1]] + [(cuts[-1], ETX)]
    return [astm_frame(number, text, end) for number, (text, end) in enumerate(parts, 1)]


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
    COMMIT = "a frame is on its way to disk"
    ENQUIRE = "our ENQ waits for its answer"
    SENDING = "our frame waits for its answer"


class Astm:
    """One connection to an instrument, both roles. `skipped` counts bytes that were no part of the protocol."""

    def __init__(self, settings: StreamSettings):
        self.settings = settings
        self.skipped = 0
        self._state = Link.IDLE
        self._now = 0.0
        self._due = 0.0  # when the state's time is over
        self._events: list[AstmEvent] = []
        self._waiting = bytearray()  # received, not yet looked at
        self._queue: collections.deque[list[bytes]] = collections.deque()  # messages to send, as frames
        self._rest = 0.0  # no ENQ of ours before this time
        self._asked = self._index = self._tries = 0  # ENQs for the message; frame under way; how often it was sent
        self._number = 0
        self._text = bytearray()
        self._sum = bytearray()  # ETB or ETX, and the checksum
        self._pending: FrameAccepted | None = None
        self._last: FrameAccepted | None = None
        self._expected = 1
        self._records: list[bytearray] = []
        self._size = 0  # of the session, in bytes
        self._partial = False  # the last text goes on in the next frame
        self._refused = False  # the last frame got NAK

    # --- what the caller does ---

    @property
    def state(self) -> Link:
        return self._state

    @property
    def awaiting_commit(self) -> bool:
        """A frame waits for committed() or refused(): a caller need not read on."""
        return self._pending is not None

    def receive(self, chunk: bytes, now: float) -> list[AstmEvent]:
        """The events of these bytes; `now` in seconds of any steady clock."""
        late = [] if self._state is Link.IDLE else self.expired(now)
        self._now = now
        if self._pending is None or len(self._waiting) + len(chunk) <= WAITING_BYTES:
            self._waiting += chunk
        else:
            self.skipped += len(chunk)
        return late + self._run()

    def committed(self, now: float) -> list[AstmEvent]:
        """The accepted frame is on disk: its ACK, and what waited behind it."""
        frame, self._pending, self._now = self._pending, None, now
        if frame is None:
            return []
        if not self._partial:
            self._records.append(bytearray())
        self._records[-1] += frame.content
        self._partial = frame.end == ETB
        self._size += len(frame.content) + FRAME_COST_BYTES
        self._last, self._expected = frame, (ord(frame.number) + 1) % 8
        if self._waiting.strip(b"\r\n\0") and now >= self._due:
            self._refused, self._state = True, Link.NOISE
        else:
            self._answer(ACK)
        return self._run()

    def refused(self, now: float) -> list[AstmEvent]:
        """The accepted frame could not be stored: NAK, so that the instrument sends it again."""
        if self._pending is None:
            return []
        self._pending, self._now = None, now
        self._answer(NAK)
        return self._run()

    def send(self, records: Sequence[bytes], now: float) -> list[AstmEvent]:
        """Queue a message (records each ending in CR); every call ends in one Sent or SendFailed, in order."""
        self._now = now
        self._queue.append(astm_frames(records, self.settings.maxFrame))
        if self._state is Link.IDLE and now >= self._rest:
            self._step(_TIME)
        return self._run()

    def withdraw(self, position: int, now: float) -> list[AstmEvent]:
        """Take back a message that was given to send(); one under way ends in EOT, and so without its L record."""
        self._now = now
        if position == 0:
            self._asked = 0
            if self._state in (Link.ENQUIRE, Link.SENDING):
                self._write(EOT)
                self._state, self._rest = Link.IDLE, now + TURN_SECS
        del self._queue[position]
        return self._run()

    def deadline(self) -> float | None:
        """When expired() wants to be called."""
        if self._state is Link.IDLE:
            return self._rest if self._queue else None
        return None if self._state is Link.COMMIT else self._due

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
        self._pending = None
        self._break("the connection was closed before EOT")
        self._events += [SendFailed("the connection was closed") for _ in self._queue]
        self._queue.clear()
        self._asked = 0
        self._state = Link.IDLE
        return self._run()

    # --- the engine ---

    def _run(self) -> list[AstmEvent]:
        at = 0
        while at < len(self._waiting) and self._state is not Link.COMMIT:
            if self._state is Link.TEXT:
                at = self._take_text(at)
            else:
                self._step(self._waiting[at])
                at += 1
        del self._waiting[:at]
        if self._state in _DOUBTS:
            self._due = self._now + DOUBT_SECS
        elif self._state not in (Link.ENQUIRE, Link.SENDING, Link.COMMIT):
            self._due = self._now + self.settings.receiveTimeoutSecs
        events, self._events = self._events, []
        return events

    def _step(self, byte: int) -> None:
        """One row of the table; an action may move on to another state than the row's."""
        row = _LINK[self._state]
        action, self._state = row.get(byte) or row[_OTHER]
        action(self, byte)

    def _take_text(self, at: int) -> int:
        """Text up to the next byte that means something, in one go."""
        match = _TEXT_END.search(self._waiting, at)
        stop = match.start() if match else len(self._waiting)
        del match  # it would keep _waiting from shrinking
        room = FRAME_TEXT_BYTES - len(self._text)
        self._text += self._waiting[at : min(stop, at + room)]
        if stop - at > room:
            self._warn(f"a frame has more than {FRAME_TEXT_BYTES} bytes of text")
            self._text.clear()
            self._answer(NAK)
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

    def _pass(self, byte: int) -> None:
        """Nothing to do."""

    def _skip(self, byte: int) -> None:
        """A byte that is no part of the protocol; without verification a checksum is skipped after its frame."""
        if self.settings.checksum == "off" and chr(byte) in "0123456789ABCDEFabcdef" and self._last:
            self._state = Link.AFTER
        else:
            self.skipped += 1

    def _begin_session(self, byte: int) -> None:
        self._records, self._size, self._last, self._expected = [], 0, None, 1
        self._partial = self._refused = False
        self._text.clear()

    def _open(self, byte: int) -> None:
        self._begin_session(byte)
        self._write(ACK)

    def _open_bare(self, byte: int) -> None:
        self._warn("a frame came without ENQ")
        self._begin_session(byte)
        self._begin(byte)

    def _reopen(self, byte: int) -> None:
        self._break("the instrument began a new session before EOT")
        self._open(byte)

    def _end(self, byte: int) -> None:
        """EOT."""
        if self._refused:
            reason = "the instrument gave up after a frame that was not accepted"
        elif self._partial:
            reason = "EOT came in the middle of a record"
        else:
            missing = self.settings.requireTerminator and not self._terminated()
            reason = "EOT came before the L record (requireTerminator)" if missing else ""
        self._finish(reason)
        self._ack_eot(byte)

    def _ack_eot(self, byte: int) -> None:
        if self.settings.ackEot:
            self._write(ACK)

    def _cut(self, byte: int) -> None:
        """EOT came in the middle of a frame, and then nothing."""
        self._refused = True
        self._end(byte)

    def _cut_and_open(self, byte: int) -> None:
        self._cut(byte)
        self._open(byte)

    def _end_and_open(self, byte: int) -> None:
        self._end(byte)
        self._open(byte)

    def _silent(self, byte: int) -> None:
        self._break(f"the instrument was silent for {self.settings.receiveTimeoutSecs:g} s before EOT")

    def _break(self, reason: str) -> None:
        """A session without EOT: only its L record can tell that it is complete."""
        self._finish("" if self._terminated() else reason)

    def _terminated(self) -> bool:
        last = bytes(self._records[-1]).strip(b"\r\n\0 ") if self._records and not self._partial else b""
        return re.split(rb"[\r\n]", last)[-1].startswith(b"L")

    def _finish(self, reason: str) -> None:
        if self._records:
            records = tuple(map(bytes, self._records))
            self._events.append(Interrupted(records, reason) if reason else Session(records))
        self._begin_session(0)
        self._rest = self._now + TURN_SECS

    # --- receiver: frames ---

    def _begin(self, byte: int) -> None:
        self._text.clear()
        self._sum.clear()

    def _restart(self, byte: int) -> None:
        self._warn("a frame began inside a frame")
        self._begin(byte)

    def _take_number(self, byte: int) -> None:
        self._number = byte

    def _go_on(self, byte: int) -> None:
        """The EOT was part of the text, which is for the checksum to judge."""
        self._text.append(EOT)
        if byte in (ETB, ETX):
            self._state = Link.SUM
            self._close(byte)
        else:
            self._text.append(byte)

    def _close(self, byte: int) -> None:
        self._sum.append(byte)
        if self.settings.checksum == "off":
            self._judge()

    def _take_sum(self, byte: int) -> None:
        self._sum.append(byte)
        if len(self._sum) == 3:
            self._judge()

    def _judge(self) -> None:
        """The frame is complete."""
        frame = FrameAccepted(chr(self._number), bytes(self._text), self._sum[0])
        wanted = b"%02X" % ((self._number + sum(self._text) + frame.end) % 256)
        self._text.clear()
        expected = ord(frame.number) == ord("0") + self._expected
        if self.settings.checksum == "on" and self._sum[1:].upper() != wanted:
            self._answer(NAK)
        elif frame == self._last:
            self._answer(ACK)
        elif self._size + len(frame.content) + FRAME_COST_BYTES > self.settings.maxMessageBytes:
            self._warn(f"the session is larger than {self.settings.maxMessageBytes} bytes (maxMessageBytes)")
            self._answer(NAK)
        elif not expected and self.settings.strictFrameNumbers:
            self._warn(f"frame {frame.number!r} came where {self._expected} was due; it is refused")
            self._answer(NAK)
        else:
            if not expected:
                self._warn(f"frame {frame.number!r} came where {self._expected} was due; it is accepted")
            self._state, self._pending = Link.COMMIT, frame
            self._due = self._now + self.settings.replyTimeoutSecs
            self._events.append(frame)

    def _answer(self, byte: int) -> None:
        """ACK or NAK of a frame."""
        self._refused = byte == NAK
        self._state = Link.NOISE if self._refused else Link.AFTER
        self._write(byte)

    # --- sender ---

    def _enquire(self, byte: int) -> None:
        """Ask for the line, if something is to be sent."""
        if not self._queue[0]:
            self._fail("there is no record to send")
            return
        self._asked += 1
        self._state, self._due = Link.ENQUIRE, self._now + self.settings.replyTimeoutSecs
        self._write(ENQ)

    def _granted(self, byte: int) -> None:
        self._index = self._tries = 0
        self._transmit()

    def _transmit(self) -> None:
        self._tries += 1
        self._due = self._now + self.settings.replyTimeoutSecs
        self._events.append(Write(self._queue[0][self._index]))

    def _advance(self, byte: int) -> None:
        """ACK: the next frame, or the end."""
        self._index, self._tries = self._index + 1, 0
        if self._index < len(self._queue[0]):
            self._transmit()
        else:
            self._write(EOT)
            self._settle(Sent())

    def _again(self, byte: int) -> None:
        if self._tries < SEND_TRIES:
            self._transmit()
        else:
            self._write(EOT)
            self._fail(f"frame {self._index + 1} was not accepted in {SEND_TRIES} tries")

    def _interrupt(self, byte: int) -> None:
        """EOT for ACK. After the last frame the instrument has everything."""
        if self._index + 1 == len(self._queue[0]):
            self._advance(byte)
            return
        self._write(EOT)
        self._put_off(INTERRUPT_SECS, "the instrument interrupted it")

    def _busy(self, byte: int) -> None:
        self._put_off(self.settings.nakDelaySecs, "the instrument is busy (NAK)")

    def _contend(self, byte: int) -> None:
        self._put_off(self.settings.contentionTimeoutSecs, "the instrument asked to send at the same time")

    def _unanswered(self, byte: int) -> None:
        self._write(EOT)
        self._put_off(self.settings.nakDelaySecs, "the instrument does not answer")

    def _put_off(self, seconds: float, reason: str) -> None:
        self._state, self._rest = Link.IDLE, self._now + seconds
        if self._asked >= SEND_TRIES:
            self._fail(f"{reason}; gave up after {SEND_TRIES} tries")

    def _fail(self, reason: str) -> None:
        self._settle(SendFailed(reason))

    def _settle(self, outcome: Sent | SendFailed) -> None:
        self._queue.popleft()
        self._asked = 0
        self._state, self._rest = Link.IDLE, max(self._rest, self._now + TURN_SECS)
        self._events.append(outcome)


_TIME, _OTHER = -1, -2  # keys of the table beside bytes: the state's time is over; any byte not named
_Row = dict[int, tuple[Callable[[Astm, int], None], Link]]
_DOUBTS = (Link.NOISE_ENQ, Link.NOISE_EOT, Link.TEXT_EOT)


def _padding(link: Link) -> _Row:
    return dict.fromkeys((CR, LF, 0), (Astm._pass, link))


# fmt: off
_BETWEEN: _Row = {
    STX: (Astm._begin, Link.NUMBER), EOT: (Astm._end, Link.IDLE), **_padding(Link.OPEN),
    _OTHER: (Astm._skip, Link.NOISE), _TIME: (Astm._silent, Link.IDLE),
}
_NOISY: _Row = {
    **_BETWEEN, **_padding(Link.NOISE), ENQ: (Astm._pass, Link.NOISE_ENQ), EOT: (Astm._pass, Link.NOISE_EOT),
}
_LINK: dict[Link, _Row] = {
    Link.IDLE: {
        ENQ: (Astm._open, Link.FRESH), STX: (Astm._open_bare, Link.NUMBER), EOT: (Astm._ack_eot, Link.IDLE),
        **_padding(Link.IDLE), _OTHER: (Astm._skip, Link.IDLE), _TIME: (Astm._enquire, Link.IDLE),
    },
    # receiver
    Link.FRESH: {**_BETWEEN, **_padding(Link.FRESH), ENQ: (Astm._pass, Link.NOISE_ENQ)},
    Link.OPEN: {**_BETWEEN, ENQ: (Astm._reopen, Link.FRESH)},
    Link.AFTER: {**_BETWEEN, ENQ: (Astm._pass, Link.NOISE_ENQ)},  # a flipped CR, or no CR LF and a new session
    Link.NOISE: _NOISY,
    Link.NOISE_ENQ: {**_NOISY, _TIME: (Astm._reopen, Link.FRESH)},
    Link.NOISE_EOT: {
        **_NOISY, **_padding(Link.NOISE_EOT), ENQ: (Astm._end_and_open, Link.FRESH), _TIME: (Astm._end, Link.IDLE),
    },
    Link.NUMBER: {
        STX: (Astm._begin, Link.NUMBER), ENQ: (Astm._reopen, Link.FRESH), EOT: (Astm._end, Link.IDLE),
        _OTHER: (Astm._take_number, Link.TEXT), _TIME: (Astm._silent, Link.IDLE),
    },
    Link.TEXT: {  # all other bytes: _take_text
        STX: (Astm._restart, Link.NUMBER), ETB: (Astm._close, Link.SUM), ETX: (Astm._close, Link.SUM),
        EOT: (Astm._pass, Link.TEXT_EOT), _TIME: (Astm._silent, Link.IDLE),
    },
    Link.TEXT_EOT: {
        STX: (Astm._restart, Link.NUMBER), ENQ: (Astm._cut_and_open, Link.FRESH),
        _OTHER: (Astm._go_on, Link.TEXT), _TIME: (Astm._cut, Link.IDLE),
    },
    Link.SUM: {_OTHER: (Astm._take_sum, Link.SUM), _TIME: (Astm._silent, Link.IDLE)},
    # sender
    Link.ENQUIRE: {
        ACK: (Astm._granted, Link.SENDING), ENQ: (Astm._contend, Link.IDLE), **_padding(Link.ENQUIRE),
        _OTHER: (Astm._busy, Link.IDLE), _TIME: (Astm._unanswered, Link.IDLE),
    },
    Link.SENDING: {
        ACK: (Astm._advance, Link.SENDING), EOT: (Astm._interrupt, Link.SENDING), **_padding(Link.SENDING),
        _OTHER: (Astm._again, Link.SENDING), _TIME: (Astm._again, Link.SENDING),
    },
}
# fmt: on


class Delimiters(NamedTuple):
    """How the records of a message are divided (LIS02-A2 6.4)."""

    field: str
    repeat: str
    component: str
    escape: str


def delimiters(record: bytes) -> Delimiters:
    """As the H record declares them; the standard's where it does not."""
    usual = Delimiters("|", "\\", "^", "&")
    text = record.lstrip(b"\r\n\0 ").split(b"\r")[0].decode("latin-1")
    if not text.startswith("H") or len(text) < 2 or text[1].isalnum() or text[1].isspace():
        return usual
    declared = text[2:5].split(text[1])[0]
    return Delimiters(text[1], *(declared + "".join(usual[1:])[len(declared) :]))


def _records_of(text: str) -> list[str]:
    lines = re.split(r"[\r\n]", text)
    clean = ("".join(c for c in line if c >= " ") for line in lines)
    return [line for line in clean if line.strip()]


def records_text(records: Sequence[bytes], settings: StreamSettings) -> str:
    """The body sent to the server: every record ends in LF, blank ones and other control characters are left out."""
    text = "\n".join(record.decode(settings.encoding, "replace") for record in records)
    return "".join(line + "\n" for line in _records_of(text))


def text_records(body: str, settings: StreamSettings) -> list[bytes]:
    """The records of an answer, each ending in CR as they are sent."""
    return [line.encode(settings.encoding, "replace") + b"\r" for line in _records_of(body)]


# =====================================================================================================================
# Store
#
# Every message on disk before it is acknowledged: one SQLite file (WAL, synchronous=FULL), one writer thread with one
# commit in flight. What arrives while it runs is the next batch: one executemany, one COMMIT, one call back into the
# event loop that releases all acknowledgments of the batch. Reads run in a second thread with a connection of their
# own. The file: table `message` (states below), view `queue` with readable states, `channel`, `tally`, `identity`.
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
APPLICATION_ID, SCHEMA_VERSION = 0x4D504C41, 2  # "MPLA": tells our file from any other SQLite file

_SCHEMA = f"""
CREATE TABLE identity (seed TEXT NOT NULL, last_deleted_id INTEGER NOT NULL DEFAULT 0);
CREATE TABLE tally (state INTEGER PRIMARY KEY, n INTEGER NOT NULL);
CREATE TABLE channel (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, next_seq INTEGER NOT NULL DEFAULT 0,
  key_spec TEXT NOT NULL DEFAULT '', epoch INTEGER NOT NULL DEFAULT 0);
CREATE TABLE message (
  id INTEGER PRIMARY KEY, channel INTEGER NOT NULL, epoch INTEGER NOT NULL, state INTEGER NOT NULL,
  remote TEXT NOT NULL, control_id TEXT NOT NULL, checked INTEGER, type TEXT NOT NULL, key TEXT,
  original BLOB NOT NULL, encoding TEXT NOT NULL, finalized TEXT, seq_no INTEGER, return_ack TEXT,
  received_at INTEGER NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0,
  next_attempt_at INTEGER NOT NULL DEFAULT 0, first_failed_at INTEGER NOT NULL DEFAULT 0,
  sent_at INTEGER NOT NULL DEFAULT 0, settled_at INTEGER NOT NULL DEFAULT 0, response TEXT, status_code INTEGER,
  outcome INTEGER NOT NULL DEFAULT 0, error_code TEXT, last_error TEXT, spool TEXT);
CREATE TABLE partial (session TEXT, number INTEGER, channel INTEGER NOT NULL, remote TEXT NOT NULL,
  frame BLOB NOT NULL, PRIMARY KEY (session, number)) WITHOUT ROWID;
CREATE UNIQUE INDEX duplicate ON message (channel, control_id) WHERE checked;
CREATE INDEX unsettled ON message (channel, id) WHERE state < {PROCESSED};
CREATE INDEX dead ON message (id) WHERE state > {PROCESSED};
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
    1: "ALTER TABLE message ADD COLUMN spool TEXT; CREATE INDEX spooled ON message (spool) WHERE spool IS NOT NULL"
}
_INSERT = """INSERT INTO message (id, channel, epoch, state, remote, control_id, checked, type, key, original,
  encoding, finalized, seq_no, return_ack, received_at, settled_at, outcome, error_code, last_error, spool)
  VALUES {rows}
  ON CONFLICT (channel, control_id) WHERE checked DO NOTHING"""
_UPDATE = """UPDATE message SET state = column2, remote = column3, attempts = column4, failures = column5,
  next_attempt_at = column6, first_failed_at = column7, sent_at = column8, settled_at = column9, response = column10,
  status_code = column11, outcome = column12, error_code = column13, last_error = column14
  FROM (VALUES {rows}) WHERE id = column1"""
_COLUMNS = """id, channel, epoch, state, remote, control_id, type, key, encoding, received_at, attempts, failures,
  next_attempt_at, first_failed_at, sent_at, settled_at, response, status_code, outcome, error_code, last_error,
  return_ack, spool"""


class Message:
    """One message from a device: its row, and what is known of it in memory. Times are epoch milliseconds."""

    __slots__ = (
        "assign", "attempts", "binary", "channel", "checked", "control_id", "deadline", "earlier", "encoding", "epoch",
        "error", "error_code", "failures", "first_failed_at", "id", "key", "losses", "next_attempt_at", "original",
        "outcome", "prepared", "received_at", "refusal", "remote", "response", "return_ack", "sent_at", "seq_no",
        "session", "settled_at", "size", "source", "spool", "state", "status_code", "text", "type",
    )  # fmt: skip

    def __init__(self, channel: int, remote: str, original: bytes, encoding: str):
        self.id = 0
        self.channel, self.epoch, self.remote, self.encoding = channel, 0, remote, encoding
        self.original: bytes | None = original  # as received; given up once it is on disk
        self.text: str | None = None  # what goes uplink; None: on disk
        self.size = len(original)
        self.control_id = self.type = ""
        self.key: str | None = ""
        self.checked = False  # the control id must be new
        self.assign = False  # MSH-13 is written at insertion
        self.seq_no: int | None = None
        self.session: str | None = None  # of an ASTM message: its frames in `partial` are replaced by it
        self.return_ack: str | None = None  # of a push: the ACK that completes it
        self.spool: str | None = None  # of an image: its file, which is uploaded before the message is sent
        self.binary: str | None = None  # what became of that file
        self.prepared = True  # nothing has to happen before it can be sent
        self.received_at = now_ms()
        self.state, self.outcome = QUEUED, PENDING
        self.attempts = self.failures = self.next_attempt_at = self.first_failed_at = self.sent_at = self.settled_at = 0
        self.losses = 0  # connections that worked for others and were lost while this message was in flight
        self.deadline = math.inf  # of the answer that is awaited; the event loop's clock
        self.response: str | None = None
        self.status_code: int | None = None
        self.error_code: str | None = None
        self.error: str | None = None
        self.earlier: Earlier | None = None  # set when the message is a repetition
        self.refusal: str | None = None  # set when it could not be stored
        self.source: Callable[[Message], None] | None = None  # told when it is on disk or refused

    def _row(self) -> tuple[Any, ...]:
        finalized = self.text if self.assign else None
        return (
            self.id, self.channel, self.epoch, self.state, self.remote, self.control_id, self.checked or None,
            self.type, self.key, self.original, self.encoding, finalized, self.seq_no, self.return_ack,
            self.received_at, self.settled_at, self.outcome, self.error_code, self.error, self.spool,
        )  # fmt: skip

    def _progress(self) -> tuple[Any, ...]:
        return (
            self.id, self.state, self.remote, self.attempts, self.failures, self.next_attempt_at, self.first_failed_at,
            self.sent_at, self.settled_at, self.response, self.status_code, self.outcome, self.error_code, self.error,
        )  # fmt: skip

    @staticmethod
    def _from_row(row: Sequence[Any]) -> Message:
        message = Message(row[1], row[4], b"", row[8])
        message.id, message.epoch, message.state = row[0], row[2], row[3]
        message.control_id, message.type = row[5], row[6]
        message.key, message.received_at, message.attempts, message.failures = row[7], row[9], row[10], row[11]
        message.next_attempt_at, message.first_failed_at, message.sent_at, message.settled_at = row[12:16]
        message.response, message.status_code, message.outcome, message.error_code, message.error = row[16:21]
        message.return_ack, message.spool = row[21:23]
        message.original = None
        return message


class Earlier(NamedTuple):
    """The stored message that a repetition repeats; `same` tells whether the bytes are equal."""

    message: Message
    same: bool


class _Update(NamedTuple):
    before: int  # the state that the row leaves
    progress: tuple[Any, ...]
    then: Callable[[], None] | None


class _Call(NamedTuple):
    run: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any]


class ChannelRow(NamedTuple):
    """A channel's identity in the store: `epoch` grows whenever its ordering key changes."""

    id: int
    epoch: int
    queued: int
    last_id: int


class SpoolFile(io.FileIO):
    """A file that is being received. What goes wrong is kept in `error` and not raised: the sender hears it at the end.

    It has the parts of a NamedTemporaryFile that pynetdicom writes to.
    """

    def __init__(self, spool: Spool):
        self.spool, self.size, self.error = spool, 0, ""
        self._kept = False
        path = spool.folder / f"{spool.new_name()}.part"
        try:
            spool.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            super().__init__(path, "x", opener=lambda p, flags: os.open(p, flags, 0o600))
        except OSError as error:
            self.error = _storage_text(error)
            super().__init__(os.devnull, "w")
            self.name = str(path)  # whoever removes the file by its name must not remove the null device

    @property
    def file(self) -> SpoolFile:
        return self

    def write(self, content: Any) -> int:
        if not self.error:
            try:
                self.error = self.spool.refusal(len(content))
                rest = memoryview(content)
                while rest and not self.error:
                    rest = rest[super().write(rest) :]
            except OSError as error:
                self.error = _storage_text(error)
        self.size += len(content)
        self.spool.count(len(content))
        return len(content)

    def keep(self) -> str:
        """Put the file on disk under its final name and return that; OSError."""
        name = Path(self.name).stem
        os.fsync(self)
        self.close()
        Path(self.name).rename(self.spool.path(name))
        if os.name == "posix":
            folder = os.open(self.spool.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self._kept = True
        return name

    def discard(self) -> None:
        """Close, and remove what was not kept; may be called again."""
        self.close()
        if self._kept:
            return
        self._kept = True
        self.spool.count(-self.size)
        with contextlib.suppress(OSError):
            Path(self.name).unlink()


class Spool:
    """Files that are too large for the queue file, beside it: images on their way. Every thread may use it.

    A name is a UUID that begins like the queue's seed: files of another queue in the same place are left alone.
    """

    def __init__(self, folder: Path, refusal: Callable[[int], str]):
        self.folder, self.refusal = folder, refusal
        self.size_bytes = 0  # also of what is being received
        self.prefix = ""
        self.tidied = False
        self._lock = threading.Lock()

    def new_name(self) -> str:
        return self.prefix + str(uuid.uuid4())[len(self.prefix) :]

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.dcm"

    def count(self, size: int) -> None:
        with self._lock:
            self.size_bytes += size

    def remove(self, name: str) -> None:
        path = self.path(name)
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            self.count(-size)

    def tidy(self, prefix: str, known: set[str]) -> None:
        """At start: measure, and remove what this queue has no message for (it was never acknowledged)."""
        self.prefix = prefix
        for path in self.folder.glob("*.*") if self.folder.is_dir() else ():
            with contextlib.suppress(OSError):
                if path.suffix == ".dcm" and path.stem in known:
                    self.count(path.stat().st_size)
                elif path.suffix == ".part" or (path.suffix == ".dcm" and path.stem.startswith(prefix)):
                    path.unlink()
        self.tidied = True


class Store:
    """The queue file. Public methods are called from the event loop's thread; the SQL runs in two others.

    `healthy` is false while the file cannot be used: every message is then refused with `trouble`, and the file is
    tried again until a person has mended it. Nothing in the file is ever thrown away to get going again.
    """

    def __init__(self, path: Path, log: Log):
        self.path = path
        self.seed = ""
        self.trouble = "the queue is not open yet"
        self.max_bytes = 0  # 0: no limit but the disk's
        self.size_bytes = 0
        self.spool = Spool(path.with_suffix(".spool"), self._spool_refusal)
        self.tally = dict.fromkeys(range(len(STATES)), 0)
        self.on_resume: list[Callable[[], None]] = []  # called once when congestion ends
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._inbox: collections.deque[Message | _Update | _Call] = collections.deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # wakes the writer in a third of an Event's time
        self._sleeping = self._stopping = False
        self._uncommitted_bytes = self._uncommitted = 0
        self._lazy: asyncio.TimerHandle | None = None
        self._next_id = 1
        self._opened = asyncio.Event()
        self._reader = ThreadPoolExecutor(1, "store-reader")
        self._read_connection: sqlite3.Connection | None = None
        self._failed_at = self._measure_at = 0.0
        self._inode = (0, 0)
        self._lock_file: typing.BinaryIO | None = None
        self._channels: dict[str, tuple[int, str, int]] = {}  # id, key_spec and epoch by name
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
    def total_bytes(self) -> int:
        """What is on disk: the queue file's content and the spool."""
        return self.size_bytes + self.spool.size_bytes

    @property
    def congested(self) -> bool:
        """More is received than is on disk: devices should not be read further until `on_resume`."""
        return self._uncommitted_bytes > UNCOMMITTED_BYTES or self._uncommitted > UNCOMMITTED_MESSAGES

    def put(self, message: Message) -> None:
        """Store a message; `message.source` hears of it when it is on disk, a repetition, or refused."""
        if reason := self._refusal(message.size):
            message.refusal = reason
            self._loop.call_soon(self._released, [message])
            return
        message.id = self._next_id
        self._next_id += 1
        self._uncommitted += 1
        self._uncommitted_bytes += message.size
        self._inbox.append(message)
        if self._sleeping:
            self._bell.put(None)

    def _refusal(self, size: int) -> str:
        if self.trouble:
            return self.trouble
        if self.max_bytes and self.total_bytes + self._uncommitted_bytes + size > self.max_bytes:
            return f"storage error: the queue has reached its limit of {self.max_bytes // MIB} MiB"
        return ""

    def _spool_refusal(self, size: int) -> str:
        """Why a file of the spool may not grow to this size, or ``; called from any thread."""
        return self._refusal(size) or (_storage_text(OSError("disk full")) if self._disk_full() else "")

    def update(self, message: Message, before: int, then: Callable[[], None] | None = None) -> None:
        """Write a message's progress with the next batch; with `then`, now, and call it once committed."""
        self._inbox.append(_Update(before, message._progress(), then))
        if then is not None:
            self._bell.put(None)
        elif self._lazy is None:
            self._lazy = self._loop.call_later(LAZY_SECS, self._write_lazily)

    def _write_lazily(self) -> None:
        self._lazy = None
        self._bell.put(None)

    def call(self, run: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Run in the writer thread inside the next transaction."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._inbox.append(_Call(run, future))
        self._bell.put(None)
        return future

    def read(self, run: Callable[[sqlite3.Connection], T]) -> Awaitable[T]:
        """Run in the reader thread on a read-only connection; raises sqlite3.Error."""
        return self._loop.run_in_executor(self._reader, self._read, run)

    async def close(self) -> None:
        """Write everything that waits, then close the file."""
        await self._loop.run_in_executor(self._reader, self._close_reader)  # the last to close removes -wal and -shm
        self._stopping = True
        self._bell.put(None)
        await asyncio.to_thread(self._writer.join, STOP_SECS)
        if self._lock_file is not None:
            with contextlib.suppress(OSError):
                self._lock_path.unlink()
            self._lock_file.close()
        self._reader.shutdown(wait=False)

    async def channel(self, name: str, key_spec: str) -> ChannelRow:
        """The row of a channel, made when new; a changed ordering key starts a new epoch."""

        def run(db: sqlite3.Connection) -> ChannelRow:
            db.execute("INSERT OR IGNORE INTO channel (name, key_spec) VALUES (?, ?)", (name, key_spec))
            db.execute(
                "UPDATE channel SET epoch = epoch + 1, key_spec = ?2 WHERE name = ?1 AND key_spec <> ?2",
                (name, key_spec),
            )
            id_, epoch = db.execute("SELECT id, epoch FROM channel WHERE name = ?", (name,)).fetchone()
            count, last = db.execute(
                f"SELECT count(*), ifnull(max(id), 0) FROM message WHERE channel = ? AND state < {PROCESSED}", (id_,)
            ).fetchone()
            self._channels[name] = (id_, key_spec, epoch)
            return ChannelRow(id_, epoch, count, last)

        return await self.call(run)

    async def queued(self, channel: int, after: int, limit: int) -> list[tuple[Message, bytes | None, str | None]]:
        """The next unsettled messages of a channel by id, with their bodies unless these are large."""

        def run(db: sqlite3.Connection) -> list[tuple[Message, bytes | None, str | None]]:
            rows = db.execute(
                f"""SELECT {_COLUMNS}, length(original),
                  CASE WHEN length(original) < {64 * KIB} THEN original END, finalized
                FROM message WHERE channel = ? AND state < {PROCESSED} AND id > ? ORDER BY id LIMIT ?""",
                (channel, after, limit),
            )
            return [_with_body(row) for row in rows]

        return await self.read(run)

    async def bodies(self, ids: Sequence[int]) -> dict[int, tuple[bytes, str | None]]:
        """(original, finalized or None) of messages by id."""

        def run(db: sqlite3.Connection) -> dict[int, tuple[bytes, str | None]]:
            marks = ",".join("?" * len(ids))
            rows = db.execute(f"SELECT id, original, finalized FROM message WHERE id IN ({marks})", tuple(ids))
            return {id_: (original, finalized) for id_, original, finalized in rows}

        return await self.read(run)

    async def finalize(self, message: Message, old: str, new: str) -> None:
        """Keep, beside the original, what shall be sent: the same with `old` replaced; StorageError."""
        sql = "UPDATE message SET finalized = replace(CAST(original AS TEXT), ?, ?) WHERE id = ?"
        await self.call(lambda db: db.execute(sql, (old, new, message.id)))

    async def message(self, id_: int) -> Message | None:
        """One message without its body, as it is after all updates that were asked for."""
        row = await self.call(lambda db: db.execute(f"SELECT {_COLUMNS} FROM message WHERE id = ?", (id_,)).fetchone())
        return Message._from_row(row) if row else None

    # --- the reader thread ---

    def _read(self, run: Callable[[sqlite3.Connection], T]) -> T:
        if self._read_connection is None:
            self._read_connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None
            )
            self._read_connection.execute("PRAGMA cache_size=-4000")
        return run(self._read_connection)

    def _close_reader(self) -> None:
        if self._read_connection is not None:
            self._read_connection.close()
            self._read_connection = None

    # --- the writer thread ---

    def _write_loop(self) -> None:
        db: sqlite3.Connection | None = None
        while not (self._stopping and (not self._inbox or db is None)):
            if db is None:
                db = self._open()
                self._loop.call_soon_threadsafe(self._opened.set)
                if db is None:
                    self._wait(STORE_REOPEN_SECS)
                    self._refuse_inbox()
                    continue
            if not self._inbox:
                self._sleep()
                continue
            if not self._write_batch(db, self._take_batch()):
                db = self._after_failure(db)
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            db.close()

    def _sleep(self) -> None:
        self._sleeping = True
        if not self._inbox and not self._stopping:
            self._wait(None)
        self._sleeping = False

    def _wait(self, seconds: float | None) -> None:
        """Until the bell rings, or so long."""
        with contextlib.suppress(queue.Empty):
            self._bell.get(timeout=seconds)
            while True:
                self._bell.get_nowait()

    def _take_batch(self) -> list[Message | _Update | _Call]:
        batch: list[Message | _Update | _Call] = []
        size = 0
        while self._inbox and len(batch) < COMMIT_MESSAGES and size < COMMIT_BYTES:
            item = self._inbox.popleft()
            size += item.size if isinstance(item, Message) else 0
            batch.append(item)
        return batch

    def _write_batch(self, db: sqlite3.Connection, batch: list[Message | _Update | _Call]) -> bool:
        """One transaction. When it fails, messages are refused; the rest is tried without them, and else kept."""
        messages = [item for item in batch if isinstance(item, Message)]
        updates = [item for item in batch if isinstance(item, _Update)]
        calls = [item for item in batch if isinstance(item, _Call)]
        tally = dict(self.tally)
        try:
            self._check_file()
            self._check_disk(messages)
            db.execute("BEGIN IMMEDIATE")
            self._insert(db, messages)
            _execute_many(db, _UPDATE, [*{item.progress[0]: item.progress for item in updates}.values()])
            results = [call.run(db) for call in calls]
            self._count(db, messages, updates)
            db.execute("COMMIT")
        except Exception as error:  # whatever it is, the thread must live: it holds the promise
            self.tally = tally
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            return self._after_error(db, messages, updates, calls, error)
        with contextlib.suppress(sqlite3.Error):
            self._measure(db, messages, exact=bool(calls))
        if self._failed_at and messages:
            self._failed_at = 0.0
            self._log.info("The queue can be written again.")
        self._loop.call_soon_threadsafe(self._committed, messages, updates, calls, results)
        return True

    def _after_error(
        self,
        db: sqlite3.Connection,
        messages: list[Message],
        updates: list[_Update],
        calls: list[_Call],
        error: Exception,
    ) -> bool:
        if not self._failed_at or time.monotonic() - self._failed_at > STORE_REMIND_SECS:
            self._failed_at = time.monotonic()
            self._log.error(f"The queue {self.path} cannot be written: {error}. {_storage_advice(error)}")
        for message in messages:
            message.refusal = _storage_text(error)
        if messages:
            self._loop.call_soon_threadsafe(self._settle_intake, messages)
            return bool(updates or calls) and self._write_batch(db, [*updates, *calls])
        kept: list[_Update | _Call] = [*updates, *calls] if isinstance(error, StorageError) else [*updates]
        self._inbox.extendleft(reversed(kept))
        if len(kept) == len(updates):
            self._loop.call_soon_threadsafe(self._fail_calls, calls, error)
        return False

    def _insert(self, db: sqlite3.Connection, messages: list[Message]) -> None:
        """Insert all that are new; a repetition gets `earlier` set instead."""
        for message in messages:
            message.earlier = message.refusal = None
        numbered = [message for message in messages if message.assign]
        for message in numbered:
            self._insert_numbered(db, message)
        plain = [message for message in messages if not message.assign]
        before = db.total_changes
        _execute_many(db, _INSERT, [message._row() for message in plain])
        if db.total_changes - before != len(plain):
            for message in plain:
                if not db.execute("SELECT 1 FROM message WHERE id = ?", (message.id,)).fetchone():
                    message.earlier = self._find_earlier(db, message)
        for session in [message.session for message in messages if message.session]:
            db.execute("DELETE FROM partial WHERE session = ?", (session,))

    def _insert_numbered(self, db: sqlite3.Connection, message: Message) -> None:
        """A number is taken only by a message that is really stored, in the same transaction."""
        message.earlier = self._find_earlier(db, message) if message.checked else None
        if message.earlier is not None:
            return
        (number,) = db.execute("SELECT next_seq FROM channel WHERE id = ?", (message.channel,)).fetchone()
        message.seq_no = number
        message.text = write_sequence_number(message.text or "", number)
        _execute_many(db, _INSERT, [message._row()])
        db.execute("UPDATE channel SET next_seq = ? WHERE id = ?", (number + 1, message.channel))

    def _find_earlier(self, db: sqlite3.Connection, message: Message) -> Earlier | None:
        row = db.execute(
            f"SELECT {_COLUMNS}, original FROM message WHERE channel = ? AND control_id = ? AND checked",
            (message.channel, message.control_id),
        ).fetchone()
        return Earlier(Message._from_row(row), row[-1] == message.original) if row else None

    def _count(self, db: sqlite3.Connection, messages: list[Message], updates: list[_Update]) -> None:
        for message in messages:
            if message.earlier is None:
                self.tally[message.state] += 1
        for update in updates:
            self.tally[update.before] -= 1
            self.tally[update.progress[1]] += 1
        if messages or updates:
            db.executemany("INSERT OR REPLACE INTO tally VALUES (?, ?)", self.tally.items())

    def _after_failure(self, db: sqlite3.Connection) -> sqlite3.Connection | None:
        """Wait a moment; a file that is damaged is closed and opened anew (a person may have mended it)."""
        self._wait(LAZY_SECS)
        try:
            self._check_file()
            db.execute("SELECT count(*) FROM tally").fetchone()
            return db
        except (sqlite3.Error, StorageError):
            db.close()
            self._loop.run_in_executor(self._reader, self._close_reader)
            return None

    def _refuse_inbox(self) -> None:
        kept = [item for item in self._take_batch() if not isinstance(item, Message) or not self._refuse(item)]
        self._inbox.extendleft(reversed(kept))

    def _refuse(self, message: Message) -> bool:
        message.refusal = self.trouble
        self._loop.call_soon_threadsafe(self._settle_intake, [message])
        return True

    def _check_disk(self, messages: list[Message]) -> None:
        """Refuse while the disk is nearly full, so that what is stored can still be settled."""
        if messages and self._disk_full():
            raise StorageError("database or disk is full")

    def _disk_full(self) -> bool:
        usage = shutil.disk_usage(self.path.parent)
        return usage.free < min(DISK_RESERVE_BYTES, usage.total // 50)

    def _check_file(self) -> None:
        """The file is still the one in the folder: what is written into a deleted file is lost."""
        try:
            found = self.path.stat()
        except OSError:
            raise StorageError("unable to open: the queue file was moved or deleted") from None
        if (found.st_dev, found.st_ino) != self._inode:
            raise StorageError("unable to open: another file took the place of the queue file")

    def _measure(self, db: sqlite3.Connection, messages: Sequence[Message] = (), *, exact: bool = True) -> None:
        """The size of what is used in the file: measured ten times a second, in between what was added is counted."""
        self.size_bytes += sum(message.size for message in messages)
        if exact or time.monotonic() >= self._measure_at:
            self._measure_at = time.monotonic() + LAZY_SECS
            (pages,) = db.execute("PRAGMA page_count").fetchone()
            (free,) = db.execute("PRAGMA freelist_count").fetchone()
            self.size_bytes = (pages - free) * PAGE_BYTES

    def _open(self) -> sqlite3.Connection | None:
        """Open or create the file; None, with `trouble` set, when it cannot be used."""
        db: sqlite3.Connection | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_queue()
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=5)
            self._prepare(db)
        except (OSError, sqlite3.Error, StorageError) as error:
            if db is not None:
                db.close()
            text = _storage_text(error)
            if text != self.trouble:
                self._log.error(f"The queue {self.path} cannot be opened: {error}. {_storage_advice(error)}")
            self.trouble = text
            return None
        if self.trouble and self._opened.is_set():
            self._log.info(f"The queue {self.path} is open again.")
        self.trouble = ""
        return db

    @property
    def _lock_path(self) -> Path:
        return self.path.with_name(self.path.name + ".lock")

    def _lock_queue(self) -> None:
        """Two agents must never share a queue: their row numbers would clash."""
        if self._lock_file is None:
            file = open(self._lock_path, "a+b", opener=lambda p, flags: os.open(p, flags, 0o600))  # noqa: SIM115
            if not lock_file(file):
                file.close()
                raise StorageError("foreign file: another agent uses this queue (queueDbPath)")
            self._lock_file = file

    def _prepare(self, db: sqlite3.Connection) -> None:
        new, version = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0], 0
        if new:
            db.execute(f"PRAGMA page_size={PAGE_BYTES}")
            db.execute("PRAGMA auto_vacuum=INCREMENTAL")
        else:
            (application,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if application != APPLICATION_ID or version > SCHEMA_VERSION:
                raise StorageError("foreign file: it is not a queue of this version of the agent")
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"wal_autocheckpoint={CHECKPOINT_PAGES}"):
            db.execute(f"PRAGMA {pragma}")
        db.execute("PRAGMA cache_size=-16000")
        if new:
            seed = uuid.uuid4().hex[:19]
            db.executescript(f"BEGIN; {_SCHEMA} INSERT INTO identity (seed) VALUES ('{seed}'); COMMIT;")
        for older in range(SCHEMA_VERSION if new else version, SCHEMA_VERSION):
            db.executescript(f"BEGIN; {_MIGRATIONS[older]}; PRAGMA user_version = {older + 1}; COMMIT;")
        self._inspect(db)

    def _inspect(self, db: sqlite3.Connection) -> None:
        """Learn what is in the file; a new one in the place of another gets the channels that are running."""
        db.executemany(
            "INSERT OR IGNORE INTO channel (name, id, key_spec, epoch) VALUES (?, ?, ?, ?)",
            [(name, *row) for name, row in self._channels.items()],
        )
        (self.seed,) = db.execute("SELECT seed FROM identity").fetchone()
        self.tally = dict.fromkeys(range(len(STATES)), 0) | dict(db.execute("SELECT state, n FROM tally"))
        (last,) = db.execute("SELECT ifnull(max(id), 0) FROM message").fetchone()
        (deleted,) = db.execute("SELECT last_deleted_id FROM identity").fetchone()
        self._next_id = max(self._next_id, last + 1, deleted + 1)
        if not self.spool.tidied:
            sql = f"SELECT spool FROM message WHERE spool IS NOT NULL AND state <> {PROCESSED}"
            self.spool.tidy(self.seed[:8], {name for (name,) in db.execute(sql)})
        self._measure(db)
        db.execute("UPDATE identity SET seed = seed")  # a file that cannot be written is known now, not later
        found = self.path.stat()
        self._inode = (found.st_dev, found.st_ino)

    # --- back in the event loop ---

    def _committed(
        self, messages: list[Message], updates: list[_Update], calls: list[_Call], results: list[Any]
    ) -> None:
        for call, result in zip(calls, results, strict=True):
            if not call.future.done():
                call.future.set_result(result)
        for update in updates:
            if update.then is not None:
                update.then()
        self._settle_intake(messages)

    def _fail_calls(self, calls: list[_Call], error: Exception) -> None:
        for call in calls:
            if not call.future.done():
                call.future.set_exception(StorageError(str(error)))

    def _settle_intake(self, messages: list[Message]) -> None:
        self._uncommitted -= len(messages)
        self._uncommitted_bytes -= sum(message.size for message in messages)
        self._released(messages)
        if self.on_resume and not self.congested:
            waiting, self.on_resume = self.on_resume, []
            for resume in waiting:
                resume()

    def _released(self, messages: list[Message]) -> None:
        for message in messages:
            message.original = None
            if message.source is None:
                continue
            try:
                message.source(message)
            except Exception as error:  # one message must not cost the others of its batch their acknowledgments
                self._log.error(f"Internal error: {type(error).__name__} after storing message {message.id}")

    # --- retention ---

    async def sweep(self, settings: AgentSettings) -> tuple[int, int]:
        """Delete what is finished and old, or oldest when the file is too large; (processed, dead letters) deleted."""
        day = 86_400_000
        old = now_ms() - settings.queueRetentionDays * day
        floor = now_ms() - settings.queueErroredRetentionDays * day
        limit = settings.queueRetentionMaxMb * MIB
        answered = f"((state = {PROCESSED} AND outcome <> {UNDELIVERED}) OR state = {NACKED})"
        dead = f"(state IN ({REJECTED}, {FAILED}) OR (state = {PROCESSED} AND outcome = {UNDELIVERED}))"
        processed = await self._delete(f"{answered} AND settled_at < {old}", lambda: True)
        processed += await self._delete(answered, lambda: self.size_bytes > limit)
        errored = await self._delete(f"{dead} AND settled_at < {floor}", lambda: self.total_bytes > limit)
        return processed, errored

    async def _delete(self, condition: str, needed: Callable[[], bool]) -> int:
        """Delete matching rows, oldest first, in small transactions while `needed`."""
        total = 0

        def run(db: sqlite3.Connection) -> tuple[int, list[str]]:
            rows = db.execute(
                f"SELECT id, spool FROM message WHERE {condition} ORDER BY id LIMIT {SWEEP_ROWS}"
            ).fetchall()
            ids = [id_ for id_, _ in rows]
            gone = dict(
                db.execute(
                    f"SELECT state, count(*) FROM message WHERE id IN ({','.join(map(str, ids))}) GROUP BY state"
                )
            )
            db.executemany("DELETE FROM message WHERE id = ?", [(id_,) for id_ in ids])
            db.execute("UPDATE identity SET last_deleted_id = max(last_deleted_id, ?)", (max(ids, default=0),))
            for state, count in gone.items():
                self.tally[state] -= count
            db.executemany("INSERT OR REPLACE INTO tally VALUES (?, ?)", self.tally.items())
            db.execute(f"PRAGMA incremental_vacuum({SWEEP_ROWS})").fetchall()
            return len(ids), [spool for _, spool in rows if spool]

        while needed():
            count, files = await self.call(run)
            for name in files:
                self.spool.remove(name)
            total += count
            if count < SWEEP_ROWS:
                break
        return total


@functools.cache
def _statement(template: str, columns: int, rows: int) -> str:
    return template.format(rows=",".join([f"({','.join('?' * columns)})"] * rows))


def _execute_many(db: sqlite3.Connection, template: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Many rows a statement: executemany takes and drops the interpreter lock for each row (a quarter of the path)."""
    at = 0
    while at < len(rows):
        size = next(size for size in (64, 8, 1) if len(rows) - at >= size)
        chunk = rows[at : at + size]
        db.execute(_statement(template, len(chunk[0]), size), list(itertools.chain.from_iterable(chunk)))
        at += size


def lock_file(file: typing.BinaryIO) -> bool:
    """Lock the file for this process, and write the process id into it; False when another holds it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    file.flush()
    return True


def _with_body(row: Sequence[Any]) -> tuple[Message, bytes | None, str | None]:
    message = Message._from_row(row)
    message.size = row[-3]
    message.prepared = row[-1] is not None or not (message.spool or message.type == COMMITMENT)
    return message, row[-2], row[-1]


def _storage_text(error: Exception) -> str:
    """MSA-3 for a message that could not be stored: short, and without a path."""
    text = str(error).lower()
    if "full" in text or "no space" in text:
        return "storage error: the disk of the agent is full"
    if "readonly" in text or "permission" in text or "unable to open" in text or "read-only" in text:
        return "storage error: the queue of the agent cannot be written"
    if "foreign file" in text:
        return "storage error: the queue file of the agent belongs to another program or version"
    if "malformed" in text or "not a database" in text:
        return "storage error: the queue file of the agent is damaged"
    return "storage error"


def _storage_advice(error: Exception) -> str:
    """What the main log tells the person who can mend it."""
    text = _storage_text(error)
    if "full" in text:
        advice = "Free space on that disk; the agent goes on by itself."
    elif "damaged" in text:
        advice = (
            "Messages accepted earlier are still in that file. Stop the agent, keep a copy, repair it with "
            "'sqlite3 FILE .recover | sqlite3 NEW' and put NEW in its place, or move it away to start empty."
        )
    elif "belongs" in text:
        advice = "Move that file away, or use the version of the agent that wrote it."
    else:
        advice = "Make folder and file writable for the agent's user; the agent goes on by itself."
    return f"Devices get CE/AE and keep their messages. {advice}"


# =====================================================================================================================
# FHIR
#
# The HTTPS side of the server: OAuth2 client-credentials login and FHIR reads (uplink contract 1 and 2). urllib3 does
# the work in worker threads: pools, proxies, TLS, retries. May touch: HTTPS.
# =====================================================================================================================


@dataclasses.dataclass(frozen=True)
class Token:
    """An access token; times are epoch seconds, `expires_at` is infinite when the server does not say."""

    text: str
    expires_at: float


def tls_context(ca_file: str) -> ssl.SSLContext:
    """Trust the system's authorities, certifi's bundle and `ca_file` together."""
    context: ssl.SSLContext = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certifi.where())
    if ca_file:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError([f"caFile {ca_file} holds no usable PEM certificate: {error}"]) from None
    return context


def proxy_for(url: str) -> str | None:
    """The proxy that HTTPS_PROXY, HTTP_PROXY and NO_PROXY (or the system) name for this URL."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if urllib.request.proxy_bypass(f"{host}:{parts.port}" if parts.port else host) or urllib.request.proxy_bypass(host):
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _proxy_problem(proxy: str) -> str:
    """The proxy without its password when it is no http proxy, else ``."""
    shown = re.sub(r"//.*@", "//", proxy)
    try:
        parts = urllib.parse.urlsplit(proxy)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    return "" if usable else shown


def http_pool(url: str, context: ssl.SSLContext) -> urllib3.PoolManager:
    """A connection pool for the server of `url`, through its proxy if there is one."""
    retries = urllib3.Retry(
        total=HTTP_ATTEMPTS - 1, backoff_factor=0.5, status_forcelist=[429, *range(500, 600)], allowed_methods=None,
        raise_on_status=False, respect_retry_after_header=False,
    )  # fmt: skip
    common: Json = {"ssl_context": context, "retries": retries, "timeout": HTTP_TIMEOUT_SECS, "maxsize": 8}
    common["blocksize"] = TRANSFER_BLOCK_BYTES
    proxy = proxy_for(url)
    if not proxy:
        return urllib3.PoolManager(**common)
    if problem := _proxy_problem(proxy):
        raise ConfigError([f"the proxy '{problem}' of HTTP_PROXY or HTTPS_PROXY cannot be used: give http://host:port"])
    user = urllib.parse.urlsplit(proxy)
    secret = f"{urllib.parse.unquote(user.username or '')}:{urllib.parse.unquote(user.password or '')}"
    headers = urllib3.make_headers(proxy_basic_auth=secret) if user.username else None
    return urllib3.ProxyManager(proxy, proxy_headers=headers, proxy_ssl_context=context, **common)


def jwt_claims(token: str) -> Json:
    """The claims of a JWT, unverified; {} for an opaque token."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return claims if isinstance(claims, dict) else {}
    except (ValueError, IndexError):
        return {}


def outcome_text(resource: Any) -> str:
    """The text of an OperationOutcome: details, diagnostics in parentheses, issues joined by `; `."""
    issues = resource.get("issue") if isinstance(resource, dict) else None
    texts = []
    for issue in issues if isinstance(issues, list) else []:
        text = (issue.get("details") or {}).get("text") or issue.get("code") or "error"
        texts.append(f"{text} ({issue['diagnostics']})" if issue.get("diagnostics") else text)
    return "; ".join(texts)


class Fhir:
    """The server's HTTP interface with one login. Raises ServerError; coroutines belong to the event loop."""

    def __init__(self, settings: ProcessSettings, context: ssl.SSLContext, log: Log):
        self.base = settings.baseUrl.rstrip("/") + "/"
        self.token: Token | None = None
        self._settings, self._log = settings, log
        self._pool = http_pool(self.base, context)
        self._refreshing: asyncio.Task[Token] | None = None
        self._refreshed_at = -math.inf
        self._rejected = False
        # apart from the short requests, and from each other: somebody waits for what is fetched
        self._uploads, self._downloads = (ThreadPoolExecutor(TRANSFERS, name) for name in ("upload", "download"))

    def usable_token(self) -> str | None:
        """A token that can be sent now, or None; a refresh is started in good time."""
        token = self.token
        if token is None:
            return None
        now = time.time()
        if self._rejected or now >= token.expires_at - TOKEN_MARGIN_SECS:
            if time.monotonic() - self._refreshed_at > TOKEN_REFRESH_SPACING_SECS:
                return None
            if now >= token.expires_at:
                return None
        return token.text

    def reject_token(self) -> None:
        """The server does not accept the token any more: the next use logs in again, but not once per message."""
        self._rejected = True

    async def fresh_token(self) -> str:
        """A usable token, after a login if needed (one at a time); raises ServerError."""
        if text := self.usable_token():
            return text
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(asyncio.to_thread(self._login))
            self._refreshing.add_done_callback(self._refreshed)
        return (await asyncio.shield(self._refreshing)).text

    def _refreshed(self, task: asyncio.Task[Token]) -> None:
        self._refreshing = None
        if self.token is not None:  # the first login may be followed by a refresh at once
            self._refreshed_at = time.monotonic()
        if not task.cancelled() and task.exception() is None:
            self.token, self._rejected = task.result(), False

    def _login(self) -> Token:
        """POST oauth2/token (RFC 6749 4.4) with the checks of uplink contract 1."""
        fields = {
            "grant_type": "client_credentials", "client_id": self._settings.clientId,
            "client_secret": self._settings.clientSecret,
        }  # fmt: skip
        response = self._http(
            "POST", urllib.parse.urljoin(self.base, "oauth2/token"), body=urllib.parse.urlencode(fields),
            headers={"Content-Type": "application/x-www-form-urlencoded", "Accept": "*/*"},
        )  # fmt: skip
        answer = _json_object(response.data)
        if response.status >= 300 or not isinstance(answer.get("access_token"), str):
            reason = answer.get("error_description") or answer.get("error") or f"HTTP status {response.status}"
            path = ", and baseUrl: it ends before fhir/R4" if "/fhir" in self.base else ""
            advice = f". Check clientId and clientSecret{path}" if response.status in (400, 401) else ""
            raise ServerError(f"login refused: {reason}{advice}", response.status)
        token = self._checked_token(answer)
        if isinstance(jwt_claims(token.text).get("login_id"), str):
            self._checked(self._http("GET", self.base + "auth/me", headers=self._headers(token.text)), "auth/me")
        return token

    def _checked_token(self, answer: Json) -> Token:
        text: str = answer["access_token"]
        claims = jwt_claims(text)
        expires = claims.get("exp")
        if not isinstance(expires, int | float):
            lifetime = answer.get("expires_in")
            if not isinstance(lifetime, int | float) or lifetime < 2 * TOKEN_MARGIN_SECS:
                lifetime = math.inf  # the contract ignores expires_in; a sensible one saves a refusal
            return Token(text, time.time() + lifetime)
        if expires < time.time():
            raise ServerError("login failed: Token expired. Is the clock of this machine right?")
        audience = claims.get("cid") or claims.get("client_id")
        if audience is not None and audience != self._settings.clientId:
            raise ServerError("login failed: the token is for another client. Check clientId")
        return Token(text, float(expires))

    async def read(self, reference: str) -> Json:
        """GET fhir/R4/<reference>."""
        url = f"{self.base}fhir/R4/{reference}"
        response = await self._authorized(None, lambda headers: self._http("GET", url, headers=headers))
        return self._checked(response, reference)

    async def _authorized(
        self, executor: ThreadPoolExecutor | None, request: Callable[[dict[str, str]], urllib3.BaseHTTPResponse]
    ) -> urllib3.BaseHTTPResponse:
        """A request with a token, in a thread; a 401 is tried once more with a new one."""
        loop = asyncio.get_running_loop()
        response = await loop.run_in_executor(executor, request, self._headers(await self.fresh_token()))
        if response.status == 401:
            self.token = None
            response = await loop.run_in_executor(executor, request, self._headers(await self.fresh_token()))
        return response

    async def upload(self, path: Path, name: str, content_type: str) -> str:
        """POST a file as a Binary, streamed from disk, and return its reference; OSError when it cannot be read."""
        url = f"{self.base}fhir/R4/Binary?_filename={urllib.parse.quote(name)}"

        def send(headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
            with open(path, "rb") as file:
                length = os.fstat(file.fileno()).st_size
                described = headers | {"Content-Type": content_type, "Content-Length": str(length)}
                return self._http("POST", url, headers=described, body=file, timeout=TRANSFER_TIMEOUT_SECS)

        response = await self._authorized(self._uploads, send)
        created = self._checked(response, "Binary")
        if created.get("resourceType") != "Binary" or not isinstance(created.get("id"), str) or not created["id"]:
            raise ServerError("the server took a file and named no Binary for it", response.status)
        return f"Binary/{created['id']}"

    async def download(self, reference: str, file: typing.BinaryIO) -> None:
        """GET the content of a Binary, streamed into `file`."""
        url = f"{self.base}fhir/R4/{reference}"

        def fetch(headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
            wanted = headers | {"Accept": f"{DICOM_TYPE}, application/octet-stream, */*; q=0.1"}
            with self._http("GET", url, headers=wanted, timeout=TRANSFER_TIMEOUT_SECS, stream=True) as response:
                try:
                    if response.status >= 300 or "json" in response.headers.get("Content-Type", ""):
                        response.read(cache_content=True)
                    else:
                        for block in response.stream(TRANSFER_BLOCK_BYTES):
                            file.write(block)
                except urllib3.exceptions.HTTPError as error:
                    raise ServerError(f"the connection broke: {type(error).__name__}") from None
                return response

        response = await self._authorized(self._downloads, fetch)
        if response.status >= 300 or "json" in response.headers.get("Content-Type", ""):
            file.write(base64.b64decode(self._checked(response, reference).get("data", "")))

    def _headers(self, token: str) -> dict[str, str]:
        return {
            "Authorization": f"Bearer {token}", "Accept": "application/fhir+json, */*; q=0.1", "X-Medplum": "extended",
            "Cache-Control": "max-age=0", "User-Agent": f"medplum-agent/{VERSION}",
        }  # fmt: skip

    def _http(
        self,
        method: str,
        url: str,
        *,
        headers: dict[str, str],
        body: str | typing.BinaryIO | None = None,
        timeout: float = HTTP_TIMEOUT_SECS,
        stream: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        """`stream`: the body is left for the caller to read, and a redirect (to a store of files) is followed."""
        try:
            return self._pool.request(
                method, url, body=body, headers=headers, redirect=stream, timeout=timeout, preload_content=not stream
            )
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise ServerError(f"{urllib.parse.urlsplit(url).netloc} cannot be reached: {reason}") from None

    def _checked(self, response: urllib3.BaseHTTPResponse, what: str) -> Json:
        answer = _json_object(response.data)
        if response.status >= 300 or not answer:
            raise ServerError(outcome_text(answer) or f"HTTP status {response.status} for {what}", response.status)
        return answer


def _json_object(text: bytes) -> Json:
    try:
        value = load_json(text)
        return value if isinstance(value, dict) else {}
    except ValueError:
        return {}


# =====================================================================================================================
# Uplink
#
# One WSS connection to the server (uplink contract 3 and 4): connect, heartbeats both ways, forced reconnect when it is
# silent or never live, full-jitter back-off. websockets does TCP, proxy, TLS, handshake and frames; its receive queue
# is bypassed, and what is sent within one turn of the event loop leaves in one write. Nothing but the connect request
# is sent before agent:connect:response. May touch: WSS, and Fhir for the token.
# =====================================================================================================================


class _Socket(ClientConnection):
    """websockets' connection that hands each text to the uplink at once instead of queueing it."""

    def __init__(self, *args: Any, uplink: Uplink, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._uplink = uplink
        self._parts: list[bytes] = []
        self._early: list[bytes] | None = []  # texts that came with the handshake, until `begin`

    def process_event(self, event: Any) -> None:
        if (
            self.response is None
            or not isinstance(event, Frame)
            or event.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT)
        ):
            super().process_event(event)
        elif event.fin and not self._parts:
            self._text(event.data)
        else:
            self._parts.append(bytes(event.data))
            if event.fin:
                text, self._parts = b"".join(self._parts), []
                self._text(text)

    def _text(self, text: bytes | bytearray | memoryview) -> None:
        if self._early is not None:
            self._early.append(bytes(text))
        else:
            self._uplink.received(text)

    def begin(self) -> None:
        """The uplink is ready for what has come, and for what comes."""
        early, self._early = self._early or [], None
        for text in early:
            self._uplink.received(text)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._uplink.on_writable()

    @property
    def backed_up(self) -> bool:
        return bool(self.paused)


class Uplink:
    """The connection to the server. Callbacks: `on_live`, `on_lost(close_code)`, `on_writable`, `on_message`."""

    def __init__(self, settings: ProcessSettings, fhir: Fhir, context: ssl.SSLContext, log: Log):
        self.live = False
        self.outstanding = 0  # heartbeats without any sign of life since
        self.ping_ms = -1
        self.on_live: Callable[[], None] = lambda: None
        self.on_lost: Callable[[int], None] = lambda code: None
        self.on_writable: Callable[[], None] = lambda: None
        self.on_message: Callable[[Json], None] = lambda message: None
        self._settings, self._fhir, self._log = settings, fhir, log
        scheme = "wss" if settings.baseUrl.startswith("https") else "ws"
        parts = urllib.parse.urlsplit(settings.baseUrl)
        self.url = urllib.parse.urlunsplit((scheme, parts.netloc, "/ws/agent", parts.query, ""))
        self._context = context if scheme == "wss" else None
        self._socket: _Socket | None = None
        self._outgoing: list[bytes] = []
        self.largest = self.largest_id = 0  # bytes of the largest text on this connection, and the message it carried
        self._masks = b""
        self._loop = asyncio.get_running_loop()
        self._flushing = self._refreshing = False
        self._token = ""
        self._heartbeat_at = 0.0
        self._refused = ""
        self._stopping = False

    # --- sending ---

    def ready(self) -> bool:
        """Live, with room in the socket and a token that the server will accept."""
        if not self.live or self._socket is None or self._socket.backed_up:
            return False
        token = self._fhir.usable_token()
        if token is None:
            self._refresh_soon()
            return False
        self._token = token
        return True

    def _refresh_soon(self) -> None:
        if self._refreshing:
            return
        self._refreshing = True
        task = asyncio.ensure_future(self._fhir.fresh_token())
        task.add_done_callback(self._refresh_done)

    def _refresh_done(self, task: asyncio.Future[str]) -> None:
        self._refreshing = False
        if task.cancelled() or task.exception() is None:
            usable = self._fhir.usable_token() is not None
            self._loop.call_later(0 if usable else RECONNECT_BASE_SECS, self.on_writable)
        else:
            self._log.error(f"The token cannot be refreshed: {task.exception()}")
            self._loop.call_later(random.uniform(0, RECONNECT_MAX_SECS), self.on_writable)

    def transmit(self, channel: str, remote: str, content_type: str, body: str, callback: str) -> int:
        """Send one agent:transmit:request; only when `ready()`. Returns the bytes of its text."""
        return self._write({
            "type": "agent:transmit:request", "accessToken": self._token, "channel": channel, "remote": remote,
            "contentType": content_type, "body": body, "callback": callback,
        })  # fmt: skip

    def send(self, message: Json) -> None:
        """Send an answer or a control message; dropped when there is no live connection to answer on."""
        if self.live:
            self._write(message)

    def _write(self, message: Json) -> int:
        assert self._socket is not None
        text = dump_json(message)
        if len(text) > self.largest:
            self.largest, self.largest_id = len(text), 0
        if self._settings.compression:
            self._socket.protocol.send_text(text)
        else:
            self._outgoing.append(self._text_frame(text))
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        return len(text)

    def _text_frame(self, payload: bytes) -> bytes:
        """A masked text frame (RFC 6455 5.2); a random number for each would cost a system call and the GIL."""
        if len(self._masks) < 4:
            self._masks = os.urandom(4096)
        mask, self._masks = self._masks[:4], self._masks[4:]
        size = len(payload)
        if size < 126:
            head = struct.pack("!BB", 0x81, 0x80 | size)
        elif size < 65536:
            head = struct.pack("!BBH", 0x81, 0xFE, size)
        else:
            head = struct.pack("!BBQ", 0x81, 0xFF, size)
        return head + mask + apply_mask(payload, mask)

    def _flush(self) -> None:
        self._flushing = False
        outgoing, self._outgoing = self._outgoing, []
        if self._socket is not None and self._socket.protocol.state is SocketState.OPEN:
            outgoing += [part for part in self._socket.protocol.data_to_send() if part]
            if outgoing:
                self._socket.transport.write(b"".join(outgoing))

    # --- receiving ---

    def received(self, text: bytes | bytearray | memoryview) -> None:
        """One text from the server: any text is a sign of life."""
        self.outstanding = 0
        try:
            message = load_json(text)
            kind = message["type"]
        except (ValueError, KeyError, TypeError):
            self._log.warn(f"The server sent {len(text)} bytes that are not a JSON message with a type; ignored.")
            return
        if kind in ("agent:connect:response", "connected"):
            self._accepted()
        elif kind == "agent:heartbeat:request":
            self._write({"type": "agent:heartbeat:response", "version": VERSION})
        elif kind == "agent:heartbeat:response":
            self.ping_ms = round((time.monotonic() - self._heartbeat_at) * 1000)
        elif not self.live and kind == "agent:error":
            self._not_accepted(str(message.get("body")))
        else:
            self._handle(message)

    def _handle(self, message: Json) -> None:
        try:
            self.on_message(message)
        except Exception as error:  # one strange message must not end the connection
            self._log.error(
                f"A message of type {str(message['type'])[:60]} could not be handled: {type(error).__name__}"
            )
            if message.get("callback"):
                self.send(
                    {
                        "type": "agent:error",
                        "body": "The agent could not handle this message",
                        "callback": message["callback"],
                    }
                )

    def _accepted(self) -> None:
        if not self.live:
            self.live, self._refused = True, ""
            self._log.info(f"Connected to {self.url}.")
            self.on_live()

    def _not_accepted(self, reason: str) -> None:
        """The server answered our connect request with an error: nothing was sent yet, so its text is safe to log."""
        if reason != self._refused:
            self._refused = reason
            self._log.error(
                f"The server refuses this agent: {reason}. Check agentId {self._settings.agentId} "
                "and the access policy of the ClientApplication."
            )
        if "token" in reason.lower():
            self._fhir.reject_token()
        self.reconnect("the server refused the connect request", quiet=True)

    # --- the connection's life ---

    async def run(self) -> None:
        """Connect, serve, and connect again, until cancelled."""
        failures, said = 0, ""
        while True:
            started = self._loop.time()
            reason = await self._session()
            if self._stopping:
                return
            stable = self._loop.time() - started > STABLE_SECS and not self._refused
            failures = 1 if stable else failures + 1
            if reason != said:
                self._log.error(f"No connection to {self.url}: {reason}. Messages are kept on disk; trying again.")
            said = "" if stable else reason
            await asyncio.sleep(
                random.uniform(0, min(RECONNECT_MAX_SECS, RECONNECT_BASE_SECS * 2 ** min(failures, 10)))
            )

    async def _session(self) -> str:
        """One connection from start to end; returns why it ended."""
        try:
            token = await self._fhir.fresh_token()
            sock = await connect(
                self.url, create_connection=typing.cast(Any, functools.partial(_Socket, uplink=self)),
                proxy=proxy_for(self._settings.baseUrl), ssl=self._context, **self._proxy_tls(),
                compression="deflate" if self._settings.compression else None, ping_interval=None,
                open_timeout=CONNECT_TIMEOUT_SECS, close_timeout=1, max_size=UPLINK_FRAME_BYTES,
                write_limit=UPLINK_BUFFER_BYTES, user_agent_header=f"medplum-agent/{VERSION}",
            )  # fmt: skip
        except (ServerError, OSError, EOFError, WebSocketException) as error:
            return str(error) or type(error).__name__
        except Exception as error:  # whatever a proxy or server makes of the handshake: the uplink tries again
            return f"the connection failed with {type(error).__name__}"
        assert isinstance(sock, _Socket)
        self._socket = sock
        self._outgoing.clear()
        self.largest = self.largest_id = self.outstanding = 0
        self._write({"type": "agent:connect:request", "accessToken": token, "agentId": self._settings.agentId})
        sock.begin()
        beating = asyncio.create_task(self._heartbeats(sock))
        try:
            await sock.wait_closed()
        finally:
            beating.cancel()
            self._ended(sock)
        return self._close_reason(sock)

    def _proxy_tls(self) -> Json:
        proxy = proxy_for(self._settings.baseUrl) or ""
        return {"proxy_ssl": tls_context(self._settings.caFile)} if proxy.startswith("https") else {}

    def _ended(self, sock: _Socket) -> None:
        self._socket = None
        was_live, self.live = self.live, False
        sock.transport.abort()
        if was_live:
            self.on_lost(sock.protocol.close_code or 1006)

    @staticmethod
    def _close_reason(sock: _Socket) -> str:
        if sock.protocol.close_code == 1009:
            return "the server closed it because a message was larger than it accepts (1009)"
        return f"the connection was closed ({sock.protocol.close_code or 1006})"

    async def _heartbeats(self, sock: _Socket) -> None:
        silent = 0
        while True:
            await asyncio.sleep(self._settings.heartbeatSecs)
            silent = 0 if self.live else silent + 1
            if self.outstanding > 1 or silent > 2:
                self.reconnect(
                    "the server is silent" if self.live else "the server does not answer the connect request"
                )
                return
            if self.live:
                self.outstanding += 1
                self._heartbeat_at = time.monotonic()
                self._write({"type": "agent:heartbeat:request"})

    def reconnect(self, reason: str, *, quiet: bool = False) -> None:
        """Drop the connection; `run` makes a new one."""
        if not quiet:
            self._log.warn(f"Reconnecting: {reason}.")
        if self._socket is not None:
            self._socket.transport.abort()

    async def goodbye(self) -> None:
        """Close the WebSocket properly (RFC 6455 7.1.2), waiting a second for the server's close frame."""
        self._stopping = True
        if (sock := self._socket) is not None:
            self._flush()
            with contextlib.suppress(Exception):
                await sock.close(1001, "agent is stopping")


# =====================================================================================================================
# Delivery
#
# From the store to the server and back, the same for every protocol. `Order` decides what may be in flight, `judge`
# what an answer means; `Queue` keeps a window of the queued messages, sends, waits, retries and settles; `Feed` is the
# queue of one channel, and `Dispatcher` finds the message that an answer belongs to. Order: messages with equal keys
# one after the other, others in parallel; a barrier waits for all before it and holds all behind it.
# =====================================================================================================================


class Keyed(typing.Protocol):
    """What `Order` orders: BARRIER as key means a barrier."""

    key: str | None


K = TypeVar("K", bound=Keyed)


class Order(typing.Generic[K]):
    """Which items may start. Items are added in order, taken when ready, and settled when done."""

    def __init__(self) -> None:
        self.ready: collections.deque[K] = collections.deque()
        self._lines: dict[str, collections.deque[K]] = {}  # unsettled items by key, the first may start
        self._held: collections.deque[K] = collections.deque()  # a barrier and all behind it
        self._open = 0  # unsettled items that are not held
        self._barrier = False  # the one open item is a barrier

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
            line.popleft()
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
            self._lines[item.key] = collections.deque((item,))
            self.ready.append(item)


class Fence:
    """A barrier without a message: separates messages whose keys were made by different rules."""

    key = BARRIER


class Judgment(NamedTuple):
    """What an answer means: `error` is empty when the server accepted it; `hl7` tells that the body can be relayed."""

    error: str
    hl7: bool


# Channel contract 5.5: which errors are tried again, by retry mode. `original` and `enhanced` are the modes of a
# channel without retryMode. In original mode the device still owns its message: a refusal goes back to it at once.
_RETRIED: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "normal": frozenset({"server-error", "server-rate-limited"}),
}
_RETRIED["original"] = _RETRIED["normal"] | {"response-timeout", "interrupted", "connection-lost"}
_RETRIED["enhanced"] = _RETRIED["original"] | {"server-rejected"}
_RETRIED["upload"] = _RETRIED["enhanced"] | {"file-unreadable"}  # of a file, which comes before the message
_RETRIED["guaranteed"] = _RETRIED["enhanced"] | {"upstream-error"}
_RETRIED["device"] = frozenset({"device-unreachable", "device-silent", "device-error"})
_UPSTREAM = {"AE": "upstream-error", "CE": "upstream-error", "AR": "upstream-rejected", "CR": "upstream-rejected"}
_REJECTED = frozenset(
    {"server-rejected", "upstream-rejected", "too-large", "file-too-large", "device-rejected"}
)  # final state `rejected`, else `failed`


def judge(mode: str, status: int, body: object) -> Judgment:
    """Classify a response by status code and, in guaranteed mode, by the MSA-1 of its body (channel contract 5.5)."""
    ack = read_ack(body) if mode == "guaranteed" else None
    is_hl7 = isinstance(body, str) and body.lstrip("\r\n").startswith("MSH")
    if ack is not None:
        return Judgment(_UPSTREAM.get(ack.code, ""), is_hl7)
    if status == 429:
        return Judgment("server-rate-limited", is_hl7)
    if status >= 500:
        return Judgment("server-error", is_hl7)
    return Judgment("server-rejected" if status >= 400 else "", is_hl7)


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
    "file-too-large": "its file is larger than the server takes (status 413); raise the limit there and send it again",
    "file-unreadable": "its file in the spool folder beside the queue cannot be read",
    "file-lost": "its file is missing in the spool folder beside the queue",
    "too-large": "it is larger than the server accepts (WebSocket close code 1009); raise maxJsonSize on the server",
}


DICOM_STORED = ("C-STORE", COMMITMENT, "N-CREATE", "N-SET")  # types of messages from DICOM devices
_CONTENT_TYPES = {kind: kind for kind in (ASTM_TYPE, BYTES_TYPE)} | dict.fromkeys(DICOM_STORED, JSON_TYPE)


def spool_reference(name: str) -> str:
    """How a message names its file before that is a Binary: a FHIR reference to something that has no place yet."""
    return f"urn:uuid:{name}"


def referenced_objects(request: Json) -> list[tuple[str, str]]:
    """(SOP Instance UID, SOP Class UID) of the Referenced SOP Sequence of a storage commitment request."""
    found = []
    for item in request.get("dataset", {}).get("00081199", {}).get("Value", []):
        uids = [(item.get(tag, {}).get("Value") or [""])[0] for tag in ("00081155", "00081150")]
        found.append((uids[0], uids[1]))
    return found


def _upload_error(error: Exception) -> str:
    """Why a file could not be uploaded, as a key of _REASONS."""
    if isinstance(error, OSError):
        return "file-lost" if isinstance(error, FileNotFoundError) else "file-unreadable"
    status = error.status if isinstance(error, ServerError) else 0
    named = {0: "connection-lost", 413: "file-too-large", 429: "server-rate-limited"}
    return named.get(status) or ("server-error" if status >= 500 else "server-rejected")


class Outlet(typing.Protocol):
    """The channel as its feed sees it: where answers go. Both return whether the device got something."""

    def deliver(self, message: Message, text: str) -> bool: ...

    def refuse(self, message: Message, error_code: str) -> bool: ...

    def silent_bot(self, message: Message) -> bool: ...

    def relays(self, body: object) -> bool: ...


class Queue:
    """Stored messages of one channel or one device on their way: window, order, retries, dead letters."""

    def __init__(self, policy: Policy, row: ChannelRow, store: Store, log: Log):
        self.policy, self.row = policy, row
        self.paused = False
        self.window: dict[int, Message] = {}  # unsettled messages in memory
        self.inflight: dict[int, Message] = {}  # among them: sent, or about to be, in the order of sending
        self.depth = row.queued  # all unsettled messages of the channel
        self.round_trips: collections.deque[int] = collections.deque(maxlen=MAX_STATS_SAMPLES)
        self._store, self._log = store, log
        self._order: Order[Message | Fence] = Order()
        self._epoch = -1
        self._loaded = 0  # highest id that entered the window
        self._newest = row.last_id  # highest id on disk
        self._bytes = 0  # of bodies in the window
        self._busy = False  # a read from disk is under way
        self._bodiless: list[Message] = []
        self._parked: dict[int, asyncio.TimerHandle] = {}  # waiting for their next try
        self._inflight_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._complained = -math.inf
        self._loop = asyncio.get_running_loop()

    # --- what the way to the server and the way to a device do differently ---

    def can_send(self) -> bool:
        raise NotImplementedError

    def still_open(self) -> bool:
        """The way is open for a message that is in flight already."""
        return self.can_send()

    def transmit(self, message: Message) -> None:
        """Send the message; its answer ends in `settle` or `failed`."""
        raise NotImplementedError

    def tell_dead(self, message: Message, error: str, relay: bool) -> bool:
        """The message is a dead letter; whether its sender was told."""
        raise NotImplementedError

    def text_of(self, message: Message, original: bytes, finalized: str | None) -> str:
        """What is sent, from the row."""
        return finalized if finalized is not None else decode_hl7(original, message.encoding)

    # --- new messages ---

    def stored(self, message: Message) -> None:
        """A new message is on disk."""
        behind = self._loaded < self._newest
        self.depth += 1
        self._newest = max(self._newest, message.id)
        if message.id <= self._loaded:
            return  # a refill has read it already
        if behind or len(self.window) >= WINDOW_MESSAGES:
            message.text = None
        else:
            self._loaded = message.id
            self._enter(message)
            self.pump()

    def again(self, message: Message) -> None:
        """The device sent a message again that had ended in an error: a fresh try."""
        before, message.state = message.state, QUEUED
        message.outcome, message.response, message.status_code = PENDING, None, None
        message.error_code = message.error = None
        message.failures = message.next_attempt_at = message.first_failed_at = message.settled_at = 0
        self._store.update(message, before)
        self.depth += 1
        self._enter(message)
        self.pump()

    # --- the window ---

    def _enter(self, message: Message) -> None:
        if message.epoch != self._epoch:
            if self._epoch >= 0:
                self._order.add(Fence())
            self._epoch = message.epoch
        self.window[message.id] = message
        self._hold_body(message)
        self._order.add(message)

    def _hold_body(self, message: Message) -> None:
        """Keep the text in memory if there is room; else it stays on disk until its turn."""
        if message.text is not None and self._bytes + len(message.text) > WINDOW_BYTES:
            message.text = None
        if message.text is not None:
            self._bytes += len(message.text)

    def _drop_body(self, message: Message) -> None:
        if message.text is not None:
            self._bytes -= len(message.text)
            message.text = None

    def _refill(self) -> None:
        if not self._busy and self._loaded < self._newest and len(self.window) <= WINDOW_MESSAGES - REFILL_MESSAGES:
            self._busy = True
            asyncio.ensure_future(self._read_window()).add_done_callback(self._read_done)

    async def _read_window(self) -> None:
        newest = self._newest
        rows = await self._store.queued(self.row.id, self._loaded, REFILL_MESSAGES)
        for message, original, finalized in rows:
            self._loaded = message.id
            if message.id not in self.window:
                message.text = None if original is None else self.text_of(message, original, finalized)
                self._enter(message)
        if len(rows) < REFILL_MESSAGES:
            self._loaded = max(self._loaded, newest)

    def _read_done(self, task: asyncio.Future[None]) -> None:
        """Go on after a read; one that failed (a damaged disk) is tried again in a while."""
        self._busy = False
        if task.cancelled():
            return
        if task.exception() is None:
            self.pump()
        else:
            self._log.error(f"{self.policy.name}: the queue cannot be read: {task.exception()}")
            self._loop.call_later(STORE_REOPEN_SECS, self.pump)

    # --- sending ---

    def pump(self) -> None:
        """Send whatever may be sent now."""
        ready = self._order.ready
        while ready and not self.paused and self._has_room() and self.can_send():
            item = ready.popleft()
            if isinstance(item, Fence):
                self._order.settle(item)
            elif item.state >= PROCESSED:  # answered late, before its next turn
                self._release(item)
            elif item.next_attempt_at > now_ms():
                self._park(item)
            else:
                self.inflight[item.id] = item
                self._inflight_bytes += item.size
                self._send(item)
        self._fetch_bodies()
        self._refill()

    def _has_room(self) -> bool:
        return len(self.inflight) < self.policy.workers and self._inflight_bytes < INFLIGHT_BYTES

    def _leave(self, message: Message) -> bool:
        """The message is no longer in flight; False when it was not."""
        if self.inflight.pop(message.id, None) is None:
            return False
        message.deadline = math.inf
        self._inflight_bytes -= message.size
        return True

    def _park(self, message: Message) -> None:
        """Wait for the next try without a worker; a large backlog of retries keeps its bodies on disk."""
        if self._bytes > WINDOW_BYTES:
            self._drop_body(message)
        delay = min(max(0, message.next_attempt_at - now_ms()), self.policy.max_delay_ms) / 1000  # clocks jump
        self._parked[message.id] = self._loop.call_later(delay, self._unpark, message)

    def _unpark(self, message: Message) -> None:
        del self._parked[message.id]
        message.next_attempt_at = 0
        self._order.ready.appendleft(message)
        self.pump()

    def _fetch_bodies(self) -> None:
        if self._bodiless and not self._busy:
            self._busy = True
            wanted, self._bodiless = self._bodiless, []
            asyncio.ensure_future(self._read_bodies(wanted)).add_done_callback(self._read_done)

    async def _read_bodies(self, messages: list[Message]) -> None:
        try:
            found = await self._store.bodies([message.id for message in messages])
            for message in messages:
                if message.id in found:
                    message.text = self.text_of(message, *found[message.id])
                    self._bytes += len(message.text)
        finally:
            self._unsend(messages)

    def _unsend(self, messages: Iterable[Message]) -> None:
        for message in sorted(messages, key=lambda message: message.id, reverse=True):
            if self._leave(message):
                self._order.ready.appendleft(message)

    def prepare(self, message: Message) -> None:
        """Do what a message needs that is not prepared, and then `_send` it."""
        raise NotImplementedError

    def _send(self, message: Message) -> None:
        if message.text is None:
            self._bodiless.append(message)
        elif not message.prepared:
            self.prepare(message)
        elif self.policy.mode in ("none", "normal"):
            before, message.state = message.state, SENT
            self._store.update(message, before, then=functools.partial(self._start, message))
        else:
            self._start(message)

    def _start(self, message: Message) -> None:
        if not self.still_open():
            if message.state == SENT:
                message.state = QUEUED
                self._store.update(message, SENT)
            self._unsend([message])
            return
        message.attempts += 1
        message.sent_at = now_ms()
        message.deadline = self._loop.time() + self.policy.timeout_secs
        if self._timer is None:
            self._timer = self._loop.call_at(message.deadline, self._expire)
        self.transmit(message)

    def _expire(self) -> None:
        """Time-outs. A message whose file is being uploaded has none until it is sent."""
        self._timer = None
        now = self._loop.time()
        for message in [message for message in self.inflight.values() if message.deadline <= now]:
            self.failed(message, "response-timeout")
        if self.inflight and self._timer is None:
            first = min(message.deadline for message in self.inflight.values())
            self._timer = self._loop.call_at(min(first, now + 1), self._expire)

    # --- answers ---

    def failed(
        self, message: Message, error: str, status: int = 0, *,
        relay: bool = False, counts: bool = True, mode: str = "",
    ) -> None:  # fmt: skip
        """A try ended in an error: again later, or a dead letter.

        `relay`: the peer gave an answer that can be passed on. `counts`: the peer was there, so the try counts.
        `mode`: which errors are tried again, if not as the policy says.
        """
        message.failures += counts
        message.first_failed_at = message.first_failed_at or now_ms()
        if error not in _RETRIED[mode or self.policy.mode] or self._spent(message):
            self.bury(message, error, status, relay=relay)
            return
        tries = message.failures if counts else message.attempts
        message.next_attempt_at = now_ms() + self.policy.delay_ms(tries)
        message.error_code, message.error = error, _REASONS[error].format(status=status)
        before, message.state = message.state, QUEUED
        self._store.update(message, before)
        self._leave(message)
        self._complain(f"message {message.id}, try {message.attempts} failed: {message.error}")
        self._park(message)
        self.pump()

    def _spent(self, message: Message) -> bool:
        return self.policy.spent(message.failures, message.first_failed_at, message.attempts)

    def _complain(self, text: str) -> None:
        """A feed that fails does so thousands of times: one line in a while says it."""
        if self._loop.time() - self._complained > COMPLAIN_SECS:
            self._complained = self._loop.time()
            self._log.warn(f"{self.policy.name}: {text}.")

    def bury(self, message: Message, error: str, status: int = 0, *, relay: bool = False) -> None:
        """End in a dead letter, and tell a sender that still waits."""
        message.error_code, message.error = error, _REASONS[error].format(status=status)
        message.outcome = DELIVERED if self.tell_dead(message, error, relay) else NOT_OWED
        tries = f"after {message.failures} failed tries"
        self._log.error(f"{self.policy.name}: message {message.id} is a dead letter {tries}: {message.error}.")
        self.settle(message, REJECTED if error in _REJECTED else FAILED)

    def settle(self, message: Message, state: int) -> None:
        """The message has reached its final state."""
        before, message.state = message.state, state
        message.settled_at = now_ms()
        self._store.update(message, before)
        if message.id not in self.window:  # a late answer to a message that is not in memory
            self.depth -= before < PROCESSED
            return
        timer = self._parked.pop(message.id, None)
        if timer is not None:
            timer.cancel()
        if self._leave(message) or timer is not None:
            self._release(message)
            self.pump()

    def _release(self, message: Message) -> None:
        del self.window[message.id]
        self.depth -= 1
        self._drop_body(message)
        self._order.settle(message)

    def round_trip_stats(self) -> Json:
        """Channel contract 12; -1 where there is no sample."""
        return percentiles(self.round_trips) | {"pendingCount": len(self.inflight)}


class Feed(Queue):
    """One channel's way to the server. `outlet` may change with a reload."""

    def __init__(
        self, plan: ChannelPlan, row: ChannelRow, store: Store, uplink: Uplink, fhir: Fhir, prefix: str, log: Log
    ):
        super().__init__(plan.policy, row, store, log)
        self.plan = plan
        self.outlet: Outlet | None = None
        self.may_send: Callable[[], bool] = lambda: True
        self._uplink, self._fhir = uplink, fhir
        self._prefix = prefix
        self._preparing: dict[int, asyncio.Future[None]] = {}  # messages that need more than to be sent
        self._ahead: collections.deque[Message] = collections.deque()  # with files to upload before it is their turn
        self._ahead_at = 0.0  # after an upload failed, the next is tried ahead of its turn then

    def replan(self, plan: ChannelPlan, row: ChannelRow) -> None:
        """New settings without losing what is under way; scheduled retries keep their time."""
        self.plan, self.policy, self.row = plan, plan.policy, row
        self.pump()

    def can_send(self) -> bool:
        return self.may_send() and self._uplink.ready()

    def still_open(self) -> bool:
        return self._uplink.ready()

    def transmit(self, message: Message) -> None:
        callback = f"{self._prefix}{message.id:012x}#{message.attempts}"
        kind = _CONTENT_TYPES.get(message.type, HL7_TYPE)
        size = self._uplink.transmit(self.plan.name, message.remote, kind, message.text or "", callback)
        if size == self._uplink.largest:
            self._uplink.largest_id = message.id

    def prepare(self, message: Message) -> None:
        """Upload its file, or look whether what it is about has arrived; its own time-out begins when it is sent."""
        if message.id not in self._preparing:
            work = self._upload(message) if message.spool else self._after_objects(message)
            self._preparing[message.id] = task = asyncio.ensure_future(work)
            task.add_done_callback(functools.partial(self._prepared, message))

    def _prepared(self, message: Message, task: asyncio.Future[None]) -> None:
        del self._preparing[message.id]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error(f"Internal error: {type(error).__name__} before sending message {message.id}")
            if message.id in self.inflight:
                self.failed(message, "server-error", mode="upload")
        elif message.id in self.inflight and message.deadline == math.inf and message.state < PROCESSED:
            self._send(message)
        self._loop.call_soon(self.pump)

    async def _upload(self, message: Message) -> None:
        """The message's file becomes a Binary; from then on, also after a restart, the message names that."""
        assert message.spool
        path, name = self._store.spool.path(message.spool), spool_reference(message.spool)
        token = False
        try:
            token = bool(await self._fhir.fresh_token())
            reference = await self._fhir.upload(path, "dicom.dcm", DICOM_TYPE)
            await self._store.finalize(message, name, reference)
        except (ServerError, StorageError, OSError) as error:
            status = error.status if token and isinstance(error, ServerError) else 0
            reason = _upload_error(error) if token else "connection-lost"  # a login that fails is nobody's message
            self._ahead_at = self._loop.time() + COMPLAIN_SECS
            if message.id in self.inflight:
                self.failed(message, reason, status, counts=status > 0, mode="upload")
            return
        message.prepared, message.binary = True, reference
        if message.text is not None:
            self._bytes -= len(message.text)
            message.text = message.text.replace(name, reference)
            self._bytes += len(message.text)

    def _enter(self, message: Message) -> None:
        super()._enter(message)
        if message.spool and not message.prepared:
            self._ahead.append(message)

    def pump(self) -> None:
        super().pump()
        while self._ahead and len(self._preparing) < TRANSFERS and self._loop.time() >= self._ahead_at:
            if not self.can_send() or self.paused:
                break
            message = self._ahead.popleft()  # order matters for what the Bot hears, not for its files
            if message.state < PROCESSED and not message.prepared:
                self.prepare(message)

    async def _after_objects(self, message: Message) -> None:
        """A storage commitment is asked for when none of its objects waits here any more (PS3.4 J.3.2).

        Meanwhile it gives its place to others: these may be the ones that it waits for.
        """
        sql = f"""SELECT 1 FROM message WHERE channel = ? AND state < {PROCESSED} AND id < ? AND type = 'C-STORE'
          AND control_id IN (SELECT value FROM json_each(?)) LIMIT 1"""
        objects = [uid for uid, _ in referenced_objects(load_json(message.text or "{}"))]
        values = self.row.id, message.id, json.dumps(objects)
        found = True
        with contextlib.suppress(sqlite3.Error):
            found = await self._store.read(lambda db: db.execute(sql, values).fetchone()) is not None
        message.prepared = not found
        if found and self._leave(message):
            message.next_attempt_at = now_ms() + COMMITMENT_POLL_MS
            self._park(message)

    def settle(self, message: Message, state: int) -> None:
        super().settle(message, state)
        if message.spool and state == PROCESSED:  # in a thread: a disk may take its time over a large file
            self._loop.run_in_executor(None, self._store.spool.remove, message.spool)

    def tell_dead(self, message: Message, error: str, relay: bool) -> bool:
        if self.outlet is None:
            return False
        return self.outlet.deliver(message, message.response or "") if relay else self.outlet.refuse(message, error)

    def text_of(self, message: Message, original: bytes, finalized: str | None) -> str:
        if message.type == ASTM_TYPE or message.type in DICOM_STORED:  # what it was, whatever the channel speaks by now
            text = original.decode() if finalized is None else finalized
            return (
                text.replace(spool_reference(message.spool), message.binary)
                if message.spool and message.binary
                else text
            )
        if message.type == BYTES_TYPE:
            settings = self.plan.settings
            return stream_body(original, settings if isinstance(settings, StreamSettings) else StreamSettings())
        return super().text_of(message, original, finalized)

    def lost(self) -> None:
        """The connection ended: answers can no longer come. Whatever may be sent twice goes back to be sent again."""
        if self.policy.mode in ("none", "normal"):
            return
        self._bodiless.clear()
        sent = [message for id_, message in self.inflight.items() if id_ not in self._preparing]
        for message in sent:
            message.first_failed_at = message.first_failed_at or now_ms()
            if self.policy.spent(0, message.first_failed_at, message.attempts):
                self.bury(message, "connection-lost")
        self._unsend(sent)

    def answered(self, message: Message, attempt: int, status: int, body: object) -> None:
        """A response from the server; also late, for an earlier attempt, or for a dead letter."""
        judgment = judge(self.policy.mode, status, body)
        if message.state >= PROCESSED and not (message.state == FAILED and not judgment.error):
            return
        if judgment.error and attempt != message.attempts:
            return  # an old failure says nothing about the attempt that runs now
        message.response = body if isinstance(body, str) else dump_json(body).decode()
        message.status_code = status
        if judgment.error:
            if message.id in self.inflight:
                self.failed(message, judgment.error, status, relay=judgment.hl7)
            return
        self.round_trips.append(now_ms() - message.received_at)
        if self.outlet is None:
            delivered = False
        elif self.outlet.relays(body):
            delivered = self.outlet.deliver(message, message.response)
        else:
            delivered = self.outlet.silent_bot(message)
        message.outcome = DELIVERED if delivered else UNDELIVERED
        self.settle(message, PROCESSED)


def percentiles(samples: Iterable[int]) -> dict[str, float]:
    """count, min, max, average and percentiles of round trips in ms: element ceil(p/100 * n) - 1 of the sorted list."""
    ordered = sorted(samples)
    if not ordered:
        return {"count": 0, "min": -1, "max": -1, "average": -1, "p50": -1, "p95": -1, "p99": -1}
    at = {f"p{p}": ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in (50, 95, 99)}
    return {"count": len(ordered), "min": ordered[0], "max": ordered[-1], "average": sum(ordered) / len(ordered), **at}


class Dispatcher:
    """All feeds, and the way from an answer back to its message."""

    def __init__(self, agent_id: str, store: Store, uplink: Uplink, fhir: Fhir, log: Log):
        self.feeds: dict[str, Feed] = {}
        self._store, self._uplink, self._fhir, self._log = store, uplink, fhir, log
        self._asked: dict[str, asyncio.Future[Json]] = {}  # questions that are not stored, by callback
        self._agent_id = agent_id
        self._late_answers: set[asyncio.Future[None]] = set()
        self._losses = 0  # connections in a row that were lost with messages in flight and none answered
        self._answered = False  # this connection has brought an answer
        uplink.on_live = uplink.on_writable = self.pump
        uplink.on_lost = self._lost

    @functools.cached_property
    def callback_prefix(self) -> str:
        """`Agent/<id>-` and a UUID without its last 12 digits, which are the row's number: stable across restarts."""
        seed = self._store.seed
        return f"Agent/{self._agent_id}-{seed[:8]}-{seed[8:12]}-4{seed[12:15]}-a{seed[15:18]}-"

    async def feed(self, plan: ChannelPlan) -> Feed:
        """The feed of a channel, made or brought up to date."""
        row = await self._store.channel(plan.name, plan.key_spec)
        feed = self.feeds.get(plan.name)
        if feed is None:
            await self._recover(plan, row)
            peers = self._store, self._uplink, self._fhir
            feed = self.feeds[plan.name] = Feed(plan, row, *peers, self.callback_prefix, self._log)
        feed.may_send = self.may_send
        feed.replan(plan, row)
        return feed

    async def _recover(self, plan: ChannelPlan, row: ChannelRow) -> None:
        """Rows that were sent when the agent stopped: only where a repetition is allowed they are sent again."""
        if "interrupted" in _RETRIED[plan.policy.mode]:
            change = f"state = {QUEUED}"
        else:
            reason = _REASONS["interrupted"]
            change = f"state = {FAILED}, outcome = {NOT_OWED}, error_code = 'interrupted', last_error = '{reason}'"

        def run(db: sqlite3.Connection) -> int:
            count = db.execute(f"UPDATE message SET {change} WHERE channel = ? AND state = {SENT}", (row.id,)).rowcount
            self._store.tally[SENT] -= count
            self._store.tally[QUEUED if "interrupted" in _RETRIED[plan.policy.mode] else FAILED] += count
            db.executemany("INSERT OR REPLACE INTO tally VALUES (?, ?)", self._store.tally.items())
            return count

        if count := await self._store.call(run):
            self._log.warn(f"Channel '{plan.name}': {count} messages were with the server when the agent stopped.")

    async def ask(self, channel: str, remote: str, body: str, seconds: float) -> Json:
        """A device's question to the Bot that only an answer now is good for, so it is not stored.

        Returns the agent:transmit:response; raises TimeoutError, and ServerError without a connection.
        """
        if not self._uplink.ready():
            raise ServerError("the server is not connected")
        callback = f"Agent/{self._agent_id}-{uuid.uuid4()}"
        answer: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._asked[callback] = answer
        try:
            async with asyncio.timeout(seconds):
                self._uplink.transmit(channel, remote, JSON_TYPE, body, callback)
                return await answer
        finally:
            del self._asked[callback]

    @property
    def live(self) -> bool:
        return self._uplink.live

    def pump(self) -> None:
        for feed in self.feeds.values():
            feed.pump()

    def _lost(self, close_code: int) -> None:
        sent = [
            (f, message) for f in self.feeds.values() for message in f.inflight.values() if message.deadline < math.inf
        ]
        if close_code == 1009:
            self._bury_largest(sent)
        for feed, message in sent:
            message.losses += self._answered
            alone = len(sent) == 1 and self._losses >= SUSPECT_LOSSES
            if close_code != 1009 and (alone or message.losses >= SUSPECT_LOSSES):
                feed.failed(message, "connection-lost")
        self._losses += bool(sent)
        self._answered = False
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(ServerError("the connection to the server was lost"))
        for feed in self.feeds.values():
            feed.lost()

    def _bury_largest(self, sent: Sequence[tuple[Feed, Message]]) -> None:
        """Close code 1009 (message too big) does not say which: it is the largest frame of the connection."""
        for feed, message in sent:
            if message.id == self._uplink.largest_id:
                feed.bury(message, "too-large", 1009)

    def may_send(self) -> bool:
        """After several losses of the connection one of the messages may be their cause: then one at a time is sent."""
        return self._losses < SUSPECT_LOSSES or not any(feed.inflight for feed in self.feeds.values())

    def response(self, answer: Json) -> None:
        """One agent:transmit:response (uplink contract 4.6)."""
        self._answered = True
        if self._losses:
            self._losses = 0
            asyncio.get_running_loop().call_soon(self.pump)
        status = answer.get("statusCode")
        code = status if isinstance(status, int) and status else 200
        body = answer.get("body")
        callback = answer.get("callback")
        if not callback:
            self._without_callback(answer, code, body)
            return
        if asked := self._asked.get(str(callback)):
            if not asked.done():
                asked.set_result(answer)
            return
        message_id, attempt = self._parse_callback(str(callback))
        if message_id is None:
            self._log.warn("An answer with an unknown callback was ignored.")
            return
        for feed in self.feeds.values():
            if message := feed.window.get(message_id):
                feed.answered(message, attempt or message.attempts, code, body)
                return
        task = asyncio.ensure_future(self._late(message_id, attempt, code, body))
        self._late_answers.add(task)
        task.add_done_callback(self._late_answers.discard)

    def _parse_callback(self, callback: str) -> tuple[int | None, int]:
        stem, _, attempt = callback.partition("#")
        prefix = self.callback_prefix
        if not stem.startswith(prefix) or not re.fullmatch(r"[0-9a-f]{12}", stem[len(prefix) :]):
            return None, 0
        return int(stem[len(prefix) :], 16), int(attempt) if attempt.isdecimal() else 0

    async def _late(self, message_id: int, attempt: int, status: int, body: object) -> None:
        """An answer to a message that is not in memory: a dead letter, or one sent before a restart."""
        message = await self._store.message(message_id)
        feed = next((feed for feed in self.feeds.values() if message and feed.row.id == message.channel), None)
        if message is not None and feed is not None and message_id not in feed.window:
            feed.answered(message, attempt or message.attempts, status, body)

    def _without_callback(self, answer: Json, status: int, body: object) -> None:
        """Old servers leave it out: match MSA-2 with a message in flight, else pass it to the device named."""
        feed = self.feeds.get(str(answer.get("channel")))
        if feed is None:
            return
        self._log.warn(f"Channel '{feed.plan.name}': an answer came without callback.")
        ack = read_ack(body)
        if ack:
            matches = [m for m in feed.inflight.values() if m.control_id == ack.control_id]
        else:
            matches = [m for m in feed.inflight.values() if m.remote == answer.get("remote")]
        if matches:
            feed.answered(matches[0], matches[0].attempts, status, body)
        elif ack and feed.outlet is not None and status < 400:
            stray = Message(feed.row.id, str(answer.get("remote")), b"", "utf-8")
            stray.control_id = ack.control_id
            feed.outlet.deliver(stray, str(body))


# =====================================================================================================================
# Channels
#
# Where devices connect. A channel takes messages from its protocol core, hands them to the store, acknowledges when
# the store says durable, and writes back what comes down. A listener owns a bound port and may change its channel, so
# that a reload can swap ports without ever unbinding them. May touch: sockets.
# =====================================================================================================================


@dataclasses.dataclass(eq=False)
class Exchange:
    """One message on its way to a device and back. `mode`: `first` ACK, or `application` to pass over a CA."""

    control_id: str
    mode: str
    answer: asyncio.Future[str]

    def heard(self, ack: Acknowledgment, text: str) -> None:
        if not self.answer.done() and not (self.mode == "application" and ack.code == "CA"):
            self.answer.set_result(text)


class Precedence:
    """Messages before images: one interpreter runs one thread at a time, and an image takes long anyway."""

    until = 0.0  # on the event loop's clock

    def give_way(self) -> None:
        """Called by threads of associations wherever they have worked for a while."""
        now = time.monotonic()
        limit = min(self.until, now + GIVE_WAY_MAX_SECS)
        while now < limit:
            time.sleep(limit - now)
            now = time.monotonic()


PRECEDENCE = Precedence()


class Connection(asyncio.Protocol):
    """One device connected to a channel. All that is written in one turn of the event loop leaves in one write."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.remote = ""
        self.host = ""
        self.pending = 0  # messages on their way to the disk
        self.awaiting = 0  # stored messages whose answer is still to come
        self.messages = 0
        self._loop = channel.loop
        self.active_at = self._loop.time()
        self._outbox: list[bytes] = []
        self._paused: set[str] = set()
        self._closing = False
        self.lost = asyncio.Event()
        self.ended = False  # the device sends nothing more
        self._transport: asyncio.Transport

    # --- what each protocol does in its own way ---

    def take(self, received: bytes) -> None:
        """Bytes from the device."""
        raise NotImplementedError

    @property
    def inside(self) -> bool:
        """In the middle of a message: the device owes us bytes."""
        raise NotImplementedError

    @property
    def holding(self) -> bool:
        """Messages are held back, read but not yet stored."""
        return False

    def forget(self) -> None:
        """Drop what is held back: the connection is closing and the device was not told anything."""

    # --- asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = typing.cast(asyncio.Transport, transport)
        if hasattr(transport, "max_size"):
            transport.max_size = READ_BYTES
        if (sock := transport.get_extra_info("socket")) is not None:
            set_device_options(sock)
        if peer := transport.get_extra_info("peername"):
            self.host, self.remote = peer[0], f"{peer[0]}:{peer[1]}"
        else:  # a serial port
            self.host = self.remote = self.channel.plan.host
        self.channel.opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = True
        self.lost.set()
        self.channel.closed(self)

    def data_received(self, data: bytes) -> None:
        self.active_at = self._loop.time()
        PRECEDENCE.until = self.active_at + GIVE_WAY_SECS
        self.take(data)
        if self.channel.store.congested:
            self.pause("store")
            self.channel.store.on_resume.append(functools.partial(self.resume, "store"))

    def eof_received(self) -> bool:
        """A device may end its side first and still wait for answers (RFC 9293 3.6)."""
        self.ended = True
        return self.pending > 0 or self.awaiting > 0 or self.holding

    def pause_writing(self) -> None:
        self.pause("slow reader")

    def resume_writing(self) -> None:
        self.resume("slow reader")

    # --- flow ---

    def pause(self, reason: str) -> None:
        if not self._paused and not self._closing:
            self._transport.pause_reading()
        self._paused.add(reason)

    def resume(self, reason: str) -> None:
        self._paused.discard(reason)
        if not self._paused and not self._closing:
            self._transport.resume_reading()

    def send(self, content: bytes) -> None:
        """Bytes to the device."""
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(content)

    def _flush(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(b"".join(self._outbox))
        self._outbox.clear()
        self._close_if_done()

    def _close_if_done(self) -> None:
        if (self.ended or self._closing) and not (self.pending or self.holding or self._outbox):
            if self.ended and self.awaiting and not self._closing:
                return
            self._transport.close()

    def answered(self) -> None:
        """The last word on one of this device's messages was said."""
        self.awaiting = max(0, self.awaiting - 1)
        self._loop.call_soon(self._close_if_done)  # after what is being written now

    def stored(self) -> None:
        """A message is on disk or refused."""
        self.pending -= 1
        if self._closing or self.ended:
            self._loop.call_soon(self._close_if_done)

    def close(self) -> None:
        """Read no more; close once everything received is stored and acknowledged."""
        if not self._closing:
            self.pause("closing")
            self._closing = True
            self.forget()
            self._close_if_done()
            self._loop.call_later(GRACEFUL_CLOSE_SECS, self._transport.abort)

    def abort(self) -> None:
        self._transport.abort()

    def check_time(self, now: float, idle: float, inside: float) -> str:
        """Why this connection should be closed for its silence, or ``."""
        silent = now - self.active_at
        if self.ended and silent > ENDED_SECS and not self.pending:
            return "its sender ended it, and the answer takes long: it is kept for a repetition"
        if self._paused or self._closing:
            return ""
        if inside and self.inside and silent > inside:
            return f"it stopped in the middle of a message {silent:.0f} s ago"
        if idle and silent > idle and not self.awaiting:
            return f"it was silent for {silent:.0f} s"
        return ""


class Hl7Connection(Connection):
    """A device that speaks MLLP."""

    channel: Hl7Channel

    def __init__(self, channel: Hl7Channel):
        super().__init__(channel)
        self.core = Mllp(channel.plan.settings.maxMessageBytes)
        self._delayed: collections.deque[bytes | PeerError] = collections.deque()
        self._next_at = 0.0

    def take(self, received: bytes) -> None:
        events = self.core.receive(received)
        if self.channel.settings.messagesPerMin > 0 or self._delayed:
            self._delayed.extend(events)
            self._next_delayed()
        else:
            for event in events:
                self._take(event)

    @property
    def inside(self) -> bool:
        return self.core.inside

    @property
    def holding(self) -> bool:
        return bool(self._delayed)

    def forget(self) -> None:
        self._delayed.clear()

    def _next_delayed(self) -> None:
        """messagesPerMin: hold messages back, and the device with them."""
        rate = self.channel.settings.messagesPerMin  # a reload may have changed it
        while self._delayed and (rate <= 0 or self._loop.time() >= self._next_at):
            if rate > 0:
                self._next_at = max(self._next_at, self._loop.time() - 0.01) + 60 / rate
            self._take(self._delayed.popleft())
        if self._delayed and "rate" not in self._paused:
            self.pause("rate")
            self._loop.call_at(self._next_at, self._rate_elapsed)
        self._close_if_done()

    def _rate_elapsed(self) -> None:
        self.resume("rate")
        if not self._closing:
            self._next_delayed()

    def _take(self, event: bytes | PeerError) -> None:
        self.messages += 1
        if isinstance(event, PeerError):
            self.channel.refuse_frame(self, event)
        else:
            self.channel.receive(self, event)


def set_device_options(sock: socket.socket) -> None:
    """No Nagle (CA followed by AA would wait 40 ms for a delayed TCP ACK); notice devices that vanish."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def handshake_class(tell: Callable[[str], None]) -> type[ssl.SSLObject]:
    """asyncio says nothing of a handshake that fails; who looks after the channel wants to know."""

    class Handshake(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                tell(f"a device could not connect: TLS failed: {getattr(error, 'verify_message', '') or error.reason}")
                raise

    return Handshake


class Channel:
    """One channel: its connections, and the feed that takes its messages to the server."""

    def __init__(self, plan: ChannelPlan, store: Store, log: Log, channel_log: Log):
        self.plan, self.store = plan, store
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.feed: Feed | None = None  # None until the store has a row for the channel
        self.connections: dict[str, Connection] = {}
        self._log, self._channel_log = log, channel_log
        self._warned_at, self._warnings = -math.inf, 0
        self._watcher = self.loop.call_later(1, self._watch)
        self.tls: ssl.SSLContext | None = None
        self.renew_identity()

    # --- what each protocol does in its own way ---

    def connect(self) -> asyncio.Protocol:
        """The protocol of a new connection."""
        raise NotImplementedError

    def incoming(self) -> asyncio.BaseProtocol:
        """The same below TLS where the channel wants that; a reload may change it without binding the port anew."""
        if not self.plan.settings.tls:
            return self.connect()
        if self.tls is None:
            return TurnAway()
        options: Any = {"server_side": True, "ssl_handshake_timeout": self.plan.settings.handshakeTimeoutSecs}
        return SSLProtocol(self.loop, self.connect(), self.tls, typing.cast(Any, None), **options)

    def deliver(self, message: Message, text: str) -> bool:
        """The Bot's answer to the device; False when no device is there to take it."""
        raise NotImplementedError

    def relays(self, body: object) -> bool:
        """Whether a Bot's answer is something for the device."""
        return isinstance(body, str) and body.lstrip("\r\n").startswith("MSH")

    def refuse(self, message: Message, error_code: str) -> bool:
        """The message is a dead letter; whether a waiting device was told."""
        return False

    def silent_bot(self, message: Message) -> bool:
        """The Bot succeeded without an answer; whether nothing is owed to the device any more."""
        return True

    def replan(self, plan: ChannelPlan) -> None:
        """New settings for the connections that stay open."""
        self.plan = plan
        self.renew_identity()

    def renew_identity(self) -> None:
        """Read the certificate files, which may have been renewed: at the start, and at every reload."""
        try:
            tls = listening_tls(dataclasses.asdict(self.plan.settings)) if self.plan.settings.tls else None
            if tls is not None:
                tls.sslobject_class = handshake_class(self._tell)
            self.tls = tls
        except OSError as error:
            self._log.error(f"Channel '{self.plan.name}': its certificate cannot be read: {error}.")

    def _tell(self, text: str) -> None:
        """A warning from any thread."""
        self.loop.call_soon_threadsafe(self._warn, text)

    async def recover(self) -> None:
        """After a start, when the store has a row for the channel: what was begun before."""

    def stop(self) -> None:
        self._watcher.cancel()
        for connection in list(self.connections.values()):
            connection.close()

    # --- connections ---

    def opened(self, connection: Connection) -> None:
        if len(self.connections) >= self.plan.settings.maxConnections:
            for old in [c for c in self.connections.values() if c.ended][:1]:  # its answer waits for a repetition
                self.connections.pop(old.remote)
                old.abort()
        if len(self.connections) >= self.plan.settings.maxConnections:
            self._warn(
                f"{connection.host} was turned away: {len(self.connections)} connections are open (maxConnections)"
            )
            connection.abort()
            return
        self.connections[connection.remote] = connection
        self._log.debug(f"Channel '{self.plan.name}': {connection.remote} connected.")

    def closed(self, connection: Connection) -> None:
        if self.connections.get(connection.remote) is connection:
            del self.connections[connection.remote]
        self._log.debug(f"Channel '{self.plan.name}': {connection.remote} disconnected.")

    def _watch(self) -> None:
        now = self.loop.time()
        settings = self.plan.settings
        for connection in list(self.connections.values()):
            if reason := connection.check_time(now, settings.idleTimeoutSecs, settings.frameTimeoutSecs):
                self._warn(f"{connection.remote} was disconnected: {reason}")
                connection.close()
        self._watcher = self.loop.call_later(1, self._watch)

    def _warn(self, text: str) -> None:
        """A warning in the main log; a device that errs a thousand times fills it with a few lines."""
        now = self.loop.time()
        if now - self._warned_at > COMPLAIN_SECS:
            self._warned_at, self._warnings = now, 0
        self._warnings += 1
        if self._warnings <= MAX_WARNINGS:
            more = (
                "; further warnings of this channel are held back for a while" if self._warnings == MAX_WARNINGS else ""
            )
            self._log.warn(f"Channel '{self.plan.name}': {text}{more}.")

    def _note(self, text: str) -> None:
        self._channel_log.info(f"[{self.plan.protocol}:{self.plan.name}] {text}")

    def _connection_for(self, message: Message) -> Connection | None:
        """The connection the message came from, or the one its sender made since."""
        found = self.connections.get(message.remote)
        if found is not None and not found.ended:
            return found
        host = message.remote.rsplit(":", 1)[0]
        candidates = [c for c in self.connections.values() if c.host == host and not c.ended]
        if len(candidates) == 1 and self.may_adopt(candidates[0]):
            return candidates[0]
        return found  # its sender ended its side only, or is gone: the write will tell

    def device(self, host: str) -> Connection:
        """The connected device at `host`, or the only one for ``; DeviceError when there is none or several."""
        found = [c for c in self.connections.values() if host in ("", c.host, c.host.removeprefix("::ffff:"))]
        if len(found) == 1:
            return found[0]
        which = f"from {host} " if host else ""
        count = f"{len(found)} devices are" if found else "no device is"
        advice = f"; name one as channel://{self.plan.name}/<ip>" if found and not host else ""
        text = f"{count} connected {which}to channel '{self.plan.name}'{advice}"
        raise DeviceError(text, "device-unreachable")

    def may_adopt(self, connection: Connection) -> bool:
        """Whether the only connection from the same address may get the answer to a message of an earlier one."""
        return True


class Hl7Channel(Channel):
    """One HL7 channel: devices in, acknowledgments and answers out (channel contract 4)."""

    def __init__(self, plan: ChannelPlan, store: Store, log: Log, channel_log: Log):
        super().__init__(plan, store, log, channel_log)
        self.pushes: list[tuple[Exchange, Connection]] = []  # sent to a connected device, its ACK is awaited
        self._pushed: collections.deque[str] = collections.deque(maxlen=PUSHED_IDS)  # control ids, the last ones

    def connect(self) -> Connection:
        return Hl7Connection(self)

    @property
    def settings(self) -> Hl7Settings:
        return typing.cast(Hl7Settings, self.plan.settings)

    def replan(self, plan: ChannelPlan) -> None:
        super().replan(plan)
        for connection in self.connections.values():
            typing.cast(Hl7Connection, connection).core.limit = plan.settings.maxMessageBytes

    def closed(self, connection: Connection) -> None:
        super().closed(connection)
        for exchange, device in self.pushes:
            if device is connection and not exchange.answer.done():
                text = f"channel '{self.plan.name}': Message was still pending when connection closed"
                exchange.answer.set_exception(DeviceError(text, "device-silent"))
        skipped = typing.cast(Hl7Connection, connection).core.skipped
        if skipped and not connection.messages:
            self._warn(f"{connection.remote} sent {skipped} bytes and no MLLP frame (0x0B ... 0x1C 0x0D)")

    def may_adopt(self, connection: Connection) -> bool:
        """In original mode only while it has sent nothing: the answer cannot be taken for that of another message.

        A sender that repeats its message has claimed the answer already.
        """
        return bool(self.settings.enhanced) or not connection.messages

    # --- intake ---

    def receive(self, connection: Connection, content: bytes) -> None:
        """One frame: check it, and hand it to the store."""
        plan, feed = self.plan, self.feed
        settings = self.settings
        try:
            text = decode_hl7(content, settings.encoding)
        except PeerError as error:
            self.refuse_frame(connection, error, content)
            return
        header = Header(text)
        self._note(f"[Received -- ID: {header.control_id}]: {text}")
        if (self.pushes or self._pushed) and self._push_answered(text):
            return
        if feed is None:
            self._answer(connection, header, "E", self.store.trouble or "storage error: the channel is starting")
            return
        message = Message(feed.row.id, connection.remote, content, settings.encoding)
        message.epoch = feed.row.epoch
        message.text, message.control_id, message.type = text, header.control_id, header.message_type
        message.key = ordering_key(text, header, plan.key_spec)
        message.checked = bool(header.control_id) and settings.duplicateBehavior != "accept"
        message.assign = settings.assignSeqNo
        message.source = functools.partial(self._stored, connection, header)
        connection.pending += 1
        self.store.put(message)

    def refuse_frame(self, connection: Connection, error: PeerError, content: bytes = b"") -> None:
        """A frame that is not a message: the sender is told, the connection goes on."""
        self._warn(f"{connection.remote}: {error}")
        self._note(f"[Refused]: {error}: {content[:200]!r}")
        self._answer(connection, Header("MSH|^~\\&|"), error.code, str(error))

    def _answer(self, connection: Connection, header: Header, kind: str, text: str = "") -> None:
        """An acknowledgment of ours: `kind` A, E or R becomes CA/CE/CR in enhanced mode, else AA/AE/AR."""
        if header.message_type.startswith("ACK"):
            return  # an acknowledgment is never acknowledged (HL7 v2.5.1 2.9.2)
        code = ("C" if self.settings.enhanced == "true" else "A") + kind
        self._write(
            connection,
            build_ack(
                header, code, text and clean_text(text, header.separator + header.field(2)), closing=self._closing
            ),
        )

    @property
    def _closing(self) -> str:
        return "\r" if self.settings.ackFormat == "standard" else ""

    def _write(self, connection: Connection, text: str) -> None:
        connection.send(mllp_frame(text.encode(self.settings.encoding, "replace")))

    def _stored(self, connection: Connection, header: Header, message: Message) -> None:
        """The store has spoken: on disk, a repetition, or refused."""
        connection.stored()
        assert self.feed is not None
        if message.refusal:
            self._answer(connection, header, "E", message.refusal)
        elif message.earlier:
            self._repeated(connection, header, message, message.earlier)
        else:
            self._commit_accept(connection, header)
            connection.awaiting += self._owes_answer()
            self.feed.stored(message)

    def _commit_accept(self, connection: Connection, header: Header) -> None:
        if self.settings.enhanced:
            self._answer(connection, header, "A")

    def _owes_answer(self) -> bool:
        """Whether the device waits for the Bot's answer."""
        settings = self.settings
        return not settings.enhanced or (settings.enhanced == "true" and settings.appLevelAck != "NE")

    # --- repetitions (channel contract 5.3) ---

    def _repeated(
        self, connection: Connection, header: Header, message: Message, earlier: Earlier, *, fresh: bool = False
    ) -> None:
        """The same control id as before. `fresh`: the earlier row was read after everything was written."""
        assert self.feed is not None
        if not earlier.same or self.settings.duplicateBehavior == "reject":
            self._reject_repetition(connection, header, message, earlier.same)
            return
        row = self.feed.window.get(earlier.message.id, earlier.message)
        if row.state < PROCESSED and row is earlier.message and not fresh:  # on disk, or settled a moment ago
            reading = asyncio.ensure_future(self.store.message(row.id))
            connection.pending += 1
            reading.add_done_callback(functools.partial(self._repeated_again, connection, header, message, earlier))
        elif row.state < PROCESSED:
            self._claim(row, connection)
            self._commit_accept(connection, header)
        elif self._replay(connection, row):
            row.outcome = DELIVERED
            self.store.update(row, row.state)
        elif row.state in (REJECTED, FAILED):
            self._claim(row, connection)
            self._commit_accept(connection, header)
            self.feed.again(row)
        elif self.settings.enhanced:
            self._commit_accept(connection, header)
        else:
            row.text = message.text
            self._silent_ack(row, connection)

    def _repeated_again(
        self,
        connection: Connection,
        header: Header,
        message: Message,
        earlier: Earlier,
        reading: asyncio.Future[Message | None],
    ) -> None:
        connection.stored()
        found = None if reading.cancelled() or reading.exception() else reading.result()
        self._repeated(connection, header, message, Earlier(found or earlier.message, earlier.same), fresh=True)

    def _reject_repetition(self, connection: Connection, header: Header, message: Message, same: bool) -> None:
        reason = "duplicate control id" if same else "control id was used before with other content"
        self._warn(f"message from {connection.remote} rejected: {reason}; duplicateBehavior=accept takes it as new")
        self._answer(connection, header, "R", reason)
        audit = Message(
            message.channel, message.remote, (message.text or "").encode(message.encoding, "replace"), message.encoding
        )
        audit.control_id, audit.type, audit.state, audit.outcome = message.control_id, message.type, NACKED, NOT_OWED
        audit.error_code, audit.error, audit.settled_at = "duplicate-rejected", reason, audit.received_at
        self.store.put(audit)

    def _claim(self, row: Message, connection: Connection) -> None:
        """The answer goes to the connection that asked last."""
        if row.remote != connection.remote:
            if old := self.connections.get(row.remote):
                old.answered()
            connection.awaiting += self._owes_answer()
            row.remote = connection.remote
            self.store.update(row, row.state)

    def _replay(self, connection: Connection, row: Message) -> bool:
        """Give the Bot's earlier answer again, if there is one for the device."""
        if not row.response or not row.response.startswith("MSH"):
            return False
        ack = read_ack(row.response)
        if ack and not passes_filter(self.settings, ack.code):
            return False
        self._write(connection, row.response)
        return True

    # --- answers ---

    def deliver(self, message: Message, text: str) -> bool:
        """The Bot's answer to the device, if the mode lets it through; False when no device is there to take it."""
        connection = self._connection_for(message)
        if connection is not None and self._owes_answer():
            connection.answered()
        text = text.lstrip("\r\n")
        ack = read_ack(text)
        if ack and not passes_filter(self.settings, ack.code):
            return True
        if connection is None:
            self._warn(
                f"message {message.id}: the device is not connected any more; its answer is kept for a repetition"
            )
            return False
        self._note(f"[Sending ACK -- ID: {ack.control_id if ack else ''}]: {text}")
        self._write(connection, _LINE_ENDS.sub("\r", text) if "\n" in text else text)
        return True

    def push(self, exchange: Exchange, text: str, host: str) -> None:
        """Send a message of the cloud to a connected device: the one at `host`, or the only one; DeviceError."""
        device = self.device(host)
        self.pushes.append((exchange, device))
        self._pushed.append(exchange.control_id)
        self._note(f"[Sending -- ID: {exchange.control_id}]: {text}")
        self._write(device, text)

    def _push_answered(self, text: str) -> bool:
        """A message that acknowledges a push, also late or again, is no message for the server."""
        ack = read_ack(text)
        if ack is None or ack.control_id not in self._pushed:
            return False
        waiting = (e for e, _ in self.pushes if e.control_id == ack.control_id and not e.answer.done())
        if exchange := next(waiting, None):
            exchange.heard(ack, text)
        return True

    def refuse(self, message: Message, error_code: str) -> bool:
        """Original mode: the device waits, so a dead letter is answered by botErrorAck."""
        return self._own_answer(message, self.settings.botErrorAck, f"not processed: {error_code}")

    def silent_bot(self, message: Message) -> bool:
        return self._silent_ack(message, None)

    def _silent_ack(self, message: Message, connection: Connection | None) -> bool:
        """Original mode: the Bot succeeded without an answer, so the device gets botEmptyAck."""
        if self.settings.enhanced:
            if self._owes_answer() and (device := connection or self._connection_for(message)) is not None:
                device.answered()
            return self.settings.enhanced == "aa" or self.settings.appLevelAck == "NE"
        return self._own_answer(message, self.settings.botEmptyAck, "", connection)

    def _own_answer(self, message: Message, code: str, text: str, connection: Connection | None = None) -> bool:
        connection = connection or self._connection_for(message)
        if connection is not None and self._owes_answer():
            connection.answered()
        if self.settings.enhanced or code == "none" or connection is None or message.text is None:
            return False
        self._write(connection, build_ack(Header(message.text), code, text, closing=self._closing))
        return True


PUSH_WRITTEN = "OK"  # the answer to a push whose device has no words of its own


class StreamConnection(Connection):
    """A device that sends a byte stream framed by a start and an end sequence."""

    channel: StreamChannel

    def __init__(self, channel: StreamChannel):
        super().__init__(channel)
        self.core = ByteStream(channel.settings)
        self._replies: list[bytes] = []  # automatic answers that wait until what they acknowledge is on disk

    def take(self, received: bytes) -> None:
        taken = True
        for event in self.core.receive(received):
            if isinstance(event, StreamMessage):
                self.messages += 1
                taken = self.channel.receive(self, event.content)
            elif isinstance(event, Reply) and not taken:
                continue  # it would acknowledge a message that was not taken
            elif isinstance(event, PeerError):
                self.channel.complain(self, str(event))
            elif self.pending:
                self._replies.append(event.content)
            else:
                self.send(event.content)

    @property
    def inside(self) -> bool:
        return self.core.inside

    def settled(self, stored: bool) -> None:
        """A message is on disk; or refused: then its automatic answer is not given, and the device sends again."""
        self.stored()
        replies = [] if self.pending else self._replies
        for reply in replies if stored else []:
            self.send(reply)
        if not stored or not self.pending:
            self._replies = []


class StreamChannel(Channel):
    """A channel for devices with a protocol of their own: framed bytes (channel contract 9)."""

    @property
    def settings(self) -> StreamSettings:
        return typing.cast(StreamSettings, self.plan.settings)

    def connect(self) -> Connection:
        return StreamConnection(self)

    def replan(self, plan: ChannelPlan) -> None:
        """Other parameters mean another core: open connections are closed, and the devices come back."""
        changed = plan.settings != self.plan.settings
        super().replan(plan)
        for connection in list(self.connections.values()) if changed else []:
            connection.close()

    def complain(self, connection: Connection, text: str) -> None:
        self._warn(f"{connection.remote}: {text}")

    def receive(self, connection: StreamConnection, content: bytes) -> bool:
        """One framed message: hand it to the store; False when it cannot be taken now."""
        text = stream_body(content, self.settings)
        message = self.new_message(connection, content, text, "latin-1") if text else None
        if message is None:
            return not text  # nothing is left of it after stripping: nothing to take
        message.source = functools.partial(self._stored, connection)
        connection.pending += 1
        self.store.put(message)
        return True

    def new_message(self, connection: Connection, original: bytes, text: str, encoding: str) -> Message | None:
        """A message for the store; None while the channel has no row in it: then the device is told nothing."""
        if self.feed is None:
            self.complain(connection, f"{self.store.trouble or 'the channel is starting'}; the message is not taken")
            return None
        message = Message(self.feed.row.id, connection.remote, original, encoding)
        message.epoch, message.type = self.feed.row.epoch, self.plan.content_type
        message.key = "" if self.plan.key_spec == "*" else connection.host
        message.text = text
        self._note(f"[Received]: {text}")
        return message

    def _stored(self, connection: StreamConnection, message: Message) -> None:
        assert self.feed is not None
        if message.refusal:
            self.complain(connection, f"{message.refusal}; the message is not acknowledged")
        else:
            self.feed.stored(message)
        connection.settled(not message.refusal)

    def relays(self, body: object) -> bool:
        """The log text of a Bot that returned nothing is not for the device."""
        return isinstance(body, str) and bool(body) and not body.startswith(BOT_LOG)

    def deliver(self, message: Message, text: str) -> bool:
        if self.settings.ignoreResponse:
            return True
        connection = self._connection_for(message)
        if connection is None:
            self._warn(f"message {message.id}: the device is not connected any more; its answer is in the queue")
            return False
        self._note(f"[Sending]: {text}")
        try:
            self.answer(connection, text, message)
        except PeerError as error:
            self._warn(f"message {message.id}: the Bot's answer cannot be sent: {error}")
            return False
        return True

    def answer(self, connection: Connection, text: str, message: Message | None = None) -> None:
        """The Bot's words on the wire; PeerError when they are not what the channel carries."""
        connection.send(stream_answer(text, self.settings))

    def submit(self, connection: Connection, text: str) -> asyncio.Future[str]:
        """A push to a connected device: done when it is written, or when the device took it (ASTM)."""
        self.answer(connection, text)
        sent: asyncio.Future[str] = self.loop.create_future()
        sent.set_result(PUSH_WRITTEN)
        return sent


class AstmDriver:
    """Runs an Astm core on a line: its deadlines, what it writes, and the futures of what it sends.

    The other events go to `heard`, which answers a FrameAccepted by do(core.committed) or do(core.refused).
    """

    def __init__(
        self, settings: StreamSettings, name: str, write: Callable[[bytes], None], heard: Callable[[AstmEvent], None]
    ):
        self.core = Astm(settings)
        self._name, self._write, self._heard = name, write, heard
        self._loop = asyncio.get_running_loop()
        self._sends: collections.deque[asyncio.Future[str]] = collections.deque()  # in the order of the core
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, records: Sequence[bytes]) -> asyncio.Future[str]:
        """Send records as a session; the future ends when the instrument took it, or in a DeviceError.

        When it is cancelled the session is not sent: who waited was told so, and may try again.
        """
        sent: asyncio.Future[str] = self._loop.create_future()
        sent.add_done_callback(self._withdraw)
        self._sends.append(sent)
        self.do(self.core.send, records)
        return sent

    def do(self, call: Callable[..., list[AstmEvent]], *given: object) -> None:
        """Call the core with the time."""
        self._perform(call(*given, self._loop.time()))

    def closed(self) -> None:
        self._perform(self.core.closed())

    def _withdraw(self, sent: asyncio.Future[str]) -> None:
        if sent in self._sends:
            position = self._sends.index(sent)
            del self._sends[position]
            self.do(self.core.withdraw, position)

    def _perform(self, events: list[AstmEvent]) -> None:
        """Do what the core says, and wait for its next deadline."""
        for event in events:
            if isinstance(event, Write):
                self._write(event.content)
            elif isinstance(event, Sent | SendFailed):
                self._settle(self._sends.popleft(), event)
            else:
                self._heard(event)
        if self._timer is not None:
            self._timer.cancel()
        deadline = self.core.deadline()
        self._timer = None if deadline is None else self._loop.call_at(deadline, self.do, self.core.expired)

    def _settle(self, sent: asyncio.Future[str], event: Sent | SendFailed) -> None:
        if sent.done():
            return
        if isinstance(event, SendFailed):
            text = f"{self._name}: the instrument did not take it: {event.reason}"
            sent.set_exception(DeviceError(text, "device-silent"))
        else:
            sent.set_result(PUSH_WRITTEN)


class AstmConnection(Connection):
    """An analyzer that speaks ASTM E1381 / LIS01-A2; accepted frames are on disk before their ACK."""

    channel: AstmChannel
    driver: AstmDriver
    session = ""  # names the frames on disk that belong to no message yet
    _frames = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.driver = AstmDriver(self.channel.settings, self.remote, self.send, self._heard)

    def take(self, received: bytes) -> None:
        self.driver.do(self.driver.core.receive, received)

    @property
    def inside(self) -> bool:
        return False  # the core has time-outs of its own

    def _heard(self, event: AstmEvent) -> None:
        if isinstance(event, FrameAccepted):
            self._keep_frame(event)
        elif isinstance(event, Session | Interrupted):
            self.messages += 1
            session, self.session = self.session, ""
            self.channel.take_session(self, session, event)
        elif isinstance(event, LineWarning):
            self.channel.complain(self, event.text)

    def _keep_frame(self, frame: FrameAccepted) -> None:
        """The frame is on disk before the core may acknowledge it."""
        self.session = self.session or uuid.uuid4().hex
        self._frames += 1
        self.pending += 1
        self.pause("frame")
        self.channel.keep_frame(self, self._frames, frame).add_done_callback(self._frame_kept)

    def _frame_kept(self, saving: asyncio.Future[None]) -> None:
        self.stored()
        self.resume("frame")
        if saving.cancelled() or saving.exception() is not None:
            self.channel.complain(self, "a frame could not be stored and is refused with NAK")
            self.driver.do(self.driver.core.refused)
        else:
            self.driver.do(self.driver.core.committed)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.driver.closed()


class AstmChannel(StreamChannel):
    """A channel in ASTM mode (channel contract 10): sessions of records up, the Bot's records down."""

    def connect(self) -> Connection:
        return AstmConnection(self)

    def keep_frame(self, connection: AstmConnection, number: int, frame: FrameAccepted) -> asyncio.Future[None]:
        """Put an accepted frame on disk; StorageError through the future."""
        if self.feed is None or not self.store.healthy:
            failed: asyncio.Future[None] = self.loop.create_future()
            failed.set_exception(StorageError(self.store.trouble or "the channel is starting"))
            return failed
        row = (connection.session, number, self.feed.row.id, connection.remote, frame.content)

        def run(db: sqlite3.Connection) -> None:
            db.execute("INSERT INTO partial VALUES (?, ?, ?, ?, ?)", row)

        return self.store.call(run)

    def take_session(self, connection: AstmConnection, session: str, event: Session | Interrupted) -> None:
        """A whole session is a message; an interrupted one is kept as a dead letter with its records."""
        text = records_text(event.records, self.settings)
        if not text:  # nothing but blanks: its frames shall not become a dead letter at the next start
            self.store.call(lambda db: db.execute("DELETE FROM partial WHERE session = ?", (session,)))
            return
        message = self.new_message(connection, text.encode(), text, "utf-8")
        if message is None:
            return
        message.control_id = message.session = session
        if isinstance(event, Interrupted):
            self.bury_session(message, event.reason)
        message.source = functools.partial(self._session_stored, connection)
        connection.pending += 1
        self.store.put(message)

    def bury_session(self, message: Message, reason: str) -> None:
        message.state, message.outcome, message.settled_at = FAILED, NOT_OWED, message.received_at
        message.error_code, message.error = "interrupted-session", reason
        self._warn(f"{message.remote}: a session was interrupted ({reason}); its records are kept as a dead letter")

    def _session_stored(self, connection: AstmConnection, message: Message) -> None:
        connection.stored()
        if message.refusal:
            self.complain(connection, f"{message.refusal}; the session becomes a dead letter at the next start")
            return
        if message.state == QUEUED and self.feed is not None:
            self.feed.stored(message)

    async def recover(self) -> None:
        """Frames that were acknowledged before a crash, and whose session never ended, become a dead letter."""
        assert self.feed is not None
        channel = self.feed.row.id
        sessions = await self.store.call(
            lambda db: db.execute(
                "SELECT session, remote, group_concat(hex(frame), '') FROM (SELECT * FROM partial WHERE channel = ? "
                "ORDER BY session, number) GROUP BY session",
                (channel,),
            ).fetchall()
        )
        live = {c.session for c in self.connections.values() if isinstance(c, AstmConnection)}
        for session, remote, frames in sessions:
            if session not in live:
                text = records_text([bytes.fromhex(frames)], self.settings)
                message = Message(channel, remote, text.encode(), "utf-8")
                message.control_id, message.session, message.epoch = session, session, self.feed.row.epoch
                message.type = ASTM_TYPE
                self.bury_session(message, "the agent stopped before the session ended")
                self.store.put(message)

    def answer(self, connection: Connection, text: str, message: Message | None = None) -> None:
        self.submit(connection, text).add_done_callback(functools.partial(self._answered, connection, message))

    def submit(self, connection: Connection, text: str) -> asyncio.Future[str]:
        return typing.cast(AstmConnection, connection).driver.submit(text_records(text, self.settings))

    def _answered(self, connection: Connection, message: Message | None, sent: asyncio.Future[str]) -> None:
        if sent.cancelled() or (error := sent.exception()) is None:
            return
        self.complain(connection, f"the Bot's answer was not taken: {error}")
        if message is not None:
            message.outcome = UNDELIVERED
            self.store.update(message, message.state)


class Dialer:
    """A channel whose line we open: an instrument that listens, or a serial port; opened again when it is lost."""

    def __init__(self, channel: StreamChannel, log: Log):
        self._channel, self._log = channel, log
        self._task = asyncio.ensure_future(self._run())

    def close(self) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        plan, failures, said = self._channel.plan, 0, ""
        while True:
            try:
                connection = await self._open(plan)
                self._log.info(f"Channel '{plan.name}': {plan.address.split('?')[0]} is open.")
                failures, said = 0, ""
                await connection.lost.wait()
                reason = "the line was closed"
            except (OSError, ValueError) as error:
                failures, reason = failures + 1, str(error) or type(error).__name__
            if reason != said:
                said = reason
                self._log.warn(f"Channel '{plan.name}': {plan.address.split('?')[0]}: {reason}; trying again.")
            await asyncio.sleep(
                random.uniform(0, min(RECONNECT_MAX_SECS, RECONNECT_BASE_SECS * 2 ** min(failures, 10)))
            )

    async def _open(self, plan: ChannelPlan) -> Connection:
        loop = asyncio.get_running_loop()
        if plan.port:
            async with asyncio.timeout(CONNECT_TIMEOUT_SECS):
                _, protocol = await loop.create_connection(self._channel.connect, plan.host, plan.port)
            return protocol
        import serialx  # only where a serial port is used

        s = self._channel.settings
        _, port = await serialx.create_serial_connection(
            loop, self._channel.connect, plan.host, baudrate=s.baudRate, parity=serialx.Parity[s.parity.upper()],
            stopbits=serialx.StopBits(s.stopBits), byte_size=s.dataBits, xonxoff=s.flow == "xonxoff",
            rtscts=s.flow == "rtscts",
        )  # fmt: skip
        return typing.cast(Connection, port)


ANY_HOST = ("", "*", "0.0.0.0", "::", "[::]")


class Listener:
    """A bound port and the channel that it serves. Raises OSError when the port cannot be bound."""

    def __init__(self, bind: tuple[str, int], sockets: list[socket.socket]):
        self.bind = bind
        self.channel: Channel | None = None
        self._sockets = sockets
        self._servers: list[asyncio.Server] = []

    @property
    def shown(self) -> str:
        """Where devices connect, for people: `*` for all interfaces."""
        host, port = self._sockets[0].getsockname()[:2]
        return f"{'*' if host in ANY_HOST else host}:{port}"

    @classmethod
    async def open(cls, bind: tuple[str, int], log: Log) -> Listener:
        """Resolve and bind; the name of a host may take its time without holding up the devices."""
        addresses: set[tuple[int, Any]] = set()
        if bind[0] not in ANY_HOST:
            with contextlib.suppress(OSError):
                async with asyncio.timeout(RESOLVE_SECS):
                    found = await asyncio.get_running_loop().getaddrinfo(
                        *bind, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
                    )
                    addresses = {(family, address) for family, _, _, _, address in found}
        return cls(bind, bind_sockets(*bind, addresses, log))

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            self._servers.append(await loop.create_server(self._connection, sock=sock, backlog=SOCKET_BACKLOG))

    def _connection(self) -> asyncio.BaseProtocol:
        return self.channel.incoming() if self.channel is not None else TurnAway()

    def close(self) -> None:
        for server in self._servers:
            server.close()
        if not self._servers:
            for sock in self._sockets:
                sock.close()


class TurnAway(asyncio.Protocol):
    """For a connection that cannot be served now, such as while its port changes hands: the device tries again."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        typing.cast(asyncio.Transport, transport).abort()


def bind_sockets(host: str, port: int, addresses: set[tuple[int, Any]], log: Log) -> list[socket.socket]:
    """Listening sockets for an Endpoint's host and port: dual stack for any address, else the addresses of the host.

    A host that is not an address of this machine (a public name, a translated address) means all interfaces, as with
    the reference agent, and a warning.
    """
    if addresses:
        try:
            return [s for family, address in addresses if (s := _bind_address(family, address, len(addresses)))]
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    if host not in ANY_HOST:
        log.warn(f"'{host}' is not an address of this machine; port {port} listens on all interfaces.")
    if socket.has_dualstack_ipv6():
        return [socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)]
    return [socket.create_server(("", port))]


def _bind_address(family: int, address: Any, count: int) -> socket.socket | None:
    """One address of a host; of several (localhost is 127.0.0.1 and ::1) some may not exist here."""
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if count > 1 and error.errno == errno.EADDRNOTAVAIL and family == socket.AF_INET6:
            return None
        raise


# =====================================================================================================================
# Devices
#
# From the cloud to the device. A push that somebody waits for is tried once and answered within the caller's window.
# One that nobody waits for is stored first, and then tried in order until the device accepts it or it becomes a dead
# letter. Pools of connections per device, one message in flight on each; an ACK is matched by MSA-2, wherever it
# arrives. May touch: sockets.
# =====================================================================================================================


@dataclasses.dataclass(frozen=True)
class Target:
    """A parsed Device.url. `key` names the device: pushes with the same key share connections and order."""

    url: str
    scheme: str
    host: str
    port: int
    path: str
    settings: DeviceSettings

    @property
    def on_channel(self) -> bool:
        """The device is at one of our own channels: connected to it, or on its serial port."""
        return self.scheme in ("channel", "serial")

    @property
    def key(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.is_dicom:
            return f"{self.scheme}://{self.path}@{host}:{self.port}"
        return f"{self.scheme}://{host}:{self.port}" if self.port else f"{self.scheme}://{host}{self.path}"

    @property
    def is_dicom(self) -> bool:
        """`path` is the AE title then."""
        return self.scheme.startswith("dicom")


def is_host(name: str) -> bool:
    """An IPv4 or IPv6 address, or a syntactically valid host name (RFC 1123 2.1, with underscores)."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    labels = r"(?!-)[A-Za-z0-9_-]{1,63}(\.(?!-)[A-Za-z0-9_-]{1,63})*\.?"
    return len(name) < 254 and re.fullmatch(labels, name) is not None


def parse_target(url: str) -> Target:
    """The device behind a remote address; PeerError says what is wrong with it."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or 0
    except ValueError as error:
        raise PeerError(f"'{url}' is not a device address: {error}") from None
    scheme = parts.scheme
    if scheme not in ("mllp", "mllps", "tcp", "dicom", "dicoms", "channel", "serial"):
        text = "use mllp, mllps, tcp, dicom, dicoms, channel or serial"
        raise PeerError(f"'{url}' is not a device address that this agent can send to: {text}")
    ours = scheme in ("channel", "serial")  # a device on one of our own channels
    if not ours and not (parts.hostname and port):
        raise PeerError(f"'{url}' needs a host and a port, such as mllp://192.168.50.10:56001")
    try:
        values = read_parameters(DeviceSettings, parts.query, url, lambda text: None)
        titles = ae_titles(urllib.parse.unquote(parts.username or ""))
    except (ConfigError, ValueError) as error:
        raise PeerError(f"'{url}': {error}") from None
    if scheme in ("mllps", "dicoms"):
        values["tls"] = True
    if problem := encoding_problem(values.get("encoding", "utf-8")):
        raise PeerError(f"'{url}': {problem}")
    if not ours and not is_host(parts.hostname or ""):
        raise PeerError(f"'{url}': '{parts.hostname}' is neither an IP address nor a host name")
    host = urllib.parse.unquote(parts.netloc) if ours else parts.hostname or ""
    path = parts.path
    if scheme.startswith("dicom"):
        path = parts.username or ""
        if len(titles) != 1:
            raise PeerError(f"'{url}' needs the device's AE title, such as dicom://ARCHIVE@192.168.50.10:104")
    return Target(url, scheme, host, port, urllib.parse.unquote(path), DeviceSettings(**values))


def security_of(settings: DeviceSettings) -> tuple[Any, ...]:
    """What a connection was made under; it serves only pushes that ask for the same."""
    return settings.tls, settings.checkHost, settings.caFile, settings.certFile, settings.keyFile


@functools.lru_cache(maxsize=64)
def device_tls(settings: DeviceSettings) -> ssl.SSLContext:
    """TLS to a device: the system's authorities and caFile, and our certificate if the device wants one."""
    try:
        context = tls_context(settings.caFile)
        context.check_hostname = settings.checkHost
        if settings.certFile:
            context.load_cert_chain(settings.certFile, settings.keyFile or None)
    except (ConfigError, OSError) as error:
        raise LocalError(f"TLS cannot be set up: {error}") from None
    return context


class DeviceConnection(asyncio.Protocol):
    """One MLLP connection to a device; `current` is the message in flight on it."""

    def __init__(self, device: Device, settings: DeviceSettings):
        self.encoding = settings.encoding
        self.security = security_of(settings)
        self.current: Exchange | None = None
        self.idle_since = 0.0
        self._device = device
        self._core = Mllp(16 * MIB)
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = typing.cast(asyncio.Transport, transport)
        set_device_options(transport.get_extra_info("socket"))
        self._device.connections.add(self)

    def data_received(self, data: bytes) -> None:
        for event in self._core.receive(data):
            if isinstance(event, bytes):
                self._device.received(self, event.decode(self.encoding, "replace"))

    def connection_lost(self, error: Exception | None) -> None:
        self._device.lost(self)
        if self.current is not None and not self.current.answer.done():
            text = f"{self._device.name}: Message was still pending when connection closed"
            self.current.answer.set_exception(DeviceError(text, "device-silent"))

    @property
    def open(self) -> bool:
        return not self._transport.is_closing()

    async def ask(self, exchange: Exchange, text: str) -> str:
        """Send, and wait for the acknowledgment."""
        self.current = exchange
        try:
            self._transport.write(mllp_frame(text.encode(self.encoding, "replace")))
            return await exchange.answer
        finally:
            self.current = None

    def close(self) -> None:
        self._transport.close()


class AstmCaller(asyncio.Protocol):
    """One message to an instrument that listens; what it sends meanwhile is refused: a channel is there for that."""

    def __init__(self, settings: StreamSettings, text: str, name: str):
        self._settings, self._text, self._name = settings, text, name
        self._driver: AstmDriver
        self.sent: asyncio.Future[str]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        write = typing.cast(asyncio.Transport, transport).write
        self._driver = AstmDriver(self._settings, self._name, write, self._heard)
        self.sent = self._driver.submit(text_records(self._text, self._settings))

    def data_received(self, data: bytes) -> None:
        self._driver.do(self._driver.core.receive, data)

    def connection_lost(self, error: Exception | None) -> None:
        self._driver.closed()

    def _heard(self, event: AstmEvent) -> None:
        if isinstance(event, FrameAccepted):
            self._driver.do(self._driver.core.refused)


P = TypeVar("P", bound=asyncio.Protocol)


class Device:
    """The connections to one device, at most `limit` of them, each with one message in flight."""

    def __init__(self, name: str, log: Log, channel_log: Log):
        self.name = name
        self.limit = 1
        self.connections: set[DeviceConnection] = set()
        self.round_trips: collections.deque[int] = collections.deque(maxlen=MAX_STATS_SAMPLES)
        self.pending: dict[str, Exchange] = {}
        self.on_late: Callable[[Acknowledgment, str], None] = lambda ack, text: None
        self.users = 0  # pushes under way
        self._idle: list[DeviceConnection] = []
        self.encoding = "utf-8"  # of the last push
        self._opening = 0
        self._loop = asyncio.get_running_loop()
        self._waiters: collections.deque[asyncio.Future[None]] = collections.deque()
        self._log, self._channel_log = log, channel_log

    async def exchange(self, target: Target, text: str, control_id: str, mode: str, seconds: float) -> str:
        """The device's acknowledgment of an HL7 message; raises DeviceError within `seconds`."""
        phase = f"all {self.limit} connections were busy"
        exchange = Exchange(control_id, mode, asyncio.get_running_loop().create_future())
        self.users += 1
        self.encoding = target.settings.encoding
        started = now_ms()
        try:
            async with asyncio.timeout(seconds):
                await self._turn()
                phase = "the connection could not be made"
                connection = await self._connection(target)
                phase = "no acknowledgment came"
                try:
                    self.pending[control_id] = exchange
                    answer = await connection.ask(exchange, text)
                finally:
                    self._release(connection)
        except TimeoutError:
            kind = "device-silent" if phase.startswith("no") else "device-unreachable"
            raise DeviceError(f"{self.name}: {phase} within {seconds:g} s", kind) from None
        finally:
            self.users -= 1
            if self.pending.get(control_id) is exchange:
                del self.pending[control_id]
        self.round_trips.append(now_ms() - started)
        return answer

    async def _turn(self) -> None:
        """Wait until a connection is idle or may be opened."""
        while not self._idle and len(self.connections) + self._opening >= self.limit:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake()  # our turn goes to the next
                raise
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    async def _connection(self, target: Target) -> DeviceConnection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open and connection.security == security_of(target.settings):
                connection.encoding = target.settings.encoding
                return connection
            connection.close()
        self._opening += 1
        try:
            return (await self._open(target, lambda: DeviceConnection(self, target.settings)))[1]
        except BaseException:
            self._loop.call_soon(self._wake)  # the place is free again
            raise
        finally:
            self._opening -= 1

    async def _open(self, target: Target, protocol: Callable[[], P]) -> tuple[asyncio.Transport, P]:
        settings = target.settings
        try:
            context = device_tls(settings) if settings.tls else None
            async with asyncio.timeout(settings.connectTimeoutSecs):
                return await self._loop.create_connection(protocol, target.host, target.port, ssl=context)
        except TimeoutError:
            text = f"{self.name}: no connection within {settings.connectTimeoutSecs:g} s"
            raise DeviceError(text, "device-unreachable") from None
        except OSError as error:
            raise DeviceError(f"{self.name}: {_os_reason(error)}", "device-unreachable") from None
        except (LocalError, UnicodeError) as error:
            raise DeviceError(f"{self.name}: {error}", "device-unreachable") from None

    def _release(self, connection: DeviceConnection) -> None:
        if connection.open:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)
        self._wake()

    def received(self, connection: DeviceConnection, text: str) -> None:
        """A message from the device: the ACK of what is in flight here, of an older message, or a surprise."""
        ack = read_ack(text)
        if ack is None:
            self._log.warn(f"{self.name} sent a message that is no acknowledgment; ignored.")
            self._channel_log.info(f"[Device:{self.name}] [Ignored]: {text}")
            return
        self._channel_log.info(f"[Device:{self.name}] [Received ACK -- ID: {ack.control_id}]: {text}")
        exchange = connection.current
        if exchange is None or exchange.control_id != ack.control_id:
            exchange = self.pending.get(ack.control_id)
        if exchange is not None and not exchange.answer.done():
            exchange.heard(ack, text)
        else:
            self.on_late(ack, text)

    def lost(self, connection: DeviceConnection) -> None:
        self.connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._wake()

    def close_idle(self, before: float) -> None:
        """Close connections that have not been used since `before` (the event loop's clock)."""
        for connection in [connection for connection in self._idle if connection.idle_since <= before]:
            self._idle.remove(connection)
            connection.close()

    async def send_records(self, target: Target, text: str, seconds: float) -> str:
        """Records to an instrument that listens, as one ASTM session on a connection of its own."""
        shared = rows_of(StreamSettings).keys() & rows_of(DeviceSettings).keys()
        given = {name: getattr(target.settings, name) for name in shared - {"mode", "bodyEncoding", "endChar"}}
        settings = StreamSettings(mode="astm", **given)
        caller: AstmCaller | None = None
        self.users += 1
        try:
            async with asyncio.timeout(seconds):
                transport, caller = await self._open(target, lambda: AstmCaller(settings, text, self.name))
                try:
                    return await caller.sent
                finally:
                    transport.close()
        except TimeoutError:
            kind = "device-silent" if caller else "device-unreachable"
            raise DeviceError(f"{self.name}: not taken within {seconds:g} s", kind) from None
        finally:
            self.users -= 1

    async def send_bytes(self, target: Target, content: bytes, seconds: float) -> bytes:
        """Raw bytes to a device on a connection of their own; with endChar the answer up to it, else b``."""
        end = target.settings.endChar.encode("latin-1", "ignore")
        phase = "the connection could not be made"
        self.users += 1
        try:
            async with asyncio.timeout(seconds):
                context = device_tls(target.settings) if target.settings.tls else None
                reader, writer = await asyncio.open_connection(target.host, target.port, ssl=context, limit=16 * MIB)
                phase = "no answer came"
                try:
                    writer.write(content)
                    await writer.drain()
                    return await reader.readuntil(end) if end else b""
                finally:
                    writer.close()
        except TimeoutError:
            kind = "device-silent" if phase.startswith("no") else "device-unreachable"
            raise DeviceError(f"{self.name}: {phase} within {seconds:g} s", kind) from None
        except (OSError, LocalError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            reason = (
                str(error)
                if isinstance(error, LocalError)
                else _os_reason(error)
                if isinstance(error, OSError)
                else "closed the connection before it answered"
            )
            kind = "device-silent" if phase.startswith("no") else "device-unreachable"
            raise DeviceError(f"{self.name}: {reason}", kind) from None
        finally:
            self.users -= 1


def _os_reason(error: OSError) -> str:
    """`Connection refused` rather than asyncio's own words for it; what is wrong with a certificate."""
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {getattr(error, 'verify_message', '') or error.reason or error}"
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error) or type(error).__name__


class Push(NamedTuple):
    """A checked request to send something to a device. `text` is HL7 or what the device's bodyEncoding says."""

    target: Target
    text: str
    control_id: str
    mode: str
    content_type: str


def parse_push(request: Json) -> Push:
    """A server's agent:transmit:request; PeerError for what is answered as agent:error (uplink contract 4.8)."""
    remote, body = request.get("remote"), request.get("body")
    if not remote or not isinstance(remote, str):
        raise PeerError("Missing remote address")
    if not body or not isinstance(body, str):
        raise PeerError(f"WebSocket error on incoming message: there is no body for {remote}")
    target = parse_target(remote)
    content_type = str(request.get("contentType") or BYTES_TYPE)
    if target.is_dicom:
        if content_type == DICOM_TYPE:
            body = dump_json({"command": "C-STORE", "binary": {"reference": body.strip()}}).decode()
        return Push(target, body, "", "", JSON_TYPE)
    if target.scheme == "tcp" or (target.on_channel and content_type != HL7_TYPE):
        return Push(target, body, "", "", content_type)
    try:
        text = decode_hl7(body.encode(), "utf-8")
    except PeerError as error:
        raise PeerError(f"WebSocket error on incoming message: {error}") from None
    mode = str(request.get("returnAck") or target.settings.defaultReturnAck).lower()
    return Push(target, text, Header(text).control_id, mode, HL7_TYPE)


class DeviceQueue(Queue):
    """The stored pushes to one device, in order."""

    def __init__(self, policy: Policy, row: ChannelRow, store: Store, log: Log, devices: Devices):
        super().__init__(policy, row, store, log)
        self._devices = devices
        self._tasks: set[asyncio.Task[None]] = set()

    def can_send(self) -> bool:
        return self._devices.open and self._devices.active

    def text_of(self, message: Message, original: bytes, finalized: str | None) -> str:
        return original.decode("utf-8", "replace")

    def transmit(self, message: Message) -> None:
        task = asyncio.ensure_future(self._deliver(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deliver(self, message: Message) -> None:
        try:
            push = parse_push(
                {
                    "remote": message.remote,
                    "body": message.text,
                    "returnAck": message.return_ack,
                    "contentType": message.type,
                }
            )
            answer = await self._devices.send(push, PUSH_STORED_SECS)
        except DeviceError as error:
            if message.id in self.inflight:
                self.failed(message, error.kind, counts=error.kind != "device-unreachable")
            return
        except Exception as error:  # a push that cannot even be tried must not hold those behind it for ever
            self._log.error(f"{self.policy.name}: message {message.id} cannot be sent: {type(error).__name__}")
            if message.id in self.inflight:
                self.failed(message, "device-error")
            return
        self.answered(message, answer)

    def answered(self, message: Message, answer: str) -> None:
        """The device's ACK, perhaps a late one."""
        if message.state >= PROCESSED:
            return
        message.response = answer
        ack = read_ack(answer)
        if ack and ack.code in ("AE", "CE", "AR", "CR"):
            if message.id in self.inflight:
                self.failed(message, "device-error" if ack.code in ("AE", "CE") else "device-rejected")
            return
        message.outcome = DELIVERED
        self.settle(message, PROCESSED)

    def tell_dead(self, message: Message, error: str, relay: bool) -> bool:
        return False

    def late(self, ack: Acknowledgment, text: str) -> bool:
        """An ACK that came after its time: it settles the message if that is still here."""
        for message in self.window.values():
            if message.control_id == ack.control_id and message.attempts:
                if message.return_ack != "application" or ack.code != "CA":
                    self.answered(message, text)
                return True
        return ack.code == "CA"  # nobody misses a CA


class Devices:
    """All devices that were pushed to: their connections, and their stored pushes."""

    def __init__(self, store: Store, log: Log, channel_log: Log, channels: Mapping[str, Channel]):
        self.open = self.active = True
        self.settings = AgentSettings()
        self.limit_given = False
        self._store, self._log, self._channel_log = store, log, channel_log
        self._channels = channels
        self._devices: dict[str, Device] = {}
        self._queues: dict[str, DeviceQueue] = {}
        self._early: dict[str, list[Push]] = {}  # by device: arrived while its queue is being made
        self._tries: set[asyncio.Future[str]] = set()
        self.imaging: Callable[[Push, float], Awaitable[str]]  # sends to dicom:// addresses

    def configure(self, plan: Plan) -> None:
        """New Agent settings; connections in use are left alone."""
        self.settings, self.active = plan.settings, plan.status == "active"
        self.limit_given = "maxClientsPerRemote" in plan.given
        for device in self._devices.values():
            device.limit = self._limit
        for key, pushes in self._queues.items():
            pushes.policy = self._policy(key)
            pushes.pump()

    @property
    def _limit(self) -> int:
        return self.settings.maxClientsPerRemote if self.limit_given or not self.settings.keepAlive else 1

    def _policy(self, key: str) -> Policy:
        s = self.settings
        delays = s.channelAutoRetryBaseDelayMs, s.channelAutoRetryMaxDelayMs, s.channelAutoRetryBackoffMultiplier
        workers = s.maxClientsPerRemote if self.limit_given else 1
        attempts = s.channelAutoRetryMaxAttempts
        return Policy(f"Device {key}", workers, "device", math.inf, *delays, attempts, s.deadLetterAfterHours)

    def _device(self, target: Target) -> Device:
        device = self._devices.get(target.key)
        if device is None:
            device = self._devices[target.key] = Device(target.key, self._log, self._channel_log)
            device.limit = self._limit
            device.on_late = functools.partial(self._late, target.key)
        return device

    def _late(self, key: str, ack: Acknowledgment, text: str) -> None:
        queue = self._queues.get(key)
        if queue is None or not queue.late(ack, text):
            self._log.warn(f"Device {key}: an acknowledgment came that no push waits for; it is in the channel log.")

    async def send(self, push: Push, seconds: float) -> str:
        """One try; the device's answer as text, raises DeviceError within `seconds` (or the url's ackTimeoutSecs)."""
        target = push.target
        seconds = target.settings.ackTimeoutSecs or seconds
        self._channel_log.info(f"[Device:{target.key}] [Sending -- ID: {push.control_id}]: {push.text}")
        if target.on_channel:
            return await self._send_to_channel(push, seconds)
        if target.is_dicom:
            return await self.imaging(push, DICOM_PUSH_SECS if seconds == PUSH_STORED_SECS else seconds)
        device = self._device(target)
        if target.scheme != "tcp":
            return await device.exchange(target, push.text, push.control_id, push.mode, seconds)
        if target.settings.mode == "astm":
            return await device.send_records(target, push.text, seconds)
        hexadecimal = target.settings.bodyEncoding == "hex"
        answer = await device.send_bytes(target, _push_bytes(push), seconds)
        return answer.hex() if hexadecimal else answer.decode(target.settings.encoding, "replace")

    async def _send_to_channel(self, push: Push, seconds: float) -> str:
        """To a device that is connected to one of our channels: channel://name or channel://name/ip."""
        name, host = push.target.host, push.target.path.strip("/")
        channel = self._channels.get(name)
        if push.target.scheme == "serial":
            port, name, host = push.target.host or push.target.path, push.target.key, ""
            channel = next((c for c in self._channels.values() if c.plan.host == port and not c.plan.port), None)
        if channel is None:
            raise DeviceError(f"there is no running channel for '{name}'", "device-unreachable")
        if isinstance(channel, StreamChannel):
            return await self._submit(channel, push, host, seconds)
        assert isinstance(channel, Hl7Channel)
        if not push.control_id:
            raise DeviceError(f"channel '{name}' takes HL7 messages with MSH-10 only", "device-rejected")
        exchange = Exchange(push.control_id, push.mode, asyncio.get_running_loop().create_future())
        try:
            channel.push(exchange, push.text, host)
            async with asyncio.timeout(seconds):
                return await exchange.answer
        except TimeoutError:
            text = f"the device on channel '{name}' sent no acknowledgment within {seconds:g} s"
            raise DeviceError(text, "device-silent") from None
        finally:
            channel.pushes = [entry for entry in channel.pushes if entry[0] is not exchange]

    async def _submit(self, channel: StreamChannel, push: Push, host: str, seconds: float) -> str:
        try:
            async with asyncio.timeout(seconds):
                return await channel.submit(channel.device(host), push.text)
        except TimeoutError:
            raise DeviceError(f"{push.target.key}: not taken within {seconds:g} s", "device-silent") from None
        except PeerError as error:
            if isinstance(error, DeviceError):
                raise
            raise DeviceError(f"{push.target.key}: {error}", "device-rejected") from None

    def store(self, push: Push) -> None:
        """Keep a push that nobody waits for, and send it in its turn: pushes are stored in the order of the calls."""
        key = push.target.key
        if (queue := self._queues.get(key)) is not None:
            self._put(queue, push)
            return
        if key not in self._early:
            self._early[key] = []
            self._make_queue_soon(key)
        self._early[key].append(push)

    def _put(self, queue: DeviceQueue, push: Push) -> None:
        message = Message(queue.row.id, push.target.url, push.text.encode(), "utf-8")
        message.text, message.control_id, message.type = push.text, push.control_id, push.content_type
        message.return_ack = push.mode or None
        if push.mode and queue.policy.workers > 1:
            message.key = patient_key(push.text, Header(push.text))
        message.source = functools.partial(self._stored, queue, push)
        self._store.put(message)

    def _stored(self, queue: DeviceQueue, push: Push, message: Message) -> None:
        if not message.refusal:
            queue.stored(message)
            return
        self._try_once(push, message.refusal)

    def _try_once(self, push: Push, reason: str) -> None:
        self._log.error(f"A push to {push.target.key} cannot be stored ({reason}); it is tried once.")
        task = asyncio.ensure_future(self.send(push, PUSH_STORED_SECS))
        self._tries.add(task)
        task.add_done_callback(self._tried)

    def _tried(self, task: asyncio.Future[str]) -> None:
        self._tries.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error(f"A push that could not be stored failed: {error}.")

    def _make_queue_soon(self, key: str) -> None:
        making = asyncio.ensure_future(self._store.channel(PUSH_PREFIX + key, ""))
        making.add_done_callback(functools.partial(self._queue_made, key))

    def _queue_made(self, key: str, making: asyncio.Future[ChannelRow]) -> None:
        early = self._early.pop(key, [])
        if making.cancelled() or making.exception() is not None:
            for push in early:
                self._try_once(push, "the queue cannot be used")
            return
        row = making.result()
        queue = self._queues[key] = DeviceQueue(self._policy(key), row, self._store, self._log, self)
        queue.pump()
        for push in early:
            self._put(queue, push)

    async def resume(self) -> None:
        """After a start: go on with the pushes that are on disk."""
        names = await self._store.call(
            lambda db: db.execute(
                f"SELECT DISTINCT c.name FROM message m JOIN channel c ON c.id = m.channel "
                f"WHERE m.state < {PROCESSED} AND c.name LIKE '{PUSH_PREFIX}%'"
            ).fetchall()
        )
        for (name,) in names:
            key = name.removeprefix(PUSH_PREFIX)
            if key not in self._queues and key not in self._early:
                self._early[key] = []
                self._make_queue_soon(key)

    def tidy(self) -> None:
        """Close connections that are not needed, and forget devices without any."""
        if not self.settings.keepAlive:
            for device in self._devices.values():
                device.close_idle(asyncio.get_running_loop().time() - DEVICE_IDLE_SECS)
        for key in [key for key, device in self._devices.items() if not device.users and not device.connections]:
            del self._devices[key]

    def close(self) -> None:
        """Send nothing more: what is stored is on disk, and who waits is told."""
        self.open = False
        waiting = [exchange for device in self._devices.values() for exchange in device.pending.values()]
        for channel in self._channels.values():
            waiting += [exchange for exchange, _ in channel.pushes] if isinstance(channel, Hl7Channel) else []
        for exchange in waiting:
            if not exchange.answer.done():
                exchange.answer.set_exception(DeviceError("the agent is stopping", "device-unreachable"))
        for device in self._devices.values():
            device.close_idle(math.inf)

    @property
    def client_count(self) -> int:
        return sum(len(device.connections) for device in self._devices.values())

    def stats(self) -> Json:
        """Round trips per device (operations contract 8)."""
        return {
            f"{key}?encoding={device.encoding}": {
                "rtt": percentiles(device.round_trips) | {"pendingCount": len(device.pending)}
            }
            for key, device in self._devices.items()
        }


def _push_bytes(push: Push) -> bytes:
    """The bytes for a raw device: hex unless the device's bodyEncoding says text; text that is no hex is text."""
    if push.target.settings.bodyEncoding == "hex":
        with contextlib.suppress(ValueError):
            return bytes.fromhex(push.text)
    return push.text.encode(push.target.settings.encoding, "replace")


async def ping(host: str, count: int) -> str:
    """Echo requests to an IPv4 or IPv6 address or a host name, as `ping` prints them; raises PingError."""
    import icmplib  # 4 MB that only a ping needs

    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError:
        raise PingError(f"Unable to ping {host}: the name is unknown") from None
    address = found[0][4][0]
    interval, timeout = min(1.0, PING_SECS / 2 / count), min(2.0, PING_SECS / 3 / count)
    for privileged in (False, True):  # a datagram socket where users may have one, else a raw one where we may
        try:
            pinging = icmplib.async_ping(address, count, interval, timeout, privileged=privileged)
            result = await asyncio.wait_for(pinging, PING_SECS)
            break
        except TimeoutError:
            raise PingError(f"Command failed: ping -c {count} {host}: no answer within {PING_SECS:g} s") from None
        except icmplib.SocketPermissionError:
            continue
        except icmplib.ICMPLibError as error:
            raise PingError(f"Unable to ping {host}: {error}") from None
    else:
        return await _system_ping(host, count)
    text = _ping_text(host, result)
    if not result.is_alive:
        raise PingError(f"Command failed: ping -c {count} {host}\n{text}")
    return text


def _ping_text(host: str, result: icmplib.Host) -> str:
    times = result.rtts
    lines = [f"PING {host} ({result.address}) 56(84) bytes of data."]
    lines += [f"64 bytes from {result.address}: icmp_seq={n} time={ms:.3g} ms" for n, ms in enumerate(times, 1)]
    sent, received = result.packets_sent, result.packets_received
    lost = round(100 * result.packet_loss)
    lines += ["", f"--- {host} ping statistics ---"]
    lines += [f"{sent} packets transmitted, {received} received, {lost}% packet loss, time {sum(times):.0f}ms"]
    if times:
        deviation = math.sqrt(sum((ms - result.avg_rtt) ** 2 for ms in times) / len(times))
        figures = (result.min_rtt, result.avg_rtt, result.max_rtt, deviation)
        lines.append("rtt min/avg/max/mdev = " + "/".join(f"{ms:.3f}" for ms in figures) + " ms")
    return "\n".join(lines)


async def _system_ping(host: str, count: int) -> str:
    """Where a process may not send ICMP itself: the operating system's program."""
    if host.startswith("-") or (program := shutil.which("ping")) is None:
        raise PingError(f"Unable to ping {host}: this user may not send ICMP, and there is no ping program")
    flag = "/n" if sys.platform == "win32" else "-c"
    interval = () if sys.platform == "win32" else ("-i", f"{max(0.2, min(1.0, PING_SECS / 2 / count)):.1f}")
    process = await asyncio.create_subprocess_exec(
        program, flag, str(count), *interval, host, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), PING_SECS)
    except TimeoutError:
        process.kill()
        raise PingError(f"Command failed: ping {flag} {count} {host}: no answer within {PING_SECS:g} s") from None
    if process.returncode:
        raise PingError(f"Command failed: ping {flag} {count} {host}\n{errors.decode('utf-8', 'replace')}")
    return output.decode("utf-8", "replace").strip()


def parse_ping(host: object, body: object) -> tuple[str, int]:
    """Host and count of a ping request (uplink contract 4.9); raises PingError."""
    name = str(host or "").strip().strip("[]")
    with contextlib.suppress(ValueError):
        name = str(ipaddress.ip_address(name))
    if not is_host(name):
        raise PingError(f"Invalid IP address or host name: '{name[:80]}'")
    words = str(body or "").split()
    if not words or not words[0].startswith("PING") or len(words) < 2:
        return name, 1
    if not (match := re.match(r"[+-]?\d+", words[1])):
        raise PingError(f'Unable to ping {name} "{words[1]}" times. "{words[1]}" is not a number.')
    count = int(match.group())
    if not 1 <= count <= PING_MAX:
        raise PingError(f"Unable to ping {name} {count} times: the count must be from 1 to {PING_MAX}")
    return name, count


# =====================================================================================================================
# DICOM
#
# Imaging devices (DICOM PS3.4, PS3.7, PS3.8; channel contract 8). pynetdicom carries the associations, each in threads
# of its own; it is loaded only where a channel or a push needs it. Handlers run in those threads: they write to the
# spool and ask the event loop for everything else. An object is on disk, file and row, before it is answered 0x0000.
# What a device asks (C-FIND, C-MOVE, C-GET) the Bot answers while the device waits. May touch: sockets, threads, spool.
# =====================================================================================================================

# PS3.4 B.2.3, C.4.1 to C.4.3 and PS3.7 annex C
SUCCESS, PENDING_MATCH, CANCELLED = 0x0000, 0xFF00, 0xFE00
PROCESSING_FAILURE, NO_SUCH_INSTANCE, NO_SUCH_ACTION, RESOURCE_LIMITATION = 0x0110, 0x0112, 0x0123, 0x0213
OUT_OF_RESOURCES, SOP_MISMATCH, CANNOT_UNDERSTAND, UNABLE_TO_PROCESS = 0xA700, 0xA900, 0xC000, 0xC001

COMMITMENT_CLASS, COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"  # PS3.4 J.3
MPPS_CLASS = "1.2.840.10008.3.1.2.3.3"  # PS3.4 F.7
WORKLIST_CLASS = "1.2.840.10008.5.1.4.31"  # PS3.4 K.6.1
_QUERY_ROOTS = {"PATIENT": "1.2.840.10008.5.1.4.1.2.1", "STUDY": "1.2.840.10008.5.1.4.1.2.2"}  # PS3.4 C.6
_QUERY_COMMANDS = {"C-FIND": 1, "C-MOVE": 2, "C-GET": 3}  # last part of the UID
SERVICE_CLASSES = (
    "1.2.840.10008.1.1", COMMITMENT_CLASS, MPPS_CLASS, WORKLIST_CLASS,
    *(f"{root}.{last}" for root in _QUERY_ROOTS.values() for last in _QUERY_COMMANDS.values()),
)  # fmt: skip
IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
UNCOMPRESSED = (EXPLICIT, IMPLICIT, BIG_ENDIAN)
_PIXEL_DATA = frozenset({"7FE00008", "7FE00009", "7FE00010"})


class Refusal(PeerError):
    """A DIMSE request that is not done: the status and comment of its answer."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


_IMAGING = threading.Lock()


def imaging() -> types.SimpleNamespace:
    """pynetdicom, set up for us, and our classes on top of it."""
    with _IMAGING:
        return _load_imaging()


async def load_imaging() -> None:
    """Load it in a thread: it takes longer than a device should wait for an ACK."""
    if not _load_imaging.cache_info().currsize:
        await asyncio.to_thread(imaging)


@functools.cache
def _load_imaging() -> types.SimpleNamespace:
    """16 MB and 130 ms that only imaging needs."""
    sys.modules.setdefault("pydicom.examples", types.ModuleType("pydicom.examples"))  # wants files a binary has not
    import pydicom
    import pydicom.config
    import pynetdicom
    from pynetdicom import _config, association, dimse_messages, evt, pdu_primitives, presentation, sop_class, transport

    for name in ("pydicom", "pynetdicom"):  # their words may quote a patient; what matters we log ourselves
        logger = logging.getLogger(name)
        logger.addHandler(logging.NullHandler())
        logger.propagate, logger.level = False, logging.CRITICAL
        warnings.filterwarnings("ignore", module=name)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # devices deviate: it goes up as it is
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    _config.LOG_HANDLER_LEVEL = "none"
    _config.LOG_REQUEST_IDENTIFIERS = _config.LOG_RESPONSE_IDENTIFIERS = False
    _config.STORE_RECV_CHUNKED_DATASET = _config.STORE_SEND_CHUNKED_DATASET = True
    _config.UNRESTRICTED_STORAGE_SERVICE = True  # every storage SOP class, also private ones; first syntax proposed
    _config.CODECS = ("ascii", "latin-1")
    vars(dimse_messages)["NamedTemporaryFile"] = _received_object
    sock = _socket_class(transport.AssociationSocket, pdu_primitives.P_DATA)
    return types.SimpleNamespace(
        pydicom=pydicom, evt=evt, Association=association.Association, Socket=sock,
        Entity=_entity_class(pynetdicom.AE, sock), Address=transport.AddressInformation,
        context=presentation.build_context, role=presentation.build_role, Dataset=pydicom.Dataset,
        Release=pdu_primitives.A_RELEASE,
        # storage without a patient (palettes, protocols: PS3.4 GG), which pynetdicom does not count as storage
        other_storage=[
            presentation.build_context(uid, pynetdicom.ALL_TRANSFER_SYNTAXES)
            for uid in sop_class._NON_PATIENT_OBJECT_CLASSES.values()
        ],
    )  # fmt: skip


def _received_object(**_: object) -> SpoolFile:
    """Called by pynetdicom in the thread of an association, for what it receives an object into."""
    association = typing.cast(Any, threading.current_thread()).assoc
    file = SpoolFile(association.ae.spool)
    vars(association)["files"] = [other for other in vars(association).get("files", ()) if not other.closed] + [file]
    return file


_INVALID_PDU = bytes((7, 0, 0, 0, 0, 4, 0, 0, 2, 6))  # A-ABORT by the provider, invalid PDU parameter (PS3.8 9.3.8)


def _socket_class(base: type[AssociationSocket], data: type[Any]) -> type[AssociationSocket]:
    class Socket(base):  # type: ignore[valid-type, misc]
        """Reads in large pieces, and sleeps until there is something to do (pynetdicom looks 1,000 times a second)."""

        def __init__(self, assoc: Any, **options: Any):
            super().__init__(assoc, **options)
            self.received = 0  # bytes
            self._bell, self._ear = socket.socketpair()
            self._bell.setblocking(False)
            self._queued: Callable[[Any], None] = assoc.dul.send_pdu
            vars(assoc.dul)["send_pdu"] = self._send_pdu

        def _send_pdu(self, primitive: Any) -> None:
            dul = self.assoc.dul
            while isinstance(primitive, data) and dul.to_provider_queue.qsize() > QUEUED_PDUS and dul.is_alive():
                time.sleep(0.001)  # a large object must not be in memory as a whole
            self._queued(primitive)
            with contextlib.suppress(OSError):
                self._bell.send(b"!")

        def recv(self, nr_bytes: int) -> bytearray:
            self.received += nr_bytes
            if nr_bytes > PDU_BYTES:
                self.socket.sendall(_INVALID_PDU)
                raise OSError("the PDU is too large")
            PRECEDENCE.give_way()
            content, at = bytearray(nr_bytes), 0
            with memoryview(content) as view:
                while at < nr_bytes and (count := self.socket.recv_into(view[at : at + READ_BYTES])):
                    at += count
            del content[at:]
            return content

        @property
        def ready(self) -> bool:
            sock = self.socket
            if sock is None or not self._is_connected:
                return False
            try:
                return _wait_for(sock, self._ear)
            except (OSError, ValueError):
                self.event_queue.put("Evt17")  # PS3.8 9.2: transport connection closed
                return False

        def close(self) -> None:
            super().close()
            self._bell.close()
            self._ear.close()

    return Socket


def _entity_class(base: type[AE], sock: type[AssociationSocket]) -> type[AE]:
    class Entity(base):  # type: ignore[valid-type, misc]
        """A local application entity; `spool` is where its associations receive objects."""

        def __init__(self, title: str, spool: Spool):
            super().__init__(title)
            self.spool = spool
            self.dimse_timeout = DIMSE_SECS

        def _create_socket(self, assoc: Any, address: Any, tls_args: Any) -> AssociationSocket:
            found = sock(assoc, address=address)
            found.tls_args = tls_args
            return found

    return Entity


def _wait_for(sock: socket.socket, ear: socket.socket) -> bool:
    """Whether there is something to read on `sock`; waits a moment, unless `ear` hears the bell."""
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return True
    found = _readable([sock, ear], IDLE_POLL_SECS)
    if ear in found:
        ear.recv(4096)
    return sock in found


def _readable(socks: Sequence[socket.socket], seconds: float) -> set[Any]:
    """Those with something to read; select() cannot take descriptors above 1023, which a busy agent has."""
    if not hasattr(select, "poll"):
        return set(select.select(socks, [], [], seconds)[0])
    poller = select.poll()
    by_number = {sock.fileno(): sock for sock in socks}
    for number in by_number:
        poller.register(number, select.POLLIN)
    return {by_number[number] for number, _ in poller.poll(seconds * 1000)}


# --- data sets as JSON -----------------------------------------------------------------------------------------------


def dicom_json(dataset: Dataset, omitted: list[str], large: int = LARGE_VALUE_BYTES) -> Json:
    """The DICOM JSON Model (PS3.18 F.2) of a data set; tags that cannot be part of it are added to `omitted`.

    Pixel data is never part of it; neither are binary values larger than INLINE_BYTES, nor any of `large` bytes.
    """
    found: Json = {}
    for tag in dataset.keys():  # noqa: SIM118 - iterating over the data set itself would read every value
        key = f"{tag:08X}"
        if key in _PIXEL_DATA:
            continue
        PRECEDENCE.give_way()
        raw = dataset.get_item(tag)
        element = None
        if getattr(raw, "length", 0) not in range(large, 0xFFFFFFFF):
            try:
                element = _without_bulk(dataset[tag].to_json_dict(lambda bulk: "", INLINE_BYTES))
                dump_json([element])
            except Exception:  # whatever a device's value is that pydicom cannot read or JSON cannot write
                element = _as_text(tag, raw)
        if element is None:
            omitted.append(key)
        else:
            found[key] = element
    return found


def _as_text(tag: int, raw: Any) -> Json | None:
    """A number that is none, as the text that it is (PS3.18 F.2.3.1 allows that); None for anything else."""
    vr, value = getattr(raw, "VR", None), getattr(raw, "value", None)
    with contextlib.suppress(KeyError, UnicodeError):
        vr = vr or imaging().pydicom.datadict.dictionary_VR(tag)
        if vr in ("IS", "DS") and isinstance(value, bytes):
            return {"vr": vr, "Value": [part.strip() for part in value.decode("ascii").rstrip(" \0").split("\\")]}
    return None


def _without_bulk(element: Json) -> Json | None:
    """An element of DICOM JSON without values too large to be inline; None when nothing is left of it."""
    if "BulkDataURI" in element:
        return None
    if element.get("vr") != "SQ":
        return element
    items = [
        {key: kept for key, inner in item.items() if key not in _PIXEL_DATA and (kept := _without_bulk(inner))}
        for item in element.get("Value", [])
    ]
    return element | {"Value": items}


def fitted(body: Json) -> str:
    """The body as JSON text, without its largest elements if the server would not take the frame otherwise."""
    text = dump_json(body).decode()
    if len(text) < BODY_BYTES // 2 or len(dump_json(text)) <= BODY_BYTES:
        return text
    sizes = sorted(((len(dump_json(dump_json(value).decode())), key) for key, value in body["dataset"].items()))
    excess = len(dump_json(text)) - BODY_BYTES
    while excess > 0 and sizes:
        size, key = sizes.pop()
        del body["dataset"][key]
        body.setdefault("omitted", []).append(key)
        excess -= size
    return dump_json(body).decode()


def dataset_of(elements: object) -> Dataset:
    """A data set from DICOM JSON; ValueError when it is none."""
    if not isinstance(elements, dict):
        raise ValueError("a data set in DICOM JSON is an object")
    try:
        dataset: Dataset = imaging().Dataset.from_json(elements)
        if "00080005" not in elements and not dump_json(elements).isascii():
            dataset.SpecificCharacterSet = "ISO_IR 192"
        return dataset
    except Exception as error:
        raise ValueError(f"not a data set in DICOM JSON ({type(error).__name__})") from None


def bot_words(text: object) -> Any:
    """What a Bot answered to a device's request; Refusal for nothing and for what is no JSON.

    A Bot that returns an object has it as the body, one that returns a string of JSON that string (uplink contract 5).
    """
    if text in (None, "") or (isinstance(text, str) and text.startswith(BOT_LOG)):
        raise Refusal(UNABLE_TO_PROCESS, "the Bot returned nothing")
    try:
        words = load_json(text) if isinstance(text, str) else text
    except ValueError:
        raise Refusal(UNABLE_TO_PROCESS, "the Bot's answer is not JSON") from None
    if isinstance(words, dict) and (status := dimse_status(words.get("status", 0))):
        raise Refusal(status, str(words.get("comment") or "the Bot refused the request"))
    return words


def dimse_status(value: object) -> int:
    """A status as a Bot writes it: 49153 or "0xC001"; what is no status is a failure."""
    try:
        status = int(value, 0) if isinstance(value, str) else int(typing.cast(Any, value))
        return status if 0 <= status <= 0xFFFF else UNABLE_TO_PROCESS
    except (ValueError, TypeError):
        return UNABLE_TO_PROCESS


def reference_of(item: object) -> str:
    """`Binary/<id>` from a reference or from an object with one; ValueError."""
    if isinstance(item, dict):
        item = item.get("reference") or (item.get("binary") or {}).get("reference")
    if not isinstance(item, str) or not re.fullmatch(r"Binary/[A-Za-z0-9.-]{1,64}", item):
        raise ValueError("a reference to a Binary is needed, such as Binary/123")
    return item


# --- objects from the server to an application entity ----------------------------------------------------------------


def fetched(file: SpoolFile | None) -> Dataset:
    """A stand-in that pynetdicom hands through to `send_object`; None for a file that could not be fetched."""
    stand_in: Dataset = imaging().Dataset()
    stand_in.SOPInstanceUID = ""
    if file is not None:
        with contextlib.suppress(Exception):  # what is no DICOM file is found when it is sent
            read = imaging().pydicom.dcmread(file.name, specific_tags=["SOPInstanceUID"], stop_before_pixels=True)
            stand_in.SOPInstanceUID = read.SOPInstanceUID
    vars(stand_in)["file"] = file
    return stand_in


def send_object(association: Association, stand_in: Dataset, **options: Any) -> Dataset:
    """C-STORE a fetched file, as it is where the peer takes its transfer syntax; returns the status data set."""
    file: SpoolFile | None = vars(stand_in)["file"]
    if file is None:
        raise ValueError("it could not be fetched")
    send = imaging().Association.send_c_store
    try:
        return typing.cast("Dataset", send(association, file.name, **options))
    except ValueError:  # no presentation context for it as it is: in another uncompressed syntax
        return typing.cast("Dataset", send(association, imaging().pydicom.dcmread(file.name), **options))
    finally:
        file.discard()


class Sender:
    """Objects to one application entity, over associations made as the objects need them.

    It takes the place of an association in pynetdicom's C-MOVE: what an object needs is known when it is there.
    """

    is_established = True

    def __init__(
        self, associate: Callable[..., Any], peer: Peer, title: str,
        tls: tuple[ssl.SSLContext, str] | None = None, originator: str | None = None,
    ):  # fmt: skip
        self._associate = functools.partial(associate, peer.host, peer.port, ae_title=title, tls_args=tls)
        self._association: Association | None = None
        self._contexts: dict[tuple[str, str], Any] = {}
        self._originator = originator  # of a C-MOVE: who asked for it
        self.problem: DeviceError | None = None  # the peer cannot be associated with: nothing more is tried

    def send_c_store(self, stand_in: Dataset, **options: Any) -> Dataset:
        """The status data set of the peer's answer; DeviceError, or ValueError for what cannot be sent to it."""
        file: SpoolFile | None = vars(stand_in)["file"]
        if self._originator:
            options["originator_aet"] = self._originator
        try:
            if file is None or self.problem is not None:
                raise self.problem or ValueError("it could not be fetched")
            meta = imaging().pydicom.filereader.read_file_meta_info(file.name)
            return send_object(self._with(meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID), stand_in, **options)
        finally:
            if file is not None:
                file.discard()

    def _with(self, sop_class: str, syntax: str) -> Association:
        """An association with the contexts for this kind of object, besides those needed so far (at most 128)."""
        if self._association and (sop_class, syntax) in self._contexts and self._association.is_established:
            return self._association
        self.release()
        if len(self._contexts) > 120:
            self._contexts.clear()
        for one in {syntax, IMPLICIT} if syntax in UNCOMPRESSED else {syntax}:
            self._contexts[sop_class, one] = imaging().context(sop_class, one)
        self._association = made = typing.cast("Association", self._associate(contexts=list(self._contexts.values())))
        if not made.is_established:
            problem = DeviceError(association_problem(made), _rejection_kind(made))
            if made.is_rejected or not made.acceptor.primitive:
                self.problem = problem
            raise problem
        return made

    def release(self) -> None:
        if self._association is not None:
            self._association.release()


def association_problem(association: Association) -> str:
    """Why an association was not made."""
    answer = typing.cast(Any, association.acceptor.primitive)
    if answer is None:
        return "it cannot be reached"
    if association.is_rejected:
        return f"the association was rejected: {answer.reason_str}"
    if association.rejected_contexts and not association.accepted_contexts:
        return "it does not accept what is needed: " + ", ".join(
            sorted({context.abstract_syntax.name for context in association.rejected_contexts})  # type: ignore[union-attr]
        )
    return "the association was aborted"


# --- the channel -----------------------------------------------------------------------------------------------------


def _shut_down(sock: socket.socket | None) -> None:
    """End a connection whose other side may not read what it is sent."""
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


class _Handover(asyncio.Protocol):
    """Takes a new connection out of the event loop: its association lives in threads."""

    def __init__(self, channel: DicomChannel):
        self._channel = channel

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peer = transport.get_extra_info("peername")
        # What the transport closes, and on Windows shuts down, is then no longer the connection.
        sock = socket.socket(fileno=transport.get_extra_info("socket")._sock.detach())
        typing.cast(asyncio.Transport, transport).abort()
        self._channel.accept(sock, peer)


class DicomChannel(Channel):
    """One DICOM channel: objects, queries, procedure steps and commitment requests of imaging devices."""

    def __init__(self, plan: ChannelPlan, store: Store, log: Log, channel_log: Log, fhir: Fhir, dispatcher: Dispatcher):
        super().__init__(plan, store, log, channel_log)
        self._fhir, self._dispatcher = fhir, dispatcher
        self._waiting: dict[int, concurrent.futures.Future[str]] = {}  # devices that wait for the Bot, by message
        self._committing: dict[int, Association] = {}  # where a commitment was asked for, by message
        self._reports: set[asyncio.Future[None]] = set()
        self._threads = ThreadPoolExecutor(4, "commitment")
        self.associations: set[Association] = set()
        self._entity = imaging().Entity("MEDPLUM", store.spool)
        self._associate = self._entity.associate
        vars(self._entity)["associate"] = lambda *_, sender, **__: sender  # what C-MOVE takes for its association
        self.replan(plan)

    @property
    def settings(self) -> DicomSettings:
        return typing.cast(DicomSettings, self.plan.settings)

    def replan(self, plan: ChannelPlan) -> None:
        """New associations get the new settings."""
        super().replan(plan)
        s, library, entity = self.settings, imaging(), self._entity
        entity.ae_title = s.calledAeTitle or "MEDPLUM"
        entity.require_calling_aet, entity.require_called_aet = ae_titles(s.callingAeTitles), bool(s.calledAeTitle)
        entity.maximum_associations, entity.maximum_pdu_size = s.maxConnections, s.maxPdu
        entity.acse_timeout, entity.network_timeout = s.associationTimeoutSecs, s.idleTimeoutSecs or None
        self._contexts = [library.context(uid, list(UNCOMPRESSED)) for uid in SERVICE_CLASSES] + library.other_storage
        self._peers, self._destinations = networks(s.peers), destinations(s.moveDestinations)

    def stop(self) -> None:
        super().stop()
        for association in self.associations:
            with contextlib.suppress(Exception):  # one that ends just now
                association.abort(block=False)
                self.loop.call_later(1, _shut_down, typing.cast(Any, association.dul.socket).socket)

    # --- associations ---

    def connect(self) -> asyncio.Protocol:
        return _Handover(self)

    def incoming(self) -> asyncio.BaseProtocol:
        return self.connect()  # TLS is the matter of the association's thread

    def accept(self, sock: socket.socket, peer: tuple[Any, ...]) -> None:
        """A device connected: its association runs in threads until it ends."""
        host = ipaddress.ip_address(str(peer[0]).removeprefix("::ffff:").split("%")[0])
        open_ = len(self.associations)
        if self._peers and not any(host in network for network in self._peers):
            self._warn(f"{host} was turned away: it is not among peers")
        elif open_ > 2 * self.settings.maxConnections + 10:  # those within get a proper rejection
            self._warn(f"{host} was turned away: {open_} connections are open (maxConnections)")
        else:
            try:
                association = self._association(sock, peer)
                association.start()
                self.associations.add(association)
                return
            except (OSError, RuntimeError) as error:  # out of descriptors or threads
                self._warn(f"{host} was turned away: {error}")
        sock.close()

    def _association(self, sock: socket.socket, peer: tuple[Any, ...]) -> Association:
        library, entity = imaging(), self._entity
        set_device_options(sock)
        sock.settimeout(self.settings.handshakeTimeoutSecs)
        association = library.Association(entity, "acceptor")
        association.set_socket(library.Socket(association, client_socket=sock))
        acceptor = association.acceptor
        acceptor.maximum_length, acceptor.ae_title = self.settings.maxPdu, entity.ae_title
        acceptor.implementation_class_uid = entity.implementation_class_uid
        acceptor.implementation_version_name = entity.implementation_version_name
        acceptor.supported_contexts = self._contexts
        acceptor.address_info = library.Address.from_tuple(sock.getsockname())
        association.requestor.address_info = library.Address.from_tuple(peer)
        for event, handler in self._handlers:
            association.bind(getattr(library.evt, event), handler)
        vars(association)["send_c_store"] = functools.partial(send_object, association)  # for C-GET
        vars(association)["run"] = functools.partial(self._run, association, sock)
        self._wait_for_messages(association)
        self._end_on_nonsense(association)
        return typing.cast("Association", association)

    def _run(self, association: Association, sock: socket.socket) -> None:
        """The thread of an association."""
        wrapper = typing.cast(Any, association.dul.socket)
        try:
            if self.settings.tls:
                if self.tls is None:
                    raise OSError("there is no certificate")
                wrapper.socket = sock = self.tls.wrap_socket(sock, server_side=True)
            sock.settimeout(self.settings.frameTimeoutSecs or None)
        except OSError as error:
            self._tell(f"{association.requestor.address}: TLS failed: {getattr(error, 'reason', '') or error}")
        else:
            threading.Thread.run(association)
            if wrapper.received and association.requestor.primitive is None:
                self._tell(f"{association.requestor.address} sent no association request: is this the right port?")
        finally:
            wrapper.close()
            sock.close()
            for file in vars(association).get("files", ()):
                file.discard()  # what came of an object whose sender went away
            with contextlib.suppress(RuntimeError):  # the agent has stopped
                self.loop.call_soon_threadsafe(self.associations.discard, association)

    @staticmethod
    def _wait_for_messages(association: Any) -> None:
        """pynetdicom asks its queues 1,000 times a second; waiting for them instead makes idle devices free.

        The peer's answers to requests of ours go to who waits for them: the reactor would drop them.
        """
        dimse, dul = association.dimse, association.dul
        to_user, requests, answers = dul.to_user_queue.put, dimse.msg_queue.put, queue.SimpleQueue[Any]()

        def arrived(item: tuple[Any, Any]) -> None:
            is_answer = getattr(item[1], "MessageIDBeingRespondedTo", None) is not None
            if is_answer or item[1] is None:  # None: the association has ended
                answers.put(item)
            if not is_answer:
                requests(item)

        def get_msg(block: bool = False) -> Any:
            try:
                if block:
                    return answers.get(timeout=dimse.dimse_timeout)
                return dimse.msg_queue.get(timeout=IDLE_POLL_SECS)
            except queue.Empty:
                return None, None

        def put(primitive: Any, *options: Any) -> None:
            to_user(primitive, *options)
            if isinstance(primitive, imaging().Release):
                requests((None, None))  # the reactor looks for it now

        serve, turn = association._serve_request, threading.Lock()

        def serve_request(message: Any, context: int) -> None:
            """A report of ours comes after the answer to what is being served, and not in the middle of another."""
            association._is_paused = True  # for pynetdicom: a report that is under way may go on
            with turn:
                serve(message, context)

        vars(dimse)["get_msg"], vars(dul.to_user_queue)["put"], vars(dimse.msg_queue)["put"] = get_msg, put, arrived
        vars(association)["_serve_request"], vars(association)["turn"] = serve_request, turn

    @staticmethod
    def _end_on_nonsense(association: Any) -> None:
        """What pynetdicom does not expect would end its thread and leave the device waiting: end the association."""
        dimse, dul = association.dimse, association.dul
        received, act = dimse.receive_primitive, dul.state_machine.do_action

        def receive_primitive(primitive: Any) -> None:
            try:
                for context, _ in primitive.presentation_data_value_list:
                    current = getattr(dimse.message, "context_id", None)  # known when its command is complete
                    if current not in (None, context) or context not in association._accepted_cx:
                        raise ValueError("a fragment of another message or of no accepted context")
                received(primitive)
            except Exception:
                dul.event_queue.put("Evt19")  # PS3.8 9.2: abort

        def do_action(event: str) -> None:
            try:
                act(event)
            except Exception:
                association._kill = dul._kill_thread = True
                dul.socket.send(_INVALID_PDU)
                dul.socket.close()

        vars(dimse)["receive_primitive"], vars(dul.state_machine)["do_action"] = receive_primitive, do_action

    @functools.cached_property
    def _handlers(self) -> Sequence[tuple[str, Callable[[Event], Any]]]:
        return (
            ("EVT_C_STORE", self._stored_object), ("EVT_C_FIND", self._find), ("EVT_C_MOVE", self._move),
            ("EVT_C_GET", self._get), ("EVT_N_ACTION", self._action), ("EVT_N_CREATE", self._step),
            ("EVT_N_SET", self._step), ("EVT_REJECTED", self._rejected), ("EVT_ABORTED", self._aborted),
        )  # fmt: skip

    def _rejected(self, event: Event) -> None:
        request = typing.cast(Any, event.assoc.requestor.primitive)
        calling, called, s = request.calling_ae_title, request.called_ae_title, self.settings
        if s.calledAeTitle and called != s.calledAeTitle:
            reason = f"it calls '{called}', and calledAeTitle is '{s.calledAeTitle}'"
        elif s.callingAeTitles and calling not in ae_titles(s.callingAeTitles):
            reason = "it is not among callingAeTitles"
        else:
            reason = f"{s.maxConnections} associations are open (maxConnections)"
        self._tell(f"the association of '{calling}' at {event.assoc.requestor.address} was rejected: {reason}")

    def _aborted(self, event: Event) -> None:
        self._log.debug(f"Channel '{self.plan.name}': an association of {event.assoc.requestor.ae_title} was aborted.")

    def _refused(self, event: Event, refusal: Refusal) -> Dataset:
        """The status of the answer to a request that is not done."""
        what = f"status 0x{refusal.status:04X}"
        self._tell(f"a request of '{event.assoc.requestor.ae_title}' was answered with {what}; see the channel log")
        self.loop.call_soon_threadsafe(self._note, f"[Refused]: {what}: {refusal}")
        answer: Dataset = imaging().Dataset()
        answer.Status, answer.ErrorComment = refusal.status, str(refusal)[:64]
        return answer

    # --- objects ---

    def _stored_object(self, event: Event) -> Dataset | int:
        """C-STORE (PS3.4 B.2.3)."""
        request = typing.cast(Any, event.request)
        file: SpoolFile | None = request._dataset_file
        try:
            message = self._image(event, request, file)
            if file is not None:
                message.spool, message.prepared = file.keep(), False
            if refusal := self._keep(message):
                self.store.spool.remove(message.spool or "")
                raise Refusal(OUT_OF_RESOURCES, refusal)
            return SUCCESS
        except Refusal as refusal_:
            return self._refused(event, refusal_)
        except OSError as error:
            return self._refused(event, Refusal(OUT_OF_RESOURCES, _storage_text(error)))
        finally:
            if file is not None:
                file.discard()  # what was kept has another name by now

    def _image(self, event: Event, request: Any, file: SpoolFile | None) -> Message:
        """The message of a received object; its file gets its name from what is received."""
        body: Json = {"association": association_json(event)}
        study = ""
        if file is not None:
            limit = self.settings.maxMessageBytes
            if file.error or (limit and file.size > limit):
                raise Refusal(OUT_OF_RESOURCES, file.error or f"larger than {limit} bytes (maxMessageBytes)")
            study, omitted = self._describe(Path(file.name), request, body)
            body["binary"] = {"reference": spool_reference(Path(file.name).stem)}
            if omitted:
                body["omitted"] = omitted
        uid = str(request.AffectedSOPInstanceUID)
        return self._new_message(event, "C-STORE", uid, study or uid, body)

    @staticmethod
    def _describe(path: Path, request: Any, body: Json) -> tuple[str, list[str]]:
        """Add the data set to the body; returns the Study Instance UID and what was left out."""
        omitted: list[str] = []
        try:
            dataset = imaging().pydicom.dcmread(path, defer_size=LARGE_VALUE_BYTES, stop_before_pixels=True, force=True)
            cut = _is_cut(dataset)
            body["dataset"] = dicom_json(dataset.file_meta, []) | dicom_json(dataset, omitted)
            uids = [str(dataset.get(key, "") or "") for key in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID")]
        except Exception:
            raise Refusal(CANNOT_UNDERSTAND, "the data set cannot be read") from None
        if not set(body["dataset"]) - set(omitted) - {key for key in body["dataset"] if key < "0003"}:
            raise Refusal(CANNOT_UNDERSTAND, "the data set cannot be read")
        commanded = request.AffectedSOPClassUID, request.AffectedSOPInstanceUID
        for what, found, command in zip(("class", "instance"), uids, commanded, strict=False):
            if found and found != command:
                if cut:
                    raise Refusal(CANNOT_UNDERSTAND, "the data set is cut off")
                raise Refusal(SOP_MISMATCH, f"the SOP {what} UID of the data set is not that of the request")
        return uids[2], omitted

    def _new_message(self, event: Event, command: str, uid: str, key: str, body: Json) -> Message:
        if self.feed is None:
            raise Refusal(OUT_OF_RESOURCES, self.store.trouble or "the channel is starting")
        text = fitted(body)
        message = Message(self.feed.row.id, event.assoc.requestor.ae_title, text.encode(), "utf-8")
        message.epoch, message.type, message.control_id = self.feed.row.epoch, command, uid
        message.key = "" if self.plan.key_spec == "*" else key
        message.text = text
        return message

    def _keep(self, message: Message, then: Callable[[], None] = lambda: None) -> str:
        """Store a message, from the thread of an association; why it was refused, or ``.

        `then` runs in the event loop when the message is on disk, before it may be sent.
        """
        done: concurrent.futures.Future[str] = concurrent.futures.Future()

        def stored(message: Message) -> None:
            if not message.refusal and self.feed is not None:
                self._note(f"[Received {message.type}]: {message.control_id} from {message.remote}")
                then()
                self.feed.stored(message)
            done.set_result(message.refusal or "")

        def put() -> None:
            message.source = stored
            self.store.put(message)

        self.loop.call_soon_threadsafe(put)
        try:
            return done.result(STORE_WAIT_SECS)
        except TimeoutError:  # it may still be stored: what belongs to it stays
            raise Refusal(OUT_OF_RESOURCES, f"not on disk within {STORE_WAIT_SECS:g} s") from None

    # --- questions ---

    def _ask(self, event: Event, command: str, **more: str) -> Any:
        """The Bot's answer to a query, as JSON; Refusal when there is none, also when the device cancels."""
        try:
            identifier = event.identifier
            worklist = event.context.abstract_syntax == WORKLIST_CLASS
            level = "WORKLIST" if worklist else identifier.get("QueryRetrieveLevel", "")
            omitted: list[str] = []
            dataset = dicom_json(identifier, omitted)
        except Exception:
            raise Refusal(CANNOT_UNDERSTAND, "the identifier cannot be read") from None
        request = typing.cast(Any, event.request)
        body = {
            "association": association_json(event), "command": command,
            "sopClassUid": str(request.AffectedSOPClassUID), "level": str(level), "dataset": dataset, **more,
        }  # fmt: skip
        if omitted and command != "C-FIND":  # more would be retrieved than was asked for
            raise Refusal(CANNOT_UNDERSTAND, f"the identifier has unreadable values: {', '.join(omitted)}")
        body |= {"omitted": omitted} if omitted else {}
        text, calling = dump_json(body).decode(), event.assoc.requestor.ae_title
        if len(dump_json(text)) > BODY_BYTES:
            raise Refusal(UNABLE_TO_PROCESS, "the identifier is larger than the server takes")
        self.loop.call_soon_threadsafe(self._note, f"[Received {command}]: {text}")
        seconds = self.settings.responseTimeoutSecs
        asking = self._dispatcher.ask(self.plan.name, calling, text, seconds)
        answer = asyncio.run_coroutine_threadsafe(asking, self.loop)
        while not concurrent.futures.wait([answer], CANCEL_POLL_SECS).done:
            if event.is_cancelled or event.assoc.acse.is_aborted():
                answer.cancel()
                raise Refusal(CANCELLED, "cancelled by the device")
        try:
            return bot_words(_answer_body(answer.result()))
        except TimeoutError:
            raise Refusal(UNABLE_TO_PROCESS, f"the Bot did not answer within {seconds:g} s") from None
        except ServerError as error:
            raise Refusal(UNABLE_TO_PROCESS, str(error)) from None

    def _find(self, event: Event) -> Iterator[tuple[Any, Any]]:
        """C-FIND (PS3.4 C.4.1, K.4.1)."""
        try:
            words = self._ask(event, "C-FIND")
            matches = words.get("datasets") if isinstance(words, dict) else words
            if not isinstance(matches, list):
                raise Refusal(UNABLE_TO_PROCESS, "the Bot's answer is no list of data sets")
            for elements in matches:
                dataset = dataset_of(elements)
                if event.is_cancelled:
                    raise Refusal(CANCELLED, "cancelled by the device")
                if "QueryRetrieveLevel" in event.identifier and "QueryRetrieveLevel" not in dataset:
                    dataset.QueryRetrieveLevel = event.identifier.QueryRetrieveLevel
                yield PENDING_MATCH, dataset
        except ValueError as error:
            yield self._refused(event, Refusal(UNABLE_TO_PROCESS, f"the Bot's answer is {error}")), None
        except Refusal as refusal:
            yield self._unanswered(event, refusal), None

    def _unanswered(self, event: Event, refusal: Refusal) -> Dataset | int:
        return CANCELLED if refusal.status == CANCELLED else self._refused(event, refusal)

    def _references(self, event: Event, command: str, **more: str) -> list[str]:
        words = self._ask(event, command, **more)
        try:
            return [reference_of(item) for item in (words["binaries"] if isinstance(words, dict) else words)]
        except (ValueError, TypeError, KeyError):
            raise Refusal(UNABLE_TO_PROCESS, "the Bot's answer is no list of references to Binaries") from None

    def _move(self, event: Event) -> Iterator[Any]:
        """C-MOVE (PS3.4 C.4.2): the answers that pynetdicom wants are address, count, and then each object."""
        title = event.move_destination or ""
        peer = self._destinations.get(title)
        if peer is None:
            self._tell(f"'{event.assoc.requestor.ae_title}' asked to move to '{title}': not among moveDestinations")
            yield None, None
            return
        sender = Sender(self._associate, peer, title, originator=event.assoc.requestor.ae_title)
        yield peer.host, peer.port, {"sender": sender}
        yield from self._retrieve(event, "C-MOVE", lambda: sender.problem is None, destination=title)
        if sender.problem is not None:
            self._tell(f"objects could not be moved to '{title}': {sender.problem}")

    def _get(self, event: Event) -> Iterator[Any]:
        """C-GET (PS3.4 C.4.3)."""
        yield from self._retrieve(event, "C-GET", lambda: True)

    def _retrieve(self, event: Event, command: str, worthwhile: Callable[[], bool], **more: str) -> Iterator[Any]:
        """The number of objects, then each as it comes from the server."""
        try:
            references = self._references(event, command, **more)
        except Refusal as refusal:
            yield 1  # pynetdicom takes a failure only where there is something to do
            yield self._unanswered(event, refusal), None
            return
        yield len(references)
        for reference in references:
            if event.is_cancelled or event.assoc.acse.is_aborted():
                yield CANCELLED, None
                return
            yield PENDING_MATCH, fetched(self._fetch(reference) if worthwhile() else None)

    def _fetch(self, reference: str) -> SpoolFile | None:
        """A Binary in a file of the spool; None, with a warning, when it cannot be fetched."""
        file = SpoolFile(self.store.spool)
        try:
            asyncio.run_coroutine_threadsafe(self._fhir.download(reference, file), self.loop).result()
            if not file.error:
                return file
            self._tell(f"{reference} cannot be fetched: {file.error}")
        except (ServerError, ValueError) as error:
            self._tell(f"{reference} cannot be fetched: {error}")
        finally:
            file.close()
        file.discard()
        return None

    # --- procedure steps and storage commitment ---

    def _step(self, event: Event) -> tuple[Any, Any]:
        """MPPS N-CREATE and N-SET (PS3.4 F.7.2): stored; the Bot's answer goes back if it comes in time."""
        request = typing.cast(Any, event.request)
        create = event.event.name == "EVT_N_CREATE"
        given = request.AffectedSOPInstanceUID if create else request.RequestedSOPInstanceUID
        uid = str(given or imaging().pydicom.uid.generate_uid())
        heard: concurrent.futures.Future[str] = concurrent.futures.Future()
        try:
            attributes = event.attribute_list if create else event.modification_list
            command = "N-CREATE" if create else "N-SET"
            message = self._request(event, command, MPPS_CLASS, uid, attributes)
            if refusal := self._keep(message, lambda: self._waiting.update({message.id: heard})):
                raise Refusal(RESOURCE_LIMITATION, refusal)
            answer = self._heard(heard)
        except Refusal as refusal_:
            return self._refused(event, refusal_), None
        finally:
            self.loop.call_soon_threadsafe(self._forget_waiting, heard)
        if create and not given:
            answer.AffectedSOPInstanceUID = uid
        return SUCCESS, answer

    def _request(self, event: Event, command: str, sop_class: str, uid: str, dataset: Dataset, **more: int) -> Message:
        omitted: list[str] = []
        try:
            elements = dicom_json(dataset, omitted, large=UPLINK_FRAME_BYTES)
        except Exception:
            raise Refusal(PROCESSING_FAILURE, "the data set cannot be read") from None
        body = {"association": association_json(event), "command": command, "sopClassUid": sop_class,
                "sopInstanceUid": uid, **more, "dataset": elements}  # fmt: skip
        body |= {"omitted": omitted} if omitted else {}
        return self._new_message(event, command, uid, uid, body)

    def _heard(self, heard: concurrent.futures.Future[str]) -> Dataset:
        """The data set of the Bot's answer; an empty one when it does not come in time, for the request is kept."""
        try:
            words = bot_words(heard.result(self.settings.answerWaitSecs if self._dispatcher.live else 0))
            return dataset_of(words.get("dataset", {}) if isinstance(words, dict) else {})
        except TimeoutError:
            return dataset_of({})
        except ValueError:
            raise Refusal(PROCESSING_FAILURE, "the Bot's answer is no data set in DICOM JSON") from None

    def _forget_waiting(self, heard: concurrent.futures.Future[str]) -> None:
        for id_ in [id_ for id_, other in self._waiting.items() if other is heard]:
            del self._waiting[id_]

    def _action(self, event: Event) -> tuple[Any, Any]:
        """Storage commitment N-ACTION (PS3.4 J.3.2): answered when stored; the report follows the Bot's answer."""
        request = typing.cast(Any, event.request)
        if request.RequestedSOPClassUID != COMMITMENT_CLASS or request.ActionTypeID != 1:
            return NO_SUCH_ACTION, None
        try:
            dataset = event.action_information
            uid = str(request.RequestedSOPInstanceUID)
            message = self._request(event, "N-ACTION", COMMITMENT_CLASS, uid, dataset, actionTypeId=1)
            wanted = [str(item.ReferencedSOPInstanceUID) for item in dataset.ReferencedSOPSequence]
            if not wanted or [uid for uid, _ in referenced_objects(load_json(message.text or ""))] != wanted:
                raise Refusal(RESOURCE_LIMITATION, "more objects than fit into one message; ask for fewer at a time")
            message.prepared = False
            message.key = "" if self.plan.key_spec == "*" else f"commitment {dataset.get('TransactionUID')}"
            if refusal := self._keep(message, lambda: self._committing.update({message.id: event.assoc})):
                raise Refusal(RESOURCE_LIMITATION, refusal)
        except Refusal as refusal_:
            return self._refused(event, refusal_), None
        except Exception:  # no transaction, no objects, or unreadable ones
            return self._refused(event, Refusal(PROCESSING_FAILURE, "the request cannot be read")), None
        return SUCCESS, None

    # --- answers of the Bot ---

    def relays(self, body: object) -> bool:
        return True

    def deliver(self, message: Message, text: str) -> bool:
        if (heard := self._waiting.pop(message.id, None)) is not None:
            # a Bot that says nothing about a procedure step has nothing against it
            heard.set_result("{}" if not text or text.startswith(BOT_LOG) else text)
        if message.type != COMMITMENT:
            return True
        self._commit(message, text)
        return False  # until the device has taken the report

    def refuse(self, message: Message, error_code: str) -> bool:
        if (heard := self._waiting.pop(message.id, None)) is not None:
            heard.set_result(f'{{"status": {PROCESSING_FAILURE}}}')
        if message.type == COMMITMENT:
            self._commit(message, "")
        return heard is not None

    def _commit(self, message: Message, text: str) -> None:
        """Report what the Bot says is safe; everything else has failed (PS3.4 J.3.3)."""
        reporting = asyncio.ensure_future(self._report(message, text, self._committing.pop(message.id, None)))
        self._reports.add(reporting)
        reporting.add_done_callback(self._reports.discard)

    async def _report(self, message: Message, text: str, association: Association | None) -> None:
        committed: set[str] | None = None
        try:
            committed = {str(uid) for uid in bot_words(text)["committed"]}
        except (Refusal, KeyError, TypeError):
            self._warn(f"message {message.id}: the Bot confirmed nothing; the device hears that the commitment failed")
        asked = message.text or (await self.store.bodies([message.id]))[message.id][0].decode()
        request = load_json(asked)
        run = functools.partial(self.loop.run_in_executor, self._threads)
        report, kind = await run(commitment_report, request, committed)
        for seconds in COMMITMENT_REPORT_SECS:
            await asyncio.sleep(seconds)
            if not (problem := await run(self._send_report, request["association"], report, kind, association)):
                message.outcome = DELIVERED
                self.store.update(message, message.state)
                return
            self._warn(f"message {message.id}: the storage commitment report was not taken: {problem}")

    async def recover(self) -> None:
        """After a start: go on with the reports that no device has taken yet."""
        assert self.feed is not None
        sql = f"""SELECT {_COLUMNS} FROM message WHERE channel = ? AND type = '{COMMITMENT}' AND state = {PROCESSED}
          AND outcome = {UNDELIVERED} AND received_at > ?"""
        values = self.feed.row.id, now_ms() - COMMITMENT_REPORT_DAYS * 86_400_000
        for row in await self.store.call(lambda db: db.execute(sql, values).fetchall()):
            message = Message._from_row(row)
            self._commit(message, message.response or "")

    def _send_report(self, titles: Json, report: Dataset, kind: int, association: Association | None) -> str:
        """N-EVENT-REPORT, on an association of our own where the device's address is known; why not, or ``."""
        calling = titles["callingAeTitle"]
        own = None
        try:
            if (peer := self._destinations.get(calling)) is not None:
                entity = imaging().Entity(titles["calledAeTitle"] or self._entity.ae_title, self.store.spool)
                context, role = imaging().context(COMMITMENT_CLASS), imaging().role(COMMITMENT_CLASS, scp_role=True)
                own = association = entity.associate(*peer, contexts=[context], ae_title=calling, ext_neg=[role])
                if not own.is_established:
                    return association_problem(own)
            if association is None or not association.is_established:
                return f"'{calling}' is not connected; name its address in moveDestinations"
            with vars(association).setdefault("turn", threading.Lock()):
                answer, _ = association.send_n_event_report(report, kind, COMMITMENT_CLASS, COMMITMENT_INSTANCE)
            status = answer.get("Status")
            return "" if status == SUCCESS else f"status {status}"
        except (ValueError, RuntimeError, OSError) as error:
            return f"{type(error).__name__}"
        finally:
            if own is not None and own.is_established:
                own.release()


def _is_cut(dataset: Dataset) -> bool:
    """It ends in the middle of a value, which pydicom takes for a short one."""
    last = dataset.get_item(max(dataset.keys())) if len(dataset) else None
    value = getattr(last, "value", None)
    return isinstance(value, bytes) and len(value) < getattr(last, "length", 0) < 0xFFFFFFFF


def commitment_report(request: Json, committed: set[str] | None) -> tuple[Dataset, int]:
    """The data set of an N-EVENT-REPORT and its event type: 1 when all is committed, else 2 (PS3.4 J.3.3).

    `committed`: SOP Instance UIDs; None when nobody could say.
    """
    report = dataset_of({"00081195": request["dataset"].get("00081195", {"vr": "UI"})})
    reason = PROCESSING_FAILURE if committed is None else NO_SUCH_INSTANCE
    done, failed = [], []
    for uid, sop_class in referenced_objects(request):
        item: Json = {"00081150": {"vr": "UI", "Value": [sop_class]}, "00081155": {"vr": "UI", "Value": [uid]}}
        if uid in (committed or ()):
            done.append(dataset_of(item))
        else:
            failed.append(dataset_of(item | {"00081197": {"vr": "US", "Value": [reason]}}))
    if done:
        report.ReferencedSOPSequence = done
    if failed:
        report.FailedSOPSequence = failed
    return report, 1 if done and not failed else 2


def association_json(event: Event) -> Json:
    """Who asks whom, as in the body of channel contract 8."""
    request = typing.cast(Any, event.assoc.requestor.primitive)
    return {"callingAeTitle": request.calling_ae_title.strip(), "calledAeTitle": request.called_ae_title.strip()}


def _answer_body(answer: Json) -> object:
    status = answer.get("statusCode")
    if isinstance(status, int) and status >= 400:
        raise Refusal(UNABLE_TO_PROCESS, f"the server or the Bot failed (status {status})")
    return answer.get("body")


# --- requests of the cloud to application entities -------------------------------------------------------------------


class ImagingCaller:
    """Pushes to `dicom://AETITLE@host:port`: C-ECHO, C-STORE of a Binary, C-FIND, C-MOVE, one association each."""

    COMMANDS = ("C-ECHO", "C-STORE", "C-FIND", "C-MOVE")

    def __init__(self, spool: Spool, fhir: Fhir, channel_log: Log):
        self._spool, self._fhir, self._channel_log = spool, fhir, channel_log
        # those that somebody waits for do not stand behind those that are tried again and again
        self._awaited, self._stored = (ThreadPoolExecutor(DICOM_PUSHES, name) for name in ("dicom-push", "dicom-queue"))

    @classmethod
    def check(cls, push: Push) -> Json:
        """The request of a push; DeviceError says what is wrong with it."""
        try:
            request = load_json(push.text)
            command = request["command"]
            if command not in cls.COMMANDS:
                raise ValueError(f"command '{command}' is unknown: use one of {', '.join(cls.COMMANDS)}")
            if command == "C-STORE":
                reference_of(request.get("binary"))
            if command in ("C-FIND", "C-MOVE"):
                cls._model(request)
                dataset_of(request.get("dataset", {}))
            if command == "C-MOVE" and not ae_titles(str(request.get("destination") or "")):
                raise ValueError("C-MOVE needs a destination, the AE title that the objects shall go to")
            return typing.cast(Json, request)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            text = str(error) if isinstance(error, ValueError) else 'it needs the form {"command": "C-ECHO"}'
            raise DeviceError(f"the body of a push to {push.target.key}: {text}", "device-rejected") from None

    @staticmethod
    def _model(request: Json) -> str:
        """The SOP class of a query: by `model`, else study root, or the worklist for that level."""
        if "WORKLIST" in (request.get("model"), request.get("level")):
            return WORKLIST_CLASS
        if (root := _QUERY_ROOTS.get(request.get("model", "STUDY"))) is None:
            raise ValueError(f"model '{request.get('model')}' is unknown: use {', '.join(_QUERY_ROOTS)} or WORKLIST")
        return f"{root}.{_QUERY_COMMANDS[request['command']]}"

    async def __call__(self, push: Push, seconds: float) -> str:
        """Perform the request; its answer as JSON, or DeviceError, within `seconds`."""
        await load_imaging()
        request, file = self.check(push), None
        threads = self._stored if seconds >= DICOM_PUSH_SECS else self._awaited
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(seconds):
                if request["command"] == "C-STORE":
                    file = SpoolFile(self._spool)
                    await self._fetch(reference_of(request["binary"]), file)
                answer = await loop.run_in_executor(threads, self._perform, push.target, request, file, seconds)
                return dump_json({"command": request["command"], **answer}).decode()
        except TimeoutError:
            raise DeviceError(f"{push.target.key}: not done within {seconds:g} s", "device-silent") from None
        except OSError as error:
            raise DeviceError(f"{push.target.key}: {_os_reason(error)}", "device-unreachable") from None
        finally:
            if file is not None:
                file.discard()

    async def _fetch(self, reference: str, file: SpoolFile) -> None:
        try:
            await self._fhir.download(reference, file)
            if file.error:
                raise DeviceError(f"{reference}: {file.error}", "device-error")
        except ServerError as error:
            kind = "device-error" if error.status in (0, 429) or error.status >= 500 else "device-rejected"
            raise DeviceError(f"{reference} cannot be fetched: {error}", kind) from None

    def _perform(self, target: Target, request: Json, file: SpoolFile | None, seconds: float) -> Json:
        """In a thread: the association and the request."""
        s, library = target.settings, imaging()
        entity = library.Entity(s.callingAeTitle, self._spool)
        entity.connection_timeout, entity.acse_timeout = s.connectTimeoutSecs, min(seconds, DIMSE_SECS)
        entity.dimse_timeout = entity.network_timeout = seconds
        tls = (device_tls(s), target.host) if s.tls else None
        peer, title = Peer(target.host, target.port), target.path
        if request["command"] == "C-STORE":
            return self._store(target, Sender(entity.associate, peer, title, tls), fetched(file))
        sop_class = "1.2.840.10008.1.1" if request["command"] == "C-ECHO" else self._model(request)
        context = library.context(sop_class, list(UNCOMPRESSED))
        association = entity.associate(*peer, contexts=[context], ae_title=title, tls_args=tls)
        if not association.is_established:
            raise DeviceError(f"{target.key}: {association_problem(association)}", _rejection_kind(association))
        try:
            return self._query(target, association, sop_class, request)
        finally:
            association.release()

    @staticmethod
    def _store(target: Target, sender: Sender, stand_in: Dataset) -> Json:
        try:
            return {"status": _checked_status(target, sender.send_c_store(stand_in))}
        except DeviceError as error:
            raise DeviceError(f"{target.key}: {error}", error.kind) from None
        except Exception as error:  # no DICOM file, or no presentation context that takes it
            raise DeviceError(f"{target.key}: the object cannot be sent: {error}", "device-rejected") from None
        finally:
            sender.release()

    @staticmethod
    def _query(target: Target, association: Any, sop_class: str, request: Json) -> Json:
        if request["command"] == "C-ECHO":
            return {"status": _checked_status(target, association.send_c_echo())}
        identifier = dataset_of(request.get("dataset", {}))
        if sop_class != WORKLIST_CLASS:
            identifier.QueryRetrieveLevel = request.get("level") or identifier.get("QueryRetrieveLevel") or "STUDY"
        if request["command"] == "C-FIND":
            answers = list(association.send_c_find(identifier, sop_class))
            found = [dicom_json(dataset, []) for status, dataset in answers if dataset is not None]
            return {"status": _checked_status(target, answers[-1][0]), "datasets": found}
        last, _ = list(association.send_c_move(identifier, request["destination"], sop_class))[-1]
        names = ("Completed", "Failed", "Warning")
        counts = {name.lower(): int(last.get(f"NumberOf{name}Suboperations") or 0) for name in names}
        return {"status": _checked_status(target, last), **counts}


def _rejection_kind(association: Association) -> str:
    """A device that answers, even with a rejection, may still be mended by a person: that is tried again."""
    return "device-error" if association.acceptor.primitive else "device-unreachable"


def _checked_status(target: Target, answer: Dataset) -> int:
    """The status of an answer if it is success or a warning; DeviceError for failures and silence."""
    status = answer.get("Status")
    if status is None:
        raise DeviceError(f"{target.key}: no answer came", "device-silent")
    if status == SUCCESS or status >> 12 == 0xB or status in (0x0001, 0x0107, 0x0116):  # PS3.7 C.3 and C.4
        return int(status)
    comment = f" ({answer.ErrorComment})" if answer.get("ErrorComment") else ""
    kind = "device-error" if status >> 8 == 0xA7 else "device-rejected"
    raise DeviceError(f"{target.key}: status 0x{status:04X}{comment}", kind)


# =====================================================================================================================
# Agent
#
# Plans become running channels. A reload reads everything, lists every problem, and changes nothing if there is one;
# otherwise only what differs changes, and untouched channels keep their connections. The life cycle: lock, logs,
# configuration (from the server, else the saved one), store, channels; and the clean stop in reverse.
# =====================================================================================================================

ALIVE_FILE = "agent.alive"
CONFIG_FILE = "medplum-agent-applied-config.json"
QUEUE_FILE = "medplum-agent-queue.sqlite"
# What the server may say in an agent:error without quoting a message (uplink contract 4 and 5)
_SAFE_ERRORS = frozenset({
    "Not connected", "Missing access token", "Missing agent ID", "Invalid access token", "Missing channel",
    "Missing body", "Channel not found", "Invalid HL7 message", "Not found", "Forbidden", "Unauthorized",
})  # fmt: skip


class Agent:
    """One agent: `run()` until `stop()`. `console` gets the main log."""

    def __init__(self, config: ProcessConfig, console: typing.TextIO | None):
        self.config = config
        self.state_dir = config.state_dir
        self._console = console
        self.started = asyncio.Event()
        self.plan: Plan | None = None
        self.channels: dict[str, Channel] = {}
        self._listeners: dict[tuple[str, int], Listener] = {}
        self._dialers: dict[str, Dialer] = {}
        self._stop = asyncio.Event()
        self._reloading, self._push_gate = asyncio.Lock(), asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lock_file: typing.BinaryIO | None = None
        self._last_sweep: tuple[int, int, int] = (-1, -1, -1)

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
            context = tls_context(self.config.settings.caFile)
            self.fhir = Fhir(self.config.settings, context, self.log)
            self.uplink = Uplink(self.config.settings, self.fhir, context, self.log)
            self.uplink.on_message = self._message
            uplink = self._spawn(self.uplink.run())
            starting = self._spawn(self._start())
            await self._until_stop(starting)
            await self._shut_down(uplink)
        finally:
            self._close_files()

    async def _until_stop(self, starting: asyncio.Task[None]) -> None:
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({stopped, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
        await stopped
        starting.cancel()

    # --- files ---

    def _prepare_directory(self) -> None:
        try:
            self.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_file = open(self.state_dir / "agent.lock", "a+b")  # noqa: SIM115 - held while the agent runs
        except OSError as error:
            raise ConfigError(
                [f"the state directory {self.state_dir} cannot be used: {error.strerror}. Use --state-dir"]
            ) from None
        if not lock_file(self._lock_file):
            raise ConfigError(
                [f"another agent runs with the state directory {self.state_dir}. Stop it or use --state-dir"]
            )

    def _open_logs(self) -> None:
        self.log = self._open_log("main", self.config.main_log, self._console)
        self.channel_log = self._open_log("channels", self.config.channel_log, None)
        self.log.info(f"Medplum Agent {VERSION} starts for {self.config.settings.baseUrl}; state in {self.state_dir}.")
        for warning in self.config.warnings:
            self.log.warn(f"{warning}.")

    def _open_log(self, name: str, settings: LoggerSettings, console: typing.TextIO | None) -> Log:
        directory = Path(settings.logDir or os.environ.get("LOGS_DIRECTORY", "").split(":")[0] or self.state_dir)
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError([f"the log directory {directory} cannot be used: {error.strerror}"]) from None
        return Log(name, settings, directory, console, lazy=name == "channels")

    def _close_files(self) -> None:
        with contextlib.suppress(OSError):
            (self.state_dir / ALIVE_FILE).unlink()
        for log in (self.log, self.channel_log):
            log.flush()
            log.close_file()
        if self._lock_file is not None:
            self._lock_file.close()

    # --- start ---

    async def _start(self) -> None:
        agent, endpoints, saved = await self._first_config()
        plan, problems = build_plan(agent, endpoints)
        if problems and not saved and (last := self._saved_config()) is not None:
            self._report_problems(problems, "the last good configuration is used")
            plan, problems = build_plan(*last)
        elif problems:
            self._report_problems(problems, "the other channels start")
        elif not saved:
            self._save_config(plan)
        await self._open_store(plan)
        await self._apply(plan, first=True)
        self._spawn(self.devices.resume())
        self.started.set()
        self.log.info("Medplum service started successfully.")
        self._spawn(self._keep_house())
        if saved:
            self._spawn(self._catch_up())

    async def _first_config(self) -> tuple[Json, Mapping[str, Json | AgentError], bool]:
        """The Agent and its Endpoints from the server; from disk when the server is away at start."""
        said = ""
        limit = SERVER_FIRST_SECS if self._saved_config() is not None else None
        while True:
            try:
                async with asyncio.timeout(limit):
                    agent, endpoints = await self._read_config()
                    return agent, endpoints, False
            except (ServerError, TimeoutError) as error:
                reason = str(error) or "the server does not answer"
            if (last := self._saved_config()) is not None:
                self.log.warn(f"The configuration cannot be read: {reason}. Starting with the last good one.")
                return *last, True
            if reason != said:
                self.log.error(f"The configuration cannot be read: {reason}. Trying again until it can.")
                said = reason
            await asyncio.sleep(random.uniform(0, RECONNECT_MAX_SECS))

    async def _read_config(self) -> tuple[Json, dict[str, Json | AgentError]]:
        agent = await self.fhir.read(f"Agent/{self.config.settings.agentId}")
        references = endpoint_references(agent)
        found = await asyncio.gather(*(self.fhir.read(reference) for reference in references), return_exceptions=True)
        endpoints: dict[str, Json | AgentError] = {}
        for reference, endpoint in zip(references, found, strict=True):
            if isinstance(endpoint, BaseException) and not isinstance(endpoint, AgentError):
                raise endpoint
            if (isinstance(endpoint, ServerError) and endpoint.status in (0, 429)) or (
                isinstance(endpoint, ServerError) and endpoint.status >= 500
            ):
                raise endpoint
            endpoints[reference] = endpoint
        return agent, endpoints

    def _saved_config(self) -> tuple[Json, dict[str, Json | AgentError]] | None:
        try:
            saved = load_json((self.state_dir / CONFIG_FILE).read_bytes())
            agent, endpoints = saved["agent"], saved["endpoints"]
            if agent["id"] != self.config.settings.agentId:
                return None
            return agent, {f"Endpoint/{endpoint['id']}": endpoint for endpoint in endpoints}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _save_config(self, plan: Plan) -> None:
        stamp = datetime.datetime.now(datetime.UTC).isoformat()
        agent = plan.agent | {"id": self.config.settings.agentId}
        saved = {"appliedAt": stamp, "agentVersion": VERSION, "agent": agent, "endpoints": plan.endpoints}
        path = self.state_dir / CONFIG_FILE
        try:
            temporary = path.with_suffix(".new")
            with open(temporary, "wb", opener=lambda p, flags: os.open(p, flags, 0o600)) as file:
                file.write(dump_json(saved))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            self.log.error(
                f"The configuration cannot be saved in {path}: {error.strerror}. "
                "A restart while the server is away would start no channel."
            )

    async def _catch_up(self) -> None:
        """Started from the saved configuration: apply the server's as soon as it can be read."""
        while True:
            try:
                await self.reload()
                return
            except ServerError:
                await asyncio.sleep(random.uniform(0, RECONNECT_MAX_SECS))
            except ConfigError as error:
                self._report_problems(error.problems, "the last good configuration stays")
                return

    def _report_problems(self, problems: Sequence[str], consequence: str) -> None:
        for problem in problems:
            self.log.error(f"Configuration: {problem}; {consequence}.")

    async def _open_store(self, plan: Plan) -> None:
        path = Path(plan.settings.queueDbPath or self.state_dir / QUEUE_FILE)
        self.store = Store(path, self.log)
        await self.store.open()
        self.dispatcher = Dispatcher(self.config.settings.agentId, self.store, self.uplink, self.fhir, self.log)
        self.devices = Devices(self.store, self.log, self.channel_log, self.channels)
        self.devices.imaging = ImagingCaller(self.store.spool, self.fhir, self.channel_log)

    # --- plans ---

    async def reload(self) -> None:
        """Read the configuration and apply it whole, or raise ConfigError or ServerError and change nothing."""
        async with self._reloading:
            agent, endpoints = await self._read_config()
            plan, problems = build_plan(agent, endpoints)
            if self.plan and plan.settings.queueDbPath != self.plan.settings.queueDbPath:
                problems.append("queueDbPath cannot change while the agent runs: restart it")
            if problems:
                raise ConfigError(problems)
            await self._apply(plan)
            self._save_config(plan)

    async def _apply(self, plan: Plan, *, first: bool = False) -> None:
        """Make the running channels those of the plan. New ports are bound before anything changes."""
        wanted = {channel.bind: channel for channel in plan.channels if channel.active and not channel.dials}
        opened = await self._bind_new(wanted, first=first)
        for warning in plan.warnings + _silent_parts(plan):
            self.log.warn(f"Configuration: {warning}.")
        self.plan = plan
        self.store.max_bytes = plan.settings.queueMaxMb * MIB
        self.devices.configure(plan)
        self._stop_channels(plan)
        for bind in [bind for bind in self._listeners if bind not in wanted]:
            self._listeners.pop(bind).close()
        self._listeners |= opened
        for channel_plan in plan.channels:
            await self._apply_channel(channel_plan)
        for bind, listener in self._listeners.items():
            listener.channel = self.channels[wanted[bind].name]
        for listener in opened.values():
            await listener.start()
        await self._feed_known(plan)

    async def _bind_new(
        self, wanted: Mapping[tuple[str, int], ChannelPlan], *, first: bool
    ) -> dict[tuple[str, int], Listener]:
        """Listeners for the ports not yet bound; raises ConfigError, with everything as before, if one cannot be."""
        opened: dict[tuple[str, int], Listener] = {}
        moved: list[Listener] = []
        problems: list[str] = []
        for bind, channel in wanted.items():
            if bind in self._listeners:
                continue
            moved += self._close_same_port(bind)
            try:
                opened[bind] = await Listener.open(bind, self.log)
            except OSError as error:
                reason = error.strerror or error
                problems.append(f"channel '{channel.name}': port {channel.port} cannot be opened: {reason}")
                if first:
                    self._spawn(self._bind_later(channel))
        if problems and not first:
            await self._unbind(opened, moved)
            raise ConfigError(problems)
        self._report_problems(problems, "it is tried again until it can be opened")
        return opened

    def _close_same_port(self, bind: tuple[str, int]) -> list[Listener]:
        """The same port with another host: our own listener is in the way."""
        clashes = [listener for other, listener in self._listeners.items() if other[1] == bind[1]]
        for listener in clashes:
            self._listeners.pop(listener.bind).close()
        return clashes

    async def _unbind(self, opened: Mapping[tuple[str, int], Listener], moved: Sequence[Listener]) -> None:
        for listener in opened.values():
            listener.close()
        for old in moved:
            listener = self._listeners[old.bind] = await Listener.open(old.bind, self.log)
            listener.channel = old.channel
            await listener.start()

    async def _bind_later(self, plan: ChannelPlan) -> None:
        """A port taken by another program at start: wait for it as long as the plan wants it."""
        while True:
            await asyncio.sleep(BIND_RETRY_SECS)
            if self.plan is None or plan.bind in self._listeners or plan not in self.plan.channels:
                return
            try:
                listener = await Listener.open(plan.bind, self.log)
            except OSError:
                continue
            listener.channel = self.channels[plan.name]
            self._listeners[plan.bind] = listener
            await listener.start()
            self.log.info(f"Channel '{plan.name}': port {plan.port} is open now.")
            return

    def _stop_channels(self, plan: Plan) -> None:
        """Stop what is gone, off, or moved to another port: its devices reconnect, what they sent is kept."""
        staying = {channel.name: channel for channel in plan.channels if channel.active}
        for name, channel in list(self.channels.items()):
            new = staying.get(name)
            if new is None or self._must_restart(new, channel.plan):
                channel.stop()
                del self.channels[name]
                if (dialer := self._dialers.pop(name, None)) is not None:
                    dialer.close()

    @staticmethod
    def _must_restart(new: ChannelPlan, old: ChannelPlan) -> bool:
        """Another port, another protocol, or another line to open."""
        kind = (new.bind, new.protocol, new.is_astm, new.dials) != (old.bind, old.protocol, old.is_astm, old.dials)
        return kind or (new.dials and new.settings != old.settings)

    async def _apply_channel(self, plan: ChannelPlan) -> None:
        channel = self.channels.get(plan.name)
        if not plan.active:
            self.log.warn(f"Channel '{plan.name}' is off (Endpoint.status).")
        elif channel is None:
            self.channels[plan.name] = await self._new_channel(plan)
            self._announce(plan)
        elif channel.plan != plan:
            self.log.info(f"Channel '{plan.name}' has new settings.")
        attaching = self._spawn(self._attach(plan))
        if self.store.healthy:
            await attaching

    async def _new_channel(self, plan: ChannelPlan) -> Channel:
        parts = plan, self.store, self.log, self.channel_log
        if isinstance(plan.settings, DicomSettings):
            await load_imaging()
            return DicomChannel(*parts, self.fhir, self.dispatcher)
        if isinstance(plan.settings, StreamSettings):
            return AstmChannel(*parts) if plan.is_astm else StreamChannel(*parts)
        return Hl7Channel(*parts)

    def _announce(self, plan: ChannelPlan) -> None:
        if plan.dials:
            self._dialers[plan.name] = Dialer(typing.cast(StreamChannel, self.channels[plan.name]), self.log)
        elif (listener := self._listeners.get(plan.bind)) is not None:
            tls = " with TLS" if plan.settings.tls else ""
            self.log.info(f"Channel '{plan.name}' listens{tls} on {listener.shown}.")

    async def _attach(self, plan: ChannelPlan) -> None:
        """Give the channel its feed; waits while the store cannot be used, when devices get CE/AE."""
        try:
            feed = await self.dispatcher.feed(plan)
        except StorageError:
            asyncio.get_running_loop().call_later(STORE_REOPEN_SECS, self._attach_again, plan.name)
            return
        channel = self.channels.get(plan.name)
        if channel is not None:
            channel.replan(plan)
            first, channel.feed = channel.feed is None, feed
            if first:
                self._spawn(channel.recover())
        feed.outlet = channel

    def _attach_again(self, name: str) -> None:
        plans = self.plan.channels if self.plan else ()
        for plan in (plan for plan in plans if plan.name == name):
            self._spawn(self._attach(plan))

    async def _feed_known(self, plan: Plan) -> None:
        """Messages of channels that are off go on to the server; those of channels that are gone wait."""
        named = {channel.name for channel in plan.channels}
        for name, feed in self.dispatcher.feeds.items():
            feed.paused = name not in named
            if feed.paused:
                feed.outlet = None
                if feed.depth and plan.status != "off":
                    self.log.warn(_orphans(name, feed.depth))
        self.dispatcher.pump()
        if self.store.healthy and plan.status != "off":
            await self._warn_of_orphans(named | set(self.dispatcher.feeds))

    async def _warn_of_orphans(self, known: set[str]) -> None:
        sql = (
            "SELECT c.name, count(*) FROM message m JOIN channel c ON c.id = m.channel "
            f"WHERE m.state < {PROCESSED} GROUP BY m.channel"
        )
        with contextlib.suppress(sqlite3.Error):  # the store itself reports a file that cannot be read
            for name, count in await self.store.read(lambda db: db.execute(sql).fetchall()):
                if name not in known and not name.startswith(PUSH_PREFIX):
                    self.log.warn(_orphans(name, count))

    # --- requests of the server (uplink contract 4) ---

    def _message(self, message: Json) -> None:
        kind, callback = message["type"], message.get("callback")
        if kind in ("agent:transmit:response", "transmit"):
            if hasattr(self, "dispatcher"):
                self.dispatcher.response(message)
        elif kind == "agent:error":
            self._server_error(str(message.get("body")))
        elif (operation := self._operations.get(kind)) is not None:
            self._spawn(self._perform(operation, message, callback))
        else:
            self.log.warn("The server sent a message of an unknown type.")
            self._fail(f"Unknown message type: {kind}", callback)

    @functools.cached_property
    def _operations(self) -> Mapping[str, Callable[[Json], Awaitable[Json | None]]]:
        return {
            "agent:transmit:request": self._push, "push": self._push,
            "agent:reloadconfig:request": self._reload_config, "agent:logs:request": self._fetch_logs,
            "agent:stats:request": self._fetch_stats, "agent:upgrade:request": self._upgrade,
        }  # fmt: skip

    async def _perform(self, operation: Callable[[Json], Awaitable[Json | None]], message: Json, callback: Any) -> None:
        """Answer a request; whatever fails is an agent:error with the request's callback."""
        try:
            answer = await operation(message)
        except AgentError as error:
            self._fail(str(error), callback)
        except Exception as error:
            self._fail(f"The agent failed with an internal error ({type(error).__name__})", callback)
            raise
        else:
            if answer is not None:
                self.uplink.send(answer | ({"callback": callback} if callback else {}))

    def _fail(self, text: str, callback: Any) -> None:
        self.uplink.send({"type": "agent:error", "body": text} | ({"callback": callback} if callback else {}))

    def _server_error(self, text: str) -> None:
        """An agent:error of the server names no message; a text that might quote one goes to the channel log."""
        if "access token" in text:
            self.fhir.reject_token()
        if text in _SAFE_ERRORS:
            self.log.error(f"The server reports: {text}.")
        else:
            self.log.error("The server reports an error; its text is in the channel log.")
            self.channel_log.error(f"[Server] {text}")

    async def _push(self, message: Json) -> Json | None:
        """A push or a ping (uplink contract 4.7 to 4.9); None when nobody waits for the result."""
        async with self._push_gate:  # fair: those that wait for the start stay before those that come later
            await self.started.wait()
            if str(message.get("remote")).startswith("dicom"):
                await load_imaging()
        if self.plan is None or self.plan.status != "active":
            raise PeerError("Agent.status is currently set to off")
        is_ping = message.get("contentType") == PING_TYPE
        answer: Json = {"type": "agent:transmit:response", "remote": message.get("remote")}
        answer |= {"channel": message["channel"]} if "channel" in message else {}
        try:
            if is_ping:
                body = await ping(*parse_ping(message.get("remote"), message.get("body")))
                return answer | {"contentType": PING_TYPE, "statusCode": 200, "body": body}
            push = self._checked_push(message)
            if not message.get("callback"):
                self.devices.store(push)
                return None
            body = await self.devices.send(push, PUSH_WAIT_SECS)
            if len(body) > PUSH_ANSWER_BYTES:
                raise DeviceError(f"{push.target.key}: its answer of {len(body)} bytes is too large", "device-error")
            return answer | {"contentType": push.content_type, "statusCode": 200, "body": body}
        except (DeviceError, PingError) as error:
            return answer | {"contentType": "text/plain", "statusCode": 400, "body": str(error)}

    def _checked_push(self, message: Json) -> Push:
        push = parse_push(message)
        if push.target.is_dicom:
            ImagingCaller.check(push)
        if push.mode:  # an HL7 message
            if push.mode not in ("first", "application"):
                raise DeviceError(f"returnAck '{push.mode}' is unknown: use first or application", "device-rejected")
            if not push.control_id:
                raise DeviceError("MSH.10 is missing but required", "device-rejected")
        return push

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
        return {"type": "agent:reloadconfig:response", "statusCode": 200}

    async def _fetch_logs(self, message: Json) -> Json:
        limit, before = message.get("limit", 20), message.get("before")
        if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= LOG_PAGE_MAX:
            raise PeerError(
                f"Invalid limit: {limit} - must be a valid positive integer less than or equal to {LOG_PAGE_MAX}"
            )
        self.log.flush()
        assert self.log.directory is not None
        try:
            page = await asyncio.to_thread(read_log_page, self.log.directory, "main", limit, before)
        except (ValueError, OSError) as error:
            raise LocalError(str(error)) from None
        answer = {
            "type": "agent:logs:response",
            "statusCode": 200,
            "logs": page.entries,
            "hasMore": page.before is not None,
        }
        return answer | ({"nextBefore": page.before} if page.before else {})

    async def _fetch_stats(self, message: Json) -> Json:
        return {"type": "agent:stats:response", "statusCode": 200, "stats": await self.stats()}

    async def _upgrade(self, message: Json) -> Json:
        raise LocalError("This version cannot upgrade itself: install the new one over it; queue and settings are kept")

    async def stats(self) -> Json:
        """The stats object of operations contract 8."""
        feeds = dict(self.dispatcher.feeds) if self.started.is_set() else {}
        found = {
            "hl7ConnectionsOpen": sum(len(channel.connections) for channel in self.channels.values()),
            "ping": self.uplink.ping_ms,
            "webSocketQueueDepth": sum(feed.depth - len(feed.inflight) for feed in feeds.values()),
            "dicomAssociationsOpen": sum(
                len(channel.associations) for channel in self.channels.values() if isinstance(channel, DicomChannel)
            ),
            "hl7QueueDepth": 0,
            "hl7ClientCount": self.devices.client_count if self.started.is_set() else 0,
            "live": self.uplink.live,
            "outstandingHeartbeats": self.uplink.outstanding,
            "channelStats": {name: {"rtt": feed.round_trip_stats()} for name, feed in feeds.items()},
            "clientStats": self.devices.stats() if self.started.is_set() else {},
        }
        return found | ({"durableQueue": await self._queue_stats(feeds)} if self.started.is_set() else {})

    async def _queue_stats(self, feeds: Mapping[str, Feed]) -> Json:
        store = self.store
        inflight = {name: len(feed.inflight) for name, feed in feeds.items()}
        total = sum(inflight.values())
        counts = {name: store.tally[state] for state, name in enumerate(STATES)}
        counts["queued"], counts["inflight"] = max(0, counts["queued"] + counts["inflight"] - total), total
        swept_at, processed, errored = self._last_sweep
        return {
            "enabled": True,
            "isLeader": True,
            "healthy": store.healthy,
            "dbSizeBytes": store.size_bytes,
            "countsByState": counts,
            "channelDepth": {
                name: {
                    "queued": feed.depth - inflight[name], "claimed": 0, "inflight": inflight[name],
                    "oldestQueuedAgeMs": await self._oldest_age(feed),
                }
                for name, feed in feeds.items()
            },
            "lastSweepAt": swept_at,
            "lastSweepDeletedProcessed": processed,
            "lastSweepDeletedErrored": errored,
        }  # fmt: skip

    async def _oldest_age(self, feed: Feed) -> int:
        if not feed.depth:
            return -1
        sql = f"SELECT received_at FROM message WHERE channel = ? AND state < {PROCESSED} ORDER BY id LIMIT 1"
        try:
            row = await self.store.read(lambda db: db.execute(sql, (feed.row.id,)).fetchone())
        except sqlite3.Error:
            return -1
        return now_ms() - row[0] if row else -1

    # --- upkeep ---

    async def _keep_house(self) -> None:
        """Logs off the hot path, the stats line, retention."""
        loop = asyncio.get_running_loop()
        next_stats = next_sweep = next_alive = loop.time()
        while True:
            if loop.time() >= next_alive:
                next_alive = loop.time() + ALIVE_SECS
                with contextlib.suppress(OSError):
                    (self.state_dir / ALIVE_FILE).touch(0o600)
            await asyncio.sleep(LAZY_SECS)
            await asyncio.to_thread(self.channel_log.flush)
            self.devices.tidy()
            assert self.plan is not None
            settings = self.plan.settings
            if settings.logStatsFreqSecs > 0 and loop.time() >= next_stats:
                next_stats = loop.time() + settings.logStatsFreqSecs
                self._spawn(self._log_stats())
            if loop.time() >= next_sweep:
                next_sweep = loop.time() + settings.queueSweepIntervalSecs
                self._spawn(self._sweep(settings))

    async def _log_stats(self) -> None:
        self.log.info("Agent stats", stats=await self.stats())

    async def _sweep(self, settings: AgentSettings) -> None:
        try:
            processed, errored = await self.store.sweep(settings)
            self._last_sweep = (now_ms(), processed, errored)
        except (StorageError, sqlite3.Error) as error:
            self.log.error(f"Old messages cannot be deleted: {error}")

    def _spawn(self, work: typing.Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work, name=getattr(work, "__qualname__", None))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, ConfigError):
            self.log.error(f"Internal error: {type(error).__name__} in {task.get_name()}", stack=_stack(error))

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        """Python would print the exception's text, which could quote a message."""
        stack = _stack(args.exc_value) if args.exc_value is not None else []
        self.log.error(f"Internal error: {args.exc_type.__name__} in a thread", stack=stack)

    def _loop_failed(self, loop: asyncio.AbstractEventLoop, context: Json) -> None:
        error = context.get("exception")
        self.log.warn(
            f"{context['message']} ({error.strerror if isinstance(error, OSError) else type(error).__name__})."
        )

    async def _shut_down(self, uplink: asyncio.Task[None]) -> None:
        """Stop accepting, store what was read, let answers come for a moment, say goodbye."""
        self.log.info("Stopping.")
        try:
            async with asyncio.timeout(STOP_SECS):
                for listener in self._listeners.values():
                    listener.close()
                for dialer in self._dialers.values():
                    dialer.close()
                for channel in self.channels.values():
                    for connection in channel.connections.values():
                        connection.pause("stopping")
                if hasattr(self, "devices"):
                    self.devices.close()
                await self._settle_devices()
                for channel in list(self.channels.values()):
                    channel.stop()
                await self.uplink.goodbye()
                for task in self._tasks - {asyncio.current_task(), uplink}:
                    task.cancel()
                if hasattr(self, "store"):
                    await self.store.close()
        except TimeoutError:
            self.log.warn("The clean stop took too long; what is on disk goes on at the next start.")
        uplink.cancel()
        self.log.info("Stopped.")

    async def _settle_devices(self) -> None:
        """Wait until nothing is on its way to the disk, and a little for the answers that devices wait for."""
        loop = asyncio.get_running_loop()
        until = loop.time() + STOP_ANSWER_SECS
        await asyncio.sleep(0.02)  # callers whose push ended just now are answered
        while connections := [c for channel in self.channels.values() for c in channel.connections.values()]:
            waiting = any(c.pending for c in connections)
            answers = self.uplink.live and loop.time() < until and any(c.awaiting for c in connections)
            if not waiting and not answers:
                return
            await asyncio.sleep(0.02)


def _silent_parts(plan: Plan) -> tuple[str, ...]:
    """What is allowed, and still not what somebody wants who looks for his messages."""
    if plan.status == "off":
        return ("Agent.status is off: no channel listens. Set it to active and call $reload-config",)
    entries = [entry for entry in plan.agent.get("channel") or [] if isinstance(entry, dict)]
    botless = [entry.get("name") for entry in entries if not entry.get("targetReference")]
    return tuple(
        f"channel '{name}' names no Bot (targetReference): the server refuses its messages" for name in botless
    )


def _orphans(name: str, count: int) -> str:
    return f"{count} messages of channel '{name}' wait: it is not in the configuration. Add it to deliver them."


def _stack(error: BaseException) -> list[str]:
    """Where it happened, without the text of the exception (which could quote a message)."""
    import traceback

    return [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]


# =====================================================================================================================
# Command line
# =====================================================================================================================

_USAGE = """\
%(prog)s <base_url> <client_id> <client_secret> <agent_id> [log_level]
       %(prog)s [--config FILE]          values from the environment, agent.toml or agent.properties
       %(prog)s demo [--once]            the agent with a stand-in server and example devices
       %(prog)s health                   exit code 0 when the agent with these values has started and is alive"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}\nTry --help.", file=sys.stderr)
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=Path(sys.argv[0]).name,
        usage=_USAGE,
        description="Carries messages between hospital devices and a Medplum server.",
    )
    parser.add_argument(
        "arguments", nargs="*", metavar="base_url client_id client_secret agent_id [log_level]", help="or: demo"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="agent.toml or agent.properties; default: the one in the working directory"
    )
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        help="queue, logs and last configuration; default: a folder for each agent id in the system's place for state",
    )
    parser.add_argument(
        "--settings-schema", nargs="?", const="json", choices=("json", "markdown"), help="print every setting and exit"
    )
    parser.add_argument("--once", action="store_true", help="demo: end after the example traffic")
    parser.add_argument("--version", action="version", version=VERSION)
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    """The reference's arguments come first and are taken as they are: a secret may begin with a dash."""
    values = argv[:4] if len(argv) >= 4 and re.match(r"https?:", argv[0]) else []
    options = _parser().parse_args(argv[len(values) :])
    options.arguments = values + options.arguments
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 after a clean stop, 1 when it cannot start."""
    options = _parse(list(sys.argv[1:] if argv is None else argv))
    if options.settings_schema:
        print(settings_markdown() if options.settings_schema == "markdown" else json.dumps(settings_schema(), indent=2))
        return 0
    if hasattr(os, "umask"):
        os.umask(0o077)
    gc.freeze()  # what is loaded stays: collections look at messages only, and seldom
    gc.set_threshold(50_000, 20, 50)
    sys.setswitchinterval(0.001)  # the writer thread must not wait 5 ms for the interpreter after each commit
    try:
        if options.arguments[:1] == ["demo"]:
            return _run_demo(options.state_dir, stay=not options.once)
        if options.arguments == ["health"]:
            return _health(options)
        _run_agent(options)
    except ConfigError as error:
        for problem in error.problems:
            print(f"{_parser().prog}: {problem}", file=sys.stderr)
        print("Try --help.", file=sys.stderr)
        return 1


def _process_config(options: argparse.Namespace, *arguments: str) -> ProcessConfig:
    given = {"stateDir": options.state_dir} if options.state_dir else {}
    return resolve_process(arguments, given, os.environ, options.config)


def _health(options: argparse.Namespace) -> int:
    """For containers and monitors: the event loop of the agent has turned lately, and its channels are open."""
    installed = installed_config_file()
    if not options.config and installed.exists() and not os.access(installed, os.R_OK):
        print(f"The settings in {installed} cannot be read by this user: use sudo.")
        return 1
    state_dir = _process_config(options).state_dir
    try:
        alive = time.time() - (state_dir / ALIVE_FILE).stat().st_mtime < DEAD_SECS
    except PermissionError:
        print(f"The state of the agent in {state_dir} cannot be read by this user: use sudo.")
        return 1
    except OSError:
        alive = False
    print(f"The agent with its state in {state_dir} {'is alive' if alive else 'does not run, or has not started yet'}.")
    return int(not alive)


def _run_agent(options: argparse.Namespace) -> NoReturn:
    config = _process_config(options, *options.arguments[:4], *filter(None, options.arguments[4:5]))

    async def serve() -> None:
        agent = Agent(config, sys.stdout)
        _stop_on_signals(agent)
        await agent.run()

    with asyncio.Runner() as runner:
        runner.run(serve())
        sys.stdout.flush()
        os._exit(0)  # everything is written; a thread that hangs in a dead HTTP connection must not hold the process


def _run_demo(state_dir: str | None, *, stay: bool) -> int:
    import tempfile

    with contextlib.ExitStack() as stack:
        folder = Path(
            state_dir
            or stack.enter_context(
                tempfile.TemporaryDirectory(prefix="medplum-agent-demo-", ignore_cleanup_errors=True)
            )
        )
        asyncio.run(_demo_module().Demo(folder, stay).run(_stop_on_signals))
    return 0


def _demo_module() -> types.ModuleType:
    """packaging/demo.py, which builds on this very module under its importable name."""
    sys.modules.setdefault("medplum_agent", sys.modules[__name__])
    sys.path.append(str(Path(__file__).with_name("packaging")))
    try:
        import demo
    except ModuleNotFoundError:
        raise ConfigError(["the demo is not beside this file: use the source tree, or one of the binaries"]) from None
    return demo


def _stop_on_signals(agent: Agent) -> None:
    """SIGINT, SIGTERM and SIGHUP begin the clean stop; a second one ends the process at once."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if agent._stop.is_set():
            os._exit(1)
        agent.stop()

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        if (number := getattr(signal, name, None)) is not None:
            try:
                loop.add_signal_handler(number, stop)
            except NotImplementedError:  # Windows: no loop support; the handler runs in the main thread
                signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))


if __name__ == "__main__":
    sys.exit(main())
