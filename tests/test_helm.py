"""The Helm chart renders to objects that Kubernetes accepts, and refuses values that contradict each other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from server.serve import LATEST_SECONDS
from server.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy" / "helm" / "prelude"
OPEN = {"keys": {"allowAnonymous": True}}
FULL = {
    "keys": {"secret": "prelude-keys"},
    "store": {"bucket": "s3://tasks/prod"},
    "autoscaling": {"enabled": True},
    "gpu": {"enabled": True},
    "serviceMonitor": {"enabled": True, "keySecret": "prelude-metrics"},
    "allowedHosts": ["tasks.example"],
    "extraEnvFrom": [{"secretRef": {"name": "bucket"}}],
    "extraEnv": [{"name": "HF_TOKEN", "value": "x"}],
    "settings": {"PRELUDE_MAX_SEQUENCES": 128},
    "podLabels": {"team": "nlp"},
    "networkPolicy": {"extraEgress": [{"ports": [{"port": 9000}]}]},
    "exampleTasks": True,
    "extraVolumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
    "extraVolumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
    "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0},
}
VERSIONS = ("1.27", "1.31", "1.34")


def rendered(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Kind -> object."""
    with helm_python.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name="demo", namespace="prod")
    documents = [
        document for name, text in files.items() if name.endswith(".yaml") for document in yaml.safe_load_all(text)
    ]
    return {document["kind"]: document for document in documents if document}


