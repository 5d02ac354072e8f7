"""Refuses settings of the cluster that cannot work: what happens when something fails."""

from __future__ import annotations

from roro_ray.config import Config
from roro_ray.errors import ConfigError, did_you_mean

ROLLOUTS = ("fail_fast", "retry", "minimum_group")


def check_cluster(settings: Config) -> None:
    """Check the settings under `faults`.

    Raises:
        ConfigError: names the key, the value and what to do.
    """
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
