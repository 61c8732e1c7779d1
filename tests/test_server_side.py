"""The server's side as sites have it: gateways that refuse in its name, proxies, logins that fail while all runs."""

import asyncio
import contextlib
import http.server
import json
import socket
import subprocess
import threading
from pathlib import Path
from typing import ClassVar

import pytest

import medplum_agent as ma
from tests.dicom_peers import FAST, QUIET, made, silent_bot, start, store
from tests.support import AGENT_ID, bot, changed, message, site

pytestmark = QUIET

BEATING = "heartbeatSecs = 1\n"
QUICK = "m.TOKEN_REFRESH_SPACING_SECS = m.RECONNECT_MAX_SECS = 0.3"


def logins(here) -> int:
    return here.sandbox.sandbox.requests.count("POST /oauth2/token")


def logs_in(here) -> None:
    """Wait for its next login."""
    before = logins(here)
    here.sandbox.wait_for(lambda: logins(here) > before, 15)


def states(here) -> list[tuple[str, str | None]]:
    """State and error of each message, in the order of arrival."""
    with contextlib.closing(here.agent.database()) as database:
        return database.execute("SELECT state, error_code FROM queue ORDER BY id").fetchall()


# --- logins ---


def test_a_gateway_that_refuses_images_holds_up_no_message(tmp_path: Path) -> None:
    """Its 401 took the token away from all, and each upload logged in anew (62 times in 155 s where that was answered
    with 429): each message of another channel waited 6 to 13 s."""
    channels = {"PACS": f"dicom://127.0.0.1:{{port}}?{FAST}", "A": ""}
    with site(tmp_path, channels, start=False) as here:
        start(here)
        here.sandbox.bot = bot("AA")
        here.sandbox.faults.read_failures["Binary"] = 401
        here.sandbox.faults.token_failures, here.sandbox.faults.token_status = 1000, 429
        before = logins(here)
        assert store(here.ports["PACS"], made(100)) == [0]
        here.sandbox.wait_for(lambda: logins(here) > before, 15)  # as the upload was refused
        with here.device("A") as device:
            for number in range(10):
                assert device.ask(message(f"HL7-{number}"))[0] == "AA"
                here.sandbox.wait_ids(f"HL7-{number}")


def test_a_secret_that_is_changed_costs_no_object(tmp_path: Path) -> None:
    """The login's status 400 was taken for the answer of STOW-RS: each object of that time became a dead letter."""
    channels = {"PACS": f"dicom://127.0.0.1:{{port}}?{FAST}&storage=dicomweb"}
    with site(tmp_path, channels, start=False, config=BEATING) as here:
        changed(here.agent, QUICK)
        here.sandbox.bot = silent_bot
        start(here)
        client = here.sandbox.sandbox._client
        here.sandbox.sandbox._client = (client[0], "rotated")
        here.sandbox.sandbox.revoke_tokens()
        assert store(here.ports["PACS"], made(100)) == [0]
        here.sandbox.wait_for(lambda: logins(here) > 2, 15)
        assert states(here) in ([("queued", "connection-lost")], [("queued", None)])
        here.sandbox.sandbox._client = client
        here.sandbox.wait_for(lambda: len(here.sandbox.seen) == 1, 20)


@pytest.mark.parametrize("hours", [-3, 3])
def test_a_clock_that_is_wrong_by_hours_holds_up_no_message(tmp_path: Path, hours: int) -> None:
    """Ahead, no token was ever good enough; behind, the first message after a token's end waited for its time-out."""
    with site(tmp_path, {"A": ""}, start=False, config=BEATING) as here:
        changed(here.agent, f"import time\nreal = time.time\ntime.time = lambda: real() + {hours * 3600}\n{QUICK}")
        here.sandbox.faults.jwt, here.sandbox.faults.token_lifetime = True, 2
        here.agent.start()
        for number in range(2):
            logs_in(here)
            with here.device("A") as device:
                assert device.ask(message(f"CLOCK-{number}"))[0] == "AA"


# --- reverse proxies ---


