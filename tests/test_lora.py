"""LoRA adapters on one base: updates equal to unpacked ones, files that peft reads, resumption, proof of learning."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from test_sequences import make_tiny_model as make_untrained
from tiny_models import make_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from roro_ray.config import LoraConfig
from roro_ray.errors import CheckpointError, ConfigError, TrainingError
from roro_ray.learning.adapter_files import AdapterVersion, read_adapter, write_adapter
from roro_ray.learning.checkpoints import list_checkpoints
from roro_ray.learning.grpo import make_advantages
from roro_ray.learning.lm_run import LocalLearner
from roro_ray.learning.lm_training import LoraTrainer
from roro_ray.learning.lora import choose_attention, load_base
from roro_ray.learning.sampling import sample_completions
from roro_ray.learning.sequences import Completion, TokenBatch, make_token_batch
from roro_ray.learning.sft import SftBatch, make_sft_batch, sft_loss
from roro_ray.learning.updates import UpdateSettings, update_model
from roro_ray.settings import load_config
from roro_ray.world.tokenizer import make_tokenizer

pytestmark = pytest.mark.timeout(60)
VOCABULARY = 300
SETTINGS = UpdateSettings(max_length=16, entropy_weight=0.02, grad_clip=1e9)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("base")))


def make_config(base: str, **changes: object) -> LoraConfig:
    config = LoraConfig(base=base, dtype="float32", rank=4, alpha=8.0, token_budget=40, logits_chunk=8)
    config.sft_lr = config.rubricor_lr = config.judge_lr = 0.01
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def draw_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def make_texts(*lengths: int, seed: int = 0) -> SftBatch:
    ids = draw_ids(*(lengths or (20, 30, 12, 9)), seed=seed)
    return make_sft_batch(ids, [[place >= 3 for place in range(len(row))] for row in ids])


def make_samples(*lengths: int, old: float = -6.5, seed: int = 1) -> TokenBatch:
    rows = draw_ids(*(lengths or (20, 30, 12, 9)), seed=seed)
    completions = [
        Completion(i, tuple(r[:3]), tuple(r[3:]), (old,) * (len(r) - 3), "", "stop") for i, r in enumerate(rows)
    ]
    advantages = torch.linspace(-1.0, 1.0, len(rows))
    return make_token_batch(completions, advantages, torch.zeros(len(rows), dtype=torch.long))


def get_gradients(trainer: LoraTrainer, name: str) -> dict[str, Tensor]:
    gradients = {key: parameter.grad for key, parameter in trainer.model.parameters_of(name).items()}
    return {key: gradient for key, gradient in gradients.items() if gradient is not None}


def get_base_weights(trainer: LoraTrainer) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in trainer.model.causal.state_dict().items() if ".lora_" not in k}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def spread_out(trainer: LoraTrainer, name: str) -> None:
    """Give the adapter's second half, which begins at 0, values, so that every gradient is alive."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters_of(name).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


# Packing and checkpointing change no gradient


