"""Reading texts token by token once gives the states of reading them whole."""

import random

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3Model

from roro_ray.routing.reader import TextReader, _group
from roro_ray.world.corpus import CorpusSpec
from roro_ray.world.models import ModelSpec, make_model
from roro_ray.world.tokenizer import make_char_tokenizer, make_tokenizer

pytestmark = pytest.mark.timeout(60)


def make_body(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    tokenizer = make_char_tokenizer() if family == "llama" else make_tokenizer()
    return make_model(ModelSpec(family, 16, 2, 2, 32, CorpusSpec(), 0, 0.0), tokenizer).model.eval()


def make_windowed_body() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 80,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = Qwen3Config(
        **shape, num_key_value_heads=2, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    return Qwen3Model(config).eval()


def make_texts(seed: int = 0, count: int = 30) -> list[list[list[int]]]:
    """Growing texts, one list per episode; several episodes begin alike."""
    rng = random.Random(seed)
    queries = [[rng.randrange(3, 60) for _ in range(rng.randint(1, 25))] for _ in range(6)]
    episodes = []
    for _ in range(count):
        texts = [rng.choice(queries)]
        for _ in range(rng.randint(0, 6)):
            texts.append(texts[-1] + [rng.randrange(3, 6) for _ in range(rng.randint(1, 4))])
        episodes.append(texts)
    return episodes


def read_whole(body: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return body(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]


@pytest.mark.parametrize("family", ["qwen3", "llama", "windowed"])
@pytest.mark.parametrize("cache_mb", [1, 0])
def test_states_are_those_of_the_whole_text(family: str, cache_mb: int) -> None:
    body = make_windowed_body() if family == "windowed" else make_body(family)
    reader = TextReader(body, cache_mb)
    episodes = make_texts()
    for depth in range(7):
        texts = [texts[depth] for texts in episodes if depth < len(texts)]
        states = reader.read(texts)
        expected = torch.stack([read_whole(body, ids) for ids in texts])
        assert torch.allclose(states, expected, atol=1e-5)
    assert (reader.tokens_reused > 0) is (cache_mb > 0 and family != "windowed")


def test_each_token_is_computed_once() -> None:
    reader = TextReader(make_body("qwen3"), 1)
    episodes = [*make_texts(count=1), [[7, 8, 9], [7, 8, 9, 10, 11], [7, 8, 9, 10, 11, 12]]]
    for texts in episodes:
        for text in texts:
            reader.read([text])
    assert reader.tokens_computed == sum(len(texts[-1]) for texts in episodes)


def test_a_full_store_forgets_the_oldest_and_stays_right() -> None:
    body = make_body("qwen3")
    reader = TextReader(body, 1)
    capacity = (1 << 20) // reader._shape.bytes_per_token
    rng = random.Random(1)
    texts = [[rng.randrange(3, 300) for _ in range(200)] for _ in range(capacity // 200 + 10)]
    for start in range(0, len(texts), 7):
        reader.read(texts[start : start + 7])
    states = reader.read([texts[0] + [5], texts[-1] + [5]])
    for state, ids in zip(states, (texts[0] + [5], texts[-1] + [5]), strict=True):
        assert torch.allclose(state, read_whole(body, ids), atol=1e-5)


def test_new_weights_need_a_forget() -> None:
    body = make_body("qwen3")
    reader = TextReader(body, 1)
    reader.read([[5, 6, 7, 8]])
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.mul_(0.8)
    reader.forget()
    assert torch.allclose(reader.read([[5, 6, 7, 8, 9]])[0], read_whole(body, [5, 6, 7, 8, 9]), atol=1e-5)


def test_groups_hold_every_text_once_and_pad_little() -> None:
    rng = random.Random(2)
    lengths = [rng.randint(1, 900) for _ in range(300)]
    missing = [rng.randint(1, length) for length in lengths]
    groups = _group(missing, lengths)
    assert sorted(index for group in groups for index in group) == list(range(300))
    for group in groups:
        assert len(group) * max(lengths[i] for i in group) <= 16_384
        assert missing[group[0]] <= min(missing[i] for i in group) * 4 / 3 + 8
