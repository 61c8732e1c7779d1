"""Hosts that give little, and addresses that few have."""

import asyncio
import socket
import zlib
from functools import partial
from pathlib import Path

import demo
import pytest
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.server import ServerProtocol

import medplum_agent
from tests.dicom_peers import (
    EXPLICIT,
    Aborted,
    Bot,
    Scu,
    assert_no_spool,
    encoded,
    imaging_site,
    keep,
    made,
    made_dataset,
    spooled,
    start,
    store,
)
from tests.support import AGENT_ID, AgentProcess, Receiver, changed, eventually, message, site

# --- what the host gives ---


def test_an_agent_without_a_console_stops_well(tmp_path: Path) -> None:
    """It failed at its very end, with exit code 1, and before it could have gone to another version."""
    with site(tmp_path, {"FEED": "?enhanced=aa"}, wrapper=["sh", "-c", 'exec "$@" >&- 2>&-', "sh"]) as here:
        with here.device("FEED") as device:
            assert device.ask(message("M-1"))[0] == "AA"
        here.sandbox.wait_ids("M-1")
        assert here.agent.terminate()[0] == 0


def refuse_thread(agent: AgentProcess, where: str, call: str, work: str) -> Path:
    """While there is the file that is returned, the system gives no thread for this work; the first time removes it."""
    limit = agent.state_dir.with_name("limit")
    changed(agent, f"""import asyncio, os
given = {where}.{call}
def refuse(*work):
    if {work!r} in str(work) and os.path.exists({str(limit)!r}):
        os.unlink({str(limit)!r})
        raise RuntimeError("can't start new thread")
    return given(*work)
{where}.{call} = refuse""")  # fmt: skip
    return limit


def test_an_association_that_the_system_gives_no_thread_ends_at_once(tmp_path: Path) -> None:
    """A limit of threads was reached (a container's, or of memory): the modality waited a minute for nothing, and each
    object that it sent on this association was taken by nobody."""
    with site(tmp_path, {"PACS": "dicom://127.0.0.1:{port}"}, start=False) as here:
        limit = refuse_thread(here.agent, "asyncio.BaseEventLoop", "run_in_executor", "SpoolFile.write")
        start(here)
        limit.touch()
        with pytest.raises((Aborted, EOFError, ConnectionError)):
            store(here.ports["PACS"], made(3_000_000))
        assert store(here.ports["PACS"], made()) == [0]
        here.agent.logged("can't start new thread")


def test_upkeep_goes_on_when_the_system_gave_no_thread_for_a_moment(tmp_path: Path) -> None:
    """The channel log, retention and alarms stopped for good, and nothing but one line said so."""
    with site(tmp_path, {"FEED": "?enhanced=aa"}, start=False) as here:
        limit = refuse_thread(here.agent, "asyncio", "to_thread", "Log.flush")
        start(here)
        limit.touch()
        eventually(lambda: not limit.exists())
        with here.device("FEED") as device:
            assert device.ask(message("M-1"))[0] == "AA"
        eventually(lambda: any(b"M-1" in log.read_bytes() for log in here.agent.state_dir.glob("*-channels-*")))


# --- addresses ---


def link_local() -> str:
    """An address of this machine with its zone, as the system writes it."""
    with open("/proc/net/if_inet6", encoding="ascii") as file:
        for line in file:
            address, _, _, scope, _, name = line.split()
            if scope == "20":
                return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address)) + f"%{name}"
    pytest.skip("NO LINK-LOCAL ADDRESS: zones in addresses were not checked")


