"""What turns the module into packages, as far as it can be tried in seconds; `build.py test --binary` tries the rest.

A folder with a stand-in program takes the place of the compiled one.
"""

import ast
import hashlib
import importlib
import importlib.metadata
import json
import os
import plistlib
import re
import shutil
import ssl
import struct
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from license_expression import get_spdx_licensing
from packageurl import PackageURL

import medplum_agent
from tests import releases
from tests.support import ROOT

PACKAGING = ROOT / "packaging"
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
UNIT = PACKAGING / "linux/medplum-agent.service"
UPGRADE_UNIT = UNIT.with_name("medplum-agent-upgrade.service")
UPGRADE_PATH = UPGRADE_UNIT.with_suffix(".path")
SCRIPTS = sorted(path for path in PACKAGING.rglob("*") if path.is_file() and path.read_bytes()[:3] == b"#!/")
DOCUMENTS = (  # in both Linux packages
    "bash-completion/completions/medplum-agent", "fish/vendor_completions.d/medplum-agent.fish",
    "man/man1/medplum-agent.1.gz", "doc/medplum-agent/monitoring/prometheus-rules.yml",
    "doc/medplum-agent/monitoring/grafana-dashboard.json",
)  # fmt: skip
EXPOSURE = 2.0  # systemd-analyze security: 0 is locked up, 10 is open

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="packages are made on their own systems")


def needs(command: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(command) is None, reason=f"NO {command.upper()}: not checked")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """packaging/*.py by name; `packaging` itself is also a library of pytest's."""
    monkeypatch.syspath_prepend(str(PACKAGING))
    yield importlib.import_module
    for name in [
        name for name, module in sys.modules.items() if str(PACKAGING) in str(getattr(module, "__file__", ""))
    ]:
        del sys.modules[name]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Stands for dist/medplum-agent."""
    folder = tmp_path / "medplum-agent"
    (folder / "certifi").mkdir(parents=True)
    shutil.copy(shutil.which("true") or "/bin/true", folder / "medplum-agent")
    (folder / "certifi/cacert.pem").write_text("certificates\n")
    (folder / "LICENSES.txt").write_text("terms\n")
    return folder


def run(*command: str | Path, **how: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- what the binary is made of ---


def pins(group: str) -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["dependency-groups"][group], *(project["project"]["dependencies"] if group == "binary" else ())]
    return dict(pin.split(";")[0].strip().lower().replace("_", "-").split("==") for pin in wanted)


@pytest.mark.parametrize("group", ["binary", "release"])
def test_the_lock_has_the_pins_with_hashes_and_no_address(group: str) -> None:
    text = (PACKAGING / f"{group}.lock").read_text()
    locked = dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", text, re.MULTILINE))
    assert pins(group).items() <= locked.items(), "run: python3 build.py lock"
    for entry in re.split(r"\n(?=[a-z])", text):
        assert "--hash=sha256:" in entry, entry.splitlines()[0]
    assert "://" not in text


def test_what_signs_upgrades_is_what_reads_them_and_never_part_of_the_program() -> None:
    assert pins("release")["tuf"] == pins("binary")["tuf"]
    assert not re.search("^cryptography==", (PACKAGING / "binary.lock").read_text(), re.MULTILINE)


def test_every_module_that_is_loaded_late_is_named_for_the_compiler(scripts: Any) -> None:
    binary = scripts("binary")
    tree = ast.parse((ROOT / "medplum_agent.py").read_text())
    late = {
        (name.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    named = {name.split(".")[0] for name in (*binary.NAMED_MODULES, *binary.NAMED_PACKAGES)}
    assert late - set(sys.stdlib_module_names) <= named
    assert not named & set(binary.LEFT_OUT)


def test_only_our_module_is_compiled(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins: dict[str, dict[str, Any]] = {
        "nuitka": {}, "nuitka.plugins": {}, "nuitka.freezer": {},
        "nuitka.plugins.PluginBase": {"NuitkaPluginBase": object},
        "nuitka.freezer.DllDependenciesPosix": {"_linux_dll_ignore_list": ["libz.so"]},
    }  # fmt: skip
    for name, members in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["nuitka.freezer"].DllDependenciesPosix = sys.modules["nuitka.freezer.DllDependenciesPosix"]  # type: ignore[attr-defined]
    plugin = scripts("nuitka_plugin").AgentPlugin
    assert {name: plugin.decideCompilation(name) for name in ("__main__", "urllib3", "pydicom.uid")} == {
        "__main__": "compiled", "urllib3": "bytecode", "pydicom.uid": "bytecode",
    }  # fmt: skip


def test_the_version_names_the_commit(scripts: Any, tmp_path: Path) -> None:
    binary = scripts("binary")
    text = binary.stamped_source(tmp_path).read_text()
    assert re.search(r'^BUILD = "[0-9a-z]{7}"', text, re.MULTILINE)
    assert text.replace(f'"{binary.build_commit()}"', '"0000000"', 1) == (ROOT / "medplum_agent.py").read_text()


@pytest.fixture
def inventory(scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Knows the archives of two distributions, and takes urllib3 for the compiler, which is not installed here."""
    module = scripts("inventory")
    told = [
        {
            "metadata": {"name": name, "version": importlib.metadata.version(name)},
            "download_info": {"url": f"https://host/{name}.whl", "archive_info": {"hashes": {"sha256": 64 * "a"}}},
        }
        for name in ("hl7", "apsw-sqlite3mc")
    ]
    monkeypatch.setattr(module, "INSTALLED", tmp_path / "installed.json")
    module.INSTALLED.write_text(json.dumps({"install": told}))
    known = module.distribution_part
    monkeypatch.setattr(module, "distribution_part", lambda name: known({"nuitka": "urllib3"}.get(name, name)))
    return module


