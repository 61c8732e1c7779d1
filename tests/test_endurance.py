"""Hosts that give little, and addresses that few have."""

import socket
from pathlib import Path

import pytest

from tests.dicom_peers import Aborted, made, start, store
from tests.support import AgentProcess, Receiver, changed, eventually, message, site

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