@pytest.mark.parametrize("sign", ["%", "%25"])
def test_a_zone_is_written_as_in_a_uri_or_as_people_do(tmp_path: Path, sign: str) -> None:
    """`%25` before the zone (RFC 6874): the channel listened on all interfaces, and a push found no such name."""
    address = link_local()
    written = address.replace("%", sign)
    channels = {"FEED": f"mllp://[{written}]:{{port}}?enhanced=aa"}
    with Receiver(host="::") as receiver, site(tmp_path, channels, start=False) as here:
        start(here)
        with socket.create_connection((address, here.ports["FEED"]), 10) as device:
            device.sendall(b"\x0b" + message("M-1").encode() + b"\x1c\r")
            assert b"\rMSA|AA|M-1|" in device.recv(4096)
        with pytest.raises(OSError):
            here.device("FEED")
        push = {"remote": f"mllp://[{written}]:{receiver.port}", "body": message("P-1")}
        answer = here.sandbox.ask("push", contentType="x-application/hl7-v2+er7", **push)
        assert answer["statusCode"] == 200, answer


# --- what the server sends ---


def test_texts_that_are_too_large_when_they_are_inflated_leave_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each closed connection kept the 64 MiB that it had inflated, until Python looked for circles: 435 MB."""
    compressing = partial(ServerProtocol, extensions=[ServerPerMessageDeflateFactory()])
    monkeypatch.setattr(demo, "ServerProtocol", compressing)
    packer = zlib.compressobj(wbits=-15)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(80)) + packer.flush(zlib.Z_SYNC_FLUSH)[:-4]
    frame = b"\xc1\x7f" + len(bomb).to_bytes(8) + bomb
    with site(tmp_path, {"FEED": ""}, config="compression = true", start=False) as here:
        changed(here.agent, "m.back_off = lambda failures: 0.05")
        here.agent.start()
        agents, connections = here.sandbox.sandbox.agents, set[object]()
        for _ in range(5):
            eventually(lambda: agents.get(AGENT_ID) not in {None, *connections})
            connections.add(agents[AGENT_ID])
            here.sandbox.loop.call_soon_threadsafe(agents[AGENT_ID]._writer.write, frame)
        eventually(lambda: agents.get(AGENT_ID) not in {None, *connections})
        with here.device("FEED") as device:
            assert device.ask(message("M-1"))[0] == "AA"
        assert here.agent.memory_kb("VmRSS") < 200_000


def test_a_heartbeat_before_the_connection_is_accepted_is_answered_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the connect request may go before that: the answer went at once."""
    with site(tmp_path, {"FEED": ""}, start=False) as here:
        accept = demo.SandboxSocket._connect

        def beat_first(self: demo.SandboxSocket, request: medplum_agent.Json) -> None:
            self.send({"type": "agent:heartbeat:request"})
            self.send({"type": "agent:stats:request", "callback": "early"})
            asyncio.get_running_loop().call_later(0.3, accept, self, request)

        monkeypatch.setattr(demo.SandboxSocket, "_connect", beat_first)
        here.agent.start()
        with here.device("FEED") as device:
            assert device.ask(message("M-1"))[0] == "AA"
        assert here.sandbox.sandbox.versions[AGENT_ID] != "unknown"


# --- what is begun and left ---


def test_retrievals_that_devices_leave_cost_an_encrypted_queue_nothing(tmp_path: Path) -> None:
    """Its files were written and thrown away at the same time: each left an internal error, up to four files and their
    descriptors, and what they counted for queueMaxMb."""
    key = tmp_path / "key"
    key.write_text("k" * 64)
    key.chmod(0o600)
    get, config = "1.2.840.10008.5.1.4.1.2.2.3", f'storeKey = "file:{key}"'
    with imaging_site(tmp_path, {"PACS": "dicom://127.0.0.1:{port}"}, config=config) as here:
        here.sandbox.bot = bot = Bot()
        bot.replies["C-GET"] = keep(here, made(10_000_000)) * 6
        asked = encoded(made_dataset(QueryRetrieveLevel="STUDY", StudyInstanceUID="1.2.3"))
        for _ in range(3):
            scu = Scu(here.ports["PACS"], [(get, (EXPLICIT,))])
            scu.request(scu.accepted[get, EXPLICIT], {2: get, 0x0100: 0x0010}, asked)
            eventually(lambda: spooled(here))  # the one before left none
            scu.socket.close()
            here.agent.logged("ended without release")
            assert_no_spool(here)