@pytest.mark.parametrize("normalisation", ["dr_grpo", "group", "dapo"])
def test_a_packed_grpo_update_is_the_unpacked_one(base: str, normalisation: str) -> None:
    trainer = LoraTrainer(make_config(base, dtype="float64"))
    spread_out(trainer, "judge")
    settings = UpdateSettings(16, normalisation, entropy_weight=0.02, kl_weight=0.1, grad_clip=1e9)
    batch = make_samples()
    trainer.model.activate("judge")
    reference = load_base(trainer.config)
    expected = update_model(trainer.model.causal.eval(), [], batch, settings, reference)
    wanted = {key: value.clone() for key, value in get_gradients(trainer, "judge").items()}
    trainer.model.causal.train()
    got = trainer.grpo("judge", batch, settings)
    gradients = get_gradients(trainer, "judge")
    assert got["passes"] == 2 and gradients.keys() == wanted.keys() and len(wanted) == 28
    assert all(torch.allclose(gradients[key], wanted[key], atol=1e-6, rtol=1e-6) for key in wanted)
    assert max(float(value.abs().max()) for value in wanted.values()) > 1e-3
    for name in expected:
        assert got[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
    assert got["kl"] > 1e-3  # the reference is the base without the adapter


def test_a_packed_sft_update_is_the_unpacked_one(base: str) -> None:
    trainer = LoraTrainer(make_config(base, dtype="float64", grad_clip=1e9))
    spread_out(trainer, "rubricor")
    batch = make_texts()
    trainer.model.activate("rubricor")
    loss = sft_loss(trainer.model.causal.eval(), batch)
    loss.backward()
    expected = float(loss.detach())
    wanted = {key: value.clone() for key, value in get_gradients(trainer, "rubricor").items()}
    trainer.model.causal.train()
    got = trainer.sft("rubricor", batch)
    gradients = get_gradients(trainer, "rubricor")
    assert got["loss"] == pytest.approx(expected, abs=1e-6) and got["passes"] == 2 and got["tokens"] == 59
    assert all(torch.allclose(gradients[key], wanted[key], atol=1e-6, rtol=1e-6) for key in wanted)


def test_dropped_rows_and_empty_batches(base: str) -> None:
    trainer = LoraTrainer(make_config(base))
    batch = make_samples()
    batch.action_mask_BT[1] = False
    assert trainer.grpo("judge", batch, SETTINGS)["rows"] == 3
    before = trainer.model.get_state("judge")
    batch.action_mask_BT[:] = False
    assert trainer.grpo("judge", batch, SETTINGS)["empty"] == 1
    assert equal(before, trainer.model.get_state("judge")) and trainer.versions == {"rubricor": 0, "judge": 2}


# One base, several adapters


@pytest.mark.filterwarnings("ignore:The following .* keys did not match")  # peft, of experts that are one tensor
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe", "deepseek_qwen"])
def test_sft_lowers_the_loss_and_touches_one_adapter(tmp_path: Path, family: str, dtype: str) -> None:
    trainer = LoraTrainer(make_config(str(make_tiny_model(tmp_path, family)), dtype=dtype))
    weights, other = get_base_weights(trainer), trainer.model.get_state("rubricor")
    assert trainer.model.causal.dtype == getattr(torch, dtype)
    assert {p.dtype for p in trainer.model.parameters_of("judge").values()} == {torch.float32}
    losses = [trainer.sft("judge", make_texts())["loss"] for _ in range(12)]
    assert losses[-1] < losses[0] - 0.5
    assert equal(weights, get_base_weights(trainer)) and equal(other, trainer.model.get_state("rubricor"))
    assert trainer.versions == {"rubricor": 0, "judge": 12}


def test_grpo_learns_a_trivial_reward(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    make_untrained(tokenizer).save_pretrained(tmp_path)
    trainer = LoraTrainer(make_config(str(tmp_path), token_budget=400, rank=8, rubricor_lr=0.02))
    rewards, groups_B = [], torch.zeros(32, dtype=torch.long)
    for update in range(30):
        trainer.model.activate("rubricor")
        samples = sample_completions(trainer.model.causal, tokenizer, ["Start with 36.\n\n"], 32, 8, seed=update)
        reward_B = torch.tensor([sum(token % 2 == 0 for token in sample.ids) / len(sample.ids) for sample in samples])
        rewards.append(float(reward_B.mean()))
        advantages_B, kept_B = make_advantages(reward_B, groups_B)
        batch = make_token_batch(samples, advantages_B, groups_B).select(kept_B)
        metrics = trainer.grpo("rubricor", batch, UpdateSettings(8))
        assert metrics["ratio"] == pytest.approx(1.0, abs=1e-4)  # the sampler's log-probabilities are the learner's
    assert sum(rewards[:3]) / 3 < 0.6 and sum(rewards[-3:]) / 3 > 0.85


def test_the_same_seed_gives_the_same_adapters(base: str) -> None:
    first, second = (LoraTrainer(make_config(base), seed=3) for _ in range(2))
    assert equal(first.model.get_state("judge"), second.model.get_state("judge"))
    assert not equal(first.model.get_state("judge"), first.model.get_state("rubricor"))
    assert not equal(first.model.get_state("judge"), LoraTrainer(make_config(base), seed=4).model.get_state("judge"))


def test_moments_begin_anew_with_another_objective(base: str) -> None:
    trainer = LoraTrainer(make_config(base))
    trainer.sft("judge", make_texts())
    trainer.sft("judge", make_texts())
    state = trainer.get_state("judge")
    assert {float(value) for key, value in state.moments.items() if key.endswith("/step")} == {2.0}
    trainer.grpo("judge", make_samples(), SETTINGS)
    state = trainer.get_state("judge")
    assert state.objective == "grpo"
    assert {float(value) for key, value in state.moments.items() if key.endswith("/step")} == {1.0}


def test_a_gradient_that_is_not_finite_changes_nothing(base: str) -> None:
    trainer = LoraTrainer(make_config(base))
    before = trainer.model.get_state("judge")
    batch = make_samples()
    batch.advantages_B[0] = math.inf
    with pytest.raises(TrainingError, match="adapter 'judge': the gradient's norm is"):
        trainer.grpo("judge", batch, SETTINGS)
    assert equal(before, trainer.model.get_state("judge")) and trainer.versions["judge"] == 0
    assert trainer.grpo("judge", make_samples(), SETTINGS)["empty"] == 0  # and it goes on


def test_a_sequence_beyond_the_budget_is_an_error_before_anything_is_learned(base: str) -> None:
    trainer = LoraTrainer(make_config(base))
    with pytest.raises(ConfigError, match=r"sequence 1 has 41 tokens, more than the 40 .* lora\.token_budget"):
        trainer.sft("judge", make_texts(20, 41))
    assert trainer.versions["judge"] == 0


# Files


def score(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(draw_ids(12))).logits


def test_a_published_adapter_is_one_of_peft(base: str, tmp_path: Path) -> None:
    learner = LocalLearner(make_config(base), tmp_path / "run")
    learner.sft("judge", [make_texts()] * 3, updates=4)
    published = learner.publish("judge")
    assert published == AdapterVersion("judge", 3, str(tmp_path / "run" / "published" / "judge" / "version_000003"))
    learner.run.trainer.model.activate("judge")
    expected = score(learner.run.trainer.model.causal.eval())
    plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert not torch.allclose(score(plain), expected, atol=1e-3)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), published.path).eval()
    assert torch.allclose(score(loaded), expected, atol=1e-5)
    # And the other way: what peft writes is read.
    loaded.save_pretrained(tmp_path / "peft")
    other = LoraTrainer(make_config(base), seed=9)
    other.model.load_files("judge", tmp_path / "peft")
    assert equal(other.model.get_state("judge"), learner.run.trainer.model.get_state("judge"))


