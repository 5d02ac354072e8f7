"""The router network, its batches and its policy, with a tiny untrained encoder."""

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import ScriptedEngine, make_fake_pool, make_query, run_specs, write_notes

from roro_ray.config import EpisodeConfig, RouterConfig
from roro_ray.errors import CheckpointError, ConfigError, DataError
from roro_ray.routing.episode import EpisodeFailure, EpisodeSpec
from roro_ray.routing.observation import FEATURE_NAMES, Observation, make_features
from roro_ray.routing.router import PieceTokenizer, RouterNetwork, make_router
from roro_ray.routing.router_batch import encode_trajectories, score_decisions
from roro_ray.routing.router_files import load_router, save_router
from roro_ray.routing.router_policy import RouterPolicy
from roro_ray.routing.runner import Runner
from roro_ray.types import Peek, Trajectory
from roro_ray.world.corpus import CorpusSpec
from roro_ray.world.models import ModelSpec, make_model
from roro_ray.world.tokenizer import make_tokenizer

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    path = tmp_path_factory.mktemp("encoder")
    make_model(ModelSpec("qwen3", 16, 2, 2, 32, CorpusSpec(), 0, 0.0), tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make_network(encoder: str, pool_size: int = 2, scale: float = 1.0, **options: object) -> RouterNetwork:
    """A router whose head is as large as a trained one's, so that decisions depend on text and features."""
    torch.manual_seed(1)
    network = make_router(RouterConfig(encoder=encoder, **options), pool_size)  # type: ignore[arg-type]
    with torch.no_grad():
        network.head[-1].weight.normal_(std=scale)
    return network


def roll_out(
    policy: RouterPolicy, count: int = 12, strategy: str = "router", concurrency: int = 256, pool_size: int = 2
) -> list[Trajectory]:
    engines = [
        ScriptedEngine(f"m{i}", write_notes(3 + i), parameters=10 ** (i + 1), confidence=lambda p: len(p) % 7 / 8 + 0.1)
        for i in range(pool_size)
    ]
    runner = Runner(make_fake_pool(*engines), policy, EpisodeConfig(), concurrency)
    queries = queries_of(count).values()
    return run_specs(runner, [EpisodeSpec(f"e{i}", query, strategy, i, 0.1 * i) for i, query in enumerate(queries)])


def queries_of(count: int = 12) -> dict:
    queries = [make_query(name="q" * (i + 1)) for i in range(count)]
    return {query.id: query for query in queries}


@pytest.mark.parametrize("peek", list(Peek))
@pytest.mark.parametrize("pool_size", [2, 3])
def test_one_pass_over_finished_trajectories_equals_the_decisions_step_by_step(
    encoder: str, peek: Peek, pool_size: int
) -> None:
    network = make_network(encoder, pool_size, peek=peek.value)
    trajectories = roll_out(RouterPolicy(network, 3), pool_size=pool_size)
    batch = encode_trajectories(network, queries_of(), trajectories)
    with torch.no_grad():
        logits_BDN = network(batch.ids_BT, batch.mask_BT, batch.boundaries_BD, batch.features_BDF)
    log_probs_BDN = torch.log_softmax(logits_BDN, -1)
    for row, trajectory in enumerate(trajectories):
        for index, step in enumerate(trajectory.steps):
            taken = torch.tensor(step.decision.probabilities).log()
            assert torch.allclose(log_probs_BDN[row, index], taken, atol=1e-5)
            assert math.isclose(step.decision.log_prob, math.log(step.decision.probabilities[step.model]), abs_tol=1e-6)
            assert step.decision.version == 3 and (step.features[-1] == 1.0) is (peek != Peek.NONE)
    taken_BD, entropy_BD = score_decisions(network, batch)
    assert torch.allclose(taken_BD.detach(), batch.old_log_probs_BD, atol=1e-5)
    assert (entropy_BD[batch.decision_mask_BD] > 0).all() and (entropy_BD[~batch.decision_mask_BD] == 0).all()
    odds = (log_probs_BDN[..., -1] - log_probs_BDN[..., 0])[batch.decision_mask_BD]
    assert odds.max() - odds.min() > 0.5  # else the agreement above would say little


def test_a_decision_depends_on_the_text_and_on_the_features(encoder: str) -> None:
    network = make_network(encoder)
    ids_BT = torch.tensor([[5, 6, 7], [5, 9, 7], [5, 6, 7]])
    features_BDF = torch.zeros(3, 1, len(FEATURE_NAMES))
    features_BDF[2, 0, 0] = 1.0
    logits = network(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), torch.full((3, 1), 2), features_BDF)[:, 0]
    assert not torch.allclose(logits[0], logits[1], atol=1e-4) and not torch.allclose(logits[0], logits[2], atol=1e-4)