def compiled(inventory: Any, folder: Path) -> list[Any]:
    """What would be in the program, were it compiled with the Python of the tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [pin.split("==")[0] for pin in project["dependencies"]]
    extensions = ("_ssl", "zlib", "_ctypes", "_bz2", "_lzma", "pyexpat", "_decimal", "apsw")
    modules = "".join(f'<module name="{name}"/>' for name in extensions)
    distributions = "".join(f'<distribution name="{name}"/>' for name in names)
    libraries = "".join(
        f'<included_dll source_path="{path.resolve()}" dest_path="{path.name}" ignored="no"/>'
        for name in ("libz.so.1", "libffi.so.8", "libuuid.so.1")
        for path in Path("/lib").glob(f"*-linux-gnu/{name}")
    )
    (folder / "libz.so.1").write_bytes(b"as it is shipped")
    report = folder / "report.xml"
    report.write_text(f"<report>{modules}{distributions}{libraries}</report>")
    return list(inventory.parts(inventory.read_report(report), folder))


def test_the_bill_of_materials_is_what_its_schema_and_the_ntia_ask_for(inventory: Any, tmp_path: Path) -> None:
    text = inventory.cyclonedx(compiled(inventory, tmp_path), "5.2.0-abcdef0", 1_700_000_000)
    assert (error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)) is None, error
    bill = json.loads(text)
    about = bill["metadata"]
    assert about["timestamp"] == "2023-11-14T22:13:20Z"
    assert about["authors"] and about["supplier"]["name"] and about["tools"]["components"][0]["version"]
    spdx = get_spdx_licensing()
    for part in (about["component"], *bill["components"]):
        assert part["supplier"]["name"] and "@" not in part["supplier"]["name"], part
        assert PackageURL.from_string(part["purl"]).to_string() == part["purl"]
        assert part.get("version") or "medplum-agent:version" in {told["name"] for told in part["properties"]}
        term = part["licenses"][0]
        for name in spdx.validate(term.get("expression") or term["license"]["id"]).invalid_symbols:
            assert name.startswith("LicenseRef-"), part
        assert inventory.UNKNOWN_LICENSE not in str(term) or part["purl"].startswith("pkg:deb/")  # these bring the text
    named = {ref["ref"] for ref in bill["dependencies"]}
    assert named == {"medplum-agent", *(part["bom-ref"] for part in bill["components"])}
    assert named == {"medplum-agent", *(ref for one in bill["dependencies"] for ref in one.get("dependsOn", ()))}


def test_the_bill_of_materials_names_the_libraries_in_c(inventory: Any, tmp_path: Path) -> None:
    parts = compiled(inventory, tmp_path)
    native = {part.name: part for part in parts if part.within and not part.purl.startswith("pkg:cargo/")}
    assert {"OpenSSL", "zlib", "libffi", "bzip2", "xz", "expat", "mpdecimal", "SQLite"} <= set(native)
    assert native["OpenSSL"].version == ssl.OPENSSL_VERSION.split()[1]
    assert native["SQLite"].version == apsw.sqlite_lib_version()  # the driver's, not Python's
    assert native["SQLite"].within == native["SQLite3MultipleCiphers"].within == next(
        part.purl for part in parts if part.purl.startswith("pkg:pypi/apsw-sqlite3mc@")
    )  # fmt: skip
    assert native["SQLite3MultipleCiphers"].version in vars(apsw)["mc_version"]
    assert native["SQLite"].cpe == f"cpe:2.3:a:sqlite:sqlite:{apsw.sqlite_lib_version()}:*:*:*:*:*:*:*"


@needs("dpkg-query")
def test_a_library_of_the_system_is_its_package(inventory: Any, tmp_path: Path) -> None:
    found = [part for part in compiled(inventory, tmp_path) if part.name == "zlib"]
    if not list(Path("/lib").glob("*-linux-gnu/libz.so.1")):
        pytest.skip("NO SHARED ZLIB: not checked")
    assert [part.purl.startswith("pkg:deb/") and "upstream=zlib" in part.purl for part in found] == [True]
    assert found[0].sha256 == hashlib.sha256(b"as it is shipped").hexdigest()


def test_hashes_are_of_the_archives_and_of_the_signed_program(inventory: Any, tmp_path: Path) -> None:
    parts = [inventory.distribution_part(name) for name in ("hl7", "orjson")]
    assert [part.sha256 for part in parts] == [64 * "a", ""]
    crates = list(inventory.crates(parts[1]))
    assert {part.within for part in crates} == {parts[1].purl} and all(part.sha256 for part in crates)
    bill, signed = inventory.cyclonedx([*parts, *crates], "5.2.0", 0), tmp_path / "signed"
    signed.write_text("program")
    assert inventory.cyclonedx([*crates[::-1], *parts], "5.2.0", 0) == bill
    (tmp_path / "bill").write_text(bill)
    isolated = (sys.executable, "-S", "-E")  # as the release runs it, without any library
    text = run(*isolated, PACKAGING / "inventory.py", tmp_path / "bill", signed)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    wanted = [{"alg": "SHA-256", "content": hashlib.sha256(b"program").hexdigest()}]
    assert json.loads(text)["metadata"]["component"]["hashes"] == wanted


def test_every_licence_text_is_there(inventory: Any, tmp_path: Path) -> None:
    parts = compiled(inventory, tmp_path)
    texts = inventory.license_texts(parts, ROOT / "LICENSE")
    assert "Mozilla Public License" in texts and "Andrey Petrov" in texts and "Apache License" in texts
    assert "GNU LESSER GENERAL PUBLIC LICENSE" in texts  # icmplib's, which adds to the next
    assert "GNU GENERAL PUBLIC LICENSE\n                       Version 3" in texts
    silent = texts.partition("Without a text of their own:")[2]
    crates = {part.name for part in parts if part.purl.startswith("pkg:cargo/")}
    assert {line.split()[0] for line in silent.splitlines() if line} <= {*crates, "CPython"}
    assert all(inventory.terms_of(name)[0][1] for name in ("shawl", *(row.name for row in inventory.NATIVE)))


def test_what_vulnerabilities_mean_is_said_of_the_same_bill(inventory: Any, tmp_path: Path) -> None:
    bill = inventory.cyclonedx(compiled(inventory, tmp_path), "5.2.0", 0)
    check = JsonStrictValidator(SchemaVersion.V1_6).validate_str
    none = inventory.vex(bill, PACKAGING / "vex.toml")
    assert check(none) is None and json.loads(none)["vulnerabilities"] == []
    example = (PACKAGING / "vex.toml").read_text().partition("An entry:")[2]
    (tmp_path / "vex.toml").write_text(example.replace("\n#", "\n"))
    some = inventory.vex(bill, tmp_path / "vex.toml")
    assert check(some) is None
    (stated,) = json.loads(some)["vulnerabilities"]
    assert (stated["id"], stated["analysis"]["state"]) == ("CVE-2030-12345", "not_affected")
    serial = json.loads(bill)["serialNumber"].removeprefix("urn:uuid:")
    assert re.fullmatch(rf"urn:cdx:{serial}/1#pkg%3A\w+%2F.*(openssl|libssl).*", stated["affects"][0]["ref"])


@needs("cc")
@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own")
def test_the_boot_process_compiles_without_warnings() -> None:
    run("cc", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", PACKAGING / "linux/onefile_boot.c")


# --- Linux ---


@needs("systemd-analyze")
@pytest.mark.parametrize("unit", [UNIT, UPGRADE_UNIT, UPGRADE_PATH], ids=lambda unit: unit.name)
def test_the_units_are_valid_and_hardened(tmp_path: Path, unit: Path) -> None:
    for one in (UNIT, UPGRADE_UNIT, UPGRADE_PATH):
        (tmp_path / one.name).write_text(one.read_text().replace("/usr/bin/medplum-agent", "/bin/true"))
    assert run("systemd-analyze", "verify", "--man=no", tmp_path / unit.name) == ""
    if unit.suffix == ".service":
        found = run("systemd-analyze", "security", "--offline=true", "--no-pager", unit)
        level = re.search(r"exposure level for \S+: ([\d.]+)", found)
        assert level and float(level[1]) <= EXPOSURE, found


def test_who_asks_and_who_answers_an_upgrade_meet() -> None:
    """The service leaves its wish where the path unit looks, and the other unit does what the command says."""
    assert "RuntimeDirectory=medplum-agent" in UNIT.read_text().splitlines()
    wish = f"PathExists=/run/medplum-agent/{medplum_agent.REQUEST_FILE}"
    assert wish in UPGRADE_PATH.read_text().splitlines()
    command = next(line for line in UPGRADE_UNIT.read_text().splitlines() if line.startswith("ExecStart=")).split()[1:]
    options = medplum_agent.command_parser("medplum-agent").parse_intermixed_args(command)
    assert (options.arguments, options.requested) == (["upgrade"], True)
    assert options.config == "/etc/medplum-agent/agent.toml"


def directives(unit: Path) -> dict[str, list[str]]:
    """Values by name, in their order."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)", unit.read_text(), re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def test_root_looks_where_the_agent_asks_and_writes_nowhere_else() -> None:
    agent, path, service = directives(UNIT), directives(UPGRADE_PATH), directives(UPGRADE_UNIT)
    folder = f"/run/{agent['RuntimeDirectory'][0]}"
    request = f"{folder}/{medplum_agent.REQUEST_FILE}"
    versions = [f"/usr/{place}/medplum-agent/versions" for place in ("lib", "libexec")]
    assert agent["RuntimeDirectoryMode"] == ["0700"] and "RuntimeDirectoryPreserve" not in agent
    assert path["PathExists"] == [request] and path["PartOf"] == path["WantedBy"] == [UNIT.name]
    assert service["ReadWritePaths"] == [" ".join(f"-{writable}" for writable in (folder, *versions))]
    assert service["ProtectSystem"] == ["strict"] and service["ReadOnlyPaths"] == ["/run"]
    assert service["CapabilityBoundingSet"] == ["CAP_DAC_OVERRIDE"]  # settings and request are the agent's
    assert service["ExecStart"] == [agent["ExecStart"][0].replace("--config", "upgrade --requested --config")]
    answers = " ".join(f"{place}/{medplum_agent.ANSWER_FILE}" for place in versions)
    assert service["ExecStartPre"] == [f"/bin/rm -f {answers}"]
    assert f" rm -rf {request}'" in service["ExecStopPost"][0]


