"""What Ray's own schemas do not look at in the files of a cluster: a reader of each, and a list of what is wrong.

Nodes and actors are compared by the code that places the actors (`actors.placement`, `actors.resources`), so that a
kind of node that no actor fits, or an actor that fits no kind of node, is found before anybody pays for it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from actors.engines import count_gpus
from actors.placement import role_bundle
from actors.resources import Bundle, Node
from roro_ray.config import Config
from tests.documents import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ROLES = {"rollout", "small", "large", "reward", "learner"}
# Cores and GPUs of the machines, from the providers' lists.
MACHINES = {
    "m7i.2xlarge": (8, 0),
    "c7i.4xlarge": (16, 0),
    "g6e.2xlarge": (8, 1),
    "g6e.4xlarge": (16, 1),
    "n2-standard-8": (8, 0),
    "c3-standard-22": (22, 0),
    "a2-highgpu-1g": (12, 1),
}
MACHINE_KEY = {"aws": "InstanceType", "gcp": "machineType"}
NEEDED = {
    "aws": {"InstanceType", "ImageId", "SecurityGroupIds", "IamInstanceProfile", "MetadataOptions"},
    "gcp": {"machineType", "disks", "serviceAccounts"},
}
_SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,}|BEGIN [A-Z ]*PRIVATE KEY|RAY_AUTH_TOKEN\s*[=:]\s*\S"
)


@dataclass(frozen=True)
class Demand:
    """At most `count` actors of one kind, each with this bundle, that may only be on nodes of one role."""

    role: str
    bundle: Bundle
    count: int


def read_yaml(path: str) -> Any:
    """One document of a path relative to the project."""
    return yaml.safe_load((ROOT / path).read_text("utf-8"))


def list_demands(config: Config) -> list[Demand]:
    """What all stages may ever ask for, by role."""
    ray, lora = config.ray, config.lora
    demands = [Demand("rollout", role_bundle(config, "rollout", ray.worker_cpus, ray.worker_gpus), ray.workers)]
    for model in config.pool.models:
        bundle = role_bundle(config, model.name, ray.engine_cpus, count_gpus(model, ray))
        demands.append(Demand(model.name, bundle, ray.replicas.get(model.name, [1, 1])[1]))
    gpus = config.reward.engine.gpus or ray.engine_gpus
    engine = role_bundle(config, config.reward.engine.name, ray.engine_cpus, gpus)
    service = role_bundle(config, "reward", ray.reward_cpus, ray.reward_gpus)
    learner = role_bundle(config, "learner", ray.learner_cpus, ray.learner_gpus)
    adapters = role_bundle(config, "learner", lora.cpus, lora.gpus)
    demands += [Demand("reward", engine, 1), Demand("reward", service, 1)]
    return [*demands, Demand("learner", learner, config.router.workers), Demand("learner", adapters, lora.workers)]


def find_misfits(nodes: Sequence[Node], head: str, demands: Sequence[Demand]) -> list[str]:
    """What is wrong between kinds of node and actors.

    Every actor must fit on exactly the nodes whose label `role` is its own, and there must be room for as many as there
    may be; every kind of node but the head must be of use to somebody.
    """
    problems, used = [], set()
    for demand in demands:
        fitting = [node for node in nodes if node.holds(demand.bundle)]
        used |= {node.name for node in fitting}
        room = sum(node.holds(demand.bundle) * node.count for node in fitting)
        strange = [node.name for node in fitting if node.labels.get("role") != demand.role]
        if room < demand.count:
            problems.append(f"{demand.role}: {demand.count} x ({demand.bundle}) asked for, room for {room}")
        if strange:
            problems.append(f"{demand.role}: also fits on {', '.join(strange)}")
    problems += [f"{node.name}: no actor fits" for node in nodes if node.name not in used and node.name != head]
    problems += [f"{head}: has CPUs" for node in nodes if node.name == head and node.resources.get("CPU")]
    return problems


def list_kinds(cluster: dict[str, Any]) -> list[Node]:
    """The kinds of node of an autoscaler's config, the head among them."""
    head = cluster["head_node_type"]
    return [
        Node(kind["resources"], kind.get("labels", {}), name, 1 if name == head else kind.get("max_workers", 0))
        for name, kind in cluster["available_node_types"].items()
    ]


def find_problems(cluster: dict[str, Any], demands: Sequence[Demand]) -> list[str]:
    """What is wrong with an autoscaler's config for a cloud, beyond what Ray's schema finds."""
    kinds, head, provider = cluster["available_node_types"], cluster["head_node_type"], cluster["provider"]["type"]
    problems = find_misfits(list_kinds(cluster), head, demands)
    total = sum(kind.get("max_workers", 0) for name, kind in kinds.items() if name != head)
    if total != cluster["max_workers"]:
        problems.append(f"max_workers is {cluster['max_workers']}, the kinds of node add up to {total}")
    for name, kind in kinds.items():
        node = kind["node_config"]
        problems += [f"{name}: node_config lacks {key}" for key in sorted(NEEDED[provider] - node.keys())]
        cores, gpus = MACHINES.get(node.get(MACHINE_KEY[provider], ""), (0, 0))
        if kind["resources"].get("CPU", 0) > cores or kind["resources"].get("GPU", 0) != gpus:
            problems.append(f"{name}: {kind['resources']}, but the machine has {cores} cores and {gpus} GPUs")
        docker = cluster["docker"] | kind.get("docker", {})
        image = docker["head_image"] if name == head else docker["worker_image"]
        if not image.endswith(f":{PROJECT['version']}-{'gpu' if gpus else 'cpu'}"):
            problems.append(f"{name}: image {image}")
    return problems + find_open_doors(cluster)


def find_open_doors(cluster: dict[str, Any]) -> list[str]:
    """What would leave an autoscaler's cluster without its token, or open to others."""
    problems = []
    if "--env RAY_AUTH_MODE=token" not in cluster["docker"]["run_options"]:
        problems.append("token authentication is not on")
    if cluster["file_mounts"].get("/home/ray/.ray/auth_token") != "~/.ray/auth_token":
        problems.append("the token does not reach the nodes")
    if "--dashboard-host=127.0.0.1" not in " ".join(cluster["head_start_ray_commands"]):
        problems.append("the dashboard does not listen on loopback alone")
    return problems


def find_secrets(text: str) -> list[str]:
    """What looks like a key or a token."""
    return _SECRET.findall(text)
