"""Another version takes over from the running agent: no device notices, and what does not work goes back."""

import datetime
import json
import os
import socket
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pynetdicom import AE

import medplum_agent as ma
from tests import releases
from tests.instruments import ACK, ENQ, EOT, Instrument, frames_of
from tests.support import Device, bot, eventually, message, site
from tests.test_tls import Identities, dial

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="programs are not replaced while they run there")
ROOT = Path(__file__).resolve().parent.parent
QUICK = "m.TRIAL_WELL_SECS, m.TRIAL_SECS, m.UNDO_SECS = 0.5, 3.0, 1.0"


def program(folder: Path, version: str, code: str = "") -> Path:
    """An executable of this version; its module is changed by `code`, in which it is called `m`."""
    folder.mkdir(parents=True, exist_ok=True)
    path, root = folder / "medplum-agent", releases.throw_away_keys().root
    path.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport medplum_agent as m\n"
        f"m.VERSION, m.ROOT_FILE = '{version}-0000000', pathlib.Path({str(root)!r})\n{QUICK}\n{code}\n"
        "if __name__ == '__main__':\n    sys.exit(m.main())\n"
    )
    path.chmod(0o755)
    return path


class Installed:
    """A site whose agent is installed in a folder of its own, and can be upgraded."""

    def __init__(self, folder: Path, here, code: str = "", *, start: bool = True):
        self.here, self.agent = here, here.agent
        self.folder = folder / "installed"
        self.agent.COMMAND = [str(program(self.folder, "5.2.0", code))]
        if start:
            self.agent.start()
            self.agent.logged("started successfully")  # also channels that `start` does not look at

    @property
    def pid(self) -> int:
        """Of the agent, which must be alive."""
        assert self.agent.process and self.agent.process.poll() is None, self.agent.output()[-3000:]
        return self.agent.process.pid

    def add(self, version: str, code: str = "") -> None:
        program(self.folder / "versions" / version / "medplum-agent", version, code)

    def releases(self, where: Path, versions: dict[str, str], **how: Any) -> releases.Repository:
        """Signed releases; the values are what their modules are changed by."""
        made = {one: program(where / one, one, code).parent for one, code in versions.items()}
        return releases.make_repository(where / "repository", made, **how)

    def command(
        self, *words: str, timeout: float = 60, settings: str = "", run: Path | str = ""
    ) -> subprocess.CompletedProcess[str]:
        options = [self.agent._url or self.here.sandbox.url, "sandbox-client", "sandbox-secret", "agent-1"]
        config = self.folder / "agent.toml"
        names = ("baseUrl", "clientId", "clientSecret", "agentId")
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in zip(names, options, strict=True)]
        config.write_text("".join(lines) + settings)
        line = [*self.agent.COMMAND, *words, "--config", str(config), "--state-dir", str(self.agent.state_dir)]
        env = {**os.environ, "RUNTIME_DIRECTORY": str(run)}
        return subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False, env=env)

    def ask(self, version: str) -> dict[str, Any]:
        """`$upgrade`: what the server hears."""
        request = {"type": "agent:upgrade:request", "version": version}
        sandbox = self.here.sandbox
        return dict(sandbox.call(sandbox.sandbox.ask("agent-1", request, 45), 50))

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
    rounds = int(os.environ.get("UPGRADE_ROUNDS", "1"))
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
                        "def no(*_): raise m.ConfigError('it never starts')\nm.Store.__init__ = no",
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


# --- trust ---


def test_the_newest_release_is_fetched_verified_and_stays(tmp_path):
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here)
        made = there.releases(tmp_path / "made", {"5.3.0": "", "5.10.0": ""})
        with releases.served(made.folder, mislabelled=True) as url, here.device("ADT") as device:
            done = there.command("upgrade", settings=f'upgradeUrl = "{url}"')
            assert done.returncode == 0, done.stderr + here.agent.output()
            assert there.version() == "5.10.0-0000000"
            again = there.command("upgrade", settings=f'upgradeUrl = "{url}"')
            assert (again.returncode, "5.10.0 is what runs" in again.stderr) == (1, True), again.stderr
            older = there.command("upgrade", "5.3.0", settings=f'upgradeUrl = "{url}"')
            assert (older.returncode, "older than 5.10.0" in older.stderr) == (1, True), older.stderr
            assert device.ask(message("A1"))[0] == "CA"
        here.agent.kill()  # what was chosen also runs from the next start on, until a package is installed over it
        here.agent.start()
        assert there.version() == "5.10.0-0000000"
        here.agent.kill()
        program(there.folder, "5.11.0")
        here.agent.start()
        assert there.version() == "5.11.0-0000000"


