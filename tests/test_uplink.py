"""The way to the server, with every fault of uplink contract 9 switched on in turn."""

import asyncio
import base64
import contextlib
import fcntl
import http.server
import itertools
import json
import re
import socket
import ssl
import termios
import threading
import time

import demo
import pytest
import trustme
from demo import sandbox_resources
from websockets.frames import Frame, Opcode

import medplum_agent as ma
from tests.support import (
    AGENT_ID,
    ConnectProxy,
    Receiver,
    SandboxThread,
    bot,
    changed,
    control_id,
    eventually,
    message,
    site,
)
from tests.test_tls import Identities

FAST = "responseTimeoutSecs=0.5&autoRetryBaseDelayMs=20&autoRetryMaxDelayMs=40"
BEATING = "heartbeatSecs = 0.2\n"
CALLBACK = re.compile(r"Agent/agent-1-[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}#[1-9][0-9]*")


def asked(here, request):
    return here.sandbox.sandbox.requests.count(request)


def connects(here):
    return asked(here, "GET /ws/agent")


def works(here, control="WORKS-1", channel="A"):
    """A message goes all the way and back."""
    with here.device(channel, timeout=20) as device:
        assert device.ask(message(control)) == ("AA", control)
        assert device.drain(0.1) == []


# --- login ---


@pytest.mark.parametrize(("status", "failures"), [(500, 2), (400, 1)])
def test_login_that_fails_first(tmp_path, status, failures):
    with site(tmp_path, {"A": ""}, start=False) as here:
        here.sandbox.faults.token_status, here.sandbox.faults.token_failures = status, failures
        here.agent.start()
        assert asked(here, "POST /oauth2/token") > failures
        works(here)


def test_server_that_is_not_there_at_first(tmp_path):
    with site(tmp_path, {"A": ""}, start=False) as here:
        here.sandbox.stop()
        here.agent.start(ready=False)
        line = here.agent.logged("cannot be read")
        assert "refused" in line and '"ERROR"' in line
        here.sandbox.start()
        here.agent.wait_listening()
        here.agent.wait_connected()
        works(here)


def test_wrong_secret_is_said_in_the_log_but_not_shown(tmp_path):
    with site(tmp_path, {"A": ""}, start=False, secret="wrong-5ecret") as here:
        here.agent.start(ready=False)
        assert "Invalid secret" in here.agent.logged("login refused")
        assert "wrong-5ecret" not in here.agent.output()


@pytest.mark.parametrize("login_id", [True, False])
def test_a_token_with_login_id_is_confirmed_by_auth_me(tmp_path, login_id):
    with site(tmp_path, {"A": ""}, start=False) as here:
        here.sandbox.faults.jwt, here.sandbox.faults.login_id = True, login_id
        here.agent.start()
        works(here)
        assert asked(here, "GET /auth/me") == (asked(here, "POST /oauth2/token") if login_id else 0)


def test_a_token_near_its_end_is_refreshed_before_the_next_message(tmp_path):
    with site(tmp_path, {"A": ""}, start=False) as here:
        here.sandbox.faults.jwt, here.sandbox.faults.token_lifetime = True, 301
        here.agent.start()
        assert asked(here, "POST /oauth2/token") == 1
        here.sandbox.faults.token_lifetime = 3600
        time.sleep(1.2)  # now it is within five minutes of its end
        works(here)
        assert asked(here, "POST /oauth2/token") == 2


def test_a_token_near_its_end_is_refreshed_without_messages_too(tmp_path):
    with site(tmp_path, {"A": ""}, start=False, config=BEATING) as here:
        here.sandbox.faults.jwt, here.sandbox.faults.token_lifetime = True, 301
        here.agent.start()
        here.agent.wait_connected()
        here.sandbox.faults.token_lifetime = 3600
        eventually(lambda: asked(here, "POST /oauth2/token") == 2, 10, "the second login")
        assert connects(here) == 1


def test_a_login_that_hangs_holds_up_nothing_while_the_token_is_good(tmp_path):
    with site(tmp_path, {"A": ""}, start=False, config=BEATING) as here:
        here.sandbox.faults.jwt, here.sandbox.faults.token_lifetime = True, 301
        here.agent.start()
        here.agent.wait_connected()
        here.sandbox.faults.hold = "/oauth2/token"
        eventually(lambda: asked(here, "POST /oauth2/token") == 2, 10, "the second login")
        works(here, "HANGS-1")
        works(here, "HANGS-2")
        here.sandbox.faults.hold = ""


@contextlib.contextmanager
def refusing(status, **headers):
    """A server that answers logins so: its port, and what it was asked."""
    asked = []

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()


async def log_in(port, status, times=1):
    """What is said of a login that is refused."""
    settings, said = ma.ProcessSettings(f"http://127.0.0.1:{port}/", "client", "secret", AGENT_ID), ""
    fhir = ma.Fhir(settings)
    for _ in range(times):
        with pytest.raises(ma.ServerError) as refused:
            await fhir.renew()
        assert refused.value.status == status
        said = str(refused.value)
    return said


