"""GRPO: hand-computed values, agreement with TRL's own loss code, invariances."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from roro_ray.errors import ConfigError
from roro_ray.learning.grpo import (
    NORMALISATIONS,
    EmptyBatchWarning,
    LossInputs,
    count_groups,
    make_advantages,
    make_denominator,
    make_loss,
)

pytestmark = pytest.mark.timeout(60)
TRL_NAMES = {"dr_grpo": "dr_grpo", "group": "grpo", "dapo": "dapo"}
MAX_LENGTH = 9


def make_inputs(rows: int = 6, width: int = 7, seed: int = 0, drift: float = 0.5) -> LossInputs:
    """Float64 inputs of unequal lengths whose ratios lie on both sides of the clip borders."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_probs = -draw(rows, width).abs()
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return LossInputs(
        log_probs_BT=log_probs.requires_grad_(),
        old_log_probs_BT=log_probs.detach() + drift * draw(rows, width),
        advantages=draw(rows),
        mask_BT=torch.arange(width) < lengths[:, None],
        entropy_BT=draw(rows, width).abs().requires_grad_(),
        reference_log_probs_BT=log_probs.detach() + drift * draw(rows, width),
        group_ids_B=torch.arange(rows) // 2,
    )


def gradient(inputs: LossInputs, **options) -> torch.Tensor:
    return torch.autograd.grad(make_loss(inputs, **options).loss, inputs.log_probs_BT)[0]


# Hand-computed values


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 10.0, 0.0, 30.0, 0.5, 20.0], dtype=torch.float64)
    groups = torch.tensor([7, -2, 7, -2, 7, -2])  # two interleaved groups
    centred = [0.5, -10.0, -0.5, 10.0, 0.0, 0.0]
    advantages, kept = make_advantages(rewards, groups, "dr_grpo")
    assert advantages.tolist() == pytest.approx(centred)
    assert kept.all()
    for name in ("group", "dapo"):  # sample standard deviations: 0.5 and 10
        advantages, _ = make_advantages(rewards, groups, name)
        expected = [c / ((10 if i % 2 else 0.5) + 1e-4) for i, c in enumerate(centred)]
        assert advantages.tolist() == pytest.approx(expected)


def test_loss_by_hand_on_both_sides_of_both_borders() -> None:
    ratios = torch.tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 0.9]], dtype=torch.float64)
    inputs = LossInputs(
        log_probs_BT=ratios.log().requires_grad_(),
        old_log_probs_BT=torch.zeros(2, 3, dtype=torch.float64),
        advantages=torch.tensor([2.0, -1.0], dtype=torch.float64),
        mask_BT=torch.tensor([[True, True, True], [True, True, False]]),
    )
    # A = 2: min(3, 1.3 x 2), min(1, 0.8 x 2), 2.2; A = -1: min(-1.5, -1.3), min(-0.5, -0.8); the last is padding.
    surrogate = [[2.6, 1.0, 2.2], [-1.5, -0.8]]
    total = -sum(map(sum, surrogate))
    options = {"clip_low": 0.2, "clip_high": 0.3}
    assert make_loss(inputs, normalisation="dr_grpo", max_length=10, **options).loss.item() == pytest.approx(total / 20)
    assert make_loss(inputs, normalisation="dapo", **options).loss.item() == pytest.approx(total / 5)
    by_row = -(sum(surrogate[0]) / 3 + sum(surrogate[1]) / 2) / 2
    output = make_loss(inputs, normalisation="group", **options)
    assert output.loss.item() == pytest.approx(by_row)
    assert output.metrics["clip_fraction"] == pytest.approx(2 / 5)
    # Only unclipped tokens have a gradient: -A ratio / denominator.
    assert gradient(inputs, normalisation="dapo", **options)[0].tolist() == pytest.approx(
        [0, -2 * 0.5 / 5, -2 * 1.1 / 5]
    )
    assert gradient(inputs, normalisation="dapo", **options)[1].tolist() == pytest.approx([1.5 / 5, 0, 0])


