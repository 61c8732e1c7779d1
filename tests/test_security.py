"""What somebody hostile on the device network, on the machine or in the place of the server tries."""

import subprocess
import sys
import threading
import time

from tests.support import ROOT, Site, message, site


def memory_mb(site: Site, figure: str = "VmHWM") -> int:
    """The most that an agent has had, or another figure of its process."""
    assert site.agent.process is not None
    with open(f"/proc/{site.agent.process.pid}/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith(figure))


# --- the device network ---


def test_a_frame_of_fifty_thousand_messages_holds_up_nobody(tmp_path):
    with (
        site(tmp_path, {"A": "?enhanced=aa", "B": "?enhanced=aa"}) as here,
        here.device("A", timeout=30) as hostile, here.device("B", timeout=30) as device,
    ):  # fmt: skip
        heard, before, took = list[str](), memory_mb(here), list[float]()
        hostile.send("FHS|^~\\&\r" + "MSH|\r" * 50_000 + message("LAST") + "FTS|1\r")
        listening = threading.Thread(target=lambda: heard.extend(hostile.receive() for _ in range(50_001)))
        listening.start()
        while listening.is_alive():
            began = time.monotonic()
            assert device.ask(message(f"B-{len(took)}"))[0] == "AA"
            took.append(time.monotonic() - began)
        assert heard[-1].endswith("MSA|AA|LAST|OK\r")
        assert max(took) < 1.5
        assert memory_mb(here) - before < 50


def test_names_that_a_device_makes_up_do_not_stay_in_memory(tmp_path):
    with site(tmp_path, {"A": "?enhanced=aa"}) as here, here.device("A", timeout=30) as hostile:
        here.sandbox.faults.silent, here.sandbox.faults.max_frame = True, None
        before = memory_mb(here, "VmRSS")
        for number in range(80):
            name = f"{number}" + 300_000 * "X"
            head = f"MSH|^~\\&|{name}||||||ADT^{name}|{name}|P|2.5||||||{name}"
            assert len(hostile.ask(f"{head}\rPID|1||{name}^^^H|\r")[1]) > 300_000
        assert memory_mb(here, "VmRSS") - before < 120


LOOK_UP = """
import codecs, contextlib, encodings, medplum_agent, tracemalloc
medplum_agent.forget_codecs()
codecs.lookup("cp1252")
tracemalloc.start()
for number in range(2000):
    with contextlib.suppress(LookupError):
        codecs.lookup(f"made-up-{number}")
print(len(tracemalloc.take_snapshot().traces))
for name in ("iso-ir-100", "latin1", "windows-1252", "koi8-u", "ansi_x3.4_1968", "shift_jis", "idna", "mac_arabic"):
    assert codecs.lookup(name).name == encodings.search_function(name).name
"""


def test_character_sets_that_a_device_makes_up_do_not_stay_in_memory():
    """In a process of its own: pytest remembers what was imported."""
    done = subprocess.run([sys.executable, "-c", LOOK_UP], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000


def test_a_character_set_whose_text_is_no_json(tmp_path):
    with site(tmp_path, {"A": "?enhanced=aa"}) as here, here.device("A") as hostile:
        head = "MSH|^~\\&|A|B|C|D|||ADT^A01|{}|P|2.5||||||raw_unicode_escape\rPID|1||P|\rNTE|1||\\ud800\r"
        assert hostile.ask(head.format("RAW-1")) == ("AA", "RAW-1")
        assert hostile.ask(message("RAW-2")) == ("AA", "RAW-2")
        here.sandbox.wait_ids("RAW-1", "RAW-2")
        assert here.sandbox.of("RAW-1")[0].body == head.format("RAW-1")
