"""Reload, remote operations, start, stop, command line (operations contract, channel contract 11)."""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time

import pytest

from tests.support import AGENT_ID, AgentProcess, accepts, eventually, free_ports, log_lines, message, setting, site

# --- reload: all or nothing ---


def ten():
    return {f"C{n}": "?enhanced=true" for n in range(10)}


BAD_ENDPOINTS = {
    "empty address": ({"address": ""}, "Invalid empty endpoint address for channel 'C4'"),
    "unknown scheme": ({"address": "carrier://pigeon:1"}, "carrier"),
    "no port": ({"address": "mllp://127.0.0.1"}, "port"),
    "port too high": ({"address": "mllp://127.0.0.1:70000"}, "mllp://127.0.0.1:70000"),
    "not a port": ({"address": "mllp://127.0.0.1:abc"}, "mllp://127.0.0.1:abc"),
    "unknown encoding": ({"address": "mllp://127.0.0.1:{port}?encoding=klingon"}, "klingon"),
    "encoding that cannot be framed": ({"address": "mllp://127.0.0.1:{port}?encoding=utf-16"}, "utf-16"),
    "port of another": ({"address": "mllp://127.0.0.1:{other}"}, "Both 'C3'"),
}


@pytest.fixture(scope="module")
def ten_channels(tmp_path_factory):
    with site(tmp_path_factory.mktemp("ten"), ten()) as here:
        yield here


def assert_reload_changes_nothing(here, *said):
    """Refused with the problem named, while another Endpoint has changed as well; a connection stays."""
    new_port, other = free_ports(1)[0], here.endpoint("C0")
    saved = dict(other)
    with here.device("C0") as device, here.device("C4") as named:
        control = f"BEFORE-{time.monotonic_ns()}"
        device.send(message(control))
        assert device.heard(2) == [("CA", control), ("AA", control)]
        other["address"] = f"mllp://127.0.0.1:{new_port}"
        answer = here.sandbox.reload()
        other.update(saved)
        assert answer["type"] == "agent:error", answer
        for text in said:
            assert text in answer["body"], answer
        assert not accepts(("127.0.0.1", new_port))
        for still in (device, named):
            still.send(message(f"{control}-{still is named}"))
            assert [code for code, _ in still.heard(2)] == ["CA", "AA"]
    assert all(accepts(("127.0.0.1", port)) for port in here.ports.values())


@pytest.mark.parametrize("name", BAD_ENDPOINTS)
def test_reload_with_one_bad_endpoint_among_ten_changes_nothing(ten_channels, name):
    here, endpoint = ten_channels, ten_channels.endpoint("C4")
    saved = dict(endpoint)
    change, said = BAD_ENDPOINTS[name]
    endpoint["address"] = change["address"].format(port=here.ports["C4"], other=here.ports["C3"])
    assert_reload_changes_nothing(here, "C4", said)
    here.agent.logged(said.replace('"', '\\"'))
    endpoint.update(saved)
    assert here.sandbox.reload()["statusCode"] == 200


@pytest.mark.parametrize("status", [403, 404, 500])
def test_reload_with_an_unreadable_endpoint_changes_nothing(ten_channels, status):
    ten_channels.sandbox.faults.read_failures["Endpoint/5"] = status
    assert_reload_changes_nothing(ten_channels)
    ten_channels.sandbox.faults.read_failures.clear()


def test_reload_names_every_problem(ten_channels):
    saved = {name: dict(ten_channels.endpoint(name)) for name in ("C4", "C7")}
    ten_channels.endpoint("C4")["address"] = ""
    ten_channels.endpoint("C7")["address"] = "mllp://127.0.0.1"
    assert_reload_changes_nothing(ten_channels, "'C4'", "'C7'")
    for name, before in saved.items():
        ten_channels.endpoint(name).update(before)