@pytest.mark.parametrize("headers", [{"Retry_After": "30"}, {"RateLimit": '"login";r=0;t=30'}])
def test_a_login_that_is_to_wait_waits(headers):
    """Retry-After (RFC 9110 10.2.3): several agents behind one address would else keep the limit exhausted."""
    with refusing(429, **headers) as (port, asked_for):
        asyncio.run(log_in(port, 429, times=3))
    assert len(asked_for) == 1


@pytest.mark.parametrize(
    ("status", "said"),
    [(301, "at https://there/: baseUrl"), (407, "the proxy's user"), (200, "portal"), (401, "clientId")],
)
def test_a_login_that_is_refused_says_what_to_do(status, said):
    with refusing(status, Location="https://there/") as (port, _):
        assert said in asyncio.run(log_in(port, status))


def test_a_token_that_is_good_serves_on_and_one_that_was_refused_does_not():
    """While logins fail, or are to wait."""

    async def scenario(port):
        settings = ma.ProcessSettings(f"http://127.0.0.1:{port}/", "client", "secret", AGENT_ID)
        fhir = ma.Fhir(settings)
        now = time.time()
        fhir.token = ma.Token("good", now + 250, now)
        for _ in range(2):
            with pytest.raises(ma.ServerError):
                await fhir.renew()
            assert not fhir.due and await fhir.fresh_token() == fhir.usable_token() == "good"
        fhir.rejected = True
        assert fhir.usable_token() is None

    with refusing(429, Retry_After="30") as (port, _):
        asyncio.run(scenario(port))


@pytest.mark.parametrize("lifetime", [20, 290, 3600])
def test_a_token_is_renewed_five_minutes_before_its_end_or_at_half_its_life(lifetime):
    fhir = ma.Fhir(ma.ProcessSettings("http://x/"))
    claims = base64.urlsafe_b64encode(json.dumps({"exp": time.time() + lifetime}).encode()).decode()
    token = fhir._checked_token({"access_token": f"a.{claims}.c"})
    assert token.expires_at - token.renew_at == pytest.approx(min(300, lifetime / 2), abs=1)


def test_a_request_that_is_to_wait_is_made_again(tmp_path):
    with site(tmp_path, {"A": ""}) as here:
        here.sandbox.faults.read_failures[f"Agent/{AGENT_ID}"] = 429
        before = asked(here, f"GET /fhir/R4/Agent/{AGENT_ID}")
        here.sandbox.reload()
        assert asked(here, f"GET /fhir/R4/Agent/{AGENT_ID}") == before + 3  # uplink contract 1


def test_a_server_that_does_not_answer_is_named_by_its_host_alone(monkeypatch):
    """`_HttpsPool(host=...)`, the name of a class, stood in the main log."""
    monkeypatch.setattr(ma, "HTTP_TIMEOUT_SECS", 0.1)
    monkeypatch.setattr(ma, "HTTP_ATTEMPTS", 1)

    async def login(listening):
        port = listening.getsockname()[1]
        with pytest.raises(ma.ServerError) as refused:
            await ma.Fhir(ma.ProcessSettings(f"http://127.0.0.1:{port}/", "client", "secret", AGENT_ID)).renew()
        assert str(refused.value) == f"127.0.0.1:{port} cannot be reached: Read timed out. (read timeout=0.1)"

    with socket.create_server(("127.0.0.1", 0)) as listening:
        asyncio.run(login(listening))


def test_a_proxy_over_tls_that_does_not_answer(monkeypatch, tmp_path):
    """Its CONNECT had the 120 s of an upload, three times over, before a start went on without the server."""
    identities, context = Identities(tmp_path), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(identities.server)
    monkeypatch.setattr(ma, "CONNECT_TIMEOUT_SECS", 0.5)
    monkeypatch.setattr(ma, "TRANSFER_TIMEOUT_SECS", 60.0)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def mute(listening, heard):
        with contextlib.suppress(OSError):
            while True:
                with context.wrap_socket(listening.accept()[0], server_side=True) as client:
                    heard += [client.recv(65536)]
                    client.recv(1)

    async def login():
        settings = ma.ProcessSettings("https://far.test/", "client", "secret", AGENT_ID, caFile=str(identities.ca_file))
        async with asyncio.timeout(20):
            with pytest.raises(ma.ServerError, match=r"cannot be reached"):
                await ma.Fhir(settings).renew()

    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("https_proxy", f"https://127.0.0.1:{listening.getsockname()[1]}")
        threading.Thread(target=mute, args=(listening, heard), daemon=True).start()
        asyncio.run(login())
        assert heard[0].startswith(b"CONNECT far.test:443")
        listening.shutdown(socket.SHUT_RDWR)


