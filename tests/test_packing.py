"""Packed rows: what goes where, and that packing, chunks and checkpointing change no number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sequences import make_tiny_model
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from roro_ray.config import LoraConfig
from roro_ray.errors import ConfigError
from roro_ray.learning.packing import (
    PackedScorer,
    check_actions,
    pack_lengths,
    pack_row,
    scatter_actions,
    spread_rows,
)
from roro_ray.learning.sequences import Completion, TokenBatch, lm_log_probs, make_token_batch
from roro_ray.world.tokenizer import make_tokenizer

pytestmark = pytest.mark.timeout(60)
TOKENIZER = make_tokenizer()
LENGTHS = ((5, 9), (2, 1), (8, 14), (1, 3), (6, 6))  # prompt, completion


def make_batch(vocabulary: int, lengths: tuple[tuple[int, int], ...] = LENGTHS, seed: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (count,), generator=generator).tolist())

    completions = [
        Completion(row, draw(prompt), draw(own), (-3.0,) * own, "", "stop") for row, (prompt, own) in enumerate(lengths)
    ]
    advantages = torch.tensor([1.0, -0.5, 0.25, 2.0, -1.0][: len(lengths)])
    return make_token_batch(completions, advantages, torch.zeros(len(lengths), dtype=torch.long))


def make_model(family: str) -> PreTrainedModel:
    if family in ("qwen3", "llama"):
        return make_tiny_model(TOKENIZER, family).double()
    shape = {
        "vocab_size": 60,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "initializer_range": 0.4,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if family == "window":
        return MistralForCausalLM(MistralConfig(**shape, sliding_window=4)).double().eval()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts)).eval()  # grouped kernels know no float64


def score_packed(model: PreTrainedModel, batch: TokenBatch, chunk: int = 7) -> tuple[Tensor, Tensor]:
    row = pack_row(batch.ids_BT, batch.attention_mask_BT, batch.action_mask_BT)
    scores = PackedScorer(model, chunk)(row.ids_1N, row.positions_1N, row.predicting_A, row.targets_A, 0.7)
    log_probs_BT, entropy_BT = (scatter_actions(values, batch.action_mask_BT) for values in scores)
    return log_probs_BT, entropy_BT


# Which sequence goes where


def test_longest_first_into_the_first_row_with_room() -> None:
    assert pack_lengths([3, 7, 5, 2, 3], 10) == [[0, 1], [2, 3, 4]]
    assert pack_lengths([10, 10], 10) == [[0], [1]]
    assert pack_lengths([], 10) == []


def test_a_sequence_beyond_the_budget_is_named() -> None:
    with pytest.raises(ConfigError, match=r"sequence 2 has 11 tokens, more than the 10 .* raise lora\.token_budget"):
        pack_lengths([3, 10, 11], 10)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=30), world=st.integers(1, 4))
def test_every_sequence_is_in_one_row_of_one_rank(lengths: list[int], world: int) -> None:
    ranks = spread_rows(lengths, 20, world)
    assert len(ranks) == world and len({len(rows) for rows in ranks}) == 1  # the same number of passes
    assert sorted(index for rows in ranks for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 20 for rows in ranks for row in rows)
    assert len(ranks[0]) == -(-len(pack_lengths(lengths, 20)) // world)  # as few passes as one rank's rows need


def test_ranks_share_what_one_row_would_hold() -> None:
    assert spread_rows([4, 3, 2, 1], 100, 2) == [[[0, 3]], [[1, 2]]]
    assert spread_rows([4], 100, 2) == [[[0]], [[]]]


def test_a_row_laid_out_by_hand() -> None:
    ids = torch.tensor([[11, 12, 13, 0], [21, 22, 23, 24]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    actions = torch.tensor([[False, True, True, False], [False, False, False, True]])
    row = pack_row(ids, mask, actions)
    assert row.ids_1N.tolist() == [[11, 12, 13, 21, 22, 23, 24]]
    assert row.positions_1N.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert row.predicting_A.tolist() == [0, 1, 5] and row.targets_A.tolist() == [12, 13, 24]
    values = scatter_actions(torch.tensor([1.0, 2.0, 3.0]), actions)
    assert values.tolist() == [[0, 1, 2, 0], [0, 0, 0, 3]]


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        ([[True, False, False]], "nothing predicts|first token"),
        ([[False, False, True]], "padding token is marked"),
        ([[False, False, False]], "no token of a packed row is an action"),
    ],
)
def test_masks_that_make_no_sense_are_refused(actions: list[list[bool]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_actions(torch.tensor([[1, 1, 0]]), torch.tensor(actions))


# Packing changes no number


@pytest.mark.parametrize("attention", ["sdpa", "segments"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "window", "moe"])
def test_packed_sequences_do_not_see_each_other(family: str, attention: str) -> None:
    model = make_model(family)
    model.set_attn_implementation(attention)
    tolerance = 1e-12 if model.dtype == torch.float64 else 1e-4
    batch = make_batch(50)
    log_probs_BT, entropy_BT = score_packed(model, batch)
    expected = [lm_log_probs(model, batch.select(torch.tensor([row])), temperature=0.7) for row in range(len(batch))]
    for row, (one_BT, own_entropy_BT) in enumerate(expected):
        width = one_BT.shape[1]
        assert torch.allclose(log_probs_BT[row, :width], one_BT[0], atol=tolerance, rtol=0)
        assert torch.allclose(entropy_BT[row, :width], own_entropy_BT[0], atol=tolerance, rtol=0)


def test_what_stands_beside_a_sequence_does_not_matter() -> None:
    model = make_model("qwen3")
    batch = make_batch(50)
    before, _ = score_packed(model, batch)
    batch.ids_BT[2] = (batch.ids_BT[2] + 17) % 50
    after, _ = score_packed(model, batch)
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(before[others], after[others]) and not torch.equal(before[2], after[2])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunks_and_checkpoints_and_kernels_change_neither_value_nor_gradient(checkpointing: bool) -> None:
    gradients = []
    for chunk, attention in ((1, "sdpa"), (5, "segments"), (1000, "sdpa")):
        model = make_model("window")
        model.set_attn_implementation(attention)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        log_probs_BT, entropy_BT = score_packed(model, make_batch(50), chunk)
        (log_probs_BT.sum() + 0.3 * entropy_BT.square().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for other in gradients[1:]:
        assert all(torch.allclose(gradients[0][name], other[name], atol=1e-10, rtol=1e-9) for name in other)


def test_logits_never_exist_for_more_than_a_chunk_of_tokens() -> None:
    model = make_model("qwen3").train()
    seen: list[int] = []
    scorer = PackedScorer(model, 4)
    model.get_output_embeddings().register_forward_hook(lambda _module, _inputs, output: seen.append(len(output)))
    batch = make_batch(50)
    row = pack_row(batch.ids_BT, batch.attention_mask_BT, batch.action_mask_BT)
    log_probs_A, _ = scorer(row.ids_1N, row.positions_1N, row.predicting_A, row.targets_A)
    log_probs_A.sum().backward()
    assert max(seen) == 4 and sum(seen) == 2 * batch.action_tokens  # once forward, once again for the gradient


def test_a_model_that_caps_its_logits_is_refused() -> None:
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=12,
        final_logit_softcapping=0.5,
    )
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM changes its logits behind its output layer"):
        PackedScorer(Gemma2ForCausalLM(config).eval(), 8)


def test_a_model_whose_packed_sequences_see_each_other_is_refused() -> None:
    model = make_model("qwen3")
    AttentionMaskInterface.register("deaf", lambda *args, **kwargs: None)
    AttentionInterface.register("deaf", sdpa_attention_forward)  # causal over the whole row
    model.set_attn_implementation("deaf")
    with pytest.raises(ConfigError, match="with attention deaf lets packed sequences see each other"):
        PackedScorer(model, 8)


def test_outside_of_a_packed_row_segments_are_sdpa() -> None:
    model, ids = make_model("window"), torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 7, 8, 9, 10]])
    mask = (ids > 0).long()
    expected = model(input_ids=ids, attention_mask=mask).logits
    model.set_attn_implementation("segments")
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)


def test_the_default_budget_holds_the_longest_trace_of_real_models() -> None:
    assert LoraConfig().token_budget >= 16_384