def test_reload_with_a_channel_name_twice_or_without_endpoint_changes_nothing(ten_channels):
    agent = ten_channels.sandbox.resource(f"Agent/{AGENT_ID}")
    saved = agent["channel"]
    agent["channel"] = [*saved, saved[4]]
    assert_reload_changes_nothing(ten_channels, "'C4'")
    agent["channel"] = [*saved, {"name": "Lost"}]
    assert_reload_changes_nothing(ten_channels, "'Lost'")
    agent["channel"] = saved


def test_reload_with_a_port_in_use_names_it(ten_channels):
    (port,) = free_ports(1)
    saved = dict(ten_channels.endpoint("C4"))
    with socket.create_server(("127.0.0.1", port)):
        ten_channels.endpoint("C4")["address"] = f"mllp://127.0.0.1:{port}"
        assert_reload_changes_nothing(ten_channels, "'C4'", str(port))
    ten_channels.endpoint("C4").update(saved)


# --- reload: what changes and what stays ---


def test_untouched_channels_keep_their_connections(tmp_path):
    with site(tmp_path, {"A": "?enhanced=true", "B": "?enhanced=true", "C": ""}) as here:
        (port,) = free_ports(1)
        with here.device("A") as untouched, here.device("B") as changed, here.device("C") as moved:
            here.endpoint("B")["address"] += "&appLevelAck=NE"
            here.endpoint("C")["address"] = f"mllp://127.0.0.1:{port}"
            assert here.sandbox.reload()["statusCode"] == 200
            untouched.send(message("KEPT-1"))
            assert [untouched.ack()[0], untouched.ack()[0]] == ["CA", "AA"]
            changed.send(message("CHANGED-1"))  # the same port: connections stay, the new setting applies to them
            assert changed.heard(1) == [("CA", "CHANGED-1")]
            assert moved.closed_by_peer()
        assert accepts(("127.0.0.1", port)) and not accepts(("127.0.0.1", here.ports["C"]))


def test_channels_come_and_go(tmp_path):
    with site(tmp_path, {"A": "", "B": ""}) as here:
        agent = here.sandbox.resource(f"Agent/{AGENT_ID}")
        removed = agent["channel"].pop()
        assert here.sandbox.reload()["statusCode"] == 200
        assert not accepts(("127.0.0.1", here.ports["B"]))
        agent["channel"].append(removed)
        assert here.sandbox.reload()["statusCode"] == 200
        with here.device("B") as device:
            assert device.ask(message("BACK-1")) == ("AA", "BACK-1")


def test_swapping_two_ports_under_load_loses_nothing(tmp_path):
    with site(tmp_path, {"A": "?enhanced=true&appLevelAck=NE", "B": "?enhanced=true&appLevelAck=NE"}) as here:
        accepted: list[set[str]] = [set(), set()]
        stop = threading.Event()
        threads = [threading.Thread(target=keep_sending, args=(here, n, accepted[n], stop)) for n in range(2)]
        for thread in threads:
            thread.start()
        for swaps in range(1, 6):
            first, second = here.endpoint("A"), here.endpoint("B")
            first["address"], second["address"] = second["address"], first["address"]
            time.sleep(0.1)
            assert here.sandbox.reload()["statusCode"] == 200
            control = f"MARK-{swaps}"
            with here.device("A") as device:
                device.ask(message(control))
            here.sandbox.wait_ids(control)
            assert here.sandbox.of(control)[0].channel == ("B" if swaps % 2 else "A")
        stop.set()
        for thread in threads:
            thread.join(10)
        assert min(map(len, accepted)) > 20
        here.sandbox.wait_ids(*accepted[0], *accepted[1])


def keep_sending(here, number, accepted, stop):
    """A device that sends to one port, reconnecting whenever it must."""
    sent = 0
    while not stop.is_set():
        with contextlib.suppress(OSError, EOFError), here.device("AB"[number]) as device:
            while not stop.is_set():
                sent += 1
                code, control = device.ask(message(f"LOAD-{number}-{sent}", patient=f"L{number}"))
                assert code == "CA"
                accepted.add(control)


