"""The Kubernetes manifests: Kubernetes' own schemas, and what no schema knows: names that meet."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from policies.enabling import gated
from policies.ledger import Ledger
from policies.load import load
from policies.schema import Deployment
from tests.policies.gated_world import DEVICES, HYPOTHESIS, NOW, verdict_on

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "kubernetes"
BESIDE_PYTHON = Path(sys.executable).parent
FOLDERS = ("runtime", "vllm", "vllm-keda", "example")
MARGIN_S = 10.0  # between the end of a drain and SIGKILL
DNS_S = 5.0  # for which CoreDNS lets answers for headless services be kept
# Kinds of others, which Kubernetes' schemas do not have.
FOREIGN = {"HTTPRoute", "PodMonitor", "PrometheusRule", "ScaledObject"}
KINDS = Path(__file__).parent / "kinds"

Object = Mapping[str, Any]


def documents(text: str) -> list[Object]:
    return [one for one in YAML(typ="safe").load_all(text) if one is not None]


def rendered(folder: Path) -> list[Object]:
    """What `kubectl apply -k` would send."""
    kubectl = shutil.which("kubectl", path=f"{BESIDE_PYTHON}{os.pathsep}{os.environ['PATH']}")
    if kubectl is None:
        pytest.skip("kubectl, which renders kustomizations, is not installed")
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


@pytest.fixture(scope="module", params=FOLDERS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return rendered(DEPLOY / request.param)


@pytest.fixture(scope="module")
def with_keda(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """The runtime, scaled by KEDA: a kustomization as a user would write it."""
    folder = tmp_path_factory.mktemp("keda")
    kustomization = folder / "kustomization.yaml"
    kustomization.write_text(
        f"resources: [{os.path.relpath(DEPLOY / 'runtime', folder.resolve())}]\n"
        f"components: [{os.path.relpath(DEPLOY / 'keda', folder.resolve())}]\n"
    )
    return rendered(folder)


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    return [one for one in objects if one["kind"] in kinds]


def name_of(one: Object) -> str:
    return str(one["metadata"]["name"])


def pods(objects: Sequence[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Name, labels and pod specification of each workload."""
    for one in of_kind(objects, "Deployment", "StatefulSet"):
        template = one["spec"]["template"]
        yield name_of(one), template["metadata"]["labels"], template["spec"]


def containers(objects: Sequence[Object]) -> Iterator[tuple[str, Object, Object]]:
    for name, _, pod in pods(objects):
        for container in pod["containers"]:
            yield name, pod, container


def policies(objects: Sequence[Object], folder: Path) -> dict[str, Deployment]:
    """The policies in ConfigMaps, read by our own loader."""
    found = {}
    for one in of_kind(objects, "ConfigMap"):
        for name, text in one["data"].items():
            file = folder / name
            file.write_text(text)
            found[name] = load(file)
    return found


# ---- schemas ------------------------------------------------------------------------------------


def schema_problems(one: Object) -> str | None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")
    try:
        validate.validate(one, "1.32", strict=True)
    except validate.ValidationError as error:
        return f"{one['kind']} {name_of(one)}: {error.message} at {list(error.path)}"
    return None


def test_every_object_is_what_kubernetes_own_schema_says(
    objects: list[Object], with_keda: list[Object]
) -> None:
    """Strictly: a field that Kubernetes does not know is a mistake, too."""
    ours = [one for one in (*objects, *with_keda) if one["kind"] not in FOREIGN]
    assert len(ours) > 15
    assert not [problem for one in ours if (problem := schema_problems(one))]
    broken = {**ours[0], "metadata": {"name": "x", "lables": {}}}
    assert "lables" in str(schema_problems(broken))


def foreign_problems(objects: Sequence[Object]) -> list[list[str]]:
    """What the schemas of those who made these kinds have against each."""
    node = shutil.which("node")
    if node is None or not (KINDS / "node_modules").is_dir():
        pytest.skip("needs node, and `make kinds`, which installs the schemas")
    done = subprocess.run(
        [node, KINDS / "kinds.mjs"],
        input=json.dumps(objects), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout)
    return found


