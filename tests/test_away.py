"""The server and the way to it while they change: authorities, reasons to close, dates to wait for, clocks."""

import ssl
from pathlib import Path

import trustme

from tests.support import message, site
from tests.test_uplink import works


def server_side(authority: trustme.CA) -> ssl.SSLContext:
    """A server's context with a certificate of this authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context


def test_a_new_authority_in_ca_file_is_trusted_without_a_restart(tmp_path: Path) -> None:
    """A site's authority ends, too: its administrator puts the new one into the file, and the server's side follows."""
    old, new, path = trustme.CA(), trustme.CA(), tmp_path / "ca.pem"
    old.cert_pem.write_to_path(str(path))
    context = server_side(old)
    with site(tmp_path, {"A": "?enhanced=aa"}, context=context, config=f'caFile = "{path}"\n') as here:
        works(here)
        here.sandbox.stop()
        new.issue_cert("127.0.0.1", "localhost").configure_cert(context)
        here.sandbox.start()
        with here.device("A") as device:
            assert device.ask(message("MEANWHILE"))[0] == "AA"
        here.agent.logged("certificate verify failed")
        new.cert_pem.write_to_path(str(path))
        here.sandbox.wait_ids("MEANWHILE", timeout=20)
        assert here.sandbox.reload()["statusCode"] == 200  # which goes by HTTPS