def test_reloads_at_once_are_taken_one_after_the_other(tmp_path):
    with site(tmp_path, {"A": ""}) as here:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(here.sandbox.reload())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert [answer.get("statusCode") for answer in answers] == [200] * 8


def test_port_in_use_at_start_is_named_and_waited_for(tmp_path):
    with site(tmp_path, {"A": "", "B": ""}, start=False) as here:
        with socket.create_server(("127.0.0.1", here.ports["B"])):
            here.agent.start(ready=False)
            assert "'B'" in here.agent.logged(f"port {here.ports['B']}")
            with eventually(lambda: connect(here, "A")) as device:
                assert device.ask(message("A-1")) == ("AA", "A-1")
        with eventually(lambda: connect(here, "B")) as device:
            assert device.ask(message("B-1")) == ("AA", "B-1")


def connect(here, channel):
    with contextlib.suppress(OSError):
        return here.device(channel)
    return None


# --- status ---


def test_agent_status_off_stops_the_channels_and_nothing_else(tmp_path):
    with site(tmp_path, {"A": "", "B": "?enhanced=true"}) as here:
        agent = here.sandbox.resource(f"Agent/{AGENT_ID}")
        here.sandbox.faults.silent = True
        with here.device("B") as device:
            assert device.ask(message("OFF-1")) == ("CA", "OFF-1")
            here.sandbox.wait_ids("OFF-1")
            agent["status"] = "off"
            reads = len(here.sandbox.sandbox.requests)
            assert here.sandbox.reload()["statusCode"] == 200
            assert not [r for r in here.sandbox.sandbox.requests[reads:] if "Endpoint" in r]
            eventually(lambda: not any(accepts(("127.0.0.1", port)) for port in here.ports.values()))
            assert device.closed_by_peer(8)
        assert here.sandbox.stats()["live"] is True
        push = here.sandbox.ask("agent:transmit:request", remote="mllp://127.0.0.1:1", body="MSH|", contentType="x")
        assert push["type"] == "agent:error" and push["body"] == "Agent.status is currently set to off"
        agent["status"] = "active"
        here.sandbox.faults.silent = False
        assert here.sandbox.reload()["statusCode"] == 200
        with here.device("A") as device:
            assert device.ask(message("ON-1")) == ("AA", "ON-1")


def test_agent_status_error_keeps_the_channels(tmp_path):
    with site(tmp_path, {"A": ""}) as here:
        here.sandbox.resource(f"Agent/{AGENT_ID}")["status"] = "error"
        assert here.sandbox.reload()["statusCode"] == 200
        with here.device("A") as device:
            assert device.ask(message("ERR-1")) == ("AA", "ERR-1")
        push = here.sandbox.ask("agent:transmit:request", remote="mllp://127.0.0.1:1", body="MSH|", contentType="x")
        assert push["type"] == "agent:error" and push["body"] == "Agent.status is currently set to off"


@pytest.mark.parametrize("status", ["off", "suspended", "error", "test"])
def test_endpoint_status(tmp_path, status):
    with site(tmp_path, {"A": "", "B": ""}) as here:
        here.endpoint("B")["status"] = status
        assert here.sandbox.reload()["statusCode"] == 200
        assert accepts(("127.0.0.1", here.ports["B"])) is (status != "off")
        with here.device("A") as device:
            assert device.ask(message("EP-1")) == ("AA", "EP-1")
        if status == "off":
            here.agent.logged("'B'")
            here.endpoint("A")["address"] = here.endpoint("B")["address"]
            answer = here.sandbox.reload()  # an Endpoint that is off still takes part in the check of ports
            assert answer["type"] == "agent:error" and "'B'" in answer["body"]


# --- remote operations ---