def test_entropy_and_kl_by_hand() -> None:
    inputs = LossInputs(
        log_probs_BT=torch.tensor([[math.log(0.5)]], dtype=torch.float64),
        old_log_probs_BT=torch.tensor([[math.log(0.5)]], dtype=torch.float64),
        advantages=torch.tensor([3.0], dtype=torch.float64),
        mask_BT=torch.tensor([[True]]),
        entropy_BT=torch.tensor([[0.7]], dtype=torch.float64),
        reference_log_probs_BT=torch.tensor([[math.log(0.25)]], dtype=torch.float64),
    )
    kl = 0.5 - math.log(0.5) - 1
    output = make_loss(inputs, entropy_weight=0.1, kl_weight=0.2)
    assert output.loss.item() == pytest.approx(-3.0 - 0.1 * 0.7 + 0.2 * kl)
    assert output.metrics["kl"] == pytest.approx(kl)
    assert output.metrics["entropy"] == pytest.approx(0.7)


# Dropping


def test_constant_groups_and_errors_are_dropped_and_counted() -> None:
    nan = float("nan")
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, nan, 0.3, nan, nan])
    groups = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])  # constant, good with one error, single, all errors
    advantages, kept = make_advantages(rewards, groups)
    assert kept.tolist() == [False, False, True, True, False, False, False, False]
    assert advantages.tolist() == [0, 0, -0.5, 0.5, 0, 0, 0, 0]
    counts = count_groups(rewards, groups)
    assert (counts.rows, counts.groups, counts.error_rows) == (8, 4, 3)
    assert (counts.constant_groups, counts.dropped_rows, counts.empty) == (3, 6, False)


def test_rounding_noise_does_not_make_a_group_worth_keeping() -> None:
    rewards = torch.tensor([0.1 + 0.2, 0.3, 0.3], dtype=torch.float64)
    with pytest.warns(EmptyBatchWarning):
        _, kept = make_advantages(rewards, torch.zeros(3, dtype=torch.long), "group")
    assert not kept.any()


def test_an_all_constant_batch_is_loud() -> None:
    rewards, groups = torch.ones(4), torch.tensor([0, 0, 1, 1])
    with pytest.warns(EmptyBatchWarning, match="4 rows"):
        advantages, kept = make_advantages(rewards, groups)
    assert count_groups(rewards, groups).empty
    inputs = make_inputs(4)
    inputs = replace(inputs, advantages=advantages.double(), mask_BT=inputs.mask_BT & kept[:, None])
    for name in NORMALISATIONS:
        output = make_loss(inputs, normalisation=name, kl_weight=0.1, entropy_weight=0.1)
        assert output.empty
        assert output.metrics["empty"] == 1
        assert output.metrics["tokens"] == 0
        assert output.loss.item() == 0
        assert not gradient(inputs, normalisation=name).any()


def test_dropped_rows_change_nothing() -> None:
    inputs = make_inputs()
    kept = torch.tensor([True, False, True, True, False, True])
    masked = replace(inputs, mask_BT=inputs.mask_BT & kept[:, None])
    fields = ("log_probs_BT", "old_log_probs_BT", "advantages", "mask_BT")
    selected = LossInputs(**{name: getattr(inputs, name)[kept] for name in fields})
    for name in NORMALISATIONS:
        first, second = make_loss(masked, normalisation=name), make_loss(selected, normalisation=name)
        assert first.loss.item() == pytest.approx(second.loss.item(), abs=1e-12)


# Agreement with TRL


