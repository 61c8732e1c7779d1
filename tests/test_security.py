"""What somebody hostile on the device network, on the machine or in the place of the server tries."""

import codecs
import contextlib
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc

import medplum_agent
from medplum_agent import MAX_OMITTED, MIB
from tests.dicom_peers import (
    IMPLICIT,
    QUIET,
    SUCCESS,
    Instance,
    Scu,
    encoded,
    imaging_site,
    made,
    made_dataset,
    transmits,
)
from tests.support import ROOT, Link, Receiver, changed, control_id, eventually, log_lines, message, setting, site

# --- the device network ---


def test_a_frame_of_fifty_thousand_messages_holds_up_nobody(tmp_path):
    with (
        site(tmp_path, {"A": "?enhanced=aa", "B": "?enhanced=aa"}) as here,
        here.device("A", timeout=60) as hostile, here.device("B", timeout=60) as device,
    ):  # fmt: skip
        heard, before, asked = list[str](), here.agent.memory_kb(), 0
        hostile.send("FHS|^~\\&\r" + "MSH|\r" * 50_000 + message("LAST") + "FTS|1\r")
        listening = threading.Thread(target=lambda: heard.extend(hostile.receive() for _ in range(50_001)))
        listening.start()
        while listening.is_alive():
            assert device.ask(message(f"B-{asked}"))[0] == "AA"
            asked += 1
        assert heard[-1].endswith("MSA|AA|LAST|OK\r")
        last, *others = (here.agent.rows(name)[0]["id"] for name in ("LAST", *(f"B-{n}" for n in range(asked))))
        assert any(last - 50_000 < other < last for other in others), "one came between"
        assert here.agent.memory_kb() - before < 50_000


def test_names_that_a_device_makes_up_do_not_stay_in_memory(tmp_path):
    with site(tmp_path, {"A": "?enhanced=aa"}) as here, here.device("A", timeout=30) as hostile:
        here.sandbox.faults.silent, here.sandbox.faults.max_frame = True, None
        before = here.agent.memory_kb("VmRSS")
        for number in range(80):
            name = f"{number}" + 300_000 * "X"
            head = f"MSH|^~\\&|{name}||||||ADT^{name}|{name}|P|2.5||||||{name}"
            assert len(hostile.ask(f"{head}\rPID|1||{name}^^^H|\r")[1]) > 300_000
        assert here.agent.memory_kb("VmRSS") - before < 120_000


def test_character_sets_that_a_device_makes_up_do_not_stay_in_memory():
    def text(number: int) -> str:
        return f"MSH|^~\\&|A|B|C|D|||ADT^A01|1|P|2.5||||||made-up-{number}\r"

    for number in range(100):
        medplum_agent.read_hl7(text(number).encode(), "utf-8", False)
    tracemalloc.start()
    for number in range(2000):
        medplum_agent.read_hl7(text(number).encode(), "utf-8", False)
    assert len(tracemalloc.take_snapshot().traces) < 1000
    tracemalloc.stop()
    for name in "iso-ir-100 latin1 windows-1252 koi8-u ansi_x3.4_1968 shift_jis cp737 gb18030".split():
        assert codecs.lookup(medplum_agent.codec_of(name))


def test_a_character_set_whose_text_is_no_json(tmp_path):
    with site(tmp_path, {"A": "?enhanced=aa"}) as here, here.device("A") as hostile:
        head = "MSH|^~\\&|A|B|C|D|||ADT^A01|{}|P|2.5||||||raw_unicode_escape\rPID|1||P|\rNTE|1||\\ud800\r"
        assert hostile.ask(head.format("RAW-1")) == ("AA", "RAW-1")
        assert hostile.ask(message("RAW-2")) == ("AA", "RAW-2")
        here.sandbox.wait_ids("RAW-1", "RAW-2")
        assert here.sandbox.of("RAW-1")[0].body == head.format("RAW-1")


ITEM, SEQUENCE, END_OF_ITEM, END_OF_SEQUENCE = (
    struct.pack("<HHI", *tag, length)
    for *tag, length in (
        (0xFFFE, 0xE000, 0xFFFFFFFF), (0x0040, 0xA730, 0xFFFFFFFF), (0xFFFE, 0xE00D, 0), (0xFFFE, 0xE0DD, 0)
    )
)  # fmt: skip


@QUIET
def test_objects_that_take_long_to_read_hold_up_no_other(tmp_path):
    """Sequences in sequences, and a character set that Python is slow at."""
    plain = made_dataset(PatientComments="x" * 240_000, SpecificCharacterSet="punycode")
    content = encoded(plain, IMPLICIT).replace(b"x" * 240_000 + b"-", b"a" * 240_001)
    slow = Instance(plain.SOPClassUID, plain.SOPInstanceUID, IMPLICIT, content)
    nested, deep = made(0, IMPLICIT), 20_000
    content = SEQUENCE + (ITEM + SEQUENCE) * deep + END_OF_SEQUENCE + (END_OF_ITEM + END_OF_SEQUENCE) * deep
    with imaging_site(tmp_path, {"CT": "dicom://127.0.0.1:{port}"}) as here:
        with Scu.for_instances(here.ports["CT"], slow) as hostile:
            began = time.monotonic()
            hostile.store(slow)
            hostile.store(nested._replace(content=nested.content + content))
            hostile.store(nested._replace(content=nested.content + content[: -16 * deep] + bytes(16 * deep)))
            usual = made(0, IMPLICIT)
            assert hostile.store(usual) == SUCCESS
        assert time.monotonic() - began < 4
        here.sandbox.wait_for(lambda: transmits(here, usual.uid))


