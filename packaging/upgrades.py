"""Signed upgrades, by The Update Framework (TUF): what `build.py keys`, `release` and `renew` run.

    upgrades.py keys KEYS                                make the keys that KEYS lacks, and a root that names them all
    upgrades.py release DIST REPOSITORY KEYS [PREVIOUS]  sign this version's programs, as the next after PREVIOUS
    upgrades.py renew REPOSITORY KEYS                    a fresh timestamp, so that a repository does not expire

A repository is a flat folder of static files: the assets of a release, or a mirror inside a hospital.

    N.root.json                      whose signatures count, all from the first on: the keys of each sign the next
    timestamp.json                   which snapshot is the newest
    N.snapshot.json, N.targets.json  which programs there are, with size and SHA-256
    medplum-agent-<version>-<system>-<machine>.tar.gz   a program (packages.py), under its plain name
    medplum-agent-<version>.bundle   a tar of all of these, for hospitals without internet

KEYS has root1.pem to root3.pem, two of which make a root and which are otherwise offline, and targets.pem, snapshot.pem
and timestamp.pem, which releases need. All are Ed25519: an agent has no library that could check anything else. The
environment variable MEDPLUM_AGENT_PASSPHRASE encrypts and opens them.
"""

import datetime
import io
import os
import re
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from binary import UPGRADE_ROOT, commit_time
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from packages import PackageError, archive, version
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import DeserializationError

PASSPHRASE = "MEDPLUM_AGENT_PASSPHRASE"
ROOT_KEYS, ROOT_THRESHOLD = ("root1", "root2", "root3"), 2  # one may be lost, and one stolen alone is worth nothing
ROLES = ("targets", "snapshot", "timestamp")  # each with a key of its own: whoever only renews needs only the last

ROOT_DAYS = 730  # people with keys in safes meet again within two years; agents older than that take the chain
TARGETS_DAYS = SNAPSHOT_DAYS = 365  # a release stays one, but not for ever where nobody looks after it any more
TIMESTAMP_DAYS = 90  # how long somebody in between can hide a release from a site, and how long a bundle is good

TARGET = re.compile(r"medplum-agent-(\d+\.\d+\.\d+(?:-[0-9a-z]{7})?)-(?:linux|macos|windows)-[a-z0-9_]+\.tar\.gz")


Role = TypeVar("Role", Targets, Snapshot, Timestamp)


class UpgradeError(Exception):
    """Text for the person who releases."""


class State(NamedTuple):
    """What a repository says now, in the order in which each vouches for the next."""

    roots: tuple[Metadata[Root], ...]  # from the first on
    timestamp: Timestamp
    snapshot: Snapshot
    targets: Targets


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


# --- keys ---


def signer(path: Path) -> CryptoSigner:
    try:
        pem = path.read_bytes()
        passphrase = os.environ.get(PASSPHRASE, "").encode() if b"ENCRYPTED" in pem else None
        key = load_pem_private_key(pem, passphrase)
    except OSError as error:
        raise UpgradeError(f"the key {path} cannot be read: {error.strerror}") from None
    except (TypeError, ValueError):
        raise UpgradeError(f"{path} is not a key that {PASSPHRASE} opens") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UpgradeError(f"{path} is not an Ed25519 key, and agents can check no other")
    return CryptoSigner(key)


def write_key(path: Path, made: CryptoSigner) -> None:
    passphrase = os.environ.get(PASSPHRASE, "").encode()
    closed: KeySerializationEncryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    key = load_pem_private_key(made.private_bytes, None)
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, closed))


