"""The delivery promise: what was acknowledged is on disk and reaches the server, in order where order matters."""

import contextlib
import functools
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import threading
import time
from collections import defaultdict

import pytest

import medplum_agent
from tests.support import INLINE, bot, changed, control_id, eventually, message, site, tmpfs

FAST = "autoRetryBaseDelayMs=20&autoRetryMaxDelayMs=200&autoRetryMaxAttempts=0&deadLetterAfterHours=0"
SENDERS = 4
IN_FLIGHT = 8  # messages that a sender sends before it waits for acknowledgments


class Sender:
    """One device of a feed: sends numbered messages of its own patients, and remembers which got their CA."""

    def __init__(self, number):
        self.number = number
        self.next = 0
        self.accepted = set()
        self.refused = []

    def run(self, site_, until):
        """Send until the connection breaks or the time is over."""
        with contextlib.suppress(OSError, EOFError), site_.device("FEED") as device:
            waiting = 0
            while time.monotonic() < until:
                while waiting < IN_FLIGHT:
                    self.next += 1
                    device.send(message(f"S{self.number}-{self.next}", patient=f"S{self.number}P{self.next % 5}"))
                    waiting += 1
                waiting -= self.take(device)
            while waiting:
                waiting -= self.take(device)

    def take(self, device):
        """1 when an accept acknowledgment came, 0 for the Bot's answers, which pass as well."""
        code, control = device.ack()
        if code == "CA":
            self.accepted.add(control)
        elif code.startswith("C"):
            self.refused.append((code, control))
        return code.startswith("C")


def patient_of(body):
    return body.split("PID|1||", 1)[1].split("^", 1)[0]


def assert_promise(here, senders, timeout=60):
    """Every accepted message arrives, and first arrivals of a patient come in the order of sending."""
    accepted = set().union(*(sender.accepted for sender in senders))
    assert not [refused for sender in senders for refused in sender.refused]
    here.sandbox.wait_for(
        lambda: accepted <= {control_id(t.body) for _, t in here.sandbox.answered}, timeout, "all accepted"
    )
    assert_order(here.sandbox.seen)
    return len(accepted)


def assert_order(transmits):
    last: defaultdict[str, int] = defaultdict(int)
    seen = set()
    for _, transmit in transmits:
        control = control_id(transmit.body)
        if control not in seen:
            seen.add(control)
            number = int(control.split("-")[1])
            assert number > last[patient_of(transmit.body)], f"{control} came too late"
            last[patient_of(transmit.body)] = number


def kill_while_sending(here, senders, kills, seed):
    """Rounds of: four devices send, and at a random moment the agent is killed; it is started for the next round."""
    moments = random.Random(seed)
    for _ in range(kills):
        moment = moments.uniform(0.02, 0.35)
        threads = [threading.Thread(target=s.run, args=(here, time.monotonic() + 5)) for s in senders]
        for thread in threads:
            thread.start()
        time.sleep(moment)
        here.agent.kill()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        here.agent.start(ready=False)
        here.agent.wait_listening()


def test_twenty_kills_lose_no_accepted_message(tmp_path):
    senders = [Sender(n) for n in range(SENDERS)]
    with site(tmp_path, {"FEED": f"?enhanced=true&{FAST}"}) as here:
        kill_while_sending(here, senders, 20, seed=1)
        count = assert_promise(here, senders)
        stems: dict[str, str] = {}
        for _, transmit in here.sandbox.seen:  # callbacks name the message, also over restarts
            stem = transmit.callback.split("#")[0]
            assert stems.setdefault(stem, transmit.body) == transmit.body
        print(f"\n{count} accepted messages, {len(here.sandbox.seen)} arrivals, 20 kills")
    assert count > 500


def test_kills_with_the_uplink_cut_all_the_time(tmp_path):
    senders = [Sender(n) for n in range(SENDERS)]
    with site(tmp_path, {"FEED": f"?enhanced=true&{FAST}"}) as here:
        here.sandbox.stop()
        kill_while_sending(here, senders, 3, seed=2)  # no server at all
        here.sandbox.faults.token_failures, here.sandbox.faults.token_status = 10**9, 400
        here.sandbox.start()
        kill_while_sending(here, senders, 7, seed=3)  # one that lets nobody in
        assert not here.sandbox.seen
        here.sandbox.faults.token_failures = 0
        count = assert_promise(here, senders)
        print(f"\n{count} accepted messages without the server, 10 kills")
    assert count > 250


