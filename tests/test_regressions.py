"""Defects that a review of the whole program found, one test each: none may come back."""

import asyncio
import contextlib
import functools
import itertools
import json
import mmap
import os
import socket
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from demo import SandboxSocket

import medplum_agent
from medplum_agent import ChannelPlan, ChannelRow, Hl7Settings, Message, Queue
from tests.support import (
    AGENT_ID,
    AgentProcess,
    Receiver,
    SandboxThread,
    accepts,
    acknowledgment,
    bot,
    changed,
    eventually,
    log_lines,
    message,
    setting,
    site,
)

FAST = "autoRetryBaseDelayMs=20&autoRetryMaxDelayMs=40"
QUICK_RECONNECTS = "m.RECONNECT_BASE_SECS, m.RECONNECT_MAX_SECS = 0.01, 0.05"
HEARTBEAT = b'{"type":"agent:heartbeat:request"}'


def logins(here):
    return here.sandbox.sandbox.requests.count("POST /oauth2/token")


def connects(here):
    return here.sandbox.sandbox.requests.count("GET /ws/agent")


def warnings(here):
    return [line for line in log_lines(here.agent.main_log()) if line["level"] in ("WARN", "ERROR")]


def tried_again(here, control):
    return here.agent.rows(control)[0]["attempts"] > 2


# --- devices ---


def test_a_queue_file_belongs_to_one_agent(tmp_path):
    path = tmp_path / "shared.sqlite"
    settings = [setting("queueDbPath", str(path))]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    with (
        site(folders[0], {"A": "?enhanced=true"}, settings) as first,
        site(folders[1], {"B": "?enhanced=true"}, settings) as second,
        first.device("A") as one,
        second.device("B") as other,
    ):
        first.sandbox.faults.silent = True
        other.send(message("B-0"))
        refusal = other.receive()
        assert acknowledgment(refusal) == ("CE", "B-0")
        assert "another agent uses the queue" in refusal
        second.agent.logged("another agent uses this queue")
        assert {one.ask(message(f"A-{n}", patient=f"P{n}")) for n in range(20)} == {("CA", f"A-{n}") for n in range(20)}
        assert other.ask(message("B-1")) == ("CE", "B-1")
        first.agent.kill()
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert {control for (control,) in db.execute("SELECT control_id FROM queue")} == {
                f"A-{n}" for n in range(20)
            }


@pytest.fixture(scope="module")
def modes(tmp_path_factory):
    channels = {"ORIGINAL": "", "ENHANCED": "?enhanced=true", "FEW": "?enhanced=true&maxConnections=5"}
    with site(tmp_path_factory.mktemp("modes"), channels) as running:
        yield running


@pytest.fixture
def here(modes):
    """The running site of `modes`, with a well-behaved server again after each test."""
    yield modes
    modes.sandbox.faults.delay = lambda: 0.0
    modes.sandbox.faults.silent = False
    modes.sandbox.bot = bot("AA")


@pytest.mark.parametrize(
    ("channel", "answer", "expected"),
    [
        ("ORIGINAL", "bot", ["AA"]),
        ("ENHANCED", "bot", ["CA", "AA"]),
        ("ORIGINAL", "silent", ["AA"]),
        ("ENHANCED", "silent", ["CA"]),
    ],
)
def test_a_sender_that_ended_its_side_hears_its_answer(here, channel, answer, expected):
    here.sandbox.bot = bot("AA") if answer == "bot" else lambda transmit: (200, "")
    here.sandbox.faults.delay = lambda: 0.3
    control = f"HALF-{channel}-{answer}"
    with here.device(channel) as device:
        device.send(message(control))
        device.half_close()
        assert [device.ack() for _ in expected] == [(code, control) for code in expected]
        assert device.closed_by_peer()


def test_senders_that_have_gone_do_not_use_up_the_connections(here):
    here.sandbox.stop()
    for n in range(20):
        with here.device("FEW") as device:
            assert device.ask(message(f"GONE-{n}", patient=f"G{n}")) == ("CA", f"GONE-{n}")
    here.sandbox.start()
    here.agent.wait_connected()
    for n in range(20):
        here.agent.wait_state(f"GONE-{n}", "processed")
    eventually(lambda: here.sandbox.stats()["hl7ConnectionsOpen"] == 0, what="no connection is open")


