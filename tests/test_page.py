"""The status page of a running agent in a browser: axe-core finds no serious fault, and a retry clicked arrives."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import eventually, free_ports, message, setting, site

MODULES = Path(os.environ.get("MEDPLUM_CLI", "/")).parents[2] if os.environ.get("MEDPLUM_CLI") else Path("/")
ONCE = [setting("channelAutoRetryMaxAttempts", 1)]
PRESENT = shutil.which("chromium") and shutil.which("node") and (MODULES / "node_modules/puppeteer-core").exists()


@pytest.mark.skipif(not PRESENT, reason="no chromium, node or puppeteer-core: build.py test installs them where it may")
@pytest.mark.timeout(120)
def test_the_page_in_a_browser(tmp_path):
    (port,) = free_ports(1)
    name = "<img src=x onerror=alert(1)>"
    with site(
        tmp_path, {"ADT": "?enhanced=true", name: ""}, ONCE, config=f"statusAddress = '127.0.0.1:{port}'"
    ) as here:
        well, here.sandbox.bot = here.sandbox.bot, lambda transmit: (400, "no")
        with here.device("ADT") as device:
            assert device.ask(message("PAGE-1"))[0] == "CA"
            here.agent.wait_state("PAGE-1", "rejected")
        here.sandbox.bot = well
        url = f"http://127.0.0.1:{port}/#token={(here.agent.state_dir / 'agent.token').read_text()}"
        script = Path(__file__).with_name("page.mjs")
        shots = [os.environ["SHOTS"]] if "SHOTS" in os.environ else []
        command = ["node", str(script), str(MODULES), url, *shots]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        found = json.loads(done.stdout)
        assert found == {"violations": [], "console": [], "retried": True, "overflow": False}, done.stderr
        here.agent.wait_state("PAGE-1", "processed")
        eventually(lambda: here.sandbox.ids().count("PAGE-1") == 2)