SCRIPTLETS = {  # of a package: before and after the agent is restarted, and when it goes
    "deb": ("deb/postinst", "try-restart", "deb/prerm", "/usr/lib/medplum-agent/versions"),
    "rpm": ("medplum-agent.spec", "%posttrans", "medplum-agent.spec", "/usr/libexec/medplum-agent/versions"),
}


@pytest.mark.parametrize("kind", SCRIPTLETS)
def test_what_a_package_brings_is_what_runs(kind: str) -> None:
    """An agent that runs may load more of its version until it is restarted."""
    installs, restarts, removes, versions = SCRIPTLETS[kind]
    text = (UNIT.parent / installs).read_text().replace('"$versions', versions).replace('"', "")
    current = text.index(f"{versions}/{medplum_agent.CURRENT_FILE}")
    assert current < text.index(restarts) < text.index(f"{versions}/[0-9]*")
    assert text.index(f"stop {UPGRADE_PATH.name} {UPGRADE_UNIT.name}") < current
    assert f"rm -rf {versions}/* {versions}/.new-*" in (UNIT.parent / removes).read_text()


def test_the_unit_starts_the_link_and_gives_up_only_where_settings_cannot_work() -> None:
    lines = UNIT.read_text().splitlines()
    assert "ExecStart=/usr/bin/medplum-agent --config /etc/medplum-agent/agent.toml" in lines
    assert f"RestartPreventExitStatus={medplum_agent.EX_CONFIG}" in lines


