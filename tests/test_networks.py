"""Networks as hospitals have them: names with a dead address, firewalls that forget, TLS as foreign stacks speak it.

The peers here are bare sockets and Python's ssl; nothing of the agent's own protocols is used to make them.
"""

import contextlib
import datetime
import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import trustme
from pydicom import Dataset
from pynetdicom import evt

from tests.dicom_peers import Destination
from tests.support import Receiver, changed, eventually, free_ports, message, site

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pynetdicom.*")
ECHO = json.dumps({"command": "C-ECHO"})


@contextlib.contextmanager
def dead_address(port):
    """127.0.0.2:port answers no SYN: its backlog is full, as a host that is off or a firewall that drops."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.2", port))
        listener.listen(0)
        for _ in range(3):
            filling = stack.enter_context(socket.socket())
            filling.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filling.connect(("127.0.0.2", port))
        with pytest.raises(TimeoutError):
            socket.create_connection(("127.0.0.2", port), timeout=0.5)
        yield


def names(slow="", **addresses):
    """Code for `changed`: these names (with `_` for a dot) have these addresses, and what ends in `slow` hangs."""
    known = {name.replace("_", "."): found for name, found in addresses.items()}
    return f"""
import socket, time
real = socket.getaddrinfo
def look_up(host, port, *more, **options):
    name = host.decode() if isinstance(host, bytes) else str(host)
    if {slow!r} and name.endswith({slow!r}):
        time.sleep(20)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return [one for ip in {known!r}.get(name, [host]) for one in real(ip, port, *more, **options)]
socket.getaddrinfo = look_up
"""


BOTH = ["127.0.0.2", "127.0.0.1"]  # of one name: the first is dead


def command(here, *words):
    """The agent's command line, with the same changes; its exit code and output."""
    whole = [*here.agent.COMMAND, *words, *here.agent._options]
    done = subprocess.run(whole, capture_output=True, text=True, env=here.agent._env, timeout=60)
    return done.returncode, done.stdout + done.stderr


class Files:
    """An authority, and PEM files of it and of an identity."""

    def __init__(self, folder, **options):
        self.ca = trustme.CA()
        self.authority, self.own = folder / "authority.pem", folder / "own.pem"
        self.authority.write_bytes(self.ca.cert_pem.bytes())
        self.issue(**options)

    def issue(self, *names, **options):
        identity = self.ca.issue_cert(*(names or ("127.0.0.1",)), **options)
        self.own.write_bytes(identity.private_key_pem.bytes() + identity.cert_chain_pems[0].bytes())
        return identity

    def serving(self, *names):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.issue(*names).configure_cert(context)
        return context

    def asking(self):
        return ssl.create_default_context(cafile=str(self.authority))


# --- imaging devices ---


def _half_an_answer(listener):
    """An archive that hangs in the middle of its A-ASSOCIATE-AC: the header of a PDU of 200 bytes, and no more."""
    held = []
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            held.append(connection)
            connection.recv(65536)
            connection.sendall(b"\x02\x00\x00\x00\x00\xc8\x00\x01\x00\x00")


def test_an_archive_that_hangs_holds_up_no_other(tmp_path):
    """A try ends within its time (README: 9 s), also inside: that time-outs are ours is PS3.8 9.1.5's practice, too.

    Eight pushes to an archive that stops in the middle of a PDU (or stops reading, in the middle of a C-STORE) kept all
    places for pushes to archives for ever: none could be pushed to until the agent was started anew.
    """
    with socket.create_server(("127.0.0.1", 0)) as hanging, Destination() as well, site(tmp_path, {"A": ""}) as here:
        threading.Thread(target=_half_an_answer, args=(hanging,), daemon=True).start()
        port = hanging.getsockname()[1]

        def push(url):
            with here.caller() as caller:
                return caller.push(f"dicom://{url}", ECHO, contentType="application/json")

        assert push(well.address).status == 200
        address = f"OFF@127.0.0.1:{port}?ackTimeoutSecs=1"
        pushing = [threading.Thread(target=push, args=(address,)) for _ in range(8)]
        for thread in pushing:
            thread.start()
        for thread in pushing:
            thread.join()
        answers = [push(well.address) for _ in range(2)]  # the second is 9 s later: long after their time was over
        assert 200 in [answer.status for answer in answers], answers