def answers_late(here):
    here.sandbox.faults.delay = lambda: random.uniform(0, 0.4)


def answers_never(here):
    here.sandbox.faults.silent = True


def answers_400(here):
    here.sandbox.bot = lambda transmit: (400, '{"resourceType":"OperationOutcome"}')


@pytest.mark.parametrize("trouble", [answers_late, answers_never, answers_400])
def test_kills_while_the_server_misbehaves(tmp_path, trouble):
    senders = [Sender(n) for n in range(SENDERS)]
    with site(tmp_path, {"FEED": f"?enhanced=true&responseTimeoutSecs=0.5&{FAST}"}, start=False) as here:
        changed(here.agent, INLINE)
        here.agent.start()
        trouble(here)
        kill_while_sending(here, senders, 10, seed=3)
        here.sandbox.faults.silent = False
        here.sandbox.faults.delay = lambda: 0.0
        here.sandbox.answered.clear()  # what was answered 400 is not delivered
        already = {control_id(t.body) for _, t in here.sandbox.seen} if trouble is answers_late else set()
        here.sandbox.bot = bot("AA")
        accepted = set().union(*(sender.accepted for sender in senders))
        here.sandbox.wait_for(
            lambda: accepted <= already | {control_id(t.body) for _, t in here.sandbox.answered}, 60, "all accepted"
        )
        assert_order(here.sandbox.seen)
        if trouble is answers_400:
            assert_order(here.sandbox.answered)
    assert len(accepted) > 100


# --- order ---


class Interval:
    """When a message was with the server."""

    def __init__(self, index, patient):
        self.index, self.patient = index, patient
        self.start = self.end = 0.0


def send_feed(device, feed, kinds):
    for i in feed:
        kind, merge = kinds.get(i.index, ("ADT^A08", ""))
        device.send(message(f"F-{i.index}", i.patient, kind, merge=merge))


def test_order_and_barriers_over_thousands_of_messages(tmp_path):
    random.seed(4)
    count, patients, merges = 4000, 500, 10
    feed = [Interval(n, f"P{random.randrange(patients)}") for n in range(count)]
    barriers = sorted(random.sample(range(count), merges))
    with site(tmp_path, {"FEED": "?enhanced=true&appLevelAck=NE"}) as here:
        here.sandbox.faults.delay = lambda: random.uniform(0, 0.2)
        kinds = {n: ("ADT^A40^ADT_A39", f"P{random.randrange(patients)}") for n in barriers}
        started = time.monotonic()
        with here.device("FEED", timeout=60) as device:
            sending = threading.Thread(target=send_feed, args=(device, feed, kinds))
            sending.start()
            for _ in range(count):
                assert device.ack()[0] == "CA"
            sending.join()
            intake = time.monotonic() - started
        here.sandbox.wait_for(lambda: len(here.sandbox.answered) >= count, 120, "all answered")
        spent = time.monotonic() - started
        for at, transmit in here.sandbox.seen:
            interval = feed[int(control_id(transmit.body)[2:])]
            assert not interval.start, "sent twice"
            interval.start = at
        for at, transmit in here.sandbox.answered:
            feed[int(control_id(transmit.body)[2:])].end = at
    print(f"\n{count / spent:.0f} messages/s, server 0-200 ms, {merges} merges; intake {count / intake:.0f}/s")
    last: defaultdict[str, float] = defaultdict(float)
    for interval in feed:
        if interval.index not in kinds:
            assert interval.start >= last[interval.patient], f"{interval.index} overtook its patient's earlier message"
            last[interval.patient] = interval.end
    for barrier in barriers:
        assert max((i.end for i in feed[:barrier]), default=0) <= feed[barrier].start, f"barrier {barrier} came early"
        assert min((i.start for i in feed[barrier + 1 :]), default=1e12) >= feed[barrier].end, (
            f"barrier {barrier} passed"
        )
    assert max(overlaps(feed)) > 20, "patients should be in parallel"


def overlaps(feed):
    """How many messages were with the server at once."""
    running = 0
    for _, step in sorted([(i.start, 1) for i in feed] + [(i.end, -1) for i in feed]):
        running += step
        yield running


