"""What the actors of each role ask of their nodes: CPUs, GPUs, custom resources and labels, by role or model.

A role is a kind of actor: `rollout`, `learner`, `reward`, `engine`. A model's name stands in place of its role, so
that the dear model can have its own kind of node: `ray.resources={engine: {l4: 1}, large: {h100: 2}}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from roro_ray.config import Config
from roro_ray.gpu_checks import count_gpus

Amounts = Mapping[str, float]
_HIDDEN = ("object_store_memory", "node:")
_OF_GROUP = re.compile(r"(^bundle|_group)_(\d+_)?[0-9a-f]{36}$")  # Ray's names for what placement groups hold
_Amount = TypeVar("_Amount", float, str)
ROLES = ("rollout", "learner", "reward", "engine")


@dataclass(frozen=True)
class Bundle:
    """What one actor asks of one node: amounts by resource (CPU, GPU, custom ones), and labels that the node needs.

    A label's value is one of Ray's selectors: `gpu`, `!gpu`, `in(a, b)` or `!in(a, b)`.
    """

    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        labels = [f"{key}={value}" for key, value in sorted(self.labels.items())]
        return format_amounts(self.resources) + (f" on a node with {', '.join(labels)}" if labels else "")


def list_models(config: Config) -> dict[str, str]:
    """The role of each model that may have an actor of its own, by its name."""
    role_of = {config.warm.engine.name: "engine", config.reward.engine.name: "reward"}
    return role_of | {model.name: "engine" for model in config.pool.models}


def find_resources(config: Config, role: str) -> dict[str, float]:
    """The custom resources that an actor of a role, or of the model of that name, asks for beside CPUs and GPUs."""
    return dict(_find(config.ray.resources, config, role))


def count_replicas(config: Config, model: str) -> tuple[int, int]:
    """The least and the most replicas that the model of that name has (pool.placement=actors)."""
    least, most = config.ray.replicas.get(model, (1, 1))
    return least, most


def describe_replicas(config: Config) -> str:
    """`one actor per model`, or how many of each: `in actors (small 1, large 0 to 4)`."""
    bounds = {model.name: count_replicas(config, model.name) for model in config.pool.models}
    if set(bounds.values()) == {(1, 1)}:
        return "one actor per model"
    told = [f"{name} {least}" + (f" to {most}" if most > least else "") for name, (least, most) in bounds.items()]
    return f"in actors ({', '.join(told)})"


def find_labels(config: Config, role: str) -> dict[str, str]:
    """What the labels of a node must be for an actor of a role, or of the model of that name (see `ray.labels`)."""
    return dict(_find(config.ray.labels, config, role))


def _find(by_role: dict[str, dict[str, _Amount]], config: Config, role: str) -> dict[str, _Amount]:
    if role in by_role:
        return by_role[role]
    return by_role.get(list_models(config).get(role, role), {})


def role_bundle(config: Config, role: str, cpus: float, gpus: float) -> Bundle:
    """What one actor of a role (or of the model of that name) asks for, placement by `ray.resources` and `ray.labels`.

    Args:
        role: `rollout`, `learner`, `reward`, `engine`, or a model's name.
        cpus: logical CPUs of the actor.
        gpus: GPUs of the actor; 0 asks for none.
    """
    resources = {"CPU": cpus, **({"GPU": gpus} if gpus else {}), **find_resources(config, role)}
    return Bundle(resources, find_labels(config, role))


def describe_placement(config: Config) -> list[str]:
    """What each role asks of Ray, as lines of `--dry-run`; none where nothing is placed by resource or label."""
    ray, pool = config.ray, config.pool
    if not ray.resources and not ray.labels:
        return []
    asked: list[tuple[str, str, float, float]] = [
        (str(ray.workers), "rollout", ray.worker_cpus, ray.worker_gpus),
        (str(config.router.workers), "learner", ray.learner_cpus, ray.learner_gpus),
    ]
    if config.reward.backend == "engine":
        lora, engine = config.lora, config.reward.engine
        asked.append((str(lora.workers), "learner", lora.cpus, lora.gpus))
        asked.append(("1", "reward", ray.reward_cpus, ray.reward_gpus or engine.gpus))
        asked.append(("1", engine.name, ray.engine_cpus, engine.gpus or ray.engine_gpus))
    else:
        asked.append(("1", "reward", ray.reward_cpus, ray.reward_gpus))
    for model in pool.models if pool.placement == "actors" else ():
        least, most = ray.replicas.get(model.name, (1, 1))
        count = str(most) if least == most else f"{least} to {most}"
        asked.append((count, model.name, ray.engine_cpus, count_gpus(model, ray)))
    texts = [f"{count} x {role}: {role_bundle(config, role, cpus, gpus)}" for count, role, cpus, gpus in asked]
    return [f"{'placement' if not index else '':<12} {text}" for index, text in enumerate(texts)]


def format_amounts(amounts: Amounts, asked: Amounts | None = None) -> str:
    """`CPU 4, GPU 1, l4 2, memory 8 GiB`: what a person asks for, zeros left out.

    Args:
        asked: given where `amounts` is what there is: memory, which every node has, is told where it is asked for.
    """
    texts = []
    for key, value in sorted(amounts.items()):
        if not value or math.isinf(value) or key.startswith(_HIDDEN) or _OF_GROUP.search(key):
            continue
        if key == "memory" and asked is not None and key not in asked:
            continue
        texts.append(f"{key} {value / 2**30:.3g} GiB" if key == "memory" else f"{key} {value:g}")
    return ", ".join(texts) or "nothing"
