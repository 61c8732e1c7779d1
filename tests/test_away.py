"""The server and the way to it while they change: authorities, reasons to close, dates to wait for, clocks."""

import asyncio
import contextlib
import datetime
import email.utils
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from websockets.frames import Close, Frame, Opcode

import medplum_agent as ma
from tests.support import AGENT_ID, AgentProcess, Site, changed, eventually, message, site
from tests.test_uplink import log_in, refusing, works


class Relay:
    """A firewall between the agent and its server: `freeze` makes it forget all its connections without a word."""

    def __init__(self, port: int):
        self._to, self._lines, self._threads = port, list[tuple[socket.socket, ...]](), list[threading.Thread]()
        self._ends = list[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread(self._listen)

    def _thread(self, work: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._listener, *self._ends):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for one in (self._listener, *self._ends):
            one.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                line = self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._to))
                self._lines.append(line)
                self._ends += line
                for ends in (line, line[::-1]):
                    self._thread(self._pass_on, line, *ends)

    def _pass_on(self, line: object, source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (chunk := source.recv(65536)) and line in self._lines:
                to.sendall(chunk)
        if line in self._lines:
            for end in (source, to):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def freeze(self) -> None:
        self._lines = []


def server_side(authority: trustme.CA) -> ssl.SSLContext:
    """A server's context with a certificate of this authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context


def test_a_new_authority_in_ca_file_is_trusted_without_a_restart(tmp_path: Path) -> None:
    """A site's authority ends, too: its administrator puts the new one into the file, and the server's side follows."""
    old, new, path = trustme.CA(), trustme.CA(), tmp_path / "ca.pem"
    old.cert_pem.write_to_path(str(path))
    context = server_side(old)
    with site(tmp_path, {"A": "?enhanced=aa"}, context=context, config=f'caFile = "{path}"\n') as here:
        works(here)
        here.sandbox.stop()
        new.issue_cert("127.0.0.1", "localhost").configure_cert(context)
        here.sandbox.start()
        with here.device("A") as device:
            assert device.ask(message("MEANWHILE"))[0] == "AA"
        here.agent.logged("certificate verify failed")
        new.cert_pem.write_to_path(str(path))
        here.sandbox.wait_ids("MEANWHILE", timeout=20)
        assert here.sandbox.reload()["statusCode"] == 200  # which goes by HTTPS


def close(here: Site, code: int, reason: str) -> None:
    """The server closes the agent's WebSocket."""
    socket = here.sandbox.sandbox.agents[AGENT_ID]
    frame = Frame(Opcode.CLOSE, Close(code, reason).serialize())
    here.sandbox.loop.call_soon_threadsafe(socket._writer.write, frame.serialize(mask=False))


@pytest.mark.parametrize("code", [1008, 4000])
def test_why_the_server_closed_is_in_the_log(tmp_path: Path, code: int) -> None:
    with site(tmp_path, {"A": "?enhanced=aa"}) as here:
        close(here, code, "another took its place")
        assert f"({code}: " in here.agent.logged("another took its place")
        works(here)


def test_a_reason_to_close_that_may_quote_a_message_is_not_in_the_log(tmp_path: Path) -> None:
    with site(tmp_path, {"A": "?enhanced=aa"}) as here:
        here.sandbox.faults.silent = True
        with here.device("A") as device:
            device.ask(message("QUOTED", patient="SECRET-1"))
        here.sandbox.wait_ids("QUOTED")
        close(here, 1011, "cannot read PID|1||SECRET-1")
        here.agent.logged("the connection was closed (1011)")
        here.sandbox.faults.silent = False
        here.sandbox.wait_for(lambda: here.sandbox.answered, 15)
        assert b"SECRET" not in here.agent.main_log()


@pytest.mark.parametrize("ahead", [0, -7200, 7200])
def test_a_login_that_is_to_wait_until_a_date_waits(ahead: int) -> None:
    """The other form of Retry-After (RFC 9110 10.2.3), by the server's own clock."""
    dates = [email.utils.formatdate(time.time() + ahead + wait, usegmt=True) for wait in (0, 30)]
    with refusing(429, Date=dates[0], Retry_After=dates[1]) as (port, asked_for):
        asyncio.run(log_in(port, 429, times=3))
    assert len(asked_for) == 1


@pytest.mark.parametrize("begins", [True, False])
def test_hours_on_a_day_that_is_shorter_or_longer(monkeypatch: pytest.MonkeyPatch, begins: bool) -> None:
    """Noon; the clocks were set at three, two hours after the channel opened: it was open for 10 hours, or for 12."""
    now = datetime.datetime.now(datetime.UTC)
    west = now.hour * 60 + now.minute - 12 * 60  # where it is noon now, as TZ counts (POSIX 8.3)
    winter, summer = (west + 60, west) if begins else (west, west - 60)
    today = (now - datetime.timedelta(minutes=west)).timetuple().tm_yday - 1
    days = f"{today}/3,{(today + 100) % 365}/3" if begins else f"{(today + 200) % 365}/3,{today}/3"
    shown = [f"{'-' * (minutes < 0)}{abs(minutes) // 60}:{abs(minutes) % 60:02}" for minutes in (winter, summer)]
    monkeypatch.setenv("TZ", f"AAA{shown[0]}BBB{shown[1]},{days}")
    time.tzset()
    try:
        settings = ma.Hl7Settings(expectHours="01:00-24:00")
        open_secs = ma.expected_secs(settings, 1e6)
        assert open_secs is not None and round(open_secs / 3600, 1) == (10 if begins else 12)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_what_a_firewall_has_forgotten_is_not_used_again(tmp_path: Path) -> None:
    """One that was replaced by its twin: the WebSocket's end shows that connections which lie idle have none, too."""
    with site(tmp_path, {"A": "?enhanced=aa"}, start=False) as here, Relay(here.sandbox.sandbox.port) as relay:
        here.agent = AgentProcess(
            here.sandbox, tmp_path / "state", config="heartbeatSecs = 0.5\n", url=f"http://127.0.0.1:{relay.port}/"
        )
        try:
            here.agent.start()
            here.sandbox.reload()
            before = here.sandbox.sandbox.agents[AGENT_ID]
            relay.freeze()
            here.sandbox.wait_for(lambda: here.sandbox.sandbox.agents.get(AGENT_ID) not in (before, None), 20)
            assert here.sandbox.reload()["statusCode"] == 200  # the server waits five seconds for it
            works(here)
        finally:
            here.agent.discard()


def test_a_text_in_many_fragments_takes_no_more_than_its_size(tmp_path: Path) -> None:
    """Also with control frames in between (RFC 6455 5.4): one that came byte by byte took 138 times as much."""
    text, pieces = b'{"type": "agent:dance:request", "callback": "C", "more": "%b"}' % (b"x" * 2**19), list[bytes]()
    for at in range(len(text)):
        kind = Opcode.CONT if at else Opcode.TEXT
        pieces.append(Frame(kind, text[at : at + 1], fin=at == len(text) - 1).serialize(mask=False))
    pieces[2**18] += Frame(Opcode.PING, b"p" * 125).serialize(mask=False)
    with site(tmp_path, {"A": "?enhanced=aa"}) as here:
        works(here)
        before, socket = here.agent.memory_kb(), here.sandbox.sandbox.agents[AGENT_ID]
        here.sandbox.loop.call_soon_threadsafe(socket._writer.write, b"".join(pieces))
        eventually(lambda: "agent:dance:request" in str(here.sandbox.sandbox.errors), 20)
        assert here.agent.memory_kb() - before < 25_000


def test_a_server_whose_first_address_is_dead_is_asked_at_the_next(tmp_path: Path) -> None:
    """Such as IPv6 where a router drops it: HTTPS waited 8 s for it on each new connection, the server 5 s for us."""
    authority, path = trustme.CA(), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    with (
        site(tmp_path, {"A": "?enhanced=aa"}, context=server_side(authority), start=False) as here,
        contextlib.ExitStack() as stack,
    ):
        port = here.sandbox.sandbox.port
        hole = stack.enter_context(socket.socket())  # a listener whose backlog is full answers no SYN
        hole.bind(("127.0.0.2", port))
        hole.listen(0)
        for _ in range(4):
            filling = stack.enter_context(socket.socket())
            filling.setblocking(False)
            filling.connect_ex(hole.getsockname())
        here.agent = AgentProcess(
            here.sandbox, tmp_path / "state", config=f'caFile = "{path}"\n', url=f"https://localhost:{port}/"
        )
        stack.callback(here.agent.discard)
        changed(
            here.agent,
            "import socket\nlook_up = socket.getaddrinfo\n"
            "def both(host, port, *rest, **more):\n"
            "    if host != 'localhost': return look_up(host, port, *rest, **more)\n"
            "    return [look_up(one, port, *rest, **more)[0] for one in ('127.0.0.2', '127.0.0.1')]\n"
            "socket.getaddrinfo = both",
        )
        started = time.monotonic()
        here.agent.start()
        works(here)
        here.sandbox.cut()
        here.sandbox.wait_for(lambda: not here.sandbox.connected)
        here.agent.wait_connected()
        assert here.sandbox.reload()["statusCode"] == 200  # the server waits five seconds for it
        assert time.monotonic() - started < 16
