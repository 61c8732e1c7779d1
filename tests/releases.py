"""Signed repositories of releases for tests, made by packaging/upgrades.py with keys that are thrown away."""

import functools
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import packages
import upgrades


class Keys(NamedTuple):
    folder: Path
    root: Path  # the file that names them, as it is shipped with the program


class Repository(NamedTuple):
    folder: Path
    root: bytes  # what a program must have been shipped with to trust it
    bundles: dict[str, Path]  # by version


@functools.cache
def throw_away_keys(name: str = "ours") -> Keys:
    """Made once for each process; another name gives other keys and another root."""
    holder = tempfile.TemporaryDirectory(prefix="medplum-agent-keys-")
    _HOLDERS.append(holder)
    keys = Keys(Path(holder.name, "keys"), Path(holder.name, "upgrade-root.json"))
    upgrades.keys(keys.folder, keys.root)
    return keys


_HOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def make_repository(
    folder: Path,
    programs: Mapping[str, Path],
    *,
    age_days: float = 0,
    strangers: Collection[str] = (),
    keys: Keys | None = None,
) -> Repository:
    """Release these program folders, by version, one after the other, for this system and machine, into `folder`.

    Called again for the same folder it goes on: versions of metadata rise, what was released stays listed. All is
    signed as if it were `age_days` ago: the timestamp is good for 90 days, snapshot and targets for 365. `strangers`
    are roles ("targets", "snapshot", "timestamp") that keys sign which the root does not name.
    """
    keys = keys or throw_away_keys()
    now = upgrades.utc_now() - timedelta(age_days)
    folder.mkdir(parents=True, exist_ok=True)
    bundles = {}
    for version, program in programs.items():
        packages.pack(program, folder / packages.archive_name(version))
        upgrades.release(folder, folder, keys.folder, name=version, root_file=keys.root, now=now)
        if strangers:
            state = upgrades.read_state(folder, keys.root)
            holders = {role: throw_away_keys("strangers") if role in strangers else keys for role in upgrades.ROLES}
            signers = {role: upgrades.signer(holder.folder / f"{role}.pem") for role, holder in holders.items()}
            upgrades.publish(folder, state, signers, now)
            upgrades.write_bundle(folder, version)
        bundles[version] = folder / f"medplum-agent-{version}.bundle"
    return Repository(folder, keys.root.read_bytes(), bundles)


@contextmanager
def served(folder: Path, *, mislabelled: bool = False) -> Iterator[str]:
    """A mirror: the folder at an address of this machine, which ends in a slash."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def end_headers(self) -> None:
            if mislabelled and self.path.endswith(".tar.gz"):  # some servers take the name for an encoding
                self.send_header("Content-Encoding", "gzip")
            super().end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
