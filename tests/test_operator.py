"""The people: who installs it, sets it up with mistakes, is woken up at night, and tries things."""

import asyncio
import os
import signal
import socket
import subprocess
import unittest.mock
from collections.abc import Sequence

import pytest
from demo import Demo, sandbox_resources, typed

import medplum_agent
from tests.support import AGENT_ID, AgentProcess, Site, bot, message, setting, site

Environment = dict[str, str]
NAMES = ("MEDPLUM_BASE_URL", "MEDPLUM_CLIENT_ID", "MEDPLUM_CLIENT_SECRET", "MEDPLUM_AGENT_ID")


def run(here: Site, *arguments: str, before: Sequence[str] = (), **environment: str) -> tuple[int, str]:
    """Exit code, and what a command prints that asks about the site's agent."""
    command = [*before, *AgentProcess.COMMAND, *arguments, "--state-dir", str(here.agent.state_dir)]
    out = subprocess.PIPE
    done = subprocess.run(
        [os.fsencode(part) for part in command], stdout=out, stderr=subprocess.STDOUT, text=True, timeout=40,
        env=os.environ | environment,
    )  # fmt: skip
    return done.returncode, done.stdout


def resources(address: str) -> tuple[medplum_agent.Json, dict[str, medplum_agent.Json | medplum_agent.AgentError]]:
    found = dict(sandbox_resources(AGENT_ID, {"A": address}))
    return found.pop(f"Agent/{AGENT_ID}"), {**found}


def test_a_ctrl_c_that_comes_with_an_analyzers_bytes_is_not_lost():
    """The demo's analyzer went on, heard the agent close its line, and said that the demo broke off."""

    async def cancelled_after(turns: int) -> bool:
        reader = asyncio.StreamReader()
        analyzer = asyncio.create_task(Demo.__new__(Demo)._sessions(reader, unittest.mock.Mock()))
        for _ in range(5):
            await asyncio.sleep(0)
        reader.feed_data(b"\x06")
        for _ in range(turns):
            await asyncio.sleep(0)
        analyzer.cancel()
        reader.feed_eof()
        await asyncio.wait({analyzer})
        return analyzer.cancelled()

    assert [asyncio.run(cancelled_after(turns)) for turns in range(5)] == [True] * 5


# --- what is set up with mistakes in it ---


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("mllp://0.0.0.0:56000&enhanced=true", "needs a port from 1 to 65535, as in mllp://0.0.0.0:56000?name=value"),
        ("mllp://::1:56000", "needs a port"),
        ("tcp://0.0.0.0:57000?mode=lis", "give both, or mode=astm"),
        ("tcp://0.0.0.0:57000?startChar=0x02&endChar=%03", "startChar '0x02': would be these very characters"),
        ("tcp://0.0.0.0:57000?startChar=%02&endChar=%253", "endChar '%3': would be these very characters"),
        ("tcps://0.0.0.0:57000?mode=astm", "TLS needs certFile"),  # it listened in clear text
    ],
)
def test_an_address_that_cannot_be_meant_is_refused_with_the_reason(address, words):
    plan, problems = medplum_agent.build_plan(*resources(address))
    assert words in problems[0] and not plan.channels


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("mllp://0.0.0.0:56000#enhanced=true", "'enhanced=true' in the address is ignored: parameters begin with ?"),
        ("mllp://0.0.0.0:56000/enhanced=true", "'enhanced=true' in the address is ignored"),
        ("mllp://0.0.0.0:56000?enhanced=true&enhanced=aa", "several values: the first, 'true', counts"),
        ("mllp://0.0.0.0:56000?Enhanced=true", "unknown parameter 'Enhanced' is ignored (did you mean enhanced?)"),
        ("dicom://0.0.0.0:104?calledAETitle=X", "did you mean calledAeTitle?"),
        (
            "tcp://0.0.0.0:57000?mode=lis&startChar=%02&endChar=%03",
            "mode 'lis' must be one of raw, astm; it is ignored",
        ),
        ("mllp://0.0.0.0:56000?mode=astm", "(it belongs to Byte-stream and ASTM channels: parameters of a `tcp://`"),
        ("tcp://0.0.0.0:57000?mode=astm&autoRespond=0x05:0x06", "write %02 for the byte 0x02; it is ignored"),
    ],
)
def test_what_an_address_says_in_vain_is_said(address, words):
    (warning,) = medplum_agent.build_plan(*resources(address))[0].warnings
    assert words in warning


