"""cluster/kuberay/: every field is one that KubeRay, Kubernetes or Ray Serve knows, and every actor fits some pod."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema
from test_serve_config import find_unknown

from roro_ray.config import ModelConfig, PoolConfig
from roro_ray.settings import load_config
from serve.config import load_server_config
from tests.cluster_files import PROJECT, find_misfits, list_demands, list_kinds
from tests.documents import ROOT
from tests.kuberay_schema import SPECS, manifest_schema

pytestmark = pytest.mark.timeout(60)
FOLDER = ROOT / "cluster" / "kuberay"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
KUBERNETES = "1.34"
CLUSTER_AT = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
DEMANDS = list_demands(load_config([], ROOT / "configs" / "cluster.yaml"))
CRDS = os.environ.get("KUBERAY_CRDS", "")


def read(name: str, with_options: bool = False) -> list[dict[str, Any]]:
    """The manifests of a file; `with_options` takes the mark `#? ` away from the lines that have it."""
    text = (FOLDER / name).read_text("utf-8")
    return list(yaml.safe_load_all(re.sub(r"(?m)^( *)#\? ", r"\1", text) if with_options else text))


def find_manifest(kind: str, with_options: bool = False) -> dict[str, Any]:
    every = [each for name in FILES for each in read(name, with_options) if each["kind"] == kind]
    assert len(every) == 1, kind
    return every[0]


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The RayClusterSpec in a manifest of any of the three kinds."""
    spec = manifest["spec"]
    for key in CLUSTER_AT[manifest["kind"]]:
        spec = spec[key]
    return spec


def list_pods(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod template of each group by its name."""
    return {"head": cluster["headGroupSpec"]["template"]} | {
        group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]
    }


def check(manifest: dict[str, Any]) -> None:
    """Check a manifest of any kind against all schemas that there are for it.

    Raises:
        jsonschema.ValidationError: names the field.
    """
    if manifest["kind"] not in SPECS:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    jsonschema.validate(manifest, manifest_schema(manifest["kind"]))
    for name, template in list_pods(cluster_of(manifest)).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **template.get("metadata", {})}}
        kubernetes_validate.validate(pod | {"spec": template["spec"]}, KUBERNETES, strict=True)


def close(schema: Any) -> Any:
    """An OpenAPI schema of a CRD that takes no field but those it names."""
    if isinstance(schema, list):
        return [close(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: close(value) for key, value in schema.items()}
    if "properties" in closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def check_by_crds(manifest: dict[str, Any], folder: Path) -> None:
    """Check a manifest against KubeRay's own definitions (`ray.io_rayclusters.yaml`, ..) in a folder."""
    definition = yaml.safe_load((folder / f"ray.io_{manifest['kind'].lower()}s.yaml").read_text("utf-8"))
    version = next(each for each in definition["spec"]["versions"] if each["name"] == "v1")
    schema = close(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(manifest, schema)


def test_the_files_hold_what_they_say() -> None:
    kinds = {name: [manifest["kind"] for manifest in read(name)] for name in FILES}
    assert kinds == {
        "common.yaml": ["Namespace", "ServiceAccount", "NetworkPolicy"],
        "raycluster.yaml": ["RayCluster"],
        "rayjob.yaml": ["RayJob"],
        "rayservice.yaml": ["RayService"],
    }
    assert [each["kind"] for each in read("raycluster.yaml", True)] == ["RayCluster", "PersistentVolumeClaim"]


@pytest.mark.parametrize("with_options", [False, True], ids=["plain", "with options"])
@pytest.mark.parametrize("name", FILES)
def test_every_field_is_known(name: str, with_options: bool) -> None:
    for manifest in read(name, with_options):
        check(manifest)
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "roro"


@pytest.mark.skipif(not CRDS, reason="KUBERAY_CRDS names no folder with KubeRay's definitions")
@pytest.mark.parametrize("kind", SPECS)
def test_kuberays_own_definitions_agree(kind: str) -> None:
    for with_options in (False, True):
        check_by_crds(find_manifest(kind, with_options), Path(CRDS))


def test_definitions_of_a_folder_are_read_and_closed(tmp_path: Path) -> None:
    schema = copy.deepcopy(manifest_schema("RayCluster"))
    del schema["properties"]["spec"]["additionalProperties"]
    versions = [{"name": "v1alpha1"}, {"name": "v1", "schema": {"openAPIV3Schema": schema}}]
    (tmp_path / "ray.io_rayclusters.yaml").write_text(yaml.safe_dump({"spec": {"versions": versions}}))
    manifest = find_manifest("RayCluster")
    check_by_crds(manifest, tmp_path)
    manifest["spec"]["enableInTreeAutoscalin"] = True
    with pytest.raises(jsonschema.ValidationError, match="enableInTreeAutoscalin"):
        check_by_crds(manifest, tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("spec", "enableInTreeAutoscalin"), True, "enableInTreeAutoscalin"),
        (("spec", "authOptions", "mode"), "tokens", "tokens"),
        (("spec", "autoscalerOptions", "idleTimeoutSeconds"), "600", "600"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0, "0 is not of type 'string'"),
        (("spec", "workerGroupSpecs", 0, "maxReplica"), 4, "maxReplica"),
        (("spec", "workerGroupSpecs", 1, "resources", "small"), 1, "1 is not of type 'string'"),
        (("spec", "workerGroupSpecs", 1, "template", "spec", "toleration"), [], "toleration"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limit"), {}, "limit"),
    ],
)
def test_a_mistake_is_found(path: tuple[Any, ...], value: Any, told: str) -> None:
    manifest = copy.deepcopy(find_manifest("RayCluster"))
    place: Any = manifest
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError, match=told):
        check(manifest)


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_every_actor_fits_in_the_pods_of_its_role(kind: str) -> None:
    """As Ray's own autoscaler reads the manifest."""
    manifest = find_manifest(kind)
    custom = {"metadata": manifest["metadata"], "spec": cluster_of(manifest)}
    derived = _derive_autoscaling_config_from_ray_cr(copy.deepcopy(custom))
    kinds = list_kinds(derived)
    assert find_misfits(kinds, derived["head_node_type"], DEMANDS) == []
    assert derived["idle_timeout_minutes"] == 10 and derived["max_workers"] == 15