def keys(folder: Path, root_file: Path = UPGRADE_ROOT, now: datetime.datetime | None = None) -> str:
    """The ceremony, and every later change: keys that `folder` lacks are made, and a root that names all of them.

    Where there is a root, this is its next version, which two of its keys must sign, too, or nothing is written. One
    that shall go, but is needed for that, lies in the folder under another name, such as root1.old.pem.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    paths = {name: folder / f"{name}.pem" for name in (*ROOT_KEYS, *ROLES)}
    missing = {name: CryptoSigner.generate_ed25519() for name, path in paths.items() if not path.exists()}
    named = {name: missing.get(name) or signer(path) for name, path in paths.items()}
    before = read_root(root_file.read_bytes()) if root_file.exists() else None
    root = Root(before.signed.version + 1 if before else 1, expires=(now or utc_now()) + datetime.timedelta(ROOT_DAYS))
    for name, one in named.items():
        root.add_key(one.public_key, "root" if name in ROOT_KEYS else name)
    root.roles["root"].threshold = ROOT_THRESHOLD
    signed = Metadata(root)
    known = {*root.roles["root"].keyids, *(before.signed.roles["root"].keyids if before else ())}
    for one in (*missing.values(), *map(signer, sorted(folder.glob("*.pem")))):
        if one.public_key.keyid in known:
            signed.sign(one, append=True)
    check_successor(before or signed, signed)
    for name, made in missing.items():
        write_key(paths[name], made)
    root_file.write_bytes(signed.to_bytes())
    return (
        f"{root_file.name} is version {root.version}, good until {root.expires:%Y-%m-%d}; made: "
        f"{', '.join(missing) or 'no key'}. Commit it, and keep the root keys apart from each other and offline."
    )


def online(folder: Path, root: Root, *names: str) -> dict[str, CryptoSigner]:
    """The keys of these roles, as the root names them."""
    found = {name: signer(folder / f"{name}.pem") for name in names}
    for name, one in found.items():
        if one.public_key.keyid not in root.roles[name].keyids:
            raise UpgradeError(f"{name}.pem is not the key that version {root.version} of the root names")
    return found


# --- reading what is there, trusting none of it ---


def read_root(content: bytes) -> Metadata[Root]:
    return Metadata[Root].from_bytes(content)


def check_successor(before: Metadata[Root], after: Metadata[Root]) -> None:
    """A root counts when enough keys of the one before and of its own have signed it."""
    for judge in (before, after):
        judge.signed.verify_delegate("root", after.signed_bytes, after.signatures)


def root_files(folder: Path) -> list[Path]:
    found = {int(path.name.split(".")[0]): path for path in folder.glob("*.root.json")}
    return [found[number] for number in sorted(found)]


def read_roots(folder: Path, root_file: Path) -> tuple[Metadata[Root], ...]:
    """The chain in `folder`, and behind it the root that is shipped with the program, where that is newer."""
    if not root_file.exists():
        raise UpgradeError(f"no {root_file.name}: whose signatures count is settled once, by upgrades.py keys")
    shipped, roots = read_root(root_file.read_bytes()), [read_root(path.read_bytes()) for path in root_files(folder)]
    if len(roots) < shipped.signed.version:
        roots.append(shipped)
    if [root.signed.version for root in roots] != list(range(1, shipped.signed.version + 1)) or roots[-1] != shipped:
        raise UpgradeError(f"the roots in {folder} do not lead to version {shipped.signed.version}, which is shipped")
    for before, after in zip(roots[:1] + roots, roots, strict=False):
        check_successor(before, after)
    return tuple(roots)


def newest_root(folder: Path, roots: tuple[Metadata[Root], ...]) -> Root:
    """Of those in the folder itself; the one that is shipped may be newer."""
    return roots[len(root_files(folder)) - 1].signed


def read_state(folder: Path, root_file: Path) -> State:
    """RepositoryError unless everything is signed by those whom the folder's own newest root names."""
    roots = read_roots(folder, root_file)
    judge = newest_root(folder, roots)
    content = (folder / "timestamp.json").read_bytes()
    timestamp = Metadata[Timestamp].from_bytes(content)
    judge.verify_delegate("timestamp", timestamp.signed_bytes, timestamp.signatures)
    listed = timestamp.signed.snapshot_meta
    content = (folder / f"{listed.version}.snapshot.json").read_bytes()
    listed.verify_length_and_hashes(content)
    snapshot = Metadata[Snapshot].from_bytes(content)
    judge.verify_delegate("snapshot", snapshot.signed_bytes, snapshot.signatures)
    listed = snapshot.signed.meta["targets.json"]
    content = (folder / f"{listed.version}.targets.json").read_bytes()
    listed.verify_length_and_hashes(content)
    targets = Metadata[Targets].from_bytes(content)
    judge.verify_delegate("targets", targets.signed_bytes, targets.signatures)
    return State(roots, timestamp.signed, snapshot.signed, targets.signed)


def first_state(root_file: Path, folder: Path) -> State:
    """Before the first release: version 0 of everything."""
    state = State(read_roots(folder, root_file), Timestamp(), Snapshot(), Targets())
    for role in state[1:]:
        role.version = 0
    return state


# --- writing ---


def release(
    dist: Path, repository: Path, keys: Path, previous: Path | None = None, *,
    name: str = "", root_file: Path = UPGRADE_ROOT, now: datetime.datetime | None = None,
) -> str:  # fmt: skip
    """Sign the programs of one version, `name`, that are in `dist`: its archives, or the compiled folder.

    `previous`: the repository so far, without which this is the first release. Its programs stay listed, wherever their
    files are; a program that was released never changes. Where `repository` itself is the one so far, it is extended.
    """
    name = name or version()
    if previous is None and (repository / "timestamp.json").exists():
        previous = repository
    state = read_state(previous, root_file) if previous else first_state(root_file, repository)
    signers = online(keys, state.roots[-1].signed, *ROLES)
    if (dist / "medplum-agent").is_dir():
        archive(dist / "medplum-agent", dist, dist)
    programs = sorted(path for path in dist.iterdir() if is_of(path.name, name))
    if not programs:
        raise UpgradeError(f"no program of version {name} in {dist}; run: python3 build.py binary")
    repository.mkdir(parents=True, exist_ok=True)
    for path in programs:
        target = TargetFile.from_file(path.name, str(path))
        if state.targets.targets.setdefault(path.name, target).hashes != target.hashes:
            raise UpgradeError(f"{path.name} was released with other content: a change needs a new version")
        if path.parent != repository:
            (repository / path.name).write_bytes(path.read_bytes())
    publish(repository, state, signers, now or utc_now())
    bundle = write_bundle(repository, name)
    first = "" if previous else " The first release: agents that know an older one would refuse it."
    return f"{bundle.name}: {len(programs)} programs, {validity(state)}.{first}"