def test_a_silent_bot_leaves_no_closed_connection_open(here):
    here.sandbox.bot = lambda transmit: (200, "")
    here.sandbox.faults.delay = lambda: 0.2
    for n in range(20):
        with here.device("FEW") as device:
            assert device.ask(message(f"QUIET-{n}", patient=f"Q{n}")) == ("CA", f"QUIET-{n}")
    eventually(lambda: here.sandbox.stats()["hl7ConnectionsOpen"] == 0, what="no connection is open")


def test_messages_held_back_by_a_rate_go_on_when_a_reload_removes_it(tmp_path):
    with site(tmp_path, {"A": "?messagesPerMin=60"}) as here, here.device("A") as device:
        device.send(*(message(f"RATE-{n}", patient=f"R{n}") for n in range(4)))
        assert device.ack() == ("AA", "RATE-0")
        here.endpoint("A")["address"] = f"mllp://127.0.0.1:{here.ports['A']}"
        assert here.sandbox.reload()["statusCode"] == 200
        assert sorted(device.ack() for _ in range(3)) == [("AA", f"RATE-{n}") for n in (1, 2, 3)]
        assert device.ask(message("RATE-4")) == ("AA", "RATE-4")


def test_an_answer_that_begins_with_a_line_end_is_relayed(here):
    here.sandbox.bot = lambda transmit: (200, "\n" + str(bot("AE", "from the Bot")(transmit)[1]))
    with here.device("ORIGINAL") as device:
        device.send(message("NEWLINE-1"))
        answer = device.receive()
    assert "MSA|AE|NEWLINE-1|from the Bot" in answer


def test_a_thousand_bad_frames_are_a_few_warnings(here):
    before = len(warnings(here))
    with here.device("ORIGINAL") as device:
        device.send(*["garbage"] * 1000, message("AFTER-GARBAGE"))
        answers = 0
        while device.ack() != ("AA", "AFTER-GARBAGE"):
            answers += 1
    assert answers <= 1000
    assert 0 < len(warnings(here)) - before <= 60


# --- the uplink ---


def test_a_frame_that_comes_with_the_handshake_is_heard(tmp_path, monkeypatch):
    flush = SandboxSocket._flush
    greeted = set()

    def greet(self):
        if self not in greeted:
            greeted.add(self)
            self._protocol.send_text(HEARTBEAT)
        flush(self)

    monkeypatch.setattr(SandboxSocket, "_flush", greet)  # one write: 101 and the first frame
    with site(tmp_path, {"A": ""}, start=False) as here:
        here.agent.start(ready=False)
        here.agent.wait_connected(8)
        here.agent.wait_listening()
        with here.device("A") as device:
            assert device.ask(message("EARLY-1")) == ("AA", "EARLY-1")
        assert connects(here) == 1


@pytest.mark.parametrize("seconds", [0, 0.1])  # later: others are answered on the same connection
def test_a_message_that_ends_the_connection_becomes_a_dead_letter(tmp_path, seconds):
    channels = {"A": f"?enhanced=true&autoRetryMaxAttempts=3&{FAST}", "B": f"?{FAST}"}
    with site(tmp_path, channels, start=False) as here:
        changed(here.agent, QUICK_RECONNECTS)
        here.agent.start()
        arrived = here.sandbox.sandbox.on_transmit

        def cut(transmit):
            arrived(transmit)
            if "POISON" in transmit.body:
                agent = here.sandbox.sandbox.agents[AGENT_ID]
                agent.close() if not seconds else here.sandbox.loop.call_later(seconds, agent.close)

        here.sandbox.sandbox.on_transmit = cut
        here.sandbox.bot = lambda transmit: (200, None) if "POISON" in transmit.body else bot("AA")(transmit)
        here.sandbox.faults.delay = lambda: 0.15 if "POISON" in here.sandbox.sandbox.transmits[-1].body else 0.0
        with here.device("A") as device, here.device("B") as other:
            device.send(message("POISON", patient="X"), message("GOOD", patient="Y"))
            count = itertools.count()
            while not here.agent.rows("POISON") or here.agent.rows("POISON")[0]["state"] != "failed":
                control = f"OTHER-{next(count)}"
                assert other.ask(message(control)) == ("AA", control)
            row = here.agent.wait_state("POISON", "failed")
            here.agent.wait_state("GOOD", "processed")
        assert row["error_code"] == "connection-lost"
        assert len(here.sandbox.of("POISON")) <= 12