def test_settings_to_fill_in_name_what_is_missing(tmp_path: Path) -> None:
    path = shutil.copy(PACKAGING / "linux/agent.toml", tmp_path)
    with pytest.raises(medplum_agent.ConfigError) as caught:
        medplum_agent.resolve_process([], {}, {}, str(path))
    assert [problem.split()[0] for problem in caught.value.problems] == ["clientId", "clientSecret", "agentId"]


def test_settings_that_are_offered_are_settings(tmp_path: Path) -> None:
    text = (PACKAGING / "linux/agent.toml").read_text()
    values = re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE).replace('""', '"given"')
    (tmp_path / "agent.toml").write_text(values)
    config = medplum_agent.resolve_process([], {}, {}, str(tmp_path / "agent.toml"))
    offered = set(re.findall(r"^# (\w+) = ", text, re.MULTILINE))
    assert offered == {"upgradeUrl", "remoteUpgrade", "upgradeWindow"} and not config.warnings
    untouched = medplum_agent.ProcessSettings()
    assert all(getattr(config.settings, name) != getattr(untouched, name) for name in offered)


@needs("dpkg-deb")
@needs("lintian")
def test_debian_package(scripts: Any, program: Path, tmp_path: Path) -> None:
    package = scripts("packages").debian(program, tmp_path, tmp_path / "work")
    listed = run("dpkg-deb", "--contents", package)
    assert "./usr/bin/medplum-agent -> ../lib/medplum-agent/medplum-agent" in listed
    installed = next(line for line in listed.splitlines() if line.endswith("lib/medplum-agent/medplum-agent"))
    assert installed.startswith("-rwxr-xr-x root/root")
    for unit in (UNIT, UPGRADE_UNIT, UPGRADE_PATH):
        assert f" ./lib/systemd/system/{unit.name}\n" in listed
    assert re.search(r"^drwxr-xr-x root/root .* \./usr/lib/medplum-agent/versions/$", listed, re.MULTILINE)
    assert "./etc/" not in listed  # the settings are the site's own
    assert run("dpkg-deb", "--field", package, "Recommends", "Suggests") == "Suggests: ca-certificates\n"  # offline
    for name in (*DOCUMENTS, "zsh/vendor-completions/_medplum-agent"):
        assert f" ./usr/share/{name}\n" in listed
    run("lintian", "--fail-on", "error", "--allow-root", package)