def test_a_bundle_is_for_machines_without_internet_and_without_a_running_agent(tmp_path):
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here, start=False)
        made = there.releases(tmp_path / "made", {"5.3.0": ""})
        done = there.command("upgrade", str(made.bundles["5.3.0"]))
        assert (done.returncode, "runs from its next start" in done.stdout) == (0, True), done.stderr
        here.agent.start()
        assert there.version() == "5.3.0-0000000"


def spoil(kind: str, there: Installed, folder: Path) -> Path:
    """A bundle of 5.3.0 that must be refused."""
    if kind == "expired":
        return there.releases(folder, {"5.3.0": ""}, age_days=91).bundles["5.3.0"]
    if kind in ("targets", "snapshot", "timestamp"):
        return there.releases(folder, {"5.3.0": ""}, strangers=[kind]).bundles["5.3.0"]
    if kind == "stranger":
        return there.releases(folder, {"5.3.0": ""}, keys=releases.throw_away_keys("others")).bundles["5.3.0"]
    bundle = there.releases(folder, {"5.3.0": ""}).bundles["5.3.0"]
    whole = bundle.read_bytes()
    at = whole.index(b"\x1f\x8b\x08")  # the program
    bundle.write_bytes(whole[: at + 100] if kind == "truncated" else whole[:at] + b"\0" + whole[at + 1 :])
    return bundle


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("expired", "expired"), ("targets", "targets was signed by 0/1"), ("snapshot", "snapshot was signed by 0/1"),
        ("timestamp", "timestamp was signed by 0/1"), ("stranger", "signed by 0/"), ("truncated", "unpacked"),
        ("flipped", "hash"),
    ],
)  # fmt: skip
def test_what_is_not_signed_fresh_and_whole_is_refused(tmp_path, kind, words):
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here, start=False)
        done = there.command("upgrade", str(spoil(kind, there, tmp_path / "made")))
        assert done.returncode == 1
        assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
        left = {path.name for path in (there.folder / "versions").iterdir()}
        assert left <= {"metadata"}, left


def test_an_older_timestamp_is_refused_after_a_newer_one(tmp_path):
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here, start=False)
        first = there.releases(tmp_path / "made", {"5.3.0": ""}).bundles["5.3.0"]
        old = tmp_path / "old.bundle"
        old.write_bytes(first.read_bytes())
        second = there.releases(tmp_path / "made", {"5.4.0": ""}).bundles["5.4.0"]
        assert there.command("upgrade", str(second)).returncode == 0
        done = there.command("upgrade", str(old), "--allow-downgrade")
        assert (done.returncode, "not to be trusted" in done.stderr) == (1, True), done.stderr


def test_a_full_disk_changes_nothing(tmp_path):
    full = "import tarfile\ndef no(*_, **__): raise OSError(28, 'No space left')\ntarfile.TarFile.extractall = no"
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here, full)
        made = there.releases(tmp_path / "made", {"5.3.0": ""})
        done = there.command("upgrade", settings=f'upgradeUrl = "{made.folder}"')
        assert (done.returncode, "No space left" in done.stderr) == (1, True), done.stderr
        assert there.version() == "5.2.0-0000000" and not (there.folder / "versions/current").exists()