def test_pages_of_a_search_behind_a_path(tmp_path: Path) -> None:
    """The server's link to the next page has its own path, not that of baseUrl: a search of two pages failed."""

    class Prefixed(http.server.BaseHTTPRequestHandler):
        asked: ClassVar[list[str]] = []

        def do_POST(self):
            self.answer({"access_token": "opaque"})

        def do_GET(self):
            self.asked.append(self.path)
            page = self.path.count("_offset")
            more = {"relation": "next", "url": "http://inner:8103/fhir/R4/DicomStudy?a=b%2Cc&_offset=1"}
            links = [] if page else [more]
            self.answer({"resourceType": "Bundle", "link": links, "entry": [{"resource": {"id": str(page)}}]})

        def answer(self, resource):
            content = json.dumps(resource).encode()
            self.send_response(200 if self.path.startswith("/clinic/") else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    async def search(port):
        fhir = ma.Fhir(ma.ProcessSettings(f"http://127.0.0.1:{port}/clinic/", "client", "secret", AGENT_ID))
        return await fhir.search("DicomStudy?a=b%2Cc")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Prefixed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert asyncio.run(search(server.server_port)) == [{"id": "0"}, {"id": "1"}]
        finally:
            server.shutdown()
    first = "/clinic/fhir/R4/DicomStudy?a=b%2Cc"
    assert Prefixed.asked == [first, f"{first}&_offset=1"]


@pytest.mark.parametrize("status", [302, 401])
def test_a_gateway_that_stands_before_the_configuration_costs_no_channel(tmp_path: Path, status: int) -> None:
    """What it says at the first start (a redirect to a login page, say) was taken for the Endpoint's: its channel was
    left out until a reload."""
    with site(tmp_path, {"A": ""}, start=False) as here:
        changed(here.agent, QUICK)
        here.sandbox.faults.read_failures["Endpoint/1"] = status
        here.agent.start(ready=False)
        here.agent.logged("cannot be read")
        del here.sandbox.faults.read_failures["Endpoint/1"]
        here.agent.wait_listening()


def test_a_bot_that_takes_its_time_hears_a_replay_once(tmp_path: Path) -> None:
    """After a time-out, ours or a gateway's (504), it was asked to run again, twice, though it may have run."""
    with site(tmp_path, {"A": ""}) as here:
        with here.device("A") as device:
            assert device.ask(message("SLOW-1"))[0] == "AA"
        here.agent.wait_state("SLOW-1", "processed")
        settings = tmp_path / "replay.toml"
        settings.write_text(
            f'baseUrl = "{here.sandbox.url}"\nclientId = "sandbox-client"\nclientSecret = "sandbox-secret"\n'
            f'agentId = "{AGENT_ID}"\nstateDir = "{here.agent.state_dir}"\n'
        )
        changed(here.agent, "m.HTTP_TIMEOUT_SECS = 1")
        here.sandbox.faults.hold = "/fhir/R4/Bot"
        given = ["queue", "replay", "--channel", "A", "--since", "1h", "--to", "Bot/9", "--config", str(settings)]
        done = subprocess.run(
            [*here.agent.COMMAND, *given], capture_output=True, text=True, env=here.agent._env, timeout=60
        )
        assert done.returncode and "0 messages are done" in done.stdout + done.stderr
        here.sandbox.faults.hold = ""
        here.sandbox.wait_for(lambda: here.sandbox.sandbox.executed, 5)
        assert here.sandbox.sandbox.requests.count("POST /fhir/R4/Bot/9/$execute") == 1


# --- what is said ---


def answering(listening: socket.socket, words: bytes) -> None:
    """Whatever is asked, as a proxy or gateway would."""
    with contextlib.suppress(OSError):
        while True:
            with listening.accept()[0] as client:
                client.recv(65536)
                client.sendall(words)


@pytest.mark.parametrize(("status", "reason"), [(403, "Forbidden"), (407, "Proxy Authentication Required")])
def test_a_proxy_that_refuses_is_said_in_its_words(monkeypatch, status: int, reason: str) -> None:
    """A tuple with the name of a class stood in the main log."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ma, "HTTP_ATTEMPTS", 1)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listening.getsockname()[1]}")
        words = f"HTTP/1.1 {status} {reason}\r\nContent-Length: 0\r\n\r\n".encode()
        threading.Thread(target=answering, args=(listening, words), daemon=True).start()
        fhir = ma.Fhir(ma.ProcessSettings("https://far.test/", "client", "secret", AGENT_ID))
        with pytest.raises(ma.ServerError) as refused:
            asyncio.run(fhir.renew())
        listening.shutdown(socket.SHUT_RDWR)
    assert str(refused.value) == f"far.test cannot be reached: the proxy: Tunnel connection failed: {status} {reason}"


def test_a_gateway_of_http_1_0_is_quoted(tmp_path: Path) -> None:
    """As HAProxy's error pages were: all that was said is that the answer is not valid."""
    with socket.create_server(("127.0.0.1", 0)) as listening, site(tmp_path, {"A": ""}, start=False) as here:
        words = b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: text/html\r\n\r\n<html>"
        threading.Thread(target=answering, args=(listening, words), daemon=True).start()
        where = f"ws://127.0.0.1:{listening.getsockname()[1]}/ws/agent"
        changed(here.agent, f"m.Uplink.url = property(lambda self: {where!r}, lambda self, url: None)")
        here.agent.start(ready=False)
        assert "HTTP/1.0 503 Service Unavailable" in here.agent.logged("No connection")
        listening.shutdown(socket.SHUT_RDWR)