def test_one_message_at_a_time_is_still_the_turn_of_every_channel(tmp_path):
    """After several losses one message is sent at a time; its answer makes room for those of other channels."""
    with site(tmp_path, {"A": f"?enhanced=true&{FAST}", "B": ""}, start=False) as here:
        changed(here.agent, QUICK_RECONNECTS)
        here.agent.start()
        here.sandbox.faults.close_on_transmit, here.sandbox.faults.delay = 3, lambda: 0.3
        with here.device("A") as device, here.device("B", timeout=5) as other:
            assert device.ask(message("TURN-A")) == ("CA", "TURN-A")
            here.sandbox.wait_for(lambda: len(here.sandbox.of("TURN-A")) == 4)
            other.send(message("TURN-B"))  # while the only message that may be sent is with the server
            assert device.ack() == ("AA", "TURN-A")
            assert other.ack() == ("AA", "TURN-B")


def test_a_frame_that_is_no_message_buries_none(tmp_path):
    """Close code 1009 for an answer of ours; an answer of a device is refused before that."""
    with site(tmp_path, {"A": f"?enhanced=true&{FAST}"}, start=False) as here:
        changed(here.agent, QUICK_RECONNECTS)
        here.agent.start()
        here.sandbox.faults.silent = True
        with here.device("A") as device:
            assert device.ask(message("SMALL-1")) == ("CA", "SMALL-1")
            here.sandbox.wait_ids("SMALL-1")
            with Receiver(lambda link, _: link.ack("AA", "BIG", "x" * 1_200_000)) as receiver, here.caller() as caller:
                answer = caller.push(receiver.url(), message("BIG"))
            assert answer.status == 400 and "too large" in answer.text
            assert connects(here) == 1

            here.sandbox.faults.max_frame = 700
            here.sandbox.cut()
            here.sandbox.wait_for(lambda: len(here.sandbox.of("SMALL-1")) == 2 and here.sandbox.connected)
            here.sandbox.tell(b'{"type":"agent:logs:request","limit":1000,"callback":"x"}')
            here.agent.logged("1009")
            here.sandbox.wait_for(lambda: len(here.sandbox.of("SMALL-1")) == 3 and here.sandbox.connected)
            here.sandbox.faults.silent = False
            here.sandbox.cut()
            assert device.ack() == ("AA", "SMALL-1")
        assert b"dead letter" not in here.agent.main_log()


def test_an_opaque_token_that_lives_for_no_time_is_used(tmp_path, monkeypatch):
    with site(tmp_path, {"A": ""}, start=False) as here:
        login = here.sandbox.sandbox._login

        def lifeless(form):
            status, answer = login(form)
            return status, answer | {"expires_in": 0}

        monkeypatch.setattr(here.sandbox.sandbox, "_login", lifeless)
        here.agent.start()
        with here.device("A") as device:
            for n in range(50):
                assert device.ask(message(f"TOKEN-{n}")) == ("AA", f"TOKEN-{n}")
        assert logins(here) <= 3


def test_each_refused_token_is_replaced_at_once(tmp_path):
    with site(tmp_path, {"A": ""}) as here:
        assert here.sandbox.reload()["statusCode"] == 200
        before = logins(here)
        for count in (1, 2):
            here.sandbox.sandbox.revoke_tokens()
            assert here.sandbox.reload().get("statusCode") == 200
            assert logins(here) == before + count


# --- answers and the queue ---


