"""Profile observe: dashboards, rules, scrapes and the collector's pipelines, as far as files tell.

That each metric is there in a live scrape, test_local.py says, which has a stack.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from deploy.grafana.__main__ import FOLDER, files
from deploy.local.compose import interpolate
from tests.deploy.promql import CHOSEN, wanted

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROMTOOL = shutil.which("promtool")
DURATION = re.compile(r"(\d+(ms|s|m|h|d))+")

# OpenTelemetry Collector contrib 0.133: the settings of each component that ours uses, by the
# README beside its source.
COMPONENTS = {
    "receivers": {"otlp": {"protocols"}},
    "processors": {
        "memory_limiter": {
            "check_interval", "limit_mib", "spike_limit_mib", "limit_percentage",
            "spike_limit_percentage",
        },
        "redaction": {
            "allow_all_keys", "allowed_keys", "ignored_keys", "blocked_key_patterns",
            "blocked_values", "allowed_values", "summary",
        },
        "tail_sampling": {
            "decision_wait", "num_traces", "expected_new_traces_per_sec", "decision_cache",
            "policies",
        },
        "batch": {"timeout", "send_batch_size", "send_batch_max_size"},
    },
    "exporters": {
        "otlp": {"endpoint", "tls", "sending_queue", "retry_on_failure"},
    },
}  # fmt: skip
POLICIES = {
    "string_attribute": {"key", "values", "enabled_regex_matching", "cache_max_size"},
    "status_code": {"status_codes"},
    "latency": {"threshold_ms", "upper_threshold_ms"},
    "probabilistic": {"sampling_percentage", "hash_salt"},
}


def yaml(file: str) -> Any:
    return YAML(typ="safe").load((DEPLOY / file).read_text())


def rules() -> Iterator[dict[str, Any]]:
    for group in yaml("prometheus/rules.yaml")["groups"]:
        yield from group["rules"]


def panels() -> Iterator[dict[str, Any]]:
    for file in sorted(FOLDER.glob("*.json")):
        yield from json.loads(file.read_text())["panels"]


# ---- dashboards ---------------------------------------------------------------------------------


def test_the_dashboards_are_as_they_are_written() -> None:
    """`python -m deploy.grafana` was run after the last change, and nothing else lies there."""
    made = dict(files())
    assert set(FOLDER.iterdir()) == set(made)
    for file, text in made.items():
        assert file.read_text() == text, f"python -m deploy.grafana writes another {file.name}"


def test_panels_lie_beside_and_below_each_other() -> None:
    for file in sorted(FOLDER.glob("*.json")):
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(file.read_text())["panels"]:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken
            assert place["x"] + place["w"] <= 24
            taken |= cells


def test_every_question_is_promql_and_its_legend_names_labels_that_it_keeps() -> None:
    for panel in panels():
        for target in panel.get("targets", ()):
            labels = {label for one in wanted(target["expr"]) for label in one.labels}
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            # a bare series keeps its target's labels, and that of one of several processes, too,
            # and recorded ones what they are by
            assert named <= labels | {"instance", "process", "tier"}, target["expr"]


def variables() -> Iterator[tuple[str, str, str]]:
    """Of each dashboard: its file, a variable's name, and the metric whose label it offers."""
    for file in sorted(FOLDER.glob("*.json")):
        for one in json.loads(file.read_text())["templating"]["list"]:
            found = re.fullmatch(r"label_values\((\w+), (\w+)\)", one["query"]["query"])
            assert found is not None
            assert found[2] == one["name"]
            yield file.name, one["name"], found[1]