def test_an_archive_whose_first_address_is_dead(tmp_path):
    """RFC 1123 2.3, RFC 6724 2: where a name has several addresses they are tried in turn, as HL7 pushes do here."""
    with Destination() as archive, dead_address(archive.port), site(tmp_path, {"A": ""}, start=False) as here:
        changed(here.agent, names(archive_hospital_test=BOTH))
        here.agent.start()
        url = f"dicom://{archive.address.split('@')[0]}@archive.hospital.test:{archive.port}"
        with here.caller() as caller:
            answer = caller.push(url, ECHO, contentType="application/json")
        assert answer.status == 200, answer


def test_why_an_archive_with_tls_cannot_be_reached(tmp_path):
    """As with mllps://: `certificate has expired`, and not as if it were unplugged (README: a text with the reason)."""
    files, long_ago = Files(tmp_path), datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    expired = files.ca.issue_cert("127.0.0.1", not_before=long_ago, not_after=long_ago + datetime.timedelta(days=1))
    expired.configure_cert(context)
    with Receiver(context=context) as device, site(tmp_path, {"A": ""}) as here, here.caller() as caller:
        query = f"?caFile={files.authority}"
        assert "certificate has expired" in caller.push(device.url(query, "mllps"), message("WHY")).text
        url = f"dicoms://PACS@127.0.0.1:{device.port}{query}"
        answer = caller.push(url, ECHO, contentType="application/json")
        assert "certificate has expired" in answer.text, answer


# --- names and addresses ---


