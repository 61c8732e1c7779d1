"""Signed upgrades: what packaging/upgrades.py makes, judged by the client of TUF's own reference implementation."""

import datetime
import json
import os
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import binary
import packages
import pytest
import upgrades
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata, Root
from tuf.ngclient import Updater, UpdaterConfig

from tests.releases import Keys, Repository, make_repository, served, throw_away_keys
from tests.support import ROOT

OLD, NEW = "5.3.0", "5.4.0"
TARGETS = {version: packages.archive_name(version) for version in (OLD, NEW)}


@pytest.fixture
def program(tmp_path: Path) -> Path:
    folder = tmp_path / "program"
    (folder / "certifi").mkdir(parents=True)
    (folder / "medplum-agent").write_text("#!/bin/sh\n")
    (folder / "certifi/cacert.pem").write_text("certificates\n")
    return folder


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """For tests that change them."""
    made = Keys(tmp_path / "keys", tmp_path / "upgrade-root.json")
    upgrades.keys(made.folder, made.root)
    return made


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Any]:
    """Asks a repository as an agent does, and remembers between two calls what it saw; the target's bytes."""
    memory = tmp_path / "memory"
    memory.mkdir()

    def ask(repository: Path, root: bytes, version: str) -> bytes | None:
        with served(repository) as address:
            updater = Updater(
                str(memory), address, str(memory), address, config=UpdaterConfig(prefix_targets_with_hash=False),
                bootstrap=root,
            )  # fmt: skip
            target = updater.get_targetinfo(TARGETS[version])
            return Path(updater.download_target(target)).read_bytes() if target else None

    yield ask


# --- what a client accepts ---


def test_each_release_is_accepted_and_the_older_one_stays_listed(client: Any, program: Path, tmp_path: Path) -> None:
    folder, root, _ = make_repository(tmp_path / "repository", {OLD: program})
    assert client(folder, root, OLD) == (folder / TARGETS[OLD]).read_bytes()
    assert client(folder, root, NEW) is None
    (program / "medplum-agent").write_text("#!/bin/sh\n# new\n")
    make_repository(folder, {NEW: program})
    assert client(folder, root, NEW) == (folder / TARGETS[NEW]).read_bytes()
    assert client(folder, root, OLD) == (folder / TARGETS[OLD]).read_bytes()


def test_a_release_of_its_own_folder_goes_on_where_the_previous_one_was(
    client: Any, program: Path, tmp_path: Path
) -> None:
    """As on a forge: each release's assets are a whole repository, but for the programs of older ones."""
    first, root, _ = make_repository(tmp_path / "first", {OLD: program})
    dist, second, keys = tmp_path / "dist", tmp_path / "second", throw_away_keys()
    dist.mkdir()
    packages.pack(program, dist / TARGETS[NEW])
    (dist / TARGETS[OLD]).write_text("a leftover of other days")
    said = upgrades.release(dist, second, keys.folder, first, name=NEW, root_file=keys.root)
    assert said.startswith(f"medplum-agent-{NEW}.bundle: 1 programs, timestamp 2, ")
    assert {path.name for path in second.iterdir()} == {
        "1.root.json", "timestamp.json", "2.snapshot.json", "2.targets.json", TARGETS[NEW],
        f"medplum-agent-{NEW}.bundle",
    }  # fmt: skip
    assert client(first, root, OLD) and client(second, root, NEW)
    with pytest.raises(DownloadError):
        client(second, root, OLD)
    assert set(upgrades.read_state(second, keys.root).targets.targets) == set(TARGETS.values())


def test_a_bundle_is_a_whole_repository(client: Any, program: Path, tmp_path: Path) -> None:
    _, root, bundles = make_repository(tmp_path / "repository", {OLD: program, NEW: program})
    with tarfile.open(bundles[NEW], "r:") as bundle:
        assert bundle.getnames() == [
            "1.root.json", "2.snapshot.json", "2.targets.json", "timestamp.json", TARGETS[NEW],
        ]  # fmt: skip
        assert {(member.mode, member.uid, member.mtime) for member in bundle} == {
            (0o644, 0, int(binary.commit_time())),
        }  # fmt: skip
        bundle.extractall(tmp_path / "carried", filter="data")
    assert client(tmp_path / "carried", root, NEW)