def test_files_of_another_shape_or_scale_are_refused(base: str, tmp_path: Path) -> None:
    path = Path(LocalLearner(make_config(base), tmp_path).publish("judge").path)
    with pytest.raises(CheckpointError, match=r"alpha 8\.0 and rank 4, expected 8\.0 and 2"):
        LoraTrainer(make_config(base, rank=2)).model.load_files("judge", path)
    with pytest.raises(CheckpointError, match=r"does not fit adapter 'judge': .*lora\.target_modules"):
        LoraTrainer(make_config(base, target_modules=["q_proj"])).model.load_files("judge", path)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        LoraTrainer(make_config(base)).model.load_files("judge", tmp_path / "none")


def test_an_adapter_travels_as_bytes_and_damage_is_found(base: str, tmp_path: Path) -> None:
    learner = LocalLearner(make_config(base), tmp_path / "run")
    first = learner.publish("judge")
    learner.sft("judge", [make_texts()], updates=1)
    second = learner.publish("judge")
    arrived = write_adapter(read_adapter(second), tmp_path / "node", "judge", 1)
    assert arrived.path != second.path and read_adapter(arrived) == read_adapter(second)
    weights = Path(second.path) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors has"):
        read_adapter(second)
    files = read_adapter(first)
    files["adapter_config.json"] = b"{}"
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        write_adapter(files, tmp_path / "other", "judge", 0)


# Resumption


