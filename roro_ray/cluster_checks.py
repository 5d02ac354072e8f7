"""Refuses settings of the cluster that cannot work: where actors may run, and what happens when something fails."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping

from roro_ray.config import Config
from roro_ray.errors import ConfigError, did_you_mean
from roro_ray.placement import ROLES, list_models

# Ray's own grammar of labels (that of Kubernetes) and of what may be asked of them.
_WORD = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_SELECTOR = re.compile(rf"!?({_WORD}|in\({_WORD}(, ?{_WORD})*\))")
_LABEL = re.compile(rf"([a-zA-Z0-9.-]{{1,253}}/)?{_WORD}")
_FINEST = 1e-4  # of a resource, by Ray
ROLLOUTS = ("fail_fast", "retry", "minimum_group")


def check_cluster(settings: Config) -> None:
    """Check the settings under `faults`, and those under `ray` that place actors.

    Raises:
        ConfigError: names the key, the value and what to do.
    """
    _check_placement(settings)
    _check_replicas(settings)
    faults = settings.faults
    if faults.rollouts not in ROLLOUTS:
        raise ConfigError(
            f"faults.rollouts: got {faults.rollouts!r}, expected one of {', '.join(ROLLOUTS)}"
            f"{did_you_mean(faults.rollouts, ROLLOUTS)}."
        )
    for key, least in (("attempts", 1), ("worker_attempts", 1), ("min_group", 2), ("pause_s", 0)):
        if getattr(faults, key) < least:
            raise ConfigError(f"faults.{key}: got {getattr(faults, key)}, expected at least {least}.")
    for key in ("max_failed_share", "max_score_errors"):
        if not 0 <= getattr(faults, key) <= 1:
            raise ConfigError(f"faults.{key}: got {getattr(faults, key)}, expected a share from 0 to 1.")
    if faults.rollouts == "minimum_group" and faults.min_group > settings.router.group_size:
        raise ConfigError(
            f"faults.min_group={faults.min_group} and router.group_size={settings.router.group_size} contradict each "
            "other: no group could ever be used. Lower the first."
        )


def warn_unplaced(settings: Config) -> None:
    """Warn of a placement of engines, or of their replicas, where no engine has an actor of its own."""
    if settings.ray.replicas and settings.pool.placement == "colocated":
        warnings.warn(
            "ray.replicas will be ignored (pool.placement=colocated: each rollout worker has a copy of its own).",
            stacklevel=4,
        )
    if settings.pool.placement == "actors" or settings.reward.backend == "engine":
        return
    for key, by_role in (("resources", settings.ray.resources), ("labels", settings.ray.labels)):
        for role in by_role:
            if list_models(settings).get(role, role) == "engine":
                reason = "pool.placement=colocated: engines live in the rollout workers"
                warnings.warn(f"ray.{key}.{role} will be ignored ({reason}).", stacklevel=4)


def _check_placement(settings: Config) -> None:
    if settings.ray.grow_timeout_s < 0:
        raise ConfigError(f"ray.grow_timeout_s: got {settings.ray.grow_timeout_s:g}, expected at least 0.")
    models = list_models(settings)
    for key, by_role in (("resources", settings.ray.resources), ("labels", settings.ray.labels)):
        _check_roles(f"ray.{key}", by_role, models)
    clash = sorted(name for name, role in models.items() if name in ROLES and name != role)
    if clash and (settings.ray.resources or settings.ray.labels):
        raise ConfigError(
            f"a model is named {clash[0]!r}, as is a role of ray.resources and ray.labels: give the model another name."
        )
    for role, resources in settings.ray.resources.items():
        for name, amount in resources.items():
            _check_resource(f"ray.resources.{role}.{name}", name, amount)
    for role, labels in settings.ray.labels.items():
        for name, selector in labels.items():
            if not _LABEL.fullmatch(name):
                raise ConfigError(f"ray.labels.{role}: got the label {name!r}, expected a name such as tier or a.io/b.")
            if not _SELECTOR.fullmatch(selector):
                raise ConfigError(
                    f"ray.labels.{role}.{name}: got {selector!r}, expected a value such as gpu, !gpu, in(a, b) or "
                    "!in(a, b)."
                )


def _check_replicas(settings: Config) -> None:
    models = [model.name for model in settings.pool.models]
    for name, bounds in settings.ray.replicas.items():
        if name not in models:
            raise ConfigError(
                f"ray.replicas: {name!r} is no model of the pool, expected one of {', '.join(models)}"
                f"{did_you_mean(name, models)}."
            )
        if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] or bounds[1] < 1:
            raise ConfigError(
                f"ray.replicas.{name}: got {list(bounds)}, expected [least, most] with 0 <= least <= most and most of "
                f"at least 1, such as {name}: [0, 4]."
            )
    if settings.ray.replica_target <= 0:
        raise ConfigError(f"ray.replica_target: got {settings.ray.replica_target:g}, expected more than 0.")
    for key in ("replica_idle_s", "step_timeout_s"):
        if getattr(settings.ray, key) < 0:
            raise ConfigError(f"ray.{key}: got {getattr(settings.ray, key):g}, expected at least 0.")
    if settings.ray.step_timeout_s > settings.episode.timeout_s:
        raise ConfigError(
            f"ray.step_timeout_s={settings.ray.step_timeout_s:g} and episode.timeout_s={settings.episode.timeout_s:g} "
            "contradict each other: a hung replica would be found only when its episodes are over. Lower the first."
        )


def _check_roles(key: str, by_role: Mapping[str, object], models: Mapping[str, str]) -> None:
    known = [*ROLES, *(name for name in models if name not in ROLES)]
    for role in by_role:
        if role not in known:
            raise ConfigError(
                f"{key}: {role!r} is neither a role nor a model, expected one of {', '.join(known)}"
                f"{did_you_mean(role, known)}."
            )


def _check_resource(key: str, name: str, amount: float) -> None:
    if name in ("CPU", "GPU"):
        raise ConfigError(f"{key}: {name}s are asked for by ray.worker_{name.lower()}s and its like, not here.")
    if not _FINEST <= amount < math.inf:
        raise ConfigError(f"{key}: got {amount:g}, expected a number from {_FINEST:g} (Ray counts no finer) up.")