def test_an_instrument_whose_first_address_is_dead(tmp_path):
    """RFC 1123 2.3: with `role=client` the feed never comes up, although its second address takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as instrument:
        port = instrument.getsockname()[1]
        address = f"tcp://instrument.hospital.test:{port}?mode=astm&role=client"
        with dead_address(port), site(tmp_path, {"LAB": address}, start=False) as here:
            changed(here.agent, names(instrument_hospital_test=BOTH))
            here.agent.start()
            instrument.settimeout(25)
            connection, _ = instrument.accept()
            connection.close()


def test_a_syslog_server_whose_first_address_is_dead(tmp_path):
    """RFC 1123 2.3: no alarm is ever brought to it."""
    files = Files(tmp_path)
    context = files.serving("syslog.hospital.test")
    with socket.create_server(("127.0.0.1", 0)) as syslog, socket.create_server(("127.0.0.1", 0)) as other:
        port = syslog.getsockname()[1]
        config = f'caFile = "{files.authority}"\nalarmTo = "syslog+tls://syslog.hospital.test:{port}"\n'
        channels = {"A": "", "TAKEN": f"mllp://127.0.0.1:{other.getsockname()[1]}"}
        with dead_address(port), site(tmp_path, channels, start=False, config=config) as here:
            changed(here.agent, "m.LOOK_SECS = 0.2" + names(syslog_hospital_test=BOTH))
            here.agent.start(ready=False)
            here.agent.logged("Alarm: port")
            syslog.settimeout(25)
            connection, _ = syslog.accept()
            with context.wrap_socket(connection, server_side=True) as line:
                assert b"ALARM: port" in line.recv(4096)


def test_doctor_and_a_server_whose_first_address_is_dead(tmp_path):
    """RFC 8305: the agent is connected by the second address; `doctor` says FAIL, and that a firewall drops it."""
    with site(tmp_path, {"A": ""}, start=False) as here:
        port = here.sandbox.sandbox.port
        with dead_address(port):
            changed(here.agent, names(server_hospital_test=BOTH))
            here.agent._url = f"http://server.hospital.test:{port}/"
            here.agent.start()
            _, said = command(here, "doctor", here.agent._url, "sandbox-client", "sandbox-secret", "agent-1")
            assert here.sandbox.connected
            assert "FAIL  tcp" not in said, said


def test_names_that_hang_hold_up_nothing_else(tmp_path):
    """A resolver without servers answers after 10 to 30 s (resolv.conf(5): 2 attempts of 5 s each).

    Instruments that are called by name take every thread of the loop's own pool (6 on two cores, 32 at most): a push by
    mllps to an IP address, $fetch-logs, pings, alarms and the server's own name wait behind them.
    """
    files = Files(tmp_path)
    channels = {f"L{n}": f"tcp://lab{n}.slow.test:5000?mode=astm&role=client" for n in range(40)}
    with Receiver(context=files.serving()) as device, site(tmp_path, {"A": ""} | channels, start=False) as here:
        changed(here.agent, names(slow=".slow.test"))
        here.agent.start()
        here.agent.logged("Channel 'L39': ", 20)  # all have been asked for
        with here.caller() as caller:
            answer = caller.push(device.url(f"?caFile={files.authority}", "mllps"), message("NAMES"))
        assert answer.status == 200, answer


def _link_local():
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().split("\n"):
            words = line.split()
            if len(words) == 6 and words[3] == "20":
                return str(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[0]))), words[5]
    return None


@pytest.mark.skipif(_link_local() is None, reason="no interface with an IPv6 link-local address")
def test_link_local_addresses(tmp_path):
    """RFC 4007 11: `fe80::1%eth0` is an address with its zone; both directions end in `Invalid argument`."""
    found = _link_local()
    assert found is not None
    address, zone = found
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind((address, 0, 0, socket.if_nametoindex(zone)))
        listener.listen()
        inbound = free_ports(1)[0]
        with site(tmp_path, {"A": "", "LL": f"mllp://[{address}%{zone}]:{inbound}?enhanced=aa"}, start=False) as here:
            here.agent.start(ready=False)
            here.agent.wait_connected()
            here.agent.logged("started successfully")
            problems = []
            try:
                with socket.create_connection((f"{address}%{zone}", inbound), timeout=5) as device:
                    device.sendall(b"\x0b" + message("LL-IN").encode() + b"\x1c\r")
                    assert b"MSA|AA|LL-IN" in device.recv(4096)
            except OSError as error:
                problems.append(f"listening: {error}")
            with here.caller() as caller:
                url = f"mllp://[{address}%{zone}]:{listener.getsockname()[1]}?ackTimeoutSecs=1"
                answer = caller.push(url, message("LL-OUT"))  # the kernel takes the connection, nobody answers
                if "Invalid argument" in answer.text:
                    problems.append(f"push: {answer.text}")
            assert not problems, problems


# --- TLS ---


def _until(device, plain, wanted):
    """Read TLS from a socket until `wanted` came or the peer ended it; what came."""
    came, (obj, incoming, outgoing) = b"", device
    while wanted not in came:
        try:
            came += obj.read(65536)
        except ssl.SSLWantReadError:
            plain.sendall(outgoing.read())
            if not (chunk := plain.recv(65536)):
                break
            incoming.write(chunk)
        except ssl.SSLZeroReturnError:
            break
    return came


@pytest.mark.parametrize("mode", ["", "&enhanced=aa"])
def test_a_device_that_ends_its_side_hears_its_answer(tmp_path, mode):
    """RFC 8446 6.1: close_notify "does not have any effect on its read side" (unlike TLS 1.2), as RFC 9293 3.6 for TCP.

    So do stunnel before a device that half-closes, socat, and `socket.end(message)` of Node: each message is stored,
    none is ever acknowledged, and the device sends the first one again for ever.
    """
    files = Files(tmp_path)
    with site(tmp_path, {"TLS": f"mllps://127.0.0.1:{{port}}?certFile={files.own}{mode}"}) as here:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = files.asking()
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        tls = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with socket.create_connection(("127.0.0.1", here.ports["TLS"]), timeout=10) as plain:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    plain.sendall(outgoing.read())
                    incoming.write(plain.recv(65536))
            tls.write(b"\x0b" + message("HALF").encode() + b"\x1c\r")
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.unwrap()  # our close_notify; the other side's is not there yet
            plain.sendall(outgoing.read())
            came = _until((tls, incoming, outgoing), plain, b"MSA|AA|HALF")
        here.sandbox.wait_ids("HALF")
        assert b"MSA|AA|HALF" in came, came
        assert "eof_received" not in here.agent.output()


def test_connections_that_say_nothing_count_before_the_handshake(tmp_path):
    """`maxConnections`: device connections at once. Each that only connects costs 0.3 MB (asyncio's TLS buffer) for
    handshakeTimeoutSecs: 3,000 of a scanner took 0.9 GB here, whatever maxConnections said."""
    files = Files(tmp_path)
    address = f"mllps://127.0.0.1:{{port}}?enhanced=aa&maxConnections=5&handshakeTimeoutSecs=300&certFile={files.own}"
    with site(tmp_path, {"TLS": address}) as here, contextlib.ExitStack() as stack:
        silent = []
        for _ in range(60):
            plain = socket.create_connection(("127.0.0.1", here.ports["TLS"]), timeout=5)
            silent.append(stack.enter_context(plain))
            plain.setblocking(False)

        def still_open():
            count = 0
            for plain in silent:
                try:
                    count += plain.recv(1) != b""
                except BlockingIOError:
                    count += 1
                except OSError:
                    pass
            return count

        eventually(lambda: still_open() <= 20, 5, "most of 60 silent connections are closed, of a channel that has 5")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_device_that_connects_for_each_message_takes_no_memory(tmp_path):
    """Many devices open a connection for each message. With TLS each takes 250 KiB, until Python's
    oldest generation is collected: 38 -> 395 MB after 1,500 messages, with one connection open at a time."""
    files = Files(tmp_path)
    channels = {"TLS": f"mllps://127.0.0.1:{{port}}?enhanced=aa&certFile={files.own}"}
    with site(tmp_path, channels, start=False) as here:
        changed(here.agent, "m.LOOK_SECS = 1000")  # which gives freed memory back when nothing has come for a while
        here.agent.start()
        context = files.asking()

        def ask(number):
            plain = socket.create_connection(("127.0.0.1", here.ports["TLS"]), timeout=20)
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as device:
                device.sendall(b"\x0b" + message(f"M{number}", f"P{number}").encode() + b"\x1c\r")
                assert b"MSA|AA" in device.recv(4096)

        for number in range(20):
            ask(number)
        here.agent.forget_peak()
        before = here.agent.memory_kb()
        for number in range(20, 420):
            ask(number)
        assert here.agent.memory_kb() - before < 40_000, "400 connections, one after the other"


ON_A_TERMINAL = """
import ctypes, os, pty, sys
pid, terminal = pty.fork()
if not pid:
    ctypes.CDLL(None).prctl(1, 9)  # ends with us
    os.execv(sys.argv[1], sys.argv[1:])
try:
    while True:
        os.write(1, os.read(terminal, 4096))
except OSError:
    pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the agent is ended by prctl")
@pytest.mark.parametrize("wrapper", [[sys.executable, "-c", ON_A_TERMINAL], []], ids=["terminal", "service"])
def test_a_key_with_a_pass_phrase(tmp_path, wrapper):
    """OpenSSL asks the terminal for it (PEM_def_callback; Python: "OpenSSL's built-in password prompting mechanism").

    With one (`docker run -t`, a shell) a reload stops the whole agent until somebody types: no device is answered.
    Without one the log says `Invalid argument`, which nobody can act on.
    """
    key, cert, both = (tmp_path / name for name in ("key.pem", "cert.pem", "both.pem"))
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-keyout", key, "-out", cert, "-days", "9", "-subj",
         "/CN=agent", "-passout", "pass:secret"], check=True, capture_output=True,
    )  # fmt: skip
    both.write_bytes(cert.read_bytes() + key.read_bytes())
    assert b"ENCRYPTED" in both.read_bytes()
    with site(tmp_path, {"A": "?enhanced=aa", "B": ""}, wrapper=wrapper) as here:
        here.agent.logged("started successfully")
        here.endpoint("B")["address"] = f"mllps://127.0.0.1:{here.ports['B']}?certFile={both}"
        answer = here.sandbox.reload()  # TimeoutError: it asks the terminal
        assert answer["type"] == "agent:error" and "TLS cannot be set up" in answer["body"], answer
        with here.device("A") as device:
            assert device.ask(message("STILL")) == ("AA", "STILL")
        assert re.search("encrypted|pass ?(phrase|word)", here.agent.logged("TLS cannot be set up: ").lower())