@pytest.mark.parametrize("kind", ["written by others", "another's", "another's, who names himself", "elsewhere"])
def test_nobody_else_says_what_is_executed(tmp_path, kind):
    """A program in a folder where others can make files, such as that of temporary files."""
    if kind.startswith("another") and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    installed = program(tmp_path / "installed", "5.2.0")
    versions = tmp_path / "installed/versions"
    name = "../../evil" if kind == "elsewhere" else "5.3.0"
    evil = program(versions / name / "medplum-agent", "5.3.0", "print('EVIL'); sys.exit()")
    current = versions / "current"
    found = {"version": name, "over": "5.2.0-0000000", "installed": str(installed), "previous": ""}
    current.write_text(json.dumps(found | ({"installed": str(evil)} if "names" in kind else {})))
    if kind.startswith("another"):
        for path in (versions, current, evil.parent.parent, evil):
            os.chown(path, 12345, 12345)
    elif kind == "written by others":
        current.chmod(0o666)
    done = subprocess.run([installed, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == "5.2.0-0000000\n"
    if kind == "written by others":  # else it would be believed
        current.chmod(0o644)
        assert subprocess.run([installed, "--version"], capture_output=True, text=True).stdout == "EVIL\n"


# --- the server's request ---


@pytest.fixture
def remote(tmp_path):
    """An agent that may be upgraded by the server, and releases 5.3.0 and the broken 5.4.0."""
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here, start=False)
        made = there.releases(tmp_path / "made", {"5.3.0": "", "5.4.0": "raise SystemExit('it is broken')"})
        here.agent._env |= {"MEDPLUM_UPGRADE_URL": str(made.folder), "MEDPLUM_REMOTE_UPGRADE": "true"}
        yield there


def test_the_server_hears_of_success_from_the_new_version(remote):
    remote.agent.start()
    answer = remote.ask("5.3.0")
    assert (answer["type"], answer["statusCode"]) == ("agent:upgrade:response", 200), answer
    assert remote.version() == "5.3.0-0000000"
    again = remote.ask("5.3.0")
    assert (again["type"], again["statusCode"]) == ("agent:upgrade:response", 200)


@pytest.mark.parametrize(
    ("version", "env", "words"),
    [
        ("5.4.0", {}, "5.4.0 failed its selftest: it is broken"), ("5.9.0", {}, "there is no version 5.9.0"),
        ("latest", {}, "'latest' is not a valid version"),
        ("5.3.0", {"MEDPLUM_REMOTE_UPGRADE": "false"}, "remoteUpgrade"), ("5.1.0", {}, "5.1.0 is older than 5.2.0"),
    ],
)  # fmt: skip
def test_the_server_hears_why_not(remote, version, env, words):
    remote.agent._env |= env
    remote.agent.start()
    answer = remote.ask(version)
    assert (answer["type"], words in answer["body"]) == ("agent:error", True), answer
    assert remote.version() == "5.2.0-0000000"


def test_the_version_that_runs_is_no_newer_one(tmp_path):
    """An installed program knows the commit that it was made of, a release does not."""
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here, start=False)
        made = there.releases(tmp_path / "made", {"5.2.0": ""})
        here.agent.start()
        done = there.command("upgrade", settings=f'upgradeUrl = "{made.folder}"')
        assert (done.returncode, "5.2.0 is what runs" in done.stderr) == (1, True), done


def test_what_never_worked_is_no_reason_to_refuse(tmp_path):
    """An Endpoint that was wrong from the first start, so that no configuration was ever saved."""
    with site(tmp_path, {"ADT": "?enhanced=true", "ODD": "bogus://127.0.0.1:{port}"}, start=False) as here:
        there = Installed(tmp_path, here)
        there.add("5.3.0")
        done = there.command("upgrade", "5.3.0")
        assert done.returncode == 0, done.stdout + done.stderr + here.agent.output()


def test_a_release_source_holds_no_password(tmp_path):
    with site(tmp_path, {}, start=False) as here:
        there = Installed(tmp_path, here, start=False)
        done = there.command("upgrade", settings='upgradeUrl = "https://me:pass1234@mirror.test/"')
        assert done.returncode == 78 and "upgradeUrl" in done.stderr
        assert "no user or password" in done.stderr and "pass1234" not in done.stderr


def test_upgrades_have_their_hours(remote):
    day = "Mo Tu We Th Fr Sa Su".split()[(datetime.datetime.now().weekday() + 3) % 7]
    config = remote.folder / "hours.toml"
    config.write_text(f'upgradeWindow = "{day} 00:00-24:00"')
    remote.agent._options += ["--config", str(config)]
    remote.agent.start()
    answer = remote.ask("5.3.0")
    assert f"within {day} 00:00-24:00 only" in answer["body"]


def test_what_was_wrong_before_is_no_reason_to_go_back(tmp_path):
    """A port that another program holds."""
    with (
        site(tmp_path, {"ADT": "?enhanced=true", "TAKEN": ""}, start=False) as here,
        socket.create_server(("127.0.0.1", here.ports["TAKEN"])),
    ):
        there = Installed(tmp_path, here)
        there.add("5.3.0")
        done = there.command("upgrade", "5.3.0")
        assert done.returncode == 0, done.stdout + done.stderr + here.agent.output()
        assert there.version() == "5.3.0-0000000"


def test_what_cannot_be_executed_is_given_up(remote):
    """It passed its selftest, and is gone or another when it is to take over."""
    program(remote.folder, "5.2.0", "e = m.os.execv\nm.os.execv = lambda path, _: e(path.replace('5.3.0', 'x'), _)")
    remote.agent.start()
    with remote.here.device("ADT") as device:
        answer = remote.ask("5.3.0")
        assert answer["body"] == "Failed to upgrade to version 5.3.0: it cannot be executed"
        assert device.ask(message("A1"))[0] == "CA"


def test_a_version_that_never_works_is_reported_by_the_old_one(remote):
    remote.agent.start()
    remote.add("5.5.0", "async def no(self): return 'it never works'\nm.Upgrades._trial = no")
    answer = remote.ask("5.5.0")
    assert answer["type"] == "agent:error"
    assert answer["body"] == "Failed to upgrade to version 5.5.0: it never works"


