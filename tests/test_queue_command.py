"""The command `queue`: what a person sees of the queue file, beside a running agent and without one."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support import AGENT_ID, AgentProcess, Site, eventually, log_lines, message, setting, site

ONCE = [setting("channelAutoRetryMaxAttempts", 1), setting("channelAutoRetryBaseDelayMs", 20)]
PATIENT = "P-4711"


def queue(here: Site, *arguments: str, state: Path | None = None) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    command = [*AgentProcess.COMMAND, "queue", *arguments, "--state-dir", str(state or here.agent.state_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.returncode, done.stdout, done.stderr


def shown(here: Site, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in queue(here, *arguments, "--json")[1].splitlines()]


@pytest.fixture
def here(tmp_path):
    with site(tmp_path, {"ENH": "?enhanced=true", "LAB": "?enhanced=true"}, start=False) as running:
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
        assert entry["look"] == f"payload of message {number}" and entry["user"] and entry["timestamp"].endswith("Z")
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


@pytest.mark.parametrize("arguments", [(), ("list", "everything"), ("find",), ("show", "x"), ("drop", "1")])
def test_what_is_not_understood_is_said(tmp_path, arguments):
    command = [*AgentProcess.COMMAND, "queue", *arguments, "--state-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and "list" in done.stderr and "find CONTROL_ID" in done.stderr


def test_no_queue_yet(tmp_path):
    command = [*AgentProcess.COMMAND, "queue", "list", "--state-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and "there is no queue" in done.stderr and not list(tmp_path.iterdir())