def test_settings_of_the_agent_that_do_nothing_are_said_and_stop_nothing(tmp_path):
    settings = [
        setting("channelMaxWorker", 3), setting("keepalive", True), setting("strictConfigValidation", True),
        setting("alarmAgeSecs", 5), setting("alarmAgeSecs", 50), setting("pushTargets", "10.0.0.1"),
    ]  # fmt: skip
    with site(tmp_path, {"ADT": ""}, settings) as here:
        said = "unknown setting 'channelMaxWorker' is ignored (did you mean channelMaxWorkers?)"
        for words in (
            said,
            "(did you mean keepAlive?)",
            "'pushTargets' is ignored (it belongs to Process: argument",
            "setting alarmAgeSecs stands there 2 times: the first counts",
        ):
            here.agent.logged(words)
        code, printed = run(here, "validate")
        assert code == 0 and f"WARN: {said}" in printed
        del here.sandbox.resource(f"Agent/{AGENT_ID}")["channel"]
        assert here.sandbox.reload()["statusCode"] == 200
        here.agent.logged("the Agent has no channel")


# --- what is typed ---


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("stauts", "'stauts' is no command (did you mean status?)"),
        ("queue shwo 3", "'queue shwo 3' is not understood: queue needs one of"),
        ("queue list --kind dead", "--kind is an option of queue export, replay only"),  # it listed what waits
        ("queue discard --channel ADT --limit 1", "--limit is an option of queue list only"),  # it gave up all
        ("status --channel ADT", "--channel is an option of queue only"),
        ("validate --json", "--json is an option of"),
        ("http://127.0.0.1:1/ id my secret agent-1 INFO", "6 values are too many"),
        ("http://127.0.0.1:1/ id secret agent-1 --once", "--once is an option of demo only; nothing was done"),
        ("demo --once more", "'demo --once more' is not understood"),
    ],
)
def test_what_a_command_does_not_know_is_refused(tmp_path, capsys, monkeypatch, typed, words):
    monkeypatch.chdir(tmp_path)
    assert medplum_agent.main(typed.split()) in (1, 3)
    assert words.replace("--once more", "more") in capsys.readouterr().err


def test_spaces_and_line_ends_around_the_four_values_are_not_part_of_them(tmp_path, monkeypatch):
    """As they come from a page, a file or a script: the login was refused, or the path of the server was wrong."""
    monkeypatch.chdir(tmp_path)
    given = [" http://127.0.0.1:1/\n", "id\r\n", "\tsecret ", "agent-1\n"]
    for arguments, environment in ((given, Environment()), ([], dict(zip(NAMES, given, strict=True)))):
        found = medplum_agent.resolve_process(arguments, {}, environment, None).settings
        assert [found.baseUrl, found.clientId, found.clientSecret, found.agentId] == [text.strip() for text in given]