def test_an_archive_holds_the_program_with_modes_and_nothing_of_the_machine(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for number, mask in enumerate((0o022, 0o077)):
        monkeypatch.setattr("time.time", lambda day=number: 1_800_000_000.0 + day * 86400)
        (tmp_path / str(number)).mkdir()
        before = os.umask(mask)
        try:
            made.append(packages.pack(program, tmp_path / str(number) / TARGETS[OLD]))
        finally:
            os.umask(before)
        for path in program.rglob("*"):
            os.utime(path, (1_700_000_000, 1_700_000_000))
            path.chmod(0o700)
    assert made[0].read_bytes() == made[1].read_bytes()
    with tarfile.open(made[0]) as tar:
        members = {member.name: (member.mode, member.uid, member.uname, member.mtime) for member in tar}
    seconds = int(binary.commit_time())
    assert members == {
        "medplum-agent": (0o755, 0, "", seconds), "medplum-agent/medplum-agent": (0o755, 0, "", seconds),
        "medplum-agent/certifi": (0o755, 0, "", seconds), "medplum-agent/certifi/cacert.pem": (0o644, 0, "", seconds),
    }  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_an_archive_with_a_link_is_not_made(program: Path, tmp_path: Path) -> None:
    (program / "link").symlink_to("certifi")
    with pytest.raises(packages.PackageError, match="link"):
        packages.pack(program, tmp_path / TARGETS[OLD])


def test_the_compiled_folder_needs_no_archive(program: Path, tmp_path: Path) -> None:
    keys, name = throw_away_keys(), packages.version()
    program.rename(tmp_path / "medplum-agent")
    upgrades.release(tmp_path, tmp_path / "repository", keys.folder, root_file=keys.root)
    assert (tmp_path / "repository" / packages.archive_name(name)).exists()


# --- what a client refuses ---


@pytest.mark.parametrize("role", upgrades.ROLES)
def test_a_stranger_signs(client: Any, program: Path, tmp_path: Path, role: str) -> None:
    folder, root, _ = make_repository(tmp_path / "repository", {OLD: program}, strangers=[role])
    with pytest.raises(UnsignedMetadataError):
        client(folder, root, OLD)


def test_another_root(client: Any, program: Path, tmp_path: Path) -> None:
    folder, _, _ = make_repository(tmp_path / "repository", {OLD: program})
    with pytest.raises(UnsignedMetadataError):
        client(folder, throw_away_keys("strangers").root.read_bytes(), OLD)


def test_a_timestamp_that_ended(client: Any, program: Path, tmp_path: Path) -> None:
    folder, root, _ = make_repository(tmp_path / "repository", {OLD: program}, age_days=91)
    with pytest.raises(ExpiredMetadataError, match="timestamp"):
        client(folder, root, OLD)


def test_a_root_that_one_key_signed(client: Any, program: Path, tmp_path: Path, keys: Keys) -> None:
    folder, root, _ = make_repository(tmp_path / "repository", {OLD: program}, keys=keys)
    lonely = Metadata[Root].from_bytes(root)
    lonely.signed.version = 2
    lonely.sign(upgrades.signer(keys.folder / "root1.pem"))
    lonely.to_file(str(folder / "2.root.json"))
    with pytest.raises(UnsignedMetadataError, match="1/2"):
        client(folder, root, OLD)


def test_an_older_repository_played_again(client: Any, program: Path, tmp_path: Path) -> None:
    before, root, _ = make_repository(tmp_path / "before", {OLD: program})
    assert client(before, root, OLD)
    after, _, _ = make_repository(tmp_path / "after", {OLD: program, NEW: program})
    assert client(after, root, NEW)
    with pytest.raises(BadVersionNumberError):
        client(before, root, OLD)


@pytest.mark.parametrize("longer", [True, False])
def test_another_program_under_the_name(client: Any, program: Path, tmp_path: Path, longer: bool) -> None:
    folder, root, _ = make_repository(tmp_path / "repository", {OLD: program})
    content = bytearray((folder / TARGETS[OLD]).read_bytes())
    content[-1] ^= 1
    (folder / TARGETS[OLD]).write_bytes(content + b"more" * longer)
    with pytest.raises((LengthOrHashMismatchError, DownloadError)):
        client(folder, root, OLD)


# --- renewing, and changing keys ---


def test_a_fresh_timestamp_needs_one_key_and_reaches_the_bundle(
    client: Any, program: Path, tmp_path: Path, keys: Keys
) -> None:
    folder, root, bundles = make_repository(tmp_path / "repository", {OLD: program}, age_days=91, keys=keys)
    for path in keys.folder.iterdir():
        if path.name != "timestamp.pem":
            path.unlink()
    assert upgrades.renew(folder, keys.folder, keys.root).startswith("timestamp 2, good until ")
    assert client(folder, root, OLD)
    with tarfile.open(bundles[OLD]) as bundle:
        bundle.extractall(tmp_path / "carried", filter="data")
    assert client(tmp_path / "carried", root, OLD)


def test_a_fresh_timestamp_does_not_outlive_what_it_vouches_for(program: Path, tmp_path: Path, keys: Keys) -> None:
    folder, _, _ = make_repository(tmp_path / "repository", {OLD: program}, age_days=300, keys=keys)
    before = (folder / "timestamp.json").read_bytes()
    with pytest.raises(upgrades.UpgradeError, match="change keys, or release"):
        upgrades.renew(folder, keys.folder, keys.root)
    assert (folder / "timestamp.json").read_bytes() == before


def test_lost_and_stolen_keys_are_replaced_and_old_agents_follow(
    client: Any, program: Path, tmp_path: Path, keys: Keys
) -> None:
    folder, root, _ = make_repository(tmp_path / "repository", {OLD: program}, keys=keys)
    assert client(folder, root, OLD)
    stolen = {name: upgrades.signer(keys.folder / f"{name}.pem") for name in upgrades.ROLES}
    for name in ("root3", *upgrades.ROLES):
        (keys.folder / f"{name}.pem").unlink()
    assert "made: root3, targets, snapshot, timestamp." in upgrades.keys(keys.folder, keys.root)
    old_state = upgrades.read_state(folder, keys.root)  # signed before, so still a base to go on from
    make_repository(folder, {NEW: program}, keys=keys)
    assert (folder / "2.root.json").read_bytes() == keys.root.read_bytes()
    assert client(folder, root, NEW) and client(folder, keys.root.read_bytes(), NEW)
    upgrades.publish(folder, old_state, stolen, upgrades.utc_now())
    with pytest.raises(UnsignedMetadataError):
        client(folder, root, NEW)


def test_a_timestamp_is_renewed_for_the_root_that_clients_find(
    client: Any, program: Path, tmp_path: Path, keys: Keys
) -> None:
    """The next root is committed, and not released yet."""
    folder, root, _ = make_repository(tmp_path / "repository", {OLD: program}, keys=keys)
    upgrades.keys(keys.folder, keys.root)
    assert upgrades.renew(folder, keys.folder, keys.root)
    assert client(folder, root, OLD) and not (folder / "2.root.json").exists()
    (keys.folder / "timestamp.pem").unlink()
    keys.root.write_bytes(root)
    upgrades.keys(keys.folder, keys.root)
    with pytest.raises(upgrades.UpgradeError, match="not the key that version 1"):
        upgrades.renew(folder, keys.folder, keys.root)
    assert client(folder, root, OLD)


def test_root_keys_that_go_sign_once_more(tmp_path: Path, keys: Keys) -> None:
    for name in ("root1", "root2"):
        (keys.folder / f"{name}.pem").rename(keys.folder / f"{name}.old.pem")
    before = keys.root.read_bytes()
    upgrades.keys(keys.folder, keys.root)
    first, second = Metadata[Root].from_bytes(before), Metadata[Root].from_bytes(keys.root.read_bytes())
    assert len(second.signatures) == 5 and second.signed.version == 2
    assert len({*first.signed.roles["root"].keyids} & {*second.signed.roles["root"].keyids}) == 1


def test_without_two_of_the_roots_keys_nothing_changes(tmp_path: Path, keys: Keys) -> None:
    before = keys.root.read_bytes()
    for name in ("root1", "root2"):
        (keys.folder / f"{name}.pem").unlink()
    with pytest.raises(UnsignedMetadataError, match="1/2"):
        upgrades.keys(keys.folder, keys.root)
    assert keys.root.read_bytes() == before and not (keys.folder / "root1.pem").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_key_files_are_for_their_owner_only(keys: Keys) -> None:
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys.folder.iterdir()} == {0o600}
    assert stat.S_IMODE(keys.folder.stat().st_mode) == 0o700