def test_an_answer_that_drips_is_given_up(monkeypatch):
    """Each byte comes in time, and the whole never does."""
    monkeypatch.setattr(ma, "HTTP_TIMEOUT_SECS", 0.5)
    done = threading.Event()

    def drip(listening):
        with contextlib.suppress(OSError), listening.accept()[0] as device:
            device.recv(65536)
            device.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n")
            while not done.wait(0.1):
                device.sendall(b" ")

    async def login(port):
        settings = ma.ProcessSettings(f"http://127.0.0.1:{port}/", "client", "secret", AGENT_ID)
        fhir = ma.Fhir(settings)
        async with asyncio.timeout(20):
            with pytest.raises(ma.ServerError, match="cannot be reached"):
                await fhir.renew()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        dripping = threading.Thread(target=drip, args=(listening,))
        dripping.start()
        asyncio.run(login(listening.getsockname()[1]))
        done.set()
        dripping.join()


def test_a_name_whose_first_address_leads_nowhere(tmp_path):
    """Such as IPv6 in a network that has none: the WebSocket takes the next one, too (RFC 8305)."""
    with site(tmp_path, {"A": ""}, start=False) as here, contextlib.ExitStack() as stack:
        port = here.sandbox.sandbox.port
        hole = stack.enter_context(socket.socket())  # a listener whose backlog is full answers no SYN
        hole.bind(("127.0.0.2", port))
        hole.listen(0)
        for _ in range(4):
            filling = stack.enter_context(socket.socket())
            filling.setblocking(False)
            filling.connect_ex(hole.getsockname())
        changed(
            here.agent,
            "import socket\nm.CONNECT_TIMEOUT_SECS, look_up = 1, socket.getaddrinfo\n"
            "sys.argv[1] = sys.argv[1].replace('127.0.0.1', 'localhost')\n"
            "def both(host, port, *rest, **more):\n"
            "    if port != SERVER: return look_up(host, port, *rest, **more)\n"
            "    return [look_up(one, port, *rest, **more)[0] for one in ('127.0.0.2', '127.0.0.1')]\n"
            "socket.getaddrinfo = both".replace("SERVER", str(port)),
        )
        here.agent.start()
        here.agent.wait_connected()
        works(here)


def test_a_server_that_gives_short_lived_tokens_is_not_asked_for_each_message(tmp_path):
    with site(tmp_path, {"A": ""}, start=False) as here:
        here.sandbox.faults.token_lifetime = 30
        here.agent.start()
        with here.device("A") as device:
            for n in range(100):
                device.ask(message(f"SHORT-{n}"))
        assert asked(here, "POST /oauth2/token") <= 3


def test_revoked_token_is_replaced_and_the_message_sent_again(tmp_path):
    with site(tmp_path, {"A": f"?{FAST}"}) as here:
        works(here, "BEFORE-1")
        here.sandbox.sandbox.revoke_tokens()
        works(here, "AFTER-1")
        assert asked(here, "POST /oauth2/token") == 2
        assert connects(here) == 1


def test_revoked_token_at_reload(tmp_path):
    with site(tmp_path, {"A": ""}) as here:
        here.sandbox.sandbox.revoke_tokens()
        assert here.sandbox.reload()["statusCode"] == 200


def test_the_token_is_refused_at_connect(tmp_path):
    with site(tmp_path, {"A": ""}) as here:
        here.sandbox.sandbox.revoke_tokens()
        here.sandbox.cut()
        here.sandbox.wait_for(lambda: connects(here) >= 2 and here.sandbox.connected, 15)
        works(here)


# --- connect, heartbeats, reconnect ---


def test_connect_that_is_never_answered(tmp_path):
    with site(tmp_path, {"A": "?enhanced=true&appLevelAck=NE"}, start=False, config=BEATING) as here:
        here.sandbox.faults.never_connect = True
        here.agent.start(ready=False)
        here.agent.wait_listening()
        with here.device("A") as device:
            for n in range(20):
                assert device.ask(message(f"STORED-{n}"))[0] == "CA"
        here.sandbox.wait_for(lambda: connects(here) >= 2, 10, "a second try")
        assert not here.sandbox.seen
        here.sandbox.faults.never_connect = False
        here.sandbox.wait_ids(*(f"STORED-{n}" for n in range(20)), timeout=20)
        assert here.sandbox.ids() == [f"STORED-{n}" for n in range(20)]


def test_connect_that_is_refused(tmp_path):
    with site(tmp_path, {"A": "?enhanced=true&appLevelAck=NE"}, start=False) as here:
        here.sandbox.faults.refuse_connect = "Not found"
        here.agent.start(ready=False)
        here.agent.wait_listening()
        assert "agent-1" in here.agent.logged("Not found")
        with here.device("A") as device:
            assert device.ask(message("REFUSED-1"))[0] == "CA"
        here.sandbox.wait_for(lambda: connects(here) >= 2, 10, "a second try")
        assert not here.sandbox.seen
        here.sandbox.faults.refuse_connect = ""
        here.sandbox.wait_ids("REFUSED-1", timeout=20)


