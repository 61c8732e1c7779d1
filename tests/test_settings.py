"""Settings: every row, the process's sources, Agent and Endpoint to a plan with every problem named."""

import contextlib
import dataclasses
import encodings.aliases
import json
import os
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import medplum_agent as ma

SECRET = "s3cr3t-Zebra"
GOOD = {
    "baseUrl": "https://api.example.org/",
    "clientId": "client-1",
    "clientSecret": SECRET,
    "agentId": "11111111-2222-4333-8444-555555555555",
}
Row = dataclasses.Field[Any]
ROWS = [(category, name, row) for category, _, rows in ma.SETTING_GROUPS for name, row in rows.items()]
NUMBERS = [found for found in ROWS if ma.kind_of(found[2]) in ("integer", "decimal")]
CHOICES = [found for found in ROWS if found[2].metadata["choices"]]


def each(rows: list[tuple[str, str, Row]]) -> pytest.MarkDecorator:
    ids = [f"{category}.{name}" for category, name, _ in rows]
    return pytest.mark.parametrize("row", [row for _, _, row in rows], ids=ids)


# --- every row ---


@each(ROWS)
def test_default_is_valid_as_text_and_as_value(row: Row) -> None:
    assert row.metadata["label"] and row.metadata["description"]
    if row.default == "":  # not given: another rule says what happens then
        return
    assert ma.parse_setting(row, row.default) == row.default
    assert ma.parse_setting(row, str(row.default)) == row.default
    assert type(ma.parse_setting(row, str(row.default))) is type(row.default)
    assert row.metadata["max"] is None or row.default <= row.metadata["max"]


@pytest.mark.parametrize(
    "bad", ["abc", "", " ", "1,5", "0x10", "nan", "inf", "-inf", "1e999", "9" * 400, True, None, [1], {}], ids=repr
)
@pytest.mark.parametrize("kind", ["integer", "decimal"])
def test_bad_numbers(kind: str, bad: object) -> None:
    for row in (row for *_, row in NUMBERS if ma.kind_of(row) == kind):
        with pytest.raises(ValueError, match=r"^(is |must be )"):
            ma.parse_setting(row, bad)


@each(NUMBERS)
def test_lower_bound(row: Row) -> None:
    low = row.metadata["min"]
    if low is None:
        assert ma.parse_setting(row, "-5") == -5
        return
    assert ma.parse_setting(row, low) == low
    assert ma.parse_setting(row, f" {low} ") == low
    with pytest.raises(ValueError, match="at least"):
        ma.parse_setting(row, str(low - 1))


@pytest.mark.parametrize("kind", ["integer", "decimal"])
def test_fractions(kind: str) -> None:
    row = next(row for *_, row in NUMBERS if ma.kind_of(row) == kind)
    if kind == "decimal":
        assert ma.parse_setting(row, "1.5") == 1.5
        return
    with pytest.raises(ValueError, match="whole number"):
        ma.parse_setting(row, "1.5")


@each(CHOICES)
def test_choices_are_case_insensitive_and_closed(row: Row) -> None:
    for choice in row.metadata["choices"]:
        assert [ma.parse_setting(row, text) for text in (choice, choice.upper(), f" {choice.lower()} ")] == [choice] * 3
    with pytest.raises(ValueError, match=f"must be one of .*{row.metadata['choices'][-1]}"):
        ma.parse_setting(row, "purple")


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("TRUE", True), (True, True), ("false", False), (" False ", False), (False, False)],
)
def test_booleans(text: object, value: bool) -> None:
    assert ma.parse_setting(ma.rows_of(ma.Hl7Settings)["assignSeqNo"], text) is value


@pytest.mark.parametrize("text", ["1", "yes", "0", "", None])
def test_what_is_neither_true_nor_false_is_said(text: object) -> None:
    with pytest.raises(ValueError, match="true or false"):
        ma.parse_setting(ma.rows_of(ma.Hl7Settings)["assignSeqNo"], text)
    with pytest.raises(ma.PeerError, match="checkHost"):  # it must not switch the check off
        ma.parse_target("mllps://127.0.0.1:1?checkHost=yes")


def test_what_the_file_names_and_nobody_knows_is_said(tmp_path: Path) -> None:
    """A misspelt storeKey would leave the queue readable."""
    path = tmp_path / "agent.toml"
    path.write_text('storekey = "file:x"\n[logger.main]\nlogLevel = "DEBUG"\nlevel = 3\n')
    found = ma.resolve_process(["https://x/", "a", "b", "c"], {}, {}, str(path)).warnings
    assert [text.partition("unknown ")[2] for text in found] == [
        "setting 'storekey' is ignored (did you mean storeKey?)",
        "setting 'logger.main.level' is ignored (did you mean logger.main.logLevel?)"]  # fmt: skip


@pytest.mark.parametrize(
    ("address", "agent", "words"),
    [
        ("https://me:secret@x/", "c", "no user or password"), ("https://x/", "..", "not the id"),
        ("https://x/?a=b", "c", "no [?] or #"), ("https://x/#/", "c", "no [?] or #"),
    ],
)  # fmt: skip
def test_what_is_no_address_of_a_server_and_no_id_is_refused(address: str, agent: str, words: str) -> None:
    with pytest.raises(ma.ConfigError, match=words) as refused:
        ma.resolve_process((address, "a", "b", agent), {}, {}, None)
    assert "secret" not in str(refused.value)