@pytest.fixture(scope="module")
def trl_loss():
    """TRL's own `GRPOTrainer._compute_loss`, on given log-probabilities instead of a model's."""
    trl = pytest.importorskip("trl")

    class Trainer(trl.GRPOTrainer):
        def __init__(self, **settings) -> None:  # the real one loads models and data
            self.__dict__.update(settings)

        def _get_per_token_logps_and_entropies(self, *_args, **_kwargs):
            return self.log_probs, self.entropies, None

    def compute(inputs: LossInputs, loss_type: str, low: float, high: float, beta: float, entropy: float):
        accelerator = SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
        )
        trainer = Trainer(
            log_probs=inputs.log_probs_BT,
            entropies=inputs.entropy_BT,
            accelerator=accelerator,
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
            model=SimpleNamespace(training=True),
            loss_type=loss_type,
            beta=beta,
            epsilon_low=low,
            epsilon_high=high,
            max_completion_length=MAX_LENGTH,
            importance_sampling_level="token",
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            aux_loss_enabled=False,
            use_vllm=False,
            use_adaptive_entropy=False,
            entropy_coef=entropy,
            _entropy_bonus_enabled=entropy != 0,
            current_gradient_accumulation_steps=1,
            _metrics={"train": defaultdict(list)},
        )
        ids = torch.zeros(inputs.mask_BT.shape, dtype=torch.long)
        batch = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1] + 1,
            "completion_ids": ids,
            "completion_mask": inputs.mask_BT.long(),
            "advantages": inputs.advantages,
            "old_per_token_logps": inputs.old_log_probs_BT,
            "ref_per_token_logps": inputs.reference_log_probs_BT,
            "num_items_in_batch": inputs.mask_BT.sum(),
        }
        return trainer._compute_loss(trainer.model, batch), trainer._metrics["train"]

    return compute


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.1, 0.28)])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_loss_and_gradient_agree_with_trl(trl_loss, normalisation: str, clip, beta: float, seed: int) -> None:
    inputs = make_inputs(seed=seed)
    expected, metrics = trl_loss(inputs, TRL_NAMES[normalisation], *clip, beta, 0.0)
    output = make_loss(inputs, *clip, normalisation=normalisation, kl_weight=beta, max_length=MAX_LENGTH)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    ours, theirs = (torch.autograd.grad(loss, inputs.log_probs_BT)[0] for loss in (output.loss, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    clipped = metrics["clip_ratio/region_mean"][0]
    assert 0 < clipped < 1, "the case must clip some tokens and not others"
    assert output.metrics["clip_fraction"] == pytest.approx(clipped, abs=1e-6)
    if beta:
        assert output.metrics["kl"] == pytest.approx(metrics["kl"][0], abs=1e-6)


def test_token_level_entropy_bonus_agrees_with_trl(trl_loss) -> None:
    inputs = make_inputs()  # TRL's bonus is a mean over tokens whatever the loss type: ours is that under `dapo`
    expected, _ = trl_loss(inputs, "dapo", 0.2, 0.2, 0.0, 0.05)
    output = make_loss(inputs, normalisation="dapo", entropy_weight=0.05)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    ours, theirs = (torch.autograd.grad(loss, inputs.entropy_BT)[0] for loss in (output.loss, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_advantage_scale_agrees_with_trl() -> None:
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    rewards = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    advantages, _ = make_advantages(rewards.flatten(), torch.arange(3).repeat_interleave(8), "group")
    torch.testing.assert_close(advantages, expected.flatten(), atol=1e-6, rtol=0)


# Invariances


def test_row_order_and_names_of_groups_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(12, generator=generator, dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2])  # of unequal size
    order = torch.randperm(12, generator=generator)
    renamed = torch.tensor([900, -5, 17])[groups]
    for name in NORMALISATIONS:
        expected, _ = make_advantages(rewards, groups, name)
        for got in (make_advantages(rewards[order], ids[order], name)[0] for ids in (groups, renamed)):
            torch.testing.assert_close(got, expected[order])


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_micro_batches_with_the_global_denominator_add_up(normalisation: str) -> None:
    inputs = make_inputs(rows=8)
    options = {"normalisation": normalisation, "entropy_weight": 0.1, "kl_weight": 0.2}
    expected = gradient(inputs, max_length=MAX_LENGTH, **options)
    denominator = make_denominator(inputs.mask_BT, normalisation, MAX_LENGTH)
    shuffled = torch.tensor([5, 0, 3, 7, 2, 6, 1, 4])
    for parts in ([shuffled[:4], shuffled[4:]], [shuffled[:1], shuffled[1:6], shuffled[6:]]):  # cutting groups apart
        total = 0.0
        for rows in parts:
            width = int(inputs.mask_BT[rows].sum(1).max())  # a micro-batch is padded to its own longest row
            fields = {
                name: None if tensor is None else tensor[rows] if tensor.ndim == 1 else tensor[rows, :width]
                for name, tensor in ((n, getattr(inputs, n)) for n in LossInputs.__dataclass_fields__)
            }
            total = total + make_loss(LossInputs(**fields), denominator=denominator, **options).loss
        torch.testing.assert_close(torch.autograd.grad(total, inputs.log_probs_BT)[0], expected)


def test_denominators_add_up_over_ranks() -> None:
    mask = make_inputs(rows=8).mask_BT
    for name in NORMALISATIONS:
        whole = make_denominator(mask, name, MAX_LENGTH)
        assert make_denominator(mask[:3], name, MAX_LENGTH) + make_denominator(mask[3:], name, MAX_LENGTH) == whole


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_padding_does_not_matter_whatever_it_holds(normalisation: str) -> None:
    inputs = make_inputs()
    expected = gradient(inputs, normalisation=normalisation, max_length=MAX_LENGTH, kl_weight=0.1, entropy_weight=0.1)
    garbage = torch.full((6, 3), float("nan"), dtype=torch.float64)
    padded = {
        name: torch.cat([getattr(inputs, name), garbage], dim=1)
        for name in ("log_probs_BT", "old_log_probs_BT", "entropy_BT", "reference_log_probs_BT")
    }
    mask = torch.cat([inputs.mask_BT, torch.zeros(6, 3, dtype=torch.bool)], dim=1)
    wider = LossInputs(advantages=inputs.advantages, mask_BT=mask, **padded)
    loss = make_loss(wider, normalisation=normalisation, max_length=MAX_LENGTH, kl_weight=0.1, entropy_weight=0.1).loss
    torch.testing.assert_close(torch.autograd.grad(loss, inputs.log_probs_BT)[0], expected)


def test_cutting_a_token_in_two_does_not_change_the_gradient() -> None:
    """Dr. GRPO on policy: the gradient is that of A log p(row), in however many pieces the row comes."""
    log_probs = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -1.0, -1.5]], dtype=torch.float64, requires_grad=True)
    pieces = torch.stack([log_probs[:, 0], 0.3 * log_probs[:, 1], 0.7 * log_probs[:, 1], log_probs[:, 2]], dim=1)
    advantages = torch.tensor([1.0, -0.4], dtype=torch.float64)
    whole, cut = (
        LossInputs(lp, lp.detach(), advantages, torch.ones_like(lp, dtype=torch.bool)) for lp in (log_probs, pieces)
    )
    expected = torch.autograd.grad(make_loss(whole, max_length=8).loss, log_probs)[0]
    torch.testing.assert_close(torch.autograd.grad(make_loss(cut, max_length=8).loss, log_probs)[0], expected)