def test_silent_server_makes_the_agent_reconnect(tmp_path):
    with site(tmp_path, {"A": ""}, config=BEATING) as here:
        here.sandbox.faults.mute_heartbeats = True
        here.sandbox.wait_for(lambda: connects(here) >= 2, 10, "a reconnect")
        here.agent.logged("silent")
        here.sandbox.faults.mute_heartbeats = False
        here.sandbox.wait_for(lambda: here.sandbox.connected)
        works(here)


def test_any_traffic_is_a_sign_of_life(tmp_path):
    with site(tmp_path, {"A": ""}, config=BEATING) as here, here.device("A") as device:
        here.sandbox.faults.mute_heartbeats = True
        here.sandbox.faults.delay = lambda: 0.05
        until = time.monotonic() + 2
        for n in itertools.count():
            device.ask(message(f"LIFE-{n}"))
            if time.monotonic() > until:
                break
        assert connects(here) == 1


def test_heartbeats_both_ways(tmp_path):
    with site(tmp_path, {"A": ""}, config=BEATING) as here:
        version = here.sandbox.wait_for(lambda: here.sandbox.sandbox.versions.get("agent-1", "unknown") != "unknown")
        assert version
        assert re.fullmatch(r"\d+\.\d+\.\d+-[0-9a-z]{7}", here.sandbox.sandbox.versions["agent-1"])
        eventually(lambda: here.sandbox.stats()["ping"] >= 0)
        assert connects(here) == 1


def wait_reconnected(here, before):
    here.sandbox.wait_for(lambda: connects(here) > before and here.sandbox.connected, 15)


def test_reconnects_after_each_cut(tmp_path):
    with site(tmp_path, {"A": ""}) as here:
        for n in range(2):
            works(here, f"CUT-{n}")
            before = connects(here)
            here.sandbox.cut()
            wait_reconnected(here, before)
        works(here, "CUT-2")
        assert sorted(set(here.sandbox.ids())) == [f"CUT-{n}" for n in range(3)]


@pytest.mark.parametrize("compression", ["true", "false"])
def test_a_server_that_says_goodbye_and_leaves_the_connection_open(tmp_path, compression):
    """Such as behind a balancer: nothing more is written there, also what may be sent once only (RFC 6455 7.1.1)."""

    def half_close(socket):
        socket._writer.transport.pause_reading()
        socket._writer.write(b"\x88\x02\x03\xe9")  # a close frame, 1001

    settings = f"compression = {compression}\n"
    with site(tmp_path, {"A": "?enhanced=true&retryMode=normal&responseTimeoutSecs=3"}, config=settings) as here:
        here.agent.wait_connected()
        socket = here.sandbox.sandbox.agents[AGENT_ID]
        here.sandbox.loop.call_soon_threadsafe(half_close, socket)
        plain = socket._writer.get_extra_info("socket")
        eventually(lambda: any(fcntl.ioctl(plain, termios.FIONREAD, bytes(4))), 5, "the agent's own close frame")
        with here.device("A", timeout=20) as device:
            for n in range(20):
                device.send(message(f"BYE-{n}", patient=f"P{n}"))
            words = [device.ack() for _ in range(40)]
        assert sorted(words) == sorted((code, f"BYE-{n}") for n in range(20) for code in ("CA", "AA"))
        assert connects(here) == 2


def test_a_server_that_has_forgotten_the_connection_is_told_again(tmp_path):
    with site(tmp_path, {"A": ""}) as here:
        works(here, "KNOWN-1")
        here.sandbox.tell(b'{"type":"agent:error","body":"Not connected"}')
        wait_reconnected(here, 1)
        works(here, "KNOWN-2")


def test_what_waits_for_a_suspect_message_of_another_channel_goes_on(tmp_path):
    """After losses of the connection one message is tried at a time; its end is no message's end but its own."""
    once = "?enhanced=true&retryMode=normal&responseTimeoutSecs=1&autoRetryMaxAttempts=1"
    with (
        site(tmp_path, {"A": once, "B": f"?enhanced=true&{FAST}"}, config=BEATING) as here,
        here.device("A") as first,
        here.device("B", timeout=20) as second,
    ):
        here.agent.wait_connected()
        for _ in range(ma.SUSPECT_LOSSES):
            before, here.sandbox.faults.close_on_transmit = connects(here), 1
            first.send(message(f"SUSPECT-{before}"))
            wait_reconnected(here, before)
        here.sandbox.faults.silent = True
        first.send(message("SUSPECT-LAST"))
        here.sandbox.wait_ids("SUSPECT-LAST")
        second.send(message("INNOCENT-1"))
        assert second.ack() == ("CA", "INNOCENT-1")
        here.agent.wait_state("SUSPECT-LAST", "failed")
        here.sandbox.faults.silent = False
        assert second.ack() == ("AA", "INNOCENT-1")