def test_fetch_logs_pages_through_all_files(tmp_path):
    with site(tmp_path, {"A": ""}, start=False) as here:
        here.agent.state_dir.mkdir()
        old = [
            {"level": "INFO", "msg": f"old line {n}", "timestamp": f"2020-01-01T00:00:{n:02d}.000Z"} for n in range(40)
        ]
        lines = [json.dumps(entry | {"more": "removed"}) for entry in old]
        lines[20:20] = ["half of a li", '{"level":"INFO"}', "", '"text"', "\ufffd\x00"]
        (here.agent.state_dir / "medplum-agent-main-2020-01-01.log").write_text("\n".join(lines) + "\n")
        here.agent.start()
        here.agent.logged("started successfully")
        newest = here.sandbox.ask("agent:logs:request", limit=1000)
        assert newest["statusCode"] == 200 and newest["hasMore"] is False and "nextBefore" not in newest
        written = [
            {k: e[k] for k in ("level", "msg", "timestamp")} for e in log_lines(here.agent.main_log()[find_new(here) :])
        ]
        assert newest["logs"] == [*reversed(written), *reversed(old)]
        for limit in (1, 7, 40):
            assert all_pages(here, limit) == newest["logs"]
        assert len(here.sandbox.ask("agent:logs:request")["logs"]) == 20


def find_new(here):
    return here.agent.main_log().index(b"Medplum Agent") - len(b'{"level":"INFO","msg":"')


def all_pages(here, limit):
    found: list[dict[str, str]] = []
    more: dict[str, str] = {}
    while True:
        page = here.sandbox.ask("agent:logs:request", limit=limit, **more)
        found += page["logs"]
        assert len(page["logs"]) == limit or not page["hasMore"]
        if not page["hasMore"]:
            return found
        more = {"before": page["nextBefore"]}


@pytest.mark.parametrize("asked", [{"limit": None}, {"limit": 20.0}, {"before": ""}, {"before": None}])
def test_what_is_left_open_in_a_request_for_logs_has_its_default(ten_channels, asked):
    answer = ten_channels.sandbox.ask("agent:logs:request", **asked)
    assert answer["type"] == "agent:logs:response" and 0 < len(answer["logs"]) <= 20


def test_bad_requests_for_logs(ten_channels):
    for limit in (0, -1, 1001, "20", 2.5, True, [1]):
        answer = ten_channels.sandbox.ask("agent:logs:request", limit=limit)
        assert answer["type"] == "agent:error"
        assert answer["body"].startswith("Invalid limit: ")
        assert answer["body"].endswith(" - must be a valid positive integer less than or equal to 1000")
    for before in ("nonsense", "bWVkcGx1bQ==", "../../etc/passwd", 7, {"a": 1}):
        answer = ten_channels.sandbox.ask("agent:logs:request", before=before)
        assert answer["type"] == "agent:error" and "ursor" in answer["body"], (before, answer)


def test_stats_have_the_fields_of_the_contract(tmp_path):
    with site(tmp_path, {"A": "", "B": "?enhanced=true"}) as here:
        with here.device("A") as first, here.device("B") as second:
            for n in range(10):
                first.ask(message(f"STAT-{n}"))
            here.sandbox.faults.silent = True
            second.ask(message("STAT-OPEN"))
            second.ask(message("STAT-WAITING"))
            here.sandbox.wait_ids("STAT-OPEN")
            time.sleep(0.2)
            stats = here.sandbox.stats()
        assert stats["hl7ConnectionsOpen"] == 2 and stats["live"] is True and stats["webSocketQueueDepth"] == 1
        numbers = ("ping", "hl7QueueDepth", "hl7ClientCount", "outstandingHeartbeats")
        assert all(isinstance(stats[name], int) for name in numbers) and stats["clientStats"] == {}
        rtt = stats["channelStats"]["A"]["rtt"]
        assert set(rtt) == {"count", "min", "max", "average", "p50", "p95", "p99", "pendingCount"}
        assert rtt["count"] == 10 and 0 <= rtt["min"] <= rtt["p50"] <= rtt["p95"] <= rtt["p99"] <= rtt["max"]
        assert stats["channelStats"]["B"]["rtt"]["pendingCount"] == 1 and stats["channelStats"]["B"]["rtt"]["p50"] == -1
        queue = stats["durableQueue"]
        assert queue["enabled"] is True and queue["isLeader"] is True and queue["dbSizeBytes"] > 0
        assert {"lastSweepAt", "lastSweepDeletedProcessed", "lastSweepDeletedErrored"} <= set(queue)
        assert (
            queue["countsByState"]["processed"],
            queue["countsByState"]["inflight"],
            queue["countsByState"]["queued"],
        ) == (10, 1, 1)
        assert queue["channelDepth"]["A"] == {"queued": 0, "claimed": 0, "inflight": 0, "oldestQueuedAgeMs": -1}
        depth = queue["channelDepth"]["B"]
        assert (depth["queued"], depth["claimed"], depth["inflight"]) == (1, 0, 1) and depth["oldestQueuedAgeMs"] >= 200