def test_per_token_advantages() -> None:
    inputs = make_inputs()
    repeated = replace(inputs, advantages=inputs.advantages[:, None].repeat(1, inputs.mask_BT.shape[1]))
    for name in NORMALISATIONS:
        assert make_loss(repeated, normalisation=name).loss.item() == make_loss(inputs, normalisation=name).loss.item()
    late = repeated.advantages.clone()
    late[:, 0] = 0
    assert not gradient(replace(inputs, advantages=late))[:, 0].any()


# Errors


def test_errors_name_what_is_wrong() -> None:
    inputs = make_inputs()
    with pytest.raises(ConfigError, match="did you mean 'dr_grpo'"):
        make_advantages(torch.ones(2), torch.zeros(2), "dr_gpro")
    with pytest.raises(ConfigError, match="did you mean 'dapo'"):
        make_loss(inputs, normalisation="dappo")
    with pytest.raises(ConfigError, match="one group id per row"):
        make_advantages(torch.ones(2), torch.zeros(3))
    with pytest.raises(ConfigError, match="reference_log_probs_BT is missing"):
        make_loss(replace(inputs, reference_log_probs_BT=None), kl_weight=0.1)
    with pytest.raises(ConfigError, match="entropy_BT is missing"):
        make_loss(replace(inputs, entropy_BT=None), entropy_weight=0.1)
    with pytest.raises(ConfigError, match="old_log_probs_BT has shape"):
        make_loss(replace(inputs, old_log_probs_BT=inputs.old_log_probs_BT[:, 1:]))
    with pytest.raises(ConfigError, match="advantages have shape"):
        make_loss(replace(inputs, advantages=inputs.advantages[1:]))