def test_an_empty_secret_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.touch()
    with pytest.raises(ma.ConfigError, match=f"{path}.*empty"):
        ma.resolve_process(["https://x/", "a"], {}, {"MEDPLUM_CLIENT_SECRET_FILE": str(path)}, None)


# --- the process (operations contract 1 to 3) ---


@pytest.fixture(autouse=True)
def _empty_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def toml(values: Mapping[str, Any], name: str = "agent.toml") -> str:
    Path(name).write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return name


def properties(text: str | bytes, name: str = "agent.properties") -> str:
    Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
    return name


def resolve(
    arguments: Sequence[str] = (), environ: Mapping[str, str] = {}, config: str | None = None, **options: str
) -> ma.ProcessConfig:
    return ma.resolve_process(arguments, options, environ, config)


def problems(arguments: Sequence[str] = (), environ: Mapping[str, str] = {}, config: str | None = None) -> list[str]:
    with pytest.raises(ma.ConfigError) as caught:
        resolve(arguments, environ, config)
    assert SECRET not in str(caught.value)
    return list(caught.value.problems)


def test_arguments_alone() -> None:
    config = resolve([*GOOD.values(), "debug"])
    found = dataclasses.asdict(config.settings)
    assert {name: found[name] for name in GOOD} == GOOD
    assert config.settings.logLevel == config.main_log.logLevel == config.channel_log.logLevel == "DEBUG"
    assert config.warnings == ()


ENVIRONMENT = {ma.rows_of(ma.ProcessSettings)[name].metadata["env"]: value for name, value in GOOD.items()}


def test_environment_alone() -> None:
    assert set(ENVIRONMENT) == {
        "MEDPLUM_BASE_URL", "MEDPLUM_CLIENT_ID", "MEDPLUM_CLIENT_SECRET", "MEDPLUM_AGENT_ID",
    }  # fmt: skip
    assert resolve(environ={**ENVIRONMENT, "MEDPLUM_LOG_LEVEL": "warn"}).main_log.logLevel == "WARN"


def test_file_alone() -> None:
    toml({**GOOD, "heartbeatSecs": 5, "compression": True})
    config = resolve()
    assert (config.settings.clientSecret, config.settings.heartbeatSecs) == (SECRET, 5)
    assert config.settings.compression is True


def test_arguments_before_environment_before_file() -> None:
    toml({**GOOD, "clientId": "file", "agentId": "file", "logLevel": "ERROR"})
    environ = {"MEDPLUM_CLIENT_ID": "env", "MEDPLUM_AGENT_ID": "env"}
    settings = resolve([GOOD["baseUrl"], "argument"], environ).settings
    assert (settings.clientId, settings.agentId, settings.logLevel) == ("argument", "env", "ERROR")


def test_empty_environment_variables_do_not_count() -> None:
    toml(GOOD)
    assert resolve(environ={"MEDPLUM_CLIENT_ID": ""}).settings.clientId == GOOD["clientId"]


def test_toml_is_found_before_properties_and_config_beats_both() -> None:
    properties("".join(f"{key}={value}\n" for key, value in GOOD.items()))
    assert resolve().settings.clientId == "client-1"
    toml({**GOOD, "clientId": "toml"})
    assert resolve().settings.clientId == "toml"
    assert resolve(config=toml({**GOOD, "clientId": "given"}, "other.toml")).settings.clientId == "given"


def test_what_a_package_installed_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = Path(toml({**GOOD, "clientId": "installed"}, "installed.toml"))
    monkeypatch.setattr(ma, "installed_config_file", lambda: installed)
    assert resolve().settings.clientId == "installed"
    toml(GOOD)
    assert resolve().settings.clientId == "client-1"


def test_loggers_of_agent_toml() -> None:
    toml(GOOD)
    with Path("agent.toml").open("a") as file:
        file.write('[logger.main]\nlogLevel = "debug"\nfilesToKeep = 3\n[logger.channel]\nlogDir = "/x"\n')
    config = resolve()
    assert (config.main_log.logLevel, config.main_log.filesToKeep) == ("DEBUG", 3)
    assert (config.channel_log.logLevel, config.channel_log.logDir) == ("INFO", "/x")
    assert resolve([*GOOD.values(), "ERROR"]).main_log.logLevel == "ERROR"  # logLevel overrides both


def test_bad_logger_values_are_warned_about() -> None:
    Path("agent.properties").write_text(
        "".join(f"{k}={v}\n" for k, v in GOOD.items()) + "logger.main.filesToKeep=0\nlogger.channel.logLevel=LOUD\n"
    )
    config = resolve(config="agent.properties")
    assert config.main_log == config.channel_log == ma.LoggerSettings()
    assert [warning.split()[0] for warning in config.warnings] == ["logger.main.filesToKeep", "logger.channel.logLevel"]
    assert all("agent.properties" in warning for warning in config.warnings)


PROPERTIES = f"""baseUrl={GOOD["baseUrl"]}
# a comment = with an equals sign
! clientId=another comment
clientId =  client-1

clientSecret=ab=c#d==
agentId={GOOD["agentId"]}
unknown=ignored
a line without the sign
logger.main.logDir=C:\\logs
"""


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_properties(ends: str, mark: bytes) -> None:
    properties(mark + PROPERTIES.replace("\n", ends).encode())
    config = resolve()
    assert config.settings.clientSecret == "ab=c#d=="
    assert {**dataclasses.asdict(config.settings), "clientSecret": SECRET}.items() >= GOOD.items()
    assert config.main_log.logDir == "C:\\logs"