@needs("rpmbuild")
def test_rpm_package(scripts: Any, program: Path, tmp_path: Path) -> None:
    package = scripts("packages").rpm(program, tmp_path, tmp_path / "work")
    form = "[%{FILENAMES}\t%{FILEMODES:perms}\t%{FILEUSERNAME}\t%{FILEGROUPNAME}\n]"
    query = ("rpm", "--query", "--dbpath", tmp_path / "db", "--package", package)
    listed = run(*query, "--queryformat", form)
    modes = {name: tuple(rest) for name, *rest in (line.split("\t") for line in listed.splitlines())}
    own = ("medplum-agent", "medplum-agent")
    assert modes["/etc/medplum-agent/agent.toml"] == ("-rw-------", *own)
    assert modes["/var/lib/medplum-agent"] == modes["/var/log/medplum-agent"] == ("drwx------", *own)
    assert modes["/usr/libexec/medplum-agent/medplum-agent"] == ("-rwxr-xr-x", "root", "root")
    assert modes["/usr/libexec/medplum-agent/versions"] == ("drwxr-xr-x", "root", "root")
    for unit in (UNIT, UPGRADE_UNIT, UPGRADE_PATH):
        assert modes[f"/usr/lib/systemd/system/{unit.name}"] == ("-rw-r--r--", "root", "root")
    assert not [name for name in modes if name.startswith("/usr/lib/medplum-agent")]  # SELinux: lib_t, not executed
    link = run(*query, "--queryformat", "[%{FILENAMES} %{FILELINKTOS}\n]")
    assert "/usr/bin/medplum-agent ../libexec/medplum-agent/medplum-agent\n" in link
    assert run(*query, "--recommends") == "" and run(*query, "--suggests") == "ca-certificates\n"
    for name in (*DOCUMENTS, "zsh/site-functions/_medplum-agent"):
        assert modes[f"/usr/share/{name}"] == ("-rw-r--r--", "root", "root")


@needs("rpmbuild")
@needs("rpmlint")
def test_rpm_package_passes_rpmlint(scripts: Any, program: Path, tmp_path: Path) -> None:
    """But for what the file beside the spec gives a reason for, which is more than this stand-in shows."""
    package = scripts("packages").rpm(program, tmp_path, tmp_path / "work")
    reasons = ("--ignore-unused-rpmlintrc", "--rpmlintrc", PACKAGING / "linux/medplum-agent.rpmlintrc")
    run("rpmlint", "--strict", *reasons, package)


@pytest.mark.parametrize(("kind", "tool"), [("debian", "dpkg-deb"), ("rpm", "rpmbuild")])
def test_the_same_folder_gives_the_same_package(
    scripts: Any, program: Path, tmp_path: Path, kind: str, tool: str
) -> None:
    """Byte for byte: whatever the clock, the times of the files, the umask and the folder of the build are."""
    if shutil.which(tool) is None:
        pytest.skip(f"NO {tool.upper()}: not checked")
    made = []
    for number, mask in enumerate((0o022, 0o077)):
        dist, before = tmp_path / f"dist{number}" / ("x" * number), os.umask(mask)
        try:
            dist.mkdir(parents=True)
            made.append(getattr(scripts("packages"), kind)(program, dist, dist / "work"))
        finally:
            os.umask(before)
        for path in program.rglob("*"):
            os.utime(path, (1_700_000_000, 1_700_000_000))
    assert made[0].read_bytes() == made[1].read_bytes()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(PACKAGING)))
@needs("shellcheck")
def test_scripts(script: Path) -> None:
    run("shellcheck", "--severity=warning", script)
    assert os.access(script, os.X_OK)


# --- macOS, Windows, container ---


def test_launchd_job(scripts: Any, program: Path, tmp_path: Path) -> None:
    job = plistlib.loads((PACKAGING / "macos/medplum-agent.plist").read_bytes())
    scripts("packages").macos_tree(program, tmp_path / "tree")
    assert (tmp_path / "tree" / job["ProgramArguments"][0].lstrip("/")).is_file()
    assert job["KeepAlive"] and job["Umask"] == 0o077 and job["ExitTimeOut"] > medplum_agent.STOP_SECS
    assert (tmp_path / "tree/usr/local/bin/medplum-agent").resolve().is_file()


