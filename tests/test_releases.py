"""Signed releases (packaging/upgrades.py) as a client of The Update Framework sees them, and who makes them."""

import os
import shutil
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tuf.api.exceptions import BadVersionNumberError, ExpiredMetadataError, RepositoryError, UnsignedMetadataError
from tuf.ngclient import Updater, UpdaterConfig

from tests import releases


def program(folder: Path, text: str = "one") -> Path:
    folder.mkdir(parents=True)
    (folder / "medplum-agent").write_text(text)
    (folder / "library.so").write_text("shared")
    return folder


def client(metadata: Path, url: str, root: bytes) -> Updater:
    """As the agent is one."""
    metadata.mkdir(exist_ok=True)
    config = UpdaterConfig(prefix_targets_with_hash=False)
    updater = Updater(str(metadata), url, str(metadata), url, config=config, bootstrap=root)
    updater.refresh()
    return updater


def names(made: releases.Repository) -> list[str]:
    return sorted(path.name for path in made.folder.glob("*.tar.gz"))


def test_two_releases_and_a_bundle_are_accepted(tmp_path: Path) -> None:
    made = releases.make_repository(tmp_path / "all", {"5.3.0": program(tmp_path / "a")})
    with releases.served(made.folder) as url:
        assert client(tmp_path / "client", url, made.root).get_targetinfo(names(made)[0])
        made = releases.make_repository(tmp_path / "all", {"5.4.0": program(tmp_path / "b")})
        updater = client(tmp_path / "client", url, made.root)
        assert len(names(made)) == 2
        for name in names(made):
            found = updater.get_targetinfo(name)
            assert found
            with tarfile.open(updater.download_target(found)) as archive:
                assert archive.getnames() == [
                    "medplum-agent",
                    "medplum-agent/library.so",
                    "medplum-agent/medplum-agent",
                ]
    with tarfile.open(made.bundles["5.4.0"]) as bundle:
        bundle.extractall(tmp_path / "bundle", filter="data")
    with releases.served(tmp_path / "bundle") as url:
        assert client(tmp_path / "other", url, made.root).get_targetinfo(names(made)[1])


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_a_stranger_signs_nothing(tmp_path: Path, role: str) -> None:
    made = releases.make_repository(tmp_path / "all", {"5.3.0": program(tmp_path / "a")}, strangers=[role])
    with releases.served(made.folder) as url, pytest.raises(UnsignedMetadataError, match=role):
        client(tmp_path / "client", url, made.root)


def test_what_is_old_is_refused(tmp_path: Path) -> None:
    made = releases.make_repository(tmp_path / "all", {"5.3.0": program(tmp_path / "a")}, age_days=91)
    with releases.served(made.folder) as url, pytest.raises(ExpiredMetadataError, match=r"timestamp\.json"):
        client(tmp_path / "client", url, made.root)
    releases.tools().renew(made.folder, releases.throw_away_keys().folder, releases.throw_away_keys().root)
    with releases.served(made.folder) as url:
        client(tmp_path / "client", url, made.root)
    replayed = shutil.copytree(made.folder, tmp_path / "replayed")
    releases.make_repository(tmp_path / "all", {"5.4.0": program(tmp_path / "b")})
    with releases.served(made.folder) as url:
        client(tmp_path / "client", url, made.root)
    with releases.served(replayed) as url, pytest.raises(BadVersionNumberError):
        client(tmp_path / "client", url, made.root)


def test_keys_change_and_who_knows_the_first_root_follows(tmp_path: Path) -> None:
    """A root key is lost, and one replaces it that two of the old ones vouch for."""
    upgrades, keys = releases.tools(), releases.Keys(tmp_path / "keys", tmp_path / "root.json")
    upgrades.keys(keys.folder, keys.root)
    first = keys.root.read_bytes()
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys.folder.iterdir()} == {0o600}
    releases.make_repository(tmp_path / "all", {"5.3.0": program(tmp_path / "a")}, keys=keys)
    (keys.folder / "root1.pem").unlink()
    assert "version 2" in upgrades.keys(keys.folder, keys.root)
    made = releases.make_repository(tmp_path / "all", {"5.4.0": program(tmp_path / "b")}, keys=keys)
    assert {"1.root.json", "2.root.json"} <= {path.name for path in made.folder.iterdir()}
    with releases.served(made.folder) as url:
        assert client(tmp_path / "client", url, first).get_targetinfo(names(made)[1])
    for name in ("root1", "root2"):  # two of three at once: nobody vouches for that
        (keys.folder / f"{name}.pem").unlink()
    before = keys.root.read_bytes()
    with pytest.raises(RepositoryError):
        upgrades.keys(keys.folder, keys.root)
    assert keys.root.read_bytes() == before and not (keys.folder / "root1.pem").exists()


def test_a_program_that_was_released_never_changes(tmp_path: Path) -> None:
    upgrades = releases.tools()
    releases.make_repository(tmp_path / "all", {"5.3.0": program(tmp_path / "a")})
    with pytest.raises(upgrades.UpgradeError, match="a change needs a new version"):
        releases.make_repository(tmp_path / "all", {"5.3.0": program(tmp_path / "b", "two")})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "targets.pem").unlink(), "targets.pem cannot be read"),
        (lambda folder: (folder / "targets.pem").write_text("no key"), "is not a key that"),
        (lambda folder: shutil.copy(folder / "root1.pem", folder / "targets.pem"), "is not the key that version 1"),
    ],
)
def test_a_key_that_is_missing_or_another_is_named(tmp_path: Path, spoil: Callable[[Path], Any], words: str) -> None:
    upgrades, ours = releases.tools(), releases.throw_away_keys()
    keys = releases.Keys(Path(shutil.copytree(ours.folder, tmp_path / "keys")), ours.root)
    spoil(keys.folder)
    with pytest.raises(upgrades.UpgradeError, match=words):
        releases.make_repository(tmp_path / "all", {"5.3.0": program(tmp_path / "a")}, keys=keys)


def test_keys_may_need_a_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrades, keys = releases.tools(), releases.Keys(tmp_path / "keys", tmp_path / "root.json")
    monkeypatch.setenv(upgrades.PASSPHRASE, "open sesame")
    upgrades.keys(keys.folder, keys.root)
    assert b"ENCRYPTED" in (keys.folder / "root1.pem").read_bytes()
    releases.make_repository(tmp_path / "all", {"5.3.0": program(tmp_path / "a")}, keys=keys)
    monkeypatch.setenv(upgrades.PASSPHRASE, "wrong")
    with pytest.raises(upgrades.UpgradeError, match="is not a key that"):
        upgrades.renew(tmp_path / "all", keys.folder, keys.root)


def test_the_same_program_is_the_same_archive(tmp_path: Path) -> None:
    """Whatever the clock, the umask and the order of files."""
    releases.tools()
    import packages

    made = []
    for name, mask, mtime in (("a", 0o077, 1_000_000_000), ("b", 0o022, 1_700_000_000)):
        before = os.umask(mask)
        folder = program(tmp_path / name)
        os.umask(before)
        for path in folder.iterdir():
            os.utime(path, (mtime, mtime))
        made.append(packages.pack(folder, tmp_path / f"{name}.tar.gz").read_bytes())
    assert made[0] == made[1]