# --- answers ---


@pytest.mark.parametrize(
    "switched",
    [("drop_callback",), ("drop_status",), ("drop_callback", "drop_status"), ("binary_frames",), ("legacy_names",)],
)
def test_answers_of_old_and_odd_servers(tmp_path, switched):
    with site(tmp_path, {"A": "", "B": "?enhanced=true"}, start=False) as here:
        for fault in switched:
            setattr(here.sandbox.faults, fault, True)
        here.agent.start()
        here.sandbox.faults.delay = lambda: 0.1
        with here.device("A") as first, here.device("A") as second, here.device("B") as third:
            first.send(*(message(f"ONE-{n}", patient=f"X{n}") for n in range(5)))
            second.send(*(message(f"TWO-{n}", patient=f"Y{n}") for n in range(5)))
            third.send(message("THREE"))
            assert sorted(first.ack() for _ in range(5)) == [("AA", f"ONE-{n}") for n in range(5)]
            assert sorted(second.ack() for _ in range(5)) == [("AA", f"TWO-{n}") for n in range(5)]
            assert [third.ack()[0], third.ack()[0]] == ["CA", "AA"]
        assert len(here.sandbox.seen) == 11
        for control in ("ONE-0", "TWO-4", "THREE"):
            here.agent.wait_state(control, "processed")


def test_failure_without_callback(tmp_path):
    with site(tmp_path, {"A": f"?{FAST}"}) as here, here.device("A") as device:
        here.sandbox.faults.drop_callback = True
        here.sandbox.bot = lambda transmit: (400, "{}")
        assert device.ask(message("FAIL-1")) == ("AE", "FAIL-1")


def test_late_answer_after_another_attempt_counts_once(tmp_path):
    with site(tmp_path, {"A": f"?{FAST}"}) as here, here.device("A") as device:
        delays = iter([0.7, 0.4])
        here.sandbox.faults.delay = lambda: next(delays, 0.0)
        device.send(message("LATE-1"))
        assert device.ack() == ("AA", "LATE-1")
        here.sandbox.wait_for(lambda: len(here.sandbox.answered) == 2)
        assert device.drain() == []
        first, second = (transmit.callback for transmit in here.sandbox.of("LATE-1"))
        assert (first, second) == (first.split("#")[0] + "#1", first.split("#")[0] + "#2")
        here.agent.wait_state("LATE-1", "processed")


def test_late_failure_of_an_earlier_attempt_says_nothing(tmp_path):
    with site(tmp_path, {"A": f"?{FAST}"}) as here, here.device("A") as device:
        delays = iter([0.7, 0.4])
        here.sandbox.faults.delay = lambda: next(delays, 0.0)
        here.sandbox.bot = lambda t: (400, "{}") if t.callback.endswith("#1") else bot("AA")(t)
        assert device.ask(message("LATE-2")) == ("AA", "LATE-2")
        assert device.drain() == []


def test_late_success_revives_a_dead_letter(tmp_path):
    with site(tmp_path, {"A": f"?enhanced=true&{FAST}&autoRetryMaxAttempts=1"}) as here, here.device("A") as device:
        here.sandbox.faults.delay = lambda: 1.0
        assert device.ask(message("LATE-3")) == ("CA", "LATE-3")
        assert here.agent.wait_state("LATE-3", "failed")["error_code"] == "response-timeout"
        here.agent.wait_state("LATE-3", "processed")
        assert device.heard(1) == [("AA", "LATE-3")]
        assert len(here.sandbox.of("LATE-3")) == 1


def test_attempts_end_in_a_dead_letter_with_bytes_and_reason(tmp_path):
    with site(tmp_path, {"A": f"?enhanced=true&{FAST}&autoRetryMaxAttempts=3"}) as here, here.device("A") as device:
        here.sandbox.bot = lambda t: (400, "{}") if control_id(t.body) == "POISON" else bot("AA")(t)
        device.send(message("POISON"), message("NEXT"))
        row = here.agent.wait_state("POISON", "rejected")
        assert row["error_code"] == "server-rejected" and "Bot" in row["last_error"]
        assert row["original"] == message("POISON").encode()
        here.agent.wait_state("NEXT", "processed")
        assert here.sandbox.ids() == ["POISON"] * 3 + ["NEXT"]
        here.agent.logged("dead letter")


def test_connection_closed_right_after_each_transmit(tmp_path):
    with site(tmp_path, {"A": ""}) as here, here.device("A", timeout=30) as device:
        here.sandbox.faults.close_on_transmit = 3
        assert device.ask(message("CLOSED-1")) == ("AA", "CLOSED-1")
        assert device.drain() == []
        assert len(here.sandbox.of("CLOSED-1")) == 4


