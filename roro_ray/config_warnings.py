"""Warnings about settings that are valid and are not what their user wants."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from roro_ray.cluster_checks import warn_unplaced
from roro_ray.config import Config
from roro_ray.config_checks import get_setting


def warn_settings(settings: Config, explicit: Collection[str]) -> None:
    """Warn of every setting that the user gave and that another setting makes idle, and of what does harm."""
    warn_unplaced(settings)
    greedy = settings.episode.temperature == 0
    rules = (
        (greedy, "pairs.continuations", "episode.temperature=0: greedy decoding repeats itself"),
        (
            settings.pairs.process_source != "interventions",
            "pairs.continuations",
            f"pairs.process_source={settings.pairs.process_source}",
        ),
        (not greedy, "pool.memo_entries", "episode.temperature > 0: only greedy steps are remembered"),
        (settings.router.beta == 0, "router.credit", "router.beta=0: there is no process reward to credit"),
        (settings.router.max_lag == 0, "router.objective", "router.max_lag=0: the acting weights are the present ones"),
        (settings.router.objective == "ppo", "router.weight_cap", "router.objective=ppo"),
        *(
            (not settings.router.encoder, f"router.{key}", "router.encoder is empty")
            for key in ("encoder_lr", "encoder_rank", "encoder_dtype", "gradient_checkpointing", "cache_mb")
        ),
        *(
            (settings.faults.rollouts == "fail_fast", f"faults.{key}", "faults.rollouts=fail_fast")
            for key in ("attempts", "pause_s", "max_failed_share")
        ),
        (
            settings.faults.rollouts != "minimum_group",
            "faults.min_group",
            f"faults.rollouts={settings.faults.rollouts}",
        ),
        (settings.wandb.mode == "disabled", "wandb.project", "wandb.mode=disabled"),
        *(
            (settings.reward.rubric_source != "learned", key, f"reward.rubric_source={settings.reward.rubric_source}")
            for key in ("reward.rounds", "reward.judge_updates", "reward.rubricor_updates")
        ),
        *(
            (settings.reward.backend == "local", key, "reward.backend=local")
            for key in sorted(explicit)
            if key.startswith("reward.engine.")
            or key in ("reward.publish_every", "reward.judge_tokens", "reward.judge_rows", "reward.rubric_tokens")
        ),
        *(
            (not settings.lora.base, key, "lora.base is empty: no adapters are trained")
            for key in sorted(explicit)
            if key.startswith("lora.") and key != "lora.base"
        ),
    )
    for idle, key, reason in rules:
        if idle and key in explicit:
            warnings.warn(f"{key}={get_setting(settings, key)} will be ignored ({reason}).", stacklevel=3)
    if settings.router.max_lag > 1 and settings.router.objective == "ppo":
        warnings.warn(
            f"router.max_lag={settings.router.max_lag} with router.objective=ppo learns too little (see Asynchrony in "
            "docs/performance.md): add router.objective=decoupled, or lower the lag to 1.",
            stacklevel=3,
        )