def test_a_resumed_training_is_bit_equal_to_a_straight_one(base: str, tmp_path: Path) -> None:
    def learn(learner: LocalLearner, updates: range) -> None:
        for update in updates:
            learner.sft("rubricor", [make_texts(seed=update)], updates=10, start=update)
            learner.grpo("judge", make_samples(seed=update), SETTINGS)

    straight = LocalLearner(make_config(base), tmp_path / "straight")
    learn(straight, range(5))
    config = make_config(base, checkpoint_every=2)
    stopped = LocalLearner(config, tmp_path / "stopped")
    learn(stopped, range(3))
    again = LocalLearner(config, tmp_path / "stopped")
    assert again.versions == {"rubricor": 3, "judge": 3} and again.run.serial == 6
    learn(again, range(3, 5))
    for name in ("rubricor", "judge"):
        one, other = straight.run.trainer.get_state(name), again.run.trainer.get_state(name)
        assert equal(one.weights, other.weights) and equal(one.moments, other.moments)
        assert (one.version, one.objective) == (other.version, other.objective)
    assert len(list_checkpoints(tmp_path / "stopped" / "checkpoints")) == 2


def test_what_was_published_is_in_a_checkpoint(base: str, tmp_path: Path) -> None:
    learner = LocalLearner(make_config(base, checkpoint_every=1000), tmp_path)
    learner.sft("judge", [make_texts()] * 2, updates=2)
    learner.publish("judge")
    learner.sft("judge", [make_texts()] * 2, updates=2)
    assert LocalLearner(make_config(base), tmp_path).versions["judge"] == 2  # the rest was not saved: done again
    learner.stop()
    assert LocalLearner(make_config(base), tmp_path).versions["judge"] == 4


def test_a_checkpoint_of_other_settings_is_refused(base: str, tmp_path: Path) -> None:
    learner = LocalLearner(make_config(base), tmp_path)
    learner.sft("judge", [make_texts()], updates=1)
    learner.stop()
    LocalLearner(make_config(base, workers=2, token_budget=80, judge_lr=0.5), tmp_path)  # these may change
    with pytest.raises(CheckpointError, match=r"lora\.rank: 4 there, 8 now"):
        LocalLearner(make_config(base, rank=8), tmp_path)


def test_batches_are_read_as_they_are_needed(base: str, tmp_path: Path) -> None:
    learner = LocalLearner(make_config(base, sft_updates=3), tmp_path)
    read: list[int] = []

    def make_batches() -> Iterator[SftBatch]:
        for number in range(100):
            assert learner.versions["judge"] == number  # the one before was learned already
            read.append(number)
            yield make_texts(seed=number)

    metrics = learner.sft("judge", make_batches())
    assert len(metrics) == 3 and read == [0, 1, 2] and [row["version"] for row in metrics] == [1, 2, 3]


# Settings


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lora.strategy=ddpp"], "lora.strategy.*did you mean 'ddp'"),
        (["lora.workers=2"], "lora.strategy=single and lora.workers=2 contradict"),
        (["lora.attention=flash_attention_2", "lora.dtype=float32"], "lora.attention=.* and lora.dtype=float32 contra"),
        (["lora.rank=0"], "lora.rank: got 0, expected at least 1"),
        (["lora.judge_lr=0"], "lora.judge_lr: got 0.0, expected more than 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(["lora.base=somewhere", *overrides])


def test_settings_without_a_base_will_be_ignored() -> None:
    with pytest.warns(UserWarning, match=r"lora\.rank=8 will be ignored \(lora\.base is empty"):
        load_config(["lora.rank=8"])


def test_what_does_not_exist_is_named(base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.target_modules=\['q_prj'\] fits no module of Qwen3ForCausalLM"):
        LoraTrainer(make_config(base, target_modules=["q_prj"]))
    with pytest.raises(ConfigError, match=r"lora\.base=.* does not load"):
        LoraTrainer(make_config(str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match=r"no learning rate for adapter 'juge'.*did you mean 'judge'"):
        LoraTrainer(make_config(base), names=["juge"])
    learner = LocalLearner(make_config(base), tmp_path, names=["judge"])
    with pytest.raises(ConfigError, match="no adapter 'rubricor': expected one of judge"):
        learner.publish("rubricor")


def test_attention_is_chosen_by_what_can_run() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_attention("auto", torch.bfloat16, cpu) == "segments"
    assert choose_attention("auto", torch.float32, gpu) == "segments"
    assert choose_attention("flash_attention_2", torch.bfloat16, gpu) == "flash_attention_2"