def test_last_line_of_a_property_wins() -> None:
    assert ma.parse_properties("a=1\na=2") == {"a": "2"}


def test_secret_file() -> None:
    Path("secret").write_bytes(b"\xef\xbb\xbf" + SECRET.encode() + b"\r\n")
    assert resolve(environ={**ENVIRONMENT, "MEDPLUM_CLIENT_SECRET": "", "MEDPLUM_CLIENT_SECRET_FILE": "secret"})
    toml({**{k: v for k, v in GOOD.items() if k != "clientSecret"}, "clientSecretFile": "secret"})
    assert resolve().settings.clientSecret == SECRET


def test_secret_file_that_cannot_be_read_is_the_one_problem() -> None:
    toml({**{k: v for k, v in GOOD.items() if k != "clientSecret"}, "clientSecretFile": "missing"})
    (problem,) = problems()
    assert problem.startswith("clientSecretFile missing (from agent.toml) cannot be read")


def test_secret_file_of_the_environment_beats_the_secret_of_the_file() -> None:
    Path("secret").write_text("new")
    toml({**GOOD, "clientSecret": "old"})
    assert resolve(environ={"MEDPLUM_CLIENT_SECRET_FILE": "secret"}).settings.clientSecret == "new"


def test_everything_missing_is_named_with_how_to_give_it() -> None:
    assert problems() == [
        f"{name} is missing: give it as argument {position}, as {variable}, or as {name} in agent.toml"
        for position, (name, variable) in enumerate(zip(GOOD, ENVIRONMENT, strict=True), 1)
    ]


@pytest.mark.parametrize("name", GOOD)
def test_an_empty_argument_is_missing(name: str) -> None:
    (problem,) = problems([value if key != name else "" for key, value in GOOD.items()])
    assert problem.startswith(f"{name} is missing")


def test_a_missing_value_is_named_beside_any_other_problem() -> None:
    toml({"clientSecretFile": "/run/agentId/secret", "baseUrl": GOOD["baseUrl"], "clientId": "x"})
    assert [problem.split()[0] for problem in problems()] == ["clientSecretFile", "agentId"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("baseUrl", "api.example.org", "must start with http"),
        ("baseUrl", "wss://x/", "must start with http"),
        ("baseUrl", "https://", "name a host"),
        ("agentId", "Agent/123", "is not the id"),
        ("agentId", "../x", "is not the id"),
        ("agentId", "x" * 65, "is not the id"),
        ("logLevel", "LOUD", "must be one of NONE, ERROR, WARN, INFO, DEBUG"),
        ("heartbeatSecs", 0, "must be at least 0.1"),
        ("heartbeatSecs", "often", "is not a number"),
        ("caFile", "/no/such.pem", "does not exist"),
        ("clientId", ["client-1"], "clientId"),
        ("clientSecret", [SECRET], "clientSecret"),
        ("baseUrl", 5, "baseUrl"),
    ],
)
def test_a_wrong_value_is_named_with_its_source(name: str, value: object, said: str) -> None:
    config = toml({**GOOD, name: value})
    (problem,) = problems(config=config)
    assert name in problem and said in problem and config in problem


