"""Settings of PPO on RLlib, the outcome-only baseline that another library trains (`actors.rllib`)."""

from __future__ import annotations

from dataclasses import dataclass

from roro_ray.errors import ConfigError


@dataclass
class PpoConfig:
    """PPO on RLlib; the network, its first weights and the range of cost weights are `router`'s."""

    episodes: int = 0  # to train on; 0: as many as GRPO has (router.iterations x router.queries x router.group_size)
    decisions: int = 896  # in one iteration's batch; episodes of the embedded world have about 7 each
    epochs: int = 8  # passes over each batch
    minibatch: int = 224  # decisions in one optimizer step
    head_lr: float = 2e-3  # of the decision head and the critic
    encoder_lr: float = 5e-4
    clip: float = 0.2  # PPO ratio clip
    entropy: float = 0.01  # entropy bonus
    value_weight: float = 0.5  # of the critic's loss, whose gradient shapes the encoder too
    gae_lambda: float = 0.95  # 1: advantages from whole returns, 0: from one step and the critic
    envs: int = 32  # episodes side by side in each env runner
    text_tokens: int = 1024  # most of the router's tokens of query and steps that an observation holds
    learners: int = 0  # learner processes of their own, with ray.learner_cpus and ray.learner_gpus; 0: the job's own


def check_ppo(settings: PpoConfig) -> None:
    """Refuse settings that PPO cannot train with.

    Raises:
        ConfigError: names the key or both keys, the values, and what to do.
    """
    for key in ("decisions", "epochs", "minibatch", "envs", "text_tokens"):
        if getattr(settings, key) < 1:
            raise ConfigError(f"ppo.{key}: got {getattr(settings, key)}, expected at least 1.")
    for key in ("episodes", "entropy", "value_weight", "learners"):
        if getattr(settings, key) < 0:
            raise ConfigError(f"ppo.{key}: got {getattr(settings, key)}, expected at least 0.")
    for key in ("head_lr", "encoder_lr", "clip"):
        if not getattr(settings, key) > 0:
            raise ConfigError(f"ppo.{key}: got {getattr(settings, key)}, expected more than 0.")
    if not 0 <= settings.gae_lambda <= 1:
        raise ConfigError(f"ppo.gae_lambda: got {settings.gae_lambda}, expected from 0 to 1.")
    if settings.minibatch > settings.decisions:
        raise ConfigError(
            f"ppo.minibatch={settings.minibatch} and ppo.decisions={settings.decisions} contradict each other: "
            "a minibatch is a part of the batch. Raise ppo.decisions or lower ppo.minibatch."
        )