def test_the_job_runs_on_the_cluster_of_the_other_manifest() -> None:
    assert cluster_of(find_manifest("RayJob")) == cluster_of(find_manifest("RayCluster"))
    spec = find_manifest("RayJob")["spec"]
    stages = re.search(r"for stage in ([a-z_ ]+);", spec["entrypoint"])
    assert stages and stages[1].split() == [
        "collect",
        "make_pairs",
        "warm_start",
        "learn_reward",
        "train_router",
        "evaluate",
        "calibrate",
    ]
    assert all((ROOT / "jobs" / f"{stage}.py").is_file() for stage in stages[1].split())
    assert "--config configs/cluster.yaml" in spec["entrypoint"] and spec["entrypointNumCpus"] == 0


@pytest.mark.parametrize("kind", SPECS)
def test_every_cluster_asks_for_its_token_and_its_pods_may_do_little(kind: str) -> None:
    cluster = cluster_of(find_manifest(kind))
    assert cluster["authOptions"] == {"mode": "token"} and cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    low, high = re.findall(r"\d+\.\d+", next(each for each in PROJECT["dependencies"] if each.startswith("ray[")))
    assert cluster["rayVersion"].startswith(f"{low}.") and not cluster["rayVersion"].startswith(f"{high}.")
    for name, pod in list_pods(cluster).items():
        [container] = pod["spec"]["containers"]
        asked, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert asked == limits, name
        flavour = "gpu" if "nvidia.com/gpu" in limits else "cpu"
        assert container["image"].endswith(f"/roro_ray:{PROJECT['version']}-{flavour}"), name
        assert (
            pod["spec"]["securityContext"]["runAsNonRoot"]
            and not container["securityContext"]["allowPrivilegeEscalation"]
        )
        assert name == "head" or pod["spec"]["automountServiceAccountToken"] is False
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_the_service_is_our_application_with_room_for_its_replicas() -> None:
    manifest = find_manifest("RayService")
    given = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    assert find_unknown(given, ServeDeploySchema.model_validate(given).model_dump()) == []
    [application] = given["applications"]
    ours = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text("utf-8"))
    assert application["import_path"] == ours["applications"][0]["import_path"]
    assert {key: given[key] for key in ("grpc_options", "logging_config")} == {
        key: ours[key] for key in ("grpc_options", "logging_config")
    }
    pool = PoolConfig([ModelConfig("small"), ModelConfig("large")])
    config = load_server_config(application["args"])
    assert set(config.per_model) == {model.name for model in pool.models} and config.security.key_file
    groups = {group["groupName"]: group for group in cluster_of(manifest)["workerGroupSpecs"]}
    gpus = sum(model.gpus * model.max_replicas for model in config.per_model.values())
    assert gpus == groups["engines"]["maxReplicas"]
    assert sum(model.min_replicas for model in config.per_model.values()) == groups["engines"]["minReplicas"]
    limits = groups["serving"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus = sum(each.cpus * each.max_replicas for each in (config.ingress, config.routers))
    assert cpus <= float(limits["cpu"]) * groups["serving"]["maxReplicas"]
    waits = [group["template"]["spec"]["terminationGracePeriodSeconds"] for group in groups.values()]
    assert min(waits) >= config.answer.timeout_s + 60 and config.ingress.min_replicas >= 2
    mounts = groups["serving"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert any(config.security.key_file.startswith(mount["mountPath"] + "/") for mount in mounts)


@pytest.mark.parametrize("name", FILES)
def test_a_manifest_explains_itself(name: str) -> None:
    lines = (FOLDER / name).read_text("utf-8").splitlines()
    assert lines[0].startswith("# ") and max(map(len, lines)) <= 120