def test_objects_of_others_kinds_are_what_their_makers_schemas_say(
    with_keda: list[Object], elsewhere: list[Object]
) -> None:
    """As strictly: values, what has to be there, and no field that they do not know."""
    everything = (*rendered(DEPLOY / "example"), *with_keda, *elsewhere)
    everything += tuple(rendered(DEPLOY / "vllm-keda"))
    theirs = of_kind(everything, *FOREIGN)
    assert {one["kind"] for one in theirs} == FOREIGN
    assert foreign_problems(theirs) == [[]] * len(theirs)


@pytest.mark.parametrize(
    ("kind", "path", "value", "problem"),
    [
        ("HTTPRoute", "rules/0/timeouts", {"request": "off"}, "request must match pattern"),
        ("HTTPRoute", "rules/0/backendRefs/0/weigth", 1, "weigth is not known"),
        ("PodMonitor", "podMetricsEndpoints/0/intervall", "5s", "intervall is not known"),
        ("PrometheusRule", "groups/1/rules/0/for", "two minutes", "for must match pattern"),
        ("ScaledObject", "triggers/0", {"metadata": {}}, "must have required property type"),
        ("ScaledObject", "maxReplicas", 8, "maxReplicas is not known"),
    ],
)
def test_a_slip_in_an_object_of_another_s_kind_is_seen(
    elsewhere: list[Object], kind: str, path: str, value: object, problem: str
) -> None:
    broken = json.loads(json.dumps(of_kind(elsewhere, kind)[0]))
    *way, last = [int(one) if one.isdecimal() else one for one in path.split("/")]
    place = broken["spec"]
    for step in way:
        place = place[step]
    place[last] = value
    (said,) = foreign_problems([broken])
    assert any(problem in one for one in said), said


def test_a_route_leads_clients_to_what_they_need_and_nothing_else() -> None:
    """By the Gateway API's rules: a backend that is there, no deadline on streams, /v1 alone."""
    objects = rendered(DEPLOY / "example")
    (route,) = of_kind(objects, "HTTPRoute")
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert set(route["spec"]) == {"parentRefs", "hostnames", "rules"}
    (rule,) = route["spec"]["rules"]
    assert set(rule) <= {"matches", "filters", "backendRefs", "timeouts", "name"}
    assert [one["path"] for one in rule["matches"]] == [{"type": "PathPrefix", "value": "/v1"}]
    assert set(rule["timeouts"].values()) == {"0s"}  # GEP-2257: off
    (backend,) = rule["backendRefs"]
    services = {name_of(one): one for one in of_kind(objects, "Service")}
    assert backend["port"] in [port["port"] for port in services[backend["name"]]["spec"]["ports"]]


def test_scrapes_find_a_port_and_a_key_and_are_let_in() -> None:
    objects = rendered(DEPLOY / "example")
    monitors = of_kind(objects, "PodMonitor")
    assert len(monitors) == 2
    for monitor in monitors:
        wanted = monitor["spec"]["selector"]["matchLabels"]
        (pod,) = [pod for _, labels, pod in pods(objects) if wanted.items() <= labels.items()]
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] in ports_of(pod)
        assert endpoint["authorization"]["credentials"]["name"] == "headgate"
    engine = next(
        one for one in of_kind(objects, "NetworkPolicy") if name_of(one) == "headgate-engine"
    )
    sources = [next(iter(source)) for rule in engine["spec"]["ingress"] for source in rule["from"]]
    assert sources == ["podSelector", "namespaceSelector"]


