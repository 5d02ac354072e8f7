"""Where the actors of each role may run: custom resources and node labels, looked up by role or model.

A role is a kind of actor: `rollout`, `learner`, `reward`, `engine`. A model's name stands in place of its role, so
that the dear model can have its own kind of node: `ray.resources={engine: {l4: 1}, large: {h100: 2}}`.
"""

from __future__ import annotations

from typing import TypeVar

from roro_ray.config import Config

_Amount = TypeVar("_Amount", float, str)
ROLES = ("rollout", "learner", "reward", "engine")


def list_models(config: Config) -> dict[str, str]:
    """The role of each model that may have an actor of its own, by its name."""
    role_of = {config.warm.engine.name: "engine", config.reward.engine.name: "reward"}
    return role_of | {model.name: "engine" for model in config.pool.models}


def find_resources(config: Config, role: str) -> dict[str, float]:
    """The custom resources that an actor of a role, or of the model of that name, asks for beside CPUs and GPUs."""
    return dict(_find(config.ray.resources, config, role))


def find_labels(config: Config, role: str) -> dict[str, str]:
    """What the labels of a node must be for an actor of a role, or of the model of that name (see `ray.labels`)."""
    return dict(_find(config.ray.labels, config, role))


def _find(by_role: dict[str, dict[str, _Amount]], config: Config, role: str) -> dict[str, _Amount]:
    if role in by_role:
        return by_role[role]
    return by_role.get(list_models(config).get(role, role), {})