UMLAUT = "# Wurzelzertifikat des Universitätsklinikums Köln\n".encode()


def test_authorities_with_a_comment_that_is_not_ascii(tmp_path):
    """RFC 7468 2: data before the boundaries is permitted, and parsers MUST NOT malfunction when processing it."""
    files = Files(tmp_path)
    context = files.serving()
    files.authority.write_bytes(UMLAUT + files.authority.read_bytes())
    with Receiver(context=context) as device, site(tmp_path, {"A": ""}) as here, here.caller() as caller:
        answer = caller.push(device.url(f"?caFile={files.authority}", "mllps"), message("UMLAUT"))
        query = f"certFile={files.own}&clientCa={files.authority}"
        here.endpoint("A")["address"] = f"mllps://127.0.0.1:{here.ports['A']}?{query}"
        reloaded = here.sandbox.reload()
        assert (answer.status, reloaded["type"]) == (200, "agent:reloadconfig:response"), (answer, reloaded)


@pytest.mark.parametrize("kind", ["comment", "der"])
def test_a_ca_file_as_windows_exports_it(tmp_path, kind):
    """RFC 7468 2 (comment), and "DER encoded binary X.509 (.CER)", which certmgr offers first.

    The agent ends with a traceback on stderr, and its log says nothing; so does `doctor`.
    """
    files = Files(tmp_path)
    pem = files.authority.read_text()
    files.authority.write_bytes(UMLAUT + pem.encode() if kind == "comment" else ssl.PEM_cert_to_DER_cert(pem))
    config = f'caFile = "{files.authority}"\n'
    with site(tmp_path, {"A": ""}, start=False, config=config) as here:
        here.agent.start(ready=False)
        if kind == "comment":
            here.agent.wait_connected()
        else:
            assert here.agent.wait_exit() != 0
            assert "caFile" in here.agent.output()
        assert "Traceback" not in here.agent.output(), here.agent.output()[-2000:]


