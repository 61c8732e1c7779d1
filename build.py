#!/usr/bin/env python3
"""Set up, try, check and measure Medplum Agent: python3 build.py VERB [ARGUMENTS].

Needs a stock Python 3.11 or newer and nothing else; `binary` needs a C compiler, too. What it makes stays in the
folders .venv, .peers, build and dist beside this file, but for the caches of pip, npm and the checkers; and for Debian
packages that the tests need, which it installs where it may (root, apt-get).
"""

import ast
import hashlib
import importlib.util
import io
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

if sys.version_info < (3, 11):  # noqa: UP036 (whoever starts this with an older Python shall read why)
    sys.exit("build.py needs Python 3.11 or newer; this is Python {}.{}.".format(*sys.version_info[:2]))

import tomllib

ROOT = Path(__file__).resolve().parent
AGENT = ROOT / "medplum_agent.py"
README = ROOT / "README.md"
WINDOWS = os.name == "nt"

VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if WINDOWS else "bin/python")
PIP_INSTALL = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input")
STAMPS = VENV / "build-stamps"  # one file per installed group of dependencies, holding its fingerprint

PACKAGING = ROOT / "packaging"
LOCK = PACKAGING / "binary.lock"  # what the binary is made of and with, with hashes, for every system and Python
RELEASE_LOCK = PACKAGING / "release.lock"  # what signs upgrades, likewise
KEYS = "MEDPLUM_AGENT_KEYS"  # names the folder of the keys that sign them
WORK = ROOT / "build"  # between source and result; its caches make the second build quick
DIST = ROOT / "dist"
COMPILING = WORK / "venv"  # holds what the lock names and nothing else
SIGNING = WORK / "signing"  # as little as possible beside the keys
BINARY = DIST / ("medplum-agent-" + {"linux": "linux", "darwin": "macos"}.get(sys.platform, "windows.exe"))
STANDALONE = DIST / "medplum-agent" / ("medplum-agent.exe" if WINDOWS else "medplum-agent")

PEERS = ROOT / ".peers"
MEDPLUM_CLI = PEERS / "node_modules/.bin" / ("medplum.cmd" if WINDOWS else "medplum")
MEDPLUM_CLI_VERSION = "5.0.10"  # the newest there is
PAGE_CHECKERS = {"puppeteer-core": "24.43.1", "axe-core": "4.14.1"}  # drive a browser; find what hinders people in it
PARALLEL = ("-n", "5", "--dist", "worksteal")  # tests wait more than they work; -n 0 for a debugger

SETTINGS_BEGIN, SETTINGS_END = "<!-- settings -->", "<!-- /settings -->"


class Tool(NamedTuple):
    """A program that tests run beside the agent: its Debian package, the command it provides, and why."""

    package: str
    command: str
    why: str


DEBIAN_TOOLS = (
    Tool("strace", "strace", "shows that a commit reaches the disk before the acknowledgment leaves"),
    Tool("socat", "socat", "pairs of pseudo-terminals stand for the serial ports of instruments"),
    Tool("lintian", "lintian", "checks the .deb"),
    Tool("rpm", "rpmbuild", "makes the .rpm"),
    Tool("rpmlint", "rpmlint", "checks it"),
    Tool("nsis", "makensis", "makes the installer for Windows"),
    Tool("wixl", "wixl", "makes the .msi"),
    Tool("msitools", "msibuild", "puts its actions in order"),
    Tool("systemd", "systemd-analyze", "checks the service and how hardened it is"),
    Tool("shellcheck", "shellcheck", "checks the scripts of packages and workflows"),
    Tool("dcmtk", "storescu", "foreign DICOM peers: echoscu, storescu, findscu, movescu, getscu, storescp"),
    Tool("orthanc", "Orthanc", "a PACS that stores to us, asks us, and is asked by us"),
    Tool("chromium", "chromium", "shows the status page"),
    Tool("faketime", "faketime", "gives a process a wrong clock"),
    Tool("nodejs", "node", "runs the Medplum command line, a foreign HL7 sender and receiver"),
    Tool("npm", "npm", "installs the Medplum command line"),
)


class BuildError(Exception):
    """A step failed; the text says which, shows its output whole, and ends with what to do where that is known."""


# --- Running things --------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(f"build.py: {text}", file=sys.stderr, flush=True)