def test_a_tier_is_chosen_and_not_written_down() -> None:
    """The bug: a panel asked for `standard` alone, which a policy need not have. What is asked by a
    variable is a regular expression, as Grafana writes several choices, of one that is there."""
    there = {(file, name) for file, name, _ in variables()}
    used = set()
    for file in sorted(FOLDER.glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                for one in wanted(target["expr"]):
                    assert ("tier", "MatchOp.Equal") not in {found[:2] for found in one.values}
                names = CHOSEN.findall(target["expr"])
                assert all(f'{name}=~"${name}"' in target["expr"] for name in names)
                used |= {(file.name, name) for name in names}
    assert used == there != set()


def test_what_is_provisioned_refers_to_what_is_there() -> None:
    sources = {
        one["uid"]: one
        for one in yaml("grafana/provisioning/datasources/headgate.yaml")["datasources"]
    }
    for panel in panels():
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] in sources
    (exemplars,) = sources["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert exemplars["datasourceUid"] in sources
    compose = YAML(typ="safe").load((ROOT / "compose.yaml").read_text())["services"]
    for source in sources.values():
        name, port = source["url"].removeprefix("http://").split(":")
        assert name in compose
        assert port in str(compose[name].get("expose")) + str(compose[name].get("ports"))
    (provider,) = yaml("grafana/provisioning/dashboards/headgate.yaml")["providers"]
    mounts = [volume.split(":")[1] for volume in compose["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounts
    home = compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (FOLDER / Path(home).name).exists()


# ---- rules and scrapes --------------------------------------------------------------------------


def test_every_rule_is_promql_of_what_is_scraped_or_recorded_before() -> None:
    recorded: set[str] = set()
    for rule in rules():
        for one in wanted(rule["expr"]):
            assert not one.name.startswith("headgate:") or one.name in recorded, one.name
        if "record" in rule:
            recorded.add(rule["record"])
    asked = {
        one.name
        for panel in panels()
        for target in panel.get("targets", ())
        for one in wanted(target["expr"])
        if one.name.startswith("headgate:")
    }
    assert asked <= recorded


def test_every_alert_says_what_is_wrong_how_bad_it_is_and_what_to_do() -> None:
    names = [rule["alert"] for rule in rules() if "alert" in rule]
    assert len(set(names)) == len(names)
    for rule in rules():
        if "alert" not in rule:
            continue
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert DURATION.fullmatch(rule["for"])
        labels = {label for one in wanted(rule["expr"]) for label in one.labels} | {
            "instance",
            "tier",
        }
        for text in rule["annotations"].values():
            assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels
        assert rule["annotations"]["description"]


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool: apt-get install prometheus")
def test_prometheus_itself_reads_the_files_and_its_alerts_go_off(tmp_path: Path) -> None:
    """Keys are files of the container; rules.yaml and its tests are as they are."""
    assert PROMTOOL is not None
    (tmp_path / "rules.yaml").write_text((DEPLOY / "prometheus/rules.yaml").read_text())
    (tmp_path / "key").write_text("hg-test")
    text = (DEPLOY / "prometheus/prometheus.yaml").read_text()
    text = re.sub(r"/tmp/[\w-]*key", str(tmp_path / "key"), text)
    (tmp_path / "prometheus.yaml").write_text(text)
    for command in (
        ["check", "config", str(tmp_path / "prometheus.yaml")],
        ["test", "rules", str(DEPLOY / "prometheus/rules_test.yaml")],
    ):
        done = subprocess.run([PROMTOOL, *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- whom alerts tell ---------------------------------------------------------------------------


@pytest.mark.parametrize("url", [None, "https://example.com/hook"])
def test_alerts_tell_nobody_until_a_webhook_is_named(url: str | None) -> None:
    """The variable picks the folder that Grafana reads: one that provisions nothing, or one with a
    contact point at that address, to which everything is sent."""
    grafana = YAML(typ="safe").load((ROOT / "compose.yaml").read_text())["services"]["grafana"]
    environ = {"HEADGATE_ALERT_WEBHOOK": url} if url else {}
    (source,) = [
        interpolate(volume, environ).split(":")[0]
        for volume in grafana["volumes"]
        if ":/etc/grafana/provisioning/alerting:" in volume
    ]
    told: dict[str, Any] = {}
    for file in (ROOT / source).iterdir():
        told |= YAML(typ="safe").load(file.read_text())
    if url is None:
        assert told == {"apiVersion": 1}
        return
    (point,) = told["contactPoints"]
    (receiver,) = point["receivers"]
    assert (receiver["type"], receiver["settings"]) == (
        "webhook",
        {"url": "$HEADGATE_ALERT_WEBHOOK"},
    )
    assert interpolate(grafana["environment"]["HEADGATE_ALERT_WEBHOOK"], environ) == url
    (policy,) = told["policies"]
    assert policy["receiver"] == point["name"]
    (group,) = told["groups"]
    (rule,) = group["rules"]
    queries = {one["refId"]: one for one in rule["data"]}
    assert queries[rule["condition"]]["model"]["expression"] in queries
    sources = yaml("grafana/provisioning/datasources/headgate.yaml")["datasources"]
    asked = {one["datasourceUid"] for one in rule["data"]}
    assert asked <= {"__expr__", *(one["uid"] for one in sources)}


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool: apt-get install prometheus")
def test_what_grafana_asks_prometheus_for_is_each_alert_by_its_name(tmp_path: Path) -> None:
    """By Prometheus itself: nothing while all is well, then one series for each alert, with the
    labels that it has, and none called `alertname`, which is Grafana's."""
    (group,) = yaml("grafana/alerting-webhook/webhook.yaml")["groups"]
    expr = group["rules"][0]["data"][0]["model"]["expr"]
    assert "$" not in expr, "Grafana would read it as a variable"
    series = 'headgate_gateway_goodput_requests_total{tier="standard",arm="baseline",met="%s"}'
    firing = [
        {"labels": f'{{alert="{name}",severity="page",tier="standard"}}', "value": 1}
        for name in ("HeadgateSloBurnFast", "HeadgateSloBurnSlow")
    ]
    asked = {
        "rule_files": [str(DEPLOY / "prometheus/rules.yaml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": series % "true", "values": "0+100x30 3000+50x30"},
                    {"series": series % "false", "values": "0+0x30 0+50x30"},
                ],
                "promql_expr_test": [
                    {"expr": expr, "eval_time": "25m", "exp_samples": []},
                    {"expr": expr, "eval_time": "55m", "exp_samples": firing},
                ],
            }
        ],
    }
    file = tmp_path / "asked.yaml"
    file.write_text(json.dumps(asked))
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, "test", "rules", str(file)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_service_with_metrics_is_scraped_where_it_listens() -> None:
    compose = YAML(typ="safe").load((ROOT / "compose.yaml").read_text())["services"]
    scraped = set()
    for job in yaml("prometheus/prometheus.yaml")["scrape_configs"]:
        for group in job.get("static_configs", ()):
            scraped |= set(group["targets"])
        for found in job.get("dns_sd_configs", ()):
            scraped |= {f"{name}:{found['port']}" for name in found["names"]}
    for target in scraped:
        name, port = target.split(":")
        assert port in compose[name]["expose"], target
        assert set(compose[name]["networks"]) & set(compose["prometheus"]["networks"])
    engines = {name for name in compose if name.startswith(("gateway", "runtime", "vllm"))}
    assert engines | {"collector"} == {target.split(":")[0] for target in scraped}


# ---- the collector ------------------------------------------------------------------------------


def test_the_collector_s_settings_are_known_and_are_all_used() -> None:
    """A misspelled setting keeps it from starting, and an unused component is a mistake."""
    config = yaml("otel-collector/config.yaml")
    assert set(config) == {*COMPONENTS, "service"}
    for kind, known in COMPONENTS.items():
        for name, settings in config[kind].items():
            assert set(settings) <= known[name.split("/")[0]], name
    used: dict[str, set[str]] = {"receivers": set(), "processors": set(), "exporters": set()}
    for pipeline in config["service"]["pipelines"].values():
        for kind, names in pipeline.items():
            used[kind] |= set(names)
    assert used["receivers"] == set(config["receivers"])
    assert used["exporters"] == set(config["exporters"])
    assert used["processors"] == set(config["processors"])
    for policy in config["processors"]["tail_sampling"]["policies"]:
        assert set(policy) == {"name", "type", policy["type"]}
        assert set(policy[policy["type"]]) <= POLICIES[policy["type"]]


def test_what_the_collector_keeps_is_what_gateways_advise() -> None:
    """The attribute by which a gateway says that a trace is to be kept, and the tier's and arm's
    names, are those that spans really have."""
    config = yaml("otel-collector/config.yaml")
    source = "\n".join(
        file.read_text() for part in ("gateway", "telemetry") for file in (ROOT / part).glob("*.py")
    )
    keys = [
        policy["string_attribute"]["key"]
        for policy in config["processors"]["tail_sampling"]["policies"]
        if policy["type"] == "string_attribute"
    ]
    for key in keys:
        assert f'"{key}"' in source, key