def test_a_passphrase_closes_and_opens_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(upgrades.PASSPHRASE, "four words of it")
    upgrades.keys(tmp_path / "keys", tmp_path / "root.json")
    path = tmp_path / "keys/targets.pem"
    assert b"ENCRYPTED" in path.read_bytes() and upgrades.signer(path)
    for wrong in ("", "three words of it"):
        monkeypatch.setenv(upgrades.PASSPHRASE, wrong)
        with pytest.raises(upgrades.UpgradeError, match="opens"):
            upgrades.signer(path)


# --- what the tool refuses to sign ---


def test_what_was_released_does_not_change(program: Path, tmp_path: Path) -> None:
    folder, _, _ = make_repository(tmp_path / "repository", {OLD: program})
    (program / "medplum-agent").write_text("#!/bin/sh\n# other\n")
    with pytest.raises(upgrades.UpgradeError, match="a change needs a new version"):
        make_repository(folder, {OLD: program})


@pytest.mark.parametrize("role", upgrades.ROLES)
def test_a_previous_repository_is_not_believed_but_checked(program: Path, tmp_path: Path, role: str) -> None:
    """Whoever may write to it could else have programs of his own signed with the next release."""
    folder, ours, theirs = tmp_path / "repository", throw_away_keys(), throw_away_keys("strangers")
    make_repository(folder, {OLD: program})
    state = upgrades.read_state(folder, ours.root)
    holders = {name: theirs if name == role else ours for name in upgrades.ROLES}
    signers = {name: upgrades.signer(holder.folder / f"{name}.pem") for name, holder in holders.items()}
    upgrades.publish(folder, state, signers, upgrades.utc_now())
    with pytest.raises(UnsignedMetadataError, match=role):
        make_repository(folder, {NEW: program})


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_signed_parts_of_other_days_are_not_mixed(program: Path, tmp_path: Path, role: str) -> None:
    """Each is signed by us, but is not the one that the next above it vouches for."""
    folder, _, _ = make_repository(tmp_path / "repository", {OLD: program, NEW: program})
    (folder / f"2.{role}.json").write_bytes((folder / f"1.{role}.json").read_bytes())
    with pytest.raises(LengthOrHashMismatchError):
        upgrades.read_state(folder, throw_away_keys().root)