def test_what_comes_later_and_padding_change_nothing(encoder: str) -> None:
    network = make_network(encoder)
    trajectories = roll_out(RouterPolicy(network), 70)[::-1]  # more than one pass of the encoder reads
    batch = encode_trajectories(network, queries_of(70), trajectories)
    together, _ = score_decisions(network, batch)
    for row in range(0, 70, 9):
        alone, _ = score_decisions(network, encode_trajectories(network, queries_of(70), trajectories[row : row + 1]))
        assert torch.allclose(alone[0], together[row, : alone.shape[1]], atol=1e-5)
    texts = batch.ids_BT, batch.ids_BT.clone()
    texts[1][:, batch.boundaries_BD[0, 1] + 1 :] = 7
    before, after = (network(ids, batch.mask_BT, batch.boundaries_BD, batch.features_BDF)[0] for ids in texts)
    assert torch.allclose(before[:2], after[:2], atol=1e-5) and not torch.allclose(before[2], after[2], atol=1e-3)


def test_the_batch_by_hand(encoder: str) -> None:
    network = make_network(encoder)
    trajectories = roll_out(RouterPolicy(network, 7), 3)
    batch = encode_trajectories(network, list(queries_of(3).values()), trajectories)
    for row, trajectory in enumerate(trajectories):
        steps = trajectory.steps
        parts = queries_of()[trajectory.query_id].text, *(step.text for step in steps[:-1])
        text = "".join(f"{part}\n\n" for part in parts)
        ids = network.tokenizer(text)["input_ids"]
        assert batch.ids_BT[row, : len(ids)].tolist() == ids and batch.mask_BT[row].sum() == len(ids)
        ends = [i for i, token in enumerate(ids) if token == network.tokenizer.encode("\n\n")[0]]
        assert batch.boundaries_BD[row].tolist() == ends + [-1] * (batch.boundaries_BD.shape[1] - len(steps))
        assert batch.actions_BD[row, : len(steps)].tolist() == [step.model for step in steps]
        assert batch.decision_mask_BD[row].sum() == len(steps)
        assert batch.versions_BD[row, : len(steps)].tolist() == [7] * len(steps)
    part = batch.select(torch.tensor([2, 0]))
    assert len(part) == 2 and part.mask_BT.sum() == batch.mask_BT[[2, 0]].sum()
    scores_B = score_decisions(network, batch)[0].sum(1)
    assert torch.allclose(score_decisions(network, part)[0].sum(1), scores_B[[2, 0]], atol=1e-5)


def test_the_prior_before_training(encoder: str) -> None:
    for pool_size in (2, 4):
        torch.manual_seed(0)
        network = make_router(RouterConfig(encoder=encoder, prior=0.2), pool_size)
        steps = [step for t in roll_out(RouterPolicy(network), pool_size=pool_size) for step in t.steps]
        for step in steps:
            assert step.decision.probabilities[0] == pytest.approx(0.8, abs=0.05)
            assert step.decision.probabilities[1:] == pytest.approx([0.2 / (pool_size - 1)] * (pool_size - 1), abs=0.05)


def test_going_on_from_a_prefix_is_the_whole_episode(encoder: str) -> None:
    policy = RouterPolicy(make_network(encoder, scale=0.1, peek="step"), 4)
    engines = ScriptedEngine("small"), ScriptedEngine("large", parameters=100)
    runner = Runner(make_fake_pool(*engines), policy, EpisodeConfig())
    wholes = run_specs(runner, [EpisodeSpec("e", make_query(), "router", seed, 0.2) for seed in range(6)])
    assert len({whole.models for whole in wholes}) > 2
    for seed, whole in enumerate(wholes):
        specs = [EpisodeSpec("e", make_query(), "router", seed, 0.2, whole.steps[:n]) for n in range(len(whole.steps))]
        for result in run_specs(runner, specs):
            assert (result.models, result.usage) == (whole.models, whole.usage)