@pytest.mark.parametrize(
    ("query", "same", "parallel"),
    [
        ("maxWorkers=1", ("PA", "PB"), None),
        ("logicalChannelKey=MSH-4", ("PA", "PB"), None),
        ("logicalChannelKey=PID-3.1", ("PA", "PA"), ("PA", "PB")),
        ("", ("PA", "PA"), ("PA", "PB")),
        ("", ("", "PA"), None),
    ],
)
def test_what_waits_for_what(tmp_path, query, same, parallel):
    with site(tmp_path, {"FEED": f"?enhanced=true&{query}"}) as here, here.device("FEED") as device:
        here.sandbox.faults.delay = lambda: 0.2
        device.send(message("K-1", same[0]), message("K-2", same[1]))
        here.sandbox.wait_for(lambda: len(here.sandbox.answered) == 2)
        assert here.sandbox.ids() == ["K-1", "K-2"]
        assert here.sandbox.answered[0][0] <= here.sandbox.seen[1][0]
        if parallel:
            device.send(message("K-3", parallel[0]), message("K-4", parallel[1]))
            here.sandbox.wait_for(lambda: len(here.sandbox.answered) == 4)
            assert here.sandbox.seen[3][0] < here.sandbox.answered[2][0]


# --- on disk before the acknowledgment ---


class Syscall:
    """One line of strace -f -y, whole: `unfinished` and `resumed` halves are put together at the time they ended."""

    def __init__(self, name, text):
        self.name, self.text = name, text
        self.file = (re.match(r"\w+\(\d+<(.*?)>[,)]", text) or ["", ""])[1]
        self.succeeded = bool(re.search(r"\) += \d+$", text))


def read_strace(text):
    pending = {}
    for line in text.splitlines():
        match = re.match(r"(\d+) +(.*)", line)
        if not match:
            continue
        thread, call = match.groups()
        if call.endswith("<unfinished ...>"):
            pending[thread] = call.removesuffix("<unfinished ...>").rstrip()
            continue
        if resumed := re.match(r"<\.\.\. (\w+) resumed>(.*)", call):
            call = pending.pop(thread, f"{resumed[1]}(") + resumed[2]
        if name := re.match(r"(\w+)\(", call):
            yield Syscall(name[1], call)


@pytest.mark.parametrize("thread", ["thread", "loop"])
@pytest.mark.parametrize("query", ["?enhanced=true", "?enhanced=aa"])
def test_the_queue_is_synced_to_disk_before_each_accept(tmp_path, query, thread):
    if not shutil.which("strace"):
        pytest.skip("NO STRACE: that a commit reaches the disk before the acknowledgment leaves was not checked")
    trace = tmp_path / "strace.txt"
    wrapper = [
        "strace",
        "-D",
        "-f",
        "-y",
        "-s",
        "20000",
        "-e",
        "trace=recvfrom,sendto,pwrite64,fdatasync,fsync",
        "-o",
        str(trace),
    ]
    controls = [f"SYNC{n:04d}X" for n in range(60)]
    code = "CA" if query.endswith("true") else "AA"
    with site(tmp_path, {"FEED": query}, start=False, wrapper=wrapper) as here:
        if thread == "loop":
            changed(here.agent, INLINE)
        here.agent.start()
        with here.device("FEED") as device:
            for control in controls[:30]:  # one at a time
                device.send(message(control, patient=control))
                while device.ack() != (code, control):  # the Bot\'s answer to the one before may still come
                    pass
        with here.device("FEED") as device:  # all at once
            device.send(*(message(control, patient=control) for control in controls[30:]))
            found: set[tuple[str, str]] = set()
            while not {control for answer, control in found if answer == code} >= set(controls[30:]):
                found.add(device.ack())
        here.sandbox.wait_ids(*controls)
        here.agent.terminate()
        eventually(lambda: "exited with" in trace.read_text().splitlines()[-1], 10, "strace to end")
    calls = list(read_strace(trace.read_text()))
    for control in controls:
        written = index(calls, 0, "pwrite64", f"|{control}|", "-wal")
        synced = index(calls, written, "fdatasync fsync", "", "-wal")
        acknowledged = index(calls, 0, "sendto", f"MSA|{code}|{control}|", "socket:")
        assert written < synced < acknowledged, control


