"""Laboratory instruments for tests: what sits on the other end of a TCP connection or of a serial cable."""

import contextlib
import os
import select
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import Any, Self

from demo import Transmit

from medplum_agent import astm_frame, astm_frames
from tests.support import Site, eventually

STX, ETX, EOT, ENQ, ACK, NAK, ETB = b"\x02", b"\x03", b"\x04", b"\x05", b"\x06", b"\x15", b"\x17"


class Instrument:
    """What sits on the other end of a line: a blocking socket or a serial port's file descriptor."""

    def __init__(self, line: socket.socket | int):
        self.line = line
        self.number = line if isinstance(line, int) else line.fileno()
        self.buffer = b""

    @classmethod
    def at(cls, port: int, source: str = "127.0.0.1") -> Self:
        line = socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(source, 0))
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if isinstance(self.line, int):
            os.close(self.line)
        else:
            self.line.close()

    def reset(self) -> None:
        """Vanish with a RST."""
        assert isinstance(self.line, socket.socket)
        self.line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.line.close()

    def write(self, raw: bytes) -> None:
        while raw:
            raw = raw[os.write(self.number, raw) :]

    def more(self, timeout: float) -> bool:
        """Read what is there; False when nothing comes, EOFError when the agent closed."""
        if not select.select([self.number], [], [], timeout)[0]:
            return False
        chunk = os.read(self.number, 65536)
        if not chunk:
            raise EOFError("the agent closed the line")
        self.buffer += chunk
        return True

    def take(self, count: int, timeout: float = 10) -> bytes:
        until = time.monotonic() + timeout
        while len(self.buffer) < count:
            assert self.more(max(0, until - time.monotonic())), f"{count} bytes wanted, {self.buffer!r} came"
        found, self.buffer = self.buffer[:count], self.buffer[count:]
        return found

    def quiet(self, seconds: float = 0.25) -> bytes:
        """What came when nothing came for `seconds`."""
        while self.more(seconds):
            pass
        found, self.buffer = self.buffer, b""
        return found

    def ended(self, timeout: float = 5) -> bool:
        """Whether the agent closes, saying nothing more."""
        try:
            return not self.more(timeout) and False
        except (EOFError, ConnectionError):
            return True

    # --- ASTM ---

    def ask(self, raw: bytes) -> bytes:
        """Write, and return the one byte that answers."""
        self.write(raw)
        return self.take(1)

    def session(self, *records: str, size: int = 240, eot: bool = True) -> None:
        """Records as a session, each frame acknowledged."""
        assert self.ask(ENQ) == ACK
        for frame in frames_of(*records, size=size):
            assert self.ask(frame) == ACK
        if eot:
            self.write(EOT)

    def frame(self, timeout: float = 10) -> bytes:
        """A frame of the agent, not yet answered; its checksum is right."""
        until = time.monotonic() + timeout
        while b"\r\n" not in self.buffer:
            assert self.more(max(0, until - time.monotonic())), f"no frame: {self.buffer!r}"
        frame, self.buffer = self.buffer.split(b"\n", 1)
        frame += b"\n"
        text = frame[2:-5]
        assert frame == astm_frame(frame[1] - ord("0"), text, frame[-5])
        return frame

    def accept(self, timeout: float = 10) -> list[bytes]:
        """A whole session of the agent, acknowledged; the records."""
        assert self.take(1, timeout) == ENQ
        self.write(ACK)
        records, number = [b""], 0
        while True:
            if not self.buffer:
                assert self.more(10)
            if self.buffer.startswith(EOT):
                self.take(1)
                return records[:-1]
            frame = self.frame()
            number = (number + 1) % 8
            assert frame[1:2] == b"%d" % number
            records[-1] += frame[2:-5]
            if frame[-5:-4] == ETX:
                records.append(b"")
            self.write(ACK)


def frames_of(*records: str, size: int = 240) -> list[bytes]:
    return astm_frames([record.encode("latin-1") + b"\r" for record in records], size)


def bad(frame: bytes) -> bytes:
    """With a checksum that is wrong."""
    return frame[:-4] + (b"00" if frame[-4:-2] != b"00" else b"01") + frame[-2:]


class Cable:
    """A null-modem cable: two pseudo-terminals tied together by socat; `agent` and `device` are their names."""

    def __init__(self, folder: Path):
        self.agent, self.device = folder / "ttyAGENT", folder / "ttyDEVICE"
        self._process: subprocess.Popen[bytes] | None = None
        self.plug()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.unplug()

    def plug(self) -> None:
        ends = [f"pty,raw,echo=0,link={name}" for name in (self.agent, self.device)]
        self._process = subprocess.Popen(["socat", *ends])
        eventually(lambda: self.agent.exists() and self.device.exists(), what="socat's pseudo-terminals")

    def address(self, tcp: str) -> str:
        """The address of a channel with the parameters of a TCP one."""
        return f"serial://{self.agent}?baudRate=19200&parity=none&stopBits=1&flow=none&{tcp.partition('?')[2]}"

    def unplug(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(5)
            self._process = None

    def open(self) -> Instrument:
        return Instrument(os.open(self.device, os.O_RDWR | os.O_NOCTTY))


def body_of(*records: str) -> str:
    return "".join(f"{record}\n" for record in records)


def of(here: Site, channel: str) -> list[Transmit]:
    """What came from a channel, in order."""
    with here.sandbox.changed:
        return [transmit for _, transmit in here.sandbox.seen if transmit.channel == channel]


def rows(here: Site, channel: str) -> list[dict[str, Any]]:
    """The rows of a channel in the queue file."""
    with contextlib.closing(here.agent.database()) as db:
        names = "id, state, ack_outcome, error_code, last_error, original, remote, response"
        found = db.execute(f"SELECT {names} FROM queue WHERE channel_name = ? ORDER BY id", (channel,)).fetchall()
    return [dict(zip(names.split(", "), row, strict=True)) for row in found]