def test_stats_line_in_the_log(tmp_path):
    with site(tmp_path, {"A": ""}, [setting("logStatsFreqSecs", 1)]) as here:
        here.agent.logged('"Agent stats"')
        entry = next(e for e in log_lines(here.agent.main_log()) if e["msg"] == "Agent stats")
        assert entry["level"] == "INFO" and set(entry["stats"]) == set(here.sandbox.stats())


def test_upgrade_is_refused_with_the_callback(ten_channels):
    answer = ten_channels.sandbox.ask("agent:upgrade:request", version="9.9.9", force=True)
    assert answer["type"] == "agent:error" and "upgrade" in answer["body"]


def test_push_is_answered(ten_channels):
    answer = ten_channels.sandbox.ask("agent:transmit:request", body="MSH|", contentType="x-application/hl7-v2+er7")
    assert answer["type"] == "agent:error" and answer["body"] == "Missing remote address"
    answer = ten_channels.sandbox.ask("agent:transmit:request", remote="192.168.50.10", body="MSH|")
    assert answer["type"] == "agent:error" and answer["body"].startswith("WebSocket error on incoming message: ")


# --- start and stop ---


def test_start_without_the_server_listens_stores_and_delivers_later(tmp_path):
    with site(tmp_path, {"A": "?enhanced=true", "B": ""}) as here:
        here.agent.terminate()
        here.sandbox.stop()
        here.agent.start(ready=False)
        here.agent.wait_listening()
        with here.device("A") as device, here.device("B", timeout=20) as original:
            for n in range(5):
                assert device.ask(message(f"OFFLINE-{n}")) == ("CA", f"OFFLINE-{n}")
            original.send(message("OFFLINE-B"))
            here.sandbox.start()
            assert original.ack() == ("AA", "OFFLINE-B")
            here.sandbox.wait_ids(*(f"OFFLINE-{n}" for n in range(5)))
            assert [device.ack() for _ in range(5)] == [("AA", f"OFFLINE-{n}") for n in range(5)]


def test_changes_made_while_away_are_applied_when_the_server_is_back(tmp_path):
    with site(tmp_path, {"A": ""}) as here:
        here.agent.terminate()
        here.sandbox.stop()
        here.agent.start(ready=False)
        here.agent.wait_listening()
        (port,) = free_ports(1)
        here.endpoint("A")["address"] = f"mllp://127.0.0.1:{port}"
        here.sandbox.start()
        eventually(lambda: accepts(("127.0.0.1", port)), 20)
        eventually(lambda: not accepts(("127.0.0.1", here.ports["A"])), 5, "the old port is closed")