@QUIET
def test_what_an_object_takes_in_memory_has_a_limit(tmp_path):
    """A large value in a sequence without a length, and very many attributes: the device hears success all the same."""
    large, many = made(0, IMPLICIT), made(0, IMPLICIT)
    value = struct.pack("<HHI", 0x0018, 0x9999, 70 * MIB)
    content = [large.content, SEQUENCE, ITEM, value, *[bytes(MIB)] * 70, END_OF_ITEM, END_OF_SEQUENCE]
    attributes = (struct.pack("<HHI", 0x1001 + 2 * (n >> 15), 0x1000 + (n & 0x7FFF), 0) for n in range(60_000))
    with imaging_site(tmp_path, {"CT": "dicom://127.0.0.1:{port}"}) as here:
        before = here.agent.memory_kb()
        with Scu.for_instances(here.ports["CT"], large, timeout=60) as scu:
            assert scu.store(large, content) == SUCCESS
            assert scu.store(many._replace(content=many.content + b"".join(attributes))) == SUCCESS
        assert here.agent.memory_kb() - before < 60_000
        told = {one.uid: json.loads(here.agent.rows(one.uid)[0]["original"]) for one in (large, many)}
        assert told[large.uid]["omitted"] == ["0040A730"] and "00100010" in told[large.uid]["dataset"]
        assert len(told[many.uid]["omitted"]) == MAX_OMITTED


def test_a_query_with_many_wildcards_is_answered_at_once():
    """In a process of its own: one that tries all ways cannot be interrupted."""
    look = "import medplum_agent as m; print(m._matches('PN', '*?' * 16 + 'ZZ', 'Testperson-Longname^Paula^Maria'))"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, timeout=10, check=True)
    assert done.stdout.strip() == b"False"


def test_a_device_that_errs_or_repeats_without_end_does_not_fill_the_main_log(tmp_path):
    """Else what came before is deleted (filesToKeep)."""

    def noisy(link: Link, text: str) -> None:
        for number in range(300):
            link.send(message(f"N-{number}"))
        link.ack("AA", control_id(text))

    with site(tmp_path, {"A": "?enhanced=aa"}) as here, Receiver(noisy) as receiver, here.device("A") as device:
        with here.caller() as caller:
            assert caller.push(receiver.url(), message("PUSH-1")).status == 200
        assert device.ask(message("SAME")) == ("AA", "SAME")
        here.agent.wait_state("SAME", "processed")
        device.send(*[message("SAME")] * 300)
        assert [device.ack() for _ in range(300)] == [("AA", "SAME")] * 300
        assert len(log_lines(here.agent.main_log())) < 100


@QUIET
def test_words_of_strangers_do_not_fill_the_main_log(tmp_path):
    with imaging_site(tmp_path, {"CT": "dicom://127.0.0.1:{port}"}) as here:
        here.agent.wait_connected()
        with Scu(here.ports["CT"], [(f"{number}.{60_000 * '9'}", ()) for number in range(9)]) as hostile:
            assert not hostile.accepted
        here.sandbox.faults.refuse_connect = "why? " * 200_000
        here.sandbox.cut()
        here.agent.logged("The server refuses this agent: why?")
        assert "asks for nothing that is served here" in here.agent.output()
        assert len(here.agent.main_log()) < 20_000


# --- in the place of the server ---


class Endless:
    """Answers each request with a body that does not end; 300 MB at most are sent."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Endless":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, contextlib.suppress(OSError):
                    client.recv(65536)
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
                    for _ in range(300):
                        client.sendall(bytes(1_000_000))


def test_an_answer_that_does_not_end(tmp_path):
    with Endless() as endless, site(tmp_path, {"A": ""}, start=False, url=endless.url) as here:
        here.agent.start(ready=False)
        assert "answers with more than 64 MiB" in here.agent.logged("The configuration cannot be read")
        assert here.agent.memory_kb() < 220_000


def test_an_alarm_is_one_line_whatever_a_name_says(tmp_path):
    heard, name = tmp_path / "heard", "A\nOVER: all is well\x1b[2K"
    config = f"alarmTo = 'tee -a {heard}'"
    once = [setting("channelAutoRetryMaxAttempts", 1)]
    with site(tmp_path, {name: "?enhanced=aa"}, once, config=config, start=False) as here:
        changed(here.agent, "m.LOOK_SECS = 0.1")
        here.agent.start()
        here.sandbox.bot = lambda transmit: (400, "no")
        with here.device(name) as device:
            assert device.ask(message("DEAD-1"))[0] == "AA"
            here.agent.wait_state("DEAD-1", "rejected")
        lines = eventually(lambda: heard.exists() and heard.read_text().splitlines(), 30)
        assert len(lines) == 1 and lines[0].startswith("ALARM: channel 'A OVER: all is well [2K' has 1 dead letters")