def test_sampling_follows_the_probabilities_and_greedy_takes_the_likeliest(encoder: str) -> None:
    policy = RouterPolicy(make_network(encoder, 3, scale=3.0))
    query = make_query()
    features = make_features((), 0.2, 3)

    async def decide(policy: RouterPolicy, count: int) -> list:
        observations = [Observation(query, "Say q.\n\n", (), 0.2, 3, None, seed, features) for seed in range(count)]
        return await asyncio.gather(*(policy.decide(observation) for observation in observations))

    decisions = asyncio.run(decide(policy, 4000))
    probabilities = decisions[0].probabilities
    for model, probability in enumerate(probabilities):
        share = sum(decision.model == model for decision in decisions) / 4000
        assert abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / 4000) + 1e-9
    greedy = asyncio.run(decide(policy.as_greedy(), 3))
    assert {decision.model for decision in greedy} == {probabilities.index(max(probabilities))}
    assert {decision.log_prob for decision in greedy} == {0.0}
    assert greedy[0].probabilities == pytest.approx(probabilities, abs=1e-6)


def test_concurrency_does_not_change_what_the_router_does(encoder: str) -> None:
    network = make_network(encoder)
    alone = roll_out(RouterPolicy(network), 40, concurrency=1)
    together = roll_out(RouterPolicy(network), 40)
    assert [t.models for t in alone] == [t.models for t in together] and len({t.models for t in alone}) > 5
    for a, b in zip(alone, together, strict=True):
        assert a.usage == b.usage
        assert [s.decision.log_prob for s in a.steps] == pytest.approx([s.decision.log_prob for s in b.steps], abs=1e-5)


def test_the_router_is_charged_for_each_token_of_the_text_once(encoder: str) -> None:
    network = make_network(encoder)
    trajectory = roll_out(RouterPolicy(network), 1)[0]
    engines = roll_out_script(trajectory)
    tokens = int(encode_trajectories(network, queries_of(), [trajectory]).mask_BT.sum())
    assert network.flops_per_token == 2.0 * sum(p.numel() for p in network.body.parameters())
    assert trajectory.usage.flops - engines.usage.flops == pytest.approx(tokens * network.flops_per_token)
    assert trajectory.usage.flops_decode == engines.usage.flops_decode


def roll_out_script(trajectory: Trajectory) -> Trajectory:
    """The same steps by the same models, without the router."""
    strategy = "script:" + ",".join(str(model) for model in trajectory.models)
    return roll_out(RouterPolicy(make_router(RouterConfig(encoder=""), 2)), 1, strategy)[0]


def test_new_weights_are_used_at_once_however_they_come(encoder: str) -> None:
    network, other = make_network(encoder), make_network(encoder)
    with torch.no_grad():
        for parameter in other.body.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    policy = RouterPolicy(network, 1)
    before = roll_out(policy)
    policy.load(other.state_dict(), 2)
    loaded = roll_out(policy)
    assert {step.decision.version for t in loaded for step in t.steps} == {2}
    assert loaded != before
    fresh = roll_out(RouterPolicy(other, 2))
    assert loaded == fresh
    with torch.no_grad():  # an optimizer's way
        for parameter in network.body.parameters():
            parameter.mul_(0.9)
    batch = encode_trajectories(network, queries_of(), roll_out(policy))
    assert torch.allclose(score_decisions(network, batch)[0].detach(), batch.old_log_probs_BD, atol=1e-5)


def test_a_router_without_encoder_decides_by_the_features_alone() -> None:
    network = make_network("")
    assert network.flops_per_token == 0.0
    trajectories = roll_out(RouterPolicy(network))
    batch = encode_trajectories(network, queries_of(), trajectories)
    taken_BD, _ = score_decisions(network, batch)
    assert torch.allclose(taken_BD.detach(), batch.old_log_probs_BD, atol=1e-5)


def test_training_reaches_every_weight_and_learns_what_the_text_says(encoder: str) -> None:
    """Escalate exactly where the text so far ends in note 1: a known optimum, from the text alone."""
    torch.manual_seed(0)
    network = make_router(RouterConfig(encoder=encoder), 2)
    trajectories = roll_out(RouterPolicy(network), 24)
    batch = encode_trajectories(network, queries_of(24), trajectories)
    wanted_BD = torch.zeros_like(batch.actions_BD)
    for row, trajectory in enumerate(trajectories):
        for index in range(1, len(trajectory.steps)):
            wanted_BD[row, index] = int(trajectory.steps[index - 1].text.endswith("note 1"))
    features_BDF = torch.zeros_like(batch.features_BDF)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for update in range(60):
        logits_BDN = network(batch.ids_BT, batch.mask_BT, batch.boundaries_BD, features_BDF)
        loss = torch.nn.functional.cross_entropy(logits_BDN[batch.decision_mask_BD], wanted_BD[batch.decision_mask_BD])
        optimizer.zero_grad()
        loss.backward()
        if update == 1:
            assert all(parameter.grad is not None for parameter in network.parameters())
        optimizer.step()
    assert loss.item() < 0.05