HANG = "async def hang(*_): await m.asyncio.sleep(99)\n"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (HANG + "m.Store.open = hang", "hangs"),
        (HANG + "m.Operations.open = hang", "hangs"),
        ("m.Upgrades.adopt = lambda _: m.time.sleep(99)", "hangs"),
        (HANG + "async def no(_): return 'it fails'\nm.Upgrades._trial, m.Agent._shut_down = no, hang", "it fails"),
        ("async def no(_): raise KeyError\nm.Upgrades._trial = no", "failed with KeyError"),
    ],
    ids=["queue", "operations", "loop", "way-out", "trial"],
)  # fmt: skip
def test_a_version_that_hangs_or_fails_beyond_its_own_judgment_is_given_up(remote, code, words):
    remote.agent.start()
    remote.add("5.5.0", code)
    with remote.here.device("ADT") as device:
        assert device.ask(message("A1"))[0] == "CA"
        answer = remote.ask("5.5.0")
        assert (answer["type"], words in answer["body"]) == ("agent:error", True), answer
        assert remote.version() == "5.2.0-0000000"
        with remote.here.device("ADT") as another:
            another.send(message("A2"))  # before its CA the answer to A1 may come, if that connection was closed
            assert next(code for code, control in iter(another.ack, None) if control == "A2") == "CA"
    for control in ("A1", "A2"):
        remote.agent.wait_state(control, "processed")


@pytest.mark.parametrize("step", ["fetch", "prove", "execute", "trial", "choose"])
def test_a_kill_at_each_step_leaves_a_version_that_works(remote, step):
    """The service manager starts it again; the server hears how it ended."""
    die = "os = m.os; die = lambda *_, **__: os.kill(os.getpid(), 9)\n"
    old = {"fetch": "m.Versions._unpack = die", "prove": "m.own_command = die", "execute": "m.Upgrades.execute = die"}
    new = {
        "trial": "m.Upgrades._trial = die",
        "choose": "c = m.Versions.choose; m.Versions.choose = lambda *a: die(c(*a))",
    }
    program(remote.folder, "5.2.0", die + old[step] if step in old else "")
    remote.agent.start()
    if step in new:
        remote.add("5.3.0", die + new[step])
    sandbox = remote.here.sandbox
    request = {"type": "agent:upgrade:request", "version": "5.3.0", "callback": "agent:cb:nobody"}
    sandbox.loop.call_soon_threadsafe(lambda: sandbox.sandbox.agents["agent-1"].send(request))
    assert remote.agent.wait_exit() == -9
    program(remote.folder, "5.2.0")
    if step in new:
        remote.add("5.3.0")
    remote.agent.start()
    assert remote.version() == ("5.3.0" if step == "choose" else "5.2.0") + "-0000000"
    if step in ("execute", "trial"):
        remote.agent.logged("ended before it had proved itself")
    assert not list((remote.folder / "versions").glob("5.9*"))


# --- what is under way ---


def test_an_answer_that_comes_late_reaches_the_connection_that_waits_for_it(tmp_path):
    with site(tmp_path, {"ADT": ""}, start=False) as here:
        here.sandbox.sandbox.bot = bot("AA")
        here.sandbox.faults.silent = True
        there = Installed(tmp_path, here)
        there.add("5.3.0")
        with here.device("ADT", timeout=30) as device:
            device.send(message("M1"))
            here.sandbox.wait_for(lambda: here.sandbox.ids())
            command = threading.Thread(target=there.command, args=("upgrade", "5.3.0"))
            command.start()
            here.agent.logged("5.3.0 takes over", 20)
            eventually(lambda: "Medplum Agent 5.3.0" in here.agent.output(), 20)
            here.sandbox.faults.silent = False
            assert device.ack() == ("AA", "M1")
            command.join()


