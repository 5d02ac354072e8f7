"""The demands of each role on the cluster, in the two forms that Ray takes: actor options and Train's scaling.

What is asked for is worked out once, here, so that what is checked before a start (`actors.resources`) is what the
actors are then started with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actors.resources import Bundle
from roro_ray.config import Config
from roro_ray.placement import find_labels, find_resources

if TYPE_CHECKING:
    from ray.train import ScalingConfig


def role_bundle(config: Config, role: str, cpus: float, gpus: float) -> Bundle:
    """What one actor of a role (or of the model of that name) asks for, placement by `ray.resources` and `ray.labels`.

    Args:
        role: `rollout`, `learner`, `reward`, `engine`, or a model's name.
        cpus: logical CPUs of the actor.
        gpus: GPUs of the actor; 0 asks for none.
    """
    resources = {"CPU": cpus, **({"GPU": gpus} if gpus else {}), **find_resources(config, role)}
    return Bundle(resources, find_labels(config, role))


def bundle_options(bundle: Bundle) -> dict[str, Any]:
    """A bundle as the arguments of an actor's `.options(..)`."""
    custom = {name: amount for name, amount in bundle.resources.items() if name not in ("CPU", "GPU")}
    options: dict[str, Any] = {"num_cpus": bundle.resources.get("CPU", 0), "num_gpus": bundle.resources.get("GPU", 0)}
    return options | {"resources": custom, "label_selector": dict(bundle.labels)}


def role_options(config: Config, role: str, cpus: float, gpus: float) -> dict[str, Any]:
    """`role_bundle` as the arguments of an actor's `.options(..)`."""
    return bundle_options(role_bundle(config, role, cpus, gpus))


def make_scaling(bundle: Bundle, workers: int) -> ScalingConfig:
    """A Ray Train group of `workers`, each with this bundle."""
    from ray.train import ScalingConfig

    return ScalingConfig(
        num_workers=workers,
        use_gpu=bundle.resources.get("GPU", 0) > 0,
        resources_per_worker=dict(bundle.resources),
        label_selector=dict(bundle.labels) or None,
    )