@needs("makensis")
def test_windows_installer(scripts: Any, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shawl = tmp_path / "shawl.exe"
    shawl.write_bytes(b"MZ")
    monkeypatch.setenv("SHAWL", str(shawl))
    installer = scripts("packages").windows(program, tmp_path, tmp_path)
    assert installer.read_bytes()[:2] == b"MZ"


@needs("wixl")
@needs("msibuild")
def test_msi_has_its_actions_where_windows_takes_them(tmp_path: Path) -> None:
    (tmp_path / "installer.exe").write_bytes(b"MZ")
    made = tmp_path / "agent.msi"
    run(PACKAGING / "windows/make_msi.sh", "5.2.0", tmp_path / "installer.exe", made)
    rows = [line.split("\t") for line in run("msiinfo", "export", made, "InstallExecuteSequence").splitlines()]
    at = {row[0]: int(row[2]) for row in rows[3:] if row[-1].strip().isdigit()}
    order = ["InstallInitialize", "RemoveExistingProducts", "ProcessComponents", "Uninstall", "UninstallPurge",
             "RemoveFiles", "InstallFiles", "Install", "InstallConfig", "InstallFinalize"]  # fmt: skip
    assert sorted(order, key=at.__getitem__) == order
    properties = run("msiinfo", "export", made, "Property")
    assert "ProductVersion\t5.2.0" in properties and "SECRET" not in properties.upper()


def test_the_installer_shows_and_passes_no_secret() -> None:
    script = (PACKAGING / "windows/installer.nsi").read_text()
    for line in script.splitlines():
        if "$ClientSecret" in line:
            assert not re.search(r"DetailPrint|MessageBox|Exec|Label|CreateText", line), line
    assert "ShowInstDetails nevershow" in script and '${NSD_CreatePassword} 0 69u 100% 13u "$ClientSecret"' in script


def test_the_installer_knows_its_service_account_by_number() -> None:
    """Windows derives it from the name: SHA-1 of its upper case in UTF-16, as five numbers."""
    script = (PACKAGING / "windows/installer.nsi").read_text()
    (name,) = re.findall(r'^!define SERVICE "(\w+)"', script, re.MULTILINE)
    numbers = struct.unpack("<5I", hashlib.sha1(name.upper().encode("utf-16-le")).digest())
    assert f'!define SERVICE_SID "*S-1-5-80-{"-".join(map(str, numbers))}"' in script
    assert re.search(r"advfirewall firewall add rule .* profile=domain,private ", script)
    taken = [script.index(f'"$StateDir{what}') for what in ('" /setowner', '" /inheritance:r', '\\*" /reset')]
    assert taken == sorted(taken) and script.index("Call CloseStateDir") < script.index("Call LookAtService")


def test_container() -> None:
    lines = (PACKAGING / "docker/Dockerfile").read_text().splitlines()
    words = {line.split()[0]: line for line in lines if line and line[0].isupper()}
    assert words["USER"] == "USER 65532:65532"
    assert "/var/lib/medplum-agent" in words["VOLUME"] and "MEDPLUM_STATE_DIR=/var/lib/medplum-agent" in words["ENV"]
    assert words["HEALTHCHECK"].endswith('"health"]')


# --- workflows and what they publish ---


def workflow(name: str) -> Any:
    return yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())


def test_workflows_pass_actionlint() -> None:
    actionlint = Path(sys.executable).with_name("actionlint")
    if not actionlint.exists():
        pytest.skip("NO ACTIONLINT: not checked")
    run(actionlint, *WORKFLOWS, cwd=ROOT)


def test_workflows_pass_zizmor() -> None:
    run(Path(sys.executable).with_name("zizmor"), "--offline", "--no-progress", *WORKFLOWS, cwd=ROOT)


