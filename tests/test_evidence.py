"""What hospitals are told (packaging/evidence) against the code: whatever can be compared is."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import medplum_agent as ma
from tests.support import ROOT

EVIDENCE = sorted((ROOT / "packaging/evidence").glob("*.md"))
SETTINGS = {name: row for _, _, rows in ma.SETTING_GROUPS for name, row in rows.items()}


def words(path: Path) -> str:
    """The text on one line, however it is wrapped."""
    return " ".join(path.read_text("utf-8").split())


def told(name: str) -> str:
    return words(ROOT / f"packaging/evidence/{name}.md")


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda path: path.name)
def test_settings_exist_and_links_lead_somewhere(path: Path) -> None:
    text = path.read_text("utf-8")
    for name in re.findall(r"`([a-z]+[A-Z]\w+)(?:=[^`]*)?`", text):
        assert name in SETTINGS, name
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize(
    ("document", "settings", "name", "form"),
    [
        ("profile-hl7", ma.Hl7Settings, "maxConnections", "(`maxConnections`, {})"),
        ("profile-hl7", ma.Hl7Settings, "frameTimeoutSecs", "`frameTimeoutSecs` ({:g})"),
        ("profile-hl7", ma.Hl7Settings, "duplicateWindowHours", "`duplicateWindowHours` ({:g})"),
        ("profile-hl7", ma.Hl7Settings, "botErrorAck", "`{}` when the Bot failed"),
        ("profile-hl7", ma.Hl7Settings, "botEmptyAck", "`{}` when it returned nothing"),
        ("profile-astm", ma.StreamSettings, "maxFrame", "`maxFrame` ({})"),
        ("profile-astm", ma.StreamSettings, "receiveTimeoutSecs", "| {:g} | `receiveTimeoutSecs`"),
        ("profile-astm", ma.StreamSettings, "replyTimeoutSecs", "| {:g} | `replyTimeoutSecs`"),
        ("profile-astm", ma.StreamSettings, "nakDelaySecs", "| {:g} | `nakDelaySecs`"),
        ("profile-astm", ma.StreamSettings, "contentionTimeoutSecs", "| {:g} | `contentionTimeoutSecs`"),
        ("conformance-dicom", ma.DicomSettings, "maxPdu", "`maxPdu`, {} bytes"),
        ("conformance-dicom", ma.DicomSettings, "maxConnections", "`maxConnections`, {} a channel"),
        ("conformance-dicom", ma.DicomSettings, "associationTimeoutSecs", "`associationTimeoutSecs` ({:g})"),
        ("conformance-dicom", ma.DicomSettings, "idleTimeoutSecs", "`idleTimeoutSecs` ({:g})"),
        ("conformance-dicom", ma.DicomSettings, "answerWaitSecs", "`answerWaitSecs` ({:g})"),
        ("conformance-dicom", ma.DicomSettings, "responseTimeoutSecs", "`responseTimeoutSecs` ({:g})"),
        ("conformance-dicom", ma.DeviceSettings, "callingAeTitle", "`callingAeTitle` (`{}`)"),
        ("mds2", ma.AgentSettings, "queueRetentionDays", "`queueRetentionDays` ({})"),
        ("mds2", ma.AgentSettings, "queueRetentionMaxMb", "`queueRetentionMaxMb` ({})"),
        ("mds2", ma.AgentSettings, "queueErroredRetentionDays", "`queueErroredRetentionDays` ({})"),
        ("mds2", ma.LoggerSettings, "filesToKeep", "`filesToKeep` ({})"),
        ("mds2", ma.LoggerSettings, "maxFileSizeMb", "`maxFileSizeMb` ({})"),
    ],
)
def test_defaults_are_those_of_the_program(document: str, settings: Any, name: str, form: str) -> None:
    assert form.format(getattr(settings(), name)) in told(document)


def test_sizes_and_times_without_a_setting() -> None:
    hl7, astm = told("profile-hl7"), told("profile-astm")
    assert f"`maxMessageBytes`, {ma.Hl7Settings().maxMessageBytes // ma.MIB} MiB" in hl7
    assert f"`maxMessageBytes`, {ma.StreamSettings().maxMessageBytes // ma.MIB} MiB" in astm
    assert f"when nothing follows for {ma.LONE_END_SECS:g} s" in hl7
    assert f"{ma.PUSH_WAIT_SECS:g} s for a whole try when a caller waits, {ma.PUSH_STORED_SECS:g} s" in hl7
    assert f"at most {ma.FRAME_TEXT_BYTES:,} bytes" in astm and f"nothing follows for {ma.DOUBT_SECS:g} s" in astm
    assert f"interrupted us by EOT | {ma.INTERRUPT_SECS:g} | - |" in astm and ma.SEND_TRIES == 6
    assert f"| {ma.StreamSettings().answerWaitMins * 60:g} | `answerWaitMins` |" in astm
    assert "else TCP 6514" in told("ports")


def test_dicom_services_statuses_and_names() -> None:
    text = told("conformance-dicom")
    listed = set(re.findall(r"1\.2\.840\.10008(?:\.\d+)+", text))
    assert listed == {*ma.SERVICE_CLASSES, *ma.UNCOMPRESSED, "1.2.840.10008.3.1.1.1"}
    assert ma.IMPLEMENTATION[0] in text and ma.IMPLEMENTATION[1].startswith("MEDPLUM_")
    assert re.search(rf"agent opens the largest PDU received is {ma.SENT_PDU_BYTES}\s+bytes", text)
    statuses = {
        ma.SUCCESS, ma.PENDING_MATCH, ma.CANCELLED, ma.SOME_FAILED, ma.PROCESSING_FAILURE, ma.NO_SUCH_INSTANCE,
        ma.NO_SUCH_ACTION, ma.RESOURCE_LIMITATION, ma.OUT_OF_RESOURCES, ma.SOP_MISMATCH, ma.CANNOT_UNDERSTAND,
        ma.UNABLE_TO_PROCESS, ma.NO_SUCH_CLASS, ma.UNRECOGNIZED, ma.ALL_FAILED, ma.UNKNOWN_DESTINATION,
    }  # fmt: skip
    assert {int(status, 16) for status in re.findall(r"0x[0-9A-F]{4}\b", text)} == statuses
    assert "5, 30, 120 and 600 s" in text and ma.COMMITMENT_REPORT_SECS == (0, 5, 30, 120, 600)
    assert f"at each start for {ma.COMMITMENT_REPORT_DAYS} days" in text


def test_they_are_about_this_version() -> None:
    release = ".".join(ma.__version__.split(".")[:2])
    assert f"Medplum Agent {release} " in told("conformance-dicom")
    assert f"Medplum Agent {release}," in told("mds2")


def test_security_says_when_a_report_is_answered() -> None:
    text = words(ROOT / ".github/SECURITY.md")
    for time in ("24 hours", "72 hours", "14 days"):
        assert f"| {time} |" in text


def test_the_program_says_what_is_built_in() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "medplum_agent.py", "--evidence"], capture_output=True, text=True, check=True
    )
    said = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines() if "(" not in line)
    pins = dict(re.findall(r'^    "([\w-]+)==([\w.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE))
    assert {name: pins[name] for name in ("pynetdicom", "websockets", "tuf")}.items() <= said.items()
    assert {"python", "openssl", "zlib", "expat"} <= said.keys()
