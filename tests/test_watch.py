"""What a person asks of a running agent: status, alarms, the page's endpoints, figures, and the cloud's agent://."""

import contextlib
import datetime
import http.client
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import time
from typing import Any

import pytest
import trustme
from prometheus_client.parser import text_string_to_metric_families

import medplum_agent
from tests.instruments import ACK, ENQ, Instrument, frames_of
from tests.support import AGENT_ID, AgentProcess, Site, accepts, changed, eventually, free_ports, message, setting, site

PATIENT = "P-4711"
ONCE = [setting("channelAutoRetryMaxAttempts", 1), setting("channelAutoRetryBaseDelayMs", 20)]
CHANNELS = {"ADT": "?enhanced=true", "LAB": "?enhanced=true"}


def command(here: Site, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    line = [*AgentProcess.COMMAND, *arguments, "--state-dir", str(here.agent.state_dir)]
    return subprocess.run(line, capture_output=True, text=True, timeout=30, **options)


def ask(here: Site, **asked: Any) -> Any:
    return medplum_agent.ask_agent(here.agent.state_dir, asked)


def status(here: Site) -> Any:
    return ask(here, command="status")


OFTEN = "m.LOOK_SECS = 0.2"  # seconds between two looks for alarms


@pytest.fixture
def here(tmp_path):
    with site(tmp_path, CHANNELS, ONCE) as running:
        yield running


@pytest.fixture
def watched(tmp_path):
    """The same with an agent that looks for alarms all the time."""
    with site(tmp_path, CHANNELS, ONCE, start=False) as running:
        changed(running.agent, OFTEN)
        running.agent.start()
        yield running


def dead_letters(here: Site, count: int) -> None:
    well, here.sandbox.bot = here.sandbox.bot, lambda transmit: (400, "no")
    with here.device("ADT") as device:
        for number in range(count):
            assert device.ask(message(f"DEAD-{number}", patient=PATIENT))[0] == "CA"
    eventually(lambda: status(here)["channels"][0]["dead"] == count)
    here.sandbox.bot = well


# --- status ---


def test_status_shows_channels_and_what_waits(here):
    with here.device("ADT") as device:
        assert device.ask(message("S-1", patient=PATIENT))[0] == "CA" and device.ack()[0] == "AA"
        found = command(here, "status")
        assert found.returncode == 0 and found.stdout.startswith("OK: Medplum Agent"), found.stdout + found.stderr
        adt = next(line for line in found.stdout.splitlines() if line.startswith("ADT "))
        assert f"{here.ports['ADT']}" in adt and " ago " in adt
        assert PATIENT not in found.stdout and "S-1" not in found.stdout
        shown = json.loads(command(here, "status", "--json").stdout)
        assert shown["server"]["live"] and [one["name"] for one in shown["channels"]] == ["ADT", "LAB"]
        assert (shown["channels"][0]["connections"], shown["channels"][0]["count"]) == (1, 1)
        here.sandbox.stop()
        assert device.ask(message("S-2"))[0] == "CA"
        eventually(lambda: status(here)["channels"][0]["waiting"] == 1)
        here.sandbox.start()
    here.agent.kill()
    found = command(here, "status")
    assert found.returncode == 2 and "no agent runs" in found.stdout


def test_the_socket_is_for_the_agents_user_only(here):
    path = here.agent.state_dir / "agent.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert here.agent.terminate()[0] == 0
    assert not path.exists()
    assert ask(here, command="status") is None


def test_a_state_directory_with_a_long_name_has_a_door_instead(tmp_path):
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    with site(folder, {"ADT": ""}) as here:
        assert not (here.agent.state_dir / "agent.sock").exists()
        door = here.agent.state_dir / "agent.door"
        assert stat.S_IMODE(door.stat().st_mode) == 0o600
        assert status(here)["channels"][0]["name"] == "ADT"
        port = int(door.read_text().split()[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("POST", "/ask", b'{"command":"status"}', {"Authorization": "Bearer wrong"})
        assert connection.getresponse().status == 401


# --- dead letters ---


def test_dead_letters_are_sent_again(here):
    dead_letters(here, 3)
    assert command(here, "queue", "retry", "--dry-run").stdout.startswith("3 dead letters would be")
    assert command(here, "queue", "retry", "--channel", "LAB").returncode == 1
    first = json.loads(command(here, "queue", "list", "dead", "--json").stdout.splitlines()[0])["id"]
    done = command(here, "queue", "retry", str(first))
    assert done.returncode == 0 and done.stdout.startswith("1 dead letters are sent again"), done.stderr
    here.agent.wait_state("DEAD-0", "processed")
    assert command(here, "queue", "retry", "--reason", "server-rejected").stdout.startswith("2 ")
    here.agent.wait_state("DEAD-1", "processed")
    here.agent.wait_state("DEAD-2", "processed")
    assert here.sandbox.ids().count("DEAD-0") == 2
    assert status(here)["channels"][0]["dead"] == 0


def test_dead_letters_are_given_up_only_by_name(here):
    dead_letters(here, 2)
    refused = command(here, "queue", "discard")
    assert refused.returncode == 1 and "discard needs" in refused.stderr
    assert command(here, "queue", "discard", "--channel", "ADT").stdout.startswith("2 ")
    row = here.agent.rows("DEAD-0")[0]
    assert row["state"] == "processed" and "gave it up" in row["last_error"] and row["original"]
    assert command(here, "queue", "retry").returncode == 1


def test_dead_letters_of_an_agent_that_does_not_run(here):
    dead_letters(here, 2)
    here.agent.terminate()
    assert command(here, "queue", "retry").stdout.startswith("2 ")
    assert not list(here.agent.state_dir.glob("*.sqlite.lock"))
    here.agent.start()
    here.agent.wait_state("DEAD-0", "processed")
    here.agent.wait_state("DEAD-1", "processed")


def test_dead_letters_from_before_a_restart_are_sent_again(here):
    dead_letters(here, 2)
    here.agent.terminate()
    here.agent.start()  # nothing waits: the queue has read nothing yet
    assert command(here, "queue", "retry").stdout.startswith("2 ")
    here.agent.wait_state("DEAD-0", "processed")
    here.agent.wait_state("DEAD-1", "processed")
    assert here.sandbox.ids() == ["DEAD-0", "DEAD-1"] * 2


def test_no_numbers_mean_no_messages(here):
    dead_letters(here, 2)
    assert ask(here, command="queue", verb="retry", ids=[]) == {"count": 0}
    assert ask(here, command="queue", verb="discard", ids=[]) == {"count": 0}
    for nothing in ({"channel": ""}, {"since": 0}, {}):
        with pytest.raises(medplum_agent.LocalError, match="discard needs"):
            ask(here, command="queue", verb="discard", **nothing)
    assert status(here)["channels"][0]["dead"] == 2


def test_what_was_given_up_can_be_sent_anew_by_its_device(here):
    dead_letters(here, 1)
    assert command(here, "queue", "discard", "--channel", "ADT").stdout.startswith("1 ")
    assert "gave it up" in command(here, "queue", "find", "DEAD-0").stdout
    with here.device("ADT") as device:
        assert device.ask(message("DEAD-0", patient=PATIENT))[0] == "CA"
        assert device.ack() == ("AA", "DEAD-0")


def test_the_cloud_gives_up_waiting_and_no_message_is_stranded(tmp_path):
    with site(tmp_path, {"ADT": "?enhanced=true"}, ONCE, start=False) as here:
        changed(here.agent, "m.REMOTE_SECS, m.DECIDED_ROWS = 0.05, 2")
        here.agent.start()
        well, here.sandbox.bot = here.sandbox.bot, lambda transmit: (400, "no")
        names = [f"M-{n}" for n in range(1500)]
        with here.device("ADT") as device:
            device.send(*(message(name, patient=name) for name in names))
            eventually(lambda: status(here)["channels"][0]["dead"] == len(names), timeout=30)
        here.sandbox.bot = well
        code, refused = cloud(here, command="retry")
        assert code == 400 and "no answer within" in refused["error"]
        eventually(lambda: all(here.sandbox.ids().count(name) == 2 for name in names), timeout=30)


def test_many_dead_letters_keep_their_order_and_new_messages_flow(tmp_path):
    with site(tmp_path, {"ADT": "?enhanced=true&maxWorkers=1"}, ONCE) as here:
        well, here.sandbox.bot = here.sandbox.bot, lambda transmit: (400, "no")
        count = 3000
        with here.device("ADT") as device:
            device.send(*(message(f"M-{n}") for n in range(count)))
            device.heard(count)
            eventually(lambda: status(here)["channels"][0]["dead"] == count, timeout=60)
            here.sandbox.bot = well
            before = len(here.sandbox.ids())
            assert ask(here, command="queue", verb="retry") == {"count": count}
            with here.device("ADT") as other:
                assert other.ask(message("NEW"))[0] == "CA"
            here.agent.wait_state("NEW", "processed", timeout=60)
            here.agent.wait_state(f"M-{count - 1}", "processed", timeout=60)
        again = [one for one in here.sandbox.ids()[before:] if one != "NEW"]
        assert again == [f"M-{n}" for n in range(count)]


def test_messages_move_to_another_queue_once(here, tmp_path):
    dead_letters(here, 3)
    file = tmp_path / "moved.jsonl"
    assert command(here, "queue", "export", str(file), "--kind", "dead").stdout.startswith("3 messages")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = command(here, "queue", "export", str(file))
    assert again.returncode == 1 and "exists" in again.stderr
    assert "export" in (here.agent.state_dir / "medplum-agent-audit.log").read_text()
    assert command(here, "queue", "import", str(file), "--dry-run").stdout.startswith("3 of 3 messages would be")
    assert len(here.agent.rows("DEAD-1")) == 1
    assert command(here, "queue", "import", str(file)).stdout.startswith("3 of 3 messages are")
    eventually(lambda: [row["state"] for row in here.agent.rows("DEAD-1")] == ["rejected", "processed"])
    assert command(here, "queue", "import", str(file)).stdout.startswith("0 of 3")
    file.write_text('{"channel": "ADT"}')
    broken = command(here, "queue", "import", str(file))
    assert broken.returncode == 1 and "queue export" in broken.stderr


def test_a_half_session_of_an_instrument_is_sent_only_when_it_is_named(tmp_path):
    """README: it is never delivered as a result."""
    query = "tcp://127.0.0.1:{port}?mode=astm"
    with site(tmp_path, {"ASTM": query}, start=False) as here:
        here.agent.start()
        eventually(lambda: accepts(("127.0.0.1", here.ports["ASTM"])), 10, "its port")
        with Instrument.at(here.ports["ASTM"]) as device:
            assert device.ask(ENQ) == ACK
            assert device.ask(frames_of("H|\\^&|||HALF")[0]) == ACK
        (dead,) = eventually(lambda: json.loads(f"[{command(here, 'queue', 'list', 'dead', '--json').stdout}]"))
        file, before = tmp_path / "moved.jsonl", len(here.sandbox.seen)
        retried = command(here, "queue", "retry").stdout
        assert retried.startswith("0 ") and "1 half sessions of instruments are left out" in retried
        assert ask(here, command="queue", verb="retry", channel="ASTM") == {"count": 0}
        assert command(here, "queue", "export", str(file)).stdout.startswith("1 messages")
        assert command(here, "queue", "import", str(file)).stdout.startswith("0 of 0 messages")
        assert len(here.sandbox.seen) == before
        assert command(here, "queue", "retry", str(dead["id"])).stdout.startswith("1 ")
        eventually(lambda: len(here.sandbox.seen) == before + 1, 10, "it was named")


def test_large_messages_are_imported_a_few_at_a_time(tmp_path, monkeypatch):
    """Thousands at once would be more than the agent takes from anybody."""
    asked, size = [], 2**20

    def take(_: Any, asking: Any) -> Any:
        asked.append(asking["lines"])
        return {"count": len(asking["lines"])}

    monkeypatch.setattr(medplum_agent, "_asked", take)
    file = tmp_path / "large.jsonl"
    line = {"channel": "A", "errorCode": None, "receivedAt": 1, "original": "x" * size}
    file.write_text("".join(json.dumps(line | {"id": n}) + "\n" for n in range(50)))
    options = medplum_agent.command_parser("x").parse_args([])
    assert medplum_agent._import(options, file, medplum_agent.Wanted()) == 0
    assert [line["id"] for lines in asked for line in lines] == list(range(50))
    assert max(map(len, asked)) * size < medplum_agent.WEB_BYTES // 2


@pytest.mark.parametrize("asked", [["export", "x"], ["rekey", "--to", "plain"], ["list"]])
def test_a_dry_run_of_what_has_none_does_nothing(here, tmp_path, asked):
    done = command(here, "queue", *asked, "--dry-run", cwd=tmp_path)
    assert done.returncode == 1 and "--dry-run" in done.stderr and not list(tmp_path.glob("x"))


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_what_is_no_file_in_the_place_of_the_queue_holds_up_nobody(tmp_path, kind):
    path = tmp_path / medplum_agent.QUEUE_FILE
    os.mkfifo(path) if kind == "fifo" else path.mkdir()
    for asked, code, said in ((["status"], 2, "no agent"), (["queue", "list"], 1, "no file")):
        line = [*AgentProcess.COMMAND, *asked, "--state-dir", str(tmp_path)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=10)
        assert done.returncode == code and "Traceback" not in done.stderr, done
        assert said in done.stdout + done.stderr
    line = [*AgentProcess.COMMAND, "doctor", "http://127.0.0.1:1/", "a", "b", "c", "--state-dir", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=25)
    assert done.returncode == 2 and "no file" in done.stdout, done


def test_a_queue_of_another_version_is_changed_by_no_command(here):
    dead_letters(here, 1)
    here.agent.terminate()
    with contextlib.closing(sqlite3.connect(here.agent.queue_path)) as db:
        db.execute("PRAGMA user_version = 99")
    for asked in (["queue", "retry"], ["queue", "discard", "1"], ["queue", "list", "dead"]):
        done = command(here, *asked)
        assert done.returncode == 1 and "version" in done.stderr, done


def test_messages_are_replayed_to_a_bot_that_is_named(here):
    with here.device("ADT") as device:
        for number in range(3):
            assert device.ask(message(f"R-{number}", patient=PATIENT))[0] == "CA" and device.ack()[0] == "AA"
    who = [here.sandbox.url, "sandbox-client", "sandbox-secret", AGENT_ID]
    settings = here.agent.state_dir.with_name("replay.toml")
    names = ("baseUrl", "clientId", "clientSecret", "agentId")
    settings.write_text("".join(f"{name} = '{value}'\n" for name, value in zip(names, who, strict=True)))
    given = ["queue", "replay", "--channel", "ADT", "--since", "1h", "--config", str(settings)]
    refused = command(here, *given)
    assert refused.returncode == 1 and "--to Bot/ID" in refused.stderr
    assert command(here, *given, "--to", "Bot/second", "--dry-run").stdout.startswith("3 messages: would be sent")
    done = command(here, *given, "--to", "Bot/second")
    assert done.stdout.startswith("3 messages: status 200"), done.stdout + done.stderr
    sent = [(bot, body.split("|")[9]) for bot, body in here.sandbox.sandbox.executed]
    assert sent == [("second", f"R-{number}") for number in range(3)]
    here.sandbox.stop()
    lost = command(here, *given, "--to", "Bot/second")
    here.sandbox.start()
    since = re.search("0 messages are done; go on with --since (.*)", lost.stderr)
    assert lost.returncode == 1 and since, lost.stderr
    again = command(here, *given[:5], since[1], *given[6:], "--to", "Bot/second", "--dry-run")
    assert again.stdout.startswith("3 messages: would be sent"), again.stdout + again.stderr


# --- sending, and settings that cannot work ---


def test_a_file_is_sent_to_a_channel(here, tmp_path):
    file = tmp_path / "two.hl7"
    file.write_text(message("F-1").replace("\r", "\n") + "\n" + message("F-2").replace("\r", "\n"))
    done = subprocess.run(
        [*AgentProcess.COMMAND, "send", f"127.0.0.1:{here.ports['ADT']}", str(file)],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0 and "F-1: CA after" in done.stdout and "F-2: CA after" in done.stdout, done.stderr
    here.sandbox.wait_ids("F-1", "F-2")
    file.write_bytes(b"".join(b"\x0b" + message(f"F-{n}").encode() + b"\x1c\r" for n in (3, 4)))  # as it was captured
    line = [*AgentProcess.COMMAND, "send", f"127.0.0.1:{here.ports['ADT']}", str(file)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "F-3: CA after" in done.stdout and "F-4: CA after" in done.stdout, done.stderr
    latin = message("F-5").replace("|P|2.5.1", "|P|2.5.1||||||8859/1") + "PID|1||7||M\u00fcller\r"
    file.write_bytes(latin.encode("latin-1"))
    assert subprocess.run(line, capture_output=True, timeout=30).returncode == 0
    here.sandbox.wait_ids("F-5")
    assert "M\u00fcller" in here.sandbox.of("F-5")[0].body
    file.write_bytes(b"")
    done = subprocess.run(line, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and f"{file} holds no HL7" in done.stderr
    (closed,) = free_ports(1)
    done = subprocess.run(
        [*AgentProcess.COMMAND, "send", f"127.0.0.1:{closed}", str(file)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1 and "refused" in done.stderr and "Traceback" not in done.stderr


def test_lines_that_are_no_messages_are_refused_and_nothing_is_imported(here, tmp_path):
    dead_letters(here, 2)
    file = tmp_path / "moved.jsonl"
    assert command(here, "queue", "export", str(file)).returncode == 0
    good, other = map(json.loads, file.read_text().splitlines())
    for bad in (
        {"encoding": "nope"}, {"controlId": ["x"]}, {"original": None}, {"channel": "GONE"}, {"bytes": 7},
        {"original": "%%" + other["original"]}, {"kind": medplum_agent.ASTM_TYPE, "encoding": "nope"},
        {"original": other["original"][:-4]},
    ):  # fmt: skip
        file.write_text(f"{json.dumps(good | {'name': 'new'})}\n{json.dumps(other | bad)}\n")
        done = command(here, "queue", "import", str(file))
        assert done.returncode == 1 and "does not answer" not in done.stderr and "Traceback" not in done.stderr
    assert here.agent.rows("DEAD-0") + here.agent.rows("DEAD-1") and status(here)["channels"][0]["count"] == 2
    assert command(here, "queue", "list", "open", "--json").stdout.count("\n") == 2


def test_settings_in_a_file_that_cannot_work_end_with_78(tmp_path):
    (tmp_path / "agent.toml").write_text("baseUrl = 'ftp://x'\nclientId = ''\n")
    done = subprocess.run(
        [*AgentProcess.COMMAND, "--config", str(tmp_path / "agent.toml")], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 78 and "clientId is missing" in done.stderr
    done = subprocess.run(
        [*AgentProcess.COMMAND, "ftp://x", "a", "b", "c"], capture_output=True, text=True, timeout=30, cwd=tmp_path
    )
    assert done.returncode != 0


# --- the page's endpoints ---


@pytest.fixture
def web(tmp_path):
    (port,) = free_ports(1)
    with site(tmp_path, CHANNELS, ONCE, env={"MEDPLUM_STATUS_ADDRESS": f"127.0.0.1:{port}"}) as running:
        running.ports = {**running.ports, "page": port}
        yield running


def http_get(port: int, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> tuple[int, str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body or None, headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def token_of(here: Site) -> str:
    return (here.agent.state_dir / "agent.token").read_text()


def test_figures_are_what_prometheus_reads(web):
    dead_letters(web, 2)
    code, text, headers = http_get(web.ports["page"], "/metrics")
    assert code == 200 and "version=0.0.4" in headers["Content-Type"]
    found = {family.name: family for family in text_string_to_metric_families(text)}
    channel = {sample.labels["channel"]: sample.value for sample in found["medplum_agent_channel_dead_letters"].samples}
    assert channel == {"ADT": 2.0, "LAB": 0.0}
    assert found["medplum_agent_server_connected"].samples[0].value == 1
    assert found["medplum_agent_channel_messages"].type == "counter"
    assert PATIENT not in text and "DEAD-0" not in text


def test_health_over_http(web):
    assert http_get(web.ports["page"], "/healthz")[:2] == (200, "well")
    assert http_get(web.ports["page"], "/nothing")[0] == 404


def test_a_port_that_is_taken_is_a_problem_for_monitors(tmp_path):
    (port,) = free_ports(1)
    with site(tmp_path, CHANNELS, config=f"statusAddress = '127.0.0.1:{port}'", start=False) as here:
        with socket.create_server(("", here.ports["LAB"]), family=socket.AF_INET6, dualstack_ipv6=True):
            here.agent.start(ready=False)
            here.agent.wait_connected()
            eventually(lambda: "LAB" in (found := http_get(port, "/healthz"))[1] and found[0] == 503)
            assert command(here, "status").returncode == 2
            assert "PROBLEM  port" in command(here, "status").stdout
        eventually(lambda: http_get(port, "/healthz")[0] == 200, timeout=30)


def test_a_page_whose_port_is_taken_opens_once_it_is_free(tmp_path):
    (port,) = free_ports(1)
    with site(tmp_path, CHANNELS, env={"MEDPLUM_STATUS_ADDRESS": f"127.0.0.1:{port}"}, start=False) as here:
        with socket.create_server(("127.0.0.1", port)):
            here.agent.start()
            eventually(lambda: status(here)["pageTrouble"])
        eventually(lambda: not status(here)["pageTrouble"])
        assert http_get(port, "/healthz")[0] == 200


def test_strangers_cannot_keep_the_agent_from_its_user(web):
    with contextlib.ExitStack() as stack:
        for _ in range(medplum_agent.WEB_GUESTS + 10):
            stack.enter_context(socket.create_connection(("127.0.0.1", web.ports["page"]), 5))
        assert command(web, "health").returncode == 0
        assert command(web, "status").returncode == 0


def test_strangers_cannot_fill_the_memory(web):
    with socket.create_connection(("127.0.0.1", web.ports["page"]), 5) as stranger:
        stranger.sendall(b"POST /ask HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 60000000\r\n\r\n")
        with pytest.raises(OSError):  # long before all of it was sent
            for _ in range(60):
                stranger.sendall(bytes(1_000_000))


def test_head_is_answered_without_a_body(web):
    code, text, headers = http_get(web.ports["page"], "/healthz", "HEAD")
    assert (code, text, headers["Content-Length"]) == (200, "", "4")


def test_who_has_no_token_sees_nothing(web):
    for path, method in (("/events", "GET"), ("/ask", "POST")):
        assert http_get(web.ports["page"], path, method)[0] == 401
        assert http_get(web.ports["page"], path, method, Authorization="Bearer xyz")[0] == 401
    code, text, _ = http_get(
        web.ports["page"], "/ask", "POST", b'{"command":"status"}', Authorization=f"Bearer {token_of(web)}"
    )
    assert code == 200 and json.loads(text)["version"].startswith(medplum_agent.__version__)
    assert http_get(web.ports["page"], "/", Host="evil.example:80")[0] == 421
    assert token_of(web) in web.agent.output() and token_of(web) not in web.agent.main_log().decode()


def test_the_page_allows_only_its_own_script(web):
    code, text, headers = http_get(web.ports["page"], "/")
    assert code == 200 and "<script>" in text
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and policy.count("'sha256-") == 2 and "unsafe" not in policy
    assert "http://" not in text.replace("http://www.w3.org/", "") or "src=" not in text


def test_events_come_by_themselves(web):
    connection = http.client.HTTPConnection("127.0.0.1", web.ports["page"], timeout=10)
    connection.request("GET", "/events", headers={"Authorization": f"Bearer {token_of(web)}"})
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "text/event-stream"
    events: list[Any] = []
    while len(events) < 2:
        line = answer.readline()
        if line.startswith(b"data: "):
            events.append(json.loads(line[6:]))
    assert events[0]["channels"][0]["name"] == "ADT" and events[1]["now"] > events[0]["now"]
    assert any("started" in entry["msg"] for entry in events[0]["log"])
    answer.close()
    connection.close()


@pytest.mark.parametrize("request_bytes", [
    b"garbage\r\n\r\n", b"GET //[ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
    b"POST /ask HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999\r\n\r\nx",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
])  # fmt: skip
def test_a_strange_request_ends_its_connection_only(web, request_bytes):
    with socket.create_connection(("127.0.0.1", web.ports["page"]), 5) as strange:
        strange.sendall(request_bytes)
        strange.shutdown(socket.SHUT_WR)
        strange.settimeout(15)
        while strange.recv(65536):
            pass
    assert http_get(web.ports["page"], "/healthz")[0] == 200


# --- the cloud ---


def cloud(here: Site, **asked: Any) -> tuple[int, Any]:
    answer = here.sandbox.ask(
        "agent:transmit:request", remote="agent://", contentType="application/json", body=json.dumps(asked)
    )
    return answer.get("statusCode", 200), json.loads(answer["body"])


def test_the_cloud_asks_the_agent_itself(here):
    dead_letters(here, 1)
    code, found = cloud(here, command="status")
    assert code == 200 and found["channels"][0]["dead"] == 1
    code, found = cloud(here, command="queue", verb="list", what="dead")
    (row,) = found["messages"]
    assert row["state"] == "rejected" and not found["more"]
    code, refused = cloud(here, command="queue", verb="show", id=row["id"], payload=True)
    assert code == 400 and "remotePayload" in refused["error"]
    assert cloud(here, command="queue", verb="find", controlId="DEAD-0")[1]["messages"][0]["id"] == row["id"]
    code, found = cloud(here, command="bundle")
    assert code == 200 and found["status"]["channels"] and found["log"] and found["doctor"]["checks"]
    assert "secret" not in json.dumps(found["settings"]).lower() and PATIENT not in json.dumps(found)
    assert cloud(here, command="queue", verb="retry", ids=[row["id"]]) == (200, {"count": 1})
    here.agent.wait_state("DEAD-0", "processed")
    code, refused = cloud(here, command="format-disk")
    assert code == 400 and "unknown" in refused["error"]
    assert cloud(here, command="queue", verb="list", since="yesterday")[0] == 400


def test_the_cloud_sees_what_a_reload_would_change(here):
    assert cloud(here, command="validate")[1] == {"problems": [], "warnings": [], "changes": []}
    here.endpoint("LAB")["address"] += "&maxWorkers=2"
    assert "channel 'LAB' changes" in cloud(here, command="validate")[1]["changes"][0]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        here.endpoint("LAB")["address"] = f"mllp://127.0.0.1:{taken.getsockname()[1]}"
        assert "channel 'LAB': port" in cloud(here, command="validate")[1]["problems"][0]
    here.endpoint("LAB")["address"] = "mllp://0.0.0.0"
    found = command(here, "validate")
    assert found.returncode == 1 and "ERROR: " in found.stdout and "needs a port" in found.stdout


# --- alarms ---


def alarms(here: Site) -> list[str]:
    return [alarm["kind"] for alarm in status(here)["alarms"]]


def test_an_incident_is_told_twice_over_restarts(tmp_path):
    told, script = tmp_path / "told.txt", tmp_path / "tell.py"
    script.write_text("import sys; open(sys.argv[1], 'a').write(sys.stdin.read())")
    config = f"alarmTo = '{sys.executable} {script} {told}'"
    with site(tmp_path, {"ADT": "?enhanced=true&alarmAgeSecs=1"}, config=config, start=False) as here:
        changed(here.agent, OFTEN)
        here.agent.start()
        here.sandbox.stop()
        with here.device("ADT") as device:
            assert device.ask(message("OLD", patient=PATIENT))[0] == "CA"
        eventually(lambda: "age" in alarms(here), timeout=30)
        for _ in range(2):
            here.agent.terminate()
            here.agent.start(ready=False)
            eventually(lambda: status(here) and "age" in alarms(here), timeout=30)
        assert command(here, "status").returncode == 1
        here.sandbox.start()
        here.agent.wait_state("OLD", "processed", timeout=30)
        eventually(lambda: "age" not in alarms(here), timeout=30)
        eventually(lambda: told.exists() and "OVER" in told.read_text())
        lines = told.read_text().splitlines()
        about = [line for line in lines if "ADT" in line]
        assert [line.split(":")[0] for line in about] == ["ALARM", "OVER"], lines
        log = here.agent.main_log().decode()
        assert log.count("\"Alarm: channel 'ADT'") == 1 and PATIENT not in "".join(lines) + log


def test_alarms_wait_for_a_target_that_fails_and_keep_their_order(tmp_path):
    told, script = tmp_path / "told.txt", tmp_path / "tell.py"
    script.write_text("import sys; open(sys.argv[1], 'a').write(sys.stdin.read())")
    (told / "in the way").mkdir(parents=True)
    config = f"alarmTo = '{sys.executable} {script} {told} SECRET'"
    with site(tmp_path, CHANNELS, ONCE, config=config, start=False) as here:
        changed(here.agent, OFTEN)
        here.agent.start()
        dead_letters(here, 1)
        eventually(lambda: alarms(here) == ["dead"])
        here.agent.kill()
        here.agent.start()
        assert command(here, "queue", "discard", "--channel", "ADT").returncode == 0
        eventually(lambda: alarms(here) == [])
        shutil.rmtree(told)
        eventually(lambda: told.exists() and "OVER" in told.read_text(), timeout=30)
        assert [line.split(":")[0] for line in told.read_text().splitlines()] == ["ALARM", "OVER"]
        doctor = command(here, "doctor", "--config", str(here.agent.state_dir.parent / "agent.toml"))
        assert "SECRET" not in doctor.stdout + json.dumps(cloud(here, command="bundle"))


def test_an_alarm_that_is_being_told_at_a_stop_is_told_once(tmp_path):
    told, script = tmp_path / "told.txt", tmp_path / "tell.py"
    script.write_text("import sys, time; open(sys.argv[1], 'a').write(sys.stdin.read()); time.sleep(1)")
    with site(tmp_path, CHANNELS, ONCE, config=f"alarmTo = '{sys.executable} {script} {told}'", start=False) as here:
        changed(here.agent, OFTEN)
        here.agent.start()
        dead_letters(here, 1)
        eventually(lambda: told.exists() and told.read_text())
        here.agent.terminate()
        here.agent.start()
        assert command(here, "queue", "discard", "--channel", "ADT").returncode == 0
        eventually(lambda: "OVER" in told.read_text(), timeout=30)
        assert [line.split(":")[0] for line in told.read_text().splitlines()] == ["ALARM", "OVER"]


def test_what_cannot_be_told_is_not_over(tmp_path):
    """A restart while the server is away: whether clock and token are right is not known."""
    with site(tmp_path, CHANNELS, start=False) as here:
        changed(here.agent, OFTEN)
        here.agent.start()
        here.agent.kill()
        here.sandbox.stop()
        raised = [[kind, "", True, f"{kind} is wrong", False, 1] for kind in ("clock", "token", "queue")]
        saved = json.dumps({"alarms": raised, "last": {}})
        (here.agent.state_dir / "medplum-agent-alarms.json").write_text(saved)
        here.agent.start(ready=False)
        eventually(lambda: b"queue is wrong" in here.agent.main_log(), timeout=30)  # that one is known to be over
        assert sorted(alarms(here)) == ["clock", "token"]
        here.sandbox.start()
        eventually(lambda: "token" not in alarms(here), timeout=30)


def test_a_queue_that_cannot_be_used_is_an_alarm(watched):
    for name in ("", "-wal"):
        path = watched.agent.queue_path.with_name(watched.agent.queue_path.name + name)
        path.rename(path.with_name(f"gone{name}"))
        path.write_bytes(b"garbage" * 10_000)
    with watched.device("ADT") as device:
        assert device.ask(message("REFUSED"))[0] == "CE"
    eventually(lambda: "queue" in alarms(watched), timeout=30)
    found = command(watched, "status")
    assert found.returncode == 2 and "the queue file of the agent" in found.stdout, found.stdout + found.stderr


def test_a_log_that_cannot_be_written_is_an_alarm(watched):
    folder = watched.agent.state_dir

    def alarmed(wanted: bool) -> bool:
        with watched.device("ADT") as device:  # so that there is something to write
            device.ask(message(f"LOGGED-{time.monotonic_ns()}"))
        return ("log" in alarms(watched)) is wanted

    assert alarmed(False)
    (path,) = eventually(lambda: list(folder.glob("medplum-agent-channels-*.log")), 10, "its log")
    path.rename(kept := path.with_name("kept"))
    path.mkdir()  # in its way
    eventually(lambda: alarmed(True), 30, "the alarm")
    path.rmdir()
    kept.rename(path)
    eventually(lambda: alarmed(False), 30, "its end")


def test_a_full_disk_is_no_healthy_queue(tmp_path):
    with site(tmp_path, CHANNELS, start=False) as here:
        changed(here.agent, "m.is_low = lambda folder: True")
        here.agent.start()
        with here.device("ADT") as device:
            eventually(lambda: device.ask(message("FULL"))[0] == "CE")
        store = status(here)["store"]
        assert not store["healthy"] and "full" in store["trouble"]


def test_monitors_hear_what_they_understand(tmp_path):
    """JSON where it was asked for, and 3 for what cannot be known, wherever the options stand."""
    line = [*AgentProcess.COMMAND, "--state-dir", str(tmp_path), "status", "--json"]
    gone = subprocess.run(line, capture_output=True, text=True, timeout=10)
    assert gone.returncode == 2 and json.loads(gone.stdout)["state"] == 2, gone
    line = [*AgentProcess.COMMAND, "--config", str(tmp_path / "bad.toml"), "status"]
    (tmp_path / "bad.toml").write_text("x")
    assert subprocess.run(line, capture_output=True, timeout=10).returncode == 3


def test_status_as_a_monitor_sees_it(here):
    assert command(here, "status", "--bogus").returncode == command(here, "status", "extra").returncode == 3
    assert here.agent.process is not None
    here.agent.process.send_signal(signal.SIGSTOP)
    try:
        found = command(here, "status")
        assert found.returncode == 2 and "does not answer" in found.stdout
    finally:
        here.agent.process.send_signal(signal.SIGCONT)


def test_an_alarm_goes_to_syslog_over_tls(tmp_path):
    """RFC 5425: octet counting; RFC 5424: PRI, version, time, host, program, process, kind, no data, BOM and text."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    with socket.create_server(("localhost", 0)) as listener:
        listener.settimeout(30)
        target = f"syslog+tls://localhost:{listener.getsockname()[1]}"
        config = f"alarmTo = '{target}'\ncaFile = '{tmp_path / 'ca.pem'}'"
        with site(tmp_path, CHANNELS, ONCE, config=config, start=False) as here:
            changed(here.agent, OFTEN)
            here.agent.start()
            dead_letters(here, 1)
            accepted, _ = listener.accept()
            with context.wrap_socket(accepted, server_side=True) as syslog:
                raw = b"".join(iter(lambda: syslog.recv(4096), b""))
    size, _, text = raw.partition(b" ")
    assert len(text) == int(size)
    form = rb"<132>1 \d{4}-\d\d-\d\dT[0-9:.]+Z \S+ medplum-agent \d+ alarm - \xef\xbb\xbfALARM: (.*)"
    found = re.fullmatch(form, text)
    assert found and found[1].startswith(b"channel 'ADT' has 1 dead"), text


def test_dead_letters_are_an_alarm_until_somebody_decides(watched):
    dead_letters(watched, 1)
    eventually(lambda: "dead" in alarms(watched))
    assert ask(watched, command="queue", verb="retry") == {"count": 1}
    watched.agent.wait_state("DEAD-0", "processed")
    eventually(lambda: alarms(watched) == [])


@pytest.mark.parametrize(
    ("text", "day", "clock", "inside"),
    [
        ("", 0, "03:00", True),
        ("Mo-Fr 07:00-19:00", 0, "07:00", True),
        ("Mo-Fr 07:00-19:00", 0, "19:00", False),
        ("Mo-Fr 07:00-19:00", 5, "12:00", False),
        ("Sa-Mo 08:00-12:00", 6, "08:00", True),
        ("Mo 00:00-24:00,07:00-08:00", 3, "07:30", True),
    ],
)
def test_hours_when_silence_counts(monkeypatch, text, day, clock, inside):
    real = datetime.datetime
    hour, minute = map(int, clock.split(":"))

    class Now(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return real(2026, 11, 23 + day, hour, minute)  # the 23rd is a Monday

    monkeypatch.setattr(datetime, "datetime", Now)
    settings = medplum_agent.Hl7Settings(expectEverySecs=60, expectHours=text)
    found = medplum_agent.expected_secs(settings, 1e9)
    assert (found is not None) == inside
    if found is not None and text:
        assert found < 86_400  # silence before the hours does not count


@pytest.mark.parametrize(
    ("text", "clock", "hours"),
    [("22:00-24:00,00:00-06:00", "05:00", 7), ("06:00-12:00,12:00-18:00", "13:00", 7), ("08:00-12:00", "09:00", 1)],
)
def test_hours_that_adjoin_are_one(monkeypatch, text, clock, hours):
    class Now(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            hour, minute = map(int, clock.split(":"))
            return cls(2026, 11, 25, hour, minute)

    monkeypatch.setattr(datetime, "datetime", Now)
    settings = medplum_agent.Hl7Settings(expectEverySecs=60, expectHours=text)
    assert medplum_agent.expected_secs(settings, 1e9) == hours * 3600


@pytest.mark.parametrize("text", ["Mo", "07:00", "Mo-Xx 07:00-08:00", "22:00-06:00", "07:00-07:00", "Mo 7-8"])
def test_hours_that_mean_nothing_are_refused(text):
    with pytest.raises(ValueError, match="needs the form"):
        medplum_agent.opening_hours(text)


def test_a_channel_that_falls_silent_is_an_alarm_until_something_comes(tmp_path):
    with site(tmp_path, {"ADT": "?enhanced=true&expectEverySecs=1"}, start=False) as here:
        changed(here.agent, OFTEN)
        here.agent.start()
        eventually(lambda: "silent" in alarms(here), timeout=30)
        here.agent.kill()
        here.agent.start()
        assert "silent" in alarms(here)  # nothing came since
        with here.device("ADT") as device:
            until = time.monotonic() + 30
            while "silent" in alarms(here):
                assert device.ask(message(f"N-{time.monotonic_ns()}"))[0] in ("CA", "AA") and time.monotonic() < until
        log = here.agent.main_log()
        assert log.count(b"\"Alarm: channel 'ADT' has been silent") == 1 and log.count(b'"Alarm over after') == 1


def test_the_socket_is_found_by_a_relative_path_as_well(tmp_path):
    """What decides between socket and door is the whole path, for the agent and for who asks it."""
    folder = tmp_path / ("y" * 60)
    folder.mkdir()
    with site(folder, CHANNELS, start=False) as here:
        here.agent._options = ["--state-dir", "state"]
        here.agent.start(ready=False)
        here.agent.wait_connected()
        asked = [*AgentProcess.COMMAND, "status", "--state-dir"]
        for path, cwd in (("state", folder), (str(folder / "state"), tmp_path)):
            done = subprocess.run([*asked, path], capture_output=True, text=True, timeout=30, cwd=cwd)
            assert done.returncode == 0, done.stdout + done.stderr