def test_the_source_of_a_wrong_value_is_the_one_that_counted() -> None:
    toml({**GOOD, "logLevel": "INFO"})
    (problem,) = problems(environ={"MEDPLUM_LOG_LEVEL": "LOUD"})
    assert "logLevel 'LOUD' (from the environment)" in problem
    (problem,) = problems([*GOOD.values(), "LOUDER"])
    assert "'LOUDER' (from the command line)" in problem


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("agent.toml", f"clientSecret = '{SECRET}\n".encode()),
        ("agent.toml", f"clientSecret = {SECRET}\n".encode()),
        ("agent.toml", f"clientSecret = '{SECRET}'\nclientSecret = '{SECRET}'\n".encode()),
        ("agent.toml", f"clientSecret = '{SECRET}\xe9'\n".encode("latin1")),
        ("agent.properties", f"clientSecret={SECRET}\xe9\n".encode("latin1")),
    ],
)
def test_an_unreadable_file_is_named_without_its_secrets(name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    (problem,) = problems()
    assert problem.startswith(f"cannot read the configuration file {name}:")


def test_a_given_file_that_is_missing_is_named() -> None:
    (problem,) = problems(config="nowhere.toml")
    assert "nowhere.toml" in problem


def test_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(list(GOOD.values()), stateDir="/data").state_dir == Path("/data")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/x:/other")
    assert resolve(list(GOOD.values())).state_dir == Path("/var/lib/x") / GOOD["agentId"]


# --- Agent.setting[] (channel contract 3) ---


def entry(name: str, value: object) -> ma.Json:
    kinds = {bool: "Boolean", int: "Integer", float: "Decimal", str: "String"}
    return {"name": name, f"value{kinds[type(value)]}": value}


def read(*entries: ma.Json) -> ma.Plan:
    plan, problems = ma.build_plan({"setting": list(entries)}, {})
    assert problems == []
    return plan


def assert_all_defaults(plan: ma.Plan) -> None:
    assert (plan.settings, plan.defaults, plan.given) == (ma.AgentSettings(), ma.ChannelSettings(), {})


def test_agent_settings_of_each_kind() -> None:
    plan = read(
        entry("keepAlive", True),
        entry("channelMaxWorkers", 3),
        entry("channelAutoRetryBackoffMultiplier", 1.5),
        entry("channelRetryMode", "NORMAL"),
        entry("unknown", 1),
    )
    assert plan.settings == ma.AgentSettings(keepAlive=True)
    assert plan.defaults == ma.ChannelSettings(maxWorkers=3, autoRetryBackoffMultiplier=1.5, retryMode="normal")
    assert plan.given == {
        "keepAlive": True, "channelMaxWorkers": 3, "channelAutoRetryBackoffMultiplier": 1.5,
        "channelRetryMode": "normal",
    }  # fmt: skip
    assert plan.warnings == ()


def test_a_whole_number_is_a_decimal() -> None:
    assert read(entry("channelAutoRetryBackoffMultiplier", 3)).defaults.autoRetryBackoffMultiplier == 3


def test_no_settings_are_the_defaults() -> None:
    warnings: list[str] = []
    assert (ma.agent_settings({}, warnings), warnings) == ({}, [])
    assert_all_defaults(read())


def test_the_first_entry_of_a_name_counts() -> None:
    assert read(entry("channelMaxWorkers", 3), entry("channelMaxWorkers", 4)).defaults.maxWorkers == 3


@pytest.mark.parametrize("first", [{"valueString": "7"}, {"valueInteger": 0.5}, {}])
def test_the_first_entry_counts_even_when_it_cannot_be_used(first: ma.Json) -> None:
    plan = read({"name": "channelMaxWorkers", **first}, entry("channelMaxWorkers", 4))
    assert_all_defaults(plan)
    assert len(plan.warnings) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        entry("keepAlive", "true"),
        entry("keepAlive", 1),
        entry("channelMaxWorkers", "3"),
        entry("channelMaxWorkers", 3.0),
        entry("queueDbPath", 5),
    ],
)
def test_the_wrong_value_member_is_not_set(wrong: ma.Json) -> None:
    plan = read(wrong)
    assert_all_defaults(plan)
    (warning,) = plan.warnings
    assert wrong["name"] in warning and "value" in warning


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (entry("channelRetryMode", "always"), "must be one of none, normal, guaranteed"),
        (entry("queueRetentionDays", -1), "must be at least 0"),
    ],
)
def test_a_bad_agent_setting_is_warned_about_and_left_at_its_default(wrong: ma.Json, said: str) -> None:
    plan = read(wrong)
    assert_all_defaults(plan)
    (warning,) = plan.warnings
    assert said in warning and "the default is used" in warning


def test_below_the_limit_is_clamped_where_the_contract_says_so() -> None:
    names = ("channelMaxWorkers", "channelAutoRetryBaseDelayMs", "channelAutoRetryBackoffMultiplier")
    plan = read(*(entry(name, 0) for name in names))
    assert plan.given == dict.fromkeys(names, 1)
    assert len([one for one in plan.warnings if "must be at least 1; it is set to 1" in one]) == 3


def test_above_the_limit_is_clamped() -> None:
    plan = read(entry("channelMaxWorkers", 1000))
    assert plan.defaults.maxWorkers == 500 and plan.given == {"channelMaxWorkers": 500}
    (warning,) = plan.warnings
    assert "channelMaxWorkers 1000" in warning and "500" in warning


# --- build_plan (channel contract 1, 2, 4.1 and 11) ---


def built(
    *addresses: str | ma.Json | ma.AgentError,
    settings: Sequence[ma.Json] = (),
    status: str = "active",
    names: Sequence[str] | None = None,
) -> tuple[ma.Plan, list[str]]:
    """A plan of channels A, B, ... with these addresses."""
    chosen = names or [chr(65 + n) for n in range(len(addresses))]
    endpoints: dict[str, ma.Json | ma.AgentError] = {
        f"Endpoint/{n}": {"status": "active", "address": given} if isinstance(given, str) else given
        for n, given in enumerate(addresses)
    }
    channels = [{"name": name, "endpoint": {"reference": f"Endpoint/{n}"}} for n, name in enumerate(chosen)]
    agent = {"resourceType": "Agent", "status": status, "setting": list(settings), "channel": channels}
    return ma.build_plan(agent, endpoints)


def channel(query: str, *settings: ma.Json) -> tuple[ma.ChannelPlan, list[str]]:
    plan, found = built(f"mllp://0.0.0.0:56000?{query}", settings=settings)
    assert found == []
    return plan.channels[0], list(plan.warnings)