def test_root_does_it_for_a_service_that_may_not(tmp_path):
    """The service asks by a file; root's unit, here a thread, believes signatures only."""
    run = tmp_path / "run"
    run.mkdir()
    denied = "import os\nif os.environ.get('SERVICE'): m.Versions.writable = property(lambda self: False)"
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here, denied, start=False)
        made = there.releases(tmp_path / "made", {"5.3.0": denied})
        here.agent._env |= {"MEDPLUM_UPGRADE_URL": str(made.folder), "MEDPLUM_REMOTE_UPGRADE": "true",
            "RUNTIME_DIRECTORY": str(run), "SERVICE": "yes"}  # fmt: skip
        here.agent.start()
        over = threading.Event()

        def unit():
            while not over.wait(0.02):
                if (run / "upgrade").exists():
                    there.command("upgrade", "--requested", settings=f'upgradeUrl = "{made.folder}"', run=run)

        root = threading.Thread(target=unit)
        root.start()
        try:
            answer = there.ask("5.3.0")
            assert answer.get("statusCode") == 200, answer
            assert there.version() == "5.3.0-0000000"
            refused = there.ask("5.9.0")
            assert "there is no version 5.9.0" in refused["body"]
        finally:
            over.set()
            root.join()
        done = there.command("upgrade", "--rollback", run=run)  # by root, whose unit may be switched off
        assert (done.returncode, there.version()) == (0, "5.2.0-0000000"), done.stderr
        (run / "upgrade").write_text("choose ../../evil")
        answered = there.folder / "versions/answer"
        assert there.command("upgrade", "--requested", run=run).returncode == 1
        assert "no request" in json.loads(answered.read_text())["error"]
        there.add("5.1.0")  # it was here long ago, and has faults that are known
        (run / "upgrade").write_text("choose 5.1.0")
        assert there.command("upgrade", "--requested", run=run).returncode == 1
        assert "5.1.0 is older than 5.2.0" in json.loads(answered.read_text())["error"]
        (run / "upgrade").write_text("fetch ")  # the service may write its settings, but root opens no archive for it
        own = f'upgradeUrl = "{made.bundles["5.3.0"]}"'
        assert there.command("upgrade", "--requested", settings=own, run=run).returncode == 1
        assert "cannot be had" in json.loads(answered.read_text())["error"]
        assert answered.stat().st_mode & 0o777 == (there.folder / "versions/current").stat().st_mode & 0o777 == 0o644


def test_a_service_without_root_s_unit_is_not_put_on_trial(tmp_path):
    """It could not make the new version the current one."""
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here, "m.Versions.writable = property(lambda self: False)")
        there.add("5.3.0")
        done = there.command("upgrade", "5.3.0")
        assert (done.returncode, "may not change its program" in done.stderr) == (1, True), done.stderr
        assert "proves itself" not in here.agent.output()


FULL = """
whole = m.replace_file
def full(path, *content, **how):
    if path.name == m.UPGRADE_FILE:
        raise OSError(28, "No space left on device", str(path))
    whole(path, *content, **how)
m.replace_file = full
"""


def test_what_cannot_be_written_down_is_not_begun(tmp_path):
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here, FULL)
        there.add("5.3.0")
        done = there.command("upgrade", "5.3.0")
        assert (done.returncode, "No space left" in done.stderr) == (1, True), done.stderr
        assert there.version() == "5.2.0-0000000" and "takes over" not in here.agent.output()


def test_the_old_version_is_not_on_trial_where_a_full_disk_kept_the_last_word(remote):
    remote.agent.start()
    remote.add("5.5.0", FULL + "async def no(self): return 'it never works'\nm.Upgrades._trial = no")
    answer = remote.ask("5.5.0")
    assert (answer["type"], "5.5.0: the agent ended before" in answer["body"]) == ("agent:error", True), answer
    assert remote.version() == "5.2.0-0000000"
    assert remote.ask("5.3.0").get("statusCode") == 200


def test_a_stop_during_the_selftest_ends_the_agent_and_the_test(tmp_path):
    with site(tmp_path, {"ADT": ""}, start=False) as here, socket.create_server(("127.0.0.1", 0)) as listener:
        there = Installed(tmp_path, here)
        endless = f"s = m.socket.create_connection({listener.getsockname()}); m.time.sleep(600)"
        there.add("5.3.0", f"if '--selftest' in sys.argv:\n {endless}")
        threading.Thread(target=there.command, args=("upgrade", "5.3.0"), daemon=True).start()
        listener.settimeout(20)
        with listener.accept()[0] as selftest:
            code, seconds = here.agent.terminate()
            assert code == 0 and seconds < 9
            selftest.settimeout(5)
            assert selftest.recv(1) == b""


# --- cut-over: nobody waits in vain ---


def test_a_device_whose_message_may_not_be_sent_twice_hears_that_it_failed(tmp_path):
    """Original mode without retries, and a Bot that takes its time."""
    with site(tmp_path, {"ADT": "?retryMode=none"}, start=False) as here:
        here.sandbox.sandbox.bot = bot("AA")
        here.sandbox.faults.silent = True
        there = Installed(tmp_path, here, "m.SESSION_SECS = m.YIELD_SECS = 0.3")
        there.add("5.3.0")
        with here.device("ADT", timeout=20) as device:
            device.send(message("M1"))
            here.sandbox.wait_for(lambda: here.sandbox.ids())
            command = threading.Thread(target=there.command, args=("upgrade", "5.3.0"))
            command.start()
            assert device.ack() == ("AE", "M1")
            here.sandbox.faults.silent = False
            assert device.ask(message("M2")) == ("AA", "M2")
            command.join()
        here.sandbox.wait_ids("M1", "M2")
        assert there.version() == "5.3.0-0000000"


