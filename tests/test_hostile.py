"""What somebody hostile tries, a second time: bombs, floods, strangers' files, and what is left lying about."""

import json
import struct
import time
import zlib

from medplum_agent import MAX_OMITTED, MIB
from tests.dicom_peers import QUIET, SUCCESS, Scu, imaging_site, made, transmits
from tests.support import eventually
from tests.test_security import memory_mb

EXPLICIT, DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"


def deflated(*parts: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return b"".join(map(deflate.compress, parts)) + deflate.flush()


@QUIET
def test_a_small_deflated_object_is_not_a_large_one_in_memory(tmp_path):
    """One of zeros, and one of attributes: each a few hundred kilobytes, and 240 MiB when inflated."""
    usual = made(0, EXPLICIT)
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OW", 0, 240 * MIB)
    attributes = struct.pack("<HH2sH", 0x1001, 0x1000, b"LO", 0) * (MIB // 8)
    zeros = usual._replace(syntax=DEFLATED, content=deflated(usual.content, pixels, *[bytes(MIB)] * 240))
    many = usual._replace(syntax=DEFLATED, content=deflated(usual.content, *[attributes] * 240))
    with imaging_site(tmp_path, {"CT": "dicom://127.0.0.1:{port}"}) as here:
        before, began = memory_mb(here), time.monotonic()
        with Scu.for_instances(here.ports["CT"], zeros, timeout=60) as scu:
            assert scu.store(zeros) == scu.store(many) == SUCCESS
        assert memory_mb(here) - before < 100
        assert time.monotonic() - began < 20
        told = [json.loads(row["original"]) for row in here.agent.rows(usual.uid)]
        assert all("00100010" in one["dataset"] for one in told) and told[1]["omitted"] == ["10011000"] * MAX_OMITTED
        here.sandbox.wait_for(lambda: len(transmits(here, usual.uid)) == 2)
        eventually(lambda: not [*here.agent.state_dir.glob("*.spool/*")], 20, "nothing stays in the spool")