def test_a_plain_channel() -> None:
    plan, found = built("mllp://0.0.0.0:56000")
    assert (found, plan.warnings, plan.status) == ([], (), "active")
    (only,) = plan.channels
    assert (only.name, only.port, only.active) == ("A", 56000, True)
    assert only.settings == ma.Hl7Settings() and not only.given


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("", "Invalid empty endpoint address for channel 'A'"),
        ("mllp://[::1", "needs a port"),
        ("mllp://host:port", "needs a port"),
        ("mllp://host:65536", "needs a port"),
        ("mllp://host:-1", "needs a port"),
        ("mllp://host", "needs a port from 1 to 65535"),
        ("mllp://host:0", "needs a port from 1 to 65535"),
        ("mllp://", "needs a port"),
        ("http://host:80", "unsupported endpoint type 'http'"),
        ("file:///x", "unsupported endpoint type 'file'"),
        ("56000", "unsupported endpoint type"),
        ("mllp://h:5?encoding=klingon", "encoding 'klingon' is unknown"),
        ("tcp://h:5?startChar=%02&endChar=%03&encoding=klingon", "encoding 'klingon' is unknown"),
        ("tcp://h:5?mode=astm&encoding=utf-16", "cannot be framed"),
        ("serial:///dev/ttyUSB0?mode=astm&encoding=hex", "encoding 'hex' is unknown"),
        ("mllp://h:5?encoding=", "encoding '' is unknown"),
        ("mllp://h:5?encoding=hex", "encoding 'hex' is unknown"),
        ("mllp://h:5?encoding=utf-16", "cannot be framed by MLLP"),
        ("mllp://h:5?encoding=utf-16-le", "cannot be framed by MLLP"),
        ("mllp://h:5?encoding=utf-32", "cannot be framed by MLLP"),
    ],
)
def test_a_problem_names_its_channel_and_leaves_the_others_alone(address: str, said: str) -> None:
    plan, (problem,) = built(address, "mllp://h:6")
    assert said in problem and "'A'" in problem
    assert [one.name for one in plan.channels] == ["B"]


@pytest.mark.parametrize("encoding", ["klingon", "", "hex", "utf-16"])
def test_an_encoding_of_a_device_that_cannot_be_used_is_a_problem(encoding: str) -> None:
    """Other bytes than those meant would reach the device."""
    with pytest.raises(ma.ConfigError, match=f"the device: .*encoding '{encoding}'"):
        ma.read_parameters(ma.DeviceSettings, f"encoding={encoding}", "the device", pytest.fail)


def test_two_channels_on_one_port() -> None:
    plan, found = built("mllp://0.0.0.0:5000", "mllp://127.0.0.1:5000?enhanced=true")
    assert found == [
        "Invalid agent config. Both 'A' (mllp://0.0.0.0:5000) and 'B' (mllp://127.0.0.1:5000?enhanced=true) "
        "declare use of port 5000"
    ]
    assert len(plan.channels) == 1


def test_an_endpoint_that_is_off_still_takes_part_in_validation() -> None:
    off = {"status": "off", "address": "mllp://h:5000"}
    plan, found = built(off, "mllp://h:6000")
    assert found == [] and [one.active for one in plan.channels] == [False, True]
    assert "port 5000" in built(off, "mllp://h:5000")[1][0]
    assert built({"status": "off", "address": ""})[1] == ["Invalid empty endpoint address for channel 'A'"]


@pytest.mark.parametrize("status", ["active", "suspended", "error", "test", ""])
def test_other_endpoint_statuses_are_active(status: str) -> None:
    assert built({"status": status, "address": "mllp://h:5"})[0].channels[0].active


def test_two_channels_of_one_name() -> None:
    plan, (problem,) = built("mllp://h:5", "mllp://h:6", names=["ADT", "ADT"])
    assert "two channels" in problem and "'ADT'" in problem
    assert [one.port for one in plan.channels] == [5]


def test_a_name_stays_taken_by_a_channel_with_a_problem() -> None:
    assert len(built("", "mllp://h:6", names=["ADT", "ADT"])[1]) == 2


def test_a_channel_without_name_or_endpoint() -> None:
    assert "no name" in built("mllp://h:5", names=[""])[1][0]
    _, found = ma.build_plan({"channel": [{"name": "A"}, {"name": "B", "endpoint": {"reference": "Endpoint/9"}}]}, {})
    assert "'A'" in found[0] and "'B'" in found[1] and "Endpoint/9" in found[1]


def test_an_unreadable_endpoint_gives_its_reason() -> None:
    plan, (problem,) = built(ma.ServerError("Not found", 404), "mllp://h:6")
    assert "'A'" in problem and "Not found" in problem and "Endpoint/0" in problem
    assert len(plan.channels) == 1


def test_every_problem_is_listed() -> None:
    assert len(built("", "mllp://h", "mllp://h:5", "mllp://h:5", "x://h:1", ma.ServerError("gone"))[1]) == 5


@pytest.mark.parametrize("strict", [False, True])
def test_warnings_become_problems_when_validation_is_strict(strict: bool) -> None:
    plan, found = built("mllp://h:5?enhanced=maybe&colour=red", settings=[entry("strictConfigValidation", strict)])
    assert len(plan.warnings) == 2
    assert found == (list(plan.warnings) if strict else [])


def test_an_agent_that_is_off_reads_no_endpoints() -> None:
    agent = {"status": "off", "channel": [{"name": "A", "endpoint": {"reference": "Endpoint/1"}}]}
    assert ma.endpoint_references(agent) == []
    plan, found = ma.build_plan(agent, {})
    assert (plan.status, plan.channels, found) == ("off", (), [])
    assert ma.endpoint_references({**agent, "status": "error"}) == ["Endpoint/1"]


