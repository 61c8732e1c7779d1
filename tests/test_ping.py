"""Ping: what is asked for, ICMP to this machine itself, and the ways out where a process may not send any."""

import asyncio
import re
import time
from pathlib import Path

import icmplib
import pytest

import medplum_agent
from medplum_agent import PING_MAX, PING_TYPE, PingError, parse_ping, ping
from tests.support import eventually, site

# --- the request ---


@pytest.mark.parametrize(
    ("host", "body", "expected"),
    [
        ("127.0.0.1", "PING", ("127.0.0.1", 1)),
        ("127.0.0.1", "PING 3", ("127.0.0.1", 3)),
        ("127.0.0.1", "PING  3  ", ("127.0.0.1", 3)),
        ("127.0.0.1", "PING 3 of them", ("127.0.0.1", 3)),
        ("127.0.0.1", "PING 3abc", ("127.0.0.1", 3)),
        ("127.0.0.1", "PING 2.9", ("127.0.0.1", 2)),
        ("127.0.0.1", f"PING {PING_MAX}", ("127.0.0.1", PING_MAX)),
        ("127.0.0.1", "hello", ("127.0.0.1", 1)),
        ("127.0.0.1", "hello 7", ("127.0.0.1", 1)),
        ("127.0.0.1", "", ("127.0.0.1", 1)),
        ("127.0.0.1", None, ("127.0.0.1", 1)),
        (" 127.0.0.1 ", "PING", ("127.0.0.1", 1)),
        ("::1", "PING", ("::1", 1)),
        ("[::1]", "PING", ("::1", 1)),
        ("0:0:0:0:0:0:0:1", "PING 2", ("::1", 2)),
        ("localhost", "PING", ("localhost", 1)),
        ("lab-1.ward_7.example", "PING", ("lab-1.ward_7.example", 1)),
        ("example.", "PING", ("example.", 1)),
    ],
)
def test_parse_ping(host, body, expected):
    assert parse_ping(host, body) == expected


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("PING x", 'Unable to ping 127.0.0.1 "x" times. "x" is not a number.'),
        ("PING abc3", 'Unable to ping 127.0.0.1 "abc3" times. "abc3" is not a number.'),
        ("PING -", 'Unable to ping 127.0.0.1 "-" times. "-" is not a number.'),
        ("PING 0", "1 to"),
        ("PING -1", "1 to"),
        (f"PING {PING_MAX + 1}", "1 to"),
        ("PING 99999999999999999999", "1 to"),
    ],
)
def test_parse_ping_refuses_counts(body, said):
    with pytest.raises(PingError) as refused:
        parse_ping("127.0.0.1", body)
    assert said in str(refused.value)


BAD_HOSTS = (
    "-c", "--help", "-oProxyCommand=x", "127.0.0.1; id", "127.0.0.1 -f", "a b", "", None, "mllp://127.0.0.1:1",
    "a..b", ".a", "x" * 64, "127.0.0.1:80", ":::1", "$(id)", "a\nb", "a\0b", "-c:1",
)  # fmt: skip


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_parse_ping_refuses_hosts(host):
    with pytest.raises(PingError, match="host"):
        parse_ping(host, "PING")


# --- through the server ---


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with site(tmp_path_factory.mktemp("ping"), {"LAB": ""}) as running:
        yield running


@pytest.fixture
def caller(here):
    with here.caller() as running:
        yield running


SHAPE = r"""PING (?P<host>\S+) \((?P<address>[0-9a-f.:]+)\) 56\(84\) bytes of data\.
(?P<replies>(?:64 bytes from \S+: icmp_seq=\d+ (?:ttl=\d+ )?time=[\d.e-]+ ms\n)+)
--- (?P<named>\S+) ping statistics ---
(?P<sent>\d+) packets transmitted, (?P<received>\d+) received, (?P<lost>\d+)% packet loss, time \d+ms
rtt min/avg/max/mdev = [\d.]+/[\d.]+/[\d.]+/[\d.]+ ms"""


