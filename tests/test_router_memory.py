"""The router's learner and reader at sizes where memory counts: checkpointed activations, a bounded cache."""

from __future__ import annotations

import pytest
import torch

from roro_ray.config import RouterConfig
from roro_ray.routing.router import RouterNetwork, make_router
from roro_ray.routing.router_policy import RouterPolicy

pytestmark = pytest.mark.timeout(60)


def _learn(network: RouterNetwork) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of one pass, and the bytes that were kept for it."""
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    ids_BT = torch.arange(2, 258).repeat(2, 1)
    features_BDF = torch.zeros(2, 3, network.head[0].in_features - network.width)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = network(ids_BT, ids_BT > 0, torch.tensor([[5, 90, 255]] * 2), features_BDF)
    logits.square().sum().backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}, kept


def test_checkpointed_activations_take_less_memory_and_give_the_same_gradient() -> None:
    torch.manual_seed(0)
    network = make_router(RouterConfig(), 2)
    plain, whole = _learn(network)
    network.zero_grad(set_to_none=True)
    network.checkpoint_activations()
    saved, part = _learn(network)
    assert part < whole / 2
    assert plain.keys() == saved.keys() and len(plain) > 10
    for name, gradient in plain.items():
        assert torch.allclose(gradient, saved[name], atol=1e-6), name


def test_a_router_without_an_encoder_has_nothing_to_checkpoint() -> None:
    make_router(RouterConfig(encoder=""), 2).checkpoint_activations()


def test_the_cache_of_the_reader_is_as_large_as_it_is_told() -> None:
    texts = [[7 + i, *range(20, 60)] for i in range(8)]
    computed = {}
    for cache_mb in (0, 1):
        reader = RouterPolicy(make_router(RouterConfig(), 2), cache_mb=cache_mb)._core.reader
        assert reader is not None
        reader.read(texts)
        reader.read([[*text, 5] for text in texts])
        computed[cache_mb] = reader.tokens_computed
    assert computed[0] == 8 * (41 + 42) and computed[1] == 8 * (41 + 1)
