"""Programs that others wrote: their messages arrive byte for byte, and they understand our acknowledgments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hl7.client import MLLPClient

from tests.support import acknowledgment, message, site


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    channels = {"A": "?duplicateBehavior=accept", "E": "?enhanced=true", "LATIN": "?encoding=latin1"}
    with site(tmp_path_factory.mktemp("peers"), channels) as running:
        yield running


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, timeout=60, **options)
    printed = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode == 0, printed
    return printed


def bodies(running, control):
    return [transmit.body for transmit in running.sandbox.of(control)]


def test_mllp_send(here, tmp_path):
    """python-hl7's command, with a file of framed messages and one of a bare message."""
    command = str(Path(sys.executable).with_name("mllp_send"))
    framed = [message(f"MLLP-{n}", text="Grüße") for n in range(3)]
    (tmp_path / "framed.bin").write_bytes(b"".join(b"\x0b" + text.encode() + b"\x1c\r" for text in framed))
    printed = run(command, "--file", str(tmp_path / "framed.bin"), "--port", str(here.ports["A"]), "127.0.0.1")
    for n, text in enumerate(framed):
        assert f"MSA|AA|MLLP-{n}" in printed
        assert bodies(here, f"MLLP-{n}") == [text.rstrip("\r")]  # mllp_send takes the last CR off
    (tmp_path / "loose.hl7").write_bytes(message("MLLP-LOOSE").encode())
    printed = run(
        command, "--loose", "--file", str(tmp_path / "loose.hl7"), "--port", str(here.ports["A"]), "127.0.0.1"
    )
    assert "MSA|AA|MLLP-LOOSE" in printed
    assert [body.rstrip("\r") for body in bodies(here, "MLLP-LOOSE")] == [message("MLLP-LOOSE").rstrip("\r")]


@pytest.mark.parametrize(
    ("channel", "code", "encoding"), [("A", "AA", "utf-8"), ("E", "CA", "utf-8"), ("LATIN", "AA", "latin-1")]
)
def test_python_hl7_client(here, channel, code, encoding):
    with MLLPClient("127.0.0.1", here.ports[channel], encoding=encoding) as client:
        for n in range(6):
            control = f"CLIENT-{channel}-{n}"
            text = message(control, patient=control, text="Ärztin")
            while not (answer := client.send_message(text).decode(encoding).strip("\x0b\x1c\r")).startswith("MSH"):
                pass
            if channel == "E":  # the Bot's own answer follows the CA, and may come first with the next message
                here.agent.wait_state(control, "processed")
                assert re.search(r"MSA\|(CA|AA)\|CLIENT-E-", answer)
            else:
                assert acknowledgment(answer) == (code, control)
            here.sandbox.wait_ids(control)
            assert bodies(here, control) == [text]


@pytest.fixture(scope="module")
def medplum():
    command = os.environ.get("MEDPLUM_CLI", "")
    if not command:
        pytest.skip("NO @medplum/cli: set MEDPLUM_CLI (build.py test does) to check against Medplum's own sender")
    return command


@pytest.mark.parametrize(("channel", "code"), [("A", "AA"), ("E", "CA")])
def test_medplum_hl7_send(here, medplum, tmp_path, channel, code):
    text = message(f"CLI-{channel}", text="Grüße aus dem Labor").rstrip("\r")
    path = tmp_path / "message.hl7"
    path.write_text(text, newline="")
    printed = run(medplum, "hl7", "send", "--file", str(path), "127.0.0.1", str(here.ports[channel]), cwd=tmp_path)
    assert re.search(rf"MSA\|({code}|AA)\|CLI-{channel}", printed), printed
    here.sandbox.wait_ids(f"CLI-{channel}")
    assert [body.rstrip("\r") for body in bodies(here, f"CLI-{channel}")] == [text]


def test_medplum_hl7_send_example(here, medplum, tmp_path):
    count = len(here.sandbox.seen)
    printed = run(medplum, "hl7", "send", "--generate-example", "127.0.0.1", str(here.ports["A"]), cwd=tmp_path)
    assert "MSA|AA" in printed
    here.sandbox.wait_for(lambda: len(here.sandbox.seen) == count + 1)