@pytest.fixture(scope="module")
def icmp():
    """Whether this user may send ICMP at all."""

    async def may():
        for privileged in (False, True):
            try:
                return (await icmplib.async_ping("127.0.0.1", 1, timeout=1, privileged=privileged)).is_alive
            except icmplib.SocketPermissionError:
                pass
        return False

    if not asyncio.run(may()):
        pytest.skip("NO ICMP: this user may send none, so real pings were not checked")


@pytest.mark.parametrize(
    ("host", "address", "count"),
    [("127.0.0.1", "127.0.0.1", 1), ("::1", "::1", 1), ("localhost", "", 1), ("127.0.0.1", "", 3), ("::1", "", 3)],
)
def test_ping_this_machine(caller, icmp, host, address, count):
    answer = caller.ping(host, f"PING {count}" if count > 1 else "PING")
    assert (answer.status, answer.content_type) == (200, f"{PING_TYPE}; charset=utf-8"), answer
    assert answer.seconds < 9.9
    found = re.fullmatch(SHAPE, answer.text)
    assert found, answer.text
    assert found["host"] == found["named"] == host
    assert found["address"] == address or (not address and found["address"] in ("127.0.0.1", "::1"))
    assert (found["sent"], found["received"], found["lost"]) == (str(count), str(count), "0")
    assert re.findall(r"icmp_seq=(\d+)", answer.text) == [str(n) for n in range(1, count + 1)]


def test_most_pings_fit_into_the_caller_s_time(caller, icmp):
    answer = caller.ping("127.0.0.1", f"PING {PING_MAX}")
    assert answer.status == 200, answer
    assert answer.seconds < 9.9
    found = re.search(rf"{PING_MAX} packets transmitted, (\d+) received", answer.text)
    assert found and int(found[1]) > PING_MAX * 0.9, answer.text  # a machine under load answers one or the other late


@pytest.mark.parametrize("body", ["PING x", "PING 0", "PING -3", "PING 1000"])
def test_bad_count_is_answered(caller, body):
    answer = caller.ping("127.0.0.1", body)
    assert answer.status == 400 and "127.0.0.1" in answer.text and answer.seconds < 2, answer


@pytest.mark.parametrize("host", ["-c", "--help", "a b", "a..b", "127.0.0.1; id"])
def test_bad_host_is_answered(caller, host):
    answer = caller.ping(host)
    assert answer.status == 400 and host in answer.text and answer.seconds < 2, answer


def test_shape_of_the_agent_s_answers(here, icmp):
    request = {"contentType": PING_TYPE, "remote": "127.0.0.1", "body": "PING"}
    answer = here.sandbox.ask("agent:transmit:request", **request)
    assert set(answer) == {"type", "remote", "callback", "contentType", "statusCode", "body"}
    assert (answer["type"], answer["remote"], answer["statusCode"]) == ("agent:transmit:response", "127.0.0.1", 200)
    answer = here.sandbox.ask("agent:transmit:request", **request | {"body": "PING x"})
    assert (answer["type"], answer["contentType"], answer["statusCode"]) == (
        "agent:transmit:response", "text/plain", 400,
    )  # fmt: skip
    answer = here.sandbox.ask("push", **request | {"channel": "LAB"})  # the legacy name
    assert (answer["statusCode"], answer["channel"]) == (200, "LAB")


def test_ping_that_nobody_waits_for_is_harmless(here, caller, icmp):
    assert caller.call(destination="127.0.0.1", contentType=PING_TYPE, body="PING").status == 200
    assert caller.call(destination="-c", contentType=PING_TYPE, body="PING").status == 200
    assert caller.ping("127.0.0.1").status == 200
    assert not here.agent.rows("")


# --- where no answer comes, and where we may not send ---


def silent(sent):
    """icmplib.async_ping to a host that never answers: it takes the time of every request."""

    async def async_ping(address, count=4, interval=1, timeout=2, **options):
        sent.append((address, count))
        await asyncio.sleep(count * timeout + (count - 1) * interval)
        return icmplib.Host(address, count, [])

    return async_ping