@pytest.mark.parametrize("how", ["for each attempt", "twice"])
def test_two_answers_are_one_for_the_device(tmp_path, how):
    with site(tmp_path, {"A": f"?responseTimeoutSecs=0.4&{FAST}"}) as here, here.device("A") as device:
        if how == "twice":
            socket_of = here.sandbox.sandbox.agents[AGENT_ID]

            def twice(transmit):
                status, body = bot("AA")(transmit)
                common = {"channel": transmit.channel, "remote": transmit.remote, "callback": transmit.callback}
                socket_of.send({"type": "agent:transmit:response", "statusCode": status, "body": body, **common})
                return status, body

            here.sandbox.bot = twice
        else:
            here.sandbox.faults.delay = lambda: max(0.0, here.sandbox.seen[0][0] + 0.7 - time.monotonic())
        device.send(message("ONCE-1"))
        assert device.ack() == ("AA", "ONCE-1")
        assert device.drain(0.5) == []
        assert len(here.sandbox.of("ONCE-1")) == (1 if how == "twice" else 2)
        here.sandbox.bot, here.sandbox.faults.delay = bot("AA"), lambda: 0.0
        assert device.ask(message("ONCE-2")) == ("AA", "ONCE-2")
        here.agent.wait_state("ONCE-2", "processed")
        queue = here.sandbox.stats()["durableQueue"]
        counts, depth = queue["countsByState"], queue["channelDepth"]["A"]
        assert counts == dict.fromkeys(counts, 0) | {"processed": 2}
        assert (depth["queued"], depth["inflight"]) == (0, 0)


class Rows:
    """A store that has these rows on disk; `recovered` are the states that rows sent before a restart got."""

    released = 1 << 62

    def __init__(self, *rows):
        self.rows = rows
        self.recovered = []
        self.known, self.known_bytes, self.late_bytes = {}, 0, 0

    def update(self, message, then=None):
        assert then is None

    async def recover(self, row, state, error_code, reason):
        self.recovered.append((state, error_code, reason))
        return 0

    async def queued(self, row, after, limit, retried):
        assert self.recovered, "read before it was known what becomes of the rows that were sent"
        return [(found, found.original) for found in self.rows if found.id > after][:limit]


class Way:
    """A way that is always ready, and its owner; `sent` are the numbers of the messages."""

    is_open = True

    def __init__(self):
        self.sent: list[int] = []
        self.leaving: set[int] = set()
        self.news = asyncio.Event()

    def ready(self):
        return True

    def transmit(self, queue, message):
        assert message.text == f"text of {message.id}"
        self.sent.append(message.id)
        self.news.set()

    def is_leaving(self, message: Message) -> bool:
        return message.id in self.leaving

    async def prepare(self, queue, message):
        raise AssertionError("nothing has to be prepared")

    def text_of(self, message, original):
        return original.decode()

    def answer(self, message, body, error):
        return True

    async def wait_sent(self, *numbers):
        async with asyncio.timeout(3):
            while not set(numbers) <= set(self.sent):
                self.news.clear()
                await self.news.wait()


ROW = ChannelRow("A", "", 1)


def queue_of(store, way, **settings):
    plan = ChannelPlan("A", "mllp://h:1", "HL7", "", 1, True, Hl7Settings(**settings), frozenset())
    log: Any = medplum_agent.Log("main", medplum_agent.LoggerSettings(logLevel="NONE"), None, None)
    return Queue(ROW, plan.policy, store, way, way, log)


def stored_message(number):
    found = Message(ROW, "127.0.0.1:1", f"text of {number}".encode())
    found.id, found.text, found.key = number, f"text of {number}", "patient"
    return found


def test_a_row_that_was_read_before_it_is_announced_is_sent_once():
    async def run():
        way = Way()
        store = Rows(stored_message(1), stored_message(2))
        queue = queue_of(store, way)
        queue.pump()  # row 2 is read together with row 1
        await way.wait_sent(1)
        queue.stored(stored_message(2))
        for number in (1, 2):
            await way.wait_sent(number)
            queue.answered(queue.window[number], 1, 200, "")
        queue.stored(stored_message(3))
        await way.wait_sent(3)
        queue.answered(queue.window[3], 1, 200, "")
        assert way.sent == [1, 2, 3]
        assert (queue.idle, queue.window, queue.inflight) == (True, {}, {})
        assert store.recovered == [(medplum_agent.QUEUED, None, None)]

    asyncio.run(run())