def test_workflows_name_files_that_exist() -> None:
    for path in WORKFLOWS:
        for name in set(re.findall(r"packaging/[\w/.-]+\w", path.read_text())):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_ci_covers_the_pythons_and_systems() -> None:
    jobs = workflow("ci")["jobs"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    matrix = jobs["test"]["strategy"]["matrix"]
    assert project["requires-python"] == f">={matrix['python'][0]}"
    assert {system.split("-")[0] for system in matrix["os"]} == {"ubuntu", "macos", "windows"}
    assert jobs["binary"]["strategy"]["matrix"]["os"] == matrix["os"]


def test_a_release_has_every_system_once() -> None:
    rows = workflow("release")["jobs"]["build"]["strategy"]["matrix"]["include"]
    assert [row["name"] for row in rows] == [
        "linux-x86_64", "linux-arm64", "macos-arm64", "macos-x86_64", "windows-x86_64",
    ]  # fmt: skip
    for row in rows:
        system, _ = row["name"].split("-")
        assert row["built"].removeprefix("medplum-agent-").split(".")[0] == system
        assert row["one_file"].split("-")[0] == system
    assert [row["one_file"] for row in rows if row["one_file"].endswith("linux")] == ["linux"]


def test_jobs_have_time_limits_and_no_more_rights_than_they_need() -> None:
    for path in WORKFLOWS:
        flow = yaml.safe_load(path.read_text())
        assert flow["permissions"] == {"contents": "read"}
        for name, job in flow["jobs"].items():
            assert "uses" in job or "timeout-minutes" in job, name
            assert "permissions" not in job or name == "publish"
            for step in job.get("steps", ()):
                kept = step.get("with", {}).get("persist-credentials", True)
                assert not step.get("uses", "").startswith("actions/checkout@") or kept is False, name


def test_keys_and_publishing_wait_for_approval_and_for_the_tests_of_what_is_shipped() -> None:
    jobs = workflow("release")["jobs"]
    for name, job in jobs.items():
        secret = "secrets." in str(job) or "write" in job.get("permissions", {}).values()
        assert job.get("environment") == ("release" if secret else None), name
    assert set(jobs["publish"]["needs"]) == {"ci", "try"} and set(jobs["try"]["needs"]) == {"build", "msi"}
    assert jobs["build"]["needs"] == jobs["ci"]["needs"] == "version"
    built, tried = ({row["name"] for row in jobs[name]["strategy"]["matrix"]["include"]} for name in ("build", "try"))
    assert built == tried


def test_only_a_tag_on_main_is_released(tmp_path: Path) -> None:
    """The workflow's own commands in a repository whose second commit is on another branch."""
    step = next(step for step in workflow("release")["jobs"]["version"]["steps"] if "run" in step)
    for name in ("medplum_agent.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)

    def git(*words: str) -> str:
        return run("git", "-c", "user.name=n", "-c", "user.email=e", *words, cwd=tmp_path).strip()

    def compared(**facts: str) -> bool:
        tag = f"v{medplum_agent.__version__}"
        environ = {**os.environ, "GITHUB_REF_TYPE": "tag", "GITHUB_REF_NAME": tag, "GITHUB_SHA": main, **facts}
        return subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=environ).returncode == 0

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    main = git("rev-parse", "HEAD")
    git("update-ref", "refs/remotes/origin/main", main)
    git("commit", "--quiet", "--allow-empty", "--message", "second")
    assert compared()
    assert not compared(GITHUB_SHA=git("rev-parse", "HEAD"))
    assert not compared(GITHUB_REF_TYPE="branch")
    assert not compared(GITHUB_REF_NAME="v0.0.1")


def test_a_fresh_timestamp_needs_no_approval_and_has_one_key() -> None:
    """Which can only say that the newest release still is the newest."""
    flow = workflow("renew")
    (job,) = flow["jobs"].values()
    assert job["environment"] == "renew" and set(flow[True]) == {"schedule", "workflow_dispatch"}  # YAML's "on"
    assert set(re.findall(r"secrets\.(\w+)", str(job))) == {"UPGRADE_TIMESTAMP_KEY", "UPGRADE_PASSPHRASE"}
    assert flow["concurrency"] == workflow("release")["jobs"]["publish"]["concurrency"]


@pytest.mark.parametrize(("system", "roles"), [("upgrades", "snapshot targets timestamp"), ("renew", "timestamp")])
def test_keys_of_upgrades_come_from_the_environment(tmp_path: Path, system: str, roles: str) -> None:
    """A stand-in takes the place of Python, and shows what build.py would be given."""
    script, shown = tmp_path / "packaging/sign.sh", tmp_path / "python3"
    script.parent.mkdir()
    shutil.copy(PACKAGING / "sign.sh", script)
    (script.parent / "upgrade-root.json").touch()
    shown.write_text('#!/bin/sh\necho "$2"\nfor given in "$3" "$4"; do cd "$given" && grep . *; done\n')
    shown.chmod(0o755)
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/timestamp.json").write_text("signed\n")
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "ALLOW_UNSIGNED": "false"}
    environ |= {f"UPGRADE_{role.upper()}_KEY": f"key of {role}" for role in roles.split()}
    lines = run(script, system, tmp_path / "repository", env=environ).splitlines()
    assert lines[0] == {"upgrades": "release", "renew": "renew"}[system]
    keys = [f"{role}.pem:key of {role}" for role in roles.split()] if len(roles.split()) > 1 else ["key of timestamp"]
    assert sorted(lines[1:]) == sorted([*keys, "signed"])
    done = subprocess.run([script, system, "none"], capture_output=True, text=True, env=environ | {
        "UPGRADE_TIMESTAMP_KEY": ""})  # fmt: skip
    assert done.returncode == 1 and "UPGRADE_TIMESTAMP_KEY is not configured" in done.stdout


@pytest.mark.parametrize("tags", ["v5.4.0\nv5.3.0\n", ""])
def test_upgrades_go_on_from_the_newest_release_that_has_them(tmp_path: Path, tags: str) -> None:
    """A stand-in takes the place of gh."""
    (tmp_path / "tags").write_text(tags)
    (tmp_path / "gh").write_text(
        f'#!/bin/sh\nif [ "$1" = api ]; then cat {tmp_path}/tags; else echo "$@" >{tmp_path}/asked; fi\n'
    )
    (tmp_path / "gh").chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "GITHUB_REPOSITORY": "owner/name"}
    printed = run(PACKAGING / "fetch_repository.sh", "previous", env=environ)
    assert printed.strip() == tags.partition("\n")[0]
    asked = (tmp_path / "asked").read_text() if tags else ""
    assert asked.startswith("release download v5.4.0 --dir previous --pattern *.root.json " if tags else "")
    assert (tmp_path / "asked").exists() == bool(tags)


