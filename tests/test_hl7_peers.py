"""HL7 in the field: what senders and receivers of others do, each one a message that was lost, cut off or misread."""

import base64
import random

import pytest

from tests.support import message, site


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with site(tmp_path_factory.mktemp("peers"), {"ENHANCED": "?enhanced=true"}) as running:
        yield running


# --- a document is a document ---


def document(*lines: str) -> str:
    """Base64 as many a system breaks it into lines (RFC 2045 6.8), against HL7 v2.5.1 2.7, which has no line ends."""
    others = base64.encodebytes(random.Random(1).randbytes(300)).decode().splitlines()
    return "\r\n".join([*others, *lines, *others])


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
@pytest.mark.parametrize("line", ["MSHkTmVx8", "MSH+x/AA", "FHSkTmVxMSH8"])
def test_a_line_of_a_document_begins_no_message(here, line, end):
    """The message ended where a line of its PDF began with these letters, and was acknowledged: of those with 5 MB
    every third. Behind FHS or BTS the line was left out."""
    control = f"PDF-{line}-{len(end)}{ord(end[-1])}"
    text = f"{message(control)}OBX|1|ED|PDF||^application^pdf^Base64^{document(line)}||||||F\r".replace("\r\n", "\r")
    with here.device("ENHANCED") as device:
        device.send(text.replace("\r", end))
        assert device.heard(2) == [("CA", control), ("AA", control)]
    assert [transmit.body for transmit in here.sandbox.of(control)] == [text]
