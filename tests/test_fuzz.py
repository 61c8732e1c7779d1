"""Each fuzz target for a second with a fixed seed, an agent for five; tests/fuzz.py runs for as long as one likes."""

import pytest

from tests import fuzz


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_target(name: str) -> None:
    tried, culprit = fuzz.fuzz(name, seconds=1, seed=20260101)
    assert culprit is None, f"{name} broken by {culprit.hex()}:\n{fuzz.broken_by(name, culprit)}"
    assert tried > 20


def test_a_broken_target_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fragile(content: bytes) -> None:
        assert b"\x0b" not in content

    monkeypatch.setitem(fuzz.TARGETS, "fragile", (fragile, (b"hello",)))
    assert fuzz.fuzz("fragile", 5, 1)[1] == b"\x0b"
    assert fuzz.main(["fragile", "--input", "000b"]) == 1
    assert "BROKEN by 000b" in capsys.readouterr().out
    assert fuzz.main(["fragile", "--input", "00"]) == 0


def test_a_running_agent() -> None:
    assert fuzz.live(5, seed=20260101) == {}