def test_endpoint_references_are_distinct_and_in_order() -> None:
    refs = ["Endpoint/2", "Endpoint/1", "Endpoint/2", None]
    assert ma.endpoint_references({"channel": [{"name": "x", "endpoint": {"reference": r}} for r in refs]}) == refs[:2]
    assert ma.endpoint_references({"channel": [{"name": "x"}]}) == ma.endpoint_references({}) == []


# --- parameters of a channel ---


@pytest.mark.parametrize(
    ("query", "name", "value"),
    [
        ("enhanced=true", "enhanced", "true"),
        ("enhanced=AA", "enhanced", "aa"),
        ("appLevelAck=er", "appLevelAck", "ER"),
        ("assignSeqNo=TRUE", "assignSeqNo", True),
        ("messagesPerMin=60", "messagesPerMin", 60),
        ("messagesPerMin=60abc", "messagesPerMin", 60),
        ("messagesPerMin=%2060.9", "messagesPerMin", 60),
        ("messagesPerMin=-5", "messagesPerMin", -5),
        ("messagesPerMin=0", "messagesPerMin", 0),
        ("encoding=windows-1252", "encoding", "windows-1252"),
        ("duplicateBehavior=reject", "duplicateBehavior", "reject"),
        ("retryMode=Normal", "retryMode", "normal"),
        ("autoRetryMaxAttempts=0", "autoRetryMaxAttempts", 0),
        ("autoRetryBackoffMultiplier=1.5", "autoRetryBackoffMultiplier", 1.5),
        ("maxWorkers=500", "maxWorkers", 500),
        ("logicalChannelKey=PID-3.1,MSH-4", "logicalChannelKey", "PID-3.1,MSH-4"),
        ("logicalChannelKey=PV1-3.1.2", "logicalChannelKey", "PV1-3.1.2"),
    ],
)
def test_a_good_parameter(query: str, name: str, value: object) -> None:
    plan, warnings = channel(query)
    assert (getattr(plan.settings, name), warnings) == (value, [])
    assert plan.given == {name}


@pytest.mark.parametrize(
    "query",
    [
        "enhanced=false", "enhanced=", "appLevelAck=XX", "messagesPerMin=abc", "messagesPerMin=", "duplicateBehavior=x",
        "retryMode=always", "autoRetryBaseDelayMs=0", "autoRetryMaxDelayMs=x", "autoRetryMaxAttempts=-1",
        "autoRetryBackoffMultiplier=0.9", "maxWorkers=0", "maxWorkers=-3", "logicalChannelKey=PID",
        "logicalChannelKey=PID-0", "logicalChannelKey=pid-3", "logicalChannelKey=PID.3", "logicalChannelKey=PID-3,,",
        "logicalChannelKey=PID-3.1.2.3", "logicalChannelKey=PID-3.1,X", "messagesPerMin=" + "9" * 400,
        "maxWorkers=" + "9" * 400,
    ],
)  # fmt: skip
def test_a_bad_parameter_is_warned_about_and_ignored(query: str) -> None:
    name = query.split("=")[0]
    plan, (warning,) = channel(query)
    assert plan.settings == ma.Hl7Settings()
    assert "'A'" in warning and name in warning


def test_a_number_above_the_limit_is_clamped() -> None:
    plan, (warning,) = channel("maxWorkers=501")
    assert plan.settings.maxWorkers == 500
    assert "501" in warning and "500" in warning


def test_an_unknown_parameter_is_warned_about() -> None:
    assert channel("colour=red")[1] == ["channel 'A': unknown parameter 'colour' is ignored"]


def test_largest_back_off_is_raised_to_the_base() -> None:
    plan, (warning,) = channel("autoRetryBaseDelayMs=5000&autoRetryMaxDelayMs=10")
    assert plan.settings.autoRetryMaxDelayMs == 5000 and "autoRetryMaxDelayMs" in warning
    plan, warnings = channel("autoRetryBaseDelayMs=70000")
    assert plan.settings.autoRetryMaxDelayMs >= 70000 and len(warnings) == 1


FALLBACKS = [
    (row.name, row.metadata["agentSetting"])
    for row in dataclasses.fields(ma.Hl7Settings)
    if row.metadata["agentSetting"]
]
SAMPLES: dict[str, tuple[Any, Any]] = {  # two values, both unlike the default: of the Agent, of the address
    "retryMode": ("none", "guaranteed"), "logicalChannelKey": ("PID-3.1", "MSH-4"), "botErrorAck": ("AR", "none"),
    "botEmptyAck": ("AE", "none"), "autoRetryBackoffMultiplier": (3.0, 4.0),
    "autoRetryBaseDelayMs": (2000, 3000), "autoRetryMaxDelayMs": (90_000, 80_000),
}  # fmt: skip


@pytest.mark.parametrize(("name", "agent"), FALLBACKS)
def test_address_beats_agent_setting_beats_default(name: str, agent: str) -> None:
    of_agent, of_address = SAMPLES.get(name, (7, 8))
    setting = entry(agent, of_agent)
    assert getattr(channel("")[0].settings, name) == ma.rows_of(ma.Hl7Settings)[name].default
    assert getattr(channel("", setting)[0].settings, name) == of_agent
    assert getattr(channel(f"{name}={of_address}", setting)[0].settings, name) == of_address
    assert name in channel("", setting)[0].given