def test_a_slow_disk_never_holds_up_the_loop(tmp_path):
    """20 ms a sync from the start on: no commit is made in the thread of the event loop."""
    if not shutil.which("strace"):
        pytest.skip("NO STRACE: a slow disk was not tried")
    trace = tmp_path / "strace.txt"
    slow = "-e trace=fdatasync -e inject=fdatasync:delay_enter=20000".split()
    with site(tmp_path, {"FEED": "?enhanced=true"}, wrapper=["strace", "-D", "-f", *slow, "-o", str(trace)]) as here:
        assert here.agent.process is not None
        with here.device("FEED") as device:
            for n in range(3 * medplum_agent.QUICK_COMMITS):
                device.send(message(f"SLOW{n}", patient=f"P{n}"))
                while device.ack() != ("CA", f"SLOW{n}"):
                    pass
        loop = here.agent.process.pid
    threads = [int(line.split()[0]) for line in trace.read_text().splitlines() if "fdatasync(" in line]
    assert len(threads) > 3 * medplum_agent.QUICK_COMMITS and loop not in threads


def index(calls, start, names, text, file):
    """The first successful call at or after `start` of these names with this text and file."""
    found = (
        n for n, c in enumerate(calls[start:], start)
        if c.name in names.split() and c.succeeded and text in c.text and file in c.file
    )  # fmt: skip
    return next(found)


# --- disks that fail ---


@pytest.fixture
def small_disk(tmp_path):
    with tmpfs(tmp_path / "small", 8) as folder:
        yield folder


def test_full_disk_refuses_and_recovers(small_disk):
    with site(small_disk, {"FEED": "?enhanced=true", "ORIGINAL": ""}) as here, here.device("FEED") as device:
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(5 * 2**20))
        accepted, refused = [], ""
        for n in range(100):
            device.send(message(f"FULL-{n}", patient=f"F{n}", size=60_000))
            while f"|FULL-{n}|" not in (answer := device.receive()) or "|AA|" in answer:
                pass
            if "|CE|" in answer:
                refused = answer
                break
            accepted.append(f"FULL-{n}")
        assert "disk" in refused and "full" in refused, refused
        assert len(accepted) > 3
        here.agent.logged("Free space")
        with here.device("ORIGINAL") as original:
            assert original.ask(message("FULL-ORIGINAL", size=60_000))[0] == "AE"
        device.drain()
        ballast.unlink()

        def accepts_again():
            control = f"SPACE-{time.monotonic_ns()}"
            device.send(message(control, patient=control, size=60_000))
            code, answered = device.ack()
            while answered != control:  # a Bot's late answer to an earlier message
                code, answered = device.ack()
            accepted.extend([control] if code == "CA" else [])
            return code == "CA"

        eventually(accepts_again, 10, "room again")
        here.sandbox.wait_ids(*accepted)
        assert set(here.sandbox.ids()) == set(accepted)
        assert here.agent.terminate()[0] == 0


@pytest.mark.parametrize("freed", [True, False])
def test_full_disk_while_the_server_is_away_keeps_what_was_accepted(small_disk, freed):
    """Space is kept back for settling, so that even without more of it the queue drains."""
    with site(small_disk, {"FEED": "?enhanced=true"}) as here:
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(2**20))
        here.sandbox.stop()
        accepted: list[str] = []
        with here.device("FEED") as device:
            while device.ask(message(f"OFF-{len(accepted)}", size=60_000))[0] == "CA":
                accepted.append(f"OFF-{len(accepted)}")
        here.agent.kill()
        here.agent.start(ready=False)
        here.agent.wait_listening()
        here.sandbox.start()
        if freed:
            ballast.unlink()
        here.sandbox.wait_ids(*accepted, timeout=20)
        assert here.sandbox.ids()[: len(accepted)] == accepted


def takes(device, control, refusal):
    """Whether a message is not refused any more; asked five times a second."""
    time.sleep(0.2)
    return device.ask(message(control))[0] != refusal