def test_versions_do_not_begin_anew_in_an_empty_folder(program: Path, tmp_path: Path) -> None:
    folder, _, _ = make_repository(tmp_path / "repository", {OLD: program})
    keys, empty = throw_away_keys(), tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError):  # agents would refuse them
        upgrades.release(folder, tmp_path / "other", keys.folder, empty, name=OLD, root_file=keys.root)


def test_keys_that_the_root_does_not_name(program: Path, tmp_path: Path, keys: Keys) -> None:
    (keys.folder / "targets.pem").write_bytes((keys.folder / "snapshot.pem").read_bytes())
    with pytest.raises(upgrades.UpgradeError, match=r"targets\.pem is not the key"):
        make_repository(tmp_path / "repository", {OLD: program}, keys=keys)
    rsa = generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (keys.folder / "targets.pem").write_bytes(rsa)
    with pytest.raises(upgrades.UpgradeError, match="Ed25519"):
        make_repository(tmp_path / "repository", {OLD: program}, keys=keys)


@pytest.mark.parametrize(("content", "words"), [("", "cannot be read"), ("no key", "is not a key that")])
def test_a_key_that_is_missing_or_none(program: Path, tmp_path: Path, keys: Keys, content: str, words: str) -> None:
    (keys.folder / "targets.pem").unlink()
    if content:
        (keys.folder / "targets.pem").write_text(content)
    with pytest.raises(upgrades.UpgradeError, match=rf"targets\.pem {words}"):
        make_repository(tmp_path / "repository", {OLD: program}, keys=keys)


def test_roots_with_a_gap(program: Path, tmp_path: Path, keys: Keys) -> None:
    folder, _, _ = make_repository(tmp_path / "repository", {OLD: program}, keys=keys)
    upgrades.keys(keys.folder, keys.root)
    upgrades.keys(keys.folder, keys.root)
    with pytest.raises(upgrades.UpgradeError, match="do not lead to version 3"):
        make_repository(folder, {NEW: program}, keys=keys)


def test_the_shipped_root_is_not_that_of_the_repository(program: Path, tmp_path: Path, keys: Keys) -> None:
    folder, _, _ = make_repository(tmp_path / "repository", {OLD: program}, keys=keys)
    with pytest.raises(upgrades.UpgradeError, match="do not lead to version 1"):
        make_repository(folder, {NEW: program}, keys=throw_away_keys("strangers"))