@pytest.mark.parametrize(("name", "agent"), FALLBACKS)
def test_a_bad_address_value_falls_back_to_the_agents(name: str, agent: str) -> None:
    of_agent = SAMPLES.get(name, (7, 8))[0]
    plan, (warning,) = channel(f"{name}=-purple-", entry(agent, of_agent))
    assert getattr(plan.settings, name) == of_agent and name in warning


@pytest.mark.parametrize(("name", "agent"), FALLBACKS)
def test_defaults_of_agent_and_channel_agree(name: str, agent: str) -> None:
    channels, agents = ma.rows_of(ma.Hl7Settings)[name], ma.AGENT_ROWS[agent]
    assert (agents.default, agents.type) == (channels.default, channels.type)
    assert agents.metadata == channels.metadata  # the same values are good for both


@pytest.mark.parametrize("cls", [ma.StreamSettings, ma.DicomSettings])
def test_every_protocol_has_the_same_agent_settings(cls: type[ma.ChannelSettings]) -> None:
    rows = ma.rows_of(cls)
    for name, row in ma.rows_of(ma.ChannelSettings).items():
        assert rows[name].metadata["agentSetting"] == row.metadata["agentSetting"]
    assert {row.metadata["agentSetting"] for row in rows.values()} <= {"", *ma.AGENT_ROWS}


def test_sequence_numbers_mean_order() -> None:
    assert channel("assignSeqNo=true")[0].workers == 1
    plan, (warning,) = channel("assignSeqNo=true&maxWorkers=4")
    assert plan.workers == 4 and "assignSeqNo" in warning
    plan, (warning,) = channel("assignSeqNo=true", entry("channelMaxWorkers", 4))
    assert plan.workers == 4 and "assignSeqNo" in warning


def test_key_of_the_plan() -> None:
    assert channel("")[0].key_spec == ""
    assert channel("maxWorkers=1&logicalChannelKey=PID-3")[0].key_spec == "*"
    assert channel("logicalChannelKey=PID-3")[0].key_spec == "PID-3"


@pytest.mark.parametrize(
    ("query", "mode"),
    [
        ("", "original"), ("enhanced=true", "enhanced"), ("enhanced=aa", "enhanced"), ("retryMode=none", "none"),
        ("enhanced=true&retryMode=guaranteed", "guaranteed"),
    ],
)  # fmt: skip
def test_retry_mode_of_the_plan(query: str, mode: str) -> None:
    assert channel(query)[0].policy.mode == mode


def test_query_values_are_form_data() -> None:
    assert channel("logicalChannelKey=PID%2D3%2CMSH-4")[0].key_spec == "PID-3,MSH-4"


def test_parse_key_reads_paths() -> None:
    assert ma.parse_key("PID-3.1, Z1A-10,PV1-3.1.2") == (("PID", 3, 1, 0), ("Z1A", 10, 0, 0), ("PV1", 3, 1, 2))


@pytest.mark.parametrize("encoding", sorted({*encodings.aliases.aliases.values(), "idna", "punycode", "utf-8-sig"}))
def test_an_encoding_that_is_accepted_can_carry_messages(encoding: str) -> None:
    """Known limits 17 and 25: what is not refused here must decode whatever comes, and encode whatever we answer."""
    plan, found = built(f"mllp://h:5?encoding={encoding}")
    if found:
        return
    settings = plan.channels[0].settings
    assert isinstance(settings, ma.Hl7Settings)
    name = settings.encoding
    for content in (bytes(range(256)), b"\xff\x80\x0e\x1b$", "MSH|é€漢".encode(name, "replace")):
        with contextlib.suppress(ma.PeerError):
            ma.decode_hl7(content, name)
    assert b"\x1c\r" not in "MSH|a\rPID|1é€漢\r".encode(name, "replace")


@given(
    st.dictionaries(
        st.sampled_from([row.name for row in dataclasses.fields(ma.Hl7Settings)]) | st.text(max_size=4),
        st.one_of(st.text(max_size=8), st.integers().map(str), st.floats().map(str)),
        max_size=5,
    ),
    st.lists(
        st.builds(
            lambda name, kind, value: {"name": name, f"value{kind}": value},
            st.sampled_from(list(ma.AGENT_ROWS)),
            st.sampled_from(["Boolean", "Integer", "Decimal", "String"]),
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=6)),
        ),
        max_size=4,
    ),
)
@hypothesis_settings(max_examples=150, deadline=None)
def test_any_parameters_give_a_plan_or_problems(parameters: dict[str, str], settings: list[ma.Json]) -> None:
    plan, found = built(f"mllp://h:5?{urllib.parse.urlencode(parameters, errors='replace')}", settings=settings)
    assert plan.channels or found
    for one in plan.channels:
        for row in dataclasses.fields(one.settings):
            value, low, high = getattr(one.settings, row.name), row.metadata["min"], row.metadata["max"]
            assert (low is None or value >= low) and (high is None or value <= high)


# --- the printed tables ---


def test_schema_lists_every_row() -> None:
    schema = ma.settings_schema()
    assert schema["agentVersion"] == ma.VERSION
    listed = [(row["category"], row["name"]) for row in schema["settings"]]
    assert listed == [(category, name) for category, name, _ in ROWS]
    for (*_, row), shown in zip(ROWS, schema["settings"], strict=True):
        assert shown["type"] == ma.kind_of(row) and shown["label"] and shown["description"] and shown["category"]
        assert shown.get("default", "") == row.default
        assert shown.get("min") == row.metadata["min"] and shown.get("max") == row.metadata["max"]
    assert json.loads(json.dumps(schema)) == schema


