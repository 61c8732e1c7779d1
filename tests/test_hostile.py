"""What somebody hostile tries, a second time: bombs, floods, strangers' files, and what is left lying about."""

import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from contextlib import ExitStack

from medplum_agent import MAX_OMITTED, MIB
from tests.dicom_peers import QUIET, SUCCESS, Scu, imaging_site, made, transmits
from tests.support import ROOT, changed, eventually, free_ports, site
from tests.test_security import memory_mb

EXPLICIT, DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"


def deflated(*parts: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return b"".join(map(deflate.compress, parts)) + deflate.flush()


@QUIET
def test_a_small_deflated_object_is_not_a_large_one_in_memory(tmp_path):
    """One of zeros, and one of attributes: each a few hundred kilobytes, and 240 MiB when inflated."""
    usual = made(0, EXPLICIT)
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OW", 0, 240 * MIB)
    attributes = struct.pack("<HH2sH", 0x1001, 0x1000, b"LO", 0) * (MIB // 8)
    zeros = usual._replace(syntax=DEFLATED, content=deflated(usual.content, pixels, *[bytes(MIB)] * 240))
    many = usual._replace(syntax=DEFLATED, content=deflated(usual.content, *[attributes] * 240))
    with imaging_site(tmp_path, {"CT": "dicom://127.0.0.1:{port}"}) as here:
        before, began = memory_mb(here), time.monotonic()
        with Scu.for_instances(here.ports["CT"], zeros, timeout=60) as scu:
            assert scu.store(zeros) == scu.store(many) == SUCCESS
        assert memory_mb(here) - before < 100
        assert time.monotonic() - began < 20
        told = [json.loads(row["original"]) for row in here.agent.rows(usual.uid)]
        assert all("00100010" in one["dataset"] for one in told) and told[1]["omitted"] == ["10011000"] * MAX_OMITTED
        here.sandbox.wait_for(lambda: len(transmits(here, usual.uid)) == 2)
        eventually(lambda: not [*here.agent.state_dir.glob("*.spool/*")], 20, "nothing stays in the spool")


def test_strangers_who_say_nothing_keep_no_monitor_out(tmp_path):
    (port,) = free_ports(1)
    with site(tmp_path, {"A": ""}, config=f"statusAddress = '127.0.0.1:{port}'") as here, ExitStack() as idle:

        def asked(path: str) -> http.client.HTTPResponse:
            page = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            idle.callback(page.close)
            page.request("GET", path, headers=token)
            return page.getresponse()

        token = {"Authorization": f"Bearer {(here.agent.state_dir / 'agent.token').read_text()}"}
        events = asked("/events")
        for _ in range(200):
            idle.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert [asked("/healthz").read() for _ in range(3)] == [b"well"] * 3
        assert [events.readline()[:6] for _ in range(5)].count(b"data: ") >= 2, "who has the token stays"


# --- the machine ---


def test_settings_that_a_stranger_left_in_the_working_directory_are_not_taken(tmp_path):
    """They name commands, and root may stand in any folder."""
    open_to_all, mark = tmp_path / "open", tmp_path / "mark"
    (open_to_all / "state").mkdir(parents=True)
    (open_to_all / "state" / "medplum-agent-queue.sqlite").write_text("no queue")
    values = "baseUrl='https://x.example/'\nclientId='a'\nclientSecret='b'\nagentId='c'\n"
    config = open_to_all / "agent.toml"
    config.write_text(f"{values}stateDir='{open_to_all}/state'\nstoreKey='command:touch {mark}'\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def asked(*arguments: str) -> str:
        command = [sys.executable, "-m", "medplum_agent", *arguments]
        return subprocess.run(command, cwd=open_to_all, env=env, capture_output=True, text=True, timeout=30).stderr

    open_to_all.chmod(0o1777)
    assert "give it by --config" in asked("queue", "list") and not mark.exists()
    if os.geteuid() == 0:
        open_to_all.chmod(0o755)
        os.chown(open_to_all, 4321, 4321)
        assert "give it by --config" in asked("status") and not mark.exists()
        env["SUDO_UID"] = "4321"
    else:
        open_to_all.chmod(0o755)
    asked("queue", "list")
    assert mark.exists(), "whoever's folder it is has it read"


def test_neither_commands_nor_dumps_of_memory_get_a_secret(tmp_path):
    key, heard = tmp_path / "key", tmp_path / "heard"
    key.write_text("k" * 64)
    config = f"""storeKey = "command:sh -c 'env > {heard}-key; cat {key}'"
alarmTo = "sh -c 'env > {heard}-alarm'"
"""
    secret, dumps = {"MEDPLUM_CLIENT_SECRET": "hush-hush"}, ["prlimit", "--core=unlimited"]
    with site(tmp_path, {"A": ""}, config=config, env=secret, wrapper=dumps, start=False) as here:
        changed(here.agent, "m.LOOK_SECS, m.LOW_DISK_BYTES = 0.1, 1 << 60")
        here.agent.start()
        assert here.agent.process is not None
        with open(f"/proc/{here.agent.process.pid}/limits") as limits:
            assert next(line.split()[4:6] for line in limits if line.startswith("Max core")) == ["0", "0"]
        for name in ("key", "alarm"):
            path = tmp_path / f"heard-{name}"
            told = eventually(lambda: path.exists() and path.read_text(), 20)  # noqa: B023
            assert "PATH=" in told and "hush-hush" not in told