def environment(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Variables of the only container, in their order; no name is there twice."""
    variables = pod["containers"][0]["env"]
    assert len({variable["name"] for variable in variables}) == len(variables)
    return {variable["name"]: variable for variable in variables}


@pytest.mark.parametrize("values", [OPEN, FULL], ids=["defaults", "everything"])
def test_kubernetes_accepts_every_object(values: dict[str, Any]) -> None:
    objects = rendered(values)
    assert {"Service", "ServiceAccount", "NetworkPolicy"} < objects.keys()
    for document in objects.values():
        if not document["apiVersion"].startswith("monitoring.coreos.com"):  # not one of Kubernetes' own
            for version in VERSIONS:
                kubernetes_validate.validate(document, version, strict=True)


def test_a_bucket_makes_a_deployment_and_a_volume_makes_a_stateful_set() -> None:
    assert "StatefulSet" in rendered(OPEN)
    assert rendered(OPEN)["StatefulSet"]["spec"]["volumeClaimTemplates"]
    full = rendered(FULL)
    assert "Deployment" in full
    assert "StatefulSet" not in full
    assert full["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["kind"] == "Deployment"
    assert "replicas" not in full["Deployment"]["spec"]  # the autoscaler's


def test_every_object_selects_the_pods_that_the_workload_makes() -> None:
    for values, kind in ((OPEN, "StatefulSet"), (FULL, "Deployment")):
        objects = rendered(values)
        labels = objects[kind]["spec"]["template"]["metadata"]["labels"]
        selectors = [
            objects[kind]["spec"]["selector"]["matchLabels"],
            objects["Service"]["spec"]["selector"],
            objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        ]
        for selector in selectors:
            assert selector.items() <= labels.items()


def test_the_pod_has_no_rights_and_can_write_where_the_server_writes() -> None:
    for values, kind in ((OPEN, "StatefulSet"), (FULL, "Deployment")):
        workload = rendered(values)[kind]["spec"]
        pod, (container,) = workload["template"]["spec"], workload["template"]["spec"]["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/var/lib/prelude", "/var/cache/prelude", "/tmp"} <= mounts
        volumes = {volume["name"] for volume in pod["volumes"]}
        claims = {claim["metadata"]["name"] for claim in workload.get("volumeClaimTemplates", ())}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes | claims


def test_every_variable_is_a_setting_and_services_add_none() -> None:
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    for values, kind in ((OPEN, "StatefulSet"), (FULL, "Deployment")):
        pod = rendered(values)[kind]["spec"]["template"]["spec"]
        names = {variable["name"] for variable in pod["containers"][0]["env"]}
        assert {name for name in names if name.startswith(ENV_PREFIX)} <= known
        # Kubernetes describes each service in variables such as PRELUDE_SERVICE_HOST, which the server refuses.
        assert pod["enableServiceLinks"] is False


def test_a_stopped_pod_has_time_to_leave_the_service_and_to_drain() -> None:
    pod = rendered(OPEN | {"drainSeconds": 90, "preStopSeconds": 7})["StatefulSet"]["spec"]["template"]["spec"]
    assert environment(pod)["PRELUDE_DRAIN_SECONDS"]["value"] == "90"
    assert pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert pod["terminationGracePeriodSeconds"] > 90 + 7 + LATEST_SECONDS


def test_every_probe_may_take_longer_than_a_second_and_passes_without_a_name() -> None:
    (container,) = rendered(OPEN)["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[kind]["timeoutSeconds"] == 5
        assert container[kind]["httpGet"]["httpHeaders"] == [{"name": "Host", "value": "localhost"}]


def test_every_volume_that_is_no_claim_has_a_limit() -> None:
    for values, kind in ((OPEN, "StatefulSet"), (FULL, "Deployment")):
        for volume in rendered(values)[kind]["spec"]["template"]["spec"]["volumes"]:
            assert volume.get("emptyDir", {"sizeLimit": None}).keys() == {"sizeLimit"}


def test_the_tasks_of_the_image_are_published_only_on_request() -> None:
    for values, kind, published in ((OPEN, "StatefulSet", False), (FULL, "Deployment", True)):
        (container,) = rendered(values)[kind]["spec"]["template"]["spec"]["containers"]
        hidden = "/prompts" in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert hidden != published


def test_prometheus_reaches_pods_by_their_address_and_finds_the_job_of_the_alerts() -> None:
    objects = rendered(FULL)
    own = environment(objects["Deployment"]["spec"]["template"]["spec"])
    hosts = own["PRELUDE_ALLOWED_HOSTS"]["value"].split(",")
    assert {"$(POD_IP)", "tasks.example", "demo-prelude", "demo-prelude.prod.svc.cluster.local"} < set(hosts)
    assert list(own).index("POD_IP") < list(own).index("PRELUDE_ALLOWED_HOSTS")  # Kubernetes replaces earlier ones only
    job = objects["Service"]["metadata"]["labels"][objects["ServiceMonitor"]["spec"]["jobLabel"]]
    assert f'job="{job}"' in (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text()


def test_the_server_has_as_many_threads_as_the_pod_requests_cores() -> None:
    def threads(values: dict[str, Any]) -> dict[str, Any] | None:
        return environment(rendered(values)["StatefulSet"]["spec"]["template"]["spec"]).get("OMP_NUM_THREADS")

    assert threads(OPEN) == {"name": "OMP_NUM_THREADS", "valueFrom": {"resourceFieldRef": {"resource": "requests.cpu"}}}
    assert threads(OPEN | {"settings": {"OMP_NUM_THREADS": 3}}) == {"name": "OMP_NUM_THREADS", "value": "3"}
    assert threads(OPEN | {"resources": {"requests": {"cpu": None}}}) is None


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ({}, "allowAnonymous=true"),
        ({"keys": {"secret": "k", "allowAnonymous": True}}, "not both"),
        (OPEN | {"replicas": 2}, "store.bucket"),
        (OPEN | {"autoscaling": {"enabled": True}}, "store.bucket"),
        (FULL | {"serviceMonitor": {"enabled": True}}, "serviceMonitor.keySecret"),
        (FULL | {"autoscaling": {"enabled": True, "minReplicas": 9}}, "maxReplicas"),
        (OPEN | {"replica": 2}, "additional properties 'replica' not allowed"),
        (OPEN | {"drainSeconds": "30"}, "'/drainSeconds': got string, want integer"),
    ],
)
def test_contradicting_and_misspelt_values_are_refused_with_their_remedy(values: dict[str, Any], remedy: str) -> None:
    with pytest.raises(Exception, match=re.escape(remedy)):
        rendered(values)


def test_the_schema_of_the_values_knows_every_value() -> None:
    def missing(schema: dict[str, Any], values: dict[str, Any]) -> list[str]:
        found = schema["properties"]
        below = [missing(found[name], value) for name, value in values.items() if "properties" in found.get(name, {})]
        return [name for name in values if name not in found] + [name for names in below for name in names]

    schema = json.loads((CHART / "values.schema.json").read_text())
    assert missing(schema, yaml.safe_load((CHART / "values.yaml").read_text())) == []


def test_the_chart_has_the_version_of_the_server() -> None:
    with helm_python.Chart.load(str(CHART)) as chart:
        version = chart.metadata["appVersion"]
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()


def test_the_page_on_kubernetes_has_manifests_that_kubernetes_accepts() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    kinds = [block.get("kind") for block in blocks]
    assert "InferenceService" in kinds
    (service,) = [block for block in blocks if block.get("kind") == "InferenceService"]
    (container,) = service["spec"]["predictor"]["containers"]
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    assert {v["name"] for v in container["env"] if v["name"].startswith(ENV_PREFIX)} <= known
    volumes = service["spec"]["predictor"]["volumes"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in volumes}
    assert container["securityContext"]["readOnlyRootFilesystem"]
    # A predictor's pod template is an ordinary pod's.
    spec = {"containers": [container], "volumes": volumes}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
    kubernetes_validate.validate(pod, VERSIONS[-1], strict=True)