@pytest.mark.parametrize("count", [1, 3, PING_MAX])
def test_silent_host_is_reported_in_time(monkeypatch, count):
    sent: list[tuple[str, int]] = []
    monkeypatch.setattr(medplum_agent, "PING_SECS", 0.4)
    monkeypatch.setattr(icmplib, "async_ping", silent(sent))
    started = time.monotonic()
    with pytest.raises(PingError, match=r"127\.0\.0\.1"):
        asyncio.run(ping("127.0.0.1", count))
    assert time.monotonic() - started < 0.6, "a whole ping, whatever its count, takes PING_SECS at most"
    assert sent == [("127.0.0.1", count)]


def test_some_lost(monkeypatch):
    async def async_ping(address, count=4, interval=1, timeout=2, **options):
        return icmplib.Host(address, 4, [1.0, 3.0])

    monkeypatch.setattr(icmplib, "async_ping", async_ping)
    text = asyncio.run(ping("127.0.0.1", 4))
    assert re.fullmatch(SHAPE, text)
    assert "4 packets transmitted, 2 received, 50% packet loss" in text
    assert "min/avg/max/mdev = 1.000/2.000/3.000/1.000 ms" in text


def test_unknown_name(monkeypatch):
    async def getaddrinfo(self, host, *arguments, **options):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    with pytest.raises(PingError, match=r"lab\.example"):
        asyncio.run(ping("lab.example", 1))


@pytest.fixture
def not_permitted(monkeypatch):
    """No ICMP for this user; the list of what was tried."""
    tried = []

    async def async_ping(address, count=4, interval=1, timeout=2, privileged=True, **options):
        tried.append(privileged)
        raise icmplib.SocketPermissionError(privileged)

    monkeypatch.setattr(icmplib, "async_ping", async_ping)
    return tried


def test_no_permission_and_no_program(not_permitted, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PingError, match=r"127\.0\.0\.1.*no ping program"):
        asyncio.run(ping("127.0.0.1", 1))
    assert not_permitted == [False, True]


def program(folder, monkeypatch, script):
    """A `ping` of ours, first in PATH."""
    path = folder / "ping"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_program_is_the_way_out(not_permitted, monkeypatch, tmp_path):
    program(tmp_path, monkeypatch, f'echo "$@" > {tmp_path}/arguments; printf "PING answers\\n\\n"')
    assert asyncio.run(ping("127.0.0.1", 3)) == "PING answers"
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[-1] == "127.0.0.1" and arguments[arguments.index("-c") + 1] == "3"


def test_the_program_fails(not_permitted, monkeypatch, tmp_path):
    program(tmp_path, monkeypatch, "echo '1 packets transmitted, 0 received'; echo unreachable >&2; exit 1")
    with pytest.raises(PingError, match=r"Command failed: ping -c 1 127\.0\.0\.1\n.*unreachable"):
        asyncio.run(ping("127.0.0.1", 1))


@pytest.mark.parametrize("cancelled", [False, True])
def test_the_program_hangs(not_permitted, monkeypatch, tmp_path, cancelled):
    """It is ended and waited for, also when the agent stops meanwhile."""
    program(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 60")
    monkeypatch.setattr(medplum_agent, "PING_SECS", 60 if cancelled else 0.3)
    started = time.monotonic()

    async def main():
        asked = asyncio.create_task(ping("127.0.0.1", 1))
        await asyncio.to_thread(eventually, (tmp_path / "pid").exists, 5, "the program to run")
        if cancelled:
            asked.cancel()
        with pytest.raises(asyncio.CancelledError if cancelled else PingError, match=None if cancelled else "within"):
            await asked
        number = (tmp_path / "pid").read_text().strip()
        assert not Path(f"/proc/{number}").exists()

    asyncio.run(main())
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(("targets", "status"), [("192.0.2.0/24, tcp://[::1]:80", 400), ("tcp://127.0.0.0/8:80", 200)])
def test_push_targets_limit_pings_too(tmp_path, icmp, targets, status):
    """By address: a ping has neither scheme nor port."""
    with site(tmp_path, {"LAB": ""}, config=f'pushTargets = "{targets}"\n') as here, here.caller() as caller:
        answer = caller.ping("127.0.0.1")
        assert (answer.status, "pushTargets" in answer.text) == (status, status == 400), answer
