"""Networks that fail between real kernels: agent, server and devices each in a network namespace of its own."""

import asyncio
import contextlib
import ctypes
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trustme
from demo import sandbox_resources

import medplum_agent
from tests.support import (
    AGENT_ID,
    AgentProcess,
    Device,
    SandboxThread,
    Site,
    accepts,
    ack_text,
    changed,
    eventually,
    message,
)

CLONE_NEWNET = 0x40000000


def ip(command: str, space: str = "") -> None:
    """`ip`, where `space` says inside of a namespace."""
    subprocess.run(["ip", *(["-n", space] if space else []), *command.split()], check=True, capture_output=True)


@contextlib.contextmanager
def inside(space: str) -> Iterator[None]:
    """Sockets that this thread makes belong to this namespace."""
    setns = ctypes.CDLL(None, use_errno=True).setns
    with open("/proc/thread-self/ns/net", "rb") as here, open(f"/run/netns/{space}", "rb") as there:
        assert setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert setns(here.fileno(), CLONE_NEWNET) == 0


class Network:
    """Agent, server and device at 10.98.1.2, .2.2 and .3.2, each behind its own cable to a router."""

    PLACES = "agent", "server", "device"

    def __init__(self) -> None:
        self.spaces = {name: f"cables-{os.getpid()}-{name}" for name in ("router", *self.PLACES)}

    def __enter__(self) -> "Network":
        try:
            for space in self.spaces.values():
                ip(f"netns add {space}")
                ip("link set lo up", space)
            for number, place in enumerate(self.PLACES, 1):
                self._plug(number, self.spaces[place])
            forward = "ip netns exec", self.spaces["router"], "cp /dev/stdin /proc/sys/net/ipv4/ip_forward"
            subprocess.run(" ".join(forward).split(), input=b"1", check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            words = getattr(error, "stderr", b"").decode().strip() or error
            pytest.skip(f"NO NETWORK NAMESPACES: faults of real networks were not tried: {words}")
        return self

    def __exit__(self, *_: object) -> None:
        for space in self.spaces.values():
            with contextlib.suppress(subprocess.CalledProcessError):
                ip(f"netns del {space}")

    def _plug(self, number: int, space: str) -> None:
        router = self.spaces["router"]
        ip(f"link add cable netns {space} type veth peer name c{number} netns {router}")
        ip(f"addr add 10.98.{number}.2/24 dev cable", space)
        ip(f"addr add 10.98.{number}.1/24 dev c{number}", router)
        ip("link set cable gso_max_segs 1 up", space)  # packets as they are on a wire
        ip(f"link set c{number} gso_max_segs 1 up", router)
        ip(f"route add default via 10.98.{number}.1", space)

    def most(self, place: str, size: int) -> None:
        """Packets to this place that are larger vanish, and who sends them is not told."""
        ip(f"link set cable mtu {size}", self.spaces[place])
        ip(f"route change default advmss 1460 via 10.98.{self.PLACES.index(place) + 1}.1", self.spaces[place])

    def slow(self, kbit: int) -> None:
        """What the agent sends takes its time: nothing is lost."""
        limit = f"tbf rate {kbit}kbit burst 4kb latency 400ms"
        command = ["tc", "-n", self.spaces["agent"], "qdisc", "add", "dev", "cable", "root", *limit.split()]
        if not shutil.which("tc") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("NO SLOW LINES: messages that take longer than their time-out were not tried: no `tc` with tbf")

    def forget(self, port: int) -> None:
        """A firewall on the way no longer knows the connections of this port, and says nothing."""
        for end in "--sport", "--dport":
            rule = f"iptables -A FORWARD -p tcp {end} {port} -j DROP"
            command = ["ip", "netns", "exec", self.spaces["router"], *rule.split()]
            if not shutil.which("iptables") or subprocess.run(command, capture_output=True).returncode:
                pytest.skip("NO FIREWALL: connections that it forgets were not tried: no `iptables`")


class Server(SandboxThread):
    """The stand-in server in its namespace."""

    def __init__(
        self, network: Network, resources: Mapping[str, medplum_agent.Json], context: ssl.SSLContext | None = None
    ):
        self._network = network
        super().__init__(resources, context)

    def start(self) -> None:
        with inside(self._network.spaces["server"]):
            ear = socket.create_server(("0.0.0.0", self.sandbox.port))
        self.call(self.sandbox.start(context=self._context, ear=ear))

    @property
    def url(self) -> str:
        return super().url.replace("127.0.0.1", "10.98.2.2")


@pytest.fixture
def network() -> Iterator[Network]:
    if os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("ip"):
        pytest.skip("NO NETWORK NAMESPACES: faults of real networks were not tried: that needs Linux, root and `ip`")
    with Network() as found:
        yield found


@contextlib.contextmanager
def cabled(
    network: Network, folder: Path, channels: Mapping[str, str], code: str = "",
    context: ssl.SSLContext | None = None, **agent: Any,
) -> Iterator[Site]:  # fmt: skip
    """A running Site on this network; `channels`: name -> query of its address."""
    ports = {name: 20000 + number for number, name in enumerate(channels)}
    addresses = {name: f"mllp://0.0.0.0:{ports[name]}{query}" for name, query in channels.items()}
    with Server(network, sandbox_resources(AGENT_ID, addresses), context) as server:
        wrapper = ["ip", "netns", "exec", network.spaces["agent"]]
        process = AgentProcess(server, folder / "state", wrapper=wrapper, **agent)
        try:
            if code:
                changed(process, code)
            process.start(ready=False)
            process.wait_connected()
            with inside(network.spaces["device"]):
                eventually(lambda: all(accepts(("10.98.1.2", port)) for port in ports.values()), 20, "ports open")
            yield Site(server, process, ports)
            assert b"Internal error" not in process.main_log(), process.main_log().decode()[-3000:]
        finally:
            process.discard()


@contextlib.contextmanager
def beating(server: SandboxThread) -> Iterator[None]:
    """The server asks for a sign of life much more often than every ten seconds."""

    async def beat() -> None:
        while True:
            for agent in server.sandbox.agents.values():
                agent.send({"type": "agent:heartbeat:request"})
            await asyncio.sleep(0.2)

    task = asyncio.run_coroutine_threadsafe(beat(), server.loop)
    yield
    task.cancel()


def device(network: Network, here: Site, channel: str) -> Device:
    with inside(network.spaces["device"]):
        return here.device(channel, host="10.98.1.2")


def test_what_the_network_swallows_for_its_size_stops_no_other(network, tmp_path):
    """RFC 2923 2.1, a black hole: large packets vanish without a word, small ones pass.

    The server is still heard, so its silence ended nothing: Linux sent a large message for 15 minutes, all channels
    waited behind it, and the log blamed the Bot.
    """
    channels = {"ADT": "?enhanced=true", "LAB": "?enhanced=true"}
    code = "m.RECONNECT_MAX_SECS = 0.5"
    with (
        cabled(network, tmp_path, channels, code, config="heartbeatSecs = 0.5") as here,
        device(network, here, "ADT") as large, device(network, here, "LAB") as small,
        beating(here.sandbox),
    ):  # fmt: skip
        network.most("server", 1000)
        with inside(network.spaces["agent"]), here.device("ADT") as inner:
            assert inner.ask(message("LARGE", "PAT-1", size=9000)) == ("CA", "LARGE")
        here.agent.logged("Connection timed out")
        assert small.ask(message("SMALL", "PAT-2")) == ("CA", "SMALL")
        here.sandbox.wait_ids("SMALL", timeout=30)
        assert "LARGE" not in here.sandbox.ids()
        network.most("server", 1500)
        here.sandbox.wait_ids("LARGE", timeout=30)
        assert large.ask(message("NEXT", "PAT-1")) == ("CA", "NEXT")
        here.sandbox.wait_ids("NEXT", timeout=20)


def test_a_large_message_over_a_slow_line_goes_once(network, tmp_path):
    """The time-out of an answer counted from when a message was handed to the socket: at 128 kbit/s 2 MB take longer.

    It went twice, the Bot had it twice, and what waited behind it waited twice as long and was sent twice, too.
    """
    query = "?enhanced=true&responseTimeoutSecs=3&autoRetryBaseDelayMs=100"
    with cabled(network, tmp_path, {"ADT": query, "LAB": query}) as here:
        network.slow(640)
        with inside(network.spaces["agent"]), here.device("ADT") as large, here.device("LAB") as small:
            assert large.ask(message("LARGE", "PAT-1", size=560_000)) == ("CA", "LARGE")
            assert small.ask(message("SMALL", "PAT-2")) == ("CA", "SMALL")
        here.sandbox.wait_ids("LARGE", "SMALL", timeout=30)
        for control in "LARGE", "SMALL":
            assert here.agent.wait_state(control, "processed")["attempts"] == 1, here.agent.main_log().decode()[-500:]


def test_a_push_finds_the_connection_that_a_device_opened_since(network, tmp_path):
    """The old one leads nowhere: Linux sends its last answer for a quarter of an hour."""
    place = network.spaces["server"]
    with (
        cabled(network, tmp_path, {"ADT": ""}) as here, inside(place), here.caller() as caller,
        device(network, here, "ADT") as old, device(network, here, "ADT") as new,
    ):  # fmt: skip
        host, port = old.socket.getsockname()[:2]
        here.sandbox.faults.delay = lambda: 1.0
        old.send(message("OLD"))
        here.sandbox.wait_ids("OLD")
        network.forget(port)
        caller.store(f"channel://ADT/{host}", message("PUSHED"))
        assert new.receive() == message("PUSHED")
        new.send(ack_text("AA", "PUSHED"))
        here.agent.wait_state("PUSHED", "processed")


def test_several_large_messages_over_a_slow_line_go_once_by_tls(network, tmp_path):
    """asyncio's TLS does not tell what its transport holds: megabytes of messages seemed to have left."""
    query = "?enhanced=true&responseTimeoutSecs=5&autoRetryBaseDelayMs=100"
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("10.98.2.2").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    controls = [f"LARGE-{number}" for number in range(10)]
    with cabled(network, tmp_path, {"ADT": query}, context=context, config=f'caFile = "{tmp_path}/ca.pem"') as here:
        network.slow(1280)
        with inside(network.spaces["agent"]), here.device("ADT") as large:
            for control in controls:
                assert large.ask(message(control, control, size=250_000))[0] == "CA"
        here.sandbox.wait_ids(*controls, timeout=40)
        for control in controls:
            assert here.agent.wait_state(control, "processed")["attempts"] == 1, control
