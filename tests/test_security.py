"""What somebody hostile on the device network, on the machine or in the place of the server tries."""

import threading
import time

from tests.support import message, site


def memory_mb(pid: int) -> int:
    """The most that a process has had."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM"))


# --- the device network ---


def test_a_frame_of_fifty_thousand_messages_holds_up_nobody(tmp_path):
    with (
        site(tmp_path, {"A": "?enhanced=aa", "B": "?enhanced=aa"}) as here,
        here.device("A", timeout=30) as hostile, here.device("B", timeout=30) as device,
    ):  # fmt: skip
        heard, before, took = list[str](), memory_mb(here.agent.process.pid), list[float]()
        hostile.send("FHS|^~\\&\r" + "MSH|\r" * 50_000 + message("LAST") + "FTS|1\r")
        listening = threading.Thread(target=lambda: heard.extend(hostile.receive() for _ in range(50_001)))
        listening.start()
        while listening.is_alive():
            began = time.monotonic()
            assert device.ask(message(f"B-{len(took)}"))[0] == "AA"
            took.append(time.monotonic() - began)
        assert heard[-1].endswith("MSA|AA|LAST|OK\r")
        assert max(took) < 1.5
        assert memory_mb(here.agent.process.pid) - before < 50