def test_a_row_that_is_announced_while_older_ones_are_read_is_sent_once_and_in_its_turn():
    async def run():
        way = Way()
        store = Rows(stored_message(1))
        queue = queue_of(store, way)
        queue.pump()
        store.rows = stored_message(1), stored_message(2)
        queue.stored(stored_message(2))  # before row 1 is in memory
        for number in (1, 2):
            await way.wait_sent(number)
            queue.answered(queue.window[number], 1, 200, "")
        assert way.sent == [1, 2]
        while not queue.idle:  # noqa: ASYNC110 (a last look whether there is more on disk)
            await asyncio.sleep(0)
        assert way.sent == [1, 2]

    asyncio.run(run())


def test_a_retry_is_not_late_when_the_clock_was_set_back():
    async def run():
        way = Way()
        late = stored_message(1)
        late.next_attempt_at = medplum_agent.now_ms() + 86_400_000
        queue = queue_of(Rows(late), way, autoRetryBaseDelayMs=50, autoRetryMaxDelayMs=100)
        queue.stored(late)
        await way.wait_sent(1)

    asyncio.run(run())


def test_while_a_line_is_slow_what_has_left_is_not_waited_for_longer():
    async def run():
        way = Way()
        gone, going = stored_message(1), stored_message(2)
        going.key = "another patient"
        queue = queue_of(Rows(gone, going), way, responseTimeoutSecs=0.1, autoRetryBaseDelayMs=1, autoRetryMaxDelayMs=1)
        way.leaving = {2}
        queue.pump()
        await way.wait_sent(1, 2)
        while way.sent.count(1) < 3:
            way.news.clear()
            await way.news.wait()
        assert (way.sent.count(2), going.failures) == (1, 0)
        way.leaving = set()
        while way.sent.count(2) < 2:
            way.news.clear()
            await way.news.wait()
        assert going.error_code == "response-timeout"

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_stored_push_to_a_host_that_cannot_be_resolved_is_tried_again(tmp_path):
    settings = [setting("channelAutoRetryBaseDelayMs", 10), setting("channelAutoRetryMaxDelayMs", 20)]
    with site(tmp_path, {"A": ""}, settings, start=False) as here:
        changed(
            here.agent,
            "import socket; look_up = socket.getaddrinfo\n"
            "def fail(host, *rest, **options):\n"
            "    if host == 'away.example': raise socket.gaierror(-2, 'Name or service not known')\n"
            "    if host == 'odd.example': raise UnicodeError('label empty or too long')\n"
            "    return look_up(host, *rest, **options)\n"
            "socket.getaddrinfo = fail",
        )
        here.agent.start()
        with here.caller() as caller:
            for host in ("away", "odd", "dev..ice"):
                name = host if "." in host else f"{host}.example"
                caller.store(f"mllp://{name}:5000", message(f"{host}-1"), message(f"{host}-2"))
        for host in ("away", "odd"):
            here.agent.logged(f"{host}.example:5000")
            here.sandbox.wait_for(functools.partial(tried_again, here, f"{host}-1"), what=f"more tries of {host}")
        eventually(lambda: any("dev..ice" in error for error in here.sandbox.sandbox.errors), what="a refusal")


# --- start and stop ---