@pytest.mark.parametrize(("query", "code"), [("?enhanced=true", "CE"), ("?enhanced=aa", "AE"), ("", "AE")])
def test_corrupt_queue_file_is_said_and_mended(tmp_path, query, code):
    with site(tmp_path, {"FEED": query}) as here:
        here.sandbox.faults.silent = True
        with here.device("FEED") as device:
            device.send(message("BEFORE-1"))
            here.sandbox.wait_ids("BEFORE-1")
        here.agent.terminate()
        good = here.agent.queue_path.read_bytes()
        damage = b"this is not a queue" + random.Random(5).randbytes(20_000)
        here.agent.queue_path.write_bytes(damage)
        here.sandbox.faults.silent = False
        here.agent.start()
        with here.device("FEED") as device:
            device.send(message("DAMAGED-1"))
            answer = device.receive()
            assert f"MSA|{code}|DAMAGED-1|storage error" in answer and "damaged" in answer
            line = here.agent.logged("cannot be opened")
            assert str(here.agent.queue_path) in line and ".recover" in line
            assert here.agent.queue_path.read_bytes() == damage, "a damaged file is never thrown away"
            here.agent.queue_path.write_bytes(good)
            eventually(functools.partial(takes, device, "DAMAGED-1", code), 12, "mended")
        here.sandbox.wait_ids("BEFORE-1", "DAMAGED-1")


OLD = ["OLD-0", "OLD-1", "OLD-2"]


def three_wait(here, channel):
    """OLD are in the queue of an agent that was stopped."""
    here.sandbox.stop()
    with here.device(channel) as device:
        for one in OLD:
            assert device.ask(message(one, patient=one))[0] == "CA"
    here.agent.terminate()


@pytest.mark.parametrize(
    "change", [*(f"{name} = CAST(x'50FF' AS TEXT)" for name in ("remote", "key", "type", "finalized")),
        "encoding = 'utf-9'", "original = x'0D0A'"]
)  # fmt: skip
def test_what_is_damaged_on_the_disk_stops_nothing_else(tmp_path, change):
    """A bit that fell over, as no encrypted queue takes it for good: one row ended the reading of all behind it."""
    with site(tmp_path, {"FEED": "?enhanced=true"}) as here:
        three_wait(here, "FEED")
        with contextlib.closing(sqlite3.connect(here.agent.queue_path)) as db:
            db.execute(f"UPDATE message SET {change} WHERE control_id = 'OLD-1'")
            db.commit()
        here.sandbox.start()
        here.agent.start()
        with here.device("FEED") as device:
            device.send(message("NEW"))
            while device.ack() != ("CA", "NEW"):  # answers to the others come as well
                pass
            sent = ["OLD-0", "OLD-2"] if change.startswith(("finalized", "original")) else OLD
            here.sandbox.wait_ids(*sent, "NEW", timeout=20)
            here.sandbox.wait_for(lambda: len(here.sandbox.answered) > len(sent), 10, "answers")


