"""Channels that listen with TLS: HL7, byte streams and ASTM; DICOM's own is in test_dicom.py."""

import contextlib
import json
import socket
import ssl
import struct

import pytest
import trustme

from tests.support import Receiver, acknowledgment, eventually, message, site


class Identities:
    """A certificate for the agent, devices that it may know, and files with all that."""

    def __init__(self, folder):
        self.ca, self.foreign = trustme.CA(), trustme.CA()
        self.server, self.ca_file = folder / "server.pem", folder / "ca.pem"
        self.ca.cert_pem.write_to_path(str(self.ca_file))
        self.issue()

    def issue(self):
        """A new certificate in the same file."""
        certificate = self.ca.issue_cert("127.0.0.1")
        self.server.write_bytes(certificate.private_key_pem.bytes() + certificate.cert_chain_pems[0].bytes())
        return certificate.cert_chain_pems[0].bytes()

    def client(self, identity=None):
        context = ssl.create_default_context()
        self.ca.configure_trust(context)
        if identity is not None:
            identity.issue_cert("device@example.test").configure_cert(context)
        return context


@pytest.fixture(scope="module")
def identities(tmp_path_factory):
    return Identities(tmp_path_factory.mktemp("identities"))


RAW = "tcp://127.0.0.1:{port}?startChar=%02&endChar=%03"


@pytest.fixture(scope="module")
def here(identities, tmp_path_factory):
    own = f"certFile={identities.server}"
    channels = {
        "ADT": f"mllps://127.0.0.1:{{port}}?enhanced=aa&handshakeTimeoutSecs=1&{own}",
        "KNOWN": f"mllps://127.0.0.1:{{port}}?enhanced=aa&clientCa={identities.ca_file}&{own}",
        "RAW": f"tcp://127.0.0.1:{{port}}?startChar=%02&endChar=%03&autoRespond=%02:%06&tls=true&{own}",
    }
    with site(tmp_path_factory.mktemp("tls-site"), channels) as here:
        yield here


def dial(here, channel, context):
    plain = socket.create_connection(("127.0.0.1", here.ports[channel]), timeout=10)
    try:
        return context.wrap_socket(plain, server_hostname="127.0.0.1")
    except OSError:
        plain.close()
        raise


def ask(device, text):
    device.sendall(b"\x0b" + text.encode() + b"\x1c\r")
    answer = b""
    while not answer.endswith(b"\x1c\r"):
        chunk = device.recv(65536)
        assert chunk, "the agent closed"
        answer += chunk
    return acknowledgment(answer[1:-2].decode())


def test_hl7_over_tls(here, identities):
    with dial(here, "ADT", identities.client()) as device:
        assert device.version() in ("TLSv1.2", "TLSv1.3")
        for number in range(3):
            assert ask(device, message(f"TLS-{number}")) == ("AA", f"TLS-{number}")
        assert ask(device, message("TLS-BIG", "OBX|1|TX|||" + "x" * 1_000_000)) == ("AA", "TLS-BIG")
    here.sandbox.wait_ids("TLS-0", "TLS-1", "TLS-2", "TLS-BIG")


def test_a_byte_stream_over_tls(here, identities):
    with dial(here, "RAW", identities.client()) as device:
        device.sendall(b"\x02hello\x03")
        assert device.recv(1) == b"\x06"


def test_a_client_certificate_is_wanted(here, identities):
    with dial(here, "KNOWN", identities.client(identities.ca)) as device:
        assert ask(device, message("TLS-KNOWN")) == ("AA", "TLS-KNOWN")
    for stranger in (None, identities.foreign):
        with pytest.raises((OSError, AssertionError)), dial(here, "KNOWN", identities.client(stranger)) as device:
            ask(device, message("TLS-STRANGER"))
    assert "TLS failed" in here.agent.logged("TLS failed: ")
    assert "TLS-STRANGER" not in str(here.sandbox.sandbox.transmits)


def test_plain_text_and_silence_get_nothing(here):
    for words in (b"\x0b" + message("TLS-PLAIN").encode() + b"\x1c\r", b""):
        with socket.create_connection(("127.0.0.1", here.ports["ADT"]), timeout=10) as device:
            device.sendall(words)
            try:
                assert not device.recv(100).startswith(b"\x0b")
                while device.recv(100):
                    pass
            except ConnectionError:
                pass
    assert "TLS-PLAIN" not in str(here.sandbox.sandbox.transmits)


@pytest.mark.filterwarnings("ignore:.*TLSv1_1 is deprecated:DeprecationWarning")
def test_the_log_says_who_could_not_connect_and_why(here, identities, tmp_path):
    port, silent = here.ports["ADT"], socket.create_connection(("127.0.0.1", here.ports["ADT"]))
    old = identities.client()
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    for context in (old, ssl.create_default_context()):  # the other does not know our authority
        with pytest.raises(OSError):
            dial(here, "ADT", context)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.sendall(b"\x0b" + message("TLS-NONE").encode() + b"\x1c\r")
        with contextlib.suppress(ConnectionError):
            plain.recv(100)
    for words in ("the device speaks no TLS newer", "does not trust the authority", "does not speak TLS", "within 1 s"):
        assert "Channel 'ADT': 127.0.0.1 could not connect: TLS failed: " in here.agent.logged(words)
    silent.close()


