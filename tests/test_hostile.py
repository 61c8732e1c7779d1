"""What somebody hostile tries, a second time: bombs, floods, strangers' files, and what is left lying about."""

import asyncio
import http.client
import io
import itertools
import json
import math
import os
import resource
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress

import pytest

import medplum_agent as ma
from medplum_agent import MAX_OMITTED, MIB
from tests.dicom_peers import QUIET, SUCCESS, Scu, imaging_site, made, transmits
from tests.releases import throw_away_keys
from tests.support import ROOT, changed, eventually, free_ports, message, site

EXPLICIT, DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"


def deflated(*parts: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return b"".join(map(deflate.compress, parts)) + deflate.flush()


@QUIET
def test_a_small_deflated_object_is_not_a_large_one_in_memory(tmp_path):
    """One of zeros, and one of attributes: each some hundred kilobytes, and 80 MiB or more when inflated."""
    usual = made(0, EXPLICIT)
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OW", 0, 120 * MIB)
    attributes = struct.pack("<HH2sH", 0x1001, 0x1000, b"LO", 0) * (MIB // 8)
    zeros = usual._replace(syntax=DEFLATED, content=deflated(usual.content, pixels, *[bytes(MIB)] * 120))
    many = usual._replace(syntax=DEFLATED, content=deflated(usual.content, *[attributes] * 80))
    with imaging_site(tmp_path, {"CT": "dicom://127.0.0.1:{port}"}) as here:
        before, began = here.agent.memory_kb(), time.monotonic()
        with Scu.for_instances(here.ports["CT"], zeros, timeout=60) as scu:
            assert scu.store(zeros) == scu.store(many) == SUCCESS
        assert here.agent.memory_kb() - before < 100_000
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
        for _ in range(66):
            idle.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert [asked("/healthz").read() for _ in range(3)] == [b"well"] * 3
        assert [events.readline()[:6] for _ in range(5)].count(b"data: ") >= 2, "who has the token stays"


# --- in the place of the server ---


@contextmanager
def dripping(drips: int) -> Iterator[str]:
    """A server whose first answers come a byte at a time, and never whole; later ones are three bytes. Its address."""
    done = threading.Event()

    def answer(accepted: socket.socket, slow: bool) -> None:
        with accepted, suppress(OSError):
            accepted.recv(65536)
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/dicom\r\nContent-Length: %d\r\n\r\n"
            accepted.sendall(head % (5000 if slow else 3) + (b"" if slow else b"abc"))
            while slow and not done.wait(0.1):
                accepted.sendall(b"x")

    def listen() -> None:
        with suppress(OSError):
            for number in itertools.count():
                threads.append(threading.Thread(target=answer, args=(listener.accept()[0], number < drips)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=listen)]
        threads[0].start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            done.set()
            listener.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)


def test_downloads_that_drip_hold_up_no_other():
    async def fetch(fhir: ma.Fhir) -> bytes:
        fhir.token = ma.Token("token", math.inf, math.inf)
        for _ in range(ma.TRANSFERS):
            with pytest.raises(TimeoutError), closing(io.BytesIO()) as left:
                async with asyncio.timeout(0.5):
                    await fhir.download("Binary/1", left)
        async with asyncio.timeout(20):
            await fhir.download("Binary/2", file := io.BytesIO())
        return file.getvalue()

    with dripping(ma.TRANSFERS) as url:
        assert asyncio.run(fetch(ma.Fhir(ma.ProcessSettings(url, "client", "secret", "agent-1")))) == b"abc"


@pytest.fixture
def installed(monkeypatch, tmp_path):
    monkeypatch.setattr(ma, "own_program", (tmp_path / "here" / "medplum-agent").absolute)
    monkeypatch.setattr(ma, "ROOT_FILE", throw_away_keys().root)
    (tmp_path / "here").mkdir()


def test_an_upgrade_that_drips_ends(monkeypatch, installed):
    monkeypatch.setattr(ma, "FETCH_SECS", 0.5)
    with dripping(1) as url:
        settings = ma.ProcessSettings("https://x.example/", "a", "b", "c", upgradeUrl=url)
        began = time.monotonic()
        with pytest.raises(ma.LocalError, match="did not come within"):
            ma.Versions().fetch(settings, "")
        assert time.monotonic() - began < 15


def test_a_bundle_of_strangers_writes_nothing_elsewhere(installed, tmp_path):
    """Links in folders so deep that no path names them lead out, as Python's own filter did not see for years."""
    whole, bundle, long = "", tmp_path / "evil.bundle", "d" * 247
    steps = "abcdefghijklmnop"
    with tarfile.open(bundle, "w") as archive:

        def add(name: str, link: str = "", kind: bytes = tarfile.SYMTYPE) -> None:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, link
            archive.addfile(entry, io.BytesIO())

        for step in steps:
            add(f"{whole}{long}", kind=tarfile.DIRTYPE)
            add(f"{whole}{step}", long)
            whole += f"{long}/"
        up = f"{'/'.join(steps)}/{'l' * 254}"
        add(up, "../" * len(steps))
        add("out", f"{up}/../../../../")
        add("out/written", kind=tarfile.REGTYPE)
    settings = ma.ProcessSettings("https://x.example/", "a", "b", "c")
    with pytest.raises(ma.LocalError):
        ma.Versions().fetch(settings, "", str(bundle))
    assert not [*tmp_path.rglob("written")]


@pytest.mark.parametrize("page", [{"entry": ["x"]}, {"entry": 1}, {"link": [1]}, {"link": [{"relation": "next"}]}, {}])
def test_pages_of_a_search_that_are_none_or_lead_to_themselves(page):
    asked = list[str]()

    async def search(fhir: ma.Fhir) -> None:
        async def get(url: str, what: str, kind: str) -> ma.Json:
            asked.append(url)
            for link in page.get("link", []):
                if isinstance(link, dict):
                    link["url"] = url
            return {"resourceType": kind} | page

        fhir._get = get  # type: ignore[method-assign]
        with suppress(ma.ServerError) if page else nullcontext():
            assert await fhir.search("DicomStudy?_count=1000") == []

    asyncio.run(search(ma.Fhir(ma.ProcessSettings("https://x.example/", "a", "b", "c"))))
    assert len(asked) <= 1000


def test_a_doctor_does_not_read_every_study_of_the_server(tmp_path):
    """It said that the server does not answer, and advised another access policy."""
    with site(tmp_path, {"CT": "dicom://127.0.0.1:{port}?answer=server"}, start=False) as here:
        study = {"resourceType": "DicomStudy", "studyInstanceUid": "1.2.3"}
        here.sandbox.sandbox.resources.update({f"DicomStudy/{n}": study | {"id": str(n)} for n in range(2500)})
        values = [here.sandbox.url, "sandbox-client", "sandbox-secret", "agent-1", "--state-dir", str(tmp_path)]
        command = [sys.executable, "-m", "medplum_agent", "doctor", *values, "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
        found = [check for check in json.loads(done.stdout)["checks"] if check["name"] == "rights"]
        assert found[0]["text"] == "DicomStudy can be searched", found


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


@pytest.mark.skipif(os.name != "posix", reason="asks for the rights of POSIX")
def test_a_working_directory_that_a_user_may_not_enter_stops_nothing(tmp_path):
    """As of `sudo -u medplum-agent` in root's home: with --config, too, it was `Permission denied: '.'`."""
    code = """if 1:
    import os, tempfile, medplum_agent as m
    os.chmod(".", 0)
    file = tempfile.NamedTemporaryFile(dir="/tmp")
    os.chmod(file.name, 0o644)
    if os.geteuid() == 0:
        os.seteuid(65534)
    print(m.read_config_file(file.name)[1], m.read_config_file(None))
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    (folder := tmp_path / "home").mkdir()
    found = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert found.stdout == "{} ('', {})\n", found.stderr


def test_neither_commands_nor_dumps_of_memory_get_a_secret(tmp_path):
    key, heard = tmp_path / "key", tmp_path / "heard"
    key.write_text("k" * 64)
    config = f"""storeKey = "command:sh -c 'env > {heard}-key; cat {key}'"
alarmTo = "sh -c 'env > {heard}-alarm'"
"""
    most = resource.getrlimit(resource.RLIMIT_CORE)[1]
    secret, dumps = {"MEDPLUM_CLIENT_SECRET": "hush-hush"}, ["prlimit", f"--core={'unlimited' if most < 0 else most}"]
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


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root has commands in a service's folder")
def test_what_root_makes_in_the_folder_of_a_service_is_the_services(tmp_path):
    """After `sudo queue rekey` it refused every message, after `sudo queue show --payload` the cloud's looks."""
    (key := tmp_path / "key").write_text("k" * 64)
    with site(tmp_path, {"A": "?enhanced=true"}, config="heartbeatSecs = 5") as here:
        with here.device("A") as device:
            assert device.ask(message("OURS-1"))[0] == "CA"
        number = here.agent.wait_state("OURS-1", "processed")["id"]
        here.agent.terminate()
        folder = here.agent.state_dir
        for path in (folder, *folder.iterdir()):
            os.chown(path, 4321, 4321)
        values = [here.sandbox.url, "sandbox-client", "sandbox-secret", "agent-1"]
        names = ("BASE_URL", "CLIENT_ID", "CLIENT_SECRET", "AGENT_ID")
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        env |= {f"MEDPLUM_{name}": value for name, value in zip(names, values, strict=True)}
        for words in (["show", str(number), "--payload"], ["rekey", "--to", f"file:{key}"]):
            command = [sys.executable, "-m", "medplum_agent", "queue", *words, "--state-dir", str(folder)]
            subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=True)
        found = {path.name: path.stat().st_uid for path in folder.iterdir()}
        assert {
            "medplum-agent-audit.log",
            "medplum-agent-queue.sqlite",
            "medplum-agent-queue.sqlite.key",
        } < found.keys()
        assert {*found.values()} == {4321}