def test_connection_closed_after_transmit_where_nothing_may_be_repeated(tmp_path):
    with site(tmp_path, {"A": f"?retryMode=normal&{FAST}"}) as here, here.device("A") as device:
        here.sandbox.faults.close_on_transmit = 1
        assert device.ask(message("CLOSED-2")) == ("AE", "CLOSED-2")
        assert here.agent.wait_state("CLOSED-2", "failed")["error_code"] == "response-timeout"
        here.sandbox.wait_for(lambda: here.sandbox.connected)
        works(here, "CLOSED-3")
        assert len(here.sandbox.of("CLOSED-2")) == 1


def test_a_message_the_server_finds_too_large(tmp_path):
    with site(tmp_path, {"A": "?enhanced=true", "B": ""}) as here:
        big = "x" * (2**20 + 1000)
        with here.device("A") as device, here.device("B", timeout=20) as other:
            device.send(*(message(f"SMALL-{n}", patient=f"S{n}") for n in range(10)))
            device.send(message("HUGE", text=big))
            device.send(*(message(f"SMALL-{n}", patient=f"S{n}") for n in range(10, 20)))
            device.send(message("SAME-PATIENT"))
            assert other.ask(message("OTHER", patient="O1"))[0] == "AA"
            row = here.agent.wait_state("HUGE", "rejected", 20)
            assert row["error_code"] == "too-large" and "maxJsonSize" in row["last_error"]
            assert len(row["original"]) > 2**20
            for control in [*(f"SMALL-{n}" for n in range(20)), "SAME-PATIENT"]:
                here.agent.wait_state(control, "processed", 20)
            assert other.ask(message("HUGE-2", text=big)) == ("AE", "HUGE-2")
        assert not {"HUGE", "HUGE-2"} & set(here.sandbox.ids())


def test_a_refusal_without_callback_is_no_loss(tmp_path):
    """It names no message: it is tried again after the time-out."""
    with site(tmp_path, {"A": f"?{FAST}"}) as here, here.device("A") as device:
        here.sandbox.sandbox.revoke_tokens()
        device.send(message("NAMELESS-1"))
        here.agent.logged("Invalid access token")
        assert device.ack() == ("AA", "NAMELESS-1")


# --- callbacks ---


def test_callbacks_are_stable_over_retry_reconnect_and_restart(tmp_path):
    with site(tmp_path, {"A": f"?enhanced=true&{FAST}"}) as here, here.device("A") as device:
        here.sandbox.faults.silent = True
        device.send(*(message(f"STABLE-{n}", patient=f"S{n}") for n in range(5)))
        here.sandbox.wait_for(lambda: len(here.sandbox.of("STABLE-4")) >= 3)
        here.sandbox.cut()
        here.sandbox.wait_for(lambda: connects(here) >= 2 and here.sandbox.connected)
        here.agent.kill()
        here.agent.start()
        here.sandbox.faults.silent = False
        here.sandbox.wait_for(lambda: len({control_id(t.body) for _, t in here.sandbox.answered}) == 5)
        stems = {n: {t.callback.split("#")[0] for t in here.sandbox.of(f"STABLE-{n}")} for n in range(5)}
        assert all(CALLBACK.fullmatch(t.callback) for _, t in here.sandbox.seen)
        assert all(len(found) == 1 for found in stems.values())
        assert len(set.union(*stems.values())) == 5
        assert here.sandbox.of("STABLE-0")[0].callback.endswith("#1")
        assert here.sandbox.of("STABLE-0")[1].callback.endswith("#2")


# --- what nobody should send ---


STRANGE = (
    b"",
    b"nonsense",
    b"[]",
    b"5",
    b"null",
    b'"text"',
    b"{}",
    b'{"type":5}',
    b'{"type":null}',
    b'{"type":["agent:error"]}',
    b'{"type":"agent:error"}',
    b'{"type":"agent:error","body":{"a":[1]}}',
    b'{"type":"agent:transmit:response"}',
    b'{"type":"agent:transmit:response","callback":5}',
    b'{"type":"agent:transmit:response","callback":"Agent/other#1"}',
    b'{"type":"agent:transmit:response","callback":"x","statusCode":"400","body":{"a":1},"channel":{}}',
    b'{"type":"agent:transmit:response","channel":["A"],"body":"MSH|"}',
    b'{"type":"agent:transmit:response","channel":"A","body":"MSH|^~\\\\&|\\rMSA|AA|none"}',
    b'{"type":"agent:transmit:request"}',
    b'{"type":"agent:logs:request","limit":[],"before":7}',
    b'{"type":"agent:logs:request","before":{"a":1}}',
    b'{"type":"agent:unknown"}',
    b'{"type":"agent:upgrade:request"}',
    b'{"type":"agent:heartbeat:response"}',
    b'{"type":"agent:connect:response"}',
)


def test_strange_messages_of_the_server_end_nothing(tmp_path):
    with site(tmp_path, {"A": ""}) as here:
        for raw in STRANGE:
            here.sandbox.tell(raw)
        works(here)
        assert connects(here) == 1


