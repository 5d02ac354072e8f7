"""Token batches, the sampler, the language-model update and supervised fine-tuning, on tiny random models."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from roro_ray.errors import ConfigError
from roro_ray.learning import sampling
from roro_ray.learning.grpo import make_advantages
from roro_ray.learning.sampling import sample_completions
from roro_ray.learning.sequences import Completion, lm_log_probs, make_token_batch, split_batch
from roro_ray.learning.sft import IGNORED, make_sft_batch, sft_loss, train_sft
from roro_ray.learning.updates import UpdateSettings, update_model
from roro_ray.world.tokenizer import make_char_tokenizer, make_tokenizer

pytestmark = pytest.mark.timeout(60)
TOKENIZER = make_tokenizer()
PROMPTS = ["Start with 36. A: double; B: times 04.\n\n", "Start with 1.\n\n", "Fold 36 through A: <* 04>.\n\n"]


def make_tiny_model(tokenizer, family: str = "qwen3", spread: float = 0.4, seed: int = 0) -> PreTrainedModel:
    """An untrained model whose wide initial weights make its distributions far from uniform."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "tie_word_embeddings": True,
        "initializer_range": spread,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**shape)).eval()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_tiny_model(TOKENIZER)


def make_batch(completions: list[Completion], rewards: list[float] | None = None, pad_id: int = 0):
    advantages = torch.zeros(len(completions)) if rewards is None else torch.tensor(rewards)
    return make_token_batch(completions, advantages, torch.tensor([c.prompt for c in completions]), pad_id)


# Sampler


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_sampled_log_probs_are_those_of_the_model(family: str, temperature: float) -> None:
    tokenizer = TOKENIZER if family == "qwen3" else make_char_tokenizer()
    model = make_tiny_model(tokenizer, family)
    completions = sample_completions(model, tokenizer, PROMPTS, 8, 20, temperature, stop="\n", seed=3)
    assert len({len(c.ids) for c in completions}) > 1, "the case must have completions of unequal length"
    batch = make_batch(completions, pad_id=tokenizer.pad_token_id)
    with torch.no_grad():
        log_probs, entropy = lm_log_probs(model, batch, temperature)
    torch.testing.assert_close(log_probs, batch.old_log_probs_BT, atol=2e-5, rtol=0)
    assert not log_probs[~batch.action_mask_BT].any()
    assert not entropy[~batch.action_mask_BT].any()


def test_log_probs_and_entropy_agree_with_a_plain_forward_pass_of_each_row(model) -> None:
    completions = sample_completions(model, TOKENIZER, PROMPTS, 2, 6)
    with torch.no_grad():
        log_probs, entropy = lm_log_probs(model, make_batch(completions))
        for row, c in enumerate(completions):
            logits = model(input_ids=torch.tensor([c.prompt_ids + c.ids])).logits[0]
            first = len(c.prompt_ids)
            for t in range(first, first + len(c.ids)):
                distribution = torch.distributions.Categorical(logits=logits[t - 1])
                token = torch.tensor(c.ids[t - first])
                assert log_probs[row, t].item() == pytest.approx(distribution.log_prob(token).item(), abs=2e-5)
                assert entropy[row, t].item() == pytest.approx(distribution.entropy().item(), abs=2e-5)


def test_each_prompt_is_encoded_once_and_then_one_token_a_row(model) -> None:
    shapes: list[tuple[int, ...]] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    completions = sample_completions(model, TOKENIZER, PROMPTS, 16, 5)
    hook.remove()
    assert shapes[0] == (3, max(len(c.prompt_ids) for c in completions))
    assert all(width == 1 and rows <= 48 for rows, width in shapes[1:])
    assert [c.prompt for c in completions] == [i for i in range(3) for _ in range(16)]


def test_the_same_seed_gives_the_same_samples(model) -> None:
    first, again = (sample_completions(model, TOKENIZER, PROMPTS, 4, 12, seed=7) for _ in range(2))
    assert first == again
    assert first != sample_completions(model, TOKENIZER, PROMPTS, 4, 12, seed=8)
    assert len({c.ids for c in first}) > len(PROMPTS), "the samples of a prompt must differ"


def test_dropping_finished_rows_changes_no_sample(model, monkeypatch) -> None:
    arguments = (model, TOKENIZER, PROMPTS, 16, 24)
    expected = sample_completions(*arguments, stop="e")
    assert {c.finish for c in expected} == {"stop", "length"}
    for share in (0.0, 1.1):  # never drop, and drop at every step
        monkeypatch.setattr(sampling, "_COMPACT_SHARE", share)
        got = sample_completions(*arguments, stop="e")
        assert [c.ids for c in got] == [c.ids for c in expected]


def test_first_tokens_follow_the_models_distribution(model) -> None:
    n = 4000
    completions = sample_completions(model, TOKENIZER, PROMPTS[:1], n, 1)
    ids = torch.tensor([completions[0].prompt_ids])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in completions]), minlength=len(expected))
    likely = expected > 0.01
    assert likely.sum() > 3
    deviation = (counts / n - expected)[likely] / (expected * (1 - expected) / n).sqrt()[likely]
    assert deviation.abs().max() < 4.5, "more than 4.5 standard errors from the model's probability"
    assert counts[expected < 1e-7].sum() == 0