def test_what_is_typed_in_another_encoding_is_an_error_with_words(tmp_path):
    """It was a traceback, also in a terminal that has no UTF-8."""
    with site(tmp_path, {"ADT": "?enhanced=true"}) as here:
        # an executable reads its arguments as UTF-8 wherever it runs
        for argument in ("\udcdc", *([] if os.environ.get("MEDPLUM_AGENT_BINARY") else ["Ü"])):
            code, printed = run(here, "queue", "find", argument, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
            assert code == 1 and "is no text in the encoding of this terminal" in printed and "Trace" not in printed


def test_a_number_that_is_no_dead_letters_is_said(tmp_path):
    with site(tmp_path, {"ADT": "?enhanced=true"}) as here, here.device("ADT") as device:
        device.ask(message("M1"))
        code, printed = run(here, "queue", "retry", "1", "77")
        assert code == 1 and "asked for: 1, 77. See queue show" in printed


# --- what happens at night ---


def test_ctrl_c_ends_doctor_while_the_server_says_nothing(tmp_path):
    """Its threads waited for the network as long as that took."""
    with socket.create_server(("127.0.0.1", 0)) as hole:
        url = f"http://127.0.0.1:{hole.getsockname()[1]}/"
        command = [*AgentProcess.COMMAND, "doctor", url, "id", "secret", "agent-1", "--state-dir", str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as doctor:
            try:
                hole.settimeout(20)
                lines = [hole.accept()[0] for _ in range(2)]  # the first looks whether there is something
                doctor.send_signal(signal.SIGINT)
                printed, _ = doctor.communicate(timeout=5)
            finally:
                doctor.kill()
            assert (doctor.returncode, printed) == (130, "")
            for line in lines:
                line.close()


def test_doctor_says_what_it_can_to_another_user(tmp_path):
    """It said that the queue cannot be read, and nothing else."""
    if os.geteuid():
        pytest.skip("NOT ROOT: what another user hears was not checked")
    with site(tmp_path, {"ADT": ""}) as here:
        os.chown(here.agent.state_dir, 1000, 1000)
        (here.agent.state_dir).chmod(0o700)
        values = [here.sandbox.url, "sandbox-client", "sandbox-secret", AGENT_ID]
        code, printed = run(here, "doctor", *values, before=["setpriv", "--bounding-set=-all"])
        os.chown(here.agent.state_dir, 0, 0)
    assert code == 2 and "login: clientId and clientSecret are accepted" in printed
    assert "Ask as the agent's user, or use sudo" in printed


@pytest.mark.parametrize("query", ["", "?enhanced=true"])
def test_a_channel_that_the_server_does_not_know_is_said_at_once(tmp_path, query):
    """The server's error names neither message nor channel: each message waited for a minute, for no reason given."""
    with (
        site(tmp_path, {"ADT": query, "OTHER": query}) as here,
        here.device("ADT") as device,
        here.device("OTHER") as other,
    ):
        channel = here.sandbox.resource(f"Agent/{AGENT_ID}")["channel"][0]
        channel["name"] = "renamed"
        assert device.ask(message("M1")) == ("CA" if query else "AE", "M1")
        here.agent.logged("the Agent on the server has no channel of this name: add it there, or call $reload-config")
        assert other.ask(message("M2"))[0] == ("CA" if query else "AA")
        channel["name"] = "ADT"
        assert device.ack() == ("AA", "M1") if query else device.ask(message("M3")) == ("AA", "M3")


def test_an_answer_that_the_mode_holds_back_is_not_said_to_be_with_the_device(tmp_path):
    with site(tmp_path, {"ADT": "?enhanced=true&appLevelAck=NE"}) as here, here.device("ADT") as device:
        assert device.ask(message("M1")) == ("CA", "M1")
        here.agent.wait_state("M1", "processed")
        code, printed = run(here, "queue", "find", "M1")
        assert code == 0 and "answered with status 200; the device has what its mode lets through" in printed


def test_send_says_why_a_message_was_not_taken(tmp_path):
    (tmp_path / "M1.hl7").write_text(message("M1"))
    with site(tmp_path, {"ADT": ""}) as here:
        here.sandbox.bot = bot("AE", "the bed is takén")
        command = [*AgentProcess.COMMAND, "send", f"127.0.0.1:{here.ports['ADT']}", str(tmp_path / "M1.hl7")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and done.stdout.strip().endswith(": the bed is takén")


def test_the_command_that_the_demo_names_can_be_typed(tmp_path):
    """It was a file that cannot be executed."""
    command, state = [*AgentProcess.COMMAND, "demo", "--state-dir", str(tmp_path)], {"PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | state) as demo:
        try:
            assert demo.stdout is not None
            line = next(line for line in demo.stdout if " status --state-dir " in line)
            done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=20)
            assert done.returncode == 0 and "Agent/demo-agent" in done.stdout
        finally:
            demo.terminate()
            demo.communicate()


@pytest.mark.parametrize("options", [[], ["--once"]])
def test_a_demo_that_nobody_reads_ends(tmp_path, options):
    """As behind `| head`: it said that the agent had closed a connection."""
    command, pipe = [*AgentProcess.COMMAND, "demo", *options, "--state-dir", str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as demo:
        assert demo.stdout is not None and demo.stderr is not None
        demo.stdout.readline()
        demo.stdout.close()
        said = demo.stderr.read()
        assert demo.wait(20) == 0
    assert "The demo ends: Broken pipe." in said and "broke off" not in said and "Traceback" not in said


def test_the_command_that_the_demo_names_is_one_for_this_shell():
    """In single quotes, which cmd does not know, was every path of Windows."""
    assert typed(r"C:\Program Files\x.exe", "status", r"C:\s", windows=True) == r'"C:\Program Files\x.exe" status C:\s'
    assert typed("/opt/my agent/x", "status", windows=False) == "'/opt/my agent/x' status"


@pytest.mark.parametrize("query", ["?maxWorkers=5", "?enhanced=aa&retryMode=normal&maxWorkers=5"])
def test_what_is_with_its_bot_is_not_refused_for_a_channel_that_was_renamed_since(tmp_path, query):
    """All that was in flight was: its device heard AE, or it was a dead letter, and the Bot had done its work."""
    with (
        site(tmp_path, {"ADT": query}) as here,
        here.device("ADT") as device,
        here.device("ADT") as other,
        here.device("ADT") as third,
    ):
        delays = iter([True])
        here.sandbox.faults.delay = lambda: 2.0 if next(delays, False) else 0.0
        device.send(message("M1", "P1"))
        here.sandbox.wait_ids("M1")
        here.sandbox.resource(f"Agent/{AGENT_ID}")["channel"][0]["name"] = "renamed"
        other.send(message("M2", "P2"))
        third.send(message("M3", "P3"))
        here.agent.wait_state("M2", "rejected")
        here.agent.wait_state("M3", "rejected")
        assert device.ack() == ("AA", "M1")
        here.agent.wait_state("M1", "processed")
