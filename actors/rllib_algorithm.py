"""RLlib's PPO over routing environments, set up: what its env runners and its learner are, and where they run."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from actors.placement import bundle_options
from actors.rollout import worker_bundle
from actors.waiting import wait_for
from roro_ray.config import Config
from roro_ray.engines.protocol import Engine
from roro_ray.placement import Bundle, role_bundle
from roro_ray.types import Query

MakePool = Callable[[Config, Sequence[Engine]], Any]
_ENV = "roro_routing"
_ADVICE = ("ray.rllib", "ray.tune", "ray._common.deprecation")  # loggers that speak to RLlib's own users


def make_engine_pool(config: Config, engines: Sequence[Engine]) -> Any:
    """The pool of one env runner: with its own engines, or with `engines` where they live in actors of their own."""
    from roro_ray.engines.pool import EnginePool, make_pool

    return EnginePool(engines) if engines else make_pool(config.pool)


def make_env(settings: dict[str, Any]) -> Any:
    """What RLlib calls in every env runner: `settings` is what `make_algorithm` gives it, and `num_envs`."""
    from roro_ray.data.scoring import AnswerScorer
    from roro_ray.routing.gym_env import RoutingVectorEnv
    from roro_ray.routing.gym_world import RoutingWorld

    config: Config = settings["config"]
    pieces, vocabulary = load_pieces(config)
    world = RoutingWorld(
        settings["make_pool"](config, settings["engines"]),
        settings["queries"],
        config.episode,
        config.router,
        pieces,
        vocabulary,
        config.ppo.text_tokens,
        AnswerScorer.from_config(config.data),
    )
    return RoutingVectorEnv(world, settings["num_envs"])


def load_pieces(config: Config) -> tuple[Any, int]:
    """The router's tokenizer and the size of its vocabulary; (None, 0) for a router of scalar signals only."""
    from roro_ray.routing.router import EncoderBase, PieceTokenizer, load_encoder

    router = config.router
    if not router.encoder:
        return None, 0
    body, tokenizer = load_encoder(EncoderBase(router.encoder, router.encoder_revision, router.encoder_dtype, 0))
    return PieceTokenizer(tokenizer), int(body.config.vocab_size)


def make_algorithm(
    config: Config, queries: Sequence[Query], engines: Sequence[Engine], make_pool: MakePool, seed: int
) -> Any:
    """RLlib's PPO, built: env runners as Ray actors, the learner in this process unless `ppo.learners` says otherwise.

    Args:
        seed: of the env runners' episodes; a training that goes on takes another one, so as not to repeat its first.

    Raises:
        EngineError: a model could not be loaded.
    """
    import ray
    from ray.tune.registry import register_env

    runner = worker_bundle(config)
    for name in _ADVICE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if runner.labels:
        warnings.warn("ray.labels is ignored for RLlib's env runners, which take resources alone", stacklevel=2)
    register_env(_ENV, make_env)
    settings = {"config": config, "queries": tuple(queries), "engines": tuple(engines), "make_pool": make_pool}
    made = _set_up(config, settings).debugging(seed=seed, log_level="ERROR")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return made.build_algo()
    except IndexError:  # what RLlib makes of env runners that could not be made; its cause is in their logs alone
        trial = ray.remote(_try_pool).options(**bundle_options(runner)).remote(config, engines, make_pool)
        wait_for(trial, "the models of an env runner", config.ray.timeout_s)
        raise


def _set_up(config: Config, env_settings: dict[str, Any]) -> Any:
    """The algorithm's settings: where things run, and how failures are met."""
    import gymnasium as gym
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec

    from actors.rllib_module import EpisodeSums, RouterLearner, RouterModule
    from roro_ray.routing.gym_world import make_observation_space

    runner, learner, learners = worker_bundle(config), learner_bundle(config), config.ppo.learners
    vocabulary = load_pieces(config)[1]
    return (
        _set_up_learning(config)
        .environment(
            _ENV,
            env_config=env_settings,
            observation_space=make_observation_space(
                vocabulary, config.ppo.text_tokens, config.router.cost_weight_high
            ),
            action_space=gym.spaces.Discrete(len(config.pool.models)),
            disable_env_checking=True,
        )
        .env_runners(
            num_env_runners=config.ray.workers,
            num_envs_per_env_runner=config.ppo.envs,
            gym_env_vectorize_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT,
            num_cpus_per_env_runner=runner.resources["CPU"],
            num_gpus_per_env_runner=runner.resources.get("GPU", 0),
            custom_resources_per_env_runner=_custom(runner),
            sample_timeout_s=config.episode.timeout_s + config.ray.timeout_s,  # a runner that came back loads first
        )
        .learners(
            learner_class=RouterLearner,
            num_learners=learners,
            num_cpus_per_learner=learner.resources["CPU"],
            num_gpus_per_learner=learner.resources.get("GPU", 0) if learners else 0,
            custom_resources_per_learner=_custom(learner),
        )
        .rl_module(rl_module_spec=RLModuleSpec(module_class=RouterModule, model_config={"config": config}))
        .callbacks(EpisodeSums)
        .fault_tolerance(
            restart_failed_env_runners=True,
            delay_between_env_runner_restarts_s=1.0,
            env_runner_health_probe_timeout_s=config.ray.timeout_s,
            env_runner_restore_timeout_s=config.ray.timeout_s,
        )
        .reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=0)
    )


def _set_up_learning(config: Config) -> Any:
    """The algorithm's settings: PPO itself."""
    from ray.rllib.algorithms.ppo import PPOConfig

    ppo, learners = config.ppo, max(config.ppo.learners, 1)
    return PPOConfig().training(
        train_batch_size_per_learner=-(-ppo.decisions // learners),
        minibatch_size=-(-ppo.minibatch // learners),
        num_epochs=ppo.epochs,
        lr=ppo.head_lr,  # RLlib wants one; the learner's own rates count
        gamma=1.0,
        lambda_=ppo.gae_lambda,
        clip_param=ppo.clip,
        entropy_coeff=ppo.entropy,
        use_kl_loss=False,
        vf_clip_param=float("inf"),
        vf_loss_coeff=ppo.value_weight,
        grad_clip=config.router.grad_clip,
        grad_clip_by="global_norm",
    )


def _try_pool(config: Config, engines: Sequence[Engine], make_pool: MakePool) -> None:
    """Load an env runner's models, to raise what keeps them from it."""
    asyncio.run(make_pool(config, engines).ready())


def learner_bundle(config: Config) -> Bundle:
    """What one learner process asks of its node."""
    return role_bundle(config, "learner", config.ray.learner_cpus, config.ray.learner_gpus)


def _custom(bundle: Bundle) -> dict[str, float]:
    return {name: amount for name, amount in bundle.resources.items() if name not in ("CPU", "GPU")}
