"""Clocks that are set, and outages of everything that the agent stands on."""

from pathlib import Path

import pytest

import medplum_agent as ma

# --- clocks ---


@pytest.mark.parametrize("most", [1, 3])
def test_a_clock_that_was_set_back_costs_no_line_of_the_log(tmp_path: Path, monkeypatch, most: int) -> None:
    """Files of days to come were taken for newer ones: each new line's file was removed, or grew without limit."""
    monkeypatch.setattr(ma, "MIB", 1000)
    for number in ("", ".1", ".2")[:most]:
        (tmp_path / f"medplum-agent-main-2999-01-01.log{number}").touch()
    log = ma.Log("main", ma.LoggerSettings(maxFileSizeMb=1, filesToKeep=most), tmp_path, None)
    for n in range(40):
        log.info(f"{n:02} {'x' * 100}")
        assert ma.read_log_page(tmp_path, "main", 1, None).entries[0]["msg"].startswith(f"{n:02} ")
    log.close_file()
    assert len([*tmp_path.iterdir()]) == most
    assert all(path.stat().st_size < 1300 for path in tmp_path.iterdir())
