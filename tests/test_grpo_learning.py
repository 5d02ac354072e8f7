"""GRPO learns bandits whose optimum is known."""

from __future__ import annotations

import pytest
import torch

from roro_ray.learning.grpo import NORMALISATIONS, LossInputs, make_advantages, make_loss

pytestmark = pytest.mark.timeout(60)


def train_bandit(means: torch.Tensor, normalisation: str, entropy_weight: float, updates: int, seed: int = 0):
    """GRPO on a contextual bandit, `means` [contexts, arms], reward = mean + noise; the mean of the last policies."""
    generator = torch.Generator().manual_seed(seed)
    contexts, arms = means.shape
    group_size, groups_per_context = 8, 8
    logits = torch.zeros(contexts, arms, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    group_context = torch.arange(contexts).repeat(groups_per_context)
    context = group_context.repeat_interleave(group_size)
    groups = torch.arange(len(group_context)).repeat_interleave(group_size)
    policies = []
    for update in range(updates):
        log_policy = logits.log_softmax(-1)
        policies.append(log_policy.detach().exp())
        action = torch.multinomial(policies[-1][context], 1, generator=generator)
        rewards = means[context, action[:, 0]] + 0.1 * torch.randn(len(context), generator=generator)
        advantages, kept = make_advantages(rewards, groups, normalisation)
        log_probs = log_policy[context].gather(1, action)
        entropy = -(log_policy.exp() * log_policy).sum(-1)[context][:, None]
        inputs = LossInputs(log_probs, log_probs.detach(), advantages, kept[:, None], entropy)
        optimizer.zero_grad()
        make_loss(inputs, normalisation=normalisation, entropy_weight=entropy_weight).loss.backward()
        optimizer.step()
        if update == updates * 3 // 4:  # let Adam settle
            optimizer.param_groups[0]["lr"] = 0.01
    return torch.stack(policies[-50:]).mean(0)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_learns_the_best_arm_of_every_context(normalisation: str) -> None:
    means = torch.tensor([[0.2, 0.5, 0.8, 0.3], [0.9, 0.1, 0.2, 0.6]])
    policy = train_bandit(means, normalisation, 0.0, 200)
    assert policy[0, 2] > 0.95
    assert policy[1, 0] > 0.95


def test_entropy_bonus_reaches_the_known_optimum() -> None:
    """The maximum of E[r] + w H is softmax(r / w); centring on a mean that includes the row scales r by 1 - 1/G."""
    means, weight = torch.tensor([[0.2, 0.5, 0.8, 0.3]]), 0.3
    policy = train_bandit(means, "dr_grpo", weight, 300)
    optimum = (means * (1 - 1 / 8) / weight).softmax(-1)
    torch.testing.assert_close(policy, optimum, atol=0.04, rtol=0)