def test_contracts_settings_are_all_there() -> None:
    """Channel contract 3 and 4.1: a name that sites use already must be known, under the same type."""
    expected = {
        "boolean": "keepAlive durableQueue strictConfigValidation",
        "integer": "maxClientsPerRemote logStatsFreqSecs queueRetentionDays queueRetentionMaxMb channelMaxWorkers "
        "queueErroredRetentionDays queueSweepIntervalSecs channelAutoRetryBaseDelayMs channelAutoRetryMaxDelayMs "
        "channelAutoRetryMaxAttempts",
        "decimal": "channelAutoRetryBackoffMultiplier",
        "string": "queueDbPath channelRetryMode channelLogicalChannelKey",
    }
    rows = ma.AGENT_ROWS
    for kind, listed in expected.items():
        assert {name: ma.kind_of(rows[name]) for name in listed.split()} == dict.fromkeys(listed.split(), kind)
    assert set(ma.rows_of(ma.Hl7Settings)) >= {
        "encoding", "enhanced", "appLevelAck", "assignSeqNo", "messagesPerMin", "duplicateBehavior", "retryMode",
        "autoRetryBaseDelayMs", "autoRetryMaxDelayMs", "autoRetryMaxAttempts", "autoRetryBackoffMultiplier",
        "logicalChannelKey", "maxWorkers",
    }  # fmt: skip


def test_markdown_lists_every_row() -> None:
    lines = ma.settings_markdown().splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    common = {name: (row.default, row.metadata) for name, row in ma.rows_of(ma.ChannelSettings).items()}
    own = [
        name
        for category, name, row in ROWS
        if category in ("agent", "device") or common.get(name) != (row.default, row.metadata)
    ]
    assert sorted(line.split("`")[1] for line in rows) == sorted([*common, *own])  # what is the same is listed once
    assert all(line.replace("\\|", "").count("|") == 5 for line in rows)
    assert sum(line.startswith("### ") for line in lines) == len(ma.SETTING_GROUPS) + 1


@pytest.mark.skipif(sys.platform == "win32", reason="users of other systems")
@pytest.mark.parametrize("user", [0, 65532])
def test_a_user_without_a_home_gets_the_place_of_services(monkeypatch: pytest.MonkeyPatch, user: int) -> None:
    """As in a container: no HOME, and no line in the list of users."""
    import pwd

    def nobody(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert ma.default_state_root() in (Path("/var/lib/medplum-agent"), Path("/", ma._MAC_FOLDER))
    assert ma.command_parser("medplum-agent").format_help()


@pytest.mark.parametrize(("address", "wanted"), [("MLLP://h:5", "mllp://h:5"), ("Dicom://h:5", "dicom://h:5")])
def test_schemes_of_addresses_have_no_case(address: str, wanted: str) -> None:
    """RFC 3986 3.1; the rest of an address stays as it is."""
    found, same = (ma.channel_plan("A", {"address": one}, {}, []) for one in (address, wanted))
    assert found == same and found.address == wanted


def test_what_may_hold_a_secret_is_not_shown_when_it_is_wrong(tmp_path: Path) -> None:
    """Somebody pasted the key itself: it must not stand in the journal."""
    path = tmp_path / "agent.toml"
    path.write_text("storeKey = 'hunter2hunter2'\n")
    with pytest.raises(ma.ConfigError, match="storeKey") as caught:
        ma.resolve_process(["https://x/", "a", "b", "c"], {}, {}, str(path))
    assert "hunter2" not in str(caught.value)


def test_no_clock_shows_24_30() -> None:
    with pytest.raises(ValueError, match="needs the form"):
        ma.opening_hours("22:00-24:30")
    assert ma.opening_hours("22:00-24:00")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (rb'stateDir = "C:\new\temp"', "the path of stateDir needs single quotes"),  # was C:, a line end, ew ...
        (rb'stateDir = "C:\Users\agent"', "the path of stateDir needs single quotes"),  # Invalid hex value
        (rb'storeKey = "command:D:\tools\key.exe"', "the path of storeKey needs single quotes"),
        ("stateDir = 'C:\\Müller'\r\n".encode("cp1252"), "it is not UTF-8"),  # 'utf-8' codec can't decode byte 0xfc
        ("stateDir = 'C:\\x'\r\n".encode("utf-16"), "it is not UTF-8"),  # as > of PowerShell writes
    ],
)
def test_a_path_of_windows_is_read_as_it_is_meant_or_refused(tmp_path, content, words):
    (path := tmp_path / "agent.toml").write_bytes(content)
    with pytest.raises(ma.ConfigError, match=words):
        ma.read_config_file(str(path))


@pytest.mark.parametrize("written", ["'C:\\new'", '"C:\\\\new"', '\'"C:\\new" x\' # "C:\\new"'])
def test_a_path_of_windows_that_is_well_written_is_read(tmp_path, written):
    (path := tmp_path / "agent.toml").write_bytes(
        b"\xef\xbb\xbfagentId = 'a'\r\nalarmTo = " + written.encode() + b"\r\n"
    )
    assert "C:\\new" in ma.read_config_file(str(path))[1]["alarmTo"]