def test_a_server_that_never_answers_does_not_hold_up_the_stop(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener, SandboxThread({}) as sandbox:
        agent = AgentProcess(sandbox, tmp_path / "state", url=f"http://127.0.0.1:{listener.getsockname()[1]}/")
        try:
            agent.start(ready=False)
            listener.settimeout(10)
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.recv(65536).startswith(b"POST /oauth2/token")
                code, seconds = agent.terminate()
        finally:
            agent.discard()
    assert code == 0 and seconds < 10


def test_a_slow_server_is_waited_for_when_nothing_is_saved(tmp_path, monkeypatch):
    with site(tmp_path, {"A": "", "B": ""}, start=False) as here:
        respond = here.sandbox.sandbox._respond

        async def slowly(method, target, headers, body):
            await asyncio.sleep(0.4 if method == "GET" else 0)
            return await respond(method, target, headers, body)

        monkeypatch.setattr(here.sandbox.sandbox, "_respond", slowly)
        changed(here.agent, "m.SERVER_FIRST_SECS = 0.5")
        here.agent.start(ready=False)
        here.agent.logged("started successfully", 8)


def test_stats_while_a_reload_adds_channels(tmp_path):
    with site(tmp_path, {"A": "", "B": "", "C": ""}, start=False) as here:
        agent = here.sandbox.resource(f"Agent/{AGENT_ID}")
        channels, agent["channel"] = agent["channel"], agent["channel"][:2]
        changed(
            here.agent,
            "import asyncio\n"
            "def slow(quick):\n"
            "    async def slowly(self):\n"
            "        found = await quick(self)\n"
            "        await asyncio.sleep(0.3)\n"
            "        return found\n"
            "    return slowly\n"
            "m.Store.backlog, m.Store.counts = slow(m.Store.backlog), slow(m.Store.counts)",
        )
        here.agent.start(ready=False)
        here.agent.logged("started successfully")
        here.agent.wait_connected()
        agent["channel"] = channels
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(here.sandbox.ask, "agent:stats:request")
            assert here.sandbox.reload()["statusCode"] == 200
            assert asked.result()["type"] == "agent:stats:response"
        assert set(here.sandbox.stats()["channelStats"]) == {"A", "B", "C"}


def test_stats_before_there_is_a_configuration(tmp_path):
    with site(tmp_path, {"A": ""}, start=False) as here:
        here.sandbox.faults.read_failures[f"Agent/{AGENT_ID}"] = 404
        here.agent.start(ready=False)
        here.agent.wait_connected()
        assert here.sandbox.stats()["live"] is True


@pytest.mark.parametrize("reference", [f"Agent/{AGENT_ID}", "Endpoint/1"])
@pytest.mark.parametrize(
    "answer",
    [{"message": "maintenance until 4 am"}, {"resourceType": "OperationOutcome", "issue": [{"code": "transient"}]}],
)
def test_what_a_gateway_says_instead_of_the_server_is_no_configuration(tmp_path, answer, reference):
    """With status 200: the channels stay, and the configuration that is on disk."""
    with site(tmp_path, {"A": "?enhanced=true"}) as here:
        here.agent.logged("started successfully")
        resources = here.sandbox.sandbox.resources
        assert reference in resources
        whole, resources[reference] = resources[reference], answer
        refused = here.sandbox.reload()
        assert refused["type"] == "agent:error" and reference in refused["body"], refused
        here.agent.terminate()
        here.agent.start(ready=False)
        eventually(lambda: accepts(("127.0.0.1", here.ports["A"])), 8, "the channel's port")
        here.agent.wait_connected()
        with here.device("A") as device:
            assert device.ask(message("GATEWAY-1")) == ("CA", "GATEWAY-1")
        resources[reference] = whole
        assert here.sandbox.reload()["statusCode"] == 200


def test_endpoints_without_id_are_saved_too(tmp_path):
    with site(tmp_path, {"A": "?enhanced=true"}, start=False) as here:
        del here.endpoint("A")["id"]
        here.agent.start()
        here.agent.logged("started successfully")
        here.agent.kill()
        here.sandbox.stop()
        here.agent.start(ready=False)
        here.agent.wait_listening(8)
        with here.device("A") as device:
            assert device.ask(message("SAVED-1")) == ("CA", "SAVED-1")


UNUSABLE: tuple[tuple[str, dict[str, str], str], ...] = (
    ("http://127.0.0.1:99999/", {}, "99999"),
    ("http://127.0.0.1:abc/", {}, "abc"),
    ("https://127.0.0.1:1/", {"HTTPS_PROXY": "http://127.0.0.1:99999"}, "HTTPS_PROXY"),
    ("https://127.0.0.1:1/", {"HTTPS_PROXY": "http://127.0.0.1:abc"}, "HTTPS_PROXY"),
    ("https://127.0.0.1:1/", {"HTTPS_PROXY": "socks5://127.0.0.1:1"}, "HTTPS_PROXY"),
    ("https://127.0.0.1:1/", {"HTTPS_PROXY": "ftp://127.0.0.1:1"}, "HTTPS_PROXY"),
    ("https://127.0.0.1:1/", {"HTTPS_PROXY": "http://"}, "HTTPS_PROXY"),
    ("http://127.0.0.1:1/", {"HTTP_PROXY": "http://127.0.0.1:99999"}, "HTTP_PROXY"),
)


def test_ports_and_proxies_that_cannot_be_used_are_named(tmp_path):
    def run(number):
        url, proxies, _ = UNUSABLE[number]
        quiet = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
        command = [*AgentProcess.COMMAND, url, "client", "secret", AGENT_ID, "--state-dir", str(tmp_path / str(number))]
        proxies |= {name.lower(): value for name, value in proxies.items()}
        return subprocess.run(command, env=quiet | proxies, capture_output=True, text=True, timeout=15, cwd=tmp_path)

    with ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(run, range(len(UNUSABLE))))
    for (url, proxies, named), process in zip(UNUSABLE, ended, strict=True):
        shown = f"{url} {proxies}: {process.stdout}{process.stderr}"
        assert process.returncode == 1, shown
        assert named in process.stderr and "Traceback" not in shown, shown


