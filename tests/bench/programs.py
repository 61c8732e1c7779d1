"""The module, the compiled folder and the one file side by side: python3 build.py bench --programs.

Size on disk, time of --version, time until both channels listen, memory two seconds later, connected to the server.
Medians of several starts in one run: read the ratios. Linux only (/proc). The reference's figures are those it
publishes (100 to 200 MB of disk, 512 MB of memory) and, where given as measured, were taken from its version 5.0.10.
"""

import os
import statistics
import subprocess
import time
from pathlib import Path

import bench

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "dist"
PROGRAMS = {
    "medplum_agent.py": None,
    "folder (packages)": DIST / "medplum-agent/medplum-agent",
    "one file": DIST / "medplum-agent-linux",
}
STARTS = 7


def size(program: Path) -> float:
    """MB of the file, or of the folder around it."""
    files = [program] if program.parent == DIST else [path for path in program.parent.rglob("*") if path.is_file()]
    return sum(path.lstat().st_size for path in files) / 1e6


def version_ms(command: list[str]) -> float:
    """Milliseconds of --version: loading everything that a start loads."""
    found = []
    for _ in range(STARTS):
        begin = time.perf_counter()
        subprocess.run([*command, "--version"], check=True, capture_output=True, cwd=ROOT)
        found.append((time.perf_counter() - begin) * 1000)
    return statistics.median(found)


def main() -> None:
    print(f"{'':20}{'size MB':>9}{'--version ms':>14}{'listening ms':>14}{'idle MB':>9}")
    for name, program in PROGRAMS.items():
        if program is not None and not program.exists():
            print(f"{name:20} is not there; run: python3 build.py binary")
            continue
        os.environ.pop("MEDPLUM_AGENT_BINARY", None)
        if program is not None:
            os.environ["MEDPLUM_AGENT_BINARY"] = str(program)
        command = [str(program)] if program else bench.FROM_SOURCE
        listening, idle = bench.measure_idle(None, STARTS)
        shown = f"{size(program):9.1f}" if program else f"{'-':>9}"
        print(f"{name:20}{shown}{version_ms(command):14.0f}{listening:14.0f}{idle:9.0f}", flush=True)
    print("reference 5.0.10: 100-200 MB of disk and 512 MB of memory as published; idle 114 MB as measured")


if __name__ == "__main__":
    main()