def test_the_answer_to_a_push_is_no_message_for_the_server(tmp_path):
    """A push to a connected device that is under way, and the ACK of an earlier one which comes again."""
    with site(tmp_path, {"ADT": ""}, start=False) as here, ThreadPoolExecutor() as pool, here.caller() as caller:
        here.sandbox.sandbox.bot = bot("AA")
        there = Installed(tmp_path, here)
        there.add("5.3.0")
        with here.device("ADT", timeout=20) as device:
            assert device.ask(message("M1")) == ("AA", "M1")
            pushed = pool.submit(caller.push, "channel://ADT", message("P1"))
            assert "|P1|" in device.receive()
            command = pool.submit(there.command, "upgrade", "5.3.0")
            here.agent.logged("5.3.0 takes over", 20)
            acknowledgment = "MSH|^~\\&|||||20260101||ACK|A1|P|2.5\rMSA|AA|P1\r"
            device.send(acknowledgment)
            assert "MSA|AA|P1" in pushed.result(20).text
            command.result(30)
            assert there.version() == "5.3.0-0000000"
            device.send(acknowledgment)
            assert device.ask(message("M2")) == ("AA", "M2")
        assert here.sandbox.ids() == ["M1", "M2"]


def test_without_descriptors_a_connection_is_closed_and_the_upgrade_goes_on(tmp_path):
    few = "d = m.os.dup; n = []\ndef dup(number):\n n.append(0)\n"
    few += " if len(n) > 1: raise OSError(24, 'Too many open files')\n return d(number)\nm.os.dup = dup"
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here, few)
        there.add("5.3.0")
        with here.device("ADT", timeout=20) as device:
            device.send(message("A1"))
            assert device.heard(2) == [("CA", "A1"), ("AA", "A1")]
            assert there.command("upgrade", "5.3.0").returncode == 0, here.agent.output()
            assert device.closed_by_peer()
        with here.device("ADT") as device:
            assert device.ask(message("A2"))[0] == "CA"
        assert there.version() == "5.3.0-0000000"


def test_messages_that_are_held_back_go_over_with_their_connection(tmp_path):
    """And the clock that lets them through does not strike in between (the goodbye takes its time)."""
    slow = "m.LAZY_SECS = 2.5\nasync def no(self): await m.asyncio.sleep(60)\nm.Uplink.goodbye = no"
    with site(tmp_path, {"ADT": "?enhanced=true&messagesPerMin=60"}, start=False) as here:
        there = Installed(tmp_path, here, slow)
        there.add("5.3.0")
        with here.device("ADT", timeout=20) as device:
            for number in range(6):
                device.send(message(f"A{number}"))
            done = there.command("upgrade", "5.3.0")
            assert done.returncode == 0, here.agent.output()
            here.sandbox.wait_ids(*(f"A{number}" for number in range(6)))
            device.send(message("B1"))
            here.sandbox.wait_ids(*(f"A{number}" for number in range(6)), "B1")


def test_a_port_can_move_while_the_new_version_is_on_trial(tmp_path):
    """What it keeps for the old one must not hold it; and what is gone from the configuration does not listen."""
    with site(tmp_path, {"ADT": "?enhanced=true", "GONE": ""}, start=False) as here:
        here.sandbox.sandbox.bot = bot("AA")
        there = Installed(tmp_path, here)
        there.add("5.3.0", "m.TRIAL_WELL_SECS = m.TRIAL_SECS = 60.0")
        command = threading.Thread(target=there.command, args=("upgrade", "5.3.0"))
        command.start()
        eventually(lambda: here.agent.output().count("Connected to") == 2, 20)
        here.endpoint("ADT")["address"] = f"mllp://0.0.0.0:{here.ports['ADT']}?enhanced=true"
        here.sandbox.resource("Agent/agent-1")["channel"].pop()
        assert here.sandbox.reload().get("statusCode") == 200, here.agent.output()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", here.ports["GONE"]))
        with here.device("ADT") as device:
            assert device.ask(message("A1"))[0] == "CA"
        command.join()
        assert there.version() == "5.3.0-0000000"


def test_a_stop_while_it_waits_for_a_session_ends_the_agent(tmp_path):
    with site(tmp_path, {"LAB": "tcp://127.0.0.1:{port}?mode=astm"}, start=False) as here:
        there = Installed(tmp_path, here)
        there.add("5.3.0")
        with Instrument.at(here.ports["LAB"]) as analyzer:
            assert analyzer.ask(ENQ) == ACK
            command = threading.Thread(target=there.command, args=("upgrade", "5.3.0"), daemon=True)
            command.start()
            here.agent.logged("5.3.0 takes over", 20)
            code, seconds = here.agent.terminate()
            assert code == 0 and seconds < 9
        here.agent.start()
        assert there.version() == "5.2.0-0000000"
        here.agent.logged("ended before it had proved itself")