def test_start_with_a_bad_endpoint_uses_the_last_good_configuration(tmp_path):
    with site(tmp_path, {"A": "", "B": ""}) as here:
        here.agent.terminate()
        saved, here.endpoint("B")["address"] = here.endpoint("B")["address"], ""
        here.agent.start(ready=False)
        here.agent.logged("last good")
        with eventually(lambda: connect(here, "B")) as device:
            assert device.ask(message("GOOD-1")) == ("AA", "GOOD-1")
        here.endpoint("B")["address"] = saved


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("silent", [False, True])
def test_clean_stop(tmp_path, number, silent):
    with site(tmp_path, {"A": "", "B": "?enhanced=true"}) as here:
        here.sandbox.faults.silent = silent
        with here.device("A") as waiting, here.device("B") as enhanced, here.device("A"), here.device("A") as half:
            half.send_raw(b"\x0bMSH|^~")
            waiting.send(message("STOP-1"))
            assert enhanced.ask(message("STOP-2", patient="STOP2")) == ("CA", "STOP-2")
            here.sandbox.wait_ids("STOP-1", "STOP-2")
            code, seconds = here.agent.terminate(number)
            assert code == 0 and seconds < 10, here.agent.output()
        here.agent.logged("Stopped")
        assert not here.sandbox.connected
        here.sandbox.faults.silent = False
        here.agent.start()
        eventually(lambda: {row["state"] for c in ("STOP-1", "STOP-2") for row in here.agent.rows(c)} == {"processed"})


def test_clean_stop_lets_answers_through(tmp_path):
    with site(tmp_path, {"A": ""}) as here, here.device("A") as device:
        here.sandbox.faults.delay = lambda: 0.5
        device.send(message("LAST-1"))
        here.sandbox.wait_ids("LAST-1")
        assert here.agent.process is not None
        here.agent.process.send_signal(signal.SIGTERM)
        assert device.ack() == ("AA", "LAST-1")
        assert here.agent.wait_exit() == 0


def test_clean_stop_before_the_server_was_ever_reached(tmp_path):
    with site(tmp_path, {"A": ""}, start=False) as here:
        here.sandbox.stop()
        here.agent.start(ready=False)
        here.agent.logged("starts for")
        code, seconds = here.agent.terminate()
        assert code == 0 and seconds < 10


def test_second_agent_with_the_same_state_directory_is_refused(tmp_path):
    with site(tmp_path, {"A": ""}) as here:
        second = AgentProcess(here.sandbox, here.agent.state_dir)
        second.output_path = tmp_path / "second.txt"
        second.start(ready=False)
        assert second.wait_exit() == 1
        assert "another agent" in second.output() and "--state-dir" in second.output()
        with here.device("A") as device:
            assert device.ask(message("FIRST-1")) == ("AA", "FIRST-1")


def test_health_is_that_of_the_running_agent(tmp_path):
    with site(tmp_path, {"A": ""}) as here:
        state = ("--state-dir", str(here.agent.state_dir))
        env = dict(zip(("MEDPLUM_BASE_URL", "MEDPLUM_CLIENT_ID", "MEDPLUM_CLIENT_SECRET"), GOOD, strict=False))
        env["MEDPLUM_AGENT_ID"] = AGENT_ID
        eventually(lambda: run(tmp_path, "health", *state, **env)[0] == 0, 10, "healthy")
        here.agent.terminate()
        code, said = run(tmp_path, "health", *state, **env)
        assert code == 1 and "does not run" in said


def test_logs_go_where_the_service_manager_says(tmp_path):
    logs = tmp_path / "logs"
    with site(tmp_path, {"A": ""}, env={"LOGS_DIRECTORY": str(logs)}):
        eventually(lambda: list(logs.glob("medplum-agent-main-*")), 5, "the main log")


# --- command line ---


