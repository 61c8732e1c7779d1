"""Another version takes over from the running agent: no device notices, and what does not work goes back."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support import Device, bot, message, site

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="programs are not replaced while they run there")
ROOT = Path(__file__).resolve().parent.parent
QUICK = "m.TRIAL_WELL_SECS, m.TRIAL_SECS = 0.5, 3.0"


def program(folder: Path, version: str, code: str = "") -> Path:
    """An executable of this version; its module is changed by `code`, in which it is called `m`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "medplum-agent"
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nimport medplum_agent as m\n"
        f"m.VERSION = '{version}-0000000'\n{QUICK}\n{code}\nif __name__ == '__main__':\n    sys.exit(m.main())\n"
    )
    path.chmod(0o755)
    return path


class Installed:
    """A site whose agent is installed in a folder of its own, and can be upgraded."""

    def __init__(self, folder: Path, here, code: str = ""):
        self.here, self.agent = here, here.agent
        self.folder = folder / "installed"
        self.agent.COMMAND = [str(program(self.folder, "5.2.0", code))]
        self.agent.start()

    @property
    def pid(self) -> int:
        """Of the agent, which must be alive."""
        assert self.agent.process and self.agent.process.poll() is None, self.agent.output()[-3000:]
        return self.agent.process.pid

    def add(self, version: str, code: str = "") -> None:
        program(self.folder / "versions" / version / "medplum-agent", version, code)

    def command(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        options = [self.agent._url or self.here.sandbox.url, "sandbox-client", "sandbox-secret", "agent-1"]
        config = self.folder / "agent.toml"
        names = ("baseUrl", "clientId", "clientSecret", "agentId")
        config.write_text(
            "".join(f"{name} = {json.dumps(value)}\n" for name, value in zip(names, options, strict=True))
        )
        line = [*self.agent.COMMAND, *words, "--config", str(config), "--state-dir", str(self.agent.state_dir)]
        return subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False)

    def version(self) -> str:
        return str(json.loads(self.command("status", "--json").stdout)["version"])


def test_connections_stay_and_nothing_is_lost(tmp_path):
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        here.sandbox.sandbox.bot = bot("AA")
        there = Installed(tmp_path, here)
        pid = there.pid
        there.add("5.3.0")
        with here.device("ADT") as device, here.device("ADT") as half:
            assert device.ask(message("B1"))[0] == "CA"
            half.send_raw(b"\x0b" + message("H1").encode()[:60])
            done = there.command("upgrade", "5.3.0")
            assert done.returncode == 0, done.stderr + here.agent.output()[-3000:]
            assert there.pid == pid
            assert there.version() == "5.3.0-0000000"
            device.send(message("B2"))
            half.send_raw(message("H1").encode()[60:] + b"\x1c\r")
            here.sandbox.wait_ids("B1", "B2", "H1")


class Feed:
    """Four devices that send without a pause, each message after the CA of the one before, and sixteen that wait."""

    def __init__(self, here, rate: float = 125):
        self.busy = [here.device("ADT", timeout=30) for _ in range(4)]
        self.idle = [here.device("ADT", timeout=30) for _ in range(16)]
        self.accepted: list[str] = []
        self.waits: list[float] = []
        self.problems: list[str] = []
        self._rate, self._stop = rate, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n, d)) for n, d in enumerate(self.busy)]

    def _run(self, number: int, device: Device) -> None:
        count, due = 0, time.monotonic()
        try:
            while not self._stop.is_set():
                count += 1
                control = f"S{number}-{count}"
                began = time.monotonic()
                device.send(message(control, patient=f"S{number}P{count % 3}"))
                while (found := device.ack()) != ("CA", control):
                    if found[0].startswith("C"):
                        self.problems.append(f"{control}: {found}")
                        break
                self.waits.append(time.monotonic() - began)
                self.accepted.append(control)
                due = max(due + 1 / self._rate, time.monotonic() - 0.1)
                self._stop.wait(max(0, due - time.monotonic()))
        except (OSError, EOFError) as error:
            self.problems.append(f"S{number}: {type(error).__name__}: {error}")

    def __enter__(self) -> "Feed":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for device in (*self.busy, *self.idle):
            device.close()


def test_under_load_back_and_forth_with_broken_versions(tmp_path):
    """None of the connections is closed or refused, nothing is lost, and broken versions are given up."""
    rounds = int(os.environ.get("UPGRADE_ROUNDS", "3"))
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        here.sandbox.sandbox.bot = bot("AA")
        there = Installed(tmp_path, here)
        pid, pauses = there.pid, []
        with Feed(here) as feed:
            for number in range(rounds):
                for wanted, words, code in (
                    ("5.3.0", "", ""),
                    ("5.9.1", "failed its selftest: it is broken", "raise SystemExit('it is broken')"),
                    ("5.9.2", "it never works", "async def no(self): return 'it never works'\nm.Upgrades._trial = no"),
                    (
                        "5.9.3",
                        "it never starts",
                        "def no(*_): raise m.ConfigError(['it never starts'])\nm.Store.__init__ = no",
                    ),
                    ("", "", ""),
                ):
                    if wanted.startswith("5.9") and number % 10:
                        continue
                    if wanted:
                        there.add(wanted, code)
                    at = len(feed.waits)
                    done = there.command("upgrade", wanted or "--rollback")
                    pauses.append(max(feed.waits[at:], default=0))
                    said = done.stdout + done.stderr
                    assert (done.returncode, words in said) == (int(bool(words)), True), (
                        said + here.agent.output()[-3000:]
                    )
                    assert not feed.problems
                assert there.version() == "5.2.0-0000000"
            with here.device("ADT") as fresh:
                assert fresh.ask(message("NEW"))[0] == "CA"
            for number, device in enumerate(feed.idle):
                assert device.ask(message(f"IDLE{number}"))[0] == "CA"
        assert there.pid == pid and not feed.problems
        here.sandbox.wait_for(lambda: set(feed.accepted) <= set(here.sandbox.ids()), 30)
        order: dict[str, int] = {}
        for control in dict.fromkeys(c for c in here.sandbox.ids() if c.startswith("S")):
            sender, count = control.split("-")
            patient = f"{sender}P{int(count) % 3}"
            assert int(count) > order.get(patient, 0), f"{control} came too late"
            order[patient] = int(count)
        print(f"\n{len(feed.accepted)} messages; longest wait of each upgrade: {[round(x, 2) for x in sorted(pauses)]}")