@pytest.mark.parametrize("address", ["mllp://127.0.0.1:{port}", "tcp://127.0.0.1:{port}?mode=astm", RAW])
def test_a_device_that_speaks_tls_where_it_is_not_spoken(tmp_path, address):
    with site(tmp_path, {"A": address}) as here:
        here.agent.logged("Medplum service started")
        with pytest.raises(OSError):
            dial(here, "A", ssl.create_default_context())
        assert "Channel 'A': 127.0.0.1:" in here.agent.logged(" speaks TLS, and this does not")
        assert not here.sandbox.sandbox.transmits


def test_a_reset_in_the_handshake_leaves_the_channel_alone(here, identities):
    device = socket.create_connection(("127.0.0.1", here.ports["ADT"]))
    device.sendall(b"\x16\x03\x01\x02\x00\x01")
    device.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    device.close()
    with dial(here, "ADT", identities.client()) as device:
        assert ask(device, message("TLS-AFTER")) == ("AA", "TLS-AFTER")


def test_a_reload_takes_a_renewed_certificate(here, identities):
    renewed = identities.issue()
    here.sandbox.reload()

    def presented():
        with dial(here, "ADT", identities.client()) as device:
            return ssl.DER_cert_to_PEM_cert(device.getpeercert(binary_form=True)).encode()

    assert presented().split() == renewed.split()


def test_a_reload_turns_tls_off_and_on(here, identities):
    endpoint = here.endpoint("RAW")
    before = endpoint["address"]
    try:
        endpoint["address"] = before.partition("&tls=true")[0]
        here.sandbox.reload()
        with socket.create_connection(("127.0.0.1", here.ports["RAW"]), timeout=10) as device:
            device.sendall(b"\x02plain\x03")
            assert device.recv(1) == b"\x06"
    finally:
        endpoint["address"] = before
        here.sandbox.reload()
    test_a_byte_stream_over_tls(here, identities)


def test_a_channel_that_ends_while_a_device_waits_says_nothing_of_its_own(identities, tmp_path):
    """asyncio's warning `returning true from eof_received()` stood in the service's journal, no JSON and no help."""
    with site(tmp_path, {"ADT": f"mllps://127.0.0.1:{{port}}?certFile={identities.server}"}) as here:
        here.sandbox.faults.silent = True
        with dial(here, "ADT", identities.client()) as device:
            device.sendall(b"\x0b" + message("WAITS").encode() + b"\x1c\r")
            here.sandbox.wait_ids("WAITS")
            here.endpoint("ADT")["status"] = "off"
            here.sandbox.reload()
            assert device.recv(1) == b""
        assert "eof_received" not in here.agent.output()


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("", "needs certFile"),
        ("?certFile=/nowhere/own.pem", "TLS cannot be set up"),
        ("?certFile={ca}", "TLS cannot be set up"),
        ("?certFile={own}&clientCa=/nowhere/ca.pem", "TLS cannot be set up"),
        ("?tls=false&clientCa={ca}", "clientCa would do nothing without TLS"),
        ("serial:///dev/ttyNONE?mode=astm&tls=true&certFile={own}", "a serial line has no TLS"),
    ],
)
def test_what_cannot_be_safe_does_not_start(here, identities, query, complaint):
    endpoint = here.endpoint("ADT")
    before = endpoint["address"]
    bad = query.format(ca=identities.ca_file, own=identities.server)
    scheme = "mllp" if "tls=false" in bad else "mllps"
    try:
        endpoint["address"] = bad if "://" in bad else f"{scheme}://127.0.0.1:{here.ports['ADT']}{bad}"
        answer = here.sandbox.reload()
        assert answer["type"] == "agent:error", json.dumps(answer)
        assert complaint in answer["body"] and "/nowhere" not in answer["body"] and "No such" not in answer["body"]
        if "/nowhere" in bad:  # the cloud is not told what files there are
            here.agent.logged("No such file")
    finally:
        endpoint["address"] = before
    eventually(lambda: here.sandbox.reload()["type"] == "agent:reloadconfig:response")


def test_an_intermediate_authority_alone_is_trusted(identities, tmp_path):
    """clientCa names those whose certificates it signed, and not the whole hospital: no root has to be there."""
    root = trustme.CA()
    middle = root.create_child_ca()
    authority = tmp_path / "middle.pem"
    authority.write_bytes(middle.cert_pem.bytes())
    known = f"mllps://127.0.0.1:{{port}}?enhanced=aa&certFile={identities.server}&clientCa={authority}"
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    middle.issue_cert("127.0.0.1").configure_cert(served)
    with site(tmp_path, {"KNOWN": known}) as here, here.caller() as caller:
        with dial(here, "KNOWN", identities.client(middle)) as device:
            assert ask(device, message("TLS-MIDDLE")) == ("AA", "TLS-MIDDLE")
        with pytest.raises((OSError, AssertionError)), dial(here, "KNOWN", identities.client(root)) as device:
            ask(device, message("TLS-ROOT"))
        with Receiver(context=served) as device:
            assert caller.push(device.url(f"?caFile={authority}", "mllps"), message("TLS-PUSH")).status == 200