def test_a_secret_may_begin_with_a_dash(tmp_path):
    with site(tmp_path, {"A": ""}, start=False, secret="-s--ecret") as here:
        here.sandbox.sandbox._client = ("sandbox-client", "-s--ecret")
        here.agent.start()


def test_listening_with_tls_without_a_certificate_is_a_problem_not_a_plain_port(tmp_path):
    with site(tmp_path, {"PLAIN": "", "TLS": "mllps://127.0.0.1:{port}"}, start=False) as here:
        here.agent.start(ready=False)
        assert "PLAIN" not in here.agent.logged("needs certFile")
        eventually(lambda: accepts(("127.0.0.1", here.ports["PLAIN"])))
        with here.device("PLAIN") as device:
            assert device.ask(message("PLAIN-1")) == ("AA", "PLAIN-1")
        with pytest.raises(ConnectionRefusedError):
            here.device("TLS")
        assert "needs certFile" in json.dumps(here.sandbox.reload())


@pytest.mark.parametrize("form", ["{}/_history/3", "https://api.example.org/fhir/R4/{}"])
def test_channels_start_without_the_server_however_their_endpoints_are_named(tmp_path, form):
    """References of FHIR may have a version, or be absolute; the saved configuration knows the Endpoint by its id."""
    with site(tmp_path, {"A": "", "B": ""}, start=False) as here:
        for channel in here.sandbox.resource("Agent/agent-1")["channel"]:
            reference = channel["endpoint"]["reference"]
            channel["endpoint"]["reference"] = form.format(reference)
            here.sandbox.sandbox.resources[form.format(reference)] = here.sandbox.resource(reference)
        here.agent.start()
        here.agent.terminate()
        here.sandbox.stop()
        here.agent.start(ready=False)
        here.agent.wait_listening()


def resident(path: str) -> int:
    """KiB of a file that are in this process's memory."""
    with open("/proc/self/smaps", encoding="utf-8") as file:
        lines = file.read().splitlines()
    at = next(number for number, line in enumerate(lines) if line.endswith(path))
    return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
def test_what_only_the_start_has_read_leaves_memory_and_what_was_written_stays(tmp_path):
    read, written = tmp_path / "read", tmp_path / "written"
    for path in (read, written):
        path.write_bytes(b"a" * 64 * 4096)
    with (
        open(read, "rb") as one, mmap.mmap(one.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as known,
        open(written, "rb") as two, mmap.mmap(two.fileno(), 0, access=mmap.ACCESS_COPY) as changed_pages,
    ):  # fmt: skip
        changed_pages[4096:4097] = b"b"
        assert known[:].count(b"a") == 64 * 4096 and resident(str(read)) == 256
        asyncio.run(medplum_agent.forget_start())
        assert resident(str(read)) == 0
        assert known[:].count(b"a") == 64 * 4096
        assert changed_pages[4095:4098] == b"aba"
