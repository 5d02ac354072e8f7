"""A router whose encoder stays as it is and is trained as a LoRA adapter: what is learned, published and saved."""

from pathlib import Path

import pytest
import torch

from roro_ray.config import Config, RouterConfig
from roro_ray.config_checks import check_config
from roro_ray.errors import CheckpointError, ConfigError
from roro_ray.learning.router_training import make_optimizer
from roro_ray.routing.router import RouterNetwork, fill_router, make_router
from roro_ray.routing.router_files import load_router, save_router

pytestmark = pytest.mark.timeout(60)
ADAPTED = RouterConfig(encoder_rank=4, encoder_dtype="bfloat16")


def make_network(config: RouterConfig = ADAPTED, seed: int = 0) -> RouterNetwork:
    torch.manual_seed(seed)
    return make_router(config, 2)


def read(network: RouterNetwork) -> torch.Tensor:
    ids_BT = (torch.arange(20).view(2, 10) * 31) % 200
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    boundaries_BD = torch.tensor([[2, 5, 9], [1, 4, 9]])
    features_BDF = torch.zeros(2, 3, network.head[0].in_features - network.width)  # type: ignore[union-attr,operator]
    return network(ids_BT, mask_BT, boundaries_BD, features_BDF)


def take_step(network: RouterNetwork) -> None:
    optimizer = make_optimizer(network, Config(router=ADAPTED))
    for _ in range(3):
        optimizer.zero_grad()
        (-torch.log_softmax(read(network), -1)[..., 1].mean()).backward()
        optimizer.step()


def test_only_adapter_and_head_are_learned_and_they_are_float32() -> None:
    network = make_network()
    state = network.learned_state()
    assert state and all(".lora_" in name or name.startswith("head.") for name in state)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    learned = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert learned == set(state)
    assert sum(t.numel() for t in state.values()) < 0.5 * sum(p.numel() for p in network.parameters())


def test_an_untrained_adapter_changes_nothing() -> None:
    plain = make_router(RouterConfig(), 2)
    adapted = make_network(RouterConfig(encoder_rank=4))
    adapted.head.load_state_dict(plain.head.state_dict())
    assert torch.allclose(read(plain), read(adapted), atol=1e-5)


def test_training_moves_what_is_published_and_leaves_the_base() -> None:
    network = make_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    take_step(network)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and changed <= set(network.learned_state())
    assert any(".lora_" in name for name in changed) and any(name.startswith("head.") for name in changed)
    other = make_network(seed=7)
    fill_router(other, network.learned_state())
    assert torch.equal(read(other), read(network))


def test_what_is_saved_is_small_and_loads_on_its_base(tmp_path: Path) -> None:
    network = make_network()
    take_step(network)
    directory = save_router(network, tmp_path / "router", 3)
    assert not (directory / "encoder").exists()
    loaded = load_router(directory, 2)
    assert loaded.version == 3 and torch.equal(read(loaded), read(network.eval()))
    again = load_router(save_router(loaded, tmp_path / "again", 4))
    assert torch.equal(read(again), read(loaded))


def test_weights_of_another_rank_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"lora_A.* is \[8, "):
        fill_router(make_network(), make_network(RouterConfig(encoder_rank=8)).learned_state())
    with pytest.raises(CheckpointError, match=r"lora_A\.default\.weight is missing"):
        fill_router(make_network(), make_network(RouterConfig()).learned_state())


def test_sixteen_bit_weights_are_not_trained_whole() -> None:
    with pytest.raises(ConfigError, match="encoder_rank=0 contradict"):
        check_config(Config(router=RouterConfig(encoder_dtype="bfloat16")))
    check_config(Config(router=ADAPTED))
