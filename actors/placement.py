"""The demands of each role on the cluster, in the two forms that Ray takes: actor options and Train's scaling.

What is asked for is worked out once, here, so that what is checked before a start (`actors.resources`) is what the
actors are then started with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from roro_ray.config import Config
from roro_ray.placement import Bundle, role_bundle

if TYPE_CHECKING:
    from ray.train import ScalingConfig


def bundle_options(bundle: Bundle) -> dict[str, Any]:
    """A bundle as the arguments of an actor's `.options(..)`."""
    resources = dict(bundle.resources)
    options: dict[str, Any] = {"num_cpus": resources.pop("CPU", 0), "num_gpus": resources.pop("GPU", 0)}
    if "memory" in resources:  # which Ray knows, but takes by itself
        options["memory"] = resources.pop("memory")
    return options | {"resources": resources, "label_selector": dict(bundle.labels)}


def role_options(config: Config, role: str, cpus: float, gpus: float) -> dict[str, Any]:
    """`role_bundle` as the arguments of an actor's `.options(..)`."""
    return bundle_options(role_bundle(config, role, cpus, gpus))


def make_scaling(bundle: Bundle, workers: int) -> ScalingConfig:
    """A Ray Train group of `workers`, each with this bundle."""
    from ray.train import ScalingConfig

    return ScalingConfig(  # type: ignore[call-arg]  # mypy reads the class of Train v1; v2 is what runs
        num_workers=workers,
        use_gpu=bundle.resources.get("GPU", 0) > 0,
        resources_per_worker=dict(bundle.resources),
        label_selector=dict(bundle.labels) or None,
    )