def environment() -> dict[str, str]:
    """What children see: the module importable from everywhere, and the Medplum command line where it is installed."""
    peers = {"MEDPLUM_CLI": str(MEDPLUM_CLI)} if MEDPLUM_CLI.exists() and shutil.which("node") else {}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, PACKAGING))), **peers}


def quiet(*command: str | Path) -> str:
    """Run a step and return what it printed; when it fails, BuildError shows all of that."""
    env = {**environment(), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True)
    printed = done.stdout.decode("utf-8", "replace")
    if done.returncode:
        line = " ".join(map(str, command))
        errors = done.stderr.decode("utf-8", "replace")
        raise BuildError(f"this ended with {done.returncode}:\n  {line}\n{printed}{errors}")
    return printed


def succeeds(*command: str | Path) -> bool:
    """Run a step whose output the user sees."""
    return subprocess.call(command, cwd=ROOT, env=environment()) == 0


def become(*command: str | Path) -> NoReturn:
    """Give this process over to a command, so that Ctrl-C, signals and the exit code are the command's own."""
    sys.stdout.flush()
    if not WINDOWS:
        os.chdir(ROOT)
        os.execve(command[0], command, environment())
    child = subprocess.Popen(command, cwd=ROOT, env=environment())
    while True:  # Windows has no exec, and sends Ctrl-C to both of us: the child decides when to end
        try:
            sys.exit(child.wait())
        except KeyboardInterrupt:
            continue


# --- The virtual environment -----------------------------------------------------------------------------------------


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def pins(group: str) -> list[str]:
    """The requirements of a dependency group of pyproject.toml; "runtime" stands for the project's own."""
    found = pyproject()
    groups: dict[str, list[str]] = {"runtime": found["project"]["dependencies"], **found["dependency-groups"]}
    return groups.get(group, [])