@pytest.mark.parametrize("where", ["Listener.leave", "Line.leave", "Store.close"])
def test_an_error_on_the_way_out_starts_the_old_version_again(tmp_path, where):
    """Such as no more descriptors."""
    fault = f"def no(*_): raise OSError(24, 'Too many open files')\nm.{where} = no"
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here, fault)
        there.add("5.3.0")
        with here.device("ADT") as device:
            assert device.ask(message("A1"))[0] == "CA"
            done = there.command("upgrade", "5.3.0")
        assert (done.returncode, "5.2.0-0000000 ended with OSError" in done.stdout) == (1, True), (
            done.stdout + done.stderr
        )
        here.agent.wait_listening()
        with here.device("ADT") as device:
            assert device.ask(message("A2"))[0] == "CA"
        here.sandbox.wait_ids("A1", "A2")


def test_sessions_and_associations_end_first_and_connections_that_cannot_stay_are_closed_between_messages(tmp_path):
    """An analyzer in the middle of a session, an association that is open, a TLS connection, a byte stream."""
    identities = Identities(tmp_path)
    channels = {
        "LAB": "tcp://127.0.0.1:{port}?mode=astm",
        "RAW": "tcp://127.0.0.1:{port}?startChar=%02&endChar=%03",
        "PACS": "dicom://127.0.0.1:{port}",
        "TLS": f"mllps://127.0.0.1:{{port}}?enhanced=true&certFile={identities.server}",
    }
    with site(tmp_path, channels, start=False) as here:
        here.sandbox.sandbox.bot = lambda transmit: bot("AA")(transmit) if transmit.channel == "TLS" else (200, "")
        there = Installed(tmp_path, here)
        there.add("5.3.0")
        secure = dial(here, "TLS", identities.client())
        with Instrument.at(here.ports["LAB"]) as analyzer, here.device("RAW") as raw, secure:
            assert analyzer.ask(ENQ) == ACK
            frames = frames_of("H|\\^&", "R|1|^^^GLU|5.1", "L|1|N")
            assert analyzer.ask(frames[0]) == ACK
            scanner = AE(ae_title="SCANNER")
            scanner.add_requested_context("1.2.840.10008.1.1")  # Verification
            association = scanner.associate("127.0.0.1", here.ports["PACS"])
            assert association.is_established
            secure.sendall(b"\x0b" + message("T1").encode() + b"\x1c\r")
            assert b"CA|T1" in secure.recv(4096)
            ran: list[subprocess.CompletedProcess[str]] = []
            command = threading.Thread(target=lambda: ran.append(there.command("upgrade", "5.3.0")))
            command.start()
            here.agent.logged("5.3.0 takes over", 20)
            for frame in frames[1:]:  # it waits for both
                assert analyzer.ask(frame) == ACK
            analyzer.write(EOT)
            assert association.send_c_echo().Status == 0
            association.release()
            command.join()
            assert ran[0].returncode == 0, ran[0].stderr
            analyzer.session("H|\\^&", "R|1|^^^GLU|5.2", "L|1|N")  # on the same line, with the new version
            raw.send_raw(b"\x02again\x03")
            here.sandbox.wait_for(lambda: len([t for _, t in here.sandbox.seen if t.channel == "LAB"]) == 2)
            here.sandbox.wait_for(lambda: [t for _, t in here.sandbox.seen if t.channel == "RAW"])
            rest = b"".join(iter(lambda: secure.recv(4096), b""))  # the Bot's answer, and the end of the connection
            assert b"AA|T1" in rest


# --- the service manager ---


@pytest.mark.parametrize(
    ("words", "words_back"),
    [
        ([], "after service comes"), (["restart"], "after service comes"),
        (["install", "a", "b"], "after service comes"),
        (["stop", "a", "b", "c", "d"], "after service comes"), (["install", "ftp://x/", "b", "c", "d"], "baseUrl"),
        (["install"], "service install needs base_url"),
    ],
)  # fmt: skip
def test_what_the_service_manager_is_not_asked(tmp_path, words, words_back):
    tool = program(tmp_path, "5.2.0", "m.installed_config_file = lambda: m.Path('/nowhere')")
    done = subprocess.run([tool, "service", *words], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, words_back in done.stderr) == (1, True), done