@pytest.mark.parametrize("signers", ["before", "after"])
def test_a_root_that_only_one_side_signed_is_no_successor(
    program: Path, tmp_path: Path, keys: Keys, signers: str
) -> None:
    """Neither strangers who name themselves, nor a root whose own keys nobody has shown to have."""
    folder, _, _ = make_repository(tmp_path / "repository", {OLD: program}, keys=keys)
    theirs = throw_away_keys("strangers")
    root = Metadata[Root].from_bytes(theirs.root.read_bytes())
    root.signed.version = 2
    root.signatures.clear()
    for name in upgrades.ROOT_KEYS:
        root.sign(upgrades.signer((keys if signers == "before" else theirs).folder / f"{name}.pem"), append=True)
    keys.root.write_bytes(root.to_bytes())
    with pytest.raises(UnsignedMetadataError, match="0/2"):
        upgrades.read_state(folder, keys.root)


def test_there_is_nothing_to_sign(tmp_path: Path, keys: Keys) -> None:
    (tmp_path / TARGETS[OLD]).touch()
    with pytest.raises(upgrades.UpgradeError, match=f"no program of version {NEW} in"):
        upgrades.release(tmp_path, tmp_path / "repository", keys.folder, name=NEW, root_file=keys.root)
    assert not (tmp_path / "repository").exists()


def test_without_a_root_nothing_is_signed(program: Path, tmp_path: Path, keys: Keys) -> None:
    keys.root.unlink()
    with pytest.raises(upgrades.UpgradeError, match=r"no upgrade-root\.json: .* upgrades\.py keys"):
        make_repository(tmp_path / "repository", {OLD: program}, keys=keys)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upgrades.main() == upgrades.main("release", "one") == upgrades.main("sell", "one") == 2
    assert upgrades.main("renew", str(tmp_path), str(tmp_path)) == 1
    assert "upgrades.py: " in capsys.readouterr().err


def test_what_signs_needs_nothing_but_its_lock(tmp_path: Path) -> None:
    """Of the libraries that are here only those that packaging/release.lock names, by their modules."""
    lock = (ROOT / "packaging/release.lock").read_text()
    allowed = {line.split("==")[0] for line in lock.splitlines() if "==" in line}
    script = f"""
import sys, upgrades
from pathlib import Path
there = {{name.split(".")[0] for name, module in sys.modules.items()
         if "site-packages" in str(getattr(module, "__file__", ""))}}
print(*sorted(name for name in there - {allowed!r} if name[0] != "_"))
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "packaging")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, check=True)
    assert done.stdout.split() == []


# --- what it rests on ---


def test_a_client_needs_no_library_in_c_to_check_signatures(program: Path, tmp_path: Path) -> None:
    """Neither cryptography nor requests can be imported, as in the compiled program."""
    repository: Repository = make_repository(tmp_path / "repository", {OLD: program})
    (tmp_path / "root.json").write_bytes(repository.root)
    (tmp_path / "memory").mkdir()
    script = """
import sys
for name in ("cryptography", "requests", "nacl"):
    sys.modules[name] = None
from tuf.ngclient import Updater, UpdaterConfig
folder, address, name = sys.argv[1:]
root = open(folder + "/root.json", "rb").read()
config = UpdaterConfig(prefix_targets_with_hash=False)
updater = Updater(folder + "/memory", address, folder + "/memory", address, config=config, bootstrap=root)
updater.download_target(updater.get_targetinfo(name))
"""
    with served(repository.folder) as address:
        subprocess.run([sys.executable, "-c", script, str(tmp_path), address, TARGETS[OLD]], check=True)


def test_no_key_and_no_root_of_the_project_are_in_the_sources() -> None:
    """Until the ceremony; from then on the root is, and is one that two of three people must sign."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not [name for name in listed if name.endswith((".pem", ".key"))]
    if binary.UPGRADE_ROOT.exists():
        role = upgrades.read_root(binary.UPGRADE_ROOT.read_bytes()).signed.roles["root"]
        assert (role.threshold, len(role.keyids)) == (2, 3)


def test_times_are_whole_seconds_of_utc(program: Path, tmp_path: Path) -> None:
    folder, _, _ = make_repository(tmp_path / "repository", {OLD: program})
    text = json.loads((folder / "timestamp.json").read_text())["signed"]["expires"]
    until = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.UTC)
    assert datetime.timedelta(89) < until - datetime.datetime.now(datetime.UTC) <= datetime.timedelta(90)