def fingerprint(group: str) -> str:
    """Changes when the group's pins or the Python do."""
    facts = [sys.version, sys.platform, platform.machine(), pins(group)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def ensure(*groups: str) -> None:
    """Bring .venv to the pins of these groups. After any change of pins it is made anew, so that nothing lingers."""
    stamps = {stamp.name: stamp.read_text("utf-8") for stamp in STAMPS.glob("*")}
    current = PYTHON.exists() and stamps and all(text == fingerprint(name) for name, text in stamps.items())
    if not current:
        say("making .venv")
        make_venv(VENV)
        stamps = {}
    missing = [group for group in groups if group not in stamps]
    if missing:
        install(missing, beside=list(stamps))


def make_venv(venv: Path) -> None:
    if importlib.util.find_spec("ensurepip") is None:
        install_ensurepip()
    quiet(sys.executable, "-m", "venv", "--clear", venv)


def install_ensurepip() -> None:
    """Debian and Ubuntu split ensurepip, which venv needs, off their Python."""
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    if not may_use_apt():
        raise BuildError(
            "this Python has no ensurepip, so it can make no virtual environment.\n"
            f"On Debian or Ubuntu: sudo apt-get install {package}\n"
            "Elsewhere: install your system's package for Python's venv and pip, or a Python from python.org."
        )
    apt_install(package)


def install(groups: list[str], beside: list[str]) -> None:
    """Add groups to .venv; `beside` are those it has, named again so that pip keeps their pins."""
    say(f"installing the {' and '.join(groups)} dependencies")
    wanted = [pin for group in (*beside, *groups) for pin in pins(group)]
    quiet(PYTHON, *PIP_INSTALL, *wanted)
    STAMPS.mkdir(exist_ok=True)
    for group in groups:
        (STAMPS / group).write_text(fingerprint(group), "utf-8")


# --- Peers: foreign programs that the tests talk to ------------------------------------------------------------------


def may_use_apt() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get") is not None


def apt_install(*packages: str) -> None:
    say(f"installing Debian packages: {' '.join(packages)}")
    apt = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-y")
    quiet(*apt, "update")
    quiet(*apt, "install", "--no-install-recommends", *packages)


def ensure_peers() -> None:
    """Install what is missing where we may; say loudly what stays missing, for the tests that need it will skip."""
    for provide in (provide_debian_tools, provide_medplum_cli, provide_page_checkers):
        try:
            provide()
        except BuildError as error:
            say(f"WARNING: {error}")
    for tool in missing_tools():
        say(f"WARNING: tests will skip: no {tool.command} (Debian package {tool.package}), which {tool.why}")
    if not MEDPLUM_CLI.exists():
        say(f"WARNING: tests will skip: no @medplum/cli {MEDPLUM_CLI_VERSION}, a foreign HL7 sender and receiver")


def missing_tools() -> list[Tool]:
    return [tool for tool in DEBIAN_TOOLS if shutil.which(tool.command) is None]


def provide_debian_tools() -> None:
    missing = missing_tools()
    if missing and may_use_apt():
        apt_install(*(tool.package for tool in missing))


def provide_medplum_cli() -> None:
    """Afterwards the command is there and runs, or is not there at all."""
    npm = shutil.which("npm")
    if not npm or installed_medplum_cli() == MEDPLUM_CLI_VERSION:
        return
    say(f"installing @medplum/cli {MEDPLUM_CLI_VERSION} into .peers")
    shutil.rmtree(PEERS, ignore_errors=True)
    package = f"@medplum/cli@{MEDPLUM_CLI_VERSION}"
    try:
        quiet(npm, "install", "--prefix", PEERS, "--no-audit", "--no-fund", "--ignore-scripts", package)
        quiet(MEDPLUM_CLI, "hl7", "send", "--help")
    except BuildError:
        shutil.rmtree(PEERS, ignore_errors=True)
        raise


def provide_page_checkers() -> None:
    npm, modules = shutil.which("npm"), PEERS / "node_modules"
    if npm and not all((modules / name).exists() for name in PAGE_CHECKERS):
        wanted = [f"{name}@{version}" for name, version in PAGE_CHECKERS.items()]
        say(f"installing {' and '.join(wanted)} into .peers")
        quiet(npm, "install", "--prefix", PEERS, "--no-audit", "--no-fund", "--ignore-scripts", *wanted)


def installed_medplum_cli() -> str:
    """The version in .peers, "" when there is none or its command does not run."""
    package = PEERS / "node_modules/@medplum/cli/package.json"
    try:
        quiet(MEDPLUM_CLI, "hl7", "send", "--help")
        return str(json.loads(package.read_text("utf-8"))["version"])
    except (BuildError, OSError, ValueError, KeyError):
        return ""


# --- README.md -------------------------------------------------------------------------------------------------------


def with_settings(readme: str) -> str:
    """README.md's text with the settings table, between its two markers, as the module prints it now."""
    before, begin, rest = readme.partition(SETTINGS_BEGIN)
    _, end, after = rest.partition(SETTINGS_END)
    if not (begin and end):
        raise BuildError(f"README.md has no {SETTINGS_BEGIN} and {SETTINGS_END} for the settings to stand between.")
    table = quiet(PYTHON, AGENT, "--settings-schema=markdown").strip()
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def readme_is_current() -> bool:
    text = README.read_text("utf-8")
    if with_settings(text) == text:
        return True
    say("README.md does not show the settings of medplum_agent.py; run: python3 build.py readme")
    return False


# --- The size of medplum_agent.py ------------------------------------------------------------------------------------

LAYOUT = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER"}  # tokens that say nothing
FSTRING_BEGINS, FSTRING_ENDS = {"FSTRING_START", "TSTRING_START"}, {"FSTRING_END", "TSTRING_END"}
BANNER = re.compile(r"^# ={20,}\n# (.+)\n(?:#.*\n)*?# ={20,}\n", re.MULTILINE)
TITLE = re.compile(r"([^()]+?)(?: \((\d+) lines, (\d+) tokens\))?")  # as in `Store (730 lines, 5600 tokens)`


class Section(NamedTuple):
    """From the first line of its banner to the line before the next one; line numbers start at 1."""

    title: str
    first: int
    last: int
    lines: int | None = None  # its budget; None: none is set
    tokens: int | None = None


class Count(NamedTuple):
    """How many lines, tokens, classes or rows there are in a section or in the whole; `place` is the budget's."""

    name: str
    unit: str
    found: int
    budget: int | None
    place: str


def sections(source: str) -> list[Section]:
    """The sections of a module; what stands before the first banner is the Head."""
    banners = list(BANNER.finditer(source))
    firsts = [source.count("\n", 0, banner.start()) + 1 for banner in banners] + [source.count("\n") + 1]
    found = [Section("Head", 1, firsts[0] - 1)]
    for banner, first, following in zip(banners, firsts, firsts[1:], strict=False):
        title = TITLE.fullmatch(banner[1])
        if title is None:
            raise BuildError(f"the banner '{banner[1]}' is neither a title nor `Title (730 lines, 5600 tokens)`")
        lines, tokens = (None if number is None else int(number) for number in title.groups()[1:])
        found.append(Section(title[1], first, following - 1, lines, tokens))
    return found


def token_lines(source: str) -> list[int]:
    """The line of every token that is code: no layout, comment or docstring.

    An f-string is one token, as it was before Python 3.12: the count is the same on every Python.
    """
    docstrings = docstring_positions(ast.parse(source))
    found, depth = [], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        depth += (kind in FSTRING_BEGINS) - (kind in FSTRING_ENDS)
        if depth == 0 and kind not in LAYOUT and token.start not in docstrings:  # of an f-string: its last part
            found.append(token.start[0])
    return found


def docstring_positions(tree: ast.Module) -> set[tuple[int, int]]:
    """Line and column where each docstring begins."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    firsts = (node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and node.body)
    return {
        (first.lineno, first.col_offset)
        for first in firsts
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    }


def counts(source: str, budget: Mapping[str, int]) -> list[Count]:
    """Every section, then the whole, whose budget is pyproject.toml's."""
    tokens = token_lines(source)
    found: list[Count] = []
    for title, first, last, *budgets in sections(source):
        sizes = last - first + 1, sum(first <= line <= last for line in tokens)
        found += map(Count, (title,) * 2, ("lines", "tokens"), sizes, budgets, ("beside the banner",) * 2)
    nodes = list(ast.walk(ast.parse(source)))
    whole = {
        "lines": source.count("\n"),
        "tokens": len(tokens),
        "classes": sum(isinstance(node, ast.ClassDef) for node in nodes),
        "settings": sum(isinstance(node, ast.Call) and ast.unparse(node.func) == "setting" for node in nodes),
    }
    for unit, size in whole.items():
        name = "whole" if unit in ("lines", "tokens") else unit
        found.append(Count(name, unit, size, budget.get(unit), "in pyproject.toml"))
    return found


def size_table(found: list[Count]) -> str:
    lines = [f"{'section':<18}{'lines':>7}{'budget':>8}{'tokens':>8}{'budget':>8}"]
    for name, group in itertools.groupby(found, key=lambda count: count.name):
        sizes = ((count.found, "-" if count.budget is None else count.budget) for count in group)
        cells = (f"{size:>{width}}{budget:>8}" for (size, budget), width in zip(sizes, (7, 8), strict=False))
        lines.append(f"{name:<18}{''.join(cells)}")
    return "\n".join(lines)


def module_is_within_budget() -> bool:
    """Print how large the module is, and what is above its budget."""
    found = counts(AGENT.read_text("utf-8"), pyproject()["tool"]["medplum-agent"]["budget"])
    print(size_table(found), flush=True)
    above = [count for count in found if count.budget is not None and count.found > count.budget]
    for name, unit, size, budget, place in above:
        remedy = f"take it from elsewhere, or raise the number {place} with its reason"
        say(f"{name}: {size} {unit}, {size - (budget or 0)} above the budget: {remedy}")
    return not above


# --- The binary ------------------------------------------------------------------------------------------------------


def ensure_locked(venv: Path, lock: Path) -> Path:
    """Bring a virtual environment to a lock; nothing is installed whose hash it does not name. Returns its Python."""
    python, stamp = venv / PYTHON.relative_to(VENV), venv / "build-stamp"
    wanted = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()
    report = venv / "installed.json"  # the bill of materials has the hashes of what was installed
    if report.exists() and stamp.exists() and stamp.read_text("utf-8") == wanted:
        return python
    say(f"making build/{venv.name} from packaging/{lock.name}")
    make_venv(venv)
    pip = (python, *PIP_INSTALL, "--require-hashes")
    if lock == LOCK:
        first = WORK / "setuptools.lock"  # builds Nuitka, which comes as source, without fetching what no hash protects
        first.write_text(locked("setuptools"), "utf-8")
        quiet(*pip, "--requirement", first)
    quiet(*pip, "--no-build-isolation", "--report", report, "--requirement", lock)
    stamp.write_text(wanted, "utf-8")
    return python


def locked(name: str) -> str:
    """The lines of one distribution in the lock."""
    lines = LOCK.read_text("utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"{name}=="))
    end = next((n for n in range(start + 1, len(lines)) if lines[n].startswith((" " * 4 + "#", "#"))), len(lines))
    return "\n".join(lines[start:end]) + "\n"


def binary_sources() -> str:
    """Changes when something does that the binary is made of."""
    data = (PACKAGING / name for name in ("status.html", "upgrade-root.json"))
    beside = (path for name in ("linux", "macos") for path in sorted((PACKAGING / name).rglob("*")) if path.is_file())
    sources = (AGENT, LOCK, *sorted(PACKAGING.glob("*.py")), *(path for path in data if path.exists()), *beside)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def ensure_binary() -> None:
    stamp = WORK / "binary-sources"
    if not (BINARY.exists() and STANDALONE.exists() and stamp.exists() and stamp.read_text() == binary_sources()):
        build_binary()


def build_binary() -> None:
    if not LOCK.exists():
        raise BuildError("packaging/binary.lock is missing; run: python3 build.py lock")
    if not succeeds(ensure_locked(COMPILING, LOCK), PACKAGING / "binary.py", WORK, DIST):
        raise BuildError("the binary was not made; the reason is above")
    (WORK / "binary-sources").write_text(binary_sources())


# --- Verbs -----------------------------------------------------------------------------------------------------------


def setup() -> None:
    """make .venv with the pinned dependencies (the verbs that need it do this themselves)"""
    ensure("runtime", "test", "release")


def demo(*arguments: str) -> None:
    """run the agent against its own sandbox: a stand-in server and example devices"""
    ensure("runtime")
    become(PYTHON, AGENT, "demo", *arguments)


def test(*arguments: str) -> None:
    """lint, then run the tests (--binary: those that start the agent, against dist/); arguments go to pytest"""
    ensure("runtime", "test", "release")
    ensure_peers()
    if arguments[:1] == ("--binary",):
        test_binary(*arguments[1:])
    lint()
    become(PYTHON, "-m", "pytest", *PARALLEL, *arguments)


def test_binary(*arguments: str) -> NoReturn:
    """The folder, which packages install, runs every test that starts an agent; the one file has checks of its own.

    Where the environment names both already, as after an installation, those are tested and nothing is compiled.
    """
    built = {"MEDPLUM_AGENT_BINARY": str(STANDALONE), "MEDPLUM_AGENT_ONE_FILE": str(BINARY)}
    if not built.keys() <= os.environ.keys():
        ensure_binary()
        os.environ |= built
    starts = re.compile(r"AgentProcess|\bsite\(")
    files = [path for path in sorted(ROOT.glob("tests/test_*.py")) if starts.search(path.read_text("utf-8"))]
    become(PYTHON, "-m", "pytest", *PARALLEL, ROOT / "tests/check_binary.py", *files, *arguments)


def binary() -> None:
    """compile one file and a folder into dist/, with checksums, licences and a bill of materials"""
    build_binary()


def package() -> None:
    """make the packages of this system from dist/medplum-agent, compiled anew where it is not current"""
    ensure_binary()
    # this Python has what the agent imports: its parser knows the manual page and the completions
    python = ensure_locked(COMPILING, LOCK)
    if not succeeds(python, PACKAGING / "packages.py", STANDALONE.parent, DIST):
        raise BuildError("the packages were not made; the reason is above")


def keys(*folders: str) -> None:
    """make keys to sign upgrades with, and packaging/upgrade-root.json, which names them; again: change them"""
    upgrades("keys", *map(Path, folders or [key_folder()]))


def release(*folders: str) -> None:
    """sign the programs in dist/ for upgrades, into dist/repository; PREVIOUS: the repository of the last release"""
    upgrades("release", DIST, DIST / "repository", *map(Path, folders or [key_folder()]))


def renew(*folders: str) -> None:
    """put a fresh timestamp into a repository of signed upgrades and its bundle; default: dist/repository"""
    repository, *signing = map(Path, folders or [DIST / "repository"])
    upgrades("renew", repository, *(signing or [Path(key_folder())]))


def key_folder() -> str:
    folder = os.environ.get(KEYS, "")
    if not folder:
        raise BuildError(f"which folder has the keys? Name it, or set {KEYS} to it.")
    return folder


def upgrades(verb: str, *folders: Path) -> None:
    python = ensure_locked(SIGNING, RELEASE_LOCK)
    if not succeeds(python, PACKAGING / "upgrades.py", verb, *map(Path.absolute, folders)):
        raise BuildError("nothing was signed; the reason is above")


def docs() -> None:
    """write the manual page and the completions of four shells into build/docs/"""
    ensure("runtime")
    quiet(PYTHON, PACKAGING / "docs.py", WORK / "docs")


def lock() -> None:
    """write packaging/binary.lock and release.lock from the pins in pyproject.toml"""
    ensure("lock")
    options = ("--universal", "--python-version", "3.11", "--generate-hashes", "--no-header", "--quiet")
    compile_to = (PYTHON, "-m", "uv", "pip", "compile", *options)
    quiet(*compile_to, "--group", "binary", "pyproject.toml", "-o", LOCK)
    quiet(*compile_to, "--group", "release", "-o", RELEASE_LOCK)


def lint() -> None:
    """check rules, format, types, README.md's settings, and the size of medplum_agent.py"""
    ensure("runtime", "test", "release")
    checks = (
        succeeds(PYTHON, "-m", "ruff", "check", "--quiet", "."),
        succeeds(PYTHON, "-m", "ruff", "format", "--quiet", "--check", "."),
        succeeds(PYTHON, "-m", "mypy", "--strict", "medplum_agent.py", "build.py", "tests", "packaging"),
        readme_is_current(),
        module_is_within_budget(),
    )
    if not all(checks):
        raise BuildError("the checks above failed (python3 build.py format mends what can be mended by itself)")


def reformat() -> None:
    """bring the code into format and mend what ruff can"""
    ensure("runtime", "test")
    mended = succeeds(PYTHON, "-m", "ruff", "check", "--fix", "."), succeeds(PYTHON, "-m", "ruff", "format", ".")
    if not all(mended):
        raise BuildError("what is listed above needs a person")


def readme(*arguments: str) -> None:
    """write the settings into README.md; --check: only say whether they are current"""
    ensure("runtime")
    if arguments == ("--check",):
        sys.exit(not readme_is_current())
    if arguments:
        raise BuildError(f"readme takes --check or nothing, not {' '.join(arguments)}")
    README.write_text(with_settings(README.read_text("utf-8")), "utf-8", newline="\n")


def bench(*arguments: str) -> None:
    """measure; --imaging: DICOM; --programs: dist/; --trace: what a message passes; else tests/bench/bench.py"""
    ensure("runtime", "test")
    scripts = {"--imaging": "imaging.py", "--programs": "programs.py", "--trace": "trace.py"}
    script = scripts.get(arguments[0] if arguments else "")
    become(PYTHON, ROOT / "tests/bench" / (script or "bench.py"), *arguments[1 if script else 0 :])


def fuzz(*arguments: str) -> None:
    """throw bytes at the parsers; arguments go to tests/fuzz.py"""
    ensure("runtime", "test", "fuzz")
    become(PYTHON, ROOT / "tests/fuzz.py", *arguments)


def clean() -> None:
    """remove what this script, the checkers and the tests made (never the agent's own data)"""
    made = (".venv", ".peers", "build", "dist", "assets", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache")
    for folder in (*map(ROOT.joinpath, made), *ROOT.glob("*.egg-info"), *ROOT.glob("[!.]*/**/__pycache__")):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(ROOT / "__pycache__", ignore_errors=True)


class Verb(NamedTuple):
    call: Callable[..., None]
    arguments: str = ""  # as the usage shows them; "" for none


VERBS = {
    "setup": Verb(setup),
    "demo": Verb(demo, "[ARGUMENTS]"),
    "test": Verb(test, "[ARGUMENTS]"),
    "lint": Verb(lint),
    "format": Verb(reformat),
    "readme": Verb(readme, "[--check]"),
    "bench": Verb(bench, "[ARGUMENTS]"),
    "binary": Verb(binary),
    "package": Verb(package),
    "keys": Verb(keys, "[KEYS]"),
    "release": Verb(release, "[KEYS [PREVIOUS]]"),
    "renew": Verb(renew, "[REPOSITORY [KEYS]]"),
    "docs": Verb(docs),
    "lock": Verb(lock),
    "fuzz": Verb(fuzz, "[TARGET] [--seconds N]"),
    "clean": Verb(clean),
}


def usage() -> str:
    lines = (f"  {name + ' ' + verb.arguments:29} {verb.call.__doc__}" for name, verb in VERBS.items())
    return "\n".join(((__doc__ or "").rstrip(), "", "Verbs:", *lines))


def main(arguments: list[str]) -> int:
    name, *rest = arguments or [""]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    verb = VERBS.get(name)
    if verb is None or (rest and not verb.arguments):
        print(usage(), file=sys.stderr)
        return 2
    try:
        verb.call(*rest)
    except BuildError as error:
        say(f"{name}: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