def test_saving_and_loading(encoder: str, tmp_path: Path) -> None:
    for source in (encoder, ""):
        network = make_network(source, 3, peek="step", hidden=8)
        saved = save_router(network, tmp_path / "router", version=5)
        loaded = load_router(saved, pool_size=3)
        assert (loaded.version, loaded.peek, loaded.pool_size) == (5, Peek.STEP, 3)
        assert roll_out(RouterPolicy(loaded), 4, pool_size=3) == roll_out(RouterPolicy(network, 5), 4, pool_size=3)


def test_a_damaged_or_foreign_checkpoint_is_refused(encoder: str, tmp_path: Path) -> None:
    network = make_network(encoder)
    with pytest.raises(CheckpointError, match="train a router first"):
        load_router(tmp_path / "nothing")
    saved = save_router(network, tmp_path / "router")
    with pytest.raises(CheckpointError, match="2 models and the pool has 3"):
        load_router(saved, pool_size=3)
    weights = saved / "router.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        load_router(saved)
    weights.write_bytes(whole)
    facts = json.loads((saved / "router.json").read_text())
    for change, message in (
        ({"hidden": 9}, r"head\.0\.weight is \[64, 27\], expected \[9, 27\]"),
        ({"features": ["cost_weight"]}, "train anew"),
    ):
        (saved / "router.json").write_text(json.dumps(facts | change))
        with pytest.raises(CheckpointError, match=message):
            load_router(saved)
    (saved / "router.json").write_text("{")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_router(saved)


def test_weights_of_another_shape_leave_the_policy_as_it_was(encoder: str) -> None:
    policy = RouterPolicy(make_network(encoder), 1)
    before = roll_out(policy)
    with pytest.raises(CheckpointError, match=r"router\.hidden"):
        policy.load(make_network(encoder, hidden=7).state_dict(), 2)
    with pytest.raises(CheckpointError, match="is missing"):
        policy.load(make_network("").state_dict(), 2)
    assert policy.version == 1 and roll_out(policy) == before


def test_diverged_weights_fail_the_episodes_instead_of_deciding(encoder: str) -> None:
    network = make_network(encoder)
    with torch.no_grad():
        network.head[0].weight.fill_(torch.nan)
    results = roll_out(RouterPolicy(network, 6), 3)
    assert all(isinstance(result, EpisodeFailure) and "version 6 give no prob" in result.error for result in results)


@pytest.mark.parametrize(
    ("options", "pool_size", "message"),
    [
        ({}, 1, "at least 2 models"),
        ({"prior": 1.0}, 2, "strictly between 0 and 1"),
        ({"hidden": 0}, 2, "at least 1"),
        ({"peek": "first"}, 2, "did you mean 'first_token'"),
        ({"encoder": "world:encoderr"}, 2, "did you mean 'world:encoder'"),
        ({"encoder": "/nowhere"}, 2, "Hugging Face format"),
    ],
)
def test_a_wrong_router_config_is_refused(options: dict, pool_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_router(RouterConfig(**({"encoder": ""} | options)), pool_size)


def test_trajectories_that_cannot_be_learned_from_are_refused(encoder: str) -> None:
    network = make_network(encoder)
    trajectory = roll_out(RouterPolicy(network), 1)[0]
    with pytest.raises(DataError, match="not among the 0 given"):
        encode_trajectories(network, {}, [trajectory])
    empty = encode_trajectories(network, {}, [])
    assert len(empty) == 0 and score_decisions(network, empty)[0].numel() == 0
    with pytest.raises(DataError, match="has no steps"):
        encode_trajectories(network, queries_of(), [replace(trajectory, steps=())])
    bare = replace(trajectory, steps=(replace(trajectory.steps[0], features=()),))
    with pytest.raises(DataError, match="got 0 features"):
        encode_trajectories(network, queries_of(), [bare])


def test_pieces_are_tokenised_apart_so_that_prefixes_stay_prefixes() -> None:
    tokenizer = make_tokenizer()
    pieces = PieceTokenizer(tokenizer)
    first, second = "ends with -", " 3\n\n"  # " - " is one token of the whole text, across the border of the pieces
    whole = tokenizer(first + second)["input_ids"]
    assert list(pieces.encode(first) + pieces.encode(second)) != whole
    assert pieces.encode(first) == pieces.encode(first)
    assert tokenizer.decode(pieces.encode(first) + pieces.encode(second)) == first + second
