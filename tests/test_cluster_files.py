"""cluster.yaml, cluster/gcp.yaml, cluster/local.yaml: Ray takes them, and every actor of configs/cluster.yaml fits."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from roro_ray.settings import load_config
from tests.cluster_files import (
    PROJECT,
    ROLES,
    find_misfits,
    find_open_doors,
    find_problems,
    find_secrets,
    list_demands,
    list_kinds,
    read_yaml,
)
from tests.documents import ROOT

pytestmark = pytest.mark.timeout(60)
CLOUDS = ["cluster.yaml", "cluster/gcp.yaml"]
FILES = [*CLOUDS, "cluster/local.yaml"]
DEMANDS = list_demands(load_config([], ROOT / "configs" / "cluster.yaml"))


@pytest.mark.parametrize("path", FILES)
def test_ray_takes_the_file(path: str) -> None:
    prepared = prepare_config(read_yaml(path))
    validate_config(prepared)
    assert prepared["cluster_name"] == "roro"


@pytest.mark.parametrize("path", CLOUDS)
def test_every_actor_fits_on_its_own_kind_of_node_and_on_no_other(path: str) -> None:
    cluster = read_yaml(path)
    assert find_problems(cluster, DEMANDS) == []
    assert {node.labels["role"] for node in list_kinds(cluster)} == ROLES | {"head"}
    assert {demand.role for demand in DEMANDS} == ROLES


def change(cluster: dict[str, Any], place: str, value: Any) -> None:
    """Set what a dotted place names; None takes it away."""
    *parents, last = place.split("/")
    for part in parents:
        cluster = cluster[part]
    if value is None:
        del cluster[last]
    else:
        cluster[last] = value


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("available_node_types/small/node_config/InstanceType", None, "small: node_config lacks InstanceType"),
        ("available_node_types/large/node_config/InstanceType", "g6e.4xlarg", "large: .* has 0 cores"),
        ("available_node_types/large/resources", {"CPU": 8, "GPU": 2, "large": 1}, "large: .* 8 cores and 1 GPUs"),
        ("available_node_types/large/resources", {"CPU": 8, "GPU": 1, "larg": 1}, "large: 4 x .* room for 0"),
        ("available_node_types/judge/resources", {"CPU": 8, "GPU": 1, "learner": 1}, "learner: also fits on judge"),
        ("available_node_types/rollout/resources", {"CPU": 3, "rollout": 4}, "rollout: 4 x .* room for 0"),
        ("available_node_types/small/max_workers", 3, "small: 4 x .* room for 3"),
        ("available_node_types/head/resources", {"CPU": 8}, "head: has CPUs"),
        ("available_node_types/rollout/docker", None, "rollout: image .*gpu"),
        ("max_workers", 5, "max_workers is 5, the kinds of node add up to 15"),
        ("docker/run_options", [], "token authentication is not on"),
        ("file_mounts", {}, "the token does not reach the nodes"),
        ("head_start_ray_commands", ["ray start --head --dashboard-host=0.0.0.0"], "loopback"),
    ],
)
def test_a_mistake_that_rays_schema_lets_pass_is_found(place: str, value: Any, told: str) -> None:
    cluster = copy.deepcopy(read_yaml("cluster.yaml"))
    change(cluster, place, value)
    if place != "max_workers":
        validate_config(prepare_config(copy.deepcopy(cluster)))
    assert re.search(told, "\n".join(find_problems(cluster, DEMANDS)))


@pytest.mark.parametrize("path", FILES)
def test_a_cluster_has_its_token_and_no_open_door(path: str) -> None:
    assert find_open_doors(read_yaml(path)) == []


def test_spot_is_for_what_can_be_done_again_elsewhere() -> None:
    aws = {name: kind["node_config"] for name, kind in read_yaml("cluster.yaml")["available_node_types"].items()}
    assert {name for name, node in aws.items() if "InstanceMarketOptions" in node} == {"rollout", "small", "large"}
    gcp = {name: kind["node_config"] for name, kind in read_yaml("cluster/gcp.yaml")["available_node_types"].items()}
    assert {name for name, node in gcp.items() if node.get("scheduling", {}).get("preemptible")} == {
        "rollout",
        "small",
        "large",
    }
    for node in gcp.values():
        assert node["machineType"] != "a2-highgpu-1g" or node["scheduling"]["onHostMaintenance"] == "TERMINATE"


def test_the_workers_may_not_start_machines() -> None:
    kinds = read_yaml("cluster.yaml")["available_node_types"]
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in kinds.items()}
    assert profiles.pop("head") == "roro-head" and set(profiles.values()) == {"roro-worker"}
    for name in ("head", "worker"):
        policy = json.loads((ROOT / "cluster" / "aws" / f"{name}-policy.json").read_text("utf-8"))
        actions = [action for statement in policy["Statement"] for action in statement["Action"]]
        assert "*" not in actions and any(action.startswith("s3:") for action in actions)
        assert any(action.startswith("ec2:Run") for action in actions) == (name == "head")


def test_the_machines_of_the_local_cluster_say_what_they_are_for() -> None:
    cluster = read_yaml("cluster/local.yaml")
    command = cluster["worker_start_ray_commands"][-1]
    assert "--resources=" in command and "--labels-file=/etc/roro/labels.yaml" in command
    head = cluster["head_start_ray_commands"][-1]
    assert "--num-cpus=0" in head and "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    text = (ROOT / "cluster" / "local.yaml").read_text("utf-8")
    given = [json.loads(found) for found in re.findall(r'\{"[^}]*\}', text)]
    assert {role for each in given for role in each} == ROLES
    wanted = prepare_config(copy.deepcopy(cluster))["available_node_types"]["local.cluster.node"]
    assert wanted["min_workers"] == wanted["max_workers"] == len(given)
    assert cluster["docker"]["worker_image"].endswith(f":{PROJECT['version']}-gpu")


def test_misfits_are_told_for_kinds_that_nobody_can_use() -> None:
    cluster = copy.deepcopy(read_yaml("cluster.yaml"))
    cluster["available_node_types"]["spare"] = {"resources": {"CPU": 1}, "labels": {"role": "spare"}, "max_workers": 1}
    assert find_misfits(list_kinds(cluster), "head", DEMANDS) == ["spare: no actor fits"]


def test_no_file_holds_a_secret() -> None:
    paths = [ROOT / "cluster.yaml", ROOT / "Dockerfile", *sorted((ROOT / "cluster").rglob("*.*"))]
    assert len(paths) > 8
    assert [path.name for path in paths if find_secrets(path.read_text("utf-8"))] == []
    assert find_secrets("RAY_AUTH_TOKEN=abc") and find_secrets("key: AKIA0123456789ABCDEF")


@pytest.mark.parametrize("path", FILES)
def test_a_file_explains_itself(path: str) -> None:
    lines = (ROOT / path).read_text("utf-8").splitlines()
    assert lines[0].startswith("# ") and max(map(len, lines)) <= 120
    assert sum("#" in line for line in lines) > 8