def test_the_alarm_is_about_the_certificate_that_devices_see(tmp_path):
    """A file that certbot renewed is not served before `$reload-config` (README). The alarm is over all the same, and
    `status` and `doctor` say that all is well, until the certificate in use ends and every device turns away."""
    files = Files(tmp_path, not_after=datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=3))
    channels = {"TLS": f"mllps://127.0.0.1:{{port}}?certFile={files.own}", "A": ""}
    with site(tmp_path, channels, start=False) as here:
        changed(here.agent, "m.LOOK_SECS = 0.1")
        here.agent.start()
        here.agent.logged("Alarm: channel 'TLS': its certificate ends")
        files.issue()  # and nobody calls $reload-config
        here.sandbox.bot = lambda transmit: (400, "no")
        with here.device("A") as device:
            device.ask(message("DEAD"))
        here.agent.logged("Alarm: channel 'A' has 1 dead letters")  # by a look at all after that
        plain = socket.create_connection(("127.0.0.1", here.ports["TLS"]), timeout=10)
        with files.asking().wrap_socket(plain, server_hostname="127.0.0.1") as tls:
            served = ssl.cert_time_to_seconds(str(tls.getpeercert()["notAfter"]))
        assert served - time.time() < 4 * 86_400  # the old one is what devices see
        alarms = json.dumps(here.sandbox.stats()["alarms"])
        assert "channel 'TLS': its certificate" in alarms, alarms