def test_temperature_zero_is_greedy_generation(model) -> None:
    completions = sample_completions(model, TOKENIZER, PROMPTS, 2, 10, temperature=0)
    for prompt in range(len(PROMPTS)):
        first, second = completions[2 * prompt : 2 * prompt + 2]
        assert first.ids == second.ids
        ids = torch.tensor([first.prompt_ids])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10)
        assert list(first.ids) == expected[0, ids.shape[1] :].tolist()


def test_a_stop_text_ends_a_completion_however_many_tokens_spell_it() -> None:
    """The character tokenizer spells the stop in two tokens, the shared one in one."""
    for tokenizer, family, stop in ((make_char_tokenizer(), "llama", "ab"), (TOKENIZER, "qwen3", "\n\n")):
        model = make_tiny_model(tokenizer, family, spread=0.02)
        spelled = tokenizer(stop, add_special_tokens=False)["input_ids"]
        assert len(spelled) == (2 if family == "llama" else 1)
        bias = torch.zeros(len(tokenizer))
        bias[spelled] = 5.0  # otherwise nearly uniform: the stop comes soon, and in pieces too
        model.lm_head.bias = torch.nn.Parameter(bias)
        completions = sample_completions(model, tokenizer, ["36"], 40, 12, stop=stop)
        stopped = [c for c in completions if c.finish == "stop" and c.ids[-1] != tokenizer.eos_token_id]
        assert len(stopped) > 10
        for c in completions:
            assert stop not in c.text
            assert stop not in tokenizer.decode(list(c.ids[:-1])), "nothing is written after the stop"
        for c in stopped:
            assert tokenizer.decode(list(c.ids)) == c.text + stop
            assert len(c.log_probs) == len(c.ids)


def test_the_end_token_ends_a_completion_and_belongs_to_it() -> None:
    model = make_tiny_model(TOKENIZER, spread=0.02)
    bias = torch.zeros(len(TOKENIZER))
    bias[TOKENIZER.eos_token_id] = 4.0
    model.lm_head.bias = torch.nn.Parameter(bias)
    completions = sample_completions(model, TOKENIZER, PROMPTS, 30, 8)
    for c in completions:
        ended = c.ids[-1] == TOKENIZER.eos_token_id
        assert c.finish == ("stop" if ended else "length")
        assert ended or len(c.ids) == 8
        assert TOKENIZER.eos_token_id not in c.ids[:-1]
        assert "<eos>" not in c.text
    assert {c.finish for c in completions} == {"stop", "length"}


def test_sampling_leaves_the_model_as_it_was(model) -> None:
    model.train()
    sample_completions(model, TOKENIZER, PROMPTS, 1, 2)
    assert model.training
    model.eval()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_sampler_errors(model) -> None:
    assert sample_completions(model, TOKENIZER, [], 2, 4) == []
    with pytest.raises(ConfigError, match="has no token"):
        sample_completions(model, TOKENIZER, ["36", ""], 2, 4)
    with pytest.raises(ConfigError, match="n=0"):
        sample_completions(model, TOKENIZER, PROMPTS, 0, 4)


# Batches and updates


def test_token_batch_marks_only_sampled_tokens() -> None:
    completions = [
        Completion(0, (5, 6, 7), (8,), (-0.5,), "", "length"),
        Completion(1, (5,), (9, 10, 11, 1), (-1.0, -2.0, -3.0, -4.0), "", "stop"),
    ]
    batch = make_batch(completions, [0.5, -0.5], pad_id=99)
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 99], [5, 9, 10, 11, 1]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch.action_mask_BT.int().tolist() == [[0, 0, 0, 1, 0], [0, 1, 1, 1, 1]]
    assert batch.old_log_probs_BT.tolist() == [[0, 0, 0, -0.5, 0], [0, -1.0, -2.0, -3.0, -4.0]]
    assert (batch.action_tokens, len(batch)) == (5, 2)
    assert batch.select(torch.tensor([True, False])).ids_BT.tolist() == [[5, 6, 7, 8]]
    with pytest.raises(ConfigError, match="2 completions, 1 advantages"):
        make_token_batch(completions, torch.zeros(1), torch.zeros(2))


def test_split_batch_keeps_every_row_within_the_budget(model) -> None:
    completions = sample_completions(model, TOKENIZER, PROMPTS, 12, 20, stop="e")
    batch = make_batch(completions, [float(i) for i in range(36)])
    parts = split_batch(batch, 120)
    assert len(parts) > 2
    assert all(part.ids_BT.numel() <= 120 for part in parts)
    assert sorted(v for part in parts for v in part.advantages_B.tolist()) == [float(i) for i in range(36)]
    assert sum(part.action_tokens for part in parts) == batch.action_tokens
    assert sum(part.ids_BT.numel() for part in parts) < batch.ids_BT.numel(), "rows of like length need less padding"
    assert [len(part) for part in split_batch(batch, 1)] == [1] * 36