def test_an_answer_that_takes_longer_than_heartbeats_is_waited_for(tmp_path):
    """Over a thin line: what has come so far shows that the server is there."""
    with site(tmp_path, {"A": ""}, config=BEATING) as here, here.device("A", timeout=20) as device:
        here.sandbox.faults.silent = here.sandbox.faults.mute_heartbeats = True
        device.send(message("THIN-1"))
        here.sandbox.wait_ids("THIN-1")
        (sent,) = here.sandbox.of("THIN-1")
        answer = {"type": "agent:transmit:response", "channel": "A", "remote": sent.remote, "statusCode": 200,
                  "callback": sent.callback, "body": "MSH|^~\\&|\rMSA|AA|THIN-1\rZ|" + "x" * 1000}  # fmt: skip
        whole = Frame(Opcode.TEXT, json.dumps(answer).encode()).serialize(mask=False)
        writer = here.sandbox.sandbox.agents[AGENT_ID]._writer
        for at in range(0, len(whole), 64):
            here.sandbox.loop.call_soon_threadsafe(writer.write, whole[at : at + 64])
            time.sleep(0.1)
        assert device.ack() == ("AA", "THIN-1")
        assert connects(here) == 1


@pytest.mark.parametrize("status", ["400", 400.0])
def test_a_status_that_is_no_integer_is_what_it_says(tmp_path, status):
    with site(tmp_path, {"A": "?enhanced=true"}) as here, here.device("A") as device:
        here.sandbox.bot = lambda _: (status, "no")
        assert device.ask(message("ODD-1")) == ("CA", "ODD-1")
        codes = lambda: [row["error_code"] for row in here.agent.rows("ODD-1")]  # noqa: E731
        eventually(lambda: codes() == ["server-rejected"], 10, "the refusal")


def test_a_server_that_errs_a_thousand_times_fills_the_log_with_a_few_lines(tmp_path):
    with site(tmp_path, {"A": ""}) as here:
        for _ in range(300):
            for raw in (b"nonsense", b'{"type":"agent:unknown"}', STRANGE[14]):
                here.sandbox.tell(raw)
        works(here)
        assert 1 <= here.agent.main_log().count(b'"WARN"') < 10


def test_unknown_type_is_answered_with_the_callback(tmp_path):
    with site(tmp_path, {"A": ""}) as here:
        answer = here.sandbox.ask("agent:dance:request")
        assert answer["type"] == "agent:error" and "agent:dance:request" in answer["body"]


# --- TLS and proxies ---


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A CA of our own, its PEM file, and a server context for 127.0.0.1."""
    import ssl

    ca = trustme.CA()
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return path, context


def test_tls_with_an_authority_of_the_site(tmp_path, authority):
    path, context = authority
    with site(tmp_path, {"A": ""}, context=context, config=f'caFile = "{path}"\n') as here:
        works(here)


def test_a_server_that_is_named_in_capitals_is_asked_over_tls(tmp_path, authority):
    """RFC 3986 3.1: a scheme has no case. HTTPS:// was taken for a server without TLS, and told the token in clear."""
    path, context = authority
    with site(tmp_path, {"A": ""}, start=False, context=context, config=f'caFile = "{path}"\n') as here:
        changed(here.agent, "sys.argv[1] = sys.argv[1].replace('https', 'HTTPS')")
        here.agent.start()
        works(here)
        answer = here.sandbox.ask(
            "agent:transmit:request", remote=" Agent://", contentType="application/json", body='{"command": "status"}'
        )
        assert "channels" in answer["body"]


def test_tls_is_refused_without_the_authority(tmp_path, authority):
    _, context = authority
    with site(tmp_path, {"A": ""}, start=False, context=context) as here:
        here.agent.start(ready=False)
        line = here.agent.logged("The configuration cannot be read")
        assert "certificate" in line.lower()
        assert not here.sandbox.sandbox.requests


@pytest.mark.parametrize(
    ("form", "secret"),
    [
        ("http://user:pa%40ss@127.0.0.1:{}", "user:pa@ss"), ("http://user:pa%40ss@127.0.0.1:{}/wpad?x#y", "user:pa@ss"),
        ("pa%40ss@127.0.0.1:{}", "pa@ss:"),
    ],
)  # fmt: skip
def test_https_proxy_carries_everything(tmp_path, authority, form, secret):
    """The same for HTTPS and WSS, and its password in no log, whatever is written around it."""
    path, context = authority
    with ConnectProxy() as proxy:
        env = {"HTTPS_PROXY": form.format(proxy.port)}
        with site(tmp_path, {"A": ""}, context=context, config=f'caFile = "{path}"\n', env=env) as here:
            works(here)
            target = f"127.0.0.1:{here.sandbox.sandbox.port}"
            assert len(proxy.targets) >= 2 and set(proxy.targets) == {target}  # HTTPS and WSS
            assert set(proxy.authorizations) == {f"Basic {base64.b64encode(secret.encode()).decode()}"}
            assert "pa%40ss" not in here.agent.output() and "pa@ss" not in here.agent.output()


