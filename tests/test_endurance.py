"""Hosts that give little, and addresses that few have."""

from pathlib import Path

from tests.support import message, site

# --- what the host gives ---


def test_an_agent_without_a_console_stops_well(tmp_path: Path) -> None:
    """It failed at its very end, with exit code 1, and before it could have gone to another version."""
    with site(tmp_path, {"FEED": "?enhanced=aa"}, wrapper=["sh", "-c", 'exec "$@" >&- 2>&-', "sh"]) as here:
        with here.device("FEED") as device:
            assert device.ask(message("M-1"))[0] == "AA"
        here.sandbox.wait_ids("M-1")
        assert here.agent.terminate()[0] == 0
