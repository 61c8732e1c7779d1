"""The manual page and the completions: shells really complete with them, where they are installed."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the shells of other systems")


def needs(command: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(command) is None, reason=f"NO {command.upper()}: not checked")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("docs")
    run(sys.executable, ROOT / "packaging/docs.py", made, env={"PYTHONPATH": str(ROOT)})
    (made / "site").mkdir()
    (made / "a file.hl7").write_text("")
    return made


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    known = {"PATH": "/usr/local/bin:/usr/bin:/bin", "TERM": "dumb", "HOME": "/nonexistent", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=known | (env or {}), timeout=20)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


# What stands there, its last word unfinished -> what is offered; "!" must not be, "..." is more than that
CASES = {
    "": "demo health status doctor validate queue send ... !list !--json",
    "st": "status",
    "queue ": "list find show retry discard export replay ... !status",
    "queue ret": "retry",
    "queue list ": "waiting dead undelivered open all",
    "queue --channel ADT list d": "dead",
    "--config agent.toml queue li": "list",
    "queue list --l": "--limit",
    "queue retry -": "--help --config --channel --since --dry-run ... !--payload !--watch !--json",
    "queue show 5 --p": "--payload",
    "status -": "--help --config --watch --json ... !--channel",
    "--settings-schema ": "json markdown",
    "queue replay --kind d": "dead",
    "queue --channel ": "",
    "send localhost a": "a+file.hl7",
    "queue export a": "a+file.hl7",
    "--state-dir s": "site",
    "--config a": "a+file.hl7",
}


def check(line: str, offered: Iterable[str]) -> None:
    found, wanted = {one.replace("\\ ", "+").replace(" ", "+") for one in offered if one}, set(CASES[line].split())
    barred = {word[1:] for word in wanted if word[0] == "!"}
    wanted = {word for word in wanted if word[0] not in "!."}
    assert wanted <= found and not barred & found, found
    assert found == wanted or "..." in CASES[line], found


@pytest.mark.parametrize("line", CASES)
@needs("bash")
def test_bash(folder: Path, line: str) -> None:
    words = ["medplum-agent", *line.split(" ")]
    script = """source ./medplum-agent.bash
compopt() { :; }  # there is no line that is being edited
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_medplum_agent
[[ ${#COMPREPLY[@]} == 0 ]] || printf '%s\\n' "${COMPREPLY[@]}"
"""
    offered = run("bash", "--norc", "-euc", script, "bash", *words, cwd=folder).splitlines()
    check(line, offered)


@pytest.mark.parametrize("line", CASES)
@needs("fish")
def test_fish(folder: Path, tmp_path: Path, line: str) -> None:
    script = f"source medplum-agent.fish; complete -C {json.dumps(f'medplum-agent {line}')}"
    env = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    offered = run("fish", "--no-config", "-c", script, cwd=folder, env=env).splitlines()
    check(line, (one.split("\t")[0].rstrip("/") for one in offered))


@pytest.mark.parametrize("line", CASES)
@needs("zsh")
def test_zsh(folder: Path, tmp_path: Path, line: str) -> None:
    """In a terminal of its own, as zsh completes nowhere else; `compadd` is asked what it would show."""
    (tmp_path / ".zshrc").write_text(f"""PROMPT=READY; unset zle_bracketed_paste; fpath=({folder} $fpath)
autoload -Uz compinit && compinit -u
compadd() {{
  [[ ${{@[(r)-[OADR]*]}} == -[OAD]* ]] && {{ builtin compadd "$@"; return }}
  local -a found; builtin compadd -O found "$@"; print -rl -- $found >>{tmp_path}/offered; builtin compadd "$@"
}}
finish() {{ zle complete-word; print done >{tmp_path}/done; exit }}
zle -N finish; bindkey '^X^F' finish
""")
    script = """zmodload zsh/zpty; zpty z 'cd $FOLDER && zsh -i'; zpty -r z seen '*READY*'
zpty -w -n z "medplum-agent $LINE_"$'\\x18\\x06'
for ((i = 0; i < 100; i++)); do [[ -e $ZDOTDIR/done ]] && break; zpty -t z && zpty -r z seen; sleep 0.1; done
zpty -d z"""
    run("zsh", "-fc", script, env={"ZDOTDIR": str(tmp_path), "FOLDER": str(folder), "LINE_": line, "TERM": "xterm"})
    offered = tmp_path / "offered"
    check(line, offered.read_text().splitlines() if offered.exists() else [])


@needs("pwsh")
def test_powershell(folder: Path) -> None:
    script = """. ./medplum-agent.ps1
foreach ($line in $args) {
  $found = TabExpansion2 "medplum-agent $line" ("medplum-agent $line".Length)
  ($found.CompletionMatches | ForEach-Object { $_.ListItemText }) -join '|'
}"""
    (folder / "try.ps1").write_text(script)
    lines = [line for line in CASES if CASES[line] and "+" not in CASES[line] and "--state" not in line]  # no files
    for line, offered in zip(
        lines, run("pwsh", "-NoProfile", "-File", "try.ps1", *lines, cwd=folder).splitlines(), strict=True
    ):
        check(line, offered.split("|"))


@needs("shellcheck")
def test_the_script_for_bash_passes_shellcheck(folder: Path) -> None:
    run("shellcheck", "--shell=bash", "--severity=warning", folder / "medplum-agent.bash")


@needs("groff")
def test_the_manual_page_has_no_warnings(folder: Path) -> None:
    shown = re.sub(".\b", "", run("groff", "-ww", "-man", "-Tutf8", "-P-c", folder / "medplum-agent.1"))
    for words in ("queue discard", "--payload", "HOST:PORT FILE...", "/etc/medplum-agent/agent.toml"):
        assert words in shown