def test_a_proxy_whose_password_is_not_ascii(monkeypatch):
    """As the WebSocket gives it (RFC 7617 2.1)."""
    monkeypatch.setenv("HTTPS_PROXY", "http://J%C3%B6rg:%E2%82%AC5@127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    headers = ma.http_pool("https://example.com/", ma.tls_context("")).proxy_headers  # type: ignore[attr-defined]
    assert headers == {"Proxy-Authorization": "Basic " + base64.b64encode("J\u00f6rg:\u20ac5".encode()).decode()}


def test_no_proxy_goes_around_it(tmp_path, authority):
    path, context = authority
    with ConnectProxy() as proxy:
        env = {"HTTPS_PROXY": f"http://127.0.0.1:{proxy.port}", "NO_PROXY": "example.org,127.0.0.1"}
        with site(tmp_path, {"A": ""}, context=context, config=f'caFile = "{path}"\n', env=env) as here:
            works(here)
            assert not proxy.targets


# --- JSON that JavaScript writes, or reads ---


@pytest.mark.parametrize(
    ("raw", "heard"),
    [
        (b"M\\ud83d|", "M\ufffd|"), (b"M\xff|", "M\ufffd|"), (b"\\udc00M|", "\ufffdM|"),
        (b"M|\\ud83d\\ude00", "M|\U0001f600"),
    ],
    ids=["half a pair", "no UTF-8", "the other half", "a pair"],
)  # fmt: skip
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_a_text_that_is_not_quite_unicode_still_arrives(tmp_path, raw, heard, mark):
    """JSON.stringify of a text that was cut within an emoji (RFC 8259 8.2); a frame is UTF-8 whatever it is."""
    with site(tmp_path, {"A": ""}) as here, Receiver() as receiver:
        here.sandbox.faults.silent = True
        with here.device("A") as device:
            device.send(message("M1"))
            here.sandbox.wait_ids("M1")
            callback = here.sandbox.of("M1")[0].callback.encode()
            answer = b'{"type":"agent:transmit:response","statusCode":200,"callback":"%b","body":"%b"}'
            ack = rb"MSH|^~\\\\&|B|B|A|A|20260101||ACK|R1|P|2.5\rMSA|AA|M1|" + raw
            here.sandbox.tell(mark + answer % (callback, ack))
            assert device.receive().endswith(f"MSA|AA|M1|{heard}\r")
        push = b'{"type":"push","contentType":"x-application/hl7-v2+er7","remote":"%b","body":"%b"}'
        body = rb"MSH|^~\\\\&|B|B|A|A|20260101||ADT^A01|P1|P|2.5\rZZZ|" + raw
        here.sandbox.tell(mark + push % (receiver.url().encode(), body))
        receiver.wait_ids("P1")
        assert f"ZZZ|{heard}" in receiver.heard[0]


# --- the token is for the server that it came from ---


@pytest.mark.parametrize("status", ["301 Moved Permanently", "302 Found", "307 Temporary Redirect"])
def test_a_redirected_handshake_takes_the_token_nowhere(tmp_path, monkeypatch, status):
    """No more than FHIR's requests are: whoever answers for the server once would have the token."""
    with SandboxThread(sandbox_resources(AGENT_ID, {})) as other, site(tmp_path, {"A": ""}, start=False) as here:
        usual, turned = demo.SandboxSocket.run, threading.Event()

        async def run(self, request):
            if self._sandbox is other.sandbox:
                return await usual(self, request)
            where = f"ws://localhost:{other.sandbox.port}/ws/agent"
            self._writer.write(f"HTTP/1.1 {status}\r\nLocation: {where}\r\nContent-Length: 0\r\n\r\n".encode())
            await self._writer.drain()
            self._writer.close()
            turned.set()
            return None

        monkeypatch.setattr(demo.SandboxSocket, "run", run)
        here.agent.start(ready=False)
        here.agent.wait_listening()
        assert turned.wait(10)
        assert f"HTTP {status[:3]}" in here.agent.logged("No connection to")
        assert not other.sandbox.requests
        monkeypatch.undo()
        here.agent.wait_connected()
        works(here)


def test_a_token_that_no_header_can_carry_is_a_login_that_failed(tmp_path, monkeypatch):
    with site(tmp_path, {"A": ""}, start=False) as here:
        usual, count = demo.Sandbox._login, itertools.count()

        def login(self, form):
            status, answer = usual(self, form)
            return status, answer | ({"access_token": "a\r\nb"} if next(count) == 0 else {})

        monkeypatch.setattr(demo.Sandbox, "_login", login)
        here.agent.start()
        assert "no header can carry" in here.agent.logged("login failed")
        works(here)
