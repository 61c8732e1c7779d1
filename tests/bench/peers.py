"""What a measurement needs beside the agent: `peers.py echo` and `peers.py server PORT AGENT_ID CHANNELS`.

Both print one JSON line when they listen, and end when their standard input does.
"""

import asyncio
import functools
import json
import sys
from collections.abc import Sequence

START, END = b"\x0b", b"\x1c\r"
ACK = (
    "\x0bMSH|^~\\&|BOT|SITE|ADT1|WARD|20260101120000.000||ACK^A08^ACK|1000000000000001|P|2.5.1\r"
    "MSA|{}|B000000001|OK\r\x1c\r"
)
ECHOES = ("CA", "AA", "CA+AA")  # what each port of the echo answers


async def stdin_line() -> str:
    return await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


def tell(value: object) -> None:
    print(json.dumps(value), flush=True)


class Echo(asyncio.Protocol):
    """The least a Python MLLP listener can do: find the end of each frame and answer bytes that never change."""

    def __init__(self, codes: str):
        self._answer = b"".join(ACK.format(code).encode() for code in codes.split("+"))
        self._last = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.max_size = 64 * 1024  # type: ignore[attr-defined]  # as the agent does

    def data_received(self, data: bytes) -> None:
        answers = [self._answer] if self._last == END[:1] and data[:1] == END[1:] else []
        end = data.find(END)
        while end >= 0:
            answers.append(self._answer)
            end = data.find(END, end + len(END))
        self._last = data[-1:]
        if answers:
            self._transport.write(b"".join(answers))


async def echo() -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(functools.partial(Echo, codes), "127.0.0.1", 0) for codes in ECHOES]
    tell({codes: server.sockets[0].getsockname()[1] for codes, server in zip(ECHOES, servers, strict=True)})
    while await stdin_line():
        pass


async def server(port: int, agent_id: str, channels: dict[str, str]) -> None:
    """The stand-in Medplum server, with a Bot that costs nothing; `away` and `back` tell it to stop and start.

    After each command it tells whether the agent is connected.
    """
    from demo import Sandbox, sandbox_resources

    answer = ACK.format("AA")[1:-2]
    sandbox = Sandbox(sandbox_resources(agent_id, channels))
    sandbox.keep_transmits = False
    sandbox.bot = lambda transmit: (200, answer)
    await sandbox.start(port)
    tell(sandbox.url)
    while command := (await stdin_line()).strip():
        if command == "away":
            await sandbox.stop()
        elif command == "back":
            await sandbox.start(port)
        tell(bool(sandbox.agents))


def main(role: str, arguments: Sequence[str]) -> None:
    if role == "echo":
        asyncio.run(echo())
    else:
        port, agent_id, channels = arguments
        asyncio.run(server(int(port), agent_id, json.loads(channels)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
