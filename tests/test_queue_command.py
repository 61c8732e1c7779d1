"""The command `queue`: what a person sees of the queue file, beside a running agent and without one."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import AGENT_ID, AgentProcess, Site, eventually, log_lines, message, setting, site

ONCE = [setting("channelAutoRetryMaxAttempts", 1), setting("channelAutoRetryBaseDelayMs", 20)]
PATIENT = "P-4711"
CHANNELS = {
    "ENH": "?enhanced=true",
    "LAB": "?enhanced=true",
    "FREE": "?enhanced=true&duplicateBehavior=accept",
    "ONCE": "?enhanced=true&retryMode=none",
}


def queue(here: Site, *arguments: str, state: Path | None = None) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    command = [*AgentProcess.COMMAND, "queue", *arguments, "--state-dir", str(state or here.agent.state_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.returncode, done.stdout, done.stderr


def shown(here: Site, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in queue(here, *arguments, "--json")[1].splitlines()]


@pytest.fixture
def here(tmp_path):
    with site(tmp_path, CHANNELS, start=False) as running:
        running.sandbox.resource(f"Agent/{AGENT_ID}")["setting"] = ONCE
        running.agent.start()
        yield running


def test_each_kind_is_listed_with_its_reason(here):
    here.sandbox.bot = lambda transmit: (400, "no")
    with here.device("ENH") as device, here.device("LAB") as lab:
        assert device.ask(message("DEAD-1", patient=PATIENT))[0] == "CA"
        eventually(lambda: shown(here, "list", "dead"))
        here.sandbox.stop()
        assert device.ask(message("WAIT-1"))[0] == "CA" and lab.ask(message("WAIT-2"))[0] == "CA"
        (dead,) = shown(here, "list", "dead")
        assert queue(here, "list dead") == queue(here, "list", "dead"), "as one word: it ended with an IndexError"
        assert (dead["channel"], dead["state"], dead["statusCode"]) == ("ENH", "rejected", 400)
        assert "refused" in dead["reason"] and dead["attempts"] == 1
        assert [row["channel"] for row in shown(here, "list")] == ["ENH", "LAB"]
        assert [row["channel"] for row in shown(here, "list", "--channel", "LAB")] == ["LAB"]
        code, text, more = queue(here, "list", "--limit", "1")
        assert code == 0 and text.count("Message ") == 1 and "waiting" in text and "--limit" in more
        code, text, more = queue(here, "list", "undelivered")
        assert (code, text.strip()) == (0, "") and "nothing" in more
        here.sandbox.start()


def test_what_became_of_a_message(here):
    with here.device("ENH") as device:
        assert device.ask(message("FIND-1", patient=PATIENT))[0] == "CA"
        assert device.ack()[0] == "AA"
        eventually(lambda: shown(here, "find", "FIND-1")[0]["state"] == "processed")
        code, text, _ = queue(here, "find", "FIND-1")
        steps = text.splitlines()
        assert code == 0 and len(steps) == 4, text
        assert "received" in steps[1] and "sent, try 1" in steps[2] and "status 200" in steps[3]
        number = shown(here, "find", "FIND-1")[0]["id"]
        assert queue(here, "show", str(number))[1] == text
        for asked in (("find", "NEVER"), ("show", "999999"), ("show", "9" * 30)):
            assert queue(here, *asked)[0] == 1


def test_patient_data_is_shown_when_asked_for_and_the_look_is_written_down(here):
    with here.device("ENH") as device:
        assert device.ask(message("LOOK-1", patient=PATIENT))[0] == "CA"
        assert device.ack()[0] == "AA"
        number = str(shown(here, "find", "LOOK-1")[0]["id"])
        audit = here.agent.state_dir / "medplum-agent-audit.log"
        for plain in (("show", number), ("show", number, "--json"), ("list",), ("list", "dead", "--payload")):
            assert PATIENT not in "".join(map(str, queue(here, *plain))), plain
        assert not audit.exists()
        assert PATIENT in queue(here, "show", number, "--payload")[1]
        assert PATIENT in shown(here, "show", number, "--payload")[0]["payload"]
        entry, _ = log_lines(audit.read_bytes())
        assert entry["look"] == f"payload of message {number}" and entry["timestamp"].endswith("Z")
        assert entry["user"] == (f"uid {os.getuid()}" if os.getuid() else os.environ.get("SUDO_USER", "uid 0"))
        assert audit.stat().st_mode & 0o777 == 0o600
        audit.unlink()
        audit.mkdir()
        code, text, said = queue(here, "show", number, "--payload")
        assert code == 1 and PATIENT not in text and "audit" in said


def test_without_an_agent_nothing_comes_into_being_beside_the_file(here):
    with here.device("ENH") as device:
        assert device.ask(message("REST-1"))[0] == "CA"
        assert device.ack()[0] == "AA"
    here.agent.terminate()
    before = sorted(here.agent.state_dir.iterdir())
    assert queue(here, "find", "REST-1")[0] == 0
    assert sorted(here.agent.state_dir.iterdir()) == before


def test_after_a_kill_what_is_in_the_log_of_the_file_counts(here):
    here.sandbox.stop()
    with here.device("ENH") as device:
        assert device.ask(message("KILL-1"))[0] == "CA"
    here.agent.kill()
    assert [row["state"] for row in shown(here, "find", "KILL-1")] == ["queued"]


@pytest.mark.parametrize(
    "arguments", [(), ("list", "everything"), ("find",), ("show", "x"), ("drop", "1"), ("show", "1", "2")]
)
def test_what_is_not_understood_is_said(tmp_path, arguments):
    command = [*AgentProcess.COMMAND, "queue", *arguments, "--state-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and "list" in done.stderr and "find CONTROL_ID" in done.stderr


def test_no_queue_yet(tmp_path):
    command = [*AgentProcess.COMMAND, "queue", "list", "--state-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and "No such file" in done.stderr and not list(tmp_path.iterdir())


def test_every_message_of_a_control_id_is_found(here):
    """Also those that the index of repetitions does not hold."""
    with here.device("ENH") as device, here.device("FREE") as free:
        for line in (device, free, free):
            assert line.ask(message("TWICE-1"))[0] == "CA"
            assert line.ack()[0] == "AA"
        rows = shown(here, "find", "TWICE-1")
        assert [row["channel"] for row in rows] == ["ENH", "FREE", "FREE"]
        assert len(shown(here, "find", "--channel", "FREE", "TWICE-1")) == 2


def test_a_name_in_the_wrong_field_is_not_shown(here):
    with here.device("ENH") as device:
        assert device.ask(message("SHIFT-1", kind="ADT^A01^Doe^Paula"))[0] == "CA"
        assert device.ack()[0] == "AA"
        assert device.ask(message("SHIFT-2", kind="Doe^Paula"))[0] == "CA"
        eventually(lambda: len(shown(here, "find", "SHIFT-2")) == 1)
        assert [shown(here, "find", f"SHIFT-{n}")[0]["type"] for n in (1, 2)] == ["ADT^A01", ""]
        assert "Paula" not in queue(here, "find", "SHIFT-1")[1] + queue(here, "find", "SHIFT-2")[1]


def test_what_stands_beside_the_file_and_not_beside_a_link_counts(here, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / here.agent.queue_path.name).symlink_to(here.agent.queue_path)
    here.sandbox.stop()
    with here.device("ENH") as device:
        assert device.ask(message("LINK-1"))[0] == "CA"
        command = [*AgentProcess.COMMAND, "queue", "find", "LINK-1", "--state-dir", str(tmp_path / "linked")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0 and "waiting" in done.stdout, done
    here.sandbox.start()


def test_what_was_with_the_server_when_the_agent_was_killed(here):
    """It is a dead letter where it must not be sent twice, since it started again."""
    here.sandbox.faults.silent = True
    before = time.time() * 1000
    with here.device("ONCE") as device:
        assert device.ask(message("CUT-1"))[0] == "CA"
        here.sandbox.wait_for(lambda: here.sandbox.seen)
        eventually(lambda: "or with the server" in queue(here, "find", "CUT-1")[1])
    here.agent.kill()
    here.sandbox.faults.silent = False
    here.agent.start()
    eventually(lambda: shown(here, "list", "dead"))
    (dead,) = shown(here, "list", "dead")
    assert dead["errorCode"] == "interrupted" and dead["settledAt"] >= before


def test_output_that_ends_early_is_no_traceback(here):
    here.sandbox.stop()
    with here.device("ENH") as device:
        assert device.ask(message("PIPE-1"))[0] == "CA"
    command = [*AgentProcess.COMMAND, "queue", "list", "--state-dir", str(here.agent.state_dir)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=20)
    assert done.returncode == 1 and "No space" in done.stderr and "Traceback" not in done.stderr
    here.sandbox.start()


def test_options_may_stand_anywhere(here):
    assert queue(here, "list", "--json", "dead")[0] == queue(here, "--limit", "3", "list")[0] == 0