def publish(repository: Path, state: State, signers: Mapping[str, CryptoSigner], now: datetime.datetime) -> None:
    """Write the next version of all three roles, the timestamp last: a mirror may copy while we write."""
    roots, timestamp, snapshot, targets = state
    for root in roots:
        (repository / f"{root.signed.version}.root.json").write_bytes(root.to_bytes())
    content = signed(targets, signers["targets"], now, TARGETS_DAYS)
    (repository / f"{targets.version}.targets.json").write_bytes(content)
    snapshot.meta["targets.json"] = MetaFile.from_data(targets.version, content, ["sha256"])
    content = signed(snapshot, signers["snapshot"], now, SNAPSHOT_DAYS)
    (repository / f"{snapshot.version}.snapshot.json").write_bytes(content)
    timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, content, ["sha256"])
    (repository / "timestamp.json").write_bytes(signed(timestamp, signers["timestamp"], now, TIMESTAMP_DAYS))


def signed(role: Role, by: CryptoSigner, now: datetime.datetime, days: int) -> bytes:
    """The next version of a role, good for so many days."""
    role.version += 1
    role.expires = now + datetime.timedelta(days)
    metadata: Metadata[Role] = Metadata(role)
    metadata.sign(by)
    return metadata.to_bytes()


def is_of(file: str, name: str) -> bool:
    """Whether this is a program of the version, of whichever commit."""
    found = TARGET.fullmatch(file)
    return found is not None and name in (found[1], found[1].partition("-")[0])


def write_bundle(repository: Path, name: str) -> Path:
    """Metadata first, without what newer metadata replaced."""
    timestamp = Metadata[Timestamp].from_file(str(repository / "timestamp.json")).signed
    number = timestamp.snapshot_meta.version
    snapshot = Metadata[Snapshot].from_file(str(repository / f"{number}.snapshot.json")).signed
    current = (f"{number}.snapshot.json", f"{snapshot.meta['targets.json'].version}.targets.json", "timestamp.json")
    files = [*root_files(repository), *(repository / file for file in current)]
    files += sorted(path for path in repository.iterdir() if is_of(path.name, name))
    bundle, seconds = repository / f"medplum-agent-{name}.bundle", int(commit_time())
    with tarfile.open(bundle, "w") as tar:
        for path in files:
            member = tarfile.TarInfo(path.name)
            member.size, member.mtime, member.mode = path.stat().st_size, seconds, 0o644
            tar.addfile(member, io.BytesIO(path.read_bytes()))
    return bundle


def renew(repository: Path, keys: Path, root_file: Path = UPGRADE_ROOT, now: datetime.datetime | None = None) -> str:
    """A fresh timestamp, also in the bundles that are there; all else stays as it was signed.

    The key is the one that the repository's own root names: a newer root comes with the next release.
    """
    state = read_state(repository, root_file)
    root = newest_root(repository, state.roots)
    signers = online(keys, root, "timestamp")
    content = signed(state.timestamp, signers["timestamp"], now or utc_now(), TIMESTAMP_DAYS)
    others = min(part.expires for part in (root, state.snapshot, state.targets))
    if others < state.timestamp.expires:
        raise UpgradeError(f"root, snapshot or targets end on {others:%Y-%m-%d}: change keys, or release, before that")
    (repository / "timestamp.json").write_bytes(content)
    for bundle in repository.glob("medplum-agent-*.bundle"):
        write_bundle(repository, bundle.stem.removeprefix("medplum-agent-"))
    return f"{validity(state)}."


def validity(state: State) -> str:
    return f"timestamp {state.timestamp.version}, good until {state.timestamp.expires:%Y-%m-%d}"


# How many folders each takes.
VERBS: dict[str, tuple[Callable[..., str], tuple[int, ...]]] = {
    "keys": (keys, (1,)), "release": (release, (3, 4)), "renew": (renew, (2,)),
}  # fmt: skip


def main(verb: str = "", *folders: str) -> int:
    call, counts = VERBS.get(verb, (keys, ()))
    if len(folders) not in counts:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(call(*(Path(folder).resolve() for folder in folders)))
    except (UpgradeError, PackageError) as error:
        print(f"upgrades.py: {error}", file=sys.stderr)
    except (RepositoryError, DeserializationError, OSError) as error:
        print(f"upgrades.py: the root or the repository so far cannot be used: {error}", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
