"""The dashboard and the alerts: every query is read by Prometheus' own parser, and each alert fires when it should."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import ray
import yaml

from ray_kd.ray_metrics import METRICS
from tests.unit.k8s import exported, manifests

MONITORING = manifests.K8S / "components" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
CASES = Path(__file__).parent / "alerts.yaml"

RATES = re.compile(r"\b(?:rate|increase)\(\s*(ray_[a-z0-9_]+)")
INTERVALS = {"$__rate_interval": "1m", "$run": ".*"}


@pytest.fixture
def promtool():
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    return found


@pytest.fixture
def rules_file(tmp_path):
    """The rules as Prometheus' operator gives them to Prometheus."""
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(RULES))
    return path


def queries():
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for name, rule in ALERTS.items():
        yield name, rule["expr"]


@pytest.mark.parametrize(("where", "query"), list(queries()))
def test_a_query_asks_for_what_is_exported_and_rates_are_of_counters(where, query):
    names = exported.names_in(query)
    assert names, "no metric was found in the query"
    assert exported.unknown(query) == set()
    rated = set(RATES.findall(query))
    assert all(exported.is_counter(name) for name in rated)
    # A counter that is shown as it is goes through a rate, or is a sum of few events.
    raw = {name for name in names - rated if exported.is_counter(name)}
    assert raw <= {"ray_raykd_train_bad_steps_total", "ray_raykd_worker_group_restarts_total"}


def test_the_dashboard_shows_every_metric():
    shown = set().union(*(exported.names_in(query) for _, query in queries()))
    for name in METRICS:
        assert {f"ray_{name}", f"ray_{name}_bucket"} & shown, f"nobody sees {name}"


def test_rays_own_names_are_those_of_its_dashboards():
    text = (Path(ray.__file__).parent / "dashboard/modules/metrics/dashboards/default_dashboard_panels.py").read_text()
    for name, (label, value) in exported.OF_RAY.items():
        assert re.search(rf'{name}{{{{[^}}]*{label}="{value}"', text)


def test_the_dashboard_belongs_to_no_grafana_and_has_its_rows():
    variables = {item["name"]: item for item in DASHBOARD["templating"]["list"]}
    assert {name: item["type"] for name, item in variables.items()} == {"datasource": "datasource", "run": "query"}
    sources = [item["datasource"] for panel in PANELS for item in (panel, *panel["targets"])]
    assert all(
        source == {"type": "prometheus", "uid": "${datasource}"}
        for source in (*sources, variables["run"]["datasource"])
    )
    assert "ray_raykd_train_step" in variables["run"]["definition"]
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Is it healthy", "Loss", "Throughput and balance", "Wire and queue", "Teachers",
                    "Checkpoints and failures"]  # fmt: skip
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    assert DASHBOARD.get("id") is None


def test_no_two_panels_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_kustomize_ships_the_dashboard_where_grafana_looks(tmp_path):
    objects = manifests.build(manifests.compose(tmp_path, "overlays/two-pool-gpu", "monitoring"))
    (shipped,) = (item for item in manifests.of_kind(objects, "ConfigMap") if "grafana-dashboard.json" in item["data"])
    assert json.loads(shipped["data"]["grafana-dashboard.json"]) == DASHBOARD
    assert shipped["metadata"]["labels"]["grafana_dashboard"] == "1"
    (rules,) = manifests.of_kind(objects, "PrometheusRule")
    assert rules["spec"] == RULES


def test_the_runbook_has_every_alert():
    text = (manifests.K8S / "README.md").read_text()
    assert set(re.findall(r"\| `(RayKD\w+)` \|", text)) == set(ALERTS)


def test_promtool_reads_the_rules(promtool, rules_file):
    done = subprocess.run([promtool, "check", "rules", str(rules_file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


def test_promtool_reads_every_query_of_the_dashboard(promtool, tmp_path):
    texts = [target["expr"] for panel in PANELS for target in panel["targets"]]
    for variable, value in INTERVALS.items():
        texts = [text.replace(variable, value) for text in texts]
    rules = [{"record": f"panel:{place}", "expr": text} for place, text in enumerate(texts)]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_each_alert_fires_when_it_should_and_not_else(promtool, rules_file, tmp_path):
    cases = yaml.safe_load(CASES.read_text())
    fires, is_quiet = (
        {
            case["alertname"]
            for test in cases["tests"]
            for case in test["alert_rule_test"]
            if bool(case["exp_alerts"]) == is_on
        }
        for is_on in (True, False)
    )
    assert fires == is_quiet == set(ALERTS)
    for test in cases["tests"]:
        for case in test["alert_rule_test"]:
            for alert in case["exp_alerts"]:  # promtool compares all annotations: the longer one is no part of a case
                alert["exp_annotations"]["description"] = ALERTS[case["alertname"]]["annotations"]["description"]
    path = tmp_path / "cases.yaml"
    path.write_text(yaml.safe_dump(cases | {"rule_files": [str(rules_file)]}))
    done = subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