@pytest.mark.parametrize("engines", ["runtime", "vllm"])
def test_keda_asks_for_the_same_numbers_as_the_autoscaler_that_it_replaces(
    engines: str, with_keda: list[Object]
) -> None:
    """One of them scales a StatefulSet, never both; bounds, thresholds and metrics agree."""
    plain = rendered(DEPLOY / engines)
    with_it = with_keda if engines == "runtime" else rendered(DEPLOY / "vllm-keda")
    (replaced,) = [one for one in autoscalers(plain) if name_of(one) == "headgate-engine"]
    assert [name_of(one) for one in autoscalers(with_it)] == ["headgate-gateway"]
    (scaled,) = of_kind(with_it, "ScaledObject")
    spec = scaled["spec"]
    assert spec["scaleTargetRef"] == replaced["spec"]["scaleTargetRef"]
    bounds = (spec["minReplicaCount"], spec["maxReplicaCount"])
    assert bounds == (replaced["spec"]["minReplicas"], replaced["spec"]["maxReplicas"])
    assert [float(trigger["metadata"]["threshold"]) for trigger in spec["triggers"]] == [
        quantity(metric["external"]["target"]["averageValue"])
        for metric in replaced["spec"]["metrics"]
    ]
    for trigger in spec["triggers"]:
        assert set(trigger) == {"type", "metricType", "metadata"}
        assert trigger["metricType"] == "AverageValue"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """All of it under other names in another namespace, as docs/fleet.md tells."""
    folder = tmp_path_factory.mktemp("elsewhere")
    page = (ROOT / "docs" / "fleet.md").read_text()
    lines = re.findall(r"^replacements:\n.*?(?=^```)", page, flags=re.MULTILINE | re.DOTALL)
    base = os.path.relpath(DEPLOY, folder.resolve())
    components = ", ".join(f"{base}/{name}" for name in ("route", "monitoring", "keda", "tracing"))
    (folder / "kustomization.yaml").write_text(
        f"namespace: mine\nnamePrefix: blue-\nresources: [{base}/runtime]\n"
        f"components: [{components}]\n{lines[0]}"
    )
    return rendered(folder)


def test_names_and_namespaces_of_one_s_own_reach_what_names_them(elsewhere: list[Object]) -> None:
    """Kustomize knows only where Kubernetes' own kinds name each other: KEDA would scale what is
    not there, by the series of another namespace, and the route would lead nowhere."""
    (scaled,) = of_kind(elsewhere, "ScaledObject")
    assert scaled["spec"]["scaleTargetRef"]["name"] == "blue-headgate-engine"
    for trigger in scaled["spec"]["triggers"]:
        assert trigger["metadata"]["query"].endswith('{namespace="mine"})')
    (route,) = of_kind(elsewhere, "HTTPRoute")
    named = {name_of(one) for one in of_kind(elsewhere, "Service")}
    assert {one["name"] for one in route["spec"]["rules"][0]["backendRefs"]} <= named
    assert {one["metadata"].get("namespace") for one in elsewhere} == {"mine"}


