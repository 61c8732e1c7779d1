"""The alert rules and the dashboard of packaging/monitoring ask for nothing that the agent does not tell."""

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support import ROOT, Receiver, eventually, free_ports, message, setting, site

MONITORING = ROOT / "packaging/monitoring"
RULES = yaml.safe_load((MONITORING / "prometheus-rules.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
SCRAPED = {"job", "instance"}  # Prometheus adds these

Told = dict[str, set[str]]  # name of a metric -> names of its labels


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What an agent with a channel, a device and an alarm tells."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}/metrics"
    found: Told = {"up": set()}

    def figures() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())

    env, once = {"MEDPLUM_STATUS_ADDRESS": f"127.0.0.1:{port}"}, [setting("channelAutoRetryMaxAttempts", 1)]
    folder = tmp_path_factory.mktemp("monitoring")
    with (
        Receiver() as receiver,
        site(folder, {"ADT": "?enhanced=true"}, once, env=env) as here,
        here.caller() as caller,
    ):
        here.sandbox.bot = lambda transmit: (400, "no")
        with here.device("ADT") as device:
            assert device.ask(message("DEAD"))[0] == "CA"
        caller.store(receiver.url(), message("PUSHED"))
        eventually(lambda: "alarm_active{" in figures() and "device_connections{" in figures(), timeout=30)
        for family in text_string_to_metric_families(figures()):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in RULES)
    yield from (target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])


def asked(expression: str) -> Told:
    """Metrics and labels of an expression; what it groups or joins by belongs to all of them."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', expression)
    shared = {label for labels in re.findall(r"\b(?:by|on) \(([\w, ]+)\)", bare) for label in labels.split(", ")}
    bare = re.sub(r"\b(?:by|on) \([\w, ]+\)|\[[^]]*\]", "", bare)
    found: Told = {}
    for name, labels in re.findall(r"\b([a-z_]\w*)\b(?!\s*\()(?:\{([^}]*)\})?", re.sub(r"\bor\b", "", bare)):
        if name not in re.findall(r"(\w+)!?=~?", bare):
            found.setdefault(name, set(shared)).update(re.findall(r"(\w+)\s*[!=]", labels))
    return found


def test_the_reader_of_expressions() -> None:
    assert asked('60 * sum by (instance, a) (rate(x_total{b=~"c|d", e!="f"}[$__i])) or up == 0') == {
        "x_total": {"instance", "a", "b", "e"}, "up": {"instance", "a"},
    }  # fmt: skip


@pytest.mark.parametrize("expression", list(expressions()))
def test_expressions_ask_for_what_is_told(told: Told, expression: str) -> None:
    found = asked(expression)
    assert found
    for name, labels in found.items():
        assert labels <= told[name] | SCRAPED, name


def test_what_people_read_names_labels_that_are_told(told: Told) -> None:
    for rule in RULES:
        labels = set[str]().union(*(told[name] for name in asked(rule["expr"])), SCRAPED)
        assert set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values()))) <= labels, rule["alert"]
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            labels = set[str]().union(*(told[name] for name in asked(target["expr"])), SCRAPED)
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, panel["title"]


def test_every_rule_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in RULES:
        assert rule["for"] and rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert re.search("`medplum-agent (status|doctor|queue list dead)", rule["annotations"]["description"])


def test_kinds_of_alarms_are_the_agents() -> None:
    kinds = set(re.findall(r'yield Alarm\("(\w+)"', (ROOT / "medplum_agent.py").read_text()))
    named = {
        kind for rule in RULES for group in re.findall(r'kind!?=~?"([^"]+)"', rule["expr"]) for kind in group.split("|")
    }
    assert named <= kinds


def test_the_dashboard_can_be_imported() -> None:
    assert {one["type"] for one in DASHBOARD["templating"]["list"]} == {"datasource", "query"}
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {"${datasource}"}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids)) and "id" not in DASHBOARD


BAD = {  # one series each that sets its alert off
    "MedplumAgentGone": 'up{job="medplum-agent", instance="a"} 0x60',
    "MedplumAgentServerAway": "medplum_agent_server_away_seconds 0+60x60",
    "MedplumAgentOldestWaiting": 'medplum_agent_alarm_active{kind="age", subject="ADT"} 1x60',
    "MedplumAgentDeadLetters": 'medplum_agent_device_dead_letters{device="mllp://a:1"} 3x60',
    "MedplumAgentPortClosed": 'medplum_agent_alarm_active{kind="port", subject="ADT"} 1x60',
    "MedplumAgentQueueUnhealthy": "medplum_agent_queue_healthy 0x60",
    "MedplumAgentDiskLow": "medplum_agent_disk_free_bytes 1048576x60",
    "MedplumAgentAlarm": 'medplum_agent_alarm_active{kind="silent", subject="ADT"} 1x60',
}
WELL = [
    'up{job="medplum-agent", instance="b"} 1x60', "medplum_agent_server_away_seconds 0x60",
    'medplum_agent_channel_dead_letters{channel="ADT"} 0x60', "medplum_agent_queue_healthy 1x60",
    "medplum_agent_disk_free_bytes 1000000000x60",
]  # fmt: skip


def test_every_rule_can_be_set_off() -> None:
    assert [rule["alert"] for rule in RULES] == list(BAD)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="NO PROMTOOL: not checked")
def test_promtool_sets_each_alert_off_alone(tmp_path: Path) -> None:
    def case(series: list[str], alerts: list[str]) -> dict[str, Any]:
        given = [dict(zip(("series", "values"), one.rsplit(" ", 1), strict=True)) for one in series]
        samples = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in alerts]
        query = 'count by (alertname) (ALERTS{alertstate="firing"})'
        wanted = [{"expr": query, "eval_time": "30m", "exp_samples": samples}]
        return {"interval": "1m", "input_series": given, "promql_expr_test": wanted}

    cases = [case([*WELL[:1], series], [alert]) for alert, series in BAD.items()]
    tests = {"rule_files": [str(MONITORING / "prometheus-rules.yml")], "tests": [case(WELL, []), *cases]}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(tests))
    done = subprocess.run(["promtool", "test", "rules", "tests.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