# --- the rest ---


def test_validate_knows_that_our_own_port_makes_way(tmp_path):
    """README: `validate` says what a reload would change. Another host with the same port is refused by it, and taken
    by the reload."""
    with site(tmp_path, {"A": ""}) as here:
        here.agent.logged("started successfully")
        here.endpoint("A")["address"] = f"mllp://0.0.0.0:{here.ports['A']}"
        _, said = command(here, "validate")
        assert here.sandbox.reload()["type"] == "agent:reloadconfig:response"
        assert "already in use" not in said, said


@pytest.mark.skipif(sys.platform != "linux", reason="timers are read from /proc")
def test_idle_connections_to_the_server_are_kept_or_closed(tmp_path):
    """Firewalls and load balancers forget idle connections without a word (Azure: 4 minutes, ASA: 1 hour).

    The pool's connections have neither an end nor keep-alive (RFC 9293 3.8.4): a $reload-config over forgotten ones
    took 60 s here (the server waits 5 s), and each of four uploads would wait 120 s.
    """
    with site(tmp_path, {"A": "", "B": ""}) as here:
        here.agent.logged("started successfully")
        here.sandbox.reload()
        wanted = f":{here.sandbox.sandbox.port:04X}"
        process = here.agent.process
        assert process is not None

        def unwatched():
            """Established connections to the server without a timer (proc(5): `tr` is 02 for keep-alive)."""
            rows = [row.split() for row in Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]]
            return [row for row in rows if row[2].endswith(wanted) and row[3] == "01" and row[5][:2] != "02"]

        # the WebSocket has heartbeats of its own
        eventually(lambda: len(unwatched()) <= 1, 3, f"no idle connection without keep-alive: {unwatched()}")


def test_more_ports_than_files_may_be_open_leave_the_reserve(tmp_path):
    """A site with 300 channels under a hard limit of 256: queue, logs and server must not go without."""
    few = ["sh", "-c", 'ulimit -n 200; exec "$@"', "sh"]
    with site(tmp_path, {f"C{n}": "?enhanced=aa" for n in range(150)}, start=False, wrapper=few) as here:
        here.agent.start(ready=False)
        here.agent.wait_connected()
        assert "too many files" in here.agent.logged("cannot be opened")
        here.agent.logged("Channel 'C0' listens")
        with here.device("C0") as device:
            assert device.ask(message("FEW")) == ("AA", "FEW")
        here.sandbox.wait_ids("FEW")


def test_words_of_a_device_are_not_for_the_main_log(tmp_path):
    """An Error Comment (0000,0902) may name the patient: who waits hears it, the log has the status alone."""
    answer = Dataset()
    answer.Status, answer.ErrorComment = 0xA700, "DOE^JANE 19700101 unknown"
    with Destination() as archive, site(tmp_path, {"A": ""}) as here, here.caller() as caller:
        assert archive.server is not None
        archive.server.bind(evt.EVT_C_ECHO, lambda event: answer)
        url = f"dicom://{archive.address}"
        assert "DOE^JANE" in caller.push(url, ECHO, contentType="application/json").text
        caller.store(url, ECHO, contentType="application/json")
        assert "status 0xA700" in here.agent.logged("try 1 failed")
        assert b"DOE^JANE" not in here.agent.main_log()