def run(folder, *arguments, **env):
    """Exit code and all that is printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MEDPLUM_")} | env
    done = subprocess.run(
        [*AgentProcess.COMMAND, *arguments], cwd=folder, env=environment, capture_output=True, timeout=20
    )
    return done.returncode, (done.stdout + done.stderr).decode()


GOOD = ("http://127.0.0.1:1/", "client", "s3cret-word", "agent-1")


@pytest.mark.parametrize(
    ("arguments", "env", "files", "said"),
    [
        ((), {}, {}, ["baseUrl is missing", "MEDPLUM_BASE_URL", "clientId", "clientSecret", "agentId", "agent.toml"]),
        (GOOD[:3], {}, {}, ["agentId is missing", "argument 4", "MEDPLUM_AGENT_ID"]),
        ((GOOD[0], "", *GOOD[2:]), {}, {}, ["clientId is missing", "argument 2"]),
        (("ftp://x", *GOOD[1:]), {}, {}, ["baseUrl 'ftp://x'", "the command line", "http"]),
        (GOOD[:0], {"MEDPLUM_BASE_URL": "nonsense"}, {}, ["baseUrl 'nonsense'", "the environment"]),
        ((), {}, {"agent.toml": 'baseUrl = "x:y"\n'}, ["baseUrl 'x:y'", "agent.toml"]),
        ((), {}, {"agent.properties": "baseUrl=x:y\n"}, ["baseUrl 'x:y'", "agent.properties"]),
        ((*GOOD, "LOUD"), {}, {}, ["logLevel 'LOUD'", "the command line", "DEBUG"]),
        ((*GOOD[:3], "a/b"), {}, {}, ["agentId 'a/b'"]),
        ((*GOOD, "--config", "none.toml"), {}, {}, ["none.toml"]),
        ((*GOOD, "--config", "bad.toml"), {}, {"bad.toml": "a = = b"}, ["bad.toml"]),
        (GOOD, {}, {"agent.toml": "heartbeatSecs = 'soon'"}, ["heartbeatSecs 'soon'", "agent.toml", "number"]),
        (GOOD, {"MEDPLUM_CA_FILE": "/nowhere.pem"}, {}, ["caFile", "/nowhere.pem"]),
        ((), {"MEDPLUM_CLIENT_SECRET_FILE": "/nowhere"}, {}, ["clientSecretFile /nowhere"]),
        ((*GOOD, "--state-dir", "file"), {}, {"file": ""}, ["--state-dir"]),
        ((*GOOD, "--bogus"), {}, {}, ["--bogus", "--help"]),
    ],
)  # fmt: skip
def test_errors_say_what_where_and_how(tmp_path, arguments, env, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code, printed = run(tmp_path, *arguments, **env)
    toml = "agent.toml" in files or any(name.endswith(".toml") for name in arguments)
    assert code == (78 if toml else 1), printed
    for text in said:
        assert text in printed, printed
    assert "s3cret-word" not in printed and "Traceback" not in printed


def test_version_help_and_schema(tmp_path):
    code, printed = run(tmp_path, "--version")
    assert code == 0 and re.fullmatch(r"\d+\.\d+\.\d+-[0-9a-z]{7}\s*", printed)
    for flag in ("--help", "-h"):
        code, printed = run(tmp_path, flag)
        assert code == 0 and all(
            word in printed for word in ("base_url", "--config", "--state-dir", "demo", "--version")
        )
    code, printed = run(tmp_path, "--settings-schema")
    schema = json.loads(printed)
    names = {row["name"]: row for row in schema["settings"]}
    assert code == 0 and {"baseUrl", "enhanced", "durableQueue", "logDir", "maxWorkers"} <= set(names)
    assert names["appLevelAck"]["choices"] == ["AL", "ER", "NE", "SU"] and names["appLevelAck"]["default"] == "AL"
    assert all({"name", "type", "label", "description", "category"} <= set(row) for row in schema["settings"])
    code, printed = run(tmp_path, "--settings-schema=markdown")
    assert code == 0 and "| `appLevelAck` |" in printed
    assert not list(tmp_path.iterdir())


def start_with(here, arguments, env=None):
    """Start the agent with these arguments only."""
    here.agent.state_dir.mkdir(exist_ok=True)
    with open(here.agent.output_path, "ab") as output:
        here.agent.process = subprocess.Popen(
            [*AgentProcess.COMMAND, *arguments], cwd=here.agent.state_dir, env=os.environ | (env or {}),
            stdout=output, stderr=output,
        )  # fmt: skip
    here.agent.wait_listening()
    here.agent.wait_connected()
    with here.device("A") as device:
        assert device.ask(message("STARTED")) == ("AA", "STARTED")


def test_start_from_the_environment_with_a_secret_file(tmp_path):
    with site(tmp_path, {"A": ""}, start=False) as here:
        (tmp_path / "secret").write_text("sandbox-secret\n")
        start_with(here, [], {
            "MEDPLUM_BASE_URL": here.sandbox.url, "MEDPLUM_CLIENT_ID": "sandbox-client", "MEDPLUM_AGENT_ID": AGENT_ID,
            "MEDPLUM_CLIENT_SECRET_FILE": str(tmp_path / "secret"), "MEDPLUM_STATE_DIR": str(here.agent.state_dir),
        })  # fmt: skip


TOML = (
    'baseUrl = "{url}"\nclientId = "sandbox-client"\nclientSecret = "sandbox-secret"\n'
    'agentId = "{id}"\nstateDir = "."\n'
)
PROPERTIES = (
    "# comment=1\r\nbaseUrl={url}\r\nclientId = sandbox-client\r\nclientSecret=sandbox-secret\r\n"
    "agentId={id}\r\nunknown=a=b=c\r\nstateDir=.\r\n"
)


@pytest.mark.parametrize(("name", "text"), [("agent.toml", TOML), ("agent.properties", PROPERTIES)])
def test_start_from_a_file_in_the_working_directory(tmp_path, name, text):
    with site(tmp_path, {"A": ""}, start=False) as here:
        here.agent.state_dir.mkdir()
        (here.agent.state_dir / name).write_text(text.format(url=here.sandbox.url, id=AGENT_ID), newline="")
        start_with(here, [])


def test_logs_rotate_by_size(tmp_path):
    """Each batch makes a file larger than the limit; the newest two stay, and no line of the newest batch is lost."""
    config = '[logger.channel]\nmaxFileSizeMb = 1\nfilesToKeep = 2\n[logger.main]\nlogLevel = "WARN"\n'
    with site(tmp_path, {"A": "?enhanced=true"}, config=config, level="") as here:
        with here.device("A", timeout=20) as device:
            for batch in range(6):
                for n in range(12):
                    device.ask(message(f"ROT-{batch}-{n}", size=100_000))
                eventually(functools.partial(in_channel_log, here, f"|ROT-{batch}-11|"), 5, f"batch {batch} in the log")
                assert len(list(here.agent.state_dir.glob("medplum-agent-channels-*"))) <= 2
        assert "|ROT-4-11|" in channel_log(here) and "|ROT-5-0|" in channel_log(here)
        assert {entry["level"] for entry in log_lines(here.agent.main_log())} <= {"WARN", "ERROR"}


def channel_log(here):
    """The text of all files of the channel log."""
    texts = []
    for path in here.agent.state_dir.glob("medplum-agent-channels-*"):
        with contextlib.suppress(FileNotFoundError):  # rotated away meanwhile
            texts.append(path.read_text())
    return "".join(texts)


def in_channel_log(here, text):
    return text in channel_log(here)


def test_a_page_of_a_log_with_long_lines_is_no_larger_than_a_frame(tmp_path):
    """Else the server closes the connection (1009), each time that somebody asks."""
    with site(tmp_path, {"A": ""}, start=False) as here:
        here.agent.state_dir.mkdir(mode=0o700)
        text, when = "\u00fc" * 2000, "2020-01-01T00:00:00.000Z"
        old = [{"level": "WARN", "msg": f"{n} {text}", "timestamp": when} for n in range(600)]
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in old)
        (here.agent.state_dir / "medplum-agent-main-2020-01-01.log").write_text(lines, "utf-8")
        here.agent.start()
        found: list[dict[str, str]] = []
        more: dict[str, str] = {}
        while True:
            page = here.sandbox.ask("agent:logs:request", limit=1000, **more)
            assert len(json.dumps(page, ensure_ascii=False).encode()) < 2**20
            found += page["logs"]
            if not page["hasMore"]:
                break
            more = {"before": page["nextBefore"]}
        assert found[-600:] == old[::-1]