def test_spans_have_a_way_out_to_where_they_are_sent(elsewhere: list[Object]) -> None:
    """Of gateways and engines; without the component neither sends any, nor may."""
    plain = rendered(DEPLOY / "runtime")
    assert "4318" not in str(plain)
    ports = []
    for _, _, container in containers(elsewhere):
        told = {one["name"]: one.get("value") for one in container["env"]}
        found = re.fullmatch(r"http://[\w-]+\.(\w+):(\d+)", told["OTEL_EXPORTER_OTLP_ENDPOINT"])
        assert found is not None
        ports.append(found.groups())
    rules = [one["spec"]["egress"][-1] for one in of_kind(elsewhere, "NetworkPolicy")]
    assert [
        (rule["to"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"],
         str(rule["ports"][0]["port"]))
        for rule in rules
    ] == ports  # fmt: skip
    assert len(ports) == 2
    ours = [one for one in elsewhere if one["kind"] not in FOREIGN]
    assert not [problem for one in ours if (problem := schema_problems(one))]


def test_alerts_are_those_of_the_stack_and_their_targets_are_called_as_there(
    elsewhere: list[Object],
) -> None:
    (rule,) = of_kind(elsewhere, "PrometheusRule")
    (stack,) = documents((ROOT / "deploy" / "prometheus" / "rules.yaml").read_text())
    assert rule["apiVersion"] == "monitoring.coreos.com/v1"
    assert rule["spec"] == stack
    jobs = [
        {one["targetLabel"]: one["replacement"] for one in endpoint["relabelings"]}["job"]
        for monitor in of_kind(elsewhere, "PodMonitor")
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
    ]
    assert set(re.findall(r'job="(\w+)"', str(stack))) <= set(jobs) == {"gateway", "runtime"}


# ---- names that meet ----------------------------------------------------------------------------


def ports_of(pod: Object) -> set[str]:
    return {port["name"] for one in pod["containers"] for port in one.get("ports", ())}


def autoscalers(objects: Sequence[Object]) -> list[Object]:
    return of_kind(objects, "HorizontalPodAutoscaler")


def quantity(text: str) -> float:
    return float(text.removesuffix("k")) * (1000 if text.endswith("k") else 1)


def test_selectors_find_pods_and_ports_are_there(objects: list[Object]) -> None:
    """Of services, budgets, network policies and workloads, each finds exactly one kind of pod."""
    labelled = {name: labels for name, labels, _ in pods(objects)}
    named = {name: ports_of(pod) for name, _, pod in pods(objects)}
    for one in of_kind(objects, "Service", "PodDisruptionBudget", "NetworkPolicy", "StatefulSet"):
        spec = one["spec"]
        selector = spec["podSelector" if one["kind"] == "NetworkPolicy" else "selector"]
        wanted = selector.get("matchLabels", selector)
        (found,) = [name for name, has in labelled.items() if wanted.items() <= has.items()]
        if one["kind"] == "Service":
            assert {port["targetPort"] for port in spec["ports"]} <= named[found]
        if one["kind"] == "StatefulSet":
            assert spec["serviceName"] in [name_of(s) for s in of_kind(objects, "Service")]
    for _, _, container in containers(objects):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            way = container[probe].get("httpGet") or container[probe]["tcpSocket"]
            assert way["port"] in {port["name"] for port in container["ports"]}


def test_what_pods_mount_and_read_is_there(objects: list[Object]) -> None:
    """ConfigMaps by the names that they get, mounts by their volumes, policies at their paths."""
    maps = {name_of(one): one for one in of_kind(objects, "ConfigMap")}
    for _, pod, container in containers(objects):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for mount in container["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "configMap" in volume and not volume["configMap"].get("optional"):
                data = maps[volume["configMap"]["name"]]["data"]
                asked = [
                    word for word in container["command"] if word.startswith(mount["mountPath"])
                ]
                assert [Path(word).name for word in asked] == list(data)
        for source in container.get("envFrom", ()):
            assert source["secretRef"]["name"] == "headgate"


def test_nothing_runs_as_root_or_writes_where_it_should_not(objects: list[Object]) -> None:
    """The restricted Pod Security Standard, a read-only file system, no token of Kubernetes."""
    for _, pod, container in containers(objects):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        assert not container["image"].endswith(":latest")


def test_no_pod_is_told_of_services_by_variables(objects: list[Object]) -> None:
    """Of the Service `headgate` Kubernetes would make a HEADGATE_PORT, which is our own."""
    for _, pod, _ in containers(objects):
        assert pod["enableServiceLinks"] is False


# ---- verdicts ----------------------------------------------------------------------------------


JUDGED = {
    "engine": ("runtime.yaml", "runtime.step_tokens", "64", "lossless_exact"),
    "gateway": ("gateway.yaml", "gateway.running_per_replica", "32", "routing_only"),
}


def brought(folder: Path) -> list[Object]:
    """A kustomization as docs/fleet.md tells: a hypothesis on engines and one on gateways, both
    with a pass that was made elsewhere."""
    (folder / "hypotheses").mkdir()
    ledger = Ledger.open(folder / "ledger")
    for name, (policy, knob, value, kind) in JUDGED.items():
        text = (DEPLOY / "runtime" / policy).read_text()
        text += f"optimizations: [{{hypothesis: /var/lib/headgate/hypotheses/{name}.yaml}}]\n"
        (folder / policy).write_text(text.replace("/var/lib/headgate/", f"{folder}/"))
        file = folder / "hypotheses" / f"{name}.yaml"
        file.write_text(
            HYPOTHESIS.format(
                name=name, patch=f"{{{knob}: {value}}}", kind=kind, source="suite: pocket",
                metric="correct", test="paired_ni",
            ).replace("policy.yaml", f"../{policy}")
        )  # fmt: skip
        ledger.record_verdict(verdict_on(file))
        (folder / policy).write_text(text)
    listed = {
        "hypotheses": sorted((folder / "hypotheses").iterdir()),
        "ledger": sorted(file for file in (folder / "ledger").rglob("*") if file.is_file()),
    }
    lines = [f"resources: [{os.path.relpath(DEPLOY / 'runtime', folder.resolve())}]"]
    lines += ["configMapGenerator:"]
    for name, (policy, *_) in JUDGED.items():
        named = "headgate-runtime" if name == "engine" else "headgate-gateway"
        lines += [f"- {{name: {named}, behavior: merge, files: [{policy}]}}"]
    for kind, files in listed.items():
        named = ", ".join(str(file.relative_to(folder)) for file in files)
        lines += [f"- {{name: headgate-{kind}, files: [{named}]}}"]
    (folder / "kustomization.yaml").write_text("\n".join(lines) + "\n")
    return rendered(folder)


def filled(objects: Sequence[Object], pod: Object, root: Path) -> Path:
    """The folders of ConfigMaps as the pod's container sees them; its policy, with `root` before
    what it names."""
    maps = {name_of(one): one["data"] for one in of_kind(objects, "ConfigMap")}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    (container,) = pod["containers"]
    for mount in container["volumeMounts"]:
        source = volumes[mount["name"]].get("configMap")
        if source is None:
            continue
        folder = root / mount["mountPath"][1:]
        folder.mkdir(parents=True)
        for name, text in maps.get(source["name"], {}).items():
            (folder / name).write_text(text)
    word = next(word for word in container["command"] if word.startswith("/etc/headgate/"))
    policy = root / word[1:]
    policy.write_text(policy.read_text().replace(" /var/lib/", f" {root}/var/lib/"))
    return policy


@pytest.mark.parametrize("name", JUDGED)
def test_a_verdict_that_is_brought_lets_its_optimization_on(name: str, tmp_path: Path) -> None:
    """In the pods of engines and of gateways: hypothesis and ledger lie where the policy says, and
    another verdict is another ConfigMap, so that pods restart. Without the ledger it is off."""
    mine = tmp_path / "mine"
    mine.mkdir()
    objects = brought(mine)
    (pod,) = [
        pod for _, labels, pod in pods(objects) if labels["app.kubernetes.io/component"] == name
    ]
    policy = filled(objects, pod, tmp_path / "root")
    found = gated(policy, load(policy), NOW + 1, lambda: DEVICES)
    (one,) = found.standings
    assert (one.state, one.enabled, one.hypothesis) == ("on", True, name), one.why
    for kind in ("hypotheses", "ledger"):
        (named,) = [v["configMap"]["name"] for v in pod["volumes"] if v["name"] == kind]
        assert re.fullmatch(rf"headgate-{kind}-\w+", named), "it has the hash of its content"
    (policy.parents[2] / "var/lib/headgate/ledger/decisions.jsonl").unlink()
    (one,) = gated(policy, load(policy), NOW + 1, lambda: DEVICES).standings
    assert (one.state, one.enabled) == ("off", False)


# ---- life and death -----------------------------------------------------------------------------


def stop_s(pod: Object) -> tuple[float, float]:
    """Seconds before SIGTERM, and in all before SIGKILL."""
    (container,) = pod["containers"]
    wait_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    return float(wait_s), float(pod["terminationGracePeriodSeconds"])


def test_a_drain_ends_before_the_pod_is_killed(objects: list[Object], tmp_path: Path) -> None:
    """preStop, drain_s and a margin fit into the grace period; an engine waits until gateways have
    looked again for who is there."""
    found = policies(objects, tmp_path)
    drains = {"headgate-gateway": found["gateway.yaml"].gateway.drain_s}
    engine = found.get("runtime.yaml")
    drains["headgate-engine"] = engine.gateway.drain_s if engine else shutdown_s(objects)
    for name, _, pod in pods(objects):
        wait_s, kill_s = stop_s(pod)
        assert wait_s + drains[name] + MARGIN_S <= kill_s, name
        if name == "headgate-engine":
            looks = [one.every_s for one in found["gateway.yaml"].discovery]
            assert wait_s >= max(looks, default=0.0) + DNS_S


def shutdown_s(objects: Sequence[Object]) -> float:
    """What vLLM was told."""
    words = [word for _, _, one in containers(objects) for word in one.get("args", ())]
    return float(next(w for w in words if w.startswith("--shutdown-timeout=")).partition("=")[2])


def test_vllm_says_how_many_tokens_it_found(objects: list[Object]) -> None:
    """Its default is to say nothing, and the hit ladder would be empty."""
    told = [one["args"] for _, _, one in containers(objects) if one["name"] == "vllm"]
    assert all("--enable-prompt-tokens-details" in words for words in told)
    assert len(told) == ("vllm/vllm-openai" in str(objects))


def test_a_gateway_without_replicas_is_not_ready_and_not_killed(objects: list[Object]) -> None:
    """Its health is 503 then: traffic stays away by readiness; a restart would help nobody."""
    (gateway,) = [one for name, _, one in containers(objects) if name == "headgate-gateway"]
    assert gateway["readinessProbe"]["httpGet"]["path"] == "/health"
    for probe in ("startupProbe", "livenessProbe"):
        assert set(gateway[probe]) & {"httpGet", "tcpSocket"} == {"tcpSocket"}


def test_the_policies_serve_and_point_at_the_engines(objects: list[Object], tmp_path: Path) -> None:
    """Read by our own loader: addresses, ports and keys are those of the pods and the secret."""
    found = policies(objects, tmp_path)
    gateway = found["gateway.yaml"]
    edge = gateway.gateway
    (front,) = [one for name, _, one in containers(objects) if name == "headgate-gateway"]
    assert (edge.host, edge.port) == ("0.0.0.0", front["ports"][0]["containerPort"])
    assert edge.tenants
    assert edge.store is not None  # there are two or more
    assert edge.secret_env is not None
    (engine,) = [one for name, _, one in containers(objects) if name == "headgate-engine"]
    port = engine["ports"][0]["containerPort"]
    key = next(one for one in engine["env"] if "valueFrom" in one)
    for source in gateway.discovery:
        assert (source.dns, source.port) == ("headgate-engine", port)
        assert source.api_key_env == key["valueFrom"]["secretKeyRef"]["key"]
    assert len(gateway.discovery) == 1
    ports = {one["name"]: one["containerPort"] for one in engine["ports"]}
    for source in gateway.discovery:
        told = source.kv_events
        events = {} if told is None else {"kv-events": told.port, "kv-replay": told.replay_port}
        assert events == {name: at for name, at in ports.items() if name != "http"}
    runtime = found.get("runtime.yaml")
    if runtime is not None:
        assert runtime.runtime is not None
        assert runtime.runtime.key_env == key["name"]
        assert edge.running_per_replica == runtime.runtime.max_sequences
        assert str(port) in engine["command"]


# ---- scaling ------------------------------------------------------------------------------------


def test_an_autoscaler_owns_the_number_of_what_it_scales(objects: list[Object]) -> None:
    """Its target is there and has no `replicas` of its own; nothing has two autoscalers."""
    workloads = {name_of(one): one for one in of_kind(objects, "Deployment", "StatefulSet")}
    targets = [one["spec"]["scaleTargetRef"] for one in autoscalers(objects)]
    assert len({target["name"] for target in targets}) == len(targets) >= 1
    for target in targets:
        found = workloads[target["name"]]
        assert (found["kind"], found["apiVersion"]) == (target["kind"], target["apiVersion"])
        assert "replicas" not in found["spec"]


def test_the_adapter_has_every_metric_that_is_asked_for_and_we_tell_its_series() -> None:
    """What autoscalers ask for, the Prometheus adapter's rules name, by series of our pages."""
    (values,) = documents((DEPLOY / "prometheus-adapter.yaml").read_text())
    asked = {
        kind: {
            metric[kind.lower()]["metric"]["name"]
            for one in autoscalers(rendered(DEPLOY / "runtime"))
            for metric in one["spec"]["metrics"]
            if metric["type"] == kind
        }
        for kind in ("Pods", "External")
    }
    rules = values["rules"]
    assert {rule["name"]["as"] for rule in rules["custom"]} == asked["Pods"]
    assert {rule["name"]["as"] for rule in rules["external"]} == asked["External"]
    told = (ROOT / "docs" / "metrics.md").read_text()
    queries = [rule["seriesQuery"] for rule in (*rules["custom"], *rules["external"])]
    queries += re.findall(r"query: sum\((\S+)\)", (DEPLOY / "keda/scaledobject.yaml").read_text())
    assert len(queries) == 5
    for query in queries:
        assert f"`{query.partition('{')[0]}`" in told