def test_an_action_at_the_first_token_is_an_error(model) -> None:
    with pytest.raises(ConfigError, match="first token"):
        lm_log_probs(model, make_batch([Completion(0, (), (3, 4), (-1.0, -1.0), "", "length")]))


@pytest.mark.parametrize("normalisation", ["dr_grpo", "group", "dapo"])
def test_micro_batches_make_the_same_update(model, normalisation: str) -> None:
    completions = sample_completions(model, TOKENIZER, PROMPTS, 8, 16, stop="e")
    advantages, _ = make_advantages(torch.randn(24, generator=torch.Generator().manual_seed(0)), torch.arange(24) // 8)
    batch = make_batch(completions, advantages.tolist())
    reference = make_tiny_model(TOKENIZER, seed=1)
    results = []
    for max_tokens in (10_000, 100):
        trained = copy.deepcopy(model)
        settings = UpdateSettings(16, normalisation, entropy_weight=0.01, kl_weight=0.01, max_tokens=max_tokens)
        metrics = update_model(trained, [torch.optim.SGD(trained.parameters(), lr=0.1)], batch, settings, reference)
        results.append((metrics, torch.cat([p.detach().flatten() for p in trained.parameters()])))
    (whole, whole_weights), (parts, part_weights) = results
    torch.testing.assert_close(whole_weights, part_weights, atol=1e-6, rtol=0)
    assert not torch.equal(whole_weights, torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert (whole["tokens"], whole["rows"]) == (batch.action_tokens, 24)
    assert whole["ratio"] == pytest.approx(1, abs=1e-4)


def test_a_batch_without_actions_takes_no_step(model) -> None:
    completions = sample_completions(model, TOKENIZER, PROMPTS, 2, 4)
    batch = make_batch(completions).select(torch.zeros(6, dtype=torch.bool))
    trained = copy.deepcopy(model)
    metrics = update_model(trained, [torch.optim.SGD(trained.parameters(), lr=1.0)], batch, UpdateSettings(4))
    assert metrics["empty"] == 1
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), model.parameters(), strict=True))


def test_grpo_learns_to_write_what_is_rewarded() -> None:
    """Reward: share of six tokens with an even id. Untrained about a half; the optimum has no other token."""
    model = make_tiny_model(TOKENIZER, spread=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rewards_by_update = []
    for update in range(40):
        completions = sample_completions(model, TOKENIZER, PROMPTS, 32, 6, seed=update)
        rewards = torch.tensor([sum(i % 2 == 0 for i in c.ids) / 6 for c in completions])
        rewards_by_update.append(float(rewards.mean()))
        if rewards.min() == 1:
            break
        groups = torch.tensor([c.prompt for c in completions])
        advantages, kept = make_advantages(rewards, groups)
        batch = make_token_batch(completions, advantages, groups).select(kept)
        update_model(model, [optimizer], batch, UpdateSettings(max_length=6))
    assert 0.3 < rewards_by_update[0] < 0.7
    assert rewards_by_update[-1] > 0.97


# Supervised fine-tuning


def test_sft_loss_is_the_models_own_loss_on_the_labelled_tokens(model) -> None:
    batch = make_sft_batch(
        [[5, 6, 7, 8, 9], [10, 11, 12]], [[False, True, False, True, True], [False, False, True]], pad_id=0
    )
    ids, mask, labels = batch
    assert labels.tolist() == [[IGNORED, 6, IGNORED, 8, 9], [IGNORED, IGNORED, 12, IGNORED, IGNORED]]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        assert sft_loss(model, batch).item() == pytest.approx(expected.item(), abs=1e-5)


def test_sft_learns_its_documents_and_says_them() -> None:
    model = make_tiny_model(TOKENIZER, spread=0.02)
    documents = {"36": "yes", "04": "no", "50": "overall: mostly"}
    ids, learned = [], []
    for prompt, target in documents.items():
        head, tail = (TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in (prompt, target))
        ids.append([*head, *tail, TOKENIZER.eos_token_id])
        learned.append([False] * len(head) + [True] * (len(tail) + 1))
    seen: list[int] = []
    losses = train_sft(
        model, itertools.repeat(make_sft_batch(ids, learned)), 80, 1e-2, on_update=lambda done, _: seen.append(done)
    )
    assert losses[0] > 5
    assert losses[-1] < 0.05
    assert seen == list(range(1, 81))
    assert not model.training
    completions = sample_completions(model, TOKENIZER, list(documents), 1, 8, temperature=0)
    assert [c.text for c in completions] == list(documents.values())


def test_sft_errors(model) -> None:
    batch = make_sft_batch([[5, 6]], [[False, True]])
    with pytest.raises(ConfigError, match="ran out after 2 of 3"):
        train_sft(copy.deepcopy(model), [batch, batch], 3)
    with pytest.raises(ConfigError, match="one flag per token"):
        make_sft_batch([[5, 6]], [[True]])
    with pytest.raises(ConfigError, match="first token"):
        sft_loss(model, make_sft_batch([[5, 6]], [[True, True]]))