@pytest.mark.parametrize("system", ["linux", "macos", "windows", "upgrades", "renew"])
def test_without_a_key_nothing_is_published_but_where_that_is_allowed(system: str) -> None:
    keys = ("GPG_PRIVATE_KEY", "MACOS_CERTIFICATE", "WINDOWS_CERTIFICATE", "UPGRADE_TIMESTAMP_KEY",
            "UPGRADE_TARGETS_KEY", "ALLOW_UNSIGNED")  # fmt: skip
    environ = {name: value for name, value in os.environ.items() if name not in keys}
    command: tuple[str | Path, ...] = (PACKAGING / "sign.sh", system, "a file")
    for refused in ({}, {"ALLOW_UNSIGNED": "false"}):
        done = subprocess.run(command, capture_output=True, text=True, env={**environ, **refused})
        assert done.returncode == 1 and done.stdout.startswith("::error title=Not signed")
    said = run(*command, env={**environ, "ALLOW_UNSIGNED": "true"})
    without = {"upgrades": "agents cannot upgrade themselves to this release", "renew": "the timestamp is not renewed"}
    assert said.startswith("::notice title=Not signed")
    assert said.endswith(f" is not configured, so {without.get(system, 'these are not signed: a file')}\n")
    assert workflow("release")["env"]["ALLOW_UNSIGNED"] == "${{ inputs.unsigned || false }}"
    assert workflow("release")[True]["workflow_dispatch"]["inputs"]["unsigned"]["default"] is False  # YAML's "on"


def test_the_release_signs_the_archives_of_all_systems(tmp_path: Path) -> None:
    """The workflow's own step in a copy of the sources, with a stand-in for what makes an environment; twice."""
    keys, here = releases.throw_away_keys(), tmp_path / "here"
    (here / "packaging").mkdir(parents=True)
    for name in ("sign.sh", "upgrades.py", "packages.py", "binary.py", "inventory.py"):
        shutil.copy(PACKAGING / name, here / "packaging")
    for source, target in ((keys.root, "packaging/upgrade-root.json"), (ROOT / "medplum_agent.py", "medplum_agent.py")):
        shutil.copy(source, here / target)
    (here / "build.py").write_text(
        "import subprocess, sys\nfrom pathlib import Path\nhere = Path(__file__).parent\n"
        f"sys.exit(subprocess.call([{sys.executable!r}, here / 'packaging/upgrades.py', 'release', here / 'dist', "
        "here / 'dist/repository', *sys.argv[2:]]))\n"
    )
    steps = workflow("release")["jobs"]["publish"]["steps"]
    (step,) = (step for step in steps if "UPGRADE_TARGETS_KEY" in step.get("env", ()))
    environ = {name: os.environ.get(name, "") for name in ("PATH", "TMPDIR")}
    for role in ("targets", "snapshot", "timestamp"):
        environ[f"UPGRADE_{role.upper()}_KEY"] = (keys.folder / f"{role}.pem").read_text()
    version, repository = medplum_agent.__version__, here / "dist/repository"
    (here / "assets").mkdir()
    for system in ("linux-x86_64", "macos-arm64"):
        (here / f"assets/medplum-agent-{version}-{system}.tar.gz").write_text(system)
    (here / f"assets/medplum-agent-{version}-linux-x86_64-image.tar.gz").write_text("image")
    for release in (1, 2):
        run("bash", "-e", "-c", step["run"], cwd=here, env=environ)
        found = json.loads((repository / f"{release}.targets.json").read_text())["signed"]["targets"]
        assert len(found) == 2 and all("image" not in name for name in found)
        made = {path.name for path in repository.iterdir()}
        assert {"1.root.json", "timestamp.json", f"medplum-agent-{version}.bundle"} <= made
        repository.rename(here / "previous") if release == 1 else None
        shutil.rmtree(here / "dist")


def test_an_older_version_can_read_the_manifest(tmp_path: Path) -> None:
    """As the reference does (operations contract 6): the first asset that ends in .exe or linux."""
    names = ["medplum-agent-9-windows-x86_64.exe", "medplum-agent-installer-9.exe", "medplum-agent-9-linux-arm64"]
    for name in (*names, "medplum-agent-9-linux"):
        (tmp_path / name).write_text(name)
    isolated = (sys.executable, "-S", "-E")  # as the release runs it, without any library
    run(*isolated, PACKAGING / "release.py", tmp_path, "https://example.org/v9/")
    manifest = json.loads((tmp_path / "release-manifest.json").read_text())
    assert manifest["tag_name"] == f"v{medplum_agent.__version__}"
    first = {end: next(a for a in manifest["assets"] if a["name"].endswith(end)) for end in (".exe", "linux")}
    assert first[".exe"]["name"] == "medplum-agent-installer-9.exe"
    assert first["linux"] == {
        "name": "medplum-agent-9-linux", "browser_download_url": "https://example.org/v9/medplum-agent-9-linux",
        "sha256": hashlib.sha256(b"medplum-agent-9-linux").hexdigest(), "size": 21,
    }  # fmt: skip
    run("sha256sum", "--check", "--quiet", "SHA256SUMS", cwd=tmp_path)