@pytest.mark.parametrize(("where", "sent"), [(0, []), (1, OLD)], ids=["table", "index"])
def test_a_bit_of_a_channels_name_stops_nothing(tmp_path, where, sent):
    """The other place, table or index, had it still: the file was not opened any more, or the channel was renamed."""
    with site(tmp_path, {"ZFEEDZ": "?enhanced=true"}) as here:
        three_wait(here, "ZFEEDZ")
        with contextlib.closing(sqlite3.connect(here.agent.queue_path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        content = bytearray(here.agent.queue_path.read_bytes())
        content[[found.start() for found in re.finditer(b"ZFEEDZ", content)][where] + 2] ^= 0x80
        here.agent.queue_path.write_bytes(content)
        here.sandbox.start()
        here.agent.start()
        with here.device("ZFEEDZ") as device:
            device.send(message("NEW"))
            while (ack := device.ack()) != ("CA", "NEW"):
                assert ack[0] == "AA", ack
            here.sandbox.wait_ids(*sent, "NEW", timeout=20)


def test_unwritable_place_for_the_queue_is_said(tmp_path):
    blocked = tmp_path / "file-not-folder"
    blocked.write_text("x")
    settings = [{"name": "queueDbPath", "valueString": str(blocked / "queue.sqlite")}]
    with site(tmp_path, {"FEED": "?enhanced=true"}, settings) as here, here.device("FEED") as device:
        device.send(message("NOWHERE-1"))
        assert "MSA|CE|NOWHERE-1|storage error" in device.receive()
        here.agent.logged("cannot be opened")
        assert here.agent.process is not None and here.agent.process.poll() is None


def test_stop_while_sending_loses_nothing(tmp_path):
    senders = [Sender(n) for n in range(SENDERS)]
    with site(tmp_path, {"FEED": f"?enhanced=true&{FAST}"}) as here:
        for _ in range(3):
            threads = [threading.Thread(target=s.run, args=(here, time.monotonic() + 5)) for s in senders]
            for thread in threads:
                thread.start()
            time.sleep(0.2)
            code, seconds = here.agent.terminate(signal.SIGTERM)
            assert code == 0 and seconds < 10
            for thread in threads:
                thread.join(20)
            here.agent.start()
        assert_promise(here, senders)


def test_memory_stays_flat_while_a_backlog_grows(tmp_path):
    """The short form of a million: 80,000 messages of 1 KB while the server is away.

    What the agent holds is asked, not what glibc keeps for it, which depends on when which thread frees what. On a disk
    that stands still for a moment it holds 8,192 messages more, 30 MB (UNCOMMITTED_MESSAGES).
    """
    lean = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "131072"}
    with site(tmp_path, {"FEED": "?enhanced=true"}, env=lean) as here:
        here.sandbox.stop()
        with here.device("FEED", timeout=30) as device:
            send_all(device, 20_000, 0)  # then buffers, caches and what is known in memory are as large as they get
            early = here.agent.memory_kb("VmRSS")
            send_all(device, 60_000, 20_000)
            late = here.agent.memory_kb("VmRSS")
        print(f"\n{early} KiB with 20,000 messages queued, {late} KiB with 80,000")
        assert late < early + 45_000 and late < 150_000
        here.sandbox.start()
        here.sandbox.wait_for(lambda: len(here.sandbox.answered) >= 80_000, 90, "all drained")
        assert len(set(here.sandbox.ids())) == 80_000
        assert_order(here.sandbox.seen)


def send_all(device, count, start):
    frames = [message(f"M-{start + n + 1}", patient=f"P{n % 97}", size=1000).encode() for n in range(count)]
    stream = b"".join(b"\x0b" + frame + b"\x1c\r" for frame in frames)
    position, accepted, tail = 0, 0, b""
    device.socket.setblocking(False)
    while accepted < count:
        readable, writable, _ = select.select(
            [device.socket], [device.socket] if position < len(stream) else [], [], 30
        )
        assert readable or writable, "the agent stands still"
        if writable:
            position += device.socket.send(stream[position : position + 65536])
        if readable:
            tail += device.socket.recv(2**18)
            accepted += tail.count(b"MSA|CA|")
            assert b"MSA|CE|" not in tail
            tail = tail[-6:] if not tail.endswith(b"MSA|CA|") else b""
    device.socket.setblocking(True)


def test_the_file_of_reserved_numbers_is_never_synced_by_the_loop(tmp_path):
    """It is a file beside the queue: where the disk is slow, each sync would hold up all devices."""
    with site(tmp_path, {"ADT": "?enhanced=true"}, start=False) as here:
        told = tmp_path / "threads"
        tell = f"open({str(told)!r}, 'a').write(m.threading.current_thread().name + chr(10))"
        spy = f"r = m.Store._remember\ndef spy(*a):\n {tell}\n r(*a)\nm.Store._remember = spy\nm.RESERVED_IDS = 50\n"
        changed(here.agent, spy + INLINE)
        here.agent.start()
        with here.device("ADT") as device:
            for number in range(500):
                device.send(message(f"M{number}"))
                while device.ack() != ("CA", f"M{number}"):
                    pass
        found = told.read_text().split()
        assert len(found) >= 10 and set(found) == {"store-writer"}


READ_BEFORE_TOLD = """import threading, time
committed, tell, queued = threading.Event(), m.Store._tell, m.Store.queued
def late(self, *then):
    if threading.current_thread() is self._writer and any(one.args[:1] and one.args[0] for one in then if isinstance(
            one, m.partial) and one.func == self._committed):
        committed.set()
        time.sleep(1)
    tell(self, *then)
async def after(self, *asked):
    await m.asyncio.to_thread(committed.wait)
    return await queued(self, *asked)
m.Store._tell, m.Store.queued = late, after
"""


def test_the_bots_answer_does_not_overtake_ours(tmp_path):
    """At the start a row was read, sent and answered before its device had heard CA, which then waited for ever."""
    with site(tmp_path, {"A": "?enhanced=true"}, start=False) as here:
        changed(here.agent, READ_BEFORE_TOLD)
        here.agent.start()
        with here.device("A") as device:
            assert device.ask(message("FIRST")) == ("CA", "FIRST")
            assert device.ack() == ("AA", "FIRST")
            device.socket.shutdown(socket.SHUT_WR)
            with pytest.raises(EOFError):  # nothing is owed any more
                device.receive_bytes()