def test_a_service_is_made_of_this_program_and_its_secret_is_no_argument(tmp_path):
    folder = tmp_path / "packaging" / ("macos" if sys.platform == "darwin" else "linux")
    folder.mkdir(parents=True)
    (folder / "service.sh").write_text('echo "$@"; cat; exit 3\n')
    tool = program(tmp_path, "5.2.0", f"m.PACKAGING = pathlib.Path({str(tmp_path / 'packaging')!r})")
    values = ["https://api.example.org/", "an-id", '-se"cr\u00e9t', "agent-1"]
    done = subprocess.run([tool, "service", "install", *values], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    first, *settings = done.stdout.splitlines()
    assert first == f"install {tool}"
    assert list(tomllib.loads("\n".join(settings)).values()) == values
    done = subprocess.run([tool, "service", "status"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (f"status {tool}\n", 3)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("part", ["versions", "versions/5.3.0", "versions/current"])
def test_what_somebody_else_put_there_is_not_executed(tmp_path, part):
    """By no command, not for the cloud, and not at the next start."""
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here)
        there.add("5.3.0")
        current = {"version": "5.3.0", "over": "5.2.0-0000000", "previous": "5.3.0",
                   "installed": str(there.folder / "versions/5.3.0/medplum-agent/medplum-agent")}  # fmt: skip
        (there.folder / "versions/current").write_text(json.dumps(current))
        os.chown(there.folder / part, 12345, 12345)
        assert there.version() == "5.2.0-0000000"
        if part == "versions/current":  # the version itself is as good as it ever was
            return
        refused = there.command("upgrade", "5.3.0")
        assert refused.returncode == 1 and "another user" in refused.stderr, refused
        here.agent.terminate()
        done = there.command("upgrade", "5.3.0")
        assert done.returncode == 1 and "another user" in done.stderr, done
        assert there.command("--version").stdout.strip() == "5.2.0-0000000"


def test_what_another_agent_runs_from_is_not_tidied_away(tmp_path):
    """Two agents of one installation: one goes on to a third version; the other has modules yet to load."""
    tidies = "m.KEEP_NEW_SECS = m.KEEP_OLD_SECS = 0"
    for name in "ab":
        (tmp_path / name).mkdir()
    with site(tmp_path / "a", {"ADT": ""}, start=False) as a, site(tmp_path / "b", {"ADT": ""}, start=False) as b:
        one = Installed(tmp_path, a)
        one.add("5.3.0")
        assert one.command("upgrade", "5.3.0").returncode == 0
        eventually(lambda: one.version() == "5.3.0-0000000", 20, "the one runs 5.3.0")
        b.agent.COMMAND = [str(one.folder / "versions/5.3.0/medplum-agent/medplum-agent")]
        b.agent.start()
        one.add("5.4.0", tidies)
        done = one.command("upgrade", "5.4.0")
        assert done.returncode == 0, done
        assert (one.folder / "versions/5.3.0/medplum-agent").exists()
        b.agent.terminate()
        a.agent.terminate()
        assert one.command("upgrade", "5.2.0-0000000", "--allow-downgrade").returncode == 0
        assert not (one.folder / "versions/5.3.0").exists(), "nobody needs it now"


@pytest.mark.parametrize(("folder", "ours"), [("medplum-agent", True), ("bin", False)])
def test_below_a_folder_of_versions(tmp_path, monkeypatch, folder, ours):
    """Windows, which has no such lock, starts there as well; pyenv has Pythons there, which must not go."""
    program = tmp_path / "versions" / "3.13.1" / folder / "medplum-agent"
    program.parent.mkdir(parents=True)
    program.touch()
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    versions = ma.Upgrades(cast(Any, SimpleNamespace(state_dir=tmp_path))).versions
    monkeypatch.setattr(sys, "argv", ["/medplum-agent"])
    assert ma.Versions().folder == Path("/versions"), "as in the image of a container"
    assert (versions.inside, versions.folder) == (ours, tmp_path / "versions" if ours else program.parent / "versions")


def test_without_an_agent_a_version_proves_itself_too(tmp_path):
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here, start=False)
        there.add("5.3.0", "raise SystemExit(7)")
        done = there.command("upgrade", "5.3.0")
        assert done.returncode == 1 and "failed its selftest: code 7" in done.stderr, done
        assert there.command("--version").stdout.strip() == "5.2.0-0000000"


@pytest.mark.parametrize("wanted", ["metadata", "../metadata", "foo", "5.1.0"])
def test_what_is_no_newer_version_is_refused(tmp_path, wanted):
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        there = Installed(tmp_path, here)
        there.add("5.1.0")
        (there.folder / "versions/metadata").mkdir(exist_ok=True)
        done = there.command("upgrade", wanted)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done
        assert "is no version" in done.stderr or "--allow-downgrade" in done.stderr, done
        assert there.version() == "5.2.0-0000000"
