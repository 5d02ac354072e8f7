"""Routing as Gymnasium environments: the same episodes as everywhere else, seen and steered from outside."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Sequence
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from roro_ray.config import STEP_DELIMITER, Config, RouterConfig
from roro_ray.engines.pool import EnginePool, make_pool
from roro_ray.errors import ConfigError, EngineError
from roro_ray.reward.combine import combine_reward
from roro_ray.routing.episode import EpisodeSpec, run_episode
from roro_ray.routing.gym_env import RoutingEnv, RoutingVectorEnv, spread_seed
from roro_ray.routing.gym_world import RoutingWorld
from roro_ray.routing.observation import FEATURE_NAMES, scale_cost_weight
from roro_ray.routing.policies import ScriptPolicy, make_policy
from roro_ray.routing.router import PieceTokenizer, RouterNetwork, make_router
from roro_ray.types import Peek
from roro_ray.world.tasks import make_queries
from tests.fakes import ScriptedEngine
from tests.scripted_world import make_engines, make_scripted_queries

PEEKS = tuple(peek.value for peek in Peek)


def make_world(peek: str = "none", pool: EnginePool | None = None, **more: object) -> RoutingWorld:
    """Four scripted steps, of which the second needs the large model; no text."""
    config = Config()
    pool = pool or EnginePool(make_engines())
    return RoutingWorld(pool, make_scripted_queries(), config.episode, RouterConfig(peek=peek), **more)


def play(env: RoutingEnv, actions: Sequence[int]) -> tuple[list[dict], list[float], dict]:
    """Act until the episode is over: what was seen on the way, the rewards, and the last info."""
    seen, rewards = [], []
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        seen.append(observation)
        rewards.append(reward)
        if terminated or truncated:
            return seen, rewards, info
    raise AssertionError("more steps than actions")


@pytest.fixture(scope="module")
def network() -> RouterNetwork:
    return make_router(RouterConfig(), 2)


@pytest.fixture(scope="module")
def embedded(network: RouterNetwork) -> RoutingWorld:
    """The embedded world's own models, with the router's text."""
    config = Config()
    queries = make_queries("chain", "train", 6, 0)
    pieces = PieceTokenizer(network.tokenizer)
    size = int(network.body.config.vocab_size)
    return RoutingWorld(make_pool(config.pool), queries, config.episode, config.router, pieces, size, 256)


@pytest.mark.parametrize("peek", PEEKS)
@pytest.mark.filterwarnings("ignore:.*Not able to test alternative render modes.*")
@pytest.mark.filterwarnings("error::UserWarning")
def test_the_checker_of_gymnasium_finds_nothing(peek: str) -> None:
    env = RoutingEnv(make_world(peek))
    check_env(env)
    assert env.reset(seed=3)[0]["signals"][FEATURE_NAMES.index("has_peek")] == float(peek != "none")
    env.close()


@pytest.mark.filterwarnings("ignore:.*Not able to test alternative render modes.*")
def test_the_checker_finds_nothing_in_the_embedded_world_with_text(embedded: RoutingWorld) -> None:
    env = RoutingEnv(embedded)
    check_env(env)
    env.close()


@pytest.mark.parametrize("peek", PEEKS)
def test_an_episode_is_the_one_that_the_loop_runs(peek: str) -> None:
    world, actions = make_world(peek), (1, 0, 1, 0)
    env = RoutingEnv(world)
    env.reset(options={"query": "scripted/3", "cost_weight": 0.3, "seed": 11})
    _, rewards, info = play(env, actions)
    query = world.queries[3]
    policy = type("PeekingScript", (ScriptPolicy,), {"peek": Peek(peek)})(actions)
    spec = EpisodeSpec("step/scripted/3/11", query, "step", 11, 0.3)
    pool = EnginePool(make_engines())
    asyncio.run(pool.ready())
    expected = asyncio.run(run_episode(spec, pool, policy, world.episode))
    assert info["trajectory"] == expected
    assert rewards == [0.0, 0.0, 0.0, combine_reward(expected, None, 0.3, beta=0.0)]
    assert expected.correct is False
    assert rewards[-1] == pytest.approx(0.0 - 0.3 * 0.5)
    env.close()


def test_an_episode_of_the_embedded_world_is_the_one_that_the_loop_runs(embedded: RoutingWorld) -> None:
    env = RoutingEnv(embedded)
    env.reset(options={"query": embedded.queries[2].id, "cost_weight": 0.2, "seed": 5})
    _, rewards, info = play(env, (0, 1) * 8)
    pool = make_pool(Config().pool)
    asyncio.run(pool.ready())
    spec = EpisodeSpec(info["trajectory"].id, embedded.queries[2], "step", 5, 0.2)
    policy = make_policy(f"script:{','.join(['0,1'] * 8)}", pool)
    expected = asyncio.run(run_episode(spec, pool, policy, embedded.episode))
    assert [(step.text, step.model, step.features) for step in info["trajectory"].steps] == [
        (step.text, step.model, step.features) for step in expected.steps
    ]
    assert info["trajectory"].usage == expected.usage
    assert rewards[-1] == combine_reward(expected, None, 0.2, beta=0.0)
    env.close()


def test_what_is_seen_is_what_the_router_reads(embedded: RoutingWorld, network: RouterNetwork) -> None:
    env = RoutingEnv(embedded)
    first, _ = env.reset(seed=1)
    seen, _, info = play(env, (0,) * 16)
    trajectory = info["trajectory"]
    query = next(query for query in embedded.queries if query.id == trajectory.query_id)
    for index, (observation, step) in enumerate(zip([first, *seen], trajectory.steps, strict=False)):
        np.testing.assert_array_equal(observation["signals"], np.asarray(step.features, dtype=np.float32))
        texts = [query.text, *(before.text for before in trajectory.steps[:index])]
        ids = [token for text in texts for token in network.pieces.encode(text + STEP_DELIMITER)]
        assert observation["text"][: int(observation["length"][0])].tolist() == ids
        assert not observation["text"][len(ids) :].any()
    env.close()


def test_a_seed_fixes_everything_that_is_drawn() -> None:
    def draw(seed: int) -> tuple[str, list[float]]:
        env = RoutingEnv(make_world())
        observation, info = env.reset(seed=seed)
        second, _ = env.reset()
        env.close()
        return info["query"], [*observation["signals"].tolist(), *second["signals"].tolist()]

    assert draw(7) == draw(7)
    assert len({draw(seed)[0] for seed in range(20)}) > 5
    weights = np.asarray([draw(seed)[1][0] for seed in range(200)])
    low, high = (scale_cost_weight(weight) for weight in (RouterConfig().cost_weight_low, 0.6))
    assert weights.min() >= low - 1e-6 and weights.max() <= high + 1e-6
    # Log-uniform: even on the scale of the signal.
    assert np.abs(np.histogram(weights, 4, (low, high))[0] - 50).max() < 25


def test_many_side_by_side_are_the_same_one_by_one() -> None:
    many, count = RoutingVectorEnv(make_world("step"), 5), 5
    random = np.random.default_rng(0)
    observations, _ = many.reset(seed=4)
    singles = [RoutingEnv(make_world("step")) for _ in range(count)]
    own = [env.reset(seed=spread_seed(4, index))[0] for index, env in enumerate(singles)]
    over = [False] * count
    ended = 0
    for _ in range(12):
        for index in range(count):
            np.testing.assert_array_equal(observations["signals"][index], own[index]["signals"])
        actions = random.integers(0, 2, count)
        observations, rewards, terminated, truncated, infos = many.step(actions)
        for index, env in enumerate(singles):
            if over[index]:
                own[index], over[index] = env.reset()[0], False
                assert rewards[index] == 0 and not terminated[index]
                continue
            own[index], reward, done, cut, info = env.step(int(actions[index]))
            assert (rewards[index], terminated[index], truncated[index]) == (reward, done, cut)
            over[index] = done
            if done:
                ended += 1
                assert infos["trajectory"][index] == info["trajectory"]
    assert ended >= 10
    many.close()


def test_many_side_by_side_ask_a_model_at_once() -> None:
    class Counting(ScriptedEngine):
        """Counts how many ask at a time."""

        most = 0

        async def _behave(self, prefix: str) -> None:
            Counting.most = max(Counting.most, self.active)
            await super()._behave(prefix)

    env = RoutingVectorEnv(make_world(pool=EnginePool([Counting("small"), Counting("large", parameters=100)])), 8)
    env.reset(seed=0)
    env.step(np.zeros(8, dtype=np.int64))
    assert Counting.most == 8
    env.close()


def test_a_failed_episode_is_cut_short_and_has_no_reward() -> None:
    engines = make_engines()
    engines[1].fails = lambda prefix: True
    env = RoutingEnv(make_world(pool=EnginePool(engines)))
    before, _ = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(1)
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert "told to fail" in info["failure"] and "trajectory" not in info
    np.testing.assert_array_equal(observation["signals"], before["signals"])
    env.reset()
    assert env.step(0)[3] is False
    env.close()


def test_an_episode_that_nobody_can_score_is_no_zero() -> None:
    world = make_world()
    queries = [
        type(query)(query.id, query.suite, query.split, query.text, query.answer, "math") for query in world.queries
    ]
    env = RoutingEnv(RoutingWorld(world.pool, queries, world.episode, world.router))
    env.reset(seed=0)
    _, rewards, info = play(env, (0,) * 4)
    assert rewards[-1] == 0.0 and info["trajectory"].correct is None
    assert "grades" in info["failure"]
    env.close()


def test_a_hanging_model_ends_the_episode_at_the_deadline() -> None:
    engines = make_engines()
    engines[1].hangs = lambda prefix: True
    world = make_world(pool=EnginePool(engines))
    world.episode.timeout_s = 0.05
    env = RoutingEnv(world)
    env.reset(seed=0)
    _, _, terminated, truncated, info = env.step(1)
    assert truncated and not terminated and "episode.timeout_s" in info["failure"]
    env.close()


def test_models_that_fail_at_every_beginning_are_an_error() -> None:
    engines = make_engines()
    engines[0].fails = lambda prefix: True
    env = RoutingEnv(make_world("step", pool=EnginePool(engines)))
    with pytest.raises(EngineError, match=r"5 episodes in a row.*told to fail.*doctor"):
        env.reset(seed=0)
    env.close()


def test_a_text_that_does_not_fit_names_the_setting(embedded: RoutingWorld) -> None:
    env = RoutingEnv(replace(embedded, text_tokens=8))
    with pytest.raises(EngineError, match=r"ppo\.text_tokens"):
        env.reset(seed=0)
    env.close()


def test_wrong_queries_are_named() -> None:
    env = RoutingEnv(make_world())
    with pytest.raises(ConfigError, match="'nowhere'"):
        env.reset(options={"query": "nowhere"})
    env.close()
    with pytest.raises(ConfigError, match=r"data\.router_queries"):
        RoutingWorld(EnginePool(make_engines()), [], Config().episode, RouterConfig())


def test_spaces_pickle_and_hold_what_is_seen(embedded: RoutingWorld) -> None:
    space = pickle.loads(pickle.dumps(embedded.observation_space))
    env = RoutingEnv(embedded)
    observation, _ = env.reset(seed=0)
    assert space.contains(observation)
    seen, _, _ = play(env, (1,) * 16)
    assert all(space.contains(each) for each in seen)
    assert isinstance(env.action_space, gym.spaces.Discrete) and env.action_space.n == 2
    env.close()
